"""Messages that were accepted and failed later, by a status: the same table of codes decides (fact sheet of Meta, §14).

What may pass is tried again, by a new attempt with another id of the provider's; what will not stays failed. Not a
queue, hence the underscore.
"""

from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import RowMapping, select
from sqlalchemy.orm import Session

from models import Channel, ChannelKind, Lane, MessageStatus, outgoing
from models.dead_letter import message_letter
from pombal import log, metrics
from providers.meta_errors import late_fault
from providers.outbound import Answer, Kind, Outcome
from workers import _verdicts

_log = log.get()

_MOST_ATTEMPTS = 10  # of one message: each of these was accepted, so a fault that stays would go round for ever
_SHORTEST_WAIT = 30.0  # seconds


def try_again(
    s: Session, risen: Sequence[RowMapping], when_committed: Callable[[Callable[[], None]], None] = lambda say: say()
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Put back into the line what failed for a reason that may pass; needs the lanes' locks.

    `risen` are rows of `Message.catch_up`. Returns the events and the dead letters of what was done. Codes are Meta's:
    what another provider says has failed stays so. What stays so is counted and logged, by `when_committed` if given.
    """
    failed = [row for row in risen if row["status"] == MessageStatus.FAILED and row["turn_at"]]
    kinds = _kinds(s, {row["channel_id"] for row in failed})
    back, letters = [], []
    for row in failed:
        if kinds.get(row["channel_id"]) != ChannelKind.META or not row["error_code"]:
            when_committed(_saying(row, kinds.get(row["channel_id"], "none")))
            continue
        fault = late_fault(row["error_code"], row["error"] or "")
        answer = Answer(Outcome.REFUSED, fault=fault)
        verdict = _verdicts.verdict(answer, type_=row["type"], tries=row["tries"], throttles=row["throttles"])
        if verdict.status is MessageStatus.QUEUED and row["attempts"] < _MOST_ATTEMPTS:
            is_held = fault.kind in (Kind.AUTH, Kind.PAYMENT)
            delay = 0.0 if is_held else max(verdict.delay or 0.0, _SHORTEST_WAIT)
            ids = {name: row[name] for name in ("tenant_id", "id", "attempt_id")}
            back.append(ids | {"tries": verdict.tries, "throttles": verdict.throttles, "delay": delay})
            continue
        when_committed(_saying(row, ChannelKind.META))
        if fault.kind is not Kind.PERMANENT:
            why = f"accepted, and failed later with code {row['error_code']}, after {row['attempts']} attempts"
            letters.append(message_letter(row, why, row["error_code"]))
    queued = outgoing.take_back(s, back)
    Lane.expect(s, [{name: row[name] for name in ("tenant_id", "channel_id", "due_at")} for row in queued])
    return [outgoing.event(row, MessageStatus.QUEUED) for row in queued], letters


def _saying(row: RowMapping, kind: str) -> Callable[[], None]:
    ids = {name: str(row[name]) for name in ("channel_id", "tenant_id")} | {"message_id": str(row["id"])}

    def say() -> None:
        metrics.messages.labels(direction="out", provider=kind, outcome="failed").inc()
        _log.info("message_failed", **ids, attempt=row["attempts"], code=row["error_code"])

    return say


def _kinds(s: Session, channel_ids: set[UUID]) -> dict[UUID, str]:
    if not channel_ids:
        return {}
    return {id_: kind for id_, kind in s.execute(select(Channel.id, Channel.kind).where(Channel.id.in_(channel_ids)))}
