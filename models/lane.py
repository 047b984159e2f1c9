"""A lane: the line of one channel's outgoing messages, and who may send from it.

One holder at a time, by a lease: a token and an end, by the database's clock (architecture.md, decision 5). Whoever
changes the line (the holder, a cancel, a status that settles an unknown send) locks the lane's row first, so that no
message is set behind another one that has just left. Accepting a message touches the row too, last of its tables but
the conversation's: a holder that looks for what is due either sees the message or is seen by it.

`next_due_at` is when the line next needs somebody; it stays in the past as long as anything is under way, so that the
sweep finds the lane of a holder that died. A lane may be *paused* for a while (a limit of the number, its account or
its app) or *held* until a probe gets through (bad token, payment, an outage) or an operator lets it go on.

Read across tenants by the sweep, so without a tenant policy; it holds ids, codes, and the provider's words about its
own account (`hold_reason`), and is never served raw.
"""

import time
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKeyConstraint, Index, Row, RowMapping, UniqueConstraint, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, given_rows, rows
from models.message import IN_LINE

LEASE = timedelta(seconds=10)
_RING_AGAIN = timedelta(seconds=5)
FIRST_PROBE, LONGEST_PROBE = timedelta(seconds=30), timedelta(minutes=5)
_LATELY = timedelta(minutes=3)  # an attempt that ended within the last minute began no earlier


class Hold(StrEnum):
    """Why nothing is sent. All end by themselves but `operator`; one message at a time is the probe of the others, but
    of `disconnected`, which ends when the channel's session is connected again."""

    AUTH = "auth"  # token, permission, or the standing of the account
    PAYMENT = "payment"
    OUTAGE = "outage"  # the provider does not answer
    OPERATOR = "operator"
    DISCONNECTED = "disconnected"


class LaneState(StrEnum):
    """How a lane stands, for people and dashboards."""

    HELD = "held"
    PAUSED = "paused"
    SENDING = "sending"  # somebody has it
    DUE = "due"  # it needs somebody, and nobody has it yet
    IDLE = "idle"


