"""What an operator types, and what is answered: 0 for done, 1 for a failure that says why, 2 for wrong usage."""

import argparse
import io
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from sqlalchemy import select

from models import ApiKey, App, DeadLetter, Tenant
from models.dead_letter import letter
from pombal import db
from pombal.broker import redis_client
from pombal.cli import main, parser
from pombal.local import ensure_roles_and_database, start_valkey
from pombal.secrets import fingerprint, new_fernet_key
from pombal.settings import settings
from tests import factories
from tests.factories import Shop
from tests.pombal.breakable import JUNK, Servers
from tests.pombal.processes import output
from workers.incoming_message import incoming_message, ring_waiting

NOWHERE = "unix:///nowhere/v.sock"


class Terminal:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> str:
        """What a command that succeeds prints."""
        self._capsys.readouterr()
        code = main(arguments)
        out, err = self._capsys.readouterr()
        assert (code, err) == (0, ""), out
        return out

    def json(self, *arguments: str) -> Any:
        return msgspec.json.decode(self(*arguments, "--json"))

    def refused(self, *arguments: str) -> str:
        """The one line of a command that fails."""
        self._capsys.readouterr()
        assert main(arguments) == 1
        _, err = self._capsys.readouterr()
        return one_line(err)

    def misused(self, *arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        return self._capsys.readouterr().err


def one_line(said: str) -> str:
    assert said.startswith("pombal: "), said
    assert said.count("\n") == 1, said
    return said.removeprefix("pombal: ").strip()


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(capsys)


# ---------------------------------------------------------------------------------------------------------- usage


def commands(of: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from commands(sub, (*path, name))


@pytest.mark.parametrize("path", list(commands(parser())), ids=" ".join)
def test_each_command_explains_itself(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*path, "--help"])

    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(" ".join(("usage: pombal", *path)))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "fly",
        "dead",
        "dead retry",
        "dead retry --all --fingerprint x",
        "dead retry 5 --all",
        "dead list --limit many",
        "tenant create acme",
        "channel create acme pigeon --name n --config {}",
        "worker",
        "web --port http",
        "run incoming_message",
    ],
)
def test_wrong_usage_is_told_from_failure(terminal: Terminal, line: str) -> None:
    assert "usage: pombal" in terminal.misused(*line.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("tenant", "list"),
        ("tenant", "create", "acme", "--name", "Acme"),
        ("dead", "list"),
        ("trace", "wamid.some"),
        ("migrate",),
    ],
    ids=" ".join,
)
def test_a_database_that_is_away_is_said_in_one_line(arguments: tuple[str, ...]) -> None:
    away = "postgresql://pombal@:5432/pombal?host=/nowhere"

    said = output("-m", "pombal", *arguments, env={"DATABASE_URL": away, "DATABASE_OWNER_URL": away}, code=1)

    assert "PostgreSQL" in one_line(said)


def test_a_redis_that_is_away_is_said_in_one_line() -> None:
    said = output("-m", "pombal", "send", "incoming_message", '{"ids": []}', env={"REDIS_URL": NOWHERE}, code=1)

    assert "Redis" in one_line(said)


# ----------------------------------------------------------------------------------------- tenants, keys, channels


@pytest.fixture
def tenant() -> Tenant:
    return factories.a_tenant()


def test_a_tenant_is_created_once(terminal: Terminal) -> None:
    slug = f"t{uuid4().hex[:12]}"

    made = terminal.json("tenant", "create", slug, "--name", "Acme S.A.")

    assert made in terminal.json("tenant", "list")
    assert slug in terminal("tenant", "list")
    assert (made["slug"], made["name"]) == (slug, "Acme S.A.")
    assert terminal.refused("tenant", "create", slug, "--name", "Again") == f"there is a tenant {slug} already"


@pytest.mark.parametrize("slug", ["", "Acme", "-acme", "a b", "a/b", "ação", "a" * 64])
def test_a_slug_must_fit_into_an_address(terminal: Terminal, slug: str) -> None:
    command = ("tenant", "create", "--name", "Acme", "--", slug)

    assert terminal.refused(*command).startswith("a slug has lower-case letters, digits and hyphens")


