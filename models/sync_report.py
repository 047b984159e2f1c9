"""One round of the status sync that somebody asked for, or that was due: for whom, where it stands, what it found.

At most one of each kind is open for each tenant, and one round runs at a time: who makes it has the lease `status_sync`
(`models/clockwork.py`). A report that is running while nobody has the lease is one whose process died.

A report of the whole fleet belongs to no tenant, so the table has no tenant policy; a route serves a report only by its
id together with its tenant, or to the operator.
"""

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import ForeignKey, Index, RowMapping, select, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Dated, id_column
from pombal.ids import uuid7

LEASE = "status_sync"
EVERY = timedelta(minutes=5)  # a round is due, at whole multiples (`workers/status_sync.py`)
_PATIENCE = 2 * EVERY  # for which a tenant's report stands back behind rounds over all
_RING_AGAIN = timedelta(seconds=10)
_KEPT = timedelta(days=7)


class ReportState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class SyncReport(Dated, Base):
    """`result` once it is done: `{"checked", "differs": […], "unknown": […], "changed": […]}`; of one that was put back
    some of it."""

    __tablename__ = "sync_report"
    __table_args__ = (
        # One at a time of each kind for each tenant: whoever asks meanwhile gets the one that is on its way.
        Index(
            "uq_sync_report_open",
            text("coalesce(tenant_id, '00000000-0000-0000-0000-000000000000')"),
            "is_dry",
            unique=True,
            postgresql_where=text("state IN ('pending', 'running')"),
        ),
    )

    id: Mapped[UUID] = id_column()
    tenant_id: Mapped[UUID | None] = mapped_column(ForeignKey("tenant.id", ondelete="CASCADE"))  # None: all of them
    is_dry: Mapped[bool]
    is_due: Mapped[bool] = mapped_column(server_default=text("false"))  # by the schedule: it may take its time
    state: Mapped[str] = mapped_column(server_default=ReportState.PENDING)
    next_ring_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[str | None]

    @staticmethod
    def open(s: Session, tenant_id: UUID | None, *, is_dry: bool, is_due: bool = False) -> tuple[UUID, bool]:
        """The id of the report that is on its way, and whether this call made it. Whoever made it rings."""
        given = {"tenant_id": tenant_id, "is_dry": is_dry}
        while True:
            made = s.scalar(_OPEN, {**given, "id": uuid7(), "is_due": is_due, "again": _RING_AGAIN})
            if made is not None:
                return made, True
            found = s.scalar(_OPEN_ONE, given)
            if found is not None:  # else it ended just now
                return found, False

    @staticmethod
    def begin(s: Session, id_: UUID) -> RowMapping | None:
        """It runs from now on: its columns and `waited`, the seconds since it was asked for, or since its tick if it
        was due: that may have waited in the queue before there was a report. Only with the lease.

        None when it is not pending, or it is in the way of a round over all: tenants who ask on and on must not keep
        that back. `result` is what it told when it was put back.
        """
        return s.execute(_BEGIN, {"id": id_, "every": EVERY, "patience": _PATIENCE}).mappings().first()

    @staticmethod
    def is_in_the_way(s: Session, id_: UUID) -> bool:
        """Whether a round over all waits for this report, which is a tenant's and was not asked for long ago: where an
        outside cron asks each minute, it would be put back for ever."""
        return bool(s.scalar(_IS_IN_THE_WAY, {"id": id_, "patience": _PATIENCE}))

    @staticmethod
    def finish(s: Session, id_: UUID, result: dict[str, Any]) -> bool:
        """Keep what it found. False when it was given up meanwhile."""
        given = {"id": id_, "result": msgspec.json.encode(result).decode()}
        return s.execute(_FINISH, given).first() is not None

    @staticmethod
    def fail(s: Session, id_: UUID, error: str) -> None:
        s.execute(_FAIL, {"id": id_, "error": error})

    @staticmethod
    def fail_dead(s: Session) -> list[UUID]:
        """Give up what runs in no process any more. Only with the lease, and before anything runs under it."""
        return list(s.scalars(_FAIL_DEAD))

    @staticmethod
    def put_back(s: Session, id_: UUID, result: dict[str, Any]) -> None:
        """Let it be made anew, by another process or later; `result` is to be told then as well."""
        s.execute(_PUT_BACK, {"id": id_, "result": msgspec.json.encode(result).decode()})

    @staticmethod
    def to_ring(s: Session, *, at_once: bool = False) -> UUID | None:
        """The next report that waits while nobody makes one, unless it was rung for lately. Notes that it is rung for.

        `at_once`: even then.
        """
        given = {"lease": LEASE, "again": _RING_AGAIN, "at_once": at_once}
        id_: UUID | None = s.scalar(_TO_RING, given)
        return id_

    @staticmethod
    def forget(s: Session) -> None:
        """Drop what is older than a week."""
        s.execute(_FORGET, {"kept": _KEPT})

    @staticmethod
    def of(s: Session, id_: UUID, tenant_id: UUID | None) -> "SyncReport | None":
        """A tenant's own report; None: the fleet's."""
        whose = SyncReport.tenant_id.is_(None) if tenant_id is None else SyncReport.tenant_id == tenant_id
        return s.scalars(select(SyncReport).where(SyncReport.id == id_, whose)).first()


