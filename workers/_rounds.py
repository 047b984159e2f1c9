"""Ask gateways how instances stand: host by host side by side, so that one that hangs holds up its own alone.

A round knows neither database nor queue. It takes channels as `standing.polled` gives them, keeps each host's calls
within a number at once, spreads them over a while if there is time, and is over in time: what has no answer by then was
not reached. Each poll has a deadline of its own and a quick second try. Not a queue, hence the underscore.
"""

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from sqlalchemy import RowMapping
from tenacity import AsyncRetrying, RetryCallState, stop_after_attempt, wait_random

import providers
from models import ChannelKind
from models.standing import NOT_REACHED, ODD
from pombal import log, metrics
from pombal.errors import Misconfigured, Permanent, PombalError
from pombal.secrets import unseal
from pombal.settings import settings
from providers.http import Clients
from providers.instance import Instance, InstanceFault, Standing

_log = log.get()
T = TypeVar("T")

NOT_LISTED = "not_listed"
INTERNAL = "internal"  # an error of our own

_POLL_SECONDS = 8.0  # for one instance, a second try included
_LIST_SECONDS = 20.0  # for all of a host
_NO_SECOND_TRY = 1.0  # second that must be left for it
_MOST_IN_VAIN = 5  # instances in a row that a host left waiting, or sent away, before it is given up for this round
_WAITED = 2.0  # seconds without an answer that count as that; a host that is not there says so at once
_SENT_AWAY = ("throttled", "edge_blocked")
# Of a list that is no use: the host may not have one, and the instances may still answer one by one.
_NO_LIST = ("not_found", "rejected", "unreadable")
# Dialects of Baileys gateways whose key lists the sessions that it is good for (baileys-sessions.md §5). Evolution's
# list has what it wrote down last, which is behind what a session itself says.
_LISTING = ("whaticket", "ticketz", "waha")
_LOOK = 1.0  # seconds between two handings on of what was found


class Found(NamedTuple):
    """What a poll came to: a status, or the reason why it is not known (a code of `providers.instance.FAULTS`,
    `odd_answer`, `not_listed`, `not_reached` or `internal`). `asked_at` is by the database's clock; `wait` are the
    seconds for which the other side wants to be left alone."""

    asked_at: datetime
    status: str | None = None
    raw: str = ""
    reason: str | None = None
    own_id: str | None = None
    is_transient: bool = False
    wait: float = 0.0

    def of(self, row: RowMapping) -> dict[str, Any]:
        """As `standing.heard` takes it."""
        return {"tenant_id": row["tenant_id"], "id": row["id"], **self.said()}

    def said(self) -> dict[str, Any]:
        given = self._asdict()
        del given["is_transient"], given["wait"]
        return given


class DatabaseClock:
    """The database's time from here on, without asking it again. `now` is what it said just before: so this is never
    ahead of it, and no poll passes for newer than it is."""

    def __init__(self, now: datetime) -> None:
        self._now, self._at = now, time.monotonic()

    def __call__(self) -> datetime:
        return self._now + timedelta(seconds=time.monotonic() - self._at)


class Stopping(PombalError):
    """This process is about to end."""


class Target(NamedTuple):
    """An instance to ask. `name` is what a list of its host calls it."""

    row: RowMapping
    instance: Instance
    slot: float  # seconds into the round
    name: str = ""


class Host:
    """What a round knows of one host."""

    def __init__(self, at_once: int) -> None:
        self.room = asyncio.Semaphore(at_once)
        self.singles: list[Target] = []
        self.lists: dict[tuple[str, ...], list[Target]] = {}  # by what lists them: the same call, the same token
        self._answered_at = 0.0
        self._in_vain = 0

    @property
    def is_given_up(self) -> bool:
        return self._in_vain >= _MOST_IN_VAIN

    def answered(self) -> None:
        self._answered_at = time.monotonic()
        self._in_vain = 0

    def failed(self, code: str, asked: float) -> None:
        """It had no answer for somebody who asked then; one to somebody else in the meantime speaks for the host."""
        if code in ("timeout", "unreachable") or code in _SENT_AWAY:
            is_in_vain = code in _SENT_AWAY or time.monotonic() - asked > _WAITED
            self._in_vain += is_in_vain and asked > self._answered_at
        else:
            self.answered()


