"""Sessions of Baileys gateways by hand: look at them, repair one, stop and let go on the fixer, read what it did."""

import time
from argparse import Namespace
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import RowMapping, select, text

from models import ChannelKind, Event, Repair, RepairOutcome, RepairPause, RepairState, SessionError
from models.repair import ACTS, Step
from pombal import db, log
from pombal.cli import as_json, say, table
from pombal.cli.admin import Refused
from pombal.cli.lanes import channel_ids
from pombal.settings import settings

ALL = "all"
_STEPS = list(Step)
_POLL = 0.5  # seconds between two looks at a repair that runs
_NOBODY = 20.0  # seconds after which nobody seems to work


def check(given: Namespace) -> int:
    """How sessions stand, from what is known; one alone, or with `--ask`, is asked of its gateway too. Exit code 1 when
    one has an incident or needs a person."""
    rows = [_seen(row) for row in _chosen(given.channel)]
    if given.ask or given.channel != ALL:
        for row in rows:
            row |= _asked(row)
    if given.json:
        as_json([{name: value for name, value in row.items() if name != "row"} for row in rows])
    else:
        table([_line(row) for row in rows], empty="no channels of Baileys gateways")
        if scope := _paused():
            say(scope)
    return (
        1
        if any(row["verdict"] in ("errors", "in_repair", "needs_a_person", "waits_for_a_person") for row in rows)
        else 0
    )


def repair(given: Namespace) -> int:
    """Repair one session, or all that have too many errors. `--dry-run` tells what would be done, and does nothing."""
    wanted = _step(given.step)
    rows = _chosen(given.channel)
    if given.dry_run:
        return _foretell(rows, wanted, is_all=given.channel == ALL, is_json=given.json)
    if settings().session_fixer != "repair":
        raise Refused(f"POMBAL_SESSION_FIXER is {settings().session_fixer}: nothing is repaired")
    if given.channel == ALL:
        rows = [row for row in rows if _seen(row)["verdict"] == "errors" and not _is_paused(row, says=True)]
        if not rows:
            say("no session has too many errors that nobody is at")
            return 0
    for row in rows:
        if _is_paused(row):
            raise Refused(f"its repairs are paused: `pombal session resume {row['slug']}/{row['name']}`, or `all`")
        if wanted is None and not _seen(row)["errors_at_once"] and row["repair_state"] is None:
            raise Refused("no error counts: there is nothing to repair. `--step` makes a step in any case")
    started = [(row, _opened(row, wanted)) for row in rows]
    if given.no_wait:
        say(f"{len(started)} started: `pombal session history` tells what comes of it")
        return 0
    return max(_followed(row, id_) for row, id_ in started)


def pause(given: Namespace) -> int:
    """Nothing is begun any more; a step that is under way is finished, so that no session stays stopped."""
    scope = ALL if given.channel == ALL else str(_chosen(given.channel)[0]["id"])
    with db.session() as s:
        is_news = RepairPause.set(s, scope)
    what = "all repairs are" if given.channel == ALL else "its repairs are"
    say(f"{what} paused" if is_news else f"{what} paused already")
    return 0


def resume(given: Namespace) -> int:
    """End a pause. The pause of `all` and that of a channel are two things."""
    ids = None if given.channel == ALL else _ids(given.channel)
    with db.session() as s:
        is_news = RepairPause.end(s, str(ids[1]) if ids else ALL)
        still = RepairPause.holds(s, ids[1]) if ids else None
        if ids:
            db.see(s, [ids[0]])
            Repair.wake(s, *ids)
    say("resumed" if is_news else "it was not paused")
    if still == ALL:
        say("all repairs are paused still: `pombal session resume all`")
    return 0


def history(given: Namespace) -> int:
    """Incidents, the newest first, with the steps that were made and what came of them."""
    found = []
    for row in _chosen(given.channel):
        with db.session([row["tenant_id"]]) as s:
            query = select(Repair).where(Repair.tenant_id == row["tenant_id"], Repair.channel_id == row["id"])
            for one in s.scalars(query.order_by(Repair.opened_at.desc()).limit(given.limit)):
                found.append(_told(row, one))
    found.sort(key=lambda one: one["opened_at"], reverse=True)
    found = found[: given.limit]
    if given.json:
        as_json(found)
        return 0
    if not found:
        say("no incidents")
    for told in found:
        say(_head(told))
        for step in told["steps"]:
            details = "".join(f" {name}={value}" for name, value in step["details"].items())
            say(f"    {_minute(step['at'])}  {step['step']}: {step['outcome'] or 'under way'}{details} — {step['why']}")
    return 0


