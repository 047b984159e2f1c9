"""The proof that a gateway's webhooks carry: a random token in their URL, since they are not signed (megaapi.md,
"Webhooks"; security-reliability.md S6).

It picks the channel, so it is looked up before any tenant is known: the table has no tenant policy, holds the token's
hash alone, and is never served. A channel may have two for a while, so that its URL can be changed without a gap.
"""

import hashlib
import secrets
from collections.abc import Iterable
from uuid import UUID

from sqlalchemy import ForeignKeyConstraint, Row, Select, delete, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Dated

_BYTES = 32


class WebhookToken(Dated, Base):
    __tablename__ = "webhook_token"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "channel_id"], ["channel.tenant_id", "channel.id"], ondelete="CASCADE"),
    )

    digest: Mapped[bytes] = mapped_column(primary_key=True)  # SHA-256
    tenant_id: Mapped[UUID]
    channel_id: Mapped[UUID] = mapped_column(index=True)
    instance: Mapped[str | None]  # whose events may come with it, by the gateway's key; None: whatever comes

    @staticmethod
    def digest_of(text: str) -> bytes:
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()

    @classmethod
    def make(cls, tenant_id: UUID, channel_id: UUID, instance: str | None) -> tuple["WebhookToken", str]:
        """A new token: its row, and its text, which goes into the channel's sealed secrets and the gateway's URL."""
        text = secrets.token_urlsafe(_BYTES)
        digest = cls.digest_of(text)
        return cls(digest=digest, tenant_id=tenant_id, channel_id=channel_id, instance=instance), text

    @classmethod
    def presented(cls, text: str) -> Select["WebhookToken"]:
        return select(cls).where(cls.digest == cls.digest_of(text))

    @classmethod
    def owners(cls, s: Session, channel_ids: Iterable[UUID]) -> list[Row[tuple[UUID, UUID, str | None]]]:
        """`(channel_id, tenant_id, instance)` of these channels."""
        wanted = cls.channel_id.in_(sorted(set(channel_ids)))
        return list(s.execute(select(cls.channel_id, cls.tenant_id, cls.instance).where(wanted).distinct()))

    @classmethod
    def end_others(cls, s: Session, channel_id: UUID, text: str) -> None:
        """This token is in use now: any other one of the channel is no longer valid."""
        s.execute(delete(cls).where(cls.channel_id == channel_id, cls.digest != cls.digest_of(text)))
