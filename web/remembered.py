"""What proves a sender, remembered for some seconds: a flood asks the database once, and an outage of it little."""

import asyncio
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from pombal import db
from web.errors import Failure

K = TypeVar("K")
V = TypeVar("V")

_KNOWN_FOR = 10.0  # seconds for which it is believed without asking: what was revoked stops within that time
_ASK_AGAIN = 2.0  # … and more while it is being asked, or has not answered
_SECONDS_TO_ASK, _SECONDS_TO_REFRESH = 2.5, 0.3  # the second leaves a request its time for the commit (W3)


class Remembered(Generic[K, V]):
    """What `load` finds, in a thread, for some seconds, and longer while Postgres is away.

    What `exists` denies is never kept: strangers' guesses must not fill the memory. For one event loop, so without a
    lock.
    """

    def __init__(self, load: Callable[[K], V], exists: Callable[[V], bool]) -> None:
        self._load, self._exists = load, exists
        self._known: dict[K, tuple[float, V]] = {}

    def __len__(self) -> int:
        return len(self._known)

    async def get(self, key: K) -> V:
        """Raises 503 when the database does not answer and nothing is remembered."""
        known = self._known.get(key)
        if known and time.monotonic() - known[0] < _KNOWN_FOR:
            return known[1]
        if known:  # one request asks, the others go on with what is known
            self._known[key] = (time.monotonic() - _KNOWN_FOR + _ASK_AGAIN, known[1])
        try:
            async with asyncio.timeout(_SECONDS_TO_REFRESH if known else _SECONDS_TO_ASK):
                found = await asyncio.to_thread(self._load, key)
        except Exception as error:
            if not (isinstance(error, TimeoutError) or db.is_store_trouble(error)):
                raise
            if known:
                return known[1]
            raise Failure(503, "UNAVAILABLE", "the database is away", retry_after=5) from None
        if self._exists(found):
            self._known[key] = (time.monotonic(), found)
        else:
            self._known.pop(key, None)
        return found
