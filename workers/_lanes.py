"""Sending from lanes, beside a worker's threads: one event loop per process, one task per lane that it has.

A provider that hangs holds up its own lane and no thread of the worker. A lane is worked in *turns*: in one commit the
answers that came are written down, what may go next is marked `sending` with its attempts, and the next candidates are
picked; then the calls are made, at the slots that the pace gives them. After a slice of time the lane is given back,
and its bell goes to the end of the queue. Not a queue, hence the underscore.

Files that the provider must have first go up beside the calls (`_uploads.py`). A slice does not end them: the lane is
kept, with its settings read anew, and its other messages go on. Files that go along with their messages are read from
the storage while they are sent; for each there is an attempt, so the slice goes on until their calls have ended.
"""

import asyncio
import functools
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from typing import TypeVar
from uuid import UUID, uuid4

import dramatiq
import redis
from dramatiq.middleware import Middleware

from models import Channel, Lane
from models.attempt import callback_of
from pombal import db, log, metrics
from pombal.errors import PombalError
from pombal.middleware import is_store_trouble
from pombal.pace import Pace, client_for_pace
from pombal.settings import settings
from providers import connect, http
from providers.download import allowance
from providers.outbound import Answer, Attachment, Fault, Kind, Outcome, Outgoing, Scope, Sender
from providers.storage import Missing, StorageUnavailable
from workers import _uploads
from workers._line import Line, Plan, Work
from workers._parcels import Stored
from workers._uploads import Damaged, Upload
from workers._verdicts import NO_FILE, NO_STORAGE, STOPPED

_log = log.get()
T = TypeVar("T")

_SLICE = 10.0  # seconds in a row that a lane may be sent from beside others
_ALONE = 60.0  # … and while this process has no other: then its settings are read again
_LOOK = 0.5  # seconds between looks at the line while all that goes on is waiting for answers
_GATHER = 0.02  # … that answers are gathered for, so that they share a commit
_STRAGGLES = 2.0  # seconds after which a call is not waited for alone
_HANGS = http.DEADLINE  # … that a slice goes on for at most when it ends with such a call
_TOO_LATE = 4.0  # … after its slot that a call must not leave any more; less than a lease
_STORE_PATIENCE = 60.0  # … that answers are held in memory while the database is away
_STOP_PATIENCE = 15.0  # … that calls under way are waited for when the process is told to stop
_UPLOADS = 4  # files at a time, of all lanes, first come first served
_UPLOAD_TRIES = 6  # of one that fails by our own fault, or does not get through
_ENCODED = 4 / 3  # what a file may grow to on its way
_THREADS = 4  # for the database, shared by all lanes, first come first served


