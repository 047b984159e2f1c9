"""How many log lines a flood may cause."""

import time


class Quota:
    """So many per second, the rest is only counted elsewhere. For one event loop, so without a lock."""

    def __init__(self, per_second: int) -> None:
        self._per_second = per_second
        self._second = 0
        self._used = 0

    def allows(self) -> bool:
        now = int(time.monotonic())
        if now != self._second:
            self._second, self._used = now, 0
        self._used += 1
        return self._used <= self._per_second
