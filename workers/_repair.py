"""One turn of a repair: from the phase that a claimed row is in to the next one. Not a queue, hence the underscore.

What is decided is written down before it is done, and again when it is done; whatever is done may be done twice. Calls
to the gateway end in time, and the row's claim outlives them; before keys are touched the claim is read once more.
"""

import random
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import RowMapping, text

from models import ChannelKind, Event, Repair, RepairOutcome, RepairPause, RepairState
from models.repair import ACTS, MAY_BE_STOPPED, Phase, Step
from pombal import db, log, metrics
from pombal.errors import Misconfigured, Permanent, Rejected
from pombal.middleware import is_store_trouble
from pombal.secrets import unseal
from pombal.settings import settings
from providers import authstore
from providers.authstore import StoreFault
from providers.gateway import Gateway, Look
from providers.instance import InstanceFault
from workers import _ladder
from workers._patient import Patient, Row
from workers.status_sync import ask_soon

_log = log.get()

MOST_STEPS = 3  # a day; then a person
_COOL_DOWN = 600.0  # seconds after a step, doubled by each that was made in the last day
_OBSERVED = 120.0  # seconds
_LONGEST_WATCH = 86_400.0  # without any message at all
_PROVEN = 3  # messages of affected contacts, without an error: no need to wait any longer
_LOOK_AGAIN = 2.0
_STOPS_WITHIN = 60.0
_STARTS_WITHIN = 60.0
_START_AGAIN = 5  # looks, ever longer apart: about a minute
_LOOK_WAITING = 600.0
_LONGEST_WAIT = 300.0


class Next(NamedTuple):
    """What a phase came to: columns to write, and when the next one is due; `wait` None: the incident is closed.
    `events` follow the commit in the log, too: `(type, payload)`."""

    changes: dict[str, Any]
    wait: float | None
    events: tuple[tuple[str, dict[str, Any]], ...] = ()


