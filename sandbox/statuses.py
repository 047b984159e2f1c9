"""What becomes of accepted messages: status webhooks after a while (whatsapp-cloud-api.md §7).

One task sends them all. Those that fall due close together travel in one body for each app, as Meta batches them.
"""

import asyncio
import heapq
import itertools
import time
from random import Random
from typing import NamedTuple

from sandbox import meta
from sandbox.config import App
from sandbox.graph_errors import title
from sandbox.meta import JSON, Number
from sandbox.rules import StatusRule
from sandbox.sender import Post, Sender

BATCH_SECONDS = 0.05
MOST_IN_BODY = 200


class Accepted(NamedTuple):
    """A message Graph has taken; `customer` is its wa_id or a BSUID, `category` that of its price."""

    app: App
    number: Number
    wamid: str
    customer: str
    callback: str | None
    category: str


class Due(NamedTuple):
    at: float  # on the monotonic clock
    order: int
    message: Accepted
    word: str
    code: int | None  # of a `failed`
    priced: bool


class Statuses:
    """The statuses to come. `run` must be running for them to go out."""

    def __init__(self, sender: Sender) -> None:
        self.sent = 0
        self._sender = sender
        self._heap: list[Due] = []
        self._order = itertools.count()
        self._rng = Random(7)  # noqa: S311 - test data
        self._more = asyncio.Event()

    @property
    def waiting(self) -> int:
        return len(self._heap)

    def expect(self, message: Accepted, rule: StatusRule) -> None:
        """The rule's statuses for this message, one after the other, or in any order if it says so."""
        at = now = time.monotonic()
        # The price is on `sent` and on one of the two that follow.
        second_price = "delivered" if "delivered" in rule.words else "read"
        for word in rule.words:
            delay = self._rng.uniform(*rule.delay)
            at = now + self._rng.random() * delay * len(rule.words) if rule.shuffle else at + delay
            if rule.lost and self._rng.random() < rule.lost:
                continue
            code = 131026 if word == "failed" else None
            due = Due(at, next(self._order), message, word, code, word in ("sent", second_price))
            self._push(due)
            if rule.duplicates and self._rng.random() < rule.duplicates:
                self._push(due._replace(at=at + self._rng.uniform(*rule.delay), order=next(self._order)))

    def fail(self, message: Accepted, code: int, rule: StatusRule) -> None:
        """A `failed` with this code instead."""
        at = time.monotonic() + self._rng.uniform(*rule.delay)
        self._push(Due(at, next(self._order), message, "failed", code, False))

    async def run(self) -> None:
        """Send what falls due, for ever."""
        while True:
            self._more.clear()
            if not self._heap:
                await self._more.wait()
            await asyncio.sleep(BATCH_SECONDS)
            self._send(time.monotonic())

    def _push(self, due: Due) -> None:
        heapq.heappush(self._heap, due)
        self._more.set()

    def _send(self, now: float) -> None:
        batches: dict[App, list[Due]] = {}
        while self._heap and self._heap[0].at <= now:
            due = heapq.heappop(self._heap)
            batch = batches.setdefault(due.message.app, [])
            batch.append(due)
            if len(batch) == MOST_IN_BODY:
                self._post(due.message.app, batches.pop(due.message.app))
        for app, batch in batches.items():
            self._post(app, batch)

    def _post(self, app: App, batch: list[Due]) -> None:
        self.sent += len(batch)
        raw = meta.encode(_body(batch))
        self._sender.send(Post(app.url, raw, {"X-Hub-Signature-256": meta.sign(raw, app.app_secret)}))


def _body(batch: list[Due]) -> JSON:
    """An entry for each WABA, in it a change for each number; failures have one of their own, without contacts."""
    groups: dict[tuple[Number, bool], list[Due]] = {}
    for due in batch:
        groups.setdefault((due.message.number, due.word == "failed"), []).append(due)
    entries: dict[str, list[JSON]] = {}
    for (number, failed), dues in groups.items():
        value: JSON = {} if failed else {"contacts": _contacts(dues)}
        value["statuses"] = [_element(due) for due in dues]
        entries.setdefault(number.waba_id, []).append(meta.change(number, "messages", value))
    return meta.envelope(meta.entry(waba_id, changes) for waba_id, changes in entries.items())


def _contacts(dues: list[Due]) -> list[JSON]:
    return [meta.contact(customer) for customer in dict.fromkeys(due.message.customer for due in dues)]


def _element(due: Due) -> JSON:
    message = due.message
    extra: JSON = {} if message.callback is None else {"biz_opaque_callback_data": message.callback}
    element = meta.status(message.wamid, due.word, int(time.time()), message.customer, **extra)
    element.pop("pricing", None)
    if due.priced:
        free = message.category == "service"
        element["pricing"] = {
            "billable": not free,
            "pricing_model": "PMP",
            "type": "free_customer_service" if free else "regular",
            "category": message.category,
        }
    if due.code is not None:
        text = title(due.code)
        details = {"details": f"Failed: {text}"}
        element["errors"] = [{"code": due.code, "title": text, "message": text, "error_data": details}]
    return element
