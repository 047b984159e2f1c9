"""Repair of Baileys sessions: errors, ends, looks, repairs, pauses, and how far logs were read.

Revision: 0005
Revises: 0004
Created: 2026-11-22 19:00:00
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision: str = "0005"
down_revision: str | Sequence[str] | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

SEEN = "tenant_id = ANY ((SELECT nullif(current_setting('app.tenant_ids', true), '')::uuid[])::uuid[])"
TIME = sa.TIMESTAMP(timezone=True)
NOW = sa.text("now()")
IS_OPEN = sa.text("state <> 'closed'")
TENANTED = ("session_error", "session_end", "session_look", "repair")


def upgrade() -> None:
    op.create_table(
        "session_error",
        *_of_a_channel("session_error"),
        sa.Column("jid", sa.Text(), nullable=False),
        sa.Column("message_id", sa.Text(), nullable=False),
        sa.Column("participant", sa.Text(), server_default="", nullable=False),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("last_at", TIME, nullable=False),
        sa.Column("times", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column("healed_at", TIME, nullable=True),
        sa.Column("created_at", TIME, server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "channel_id", "jid", "message_id", name=op.f("pk_session_error")),
    )
    op.create_index(
        "ix_session_error_open",
        "session_error",
        ["tenant_id", "channel_id", "at"],
        postgresql_where=sa.text("healed_at IS NULL"),
    )
    op.create_table(
        "session_end",
        *_of_a_channel("session_end"),
        sa.Column("code", sa.Integer(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("times", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "channel_id", "code", name=op.f("pk_session_end")),
    )
    op.create_table(
        "session_look",
        *_of_a_channel("session_look"),
        sa.Column("at", TIME, server_default=NOW, nullable=False),
        sa.Column("times", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "channel_id", name=op.f("pk_session_look")),
    )
    op.create_table(
        "repair",
        *_of_a_channel("repair"),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="open", nullable=False),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("is_by_hand", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("wanted_step", sa.Text(), nullable=True),
        sa.Column("since", TIME, nullable=False),
        sa.Column("evidence", JSONB(), nullable=False),
        sa.Column("steps", JSONB(), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("step", sa.Text(), nullable=False),
        sa.Column("phase", sa.Text(), server_default="planned", nullable=False),
        sa.Column("phase_at", TIME, server_default=NOW, nullable=False),
        sa.Column("step_at", TIME, server_default=NOW, nullable=False),
        sa.Column("failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("says", sa.Text(), nullable=True),
        sa.Column("names", JSONB(), nullable=True),
        sa.Column("asked_for_qr", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("next_at", TIME, server_default=NOW, nullable=True),
        sa.Column("next_ring_at", TIME, nullable=True),
        sa.Column("claim_token", sa.Uuid(), nullable=True),
        sa.Column("opened_at", TIME, server_default=NOW, nullable=False),
        sa.Column("closed_at", TIME, nullable=True),
        sa.Column("created_at", TIME, server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("pk_repair")),
    )
    op.create_index("uq_repair_open", "repair", ["tenant_id", "channel_id"], unique=True, postgresql_where=IS_OPEN)
    op.create_index("ix_repair_due", "repair", ["next_at"], postgresql_where=IS_OPEN)
    op.create_index("ix_repair_channel", "repair", ["tenant_id", "channel_id", "opened_at"])
    op.create_index("ix_repair_host", "repair", ["host"], postgresql_where=sa.text("asked_for_qr"))
    op.create_table(
        "repair_pause",
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("at", TIME, server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("scope", name=op.f("pk_repair_pause")),
    )
    op.create_table(
        "log_position",
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("inode", sa.BigInteger(), nullable=False),
        sa.Column("head", sa.LargeBinary(), nullable=False),
        sa.Column("offset", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", TIME, server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("path", name=op.f("pk_log_position")),
    )
    for table in TENANTED:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY tenant_isolation ON {table} USING ({SEEN}) WITH CHECK ({SEEN})")


def _of_a_channel(table: str) -> tuple[sa.Column[object], sa.Column[object], sa.ForeignKeyConstraint]:
    return (
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("channel_id", sa.Uuid(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "channel_id"],
            ["channel.tenant_id", "channel.id"],
            name=op.f(f"fk_{table}_tenant_id_channel_id"),
            ondelete="CASCADE",
        ),
    )


def downgrade() -> None:
    for table in ("log_position", "repair_pause", *reversed(TENANTED)):
        op.drop_table(table)
