"""Repair the sessions of Baileys gateways: count what they could not decrypt, and climb the ladder one step at a time.

Queue `session_fixer`, in: the ids of a tenant and a channel. Rung by whoever noted new errors, by the sweep for what is
due, and once per `CHECK_INTERVAL` for all. More than `THRESHOLD_ERRORS` distinct unhealed messages within
`ERROR_WINDOW` open an incident (a `repair` row, one per session); from then on this is a walk through its phases:

    observe → cause → (stop → keys → start | act) → watch → proven, or the next step, or a person

Each phase is written down before it is made, under a claim, so a process that dies leaves a row that the next one goes
on with. A session whose socket was closed is started before anything else is decided (security-reliability.md F3, F4).
"""

import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import RowMapping, text
from sqlalchemy.orm import Session

from models import Channel, ChannelKind, Event, Lease, Repair, SessionEnd, SessionError, SessionLook, Tick
from models.repair import Step
from models.session_error import Tally
from pombal import db, log, metrics
from pombal.broker import HardenedBroker, actor, broker, cron
from pombal.errors import Permanent
from pombal.middleware import bell_may_be_lost
from pombal.settings import settings
from workers import _ladder
from workers._patient import LATELY, hopeless, host_of
from workers._repair import Turn, keep_creds, note

_log = log.get()

_LONGEST_JOB = 30.0  # seconds; no phase is begun after so many
_MOST_RUNG = 500  # in one round of the sweep
_ENOUGH_JOBS = 1_000
_LOOKS = timedelta(minutes=10)  # a round of looks may take so long before another process may begin one


@actor(queue="session_fixer", max_retries=3, min_backoff=1_000, max_backoff=8_000, throws=Permanent)
def session_fixer(tenant_id: str, channel_id: str) -> None:
    """Open an incident if this session has one, and make the next steps of its repair as far as they are due."""
    try:
        tenant, channel = UUID(tenant_id), UUID(channel_id)
    except ValueError:
        raise Permanent("not the ids of a tenant and a channel") from None
    with db.session([tenant]) as s:
        is_in_a_step = Repair.is_in_a_step(s, tenant, channel)
    if not is_in_a_step:  # whatever else: one whose socket may be closed comes first
        inspect(tenant, channel)
    wait: float | None = None
    began = time.monotonic()
    while time.monotonic() - began < _LONGEST_JOB:
        with db.session([tenant]) as s:
            row = Repair.claim(s, tenant, channel, uuid4())
        if row is None:
            return
        wait = Turn(row).run()
        if wait is None or wait > 0:
            break
    if wait is not None:
        ring_fixer(tenant, channel, wait)


@actor(queue="session_fixer", max_retries=0, periodic=cron("* * * * *"))
def session_fixer_tick() -> None:
    """Once per `CHECK_INTERVAL`: look at every session, and at whatever waits for its turn."""
    for mode in ("repair", "observe", "off"):
        metrics.fixer_mode.labels(state=mode).set(mode == settings().session_fixer)
    with db.session() as s:
        if not Tick.claim(s, "session_fixer"):
            return
        token = uuid4()
        if not Lease.take(s, "session_fixer", token, _LOOKS):
            return
        is_due = s.scalar(_IS_DUE, {"every": settings().require_check_interval()})
    if is_due:
        look_at_all()
    with db.session() as s:  # after a failure the lease runs out instead, so that not every minute is one
        if is_due:
            Lease.finished(s, "session_fixer", token)
        Lease.release(s, "session_fixer", token)


def ring_fixer(tenant_id: UUID, channel_id: UUID, wait: float = 0.0) -> None:
    """Enqueue a look at this session after so many seconds; while Redis is away the sweep and the tick do it later."""
    with bell_may_be_lost("fixer_not_rung", channel_id=str(channel_id)):
        session_fixer.send_with_options(args=(str(tenant_id), str(channel_id)), delay=int(wait * 1000) or None)


def ring_repairs(*, at_once: bool = False) -> int:
    """Enqueue a job for each incident that is due and was not rung for lately; returns how many. `at_once`: Redis lost
    them."""
    if not at_once and isinstance(broker, HardenedBroker) and broker.waiting("session_fixer") > _ENOUGH_JOBS:
        return 0
    with db.session() as s:
        db.see_all(s)
        due = Repair.to_ring(s, _MOST_RUNG, at_once=at_once)
    for tenant_id, channel_id in due:
        session_fixer.send(str(tenant_id), str(channel_id))
    metrics.sweeps.labels(queue="session_fixer").inc(len(due))
    return len(due)


def take_note(
    s: Session, errors: Iterable[dict[str, Any]] = (), ends: Iterable[dict[str, Any]] = ()
) -> set[tuple[UUID, UUID]]:
    """Write down what a gateway said, in the transaction of whoever heard it: rows as `SessionError.record` and
    `SessionEnd.note` take them. Returns the (tenant, channel) pairs to `ring_fixer` for after the commit."""
    new = SessionError.record(s, errors)
    ended = SessionEnd.note(s, ends)
    for row in new:
        metrics.session_errors.labels(row["cause"]).inc()
    return {(row["tenant_id"], row["channel_id"]) for row in [*new, *ended]}


# ---------------------------------------------------------------------------------------------------- is there anything


