"""The control routes of the simulated Baileys gateways: their sessions, what comes in, what breaks, what goes wrong.

`gateway` and `session` are names everywhere. Routes that send one body wait up to 5 s for its 200 and answer
`delivery`, `accepted` and `status` as Meta's do; `delivery` is null when there is no webhook, or the dialect has none
for this.
"""

import asyncio
import base64
import binascii
import time
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sandbox import baileys_lines as lines
from sandbox import baileys_words as said
from sandbox import files
from sandbox import megaapi_words as words
from sandbox.baileys import Baileys
from sandbox.baileys_faults import SetBaileysFault
from sandbox.baileys_gateways import Gateway, SetBaileysRules
from sandbox.baileys_keys import Failure
from sandbox.baileys_log import Log, LogPlan
from sandbox.baileys_media import Encrypted, Spoil
from sandbox.baileys_sessions import Incoming, Session
from sandbox.baileys_storms import StormPlan
from sandbox.config import BaileysGateway, BaileysSession
from sandbox.control import Refused, after_of, limit_of, read_body, shown
from sandbox.megaapi_hooks import Lids
from sandbox.meta import JSON
from sandbox.sender import Delivery

WAIT = 5.0  # seconds a request waits for the first 200
CUSTOMER = "5511944440001"
_STANZAS = {"Invalid PreKey ID": "pkmsg", "Bad MAC": "pkmsg", "No session found to decrypt message": "skmsg"}

Text = Annotated[str, Meta(max_length=100_000)]
Jid = Annotated[str, Meta(pattern=r"^[0-9-]{3,40}(@[a-z.]{2,20})?$")]
Id = Annotated[str, Meta(min_length=1, max_length=10_000)]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]


# Requests


class One(msgspec.Struct, forbid_unknown_fields=True):
    gateway: str
    session: str


class SetHabits(msgspec.Struct, forbid_unknown_fields=True):
    gateway: str
    session: str | None = None
    down: Literal["reset", "500", "unhealthy"] | UnsetType | None = UNSET
    asks_qr_after_start: bool | UnsetType = UNSET
    hangs: bool | UnsetType = UNSET
    slow_stop: Seconds | UnsetType = UNSET
    slow_start: Seconds | UnsetType = UNSET
    stop_is_ignored: bool | UnsetType = UNSET
    start_fails: bool | UnsetType = UNSET


class End(msgspec.Struct, forbid_unknown_fields=True):
    gateway: str
    session: str
    code: Annotated[int, Meta(ge=100, le=599)]
    reconnects: bool | None = None


class Twin(msgspec.Struct, forbid_unknown_fields=True):
    gateway: str
    session: str
    running: bool = True
    every: Annotated[float, Meta(ge=0.05, le=3_600)] = 0.5


class Break(msgspec.Struct, forbid_unknown_fields=True):
    gateway: str
    session: str
    what: Literal[
        "ratchet",
        "derived",
        "sender_key",
        "pre_keys",
        "identity",
        "creds_truncated",
        "creds_empty",
        "creds_missing",
    ]
    contacts: tuple[Jid, ...] = (CUSTOMER,)
    group: str = "120363000000000001@g.us"


class File(msgspec.Struct, forbid_unknown_fields=True):
    mime_type: Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[ -~]+$")] | None = None
    base64: str | None = None
    size: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    seed: Annotated[str, Meta(max_length=1000)] | int | None = None
    filename: Annotated[str, Meta(max_length=1_000)] | None = None
    spoil: Spoil | None = None


class Say(msgspec.Struct, forbid_unknown_fields=True):
    gateway: str
    session: str
    kind: str = "text"
    text: Text | None = None
    from_: Jid = msgspec.field(name="from", default=CUSTOMER)
    name: Annotated[str, Meta(max_length=1_000)] = "Bia Prado"
    group: Jid | None = None
    lid: Lids = "never"
    from_me: bool = False
    id: Id | None = None
    count: Annotated[int, Meta(ge=1, le=1_000)] = 1
    at: int | None = None
    media: File | None = None
    object: Any = None
    stub: Annotated[str, Meta(max_length=1_000)] | None = None


