"""`pombal up`: the whole fleet on this machine, for a look, for development, for trying to break it.

Embedded servers unless `DATABASE_URL` or `REDIS_URL` are set, migrations, a demo tenant, then sandbox, web, worker and
clock under a supervisor. `DATA/demo.json` tells scripts all they need; `DATA/env` lets a second terminal join in.
"""

import hashlib
import hmac
import os
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

import msgspec

from pombal import garbage
from pombal.cli import default_data, say
from pombal.cli.fleet import queues, upgrade
from pombal.errors import Misconfigured, PombalError
from pombal.ids import uuid7
from pombal.local import Lock, Server, ensure_roles_and_database, read_env, start_postgres, start_valkey, write_env
from pombal.secrets import new_fernet_key, new_token
from pombal.settings import settings
from pombal.supervisor import Command, Supervisor

if TYPE_CHECKING:
    from models import Channel, Tenant

_PROCESSES = ("sandbox", "web", "worker", "media", "upkeep", "sessions", "fixer", "sip", "follower", "clock")
# Queues with a process of their own.
_APART = ("download_media", "status_sync", "channel_session", "session_fixer", "sip_refresh")
_SANDBOX_PORT = 9010
_SIP_PORT = 5070
_PERSON = "5511944440001"
_GATEWAYS_NUMBER = "5511955550200"
_BAILEYS_NUMBER = "5511955550300"
_BAILEYS_GATEWAY = "demo"  # its name at the sandbox
_REFRESH = {"refresh_contact": "POST /whatsapp/{session}/refresh/{jid}"}  # what no fork has: the simulated one
_LOOPBACK = "127.0.0.1/32"
_SIP_USER = "5511955550400"
# What the simulated Meta has approved of the demo channel, and what it has not.
_TEMPLATES = [
    {"name": name, "language": language, "status": status, "category": category}
    for name, language, status, category in (
        ("order_update", "pt_BR", "APPROVED", "UTILITY"),
        ("order_update", "en_US", "APPROVED", "UTILITY"),
        ("welcome", "pt_BR", "APPROVED", "MARKETING"),
        ("summer_sale", "pt_BR", "REJECTED", "MARKETING"),
        ("delivery_delay", "pt_BR", "PAUSED", "UTILITY"),
    )
]


def up(given: Namespace) -> int:
    began = time.monotonic()
    wanted = tuple(given.procs.split(",")) if given.procs else _PROCESSES
    unknown = sorted(set(wanted) - set(_PROCESSES))
    if unknown:
        raise Misconfigured(f"--procs: there is no {unknown[0]}; there are {', '.join(_PROCESSES)}")
    if given.no_sandbox:
        wanted = tuple(name for name in wanted if name != "sandbox")
    data = Path(given.data or default_data()).resolve()
    _require_free_port(given.port, "--port")
    if given.sandbox_port:
        _require_free_port(given.sandbox_port, "--sandbox-port")
    if given.sip_port:
        _require_free_port(given.sip_port, "--sip-port")
    ending = _Ending().installed()
    with ExitStack() as running:
        data.mkdir(parents=True, exist_ok=True)
        running.enter_context(closing(Lock(data / "up.lock")))
        if given.reset:
            _wipe(data)
        servers = _start_servers(running, given, data)
        with _step("migrations"):
            upgrade()
        sandbox_port = given.sandbox_port or _free_port(_SANDBOX_PORT)
        sip_port = given.sip_port or _free_sip_port(_SIP_PORT)
        if not given.no_sandbox:
            _send_to_sandbox(data, f"http://127.0.0.1:{sandbox_port}")
        with _step("demo tenant"):
            demo = _seed(data, given.port, sandbox_port, sip_port)
        supervisor = Supervisor(_commands(wanted, data, given.port, sandbox_port, sip_port), data=data)
        running.enter_context(_kept_alive(servers, supervisor))
        threading.Thread(
            target=_welcome, args=(supervisor, demo, wanted, given.port, began, data), name="welcome", daemon=True
        ).start()
        ending.supervisor = supervisor
        garbage.settled()
        code = supervisor.run()
        say("pombal: stopping the servers")
    return code


class _Ending:
    """What a stop signal does where the supervisor does not take it: end the start once, never interrupt the ending.

    Hosts signal a whole group, and more than once; the lines after the supervisor's must run all the same.
    """

    def __init__(self) -> None:
        self.supervisor: Supervisor | None = None
        self._begun = False

    def installed(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self)
        return self

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.supervisor:
            self.supervisor.stop()  # about to run, or through: then nobody asks any more
        elif not self._begun:
            self._begun = True
            raise KeyboardInterrupt


