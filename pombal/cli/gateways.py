"""Channels on gateways of WhatsApp Web: made, connected to us, restarted, logged out, and the QR code to pair them.

A gateway is asked with no transaction open, and what it says is read back before anything of ours depends on it.
"""

import asyncio
import contextlib
import errno
import os
import stat
import sys
import tempfile
from argparse import Namespace
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit, urlunsplit

from msgspec import UNSET, Meta, UnsetType
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from models import Channel, ChannelKind, Tenant, WebhookToken
from pombal import db
from pombal.cli import baileys, say
from pombal.cli.admin import (
    Refused,
    SendingConfig,
    channel_named,
    decoded,
    locked,
    no_longer_default,
    show,
    tenant_named,
    usable_token,
)
from pombal.cli.baileys import BaileysConfig, BaileysSettings
from pombal.errors import Permanent, Rejected
from pombal.ids import uuid7
from pombal.settings import require_secrets, settings
from providers import instance
from providers.http import Clients
from providers.instance import Hook, Instance, InstanceFault
from providers.megaapi import check_key, normal_host

_CONNECTS = "`pombal channel connect` has the gateway deliver its events there."
_EXTENSIONS = {"image/png": "png", "image/jpeg": "jpg"}

# What an operator can do about a fault, where its own text does not say it.
_ADVICE = {
    "refused": "give it another with `pombal channel token TENANT NAME`",
    "blocked_address": "hosts must be public; MEDIA_ALLOWED_NETWORKS lists networks that may be reached all the same",
    "edge_blocked": "that says nothing about the token; try again later",
    "not_found": "see host and instance_key (of baileys: session) in `pombal channel list TENANT`",
}

T = TypeVar("T")


class MegaSettings(SendingConfig, forbid_unknown_fields=True, kw_only=True):
    """How a channel of MegaAPI sends and is watched.

    silent_after_hours  without traffic in either direction after which a connected channel is called silent; 0: never
    token_kind          `host` when the token is good for all instances of its host, which are then asked about at once
    """

    example: ClassVar[str] = '{"messages_per_second": 5, "silent_after_hours": 24}'
    SETTINGS: ClassVar[frozenset[str]] = SendingConfig.SETTINGS | {"silent_after_hours", "token_kind"}

    silent_after_hours: Annotated[float, Meta(ge=0, le=8760)] | UnsetType | None = UNSET
    token_kind: Literal["instance", "host"] | UnsetType | None = UNSET


class MegaConfig(MegaSettings, forbid_unknown_fields=True, kw_only=True):
    """`--config` of a channel of MegaAPI. Without `host` and `token`: MEGA_API_HOST and MEGA_API_TOKEN, as they are
    whenever they are needed."""

    example: ClassVar[str] = '{"host": "https://…", "instance_key": "…", "token": "…"}'

    instance_key: str
    host: str | None = None
    token: str | None = None


class StubConfig(SendingConfig, forbid_unknown_fields=True, kw_only=True):
    """`--config` of a channel that reaches nobody."""

    example: ClassVar[str] = "{}"


# What `channel set` takes.
SETTINGS: dict[ChannelKind, type[SendingConfig]] = {
    ChannelKind.META: SendingConfig,
    ChannelKind.MEGAAPI: MegaSettings,
    ChannelKind.BAILEYS: BaileysSettings,
    ChannelKind.STUB: StubConfig,
}


def create(given: Namespace) -> int:
    require_secrets()
    tenant = tenant_named(given.tenant)
    if given.kind == ChannelKind.STUB:
        channel = add_stub_channel(tenant, given.name, decoded(given.config, StubConfig))
        show(given, {"id": channel.id, "kind": channel.kind, "name": channel.name})
        return 0
    if given.kind == ChannelKind.BAILEYS:
        channel, token = add_baileys_channel(tenant, given.name, decoded(given.config, BaileysConfig))
    else:
        channel, token = add_mega_channel(tenant, given.name, decoded(given.config, MegaConfig))
    webhook = webhook_path(tenant, channel, token)
    show(given, {"id": channel.id, "kind": channel.kind, "name": channel.name, "webhook": webhook})
    if not given.json:
        has_hook = given.kind != ChannelKind.BAILEYS or baileys.can(channel.config, "set_hook")
        say("This token is shown once. " + (_CONNECTS if has_hook else baileys.to_enter(channel.config)))
    return 0


