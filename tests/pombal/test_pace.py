"""The limits of a number and of a pair, against a real Valkey: by the times that grants name, never by sleeping."""

import contextlib
import itertools
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
import redis

from pombal.pace import HORIZON, PAIR_BURST, PAIR_SECONDS, Pace, client_for_pace

TICK = 3e-6  # seconds; waits are told in whole microseconds
SLACK = 0.05  # … and the clock goes on between two questions


@pytest.fixture
def number() -> str:
    return uuid4().hex


@pytest.fixture
def valkey() -> Iterator[redis.Redis]:
    with redis.Redis.from_url(os.environ["REDIS_URL"]) as client:
        yield client


def a_pace(url: str | None = None) -> Pace:
    """The limits of one process. Redis has all the time it wants: a busy machine is no fault."""
    client = redis.Redis.from_url(url or os.environ["REDIS_URL"])
    return Pace(client)


def nobody_twice(count: int) -> list[str]:
    return [uuid4().hex for _ in range(count)]


def slots(valkey: redis.Redis, *paces: Pace, number: str, rate: float, most: int) -> list[float]:
    """Ask for leave by turns, as fast as it goes, until there are so many slots; their times on Redis's clock."""
    found: list[float] = []
    for pace in itertools.cycle(paces):
        grants = [grant for grant in pace.grants(number, nobody_twice(16), rate) if not grant.full]
        # What is kept of a number is the slot after the last one given.
        after = float(valkey.get(f"pombal:pace:{number}") or b"nan") / 1e6
        found += [after - grants[-1].wait + grant.wait - 1 / rate for grant in grants]
        if len(found) >= most:
            break
    return found


def test_no_window_holds_more_slots_than_the_rate_allows(valkey: redis.Redis, number: str) -> None:
    found = slots(valkey, a_pace(), number=number, rate=200, most=300)

    assert min(later - earlier for earlier, later in itertools.pairwise(found)) >= 1 / 200 - TICK


def test_slots_of_one_question_are_exactly_apart(number: str) -> None:
    grants = a_pace().grants(number, nobody_twice(20), 100)

    assert [grant.full for grant in grants] == [""] * 20
    assert [round(grant.wait - grants[0].wait, 6) for grant in grants] == [n / 100 for n in range(20)]


def test_slots_are_given_only_so_far_ahead(number: str) -> None:
    grants = a_pace().grants(number, nobody_twice(100), 100)

    given = [grant.wait for grant in grants if not grant.full]
    assert len(given) == 1 + HORIZON * 100
    assert max(given) <= HORIZON
    assert {grant.full for grant in grants} == {"", "number"}
    assert all(0 < grant.wait <= 1 / 100 + SLACK for grant in grants if grant.full)


def test_a_burst_to_one_recipient_ends_at_its_limit_and_goes_on_one_by_one() -> None:
    number, whom = uuid4().hex, uuid4().hex

    grants = a_pace().grants(number, [whom] * 60, 10_000)

    assert [grant.full for grant in grants] == [""] * PAIR_BURST + ["pair"] * 15
    assert all(abs(grant.wait - PAIR_SECONDS) < SLACK for grant in grants[PAIR_BURST:])


def test_after_a_burst_a_recipient_has_one_every_six_seconds(valkey: redis.Redis) -> None:
    number, whom = uuid4().hex, uuid4().hex
    pace = a_pace()
    pace.grants(number, [whom] * PAIR_BURST, 10_000)
    key = f"pombal:pace:{number}:{whom}"

    for _ in range(5):
        (refused,) = pace.grants(number, [whom], 10_000)
        assert refused.full == "pair"
        let_pass(valkey, key, refused.wait - 5)
        (early,) = pace.grants(number, [whom], 10_000)
        assert early.full == "pair"
        let_pass(valkey, key, early.wait)
        (granted,) = pace.grants(number, [whom], 10_000)
        assert granted.full == ""


def test_a_burst_is_there_again_after_a_rest(valkey: redis.Redis) -> None:
    number, whom = uuid4().hex, uuid4().hex
    pace = a_pace()
    pace.grants(number, [whom] * PAIR_BURST, 10_000)

    let_pass(valkey, f"pombal:pace:{number}:{whom}", 20 * PAIR_SECONDS)
    let_pass(valkey, f"pombal:pace:{number}", 20 * PAIR_SECONDS)

    grants = pace.grants(number, [whom] * 30, 10_000)
    assert sum(not grant.full for grant in grants) == 20