def stats(given: Namespace) -> int:
    """Looks, incidents, and what came of them, over some days."""
    with db.session() as s:
        db.see_all(s)
        totals = dict(s.execute(_STATS, {"since": timedelta(days=given.days)}).mappings().one())
        steps = [dict(row) for row in s.execute(_STEP_STATS, {"since": timedelta(days=given.days)}).mappings()]
    if given.json:
        as_json({**totals, "steps": steps})
        return 0
    table(
        [
            {"what": name.replace("_", " "), "number": value if value is not None else "none yet"}
            for name, value in totals.items()
        ],
        empty="",
    )
    say()
    table(steps, empty=f"no steps in {given.days} days")
    return 0


# ------------------------------------------------------------------------------------------------------- what is known


def _chosen(name: str | None) -> list[RowMapping]:
    """One channel by TENANT/NAME, its name or that of its session if no other has that, its id or the end of it; or
    all of them."""
    with db.session() as s:
        db.see_all(s)
        rows = list(s.execute(_CHANNELS, {"kind": ChannelKind.BAILEYS}).mappings())
    if name in (None, ALL):
        return rows
    by_name = [row for row in rows if name in (row["config"].get("session"), row["name"])]
    if len(by_name) > 1:
        raise Refused(f"several channels or sessions are called {name}: give TENANT/NAME")
    if by_name:
        return by_name
    _, channel_id = channel_ids(str(name))
    found = [row for row in rows if row["id"] == channel_id]
    if not found:
        raise Refused(f"{name} is no channel of a Baileys gateway")
    return found


def _ids(name: str) -> tuple[UUID, UUID]:
    (row,) = _chosen(name)
    return row["tenant_id"], row["id"]


def _seen(row: RowMapping) -> dict[str, Any]:
    from workers.session_fixer import hopeless_of, plan_of, verdict_of  # imports the fleet

    with db.session([row["tenant_id"]]) as s:
        tally, step, why = plan_of(s, row["tenant_id"], row["id"])
    verdict = verdict_of(row, tally)
    is_much = verdict == "errors"
    return {
        "row": row,
        "tenant": row["slug"],
        "channel": row["name"],
        "id": row["id"],
        "gateway": row["config"].get("gateway"),
        "session": row["config"].get("session"),
        "status": row["status"],
        "silent_since": row["silent_since"],
        "errors_at_once": tally.at_once,
        "contacts": tally.contacts,
        "causes": tally.causes,
        "verdict": verdict,
        "looked_at": row["looked_at"],
        "says": row["says"] or (f"{step}: {why}" if is_much else hopeless_of(row)),
    }


def _asked(seen: dict[str, Any]) -> dict[str, Any]:
    from workers._foretold import asked  # imports the fleet

    log.setup()
    return {"gateway_says": asked(seen["row"])}


def _line(row: dict[str, Any]) -> dict[str, object]:
    return {
        "channel": f"{row['tenant']}/{row['channel']}",
        "gateway": row["gateway"],
        "session": row["session"],
        "status": row["status"] or "unknown",
        **({"gateway says": row["gateway_says"]} if "gateway_says" in row else {}),
        "errors": row["errors_at_once"],
        "verdict": row["verdict"],
        "looked at": _minute(row["looked_at"]) if row["looked_at"] else "never",
        "why": row["says"] or "",
    }


def _paused() -> str:
    mode = settings().session_fixer
    with db.session() as s:
        pauses = RepairPause.counts(s)
    parts = [] if mode == "repair" else [f"POMBAL_SESSION_FIXER is {mode}"]
    parts += ["all repairs are paused"] if pauses["all"] else []
    if count := pauses["channel"]:
        parts.append(f"{count} channel{'s are' if count > 1 else ' is'} paused")
    return "; ".join(parts)


def _is_paused(row: RowMapping, *, says: bool = False) -> bool:
    with db.session() as s:
        scope = RepairPause.holds(s, row["id"])
    if scope and says:
        say(f"{row['slug']}/{row['name']}: left out, its repairs are paused")
    return scope is not None


