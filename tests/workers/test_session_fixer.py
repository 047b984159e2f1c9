"""Repairs of one session against a gateway that plays along or does not: the order of things, what is never touched,
and what is left when everything dies in between (F3, F4)."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from models import Channel, Repair, RepairPause, SessionEnd, SessionError, Tenant
from models.repair import Step
from pombal import db
from pombal.settings import settings
from sandbox import client
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
    paused,
    tree,
    walk,
    with_keys,
)
from tests.sandbox.baileys_servers import Baileys
from tests.workers.tools import until
from workers.session_fixer import inspect, session_fixer, session_look


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, queues: None) -> Iterator[None]:
    """Loopback may be asked; no repair of another test is in the way."""
    monkeypatch.setenv("MEDIA_ALLOWED_NETWORKS", "127.0.0.0/8")
    settings.cache_clear()
    with superuser() as connection:
        for table in ("repair", "repair_pause"):
            connection.execute(f"DELETE FROM {table}")  # noqa: S608 - ours
    yield
    monkeypatch.undo()
    settings.cache_clear()


def arrive_late(channel: Channel, contacts: int = 4) -> None:
    """As `arrive`, but their messages had waited to be read since a minute ago."""
    with superuser() as connection:
        known = connection.execute("SELECT id FROM message WHERE channel_id = %s", [channel.id]).fetchall()
    arrive(channel, contacts)
    with superuser() as connection:
        connection.execute(
            "WITH late AS (UPDATE message SET delivery_id = id WHERE channel_id = %s AND id <> ALL(%s) RETURNING id)"
            " INSERT INTO delivery (id, provider, channel_id, request_id, raw, received_at, state)"
            " SELECT id, 'baileys', %s, 'r', '', now() - interval '1 minute', 'done' FROM late",
            [channel.id, [id_ for (id_,) in known], channel.id],
        )


def go_on_and_see(channel: Channel) -> str:
    go_on(channel)
    return str(incident(channel)["says"])


def go_on_for_long(channel: Channel) -> None:
    """For five times as long as it observes."""
    began = time.monotonic()
    while time.monotonic() - began < 1:
        go_on(channel)


def falls_due(channel: Channel) -> None:
    with superuser() as connection:
        connection.execute("UPDATE repair SET next_at = now() WHERE channel_id = %s", [channel.id])


# ---------------------------------------------------------------------------------------------------- the mild ones


def test_what_heals_by_itself_is_only_observed(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    walk(channel, phase="watching", step="observe")
    arrive(channel)

    told = walk(channel, state="closed")

    assert (told["outcome"], told["acts"]) == ("healed", [])
    assert done(baileys) == []


def test_five_errors_are_no_incident(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    fail(channel, count=5)

    assert inspect(channel.tenant_id, channel.id).at_once == 5
    with superuser() as connection:
        assert connection.execute("SELECT count(*) FROM repair").fetchone() == (0,)


def test_a_restart_is_a_confirmed_stop_and_a_start_and_messages_are_its_proof(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    before = tree(baileys.folder("g1", "26"))
    fail(channel)

    walk(channel, step="restart", phase="watching")
    assert done(baileys) == [("26", "stop"), ("26", "start")]
    assert baileys.state("g1", "26") == "open"
    go_on(channel)
    assert incident(channel)["state"] == "open"  # connected is no proof
    arrive(channel)
    told = walk(channel, state="closed")

    assert (told["outcome"], told["acts"]) == ("repaired", [("restart", "repaired")])
    kept = tree(baileys.folder("g1", "26"))
    assert {name: kept[name] for name in before if name != "creds.json" and "pre-key" not in name} == {
        name: digest for name, digest in before.items() if name != "creds.json" and "pre-key" not in name
    }


def test_few_contacts_are_refreshed_and_nothing_is_stopped(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, paths=REFRESH)
    fail(channel, contacts=2, cause="ratchet")

    walk(channel, step="contact_refresh", phase="watching")
    arrive(channel)
    told = walk(channel, state="closed")

    assert told["outcome"] == "repaired"
    assert done(baileys) == [("26", "refresh_contact")] * 2


def test_what_did_not_help_is_followed_by_the_next_step(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    other = a_session(baileys, tenant, session="27")
    theirs = tree(baileys.folder("g1", "27"))
    fail(channel)
    walk(channel, step="restart", phase="watching")
    fail(channel, count=1)  # still

    walk(channel, step="drop_keys", phase="watching")
    names = set(tree(baileys.folder("g1", "26")))
    arrive(channel)
    told = walk(channel, state="closed")

    assert [step for step, _ in told["acts"]] == ["restart", "drop_keys"]
    assert told["outcome"] == "repaired"
    assert "creds.json" in names
    assert any(name.startswith("pre-key") for name in names)
    assert baileys.violations() == []
    assert tree(baileys.folder("g1", "27")) == theirs
    assert {session for session, _ in done(baileys)} == {"26"}
    assert other.id != channel.id


def test_only_a_groups_sender_keys_are_dropped_for_its_errors(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    storm = baileys.storm("g1", "26", "sender_key", messages=8, then_every=0)
    folder = baileys.folder("g1", "26")
    until(lambda: any(path.name.startswith("sender-key") for path in folder.iterdir()), "the group has keys")
    group = baileys.progress(storm)["group"]
    sessions = {name for name in tree(folder) if name.startswith("session-")}
    with db.session([channel.tenant_id]) as s:
        rows = [
            {
                "tenant_id": channel.tenant_id,
                "channel_id": channel.id,
                "jid": group,
                "participant": JIDS[n % 3],
                "message_id": f"G{n}",
                "cause": "sender_key",
                "source": "webhook",
                "at": datetime.now(UTC),
            }
            for n in range(8)
        ]
        SessionError.record(s, rows)

    told = walk(channel, step="drop_keys", phase="watching")

    dropped = [one["name"] for one in baileys.touches() if one["what"] == "deleted"]
    assert dropped
    assert all(name.startswith("sender-key") and group in name for name in dropped)
    assert sessions <= set(tree(folder))
    assert told["steps"][-1]["details"]["dropped"] == len(dropped)


# ----------------------------------------------------------------------------------------------- what stands in its way


@pytest.mark.parametrize("down", ["reset", "500", "unhealthy"])
def test_nothing_is_touched_while_the_gateway_is_not_well(baileys: Baileys, tenant: Tenant, down: str) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    before = tree(baileys.folder("g1", "26"))
    fail(channel)
    walk(channel, phase="watching", step="observe")
    baileys.habits("g1", down=down)

    def has_been_refused() -> bool:
        go_on(channel)
        return str(incident(channel)["says"]).startswith("the gateway")

    until(has_been_refused, "it waits for the gateway")
    assert done(baileys) == []
    assert tree(baileys.folder("g1", "26")) == before

    baileys.habits("g1", down=None)
    walk(channel, step="restart", phase="watching")


def test_a_qr_code_after_the_start_is_a_persons_and_never_provoked_again(baileys: Baileys, tenant: Tenant) -> None:
    channel, other = a_session(baileys, tenant), a_session(baileys, tenant, session="27")
    baileys.habits("g1", "26", asks_qr_after_start=True)
    fail(channel)

    told = walk(channel, state="waiting")

    assert told["asked_for_qr"]
    assert told["acts"] == [("restart", "asked_for_qr")]
    assert done(baileys) == [("26", "stop"), ("26", "start")]
    go_on(channel)
    fail(other)
    told = walk(other, state="waiting")
    assert told["acts"] == []
    assert [one["step"] for one in told["steps"] if one["outcome"] == "skipped"] == ["restart", "drop_keys"]
    assert done(baileys) == [("26", "stop"), ("26", "start")]


def test_a_socket_that_does_not_close_keeps_its_keys(
    baileys: Baileys, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers._repair._STOPS_WITHIN", 0.5)
    monkeypatch.setattr("workers._repair._LATE_STOP", 1.0)
    channel = a_session(baileys, tenant, **with_keys(baileys))
    baileys.habits("g1", "26", stop_is_ignored=True)
    before = tree(baileys.folder("g1", "26"))
    fail(channel)
    walk(channel, step="restart", phase="watching")
    fail(channel, count=1)

    told = walk(channel, state="waiting")

    assert told["acts"] == [("restart", "failed"), ("drop_keys", "failed")]
    assert {one["details"].get("trouble") for one in told["steps"] if one["is_act"]} == {"not_stopped"}
    assert tree(baileys.folder("g1", "26")).keys() >= before.keys()
    assert baileys.state("g1", "26") == "open"


@pytest.mark.parametrize(("code", "word"), [(440, "another process"), (405, "version"), (401, "logged")])
def test_a_cause_that_no_repair_cures_is_a_persons(baileys: Baileys, tenant: Tenant, code: int, word: str) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    if code != 440:  # a twin may be open now and then
        baileys.end("g1", "26", code, reconnects=False)
    ended(channel, code)

    told = walk(channel, state="waiting")

    assert word in told["says"]
    assert done(baileys) == []
    arrive(channel)  # the person has settled it
    assert walk(channel, state="closed")["outcome"] == "healed"


def ended(channel: Channel, code: int) -> None:
    """Its connection ended with this code just now."""
    end = {"tenant_id": channel.tenant_id, "channel_id": channel.id, "code": code, "source": "webhook"}
    with db.session([channel.tenant_id]) as s:
        SessionEnd.note(s, [{**end, "at": datetime.now(UTC)}])


def test_an_end_of_before_is_no_hindrance_once_it_is_open_again(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    ended(channel, 401)  # and somebody has paired it again since
    fail(channel)

    walk(channel, step="restart", phase="watching")


def test_what_a_person_closed_is_not_opened_by_a_repair(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    walk(channel, step="observe", phase="watching")
    baileys.end("g1", "26", 428, reconnects=False)

    told = walk(channel, state="waiting")

    assert "closed" in told["says"]
    assert done(baileys) == []


def test_nothing_is_begun_while_it_is_paused(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    with db.session() as s:
        RepairPause.set(s, str(channel.id))
    fail(channel)
    walk(channel, step="cause")
    go_on(channel)
    assert "paused" in incident(channel)["says"]
    with db.session() as s:
        RepairPause.end(s, str(channel.id))
        RepairPause.set(s, "all")
    go_on(channel)
    assert "all repairs are paused" in incident(channel)["says"]
    assert done(baileys) == []
    with db.session() as s:
        RepairPause.end(s, "all")

    walk(channel, step="restart", phase="watching")


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Turn the emergency stop."""

    def turn(mode: str) -> None:
        monkeypatch.setenv("POMBAL_SESSION_FIXER", mode)
        settings.cache_clear()

    return turn


