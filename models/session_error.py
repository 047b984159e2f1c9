"""Messages that Baileys gateways could not decrypt, how their connections end, and how many of them are too many.

What counts is the *message*: one row per (channel, chat, message id), however many log lines or deliveries tell of it
(baileys-sessions.md §2). A row is healed once its message has arrived after all: then there is a `message` with its id.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Index, RowMapping, func, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from models import gateway_log
from models.base import Base, Dated, Tenanted, belongs_to, given_rows, rows
from models.message import TRAFFIC, TRAFFIC_AT

WEAK = "weak"  # the cause of evidence that no message is named with; `providers.undecrypted.Cause.WEAK`
_REACH = timedelta(days=1)  # what failed longer ago is history
_KEPT = timedelta(days=30)


class Tally(NamedTuple):
    """The errors of one session that count. `at_once`: the most within one window, of messages or of lines that name
    none, whichever is more; `strong`: of messages alone; `contacts`: who wrote them; `since`: the first, None without
    any."""

    at_once: int = 0
    strong: int = 0
    errors: int = 0
    contacts: int = 0
    groups: int = 0
    causes: dict[str, int] = {}  # noqa: RUF012 - never changed
    since: datetime | None = None

    def main_cause(self, *, named: bool = False) -> str | None:
        """That of most of them, of those alone that name their message with `named`; None without any."""
        causes = {cause: n for cause, n in self.causes.items() if not named or cause != WEAK}
        return max(sorted(causes), key=lambda cause: causes[cause], default=None)


class SessionError(Tenanted, Dated, Base):
    """`jid` is the chat's address without a device, `participant` who wrote in a group, `me` of another device of ours,
    else ''. `at`: when it failed,
    as whoever told of it saw it; `times`: how often it was told."""

    __tablename__ = "session_error"
    __table_args__ = (
        belongs_to("channel", "channel_id", ondelete="CASCADE"),
        Index("ix_session_error_open", "tenant_id", "channel_id", "at", postgresql_where=text("healed_at IS NULL")),
        Index("ix_session_error_log", "tenant_id", "channel_id", "at", postgresql_where=text("log IS NOT NULL")),
    )

    channel_id: Mapped[UUID] = mapped_column(primary_key=True)
    jid: Mapped[str] = mapped_column(primary_key=True)
    message_id: Mapped[str] = mapped_column(primary_key=True)
    participant: Mapped[str] = mapped_column(server_default="")
    cause: Mapped[str]
    source: Mapped[str]  # `webhook` or `log`
    log: Mapped[str | None]  # … and which: a `LogPosition`
    at: Mapped[datetime]
    last_at: Mapped[datetime]
    times: Mapped[int] = mapped_column(server_default=text("1"))
    healed_at: Mapped[datetime | None]

    @staticmethod
    def record(s: Session, given: Iterable[dict[str, Any]]) -> list[RowMapping]:
        """Write them down: rows of `tenant_id, channel_id, jid, message_id, participant, cause, source, at`, and
        `log`, if one told of them. Returns those that were new, with these columns. What failed more than a day ago is
        left out, the future is now."""
        wanted: dict[tuple[str, ...], dict[str, Any]] = {}
        for one in given:
            key = (str(one["tenant_id"]), str(one["channel_id"]), one["jid"], one["message_id"])
            wanted.setdefault(key, one)
        if not wanted:
            return []
        ordered = [wanted[key] for key in sorted(wanted)]
        found = s.execute(_RECORD, {**given_rows(ordered), "reach": _REACH}).mappings()
        return [row for row in found if row["times"] == 1]

    @staticmethod
    def weak(s: Session, tenant_id: UUID, channel_id: UUID, at: datetime, log: str | None = None) -> list[RowMapping]:
        """Evidence from a log that names no message: one per second is kept."""
        names = {"jid": "", "message_id": f"weak:{int(at.timestamp())}", "participant": ""}
        row = {"tenant_id": tenant_id, "channel_id": channel_id, **names, "cause": WEAK, "source": "log", "at": at}
        row["log"] = log
        return SessionError.record(s, [row])

    @staticmethod
    def heal(s: Session, tenant_id: UUID, channel_id: UUID) -> int:
        """Mark those healed whose messages arrived; returns how many."""
        healed = s.execute(_HEAL, {"tenant_id": tenant_id, "channel_id": channel_id, "reach": _REACH})
        return len(healed.all())

    @staticmethod
    def tally(
        s: Session, tenant_id: UUID, channel_id: UUID, window: timedelta, *, since: datetime | None = None
    ) -> Tally:
        """The unhealed ones that count: of the last windows, or from `since` on. What came before the last incident
        ended is that one's."""
        given = {"tenant_id": tenant_id, "channel_id": channel_id, "window": window, "since": since, "weak": WEAK}
        row = s.execute(_TALLY, given).mappings().one()
        return Tally(**{name: row[name] for name in Tally._fields if name != "causes"}, causes=row["causes"] or {})

    @staticmethod
    def forget(s: Session) -> int:
        """Drop what is long over, of the tenants that `s` sees; returns how many."""
        return len(s.execute(_FORGET, {"kept": _KEPT}).all())

    @staticmethod
    def affected(s: Session, tenant_id: UUID, channel_id: UUID, since: datetime, most: int) -> list[str]:
        """The chats of the unhealed ones from `since` on, those with the most first."""
        given = {"tenant_id": tenant_id, "channel_id": channel_id, "since": since, "most": most, "weak": WEAK}
        return list(s.scalars(_AFFECTED, given))

    @staticmethod
    def read_until(s: Session, tenant_id: UUID, channel_id: UUID) -> datetime:
        """What its gateway told before then has been read: when the oldest of what waits in the inbox arrived, else
        now; not later than logs have been read that told of its errors within the last day."""
        found: datetime = s.scalars(_READ_UNTIL, {"tenant_id": tenant_id, "channel_id": channel_id}).one()
        return found

    @staticmethod
    def heard_since(
        s: Session, tenant_id: UUID, channel_id: UUID, since: datetime, after: datetime, *, grace: float, weak: bool
    ) -> RowMapping:
        """What came in after a step was made (`after`), of an incident that began at `since`:

        - `errors`: unhealed ones that failed since then, of contacts of whom nothing was decrypted afterwards, and
          that are older than `grace` seconds; `fresh`: those that are not, and may still heal; `again`: those of
          `errors` of contacts who had some before. Lines that name no message count only with `weak`;
        - `decrypted`: messages of the affected contacts; `traffic`: messages of anybody;
        - `read_until`, as above: of what failed later nobody can tell yet whether it healed, so it is `fresh`. What
          counts is when something arrived, not when somebody came to read it.
        """
        given = {"tenant_id": tenant_id, "channel_id": channel_id, "since": since, "after": after}
        given |= {"grace": timedelta(seconds=grace), "with_weak": weak, "weak": WEAK}
        return s.execute(_HEARD, given).mappings().one()


