"""The clock: rows that nobody works on are rung for, dead workers give back their jobs, ticks start, two are safe.

The clocks here are real processes on servers that tests may break.
"""

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec
import psycopg
import pytest
from sqlalchemy import text

from models import Lease, Tick
from pombal import db
from pombal.broker import redis_client
from pombal.cli import main
from pombal.clock import Clock
from pombal.settings import settings
from tests import factories
from tests.pombal.breakable import Servers
from tests.pombal.processes import Running, running, tell_a_thread, until
from workers import broker
from workers.incoming_message import incoming_message_tick, ring_waiting

LATER = "now() + interval '1 hour'"
RUNG_LATELY = "UPDATE delivery SET next_ring_at = now() + interval '1 hour'"


# ------------------------------------------------------------------------------------------------ what is rung for


def rung() -> list[list[str]]:
    """The jobs in the run's own queue: the ids of each."""
    with redis_client() as client:
        bodies: Any = client.hvals("dramatiq:incoming_message.msgs")
    return [msgspec.json.decode(body)["args"][0] for body in bodies]


def a_row(**columns: str) -> str:
    """A delivery of the run's own database that waits, except for what is said of it in SQL."""
    id_ = factories.a_delivery(factories.a_shop(), b'{"said": "in private"}')
    given = {"next_ring_at": "now()", **columns}
    with factories.superuser() as connection:
        changes = ", ".join(f"{name} = {value}" for name, value in given.items())
        connection.execute(f"UPDATE delivery SET {changes} WHERE id = %s".encode(), [id_])  # noqa: S608 - the test's own words
    return str(id_)


@pytest.fixture
def nothing_waits(queues: None) -> None:
    """Other tests leave deliveries behind that nobody processed."""
    with factories.superuser() as connection:
        connection.execute("UPDATE delivery SET state = 'done' WHERE state = 'pending'")


CLAIM = "gen_random_uuid()"


def test_lost_bells_and_claims_that_ran_out_are_found(nothing_waits: None) -> None:
    lost = a_row()
    suspect = a_row(claim_token=CLAIM, claimed_until="now() - interval '1 second'")
    for columns in (
        {"next_ring_at": LATER},
        {"next_attempt_at": LATER},
        {"claim_token": CLAIM, "claimed_until": LATER},
        {"state": "'done'"},
        {"state": "'dead'"},
    ):
        a_row(**columns)

    assert ring_waiting() == 2

    # What may have killed its process gets a job of its own.
    assert sorted(rung()) == sorted([[lost], [suspect]])


def test_a_backlog_is_rung_for_once_and_in_batches(nothing_waits: None) -> None:
    ids = {str(id_) for id_ in many(250)}

    assert ring_waiting() == 250
    assert ring_waiting() == 0

    jobs = rung()
    assert sorted(map(len, jobs)) == [50, 200]
    assert {id_ for job in jobs for id_ in job} == ids


def test_a_flushed_queue_is_filled_again_whatever_was_rung_lately(nothing_waits: None) -> None:
    ids = [a_row(next_ring_at=LATER), a_row()]
    ring_waiting()
    broker.flush_all()

    assert ring_waiting() == 0
    assert ring_waiting(at_once=True) == 2
    assert sorted(rung()) == [sorted(ids)]


def test_messages_carry_ids_and_nothing_else(nothing_waits: None) -> None:
    id_ = a_row()

    ring_waiting()

    with redis_client() as client:
        keys: Any = client.keys()
        held = {key: client.dump(key) for key in keys}
        (body,) = client.hvals("dramatiq:incoming_message.msgs")
    message = msgspec.json.decode(body)
    assert message["args"] == [[id_]]
    assert message["kwargs"] == {}
    assert set(message["options"]) == {"redis_message_id"}
    assert not [key for key, value in held.items() if value and b"in private" in value]


def many(number: int) -> list[UUID]:
    with factories.superuser() as connection:
        found = connection.execute(
            "INSERT INTO delivery (id, app_id, provider, raw, next_ring_at)"
            " SELECT gen_random_uuid(), %s, 'meta', '', now() FROM generate_series(1, %s) RETURNING id",
            [uuid4(), number],
        )
        return [row[0] for row in found]


# -------------------------------------------------------------------------------- parts of a sweep, each by itself


@contextmanager
def sweeping() -> Iterator[None]:
    """`Clock.sweep` of this process, restarted as a clock does."""
    clock = Clock()
    with db.session() as s:
        s.execute(text("DELETE FROM lease WHERE name = 'sweep'"))
    thread = threading.Thread(target=clock._forever, args=(clock.sweep,))
    thread.start()
    try:
        yield
    finally:
        clock.stop()
        thread.join()


def last_round() -> datetime | None:
    with db.session() as s:
        found: datetime | None = s.scalar(text("SELECT done_at FROM lease WHERE name = 'sweep'"))
    return found


