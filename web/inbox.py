"""Group commit: requests in flight share one INSERT, and hear "accepted" only after its commit.

A flush starts at once when none is running, else when the running one ends; it takes at most 200 bodies or 1 MiB,
sources in turn, so that one that floods does not hold up the rest. After the commit the bell rings for all of them,
off the request's path: Redis may be slow or away, the sweep will ring again (architecture.md, decision 1).
"""

import asyncio
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple
from uuid import UUID

import psycopg
import redis

from pombal import db, log, metrics
from pombal.errors import Unreachable
from pombal.ids import uuid7
from workers.incoming_message import BATCH, incoming_message

_log = log.get()

PATIENCE = 2.5  # seconds a request waits for its commit; 503 must be out within 3 (security-reliability.md W3)
_FLUSH_BYTES = 1024 * 1024
_MOST_WAITING = 64 * 1024 * 1024  # bytes in memory; one source may hold half of it (W13)
_MOST_BELLS = 1_000  # flushes that wait to be rung, each of at most 200 ids
_BELL_PAUSE = 0.050  # seconds between bells under load: fewer, fuller jobs

_INSERT = """
    INSERT INTO delivery (id, provider, app_id, channel_id, request_id, raw)
    SELECT * FROM unnest(%b::uuid[], %b::text[], %b::uuid[], %b::uuid[], %b::text[], %b::bytea[])
    ON CONFLICT DO NOTHING
"""


class Body(NamedTuple):
    """One proven webhook body on its way to its commit."""

    id: UUID
    provider: str
    app_id: UUID | None
    channel_id: UUID | None
    request_id: str
    raw: bytes
    accepted: asyncio.Future[None]


class Inbox:
    """The one writer of accepted bodies in this process. Runs on the event loop, between `start` and `stop`."""

    def __init__(self, database_url: str) -> None:
        self._url = database_url
        self._sources: OrderedDict[UUID | None, deque[Body]] = OrderedDict()
        self._held: dict[UUID | None, int] = {}
        self._waiting = asyncio.Event()
        self._connection: psycopg.AsyncConnection[tuple[object, ...]] | None = None
        self._bell = Bell()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Commit what waits, ring for it, and end."""
        self._stopping = True
        self._waiting.set()
        if self._task:
            await self._task
        if self._connection:
            await self._connection.close()
        await asyncio.to_thread(self._bell.stop)

    async def accept(
        self, provider: str, raw: bytes, request_id: str, *, app_id: UUID | None = None, channel_id: UUID | None = None
    ) -> UUID:
        """The delivery's id, once its row is committed. Raises `Unreachable` when that takes too long or fails."""
        source = app_id or channel_id
        held = self._held.get(source, 0)
        if held + len(raw) > _MOST_WAITING // 2 or sum(self._held.values()) + len(raw) > _MOST_WAITING:
            raise Unreachable("too many bodies wait for their commit")
        body = Body(uuid7(), provider, app_id, channel_id, request_id, raw, asyncio.get_running_loop().create_future())
        self._sources.setdefault(source, deque()).append(body)
        self._held[source] = held + len(raw)
        metrics.inbox_waiting.inc()
        self._waiting.set()
        try:
            async with asyncio.timeout(PATIENCE):
                await body.accepted
        except TimeoutError:
            raise Unreachable("the commit takes too long") from None
        return body.id

    async def _run(self) -> None:
        while True:
            await self._waiting.wait()
            batch = self._next()
            if not batch:
                if self._stopping:
                    return
                self._waiting.clear()
                continue
            try:
                async with asyncio.timeout(2 * PATIENCE):
                    await self._commit(batch)
            except Exception as error:  # whatever it is: nobody else writes, so this must go on
                _log.error("webhooks_not_committed", bodies=len(batch), error=log.described(error))
                await self._hang_up()
                for body in batch:
                    if not body.accepted.done():
                        body.accepted.set_exception(Unreachable("the database did not take it"))
                continue
            metrics.inbox_flush_rows.observe(len(batch))
            self._bell.ring([body.id for body in batch])
            for body in batch:
                if not body.accepted.done():
                    body.accepted.set_result(None)

    def _next(self) -> list[Body]:
        """The next flush: one body of each source in turn. Whoever stopped waiting is left out: nobody was told 200."""
        batch: list[Body] = []
        size = 0
        while self._sources and len(batch) < BATCH and size < _FLUSH_BYTES:
            source, waiting = self._sources.popitem(last=False)
            body = waiting.popleft()
            metrics.inbox_waiting.dec()
            self._held[source] -= len(body.raw)
            if waiting:
                self._sources[source] = waiting  # at the end of the round
            else:
                del self._held[source]
            if not body.accepted.done():
                batch.append(body)
                size += len(body.raw)
        return batch

    async def _commit(self, batch: list[Body]) -> None:
        is_new = self._connection is None
        try:
            await self._insert(batch)
        except psycopg.OperationalError:
            if is_new or (self._connection and not self._connection.closed):
                raise
            # It died while nothing was sent on it: a restart, a failover, somebody's idle timeout. If the rows did
            # get in, they conflict with themselves.
            await self._hang_up()
            await self._insert(batch)

    async def _insert(self, batch: list[Body]) -> None:
        if self._connection is None:
            self._connection = await psycopg.AsyncConnection.connect(
                self._url, autocommit=True, application_name="pombal-inbox", **{**db.CONNECT, "connect_timeout": 2}
            )
        ids, providers, apps, channels, requests, raws, _ = zip(*batch, strict=True)
        await self._connection.execute(
            _INSERT, [list(ids), list(providers), list(apps), list(channels), list(requests), list(raws)]
        )

    async def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection:
            try:
                await connection.close()
            except (psycopg.Error, OSError) as error:
                _log.debug("connection_not_closed", error=log.described(error))


