"""200 only after the commit, whatever is killed, frozen or full (W1-W3, D1, D4, D6, D9, D12)."""

import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import redis

from pombal.supervisor import until
from sandbox import meta
from tests.web.island import Door, Island, an_island, frozen
from tests.web.process import Web, running

IN_TIME = 6.0  # seconds; the bar is 3, the machine is shared


@pytest.fixture(scope="module")
def island(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Island]:
    with an_island(tmp_path_factory.mktemp("island")) as island:
        island.migrate()
        yield island


@pytest.fixture(scope="module")
def door(island: Island) -> Door:
    return island.a_door()


@pytest.fixture(scope="module")
def shared(island: Island, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with running(tmp_path_factory.mktemp("web") / "web.log", island.env) as web:
        yield web


@pytest.fixture
def web(shared: Web, island: Island) -> Web:
    """The shared process, proven to accept."""
    return shared.wait()


def a_body() -> bytes:
    return b'{"n":"%s"}' % uuid.uuid4().hex.encode()


def at_once(count: int, do: Callable[[], httpx.Response]) -> list[tuple[httpx.Response, float]]:
    """The answers of that many at the same time, and how long each took."""

    def timed(_: int) -> tuple[httpx.Response, float]:
        began = time.monotonic()
        return do(), time.monotonic() - began

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(timed, range(count)))


def assert_refused_in_time(answers: list[tuple[httpx.Response, float]]) -> None:
    for response, seconds in answers:
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "UNAVAILABLE"
        assert int(response.headers["retry-after"]) > 0
        assert response.headers["x-request-id"] == response.json()["error"]["request_id"]
        assert seconds < IN_TIME


class Load:
    """Eight clients that post until they are told to stop or nobody answers; they write down what was accepted."""

    def __init__(self, web: Web, door: Door) -> None:
        self.accepted: list[bytes] = []
        self.other: list[int] = []
        self._web, self._door = web, door
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._post) for _ in range(8)]
        for thread in self._threads:
            thread.start()

    def _post(self) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{self._web.port}", timeout=30, trust_env=False) as client:
            while not self._stop.is_set():
                raw = a_body()
                try:
                    headers = {"X-Hub-Signature-256": meta.sign(raw, self._door.app_secret)}
                    status = client.post(self._door.url, content=raw, headers=headers).status_code
                except httpx.TransportError:
                    if self._web.process.poll() is not None:
                        return
                    continue
                if status == 200:
                    self.accepted.append(raw)
                else:
                    self.other.append(status)

    def grow_to(self, count: int) -> None:
        assert until(lambda: len(self.accepted) >= count, time.monotonic() + 60)

    def end(self) -> list[bytes]:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return self.accepted


# ------------------------------------------------------------------------------------------------------------ commits


def test_each_accepted_body_is_one_row(web: Web, island: Island, door: Door) -> None:
    load = Load(web, door)
    load.grow_to(400)

    accepted = load.end()

    assert sorted(raw for raw in island.bodies() if raw in set(accepted)) == sorted(accepted)
    assert load.other == []


def test_bodies_share_a_commit(web: Web, island: Island, door: Door) -> None:
    with island.superuser() as connection, connection.transaction():
        connection.execute("LOCK TABLE delivery IN ACCESS EXCLUSIVE MODE")
        with ThreadPoolExecutor(24) as pool:
            answers = [pool.submit(web.post, door, a_body()) for _ in range(24)]
            assert until(lambda: waiting_for_the_lock(island) > 0, time.monotonic() + 10)
            connection.execute("SET LOCAL lock_timeout = 0")
            connection.execute("COMMIT")
            codes = [answer.result().status_code for answer in answers]

    assert codes == [200] * 24


def waiting_for_the_lock(island: Island) -> int:
    with island.superuser() as connection:
        found = connection.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()
        return int(found[0]) if found else 0


# ----------------------------------------------------------------------------------------------------------- Postgres


