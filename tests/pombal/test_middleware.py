"""What becomes of a job that fails, in a real worker on real servers that tests may break."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from pombal.local import start_valkey
from pombal.supervisor import runs
from tests.pombal import jobs
from tests.pombal.breakable import Errands, Servers, at_work
from tests.pombal.processes import output, until

CLI = "import sys; import tests.pombal.jobs; from pombal.cli import main; sys.exit(main(sys.argv[1:]))"


def test_a_job_that_raises_runs_once_and_as_often_again_as_it_may_and_leaves_a_letter(errands: Errands) -> None:
    id_ = errands.post("fails", "raises")

    until(lambda: errands.letters("raises") and errands.buried("raises") and errands.is_drained())

    assert errands.count("raises") == 3
    (letter,) = errands.letters("raises")
    assert letter["key"] == f"job:{id_}"
    assert (letter["actor"], letter["queue"], letter["state"]) == ("fails", "errands", "open")
    assert letter["args"] == {"args": ["raises"], "kwargs": {}}
    assert (letter["failures"], letter["count"], letter["error"]) == (3, 1, "RuntimeError")
    assert "pombal/jobs.py" in letter["traceback"]
    assert len(letter["fingerprint"]) == 12


def test_what_an_error_says_is_kept_nowhere(errands: Errands) -> None:
    errands.post("fails", "discreet")

    until(lambda: errands.letters("discreet") and errands.buried("discreet"))

    (buried,) = errands.buried("discreet")
    assert buried["options"]["retries"] == 2
    assert "RuntimeError" in buried["options"]["traceback"]
    for place in (str(buried), str(errands.letters("discreet")), errands.worker.text()):
        assert jobs.PRIVATE not in place


def test_letters_of_one_cause_share_a_fingerprint(errands: Errands) -> None:
    for actor, id_ in (("fails", "one"), ("fails", "two"), ("refuses", "other")):
        errands.post(actor, id_)

    until(lambda: all(errands.letters(id_) for id_ in ("one", "two", "other")))

    one, two, other = (errands.letters(id_)[0]["fingerprint"] for id_ in ("one", "two", "other"))
    assert one == two
    assert one != other


def test_what_is_permanent_is_not_tried_again(errands: Errands) -> None:
    errands.post("refuses", "permanent")

    until(lambda: errands.buried("permanent") and errands.is_drained())

    assert errands.count("permanent") == 1
    (letter,) = errands.letters("permanent")
    assert (letter["failures"], letter["error"]) == (1, "Permanent: it cannot be done")


def test_an_actor_that_nobody_knows_leaves_a_letter(errands: Errands) -> None:
    errands.post("not_yet_deployed", "stranger")

    until(lambda: errands.buried("stranger") and errands.letters("stranger"))

    (letter,) = errands.letters("stranger")
    assert (letter["actor"], letter["queue"], letter["error"]) == ("not_yet_deployed", "errands", "ActorNotFound")


def test_a_letter_outlives_redis_and_its_job_can_be_run_again(errands: Errands, tmp_path: Path) -> None:
    mended = tmp_path / "mended"
    errands.post("fails_without", "outlives", str(mended))
    until(lambda: errands.buried("outlives") and errands.is_drained())
    (letter,) = errands.letters("outlives")

    output("-c", "import sys, redis; redis.Redis.from_url(sys.argv[1]).flushall()", errands.servers.valkey.url)
    mended.touch()

    assert str(letter["id"]) in output("-c", CLI, "dead", "list", "--limit", "1000", env=errands.servers.env)
    assert "1 retried" in output("-c", CLI, "dead", "retry", str(letter["id"]), env=errands.servers.env)
    errands.wait_for("outlives done")
    assert errands.letters("outlives")[0]["state"] == "retried"


@contextmanager
def killed(servers: Servers) -> Iterator[None]:
    servers.postgres.kill()
    try:
        yield
    finally:
        servers.postgres.restart()


def test_a_database_that_is_away_costs_no_try_and_leaves_no_letter(errands: Errands) -> None:
    with killed(errands.servers):
        # `asks_its_database` goes through our own pool, the other connects by itself; neither may be retried at all.
        errands.post("asks_its_database", "pooled")
        errands.post("asks_postgres", "direct", errands.servers.postgres.url)
        for id_ in ("pooled", "direct"):
            errands.wait_for(id_, times=2)

    for id_ in ("pooled", "direct"):
        errands.wait_for(f"{id_} done")
        assert not errands.letters(id_)
    until(errands.is_drained)


def test_a_letter_waits_for_the_database_too(errands: Errands) -> None:
    with killed(errands.servers):
        errands.post("refuses", "unwritten")
        errands.wait_for("unwritten", times=2)
        assert not errands.buried("unwritten")

    until(lambda: errands.buried("unwritten"))
    (letter,) = errands.letters("unwritten")
    assert letter["failures"] == 1


def test_connections_that_died_with_a_database_cost_no_further_run(errands: Errands) -> None:
    errands.post("fails", "connected")
    until(lambda: errands.letters("connected"))
    with killed(errands.servers):
        pass

    errands.post("fails", "reconnected")

    until(lambda: errands.buried("reconnected") and errands.is_drained())
    assert errands.count("reconnected") == 3


def test_another_redis_that_is_away_or_full_costs_no_try_and_leaves_no_letter(errands: Errands, tmp_path: Path) -> None:
    with start_valkey(tmp_path, persistence=False) as valkey:
        valkey.kill()
        errands.post("asks_redis", "redis", valkey.url)
        errands.wait_for("redis", times=2)
        valkey.restart()
        errands.wait_for("redis done")

        output("-c", "import sys, redis; redis.Redis.from_url(sys.argv[1]).config_set('maxmemory', 1)", valkey.url)
        errands.post("asks_redis", "full", valkey.url)
        errands.wait_for("full", times=2)
        output("-c", "import sys, redis; redis.Redis.from_url(sys.argv[1]).config_set('maxmemory', 0)", valkey.url)
        errands.wait_for("full done")

    assert not errands.letters("redis")
    assert not errands.letters("full")


def test_a_thread_that_dies_ends_the_process_so_that_its_host_starts_it_again(servers: Servers, tmp_path: Path) -> None:
    with at_work(servers, "doomed", tmp_path / "effects", threads=2, env={}) as worker:
        errands = Errands(servers, worker, tmp_path / "effects")
        errands.post("ends_its_thread", "thread", queue="doomed")

        assert worker.code() not in (0, None)
    assert worker.events("worker_thread_died")


HANGS = """
import threading
import dramatiq
from dramatiq import Worker
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import TimeLimit
from pombal.middleware import Watchdog

