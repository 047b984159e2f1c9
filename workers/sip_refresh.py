"""Register SIP accounts, and again 60 seconds before they lapse; write down how each stands.

Queue `sip_refresh`, in: nothing. A job only wakes the registrar of its process (`_registrar.py`), which runs for as
long as a worker of this queue does and finds what is due by itself. In a process without one (`pombal run`) the job
registers what is due and ends. Safe to run twice and anywhere: accounts are claimed.
"""

import asyncio
import threading

from dramatiq import Broker, Worker
from dramatiq.middleware import Middleware

from models import Event, SipRegistration
from pombal import db, log, metrics
from pombal.broker import HardenedBroker, actor, broker
from pombal.errors import Permanent
from pombal.middleware import bell_may_be_lost
from workers._registrar import Registrar
from workers._rounds import new_loop
from workers._sip_outcomes import changes, is_reported, names_of, say_lapse

_log = log.get()

_QUEUE = "sip_refresh"
_PAUSE = 1.0  # seconds before a registrar that broke begins anew
_STOPPED = 15.0


@actor(queue=_QUEUE, max_retries=3, min_backoff=1_000, max_backoff=30_000, throws=Permanent)
def sip_refresh() -> None:
    """Register whatever is due."""
    if not resident.wake():
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(Registrar().run(once=True))


def ring_registrar() -> None:
    """Have what is due registered at once; while Redis is away, within a second."""
    with bell_may_be_lost():
        sip_refresh.send()


def note_lapses() -> None:
    """For the sweep, whatever is away but the database: write down which grants ran out."""
    with db.session() as s:
        db.see_all(s)
        lapsed = SipRegistration.lapse(s, is_reported=is_reported())
        Event.append(s, changes(lapsed))
    for row in lapsed:
        if row["lapsed_for"] is not None:
            say_lapse(row)
        else:
            _log.info("sip_unregistered", **names_of(row), error="its binding ended by itself")


def ring_registrations() -> int:
    """For the sweep: ring if an account waits, nobody has taken it and no job is there; returns how often it rang."""
    if isinstance(broker, HardenedBroker) and broker.waiting(_QUEUE) > 0:
        return 0
    with db.session() as s:
        db.see_all(s)
        is_waited_for = SipRegistration.is_waited_for(s)
    if not is_waited_for:
        return 0
    sip_refresh.send()
    metrics.sweeps.labels(queue=_QUEUE).inc()
    return 1


class Resident(Middleware):
    """The registrar of a worker process of this queue: it starts with the worker and ends with it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()
        self._lock = threading.Lock()  # between the loop that comes and goes, and those who call into it
        self._now: tuple[asyncio.AbstractEventLoop, Registrar] | None = None

    def wake(self) -> bool:
        """Have it look for what is due; False when there is none in this process."""
        if self._thread is None:
            return False
        self._call("wake")
        return True

    def after_worker_boot(self, broker: Broker, worker: Worker) -> None:
        if _QUEUE in worker.consumers:
            self._ending.clear()
            self._thread = threading.Thread(target=self._run, name="registrar", daemon=True)
            self._thread.start()

    def before_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        if self._thread is not None:
            self._ending.set()
            self._call("stop")
            self._thread.join(_STOPPED)
            self._thread = None

    def _call(self, what: str) -> None:
        with self._lock:
            if self._now is not None:
                loop, registrar = self._now
                loop.call_soon_threadsafe(getattr(registrar, what))

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                with asyncio.Runner(loop_factory=new_loop) as runner:
                    runner.run(self._registering())
            except Exception as error:
                # It goes on by itself for as long as the process lives: nobody else of this process does its work.
                _log.error("registrar_broke", traceback=log.redacted(error))
                self._ending.wait(_PAUSE)

    async def _registering(self) -> None:
        registrar = Registrar()
        with self._lock:
            self._now = (asyncio.get_running_loop(), registrar)
        try:
            if not self._ending.is_set():
                await registrar.run()
        finally:
            with self._lock:
                self._now = None


resident = Resident()
broker.add_middleware(resident)
