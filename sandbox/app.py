"""The sandbox as a service: an HTTP control port through which a developer or a test tells Meta's side what to do.

`GET /` lists the routes. Requests and answers are JSON, errors `{"error":{"code","message"}}`. A route that sends one
body waits up to 5 s for its 200 and answers `{"delivery","accepted","status"}`: `accepted` false means it is still
being sent again, as Meta would, or that it was one for a single try; `status` is the last HTTP status, null when
nobody answered. `from` and `to` are a phone number in digits or a BSUID.

The same port answers as Graph (`sandbox.graph`): `POST /v25.0/{phone_number_id}/messages` and
`GET /v25.0/{waba_id}/message_templates`. Its rules, faults and journal are under `/meta/rules`, `/meta/faults` and
`/meta/calls`. Files (`sandbox.media`) are `POST /v25.0/{phone_number_id}/media`, `GET` and `DELETE /v25.0/{media_id}`,
and the media host below `/media/`; their journal is `/meta/media`, and files of one's own are `/meta/media-files`.

It answers as one host of MegaAPI too (`sandbox.megaapi`): `/rest/…`, told what to do under `/megaapi/…`
(`sandbox.megaapi_control`). And as any number of Baileys gateways (`sandbox.baileys`): `/baileys/{gateway}/…`, told
what to do under `/control/baileys/…` (`sandbox.baileys_control`).

A SIP registrar (`sandbox.sip`) has a port of its own, which `GET /sip` tells; it is told what to do under `/sip/…`
(`sandbox.sip_control`). A drachtio, if it is asked for, under `/sip/drachtio…` (`sandbox.drachtio_control`).
"""

import argparse
import asyncio
import base64
import binascii
import logging
import secrets
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import SystemRandom
from typing import Annotated, Any, Literal

import httpx
import msgspec
import uvicorn
from msgspec import Meta
from starlette import types
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sandbox import baileys_control, drachtio_control, files, megaapi_control, meta, sip_control
from sandbox.answers import Protocol
from sandbox.baileys import Baileys
from sandbox.config import App, Channel, Config, ConfigError, ConfigFile
from sandbox.control import Refused, after_of, limit_of, read_body, shown
from sandbox.faults import SetFault
from sandbox.graph import Graph
from sandbox.megaapi import MegaApi
from sandbox.meta import JSON
from sandbox.rules import SetRules
from sandbox.runs import Plan, Run
from sandbox.sender import Post, Sender
from sandbox.sip_service import NOWHERE, USUAL, Places, Sip

log = logging.getLogger("sandbox")

WAIT = 5.0  # seconds a request waits for the first 200
MAX_RUNS = 4  # at one time
REMEMBERED_RUNS = 20
MAX_ELEMENTS = 250_000  # in one run; they are all made before the first is sent
CUSTOMER = "5511944440001"
NO_MESSAGE = ("reaction", "system", "request_welcome")  # types that open no window (whatsapp-cloud-api.md §10)

Customer = Annotated[str, Meta(pattern=r"^([0-9]{5,20}|[A-Z]{2}\.(ENT\.)?[A-Za-z0-9]{1,128})$")]
Word = Annotated[str, Meta(min_length=1, max_length=64)]


# Requests


class Say(msgspec.Struct, forbid_unknown_fields=True):
    channel: str
    text: Annotated[str, Meta(max_length=100_000)]
    from_: Customer = msgspec.field(name="from", default=CUSTOMER)
    name: Annotated[str, Meta(max_length=200)] = "Bia Prado"


class Send(msgspec.Struct, forbid_unknown_fields=True):
    channel: str
    type: Word
    object: Any = None
    count: Annotated[int, Meta(ge=1, le=1000)] = 1
    from_: Customer = msgspec.field(name="from", default=CUSTOMER)
    name: Annotated[str, Meta(max_length=200)] = "Bia Prado"


class Status(msgspec.Struct, forbid_unknown_fields=True):
    channel: str
    wamid: Annotated[str, Meta(min_length=1, max_length=10_000)]
    status: Word
    to: Customer = CUSTOMER
    at: int | None = None
    extra: JSON = {}