broker = StubBroker(middleware=[Watchdog(period=0.05, grace=1), TimeLimit(time_limit=200, interval=50)])

@dramatiq.actor(broker=broker, time_limit=200)
def hangs():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()  # no time limit reaches a thread in here

@dramatiq.actor(broker=broker, time_limit=200)
def ends():
    print("ended", flush=True)

Worker(broker, worker_threads=1).start()
ends.send()
hangs.send()
threading.Event().wait(60)
"""


def test_a_job_that_no_time_limit_can_end_ends_the_process() -> None:
    printed = output("-c", HANGS, code=70)

    assert "ended" in printed


SLOW_ACK = """
import threading
import dramatiq
from dramatiq import Middleware, Worker
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import TimeLimit
from pombal.middleware import Watchdog

acked = threading.Event()

class Redis(Middleware):
    def before_ack(self, broker, message):
        threading.Event().wait(2)  # as while it is away
    def after_ack(self, broker, message):
        acked.set()

broker = StubBroker(middleware=[Watchdog(period=0.05, grace=0.5), TimeLimit(time_limit=200), Redis()])

@dramatiq.actor(broker=broker, time_limit=200)
def ends():
    pass

Worker(broker, worker_threads=1).start()
ends.send()
assert acked.wait(30)
print("acknowledged", flush=True)
"""


def test_a_job_that_is_done_and_only_waits_for_its_ack_does_not_count_as_hung() -> None:
    assert "acknowledged" in output("-c", SLOW_ACK)


def test_a_job_whose_end_is_cut_short_is_not_lost(servers: Servers, tmp_path: Path) -> None:
    servers.clear("doomed")
    with (
        at_work(servers, "doomed", tmp_path / "effects", threads=2, env={}) as worker,
        psycopg.connect(servers.postgres.database_url("postgres", "pombal")) as blocker,
    ):
        errands = Errands(servers, worker, tmp_path / "effects")
        # Writing the letter has to wait, until its thread is struck in the middle of it.
        blocker.execute("LOCK TABLE dead_letter")
        errands.post("is_struck_while_given_up", "cut", queue="doomed")
        errands.wait_for("cut struck")
        blocker.rollback()

        assert worker.code() not in (0, None)
    (letter,) = errands.letters("cut")
    assert letter["actor"] == "is_struck_while_given_up"
    assert [m["args"][0] for m in servers.messages("doomed.XQ")] == ["cut"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_goes_on_when_its_master_was_killed(servers: Servers, tmp_path: Path) -> None:
    servers.clear("doomed")
    with at_work(servers, "doomed", tmp_path / "effects", threads=2, env={}) as worker:
        errands = Errands(servers, worker, tmp_path / "effects")
        errands.post("is_on_a_doomed_queue", "before", queue="doomed")
        errands.wait_for("before")
        orphans = [pid for pid in worker.group() if pid != worker.pid]
        assert orphans

        os.kill(worker.pid, signal.SIGKILL)

        until(lambda: not any(runs(pid) for pid in orphans), seconds=30, why=worker.text)
    errands.post("is_on_a_doomed_queue", "after", queue="doomed")
    assert servers.waiting("doomed") == 1
