"""Message templates: what is known of them, and what Meta says when it is asked."""

import asyncio
from argparse import Namespace
from collections import Counter
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

import httpx
from sqlalchemy import select
from sqlalchemy.orm import Session

from models import Channel, ChannelKind, Template, Tenant
from pombal import db
from pombal.cli import as_json, table
from pombal.cli.admin import Refused, channel_named, tenant_named
from pombal.errors import PombalError
from pombal.settings import require_secrets, settings
from providers import graph, http
from providers.inbound import TemplateStatus

_DELETED = "deleted"  # also Meta's own word for it


class Account(NamedTuple):
    """A WhatsApp Business Account, the tenant's channels in it, and a token that opens it."""

    waba_id: str
    channels: list[Channel]
    token: str

    @property
    def name(self) -> str:
        return ", ".join(sorted(channel.name for channel in self.channels))


class Heard(NamedTuple):
    """What became of asking for one account."""

    account: Account
    asked_at: datetime
    templates: list[TemplateStatus]
    error: str | None


def sync(given: Namespace) -> int:
    """Ask Meta once for every account of a tenant. One that does not answer fails the command, after all the others."""
    require_secrets()
    tenant = tenant_named(given.tenant)
    base_url, version = settings().require_graph()
    accounts = _accounts(tenant, given.channel)
    heard = asyncio.run(_ask(accounts, base_url, version))
    counts = {one.account.waba_id: _write(tenant.id, one) for one in heard if one.error is None}
    if given.json:
        as_json([_shown(one, counts) for one in heard])
    else:
        rows: list[dict[str, object]] = [
            {"account": one.account.waba_id, "channels": one.account.name, "status": status, "templates": number}
            for one in heard
            for status, number in sorted(counts.get(one.account.waba_id, {}).items())
        ]
        if rows or not any(one.error for one in heard):
            table(rows, empty="no templates")
    failed = [f"{one.account.name}: {one.error}" for one in heard if one.error is not None]
    if failed:
        raise Refused("; ".join(failed))
    return 0


def _accounts(tenant: Tenant, only: str | None) -> list[Account]:
    wanted = channel_named(tenant, only) if only else None
    if wanted is not None and wanted.kind != ChannelKind.META:
        raise Refused(f"a channel of kind {wanted.kind} has no templates")
    with db.session([tenant.id]) as s:
        channels = list(s.scalars(_of_meta(tenant.id)))
    by_waba: dict[str, list[Channel]] = {}
    for channel in channels:
        by_waba.setdefault(channel.config["waba_id"], []).append(channel)
    if wanted is not None:
        by_waba = {waba_id: found for waba_id, found in by_waba.items() if waba_id == wanted.config["waba_id"]}
    return [Account(waba_id, found, _token(found, wanted)) for waba_id, found in sorted(by_waba.items())]


def _of_meta(tenant_id: UUID) -> Any:
    return (
        select(Channel).where(Channel.tenant_id == tenant_id, Channel.kind == ChannelKind.META).order_by(Channel.name)
    )


def _token(channels: list[Channel], wanted: Channel | None) -> str:
    """Of the channel that was named, else of the first that has one; empty when none has."""
    tokens: dict[UUID, str] = {channel.id: channel.secrets().get("access_token", "") for channel in channels}
    if wanted is not None:
        return tokens[wanted.id]
    return next(filter(None, tokens.values()), "")


async def _ask(accounts: list[Account], base_url: str, version: str) -> list[Heard]:
    async with http.new_client() as client:
        return [await _asked(client, account, base_url, version) for account in accounts]


async def _asked(client: httpx.AsyncClient, account: Account, base_url: str, version: str) -> Heard:
    at = datetime.now(UTC)
    if not account.token:
        return Heard(account, at, [], "no access token: see `pombal channel token`")
    try:
        found = await graph.templates(client, base_url, version, waba_id=account.waba_id, token=account.token)
    except PombalError as error:
        return Heard(account, at, [], str(error))
    return Heard(account, at, found, None)


def _write(tenant_id: UUID, heard: Heard) -> Counter[str]:
    """Record the verdicts for every channel of the account; what Meta did not name is deleted. Returns the counts."""
    listed = {(one.name, one.language): one for one in heard.templates}
    counts = Counter(one.status for one in listed.values())
    with db.session([tenant_id]) as s:
        known = _known(s, tenant_id, [channel.id for channel in heard.account.channels])
        rows = []
        for channel in heard.account.channels:
            for (name, language), one in listed.items():
                before = known.get((channel.id, name, language))
                # Meta gives the reason with its verdict alone: it stays for as long as the verdict does.
                reason = before.reason if before is not None and before.status == one.status else None
                rows.append(_row(tenant_id, channel.id, name, language, one.category, one.status, reason, one.at))
        gone = {key: row for key, row in known.items() if key[1:] not in listed and row.status != _DELETED}
        for (channel_id, name, language), row in gone.items():
            # As of before the question: one that was made while it was answered is not gone.
            rows.append(_row(tenant_id, channel_id, name, language, row.category, _DELETED, None, heard.asked_at))
        Template.heard(s, rows)
    if gone:
        counts[_DELETED] += len({key[1:] for key in gone})
    return counts


def _known(s: Session, tenant_id: UUID, channel_ids: list[UUID]) -> dict[tuple[UUID, str, str], Template]:
    query = select(Template).where(Template.tenant_id == tenant_id, Template.channel_id.in_(channel_ids))
    return {(row.channel_id, row.name, row.language): row for row in s.scalars(query)}


def _row(
    tenant_id: UUID,
    channel_id: UUID,
    name: str,
    language: str,
    category: str | None,
    status: str,
    reason: str | None,
    at: datetime,
) -> dict[str, Any]:
    return {
        "tenant_id": tenant_id,
        "channel_id": channel_id,
        "name": name,
        "language": language,
        "category": category,
        "status": status,
        "reason": reason,
        "status_at": at,
    }


def _shown(heard: Heard, counts: dict[str, Counter[str]]) -> dict[str, Any]:
    return {
        "waba_id": heard.account.waba_id,
        "channels": sorted(channel.name for channel in heard.account.channels),
        "templates": counts.get(heard.account.waba_id),
        "error": heard.error,
    }


def listing(given: Namespace) -> int:
    tenant = tenant_named(given.tenant)
    query = (
        select(Template, Channel.name)
        .join(Channel, (Channel.tenant_id == Template.tenant_id) & (Channel.id == Template.channel_id))
        .where(Template.tenant_id == tenant.id)
        .order_by(Channel.name, Template.name, Template.language)
    )
    with db.session([tenant.id]) as s:
        rows: list[dict[str, object]] = [
            {
                "channel": channel,
                "name": row.name,
                "language": row.language,
                "category": row.category,
                "status": row.status,
                "reason": row.reason,
                "since": row.status_at.isoformat(timespec="seconds"),
            }
            for row, channel in s.execute(query)
        ]
    as_json(rows) if given.json else table(rows, empty="no templates are known: `pombal template sync` asks Meta")
    return 0