def test_a_killed_postgres_is_refused_in_time_and_found_again(web: Web, island: Island, door: Door) -> None:
    assert web.post(door, a_body()).status_code == 200
    pid = web.process.pid

    island.postgres.kill()
    lost = a_body()
    answers = at_once(20, lambda: web.post(door, lost))
    health = web.http.get("/health").status_code
    ready = web.http.get("/ready")
    unsigned = web.http.post(door.url, content=b"{}").status_code
    island.postgres.restart()

    assert_refused_in_time(answers)
    assert (health, ready.status_code, unsigned) == (200, 503, 401)
    assert ready.json()["missing"] == ["the database is away"]
    kept = a_body()
    assert web.post(door, kept).status_code == 200  # the very first: nothing has to be found out the hard way
    assert web.process.pid == pid
    bodies = island.bodies()
    assert kept in bodies
    assert lost not in bodies


def test_a_connection_that_was_cut_costs_nobody_an_answer(web: Web, island: Island, door: Door) -> None:
    for _ in range(3):
        with island.superuser() as connection:
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'pombal'")
        raw = a_body()

        assert web.post(door, raw).status_code == 200
        assert island.bodies().count(raw) == 1


def test_a_frozen_postgres_is_refused_in_time_and_found_again(web: Web, island: Island, door: Door) -> None:
    assert web.post(door, a_body()).status_code == 200

    with frozen(island.postgres):
        answers = at_once(10, lambda: web.post(door, a_body())) + at_once(10, lambda: web.post(door, a_body()))
        health = web.http.get("/health").status_code
        ready = web.http.get("/ready")

    assert_refused_in_time(answers)
    assert (health, ready.status_code) == (200, 503)
    assert until(lambda: web.post(door, a_body()).status_code == 200, time.monotonic() + 30)


def test_a_locked_table_is_refused_in_time_and_what_was_accepted_is_there(web: Web, island: Island, door: Door) -> None:
    with island.superuser() as connection, connection.transaction():
        connection.execute("LOCK TABLE delivery IN ACCESS EXCLUSIVE MODE")
        answers = at_once(10, lambda: web.post(door, a_body()))

    assert_refused_in_time(answers)
    assert until(lambda: web.post(door, a_body()).status_code == 200, time.monotonic() + 30)


def test_a_database_that_takes_no_writes_is_refused(web: Web, island: Island, door: Door) -> None:
    """As a full disk or a replica after a failover does."""
    with island.superuser() as connection:
        connection.execute("ALTER DATABASE pombal SET default_transaction_read_only = on")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'pombal'")
    answers = at_once(3, lambda: web.post(door, a_body()))
    with island.superuser() as connection:
        connection.execute("SET default_transaction_read_only = off")
        connection.execute("ALTER DATABASE pombal RESET default_transaction_read_only")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'pombal'")

    assert_refused_in_time(answers)
    assert until(lambda: web.post(door, a_body()).status_code == 200, time.monotonic() + 30)


# -------------------------------------------------------------------------------------------------------------- Redis


def assert_accepts(web: Web, island: Island, door: Door) -> None:
    raws = [a_body() for _ in range(5)]
    for raw in raws:
        began = time.monotonic()
        assert web.post(door, raw).status_code == 200
        assert time.monotonic() - began < IN_TIME
    assert set(raws) <= set(island.bodies())


def jobs(island: Island) -> int:
    with island.redis() as client:
        return int(client.hlen("dramatiq:incoming_message.msgs"))


def accepted(web: Web) -> float:
    """How many bodies were accepted, by `/metrics`."""
    found = re.findall(
        r'^pombal_webhook_requests_total\{outcome="accepted",provider="meta"\} (.+)$', metrics_of(web), re.M
    )
    return float(found[0]) if found else 0.0


def is_complete(web: Web, expected: int) -> bool:
    """Whether `/metrics` says that it has asked the whole fleet (1), or this host only (0)."""
    return f"\npombal_metrics_complete {float(expected)}\n" in metrics_of(web)


def metrics_of(web: Web) -> str:
    response = web.http.get("/metrics")
    assert response.status_code == 200
    return response.text


def test_a_wiped_redis_keeps_nobody_waiting(web: Web, island: Island, door: Door) -> None:
    with island.redis() as client:
        client.flushall()

    assert_accepts(web, island, door)
    assert until(lambda: jobs(island) > 0, time.monotonic() + 20)


