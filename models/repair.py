"""One incident of a Baileys session and what was done about it: evidence, steps, times, outcome.

    open ─▶ closed          observed, then step by step up the ladder, until one is proven to have helped
      └───▶ waiting ─▶ closed     for a person

One that is not closed per channel. Whoever works on it has claimed it; a phase is written down before it is made, so
that whoever comes after a crash knows how far it got (`workers/session_fixer.py`).
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import Index, RowMapping, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Dated, Tenanted, belongs_to, id_column
from pombal.ids import uuid7

CLAIM = timedelta(seconds=90)  # longer than a phase may take: calls that hang, and a store of keys that is slow
_RING_AGAIN = timedelta(seconds=10)


class RepairState(StrEnum):
    OPEN = "open"
    WAITING = "waiting"  # for a person
    CLOSED = "closed"


class Step(StrEnum):
    """The ladder, the mildest first (baileys-sessions.md §7), as `pombal session repair --step` numbers it."""

    OBSERVE = "observe"
    CAUSE = "cause"
    CONTACT_REFRESH = "contact_refresh"
    RESTART = "restart"
    DROP_KEYS = "drop_keys"
    RESTORE_CREDS = "restore_creds"
    PERSON = "person"


ACTS = (Step.CONTACT_REFRESH, Step.RESTART, Step.DROP_KEYS, Step.RESTORE_CREDS)  # what is done to a session


class Phase(StrEnum):
    """How far a step is. Between STOPPING and STARTED the session may be without a socket: then it is started first,
    whatever else anybody wants."""

    PLANNED = "planned"
    STOPPING = "stopping"
    STOPPED = "stopped"  # and confirmed
    ACTING = "acting"  # by the gateway itself, without a stop of ours
    STARTING = "starting"
    WATCHING = "watching"  # for the proof


MAY_BE_STOPPED = (Phase.STOPPING, Phase.STOPPED, Phase.ACTING, Phase.STARTING)


class RepairOutcome(StrEnum):
    HEALED = "healed"  # before anything was done
    REPAIRED = "repaired"  # by the last step, proven
    UNPROVEN = "unproven"  # nobody wrote any more: nothing tells
    UNREPAIRED = "unrepaired"  # a step by hand that did not help
    CANCELLED = "cancelled"  # by a person


class History(NamedTuple):
    """The steps made on a session in the last day: how many, and how long ago the last was, in seconds."""

    steps: int
    seconds_ago: float | None


class Repair(Tenanted, Dated, Base):
    """`evidence` has numbers and causes, never addresses. `steps`: a list of `{"step", "why", "at", "ended_at",
    "outcome", "is_act", "details"}`, the last of them the present one. `since`: the first error that counts."""

    __tablename__ = "repair"
    __table_args__ = (
        belongs_to("channel", "channel_id", ondelete="CASCADE"),
        Index("uq_repair_open", "tenant_id", "channel_id", unique=True, postgresql_where=text("state <> 'closed'")),
        Index("ix_repair_due", "next_at", postgresql_where=text("state <> 'closed'")),
        Index("ix_repair_channel", "tenant_id", "channel_id", "opened_at"),
        Index("ix_repair_host", "host", postgresql_where=text("asked_for_qr")),
    )

    id: Mapped[UUID] = id_column()
    channel_id: Mapped[UUID]
    host: Mapped[str]  # the gateway's, for what must not be repeated on it
    state: Mapped[str] = mapped_column(server_default=RepairState.OPEN)
    outcome: Mapped[str | None]
    cause: Mapped[str]  # the class of most of its errors
    is_by_hand: Mapped[bool] = mapped_column(server_default=text("false"))
    wanted_step: Mapped[str | None]  # by hand: this one alone
    since: Mapped[datetime]
    evidence: Mapped[dict[str, Any]]
    steps: Mapped[list[dict[str, Any]]] = mapped_column(JSONB, server_default=text("'[]'"))
    step: Mapped[str]
    phase: Mapped[str] = mapped_column(server_default=Phase.PLANNED)
    phase_at: Mapped[datetime] = mapped_column(server_default=func.now())
    step_at: Mapped[datetime] = mapped_column(server_default=func.now())
    # What arrived since then tells what came of this step: its socket was opened, or it was done by the gateway.
    judged_from: Mapped[datetime | None]
    failures: Mapped[int] = mapped_column(server_default=text("0"))  # of this phase, in a row
    says: Mapped[str | None]  # why it waits, for whoever looks
    # What this step works on: keys to drop or contacts to refresh. They hold phone numbers: dropped with the step.
    names: Mapped[list[str] | None] = mapped_column(JSONB)
    asked_for_qr: Mapped[bool] = mapped_column(server_default=text("false"))
    next_at: Mapped[datetime | None] = mapped_column(server_default=func.now())  # also when a claim runs out
    next_ring_at: Mapped[datetime | None]
    claim_token: Mapped[UUID | None]
    opened_at: Mapped[datetime] = mapped_column(server_default=func.now())
    closed_at: Mapped[datetime | None]

    @staticmethod
    def open(
        s: Session,
        tenant_id: UUID,
        channel_id: UUID,
        *,
        host: str,
        cause: str,
        since: datetime,
        evidence: Mapping[str, Any],
        wanted_step: Step | None = None,
        is_by_hand: bool = False,
    ) -> UUID | None:
        """The id of a new incident; None when there is one that is not closed, or the errors are of one that was closed
        since they were counted."""
        given = {
            "id": uuid7(),
            "tenant_id": tenant_id,
            "channel_id": channel_id,
            "host": host,
            "cause": cause,
            "since": since,
            "evidence": msgspec.json.encode(evidence).decode(),
            "wanted_step": wanted_step,
            "is_by_hand": is_by_hand,
            "again": _RING_AGAIN,
        }
        made: UUID | None = s.scalar(_OPEN, given)
        # A statement of its own: whoever closed the former one has committed by now, or we could not have made ours.
        if made is not None and not is_by_hand and s.scalar(_DROP_STALE, given) is not None:
            return None
        return made

    @staticmethod
    def claim(s: Session, tenant_id: UUID, channel_id: UUID, token: UUID) -> RowMapping | None:
        """Take what is due of this channel's incident: its columns, the channel's `kind`, `config`, `sealed`, `status`
        and `own_id`, whether somebody wishes something of its session (`has_wish`), and `now` on the database's clock.
        """
        given = {"tenant_id": tenant_id, "channel_id": channel_id, "token": token, "claim": CLAIM}
        return s.execute(_CLAIM, given).mappings().first()

    @staticmethod
    def save(s: Session, tenant_id: UUID, id_: UUID, token: UUID, changes: Mapping[str, Any], *, wait: float) -> bool:
        """Write down what a phase came to; the next is due in `wait` seconds. False when another has the claim by now,
        or it was closed: then nothing is written."""
        changed = {name: _encoded(value) for name, value in changes.items()}
        sets = "".join(
            f", {name} = {'CAST(:' + name + ' AS jsonb)' if isinstance(changes[name], list | dict) else ':' + name}"
            for name in sorted(changed)
        )
        given = {"tenant_id": tenant_id, "id": id_, "token": token, "wait": timedelta(seconds=wait)}
        return s.execute(text(_SAVE.format(sets=sets)), {**given, **changed, "again": _RING_AGAIN}).first() is not None

    @staticmethod
    def cancel(s: Session, tenant_id: UUID, channel_id: UUID) -> bool:
        """End a person's waiting, or an incident whose session is not in the middle of a step; False without one."""
        return s.execute(_CANCEL, {"tenant_id": tenant_id, "channel_id": channel_id}).first() is not None

    @staticmethod
    def wake(s: Session, tenant_id: UUID, channel_id: UUID) -> None:
        """Have it looked at now, unless somebody is at it."""
        s.execute(_WAKE, {"tenant_id": tenant_id, "channel_id": channel_id})

    @staticmethod
    def lately(s: Session, tenant_id: UUID, channel_id: UUID) -> History:
        row = s.execute(_HISTORY, {"tenant_id": tenant_id, "channel_id": channel_id}).one()
        return History(row.steps, row.seconds_ago)

    @staticmethod
    def asked_for_a_qr_code(s: Session, host: str, *, since: timedelta) -> bool:
        """Whether a restart made a session of this gateway ask for a QR code: of the tenants that `s` sees."""
        return s.scalar(_ASKED, {"host": host, "since": since}) is not None

    @staticmethod
    def forget_qr_codes(s: Session, host: str) -> None:
        """A restart has kept the pairing on this gateway: of the tenants that `s` sees."""
        s.execute(_FORGET_QR, {"host": host})

    @staticmethod
    def is_in_a_step(s: Session, tenant_id: UUID, channel_id: UUID) -> bool:
        """Whether a step of its incident is under way, so that its session may be without a socket."""
        return s.scalar(_IN_A_STEP, {"tenant_id": tenant_id, "channel_id": channel_id}) is not None

    @staticmethod
    def in_states(s: Session) -> dict[str, int]:
        """How many are not closed: by state, those whose session may be without its socket as `stopped`."""
        return {state: count for state, count in s.execute(_IN_STATES)}

    @staticmethod
    def to_ring(s: Session, limit: int, *, at_once: bool = False) -> list[tuple[UUID, UUID]]:
        """(tenant, channel) of those that are due and were not rung for lately; notes that they are rung for."""
        given = {"most": limit, "again": _RING_AGAIN, "at_once": at_once}
        return [(row.tenant_id, row.channel_id) for row in s.execute(_TO_RING, given)]


