"""A channel's session, as whoever starts, watches and ends it sees it: its state, its QR code, and its next step.

    disconnected ─▶ connecting ─▶ qrcode ─▶ authenticated ─▶ ready      `disconnected` from anywhere

One row per channel that somebody has ever started; the routes read it and note a wish, a job does the steps.
"""

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import Index, func, text
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, Dated, Tenanted, belongs_to


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
    claim_token: Mapped[UUID | None]
    attempts: Mapped[int] = mapped_column(server_default=text("0"))  # steps that failed in a row
    qr: Mapped[bytes | None]
    qr_type: Mapped[str | None]
    qr_at: Mapped[datetime | None]
    error_code: Mapped[str | None]
    error: Mapped[str | None]
