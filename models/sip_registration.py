"""A SIP account: what it is registered with, how its registration stands, who works on it, and what was told of it.

    pending ──200──▶ registered ──a refresh fails──▶ registered (error set) ──it expires──▶ failed ──200──▶ registered
       └──any failure──▶ failed       └──un-REGISTER──▶ pending

(sip-registration.md §7.) A row is due when `next_refresh_at` has come; whoever works on it holds a claim that runs out
by the database's clock, and has a block of CSeq numbers that nobody gets again. What came of an attempt is written only
if no later claim was made.
"""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CursorResult,
    ForeignKeyConstraint,
    Index,
    RowMapping,
    and_,
    case,
    delete,
    func,
    or_,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Dated, Tenanted, given_rows, id_column, rows
from models.clockwork import Lease
from pombal import secrets as sealing
from pombal.ids import uuid7

CLAIM = timedelta(seconds=10)  # renewed while an attempt is under way
# … from when another process was given a request to send: that goes on for 32 s, and some, when ours has died
# (sip-registration.md §8).
CLAIM_ELSEWHERE = timedelta(seconds=45)
PAUSE = timedelta(seconds=30)  # after an attempt that failed, whatever is heard of others (sip-registration.md §6)
CSEQS = 20  # numbers in the block of an attempt; it makes fewer requests
HISTORY = 20  # outcomes kept with the row

# While this lease lives some worker finds drachtio away. All hold it together, each renewing it every 10 s at the most.
_AWAY, _ALL_WORKERS, _AWAY_FOR = "drachtio_away", UUID(int=0), timedelta(seconds=20)

AT_SENDER = "@localhost;"  # in a Contact: whoever sends puts itself there


def is_drachtios(contact: str) -> bool:
    """Whether a Contact that is bound is drachtio's, which alone knows where it points; a direct sender tells."""
    return AT_SENDER in contact


class RegisterStatus(StrEnum):
    PENDING = "pending"
    REGISTERED = "registered"
    FAILED = "failed"


class SipSender(StrEnum):
    """Who sends an account's REGISTER."""

    AUTO = "auto"  # drachtio where one is configured, else direct
    DIRECT = "direct"
    DRACHTIO = "drachtio"
    EXTERNAL = "external"  # a controller that tells us what came of it: nothing is sent from here


# `registered` ends with the grant, whether or not anybody has written that down yet (security-reliability.md R8).
STATUS_NOW = """CASE WHEN register_status <> 'registered' OR expires_at IS NULL OR expires_at > clock_timestamp()
    THEN register_status WHEN is_enabled THEN 'failed' ELSE 'pending' END"""


_IS_OURS = text("next_refresh_at IS NOT NULL AND sender <> 'external'")


