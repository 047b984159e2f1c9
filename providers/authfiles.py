"""A session's store that is a folder of files: `useMultiFileAuthState` of Baileys (baileys-sessions.md §4).

The folder `<root>/<session>` with `creds.json`, `session-<user>.<device>.json` and so on. The root is configured, and
the way to it may go over links; below it none is followed (F6). In the session's folder nothing is ever written but
`creds.json`, which `restore` puts in its place whole; all else that is written are backups (`providers/authbackup.py`).

A gateway that is stopped leaves the folder alone; one that is not may write at any moment, and not at once: `writeFile`
empties a file first. So a file counts as read when it was the same before and after, and is deleted when it is still
the one that was backed up. A disk that hangs in one system call (NFS) is out of reach of a call's time limit.
"""

import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from providers.authbackup import Backups, Ends, Found, absolute, below, faults, listed, opened, read, write
from providers.authkeys import (
    MOST_CREDS,
    Creds,
    Entry,
    People,
    StoreFault,
    contradicts,
    creds_in,
    entry,
    groups_of,
    is_derived,
)

_CREDS = "creds.json"
_PRE_KEY = re.compile(r"pre-key-([0-9]{1,9})\.json")


class Files:
    """A `Store` (`providers/authstore.py`) of files."""

    def __init__(
        self,
        folder: object,
        session: str,
        *,
        backups: object = None,
        own_id: str | None = None,
        apart: float = 1.0,
    ) -> None:
        """`folder` is the root; `apart`: seconds between two reads that judge credentials. Raises `StoreFault`."""
        self._root = absolute(folder, "auth.folder")
        self._session, self._own_id, self._apart = session, own_id, apart
        if backups is None:
            self._backups = Backups(self._root, (".pombal-backups", session))
            return
        there = absolute(backups, "auth.backups")
        own = os.path.realpath(os.path.join(self._root, session))
        if os.path.commonpath((own, os.path.realpath(there))) == own:
            raise StoreFault("misconfigured", "auth.backups must not lie in the session's own folder")
        self._backups = Backups(there, (session,))

    def check(self) -> None:
        with self._opened() as folder:
            if not os.access(".", os.W_OK | os.X_OK, dir_fd=folder):
                raise StoreFault("no_access", "the session's folder cannot be written")
        self._backups.check()

    def plan_contacts(self, jids: Sequence[str]) -> list[str]:
        people = People(jids)
        with self._opened() as folder:
            for id_ in people.mappings():
                there = read(folder, f"lid-mapping-{id_}.json")
                if there is not None:
                    people.learn(id_, there.content)
            return [name for name, found in _entries(folder) if people.own(found)]

    def plan_derived(self, groups: Sequence[str] | None = None) -> list[str]:
        only = None if groups is None else groups_of(groups)
        with self._opened() as folder:
            return [name for name, found in _entries(folder) if is_derived(found, only)]

    def drop(self, names: Sequence[str], backup: str) -> int:
        names = list(dict.fromkeys(names))
        if not all(name.endswith(".json") and entry(name.removesuffix(".json")) for name in names):
            raise StoreFault("refused", "this is no entry that may be dropped")
        if not names:
            return 0
        ends = Ends()
        with self._opened() as folder, self._backups.locked() as shelf, shelf.repair(backup) as box:
            copied: dict[str, Found] = {}
            for name in names:
                ends.check()
                there = read(folder, name)
                if there is not None:
                    box.put(name, there.content)
                    copied[name] = there._replace(content=b"")  # it may be many megabytes of them
            if copied:
                box.seal()
            for name, was in copied.items():
                ends.check()
                if not was.is_still(folder, name):
                    raise StoreFault("changed", "the gateway is writing to the session's folder")
                os.unlink(name, dir_fd=folder)
            os.fsync(folder)
            return len((box.names() & set(names)) - set(listed(folder)))

    def creds_are_broken(self) -> bool:
        with self._opened() as folder:
            return self._broken(folder)[0]

    def _broken(self, folder: int) -> tuple[bool, Found | None]:
        """Whether two reads in a row bring no whole credentials; and what the last of them brought."""
        there = _read_creds(folder)
        if _creds(there):
            return False, there
        time.sleep(self._apart)
        there = _read_creds(folder)
        return _creds(there) is None, there

    def plan_restore(self) -> str | None:
        with self._opened() as folder:
            is_broken, there = self._broken(folder)
        if not is_broken:
            return None
        for kept in self._backups.newest():
            if self._is_own(kept.creds) and not contradicts(there and there.content, kept.creds):
                return kept.name
        return None

    def restore(self, name: str, backup: str) -> None:
        with self._opened() as folder, self._backups.locked() as shelf:
            creds = shelf.kept(name).creds
            is_broken, there = self._broken(folder)
            whole = _creds(there)
            if whole and whole.state == creds.state:
                return
            if not self._is_own(creds) or contradicts(there and there.content, creds):
                raise StoreFault("refused", "the kept credentials are not of the pairing that is there")
            if not is_broken:
                raise StoreFault("changed", "the credentials are whole")
            with shelf.repair(backup) as box:
                if there is not None:
                    box.put(_CREDS, there.content)
                    box.seal()
            names = listed(folder)
            if (_CREDS in names) if there is None else not there.is_still(folder, _CREDS):
                raise StoreFault("changed", "the gateway is writing to the session's folder")
            pre_keys = (int(found[1]) for found in map(_PRE_KEY.fullmatch, names) if found)
            counted = creds.past(max(pre_keys, default=0))
            write(folder, _CREDS, counted.encoded(), part=f".{_CREDS}.part", like=_owner(folder, there))
            os.fsync(folder)

    def keep_creds(self) -> bool:
        with self._opened() as folder:
            creds = _creds(_read_creds(folder))
        if not creds or not self._is_own(creds):
            return False
        newest = self._backups.newest()
        if newest and newest[0].creds.means_as(creds):
            return False
        with self._backups.locked() as shelf:
            shelf.keep(creds)
        return True

    def _is_own(self, creds: Creds) -> bool:
        return self._own_id is None or creds.number == self._own_id

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The session's folder, for reading and for changing names in it."""
        with faults(), opened(self._root) as root, below(root, self._session) as folder:
            yield folder


def _entries(folder: int) -> list[tuple[str, Entry]]:
    """All that may be dropped, by name."""
    names = sorted(name for name in listed(folder) if name.endswith(".json"))
    return [(name, found) for name in names if (found := entry(name.removesuffix(".json"))) is not None]


def _read_creds(folder: int) -> Found | None:
    return read(folder, _CREDS, MOST_CREDS)


def _creds(there: Found | None) -> Creds | None:
    return creds_in(there.content) if there is not None else None


def _owner(folder: int, there: Found | None) -> os.stat_result:
    """Whose the credentials shall be, so that the gateway can read them: as before, else as some other entry."""
    if there is not None:
        return there.stat
    for name in listed(folder):
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if name.endswith(".json") and stat.S_ISREG(found.st_mode):
            return found
    raise StoreFault("missing", "nothing in the session's folder tells whose its files are")
