"""What an operator types about sessions of Baileys gateways: how they stand, their repairs, the emergency stop."""

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from models import Channel, RepairPause, SessionEnd, Tenant
from pombal import db
from pombal.cli import main
from pombal.ids import uuid7
from pombal.settings import settings
from providers.authfiles import Files
from tests.factories import a_tenant, all_of, superuser
from tests.pombal.test_cli import Terminal
from tests.repairs import (
    JIDS,
    REFRESH,
    a_session,
    arrive,
    done,
    fail,
    go_on,
    incident,
    incidents,
    nobody_else,
    tree,
    walk,
    with_keys,
)
from tests.sandbox.baileys_servers import API_KEY, Baileys
from workers.session_fixer import session_fixer, session_look

pytestmark = pytest.mark.usefixtures("queues")

PREKEY = "messages of 8 contacts cannot be decrypted (prekey)"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Whose changes are settings; gateways on this machine may be reached."""
    monkeypatch.setenv("MEDIA_ALLOWED_NETWORKS", "127.0.0.0/8")
    nobody_else()
    yield monkeypatch
    monkeypatch.undo()
    settings.cache_clear()


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(capsys)


@pytest.fixture
def ended(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command prints that ends with this exit code, whatever a fixer beside it logs."""

    def end(*arguments: str, code: int = 1) -> str:
        capsys.readouterr()
        assert main(arguments) == code
        return capsys.readouterr().out

    return end


