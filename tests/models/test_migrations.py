"""From an empty database to the tables the models describe, and back to nothing."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def empty() -> Iterator[dict[str, str]]:
    """A new database on the same server, with the rights that a host gives the two roles; its addresses."""
    name = f"fresh_{uuid4().hex}"
    superuser = os.environ["POMBAL_TEST_SUPERUSER_URL"]
    with psycopg.connect(superuser, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} OWNER pombal_owner").format(sql.Identifier(name)))
    urls = {
        variable: os.environ[variable].replace("/pombal?", f"/{name}?")
        for variable in ("DATABASE_URL", "DATABASE_OWNER_URL", "POMBAL_TEST_SUPERUSER_URL")
    }
    with psycopg.connect(urls["POMBAL_TEST_SUPERUSER_URL"], autocommit=True) as connection:
        connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        connection.execute("GRANT USAGE, CREATE ON SCHEMA public TO pombal_owner")
    yield urls
    with psycopg.connect(superuser, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def test_an_empty_database_is_migrated_checked_and_emptied_again(empty: dict[str, str]) -> None:
    alembic(empty, "upgrade", "head")
    first = relations(empty)

    assert "No new upgrade operations detected" in alembic(empty, "check")
    assert {"message", "delivery", "event_default"} <= first
    alembic(empty, "upgrade", "head")
    assert relations(empty) == first

    alembic(empty, "downgrade", "base")
    assert relations(empty) == {"alembic_version", "alembic_version_pkc"}
    assert functions(empty) == set()

    alembic(empty, "upgrade", "head")
    assert relations(empty) == first


def test_the_app_may_use_the_tables_and_not_their_partitions(empty: dict[str, str]) -> None:
    alembic(empty, "upgrade", "head")

    with psycopg.connect(empty["DATABASE_URL"], autocommit=True) as connection:
        for table in ("message", "delivery", "event", "alembic_version"):
            connection.execute(sql.SQL("SELECT FROM {}").format(sql.Identifier(table)))
        connection.execute("SELECT make_partitions(1)")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT FROM event_default")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("UPDATE alembic_version SET version_num = 'x'")


def alembic(urls: dict[str, str], *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "alembic", *words], cwd=ROOT, env={**os.environ, **urls}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def relations(urls: dict[str, str]) -> set[str]:
    return _names(urls, "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace")


def functions(urls: dict[str, str]) -> set[str]:
    return _names(urls, "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace")


def _names(urls: dict[str, str], query: str) -> set[str]:
    with psycopg.connect(urls["POMBAL_TEST_SUPERUSER_URL"]) as connection:
        return {row[0] for row in connection.execute(query.encode())}
