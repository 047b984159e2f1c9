"""Who works on a row, what becomes of it when that takes too long, and who is suspected when it kills."""

import itertools
from collections.abc import Sequence
from functools import partial
from uuid import UUID, uuid4

import pytest
from psycopg import sql

from models import Delivery
from models.delivery import FATAL_CRASHES
from pombal import db
from pombal.middleware import is_store_trouble
from tests.factories import a_shop, delivery, rows, superuser, texts
from tests.workers.conftest import OnStoring
from tests.workers.tools import deliveries, letters, messages, run, states, together, totals
from workers.incoming_message import process, ring_waiting

MARKED = "stops at the database"
PLENTY = 2**40  # bytes

pytestmark = pytest.mark.usefixtures("queues")


def test_two_claims_never_take_the_same_row() -> None:
    shop = a_shop()
    ids = deliveries(shop, [b"{}"] * 300)

    taken = together(*(partial(claim, ids[n : n + 200]) for n in (0, 50, 100, 0, 100, 50)))

    assert sorted(itertools.chain(*taken)) == sorted(ids)


def test_a_claim_leaves_what_is_done_dead_or_not_due() -> None:
    shop = a_shop()
    ids = deliveries(shop, [b"{}"] * 4)
    for id_, change in zip(
        ids, ("state = 'done'", "state = 'dead'", "next_attempt_at = now() + interval '1 hour'"), strict=False
    ):
        put(change, id_)

    assert claim(ids) == ids[3:]


def test_whoever_lost_the_claim_has_no_effect() -> None:
    shop = a_shop()
    ids = deliveries(shop, [texts(shop, "wamid.1"), texts(shop, "wamid.2")])
    slow, fast = uuid4(), uuid4()
    with db.session() as s:
        claimed = Delivery.claim(s, ids, slow, most_bytes=PLENTY)
    put("claimed_until = now() - interval '1 second'", ids[1])
    with db.session() as s:
        assert Delivery.claim_suspect(s, ids[1], fast)
    before = totals(shop)

    process(claimed, slow)

    assert totals(shop) == before
    assert messages(shop) == []
    assert delivery(ids[1]).claim_token == fast


def test_a_claim_that_ran_out_and_that_nobody_else_took_still_counts() -> None:
    shop = a_shop()
    ids = deliveries(shop, [texts(shop, "wamid.1")])
    token = uuid4()
    with db.session() as s:
        claimed = Delivery.claim(s, ids, token, most_bytes=PLENTY)
    put("claimed_until = now() - interval '1 second'", ids[0])

    process(claimed, token)

    assert delivery(ids[0]).state == "done"
    assert len(messages(shop)) == 1


def test_a_row_whose_claim_ended_without_a_verdict_is_not_claimed_with_others() -> None:
    shop = a_shop()
    ids = deliveries(shop, [texts(shop, f"wamid.{n}") for n in range(3)])
    crash(ids[:1])

    run(ids)

    assert list(states(ids).values()).count("pending") == 1
    assert delivery(ids[0]).state == "pending"
    run(ids[:1])
    assert delivery(ids[0]).state == "done"
    assert len(messages(shop)) == 3


def test_a_row_in_other_hands_is_left_there() -> None:
    shop = a_shop()
    ids = deliveries(shop, [texts(shop, "wamid.1")])
    claim(ids)

    run(ids)

    assert (delivery(ids[0]).state, delivery(ids[0]).attempts) == ("pending", 1)


def test_a_death_among_others_does_not_count_and_three_alone_do() -> None:
    shop = a_shop()
    ids = deliveries(shop, [texts(shop, f"wamid.{n}") for n in range(2)])
    crash(ids)
    for death in range(1, FATAL_CRASHES + 1):
        with db.session() as s:
            row = Delivery.claim_suspect(s, ids[0], uuid4())
        assert row is not None
        assert row["crashes"] == death - 1
        put("claimed_until = now() - interval '1 second'", ids[0])

    run(ids[:1])
    run(ids[1:])

    assert delivery(ids[0]).state == "dead"
    assert delivery(ids[1]).state == "done"
    (letter,) = letters(*ids)
    assert letter["error"] == delivery(ids[0]).reason
    assert [m["provider_id"] for m in messages(shop)] == ["wamid.1"]


