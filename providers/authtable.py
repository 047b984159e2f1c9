"""A session's store in Ticketz's own database (baileys-sessions.md §4, "Non-file stores").

Keys are rows of "BaileysKeys" ("whatsappId", type, key, value), credentials are `{"creds": …, "keys": {}}` in
"Whatsapps".session; values are JSON. Only rows of this one id are read or changed, and nothing of the schema. Backups
are files (`providers/authbackup.py`): rows as lines of JSON, on the disk before the transaction that deletes them ends.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, LiteralString

import psycopg

from providers.authbackup import Backups, Ends, absolute
from providers.authkeys import (
    MOST_CREDS,
    Creds,
    Entry,
    People,
    StoreFault,
    contradicts,
    creds_of,
    entry,
    groups_of,
    is_derived,
)

_CATEGORIES = ["session", "sender-key", "sender-key-memory"]
_AT_ONCE = 100  # rows that are backed up and deleted in one transaction
_MOST_ROWS = 300_000
_GREATEST = 2**31 - 1
_SESSION: LiteralString = """
    SELECT left(session, %(most)s + 1), length(session) > %(most)s FROM "Whatsapps" WHERE id = %(id)s
"""
_LIMITS: LiteralString = """
    SELECT set_config('statement_timeout', '10s', true), set_config('lock_timeout', '3s', true),
        set_config('idle_in_transaction_session_timeout', '60s', true)