class Lanes(Middleware):
    """The lanes that this process sends from."""

    def __init__(self, ring: Callable[[UUID], None]) -> None:
        self._ring = ring  # asks for another turn at the end of the queue
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._clients: http.Clients | None = None
        self._pace: Pace | None = None
        self._runs: dict[UUID, Run] = {}
        self.uploads = asyncio.Semaphore(_UPLOADS)
        self.has_worker = False
        self.stopping = False

    def after_worker_boot(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:
        self.has_worker = True

    def before_worker_shutdown(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:
        self.stop()

    def after_worker_shutdown(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:
        self.has_worker = self.stopping = False  # the process may go on without one, or have another

    def wake(self, channel_id: UUID) -> "Future[None]":
        """Send from this lane until its slice is over or nothing is due, here or wherever somebody has it.

        Returns at once. The future is done when this process has nothing more to do with the lane.
        """
        return asyncio.run_coroutine_threadsafe(self._wake(channel_id), self._started())

    def decide_held(self) -> None:
        """What was lost in lanes that are held is decided without sending anything."""
        with db.session() as s:
            db.see_all(s)
            held = Lane.held_in_doubt(s)
        self._started()
        for tenant_id, channel_id in held:
            Line.decide_held(tenant_id, channel_id, self.pace)

    def stop(self) -> None:
        """Begin nothing more, wait for the calls under way, and give all lanes back."""
        self.stopping = True
        with self._lock:
            loop = self._loop
        if loop:
            asyncio.run_coroutine_threadsafe(self._finish(), loop).result(_STOP_PATIENCE + 5)

    def _started(self) -> asyncio.AbstractEventLoop:
        # Not at import: a loop and its threads would not survive the fork that makes the worker's process.
        with self._lock:
            if self._loop is None:
                self._loop = _new_loop()
                self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="lanes")
                self._pace = Pace(client_for_pace(settings().require_redis()))
                threading.Thread(target=self._loop.run_forever, name="lanes", daemon=True).start()
            return self._loop

    async def _wake(self, channel_id: UUID) -> None:
        run = self._runs.get(channel_id)
        if run is None:
            if self.stopping:
                return  # whoever takes over is rung by the sweep
            run = self._runs[channel_id] = Run(self, channel_id)
            run.task = asyncio.create_task(self._work(run))
        else:
            run.look()
        await asyncio.shield(run.task)

    async def _work(self, run: "Run") -> None:
        try:
            is_due = await run.work()
        except Exception as error:
            # The lease runs out, and the sweep rings again; what was under way is unknown then.
            describe = {"channel_id": str(run.channel_id), "error": log.described(error)}
            if is_store_trouble(error):
                _log.warning("lane_waits_for_a_store", **describe)
            else:
                _log.error("lane_failed", **describe, traceback=log.redacted(error))
                if not self.has_worker:
                    raise  # to the command that waits for it
            is_due = False
        finally:
            del self._runs[run.channel_id]
        if is_due:
            try:
                await self.in_thread(functools.partial(self._ring, run.channel_id))
            except redis.RedisError as error:
                _log.warning("bell_lost", channel_id=str(run.channel_id), error=log.described(error))  # the sweep rings

    async def _finish(self) -> None:
        for run in self._runs.values():
            run.look()
        running = [run.task for run in self._runs.values()]
        if running:
            await asyncio.wait(running, timeout=_STOP_PATIENCE + 3)
        if self._clients:
            await self._clients.close()
            self._clients = None

    @property
    def is_alone(self) -> bool:
        return len(self._runs) == 1

    def clients(self) -> http.Clients:
        if self._clients is None:
            self._clients = http.Clients()
        return self._clients

    async def in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    @property
    def pace(self) -> Pace:
        assert self._pace is not None  # noqa: S101 - made with the loop that this runs on
        return self._pace


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class Run:
    """One slice of one lane's time."""

    task: "asyncio.Task[None]"

    def __init__(self, lanes: Lanes, channel_id: UUID) -> None:
        self.channel_id = channel_id
        self._lanes = lanes
        self._news = asyncio.Event()
        self._open: dict[asyncio.Task[None], Work] = {}
        self._done: list[tuple[Work, Answer]] = []
        self._uploading: set[asyncio.Task[None]] = set()
        self._uploaded: list[tuple[Upload, Answer]] = []
        self._in_wings: set[asyncio.Task[None]] = set()  # their calls have not begun: other files are on their way
        self._last_fire = 0.0
        self._renewed_at = 0.0  # the lane is ours for the length of a lease from then on

    def look(self) -> None:
        """There may be something new in the line, or a reason to stop."""
        self._news.set()

    async def work(self) -> bool:
        """Take the lane, send, give it back. True when something is due that may be sent: it wants another turn."""
        line = await self._lanes.in_thread(functools.partial(Line.take, self.channel_id, uuid4(), self._lanes.pace))
        if line is None:
            return False
        while True:
            try:
                sender = self._sender(line.channel)
            except PombalError as error:  # a secret that no key opens, say: an operator must see it, and mend it
                await self._drop_uploads()
                return await self._lanes.in_thread(functools.partial(line.refuse, str(error)))
            try:
                if await self._send_from(line, sender):
                    is_due = await self._lanes.in_thread(line.release)
                    return is_due or self._news.is_set()  # a bell that rang while the lane was being given back
                await self._lanes.in_thread(line.refresh)
            except Exception:
                await self._rescue(line)
                raise

    async def _send_from(self, line: Line, sender: Sender) -> bool:
        """One slice. False when a file is still going up, so that the lane must not be given back; else nothing is
        under way any more."""
        began, stop_at = time.monotonic(), None
        while True:
            length = _ALONE if self._lanes.is_alone else _SLICE
            # Nobody else could have the lane while a call hangs, so it may as well go on; but all may be that slow.
            is_over = time.monotonic() - began > length + self._longest_straggler()
            if self._lanes.stopping:
                is_over, stop_at = True, stop_at or time.monotonic() + _STOP_PATIENCE
                await self._drop_uploads()  # another process begins them anew
                for waiting in self._in_wings:
                    waiting.cancel()
                if time.monotonic() > stop_at:
                    self._give_up_waiting()
            # Files may take long, and for a slice that never ends no settings would be read.
            may_carry = time.monotonic() - began <= length
            plan = await self._turn(line, may_begin=not is_over, may_carry=may_carry)
            for work, slot in plan.begun:
                task = asyncio.create_task(self._deliver(sender, work, slot, line.gap))
                self._open[task] = work
                task.add_done_callback(self._closed)
            for upload in plan.uploads:
                self._begin_upload(sender, upload, line.channel.kind)
            if not self._open and not self._done and (is_over or not plan.goes_on):
                if not plan.is_ours or not (self._uploading or self._uploaded):
                    await self._drop_uploads()
                    self._news.clear()
                    return True
                if is_over:
                    return False
            await self._wait(plan, can_gather=len(self._open) > 1)

    def _longest_straggler(self) -> float:
        """How long a slice goes on for calls that take their time."""
        slow = [work for work in self._open.values() if time.monotonic() - work.begun_at > _STRAGGLES]
        return max((allowance(int(one.stored.size * _ENCODED)) if one.stored else _HANGS for one in slow), default=0.0)

    async def _rescue(self, line: Line) -> None:
        """Something is wrong with a turn of ours: what is under way is waited for, and written down one by one.

        But for the uploads: their messages were not sent, and come back by themselves.
        """
        await self._drop_uploads()
        if self._open:
            await asyncio.wait(self._open)
        for work, answer in self._done:
            try:
                await self._lanes.in_thread(
                    functools.partial(line.turn, [(work, answer)], under_way=[], may_begin=False)
                )
            except Exception as error:
                _log.error("answer_lost", message_id=str(work.id), error=log.described(error))
        self._done.clear()

    async def _turn(self, line: Line, *, may_begin: bool, may_carry: bool) -> Plan:
        """One commit. While the database is away the answers are kept here; nothing more is sent meanwhile."""
        done, self._done = self._done, []
        uploaded, self._uploaded = self._uploaded, []
        give_up_at = time.monotonic() + _STORE_PATIENCE
        while True:
            under_way = list(self._open.values())
            turn = functools.partial(
                line.turn, done, under_way=under_way, may_begin=may_begin, may_carry=may_carry, uploaded=uploaded
            )
            asked = time.monotonic()
            try:
                plan = await self._lanes.in_thread(turn)
                self._renewed_at = asked if plan.is_ours else 0.0
                return plan
            except Exception as error:
                if not is_store_trouble(error) or time.monotonic() > give_up_at:
                    self._done = done + self._done
                    raise
                _log.warning("answers_wait_for_a_store", answers=len(done), error=log.described(error))
            await asyncio.sleep(0.5)
            more, self._done = self._done, []
            done += more

    async def _wait(self, plan: Plan, *, can_gather: bool) -> None:
        """Until there is something to do: an answer, a bell, a slot, or the next look at the line."""
        if plan.wait is None or plan.wait > 0:
            try:
                async with asyncio.timeout(_LOOK if plan.wait is None else min(plan.wait, _LOOK)):
                    await self._news.wait()
            except TimeoutError:
                pass
            if (self._done or self._uploaded) and can_gather:
                await asyncio.sleep(_GATHER)
        self._news.clear()

    async def _deliver(self, sender: Sender, work: Work, slot: float, gap: float) -> None:
        if work.stored is None:
            answer = await self._call(sender, work, slot, gap)
        elif not await self._has_berth():
            answer = STOPPED
        else:
            try:
                # Its slot may be long past, but while it waited the lane was ours all the time.
                answer = await self._call_with_file(sender, work, work.stored, max(slot, self._renewed_at), gap)
            finally:
                self._lanes.uploads.release()
        self._done.append((work, answer))  # a turn may have begun another list meanwhile

    async def _has_berth(self) -> bool:
        """Wait until there is room for one more file in this process. False when the process is told to stop."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - it runs in one
        self._in_wings.add(task)
        try:
            await self._lanes.uploads.acquire()
        except asyncio.CancelledError:  # by ourselves: nothing has left yet
            return False
        finally:
            self._in_wings.discard(task)
        return True

    async def _call(
        self, sender: Sender, work: Work, slot: float, gap: float, attachment: Attachment | None = None
    ) -> Answer:
        """The call at its slot, and what came back."""
        # After a stall the slots that passed are made up for one by one, never in a bunch.
        fire_at = max(slot, time.monotonic(), self._last_fire + gap)
        self._last_fire = fire_at
        if (wait := fire_at - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        # Or the process stood still for so long that somebody else may have the lane by now.
        if self._lanes.stopping or time.monotonic() - slot > _TOO_LATE:
            return STOPPED
        outgoing = Outgoing(work.type, work.body, work.recipient, callback_of(work.attempt_id), attachment, work.quoted)
        began = time.monotonic()
        try:
            return await sender.send(outgoing)
        except (Missing, Damaged, StorageUnavailable):
            raise
        except Exception as error:  # of our own making: the call may have left
            _log.error("send_failed", channel_id=str(self.channel_id), traceback=log.redacted(error))
            return Answer(Outcome.UNKNOWN, why=type(error).__name__)
        finally:
            metrics.provider_seconds.labels(provider=work.provider, operation="send").observe(time.monotonic() - began)

    async def _call_with_file(self, sender: Sender, work: Work, stored: Stored, slot: float, gap: float) -> Answer:
        """The call with its file. One whose file did not get through as a whole did nothing, whatever came back."""
        reading = _Reading(stored.size)
        chunks = _uploads.chunks(stored.key, stored.size)
        async with aclosing(chunks), aclosing(reading.of(chunks)) as pieces:
            attachment = Attachment(stored.mime_type, stored.size, pieces)
            try:
                answer = await self._call(sender, work, slot, gap, attachment)
            except (Missing, Damaged):
                _log.error("media_missing", channel_id=str(self.channel_id))
                return NO_FILE
            except StorageUnavailable as error:
                _log.warning("send_waits_for_the_storage", channel_id=str(self.channel_id), error=str(error))
                return NO_STORAGE
            except asyncio.CancelledError:  # the process stops
                if reading.is_whole:
                    raise
                return STOPPED
        if answer.outcome is Outcome.UNKNOWN and not reading.is_whole:
            text = f"the file could not be handed over: {answer.why}"
            fault = Fault(Kind.TRANSIENT, Scope.MESSAGE, "upload_failed", text, tries=_UPLOAD_TRIES, is_outage=True)
            return Answer(Outcome.REFUSED, http_status=answer.http_status, fault=fault)
        return answer

    def _begin_upload(self, sender: Sender, upload: Upload, provider: str) -> None:
        task = asyncio.create_task(self._upload(sender, upload, provider))
        self._uploading.add(task)
        task.add_done_callback(self._uploading.discard)

    async def _upload(self, sender: Sender, upload: Upload, provider: str) -> None:
        async with self._lanes.uploads, aclosing(_uploads.chunks(upload.key, upload.size)) as chunks:
            began = time.monotonic()
            try:
                answer = await sender.upload(Attachment(upload.mime_type, upload.size, chunks))
            except (Missing, Damaged):
                _log.error("media_missing", channel_id=str(self.channel_id))
                answer = NO_FILE
            except StorageUnavailable as error:
                _log.warning("upload_waits_for_the_storage", channel_id=str(self.channel_id), error=str(error))
                answer = NO_STORAGE
            except Exception as error:  # of our own making
                _log.error("upload_failed", channel_id=str(self.channel_id), traceback=log.redacted(error))
                fault = Fault(Kind.TRANSIENT, Scope.MESSAGE, "internal", type(error).__name__, tries=_UPLOAD_TRIES)
                answer = Answer(Outcome.REFUSED, fault=fault)
        metrics.provider_seconds.labels(provider=provider, operation="upload").observe(time.monotonic() - began)
        self._uploaded.append((upload, answer))
        self._news.set()

    async def _drop_uploads(self) -> None:
        """End what goes up: nobody is any the wiser, and it may be begun again."""
        dropped = list(self._uploading)
        for task in dropped:
            task.cancel()
        if dropped:
            await asyncio.wait(dropped)

    def _closed(self, task: "asyncio.Task[None]") -> None:
        work = self._open.pop(task)
        if task.cancelled():
            self._done.append((work, Answer(Outcome.UNKNOWN, why="the process stopped before an answer came")))
        self._news.set()

    def _give_up_waiting(self) -> None:
        for task in self._open:
            task.cancel()

    def _sender(self, channel: Channel) -> Sender:
        return connect(channel.kind, self._lanes.clients(), channel.config, channel.secrets())


class _Reading:
    """How far a file has been read by whoever sends it."""

    def __init__(self, size: int) -> None:
        self._left = size
        self.is_whole = size <= 0  # set before its last piece is handed out, since that may leave at once

    async def of(self, chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        async for chunk in chunks:
            self._left -= len(chunk)
            self.is_whole = self._left <= 0
            yield chunk