class Ack(msgspec.Struct, forbid_unknown_fields=True):
    gateway: str
    session: str
    id: Id
    status: Annotated[int, Meta(ge=0, le=5)]
    to: Jid = CUSTOMER
    participant: Jid | None = None


class Connection(msgspec.Struct, forbid_unknown_fields=True):
    gateway: str
    session: str
    code: int | None = None
    quarantine: JSON | None = None


class Raw(msgspec.Struct, forbid_unknown_fields=True):
    gateway: str
    session: str
    body: str | None = None
    base64: str | None = None
    content_type: Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[ -~]+$")] = "application/json"


class SetLog(msgspec.Struct, forbid_unknown_fields=True):
    gateway: str
    action: Literal["start", "off", "rotate", "truncate", "noise", "lines", "duplicates"]
    session: str = "1"
    count: Annotated[int, Meta(ge=1, le=100_000)] = 1
    lines: list[str] = []
    plan: LogPlan | None = None


# Routes; the first line of each docstring is what `GET /` tells, so it holds the body


async def gateways(request: Request) -> JSONResponse:
    """The Baileys gateways, their sessions and how those stand."""
    return JSONResponse({"gateways": [one.shown() for one in (await _host(request)).gateways.values()]})


async def add_gateway(request: Request) -> JSONResponse:
    """{"name","dialect","api_key"?,"root"?,"log"?,"version"?,"sessions"?,…}: one more, as in the configuration."""
    host, ask = await _host(request), await read_body(request, BaileysGateway)
    try:
        return JSONResponse(host.add(ask).shown(), status_code=201)
    except ValueError as error:
        raise Refused(409, "CONFLICT", str(error)) from error


async def remove(request: Request) -> JSONResponse:
    """`?gateway=&session=`: there is no such session, or gateway, any more; without both, none at all."""
    host, asked = await _host(request), request.query_params
    for name in [asked["gateway"]] if "gateway" in asked else list(host.gateways):
        _gateway(host, name)
        if "session" in asked:
            _session(host, name, asked["session"])
        await host.remove(name, asked.get("session"))
    return JSONResponse({"gateways": list(host.gateways)})


async def add_session(request: Request) -> JSONResponse:
    """{"gateway","session","number"?,"webhook_url"?,"paired"?,"open"?,"contacts"?,…}: a number at this gateway."""
    host, ask = await _host(request), await read_body(request, dict[str, Any])
    gateway = _gateway(host, ask.pop("gateway", ""))
    try:
        made = gateway.add(msgspec.convert(ask, BaileysSession))
    except msgspec.ValidationError as error:
        raise Refused(400, "INVALID_PAYLOAD", str(error)) from error
    except ValueError as error:
        raise Refused(409, "CONFLICT", str(error)) from error
    return JSONResponse(made.shown(), status_code=201)


async def session(request: Request) -> JSONResponse:
    """`?gateway=&session=`: how one stands, and how often it was started, stopped and asked for a code."""
    asked = request.query_params
    found = _session(await _host(request), asked.get("gateway", ""), asked.get("session", ""))
    return JSONResponse(found.shown())


async def habits(request: Request) -> JSONResponse:
    """{"gateway","session"?,"down"?,"asks_qr_after_start"?,"hangs"?,"slow_stop"?,…}: what is done wrong from now on.

    Without a session all of the gateway's have them; `down` is the gateway's own. All are in
    `sandbox.baileys_sessions.Habits`.
    """
    host, ask = await _host(request), await read_body(request, SetHabits)
    gateway = _gateway(host, ask.gateway)
    if ask.down is not UNSET:
        gateway.down = ask.down
    chosen = list(gateway.sessions.values()) if ask.session is None else [_session(host, ask.gateway, ask.session)]
    for one in chosen:
        for name in one.habits.__struct_fields__:
            if getattr(ask, name) is not UNSET:
                setattr(one.habits, name, getattr(ask, name))
    return JSONResponse(gateway.shown())


async def end(request: Request) -> JSONResponse:
    """{"gateway","session","code","reconnects"?}: the connection ends with this code; 401 forgets the pairing."""
    ask = await read_body(request, End)
    found = _session(await _host(request), ask.gateway, ask.session)
    found.end(ask.code, reconnects=ask.reconnects)
    return JSONResponse(found.shown())