class SessionEnd(Tenanted, Base):
    """How often, and when last, a gateway said that a connection ended with this code (baileys-sessions.md §6)."""

    __tablename__ = "session_end"
    __table_args__ = (belongs_to("channel", "channel_id", ondelete="CASCADE"),)

    channel_id: Mapped[UUID] = mapped_column(primary_key=True)
    code: Mapped[int] = mapped_column(primary_key=True)
    source: Mapped[str]
    at: Mapped[datetime]
    times: Mapped[int] = mapped_column(server_default=text("1"))

    @staticmethod
    def note(s: Session, given: Iterable[dict[str, Any]]) -> list[RowMapping]:
        """Write them down: rows of `tenant_id, channel_id, code, at, source`. Returns what was news."""
        wanted: dict[tuple[str, str, int], dict[str, Any]] = {}
        for one in given:
            key = (str(one["tenant_id"]), str(one["channel_id"]), one["code"])
            if key not in wanted or wanted[key]["at"] < one["at"]:
                wanted[key] = one
        ordered = [wanted[key] for key in sorted(wanted)]
        return list(s.execute(_NOTE, {**given_rows(ordered), "reach": _REACH}).mappings()) if ordered else []

    @staticmethod
    def lately(s: Session, tenant_id: UUID, channel_id: UUID, since: timedelta) -> dict[int, int]:
        """The codes of connections that ended within that time, and how often each has in all."""
        given = {"tenant_id": tenant_id, "channel_id": channel_id, "since": since}
        return {row.code: row.times for row in s.execute(_LATELY, given)}


