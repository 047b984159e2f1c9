"""The store of a Baileys session, as far as a repair may go into it (baileys-sessions.md §4 and §7, steps 2, 4 and 5).

The settings of a channel say what kind of store its gateway has; without them there is none to touch:

    {"kind": "files", "folder": "/root"}       `providers/authfiles.py`: the session is the folder `/root/<session>`
    {"kind": "ticketz", "backups": "/folder"}  `providers/authtable.py`: rows of Ticketz's database; secret `store_url`

Both take `name` (the session's name in the store, when it is another than in the gateway) and `backups` (an absolute
folder that is there; for files it is `.pombal-backups` under the root unless set, where a gateway must not take it for
a session's).

The socket must be stopped, and confirmed to be, before `drop` and `restore`: a gateway that runs writes back what it
has in memory. A store cannot see a socket; it sees entries that change under its hands, and stops with `changed`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from providers.authfiles import Files
from providers.authkeys import FAULTS, SESSION, StoreFault
from providers.authtable import Table

__all__ = ["FAULTS", "Store", "StoreFault", "store"]


class Store(Protocol):
    """One session's entries. Each call blocks its thread, for a minute and a half at most, and raises `StoreFault`
    alone.

    What has `plan` in its name only reads. `drop` and `restore` may be killed at any moment and called again with the
    same arguments: they go on where they were. `backup` is the repair's id; what is taken away or overwritten is there
    before it is gone from the store. The five newest backups of a session stay.
    """

    def check(self) -> None:
        """Return if the session is there, may be changed, and has a place for backups. Writes nothing."""

    def plan_contacts(self, jids: Sequence[str]) -> list[str]:
        """The Signal sessions with all devices of these people, under either form of their address (phone and LID)."""

    def plan_derived(self, groups: Sequence[str] | None = None) -> list[str]:
        """All Signal sessions and sender keys; with groups named, only the sender keys of these groups."""

    def drop(self, names: Sequence[str], backup: str) -> int:
        """Take entries away that a plan named: how many of them are gone, and in this backup. Never credentials,
        pre-keys, app state or mappings: a name of those is refused before anything is done."""

    def creds_are_broken(self) -> bool:
        """Whether nobody can log in with the credentials that are there. Judged by two reads a second apart: a gateway
        empties the file before it writes."""

    def plan_restore(self) -> str | None:
        """The kept credentials to put back, or None: they are not broken, nothing is kept, or what is kept is of
        another number, of another pairing than what is left of the broken ones shows, or of an older state."""

    def restore(self, name: str, backup: str) -> None:
        """Put kept credentials in the place of broken ones, which go to the backup. Nothing happens where they are in
        their place; whole credentials of another state are never overwritten."""

    def keep_creds(self) -> bool:
        """Keep the credentials as they are now, three states of them; true when they were news. To be called while the
        session is open: only then they are known to be good."""


def store(config: Mapping[str, Any], secrets: Mapping[str, Any], own_id: str | None = None) -> Store | None:
    """The store of a channel with these settings; None when it has none. Nothing is opened yet.

    `own_id`: the digits of the number that is logged in, where they are known; credentials of another are neither kept
    nor put back. Raises `StoreFault`.
    """
    auth = config.get("auth")
    if auth is None:
        return None
    if not isinstance(auth, Mapping):
        raise StoreFault("misconfigured", "auth must be an object")
    session = auth.get("name", config.get("session"))
    if not isinstance(session, str) or not SESSION.fullmatch(session):
        raise StoreFault("refused", "the name of a session is 1 to 64 letters, digits, _ or -")
    if auth.get("kind") == "files":
        return Files(auth.get("folder"), session, backups=auth.get("backups"), own_id=own_id)
    if auth.get("kind") == "ticketz":
        return Table(secrets.get("store_url"), session, backups=auth.get("backups"), own_id=own_id)
    raise StoreFault("misconfigured", "auth.kind must be files or ticketz")
