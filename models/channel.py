"""One number on one provider, and the routes by which a webhook finds it."""

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, ForeignKeyConstraint, Index, Row, UniqueConstraint, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Dated, Tenanted, given_rows, id_column, rows
from pombal.secrets import seal, unseal


class ChannelKind(StrEnum):
    META = "meta"
    MEGAAPI = "megaapi"
    BAILEYS = "baileys"
    STUB = "stub"  # for development: takes everything, and reaches nobody


class ChannelStatus(StrEnum):
    """What was last proven of a channel's session; `unknown` until something was."""

    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    UNKNOWN = "unknown"


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
    # From here on: how its session stands (`models/standing.py`), of kinds that have one; None for Meta.
    status: Mapped[str | None]
    status_raw: Mapped[str | None]  # the provider's own word, or what stood in its place
    status_at: Mapped[datetime | None]  # when the provider was asked for what we believe now
    status_since: Mapped[datetime | None]  # when it became so, as far as we know
    told_at: Mapped[datetime | None]  # when it last told us something by itself: what was asked before is out of date
    told_first_at: Mapped[datetime | None]  # … the first of those without an answer
    check_at: Mapped[datetime | None]  # when somebody last took it on to ask because of that
    check_until: Mapped[datetime | None]  # … and is at it
    unknown_since: Mapped[datetime | None]  # no poll has been answered since; `status` is what was known before
    unknown_reason: Mapped[str | None]
    silent_since: Mapped[datetime | None]  # connected, and yet nothing came or went
    own_id: Mapped[str | None]  # digits of the number that is logged in

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