class SipRegistration(Tenanted, Dated, Base):
    """`history`: the last outcomes, newest last, `{"at", "outcome", "code", "error", "seconds", "server", "notes",
    "retry_after"}`."""

    __tablename__ = "sip_registration"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_sip_registration_tenant_id", ondelete="CASCADE"),
        Index(
            "uq_sip_registration_name", "tenant_id", "name", unique=True, postgresql_where=text("removed_at IS NULL")
        ),
        Index("ix_sip_registration_contact", "contact_token"),
        Index("ix_sip_registration_due", "next_refresh_at", postgresql_where=_IS_OURS),
        Index("ix_sip_registration_place", text("coalesce(proxy, host)"), "next_refresh_at", postgresql_where=_IS_OURS),
        Index("ix_sip_registration_expiry", "expires_at", postgresql_where=text("register_status = 'registered'")),
        Index("ix_sip_registration_report", "report_at", postgresql_where=text("report_at IS NOT NULL")),
    )

    id: Mapped[UUID] = id_column()
    name: Mapped[str]

    # What it is registered with
    host: Mapped[str]  # the registrar's domain: Request-URI and address of record
    port: Mapped[int | None]
    transport: Mapped[str] = mapped_column(server_default="udp")
    proxy: Mapped[str | None]  # a host that requests go to instead
    username: Mapped[str]
    auth_username: Mapped[str | None]  # where it differs from the user of the address of record
    sealed: Mapped[bytes]  # {"password"}
    interval: Mapped[int] = mapped_column(server_default=text("300"))  # seconds that are asked for, always
    sender: Mapped[str] = mapped_column(server_default=SipSender.AUTO)
    sender_before: Mapped[str | None]  # it was given to a controller; None: it never was
    contact_host: Mapped[str | None]  # `host[:port]` that calls come to, of a direct sender; None: SIP_CONTACT
    contact_token: Mapped[str]  # the user of its Contact: an inbound INVITE names its account by it
    target: Mapped[str | None]  # where its calls go: a LiveKit SIP URI
    allows_md5: Mapped[bool] = mapped_column(server_default=text("true"))
    external_id: Mapped[str | None]  # its id at the backend that outcomes are reported to
    is_enabled: Mapped[bool] = mapped_column(server_default=text("true"))
    removed_at: Mapped[datetime | None]  # its row goes once it is un-registered
    revision: Mapped[int] = mapped_column(server_default=text("0"))  # of the above: what was begun before is outdated

    # How it stands
    register_status: Mapped[str] = mapped_column(server_default=RegisterStatus.PENDING)
    register_error: Mapped[str | None]
    last_register_at: Mapped[datetime | None]  # when the last REGISTER that succeeded was sent
    next_refresh_at: Mapped[datetime | None] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    granted: Mapped[int | None]  # seconds
    registered_since: Mapped[datetime | None]
    unregistered_since: Mapped[datetime | None] = mapped_column(server_default=func.now())
    last_attempt_at: Mapped[datetime | None]
    last_outcome: Mapped[str | None]
    last_status_code: Mapped[int | None]
    failures: Mapped[int] = mapped_column(server_default=text("0"))  # in a row
    server: Mapped[str | None]  # who answered last
    contact: Mapped[str | None]  # what is bound: calls come there, and it is un-registered by it
    algorithm: Mapped[str | None]  # of the digest that was accepted last: nothing weaker is answered
    call_id: Mapped[str]
    from_tag: Mapped[str]
    cseq: Mapped[int] = mapped_column(
        BigInteger, server_default=text("0")
    )  # the last number of the block that was taken last
    history: Mapped[list[dict[str, Any]]] = mapped_column(JSONB, server_default=text("'[]'"))

    # Who works on it
    asked_at: Mapped[datetime | None]  # somebody waits: before all others
    claim_token: Mapped[UUID | None]
    claimed_until: Mapped[datetime | None]

    # What was told of it
    report_at: Mapped[datetime | None]  # when the backend is told how it stands; None: it knows
    report_revision: Mapped[int] = mapped_column(server_default=text("0"))
    report_claimed_until: Mapped[datetime | None]
    report_failures: Mapped[int] = mapped_column(server_default=text("0"))
    report_error: Mapped[str | None]
    reported_at: Mapped[datetime | None]

    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())

    # ------------------------------------------------------------------------------------------- administration

    @classmethod
    def make(
        cls, tenant_id: UUID, *, name: str, host: str, username: str, password: str, **given: Any
    ) -> "SipRegistration":
        """A new account, due at once. What is given must have been checked (`providers/sip_words.py`)."""
        id_ = uuid7()
        return cls(
            tenant_id=tenant_id,
            id=id_,
            name=name,
            host=host,
            username=username,
            sealed=sealing.seal(id_, {"password": password}),
            contact_token=f"p{secrets.token_hex(10)}",
            call_id=secrets.token_hex(16),
            from_tag=secrets.token_hex(6),
            **given,
        )

    @classmethod
    def change(cls, s: Session, tenant_id: UUID, id_: UUID, *, password: str | None = None, **given: Any) -> bool:
        """Change what it is registered with, and have it registered anew at once; False when there is none."""
        values = dict(given)
        if password is not None:
            values["sealed"] = sealing.seal(id_, {"password": password})
        if "external_id" in values and not values["external_id"]:
            values["report_at"] = None  # there is nobody to be told any more
        return cls._renew(s, tenant_id, id_, **values)

    @classmethod
    def ask(cls, s: Session, tenant_id: UUID, id_: UUID, **given: Any) -> bool:
        """Have it registered now, before all others, and enabled."""
        now = func.clock_timestamp()
        was_meant = or_(cls.is_enabled, cls.unregistered_since.is_(None))
        since = case((was_meant, cls.unregistered_since), else_=now)  # it is missed from now on
        return cls._renew(s, tenant_id, id_, is_enabled=True, asked_at=now, unregistered_since=since, **given)

    @staticmethod
    def ask_all(s: Session, *, tenant_id: UUID | None = None, host: str | None = None) -> int:
        """Have all that are enabled and ours registered now, of this tenant and with this host or proxy alone if given;
        returns how many they are. What is under way is not begun again."""
        result = s.execute(_ASK_ALL, {"tenant_id": tenant_id, "host": host})
        return _count(result)

    @classmethod
    def disable(cls, s: Session, tenant_id: UUID, id_: UUID) -> bool:
        """Have it un-registered; it stays so."""
        return cls._renew(s, tenant_id, id_, is_enabled=False, asked_at=func.clock_timestamp())

    @classmethod
    def remove(cls, s: Session, tenant_id: UUID, id_: UUID) -> bool:
        """Have it un-registered and its row dropped then; at once if it is a controller's. Its name is free at once."""
        now = func.clock_timestamp()
        was_there = cls._renew(s, tenant_id, id_, is_enabled=False, asked_at=now, removed_at=now)
        theirs = delete(cls).where(cls.tenant_id == tenant_id, cls.id == id_, cls.sender == SipSender.EXTERNAL)
        _touched(s, theirs)  # after it was marked: no controller takes a removed one
        return was_there

    @classmethod
    def _renew(cls, s: Session, tenant_id: UUID, id_: UUID, **values: Any) -> bool:
        now = func.clock_timestamp()
        new: dict[str, Any] = {"revision": cls.revision + 1, "failures": 0, "updated_at": now, "next_refresh_at": now}
        if "sender" not in values:
            new["next_refresh_at"] = case((cls.sender == SipSender.EXTERNAL, None), else_=now)
        elif values.get("sender") == SipSender.EXTERNAL:
            new |= {"next_refresh_at": None, **cls._given_away()}
        else:
            # What a controller said without an end has no end that anybody would notice.
            is_endless = and_(cls.register_status == RegisterStatus.REGISTERED, cls.expires_at.is_(None))
            new["register_status"] = case((is_endless, RegisterStatus.PENDING), else_=cls.register_status)
            new["registered_since"] = case((is_endless, None), else_=cls.registered_since)
            new["unregistered_since"] = case((is_endless, now), else_=cls.unregistered_since)
            # Its words are not ours, and would be taken for such in lines and events.
            new["register_error"] = case((cls.sender == SipSender.EXTERNAL, None), else_=cls.register_error)
        new |= values
        where = (cls.tenant_id == tenant_id, cls.id == id_, cls.removed_at.is_(None))
        return _touched(s, update(cls).where(*where).values(new))

    @classmethod
    def told(
        cls,
        s: Session,
        tenant_id: UUID,
        id_: UUID,
        *,
        status: RegisterStatus,
        error: str | None,
        last_register_at: datetime | None,
        expires_at: datetime | None,
        is_reported: bool = False,
    ) -> bool:
        """A controller that registers by itself says how it stands: from now on it is not ours to register, and an
        attempt of ours that is under way counts no more."""
        now = func.clock_timestamp()
        is_registered = status == RegisterStatus.REGISTERED
        has_lapsed = and_(cls.register_status == RegisterStatus.REGISTERED, cls.expires_at <= now)
        lost_at = func.coalesce(cls.unregistered_since, func.least(cls.expires_at, now))
        new: dict[str, Any] = {
            "sender": SipSender.EXTERNAL,
            "register_status": status,
            "register_error": error,
            "expires_at": expires_at if is_registered else None,
            "next_refresh_at": None,
            "last_attempt_at": now,
            "last_outcome": None,
            "last_status_code": None,
            "granted": None,
            "contact": None,
            "failures": 0,
            **cls._given_away(),
            "registered_since": case((has_lapsed, now), else_=func.coalesce(cls.registered_since, now))
            if is_registered
            else None,
            "unregistered_since": None if is_registered else lost_at,
            "report_revision": cls.report_revision + 1,
            "updated_at": now,
        }
        if is_reported:
            new["report_at"] = case((cls.external_id.is_not(None), now))
        if last_register_at is not None:
            new["last_register_at"] = last_register_at
        where = (cls.tenant_id == tenant_id, cls.id == id_, cls.removed_at.is_(None))
        return _touched(s, update(cls).where(*where).values(new))

    @classmethod
    def _given_away(cls) -> dict[str, Any]:
        """An attempt that is under way counts no more, and whoever sent it is not forgotten."""
        before = case((cls.sender == SipSender.EXTERNAL, cls.sender_before), else_=cls.sender)
        free = {"claim_token": None, "claimed_until": None, "asked_at": None}
        return {"cseq": cls.cseq + CSEQS, "sender_before": before, **free}

    @staticmethod
    def listing(
        s: Session, *, tenant_id: UUID | None = None, id_: UUID | None = None, name: str | None = None
    ) -> Sequence[RowMapping]:
        """All columns but secrets of what this transaction may see, by tenant and name; `status` is the one that holds
        now, `now` the database's time; `is_held_back`: it is due, and waits for drachtio. Removed accounts are left
        out."""
        return s.execute(_LISTING, {"tenant_id": tenant_id, "id": id_, "name": name}).mappings().all()

    @staticmethod
    def by_contact(s: Session, contact_token: str) -> RowMapping | None:
        """The account whose Contact has this user; None where there is none, or it was removed."""
        return s.execute(_BY_CONTACT, {"contact_token": contact_token}).mappings().first()

    # ------------------------------------------------------------------------------------------------ registering

    @staticmethod
    def hasten(s: Session, places: Iterable[str]) -> None:
        """These hosts have just registered an account, so whatever ailed them may be over: who waits there after
        temporary failures, without a binding, is due at once, but not sooner than `PAUSE` after its last attempt, since
        it may be the one that is ill. Who was told to wait (`Retry-After`, 429) keeps to that."""
        s.execute(_HASTEN, {"places": list(places), "pause": PAUSE})

    @staticmethod
    def due(s: Session, *, without: Iterable[SipSender] = (), held: Iterable[UUID] = ()) -> dict[str, int]:
        """How many accounts are due and nobody's, per host that they are sent to; without those that `held` names."""
        found = s.execute(_DUE, {"without": list(without), "held": list(held)})
        return {place: count for place, count in found}

    @staticmethod
    def claim(
        s: Session,
        token: UUID,
        budget: Mapping[str, int],
        *,
        without: Iterable[SipSender] = (),
        held: Iterable[UUID] = (),
        elsewhere: Iterable[SipSender] = (),
    ) -> Sequence[RowMapping]:
        """Take due accounts of these hosts, at most so many of each: those that somebody waits for first, then those
        that are still bound. Each has its own block of CSeq: `cseq - CSEQS + 1` to `cseq`. `place` is its host, `late`
        the seconds since it fell due, `bound_seconds` what its binding has left, `lost_at` when an attempt began whose
        end nobody wrote down, `claimed_at` the database's time. `elsewhere`: whose requests another process sends."""
        given = given_rows([{"place": place, "n": n} for place, n in budget.items()])
        values = {**given, "token": token, "block": CSEQS, "without": list(without), "held": list(held)}
        lengths = {"elsewhere": list(elsewhere), "length": CLAIM, "longer": CLAIM_ELSEWHERE}
        return s.execute(_CLAIM, {**values, **lengths}).mappings().all()

    @staticmethod
    def renew(s: Session, token: UUID, held: Iterable[tuple[UUID, UUID, int]], length: timedelta = CLAIM) -> set[UUID]:
        """Hold claims, given as (tenant, id, cseq), for so long from now at least; returns the ids of those that are
        still held."""
        return set(s.execute(_RENEW, {**_keys(held), "token": token, "length": length}).scalars())

    @staticmethod
    def release(s: Session, token: UUID, held: Iterable[tuple[UUID, UUID, int]]) -> None:
        """Give claims back at once: what was begun under them is given up."""
        s.execute(_RELEASE, {**_keys(held), "token": token})

    @staticmethod
    def settle(s: Session, token: UUID, given: list[dict[str, Any]]) -> Sequence[RowMapping]:
        """Write down what came of attempts, each once and under its claim (`tenant_id`, `id`, `cseq`, `revision`):
        `outcome`, `code`, `error`, `granted` and `sent_at` (when the request that was granted was sent), `next_at`
        (of the next attempt; None: never), `fails` (added to `failures`; None: back to 0), `algorithm`, `server`,
        `contact`, `call_id` (a new one), `entries` (of the history), `is_over` (nothing is bound and nothing
        wanted), `is_reported`. Times are the database's, reckoned from `claimed_at`: however long this has to wait,
        a grant does not begin later for it (security-reliability.md R8).

        Returns the rows that were written, with `was`, the status that was written before, and, of one whose binding
        ended unnoticed before that request, `lapsed_for` (seconds) and `lapse_error`; the others' claims were lost.
        Rows that were to be removed and are over are gone.
        """
        ordered = sorted(given, key=lambda row: (row["tenant_id"], row["id"]))
        written = s.execute(_SETTLE, {**given_rows(ordered), "token": token}).mappings().all()
        gone = [row["id"] for row in written if row["removed_at"] is not None and row["next_refresh_at"] is None]
        if gone:
            s.execute(_DROP, {"ids": gone})
        return written

    @staticmethod
    def hold_back(s: Session, error: str, *, is_reported: bool) -> Sequence[RowMapping]:
        """Say of all that drachtio would register why they wait; returns the rows that this is news of, as `settle`
        does. For a while nothing misses a worker for them: neither `is_waited_for`, nor `overview`, nor the `listing`
        (`is_held_back`)."""
        Lease.take(s, _AWAY, _ALL_WORKERS, _AWAY_FOR)
        return s.execute(_HOLD_BACK, {"error": error, "is_reported": is_reported}).mappings().all()

    @staticmethod
    def lapse(s: Session, *, is_reported: bool) -> Sequence[RowMapping]:
        """Write down that grants ran out without a refresh; returns the rows, as `settle` does, but without a
        controller's own words. `lapsed_for` is None of those that nobody wants registered."""
        return s.execute(_LAPSE, {"is_reported": is_reported}).mappings().all()

    @staticmethod
    def is_waited_for(s: Session) -> bool:
        """Whether an account has been due for a while and nobody has taken it, though nothing holds it back."""
        return bool(s.scalar(_IS_WAITED_FOR))

    # ---------------------------------------------------------------------------------------------------- telling

    @staticmethod
    def claim_reports(s: Session, most: int, length: timedelta) -> Sequence[RowMapping]:
        """Accounts whose backend is to be told how they stand, for so long nobody else's; with `status`."""
        return s.execute(_CLAIM_REPORTS, {"most": most, "length": length}).mappings().all()

    @staticmethod
    def reported(s: Session, tenant_id: UUID, id_: UUID, revision: int) -> None:
        """The backend took it; what has changed meanwhile it is told next."""
        s.execute(_REPORTED, {"tenant_id": tenant_id, "id": id_, "revision": revision})

    @staticmethod
    def not_reported(s: Session, tenant_id: UUID, id_: UUID, revision: int, error: str, wait: timedelta) -> None:
        """It did not: once more after a while, or at once if there is other news by now."""
        given = {"tenant_id": tenant_id, "id": id_, "revision": revision, "error": error, "wait": wait}
        s.execute(_NOT_REPORTED, given)

    @staticmethod
    def overview(s: Session) -> RowMapping:
        """For gauges: `pending`, `registered`, `failed` (enabled ones and external ones), `disabled`. In seconds:
        `next_refresh` until the first one that nobody works on (negative: late; None without any); `unregistered`, how
        long the one that has been without a binding the longest is; `unreported`, how long a report waits."""
        return s.execute(_OVERVIEW).mappings().one()


