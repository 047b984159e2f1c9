"""Customers ask for a message to be sent, look what became of it, or take it back while it is queued."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import and_, exists, func, or_, select, tuple_
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, aliased
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from models import Attempt, File, Hold, Lane, Media, Message, MessageStatus, StatusReport, outgoing
from pombal import db, log, metrics
from pombal.errors import Unreachable
from web import shapes
from web.callers import Callers
from web.errors import Failure
from web.outbox import PATIENCE, Outbox, Queued, was_cut_off
from web.refusals import wrong
from web.shapes import Ask
from web.signatures import Caller, read_body, refused

_log = log.get()
T = TypeVar("T")
_KEY = re.compile(rb"[\x20-\x7e]{1,255}")
_callers = Callers()
_PATIENCE_FOR_A_KEY = 2.0  # seconds of `PATIENCE`; the rest is left for the commit


async def send(request: Request) -> Response:
    """202 once the message's row is committed; 503 means that it will not be sent."""
    return await send_as(request, shapes.asked)


async def send_the_old_way(request: Request) -> Response:
    """The same with `{"to", "type", "content"}`."""
    return await send_as(request, shapes.asked_the_old_way)


async def send_as(request: Request, understand: Callable[[bytes], Ask]) -> Response:
    who, patience = await proven(request, "messages:send")
    try:
        queued = await _queue(request, who, understand, patience)
    except Failure as failure:
        if failure.status < 500:
            metrics.messages.labels(direction="out", provider="none", outcome="refused").inc()
        if failure.status == 404:
            _unknown_id(request, who)
        raise
    if queued.channel_id is not None:
        metrics.messages.labels(direction="out", provider=queued.provider, outcome="queued").inc()
        _log.info(
            "message_queued",
            message_id=str(queued.id),
            tenant_id=str(who.tenant_id),
            channel_id=str(queued.channel_id),
            request_id=request.scope["request_id"],
        )
    return JSONResponse({"message_id": str(queued.id), "status": queued.status}, status_code=202)


async def _queue(request: Request, who: Caller, understand: Callable[[bytes], Ask], patience: float) -> Queued:
    key = _idempotency_key(request)
    raw = await read_body(request, shapes.MOST_BYTES)
    outbox: Outbox = request.state.outbox
    return await outbox.queue(who.tenant_id, understand(raw), key, request.scope["request_id"], len(raw), patience)


async def message(request: Request) -> Response:
    """One message with its attempts; 404 for a foreign one and a missing one alike (security-reliability.md T3).

    `waiting` is null, or says why the message does not go on by its `reason`:

    - `schedule`: `until` is its `not_before`;
    - `line`: `ahead` of its channel come first, at the number's rate; `is_sending` is false while no worker is at it;
    - `behind_another`: an earlier message of the same conversation is on its way;
    - `retry`: it was refused for now, its recipient has had as many as may be sent, or its file goes up first; next try
      at `until`;
    - `paused`: the channel, app or account reached a limit (`code`) and sends nothing before `until`;
    - `hold`: the channel is held since `since`, `hold` being auth, payment, outage, disconnected (its session is, until
      it is connected again) or operator; `code`, `text`, and `next_probe_at` of those that are probed;
    - `settling`: its answer was lost (status `unknown`); a status may tell what became of it before `until`;
    - `operator`: nothing told what became of it (status `unknown`), and an operator decides; `text`.

    `not_before` is null once that time has come.
    """
    who, patience = await proven(request, "messages:read")
    id_ = _id(request, who)
    shown = await in_time(lambda: asyncio.to_thread(_shown, who.tenant_id, id_), patience)
    if shown is None:
        raise _not_found(request, who)
    return JSONResponse(shown)


async def cancel(request: Request) -> Response:
    """Take a queued message back. Asked again, the answer is the same; 409 when it has gone on its way."""
    who, patience = await proven(request, "messages:send")
    id_ = _id(request, who)
    found = await in_time(lambda: asyncio.to_thread(_cancel, who.tenant_id, id_), patience)
    if found is None:
        raise _not_found(request, who)
    status, channel_id = found
    if status != MessageStatus.CANCELLED:
        raise Failure(409, "CONFLICT", "only a queued message can be cancelled", details={"status": status})
    if channel_id is not None:
        outbox: Outbox = request.state.outbox
        outbox.ring(channel_id)  # the next of its conversation may go
        _log.info(
            "message_cancelled",
            message_id=str(id_),
            tenant_id=str(who.tenant_id),
            channel_id=str(channel_id),
            request_id=request.scope["request_id"],
        )
    return JSONResponse({"message_id": str(id_), "status": status})


