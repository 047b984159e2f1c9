"""What an operator types about channels on Baileys gateways: made, connected to us, changed, asked, looked after."""

import contextlib
import io
import os
import re
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from sqlalchemy import select
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from models import Channel, ChannelKind, LogPosition, Tenant, WebhookToken
from pombal.cli import doctor_baileys, main
from pombal.settings import settings
from providers.baileys_dialects import DIALECTS
from tests import factories
from tests.pombal.test_cli import Terminal
from tests.providers import gateway_logs as logs
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
    """An Evolution of one session, as far as an operator's commands go; or a WAHA of two."""

    def __init__(self) -> None:
        self.url = ""
        self.hook: dict[str, Any] | None = None
        self.state = "open"
        self.is_well = True
        self.asked: list[str] = []

    async def answer(self, request: Request) -> JSONResponse:
        if KEY not in (request.headers.get("apikey"), request.headers.get("x-api-key")):
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
        if path == "/api/sessions":
            return JSONResponse([{"name": name, "status": "WORKING"} for name in ("shop", "other")])
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
        *[
            ({"gateway": "fazer", "session": one}, "session: of this gateway the session is its phone number: + and")
            for one in ("shop", "+55 11 95555", "++5511955550300", "+")
        ],
        ({"api_key": "se cret"}, "api_key has a blank in it"),
        ({"paths": {"destroy": "GET /x"}}, "no call of a gateway is named 'destroy'"),
        ({"paths": {"stop": "PUT /all/sessions"}}, "the path of stop must have {session} in it"),
        ({"paths": {"stop": "PUT /whatsappsession/{session}"}}, "PUT /whatsappsession/{session} ends the pairing"),
        ({"paths": {"state": "GET /../{session}"}}, "the path of state may have plain words"),
        ({"may_drop_keys": True}, "may_drop_keys goes with auth"),
        ({"may_restore_creds": 1}, "--config: may_restore_creds must be true or false"),
        ({"observe_seconds": 1}, "--config: observe_seconds must be a number from 10 to 3600"),
        ({"cool_down_seconds": -1}, "--config: cool_down_seconds must be a number from 0 to 86400"),
        *[
            ({"log_name": one}, "log_name must be what log lines call the session")
            for one in ("", "a b", "x" * 65, "\n")
        ],
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

    assert [change(log_name=one, cool_down_seconds=60).get("log_name") for one in ("+5511955550300", None)] == [
        "+5511955550300",
        None,
    ]
    assert change()["cool_down_seconds"] == 60
    assert "cool_down_seconds" not in change(cool_down_seconds=None)
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


@pytest.mark.parametrize(
    ("dialect", "told", "untold"),
    [
        ("whaticket", "messages.upsert, messages.update and connection.update", "session.status"),
        ("ticketz", "messages.upsert, messages.update and connection.update", "session.status"),
        ("waha", "message, message.any, message.ack and session.status", "messages.upsert"),
    ],
)
def test_an_operator_is_told_the_events_of_the_gateways_own_dialect(
    terminal: Terminal, tenant: Tenant, dialect: str, told: str, untold: str
) -> None:
    created = terminal(*create(tenant, gateway=dialect))

    for said in (created, terminal(*connect(tenant))):
        assert told in said
        assert untold not in said


@pytest.mark.parametrize(("dialect", "instance"), [("whaticket", None), ("ticketz", None), ("evolution", "shop")])
def test_a_token_is_bound_to_a_session_where_webhooks_call_it_by_the_same_name(
    terminal: Terminal, tenant: Tenant, gateway: Gateway, dialect: str, instance: str | None
) -> None:
    terminal(*create(tenant, gateway=dialect, host=gateway.url))
    terminal(*connect(tenant, "--new-token"))

    with factories.seen_by(tenant) as s:
        found = list(s.scalars(select(WebhookToken).where(WebhookToken.tenant_id == tenant.id)))
    assert {(one.channel_id, one.instance) for one in found} == {(row(tenant).id, instance)}
    assert WebhookToken.digest_of(row(tenant).secrets()["webhook_token"]) in {one.digest for one in found}


