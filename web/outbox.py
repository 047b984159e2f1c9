"""Group commit of what is to be sent: requests in flight share one transaction, and hear "queued" after its commit.

As in `web/inbox.py` a flush starts at once when none is running, tenants take turns, and the bell rings off the
request's path. Other than there, each request has a verdict of its own (channel and what it can send, idempotency key,
files, references, window, template), and one that was told 503 is not sent: whoever stops waiting is taken out before
the commit begins. A lock that somebody holds, such as that of a lane, is a 503 for the tenant who needs it and for
nobody else.

The transaction touches its tables in this order, as all who write them do: contact_identity, contact, message, lane,
conversation, event (architecture.md, decision 2).
"""

import asyncio
import contextlib
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID

from sqlalchemy import Row, RowMapping, or_, select, text, tuple_
from sqlalchemy.orm import Session

from models import (
    Channel,
    Conversation,
    File,
    Lane,
    MediaState,
    Message,
    MessageStatus,
    Template,
    outgoing,
)
from models.contact import Meeting
from models.event import Event
from pombal import db, log, metrics
from pombal.errors import Unreachable
from pombal.ids import uuid7
from web import kinds
from web.errors import Failure
from web.inbox import Bell
from web.refusals import wrong
from web.shapes import Ask, OwnFile, identity, unfit
from workers.outgoing_message import outgoing_message

_log = log.get()

PATIENCE = 2.5  # seconds a request waits for its commit; 503 must be out within 3 (security-reliability.md W3)
_LAST_PATIENCE = 0.4  # … and more when the commit has begun: nobody can take part in it back
# A lock that somebody holds: the first wait is longer than Postgres takes to see a deadlock (1 s), and leaves enough of
# the patience to find out which tenants are concerned.
_LOCK_WAIT = 1.2  # seconds
_NEXT_LOCK_WAIT = 0.1
_PARTS = 8  # that the tenants of a flush are parted into, in each round, where it is no lane
_LOCKED_FOR = 5.0  # seconds that such a tenant comes after all others, and that all flushes begin with the second wait
_TIME_FOR_THE_LOCKED = 0.5  # seconds of a flush; others wait for their turn meanwhile
_MOST_IN_A_FLUSH = 200
_FLUSH_BYTES = 1024 * 1024
_MOST_WAITING = 64 * 1024 * 1024  # bytes in memory; one tenant may hold half of it (W13)
_MOST_RUNS = 6  # of one transaction that keeps meeting others in a deadlock
_GOOD_TEMPLATES = ("approved", "reinstated")


class Queued(NamedTuple):
    """A request that became a message, or had become one before under the same key."""

    id: UUID
    status: str
    channel_id: UUID | None = None  # from here on: only of a new one
    provider: str = ""
    is_due: bool = False


Answer: TypeAlias = Queued | Failure | Unreachable


class Order:
    """One request on its way to its commit."""

    def __init__(self, tenant_id: UUID, ask: Ask, key: str | None, request_id: str, size: int) -> None:
        self.id = uuid7()
        self.tenant_id, self.ask, self.key, self.request_id, self.size = tenant_id, ask, key, request_id, size
        self.answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.is_gone = False  # nobody waits for the answer any more
        self.is_committing = False


