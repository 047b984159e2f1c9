"""The fleet's sense of time: ticks, the sweep, the reaper. Each part is restarted alone; two clocks are safe.

- *Ticks* start the periodic actors on the minute, as periodiq does; an actor claims its minute, so that a second clock
  or a restart starts nothing twice. (periodiq's own process ends when Redis is away and knows no second one:
  dramatiq.md §12.)
- The *sweep* finds rows that nobody works on (a lost bell, a claim that ran out, a wait that fell due) and rings for
  them. It holds a lease, so one clock sweeps. Each kind of row has a guard of its own: one that always fails keeps no
  other from being rung for, and no round counts as ended while it does (`pombal_clock_lag_seconds`).
- The *reaper* gives the jobs of dead worker processes back to their queues (dramatiq.md §5 H3).
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import Any
from uuid import uuid4

import dramatiq
import redis

from models import Lane, Lease
from pombal import db, log, metrics
from pombal.broker import HardenedBroker, broker, redis_client
from pombal.middleware import is_store_trouble
from workers.channel_session import ring_sessions
from workers.download_media import ring_media
from workers.incoming_message import ring_waiting
from workers.outgoing_message import ring_lanes
from workers.session_fixer import ring_repairs
from workers.sip_refresh import note_lapses, ring_registrations
from workers.status_sync import ring_reports

_log = log.get()

SWEEP_SECONDS = 2.0
_SHORTEST_PAUSE = 0.1
_LEASE = timedelta(seconds=10)  # a clock that died is replaced after so long
_REAP_SECONDS = 5.0
_MARK = "pombal:rung-for"  # a hash: which Redis (`run_id`) a part has last rung for

_BELLS: dict[str, Callable[..., int]] = {
    "deliveries": ring_waiting,
    "lanes": ring_lanes,
    "files": ring_media,
    "sessions": ring_sessions,
    "reports": ring_reports,
    "repairs": ring_repairs,
}


class Clock:
    """Runs the three parts until `stop`."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        # These outlive a sweep that failed: the lease stays ours, and what Redis was before it went away is known.
        self._token = uuid4()
        self._sight = Sight(redis_client())

    def run(self) -> None:
        """Block until stopped."""
        parts = [
            threading.Thread(target=self._forever, args=(part,), name=part.__name__, daemon=True)
            for part in (self.ticks, self.sweep, self.reap)
        ]
        for thread in parts:
            thread.start()
        self._stop.wait()
        for thread in parts:
            thread.join(timeout=10)

    def stop(self) -> None:
        self._stop.set()

    def _forever(self, part: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                part()
            except Exception as error:
                # A part that fails is started again, by itself, for as long as the process lives.
                _tell(part, error)
                self._stop.wait(1)

    def ticks(self) -> None:
        """Enqueue the periodic actors whose minute has come."""
        actors = [actor for actor in broker.actors.values() if "periodic" in actor.options]
        while not self._stop.wait(60 - time.time() % 60):
            now = datetime.now(UTC).replace(second=0, microsecond=0)
            for actor in actors:
                if actor.options["periodic"].validate(now):
                    actor.send_with_options(scheduled_at=now.isoformat())

    def sweep(self) -> None:
        """Ring for waiting rows, every two seconds and whenever a lane falls due, while this clock has the lease."""
        while not self._stop.is_set():
            pause = SWEEP_SECONDS
            with db.session() as s:
                is_ours = Lease.take(s, "sweep", self._token, _LEASE)
            if is_ours:
                failed: list[str] = []
                with _guarded(note_lapses, failed):  # before anything that asks Redis
                    note_lapses()
                counts = self._ring(failed)
                with db.session() as s:
                    if not failed:
                        Lease.finished(s, "sweep", self._token)
                    next_due = Lane.seconds_until_due(s)
                if any(counts.values()):
                    _log.info("sweep_rang", **counts)
                if next_due is not None:  # scheduled messages leave on time
                    pause = min(pause, max(next_due, _SHORTEST_PAUSE))
            self._stop.wait(pause)
        with db.session() as s:
            Lease.release(s, "sweep", self._token)

    def _ring(self, failed: list[str]) -> dict[str, int]:
        """Ring for each kind of row; returns how often, without those that `failed` has then. Raises redis' errors."""
        self._sight.look()
        counts = {}
        for name, ring in _BELLS.items():
            with _guarded(ring, failed):
                # Rows first: whatever Redis had before it was wiped is rung for again.
                counts[name] = ring(at_once=self._sight.is_new_to(ring.__name__))
                self._sight.saw(ring.__name__)
        with _guarded(ring_registrations, failed):
            counts["accounts"] = ring_registrations()
        return counts

    def reap(self) -> None:
        """Touch every queue with a broker of its own whose every command does maintenance."""
        client = redis_client()
        reaper = HardenedBroker(client, [], maintenance_chance=1_000_000)
        try:
            while not self._stop.wait(_REAP_SECONDS):
                for queue in sorted(broker.get_declared_queues()):
                    reaper.do_qsize(queue)
                    reaper.do_qsize(f"{queue}.DQ")
        finally:
            client.close()


@contextmanager
def _guarded(part: Callable[..., object], failed: list[str]) -> Iterator[None]:
    """What fails in here is told of and added to `failed`, and the others go on."""
    try:
        yield
    except Exception as error:
        _tell(part, error)
        failed.append(part.__name__)


def _tell(part: Callable[..., object], error: Exception) -> None:
    if is_store_trouble(error):
        _log.warning("clock_part_waits", part=part.__name__, error=log.described(error))
    else:
        _log.error("clock_part_failed", part=part.__name__, exc_info=error)


class Sight:
    """Notices that Redis lost its queues: it was wiped, or it is another process than a part has rung for."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._run_id = b""
        self._known: dict[bytes, bytes] = {}

    def look(self) -> None:
        """Raises redis' errors while it is away."""
        self._run_id = str(self._client.info("server").get("run_id")).encode()
        known: Any = self._client.hgetall(_MARK)
        self._known = known

    def is_new_to(self, part: str) -> bool:
        """Whether the bells that this part rang earlier may be gone."""
        return self._known.get(part.encode()) != self._run_id

    def saw(self, part: str) -> None:
        """It has rung them again."""
        if self.is_new_to(part):
            self._client.hset(_MARK, part, self._run_id)


def main() -> int:
    """`pombal clock`: until SIGTERM or SIGINT, then 0."""
    clock = Clock()
    orders: list[int] = []

    def end(signum: int, frame: FrameType | None) -> None:
        orders.append(signum)  # nothing that locks: a handler may interrupt itself

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    publisher = metrics.Publisher().start()
    _log.info("clock_started", pid=os.getpid(), dramatiq=dramatiq.__version__)
    running = threading.Thread(target=clock.run, name="clock")
    running.start()
    while not orders:
        # A wait without an end could last for ever: of two signals at once one may go to a thread that is not this one.
        time.sleep(0.2)
    clock.stop()
    running.join()
    publisher.stop()
    return 0