class Round:
    """Ask about these channels, once. `found` fills while it runs."""

    def __init__(
        self, rows: Iterable[RowMapping], clock: DatabaseClock, *, at_once: int, seconds: float, spread: float = 0.0
    ) -> None:
        self.rows = {row["id"]: row for row in rows}
        self.found: dict[UUID, Found] = {}
        self._clock, self._seconds, self._spread = clock, seconds, spread
        self._at_once = at_once
        self._asked: dict[UUID, datetime] = {}
        self._began = time.monotonic()

    async def run(self, hand_on: Callable[[list[UUID]], None], is_stopping: Callable[[], bool] = lambda: False) -> None:
        """Fill `found`. `hand_on` is called in a thread, each second, with the channels that were found since.

        What it raises ends the round. Raises `Stopping` when that is asked for.
        """
        end = self._began + self._seconds
        handed: set[UUID] = set()
        clients = Clients()
        try:
            polling = asyncio.create_task(self._poll_all(clients))
            try:
                while not polling.done() and (left := end - time.monotonic()) > 0:
                    await asyncio.wait({polling}, timeout=min(_LOOK, left))
                    if is_stopping():
                        raise Stopping
                    await self._hand_on(hand_on, handed)
            finally:
                polling.cancel()
                await asyncio.wait({polling})
        finally:
            await clients.close()
        if not polling.cancelled():
            polling.result()  # an error in here
        now = self._clock()
        for id_ in self.rows.keys() - self.found.keys():
            self._note(self.rows[id_], Found(self._asked.get(id_, now), reason=NOT_REACHED, is_transient=True))
        await self._hand_on(hand_on, handed)

    async def _hand_on(self, hand_on: Callable[[list[UUID]], None], handed: set[UUID]) -> None:
        fresh = [id_ for id_ in self.found if id_ not in handed]
        await asyncio.to_thread(hand_on, fresh)
        handed.update(fresh)

    async def _poll_all(self, clients: Clients) -> None:
        hosts = self._by_host(clients)
        async with asyncio.TaskGroup() as group:
            for host in hosts.values():
                group.create_task(self._in_turn(host, host.singles))
                for targets in host.lists.values():
                    group.create_task(self._list(host, targets))

    def _by_host(self, clients: Clients) -> dict[str, Host]:
        hosts: dict[str, Host] = {}
        for row in self.rows.values():
            try:
                secrets = unseal(row["id"], row["sealed"]) if row["sealed"] else {}
                instance = providers.instance(row["kind"], clients, row["config"], secrets)
            except (Misconfigured, Permanent) as error:
                _log.error("status_poll_misconfigured", channel_id=str(row["id"]), error=log.described(error))
                self._note(row, Found(self._clock(), reason="misconfigured"))
                continue
            host = hosts.setdefault(instance.host, Host(self._at_once))
            name, listed_by = _in_a_list(row, secrets)
            target = Target(row, instance, self._slot(row), name)
            if name:
                host.lists.setdefault(listed_by, []).append(target)
            else:
                host.singles.append(target)
        for host in hosts.values():
            for listed_by in [listed_by for listed_by, targets in host.lists.items() if len(targets) == 1]:
                host.singles += host.lists.pop(listed_by)
            host.singles.sort(key=lambda target: target.slot)
        return hosts

    def _slot(self, row: RowMapping) -> float:
        """A channel's own place in the round, the same each time; first comes what the last round did not reach, so
        that a host that is too slow for one round does not always miss the same ones."""
        if row["unknown_reason"] == NOT_REACHED:
            return -1.0
        return zlib.crc32(row["id"].bytes) / 2**32 * self._spread

    async def _in_turn(self, host: Host, targets: Iterable[Target]) -> None:
        async with asyncio.TaskGroup() as group:
            for target in targets:
                if not await self._has_room(host, target.slot):
                    return
                group.create_task(self._single(host, target))

    async def _has_room(self, host: Host, slot: float) -> bool:
        """Wait for one's time and a place among the host's calls; False when it is given up."""
        if (wait := self._began + slot - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        await host.room.acquire()
        if host.is_given_up:
            host.room.release()
        return not host.is_given_up

    async def _single(self, host: Host, target: Target) -> None:
        found = await self._asked_for(host, [target.row], "status", target.instance.status, _POLL_SECONDS)
        if isinstance(found, Found):
            self._note(target.row, found)
        else:
            self._note(target.row, _understood(*found))

    async def _list(self, host: Host, targets: list[Target]) -> None:
        """One call in place of one for each of them."""
        if not await self._has_room(host, min(target.slot for target in targets)):
            return
        rows = [target.row for target in targets]
        found = await self._asked_for(host, rows, "list", targets[0].instance.listed, _LIST_SECONDS)
        if isinstance(found, Found):
            if found.reason in _NO_LIST:
                await self._in_turn(host, sorted(targets, key=lambda target: target.slot))
                return
            for row in rows:
                self._note(row, found)
            return
        asked_at, listed = found
        for target in targets:
            standing = listed.get(target.name)
            if standing is None:
                self._note(target.row, Found(asked_at, reason=NOT_LISTED))
            else:
                self._note(target.row, _understood(asked_at, standing))

    async def _asked_for(
        self,
        host: Host,
        rows: list[RowMapping],
        operation: str,
        call: Callable[[float], Awaitable[T]],
        seconds: float,
    ) -> tuple[datetime, T] | Found:
        """Make a call, and a second one if that may help; when it was asked and what came, or why nothing did.

        Gives the host's room back.
        """
        provider, asked = rows[0]["kind"], time.monotonic()
        try:
            async for attempt in _twice(asked + seconds):
                with attempt:
                    began, asked_at = time.monotonic(), self._clock()
                    self._asked |= dict.fromkeys((row["id"] for row in rows), asked_at)
                    try:
                        answer = await call(asked + seconds - began)
                    finally:
                        took = time.monotonic() - began
                        metrics.provider_seconds.labels(provider=provider, operation=operation).observe(took)
            host.answered()
            return asked_at, answer
        except InstanceFault as fault:
            metrics.provider_errors.labels(provider, fault.code).inc()
            host.failed(fault.code, asked)
            return Found(asked_at, None, fault.raw, fault.code, None, fault.is_transient, fault.wait)
        except Exception as error:  # of our own making: the others must not suffer
            _log.error("status_poll_failed", channel_id=str(rows[0]["id"]), traceback=log.redacted(error))
            return Found(asked_at, reason=INTERNAL)
        finally:
            host.room.release()

    def _note(self, row: RowMapping, found: Found) -> None:
        self.found[row["id"]] = found
        metrics.status_polls.labels(provider=row["kind"], outcome=found.status or found.reason).inc()


def _in_a_list(row: RowMapping, secrets: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """What a list of its host calls a channel's instance, and which list that is; '' where there is none to ask for."""
    config = row["config"]
    if row["kind"] == ChannelKind.BAILEYS:
        if config.get("gateway") not in _LISTING:
            return "", ()
        paths = (f"{name}={path}" for name, path in sorted(config.get("paths", {}).items()))
        return config.get("session", ""), (row["kind"], config["gateway"], secrets.get("api_key", ""), *paths)
    if config.get("token_kind") != "host":
        return "", ()
    return config.get("instance_key", ""), (row["kind"], secrets.get("token") or settings().mega_api_token)


def _understood(asked_at: datetime, standing: Standing) -> Found:
    reason = ODD if standing.status is None else None
    return Found(asked_at, standing.status, standing.raw, reason, standing.own_id)


def _twice(end: float) -> AsyncRetrying:
    """A quick second try of what may pass, if it can still end in time."""

    def may_help(state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        is_worth_it = isinstance(error, InstanceFault) and error.is_transient and error.wait <= 0
        return is_worth_it and end - time.monotonic() > _NO_SECOND_TRY

    return AsyncRetrying(stop=stop_after_attempt(2), wait=wait_random(0.1, 0.3), retry=may_help, reraise=True)


def new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
