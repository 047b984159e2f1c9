"""Where a repair keeps what it takes out of a session's store, and credentials that were seen to be good.

    <folder>/<session>/<repair>/      what one repair took away, each under its own name, and `manifest.json`
    <folder>/<session>/.creds/        credentials of an open session: `creds-<number>-<state>.json`, the newest three

All of it is private keys: folders are 0700, files 0600, links are followed nowhere below the folder that is configured.
One process at a time writes for a session: it holds a lock (flock) on the session's folder, which ends with it.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from providers.authkeys import MOST_CREDS, SESSION, Creds, StoreFault, creds_in, entry

_LONGEST = 40.0  # seconds of one call, looked at between two steps
MOST_ENTRY = 16 << 20  # bytes
_MOST_NAMES = 300_000  # in one folder
_REPAIRS, _STATES = 5, 3  # kept for each session
_MANIFEST, _PART, _CREDS = "manifest.json", ".part", ".creds"
_AGAIN = re.compile(r"~[2-9]")
_ROWS = re.compile(r"keys-[0-9a-f]{16}\.jsonl")
_KEPT = re.compile(r"creds-([0-9]{8})-([0-9a-f]{16})\.json")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@contextmanager
def faults() -> Iterator[None]:
    """Turn what the system says into `StoreFault`, without the names it says it of."""
    try:
        yield
    except OSError as error:
        raise StoreFault(*_FAULTS.get(error.errno or 0, ("unreadable", "the disk gave an error"))) from None


_FAULTS = {
    errno.ENOENT: ("missing", "a folder is not there"),
    errno.EACCES: ("no_access", "not allowed"),
    errno.EPERM: ("no_access", "not allowed"),
    errno.EROFS: ("no_access", "the disk is read-only"),
    errno.ENOSPC: ("no_space", "no space is left"),
    errno.EDQUOT: ("no_space", "no space is left"),
    errno.EFBIG: ("no_space", "no space is left"),
    errno.ELOOP: ("refused", "a link is in a file's or folder's place"),
    errno.ENOTDIR: ("refused", "a link or a file is in a folder's place"),
    errno.EWOULDBLOCK: ("busy", "somebody else is at this session's store"),
}


class Ends:
    """The end of one call's time."""

    def __init__(self) -> None:
        self._at = time.monotonic() + _LONGEST

    def check(self) -> None:
        """Raises `StoreFault` when it is over."""
        if time.monotonic() > self._at:
            raise StoreFault("timeout", "the store took too long")


def absolute(path: object, what: str) -> str:
    """A configured path as it is. Raises `StoreFault` unless it is absolute and straight."""
    if not isinstance(path, str) or not path.startswith("/") or not path.strip("/") or "\0" in path:
        raise StoreFault("misconfigured", f"{what} must be an absolute path")
    if ".." in path.split("/"):
        raise StoreFault("misconfigured", f"{what} must not have .. in it")
    return path


@contextmanager
def opened(path: str) -> Iterator[int]:
    """A configured folder. The way to it may go over links: they are the operator's."""
    folder = os.open(path, _FOLDER)
    try:
        yield folder
    finally:
        os.close(folder)


@contextmanager
def below(above: int, name: str, *, make: bool = False) -> Iterator[int]:
    """A folder in a folder, never over a link."""
    if make:
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=above)
        os.fsync(above)  # also where it was there: whoever made it may not have come so far
    folder = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=above)
    try:
        yield folder
    finally:
        os.close(folder)


def listed(folder: int) -> list[str]:
    names = []
    with os.scandir(folder) as found:
        for one in found:
            names.append(one.name)
            if len(names) > _MOST_NAMES:
                raise StoreFault("too_large", "a folder has too many files")
    return names


class Found(NamedTuple):
    """A file as it was at a moment."""

    content: bytes
    stat: os.stat_result

    def is_still(self, folder: int, name: str) -> bool:
        """Whether it lies there unchanged."""
        try:
            now = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return _version(now) == _version(self.stat)


def read(folder: int, name: str, most: int = MOST_ENTRY) -> Found | None:
    """A file's content in one version, None when there is none. Raises `StoreFault` for a link, for what is no file,
    and for one that is written to all the time."""
    for _ in range(3):
        try:
            # O_NONBLOCK: opening a named pipe would wait for a writer.
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:
            return None
        try:
            before = os.fstat(file)
            if not stat.S_ISREG(before.st_mode):
                raise StoreFault("refused", "something that is no file is in a file's place")
            if before.st_size > most:
                raise StoreFault("too_large", "a file is too large")
            content = b"".join(iter(lambda file=file: os.read(file, 1 << 20), b""))  # type: ignore[misc]
            if _version(os.fstat(file)) == _version(before) and len(content) == before.st_size:
                return Found(content, before)
        finally:
            os.close(file)
    raise StoreFault("changed", "a file is being written")