# ------------------------------------------------------------------------------------------------------------- requests


async def proven(request: Request, scope: str) -> tuple[Caller, float]:
    """Whose key it is, and the seconds that are left for the rest."""
    began = time.monotonic()
    who = await in_time(lambda: _callers.get(request, scope), _PATIENCE_FOR_A_KEY)
    return who, PATIENCE - (time.monotonic() - began)


async def in_time(ask: Callable[[], Awaitable[T]], patience: float) -> T:
    """What the database answers, asked again on another connection if it was found dead. Raises `Unreachable`."""
    try:
        async with asyncio.timeout(patience):
            try:
                return await ask()
            except DBAPIError as error:
                if not was_cut_off(error):
                    raise
            return await ask()
    except TimeoutError:
        raise Unreachable("the database does not answer") from None


def _idempotency_key(request: Request) -> str | None:
    given = [value for name, value in request.scope["headers"] if name == b"idempotency-key"]
    if not given:
        return None
    if len(given) > 1 or not _KEY.fullmatch(given[0]):
        raise wrong("Idempotency-Key", "must be one header of 1 to 255 printable ASCII characters", 255)
    key: str = given[0].decode("ascii")
    return key


def _id(request: Request, who: Caller) -> UUID:
    try:
        return UUID(request.path_params["id"])
    except ValueError:
        raise _not_found(request, who) from None


def _not_found(request: Request, who: Caller) -> Failure:
    _unknown_id(request, who)
    return Failure(404, "NOT_FOUND", "no such message")


def _unknown_id(request: Request, who: Caller) -> None:
    refused(request, "unknown_id", tenant_id=str(who.tenant_id), key_id=str(who.key.id))


# ----------------------------------------------------------------------------------------------------------------- rows


def _cancel(tenant_id: UUID, id_: UUID) -> tuple[str, UUID | None] | None:
    """The status afterwards, and the channel if that is this call's doing. None: no such message to be sent."""
    with db.session([tenant_id]) as s:
        found = select(Message.channel_id, Message.status).where(Message.tenant_id == tenant_id, Message.id == id_)
        row = s.execute(found).first()
        if row is None:
            return None
        after = outgoing.cancel(s, tenant_id, id_)
        if after is None:  # one that came in, or that was sent from a phone
            return str(row.status), None
        status, is_new = after
        return str(status), row.channel_id if is_new else None


def _shown(tenant_id: UUID, id_: UUID) -> dict[str, Any] | None:
    with db.session([tenant_id]) as s:
        row = s.scalars(select(Message).where(Message.tenant_id == tenant_id, Message.id == id_)).first()
        if row is None:
            return None
        report = _report(s, row)
        now: datetime = s.execute(select(func.now())).scalar_one()
        # Its turn lies ahead only when somebody scheduled it: one that is tried again has its turn then and there.
        is_scheduled = row.status == MessageStatus.QUEUED and row.turn_at is not None and row.turn_at > now
        return {
            "id": str(row.id),
            "channel": str(row.channel_id),
            "type": row.type,
            "direction": row.direction,
            "status": row.status,
            **({"to": row.recipient} if row.recipient is not None else {}),
            "created_at": _at(row.created_at),
            "not_before": _at(row.turn_at) if is_scheduled else None,
            "sent_at": _at(row.sent_at),
            "delivered_at": _at(row.delivered_at),
            "read_at": _at(row.read_at),
            "failed_at": _at(row.failed_at),
            "attempts": [_attempt(attempt) for attempt in Attempt.of(s, tenant_id, id_)],
            "error": {"code": row.error_code, "text": row.error} if row.error_code or row.error else None,
            "pricing": report.pricing if report else None,
            "conversation": report.conversation if report else None,
            "media": _media(s, row),
            "waiting": _waiting(s, row, now),
        }


def _report(s: Session, row: Message) -> StatusReport | None:
    if row.provider_id is None:
        return None
    key = (StatusReport.tenant_id, StatusReport.channel_id, StatusReport.provider_id, StatusReport.participant)
    wanted = select(StatusReport).where(tuple_(*key) == (row.tenant_id, row.channel_id, row.provider_id, ""))
    return s.scalars(wanted).first()


