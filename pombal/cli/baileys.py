"""What an operator says of a channel on a Baileys gateway: where its session is, and what a repair may do to it.

The dialects and their paths are in `providers/baileys_dialects.py` (baileys-sessions.md §5); the ladder of repairs,
whose steps must be allowed, is in docs/baileys.md.
"""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType

from pombal.cli.admin import Refused, SendingConfig, usable_token
from pombal.errors import Rejected
from pombal.settings import settings
from providers.baileys_dialects import DIALECTS, check_paths, check_session, normal_base

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # security-reliability.md F6
_MOST_FOLDER = 1024  # characters
_FEWEST_PARTS = 3  # … `/`, one of its folders, and one in that
_IN_A_LOG = re.compile(r"[\x21-\x7e]{1,64}")
_STORES = ("postgresql://", "postgres://")
_BY_HAND = {
    "whaticket": "have its webhook post messages.upsert, messages.update and connection.update there "
    "(docs/baileys.md).",
    "waha": "enter it in config.webhooks of the session, or as WHATSAPP_HOOK_URL, with the events message, "
    "message.any, message.ack and session.status (docs/baileys.md).",
}
# Of these a person must have said so, since something is deleted, replaced or sent (baileys-sessions.md §7).
_FOR_STORES = ("may_drop_keys", "may_restore_creds")


