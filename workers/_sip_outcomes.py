"""What came of an attempt: what is written of it, when the next one is, and who hears of it. No queue (underscore)."""

import random
import secrets
from collections.abc import Iterable
from datetime import timedelta
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
    outcome = result.outcome
    wait = _wait(row, result, dice, is_away=is_away)
    has_failed = outcome.kind in (Kind.PERMANENT, Kind.TEMPORARY)

    def at(moment: float) -> str:
        """By the database's clock. The attempt began after the row was claimed, so this is never ahead of the truth:
        nobody is registered for longer than was granted, however late this is written."""
        then = row["claimed_at"] + timedelta(seconds=moment - result.began)
        return str(then.isoformat())

    return {
        **{name: row[name] for name in ("tenant_id", "id", "cseq", "revision")},
        "outcome": outcome.kind,
        "code": outcome.code,
        "error": outcome.error,
        "granted": outcome.granted,
        "sent_at": at(result.sent),
        "next_at": None if wait is None else at(result.ended + wait),
        "fails": 1 if has_failed else 0 if outcome.kind is Kind.OURS else None,
        "algorithm": outcome.algorithm,
        "server": result.server,
        "contact": result.contact,
        "call_id": secrets.token_hex(16) if outcome.wants_new_call_id else None,
        "entries": _entries(row, result),
        "is_over": result.was_unregister and wait is None,
        "is_reported": is_reported(),
    }


def _wait(row: RowMapping, result: Result, dice: random.Random, *, is_away: bool) -> float | None:
    """Seconds from the end of an attempt until the next one; None for never."""
    outcome = result.outcome
    bound = (row["bound_seconds"] or 0.0) - (result.ended - result.began)  # that a binding still lives
    bound_seconds = bound if bound > 0 else None
    if outcome.kind is Kind.REGISTERED and outcome.granted is not None:
        wait = sip.refresh_after(outcome.granted, dice) - (result.ended - result.sent)
        return min(wait, sip.SHORTEST_WAIT) if result.is_doubtful else wait
    if outcome.kind is Kind.UNREGISTERED or (result.was_unregister and bound_seconds is None):
        return None
    wait = sip.retry_after(outcome, row["failures"] + 1, dice, bound_seconds=bound_seconds)
    if outcome.kind is Kind.OURS and not is_away:
        is_last_call = bound_seconds is not None
        wait = min(_OURS_AGAIN, max(sip.SHORTEST_WAIT, bound - sip.LAST_CALL)) if is_last_call else _OURS_AGAIN
    if result.was_unregister:
        wait = min(wait, bound + 1.0)  # it ends by itself then
    return wait


def _entries(row: RowMapping, result: Result) -> list[dict[str, Any]]:
    """Of the history: this attempt, and the one before it if nobody could write down what came of that."""
    outcome, seconds = result.outcome, result.ended - result.began
    told = (outcome.kind, outcome.code, outcome.error, seconds, result.server, outcome.notes)
    entries = [entry(result.began_at, *told, retry_after=outcome.retry_after)]
    if row["lost_at"] is not None:
        entries.insert(0, entry(row["lost_at"], "unknown", None, "its worker ended in mid-attempt", 0.0, None, ()))
    return entries


def is_reported() -> bool:
    """Whether there is a backend that hears of outcomes."""
    return settings().require_sip_backend() is not None


def changes(written: Iterable[RowMapping]) -> list[dict[str, Any]]:
    """Events of accounts whose status is not what it was, from what `settle`, `hold_back` and `lapse` return. A binding
    that ended while nobody looked, and is there again, is two."""
    events = []
    for row in written:
        was, status = row["was"], row["status"]
        if row.get("lapsed_for") is not None and status == RegisterStatus.REGISTERED:
            was = RegisterStatus.FAILED
            events.append(_event(row, RegisterStatus.FAILED, row["lapse_error"]))
        if status != was:
            events.append(_event(row, status, row["register_error"]))
    return events


def _event(row: RowMapping, status: str, error: str | None) -> dict[str, Any]:
    payload = {"account": str(row["id"]), "name": row["name"], "status": status, "error": error}
    return Event.row(_EVENTS[status], row["tenant_id"], None, None, payload)


def say_lapse(row: RowMapping) -> None:
    """Tell the log and the metrics of a binding that ended without a refresh, whoever found it: a row of `settle` or of
    `lapse` that has `lapsed_for`."""
    metrics.sip_lapses.inc()
    told = {"status": row["status"], "error": row.get("lapse_error") or row["register_error"]}
    _log.error("sip_lapsed", **names_of(row), **told, seconds=round(row["lapsed_for"], 1))


def say(row: RowMapping, outcome: Outcome) -> None:
    """Tell the log and the metrics of a row that was written."""
    names = names_of(row)
    if row["lapsed_for"] is not None:
        say_lapse(row)
    if outcome.kind is Kind.UNREGISTERED or row["next_refresh_at"] is None:
        _log.info("sip_unregistered", **names, error=outcome.error)
    elif outcome.kind is Kind.REGISTERED:
        if row["was"] != RegisterStatus.REGISTERED or row["lapsed_for"] is not None:
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
