"""A message template and what the provider thinks of it."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Dated, Tenanted, belongs_to, given_rows, rows


class Template(Tenanted, Dated, Base):
    __tablename__ = "template"
    __table_args__ = (belongs_to("channel", "channel_id", ondelete="CASCADE"),)

    channel_id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    language: Mapped[str] = mapped_column(primary_key=True)
    category: Mapped[str | None]
    status: Mapped[str]
    reason: Mapped[str | None]
    status_at: Mapped[datetime]  # the provider's time of the verdict: an older one never overwrites a newer

    @staticmethod
    def heard(s: Session, given: list[dict[str, Any]]) -> None:
        """Record verdicts, one row per template; the newest by the provider's clock stays."""
        if given:
            s.execute(_HEARD, given_rows(given))

    @staticmethod
    def statuses(s: Session, keys: list[tuple[UUID, UUID, str, str]]) -> dict[tuple[UUID, UUID, str, str], str]:
        """The verdict on each `(tenant, channel, name, language)` that is known."""
        if not keys:
            return {}
        given = [
            dict(zip(("tenant_id", "channel_id", "name", "language"), key, strict=True)) for key in sorted(set(keys))
        ]
        found = s.execute(_STATUSES, given_rows(given))
        return {(row.tenant_id, row.channel_id, row.name, row.language): row.status for row in found}


_STATUSES = text(f"""
    SELECT tenant_id, channel_id, name, language, t.status
    FROM {rows(tenant_id="uuid", channel_id="uuid", name="text", language="text")}
    JOIN template AS t USING (tenant_id, channel_id, name, language)
""")

_HEARD = text(f"""
    INSERT INTO template AS t (tenant_id, channel_id, name, language, category, status, reason, status_at)
    SELECT * FROM {
    rows(
        tenant_id="uuid",
        channel_id="uuid",
        name="text",
        language="text",
        category="text",
        status="text",
        reason="text",
        status_at="timestamptz",
    )
}
    ORDER BY tenant_id, channel_id, name, language
    ON CONFLICT (tenant_id, channel_id, name, language) DO UPDATE SET
        category = coalesce(excluded.category, t.category),
        status = excluded.status, reason = excluded.reason, status_at = excluded.status_at
    WHERE (t.status_at, t.status) < (excluded.status_at, excluded.status)
""")