class Auth(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Where a gateway keeps what a session is made of, if the fixer can reach it.

    kind     `files`: folders of `useMultiFileAuthState`; `ticketz`: Ticketz' own database, at `store_url`
    folder   what holds one folder for each session, as the fixer sees it
    name     of the session's folder, or its id in Ticketz' database, where that is not `session`
    backups  the folder for copies of what a repair deletes; beside the sessions' folders where it is not given
    """

    kind: Literal["files", "ticketz"]
    folder: str = ""
    name: str = ""
    backups: str = ""


class BaileysSettings(SendingConfig, forbid_unknown_fields=True, kw_only=True):
    """How a channel of a Baileys gateway sends, is watched and may be repaired.

    paths                 a gateway's own paths where they are not its dialect's: `{"stop": "PUT /…/{session}/…"}`
    silent_after_hours    without traffic in either direction after which a connected channel is called silent; 0: never
    observe_seconds       for which a repair looks on before it does anything, and after each step
    cool_down_seconds     that must lie between two steps of a repair; twice as long after each further one
    log_name              what the gateway's log calls the session where that is not `session`: its name, or its id
    auth                  where the session's keys are, for the steps that need them
    may_refresh_contacts  whether a repair may have the gateway send to a contact whose messages fail
    may_drop_keys         … delete keys that are made anew by themselves, after a backup
    may_restore_creds     … put back a backup of the same pairing's credentials
    send_key              what sending takes in place of `api_key`, in the Whaticket family; a secret
    store_url             the database of Ticketz; a secret
    """

    example: ClassVar[str] = '{"observe_seconds": 120, "may_drop_keys": true}'
    SETTINGS: ClassVar[frozenset[str]] = SendingConfig.SETTINGS | {
        "paths",
        "silent_after_hours",
        "observe_seconds",
        "cool_down_seconds",
        "log_name",
        "auth",
        "may_refresh_contacts",
        "may_drop_keys",
        "may_restore_creds",
    }

    paths: dict[str, str] | UnsetType | None = UNSET
    silent_after_hours: Annotated[float, msgspec.Meta(ge=0, le=8760)] | UnsetType | None = UNSET
    observe_seconds: Annotated[float, msgspec.Meta(ge=10, le=3600)] | UnsetType | None = UNSET
    cool_down_seconds: Annotated[float, msgspec.Meta(ge=0, le=86_400)] | UnsetType | None = UNSET
    log_name: str | UnsetType | None = UNSET
    auth: Auth | UnsetType | None = UNSET
    may_refresh_contacts: bool | UnsetType | None = UNSET
    may_drop_keys: bool | UnsetType | None = UNSET
    may_restore_creds: bool | UnsetType | None = UNSET
    send_key: str | UnsetType | None = UNSET
    store_url: str | UnsetType | None = UNSET

    def applied_to(self, config: dict[str, Any]) -> dict[str, Any]:
        merged = super().applied_to(config)
        if isinstance(merged.get("auth"), Auth):
            merged["auth"] = msgspec.to_builtins(_checked_auth(merged["auth"], merged["session"]))
        if not _IN_A_LOG.fullmatch(merged.get("log_name", "-")):
            raise Refused("log_name must be what log lines call the session: 1 to 64 characters without blanks")
        if "paths" in merged:
            try:
                merged["paths"] = check_paths(merged["gateway"], merged["paths"])
            except Rejected as error:
                raise Refused(str(error)) from None
        for name in _FOR_STORES:
            if merged.get(name) and "auth" not in merged:
                raise Refused(f"{name} goes with auth, which says where the session's keys are")
        return merged

    def sealed_in(self, secrets: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
        url = self.store_url
        if isinstance(url, str) and (not url.startswith(_STORES) or not url.isprintable() or " " in url):
            raise Refused("store_url must be the address of the gateway's database (postgresql://…)")
        if isinstance(self.send_key, str):
            usable_token(self.send_key, "send_key")
        given = {"send_key": self.send_key, "store_url": url}
        secrets = secrets | {name: value for name, value in given.items() if value is not UNSET}
        secrets = {name: value for name, value in secrets.items() if value is not None}
        if config.get("auth", {}).get("kind") == "ticketz" and "store_url" not in secrets:
            raise Refused("store_url is required: auth says that the session's keys are in the gateway's database")
        return secrets


class BaileysConfig(BaileysSettings, forbid_unknown_fields=True, kw_only=True):
    """`--config` of a channel on a Baileys gateway. Without `host`: BACKEND_URL, as it is whenever it is needed."""

    example: ClassVar[str] = '{"gateway": "evolution", "host": "https://…", "session": "…", "api_key": "…"}'

    gateway: Literal["whaticket", "ticketz", "evolution", "waha", "fazer"]
    session: str
    host: str | None = None
    api_key: str | None = None


def described(config: BaileysConfig) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A channel's `config`, its secrets, and the address of its gateway. Raises `Refused` with the field's name.

    What is not given is not stored: it follows the environment.
    """
    host = host_or_default(config.host)
    try:
        session = check_session(config.gateway, config.session)
    except Rejected as error:
        raise Refused(f"session: {error}") from None
    kept: dict[str, Any] = {"gateway": config.gateway, "session": session}
    if config.host is not None:
        kept |= {"host": host}
    kept = config.applied_to(kept)
    secrets = {"api_key": usable_token(config.api_key, "api_key")} if config.api_key else {}
    return kept, config.sealed_in(secrets, kept), host


def named_in_webhooks(config: Mapping[str, Any]) -> str | None:
    """What bodies call the session of a channel of this `config`, and no other; None where that is not known: a gateway
    whose sessions have ids tells those, whatever the channel calls its own."""
    session: str = config["session"]
    return None if DIALECTS[config["gateway"]].has_ids else session


def to_enter(config: Mapping[str, Any]) -> str:
    """What an operator does with a webhook's URL where the gateway of a channel of this `config` has no call for it."""
    return "This gateway has no call to set it: " + _BY_HAND.get(config["gateway"], _BY_HAND["whaticket"])


def can(config: Mapping[str, Any], call: str) -> bool:
    """Whether the gateway of a channel of this `config` has a call of this name."""
    dialect = DIALECTS.get(config.get("gateway", ""))
    return dialect is not None and call in (dialect.paths.keys() | config.get("paths", {}).keys())


def host_or_default(text: str | None) -> str:
    """The gateway's address as it is used. Raises `Refused`."""
    given, prefix = (text, "") if text is not None else (settings().backend_url, "BACKEND_URL: ")
    if not given:
        raise Refused("host is required: BACKEND_URL is not set")
    try:
        return normal_base(given)
    except Rejected as error:
        raise Refused(f"{prefix}{error}") from None


def default_host() -> str:
    """BACKEND_URL as channels have theirs; as it is where it cannot be used, which is a finding of `pombal doctor`."""
    given = settings().backend_url
    try:
        return normal_base(given) if given else ""
    except Rejected:
        return given


def _checked_auth(auth: Auth, session: str) -> Auth:
    """Raises `Refused`. Folders need not be on this machine, so they are not looked at here."""
    name = auth.name or session
    if not _NAME.fullmatch(name):
        raise Refused("auth.name must be 1 to 64 letters, digits, underscores or hyphens; without it session must be")
    if auth.kind == "files":
        auth = msgspec.structs.replace(auth, folder=_folder(auth.folder, "auth.folder"))
    elif auth.folder:
        raise Refused("auth.folder goes with the kind files")
    elif not auth.backups:
        raise Refused("auth.backups is required: copies of what is deleted are kept in a folder of ours")
    elif not name.isdecimal():
        raise Refused("auth.name must be the session's number in Ticketz, if session is not")
    return msgspec.structs.replace(auth, backups=_folder(auth.backups, "auth.backups")) if auth.backups else auth


def _folder(text: str, field: str) -> str:
    path = PurePosixPath(text)
    is_plain = text.isprintable() and len(text) <= _MOST_FOLDER and ".." not in path.parts
    if not is_plain or not path.is_absolute() or len(path.parts) < _FEWEST_PARTS:
        raise Refused(f"{field} must be an absolute path without .., and not one of the root's own folders")
    return str(path)