class Field(msgspec.Struct, forbid_unknown_fields=True):
    channel: str
    field: Word
    value: JSON | None = None


class Raw(msgspec.Struct, forbid_unknown_fields=True):
    channel: str
    body: str | None = None
    base64: str | None = None
    signature: Literal["good", "bad", "none", "old"] = "good"


class StartTraffic(msgspec.Struct, forbid_unknown_fields=True):
    channels: list[str] | None = None
    bodies: Annotated[int, Meta(ge=1, le=20_000)] = 300
    seed: int | None = None
    rate: Annotated[float, Meta(gt=0, le=10_000)] | None = None
    contacts: Annotated[int, Meta(ge=1, le=100_000)] = 200
    duplicates: Annotated[float, Meta(ge=0, le=0.5)] = 0.2
    malformed: Annotated[float, Meta(ge=0, le=0.5)] = 0.01
    shuffle: bool = True
    per_body: tuple[Annotated[int, Meta(ge=1, le=1000)], Annotated[int, Meta(ge=1, le=1000)]] = (1, 50)


class Handshake(msgspec.Struct, forbid_unknown_fields=True):
    channel: str
    verify_token: str | None = None


class AddMediaFile(msgspec.Struct, forbid_unknown_fields=True):
    mime_type: Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[ -~]+$")]
    channel: str | None = None
    id: Annotated[str, Meta(pattern=r"^[0-9]{1,40}$")] | None = None
    base64: str | None = None
    size: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    seed: Annotated[str, Meta(max_length=1000)] | int = 0
    filename: Annotated[str, Meta(max_length=100_000)] | None = None


# Routes; the first line of each docstring is what `GET /` tells, so it holds the body


async def index(request: Request) -> JSONResponse:
    """This list."""
    routes = [
        {"method": method, "path": route.path, "does": (route.endpoint.__doc__ or "").splitlines()[0]}
        for route in ROUTES
        for method in sorted((route.methods or set()) - {"HEAD"})
    ]
    return JSONResponse({"routes": routes})


async def health(request: Request) -> JSONResponse:
    """Alive, with the names of the channels and the SIP port's address, or what is wrong with the configuration."""
    sip: Sip = request.app.state.sip
    alive = {"status": "ok"} | ({"sip": sip.address} if sip.address else {})
    try:
        return JSONResponse({**alive, "channels": list(_config(request).by_channel())})
    except Refused as error:
        return JSONResponse({**alive, "channels": [], "config_error": str(error)})


async def say(request: Request) -> JSONResponse:
    """{"channel","text","from"?,"name"?}: a customer writes one text; answers its wamid too."""
    ask = await read_body(request, Say)
    app, channel = _channel(request, ask.channel)
    wamid = _new_wamid(ask.from_)
    message = meta.text_message(wamid, ask.from_, ask.text, int(time.time()))
    _graph(request).limits.heard(channel.phone_number_id, ask.from_)
    value = {"contacts": [meta.contact(ask.from_, ask.name)], "messages": [message]}
    outcome = await _deliver_change(request, app, channel, "messages", value)
    return JSONResponse({"wamid": wamid, **outcome})


async def send(request: Request) -> JSONResponse:
    """{"channel","type","object"?,"count"?,"from"?,"name"?}: `count` messages of any type in one body; answers wamids.

    Without an object an example is sent; several messages go through the examples of the type in turn.
    """
    ask = await read_body(request, Send)
    app, channel = _channel(request, ask.channel)
    wamids = [_new_wamid(ask.from_) for _ in range(ask.count)]
    now = int(time.time())
    host = _graph(request).media.host_for(channel, _address(request))

    def make() -> list[JSON]:
        return [
            meta.message(ask.type, wamid, ask.from_, now, ask.object, variant=i, media_host=host)
            for i, wamid in enumerate(wamids)
        ]

    try:
        messages = await asyncio.to_thread(make)  # the hash of a large file takes its time
    except ValueError as error:
        raise Refused(400, "INVALID_PAYLOAD", str(error)) from error
    if ask.type not in NO_MESSAGE:
        _graph(request).limits.heard(channel.phone_number_id, ask.from_)
    if ask.type in meta.MEDIA_TYPES and ask.object is None:
        for message in messages:
            _graph(request).media.told(message[ask.type]["id"], channel.phone_number_id, now, host.bytes)
    value = {"contacts": [meta.contact(ask.from_, ask.name)], "messages": messages}
    outcome = await _deliver_change(request, app, channel, "messages", value)
    return JSONResponse({"wamids": wamids, **outcome})


