"""What a repair takes for a proof, and what a session's socket owes to it: from when a step is judged, by what, and
whose a socket is that closes afterwards."""

import asyncio
import fcntl
import os
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from models import Channel, Repair, SessionEnd, SessionError, Tenant
from models.repair import Step
from pombal import db
from pombal.settings import settings
from providers.instance import InstanceFault
from tests.factories import superuser
from tests.repairs import (
    JIDS,
    REFRESH,
    a_session,
    an_inbox_that_is_behind,
    arrive,
    done,
    fail,
    go_on,
    incident,
    nobody_else,
    paused,
    walk,
    with_keys,
)
from tests.sandbox.baileys_servers import Baileys
from tests.workers.tools import until
from workers._circuit import FILES, Circuit
from workers._patient import Patient, host_of
from workers.session_fixer import session_look

STRANGERS = JIDS[8:]
_NOW = text("SELECT clock_timestamp()")


@pytest.fixture(autouse=True)
def _alone(_near_gateways: None, queues: None) -> None:
    nobody_else()


def changed(channel: Channel, sets: str) -> None:
    with superuser() as connection:
        connection.execute(f"UPDATE repair SET {sets} WHERE channel_id = %s", [channel.id])  # noqa: S608 - ours


# -------------------------------------------------------------------------------------------------- from when it counts