_OPEN = text("""
    INSERT INTO sync_report (id, tenant_id, is_dry, is_due, next_ring_at)
    VALUES (:id, :tenant_id, :is_dry, :is_due, now() + :again)
    ON CONFLICT DO NOTHING RETURNING id
""")

_OPEN_ONE = text("""
    SELECT id FROM sync_report
    WHERE tenant_id IS NOT DISTINCT FROM :tenant_id AND is_dry = :is_dry AND state IN ('pending', 'running')
""")

_IN_THE_WAY = """
    (tenant_id IS NOT NULL AND created_at > now() - CAST(:patience AS interval) AND EXISTS (
        SELECT FROM sync_report AS o WHERE o.tenant_id IS NULL AND o.state = 'pending'
    ))
"""
_IS_IN_THE_WAY = text(f"SELECT {_IN_THE_WAY} FROM sync_report WHERE id = :id")

_BEGIN = text(f"""
    UPDATE sync_report SET state = 'running', started_at = clock_timestamp()
    WHERE id = :id AND state = 'pending' AND NOT {_IN_THE_WAY}
    RETURNING id, tenant_id, is_dry, is_due, result, extract(epoch FROM clock_timestamp() - CASE
        WHEN is_due THEN date_bin(CAST(:every AS interval), created_at, to_timestamp(0)) ELSE created_at
    END)::float8 AS waited
""")

_FINISH = text("""
    UPDATE sync_report SET state = 'done', finished_at = clock_timestamp(), result = CAST(:result AS jsonb)
    WHERE id = :id AND state = 'running' RETURNING 1
""")

_FAIL = text("""
    UPDATE sync_report SET state = 'failed', finished_at = clock_timestamp(), error = :error
    WHERE id = :id AND state = 'running'
""")

_FAIL_DEAD = text("""
    UPDATE sync_report SET state = 'failed', finished_at = clock_timestamp(), error = 'its process ended'
    WHERE state = 'running' RETURNING id
""")

_PUT_BACK = text("""
    UPDATE sync_report SET state = 'pending', started_at = NULL, next_ring_at = NULL, result = CAST(:result AS jsonb)
    WHERE id = :id AND state = 'running'
""")

_TO_RING = text("""
    UPDATE sync_report SET next_ring_at = now() + :again
    WHERE id = (
        SELECT id FROM sync_report
        WHERE state IN ('pending', 'running') AND (next_ring_at IS NULL OR next_ring_at <= now() OR :at_once)
            AND NOT EXISTS (SELECT FROM lease WHERE name = :lease AND until > now())
        ORDER BY tenant_id IS NOT NULL, id LIMIT 1 FOR UPDATE SKIP LOCKED
    )
    RETURNING id
""")

_FORGET = text("DELETE FROM sync_report WHERE created_at < now() - CAST(:kept AS interval)")