class Lane(Base):
    __tablename__ = "lane"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "channel_id"], ["channel.tenant_id", "channel.id"], ondelete="CASCADE"),
        UniqueConstraint("channel_id"),
        Index("ix_lane_due", "next_due_at", postgresql_where=text("next_due_at IS NOT NULL")),
        Index("ix_lane_app", "app_id", "waba_id"),
        {"postgresql_with": {"fillfactor": "50"}},  # rewritten several times a second while it sends
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    channel_id: Mapped[UUID] = mapped_column(primary_key=True)
    app_id: Mapped[UUID | None]  # whose limits it shares: the app's, and the account's
    waba_id: Mapped[str | None]
    token: Mapped[UUID | None]
    until: Mapped[datetime | None]
    next_due_at: Mapped[datetime | None]
    next_ring_at: Mapped[datetime | None]
    paused_until: Mapped[datetime | None]
    pause_code: Mapped[str | None]
    misses: Mapped[int] = mapped_column(server_default=text("0"))  # calls in a row that speak for an outage
    pace: Mapped[float] = mapped_column(server_default=text("1"))  # share of its rate, set when it was too fast
    hold: Mapped[str | None]
    hold_code: Mapped[str | None]
    hold_reason: Mapped[str | None]
    # Told by a status, after acceptance: then it takes two accepted probes, and no such status in between.
    is_hold_of_status: Mapped[bool] = mapped_column(server_default=text("false"))
    held_at: Mapped[datetime | None]
    probes: Mapped[int] = mapped_column(server_default=text("0"))
    next_probe_at: Mapped[datetime | None]

    @staticmethod
    def expect(s: Session, given: list[dict[str, Any]]) -> None:
        """Messages were queued: `tenant_id`, `channel_id`, `due_at` (None: at once) of each."""
        if given:
            s.execute(_EXPECT, given_rows(given))

    @staticmethod
    def take(s: Session, channel_id: UUID, token: UUID) -> RowMapping | None:
        """The lane, if something is due in it that may be sent and nobody else has it."""
        given = {"channel_id": channel_id, "token": token, "length": LEASE}
        return s.execute(_TAKE, given).mappings().first()

    @staticmethod
    def renew(s: Session, channel_id: UUID, token: UUID) -> RowMapping | None:
        """Lock the lane for the rest of the transaction and have it for longer; None when it is another's by now."""
        given = {"channel_id": channel_id, "token": token, "length": LEASE}
        return s.execute(_RENEW, given).mappings().first()

    @staticmethod
    def release(s: Session, tenant_id: UUID, channel_id: UUID, token: UUID) -> bool:
        """Let another have it, and note when it needs somebody next; True when something may be sent now.

        An unknown message that cannot be decided yet is left to the sweep. Sees the tenant.
        """
        given = {"tenant_id": tenant_id, "channel_id": channel_id, "token": token}
        # Locked by a statement of its own: the next one then sees whatever was queued before the lock was had.
        if s.execute(_LOCK, {"ids": [channel_id]}).first() is None:
            return False
        return bool(s.execute(_RELEASE, given).scalar())

    @staticmethod
    def lock(s: Session, channel_ids: list[UUID]) -> None:
        """Lock these lanes, in the one order everybody does it in."""
        if channel_ids:
            s.execute(_LOCK, {"ids": channel_ids}).all()

    @staticmethod
    def pause(s: Session, *, code: str, seconds: float, pace: float, channel_id: UUID) -> None:
        """Send nothing for a while, and at this share of the rate then: a limit of this number was reached."""
        given = {"code": code, "length": timedelta(seconds=seconds), "pace": pace, "channel_id": channel_id}
        s.execute(_PAUSE, given)

    @staticmethod
    def pause_all(s: Session, *, code: str, seconds: float, app_id: UUID, waba_id: str | None) -> None:
        """The same for every lane of an app, or of one account of it. In a transaction of its own: many lanes."""
        given = {"code": code, "length": timedelta(seconds=seconds), "app_id": app_id, "waba_id": waba_id}
        s.execute(_PAUSE_ALL, given)

    @staticmethod
    def set_hold(
        s: Session,
        channel_id: UUID,
        hold: Hold,
        *,
        code: str | None,
        reason: str,
        is_probe: bool = False,
        is_of_status: bool = False,
    ) -> bool:
        """Hold the lane, or note that a probe was in vain: the next one waits twice as long. True when it is news."""
        given = {
            "is_probe": is_probe,
            "is_of_status": is_of_status,
            "channel_id": channel_id,
            "hold": hold,
            "code": code,
            "reason": reason,
            "first": FIRST_PROBE,
            "longest": LONGEST_PROBE,
        }
        return bool(s.execute(_HOLD, given).scalar())

    @staticmethod
    def missed(s: Session, channel_id: UUID, misses: int) -> None:
        """Note how many calls in a row speak for an outage."""
        given = {"channel_id": channel_id, "misses": misses}
        s.execute(text("UPDATE lane SET misses = :misses WHERE channel_id = :channel_id"), given)

    @staticmethod
    def resume(s: Session, channel_id: UUID) -> bool:
        """End the hold, whoever set it, and any pause; True when there was one."""
        return s.execute(_RESUME, {"channel_id": channel_id}).first() is not None

    @staticmethod
    def reconnected(s: Session, channel_id: UUID) -> bool:
        """The channel's session is connected again: end the hold that it was not; True when there was one. What its
        provider wants to wait for is waited for all the same."""
        return s.execute(_RECONNECTED, {"channel_id": channel_id}).first() is not None

    @staticmethod
    def probe_now(s: Session, channel_id: UUID) -> bool:
        """Somebody mended it, perhaps: probe at once. Not for a hold of the operator's."""
        return s.execute(_PROBE_NOW, {"channel_id": channel_id}).first() is not None

    @staticmethod
    def to_ring(s: Session, limit: int, *, at_once: bool = False) -> list[UUID]:
        """Lanes that need somebody now and have nobody, and were not rung for lately. Notes that they are rung."""
        given = {"most": limit, "again": _RING_AGAIN, "at_once": at_once}
        return list(s.execute(_TO_RING, given).scalars())

    @staticmethod
    def held_in_doubt(s: Session) -> list[tuple[UUID, UUID]]:
        """`(tenant, channel)` of lanes from which nothing is sent, not even a probe, and in which something is to be
        decided: its sender died, or nobody told in time what became of it. Of the tenants that this session sees."""
        return [(row.tenant_id, row.channel_id) for row in s.execute(_HELD_IN_DOUBT)]

    @staticmethod
    def lock_in_doubt(s: Session, channel_id: UUID) -> RowMapping | None:
        """Lock one of these for the rest of the transaction, unless it is one no longer."""
        Lane.lock(s, [channel_id])
        return s.execute(_ONE_IN_DOUBT, {"channel_id": channel_id}).mappings().first()

    @staticmethod
    def seconds_until_due(s: Session) -> float | None:
        """Until the next lane needs somebody that nobody needs yet; None when no lane waits for its time."""
        value = s.scalar(_SECONDS_UNTIL_DUE)
        return None if value is None else float(value)

    @staticmethod
    def ensure(s: Session, tenant_id: UUID, channel_id: UUID) -> None:
        """Make the lane's row for a channel that never had anything to send."""
        s.execute(_ENSURE, {"tenant_id": tenant_id, "channel_id": channel_id})

    @staticmethod
    def overview(s: Session, channel_id: UUID | None = None) -> list[RowMapping]:
        """How each lane stands whose tenant this session sees, or one of them: its state and what lies in its line.

        `state` is a `LaneState`; `queued` counts the messages whose turn has come, `oldest_queued_at` is the turn of
        the first of them; `paused_until` is None once it is over, and `lease` are the seconds that the holder has left.
        """
        only = _OVERVIEW if channel_id is None else _OVERVIEW_OF_ONE
        return list(s.execute(only, {} if channel_id is None else {"channel_id": channel_id}).mappings())

    @staticmethod
    def sent_lately(s: Session) -> dict[UUID, int]:
        """How many calls were accepted within the last minute, by channel, of the tenants that this session sees."""
        return {row.channel_id: row.sent for row in s.execute(_SENT_LATELY, {"since": _first_id(_LATELY)})}

    @staticmethod
    def waiting(s: Session) -> Row[Any]:
        """What lies in all lines that this session sees: `pending` (their turn has come, since `oldest` seconds),
        `scheduled` for later, `unknown`."""
        return s.execute(_WAITING).one()

    @staticmethod
    def in_states(s: Session) -> dict[str, int]:
        """How many lanes of the fleet are in each state."""
        return {row.state: row.lanes for row in s.execute(_IN_STATES)}

    @staticmethod
    def on_hold(s: Session) -> dict[str, int]:
        """How many lanes of the fleet are held, by the kind of the hold."""
        return {row.hold: row.lanes for row in s.execute(_ON_HOLD)}


