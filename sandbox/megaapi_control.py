"""The control routes of the simulated MegaAPI: its instances, what comes in through them, what goes wrong.

`instance` is a name or a key everywhere. Routes that send one body wait up to 5 s for its 200 and answer `delivery`,
`accepted` and `status` as Meta's do; `delivery` is null when the instance has no webhook.
"""

import asyncio
import base64
import binascii
import time
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sandbox import files
from sandbox import megaapi_words as words
from sandbox.config import MegaInstance
from sandbox.control import Refused, after_of, limit_of, read_body, shown
from sandbox.megaapi import MegaApi
from sandbox.megaapi_faults import SetMegaFault
from sandbox.megaapi_files import Sent
from sandbox.megaapi_hooks import Form, Lids, SetMegaRules
from sandbox.megaapi_instances import CONNECTED, DISCONNECTED, Instance
from sandbox.meta import JSON
from sandbox.sender import Delivery

WAIT = 5.0  # seconds a request waits for the first 200
CUSTOMER = "5511944440001"

Word = Annotated[str, Meta(min_length=1, max_length=64)]
Text = Annotated[str, Meta(max_length=100_000)]
Key = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._~-]{0,99}$")]
Jid = Annotated[str, Meta(pattern=r"^[0-9-]{3,40}(@[a-z.]{2,20})?$")]
Id = Annotated[str, Meta(min_length=1, max_length=10_000)]


# Requests


class New(msgspec.Struct, forbid_unknown_fields=True):
    name: Word
    instance_key: Key
    token: Annotated[str, Meta(min_length=1, max_length=1_000)]
    status: Word = CONNECTED
    number: Annotated[str, Meta(pattern=r"^[0-9]{5,20}$")] = "5511955550200"
    webhook_url: Annotated[str, Meta(pattern=r"^https?://[!-~]+$")] | None = None


class Add(msgspec.Struct, forbid_unknown_fields=True):
    instances: list[New] | None = None
    count: Annotated[int, Meta(ge=1, le=20_000)] | None = None
    prefix: Key = "bulk"
    token: Annotated[str, Meta(min_length=1, max_length=1_000)] | None = None
    status: Word = CONNECTED
    webhook_url: Annotated[str, Meta(pattern=r"^https?://[!-~]+$")] | None = None


class SetStatus(msgspec.Struct, forbid_unknown_fields=True):
    status: Word
    instances: list[str] | None = None
    emit: bool = False


class Flap(msgspec.Struct, forbid_unknown_fields=True):
    instance: str
    every: Annotated[float, Meta(ge=0, le=86_400)]
    emit: bool = True


class One(msgspec.Struct, forbid_unknown_fields=True):
    instance: str


class Connection(msgspec.Struct, forbid_unknown_fields=True):
    instance: str
    word: Word
    form: Form | None = None
    status: Word | None = None


class File(msgspec.Struct, forbid_unknown_fields=True):
    mime_type: Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[ -~]+$")] | None = None
    base64: str | None = None
    size: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    seed: Annotated[str, Meta(max_length=1000)] | int | None = None
    filename: Annotated[str, Meta(max_length=100_000)] | None = None


class Say(msgspec.Struct, forbid_unknown_fields=True):
    instance: str
    kind: str = "text"
    text: Text | None = None
    from_: Jid = msgspec.field(name="from", default=CUSTOMER)
    name: Annotated[str, Meta(max_length=100_000)] = "Bia Prado"
    group: Jid | None = None
    lid: Lids = "never"
    from_me: bool = False
    id: Id | None = None
    count: Annotated[int, Meta(ge=1, le=1_000)] = 1
    form: Form | None = None
    at: int | None = None
    quoted: Id | None = None
    quoted_from_me: bool = False
    media: File | None = None
    object: Any = None
    extra: JSON = {}


class Ack(msgspec.Struct, forbid_unknown_fields=True):
    instance: str
    id: Id
    status: int | str
    to: Jid = CUSTOMER
    participant: Jid | None = None
    form: Form | None = None


