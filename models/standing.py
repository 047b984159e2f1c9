"""How a channel's session stands: what a poll or a webhook makes of the columns `status…` of `channel`.

A poll tells how things stood when it was *asked* (`asked_at`, by the database's clock). It changes nothing unless that
is newer than whatever we believe already, so neither a slow answer nor two polls at once can turn the clock back; a
webhook makes every poll that was asked before it stale (security-reliability.md Y3). Of webhooks that come faster than
answers, the first without one does, or no answer would ever count; a check asked after the last of them follows.
A poll without a usable answer leaves the status as it was and notes since when it is unknown (Y1). Only what is news is
written.
"""

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import RowMapping, text
from sqlalchemy.orm import Session

from models.base import given_rows, rows
from models.channel import ChannelKind, ChannelStatus
from models.message import TRAFFIC, TRAFFIC_AT

POLLED = (ChannelKind.MEGAAPI, ChannelKind.BAILEYS)  # kinds whose providers are asked how a channel stands
# Reasons of a status that is not known, beside what a call may come to (`providers.instance.FAULTS`).
ODD = "odd_answer"  # an answer that says neither, such as an unknown word
NOT_REACHED = "not_reached"  # the time was over, or its host given up, before there was an answer
_SILENT_HOURS = 24.0  # unless the channel says otherwise (`silent_after_hours`; 0: never)
_TOLD_FIRST = timedelta(seconds=60)  # that later webhooks make no poll stale that was asked after the first of them


def polled(s: Session, *, tenant_id: UUID | None = None, channel_id: UUID | None = None) -> list[RowMapping]:
    """The channels that can be asked about, of the tenants that this session sees: their ids, `kind`, `name`, `config`,
    `sealed` and what we believe of them, and `now` on the database's clock."""
    given = {"kinds": list(POLLED), "tenant_id": tenant_id, "channel_id": channel_id}
    return list(s.execute(_POLLED, given).mappings())


def told(s: Session, keys: list[tuple[UUID, UUID, datetime]]) -> None:
    """`(tenant, channel, at)`: the provider said by itself that something changed. Older polls count no more.

    While it goes on and on, those count that are older than the last time, but not than the first that has no answer.
    """
    if keys:
        latest: dict[tuple[UUID, UUID], datetime] = {}
        for tenant_id, channel_id, at in keys:
            latest[(tenant_id, channel_id)] = max(at, latest.get((tenant_id, channel_id), at))
        given = [{"tenant_id": t, "id": c, "at": at} for (t, c), at in sorted(latest.items())]
        s.execute(_TOLD, given_rows(given) | {"first": _TOLD_FIRST})


def take_check(s: Session, channel_id: UUID, length: timedelta, *, is_again: bool = False) -> RowMapping | None:
    """Have a channel to ask about it because of what it told: a row as of `polled`, with `check_at`.

    None when that is not needed: somebody is at it, or asked after the last time that it told something, whatever came
    of that. `is_again`: that one had no answer. For so long nobody else has it, or until `leave_check`.
    """
    given = {"kinds": list(POLLED), "id": channel_id, "length": length, "is_again": is_again}
    return s.execute(_TAKE_CHECK, given).mappings().first()


def leave_check(s: Session, taken: RowMapping, wait: timedelta | None = None) -> bool:
    """Let others check it, now or after so long; True when it told something since it was taken."""
    given = {"tenant_id": taken["tenant_id"], "id": taken["id"], "check_at": taken["check_at"], "wait": wait}
    return bool(s.scalar(_LEAVE_CHECK, given))


def shown(status: str | None, unknown_reason: str | None) -> str:
    """One word for how a channel stands: what is not known now is unknown, whatever it was before."""
    return status if status is not None and unknown_reason is None else ChannelStatus.UNKNOWN


def is_overtaken(row: RowMapping, asked_at: datetime) -> bool:
    """Whether we believe something newer of this channel (a row of `polled`) than what was asked then."""
    first, status_at = row["told_first_at"], row["status_at"]
    is_first_open = first is not None and (status_at is None or first > status_at)
    told_at = first if is_first_open else row["told_at"]
    return any(at is not None and at >= asked_at for at in (status_at, told_at))


def is_news(
    row: RowMapping, *, asked_at: datetime, status: str | None, raw: str, reason: str | None, own_id: str | None
) -> bool:
    """Whether `heard` would write this down, as far as a row of `polled` tells: it keeps a quiet round from writing."""
    if is_overtaken(row, asked_at):
        return False
    if status is None:  # what a host says in place of an answer may differ each time: an error page has its own number
        says_less = reason == NOT_REACHED and row["unknown_reason"] is not None
        return (reason != row["unknown_reason"] and not says_less) or (reason == ODD and raw != row["status_raw"])
    is_other_number = own_id is not None and own_id != row["own_id"]
    was = (row["status"], row["unknown_reason"], row["status_raw"])
    return was != (status, None, raw) or is_other_number