async def status(request: Request) -> JSONResponse:
    """{"channel","wamid","status","to"?,"at"?,"extra"?}: what became of an outgoing message; `extra` keys are added."""
    ask = await read_body(request, Status)
    app, channel = _channel(request, ask.channel)
    at = int(time.time()) if ask.at is None else ask.at
    element = meta.status(ask.wamid, ask.status, at, ask.to) | ask.extra
    beside = {} if ask.status == "failed" else {"contacts": [meta.contact(ask.to)]}
    outcome = await _deliver_change(request, app, channel, "messages", beside | {"statuses": [element]})
    return JSONResponse(outcome)


async def field(request: Request) -> JSONResponse:
    """{"channel","field","value"?}: any other webhook field; without a value an example, the same each time."""
    ask = await read_body(request, Field)
    app, channel = _channel(request, ask.channel)
    return JSONResponse(await _deliver_change(request, app, channel, ask.field, ask.value))


async def raw(request: Request) -> JSONResponse:
    """{"channel","body" or "base64","signature"?: good|bad|none|old}: any bytes; without a good signature only once.

    `old` signs with the legacy SHA-1 header alone.
    """
    ask = await read_body(request, Raw)
    app, _ = _channel(request, ask.channel)
    if (ask.body is None) == (ask.base64 is None):
        raise Refused(400, "INVALID_PAYLOAD", "give either body or base64")
    try:
        content = ask.body.encode() if ask.body is not None else base64.b64decode(ask.base64 or "", validate=True)
    except binascii.Error as error:
        raise Refused(400, "INVALID_PAYLOAD", f"base64: {error}") from error
    headers = {
        "good": {"X-Hub-Signature-256": meta.sign(content, app.app_secret)},
        "bad": {"X-Hub-Signature-256": meta.sign(content, app.app_secret + "x")},
        "none": {},
        "old": {"X-Hub-Signature": meta.sign_sha1(content, app.app_secret)},
    }[ask.signature]
    post = Post(app.url, content, headers, once=ask.signature != "good")
    return JSONResponse(await _deliver(request, post))


async def handshake(request: Request) -> JSONResponse:
    """{"channel","verify_token"?}: the GET verification; answers verified, status, exact_challenge, content_type."""
    ask = await read_body(request, Handshake)
    app, _ = _channel(request, ask.channel)
    challenge = str(secrets.randbelow(10**10))
    params = {
        "hub.mode": "subscribe",
        "hub.challenge": challenge,
        "hub.verify_token": app.verify_token if ask.verify_token is None else ask.verify_token,
    }
    async with httpx.AsyncClient(timeout=WAIT, trust_env=False) as http:
        try:
            answer = await http.get(httpx.URL(app.url).copy_merge_params(params))
        except httpx.HTTPError:
            return JSONResponse({"verified": False, "status": None, "exact_challenge": False, "content_type": None})
    exact = answer.content == challenge.encode()
    return JSONResponse(
        {
            "verified": exact and answer.status_code == 200,
            "status": answer.status_code,
            "exact_challenge": exact,
            "content_type": answer.headers.get("content-type"),
        }
    )


