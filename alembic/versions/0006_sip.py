"""SIP accounts: what they are registered with, how they stand, who works on them.

Revision: 0006
Revises: 0005
Created: 2026-11-22 22:00:00
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision: str = "0006"
down_revision: str | Sequence[str] | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

SEEN = "tenant_id = ANY ((SELECT nullif(current_setting('app.tenant_ids', true), '')::uuid[])::uuid[])"
TIME = sa.TIMESTAMP(timezone=True)
NOW = sa.text("now()")
ZERO = sa.text("0")


def upgrade() -> None:
    op.create_table(
        "sip_registration",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("port", sa.Integer(), nullable=True),
        sa.Column("transport", sa.Text(), server_default="udp", nullable=False),
        sa.Column("proxy", sa.Text(), nullable=True),
        sa.Column("username", sa.Text(), nullable=False),
        sa.Column("auth_username", sa.Text(), nullable=True),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("interval", sa.Integer(), server_default=sa.text("300"), nullable=False),
        sa.Column("sender", sa.Text(), server_default="auto", nullable=False),
        sa.Column("contact_host", sa.Text(), nullable=True),
        sa.Column("contact_token", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=True),
        sa.Column("allows_md5", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("external_id", sa.Text(), nullable=True),
        sa.Column("is_enabled", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("removed_at", TIME, nullable=True),
        sa.Column("revision", sa.Integer(), server_default=ZERO, nullable=False),
        sa.Column("register_status", sa.Text(), server_default="pending", nullable=False),
        sa.Column("register_error", sa.Text(), nullable=True),
        sa.Column("last_register_at", TIME, nullable=True),
        sa.Column("next_refresh_at", TIME, server_default=NOW, nullable=True),
        sa.Column("expires_at", TIME, nullable=True),
        sa.Column("granted", sa.Integer(), nullable=True),
        sa.Column("registered_since", TIME, nullable=True),
        sa.Column("unregistered_since", TIME, server_default=NOW, nullable=True),
        sa.Column("last_attempt_at", TIME, nullable=True),
        sa.Column("last_outcome", sa.Text(), nullable=True),
        sa.Column("last_status_code", sa.Integer(), nullable=True),
        sa.Column("failures", sa.Integer(), server_default=ZERO, nullable=False),
        sa.Column("server", sa.Text(), nullable=True),
        sa.Column("contact", sa.Text(), nullable=True),
        sa.Column("algorithm", sa.Text(), nullable=True),
        sa.Column("call_id", sa.Text(), nullable=False),
        sa.Column("from_tag", sa.Text(), nullable=False),
        sa.Column("cseq", sa.BigInteger(), server_default=ZERO, nullable=False),
        sa.Column("history", JSONB(), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("asked_at", TIME, nullable=True),
        sa.Column("claim_token", sa.Uuid(), nullable=True),
        sa.Column("claimed_until", TIME, nullable=True),
        sa.Column("report_at", TIME, nullable=True),
        sa.Column("report_revision", sa.Integer(), server_default=ZERO, nullable=False),
        sa.Column("report_claimed_until", TIME, nullable=True),
        sa.Column("report_failures", sa.Integer(), server_default=ZERO, nullable=False),
        sa.Column("report_error", sa.Text(), nullable=True),
        sa.Column("reported_at", TIME, nullable=True),
        sa.Column("updated_at", TIME, server_default=NOW, nullable=False),
        sa.Column("created_at", TIME, server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("pk_sip_registration")),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenant.id"], name=op.f("fk_sip_registration_tenant_id"), ondelete="CASCADE"
        ),
    )
    is_ours = sa.text("next_refresh_at IS NOT NULL AND sender <> 'external'")
    is_there = sa.text("removed_at IS NULL")
    name = ["tenant_id", "name"]
    op.create_index("uq_sip_registration_name", "sip_registration", name, unique=True, postgresql_where=is_there)
    op.create_index("ix_sip_registration_contact", "sip_registration", ["contact_token"])
    op.create_index(
        "ix_sip_registration_due",
        "sip_registration",
        ["next_refresh_at"],
        postgresql_where=is_ours,
    )
    op.create_index(
        "ix_sip_registration_place",
        "sip_registration",
        [sa.text("coalesce(proxy, host)"), "next_refresh_at"],
        postgresql_where=is_ours,
    )
    op.create_index(
        "ix_sip_registration_expiry",
        "sip_registration",
        ["expires_at"],
        postgresql_where=sa.text("register_status = 'registered'"),
    )
    op.create_index(
        "ix_sip_registration_report",
        "sip_registration",
        ["report_at"],
        postgresql_where=sa.text("report_at IS NOT NULL"),
    )
    op.execute("ALTER TABLE sip_registration ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE sip_registration FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY tenant_isolation ON sip_registration USING ({SEEN}) WITH CHECK ({SEEN})")


def downgrade() -> None:
    op.drop_table("sip_registration")