def _media(s: Session, row: Message) -> dict[str, Any] | None:
    """Its file: the one that came with it, or the one of ours that it sends."""
    sent = outgoing.media_ids(row.body) if row.recipient is not None else []
    is_its = Media.id == sent[0] if sent else Media.message_id == row.id
    is_of_it = and_(File.tenant_id == Media.tenant_id, File.digest == Media.digest)
    found = s.execute(select(Media, File).outerjoin(File, is_of_it).where(Media.tenant_id == row.tenant_id, is_its))
    media, file = next(iter(found), (None, None))
    if media is None:
        return None
    return {
        "id": str(media.id),
        "state": media.state,
        "kind": media.kind,
        "mime_type": file.mime_type if file else media.mime_type,  # until it is stored, what its sender claims
        "bytes": file.bytes if file else None,
        "sha256": file.digest.hex() if file else None,
        "filename": media.filename,
        "error_code": media.error_code,
        "error": media.error,
    }


def _attempt(attempt: Attempt) -> dict[str, Any]:
    error = None
    if attempt.error_code or attempt.error_class or attempt.error:
        error = {
            "code": attempt.error_code,
            "class": attempt.error_class,
            "scope": attempt.error_scope,
            "text": attempt.error,
        }
    return {
        "number": attempt.number,
        "started_at": _at(attempt.started_at),
        "ended_at": _at(attempt.ended_at),
        "outcome": attempt.outcome,
        "error": error,
        "provider_id": attempt.provider_id,
    }


def _waiting(s: Session, row: Message, now: datetime) -> dict[str, Any] | None:
    """What an outgoing message waits for; None when it is under way or done."""
    if row.turn_at is None or row.status not in (MessageStatus.QUEUED, MessageStatus.UNKNOWN):
        return None
    if row.status == MessageStatus.UNKNOWN:
        if row.due_at is None:
            return {"reason": "operator", "text": "it may have been sent: an operator decides whether it is sent again"}
        return {"reason": "settling", "until": _at(row.due_at)}
    lane = s.scalars(select(Lane).where(Lane.tenant_id == row.tenant_id, Lane.channel_id == row.channel_id)).first()
    if row.turn_at > now:
        return {"reason": "schedule", "until": _at(row.turn_at)}
    if lane is not None and lane.hold is not None:
        return {
            "reason": "hold",
            "hold": lane.hold,
            "code": lane.hold_code,
            "text": lane.hold_reason,
            "since": _at(lane.held_at),
            "next_probe_at": None if lane.hold in (Hold.OPERATOR, Hold.DISCONNECTED) else _at(lane.next_probe_at),
        }
    if lane is not None and lane.paused_until is not None and lane.paused_until > now:
        return {"reason": "paused", "code": lane.pause_code, "until": _at(lane.paused_until)}
    if row.due_at is not None and row.due_at > now:
        return {"reason": "retry", "until": _at(row.due_at)}
    if row.due_at is None or _is_behind_another(s, row):
        return {"reason": "behind_another"}
    # Whether anybody is at it: a worker that died has the lane for some seconds more, and without workers nobody has.
    is_sending = lane is not None and lane.until is not None and lane.until > now
    return {"reason": "line", "ahead": _ahead(s, row), "is_sending": is_sending}


def _ahead(s: Session, row: Message) -> int:
    """How many of its channel come before it; a thousand stands for more."""
    earlier = select(Message.id).where(
        Message.tenant_id == row.tenant_id,
        Message.channel_id == row.channel_id,
        tuple_(Message.due_at, Message.id) < (row.due_at, row.id),
    )
    return int(s.scalar(select(func.count()).select_from(earlier.limit(1_000).subquery())) or 0)


def _is_behind_another(s: Session, row: Message) -> bool:
    other = aliased(Message)
    is_before = tuple_(other.turn_at, other.id) < (row.turn_at, row.id)
    first = (
        exists()
        .where(other.tenant_id == row.tenant_id, other.conversation_id == row.conversation_id, other.id != row.id)
        .where(
            or_(
                other.status == MessageStatus.SENDING,
                and_(other.status == MessageStatus.UNKNOWN, other.due_at.is_not(None)),
                and_(other.status == MessageStatus.QUEUED, is_before),
            )
        )
    )
    return bool(s.scalar(select(first)))


def _at(at: datetime | None) -> str | None:
    return at.isoformat() if at is not None else None
