"""One message, in or out, and what the provider has said became of it.

An outgoing one that somebody asked us to send also has a place in its channel's line (`models/outgoing.py`):

    queued ─▶ sending ─▶ sent ─▶ delivered ─▶ read (played)       `cancelled` while queued
      ▲          ├──▶ failed (refused for good)
      ├── again ─┤
      └─ policy ─┴──▶ unknown (no answer; a status, the channel's policy or an operator decides)
"""

import re
from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import Index, RowMapping, UniqueConstraint, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Dated, Tenanted, belongs_to, given_rows, id_column, rows


class MessageStatus(StrEnum):
    QUEUED = "queued"
    SENDING = "sending"
    UNKNOWN = "unknown"
    SENT = "sent"
    DELIVERED = "delivered"
    READ = "read"
    PLAYED = "played"
    FAILED = "failed"
    CANCELLED = "cancelled"
    RECEIVED = "received"


# What a provider reports only rises (whatsapp-cloud-api.md §7). `failed` is final for its attempt, whatever comes
# before or after it, so that every order of arrival ends in the same state.
RISING = (
    MessageStatus.SENT,
    MessageStatus.DELIVERED,
    MessageStatus.READ,
    MessageStatus.PLAYED,
    MessageStatus.FAILED,
)


IN_LINE = "status IN ('queued', 'sending', 'unknown')"
# Accepted by an answer that told no id; an echo will (megaapi.md, "Responses"). A receipt never has one.
NAMELESS = "status = 'sent' AND provider_id IS NULL AND type <> 'read'"
# What came in or left; being queued is no traffic. A message that was scheduled counts from when it left.
TRAFFIC, TRAFFIC_AT = "direction = 'in' OR sent_at IS NOT NULL", "coalesce(sent_at, created_at)"


