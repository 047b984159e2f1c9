"""Leave a host alone that does not answer: its files must not take the time of the others' (security-reliability.md
O8).

One per process, without a word to the others: each of them probes twice a minute at most.
"""

import threading
import time

FAILURES = 5  # in a row, before the host is left alone
PAUSE = 30.0  # seconds between two probes


class Circuit:
    """Safe for threads."""

    def __init__(self, pause: float = PAUSE) -> None:
        self._pause = pause
        self._lock = threading.Lock()
        self._failures: dict[str, int] = {}
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
            self._failures.pop(host, None)
            self._probe_at.pop(host, None)

    def failed(self, host: str) -> bool:
        """It did not. True when it is left alone from now on."""
        with self._lock:
            failures = self._failures[host] = self._failures.get(host, 0) + 1
            if failures < FAILURES or host in self._probe_at:
                return False
            self._probe_at[host] = time.monotonic() + self._pause
            return True
