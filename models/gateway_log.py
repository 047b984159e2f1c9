"""How far the log of a gateway has been read: kept in the same commit as what was read (`workers/_follower.py`)."""

from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import BigInteger, func, select, text, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, given_rows, rows

FOLLOWED = timedelta(days=1)
"""For which a log counts as one that is to be followed, after somebody last read it."""


class Sign(NamedTuple):
    """That a log is read: up to this place, and all that it said before `read_until`, which is None for one behind."""

    path: str
    inode: int
    byte: int
    read_until: datetime | None


class LogPosition(Base):
    """`path` names what is followed (`key`). `head` is a digest of the file's beginning and of what stands before the
    offset: a file that was truncated and written anew begins otherwise."""

    __tablename__ = "log_position"

    path: Mapped[str] = mapped_column(primary_key=True)
    inode: Mapped[int] = mapped_column(BigInteger)
    head: Mapped[bytes]
    offset: Mapped[int] = mapped_column(BigInteger)
    # Both by the database's clock: when its follower last gave a sign of life, and until when the log has been read:
    # what it said before then is noted. The latter moves on while the log is silent.
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())
    read_until: Mapped[datetime] = mapped_column(server_default=func.now())

    @staticmethod
    def key(name: str, whose: str, tenant: str, gateway: str, path: str) -> str:
        """What a follower of this name calls a log. `whose`: the channel it is of, or the field that names sessions;
        `tenant` and `gateway` narrow which are meant, '' does not."""
        return "|".join([name.replace("|", "%7C"), whose, tenant, gateway, path])

    @property
    def file(self) -> str:
        """The followed path alone."""
        return self.path.split("|", 4)[-1]

    @staticmethod
    def sign(s: Session, signs: list[Sign]) -> None:
        """Note that somebody reads these logs. One that stands elsewhere by now is another follower's, and is left."""
        s.execute(_SIGN, given_rows([one._asdict() for one in signs]))

    @staticmethod
    def let_go(s: Session, paths: list[str]) -> None:
        """Nobody is to follow these any more: nothing waits until they are read."""
        free = select(LogPosition.path).where(LogPosition.path.in_(paths)).with_for_update(skip_locked=True)
        order = update(LogPosition).where(LogPosition.path.in_(free))
        s.execute(order.values(updated_at=func.least(LogPosition.updated_at, func.now() - 2 * FOLLOWED)))

    @classmethod
    def to_follow(cls, s: Session, prefix: str) -> list["LogPosition"]:
        """Those that are to be followed whose keys begin so."""
        query = select(cls).where(cls.updated_at > func.now() - FOLLOWED, cls.path.startswith(prefix, autoescape=True))
        return list(s.scalars(query))

    @classmethod
    def unread(cls, s: Session, age: timedelta) -> list["LogPosition"]:
        """Those that are to be followed and have not been read for so long."""
        query = select(cls).where(cls.updated_at > func.now() - FOLLOWED, cls.read_until < func.now() - age)
        return list(s.scalars(query.order_by(cls.path)))


_SIGN = text(f"""
    WITH mine AS (
        SELECT p.path, given.read_until
        FROM {rows(path="text", inode="bigint", byte="bigint", read_until="timestamptz")}
        JOIN log_position AS p ON (p.path, p.inode, p."offset") = (given.path, given.inode, given.byte)
        FOR UPDATE OF p SKIP LOCKED
    )
    UPDATE log_position AS p SET updated_at = now(), read_until = greatest(p.read_until, mine.read_until)
    FROM mine WHERE p.path = mine.path
""")


READ_UNTIL = f"""
    SELECT min(read_until) FROM log_position
    WHERE updated_at > now() - interval '{FOLLOWED.days} day' AND path IN (
        SELECT log FROM session_error
        WHERE tenant_id = :tenant_id AND channel_id = :channel_id AND at > now() - interval '{FOLLOWED.days} day'
            AND log IS NOT NULL
    )
"""
"""SQL: until when all logs have been read that told of this channel's errors lately; NULL where none did."""
