"""Group commit, in this process: who waits, for how long, and with how much memory (W13)."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from uuid import UUID

import pytest

from pombal import metrics
from pombal.broker import redis_client
from pombal.errors import Unreachable
from pombal.ids import uuid7
from pombal.settings import settings
from pombal.supervisor import until
from tests.factories import superuser
from web.inbox import Bell, Inbox

MiB = 1024 * 1024
T = TypeVar("T")


def with_inbox(do: Callable[[Inbox], Awaitable[T]], url: str | None = None) -> T:
    """What `do` returns, between an inbox's start and its stop."""

    async def main() -> T:
        inbox = Inbox(url or settings().require_database())
        inbox.start()
        try:
            return await do(inbox)
        finally:
            await inbox.stop()

    return asyncio.run(main())


def accepting(inbox: Inbox, source: UUID, raw: bytes = b"{}") -> "asyncio.Task[UUID]":
    return asyncio.create_task(inbox.accept("meta", raw, "a-request", app_id=source))


def commits(source: UUID) -> dict[int, int]:
    """The transactions that wrote a source's rows, in their order, and how many each wrote."""
    query = "SELECT xmin::text::bigint, count(*) FROM delivery WHERE app_id = %s GROUP BY 1 ORDER BY 1"
    with superuser() as connection:
        return dict(connection.execute(query, [source]).fetchall())


@contextmanager
def a_deaf_server() -> Iterator[str]:
    """The address of a database that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"postgresql://x@127.0.0.1:{listener.getsockname()[1]}/x"


def test_the_id_that_is_returned_is_the_rows() -> None:
    source = uuid7()

    async def one(inbox: Inbox) -> UUID:
        return await inbox.accept("meta", b"\x00raw", "a-request", app_id=source)

    id_ = with_inbox(one)

    with superuser() as connection:
        found = connection.execute("SELECT id, raw, request_id, state FROM delivery WHERE app_id = %s", [source])
        assert found.fetchall() == [(id_, b"\x00raw", "a-request", "pending")]


def test_bodies_that_come_together_are_committed_together_but_not_without_limit() -> None:
    source = uuid7()

    async def many(inbox: Inbox) -> list[UUID]:
        return await asyncio.gather(*(accepting(inbox, source) for _ in range(450)))

    ids = with_inbox(many)

    assert len(set(ids)) == 450
    assert sum(commits(source).values()) == 450
    assert 3 <= len(commits(source)) <= 6
    assert max(commits(source).values()) <= 200


def test_large_bodies_share_a_commit_up_to_a_megabyte() -> None:
    source = uuid7()

    async def many(inbox: Inbox) -> None:
        await asyncio.gather(*(accepting(inbox, source, b"x" * (400 * 1024)) for _ in range(9)))

    with_inbox(many)

    assert max(commits(source).values()) <= 3


def test_a_flood_of_one_source_does_not_hold_up_another() -> None:
    flood, quiet = uuid7(), uuid7()

    async def both(inbox: Inbox) -> None:
        flooding = [accepting(inbox, flood) for _ in range(800)]
        await asyncio.sleep(0)  # they are all in before the other comes
        await accepting(inbox, quiet)
        await asyncio.gather(*flooding)

    with_inbox(both)

    (other,) = commits(quiet)
    assert len([commit for commit in commits(flood) if commit < other]) <= 1


def test_stopping_commits_what_waits() -> None:
    source = uuid7()

    async def main() -> list[UUID]:
        inbox = Inbox(settings().require_database())
        inbox.start()
        waiting = [accepting(inbox, source) for _ in range(500)]
        await asyncio.sleep(0)
        await inbox.stop()
        return await asyncio.gather(*waiting)

    assert len(asyncio.run(main())) == 500
    assert sum(commits(source).values()) == 500


def test_memory_has_a_limit_for_one_source_and_it_is_given_back() -> None:
    greedy, other = uuid7(), uuid7()

    async def fill(inbox: Inbox) -> None:
        waiting = [accepting(inbox, greedy, b"x" * (4 * MiB)) for _ in range(8)]
        await asyncio.sleep(0.05)  # the first is taken to be committed, and makes room
        waiting.append(accepting(inbox, greedy, b"x" * (4 * MiB)))
        await asyncio.sleep(0)
        with pytest.raises(Unreachable, match="too many bodies"):
            await inbox.accept("meta", b"x" * (4 * MiB), "", app_id=greedy)
        patient = accepting(inbox, other)  # half of the memory is for the others
        for refused in [*waiting, patient]:
            with pytest.raises(Unreachable, match=r"takes too long|did not take it"):
                await refused
        end = time.monotonic() + 20
        refusal = "too many bodies"
        while "too many bodies" in refusal:  # until the writer has found out that nobody waits for them any more
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
            again = [accepting(inbox, greedy, b"x" * (4 * MiB)) for _ in range(7)]
            refusal = " ".join(str(answer) for answer in await asyncio.gather(*again, return_exceptions=True))

    with a_deaf_server() as url:
        with_inbox(fill, url)


def test_memory_has_a_limit_for_all_together() -> None:
    async def fill(inbox: Inbox) -> int:
        waiting = [accepting(inbox, uuid7(), b"x" * (4 * MiB)) for _ in range(40)]
        await asyncio.sleep(0.05)
        refused_at_once = sum(task.done() for task in waiting)
        await asyncio.gather(*waiting, return_exceptions=True)
        return refused_at_once

    with a_deaf_server() as url:
        assert with_inbox(fill, url) >= 40 - 17


def test_whoever_stopped_waiting_is_not_written() -> None:
    """Nobody was told 200, and the sender will come again."""
    source, last = uuid7(), uuid7()

    async def leave(inbox: Inbox) -> None:
        leaving = [accepting(inbox, source) for _ in range(5)]
        await asyncio.sleep(0)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        await accepting(inbox, last)

    with_inbox(leave)

    assert commits(source) == {}
    assert sum(commits(last).values()) == 1


def test_an_error_that_nobody_foresaw_does_not_end_the_only_writer() -> None:
    """This address fails in Python's own look-up of names, not as a database error."""

    async def twice(inbox: Inbox) -> None:
        for _ in range(2):
            with pytest.raises(Unreachable, match="did not take it"):
                await inbox.accept("meta", b"{}", "", app_id=uuid7())

    with_inbox(twice, f"postgresql://{'h' * 300}.example/x")


def test_a_body_the_database_refuses_spoils_only_its_own_commit() -> None:
    source: Any = uuid7()

    async def both(inbox: Inbox) -> None:
        with pytest.raises(Unreachable):
            await inbox.accept("meta", b"{}", "a\x00b", app_id=source)  # text holds no NUL
        await inbox.accept("meta", b"{}", "good", app_id=source)

    with_inbox(both)

    assert sum(commits(source).values()) == 1


def lost() -> float:
    return metrics.REGISTRY.get_sample_value("pombal_bells_total", {"outcome": "lost"}) or 0.0


def test_bells_that_cannot_be_rung_do_not_pile_up(queues: None) -> None:
    client = redis_client()
    pid: int = client.info("server")["process_id"]
    before = lost()
    bell = Bell()

    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(3_000):
            bell.ring([uuid7()])
        dropped = lost() - before
    finally:
        os.kill(pid, signal.SIGCONT)
    bell.stop()

    assert 1_500 <= dropped <= 2_999
    assert until(lambda: client.hlen("dramatiq:incoming_message.msgs") != 0, time.monotonic() + 10)
    client.close()