@pytest.fixture
def reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials are judged by two reads; no gateway writes here in between."""
    monkeypatch.setattr(Files.__init__, "__kwdefaults__", {**(Files.__init__.__kwdefaults__ or {}), "apart": 0.01})


def name_of(channel: Channel, tenant: Tenant) -> str:
    return f"{tenant.slug}/{channel.name}"


def plan_of(terminal: Terminal, channel: Channel, *more: str) -> list[str]:
    (told,) = terminal.json("session", "repair", str(channel.id), "--dry-run", *more)
    plan: list[str] = told["plan"]
    return plan


def broken_off(channel: Channel, code: int) -> None:
    """Its connection ended with this code just now."""
    end = {"tenant_id": channel.tenant_id, "channel_id": channel.id, "code": code, "source": "webhook"}
    with db.session([channel.tenant_id]) as s:
        SessionEnd.note(s, [{**end, "at": datetime.now(UTC)}])


def events(tenant: Tenant) -> list[dict[str, Any]]:
    with db.session([tenant.id]) as s:
        return all_of(s, "SELECT type, channel_id, payload FROM event ORDER BY id")


# ------------------------------------------------------------------------------------------------------ how they stand


def test_a_session_that_is_well_needs_nothing(terminal: Terminal, baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    stands(channel, "connected")
    session_look.fn(str(tenant.id), str(channel.id))

    (told,) = terminal.json("session", "check", name_of(channel, tenant))
    said = terminal("session", "check", "26").splitlines()

    assert (told["verdict"], told["gateway_says"], told["errors_at_once"]) == ("well", "open (CONNECTED)", 0)
    assert told["looked_at"] is not None
    assert "row" not in told
    assert said[0].split()[:3] == ["CHANNEL", "GATEWAY", "SESSION"]
    assert said[1].split()[:4] == [name_of(channel, tenant), "whaticket", "26", "connected"]


def stands(channel: Channel, status: str | None) -> None:
    with superuser() as connection:
        connection.execute("UPDATE channel SET status = %s WHERE id = %s", [status, channel.id])


def test_all_are_told_without_a_call_to_their_gateways_unless_asked(
    terminal: Terminal, baileys: Baileys, tenant: Tenant
) -> None:
    for session in ("26", "27"):
        stands(a_session(baileys, tenant, session=session), "connected")
    a_session(baileys, a_tenant(), session="28")
    baileys.end("g1", "27", 428, reconnects=False)
    before = len(baileys.calls())

    known = {one["session"]: one for one in terminal.json("session", "check")}
    assert len(baileys.calls()) == before
    asked = {one["session"]: one for one in terminal.json("session", "check", "all", "--ask")}

    assert {name: one["verdict"] for name, one in known.items()} == {"26": "well", "27": "well", "28": "unknown"}
    assert "gateway_says" not in known["26"]
    assert {name: one["gateway_says"].split()[0] for name, one in asked.items()} == {
        "26": "open",
        "27": "closed",
        "28": "open",
    }


def test_what_is_wrong_ends_with_a_failure(
    ended: Callable[..., str], terminal: Terminal, baileys: Baileys, tenant: Tenant
) -> None:
    channel = a_session(baileys, tenant)
    stands(channel, "connected")
    fail(channel, contacts=5, count=5)
    assert " 5 " in terminal("session", "check", "26")  # it takes more than these

    fail(channel)
    assert f"restart: {PREKEY}" in ended("session", "check", "26")

    walk(channel, step="observe", phase="watching")
    assert " in_repair " in ended("session", "check")

    broken_off(channel, 440)
    walk(channel, state="waiting")
    said = ended("session", "check", "all")
    assert " waits_for_a_person " in said
    assert "another process" in said


def test_a_gateway_that_does_not_answer_is_said_of_its_session(
    terminal: Terminal, baileys: Baileys, tenant: Tenant
) -> None:
    channel = a_session(baileys, tenant)
    baileys.habits("g1", down="500")

    (told,) = terminal.json("session", "check", name_of(channel, tenant))

    assert told["gateway_says"].startswith("provider_error: ")


def test_a_name_that_is_no_session_or_two_is_refused(terminal: Terminal, baileys: Baileys, tenant: Tenant) -> None:
    channel, other = a_session(baileys, tenant), a_session(baileys, a_tenant(), gateway="g2")

    for command in ("check", "repair", "history", "pause", "resume"):
        assert "give TENANT/NAME" in terminal.refused("session", command, "26")
        assert terminal.refused("session", command, f"{tenant.slug}/nobody")
    assert terminal.json("session", "check", name_of(channel, tenant))[0]["id"] == str(channel.id)
    assert terminal.json("session", "check", str(other.id))[0]["id"] == str(other.id)


# ---------------------------------------------------------------------------------------------- told before it is done


@pytest.mark.parametrize("step", [None, "drop_keys"])
def test_a_dry_run_touches_nothing(terminal: Terminal, baileys: Baileys, tenant: Tenant, step: str | None) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    before = tree(baileys.folder("g1", "26"))
    fail(channel)
    more = () if step is None else ("--step", step)

    said = terminal("session", "repair", name_of(channel, tenant), "--dry-run", *more)

    assert name_of(channel, tenant) in said
    assert "8 errors at once of 8 contacts" in said
    assert incidents() == 0
    assert done(baileys) == []
    assert tree(baileys.folder("g1", "26")) == before
    assert events(tenant) == []


def test_a_dry_run_tells_the_ladder_and_why(terminal: Terminal, baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, paths={}, may_refresh_contacts=True)
    fail(channel, contacts=2, cause="ratchet")

    assert plan_of(terminal, channel) == [
        "the keys of 2 contacts went apart",
        "contact_refresh: no, the session's keys are not within reach",
        "restart: close the socket and open it again, credentials kept",
        "drop_keys: no, the channel does not allow to drop keys",
        "else ask a person",
    ]


def test_what_is_told_of_the_second_step_comes_after_the_first(
    terminal: Terminal, baileys: Baileys, tenant: Tenant
) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    fail(channel)
    entries = len([name for name in tree(baileys.folder("g1", "26")) if name.startswith(("session-", "sender-key"))])

    first, *rest = plan_of(terminal, channel)[1:]

    assert first.startswith("restart: ")
    assert rest[0].startswith("else drop_keys: ")
    assert rest[0].endswith(f"({entries} entries)")


def a_group_storm(its: Baileys, channel: Channel) -> None:
    """Messages of a group fail, of which the session has sender keys; it has sessions with people as well."""
    storm = its.storm("g1", "26", "sender_key", messages=8, then_every=0)
    folder = its.folder("g1", "26")
    its.until(lambda: any(path.name.startswith("sender-key") for path in folder.iterdir()))
    its.until(lambda: its.progress(storm)["state"] == "over" or its.progress(storm)["group"])
    fail(channel, contacts=3, cause="sender_key", group=its.progress(storm)["group"])
    assert any(name.startswith("session-") for name in tree(folder))


@pytest.mark.parametrize("step", [None, "drop_keys"])
def test_as_many_entries_are_dropped_as_a_dry_run_tells(
    terminal: Terminal, baileys: Baileys, tenant: Tenant, step: str | None
) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    a_group_storm(baileys, channel)
    more = () if step is None else ("--step", step)

    (line,) = (one for one in plan_of(terminal, channel, *more) if one.startswith("drop_keys: "))
    terminal("session", "repair", str(channel.id), "--no-wait", *more)
    told = walk(channel, step="drop_keys", phase="watching")

    dropped = told["steps"][-1]["details"]["dropped"]
    assert line.endswith(f"({dropped} entries)")
    kept = [name for name in tree(baileys.folder("g1", "26")) if name.startswith("session-")]
    assert bool(kept) == (step is None)  # by hand it is all of them


def test_all_affected_contacts_are_told_of_and_none_whose_message_arrived(
    terminal: Terminal, baileys: Baileys, tenant: Tenant
) -> None:
    channel = a_session(baileys, tenant, paths=REFRESH)
    fail(channel, contacts=1, count=1, cause="ratchet", ids=["HEALED"])
    fail(channel, contacts=3, count=8, cause="ratchet", at=datetime.now(UTC) - timedelta(minutes=20))
    with superuser() as connection:  # the first one's were of others
        connection.execute(
            "UPDATE session_error SET jid = %s WHERE message_id = 'HEALED' AND channel_id = %s", [JIDS[9], channel.id]
        )
    arrive(channel, ids=["HEALED"])

    (line,) = (one for one in plan_of(terminal, channel) if one.startswith("contact_refresh: "))
    terminal("session", "repair", str(channel.id), "--no-wait")
    told = walk(channel, step="contact_refresh", phase="watching")

    assert line.endswith("(3 contacts)")
    assert told["steps"][-1]["details"] == {"refreshed": 3}


def test_a_restart_that_once_cost_a_pairing_is_made_when_it_is_asked_for(
    terminal: Terminal, baileys: Baileys, tenant: Tenant
) -> None:
    channel, other = a_session(baileys, tenant), a_session(baileys, tenant, session="27")
    baileys.habits("g1", "26", asks_qr_after_start=True)
    fail(channel)
    assert walk(channel, state="waiting")["asked_for_qr"]
    fail(other)

    assert [one for one in plan_of(terminal, other) if one.startswith(("restart", "else", "ask"))] == [
        "restart: no, a restart made a session of this gateway ask for a QR code before",
        "ask a person",
    ]
    terminal("session", "repair", str(other.id), "--no-wait")
    assert walk(other, state="waiting")["acts"] == []

    assert plan_of(terminal, other, "--step", "restart")[-1].startswith("restart: close the socket")
    terminal("session", "repair", str(other.id), "--step", "restart", "--no-wait")
    walk(other, step="restart", phase="watching")
    assert done(baileys)[2:] == [("27", "stop"), ("27", "start")]


@pytest.mark.parametrize("step", [None, "restart"])
@pytest.mark.parametrize(("how", "word"), [("closed", "the session is closed"), ("qr", "asks for a QR code")])
def test_a_session_that_is_closed_or_waits_for_a_scan_is_a_persons(
    terminal: Terminal, baileys: Baileys, tenant: Tenant, how: str, word: str, step: str | None
) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    if how == "closed":
        baileys.end("g1", "26", 428, reconnects=False)
    else:
        baileys.unpair("g1", "26")
        key = {"Authorization": f"Bearer {API_KEY}"}
        assert httpx.put(f"{baileys.host('g1')}/whatsapp/26/start-session", headers=key).status_code == 200
        baileys.until(lambda: baileys.state("g1", "26") == "qr")
    before = done(baileys)
    more = () if step is None else ("--step", step)

    plan = plan_of(terminal, channel, *more)
    terminal("session", "repair", str(channel.id), "--no-wait", *more)
    told = walk(channel, state="waiting")

    assert plan[-1] == f"ask a person: {told['says']}"
    assert word in told["says"]
    assert done(baileys) == before


def test_a_step_that_cannot_be_made_is_told_before_how_the_session_stands(
    terminal: Terminal, baileys: Baileys, tenant: Tenant
) -> None:
    channel = a_session(baileys, tenant)
    baileys.end("g1", "26", 428, reconnects=False)

    plan = plan_of(terminal, channel, "--step", "drop_keys")
    terminal("session", "repair", str(channel.id), "--step", "drop_keys", "--no-wait")
    told = walk(channel, state="closed")

    assert plan[-1] == f"drop_keys: no, {told['says']}"
    assert told["outcome"] == "unrepaired"


@pytest.mark.usefixtures("reads_at_once")
@pytest.mark.parametrize("step", [None, "restart", "drop_keys"])
def test_broken_credentials_are_told(terminal: Terminal, baileys: Baileys, tenant: Tenant, step: str | None) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    baileys.break_("g1", "26", "creds_truncated")
    fail(channel)
    more = () if step is None else ("--step", step)

    plan = plan_of(terminal, channel, *more)
    terminal("session", "repair", str(channel.id), "--no-wait", *more)
    told = walk(channel, state="waiting")

    assert plan[-1] == f"ask a person: {told['says']}"
    assert "credentials are broken" in told["says"]
    assert done(baileys) == []


@pytest.mark.usefixtures("reads_at_once")
@pytest.mark.parametrize("step", [None, "restart"])
def test_credentials_that_would_be_put_back_are_told(
    terminal: Terminal, baileys: Baileys, tenant: Tenant, step: str | None
) -> None:
    channel = a_session(baileys, tenant, **with_keys(baileys))
    stands(channel, "connected")
    baileys.is_open("g1", "26")
    session_look.fn(str(tenant.id), str(channel.id))
    baileys.break_("g1", "26", "creds_truncated")
    fail(channel)
    more = () if step is None else ("--step", step)

    plan = plan_of(terminal, channel, *more)
    terminal("session", "repair", str(channel.id), "--no-wait", *more)
    told = walk(channel, step="restore_creds", phase="watching")

    assert plan[-2:] == [
        "its stored credentials are broken",
        "restore_creds: close the socket, put back the kept credentials of the same pairing, open it again (1 entry)",
    ]
    assert told["acts"] == [("restore_creds", None)]
    assert told["steps"][-1]["details"] == {"restored": 1}


def test_a_store_out_of_reach_is_told_of_the_steps_that_need_it(
    terminal: Terminal, baileys: Baileys, tenant: Tenant
) -> None:
    auth = {"kind": "files", "folder": str(baileys.root / "nowhere")}
    channel = a_session(baileys, tenant, auth=auth, may_drop_keys=True)
    fail(channel)

    plan = plan_of(terminal, channel)
    by_hand = plan_of(terminal, channel, "--step", "drop_keys")
    terminal("session", "repair", str(channel.id), "--step", "drop_keys", "--no-wait")
    told = walk(channel, state="closed")

    assert [one.partition(":")[0] for one in plan[1:]] == ["restart", "drop_keys", "else ask a person"]
    assert plan[2] == by_hand[-1] == f"drop_keys: no, {told['says']}"
    assert "keys cannot be reached" in told["says"]


def test_a_step_with_nothing_to_work_on_is_told(terminal: Terminal, baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant, paths=REFRESH)
    fail(channel)
    with superuser() as connection:
        connection.execute("UPDATE session_error SET participant = 'me' WHERE channel_id = %s", [channel.id])

    plan = plan_of(terminal, channel, "--step", "2")
    terminal("session", "repair", str(channel.id), "--step", "2", "--no-wait")
    told = walk(channel, state="closed")

    assert plan == ["asked for by hand", f"contact_refresh: no, {told['says']}"]
    assert "no contact to refresh" in told["says"]


def test_an_incident_that_is_open_is_taken_over_with_its_errors(
    terminal: Terminal, baileys: Baileys, tenant: Tenant
) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    broken_off(channel, 440)
    walk(channel, state="waiting")
    with superuser() as connection:  # an hour later; the other process is stopped
        for what in ("repair SET since = since - interval '1 hour'", "session_error SET at = at - interval '1 hour'"):
            connection.execute(f"UPDATE {what} WHERE channel_id = %s", [channel.id])
        connection.execute("DELETE FROM session_end WHERE channel_id = %s", [channel.id])
    before = incident(channel)

    plan = plan_of(terminal, channel)
    terminal("session", "repair", str(channel.id), "--no-wait")
    told = walk(channel, step="restart", phase="watching")

    assert plan[:2] == [PREKEY, "restart: close the socket and open it again, credentials kept"]
    assert (told["id"] != before["id"], told["since"]) == (True, before["since"])


def test_nothing_is_foretold_of_errors_that_do_not_count(terminal: Terminal, baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)

    assert plan_of(terminal, channel) == ["nothing: no error counts"]
    assert "no error counts" in terminal.refused("session", "repair", str(channel.id))

    fail(channel, ids=[f"M{n}" for n in range(8)])
    walk(channel, step="observe", phase="watching")
    with superuser() as connection:  # they arrived, and its incident does not know it yet
        connection.execute("UPDATE session_error SET healed_at = now() WHERE channel_id = %s", [channel.id])
    plan = plan_of(terminal, channel)
    terminal("session", "repair", str(channel.id), "--no-wait")
    told = walk(channel, state="closed")
    assert plan == [f"nothing: {told['says']}"]
    assert told["outcome"] == "healed"


def test_a_session_in_the_middle_of_a_step_is_left_to_it(terminal: Terminal, baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    baileys.habits("g1", "26", stop_is_ignored=True)
    fail(channel)
    walk(channel, step="restart", phase="stopping")

    for more in ((), ("--step", "restart")):
        assert "in the middle of a step" in plan_of(terminal, channel, *more)[-1]
        assert "in the middle of a step" in terminal.refused("session", "repair", str(channel.id), *more)
    assert incidents() == 1


def test_what_holds_a_repair_is_told(terminal: Terminal, baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    with superuser() as connection:
        connection.execute(
            "INSERT INTO session (tenant_id, channel_id, wish) VALUES (%s, %s, 'restart')"
            " ON CONFLICT (tenant_id, channel_id) DO UPDATE SET wish = excluded.wish",
            [tenant.id, channel.id],
        )

    plan = plan_of(terminal, channel)
    terminal("session", "repair", str(channel.id), "--no-wait")
    go_on(channel)

    assert plan[0] == f"waits first: {incident(channel)['says']}"
    assert plan[1] == PREKEY
    assert done(baileys) == []


def test_what_came_in_is_read_before_anything_is_chosen(terminal: Terminal, baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    with superuser() as connection:
        connection.execute(
            "INSERT INTO delivery (id, provider, channel_id, request_id, raw) VALUES (%s, 'baileys', %s, 'r', '')",
            [uuid7(), channel.id],
        )

    plan, one_step = plan_of(terminal, channel), plan_of(terminal, channel, "--step", "restart")
    terminal("session", "repair", str(channel.id), "--no-wait")
    go_on(channel)

    waits = "until what came in before is read"
    assert plan[0] == f"waits first: {waits}"
    assert incident(channel)["says"] == f"waits {waits}"
    assert not any(waits in line for line in one_step)


def test_a_gateway_that_is_not_well_is_waited_for(terminal: Terminal, baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    baileys.habits("g1", down="500")

    plan = plan_of(terminal, channel)
    terminal("session", "repair", str(channel.id), "--no-wait")
    told = walk(channel, step="cause", phase="planned")

    assert plan[-1] == f"waits for {told['says']}"
    assert done(baileys) == []


def test_of_all_sessions_only_those_with_too_many_errors_are_meant(
    terminal: Terminal, baileys: Baileys, tenant: Tenant
) -> None:
    sick, few, held, well = (a_session(baileys, tenant, session=name) for name in ("26", "27", "28", "29"))
    for channel in (sick, held):
        fail(channel)
    fail(few, count=5)
    terminal("session", "pause", str(held.id))

    plans = {one["session"]: one["plan"] for one in terminal.json("session", "repair", "all", "--dry-run")}
    said = terminal("session", "repair", "all", "--no-wait")

    assert plans["26"][:2] == [PREKEY, "restart: close the socket and open it again, credentials kept"]
    assert plans["27"] == ["nothing: of all, only sessions with too many errors are repaired (unknown)"]
    assert plans["28"] == ["nothing: its repairs are paused"]
    assert plans["29"] == ["nothing: of all, only sessions with too many errors are repaired (unknown)"]
    assert f"{name_of(held, tenant)}: left out, its repairs are paused" in said
    assert "1 started" in said
    assert incidents() == 1
    walk(sick, step="restart", phase="watching")
    assert {session for session, _ in done(baileys)} == {"26"}
    assert well.id != few.id


def test_there_may_be_nothing_to_repair_at_all(terminal: Terminal, baileys: Baileys, tenant: Tenant) -> None:
    assert "no channels" in terminal("session", "repair", "all", "--dry-run")
    a_session(baileys, tenant)

    assert "no session has too many errors" in terminal("session", "repair", "all")
    assert incidents() == 0


# ------------------------------------------------------------------------------------------------------------- by hand


@pytest.fixture
def at_work() -> Iterator[Callable[[Channel], None]]:
    """Have a fixer at work on a channel, as soon as it has an incident by hand, until the end of the test."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def begin(channel: Channel) -> None:
        def fix() -> None:
            while not stop.wait(0.05):
                if incidents():
                    session_fixer.fn(str(channel.tenant_id), str(channel.id))

        threads.append(threading.Thread(target=fix))
        threads[-1].start()

    yield begin
    stop.set()
    for thread in threads:
        thread.join()


