"""Messages that were accepted and failed later, by a status: the same table of codes decides (fact sheet of Meta, §14).

What may pass is tried again, by a new attempt with another id of the provider's; what will not stays failed. Not a
queue, hence the underscore.
"""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import RowMapping, select
from sqlalchemy.orm import Session

from models import Channel, ChannelKind, Lane, MessageStatus, outgoing
from models.dead_letter import message_letter
from providers.meta_errors import late_fault
from providers.outbound import Answer, Kind, Outcome
from workers import _verdicts

_MOST_ATTEMPTS = 10  # of one message: each of these was accepted, so a fault that stays would go round for ever
_SHORTEST_WAIT = 30.0  # seconds


def try_again(s: Session, risen: Sequence[RowMapping]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Put back into the line what failed for a reason that may pass; needs the lanes' locks.

    `risen` are rows of `Message.catch_up`. Returns the events and the dead letters of what was done. Codes are Meta's:
    what another provider says has failed stays so.
    """
    failed = [row for row in risen if row["status"] == MessageStatus.FAILED and row["turn_at"] and row["error_code"]]
    at_meta = _of_meta(s, {row["channel_id"] for row in failed})
    back, letters = [], []
    for row in failed:
        if row["channel_id"] not in at_meta:
            continue
        fault = late_fault(row["error_code"], row["error"] or "")
        answer = Answer(Outcome.REFUSED, fault=fault)
        verdict = _verdicts.verdict(answer, type_=row["type"], tries=row["tries"], throttles=row["throttles"])
        if verdict.status is MessageStatus.QUEUED and row["attempts"] < _MOST_ATTEMPTS:
            is_held = fault.kind in (Kind.AUTH, Kind.PAYMENT)
            delay = 0.0 if is_held else max(verdict.delay or 0.0, _SHORTEST_WAIT)
            ids = {name: row[name] for name in ("tenant_id", "id", "attempt_id")}
            back.append(ids | {"tries": verdict.tries, "throttles": verdict.throttles, "delay": delay})
        elif fault.kind is not Kind.PERMANENT:
            why = f"accepted, and failed later with code {row['error_code']}, after {row['attempts']} attempts"
            letters.append(message_letter(row, why, row["error_code"]))
    queued = outgoing.take_back(s, back)
    Lane.expect(s, [{name: row[name] for name in ("tenant_id", "channel_id", "due_at")} for row in queued])
    return [outgoing.event(row, MessageStatus.QUEUED) for row in queued], letters


def _of_meta(s: Session, channel_ids: set[UUID]) -> set[UUID]:
    if not channel_ids:
        return set()
    known = select(Channel.id).where(Channel.id.in_(channel_ids), Channel.kind == ChannelKind.META)
    return set(s.scalars(known))
