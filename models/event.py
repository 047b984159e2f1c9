"""Append-only, versioned: what happened, for whoever listens. Partitioned by day on its id."""

from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import ForeignKeyConstraint, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Dated, Tenanted, given_rows, id_column, rows
from pombal.ids import uuid7


class Event(Tenanted, Dated, Base):
    __tablename__ = "event"
    __table_args__ = {"postgresql_partition_by": "RANGE (id)"}  # noqa: RUF012 - SQLAlchemy's declarative form

    id: Mapped[UUID] = id_column()
    type: Mapped[str]  # `message_received`, `message_status`, …; Meta's name of a notice; `gateway_` and a gateway's
    version: Mapped[str] = mapped_column(server_default=text("'v1'"))
    channel_id: Mapped[UUID | None]
    message_id: Mapped[UUID | None]
    payload: Mapped[dict[str, Any]]

    @staticmethod
    def row(
        kind: str, tenant_id: UUID, channel_id: UUID | None, message_id: UUID | None, payload: dict[str, Any]
    ) -> dict[str, Any]:
        """One row for `append`."""
        return {
            "tenant_id": tenant_id,
            "id": uuid7(),
            "type": kind,
            "channel_id": channel_id,
            "message_id": message_id,
            "payload": msgspec.json.encode(payload).decode(),
        }

    @staticmethod
    def append(s: Session, given: list[dict[str, Any]]) -> None:
        """Append events; `payload` is JSON text."""
        if given:
            s.execute(_APPEND, given_rows(given))


class Seen(Tenanted, Dated, Base):
    """The digests of notices already recorded: they carry no id of their own, and providers repeat them."""

    __tablename__ = "seen"
    __table_args__ = (ForeignKeyConstraint(["tenant_id"], ["tenant.id"], ondelete="CASCADE"),)

    digest: Mapped[bytes] = mapped_column(primary_key=True)

    @staticmethod
    def first_time(s: Session, given: set[tuple[UUID, bytes]]) -> set[tuple[UUID, bytes]]:
        """Note `(tenant, digest)` pairs; returns those that nobody had noted before."""
        if not given:
            return set()
        pairs = [{"tenant_id": tenant_id, "digest": digest.hex()} for tenant_id, digest in given]
        new = s.execute(_FIRST_TIME, given_rows(pairs))
        return {(row.tenant_id, bytes(row.digest)) for row in new}


_APPEND = text(f"""
    INSERT INTO event (tenant_id, id, type, channel_id, message_id, payload)
    SELECT tenant_id, id, type, channel_id, message_id, payload::jsonb FROM {
    rows(tenant_id="uuid", id="uuid", type="text", channel_id="uuid", message_id="uuid", payload="text")
}
""")

_FIRST_TIME = text(f"""
    INSERT INTO seen (tenant_id, digest)
    SELECT tenant_id, decode(digest, 'hex') FROM {rows(tenant_id="uuid", digest="text")}
    ORDER BY tenant_id, digest
    ON CONFLICT DO NOTHING RETURNING tenant_id, digest
""")