_EXPECT = text(f"""
    INSERT INTO lane AS l (tenant_id, channel_id, app_id, waba_id, next_due_at)
    SELECT given.tenant_id, given.channel_id, c.app_id, c.config ->> 'waba_id', min(coalesce(given.due_at, now()))
    FROM {rows(tenant_id="uuid", channel_id="uuid", due_at="timestamptz")}
    JOIN channel AS c ON (c.tenant_id, c.id) = (given.tenant_id, given.channel_id)
    GROUP BY given.tenant_id, given.channel_id, c.app_id, c.config ->> 'waba_id'
    ORDER BY given.tenant_id, given.channel_id
    ON CONFLICT (tenant_id, channel_id) DO UPDATE SET next_due_at = least(l.next_due_at, excluded.next_due_at),
        app_id = excluded.app_id, waba_id = excluded.waba_id
""")

_MAY_SEND = """
    (paused_until IS NULL OR paused_until <= now())
    AND (hold IS NULL OR hold NOT IN ('operator', 'disconnected') AND next_probe_at <= now())
"""

_TAKE = text(f"""
    UPDATE lane SET token = :token, until = now() + :length, next_ring_at = NULL
    WHERE channel_id = :channel_id AND (until IS NULL OR until < now()) AND next_due_at <= now() AND {_MAY_SEND}
    RETURNING *, extract(epoch FROM now() - paused_until)::float AS calm
""")

_RENEW = text(f"""
    UPDATE lane SET until = now() + :length, next_due_at = now()
    WHERE channel_id = :channel_id AND token = :token
    RETURNING *, {_MAY_SEND} AS may_send, extract(epoch FROM now() - paused_until)::float AS calm
""")

_LOCK = text("SELECT channel_id FROM lane WHERE channel_id = ANY(:ids) ORDER BY tenant_id, channel_id FOR UPDATE")

_RELEASE = text(f"""
    UPDATE lane SET token = NULL, until = NULL, next_due_at = (
        SELECT min(due_at) FROM message AS m
        WHERE m.tenant_id = :tenant_id AND m.channel_id = :channel_id AND m.due_at IS NOT NULL
    )
    WHERE channel_id = :channel_id AND token = :token
    RETURNING next_due_at <= now() AND {_MAY_SEND} AND EXISTS (
        SELECT FROM message AS m
        WHERE m.tenant_id = :tenant_id AND m.channel_id = :channel_id AND m.due_at <= now() AND m.status = 'queued'
    )
""")

