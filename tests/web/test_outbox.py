"""Group commit of messages, in this process: who is queued with whom, and whom one bad request hurts (nobody)."""

import asyncio
import contextlib
import itertools
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID

import pytest
from sqlalchemy import text

from models import Channel
from models.contact import Meeting
from pombal import db
from pombal.broker import redis_client
from pombal.errors import Unreachable
from pombal.supervisor import until
from tests.factories import Shop, a_shop, a_tenant, rows, seen_by, superuser
from web.errors import Failure
from web.outbox import Outbox, Queued
from web.shapes import Ask, asked

MiB = 1024 * 1024
T = TypeVar("T")
_people = itertools.count(90_000_000)


@pytest.fixture(autouse=True)
def _own_queues(queues: None) -> None:
    """What rings here is nobody else's."""


def with_outbox(do: Callable[[Outbox], Awaitable[T]]) -> T:
    """What `do` returns, between an outbox's start and its stop."""

    async def main() -> T:
        outbox = Outbox()
        outbox.start()
        try:
            return await do(outbox)
        finally:
            await outbox.stop()

    return asyncio.run(main())


def a_number() -> str:
    """Somebody new."""
    return f"+55119{next(_people)}"


def ask(shop: Shop | None = None, **given: Any) -> Ask:
    request = {"to": a_number(), "type": "text", "text": "Olá"} | given
    if shop is not None:
        request["channel"] = str(shop.channel.id)
    return asked(json.dumps(request).encode())


def queueing(
    outbox: Outbox, shop: Shop, one: Ask | None = None, key: str | None = None, size: int = 100
) -> "asyncio.Task[Queued]":
    return asyncio.create_task(outbox.queue(shop.tenant.id, one or ask(shop), key, "a-request", size))


def queued(shop: Shop, *asks: Ask, keys: tuple[str | None, ...] = ()) -> list[Queued | BaseException]:
    """The answers to requests that come at once."""
    both = itertools.zip_longest(asks, keys)

    async def all_(outbox: Outbox) -> list[Queued | BaseException]:
        tasks = [queueing(outbox, shop, one, key) for one, key in both]
        return await asyncio.gather(*tasks, return_exceptions=True)

    return with_outbox(all_)


def commits(shop: Shop) -> dict[int, int]:
    """The transactions that wrote a tenant's messages, in their order, and how many each wrote."""
    query = "SELECT xmin::text::bigint, count(*) FROM message WHERE tenant_id = %s GROUP BY 1 ORDER BY 1"
    with superuser() as connection:
        return dict(connection.execute(query, [shop.tenant.id]).fetchall())


def messages(shop: Shop) -> list[dict[str, Any]]:
    return rows(shop, "SELECT * FROM message WHERE tenant_id = :tenant ORDER BY id")


@contextlib.contextmanager
def locked(table: str) -> Iterator[Callable[[], None]]:
    """Nobody writes to a table until the block ends, or what it is given is called."""
    with superuser() as connection:
        connection.execute("BEGIN")
        connection.execute(f"LOCK TABLE {table} IN SHARE MODE")

        def release() -> None:
            connection.execute("COMMIT")

        yield release


@contextlib.contextmanager
def locked_rows(table: str, *shops: Shop) -> Iterator[None]:
    """Nobody changes the one row that each of these shops' channels has there, until the block ends."""
    with superuser() as connection:
        connection.execute("BEGIN")
        ids = [shop.channel.id for shop in shops]
        found = connection.execute(f"SELECT FROM {table} WHERE channel_id = ANY(%s) FOR UPDATE", [ids])
        assert found.rowcount == len(ids)
        yield
        connection.execute("COMMIT")


def is_waiting_for_a_lock() -> bool:
    with superuser() as connection:
        found = connection.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()
        return bool(found and found[0])


async def seen(condition: Callable[[], bool]) -> None:
    assert await asyncio.to_thread(until, condition, time.monotonic() + 10)


# ------------------------------------------------------------------------------------------------------------- together


def test_messages_that_come_together_are_committed_together_but_not_without_limit() -> None:
    shop = a_shop()

    async def many(outbox: Outbox) -> list[Queued]:
        return await asyncio.gather(*(queueing(outbox, shop) for _ in range(450)))

    answers = with_outbox(many)

    assert len({answer.id for answer in answers}) == 450
    assert sum(commits(shop).values()) == 450
    assert 3 <= len(commits(shop)) <= 6
    assert max(commits(shop).values()) <= 200