# What `up` makes in its folder, apart from its lock: the folder may hold other things, or be somebody's home.
_MADE = (
    *("pg[0-9][0-9]", "pg[0-9][0-9].new", "valkey", "media", "wiped-*"),
    *("gateway", "gateway.log", "gateway.log.1"),
    *("postgres.log", "postgres.sockets", "valkey.log", "valkey.sockets"),
    *("env", "secret-keys", "demo.json", "sandbox.json", "pids.json"),
)


def _wipe(data: Path) -> None:
    """Delete what earlier runs made. We hold the lock, so that nobody is using it."""
    for path in [path for pattern in _MADE for path in data.glob(pattern)]:
        if path.is_dir() and not path.is_symlink():
            # A server of a killed run may still be ending: it goes on in there, and cannot spoil what is made next.
            doomed = path.rename(data / f"wiped-{uuid7().hex}")
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            path.unlink()


def _start_servers(running: ExitStack, given: Namespace, data: Path) -> list[Server]:
    """Start what no address is given for, and put everything the fleet needs to know into the environment."""
    servers: list[Server] = []
    os.environ |= {"POMBAL_DATA": str(data), "POMBAL_MODE": "development"}
    os.environ.setdefault("LOG_FORMAT", "console")
    os.environ.setdefault("POMBAL_SECRET_KEYS", _secret_keys(data))
    if not os.environ.get("DATABASE_URL"):
        with _step("PostgreSQL"):
            postgres = running.enter_context(start_postgres(data, port=given.pg_port))
            app_url, owner_url = ensure_roles_and_database(postgres)
        os.environ |= {"DATABASE_URL": app_url, "DATABASE_OWNER_URL": owner_url}
        servers.append(postgres)
    if not os.environ.get("REDIS_URL"):
        with _step("Valkey"):
            valkey = running.enter_context(start_valkey(data, port=given.redis_port))
        os.environ["REDIS_URL"] = valkey.url
        servers.append(valkey)
    settings.cache_clear()
    return servers


def _send_to_sandbox(data: Path, url: str) -> None:
    """Let messages be sent to the simulated Meta, and a gateway and a registrar on this machine be reached, unless told
    otherwise."""
    near = {"MEDIA_ALLOWED_NETWORKS": _LOOPBACK, "SIP_ALLOWED_NETWORKS": "127.0.0.0/8"}
    for name, value in {"WHATSAPP_GRAPH_URL": url, **near}.items():
        if os.environ.get(name, "") in ("", read_env(data).get(name)):  # a shell may export what an earlier start wrote
            os.environ[name] = value
            settings.cache_clear()


def _secret_keys(data: Path) -> str:
    """Made once, kept beside the data that it opens."""
    file = data / "secret-keys"
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(new_fernet_key())
    return file.read_text().strip()


def _seed(data: Path, port: int, sandbox_port: int, sip_port: int) -> dict[str, Any]:
    """A demo tenant with a channel of each kind and a SIP account, `demo.json`, the sandbox's part. Safe to repeat."""
    base_url, sandbox_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{sandbox_port}"
    file = data / "demo.json"
    demo: dict[str, Any] = msgspec.json.decode(file.read_bytes()) if file.exists() else {}
    demo = _demo_tenant(demo, sandbox_url, data, sip_port)
    given = settings()
    demo |= {
        "base_url": base_url,
        "database_url": given.require_database(),
        "redis_url": given.require_redis(),
        "sandbox": {
            **dict.fromkeys(("meta", "megaapi", "baileys"), sandbox_url),
            "sip": f"127.0.0.1:{sip_port}",
        },
    }
    _write(file, demo)
    (data / "gateway.log").touch(mode=0o600)  # followed from now on
    _write(data / "sandbox.json", _played(demo, base_url, data))
    extra = {
        "POMBAL_SECRET_KEYS": given.secret_keys,
        "POMBAL_MODE": given.mode,
        "POMBAL_SANDBOX_URL": sandbox_url,
        "LOG_FORMAT": "console",
    }
    if os.environ.get("WHATSAPP_GRAPH_URL"):
        extra["WHATSAPP_GRAPH_URL"] = given.whatsapp_graph_url
    if given.media_allowed_networks:
        extra["MEDIA_ALLOWED_NETWORKS"] = given.media_allowed_networks
    if given.sip_allowed_networks:
        extra["SIP_ALLOWED_NETWORKS"] = given.sip_allowed_networks
    if given.whatsapp_stub_fast:
        extra["WHATSAPP_STUB_FAST"] = "1"
    write_env(data, given.require_database(), given.require_database_owner(), given.require_redis(), extra)
    return demo


