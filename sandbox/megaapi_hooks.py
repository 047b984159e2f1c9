"""The webhooks of the simulated MegaAPI: rules for what follows a message that was sent, and their way out.

How the vendor repeats a delivery is UNCONFIRMED; here anything but a 200 is sent again for a minute.
"""

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sandbox import megaapi_words as words
from sandbox.megaapi_instances import Instance
from sandbox.meta import JSON, encode
from sandbox.rules import Seconds, Share
from sandbox.sender import Delivery, Post, Sender

GIVE_UP = 60.0  # seconds after the first try
AT_MOST = 5.0  # seconds that an answer waits for the webhooks that should come before it
HEADERS = {"User-Agent": "axios/1.7.7", "Accept": "application/json, text/plain, */*"}

Form = Literal["flat", "wrapped", "seed"]
Offline = Literal["error_true", "http400", "http404", "accept"]
Lids = Literal["never", "with_alt", "without_alt"]
Delay = tuple[Seconds, Seconds]
Ack = Annotated[int, Meta(ge=-1, le=10)]


class MegaRules(NamedTuple):
    """What holds for one instance.

    answer_id         whether the answer to a send has the message's key (UNCONFIRMED for the real one)
    echo              whether its own webhook comes after the answer, before it, or never
    echo_delay        fewest and most seconds of one that comes after
    acks              numbers of the acks that follow, as Baileys counts
    ack_delay         fewest and most seconds from one to the next
    ack_lost, ack_duplicates   share of them that never come, or come twice
    ack_shuffle       each has its own time, so that they come in any order
    ack_strings       "3" instead of 3
    acks_before       they too come before the answer
    form              of all webhooks
    offline           what becomes of a message while the instance is not connected
    lid               whether chats are called by their `@lid` in echoes and acks
    drop_ninth_digit  of some Brazilian numbers, as WhatsApp does
    fetch_urls        whether the files of `mediaUrl` are fetched; else they are believed
    restart           the status of a paired instance after a restart
    webhook_answer    under which name `GET /rest/webhook` has its answer (UNCONFIRMED for the real one)
    """

    answer_id: bool = True
    echo: Literal["after", "before", "never"] = "after"
    echo_delay: Delay = (0.05, 0.3)
    acks: tuple[Ack, ...] = (2, 3, 4)
    ack_delay: Delay = (0.05, 0.5)
    ack_lost: float = 0.0
    ack_duplicates: float = 0.0
    ack_shuffle: bool = False
    ack_strings: bool = False
    acks_before: bool = False
    form: Form = "flat"
    offline: Offline = "error_true"
    lid: Lids = "never"
    drop_ninth_digit: bool = False
    fetch_urls: bool = False
    restart: str = "connected"
    webhook_answer: Literal["webhookData", "data", "flat"] = "webhookData"


class SetMegaRules(msgspec.Struct, forbid_unknown_fields=True):
    """A request to change some of them, for one instance or for all; what is left out stays."""

    instance: str | None = None
    answer_id: bool | UnsetType = UNSET
    echo: Literal["after", "before", "never"] | UnsetType = UNSET
    echo_delay: Delay | UnsetType = UNSET
    acks: tuple[Ack, ...] | UnsetType = UNSET
    ack_delay: Delay | UnsetType = UNSET
    ack_lost: Share | UnsetType = UNSET
    ack_duplicates: Share | UnsetType = UNSET
    ack_shuffle: bool | UnsetType = UNSET
    ack_strings: bool | UnsetType = UNSET
    acks_before: bool | UnsetType = UNSET
    form: Form | UnsetType = UNSET
    offline: Offline | UnsetType = UNSET
    lid: Lids | UnsetType = UNSET
    drop_ninth_digit: bool | UnsetType = UNSET
    fetch_urls: bool | UnsetType = UNSET
    restart: Annotated[str, Meta(min_length=1, max_length=64)] | UnsetType = UNSET
    webhook_answer: Literal["webhookData", "data", "flat"] | UnsetType = UNSET


