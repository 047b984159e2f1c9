"""Which apps, channels, instances, gateways and SIP accounts the sandbox plays, read from a JSON file.

    {"apps": [{"url": "http://127.0.0.1:8000/webhooks/whatsapp", "app_secret": "…", "verify_token": "…",
               "channels": [{"name": "demo-meta", "phone_number_id": "…", "waba_id": "…",
                             "display_phone_number": "…", "access_token": "…",
                             "templates": [{"name": "…", "language": "…", "status": "…", "category": "…"}]}]}]}

A channel's name is unique in the file. What may be left out: `display_phone_number`; `access_token` (then any bearer
will do to send); `templates` (then any template exists), and their status and category. Beside `apps`, or instead:

    "megaapi": {"host_token": "…", "instances": [{"name": "demo-megaapi", "instance_key": "…", "token": "…",
                "status": "connected", "number": "5511955550200", "webhook_url": "…"}]}

Names and keys of instances are unique in the file. What may be left out: `host_token` (then the list is for nobody),
`status` (any word), `number`, and `webhook_url` until it is set through the API. And Baileys gateways:

    "baileys": {"root": "/folder/of/session/folders", "gateways": [{"name": "demo", "dialect": "evolution",
                "api_key": "…", "log": "/file.log", "sessions": [{"session": "demo-baileys", "webhook_url": "…"}]}]}

`root` may be left out (then it is a folder for the time being), and whatever `BaileysGateway` and `BaileysSession`
have a value for. And accounts at the SIP registrar, of which only the name and the password must be given:

    "sip": {"users": [{"name": "5511999990000", "password": "…", "auth_user": "…", "domain": "…", "realm": "…"}]}

If there is to be a drachtio (`--drachtio-port`), its secret, and whom it asks where a call should go:

    "drachtio": {"secret": "…", "dispatch_url": "http://127.0.0.1:8000/api/sip/dispatch", "dispatch_key": "…"}
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import httpx
import msgspec
from msgspec import Meta

from sandbox.baileys_words import Dialect
from sandbox.meta import Number


class ConfigError(Exception):
    """The file is missing or cannot be used; the message says why and holds none of its values but channel names."""


class Template(msgspec.Struct, frozen=True):
    name: str
    language: str
    status: str = "APPROVED"
    category: str = "UTILITY"


class Channel(msgspec.Struct, frozen=True):
    name: str
    phone_number_id: str
    waba_id: str
    display_phone_number: str = "5511955550100"
    access_token: str | None = None
    templates: tuple[Template, ...] | None = None

    @property
    def number(self) -> Number:
        return Number(self.phone_number_id, self.waba_id, self.display_phone_number)


class App(msgspec.Struct, frozen=True):
    """One Meta app: where its webhooks go and what proves them."""

    url: str
    app_secret: str
    verify_token: str
    channels: tuple[Channel, ...]


class MegaInstance(msgspec.Struct, frozen=True):
    """One number at MegaAPI; `status` is the one at the start."""

    name: str
    instance_key: str
    token: str
    status: str = "connected"
    number: str = "5511955550200"
    webhook_url: str | None = None


class MegaHost(msgspec.Struct, frozen=True):
    """One MegaAPI server; `host_token` is good for all its instances."""

    host_token: str | None = None
    instances: tuple[MegaInstance, ...] = ()


SessionName = Annotated[str, Meta(pattern=r"^\+?[A-Za-z0-9_-]{1,64}$")]
LogFormat = Literal["pino", "pretty", "docker", "compose", "pm2", "docker+pretty", "compose+pretty", "pm2+pretty"]
"""See `sandbox.baileys_log`."""

GatewayName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class BaileysSession(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One number at a Baileys gateway.

    session         the gateway's id of it; fazer-ai's is the number with a plus
    webhook_header  sent with each webhook
    verify_token    fazer-ai's, which is in each body
    paired, open    how it is at the start; a folder that has credentials already keeps them
    contacts        so many are known already, each with a session file
    pre_keys        so many are handed out
    """

    session: SessionName
    name: str = "Loja"
    number: Annotated[str, Meta(pattern=r"^[0-9]{5,20}$")] = "5511955550300"
    webhook_url: Annotated[str, Meta(pattern=r"^https?://[!-~]+$")] | None = None
    webhook_header: dict[str, str] = {}
    verify_token: str | None = None
    paired: bool = True
    open: bool = True
    contacts: Annotated[int, Meta(ge=0, le=10_000)] = 0
    pre_keys: Annotated[int, Meta(ge=1, le=1_000)] = 30


