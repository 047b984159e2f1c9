"""One try at sending a message: committed before the call leaves, completed with what came back.

Its id travels with the call and comes back with each status (`callback_of`), so that an answer that was never heard can
still be found: such an attempt is `unknown` until a status, or an answer that came late, settles it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import Index, RowMapping, UniqueConstraint, func, select, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Tenanted, belongs_to, given_rows, id_column, rows
from models.message import IN_LINE, NAMELESS


class Outcome(StrEnum):
    SENDING = "sending"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    UNKNOWN = "unknown"  # the request left, and nobody told what became of it
    NOT_SENT = "not_sent"  # the request never left


class Attempt(Tenanted, Base):
    __tablename__ = "attempt"
    __table_args__ = (
        belongs_to("message", "message_id", ondelete="CASCADE"),
        # Not led by the tenant: the planner, as long as it has no statistics, would look ids up in them by it alone.
        UniqueConstraint("message_id", "number", "tenant_id"),
        Index("ix_attempt_provider_id", "provider_id", "tenant_id"),
        Index("ix_attempt_sending", "channel_id", postgresql_where=text("outcome = 'sending'")),
    )

    id: Mapped[UUID] = id_column()
    message_id: Mapped[UUID]
    channel_id: Mapped[UUID]
    number: Mapped[int]  # 1 for the first
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str] = mapped_column(server_default=Outcome.SENDING)
    settled_by: Mapped[str | None]  # `answer`, or what told in its place: `status`, `echo`, `ack`
    provider_id: Mapped[str | None]
    http_status: Mapped[int | None]
    error_class: Mapped[str | None]
    error_scope: Mapped[str | None]
    error_code: Mapped[str | None]
    error: Mapped[str | None]
    trace_id: Mapped[str | None]  # the provider's own, for its support

    @classmethod
    def of(cls, s: Session, tenant_id: UUID, message_id: UUID) -> list["Attempt"]:
        """A message's attempts, in their order."""
        query = select(cls).where(cls.tenant_id == tenant_id, cls.message_id == message_id).order_by(cls.number)
        return list(s.scalars(query))

    @staticmethod
    def begin(
        s: Session, tenant_id: UUID, channel_id: UUID, given: list[dict[str, Any]]
    ) -> dict[UUID, tuple[UUID, bool]]:
        """Mark queued messages as sending, each by a new attempt (`message_id`, `attempt_id`).

        Returns the attempts that may be made, by message, each with whether it is news: one that was cancelled
        meanwhile is not among them, one that an earlier try of the same commit has begun is, since its success was not
        heard. Needs the lane's lock.
        """
        if not given:
            return {}
        ids = {
            "ids": [row["message_id"] for row in given],
            "attempts": [row["attempt_id"] for row in given],
            "tenant_id": tenant_id,
            "channel_id": channel_id,
        }
        begun = s.execute(_BEGIN, given_rows(given) | ids)
        return {row.message_id: (row.id, row.is_new) for row in begun}

    @staticmethod
    def end(s: Session, tenant_id: UUID, given: list[dict[str, Any]]) -> set[UUID]:
        """Write down what came back; returns the attempts for which that was news.

        One that a status has settled meanwhile keeps what the status said; one that was given up as unknown takes a
        late answer.
        """
        if not given:
            return set()
        ids = {"ids": [row["id"] for row in given], "tenant_id": tenant_id}
        return set(s.execute(_END, given_rows(given) | ids).scalars())

    @staticmethod
    def abandoned(s: Session, tenant_id: UUID, channel_id: UUID, wait: timedelta) -> list[RowMapping]:
        """Whoever had this lane died: what it was sending is unknown, and was over within the time that calls take.
        Needs the lane's lock; returns the messages."""
        given = {"tenant_id": tenant_id, "channel_id": channel_id, "wait": wait}
        return list(s.execute(_ABANDONED, given).mappings())

    @staticmethod
    def never_left(s: Session, tenant_id: UUID, ids: list[UUID]) -> None:
        """A commit has begun these, its success was not heard, and nobody will make them: back into the line."""
        if ids:
            s.execute(_NEVER_LEFT, {"tenant_id": tenant_id, "ids": ids})

    @staticmethod
    def reported(s: Session, given: list[tuple[UUID, UUID, str, str]]) -> list[RowMapping]:
        """The attempts that statuses tell something new of: `(tenant, channel, provider id, callback data)` each.

        Returns `tenant_id`, `channel_id`, `id`, `message_id`, `outcome` so far, and the reported `provider_id`.
        """
        asked = [
            {"tenant_id": tenant, "channel_id": channel, "provider_id": provider_id, "id": attempt}
            for tenant, channel, provider_id, data in sorted(set(given))
            if (attempt := attempt_named_in(data))
        ]
        return list(s.execute(_REPORTED, given_rows(asked)).mappings()) if asked else []

    @staticmethod
    def nameless(s: Session, keys: set[tuple[UUID, UUID, UUID]]) -> list[RowMapping]:
        """The attempts in these `(tenant, channel, conversation)` that left, or may have, under an id nobody has told.

        Refused ones too, of messages that are to be tried again: a gateway's no to a message is not always true. (That
        it is throttled, closed or in trouble, or does not take the token, is.) And those of the last hours whose
        message has another attempt's id (`has_id`): it may have been sent twice.

        The oldest first: `tenant_id`, `channel_id`, `conversation_id`, `message_id`, `type`, `body`, `id`, `outcome`,
        `started_at`, `ended_at` (now, of one that is under way), `has_id`.
        """
        if not keys:
            return []
        given = [{"tenant_id": t, "channel_id": ch, "conversation_id": co} for t, ch, co in sorted(keys)]
        return list(s.execute(_NAMELESS, given_rows(given)).mappings())

    @staticmethod
    def settled_by_ack(s: Session, keys: Iterable[tuple[UUID, UUID, str]]) -> list[RowMapping]:
        """Those that an ack alone has given these `(tenant, channel, provider id)`, with their message's `message_id`,
        `type` and `body`."""
        given = [{"tenant_id": t, "channel_id": c, "provider_id": id_} for t, c, id_ in sorted(set(keys))]
        return list(s.execute(_SETTLED_BY_ACK, given_rows(given)).mappings()) if given else []

    @staticmethod
    def unsettle(s: Session, given: Sequence[Mapping[str, Any]], wait: timedelta) -> list[RowMapping]:
        """The acks were of other messages: what became of these attempts is unknown again. Needs the lanes' locks.

        Returns `tenant_id`, `id`, `channel_id`, `due_at` of the messages.
        """
        if not given:
            return []
        ids = {"tenants": [row["tenant_id"] for row in given], "ids": [row["id"] for row in given]}
        return list(s.execute(_UNSETTLE, ids | {"wait": wait}).mappings())

    @staticmethod
    def settle(s: Session, given: Sequence[Mapping[str, Any]]) -> list[RowMapping]:
        """A status, an echo or an ack has told these attempts' provider ids: they were accepted.

        Rows as of `reported`, with `settled_by` if it is no status, and `sent_at` where it is known. A message without
        an id takes it over, and is sent. Returns `tenant_id`, `id`, `channel_id`, `conversation_id` and `is_adopted` of
        the messages, a row for each attempt; one that did not adopt it had been sent twice. Needs the lanes' locks.
        """
        if not given:
            return []
        found = [dict(row) for row in sorted(given, key=lambda row: (row["tenant_id"], row["id"]))]
        return list(s.execute(_SETTLE, given_rows(found)).mappings())