def test_the_gateway_is_asked_how_its_sessions_stand_once_for_all_of_them(
    terminal: Terminal, tenant: Tenant, gateway: Gateway
) -> None:
    for name in ("shop", "other", "gone"):
        terminal(*create(tenant, name, gateway="waha", host=gateway.url, session=name))

    found = terminal.json("channel", "status", tenant.slug, "--check")

    assert {one["channel"]: (one["now"], one["now_reason"]) for one in found} == {
        "shop": ("connected", None),
        "other": ("connected", None),
        "gone": ("unknown", "not_listed"),
    }
    assert gateway.asked == ["GET /api/sessions"]


def test_each_session_of_evolution_is_asked_about_since_its_list_is_behind(
    terminal: Terminal, tenant: Tenant, gateway: Gateway
) -> None:
    for name in ("shop", "other"):
        terminal(*create(tenant, name, host=gateway.url, session=name))

    found = terminal.json("channel", "status", tenant.slug, "--check")

    assert [(one["now"], one["now_raw"]) for one in found] == [("connected", "open")] * 2
    assert sorted(gateway.asked) == [f"GET /instance/connectionState/{name}" for name in ("other", "shop")]


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


def test_the_doctor_says_where_lines_of_a_log_could_not_be_told_to_be_of_a_session(
    terminal: Terminal, tenant: Tenant
) -> None:
    def named() -> list[str]:
        known = [one for one in doctor_baileys._channels()[0] if one.name.startswith(f"{tenant.slug}/")]
        return [f"{one.level} {one.what}" for one in doctor_baileys._names_in_logs(known)]

    terminal(*create(tenant, "by-id", gateway="whaticket", session="26"))
    terminal(*create(tenant, "elsewhere", gateway="evolution", session="loja"))
    terminal(*create(tenant, gateway="whaticket"))

    (one,) = named()
    assert one.startswith("note a session is called by its name")
    assert one.endswith(f": {tenant.slug}/shop")
    terminal("channel", "set", tenant.slug, "shop", "--config", '{"log_name": "26"}')
    assert named() == []


def test_the_doctor_says_which_logs_nobody_reads(terminal: Terminal) -> None:
    """Of what was followed within the last day: silence and a follower that is dead look alike elsewhere."""

    def said() -> list[str]:
        return [f"{one.level} {one.what}" for one in doctor_baileys._logs()]

    logs = {"/log/read": (0, 0), "/log/dead": (2, 2), "/log/behind": (0, 90), "/log/removed": (1500, 1500)}
    with factories.superuser() as connection:
        connection.execute("DELETE FROM log_position")
        for path, ago in logs.items():
            connection.execute(
                'INSERT INTO log_position (path, inode, head, "offset", updated_at, read_until)'
                " SELECT %s, 1, '', 7, now() - %s * interval '1 minute', now() - %s * interval '1 minute'",
                [LogPosition.key("n", "whatsappId", "", "", path), *ago],
            )

    dead, behind = said()

    assert dead.startswith("warning no follower reads ")
    assert dead.endswith(": /log/dead")
    assert behind == "warning a follower is more than a minute behind: /log/behind"
    with factories.superuser() as connection:
        connection.execute("DELETE FROM log_position")
    assert said() == []