def _ring_for_bodies(ids: list[UUID]) -> None:
    for start in range(0, len(ids), BATCH):
        incoming_message.send([str(id_) for id_ in ids[start : start + BATCH]])
        metrics.bells.labels(outcome="rung").inc()


class Bell:
    """Enqueues jobs in a thread of its own, so that no request ever waits for Redis (W2).

    `send` enqueues what there is to do for some ids. While Redis hangs only so many wait to be rung; the sweep rings
    for the rest.
    """

    def __init__(self, send: Callable[[list[UUID]], None] = _ring_for_bodies) -> None:
        self._send_for = send
        self._queue: queue.SimpleQueue[list[UUID] | None] = queue.SimpleQueue()
        self._stopping = False  # the thread's own: it has taken the None that `stop` puts
        self._thread = threading.Thread(target=self._run, name="bell", daemon=True)
        self._thread.start()

    def ring(self, ids: list[UUID]) -> None:
        if self._queue.qsize() >= _MOST_BELLS:
            metrics.bells.labels(outcome="lost").inc()
            return
        self._queue.put(ids)

    def stop(self) -> None:
        """Ring for what waits, as far as Redis lets, and end."""
        self._queue.put(None)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stopping:
            ids = self._queue.get()
            if ids is None:
                return
            while len(ids) < BATCH and not self._stopping:
                try:
                    more = self._queue.get_nowait()
                except queue.Empty:
                    break
                self._stopping = more is None
                ids = ids + (more or [])
            self._send(ids)
            if not self._stopping:
                time.sleep(_BELL_PAUSE)

    def _send(self, ids: list[UUID]) -> None:
        try:
            self._send_for(ids)
        except redis.RedisError as error:
            metrics.bells.labels(outcome="lost").inc()
            _log.warning("bell_lost", ids=len(ids), error=log.described(error))
            self._forget()

    def _forget(self) -> None:
        """Redis is away, and each try takes seconds: what came meanwhile is left to the sweep, and not to memory."""
        while not self._stopping:
            try:
                ids = self._queue.get_nowait()
            except queue.Empty:
                return
            self._stopping = ids is None