_PAUSE = text("""
    UPDATE lane SET paused_until = greatest(paused_until, now() + :length), pause_code = :code, pace = :pace
    WHERE channel_id = :channel_id
""")

_PAUSE_ALL = text("""
    UPDATE lane SET pause_code = :code,
        paused_until = greatest(paused_until, now() + CAST(:length AS interval) * (1 + random() / 2))
    WHERE channel_id IN (
        SELECT channel_id FROM lane
        WHERE app_id = :app_id AND (CAST(:waba_id AS text) IS NULL OR waba_id = :waba_id)
        ORDER BY tenant_id, channel_id FOR UPDATE
    )
""")

# What the operator holds stays the operator's, and what is disconnected stays so until it is connected again. Another
# reason for a hold starts its probes anew; the same reason told by a call that left before the hold changes nothing.
_HOLD = text("""
    UPDATE lane SET
        probes = CASE WHEN was.hold = :hold THEN lane.probes + CAST(:is_probe AS bool)::int ELSE 0 END,
        next_probe_at = CASE
            WHEN was.hold = :hold AND NOT :is_probe THEN lane.next_probe_at
            WHEN was.hold = :hold THEN now() + least(
                CAST(:longest AS interval), CAST(:first AS interval) * power(2, least(lane.probes + 1, 10))
            )
            ELSE now() + CAST(:first AS interval)
        END,
        held_at = CASE WHEN was.hold = :hold THEN lane.held_at ELSE now() END,
        hold = :hold, hold_code = :code, hold_reason = :reason,
        is_hold_of_status = :is_of_status
    FROM (SELECT tenant_id, channel_id, hold FROM lane WHERE channel_id = :channel_id FOR UPDATE) AS was
    WHERE lane.channel_id = was.channel_id AND was.hold IS DISTINCT FROM 'operator'
        AND (was.hold IS DISTINCT FROM 'disconnected' OR :hold IN ('operator', 'disconnected'))
    RETURNING was.hold IS DISTINCT FROM :hold
""")

_RESUME = text("""
    UPDATE lane SET hold = NULL, hold_code = NULL, hold_reason = NULL, is_hold_of_status = false, held_at = NULL,
        probes = 0, next_probe_at = NULL, misses = 0, next_ring_at = NULL, pause_code = NULL,
        paused_until = CASE WHEN paused_until > now() THEN now() ELSE paused_until END
    WHERE channel_id = :channel_id AND (hold IS NOT NULL OR paused_until > now()) RETURNING 1
""")

_RECONNECTED = text("""
    UPDATE lane SET hold = NULL, hold_code = NULL, hold_reason = NULL, is_hold_of_status = false, held_at = NULL,
        probes = 0, next_probe_at = NULL, next_ring_at = NULL
    WHERE channel_id = :channel_id AND hold = 'disconnected' RETURNING 1
""")

_PROBE_NOW = text("""
    UPDATE lane SET next_probe_at = now(), next_ring_at = NULL
    WHERE channel_id = :channel_id AND hold IS NOT NULL AND hold NOT IN ('operator', 'disconnected') RETURNING 1
""")

_TO_RING = text(f"""
    UPDATE lane SET next_ring_at = now() + :again
    WHERE channel_id IN (
        SELECT channel_id FROM lane
        WHERE next_due_at <= now() AND (until IS NULL OR until < now()) AND {_MAY_SEND}
            AND (next_ring_at IS NULL OR next_ring_at <= now() OR :at_once)
        ORDER BY next_due_at LIMIT :most FOR UPDATE SKIP LOCKED
    )
    RETURNING channel_id
""")

_IN_DOUBT = """
    hold IN ('operator', 'disconnected') AND (until IS NULL OR until < now()) AND (
        EXISTS (
            SELECT FROM message AS m
            WHERE m.tenant_id = l.tenant_id AND m.channel_id = l.channel_id AND m.status = 'sending'
        ) OR EXISTS (
            SELECT FROM message AS m
            WHERE m.tenant_id = l.tenant_id AND m.channel_id = l.channel_id AND m.status = 'unknown'
                AND m.due_at <= now()
        )
    )
"""
_HELD_IN_DOUBT = text(
    f"SELECT tenant_id, channel_id FROM lane AS l WHERE {_IN_DOUBT} ORDER BY tenant_id, channel_id LIMIT 500"
)
_ONE_IN_DOUBT = text(f"SELECT *, NULL AS calm FROM lane AS l WHERE {_IN_DOUBT} AND channel_id = :channel_id")