def add_mega_channel(tenant: Tenant, name: str, config: MegaConfig) -> tuple[Channel, str]:
    """A new channel of MegaAPI, and the token that its webhooks are to carry. Raises `Refused` with the field's name.

    What is not given is not stored: it follows the environment. The host's own token goes to no other host.
    """
    kept: dict[str, object] = {"instance_key": _checked(check_key, config.instance_key)}
    secrets = {}
    host = _host_or_default(config.host)
    if config.token is not None:
        kept |= {"host": host, "token_kind": "instance"}
        secrets = {"token": usable_token(config.token, "token")}
    elif not settings().mega_api_token:
        raise Refused("token is required: MEGA_API_TOKEN is not set")
    elif host != _default_host():
        raise Refused("token is required: MEGA_API_TOKEN goes to MEGA_API_HOST alone")
    else:
        kept |= {"token_kind": "host"}
    channel = Channel(tenant_id=tenant.id, id=uuid7(), kind=ChannelKind.MEGAAPI, name=name)
    channel.config = config.applied_to(kept)
    row, token = WebhookToken.make(tenant.id, channel.id, config.instance_key)
    channel.seal(secrets | {"webhook_token": token})
    _add(channel, row, host)
    return channel, token


def add_baileys_channel(tenant: Tenant, name: str, config: BaileysConfig) -> tuple[Channel, str]:
    """A new channel on a Baileys gateway, and the token that its webhooks are to carry. Raises `Refused`."""
    channel = Channel(tenant_id=tenant.id, id=uuid7(), kind=ChannelKind.BAILEYS, name=name)
    channel.config, secrets, host = baileys.described(config)
    row, token = WebhookToken.make(tenant.id, channel.id, baileys.named_in_webhooks(channel.config))
    channel.seal(secrets | {"webhook_token": token})
    _add(channel, row, host)
    return channel, token


def add_stub_channel(tenant: Tenant, name: str, config: StubConfig) -> Channel:
    """A new channel that takes everything and reaches nobody. Raises `Refused`."""
    channel = Channel(tenant_id=tenant.id, id=uuid7(), kind=ChannelKind.STUB, name=name)
    channel.config = config.applied_to({})
    _add(channel)
    return channel


def _add(channel: Channel, token: WebhookToken | None = None, host: str = "") -> None:
    try:
        with db.session([channel.tenant_id]) as s:
            if token is not None:
                _refuse_a_second(s, channel, host)
            if channel.config.get("default"):
                no_longer_default(s, channel.tenant_id)
            s.add(channel)
            s.flush()
            if token is not None:
                s.add(token)
    except IntegrityError:
        raise Refused("the name is taken already") from None


def _refuse_a_second(s: Session, channel: Channel, host: str) -> None:
    """One instance is one channel of a tenant: its events go to one place."""
    s.execute(select(Tenant.id).where(Tenant.id == channel.tenant_id).with_for_update(key_share=True))  # one at a time
    field, default_host = _KEYS[ChannelKind(channel.kind)]
    own = (Channel.tenant_id == channel.tenant_id, Channel.kind == channel.kind)
    for other in s.scalars(select(Channel).where(*own)):
        has_key = other.config.get(field) == channel.config[field]
        if has_key and (other.config.get("host") or default_host()) == host:
            raise Refused(f"the channel {other.name} has this {field} of this host already")


def _host_or_default(text: str | None) -> str:
    host = _default_host() if text is None else _checked(normal_host, text)
    if not host:
        raise Refused("host is required: MEGA_API_HOST is not set")
    return host


def _default_host() -> str:
    given = settings().mega_api_host
    return _checked(normal_host, given, "MEGA_API_HOST: ") if given else ""


def _checked(check: Callable[[str], str], value: str, prefix: str = "") -> str:
    """The value as `check` makes it. Raises `Refused` with its reason."""
    try:
        return check(value)
    except Rejected as error:
        raise Refused(f"{prefix}{error}") from None


def webhook_path(tenant: Tenant, channel: Channel, token: str) -> str:
    if channel.kind == ChannelKind.BAILEYS:
        return f"/api/webhooks/baileys/{channel.id}?token={token}"
    return f"/api/webhooks/whatsapp/{tenant.slug}?token={token}"


# What a kind calls its instances, and the operator's own host.
_KEYS: dict[ChannelKind, tuple[str, Callable[[], str]]] = {
    ChannelKind.MEGAAPI: ("instance_key", _default_host),
    ChannelKind.BAILEYS: ("session", baileys.default_host),
}