def write(folder: int, name: str, content: bytes, part: str = _PART, like: os.stat_result | None = None) -> None:
    """Put a file in place whole; it is not flushed to the disk yet. `like`: whose owner and mode it gets."""
    with suppress(FileNotFoundError):  # what a killed one left
        os.unlink(part, dir_fd=folder)
    file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(file, rest) :]
            if like is not None:
                mine = os.fstat(file)
                if (mine.st_uid, mine.st_gid) != (like.st_uid, like.st_gid):
                    os.fchown(file, like.st_uid, like.st_gid)
                os.fchmod(file, stat.S_IMODE(like.st_mode) & 0o666)
                os.fsync(file)
        finally:
            os.close(file)
        os.replace(part, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        os.unlink(part, dir_fd=folder)
        raise


class Kept(NamedTuple):
    """Credentials of an open session, and the name that they are kept under."""

    name: str
    creds: Creds


class Backups:
    """The backups of one session."""

    def __init__(self, folder: str, path: tuple[str, ...]) -> None:
        """`path` leads from the configured folder to the session's own; it is made when it is first written to."""
        self._folder, self._path = folder, path

    def check(self) -> None:
        """Return if they could be written. Writes nothing."""
        with faults(), opened(self._folder) as folder:
            self._check(folder, self._path)

    def _check(self, above: int, path: Sequence[str]) -> None:
        if path and path[0] in listed(above):
            with below(above, path[0]) as folder:
                if len(path) == 1:
                    _must_be_ours(folder)
                self._check(folder, path[1:])
        elif not os.access(".", os.W_OK | os.X_OK, dir_fd=above):
            raise StoreFault("no_access", "backups cannot be written")

    @contextmanager
    def locked(self) -> Iterator["Shelf"]:
        """To write for this session, alone. Raises `StoreFault`, `busy` when somebody else does."""
        with faults(), opened(self._folder) as folder, self._down(folder, self._path) as own:
            _must_be_ours(own)
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Shelf(own)

    @contextmanager
    def _down(self, above: int, path: Sequence[str]) -> Iterator[int]:
        with below(above, path[0], make=True) as folder:
            if len(path) == 1:
                yield folder
            else:
                with self._down(folder, path[1:]) as own:
                    yield own

    def newest(self) -> list[Kept]:
        """Kept credentials of the newest state, the newest first. Reads only."""
        with faults(), opened(self._folder) as folder:
            try:
                return self._newest(folder, (*self._path, _CREDS))
            except FileNotFoundError:
                return []

    def _newest(self, above: int, path: Sequence[str]) -> list[Kept]:
        with below(above, path[0]) as folder:
            return self._newest(folder, path[1:]) if path[1:] else _newest(folder)


class Shelf:
    """The folder of a session's backups, held alone."""

    def __init__(self, folder: int) -> None:
        self._folder = folder

    @contextmanager
    def repair(self, name: str) -> Iterator["Box"]:
        """What one repair takes away; older ones go, if they are ours and beyond the newest. Raises `StoreFault`."""
        if not SESSION.fullmatch(name):
            raise StoreFault("refused", "a backup's name is 1 to 64 letters, digits, _ or -")
        self._forget(but=name)
        with below(self._folder, name, make=True) as folder:
            yield Box(folder)

    def _forget(self, but: str) -> None:
        dated = []
        for name in listed(self._folder):
            if name != but and SESSION.fullmatch(name):
                with suppress(NotADirectoryError), below(self._folder, name) as folder:
                    told = _manifest(folder)
                    if told is not None:
                        dated.append((told["at"], name))
                    elif set(listed(folder)) <= {_PART}:  # killed before it began
                        self._remove(folder, name)
        for _, name in sorted(dated, reverse=True)[_REPAIRS - 1 :]:
            with below(self._folder, name) as folder:
                self._remove(folder, name)

    def _remove(self, folder: int, name: str) -> None:
        found = set(listed(folder)) - {_MANIFEST}
        if not all(map(_is_ours, found)):
            return  # somebody has put something of theirs there
        for one in (*sorted(found), _MANIFEST):  # the manifest last: without it nobody dares to go on
            with suppress(FileNotFoundError):
                os.unlink(one, dir_fd=folder)
        os.rmdir(name, dir_fd=self._folder)

    def kept(self, name: str) -> Kept:
        """Raises `StoreFault` unless it is of the newest state."""
        with suppress(FileNotFoundError), below(self._folder, _CREDS) as folder:
            for one in _newest(folder):
                if one.name == name:
                    return one
        raise StoreFault("missing", "these credentials are not kept, or newer ones are")

    def keep(self, creds: Creds) -> None:
        """Keep credentials as the newest."""
        with below(self._folder, _CREDS, make=True) as folder:
            names = _by_age(folder)
            last = int(names[-1][len("creds-") :][:8]) if names else 0
            name = f"creds-{last + 1:08}-{creds.state}.json"
            write(folder, name, creds.encoded())
            _flush(folder, [name])
            for old in names[: -(_STATES - 1)]:
                os.unlink(old, dir_fd=folder)


class Box:
    """One repair's backup."""

    def __init__(self, folder: int) -> None:
        self._folder = folder
        self._files: dict[str, dict[str, Any]] = {}
        self._new: list[str] = []  # not known to outlive a power cut
        self._at = time.time()
        told = _manifest(folder)
        if told is None:
            self.seal()
        else:
            self._files, self._at = told["files"], told["at"]

    def put(self, name: str, content: bytes, names: Sequence[str] | None = None) -> None:
        """Copy something in; it counts from `seal` on. What lies there under this name from before the repair was
        killed stays, and if it was different the copy lies beside it. `names`: of the entries, if it has several."""
        digest = hashlib.sha256(content).hexdigest()
        for file in (name, *(f"{name}~{number}" for number in range(2, 10))):
            there = read(self._folder, file)
            if there is None:
                write(self._folder, file, content)
            elif there.content != content:
                continue
            self._files[file] = {"names": list(names or [name]), "sha256": digest, "size": len(content)}
            self._new.append(file)  # also one that was there: the killed one may not have come so far
            return
        raise StoreFault("changed", "an entry came back too often")

    def put_rows(self, rows: Sequence[Mapping[str, str]]) -> None:
        """The same for rows of a table, each with `type` and `key`: one file of them, a row to a line."""
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        name = f"keys-{hashlib.sha256(lines).hexdigest()[:16]}.jsonl"
        self.put(name, lines, [f"{row['type']}-{row['key']}" for row in rows])

    def seal(self) -> None:
        """Return when all of it would outlive a power cut."""
        _flush(self._folder, self._new)
        told = {"what": "pombal session backup", "version": 1, "at": self._at, "files": self._files}
        write(self._folder, _MANIFEST, json.dumps(told).encode())
        _flush(self._folder, [_MANIFEST])
        self._new.clear()

    def names(self) -> set[str]:
        """All entries that are in it."""
        return {name for file in self._files.values() for name in file["names"]}


def _must_be_ours(folder: int) -> None:
    found = os.fstat(folder)
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise StoreFault("refused", "the folder for this session's backups must be the fleet's alone (mode 0700)")


def _is_ours(name: str) -> bool:
    """Whether a file's name is one that a repair gives in its own folder."""
    name = name[:-2] if _AGAIN.fullmatch(name, max(len(name) - 2, 0)) else name
    return name in (_PART, "creds.json") or bool(_ROWS.fullmatch(name)) or entry(name.removesuffix(".json")) is not None


def _manifest(folder: int) -> dict[str, Any] | None:
    """None when there is none of ours."""
    found = read(folder, _MANIFEST, most=1 << 28)
    try:
        told = json.loads(found.content) if found else None
    except ValueError:
        return None
    is_ours = isinstance(told, dict) and told.get("what") == "pombal session backup" and told.get("version") == 1
    return told if is_ours else None


def _by_age(folder: int) -> list[str]:
    return sorted(name for name in listed(folder) if _KEPT.fullmatch(name))


def _newest(folder: int) -> list[Kept]:
    names = _by_age(folder)[::-1]
    found = []
    for name in names:
        # The name tells the state: also of one that the disk has lost since, so that no older state stands in for it.
        if name[-21:] == names[0][-21:]:
            there = read(folder, name, MOST_CREDS)
            creds = creds_in(there.content) if there else None
            if creds is not None and f"{creds.state}.json" == name[-21:]:
                found.append(Kept(name, creds))
    return found


def _flush(folder: int, names: Sequence[str]) -> None:
    for name in names:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    os.fsync(folder)


def _version(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
