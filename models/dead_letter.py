"""What was given up, kept beyond Redis until an operator retries or drops it.

One row per job, per quarantined delivery, per bad element of a delivery (`path`), or per outgoing message that was
given up. A letter of a delivery or message that comes back after a retry reopens its row, unless somebody dropped that
element; a job that fails again is another job. Rows hold ids and reasons, never content.
"""

import hashlib
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import Index, Select, and_, case, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Dated, id_column
from pombal.ids import uuid7


class LetterState(StrEnum):
    OPEN = "open"
    RETRIED = "retried"
    DROPPED = "dropped"
    SETTLED = "settled"  # what it was about has ended well after all


class DeadLetter(Dated, Base):
    """`tenant_id` is NULL while nobody knows whose it is; the table's policy shows such rows to every operator."""

    __tablename__ = "dead_letter"
    __table_args__ = (
        Index("ix_dead_letter_open", "fingerprint", postgresql_where=text("state = 'open'")),
        Index("ix_dead_letter_delivery_id", "delivery_id"),
        Index("ix_dead_letter_message_id", "message_id", postgresql_where=text("message_id IS NOT NULL")),
    )

    id: Mapped[UUID] = id_column()
    key: Mapped[str] = mapped_column(unique=True)
    tenant_id: Mapped[UUID | None]
    state: Mapped[str] = mapped_column(server_default=LetterState.OPEN)
    actor: Mapped[str]
    queue: Mapped[str]
    args: Mapped[dict[str, Any]]  # `{"args": […], "kwargs": {…}}` of the job: ids and small values
    delivery_id: Mapped[UUID | None]
    message_id: Mapped[UUID | None]  # an outgoing message that was given up
    path: Mapped[str | None]
    error: Mapped[str]
    traceback: Mapped[str | None]
    fingerprint: Mapped[str]
    failures: Mapped[int] = mapped_column(server_default=text("0"))  # how often the job was tried in vain
    count: Mapped[int] = mapped_column(server_default=text("1"))  # how often it ended here
    last_at: Mapped[datetime] = mapped_column(server_default=func.now())

    @staticmethod
    def record(s: Session, letters: list[dict[str, Any]]) -> None:
        """Write letters made by `letter`, sorted by key; one that is already there is reopened and counted."""
        if not letters:
            return
        unique = {row["key"]: row for row in letters}
        statement = insert(DeadLetter)
        fresh = ("error", "traceback", "fingerprint", "failures", "args")
        was_dropped = and_(DeadLetter.state == LetterState.DROPPED, DeadLetter.path.is_not(None))
        s.execute(
            statement.on_conflict_do_update(
                index_elements=["key"],
                set_={
                    **{name: statement.excluded[name] for name in fresh},
                    "state": case((was_dropped, LetterState.DROPPED), else_=LetterState.OPEN),
                    "tenant_id": func.coalesce(statement.excluded.tenant_id, DeadLetter.tenant_id),
                    "count": DeadLetter.count + 1,
                    "last_at": func.now(),
                },
            ),
            [unique[key] for key in sorted(unique)],
        )

    @staticmethod
    def settle(s: Session, message_ids: list[UUID]) -> None:
        """These messages were sent after all: nobody needs to decide any more."""
        if message_ids:
            about = and_(DeadLetter.message_id.in_(message_ids), DeadLetter.state == LetterState.OPEN)
            s.execute(update(DeadLetter).where(about).values(state=LetterState.SETTLED))

    @classmethod
    def open_letters(cls, fingerprint: str | None = None) -> Select["DeadLetter"]:
        """What waits for an operator, newest first."""
        query = select(cls).where(cls.state == LetterState.OPEN).order_by(cls.last_at.desc(), cls.id.desc())
        return query.where(cls.fingerprint == fingerprint) if fingerprint else query


def message_letter(message: Any, error: str, cause: str | None) -> dict[str, Any]:
    """The row of an outgoing message that was given up; `message` has tenant_id, id, channel_id and attempts.

    `error` must not repeat a provider's text, which may name the recipient: that is for the tenant, in the message.
    """
    return letter(
        key=f"message:{message['id']}",
        actor="outgoing_message",
        args=[str(message["channel_id"])],
        tenant_id=message["tenant_id"],
        message_id=message["id"],
        error=error,
        cause=cause,
        failures=message["attempts"],
    )


def letter(
    *,
    key: str,
    actor: str,
    error: str,
    args: list[Any],
    kwargs: dict[str, Any] | None = None,
    queue: str | None = None,
    tenant_id: UUID | None = None,
    delivery_id: UUID | None = None,
    message_id: UUID | None = None,
    path: str | None = None,
    traceback: str | None = None,
    cause: str | None = None,
    failures: int = 0,
) -> dict[str, Any]:
    """One row for `DeadLetter.record`. `cause` groups letters of the same origin; by default the error's text does."""
    return {
        "id": uuid7(),
        "key": key,
        "tenant_id": tenant_id,
        "state": LetterState.OPEN,
        "actor": actor,
        "queue": queue or actor,
        "args": {"args": args, "kwargs": kwargs or {}},
        "delivery_id": delivery_id,
        "message_id": message_id,
        "path": path,
        "error": error,
        "traceback": traceback,
        "fingerprint": hashlib.sha256(f"{actor}\n{cause or error}".encode()).hexdigest()[:12],
        "failures": failures,
    }