class Raw(msgspec.Struct, forbid_unknown_fields=True):
    instance: str
    body: str | None = None
    base64: str | None = None
    content_type: Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[ -~]+$")] = "application/json"


# Routes; the first line of each docstring is what `GET /` tells, so it holds the body


async def instances(request: Request) -> JSONResponse:
    """`?limit=50&status=`: instances of MegaAPI, and how many there are of each status."""
    its, word = _host(request).instances, request.query_params.get("status")
    listed = [one.shown() for one in its if word in (None, one.status)][: limit_of(request)]
    return JSONResponse({"instances": listed, "count": len(its), "by_status": its.by_status()})


async def add_instances(request: Request) -> JSONResponse:
    """{"instances":[{"name","instance_key","token",…}]} or {"count","prefix"?,"token"?,"status"?,"webhook_url"?}: more.

    With a count their names and keys are `prefix-000001` and so on; without a token each has its own.
    """
    ask = await read_body(request, Add)
    if (ask.instances is None) == (ask.count is None):
        raise Refused(400, "INVALID_PAYLOAD", "give either instances or count")
    made = []
    for one in ask.instances if ask.instances is not None else _bulk(ask):
        try:
            made.append(_host(request).instances.add(MegaInstance(**msgspec.structs.asdict(one))))
        except ValueError as error:
            raise Refused(409, "CONFLICT", str(error)) from error
    told = [{"name": one.name, "instance_key": one.key, "token": one.token} for one in made]
    return JSONResponse({"instances": told}, status_code=201)


async def remove_instances(request: Request) -> JSONResponse:
    """`?instance=`: there is no such instance any more; without one, none of those that were added here."""
    host, name = _host(request), request.query_params.get("instance")
    gone = [_instance(request, name)] if name is not None else list(host.instances)
    for instance in gone:
        await _stop_flapping(host, instance)
    if name is not None:
        host.instances.remove(gone[0])
    else:
        host.instances.remove_added()
    return JSONResponse({"count": len(host.instances)})


async def set_status(request: Request) -> JSONResponse:
    """{"status","instances"?,"emit"?}: any word, for these or for all; with `emit` webhooks tell of it."""
    ask = await read_body(request, SetStatus)
    host = _host(request)
    chosen = list(host.instances) if ask.instances is None else [_instance(request, name) for name in ask.instances]
    changed = [one for one in chosen if one.becomes(ask.status)]
    if ask.emit:
        for one in changed:
            host.hooks.connection(one)
    return JSONResponse({"changed": len(changed)})


async def flap(request: Request) -> JSONResponse:
    """{"instance","every","emit"?}: connected and disconnected by turns, each so many seconds; 0 ends it."""
    ask = await read_body(request, Flap)
    host, instance = _host(request), _instance(request, ask.instance)
    await _stop_flapping(host, instance)
    if ask.every:
        instance.flaps = ask.every
        host.flapping[instance.key] = asyncio.create_task(_flap(host, instance, ask))
    return JSONResponse(instance.shown())


async def scan(request: Request) -> JSONResponse:
    """{"instance"}: somebody scans the QR code: it is connected, and a webhook tells of it."""
    ask = await read_body(request, One)
    instance = _instance(request, ask.instance)
    instance.becomes(CONNECTED)
    return JSONResponse({"instance": instance.shown(), **await _sent(_host(request).hooks.connection(instance))})


async def connection(request: Request) -> JSONResponse:
    """{"instance","word","form"?,"status"?}: a webhook says so; the status only changes if one is given."""
    ask = await read_body(request, Connection)
    instance = _instance(request, ask.instance)
    if ask.status is not None:
        instance.becomes(ask.status)
    return await _emitted(request, instance, words.connection(instance, ask.word), ask.form)


