"""What all tables share: names of constraints, aware datetimes, ids, and which tables belong to a tenant."""

from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import TIMESTAMP, ForeignKeyConstraint, MetaData, Text, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pombal.ids import uuid7


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it as a plain class attribute
        datetime: TIMESTAMP(timezone=True),
        dict[str, Any]: JSONB,
        str: Text,
    }


class Tenanted:
    """A row of one tenant. Its table has ENABLE + FORCE row-level security; a test holds every such table to it."""

    # First in every table, so that it leads every primary key (decision 12).
    tenant_id: Mapped[UUID] = mapped_column(primary_key=True, sort_order=-2)


class Dated:
    created_at: Mapped[datetime] = mapped_column(server_default=func.now(), sort_order=99)


def id_column() -> Mapped[UUID]:
    return mapped_column(primary_key=True, default=uuid7, sort_order=-1)


def belongs_to(table: str, column: str, **options: Any) -> ForeignKeyConstraint:
    """A foreign key to another row of the same tenant: `(tenant_id, column)`, so that tenants cannot mix."""
    return ForeignKeyConstraint(["tenant_id", column], [f"{table}.tenant_id", f"{table}.id"], **options)


def rows(**types: str) -> str:
    """SQL for a set of rows given as one JSON array: `json_to_recordset(CAST(:rows AS json)) AS given (a uuid, …)`."""
    return f"json_to_recordset(CAST(:rows AS json)) AS given ({', '.join(f'{n} {kind}' for n, kind in types.items())})"


def given_rows(given: list[dict[str, Any]]) -> dict[str, str]:
    """The parameter of `rows`, from one dict per row. One text, since an array per column costs a multiple of it."""
    return {"rows": msgspec.json.encode(given).decode()}
