"""Sessions that break in every way the sandbox knows, all at once, under a whole fleet: each is healed by the step that
fits its class and by no more destructive one, and none is left stopped, whoever is killed meanwhile."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pombal.supervisor import LINUX
from sandbox import client
from tests.chaos.fleet import Fleet, until

pytestmark = pytest.mark.skipif(not LINUX, reason="processes are found through /proc")

KEYS = {"may_refresh_contacts": True, "may_drop_keys": True, "may_restore_creds": True}
REFRESH = {"refresh_contact": "POST /whatsapp/{session}/refresh/{jid}"}
QUICK = {"observe_seconds": 3, "cool_down_seconds": 0}


class Case(NamedTuple):
    """`acts`: the steps that are made, in their order; `ends`: how the incident does."""

    name: str
    dialect: str
    storm: str
    acts: tuple[str, ...]
    ends: str
    paths: dict[str, str] | None = None
    has_keys: bool = True


CASES = (
    Case("retry", "whaticket", "retry", (), "none or healed"),  # sooner than they are counted, or while observed
    Case("prekey", "whaticket", "prekey", ("restart",), "repaired"),
    Case("prekey-log", "evolution", "prekey", ("restart",), "repaired", has_keys=False),  # known from its log alone
    Case("ratchet", "whaticket", "ratchet", ("contact_refresh",), "repaired", paths=REFRESH),
    Case("ratchet-files", "whaticket", "ratchet", ("contact_refresh",), "repaired"),
    Case("derived", "whaticket", "derived", ("restart", "drop_keys"), "repaired"),
    Case("group", "whaticket", "sender_key", ("drop_keys",), "repaired"),
    Case(
        "identity", "whaticket", "identity", (), "waiting"
    ),  # its credentials are whole: which are right, nobody knows
    Case("version", "whaticket", "version", (), "waiting"),
    Case("twin", "whaticket", "twin", (), "waiting"),
    Case("logged-out", "whaticket", "logged_out", (), "waiting"),
    Case("benign", "whaticket", "duplicate", (), "none"),
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    data = tmp_path_factory.mktemp("chaos") / "repairs"
    metrics = str(data.with_name("repair-metrics"))
    with Fleet(data, "--procs", "sandbox,web,worker,fixer,clock", PROMETHEUS_MULTIPROC_DIR=metrics) as fleet:
        yield fleet.start()


class Patient(NamedTuple):
    """A channel and its session at a gateway of its own."""

    channel_id: str
    gateway: str
    folder: Path


@pytest.fixture
def sandbox(fleet: Fleet) -> str:
    return str(fleet.demo["sandbox"]["baileys"])


def a_patient(fleet: Fleet, sandbox: str, name: str, dialect: str, *, has_keys: bool, **config: Any) -> Patient:
    session = "26"
    root, gateway_log = fleet.data / "gateways" / name, fleet.data / "gateways" / f"{name}.log"
    more = {"paths": config["paths"]} if "paths" in config else {}
    client.baileys_add(sandbox, name, dialect, api_key="key", root=str(root), log=str(gateway_log), **more)
    given = {"gateway": dialect, "host": f"{sandbox}/baileys/{name}", "session": session, "api_key": "key", **config}
    auth = {"auth": {"kind": "files", "folder": str(root)}, **KEYS} if has_keys else {}
    tenant = fleet.demo["tenants"][0]["slug"]
    words = ("channel", "create", tenant, "baileys", "--name", name, "--config", json.dumps(given | auth), "--json")
    channel = json.loads(fleet.run(*words))
    query = "UPDATE channel SET config = config || %s::jsonb WHERE id = %s RETURNING 1"
    fleet.rows(query, json.dumps(QUICK), channel["id"])
    url = f"{fleet.url}{channel['webhook']}" if channel["webhook"].startswith("/") else channel["webhook"]
    made = client.baileys_add_session(sandbox, name, session, webhook_url=url, contacts=6)
    if dialect == "evolution":
        fleet.join("follower", "session", "follow", str(gateway_log), "--channel", f"{tenant}/{name}", "--from-start")
    return Patient(channel["id"], name, Path(made["folder"]))


def incident(fleet: Fleet, patient: Patient) -> dict[str, Any] | None:
    query = """
        SELECT state, outcome, steps, says, step, phase FROM repair WHERE channel_id = %s
        ORDER BY opened_at DESC LIMIT 1
    """
    found = fleet.rows(query, patient.channel_id)
    return dict(zip(("state", "outcome", "steps", "says", "step", "phase"), found[0], strict=True)) if found else None


def ended(fleet: Fleet, patient: Patient) -> str | None:
    """How its incident did, once it has: an outcome, or `waiting`."""
    told = incident(fleet, patient)
    if told is None or told["state"] == "open":
        return None
    return str(told["outcome"] or told["state"])


def acts(told: dict[str, Any] | None) -> tuple[str, ...]:
    return tuple(one["step"] for one in (told or {"steps": []})["steps"] if one["is_act"])


def session_of(sandbox: str, patient: Patient) -> dict[str, Any]:
    (gateway,) = [one for one in client.baileys_gateways(sandbox)["gateways"] if one["name"] == patient.gateway]
    session: dict[str, Any] = gateway["sessions"][0]
    return session


def storm(fleet: Fleet, sandbox: str, patient: Patient, case: Case) -> int:
    """Let it break, as its class does; the storm's id."""
    session = str(session_of(sandbox, patient)["session"])
    if case.storm in ("version", "twin", "logged_out"):  # its connection is lost in the middle of a storm
        for n in range(8):
            from_ = f"55119444411{n:02}"
            client.baileys_say(sandbox, patient.gateway, session, from_=from_, stub="Invalid PreKey ID")
        until(lambda: incident(fleet, patient), "it has an incident", pause=0.1)
    plan = {"then_every": 0} if case.storm == "retry" else {}
    return int(client.baileys_storm(sandbox, patient.gateway, session, case.storm, **plan)["id"])


