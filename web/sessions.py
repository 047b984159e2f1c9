"""Sessions, one interface over all kinds of channels: start, watch, scan, end, and send through them.

Routes answer from rows and never ask a provider: they note a wish, and a job makes the steps
(`workers/channel_session.py`). A channel of Meta's needs no session: it is always ready.
"""

import asyncio
import base64
import re
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from models import Channel, ChannelKind, ChannelStatus, SessionState, SessionWish, WaSession
from pombal import db, log
from web import messages, outbox, shapes
from web.errors import Failure
from web.refusals import converted, not_one_of, wrong
from web.shapes import Ask, Shape, Upto200
from web.signatures import Caller, read_body, refused
from workers.channel_session import ring_session

_log = log.get()

_MOST_BYTES = 4 * 1024  # of the body of a start
_HEADERS = {
    "Cache-Control": "no-store",  # who has the picture can log in with it
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; img-src data:; sandbox",
    "Vary": "Accept",
}


class Start(Shape):
    channel: Upto200 | None = None


class Shown(NamedTuple):
    """How a session stands."""

    channel_id: UUID
    kind: str
    state: str
    since: datetime
    wish: str | None = None
    error: tuple[str | None, str | None] | None = None
    picture: tuple[str, bytes] | None = None


async def start(request: Request) -> Response:
    """202 once the wish is committed; asked again, the session goes on as it is."""
    who, patience = await messages.proven(request, "channels:manage")
    name = await _named_in_body(request) or _named_in_query(request)
    shown = await messages.in_time(lambda: asyncio.to_thread(_wished, who, name, SessionWish.START), patience)
    shown = _found(request, who, shown)
    _tell(request, who, shown, "session_start_asked")
    answer = {"channel": str(shown.channel_id), "state": shown.state}
    return JSONResponse(answer, status_code=202, background=_bell(who, shown))


async def stop(request: Request) -> Response:
    """204 once the wish is committed: the job logs out. Asked again, the answer is the same; 409 for Meta's."""
    who, patience = await messages.proven(request, "channels:manage")
    name = _named_in_query(request)
    shown = await messages.in_time(lambda: asyncio.to_thread(_wished, who, name, SessionWish.STOP), patience)
    shown = _found(request, who, shown)
    if shown.kind == ChannelKind.META:
        raise Failure(409, "CONFLICT", "a channel of kind meta has no session that could be ended")
    _tell(request, who, shown, "session_stop_asked")
    return Response(status_code=204, background=_bell(who, shown))


async def status(request: Request) -> Response:
    """How the session stands: `wish` is what was asked for and is not done yet, `error` what kept it from being done
    last; `has_qr` says that there is a code to scan now."""
    shown = await _shown(request)
    code, text = shown.error or (None, None)
    return JSONResponse(
        {
            "channel": str(shown.channel_id),
            "kind": shown.kind,
            "state": shown.state,
            "since": shown.since.isoformat(),
            "has_qr": shown.picture is not None,
            "error": {"code": code, "text": text} if shown.error else None,
            "wish": shown.wish,
        }
    )


async def qr(request: Request) -> Response:
    """The QR code to scan now, as the gateway's picture or as SVG around it; 404 while there is none."""
    is_svg = _wants_svg(request)
    shown = await _shown(request)
    if shown.picture is None:
        raise Failure(404, "NOT_FOUND", "there is no QR code to scan now", details={"state": shown.state})
    mime_type, content = shown.picture
    if is_svg:
        mime_type, content = "image/svg+xml", _as_svg(mime_type, content)
    return Response(content, media_type=mime_type, headers=_HEADERS)


async def send(request: Request) -> Response:
    """As `POST /api/v1/messages`; a message's content may be under `payload` as well, and a text may be just a text."""
    return await messages.send_as(request, asked)


# ------------------------------------------------------------------------------------------------------------- requests


def asked(raw: bytes) -> Ask:
    """The request of `POST /api/v1/whatsapp/messages`. Raises `Failure`."""
    try:
        given = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return shapes.asked(raw)  # which says what is wrong with it
    type_ = given.get("type") if isinstance(given, dict) else None
    if type_ not in shapes.TYPES or type_ == "read":
        return shapes.asked(raw)
    field = "payload" if "payload" in given else type_
    if field == "payload" and type_ in given:
        raise wrong("$.payload", f"stands there twice: as `{type_}` too")
    content = given.pop(field, None)
    is_text = type_ == "text"
    if is_text and isinstance(content, str):
        content = {"body": content}
    elif is_text and field == "payload" and isinstance(content, dict) and content.keys() == {"text"}:
        content = {"body": content["text"]}
    if content is not None:
        given[type_] = content
    if isinstance(given.get("to"), str) and re.fullmatch(r"[0-9]+", given["to"]):
        given["to"] = f"+{given['to']}"
    try:
        return shapes.asked(msgspec.json.encode(given))
    except Failure as failure:
        if field == "payload":
            raise _of_payload(failure, type_) from None
        raise


def _of_payload(failure: Failure, type_: str) -> Failure:
    """The same, named as the sender has named it."""
    named = failure.details.get("field", "")
    if named != f"$.{type_}" and not named.startswith((f"$.{type_}.", f"$.{type_}[")):
        return failure
    field = f"$.payload{named.removeprefix(f'$.{type_}')}"
    details = {**failure.details, "field": field}
    return Failure(failure.status, failure.code, field + failure.message.removeprefix(named), details=details)