class SessionLook(Tenanted, Base):
    """When the fixer last looked at a session, how often it has, and what it saw."""

    __tablename__ = "session_look"
    __table_args__ = (belongs_to("channel", "channel_id", ondelete="CASCADE"),)

    channel_id: Mapped[UUID] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(server_default=func.now())
    times: Mapped[int] = mapped_column(server_default=text("1"))
    verdict: Mapped[str]

    @staticmethod
    def note(s: Session, tenant_id: UUID, channel_id: UUID, verdict: str) -> None:
        s.execute(_LOOK, {"tenant_id": tenant_id, "channel_id": channel_id, "verdict": verdict})


_RECORD = text(f"""
    INSERT INTO session_error AS e
        (tenant_id, channel_id, jid, message_id, participant, cause, source, log, at, last_at)
    SELECT tenant_id, channel_id, jid, message_id, coalesce(participant, ''), cause, source, log,
        least(at, now()), least(at, now())
    FROM {
    rows(
        tenant_id="uuid",
        channel_id="uuid",
        jid="text",
        message_id="text",
        participant="text",
        cause="text",
        source="text",
        log="text",
        at="timestamptz",
    )
}
    WHERE at > now() - CAST(:reach AS interval)
    ORDER BY tenant_id, channel_id, jid, message_id
    ON CONFLICT (tenant_id, channel_id, jid, message_id) DO UPDATE
        SET times = e.times + 1, last_at = greatest(e.last_at, excluded.last_at)
    RETURNING tenant_id, channel_id, jid, message_id, cause, at, times
""")

_ARRIVED = """
    EXISTS (
        SELECT FROM message AS m
        WHERE m.tenant_id = e.tenant_id AND m.channel_id = e.channel_id AND m.provider_id = e.message_id
    )
"""

# In the order in which they are written down.
_HEAL = text(f"""
    WITH healed AS (
        SELECT tenant_id, channel_id, jid, message_id FROM session_error AS e
        WHERE e.tenant_id = :tenant_id AND e.channel_id = :channel_id AND e.healed_at IS NULL
            AND e.at > now() - CAST(:reach AS interval) - interval '1 day' AND {_ARRIVED}
        ORDER BY tenant_id, channel_id, jid, message_id FOR UPDATE OF e
    )
    UPDATE session_error AS e SET healed_at = now() FROM healed AS h
    WHERE (e.tenant_id, e.channel_id, e.jid, e.message_id) = (h.tenant_id, h.channel_id, h.jid, h.message_id)
    RETURNING 1
""")

# An open incident has its own `since`; before one is opened, what an earlier one has dealt with does not count again.
# A message that is told of under a phone and under a `@lid` is one.
_TALLY = text(f"""
    WITH counted AS (
        SELECT DISTINCT ON (message_id) jid, coalesce(nullif(participant, ''), jid) AS contact,
            jid LIKE '%@g.us' AS is_group, cause, at
        FROM session_error AS e
        WHERE tenant_id = :tenant_id AND channel_id = :channel_id AND healed_at IS NULL
            AND at >= coalesce(CAST(:since AS timestamptz), greatest(
                now() - CAST(:window AS interval) - interval '30 minutes',
                (SELECT max(closed_at) FROM repair WHERE tenant_id = :tenant_id AND channel_id = :channel_id)
            )) AND NOT {_ARRIVED}
        ORDER BY message_id, at
    ), windows AS (
        SELECT count(*) FILTER (WHERE cause = :weak) OVER w AS weak,
            count(*) FILTER (WHERE cause <> :weak) OVER w AS strong
        FROM counted WINDOW w AS (ORDER BY at RANGE BETWEEN CAST(:window AS interval) PRECEDING AND CURRENT ROW)
    )
    SELECT (SELECT coalesce(greatest(max(weak), max(strong)), 0) FROM windows) AS at_once,
        (SELECT coalesce(max(strong), 0) FROM windows) AS strong,
        count(*) AS errors,
        count(DISTINCT contact) FILTER (WHERE cause <> :weak AND contact <> 'me') AS contacts,
        count(DISTINCT jid) FILTER (WHERE is_group) AS groups, min(at) AS since,
        (SELECT jsonb_object_agg(cause, n) FROM (SELECT cause, count(*) AS n FROM counted GROUP BY cause) AS c)
            AS causes
    FROM counted
""")

_AFFECTED = text("""
    SELECT jid FROM session_error
    WHERE tenant_id = :tenant_id AND channel_id = :channel_id AND healed_at IS NULL AND at >= :since AND cause <> :weak
        AND participant <> 'me'
    GROUP BY jid ORDER BY count(*) DESC, jid LIMIT :most
""")