async def scan(request: Request) -> JSONResponse:
    """{"gateway","session"}: somebody scans the code: a new pairing."""
    ask = await read_body(request, One)
    found = _session(await _host(request), ask.gateway, ask.session)
    found.scan()
    return JSONResponse(found.shown())


async def unpair(request: Request) -> JSONResponse:
    """{"gateway","session"}: WhatsApp removes the device; a socket that lives ends with 401."""
    ask = await read_body(request, One)
    found = _session(await _host(request), ask.gateway, ask.session)
    found.keys.pairing = None
    if found.state == "open":
        found.end(401)
    return JSONResponse(found.shown())


async def twin(request: Request) -> JSONResponse:
    """{"gateway","session","running"?,"every"?}: another process has the same credentials: 440 again and again."""
    ask = await read_body(request, Twin)
    found = _session(await _host(request), ask.gateway, ask.session)
    found.meet_twin(ask.every if ask.running else None)
    return JSONResponse(found.shown())


async def break_(request: Request) -> JSONResponse:
    """{"gateway","session","what","contacts"?,"group"?}: keys are lost or wrong, as after a crash; no message comes.

    `what` is ratchet, derived, sender_key, pre_keys, identity, creds_truncated, creds_empty or creds_missing.
    """
    ask = await read_body(request, Break)
    keys = _session(await _host(request), ask.gateway, ask.session).keys
    people = [words.jid(contact) for contact in ask.contacts]
    match ask.what:
        case "ratchet" | "derived":
            for person in people:
                keys.break_ratchet(person, stubborn=ask.what == "derived")
        case "sender_key":
            for person in people:
                keys.break_sender_key(ask.group, person)
        case "pre_keys":
            keys.lose_pre_keys()
        case "identity":
            keys.lose_identity()
        case "creds_truncated" | "creds_empty" | "creds_missing":
            keys.spoil_creds(ask.what)
    return JSONResponse({"broken": ask.what})


async def storm(request: Request) -> JSONResponse:
    """{"gateway","session","kind","contacts"?,"messages"?,"pace"?,…}: something breaks, and messages go on coming.

    Kinds and the other keys are in `sandbox.baileys_storms`. Answers the storm's id.
    """
    host, ask = await _host(request), await read_body(request, StormPlan)
    made = host.storm(ask, _session(host, ask.gateway, ask.session))
    return JSONResponse(made.shown(), status_code=202)


async def storms(request: Request) -> JSONResponse:
    """`?id=`: what became of the messages of each storm."""
    listed = [one.shown() for one, _ in (await _host(request)).storms.values()]
    wanted = request.query_params.get("id")
    return JSONResponse({"storms": [one for one in listed if wanted in (None, str(one["id"]))]})


async def stop_storm(request: Request) -> JSONResponse:
    """`?id=`: no more messages of this storm, or of any; what is broken stays so."""
    wanted = request.query_params.get("id")
    await (await _host(request)).stop_storms(id=None if wanted is None else int(wanted))
    return await storms(request)