def inspect(tenant_id: UUID, channel_id: UUID) -> Tally:
    """Count what a session could not decrypt, and open an incident when that is too much. Returns what was counted."""
    if settings().session_fixer == "off":
        return Tally()
    with db.session([tenant_id]) as s:
        channel = s.get(Channel, (tenant_id, channel_id))
        if channel is None or channel.kind != ChannelKind.BAILEYS:
            return Tally()
        SessionError.heal(s, tenant_id, channel_id)
        tally = SessionError.tally(s, tenant_id, channel_id, settings().require_error_window())
        if tally.at_once <= settings().threshold_errors or tally.since is None:
            return tally
        why = _ladder.path(tally, settings().threshold_errors)[1]
        evidence = evidence_of(s, tenant_id, channel_id, tally)
        id_ = Repair.open(
            s,
            tenant_id,
            channel_id,
            host=host_of(channel.config),
            cause=tally.main_cause() or "none",
            since=tally.since,
            evidence=evidence,
        )
        if id_ is None:
            return tally
        says = {"channel": str(channel_id), "repair": str(id_), "why": why, **evidence}
        Event.append(s, [Event.row("incident_opened", tenant_id, channel_id, None, says)])
        name = channel.name
    _log.warning("incident_opened", tenant_id=str(tenant_id), channel_id=str(channel_id), repair_id=str(id_), why=why)
    note(name, f"incident opened: {tally.at_once} messages could not be decrypted; {why}")
    return tally


def evidence_of(s: Session, tenant_id: UUID, channel_id: UUID, tally: Tally) -> dict[str, Any]:
    """What speaks for an incident, in numbers: no addresses, no message ids."""
    return {
        "at_once": tally.at_once,
        "errors": tally.errors,
        "contacts": tally.contacts,
        "groups": tally.groups,
        "causes": tally.causes,
        "ends": {str(code): times for code, times in SessionEnd.lately(s, tenant_id, channel_id, LATELY).items()},
    }


@actor(queue="session_fixer", max_retries=1, min_backoff=1_000, max_backoff=8_000, throws=Permanent)
def session_look(tenant_id: str, channel_id: str) -> None:
    """Look at one session: a word for how it stands is noted, an incident opened, its credentials kept while well."""
    try:
        tenant, channel = UUID(tenant_id), UUID(channel_id)
    except ValueError:
        raise Permanent("not the ids of a tenant and a channel") from None
    with db.session([tenant]) as s:
        given = {"kind": ChannelKind.BAILEYS, "tenant_id": tenant, "channel_id": channel}
        row = s.execute(_SESSION, given).mappings().first()
    if row is not None:
        look_at(row)


def look_at_all() -> int:
    """Have every session of a Baileys gateway looked at, each by a job of its own; returns how many there are."""
    with db.session() as s:
        db.see_all(s)
        SessionError.forget(s)
        found = s.execute(_SESSIONS, {"kind": ChannelKind.BAILEYS}).all()
    for tenant_id, channel_id in found:
        session_look.send(str(tenant_id), str(channel_id))
    return len(found)


def look_at(row: RowMapping) -> str:
    """How a session stands, in a word; `row` has its channel's columns."""
    tally = inspect(row["tenant_id"], row["id"])
    verdict = verdict_of(row, tally)
    if verdict == "needs_a_person":
        names = {"tenant_id": str(row["tenant_id"]), "channel_id": str(row["id"])}
        _log.error("session_needs_a_person", **names, why=hopeless_of(row))
    with db.session([row["tenant_id"]]) as s:
        SessionLook.note(s, row["tenant_id"], row["id"], verdict)
    if verdict == "well":
        keep_creds(row["name"], row["config"], row["id"], row["sealed"], row["own_id"])
    elif verdict in ("errors", "in_repair"):
        ring_fixer(row["tenant_id"], row["id"])
    return verdict


def verdict_of(row: RowMapping, tally: Tally) -> str:
    """A word for how a session stands; `row` says how its channel does, and the state of its incident."""
    if row["repair_state"] is not None:
        return "waits_for_a_person" if row["repair_state"] == "waiting" else "in_repair"
    if hopeless_of(row):
        return "needs_a_person"
    if tally.at_once > settings().threshold_errors:
        return "errors"
    if row["unknown_reason"] is not None or row["status"] is None:
        return "unknown"
    if row["status"] != "connected":
        return "disconnected"
    return "silent" if row["silent_since"] is not None else "well"


def hopeless_of(row: RowMapping) -> str | None:
    """What a person has to do about a session, by how its channel stands."""
    return hopeless(row["tenant_id"], row["id"], is_open=row["status"] == "connected")


def plan_of(s: Session, tenant_id: UUID, channel_id: UUID) -> tuple[Tally, Step, str]:
    """What the first step of a repair would be now, and why; for whoever asks by hand."""
    tally = SessionError.tally(s, tenant_id, channel_id, settings().require_error_window())
    steps, why = _ladder.path(tally, settings().threshold_errors)
    return tally, steps[0], why


_IS_DUE = text("""
    SELECT coalesce(bool_or(done_at <= now() - CAST(:every AS interval) + interval '5 seconds'), true)
    FROM lease WHERE name = 'session_fixer'
""")

_SESSIONS = text("SELECT tenant_id, id FROM channel WHERE kind = :kind ORDER BY tenant_id, id")

_SESSION = text("""
    SELECT c.tenant_id, c.id, c.name, c.config, c.sealed, c.own_id, c.status, c.unknown_reason, c.silent_since,
        r.state AS repair_state
    FROM channel AS c
    LEFT JOIN repair AS r ON r.tenant_id = c.tenant_id AND r.channel_id = c.id AND r.state <> 'closed'
    WHERE c.kind = :kind AND c.tenant_id = :tenant_id AND c.id = :channel_id
""")
