"""What a repair would do now, for whoever asks by hand. Nothing is touched. Not a queue, hence the underscore."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from uuid import UUID

from sqlalchemy import RowMapping, text
from sqlalchemy.orm import Session

from models import Repair, RepairPause, SessionError
from models.repair import Phase, Step
from models.session_error import Tally
from pombal import db
from pombal.errors import Misconfigured, Permanent, Rejected
from pombal.settings import settings
from providers.authstore import StoreFault
from providers.gateway import Gateway
from providers.instance import InstanceFault
from workers import _ladder
from workers._patient import Patient, Row, host_of
from workers._plan import LASTING, Plan, beyond_repair, planned

_HOW = {
    Step.CONTACT_REFRESH: "make fresh sessions with the affected contacts",
    Step.RESTART: "close the socket and open it again, credentials kept",
    Step.DROP_KEYS: "close the socket, back up and drop derived keys, open it again",
    Step.RESTORE_CREDS: "close the socket, put back the kept credentials of the same pairing, open it again",
}


# --------------------------------------------------------------------------------------- what one by hand begins with


def former(s: Session, tenant_id: UUID, channel_id: UUID) -> RowMapping | None:
    """The incident that is not closed, which one by hand takes the place of, unless somebody is in the middle of a step
    of it (`is_busy`)."""
    return s.execute(_FORMER, {"tenant_id": tenant_id, "channel_id": channel_id}).mappings().first()


def counted(s: Session, tenant_id: UUID, channel_id: UUID, before: RowMapping | None) -> tuple[Tally, datetime]:
    """The errors of the last windows, and since when a repair by hand counts: from the first of them on, or from where
    the incident before it did."""
    tally = SessionError.tally(s, tenant_id, channel_id, settings().require_error_window())
    since: datetime = tally.since or s.execute(_NOW).scalar_one()
    return tally, min(since, before["since"]) if before is not None else since


# ------------------------------------------------------------------------------------------------------------ foretold


def asked(row: Row) -> str:
    """What its gateway says of a session now, in a few words; `row` has a channel's columns."""

    async def look(gateway: Gateway) -> str:
        await gateway.health()
        seen = await gateway.look()
        return f"{seen.state} ({seen.raw})" if seen.raw else seen.state

    try:
        return _imagined(row).ask(look)
    except InstanceFault as fault:
        return f"{fault.code}: {fault.text}"
    except (Misconfigured, Permanent, Rejected) as error:
        return f"misconfigured: {error}"


def foretold(row: Row, wanted: Step | None) -> list[str]:
    """What a repair of this session, begun by hand now, would do, and why: a line each. The step that would be made
    comes without an `else`; what may follow it is told as far as it is known by now."""
    tenant_id, channel_id = row["tenant_id"], row["id"]
    with db.session([tenant_id]) as s:
        SessionError.heal(s, tenant_id, channel_id)
        before = former(s, tenant_id, channel_id)
        tally, since = counted(s, tenant_id, channel_id, before)
        is_paused = RepairPause.holds(s, channel_id) is not None
        made = Repair.lately(s, tenant_id, channel_id).steps
        has_wish = s.execute(_WISH, {"tenant_id": tenant_id, "channel_id": channel_id}).first() is not None
        now: datetime = s.execute(_NOW).scalar_one()
    patient = _imagined(row, wanted, since)
    mode = settings().session_fixer
    lines = [f"nothing, since POMBAL_SESSION_FIXER is {mode}; else:"] if mode != "repair" else []
    lines += ["nothing, since repairs are paused; else:"] if is_paused else []
    if before is not None and before["is_busy"]:
        return [*lines, f"nothing: it is in the middle of a step ({before['step']}), which is finished first"]
    if wanted is None and before is None and not tally.errors:
        return [*lines, "nothing: no error counts"]
    if made:
        lines.append(
            f"{made} step{'s were' if made > 1 else ' was'} made in the last day, which hinders nothing by hand"
        )
    if has_wish:
        lines.append("waits first: somebody is starting or ending the session")
    if wanted is None and patient.read_until() < now:
        lines.append("waits first: until what came in before is read")
    try:
        return [*lines, *patient.ask(_tell(patient, wanted))]
    except StoreFault as fault:
        return [*lines, f"waits: its keys cannot be reached: {fault.text}"]
    except InstanceFault as fault:
        return [*lines, f"waits for the gateway: {fault.text}"]
    except (Misconfigured, Permanent, Rejected) as error:
        return [*lines, f"nothing: {error}"]


