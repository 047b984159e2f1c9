"""What is stored of media: one row per content and tenant, however many messages carry it; and where a provider has it.

The bytes lie in the storage under `key` (`providers/storage.py`).
"""

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, ForeignKeyConstraint, RowMapping, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Dated, Tenanted, given_rows, rows

LIFETIME = timedelta(days=29)  # of a provider's id: Meta's lives 30 days (whatsapp-cloud-api.md §12)
_LEAST_LEFT = timedelta(days=1)  # for a message that waits or is tried again


class File(Tenanted, Dated, Base):
    __tablename__ = "file"

    digest: Mapped[bytes] = mapped_column(primary_key=True)  # SHA-256
    key: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    mime_type: Mapped[str]  # as its bytes tell, whatever a sender claims

    @staticmethod
    def keep(s: Session, given: dict[str, Any]) -> None:
        """Note a content of a tenant that the storage has, unless it is known: `tenant_id`, `digest`, `key`, `bytes`,
        `mime_type`."""
        s.execute(_KEEP, given)

    @staticmethod
    def of_media(s: Session, given: list[tuple[UUID, UUID]]) -> dict[tuple[UUID, UUID], RowMapping]:
        """What is known of files by `(tenant, id of the media)`: its `state`, and `mime_type`, `bytes` once it is
        stored."""
        if not given:
            return {}
        asked = [{"tenant_id": tenant, "id": id_} for tenant, id_ in dict.fromkeys(given)]
        found = s.execute(_OF_MEDIA, given_rows(asked)).mappings()
        return {(row["tenant_id"], row["id"]): row for row in found}

    @staticmethod
    def total(s: Session, tenant_id: UUID) -> int:
        """The bytes of all files of a tenant."""
        return int(s.scalar(text("SELECT coalesce(sum(bytes), 0) FROM file WHERE tenant_id = :t"), {"t": tenant_id}))


class MediaUpload(Tenanted, Dated, Base):
    """A content that a channel's provider has taken; its id can be sent until it expires."""

    __tablename__ = "media_upload"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "channel_id"], ["channel.tenant_id", "channel.id"], ondelete="CASCADE"),
        ForeignKeyConstraint(["tenant_id", "digest"], ["file.tenant_id", "file.digest"], ondelete="CASCADE"),
    )

    channel_id: Mapped[UUID] = mapped_column(primary_key=True)
    digest: Mapped[bytes] = mapped_column(primary_key=True)
    provider_media_id: Mapped[str]
    expires_at: Mapped[datetime]

    @staticmethod
    def of(s: Session, tenant_id: UUID, channel_id: UUID, media_ids: list[UUID]) -> dict[UUID, RowMapping]:
        """Stored files by the ids of their media: `digest`, `key`, `bytes`, `mime_type`, `filename` (as somebody called
        it, or None), and the `provider_media_id` by which this channel can send them for some time yet, None when they
        must be uploaded first."""
        if not media_ids:
            return {}
        given = {"tenant_id": tenant_id, "channel_id": channel_id, "ids": media_ids, "least_left": _LEAST_LEFT}
        found = s.execute(_OF, given | {"lifetime": LIFETIME}).mappings()
        return {row["media_id"]: row for row in found}

    @staticmethod
    def keep(s: Session, tenant_id: UUID, channel_id: UUID, given: dict[bytes, str]) -> None:
        """The provider has taken these contents just now: its id of each, by digest."""
        if not given:
            return
        taken = [{"digest": digest.hex(), "provider_media_id": id_} for digest, id_ in given.items()]
        ids = {"tenant_id": tenant_id, "channel_id": channel_id, "lifetime": LIFETIME}
        s.execute(_TAKEN, given_rows(taken) | ids)

    @staticmethod
    def forget(s: Session, tenant_id: UUID, channel_id: UUID, provider_media_ids: list[str]) -> None:
        """The provider says that it has not, or no longer, what it called so."""
        if provider_media_ids:
            given = {"tenant_id": tenant_id, "channel_id": channel_id, "ids": provider_media_ids}
            s.execute(_FORGET, given)


_KEEP = text("""
    INSERT INTO file (tenant_id, digest, key, bytes, mime_type)
    VALUES (:tenant_id, :digest, :key, :bytes, :mime_type) ON CONFLICT DO NOTHING
""")

# What an Office file is, its first bytes may leave open: then the claim counts, if it is one that they allow.
_MIME_TYPE = """
    CASE WHEN f.mime_type IN ('application/zip', 'application/x-ole-storage') AND NOT m.is_mislabelled
        THEN coalesce(lower(trim(split_part(m.mime_type, ';', 1))), f.mime_type) ELSE f.mime_type END AS mime_type
"""

# As in models/outgoing.py: until there are statistics, any index that begins with the tenant looks as good as the right
# one, and a tenant may have many files.
_OF_MEDIA = text(f"""
    SELECT m.tenant_id, m.id, m.state, {_MIME_TYPE}, f.bytes
    FROM {rows(tenant_id="uuid", id="uuid")}
    CROSS JOIN LATERAL (
        SELECT * FROM media AS m WHERE (m.tenant_id = given.tenant_id) IS TRUE AND m.id = given.id OFFSET 0
    ) AS m
    LEFT JOIN file AS f ON (f.tenant_id, f.digest) = (m.tenant_id, m.digest)
""")

_OF = text(f"""
    SELECT m.id AS media_id, f.digest, f.key, f.bytes, {_MIME_TYPE}, m.filename, u.provider_media_id
    FROM unnest(CAST(:ids AS uuid[])) AS given (id)
    CROSS JOIN LATERAL (
        SELECT * FROM media AS m WHERE (m.tenant_id = :tenant_id) IS TRUE AND m.id = given.id OFFSET 0
    ) AS m
    JOIN file AS f ON (f.tenant_id, f.digest) = (m.tenant_id, m.digest)
    LEFT JOIN LATERAL (
        SELECT * FROM media_upload AS u
        WHERE u.tenant_id = :tenant_id AND u.channel_id = :channel_id AND u.digest = m.digest
            AND u.expires_at BETWEEN now() + :least_left AND now() + :lifetime OFFSET 0
    ) AS u ON true
    WHERE m.state = 'stored'
""")

# A file that was removed meanwhile has no row to belong to.
_TAKEN = text(f"""
    INSERT INTO media_upload AS u (tenant_id, channel_id, digest, provider_media_id, expires_at)
    SELECT f.tenant_id, :channel_id, f.digest, given.provider_media_id, now() + :lifetime
    FROM {rows(digest="text", provider_media_id="text")}
    JOIN file AS f ON f.tenant_id = :tenant_id AND f.digest = decode(given.digest, 'hex')
    ORDER BY f.digest
    ON CONFLICT (tenant_id, channel_id, digest) DO UPDATE SET provider_media_id = excluded.provider_media_id,
        expires_at = excluded.expires_at, created_at = now()
""")

_FORGET = text("""
    DELETE FROM media_upload
    WHERE tenant_id = :tenant_id AND channel_id = :channel_id AND provider_media_id = ANY(:ids)
""")
