"""What a repair may do in Ticketz's tables: in a PostgreSQL, on tables as its migrations make them."""

import json
import os
import selectors
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from providers.authstore import FAULTS, StoreFault, store
from providers.authtable import Table
from tests.providers.auth import OWN_ID, creds, cut_after, dumped, killed_before_each_step, run_alone

KEPT = {
    ("pre-key", "7"),
    ("pre-key", "40"),
    ("app-state-sync-key", "AAAAAJkM"),
    ("lid-mapping", "5511922220001"),
    ("lid-mapping", "300000000000001_reverse"),
    ("identity-key", "5511922220001.0"),
    ("session", "of no address"),
}
ONE = ["session-300000000000001.0", "session-300000000000001_1.3", "session-5511922220001.0"]
OTHERS = ["session-55119222200011.0"]
GROUP = [
    "sender-key-120363000000000001@g.us::5511922220001::0",
    "sender-key-memory-120363000000000001@g.us",
]
OTHER_GROUPS = ["sender-key-1203630000000000012@g.us::5511922220001::0"]
DERIVED = [*ONE, *OTHERS, *GROUP, *OTHER_GROUPS]
VALUES = {"5511922220001": '"300000000000001"', "300000000000001_reverse": '"5511922220001"'}


class Ticketz(NamedTuple):
    """A database of Ticketz's own."""

    url: str
    backups: Path

    def table(self, id_: int = 2, **more: Any) -> Table:
        given = {"backups": str(self.backups), "own_id": OWN_ID, "apart": 0.0, **more}
        return Table(self.url, str(id_), **given)

    def rows(self, id_: int = 2) -> dict[tuple[str, str], str]:
        query = """SELECT type, key, value FROM "BaileysKeys" WHERE "whatsappId" = %s"""
        with psycopg.connect(self.url) as connection:
            return {(type_, key): value for type_, key, value in connection.execute(query, (id_,))}

    def session(self) -> str | None:
        with psycopg.connect(self.url) as connection:
            row = connection.execute("""SELECT session FROM "Whatsapps" WHERE id = 2""").fetchone()
        assert row is not None
        text: str | None = row[0]
        return text

    def set_session(self, text: str | None) -> None:
        with psycopg.connect(self.url) as connection:
            connection.execute("""UPDATE "Whatsapps" SET session = %s WHERE id = 2""", (text,))

    def fill(self) -> None:
        """The same keys for two sessions, one of whose ids begins with the other."""
        rows = [(*one, VALUES.get(one[1], f'"{one}"')) for one in [*KEPT, *map(parted, DERIVED)]]
        with psycopg.connect(self.url) as connection, connection.cursor() as cursor:
            cursor.execute("""DELETE FROM "Whatsapps" """)
            for id_ in (2, 26):
                cursor.execute("""INSERT INTO "Whatsapps" VALUES (%s, 'Loja', %s)""", (id_, wrapped(creds())))
                cursor.executemany(
                    """INSERT INTO "BaileysKeys" VALUES (%s, %s, %s, %s)""", [(id_, *row) for row in rows]
                )


def wrapped(fields: dict[str, Any]) -> str:
    return dumped({"creds": fields, "keys": {}}).decode()


def parted(name: str) -> tuple[str, str]:
    type_ = next(one for one in ("sender-key-memory", "sender-key", "session") if name.startswith(f"{one}-"))
    return type_, name[len(type_) + 1 :]


@pytest.fixture
def ticketz(tmp_path: Path) -> Iterator[Ticketz]:
    schema = f"ticketz_{uuid4().hex}"
    server = os.environ["POMBAL_TEST_SUPERUSER_URL"]
    url = f"{server}{'&' if '?' in server else '?'}options={quote(f'-csearch_path={schema}')}"
    with psycopg.connect(url) as connection:
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
        connection.execute("""CREATE TABLE "Whatsapps" (id serial PRIMARY KEY, name varchar(255), session text)""")
        connection.execute(
            """
            CREATE TABLE "BaileysKeys" (
                "whatsappId" integer NOT NULL REFERENCES "Whatsapps" ON DELETE CASCADE,
                type varchar(255) NOT NULL, key varchar(255) NOT NULL, value text NOT NULL,
                PRIMARY KEY ("whatsappId", type, key)
            )
            """
        )
    backups = tmp_path / "backups"
    backups.mkdir()
    one = Ticketz(url, backups)
    one.fill()
    yield one
    with psycopg.connect(url) as connection:
        connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))


def fault_of(act: Callable[[], object]) -> str:
    with pytest.raises(StoreFault) as caught:
        act()
    assert caught.value.code in FAULTS
    assert not any(word in str(caught.value) for word in ("55119", "127.0.0.1", "noise", "BaileysKeys", "@"))
    return caught.value.code