def entry(
    at: datetime,
    outcome: str,
    code: int | None,
    error: str | None,
    seconds: float,
    server: str | None,
    notes: Sequence[str],
    retry_after: int | None = None,
) -> dict[str, Any]:
    """One outcome of the history; `notes` are oddities, `retry_after` the seconds that the other side asked for."""
    said = {"code": code, "error": error, "server": server, "notes": list(notes) or None, "retry_after": retry_after}
    told = {name: value for name, value in said.items() if value is not None}
    return {"at": at.isoformat(), "outcome": outcome, "seconds": round(seconds, 3), **told}


def _keys(held: Iterable[tuple[UUID, UUID, int]]) -> dict[str, str]:
    """In one order everywhere, or two statements wait for each other's rows."""
    return given_rows([{"tenant_id": tenant, "id": id_, "cseq": cseq} for tenant, id_, cseq in sorted(held)])


def _touched(s: Session, statement: Any) -> bool:
    return _count(s.execute(statement.execution_options(synchronize_session=False))) > 0


def _count(result: Any) -> int:
    assert isinstance(result, CursorResult)  # noqa: S101 - for the type checker
    return result.rowcount


_PLACE = "coalesce(proxy, host)"
# By `now()`: no index serves a comparison with `clock_timestamp()`.
_NOBODYS = """next_refresh_at <= now() AND sender <> 'external'
    AND (claimed_until IS NULL OR claimed_until <= now())"""
