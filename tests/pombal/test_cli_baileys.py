"""What an operator types about channels on Baileys gateways: made, connected to us, changed, asked, looked after."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import select
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from models import Channel, ChannelKind, Tenant, WebhookToken
from pombal.cli import doctor_baileys
from pombal.settings import settings
from providers.baileys_dialects import DIALECTS
from tests import factories
from tests.pombal.test_cli import Terminal
from tests.sandbox.servers import serve
from web import kinds

pytestmark = pytest.mark.usefixtures("queues")

KEY = "the-key-of-the-gateway"
OURS = "https://pombal.example"


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(capsys)


@pytest.fixture
def tenant() -> Tenant:
    return factories.a_tenant()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Whose changes are settings; gateways on this machine may be reached."""
    monkeypatch.setenv("MEDIA_ALLOWED_NETWORKS", "127.0.0.0/8")
    settings.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    settings.cache_clear()


class Gateway:
    """An Evolution of one session, as far as an operator's commands go."""

    def __init__(self) -> None:
        self.url = ""
        self.hook: dict[str, Any] | None = None
        self.state = "open"
        self.is_well = True
        self.asked: list[str] = []

    async def answer(self, request: Request) -> JSONResponse:
        if request.headers.get("apikey") != KEY:
            return JSONResponse({"status": 401, "error": "Unauthorized"}, 401)
        path = request.url.path
        self.asked.append(f"{request.method} {path}")
        if path == "/":
            return JSONResponse({"status": 200} if self.is_well else {"error": "down"}, 200 if self.is_well else 503)
        if path == "/webhook/set/shop":
            self.hook = (await request.json())["webhook"]
        if path.startswith("/webhook/"):
            return JSONResponse(self.hook)
        if path == "/instance/fetchInstances":
            return JSONResponse([{"name": name, "connectionStatus": self.state} for name in ("shop", "other")])
        return JSONResponse({"instance": {"instanceName": "shop", "state": self.state}})

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{path:path}", self.answer, methods=["GET", "POST", "DELETE"])])


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    its = Gateway()
    with serve(its.app()) as url:
        its.url = url
        yield its


def create(tenant: Tenant, name: str = "shop", **config: Any) -> tuple[str, ...]:
    given = {"gateway": "evolution", "host": "gateway.example", "session": "shop", "api_key": KEY, **config}
    given = {field: value for field, value in given.items() if value is not None}
    encoded = msgspec.json.encode(given).decode()
    return "channel", "create", tenant.slug, "baileys", "--name", name, "--config", encoded


def connect(tenant: Tenant, *more: str) -> tuple[str, ...]:
    return "channel", "connect", tenant.slug, "shop", "--url", OURS, *more


def row(tenant: Tenant, name: str = "shop") -> Channel:
    with factories.seen_by(tenant) as s:
        found: Channel = s.scalars(select(Channel).where(Channel.tenant_id == tenant.id, Channel.name == name)).one()
    return found


def tokens(tenant: Tenant) -> set[bytes]:
    with factories.seen_by(tenant) as s:
        return set(s.scalars(select(WebhookToken.digest).where(WebhookToken.tenant_id == tenant.id)))


# ------------------------------------------------------------------------------------------------------------- making