async def say(request: Request) -> JSONResponse:
    """{"instance","kind"?,"text"?,"from"?,"group"?,"lid"?,"from_me"?,"media"?,…}: messages, each in a webhook.

    The other keys are "name", "id", "count", "form", "at", "quoted", "quoted_from_me", "object" for the message itself
    instead of an example of its kind, and "extra" for keys beside it. `media` is {"mime_type"?,"base64" or "size"?,
    "seed"?,"filename"?}. Answers ids, keys, the file, and the last body; `accepted` is said of all of them.
    """
    ask = await read_body(request, Say)
    host, instance = _host(request), _instance(request, ask.instance)
    if ask.kind not in words.KINDS:
        raise Refused(400, "INVALID_PAYLOAD", f"no kind {ask.kind!r}; there are {', '.join(words.KINDS)}")
    if ask.id is not None and ask.count > 1:
        raise Refused(400, "INVALID_PAYLOAD", "several messages cannot have one id")
    at = int(time.time()) if ask.at is None else ask.at
    file = await _file(host, ask)
    type, content = _said(ask, file, at)
    chat, author = _places(ask, instance)
    keys = [
        words.key(ask.id or words.new_id(), chat, from_me=ask.from_me, author=author, lids=ask.lid)
        for _ in range(ask.count)
    ]
    name = instance.name if ask.from_me else ask.name
    bodies = [words.message(instance, key, type, content, at, name) | ask.extra for key in keys]
    form = ask.form or host.hooks.rules.of(instance.key).form
    deliveries = [host.hooks.emit(instance, body, form) for body in bodies]
    outcomes = [await _sent(delivery) for delivery in deliveries]
    told = None
    if file is not None:
        told = {"sha256": file.content.digest.hex(), "size": file.content.size, "keys": file.keys}
    outcome = outcomes[-1] | {"accepted": all(one["accepted"] for one in outcomes)}
    ids = [key["id"] for key in keys]
    return JSONResponse({"ids": ids, "keys": keys, "file": told, "body": words.formed(form, bodies[-1]), **outcome})


async def ack(request: Request) -> JSONResponse:
    """{"instance","id","status","to"?,"participant"?,"form"?}: how far a message has come; any id, any status."""
    ask = await read_body(request, Ack)
    instance = _instance(request, ask.instance)
    author = None if ask.participant is None else words.jid(ask.participant)
    key = words.key(ask.id, words.jid(ask.to), from_me=True, author=author)
    return await _emitted(request, instance, words.ack(instance, key, ask.status), ask.form)


async def raw(request: Request) -> JSONResponse:
    """{"instance","body" or "base64","content_type"?}: any bytes to its webhook, only once."""
    ask = await read_body(request, Raw)
    if (ask.body is None) == (ask.base64 is None):
        raise Refused(400, "INVALID_PAYLOAD", "give either body or base64")
    content = ask.body.encode() if ask.body is not None else _decoded(ask.base64 or "")
    instance = _instance(request, ask.instance)
    delivery = _host(request).hooks.post(instance, content, once=True, type=ask.content_type)
    return JSONResponse(await _sent(delivery))


async def rules(request: Request) -> JSONResponse:
    """What holds for sends, echoes and acks of MegaAPI: for all instances, and for those that have their own."""
    return JSONResponse(_host(request).hooks.rules.shown())


async def set_rules(request: Request) -> JSONResponse:
    """{"instance"?,"answer_id"?,"echo"?,"acks"?,"ack_delay"?,"ack_lost"?,"form"?,"offline"?,…}: change some of them.

    All of them are in `sandbox.megaapi_hooks.MegaRules`. Answers the rules that hold.
    """
    ask = await read_body(request, SetMegaRules)
    key = None if ask.instance is None else _instance(request, ask.instance).key
    _host(request).hooks.rules.set(ask, key)
    return await rules(request)


async def clear_rules(request: Request) -> JSONResponse:
    """Every rule of MegaAPI as it was at the start."""
    _host(request).hooks.rules.clear()
    return await rules(request)


