"""What the simulated Baileys gateways were asked, and what they made of it: their own truth."""

import time
from collections import Counter
from typing import Any, Literal

import msgspec

from sandbox.meta import JSON

MOST = 100_000  # calls remembered; half of them are forgotten when there are more
LONG = 2_000  # characters of a text in a body that are remembered


class BaileysCall(msgspec.Struct, eq=False):
    """One request.

    n          counts from 1 and never starts again
    at         unix seconds at which its head was read
    operation  one of `sandbox.kinds.BAILEYS_PLACES`, or elsewhere
    session    the gateway's id of it
    key        right, wrong or none
    body       its JSON, long texts shortened; of a form, its fields
    to, type, text, url, size, sha256   of a message
    id         the message's, once it is accepted
    outcome    accepted, refused (with the `reason`), or dropped_before: met a fault before anything was decided
    http       the status line sent, None when none was
    answered   whether the whole answer was written while the client was still there
    fault      the kind of fault it met
    """

    n: int
    at: float
    gateway: str
    operation: str
    method: str
    path: str
    query: str
    session: str | None = None
    key: Literal["right", "wrong", "none"] = "none"
    body: Any = None
    to: str | None = None
    type: str | None = None
    text: str | None = None
    url: str | None = None
    id: str | None = None
    size: int | None = None
    sha256: str | None = None
    outcome: Literal["accepted", "refused", "dropped_before"] = "dropped_before"
    reason: str | None = None
    http: int | None = None
    answered: bool = False
    fault: str | None = None


class BaileysCalls:
    """The journal of all gateways of one stand-in."""

    def __init__(self) -> None:
        self._last = 0
        self._calls: list[BaileysCall] = []

    def clear(self) -> None:
        self._calls = []

    def begin(self, gateway: str, operation: str, method: str, path: str, query: str) -> BaileysCall:
        """A request's head was read."""
        self._last += 1
        call = BaileysCall(self._last, time.time(), gateway, operation, method, path, query)
        self._calls.append(call)
        if len(self._calls) > MOST:
            del self._calls[: MOST // 2]
        return call

    def listed(
        self,
        limit: int,
        *,
        gateway: str | None = None,
        session: str | None = None,
        operation: str | None = None,
        after: int | None = None,
    ) -> list[BaileysCall]:
        """The latest `limit` calls, or with `after` the first `limit` of those with a higher `n`; newest last."""
        found = [
            call
            for call in self._calls
            if gateway in (None, call.gateway)
            and session in (None, call.session)
            and operation in (None, call.operation)
            and (after is None or call.n > after)
        ]
        return found[:limit] if after is not None else found[-limit:]

    def summary(self) -> JSON:
        """How many calls there were of each operation, and of each outcome."""
        return {
            "by_operation": dict(sorted(Counter(call.operation for call in self._calls).items())),
            "by_outcome": dict(sorted(Counter(call.outcome for call in self._calls).items())),
        }


def shortened(value: Any) -> Any:
    """A body as the journal keeps it."""
    if isinstance(value, str):
        return value if len(value) <= LONG else f"<{len(value)} characters>"
    if isinstance(value, dict):
        return {name: shortened(one) for name, one in value.items()}
    if isinstance(value, list):
        return [shortened(one) for one in value]
    return value
