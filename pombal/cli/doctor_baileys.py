"""What `pombal doctor` finds out about channels on Baileys gateways and about their repair (docs/baileys.md).

Gateways are asked, with no transaction open, and nothing is changed: neither there nor in a session's files.
"""

import asyncio
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

from sqlalchemy import func, select

from models import Channel, ChannelKind, LogPosition, Repair, RepairPause, Tenant, WebhookToken
from models.repair import RepairState
from pombal import db
from pombal.cli import baileys
from pombal.cli.doctor import Finding, some
from pombal.errors import Misconfigured, Permanent, Rejected
from pombal.settings import settings
from providers import authstore, gateway_of
from providers.baileys_dialects import DIALECTS, normal_base
from providers.http import Clients
from providers.instance import InstanceFault

_SECONDS = 30.0  # for all gateways together
_AT_ONCE = 8
_MOST_ASKED = 200  # channels
_LATE = timedelta(minutes=5)
_UNREAD = timedelta(minutes=1)


class Known(NamedTuple):
    """A channel, by the name that findings give it, with its secrets and its gateway's address."""

    name: str
    id: UUID
    config: dict[str, Any]
    secrets: dict[str, Any]
    host: str


def findings() -> Iterator[Finding]:
    yield from _settings()
    known, unreadable = _channels()
    yield from unreadable
    if not known:
        return
    yield from _mode(len(known))
    without = [one.name for one in known if not one.host]
    if without:
        yield Finding("warning", f"no host, and BACKEND_URL is not set: {some(without)}")
    without = [one.name for one in known if not one.secrets.get("api_key")]
    if without:
        what = "no api_key, which only a gateway without any lock takes (`pombal channel token`)"
        yield Finding("warning", f"{what}: {some(without)}")
    by_session: dict[tuple[str, str], list[str]] = {}
    for one in known:
        by_session.setdefault((one.host, one.config.get("session", "")), []).append(one.name)
    for names in by_session.values():
        if len(names) > 1:
            what = "one session of a Baileys gateway, several channels; each of them would repair it"
            yield Finding("warning", f"{what}: {some(names)}")
    yield from _names_in_logs(known)
    yield from _stores(known)
    yield from _asked([one for one in known if one.host][:_MOST_ASKED])
    yield from _logs()
    yield from _late_repairs()


def _settings() -> Iterator[Finding]:
    if given := settings().backend_url:
        try:
            normal_base(given)
        except Rejected as error:
            yield Finding("error", f"BACKEND_URL: {error}")
    if (given := settings().session_log) and (wrong := _unwritable(Path(given))):
        yield Finding("warning", f"SESSION_LOG, as seen from this host: {wrong}: no step of a repair is written there")


def _unwritable(file: Path) -> str | None:
    """Why nothing can be added to this file; None when something can. It is not made, and not changed."""
    try:
        if file.exists():
            what = None if file.is_file() and os.access(file, os.W_OK) else "no file that this user may write"
        elif not file.parent.is_dir():
            what = "its folder does not exist"
        else:
            what = None if os.access(file.parent, os.W_OK | os.X_OK) else "its folder is none that this user may write"
    except (OSError, ValueError):  # a folder on the way that must not be looked into
        what = "it cannot be reached"
    return what


def _channels() -> tuple[list[Known], list[Finding]]:
    known, unreadable = [], []
    with db.session() as s:
        db.see_all(s)
        joined = select(Channel, Tenant.slug).join(Tenant, Tenant.id == Channel.tenant_id)
        query = joined.where(Channel.kind == ChannelKind.BAILEYS).order_by(Tenant.slug, Channel.name)
        for channel, slug in s.execute(query):
            try:
                secrets = channel.secrets()
            except Misconfigured as error:
                unreadable.append(Finding("error", str(error)))
                continue
            host = channel.config.get("host") or baileys.default_host()
            known.append(Known(f"{slug}/{channel.name}", channel.id, channel.config, secrets, host))
    return known, unreadable


def _mode(count: int) -> Iterator[Finding]:
    """Whether repairs are made at all."""
    mode = settings().session_fixer
    channels = f"{count} channel{'' if count == 1 else 's'} of Baileys gateways"
    if mode == "off":
        yield Finding("warning", f"POMBAL_SESSION_FIXER is off: nobody looks after the sessions of {channels}")
    elif mode == "observe":
        yield Finding("note", f"POMBAL_SESSION_FIXER is observe: sessions of {channels} are watched, and not repaired")
    else:
        yield Finding("ok", f"sessions of {channels} are watched and repaired")


def _names_in_logs(known: list[Known]) -> Iterator[Finding]:
    """Whether lines of logs could be told to be of a channel's session."""
    unknown = [
        one.name
        for one in known
        if one.config.get("gateway") in DIALECTS
        and DIALECTS[one.config["gateway"]].has_ids
        and not one.config.get("session", "").isdecimal()
        and not one.config.get("log_name")
    ]
    if unknown:
        what = "a session is called by its name; if its gateway's log is followed and has its id, set log_name to that"
        yield Finding("note", f"{what} (`pombal channel set`): {some(unknown)}")


def _stores(known: list[Known]) -> Iterator[Finding]:
    """Whether the keys of sessions can be reached where an operator allowed a repair to."""
    for one in known:
        try:
            store = authstore.store(one.config, one.secrets)
            if store is not None:
                store.check()
        except authstore.StoreFault as fault:
            yield Finding("warning", f"the keys of {one.name}, as seen from this host: {fault.text} ({fault.code})")