class RepairPause(Base):
    """Who may not be repaired for now: a channel by its id, or `all`. It holds ids alone."""

    __tablename__ = "repair_pause"

    scope: Mapped[str] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(server_default=func.now())

    @staticmethod
    def set(s: Session, scope: str) -> bool:
        """False when it is paused already."""
        return s.execute(_PAUSE, {"scope": scope}).first() is not None

    @staticmethod
    def end(s: Session, scope: str) -> bool:
        """False when it was not paused."""
        return s.execute(_RESUME, {"scope": scope}).first() is not None

    @staticmethod
    def counts(s: Session) -> dict[str, int]:
        """How many pauses there are, of `all` and of a `channel`."""
        scopes = list(s.scalars(text("SELECT scope FROM repair_pause")))
        return {"all": scopes.count("all"), "channel": len(scopes) - scopes.count("all")}

    @staticmethod
    def holds(s: Session, channel_id: UUID) -> str | None:
        """`all` or `channel` when its repairs are paused."""
        found: str | None = s.scalar(_HOLDS, {"scope": str(channel_id)})
        return found and ("all" if found == "all" else "channel")


def _encoded(value: Any) -> Any:
    return msgspec.json.encode(value).decode() if isinstance(value, list | dict) else value


_OPEN = text("""
    INSERT INTO repair (tenant_id, id, channel_id, host, cause, since, evidence, step, wanted_step, is_by_hand,
        next_ring_at)
    VALUES (:tenant_id, :id, :channel_id, :host, :cause, :since, CAST(:evidence AS jsonb), 'observe', :wanted_step,
        :is_by_hand, now() + CAST(:again AS interval))
    ON CONFLICT (tenant_id, channel_id) WHERE state <> 'closed' DO NOTHING RETURNING id
""")