def _played(demo: dict[str, Any], base_url: str, data: Path) -> dict[str, Any]:
    """What the sandbox is to play: the provider of each channel that `demo.json` knows."""
    channels = [(tenant, channel) for tenant in demo["tenants"] for channel in tenant["channels"]]
    names = ("name", "phone_number_id", "waba_id", "access_token")
    apps = [
        {
            "url": f"{base_url}/webhooks/whatsapp",
            "app_secret": channel["app_secret"],
            "verify_token": channel["verify_token"],
            "channels": [{name: channel[name] for name in names} | {"templates": _TEMPLATES}],
        }
        for _, channel in channels
        if channel["kind"] == "meta"
    ]
    instances = [
        {
            **{name: channel[name] for name in ("name", "instance_key", "token")},
            "status": "connected",
            "number": _GATEWAYS_NUMBER,
            "webhook_url": f"{base_url}/api/webhooks/whatsapp/{tenant['slug']}?token={channel['webhook_token']}",
        }
        for tenant, channel in channels
        if channel["kind"] == "megaapi"
    ]
    sessions = [
        {
            "session": channel["session"],
            "name": channel["name"],
            "number": _BAILEYS_NUMBER,
            "webhook_url": f"{base_url}/api/webhooks/baileys/{channel['id']}?token={channel['webhook_token']}",
        }
        for _, channel in channels
        if channel["kind"] == "baileys"
    ]
    gateways = [
        {
            "name": _BAILEYS_GATEWAY,
            "dialect": "whaticket",
            "api_key": next(channel["api_key"] for _, channel in channels if channel["kind"] == "baileys"),
            "root": str(data / "gateway" / _BAILEYS_GATEWAY),
            "log": str(data / "gateway.log"),
            "session_field": "whatsappId",
            "paths": _REFRESH,
            "sessions": sessions,
        }
    ]
    megaapi = {"host_token": None, "instances": instances}
    users = [
        {"name": account["username"], "password": account["password"]}
        for tenant in demo["tenants"]
        for account in tenant["sip"]
    ]
    return {"apps": apps, "megaapi": megaapi, "baileys": {"gateways": gateways}, "sip": {"users": users}}


def _demo_tenant(kept: dict[str, Any], sandbox_url: str, data: Path, sip_port: int) -> dict[str, Any]:
    """What `demo.json` has to say of the demo tenant: what it said, if the database agrees, else what is found or made.

    An earlier start may have been killed between the database and the file, or have used another database.
    """
    from models import Tenant
    from pombal import db
    from pombal.cli import admin  # needs the addresses in the environment

    with db.session() as s:
        tenant = s.scalars(Tenant.by_slug("demo")).first()
    tenant = tenant or admin.add_tenant("demo", "Demo")
    channels = [
        _demo_meta(tenant),
        _demo_megaapi(tenant, sandbox_url),
        _demo_baileys(tenant, sandbox_url, data),
        _demo_stub(tenant),
    ]
    sip = [_demo_sip(tenant, sip_port)]
    if kept.get("tenants") and kept["tenants"][0]["channels"][0]["id"] == channels[0]["id"]:
        ours = {channel["id"] for channel in channels}
        others = [channel for channel in kept["tenants"][0]["channels"] if channel["id"] not in ours]
        kept["tenants"][0] |= {"channels": channels + others, "sip": sip}
        return kept
    _, api_key = admin.add_key(tenant.id, "demo")
    return {"tenants": [{"slug": "demo", "api_key": api_key, "channels": channels, "sip": sip}]}


def _demo_meta(tenant: "Tenant") -> dict[str, Any]:
    """The channel for requests that name none, also where an earlier version made it the only one."""
    from sqlalchemy import select

    from models import App, Channel
    from pombal import db
    from pombal.cli import admin

    channel = _channel_of(tenant, "demo-meta")
    if channel is None or channel.app_id is None:
        config = admin.MetaConfig(
            phone_number_id="880011223344556",
            waba_id="700100200300400",
            display_phone_number="5511955550100",
            app="default",
            app_secret=new_token(),
            verify_token=new_token(),
            access_token=new_token(),
            default=True,
        )
        channel, _ = admin.add_meta_channel(tenant, "demo-meta", config)
    with db.session([tenant.id]) as s:
        all_of_them = list(s.scalars(select(Channel).where(Channel.tenant_id == tenant.id)))
        if not any(one.config.get("default") for one in all_of_them):
            found = admin.locked(s, channel)
            found.config = found.config | {"default": True}
        secrets = s.get_one(App, channel.app_id).secrets()
    return {
        "id": str(channel.id),
        "kind": channel.kind,
        "name": channel.name,
        "phone_number_id": channel.config["phone_number_id"],
        "waba_id": channel.config["waba_id"],
        "app_secret": secrets["app_secrets"][0],
        "verify_token": secrets["verify_token"],
        "access_token": _access_token(channel),
    }


