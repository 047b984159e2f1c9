"""The looks of the fixer at all sessions, what it tells whoever watches, and gateways that hang (F4)."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select

from models import Channel, Lease, Repair, RepairPause, SessionEnd, SessionError, SessionLook, Tenant
from models.repair import Step
from pombal import db, metrics
from pombal.broker import HardenedBroker, broker
from pombal.errors import Permanent
from pombal.settings import settings
from providers.baileys import Baileys as Session
from sandbox import client
from tests.factories import a_tenant, all_of, superuser
from tests.repairs import (
    JIDS,
    REFRESH,
    a_session,
    arrive,
    done,
    fail,
    incident,
    incidents,
    nobody_else,
    tree,
    walk,
    with_keys,
)
from tests.sandbox.baileys_servers import Baileys
from tests.web.test_health import numbers, seen_from
from tests.workers.tools import together, until
from workers.session_fixer import look_at_all, session_fixer_tick, session_look


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, queues: None) -> Iterator[pytest.MonkeyPatch]:
    """Whose changes are settings; gateways on this machine may be reached."""
    monkeypatch.setenv("MEDIA_ALLOWED_NETWORKS", "127.0.0.0/8")
    nobody_else()
    yield monkeypatch
    monkeypatch.undo()
    settings.cache_clear()


def jobs() -> list[tuple[str, list[str]]]:
    """What waits for the fixer: actor and arguments."""
    assert isinstance(broker, HardenedBroker)
    found = broker.client.hvals(f"{broker.namespace}:session_fixer.msgs")
    return sorted((job["actor_name"], job["args"]) for job in map(json.loads, found))


def looks_at(*channels: Channel) -> list[tuple[str, list[str]]]:
    return sorted(("session_look", [str(one.tenant_id), str(one.id)]) for one in channels)


def passes(minutes: float) -> None:
    """The last round was as long ago, and this minute is another one."""
    with superuser() as connection:
        connection.execute("DELETE FROM tick")
        connection.execute(
            "UPDATE lease SET done_at = done_at - make_interval(secs => %(s)s),"
            " until = until - make_interval(secs => %(s)s) WHERE name = 'session_fixer'",
            {"s": minutes * 60},
        )


def rounds() -> int:
    """How many rounds the jobs are of, each of which has one for every session."""
    (count,) = {jobs().count(one) for one in jobs()} or {0}
    return count


# ------------------------------------------------------------------------------------------------------- at all of them


def test_every_session_is_looked_at_whoever_owns_it(baileys: Baileys, tenant: Tenant) -> None:
    ours, other = a_session(baileys, tenant), a_session(baileys, tenant, session="27")
    theirs = a_session(baileys, a_tenant(), session="28")
    of_another_kind = a_session(baileys, tenant, session="29")
    with superuser() as connection:
        connection.execute("UPDATE channel SET kind = 'stub' WHERE id = %s", [of_another_kind.id])

    session_fixer_tick.fn()

    assert jobs() == looks_at(ours, other, theirs)


def test_a_round_is_due_once_per_interval(baileys: Baileys, tenant: Tenant) -> None:
    a_session(baileys, tenant)
    a_session(baileys, tenant, session="27")
    session_fixer_tick.fn()
    session_fixer_tick.fn()
    assert rounds() == 1

    for _ in range(9):
        passes(1)
        session_fixer_tick.fn()
    assert rounds() == 1

    passes(1)
    session_fixer_tick.fn()
    assert rounds() == 2


def test_the_interval_is_a_setting(baileys: Baileys, tenant: Tenant, environment: pytest.MonkeyPatch) -> None:
    a_session(baileys, tenant)
    environment.setenv("CHECK_INTERVAL", "2m")
    settings.cache_clear()

    for _ in range(5):  # at 0, 1, 2, 3 and 4 minutes
        session_fixer_tick.fn()
        passes(1)

    assert rounds() == 3


def test_several_processes_make_one_round(baileys: Baileys, tenant: Tenant) -> None:
    a_session(baileys, tenant)
    a_session(baileys, tenant, session="27")
    together(*[session_fixer_tick.fn] * 6)
    assert rounds() == 1

    passes(10)
    together(*[session_fixer_tick.fn] * 6)
    assert rounds() == 2


def test_a_round_that_another_process_is_making_still_is_not_begun_again(baileys: Baileys, tenant: Tenant) -> None:
    a_session(baileys, tenant)
    with db.session() as s:
        assert Lease.take(s, "session_fixer", uuid4(), timedelta(minutes=10))

    for _ in range(9):  # it never says that it is done: it has died
        session_fixer_tick.fn()
        passes(1)
    assert jobs() == []

    passes(1)
    session_fixer_tick.fn()
    assert rounds() == 1


def test_a_round_that_failed_does_not_count_as_one(baileys: Baileys, tenant: Tenant) -> None:
    a_session(baileys, tenant)
    with superuser() as connection:
        connection.execute("ALTER TABLE session_error RENAME TO session_error_away")
    try:
        with pytest.raises(Exception, match="session_error"):
            session_fixer_tick.fn()
    finally:
        with superuser() as connection:
            connection.execute("ALTER TABLE session_error_away RENAME TO session_error")
    assert jobs() == []

    passes(1)
    session_fixer_tick.fn()
    assert jobs() == []  # not every minute
    passes(10)
    session_fixer_tick.fn()
    assert rounds() == 1


def test_old_errors_are_forgotten_at_a_round(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    fail(channel, count=2, ids=["OLD", "NEW"])
    with superuser() as connection:
        connection.execute("UPDATE session_error SET at = at - interval '31 days' WHERE message_id = 'OLD'")

    assert look_at_all() == 1

    with db.session([tenant.id]) as s:
        query = select(SessionError.message_id).where(SessionError.channel_id == channel.id)
        assert s.scalars(query).all() == ["NEW"]


# ----------------------------------------------------------------------------------------------------------- at one


def look(channel: Channel) -> str:
    """The verdict of a look."""
    session_look.fn(str(channel.tenant_id), str(channel.id))
    with db.session([channel.tenant_id]) as s:
        return s.get_one(SessionLook, (channel.tenant_id, channel.id)).verdict


def stands(channel: Channel, **columns: Any) -> None:
    with superuser() as connection:
        for name, value in columns.items():
            connection.execute(f"UPDATE channel SET {name} = %s WHERE id = %s", [value, channel.id])  # noqa: S608 - ours


def broken_off(channel: Channel, code: int) -> None:
    """Its connection ended with this code just now."""
    end = {"tenant_id": channel.tenant_id, "channel_id": channel.id, "code": code, "source": "webhook"}
    with db.session([channel.tenant_id]) as s:
        SessionEnd.note(s, [{**end, "at": datetime.now(UTC)}])


@pytest.mark.parametrize(
    ("columns", "verdict"),
    [
        ({"status": "connected"}, "well"),
        ({"status": "connected", "silent_since": datetime(2026, 3, 1, tzinfo=UTC)}, "silent"),
        ({"status": "disconnected"}, "disconnected"),
        ({"status": None}, "unknown"),
        ({"status": "connected", "unknown_reason": "refused"}, "unknown"),
    ],
)
def test_a_look_says_how_a_session_stands(
    baileys: Baileys, tenant: Tenant, columns: dict[str, Any], verdict: str
) -> None:
    channel = a_session(baileys, tenant)
    stands(channel, **columns)

    assert look(channel) == verdict
    assert incidents() == 0
    assert jobs() == []


def test_a_look_opens_the_incident_that_nobody_was_rung_for(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    stands(channel, status="connected")
    fail(channel, count=5)
    assert look(channel) == "well"

    fail(channel)

    assert look(channel) == "errors"
    assert incidents() == 1
    assert jobs() == [("session_fixer", [str(tenant.id), str(channel.id)])]
    assert look(channel) == "in_repair"
    assert incidents() == 1


def test_a_look_sees_who_waits_for_a_person(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    stands(channel, status="connected")
    broken_off(channel, 440)
    assert look(channel) == "needs_a_person"
    assert incidents() == 0

    fail(channel)
    walk(channel, state="waiting")

    assert look(channel) == "waits_for_a_person"


def test_looks_are_counted(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)

    for _ in range(3):
        look(channel)

    with db.session([tenant.id]) as s:
        assert s.get_one(SessionLook, (tenant.id, channel.id)).times == 3


def test_a_session_that_is_gone_by_then_is_nobodys(tenant: Tenant) -> None:
    session_look.fn(str(tenant.id), str(uuid4()))
    with pytest.raises(Permanent):
        session_look.fn(str(tenant.id), "26")


# ------------------------------------------------------------------------------------------------------------ numbers


def measured() -> Callable[..., float]:
    """What `/metrics` says now of a name and labels."""
    answer = seen_from("127.0.0.1", "/metrics")
    assert answer.status_code == 200
    found = numbers(answer.text)
    return lambda name, **labels: found[(name, tuple(sorted(labels.items())))]


def test_pauses_and_incidents_are_in_the_fleets_numbers(baileys: Baileys, tenant: Tenant) -> None:
    one, two, three = (a_session(baileys, tenant, session=name) for name in ("26", "27", "28"))
    now = measured()
    states, kinds = ("open", "stopped", "waiting"), ("all", "channel")
    assert [now("pombal_repair_incidents", state=state) for state in states] == [0, 0, 0]
    assert [now("pombal_repairs_paused", kind=kind) for kind in kinds] == [0, 0]

    for channel in (one, two, three):
        fail(channel)
    walk(one, step="observe", phase="watching")
    baileys.habits("g1", "27", stop_is_ignored=True)
    walk(two, step="restart", phase="stopping")
    broken_off(three, 440)
    walk(three, state="waiting")
    with db.session() as s:
        RepairPause.set(s, "all")
        RepairPause.set(s, str(one.id))
        RepairPause.set(s, str(two.id))

    now = measured()
    assert [now("pombal_repair_incidents", state=state) for state in states] == [1, 1, 1]
    assert [now("pombal_repairs_paused", kind=kind) for kind in kinds] == [1, 2]


def counted(step: str, outcome: str) -> float:
    return metrics.REGISTRY.get_sample_value("pombal_repairs_total", {"step": step, "outcome": outcome}) or 0


def test_each_step_is_counted_with_what_came_of_it(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, paths=REFRESH, **with_keys(baileys))
    steps = [
        ("observe", "begun"),
        ("observe", "not_healed"),
        ("contact_refresh", "begun"),
        ("contact_refresh", "failed"),
        ("restart", "begun"),
        ("restart", "repaired"),
    ]
    others = [("drop_keys", "begun"), ("person", "begun")]
    before = {one: counted(*one) for one in (*steps, *others)}
    fail(channel, contacts=2, cause="ratchet")
    walk(channel, step="contact_refresh", phase="watching")
    fail(channel, contacts=2, count=1, cause="ratchet")
    walk(channel, step="restart", phase="watching")
    arrive(channel)
    assert walk(channel, state="closed")["outcome"] == "repaired"

    more = {one: counted(*one) - before[one] for one in before}
    assert more == dict.fromkeys(steps, 1) | dict.fromkeys(others, 0)


def test_what_is_left_out_and_who_is_called_is_counted(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)  # which allows nothing but a restart
    steps = [("restart", "failed"), ("drop_keys", "skipped"), ("person", "begun")]
    before = {one: counted(*one) for one in steps}
    fail(channel)
    walk(channel, step="restart", phase="watching")
    fail(channel, count=1)
    walk(channel, state="waiting")

    assert {one: counted(*one) - before[one] for one in steps} == dict.fromkeys(steps, 1)


@pytest.mark.parametrize("mode", ["repair", "observe", "off"])
def test_the_emergency_stop_is_in_the_numbers(environment: pytest.MonkeyPatch, mode: str) -> None:
    environment.setenv("POMBAL_SESSION_FIXER", mode)
    settings.cache_clear()

    session_fixer_tick.fn()

    modes = ("repair", "observe", "off")
    shown = [metrics.REGISTRY.get_sample_value("pombal_session_fixer", {"state": one}) for one in modes]
    assert shown == [one == mode for one in modes]


# ------------------------------------------------------------------------------------------------------------- events


def events(tenant: Tenant) -> list[dict[str, Any]]:
    with db.session([tenant.id]) as s:
        return all_of(s, "SELECT type, channel_id, message_id, payload FROM event ORDER BY id")


def test_a_repair_is_told_from_its_beginning_to_its_end(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    fail(channel)
    broken_off(channel, 428)
    walk(channel, step="restart", phase="watching")
    fail(channel, count=1)
    walk(channel, step="drop_keys", phase="watching")
    arrive(channel)
    repair = walk(channel, state="closed")

    told = events(tenant)

    ours = {"channel": str(channel.id), "repair": str(repair["id"])}
    assert all(one["payload"].items() >= ours.items() for one in told)
    assert {(one["channel_id"], one["message_id"]) for one in told} == {(channel.id, None)}
    opened, *steps, finished = told
    why = "messages of 8 contacts cannot be decrypted (prekey)"
    assert opened["type"] == "incident_opened"
    assert opened["payload"] == ours | {
        "why": why,
        "at_once": 8,
        "errors": 8,
        "contacts": 8,
        "groups": 0,
        "causes": {"prekey": 8},
        "ends": {"428": 1},
    }
    assert [(one["type"], one["payload"]["step"]) for one in steps] == [
        ("repair_step", step) for step in ("observe", "restart", "drop_keys")
    ]
    assert steps[1]["payload"] == ours | {"step": "restart", "why": why}
    assert steps[2]["payload"]["why"] == f"{why}; before: restart"
    assert finished["type"] == "repair_finished"
    assert finished["payload"].pop("seconds") > 0
    assert finished["payload"] == ours | {"outcome": "repaired", "step": "drop_keys", "why": repair["says"]}


def test_whoever_is_called_is_told_in_an_event(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    broken_off(channel, 440)
    says = walk(channel, state="waiting")["says"]

    *_, last = events(tenant)

    assert last["type"] == "repair_step"
    assert (last["payload"]["step"], last["payload"]["why"]) == ("person", says)


def test_no_event_and_no_row_of_a_repair_tells_who_wrote_or_what(baileys: Baileys, tenant: Tenant) -> None:
    group = "120363000000000042@g.us"
    channel = a_session(baileys, tenant, paths=REFRESH, **with_keys(baileys))
    ids = [f"MESSAGE{n}" for n in range(8)]
    fail(channel, contacts=2, count=6, cause="ratchet", ids=ids)
    fail(channel, contacts=2, count=2, cause="ratchet", ids=ids[6:], group=group)
    walk(channel, step="contact_refresh", phase="watching")
    fail(channel, contacts=2, count=1, cause="ratchet", ids=["LATER"])
    walk(channel, step="restart", phase="watching")
    arrive(channel)
    walk(channel, state="closed")

    with superuser() as connection:
        (kept,) = connection.execute("SELECT to_jsonb(r)::text FROM repair AS r").fetchone() or ("",)
    told = json.dumps([one["payload"] for one in events(tenant)]) + kept

    assert "contact_refresh" in told
    secrets = [*(jid.partition("@")[0] for jid in JIDS), group.partition("@")[0], *ids, "LATER", "@s.whatsapp.net"]
    assert [one for one in secrets if one in told] == []


# ------------------------------------------------------------------------------------------------------ hangs (F4)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls to a gateway are given up soon."""
    monkeypatch.setattr(Session.__init__, "__kwdefaults__", {"deadline": 0.3})


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("place", ["health", "list"])
def test_nothing_is_touched_while_the_gateway_hangs(baileys: Baileys, tenant: Tenant, place: str) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    before = tree(baileys.root)
    fail(channel)
    walk(channel, step="observe", phase="watching")
    baileys.faults("hang_before", place=place)

    walk(channel, says="the gateway: the gateway gave no answer in time")

    assert done(baileys) == []
    assert tree(baileys.root) == before
    client.baileys_clear_faults(baileys.url)
    walk(channel, step="restart", phase="watching")