class Outbox:
    """The one writer of queued messages in this process. Runs on the event loop, between `start` and `stop`."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[UUID, deque[Order]] = OrderedDict()
        self._held: dict[UUID, int] = {}
        self._locked: dict[UUID, float] = {}  # tenants that met a held lock, and until when that is remembered
        self._wary_until = 0.0  # the same of any
        self._waiting = asyncio.Event()
        self._writer = Writer()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="outbox")  # its own: others may all be busy
        self._bell = Bell(_ring_for_channels)
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
        self._thread.shutdown(wait=False)
        await asyncio.to_thread(self._bell.stop)

    async def queue(
        self, tenant_id: UUID, ask: Ask, key: str | None, request_id: str, size: int, patience: float = PATIENCE
    ) -> Queued:
        """The message, once its row is committed. Raises its `Failure`, or `Unreachable` when that takes too long."""
        held = self._held.get(tenant_id, 0)
        if held + size > _MOST_WAITING // 2 or sum(self._held.values()) + size > _MOST_WAITING:
            raise Unreachable("too many messages wait for their commit")
        order = Order(tenant_id, ask, key, request_id, size)
        self._tenants.setdefault(tenant_id, deque()).append(order)
        self._held[tenant_id] = held + size
        self._waiting.set()
        try:
            done, _ = await asyncio.wait({order.answered}, timeout=patience)
            if not done and not self._writer.leave_out(order):
                done, _ = await asyncio.wait({order.answered}, timeout=_LAST_PATIENCE)
                self._writer.leave_out(order)  # for a commit that failed, and is being tried again
        except asyncio.CancelledError:
            self._writer.leave_out(order)
            raise
        answer = order.answered.result() if done else Unreachable("the commit takes too long")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ring(self, channel_id: UUID) -> None:
        """Something may be due in this channel's lane."""
        self._bell.ring([channel_id])

    async def _run(self) -> None:
        while True:
            await self._waiting.wait()
            batch = self._next()
            if not batch:
                if self._stopping:
                    return
                self._waiting.clear()
                continue
            now = time.monotonic()
            self._locked = {id_: until for id_, until in self._locked.items() if until > now}
            locked = set(self._locked)
            lock_wait = _NEXT_LOCK_WAIT if now < self._wary_until else _LOCK_WAIT
            await self._commit([order for order in batch if order.tenant_id not in locked], lock_wait)
            until = time.monotonic() + _TIME_FOR_THE_LOCKED
            await self._commit([order for order in batch if order.tenant_id in locked], _NEXT_LOCK_WAIT, until)

    async def _commit(self, batch: list[Order], lock_wait: float, until: float = math.inf) -> None:
        """Commit these orders and answer them at once. Where a lock is held, tenants are parted until one is left.

        What has not begun at `until` is given up.
        """
        batch = [order for order in batch if not order.is_gone]
        if not batch:
            return
        if time.monotonic() > until:
            self._give_up(batch)
            return
        answers: dict[UUID, Answer] = {}
        failure: Exception | None = None
        try:
            await self._write(batch, answers, lock_wait)
        except Exception as error:  # whatever it is: nobody else writes, so this must go on
            failure = error
        answers = dict(answers)  # a write that nobody waited for goes on in its thread
        self._bell_for(answers)
        for order in batch:
            if order.id in answers:
                self._locked.pop(order.tenant_id, None)
                order.answered.set_result(answers[order.id])
        left = [order for order in batch if order.id not in answers]
        if isinstance(failure, Held):
            self._wary_until = time.monotonic() + _LOCKED_FOR
            self._locked.update(dict.fromkeys(failure.tenants, self._wary_until))
            tenants = list(dict.fromkeys(order.tenant_id for order in left))
            if len(tenants) > 1:
                await self._commit_apart(left, tenants, failure.tenants, until)
                return
        if failure is not None:
            _log.error("messages_not_queued", messages=len(left), error=log.described(failure.__cause__ or failure))
        self._give_up(left)

    async def _commit_apart(self, orders: list[Order], tenants: list[UUID], held: set[UUID], until: float) -> None:
        """The others before those whose lanes are held; else in equal parts."""
        parts = [{id_ for id_ in tenants if id_ not in held}, held]
        if not all(parts):
            size = -(-len(tenants) // _PARTS)
            parts = [set(tenants[n : n + size]) for n in range(0, len(tenants), size)]
        for part in parts:
            if part <= held:
                until = min(until, time.monotonic() + _TIME_FOR_THE_LOCKED)
            await self._commit([order for order in orders if order.tenant_id in part], _NEXT_LOCK_WAIT, until)

    def _give_up(self, orders: list[Order]) -> None:
        for order in orders:
            order.answered.set_result(Unreachable("the database did not take it"))

    async def _write(self, batch: list[Order], answers: dict[UUID, Answer], lock_wait: float) -> None:
        """Raises after a while even if the thread hangs; who was not committed by then will not be."""
        writing = asyncio.get_running_loop().run_in_executor(
            self._thread, self._writer.write, batch, answers, lock_wait
        )
        try:
            async with asyncio.timeout(2 * PATIENCE):
                await asyncio.shield(writing)
        except TimeoutError:
            writing.add_done_callback(_note_late)
            for order in batch:
                self._writer.leave_out(order)
            raise Unreachable("the database does not answer") from None

    def _bell_for(self, answers: dict[UUID, Answer]) -> None:
        due = {answer.channel_id for answer in answers.values() if isinstance(answer, Queued) and answer.is_due}
        channels = [id_ for id_ in due if id_ is not None]
        if channels:
            self._bell.ring(channels)

    def _next(self) -> list[Order]:
        """The next flush: one order of each tenant in turn. Whoever stopped waiting is left out."""
        batch: list[Order] = []
        size = 0
        while self._tenants and len(batch) < _MOST_IN_A_FLUSH and size < _FLUSH_BYTES:
            tenant_id, waiting = self._tenants.popitem(last=False)
            order = waiting.popleft()
            self._held[tenant_id] -= order.size
            if waiting:
                self._tenants[tenant_id] = waiting  # at the end of the round
            else:
                del self._held[tenant_id]
            if not order.is_gone:
                batch.append(order)
                size += order.size
        return batch


def _note_late(writing: asyncio.Future[None]) -> None:
    """What became of a flush that nobody waited for."""
    error = None if writing.cancelled() else writing.exception()
    if error is not None:
        _log.warning("late_flush_failed", error=log.described(error))


def _ring_for_channels(ids: list[UUID]) -> None:
    for id_ in dict.fromkeys(ids):
        outgoing_message.send(str(id_))
        metrics.bells.labels(outcome="rung").inc()


class Held(Exception):
    """Somebody holds a lock that a batch needs: that of a lane of these tenants, or another one if there are none."""

    def __init__(self, tenants: set[UUID]) -> None:
        super().__init__("somebody holds a lock")
        self.tenants = tenants


class Writer:
    """Writes batches, in a thread, and knows who may still leave."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def leave_out(self, order: Order) -> bool:
        """Nobody waits for it any more. False when it is too late: its commit has begun."""
        with self._lock:
            order.is_gone = not order.is_committing
            return order.is_gone

    def write(self, batch: list[Order], answers: dict[UUID, Answer], lock_wait: float = _LOCK_WAIT) -> None:
        """Commit a batch and note each one's answer. One that the database refuses costs the others nothing.

        Raises what the store's trouble is, or `Held`; those without an answer are then not queued, unless the commit
        itself was cut off.
        """
        for run in range(_MOST_RUNS):
            batch = [order for order in batch if not order.is_gone]
            if not batch:
                return
            try:
                with db.session({order.tenant_id for order in batch}) as s:
                    flush = Flush(s, batch, lock_wait)
                    while left := self._who_left(flush):
                        flush.take_out(left)
                answers.update(flush.answers)
                return
            except Exception as error:
                if not self._is_rolled_back(batch, error) or run == _MOST_RUNS - 1:
                    raise
                if db.is_worth_rerunning(error) or (run == 0 and was_cut_off(error)):
                    continue  # nothing had been sent on that connection: a restart, a failover, an idle timeout
                if db.is_locked(error):
                    tenants = {order.tenant_id for order in batch}
                    raise Held(tenants if len(tenants) == 1 else _whose_lanes_are_held(tenants)) from error
                if db.is_store_trouble(error):
                    raise
                if len(batch) == 1:
                    _log.error("message_not_queued", request_id=batch[0].request_id, error=log.described(error))
                    answers[batch[0].id] = Failure(500, "INTERNAL_ERROR", "something went wrong here")
                    return
                for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                    self.write(half, answers, lock_wait)
                return

    def _who_left(self, flush: "Flush") -> list[Order]:
        """New messages that nobody waits for. When there is none, the commit may begin: nobody can leave any more."""
        with self._lock:
            left = flush.unwanted()
            for order in flush.batch if not left else ():
                order.is_committing = True
            return left

    def _is_rolled_back(self, batch: list[Order], error: Exception) -> bool:
        """Whether this error leaves nothing behind. A connection that ends during a commit says neither yes nor no."""
        with self._lock:
            if any(order.is_committing for order in batch) and was_cut_off(error):
                return False
            for order in batch:
                order.is_committing = False
            return True


def was_cut_off(error: Exception) -> bool:
    """Whether a connection that had been good ended: another one is worth a try."""
    return db.is_store_trouble(error) and bool(getattr(error, "connection_invalidated", False))


class Draft:
    """What is known so far of a message that is going to be queued."""

    def __init__(self, order: Order) -> None:
        self.order, self.ask, self.tenant_id = order, order.ask, order.tenant_id
        self.channel_id = UUID(int=0)
        self.provider = ""
        self.reference: RowMapping | None = None
        self.contact_id = UUID(int=0)
        self.conversation_id = UUID(int=0)
        self.not_before: datetime | None = None

    @property
    def identity(self) -> tuple[tuple[str, str], ...]:
        """The recipient as webhooks would name them."""
        return (identity(self.ask.recipient or ""),)


class Flush:
    """One transaction over a batch. `answers` has one for each order; a refused one writes nothing."""

    def __init__(self, s: Session, batch: list[Order], lock_wait: float) -> None:
        self._s = s
        self.batch = batch
        self._now: datetime = s.execute(_BEGIN, {"lock_wait": f"{lock_wait * 1000:.0f}"}).scalar_one()
        self.answers: dict[UUID, Answer] = {}
        self._twins: list[tuple[Order, Order]] = []  # of one key in this batch: the first, and another
        self._new: dict[UUID, UUID] = {}  # the messages, and their events

        drafts = [Draft(order) for order in self._first_of_each_key(batch)]
        for step in (
            self._find_channels,
            self._find_files,
            self._find_references,
            self._check_templates,
            self._meet,
            self._check_windows,
        ):
            drafts = self._good_ones(drafts, step(drafts))
        if drafts:
            self._insert(drafts)
        for first, other in self._twins:
            same = self.answers[first.id] if first.ask.digest == other.ask.digest else _key_conflict()
            self.answers[other.id] = Queued(same.id, same.status) if isinstance(same, Queued) else same

    def unwanted(self) -> list[Order]:
        """Orders that became a message for which nobody waits any more: neither they, nor a twin."""
        wanted = {first.id for first, other in self._twins if not other.is_gone}
        return [order for order in self.batch if order.is_gone and order.id in self._new and order.id not in wanted]

    def take_out(self, orders: list[Order]) -> None:
        """Undo these messages: whoever was told 503 may ask again, and must not get two."""
        events = [self._new.pop(order.id) for order in orders]
        tenants = [order.tenant_id for order in orders]
        self._s.execute(_NO_EVENTS, {"tenants": tenants, "ids": events})
        self._s.execute(_NO_MESSAGES, {"tenants": tenants, "ids": [order.id for order in orders]})
        for order in orders:
            del self.answers[order.id]

    def _good_ones(self, drafts: list[Draft], refused: Iterator[tuple[Draft, Failure]]) -> list[Draft]:
        found = {draft.order.id: failure for draft, failure in refused}
        self.answers.update(found)
        return [draft for draft in drafts if draft.order.id not in found]

    def _first_of_each_key(self, batch: list[Order]) -> list[Order]:
        """The orders that nobody has asked for before."""
        keys = [(order.tenant_id, order.key) for order in batch if order.key is not None]
        known = Message.by_key(self._s, list(dict.fromkeys(keys)))
        first: dict[tuple[UUID, str], Order] = {}
        new = []
        for order in batch:
            if order.key is not None:
                key = (order.tenant_id, order.key)
                if key in known:
                    self.answers[order.id] = _as_before(order, known[key])
                    continue
                if key in first:
                    self._twins.append((first[key], order))
                    continue
                first[key] = order
            new.append(order)
        return new

    def _find_channels(self, drafts: list[Draft]) -> Iterator[tuple[Draft, Failure]]:
        channels = channels_of(self._s, {(draft.tenant_id, draft.ask.channel) for draft in drafts})
        for draft in drafts:
            own = channels.get(draft.tenant_id, [])
            found = channel_named(own, draft.ask.channel) if draft.ask.channel is not None else default_channel(own)
            if isinstance(found, Failure):
                yield draft, found
            elif failure := kinds.refusal(found.kind, draft.ask, found.gateway):
                yield draft, failure
            else:
                draft.channel_id, draft.provider = found.id, found.kind
                if draft.ask.not_before is not None and draft.ask.not_before > self._now:
                    draft.not_before = draft.ask.not_before

    def _find_files(self, drafts: list[Draft]) -> Iterator[tuple[Draft, Failure]]:
        """Files of ours must be this tenant's, stored, and of a kind and size that the provider takes."""
        ids = [(draft.tenant_id, id_) for draft in drafts for file in draft.ask.files if (id_ := _uuid(file.name))]
        known = File.of_media(self._s, ids)
        for draft in drafts:
            for file in draft.ask.files:
                id_ = _uuid(file.name)
                failure = _unusable(file, known.get((draft.tenant_id, id_)) if id_ else None)
                if failure is not None:
                    yield draft, failure
                    break

    def _find_references(self, drafts: list[Draft]) -> Iterator[tuple[Draft, Failure]]:
        asked = [(d.tenant_id, d.channel_id, d.ask.reference.name) for d in drafts if d.ask.reference is not None]
        named = Message.named(self._s, asked)
        for draft in drafts:
            if draft.ask.reference is None:
                continue
            name, field = draft.ask.reference
            found = named.get((draft.tenant_id, draft.channel_id, name))
            if found is None or (found["type"] == "read" and found["direction"] == "out"):
                yield draft, wrong(field, "names no message of this channel")
            elif draft.ask.type == "read" and found["direction"] != "in":
                yield draft, wrong(field, "names a message that was not received")
            elif found["provider_id"] is None and found["status"] in (MessageStatus.FAILED, MessageStatus.CANCELLED):
                yield draft, wrong(field, "names a message that was not sent")
            else:
                draft.reference = found

    def _check_templates(self, drafts: list[Draft]) -> Iterator[tuple[Draft, Failure]]:
        keys = {
            d: (d.tenant_id, d.channel_id, *d.ask.template)
            for d in drafts
            if d.ask.template is not None and kinds.has_template_checks(d.provider)
        }
        statuses = Template.statuses(self._s, list(keys.values()))
        for draft, key in keys.items():
            status = statuses.get(key)
            if status is not None and status not in _GOOD_TEMPLATES:
                # What the provider would answer (whatsapp-cloud-api.md §13).
                details = {"reason": "template_not_approved", "code": "132001", "status": status}
                yield draft, Failure(422, "INVALID_PAYLOAD", "this template is not approved", details=details)

    def _meet(self, drafts: list[Draft]) -> Iterator[tuple[Draft, Failure]]:
        """Whom it is for, and in which conversation. A receipt belongs to that of the message that was read."""
        people = Meeting()
        for draft in drafts:
            if draft.ask.recipient is not None:
                people.meet(draft.tenant_id, draft.channel_id, draft.identity, (), None, self._now)
        people.settle(self._s)
        for draft in drafts:
            if draft.ask.recipient is not None:
                draft.contact_id = people.whom(draft.tenant_id, draft.channel_id, draft.identity)
                draft.conversation_id = Conversation.id_of(draft.channel_id, draft.contact_id)
                if draft.reference is not None and draft.reference["conversation_id"] != draft.conversation_id:
                    field = draft.ask.reference.field if draft.ask.reference is not None else "$"
                    yield draft, wrong(field, "names a message of another conversation")
            elif draft.reference is not None:
                draft.contact_id = draft.reference["contact_id"]
                draft.conversation_id = draft.reference["conversation_id"]

    def _check_windows(self, drafts: list[Draft]) -> Iterator[tuple[Draft, Failure]]:
        """Free-form messages need an open window now; one for later may find another (whatsapp-cloud-api.md §10)."""
        free = [
            d
            for d in drafts
            if d.ask.type not in ("template", "read") and d.not_before is None and kinds.has_window(d.provider)
        ]
        windows = Conversation.windows(self._s, [(draft.tenant_id, draft.conversation_id) for draft in free])
        for draft in free:
            until = windows.get((draft.tenant_id, draft.conversation_id))
            if until is not None and until < self._now:
                details = {"reason": "window_closed", "code": "131047", "window_until": until.isoformat()}
                message = "more than 24 hours have passed since the customer's last message: only templates are allowed"
                yield draft, Failure(422, "INVALID_PAYLOAD", message, details=details)

    def _insert(self, drafts: list[Draft]) -> None:
        new_ids = Message.queue(self._s, [_row(draft) for draft in drafts])
        new = [draft for draft in drafts if draft.order.id in new_ids]
        self._note_the_slower([draft.order for draft in drafts if draft.order.id not in new_ids])
        Lane.expect(
            self._s,
            [{"tenant_id": d.tenant_id, "channel_id": d.channel_id, "due_at": d.not_before} for d in new],
        )
        Conversation.touch(self._s, self._touched(new))
        events = {draft.order.id: _event(draft) for draft in new}
        Event.append(self._s, list(events.values()))
        self._new = {id_: event["id"] for id_, event in events.items()}
        for draft in new:
            self.answers[draft.order.id] = Queued(
                draft.order.id, MessageStatus.QUEUED, draft.channel_id, draft.provider, draft.not_before is None
            )

    def _note_the_slower(self, orders: list[Order]) -> None:
        """Another process took their keys a moment ago; the insert has waited for its commit."""
        keys = {order.id: (order.tenant_id, order.key) for order in orders if order.key is not None}
        known = Message.by_key(self._s, list(keys.values()))
        for order in orders:
            self.answers[order.id] = _as_before(order, known[keys[order.id]])

    def _touched(self, drafts: list[Draft]) -> list[dict[str, Any]]:
        """Each conversation once. What is read in it is no news of it."""
        return list(
            {
                draft.conversation_id: {
                    "tenant_id": draft.tenant_id,
                    "id": draft.conversation_id,
                    "channel_id": draft.channel_id,
                    "contact_id": draft.contact_id,
                    "last_message_at": self._now,
                    "window_until": None,
                    "unread_count": 0,
                }
                for draft in drafts
                if draft.ask.type != "read"
            }.values()
        )


# Less than requests wait: a lock that somebody holds ends this transaction, and not only their patience.
_BEGIN = text(
    "SELECT now(), set_config('lock_timeout', :lock_wait, true), set_config('statement_timeout', '2300', true)",
)


def _whose_lanes_are_held(tenants: set[UUID]) -> set[UUID]:
    """Somebody else has them locked in this moment: a worker that hangs, or one that was about to be done."""
    with db.session() as s:
        return set(s.execute(_HELD_LANES, {"tenants": list(tenants)}).scalars())


_HELD_LANES = text("""
    WITH free AS (SELECT channel_id FROM lane WHERE tenant_id = ANY(:tenants) FOR UPDATE SKIP LOCKED)
    SELECT DISTINCT tenant_id FROM lane
    WHERE tenant_id = ANY(:tenants) AND channel_id NOT IN (SELECT channel_id FROM free)
""")

_NO_EVENTS = text("DELETE FROM event WHERE tenant_id = ANY(:tenants) AND id = ANY(:ids)")
_NO_MESSAGES = text("DELETE FROM message WHERE tenant_id = ANY(:tenants) AND id = ANY(:ids)")


def channels_of(s: Session, wanted: set[tuple[UUID, str | None]]) -> dict[UUID, list[Row[Any]]]:
    """The channels that `(tenant, id or name)` may mean, by tenant; all of a tenant that names none."""
    ids, names, all_of = [], [], set()
    for tenant_id, name in wanted:
        if name is None:
            all_of.add(tenant_id)
        else:
            names.append((tenant_id, name))
            with contextlib.suppress(ValueError):
                ids.append((tenant_id, UUID(name)))
    query = select(
        Channel.tenant_id,
        Channel.id,
        Channel.kind,
        Channel.name,
        Channel.config["default"].label("default"),
        Channel.config["gateway"].label("gateway"),
    ).where(
        or_(
            tuple_(Channel.tenant_id, Channel.id).in_(ids),
            tuple_(Channel.tenant_id, Channel.name).in_(names),
            Channel.tenant_id.in_(all_of),
        )
    )
    found: dict[UUID, list[Row[Any]]] = {}
    for row in s.execute(query):
        found.setdefault(row.tenant_id, []).append(row)
    return found


def _uuid(name: str) -> UUID | None:
    try:
        return UUID(name)
    except ValueError:
        return None


def _unusable(file: OwnFile, found: RowMapping | None) -> Failure | None:
    """Why that file cannot be sent. Foreign and missing ones look alike (security-reliability.md T3)."""
    if found is None:
        return Failure(404, "NOT_FOUND", "no such file", details={"field": file.field})
    if found["state"] != MediaState.STORED or found["bytes"] is None:
        return wrong(file.field, "names a file that is not stored")
    return unfit(file, found["mime_type"], found["bytes"])


def channel_named(channels: list[Row[Any]], name: str) -> Row[Any] | Failure:
    """The one of a tenant's channels with this id or name."""
    id_ = _uuid(name)
    by_id = (channel for channel in channels if channel.id == id_)
    by_name = (channel for channel in channels if channel.name == name)
    # Foreign and missing ones look alike (security-reliability.md T3).
    missing = Failure(404, "NOT_FOUND", "no such channel", details={"field": "$.channel"})
    return next(by_id, None) or next(by_name, None) or missing


def default_channel(channels: list[Row[Any]]) -> Row[Any] | Failure:
    """The channel of a tenant that names none: its only one, or the one that is marked so."""
    chosen = channels if len(channels) == 1 else [channel for channel in channels if channel.default is True]
    if len(chosen) == 1:
        return chosen[0]
    return wrong("$.channel", "is needed: none is the only one, and none is marked as the default")


def _key_conflict() -> Failure:
    return Failure(409, "CONFLICT", "this Idempotency-Key was used for another request")


def _as_before(order: Order, known: tuple[UUID, str, str]) -> Queued | Failure:
    id_, status, digest = known
    return Queued(id_, status) if digest == order.ask.digest else _key_conflict()


def _row(draft: Draft) -> dict[str, Any]:
    reference = draft.reference
    return {
        "tenant_id": draft.tenant_id,
        "id": draft.order.id,
        "channel_id": draft.channel_id,
        "conversation_id": draft.conversation_id,
        "contact_id": draft.contact_id,
        "type": draft.ask.type,
        # Our own id until the provider has given one: whoever sends it looks it up then.
        "body": draft.ask.body((reference["provider_id"] or str(reference["id"])) if reference else None).decode(),
        "recipient": draft.ask.recipient,
        "not_before": draft.not_before,
        "idempotency_key": draft.order.key,
        "request_digest": draft.ask.digest,
        "request_id": draft.order.request_id,
    }


def _event(draft: Draft) -> dict[str, Any]:
    ids = {"tenant_id": draft.tenant_id, "id": draft.order.id, "channel_id": draft.channel_id}
    return outgoing.event(ids, MessageStatus.QUEUED, type=draft.ask.type)
