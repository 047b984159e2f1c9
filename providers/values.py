"""Careful reading of what strangers send: bytes to plain JSON values, and single values out of JSON objects.

Shared by every webhook parser. Everything here raises `Rejected`, and nothing else, with a reason that names the rule
and never the content (security-reliability.md B1, B3, B4). Text comes out clean for PostgreSQL.
"""

import re
from datetime import UTC, datetime
from typing import Any

import msgspec

from pombal.errors import Rejected

MAX_ID = 512
MAX_TYPE = 64
MAX_STATUS = 32
MAX_ERROR = 1_000
MAX_NAME = 512
_MAX_DEPTH = 64
_MAX_INTEGER = 10**308  # msgspec reads integers of 4300 digits; beyond a double, other JSON readers give up

_MILLISECONDS = 10**12  # in seconds this is the year 33658
_LAST_SECOND = 253_370_764_799  # the end of year 9998: a day or a week later is a date as well

# -- bytes to JSON ---------------------------------------------------------------------------------------------------

# One escape, read from its backslash so that `\\u0000` (a backslash, then text) is never mistaken for one. Group 1
# catches what PostgreSQL cannot store: a NUL, or a surrogate that is not half of the pair the first branch takes.
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u(?:0000|[dD][89a-fA-F][0-9a-fA-F]{2}))|.)",
    re.DOTALL,
)


def decode(raw: bytes) -> Any:
    """The body as plain JSON values, without NUL or lone surrogates (B3); a body is repaired only when it must be."""
    if b"\\u0000" in raw:
        return _load(_repair(raw))
    try:
        return _load(raw)
    except Rejected:
        # msgspec refuses lone surrogates, but with no error of their own.
        if b"\\u" not in raw:
            raise
        return _load(_repair(raw))


def _repair(raw: bytes) -> bytes:
    return _ESCAPE.sub(lambda escape: rb"\ufffd" if escape[1] else escape[0], raw)


def _load(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except UnicodeDecodeError:
        raise Rejected("not UTF-8") from None
    except RecursionError:
        raise Rejected("nested too deeply") from None
    except msgspec.ValidationError:  # the only rule left without a type to validate: 1e999, 100,000 digits
        raise Rejected("number out of range") from None
    except ValueError:
        raise Rejected("not JSON") from None


def storable(value: Any, levels: int = _MAX_DEPTH) -> None:
    """Raise when jsonb, or whoever reads it later, could not take this value."""
    kind = type(value)
    if kind is int:
        if not -_MAX_INTEGER <= value <= _MAX_INTEGER:
            raise Rejected("number out of range")
    elif kind is dict or kind is list:
        if not levels:
            raise Rejected("nested too deeply")
        for inner in value.values() if kind is dict else value:
            if type(inner) is not str:
                storable(inner, levels - 1)


# -- single values ---------------------------------------------------------------------------------------------------


def id_of(holder: dict[str, Any], key: str) -> str | None:
    """An id, written as text or as a number; None when absent or empty."""
    value = holder.get(key)
    if type(value) is not str:
        if value is None:
            return None
        if type(value) is not int:
            raise Rejected(f"{key} is not text")
        value = str(value)
    if len(value) > MAX_ID:
        raise Rejected(f"{key} too long")
    return value or None


def required_id(holder: dict[str, Any], key: str) -> str:
    value = id_of(holder, key)
    if value is None:
        raise Rejected(f"no {key}")
    return value


def word_of(holder: dict[str, Any], key: str) -> str:
    """A name that the sender chose, such as a type or a field."""
    value = holder.get(key)
    if type(value) is not str or not value:
        raise Rejected(f"no {key}")
    if len(value) > MAX_TYPE:
        raise Rejected(f"{key} too long")
    return value


def status_word(holder: dict[str, Any], key: str) -> str:
    word = word_of(holder, key).lower()
    if len(word) > MAX_STATUS:
        raise Rejected(f"{key} too long")
    return word


def text_of(holder: dict[str, Any], key: str, limit: int) -> str | None:
    """A text to show or compare, never worth a rejection: another type counts as absent."""
    value = holder.get(key)
    return value[:limit] or None if type(value) is str else None


def object_of(holder: dict[str, Any], key: str) -> dict[str, Any] | None:
    value = holder.get(key)
    if type(value) is not dict:
        return None
    storable(value)
    return value


def time_of(value: Any) -> datetime | None:
    """Seconds, or milliseconds as some senders have it, as text or number; None when it is no such time (B4)."""
    if type(value) is str:
        # 20 digits are plenty, and int() would take 4300 of them, signs, blanks and underscores.
        if len(value) > 20 or not (value.isascii() and value.isdecimal()):
            return None
        value = int(value)
    if type(value) is not int or value <= 0:
        return None
    seconds = value / 1000 if _MILLISECONDS <= value < 1000 * _LAST_SECOND else value
    return datetime.fromtimestamp(seconds, UTC) if seconds <= _LAST_SECOND else None
