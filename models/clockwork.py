"""What the clocks of a fleet share so that two of them are as good as one: leases, and ticks claimed once."""

from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base


class Lease(Base):
    """Who does a thing that one process at a time may do. A row, since poolers break advisory locks."""

    __tablename__ = "lease"

    name: Mapped[str] = mapped_column(primary_key=True)
    token: Mapped[UUID]
    until: Mapped[datetime]
    done_at: Mapped[datetime | None]  # when the holder last finished a round: what `pombal_clock_lag_seconds` tells

    @staticmethod
    def take(s: Session, name: str, token: UUID, length: timedelta) -> bool:
        """Take or renew the lease; False while another holds it. Measured by the database's clock."""
        taken = s.execute(
            text("""
                INSERT INTO lease (name, token, until) VALUES (:name, :token, now() + :length)
                ON CONFLICT (name) DO UPDATE SET token = excluded.token, until = excluded.until
                WHERE lease.token = excluded.token OR lease.until < now()
                RETURNING 1
            """),
            {"name": name, "token": token, "length": length},
        )
        return taken.first() is not None

    @staticmethod
    def finished(s: Session, name: str, token: UUID) -> None:
        s.execute(
            text("UPDATE lease SET done_at = clock_timestamp() WHERE name = :name AND token = :token"),
            {"name": name, "token": token},
        )

    @staticmethod
    def release(s: Session, name: str, token: UUID) -> None:
        """Let another take over at once."""
        s.execute(
            text("UPDATE lease SET until = now() WHERE name = :name AND token = :token"), {"name": name, "token": token}
        )


class Tick(Base):
    """A minute of a schedule that somebody has begun. periodiq ticks once per scheduler, and again at a restart."""

    __tablename__ = "tick"

    name: Mapped[str] = mapped_column(primary_key=True)
    minute: Mapped[datetime] = mapped_column(primary_key=True)

    @staticmethod
    def claim(s: Session, name: str) -> bool:
        """True for the first caller in this minute of the database's clock; ticks older than a day are dropped."""
        claimed = s.execute(
            text("""
                INSERT INTO tick (name, minute) VALUES (:name, date_trunc('minute', now()))
                ON CONFLICT DO NOTHING RETURNING 1
            """),
            {"name": name},
        ).first()
        if claimed:
            s.execute(text("DELETE FROM tick WHERE name = :name AND minute < now() - interval '1 day'"), {"name": name})
        return claimed is not None