async def faults(request: Request) -> JSONResponse:
    """The faults that are set for MegaAPI, in the order in which they are tried, and how many calls met each."""
    return JSONResponse({"faults": _host(request).faults.shown()})


async def set_fault(request: Request) -> JSONResponse:
    """{"kind","place"?,"instance"?,"to"?,"share"?,"seed"?,"count"?,"seconds"?,"ms"?,…}: something goes wrong there.

    `sandbox.kinds` tells the kinds and places, `sandbox.megaapi_faults` the other keys. Answers the fault's id.
    """
    ask = await read_body(request, SetMegaFault)
    if ask.instance is not None:
        ask = msgspec.structs.replace(ask, instance=_instance(request, ask.instance).key)
    return JSONResponse({"id": _host(request).faults.set(ask).id}, status_code=201)


async def clear_faults(request: Request) -> JSONResponse:
    """Nothing goes wrong at MegaAPI any more."""
    _host(request).faults.clear()
    return JSONResponse({"faults": []})


async def calls(request: Request) -> Response:
    """`?limit=50&place=&instance=&after=`: what MegaAPI was asked, newest last, or the first after number `after`."""
    asked = request.query_params
    name = asked.get("instance")
    key = None
    if name is not None:
        instance = _host(request).instances.find(name)
        key = name if instance is None else instance.key  # those of one that is gone are still there
    listed = _host(request).calls.listed(
        limit_of(request), place=asked.get("place"), instance=key, after=after_of(request)
    )
    return Response(msgspec.json.encode({"calls": listed}), media_type="application/json")


async def calls_summary(request: Request) -> JSONResponse:
    """Counts of those calls: outcomes, doubles, the most under way at once by place; and of the webhooks."""
    host = _host(request)
    webhooks = {**host.hooks.sender.counts, "unheard": host.hooks.unheard, "waiting": host.hooks.waiting}
    return JSONResponse({**host.calls.summary(), "webhooks": webhooks})


async def clear_calls(request: Request) -> JSONResponse:
    """Forget those calls and their counts; what is to come of them still comes."""
    _host(request).calls.clear()
    return JSONResponse({"calls": []})


async def journal(request: Request) -> JSONResponse:
    """`?limit=50`: the latest webhooks of MegaAPI, newest first, and how many there are of each state."""
    sender = _host(request).hooks.sender
    latest = list(sender.journal)[: -limit_of(request) - 1 : -1]
    return JSONResponse({**sender.counts, "deliveries": [shown(delivery) for delivery in latest]})


ROUTES = [
    Route("/megaapi/instances", instances),
    Route("/megaapi/instances", add_instances, methods=["POST"]),
    Route("/megaapi/instances", remove_instances, methods=["DELETE"]),
    Route("/megaapi/status", set_status, methods=["POST"]),
    Route("/megaapi/flap", flap, methods=["POST"]),
    Route("/megaapi/scan", scan, methods=["POST"]),
    Route("/megaapi/connection", connection, methods=["POST"]),
    Route("/megaapi/say", say, methods=["POST"]),
    Route("/megaapi/ack", ack, methods=["POST"]),
    Route("/megaapi/raw", raw, methods=["POST"]),
    Route("/megaapi/rules", rules),
    Route("/megaapi/rules", set_rules, methods=["POST"]),
    Route("/megaapi/rules", clear_rules, methods=["DELETE"]),
    Route("/megaapi/faults", faults),
    Route("/megaapi/faults", set_fault, methods=["POST"]),
    Route("/megaapi/faults", clear_faults, methods=["DELETE"]),
    Route("/megaapi/calls", calls),
    Route("/megaapi/calls", clear_calls, methods=["DELETE"]),
    Route("/megaapi/calls/summary", calls_summary),
    Route("/megaapi/journal", journal),
]


# What the routes share


def _host(request: Request) -> MegaApi:
    host: MegaApi = request.app.state.megaapi
    host.configure()
    return host