async def _named_in_body(request: Request) -> str | None:
    raw = await read_body(request, _MOST_BYTES)
    if not raw.strip():
        return None
    try:
        given = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Failure(400, "INVALID_PAYLOAD", "the body is not JSON") from None
    name: str | None = converted(given, Start, "$").channel
    if name is not None and "\x00" in name:
        raise wrong("$.channel", "must not contain the character NUL")
    return name


def _named_in_query(request: Request) -> str | None:
    name = request.query_params.get("channel")
    if name is not None and (not 1 <= len(name) <= 200 or "\x00" in name):
        raise wrong("channel", "must have 1 to 200 characters", 200)
    return name


def _wants_svg(request: Request) -> bool:
    given = request.query_params.get("format")
    if given is not None and given not in ("png", "svg"):
        raise not_one_of("format", ["png", "svg"])
    if given is not None:
        return given == "svg"
    wanted = _accepted(request.headers.get("accept", ""))
    others = (wanted[name] for name in ("image/png", "image/*", "*/*") if name in wanted)
    return wanted.get("image/svg+xml", 0.0) > next(others, 0.0)


def _accepted(header: str) -> dict[str, float]:
    """The types of an `Accept`, and how much each is wanted."""
    wanted = {}
    for part in header.split(","):
        name, *parameters = (word.strip().lower() for word in part.split(";"))
        weight = next((word.removeprefix("q=") for word in parameters if word.startswith("q=")), "1")
        wanted[name] = float(weight) if re.fullmatch(r"[01](\.[0-9]{0,3})?", weight) else 0.0
    return wanted


async def _shown(request: Request) -> Shown:
    who, patience = await messages.proven(request, "channels:manage")
    name = _named_in_query(request)
    return _found(request, who, await messages.in_time(lambda: asyncio.to_thread(_seen, who, name), patience))


def _found(request: Request, who: Caller, shown: Shown | Failure) -> Shown:
    if isinstance(shown, Failure):
        if shown.status == 404:
            refused(request, "unknown_id", tenant_id=str(who.tenant_id), key_id=str(who.key.id))
        raise shown
    return shown


def _bell(who: Caller, shown: Shown) -> BackgroundTask | None:
    """Rung when the answer has gone: nobody waits for Redis (security-reliability.md W2)."""
    return None if shown.kind == ChannelKind.META else BackgroundTask(ring_session, who.tenant_id, shown.channel_id)


def _tell(request: Request, who: Caller, shown: Shown, event: str) -> None:
    _log.info(
        event,
        tenant_id=str(who.tenant_id),
        channel_id=str(shown.channel_id),
        state=shown.state,
        request_id=request.scope["request_id"],
    )


def _as_svg(mime_type: str, content: bytes) -> bytes:
    picture = base64.b64encode(content).decode()
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 400" width="400" height="400">'
        '<rect width="400" height="400" fill="#fff"/>'
        f'<image width="400" height="400" href="data:{mime_type};base64,{picture}"/></svg>'
    ).encode()


# ----------------------------------------------------------------------------------------------------------------- rows


def _seen(who: Caller, name: str | None) -> Shown | Failure:
    with db.session([who.tenant_id]) as s:
        channel = _channel(s, who.tenant_id, name)
        if isinstance(channel, Failure):
            return channel
        query = select(WaSession, func.now()).where(
            WaSession.tenant_id == who.tenant_id, WaSession.channel_id == channel.id
        )
        found = s.execute(query).first()
        return _of_row(channel, found[0], found[1]) if found else _of_channel(channel)


def _wished(who: Caller, name: str | None, wish: SessionWish) -> Shown | Failure:
    with db.session([who.tenant_id]) as s:
        channel = _channel(s, who.tenant_id, name)
        if isinstance(channel, Failure):
            return channel
        if channel.kind == ChannelKind.META:
            return _of_channel(channel)
        note = WaSession.start if wish == SessionWish.START else WaSession.stop
        is_connected = channel.status == ChannelStatus.CONNECTED
        row = note(s, who.tenant_id, channel.id, is_connected=is_connected)
        s.flush()
        now: datetime = s.execute(select(func.now())).scalar_one()
        return _of_row(channel, row, now)


def _channel(s: Session, tenant_id: UUID, name: str | None) -> Channel | Failure:
    """The one that is meant; as in the outbox, the only one or the default where none is named."""
    own = outbox.channels_of(s, {(tenant_id, name)}).get(tenant_id, [])
    found = outbox.channel_named(own, name) if name is not None else outbox.default_channel(own)
    return found if isinstance(found, Failure) else s.get_one(Channel, (tenant_id, found.id))


def _of_row(channel: Channel, row: WaSession, now: datetime) -> Shown:
    error = (row.error_code, row.error) if row.error_code or row.error else None
    return Shown(channel.id, channel.kind, row.state, row.state_since, row.wish, error, row.picture(now))


def _of_channel(channel: Channel) -> Shown:
    """Of one that nobody ever started here."""
    is_ready = channel.kind == ChannelKind.META or channel.status == ChannelStatus.CONNECTED
    state = SessionState.READY if is_ready else SessionState.DISCONNECTED
    return Shown(channel.id, channel.kind, state, channel.status_since or channel.created_at)
