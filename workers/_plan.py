"""What a step of a repair comes to, before it is made: for the repair, and for whoever asks what one would do
(`_foretold.py`). Nothing is touched. Not a queue, hence the underscore."""

from typing import NamedTuple

from models.repair import Phase, Step
from providers.authstore import Store, StoreFault
from providers.gateway import Gateway
from workers import _ladder
from workers._patient import Patient

LASTING = ("misconfigured", "refused", "missing", "no_access")  # faults of a store that waiting does not mend


class Plan(NamedTuple):
    """What a step comes to: what is made may be another (`step`, and `why`), or nothing (`lacks`). It works on `names`,
    entries of the store or contacts (None: on the session as a whole), and begins with `phase`. `out_of_reach`: the
    fault of a store that it can do without."""

    step: Step
    why: str = ""
    names: list[str] | None = None
    lacks: str | None = None
    phase: Phase = Phase.STOPPING
    out_of_reach: str | None = None


async def beyond_repair(patient: Patient, gateway: Gateway) -> str | None:
    """What a person has to do before anything can help; None where that is nothing. Raises `InstanceFault`, also when
    the gateway is not well."""
    await gateway.health()
    state = (await gateway.look()).state
    return patient.hopeless(is_open=state == "open") or _ladder.SHUT.get(state)


def planned(
    patient: Patient, step: Step, gateway: Gateway, *, is_of_groups: bool = False, may_restore: bool = True
) -> Plan:
    """What comes of this step, which can be made as far as the patient's means go. Raises `StoreFault`."""
    known, out_of_reach = _known_store(patient, step)
    if known is not None and step != Step.RESTORE_CREDS and known.creds_are_broken():
        # It lives by what it has in memory: whoever closes its socket now loses the pairing.
        can_restore = may_restore and patient.means(gateway).lacks(Step.RESTORE_CREDS) is None
        if can_restore and known.plan_restore() is not None:
            return Plan(Step.RESTORE_CREDS, "its stored credentials are broken")
        return Plan(Step.PERSON, "its stored credentials are broken: closing its socket would end the pairing")
    store = patient.store_for(step, gateway)
    if store is not None:
        names = patient.names_for(step, store, is_of_groups=is_of_groups)
        return Plan(step, names=names, lacks=None if names else "there is nothing that it could drop or put back")
    if step == Step.CONTACT_REFRESH:  # not of groups, nor of another device of our own
        jids = [jid for jid in patient.affected() if not jid.endswith("@g.us")]
        return Plan(step, names=jids, lacks=None if jids else "there is no contact to refresh", phase=Phase.ACTING)
    phase = Phase.ACTING if "restart" in gateway.abilities else Phase.STOPPING
    return Plan(step, phase=phase, out_of_reach=out_of_reach)


def _known_store(patient: Patient, step: Step) -> tuple[Store | None, str | None]:
    """The store of its keys, if it has one; or the fault for which it cannot be reached, where the step needs none.
    Raises `StoreFault` for others."""
    try:
        store = patient.store()
        if store is not None:
            store.check()
    except StoreFault as fault:
        if step != Step.RESTART or fault.code not in LASTING:
            raise
        return None, fault.code
    return store, None