def test_a_channel_has_what_was_said_of_it_and_its_secrets_apart(terminal: Terminal, tenant: Tenant) -> None:
    auth = {"kind": "files", "folder": "/srv/gateway/sessions"}
    said = terminal(*create(tenant, may_drop_keys=True, auth=auth, observe_seconds=60, send_key="another-key"))

    found = row(tenant)
    webhook = re.search(r"webhook: (/api/webhooks/baileys/\S+)\?token=(\S+)", said)
    assert webhook
    assert webhook[1] == f"/api/webhooks/baileys/{found.id}"
    assert "shown once" in said
    assert (found.kind, found.config) == (
        "baileys",
        {
            "gateway": "evolution",
            "session": "shop",
            "host": "https://gateway.example",
            "auth": auth,
            "observe_seconds": 60,
            "may_drop_keys": True,
        },
    )
    assert found.secrets() == {"api_key": KEY, "send_key": "another-key", "webhook_token": webhook[2]}
    with factories.seen_by(tenant) as s:
        (token,) = s.scalars(select(WebhookToken).where(WebhookToken.tenant_id == tenant.id))
    assert (token.channel_id, token.instance) == (found.id, "shop")
    listed = terminal("channel", "list", tenant.slug)
    assert KEY not in listed
    assert webhook[2] not in listed


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"gateway": "wppconnect"}, "--config: gateway must be whaticket, ticketz, evolution, waha or fazer"),
        ({"gateway": None}, "--config: gateway is required"),
        ({"host": None}, "host is required: BACKEND_URL is not set"),
        ({"host": "https://me:secret@gateway.example"}, "the host must not have a user name"),
        *[({"session": one}, "session: the session may have letters") for one in ("../1", "1/2", "/etc", "a.b", "")],
        ({"api_key": "se cret"}, "api_key has a blank in it"),
        ({"paths": {"destroy": "GET /x"}}, "no call of a gateway is named 'destroy'"),
        ({"paths": {"stop": "PUT /all/sessions"}}, "the path of stop must have {session} in it"),
        ({"paths": {"stop": "PUT /whatsappsession/{session}"}}, "PUT /whatsappsession/{session} ends the pairing"),
        ({"paths": {"state": "GET /../{session}"}}, "the path of state may have plain words"),
        ({"may_drop_keys": True}, "may_drop_keys goes with auth"),
        ({"may_restore_creds": 1}, "--config: may_restore_creds must be true or false"),
        ({"observe_seconds": 1}, "--config: observe_seconds must be a number from 10 to 3600"),
        ({"auth": {"kind": "redis"}}, "--config: auth must be an object"),
        *[
            ({"auth": {"kind": "files", "folder": folder}}, "auth.folder must be an absolute path")
            for folder in ("", "sessions", "/", "/srv", "/srv/gateway/../..", "/srv/x\n/y")
        ],
        ({"auth": {"kind": "files", "folder": "/srv/gateway", "name": "../x"}}, "auth.name must be"),
        ({"auth": {"kind": "ticketz", "name": "3"}}, "auth.backups is required"),
        ({"auth": {"kind": "ticketz", "backups": "/srv/backups"}}, "auth.name must be the session's number"),
        ({"auth": {"kind": "ticketz", "backups": "/srv/backups", "name": "3"}}, "store_url is required"),
        ({"store_url": "http://secret@db"}, "store_url must be the address of the gateway's database"),
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


