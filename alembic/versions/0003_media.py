"""Media: what became of each file, the contents that are stored, and those that a provider has taken.

Revision: 0003
Revises: 0002
Created: 2026-11-22 12:50:00
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | Sequence[str] | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

SEEN = "tenant_id = ANY ((SELECT nullif(current_setting('app.tenant_ids', true), '')::uuid[])::uuid[])"
TIME = sa.TIMESTAMP(timezone=True)
NEW = (
    sa.Column("link", sa.Text(), nullable=True),
    sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
    sa.Column("crashes", sa.Integer(), server_default=sa.text("0"), nullable=False),
    sa.Column("next_ring_at", TIME, server_default=sa.text("now()"), nullable=False),
    sa.Column("claim_token", sa.Uuid(), nullable=True),
    sa.Column("digest", sa.LargeBinary(), nullable=True),
    sa.Column("is_mislabelled", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    sa.Column("error_code", sa.Text(), nullable=True),
    sa.Column("error", sa.Text(), nullable=True),
    sa.Column("ended_at", TIME, nullable=True),
)
INDEXES = (
    ("ix_media_line", ["tenant_id", "deadline"], "state = 'pending'"),
    ("ix_media_claimed", ["tenant_id"], "claim_token IS NOT NULL"),
    ("ix_media_digest", ["tenant_id", "digest"], None),
)


def upgrade() -> None:
    for column in NEW:
        op.add_column("media", column)
    op.add_column("media", sa.Column("id", sa.Uuid(), nullable=True))
    # Policies hold for the owner as well; whoever migrates sees all rows for this one statement.
    op.execute("ALTER TABLE media NO FORCE ROW LEVEL SECURITY")
    op.execute("UPDATE media SET id = message_id")
    op.execute("ALTER TABLE media FORCE ROW LEVEL SECURITY")
    op.drop_constraint("pk_media", "media", type_="primary")
    op.alter_column("media", "id", nullable=False, server_default=sa.text("gen_random_uuid()"))
    op.create_primary_key("pk_media", "media", ["tenant_id", "id"])
    for name in ("message_id", "channel_id", "provider_media_id"):
        op.alter_column("media", name, nullable=True)
    op.create_unique_constraint("uq_media_tenant_id_message_id", "media", ["tenant_id", "message_id"])
    for name, columns, where in INDEXES:
        op.create_index(name, "media", columns, postgresql_where=sa.text(where) if where else None)
    op.create_table(
        "file",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("mime_type", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "digest", name=op.f("pk_file")),
    )
    op.create_table(
        "media_upload",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("channel_id", sa.Uuid(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("provider_media_id", sa.Text(), nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.Column("created_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "channel_id"],
            ["channel.tenant_id", "channel.id"],
            name=op.f("fk_media_upload_tenant_id_channel_id"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "digest"],
            ["file.tenant_id", "file.digest"],
            name=op.f("fk_media_upload_tenant_id_digest"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "channel_id", "digest", name=op.f("pk_media_upload")),
    )
    for table in ("file", "media_upload"):
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY tenant_isolation ON {table} USING ({SEEN}) WITH CHECK ({SEEN})")


def downgrade() -> None:
    op.drop_table("media_upload")
    op.drop_table("file")
    for name, _, _ in reversed(INDEXES):
        op.drop_index(name, table_name="media")
    op.drop_constraint("uq_media_tenant_id_message_id", "media", type_="unique")
    op.drop_constraint("pk_media", "media", type_="primary")
    op.execute("ALTER TABLE media NO FORCE ROW LEVEL SECURITY")
    # What the tables of before cannot hold: uploads, files behind links; and of the others that they are over.
    op.execute("DELETE FROM media WHERE message_id IS NULL OR channel_id IS NULL OR provider_media_id IS NULL")
    op.execute("UPDATE media SET state = 'pending', next_attempt_at = now()")
    op.execute("ALTER TABLE media FORCE ROW LEVEL SECURITY")
    for name in ("message_id", "channel_id", "provider_media_id"):
        op.alter_column("media", name, nullable=False)
    op.create_primary_key("pk_media", "media", ["tenant_id", "message_id"])
    op.drop_column("media", "id")
    for column in reversed(NEW):
        op.drop_column("media", column.name)