def test_a_repair_is_followed_to_its_end(
    ended: Callable[..., str], baileys: Baileys, tenant: Tenant, at_work: Callable[[Channel], None]
) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    at_work(channel)

    def write() -> None:
        baileys.until(lambda: _is_watched(channel))
        arrive(channel)

    heard = threading.Thread(target=write)
    heard.start()

    said = ended("session", "repair", name_of(channel, tenant), code=0)

    heard.join()
    assert f"{name_of(channel, tenant)}: 1. restart: {PREKEY}" in said
    assert f"{name_of(channel, tenant)}: 1. restart: repaired" in said
    assert said.splitlines()[-1].startswith(f"{name_of(channel, tenant)}: repaired — ")
    assert done(baileys) == [("26", "stop"), ("26", "start")]


def _is_watched(channel: Channel) -> bool:
    with superuser() as connection:
        found = connection.execute(
            "SELECT 1 FROM repair WHERE channel_id = %s AND step = 'restart' AND phase = 'watching'", [channel.id]
        )
        return found.fetchone() is not None


def test_a_repair_that_needs_a_person_ends_with_a_failure(
    ended: Callable[..., str], baileys: Baileys, tenant: Tenant, at_work: Callable[[Channel], None]
) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    broken_off(channel, 440)
    at_work(channel)

    said = ended("session", "repair", name_of(channel, tenant))

    assert "needs a person — another process uses the same credentials (440)" in said
    assert done(baileys) == []


