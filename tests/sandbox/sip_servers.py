"""A simulated SIP registrar on a real port, for any test."""

from collections.abc import Iterator
from contextlib import contextmanager

from sandbox.sip_thread import SipThread


@contextmanager
def a_registrar(port: int = 0) -> Iterator[SipThread]:
    """One without accounts and habits."""
    running = SipThread(port).start()
    try:
        yield running
    finally:
        running.stop()