@pytest.mark.parametrize("mode", ["observe", "off"])
def test_the_emergency_stop_holds(baileys: Baileys, tenant: Tenant, mode: str, turned: Callable[[str], None]) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    turned("off")
    go_on(channel)
    with superuser() as connection:
        assert connection.execute("SELECT count(*) FROM repair").fetchone() == (0,)
    turned("observe")  # an incident is seen, and nothing is done
    walk(channel, step="cause")
    turned(mode)

    walk(channel, says=f"POMBAL_SESSION_FIXER is {mode}: it would look for the cause")

    assert done(baileys) == []


def test_a_stopped_session_is_started_whatever_somebody_wants_by_then(
    baileys: Baileys, tenant: Tenant, turned: Callable[[str], None]
) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    baileys.habits("g1", "26", stop_is_ignored=True)
    walk(channel, step="restart", phase="stopping")
    turned("off")
    baileys.habits("g1", "26", stop_is_ignored=False)

    walk(channel, phase="watching", step="restart")

    assert baileys.state("g1", "26") == "open"


def test_steps_cool_down_and_three_a_day_are_enough(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, cool_down_seconds=600)
    for n in range(3):
        fail(channel)
        if n:
            until(lambda: go_on_and_see(channel).startswith("cools down after the last step until"), "it cools down")
            with superuser() as connection:  # ten minutes, then twenty
                connection.execute(
                    """UPDATE repair SET steps = (SELECT jsonb_agg(one || jsonb_build_object('at',
                        (one ->> 'at')::timestamptz - %s)) FROM jsonb_array_elements(steps) AS one)
                        WHERE channel_id = %s AND steps <> '[]'""",
                    [timedelta(minutes=10.5 * n), channel.id],
                )
        walk(channel, step="restart", phase="watching")
        arrive(channel)
        told = walk(channel, state="closed")
        assert told["outcome"] == "repaired"
        assert [one["why"] for one in told["steps"] if "cools" in one["why"]] == []
    assert done(baileys) == [("26", "stop"), ("26", "start")] * 3

    fail(channel)
    told = walk(channel, state="waiting")

    assert "3 steps in a day" in told["says"]
    assert done(baileys) == [("26", "stop"), ("26", "start")] * 3


