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
from models.session_error import Tally
from pombal import db, log, metrics
from pombal.errors import Misconfigured, Permanent, Rejected
from pombal.middleware import is_store_trouble
from pombal.secrets import unseal
from pombal.settings import settings
from providers import authstore
from providers.authstore import StoreFault
from providers.gateway import Gateway, Look
from providers.instance import InstanceFault
from providers.undecrypted import Cause
from workers import _ladder
from workers._patient import Patient, Row
from workers._plan import LASTING, beyond_repair, planned
from workers.status_sync import ask_soon

_log = log.get()

MOST_STEPS = 3  # a day; then a person
_COOL_DOWN = 600.0  # seconds after a step, doubled by each that was made in the last day
_OBSERVED = 120.0  # seconds
_LONGEST_WATCH = 86_400.0  # without any message at all
_PROVEN = 3  # messages of affected contacts, without an error: no need to wait any longer
_LOOK_AGAIN = 2.0
_BEHIND = 30.0  # seconds that an inbox may always be behind
_RETRIES_TAKE = 30.0  # seconds in which a message may still arrive (baileys-sessions.md §3)
_MOST_REFUSALS = 3
_MOST_BOUNCES = 3
_ALARMS = (10, 100, 1000)
# Faults of a call that may have been heard all the same.
_MAY_BE_DONE = ("timeout", "unreachable", "provider_error", "unreadable")
_STOPS_WITHIN = 60.0
_STARTS_WITHIN = 60.0
_START_AGAIN = 5  # looks, ever longer apart: about a minute
_LOOK_WAITING = 600.0
_QUIET = 3600.0  # with messages, and hardly an error of anybody: nothing is left to wait for
_STORE_HELD = 180.0  # longer than any claim, and than any call of a store
_LATE_STOP = 300.0  # seconds in which a stop of ours may close a socket yet
_STAYS_CLOSED = 60.0  # seconds after which one that others closed does not open by itself
_MOST_WAITS = 8  # ever longer, four minutes in all, for an inbox that is always late
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
                return self.patient.ask(self._stopped)
            case Phase.ACTING:
                return self.patient.ask(self._acting)
            case Phase.STARTING:
                return self.patient.ask(self._starting)
            case Phase.WATCHING:
                return self._watching()

    # ------------------------------------------------------------------------------------------------ before a step

    def _planned(self) -> Next:
        """Decide whether this step may be begun now."""
        if self.step == Step.OBSERVE and self.row["is_by_hand"]:
            return self._to(Step(self.row["wanted_step"] or Step.CAUSE), "asked for by hand")
        if self.step == Step.OBSERVE:
            return self._begun(Phase.WATCHING, "most errors heal by themselves: a gateway asks for the message again")
        if over := self._is_over():
            return over
        if self.step == Step.PERSON:
            return self._to_a_person(self.row["says"] or "no step is left")
        if held := self._held():
            return self._later(held, 60.0, is_failure=False)
        if self.row["wanted_step"] is None and self._is_unread():
            return self._later("waits until what came in before is read")
        return self.patient.ask(self._cause if self.step == Step.CAUSE else self._may_act)

    def _is_unread(self) -> bool:
        """The end that no step cures, or the messages that arrived after all, may have come in since this step was
        planned, or while it cooled down. An inbox that is always a little late holds nothing up for ever."""
        since: datetime = self.row["phase_at"]
        if self.row["failures"] < _MOST_WAITS:
            since = max(since, self._now() - timedelta(seconds=_BEHIND))
        return self.patient.read_until() < since

    def _held(self) -> str | None:
        """Why nothing may be begun, if somebody does not want it."""
        mode = settings().session_fixer
        would = self.step.value if self.step in ACTS else "look for the cause"
        if mode != "repair":
            return f"POMBAL_SESSION_FIXER is {mode}: it would {would}"
        with db.session([self.tenant_id]) as s:
            scope = RepairPause.holds(s, self.channel_id)
        if scope:
            whose = "all repairs are" if scope == "all" else "this channel's repairs are"
            return f"{whose} paused: it would {would}"
        return "somebody is starting or ending the session" if self.row["has_wish"] else None

    async def _cause(self, gateway: Gateway) -> Next:
        """Rule out what no repair cures, then take the mildest step that fits; those that cannot be made are noted."""
        if refused := await beyond_repair(self.patient, gateway):
            return self._to_a_person(refused)
        tally = self.patient.tally()
        if not tally.errors:
            return self._closed(RepairOutcome.HEALED, "no error counts any more")
        choice = _ladder.choose(tally, settings().threshold_errors, self._tried(), self.patient.means(gateway))
        skipped = [self._entry(step, why, outcome="skipped") for step, why in choice.skipped]
        for step, _ in choice.skipped:
            metrics.repairs.labels(step=step, outcome="skipped").inc()
        # The scope and the reason that were chosen: more may fail, and more be said, before the step is made.
        evidence = {**self.row["evidence"], "is_of_groups": _ladder.is_of_groups(tally), "why": choice.why}
        return self._to(choice.step, choice.why, more=skipped, evidence=evidence)

    async def _may_act(self, gateway: Gateway) -> Next:
        """Whether this step may be made: not too soon, not too often, on a gateway and a session that are well."""
        by_hand = self.row["is_by_hand"]
        with db.session([self.tenant_id]) as s:
            made = Repair.lately(s, self.tenant_id, self.channel_id)
        if made.steps >= MOST_STEPS and not by_hand:
            return self._to_a_person(f"{made.steps} steps in a day did not help")
        cool_down = float(self.row["config"].get("cool_down_seconds", _COOL_DOWN)) * 2 ** max(0, made.steps - 1)
        if made.seconds_ago is not None and made.seconds_ago < cool_down and not by_hand:
            left = cool_down - made.seconds_ago
            until = (self._now() + timedelta(seconds=left)).strftime("%H:%M UTC")
            return self._later(
                f"cools down after the last step until {until}; next: {self.step}", left, is_failure=False
            )
        lacks = self.patient.means(gateway).lacks(self.step)
        if lacks is not None:  # it could when it was chosen, or it was asked for by hand
            return self._ended_with("skipped", lacks)
        if refused := await beyond_repair(self.patient, gateway):
            return self._to_a_person(refused)
        try:
            return self._chosen(gateway)
        except StoreFault as fault:
            if fault.code in LASTING:
                return self._ended_with("skipped", f"its keys cannot be reached: {fault.text}")
            return self._later(f"its keys cannot be reached: {fault.text}")

    def _chosen(self, gateway: Gateway) -> Next:
        """Begin the step, with what it works on."""
        # By hand it is all that the step is for.
        is_of_groups = bool(self.row["evidence"].get("is_of_groups")) and self.row["wanted_step"] is None
        is_weak = self.patient.tally().strong <= settings().threshold_errors and not self.row["is_by_hand"]
        plan = planned(self.patient, self.step, gateway, is_of_groups=is_of_groups, may_restore=not is_weak)
        if plan.out_of_reach is not None:
            _log.warning("repair_store_unknown", **self._names(), code=plan.out_of_reach)
        if plan.step == Step.PERSON:
            return self._to_a_person(plan.why)
        if plan.step != self.step:
            return self._to(plan.step, plan.why, evidence={**self.row["evidence"], "why": plan.why})
        if plan.lacks is not None:
            return self._ended_with("skipped", plan.lacks)
        return self._begun(plan.phase, self._why(), names=plan.names)

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
            return Next(self._in(Phase.STARTING) | self._told(trouble="not_stopped"), 0.0)
        return self._later("waits for the socket to be closed", _LOOK_AGAIN, is_failure=False)

    async def _stopped(self, gateway: Gateway) -> Next:
        """The socket is closed, still: do to its keys what the step is for, and start it in any case."""
        if self.step == Step.RESTART:
            return Next(self._in(Phase.STARTING), 0.0)
        if (await gateway.look()).state != "closed":  # somebody has started it, or it was long ago that we looked
            if self.row["has_wish"]:
                return Next(self._in(Phase.STARTING) | self._told(trouble="somebody_started_it"), 0.0)
            return Next({"phase": Phase.STOPPING}, 0.0)
        names, backup = self.row["names"] or [], str(self.row["id"])
        if not self._is_still_ours():
            return Next({}, 0.0)
        try:
            store = self.patient.store()
            if store is None:
                return Next(self._in(Phase.STARTING) | self._told(trouble="no_store"), 0.0)
            if self.step == Step.RESTORE_CREDS:
                for name in names:
                    store.restore(name, backup)
                details = {"restored": len(names)}
            else:
                details = {"dropped": store.drop(names, backup), "planned": len(names)}
        except StoreFault as fault:
            # Somebody whose claim ran out is at it still: nothing may be started meanwhile. But not for ever.
            if fault.code == "busy" and self._age(self.row["phase_at"]) < _STORE_HELD:
                return self._later("waits for the store of its keys")
            _log.error("repair_store_failed", **self._names(), code=fault.code)
            return Next(self._in(Phase.STARTING) | self._told(trouble=fault.code), 0.0)
        return Next(self._in(Phase.STARTING) | self._told(**details), 0.0)

    async def _acting(self, gateway: Gateway) -> Next:
        """What is done by the gateway itself, without the socket closed by us; one call in a turn."""
        if self.step == Step.RESTART:
            began = self._now()
            try:
                await gateway.restart()
            except InstanceFault as fault:
                if fault.code not in _MAY_BE_DONE:
                    return self._refused(fault)
                _log.warning("repair_restart_in_doubt", **self._names(), code=fault.code)
                began = self._now()  # the old socket may have lived on until now
            return Next(self._in(Phase.STARTING) | {"judged_from": began}, _LOOK_AGAIN)
        jid, *rest = self.row["names"]
        done = int(self.row["steps"][-1]["details"].get("refreshed", 0))
        try:
            await gateway.refresh_contact(jid)
            done += 1
        except InstanceFault as fault:
            if fault.is_transient or not (rest or done):
                return self._refused(fault)
            _log.warning("repair_contact_refused", **self._names(), code=fault.code)
        told = self._told(refreshed=done)
        if rest:
            return Next(self._in(Phase.ACTING) | told | {"names": rest}, 0.0)
        return Next(self._in(Phase.WATCHING) | told | {"names": None}, self._glance())

    def _refused(self, fault: InstanceFault) -> Next:
        """A gateway that does not do a step is asked a few times, and then the step has failed."""
        if self.row["failures"] < _MOST_REFUSALS:
            return self._later(f"the gateway: {fault.text}", fault.wait)
        return self._ended_with("failed", f"the gateway: {fault.text}")

    async def _starting(self, gateway: Gateway) -> Next:
        """Until it is open again; a session that asks for a QR code, or cannot be open, is a person's."""
        seen = await gateway.look()
        age, failures = self._age(self.row["phase_at"]), self.row["failures"]
        if seen.state == "open":
            ask_soon(self.tenant_id, self.channel_id)
            return Next(self._in(Phase.WATCHING), self._glance())
        if seen.state == "closed" and failures and (hopeless := self.patient.hopeless(is_open=False)):
            return self._to_a_person(hopeless)
        if seen.state == "qr":
            hopeless = self.patient.hopeless(is_open=False)  # the phone has ended the pairing, rather than our start
            why = "it asks for a QR code after the start: pair it again"
            return self._to_a_person(hopeless or why, asked_for_qr=not hopeless and not self._has_bounced())
        if seen.state == "unknown" and age > _STARTS_WITHIN:
            return Next(self._in(Phase.WATCHING), self._glance())  # its gateway does not tell; what arrives will
        # A start that is under way is given its time: every call could begin anew.
        if seen.state != "connecting" or failures % _START_AGAIN == _START_AGAIN - 1:
            await gateway.start()
        if seen.state == "closed" and self.step == Step.RESTART and self._trouble() == "not_stopped":
            # Its stop has come late, so it is made: from now on it is judged as one.
            late = self._later("waits for the socket to be open again")
            return late._replace(changes=late.changes | {"judged_from": self._now()} | self._told(trouble=None))
        if failures in _ALARMS:
            _log.error("repair_cannot_start", **self._names(), looks=failures)
            note(self.row["name"], "its socket does not open: the gateway needs a person")
        return self._later("waits for the socket to be open again")

    # ---------------------------------------------------------------------------------------------------- the proof

    def _watching(self) -> Next:
        """Judge by what arrives: errors, and messages that could be decrypted."""
        try:
            if self.step in ACTS and (back := self.patient.ask(self._is_closed_again)):
                return back
        except InstanceFault as fault:  # what arrives tells more than it could
            _log.debug("repair_look_failed", **self._names(), code=fault.code)
        if trouble := self._trouble():
            if trouble == "not_stopped" and self._may_close_yet():
                return Next({"says": "its socket was not closed in time, and may be yet"}, self._glance())
            healed = self._healed(self.row["judged_from"])  # by itself: whatever arrives is not this step's doing
            return healed or self._ended_with("failed", f"it could not be made ({trouble})")
        observed, most = self._observed(), settings().threshold_errors
        tally = self.patient.tally()
        is_weak = tally.strong <= most < tally.at_once
        after = self.row["judged_from"] or self.row["phase_at"]
        heard = self.patient.heard(after, grace=min(_RETRIES_TAKE, observed / 2), weak=is_weak)
        # What nobody has read yet may be the proof: it counts for how long was looked on, not how long was waited.
        age = (heard["read_until"] - self.row["phase_at"]).total_seconds()
        if self.step == Step.OBSERVE:
            return self._observing(tally, heard, age >= observed)
        if not heard["again"] and heard["errors"] <= most and not heard["fresh"]:
            flows = heard["decrypted"] or (heard["traffic"] and not heard["errors"])
            if heard["decrypted"] >= _PROVEN or (age >= observed and flows):
                return self._proven(heard)
        has_failed = heard["again"] or heard["errors"] > most or (heard["errors"] and not heard["decrypted"])
        if age >= observed and has_failed:
            return self._ended_with("failed", f"{heard['errors']} more messages could not be decrypted")
        if age < observed or heard["fresh"] or heard["errors"]:
            return self._goes_on(f"watches what came of {self.step}", heard)
        if age > _LONGEST_WATCH:
            return self._closed(RepairOutcome.UNPROVEN, "nobody has written since")
        return Next({"says": f"nobody has written since {self.step}: nothing tells whether it helped"}, observed)

    def _observing(self, tally: Tally, heard: RowMapping, is_long_enough: bool) -> Next:
        if tally.at_once <= settings().threshold_errors:
            return self._closed(RepairOutcome.HEALED, "the messages arrived after all")
        if not is_long_enough or (heard["fresh"] and not heard["errors"]):
            return self._goes_on("observes whether it heals by itself", heard)
        if not heard["errors"] and heard["decrypted"]:
            return self._closed(RepairOutcome.HEALED, "messages of the affected contacts can be decrypted again")
        if not heard["errors"] and tally.strong <= settings().threshold_errors:
            return self._closed(RepairOutcome.UNPROVEN, "no more lines of a log, and too few messages were named")
        return self._to(Step.CAUSE, "it did not heal by itself", ended="not_healed")

    def _goes_on(self, says: str, heard: RowMapping) -> Next:
        is_behind = self._age(heard["read_until"]) > _BEHIND
        why = ": what came in since is not read yet, the inbox or a follower of logs is behind" if is_behind else ""
        return Next({"says": says + why}, self._glance())

    async def _is_closed_again(self, gateway: Gateway) -> Next | None:
        """A stop of ours may come late: a session is never left without its socket by us, paused or not. But what a
        person closes, or what ends again and again, is theirs."""
        seen = await gateway.look()
        if seen.state == "open" and self._details().get("closed_at") is not None:
            return Next(self._told(closed_at=None), 0.0)
        if seen.state not in ("qr", "closed") or self.row["has_wish"]:
            return None
        # A refresh by the gateway has closed nothing.
        by_us = "refreshed" not in self._details()
        is_ours = by_us and self._may_close_yet()
        hopeless = self.patient.hopeless(is_open=False)
        if seen.state == "qr":
            asked = is_ours and not hopeless and not self._has_bounced()
            return self._to_a_person(hopeless or _ladder.SHUT["qr"], asked_for_qr=asked)
        if hopeless:
            return self._to_a_person(hopeless)
        if not is_ours:
            return self._closed_by_others()
        bounces = int(self._details().get("reopened", 0)) + 1
        if bounces > _MOST_BOUNCES:
            return self._to_a_person("its socket is closed again and again")
        return Next(self._in(Phase.STARTING) | self._told(reopened=bounces), 0.0)

    def _closed_by_others(self) -> Next:
        """It is a person's if it is closed at a second look, too: gateways begin anew by themselves."""
        pause = min(_STAYS_CLOSED, self._observed())
        first = self._details().get("closed_at")
        if first is None:
            return Next(self._told(closed_at=self._now().isoformat()) | {"says": "its socket is closed"}, pause)
        if self._age(datetime.fromisoformat(first)) < pause:
            return Next({}, pause)
        return self._to_a_person(_ladder.SHUT["closed"], ended="unproven")

    def _may_close_yet(self) -> bool:
        """By a stop of ours that comes late."""
        return self._age(self.row["phase_at"]) < _LATE_STOP

    def _trouble(self) -> str | None:
        """Why what this step is for could not be done."""
        found: str | None = self._details().get("trouble") if self.step in ACTS else None
        return found

    def _details(self) -> dict[str, Any]:
        """What is noted of the present step."""
        found: dict[str, Any] = self.row["steps"][-1]["details"]
        return found

    def _has_bounced(self) -> bool:
        return bool(self.row["steps"]) and "reopened" in self.row["steps"][-1]["details"]

    def _proven(self, heard: RowMapping) -> Next:
        if self.step == Step.RESTART:
            with db.session() as s:  # a restart kept the pairing: of all sessions of this gateway
                db.see_all(s)
                Repair.forget_qr_codes(s, self.row["host"])
        why = f"{heard['decrypted']} messages of the affected contacts and {heard['traffic']} in all could be decrypted"
        return self._closed(RepairOutcome.REPAIRED, why)

    def _is_over(self) -> Next | None:
        """Whether it healed while it waited for something, or for a person: no more errors lately, and messages of
        those who had some; after a long time, messages of anybody."""
        age, observed = self._age(self.row["phase_at"]), self._observed()
        is_begun_by_hand = self.row["is_by_hand"] and self.row["state"] == RepairState.OPEN
        if is_begun_by_hand or age < observed:
            return None
        after = max(self.row["phase_at"], self._now() - timedelta(seconds=max(observed, _LOOK_WAITING)))
        if over := self._healed(after):
            return over
        if self.row["state"] == RepairState.WAITING and age > _QUIET and self._is_quiet():
            why = "messages of others can be decrypted, and hardly any failed for long"
            return self._closed(RepairOutcome.HEALED, why)
        return None

    def _healed(self, after: datetime) -> Next | None:
        """Whether nothing failed since then, as far as anybody can know, and messages of those who had errors came."""
        heard = self.patient.heard(after, grace=0.0, weak=True)
        if heard["errors"] or heard["fresh"] or self._age(heard["read_until"]) > _BEHIND:
            return None
        has_named = any(cause != Cause.WEAK for cause in self.row["evidence"].get("causes", {}))
        if not (heard["decrypted"] if has_named else heard["traffic"]):
            return None
        return self._closed(RepairOutcome.HEALED, "messages of the affected contacts can be decrypted again")

    def _is_quiet(self) -> bool:
        """Those who had errors may never write again: then a new storm could not open an incident, for ever."""
        heard = self.patient.heard(self._now() - timedelta(seconds=_QUIET), grace=0.0, weak=True)
        is_well = heard["traffic"] and not heard["again"] and heard["errors"] <= settings().threshold_errors
        is_read = not heard["fresh"] and self._age(heard["read_until"]) <= _BEHIND
        return (
            bool(is_well and is_read)
            and self.row["channel_status"] != "disconnected"
            and not self.patient.hopeless(is_open=False)
            and not self._has_broken_creds()
        )

    def _has_broken_creds(self) -> bool:
        """Then it lives by what it has in memory, and somebody must know."""
        try:
            store = self.patient.store()
            if store is None:
                return False
            store.check()
            return store.creds_are_broken()
        except StoreFault as fault:
            _log.warning("repair_store_unknown", **self._names(), code=fault.code)
            return False

    def _waits(self) -> Next:
        """For a person; over when messages can be decrypted again, by whatever they did."""
        return self._is_over() or Next({}, min(_LOOK_WAITING, max(1.0, self._observed())))

    # ----------------------------------------------------------------------------------------------- what comes next

    def _begun(self, phase: Phase, why: str, names: list[str] | None = None) -> Next:
        entry = self._entry(self.step, why)
        event = ("repair_step", self._says(step=self.step, why=why))
        metrics.repairs.labels(step=self.step, outcome="begun").inc()
        note(self.row["name"], f"{self.step}: {why}")
        changes = self._in(phase) | {"steps": [*self.row["steps"], entry], "names": names, "says": None}
        return Next(changes, self._glance() if phase == Phase.WATCHING else 0.0, (event,))

    def _to(
        self,
        step: Step,
        why: str,
        *,
        ended: str | None = None,
        more: list[dict[str, Any]] | None = None,
        **columns: Any,
    ) -> Next:
        """On to a step; `ended`: what came of the one before."""
        steps = self._steps(ended) + (more or [])
        if ended:
            metrics.repairs.labels(step=self.step, outcome=ended).inc()
        now = self._now()
        changes = {"step": step, "step_at": now, "steps": steps, "says": why, "names": None, **columns}
        return Next(self._in(Phase.PLANNED) | changes, 0.0)

    def _ended_with(self, outcome: str, why: str) -> Next:
        """This step is over, and it did not help: the next one, or, of one asked for by hand, the end."""
        note(self.row["name"], f"{self.step}: {outcome}, {why}")
        if self.row["wanted_step"] is not None:
            return self._closed(RepairOutcome.UNREPAIRED, why, ended=outcome)
        if self.phase == Phase.PLANNED:  # it was never begun
            return self._to(Step.CAUSE, why, more=[self._entry(self.step, why, outcome=outcome)])
        return self._to(Step.CAUSE, why, ended=outcome)

    def _to_a_person(self, why: str, *, asked_for_qr: bool = False, ended: str | None = "failed") -> Next:
        """`ended`: what came of the step under way."""
        _log.error("repair_needs_a_person", **self._names(), why=why)
        note(self.row["name"], f"needs a person: {why}")
        ended = "asked_for_qr" if asked_for_qr else ended if self.phase != Phase.PLANNED else None
        if ended:
            metrics.repairs.labels(step=self.step, outcome=ended).inc()
        metrics.repairs.labels(step=Step.PERSON, outcome="begun").inc()
        changes = self._in(Phase.PLANNED) | {
            "state": RepairState.WAITING,
            "step": Step.PERSON,
            "step_at": self._now(),
            "steps": [*self._steps(ended), self._entry(Step.PERSON, why)],
            "says": why,
            "names": None,
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
            "names": None,
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
        wait = max(wait, backoff) if is_failure else wait
        if self.phase in MAY_BE_STOPPED:  # whatever a gateway wishes: its session may be closed meanwhile
            wait = min(wait, longest)
        return Next({"says": says, "failures": failures}, wait)

    def _in(self, phase: Phase) -> dict[str, Any]:
        now = self._now()
        changes: dict[str, Any] = {"phase": phase, "phase_at": now, "failures": 0}
        if phase == Phase.PLANNED:
            changes["judged_from"] = None
        elif phase in (Phase.STARTING, Phase.WATCHING) and self.row["judged_from"] is None:
            changes["judged_from"] = now
        return changes

    def _told(self, **details: Any) -> dict[str, Any]:
        """Something about the present step, for whoever reads the history."""
        *before, last = self.row["steps"]
        return {"steps": [*before, {**last, "details": {**last["details"], **details}}]}

    def _why(self) -> str:
        return str(self.row["evidence"].get("why", "asked for by hand"))

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
