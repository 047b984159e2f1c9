"""Keeps accounts registered: claims what is due, makes the attempts beside each other, writes down what came of them.

An attempt that nobody answers takes half a minute, and a provider that hangs may have a thousand accounts. So they do
not hold a thread each: they share one event loop, which goes on for as long as its process does. It looks for what is
due by itself, each second, so that accounts stay registered also while Redis is away.

No two attempts of an account are ever under way. A claim runs out by the database's clock, so that of a process that
died another goes on; it is renewed while the process lives, and whoever could not renew it sends nothing any more (the
fence). No queue: the underscore.
"""

import asyncio
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from uuid import UUID, uuid4

from sqlalchemy import RowMapping
from sqlalchemy.orm import Session

from models import Event, SipRegistration, SipSender
from models.sip_registration import CLAIM, CLAIM_ELSEWHERE, is_drachtios
from pombal import db, log, metrics
from pombal.middleware import is_store_trouble
from pombal.settings import settings
from providers.drachtio import Drachtio
from providers.sip import Kind, Outcome
from providers.sip_backend import SipBackend
from providers.sip_flight import NotSent
from workers import _sip_attempt, _sip_outcomes, _sip_reports
from workers._sip_attempt import LostClaim, Result
from workers._sip_outcomes import changes, is_reported, names_of

_log = log.get()

_LOOK = 1.0  # seconds between two looks for what is due
_NEXT_REPORTS = 0.05  # … between two batches of reports
_LOOK_AGAIN = 0.25  # … while more is due than may be begun
_RENEW, _RENEW_AGAIN = 3.0, 0.2
_SAFE = CLAIM.total_seconds() - 2.0  # seconds after which a claim is no longer relied upon: clocks do not run alike
_COVERED = 40.0  # seconds of it that drachtio is given a request with: 5 to connect, 32 to give up
_MOST_AT_ONCE = 2_000  # attempts under way
_MOST_OF_A_PLACE = 200  # … to one host
_MANY_OF_A_PLACE = 20  # … that leave the last of the room to others
_ROOM_FOR_OTHERS = 400
_MOST_WRITTEN = 200  # in one transaction
_STOPPING = 5.0  # seconds that attempts under way have to end
_AWAY = 5.0  # seconds between two looks whether drachtio is back
_FILES = 8_192  # sockets, at most


class Held:
    """An account that is being worked on; `until` when that is certain, and until when nobody else begins (`covered`),
    whatever becomes of this process."""

    def __init__(self, row: RowMapping, until: float, covered: float = 0.0) -> None:
        self.row = row
        self.key: tuple[UUID, UUID, int] = (row["tenant_id"], row["id"], row["cseq"])
        self.place: str = row["place"]
        self.until = until
        self.covered = covered
        self.task: asyncio.Task[None] | None = None

    @property
    def is_under_way(self) -> bool:
        return self.task is not None and not self.task.done()

    def fence(self) -> None:
        """Raises `LostClaim` once the claim may have run out."""
        if _clock() >= self.until:
            raise LostClaim("the claim could not be renewed in time")