class MegaRuleBook:
    """The rules of every instance, by key. The newest request wins, whether it was for one or for all."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._common = MegaRules()
        self._own: dict[str, dict[str, Any]] = {}

    def of(self, key: str) -> MegaRules:
        own = self._own.get(key)
        return self._common._replace(**own) if own else self._common

    def set(self, asked: SetMegaRules, key: str | None) -> None:
        given = {name: getattr(asked, name) for name in MegaRules._fields if getattr(asked, name) is not UNSET}
        if key is not None:
            self._own.setdefault(key, {}).update(given)
            return
        self._common = self._common._replace(**given)
        for own in self._own.values():
            for name in given:
                own.pop(name, None)

    def shown(self) -> JSON:
        instances = {key: self.of(key)._asdict() for key, own in self._own.items() if own}
        return {"rules": self._common._asdict(), "instances": instances}


class Outgoing(NamedTuple):
    """A message that was accepted: its key in webhooks, and its content."""

    instance: Instance
    key: JSON
    type: str
    content: JSON


class Due(NamedTuple):
    at: float  # on the monotonic clock
    order: int
    instance: Instance
    body: Callable[[], JSON]


class Hooks:
    """All webhooks of one host. `run` must be running for those that come later to go out."""

    def __init__(self, sender: Sender) -> None:
        self.rules = MegaRuleBook()
        self.sender = sender
        self.unheard = 0  # for want of a URL
        self._heap: list[Due] = []
        self._order = itertools.count()
        self._rng = Random(11)  # noqa: S311 - test data
        self._more = asyncio.Event()

    @property
    def waiting(self) -> int:
        return len(self._heap)

    def emit(self, instance: Instance, body: JSON, form: Form | None = None) -> Delivery | None:
        """A body on its way, in this form or that of the rules; None when the instance has no webhook."""
        return self.post(instance, encode(words.formed(form or self.rules.of(instance.key).form, body)))

    def post(
        self, instance: Instance, raw: bytes, *, once: bool = False, type: str = "application/json"
    ) -> Delivery | None:
        """These bytes."""
        if instance.url is None:
            self.unheard += 1
            return None
        return self.sender.send(Post(instance.url, raw, {**HEADERS, "Content-Type": type}, once))

    def connection(self, instance: Instance) -> Delivery | None:
        """The instance says what its status is."""
        return self.emit(instance, words.connection(instance, f"phone_{instance.status}"))

    async def before(self, message: Outgoing) -> None:
        """What the rules let come before the answer: returns when it was delivered, or after a while."""
        rules = self.rules.of(message.instance.key)
        bodies = [_echo(message)] if rules.echo == "before" else []
        if rules.acks_before:
            bodies += [_ack(message, number, rules) for number in self._numbers(rules)]
        for body in bodies:
            delivery = self.emit(message.instance, body)
            if delivery is not None:
                try:
                    async with asyncio.timeout(AT_MOST):
                        await delivery.ended.wait()
                except TimeoutError:
                    pass  # the answer is not held up for ever; the webhook is still sent again

    def after(self, message: Outgoing) -> None:
        """Let come in its time whatever does not come before the answer."""
        rules = self.rules.of(message.instance.key)
        at = now = time.monotonic()
        if rules.echo == "after":
            at += self._rng.uniform(*rules.echo_delay)
            self._push(at, message.instance, partial(_echo, message))
        if rules.acks_before:
            return
        for number in self._numbers(rules):
            delay = self._rng.uniform(*rules.ack_delay)
            at = now + self._rng.random() * delay * len(rules.acks) if rules.ack_shuffle else at + delay
            self._push(at, message.instance, partial(_ack, message, number, rules))

    async def run(self) -> None:
        """Send what falls due, for ever."""
        while True:
            self._more.clear()
            wait = self._heap[0].at - time.monotonic() if self._heap else None
            if wait is None or wait > 0:
                try:
                    async with asyncio.timeout(wait):
                        await self._more.wait()
                except TimeoutError:
                    pass  # the first one is due
            while self._heap and self._heap[0].at <= time.monotonic():
                due = heapq.heappop(self._heap)
                self.emit(due.instance, due.body())

    def _numbers(self, rules: MegaRules) -> list[int]:
        """The acks that will come."""
        coming = []
        for number in rules.acks:
            if rules.ack_lost and self._rng.random() < rules.ack_lost:
                continue
            twice = bool(rules.ack_duplicates) and self._rng.random() < rules.ack_duplicates
            coming += [number] * (2 if twice else 1)
        return coming

    def _push(self, at: float, instance: Instance, body: Callable[[], JSON]) -> None:
        heapq.heappush(self._heap, Due(at, next(self._order), instance, body))
        self._more.set()


def _echo(message: Outgoing) -> JSON:
    instance = message.instance
    return words.message(instance, message.key, message.type, message.content, int(time.time()), instance.name)


def _ack(message: Outgoing, number: int, rules: MegaRules) -> JSON:
    return words.ack(message.instance, message.key, str(number) if rules.ack_strings else number)
