"""One number on one provider, and the routes by which a webhook finds it."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, ForeignKeyConstraint, Index, Row, UniqueConstraint, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Dated, Tenanted, given_rows, id_column, rows
from pombal.secrets import seal, unseal


class ChannelKind(StrEnum):
    META = "meta"


class Channel(Tenanted, Dated, Base):
    __tablename__ = "channel"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id"], ["tenant.id"], ondelete="CASCADE"),
        UniqueConstraint("tenant_id", "name"),
    )

    id: Mapped[UUID] = id_column()
    app_id: Mapped[UUID | None] = mapped_column(ForeignKey("app.id"))
    kind: Mapped[str]
    name: Mapped[str]
    config: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))  # external ids, nothing secret
    sealed: Mapped[bytes | None]

    def seal(self, values: dict[str, Any]) -> None:
        """Store this channel's own secrets (access token, …)."""
        self.sealed = seal(self.id, values)

    def secrets(self) -> dict[str, Any]:
        return unseal(self.id, self.sealed) if self.sealed else {}


class RouteKind(StrEnum):
    NUMBER = "number"  # the provider's id of our number: one channel
    WABA = "waba"  # a WhatsApp Business Account: all its numbers


class Route(Base):
    """Where a change of a webhook belongs: among one app's channels only, by number, else by WABA.

    Read before the tenant is known, so without a tenant policy; it holds ids alone and is never served.
    """

    __tablename__ = "route"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "channel_id"], ["channel.tenant_id", "channel.id"], ondelete="CASCADE"),
        Index("uq_route_number", "app_id", "value", unique=True, postgresql_where=text("kind = 'number'")),
    )

    app_id: Mapped[UUID] = mapped_column(ForeignKey("app.id", ondelete="CASCADE"), primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str] = mapped_column(primary_key=True)
    channel_id: Mapped[UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[UUID]

    @staticmethod
    def among(s: Session, wanted: set[tuple[UUID, str, str]]) -> Sequence[Row[Any]]:
        """The routes of `(app, kind, value)` triples, as rows of this table's columns."""
        if not wanted:
            return []
        given = [{"app_id": app_id, "kind": kind, "value": value} for app_id, kind, value in wanted]
        return s.execute(_AMONG, given_rows(given)).all()


_AMONG = text(f"""
    SELECT app_id, kind, value, channel_id, tenant_id
    FROM {rows(app_id="uuid", kind="text", value="text")} JOIN route USING (app_id, kind, value)
""")