def test_the_doctor_says_where_the_log_of_repairs_cannot_be_written(
    tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    def said(path: Path) -> list[str]:
        environment.setenv("SESSION_LOG", str(path))
        settings.cache_clear()
        return [f"{one.level} {one.what}" for one in doctor_baileys._settings()]

    file = tmp_path / "sessions.log"
    assert said(file) == []
    assert not file.exists()
    file.touch()
    assert said(file) == []
    for path, wrong in (
        (tmp_path / "nowhere" / "sessions.log", "its folder does not exist"),
        (file / "sessions.log", "its folder does not exist"),
        (tmp_path, "no file that this user may write"),
    ):
        (one,) = said(path)
        assert one.startswith(f"warning SESSION_LOG, as seen from this host: {wrong}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_the_doctor_says_that_the_log_of_repairs_is_somebody_elses(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert doctor_baileys._unwritable(tmp_path / "sessions.log") == "its folder is none that this user may write"
    tmp_path.chmod(0o000)
    assert doctor_baileys._unwritable(tmp_path / "below" / "sessions.log") is not None
    tmp_path.chmod(0o700)


def test_the_doctor_does_not_wait_for_each_gateway_that_hangs(environment: pytest.MonkeyPatch) -> None:
    with hanging() as (url, connected):
        known = [
            doctor_baileys.Known(f"t/c{n}", uuid4(), {"gateway": "whaticket", "session": "26"}, {}, f"{url}/g{n}")
            for n in range(3 * doctor_baileys._AT_ONCE)
        ]
        for one in known:
            one.config["host"] = one.host
        environment.setattr(doctor_baileys, "_SECONDS", 0.5)

        found = [(one.level, one.what) for one in doctor_baileys._asked(known)]

        assert len(connected) <= doctor_baileys._AT_ONCE  # … and for the others there was no time left
    assert [level for level, _ in found] == ["warning"] * doctor_baileys._AT_ONCE + ["note"]
    assert all("no answer in time" in what for level, what in found if level == "warning")
    assert found[-1][1].startswith(f"{2 * doctor_baileys._AT_ONCE} Baileys gateways were not asked")


@contextlib.contextmanager
def hanging() -> Iterator[tuple[str, list[socket.socket]]]:
    """A server that never answers, and who has connected to it so far."""
    connected: list[socket.socket] = []

    def accept(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connected.append(listening.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, args=(listening,), daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", connected
        listening.shutdown(socket.SHUT_RDWR)
    for one in connected:
        one.close()


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


# ------------------------------------------------------------------------------------------------------------ its logs


def test_a_scan_tells_for_which_sessions_a_repair_would_begin(
    terminal: Terminal, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    """More than the threshold within a window, of those that did not arrive after all."""
    log = logs.Gateway(7)
    one, much, healed, spread = "26", "27", "28", "29"
    lines = failing(log, one, 5) + failing(log, much, 6)
    for n in range(6):
        contact = log.contact()
        event, failed = log.event(healed, contact, "ratchet")
        lines += failed
        if n == 0:
            lines += log.event(healed, contact, "duplicate", event.id)[1]
    for _ in range(6):
        log.at += timedelta(minutes=5)
        lines += failing(log, spread, 1)
    file = tmp_path / "gateway.log"
    file.write_text("".join(f"{text}\n" for line in lines for text in logs.as_json(line)))
    scan = ("session", "scan", str(file), "--attribute", "whatsappId")

    assert terminal.json(*scan)["over_threshold"] == [much]
    said = terminal(*scan)
    over = {words[0]: words[-1] for words in map(str.split, said.splitlines()) if words and words[0].isdecimal()}
    assert over == {one: "no", much: "yes", healed: "no", spread: "no"}
    assert "OVER 5" in said
    assert "healed: at least" in said

    environment.setenv("THRESHOLD_ERRORS", "6")
    settings.cache_clear()
    assert terminal.json(*scan)["over_threshold"] == []
    assert terminal.json("session", "scan", str(file), "--channel", "shop")["over_threshold"] == ["shop"]


def failing(log: logs.Gateway, session: str, times: int) -> list[Any]:
    return [line for _ in range(times) for line in log.event(session, log.contact(), "ratchet")[1]]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--tenant", "nope"), "--tenant: there is no tenant nope"),
        (("--gateway", "not a host"), "--gateway: the host must be plain ASCII without blanks"),
    ],
)
def test_a_follower_of_nobodys_sessions_is_refused(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], reason: str
) -> None:
    assert main(["session", "follow", "/no/such.log", *options]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"pombal: {reason}"
