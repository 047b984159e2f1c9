"""What an operator types about channels on gateways: made, connected to us, restarted, logged out, paired."""

import io
import json
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import msgspec
import pytest
from sqlalchemy import func, select
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from models import Channel, Hold, Lane, Tenant, WaSession, WebhookToken, standing
from pombal import db
from pombal.broker import redis_client
from pombal.settings import settings
from pombal.supervisor import LINUX
from sandbox import client
from sandbox.config import MegaInstance
from tests import factories
from tests.chaos.fleet import Fleet, until
from tests.pombal.breakable import Servers
from tests.pombal.processes import output
from tests.pombal.test_cli import Terminal, doctor
from tests.sandbox.megaapi_servers import a_megaapi
from tests.sandbox.servers import serve
from tests.workers.gateways import set_stored
from tests.workers.tools import in_background, until_somebody_waits_for_a_lock
from workers.channel_session import status_check
from workers.status_sync import ask_soon

pytestmark = pytest.mark.usefixtures("queues")

KEY, TOKEN, HOST_TOKEN = "megastart-sales", "the-token-of-the-instance", "the-token-of-the-host"
OURS = "https://pombal.example"


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(capsys)


@pytest.fixture
def tenant() -> Tenant:
    return factories.a_tenant()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Whose changes are settings; gateways on this machine may be reached."""
    monkeypatch.setenv("MEDIA_ALLOWED_NETWORKS", "127.0.0.0/8")
    settings.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    settings.cache_clear()


@pytest.fixture
def gateway(environment: pytest.MonkeyPatch) -> Iterator[str]:
    """A simulated host with one instance."""
    with a_megaapi(MegaInstance("sales", KEY, TOKEN), host_token=HOST_TOKEN) as address:
        yield address


def create(tenant: Tenant, name: str = "sales", **config: Any) -> tuple[str, ...]:
    given = {"host": "mega.example", "instance_key": KEY, "token": TOKEN, **config}
    given = {field: value for field, value in given.items() if value is not None}
    encoded = msgspec.json.encode(given).decode()
    return "channel", "create", tenant.slug, "megaapi", "--name", name, "--config", encoded


def connect(tenant: Tenant, *more: str, url: str = OURS) -> tuple[str, ...]:
    return "channel", "connect", tenant.slug, "sales", "--url", url, *more


def row(tenant: Tenant, name: str = "sales") -> Channel:
    with factories.seen_by(tenant) as s:
        found: Channel = s.scalars(select(Channel).where(Channel.tenant_id == tenant.id, Channel.name == name)).one()
    return found


def tokens(tenant: Tenant) -> list[bytes]:
    with factories.seen_by(tenant) as s:
        return list(s.scalars(select(WebhookToken.digest).where(WebhookToken.tenant_id == tenant.id)))


def there(gateway: str) -> str:
    """The URL that the gateway delivers to."""
    (instance,) = client.mega_instances(gateway)["instances"]
    url: str = instance["webhook_url"] or ""
    return url


def checks_asked() -> list[str]:
    with redis_client() as connection:
        bodies: Any = connection.hvals("dramatiq:channel_session.msgs")
    jobs = [msgspec.json.decode(body) for body in bodies]
    return [job["args"][0] for job in jobs if job["actor_name"] == "status_check"]


def check() -> None:
    """As a worker would: the jobs that lie there."""
    for id_ in checks_asked():
        status_check(id_)
    with redis_client() as connection:
        connection.flushdb()


# ----------------------------------------------------------------------------------------------------------- making


def test_a_channel_gets_a_webhook_whose_token_is_shown_once(terminal: Terminal, tenant: Tenant) -> None:
    said = terminal(*create(tenant, messages_per_second=2, silent_after_hours=72))

    path = re.search(r"webhook: (/api/webhooks/whatsapp/\S+)\?token=(\S+)", said)
    assert path
    assert path[1] == f"/api/webhooks/whatsapp/{tenant.slug}"
    assert "shown once" in said
    assert tokens(tenant) == [WebhookToken.digest_of(path[2])]
    found = row(tenant)
    assert found.secrets() == {"token": TOKEN, "webhook_token": path[2]}
    assert found.config == {
        "host": "https://mega.example",
        "instance_key": KEY,
        "token_kind": "instance",
        "messages_per_second": 2,
        "silent_after_hours": 72,
    }
    listed = terminal("channel", "list", tenant.slug)
    assert TOKEN not in listed
    assert path[2] not in listed
    (shown,) = terminal.json("channel", "list", tenant.slug)
    assert (shown["kind"], shown["status"], shown["has_secrets"]) == ("megaapi", "unknown", True)


def test_a_list_of_channels_tells_what_is_known_now(terminal: Terminal, tenant: Tenant) -> None:
    terminal(*create(tenant))
    terminal("channel", "create", tenant.slug, "stub", "--name", "dry", "--config", "{}")
    set_stored(row(tenant), status="connected")

    def listed() -> dict[str, str | None]:
        return {one["name"]: one["status"] for one in terminal.json("channel", "list", tenant.slug)}

    assert listed() == {"sales": "connected", "dry": None}
    set_stored(row(tenant), unknown_reason="timeout")
    assert listed() == {"sales": "unknown", "dry": None}


def test_a_token_need_not_be_in_the_list_of_processes(
    terminal: Terminal, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    *command, config = create(tenant)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{config}\n"))

    terminal(*command, "-")

    assert row(tenant).secrets()["token"] == TOKEN


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"host": None}, "host is required: MEGA_API_HOST is not set"),
        ({"host": "https://mega.example/rest"}, "the host must be given alone"),
        ({"host": "https://me:secret@mega.example"}, "the host must not have a user name"),
        ({"host": "ftp://mega.example"}, "the host must be reached by https"),
        ({"instance_key": None}, "--config: instance_key is required"),
        ({"instance_key": "../list"}, "the instance key may have letters"),
        ({"instance_key": ".."}, "the instance key may have letters"),
        ({"token": None}, "token is required: MEGA_API_TOKEN is not set"),
        ({"token": "se cret"}, "token has a blank in it"),
        ({"token": "secret\x01"}, "token must be printable ASCII"),
        ({"silent_after_hours": -1}, "--config: silent_after_hours must be a number from 0 to 8760"),
        ({"token_kind": "secret"}, "--config: token_kind must be instance or host"),
        ({"on_unknown": "guess"}, "on_unknown must be once_more or ask"),
        ({"webhook_token": "secret"}, "--config: webhook_token is not known here; there are "),
    ],
)
def test_a_channel_is_refused_for_a_reason(
    terminal: Terminal, tenant: Tenant, config: dict[str, Any], reason: str
) -> None:
    said = terminal.refused(*create(tenant, **config))

    assert said.startswith(reason)
    assert "secret" not in said
    assert terminal.json("channel", "list", tenant.slug) == []


def test_an_instance_is_one_channel_of_a_tenant(terminal: Terminal, tenant: Tenant) -> None:
    terminal(*create(tenant))

    for host in ("https://mega.example", "MEGA.example:443", "https://mega.example/"):
        said = terminal.refused(*create(tenant, "again", host=host))
        assert said == "the channel sales has this instance_key of this host already"
    assert terminal.refused(*create(tenant, instance_key="another")) == "the name is taken already"
    terminal(*create(tenant, "elsewhere", host="other.example"))
    assert len(tokens(tenant)) == 2


def test_the_operators_token_goes_to_the_operators_host_alone(
    terminal: Terminal, tenant: Tenant, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("MEGA_API_HOST", "mega.example")
    environment.setenv("MEGA_API_TOKEN", HOST_TOKEN)
    settings.cache_clear()

    said = terminal.refused(*create(tenant, host="other.example", token=None))
    terminal(*create(tenant, host="https://mega.example", token=None))

    assert said == "token is required: MEGA_API_TOKEN goes to MEGA_API_HOST alone"
    found = row(tenant)
    assert found.config == {"instance_key": KEY, "token_kind": "host"}  # it follows the environment
    assert set(found.secrets()) == {"webhook_token"}
    assert terminal.refused(*create(tenant, "again")).startswith("the channel sales has this instance_key")


def test_one_channel_is_the_default_whatever_its_kind(terminal: Terminal, tenant: Tenant) -> None:
    terminal(*create(tenant, default=True))

    terminal("channel", "create", tenant.slug, "stub", "--name", "dry", "--config", '{"default": true}')

    assert "default" not in row(tenant).config
    assert (row(tenant, "dry").kind, row(tenant, "dry").config) == ("stub", {"default": True})


# ------------------------------------------------------------------------------------------------------- connecting


def test_a_gateway_delivers_to_us_from_now_on(terminal: Terminal, tenant: Tenant, gateway: str) -> None:
    terminal(*create(tenant, host=gateway))
    token = row(tenant).secrets()["webhook_token"]

    said = terminal(*connect(tenant, url=f"{OURS}/"))

    path = f"{OURS}/api/webhooks/whatsapp/{tenant.slug}?token="
    assert there(gateway) == f"{path}{token}"
    assert f"webhook: {path}…" in said
    assert token not in said
    assert terminal.json(*connect(tenant))["new_token"] is False
    assert tokens(tenant) == [WebhookToken.digest_of(token)]


def test_it_is_said_where_events_went_before(terminal: Terminal, tenant: Tenant, gateway: str) -> None:
    terminal(*create(tenant, host=gateway))

    def before(*more: str, url: str = OURS) -> str:
        said = terminal(*connect(tenant, *more, url=url))
        assert row(tenant).secrets()["webhook_token"] not in said
        found = re.search("^before: (.*)$", said, re.MULTILINE)
        assert found
        return found[1]

    assert before(url="https://another.example") == "nothing"
    assert before() == f"elsewhere: https://another.example/api/webhooks/whatsapp/{tenant.slug}"
    assert before() == "the same"
    assert before("--new-token") == "the same with another token"
    client.mega_faults(gateway, "garbage", place="webhook", count=1)
    assert before() == "could not be read (unreadable)"


@pytest.mark.parametrize(
    ("url", "is_on", "said"),
    [
        ("https://me:hidden@somebody.example/x?token=hidden#hidden", True, "elsewhere: https://somebody.example/x"),
        ("https://somebody.example", False, "elsewhere: https://somebody.example, switched off"),
        ("hidden", True, "elsewhere: what is no address"),
        ("https://somebody.example/\x1b[2Jhidden", True, "elsewhere: what is no address"),
        ("https://[hidden", True, "elsewhere: what is no address"),
    ],
)
def test_what_was_there_before_is_told_without_what_may_be_secret(
    terminal: Terminal, tenant: Tenant, environment: pytest.MonkeyPatch, url: str, is_on: bool, said: str
) -> None:
    before = {"webhookUrl": url, "webhookEnabled": is_on}
    after = {"webhookUrl": "URL", "webhookEnabled": True}
    with serve(an_odd_gateway(after, meanwhile=lambda: None, before=before)) as host:
        terminal(*create(tenant, host=host))

        told = terminal.json(*connect(tenant))

    assert told["before"] == said
    assert "hidden" not in str(told)


def test_a_new_token_ends_the_old_one_when_the_gateway_has_taken_it(
    terminal: Terminal, tenant: Tenant, gateway: str
) -> None:
    terminal(*create(tenant, host=gateway))
    old = row(tenant).secrets()["webhook_token"]

    client.mega_faults(gateway, "http500", place="webhook")
    terminal.refused(*connect(tenant, "--new-token"))
    assert WebhookToken.digest_of(old) in tokens(tenant)  # perhaps the gateway has it still
    assert row(tenant).secrets()["webhook_token"] == old

    client.mega_clear_faults(gateway)
    said = terminal(*connect(tenant, "--new-token"))

    new = row(tenant).secrets()["webhook_token"]
    assert new != old
    assert there(gateway).endswith(f"?token={new}")
    assert tokens(tenant) == [WebhookToken.digest_of(new)]
    assert new not in said


def an_odd_gateway(
    shows: dict[str, Any], meanwhile: Callable[[], object], before: dict[str, Any] | None = None
) -> Starlette:
    """Takes any URL, lets something happen, and shows this afterwards; `URL` in it is the one it took."""
    took: list[str] = []

    async def answer(request: Request) -> JSONResponse:
        if request.method == "POST":
            took.append((await request.json())["messageData"]["webhookUrl"])
            await run_in_threadpool(meanwhile)
            return JSONResponse({"error": False})
        now = shows if took else before or {}
        shown = {field: took[-1] if value == "URL" else value for field, value in now.items()}
        return JSONResponse({"error": False, **shown})

    return Starlette(routes=[Route("/rest/webhook/{path:path}", answer, methods=["GET", "POST"])])


@pytest.mark.parametrize(
    ("shows", "reason"),
    [
        ({"webhookUrl": "https://somebody.example", "webhookEnabled": True}, "shows another one"),
        ({"webhookUrl": "URL", "webhookEnabled": False}, "switched off"),
    ],
)
def test_a_gateway_that_did_not_do_it_is_not_believed(
    terminal: Terminal, tenant: Tenant, environment: pytest.MonkeyPatch, shows: dict[str, Any], reason: str
) -> None:
    with serve(an_odd_gateway(shows, meanwhile=lambda: None)) as host:
        terminal(*create(tenant, host=host))
        before = row(tenant).secrets()

        assert reason in terminal.refused(*connect(tenant, "--new-token"))

    assert row(tenant).secrets() == before
    assert WebhookToken.digest_of(before["webhook_token"]) in tokens(tenant)


def test_what_cannot_be_read_back_ends_no_token(
    terminal: Terminal, tenant: Tenant, environment: pytest.MonkeyPatch
) -> None:
    with serve(an_odd_gateway({"settings": "as you wish"}, meanwhile=lambda: None)) as host:
        terminal(*create(tenant, host=host))
        old = row(tenant).secrets()["webhook_token"]

        assert "cannot be read" in terminal(*connect(tenant, "--new-token"))

    new = row(tenant).secrets()["webhook_token"]
    assert sorted(tokens(tenant)) == sorted(WebhookToken.digest_of(token) for token in (old, new))


def test_of_two_who_connect_at_once_the_one_who_lost_is_told(
    terminal: Terminal, tenant: Tenant, environment: pytest.MonkeyPatch
) -> None:
    def somebody_elses_ends() -> None:
        with factories.superuser() as connection:
            connection.execute("DELETE FROM webhook_token WHERE tenant_id = %s", [tenant.id])

    with serve(an_odd_gateway({"webhookUrl": "URL", "webhookEnabled": True}, somebody_elses_ends)) as host:
        terminal(*create(tenant, host=host))
        before = row(tenant).secrets()

        assert "connect it once more" in terminal.refused(*connect(tenant, "--new-token"))
        assert row(tenant).secrets() == before


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("http401", "`pombal channel token TENANT NAME`"),
        ("http404", "see host and instance_key"),
        ("html403", "says nothing about the token"),
        ("error_true", "(rejected)"),
        ("reset_before", "(unreachable)"),
        ("garbage", "(unreadable)"),
    ],
)
def test_what_a_gateway_refuses_is_said_in_plain_words(
    terminal: Terminal, tenant: Tenant, gateway: str, fault: str, reason: str
) -> None:
    terminal(*create(tenant, host=gateway))
    client.mega_faults(gateway, fault, place="webhook")

    said = terminal.refused(*connect(tenant))

    assert reason in said
    secrets = row(tenant).secrets()
    for secret in (*secrets.values(), KEY, gateway):
        assert secret not in said


def test_a_host_that_is_not_public_is_not_asked(
    terminal: Terminal, tenant: Tenant, gateway: str, environment: pytest.MonkeyPatch
) -> None:
    terminal(*create(tenant, host=gateway))
    environment.setenv("MEDIA_ALLOWED_NETWORKS", "10.0.0.0/8")
    settings.cache_clear()

    said = terminal.refused(*connect(tenant))

    assert "(blocked_address): hosts must be public" in said
    assert client.mega_calls(gateway)["calls"] == []


@pytest.mark.parametrize(
    "url",
    ["", "pombal.example", "ftp://pombal.example", "https://", "https://a@b.example", "https://b.example/?token=x",
     "https://b.example#x", "https://b.example:port", "https://b example"],
)  # fmt: skip
def test_our_own_address_must_be_one(terminal: Terminal, tenant: Tenant, url: str) -> None:
    terminal(*create(tenant))

    assert terminal.refused(*connect(tenant, url=url)).startswith("--url must be ")


def test_a_token_travels_by_https_in_production(
    terminal: Terminal, tenant: Tenant, gateway: str, environment: pytest.MonkeyPatch
) -> None:
    terminal(*create(tenant, host=gateway))
    environment.setenv("POMBAL_MODE", "production")
    settings.cache_clear()

    assert "must be https" in terminal.refused(*connect(tenant, url="http://pombal.example"))
    terminal(*connect(tenant, url="http://127.0.0.1:8000"))
    assert there(gateway).startswith("http://127.0.0.1:8000/api/webhooks/")


# ---------------------------------------------------------------------------------------------------------- sessions


def test_a_session_is_logged_out_and_paired_again(
    terminal: Terminal, tenant: Tenant, gateway: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal(*create(tenant, host=gateway))
    picture = tmp_path / "qr.png"
    code = ("channel", "qr", tenant.slug, "sales", "--out", str(picture))

    assert terminal.refused(*code) == "a phone is logged in already: there is no code to scan"
    assert terminal.refused("channel", "logout", tenant.slug, "sales") == "say --yes to log it out"
    (instance,) = client.mega_instances(gateway)["instances"]
    assert instance["status"] == "connected"

    assert "logged out" in terminal("channel", "logout", tenant.slug, "sales", "--yes")
    (instance,) = client.mega_instances(gateway)["instances"]
    assert instance["status"] != "connected"
    assert checks_asked() == [str(row(tenant).id)]

    assert str(picture) in terminal(*code)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert stat.S_IMODE(picture.stat().st_mode) == 0o600
    assert "cannot be written" in terminal.refused(*code[:-1], str(tmp_path / "nowhere" / "qr.png"))


def test_a_picture_replaces_what_is_there_and_follows_no_link(
    terminal: Terminal, tenant: Tenant, gateway: str, tmp_path: Path
) -> None:
    terminal(*create(tenant, host=gateway))
    terminal("channel", "logout", tenant.slug, "sales", "--yes")
    old, link, elsewhere = tmp_path / "qr.png", tmp_path / "link.png", tmp_path / "elsewhere"
    old.write_text("an older one")
    old.chmod(0o644)
    elsewhere.write_text("somebody's")
    link.symlink_to(elsewhere)

    def qr(file: Path) -> tuple[str, ...]:
        return "channel", "qr", tenant.slug, "sales", "--out", str(file)

    terminal(*qr(old))
    assert "cannot be written: it is a link" in terminal.refused(*qr(link))

    assert old.read_bytes().startswith(b"\x89PNG")
    assert stat.S_IMODE(old.stat().st_mode) == 0o600
    assert (link.is_symlink(), elsewhere.read_text()) == (True, "somebody's")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["elsewhere", "link.png", "qr.png"]


def test_a_gateway_is_asked_again_although_it_was_asked_just_now(
    terminal: Terminal, tenant: Tenant, gateway: str
) -> None:
    terminal(*create(tenant, host=gateway))
    ask_soon(tenant.id, row(tenant).id)  # as a webhook does that tells of a connection
    check()
    assert row(tenant).status == "connected"

    terminal("channel", "logout", tenant.slug, "sales", "--yes")
    check()

    assert row(tenant).status == "disconnected"


def test_a_restart_keeps_the_pairing(terminal: Terminal, tenant: Tenant, gateway: str) -> None:
    terminal(*create(tenant, host=gateway))

    terminal("channel", "restart", tenant.slug, "sales")

    (instance,) = client.mega_instances(gateway)["instances"]
    assert (instance["status"], instance["paired"]) == ("connected", True)
    assert checks_asked() == [str(row(tenant).id)]


def test_what_is_on_no_gateway_is_said_so(terminal: Terminal, tenant: Tenant) -> None:
    terminal("channel", "create", tenant.slug, "stub", "--name", "sales", "--config", "{}")

    for words in (("connect", "--url", OURS), ("restart",), ("logout", "--yes"), ("qr",)):
        word, *more = words
        said = terminal.refused("channel", word, tenant.slug, "sales", *more)
        assert said == "a channel of kind stub is on no gateway"


# ---------------------------------------------------------------------------------------------- tokens and settings


def test_a_new_token_is_used_for_the_next_call(
    terminal: Terminal, tenant: Tenant, gateway: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal(*create(tenant, host=gateway, token="mistyped-token"))
    webhook_token = row(tenant).secrets()["webhook_token"]
    assert "(refused)" in terminal.refused(*connect(tenant))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TOKEN}\n"))

    terminal("channel", "token", tenant.slug, "sales")

    assert row(tenant).secrets() == {"token": TOKEN, "webhook_token": webhook_token}
    assert checks_asked() == [str(row(tenant).id)]
    terminal(*connect(tenant))


def test_a_new_token_waits_for_who_writes_a_status_and_keeps_nobody_waiting(
    terminal: Terminal, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal(*create(tenant))
    channel = row(tenant)
    with db.session([tenant.id]) as s:
        Lane.ensure(s, tenant.id, channel.id)
        Lane.set_hold(s, channel.id, Hold.AUTH, code="unauthorized", reason="not taken")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TOKEN}\n"))

    with db.session([tenant.id]) as s:
        said = {"asked_at": s.scalar(select(func.clock_timestamp())), "status": "connected", "raw": "connected"}
        names = {"tenant_id": tenant.id, "id": channel.id, "reason": None, "own_id": None}
        standing.heard(s, [said | names])
        finished = in_background(lambda: terminal("channel", "token", tenant.slug, "sales"))
        until_somebody_waits_for_a_lock()
        Lane.lock(s, [channel.id])  # as whoever writes a status does next
    assert "sealed; sending is tried" in finished()


def test_settings_are_those_of_a_channels_kind(terminal: Terminal, tenant: Tenant) -> None:
    terminal(*create(tenant, silent_after_hours=1))
    shop = factories.a_shop()

    def change(where: Tenant, name: str, config: str) -> tuple[str, ...]:
        return "channel", "set", where.slug, name, "--config", config

    terminal(*change(tenant, "sales", '{"silent_after_hours": null, "token_kind": "host", "on_unknown": "once_more"}'))
    said = terminal.refused(*change(shop.tenant, shop.channel.name, '{"silent_after_hours": 1}'))

    assert said.startswith("--config: silent_after_hours is not known here")
    expected = {"host": "https://mega.example", "instance_key": KEY, "token_kind": "host", "on_unknown": "once_more"}
    assert row(tenant).config == expected
    assert terminal.refused(*change(tenant, "sales", '{"host": "x"}')).startswith("--config: host is not known here")


# ------------------------------------------------------------------------------------------------------------ doctor


def test_a_host_that_cannot_be_used_is_found(servers: Servers) -> None:
    found = doctor({**servers.env, "MEGA_API_HOST": "https://mega.example/rest"}, code=1)

    assert found["error"] == ["MEGA_API_HOST: the host must be given alone, without a path"]
    weak = doctor({**servers.env, "POMBAL_MODE": "production", "CRON_SECRET": "short"}, code=1)
    assert weak["error"] == ["CRON_SECRET is shorter than 32 characters"]


def test_two_channels_of_one_instance_are_found(terminal: Terminal, tenant: Tenant) -> None:
    other, key = factories.a_tenant(), f"megastart-{uuid4().hex}"
    for one in (tenant, other):
        terminal(*create(one, instance_key=key))

    findings = terminal.json("doctor")

    names = " and ".join(sorted(f"{one.slug}/sales" for one in (tenant, other)))
    told = [found["what"] for found in findings if found["what"].startswith("one instance, several channels")]
    assert any(all(name in what for name in names.split(" and ")) for what in told)


def test_an_instance_of_the_environments_host_is_found_to_be_the_same(
    terminal: Terminal, tenant: Tenant, environment: pytest.MonkeyPatch
) -> None:
    other, key = factories.a_tenant(), f"megastart-{uuid4().hex}"
    environment.setenv("MEGA_API_HOST", "MEGA.example:443")
    environment.setenv("MEGA_API_TOKEN", HOST_TOKEN)
    settings.cache_clear()
    terminal(*create(tenant, instance_key=key, host="mega.example"))
    terminal(*create(other, instance_key=key, host=None, token=None))

    told = [found["what"] for found in terminal.json("doctor") if found["what"].startswith("one instance, several")]

    assert any(f"{tenant.slug}/sales" in what and f"{other.slug}/sales" in what for what in told)


# ------------------------------------------------------------------------------------------------------- jobs by hand


def test_a_job_by_hand_reaches_what_up_may_reach(
    terminal: Terminal, tenant: Tenant, gateway: str, tmp_path: Path
) -> None:
    terminal(*create(tenant, host=gateway))

    by_hand(tmp_path, "status_check", str(row(tenant).id), MEDIA_ALLOWED_NETWORKS="127.0.0.1/32")

    assert (row(tenant).status, row(tenant).unknown_reason) == ("connected", None)


def test_a_stub_by_hand_is_as_fast_as_that_of_up(terminal: Terminal, tenant: Tenant, tmp_path: Path) -> None:
    terminal("channel", "create", tenant.slug, "stub", "--name", "sales", "--config", "{}")
    with db.session([tenant.id]) as s:
        WaSession.start(s, tenant.id, row(tenant).id, is_connected=False)

    by_hand(tmp_path, "channel_session", str(tenant.id), str(row(tenant).id), WHATSAPP_STUB_FAST="1")

    assert row(tenant).status == "connected"


def by_hand(folder: Path, actor: str, *arguments: str, **more: str) -> str:
    """What `pombal run` prints in a terminal that knows nothing but the folder of `up`."""
    names = ("DATABASE_URL", "DATABASE_OWNER_URL", "REDIS_URL", "POMBAL_SECRET_KEYS", "POMBAL_MODE")
    written = {name: os.environ[name] for name in names} | more
    (folder / "env").write_text("".join(f"{name}={value}\n" for name, value in written.items()))
    bare = dict.fromkeys(written, "") | {"POMBAL_DATA": str(folder)}
    return output("-m", "pombal", "run", actor, json.dumps(arguments), env=bare)


# ---------------------------------------------------------------------------------------------------------------- up


@pytest.mark.skipif(not LINUX, reason="processes are found through /proc")
def test_up_has_a_gateway_that_delivers_and_is_sent_through(tmp_path: Path) -> None:
    with Fleet(tmp_path / "up").start() as fleet:
        block = fleet.output.partition("try, in a second terminal in this folder:\n\n")[2].split("\n\n")[2]
        curl, status = re.findall(r"^  \S.*(?:\n    .*)*", block, re.MULTILINE)
        tenant = fleet.demo["tenants"][0]
        gateway = next(one for one in tenant["channels"] if one["kind"] == "megaapi")

        def arrived() -> int:
            return fleet.count("SELECT count(*) FROM message WHERE channel_id = %s AND direction = 'in'", gateway["id"])

        words = shlex.split(curl.replace("\\\n", " "))
        headers = dict(words[n + 1].split(": ", 1) for n, word in enumerate(words) if word == "-H")
        answer = httpx.post(words[2], content=words[words.index("-d") + 1], headers=headers, trust_env=False)
        assert (answer.status_code, answer.text) == (200, "EVENT_RECEIVED")
        until(lambda: arrived() == 1, "what the printed command delivers arrives")
        client.mega_say(fleet.demo["sandbox"]["megaapi"], gateway["name"], "Olá")
        until(lambda: arrived() == 2, "what the simulated gateway delivers arrives")
        assert gateway["name"] in fleet.shell(status)
        queued = {name: send(fleet, channel=name) for name in (None, "demo-megaapi")}
        until(lambda: {state(fleet, id_) for id_ in queued.values()} == {"read"}, "both are sent, and read")
        assert channel_of(fleet, queued[None]) == tenant["channels"][0]["id"]
        assert channel_of(fleet, queued["demo-megaapi"]) == gateway["id"]

        # As a folder is left by a version that knew no gateways.
        fleet.rows("DELETE FROM message WHERE channel_id = %s RETURNING 1", gateway["id"])
        fleet.rows("DELETE FROM channel WHERE kind <> 'meta' RETURNING 1")
        fleet.rows("UPDATE channel SET config = config - 'default' RETURNING 1")
        fleet.stop()
        demo = fleet.demo
        del demo["tenants"][0]["channels"][1:]
        (fleet.data / "demo.json").write_text(json.dumps(demo))

    with Fleet(tmp_path / "up", "--procs", "web", WHATSAPP_STUB_FAST="1").start() as fleet:
        assert "WHATSAPP_STUB_FAST=1\n" in (fleet.data / "env").read_text()
        now = fleet.demo["tenants"][0]
        assert [one["name"] for one in now["channels"]] == ["demo-meta", "demo-megaapi", "demo-baileys", "demo-stub"]
        assert (now["api_key"], now["channels"][0]["id"]) == (tenant["api_key"], tenant["channels"][0]["id"])
        assert channel_of(fleet, send(fleet, channel=None)) == tenant["channels"][0]["id"]
        fleet.stop()


def send(fleet: Fleet, *, channel: str | None) -> str:
    """The id of a text that was queued."""
    body = {"to": "+5511944440001", "type": "text", "text": "Oi, Bia"} | ({"channel": channel} if channel else {})
    bearer = {"Authorization": f"Bearer {fleet.demo['tenants'][0]['api_key']}"}
    answer = httpx.post(f"{fleet.url}/api/v1/messages", json=body, headers=bearer, trust_env=False)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["message_id"])


def state(fleet: Fleet, id_: str) -> str:
    return str(fleet.rows("SELECT status FROM message WHERE id = %s", id_)[0][0])


def channel_of(fleet: Fleet, id_: str) -> str:
    return str(fleet.rows("SELECT channel_id FROM message WHERE id = %s", id_)[0][0])