def test_a_key_is_shown_once_and_only_its_hash_kept(terminal: Terminal, tenant: Tenant) -> None:
    said = terminal("key", "create", tenant.slug, "--name", "crm", "--scope", "messages:send")

    text = re.search(r"api_key: (pombal_\S+)", said)
    assert text
    assert "shown once" in said
    with factories.seen_by(tenant) as s:
        (key,) = s.scalars(select(ApiKey).where(ApiKey.tenant_id == tenant.id))
        assert s.scalars(ApiKey.presented(text[1])).one() is key
    assert (key.name, key.scopes, key.hash) == ("crm", ["messages:send"], fingerprint(text[1]))
    assert text[1].rpartition("_")[2] not in str({c.key: getattr(key, c.key) for c in ApiKey.__table__.columns})


def test_a_revoked_key_ends_at_once(terminal: Terminal, tenant: Tenant) -> None:
    made = terminal.json("key", "create", tenant.slug)

    first = terminal.json("key", "revoke", tenant.slug, made["id"])

    assert terminal.json("key", "revoke", tenant.slug, made["id"]) == first
    with factories.seen_by(tenant) as s:
        assert s.scalars(ApiKey.presented(made["api_key"])).first() is None


def test_keys_are_refused_for_a_reason(terminal: Terminal, tenant: Tenant) -> None:
    other = terminal.json("key", "create", factories.a_tenant().slug)

    assert terminal.refused("key", "create", "nobody") == "there is no tenant nobody"
    assert terminal.refused("key", "create", tenant.slug, "--scope", "fly").startswith("unknown scope fly; there are ")
    assert terminal.refused("key", "revoke", tenant.slug, other["id"]) == "this tenant has no such key"
    assert terminal.refused("key", "revoke", tenant.slug, "5") == "5 is not an id"


def channel(tenant: Tenant, **config: Any) -> tuple[str, ...]:
    given = {"phone_number_id": "1", "waba_id": "2", "app_secret": uuid4().hex, "verify_token": uuid4().hex, **config}
    given = {name: value for name, value in given.items() if value is not None}
    name = f"c{uuid4().hex}"
    return "channel", "create", tenant.slug, "meta", "--name", name, "--config", msgspec.json.encode(given).decode()


def test_a_channel_gets_an_address_and_keeps_its_secrets(terminal: Terminal, tenant: Tenant) -> None:
    command = channel(tenant, app_secret="a secret of the app", access_token="an-access-token")

    made = terminal.json(*command)

    assert made["webhook"] == f"/webhooks/whatsapp/{tenant.slug}"
    (listed,) = terminal.json("channel", "list", tenant.slug)
    assert listed["id"] == made["id"]
    assert listed["config"] == {"phone_number_id": "1", "waba_id": "2"}
    with factories.superuser() as connection:
        kept = connection.execute("SELECT sealed FROM channel WHERE id = %s", [made["id"]]).fetchall()
    assert b"token" not in kept[0][0]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("{", "--config is not JSON; it looks like {"),
        ("[]", "--config: must be an object"),
        ('{"phone_number_id": 5, "waba_id": "2"}', "--config: phone_number_id must be a text"),
        ('{"waba_id": "2"}', "--config: phone_number_id is required"),
        (
            '{"phone_number_id": "1", "waba_id": "2", "colour": "blue"}',
            "--config: colour is not known here; there are ",
        ),
        ('{"phone_number_id": "1 2", "waba_id": "2"}', "phone_number_id must be 1 to 64 letters"),
        ('{"phone_number_id": "1", "waba_id": ""}', "waba_id must be 1 to 64 letters"),
        ('{"phone_number_id": "1", "waba_id": "2", "app_secret": "short"}', "app_secret is shorter than 8"),
        ('{"phone_number_id": "1", "waba_id": "2", "app": "A/B"}', "app must be lower-case letters"),
    ],
)
def test_a_channel_is_refused_for_a_reason(terminal: Terminal, tenant: Tenant, config: str, reason: str) -> None:
    said = terminal.refused("channel", "create", tenant.slug, "meta", "--name", "c", "--config", config)

    assert said.startswith(reason)
    assert "short" not in said.replace("shorter", "")