_LATEST_MESSAGES = 100  # of a conversation, that are looked through for what was sent twice
_CALLBACK = re.compile(r"out:([0-9a-f]{32})")


def callback_of(attempt_id: UUID) -> str:
    """What the call carries and every status of it echoes."""
    return f"out:{attempt_id.hex}"


def attempt_named_in(callback_data: str) -> UUID | None:
    """The attempt behind an echo; None when it is not one of ours."""
    match = _CALLBACK.fullmatch(callback_data)
    return UUID(hex=match[1]) if match else None


# Rows are named twice, by an array beside the join, so that a plan starts from them: one that was made while the table
# was empty would go through all of it for each row. (Before the first ANALYZE it may still read the tenant once.)
_BEGIN = text(f"""
    WITH begun AS (
        UPDATE message AS m SET status = 'sending', due_at = NULL, attempts = m.attempts + 1,
            attempt_id = given.attempt_id
        FROM {rows(message_id="uuid", attempt_id="uuid")}
        WHERE m.tenant_id = :tenant_id AND m.id = ANY(:ids) AND m.id = given.message_id
            AND m.status = 'queued' AND m.due_at <= now()
        RETURNING m.id, m.attempts, m.attempt_id
    ), made AS (
        INSERT INTO attempt (tenant_id, id, message_id, channel_id, number, started_at)
        SELECT :tenant_id, attempt_id, id, :channel_id, attempts, clock_timestamp() FROM begun
        RETURNING id, message_id
    )
    SELECT id, message_id, true AS is_new FROM made
    UNION ALL
    SELECT id, message_id, false FROM attempt
    WHERE tenant_id = :tenant_id AND id = ANY(:attempts) AND outcome = 'sending'
""")