async def say(request: Request) -> JSONResponse:
    """{"gateway","session","kind"?,"text"?,"from"?,"group"?,"lid"?,"from_me"?,"media"?,"stub"?,…}: messages come in.

    The other keys are "name", "id", "count", "at", and "object" for the message itself. `media` is {"mime_type"?,
    "base64" or "size"?,"seed"?,"filename"?,"spoil"?: mac|hash|cut|gone}; its file is served encrypted, as by WhatsApp.
    With a `stub` it is one that could not be decrypted, for this reason.
    """
    host, ask = await _host(request), await read_body(request, Say)
    found = _session(host, ask.gateway, ask.session)
    if ask.kind not in words.KINDS:
        raise Refused(400, "INVALID_PAYLOAD", f"no kind {ask.kind!r}; there are {', '.join(words.KINDS)}")
    address = str(request.base_url).rstrip("/")
    file = await _file(host, ask, address)
    at = int(time.time()) if ask.at is None else ask.at
    content = _content(ask, file, at)
    author = words.jid(ask.from_)
    chat, participant = author, None
    if ask.group is not None:
        chat = ask.group if "@" in ask.group else f"{ask.group}@g.us"
        participant = f"{found.plan.number}@s.whatsapp.net" if ask.from_me else author
    made = []
    for _ in range(ask.count):
        key = words.key(ask.id or words.new_id(), chat, from_me=ask.from_me, author=participant, lids=ask.lid)
        made.append(_incoming(host, found, ask, key, content, at, file, address))
    outcomes = [await _sent(found.receive(one)) for one in made]
    keys = None
    if file is not None:
        keys = {"sha256": file.content.digest.hex(), "size": file.content.size, "keys": file.keys, "url": file.url}
    outcome = outcomes[-1] | {"accepted": all(one["accepted"] for one in outcomes)}
    return JSONResponse(
        {"ids": [one.key["id"] for one in made], "keys": [one.key for one in made], "file": keys, **outcome}
    )


async def ack(request: Request) -> JSONResponse:
    """{"gateway","session","id","status","to"?,"participant"?}: how far a message has come, in Baileys' numbers."""
    host, ask = await _host(request), await read_body(request, Ack)
    found = _session(host, ask.gateway, ask.session)
    author = None if ask.participant is None else words.jid(ask.participant)
    key = words.key(ask.id, words.jid(ask.to), from_me=True, author=author)
    gateway = _gateway(host, ask.gateway)
    return JSONResponse(await _sent(gateway.emit(found, said.update(gateway.who(found), key, ask.status))))


async def connection(request: Request) -> JSONResponse:
    """{"gateway","session","code"?,"quarantine"?}: a webhook says how it stands; nothing changes."""
    host, ask = await _host(request), await read_body(request, Connection)
    gateway, found = _gateway(host, ask.gateway), _session(host, ask.gateway, ask.session)
    who = gateway.who(found)
    if ask.quarantine is not None:
        bodies = said.quarantined(who, ask.quarantine)
    else:
        ending = None if ask.code is None else said.Ending(ask.code, True)
        bodies = said.connection(who, found.state if ending is None else "closed", ending, None)
    return JSONResponse(await _sent(gateway.emit(found, bodies)))


async def raw(request: Request) -> JSONResponse:
    """{"gateway","session","body" or "base64","content_type"?}: any bytes to its webhook, only once."""
    host, ask = await _host(request), await read_body(request, Raw)
    if (ask.body is None) == (ask.base64 is None):
        raise Refused(400, "INVALID_PAYLOAD", "give either body or base64")
    content = ask.body.encode() if ask.body is not None else _decoded(ask.base64 or "")
    found = _session(host, ask.gateway, ask.session)
    delivery = _gateway(host, ask.gateway).post(found, content, once=True, type=ask.content_type)
    return JSONResponse(await _sent(delivery))


async def log(request: Request) -> JSONResponse:
    """{"gateway","action","session"?,"count"?,"lines"?,"plan"?}: something happens to the log, or in it.

    Actions are start, off, rotate, truncate, lines, noise and duplicates. `noise` has the phrases of errors in it and
    is none, `duplicates` are messages that came twice, `lines` are written as they are; `plan` is a
    `sandbox.baileys_log.LogPlan`.
    """
    host, ask = await _host(request), await read_body(request, SetLog)
    gateway = _gateway(host, ask.gateway)
    match ask.action:
        case "start" | "off":
            gateway.log = Log(ask.plan or LogPlan())
        case "rotate":
            gateway.log.rotate()
        case "truncate":
            gateway.log.truncate()
        case "lines":
            gateway.log.plain(ask.lines)
        case "noise":
            for _ in range(ask.count):
                gateway.log.write(ask.session, lines.noise(words.jid(CUSTOMER)))
        case "duplicates":
            for _ in range(ask.count):
                key = words.key(words.new_id(), words.jid(CUSTOMER), from_me=False)
                failure = Failure("SessionError", "No matching sessions found for message", "msg")
                twice = lines.duplicate(lines.Missed(key, failure, f"{CUSTOMER}.0"), gateway.plan.version)
                gateway.log.write(ask.session, twice)
    return JSONResponse({"path": gateway.log.plan.path, "size": gateway.log.size()})


