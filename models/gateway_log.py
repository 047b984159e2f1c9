"""How far the log of a gateway has been read: kept in the same commit as what was read (`workers/_follower.py`)."""

from datetime import datetime

from sqlalchemy import BigInteger, func
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base


class LogPosition(Base):
    """`path` names what is followed. `head` is a digest of the file's beginning and of what stands before the offset: a
    file that was truncated and written anew begins otherwise."""

    __tablename__ = "log_position"

    path: Mapped[str] = mapped_column(primary_key=True)
    inode: Mapped[int] = mapped_column(BigInteger)
    head: Mapped[bytes]
    offset: Mapped[int] = mapped_column(BigInteger)
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())
    # By the database's clock: what the log said before then has been read. It moves on while the log is silent.
    read_until: Mapped[datetime] = mapped_column(server_default=func.now())
