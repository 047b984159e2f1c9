"""Gateways: how their instances stand, the tokens of their webhooks, sync reports and sessions.

Revision: 0004
Revises: 0003
Created: 2026-11-22 15:20:00
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | Sequence[str] | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

SEEN = "tenant_id = ANY ((SELECT nullif(current_setting('app.tenant_ids', true), '')::uuid[])::uuid[])"
TIME = sa.TIMESTAMP(timezone=True)
TRAFFIC = "direction = 'in' OR sent_at IS NOT NULL"
NAMELESS = "status = 'sent' AND provider_id IS NULL AND type <> 'read'"
STANDING = (
    sa.Column("status", sa.Text(), nullable=True),
    sa.Column("status_raw", sa.Text(), nullable=True),
    sa.Column("status_at", TIME, nullable=True),
    sa.Column("status_since", TIME, nullable=True),
    sa.Column("told_at", TIME, nullable=True),
    sa.Column("told_first_at", TIME, nullable=True),
    sa.Column("check_at", TIME, nullable=True),
    sa.Column("check_until", TIME, nullable=True),
    sa.Column("unknown_since", TIME, nullable=True),
    sa.Column("unknown_reason", sa.Text(), nullable=True),
    sa.Column("silent_since", TIME, nullable=True),
    sa.Column("own_id", sa.Text(), nullable=True),
)


def upgrade() -> None:
    for column in STANDING:
        op.add_column("channel", column)
    op.add_column("media", sa.Column("keys", sa.dialects.postgresql.JSONB(), nullable=True))
    op.create_index(
        "ix_message_nameless", "message", ["tenant_id", "conversation_id"], postgresql_where=sa.text(NAMELESS)
    )
    op.create_index(
        "ix_message_traffic",
        "message",
        ["tenant_id", "channel_id", sa.text("coalesce(sent_at, created_at)")],
        postgresql_where=sa.text(TRAFFIC),
    )
    op.create_table(
        "webhook_token",
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("channel_id", sa.Uuid(), nullable=False),
        sa.Column("instance", sa.Text(), nullable=True),
        sa.Column("created_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "channel_id"],
            ["channel.tenant_id", "channel.id"],
            name=op.f("fk_webhook_token_tenant_id_channel_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_webhook_token")),
    )
    op.create_index(op.f("ix_webhook_token_channel_id"), "webhook_token", ["channel_id"])
    op.create_table(
        "sync_report",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=True),
        sa.Column("is_dry", sa.Boolean(), nullable=False),
        sa.Column("is_due", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("state", sa.Text(), server_default="pending", nullable=False),
        sa.Column("next_ring_at", TIME, nullable=True),
        sa.Column("started_at", TIME, nullable=True),
        sa.Column("finished_at", TIME, nullable=True),
        sa.Column("result", sa.dialects.postgresql.JSONB(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenant.id"], name=op.f("fk_sync_report_tenant_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sync_report")),
    )
    op.create_index(
        "uq_sync_report_open",
        "sync_report",
        [sa.text("coalesce(tenant_id, '00000000-0000-0000-0000-000000000000')"), "is_dry"],
        unique=True,
        postgresql_where=sa.text("state IN ('pending', 'running')"),
    )
    op.create_table(
        "session",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("channel_id", sa.Uuid(), nullable=False),
        sa.Column("state", sa.Text(), server_default="disconnected", nullable=False),
        sa.Column("state_since", TIME, server_default=sa.text("now()"), nullable=False),
        sa.Column("wish", sa.Text(), nullable=True),
        sa.Column("wished_at", TIME, nullable=True),
        sa.Column("next_step_at", TIME, nullable=True),
        sa.Column("next_ring_at", TIME, nullable=True),
        sa.Column("claim_token", sa.Uuid(), nullable=True),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("qr", sa.LargeBinary(), nullable=True),
        sa.Column("qr_type", sa.Text(), nullable=True),
        sa.Column("qr_at", TIME, nullable=True),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "channel_id"],
            ["channel.tenant_id", "channel.id"],
            name=op.f("fk_session_tenant_id_channel_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "channel_id", name=op.f("pk_session")),
    )
    op.create_index("ix_session_due", "session", ["next_step_at"], postgresql_where=sa.text("next_step_at IS NOT NULL"))
    op.execute("ALTER TABLE session ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE session FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY tenant_isolation ON session USING ({SEEN}) WITH CHECK ({SEEN})")


def downgrade() -> None:
    op.drop_table("session")
    op.drop_table("sync_report")
    op.drop_table("webhook_token")
    op.drop_index("ix_message_traffic", table_name="message")
    op.drop_index("ix_message_nameless", table_name="message")
    # Whatever came through a gateway cannot be fetched by what was before it.
    op.execute("ALTER TABLE media NO FORCE ROW LEVEL SECURITY")
    op.execute("UPDATE media SET state = 'failed', error_code = 'gone' WHERE keys IS NOT NULL AND state = 'pending'")
    op.execute("ALTER TABLE media FORCE ROW LEVEL SECURITY")
    op.drop_column("media", "keys")
    for column in reversed(STANDING):
        op.drop_column("channel", column.name)