def test_large_requests_share_a_commit_up_to_a_megabyte() -> None:
    shop = a_shop()

    async def many(outbox: Outbox) -> None:
        await asyncio.gather(*(queueing(outbox, shop, size=400 * 1024) for _ in range(9)))

    with_outbox(many)

    assert max(commits(shop).values()) <= 3


def test_a_flood_of_one_tenant_does_not_hold_up_another() -> None:
    flood, quiet = a_shop(), a_shop()

    async def both(outbox: Outbox) -> None:
        flooding = [queueing(outbox, flood) for _ in range(800)]
        await asyncio.sleep(0)  # they are all in before the other comes
        await queueing(outbox, quiet)
        await asyncio.gather(*flooding)

    with_outbox(both)

    (other,) = commits(quiet)
    assert len([commit for commit in commits(flood) if commit < other]) <= 1


def test_stopping_commits_what_waits() -> None:
    shop = a_shop()

    async def main() -> list[Queued]:
        outbox = Outbox()
        outbox.start()
        waiting = [queueing(outbox, shop) for _ in range(300)]
        await asyncio.sleep(0)
        await outbox.stop()
        return await asyncio.gather(*waiting)

    assert len(asyncio.run(main())) == 300
    assert sum(commits(shop).values()) == 300


def test_what_is_written_together_is_all_there() -> None:
    """Message, contact, conversation, lane and event of each, the rows that others read."""
    shop = a_shop()
    to = a_number()

    (one, two) = queued(shop, ask(shop, to=to), ask(shop, to=to))

    assert isinstance(one, Queued)
    assert isinstance(two, Queued)
    assert (one.status, one.channel_id, one.provider, one.is_due) == ("queued", shop.channel.id, "meta", True)
    assert {row["id"] for row in messages(shop)} == {one.id, two.id}
    for row in messages(shop):
        assert (row["direction"], row["status"], row["type"], row["recipient"]) == ("out", "queued", "text", to)
        assert row["body"] == {"text": {"body": "Olá"}}
        assert row["request_id"] == "a-request"
        assert row["due_at"] == row["turn_at"] == row["created_at"]
    identities = rows(shop, "SELECT kind, value FROM contact_identity WHERE tenant_id = :tenant ORDER BY value")
    assert ("phone", to[1:]) in {(row["kind"], row["value"]) for row in identities}
    (conversation,) = rows(shop, "SELECT * FROM conversation WHERE tenant_id = :tenant")
    assert conversation["unread_count"] == 0
    assert conversation["last_message_at"] is not None
    assert conversation["window_until"] is None
    (lane,) = rows(shop, "SELECT * FROM lane WHERE tenant_id = :tenant")
    assert lane["next_due_at"] == messages(shop)[0]["due_at"]
    events = rows(shop, "SELECT type, message_id, payload FROM event WHERE tenant_id = :tenant ORDER BY id")
    assert [event["type"] for event in events] == ["message_status"] * 2
    assert {event["message_id"] for event in events} == {one.id, two.id}
    assert events[0]["payload"] == {"message_id": str(events[0]["message_id"]), "status": "queued", "type": "text"}


def test_somebody_who_wrote_before_is_the_same_contact_with_or_without_the_ninth_digit() -> None:
    shop = a_shop()
    to = a_number()
    with seen_by(shop) as s:
        people = Meeting()
        who = (("phone", to[1:5] + to[6:]),)
        people.meet(shop.tenant.id, shop.channel.id, who, (), "Bia", datetime.now(UTC))
        people.settle(s)
        known = people.whom(shop.tenant.id, shop.channel.id, who)

    queued(shop, ask(shop, to=to), ask(shop, to="BR.A1b2C3"))

    assert [row["contact_id"] == known for row in messages(shop)] == [True, False]


# --------------------------------------------------------------------------------------------------------- each its own


def test_one_bad_request_costs_its_neighbours_nothing() -> None:
    shop, foreign = a_shop(), a_shop()

    answers = queued(
        shop,
        ask(shop),
        ask(foreign),
        ask(shop, reply_to="wamid.unknown"),
        ask(shop),
    )

    assert [isinstance(answer, Queued) for answer in answers] == [True, False, False, True]
    assert [answer.status for answer in answers if isinstance(answer, Failure)] == [404, 422]
    assert len(messages(shop)) == 2
    assert messages(foreign) == []