class BaileysGateway(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One gateway process.

    root           the folder that has its sessions' folders; else one of the host's
    version        of Baileys
    log…           as in `sandbox.baileys_log.LogPlan`; without a file nothing is logged
    session_field  under which name a log record tells its session
    paths          more paths of calls, such as {"refresh_contact": "POST /fresh/{session}/{jid}"}
    """

    name: GatewayName
    dialect: Dialect
    api_key: Annotated[str, Meta(min_length=1, max_length=1_000)] = "baileys-key"
    root: str | None = None
    version: Literal["6", "7"] = "7"
    log: str | None = None
    log_format: LogFormat = "pino"
    log_level: Literal[30, 40, 50] = 30
    session_field: str | None = None
    iso_time: bool = False
    log_prefix: str = ""
    paths: dict[str, str] = {}
    sessions: tuple[BaileysSession, ...] = ()


class BaileysHost(msgspec.Struct, frozen=True):
    """All gateways; their sessions' folders are `root`/gateway/session."""

    root: str | None = None
    gateways: tuple[BaileysGateway, ...] = ()


class SipUser(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One account at the SIP registrar.

    name       the user of its address of record
    auth_user  of its credentials, if it is another
    domain     the only one that will do; else any
    realm      of challenges; else the domain that was asked for
    """

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    password: str
    auth_user: str | None = None
    domain: str | None = None
    realm: str | None = None


class SipHost(msgspec.Struct, frozen=True):
    """The registrar."""

    users: tuple[SipUser, ...] = ()


class DrachtioHost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One drachtio; without a `dispatch_url` calls are refused."""

    secret: str = "sandbox-drachtio"  # noqa: S105 - nobody's
    dispatch_url: Annotated[str, Meta(pattern=r"^https?://[!-~]+$")] | None = None
    dispatch_key: str = ""


class Config(msgspec.Struct, frozen=True):
    apps: tuple[App, ...] = ()
    megaapi: MegaHost = MegaHost()
    baileys: BaileysHost = BaileysHost()
    sip: SipHost = SipHost()
    drachtio: DrachtioHost = DrachtioHost()

    def by_channel(self) -> dict[str, tuple[App, Channel]]:
        return {channel.name: (app, channel) for app in self.apps for channel in app.channels}

    def by_number(self) -> dict[str, tuple[App, Channel]]:
        return {channel.phone_number_id: (app, channel) for app in self.apps for channel in app.channels}


@dataclass
class ConfigFile:
    """The file, read again when it has changed."""

    path: Path
    _read_at: tuple[int, int] | None = None
    _config: Config = field(default_factory=lambda: Config(()))

    def read(self) -> Config:
        try:
            stat = self.path.stat()
            # The size too: two writes may fall into one tick of the clock.
            stamp = (stat.st_mtime_ns, stat.st_size)
            if stamp != self._read_at:
                self._config = _parse(self.path.read_bytes())
                self._read_at = stamp
        except OSError as error:
            raise ConfigError(f"{self.path}: {error.strerror}") from error
        except (ConfigError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.path}: {error}") from error
        return self._config


def _parse(raw: bytes) -> Config:
    config = msgspec.json.decode(raw, type=Config)
    names = [channel.name for app in config.apps for channel in app.channels]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"channel {name!r} is listed twice")
    for i, app in enumerate(config.apps):
        _check_url(app.url, f"apps[{i}].url")
    instances = config.megaapi.instances
    for what, names in (("name", [one.name for one in instances]), ("key", [one.instance_key for one in instances])):
        if len(set(names)) < len(names):
            raise ConfigError(f"megaapi.instances: a {what} is listed twice")
    for i, instance in enumerate(instances):
        if instance.webhook_url is not None:
            _check_url(instance.webhook_url, f"megaapi.instances[{i}].webhook_url")
    gateways = [gateway.name for gateway in config.baileys.gateways]
    if len(set(gateways)) < len(gateways):
        raise ConfigError("baileys.gateways: a name is listed twice")
    users = [user.name for user in config.sip.users]
    if len(set(users)) < len(users):
        raise ConfigError("sip.users: a name is listed twice")
    return config


def _check_url(given: str, where: str) -> None:
    try:
        url = httpx.URL(given)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{where}: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"{where} is not an http(s) address")
