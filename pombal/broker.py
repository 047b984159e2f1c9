"""The hardened broker, and `actor`. Import both from here: a worker then always finds the broker that was meant.

Dramatiq 2.2.1 on Redis, as it comes, loses or stalls jobs in a dozen ways (dramatiq.md §4). What is patched here is
its §5: a consumer and an `enqueue` that outlive an outage (H1), fail-safe retries (H2), one SIGTERM (H4), a watchdog
(H5). The reaper (H3) is in the clock. Ids travel in messages, never payloads.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import dramatiq
import msgspec
import redis
from dramatiq.brokers.redis import RedisBroker, _RedisConsumer
from dramatiq.brokers.stub import StubBroker
from dramatiq.encoder import Encoder
from dramatiq.errors import ConnectionClosed, DecodeError
from dramatiq.middleware import Middleware, TimeLimit
from dramatiq.worker import ConsumerThread, WorkerThread
from periodiq import PeriodiqMiddleware, cron

from pombal import log, metrics
from pombal.errors import Permanent
from pombal.middleware import (
    TIME_LIMIT_MS,
    DeadLetters,
    FailSafeRetries,
    JobMetrics,
    LogContext,
    Settled,
    SigtermOnce,
    Watchdog,
    is_redis_trouble,
    record_junk,
)
from pombal.settings import settings

__all__ = ["HEARTBEAT_MS", "actor", "broker", "cron", "redis_client"]

HEARTBEAT_MS = 15_000  # a process silent for so long is dead, and its jobs go back; the same in every process
_WAKE = "pombal:wake"
_IDLE = 1.0  # seconds between looks at a queue whose bell can be heard
_DEAF = 0.1  # … while it cannot
_WAITING = 0.2  # … at a delay queue that holds messages

_log = log.get()
P = ParamSpec("P")
R = TypeVar("R")


class JSON(Encoder):
    """The same JSON as Dramatiq's own encoder, four times as fast."""

    def encode(self, data: Any) -> bytes:
        return msgspec.json.encode(data)

    def decode(self, data: bytes) -> Any:
        return msgspec.json.decode(data)


class Wake:
    """Hears that a queue got a message, so that consumers need not poll: one subscription per process."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._events: dict[str, threading.Event] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.hears = False

    def wait(self, queue: str, timeout: float) -> None:
        """Return when the queue's bell rang since the last call, or after the timeout."""
        event = self._event(queue)
        event.wait(timeout)
        event.clear()

    def _event(self, queue: str) -> threading.Event:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._listen, name="wake", daemon=True)
                self._thread.start()
            return self._events.setdefault(queue, threading.Event())

    def _listen(self) -> None:
        while True:
            try:
                with self._client.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call] # redis-py's
                    pubsub.subscribe(_WAKE)
                    self.hears = True
                    while True:
                        message = pubsub.get_message(timeout=5)
                        if message:
                            event = self._events.get(message["data"].decode(errors="replace"))
                            if event:
                                event.set()
            except redis.RedisError:
                self.hears = False
                time.sleep(1)


