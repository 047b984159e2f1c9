"""Storms of the simulated Baileys gateways: what each does, and which step heals it, and which does not."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sandbox import client
from tests.sandbox.baileys_servers import API_KEY, Baileys, a_baileys
from tests.sandbox.megaapi_servers import Hook, a_hook

GROUP = "120363000000000009@g.us"
CUSTOMER = "5511944440001"


@pytest.fixture(scope="module")
def running() -> Iterator[Baileys]:
    with a_baileys() as its:
        yield its


@pytest.fixture
def its(running: Baileys) -> Iterator[Baileys]:
    """A Whaticket gateway with session 26, which is open."""
    running.gateway("g1", "whaticket")
    running.session("g1", "26", contacts=2)
    yield running
    client.baileys_stop_storm(running.url)
    client.baileys_remove(running.url)
    client.baileys_clear_calls(running.url)
    shutil.rmtree(running.root, ignore_errors=True)


@pytest.fixture
def hook() -> Iterator[Hook]:
    with a_hook() as its:
        yield its


def call(its: Baileys, method: str, path: str) -> None:
    headers = {"Authorization": f"Bearer {API_KEY}"}
    httpx.request(method, its.host("g1") + path, headers=headers, trust_env=False).raise_for_status()


def stop(its: Baileys) -> None:
    call(its, "PUT", "/whatsapp/26/disconnect")
    assert its.state("g1", "26") == "closed"


def start(its: Baileys) -> None:
    call(its, "PUT", "/whatsapp/26/start-session")
    its.is_open("g1", "26")


def restart(its: Baileys) -> None:
    stop(its)
    start(its)


def storm(its: Baileys, kind: str, **plan: object) -> int:
    """One whose burst has come, and failed."""
    id = its.storm("g1", "26", kind, **{"messages": 8, "pace": 200, "then_every": 0.02, **plan})
    its.until(lambda: its.progress(id)["state"] == "done")
    return id


def heals(its: Baileys, id: int) -> bool:
    """Whether the next ten messages of the affected contacts can be read, sooner or later."""
    before = its.progress(id)
    its.until(lambda: its.progress(id)["sent"] >= before["sent"] + 10)
    after = its.progress(id)
    new = set(after["failed"]) - set(before["failed"]) - set(after["healed"])
    return not new


def never_heals(its: Baileys, id: int) -> bool:
    before = its.progress(id)
    its.until(lambda: its.progress(id)["sent"] >= before["sent"] + 10)
    after = its.progress(id)
    return len(after["failed"]) - len(before["failed"]) >= 8 and not set(after["healed"]) - set(before["healed"])


def drop(its: Baileys, pattern: str) -> None:
    found = list(its.folder("g1", "26").glob(pattern))
    assert found
    for file in found:
        file.unlink()


# Which step heals


def test_a_retry_storm_heals_by_itself_under_the_same_ids(its: Baileys) -> None:
    id = storm(its, "retry", retry_after=0.05, then_every=0)
    its.until(lambda: set(its.progress(id)["healed"]) == set(its.progress(id)["failed"]))
    assert len(its.progress(id)["failed"]) == 8


def test_lost_pre_keys_are_made_anew_by_a_restart(its: Baileys) -> None:
    id = storm(its, "prekey")
    assert len(its.progress(id)["failed_contacts"]) == 8
    assert never_heals(its, id)
    restart(its)
    assert heals(its, id)
    assert list(its.folder("g1", "26").glob("pre-key-*.json"))


def test_a_ratchet_is_healed_by_a_fresh_session_with_the_contact_and_not_by_a_restart(its: Baileys) -> None:
    id = storm(its, "ratchet")
    restart(its)
    assert never_heals(its, id)
    for contact in its.progress(id)["contacts"]:
        call(its, "POST", f"/whatsapp/26/refresh/{contact}")
    assert heals(its, id)


def test_a_ratchet_is_healed_by_the_contacts_file_gone_while_stopped(its: Baileys) -> None:
    id = storm(its, "ratchet", retry_after=0.02)
    stop(its)
    for contact in its.progress(id)["contacts"]:
        drop(its, f"session-{contact.partition('@')[0]}.0.json")
    start(its)
    its.until(lambda: heals(its, id))
    assert not its.violations()


def test_derived_keys_must_be_dropped_and_fresh_sessions_do_not_help(its: Baileys) -> None:
    id = storm(its, "derived", retry_after=0.02)
    for contact in its.progress(id)["contacts"]:
        call(its, "POST", f"/whatsapp/26/refresh/{contact}")
    assert never_heals(its, id)
    stop(its)
    drop(its, "session-*.json")
    start(its)
    its.until(lambda: heals(its, id))


def test_a_groups_sender_keys_must_be_dropped(its: Baileys) -> None:
    id = storm(its, "sender_key", group=GROUP, retry_after=0.02)
    assert its.progress(id)["group"] == GROUP
    restart(its)
    assert never_heals(its, id)
    stop(its)
    drop(its, f"sender-key-{GROUP}--*.json")
    start(its)
    its.until(lambda: heals(its, id))


def test_an_identity_storm_ends_when_the_right_credentials_are_back(its: Baileys) -> None:
    creds = its.folder("g1", "26") / "creds.json"
    good = creds.read_bytes()
    id = storm(its, "identity")
    restart(its)
    assert never_heals(its, id)
    stop(its)
    creds.write_bytes(good)
    start(its)
    assert heals(its, id)
    assert its.look("g1", "26")["registration_id"] == json.loads(good)["registrationId"]


def test_a_refused_version_is_healed_by_nothing(its: Baileys) -> None:
    id = its.storm("g1", "26", "version")
    its.until(lambda: its.look("g1", "26")["ends"].get("405", 0) >= 2)
    its.stop_storm(id)
    its.is_open("g1", "26")


def test_a_twin_takes_the_connection_until_it_is_told_to_stop(its: Baileys) -> None:
    its.storm("g1", "26", "twin", twin_every=0.1)
    its.until(lambda: its.look("g1", "26")["ends"].get("440", 0) >= 3)
    its.twin("g1", "26", False)
    its.is_open("g1", "26")
    its.say("g1", "26", "Olá")
    assert its.look("g1", "26")["waiting"] == 0


def test_a_device_that_was_removed_needs_a_person(its: Baileys) -> None:
    its.storm("g1", "26", "logged_out")
    its.until(lambda: its.state("g1", "26") == "closed")
    call(its, "PUT", "/whatsapp/26/start-session")
    its.until(lambda: its.state("g1", "26") == "qr")


def test_duplicates_are_no_failures(its: Baileys) -> None:
    id = storm(its, "duplicate", then_every=0)
    its.until(lambda: len(its.progress(id)["decrypted"]) == 8)
    assert its.progress(id)["failed"] == []


def test_messages_of_a_stopped_session_come_when_it_is_open_again(its: Baileys) -> None:
    stop(its)
    assert its.say("g1", "26", "Olá")["accepted"] is False
    assert its.look("g1", "26")["waiting"] == 1
    start(its)
    its.until(lambda: its.look("g1", "26")["waiting"] == 0)


# The folder


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_folder_is_laid_out_as_baileys_does(its: Baileys) -> None:
    folder = its.folder("g1", "26")
    creds = json.loads((folder / "creds.json").read_text())
    assert creds["me"]["id"] == "5511955550300:7@s.whatsapp.net"
    assert creds["noiseKey"]["private"]["type"] == "Buffer"
    assert {"pre-key-1.json", "pre-key-30.json", "session-5511970000000.0.json"} <= names(folder)
    its.say("g1", "26", "Olá", group=GROUP)
    assert f"sender-key-{GROUP}--{CUSTOMER}--0.json" in names(folder)


def test_a_file_that_is_deleted_while_the_socket_lives_is_put_back_and_told_of(its: Baileys) -> None:
    folder = its.folder("g1", "26")
    (folder / "creds.json").unlink()
    (folder / "session-5511970000000.0.json").write_text("{}")
    (folder / "note.txt").write_text("x")
    its.until(lambda: len(its.touches("g1", "26")) == 3)
    told = {(one["name"], one["what"], one["kind"]) for one in its.touches()}
    assert told == {
        ("creds.json", "deleted", "touched_while_open"),
        ("session-5511970000000.0.json", "changed", "touched_while_open"),
        ("note.txt", "added", "added_while_open"),
    }
    assert json.loads((folder / "creds.json").read_text())["me"]
    assert len(its.violations()) == 2


def test_what_is_done_while_the_socket_is_closed_is_no_violation(its: Baileys) -> None:
    stop(its)
    drop(its, "session-5511970000000.0.json")
    start(its)
    assert [(one["what"], one["kind"]) for one in its.touches()] == [("deleted", "touched_while_closed")]


@pytest.mark.parametrize("what", ["creds_truncated", "creds_empty", "creds_missing"])
def test_broken_credentials_ask_for_a_code_and_are_overwritten(its: Baileys, what: str) -> None:
    creds = its.folder("g1", "26") / "creds.json"
    registration = its.look("g1", "26")["registration_id"]
    its.break_("g1", "26", what)
    assert its.state("g1", "26") == "open"  # a socket that lives does not see it
    stop(its)
    call(its, "PUT", "/whatsapp/26/start-session")
    its.until(lambda: its.state("g1", "26") == "qr")
    fresh = json.loads(creds.read_text())
    assert "me" not in fresh
    assert fresh["registrationId"] != registration


def test_a_pairing_outlives_the_gateways_own_restart(its: Baileys) -> None:
    id = storm(its, "ratchet", then_every=0)
    before = its.look("g1", "26")
    client.baileys_stop_storm(its.url, id)
    client.baileys_remove(its.url, "g1")
    its.gateway("g1", "whaticket")
    its.session("g1", "26")
    assert its.state("g1", "26") == "open"
    assert its.look("g1", "26")["registration_id"] == before["registration_id"]


def test_an_older_copy_of_a_session_file_does_not_decrypt(its: Baileys) -> None:
    its.say("g1", "26", "Olá", from_="5511970000000")
    file = its.folder("g1", "26") / "session-5511970000000.0.json"
    older = file.read_bytes()
    its.say("g1", "26", "Tudo bem?", from_="5511970000000")
    stop(its)
    file.write_bytes(older)
    start(its)
    id = its.storm("g1", "26", "duplicate", contacts=["5511970000000"], messages=1, then_every=0)
    its.until(lambda: its.progress(id)["failed"])


# What comes out


def test_undecryptable_messages_are_stubs_by_webhook(its: Baileys, hook: Hook) -> None:
    its.session("g1", "7", webhook_url=hook.url)
    id = its.storm("g1", "7", "prekey", contacts=3, messages=3, then_every=0, repeats=1, pace=100)
    bodies = hook.until(lambda bodies: len(bodies) == 6)
    messages = [body["data"]["messages"][0] for body in bodies]
    assert {body["whatsappId"] for body in bodies} == {7}
    assert {message["messageStubType"] for message in messages} == {2}
    assert {message["key"]["id"] for message in messages} == set(its.progress(id)["failed"])
    assert {message["messageStubParameters"][0] for message in messages} == {"Invalid PreKey ID"}


def test_other_people_are_read_all_the_while(its: Baileys, hook: Hook) -> None:
    its.session("g1", "7", webhook_url=hook.url)
    its.storm("g1", "7", "prekey", contacts=2, messages=4, also=2, then_every=0, pace=100)
    bodies = hook.until(lambda bodies: len(bodies) == 12)
    assert sum("messageStubType" in body["data"]["messages"][0] for body in bodies) == 4


def test_evolution_tells_nothing_of_them_by_webhook_and_logs_instead(its: Baileys, hook: Hook) -> None:
    its.gateway("g2", "evolution", logs=True)
    its.session("g2", "loja", webhook_url=hook.url)
    id = its.storm("g2", "loja", "ratchet", messages=4, also=1, then_every=0, pace=100)
    bodies = hook.until(lambda bodies: len(bodies) == 4)
    its.until(lambda: its.progress(id)["state"] == "done")
    assert {body["event"] for body in bodies} == {"messages.upsert"}
    told = its.log("g2").read_text()
    assert told.count("Message ignored with messageStubParameters: {") == 4
    assert all(failed in told for failed in its.progress(id)["failed"])