_HELD_BACK = f"""sender IN ('auto', 'drachtio')
    AND EXISTS (SELECT FROM lease WHERE name = '{_AWAY}' AND until > now())"""
_ALLOWED = "NOT sender = ANY (CAST(:without AS text[])) AND NOT id = ANY (CAST(:held AS uuid[]))"
_NEXT_REPORT = """report_at = CASE WHEN r.external_id IS NULL THEN NULL WHEN {} THEN clock_timestamp()
        ELSE r.report_at END,
    report_revision = r.report_revision + 1"""

_SHOWN = (
    "tenant_id, id, name, host, port, transport, proxy, username, auth_username, interval, sender, sender_before, "
    "contact_host, contact_token, target, allows_md5, external_id, is_enabled, removed_at, revision, register_status, "
    "register_error, last_register_at, next_refresh_at, expires_at, granted, registered_since, unregistered_since, "
    "last_attempt_at, last_outcome, last_status_code, failures, server, contact, algorithm, call_id, from_tag, cseq, "
    "history, asked_at, claimed_until, report_at, report_error, reported_at, updated_at, created_at"
)

_LISTING = text(f"""
    SELECT {_SHOWN}, {STATUS_NOW} AS status, clock_timestamp() AS now, {_NOBODYS} AND {_HELD_BACK} AS is_held_back,
        extract(epoch FROM expires_at - clock_timestamp())::float AS bound_seconds
    FROM sip_registration
    WHERE removed_at IS NULL AND (CAST(:tenant_id AS uuid) IS NULL OR tenant_id = :tenant_id)
        AND (CAST(:id AS uuid) IS NULL OR id = :id) AND (CAST(:name AS text) IS NULL OR name = :name)
    ORDER BY tenant_id, name
""")

