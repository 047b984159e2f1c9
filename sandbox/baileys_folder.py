"""The folder of one simulated Baileys session, in the layout of `useMultiFileAuthState` (baileys-sessions.md §4).

While the socket lives, what was read at its start is the truth: a file that somebody deletes or changes is put back,
as the library does with its next save, and the journal has it as `touched_while_open`.
"""

import json
import re
import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from sandbox.meta import JSON

Touched = Literal["deleted", "changed", "added"]
Stamp = tuple[int, int, int]

_BAILEYS = re.compile(
    r"(creds|pre-key-\d+|session-.+|sender-key-.+|app-state-sync-(key|version)-.+|lid-mapping-.+|identity-key-.+"
    r"|device-list-.+|tctoken-.+)\.json"
)


class Touch(msgspec.Struct):
    """A file that somebody else deleted, changed or added.

    kind  touched_while_open: one of Baileys' own, which was put back if it was there before; added_while_open: any
          other; touched_while_closed: seen when the socket started
    """

    n: int
    at: float
    gateway: str
    session: str
    name: str
    what: Touched
    kind: Literal["touched_while_open", "added_while_open", "touched_while_closed"]


class Seen(NamedTuple):
    """A touch as the folder sees it."""

    name: str
    what: Touched
    kind: Literal["touched_while_open", "added_while_open", "touched_while_closed"]


def escaped(id: str) -> str:
    """An id as it stands in a file name."""
    return id.replace("/", "__").replace(":", "-")


def buffer(raw: bytes) -> JSON:
    """Bytes as Baileys writes them into JSON."""
    return {"type": "Buffer", "data": b64encode(raw).decode()}


class Folder:
    """The files of one session: on the disk, and as the running socket has them in memory."""

    def __init__(self, path: Path, note: Callable[[Seen], None]) -> None:
        self.path = path
        self.is_open = False
        self._note = note
        self._memory: dict[str, bytes] = {}
        self._stamps: dict[str, Stamp] = {}
        path.mkdir(parents=True, exist_ok=True)

    def load(self) -> None:
        """The socket starts: from now on what is there now is the truth."""
        self._compare(is_open=False)
        self._memory = {name: self._bytes(name) for name in self._listed()}
        self.is_open = True

    def release(self) -> None:
        """The socket has ended; its folder may be touched."""
        self.guard()
        self.is_open = False

    def guard(self) -> None:
        """Put back what was touched while the socket lives."""
        if self.is_open:
            self._compare(is_open=True)

    def names(self) -> list[str]:
        """The files of the running socket."""
        return sorted(self._memory)

    def has(self, name: str) -> bool:
        return name in self._memory

    def get(self, name: str) -> JSON | None:
        """A file's content; None for one that is missing, empty or cut off, which the library reads alike."""
        raw = self._memory.get(name)
        try:
            value = json.loads(raw) if raw else None
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def put(self, name: str, value: JSON) -> None:
        self.write(name, msgspec.json.encode(value))

    def write(self, name: str, raw: bytes) -> None:
        """These bytes, in memory and on the disk."""
        self._memory[name] = raw
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / name
        file.write_bytes(raw)
        self._stamps[name] = _stamp(file)

    def drop(self, name: str) -> None:
        """The library deletes a file itself."""
        self._memory.pop(name, None)
        self._stamps.pop(name, None)
        (self.path / name).unlink(missing_ok=True)

    def empty(self) -> None:
        """The library forgets the pairing."""
        for name in {*self._memory, *self._listed()}:
            self.drop(name)

    def _compare(self, *, is_open: bool) -> None:
        there = self._listed()
        for name in {*self._stamps, *there}:
            before, now = self._stamps.get(name), there.get(name)
            if before == now:
                continue
            what: Touched = "added" if before is None else "deleted" if now is None else "changed"
            if not is_open:
                self._note(Seen(name, what, "touched_while_closed"))
            elif _BAILEYS.fullmatch(name):
                self._note(Seen(name, what, "touched_while_open"))
            else:
                self._note(Seen(name, what, "added_while_open"))
            if is_open and name in self._memory:
                self.write(name, self._memory[name])
            elif now is None:
                del self._stamps[name]
            else:
                self._stamps[name] = now

    def _listed(self) -> dict[str, Stamp]:
        found = {}
        if self.path.is_dir():
            for file in self.path.iterdir():
                try:
                    if file.is_file():
                        found[file.name] = _stamp(file)
                except FileNotFoundError:
                    continue  # it went between the two looks
        return found

    def _bytes(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError:
            return b""


class Touches:
    """The journal of all folders of one stand-in."""

    def __init__(self) -> None:
        self._last = 0
        self._touches: list[Touch] = []

    def note(self, gateway: str, session: str, seen: Seen) -> None:
        self._last += 1
        self._touches.append(Touch(self._last, time.time(), gateway, session, *seen))

    def listed(self, gateway: str | None, session: str | None) -> list[Touch]:
        return [one for one in self._touches if gateway in (None, one.gateway) and session in (None, one.session)]

    def clear(self) -> None:
        self._touches.clear()


def _stamp(file: Path) -> Stamp:
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