def _instance(request: Request, name: str) -> Instance:
    found = _host(request).instances.find(name)
    if found is None:
        raise Refused(404, "NOT_FOUND", f"no instance {name!r}")
    return found


def _bulk(ask: Add) -> list[New]:
    names = [f"{ask.prefix}-{i:06}" for i in range(1, (ask.count or 0) + 1)]
    return [
        New(name, name, ask.token or f"token-{name}", ask.status, f"55119{i:08}", ask.webhook_url)
        for i, name in enumerate(names, 1)
    ]


async def _flap(host: MegaApi, instance: Instance, ask: Flap) -> None:
    while True:
        await asyncio.sleep(ask.every)
        instance.becomes(DISCONNECTED if instance.is_connected else CONNECTED)
        if ask.emit:
            host.hooks.connection(instance)


async def _stop_flapping(host: MegaApi, instance: Instance) -> None:
    instance.flaps = 0.0
    task = host.flapping.pop(instance.key, None)
    if task is not None:
        task.cancel()
        await asyncio.wait([task])


def _said(ask: Say, file: Sent | None, at: int) -> tuple[str, JSON | None]:
    """`messageType` and `message`."""
    if isinstance(ask.object, dict) and ask.object:
        return next(iter(ask.object)), ask.object
    if ask.object is not None:
        raise Refused(400, "INVALID_PAYLOAD", "object is a message: an object with a key")
    text = ("👍" if ask.kind == "reaction" else "Olá") if ask.text is None else ask.text
    who = words.jid(ask.from_)
    told = words.Told(text, at, file, who=who, from_me=ask.quoted_from_me, chat=words.jid(ask.group or ask.from_))
    if ask.quoted is not None:
        told = told._replace(quoted=ask.quoted)
    kind = "quote" if ask.kind == "text" and ask.quoted is not None else ask.kind
    return words.content(kind, told)


def _places(ask: Say, instance: Instance) -> tuple[str, str | None]:
    """The chat's JID and, in a group, the author's."""
    if ask.group is None:
        return words.jid(ask.from_), None
    group = ask.group if "@" in ask.group else f"{ask.group}@g.us"
    return group, instance.jid if ask.from_me else words.jid(ask.from_)


async def _file(host: MegaApi, ask: Say) -> Sent | None:
    """The file of a message that has one."""
    if ask.kind not in words.MEDIA_KINDS:
        if ask.media is not None:
            raise Refused(400, "INVALID_PAYLOAD", f"a message of kind {ask.kind!r} has no file")
        return None
    kind, mime_type = words.MEDIA_KINDS[ask.kind]
    given = ask.media or File()
    mime_type = given.mime_type or mime_type
    if given.base64 is not None and (given.size is not None or given.seed is not None):
        raise Refused(400, "INVALID_PAYLOAD", "either base64, or size and seed")
    if given.base64 is not None:
        content: files.Content = files.Given(_decoded(given.base64))
    else:
        try:
            seed = words.new_id() if given.seed is None else str(given.seed)
            content = files.make(mime_type, seed, given.size)
        except ValueError as error:
            raise Refused(400, "INVALID_PAYLOAD", str(error)) from error
    await asyncio.to_thread(lambda: content.digest)  # of a large file it takes its time, and is remembered
    return host.files.add(content, mime_type, kind, given.filename or "arquivo.pdf")


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, "INVALID_PAYLOAD", f"base64: {error}") from error


async def _emitted(request: Request, instance: Instance, body: JSON, form: Form | None) -> JSONResponse:
    return JSONResponse(await _sent(_host(request).hooks.emit(instance, body, form)))


async def _sent(delivery: Delivery | None) -> JSON:
    if delivery is None:
        return {"delivery": None, "accepted": False, "status": None}
    try:
        async with asyncio.timeout(WAIT):
            await delivery.ended.wait()
    except TimeoutError:
        pass  # it goes on being sent; the answer says that it is not accepted yet
    return {"delivery": delivery.id, "accepted": delivery.state == "accepted", "status": delivery.status}
