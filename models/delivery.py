"""One webhook body as it arrived: raw bytes, and where its processing stands. The inbox that nothing is lost from.

Partitioned by day on its id (a UUIDv7), so every statement names ids and touches one partition. Times are the
database's own. A row is worked on under a claim: a token and an end. Whoever ends the work gives a verdict, fenced by
the token; a claim that ran out without a verdict means that its process died, and makes the row a *suspect*, which is
claimed alone from then on until it gets a verdict, or has killed three processes.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import Index, RowMapping, TextClause, func, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base
from pombal.errors import Temporary

_CLAIM = timedelta(seconds=30)  # for a batch
_CLAIM_ALONE = timedelta(seconds=20)  # for one body: longer than a statement may take, and parked within 120 s
FATAL_CRASHES = 3
_RING_AGAIN = timedelta(seconds=30)


class DeliveryState(StrEnum):
    PENDING = "pending"
    DONE = "done"
    DEAD = "dead"
    IGNORED = "ignored"


class LostClaim(Temporary):
    """The claim ran out and somebody else has the rows now; whatever was done under it must be rolled back."""


class Delivery(Base):
    __tablename__ = "delivery"
    __table_args__ = (
        # For taking sources in turn: each source's oldest, however many rows another has (`_in_turn`).
        Index(
            "ix_delivery_source", text("coalesce(app_id, channel_id)"), "id", postgresql_where=text("state = 'pending'")
        ),
        {"postgresql_partition_by": "RANGE (id)"},
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    provider: Mapped[str]
    app_id: Mapped[UUID | None]
    channel_id: Mapped[UUID | None]
    request_id: Mapped[str | None]
    raw: Mapped[bytes]
    received_at: Mapped[datetime] = mapped_column(server_default=func.now())
    state: Mapped[str] = mapped_column(server_default=DeliveryState.PENDING)
    reason: Mapped[str | None]
    attempts: Mapped[int] = mapped_column(server_default=text("0"))  # claims, counted before the work
    failures: Mapped[int] = mapped_column(server_default=text("0"))  # claims that ended in an error of the row's own
    crashes: Mapped[int] = mapped_column(server_default=text("0"))  # solitary claims that ended without a verdict
    claim_token: Mapped[UUID | None]
    claimed_until: Mapped[datetime | None]
    claimed_alone: Mapped[bool] = mapped_column(server_default=text("false"))
    next_attempt_at: Mapped[datetime] = mapped_column(server_default=func.now())
    # The web tier rings once itself; the sweep leaves it a few seconds to do so.
    next_ring_at: Mapped[datetime] = mapped_column(server_default=text("now() + interval '5 seconds'"))
    finished_at: Mapped[datetime | None]

    @staticmethod
    def claim(s: Session, ids: list[UUID], token: UUID, *, most_bytes: int) -> list[RowMapping]:
        """Take those of `ids` that wait and have no open claim, oldest first, until they hold `most_bytes` or more.

        Returns what the work needs of each, by id.
        """
        return _claim(s, _CLAIM_CLEAN, ids=ids, token=token, alone=len(ids) == 1, most_bytes=most_bytes)

    @staticmethod
    def claim_suspect(s: Session, id_: UUID, token: UUID) -> RowMapping | None:
        """Take a row whose last claim ended without a verdict. `crashes` counts its solitary deaths so far."""
        rows = _claim(s, _CLAIM_SUSPECT, ids=[id_], token=token, alone=True)
        return rows[0] if rows else None

    @staticmethod
    def finish(s: Session, verdicts: dict[UUID, tuple[DeliveryState, str | None]], token: UUID) -> None:
        """Give each row its final state and reason. Raises `LostClaim` unless the claim still holds for every one."""
        groups: dict[tuple[DeliveryState, str | None], list[UUID]] = {}
        for id_, verdict in verdicts.items():
            groups.setdefault(verdict, []).append(id_)
        for (state, reason), ids in sorted(groups.items(), key=str):
            done = s.execute(_FINISH, {"state": state, "reason": reason, "ids": sorted(ids), "token": token})
            if len(done.all()) != len(ids):
                raise LostClaim(f"the claim on {len(ids)} deliveries ran out")

    @staticmethod
    def failed(s: Session, id_: UUID, token: UUID, *, limit: int) -> int:
        """Count a failure of the row's own and end the claim; the row is dead beyond `limit`. Returns the count."""
        given = {"id": id_, "token": token, "again": _RING_AGAIN, "limit": limit}
        failures = s.execute(_FAILED, given).scalar()
        if failures is None:
            raise LostClaim("the claim on a delivery ran out")
        return int(failures)

    @staticmethod
    def release(s: Session, ids: Iterable[UUID], token: UUID) -> None:
        """Give up the claim without a word on the rows: the store was away, or they go on one by one."""
        if given := sorted(ids):
            s.execute(_RELEASE, {"ids": given, "token": token})

    @staticmethod
    def set_apart(s: Session, ids: Iterable[UUID], token: UUID) -> None:
        """Give up the claim on rows that failed in a batch: they go on alone, each by a job of its own."""
        if ids := sorted(ids):
            s.execute(_SET_APART, {"ids": ids, "token": token, "again": _RING_AGAIN})

    @staticmethod
    def to_ring(s: Session, limit: int, *, at_once: bool = False) -> list[tuple[UUID, bool]]:
        """Waiting rows whose bell should ring (again), and whether each is a suspect; sources take turns.

        `at_once` forgets when each was rung last: Redis lost its queues.
        """
        found = s.execute(_TO_RING_AT_ONCE if at_once else _TO_RING, {"most": limit})
        return [(row.id, row.is_suspect) for row in found]

    @staticmethod
    def in_turn(s: Session, limit: int) -> list[UUID]:
        """Waiting rows without an open claim, one of each source in turn, oldest first.

        One transaction picks at a time, until it has claimed: two would pick the same rows.
        """
        s.execute(text("SELECT pg_advisory_xact_lock(hashtext('delivery in turn'))"))
        return list(s.execute(_UNCLAIMED, {"most": limit}).scalars())

    @staticmethod
    def rung(s: Session, ids: list[UUID]) -> None:
        """Their bells rang: leave them alone for a while, so that a backlog is not flooded with bells."""
        s.execute(
            text("UPDATE delivery SET next_ring_at = now() + :again WHERE id = ANY(:ids) AND state = 'pending'"),
            {"again": _RING_AGAIN, "ids": sorted(ids)},
        )

    @staticmethod
    def retry(s: Session, ids: list[UUID]) -> list[UUID]:
        """An operator wants them processed again: pending, with a clean record. Returns those that exist."""
        found = s.execute(
            text("""
                UPDATE delivery SET state = 'pending', reason = NULL, failures = 0, crashes = 0, finished_at = NULL,
                    claim_token = NULL, claimed_until = NULL, next_attempt_at = now(), next_ring_at = now()
                WHERE id = ANY(:ids) RETURNING id
            """),
            {"ids": sorted(ids)},
        )
        return list(found.scalars())


