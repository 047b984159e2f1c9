"""What follows when a channel's session stands otherwise than we believed: one place for polls, checks and sessions.

In one commit: the channel's columns, an event, the hold of its lane (set while it is disconnected, ended when it is
connected again), and the session that somebody watches. After it: a log line, a metric, and the bell of a lane that may
go on. Not a queue, hence the underscore.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import RowMapping
from sqlalchemy.orm import Session

from models import ChannelStatus, Event, Hold, Lane, WaSession, standing
from pombal import db, log, metrics
from pombal.middleware import bell_may_be_lost
from workers.outgoing_message import ring

_log = log.get()
T = TypeVar("T")

_MOST_RUNS = 4  # of a transaction that meets others in a deadlock


def keep(
    tenants: Iterable[UUID], given: list[dict[str, Any]], *, is_probe: bool = False
) -> tuple[list[RowMapping], list[dict[str, Any]]]:
    """Write down what polls found (as `standing.heard` takes it), with all that follows, and tell of it.

    Returns what was written, and the payloads of the events.
    """
    seen = list(tenants)

    def once() -> list[RowMapping]:
        with db.session(seen) as s:
            return write(s, given, is_probe=is_probe)

    news = rerun(once)
    tell(news)
    return news, [change for row in news if (change := change_of(row))]


def rerun(transaction: Callable[[], T]) -> T:
    """Run a transaction, and again when it met another one in a deadlock."""
    for _ in range(_MOST_RUNS - 1):
        try:
            return transaction()
        except Exception as error:
            if not db.is_worth_rerunning(error):
                raise
    return transaction()


def write(s: Session, given: list[dict[str, Any]], *, is_probe: bool = False) -> list[RowMapping]:
    """The same in a transaction that sees the tenants; `tell` of what it returns after the commit.

    Locks channels, then lanes, then sessions: whoever wants others of these locks takes them in that order.
    """
    news = sorted(standing.heard(s, given, is_probe=is_probe), key=lambda row: (row["tenant_id"], row["id"]))
    changes = [(row, change) for row in news if (change := change_of(row))]
    Event.append(s, [Event.row("channel_status", row["tenant_id"], row["id"], None, one) for row, one in changes])
    others = [row for row in news if row["is_other"]]
    for row in others:  # each made and locked before the next: whoever accepts messages takes lanes in this order, too
        if row["status"] == ChannelStatus.DISCONNECTED:
            Lane.ensure(s, row["tenant_id"], row["id"])
        Lane.lock(s, [row["id"]])
    for row in others:
        if row["status"] == ChannelStatus.DISCONNECTED:
            reason = "the channel's session is not connected"
            Lane.set_hold(s, row["id"], Hold.DISCONNECTED, code="disconnected", reason=reason)
        else:
            Lane.reconnected(s, row["id"])
    WaSession.follow(s, news)
    return news


def tell(news: Iterable[RowMapping]) -> None:
    """What `write` wrote is committed."""
    for row in news:
        if change := change_of(row):
            metrics.channel_changes.labels(provider=row["kind"], status=change["to"]).inc()
            _log.info(
                "channel_status_changed",
                tenant_id=str(row["tenant_id"]),
                channel_id=str(row["id"]),
                status=change["to"],
                was=change["from"],
                reason=change["reason"],
            )
        if row["is_other"] and row["status"] == ChannelStatus.CONNECTED:
            ring_lane(row["id"])


def change_of(row: RowMapping) -> dict[str, Any] | None:
    """The payload of the event that a row of `standing.heard` is worth; None where it looks as before."""
    was, now = standing.shown(row["was"], row["was_unknown"]), standing.shown(row["status"], row["unknown_reason"])
    if was == now:
        return None
    return {
        "channel": str(row["id"]),
        "from": was,
        "to": now,
        "raw": row["status_raw"],
        "reason": row["unknown_reason"],
    }


def ring_lane(channel_id: UUID) -> None:
    """Its messages may go; while Redis is away the sweep rings."""
    with bell_may_be_lost(channel_id=str(channel_id)):
        ring(channel_id)