def connect(given: Namespace) -> int:
    """Our URL is set at the gateway and read back, and what was there before is said.

    Any other token is ended only when that has shown the one in use. Where a Baileys gateway cannot be told, an
    operator is: with the URL, and its token.
    """
    require_secrets()
    base = _public(given.url)
    tenant, channel = _on_a_gateway(given)
    if channel.kind == ChannelKind.BAILEYS and not baileys.can(channel.config, "set_hook"):
        return _to_enter(given, base, tenant, channel)
    token = None if given.new_token else _token_in_use(channel)
    if is_new := token is None:
        token = _one_more_token(channel)
    url = base + webhook_path(tenant, channel, token)
    can_read = channel.kind != ChannelKind.BAILEYS or baileys.can(channel.config, "hook")
    before, found = _asked(channel, lambda gateway: _hook_set_to(gateway, url, can_read=can_read))
    if found and found.url != url:
        raise Refused("the gateway took our URL, but shows another one")
    if found and not found.is_enabled:
        raise Refused("the gateway has our URL, but shows its deliveries as switched off")
    with db.session([channel.tenant_id]) as s:
        kept = locked(s, channel)
        if s.scalars(WebhookToken.presented(token)).first() is None:
            raise Refused("somebody else connected this channel at the same time: connect it once more")
        # A gateway that is told at each start where its events go (`providers/baileys.py`) must be told the same then.
        told = {} if can_read else {"hook_url": url}
        kept.seal(kept.secrets() | {"webhook_token": token} | told)
        if found:
            WebhookToken.end_others(s, channel.id, token)
    is_shown = found is not None
    values = {"id": channel.id, "name": channel.name, "webhook": url.replace(token, "…")}
    show(given, values | {"before": before, "new_token": is_new, "read_back": is_shown})
    if not is_shown and not given.json:
        say("The gateway took our URL, but what it shows cannot be read: a token before this one stays valid.")
    return 0


def _to_enter(given: Namespace, base: str, tenant: Tenant, channel: Channel) -> int:
    """What an operator configures at a gateway whose dialect has no call for it.

    Nobody can read back what was entered, so a token before a new one goes on until this is asked for again.
    """
    token = None if given.new_token else _token_in_use(channel)
    is_new = token is None
    token = token or _one_more_token(channel)
    with db.session([channel.tenant_id]) as s:
        kept = locked(s, channel)
        if is_new:
            kept.seal(kept.secrets() | {"webhook_token": token})
        else:
            WebhookToken.end_others(s, channel.id, token)
    url = base + webhook_path(tenant, channel, token)
    show(given, {"id": channel.id, "name": channel.name, "webhook": url, "new_token": is_new, "read_back": False})
    if not given.json:
        say(baileys.to_enter(channel.config))
        if given.new_token:
            say("A token before this one stays valid until you `connect` once more, without --new-token.")
    return 0


async def _hook_set_to(gateway: Instance, url: str, *, can_read: bool) -> tuple[str, Hook | None]:
    """What the gateway showed before, in words, and what it shows afterwards; None when that cannot be read, since its
    form is not documented, or it has no call for that."""
    if not can_read:
        await gateway.set_hook(url)
        return "could not be read", None
    try:
        before = _described(await gateway.hook(), url)
    except InstanceFault as fault:  # what keeps it from being set as well is said then
        before = f"could not be read ({fault.code})"
    await gateway.set_hook(url)
    try:
        return before, await gateway.hook()
    except InstanceFault as fault:
        if fault.code != "unreadable":
            raise
        return before, None


def _described(hook: Hook, ours: str) -> str:
    """Where events went, beside where they are to go; without a query or a user, which may be secrets."""
    if not hook.url:
        return "nothing"
    place = _place_of(hook.url)
    if hook.url == ours:
        where = "the same"
    elif place == _place_of(ours):
        where = "the same with another token"
    else:
        where = f"elsewhere: {place or 'what is no address'}"
    return where if hook.is_enabled else f"{where}, switched off"


