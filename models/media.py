"""One file of a message: where the provider keeps it, and until when it can be fetched.

`download_media` finds its rows here by a due-scan; until then they wait as `pending`.
"""

from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import Index, func, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Dated, Tenanted, belongs_to, given_rows, rows


class MediaState(StrEnum):
    PENDING = "pending"


class Media(Tenanted, Dated, Base):
    __tablename__ = "media"
    __table_args__ = (
        belongs_to("message", "message_id", ondelete="CASCADE"),
        Index("ix_media_due", "next_attempt_at", postgresql_where=text("state = 'pending'")),
    )

    message_id: Mapped[UUID] = mapped_column(primary_key=True)
    channel_id: Mapped[UUID]
    provider_media_id: Mapped[str]
    kind: Mapped[str]
    mime_type: Mapped[str | None]  # as the sender claims
    sha256: Mapped[str | None]  # base64, as the provider claims
    filename: Mapped[str | None]  # data only, never a path
    state: Mapped[str] = mapped_column(server_default=MediaState.PENDING)
    next_attempt_at: Mapped[datetime] = mapped_column(server_default=func.now())
    deadline: Mapped[datetime]  # 7 days after the message: the provider's id dies then (whatsapp-cloud-api.md §12)

    @staticmethod
    def expect(s: Session, given: list[dict[str, Any]]) -> None:
        """Note files that are to be fetched, one row per new message."""
        if given:
            s.execute(_EXPECT, given_rows(given))


_EXPECT = text(f"""
    INSERT INTO media (tenant_id, message_id, channel_id, provider_media_id, kind, mime_type, sha256, filename,
        deadline)
    SELECT * FROM {
    rows(
        tenant_id="uuid",
        message_id="uuid",
        channel_id="uuid",
        provider_media_id="text",
        kind="text",
        mime_type="text",
        sha256="text",
        filename="text",
        deadline="timestamptz",
    )
}
    ORDER BY tenant_id, message_id
    ON CONFLICT DO NOTHING
""")
