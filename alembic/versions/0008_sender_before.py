"""Who sends a SIP account's REGISTER once it is taken over from a controller again.

Revision: 0008
Revises: 0007
Created: 2026-11-23 02:00:00
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0008"
down_revision: str | Sequence[str] | None = "0007"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("sip_registration", sa.Column("sender_before", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("sip_registration", "sender_before")
