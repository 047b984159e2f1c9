"""What a channel sends with: its access token and its settings. Both hold from its next turn on, within seconds."""

import sys
from argparse import Namespace

from sqlalchemy import select
from sqlalchemy.orm import Session

from models import Channel, ChannelKind, Lane, Media
from pombal import db
from pombal.cli import as_json, say
from pombal.cli.admin import (
    Refused,
    SendingConfig,
    channel_named,
    decoded,
    no_longer_default,
    tenant_named,
    usable_token,
)
from pombal.cli.lanes import ring
from pombal.settings import require_secrets

_MOST_READ = 64 * 1024
_SHORTEST_TOKEN = 8  # characters; Meta's have some two hundred


def token(given: Namespace) -> int:
    """A new access token, from standard input. What was held for the old one is tried again at once, files too."""
    require_secrets()
    channel = channel_named(tenant_named(given.tenant), given.name)
    # All of a file or pipe: a token that was broken in two must not pass as its half.
    text = (sys.stdin.readline() if sys.stdin.isatty() else sys.stdin.read(_MOST_READ)).strip()
    if len(text) < _SHORTEST_TOKEN:
        raise Refused(f"the access token on standard input is shorter than {_SHORTEST_TOKEN} characters")
    usable_token(text)
    if channel.kind != ChannelKind.META:
        raise Refused(f"a channel of kind {channel.kind} has no access token")
    with db.session([channel.tenant_id]) as s:
        is_held = Lane.probe_now(s, channel.id)
        found = _locked(s, channel)
        found.seal(found.secrets() | {"access_token": text})
        Media.wake(s, channel.tenant_id, channel.id)
    ring(channel.id)
    say("sealed" + ("; sending is tried with it now" if is_held else ""))
    return 0


def change(given: Namespace) -> int:
    """Settings of sending; those that are not given stay."""
    channel = channel_named(tenant_named(given.tenant), given.name)
    settings = decoded(given.config, SendingConfig)
    with db.session([channel.tenant_id]) as s:
        if settings.default is True:
            no_longer_default(s, channel.tenant_id)
        found = _locked(s, channel)
        found.config = settings.applied_to(found.config)
    if given.json:
        as_json({"id": found.id, "name": found.name, "config": found.config})
    else:
        for name, value in found.config.items():
            say(f"{name}: {value}")
    return 0


def _locked(s: Session, channel: Channel) -> Channel:
    key = (Channel.tenant_id == channel.tenant_id, Channel.id == channel.id)
    return s.scalars(select(Channel).where(*key).with_for_update(key_share=True)).one()
