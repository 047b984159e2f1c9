"""Faults made inside the database, by a superuser's trigger: the code under test runs as it is."""

from collections.abc import Callable, Iterator
from uuid import uuid4

import pytest
from psycopg import sql

from tests.factories import superuser

OnStoring = Callable[[str, str], Callable[[], int]]


@pytest.fixture(autouse=True)
def _an_empty_inbox() -> None:
    """What other tests left pending must not be taken in turn with this one's rows."""
    with superuser() as connection:
        connection.execute("DELETE FROM delivery WHERE state = 'pending'")


@pytest.fixture
def on_storing() -> Iterator[OnStoring]:
    """`on_storing(text, fault)` runs the PL/pgSQL `fault` for each message of that text that is about to be stored.

    Returns a function that tells how often that happened; rollbacks do not turn it back. In `fault`, `tries` is that
    number.
    """
    made: list[str] = []

    def install(text: str, fault: str) -> Callable[[], int]:
        name = f"fault_{uuid4().hex}"
        made.append(name)
        parts = {"name": sql.Identifier(name), "text": sql.Literal(text), "seq": sql.Literal(name)}
        with superuser() as connection:
            connection.execute(sql.SQL("CREATE SEQUENCE {name}").format(**parts))
            body = sql.SQL("""
                DECLARE tries bigint;
                BEGIN
                    IF NEW.body #>> '{{text,body}}' = {text} THEN
                        tries := nextval({seq});
                        {fault}
                    END IF;
                    RETURN NEW;
                END
            """).format(**parts, fault=sql.SQL(fault))
            connection.execute(
                sql.SQL("CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS {body}").format(
                    **parts, body=sql.Literal(body.as_string(connection))
                )
            )
            connection.execute(
                sql.SQL("CREATE TRIGGER {name} BEFORE INSERT ON message FOR EACH ROW EXECUTE FUNCTION {name}()").format(
                    **parts
                )
            )

        def tries() -> int:
            with superuser() as connection:
                row = connection.execute(
                    sql.SQL("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {name}").format(**parts)
                ).fetchone()
            assert row is not None
            return int(row[0])

        return tries

    yield install
    with superuser() as connection:
        for name in made:
            connection.execute(sql.SQL("DROP FUNCTION {} CASCADE").format(sql.Identifier(name)))
            connection.execute(sql.SQL("DROP SEQUENCE {}").format(sql.Identifier(name)))
