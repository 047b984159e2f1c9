"""A contact and a channel talking: unread, archived, and the 24-hour window in which free-form answers are allowed."""

from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID, uuid5

from sqlalchemy import Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Dated, Tenanted, belongs_to, given_rows, rows


class ConversationStatus(StrEnum):
    OPEN = "open"
    CLOSED = "closed"


class Conversation(Tenanted, Dated, Base):
    __tablename__ = "conversation"
    __table_args__ = (
        belongs_to("channel", "channel_id", ondelete="CASCADE"),
        belongs_to("contact", "contact_id", ondelete="CASCADE"),
        UniqueConstraint("tenant_id", "channel_id", "contact_id"),
        Index("ix_conversation_recent", "tenant_id", text("last_message_at DESC")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, sort_order=-1)
    channel_id: Mapped[UUID]
    contact_id: Mapped[UUID]
    status: Mapped[str] = mapped_column(server_default=ConversationStatus.OPEN)
    unread_count: Mapped[int] = mapped_column(server_default=text("0"))
    archived_at: Mapped[datetime | None]
    last_message_at: Mapped[datetime | None]
    window_until: Mapped[datetime | None]

    @staticmethod
    def id_of(channel_id: UUID, contact_id: UUID) -> UUID:
        """The id follows from the pair, so that two workers that open a conversation at once mean the same row."""
        return uuid5(channel_id, contact_id.hex)

    @staticmethod
    def touch(s: Session, given: list[dict[str, Any]]) -> None:
        """Open or bring forward conversations, one row each. `unread_count`: how many *new* incoming messages came."""
        if given:
            s.execute(_TOUCH, given_rows(given))

    @staticmethod
    def windows(s: Session, keys: list[tuple[UUID, UUID]]) -> dict[tuple[UUID, UUID], datetime | None]:
        """Until when `(tenant, conversation)` are open to free-form messages, where there are such; None: unknown."""
        if not keys:
            return {}
        given = [{"tenant_id": tenant_id, "id": id_} for tenant_id, id_ in sorted(set(keys))]
        return {(row.tenant_id, row.id): row.window_until for row in s.execute(_WINDOWS, given_rows(given))}

    @staticmethod
    def was_read(s: Session, tenant_id: UUID, channel_id: UUID, provider_id: str) -> None:
        """The provider was told that this incoming message was read, and with it all that came before it."""
        s.execute(_WAS_READ, {"tenant_id": tenant_id, "channel_id": channel_id, "provider_id": provider_id})


_WAS_READ = text("""
    WITH target AS (
        SELECT conversation_id, provider_at FROM message
        WHERE tenant_id = :tenant_id AND channel_id = :channel_id AND provider_id = :provider_id AND direction = 'in'
    ), seen AS (
        UPDATE message AS m SET status = 'read', read_at = now() FROM target
        WHERE m.tenant_id = :tenant_id AND m.conversation_id = target.conversation_id AND m.direction = 'in'
            AND m.status = 'received' AND m.provider_at <= target.provider_at
        RETURNING m.id
    )
    UPDATE conversation AS c SET unread_count = greatest(0, c.unread_count - (SELECT count(*) FROM seen)::int)
    FROM target WHERE c.tenant_id = :tenant_id AND c.id = target.conversation_id
""")

_WINDOWS = text(f"""
    SELECT c.tenant_id, c.id, c.window_until FROM {rows(tenant_id="uuid", id="uuid")}
    CROSS JOIN LATERAL (
        SELECT * FROM conversation AS c WHERE (c.tenant_id, c.id) = (given.tenant_id, given.id) OFFSET 0
    ) AS c
""")

_TOUCH = text(f"""
    INSERT INTO conversation AS c (tenant_id, id, channel_id, contact_id, last_message_at, window_until, unread_count)
    SELECT * FROM {
    rows(
        tenant_id="uuid",
        id="uuid",
        channel_id="uuid",
        contact_id="uuid",
        last_message_at="timestamptz",
        window_until="timestamptz",
        unread_count="int",
    )
}
    ORDER BY tenant_id, channel_id, contact_id
    ON CONFLICT (tenant_id, channel_id, contact_id) DO UPDATE SET
        last_message_at = greatest(c.last_message_at, excluded.last_message_at),
        window_until = greatest(c.window_until, excluded.window_until),
        unread_count = c.unread_count + excluded.unread_count,
        status = CASE WHEN excluded.unread_count > 0 THEN 'open' ELSE c.status END
""")
