"""A company. The directory of tenants is the one tenant table without a policy: it says whom a credential is for."""

from uuid import UUID

from sqlalchemy import Select, select
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, Dated, id_column


class Tenant(Dated, Base):
    __tablename__ = "tenant"

    id: Mapped[UUID] = id_column()
    slug: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]

    @classmethod
    def by_slug(cls, slug: str) -> Select["Tenant"]:
        return select(cls).where(cls.slug == slug)