@pytest.mark.parametrize("step", ["restart", "3"])
def test_a_step_is_named_or_numbered_as_on_the_ladder(
    terminal: Terminal, baileys: Baileys, tenant: Tenant, step: str
) -> None:
    channel = a_session(baileys, tenant)

    terminal("session", "repair", str(channel.id), "--step", step, "--no-wait")

    assert incident(channel)["wanted_step"] == "restart"
    walk(channel, step="restart", phase="watching")


@pytest.mark.parametrize("step", ["reboot", "7", "-1", ""])
def test_a_step_that_there_is_not_is_refused(terminal: Terminal, baileys: Baileys, tenant: Tenant, step: str) -> None:
    channel = a_session(baileys, tenant)

    said = terminal.refused("session", "repair", str(channel.id), f"--step={step}", "--dry-run")

    assert said == "--step must be one of 2 contact_refresh, 3 restart, 4 drop_keys, 5 restore_creds"


@pytest.mark.parametrize("step", ["observe", "1", "person"])
def test_a_step_that_touches_nothing_is_nothing_to_be_done_by_hand(
    terminal: Terminal, baileys: Baileys, tenant: Tenant, step: str
) -> None:
    channel = a_session(baileys, tenant)

    assert "nothing to be done by hand" in terminal.refused("session", "repair", str(channel.id), "--step", step)


