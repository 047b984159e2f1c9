"""Deliveries and events lie in one partition a day, which is there before its day begins."""

from datetime import UTC, date, datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from pombal import db
from pombal.ids import uuid7
from tests.factories import a_delivery, a_shop, superuser, texts
from workers.incoming_message import incoming_message, make_partitions

PARENTS = ("delivery", "event")


def test_making_partitions_again_makes_none() -> None:
    make(7)
    before = partitions()

    assert make(7) == 0
    assert partitions() == before


@pytest.mark.parametrize("parent", PARENTS)
def test_there_is_a_partition_for_yesterday_and_each_of_the_next_seven_days(parent: str) -> None:
    today = datetime.now(UTC).date()
    make(7)

    wanted = {f"{parent}_{today + timedelta(days=n):%Y%m%d}" for n in range(-1, 8)}

    assert wanted <= partitions()
    assert f"{parent}_default" in partitions()


def test_rows_land_in_the_partition_of_their_day() -> None:
    shop = a_shop()
    id_ = a_delivery(shop, texts(shop, "wamid.1"))
    incoming_message([str(id_)])

    with superuser() as connection:
        found = connection.execute(
            """
            SELECT id, tableoid::regclass::text FROM delivery WHERE id = %s
            UNION ALL SELECT id, tableoid::regclass::text FROM event WHERE tenant_id = %s
            """,
            [id_, shop.tenant.id],
        ).fetchall()

    assert len(found) == 2
    for row_id, partition in found:
        assert partition.rpartition("_")[2] == f"{day_of(row_id):%Y%m%d}"


@pytest.mark.parametrize("hours", [-24, 0, 24, 24 * 7])
@pytest.mark.parametrize("edge", ["first", "last"])
def test_the_edges_of_a_day_are_in_its_partition(hours: int, edge: str) -> None:
    day = (datetime.now(UTC) + timedelta(hours=hours)).date()
    make(7)
    midnight = datetime(day.year, day.month, day.day, tzinfo=UTC)
    moment = midnight if edge == "first" else midnight + timedelta(days=1) - timedelta(milliseconds=1)
    id_ = UUID(int=(uuid7().int & (1 << 80) - 1) | int(moment.timestamp() * 1000) << 80)

    with superuser() as connection:
        row = connection.execute(
            "INSERT INTO delivery (id, provider, raw, state) VALUES (%s, 'meta', '', 'ignored')"
            " RETURNING tableoid::regclass::text",
            [id_],
        ).fetchone()

    assert row == (f"delivery_{day:%Y%m%d}",)


def test_a_row_of_an_odd_clock_is_kept_all_the_same() -> None:
    with superuser() as connection, connection.transaction(force_rollback=True):
        row = connection.execute(
            "INSERT INTO delivery (id, provider, raw) VALUES ('00000000-0001-7000-8000-000000000001', 'meta', '')"
            " RETURNING tableoid::regclass::text"
        ).fetchone()

    assert row == ("delivery_default",)


def test_a_delivery_is_found_in_one_partition_by_its_id() -> None:
    with superuser() as connection:
        plan = connection.execute(
            "EXPLAIN UPDATE delivery SET attempts = attempts + 1 WHERE id = ANY(%s::uuid[])", [[uuid7()]]
        ).fetchall()

    assert sum("Update on delivery_" in line for (line,) in plan) == 1


@pytest.mark.parametrize("days", [-1, 61])
def test_nonsense_is_refused(days: int) -> None:
    with pytest.raises(DBAPIError, match="between 0 and 60"):
        make(days)


def make(days: int) -> int:
    """As the app's own role does."""
    with db.session() as s:
        return int(s.scalar(text("SELECT make_partitions(:days)"), {"days": days}) or 0)


def partitions() -> set[str]:
    with superuser() as connection:
        return {row[0] for row in connection.execute("SELECT relname FROM pg_class WHERE relispartition")}


def day_of(id_: UUID) -> date:
    return datetime.fromtimestamp((id_.int >> 80) / 1000, UTC).date()


def test_making_partitions_waits_for_nobody_who_reads_for_long() -> None:
    with superuser() as backup:
        day = backup.execute("SELECT to_char(now() AT TIME ZONE 'UTC' + interval '7 days', 'YYYYMMDD')").fetchone()
        assert day is not None
        backup.execute(f"DROP TABLE event_{day[0]}")
        with backup.transaction():
            backup.execute("SELECT count(*) FROM event")

            make_partitions()  # returns, and leaves it to the next minute

            assert backup.execute("SELECT to_regclass(%s)", [f"event_{day[0]}"]).fetchone() == (None,)

    make_partitions()
    with superuser() as connection:
        assert connection.execute("SELECT to_regclass(%s)::text", [f"event_{day[0]}"]).fetchone() == (
            f"event_{day[0]}",
        )