_DROP_STALE = text("""
    DELETE FROM repair WHERE tenant_id = :tenant_id AND id = :id AND EXISTS (
        SELECT FROM repair AS r WHERE r.tenant_id = :tenant_id AND r.channel_id = :channel_id AND r.closed_at >= :since
    ) RETURNING 1
""")

_CLAIM = text("""
    UPDATE repair AS r SET claim_token = :token, next_at = now() + CAST(:claim AS interval),
        next_ring_at = now() + CAST(:claim AS interval)
    FROM channel AS c
    WHERE r.tenant_id = :tenant_id AND r.channel_id = :channel_id AND r.state <> 'closed' AND r.next_at <= now()
        AND (c.tenant_id, c.id) = (r.tenant_id, r.channel_id)
    RETURNING r.*, c.name, c.kind, c.config, c.sealed, c.status AS channel_status, c.own_id, clock_timestamp() AS now,
        EXISTS (SELECT FROM session AS o WHERE (o.tenant_id, o.channel_id) = (r.tenant_id, r.channel_id)
            AND o.wish IS NOT NULL) AS has_wish
""")

_SAVE = """
    UPDATE repair SET claim_token = NULL, next_at = clock_timestamp() + CAST(:wait AS interval),
        next_ring_at = clock_timestamp() + CAST(:wait AS interval) + CAST(:again AS interval){sets}
    WHERE tenant_id = :tenant_id AND id = :id AND claim_token = :token AND state <> 'closed'
    RETURNING 1
"""

