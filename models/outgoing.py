"""The line of a channel's outgoing messages: how `message` rows move through it.

In a conversation one message is first: the one whose turn began earliest (`turn_at`, then the id). The others wait
behind it without a date (`due_at` NULL) once the lane has come across them, and get their date back when the one before
them leaves the line. So a recipient who must be waited for costs the lane nothing, however many messages wait for them.

All of it needs the lane's lock (`models/lane.py`) and a transaction that sees the tenant. Due times are compared on the
database's clock.
"""

import copy
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import RowMapping, text
from sqlalchemy.orm import Session

from models.base import given_rows, rows
from models.event import Event
from models.lane import Lane
from models.message import IN_LINE, MessageStatus, is_id


def due(s: Session, tenant_id: UUID, channel_id: UUID, most: int) -> tuple[list[RowMapping], bool]:
    """What the lane may do next, the oldest first: queued messages that are first in their conversation.

    Sets the others behind the first one. Also returns whether there was more to look at than `most`.
    """
    found = s.execute(_DUE, {"tenant_id": tenant_id, "channel_id": channel_id, "most": most})
    rows = sorted(found.mappings(), key=lambda row: (row["due_at"], row["id"]))
    return [row for row in rows if not row["is_behind"]], len(rows) == most


def overdue(s: Session, tenant_id: UUID, channel_id: UUID) -> list[RowMapping]:
    """Unknown messages whose wait for a status is over; each is returned until somebody decides."""
    found = s.execute(_OVERDUE, {"tenant_id": tenant_id, "channel_id": channel_id})
    return list(found.mappings())


def put(s: Session, tenant_id: UUID, given: list[dict[str, Any]]) -> list[RowMapping]:
    """Give messages a new place: back into the line, failed, or unknown. Returns those that were still ours to move.

    Each row: `id`, `attempt_id` (it must still be the message's), `status`, `delay` in seconds (0: at once, at its old
    place; None: no date), what to add to `tries`, `throttles` and `unknowns`, `error_code`, `error`.
    """
    if not given:
        return []
    return list(s.execute(_PUT, _named(tenant_id, given)).mappings())


def adopt(s: Session, tenant_id: UUID, given: list[dict[str, Any]]) -> list[RowMapping]:
    """The provider accepted these messages (`id`, `attempt_id`, `provider_id` or None for a receipt): they are sent.

    Returns the messages with `is_adopted` and, of those that were not, the `provider_id` that they have: such a one had
    been accepted before, by another attempt, or under an id that another message has.
    """
    if not given:
        return []
    ids = {row["provider_id"]: row["id"] for row in reversed(given)}
    given = [row for row in given if row["provider_id"] is None or ids[row["provider_id"]] == row["id"]]
    return list(s.execute(_ADOPT, _named(tenant_id, given)).mappings())


def fold_echoes(s: Session, tenant_id: UUID, given: list[dict[str, Any]]) -> list[RowMapping]:
    """Echoes that came before the answers of these sends, and were not known for ours, make room for them.

    Rows as for `adopt`, which follows. Returns `tenant_id`, `channel_id`, `id` of the message and `echo_id` of each.
    """
    if not given:
        return []
    return list(s.execute(_FOLD_ECHOES, _named(tenant_id, given)).mappings())


def delay(s: Session, tenant_id: UUID, waits: dict[UUID, float]) -> None:
    """Queued messages that have to wait for so many seconds: their recipient has had as many as may be sent."""
    if waits:
        given = [{"id": id_, "delay": seconds} for id_, seconds in waits.items()]
        s.execute(_DELAY, _named(tenant_id, given))


def set_aside(s: Session, tenant_id: UUID, ids: list[UUID], seconds: float) -> None:
    """Queued messages whose files go up first. Whoever does that brings them back; if it dies, this time does."""
    delay(s, tenant_id, dict.fromkeys(ids, seconds))


def bring_back(s: Session, tenant_id: UUID, ids: list[UUID]) -> None:
    """What was set aside takes its old place again."""
    if ids:
        s.execute(_BRING_BACK, {"tenant_id": tenant_id, "ids": ids})


def refused_before(s: Session, tenant_id: UUID, ids: list[UUID]) -> set[UUID]:
    """Those of these messages that the provider has refused for good more than once: they were tried again after it."""
    if not ids:
        return set()
    return set(s.execute(_REFUSED_BEFORE, {"tenant_id": tenant_id, "ids": ids}).scalars())