def test_each_class_is_healed_by_its_step_and_by_no_harder_one(fleet: Fleet, sandbox: str) -> None:
    patients = {
        case.name: a_patient(
            fleet,
            sandbox,
            case.name,
            case.dialect,
            has_keys=case.has_keys,
            **({"paths": case.paths} if case.paths else {}),
        )
        for case in CASES
    }
    storms = {case.name: storm(fleet, sandbox, patients[case.name], case) for case in CASES}

    def open_ones() -> list[str]:
        return [case.name for case in CASES if not is_over(case)]

    def is_over(case: Case) -> bool:
        patient = patients[case.name]
        if case.ends == "none":
            return True
        if case.ends == "none or healed" and incident(fleet, patient) is None:
            told = client.baileys_storm_progress(sandbox, storms[case.name])
            return 0 < len(told["failed"]) <= len(told["healed"])
        return ended(fleet, patient) is not None

    try:
        until(lambda: not open_ones(), "each incident has ended", 240, pause=0.5)
    except AssertionError:
        left = {name: incident(fleet, patients[name]) for name in open_ones()}
        raise AssertionError(f"still open: {left}") from None

    found = {name: (acts(incident(fleet, one)), ended(fleet, one) or "none") for name, one in patients.items()}
    assert found.pop("retry") in [((), "none"), ((), "healed")]
    assert found == {case.name: (case.acts, case.ends) for case in CASES if case.name != "retry"}
    touches = client.baileys_touches(sandbox)["touches"]
    assert [one for one in touches if one["kind"] == "touched_while_open"] == []
    touched = {one["gateway"] for one in touches if one["what"] != "added"}
    assert touched <= {"ratchet-files", "derived", "group"}
    for case in CASES:
        patient = patients[case.name]
        if case.ends != "waiting":
            assert session_of(sandbox, patient)["state"] == "open", case.name
            assert (patient.folder / "creds.json").stat().st_size > 0


@pytest.mark.parametrize("kills", [3])
def test_a_fixer_that_is_killed_again_and_again_leaves_a_started_session(
    fleet: Fleet, sandbox: str, kills: int
) -> None:
    patient = a_patient(fleet, sandbox, "killed", "whaticket", has_keys=True)
    client.baileys_habits(sandbox, "killed", "26", slow_stop=1, slow_start=1)
    client.baileys_storm(sandbox, "killed", "26", "derived")
    for place in range(kills):
        wanted = ("stopping", "starting", "stopping")[place % 3]
        step = "restart" if place < 2 else "drop_keys"

        def is_there(wanted: str = wanted, step: str = step) -> bool:
            told = incident(fleet, patient)
            return told is not None and (told["step"], told["phase"]) == (step, wanted)

        until(is_there, f"{step} is {wanted}", 120, pause=0.02)
        fleet.kill("fixer")
        fleet.rows("UPDATE repair SET next_at = now() WHERE channel_id = %s RETURNING 1", patient.channel_id)

    until(lambda: ended(fleet, patient) is not None, "the incident has ended", 120, pause=0.5)

    told = incident(fleet, patient)
    assert acts(told) == ("restart", "drop_keys"), told
    assert ended(fleet, patient) == "repaired", told
    assert session_of(sandbox, patient)["state"] == "open"
    touches = client.baileys_touches(sandbox, gateway="killed")["touches"]
    assert [one for one in touches if one["kind"] == "touched_while_open"] == []
    assert fleet.count("SELECT count(*) FROM repair WHERE channel_id = %s", patient.channel_id) == 1
