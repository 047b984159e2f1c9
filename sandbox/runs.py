"""A run: seeded traffic for some channels on its way, with its progress and its ground truth."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from uuid import uuid4

from sandbox import meta, traffic
from sandbox.config import App, Channel
from sandbox.meta import JSON, MediaHost
from sandbox.sender import Delivery, Post, Sender
from sandbox.traffic import Truth


@dataclass(frozen=True)
class Plan:
    """What to send; see `traffic.mixed`. `rate` is bodies per second, None as fast as they are taken."""

    channels: Sequence[tuple[App, Channel]]
    bodies: int
    seed: int
    rate: float | None
    contacts: int
    duplicates: float
    malformed: float
    shuffle: bool
    per_body: tuple[int, int]


class Run:
    """Starts at once. Needs a running event loop and a sender that is open.

    media_hosts  for each phone_number_id, where the files that it gets can be had
    told         learns of each of them: its id, the phone_number_id, when it is sent, and its size
    """

    def __init__(
        self,
        plan: Plan,
        sender: Sender,
        media_hosts: Mapping[str, MediaHost],
        told: Callable[[str, str, float, int | None], None],
    ) -> None:
        self.id = uuid4().hex[:12]
        self.plan = plan
        self._sender = sender
        self._media_hosts = media_hosts
        self._told = told
        self._truths: list[Truth] = []
        self._deliveries: list[Delivery] = []
        self._started = time.monotonic()
        self._seconds: float | None = None
        self._task = asyncio.create_task(self._work())

    @property
    def state(self) -> str:
        """preparing, running (until the last body is accepted), done, cancelled or failed."""
        if not self._task.done():
            return "running" if self._truths else "preparing"
        if self._task.cancelled():
            return "cancelled"
        return "failed" if self._task.exception() else "done"

    def progress(self) -> JSON:
        """State, how many bodies were started, accepted, are pending or dropped, tries of all, and seconds so far."""
        states = Counter(delivery.state for delivery in self._deliveries)
        return {
            "id": self.id,
            "state": self.state,
            "error": repr(self._task.exception()) if self.state == "failed" else None,
            "seed": self.plan.seed,
            "bodies": self.plan.bodies,
            "started": len(self._deliveries),
            "accepted": states["accepted"],
            "pending": states["pending"],
            "dropped": states["dropped"],
            "attempts": sum(delivery.attempts for delivery in self._deliveries),
            "seconds": round(self._seconds or time.monotonic() - self._started, 3),
        }

    def truth_counts(self) -> JSON | None:
        """How many distinct messages a receiver must hold after the whole run; None while it is being prepared."""
        if not self._truths:
            return None
        truths = self._truths
        return {
            "incoming": sum(len(truth.incoming) for truth in truths),
            "incoming_types": Counter(type for truth in truths for type in truth.incoming.values()),
            "outgoing": sum(len(truth.outgoing) for truth in truths),
            "statuses": Counter(word for truth in truths for word in truth.statuses.values()),
            "malformed": sum(truth.malformed for truth in truths),
            "malformed_bodies": sum(truth.malformed_bodies for truth in truths),
        }

    async def cancel(self) -> None:
        """Send nothing more of it; nothing happens when it has ended."""
        self._task.cancel()
        await asyncio.wait([self._task])
        for delivery in self._deliveries:
            self._sender.drop(delivery)
        for delivery in self._deliveries:
            await delivery.ended.wait()

    async def _work(self) -> None:
        # In a thread: a large run takes seconds to make, and other requests shall not wait for it.
        posts = await asyncio.to_thread(self._posts)
        now = time.time()
        for truth in self._truths:
            for media_id, number in truth.media.items():
                self._told(media_id, number, now, self._media_hosts[number].bytes)
        await self._sender.send_all(posts, started=self._deliveries.append, rate=self.plan.rate)
        for delivery in self._deliveries:
            await delivery.ended.wait()
        self._seconds = time.monotonic() - self._started

    def _posts(self) -> list[Post]:
        """A share of the bodies for each app, signed by it, the apps taking turns.

        The first app's share has the run's seed, the next one's the seed plus one, and so on.
        """
        plan = self.plan
        numbers: dict[App, list[meta.Number]] = {}
        for app, channel in plan.channels:
            numbers.setdefault(app, []).append(channel.number)
        lines: list[list[Post]] = []
        truths: list[Truth] = []
        for i, (app, its_numbers) in enumerate(numbers.items()):
            share = plan.bodies // len(numbers) + (i < plan.bodies % len(numbers))
            if share == 0:
                continue
            part = traffic.mixed(
                plan.seed + i,
                share,
                numbers=its_numbers,
                contacts=plan.contacts,
                duplicates=plan.duplicates,
                malformed=plan.malformed,
                per_body=plan.per_body,
                shuffle=plan.shuffle,
                start=int(time.time()),
                media_hosts=self._media_hosts,
            )
            truths.append(part.truth)
            lines.append(
                [Post(app.url, raw, {"X-Hub-Signature-256": meta.sign(raw, app.app_secret)}) for raw in part.bodies]
            )
        self._truths = truths
        return [post for post in chain.from_iterable(zip_longest(*lines)) if post is not None]
