"""Every setting, typed, read once: `settings()`. Nothing else reads the environment.

Values come from the environment, then from `.pombal/env` (what `pombal up` wrote down, so that a second terminal
finds the running servers), then from the defaults here. Whatever was not started by `up` or `test` is production:
there a missing or weak secret refuses to start.
"""

import base64
import os
import re
from datetime import timedelta
from functools import cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from cryptography.fernet import Fernet

from pombal.errors import Misconfigured

_SHORTEST_SECRET = 32  # characters, security-reliability.md C2
_FEWEST_SIGNS = 8  # different ones in a random secret, even in one of 32 hex digits


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """One field per variable, named as the variable in lower case. Secrets stay out of `repr`."""

    database_url: str = ""
    database_owner_url: str = ""
    redis_url: str = ""
    redis_tls_verify: bool = True
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 8000
    host: str = "0.0.0.0"  # noqa: S104 - hosts with a router expect it; `pombal up` sets 127.0.0.1
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["console", "json"] = "json"
    mode: Literal["development", "production"] = "production"
    secret_keys: str = ""
    whatsapp_api_version: str = "v26.0"
    whatsapp_graph_url: str = "https://graph.facebook.com"
    whatsapp_app_secret: str = ""
    whatsapp_webhook_verify_token: str = ""
    metrics_token: str = ""
    metrics_dir: str = ""
    sandbox_url: str = ""
    media_url: str = ""
    media_allowed_networks: str = ""
    whatsapp_media_hosts: str = "lookaside.fbsbx.com,*.fbcdn.net,graph.facebook.com"
    media_quota: Annotated[int, msgspec.Meta(ge=0)] = 0
    mega_api_host: str = ""
    mega_api_token: str = ""
    status_sync_at_once: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 16
    whatsapp_stub_fast: bool = False
    cron_secret: str = ""
    backend_url: str = ""
    session_fixer: Literal["repair", "observe", "off"] = "repair"
    threshold_errors: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 5
    error_window: str = "300s"
    check_interval: str = "10m"
    session_log: str = ""
    drachtio_host: str = ""
    drachtio_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 9022
    drachtio_secret: str = ""
    sip_backend_url: str = ""
    sip_backend_key: str = ""
    sip_contact: str = ""
    sip_allowed_networks: str = ""
    sip_nameserver: str = ""
    sip_starts_per_second: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 30
    api_key: str = ""

    def __repr__(self) -> str:
        return f"Settings(mode={self.mode!r})"

    @property
    def is_production(self) -> bool:
        return self.mode == "production"

    def require_database(self) -> str:
        """The app's database URL, as SQLAlchemy and psycopg both read it. Raises `Misconfigured` when unset."""
        return _postgresql("DATABASE_URL", self.database_url or _missing("DATABASE_URL"))

    def require_database_owner(self) -> str:
        """The URL of the role that migrates; the app's own where none is set apart."""
        if not self.database_owner_url:
            return self.require_database()
        return _postgresql("DATABASE_OWNER_URL", self.database_owner_url)

    def require_redis(self) -> str:
        """The broker's URL; `memory://` names the stub broker. Raises `Misconfigured` when unset."""
        url = self.redis_url or _missing("REDIS_URL")
        if not _is_address(url, "redis", "rediss", "unix", "memory"):
            raise Misconfigured("REDIS_URL is not the address of a Redis (redis://…, rediss://…, unix://…)")
        return url

    def require_graph(self) -> tuple[str, str]:
        """Base address and version of Meta's Graph API. Raises `Misconfigured`."""
        if not _is_address(self.whatsapp_graph_url, "https", "http"):
            raise Misconfigured("WHATSAPP_GRAPH_URL is not an http(s) address")
        if self.is_production and not self.whatsapp_graph_url.startswith("https://"):
            raise Misconfigured("WHATSAPP_GRAPH_URL must be https in production: access tokens travel there")
        if not re.fullmatch(r"v[0-9]{1,3}\.[0-9]{1,2}", self.whatsapp_api_version):
            raise Misconfigured("WHATSAPP_API_VERSION must look like v26.0")
        return self.whatsapp_graph_url, self.whatsapp_api_version

    def require_media(self) -> str:
        """Where files are kept: `file:///folder` or `s3://bucket/prefix`. Raises `Misconfigured`."""
        url = self.media_url or (data_folder().absolute() / "media").as_uri()
        parts = urlsplit(url)
        is_folder = parts.scheme == "file" and not parts.netloc and parts.path.startswith("/")
        if not is_folder and not (parts.scheme == "s3" and parts.netloc):
            raise Misconfigured("MEDIA_URL must be file:///absolute/folder or s3://bucket/prefix")
        return url

    def require_error_window(self) -> timedelta:
        """Within which more errors than `threshold_errors` open an incident. Raises `Misconfigured`."""
        return _length("ERROR_WINDOW", self.error_window)

    def require_check_interval(self) -> timedelta:
        """Between two looks at all sessions of Baileys gateways. Raises `Misconfigured`."""
        return _length("CHECK_INTERVAL", self.check_interval)

    def meta_media_hosts(self) -> list[str]:
        """Hosts that may see a channel's access token when a file is fetched; `*.` stands for any name below."""
        return [host.strip().lower() for host in self.whatsapp_media_hosts.split(",") if host.strip()]

    def require_media_networks(self) -> list[IPv4Network | IPv6Network]:
        """Networks that links may lead to although they are not public; none by default. Raises `Misconfigured`."""
        return _networks("MEDIA_ALLOWED_NETWORKS", self.media_allowed_networks)

    def require_sip_networks(self) -> list[IPv4Network | IPv6Network]:
        """Networks in which registrars may be although they are not public; none by default. Raises `Misconfigured`."""
        return _networks("SIP_ALLOWED_NETWORKS", self.sip_allowed_networks)

    def require_sip_nameserver(self) -> tuple[str, int] | None:
        """The DNS server to ask about registrars; None for the system's. Raises `Misconfigured`."""
        if not self.sip_nameserver:
            return None
        host, _, port = self.sip_nameserver.rpartition(":") if ":" in self.sip_nameserver else ("", "", "")
        try:
            return str(ip_address((host or self.sip_nameserver).strip("[]"))), int(port or 53)
        except ValueError:
            raise Misconfigured("SIP_NAMESERVER must be an address such as 192.0.2.53 or 192.0.2.53:53") from None

    def require_sip_backend(self) -> tuple[str, str] | None:
        """Address and key of the backend that is told of registrations; None unless both are set. Raises
        `Misconfigured`."""
        if not self.sip_backend_url or not self.sip_backend_key:
            return None
        if not _is_address(self.sip_backend_url, "https", "http"):
            raise Misconfigured("SIP_BACKEND_URL is not an http(s) address")
        if not (self.sip_backend_key.isascii() and self.sip_backend_key.isprintable()):
            raise Misconfigured("SIP_BACKEND_KEY must be printable ASCII")
        return self.sip_backend_url.rstrip("/"), self.sip_backend_key


