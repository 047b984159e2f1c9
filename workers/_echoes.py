"""Which of our sends an echo or an ack of a gateway tells of.

A gateway's call carries no id of ours, so nothing that comes back names the attempt. What is told of a message that we
do not know by the provider's id may be of one whose answer was lost, has no id in it, or is still on its way; or of one
that somebody typed on the phone. An echo is ours when an attempt of that chat, begun before it and over no sooner than
shortly before it, had the same content; of a message that has another id by now it shows that it was sent twice. An ack
has no content: it settles only a send whose answer was lost, when no other could be meant, and the echo of another
message under that id takes that back (megaapi.md, "Retry rules"). Pure but for the look-up. Not a queue, hence the
underscore.
"""

import unicodedata
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import RowMapping
from sqlalchemy.orm import Session

from models import Attempt, Outcome

# How far a provider's clock, which counts whole seconds, may be off. What was sent long before our attempt is something
# else, told again after a reconnect; what was sent long after it, somebody typed.
_CLOCKS_DIFFER = timedelta(minutes=2)
# A call may wait for others' files, and then take as long as its own does. (One whose process died ends sooner:
# `Attempt.abandoned`.)
_LONGEST_CALL = timedelta(hours=1)
_LATEST = timedelta(minutes=10)
_LATEST_OF_FEW_WORDS = timedelta(minutes=2)  # where little is left to compare: a file without a caption
_CAPTIONED = ("image", "video", "document")
_SAME = {"voice": "audio"}  # a recording is sent as one, and comes back as the other
_DEGREES = 4  # digits after the point: some ten metres


class Heard(NamedTuple):
    """An echo (with `type` and `body`) or an ack (without) under a provider's id that no message of the channel has."""

    tenant_id: UUID
    channel_id: UUID
    conversation_ids: tuple[UUID, ...]  # that the chat may be: a person has several identities
    provider_id: str
    at: datetime
    type: str | None = None
    body: Mapping[str, Any] | None = None

    @property
    def key(self) -> tuple[UUID, UUID, str]:
        return self.tenant_id, self.channel_id, self.provider_id


def claimed(s: Session, heard: Iterable[Heard]) -> list[tuple[Heard, RowMapping]]:
    """The attempts that these tell of, each at most once. Needs the lanes' locks."""
    given = list(heard)
    chats = {(one.tenant_id, one.channel_id, chat) for one in given for chat in one.conversation_ids}
    waiting = Attempt.nameless(s, chats)
    named = {row["message_id"] for row in waiting if row["has_id"]}
    found = []
    for one in sorted(given, key=lambda one: one.at):
        rows = [row for row in waiting if row["conversation_id"] in one.conversation_ids]
        # What is known as sent may have been sent twice, and a refusal may be no true one: both only if nothing else is
        # meant.
        rows.sort(key=lambda row: (row["message_id"] in named, row["outcome"] == Outcome.REFUSED))
        for attempt in (_of_echo(one, rows) if one.type is not None else _of_ack(one, rows))[:1]:
            waiting = [row for row in waiting if row["id"] != attempt["id"]]
            named.add(attempt["message_id"])
            found.append((one, attempt))
    return found


def _of_echo(echo: Heard, rows: list[RowMapping]) -> list[RowMapping]:
    """Those with this content, in their order."""
    content = fingerprint(echo.type or "", echo.body or {})
    has_words = any(content[1:])
    latest = _LATEST if has_words else _LATEST_OF_FEW_WORDS
    return [
        row
        for row in rows
        if echo.at - row["started_at"] > -_CLOCKS_DIFFER
        and echo.at - _end_of(row) < latest
        and fingerprint(row["type"], row["body"]) == content
        and (has_words or not _may_be_no_double(row))
    ]


def _may_be_no_double(row: RowMapping) -> bool:
    """Whether its message is known as sent by another attempt, and nobody knows that this one has left as well."""
    return bool(row["has_id"]) and row["outcome"] in (Outcome.REFUSED, Outcome.UNKNOWN)


def _of_ack(ack: Heard, rows: list[RowMapping]) -> list[RowMapping]:
    """The one whose answer was lost, if nothing else in that chat could be meant."""
    rows = [row for row in rows if not row["has_id"] or ack.at - _end_of(row) < _LATEST]
    is_only = len(rows) == 1 and rows[0]["outcome"] == Outcome.UNKNOWN
    return [row for row in rows if is_only and ack.at > row["started_at"] and ack.at - _end_of(row) < _LATEST]


def _end_of(row: RowMapping) -> datetime:
    """When the call was over: WhatsApp had the message before that, if it got it, and whatever came along with it."""
    ended: datetime = min(row["ended_at"], row["started_at"] + _LONGEST_CALL)
    return ended


def fingerprint(type_: str, body: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a message survives its way through a gateway: texts but for their blanks, places, names of contacts."""
    type_ = _SAME.get(type_, type_)
    part = body.get(type_) or body.get("voice" if type_ == "audio" else type_)
    if type_ == "contacts" and isinstance(part, list):
        return type_, tuple(_text(_object(_object(one).get("name")).get("formatted_name")) for one in part)
    part = _object(part)
    if type_ == "text":
        return type_, _text(part.get("body"))
    if type_ in _CAPTIONED:
        return type_, _text(part.get("caption"))
    if type_ == "location":
        return type_, *(_rounded(part.get(name)) for name in ("latitude", "longitude"))
    return (type_,)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return " ".join(unicodedata.normalize("NFC", value).split()) if isinstance(value, str) else ""


def _rounded(value: Any) -> float | None:
    try:
        return round(float(value), _DEGREES)
    except (TypeError, ValueError):
        return None
