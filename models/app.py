"""A Meta app: the last part of its webhook URL, and the secrets that its webhooks are signed with.

One app may serve many channels, of one tenant or (`tenant_id` NULL) of several. At accept only the app is known, so
the table has no tenant policy; it is never served.
"""

from collections.abc import Iterable
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, Select, select, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Dated, id_column
from pombal.secrets import seal, unseal

DEFAULT_SLUG = "default"  # the app behind `/webhooks/whatsapp` without a slug


class App(Dated, Base):
    __tablename__ = "app"

    id: Mapped[UUID] = id_column()
    tenant_id: Mapped[UUID | None] = mapped_column(ForeignKey("tenant.id", ondelete="CASCADE"))
    slug: Mapped[str] = mapped_column(unique=True)
    sealed: Mapped[bytes]

    @classmethod
    def by_slug(cls, slug: str) -> Select["App"]:
        return select(cls).where(cls.slug == slug)

    @staticmethod
    def tenants_of(s: Session, ids: Iterable[UUID]) -> dict[UUID, UUID]:
        """The tenant of each app that has one."""
        return {row.id: row.tenant_id for row in s.execute(_TENANTS_OF, {"ids": list(ids)})}

    def seal(self, *, app_secrets: list[str], verify_token: str) -> None:
        """Store the secrets. Two app secrets are valid at once while Meta's is being rotated; newest first."""
        self.sealed = seal(self.id, {"app_secrets": app_secrets, "verify_token": verify_token})

    def secrets(self) -> dict[str, Any]:
        """`{"app_secrets": [newest, older?], "verify_token": …}`, decrypted."""
        return unseal(self.id, self.sealed)


_TENANTS_OF = text("SELECT id, tenant_id FROM app WHERE id = ANY(:ids) AND tenant_id IS NOT NULL")