_BY_CONTACT = text(f"""
    SELECT r.tenant_id, t.slug, t.name AS tenant_name, r.id, r.name, r.target, r.is_enabled, {STATUS_NOW} AS status
    FROM sip_registration r JOIN tenant t ON t.id = r.tenant_id
    WHERE r.contact_token = :contact_token AND r.removed_at IS NULL
""")

_ASK_ALL = text("""
    UPDATE sip_registration r SET next_refresh_at = least(r.next_refresh_at, clock_timestamp())
    FROM (
        SELECT tenant_id, id FROM sip_registration
        WHERE sender <> 'external' AND is_enabled AND removed_at IS NULL
            AND (CAST(:tenant_id AS uuid) IS NULL OR tenant_id = :tenant_id)
            AND (CAST(:host AS text) IS NULL OR host = :host OR proxy = :host)
        ORDER BY tenant_id, id FOR UPDATE
    ) AS due
    WHERE r.tenant_id = due.tenant_id AND r.id = due.id
""")

# Its last attempt ended when it began, and the seconds of the last outcome later.
_NOT_SOONER = """greatest(now(), last_attempt_at + CAST(:pause AS interval)
                + coalesce((history -> -1 ->> 'seconds')::float, 0) * interval '1 second')"""

_HASTEN = text(f"""
    UPDATE sip_registration r SET next_refresh_at = due.at
    FROM (
        SELECT tenant_id, id, {_NOT_SOONER} AS at FROM sip_registration
        WHERE {_PLACE} = ANY (CAST(:places AS text[])) AND next_refresh_at > now() AND sender <> 'external'
            AND is_enabled AND last_outcome = 'temporary' AND (expires_at IS NULL OR expires_at <= now())
            AND (claimed_until IS NULL OR claimed_until <= now())
            AND last_status_code IS DISTINCT FROM 429 AND (history -> -1 -> 'retry_after') IS NULL
            AND next_refresh_at > {_NOT_SOONER}
        ORDER BY tenant_id, id FOR UPDATE SKIP LOCKED
    ) AS due
    WHERE r.tenant_id = due.tenant_id AND r.id = due.id
""")