def test_numbers_names_and_apps_do_not_mix(terminal: Terminal, tenant: Tenant) -> None:
    first = channel(tenant)
    terminal(*first)
    same_name = [*channel(tenant, phone_number_id="3")]
    same_name[5] = first[5]

    assert terminal.refused(*channel(tenant)) == "this app has a channel with that phone_number_id already"
    assert terminal.refused(*same_name) == "the name is taken already"
    assert (
        terminal.refused(*channel(factories.a_tenant(), app=tenant.slug))
        == f"the app {tenant.slug} is another tenant's"
    )
    assert terminal.refused("channel", "list", "nobody") == "there is no tenant nobody"
    terminal(*channel(tenant, phone_number_id="3", app=f"{tenant.slug}-2"))


def test_a_shared_app_is_not_changed_by_whoever_joins_it(terminal: Terminal, tenant: Tenant) -> None:
    joining: dict[str, Any] = {"app": "default", "app_secret": None, "verify_token": None}
    if terminal_code("app", "default"):  # made by the first test that needs it
        terminal(*channel(tenant, **{**joining, "app_secret": uuid4().hex}, phone_number_id=uuid4().hex))

    for field in ("app_secret", "verify_token"):
        command = channel(tenant, **{**joining, field: uuid4().hex}, phone_number_id=uuid4().hex)
        assert terminal.refused(*command) == "the app default is shared; its secrets are set where it was created"
    terminal(*channel(tenant, **joining, phone_number_id=uuid4().hex))


def terminal_code(table: str, slug: str) -> bool:
    with factories.superuser() as connection:
        return connection.execute(f"SELECT FROM {table} WHERE slug = %s".encode(), [slug]).fetchone() is None


def test_an_older_secret_alone_does_not_replace_the_newest(terminal: Terminal, tenant: Tenant) -> None:
    terminal(*channel(tenant))

    command = channel(tenant, phone_number_id="3", app_secret=None, old_app_secret=uuid4().hex)

    assert terminal.refused(*command) == "old_app_secret goes with the app_secret that follows it"


# ----------------------------------------------------------------------------------------------------------- jobs


def test_an_apps_secret_is_rotated_with_both_valid_until_it_is_finished(
    terminal: Terminal, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = uuid4().hex, uuid4().hex
    terminal(*channel(tenant, app_secret=old))

    def secrets() -> list[str]:
        with db.session() as s:
            kept: list[str] = s.scalars(App.by_slug(tenant.slug)).one().secrets()["app_secrets"]
            return kept

    monkeypatch.setattr("sys.stdin", io.StringIO(new + "\n"))
    assert terminal.json("app", "rotate", tenant.slug)["valid_secrets"] == 2
    assert secrets() == [new, old]
    assert terminal.json("app", "rotate", tenant.slug, "--finish")["valid_secrets"] == 1
    assert secrets() == [new]

    monkeypatch.setattr("sys.stdin", io.StringIO("short\n"))
    assert "shorter" in terminal.refused("app", "rotate", tenant.slug)
    assert "no app" in terminal.refused("app", "rotate", f"no-{tenant.slug}"[:40])


def test_a_second_number_with_another_secret_does_not_shut_the_app(terminal: Terminal, tenant: Tenant) -> None:
    good, mistyped = uuid4().hex, uuid4().hex
    terminal(*channel(tenant, app_secret=good))

    terminal(*channel(tenant, phone_number_id="3", app_secret=mistyped))

    with db.session() as s:
        assert s.scalars(App.by_slug(tenant.slug)).one().secrets()["app_secrets"] == [mistyped, good]


def test_actors_are_listed_with_their_queues_and_what_waits(terminal: Terminal, queues: None) -> None:
    before = {row["actor"]: row for row in terminal.json("actors")}
    incoming_message.send([])

    after = {row["actor"]: row for row in terminal.json("actors")}

    row = after["incoming_message"]
    assert (row["queue"], row["max_retries"], row["backoff"]) == ("incoming_message", 3, "1000-8000 ms")
    assert (before["incoming_message"]["waiting"], row["waiting"], row["delayed"], row["dead"]) == (0, 1, 0, 0)
    assert after["incoming_message_tick"]["schedule"] == "* * * * *"
    assert "incoming_message_tick" in terminal("actors")


@pytest.mark.parametrize("shape", ['{{"ids": ["{}"]}}', '[["{}"]]'])
def test_one_job_runs_here_without_a_broker(shape: str) -> None:
    shop, wamid = factories.a_shop(), factories.a_wamid()
    id_ = factories.a_delivery(shop, factories.texts(shop, wamid))

    output("-m", "pombal", "run", "incoming_message", shape.format(id_), env={"REDIS_URL": NOWHERE})

    assert factories.delivery(id_).state == "done"
    assert factories.rows(shop, "SELECT 1 FROM message WHERE provider_id = :wamid", wamid=wamid)


def test_one_job_is_enqueued(terminal: Terminal, queues: None) -> None:
    id_ = str(uuid4())

    message_id = terminal("send", "incoming_message", f'{{"ids": ["{id_}"]}}').strip()

    with redis_client() as client:
        (body,) = client.hvals("dramatiq:incoming_message.msgs")
    message = msgspec.json.decode(body)
    assert (message["message_id"], message["kwargs"]) == (message_id, {"ids": [id_]})


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (("fly", "{}"), "there is no actor fly; there are "),
        (("incoming_message", "{"), "the arguments are not JSON: "),
        (("incoming_message", "5"), "give the arguments as a JSON object or array"),
        (("incoming_message", '{"id": "5"}'), "incoming_message does not take these arguments: "),
        (("incoming_message", "[]"), "incoming_message does not take these arguments: "),
        (("incoming_message", "[[], 5]"), "incoming_message does not take these arguments: "),
    ],
)
def test_a_job_that_cannot_run_is_not_enqueued(
    terminal: Terminal, queues: None, job: tuple[str, str], reason: str
) -> None:
    assert terminal.refused("send", *job).startswith(reason)

    with redis_client() as client:
        assert not client.hvals("dramatiq:incoming_message.msgs")