def test_a_killed_redis_keeps_nobody_waiting(web: Web, island: Island, door: Door) -> None:
    island.valkey.kill()

    assert_accepts(web, island, door)
    ready = web.http.get("/ready")
    own_numbers = until(lambda: is_complete(web, 0) and accepted(web) > 0, time.monotonic() + 20)
    island.valkey.restart()

    # Bodies are still accepted, so nobody must take this process away; it is only said.
    assert ready.status_code == 200
    assert ready.json()["notes"] == ["the queue is away: bodies are accepted and wait as rows"]
    assert own_numbers
    assert until(lambda: is_complete(web, 1) and accepted(web) > 0, time.monotonic() + 20)
    with island.redis() as client:
        client.flushall()
    assert_accepts(web, island, door)
    assert until(lambda: jobs(island) > 0, time.monotonic() + 20)


def test_a_frozen_redis_keeps_nobody_waiting(web: Web, island: Island, door: Door) -> None:
    with frozen(island.valkey):
        assert_accepts(web, island, door)
        ready = web.http.get("/ready")

        assert ready.status_code == 200
        assert ready.json()["notes"] == ["the queue is away: bodies are accepted and wait as rows"]


@pytest.mark.parametrize(
    "setting", [("min-replicas-to-write", "1", "0"), ("maxmemory", "1", "0")], ids=["read-only", "full"]
)
def test_a_redis_that_takes_nothing_keeps_nobody_waiting(
    web: Web, island: Island, door: Door, setting: tuple[str, str, str]
) -> None:
    name, bad, good = setting
    with island.redis() as client:
        client.flushall()
        client.config_set(name, bad)
        with pytest.raises(redis.ResponseError):
            client.set("x", "y")

        assert_accepts(web, island, door)

        client.config_set(name, good)
    assert_accepts(web, island, door)
    assert until(lambda: jobs(island) > 0, time.monotonic() + 20)


# ------------------------------------------------------------------------------------------------------ the web process


@pytest.fixture
def own(island: Island, tmp_path: Path) -> Iterator[Web]:
    with running(tmp_path / "web.log", island.env) as web:
        yield web


def test_whatever_a_killed_process_had_accepted_is_there(own: Web, island: Island, door: Door) -> None:
    load = Load(own, door)
    load.grow_to(100)

    own.process.kill()
    own.process.wait()
    accepted = load.end()

    assert set(accepted) <= set(island.bodies())


def test_sigterm_under_load_loses_nothing_and_ends_well(own: Web, island: Island, door: Door) -> None:
    load = Load(own, door)
    load.grow_to(100)

    own.process.terminate()
    code = own.process.wait(45)
    accepted = load.end()

    assert code == 0
    assert set(accepted) <= set(island.bodies())
    assert load.other == []


def test_a_storm_of_sigterms_is_one(own: Web, island: Island, door: Door) -> None:
    """A group SIGTERM arrives twice, and the second one must not hit a process that has already cleaned up."""
    load = Load(own, door)
    load.grow_to(50)

    while own.process.poll() is None:
        own.process.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    accepted = load.end()

    assert own.process.returncode == 0
    assert set(accepted) <= set(island.bodies())


def test_sigint_is_a_clean_stop_too(own: Web) -> None:
    own.process.send_signal(signal.SIGINT)

    assert own.process.wait(45) == 0


def test_requests_in_flight_are_answered_before_the_end(own: Web, island: Island, door: Door) -> None:
    raws = [a_body() for _ in range(12)]
    with island.superuser() as connection, ThreadPoolExecutor(12) as pool:
        connection.execute("BEGIN")
        connection.execute("LOCK TABLE delivery IN ACCESS EXCLUSIVE MODE")
        answers = [pool.submit(own.post, door, raw) for raw in raws]
        assert until(
            lambda: waiting_for_the_lock(island) > 0 and own.http.get("/health").is_success, time.monotonic() + 10
        )
        own.process.terminate()
        connection.execute("COMMIT")

        codes = [answer.result().status_code for answer in answers]

    assert own.process.wait(45) == 0
    assert [raw for raw, code in zip(raws, codes, strict=True) if code == 200] == [
        raw for raw in raws if raw in island.bodies()
    ]
    assert 200 in codes


def test_it_starts_before_its_database_does(island: Island, door: Door, tmp_path: Path) -> None:
    island.postgres.kill()
    try:
        with running(tmp_path / "web.log", island.env, ready=False) as web:
            web.wait("/health").wait("/ready", 503)
            island.postgres.restart()

            web.wait("/ready", 200)
            assert web.post(door, a_body()).status_code == 200
    finally:
        if not island.postgres.alive():
            island.postgres.restart()
