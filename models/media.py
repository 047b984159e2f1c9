"""One file of a message, or one uploaded to be sent: where the provider keeps it, until when, and what became of it.

`download_media` works on the rows here: pending ones fall due at `next_attempt_at`, which is also when the claim of
whoever works on one runs out. The bytes belong to `file`.
"""

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import Index, Row, RowMapping, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Dated, Tenanted, belongs_to, given_rows, rows
from pombal.ids import uuid7

CLAIM = timedelta(seconds=20)  # extended while its process lives
FATAL_CRASHES = 5  # claims in a row that ended without a verdict; its neighbours in a killed process have some too
AT_ONCE = 8  # downloads of one tenant that run at a time, so that there are threads for the others
_RING_AGAIN = timedelta(seconds=30)
_URGENT = timedelta(days=1)  # before the deadline


class MediaState(StrEnum):
    PENDING = "pending"
    STORED = "stored"
    FAILED = "failed"


class Media(Tenanted, Dated, Base):
    __tablename__ = "media"
    __table_args__ = (
        belongs_to("message", "message_id", ondelete="CASCADE"),
        UniqueConstraint("tenant_id", "message_id"),
        Index("ix_media_due", "next_attempt_at", postgresql_where=text("state = 'pending'")),
        Index("ix_media_line", "tenant_id", "deadline", postgresql_where=text("state = 'pending'")),
        Index("ix_media_claimed", "tenant_id", postgresql_where=text("claim_token IS NOT NULL")),
        Index("ix_media_digest", "tenant_id", "digest"),
    )

    # By itself where an older release writes the row while this one is being rolled out.
    id: Mapped[UUID] = mapped_column(
        primary_key=True, default=uuid7, server_default=func.gen_random_uuid(), sort_order=-1
    )
    message_id: Mapped[UUID | None]  # none for an upload, which any message may send
    channel_id: Mapped[UUID | None]
    provider_media_id: Mapped[str | None]
    link: Mapped[str | None]  # where it is to be had without an id; of anybody's choice, so never trusted
    keys: Mapped[dict[str, Any] | None]  # what a gateway needs to fetch and decrypt it (megaapi.md, "Media download")
    kind: Mapped[str]
    mime_type: Mapped[str | None]  # as the sender claims
    sha256: Mapped[str | None]  # as the provider claims, base64 or hex
    filename: Mapped[str | None]  # data only, never a path
    state: Mapped[str] = mapped_column(server_default=MediaState.PENDING)
    attempts: Mapped[int] = mapped_column(server_default=text("0"))
    crashes: Mapped[int] = mapped_column(server_default=text("0"))
    next_attempt_at: Mapped[datetime] = mapped_column(server_default=func.now())
    next_ring_at: Mapped[datetime] = mapped_column(server_default=func.now())
    claim_token: Mapped[UUID | None]
    deadline: Mapped[datetime]  # 7 days after the message: the provider's id dies then (whatsapp-cloud-api.md §12)
    digest: Mapped[bytes | None]  # of the file that is stored
    is_mislabelled: Mapped[bool] = mapped_column(server_default=text("false"))  # its bytes are not what it claims to be
    error_code: Mapped[str | None]
    error: Mapped[str | None]
    ended_at: Mapped[datetime | None]

    @staticmethod
    def expect(s: Session, given: list[dict[str, Any]]) -> None:
        """Note files that are to be fetched, one row per new message. Who notes them rings for them after the commit;
        the sweep does for those whose bell is lost."""
        if given:
            s.execute(_EXPECT, {**given_rows(given), "ring_again": _RING_AGAIN})

    @staticmethod
    def to_ring(s: Session, *, at_once: bool = False) -> list[tuple[UUID, UUID]]:
        """(tenant, id) of files that are due and were not rung for lately; notes that they are rung for.

        As many of each tenant that the session sees as it may have in work: a job goes on with the others. `at_once`
        does not ask when the last bell was.
        """
        given = {"most": AT_ONCE, "at_once": at_once, "again": _RING_AGAIN, "urgent": _URGENT}
        found = s.execute(_TO_RING, given)
        return [(row.tenant_id, row.id) for row in found]

    @staticmethod
    def claim(s: Session, tenant_id: UUID, token: UUID, id_: UUID | None = None) -> RowMapping | None:
        """Take one due file of a tenant, this one or the next: its columns, with the channel's `config`, `sealed` and
        `channel_kind`. None when there is none, or when the tenant has as many in work as it may.

        What has less than a day left comes first; then the newest message's file, which somebody is waiting for.
        """
        given = {"tenant_id": tenant_id, "token": token, "id": id_, "most": AT_ONCE, "claim": CLAIM, "urgent": _URGENT}
        s.execute(_ONE_BY_ONE, {"tenant_id": tenant_id})  # else each of several would count without the others
        return s.execute(_CLAIM, given).mappings().one_or_none()

    @staticmethod
    def extend(s: Session, claimed: list[RowMapping]) -> set[UUID]:
        """Keep these claims for longer; the tokens of those that were not lost."""
        keys = [{name: row[name] for name in ("tenant_id", "id", "claim_token")} for row in claimed]
        return set(s.scalars(_EXTEND, {**given_rows(keys), "claim": CLAIM}))

    @staticmethod
    def stored(s: Session, row: RowMapping, *, digest: bytes, is_mislabelled: bool) -> bool:
        """The file is in the storage. False when the claim was lost, and the row is somebody else's."""
        given = {"state": MediaState.STORED, "digest": digest, "is_mislabelled": is_mislabelled, "code": None}
        return _ended(s, row, {**given, "error": None})

    @staticmethod
    def failed(s: Session, row: RowMapping, *, code: str, error: str) -> bool:
        """It will not be fetched any more. False when the claim was lost."""
        given = {"state": MediaState.FAILED, "digest": None, "is_mislabelled": False, "code": code}
        return _ended(s, row, {**given, "error": error})

    @staticmethod
    def put_back(
        s: Session, row: RowMapping, wait: float, *, code: str | None, error: str | None, counts: bool = True
    ) -> bool:
        """Due again after so many seconds, at the latest at its deadline. Unless it `counts`, this was no attempt, and
        says nothing about the time that is left."""
        given = {"wait": timedelta(seconds=wait), "code": code, "error": error, "counts": counts}
        return bool(s.execute(_PUT_BACK, {**_key(row), **given}).rowcount)  # type: ignore[attr-defined] # of an UPDATE

    @staticmethod
    def again(s: Session, tenant_id: UUID, id_: UUID) -> bool:
        """An operator wants it tried again, with a clean record; False when it is stored or unknown."""
        given = {"tenant_id": tenant_id, "id": id_}
        return bool(s.execute(_AGAIN, given).rowcount)  # type: ignore[attr-defined] # of an UPDATE

    @staticmethod
    def wake(s: Session, tenant_id: UUID, channel_id: UUID) -> int:
        """A channel has a new token: its files need not wait any longer. Returns how many there are.

        Those in work lose their claims: what the old token came to must not be written down any more.
        """
        given = {"tenant_id": tenant_id, "channel_id": channel_id}
        return int(s.execute(_WAKE, given).rowcount)  # type: ignore[attr-defined] # of an UPDATE

    @staticmethod
    def waiting(s: Session) -> Row[Any]:
        """Of all files that this session sees: `pending`, `oldest` (seconds) and `nearest` (seconds to the nearest
        deadline, None when none is pending)."""
        return s.execute(_WAITING).one()