_READ = f"""
    SELECT least(coalesce((
        SELECT received_at FROM delivery
        WHERE state = 'pending' AND coalesce(app_id, channel_id) = :channel_id ORDER BY id LIMIT 1
    ), clock_timestamp()), ({gateway_log.READ_UNTIL})) AS read_until
"""
_READ_UNTIL = text(_READ)

# A contact may be known by a phone or a `@lid`; of a group it is the member who wrote. What came in is found by the
# index of the traffic, hence the condition that looks longer than it need be.
_HEARD = text(f"""
    WITH read_now AS ({_READ}), incident AS (
        SELECT *, coalesce(nullif(participant, ''), jid) AS contact FROM session_error
        WHERE tenant_id = :tenant_id AND channel_id = :channel_id AND at >= :since AND cause <> :weak
    ), people AS (
        SELECT DISTINCT i.contact, c.contact_id FROM incident AS i
        JOIN contact_identity AS c ON c.tenant_id = :tenant_id AND c.channel_id = :channel_id
            AND c.value = split_part(i.contact, '@', 1)
            AND c.kind = CASE split_part(i.contact, '@', 2) WHEN 'lid' THEN 'lid' ELSE 'phone' END
    ), read AS (
        SELECT contact_id,
            coalesce((SELECT received_at FROM delivery AS d WHERE d.id = m.delivery_id), created_at) AS at
        FROM message AS m
        WHERE tenant_id = :tenant_id AND channel_id = :channel_id AND ({TRAFFIC}) AND {TRAFFIC_AT} > :after
            AND direction = 'in'
    ), arrived AS (
        SELECT contact_id, at FROM read WHERE at > :after
    ), heard AS (
        SELECT p.contact, count(*) AS n, max(a.at) AS last_at
        FROM people AS p JOIN arrived AS a USING (contact_id) GROUP BY p.contact
    ), failed AS (
        SELECT DISTINCT ON (e.message_id)
            e.at <= (SELECT read_until FROM read_now) - CAST(:grace AS interval) AS is_settled,
            EXISTS (
                SELECT FROM incident AS i
                WHERE i.contact = coalesce(nullif(e.participant, ''), e.jid) AND i.at <= :after
            ) AS is_again
        FROM session_error AS e LEFT JOIN heard AS h ON h.contact = coalesce(nullif(e.participant, ''), e.jid)
        WHERE e.tenant_id = :tenant_id AND e.channel_id = :channel_id AND e.healed_at IS NULL AND e.at > :after
            AND (e.cause <> :weak OR :with_weak) AND (h.last_at IS NULL OR h.last_at < e.at) AND NOT {_ARRIVED}
        ORDER BY e.message_id, e.at
    )
    SELECT (SELECT count(*) FROM arrived) AS traffic,
        (SELECT coalesce(sum(n), 0) FROM heard)::bigint AS decrypted,
        count(*) FILTER (WHERE is_settled) AS errors, count(*) FILTER (WHERE NOT is_settled) AS fresh,
        count(*) FILTER (WHERE is_settled AND is_again) AS again, (SELECT read_until FROM read_now) AS read_until
    FROM failed
""")

_FORGET = text("DELETE FROM session_error WHERE at < now() - CAST(:kept AS interval) RETURNING 1")

_NOTE = text(f"""
    INSERT INTO session_end AS e (tenant_id, channel_id, code, source, at)
    SELECT tenant_id, channel_id, code, source, least(at, now())
    FROM {rows(tenant_id="uuid", channel_id="uuid", code="int", source="text", at="timestamptz")}
    WHERE at > now() - CAST(:reach AS interval)
    ORDER BY tenant_id, channel_id, code
    ON CONFLICT (tenant_id, channel_id, code) DO UPDATE
        SET times = e.times + 1, at = excluded.at, source = excluded.source WHERE e.at < excluded.at
    RETURNING tenant_id, channel_id, code
""")

_LATELY = text("""
    SELECT code, times FROM session_end
    WHERE tenant_id = :tenant_id AND channel_id = :channel_id AND at > now() - CAST(:since AS interval)
""")

_LOOK = text("""
    INSERT INTO session_look AS l (tenant_id, channel_id, verdict) VALUES (:tenant_id, :channel_id, :verdict)
    ON CONFLICT (tenant_id, channel_id) DO UPDATE
        SET at = now(), times = l.times + 1, verdict = excluded.verdict
""")