def test_an_ordinary_failure_clears_the_suspicion(on_storing: OnStoring) -> None:
    shop = a_shop()
    on_storing(MARKED, "IF tries = 1 THEN RAISE EXCEPTION 'refused'; END IF;")
    [id_] = deliveries(shop, [texts(shop, "wamid.1", body=MARKED)])
    put(f"crashes = {FATAL_CRASHES - 1}", id_)

    with pytest.raises(Exception, match="refused"):
        run([id_])

    assert (delivery(id_).crashes, delivery(id_).claim_token) == (0, None)


@pytest.mark.parametrize(
    "fault",
    [
        "PERFORM pg_terminate_backend(pg_backend_pid());",
        "RAISE EXCEPTION USING ERRCODE = 'disk_full';",
        "RAISE EXCEPTION USING ERRCODE = 'lock_not_available';",
    ],
    ids=["the connection dies", "the disk is full", "a lock is held"],
)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among others"])
def test_trouble_of_the_store_gives_the_claim_back_and_counts_for_nobody(
    on_storing: OnStoring, fault: str, alone: bool
) -> None:
    shop = a_shop()
    on_storing(MARKED, f"IF tries = 1 THEN {fault} END IF;")
    ids = deliveries(
        shop, [texts(shop, f"wamid.{n}", body=MARKED if n == 0 else "oi") for n in range(1 if alone else 5)]
    )

    with pytest.raises(Exception) as caught:  # noqa: PT011 - what kind is asked below
        run(ids)

    assert is_store_trouble(caught.value)
    assert messages(shop) == []
    assert {(d.state, d.failures, d.crashes, d.claim_token) for d in map(delivery, ids)} == {("pending", 0, 0, None)}
    run(ids)
    assert set(states(ids).values()) == {"done"}
    assert len(messages(shop)) == len(ids)
    assert letters(*ids) == []


def test_the_sweep_rings_for_what_waits_and_then_leaves_it_alone_for_a_while() -> None:
    shop = a_shop()
    ids = deliveries(shop, [texts(shop, f"wamid.{n}") for n in range(3)])
    claim(ids[:1])
    crash(ids[1:2])

    assert ring_waiting() == 0  # the web tier is still about to ring
    put("next_ring_at = now()", *ids)
    assert ring_waiting() == 2  # not the claimed one
    assert ring_waiting() == 0
    assert ring_waiting(at_once=True) == 2


def test_a_retried_delivery_begins_with_a_clean_record() -> None:
    shop = a_shop()
    [id_] = deliveries(shop, [texts(shop, "wamid.1")])
    put("state = 'dead', reason = 'because', failures = 4, crashes = 3, finished_at = now()", id_)

    with db.session() as s:
        assert Delivery.retry(s, [id_, uuid4()]) == [id_]
    again = delivery(id_)
    assert (again.state, again.reason, again.failures, again.crashes) == ("pending", None, 0, 0)
    run([id_])

    assert delivery(id_).state == "done"
    assert len(rows(shop, "SELECT FROM message")) == 1


# -- helpers ---------------------------------------------------------------------------------------------------------


def claim(ids: Sequence[UUID]) -> list[UUID]:
    with db.session() as s:
        return [row["id"] for row in Delivery.claim(s, list(ids), uuid4(), most_bytes=PLENTY)]


def crash(ids: Sequence[UUID]) -> None:
    """Leave rows as a process does that died over them, after the end of its claim."""
    with superuser() as connection:
        connection.execute(
            """
            UPDATE delivery SET attempts = 1, claim_token = gen_random_uuid(),
                claimed_until = now() - interval '1 second', claimed_alone = false
            WHERE id = ANY(%s)
            """,
            [list(ids)],
        )


def put(change: str, *ids: UUID) -> None:
    """Set columns of rows, as time or an operator would."""
    with superuser() as connection:
        order = sql.SQL("UPDATE delivery SET {} WHERE id = ANY(%s)").format(sql.SQL(change))
        connection.execute(order, [list(ids)])