def heard(s: Session, given: list[dict[str, Any]], *, is_probe: bool = False) -> list[RowMapping]:
    """What polls found: `tenant_id`, `id`, `asked_at`, `status` (None: not known), `raw`, `reason` (of a status that is
    not known) and `own_id` of each. Returns those that were written down, with `was` and `was_unknown` (the reason),
    `status`, `unknown_reason`, `status_since`, and `is_other`: its status is not what it was.

    `is_probe`: asked because of an event: the time of the answer is noted even when it is no news, so that a poll that
    was asked earlier cannot undo it.
    """
    if not given:
        return []
    given = sorted(given, key=lambda row: (row["tenant_id"], row["id"]))
    return list(s.execute(_HEARD, given_rows(given) | {"is_probe": is_probe}).mappings())


def find_silent(s: Session) -> list[RowMapping]:
    """Note which connected channels nothing came from or went to for their time, and which are heard again.

    Of the tenants that this session sees. Returns those that changed: `tenant_id`, `id`, `kind`, `silent_since`. While
    it is not known whether a channel is connected, nothing is said of it.
    """
    given = {"kinds": list(POLLED), "hours": _SILENT_HOURS}
    return list(s.execute(_SILENT, given).mappings())


def held_in_vain(s: Session) -> list[tuple[UUID, UUID]]:
    """(tenant, channel) of connected channels whose lane is held because they were not: whoever set the hold may have
    read the status just before it changed."""
    return [(row.tenant_id, row.channel_id) for row in s.execute(_HELD_IN_VAIN)]


def last_traffic(s: Session, tenant_id: UUID, ids: list[UUID]) -> dict[UUID, datetime | None]:
    """When a message last came in or left, of each of these channels."""
    return {row.id: row.at for row in s.execute(_LAST_TRAFFIC, {"tenant_id": tenant_id, "ids": ids})}


def in_statuses(s: Session) -> list[tuple[str, str, int]]:
    """`(kind, status, channels)` over the tenants that this session sees; one whose polls fail counts as unknown."""
    return [(row.kind, row.status, row.channels) for row in s.execute(_IN_STATUSES)]


def silent_count(s: Session) -> int:
    return int(s.scalar(text("SELECT count(*) FROM channel WHERE silent_since IS NOT NULL")) or 0)


_POLL = """
    tenant_id, id, kind, name, config, sealed, status, status_raw, status_at, status_since, told_at, told_first_at,
    unknown_since, unknown_reason, silent_since, own_id, clock_timestamp() AS now
"""
_POLLED = text(f"""
    SELECT {_POLL} FROM channel
    WHERE kind = ANY(:kinds) AND (CAST(:tenant_id AS uuid) IS NULL OR tenant_id = :tenant_id)
        AND (CAST(:channel_id AS uuid) IS NULL OR id = :channel_id)
    ORDER BY tenant_id, id
""")

# Locks are taken in the order of the keys, so that two batches cannot wait for each other, and are none that a foreign
# key's check would wait for: whoever stores a message may have a lane that we want next.
_TOLD = text(f"""
    WITH locked AS (
        SELECT c.tenant_id, c.id, given.at
        FROM {rows(tenant_id="uuid", id="uuid", at="timestamptz")}
        JOIN channel AS c ON (c.tenant_id, c.id) = (given.tenant_id, given.id)
        WHERE c.told_at IS NULL OR c.told_at < given.at
        ORDER BY c.tenant_id, c.id FOR NO KEY UPDATE OF c
    )
    UPDATE channel AS c SET told_at = greatest(c.told_at, l.at), told_first_at = CASE
        WHEN c.told_first_at > greatest(c.status_at, l.at - CAST(:first AS interval)) THEN c.told_first_at
        WHEN c.told_at > greatest(c.status_at, l.at - CAST(:first AS interval)) THEN c.told_at
        ELSE l.at
    END
    FROM locked AS l WHERE (c.tenant_id, c.id) = (l.tenant_id, l.id)
""")

# One that is taken and not left in its time had its process die.
_TAKE_CHECK = text(f"""
    UPDATE channel SET check_at = clock_timestamp(), check_until = clock_timestamp() + CAST(:length AS interval)
    WHERE id = :id AND kind = ANY(:kinds) AND (check_until IS NULL OR check_until <= now()) AND (
        told_at IS NULL OR told_at > coalesce(status_at, '-infinity')
            AND (check_until IS NOT NULL OR :is_again OR told_at > coalesce(check_at, '-infinity'))
    )
    RETURNING {_POLL}, check_at
""")

_LEAVE_CHECK = text("""
    UPDATE channel SET check_until = clock_timestamp() + CAST(:wait AS interval)
    WHERE (tenant_id, id) = (:tenant_id, :id) AND check_at = :check_at
    RETURNING told_at > greatest(check_at, status_at)
""")

