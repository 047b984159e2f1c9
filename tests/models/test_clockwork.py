"""Two clocks are as good as one."""

from datetime import timedelta
from functools import partial
from uuid import UUID, uuid4

import pytest

from models import Lease, Tick
from pombal import db
from tests.factories import all_of, superuser
from tests.workers.tools import together

A_MINUTE = timedelta(minutes=1)


@pytest.fixture
def name() -> str:
    return f"test-{uuid4().hex}"


def test_one_of_two_holders_has_the_lease_and_keeps_it(name: str) -> None:
    first, second = uuid4(), uuid4()

    assert take(name, first)
    assert not take(name, second)
    assert take(name, first)
    assert not take(name, second)


def test_one_of_many_who_ask_at_once_gets_the_lease(name: str) -> None:
    assert sorted(together(*(partial(take, name, uuid4()) for _ in range(8)))) == [False] * 7 + [True]


def test_a_lease_that_ran_out_is_anybodys_and_its_old_holder_has_lost_it(name: str) -> None:
    dead, alive = uuid4(), uuid4()
    take(name, dead)
    with superuser() as connection:
        connection.execute("UPDATE lease SET until = now() - interval '1 ms' WHERE name = %s", [name])

    assert take(name, alive)
    assert not take(name, dead)


def test_a_released_lease_is_anybodys_and_only_its_holder_can_release_it(name: str) -> None:
    first, second = uuid4(), uuid4()
    take(name, first)

    with db.session() as s:
        Lease.release(s, name, second)
    assert not take(name, second)
    with db.session() as s:
        Lease.release(s, name, first)

    assert take(name, second)


def test_only_the_holder_reports_a_finished_round(name: str) -> None:
    holder = uuid4()
    take(name, holder)

    for token, is_noted in ((uuid4(), False), (holder, True)):
        with db.session() as s:
            Lease.finished(s, name, token)
        with db.session() as s:
            (lease,) = all_of(s, "SELECT done_at FROM lease WHERE name = :name", name=name)
        assert (lease["done_at"] is not None) == is_noted


def test_a_minute_is_claimed_once_however_many_clocks_tick(name: str) -> None:
    claimed = together(*(partial(tick, name) for _ in range(8)))

    with db.session() as s:
        minutes = all_of(s, "SELECT minute FROM tick WHERE name = :name", name=name)
    assert sum(claimed) == len(minutes)  # 1; or 2, when the minute ended in the middle of it
    assert 1 <= len(minutes) <= 2


def test_the_next_minute_is_free_and_old_ones_are_forgotten(name: str) -> None:
    assert tick(name)
    with superuser() as connection:
        connection.execute("UPDATE tick SET minute = minute - interval '25 hours' WHERE name = %s", [name])

    assert tick(name)

    with db.session() as s:
        assert len(all_of(s, "SELECT FROM tick WHERE name = :name", name=name)) == 1


def take(name: str, token: UUID) -> bool:
    with db.session() as s:
        return Lease.take(s, name, token, A_MINUTE)


def tick(name: str) -> bool:
    with db.session() as s:
        return Tick.claim(s, name)