def wake(s: Session, tenant_id: UUID, conversation_ids: set[UUID]) -> None:
    """Somebody left the line in these conversations: whoever is next gets their date back."""
    if conversation_ids:
        s.execute(_WAKE, {"tenant_id": tenant_id, "conversations": sorted(conversation_ids)})


def wake_forgotten(s: Session) -> list[UUID]:
    """Lanes with something due that nobody would ever come for: there should be none. Returns their channels.

    Either a conversation's first message waits behind nobody, or its lane has no date. Must see every tenant. The rules
    are kept by everybody who moves messages; this is for whoever deletes rows, and for what nobody thought of.
    """
    forgotten = s.execute(_FORGOTTEN).all()
    channels = sorted({row.channel_id for row in forgotten} | set(s.execute(_UNDATED_LANES).scalars()))
    Lane.lock(s, channels)
    if forgotten:
        s.execute(_WAKE_THESE, {"tenants": [row.tenant_id for row in forgotten], "ids": [row.id for row in forgotten]})
    if channels:
        s.execute(_DATE_LANES, {"ids": channels})
    return channels


def give_up(s: Session, tenant_id: UUID, id_: UUID) -> bool:
    """An operator leaves it at that: a message that stayed unknown is failed. A late status that names its attempt
    still counts."""
    found = s.execute(_FIND, {"tenant_id": tenant_id, "id": id_}).mappings().first()
    if found is None:
        return False
    Lane.lock(s, [found["channel_id"]])
    if s.execute(_GIVE_UP, {"tenant_id": tenant_id, "id": id_}).first() is None:
        return False
    Event.append(s, [event(found, MessageStatus.FAILED, error_code="no_answer")])
    return True


def take_back(s: Session, given: list[dict[str, Any]]) -> list[RowMapping]:
    """Messages that the provider accepted and then failed, for a reason that may pass: back into the line.

    Each row as for `put`, with its `tenant_id`, for status `queued`. The next attempt has another id of the provider's,
    so that whatever is told of the failed one no longer concerns the message.
    """
    if not given:
        return []
    given = sorted(given, key=lambda row: (row["tenant_id"], row["id"]))
    return list(s.execute(_TAKE_BACK, given_rows(given) | {"ids": [row["id"] for row in given]}).mappings())


def cancel(s: Session, tenant_id: UUID, id_: UUID) -> tuple[str, bool] | None:
    """Take a queued message out: its status afterwards, and whether this call did it; None when there is none."""
    found = s.execute(_FIND, {"tenant_id": tenant_id, "id": id_}).mappings().first()
    if found is None:
        return None
    Lane.lock(s, [found["channel_id"]])
    given = {"tenant_id": tenant_id, "id": id_}
    if s.execute(_CANCEL, given).first() is None:
        return str(s.scalar(text("SELECT status FROM message WHERE tenant_id = :tenant_id AND id = :id"), given)), False
    _left(s, tenant_id, found, MessageStatus.CANCELLED)
    return MessageStatus.CANCELLED, True


def again(s: Session, tenant_id: UUID, id_: UUID) -> bool:
    """An operator wants it sent again: a failed one, or one that stayed unknown. False when it is neither."""
    found = s.execute(_FIND, {"tenant_id": tenant_id, "id": id_}).mappings().first()
    if found is None:
        return False
    Lane.lock(s, [found["channel_id"]])
    if s.execute(_AGAIN, {"tenant_id": tenant_id, "id": id_}).first() is None:
        return False
    Event.append(s, [event(found, MessageStatus.QUEUED)])
    Lane.expect(s, [{"tenant_id": tenant_id, "channel_id": found["channel_id"], "due_at": None}])
    return True


_REFERENCES = (("context", "message_id"), ("reaction", "message_id"), ("read", "message_id"))


def reference(body: dict[str, Any]) -> str | None:
    """Our id of the message that this one answers, reacts to or marks as read; None when it has the provider's."""
    for part, key in _REFERENCES:
        name = body.get(part, {}).get(key)
        if isinstance(name, str) and is_id(name):
            return name
    return None


def referring(body: dict[str, Any], provider_id: str) -> dict[str, Any]:
    """The body with the provider's id in place of ours."""
    return body | {part: body[part] | {key: provider_id} for part, key in _REFERENCES if key in body.get(part, {})}


_FILES = ("image", "video", "audio", "document", "sticker")