# Variables that do not carry their field's name.
_NAMES = {
    "redis_tls_verify": "POMBAL_REDIS_TLS_VERIFY",
    "mode": "POMBAL_MODE",
    "secret_keys": "POMBAL_SECRET_KEYS",
    "metrics_dir": "PROMETHEUS_MULTIPROC_DIR",
    "sandbox_url": "POMBAL_SANDBOX_URL",
    "session_fixer": "POMBAL_SESSION_FIXER",
}


@cache
def settings() -> Settings:
    """The settings of this process. Raises `Misconfigured`, naming the variable, never its value."""
    given = {**_written_down(), **{k: v for k, v in os.environ.items() if v != ""}}
    values = {}
    for field in msgspec.structs.fields(Settings):
        name = variable(field.name)
        if name in given:
            value = given[name]
            values[field.name] = value.upper() if field.name == "log_level" else value
    try:
        made = msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        # The message ends with the path of the field (`… - at `$.port``); the value itself is not repeated.
        where = str(error).rpartition("$.")[2].strip("`")
        raise Misconfigured(f"{variable(where)} has a value that cannot be used: {_kind(error)}") from None
    made.require_error_window()
    made.require_check_interval()
    return made


def variable(field: str) -> str:
    """The environment variable behind a field."""
    return _NAMES.get(field, field.upper())


