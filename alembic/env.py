"""Migrations run as the owner, one at a time, and give up rather than queue behind a lock.

`alembic upgrade head` and `pombal migrate` are the same. After an upgrade the app's role, if it is another one than the
owner, is granted the tables that models know and nothing else: partitions are reached through their parent only,
whose policies then apply.
"""

from typing import Any

from alembic import context
from sqlalchemy import Connection, create_engine, pool, text
from sqlalchemy.engine import make_url

import models
from pombal.settings import settings

TABLES = models.Base.metadata


def include_name(name: str | None, kind: str, _: Any) -> bool:
    """Leave the daily partitions of `delivery` and `event` out of `alembic check`."""
    return kind != "table" or name in TABLES.tables or name == "alembic_version" or name not in _partitions


_partitions: set[str] = set()


def grant(connection: Connection) -> None:
    app = make_url(settings().require_database()).username
    if not app or app == connection.scalar(text("SELECT current_user")):
        return
    role = connection.dialect.identifier_preparer.quote(app)
    existing = set(connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")))
    for table in TABLES.sorted_tables:
        if table.name in existing:
            connection.execute(text(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table.name} TO {role}"))
    connection.execute(text(f"GRANT SELECT ON alembic_version TO {role}"))
    connection.execute(text(f"GRANT EXECUTE ON FUNCTION make_partitions(integer) TO {role}"))


def run() -> None:
    engine = create_engine(settings().require_database_owner(), poolclass=pool.NullPool)
    with engine.connect() as connection:
        # Two releases at once: the second waits for the first, but not for ever.
        connection.execute(text("SET lock_timeout = '5s'"))
        connection.execute(text("SET statement_timeout = '300s'"))
        connection.commit()
        _partitions.update(connection.scalars(text("SELECT relname FROM pg_class WHERE relispartition")))
        connection.commit()
        context.configure(
            connection=connection,
            target_metadata=TABLES,
            include_name=include_name,
            compare_server_default=False,
            transaction_per_migration=False,
        )
        with context.begin_transaction():
            connection.execute(text("SELECT pg_advisory_xact_lock(7266225)"))
            context.run_migrations()
            if connection.scalar(text("SELECT to_regproc('make_partitions')")):
                grant(connection)
    engine.dispose()


if context.is_offline_mode():
    raise SystemExit("offline mode is not supported: the grants need the database")
run()
