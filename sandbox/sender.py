"""Delivers bodies the way Meta does: only HTTP 200 counts, everything else is sent again (whatsapp-cloud-api.md §4).

The waits between tries double from `first_delay` to `max_delay`, which is shortened here so that a developer sees an
outage heal in seconds; at Meta they grow much longer.
"""

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

import httpx

log = logging.getLogger("sandbox.sender")

SEVEN_DAYS = 7 * 24 * 3600.0


class Post(NamedTuple):
    """One body on its way to one URL.

    once   for bodies that are meant to be refused and not sent again
    final  statuses after which this provider does not send again
    """

    url: str
    raw: bytes
    headers: dict[str, str]
    once: bool = False
    final: frozenset[int] = frozenset()


@dataclass
class Delivery:
    """What became of one body. Times are unix seconds."""

    id: str
    created_at: float
    state: str = "pending"  # then accepted (a 200 came) or dropped (given up)
    attempts: int = 0
    status: int | None = None  # the last HTTP status; None when nobody answered
    accepted_at: float | None = None
    tried: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    ended: asyncio.Event = field(default_factory=asyncio.Event, repr=False)


class Sender:
    """Sends in the background while it is entered as an async context; leaving it drops what is pending.

    concurrency    most requests at one time
    first_delay    seconds before the second try
    max_delay      longest wait in seconds
    give_up_after  seconds from the first try to the last
    timeout        seconds to wait for an answer
    journal        how many deliveries are remembered
    """

    def __init__(
        self,
        *,
        concurrency: int = 64,
        first_delay: float = 0.2,
        max_delay: float = 5.0,
        give_up_after: float = SEVEN_DAYS,
        timeout: float = 10.0,
        journal: int = 10_000,
    ) -> None:
        self.journal: deque[Delivery] = deque(maxlen=journal)
        self.counts = {"attempts": 0, "pending": 0, "accepted": 0, "dropped": 0}
        self._concurrency = concurrency
        self._slots = asyncio.Semaphore(concurrency)
        self._first_delay = first_delay
        self._max_delay = max_delay
        self._give_up_after = give_up_after
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ids = itertools.count(1)
        # The environment's proxies are for the real world outside, not for this one.
        self._http = httpx.AsyncClient(timeout=timeout, trust_env=False, headers={"User-Agent": "facebookexternalua"})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()

    def send(self, post: Post) -> Delivery:
        """Start one delivery and return at once; `tried` and `ended` of the answer can be awaited."""
        delivery = Delivery(f"d{next(self._ids)}", time.time())
        self.journal.append(delivery)
        self.counts["pending"] += 1
        task = asyncio.create_task(self._deliver(delivery, post))
        self._tasks[delivery.id] = task
        # A callback also runs for a task that is cancelled before its first step.
        task.add_done_callback(lambda _: self._end(delivery))
        return delivery

    async def send_all(
        self, posts: Iterable[Post], *, started: Callable[[Delivery], None], rate: float | None = None
    ) -> None:
        """Start a delivery of every post, at most `rate` a second; returns when each was tried once.

        No more than `concurrency` first tries run at a time, so that a large run does not hold up other deliveries.
        """
        waiting = iter(posts)
        pace = _Pace(rate)

        async def lane() -> None:
            for post in waiting:
                await pace.wait()
                delivery = self.send(post)
                started(delivery)
                await delivery.tried.wait()

        async with asyncio.TaskGroup() as lanes:
            for _ in range(self._concurrency):
                lanes.create_task(lane())

    def drop(self, delivery: Delivery) -> None:
        """Stop trying; nothing happens when the delivery has ended already."""
        if delivery.id in self._tasks:
            self._tasks[delivery.id].cancel()

    async def _deliver(self, delivery: Delivery, post: Post) -> None:
        delay = self._first_delay
        last_try = time.monotonic() + self._give_up_after
        while True:
            async with self._slots:
                await self._attempt(delivery, post)
            if delivery.status == 200:
                delivery.accepted_at = time.time()
                return
            if post.once or delivery.status in post.final or time.monotonic() + delay > last_try:
                return
            if delivery.attempts == 1:
                log.warning("delivery %s refused, status %s, sending again", delivery.id, delivery.status)
            await asyncio.sleep(delay)
            delay = min(delay * 2, self._max_delay)

    async def _attempt(self, delivery: Delivery, post: Post) -> None:
        delivery.attempts += 1
        self.counts["attempts"] += 1
        headers = {"Content-Type": "application/json"} | post.headers
        try:
            response = await self._http.post(post.url, content=post.raw, headers=headers)
            delivery.status = response.status_code
        except httpx.HTTPError:
            delivery.status = None
        delivery.tried.set()

    def _end(self, delivery: Delivery) -> None:
        delivery.state = "dropped" if delivery.accepted_at is None else "accepted"
        self.counts["pending"] -= 1
        self.counts[delivery.state] += 1
        del self._tasks[delivery.id]
        delivery.tried.set()
        delivery.ended.set()
        log.info(
            "delivery %s %s, status %s, attempts %d", delivery.id, delivery.state, delivery.status, delivery.attempts
        )


class _Pace:
    """Lets callers through one by one, evenly spread."""

    def __init__(self, rate: float | None) -> None:
        self._step = 1 / rate if rate else 0.0
        self._next = time.monotonic()

    async def wait(self) -> None:
        now = time.monotonic()
        mine = max(now, self._next)
        self._next = mine + self._step
        if mine > now:
            await asyncio.sleep(mine - now)