def test_a_worker_for_no_queue_does_not_start(terminal: Terminal) -> None:
    there_are = "channel_session, download_media, incoming_message, outgoing_message, session_fixer, sip_refresh, "
    there_are += "status_sync"
    said = terminal.refused("worker", "incoming_mesage")
    assert said == f"there is no queue incoming_mesage; there are {there_are}"


def test_a_word_to_no_sandbox_is_refused(terminal: Terminal) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    said = terminal.refused("sandbox", "--port", str(port), "say", "Olá")

    assert said.startswith(f"no sandbox answers at http://127.0.0.1:{port} ")


# ---------------------------------------------------------------------------------------------------------- trace


@pytest.fixture(scope="module")
def shop() -> Shop:
    return factories.a_shop()


def test_a_message_tells_its_story_by_any_of_its_ids(terminal: Terminal, shop: Shop, queues: None) -> None:
    wamid = factories.a_wamid()
    id_ = factories.a_delivery(shop, factories.texts(shop, wamid))
    incoming_message([str(id_)])
    (message,) = factories.rows(shop, "SELECT id FROM message WHERE provider_id = :wamid", wamid=wamid)

    stories = [terminal.json("trace", wanted) for wanted in (wamid, str(message["id"]), str(id_), id_.hex)]

    assert stories[0] == stories[1] == stories[2] == stories[3]
    story = stories[0]
    assert [row["id"] for row in story["delivery"]] == [str(id_)]
    assert [row["provider_id"] for row in story["message"]] == [wamid]
    assert [row["type"] for row in story["event"]] == ["message_received"]
    assert len(story["conversation"]) == 1
    assert "raw" not in story["delivery"][0]
    assert wamid in terminal("trace", wamid)


def test_what_was_set_aside_is_part_of_the_story(terminal: Terminal, shop: Shop, queues: None) -> None:
    id_ = factories.a_delivery(shop, b"not JSON")
    incoming_message([str(id_)])

    story = terminal.json("trace", str(id_))

    assert [row["state"] for row in story["delivery"]] == ["dead"]
    assert len(story["dead letter"]) == 1


@pytest.mark.parametrize("wanted", ["wamid.nobody", "", "0192a3b4-c5d6-7e8f-90a1-b2c3d4e5f607"])
def test_an_unknown_id_has_no_story(terminal: Terminal, wanted: str) -> None:
    assert terminal.refused("trace", wanted) == "nothing here has this id"


