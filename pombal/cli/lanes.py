"""Lanes: how sending goes on each channel, and an operator's word to hold one or to let it go on."""

from argparse import Namespace
from datetime import datetime
from typing import Any
from uuid import UUID

import redis
from sqlalchemy import RowMapping, select
from sqlalchemy.orm import Session

from models import Channel, Event, Hold, Lane, Tenant
from pombal import db
from pombal.cli import as_json, say, table
from pombal.cli.admin import Refused, channel_named, tenant_named

_LONGEST_REASON = 500


def lanes(given: Namespace) -> int:
    """One row for each channel that ever had something to send."""
    if given.tenant:
        with db.session([tenant_named(given.tenant).id]) as s:
            rows = _rows(s)
    else:
        with db.session() as s:
            db.see_all(s)
            rows = _rows(s)
    if given.json:
        as_json(rows)
    else:
        table([_line(row) for row in rows], empty="no lanes: nothing was ever to be sent")
    return 0


def _rows(s: Session) -> list[dict[str, Any]]:
    slugs = {row.id: row.slug for row in s.execute(select(Tenant.id, Tenant.slug))}
    sent = Lane.sent_lately(s)
    found = [shown(row) | {"tenant": slugs[row["tenant_id"]]} for row in Lane.overview(s)]
    for row in found:
        row["sent_last_minute"] = sent.get(row["id"], 0)
        row["per_second"] = round(row["sent_last_minute"] / 60, 2)
    return sorted(found, key=lambda row: (row["tenant"], row["channel"]))


def shown(row: RowMapping) -> dict[str, Any]:
    """One lane of `Lane.overview` for operators."""
    hold = {
        "kind": row["hold"],
        "code": row["hold_code"],
        "text": row["hold_reason"],
        "since": row["held_at"],
        "probes": row["probes"],
        "next_probe_at": row["next_probe_at"] if row["hold"] != Hold.OPERATOR else None,
    }
    return {
        "tenant": None,
        "channel": row["name"],
        "id": row["channel_id"],
        "state": row["state"],
        "queued": row["queued"],
        "scheduled": row["scheduled"],
        "sending": row["sending"],
        "unknown": row["unknown"],
        "oldest_seconds": None if row["oldest_queued"] is None else round(row["oldest_queued"], 1),
        "sent_last_minute": None,
        "per_second": None,
        "hold": hold if row["hold"] else None,
        "paused_until": row["paused_until"],
        "pause_code": row["pause_code"],
        "pace": row["pace"],
        "lease_seconds": None if row["lease"] is None else round(row["lease"], 1),
    }


def _line(row: dict[str, Any]) -> dict[str, object]:
    """The same for a terminal's width."""
    oldest, lease = row["oldest_seconds"], row["lease_seconds"]
    return {
        "channel": f"{row['tenant']}/{row['channel']}",  # as `hold` and `resume` take it
        "id": row["id"].hex[-8:],
        "state": row["state"],
        "queued": row["queued"],
        "scheduled": row["scheduled"],
        "sending": row["sending"],
        "unknown": row["unknown"],
        "oldest": None if oldest is None else f"{oldest:.0f}s",
        "rate": f"{row['per_second']:g}/s",
        "pace": f"{row['pace']:.0%}",
        "lease": None if lease is None else f"{lease:.0f}s",
        "why": _why(row),
    }


def _why(row: dict[str, Any]) -> str:
    """What keeps it from sending."""
    parts = []
    if hold := row["hold"]:
        code = f" {hold['code']}" if hold["code"] else ""
        parts.append(f"{hold['kind']}{code} since {_minute(hold['since'])}: {hold['text']}")
        if hold["next_probe_at"]:
            parts.append(f"{hold['probes']} probes, next {_minute(hold['next_probe_at'])}")
    if row["paused_until"]:
        parts.append(f"paused until {_minute(row['paused_until'])} by {row['pause_code']}")
    return "; ".join(parts)


def _minute(at: datetime) -> str:
    return at.isoformat(timespec="seconds")


def hold(given: Namespace) -> int:
    """Nothing is sent any more until `resume`; what is queued waits, what is under way ends."""
    reason = " ".join((given.reason or "held by an operator").split())
    if len(reason) > _LONGEST_REASON:
        raise Refused(f"--reason has more than {_LONGEST_REASON} characters")
    tenant_id, channel_id = _channel(given.channel)
    with db.session([tenant_id]) as s:
        Lane.ensure(s, tenant_id, channel_id)
        Lane.lock(s, [channel_id])
        is_news = Lane.set_hold(s, channel_id, Hold.OPERATOR, code=None, reason=reason)
        if is_news:
            payload = {"hold": Hold.OPERATOR, "code": None}
            Event.append(s, [Event.row("channel_held", tenant_id, channel_id, None, payload)])
    say("held" if is_news else "an operator holds it already")
    return 0


def resume(given: Namespace) -> int:
    """End any hold or pause, whoever set it, and send again."""
    tenant_id, channel_id = _channel(given.channel)
    with db.session([tenant_id]) as s:
        Lane.ensure(s, tenant_id, channel_id)
        Lane.lock(s, [channel_id])
        is_news = Lane.resume(s, channel_id)
        if is_news:
            Event.append(s, [Event.row("channel_resumed", tenant_id, channel_id, None, {})])
    ring(channel_id)
    say("resumed" if is_news else "nothing held it")
    return 0


def ring(*channel_ids: UUID) -> None:
    """Have these lanes worked on at once. Without Redis the sweep does it later, so that is no failure."""
    from workers.outgoing_message import ring as ring_one  # imports the fleet

    try:
        for channel_id in channel_ids:
            ring_one(channel_id)
    except redis.RedisError:
        say("Redis is away: the sweep rings when it is back")


def _channel(name: str) -> tuple[UUID, UUID]:
    """The tenant's and the channel's id, by `TENANT/NAME` or by the channel's id."""
    slug, slash, rest = name.partition("/")
    if slash:
        channel = channel_named(tenant_named(slug), rest)
        return channel.tenant_id, channel.id
    try:
        id_ = UUID(name)
    except ValueError:
        raise Refused(f"{name} is neither a channel's id nor TENANT/NAME") from None
    with db.session() as s:
        db.see_all(s)
        row = s.execute(select(Channel.tenant_id, Channel.id).where(Channel.id == id_)).first()
    if row is None:
        raise Refused("there is no such channel")
    return row.tenant_id, row.id