_END = text(f"""
    UPDATE attempt AS a SET ended_at = clock_timestamp(), outcome = given.outcome,
        settled_by = CASE WHEN given.outcome IN ('accepted', 'refused') THEN 'answer' END,
        provider_id = given.provider_id, http_status = given.http_status, error_class = given.error_class,
        error_scope = given.error_scope, error_code = given.error_code, error = given.error, trace_id = given.trace_id
    FROM {
    rows(
        id="uuid",
        outcome="text",
        provider_id="text",
        http_status="int",
        error_class="text",
        error_scope="text",
        error_code="text",
        error="text",
        trace_id="text",
    )
}
    WHERE a.tenant_id = :tenant_id AND a.id = ANY(:ids) AND a.id = given.id AND a.outcome IN ('sending', 'unknown')
        AND (a.outcome, given.outcome) <> ('unknown', 'unknown')
    RETURNING a.id
""")

_ABANDONED = text("""
    WITH left_over AS (
        -- A receipt does no harm twice, and no status would ever tell of it.
        UPDATE message SET status = CASE type WHEN 'read' THEN 'queued' ELSE 'unknown' END,
            due_at = CASE type WHEN 'read' THEN turn_at ELSE now() + :wait END,
            unknowns = unknowns + (type <> 'read')::int
        WHERE tenant_id = :tenant_id AND channel_id = :channel_id AND status = 'sending'
        RETURNING tenant_id, id, channel_id, status
    ), ended AS (
        -- Not when somebody found that out, which may be hours later: what is sent then is another message.
        UPDATE attempt SET outcome = 'unknown', ended_at = least(now(), started_at + interval '5 minutes'),
            error = 'the process that sent it died'
        WHERE tenant_id = :tenant_id AND channel_id = :channel_id AND outcome = 'sending'
    )
    SELECT tenant_id, id, channel_id, status FROM left_over
""")

_NEVER_LEFT = text("""
    WITH ended AS (
        UPDATE attempt SET outcome = 'not_sent', ended_at = now()
        WHERE tenant_id = :tenant_id AND id = ANY(:ids) AND outcome = 'sending' RETURNING id
    )
    UPDATE message SET status = 'queued', due_at = turn_at
    WHERE tenant_id = :tenant_id AND attempt_id IN (SELECT id FROM ended) AND status = 'sending'
        AND id IN (SELECT message_id FROM attempt WHERE tenant_id = :tenant_id AND id = ANY(:ids))
""")

_REPORTED = text(f"""
    SELECT a.tenant_id, a.channel_id, a.id, a.message_id, a.outcome, given.provider_id
    FROM {rows(tenant_id="uuid", channel_id="uuid", provider_id="text", id="uuid")}
    CROSS JOIN LATERAL (
        SELECT * FROM attempt AS a WHERE (a.tenant_id, a.id) = (given.tenant_id, given.id) OFFSET 0
    ) AS a
    WHERE a.channel_id = given.channel_id AND a.provider_id IS NULL
""")

# Those in line, those that were accepted by an answer without an id, and those among a conversation's latest messages
# of which more than one attempt was made.
_NAMELESS = text(f"""
    SELECT m.tenant_id, m.channel_id, m.conversation_id, m.id AS message_id, m.type, m.body, a.id, a.outcome,
        a.started_at, coalesce(a.ended_at, clock_timestamp()) AS ended_at, m.provider_id IS NOT NULL AS has_id
    FROM {rows(tenant_id="uuid", channel_id="uuid", conversation_id="uuid")}
    CROSS JOIN LATERAL (
        SELECT * FROM message AS m
        WHERE m.tenant_id = given.tenant_id AND m.conversation_id = given.conversation_id AND m.{IN_LINE}
            AND m.attempts > 0 AND m.provider_id IS NULL AND m.type <> 'read'
        UNION ALL
        SELECT * FROM message AS m
        WHERE m.tenant_id = given.tenant_id AND m.conversation_id = given.conversation_id AND m.{NAMELESS}
        UNION ALL
        SELECT * FROM (
            SELECT * FROM message AS m
            WHERE m.tenant_id = given.tenant_id
                AND m.conversation_id BETWEEN given.conversation_id AND given.conversation_id
            ORDER BY m.tenant_id DESC, m.conversation_id DESC, m.id DESC LIMIT {_LATEST_MESSAGES}
        ) AS m
        WHERE m.attempts > 1 AND m.provider_id IS NOT NULL AND m.type <> 'read'
    ) AS m
    CROSS JOIN LATERAL (
        SELECT * FROM attempt AS a WHERE a.message_id = m.id AND a.tenant_id = m.tenant_id OFFSET 0
    ) AS a
    WHERE a.provider_id IS NULL AND a.outcome IN ('sending', 'unknown', 'accepted', 'refused')
        AND (a.outcome <> 'refused' OR a.error_class = 'permanent' OR a.error_code = 'closed_meanwhile')
        AND a.started_at > now() - CASE WHEN m.provider_id IS NULL THEN interval '8 days' ELSE interval '2 hours' END
    ORDER BY m.turn_at, m.id, a.number
""")