_DUE = text(f"""
    SELECT {_PLACE} AS place, count(*) AS count FROM sip_registration
    WHERE {_NOBODYS} AND {_ALLOWED} GROUP BY 1
""")

_CLAIM = text(f"""
    WITH due AS MATERIALIZED (
        SELECT one.tenant_id, one.id FROM {rows(place="text", n="integer")}
        CROSS JOIN LATERAL (
            SELECT tenant_id, id FROM sip_registration
            WHERE {_PLACE} = given.place AND {_NOBODYS} AND {_ALLOWED}
            ORDER BY asked_at NULLS LAST, expires_at > now() DESC NULLS LAST, next_refresh_at
            LIMIT given.n FOR UPDATE SKIP LOCKED
        ) AS one
    )
    UPDATE sip_registration r
    SET claim_token = :token, cseq = r.cseq + :block, last_attempt_at = clock_timestamp(),
        claimed_until = clock_timestamp()
            + CASE WHEN r.sender = ANY (CAST(:elsewhere AS text[])) THEN CAST(:longer AS interval) ELSE :length END
    FROM due, sip_registration was
    WHERE r.tenant_id = due.tenant_id AND r.id = due.id AND was.tenant_id = due.tenant_id AND was.id = due.id
    RETURNING {", ".join(f"r.{name}" for name in _SHOWN.split(", "))}, r.sealed, coalesce(r.proxy, r.host) AS place,
        extract(epoch FROM clock_timestamp() - r.next_refresh_at)::float AS late,
        extract(epoch FROM r.expires_at - clock_timestamp())::float AS bound_seconds,
        was.last_attempt_at IS NOT NULL AS was_tried, clock_timestamp() AS claimed_at,
        CASE WHEN was.claim_token IS NOT NULL THEN was.last_attempt_at END AS lost_at
""")

_HELD = rows(tenant_id="uuid", id="uuid", cseq="bigint")

_RENEW = text(f"""
    UPDATE sip_registration r SET claimed_until = greatest(r.claimed_until, clock_timestamp() + :length) FROM {_HELD}
    WHERE r.tenant_id = given.tenant_id AND r.id = given.id AND r.cseq = given.cseq AND r.claim_token = :token
        AND r.claimed_until > clock_timestamp()
    RETURNING r.id
""")