def test_by_hand_there_is_neither_a_cool_down_nor_a_limit_of_steps(
    terminal: Terminal, baileys: Baileys, tenant: Tenant
) -> None:
    channel = a_session(baileys, tenant, cool_down_seconds=600)
    for n in range(4):
        plan = plan_of(terminal, channel, "--step", "restart")
        assert plan[-1].startswith("restart: close the socket")
        told = "steps were" if n > 1 else "step was"
        assert (f"{n} {told} made in the last day, which hinders nothing by hand" in plan) == bool(n)
        terminal("session", "repair", str(channel.id), "--step", "restart", "--no-wait")
        walk(channel, step="restart", phase="watching")

    assert done(baileys) == [("26", "stop"), ("26", "start")] * 4


def test_an_incident_that_is_taken_over_is_told_to_have_ended(
    terminal: Terminal, baileys: Baileys, tenant: Tenant
) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    walk(channel, step="observe", phase="watching")
    former = incident(channel)["id"]

    terminal("session", "repair", str(channel.id), "--no-wait")

    opened, _observed, finished, by_hand = events(tenant)
    assert (opened["type"], opened["payload"]["repair"]) == ("incident_opened", str(former))
    assert (finished["type"], finished["channel_id"]) == ("repair_finished", channel.id)
    assert finished["payload"]["seconds"] >= 0
    assert {name: finished["payload"][name] for name in ("channel", "repair", "outcome", "step", "why")} == {
        "channel": str(channel.id),
        "repair": str(former),
        "outcome": "cancelled",
        "step": "observe",
        "why": "another was begun by hand",
    }
    assert (by_hand["type"], by_hand["payload"]["repair"]) == ("incident_opened", str(incident(channel)["id"]))


