"""Ids that sort by time of birth (UUIDv7, RFC 9562 §5.7). Python has them from 3.14 on."""

import os
import threading
import time
from datetime import UTC, datetime
from uuid import UUID

_lock = threading.Lock()
_last = 0


def uuid7() -> UUID:
    """A new id: 48 bits of Unix milliseconds, then 74 random bits. Strictly growing within a process."""
    global _last
    with _lock:
        value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
        value = value & ~(0xF << 76) & ~(0x3 << 62) | 0x7 << 76 | 0x2 << 62
        if value <= _last:  # same millisecond, or the clock went back: stay ahead of the id before
            value = _last + 1
        _last = value
    return UUID(int=value)


def born(id_: UUID) -> datetime:
    """When a UUIDv7 was made, by the clock of the host that made it; UTC."""
    return datetime.fromtimestamp((id_.int >> 80) / 1000, UTC)