def media_ids(body: dict[str, Any]) -> list[UUID]:
    """Our ids of the files that a message carries: its own, or those of its headers."""
    return [UUID(part["media_id"]) for part in _files(body) if "media_id" in part]


def carrying(body: dict[str, Any], provider_ids: Mapping[UUID, str]) -> dict[str, Any]:
    """The body with the provider's ids in place of ours."""
    body = copy.deepcopy(body)
    for part in _files(body):
        if "media_id" in part:
            part["id"] = provider_ids[UUID(part.pop("media_id"))]
    return body


def _files(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects of a body that stand for a file, as `web/shapes.py` lets them through. What a body passes on as it is
    (an `action`) has none: whatever is in there is the provider's affair."""
    components = list(body.get("template", {}).get("components", []))
    for carousel in list(components):
        for card in carousel.get("cards", []):
            components += card.get("components", [])
    parameters = [parameter for component in components for parameter in component.get("parameters", [])]
    for holder in (body, body.get("interactive", {}).get("header", {}), *parameters):
        yield from (holder[kind] for kind in _FILES if kind in holder)


def event(message: Any, status: str, **more: Any) -> dict[str, Any]:
    """The event of a message's new status; `message` has `tenant_id`, `id` and `channel_id`."""
    return Event.row(
        "message_status",
        message["tenant_id"],
        message["channel_id"],
        message["id"],
        {"message_id": message["id"], "status": status, **more},
    )


def _left(s: Session, tenant_id: UUID, message: RowMapping, status: MessageStatus) -> None:
    wake(s, tenant_id, {message["conversation_id"]})
    Lane.expect(s, [{"tenant_id": tenant_id, "channel_id": message["channel_id"], "due_at": None}])
    Event.append(s, [event(message, status)])


def _named(tenant_id: UUID, given: list[dict[str, Any]]) -> dict[str, Any]:
    # As in models/attempt.py: the rows once more by their keys, for the planner.
    return given_rows(given) | {"tenant_id": tenant_id, "ids": [row["id"] for row in given]}


SETTLE_WAIT = timedelta(seconds=60)

_COLUMNS = """
    m.tenant_id, m.id, m.channel_id, m.conversation_id, m.contact_id, m.status, m.type, m.body, m.recipient, m.turn_at,
    m.due_at, m.attempts, m.tries, m.throttles, m.unknowns, m.attempt_id
"""

# Until there are statistics a tenant is taken for one row, and also while they are of a time when each had one: any
# index that begins with it is then as good as the right one. So what is read has an order that only the right index
# has; of a conversation that is the whole key, and its id is not said to be equal, or the order would lose it. An
# UPDATE has none. There, where a row is meant by its id, the tenant is `IS TRUE`, which no index can answer: then only
# the policy's own, wider condition is left to stand before the id. That may still read the tenant once, so it is not
# begun when there is nothing to park.
_DUE = text(f"""
    WITH due AS (
        SELECT {_COLUMNS} FROM message AS m
        WHERE m.tenant_id = :tenant_id AND m.channel_id = :channel_id AND m.due_at <= now() AND m.status = 'queued'
        ORDER BY m.due_at, m.id LIMIT :most
    ), behind AS (
        SELECT due.id FROM due CROSS JOIN LATERAL (
            SELECT FROM message AS o
            WHERE o.tenant_id = :tenant_id AND o.conversation_id = due.conversation_id AND o.{IN_LINE}
                AND o.id <> due.id AND (
                    o.status = 'sending' OR o.status = 'unknown' AND o.due_at IS NOT NULL
                    OR o.status = 'queued' AND o.turn_at <= now() AND (o.turn_at, o.id) < (due.turn_at, due.id)
                )
            ORDER BY o.turn_at, o.id LIMIT 1
        ) AS first
    ), parked AS (
        UPDATE message SET due_at = NULL
        WHERE (SELECT EXISTS (SELECT FROM behind)) AND (tenant_id = :tenant_id) IS TRUE
            AND id = ANY(ARRAY(SELECT id FROM behind))
    )
    SELECT due.*, extract(epoch FROM now() - due.turn_at) AS waited, coalesce(c.window_until < now(), false)
        AS is_window_closed, due.id = ANY(ARRAY(SELECT id FROM behind)) AS is_behind
    FROM due CROSS JOIN LATERAL (
        SELECT window_until FROM conversation AS c
        WHERE c.tenant_id = :tenant_id AND c.id BETWEEN due.conversation_id AND due.conversation_id
        ORDER BY c.tenant_id, c.id LIMIT 1
    ) AS c
""")

# A report of its fate may lie among the bodies that our own workers have not got to: then it is too early to decide.
_OVERDUE = text(f"""
    SELECT {_COLUMNS} FROM message AS m
    WHERE m.tenant_id = :tenant_id AND m.channel_id = :channel_id AND m.due_at <= now() AND m.status = 'unknown'
        AND (m.due_at < now() - interval '10 minutes' OR NOT EXISTS (
            SELECT FROM delivery AS d JOIN channel AS c ON (c.tenant_id, c.id) = (m.tenant_id, m.channel_id)
            WHERE d.state = 'pending' AND coalesce(d.app_id, d.channel_id) = coalesce(c.app_id, c.id)
                AND d.received_at <= m.due_at
        ))
    ORDER BY m.due_at, m.id LIMIT 200
""")

_PUT = text(f"""
    UPDATE message AS m SET status = given.status, tries = m.tries + given.tries,
        throttles = m.throttles + given.throttles, unknowns = m.unknowns + given.unknowns,
        due_at = CASE WHEN given.delay = 0 THEN m.turn_at ELSE now() + make_interval(secs => given.delay) END,
        failed_at = CASE WHEN given.status = 'failed' THEN now() END,
        error_code = given.error_code, error = given.error
    FROM {
    rows(
        id="uuid",
        attempt_id="uuid",
        status="text",
        delay="float8",
        tries="int",
        throttles="int",
        unknowns="int",
        error_code="text",
        error="text",
    )
}
    WHERE m.tenant_id = :tenant_id AND m.id = ANY(:ids) AND m.id = given.id
        AND m.status IN ('queued', 'sending', 'unknown') AND m.attempt_id IS NOT DISTINCT FROM given.attempt_id
    RETURNING {_COLUMNS}, m.error_code
""")

_ADOPT = text(f"""
    WITH adopted AS (
        UPDATE message AS m SET status = 'sent', provider_id = given.provider_id, due_at = NULL,
            attempt_id = given.attempt_id, sent_at = coalesce(m.sent_at, now()), failed_at = NULL, error_code = NULL,
            error = NULL
        FROM {rows(id="uuid", attempt_id="uuid", provider_id="text")}
        WHERE m.tenant_id = :tenant_id AND m.id = ANY(:ids) AND m.id = given.id
            AND (m.provider_id IS NULL OR m.status = 'failed')
            AND m.status IN ('queued', 'sending', 'unknown', 'failed', 'cancelled')
            AND NOT EXISTS (
                SELECT FROM message AS o
                WHERE (o.tenant_id, o.channel_id, o.provider_id) = (m.tenant_id, m.channel_id, given.provider_id)
            )
        RETURNING m.id
    )
    SELECT {_COLUMNS}, m.provider_id, adopted.id IS NOT NULL AS is_adopted
    FROM {rows(id="uuid", attempt_id="uuid", provider_id="text")}
    JOIN message AS m ON m.tenant_id = :tenant_id AND m.id = ANY(:ids) AND m.id = given.id
    LEFT JOIN adopted ON adopted.id = m.id
""")

# Its file too, if it has one: the message that we sent carries it.
_FOLD_ECHOES = text(f"""
    DELETE FROM message AS o USING {rows(id="uuid", provider_id="text")}, message AS m
    WHERE m.tenant_id = :tenant_id AND m.id = ANY(:ids) AND m.id = given.id
        AND (o.tenant_id, o.channel_id, o.provider_id) = (m.tenant_id, m.channel_id, given.provider_id)
        AND o.direction = 'out' AND o.turn_at IS NULL AND o.id <> m.id
        AND m.provider_id IS NULL AND m.status IN ('queued', 'sending', 'unknown', 'failed', 'cancelled')
    RETURNING m.tenant_id, m.channel_id, m.id, o.id AS echo_id
""")

_DELAY = text(f"""
    UPDATE message AS m SET due_at = now() + make_interval(secs => given.delay)
    FROM {rows(id="uuid", delay="float8")}
    WHERE m.tenant_id = :tenant_id AND m.id = ANY(:ids) AND m.id = given.id AND m.status = 'queued'
""")

# Only from a wait: a message without a date stands behind another one.
_BRING_BACK = text("""
    UPDATE message SET due_at = turn_at
    WHERE tenant_id = :tenant_id AND id = ANY(:ids) AND status = 'queued' AND due_at > now()
""")

_REFUSED_BEFORE = text("""
    SELECT message_id FROM attempt
    WHERE tenant_id = :tenant_id AND message_id = ANY(:ids) AND outcome = 'refused' AND error_class = 'permanent'
    GROUP BY message_id HAVING count(*) > 1
""")

_WAKE = text(f"""
    UPDATE message AS m SET due_at = m.turn_at
    WHERE (m.tenant_id = :tenant_id) IS TRUE AND m.id = ANY(ARRAY(
        SELECT next.id FROM unnest(CAST(:conversations AS uuid[])) AS given (id)
        CROSS JOIN LATERAL (
            SELECT id FROM message
            WHERE tenant_id = :tenant_id AND conversation_id = given.id AND {IN_LINE}
                AND status = 'queued' AND due_at IS NULL
            ORDER BY turn_at, id LIMIT 1
        ) AS next
    ))
""")

_FORGOTTEN = text(f"""
    SELECT tenant_id, id, channel_id FROM (
        SELECT DISTINCT ON (tenant_id, conversation_id) tenant_id, id, channel_id, status, due_at FROM message
        WHERE {IN_LINE} AND (turn_at <= now() OR status <> 'queued') AND NOT (status = 'unknown' AND due_at IS NULL)
        ORDER BY tenant_id, conversation_id, (status = 'queued'), turn_at, id
    ) AS first
    WHERE status = 'queued' AND due_at IS NULL
""")

_WAKE_THESE = text("""
    UPDATE message SET due_at = turn_at
    WHERE (tenant_id, id) IN (SELECT * FROM unnest(CAST(:tenants AS uuid[]), CAST(:ids AS uuid[])))
        AND status = 'queued' AND due_at IS NULL
""")

_UNDATED_LANES = text("""
    SELECT l.channel_id FROM lane AS l CROSS JOIN LATERAL (
        SELECT due_at FROM message AS m
        WHERE m.tenant_id = l.tenant_id AND m.channel_id = l.channel_id AND m.due_at IS NOT NULL
        ORDER BY m.due_at LIMIT 1
    ) AS m
    WHERE l.token IS NULL AND (l.next_due_at IS NULL OR l.next_due_at > m.due_at)
""")

_DATE_LANES = text("""
    UPDATE lane AS l SET next_due_at = (
        SELECT min(due_at) FROM message AS m
        WHERE m.tenant_id = l.tenant_id AND m.channel_id = l.channel_id AND m.due_at IS NOT NULL
    )
    WHERE channel_id = ANY(:ids) AND token IS NULL
""")

_GIVE_UP = text("""
    UPDATE message SET status = 'failed', failed_at = now()
    WHERE tenant_id = :tenant_id AND id = :id AND status = 'unknown' AND due_at IS NULL RETURNING 1
""")

_TAKE_BACK = text(f"""
    UPDATE message AS m SET status = 'queued', provider_id = NULL, failed_at = NULL, sent_at = NULL,
        tries = m.tries + given.tries, throttles = m.throttles + given.throttles,
        due_at = CASE WHEN given.delay = 0 THEN m.turn_at ELSE now() + make_interval(secs => given.delay) END
    FROM {rows(tenant_id="uuid", id="uuid", attempt_id="uuid", tries="int", throttles="int", delay="float8")}
    WHERE m.tenant_id = given.tenant_id AND m.id = ANY(:ids) AND m.id = given.id AND m.status = 'failed'
        AND m.attempt_id = given.attempt_id
    RETURNING {_COLUMNS}
""")

_FIND = text("""
    SELECT tenant_id, id, channel_id, conversation_id FROM message
    WHERE tenant_id = :tenant_id AND id = :id AND direction = 'out' AND turn_at IS NOT NULL
""")

_CANCEL = text("""
    UPDATE message SET status = 'cancelled', due_at = NULL
    WHERE tenant_id = :tenant_id AND id = :id AND status = 'queued' RETURNING 1
""")

_AGAIN = text("""
    UPDATE message SET status = 'queued', due_at = now(), turn_at = now(), provider_id = NULL, failed_at = NULL,
        error_code = NULL, error = NULL, tries = 0, throttles = 0, unknowns = 0, sent_at = NULL, delivered_at = NULL,
        read_at = NULL
    WHERE tenant_id = :tenant_id AND id = :id AND (status = 'failed' OR status = 'unknown' AND due_at IS NULL)
    RETURNING 1
""")