def _demo_megaapi(tenant: "Tenant", sandbox_url: str) -> dict[str, Any]:
    """A channel on the simulated gateway, wherever that is this time."""
    from pombal import db
    from pombal.cli import admin, gateways

    channel = _channel_of(tenant, "demo-megaapi")
    if channel is None:
        config = gateways.MegaConfig(host=sandbox_url, instance_key="megastart-demo", token=new_token())
        channel, _ = gateways.add_mega_channel(tenant, "demo-megaapi", config)
    with db.session([tenant.id]) as s:
        found = admin.locked(s, channel)
        if found.config["host"].startswith("http://127.0.0.1:"):
            found.config = found.config | {"host": sandbox_url}
        config_now, secrets = found.config, found.secrets()
    return {
        "id": str(channel.id),
        "kind": channel.kind,
        "name": channel.name,
        "host": config_now["host"],
        "instance_key": config_now["instance_key"],
        "token": secrets["token"],
        "webhook_token": secrets["webhook_token"],
    }


def _demo_baileys(tenant: "Tenant", sandbox_url: str, data: Path) -> dict[str, Any]:
    """A channel on the simulated Baileys gateway, whose session a repair may do everything to."""
    from pombal import db
    from pombal.cli import admin, baileys, gateways

    channel = _channel_of(tenant, "demo-baileys")
    host, folder = f"{sandbox_url}/baileys/{_BAILEYS_GATEWAY}", str(data / "gateway" / _BAILEYS_GATEWAY)
    if channel is None:
        config = baileys.BaileysConfig(
            gateway="whaticket",
            session="1",
            host=host,
            api_key=new_token(),
            paths=_REFRESH,
            auth=baileys.Auth(kind="files", folder=folder),
            observe_seconds=10,
            may_refresh_contacts=True,
            may_drop_keys=True,
            may_restore_creds=True,
        )
        channel, _ = gateways.add_baileys_channel(tenant, "demo-baileys", config)
    with db.session([tenant.id]) as s:
        found = admin.locked(s, channel)
        if found.config["host"].startswith("http://127.0.0.1:"):
            found.config = found.config | {"host": host, "auth": {"kind": "files", "folder": folder}}
        config_now, secrets = found.config, found.secrets()
    return {
        "id": str(channel.id),
        "kind": channel.kind,
        "name": channel.name,
        "gateway": config_now["gateway"],
        "host": config_now["host"],
        "session": config_now["session"],
        "api_key": secrets["api_key"],
        "webhook_token": secrets["webhook_token"],
    }


def _demo_stub(tenant: "Tenant") -> dict[str, Any]:
    from pombal.cli import gateways

    channel = _channel_of(tenant, "demo-stub")
    channel = channel or gateways.add_stub_channel(tenant, "demo-stub", gateways.StubConfig())
    return {"id": str(channel.id), "kind": channel.kind, "name": channel.name}


def _demo_sip(tenant: "Tenant", port: int) -> dict[str, Any]:
    """An account at the simulated registrar, wherever that is this time; workers register it, whoever else could."""
    from sqlalchemy import select

    from models import SipRegistration, SipSender
    from pombal import db
    from pombal.cli import sip
    from pombal.secrets import unseal

    name = "demo-sip"
    where = (SipRegistration.tenant_id == tenant.id, SipRegistration.name == name, SipRegistration.removed_at.is_(None))
    with db.session([tenant.id]) as s:
        account = s.scalars(select(SipRegistration).where(*where)).first()
    if account is None:
        given = {"port": port, "sender": SipSender.DIRECT, "interval": 120}
        account = sip.add_account(tenant, name, host="127.0.0.1", username=_SIP_USER, password=new_token(), **given)
    with db.session([tenant.id]) as s:
        if account.host == "127.0.0.1":  # its registrar is a new one, which knows of no binding
            SipRegistration.change(s, tenant.id, account.id, port=port)
        sealed = s.get_one(SipRegistration, (tenant.id, account.id)).sealed
    password = unseal(account.id, sealed)["password"]
    return {"id": str(account.id), "name": account.name, "username": account.username, "password": password}


