"""What came of an attempt: what is written of it, when the next one is, and who hears of it. No queue (underscore)."""

import random
import secrets
import time
from collections.abc import Iterable
from typing import Any

from sqlalchemy import RowMapping

from models import Event, RegisterStatus
from models.sip_registration import entry
from pombal import log, metrics
from pombal.settings import settings
from providers import sip
from providers.sip import Kind, Outcome
from workers._sip_attempt import Result

_log = log.get()

_OURS_AGAIN = 60.0  # seconds: what is wrong with us a person has to mend
_EVENTS = {"registered": "sip_registered", "failed": "sip_failed", "pending": "sip_unregistered"}


def verdict(row: RowMapping, result: Result, dice: random.Random, *, is_away: bool) -> dict[str, Any]:
    """What `SipRegistration.settle` takes, for a row as it was claimed. `is_away`: drachtio is."""
    outcome, now = result.outcome, time.monotonic()
    bound = None if row["bound_seconds"] is None else row["bound_seconds"] - (now - result.began)
    next_ = _next(row, result, dice, bound if bound is not None and bound > 0 else None, now, is_away=is_away)
    has_failed = outcome.kind in (Kind.PERMANENT, Kind.TEMPORARY)
    return {
        **{name: row[name] for name in ("tenant_id", "id", "cseq", "revision")},
        "outcome": outcome.kind,
        "code": outcome.code,
        "error": outcome.error,
        "granted": outcome.granted,
        "ago": now - result.sent,
        "next": next_,
        "fails": 1 if has_failed else 0 if outcome.kind is Kind.OURS else None,
        "algorithm": outcome.algorithm,
        "server": result.server,
        "contact": result.contact,
        "call_id": secrets.token_hex(16) if outcome.wants_new_call_id else None,
        "entries": _entries(row, result),
        "is_over": result.was_unregister and next_ is None,
        "is_reported": is_reported(),
    }


def _next(
    row: RowMapping, result: Result, dice: random.Random, bound: float | None, now: float, *, is_away: bool
) -> float | None:
    """Seconds until the next attempt; None for never. `bound`: seconds that a binding still lives."""
    outcome = result.outcome
    if outcome.kind is Kind.REGISTERED and outcome.granted is not None:
        wait = sip.refresh_after(outcome.granted, dice) - (now - result.sent)
        return min(wait, sip.SHORTEST_WAIT) if result.is_doubtful else wait
    if outcome.kind is Kind.UNREGISTERED or (result.was_unregister and bound is None):
        return None
    wait = sip.retry_after(outcome, row["failures"] + 1, dice, bound_seconds=bound)
    if outcome.kind is Kind.OURS and not is_away:
        wait = _OURS_AGAIN if bound is None else min(_OURS_AGAIN, max(sip.SHORTEST_WAIT, bound - sip.LAST_CALL))
    if result.was_unregister and bound is not None:
        wait = min(wait, bound + 1.0)  # it ends by itself then
    return wait


def _entries(row: RowMapping, result: Result) -> list[dict[str, Any]]:
    """Of the history: this attempt, and the one before it if nobody could write down what came of that."""
    outcome, seconds = result.outcome, result.ended - result.began
    told = (outcome.kind, outcome.code, outcome.error, seconds, result.server, outcome.notes)
    entries = [entry(result.began_at, *told)]
    if row["lost_at"] is not None:
        entries.insert(0, entry(row["lost_at"], "unknown", None, "its worker ended in mid-attempt", 0.0, None, ()))
    return entries


def is_reported() -> bool:
    """Whether there is a backend that hears of outcomes."""
    return settings().require_sip_backend() is not None


def changes(written: Iterable[RowMapping]) -> list[dict[str, Any]]:
    """Events of accounts whose status is not what it was, from what `settle`, `hold_back` and `lapse` return."""
    return [
        Event.row(
            _EVENTS[row["status"]],
            row["tenant_id"],
            None,
            None,
            {"account": str(row["id"]), "name": row["name"], "status": row["status"], "error": row["register_error"]},
        )
        for row in written
        if row["status"] != row["was"]
    ]


def say(row: RowMapping, outcome: Outcome) -> None:
    """Tell the log and the metrics of a row that was written."""
    names = names_of(row)
    if row["was"] == RegisterStatus.REGISTERED and row["status"] == RegisterStatus.FAILED:
        metrics.sip_lapses.inc()
    if outcome.kind is Kind.UNREGISTERED or row["next_refresh_at"] is None:
        _log.info("sip_unregistered", **names, error=outcome.error)
    elif outcome.kind is Kind.REGISTERED:
        if row["was"] != RegisterStatus.REGISTERED:
            _log.info("sip_registered", **names, granted=outcome.granted, expires_at=row["expires_at"].isoformat())
        odd = {"notes": outcome.notes} if outcome.notes else {}
        _log.info("sip_refresh_scheduled", **names, at=row["next_refresh_at"].isoformat(), **odd)
    else:
        at = row["next_refresh_at"].isoformat()
        told = {"outcome": str(outcome.kind), "code": outcome.code, "error": outcome.error, "status": row["status"]}
        _log.warning("sip_failed", **names, **told, next_try_at=at)


def names_of(row: RowMapping) -> dict[str, str]:
    """What log lines call an account."""
    return {"tenant_id": str(row["tenant_id"]), "account_id": str(row["id"])}