def without_a_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIP_BACKEND_URL", "backend.internal:8080")
    monkeypatch.setenv("SIP_BACKEND_KEY", "a-key")
    settings.cache_clear()


@pytest.fixture
def fresh_settings() -> Iterator[None]:
    yield
    settings.cache_clear()


def test_a_part_that_always_fails_stops_no_other_part_of_the_sweep_and_is_seen(
    nothing_waits: None, fresh_settings: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    without_a_scheme(monkeypatch)  # of which the part that notes what lapsed must hear
    id_ = a_row()

    with sweeping():
        until(lambda: [id_] in rung(), seconds=20)
        until(lambda: "note_lapses" in (said := "".join(capfd.readouterr())) and "clock_part_failed" in said)

    assert last_round() is None, "no round was whole: pombal_clock_lag_seconds grows"


def test_a_part_that_failed_when_redis_had_lost_its_queues_rings_for_them_once_it_can_and_no_other_does_again(
    nothing_waits: None,
) -> None:
    id_ = a_row(next_ring_at=LATER)  # a bell rang, and Redis lost it
    broker.flush_all()
    with redis_client() as client:
        client.delete("pombal:rung-for")
        client.set("dramatiq:incoming_message.msgs", "not what it should be")
        client.set("dramatiq:download_media", "nor this")

        with sweeping():
            until(lambda: client.hexists("pombal:rung-for", "ring_sessions"))
            assert not client.hexists("pombal:rung-for", "ring_waiting")
            client.delete("dramatiq:incoming_message.msgs")
            until(lambda: [id_] in rung())
            until(lambda: client.hexists("pombal:rung-for", "ring_waiting"))
            assert last_round() is None
            client.delete("dramatiq:download_media")
            until(lambda: last_round() is not None)

    assert rung() == [[id_]]


def test_a_clock_whose_sip_settings_are_wrong_does_not_start_and_says_why(
    fresh_settings: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_a_scheme(monkeypatch)

    for command in (["clock"], ["worker", "sip_refresh"]):
        assert main(command) != 0
        assert "SIP_BACKEND_URL is not an http(s) address" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- leases and ticks


def test_a_lease_has_one_holder_until_it_ends_or_is_released() -> None:
    name, ours, theirs = uuid4().hex, uuid4(), uuid4()

    assert held_by(name, ours, "1 hour")
    assert not held_by(name, theirs, "1 hour")
    assert held_by(name, ours, "0 seconds")  # renewed, and at its end at once
    assert held_by(name, theirs, "1 hour")
    with db.session() as s:
        Lease.release(s, name, theirs)
    assert held_by(name, ours, "1 hour")


def held_by(name: str, token: UUID, length: Any) -> bool:
    with db.session() as s:
        return Lease.take(s, name, token, length)


def test_a_minute_is_claimed_once_by_however_many() -> None:
    name = uuid4().hex

    def claim(_: int) -> bool:
        with db.session() as s:
            return Tick.claim(s, name)

    with ThreadPoolExecutor(8) as pool:
        claimed = sum(pool.map(claim, range(40)))

    with factories.superuser() as connection:
        (minutes,) = connection.execute("SELECT count(*) FROM tick WHERE name = %s", [name]).fetchone() or (0,)
    assert claimed == minutes <= 2


def test_the_tick_rings_for_what_waits_and_keeps_the_partitions(nothing_waits: None) -> None:
    id_ = a_row()
    in_a_week = "SELECT to_regclass('delivery_' || to_char(now() AT TIME ZONE 'UTC' + interval '7 days', 'YYYYMMDD'))"
    with factories.superuser() as connection:
        connection.execute("DELETE FROM tick WHERE name = 'incoming_message'")

    incoming_message_tick()
    jobs = rung()
    incoming_message_tick()

    assert jobs == rung() == [[id_]]
    with factories.superuser() as connection:
        assert connection.execute(in_a_week).fetchone() != (None,)


# ------------------------------------------------------------------------------------------------- whole processes


@pytest.fixture(scope="module")
def ticking() -> Iterator[None]:
    """`Clock.ticks` beside the tests below, so that the last one need not wait for the whole minute."""
    clock = Clock()
    thread = threading.Thread(target=clock.ticks)
    thread.start()
    yield
    clock.stop()
    thread.join()


@contextmanager
def a_clock(servers: Servers, folder: Path, name: str = "clock") -> Iterator[Running]:
    with running("-m", "pombal", "clock", env=servers.env, log=folder / f"{name}.log") as clock:
        clock.says('"event":"clock_started"')
        yield clock


def jobs_with(servers: Servers, id_: str) -> list[list[str]]:
    messages = [m for m in servers.messages("incoming_message") if m["actor_name"] == "incoming_message"]
    return [m["args"][0] for m in messages if id_ in m["args"][0]]


@pytest.fixture
def quiet(servers: Servers, ticking: None) -> Servers:
    """Nothing waits, and nobody holds the lease."""
    servers.sql("UPDATE delivery SET state = 'done'")
    servers.sql("DELETE FROM lease")
    servers.clear("incoming_message")
    return servers


def test_when_worker_and_clock_are_killed_the_other_clock_gives_everything_back(quiet: Servers, tmp_path: Path) -> None:
    servers = quiet
    ids = [servers.a_delivery(next_ring_at=LATER) for _ in range(12)]
    with (
        running("-m", "pombal", "worker", "incoming_message", env=servers.env, log=tmp_path / "worker") as worker,
        psycopg.connect(servers.postgres.database_url("postgres", "pombal")) as blocker,
        a_clock(servers, tmp_path, "one") as one,
        a_clock(servers, tmp_path, "two") as two,
    ):
        first = servers.a_delivery()
        until(lambda: one.events("sweep_rang") or two.events("sweep_rang"))
        until(lambda: servers.sql("SELECT state FROM delivery WHERE id = %s", first)[0]["state"] != "pending")
        holder, other = (one, two) if one.events("sweep_rang") else (two, one)
        servers.sql("UPDATE delivery SET next_ring_at = now() WHERE id = ANY(%s::uuid[])", ids)
        until(lambda: not waiting_for_bells(servers))
        until(lambda: not servers.messages("incoming_message"))
        assert not other.events("sweep_rang")  # two clocks run, one sweeps

        # The worker is killed with jobs in hand; no row will tell of them, so only the reaper can give them back.
        blocker.execute("LOCK TABLE delivery")
        again = [servers.a_job("incoming_message", [str(uuid4())]) for _ in range(3)]
        until(lambda: servers.fetched("incoming_message") >= len(again))
        worker.tell_group(signal.SIGKILL)
        holder.tell_group(signal.SIGKILL)
        blocker.rollback()
        orphan = servers.a_delivery()

        until(lambda: jobs_with(servers, orphan), seconds=40, why=other.text)
        until(lambda: servers.fetched("incoming_message") == 0, seconds=60, why=other.text)
        assert set(again) <= {message["message_id"] for message in servers.messages("incoming_message")}
        assert servers.waiting("incoming_message") > len(again)  # the orphan's too, and perhaps a tick


def waiting_for_bells(servers: Servers) -> bool:
    return bool(servers.sql("SELECT 1 FROM delivery WHERE state = 'pending' AND next_ring_at <= now()"))


def test_a_clock_outlives_its_stores_and_rings_again_for_what_they_forgot(quiet: Servers, tmp_path: Path) -> None:
    servers = quiet
    with a_clock(servers, tmp_path) as clock:
        first = servers.a_delivery()
        until(lambda: jobs_with(servers, first))
        servers.sql(RUNG_LATELY)  # a bell rang, so it is left alone for long

        with redis_client(servers.valkey.url) as client:
            client.flushall()
        until(lambda: jobs_with(servers, first), why=clock.text)

        # A Redis that was down may have forgotten, even when it remembers a part.
        rang = len(clock.events("sweep_rang"))
        servers.sql(RUNG_LATELY)
        servers.valkey.kill()
        until(lambda: any(e["part"] == "sweep" for e in clock.events("clock_part_waits")))
        servers.valkey.restart()
        until(lambda: len(clock.events("sweep_rang")) > rang, why=clock.text)

        waited = len(clock.events("clock_part_waits"))
        servers.postgres.kill()
        until(lambda: len(clock.events("clock_part_waits")) > waited)
        servers.postgres.restart()
        second = servers.a_delivery()
        until(lambda: jobs_with(servers, second), why=clock.text)

        assert clock.alive()
        assert not clock.events("clock_part_failed")
        # A storm of signals, as from a host, its shell and an impatient person, is one order to stop.
        for _ in range(50):
            clock.tell_group(signal.SIGTERM)
            clock.tell_group(signal.SIGINT)
        assert clock.code(seconds=25) == 0


def test_a_clock_that_stops_lets_another_take_over_at_once(quiet: Servers, tmp_path: Path) -> None:
    with a_clock(quiet, tmp_path) as clock:
        until(lambda: quiet.sql("SELECT 1 FROM lease WHERE name = 'sweep' AND until > now()"))

        tell_a_thread(clock.pid, signal.SIGTERM)

        assert clock.code(seconds=25) == 0
    assert not quiet.sql("SELECT 1 FROM lease WHERE name = 'sweep' AND until > now()")


def test_ticks_start_the_periodic_actors(ticking: None) -> None:
    def ticks() -> list[dict[str, Any]]:
        with redis_client() as client:
            bodies: Any = client.hvals("dramatiq:incoming_message.msgs")
        return [m for m in map(msgspec.json.decode, bodies) if m["actor_name"] == "incoming_message_tick"]

    until(ticks, seconds=90)

    scheduled = datetime.fromisoformat(ticks()[-1]["options"]["scheduled_at"])
    assert (scheduled.second, scheduled.microsecond) == (0, 0)
    assert abs((datetime.now(UTC) - scheduled).total_seconds()) < 180