def _register(account: str, registrar: str) -> None:
    """Have the demo account registered once there is somebody to register with: the worker may have been quicker."""
    from models import SipRegistration
    from pombal import db

    while not _answers(registrar):
        time.sleep(0.1)
    with db.session() as s:
        db.see_all(s)
        for row in SipRegistration.listing(s, id_=UUID(account)):
            SipRegistration.ask(s, row["tenant_id"], row["id"])


def _channel_of(tenant: "Tenant", name: str) -> "Channel | None":
    from sqlalchemy import select

    from models import Channel
    from pombal import db

    with db.session([tenant.id]) as s:
        return s.scalars(select(Channel).where(Channel.tenant_id == tenant.id, Channel.name == name)).first()


def _access_token(channel: "Channel") -> str:
    """Of the demo channel, which has none if it was made before anything could be sent."""
    from models import Channel
    from pombal import db

    with db.session([channel.tenant_id]) as s:
        found = s.get_one(Channel, (channel.tenant_id, channel.id))
        kept = found.secrets()
        if not kept.get("access_token"):
            kept = kept | {"access_token": new_token()}
            found.seal(kept)
    token: str = kept["access_token"]
    return token


def _write(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_suffix(".part")
    partial.touch(mode=0o600)
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2))
    partial.replace(file)


def _commands(wanted: tuple[str, ...], data: Path, port: int, sandbox_port: int, sip_port: int) -> list[Command]:
    python = [sys.executable, "-m", "pombal"]
    arguments = {
        "sandbox": [
            *("sandbox", "--port", str(sandbox_port), "--sip-port", str(sip_port)),
            *("--config", str(data / "sandbox.json")),
        ],
        "web": ["web", "--host", "127.0.0.1", "--port", str(port)],
        # Apart, as in the Procfile: a slow download must not keep a thread from webhooks, nor a gateway that hangs one
        # from webhooks or from the rounds over all of them.
        "worker": ["worker", *(queue for queue in queues() if queue not in _APART)],
        "media": ["worker", "download_media", "--threads", "24"],
        "upkeep": ["worker", "status_sync"],
        "sessions": ["worker", "channel_session", "--threads", "8"],
        "fixer": ["worker", "session_fixer"],
        "sip": ["worker", "sip_refresh", "--threads", "2"],
        "follower": ["session", "follow", str(data / "gateway.log"), "--attribute", "whatsappId"],
        "clock": ["clock"],
    }
    env = {**os.environ, "POMBAL_NO_BOOTSTRAP": "1"}
    return [Command(name, [*python, *arguments[name]], env) for name in _PROCESSES if name in wanted]