_SECONDS_UNTIL_DUE = text("""
    SELECT extract(epoch FROM min(greatest(next_due_at, paused_until, next_probe_at, until)) - now()) FROM lane
    WHERE next_due_at IS NOT NULL AND coalesce(hold, '') NOT IN ('operator', 'disconnected')
        AND greatest(next_due_at, paused_until, next_probe_at, until) > now()
""")

_ENSURE = text("""
    INSERT INTO lane (tenant_id, channel_id, app_id, waba_id)
    SELECT tenant_id, id, app_id, config ->> 'waba_id' FROM channel
    WHERE tenant_id = :tenant_id AND id = :channel_id
    ON CONFLICT DO NOTHING
""")

_STATE = """
    CASE WHEN l.hold IS NOT NULL THEN 'held' WHEN l.paused_until > now() THEN 'paused'
        WHEN l.until > now() THEN 'sending' WHEN l.next_due_at <= now() THEN 'due' ELSE 'idle' END
"""

# The share of its rate that it has now: it rises again by a quarter every ten calm seconds (workers/_line.py).
_SHARE = """
    least(1, l.pace
        * power(1.25, least(20, floor(greatest(0, extract(epoch FROM now() - l.paused_until)::float8) / 10))))
"""

_LINES = f"""
    WITH line AS (
        SELECT tenant_id, channel_id, count(*) FILTER (WHERE status = 'queued' AND turn_at <= now()) AS queued,
            count(*) FILTER (WHERE status = 'queued' AND turn_at > now()) AS scheduled,
            count(*) FILTER (WHERE status = 'sending') AS sending,
            count(*) FILTER (WHERE status = 'unknown') AS unknown,
            min(turn_at) FILTER (WHERE status = 'queued' AND turn_at <= now()) AS oldest_queued_at
        FROM message WHERE {IN_LINE} AND turn_at IS NOT NULL {{only}} GROUP BY tenant_id, channel_id
    )
    SELECT l.tenant_id, l.channel_id, c.name, {_STATE} AS state,
        l.hold, l.hold_code, l.hold_reason, l.held_at, l.probes, l.next_probe_at,
        CASE WHEN l.paused_until > now() THEN l.paused_until END AS paused_until,
        CASE WHEN l.paused_until > now() THEN l.pause_code END AS pause_code,
        {_SHARE} AS pace, CASE WHEN l.until > now() THEN extract(epoch FROM l.until - now())::float8 END AS lease,
        coalesce(line.queued, 0) AS queued, coalesce(line.scheduled, 0) AS scheduled,
        coalesce(line.sending, 0) AS sending, coalesce(line.unknown, 0) AS unknown, line.oldest_queued_at,
        extract(epoch FROM now() - line.oldest_queued_at)::float8 AS oldest_queued
    FROM lane AS l JOIN channel AS c ON (c.tenant_id, c.id) = (l.tenant_id, l.channel_id)
    LEFT JOIN line ON (line.tenant_id, line.channel_id) = (l.tenant_id, l.channel_id)
"""

_OVERVIEW = text(_LINES.format(only="") + " ORDER BY l.tenant_id, c.name")
_OVERVIEW_OF_ONE = text(_LINES.format(only="AND channel_id = :channel_id") + " WHERE l.channel_id = :channel_id")

# Ids of attempts begin with their time of birth: the primary key leads to the latest.
_SENT_LATELY = text("""
    SELECT channel_id, count(*) AS sent FROM attempt
    WHERE id >= :since AND outcome = 'accepted' AND ended_at > now() - interval '1 minute'
    GROUP BY channel_id
""")

# By the partial index of those in line, so that what was sent long ago costs nothing.
_WAITING = text(f"""
    SELECT count(*) FILTER (WHERE status = 'queued' AND turn_at <= now()) AS pending,
        coalesce(extract(epoch FROM now() - min(turn_at) FILTER (WHERE status = 'queued' AND turn_at <= now())), 0)
            AS oldest,
        count(*) FILTER (WHERE status = 'queued' AND turn_at > now()) AS scheduled,
        count(*) FILTER (WHERE status = 'unknown') AS unknown
    FROM message WHERE {IN_LINE}
""")

_IN_STATES = text(f"SELECT {_STATE} AS state, count(*) AS lanes FROM lane AS l GROUP BY 1")
_ON_HOLD = text("SELECT hold, count(*) AS lanes FROM lane WHERE hold IS NOT NULL GROUP BY hold")


def _first_id(ago: timedelta) -> UUID:
    """The smallest id of a row that was made at most so long ago."""
    return UUID(int=int((time.time() - ago.total_seconds()) * 1000) << 80)