def _key(row: RowMapping) -> dict[str, Any]:
    return {"tenant_id": row["tenant_id"], "id": row["id"], "token": row["claim_token"]}


def _ended(s: Session, row: RowMapping, given: dict[str, Any]) -> bool:
    return bool(s.execute(_ENDED, {**_key(row), **given}).rowcount)  # type: ignore[attr-defined] # of an UPDATE


_EXPECT = text(f"""
    INSERT INTO media (tenant_id, id, message_id, channel_id, provider_media_id, link, keys, kind, mime_type, sha256,
        filename, deadline, next_ring_at)
    SELECT given.*, now() + :ring_again FROM {
    rows(
        tenant_id="uuid",
        id="uuid",
        message_id="uuid",
        channel_id="uuid",
        provider_media_id="text",
        link="text",
        keys="jsonb",
        kind="text",
        mime_type="text",
        sha256="text",
        filename="text",
        deadline="timestamptz",
    )
}
    ORDER BY tenant_id, message_id
    ON CONFLICT DO NOTHING
""")

_TO_RING = text("""
    WITH due AS (
        SELECT of_one.tenant_id, of_one.id FROM tenant, LATERAL (
            SELECT tenant_id, id FROM media
            WHERE tenant_id = tenant.id AND state = 'pending' AND next_attempt_at <= now()
                AND (:at_once OR next_ring_at <= now())
            ORDER BY deadline > now() + :urgent, deadline DESC LIMIT :most FOR UPDATE SKIP LOCKED
        ) AS of_one
        WHERE EXISTS (SELECT FROM media WHERE state = 'pending' AND next_attempt_at <= now())
    ), rung AS (
        UPDATE media SET next_ring_at = now() + :again FROM due
        WHERE (media.tenant_id, media.id) = (due.tenant_id, due.id)
    )
    SELECT tenant_id, id FROM due
""")