def let_pass(valkey: redis.Redis, key: str, seconds: float) -> None:
    """As if so much time went by for a limit: it is kept as the moment when its next slot is."""
    value = valkey.get(key)
    assert isinstance(value, bytes)
    valkey.set(key, f"{int(value) - seconds * 1e6:.0f}")


def test_one_recipients_limit_is_no_others(number: str) -> None:
    busy, others = uuid4().hex, nobody_twice(10)
    pace = a_pace()
    pace.grants(number, [busy] * PAIR_BURST, 10_000)

    grants = pace.grants(number, [busy, *others, busy], 10_000)

    assert [grant.full for grant in grants] == ["pair", *[""] * 10, "pair"]


def test_one_numbers_limit_is_no_others() -> None:
    pace = a_pace()
    one, other, whom = uuid4().hex, uuid4().hex, uuid4().hex
    pace.grants(one, nobody_twice(100), 10)
    pace.grants(one, [whom] * PAIR_BURST, 10_000)

    assert pace.grants(other, [whom], 10)[0].full == ""


def test_a_full_number_takes_nothing_from_a_recipients_share(valkey: redis.Redis, number: str) -> None:
    whom = uuid4().hex
    pace = a_pace()
    pace.grants(number, nobody_twice(1), 0.001)
    for _ in range(100):
        assert pace.grants(number, [whom], 0.001)[0].full == "number"

    assert not valkey.exists(f"pombal:pace:{number}:{whom}")


def test_several_processes_share_the_limits(valkey: redis.Redis, number: str) -> None:
    paces = [a_pace(), a_pace()]

    found = slots(valkey, *paces, number=number, rate=100, most=100)

    assert min(later - earlier for earlier, later in itertools.pairwise(found)) >= 1 / 100 - TICK
    whom = uuid4().hex
    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(lambda pace: pace.grants(f"{number}x", [whom] * 40, 10_000), paces))
    assert sum(not grant.full for half in halves for grant in half) == PAIR_BURST


def test_a_wiped_redis_is_paced_again_at_once(valkey: redis.Redis, number: str) -> None:
    pace = a_pace()
    pace.grants(number, nobody_twice(1_000), 100)
    for key in valkey.scan_iter(match=f"pombal:pace:{number}*"):
        valkey.delete(key)

    grants = pace.grants(number, nobody_twice(1_000), 100)

    assert sum(not grant.full for grant in grants) == 1 + HORIZON * 100
    valkey.script_flush()  # a restarted server knows no scripts
    assert {grant.full for grant in pace.grants(number, nobody_twice(1_000), 100)} <= {"", "number"}


def test_without_redis_the_process_paces_by_itself(number: str) -> None:
    pace = a_pace("redis://127.0.0.1:9/0")
    whom = uuid4().hex

    grants = pace.grants(number, nobody_twice(100), 100)

    assert sum(not grant.full for grant in grants) in (HORIZON * 100, 1 + HORIZON * 100)  # floats: the last is a draw
    assert sum(not grant.full for grant in pace.grants(f"{number}x", [whom] * 60, 10_000)) == PAIR_BURST


def test_a_redis_that_does_not_answer_is_asked_once_and_then_left_alone() -> None:
    """Connections are made, and no answer ever comes."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as deaf:
        pace = Pace(client_for_pace(f"redis://127.0.0.1:{deaf.getsockname()[1]}/0"))

        grants = [pace.grants("n", nobody_twice(1), 10_000)[0] for _ in range(50)]

        deaf.setblocking(False)
        assert connections(deaf) == 1
    assert {grant.full for grant in grants} == {""}


def connections(server: socket.socket) -> int:
    """How many wait to be accepted."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            server.accept()[0].close()
            count += 1
    return count


def test_nobody_asking_asks_nothing() -> None:
    assert a_pace("redis://127.0.0.1:9/0").grants("n", [], 100) == []


def test_keys_are_forgotten_when_they_mean_nothing_any_more(valkey: redis.Redis, number: str) -> None:
    whom = uuid4().hex
    a_pace().grants(number, [whom], 100)

    for key in (f"pombal:pace:{number}", f"pombal:pace:{number}:{whom}"):
        left = valkey.pttl(key)
        assert isinstance(left, int)
        assert 0 < left <= 70_000