def test_nobody_writing_is_no_proof(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    walk(channel, step="restart", phase="watching")

    def goes_on() -> bool:
        go_on(channel)
        return "nobody has written" in str(incident(channel)["says"])

    until(goes_on, "it goes on watching")

    assert incident(channel)["state"] == "open"
    with superuser() as connection:
        connection.execute(
            "UPDATE repair SET phase_at = phase_at - interval '2 days', since = since - interval '2 days'"
        )
        connection.execute("UPDATE session_error SET at = at - interval '2 days'")
    assert walk(channel, state="closed")["outcome"] == "unproven"


# ------------------------------------------------------------------------------------------------------ crashes, rivals

_RUN = """
import sys
from workers.session_fixer import session_fixer
session_fixer.fn(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize(
    ("operation", "moment"),
    [
        ("health", "hang_before"),
        ("stop", "hang_before"),
        ("stop", "hang_after"),
        ("list", "hang_after"),
        ("start", "hang_before"),
        ("start", "hang_after"),
    ],
)
def test_a_kill_at_any_call_ends_in_a_started_session(
    baileys: Baileys, tenant: Tenant, operation: str, moment: str
) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    fail(channel)
    with paused():
        walk(channel, step="cause")
    falls_due(channel)
    baileys.faults(moment, place=operation)
    process = subprocess.Popen([sys.executable, "-c", _RUN, str(channel.tenant_id), str(channel.id)])
    until(lambda: any(one["operation"] == operation for one in baileys.calls(limit=99)), "it is at that call")
    process.send_signal(signal.SIGKILL)
    process.wait()
    client.baileys_clear_faults(baileys.url)

    falls_due(channel)  # the claim runs out
    walk(channel, step="restart", phase="watching")
    arrive(channel)
    told = walk(channel, state="closed")

    assert told["acts"] == [("restart", "repaired")]
    assert baileys.state("g1", "26") == "open"


def test_keys_are_left_alone_when_somebody_has_started_the_session_meanwhile(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    assert opened_by_hand(channel, Step.DROP_KEYS)
    before = tree(baileys.folder("g1", "26"))
    with superuser() as connection:  # as a process leaves it that died after its stop was confirmed, long ago
        connection.execute(
            """UPDATE repair SET step = 'drop_keys', phase = 'stopped', names = %s,
                steps = '[{"step": "drop_keys", "why": "", "at": "2026-01-01T00:00:00Z", "is_act": true,
                    "outcome": null, "details": {}}]'
                WHERE channel_id = %s""",
            [json.dumps([name for name in before if name.startswith("session-")]), channel.id],
        )

    walk(channel, step="drop_keys", phase="watching")

    assert baileys.violations() == []
    assert done(baileys) == [("26", "stop"), ("26", "start")]  # stopped once more before anything was dropped


def test_a_session_whose_stored_credentials_are_broken_is_not_restarted(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    baileys.break_("g1", "26", "creds_truncated")
    fail(channel)

    told = walk(channel, state="waiting")

    assert "credentials are broken" in told["says"]
    assert done(baileys) == []
    assert baileys.state("g1", "26") == "open"


def test_broken_credentials_are_put_back_from_a_copy_of_the_same_pairing(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    baileys.is_open("g1", "26")
    assert keep_creds_of(channel)
    good = (baileys.folder("g1", "26") / "creds.json").read_bytes()
    baileys.break_("g1", "26", "creds_truncated")
    fail(channel)

    told = walk(channel, step="restore_creds", phase="watching")

    assert told["steps"][-1]["details"] == {"restored": 1}
    assert baileys.state("g1", "26") == "open"
    before, after = json.loads(good), json.loads((baileys.folder("g1", "26") / "creds.json").read_bytes())
    assert after["signedIdentityKey"] == before["signedIdentityKey"]
    arrive(channel)
    assert walk(channel, state="closed")["outcome"] == "repaired"
    assert baileys.violations() == []


def keep_creds_of(channel: Channel) -> bool:
    """As the fixer keeps them while a session is well."""
    with superuser() as connection:
        connection.execute("UPDATE channel SET status = 'connected' WHERE id = %s", [channel.id])
    session_look.fn(str(channel.tenant_id), str(channel.id))
    with superuser() as connection:
        found = connection.execute("SELECT verdict FROM session_look WHERE channel_id = %s", [channel.id]).fetchone()
    return found == ("well",)


def test_nothing_is_stopped_for_credentials_of_which_there_is_no_copy(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    fail(channel, cause="identity")

    told = walk(channel, state="waiting")

    assert told["acts"] == []
    assert done(baileys) == []


def test_a_code_after_a_logout_on_the_phone_is_not_blamed_on_restarts(baileys: Baileys, tenant: Tenant) -> None:
    channel, other = a_session(baileys, tenant), a_session(baileys, tenant, session="27")
    fail(channel)
    walk(channel, step="restart", phase="watching")
    baileys.unpair("g1", "26")
    ended(channel, 401)

    told = walk(channel, state="waiting")

    assert not told["asked_for_qr"]
    fail(other)
    walk(other, step="restart", phase="watching")


def test_a_session_that_cannot_be_opened_is_a_persons(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    baileys.habits("g1", "26", start_fails=True)
    fail(channel)
    walk(channel, step="restart", phase="starting")
    ended(channel, 403)

    told = walk(channel, state="waiting")

    assert "blocked" in told["says"]


def test_one_error_of_a_stranger_does_not_condemn_a_step_that_helped(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    fail(channel)
    walk(channel, step="restart", phase="watching")
    arrive(channel, contacts=8)
    fail(channel, contacts=12, count=12)  # of four strangers too, and the others' messages arrive yet
    arrive(channel, contacts=8)

    told = walk(channel, state="closed")

    assert (told["outcome"], [step for step, _ in told["acts"]]) == ("repaired", ["restart"])


def test_a_step_is_not_judged_before_what_came_in_since_is_read(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    fail(channel)
    walk(channel, step="restart", phase="watching")
    with an_inbox_that_is_behind(channel, 0):
        fail(channel)  # each of them once more, as after new keys; that they arrived is not read yet
        go_on_for_long(channel)

        assert (incident(channel)["step"], incident(channel)["phase"]) == ("restart", "watching")

        arrive(channel, contacts=8)

    told = walk(channel, state="closed")

    assert (told["outcome"], [step for step, _ in told["acts"]]) == ("repaired", ["restart"])


def test_no_step_is_begun_before_what_came_in_is_read(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    with paused():
        fail(channel)
        walk(channel, step="cause", phase="planned")
    with an_inbox_that_is_behind(channel, 60):
        go_on_for_long(channel)

        assert incident(channel)["step"] == "cause"
        assert "is read" in incident(channel)["says"]

        ended(channel, 440)  # which is what it said

    assert "another process" in walk(channel, state="waiting")["says"]
    assert done(baileys) == []


def test_an_operator_reads_that_a_repair_waits_for_the_inbox(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    walk(channel, step="restart", phase="watching")

    with an_inbox_that_is_behind(channel, 40):
        says = go_on_and_see(channel)

    assert "the inbox or a follower of logs is behind" in says
    until(lambda: "nobody has written" in go_on_and_see(channel), "it is judged again")


def test_what_arrived_before_a_step_and_was_read_after_it_is_no_proof(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    walk(channel, step="restart", phase="watching")
    arrive_late(channel)

    until(lambda: "nobody has written" in go_on_and_see(channel), "nothing of it is taken for a proof")

    arrive(channel)
    assert walk(channel, state="closed")["outcome"] == "repaired"


def test_nothing_is_healed_by_itself_while_an_error_is_not_yet_settled(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    ended(channel, 440)
    walk(channel, state="waiting")
    with an_inbox_that_is_behind(channel, 0):
        arrive(channel)
        fail(channel)
        go_on_for_long(channel)

    assert incident(channel)["state"] == "waiting"


def test_a_restart_whose_answer_is_lost_is_made_once(baileys: Baileys, tenant: Tenant) -> None:
    baileys.gateway("e1", "evolution")
    channel = a_session(baileys, tenant, gateway="e1", dialect="evolution")
    baileys.faults("http500", place="restart")
    fail(channel)

    walk(channel, step="restart", phase="watching")

    assert [one for one in done(baileys, "e1") if one[1] == "restart"] == [("26", "restart")]


def test_a_contact_that_the_gateway_refuses_is_left_out(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, paths=REFRESH)
    baileys.faults("http400", place="refresh_contact", count=1)
    fail(channel, contacts=2, cause="ratchet")

    told = walk(channel, step="contact_refresh", phase="watching")

    assert told["steps"][-1]["details"] == {"refreshed": 1}
    assert told["names"] is None


def test_messages_of_our_own_other_device_refresh_nobody(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, paths=REFRESH)
    fail(channel, contacts=2, cause="ratchet")
    with superuser() as connection:
        connection.execute("UPDATE session_error SET participant = 'me' WHERE channel_id = %s", [channel.id])

    walk(channel, step="restart", phase="watching")

    assert done(baileys) == [("26", "stop"), ("26", "start")]


def test_a_store_out_of_reach_is_left_out(baileys: Baileys, tenant: Tenant) -> None:
    auth = {"kind": "files", "folder": str(baileys.root / "nowhere")}
    channel = a_session(baileys, tenant, auth=auth, may_refresh_contacts=True, may_drop_keys=True)
    fail(channel, contacts=2, cause="ratchet")

    walk(channel, step="restart", phase="watching")  # which needs none
    fail(channel, contacts=2, count=1, cause="ratchet")
    told = walk(channel, state="waiting")

    skipped = [one["step"] for one in told["steps"] if one["outcome"] == "skipped"]
    assert skipped == ["contact_refresh", "drop_keys"]


def test_two_fixers_at_once_make_one_repair(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    stop = threading.Event()

    def fix() -> None:
        while not stop.is_set():
            session_fixer.fn(str(channel.tenant_id), str(channel.id))

    threads = [threading.Thread(target=fix) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: _is(channel, step="restart", phase="watching"), "it is restarted")
        arrive(channel)
        until(lambda: _is(channel, state="closed"), "it is over")
    finally:
        stop.set()
        for thread in threads:
            thread.join()

    assert done(baileys) == [("26", "stop"), ("26", "start")]
    with superuser() as connection:
        assert connection.execute("SELECT count(*) FROM repair").fetchone() == (1,)


def _is(channel: Channel, **wanted: Any) -> bool:
    with superuser() as connection:
        found = connection.execute("SELECT count(*) FROM repair WHERE channel_id = %s", [channel.id]).fetchone()
    if found == (0,):
        return False
    told = incident(channel)
    return all(told[name] == value for name, value in wanted.items())


# ------------------------------------------------------------------------------------------------------------- by hand


def test_one_step_by_hand_is_that_step_alone(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    id_ = opened_by_hand(channel, Step.RESTART)
    walk(channel, step="restart", phase="watching")
    fail(channel, count=1)

    told = walk(channel, state="closed")

    assert (told["outcome"], told["acts"]) == ("unrepaired", [("restart", "failed")])
    assert id_ is not None


def opened_by_hand(channel: Channel, step: Step) -> UUID | None:
    with db.session([channel.tenant_id]) as s:
        return Repair.open(
            s,
            channel.tenant_id,
            channel.id,
            host="http://h",
            cause="none",
            since=datetime.now(UTC),
            evidence={},
            wanted_step=step,
            is_by_hand=True,
        )


def test_a_note_of_each_step_is_written_to_the_session_log(
    baileys: Baileys, tenant: Tenant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SESSION_LOG", str(tmp_path / "sessions.log"))
    settings.cache_clear()
    channel = a_session(baileys, tenant)
    fail(channel)
    walk(channel, step="restart", phase="watching")
    arrive(channel)
    walk(channel, state="closed")

    lines = (tmp_path / "sessions.log").read_text().splitlines()
    assert all(line.startswith("[20") and "] g1-26: " in line for line in lines)
    assert [line.partition(": ")[2].partition(":")[0] for line in lines] == [
        "incident opened",
        "observe",
        "restart",
        "repaired",
    ]
    assert not any(jid.partition("@")[0] in line for jid in JIDS for line in lines)