class Registrar:
    """For one event loop."""

    def __init__(self) -> None:
        self._token = uuid4()
        self._dice = random.SystemRandom()
        self._held: dict[UUID, Held] = {}  # until what came of it is written down: nobody here claims it again
        self._done: asyncio.Queue[tuple[Held, Result]] = asyncio.Queue()
        self._buckets: dict[str, Bucket] = {}
        self._answering: set[str] = set()  # hosts that registered an account since the last look for what is due
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._drachtio = _drachtio()
        self._is_away = False
        self._told_why, self._told_at = "", 0.0
        self._broken: BaseException | None = None

    def wake(self) -> None:
        """Something may be due: look now."""
        self._wake.set()

    def stop(self) -> None:
        """Begin nothing any more; `run` returns soon."""
        self._stopping.set()
        self._wake.set()

    async def run(self, *, once: bool = False) -> None:
        """Until `stop`; `once`: until nothing is due and nothing under way."""
        _allow_sockets()
        parts = (self._write, self._keep_claims, self._tell, self._look_for_drachtio)
        aside = [asyncio.create_task(part()) for part in parts]
        for task in aside:
            task.add_done_callback(self._part_ended)
        try:
            try:
                await self._look_for_due(once=once)
            finally:
                await self._wind_up()
            if self._broken is not None:
                raise self._broken
        finally:
            for task in aside:
                task.cancel()
            await asyncio.gather(*aside, return_exceptions=True)
            if self._drachtio is not None:
                await self._drachtio.close()

    def _part_ended(self, task: asyncio.Task[None]) -> None:
        """None of them ends by itself: without it the others would only seem to work."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._broken = error
            self.stop()

    async def _wind_up(self) -> None:
        if tasks := self._under_way():
            await asyncio.wait(tasks, timeout=_STOPPING)
        given_up = [held.key for held in self._held.values() if held.is_under_way and not self._is_sent_elsewhere(held)]
        for task in (tasks := self._under_way()):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOPPING):
                await self._done.join()
        if given_up:
            with suppress(TimeoutError):  # else the claims run out
                async with asyncio.timeout(_STOPPING):
                    await _patiently(_in_a_transaction, SipRegistration.release, self._token, given_up)

    def _under_way(self) -> list[asyncio.Task[None]]:
        return [held.task for held in self._held.values() if held.task is not None and held.is_under_way]

    def _is_sent_elsewhere(self, held: Held) -> bool:
        """drachtio goes on with what it was given: whoever is next waits until that is over."""
        return held.row["sender"] in _elsewhere() or is_drachtios(held.row["contact"] or "")

    def _ended(self, held: Held, task: asyncio.Task[None]) -> None:
        """One that ended without a word is nobody's: its claim runs out."""
        if task.cancelled() or task.exception() is not None:
            self._drop(held)

    def _drop(self, held: Held) -> None:
        if self._held.get(held.row["id"]) is held:
            del self._held[held.row["id"]]

    # ------------------------------------------------------------------------------------------- what is due

    async def _look_for_due(self, *, once: bool) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            left = 0
            try:
                left = await self._begin_what_is_due()
            except Exception as error:
                if once or not _may_pass(error):
                    raise
            if once and not left and not self._held and not self._answering:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN if left or once else _LOOK):
                    await self._wake.wait()

    async def _begin_what_is_due(self) -> int:
        """Claim what may be begun now, and begin it; returns how many had to be left."""
        without = (SipSender.AUTO, SipSender.DRACHTIO) if self._is_away else ()
        now = _clock()
        busy = Counter(held.place for held in self._held.values())
        answering, self._answering = self._answering, set()
        try:
            if answering:
                await asyncio.to_thread(_hasten, answering)
            rows, left = await asyncio.to_thread(self._claim, without, busy, list(self._held))
        except Exception:
            self._answering |= answering
            raise
        for row in rows:
            length = CLAIM_ELSEWHERE if row["sender"] in _elsewhere() else CLAIM
            held = self._held[row["id"]] = Held(row, now + _SAFE, now + length.total_seconds())
            if row["asked_at"] is None:
                metrics.sip_lateness.observe(max(0.0, row["late"]))
            held.task = asyncio.create_task(self._attempt(held))
            held.task.add_done_callback(partial(self._ended, held))
        return left

    def _claim(
        self, without: Iterable[SipSender] = (), busy: Counter[str] | None = None, held: Iterable[UUID] = ()
    ) -> tuple[list[RowMapping], int]:
        with db.session() as s:
            db.see_all(s)
            due = SipRegistration.due(s, without=without, held=held)
            if not due:
                return [], 0
            db.by_key(s)
            budget = self._budget(due, busy or Counter())
            rows = list(
                SipRegistration.claim(s, self._token, budget, without=without, held=held, elsewhere=_elsewhere())
            )
        for row in rows:
            self._buckets[row["place"]].take()
        return rows, sum(due.values()) - len(rows)

    def _budget(self, due: dict[str, int], busy: Counter[str]) -> dict[str, int]:
        """How many of each host may begin: not all at once after a start or an outage, and however many hosts hang,
        there is room for one that does not."""
        budget: dict[str, int] = {}
        room = _MOST_AT_ONCE - busy.total()
        self._buckets = {place: bucket for place, bucket in self._buckets.items() if place in due or not bucket.is_full}
        for place in sorted(due, key=lambda place: busy[place]):
            bucket = self._buckets.setdefault(place, Bucket(settings().sip_starts_per_second))
            theirs = room - _ROOM_FOR_OTHERS if busy[place] >= _MANY_OF_A_PLACE else room
            n = min(due[place], bucket.has, _MOST_OF_A_PLACE - busy[place], (theirs + 3) // 4)
            if n > 0:
                budget[place] = n
                room -= n
        return budget

    # ---------------------------------------------------------------------------------------------- attempts

    async def _attempt(self, held: Held) -> None:
        row = held.row
        names = names_of(row)
        try:
            if not row["is_enabled"] and not row["was_tried"]:
                result = Result.without_an_attempt(Outcome(Kind.UNREGISTERED), was_unregister=True)
            else:
                result = await _sip_attempt.attempt(row, self._drachtio, held.fence, partial(self._cover, held))
        except LostClaim:  # nothing of it is outstanding
            _log.warning("sip_claim_lost", **names)
            self._drop(held)
            await _patiently(_in_a_transaction, SipRegistration.release, self._token, [held.key])
            return
        except Exception as error:
            # A mistake of ours: it must neither end the others nor be tried again without a pause.
            _log.error("sip_attempt_broke", **names, traceback=log.redacted(error))
            outcome = Outcome(Kind.TEMPORARY, error="internal error; see the log")
            result = Result.without_an_attempt(outcome, was_unregister=not row["is_enabled"])
        if result.outcome.kind is Kind.OURS and self._drachtio is not None and (why := self._drachtio.away):
            await self._hold_back(why)
        await self._done.put((held, result))

    async def _cover(self, held: Held) -> None:
        """Before drachtio is given a request: nobody else begins until it has ended with that, also if we die now.
        Raises `LostClaim`."""
        now = _clock()
        if held.covered - now >= _COVERED:
            return
        try:
            ours = await asyncio.to_thread(self._renew, [held.key], CLAIM_ELSEWHERE)
        except Exception as error:
            if not _may_pass(error):
                raise
            raise LostClaim("the claim could not be renewed") from error
        if held.key[1] not in ours:
            raise LostClaim("the claim ran out")
        held.covered = now + CLAIM_ELSEWHERE.total_seconds()

    # ------------------------------------------------------------------------------------------- what came of them

    async def _write(self) -> None:
        """As many as are there, in one transaction."""
        while True:
            batch = [await self._done.get()]
            while len(batch) < _MOST_WRITTEN and not self._done.empty():
                batch.append(self._done.get_nowait())
            if not await _patiently(self._settle, batch):
                for one in batch if len(batch) > 1 else ():  # one of them has something that cannot be written
                    await _patiently(self._settle, [one])
            for held, result in batch:
                if result.outcome.kind is Kind.REGISTERED:
                    self._answering.add(held.place)
                self._drop(held)
                self._done.task_done()
            if not self._held:
                self._wake.set()

    def _settle(self, batch: list[tuple[Held, Result]]) -> None:
        is_away = self._is_away
        given = [_sip_outcomes.verdict(held.row, result, self._dice, is_away=is_away) for held, result in batch]
        with db.session() as s:
            db.see_all(s)
            db.by_key(s)
            written = {(row["id"], row["cseq"]): row for row in SipRegistration.settle(s, self._token, given)}
            Event.append(s, changes(written.values()))
        for held, result in batch:
            metrics.sip_attempts.labels(outcome=result.outcome.kind).inc()
            metrics.sip_attempt_seconds.labels(outcome=result.outcome.kind).observe(result.ended - result.began)
            if (row := written.get(held.key[1:])) is None:
                _log.warning("sip_claim_lost", **names_of(held.row))
            else:
                _sip_outcomes.say(row, result.outcome)

    # ------------------------------------------------------------------------------------------------------ aside

    async def _keep_claims(self) -> None:
        """Renew them for as long as they are needed: also while what came of an attempt waits for the database."""
        pause = _RENEW
        while True:
            await asyncio.sleep(pause)
            pause = _RENEW
            held = list(self._held.values())
            if not held:
                continue
            now = _clock()
            try:
                ours = await asyncio.to_thread(self._renew, [one.key for one in held])
            except Exception as error:
                if not _may_pass(error):
                    raise
                pause = _RENEW_AGAIN
                continue
            for one in held:
                if one.key[1] in ours:
                    one.until = now + _SAFE
                elif one.task is not None and one.is_under_way and self._held.get(one.key[1]) is one:
                    # What has ended is written down, unless somebody else was quicker.
                    _log.warning("sip_claim_lost", **names_of(one.row))
                    one.task.cancel()
                    self._drop(one)

    def _renew(self, keys: list[tuple[UUID, UUID, int]], length: timedelta = CLAIM) -> set[UUID]:
        with db.session() as s:
            db.see_all(s)
            db.by_key(s)
            return SipRegistration.renew(s, self._token, keys, length)

    async def _tell(self) -> None:
        """Tell the backend, if there is one, how accounts stand."""
        if (backend := settings().require_sip_backend()) is None:
            return
        while True:
            try:
                async with SipBackend(*backend) as told:
                    while True:
                        are_more = await _sip_reports.tell(told)
                        await asyncio.sleep(_NEXT_REPORTS if are_more else _LOOK)
            except Exception as error:  # whatever it is, nobody stays unregistered for it
                if not _may_pass(error):
                    _log.error("sip_reports_broke", traceback=log.redacted(error))
            await asyncio.sleep(_LOOK)

    async def _hold_back(self, why: str) -> None:
        """drachtio is away, which is nobody's fault: its accounts wait, and say so."""
        if not self._is_away:
            self._is_away = True
            _log.error("drachtio_away", error=why)
        if why != self._told_why or time.monotonic() - self._told_at > _AWAY / 2:  # not once for each that failed
            self._told_why, self._told_at = why, time.monotonic()
            await _patiently(_in_a_transaction, _held_back, why)

    async def _look_for_drachtio(self) -> None:
        while self._drachtio is not None:
            await asyncio.sleep(_AWAY)
            if not self._is_away:
                continue
            try:
                await self._drachtio.hello()
            except NotSent as trouble:
                await self._hold_back(trouble.text)
            else:
                self._is_away = False
                _log.info("drachtio_back")
                self._wake.set()


class Bucket:
    """So many a second, and at most a second's worth at once."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._tokens = float(rate)
        self._at = time.monotonic()

    @property
    def has(self) -> int:
        now = time.monotonic()
        self._tokens = min(self._tokens + (now - self._at) * self._rate, self._rate)
        self._at = now
        return int(self._tokens)

    @property
    def is_full(self) -> bool:
        return self.has >= self._rate

    def take(self) -> None:
        self._tokens -= 1


async def _patiently(work: Callable[..., object], *given: object) -> bool:
    """In a thread, as often as the store needs; False when something else is wrong, which is logged."""
    while True:
        try:
            await asyncio.to_thread(work, *given)
        except Exception as error:
            if not _may_pass(error):
                _log.error("sip_not_written", traceback=log.redacted(error))
                return False
            await asyncio.sleep(0.5)
        else:
            return True


def _may_pass(error: Exception) -> bool:
    """Whether the same is worth trying again; it is logged then."""
    if not is_store_trouble(error) and not db.is_worth_rerunning(error):
        return False
    _log.warning("registrations_wait_for_a_store", error=log.described(error))
    return True


def _in_a_transaction(work: Callable[..., object], *given: object) -> None:
    with db.session() as s:
        db.see_all(s)
        work(s, *given)


def _held_back(s: Session, why: str) -> None:
    Event.append(s, changes(SipRegistration.hold_back(s, why, is_reported=is_reported())))


def _hasten(places: Iterable[str]) -> None:
    with db.session() as s:
        db.see_all(s)
        db.by_key(s)
        SipRegistration.hasten(s, places)


def _elsewhere() -> tuple[SipSender, ...]:
    """Whose requests another process sends."""
    return (SipSender.DRACHTIO, SipSender.AUTO) if settings().drachtio_host else (SipSender.DRACHTIO,)


def _clock() -> float:
    """Seconds that go on also while the machine is suspended, where it has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _drachtio() -> Drachtio | None:
    given = settings()
    if not given.drachtio_host:
        return None
    return Drachtio(
        given.drachtio_host, given.drachtio_port, given.drachtio_secret, allowed=given.require_sip_networks()
    )


def _allow_sockets() -> None:
    """Each attempt has a socket of its own; hosts often allow 1,024 files, and more when asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
