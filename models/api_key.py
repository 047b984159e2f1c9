"""A key's hash and scopes. The key itself is shown once and never stored.

A key reads `pombal_<tenant id>_<256 random bits>`. The tenant in it only says where to look the hash up, behind that
tenant's row-level security; it proves nothing by itself.
"""

from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import ForeignKeyConstraint, Select, Text, UniqueConstraint, func, or_, select, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Dated, Tenanted, id_column
from pombal.secrets import fingerprint, new_token

SCOPES = ("messages:send", "messages:read", "channels:manage", "sip:manage", "admin")
_PREFIX = "pombal_"


class ApiKey(Tenanted, Dated, Base):
    __tablename__ = "api_key"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id"], ["tenant.id"], ondelete="CASCADE"),
        UniqueConstraint("tenant_id", "hash"),
    )

    id: Mapped[UUID] = id_column()
    name: Mapped[str]
    hash: Mapped[bytes]
    scopes: Mapped[list[str]] = mapped_column(ARRAY(Text))
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]

    @classmethod
    def make(cls, tenant_id: UUID, name: str, scopes: tuple[str, ...] = SCOPES) -> tuple["ApiKey", str]:
        """A new key: the row to store, and the key's text to show once."""
        text = f"{_PREFIX}{tenant_id.hex}_{new_token()}"
        return cls(tenant_id=tenant_id, name=name, hash=fingerprint(text), scopes=list(scopes)), text

    @staticmethod
    def tenant_named_in(text: str) -> UUID | None:
        """The tenant that a key claims to be of; None when it is not shaped like a key of ours."""
        claimed = text.removeprefix(_PREFIX)[:32]
        if not text.startswith(_PREFIX) or len(text) > 200:
            return None
        try:
            return UUID(hex=claimed)
        except ValueError:
            return None

    @classmethod
    def presented(cls, text: str) -> Select["ApiKey"]:
        """The living key with this text. Looked up by its hash, so no comparison leaks where it differs."""
        return select(cls).where(cls.hash == fingerprint(text), cls.revoked_at.is_(None))

    def was_used(self, s: Session) -> None:
        """Remember when, to the minute: one write per request would be too many."""
        key, now = type(self), func.now()
        long_ago = or_(key.last_used_at.is_(None), key.last_used_at < now - timedelta(minutes=1))
        used = update(key).where(key.tenant_id == self.tenant_id, key.id == self.id, long_ago)
        s.execute(used.values(last_used_at=now).execution_options(synchronize_session=False))

    def allows(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes
