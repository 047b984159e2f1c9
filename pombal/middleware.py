"""What happens around every job: one class per concern. Their order is explained where the broker lists them."""

import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import redis
import structlog
from dramatiq import Broker, Message, MessageProxy, Worker
from dramatiq.common import compute_backoff
from dramatiq.errors import Retry
from dramatiq.middleware import Middleware, Retries

from models.dead_letter import DeadLetter, letter
from pombal import db, garbage, log, metrics
from pombal.errors import Permanent

_log = log.get()

TIME_LIMIT_MS = 120_000  # of a job that names none


class GivenUp(Permanent):
    """Raised by a worker that has written the dead letter itself, in the same commit as the row's verdict."""


class LogContext(Middleware):
    """Binds actor and message id to every line that a job logs."""

    def after_process_boot(self, broker: Broker) -> None:
        log.setup()  # the worker's standard error is another one than its parent's

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        structlog.contextvars.bind_contextvars(actor=message.actor_name, message_id=message.message_id)

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        structlog.contextvars.clear_contextvars()

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        structlog.contextvars.clear_contextvars()


class JobMetrics(Middleware):
    """Counts and times jobs, and publishes this process's numbers."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}
        self._publisher: metrics.Publisher | None = None

    def after_process_boot(self, broker: Broker) -> None:
        self._publisher = metrics.Publisher().start()

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        if self._publisher:
            self._publisher.stop()

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        self._began[message.message_id] = time.monotonic()
        if not message.options.get("retries") and not message.options.get("deferred"):
            waited = time.time() - message.message_timestamp / 1000
            metrics.job_wait.labels(queue=message.queue_name).observe(max(0.0, waited))

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        began = self._began.pop(message.message_id, None)
        if began is not None:
            metrics.job_seconds.labels(actor=message.actor_name).observe(time.monotonic() - began)
        if exception is None:
            outcome = "done"
        elif message.failed:
            outcome = "dead"
        else:
            outcome = "retried"
        metrics.jobs.labels(actor=message.actor_name, outcome=outcome).inc()

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        self._began.pop(message.message_id, None)
        metrics.jobs.labels(actor=message.actor_name, outcome="skipped").inc()


class FailSafeRetries(Retries):
    """Dramatiq's `Retries`, with three differences (dramatiq.md §4 row 10, §5 H2; design: two rings of safety).

    - A store that is away is not the job's fault: it is tried again without counting.
    - What is given up is written to `dead_letter` before it goes to `<queue>.XQ`.
    - An error in here ends in the dead letters. Stock Dramatiq swallows it and acknowledges the message: lost.
    """

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        if exception is None:
            return
        try:
            self._decide(broker, message, exception)
        except BaseException:  # a time limit that falls in here too (dramatiq.md §4 row 19)
            message.fail()
            raise

    def _decide(self, broker: Broker, message: MessageProxy, error: BaseException) -> None:
        options = broker.get_actor(message.actor_name).options
        if is_store_trouble(error):
            self._defer(broker, message, error)
            return
        retries = message.options.get("retries", 0)
        throws = options.get("throws")
        if (throws and isinstance(error, throws)) or retries >= options.get("max_retries", self.max_retries):
            self._give_up(broker, message, error, failures=retries + 1)
            return
        message.options["retries"] = retries + 1
        message.options["traceback"] = log.redacted(error)
        if isinstance(error, Retry) and error.delay is not None:
            delay = error.delay
        else:
            _, delay = compute_backoff(
                retries,
                factor=options.get("min_backoff", self.min_backoff),
                max_backoff=options.get("max_backoff", self.max_backoff),
            )
        metrics.job_retries.labels(actor=message.actor_name).inc()
        _log.warning(
            "job_retried",
            actor=message.actor_name,
            message_id=message.message_id,
            retries=retries + 1,
            delay_ms=delay,
            error=log.described(error),
        )
        broker.enqueue(message, delay=delay)  # type: ignore[arg-type] # as Dramatiq's own Retries passes the proxy

    def _defer(self, broker: Broker, message: MessageProxy, error: BaseException) -> None:
        deferred = message.options.get("deferred", 0) + 1
        message.options["deferred"] = deferred
        # Spread over half the delay, so that a store that comes back is not run over (O3 asks the same of sends).
        delay = int(min(15_000, 500 * 2 ** min(deferred, 8)) * random.uniform(0.5, 1))  # noqa: S311 - jitter
        _log.warning(
            "job_deferred",
            actor=message.actor_name,
            message_id=message.message_id,
            delay_ms=delay,
            error=log.described(error),
        )
        broker.enqueue(message, delay=delay)  # type: ignore[arg-type] # as above

    def _give_up(self, broker: Broker, message: MessageProxy, error: BaseException, *, failures: int) -> None:
        if not isinstance(error, GivenUp):
            try:
                record(message, error, failures=failures)
            except Exception as store_error:
                if not db.is_store_trouble(store_error):
                    raise
                self._defer(broker, message, store_error)
                return
        message.options["letter"] = True
        _log.error(
            "job_dead",
            actor=message.actor_name,
            message_id=message.message_id,
            failures=failures,
            error=log.described(error),
        )
        message.fail()


class DeadLetters(Middleware):
    """Copies what Dramatiq rejects by itself, such as an unknown actor, to `dead_letter`."""

    def after_nack(self, broker: Broker, message: MessageProxy) -> None:
        if message.options.get("letter"):
            return
        error = message._exception or Permanent("rejected by the queue")
        record(message, error, failures=message.options.get("retries", 0) + 1)
        _log.error("job_dead", message_id=message.message_id, error=log.described(error))


class SigtermOnce(Middleware):
    """Hosts signal the whole process group, and Dramatiq's second SIGTERM kills at once (dramatiq.md §4 row 4)."""

    def after_process_boot(self, broker: Broker) -> None:
        installed = signal.getsignal(signal.SIGTERM)
        seen = False

        def once(signum: int, frame: FrameType | None) -> None:
            nonlocal seen
            if not seen and callable(installed):
                seen = True
                installed(signum, frame)

        signal.signal(signal.SIGTERM, once)


