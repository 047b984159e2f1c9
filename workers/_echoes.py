"""Which of our sends an echo or an ack of a gateway tells of.

A gateway's call carries no id of ours, so nothing that comes back names the attempt. What is told of a message that we
do not know by the provider's id may be of one whose answer was lost, has no id in it, or is still on its way; or of one
that somebody typed on the phone. An echo is ours when an attempt of that conversation, begun before it, had the same
content; an ack, which has no content, only when a single attempt waits for one (megaapi.md, "Retry rules"). Pure but
for the look-up. Not a queue, hence the underscore.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import RowMapping
from sqlalchemy.orm import Session

from models import Attempt, Outcome

# How far a provider's clock, which counts whole seconds, may be behind ours. What was echoed long before our attempt is
# something else, told again after a reconnect.
_CLOCKS_DIFFER = timedelta(minutes=2)
_CAPTIONED = ("image", "video", "document")
_SAME = {"voice": "audio"}  # a recording is sent as one, and comes back as the other
_DEGREES = 4  # digits after the point: some ten metres


class Heard(NamedTuple):
    """An echo (with `type` and `body`) or an ack (without) under a provider's id that no message of the channel has."""

    tenant_id: UUID
    channel_id: UUID
    conversation_id: UUID
    provider_id: str
    at: datetime
    type: str | None = None
    body: Mapping[str, Any] | None = None


def claimed(s: Session, heard: Iterable[Heard]) -> list[tuple[Heard, RowMapping]]:
    """The attempts that these tell of, each at most once. Needs the lanes' locks."""
    given = list(heard)
    waiting: dict[UUID, list[RowMapping]] = defaultdict(list)
    for row in Attempt.nameless(s, {(one.tenant_id, one.channel_id, one.conversation_id) for one in given}):
        waiting[row["conversation_id"]].append(row)
    found = []
    for one in sorted(given, key=lambda one: (one.type is None, one.at)):  # echoes say more than acks
        rows = [row for row in waiting[one.conversation_id] if row["started_at"] < one.at + _CLOCKS_DIFFER]
        if one.type is not None:
            content = fingerprint(one.type, one.body or {})
            ours = [row for row in rows if fingerprint(row["type"], row["body"]) == content][:1]
        else:  # the answer of one that is under way tells its id
            ours = [row for row in rows if row["outcome"] != Outcome.SENDING] if len(rows) == 1 else []
        for attempt in ours:
            waiting[one.conversation_id] = [
                row for row in waiting[one.conversation_id] if row["message_id"] != attempt["message_id"]
            ]
            found.append((one, attempt))
    return found


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