_SETTLED_BY_ACK = text(f"""
    SELECT a.tenant_id, a.channel_id, a.id, a.provider_id, m.id AS message_id, m.type, m.body
    FROM {rows(tenant_id="uuid", channel_id="uuid", provider_id="text")}
    JOIN attempt AS a ON (a.provider_id, a.tenant_id) = (given.provider_id, given.tenant_id)
        AND a.channel_id = given.channel_id AND a.settled_by = 'ack'
    JOIN message AS m ON (m.tenant_id, m.id) = (a.tenant_id, a.message_id)
""")

_UNSETTLE = text("""
    WITH undone AS (
        UPDATE attempt SET provider_id = NULL, outcome = 'unknown', settled_by = NULL
        WHERE (tenant_id, id) IN (SELECT * FROM unnest(CAST(:tenants AS uuid[]), CAST(:ids AS uuid[])))
            AND settled_by = 'ack'
        RETURNING tenant_id, id, message_id
    )
    UPDATE message AS m SET provider_id = NULL, status = 'unknown', due_at = now() + :wait, sent_at = NULL,
        delivered_at = NULL, read_at = NULL, failed_at = NULL, error_code = 'no_answer', error = NULL
    FROM undone AS u
    WHERE (m.tenant_id, m.id) = (u.tenant_id, u.message_id) AND m.attempt_id = u.id
    RETURNING m.tenant_id, m.id, m.channel_id, m.due_at
""")

# The message takes the first id that is told of any of its attempts, but for one that failed: that is the end of that
# attempt alone. It may have been queued again meanwhile, or be under way a second time: then it is sent already, and
# the second one is a double that is counted.
_SETTLE = text(f"""
    WITH settled AS (
        UPDATE attempt AS a SET provider_id = given.provider_id, outcome = 'accepted',
            settled_by = coalesce(given.settled_by, 'status'),
            ended_at = coalesce(a.ended_at, clock_timestamp())
        FROM {
    rows(
        tenant_id="uuid",
        channel_id="uuid",
        id="uuid",
        message_id="uuid",
        provider_id="text",
        sent_at="timestamptz",
        settled_by="text",
    )
}
        WHERE (a.tenant_id, a.id) = (given.tenant_id, given.id) AND a.provider_id IS NULL
        RETURNING a.tenant_id, a.id, a.message_id, a.provider_id, given.sent_at
    ), first_told AS (
        SELECT DISTINCT ON (tenant_id, message_id) * FROM settled ORDER BY tenant_id, message_id, id
    ), adopted AS (
        UPDATE message AS m SET provider_id = t.provider_id, status = 'sent', due_at = NULL, attempt_id = t.id,
            error_code = NULL, error = NULL, failed_at = NULL, sent_at = coalesce(m.sent_at, t.sent_at)
        FROM first_told AS t
        WHERE (m.tenant_id, m.id) = (t.tenant_id, t.message_id) AND (m.provider_id IS NULL OR m.status = 'failed')
            AND (m.status IN ('queued', 'sending', 'unknown', 'failed', 'cancelled')
                OR m.status = 'sent' AND m.provider_id IS NULL)
        RETURNING m.tenant_id, m.id, t.id AS attempt_id
    )
    SELECT m.tenant_id, m.id, m.channel_id, m.conversation_id, a.id IS NOT NULL AS is_adopted
    FROM settled AS t
    JOIN message AS m ON (m.tenant_id, m.id) = (t.tenant_id, t.message_id)
    LEFT JOIN adopted AS a ON (a.tenant_id, a.id, a.attempt_id) = (m.tenant_id, m.id, t.id)
    ORDER BY t.tenant_id, t.message_id, t.id
""")
