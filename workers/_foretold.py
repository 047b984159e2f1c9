"""What a session's gateway says, and what a repair would do, for whoever asks by hand: nothing is touched. Not a queue,
hence the underscore."""

from collections.abc import Awaitable, Callable

from models import Repair, RepairPause
from models.repair import Step
from pombal import db
from pombal.errors import Misconfigured, Permanent, Rejected
from pombal.settings import settings
from providers.authstore import Store, StoreFault
from providers.gateway import Gateway
from providers.instance import InstanceFault
from workers import _ladder
from workers._patient import Patient, Row, host_of
from workers._repair import MOST_STEPS

_HOW = {
    Step.CONTACT_REFRESH: "make fresh sessions with the affected contacts",
    Step.RESTART: "close the socket and open it again, credentials kept",
    Step.DROP_KEYS: "close the socket, back up and drop derived keys, open it again",
    Step.RESTORE_CREDS: "close the socket, put back the kept credentials of the same pairing, open it again",
    Step.PERSON: "ask a person",
}


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
    """What a repair of this session would do now, step by step, and why: a line each."""
    patient = _imagined(row)
    lines = _forbidden(patient)
    if wanted is not None:
        steps: tuple[Step, ...] = (wanted,)
        why = "asked for by hand"
    else:
        tally = patient.tally()
        if not tally.errors:
            return [*lines, "nothing: no error counts"]
        steps, why = _ladder.path(tally, settings().threshold_errors)
    try:
        return [*lines, why, *patient.ask(_tell(patient, steps))]
    except StoreFault as fault:
        return [*lines, f"nothing: its keys cannot be reached: {fault.text}"]
    except InstanceFault as fault:
        return [*lines, f"nothing: {fault.text} ({fault.code})"]
    except (Misconfigured, Permanent, Rejected) as error:
        return [*lines, f"nothing: {error}"]


def _forbidden(patient: Patient) -> list[str]:
    mode = settings().session_fixer
    with db.session([patient.tenant_id]) as s:
        made = Repair.lately(s, patient.tenant_id, patient.channel_id)
        scope = RepairPause.holds(s, patient.channel_id)
    lines = [f"nothing, since POMBAL_SESSION_FIXER is {mode}; else:"] if mode != "repair" else []
    lines += ["nothing, since repairs are paused; else:"] if scope else []
    return [*lines, f"{made.steps} of the {MOST_STEPS} steps of a day were made"]


def _tell(patient: Patient, steps: tuple[Step, ...]) -> Callable[[Gateway], Awaitable[list[str]]]:
    async def tell(gateway: Gateway) -> list[str]:
        await gateway.health()
        seen = await gateway.look()
        if hopeless := patient.hopeless(is_open=seen.state == "open"):
            return [f"ask a person: {hopeless}"]
        means = patient.means(gateway)
        lines = []
        for step in steps:
            lacks = means.lacks(step)
            store = None if lacks or step == Step.PERSON else patient.store_for(step, gateway)
            names = f" ({_amount(patient, step, store)} entries)" if store is not None else ""
            lines.append(f"{step}: no, {lacks}" if lacks else f"{step}: {_HOW[step]}{names}")
        return lines

    return tell


def _amount(patient: Patient, step: Step, store: Store) -> int:
    return len(patient.names_for(step, store, is_of_groups=_ladder.is_of_groups(patient.tally())))


def _imagined(row: Row) -> Patient:
    """Of an incident that there is none of, to ask with."""
    incident = {"channel_id": row["id"], "host": host_of(row["config"]), "since": None, "wanted_step": None}
    return Patient({**row, **incident})
