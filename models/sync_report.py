"""One round of the status sync that somebody asked for, or that was due: for whom, where it stands, what it found.

A report of the whole fleet belongs to no tenant, so the table has no tenant policy; a route serves a report only by its
id together with its tenant, or to the operator.
"""

from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, Dated, id_column


class ReportState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class SyncReport(Dated, Base):
    """`result` once it is done: `{"checked", "differs": […], "unknown": […], "changed": […]}`."""

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
    state: Mapped[str] = mapped_column(server_default=ReportState.PENDING)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[str | None]