# ------------------------------------------------------------------------------------------------- the emergency stop


@pytest.mark.parametrize("scope", ["all", "26"])
def test_a_pause_holds_until_it_is_ended(terminal: Terminal, baileys: Baileys, tenant: Tenant, scope: str) -> None:
    channel, other = a_session(baileys, tenant), a_session(baileys, tenant, session="27")
    for one in (channel, other):
        fail(one)
    whose = "all repairs are" if scope == "all" else "its repairs are"

    assert terminal("session", "pause", scope).strip() == f"{whose} paused"
    assert terminal("session", "pause", scope).strip() == f"{whose} paused already"
    for more in ((), ("--step", "restart")):
        assert "`pombal session resume" in terminal.refused("session", "repair", str(channel.id), *more)
        assert plan_of(terminal, channel, *more)[0] == "nothing, since repairs are paused; else:"
    walk(channel, step="cause")
    go_on(channel)
    assert "paused" in incident(channel)["says"]
    assert done(baileys) == []
    walk(other, step="cause" if scope == "all" else "restart")

    assert terminal("session", "resume", scope).strip() == "resumed"
    assert terminal("session", "resume", scope).strip() == "it was not paused"
    walk(channel, step="restart", phase="watching")


def test_without_a_channel_all_are_paused_and_each_pause_is_ended_for_itself(
    terminal: Terminal, baileys: Baileys, tenant: Tenant
) -> None:
    channel = a_session(baileys, tenant)
    terminal("session", "pause")
    terminal("session", "pause", name_of(channel, tenant))

    assert pauses() == {"all": 1, "channel": 1}
    assert "all repairs are paused; 1 channel is paused" in terminal("session", "check")
    said = terminal("session", "resume", name_of(channel, tenant))
    assert said.splitlines() == ["resumed", "all repairs are paused still: `pombal session resume all`"]
    assert pauses() == {"all": 1, "channel": 0}
    assert terminal("session", "resume").strip() == "resumed"
    assert pauses() == {"all": 0, "channel": 0}