def _asked(known: list[Known]) -> Iterator[Finding]:
    """Whether gateways answer, and deliver to us."""
    hosts: dict[str, Known] = {}
    for one in known:
        hosts.setdefault(one.host, one)
    hooked = [one for one in known if baileys.can(one.config, "hook")]
    unwell, elsewhere, left_out = asyncio.run(_all_asked(list(hosts.values()), hooked))
    for one, said in unwell:
        names = [other.name for other in known if other.host == one.host]
        yield Finding("warning", f"a gateway is not well: {said}: {some(names)}")
    if elsewhere:
        what = "events do not come here (`pombal channel connect`)"
        yield Finding("warning", f"{what}: {some([f'{one.name} ({said})' for one, said in elsewhere])}")
    if left_out:
        what = f"{left_out} Baileys gateway{'s were' if left_out > 1 else ' was'} not asked"
        yield Finding("note", f"{what}: those before took the {_SECONDS:.0f} seconds that there are for all")
    if not unwell and not left_out:
        yield Finding("ok", f"{len(hosts)} Baileys gateway{'s answer' if len(hosts) > 1 else ' answers'}")


async def _all_asked(
    hosts: list[Known], hooked: list[Known]
) -> tuple[list[tuple[Known, str]], list[tuple[Known, str]], int]:
    """Those whose gateway is not well, and why; those whose events go elsewhere, and where; and how many gateways the
    time was over for before it was their turn."""
    room, clients = asyncio.Semaphore(_AT_ONCE), Clients(count=1)
    until = asyncio.get_running_loop().time() + _SECONDS
    reached: set[str] = set()

    async def health(one: Known) -> str | None:
        try:
            async with asyncio.timeout_at(until), room:
                reached.add(one.host)
                await gateway_of(ChannelKind.BAILEYS, clients, one.config, one.secrets).health()
        except InstanceFault as fault:
            return f"{fault.text} ({fault.code})"
        except (TimeoutError, Permanent) as error:
            return str(error) or "no answer in time"
        return None

    async def hook(one: Known) -> str | None:
        try:
            async with asyncio.timeout_at(until), room:
                found = await gateway_of(ChannelKind.BAILEYS, clients, one.config, one.secrets).hook()
        except (InstanceFault, TimeoutError, Permanent):
            return None  # its health says so, or its form is not known
        return _wrong_with(one, found.url, is_enabled=found.is_enabled)

    try:
        states = await asyncio.gather(*(health(one) for one in hosts))
        down = {one.host for one, said in zip(hosts, states, strict=True) if said}
        asked = [one for one in hooked if one.host not in down]
        hooks = await asyncio.gather(*(hook(one) for one in asked))
    finally:
        await clients.close()
    unwell = [(one, said) for one, said in zip(hosts, states, strict=True) if said and one.host in reached]
    elsewhere = [(one, said) for one, said in zip(asked, hooks, strict=True) if said]
    return unwell, elsewhere, len(hosts) - len(reached)


def _wrong_with(one: Known, url: str, *, is_enabled: bool) -> str | None:
    """What is the matter with where a session's events go. No URL is shown: its query may be a secret."""
    if not url:
        return "nowhere"
    if not is_enabled:
        return "switched off"
    try:
        parts = urlsplit(url)
        token = parse_qs(parts.query).get("token", [""])[0]
    except ValueError:
        return "to what is no address"
    if not parts.path.endswith(f"/api/webhooks/baileys/{one.id}"):
        return "elsewhere"
    with db.session() as s:
        row = s.scalars(WebhookToken.presented(token)).first()
    return None if row is not None and row.channel_id == one.id else "with a token that is not valid"


def _logs() -> Iterator[Finding]:
    """Whether logs that were followed within the last day still are."""
    with db.session() as s:
        unread = LogPosition.unread(s, _UNREAD)
        since = s.scalars(select(func.now() - _UNREAD)).one()
    left = [one.file for one in unread if one.updated_at < since]
    behind = [one.file for one in unread if one.updated_at >= since]
    if left:
        what = "no follower reads what was followed within the last day; repairs of sessions that it tells of wait"
        yield Finding("warning", f"{what} (`pombal session follow`): {some(left)}")
    if behind:
        yield Finding("warning", f"a follower is more than a minute behind: {some(behind)}")


def _late_repairs() -> Iterator[Finding]:
    """Whether anybody works on repairs that are due."""
    with db.session() as s:
        db.see_all(s)
        since = func.now() - _LATE
        late = s.scalar(
            select(func.count()).select_from(Repair).where(Repair.state == RepairState.OPEN, Repair.next_at < since)
        )
        paused = s.scalar(select(func.count()).select_from(RepairPause))
        waiting = s.scalar(select(func.count()).select_from(Repair).where(Repair.state == RepairState.WAITING))
    if paused:
        yield Finding("note", "repairs are paused, of all sessions or of some (`pombal session resume`)")
    if late:
        what = f"{late} repair{' is' if late == 1 else 's are'} due for {_LATE.seconds // 60} minutes"
        yield Finding("warning", f"{what}: does a worker of session_fixer run?")
    if waiting:
        what = f"{waiting} session{' waits' if waiting == 1 else 's wait'} for a person"
        yield Finding("warning", f"{what} (`pombal session history`)")