async def set_rules(request: Request) -> JSONResponse:
    """{"gateway"?,"answer_id"?,"echo"?,"echo_delay"?,"acks"?,"ack_delay"?,"ack_lost"?}: what follows a message."""
    host, ask = await _host(request), await read_body(request, SetBaileysRules)
    chosen = list(host.gateways.values()) if ask.gateway is None else [_gateway(host, ask.gateway)]
    for one in chosen:
        one.rules = ask.on(one.rules)
    return JSONResponse({one.name: one.rules._asdict() for one in chosen})


async def faults(request: Request) -> JSONResponse:
    """The faults that are set for Baileys gateways, in their order, and how many calls met each."""
    return JSONResponse({"faults": (await _host(request)).faults.shown()})


async def set_fault(request: Request) -> JSONResponse:
    """{"kind","place"?,"gateway"?,"session"?,"to"?,"share"?,"count"?,"seconds"?,…}: something goes wrong there."""
    ask = await read_body(request, SetBaileysFault)
    return JSONResponse({"id": (await _host(request)).faults.set(ask).id}, status_code=201)


async def clear_faults(request: Request) -> JSONResponse:
    """Nothing goes wrong at Baileys gateways any more."""
    (await _host(request)).faults.clear()
    return JSONResponse({"faults": []})


async def calls(request: Request) -> Response:
    """`?limit=50&gateway=&session=&operation=&after=`: what the gateways were asked, newest last."""
    asked, host = request.query_params, await _host(request)
    only = {name: asked.get(name) for name in ("gateway", "session", "operation")}
    listed = host.calls.listed(limit_of(request), after=after_of(request), **only)
    return Response(msgspec.json.encode({"calls": listed, **host.calls.summary()}), media_type="application/json")


async def clear_calls(request: Request) -> JSONResponse:
    """Forget those calls, and what was done to folders."""
    host = await _host(request)
    host.calls.clear()
    host.touches.clear()
    return JSONResponse({"calls": []})


async def touches(request: Request) -> Response:
    """`?gateway=&session=`: files of sessions' folders that somebody deleted, changed or added."""
    asked, host = request.query_params, await _host(request)
    for gateway in host.gateways.values():
        for one in gateway.sessions.values():
            one.folder.guard()
    listed = host.touches.listed(asked.get("gateway"), asked.get("session"))
    return Response(msgspec.json.encode({"touches": listed}), media_type="application/json")


async def journal(request: Request) -> JSONResponse:
    """`?limit=50`: the latest webhooks of Baileys gateways, newest first, and how many there are of each state."""
    sender = (await _host(request)).sender
    latest = list(sender.journal)[: -limit_of(request) - 1 : -1]
    return JSONResponse({**sender.counts, "deliveries": [shown(delivery) for delivery in latest]})


ROUTES = [
    Route("/control/baileys/gateways", gateways),
    Route("/control/baileys/gateways", add_gateway, methods=["POST"]),
    Route("/control/baileys/gateways", remove, methods=["DELETE"]),
    Route("/control/baileys/sessions", add_session, methods=["POST"]),
    Route("/control/baileys/session", session),
    Route("/control/baileys/habits", habits, methods=["POST"]),
    Route("/control/baileys/end", end, methods=["POST"]),
    Route("/control/baileys/scan", scan, methods=["POST"]),
    Route("/control/baileys/unpair", unpair, methods=["POST"]),
    Route("/control/baileys/twin", twin, methods=["POST"]),
    Route("/control/baileys/break", break_, methods=["POST"]),
    Route("/control/baileys/storms", storms),
    Route("/control/baileys/storms", storm, methods=["POST"]),
    Route("/control/baileys/storms", stop_storm, methods=["DELETE"]),
    Route("/control/baileys/say", say, methods=["POST"]),
    Route("/control/baileys/ack", ack, methods=["POST"]),
    Route("/control/baileys/connection", connection, methods=["POST"]),
    Route("/control/baileys/raw", raw, methods=["POST"]),
    Route("/control/baileys/log", log, methods=["POST"]),
    Route("/control/baileys/rules", set_rules, methods=["POST"]),
    Route("/control/baileys/faults", faults),
    Route("/control/baileys/faults", set_fault, methods=["POST"]),
    Route("/control/baileys/faults", clear_faults, methods=["DELETE"]),
    Route("/control/baileys/calls", calls),
    Route("/control/baileys/calls", clear_calls, methods=["DELETE"]),
    Route("/control/baileys/touches", touches),
    Route("/control/baileys/journal", journal),
]


