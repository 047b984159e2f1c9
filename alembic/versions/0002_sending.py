"""Sending: what an outgoing message waits for, its attempts, and the lanes.

Revision: 0002
Revises: 0001
Created: 2026-11-22 09:20:00
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | Sequence[str] | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

SEEN = "tenant_id = ANY ((SELECT nullif(current_setting('app.tenant_ids', true), '')::uuid[])::uuid[])"
TIME = sa.TIMESTAMP(timezone=True)
LINE = sa.text("status IN ('queued', 'sending', 'unknown')")

MESSAGE = (
    sa.Column("recipient", sa.Text(), nullable=True),
    sa.Column("turn_at", TIME, nullable=True),
    sa.Column("due_at", TIME, nullable=True),
    *(sa.Column(name, sa.Integer(), server_default=sa.text("0"), nullable=False)
      for name in ("attempts", "tries", "throttles", "unknowns")),
    sa.Column("attempt_id", sa.Uuid(), nullable=True),
    sa.Column("idempotency_key", sa.Text(), nullable=True),
    sa.Column("request_digest", sa.LargeBinary(), nullable=True),
    sa.Column("request_id", sa.Text(), nullable=True),
)  # fmt: skip


def upgrade() -> None:
    for column in MESSAGE:
        op.add_column("message", column)
    op.create_index(
        "ix_message_due",
        "message",
        ["tenant_id", "channel_id", "due_at", "id"],
        postgresql_where=sa.text("due_at IS NOT NULL"),
    )
    op.create_index(
        "ix_message_line", "message", ["tenant_id", "conversation_id", "turn_at", "id"], postgresql_where=LINE
    )
    op.create_index(
        "ix_message_unknown",
        "message",
        ["tenant_id", "channel_id", "due_at"],
        postgresql_where=sa.text("status = 'unknown' AND due_at IS NOT NULL"),
    )
    op.create_index(
        "ix_message_sending", "message", ["tenant_id", "channel_id"], postgresql_where=sa.text("status = 'sending'")
    )
    op.create_index(
        "uq_message_idempotency_key",
        "message",
        ["tenant_id", "idempotency_key"],
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_table(
        "attempt",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("message_id", sa.Uuid(), nullable=False),
        sa.Column("channel_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("started_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.Column("ended_at", TIME, nullable=True),
        sa.Column("outcome", sa.Text(), server_default="sending", nullable=False),
        sa.Column("settled_by", sa.Text(), nullable=True),
        sa.Column("provider_id", sa.Text(), nullable=True),
        sa.Column("http_status", sa.Integer(), nullable=True),
        sa.Column("error_class", sa.Text(), nullable=True),
        sa.Column("error_scope", sa.Text(), nullable=True),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("trace_id", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant_id", "message_id"],
            ["message.tenant_id", "message.id"],
            name=op.f("fk_attempt_tenant_id_message_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("pk_attempt")),
        sa.UniqueConstraint("message_id", "number", "tenant_id", name=op.f("uq_attempt_message_id_number_tenant_id")),
    )
    op.create_index("ix_attempt_provider_id", "attempt", ["provider_id", "tenant_id"])
    op.create_index("ix_attempt_sending", "attempt", ["channel_id"], postgresql_where=sa.text("outcome = 'sending'"))
    op.create_table(
        "lane",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("channel_id", sa.Uuid(), nullable=False),
        sa.Column("app_id", sa.Uuid(), nullable=True),
        sa.Column("waba_id", sa.Text(), nullable=True),
        sa.Column("token", sa.Uuid(), nullable=True),
        sa.Column("until", TIME, nullable=True),
        sa.Column("next_due_at", TIME, nullable=True),
        sa.Column("next_ring_at", TIME, nullable=True),
        sa.Column("paused_until", TIME, nullable=True),
        sa.Column("pause_code", sa.Text(), nullable=True),
        sa.Column("misses", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("pace", sa.Float(), server_default=sa.text("1"), nullable=False),
        sa.Column("hold", sa.Text(), nullable=True),
        sa.Column("hold_code", sa.Text(), nullable=True),
        sa.Column("hold_reason", sa.Text(), nullable=True),
        sa.Column("is_hold_of_status", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("held_at", TIME, nullable=True),
        sa.Column("probes", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("next_probe_at", TIME, nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant_id", "channel_id"],
            ["channel.tenant_id", "channel.id"],
            name=op.f("fk_lane_tenant_id_channel_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "channel_id", name=op.f("pk_lane")),
        sa.UniqueConstraint("channel_id", name=op.f("uq_lane_channel_id")),
        postgresql_with={"fillfactor": "50"},
    )
    op.create_index("ix_lane_due", "lane", ["next_due_at"], postgresql_where=sa.text("next_due_at IS NOT NULL"))
    op.create_index("ix_lane_app", "lane", ["app_id", "waba_id"])
    op.add_column("dead_letter", sa.Column("message_id", sa.Uuid(), nullable=True))
    op.create_index(
        "ix_dead_letter_message_id", "dead_letter", ["message_id"], postgresql_where=sa.text("message_id IS NOT NULL")
    )
    op.execute("ALTER TABLE attempt ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE attempt FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY tenant_isolation ON attempt USING ({SEEN}) WITH CHECK ({SEEN})")


def downgrade() -> None:
    op.drop_index("ix_dead_letter_message_id", table_name="dead_letter")
    op.drop_column("dead_letter", "message_id")
    op.drop_table("lane")
    op.drop_table("attempt")
    for index in (
        "uq_message_idempotency_key",
        "ix_message_sending",
        "ix_message_unknown",
        "ix_message_line",
        "ix_message_due",
    ):
        op.drop_index(index, table_name="message")
    for column in reversed(MESSAGE):
        op.drop_column("message", column.name)