_ONE_BY_ONE = text("SELECT pg_advisory_xact_lock(hashtextextended('media ' || CAST(:tenant_id AS text), 0))")

_CLAIM = text("""
    WITH busy AS (
        SELECT count(*) < :most AS has_room FROM media
        WHERE tenant_id = :tenant_id AND claim_token IS NOT NULL AND state = 'pending' AND next_attempt_at > now()
    ), urgent AS (
        SELECT id FROM media, busy
        WHERE tenant_id = :tenant_id AND state = 'pending' AND next_attempt_at <= now() AND has_room
            AND CASE WHEN CAST(:id AS uuid) IS NULL THEN deadline < now() + :urgent ELSE id = :id END
        ORDER BY deadline LIMIT 1 FOR UPDATE OF media SKIP LOCKED
    ), newest AS (
        SELECT id FROM media, busy
        WHERE tenant_id = :tenant_id AND state = 'pending' AND next_attempt_at <= now() AND has_room
            AND CAST(:id AS uuid) IS NULL AND NOT EXISTS (SELECT FROM urgent)
        ORDER BY deadline DESC LIMIT 1 FOR UPDATE OF media SKIP LOCKED
    )
    UPDATE media SET claim_token = :token, attempts = attempts + 1, crashes = crashes + 1,
        next_attempt_at = now() + :claim
    FROM (SELECT id FROM urgent UNION ALL SELECT id FROM newest) AS chosen, channel
    WHERE media.tenant_id = :tenant_id AND media.id = chosen.id
        AND channel.tenant_id = media.tenant_id AND channel.id = media.channel_id
    RETURNING media.*, media.deadline <= now() AS is_overdue,
        channel.kind AS channel_kind, channel.config, channel.sealed
""")

_EXTEND = text(f"""
    UPDATE media SET next_attempt_at = now() + :claim
    FROM {rows(**dict.fromkeys(("tenant_id", "id", "claim_token"), "uuid"))}
    WHERE (media.tenant_id, media.id, media.claim_token) = (given.tenant_id, given.id, given.claim_token)
        AND state = 'pending'
    RETURNING media.claim_token
""")

_ENDED = text("""
    UPDATE media SET state = :state, digest = :digest, is_mislabelled = :is_mislabelled, error_code = :code,
        error = :error, ended_at = now(), claim_token = NULL, crashes = 0
    WHERE tenant_id = :tenant_id AND id = :id AND claim_token = :token AND state = 'pending'
""")

_PUT_BACK = text("""
    UPDATE media SET claim_token = NULL, crashes = 0, attempts = CASE WHEN :counts THEN attempts ELSE attempts - 1 END,
        error_code = coalesce(:code, error_code), error = coalesce(:error, error), next_ring_at = now(),
        next_attempt_at = CASE WHEN :counts THEN greatest(least(now() + :wait, deadline), now() + interval '1 second')
            ELSE now() + :wait END
    WHERE tenant_id = :tenant_id AND id = :id AND claim_token = :token AND state = 'pending'
""")

_AGAIN = text("""
    UPDATE media SET state = 'pending', attempts = 0, crashes = 0, claim_token = NULL, error_code = NULL, error = NULL,
        ended_at = NULL, next_attempt_at = now(), next_ring_at = now()
    WHERE tenant_id = :tenant_id AND id = :id AND state = 'failed'
""")

_WAKE = text("""
    UPDATE media SET next_attempt_at = now(), next_ring_at = now(), claim_token = NULL, crashes = 0
    WHERE tenant_id = :tenant_id AND channel_id = :channel_id AND state = 'pending'
""")

_WAITING = text("""
    SELECT count(*) AS pending, coalesce(extract(epoch FROM now() - min(created_at)), 0) AS oldest,
        extract(epoch FROM min(deadline) - now()) AS nearest
    FROM media WHERE state = 'pending'
""")