# ------------------------------------------------------------------------------------------------------------- by hand


def _step(given: str | None) -> Step | None:
    """By its number on the ladder, or its name."""
    if given is None:
        return None
    if given in _STEPS:
        step = Step(given)
    elif given.isdigit() and int(given) < len(_STEPS):
        step = _STEPS[int(given)]
    else:
        names = ", ".join(f"{place} {one}" for place, one in enumerate(_STEPS) if one in ACTS)
        raise Refused(f"--step must be one of {names}")
    if step not in ACTS:
        raise Refused(f"{step} is nothing to be done by hand: leave --step out for a repair from the beginning")
    return step


def _opened(row: RowMapping, wanted: Step | None) -> UUID:
    """An incident by hand in place of one that waits or observes; one that is in the middle of a step goes on."""
    from workers._foretold import counted, former
    from workers._patient import host_of
    from workers.session_fixer import evidence_of, ring_fixer

    with db.session([row["tenant_id"]]) as s:
        SessionError.heal(s, row["tenant_id"], row["id"])
        before = former(s, row["tenant_id"], row["id"])
        tally, since = counted(s, row["tenant_id"], row["id"], before)
        is_cancelled = Repair.cancel(s, row["tenant_id"], row["id"])
        id_ = Repair.open(
            s,
            row["tenant_id"],
            row["id"],
            host=host_of(row["config"]),
            cause=tally.main_cause() or "none",
            since=since,
            evidence=evidence_of(s, row["tenant_id"], row["id"], tally),
            wanted_step=wanted,
            is_by_hand=True,
        )
        if id_ is None:
            raise Refused(f"{row['slug']}/{row['name']} is in the middle of a step: it is finished first")
        if before is not None and is_cancelled:
            ended = {"outcome": RepairOutcome.CANCELLED, "why": "another was begun by hand", "step": before["step"]}
            ended |= {"channel": str(row["id"]), "repair": str(before["id"]), "seconds": round(before["seconds"], 3)}
            Event.append(s, [Event.row("repair_finished", row["tenant_id"], row["id"], None, ended)])
        payload = {"channel": str(row["id"]), "repair": str(id_), "why": "asked for by hand"}
        Event.append(s, [Event.row("incident_opened", row["tenant_id"], row["id"], None, payload)])
    ring_fixer(row["tenant_id"], row["id"])
    return id_


def _followed(row: RowMapping, id_: UUID) -> int:
    """Tell what happens until it is over. Exit code 0 when the session is well, 1 otherwise."""
    name, began = f"{row['slug']}/{row['name']}", time.monotonic()
    told: set[str] = set()
    was_claimed = False
    try:
        while True:
            with db.session([row["tenant_id"]]) as s:
                one = s.get_one(Repair, (row["tenant_id"], id_))
            was_claimed = was_claimed or bool(one.steps) or one.claim_token is not None
            for line in _progress(one):
                if line not in told:
                    told.add(line)
                    say(f"{name}: {line}")
            if one.state == RepairState.CLOSED:
                say(f"{name}: {one.outcome} — {one.says}")
                return 0 if one.outcome in (RepairOutcome.REPAIRED, RepairOutcome.HEALED) else 1
            if one.state == RepairState.WAITING:
                say(f"{name}: needs a person — {one.says}")
                return 1
            if not was_claimed and time.monotonic() - began > _NOBODY:
                say("nobody works on it: is a worker of session_fixer running?")
                was_claimed = True
            time.sleep(_POLL)
    except KeyboardInterrupt:
        say("the repair goes on: `pombal session history` tells what comes of it, `pombal session pause` stops it")
        raise


def _progress(one: Repair) -> Iterator[str]:
    for place, step in enumerate(one.steps):
        yield f"{place + 1}. {step['step']}: {step['why']}"
        if step["outcome"]:
            yield f"{place + 1}. {step['step']}: {step['outcome']}"
    if one.says and one.state == RepairState.OPEN:
        yield one.says


