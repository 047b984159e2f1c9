"""What the simulated MegaAPI was asked, what it made of it, and how much was under way at once: its own truth."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Literal

import msgspec

from sandbox.meta import JSON

MOST = 250_000  # calls remembered; half of them are forgotten when there are more
MOST_RECIPIENTS = 1_000  # in a summary


class MegaCall(msgspec.Struct, eq=False):
    """One request.

    n           counts from 1 and never starts again
    at          unix seconds at which its head was read
    place       one of `sandbox.kinds.MEGAAPI_PLACES`, or elsewhere
    instance    its key
    token       instance, host, wrong or none
    to, type, text, url   of a message: as given; `type` is the last part of the path, or that of the file
    id          the message's, once it is accepted; of a mark-read, the one read
    size, sha256   of the file that was handed in, or given
    digest      of the whole body
    outcome     accepted, refused (with the `reason`), or dropped_before: met a fault before anything was decided
    http        the status line sent, None when none was
    answered    whether the whole HTTP answer was written while the client was still there
    fault       the kind of fault it met
    """

    n: int
    at: float
    place: str
    method: str
    path: str
    user_agent: str
    instance: str | None = None
    token: Literal["instance", "host", "wrong", "none"] = "none"  # noqa: S105 - a word, not a token
    to: str | None = None
    type: str | None = None
    text: str | None = None
    url: str | None = None
    id: str | None = None
    size: int | None = None
    sha256: str | None = None
    digest: str | None = None
    outcome: Literal["accepted", "refused", "dropped_before"] = "dropped_before"
    reason: str | None = None
    http: int | None = None
    answered: bool = False
    fault: str | None = None


class MegaCalls:
    """The journal of one host."""

    def __init__(self) -> None:
        self._last = 0
        self._open: dict[MegaCall, Callable[[], bool]] = {}
        self.clear()

    def clear(self) -> None:
        """Forget all; calls under way stay open."""
        self._calls: list[MegaCall] = []
        self._most: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._places: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._recipients: Counter[tuple[str, str]] = Counter()
        self._contents: Counter[int] = Counter()  # by their hashes, which are smaller
        self._polls: Counter[str] = Counter()

    @contextmanager
    def call(
        self, is_gone: Callable[[], bool], place: str, method: str, path: str, user_agent: str
    ) -> Iterator[MegaCall]:
        """A request's head was read; `is_gone` tells whether its client has left. Counted when it has ended."""
        self._last += 1
        call = MegaCall(self._last, time.time(), place, method, path, user_agent)
        calls = self._calls
        calls.append(call)
        if len(calls) > MOST:
            del calls[: MOST // 2]
        self._open[call] = is_gone
        # One whose client has left is not under way any more, even if its own task has yet to notice.
        self._most[place] = max(self._most[place], self.in_flight()[place])
        try:
            yield call
        finally:
            del self._open[call]
            if calls is self._calls:
                self._count(call)

    def sent(self, call: MegaCall) -> None:
        """The call's message is accepted."""
        where = (call.instance or "", call.to or "")
        self._recipients[where] += 1
        self._contents[hash((*where, call.digest))] += 1

    def in_flight(self) -> Counter[str]:
        return Counter(call.place for call, is_gone in self._open.items() if not is_gone())

    def _count(self, call: MegaCall) -> None:
        self._outcomes[call.outcome] += 1
        self._places[call.place] += 1
        if call.reason is not None:
            self._reasons[call.reason] += 1
        if call.place == "status" and call.instance is not None:
            self._polls[call.instance] += 1

    def listed(
        self, limit: int, *, place: str | None = None, instance: str | None = None, after: int | None = None
    ) -> list[MegaCall]:
        """The latest `limit` calls, or with `after` the first `limit` of those with a higher `n`; newest last."""

        def fits(call: MegaCall) -> bool:
            return place in (None, call.place) and instance in (None, call.instance)

        if after is not None:
            return list(islice((call for call in self._calls if call.n > after and fits(call)), limit))
        return list(islice((call for call in reversed(self._calls) if fits(call)), limit))[::-1]

    def summary(self) -> JSON:
        """Counts of the calls that have ended since the last `clear`.

        reasons            why calls were refused
        sends              accepted messages
        recipients         how many messages each recipient of each instance was sent, most first
        by_recipient_max   the most of them
        by_content_max     most accepted messages of one content to one recipient of one instance: 2 is a double
        polled, polled_max how many instances were asked for their status one by one, and the most often
        in_flight          calls that have not ended, by place
        most_in_flight     the most of them at one time, by place
        """
        return {
            "calls": self._outcomes.total(),
            "accepted": self._outcomes["accepted"],
            "refused": self._outcomes["refused"],
            "dropped_before": self._outcomes["dropped_before"],
            "by_place": dict(sorted(self._places.items())),
            "reasons": dict(sorted(self._reasons.items())),
            "sends": self._recipients.total(),
            "recipients": {" ".join(where): n for where, n in self._recipients.most_common(MOST_RECIPIENTS)},
            "by_recipient_max": max(self._recipients.values(), default=0),
            "by_content_max": max(self._contents.values(), default=0),
            "polled": len(self._polls),
            "polled_max": max(self._polls.values(), default=0),
            "in_flight": dict(sorted(self.in_flight().items())),
            "most_in_flight": dict(sorted(self._most.items())),
        }
