"""A channel's session, as whoever starts, watches and ends it sees it: its state, its QR code, and its next step.

    disconnected ─▶ connecting ─▶ qrcode ─▶ authenticated ─▶ ready      `disconnected` from anywhere

One row per channel that somebody has ever started or ended; the routes read it and note a wish, a job does the steps.
A step is claimed before it is made, and what it came to is dropped when the claim or the wish is another by then.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Index, RowMapping, func, select, text, tuple_
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Dated, Tenanted, belongs_to
from models.channel import ChannelStatus
from models.event import Event

CLAIM = timedelta(seconds=60)  # longer than a step may take
_RING_AGAIN = timedelta(seconds=10)
_FRESH = timedelta(seconds=60)  # a picture that nobody renewed for so long cannot be scanned any more


class SessionState(StrEnum):
    CONNECTING = "connecting"
    QRCODE = "qrcode"
    AUTHENTICATED = "authenticated"
    READY = "ready"
    DISCONNECTED = "disconnected"


class SessionWish(StrEnum):
    """What somebody asked for, until it is done or given up."""

    START = "start"
    STOP = "stop"


class Settled(NamedTuple):
    """What a step came to: `wait` seconds until the next one (None: there is none), and the states it went through."""

    wait: float | None
    states: list[SessionState]


class WaSession(Tenanted, Dated, Base):
    __tablename__ = "session"
    __table_args__ = (
        belongs_to("channel", "channel_id", ondelete="CASCADE"),
        Index("ix_session_due", "next_step_at", postgresql_where=text("next_step_at IS NOT NULL")),
    )

    channel_id: Mapped[UUID] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(server_default=SessionState.DISCONNECTED)
    state_since: Mapped[datetime] = mapped_column(server_default=func.now())
    wish: Mapped[str | None]
    wished_at: Mapped[datetime | None]
    next_step_at: Mapped[datetime | None]  # also when the claim of whoever does a step runs out
    next_ring_at: Mapped[datetime | None]
    claim_token: Mapped[UUID | None]
    attempts: Mapped[int] = mapped_column(server_default=text("0"))  # steps that failed in a row
    qr: Mapped[bytes | None]
    qr_type: Mapped[str | None]
    qr_at: Mapped[datetime | None]
    error_code: Mapped[str | None]
    error: Mapped[str | None]

    def picture(self, now: datetime) -> tuple[str, bytes] | None:
        """The QR code that can be scanned now: its type and its bytes."""
        is_shown = self.state == SessionState.QRCODE and self.wish == SessionWish.START
        if not is_shown or self.qr is None or self.qr_type is None or self.qr_at is None or now - self.qr_at > _FRESH:
            return None
        return self.qr_type, self.qr

    @staticmethod
    def start(s: Session, tenant_id: UUID, channel_id: UUID, *, is_connected: bool) -> "WaSession":
        """Note that it shall be connected; asked again, the next step comes at once. Who calls it rings then.

        `is_connected`: what is known of a channel that has no row yet. The job finds out in any case.
        """
        row, now = _ensured(s, tenant_id, channel_id, is_connected=is_connected)
        if row.wish != SessionWish.START:
            row._wish(SessionWish.START, now)
            if row.state == SessionState.DISCONNECTED:
                row._pass(s, [SessionState.CONNECTING], now)
        row._due(now)
        return row

    @staticmethod
    def stop(s: Session, tenant_id: UUID, channel_id: UUID, *, is_connected: bool) -> "WaSession":
        """Note that it shall be ended; as `start`. Its QR code is shown no more."""
        row, now = _ensured(s, tenant_id, channel_id, is_connected=is_connected)
        if row.wish != SessionWish.STOP:
            row._wish(SessionWish.STOP, now)
        row._due(now)
        return row

    @staticmethod
    def claim(s: Session, tenant_id: UUID, channel_id: UUID, token: UUID) -> RowMapping | None:
        """Take its next step if that is due: its columns, with the channel's `kind`, `config` and `sealed`, the seconds
        it is `in_state` for, and `now` on the database's clock."""
        given = {"tenant_id": tenant_id, "channel_id": channel_id, "token": token, "claim": CLAIM}
        return s.execute(_CLAIM, given).mappings().first()

    @staticmethod
    def settle(
        s: Session,
        claimed: RowMapping,
        states: Iterable[SessionState] = (),
        *,
        wait: float | None,
        picture: tuple[str, bytes] | None = None,
        error: tuple[str, str] | None = None,
        has_failed: bool = False,
    ) -> Settled | None:
        """Write down what a claimed step came to. None when the claim is another's by now: nothing was written.

        `wait` None ends the wish. `error` is shown until a step has none; `has_failed` counts it as a failure.
        When somebody wishes otherwise by now, or heard how it stands, that counts, and not what the step found.
        """
        found = _lock(s, claimed["tenant_id"], claimed["channel_id"])
        if found is None or found[0].claim_token not in (None, claimed["claim_token"]):
            return None
        row, now = found
        if row.claim_token is None:  # heard how it stands: what was wished for before that is done
            return Settled(0.0 if row.wish else None, [])
        row.claim_token = None
        if (row.wish, row.wished_at) != (claimed["wish"], claimed["wished_at"]):
            row.attempts = 0
            row.next_step_at, row.next_ring_at = (now, now + _RING_AGAIN) if row.wish else (None, None)
            return Settled(0.0 if row.wish else None, [])
        passed = row._pass(s, states, now)
        if picture is not None:
            row.qr_type, row.qr = picture
            row.qr_at = now
            Event.append(s, [Event.row("qrcode", row.tenant_id, row.channel_id, None, {"channel": row.channel_id})])
        row.attempts = row.attempts + 1 if has_failed else 0
        row.error_code, row.error = error or (None, None)
        if wait is None:
            row.wish = row.next_step_at = row.next_ring_at = None
        else:
            row.next_step_at = now + timedelta(seconds=wait)
            row.next_ring_at = row.next_step_at + _RING_AGAIN  # who did the step rings for the next one
        return Settled(wait, passed)

    @staticmethod
    def follow(s: Session, news: Iterable[Any]) -> None:
        """Bring sessions in line with how their channels stand: rows as `models.standing.heard` returns them.

        Call it in the same transaction, after the channels were written. Channels without a row stay without one. A
        step under way for a wish that is done by this comes to nothing.
        """
        said = {(row["tenant_id"], row["id"]): row["status"] for row in news if row["unknown_reason"] is None}
        if not said:
            return
        keys = tuple_(WaSession.tenant_id, WaSession.channel_id)
        query = select(WaSession, func.clock_timestamp()).where(keys.in_(said)).order_by(*keys).with_for_update()
        for row, now in s.execute(query).all():
            status = said[row.tenant_id, row.channel_id]
            if status == ChannelStatus.CONNECTED and row.wish != SessionWish.STOP:
                is_scanned = row.state == SessionState.QRCODE
                row._pass(s, [SessionState.AUTHENTICATED] * is_scanned + [SessionState.READY], now)
                row.wish = row.error_code = row.error = None
                row.claim_token = row.next_step_at = row.next_ring_at = None
            elif status == ChannelStatus.DISCONNECTED and row.wish is None:
                row._pass(s, [SessionState.DISCONNECTED], now)

    @staticmethod
    def repair(s: Session) -> int:
        """Bring sessions in line that nobody wishes anything of, and that say otherwise than their channels: the step
        that ended one may have seen the channel before it changed. Of the tenants that `s` sees; returns how many.

        Locks channels and then sessions: call it before lanes are locked, or in a transaction of its own.
        """
        apart = s.execute(_APART).mappings().all()
        WaSession.follow(s, apart)
        return len(apart)

    @staticmethod
    def to_ring(s: Session, limit: int, *, at_once: bool = False) -> list[tuple[UUID, UUID]]:
        """(tenant, channel) of those whose step is due and was not rung for lately, among the tenants that this session
        sees; notes that they are rung for."""
        given = {"most": limit, "again": _RING_AGAIN, "at_once": at_once}
        return [(row.tenant_id, row.channel_id) for row in s.execute(_TO_RING, given)]

    def _wish(self, wish: SessionWish, now: datetime) -> None:
        self.wish, self.wished_at = wish, now
        self.error_code = self.error = None

    def _due(self, now: datetime) -> None:
        """The next step now, or when the one that somebody is at has ended."""
        self.attempts = 0
        if self.claim_token is None or self.next_step_at is None or self.next_step_at <= now:
            self.next_step_at, self.next_ring_at = now, now + _RING_AGAIN

    def _pass(self, s: Session, states: Iterable[SessionState], now: datetime) -> list[SessionState]:
        """Go through these states, with an event for each that is another one; returns those."""
        passed = []
        for state in states:
            if state != self.state:
                self.state, self.state_since = state, now
                passed.append(state)
        if self.state != SessionState.QRCODE:
            self.qr = self.qr_type = self.qr_at = None
        says = [{"channel": self.channel_id, "state": state} for state in passed]
        Event.append(s, [Event.row("session_status", self.tenant_id, self.channel_id, None, one) for one in says])
        return passed