_RETURNED = "id, provider, app_id, channel_id, request_id, raw, received_at, attempts, failures, crashes"

_CLAIM_CLEAN = text(f"""
    UPDATE delivery SET attempts = attempts + 1, claim_token = :token, claimed_alone = false,
        claimed_until = now() + :length
    WHERE id = ANY(ARRAY(
        SELECT id FROM (
            SELECT id, sum(octet_length(raw)) OVER (ORDER BY id) - octet_length(raw) AS bytes_before FROM delivery
            WHERE id = ANY(:ids) AND state = 'pending' AND (next_attempt_at <= now() OR :alone) AND claim_token IS NULL
        ) AS waiting WHERE bytes_before < :most_bytes
    )) AND state = 'pending' AND claim_token IS NULL
    RETURNING {_RETURNED}
""")

_CLAIM_SUSPECT = text(f"""
    UPDATE delivery SET attempts = attempts + 1, claim_token = :token, claimed_alone = true,
        claimed_until = now() + :length, crashes = crashes + claimed_alone::int
    WHERE id = ANY(:ids) AND state = 'pending' AND claim_token IS NOT NULL AND claimed_until < now()
    RETURNING {_RETURNED}
""")


def _in_turn(condition: str) -> TextClause:
    # The sources by a loose scan of `ix_delivery_source`, then each one's oldest rows: the cost follows the number of
    # sources and of rows taken, and not the length of anybody's queue.
    return text(f"""
        WITH RECURSIVE source (id) AS (
            (SELECT coalesce(app_id, channel_id) FROM delivery WHERE state = 'pending'
                ORDER BY coalesce(app_id, channel_id) LIMIT 1)
            UNION ALL
            SELECT (
                SELECT coalesce(app_id, channel_id) FROM delivery
                WHERE state = 'pending' AND coalesce(app_id, channel_id) > source.id
                ORDER BY coalesce(app_id, channel_id) LIMIT 1
            ) FROM source WHERE source.id IS NOT NULL
        )
        SELECT waiting.id, waiting.is_suspect FROM source CROSS JOIN LATERAL (
            SELECT id, is_suspect, row_number() OVER (ORDER BY id) AS turn FROM (
                SELECT id, claim_token IS NOT NULL AS is_suspect FROM delivery
                WHERE state = 'pending' AND coalesce(app_id, channel_id) = source.id
                    AND next_attempt_at <= now() AND {condition}
                ORDER BY id LIMIT :most
            ) AS oldest
        ) AS waiting
        ORDER BY waiting.turn, waiting.id LIMIT :most
    """)