class Turn:
    """One phase of a claimed repair."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.step, self.phase = Step(row["step"]), Phase(row["phase"])
        self.tenant_id: UUID = row["tenant_id"]
        self.channel_id: UUID = row["channel_id"]
        self.patient = Patient(row)
        self._began = time.monotonic()

    def run(self) -> float | None:
        """Make it and write it down. Seconds until the next one, None when there is none or the claim was lost.
        Raises only what is the database's trouble: the claim runs out then, and the phase is made again."""
        try:
            found = self._made()
        except InstanceFault as fault:
            found = self._later(f"the gateway: {fault.text}", fault.wait)
        except (Misconfigured, Permanent, Rejected) as error:
            _log.error("repair_misconfigured", **self._names(), error=str(error))
            found = self._later("a setting of this channel or installation is wrong")
        except Exception as error:
            if is_store_trouble(error):
                raise
            _log.error("repair_failed_inside", **self._names(), traceback=log.redacted(error))
            found = self._later("an error of our own")
        return self._kept(found)

    def _made(self) -> Next:
        if self.row["kind"] != ChannelKind.BAILEYS:
            return self._closed(RepairOutcome.CANCELLED, "the channel is of another kind by now")
        self.patient.heal()
        match self.phase:
            case Phase.PLANNED:
                return self._waits() if self.row["state"] == RepairState.WAITING else self._planned()
            case Phase.STOPPING:
                return self.patient.ask(self._stopping)
            case Phase.STOPPED:
                return self._stopped()
            case Phase.ACTING:
                return self.patient.ask(self._acting)
            case Phase.STARTING:
                return self.patient.ask(self._starting)
            case Phase.WATCHING:
                return self._watching()

    # ------------------------------------------------------------------------------------------------ before a step

    def _planned(self) -> Next:
        """Decide whether this step may be begun now."""
        if self.row["wanted_step"] is None and self.row["is_by_hand"] and self.step == Step.OBSERVE:
            return self._to(Step.CAUSE, "asked for by hand")
        if self.step == Step.OBSERVE:
            return self._begun(Phase.WATCHING, "most errors heal by themselves: a gateway asks for the message again")
        if over := self._is_over():
            return over
        if self.step == Step.PERSON:
            return self._to_a_person(self.row["says"] or "no step is left")
        if held := self._held():
            return held
        if self.step == Step.CAUSE:
            return self.patient.ask(self._cause)
        return self.patient.ask(self._may_act)

    def _held(self) -> Next | None:
        """Whether somebody does not want anything done."""
        mode = settings().session_fixer
        would = self.step.value if self.step in ACTS else "look for the cause"
        if mode != "repair":
            return self._later(f"POMBAL_SESSION_FIXER is {mode}: it would {would}", 60.0, is_failure=False)
        with db.session([self.tenant_id]) as s:
            scope = RepairPause.holds(s, self.channel_id)
        if scope:
            whose = "all repairs are" if scope == "all" else "this channel's repairs are"
            return self._later(f"{whose} paused: it would {would}", 60.0, is_failure=False)
        if self.row["has_wish"]:
            return self._later("somebody is starting or ending the session", 15.0, is_failure=False)
        return None

    async def _cause(self, gateway: Gateway) -> Next:
        """Rule out what no repair cures, then take the mildest step that fits."""
        if hopeless := self.patient.hopeless():
            return self._to_a_person(hopeless)
        await gateway.health()
        seen = await gateway.look()
        if seen.state == "qr":
            return self._to_a_person("the session asks for a QR code: pair it again")
        return self._climbed(gateway)

    def _climbed(self, gateway: Gateway) -> Next:
        """On to the mildest step that was not tried; those that cannot be made are written down."""
        choice = _ladder.choose(self.patient.tally(), self._tried(), self.patient.means(gateway))
        skipped = [self._entry(step, why, outcome="skipped") for step, why in choice.skipped]
        for step, _ in choice.skipped:
            metrics.repairs.labels(step=step, outcome="skipped").inc()
        return self._to(choice.step, choice.why, more=skipped)

    async def _may_act(self, gateway: Gateway) -> Next:
        """Whether this step may be made: not too soon, not too often, on a gateway that is well."""
        by_hand = self.row["is_by_hand"]
        with db.session([self.tenant_id]) as s:
            made = Repair.lately(s, self.tenant_id, self.channel_id)
        if made.steps >= MOST_STEPS and not by_hand:
            return self._to_a_person(f"{made.steps} steps in a day did not help")
        cool_down = float(self.row["config"].get("cool_down_seconds", _COOL_DOWN)) * 2 ** max(0, made.steps - 1)
        if made.seconds_ago is not None and made.seconds_ago < cool_down and not by_hand:
            left = cool_down - made.seconds_ago
            return self._later(f"cools down after the last step; next: {self.step}", left, is_failure=False)
        lacks = self.patient.means(gateway).lacks(self.step)
        if lacks is not None:  # it could when it was chosen, or it was asked for by hand
            return self._ended_with("skipped", lacks)
        await gateway.health()
        store = self.patient.store_for(self.step, gateway)
        names = self.patient.names_for(self.step, store) if store is not None else None
        if names == [] and self.step != Step.RESTORE_CREDS:
            return self._ended_with("skipped", "there are no such keys")
        needs_stop = store is not None or (self.step == Step.RESTART and "restart" not in gateway.abilities)
        return self._begun(Phase.STOPPING if needs_stop else Phase.ACTING, self.row["says"] or "", names=names)

    # ------------------------------------------------------------------------------------------------- making a step

    async def _stopping(self, gateway: Gateway) -> Next:
        """Close the socket, and see that it is closed: nothing of a session is touched while it lives."""
        is_late = self._age(self.row["phase_at"]) > _STOPS_WITHIN
        try:
            seen = await gateway.look()
            if seen.state != "closed":
                await gateway.stop()
                seen = await gateway.look()
        except InstanceFault as fault:
            if not is_late:
                raise
            seen = Look("unknown", fault.raw)
        if seen.state == "closed":
            ask_soon(self.tenant_id, self.channel_id)  # so that nothing is sent through it meanwhile
            return Next(self._in(Phase.STOPPED), 0.0)
        if is_late:
            return Next(self._in(Phase.STARTING) | self._told("not_stopped"), 0.0)
        return self._later("waits for the socket to be closed", _LOOK_AGAIN, is_failure=False)

    def _stopped(self) -> Next:
        """The socket is closed: do to its keys what the step is for, and start it in any case."""
        if self.step == Step.RESTART:
            return Next(self._in(Phase.STARTING), 0.0)
        names, backup = self.row["names"] or [], str(self.row["id"])
        if not self._is_still_ours():
            return Next({}, 0.0)
        try:
            store = self.patient.store()
            if store is None:
                return Next(self._in(Phase.STARTING) | self._told("no_store"), 0.0)
            if self.step == Step.RESTORE_CREDS:
                for name in names:
                    store.restore(name, backup)
                details: dict[str, Any] = {"restored": len(names)}
            else:
                details = {"dropped": store.drop(names, backup), "planned": len(names)}
        except StoreFault as fault:
            if fault.code == "busy":  # somebody whose claim ran out is at it still: nothing may be started meanwhile
                return self._later("waits for the store of its keys")
            _log.error("repair_store_failed", **self._names(), code=fault.code)
            return Next(self._in(Phase.STARTING) | self._told(fault.code), 0.0)
        return Next(self._in(Phase.STARTING) | self._told(None, details), 0.0)

    async def _acting(self, gateway: Gateway) -> Next:
        """What is done by the gateway itself, without the socket closed by us."""
        if self.step == Step.CONTACT_REFRESH:
            jids = [jid for jid in self.patient.affected() if not jid.endswith("@g.us")]
            for jid in jids:
                await gateway.refresh_contact(jid)
            return Next(self._in(Phase.WATCHING) | self._told(None, {"refreshed": len(jids)}), self._glance())
        await gateway.restart()
        return Next(self._in(Phase.STARTING), _LOOK_AGAIN)

    async def _starting(self, gateway: Gateway) -> Next:
        """Until it is open again, however long that takes; a session that asks for a QR code is a person's."""
        seen = await gateway.look()
        if seen.state == "open":
            ask_soon(self.tenant_id, self.channel_id)
            return Next(self._in(Phase.WATCHING), self._glance())
        if seen.state == "qr":
            return self._to_a_person("it asks for a QR code after the start: pair it again", asked_for_qr=True)
        if seen.state == "unknown" and self._age(self.row["phase_at"]) > _STARTS_WITHIN:
            return Next(self._in(Phase.WATCHING), self._glance())  # its gateway does not tell; what arrives will
        # A start that is under way is given its time: every call could begin anew.
        if seen.state != "connecting" or self.row["failures"] % _START_AGAIN == _START_AGAIN - 1:
            await gateway.start()
        return self._later("waits for the socket to be open again")

    # ---------------------------------------------------------------------------------------------------- the proof

    def _watching(self) -> Next:
        """Judge by what arrives: errors, and messages that could be decrypted."""
        if self.step in ACTS and (back := self.patient.ask(self._is_closed_again)):
            return back
        age, observed = self._age(self.row["phase_at"]), self._observed()
        heard = self.patient.heard(self.row["phase_at"])
        if self.step == Step.OBSERVE:
            if self.patient.tally().at_once <= settings().threshold_errors:
                return self._closed(RepairOutcome.HEALED, "the messages arrived after all")
            if age < observed:
                return Next({"says": "observes whether it heals by itself"}, self._glance())
            if not heard["errors"] and heard["decrypted"]:
                return self._closed(RepairOutcome.HEALED, "messages of the affected contacts can be decrypted again")
            if not heard["errors"] and not self.patient.tally().strong:
                return self._closed(RepairOutcome.UNPROVEN, "no more lines of a log, and no message was named")
            return self._to(Step.CAUSE, "it did not heal by itself", ended="not_healed")
        if not heard["errors"] and (heard["decrypted"] >= _PROVEN or (age >= observed and heard["traffic"])):
            return self._proven(heard)
        if age < observed:
            return Next({"says": f"watches what came of {self.step}"}, self._glance())
        if heard["errors"]:
            return self._ended_with("failed", f"{heard['errors']} more messages could not be decrypted")
        if age > _LONGEST_WATCH:
            return self._closed(RepairOutcome.UNPROVEN, "nobody has written since")
        return Next({"says": f"nobody has written since {self.step}: nothing tells whether it helped"}, observed)

    async def _is_closed_again(self, gateway: Gateway) -> Next | None:
        """A stop may come late, or another's: a session is never left without its socket by us."""
        try:
            seen = await gateway.look()
        except InstanceFault as fault:
            _log.debug("repair_look_failed", **self._names(), code=fault.code)
            return None
        return Next(self._in(Phase.STARTING), 0.0) if seen.state == "closed" else None

    def _proven(self, heard: RowMapping) -> Next:
        why = f"{heard['decrypted']} messages of the affected contacts and {heard['traffic']} in all, and no error"
        return self._closed(RepairOutcome.REPAIRED, why)

    def _is_over(self) -> Next | None:
        """Whether it healed while it waited for something."""
        age = self._age(self.row["phase_at"])
        if self.row["is_by_hand"] or age < self._observed():
            return None
        heard = self.patient.heard(self.row["phase_at"])
        if heard["errors"] or not heard["decrypted"]:
            return None
        return self._closed(RepairOutcome.HEALED, "messages of the affected contacts can be decrypted again")

    def _waits(self) -> Next:
        """For a person; over when messages can be decrypted again, by whatever they did."""
        return self._is_over() or Next({}, _LOOK_WAITING)

    # ----------------------------------------------------------------------------------------------- what comes next

    def _begun(self, phase: Phase, why: str, names: list[str] | None = None) -> Next:
        entry = self._entry(self.step, why)
        event = ("repair_step", self._says(step=self.step, why=why))
        metrics.repairs.labels(step=self.step, outcome="begun").inc()
        note(self.row["name"], f"{self.step}: {why}")
        changes = self._in(phase) | {"steps": [*self.row["steps"], entry], "names": names, "says": None}
        return Next(changes, self._glance() if phase == Phase.WATCHING else 0.0, (event,))

    def _to(self, step: Step, why: str, *, ended: str | None = None, more: list[dict[str, Any]] | None = None) -> Next:
        """On to a step; `ended`: what came of the one before."""
        steps = self._steps(ended) + (more or [])
        if ended:
            metrics.repairs.labels(step=self.step, outcome=ended).inc()
        changes = self._in(Phase.PLANNED) | {"step": step, "step_at": self._now(), "steps": steps, "says": why}
        return Next(changes, 0.0)

    def _ended_with(self, outcome: str, why: str) -> Next:
        """This step is over, and it did not help: the next one, or, of one asked for by hand, the end."""
        note(self.row["name"], f"{self.step}: {outcome}, {why}")
        if self.row["wanted_step"] is not None:
            return self._closed(RepairOutcome.UNREPAIRED, why, ended=outcome)
        if self.phase == Phase.PLANNED:  # it was never begun
            return self._to(Step.CAUSE, why, more=[self._entry(self.step, why, outcome=outcome)])
        return self._to(Step.CAUSE, why, ended=outcome)

    def _to_a_person(self, why: str, *, asked_for_qr: bool = False) -> Next:
        _log.error("repair_needs_a_person", **self._names(), why=why)
        note(self.row["name"], f"needs a person: {why}")
        ended = "asked_for_qr" if asked_for_qr else "failed" if self.phase != Phase.PLANNED else None
        if ended:
            metrics.repairs.labels(step=self.step, outcome=ended).inc()
        metrics.repairs.labels(step=Step.PERSON, outcome="begun").inc()
        changes = self._in(Phase.PLANNED) | {
            "state": RepairState.WAITING,
            "step": Step.PERSON,
            "step_at": self._now(),
            "steps": [*self._steps(ended), self._entry(Step.PERSON, why)],
            "says": why,
        }
        if asked_for_qr:
            changes["asked_for_qr"] = True
        return Next(changes, _LOOK_WAITING, (("repair_step", self._says(step=Step.PERSON, why=why)),))

    def _closed(self, outcome: RepairOutcome, why: str, *, ended: str | None = None) -> Next:
        metrics.repairs.labels(step=self.step, outcome=ended or str(outcome)).inc()
        note(self.row["name"], f"{outcome}: {why}")
        seconds = round(self._age(self.row["opened_at"]), 3)
        changes = {
            "state": RepairState.CLOSED,
            "outcome": outcome,
            "closed_at": self._now(),
            "steps": self._steps(ended or str(outcome)),
            "says": why,
        }
        says = self._says(outcome=outcome, why=why, step=self.step, seconds=seconds)
        return Next(changes, None, (("repair_finished", says),))

    def _later(self, says: str, wait: float = 0.0, *, is_failure: bool = True) -> Next:
        """The same phase again: soon, then ever more seldom while it fails; but a closed socket is never forgotten."""
        failures = self.row["failures"] + 1 if is_failure else 0
        longest = 30.0 if self.phase in MAY_BE_STOPPED else _LONGEST_WAIT
        backoff = min(2.0 ** min(failures - 1, 10), longest) * random.uniform(0.9, 1.1)  # noqa: S311 - jitter
        if failures in (1, 10) or says != self.row["says"]:
            _log.warning("repair_waits", **self._names(), step=self.step, phase=self.phase, why=says)
        return Next({"says": says, "failures": failures}, max(wait, backoff) if is_failure else wait)

    def _in(self, phase: Phase) -> dict[str, Any]:
        return {"phase": phase, "phase_at": self._now(), "failures": 0}

    def _told(self, trouble: str | None, details: dict[str, Any] | None = None) -> dict[str, Any]:
        """Something about the present step, for whoever reads the history."""
        *before, last = self.row["steps"]
        added = {**last["details"], **(details or {}), **({"trouble": trouble} if trouble else {})}
        return {"steps": [*before, {**last, "details": added}]}

    def _entry(self, step: Step, why: str, *, outcome: str | None = None) -> dict[str, Any]:
        now = self._now().isoformat()
        is_act = step in ACTS and outcome is None
        ended_at = now if outcome else None
        return {
            "step": step,
            "why": why,
            "at": now,
            "ended_at": ended_at,
            "outcome": outcome,
            "is_act": is_act,
            "details": {},
        }

    def _steps(self, ended: str | None) -> list[dict[str, Any]]:
        """The steps so far, the last of them ended with that word if it is under way."""
        steps: list[dict[str, Any]] = list(self.row["steps"])
        if ended and steps and steps[-1]["outcome"] is None:
            steps[-1] = {**steps[-1], "outcome": ended, "ended_at": self._now().isoformat()}
        return steps

    # --------------------------------------------------------------------------------------------------- written down

    def _kept(self, found: Next) -> float | None:
        row, token = self.row, self.row["claim_token"]
        with db.session([self.tenant_id]) as s:
            if not Repair.save(s, self.tenant_id, row["id"], token, found.changes, wait=found.wait or 0.0):
                _log.warning("claim_lost", **self._names())
                return None
            rows = [Event.row(kind, self.tenant_id, self.channel_id, None, says) for kind, says in found.events]
            Event.append(s, rows)
        for kind, says in found.events:
            told = {name: says[name] for name in ("step", "why", "outcome", "seconds") if name in says}
            _log.info(kind, **self._names(), **told)
        return found.wait

    def _is_still_ours(self) -> bool:
        """Whether the claim still stands: this process may have been asleep for a while."""
        with db.session([self.tenant_id]) as s:
            given = {"tenant_id": self.tenant_id, "id": self.row["id"], "token": self.row["claim_token"]}
            return s.execute(_IS_OURS, given).first() is not None

    def _observed(self) -> float:
        return float(self.row["config"].get("observe_seconds", _OBSERVED))

    def _tried(self) -> list[str]:
        return list(dict.fromkeys(one["step"] for one in self.row["steps"] if one["step"] in ACTS))

    def _glance(self) -> float:
        return max(0.1, self._observed() / 8)

    def _now(self) -> datetime:
        """By the database's clock."""
        now: datetime = self.row["now"] + timedelta(seconds=time.monotonic() - self._began)
        return now

    def _age(self, at: datetime) -> float:
        return (self._now() - at).total_seconds()

    def _says(self, **more: Any) -> dict[str, Any]:
        return {"channel": str(self.channel_id), "repair": str(self.row["id"]), **more}

    def _names(self) -> dict[str, str]:
        ids = {name: str(self.row[name]) for name in ("tenant_id", "channel_id")}
        return {**ids, "repair_id": str(self.row["id"])}


_IS_OURS = text("""
    SELECT 1 FROM repair WHERE tenant_id = :tenant_id AND id = :id AND claim_token = :token AND next_at > now()
""")


def keep_creds(name: str, config: dict[str, Any], channel_id: UUID, sealed: bytes | None, own_id: str | None) -> None:
    """Keep a copy of a well session's credentials, where the channel allows to put them back. Trouble is logged."""
    if config.get("may_restore_creds") is not True or config.get("auth") is None:
        return
    try:
        store = authstore.store(config, unseal(channel_id, sealed) if sealed else {}, own_id)
        if store is not None and store.keep_creds():
            note(name, "a copy of the session's credentials was kept")
    except (StoreFault, Misconfigured) as error:
        _log.warning("creds_not_kept", channel_id=str(channel_id), error=str(error))


def note(name: str, message: str) -> None:
    """A line for `SESSION_LOG`, as the old script wrote them: `[time] message`."""
    path = settings().session_log
    if not path:
        return
    line = f"[{datetime.now(UTC).isoformat(timespec='seconds')}] {name}: {message}\n"
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        _log.warning("session_log_not_written", error=type(error).__name__)