class Settled(Middleware):
    """Has what a worker process has imported left alone by the search for garbage."""

    def after_process_boot(self, broker: Broker) -> None:
        garbage.settled()


class Watchdog(Middleware):
    """Ends a worker process that cannot work: a dead or hung thread (dramatiq.md §5 H5), no parent to restart it (X6).

    A thread hangs when its job is not over so long after its time limit: the limit cannot interrupt a thread that waits
    for a lock or inside a C library, and nobody would ever see it again.
    """

    def __init__(self, period: float = 2.0, grace: float = 60.0) -> None:
        self._period = period
        self._grace = grace
        self._overdue: dict[str, float] = {}  # message id → when its job counts as hung, monotonic
        self._stopping = threading.Event()

    def after_worker_boot(self, broker: Broker, worker: Worker) -> None:
        threading.Thread(target=self._watch, args=(worker, os.getppid()), name="watchdog", daemon=True).start()

    def before_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        self._stopping.set()

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        actor = broker.actors.get(message.actor_name)  # not every name has one
        limit = actor.options.get("time_limit", TIME_LIMIT_MS) if actor else TIME_LIMIT_MS
        self._overdue[message.message_id] = time.monotonic() + limit / 1000 + self._grace

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        # Not after the ack: while Redis is away that is tried again for ever, and the job is done.
        self._overdue.pop(message.message_id, None)

    after_skip_message = after_process_message

    def _watch(self, worker: Worker, parent: int) -> None:
        while not self._stopping.wait(self._period):
            dead = [t.name for t in (*worker.workers, *worker.consumers.values()) if not t.is_alive()]
            if dead and not self._stopping.is_set():
                _log.critical("worker_thread_died", threads=len(dead))
                os._exit(70)
            now = time.monotonic()
            if hung := [id_ for id_, at in list(self._overdue.items()) if at < now]:
                _log.critical("job_hung", message_ids=hung)
                os._exit(70)
            if os.getppid() != parent:
                _log.critical("worker_parent_died")
                os.kill(os.getpid(), signal.SIGTERM)
                return


def is_store_trouble(error: BaseException) -> bool:
    """Postgres or Redis away, slow or full: whatever ran then deserves another try that does not count."""
    return db.is_store_trouble(error) or is_redis_trouble(error)


@contextmanager
def bell_may_be_lost(event: str = "bell_lost", **names: object) -> Iterator[None]:
    """Where jobs are enqueued for what is committed: while Redis is away the sweep, or the next round, does it later.

    Says so in a line of that name; other errors are raised.
    """
    try:
        yield
    except Exception as error:
        if not is_redis_trouble(error):
            raise
        _log.warning(event, **names, error=log.described(error))


def is_redis_trouble(error: BaseException) -> bool:
    """Away, slow, full, read-only after a failover, or (MISCONF) unable to write to its disk."""
    trouble = redis.ConnectionError | redis.TimeoutError | redis.OutOfMemoryError | redis.ReadOnlyError
    return isinstance(error, trouble) or (isinstance(error, redis.ResponseError) and "MISCONF" in str(error))


def record(message: MessageProxy | Message[Any], error: BaseException, *, failures: int) -> None:
    """Write the dead letter of a job."""
    _write(
        letter(
            key=f"job:{message.message_id}",
            actor=message.actor_name,
            queue=message.queue_name.removesuffix(".DQ"),
            args=list(message.args),
            kwargs=dict(message.kwargs),
            error=log.described(error),
            traceback=log.redacted(error),
            cause=cause(error),
            failures=failures,
        )
    )


def _write(row: dict[str, Any]) -> None:
    for is_last in (False, True):
        try:
            with db.session() as s:
                DeadLetter.record(s, [row])
            return
        except Exception as error:
            # After a restart of the database the pool's connections are dead, and the first use of one says so. To wait
            # for the next try of the job would be to run it once more.
            if is_last or not db.is_store_trouble(error):
                raise


def record_junk(queue: str, data: bytes) -> None:
    """Write the dead letter of a queue message that nobody can decode; its bytes stay in the queue's XQ."""
    text = "not a message of this fleet (junk, or another encoder)"
    key = f"junk:{hashlib.sha256(data).hexdigest()}"
    try:
        _write(letter(key=key, actor="unknown", queue=queue, args=[], error=text))
    except Exception as error:
        if not db.is_store_trouble(error):
            raise
        _log.warning("dead_letter_not_copied", queue=queue)


def cause(error: BaseException) -> str:
    """What tells one origin of errors from another: the type and the place it was raised at."""
    frames = log.redacted(error).splitlines()
    return f"{type(error).__name__}\n{frames[0] if frames else ''}"
