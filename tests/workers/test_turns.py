"""A backlog: sources take turns, and memory is bounded (architecture.md, decision 5)."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from models import Delivery
from pombal import db
from pombal.broker import HardenedBroker
from pombal.ids import uuid7
from tests.factories import Shop, a_shop, a_wamid, all_of, delivery, texts
from workers import broker
from workers.incoming_message import BATCH, incoming_message, ring_waiting

pytestmark = pytest.mark.usefixtures("queues")


def flood(shop: Shop, count: int, *, age: timedelta = timedelta(minutes=1)) -> list[UUID]:
    """Deliveries that have waited for a while; the age is in their ids."""
    born = int((datetime.now(UTC) - age).timestamp() * 1000)
    ids = [UUID(int=(born + n) << 80 | uuid7().int & ((1 << 80) - 1)) for n in range(count)]
    with db.session() as s:
        for id_ in ids:
            s.add(Delivery(id=id_, provider="meta", app_id=shop.app.id, raw=texts(shop, a_wamid())))
    return ids


def test_a_late_job_takes_all_sources_in_turn_so_that_a_flood_does_not_hold_up_the_rest() -> None:
    noisy, quiet = a_shop(), a_shop()
    flooding = flood(noisy, 2 * BATCH)
    waiting = flood(quiet, 1, age=timedelta(seconds=30))  # came after the flood, its own job is far behind

    incoming_message([str(id_) for id_ in flooding[:BATCH]])

    assert delivery(waiting[0]).state == "done"
    incoming_message([str(id_) for id_ in flooding[BATCH:]])
    incoming_message([str(waiting[0])])
    incoming_message([str(id_) for id_ in flooding[:BATCH]])
    with db.session() as s:
        left = all_of(s, "SELECT state FROM delivery WHERE app_id = :app AND state <> 'done'", app=noisy.app.id)
    assert left == []


def test_a_job_in_time_takes_its_own_rows_alone() -> None:
    shop = a_shop()
    old = flood(shop, 1)
    fresh = flood(shop, 2, age=timedelta(0))

    incoming_message([str(id_) for id_ in fresh])

    assert delivery(old[0]).state == "pending"
    assert [delivery(id_).state for id_ in fresh] == ["done", "done"]


def test_the_sweep_rings_for_sources_in_turn() -> None:
    noisy, quiet = a_shop(), a_shop()
    flood(noisy, 30)
    mine = flood(quiet, 1)

    with db.session() as s:
        picked = Delivery.to_ring(s, 2_000, at_once=True)

    of_noisy = [id_ for id_, _ in picked if id_ not in mine]
    assert mine[0] in [id_ for id_, _ in picked]
    assert [id_ for id_, _ in picked].index(mine[0]) < len(of_noisy) - 20


def test_a_job_takes_no_more_bytes_than_it_may_and_leaves_the_rest_to_another() -> None:
    shop = a_shop()
    ids = flood(shop, 5, age=timedelta(0))
    size = len(texts(shop, a_wamid()))

    with db.session() as s:
        claimed = Delivery.claim(s, ids, uuid7(), most_bytes=2 * size)

    assert [row["id"] for row in claimed] == sorted(ids)[:2]


def test_a_backlog_is_rung_for_once_and_not_again_for_a_while() -> None:
    shop = a_shop()
    ids = flood(shop, 3)
    with db.session() as s:
        Delivery.retry(s, ids)  # due now, no grace for the web tier's own bell

    ring_waiting()
    with db.session() as s:
        again = [id_ for id_, _ in Delivery.to_ring(s, 2_000) if id_ in ids]

    assert again == []


def test_the_sweep_adds_no_jobs_while_enough_wait_that_nobody_takes() -> None:
    assert isinstance(broker, HardenedBroker)
    shop = a_shop()
    ids = flood(shop, 3)
    with db.session() as s:
        Delivery.retry(s, ids)
    broker.client.rpush("dramatiq:incoming_message", *range(1_001))

    assert ring_waiting() == 0
    assert ring_waiting(at_once=True) == 3  # Redis lost its queues: what waits there is no bell of ours