def test_one_that_the_database_refuses_costs_its_neighbours_nothing() -> None:
    shop = a_shop()
    bad = ask(shop)._replace(recipient="+55\x0011")  # text holds no NUL

    answers = queued(shop, *(ask(shop) for _ in range(5)), bad, *(ask(shop) for _ in range(5)))

    assert [isinstance(answer, Queued) for answer in answers] == [True] * 5 + [False] + [True] * 5
    assert isinstance(answers[5], Failure)
    assert answers[5].status == 500
    assert len(messages(shop)) == 10


def test_one_key_is_one_message_however_many_come_at_once() -> None:
    shop = a_shop()
    one = ask(shop)

    answers = queued(shop, *[one] * 50, keys=("a-key",) * 50)

    (row,) = messages(shop)
    assert {answer.id for answer in answers if isinstance(answer, Queued)} == {row["id"]}
    assert sum(answer.channel_id is not None for answer in answers if isinstance(answer, Queued)) == 1  # one is new
    assert len(rows(shop, "SELECT 1 FROM event WHERE tenant_id = :tenant")) == 1


def test_one_key_is_one_message_through_several_writers() -> None:
    shop = a_shop()
    one = ask(shop)
    barrier = threading.Barrier(4)
    found: list[Queued | BaseException] = []

    def a_writer() -> None:
        barrier.wait()
        for n in range(20):
            found.extend(queued(shop, *[one] * 3, keys=(f"key-{n}",) * 3))

    threads = [threading.Thread(target=a_writer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 4 * 20 * 3
    assert all(isinstance(answer, Queued) for answer in found), found
    assert len(messages(shop)) == 20
    assert {answer.id for answer in found if isinstance(answer, Queued)} == {row["id"] for row in messages(shop)}


def test_another_request_under_a_key_is_a_conflict_at_once_and_later() -> None:
    shop = a_shop()
    first, other = ask(shop, text="a"), ask(shop, text="b")

    at_once = queued(shop, first, other, keys=("a-key", "a-key"))
    later = queued(shop, other, first, keys=("a-key", "a-key"))

    (row,) = messages(shop)
    answers = [at_once[0], later[1]]
    assert [answer.id for answer in answers if isinstance(answer, Queued)] == [row["id"]] * 2
    conflicts = [answer for answer in (at_once[1], later[0]) if isinstance(answer, Failure)]
    assert [(conflict.status, conflict.code) for conflict in conflicts] == [(409, "CONFLICT")] * 2


def test_a_refused_request_does_not_use_its_key_up() -> None:
    shop = a_shop()

    (refused,) = queued(shop, ask(shop, reply_to="wamid.unknown"), keys=("a-key",))
    (good,) = queued(shop, ask(shop), keys=("a-key",))

    assert isinstance(refused, Failure)
    assert isinstance(good, Queued)


def test_two_tenants_may_use_one_key() -> None:
    shops = [a_shop(), a_shop()]

    async def both(outbox: Outbox) -> list[Queued]:
        return await asyncio.gather(*(queueing(outbox, shop, key="a-key") for shop in shops))

    one, two = with_outbox(both)

    assert one.id != two.id
    assert [len(messages(shop)) for shop in shops] == [1, 1]


def test_writers_that_meet_the_same_people_at_once_all_succeed() -> None:
    """The same contacts, conversations and lanes in any order, from several writers: no deadlock is left over."""
    shop = a_shop()
    second = a_shop(shop.tenant)
    numbers = [a_number() for _ in range(20)]
    found: list[Queued | BaseException] = []

    def a_writer(step: int) -> None:
        for n in range(5):
            asks = [ask((shop, second)[(n + k) % 2], to=to) for k, to in enumerate(numbers[::step])]
            found.extend(queued(shop, *asks))

    threads = [threading.Thread(target=a_writer, args=(step,)) for step in (1, -1, 1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all(isinstance(answer, Queued) for answer in found), [a for a in found if not isinstance(a, Queued)]
    assert len(messages(shop)) == 4 * 5 * 20


# ------------------------------------------------------------------------------------------------------------- channels


def test_a_tenants_only_channel_need_not_be_named() -> None:
    shop = a_shop()

    (answer,) = queued(shop, ask())

    assert isinstance(answer, Queued)
    assert answer.channel_id == shop.channel.id


def test_of_several_channels_one_must_be_named_or_marked() -> None:
    shop = a_shop()
    second = a_shop(shop.tenant)

    (refused,) = queued(shop, ask())
    with seen_by(shop) as s:
        found = s.get_one(Channel, (shop.tenant.id, second.channel.id))
        found.config = {**found.config, "default": True}
    by_default, by_name, by_id = queued(shop, ask(), ask(channel=shop.channel.name), ask(shop))

    assert isinstance(refused, Failure)
    assert (refused.status, refused.details["field"]) == (422, "$.channel")
    assert isinstance(by_default, Queued)
    assert by_default.channel_id == second.channel.id
    for answer in (by_name, by_id):
        assert isinstance(answer, Queued)
        assert answer.channel_id == shop.channel.id


def test_a_tenant_without_channels_is_told_so() -> None:
    shop = a_shop()._replace(tenant=a_tenant())

    (refused,) = queued(shop, ask())

    assert isinstance(refused, Failure)
    assert refused.details["field"] == "$.channel"


@pytest.mark.parametrize("name", ["nothing", "00000000-0000-7000-8000-000000000000", "x" * 200])
def test_a_foreign_channel_looks_like_a_missing_one(name: str) -> None:
    shop, foreign = a_shop(), a_shop()

    missing, by_id, by_name = queued(shop, ask(channel=name), ask(foreign), ask(channel=foreign.channel.name))

    failures = [answer for answer in (missing, by_id, by_name) if isinstance(answer, Failure)]
    assert [(f.status, f.code, f.message, f.details) for f in failures] == [
        (404, "NOT_FOUND", "no such channel", {"field": "$.channel"})
    ] * 3


def test_a_channel_of_another_kind_cannot_send_yet() -> None:
    shop = a_shop()
    with seen_by(shop) as s:
        s.get_one(Channel, (shop.tenant.id, shop.channel.id)).kind = "sip"

    (refused,) = queued(shop, ask())

    assert isinstance(refused, Failure)
    assert (refused.status, refused.details["field"]) == (422, "$.channel")


# --------------------------------------------------------------------------------------------------------------- bells


def rung() -> list[list[str]]:
    """What was enqueued for the lanes, each job's arguments."""
    with contextlib.closing(redis_client()) as client:
        found: Any = client.hvals("dramatiq:outgoing_message.msgs")
        return sorted(json.loads(message)["args"] for message in found)


def test_each_channel_is_rung_once_after_a_commit_and_nobody_for_later() -> None:
    shop = a_shop()
    second, third = a_shop(shop.tenant), a_shop(shop.tenant)
    soon = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600))

    asks = [ask(shop), ask(shop), ask(second), ask(third, not_before=soon)]
    answers = queued(shop, *asks)  # returns when the bell has rung for all

    assert [isinstance(answer, Queued) and answer.is_due for answer in answers] == [True, True, True, False]
    assert rung() == sorted([[str(shop.channel.id)], [str(second.channel.id)]])


def test_a_repeated_request_rings_for_nobody() -> None:
    shop = a_shop()
    one = ask(shop)
    queued(shop, one, keys=("a-key",))
    with contextlib.closing(redis_client()) as client:
        client.flushdb()

    queued(shop, one, keys=("a-key",))

    assert rung() == []


# ----------------------------------------------------------------------------------------------------------- no answer


def test_whoever_was_told_503_is_not_sent_and_costs_the_others_of_the_flush_nothing() -> None:
    """Their transaction has written the rows already, and waits for another table."""
    shop = a_shop()

    async def leave(outbox: Outbox) -> None:
        with locked("event") as release:
            staying = [queueing(outbox, shop, ask(shop, text="stays")) for _ in range(2)]
            leaving = [
                asyncio.create_task(outbox.queue(shop.tenant.id, ask(shop), f"key-{n}", "", 100, patience=0.2))
                for n in range(3)
            ]
            await seen(is_waiting_for_a_lock)
            for task in leaving:
                with pytest.raises(Unreachable):
                    await task
            await asyncio.to_thread(release)
        await asyncio.gather(*staying)

    with_outbox(leave)

    assert [row["body"] for row in messages(shop)] == [{"text": {"body": "stays"}}] * 2
    assert len(commits(shop)) == 1
    events = rows(shop, "SELECT message_id FROM event WHERE tenant_id = :tenant ORDER BY message_id")
    assert [event["message_id"] for event in events] == [row["id"] for row in messages(shop)]


def test_a_twin_who_waits_keeps_the_message_of_one_who_left() -> None:
    shop = a_shop()
    one = ask(shop)

    async def leave(outbox: Outbox) -> Queued:
        with locked("event") as release:
            leaving = asyncio.create_task(outbox.queue(shop.tenant.id, one, "a-key", "", 100, patience=0.2))
            staying = asyncio.create_task(outbox.queue(shop.tenant.id, one, "a-key", "", 100))
            await seen(is_waiting_for_a_lock)
            with pytest.raises(Unreachable):
                await leaving
            await asyncio.to_thread(release)
        return await staying

    answer = with_outbox(leave)

    assert [row["id"] for row in messages(shop)] == [answer.id]


def test_a_lock_that_is_held_ends_the_flush_and_not_the_writer() -> None:
    shop = a_shop()

    async def wait(outbox: Outbox) -> None:
        with locked("lane"), pytest.raises(Unreachable):
            await queueing(outbox, shop)
        await queueing(outbox, shop, ask(shop, text="later"))

    with_outbox(wait)

    assert [row["body"] for row in messages(shop)] == [{"text": {"body": "later"}}]


@pytest.mark.parametrize(("tenants", "held", "table"), [(2, 1, "lane"), (20, 3, "lane"), (20, 3, "conversation")])
def test_rows_that_are_held_cost_the_tenants_of_others_nothing(tenants: int, held: int, table: str) -> None:
    shops = [a_shop() for _ in range(tenants)]
    to = a_number()
    for shop in shops:
        queued(shop, ask(shop, to=to))

    async def all_(outbox: Outbox) -> list[list[Queued | BaseException]]:
        found = []
        for _ in range(3):  # in the next ones it is known already
            tasks = [  # so patient that none ends by itself
                outbox.queue(shop.tenant.id, ask(shop, to=to), None, "", 100, patience=60)
                for shop in shops
                for _ in range(2)
            ]
            found.append(await asyncio.gather(*tasks, return_exceptions=True))
        return found

    async def one_after_the_other(outbox: Outbox) -> list[list[Queued | BaseException]]:
        with locked_rows(table, *shops[-held:]):
            while_held = await all_(outbox)
        return while_held + await all_(outbox)

    answers = with_outbox(one_after_the_other)

    good, bad = [Queued] * 2 * (tenants - held), [Unreachable] * 2 * held
    assert [[type(answer) for answer in flush] for flush in answers] == [good + bad] * 3 + [[Queued] * 2 * tenants] * 3
    assert [len(messages(shop)) for shop in shops] == [13] * (tenants - held) + [7] * held


def test_memory_has_a_limit_for_one_tenant_and_it_is_given_back() -> None:
    greedy, other = a_shop(), a_shop()

    async def fill(outbox: Outbox) -> None:
        with locked("message") as release:
            first = queueing(outbox, greedy)
            await seen(is_waiting_for_a_lock)
            waiting = [queueing(outbox, greedy, size=4 * MiB) for _ in range(8)]
            await asyncio.sleep(0)
            with pytest.raises(Unreachable, match="too many messages"):
                await queueing(outbox, greedy, size=4 * MiB)
            patient = queueing(outbox, other, size=4 * MiB)  # half of the memory is for the others
            await asyncio.sleep(0)
            await asyncio.to_thread(release)
        await asyncio.gather(first, patient, *waiting)
        await queueing(outbox, greedy, size=4 * MiB)

    with_outbox(fill)

    assert len(messages(greedy)) == 10
    assert len(messages(other)) == 1


def test_whoever_left_before_the_flush_is_not_written() -> None:
    shop = a_shop()

    async def leave(outbox: Outbox) -> None:
        leaving = [queueing(outbox, shop) for _ in range(5)]
        await asyncio.sleep(0)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        await queueing(outbox, shop, ask(shop, text="stays"))

    with_outbox(leave)

    assert [row["body"] for row in messages(shop)] == [{"text": {"body": "stays"}}]


def test_a_connection_that_was_cut_costs_nobody_an_answer() -> None:
    shop = a_shop()
    db.engine().dispose()
    with db.session() as s:  # the one connection of this process: the next transaction will be on it
        pid = s.scalar(text("SELECT pg_backend_pid()"))
    with superuser() as connection:
        connection.execute("SELECT pg_terminate_backend(%s)", [pid])

    (answer,) = queued(shop, ask(shop))

    assert isinstance(answer, Queued)
    assert isinstance(answer.id, UUID)