def _foretell(rows: list[RowMapping], wanted: Step | None, *, is_all: bool, is_json: bool) -> int:
    """What would be done, and why; nothing is begun, nothing is touched."""
    from workers._foretold import foretold

    log.setup()
    found = []
    for row in rows:
        seen = _seen(row)
        left_out = _left_out(row, seen) if is_all else None
        plan = [f"nothing: {left_out}"] if left_out else foretold(row, wanted)
        found.append({name: value for name, value in seen.items() if name != "row"} | {"plan": plan})
    if is_json:
        as_json(found)
        return 0
    for one in found:
        say(f"{one['tenant']}/{one['channel']} (session {one['session']} of a {one['gateway']} gateway)")
        say(f"    {one['errors_at_once']} errors at once of {one['contacts']} contacts: {one['verdict']}")
        for line in one["plan"]:
            say(f"    {line}")
    if not found:
        say("no channels of Baileys gateways")
    return 0


def _left_out(row: RowMapping, seen: dict[str, Any]) -> str | None:
    """Why a repair of all sessions does nothing to this one."""
    if seen["verdict"] != "errors":
        return f"of all, only sessions with too many errors are repaired ({seen['verdict']})"
    return "its repairs are paused" if _is_paused(row) else None


# ---------------------------------------------------------------------------------------------------------------- told


def _told(row: RowMapping, one: Repair) -> dict[str, Any]:
    return {
        "tenant": row["slug"],
        "channel": row["name"],
        "id": one.id,
        "state": one.state,
        "outcome": one.outcome,
        "cause": one.cause,
        "is_by_hand": one.is_by_hand,
        "opened_at": one.opened_at,
        "closed_at": one.closed_at,
        "step": one.step,
        "phase": one.phase,
        "says": one.says,
        "evidence": one.evidence,
        "steps": one.steps,
    }


def _head(one: dict[str, Any]) -> str:
    if one["closed_at"]:
        seconds = (one["closed_at"] - one["opened_at"]).total_seconds()
        state = f"{one['outcome']} after {seconds:.0f}s"
    else:
        state = "waits for a person" if one["state"] == RepairState.WAITING else f"{one['step']} ({one['phase']})"
    evidence = one["evidence"]
    seen = f"{evidence.get('at_once', 0)} errors of {evidence.get('contacts', 0)} contacts, {one['cause']}"
    by_hand = ", by hand" if one["is_by_hand"] else ""
    why = f" — {one['says']}" if one["says"] else ""
    return f"{_minute(one['opened_at'])}  {one['tenant']}/{one['channel']}  {state} ({seen}{by_hand}){why}"


def _minute(at: datetime | str) -> str:
    return at[:19] if isinstance(at, str) else at.isoformat(timespec="seconds")


_CHANNELS = text("""
    SELECT t.slug, c.tenant_id, c.id, c.name, c.kind, c.config, c.sealed, c.own_id, c.status, c.unknown_reason,
        c.silent_since, r.state AS repair_state, r.says, l.at AS looked_at, l.verdict AS last_verdict
    FROM channel AS c JOIN tenant AS t ON t.id = c.tenant_id
    LEFT JOIN repair AS r ON r.tenant_id = c.tenant_id AND r.channel_id = c.id AND r.state <> 'closed'
    LEFT JOIN session_look AS l ON l.tenant_id = c.tenant_id AND l.channel_id = c.id
    WHERE c.kind = :kind ORDER BY t.slug, c.name
""")

_STATS = text("""
    SELECT (SELECT coalesce(sum(times), 0) FROM session_look) AS checked,
        count(*) AS incidents,
        count(*) FILTER (WHERE outcome = 'repaired') AS repaired,
        count(*) FILTER (WHERE outcome = 'healed') AS healed_by_themselves,
        count(*) FILTER (WHERE outcome = 'unproven') AS unproven,
        count(*) FILTER (WHERE outcome IN ('unrepaired', 'cancelled')) AS given_up,
        count(*) FILTER (WHERE state = 'waiting') AS waiting_for_a_person,
        count(*) FILTER (WHERE state = 'open') AS open,
        round(extract(epoch FROM avg(closed_at - opened_at) FILTER (WHERE outcome = 'repaired'))::numeric, 1)::float8
            AS mean_seconds_to_repair
    FROM repair WHERE opened_at > now() - CAST(:since AS interval)
""")

_STEP_STATS = text("""
    SELECT one ->> 'step' AS step, coalesce(one ->> 'outcome', 'under way') AS outcome, count(*) AS times
    FROM repair AS r CROSS JOIN LATERAL jsonb_array_elements(r.steps) AS one
    WHERE r.opened_at > now() - CAST(:since AS interval) GROUP BY 1, 2 ORDER BY 1, 2
""")