async def start_traffic(request: Request) -> JSONResponse:
    """{"channels"?,"bodies"?,"seed"?,"rate"?,"contacts"?,"duplicates"?,"malformed"?,"shuffle"?,"per_body"?}: a run.

    Answers `{"id","seed"}` at once. `rate` is bodies per second, unlimited when left out. The same seed gives the same
    message ids, so a second run with it is all duplicates; without one a fresh seed is taken.
    """
    ask = await read_body(request, StartTraffic)
    if ask.per_body[0] > ask.per_body[1]:
        raise Refused(400, "INVALID_PAYLOAD", "per_body is [fewest, most]")
    if ask.bodies * ask.per_body[1] > MAX_ELEMENTS:
        raise Refused(400, "INVALID_PAYLOAD", f"bodies times the most per_body is above {MAX_ELEMENTS}")
    runs: dict[str, Run] = request.app.state.runs
    ended = [run for run in runs.values() if run.state not in ("preparing", "running")]
    if len(runs) - len(ended) >= MAX_RUNS:
        raise Refused(429, "RATE_LIMITED", f"{MAX_RUNS} runs are going on; wait for one or cancel it")
    names = list(_config(request).by_channel()) if ask.channels is None else list(dict.fromkeys(ask.channels))
    chosen = [_channel(request, name) for name in names]
    if not chosen:
        raise Refused(400, "INVALID_PAYLOAD", "no channel to send to")
    plan = Plan(
        channels=chosen,
        bodies=ask.bodies,
        seed=secrets.randbelow(2**32) if ask.seed is None else ask.seed,
        rate=ask.rate,
        contacts=ask.contacts,
        duplicates=ask.duplicates,
        malformed=ask.malformed,
        shuffle=ask.shuffle,
        per_body=ask.per_body,
    )
    for old in ended[: max(0, len(runs) - REMEMBERED_RUNS + 1)]:
        del runs[old.id]
    media = _graph(request).media
    hosts = {channel.phone_number_id: media.host_for(channel, _address(request)) for _, channel in chosen}
    run = Run(plan, request.app.state.sender, hosts, media.told)
    runs[run.id] = run
    return JSONResponse({"id": run.id, "seed": plan.seed}, status_code=202)


async def traffic(request: Request) -> JSONResponse:
    """How far a run is; `?truth=1` adds how many distinct messages and statuses a receiver must have kept."""
    run = _run(request)
    progress = run.progress()
    if request.query_params.get("truth") == "1":
        progress["truth"] = run.truth_counts()
    return JSONResponse(progress)


async def cancel_traffic(request: Request) -> JSONResponse:
    """End a run: what is not accepted yet is dropped."""
    run = _run(request)
    await run.cancel()
    return JSONResponse(run.progress())


async def journal(request: Request) -> JSONResponse:
    """`?limit=50` (1..1000): the latest deliveries, newest first, and how many there are of each state."""
    limit = request.query_params.get("limit", "50")
    if not limit.isdecimal() or not 1 <= int(limit) <= 1000:
        raise Refused(400, "INVALID_PAYLOAD", "limit is a number from 1 to 1000")
    sender: Sender = request.app.state.sender
    latest = list(sender.journal)[: -int(limit) - 1 : -1]
    return JSONResponse({**sender.counts, "deliveries": [shown(delivery) for delivery in latest]})


async def set_rules(request: Request) -> JSONResponse:
    """{"channel"?,"window"?,"pair"?,"rate"?,"statuses"?,"drop_ninth_digit"?,"access_token"?,…}: Graph's rules.

    For one channel or for all; what is left out stays. `rate` is messages a second or null, `statuses` is
    {"words"?,"delay"?,"lost"?,"duplicates"?,"shuffle"?}; of media, there are "check_media", "url_seconds",
    "media_seconds", "upload_seconds" and "media_bytes". See `sandbox.rules`. Answers the rules that hold.
    """
    ask = await read_body(request, SetRules)
    if ask.channel is not None:
        _channel(request, ask.channel)
    _graph(request).rules.set(ask)
    return JSONResponse(_graph(request).rules.shown())


async def rules(request: Request) -> JSONResponse:
    """The rules for all channels, and for those that have their own."""
    return JSONResponse(_graph(request).rules.shown())


async def clear_rules(request: Request) -> JSONResponse:
    """Every rule as it was at the start, windows closed, nothing used up of any rate."""
    _graph(request).rules.clear()
    _graph(request).limits.clear()
    return JSONResponse(_graph(request).rules.shown())


