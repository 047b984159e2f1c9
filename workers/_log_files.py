"""A log as one stream of bytes, over its rotations (security-reliability.md F5).

By renaming: the old file is read to its end, then those that came between, then the new one. By truncating
(`copytruncate`): what was written between our last look and the truncation is in the copy, if there is one. A file that
was truncated is known by a digest of its beginning and of what stands before our place, so also when it has long grown
past that place again.
"""

import os
import re
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

_EDGE = 512  # bytes of the beginning, and of what stands before the place, that a digest covers
_QUIET = 1.0  # seconds for which the old file must say nothing before we go on to the new one
_PAST = 32  # files that are remembered after they were read
_INODE = (1 << 63) - 1  # what the database's integers hold
_DAY = r"20\d\d[-_.]?[01]\d[-_.]?[0-3]\d"
_NUMBERED = r"[.-]\d+(?:[-_.T:]\d+)*"  # behind the whole name: a number or a date, and a time
_NUMBERED_BARE = rf"(?:\.\d+|-{_DAY})(?:[-_.T:]\d+)*"  # … that has no ending: `loja-2` is another session's
_DATED = rf"[-_.]+{_DAY}(?:[-_.T:]+\d+)*"  # before the ending
_SHIFTED = r"([-_.])(\d{1,4})"  # … too


class Place(NamedTuple):
    """A byte of a file, and the digest that proves the file to be the same one later."""

    inode: int
    offset: int
    head: bytes


@dataclass(slots=True)
class _Part:
    """One file of the stream: from the byte `begin` of it on, which is the byte `start` of the stream."""

    fd: int
    inode: int
    begin: int
    start: int = 0
    read: int = 0  # the next byte of the file
    head: bytes = b""  # the digest at `read`
    looked_at: int = -1  # the file's time of change when that was last compared


