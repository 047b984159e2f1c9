"""From when the step of a repair is judged, which log told of an error, and until when that log has been read.

Revision: 0007
Revises: 0006
Created: 2026-11-23 01:20:00
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0007"
down_revision: str | Sequence[str] | None = "0006"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

TIME = sa.TIMESTAMP(timezone=True)


def upgrade() -> None:
    op.add_column("repair", sa.Column("judged_from", TIME, nullable=True))
    op.add_column("session_error", sa.Column("log", sa.Text(), nullable=True))
    op.create_index(
        "ix_session_error_log",
        "session_error",
        ["tenant_id", "channel_id", "at"],
        postgresql_where=sa.text("log IS NOT NULL"),
    )
    op.add_column("log_position", sa.Column("read_until", TIME, server_default=sa.text("now()"), nullable=False))


def downgrade() -> None:
    op.drop_column("log_position", "read_until")
    op.drop_index("ix_session_error_log", "session_error")
    op.drop_column("session_error", "log")
    op.drop_column("repair", "judged_from")
