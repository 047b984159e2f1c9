"""The log file of one simulated gateway, in the forms in which such files are found (baileys-sessions.md §1, §8).

pino     a JSON line for each record        pretty   pino-pretty with colours, several lines
docker   either, each line in an envelope of Docker's json-file; compose and pm2 put a prefix before each line
"""

import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from sandbox.baileys_lines import Console, Entry, Record
from sandbox.config import LogFormat
from sandbox.meta import JSON

_PREFIXES = {"compose": "gateway-1  | ", "pm2": "0|gateway  | "}
_LEVELS = {30: ("32", "INFO"), 40: ("33", "WARN"), 50: ("31", "ERROR")}


class LogPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a gateway logs.

    path      of the file; None for no log
    format    see above
    level     of pino: 50 for errors alone, 30 for more
    field     under which name a record tells its session; None for none
    iso_time  the time as an ISO string, as Baileys' own default logger has it
    prefix    before each of pino's messages, such as "[baileys]: " in Ticketz
    """

    path: str | None = None
    format: LogFormat = "pino"
    level: int = 30
    field: str | None = None
    iso_time: bool = False
    prefix: str = ""


class Log:
    """One file, written line by line, and never kept open."""

    def __init__(self, plan: LogPlan) -> None:
        self.plan = plan

    def write(self, session: str, entries: Iterable[Entry]) -> None:
        """What one session's part of the process prints."""
        at = time.time()
        lines = itertools.chain.from_iterable(self._printed(session, entry, at) for entry in entries)
        self._append("".join(lines))

    def plain(self, lines: Iterable[str]) -> None:
        """These very lines, in the envelope or with the prefix that the file has."""
        at = time.time()
        self._append("".join(self._wrapped(line, "stdout", at) for line in lines))

    def size(self) -> int:
        """Of the file, in bytes."""
        path = Path(self.plan.path or "")
        return path.stat().st_size if path.is_file() else 0

    def rotate(self) -> None:
        """As logrotate does: another name, and a new file."""
        if self.plan.path is not None:
            path = Path(self.plan.path)
            if path.exists():
                os.replace(path, f"{path}.1")
            path.touch()

    def truncate(self) -> None:
        """As logrotate's copytruncate does: the same file, empty."""
        if self.plan.path is not None:
            path = Path(self.plan.path)
            if path.exists():
                Path(f"{path}.1").write_bytes(path.read_bytes())
            with path.open("r+b" if path.exists() else "wb") as file:
                file.truncate(0)

    def _append(self, text: str) -> None:
        if self.plan.path is not None and text:
            path = Path(self.plan.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(text)

    def _printed(self, session: str, entry: Entry, at: float) -> Iterator[str]:
        if isinstance(entry, Console):
            for line in entry.lines:
                yield self._wrapped(line, entry.stream, at)
            return
        if entry.level < self.plan.level:
            return
        record = self._record(session, entry, at)
        lines = _pretty(record, at) if "pretty" in self.plan.format else [_json(record)]
        for line in lines:
            yield self._wrapped(line, "stdout", at)

    def _record(self, session: str, entry: Record, at: float) -> JSON:
        told: Any = int(at * 1000)
        if self.plan.iso_time:
            told = _iso(at, "milliseconds")
        record: JSON = {"level": entry.level, "time": told, "pid": 1, "hostname": "gateway-1"}
        if entry.is_baileys:
            record["class"] = "baileys"
        if self.plan.field is not None:
            record[self.plan.field] = int(session) if session.isdecimal() else session
        return {**record, **entry.fields, "msg": self.plan.prefix + entry.msg}

    def _wrapped(self, line: str, stream: str, at: float) -> str:
        envelope = self.plan.format.partition("+")[0]
        if envelope == "docker":
            when = _iso(at, "microseconds").replace("Z", "000Z")
            return _json({"log": f"{line}\n", "stream": stream, "time": when}) + "\n"
        return f"{_PREFIXES.get(envelope, '')}{line}\n"


def _json(value: JSON) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _iso(at: float, precision: str) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec=precision).replace("+00:00", "Z")


def _pretty(record: JSON, at: float) -> list[str]:
    """pino-pretty with levelFirst, translateTime and colorize, as in the samples (05)."""
    colour, label = _LEVELS[record["level"]]
    when = datetime.fromtimestamp(at, UTC)
    time = when.strftime("%Y-%m-%d %H:%M:%S.") + f"{when.microsecond // 1000:03} +0000"
    lines = [f"\x1b[{colour}m{label}\x1b[39m [{time}] (1): \x1b[36m{record['msg']}\x1b[39m"]
    rest = {k: v for k, v in record.items() if k not in ("level", "time", "pid", "hostname", "msg", "err", "error")}
    for name, value in rest.items():
        first, *more = json.dumps(value, indent=2, ensure_ascii=False).split("\n")
        lines += [f"    \x1b[35m{name}\x1b[39m: {first}", *(f"    {line}" for line in more)]
    for name in ("error", "err"):
        if name in record:
            lines += _pretty_error(name, record[name])
    return lines


def _pretty_error(name: str, error: JSON) -> list[str]:
    lines = [f"    {name}: {{"]
    last = list(error)[-1] if error else None
    for field, value in error.items():
        if field == "stack":
            lines += ['      "stack":', *(f"          {line}" for line in value.split("\n"))]
        else:
            comma = "" if field == last else ","
            lines.append(f"      {json.dumps(field)}: {json.dumps(value, ensure_ascii=False)}{comma}")
    return [*lines, "    }"] if error else [f"    {name}: {{}}"]