def test_a_session_is_one_channel_of_a_tenant_also_by_the_operators_host(
    terminal: Terminal, tenant: Tenant, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("BACKEND_URL", "http://gateway.example:8080/api/")
    settings.cache_clear()
    terminal(*create(tenant, host=None))

    assert "host" not in row(tenant).config  # it follows the environment
    said = terminal.refused(*create(tenant, "again", host="http://GATEWAY.example:8080/api"))
    assert said == "the channel shop has this session of this host already"
    terminal(*create(tenant, "other", session="26"))


def test_settings_are_changed_and_put_back(terminal: Terminal, tenant: Tenant) -> None:
    terminal(*create(tenant, gateway="whaticket", session="26"))

    def change(**config: Any) -> dict[str, Any]:
        encoded = msgspec.json.encode(config).decode()
        found: dict[str, Any] = terminal.json("channel", "set", tenant.slug, "shop", "--config", encoded)["config"]
        return found

    stop = {"stop": "PUT /sessions/{session}/close"}
    database = {"kind": "ticketz", "backups": "/srv/pombal/backups"}
    assert change(paths=stop, silent_after_hours=0)["paths"] == stop
    assert change(auth=database, store_url="postgresql://u:hidden@db/x", may_drop_keys=True)["auth"] == database
    assert row(tenant).secrets()["store_url"] == "postgresql://u:hidden@db/x"
    said = terminal.refused("channel", "set", tenant.slug, "shop", "--config", '{"store_url": null}')
    assert said.startswith("store_url is required")
    assert "auth" not in change(auth=None, store_url=None, may_drop_keys=None, paths=None)
    assert set(row(tenant).secrets()) == {"api_key", "webhook_token"}


def test_a_new_key_is_taken_from_standard_input(
    terminal: Terminal, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal(*create(tenant))
    monkeypatch.setattr("sys.stdin", io.StringIO("a-new-key-of-it\n"))

    terminal("channel", "token", tenant.slug, "shop")

    assert row(tenant).secrets()["api_key"] == "a-new-key-of-it"


# --------------------------------------------------------------------------------------------------------- connecting


def test_a_gateway_that_can_be_told_delivers_to_us_from_now_on(
    terminal: Terminal, tenant: Tenant, gateway: Gateway
) -> None:
    terminal(*create(tenant, host=gateway.url))
    token = row(tenant).secrets()["webhook_token"]

    first, second = terminal.json(*connect(tenant)), terminal.json(*connect(tenant, "--new-token"))

    path = f"{OURS}/api/webhooks/baileys/{row(tenant).id}?token="
    new = row(tenant).secrets()["webhook_token"]
    assert (first["before"], second["before"]) == ("nothing", "the same with another token")
    assert (first["read_back"], first["webhook"]) == (True, f"{path}…")
    assert gateway.hook is not None
    assert gateway.hook["url"] == f"{path}{new}"
    assert new != token
    assert tokens(tenant) == {WebhookToken.digest_of(new)}


def test_at_any_other_an_operator_is_told_what_to_enter(terminal: Terminal, tenant: Tenant) -> None:
    terminal(*create(tenant, gateway="whaticket"))
    old = row(tenant).secrets()["webhook_token"]
    path = f"{OURS}/api/webhooks/baileys/{row(tenant).id}?token="

    assert f"webhook: {path}{old}" in terminal(*connect(tenant))
    said = terminal(*connect(tenant, "--new-token"))
    new = row(tenant).secrets()["webhook_token"]
    assert f"webhook: {path}{new}" in said
    assert "messages.upsert" in said
    assert tokens(tenant) == {WebhookToken.digest_of(one) for one in (old, new)}  # nobody knows yet which is entered

    assert new in terminal(*connect(tenant))
    assert tokens(tenant) == {WebhookToken.digest_of(new)}


def test_the_gateway_is_asked_how_its_sessions_stand_once_for_all_of_them(
    terminal: Terminal, tenant: Tenant, gateway: Gateway
) -> None:
    terminal(*create(tenant, host=gateway.url))
    (one,) = terminal.json("channel", "status", tenant.slug, "--check")
    assert (one["now"], one["now_raw"]) == ("connected", "open")
    gateway.asked.clear()
    for name in ("other", "gone"):
        terminal(*create(tenant, name, host=gateway.url, session=name))

    found = terminal.json("channel", "status", tenant.slug, "--check")

    assert {one["channel"]: (one["now"], one["now_reason"]) for one in found} == {
        "shop": ("connected", None),
        "other": ("connected", None),
        "gone": ("unknown", "not_listed"),
    }
    assert gateway.asked == ["GET /instance/fetchInstances"]


def test_a_session_is_restarted_at_its_gateway(terminal: Terminal, tenant: Tenant, gateway: Gateway) -> None:
    terminal(*create(tenant, host=gateway.url))

    terminal("channel", "restart", tenant.slug, "shop")

    assert gateway.asked == ["POST /instance/restart/shop"]


# -------------------------------------------------------------------------------------------------------- looking after


def findings() -> list[str]:
    """Of all tenants, those of other tests too."""
    return [f"{one.level} {one.what}" for one in doctor_baileys.findings()]


def test_the_doctor_looks_at_gateways_hooks_and_keys(
    terminal: Terminal, tenant: Tenant, gateway: Gateway, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    auth = {"kind": "files", "folder": str(tmp_path / "sessions")}
    terminal(*create(tenant, host=gateway.url, auth=auth))
    shop = f"{tenant.slug}/shop"

    found = findings()
    assert any(one.startswith("warning events do not come here") and f"{shop} (nowhere)" in one for one in found)
    assert any(one.startswith(f"warning the keys of {shop}, as seen from this host: ") for one in found)
    assert any(one.startswith("ok sessions of ") for one in found)

    (tmp_path / "sessions" / "shop").mkdir(parents=True)
    (tmp_path / "sessions" / "shop" / "creds.json").write_text("{}")
    terminal(*connect(tenant))
    environment.setenv("POMBAL_SESSION_FIXER", "off")
    settings.cache_clear()
    found = findings()
    assert not any(shop in one for one in found)
    assert any(one.startswith("warning POMBAL_SESSION_FIXER is off") for one in found)

    gateway.is_well = False
    terminal(*create(factories.a_tenant(), host=gateway.url))
    found = findings()
    assert any(one.startswith("warning a gateway is not well: ") and shop in one for one in found)
    assert any(one.startswith("warning one session of a Baileys gateway, several channels") for one in found)


# ----------------------------------------------------------------------------------------------- what a channel takes


def test_what_a_channel_takes_is_what_its_dialect_has_calls_for() -> None:
    for name, dialect in DIALECTS.items():
        takes = kinds.kind_of(ChannelKind.BAILEYS, name)
        assert takes is not None
        said = (set(dialect.types), set(dialect.replies), set(dialect.recipients))
        assert (set(takes.types), set(takes.replies), set(takes.recipients)) == said, name
        assert (takes.takes_links, takes.takes_captions) == (dialect.takes_links, dialect.takes_captions), name
        assert takes.is_gateway
    assert kinds.kind_of(ChannelKind.BAILEYS) is None