async def set_fault(request: Request) -> JSONResponse:
    """{"kind","channel"?,"to"?,"share"?,"seed"?,"count"?,"seconds"?,"code"?,"http"?,"ms"?,…}: something goes wrong.

    `sandbox.faults` tells the kinds and the other keys. Answers the fault's id.
    """
    ask = await read_body(request, SetFault)
    if ask.channel is not None:
        _channel(request, ask.channel)
    return JSONResponse({"id": _graph(request).faults.set(ask).id}, status_code=201)


async def faults(request: Request) -> JSONResponse:
    """The faults that are set, in the order in which they are tried, and how many calls met each."""
    return JSONResponse({"faults": _graph(request).faults.shown()})


async def clear_faults(request: Request) -> JSONResponse:
    """Nothing goes wrong any more."""
    _graph(request).faults.clear()
    return JSONResponse({"faults": []})


async def calls(request: Request) -> Response:
    """`?limit=50&channel=&after=`: the latest calls Graph got, newest last, or the first ones after number `after`."""
    channel = request.query_params.get("channel")
    listed = _graph(request).calls.listed(limit_of(request), channel=channel, after=after_of(request))
    return Response(msgspec.json.encode({"calls": listed}), media_type="application/json")


async def calls_summary(request: Request) -> JSONResponse:
    """Counts of the calls: accepted, refused by code, open ones, the busiest second; and of the statuses to come."""
    graph = _graph(request)
    statuses = {"waiting": graph.statuses.waiting, "sent": graph.statuses.sent}
    return JSONResponse({**graph.calls.summary(), "statuses": statuses})


async def clear_calls(request: Request) -> JSONResponse:
    """Forget the calls and their counts, and how many statuses were sent; those that wait still come."""
    _graph(request).calls.clear()
    _graph(request).statuses.sent = 0
    return JSONResponse({"calls": []})


async def media(request: Request) -> Response:
    """`?limit=50&kind=&id=&after=`: the latest requests about files, newest last, or the first after number `after`."""
    asked = request.query_params
    listed = _graph(request).media.journal.listed(
        limit_of(request), kind=asked.get("kind"), id=asked.get("id"), after=after_of(request)
    )
    return Response(msgspec.json.encode({"media": listed}), media_type="application/json")


async def media_summary(request: Request) -> JSONResponse:
    """Counts of the requests about files that have ended."""
    return JSONResponse(_graph(request).media.journal.summary())


async def clear_media(request: Request) -> JSONResponse:
    """Forget those requests and their counts; the files stay."""
    _graph(request).media.journal.clear()
    return JSONResponse({"media": []})


async def add_media_file(request: Request) -> JSONResponse:
    """{"mime_type","channel"?,"id"?,"base64" or "size"?,"seed"?,"filename"?}: a file to serve; answers id and object.

    Without `base64` it is made, as valid as its type allows, of `size` bytes, and different for each seed. Without a
    channel any may have it. The object is what `POST /meta/send` takes as one, with the type that fits.
    """
    ask = await read_body(request, AddMediaFile)
    channel = None if ask.channel is None else _channel(request, ask.channel)[1]
    if ask.base64 is not None and (ask.size is not None or ask.seed != 0):
        raise Refused(400, "INVALID_PAYLOAD", "either base64, or size and seed")
    try:
        content: files.Content = (
            files.make(ask.mime_type, str(ask.seed), ask.size)
            if ask.base64 is None
            else files.Given(base64.b64decode(ask.base64, validate=True))
        )
    except (ValueError, binascii.Error) as error:
        raise Refused(400, "INVALID_PAYLOAD", str(error)) from error
    await asyncio.to_thread(lambda: content.digest)  # of a large file it takes its time, and is remembered
    its = _graph(request).media
    item = its.add(ask.id, content, ask.mime_type, channel, ask.filename)
    return JSONResponse({"id": item.id, "object": its.webhook_object(item, _address(request))}, status_code=201)


async def media_files(request: Request) -> JSONResponse:
    """The files of one's own, then the uploads, each with how often it was resolved, and downloaded as a whole."""
    return JSONResponse({"files": _graph(request).media.listed()})