def _ensured(s: Session, tenant_id: UUID, channel_id: UUID, *, is_connected: bool) -> tuple[WaSession, datetime]:
    state = SessionState.READY if is_connected else SessionState.DISCONNECTED
    made = {"tenant_id": tenant_id, "channel_id": channel_id, "state": state}
    s.execute(insert(WaSession).values(made).on_conflict_do_nothing())
    found = _lock(s, tenant_id, channel_id)
    if found is None:
        raise LookupError("the channel is gone")
    return found


def _lock(s: Session, tenant_id: UUID, channel_id: UUID) -> tuple[WaSession, datetime] | None:
    """The row, locked, and the time on the database's clock."""
    query = select(WaSession, func.clock_timestamp()).where(
        WaSession.tenant_id == tenant_id, WaSession.channel_id == channel_id
    )
    found = s.execute(query.with_for_update().execution_options(populate_existing=True)).first()
    return (found[0], found[1]) if found else None


_CLAIM = text("""
    UPDATE session AS o SET claim_token = :token, next_step_at = now() + :claim, next_ring_at = now() + :claim
    FROM channel AS c
    WHERE o.tenant_id = :tenant_id AND o.channel_id = :channel_id AND o.next_step_at <= now() AND o.wish IS NOT NULL
        AND (c.tenant_id, c.id) = (o.tenant_id, o.channel_id)
    RETURNING o.*, c.kind, c.config, c.sealed, extract(epoch FROM now() - o.state_since)::float8 AS in_state,
        clock_timestamp() AS now
""")

# The lock keeps the status from changing until the session follows it.
_APART = text("""
    SELECT c.tenant_id, c.id, c.status, c.unknown_reason
    FROM session AS o JOIN channel AS c ON (c.tenant_id, c.id) = (o.tenant_id, o.channel_id)
    WHERE o.wish IS NULL AND c.unknown_reason IS NULL AND (
        c.status = 'connected' AND o.state <> 'ready' OR c.status = 'disconnected' AND o.state <> 'disconnected'
    )
    ORDER BY c.tenant_id, c.id FOR SHARE OF c
""")

_TO_RING = text("""
    UPDATE session SET next_ring_at = now() + :again
    WHERE (tenant_id, channel_id) IN (
        SELECT tenant_id, channel_id FROM session
        WHERE next_step_at <= now() AND wish IS NOT NULL AND (next_ring_at IS NULL OR next_ring_at <= now() OR :at_once)
        ORDER BY next_step_at LIMIT :most FOR UPDATE SKIP LOCKED
    )
    RETURNING tenant_id, channel_id
""")