def copies(backup: Path) -> dict[tuple[str, str], str]:
    """The rows in a backup."""
    lines = [line for file in backup.glob("keys-*.jsonl") for line in file.read_text().splitlines()]
    return {(row["type"], row["key"]): row["value"] for row in map(json.loads, lines)}


# ---------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("jid", ["5511922220001:3@s.whatsapp.net", "300000000000001@lid"])
def test_a_contact_is_found_under_both_forms(ticketz: Ticketz, jid: str) -> None:
    assert ticketz.table().plan_contacts([jid, "120363000000000001@g.us"]) == ONE


def test_derived_keys_are_all_of_them_or_one_groups_sender_keys(ticketz: Ticketz) -> None:
    assert ticketz.table().plan_derived() == sorted(DERIVED)
    assert ticketz.table().plan_derived(["120363000000000001@g.us"]) == GROUP


def test_rows_that_are_dropped_are_in_the_backup_and_no_other_row_is_touched(ticketz: Ticketz) -> None:
    before, neighbour = ticketz.rows(), ticketz.rows(26)

    assert ticketz.table().drop([*ONE, *GROUP, "session-5511900000000.0"], "r1") == 5

    gone = set(map(parted, [*ONE, *GROUP]))
    assert ticketz.rows() == {key: value for key, value in before.items() if key not in gone}
    assert ticketz.rows(26) == neighbour
    backup = ticketz.backups / "2" / "r1"
    assert copies(backup) == {key: before[key] for key in gone}
    assert stat.S_IMODE(backup.stat().st_mode) == 0o700
    assert {stat.S_IMODE(one.stat().st_mode) for one in backup.iterdir()} == {0o600}
    assert ticketz.table().drop([*ONE, *GROUP], "r1") == 5


@pytest.mark.parametrize("name", ["pre-key-7", "lid-mapping-5511922220001", "session-of no address", "creds.json"])
def test_a_row_that_is_no_derived_key_is_refused(ticketz: Ticketz, name: str) -> None:
    before = ticketz.rows()

    assert fault_of(lambda: ticketz.table().drop([ONE[0], name], "r1")) == "refused"

    assert ticketz.rows() == before
    assert not list(ticketz.backups.iterdir())


def test_many_rows_go_in_several_transactions(ticketz: Ticketz) -> None:
    names = [f"session-55118{number:08}.0" for number in range(250)]
    with psycopg.connect(ticketz.url) as connection:
        connection.execute(
            """
            INSERT INTO "BaileysKeys"
            SELECT 2, 'session', '55118' || lpad(n::text, 8, '0') || '.0', '{"n": "é"}' FROM generate_series(0, 249) n
            """
        )

    assert ticketz.table().drop(names, "r1") == 250

    assert len(copies(ticketz.backups / "2" / "r1")) == 250
    assert set(ticketz.rows()) == KEPT | set(map(parted, DERIVED))


def test_rows_that_somebody_else_holds_stay(ticketz: Ticketz) -> None:
    with psycopg.connect(ticketz.url) as connection:
        connection.execute("""SELECT FROM "BaileysKeys" WHERE key = '5511922220001.0' FOR UPDATE""")

        assert fault_of(lambda: ticketz.table().drop(ONE, "r1")) == "busy"

    assert set(map(parted, ONE)) <= set(ticketz.rows())


def drop_killed_everywhere(url: str, backups: str) -> None:
    ticketz = Ticketz(url, Path(backups))
    names = [*ONE, *GROUP]
    number, before, seen = 0, dict[tuple[str, str], str](), list[int]()

    def fresh() -> None:
        nonlocal number, before
        number += 1
        ticketz.fill()
        before = ticketz.rows()

    def act() -> int:
        return ticketz.table().drop(names, f"r{number}")

    def check() -> None:
        now, backup = ticketz.rows(), ticketz.backups / "2" / f"r{number}"
        assert before == {**copies(backup), **now}
        seen.append(len(now))
        assert act() == len(names)
        gone = set(map(parted, names))
        assert ticketz.rows() == {key: value for key, value in before.items() if key not in gone}
        assert copies(backup) == {key: before[key] for key in gone}

    assert killed_before_each_step(fresh, act, check) > 100
    assert set(seen) == {len(before), len(before) - len(names)}


def test_a_drop_that_is_killed_between_any_two_steps_goes_on_and_loses_nothing(ticketz: Ticketz) -> None:
    run_alone("tests.providers.test_authtable", "drop_killed_everywhere", ticketz.url, str(ticketz.backups))


# --------------------------------------------------------------------------------------------------------- credentials


