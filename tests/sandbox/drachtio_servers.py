"""A simulated drachtio on real sockets, in a thread of its own, for any test."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sandbox.drachtio import Standin, in_a_thread

SECRET = "a-secret-of-drachtio"


@contextmanager
def a_drachtio(**options: Any) -> Iterator[Standin]:
    """One on free ports that gives requests up after 2 seconds; `options` are `Standin`'s."""
    with in_a_thread(Standin(options.pop("secret", SECRET), **{"timeout": 2.0, "t1": 0.05, **options})) as standin:
        yield standin


def wait_until(is_so: Callable[[], object], *, seconds: float = 10) -> None:
    """Wait until it is."""
    end, never = time.monotonic() + seconds, threading.Event()
    while not is_so():
        assert time.monotonic() < end, "it did not come to be so"
        never.wait(0.01)