class HardenedConsumer(_RedisConsumer):
    """A consumer that keeps its delayed messages through an outage, buries junk, and sleeps until its bell rings."""

    broker: "HardenedBroker"

    def __next__(self) -> Any:
        try:
            if not self.message_cache:
                self._fetch()
            if self.message_cache:
                message = self._decoded(self.message_cache[0])
                self.message_cache.pop(0)  # only now: junk that could not be buried is tried again
                return message
        except (ConnectionClosed, redis.ConnectionError, redis.TimeoutError, redis.ResponseError) as error:
            # Raising would make Dramatiq throw its in-memory delay queue away, for good (row 8).
            _log.warning("queue_unreachable", queue=self.queue_name, error=type(error).__name__)
            time.sleep(1)
        return None

    def _fetch(self) -> None:
        room = self.prefetch - self.outstanding_message_count
        if room > 0:
            self.message_cache = self.broker.do_fetch(self.queue_name, room)
        if not self.message_cache:
            if self.queue_name.endswith(".DQ") and self.queued_message_ids:
                idle = _WAITING
            else:
                idle = _IDLE if self.broker.wake.hears else _DEAF
            self.broker.wake.wait(self.queue_name, idle)

    def _decoded(self, data: bytes | None) -> Any:
        if data is None:  # its message is gone (a wiped or evicted key): nothing to run
            return None
        try:
            message = dramatiq.Message.decode(data)
            if not self._is_ours(message):
                raise DecodeError("not a message of this queue", data, None)  # type: ignore[no-untyped-call] # Dramatiq's
        except DecodeError:
            self._bury(data)
            return None
        self.queued_message_ids.add(message.message_id)
        return dramatiq.MessageProxy(message)

    def _is_ours(self, message: dramatiq.Message[Any]) -> bool:
        # A foreign queue name would kill the worker thread that looks its consumer up, and `throws` the one that fails.
        return (
            message.queue_name == self.queue_name
            and isinstance(message.options, dict)
            and isinstance(message.options.get("redis_message_id"), str)
            and isinstance(message.options.get("retries", 0), int)
            and "throws" not in message.options
            and isinstance(message.kwargs, dict)
            and isinstance(message.actor_name, str)
            and isinstance(message.message_id, str)
            and isinstance(message.message_timestamp, int)
        )

    def _bury(self, data: bytes) -> None:
        """Move one undecodable message to the dead letters; stock Dramatiq stops on it and its neighbours (row 15)."""
        ns, client = self.broker.namespace, self.broker.client
        fetched: Any = client.smembers(f"{ns}:__acks__.{self.broker.broker_id}.{self.queue_name}")
        for id_ in fetched:
            if client.hget(f"{ns}:{self.queue_name}.msgs", id_) == data:
                self.broker.do_nack(self.queue_name, id_)
        metrics.junk.labels(queue=self.queue_name.removesuffix(".DQ")).inc()
        _log.error("job_dead", queue=self.queue_name, error="not a message of this fleet")
        record_junk(self.queue_name.removesuffix(".DQ"), data)

    def ack(self, message: Any) -> None:
        self._answered(super().ack, message)

    def nack(self, message: Any) -> None:
        self._answered(super().nack, message)

    def requeue(self, messages: Any) -> None:
        self._answered(super().requeue, messages)

    def close(self) -> None:
        """Give back what was fetched and not handed on yet; stock Dramatiq leaves it in a stopped worker's hands."""
        fetched, self.message_cache = self.message_cache, []
        self._answered(self._give_back, fetched)

    def _give_back(self, fetched: list[bytes | None]) -> None:
        super().requeue([one for one in map(self._decoded, fetched) if one])  # type: ignore[no-untyped-call] # Dramatiq's

    @staticmethod
    def _answered(answer: Callable[[Any], None], given: Any) -> None:
        try:
            answer(given)
        except redis.RedisError as error:
            if not is_redis_trouble(error):
                raise
            # The worker tries such an answer again (rows 12, 13). What a stopping one cannot requeue, the reaper does.
            raise ConnectionClosed(error) from None  # type: ignore[no-untyped-call] # Dramatiq's