def _tell(patient: Patient, wanted: Step | None) -> Callable[[Gateway], Awaitable[list[str]]]:
    """As a repair decides: what is asked for can be made at all, then the session is not beyond repair."""

    async def tell(gateway: Gateway) -> list[str]:
        if wanted is not None and (lacks := patient.means(gateway).lacks(wanted)):
            return ["asked for by hand", f"{wanted}: no, {lacks}"]
        if refused := await beyond_repair(patient, gateway):
            return [f"ask a person: {refused}"]
        if wanted is not None:
            return ["asked for by hand", *_told(patient, gateway, (wanted,))]
        tally = patient.tally()
        if not tally.errors:
            return ["nothing: no error counts any more"]
        steps, why = _ladder.path(tally, settings().threshold_errors)
        return [why, *_told(patient, gateway, steps, is_of_groups=_ladder.is_of_groups(tally))]

    return tell


def _told(patient: Patient, gateway: Gateway, steps: Sequence[Step], *, is_of_groups: bool = False) -> list[str]:
    """A line for each of these steps. Raises `StoreFault` that waiting mends."""
    lines: list[str] = []
    or_else = ""  # before what is made only if what stands above did not help
    for step in steps:
        if step == Step.PERSON:
            lines.append(f"{or_else}ask a person")
            continue
        plan = _possible(patient, step, gateway, is_of_groups=is_of_groups)
        if plan.step == Step.PERSON:
            return [*lines, f"{or_else}ask a person: {plan.why}"]
        if plan.step != step:  # what comes after that one depends on what it leaves
            return [*lines, plan.why, *_told(patient, gateway, (plan.step,))]
        if plan.lacks is not None:
            lines.append(f"{step}: no, {plan.lacks}")
            continue
        lines.append(f"{or_else}{step}: {_HOW[step]}{_amount(plan)}")
        or_else = "else "
    return lines


def _possible(patient: Patient, step: Step, gateway: Gateway, *, is_of_groups: bool) -> Plan:
    """As `planned`, of a step that the gateway or the channel may not allow, or whose keys are out of reach."""
    lacks = patient.means(gateway).lacks(step)
    if lacks is not None:
        return Plan(step, lacks=lacks)
    try:
        return planned(patient, step, gateway, is_of_groups=is_of_groups)
    except StoreFault as fault:
        if fault.code not in LASTING:
            raise
        return Plan(step, lacks=f"its keys cannot be reached: {fault.text}")


def _amount(plan: Plan) -> str:
    if plan.names is None:
        return ""
    one, many = ("contact", "contacts") if plan.phase == Phase.ACTING else ("entry", "entries")
    return f" ({len(plan.names)} {one if len(plan.names) == 1 else many})"


def _imagined(row: Row, wanted: Step | None = None, since: datetime | None = None) -> Patient:
    """Of the incident that would be opened, to ask with."""
    incident = {"channel_id": row["id"], "host": host_of(row["config"]), "since": since, "wanted_step": wanted}
    return Patient({**row, **incident})


_NOW = text("SELECT now()")

_FORMER = text("""
    SELECT id, step, since, extract(epoch FROM now() - opened_at)::float8 AS seconds,
        phase IN ('stopping', 'stopped', 'acting', 'starting') OR (claim_token IS NOT NULL AND next_at > now())
            AS is_busy
    FROM repair WHERE tenant_id = :tenant_id AND channel_id = :channel_id AND state <> 'closed'
""")

_WISH = text("SELECT 1 FROM session WHERE tenant_id = :tenant_id AND channel_id = :channel_id AND wish IS NOT NULL")