def pauses() -> dict[str, int]:
    with db.session() as s:
        return RepairPause.counts(s)


def test_a_repair_that_waited_for_the_end_of_a_pause_goes_on_at_once(
    terminal: Terminal, baileys: Baileys, tenant: Tenant
) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    terminal("session", "pause", "26")
    walk(channel, step="cause")
    go_on(channel)
    waiting = next_at(channel)

    terminal("session", "resume", "26")

    assert waiting > next_at(channel)
    session_fixer.fn(str(tenant.id), str(channel.id))  # nobody made it fall due
    assert incident(channel)["step"] == "restart"


def next_at(channel: Channel) -> datetime:
    with superuser() as connection:
        found = connection.execute("SELECT next_at FROM repair WHERE channel_id = %s", [channel.id]).fetchone()
    assert found is not None
    assert isinstance(found[0], datetime)
    return found[0]


@pytest.mark.parametrize("mode", ["observe", "off"])
def test_where_nothing_is_repaired_nothing_is_begun_by_hand(
    terminal: Terminal, baileys: Baileys, tenant: Tenant, mode: str, environment: pytest.MonkeyPatch
) -> None:
    channel = a_session(baileys, tenant)
    fail(channel)
    environment.setenv("POMBAL_SESSION_FIXER", mode)
    settings.cache_clear()

    assert terminal.refused("session", "repair", "26") == f"POMBAL_SESSION_FIXER is {mode}: nothing is repaired"
    plan = plan_of(terminal, channel)

    assert plan[:2] == [f"nothing, since POMBAL_SESSION_FIXER is {mode}; else:", PREKEY]
    assert plan[2].startswith("restart: ")
    assert incidents() == 0