_CANCEL = text("""
    UPDATE repair SET state = 'closed', outcome = 'cancelled', closed_at = now(), next_at = NULL, claim_token = NULL,
        names = NULL
    WHERE tenant_id = :tenant_id AND channel_id = :channel_id AND state <> 'closed'
        AND phase NOT IN ('stopping', 'stopped', 'acting', 'starting') AND (claim_token IS NULL OR next_at <= now())
    RETURNING 1
""")

_WAKE = text("""
    UPDATE repair SET next_at = now(), next_ring_at = now() + interval '10 seconds'
    WHERE tenant_id = :tenant_id AND channel_id = :channel_id AND state <> 'closed' AND claim_token IS NULL
""")

_HISTORY = text("""
    SELECT count(*) AS steps, extract(epoch FROM now() - max(at))::float8 AS seconds_ago FROM (
        SELECT (one ->> 'at')::timestamptz AS at
        FROM repair AS r CROSS JOIN LATERAL jsonb_array_elements(r.steps) AS one
        WHERE r.tenant_id = :tenant_id AND r.channel_id = :channel_id AND r.opened_at > now() - interval '30 days'
            AND (one ->> 'is_act')::boolean
    ) AS made WHERE at > now() - interval '1 day'
""")

_ASKED = text("""
    SELECT 1 FROM repair WHERE host = :host AND asked_for_qr AND opened_at > now() - CAST(:since AS interval) LIMIT 1
""")

_FORGET_QR = text("UPDATE repair SET asked_for_qr = false WHERE host = :host AND asked_for_qr")

_IN_A_STEP = text("""
    SELECT 1 FROM repair WHERE tenant_id = :tenant_id AND channel_id = :channel_id AND state <> 'closed'
        AND phase IN ('stopping', 'stopped', 'acting', 'starting')
""")

_IN_STATES = text("""
    SELECT CASE WHEN phase IN ('stopping', 'stopped', 'acting', 'starting') THEN 'stopped' ELSE state END AS state,
        count(*)
    FROM repair WHERE state <> 'closed' GROUP BY 1
""")

_TO_RING = text("""
    UPDATE repair SET next_ring_at = now() + CAST(:again AS interval)
    WHERE (tenant_id, id) IN (
        SELECT tenant_id, id FROM repair
        WHERE state <> 'closed' AND next_at <= now() AND (:at_once OR coalesce(next_ring_at, next_at) <= now())
        ORDER BY next_at LIMIT :most FOR UPDATE SKIP LOCKED
    )
    RETURNING tenant_id, channel_id
""")

_PAUSE = text("INSERT INTO repair_pause (scope) VALUES (:scope) ON CONFLICT DO NOTHING RETURNING 1")
_RESUME = text("DELETE FROM repair_pause WHERE scope = :scope RETURNING 1")
_HOLDS = text("SELECT scope FROM repair_pause WHERE scope IN ('all', :scope) ORDER BY scope = 'all' DESC LIMIT 1")