"""


class Table:
    """A `Store` (`providers/authstore.py`) of rows. Names are `<type>-<key>`."""

    def __init__(
        self,
        url: object,
        session: str,
        *,
        backups: object,
        own_id: str | None = None,
        apart: float = 1.0,
        longest: float = 20.0,
    ) -> None:
        """`session` is a "whatsappId"; `apart`: seconds between two reads that judge credentials; `longest`: of one
        connection. Raises `StoreFault`."""
        if not isinstance(url, str) or not url.startswith(("postgresql://", "postgres://")):
            raise StoreFault("misconfigured", "the secret store_url must be postgresql://…")
        if not session.isascii() or not session.isdecimal() or not 0 < int(session) <= _GREATEST:
            raise StoreFault(
                "misconfigured", "the session must be the number that Ticketz has for it (or set auth.name)"
            )
        self._url, self._id, self._own_id = url, int(session), own_id
        self._apart, self._longest = apart, longest
        self._backups = Backups(absolute(backups, "auth.backups"), (str(self._id),))

    def check(self) -> None:
        with self._asked() as connection:
            row = connection.execute(
                """
                SELECT has_table_privilege('"BaileysKeys"', 'SELECT, UPDATE')
                    AND has_table_privilege('"BaileysKeys"', 'DELETE')
                    AND has_column_privilege('"Whatsapps"', 'session', 'UPDATE'),
                    EXISTS (SELECT FROM "Whatsapps" WHERE id = %s)
                """,
                (self._id,),
            ).fetchone()
        may_write, is_there = row or (False, False)
        if not is_there:
            raise StoreFault("missing", "there is no such session")
        if not may_write:
            raise StoreFault("no_access", "the tables cannot be written")
        self._backups.check()

    def plan_contacts(self, jids: Sequence[str]) -> list[str]:
        people = People(jids)
        with self._asked() as connection:
            mappings = connection.execute(
                """
                SELECT key, value FROM "BaileysKeys"
                WHERE "whatsappId" = %s AND type = 'lid-mapping' AND key = ANY(%s)
                """,
                (self._id, people.mappings()),
            )
            for id_, value in mappings:
                people.learn(id_, value)
            return [name for name, found in self._entries(connection) if people.own(found)]

    def plan_derived(self, groups: Sequence[str] | None = None) -> list[str]:
        only = None if groups is None else groups_of(groups)
        with self._asked() as connection:
            return [name for name, found in self._entries(connection) if is_derived(found, only)]

    def _entries(self, connection: psycopg.Connection[Any]) -> list[tuple[str, Entry]]:
        """All that may be dropped, by name."""
        rows = connection.execute(
            """SELECT type || '-' || key FROM "BaileysKeys" WHERE "whatsappId" = %s AND type = ANY(%s) LIMIT %s""",
            (self._id, _CATEGORIES, _MOST_ROWS + 1),
        ).fetchall()
        if len(rows) > _MOST_ROWS:
            raise StoreFault("too_large", "the session has too many rows")
        names = sorted(name for (name,) in rows)
        return [(name, found) for name in names if (found := entry(name)) is not None]

    def drop(self, names: Sequence[str], backup: str) -> int:
        names = list(dict.fromkeys(names))
        if not all(map(entry, names)):
            raise StoreFault("refused", "this is no entry that may be dropped")
        if not names:
            return 0
        ends = Ends()
        with self._backups.locked() as shelf, shelf.repair(backup) as box, self._asked() as connection:
            there = {name for name, _ in self._entries(connection)}
            rest = sorted(there & set(names))
            for start in range(0, len(rest), _AT_ONCE):
                ends.check()
                some = [_parted(name) for name in rest[start : start + _AT_ONCE]]
                bound = (self._id, [type_ for type_, _ in some], [key for _, key in some])
                rows = connection.execute(
                    """
                    SELECT type, key, value FROM "BaileysKeys"
                    WHERE "whatsappId" = %s AND (type, key) IN (SELECT * FROM unnest(%s::text[], %s::text[]))
                    ORDER BY type, key FOR UPDATE
                    """,
                    bound,
                ).fetchall()
                box.put_rows([dict(zip(("type", "key", "value"), row, strict=True)) for row in rows])
                box.seal()
                connection.execute(
                    """
                    DELETE FROM "BaileysKeys"
                    WHERE "whatsappId" = %s AND (type, key) IN (SELECT * FROM unnest(%s::text[], %s::text[]))
                    """,
                    (self._id, [row[0] for row in rows], [row[1] for row in rows]),
                )
                connection.commit()
                connection.execute(_LIMITS)  # they ended with the transaction
            left = {name for name, _ in self._entries(connection)}
            return len((box.names() & set(names)) - left)

    def creds_are_broken(self) -> bool:
        return self._broken()[0]

    def _broken(self) -> tuple[bool, str | None]:
        """Whether two reads in a row bring no whole credentials; and what the last of them brought."""
        text = self._session_text()
        if _creds(text):
            return False, text
        time.sleep(self._apart)
        text = self._session_text()
        return _creds(text) is None, text

    def _session_text(self) -> str | None:
        with self._asked() as connection:
            return _session_in(connection.execute(_SESSION, {"id": self._id, "most": MOST_CREDS}))

    def plan_restore(self) -> str | None:
        is_broken, text = self._broken()
        if not is_broken:
            return None
        for kept in self._backups.newest():
            if self._is_own(kept.creds) and not contradicts(text, kept.creds):
                return kept.name
        return None

    def restore(self, name: str, backup: str) -> None:
        with self._backups.locked() as shelf:
            creds = shelf.kept(name).creds
            is_broken, text = self._broken()
            whole = _creds(text)
            if whole and whole.state == creds.state:
                return
            if not self._is_own(creds) or contradicts(text, creds):
                raise StoreFault("refused", "the kept credentials are not of the pairing that is there")
            if not is_broken:
                raise StoreFault("changed", "the credentials are whole")
            with shelf.repair(backup) as box, self._asked() as connection:
                if (
                    _session_in(connection.execute(_SESSION + " FOR UPDATE", {"id": self._id, "most": MOST_CREDS}))
                    != text
                ):
                    raise StoreFault("changed", "the gateway is writing its credentials")
                if text is not None:
                    box.put("creds.json", text.encode())
                    box.seal()
                row = connection.execute(
                    """
                    SELECT max(key::integer) FROM "BaileysKeys"
                    WHERE "whatsappId" = %s AND type = 'pre-key' AND key ~ '^[0-9]{1,9}$'
                    """,
                    (self._id,),
                ).fetchone()
                counted = creds.past((row and row[0]) or 0)
                told = json.dumps({"creds": counted.fields, "keys": {}}, separators=(",", ":"))
                connection.execute("""UPDATE "Whatsapps" SET session = %s WHERE id = %s""", (told, self._id))
                connection.commit()

    def keep_creds(self) -> bool:
        creds = _creds(self._session_text())
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
    def _asked(self) -> Iterator[psycopg.Connection[Any]]:
        """A connection in a transaction of its own; what is not committed in the block is not done."""
        is_over = threading.Event()
        try:
            with self._connected() as connection, _cut_off(connection, self._longest, is_over):
                connection.execute(_LIMITS)
                yield connection
        except psycopg.Error as error:
            if is_over.is_set():
                raise StoreFault("timeout", "the database took too long") from None
            raise _fault(error) from None

    @contextmanager
    def _connected(self) -> Iterator[psycopg.Connection[Any]]:
        connection = psycopg.connect(
            self._url, connect_timeout=5, application_name="pombal", prepare_threshold=None, client_encoding="utf8"
        )
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        try:
            yield connection
        finally:
            connection.close()


@contextmanager
def _cut_off(connection: psycopg.Connection[Any], after: float, is_over: threading.Event) -> Iterator[None]:
    """End the connection when its time is over: a server that answers nothing keeps to no timeout of its own."""
    with socket.socket(fileno=os.dup(connection.fileno())) as wire:

        def cut() -> None:
            is_over.set()
            with suppress(OSError):  # it has ended by itself
                wire.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(after, cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _session_in(answer: psycopg.Cursor[Any]) -> str | None:
    row = answer.fetchone()
    if row is None:
        raise StoreFault("missing", "there is no such session")
    text: str | None = row[0]
    if row[1]:
        raise StoreFault("too_large", "the session is too large")
    return text


def _creds(text: str | None) -> Creds | None:
    try:
        told = json.loads(text or "")
    except (ValueError, RecursionError):
        return None
    return creds_of(told.get("creds")) if isinstance(told, dict) else None


def _parted(name: str) -> tuple[str, str]:
    """A name that may be dropped, as type and key."""
    for type_ in ("sender-key-memory", "sender-key", "session"):
        if name.startswith(f"{type_}-"):
            return type_, name[len(type_) + 1 :]
    raise StoreFault("refused", "this is no entry that may be dropped")


def _fault(error: psycopg.Error) -> StoreFault:
    """What a database's error comes to; its own words may hold a host, a user or a key."""
    code = error.sqlstate or ""
    if code == "55P03":
        return StoreFault("busy", "somebody else holds these rows")
    if code == "57014":
        return StoreFault("timeout", "the database took too long")
    if code.startswith("28") or code in ("42501", "25006"):
        return StoreFault("no_access", "the database did not allow it")
    if code in ("3D000", "3F000", "42P01", "42703"):
        return StoreFault("misconfigured", "the database has no such tables")
    if code == "53100":
        return StoreFault("no_space", "the database has no space left")
    if isinstance(error, psycopg.OperationalError):
        return StoreFault("unreachable", "the database gave no answer")
    return StoreFault("unreadable", "the database gave an error")