class Tail:
    """Reads one path. `path` may come and go. `is_followed`: whether somebody reads a file as a log of its own."""

    def __init__(self, path: Path, is_followed: Callable[[Path], bool] = lambda path: False) -> None:
        self.path = path
        self._is_followed = is_followed
        stem, ending = os.path.splitext(path.name)
        self._numbered = re.compile(re.escape(path.name) + (_NUMBERED if ending else _NUMBERED_BARE))
        self._dated = re.compile(re.escape(stem) + _DATED + re.escape(ending))
        self._shifted = re.compile(re.escape(stem) + _SHIFTED + re.escape(ending))
        self._parts: deque[_Part] = deque()
        self._next: deque[_Part] = deque()
        self._past: deque[Place] = deque(maxlen=_PAST)
        self._last_byte = b"\n"
        self._read_at = time.monotonic()
        self.is_missing = False
        self.lost_at: str | None = None
        """Why lines may be missing since somebody last looked here."""
        self.is_at_end = False
        """Whether the last `read` came to the end of all there was when it began."""
        self.missed_since: datetime | None = None
        """Whole files came and went since somebody last looked here: what they say was written after this."""

    @property
    def is_open(self) -> bool:
        return bool(self._parts)

    def open(self, place: Place | None, *, at_end: bool, look_back: int) -> tuple[int, int] | None:
        """Begin at a place, at the end, or at the beginning. Returns the byte of the stream from which on it is read,
        and the one before which everything was told already; None while there is no file.

        Bytes of the stream are those of the first file.
        """
        self.close()
        current = _opened(self.path)
        try:
            return self._open(current, place, at_end=at_end, look_back=look_back)
        except OSError:
            held = {part.fd for part in [*self._parts, *self._next]}
            self.close()
            if current is not None and current.fd not in held:
                os.close(current.fd)
            raise

    def _open(
        self, current: _Part | None, place: Place | None, *, at_end: bool, look_back: int
    ) -> tuple[int, int] | None:
        self.is_missing = current is None
        part, follows = current, False
        offset = 0
        if place is not None:
            offset = place.offset
            if current is None or current.inode != place.inode or _digest(current.fd, offset) != place.head:
                part = self._found(place)
                if part is None:
                    self.lost_at = "position"
                    part, offset = current, 0
                else:
                    follows = True
        elif current is not None and at_end:
            offset = _line_start(current.fd, os.fstat(current.fd).st_size)
        if part is None:
            return None
        self._parts.append(part)
        if follows:
            self._next.extend(self._between(part, current))
            if current is not None:
                self._next.append(current)
        begin = _next_line(part.fd, offset - look_back) if offset > look_back else 0
        begin = min(begin, offset)
        part.read = begin
        part.begin = part.start = 0
        part.head = _digest(part.fd, begin)
        self._read_at = time.monotonic()
        return begin, offset

    def read(self, size: int) -> bytes:
        """The next bytes, of one file; empty when there are none now."""
        part = self._parts[-1]
        self.is_at_end = False
        data = os.pread(part.fd, size, part.read)
        status = os.fstat(part.fd)
        is_other = status.st_size < part.read
        if data or status.st_mtime_ns != part.looked_at:
            is_other = is_other or _digest(part.fd, part.read) != part.head
            part.looked_at = status.st_mtime_ns
        if is_other:
            return self._truncated(part) or self.read(size)
        if data:
            part.read += len(data)
            part.head = _digest(part.fd, part.read)
            self._last_byte = data[-1:]
            self._read_at = time.monotonic()
            self.is_at_end = len(data) < size and not self._next and self._is_current(part)
            return data
        if not self._next:
            self._look()
        return (self._go_on() or self.read(size)) if self._next else b""

    def place(self, byte: int) -> Place:
        """Where a byte of the stream is; files before it are let go."""
        while len(self._parts) > 1 and self._parts[1].start <= byte:
            done = self._parts.popleft()
            self._past.append(Place(done.inode, done.read, done.head))
            os.close(done.fd)
        part = self._parts[0]
        offset = byte - part.start + part.begin
        return Place(part.inode, offset, part.head if offset == part.read else _digest(part.fd, offset))

    def knows(self, path: Path) -> bool:
        """Whether a file is, or is a copy of, one that was read here."""
        other = _opened(path)
        if other is None:
            return False
        try:
            if any(part.inode == other.inode for part in [*self._parts, *self._next]):
                return True
            known = [*self._past, *(Place(part.inode, part.read, part.head) for part in self._parts)]
            return any(one.offset and _digest(other.fd, one.offset) == one.head for one in known)
        finally:
            os.close(other.fd)

    def behind(self) -> int:
        """Bytes that were written and not read."""
        parts = [self._parts[-1], *self._next] if self._parts else []
        return sum(max(os.fstat(part.fd).st_size - part.read, 0) for part in parts)

    @property
    def end(self) -> int:
        """The byte of the stream after all that was written."""
        return self._stream() + self.behind()

    def written(self, most: int = 64 * 1024) -> tuple[datetime, bytes]:
        """When the last bytes were written, and what they are."""
        parts = [self._parts[-1], *self._next]
        status = [os.fstat(part.fd) for part in parts]
        part, last = next(
            (one for one in zip(reversed(parts), reversed(status), strict=True) if one[1].st_size),
            (parts[-1], status[-1]),
        )
        text = os.pread(part.fd, most, max(last.st_size - most, 0))
        return datetime.fromtimestamp(last.st_mtime, UTC), text

    @property
    def is_deleted(self) -> bool:
        """Whether no name is left of any file that it holds."""
        return not any(os.fstat(part.fd).st_nlink for part in [*self._parts, *self._next])

    def let_go(self) -> None:
        """Close it for good; it goes on to know what was read."""
        self._past.extend(Place(part.inode, part.read, part.head) for part in self._parts)
        self.close()

    def close(self) -> None:
        for part in [*self._parts, *self._next]:
            os.close(part.fd)
        self._parts.clear()
        self._next.clear()

    def _is_current(self, part: _Part) -> bool:
        try:
            return self.path.stat().st_ino & _INODE == part.inode
        except OSError:
            return False

    def _look(self) -> None:
        """At the end of what there is: see whether the path is another file by now."""
        part = self._parts[-1]
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self.is_missing = self.is_at_end = True
            return
        self.is_missing = False
        if status.st_ino & _INODE == part.inode or not status.st_size:
            self.is_at_end = True
            return
        if time.monotonic() - self._read_at < _QUIET:  # whoever writes may not have noticed yet
            return
        current = _opened(self.path)
        if current is not None:
            missed = self._between(part, current)
            if missed:
                self.missed_since = datetime.fromtimestamp(os.fstat(part.fd).st_mtime, UTC)
            self._next.extend([*missed, current])

    def _truncated(self, part: _Part) -> bytes:
        """The file was emptied: go on in its copy, if there is one, and then at its beginning."""
        copy = self._found(Place(0, part.read, part.head), besides=part.inode)
        if copy is None:
            self.lost_at = "truncated"
        else:
            copy.begin, copy.start, copy.read, copy.head = part.begin, part.start, part.read, part.head
            self._parts[-1] = copy
        current = _opened(self.path)
        if current is None:  # gone again; what comes later is found by its name
            current = _Part(os.dup(part.fd), part.inode, 0)
        self._next.append(current)
        if copy is None:
            return self._go_on()
        os.close(part.fd)
        return b""

    def _stream(self) -> int:
        part = self._parts[-1]
        return part.start + part.read - part.begin

    def _go_on(self) -> bytes:
        """To the next file. A line without its end ends here, by a byte that is in no file."""
        is_whole = self._last_byte == b"\n"  # or there was nothing
        start = self._stream() + (not is_whole)
        part = self._next.popleft()
        part.start = start
        if not part.head:
            part.head = _digest(part.fd, part.read)
        self._parts.append(part)
        self._last_byte = b"\n"
        return b"" if is_whole else b"\n"

    def _siblings(self) -> list[tuple[Path, int]]:
        """Files beside it that may be it under a later name, and their inodes, those written last at the end."""
        name = self.path.name
        stem = name.removesuffix(".log")
        found = []
        try:
            entries = list(os.scandir(self.path.parent))
        except OSError:
            return []
        for entry in entries:
            is_like = entry.name.startswith((name, f"{stem}-", f"{stem}.", f"{stem}_"))
            if not is_like or entry.name == name or entry.name.endswith((".gz", ".xz", ".zst", ".bz2")):
                continue
            try:
                status = entry.stat()
            except OSError:  # it has gone meanwhile, or leads nowhere
                continue
            found.append((status.st_mtime_ns, Path(entry.path), status.st_ino & _INODE))
        return [(path, inode) for _, path, inode in sorted(found)]

    def _those(self, paths: list[Path]) -> Iterator[_Part]:
        """Those of these files that may be read, opened. Whoever takes one has it; the others are closed."""
        for path in paths:
            try:
                part = _opened(path)
            except OSError:  # somebody else's: it is none of ours, and keeps nobody from reading what is
                continue
            if part is not None:
                yield part

    def _found(self, place: Place, besides: int = -1) -> _Part | None:
        """The file, under whatever name, that has this digest at this place."""
        for part in self._those([path for path, _ in reversed(self._siblings())]):
            try:
                is_it = (
                    part.inode != besides and _digest(part.fd, place.offset) == place.head
                    if place.offset
                    else part.inode == place.inode
                )
            except OSError:
                is_it = False
            if is_it:
                return part
            os.close(part.fd)
        return None

    def _between(self, old: _Part, current: _Part | None) -> list[_Part]:
        """Files that came after the old one and before the current one: rotations of this log, and no other log."""
        since = os.fstat(old.fd).st_mtime_ns
        known = {old.inode, *({current.inode} if current else ())}
        beside = self._siblings()
        now = next((path.name for path, inode in beside if inode == old.inode), "")
        later = [path for path, _ in beside if self._is_rotation(path.name, now) and not self._is_followed(path)]
        found = []
        for part in self._those(later):
            if part.inode not in known and os.fstat(part.fd).st_mtime_ns > since:
                known.add(part.inode)
                found.append(part)
            else:
                os.close(part.fd)
        return found

    def _is_rotation(self, name: str, old: str) -> bool:
        """Whether a file of this name came later than the old one, which is called `old` by now ('' when it is gone).

        `gateway.log.2` says so itself. `gateway-2.log` may as well be another session's: it is ours where the old one
        is `gateway-3.log`, since then what is moved on from name to name has it too, and a date where the old one has.
        The same goes for `loja-2` beside `loja`, a log without an ending.
        """
        if self._numbered.fullmatch(name):
            return True
        if self._dated.fullmatch(old):
            return self._dated.fullmatch(name) is not None
        its, olds = self._shifted.fullmatch(name), self._shifted.fullmatch(old)
        return its is not None and olds is not None and its[1] == olds[1] and int(its[2]) < int(olds[2])


def _opened(path: Path) -> _Part | None:
    """A file at its beginning; None for what is no file. Raises `OSError` when it may not be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        return None
    return _Part(fd, status.st_ino & _INODE, 0)


def _digest(fd: int, offset: int) -> bytes:
    """Of the file's beginning and of what stands before a byte."""
    first = os.pread(fd, min(_EDGE, offset), 0)
    last = os.pread(fd, min(_EDGE, offset), max(offset - _EDGE, 0))
    return blake2b(first + last, digest_size=16).digest()


def _line_start(fd: int, size: int, most: int = 64 * 1024) -> int:
    """The byte after the last end of a line."""
    before = os.pread(fd, min(most, size), max(size - most, 0))
    end = before.rfind(b"\n")
    return size if end < 0 and size > most else max(size - most, 0) + end + 1


def _next_line(fd: int, offset: int, most: int = 256 * 1024) -> int:
    """The first beginning of a line after a byte."""
    end = os.pread(fd, most, offset).find(b"\n")
    return offset + end + 1 if end >= 0 else offset + most
