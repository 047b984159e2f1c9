"""Lanes: how sending goes on each channel, and an operator's word to hold one or to let it go on."""

import re
import shutil
import sys
from argparse import Namespace
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import redis
from sqlalchemy import RowMapping, func, select
from sqlalchemy.orm import Session

from models import Channel, DeadLetter, Event, Hold, Lane, Message, MessageStatus, Tenant
from models.dead_letter import LetterState
from pombal import db
from pombal.cli import as_json, say, table
from pombal.cli.admin import Refused, channel_named, channel_with_id, tenant_named

_LONGEST_REASON = 500
_USUAL_RATE = 80.0  # messages a second of a number whose channel says nothing else (whatsapp-cloud-api.md §10)
_NO_SUCH_OBJECT = "100"  # as a hold: the number is not there for this token (§13)


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
        table([_line(row) for row in rows], empty="no lanes: nothing was ever to be sent", width=_width())
    return 0


def _rows(s: Session) -> list[dict[str, Any]]:
    slugs = {row.id: row.slug for row in s.execute(select(Tenant.id, Tenant.slug))}
    sent, more = Lane.sent_lately(s), _more(s)
    found = [
        shown(row, more[row["channel_id"]]) | {"tenant": slugs[row["tenant_id"]]}
        for row in Lane.overview(s)
        if row["channel_id"] in more
    ]
    for row in found:
        row["sent_last_minute"] = sent.get(row["id"], 0)
        row["per_second"] = round(row["sent_last_minute"] / 60, 2)
    return sorted(found, key=lambda row: (row["tenant"], row["channel"]))


class More(NamedTuple):
    """What else an operator asks about a lane.

    rate      messages a second that its number is allowed; None for what all are
    misses    points in a row that speak for an outage
    slowed_by the code of the last pause
    asked     unknown messages that wait for an operator: each has an open dead letter
    """

    rate: float | None
    misses: int
    slowed_by: str | None
    asked: int


def _more(s: Session) -> dict[UUID, More]:
    waits = (DeadLetter.state == LetterState.OPEN, Message.status == MessageStatus.UNKNOWN)
    letters = select(Message.channel_id, func.count()).join(
        DeadLetter, (DeadLetter.tenant_id == Message.tenant_id) & (DeadLetter.message_id == Message.id)
    )
    asked = {channel_id: count for channel_id, count in s.execute(letters.where(*waits).group_by(Message.channel_id))}
    query = select(Lane.channel_id, Lane.misses, Lane.pause_code, Channel.config).join(
        Channel, (Channel.tenant_id == Lane.tenant_id) & (Channel.id == Lane.channel_id)
    )
    return {
        row.channel_id: More(
            row.config.get("messages_per_second"), row.misses, row.pause_code, asked.get(row.channel_id, 0)
        )
        for row in s.execute(query)
    }


def shown(row: RowMapping, more: More) -> dict[str, Any]:
    """One lane of `Lane.overview` for operators."""
    hold = {
        "kind": row["hold"],
        "code": row["hold_code"],
        "text": row["hold_reason"],
        "since": row["held_at"],
        "probes": row["probes"],
        "next_probe_at": row["next_probe_at"] if row["hold"] not in (Hold.OPERATOR, Hold.DISCONNECTED) else None,
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
        "unknown_for_operator": more.asked,
        "oldest_seconds": None if row["oldest_queued"] is None else round(row["oldest_queued"], 1),
        "sent_last_minute": None,
        "per_second": None,
        "messages_per_second": _USUAL_RATE if more.rate is None else more.rate,
        "hold": hold if row["hold"] else None,
        "paused_until": row["paused_until"],
        "pause_code": row["pause_code"],
        "last_pause_code": more.slowed_by,
        "pace": row["pace"],
        "misses": more.misses,
        "lease_seconds": None if row["lease"] is None else round(row["lease"], 1),
    }


def _line(row: dict[str, Any]) -> dict[str, object]:
    """The same for a terminal's width."""
    oldest, rate = row["oldest_seconds"], row["messages_per_second"]
    return {
        "channel": f"{row['tenant']}/{row['channel']}",  # as `hold` and `resume` take it, and the next one too
        "id": row["id"].hex[-8:],
        "state": row["state"],
        "queued": row["queued"],
        "scheduled": row["scheduled"],
        "sending": row["sending"],
        "unknown": row["unknown"],
        "oldest": None if oldest is None else f"{oldest:.0f}s",
        "rate": f"{row['per_second']:g}/s" + ("" if rate == _USUAL_RATE else f" of {rate:g}"),
        "why": _why(row),
    }


def _why(row: dict[str, Any]) -> str:
    """What keeps it from sending, or from sending as fast as it may; the provider's own words come last."""
    parts, last = [], ""
    if hold := row["hold"]:
        code = f" {hold['code']}" if hold["code"] else ""
        doubt = " (or the phone_number_id is wrong)" if hold["code"] == _NO_SUCH_OBJECT else ""
        parts.append(f"{hold['kind']}{code} since {_minute(hold['since'])}{doubt}")
        if hold["next_probe_at"]:
            parts.append(f"{hold['probes']} probes, next {_minute(hold['next_probe_at'])}")
        last = f" — {hold['text']}"
    if row["paused_until"]:
        parts.append(f"paused until {_minute(row['paused_until'])} by {row['pause_code']}")
    if row["unknown_for_operator"]:
        parts.append(f"{row['unknown_for_operator']} unknown: see `pombal dead list`")
    if row["misses"] and not hold:
        parts.append(f"no good answer to the last calls (misses: {row['misses']}): few at a time")
    if row["pace"] < 1:
        cause = f" after {row['last_pause_code']}" if row["last_pause_code"] else ""
        parts.append(f"at {row['pace']:.0%} of its rate{cause}, rising")
    return "; ".join(parts) + last


def _minute(at: datetime) -> str:
    return at.isoformat(timespec="seconds")


def _width() -> int | None:
    """Of the terminal; None where the output goes to a file or another program, which gets all of it."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def hold(given: Namespace) -> int:
    """Nothing is sent any more until `resume`; what is queued waits, what is under way ends."""
    reason = " ".join((given.reason or "held by an operator").split())
    if len(reason) > _LONGEST_REASON:
        raise Refused(f"--reason has more than {_LONGEST_REASON} characters")
    tenant_id, channel_id = channel_ids(given.channel)
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
    tenant_id, channel_id = channel_ids(given.channel)
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


def channel_ids(name: str) -> tuple[UUID, UUID]:
    """The tenant's and the channel's id, by `TENANT/NAME`, by the channel's id, or by the beginning or end of it."""
    slug, slash, rest = name.partition("/")
    if slash:
        channel = channel_named(tenant_named(slug), rest)
        return channel.tenant_id, channel.id
    if not re.fullmatch(r"[0-9A-Fa-f-]{4,36}", name):
        raise Refused(f"{name} is neither a channel's id nor TENANT/NAME")
    with db.session() as s:
        db.see_all(s)
        found = channel_with_id(s, name)
    if found is None:
        raise Refused("there is no such channel")
    return found.tenant_id, found.id
