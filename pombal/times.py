"""Times as others read them: ISO 8601 in UTC, with `Z`, as a Node program writes them."""

from datetime import UTC, datetime
from typing import Literal


def zulu(at: datetime, timespec: Literal["seconds", "milliseconds"] = "milliseconds") -> str:
    """An aware time as text."""
    return at.astimezone(UTC).isoformat(timespec=timespec).replace("+00:00", "Z")
