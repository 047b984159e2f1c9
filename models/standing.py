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
from models.channel import ChannelKind

POLLED = (ChannelKind.MEGAAPI,)  # kinds whose providers are asked how a channel stands
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


def heard(s: Session, given: list[dict[str, Any]], *, is_probe: bool = False) -> list[RowMapping]:
    """What polls found: `tenant_id`, `id`, `asked_at`, `status` (None: not known), `raw`, `reason` (of a status that is
    not known) and `own_id` of each. Returns those for which that was news, with `was` and `was_unknown` (the reason),
    `status`, `unknown_reason` and `status_since`.

    `is_probe`: asked because of an event: the time of the answer is noted even when it is no news, so that a poll that
    was asked earlier cannot undo it.
    """
    if not given:
        return []
    given = sorted(given, key=lambda row: (row["tenant_id"], row["id"]))
    return list(s.execute(_HEARD, given_rows(given) | {"is_probe": is_probe}).mappings())


def find_silent(s: Session) -> list[RowMapping]:
    """Note which connected channels nothing came from or went to for their time, and which are heard again.

    Of the tenants that this session sees. Returns those that changed: `tenant_id`, `id`, `kind`, `silent_since`.
    """
    given = {"kinds": list(POLLED), "hours": _SILENT_HOURS, "most": _LOOKED_AT}
    return list(s.execute(_SILENT, given).mappings())


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

_TOLD = text(f"""
    UPDATE channel AS c SET told_at = greatest(c.told_at, given.at)
    FROM {rows(tenant_id="uuid", id="uuid", at="timestamptz")}
    WHERE (c.tenant_id, c.id) = (given.tenant_id, given.id)
""")

# What a poll without an answer says is only that it had none: it does not make another poll's answer stale.
_HEARD = text(f"""
    WITH locked AS (
        SELECT c.tenant_id, c.id, c.status AS was, c.unknown_reason AS was_unknown, given.asked_at,
            given.status AS said, given.raw, given.reason, given.own_id AS said_id,
            given.status IS DISTINCT FROM c.status AND given.status IS NOT NULL AS is_other,
            given.reason IS DISTINCT FROM c.unknown_reason AS is_other_reason
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
        ORDER BY c.tenant_id, c.id FOR UPDATE OF c
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
        OR l.raw IS DISTINCT FROM c.status_raw OR l.said_id IS DISTINCT FROM c.own_id AND l.said_id IS NOT NULL
    )
    RETURNING c.tenant_id, c.id, c.kind, c.status, c.status_raw, c.status_since, c.unknown_reason, l.was,
        l.was_unknown, l.asked_at, l.is_other OR l.is_other_reason AS is_news
""")

# The latest conversations first: of a channel in use the search ends at once. Being queued is no traffic.
_SILENT = text("""
    WITH judged AS (
        SELECT c.tenant_id, c.id, c.silent_since, hours.is_watched AND c.status = 'connected'
            AND c.status_since < now() - hours.length AND NOT EXISTS (
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
            ) AS is_silent
        FROM channel AS c CROSS JOIN LATERAL (
            SELECT given > 0 AS is_watched, make_interval(secs => 3600 * given) AS length
            FROM (SELECT coalesce(CAST(c.config ->> 'silent_after_hours' AS float8), :hours) AS given) AS given
        ) AS hours
        WHERE c.kind = ANY(:kinds)
    )
    UPDATE channel AS c SET silent_since = CASE WHEN j.is_silent THEN now() END
    FROM judged AS j
    WHERE (c.tenant_id, c.id) = (j.tenant_id, j.id) AND j.is_silent <> (j.silent_since IS NOT NULL)
    RETURNING c.tenant_id, c.id, c.kind, c.silent_since
""")

_IN_STATUSES = text("""
    SELECT kind, CASE WHEN unknown_since IS NOT NULL THEN 'unknown' ELSE coalesce(status, 'unknown') END AS status,
        count(*) AS channels
    FROM channel WHERE kind <> 'meta' GROUP BY 1, 2
""")
