"""What follows when a channel's session stands otherwise than we believed: one place for polls, checks and sessions.

In one commit: the channel's columns, an event, the hold of its lane (set while it is disconnected, ended when it is
connected again), and the session that somebody watches. After it: a log line, a metric, and the bell of a lane that may
go on. A lane may be held while the channel is not known to be disconnected, since a send meets a drop first: whoever
finds it connected ends that as well. Not a queue, hence the underscore.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar
from uuid import UUID

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
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write down what polls found (as `standing.heard` takes it), with all that follows, and tell of it.

    Returns what was written, and the payloads of the events.
    """
    seen = list(tenants)

    def once() -> list[dict[str, Any]]:
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


def write(s: Session, given: list[dict[str, Any]], *, is_probe: bool = False) -> list[dict[str, Any]]:
    """The same in a transaction that sees the tenants; `tell` of what it returns after the commit: rows as of
    `standing.heard`, with `is_resumed` where a hold was ended.

    Locks channels, then lanes, then sessions: whoever wants others of these locks takes them in that order.
    """
    heard = sorted(standing.heard(s, given, is_probe=is_probe), key=lambda row: (row["tenant_id"], row["id"]))
    changes = [(row, change) for row in heard if (change := change_of(row))]
    Event.append(s, [Event.row("channel_status", row["tenant_id"], row["id"], None, one) for row, one in changes])
    # A probe may be made because a send was refused: the lane is held then, and the channel looks as before.
    moved = [row for row in heard if row["is_other"] or (is_probe and _is_connected(row))]
    for row in moved:  # each made and locked before the next: whoever accepts messages takes lanes in this order, too
        if row["status"] == ChannelStatus.DISCONNECTED:
            Lane.ensure(s, row["tenant_id"], row["id"])
        Lane.lock(s, [row["id"]])
    for row in moved:
        if row["status"] == ChannelStatus.DISCONNECTED:
            reason = "the channel's session is not connected"
            Lane.set_hold(s, row["id"], Hold.DISCONNECTED, code="disconnected", reason=reason)
    resumed = resume(s, [(row["tenant_id"], row["id"]) for row in moved if _is_connected(row)])
    WaSession.follow(s, heard)
    return [{**row, "is_resumed": row["id"] in resumed} for row in heard]


def _is_connected(row: Mapping[Any, Any]) -> bool:
    return row["status"] == ChannelStatus.CONNECTED and row["unknown_reason"] is None


def resume(s: Session, keys: Iterable[tuple[UUID, UUID]]) -> set[UUID]:
    """These (tenant, channel) are connected: end what holds their lanes because they were not. Returns the channels
    of which something was ended; `say_resumed` of each after the commit. Needs the lanes' locks."""
    ended = [(tenant_id, id_) for tenant_id, id_ in keys if Lane.reconnected(s, id_)]
    Event.append(s, [Event.row("channel_resumed", tenant_id, id_, None, {}) for tenant_id, id_ in ended])
    return {id_ for _, id_ in ended}


def tell(news: Iterable[dict[str, Any]]) -> None:
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
        if row["is_resumed"]:
            say_resumed(row["id"])


def change_of(row: Mapping[Any, Any]) -> dict[str, Any] | None:
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


def say_resumed(channel_id: UUID) -> None:
    """That its hold is ended is committed: its messages may go. While Redis is away the sweep rings."""
    _log.info("channel_resumed", channel_id=str(channel_id))
    with bell_may_be_lost(channel_id=str(channel_id)):
        ring(channel_id)
