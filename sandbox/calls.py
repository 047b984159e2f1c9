"""The provider's own truth: every send call it got, what it made of it, and whether the client heard.

Counts are kept as calls come, so that a summary costs nothing however many there were.
"""

import time
from collections import Counter, deque
from collections.abc import Callable
from itertools import islice
from typing import Literal

import msgspec

from sandbox.meta import JSON

MOST = 250_000  # calls remembered; half of them are forgotten when there are more


class Call(msgspec.Struct, eq=False):
    """One `POST …/messages`.

    n         counts from 1 and never starts again
    at        unix seconds at which it was read
    to        as given: a number with its plus or a BSUID
    type      as given; `read` for a mark-read
    text      `text.body`, to check order by
    callback  its `biz_opaque_callback_data`
    outcome   accepted, refused (with `code`), or dropped_before: met a fault before anything was decided
    http      the status line sent, None when none was
    answered  whether the whole HTTP answer was written while the client was still there
    fault     the kind of fault it met
    """

    n: int
    at: float
    phone_number_id: str
    channel: str | None
    to: str | None
    type: str | None
    text: str | None
    callback: str | None
    body_hash: str
    outcome: Literal["accepted", "refused", "dropped_before"] = "dropped_before"
    code: int | None = None
    http: int | None = None
    wamid: str | None = None
    answered: bool = False
    fault: str | None = None


class BusiestSecond:
    """The most moments that fell within any 1.000 s; they are added in order, in seconds on any clock."""

    def __init__(self) -> None:
        self.most = 0
        self._recent: deque[float] = deque()

    def add(self, at: float) -> None:
        self._recent.append(at)
        while self._recent[0] <= at - 1:
            self._recent.popleft()
        self.most = max(self.most, len(self._recent))


class Calls:
    """The journal of one sandbox."""

    def __init__(self) -> None:
        self._last = 0
        self._open: dict[Call, Callable[[], bool]] = {}
        self._open_to: dict[tuple[str, str], set[Call]] = {}
        self.clear()

    def clear(self) -> None:
        """Forget all; calls under way stay open."""
        self._calls: list[Call] = []
        self._counts: Counter[str] = Counter()
        self._codes: Counter[int] = Counter()
        self._callbacks: Counter[str] = Counter()
        self._texts: Counter[int] = Counter()  # by their hashes, which are smaller
        self._rate_refusals: Counter[str] = Counter()
        self._busiest: dict[str, BusiestSecond] = {}
        self._most_open = 0

    def begin(
        self,
        is_gone: Callable[[], bool],
        *,
        phone_number_id: str,
        channel: str | None,
        to: str | None,
        type: str | None,
        text: str | None,
        callback: str | None,
        body_hash: str,
    ) -> Call:
        """A call was read; `is_gone` tells whether its client has left. `end` must follow."""
        self._last += 1
        call = Call(self._last, time.time(), phone_number_id, channel, to, type, text, callback, body_hash)
        self._calls.append(call)
        self._counts["calls"] += 1
        if len(self._calls) > MOST:
            del self._calls[: MOST // 2]
        self._open[call] = is_gone
        if to is not None:
            beside = self._open_to.setdefault((phone_number_id, to), set())
            beside.add(call)
            if len(beside) > self._most_open:
                # One whose client has left is not open any more, even if its own task has yet to notice.
                self._most_open = max(self._most_open, sum(not self._open[other]() for other in beside))
        return call

    def end(self, call: Call) -> None:
        del self._open[call]
        if call.to is not None:
            beside = self._open_to[call.phone_number_id, call.to]
            beside.discard(call)
            if not beside:
                del self._open_to[call.phone_number_id, call.to]

    def accepted(self, call: Call, wamid: str | None) -> None:
        """Graph took it; `wamid` is None for a mark-read."""
        call.outcome = "accepted"
        call.wamid = wamid
        if wamid is None:
            self._counts["reads"] += 1
            return
        self._counts["accepted"] += 1
        if call.callback is not None:
            self._callbacks[call.callback] += 1
        if call.text is not None:
            self._texts[hash(call.text)] += 1
        self._busiest.setdefault(call.channel or "", BusiestSecond()).add(time.monotonic())

    def refused(self, call: Call, code: int, *, by_rate: bool = False) -> None:
        call.outcome = "refused"
        call.code = code
        self._counts["refused"] += 1
        self._codes[code] += 1
        if by_rate:
            self._rate_refusals[call.channel or ""] += 1

    def listed(self, limit: int, *, channel: str | None = None, after: int | None = None) -> list[Call]:
        """The latest `limit` calls, or with `after` the first `limit` of those with a higher `n`; newest last."""
        first = self._last - len(self._calls) + 1 if self._calls else 1
        if after is not None:
            later = islice(self._calls, max(0, after - first + 1), None)
            return list(islice((call for call in later if channel in (None, call.channel)), limit))
        latest = (call for call in reversed(self._calls) if channel in (None, call.channel))
        return list(islice(latest, limit))[::-1]

    def summary(self) -> JSON:
        """Counts since the last `clear`.

        reads                          accepted mark-reads; all the other counts of accepted calls leave them out
        by_callback_max, by_text_max   most accepted calls with the same callback data, or the same text
        texts                          how many different texts were accepted
        busiest_second                 for each channel, most accepted calls within any 1.000 s
        rate_refusals                  for each channel, refusals by its number's rate
        max_in_flight_per_recipient    most calls that were open for one recipient of one number at a time
        """
        counts = self._counts
        return {
            "calls": counts["calls"],
            "accepted": counts["accepted"],
            "refused": counts["refused"],
            "dropped_before": counts["calls"] - counts["accepted"] - counts["refused"] - counts["reads"],
            "reads": counts["reads"],
            "by_code": {str(code): count for code, count in sorted(self._codes.items())},
            "by_callback_max": max(self._callbacks.values(), default=0),
            "by_text_max": max(self._texts.values(), default=0),
            "texts": len(self._texts),
            "in_flight": sum(not is_gone() for is_gone in self._open.values()),
            "max_in_flight_per_recipient": self._most_open,
            "busiest_second": {channel: busiest.most for channel, busiest in self._busiest.items()},
            "rate_refusals": dict(self._rate_refusals),
        }
