"""One bad body among many good ones: the others are not held up, and what is given up is kept for an operator."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from dramatiq import Worker

from pombal.broker import HardenedBroker
from pombal.middleware import GivenUp
from sandbox import meta
from tests.factories import a_shop, body_of, delivery, rows, superuser, texts
from tests.workers.conftest import OnStoring
from tests.workers.tools import deliveries, letters, message, messages, run, states, until
from workers import broker, incoming_message

POISON = "makes the database refuse"
REFUSE = "RAISE EXCEPTION 'refused';"
TRIES = 4  # the first, and `max_retries` more

pytestmark = pytest.mark.usefixtures("queues")


def test_a_body_that_the_database_refuses_leaves_its_199_neighbours_alone(on_storing: OnStoring) -> None:
    shop = a_shop()
    tries = on_storing(POISON, REFUSE)
    ids = deliveries(shop, [texts(shop, f"wamid.{n}", body=POISON if n == 77 else "oi") for n in range(200)])

    run(ids)

    assert len(messages(shop)) == 199
    assert [id_ for id_, state in states(ids).items() if state != "done"] == [ids[77]]
    (conversation,) = rows(shop, "SELECT unread_count FROM conversation")
    assert conversation["unread_count"] == 199
    left = delivery(ids[77])
    assert (left.state, left.failures, left.claim_token) == ("pending", 0, None)
    assert tries() < 20  # halved, not tried one by one
    assert enqueued() == [[[str(ids[77])]]]


def test_a_body_that_failed_in_one_batch_spoils_no_other_while_it_waits_for_its_own_job(on_storing: OnStoring) -> None:
    shop = a_shop()
    tries = on_storing(POISON, REFUSE)
    [poison, *others] = deliveries(shop, [texts(shop, f"wamid.{n}", body=POISON if n == 0 else "oi") for n in range(3)])
    run([poison, *others])
    before = tries()

    more = deliveries(shop, [texts(shop, f"wamid.more{n}") for n in range(3)])
    run([poison, *more])

    assert tries() == before
    assert set(states(more).values()) == {"done"}


def test_a_body_that_the_database_refuses_is_tried_four_times_and_then_dead(on_storing: OnStoring) -> None:
    shop = a_shop()
    tries = on_storing(POISON, REFUSE)
    [id_] = deliveries(shop, [texts(shop, "wamid.1", body=POISON)])

    for failures in range(1, TRIES):
        with pytest.raises(Exception, match="refused"):
            run([id_])
        assert (delivery(id_).state, delivery(id_).failures) == ("pending", failures)
    with pytest.raises(GivenUp):
        run([id_])
    run([id_])

    given_up = delivery(id_)
    assert (given_up.state, given_up.failures, tries()) == ("dead", TRIES, TRIES)
    assert given_up.finished_at is not None
    (letter,) = letters(id_)
    assert (letter["tenant_id"], letter["state"], letter["failures"]) == (shop.tenant.id, "open", TRIES)
    assert letter["args"] == {"args": [[str(id_)]], "kwargs": {}}
    assert POISON not in letter["error"] + letter["traceback"]
    assert messages(shop) == []


def test_several_bad_bodies_in_one_batch_are_all_found(on_storing: OnStoring) -> None:
    shop = a_shop()
    on_storing(POISON, REFUSE)
    bad = {0, 1, 30, 31, 59}
    ids = deliveries(shop, [texts(shop, f"wamid.{n}", body=POISON if n in bad else "oi") for n in range(60)])

    run(ids)

    assert len(messages(shop)) == 60 - len(bad)
    assert {ids.index(id_) for id_, state in states(ids).items() if state == "pending"} == bad
    assert sorted(enqueued()) == sorted([[str(ids[n])]] for n in bad)


def test_a_body_is_processed_once_the_database_takes_it(on_storing: OnStoring) -> None:
    shop = a_shop()
    on_storing(POISON, "IF tries <= 2 THEN RAISE EXCEPTION 'refused'; END IF;")
    [id_] = deliveries(shop, [texts(shop, "wamid.1", body=POISON)])

    for _ in range(2):
        with pytest.raises(Exception, match="refused"):
            run([id_])
    run([id_])

    assert delivery(id_).state == "done"
    assert len(messages(shop)) == 1
    assert letters(id_) == []


def test_a_deadlock_is_run_again_and_counts_for_nobody(on_storing: OnStoring) -> None:
    shop = a_shop()
    tries = on_storing(POISON, "IF tries <= 2 THEN RAISE EXCEPTION USING ERRCODE = 'deadlock_detected'; END IF;")
    ids = deliveries(shop, [texts(shop, "wamid.1", body=POISON), texts(shop, "wamid.2")])

    run(ids)

    assert set(states(ids).values()) == {"done"}
    assert tries() == 3
    assert [delivery(id_).failures for id_ in ids] == [0, 0]
    assert len(rows(shop, "SELECT FROM event")) == len(messages(shop)) == 2


def test_the_queue_tries_a_poison_body_and_buries_it_while_its_neighbours_go_on(
    worker: Worker, on_storing: OnStoring
) -> None:
    shop = a_shop()
    tries = on_storing(POISON, REFUSE)
    ids = deliveries(shop, [texts(shop, f"wamid.{n}", body=POISON if n == 77 else "oi") for n in range(200)])

    incoming_message.send([str(id_) for id_ in ids])
    until(lambda: list(states(ids).values()).count("done") == 199, "the neighbours")
    among_others = tries()
    until(lambda: delivery(ids[77]).state == "dead", "the verdict")

    assert tries() - among_others <= TRIES
    assert delivery(ids[77]).failures == TRIES
    assert len(messages(shop)) == 199
    buried = until(lambda: enqueued("incoming_message.XQ"), "the dead-letter queue")
    assert buried == [[[str(ids[77])]]]
    (letter,) = letters(ids[77])
    assert (letter["failures"], letter["count"]) == (TRIES, 1)


# -- bad elements ----------------------------------------------------------------------------------------------------


def test_a_bad_element_is_a_dead_letter_by_its_path_and_the_rest_is_processed() -> None:
    shop = a_shop()
    good = [meta.text_message(f"wamid.{n}", "5511984440001", "oi", 1_788_000_000) for n in range(3)]
    bad = {key: value for key, value in good[1].items() if key != "id"}
    [id_] = deliveries(shop, [body_of(shop, {"messages": [good[0], bad, good[2]]})])

    run([id_])

    assert [m["provider_id"] for m in messages(shop)] == ["wamid.0", "wamid.2"]
    (letter,) = letters(id_)
    assert letter["path"] == "$.entry[0].changes[0].value.messages[1]"
    assert (letter["tenant_id"], letter["error"], letter["state"]) == (shop.tenant.id, "no id", "open")
    assert delivery(id_).state == "done"
    assert "1 rejected" in (delivery(id_).reason or "")


@pytest.mark.parametrize(
    "raw", [b"not JSON", b"\xff\xfe{}", b"[1]", b"7", b'{"object":"whatsapp_business_account"}', b"[" * 100_000, b""]
)
def test_a_body_that_says_nothing_is_dead_with_a_reason_and_not_retried(raw: bytes) -> None:
    shop = a_shop()
    ids = deliveries(shop, [raw, texts(shop, "wamid.1")])

    run(ids)

    dead = delivery(ids[0])
    assert (dead.state, dead.raw, dead.failures) == ("dead", raw, 0)
    (letter,) = letters(*ids)
    assert (letter["delivery_id"], letter["path"], letter["error"]) == (ids[0], None, dead.reason)
    assert len(messages(shop)) == 1
    assert enqueued() == []


def test_a_webhook_of_another_product_is_ignored() -> None:
    shop = a_shop()
    [id_] = deliveries(shop, [b'{"object":"page","entry":[]}'])

    run([id_])

    assert delivery(id_).state == "ignored"
    assert letters(id_) == []


def test_a_body_of_a_provider_that_nobody_knows_is_poison_of_its_own() -> None:
    shop = a_shop()
    ids = deliveries(shop, [texts(shop, "wamid.1"), texts(shop, "wamid.2")])
    with superuser() as connection:
        connection.execute("UPDATE delivery SET provider = 'pigeon' WHERE id = %s", [ids[0]])

    run(ids)

    assert list(states(ids).values()).count("done") == len(messages(shop)) == 1
    with pytest.raises(KeyError):
        run(ids[:1])


def test_text_that_the_database_cannot_store_is_stored_without_it() -> None:
    shop = a_shop()
    raw = texts(shop, "wamid.1", body="a@b").replace(b"a@b", rb"a\u0000\ud800b")

    run(deliveries(shop, [raw]))

    assert message(shop, "wamid.1")["body"] == {"text": {"body": "a\ufffd\ufffdb"}}


def test_a_body_with_more_numbers_than_a_statement_has_parameters_keeps_nobody_waiting() -> None:
    shop = a_shop()
    changes = [
        {
            "field": "messages",
            "value": {"metadata": {"phone_number_id": str(n)}, "statuses": [{"id": "a", "status": "b"}]},
        }
        for n in range(22_000)
    ]
    flood = msgspec.json.encode({"object": "whatsapp_business_account", "entry": [{"id": "1", "changes": changes}]})
    ids = deliveries(shop, [flood, texts(shop, "wamid.1")])

    run(ids)

    assert len(messages(shop)) == 1
    assert [delivery(id_).state for id_ in ids] == ["dead", "done"]


def test_a_body_of_nothing_but_bad_elements_makes_few_dead_letters() -> None:
    shop = a_shop()
    flood = msgspec.json.encode({"object": "whatsapp_business_account", "entry": list(range(100_000))})
    ids = deliveries(shop, [flood, texts(shop, "wamid.1")])

    run(ids)

    assert len(messages(shop)) == 1
    assert [delivery(id_).state for id_ in ids] == ["dead", "done"]
    assert "100000 rejected" in (delivery(ids[0]).reason or "")
    assert 0 < len(letters(ids[0])) <= 100


# -- helpers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A worker of Dramatiq's in this process, on the real broker."""
    worker = Worker(broker, queues={"incoming_message"}, worker_threads=2, worker_timeout=100)
    worker.start()
    yield worker
    worker.stop()


def enqueued(queue: str = "incoming_message") -> list[Any]:
    """The arguments of the jobs that wait in a queue."""
    assert isinstance(broker, HardenedBroker)
    bodies: Any = broker.client.hvals(f"{broker.namespace}:{queue}.msgs")
    return [msgspec.json.decode(body)["args"] for body in bodies]