@contextmanager
def _kept_alive(servers: list[Server], supervisor: Supervisor) -> Iterator[None]:
    """Start embedded servers again when they die, on the same data and at the same address."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            for server in servers:
                if not server.alive() and not stop.is_set():
                    supervisor.say(f"{type(server).__name__} died, starting it again")
                    try:
                        server.restart()
                    except (PombalError, OSError) as error:  # a full disk, say: it may have room in a while
                        supervisor.say(str(error))
                        stop.wait(2)

    thread = threading.Thread(target=watch, name="servers")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _welcome(
    supervisor: Supervisor, demo: dict[str, Any], wanted: tuple[str, ...], port: int, began: float, data: Path
) -> None:
    """Wait until the web tier is ready, then say what to try next."""
    if "web" not in wanted:
        return
    while not _answers(f"http://127.0.0.1:{port}/ready"):
        time.sleep(0.1)
    tenant = demo["tenants"][0]
    if {"sandbox", "sip"} <= set(wanted):
        _register(tenant["sip"][0]["id"], f"{demo['sandbox']['meta']}/health")
    channel = tenant["channels"][0]
    wamid = f"wamid.DEMO{uuid7().hex}"
    body = _demo_body(channel, wamid)
    signature = hmac.digest(channel["app_secret"].encode(), body.encode(), hashlib.sha256).hex()
    pombal = "python3 -m pombal"
    if data != Path(".pombal").resolve():
        pombal = f"POMBAL_DATA={shlex.quote(str(data))} {pombal}"
    lines = [
        "",
        f"  web      http://127.0.0.1:{port}/health  /ready  /metrics",
        *([f"  sandbox  {demo['sandbox']['meta']}  sip:{demo['sandbox']['sip']}"] if "sandbox" in wanted else []),
        f"  API key  {tenant['api_key']}",
        f"  scripts  {data / 'demo.json'}",
        "",
        "try, in a second terminal in this folder:",
        "",
        f"  curl -i http://127.0.0.1:{port}/webhooks/whatsapp -H 'Content-Type: application/json' \\",
        f"    -H 'X-Hub-Signature-256: sha256={signature}' \\",
        f"    -d '{body}'",
        f"  {pombal} trace {wamid}",
        *([f'  {pombal} sandbox say --channel demo-meta "Olá"'] if "sandbox" in wanted else []),
        "",
        *(_sending(port, tenant["api_key"], pombal) if os.environ.get("WHATSAPP_GRAPH_URL") else []),
        *_gateway(port, tenant, pombal),
        *([f"  {pombal} sip show demo-sip", ""] if {"sandbox", "sip"} <= set(wanted) else []),
    ]
    supervisor.say(f"ready after {time.monotonic() - began:.1f} s")
    supervisor.show(lines)


def _sending(port: int, api_key: str, pombal: str) -> list[str]:
    """How to send a text, where there is a simulated Meta that knows the demo channel."""
    text = msgspec.json.encode({"to": f"+{_PERSON}", "type": "text", "text": "Oi, Bia"}).decode()
    return [
        f"  curl -i http://127.0.0.1:{port}/api/v1/messages -H 'Content-Type: application/json' \\",
        f"    -H 'Authorization: Bearer {api_key}' \\",
        f"    -d '{text}'",
        f"  {pombal} lanes",
        "",
    ]


def _gateway(port: int, tenant: dict[str, Any], pombal: str) -> list[str]:
    """How a gateway delivers a text, flat and unsigned: the token in its URL is the proof (megaapi.md, "Webhooks")."""
    channel = next(one for one in tenant["channels"] if one["kind"] == "megaapi")
    body = {
        "instance_key": channel["instance_key"],
        "jid": f"{_GATEWAYS_NUMBER}@s.whatsapp.net",
        "messageType": "conversation",
        "key": {"remoteJid": f"{_PERSON}@s.whatsapp.net", "fromMe": False, "id": uuid7().hex.upper()},
        "messageTimestamp": int(time.time()),
        "pushName": "Bia",
        "broadcast": False,
        "message": {"conversation": "Boa tarde"},
        "isGroup": False,
    }
    url = f"http://127.0.0.1:{port}/api/webhooks/whatsapp/{tenant['slug']}?token={channel['webhook_token']}"
    return [
        f"  curl -i '{url}' -H 'Content-Type: application/json' \\",
        f"    -d '{msgspec.json.encode(body).decode()}'",
        f"  {pombal} channel status {tenant['slug']}",
        "",
    ]


def _demo_body(channel: dict[str, str], wamid: str) -> str:
    person = _PERSON
    message = {"from": person, "id": wamid, "timestamp": str(int(time.time())), "type": "text"}
    value = {
        "messaging_product": "whatsapp",
        "metadata": {"phone_number_id": channel["phone_number_id"]},
        "contacts": [{"wa_id": person, "profile": {"name": "Bia"}}],
        "messages": [message | {"text": {"body": "Bom dia"}}],
    }
    entry = {"id": channel["waba_id"], "changes": [{"field": "messages", "value": value}]}
    return msgspec.json.encode({"object": "whatsapp_business_account", "entry": [entry]}).decode()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - our own loopback address
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def _step(what: str) -> Iterator[None]:
    """Name a step before it runs, and its time after, so that a slow one is seen."""
    print(f"pombal: {what} …", end="", flush=True)  # noqa: T201 - the line is finished below
    began = time.monotonic()
    try:
        yield
    except BaseException:
        say(" failed")
        raise
    say(f" {time.monotonic() - began:.1f} s")


def _require_free_port(port: int, option: str) -> None:
    if not _is_free(port):
        raise Misconfigured(f"port {port} is taken: choose another with {option}")


def _free_port(wanted: int) -> int:
    if _is_free(wanted):
        return wanted
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _free_sip_port(wanted: int) -> int:
    """One that is free for UDP as well."""
    while True:
        with socket.socket(type=socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("127.0.0.1", wanted))
            except OSError:
                wanted = 0
                continue
            port = int(probe.getsockname()[1])
            if _is_free(port):
                return port
            wanted = 0


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