class HardenedBroker(RedisBroker):
    """Redis, with an `enqueue` that a worker never loses a message in, and a bell for idle consumers."""

    def __init__(self, client: redis.Redis, middleware: list[Middleware] | None = None, **options: Any) -> None:
        super().__init__(  # type: ignore[no-untyped-call] # Dramatiq leaves it untyped
            client=client, middleware=middleware, heartbeat_timeout=HEARTBEAT_MS, **options
        )
        self.wake = Wake(client)

    @property
    def consumer_class(self) -> type[HardenedConsumer]:
        return HardenedConsumer

    def enqueue(self, message: dramatiq.Message[Any], *, delay: int | None = None) -> dramatiq.Message[Any]:
        """As Dramatiq's. In a worker's or consumer's thread it waits for Redis as long as the process runs (row 9)."""
        while True:
            try:
                queued = super().enqueue(message, delay=delay)
                break
            except redis.RedisError as error:
                thread = threading.current_thread()
                is_worker = isinstance(thread, ConsumerThread | WorkerThread) and thread.running
                if not is_worker or not is_redis_trouble(error):
                    raise
                _log.warning("queue_unreachable", queue=message.queue_name)
                time.sleep(1)
        try:
            self.client.publish(_WAKE, queued.queue_name)
        except redis.RedisError:
            _log.debug("bell_not_heard")  # the message is queued; a consumer looks by itself every second
        return queued

    def waiting(self, queue: str) -> int:
        """How many messages wait in a queue that no process has fetched yet."""
        return int(self.client.llen(f"{self.namespace}:{queue}"))

    def forget_dead(self, queue: str, is_meant: Callable[[dict[str, Any]], bool]) -> None:
        """Take messages out of `<queue>.XQ`, once an operator has retried or dropped their dead letters."""
        dead, bodies = f"{self.namespace}:{queue}.XQ", f"{self.namespace}:{queue}.XQ.msgs"
        for id_, body in self.client.hscan_iter(bodies, count=500):
            try:
                message = msgspec.json.decode(body, type=dict[str, Any])
            except (msgspec.DecodeError, RecursionError):
                continue
            if is_meant(message):
                with self.client.pipeline() as both:
                    both.zrem(dead, id_)
                    both.hdel(bodies, id_)
                    both.execute()


def redis_client(url: str | None = None) -> redis.Redis:
    """A client for the queue. No retries inside: redis-py would repeat an enqueue whose reply was lost (row 11)."""
    tls: dict[str, Any] = {}
    url = url or settings().require_redis()
    if url.startswith("rediss://") and not settings().redis_tls_verify:
        tls = {"ssl_cert_reqs": "none"}
    return redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=2, health_check_interval=15, **tls)


def _middleware() -> list[Middleware]:
    # `before_*` run from top to bottom, `after_*` from bottom to top.
    return [
        Watchdog(),  # sees the very end of each job
        LogContext(),  # outside of all that log: every other's lines carry the job's name
        JobMetrics(),  # next: times all of the job, and sees what became of it after Retries decided
        DeadLetters(),  # what is rejected outside of a job
        FailSafeRetries(max_retries=3, min_backoff=1_000, max_backoff=60_000),
        PeriodiqMiddleware(skip_delay=55),  # a tick that is older is left to the next one
        TimeLimit(time_limit=TIME_LIMIT_MS, interval=1_000),  # innermost: its end must not fall into the others' hooks
        SigtermOnce(),
        Settled(),
    ]


def _make() -> HardenedBroker | StubBroker:
    dramatiq.set_encoder(JSON())
    url = settings().require_redis()
    if url == "memory://":  # by name only: falling back to it would lose jobs in production
        return StubBroker(middleware=_middleware())
    return HardenedBroker(redis_client(url), _middleware())


broker = _make()
dramatiq.set_broker(broker)


def actor(
    *,
    queue: str,
    max_retries: int,
    min_backoff: int = 1_000,
    max_backoff: int = 60_000,
    throws: type[Exception] | tuple[type[Exception], ...] = Permanent,
    **options: Any,
) -> Callable[[Callable[P, R]], dramatiq.Actor[P, R]]:
    """Declare an actor, its retry policy in sight: back-offs are milliseconds, doubled each time with jitter.

    `throws` go to the dead letters at the first failure.
    """

    def declare(function: Callable[P, R]) -> dramatiq.Actor[P, R]:
        return dramatiq.actor(
            queue_name=queue,
            max_retries=max_retries,
            min_backoff=min_backoff,
            max_backoff=max_backoff,
            throws=throws,
            broker=broker,
            **options,
        )(function)

    return declare