def by_hand(channel: Channel, step: Step) -> None:
    with db.session([channel.tenant_id]) as s:
        ids, now = (channel.tenant_id, channel.id), datetime.now(UTC)
        assert Repair.open(
            s, *ids, host="http://h", cause="none", since=now, evidence={}, wanted_step=step, is_by_hand=True
        )


@pytest.mark.usefixtures("impatient")
def test_no_file_is_touched_of_a_session_whose_calls_hang(
    baileys: Baileys, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers._repair._STOPS_WITHIN", 0.5)
    channel = a_session(baileys, tenant, **with_keys(baileys))
    before = tree(baileys.root)
    baileys.habits("g1", "26", hangs=True)
    by_hand(channel, Step.DROP_KEYS)

    told = walk(channel, step="drop_keys", phase="watching")

    assert told["steps"][-1]["details"] == {"trouble": "not_stopped"}
    assert set(done(baileys)) == {("26", "stop")}
    assert tree(baileys.root) == before
    assert baileys.state("g1", "26") == "open"


@pytest.mark.usefixtures("impatient")
def test_no_file_is_touched_before_it_is_known_that_the_socket_is_closed(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    baileys.habits("g1", "26", stop_is_ignored=True)
    by_hand(channel, Step.DROP_KEYS)
    walk(channel, step="drop_keys", phase="stopping")
    before = {name for name in tree(baileys.root) if "session-" in name}
    assert before
    baileys.habits("g1", "26", stop_is_ignored=False)
    baileys.end("g1", "26", 428, reconnects=False)  # it comes late, and the gateway hangs
    baileys.faults("hang_before", place="list")

    walk(channel, says="the gateway: the gateway gave no answer in time")

    assert incident(channel)["phase"] == "stopping"
    assert before <= set(tree(baileys.root))
    client.baileys_clear_faults(baileys.url)
    told = walk(channel, step="drop_keys", phase="watching")
    assert told["steps"][-1]["details"]["dropped"] == len(before)
    assert baileys.violations() == []
    until(lambda: baileys.state("g1", "26") == "open", "it is open again")