# ------------------------------------------------------------------------------------------------------------ told


def a_repair(channel: Channel) -> None:
    """By a restart, after which messages arrived."""
    fail(channel)
    walk(channel, step="restart", phase="watching")
    arrive(channel)
    assert walk(channel, state="closed")["outcome"] == "repaired"


def test_the_history_tells_each_incident_and_its_steps(terminal: Terminal, baileys: Baileys, tenant: Tenant) -> None:
    channel, other = a_session(baileys, tenant), a_session(baileys, tenant, session="27")
    assert terminal("session", "history").strip() == "no incidents"
    a_repair(channel)
    fail(other)
    broken_off(other, 440)
    walk(other, state="waiting")

    newest, oldest = terminal.json("session", "history", "all")
    (one,) = terminal.json("session", "history", "26", "--limit", "5")
    said = terminal("session", "history", name_of(channel, tenant)).splitlines()

    assert [step["step"] for step in newest["steps"]] == ["observe", "person"]
    assert (newest["channel"], newest["state"]) == (other.name, "waiting")
    assert one == oldest
    assert (one["outcome"], one["cause"], one["is_by_hand"]) == ("repaired", "prekey", False)
    assert [(step["step"], step["outcome"]) for step in one["steps"]] == [
        ("observe", "not_healed"),
        ("restart", "repaired"),
    ]
    assert "repaired after " in said[0]
    assert "(8 errors of 8 contacts, prekey)" in said[0]
    assert [line.split()[1:3] for line in said[1:]] == [["observe:", "not_healed"], ["restart:", "repaired"]]
    assert "waits for a person" in terminal("session", "history", "27")
    assert len(terminal.json("session", "history", "--limit", "1")) == 1
    assert not any(jid.partition("@")[0] in terminal("session", "history", "--json") for jid in JIDS)


def test_the_numbers_say_what_was_looked_at_and_what_came_of_it(
    terminal: Terminal, baileys: Baileys, tenant: Tenant
) -> None:
    channel, other = a_session(baileys, tenant), a_session(baileys, tenant, session="27")
    before = terminal.json("session", "stats")
    assert (before["checked"], before["incidents"], before["steps"]) == (0, 0, [])
    assert before["mean_seconds_to_repair"] is None
    assert "no steps in 30 days" in terminal("session", "stats")

    session_look.fn(str(tenant.id), str(channel.id))
    session_look.fn(str(tenant.id), str(channel.id))
    a_repair(channel)
    with superuser() as connection:
        connection.execute("UPDATE repair SET opened_at = closed_at - interval '90 seconds'")
    fail(other)
    broken_off(other, 440)
    walk(other, state="waiting")
    told = terminal.json("session", "stats", "--days", "1")

    assert {name: told[name] for name in told if name != "steps"} == {
        "checked": 2,
        "incidents": 2,
        "repaired": 1,
        "healed_by_themselves": 0,
        "unproven": 0,
        "given_up": 0,
        "waiting_for_a_person": 1,
        "open": 0,
        "mean_seconds_to_repair": 90.0,
    }
    assert told["steps"] == [
        {"step": "observe", "outcome": "not_healed", "times": 2},
        {"step": "person", "outcome": "under way", "times": 1},
        {"step": "restart", "outcome": "repaired", "times": 1},
    ]
    said = terminal("session", "stats")
    assert any(line.split() == ["mean", "seconds", "to", "repair", "90.0"] for line in said.splitlines())

    with superuser() as connection:
        connection.execute("UPDATE repair SET opened_at = now() - interval '2 days' WHERE state = 'closed'")
    assert terminal.json("session", "stats", "--days", "1")["repaired"] == 0
    assert terminal.json("session", "stats")["repaired"] == 1