# ----------------------------------------------------------------------------------------------------------- dead


@pytest.fixture
def letters(shop: Shop, queues: None) -> list[DeadLetter]:
    """Three of one cause, and the only ones that are open."""
    with factories.superuser() as connection:
        connection.execute("UPDATE dead_letter SET state = 'dropped'")
    ids = [factories.a_delivery(shop, b"not JSON at all") for _ in range(3)]
    incoming_message([str(id_) for id_ in ids])
    with factories.seen_by(shop) as s:
        return list(s.scalars(select(DeadLetter).where(DeadLetter.delivery_id.in_(ids))))


def states(letters: list[DeadLetter], shop: Shop) -> list[str]:
    ids = [row.id for row in letters]
    return [row["state"] for row in factories.rows(shop, "SELECT state FROM dead_letter WHERE id = ANY(:ids)", ids=ids)]


def test_letters_are_listed_and_grouped_and_shown(terminal: Terminal, letters: list[DeadLetter]) -> None:
    (cause,) = {row.fingerprint for row in letters}

    listed = terminal.json("dead", "list", "--fingerprint", cause)
    (group,) = terminal.json("dead", "list", "--grouped")
    shown = terminal.json("dead", "show", str(letters[0].id))

    assert {row["id"] for row in listed} == {str(row.id) for row in letters}
    assert (group["fingerprint"], group["letters"]) == (cause, 3)
    assert shown["delivery_id"] == str(letters[0].delivery_id)
    assert "1 of 3; --limit shows more" in terminal("dead", "list", "--limit", "1")
    assert str(letters[0].delivery_id) in terminal("dead", "show", str(letters[0].id))
    assert terminal("dead", "list", "--fingerprint", "0" * 12).startswith("no dead letters")
    assert terminal.refused("dead", "show", str(uuid4())) == "there is no such dead letter"
    assert terminal.refused("dead", "show", "5") == "5 is not an id"


def test_a_letter_tried_again_runs_again_and_reopens(terminal: Terminal, shop: Shop, letters: list[DeadLetter]) -> None:
    (row, *others) = letters

    assert terminal("dead", "retry", str(row.id)) == "1 retried\n"
    assert states([row], shop) == ["retried"]
    assert states(others, shop) == ["open", "open"]
    assert row.delivery_id
    assert factories.delivery(row.delivery_id).state == "pending"
    ring_waiting()
    incoming_message([str(row.delivery_id)])

    (again,) = factories.rows(shop, "SELECT state, count FROM dead_letter WHERE id = :id", id=row.id)
    assert again == {"state": "open", "count": 2}


