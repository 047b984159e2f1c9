"""What a channel sends with: its access token and its settings. Both hold from its next turn on, within seconds."""

from argparse import Namespace

from models import ChannelKind, Lane, Media, standing
from pombal import db
from pombal.cli import as_json, say
from pombal.cli.admin import (
    Refused,
    channel_named,
    decoded,
    locked,
    no_longer_default,
    read_in,
    tenant_named,
    usable_token,
)
from pombal.cli.gateways import SETTINGS, check_soon
from pombal.cli.lanes import ring
from pombal.settings import require_secrets

# What a kind of channel calls its token among its secrets.
_TOKENS = {ChannelKind.META: "access_token", ChannelKind.MEGAAPI: "token", ChannelKind.BAILEYS: "api_key"}
_SHORTEST_TOKEN = 8  # characters; Meta's have some two hundred


def token(given: Namespace) -> int:
    """A new token, from standard input. What was held for the old one is tried again at once, files too."""
    require_secrets()
    channel = channel_named(tenant_named(given.tenant), given.name)
    text = read_in()
    if len(text) < _SHORTEST_TOKEN:
        raise Refused(f"the access token on standard input is shorter than {_SHORTEST_TOKEN} characters")
    usable_token(text)
    name = _TOKENS.get(ChannelKind(channel.kind))
    if name is None:
        raise Refused(f"a channel of kind {channel.kind} has no access token")
    with db.session([channel.tenant_id]) as s:
        found = locked(s, channel)  # channels before lanes, as everywhere
        found.seal(found.secrets() | {name: text})
        is_held = Lane.probe_now(s, channel.id)
        Media.wake(s, channel.tenant_id, channel.id)
    ring(channel.id)
    if channel.kind in standing.POLLED:
        check_soon(channel)
    say("sealed" + ("; sending is tried with it now" if is_held else ""))
    return 0


def change(given: Namespace) -> int:
    """Settings of sending; those that are not given stay."""
    channel = channel_named(tenant_named(given.tenant), given.name)
    settings = decoded(given.config, SETTINGS[ChannelKind(channel.kind)])
    with db.session([channel.tenant_id]) as s:
        if settings.default is True:
            no_longer_default(s, channel.tenant_id)
        found = locked(s, channel)
        found.config = settings.applied_to(found.config)
        kept = found.secrets()
        if (secrets := settings.sealed_in(kept, found.config)) != kept:
            found.seal(secrets)
    if given.json:
        as_json({"id": found.id, "name": found.name, "config": found.config})
    else:
        for name, value in found.config.items():
            say(f"{name}: {value}")
    return 0