@pytest.mark.parametrize("text", ["", None, wrapped(creds())[:-30], '{"creds":{},"keys":{}}', "null"])
def test_broken_credentials_are_replaced_by_those_that_were_kept(ticketz: Ticketz, text: str | None) -> None:
    one = ticketz.table()
    assert one.keep_creds()
    assert not one.keep_creds()
    assert one.plan_restore() is None
    keys, neighbour = ticketz.rows(), ticketz.rows(26)
    ticketz.set_session(text)

    assert one.creds_are_broken()
    name = one.plan_restore()
    assert name is not None
    one.restore(name, "r1")
    one.restore(name, "r1")

    assert not one.creds_are_broken()
    told = json.loads(ticketz.session() or "")
    assert told == {"creds": {**creds(), "nextPreKeyId": 41, "firstUnuploadedPreKeyId": 41}, "keys": {}}
    assert (ticketz.rows(), ticketz.rows(26)) == (keys, neighbour)
    if text is not None:
        assert (ticketz.backups / "2" / "r1" / "creds.json").read_text() == text


@pytest.mark.parametrize(
    "text",
    [
        wrapped(creds(pairing=2)),
        '{"creds":' + cut_after("noiseKey", creds(pairing=2)).decode(),
        wrapped({key: value for key, value in creds(pairing=2).items() if key != "me"}),
        '{"creds":' + cut_after("signedPreKey", creds(pre_key=2)).decode(),
    ],
)
def test_credentials_of_another_pairing_or_a_later_state_are_never_overwritten(ticketz: Ticketz, text: str) -> None:
    one = ticketz.table()
    one.keep_creds()
    name = one._backups.newest()[0].name
    ticketz.set_session(text)

    assert one.plan_restore() is None
    assert fault_of(lambda: one.restore(name, "r1")) == "refused"

    assert ticketz.session() == text


# ---------------------------------------------------------------------------------------------------- what it stands on


def test_a_store_that_is_well_says_nothing_and_one_that_is_not_says_what(ticketz: Ticketz) -> None:
    ticketz.table().check()

    assert fault_of(ticketz.table(3).check) == "missing"
    assert fault_of(ticketz.table(3).creds_are_broken) == "missing"
    assert fault_of(ticketz.table(backups=str(ticketz.backups / "none")).check) == "missing"
    empty = Ticketz(os.environ["POMBAL_TEST_SUPERUSER_URL"], ticketz.backups)
    assert fault_of(empty.table().check) == "misconfigured"


@pytest.mark.parametrize(
    ("session", "url", "backups"),
    [
        ("Loja", "postgresql://x/y", "/srv/backups"),
        ("0", "postgresql://x/y", "/srv/backups"),
        ("99999999999", "postgresql://x/y", "/srv/backups"),
        ("2", None, "/srv/backups"),
        ("2", "host=x", "/srv/backups"),
        ("2", "postgresql://x/y", None),
        ("2", "postgresql://x/y", "backups"),
    ],
)
def test_settings_that_lead_nowhere_are_refused(session: str, url: str | None, backups: str | None) -> None:
    config = {"session": session, "auth": {"kind": "ticketz", "backups": backups}}

    assert fault_of(lambda: store(config, {"store_url": url})) == "misconfigured"


def test_a_database_that_is_not_there_is_unreachable(ticketz: Ticketz) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        table = Table(f"postgresql://u:noise@127.0.0.1:{closed.getsockname()[1]}/d", "2", backups=str(ticketz.backups))

        assert fault_of(table.plan_derived) == "unreachable"


def test_a_database_that_falls_silent_is_not_waited_for(ticketz: Ticketz) -> None:
    """Its own timeouts are no help when nobody answers: a relay passes the start of a connection on, and no more."""
    real = psycopg.conninfo.conninfo_to_dict(ticketz.url)
    with socket.create_server(("127.0.0.1", 0)) as relay:
        path = f"{real['host']}/.s.PGSQL.{real['port']}"
        thread = threading.Thread(target=_pass_the_start_on, args=(relay, path))
        thread.start()
        url = (
            f"postgresql://{real['user']}@127.0.0.1:{relay.getsockname()[1]}/pombal?sslmode=disable&gssencmode=disable"
        )
        table = Table(url, "2", backups=str(ticketz.backups), longest=0.5)

        assert fault_of(table.plan_derived) == "timeout"

        thread.join()


def _pass_the_start_on(relay: socket.socket, path: str) -> None:
    """Until the server is ready for a query; then take what the client says, until it goes away."""
    with relay.accept()[0] as client, socket.socket(socket.AF_UNIX) as server, selectors.DefaultSelector() as ready:
        server.connect(path)
        ready.register(client, selectors.EVENT_READ, server)
        ready.register(server, selectors.EVENT_READ, client)
        said = b""
        while not said.endswith(b"Z\0\0\0\5I"):
            for key, _ in ready.select():
                said = key.fileobj.recv(65536)  # type: ignore[union-attr]
                key.data.sendall(said)
        while client.recv(65536):
            pass