def check_secrets(given: Settings) -> list[str]:
    """What is wrong with the secrets, one sentence each; empty when a process may start."""
    wrong = []
    keys = [key.strip() for key in given.secret_keys.split(",") if key.strip()]
    if not keys:
        wrong.append("POMBAL_SECRET_KEYS is not set: give one or more Fernet keys, newest first")
    for place, key in enumerate(keys, 1):
        try:
            Fernet(key)
        except ValueError:
            wrong.append(f"POMBAL_SECRET_KEYS: key {place} is not a Fernet key (32 bytes in URL-safe base64)")
            continue
        if len(set(base64.urlsafe_b64decode(key))) < _FEWEST_SIGNS:
            wrong.append(f"POMBAL_SECRET_KEYS: key {place} is not random")
    if given.is_production:
        for name, value in (
            ("WHATSAPP_APP_SECRET", given.whatsapp_app_secret),
            ("METRICS_TOKEN", given.metrics_token),
            ("CRON_SECRET", given.cron_secret),
            ("API_KEY", given.api_key),
        ):
            if value and len(value) < _SHORTEST_SECRET:
                wrong.append(f"{name} is shorter than {_SHORTEST_SECRET} characters")
            elif value and len(set(value)) < _FEWEST_SIGNS:
                wrong.append(f"{name} is not random")
    if given.drachtio_host and given.drachtio_secret in ("", "cymru"):
        wrong.append("DRACHTIO_SECRET is not set, or is the one of drachtio's sample configuration, which all know")
    return wrong


def require_secrets() -> None:
    """Refuse to start with missing or weak secrets. Raises `Misconfigured` with every reason."""
    wrong = check_secrets(settings())
    if wrong:
        raise Misconfigured("; ".join(wrong))


def data_folder() -> Path:
    """Where `pombal up` keeps its servers' data and writes its addresses down."""
    return Path(os.environ.get("POMBAL_DATA", ".pombal"))


def _written_down() -> dict[str, str]:
    path = data_folder() / "env"
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    written = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    # All or nothing: half of a trial run's addresses beside a host's own would migrate or serve the wrong database.
    servers = ("DATABASE_URL", "REDIS_URL")
    is_of_this_host = all(os.environ.get(name) in (None, "", written.get(name)) for name in servers)
    return written if is_of_this_host else {}


def _postgresql(name: str, url: str) -> str:
    if not _is_address(url, "postgres", "postgresql"):
        raise Misconfigured(
            f"{name} is not the address of a PostgreSQL (postgresql://user:password@host:port/database)"
        )
    # Several hosts hand out `postgres://`, which SQLAlchemy refuses (dependencies.md, "Growing up").
    return "postgresql://" + url.removeprefix("postgres://") if url.startswith("postgres://") else url


def _length(name: str, given: str) -> timedelta:
    """A length of time: seconds, or a number with `s`, `m` or `h`; from a second to a day."""
    found = re.fullmatch(r"([0-9]{1,6})([smh]?)", given.strip())
    length = timedelta(seconds=int(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]) if found else None
    if length is None or not timedelta(seconds=1) <= length <= timedelta(days=1):
        raise Misconfigured(f"{name} must be seconds, or a length such as 300s or 10m, of at most a day")
    return length


def _networks(name: str, given: str) -> list[IPv4Network | IPv6Network]:
    try:
        return [ip_network(one.strip()) for one in given.split(",") if one.strip()]
    except ValueError:
        raise Misconfigured(f"{name} must be networks such as 10.0.0.0/8, with commas") from None


def _is_address(url: str, *schemes: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in schemes and (parts.port is None or parts.port > 0)
    except ValueError:  # a port in words
        return False


def _missing(name: str) -> str:
    raise Misconfigured(f"{name} is not set (`python3 -m pombal up` starts servers of its own and writes it down)")


def _kind(error: msgspec.ValidationError) -> str:
    return str(error).partition(" - ")[0].partition(", got")[0].partition(" '")[0].lower()