def _place_of(url: str) -> str:
    """Scheme, host and path of an address; empty when it is none that can be shown."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    place = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return place if parts.netloc and place.isprintable() else ""


def _token_in_use(channel: Channel) -> str | None:
    token = channel.secrets().get("webhook_token")
    with db.session() as s:
        return token if token and s.scalars(WebhookToken.presented(token)).first() is not None else None


def _one_more_token(channel: Channel) -> str:
    """Valid from now on, so that nothing is refused between the gateway's change and ours."""
    is_mega = channel.kind == ChannelKind.MEGAAPI
    name = channel.config["instance_key"] if is_mega else baileys.named_in_webhooks(channel.config)
    row, token = WebhookToken.make(channel.tenant_id, channel.id, name)
    with db.session([channel.tenant_id]) as s:
        s.add(row)
    return token


def _public(text: str) -> str:
    """The beginning of our webhooks' URLs: https, unless it leads to this machine or this is no production."""
    try:
        parts = urlsplit(text)
        is_whole = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port in words, brackets that do not match
        is_whole = False
    if not is_whole or not text.isprintable() or any(sign in text for sign in " ?#@\\"):
        raise Refused("--url must be our public address, such as https://pombal.example")
    if parts.scheme != "https" and not (
        parts.scheme == "http" and (_is_loopback(str(parts.hostname)) or not settings().is_production)
    ):
        raise Refused("--url must be https: the token of the webhook travels there")
    return text.rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def restart(given: Namespace) -> int:
    _, channel = _on_a_gateway(given)
    _asked(channel, lambda gateway: gateway.restart())
    check_soon(channel)
    say("restarted; `pombal channel status` shows how it stands")
    return 0


def logout(given: Namespace) -> int:
    _, channel = _on_a_gateway(given)
    if not given.yes:
        say(f"{channel.name} will receive and send nothing until somebody scans a new QR code with its phone")
        if not sys.stdin.isatty():
            raise Refused("say --yes to log it out")
        if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
            raise Refused("nothing was done")
    _asked(channel, lambda gateway: gateway.logout())
    check_soon(channel)
    say("logged out; `pombal channel qr` has the code that pairs it again")
    return 0


def qr(given: Namespace) -> int:
    """The picture, in a new file that its owner alone can read: whoever scans it has the session."""
    _, channel = _on_a_gateway(given)
    picture = _asked(channel, lambda gateway: gateway.qr())
    if picture is None:
        raise Refused("a phone is logged in already: there is no code to scan")
    file = Path(given.out or f"{channel.id}-qr.{_EXTENSIONS.get(picture.mime_type, 'bin')}")
    try:
        _write_anew(file, picture.content)
    except OSError as error:
        raise Refused(f"{file} cannot be written: {error.strerror}") from None
    say(f"{file}: scan it soon, with WhatsApp on the phone (Linked devices)")
    return 0


def _write_anew(file: Path, content: bytes) -> None:
    """In place of what is there, which may be readable for others, or lead elsewhere. Raises `OSError`."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(file).st_mode):
            raise FileExistsError(errno.EEXIST, "it is a link, a folder or a device")
    descriptor, fresh = tempfile.mkstemp(dir=file.parent, prefix=".qr.")  # mkstemp makes it 0600
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(content)
        Path(fresh).replace(file)
    except BaseException:
        Path(fresh).unlink(missing_ok=True)
        raise


def check_soon(channel: Channel) -> None:
    """Have the gateway asked how the channel stands, whatever was asked before now. While a store is away the next
    round does it, so that is no failure."""
    from workers.status_sync import ask_soon  # imports the fleet

    ask_soon(channel.tenant_id, channel.id)


def _on_a_gateway(given: Namespace) -> tuple[Tenant, Channel]:
    """Raises `Refused` for a channel that has no gateway."""
    tenant = tenant_named(given.tenant)
    channel = channel_named(tenant, given.name)
    if channel.kind not in _KEYS:
        raise Refused(f"a channel of kind {channel.kind} is on no gateway")
    return tenant, channel


def _asked(channel: Channel, what: Callable[[Instance], Awaitable[T]]) -> T:
    """What the channel's gateway answers. Raises `Refused` in plain words, with nothing secret in them."""

    async def ask() -> T:
        clients = Clients(count=1)
        try:
            return await what(instance(channel.kind, clients, channel.config, channel.secrets()))
        finally:
            await clients.close()

    try:
        return asyncio.run(ask())
    except InstanceFault as fault:
        advice = _ADVICE.get(fault.code)
        raise Refused(f"{fault.text} ({fault.code})" + (f": {advice}" if advice else "")) from None
    except Permanent as error:
        raise Refused(str(error)) from None
