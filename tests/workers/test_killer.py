"""A body that takes its process down: it is parked, and what was claimed with it is processed all the same.

Real worker processes, started again by the supervisor as under `pombal up`. The body waits inside the database, for a
lock that the test holds, until the process that works on it has been killed: SIGKILL, as the kernel does out of memory.
Only what takes seconds of patience is shortened: the database is told that the dead process's claims ran out.
"""

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator

import pytest

from models.delivery import FATAL_CRASHES
from pombal.supervisor import LINUX, Command, Supervisor, processes
from tests.factories import Shop, a_shop, delivery, rows, superuser, texts
from tests.workers.conftest import OnStoring
from tests.workers.tools import deliveries, letters, messages, states, until
from workers import broker
from workers.incoming_message import ring_waiting

pytestmark = [
    pytest.mark.usefixtures("queues"),
    pytest.mark.skipif(not LINUX, reason="finds the worker among the processes of Linux"),
]

KILLER = "kills whoever stores it"
LOCK = 7_112_026
WAIT = f"SET LOCAL lock_timeout = 0; PERFORM pg_advisory_xact_lock({LOCK});"


class Fleet:
    """One supervised worker with one process, and the means to kill that process in the act."""

    def __init__(self) -> None:
        self.output = io.StringIO()
        argv = [sys.executable, "-m", "pombal", "worker", "incoming_message", "--processes", "1", "--threads", "4"]
        self.supervisor = Supervisor(
            [Command("worker", argv)], out=self.output, first_pause=0.01, longest_pause=0.01, grace=5
        )
        self.killed: list[int] = []
        self.database = superuser()
        self.database.execute("SELECT pg_advisory_lock(%s)", [LOCK])
        self._thread = threading.Thread(target=self.supervisor.run)
        self._thread.start()

    def stop(self) -> None:
        self.database.close()
        self.supervisor.stop()
        self._thread.join()

    def kill_whoever_waits(self) -> bool:
        """Kill the process whose transaction waits at the killer; False when there is none."""
        waiting = self._waiting()
        if not waiting:
            return False
        master = self.supervisor.pids["worker"]
        (worker,) = (process.pid for process in processes() if process.parent == master)
        os.kill(worker, signal.SIGKILL)
        until(lambda: all(process.pid != worker for process in processes()), "the death of the worker")
        # The database notices at once that its client is gone only when it is told.
        self.database.execute("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS given (pid)", [waiting])
        until(lambda: not self._waiting(), "the end of its transaction")
        self.killed.append(worker)
        return True

    def _waiting(self) -> list[int]:
        """The database's processes that stand at the lock."""
        found = self.database.execute(
            "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND NOT granted", [LOCK]
        )
        return [row[0] for row in found]


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.stop()


def test_a_body_that_kills_its_process_is_parked_and_its_neighbours_are_done(
    fleet: Fleet, on_storing: OnStoring
) -> None:
    shop = a_shop()
    on_storing(KILLER, WAIT)
    ids = deliveries(shop, [texts(shop, f"wamid.{n}", body=KILLER if n == 77 else "oi") for n in range(200)])
    ring_waiting(at_once=True)

    until(lambda: died_or_settled(fleet, shop), "the verdict on all of them", patience=240)

    assert [id_ for id_, state in states(ids).items() if state != "done"] == [ids[77]]
    assert len(messages(shop)) == 199
    (conversation,) = rows(shop, "SELECT unread_count FROM conversation")
    assert conversation["unread_count"] == 199
    parked = delivery(ids[77])
    assert (parked.state, parked.crashes, parked.failures) == ("dead", FATAL_CRASHES, 0)
    assert len(fleet.killed) == 1 + FATAL_CRASHES  # once among its neighbours, then alone
    assert f"died {FATAL_CRASHES} times" in (parked.reason or "")
    (letter,) = letters(ids[77])
    assert (letter["tenant_id"], letter["state"], letter["error"]) == (shop.tenant.id, "open", parked.reason)


def died_or_settled(fleet: Fleet, shop: Shop) -> bool:
    """Whether all is settled. Whenever a process died, its claims run out, and the sweep rings as for a wiped Redis."""
    if fleet.kill_whoever_waits():
        broker.flush("incoming_message")
        fleet.database.execute(
            "UPDATE delivery SET claimed_until = now() - interval '1 second' WHERE claim_token IS NOT NULL"
        )
        ring_waiting(at_once=True)
    left = fleet.database.execute("SELECT FROM delivery WHERE app_id = %s AND state = 'pending'", [shop.app.id])
    return left.rowcount == 0
