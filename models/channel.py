"""One number on one provider, and the routes by which a webhook finds it."""

from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Select,
    Text,
    UniqueConstraint,
    Uuid,
    and_,
    cast,
    func,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, Dated, Tenanted, id_column
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

    @classmethod
    def among(cls, wanted: set[tuple[UUID, str, str]]) -> Select["Route"]:
        """The routes for `(app, kind, value)` triples. In arrays: a body may name more than a statement takes values."""
        apps, kinds, values = (list(column) for column in zip(*sorted(wanted), strict=True))
        given = func.unnest(cast(apps, ARRAY(Uuid)), cast(kinds, ARRAY(Text)), cast(values, ARRAY(Text)))
        key = given.table_valued("app_id", "kind", "value").render_derived()
        same = and_(cls.app_id == key.c.app_id, cls.kind == key.c.kind, cls.value == key.c.value)
        return select(cls).join(key, same)
