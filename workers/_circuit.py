"""Leave a host alone that does not answer: its files must not take the time of the others' (security-reliability.md
O8).

One per process, without a word to the others: each of them probes twice a minute at most.
"""

import threading
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar
from uuid import UUID

from pombal import log
from providers.instance import InstanceFault

_log = log.get()
T = TypeVar("T")

FILES = 5  # that failed in a row, before the host is left alone; one bad file is not the host's trouble
PAUSE = 30.0  # seconds between two probes
_MOST_HOSTS = 1_000  # whose failures are counted
_OF_THE_HOST = ("timeout", "unreachable")  # faults that take threads; whatever else it says, it answers


class Circuit:
    """Safe for threads."""

    def __init__(self, pause: float = PAUSE) -> None:
        self._pause = pause
        self._lock = threading.Lock()
        self._failed: dict[str, set[UUID]] = {}
        self._probe_at: dict[str, float] = {}  # of hosts that are left alone; monotonic

    def allows(self, host: str) -> bool:
        """Whether this host may be asked. Of those who ask for one that is left alone, one may each `pause`."""
        now = time.monotonic()
        with self._lock:
            probe_at = self._probe_at.get(host)
            if probe_at is None:
                return True
            if now < probe_at:
                return False
            self._probe_at[host] = now + self._pause
            return True

    def answered(self, host: str) -> None:
        """It did, whatever it said."""
        with self._lock:
            self._failed.pop(host, None)
            self._probe_at.pop(host, None)

    def failed(self, host: str, file: UUID) -> bool:
        """It did not, when this file was wanted. True when it is left alone from now on."""
        with self._lock:
            if len(self._failed) > _MOST_HOSTS and host not in self._failed:
                self._failed.clear()  # of links, which are endless; what is left alone stays so
            failed = self._failed.setdefault(host, set())
            if len(failed) < FILES:
                failed.add(file)
            if len(failed) < FILES or host in self._probe_at:
                return False
            self._probe_at[host] = time.monotonic() + self._pause
            return True

    async def reach(self, host: str, channel: UUID, what: Callable[[], Awaitable[T]]) -> T:
        """Ask this gateway something about a channel, unless it is left alone: then `InstanceFault` says so."""
        if not self.allows(host):
            text = "its gateway did not answer several times in a row"
            raise InstanceFault("paused", text, is_transient=True, wait=PAUSE)
        try:
            found = await what()
        except InstanceFault as fault:
            if fault.code not in _OF_THE_HOST:
                self.answered(host)
            elif self.failed(host, channel):
                _log.error("gateway_paused", channel_id=str(channel), code=fault.code)
            raise
        self.answered(host)
        return found