class Message(Tenanted, Dated, Base):
    __tablename__ = "message"
    __table_args__ = (
        belongs_to("channel", "channel_id", ondelete="CASCADE"),
        # Both are checked at commit: within a batch messages come first, so that only new ones count as unread.
        belongs_to("conversation", "conversation_id", ondelete="CASCADE", deferrable=True, initially="DEFERRED"),
        belongs_to("contact", "contact_id", ondelete="CASCADE", deferrable=True, initially="DEFERRED"),
        UniqueConstraint("tenant_id", "channel_id", "provider_id"),
        Index("ix_message_conversation", "tenant_id", "conversation_id", "id"),
        # What a lane may take next, the oldest first; and who is before whom in one conversation.
        Index("ix_message_due", "tenant_id", "channel_id", "due_at", "id", postgresql_where=text("due_at IS NOT NULL")),
        Index("ix_message_line", "tenant_id", "conversation_id", "turn_at", "id", postgresql_where=text(IN_LINE)),
        Index(
            "ix_message_unknown",
            "tenant_id",
            "channel_id",
            "due_at",
            postgresql_where=text("status = 'unknown' AND due_at IS NOT NULL"),
        ),
        Index("ix_message_nameless", "tenant_id", "conversation_id", postgresql_where=text(NAMELESS)),
        Index("ix_message_traffic", "tenant_id", "channel_id", text(TRAFFIC_AT), postgresql_where=text(TRAFFIC)),
        Index("ix_message_sending", "tenant_id", "channel_id", postgresql_where=text("status = 'sending'")),
        Index(
            "uq_message_idempotency_key",
            "tenant_id",
            "idempotency_key",
            unique=True,
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
    )

    id: Mapped[UUID] = id_column()
    channel_id: Mapped[UUID]
    conversation_id: Mapped[UUID]
    contact_id: Mapped[UUID]
    direction: Mapped[str]
    type: Mapped[str]
    body: Mapped[dict[str, Any]]
    provider_id: Mapped[str | None]
    status: Mapped[str]
    error_code: Mapped[str | None]
    error: Mapped[str | None]
    sent_at: Mapped[datetime | None]
    delivered_at: Mapped[datetime | None]
    read_at: Mapped[datetime | None]
    failed_at: Mapped[datetime | None]
    provider_at: Mapped[datetime | None]
    delivery_id: Mapped[UUID | None]  # the webhook it came in; no foreign key, deliveries are dropped by the day
    # From here on: only of messages that we were asked to send.
    recipient: Mapped[str | None]  # a phone number with its plus, or a BSUID; none for a read receipt
    turn_at: Mapped[datetime | None]  # when its turn in its conversation began: its acceptance, or `not_before`
    due_at: Mapped[datetime | None]  # when the lane may look at it next; none behind another of its conversation
    attempts: Mapped[int] = mapped_column(server_default=text("0"))
    tries: Mapped[int] = mapped_column(server_default=text("0"))  # refusals that count against it
    throttles: Mapped[int] = mapped_column(server_default=text("0"))  # times that its recipient had had too many
    unknowns: Mapped[int] = mapped_column(server_default=text("0"))  # attempts without an answer
    attempt_id: Mapped[UUID | None]  # the attempt under way, or the last
    idempotency_key: Mapped[str | None]
    request_digest: Mapped[bytes | None]  # of what was asked with that key
    request_id: Mapped[str | None]

    @staticmethod
    def queue(s: Session, given: list[dict[str, Any]]) -> set[UUID]:
        """Insert messages to be sent; returns the ids of those that are new: an idempotency key is taken once.

        `body` is JSON text, `request_digest` hex, `not_before` None for at once.
        """
        if not given:
            return set()
        return set(s.execute(_QUEUE, given_rows(given)).scalars())

    @staticmethod
    def by_key(s: Session, keys: list[tuple[UUID, str]]) -> dict[tuple[UUID, str], tuple[UUID, str, str]]:
        """`(id, status, digest in hex)` of the messages that were asked for with these `(tenant, idempotency key)`."""
        if not keys:
            return {}
        given = [{"tenant_id": tenant_id, "key": key} for tenant_id, key in keys]
        found = s.execute(_BY_KEY, given_rows(given))
        return {(row.tenant_id, row.key): (row.id, row.status, bytes(row.digest).hex()) for row in found}

    @staticmethod
    def named(s: Session, names: list[tuple[UUID, UUID, str]]) -> dict[tuple[UUID, UUID, str], RowMapping]:
        """The messages that `(tenant, channel, name)` mean, a name being our id or the provider's."""
        if not names:
            return {}
        given = [
            {"tenant_id": t, "channel_id": c, "name": name, "id": name if is_id(name) else None}
            for t, c, name in sorted(set(names))
        ]
        found = s.execute(_NAMED, given_rows(given)).mappings()
        return {(row["tenant_id"], row["channel_id"], row["name"]): row for row in found}

    @staticmethod
    def bodies(s: Session, tenant_id: UUID, ids: list[UUID]) -> dict[UUID, dict[str, Any]]:
        """What these messages say, by id."""
        if not ids:
            return {}
        return {row.id: row.body for row in s.execute(_BODIES, {"tenant_id": tenant_id, "ids": ids})}

    @staticmethod
    def store(s: Session, given: list[dict[str, Any]]) -> set[UUID]:
        """Insert messages that are not there yet; returns the ids of those that were new. `body` is JSON text."""
        if not given:
            return set()
        return set(s.execute(_STORE, given_rows(given)).scalars())

    @staticmethod
    def known(s: Session, keys: Iterable[tuple[UUID, UUID, str]]) -> dict[tuple[UUID, UUID, str], UUID]:
        """The messages that have, or by an earlier attempt had, these `(tenant, channel, provider id)`."""
        given = [{"tenant_id": t, "channel_id": c, "provider_id": id_} for t, c, id_ in sorted(set(keys))]
        if not given:
            return {}
        found = s.execute(_KNOWN, given_rows(given))
        return {(row.tenant_id, row.channel_id, row.provider_id): row.message_id for row in found}

    @staticmethod
    def catch_up(s: Session, keys: list[tuple[UUID, UUID, str]]) -> list[RowMapping]:
        """Bring sent messages up to what is reported of `(tenant, channel, provider id)`; returns what changed."""
        if not keys:
            return []
        given = [{"tenant_id": t, "channel_id": c, "provider_id": id_} for t, c, id_ in sorted(set(keys))]
        return list(s.execute(_CATCH_UP, given_rows(given)).mappings())


class StatusReport(Tenanted, Dated, Base):
    """All that a provider said of one of its message ids, folded into one row: highest status, earliest times.

    A report may come before the message is known (an echo in another batch, the answer of a send still on its way).
    Whoever writes the message's row also touches this one, so one of the two always sees the other.
    """

    __tablename__ = "message_status"
    __table_args__ = (belongs_to("channel", "channel_id", ondelete="CASCADE"),)

    channel_id: Mapped[UUID] = mapped_column(primary_key=True)
    provider_id: Mapped[str] = mapped_column(primary_key=True)
    participant: Mapped[str] = mapped_column(primary_key=True, server_default="")
    rank: Mapped[int] = mapped_column(server_default=text("0"))  # 0: nothing reported yet; n: RISING[n - 1]
    status: Mapped[str | None]  # the provider's own word, also one that has no rank
    sent_at: Mapped[datetime | None]
    delivered_at: Mapped[datetime | None]
    read_at: Mapped[datetime | None]
    failed_at: Mapped[datetime | None]
    error_code: Mapped[str | None]
    error: Mapped[str | None]
    pricing: Mapped[dict[str, Any] | None]
    conversation: Mapped[dict[str, Any] | None]
    callback_data: Mapped[str | None]

    @staticmethod
    def fold(s: Session, given: list[dict[str, Any]]) -> None:
        """Add reports, one row per key, JSON as text. Any order and any repetition end in the same row."""
        if given:
            s.execute(_FOLD, given_rows(given))

    @staticmethod
    def touch(s: Session, keys: list[tuple[UUID, UUID, str]]) -> None:
        """Be seen by whoever reports on these `(tenant, channel, provider id)`, and see what is reported already."""
        given = [{"tenant_id": t, "channel_id": c, "provider_id": id_} for t, c, id_ in sorted(set(keys))]
        if given:
            s.execute(_TOUCH, given_rows(given))

    @staticmethod
    def first_told(s: Session, keys: Iterable[tuple[UUID, UUID, str]]) -> dict[tuple[UUID, UUID, str], datetime]:
        """When these `(tenant, channel, provider id)` were first reported on, of those that were."""
        given = [{"tenant_id": t, "channel_id": c, "provider_id": id_} for t, c, id_ in sorted(set(keys))]
        if not given:
            return {}
        found = s.execute(_FIRST_TOLD, given_rows(given))
        return {(row.tenant_id, row.channel_id, row.provider_id): row.created_at for row in found}

    @staticmethod
    def rank_of(status: str) -> int:
        """0 for a word without a rank: kept, but it moves nothing."""
        return RISING.index(MessageStatus(status)) + 1 if status in RISING else 0


_RANK = "coalesce(array_position(ARRAY['" + "', '".join(RISING) + "'], m.status), 0)"


def is_id(text: str) -> bool:
    """Whether a text is an id of ours, as the API shows it; providers' ids of that shape do occur, without hyphens."""
    return _ID.fullmatch(text) is not None


_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


_QUEUE = text(f"""
    INSERT INTO message (tenant_id, id, channel_id, conversation_id, contact_id, direction, type, body, status,
        recipient, turn_at, due_at, idempotency_key, request_digest, request_id)
    SELECT tenant_id, id, channel_id, conversation_id, contact_id, 'out', type, body::jsonb, 'queued',
        recipient, coalesce(not_before, now()), coalesce(not_before, now()), idempotency_key,
        decode(request_digest, 'hex'), request_id
    FROM {
    rows(
        tenant_id="uuid",
        id="uuid",
        channel_id="uuid",
        conversation_id="uuid",
        contact_id="uuid",
        type="text",
        body="text",
        recipient="text",
        not_before="timestamptz",
        idempotency_key="text",
        request_digest="text",
        request_id="text",
    )
}
    ORDER BY tenant_id, idempotency_key, id
    ON CONFLICT (tenant_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
    RETURNING id
""")

_BY_KEY = text(f"""
    SELECT m.tenant_id, m.idempotency_key AS key, m.id, m.status, m.request_digest AS digest
    FROM {rows(tenant_id="uuid", key="text")}
    JOIN message AS m ON m.tenant_id = given.tenant_id AND m.idempotency_key = given.key
""")

_NAMED = text(f"""
    SELECT given.name, m.* FROM {rows(tenant_id="uuid", channel_id="uuid", name="text", id="uuid")}
    CROSS JOIN LATERAL (
        (SELECT tenant_id, channel_id, id, provider_id, direction, status, conversation_id, contact_id, type
            FROM message AS m
            WHERE (m.tenant_id, m.channel_id, m.provider_id) = (given.tenant_id, given.channel_id, given.name))
        UNION ALL
        (SELECT tenant_id, channel_id, id, provider_id, direction, status, conversation_id, contact_id, type
            FROM message AS m
            WHERE (m.tenant_id, m.id) = (given.tenant_id, given.id) AND m.channel_id = given.channel_id)
        LIMIT 1
    ) AS m
""")

# As in models/outgoing.py: where a row is meant by its id, the tenant is `IS TRUE`.
_BODIES = text("SELECT id, body FROM message WHERE (tenant_id = :tenant_id) IS TRUE AND id = ANY(:ids)")

_STORE = text(f"""
    INSERT INTO message (tenant_id, id, channel_id, conversation_id, contact_id, direction, type, body, provider_id,
        status, sent_at, provider_at, delivery_id)
    SELECT tenant_id, id, channel_id, conversation_id, contact_id, direction, type, body::jsonb, provider_id,
        status, sent_at, provider_at, delivery_id
    FROM {
    rows(
        tenant_id="uuid",
        id="uuid",
        channel_id="uuid",
        conversation_id="uuid",
        contact_id="uuid",
        direction="text",
        type="text",
        body="text",
        provider_id="text",
        status="text",
        sent_at="timestamptz",
        provider_at="timestamptz",
        delivery_id="uuid",
    )
}
    ORDER BY tenant_id, channel_id, provider_id
    ON CONFLICT (tenant_id, channel_id, provider_id) DO NOTHING
    RETURNING id
""")

_FOLD = text(f"""
    INSERT INTO message_status AS m (tenant_id, channel_id, provider_id, participant, rank, status, sent_at,
        delivered_at, read_at, failed_at, error_code, error, pricing, conversation, callback_data)
    SELECT tenant_id, channel_id, provider_id, participant, rank, status, sent_at,
        delivered_at, read_at, failed_at, error_code, error, pricing::jsonb, conversation::jsonb, callback_data
    FROM {
    rows(
        tenant_id="uuid",
        channel_id="uuid",
        provider_id="text",
        participant="text",
        rank="int",
        status="text",
        sent_at="timestamptz",
        delivered_at="timestamptz",
        read_at="timestamptz",
        failed_at="timestamptz",
        error_code="text",
        error="text",
        pricing="text",
        conversation="text",
        callback_data="text",
    )
}
    ORDER BY tenant_id, channel_id, provider_id, participant
    ON CONFLICT (tenant_id, channel_id, provider_id, participant) DO UPDATE SET
        status = CASE WHEN excluded.rank > m.rank OR m.status IS NULL THEN excluded.status ELSE m.status END,
        rank = greatest(m.rank, excluded.rank),
        sent_at = least(m.sent_at, excluded.sent_at),
        delivered_at = least(m.delivered_at, excluded.delivered_at),
        read_at = least(m.read_at, excluded.read_at),
        failed_at = least(m.failed_at, excluded.failed_at),
        error_code = coalesce(m.error_code, excluded.error_code),
        error = coalesce(m.error, excluded.error),
        pricing = coalesce(m.pricing, excluded.pricing),
        conversation = coalesce(m.conversation, excluded.conversation),
        callback_data = coalesce(m.callback_data, excluded.callback_data)
""")

_KNOWN = text(f"""
    SELECT given.*, m.message_id FROM {rows(tenant_id="uuid", channel_id="uuid", provider_id="text")}
    CROSS JOIN LATERAL (
        (SELECT id AS message_id FROM message AS m
            WHERE (m.tenant_id, m.channel_id, m.provider_id) = (given.tenant_id, given.channel_id, given.provider_id))
        UNION ALL
        (SELECT message_id FROM attempt AS a
            WHERE (a.provider_id, a.tenant_id) = (given.provider_id, given.tenant_id)
                AND a.channel_id = given.channel_id)
        LIMIT 1
    ) AS m
""")

_FIRST_TOLD = text(f"""
    SELECT given.*, r.created_at FROM {rows(tenant_id="uuid", channel_id="uuid", provider_id="text")}
    CROSS JOIN LATERAL (
        SELECT min(created_at) AS created_at FROM message_status AS r
        WHERE (r.tenant_id, r.channel_id, r.provider_id) = (given.tenant_id, given.channel_id, given.provider_id)
    ) AS r
    WHERE r.created_at IS NOT NULL
""")

_TOUCH = text(f"""
    INSERT INTO message_status AS m (tenant_id, channel_id, provider_id, participant)
    SELECT tenant_id, channel_id, provider_id, '' FROM {rows(tenant_id="uuid", channel_id="uuid", provider_id="text")}
    ORDER BY tenant_id, channel_id, provider_id
    ON CONFLICT (tenant_id, channel_id, provider_id, participant) DO UPDATE SET rank = m.rank
""")

# In a group each member is reported on; one member's failure does not make the message a failed one, not even while
# nobody else has been reported on: the order of reports must not matter.
_CATCH_UP = text(f"""
    UPDATE message AS m SET
        status = CASE WHEN said.rank > {_RANK} THEN said.status ELSE m.status END,
        sent_at = least(m.sent_at, said.sent_at),
        delivered_at = least(m.delivered_at, said.delivered_at),
        read_at = least(m.read_at, said.read_at),
        failed_at = least(m.failed_at, said.failed_at),
        error_code = coalesce(said.error_code, m.error_code),
        error = coalesce(said.error, m.error)
    FROM (
        SELECT given.*, said.* FROM {rows(tenant_id="uuid", channel_id="uuid", provider_id="text")}
        CROSS JOIN LATERAL (SELECT
            coalesce(max(rank) FILTER (WHERE participant = '' OR failed_at IS NULL), 0) AS rank,
            (array_agg(status ORDER BY (participant = '' OR failed_at IS NULL) DESC, rank DESC))[1] AS status,
            min(sent_at) AS sent_at, min(delivered_at) AS delivered_at, min(read_at) AS read_at,
            min(failed_at) FILTER (WHERE participant = '') AS failed_at,
            min(error_code) FILTER (WHERE participant = '') AS error_code,
            min(error) FILTER (WHERE participant = '') AS error
            FROM message_status AS r
            WHERE (r.tenant_id, r.channel_id, r.provider_id) = (given.tenant_id, given.channel_id, given.provider_id)
        ) AS said
    ) AS said
    WHERE (m.tenant_id, m.channel_id, m.provider_id) = (said.tenant_id, said.channel_id, said.provider_id)
        AND m.direction = 'out'
        AND (said.rank > {_RANK}
            OR least(m.sent_at, said.sent_at) IS DISTINCT FROM m.sent_at
            OR least(m.delivered_at, said.delivered_at) IS DISTINCT FROM m.delivered_at
            OR least(m.read_at, said.read_at) IS DISTINCT FROM m.read_at
            OR least(m.failed_at, said.failed_at) IS DISTINCT FROM m.failed_at)
    RETURNING m.tenant_id, m.id, m.channel_id, m.status, m.conversation_id, m.type, m.turn_at, m.attempt_id,
        m.attempts, m.tries, m.throttles, m.error_code, m.error
""")