# What the routes share


async def _host(request: Request) -> Baileys:
    host: Baileys = request.app.state.baileys
    await host.configure()
    return host


def _gateway(host: Baileys, name: str) -> Gateway:
    if name not in host.gateways:
        raise Refused(404, "NOT_FOUND", f"no gateway {name!r}")
    return host.gateways[name]


def _session(host: Baileys, gateway: str, name: str) -> Session:
    found = _gateway(host, gateway).find(name)
    if found is None:
        raise Refused(404, "NOT_FOUND", f"no session {name!r}")
    return found


def _incoming(
    host: Baileys, session: Session, ask: Say, key: JSON, content: JSON, at: int, file: Encrypted | None, address: str
) -> Incoming:
    author = words.jid(ask.from_)
    person = author if ask.lid == "never" else words.hidden(author)
    stub = None
    if ask.stub is not None:
        stanza = _STANZAS.get(ask.stub, "msg")
        types = {"Invalid PreKey ID": "PreKeyError", "Bad MAC": "Error", "No session found to decrypt message": "Error"}
        stub = Failure(types.get(ask.stub, "SessionError"), ask.stub, stanza)  # type: ignore[arg-type] # of the three
    media_url = None
    if file is not None:
        media_url = f"{address}/baileys/{ask.gateway}/api/files/{session.id}/{file.id}"
    name = session.plan.name if ask.from_me else ask.name
    group = None if ask.group is None else key["remoteJid"]
    return Incoming(person, key, content, name, at, group, stub, media_url=media_url)


def _content(ask: Say, file: Encrypted | None, at: int) -> JSON:
    if isinstance(ask.object, dict) and ask.object:
        return ask.object
    if ask.object is not None:
        raise Refused(400, "INVALID_PAYLOAD", "object is a message: an object with a key")
    text = ("👍" if ask.kind == "reaction" else "Olá") if ask.text is None else ask.text
    who = words.jid(ask.from_)
    return words.content(ask.kind, words.Told(text, at, file, who=who, chat=words.jid(ask.group or ask.from_)))[1] or {}


async def _file(host: Baileys, ask: Say, address: str) -> Encrypted | None:
    """The file of a message that has one."""
    if ask.kind not in words.MEDIA_KINDS:
        if ask.media is not None:
            raise Refused(400, "INVALID_PAYLOAD", f"a message of kind {ask.kind!r} has no file")
        return None
    kind, mime_type = words.MEDIA_KINDS[ask.kind]
    given = ask.media or File()
    mime_type = given.mime_type or mime_type
    if given.base64 is not None:
        content: files.Content = files.Given(_decoded(given.base64))
    else:
        try:
            content = files.make(mime_type, words.new_id() if given.seed is None else str(given.seed), given.size)
        except ValueError as error:
            raise Refused(400, "INVALID_PAYLOAD", str(error)) from error
    name = given.filename or "arquivo.pdf"
    made = host.files.add(content, mime_type, kind, name, address=address, spoil=given.spoil)
    await asyncio.to_thread(lambda: made.encrypted)  # of a large file it takes its time, and is remembered
    return made


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, "INVALID_PAYLOAD", f"base64: {error}") from error


async def _sent(delivery: Delivery | None) -> JSON:
    if delivery is None:
        return {"delivery": None, "accepted": False, "status": None}
    try:
        async with asyncio.timeout(WAIT):
            await delivery.ended.wait()
    except TimeoutError:
        pass  # it goes on being sent; the answer says that it is not accepted yet
    return {"delivery": delivery.id, "accepted": delivery.state == "accepted", "status": delivery.status}
