"""One line of a gateway's log without what others wrapped around it (baileys-sessions.md §1).

Docker's json-file, compose's `service  | `, PM2's `0|name  | `, Kubernetes' and Docker's times; colours. Below that
stand lines of pino (JSON), of pino-pretty (a head, and more lines that begin with spaces), or plain text.

Every pattern here is anchored, of bounded repeats and without one repeat inside another: none can backtrack for long
(security-reliability.md X17).
"""

import re
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, NamedTuple

import msgspec

PHRASES = (b"invalid prekey id", b"bad mac", b"prekeyerror", b"failed to decrypt message")
"""What the old system's script looked for, in lower case. A line with one of them *matches*, and no more than that."""

_COLOUR = re.compile(r"\x1b\[[0-9;]{0,16}[A-Za-z]")
_SERVICE = re.compile(r"(?:[0-9]{1,4}\|)?([A-Za-z0-9][A-Za-z0-9_.-]{0,63}) {0,64}\| ?")
_STAMP = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?(?:Z| ?[+-][0-9]{2}:?[0-9]{2})?):? "
    r"(?:(stdout|stderr) ([FP]) )?"
)
_HEAD = re.compile(
    r"(?:\[([^\]]{1,40})\] )?(TRACE|DEBUG|INFO|WARN|ERROR|FATAL|USERLVL)(?: \[([^\]]{1,40})\])?"
    r"(?: \(([^)]{0,120})\))?: ?"
)
_ENVELOPE = b'{"log":'


class Line(NamedTuple):
    """`source` wrote it: lines of one source keep their order. `service` is the name before the bar, '' without one;
    `at` the time that the wrapping tells. Of a partial line the rest follows in the next of the same source."""

    source: str
    service: str
    text: str
    at: datetime | None
    is_partial: bool = False


class Head(NamedTuple):
    """The first line of a record of pino-pretty; `fields` is what stands behind the message on the same line."""

    level: str
    at: datetime | time | None
    message: str
    fields: dict[str, Any] | None


def unwrap(raw: bytes) -> Line:
    """Whatever bytes came, as a line."""
    stream, at, is_partial = "", None, False
    text = None
    if raw.startswith(_ENVELOPE) and isinstance(envelope := from_json(raw), dict):
        log = envelope.get("log")
        if isinstance(log, str) and ("stream" in envelope or "time" in envelope):
            is_partial = not log.endswith("\n")
            text, stream, at = log, str(envelope.get("stream", ""))[:8], moment(envelope.get("time"))
    if text is None:
        text = raw.decode("utf-8", "replace")
    text = text.rstrip("\r\n")
    if "\x1b" in text:
        text = _COLOUR.sub("", text)
    service = ""
    if not text.startswith(("{", " ")) and (match := _SERVICE.match(text)):
        service, text = match[1], text[match.end() :]
    if text[:2].isdecimal() and (match := _STAMP.match(text)):
        at = moment(match[1]) or at
        stream, is_partial = match[2] or stream, match[3] == "P" if match[3] else is_partial
        text = text[match.end() :]
    return Line(f"{service}/{stream}", service, text, at if isinstance(at, datetime) else None, is_partial)


def head(text: str) -> Head | None:
    """What begins a record of pino-pretty; None for any other text."""
    match = _HEAD.match(text)
    if match is None:
        return None
    message, fields = text[match.end() :].strip(), None
    if message.endswith("}") and (start := message.find(" {")) > 0:  # its `singleLine`
        found = from_json(message[start + 1 :].encode())
        if isinstance(found, dict):
            message, fields = message[:start], found
    return Head(match[2], moment(match[1] or match[3]), message, fields)


def pretty_fields(lines: list[str]) -> dict[str, Any]:
    """The fields of such a record, from the lines below its head. What is no JSON, as a stack, is kept as text."""
    found: dict[str, Any] = {}
    n = 0
    while n < len(lines):
        name, colon, rest = lines[n].strip().partition(":")
        n += 1
        depth = _depth(lines[n - 1])
        inner = []
        while n < len(lines) and (_depth(lines[n]) > depth or lines[n].strip() in ("}", "]", "},", "],")):
            inner.append(lines[n])
            n += 1
            if _depth(inner[-1]) == depth:
                break
        if not colon or not name:
            continue
        value = from_json("\n".join([rest, *inner]).encode())
        if value is None and inner:
            value = _salvaged(inner)
        if value is not None:
            found.setdefault(name.strip('"'), value)
    return found


def _salvaged(lines: list[str]) -> dict[str, Any]:
    """An object that is JSON but for some text in between: its fields of one line, and the rest as `stack`."""
    found: dict[str, Any] = {}
    other = []
    for line in lines:
        name, colon, value = line.strip().rstrip(",").partition(": ")
        known = from_json(value.encode()) if colon and name.startswith('"') else None
        if known is None:
            other.append(line)
        else:
            found.setdefault(name.strip('"'), known)
    return {"stack": "\n".join(other), **found}


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def from_json(raw: bytes) -> Any:
    """The value, or None for what is none; bytes that are no UTF-8 are replaced."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        pass
    except UnicodeDecodeError:
        try:
            return msgspec.json.decode(raw.decode("utf-8", "replace"))
        except (msgspec.DecodeError, RecursionError, UnicodeError):
            pass
    return None


def moment(said: object) -> datetime | time | None:
    """A time as loggers write it: milliseconds or seconds since 1970, ISO 8601, or a time of day. Without a zone it
    stays so (naive). None for anything else."""
    if isinstance(said, str) and said.isascii() and said.isdecimal() and len(said) <= 16:
        said = int(said)
    if isinstance(said, int | float) and not isinstance(said, bool):
        try:
            return datetime.fromtimestamp(said / 1000 if said > 1e11 else said, UTC)
        except (OverflowError, ValueError, OSError):
            return None
    if not isinstance(said, str):
        return None
    said = said.strip()[:40]
    day, _, rest = said.partition(" ")
    if rest and len(day) == len("2025-09-11"):  # a space before the zone is no ISO
        said = f"{day}T{rest.replace(' ', '')}"
    if len(said) > len("2025-09-11T15:00:00.123456") and "." in said:  # Docker writes nine digits
        start = said.index(".") + 1
        end = start
        while end < len(said) and said[end].isdecimal():
            end += 1
        said = said[:start] + said[start : min(end, start + 6)] + said[end:]
    try:
        return in_utc(datetime.fromisoformat(said))
    except OverflowError:
        return None
    except ValueError:
        pass
    try:
        return time.fromisoformat(said)
    except ValueError:
        return None


def in_utc(at: datetime) -> datetime:
    """A moment with a zone in UTC, since not every zone that loggers may write is one that databases take; one without
    a zone stays so. Raises `OverflowError` where that is in no year."""
    return at if at.tzinfo is None else at.astimezone(UTC)


def on_a_day(at: time, day: date, before: datetime | None) -> datetime | None:
    """A time of day as a moment: of that day, or of the first after on which it is no more than half a day before
    `before`. None where that is in no year."""
    try:
        made = in_utc(datetime.combine(day, at, at.tzinfo or UTC))
        behind = before - made - timedelta(hours=12) if before is not None else timedelta(0)
        return made if behind <= timedelta(0) else made + timedelta(days=-(-behind // timedelta(days=1)))
    except OverflowError:
        return None