_UNCLAIMED = _in_turn("claim_token IS NULL")
_TO_RING_AT_ONCE = _in_turn("(claimed_until IS NULL OR claimed_until < now())")
_TO_RING = _in_turn("(claimed_until IS NULL OR claimed_until < now()) AND next_ring_at <= now()")

_FINISH = text("""
    UPDATE delivery SET state = :state, reason = :reason, finished_at = now(),
        claim_token = NULL, claimed_until = NULL
    WHERE id = ANY(:ids) AND claim_token = :token AND state = 'pending'
    RETURNING id
""")

# The row's own job ignores the date (it claims alone); everybody else's batch is spared the row until then.
_SET_APART = text("""
    UPDATE delivery SET claim_token = NULL, claimed_until = NULL,
        next_attempt_at = now() + :again, next_ring_at = now() + :again
    WHERE id = ANY(:ids) AND claim_token = :token
""")

_RELEASE = text("""
    UPDATE delivery SET claim_token = NULL, claimed_until = NULL WHERE id = ANY(:ids) AND claim_token = :token
""")

_FAILED = text("""
    UPDATE delivery SET failures = failures + 1, claim_token = NULL, claimed_until = NULL,
        next_attempt_at = now() + :again, next_ring_at = now() + :again, crashes = 0,
        state = CASE WHEN failures >= :limit THEN 'dead' ELSE state END,
        reason = CASE WHEN failures >= :limit THEN 'failed on every try' ELSE reason END,
        finished_at = CASE WHEN failures >= :limit THEN now() END
    WHERE id = :id AND claim_token = :token
    RETURNING failures
""")


def _claim(s: Session, statement: Any, *, ids: list[UUID], token: UUID, alone: bool, **more: int) -> list[RowMapping]:
    # A claim may be forgotten in a crash of the database itself: then it is simply made again.
    s.execute(text("SET LOCAL synchronous_commit = off"))
    length = _CLAIM_ALONE if alone else _CLAIM
    rows = s.execute(statement, {"ids": sorted(ids), "token": token, "alone": alone, "length": length, **more})
    return sorted(rows.mappings(), key=lambda row: row["id"])