async def clear_media_files(request: Request) -> JSONResponse:
    """Forget them, and which files were deleted."""
    _graph(request).media.clear()
    return JSONResponse({"files": []})


ROUTES = [
    Route("/", index),
    Route("/health", health),
    Route("/meta/say", say, methods=["POST"]),
    Route("/meta/send", send, methods=["POST"]),
    Route("/meta/status", status, methods=["POST"]),
    Route("/meta/field", field, methods=["POST"]),
    Route("/meta/raw", raw, methods=["POST"]),
    Route("/meta/handshake", handshake, methods=["POST"]),
    Route("/meta/traffic", start_traffic, methods=["POST"]),
    Route("/meta/traffic/{id}", traffic),
    Route("/meta/traffic/{id}", cancel_traffic, methods=["DELETE"]),
    Route("/meta/journal", journal),
    Route("/meta/rules", rules),
    Route("/meta/rules", set_rules, methods=["POST"]),
    Route("/meta/rules", clear_rules, methods=["DELETE"]),
    Route("/meta/faults", faults),
    Route("/meta/faults", set_fault, methods=["POST"]),
    Route("/meta/faults", clear_faults, methods=["DELETE"]),
    Route("/meta/calls", calls),
    Route("/meta/calls", clear_calls, methods=["DELETE"]),
    Route("/meta/calls/summary", calls_summary),
    Route("/meta/media", media),
    Route("/meta/media", clear_media, methods=["DELETE"]),
    Route("/meta/media/summary", media_summary),
    Route("/meta/media-files", media_files),
    Route("/meta/media-files", add_media_file, methods=["POST"]),
    Route("/meta/media-files", clear_media_files, methods=["DELETE"]),
    *megaapi_control.ROUTES,
    *baileys_control.ROUTES,
    *sip_control.ROUTES,
    *drachtio_control.ROUTES,
]


# What the routes share


def _config(request: Request) -> Config:
    config: ConfigFile = request.app.state.config
    try:
        return config.read()
    except ConfigError as error:
        raise Refused(503, "UNAVAILABLE", str(error)) from error


def _channel(request: Request, name: str) -> tuple[App, Channel]:
    channels = _config(request).by_channel()
    if name not in channels:
        raise Refused(404, "NOT_FOUND", f"no channel {name!r}; there are: {', '.join(channels) or 'none'}")
    return channels[name]


def _graph(request: Request) -> Graph:
    graph: Graph = request.app.state.graph
    return graph


def _address(request: Request) -> str:
    """This server's, as the client wrote it; the media host is there too."""
    return f"{request.url.scheme}://{request.url.netloc}"


def _run(request: Request) -> Run:
    runs: dict[str, Run] = request.app.state.runs
    run_id = request.path_params["id"]
    if run_id not in runs:
        raise Refused(404, "NOT_FOUND", f"no run {run_id!r}")
    return runs[run_id]


def _new_wamid(customer: str) -> str:
    return meta.new_wamid(SystemRandom(), customer)


async def _deliver_change(request: Request, app: App, channel: Channel, field: str, value: JSON | None) -> JSON:
    number = channel.number
    try:
        change = meta.change(number, field, value)
    except ValueError as error:
        raise Refused(400, "INVALID_PAYLOAD", str(error)) from error
    sent_at = None if field in meta.NUMBER_FIELDS else int(time.time())
    content = meta.encode(meta.envelope([meta.entry(number.waba_id, [change], sent_at)]))
    return await _deliver(request, Post(app.url, content, {"X-Hub-Signature-256": meta.sign(content, app.app_secret)}))


async def _deliver(request: Request, post: Post) -> JSON:
    sender: Sender = request.app.state.sender
    delivery = sender.send(post)
    try:
        async with asyncio.timeout(WAIT):
            await delivery.ended.wait()
    except TimeoutError:
        pass  # it goes on being sent; the answer says that it is not accepted yet
    return {"delivery": delivery.id, "accepted": delivery.state == "accepted", "status": delivery.status}