@pytest.mark.parametrize("act", ["retry", "drop"])
def test_many_at_once_are_counted_and_need_a_yes(
    terminal: Terminal, shop: Shop, letters: list[DeadLetter], act: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    for which in (("--all",), ("--fingerprint", letters[0].fingerprint)):
        assert main(["dead", act, *which]) == 1  # nobody sits there to answer
        assert capsys.readouterr().out == f"3 dead letters to {act}\n"
        assert states(letters, shop) == ["open"] * 3

    said = terminal("dead", act, "--fingerprint", letters[0].fingerprint, "--yes")

    done = {"retry": "retried", "drop": "dropped"}[act]
    assert said == f"3 dead letters to {act}\n3 {done}\n"
    assert states(letters, shop) == [done] * 3
    assert terminal.refused("dead", act, "--all", "--yes") == "no open dead letter matches"


def test_letters_are_dropped_though_junk_lies_beside_their_jobs(
    terminal: Terminal, shop: Shop, letters: list[DeadLetter]
) -> None:
    mine = msgspec.json.encode({"message_id": "job", "args": [[str(letters[0].delivery_id)]]})
    nested = b'{"args":' + b"[" * 20_000
    with redis_client() as client:
        for n, body in enumerate((*JUNK, nested, b'{"args":{"a":1},"message_id":{}}', b'{"args":[[[]]]}', mine)):
            client.zadd("dramatiq:incoming_message.XQ", {str(n): n})
            client.hset("dramatiq:incoming_message.XQ.msgs", str(n), body)

        assert terminal("dead", "drop", str(letters[0].id)) == "1 dropped\n"

        left = client.hvals("dramatiq:incoming_message.XQ.msgs")
    assert mine not in left
    assert set(JUNK) <= set(left)


@pytest.mark.parametrize("which", [("",), ("--fingerprint", "")])
def test_an_empty_word_is_not_all(
    terminal: Terminal, shop: Shop, letters: list[DeadLetter], which: tuple[str, ...]
) -> None:
    terminal.refused("dead", "drop", *which, "--yes")

    assert states(letters, shop) == ["open"] * 3


def test_a_letter_stays_open_when_its_job_could_not_be_enqueued() -> None:
    key = f"job:{uuid4()}"
    with db.session() as s:
        DeadLetter.record(s, [letter(key=key, actor="incoming_message", args=[[]], error="RuntimeError")])
        row = s.scalars(select(DeadLetter).where(DeadLetter.key == key)).one()

    said = output("-m", "pombal", "dead", "retry", str(row.id), env={"REDIS_URL": NOWHERE}, code=1)

    assert "Redis" in said
    with db.session() as s:
        assert s.get_one(DeadLetter, row.id).state == "open"


# --------------------------------------------------------------------------------------------------------- doctor


def doctor(env: dict[str, str], *, code: int) -> dict[str, list[str]]:
    found = msgspec.json.decode(output("-m", "pombal", "doctor", "--json", env=env, code=code))
    return {level: [row["what"] for row in found if row["level"] == level] for level in ("ok", "warning", "error")}


def test_a_sound_installation_has_nothing_to_mend(servers: Servers) -> None:
    found = doctor(servers.env, code=0)

    assert found["error"] == found["warning"] == []
    assert any(what.startswith("migrations are current") for what in found["ok"])


def test_dangerous_servers_are_found(servers: Servers, tmp_path: Path) -> None:
    with start_valkey(tmp_path, persistence=False) as valkey:
        env = {**servers.env, "REDIS_URL": valkey.url}
        assert [what.partition(":")[0] for what in doctor(env, code=0)["warning"]] == ["appendonly is off"]

        with redis_client(valkey.url) as client:
            client.config_set("maxmemory-policy", "allkeys-lru")
        found = doctor({**env, "DATABASE_URL": servers.postgres.database_url("postgres", "pombal")}, code=1)

    assert found["error"] == [
        "the role of DATABASE_URL bypasses row-level security: use another",
        "maxmemory-policy is allkeys-lru: whole queues may vanish; set noeviction",
    ]


def test_a_database_without_tables_is_found(servers: Servers) -> None:
    app_url, owner_url = ensure_roles_and_database(servers.postgres, "bare")

    found = doctor({**servers.env, "DATABASE_URL": app_url, "DATABASE_OWNER_URL": owner_url}, code=1)

    assert found["error"] == ["migrations are not current: run `pombal migrate`"]


def test_keys_that_cannot_be_used_or_open_nothing_are_found(servers: Servers) -> None:
    secrets = settings().secret_keys
    assert factories.a_shop()  # its app's secrets are sealed under our own key

    weak = doctor({"POMBAL_SECRET_KEYS": f"{secrets},short"}, code=1)
    other = doctor({"POMBAL_SECRET_KEYS": new_fernet_key()}, code=1)
    short = doctor({**servers.env, "POMBAL_MODE": "production", "METRICS_TOKEN": "short"}, code=1)

    assert weak["error"] == ["POMBAL_SECRET_KEYS: key 2 is not a Fernet key (32 bytes in URL-safe base64)"]
    assert any(what.startswith("no key of POMBAL_SECRET_KEYS opens the secrets of row ") for what in other["error"])
    assert short["error"] == ["METRICS_TOKEN is shorter than 32 characters"]


def test_servers_that_are_away_are_found(servers: Servers) -> None:
    env = {**servers.env, "REDIS_URL": NOWHERE, "DATABASE_URL": "postgresql://pombal@:5432/pombal?host=/nowhere"}

    found = doctor(env, code=1)

    assert [what.partition(":")[0] for what in found["error"]] == [
        "PostgreSQL does not answer",
        "Redis does not answer",
    ]
