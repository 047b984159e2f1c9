"""Tenants, API keys and channels."""

import re
import sys
from argparse import Namespace
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, TypeVar
from uuid import UUID

import msgspec
from msgspec import UNSET, UnsetType
from sqlalchemy import Text, cast, func, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from sqlalchemy.sql import ColumnElement

from models import ApiKey, App, Channel, ChannelKind, Route, RouteKind, Tenant, standing
from models.api_key import SCOPES
from models.app import DEFAULT_SLUG
from pombal import db
from pombal.cli import as_json, say, table
from pombal.errors import PombalError
from pombal.ids import uuid7
from pombal.settings import require_secrets, settings

_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SHORTEST_SECRET = 8  # characters; Meta's app secrets have 32
_TOKEN = re.compile(r"[!-~]{1,4096}")  # what a header can carry
_SHORT_ID = re.compile(r"[0-9a-f]{4,32}")
_MOST_READ = 64 * 1024  # characters of standard input

_MUST_BE = {
    "messages_per_second": "a number above 0 and at most 100000",
    "settle_seconds": "a number from 1 to 3600",
    "default": "true or false",
    "silent_after_hours": "a number from 0 to 8760",
    "token_kind": "instance or host",
    "gateway": "whaticket, ticketz, evolution, waha or fazer",
    "observe_seconds": "a number from 10 to 3600",
    "cool_down_seconds": "a number from 0 to 86400",
    "paths": "an object of texts",
    "auth": 'an object with a "kind", files or ticketz',
    **dict.fromkeys(("may_refresh_contacts", "may_drop_keys", "may_restore_creds"), "true or false"),
}  # what is not a text

C = TypeVar("C", bound="SendingConfig")


class Refused(PombalError):
    """What was asked for cannot be done; the message says why."""


class SendingConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How a channel sends; what is left out is as for every channel, and None puts it back to that.

    messages_per_second  what the provider allows its number (whatsapp-cloud-api.md §10)
    on_unknown           what to do when nobody told what became of a send: `once_more`, or `ask` an operator
    settle_seconds       how long a status is waited for that would tell it
    default              whether it serves requests that name no channel
    """

    example: ClassVar[str] = '{"messages_per_second": 80}'
    SETTINGS: ClassVar[frozenset[str]] = frozenset({"messages_per_second", "on_unknown", "settle_seconds", "default"})

    messages_per_second: Annotated[float, msgspec.Meta(gt=0, le=100_000)] | UnsetType | None = UNSET
    on_unknown: str | UnsetType | None = UNSET
    settle_seconds: Annotated[float, msgspec.Meta(ge=1, le=3600)] | UnsetType | None = UNSET
    default: bool | UnsetType | None = UNSET

    def applied_to(self, config: dict[str, Any]) -> dict[str, Any]:
        """A channel's `config` with these settings in it. Raises `Refused`."""
        if self.on_unknown not in (UNSET, None, "once_more", "ask"):
            raise Refused("on_unknown must be once_more or ask")
        given = {field: getattr(self, field) for field in self.__struct_fields__ if field in self.SETTINGS}
        merged = config | {field: value for field, value in given.items() if value is not UNSET}
        return {field: value for field, value in merged.items() if value is not None}

    def sealed_in(self, secrets: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
        """The secrets, with those in it that are given here, of a channel of this `config`. Raises `Refused`."""
        return secrets


class MetaConfig(SendingConfig, forbid_unknown_fields=True, kw_only=True):
    """`--config` of a Meta channel. Without `app_secret` it shares the default app, at `/webhooks/whatsapp`."""

    example: ClassVar[str] = '{"phone_number_id": "…", "waba_id": "…"}'

    phone_number_id: str
    waba_id: str
    display_phone_number: str | None = None
    app: str | None = None
    app_secret: str | None = None
    old_app_secret: str | None = None
    verify_token: str | None = None
    access_token: str | None = None


def create_tenant(given: Namespace) -> int:
    tenant = add_tenant(given.slug, given.name)
    show(given, {"id": tenant.id, "slug": tenant.slug, "name": tenant.name})
    return 0


def add_tenant(slug: str, name: str) -> Tenant:
    """A new tenant. Raises `Refused` for a slug that is taken or cannot be one."""
    if not _SLUG.fullmatch(slug):
        raise Refused("a slug has lower-case letters, digits and hyphens, at most 63, and starts with no hyphen")
    tenant = Tenant(id=uuid7(), slug=slug, name=name)
    try:
        with db.session() as s:
            s.add(tenant)
    except IntegrityError:
        raise Refused(f"there is a tenant {slug} already") from None
    return tenant


def list_tenants(given: Namespace) -> int:
    with db.session() as s:
        found = [{"id": t.id, "slug": t.slug, "name": t.name} for t in s.scalars(select(Tenant).order_by(Tenant.slug))]
    as_json(found) if given.json else table(found, empty="no tenants")
    return 0


def create_key(given: Namespace) -> int:
    unknown = sorted(set(given.scope or ()) - set(SCOPES))
    if unknown:
        raise Refused(f"unknown scope {unknown[0]}; there are {', '.join(SCOPES)}")
    key, text = add_key(tenant_named(given.tenant).id, given.name, tuple(given.scope or SCOPES))
    show(given, {"id": key.id, "api_key": text, "scopes": key.scopes})
    if not given.json:
        say("This key is shown once; only its hash is kept.")
    return 0


def add_key(tenant_id: UUID, name: str, scopes: tuple[str, ...] = SCOPES) -> tuple[ApiKey, str]:
    """A new API key: its row, and its text, which is nowhere else."""
    key, text = ApiKey.make(tenant_id, name, scopes)
    with db.session([tenant_id]) as s:
        s.add(key)
    return key, text


def list_keys(given: Namespace) -> int:
    """Their names and what they may do; the keys themselves are nowhere."""
    tenant = tenant_named(given.tenant)
    with db.session([tenant.id]) as s:
        rows = list(s.scalars(select(ApiKey).where(ApiKey.tenant_id == tenant.id).order_by(ApiKey.id)))
    if given.json:
        names = ("id", "name", "scopes", "created_at", "last_used_at", "revoked_at")
        as_json([{name: getattr(row, name) for name in names} for row in rows])
        return 0
    shown: list[dict[str, object]] = [
        {
            "id": row.id,
            "name": row.name,
            "last used": _minute(row.last_used_at) or "never",
            "revoked": _minute(row.revoked_at),
            "scopes": " ".join(row.scopes),
        }
        for row in rows
    ]
    table(shown, empty="no keys")
    return 0


def _minute(at: datetime | None) -> str | None:
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if at else None


def revoke_key(given: Namespace) -> int:
    tenant = tenant_named(given.tenant)
    with db.session([tenant.id]) as s:
        key = s.get(ApiKey, (tenant.id, _uuid(given.id)))
        if key is None:
            raise Refused("this tenant has no such key")
        key.revoked_at = key.revoked_at or s.scalar(select(func.now()))
    show(given, {"id": key.id, "revoked_at": key.revoked_at})
    return 0


def create_channel(given: Namespace) -> int:
    if given.kind != ChannelKind.META:
        from pombal.cli import gateways  # which needs what is here

        return gateways.create(given)
    require_secrets()
    config = decoded(given.config, MetaConfig)
    channel, app = add_meta_channel(tenant_named(given.tenant), given.name, config)
    path = "/webhooks/whatsapp" + ("" if app.slug == DEFAULT_SLUG else f"/{app.slug}")
    show(given, {"id": channel.id, "kind": channel.kind, "name": channel.name, "app": app.slug, "webhook": path})
    return 0


def decoded(config: str, into: type[C]) -> C:
    """What `--config` says, or standard input where it is `-`, so that no secret is in the list of processes.

    Raises `Refused` with the field's name and what it may be, without repeating a value.
    """
    try:
        return msgspec.json.decode(read_in() if config == "-" else config, type=into)
    except msgspec.ValidationError as error:
        raise Refused(f"--config: {_explained(str(error), into)}") from None
    except (msgspec.DecodeError, UnicodeError):
        raise Refused(f"--config is not JSON; it looks like {into.example}") from None


def read_in() -> str:
    """Standard input: all of a file or pipe, since half of a secret must not pass for it, or a line of a terminal."""
    return (sys.stdin.readline() if sys.stdin.isatty() else sys.stdin.read(_MOST_READ)).strip()


def _explained(said: str, into: type[SendingConfig]) -> str:
    """msgspec's message in words of ours."""
    if match := re.search(r"unknown field `(.*)`", said, re.DOTALL):
        return f"{match[1]} is not known here; there are {', '.join(into.__struct_fields__)}"
    if match := re.search(r"missing required field `(.*)`", said):
        return f"{match[1]} is required"
    if match := re.search(r" - at `\$\.([a-z_]+)", said):
        return f"{match[1]} must be {_MUST_BE.get(match[1], 'a text')}"
    return "must be an object"


def add_meta_channel(tenant: Tenant, name: str, config: MetaConfig) -> tuple[Channel, App]:
    """A new Meta channel, its app if that is new too, and its routes. Raises `Refused` with the field's name."""
    for field in ("phone_number_id", "waba_id"):
        if not _ID.fullmatch(getattr(config, field)):
            raise Refused(f"{field} must be 1 to 64 letters, digits, dots, underscores or hyphens")
    for field in ("app_secret", "old_app_secret", "verify_token"):
        if getattr(config, field) is not None and len(getattr(config, field)) < _SHORTEST_SECRET:
            raise Refused(f"{field} is shorter than {_SHORTEST_SECRET} characters")
    if config.old_app_secret and not config.app_secret:
        raise Refused("old_app_secret goes with the app_secret that follows it")
    channel = Channel(tenant_id=tenant.id, id=uuid7(), kind=ChannelKind.META, name=name)
    ids = {field: getattr(config, field) for field in ("phone_number_id", "waba_id", "display_phone_number")}
    channel.config = config.applied_to(ids)
    if config.access_token:
        channel.seal({"access_token": usable_token(config.access_token)})
    try:
        with db.session([tenant.id]) as s:
            if channel.config.get("default"):
                no_longer_default(s, tenant.id)
            app = _app_for(s, tenant, config)
            channel.app_id = app.id
            s.add(channel)
            s.flush()
            for kind, value in ((RouteKind.NUMBER, config.phone_number_id), (RouteKind.WABA, config.waba_id)):
                s.add(Route(app_id=app.id, kind=kind, value=value, channel_id=channel.id, tenant_id=tenant.id))
    except IntegrityError as error:
        taken = getattr(getattr(error.orig, "diag", None), "constraint_name", "") or ""
        what = "this app has a channel with that phone_number_id" if "route" in taken else "the name is taken"
        raise Refused(f"{what} already") from None
    return channel, app


def usable_token(text: str, name: str = "access_token") -> str:
    """An access token that can go into a header. Raises `Refused`, without repeating it."""
    if re.search(r"\s", text):
        raise Refused(f"{name} has a blank in it: give the token alone, in one piece")
    if not _TOKEN.fullmatch(text):
        raise Refused(f"{name} must be printable ASCII, at most 4096 characters")
    return text


def no_longer_default(s: Session, tenant_id: UUID) -> None:
    """Another channel becomes the tenant's default: there is one at most."""
    for channel in s.scalars(
        select(Channel).where(Channel.tenant_id == tenant_id).order_by(Channel.id).with_for_update(key_share=True)
    ):
        channel.config = {field: value for field, value in channel.config.items() if field != "default"}


def _app_for(s: Session, tenant: Tenant, config: MetaConfig) -> App:
    slug = config.app or (tenant.slug if config.app_secret else DEFAULT_SLUG)
    if not _SLUG.fullmatch(slug):
        raise Refused("app must be lower-case letters, digits and hyphens, at most 63")
    app = s.scalars(App.by_slug(slug)).first()
    if app is not None and app.tenant_id not in (None, tenant.id):
        raise Refused(f"the app {slug} is another tenant's")
    if app is None:
        app = App(id=uuid7(), slug=slug, tenant_id=None if slug == DEFAULT_SLUG else tenant.id)
        app.seal(app_secrets=[], verify_token="")
        s.add(app)
    elif app.tenant_id is None and (config.app_secret or config.verify_token):
        raise Refused(f"the app {slug} is shared; its secrets are set where it was created")
    if config.app_secret or config.verify_token:
        kept = app.secrets()
        secrets = kept["app_secrets"]
        if config.app_secret:  # one that is in use stays valid: a mistyped new one must not shut the app
            secrets = _with_the_one_before(
                config.app_secret, [config.old_app_secret] if config.old_app_secret else secrets
            )
        app.seal(app_secrets=secrets, verify_token=config.verify_token or kept["verify_token"])
    if not app.secrets()["app_secrets"] and not (app.slug == DEFAULT_SLUG and settings().whatsapp_app_secret):
        raise Refused("app_secret is needed: without one every webhook would be refused")
    s.flush()
    return app


def rotate_app(given: Namespace) -> int:
    """Two secrets are valid at once while Meta's is being changed; web processes know within seconds."""
    require_secrets()
    secret = "" if given.finish else sys.stdin.readline().strip()
    with db.session() as s:
        app = s.scalars(App.by_slug(given.slug)).first()
        if app is None:
            raise Refused(f"there is no app {given.slug}")
        kept = app.secrets()
        if given.finish:
            secrets = kept["app_secrets"][:1]
        elif len(secret) < _SHORTEST_SECRET:
            raise Refused(f"the secret on standard input is shorter than {_SHORTEST_SECRET} characters")
        else:
            secrets = _with_the_one_before(secret, kept["app_secrets"])
        app.seal(app_secrets=secrets, verify_token=kept["verify_token"])
    show(given, {"app": app.slug, "valid_secrets": len(secrets)})
    return 0


def _with_the_one_before(secret: str, kept: list[str]) -> list[str]:
    return [secret, *[one for one in kept if one != secret][:1]]


def list_channels(given: Namespace) -> int:
    tenant = tenant_named(given.tenant)
    with db.session([tenant.id]) as s:
        rows = s.scalars(select(Channel).where(Channel.tenant_id == tenant.id).order_by(Channel.name))
        found: list[dict[str, object]] = [
            {
                "id": c.id,
                "kind": c.kind,
                "name": c.name,
                "status": standing.shown(c.status, c.unknown_reason) if c.status or c.kind in standing.POLLED else None,
                "config": c.config,
                "has_secrets": c.sealed is not None,
            }
            for c in rows
        ]
    as_json(found) if given.json else table(found, empty="no channels")
    return 0


def tenant_named(name: str) -> Tenant:
    """A tenant by slug or id. Raises `Refused`."""
    with db.session() as s:
        tenant = s.scalars(Tenant.by_slug(name)).first()
        if tenant is None and len(name) >= 32:
            tenant = s.get(Tenant, _uuid(name))
    if tenant is None:
        raise Refused(f"there is no tenant {name}")
    return tenant


def channel_named(tenant: Tenant, name: str) -> Channel:
    """A tenant's channel by its name, or else as `channel_with_id` knows it. Raises `Refused`."""
    with db.session([tenant.id]) as s:
        own = Channel.tenant_id == tenant.id
        found = s.scalars(select(Channel).where(own, Channel.name == name)).first()
        found = found or channel_with_id(s, name, own)
    if found is None:
        raise Refused(f"{tenant.slug} has no channel {name}")
    return found


def channel_with_id(s: Session, text: str, *where: ColumnElement[bool]) -> Channel | None:
    """The channel, among those in sight, whose id is this text or begins or ends with it.

    Raises `Refused` when that is several.
    """
    wanted = text.replace("-", "").lower()
    if not _SHORT_ID.fullmatch(wanted):
        return None
    shown = func.replace(cast(Channel.id, Text), "-", "")
    query = select(Channel).where(or_(shown.startswith(wanted), shown.endswith(wanted)), *where)
    found = list(s.scalars(query.limit(2)))
    if len(found) > 1:
        raise Refused(f"several channels' ids begin or end with {text}: give more of it, or TENANT/NAME")
    return found[0] if found else None


def locked(s: Session, channel: Channel) -> Channel:
    """The channel as it is now, until the end of the transaction."""
    key = (Channel.tenant_id == channel.tenant_id, Channel.id == channel.id)
    return s.scalars(select(Channel).where(*key).with_for_update(key_share=True)).one()


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise Refused(f"{text} is not an id") from None


def show(given: Namespace, values: dict[str, Any]) -> None:
    """One thing's fields, a line each."""
    if given.json:
        as_json(values)
    else:
        for name, value in values.items():
            say(f"{name}: {value}")