_RELEASE = text(f"""
    UPDATE sip_registration r SET claimed_until = NULL, claim_token = NULL FROM {_HELD}
    WHERE r.tenant_id = given.tenant_id AND r.id = given.id AND r.cseq = given.cseq AND r.claim_token = :token
""")

_SETTLED = rows(
    tenant_id="uuid",
    id="uuid",
    cseq="bigint",
    revision="integer",
    outcome="text",
    code="integer",
    error="text",
    granted="integer",
    sent_at="timestamptz",
    next_at="timestamptz",
    fails="integer",
    algorithm="text",
    server="text",
    contact="text",
    call_id="text",
    entries="jsonb",
    is_over="boolean",
    is_reported="boolean",
)

_SETTLE = text(f"""
    WITH given AS (
        SELECT given.*, r.register_status AS was, r.is_bound AS was_bound, r.expires_at AS was_until,
            r.register_error AS was_error, clock_timestamp() AS now, given.outcome = 'registered' AS is_bound
        FROM {_SETTLED}
        JOIN LATERAL (
            SELECT register_status, register_error, expires_at, register_status = 'registered'
                AND expires_at > CASE WHEN given.outcome = 'registered' THEN given.sent_at ELSE clock_timestamp() END
                AS is_bound
            FROM sip_registration
            WHERE tenant_id = given.tenant_id AND id = given.id AND cseq = given.cseq AND claim_token = :token
            FOR UPDATE
        ) AS r ON true
    )
    UPDATE sip_registration r SET
        register_status = CASE WHEN is_bound THEN 'registered' WHEN given.is_over THEN 'pending'
            WHEN was_bound THEN 'registered' ELSE 'failed' END,
        register_error = given.error,
        last_register_at = CASE WHEN is_bound THEN sent_at ELSE r.last_register_at END,
        expires_at = CASE WHEN is_bound THEN sent_at + given.granted * interval '1 second'
            WHEN given.is_over THEN NULL ELSE r.expires_at END,
        granted = CASE WHEN is_bound THEN given.granted WHEN given.is_over THEN NULL ELSE r.granted END,
        registered_since = CASE WHEN given.is_over THEN NULL WHEN was_bound THEN r.registered_since
            WHEN is_bound THEN now END,
        unregistered_since = CASE WHEN is_bound OR was_bound AND NOT given.is_over THEN NULL
            ELSE coalesce(r.unregistered_since, least(r.expires_at, now)) END,
        next_refresh_at = CASE WHEN r.sender = 'external' THEN NULL WHEN r.revision <> given.revision THEN now
            ELSE given.next_at END,
        asked_at = CASE WHEN r.revision <> given.revision THEN r.asked_at END,
        last_outcome = given.outcome,
        last_status_code = given.code,
        failures = coalesce(r.failures + given.fails, 0),
        server = coalesce(given.server, r.server),
        contact = CASE WHEN is_bound THEN given.contact WHEN given.is_over THEN NULL ELSE r.contact END,
        algorithm = coalesce(given.algorithm, r.algorithm),
        call_id = coalesce(given.call_id, r.call_id),
        history = (
            SELECT coalesce(jsonb_agg(kept.value ORDER BY kept.n), '[]') FROM (
                SELECT value, n FROM jsonb_array_elements(r.history || given.entries) WITH ORDINALITY AS one (value, n)
                ORDER BY n DESC LIMIT {HISTORY}
            ) AS kept
        ),
        claim_token = NULL, claimed_until = NULL, updated_at = now,
        {_NEXT_REPORT.format("given.is_reported")}
    FROM given
    WHERE r.tenant_id = given.tenant_id AND r.id = given.id AND r.cseq = given.cseq
    RETURNING r.tenant_id, r.id, r.name, r.removed_at, r.register_status AS status, given.was, r.register_error,
        r.next_refresh_at, r.expires_at, r.cseq, coalesce(was_error, 'expired without a refresh') AS lapse_error,
        CASE WHEN given.was = 'registered' AND NOT was_bound AND r.is_enabled
            THEN extract(epoch FROM CASE WHEN is_bound THEN sent_at ELSE now END - was_until)::float END AS lapsed_for
""")

_DROP = text("DELETE FROM sip_registration WHERE id = ANY (:ids)")

