"""The story of one message: how it came or was sent, where it lies, what was said of it, what went wrong."""

from argparse import Namespace
from typing import Any
from uuid import UUID

from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from models import (
    Attempt,
    Conversation,
    DeadLetter,
    Delivery,
    Event,
    File,
    Lane,
    Media,
    MediaState,
    Message,
    MessageStatus,
    StatusReport,
)
from models.attempt import attempt_named_in
from pombal import db
from pombal.cli import as_json, say
from pombal.errors import PombalError

_HIDDEN = {"raw", "claim_token", "traceback", "request_digest", "digest", "next_ring_at", "link"}
_SAME_CONTENT = and_(File.tenant_id == Media.tenant_id, File.digest == Media.digest)
_WAITING = (MessageStatus.QUEUED, MessageStatus.SENDING, MessageStatus.UNKNOWN)


class NotFound(PombalError):
    """Nothing has this id."""


def trace(given: Namespace) -> int:
    with db.session() as s:
        db.see_all(s)
        story = _story(s, given.id)
    if not any(story.values()):
        raise NotFound("nothing here has this id")
    if given.json:
        as_json(story)
        return 0
    for part, rows in story.items():
        for row in rows:
            say(f"{part}")
            for name, value in row.items():
                if value is not None:
                    say(f"    {name:<16} {value}")
    return 0


def _story(s: Session, wanted: str) -> dict[str, list[dict[str, Any]]]:
    id_ = _uuid(wanted)
    messages = _messages(s, wanted, id_)
    deliveries = {m.delivery_id for m in messages if m.delivery_id} | ({id_} if id_ else set())
    where = or_(Delivery.id.in_(deliveries), Delivery.request_id == wanted)
    found = list(s.scalars(select(Delivery).where(where).order_by(Delivery.id)))
    if not messages:
        sources = or_(Message.delivery_id.in_([d.id for d in found]), Message.request_id == wanted)
        messages = list(s.scalars(select(Message).where(sources).order_by(Message.id)))
    ids = [m.id for m in messages]
    attempts = list(
        s.scalars(select(Attempt).where(Attempt.message_id.in_(ids)).order_by(Attempt.message_id, Attempt.number))
    )
    provider_ids = {m.provider_id for m in messages} | {a.provider_id for a in attempts} | {wanted}
    waiting = {m.channel_id for m in messages if m.status in _WAITING and m.turn_at is not None}
    letters = or_(DeadLetter.delivery_id.in_([d.id for d in found]), DeadLetter.message_id.in_(ids))
    return {
        "delivery": [_row(d) | {"bytes": len(d.raw)} for d in found],
        "message": [_row(m) for m in messages],
        "attempt": [_row(a) for a in attempts],
        "lane": [dict(row) for channel_id in sorted(waiting) for row in Lane.overview(s, channel_id)],
        "conversation": _rows(
            s, select(Conversation).where(Conversation.id.in_([m.conversation_id for m in messages]))
        ),
        "status": _rows(s, select(StatusReport).where(StatusReport.provider_id.in_(filter(None, provider_ids)))),
        "media": _media(s, or_(Media.message_id.in_(ids), Media.id == id_)),
        "event": _rows(s, select(Event).where(Event.message_id.in_(ids)).order_by(Event.id)),
        "dead letter": _rows(s, select(DeadLetter).where(letters)),
    }


def _messages(s: Session, wanted: str, id_: UUID | None) -> list[Message]:
    """By an id of theirs, or by one of an attempt to send them: a message sent twice has two of the provider's."""
    of_media = select(Media.message_id).where(Media.id == id_)
    named = or_(Message.provider_id == wanted, Message.id == id_, Message.id.in_(of_media))
    found = list(s.scalars(select(Message).where(named)))
    if found:
        return found
    attempt_id = attempt_named_in(wanted) or id_
    tried = select(Attempt.message_id).where(or_(Attempt.provider_id == wanted, Attempt.id == attempt_id))
    ids = list(s.scalars(tried))
    return list(s.scalars(select(Message).where(Message.id.in_(ids)).order_by(Message.id))) if ids else []


def _media(s: Session, where: Any) -> list[dict[str, Any]]:
    """Files with what is stored of them; of one that is over, what only matters before is left out."""
    found = s.execute(select(Media, File).join_from(Media, File, _SAME_CONTENT, isouter=True).where(where))
    return [_noted(media) | ({} if file is None else _stored(file)) for media, file in found]


def _noted(media: Media) -> dict[str, Any]:
    row = _row(media)
    if media.state != MediaState.PENDING:
        row.pop("next_attempt_at")
    return row


def _stored(file: File) -> dict[str, Any]:
    stored = {"stored_type": file.mime_type, "stored_bytes": file.bytes, "stored_sha256": file.digest.hex()}
    return {**stored, "key": file.key}


def _rows(s: Session, query: Any) -> list[dict[str, Any]]:
    return [_row(row) for row in s.scalars(query)]


def _row(row: Any) -> dict[str, Any]:
    return {c.key: getattr(row, c.key) for c in row.__table__.columns if c.key not in _HIDDEN}


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
