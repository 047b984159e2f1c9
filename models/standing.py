"""How a channel's session stands: what a poll or a webhook makes of the columns `status…` of `channel`.

A poll tells how things stood when it was *asked* (`asked_at`, by the database's clock). It changes nothing unless that
is newer than whatever we believe already, so neither a slow answer nor two polls at once can turn the clock back; a
webhook makes every poll that was asked before it stale (security-reliability.md Y3). A poll without a usable answer
leaves the status as it was and notes since when it is unknown (Y1). Only what is news is written.
"""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import RowMapping, text
from sqlalchemy.orm import Session

from models.base import given_rows, rows
from models.channel import ChannelKind, ChannelStatus

POLLED = (ChannelKind.MEGAAPI,)  # kinds whose providers are asked how a channel stands
# Reasons of a status that is not known, beside what a call may come to (`providers.instance.FAULTS`).
ODD = "odd_answer"  # an answer that says neither, such as an unknown word
NOT_REACHED = "not_reached"  # the time was over, or its host given up, before there was an answer
_SILENT_HOURS = 24.0  # unless the channel says otherwise (`silent_after_hours`; 0: never)
_LOOKED_AT = 200  # latest conversations of a channel that are searched for traffic


def polled(s: Session, *, tenant_id: UUID | None = None, channel_id: UUID | None = None) -> list[RowMapping]:
    """The channels that can be asked about, of the tenants that this session sees: their ids, `kind`, `name`, `config`,
    `sealed` and what we believe of them, and `now` on the database's clock."""
    given = {"kinds": list(POLLED), "tenant_id": tenant_id, "channel_id": channel_id}
    return list(s.execute(_POLLED, given).mappings())


def told(s: Session, keys: list[tuple[UUID, UUID, datetime]]) -> None:
    """`(tenant, channel, at)`: the provider said by itself that something changed. Older polls count no more."""
    if keys:
        latest: dict[tuple[UUID, UUID], datetime] = {}
        for tenant_id, channel_id, at in keys:
            latest[(tenant_id, channel_id)] = max(at, latest.get((tenant_id, channel_id), at))
        given = [{"tenant_id": t, "id": c, "at": at} for (t, c), at in sorted(latest.items())]
        s.execute(_TOLD, given_rows(given))


def shown(status: str | None, unknown_reason: str | None) -> str:
    """One word for how a channel stands: what is not known now is unknown, whatever it was before."""
    return status if status is not None and unknown_reason is None else ChannelStatus.UNKNOWN


def is_overtaken(row: RowMapping, asked_at: datetime) -> bool:
    """Whether we believe something newer of this channel (a row of `polled`) than what was asked then."""
    return any(at is not None and at >= asked_at for at in (row["status_at"], row["told_at"]))


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
    given = {"kinds": list(POLLED), "hours": _SILENT_HOURS, "most": _LOOKED_AT}
    return list(s.execute(_SILENT, given).mappings())


def held_in_vain(s: Session) -> list[tuple[UUID, UUID]]:
    """(tenant, channel) of connected channels whose lane is held because they were not: whoever set the hold may have
    read the status just before it changed."""
    return [(row.tenant_id, row.channel_id) for row in s.execute(_HELD_IN_VAIN)]


def in_statuses(s: Session) -> list[tuple[str, str, int]]:
    """`(kind, status, channels)` over the tenants that this session sees; one whose polls fail counts as unknown."""
    return [(row.kind, row.status, row.channels) for row in s.execute(_IN_STATUSES)]


def silent_count(s: Session) -> int:
    return int(s.scalar(text("SELECT count(*) FROM channel WHERE silent_since IS NOT NULL")) or 0)


_POLLED = text("""
    SELECT tenant_id, id, kind, name, config, sealed, status, status_raw, status_at, status_since, told_at,
        unknown_since, unknown_reason, silent_since, own_id, clock_timestamp() AS now
    FROM channel
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
    UPDATE channel AS c SET told_at = greatest(c.told_at, l.at)
    FROM locked AS l WHERE (c.tenant_id, c.id) = (l.tenant_id, l.id)
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
        WHERE given.asked_at > coalesce(greatest(c.status_at, c.told_at), '-infinity')
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

# The latest conversations first: of a channel in use the search ends at once. Being queued is no traffic.
_SILENT = text("""
    WITH judged AS (
        SELECT c.tenant_id, c.id, CASE
            WHEN c.unknown_since IS NOT NULL THEN c.silent_since IS NOT NULL
            ELSE hours.is_watched AND c.status = 'connected' AND c.status_since < now() - hours.length AND NOT EXISTS (
                SELECT FROM (
                    SELECT id FROM conversation AS o
                    WHERE o.tenant_id = c.tenant_id AND o.channel_id = c.id AND o.last_message_at > now() - hours.length
                    ORDER BY o.last_message_at DESC LIMIT :most
                ) AS o CROSS JOIN LATERAL (
                    SELECT FROM message AS m
                    WHERE m.tenant_id = c.tenant_id AND m.conversation_id = o.id
                        AND (m.direction = 'in' OR m.sent_at IS NOT NULL) AND m.created_at > now() - hours.length
                    LIMIT 1
                ) AS m
            )
        END AS is_silent
        FROM channel AS c CROSS JOIN LATERAL (
            SELECT given > 0 AS is_watched, make_interval(secs => 3600 * given) AS length
            FROM (
                SELECT CASE jsonb_typeof(c.config -> 'silent_after_hours')
                    WHEN 'number' THEN least(CAST(c.config ->> 'silent_after_hours' AS float8), 1e6) ELSE :hours
                END AS given
            ) AS given
        ) AS hours
        WHERE c.kind = ANY(:kinds)
    ), locked AS (
        SELECT c.tenant_id, c.id, j.is_silent
        FROM judged AS j JOIN channel AS c ON (c.tenant_id, c.id) = (j.tenant_id, j.id)
        WHERE j.is_silent <> (c.silent_since IS NOT NULL)
        ORDER BY c.tenant_id, c.id FOR NO KEY UPDATE OF c
    )
    UPDATE channel AS c SET silent_since = CASE WHEN l.is_silent THEN now() END
    FROM locked AS l WHERE (c.tenant_id, c.id) = (l.tenant_id, l.id)
    RETURNING c.tenant_id, c.id, c.kind, c.silent_since
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