# A row that says registered is left to `lapse`, which knows when that ended.
_HOLD_BACK = text(f"""
    UPDATE sip_registration r SET register_error = :error, updated_at = clock_timestamp(),
        register_status = CASE WHEN r.register_status = 'registered' THEN 'registered' ELSE 'failed' END,
        {_NEXT_REPORT.format("CAST(:is_reported AS boolean)")}
    FROM (
        SELECT tenant_id, id, register_status AS was FROM sip_registration
        WHERE {_NOBODYS} AND is_enabled AND sender IN ('auto', 'drachtio') AND register_error IS DISTINCT FROM :error
        ORDER BY tenant_id, id FOR UPDATE SKIP LOCKED
    ) AS due
    WHERE r.tenant_id = due.tenant_id AND r.id = due.id
    RETURNING r.tenant_id, r.id, r.name, r.register_status AS status, due.was, r.register_error
""")

_NOT_TOLD = "its controller told of no refresh before it expired"

_LAPSE = text(f"""
    UPDATE sip_registration r SET
        register_status = CASE WHEN is_enabled THEN 'failed' ELSE 'pending' END,
        register_error = coalesce(register_error, CASE WHEN NOT is_enabled THEN NULL
            WHEN sender = 'external' THEN '{_NOT_TOLD}'
            ELSE 'expired without a refresh' END),
        registered_since = NULL, unregistered_since = greatest(expires_at, updated_at), updated_at = clock_timestamp(),
        {_NEXT_REPORT.format("CAST(:is_reported AS boolean)")}
    FROM (
        SELECT tenant_id, id FROM sip_registration WHERE register_status = 'registered' AND expires_at <= now()
        ORDER BY tenant_id, id FOR UPDATE SKIP LOCKED
    ) AS due
    WHERE r.tenant_id = due.tenant_id AND r.id = due.id
    RETURNING r.tenant_id, r.id, r.name, r.register_status AS status, 'registered' AS was,
        CASE WHEN r.sender <> 'external' THEN r.register_error WHEN r.is_enabled THEN '{_NOT_TOLD}' END
            AS register_error,
        CASE WHEN r.is_enabled THEN extract(epoch FROM clock_timestamp() - r.expires_at)::float END AS lapsed_for
""")

_IS_WAITED_FOR = text(f"""
    SELECT true FROM sip_registration
    WHERE {_NOBODYS} AND next_refresh_at < now() - interval '3 s' AND NOT ({_HELD_BACK}) LIMIT 1
""")

_CLAIM_REPORTS = text(f"""
    UPDATE sip_registration r SET report_claimed_until = clock_timestamp() + :length
    FROM (
        SELECT tenant_id, id FROM sip_registration
        WHERE report_at <= now() AND external_id IS NOT NULL
            AND (report_claimed_until IS NULL OR report_claimed_until <= now())
        ORDER BY report_at LIMIT :most FOR UPDATE SKIP LOCKED
    ) AS due
    WHERE r.tenant_id = due.tenant_id AND r.id = due.id
    RETURNING r.tenant_id, r.id, r.external_id, r.report_revision, r.report_failures, {STATUS_NOW} AS status,
        r.register_error, r.last_register_at
""")

_REPORTED = text("""
    UPDATE sip_registration SET reported_at = clock_timestamp(), report_error = NULL, report_failures = 0,
        report_claimed_until = NULL, report_at = CASE WHEN report_revision > :revision THEN report_at END
    WHERE tenant_id = :tenant_id AND id = :id
""")

_NOT_REPORTED = text("""
    UPDATE sip_registration SET report_error = :error, report_failures = report_failures + 1,
        report_claimed_until = NULL,
        report_at = CASE WHEN report_revision > :revision THEN report_at ELSE clock_timestamp() + :wait END
    WHERE tenant_id = :tenant_id AND id = :id
""")

_OVERVIEW = text(f"""
    SELECT count(*) FILTER (WHERE status = 'pending' AND is_enabled) AS pending,
        count(*) FILTER (WHERE status = 'registered' AND is_enabled) AS registered,
        count(*) FILTER (WHERE status = 'failed' AND is_enabled) AS failed,
        count(*) FILTER (WHERE NOT is_enabled) AS disabled,
        extract(epoch FROM min(next_refresh_at) FILTER (WHERE is_waiting) - clock_timestamp())::float AS next_refresh,
        coalesce(extract(epoch FROM clock_timestamp() - min(since)), 0)::float AS unregistered,
        coalesce(extract(epoch FROM clock_timestamp() - min(report_at)), 0)::float AS unreported
    FROM (
        SELECT {STATUS_NOW} AS status, is_enabled, next_refresh_at, report_at,
            sender <> 'external' AND (claimed_until IS NULL OR claimed_until <= now())
                AND NOT (next_refresh_at <= now() AND {_HELD_BACK}) AS is_waiting,
            CASE WHEN is_enabled AND {STATUS_NOW} <> 'registered'
                THEN coalesce(unregistered_since, expires_at) END AS since
        FROM sip_registration WHERE removed_at IS NULL
    ) AS account
""")