# What a poll without an answer says is only that it had none: it does not make another poll's answer stale. `is_news`
# says the same of what is worth writing.
_HEARD = text(f"""
    WITH locked AS (
        SELECT c.tenant_id, c.id, c.status AS was, c.unknown_reason AS was_unknown, given.asked_at,
            given.status AS said, given.raw, given.reason, given.own_id AS said_id,
            given.status IS DISTINCT FROM c.status AND given.status IS NOT NULL AS is_other,
            given.reason IS DISTINCT FROM c.unknown_reason
                AND (given.reason IS DISTINCT FROM '{NOT_REACHED}' OR c.unknown_reason IS NULL) AS is_other_reason
        FROM {
    rows(
        tenant_id="uuid",
        id="uuid",
        asked_at="timestamptz",
        status="text",
        raw="text",
        reason="text",
        own_id="text",
    )
}
        JOIN channel AS c ON (c.tenant_id, c.id) = (given.tenant_id, given.id)
        WHERE given.asked_at > coalesce(greatest(c.status_at, CASE
            WHEN c.told_first_at > coalesce(c.status_at, '-infinity') THEN c.told_first_at ELSE c.told_at
        END), '-infinity')
        ORDER BY c.tenant_id, c.id FOR NO KEY UPDATE OF c
    )
    UPDATE channel AS c SET
        status = coalesce(l.said, c.status),
        status_raw = l.raw,
        status_at = CASE WHEN l.said IS NULL THEN c.status_at ELSE l.asked_at END,
        status_since = CASE WHEN l.is_other THEN l.asked_at ELSE c.status_since END,
        unknown_since = CASE WHEN l.said IS NOT NULL THEN NULL ELSE coalesce(c.unknown_since, l.asked_at) END,
        unknown_reason = l.reason,
        silent_since = CASE WHEN l.is_other THEN NULL ELSE c.silent_since END,
        own_id = coalesce(l.said_id, c.own_id)
    FROM locked AS l
    WHERE (c.tenant_id, c.id) = (l.tenant_id, l.id) AND (
        l.is_other OR l.is_other_reason OR :is_probe AND l.said IS NOT NULL
        OR l.raw IS DISTINCT FROM c.status_raw AND (l.said IS NOT NULL OR l.reason = '{ODD}')
        OR l.said_id IS DISTINCT FROM c.own_id AND l.said_id IS NOT NULL
    )
    RETURNING c.tenant_id, c.id, c.kind, c.name, c.status, c.status_raw, c.status_since, c.unknown_reason, l.was,
        l.was_unknown, l.asked_at, l.is_other
""")

# Of the channel `c`, by the index that is made for it: in this order no other plan is near it, whatever the statistics
# say, and it costs the same with any number of messages.
_TRAFFIC_OF = f"""
    SELECT {TRAFFIC_AT} FROM message AS m
    WHERE m.tenant_id = c.tenant_id AND m.channel_id = c.id AND ({TRAFFIC}) ORDER BY {TRAFFIC_AT} DESC LIMIT 1
"""

_SILENT = text(f"""
    WITH c AS MATERIALIZED (
        SELECT tenant_id, id, kind, silent_since, unknown_since, status = 'connected' AND hours > 0 AS is_watched,
            status_since, now() - make_interval(secs => 3600 * hours) AS begin
        FROM channel CROSS JOIN LATERAL (
            SELECT CASE jsonb_typeof(config -> 'silent_after_hours')
                WHEN 'number' THEN least(CAST(config ->> 'silent_after_hours' AS float8), 1e6) ELSE :hours
            END AS hours
        ) AS hours
        WHERE kind = ANY(:kinds)
    ), judged AS (
        SELECT tenant_id, id, silent_since, CASE
            WHEN unknown_since IS NOT NULL THEN silent_since IS NOT NULL
            WHEN is_watched AND status_since < begin THEN coalesce(({_TRAFFIC_OF}) <= begin, true)
            ELSE false
        END AS is_silent
        FROM c
    ), locked AS (
        SELECT c.tenant_id, c.id, j.is_silent
        FROM judged AS j JOIN channel AS c ON (c.tenant_id, c.id) = (j.tenant_id, j.id)
        WHERE j.is_silent <> (j.silent_since IS NOT NULL)
        ORDER BY c.tenant_id, c.id FOR NO KEY UPDATE OF c
    )
    UPDATE channel AS c SET silent_since = CASE WHEN l.is_silent THEN now() END
    FROM locked AS l WHERE (c.tenant_id, c.id) = (l.tenant_id, l.id) AND l.is_silent <> (c.silent_since IS NOT NULL)
    RETURNING c.tenant_id, c.id, c.kind, c.silent_since
""")

_LAST_TRAFFIC = text(f"""
    SELECT c.id, ({_TRAFFIC_OF}) AS at
    FROM unnest(CAST(:ids AS uuid[])) AS given (id) JOIN channel AS c ON (c.tenant_id, c.id) = (:tenant_id, given.id)
""")

_HELD_IN_VAIN = text("""
    SELECT l.tenant_id, l.channel_id
    FROM lane AS l JOIN channel AS c ON (c.tenant_id, c.id) = (l.tenant_id, l.channel_id)
    WHERE l.hold = 'disconnected' AND c.status = 'connected' ORDER BY l.tenant_id, l.channel_id
""")

_IN_STATUSES = text("""
    SELECT kind, CASE WHEN unknown_since IS NOT NULL THEN 'unknown' ELSE coalesce(status, 'unknown') END AS status,
        count(*) AS channels
    FROM channel WHERE kind <> 'meta' GROUP BY 1, 2
""")