# The service


class Service(Starlette):
    """The control port's app, which the providers' requests pass by: they come by the thousand and are timed."""

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        if scope["type"] == "http" and self.state.graph.is_asked(scope["path"]):
            await self.state.graph.serve(scope, receive, send)
        elif scope["type"] == "http" and self.state.megaapi.is_asked(scope["path"]):
            await self.state.megaapi.serve(scope, receive, send)
        elif scope["type"] == "http" and self.state.baileys.is_asked(scope["path"]):
            await self.state.baileys.serve(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create_app(config_path: str | Path, sip: Places = NOWHERE) -> Starlette:
    """The control port, Graph and MegaAPI as an ASGI app. It sends only within its lifespan. Serve it with `server`.

    The file need not exist yet: it is read when a request needs it, and again when it has changed. The SIP registrar
    and the drachtio are there for as long, if they are given ports.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.config = ConfigFile(Path(config_path))
        app.state.runs = {}
        async with Sender() as app.state.sender:
            app.state.graph = Graph(app.state.config, app.state.sender)
            app.state.megaapi = MegaApi(app.state.config)
            app.state.baileys = Baileys(app.state.config)
            app.state.sip = Sip(app.state.config, sip)
            app.state.drachtio = app.state.sip.drachtio
            async with (
                app.state.graph.running(),
                app.state.megaapi.running(),
                app.state.baileys.running(),
                app.state.sip.running(),
            ):
                yield
            for run in app.state.runs.values():
                await run.cancel()

    return Service(
        routes=ROUTES,
        lifespan=lifespan,
        exception_handlers={Refused: _refused, HTTPException: _http_error},
    )


def server(app: types.ASGIApp, **more: Any) -> uvicorn.Server:
    """A server for it, with the protocol that faults need and no lines of its own; `more` are uvicorn's settings."""
    settings: dict[str, Any] = {
        "http": Protocol,
        "ws": "none",
        "log_config": None,
        "access_log": False,
        "timeout_keep_alive": 75,
        **more,
    }
    return uvicorn.Server(uvicorn.Config(app, **settings))


def _error(status: int, code: str, message: str) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, status_code=status)


def _refused(request: Request, error: Any) -> JSONResponse:
    return _error(error.status, error.code, str(error))


def _http_error(request: Request, error: Any) -> JSONResponse:
    code = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}.get(error.status_code, "INVALID_PAYLOAD")
    return _error(error.status_code, code, f"{error.detail}; GET / lists the routes")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; what is pending then is dropped. Returns the exit code."""
    about = "A small Meta, MegaAPI, Baileys and SIP registrar: webhooks out, messages in."
    parser = argparse.ArgumentParser(prog="sandbox", description=about)
    parser.add_argument("--port", type=int, default=9010, help="control port (9010)")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (127.0.0.1)")
    parser.add_argument("--config", type=Path, required=True, help="JSON file with apps, channels and instances")
    parser.add_argument(
        "--sip-port", type=_sip_port, default=USUAL, help="of the SIP registrar (5070, or any if it is taken; or `off`)"
    )
    parser.add_argument("--drachtio-port", type=int, default=None, help="of a drachtio (none; 0: any)")
    parser.add_argument("--drachtio-sip-port", type=int, default=0, help="where it sends from and takes calls (any)")
    args = parser.parse_args(argv)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # httpx logs every request with its URL, and a handshake has the verify token in it.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    serving = server(
        create_app(args.config, Places(args.host, args.sip_port, args.drachtio_port, args.drachtio_sip_port)),
        host=args.host,
        port=args.port,
        log_level="warning",
        timeout_graceful_shutdown=int(WAIT) + 1,
    )
    # uvicorn shuts down in order and then raises the signal once more for whoever listened before: with nobody
    # listening it would end the process with the signal's exit code instead of 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    log.info("sandbox on http://%s:%d, configuration %s", args.host, args.port, args.config)
    serving.run()
    return 0


def _sip_port(text: str) -> int | None:
    if text == "off":
        return None
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a port nor `off`")
    return int(text)