def test_what_fails_before_the_open_socket_is_noticed_speaks_against_the_step(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    baileys.habits("g1", "26", slow_start=0.5)
    fail(channel)
    walk(channel, step="restart", phase="starting")
    fail(channel, contacts=4, count=4)  # what had waited is delivered at once
    walk(channel, step="restart", phase="watching")
    arrive(channel, jids=STRANGERS)

    told = walk(channel, step="drop_keys", phase="watching")

    assert told["acts"] == [("restart", "failed"), ("drop_keys", None)]


def test_what_arrives_before_the_open_socket_is_noticed_speaks_for_the_step(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    baileys.habits("g1", "26", slow_start=0.5)
    fail(channel)
    walk(channel, step="restart", phase="starting")
    arrive(channel)

    assert walk(channel, state="closed")["acts"] == [("restart", "repaired")]


def test_the_next_step_is_judged_by_itself(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    fail(channel)
    walk(channel, step="restart", phase="watching")
    fail(channel)
    walk(channel, step="drop_keys", phase="watching")
    arrive(channel)

    assert walk(channel, state="closed")["acts"] == [("restart", "failed"), ("drop_keys", "repaired")]


def test_after_a_long_wait_too_no_step_is_begun_before_what_came_in_is_read(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    with paused():
        fail(channel)
        walk(channel, step="cause", phase="planned")
    changed(channel, "phase_at = phase_at - interval '10 minutes'")

    with an_inbox_that_is_behind(channel, 300):
        go_on(channel)
        assert (incident(channel)["step"], done(baileys)) == ("cause", [])
        assert "is read" in incident(channel)["says"]

    walk(channel, step="restart", phase="watching")


# --------------------------------------------------------------------------------------------------- what was not done


def test_a_step_that_could_not_be_made_proves_nothing(
    baileys: Baileys, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers._repair._STOPS_WITHIN", 0.3)
    monkeypatch.setattr("workers._repair._LATE_STOP", 1.0)
    channel = a_session(baileys, tenant)
    baileys.habits("g1", "26", stop_is_ignored=True)
    fail(channel)
    told = walk(channel, step="restart", phase="watching")
    assert told["steps"][-1]["details"] == {"trouble": "not_stopped"}
    fail(channel, count=1)
    arrive(channel)

    told = walk(channel, state="closed")

    assert (told["outcome"], told["acts"]) == ("healed", [("restart", "healed")])


def test_a_step_that_could_not_be_made_has_failed_if_nothing_healed_by_itself(
    baileys: Baileys, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers._repair._STOPS_WITHIN", 0.3)
    monkeypatch.setattr("workers._repair._LATE_STOP", 1.0)
    channel = a_session(baileys, tenant)
    baileys.habits("g1", "26", stop_is_ignored=True)
    fail(channel)
    walk(channel, step="restart", phase="watching")
    arrive(channel, jids=STRANGERS)

    assert walk(channel, state="waiting")["acts"] == [("restart", "failed")]


def test_a_store_that_somebody_holds_keeps_no_session_closed(
    baileys: Baileys, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers._repair._STORE_HELD", 4.0)
    channel = a_session(baileys, tenant, **with_keys(baileys))
    backups = baileys.folder("g1", "x").parent / ".pombal-backups" / "26"
    backups.mkdir(parents=True)
    for folder in (backups, backups.parent):
        folder.chmod(0o700)
    held = os.open(backups, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with db.session([channel.tenant_id]) as s:
        Repair.open(
            s,
            channel.tenant_id,
            channel.id,
            host=host_of(channel.config),
            cause="none",
            since=s.execute(_NOW).scalar_one(),
            evidence={},
            wanted_step=Step.DROP_KEYS,
            is_by_hand=True,
        )
    told = walk(channel, step="drop_keys", phase="stopped")
    assert "store" in told["says"]

    told = walk(channel, state="closed")

    assert (told["outcome"], told["steps"][-1]["details"]) == ("unrepaired", {"trouble": "busy"})
    assert baileys.state("g1", "26") == "open"
    os.close(held)


def test_lines_that_name_no_message_put_no_credentials_back(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    with superuser() as connection:
        connection.execute("UPDATE channel SET status = 'connected' WHERE id = %s", [channel.id])
    session_look.fn(str(channel.tenant_id), str(channel.id))  # which keeps a copy of them
    with db.session([channel.tenant_id]) as s:
        now = s.execute(_NOW).scalar_one()
        for n in range(2, 10):
            SessionError.weak(s, channel.tenant_id, channel.id, now - timedelta(seconds=n))
    session_look.fn(str(channel.tenant_id), str(channel.id))
    baileys.break_("g1", "26", "creds_truncated")
    walk(channel, step="observe", phase="watching")
    with db.session([channel.tenant_id]) as s:
        SessionError.weak(s, channel.tenant_id, channel.id, s.execute(_NOW).scalar_one())

    told = walk(channel, state="waiting")

    assert "credentials are broken" in told["says"]
    assert done(baileys) == []


# --------------------------------------------------------------------------------------------------- whose socket it is


def test_what_a_person_closes_during_a_watch_stays_closed(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    walk(channel, step="restart", phase="watching")
    changed(channel, "phase_at = phase_at - interval '1 hour', judged_from = judged_from - interval '1 hour'")
    baileys.end("g1", "26", 428, reconnects=False)

    told = walk(channel, state="waiting")

    assert "not by a repair" in told["says"]
    assert done(baileys) == [("26", "stop"), ("26", "start")]


def test_a_refresh_of_contacts_opens_nothing(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, paths=REFRESH)
    fail(channel, contacts=2, cause="ratchet")
    walk(channel, step="contact_refresh", phase="watching")
    baileys.end("g1", "26", 428, reconnects=False)

    walk(channel, state="waiting")

    assert {operation for _, operation in done(baileys)} == {"refresh_contact"}


def test_a_stop_of_ours_that_comes_late_is_undone_even_while_repairs_are_paused(
    baileys: Baileys, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers._repair._STOPS_WITHIN", 0.3)
    channel = a_session(baileys, tenant)
    baileys.habits("g1", "26", stop_is_ignored=True)
    fail(channel)
    walk(channel, step="restart", phase="watching")
    with paused():
        baileys.end("g1", "26", 428, reconnects=False)

        def is_open() -> bool:
            go_on(channel)
            return baileys.state("g1", "26") == "open"

        until(is_open, "it is opened again")

        assert incident(channel)["steps"][-1]["details"] == {"reopened": 1, "trouble": None}
    arrive(channel)  # that was the restart
    assert walk(channel, state="closed")["acts"] == [("restart", "repaired")]


def test_a_restart_whose_stop_lands_while_its_gateway_does_not_answer_is_made(
    baileys: Baileys, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers._repair._STOPS_WITHIN", 0.3)
    channel = a_session(baileys, tenant)
    baileys.habits("g1", "26", stop_is_ignored=True)
    fail(channel)
    walk(channel, step="restart", phase="watching")
    changed(channel, "phase = 'starting'")
    baileys.end("g1", "26", 428, reconnects=False)

    told = walk(channel, step="restart", phase="watching")

    assert told["steps"][-1]["details"] == {"trouble": None}
    assert done(baileys)[-1] == ("26", "start")
    arrive(channel)
    assert walk(channel, state="closed")["acts"] == [("restart", "repaired")]


def test_a_session_that_was_long_in_opening_and_closes_again_is_opened(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    walk(channel, step="restart", phase="watching")
    changed(channel, "judged_from = judged_from - interval '1 hour'")
    baileys.end("g1", "26", 428, reconnects=False)

    def is_open() -> bool:
        go_on(channel)
        return baileys.state("g1", "26") == "open"

    until(is_open, "it is opened again")


def test_a_gateway_that_begins_anew_calls_nobody(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, observe_seconds=5)
    fail(channel)
    changed_to_watching(channel)
    baileys.end("g1", "26", 428, reconnects=False)
    go_on(channel)
    assert (incident(channel)["state"], incident(channel)["says"]) == ("open", "its socket is closed")

    row = {"tenant_id": tenant.id, "channel_id": channel.id, "kind": "baileys", "config": channel.config}
    Patient(row | {"sealed": channel.sealed, "own_id": None, "since": None}).ask(lambda gateway: gateway.start())
    until(lambda: baileys.state("g1", "26") == "open", "it is open again")
    go_on(channel)
    assert incident(channel)["steps"][-1]["details"] == {"closed_at": None}  # the next look at a closed one is a first
    arrive(channel)

    assert walk(channel, state="closed")["acts"] == [("restart", "repaired")]


def changed_to_watching(channel: Channel) -> None:
    """Walk there with a short look, and let an hour go by."""
    with superuser() as connection:
        quick = "UPDATE channel SET config = config || '{\"observe_seconds\": 0.2}' WHERE id = %s"
        connection.execute(quick, [channel.id])
        walk(channel, step="restart", phase="watching")
        long = "UPDATE channel SET config = config || '{\"observe_seconds\": 5}' WHERE id = %s"
        connection.execute(long, [channel.id])
    changed(channel, "phase_at = phase_at - interval '1 hour'")


def test_a_qr_code_that_is_seen_late_is_provoked_no_more(baileys: Baileys, tenant: Tenant) -> None:
    channel, other = a_session(baileys, tenant), a_session(baileys, tenant, session="27")
    fail(channel)
    walk(channel, step="restart", phase="watching")
    baileys.unpair("g1", "26")
    row = {"tenant_id": tenant.id, "channel_id": channel.id, "kind": "baileys", "config": channel.config}
    Patient(row | {"sealed": channel.sealed, "own_id": None, "since": None}).ask(lambda gateway: gateway.start())

    assert walk(channel, state="waiting")["asked_for_qr"]

    fail(other)
    walk(other, state="waiting")
    assert {session for session, _ in done(baileys)} == {"26"}


def test_a_gateway_is_the_same_however_its_address_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKEND_URL", "Gateway.example/")
    settings.cache_clear()

    assert host_of({}) == host_of({"host": "https://gateway.example"})

    monkeypatch.undo()
    settings.cache_clear()


# ------------------------------------------------------------------------------------------------------ when it is over


def test_a_persons_incident_ends_when_nothing_has_failed_for_long(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_long_waiting_one(baileys, tenant)
    go_on(channel)
    assert incident(channel)["state"] == "waiting"  # nobody has written: nothing tells

    arrive(channel, jids=STRANGERS)
    told = walk(channel, state="closed")

    assert told["outcome"] == "healed"


def test_a_persons_incident_goes_on_while_one_of_its_contacts_fails(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_long_waiting_one(baileys, tenant)
    arrive(channel, jids=STRANGERS)
    fail(channel, contacts=1, count=1)

    go_on(channel)

    assert incident(channel)["state"] == "waiting"


def test_messages_of_before_it_was_disconnected_are_no_proof(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_long_waiting_one(baileys, tenant)
    arrive(channel, jids=STRANGERS)
    with superuser() as connection:
        connection.execute("UPDATE channel SET status = 'disconnected' WHERE id = %s", [channel.id])

    go_on(channel)

    assert incident(channel)["state"] == "waiting"


def test_silence_is_no_proof_while_something_waits_to_be_read(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_long_waiting_one(baileys, tenant)
    arrive(channel, jids=STRANGERS)

    with an_inbox_that_is_behind(channel, 300):
        go_on(channel)

    assert incident(channel)["state"] == "waiting"


def test_an_error_of_somebody_else_keeps_no_persons_incident(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_long_waiting_one(baileys, tenant)
    fail(channel, contacts=1, count=1, jids=STRANGERS)
    arrive(channel, jids=STRANGERS[1:])

    assert walk(channel, state="closed")["outcome"] == "healed"


def test_an_inbox_that_is_always_late_holds_no_step_up_for_ever(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    with paused():
        walk(channel, step="cause", phase="planned")
    changed(channel, "phase_at = phase_at - interval '10 minutes'")

    with an_inbox_that_is_behind(channel, 300):
        walk(channel, step="restart")


def a_long_waiting_one(baileys: Baileys, tenant: Tenant) -> Channel:
    channel = a_waiting_one(baileys, tenant)
    changed(channel, "phase_at = phase_at - interval '2 hours', since = since - interval '4 hours'")
    with superuser() as connection:
        connection.execute("UPDATE session_error SET at = at - interval '3 hours' WHERE channel_id = %s", [channel.id])
    return channel


def a_waiting_one(baileys: Baileys, tenant: Tenant) -> Channel:
    channel = a_session(baileys, tenant)
    fail(channel)
    ends: list[dict[str, Any]] = []
    with db.session([channel.tenant_id]) as s:
        now = s.execute(_NOW).scalar_one()
        ends.append(
            {"tenant_id": channel.tenant_id, "channel_id": channel.id, "code": 440, "at": now, "source": "webhook"}
        )
        SessionEnd.note(s, ends)
    walk(channel, state="waiting")
    with superuser() as connection:
        connection.execute("DELETE FROM session_end WHERE channel_id = %s", [channel.id])
    return channel


# ---------------------------------------------------------------------------------------------------- a host that hangs


def test_a_gateway_that_answers_nobody_is_left_alone_and_others_are_not(
    baileys: Baileys, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers._patient.circuit", Circuit())
    gone = [a_session(baileys, tenant, gateway="gone", session=f"{n}") for n in range(FILES + 1)]
    well = a_session(baileys, tenant)
    for channel in gone:
        host = channel.config["host"].rsplit(":", 1)[0] + ":1"  # where nobody listens
        with superuser() as connection:
            connection.execute(
                "UPDATE channel SET config = config || jsonb_build_object('host', %s::text) WHERE id = %s",
                [host, channel.id],
            )
        fail(channel)
        walk(channel, step="cause", phase="planned")

    def is_left_alone() -> bool:
        for channel in gone:
            go_on(channel)
        return "several times in a row" in incident(gone[-1])["says"]

    until(is_left_alone, "its gateway is left alone")
    fail(well)
    walk(well, step="restart", phase="watching")


def test_whatever_else_a_gateway_says_it_answers() -> None:
    circuit = Circuit()

    async def refuse() -> None:
        raise InstanceFault("refused", "no")

    for _ in range(2 * FILES):
        with pytest.raises(InstanceFault, match="refused"):
            asyncio.run(circuit.reach("h", uuid4(), refuse))
