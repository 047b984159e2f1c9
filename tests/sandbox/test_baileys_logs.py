"""The logs of the simulated Baileys gateways: every form, what an error looks like in it, and rotation."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox import client
from sandbox.meta import JSON
from tests.sandbox.baileys_servers import Baileys, a_baileys

CUSTOMER = "5511944440001"


@pytest.fixture(scope="module")
def running() -> Iterator[Baileys]:
    with a_baileys() as its:
        yield its


@pytest.fixture
def its(running: Baileys) -> Iterator[Baileys]:
    yield running
    client.baileys_stop_storm(running.url)
    client.baileys_remove(running.url)
    shutil.rmtree(running.root, ignore_errors=True)


def written(its: Baileys, kind: str = "ratchet", *, session: str = "26", **more: object) -> tuple[Path, list[str]]:
    """The log of a storm of three messages, and the ids that failed."""
    its.gateway("g1", "whaticket", logs=True, **more)
    its.session("g1", session)
    id = its.storm("g1", session, kind, messages=3, contacts=2, then_every=0, pace=200)
    its.until(lambda: its.progress(id)["state"] == "done")
    return its.log("g1"), its.progress(id)["failed"]


def records(path: Path, msg: str = "failed to decrypt message") -> list[JSON]:
    parsed = [json.loads(line) for line in path.read_text().splitlines() if line.startswith('{"level"')]
    return [one for one in parsed if one["msg"].endswith(msg)]


def test_each_failed_message_is_one_record_after_a_block_without_time_or_session(its: Baileys) -> None:
    path, failed = written(its, session_field="whatsappId", log_level=50)
    text = path.read_text()
    assert [(one["key"]["id"], one["whatsappId"], one["err"]["message"]) for one in records(path)] == [
        (id, 26, "No matching sessions found for message") for id in failed
    ]
    assert text.count("Failed to decrypt message with any known session...\nSession error:Error: Bad MAC") == 3
    assert len(records(path, "transaction failed, rolling back")) == 3
    assert re.search(r"    at async \d+\.0 \[as awaitable\]", text)
    assert all(isinstance(one["time"], int) and one["class"] == "baileys" for one in records(path))


def test_baileys_6_has_fewer_fields_and_no_line_before(its: Baileys) -> None:
    path, failed = written(its, "prekey", version="6", iso_time=True)
    found = records(path)
    assert [one["key"]["id"] for one in found] == failed
    assert all("messageType" not in one and one["time"].endswith("Z") for one in found)
    assert records(path, "transaction failed, rolling back") == []
    assert "Session error" not in path.read_text()


def test_several_stored_sessions_print_an_error_each(its: Baileys) -> None:
    its.gateway("g1", "whaticket", logs=True)
    its.session("g1", "26")
    id = its.storm("g1", "26", "ratchet", messages=1, contacts=1, entries=4, then_every=0)
    its.until(lambda: its.progress(id)["state"] == "done")
    lines = its.log("g1").read_text().splitlines()
    phrases = re.compile("Invalid PreKey ID|Bad MAC|PreKeyError|failed to decrypt message", re.IGNORECASE)
    assert sum(bool(phrases.search(line)) for line in lines) == 6  # E7: one message


def test_pretty_records_have_colours_and_many_lines(its: Baileys) -> None:
    path, failed = written(its, log_format="pretty", session_field="whatsappId", log_prefix="[baileys]: ")
    text = path.read_text()
    assert text.count("\x1b[36m[baileys]: failed to decrypt message\x1b[39m\n") == 3
    assert "    \x1b[35mwhatsappId\x1b[39m: 26\n" in text
    assert all(f'      "id": "{id}",\n' in text for id in failed)
    assert '      "stack":\n          SessionError: No matching sessions found for message\n' in text


@pytest.mark.parametrize(
    ("form", "start"), [("docker", '{"log":"'), ("compose", "gateway-1  | "), ("pm2+pretty", "0|gateway  | ")]
)
def test_an_envelope_is_around_every_line(its: Baileys, form: str, start: str) -> None:
    path, failed = written(its, log_format=form)
    lines = path.read_text().splitlines()
    assert all(line.startswith(start) for line in lines)
    if form == "docker":
        told = [json.loads(line) for line in lines]
        assert {one["stream"] for one in told} == {"stdout", "stderr"}
        assert all(one["log"].endswith("\n") and one["time"].endswith("Z") for one in told)
    assert all(any(id in line for line in lines) for id in failed)


def test_a_healed_contact_is_dumped_with_private_keys(its: Baileys) -> None:
    its.gateway("g1", "whaticket", logs=True)
    its.session("g1", "26")
    id = its.storm("g1", "26", "retry", messages=1, contacts=1, then_every=0, retry_after=0)
    its.until(lambda: its.progress(id)["healed"])
    text = its.log("g1").read_text()
    assert "Closing session: SessionEntry {" in text
    assert re.search(r"privKey: <Buffer( [0-9a-f]{2}){32}>", text)
    assert "sent retry receipt" in text


def test_connection_ends_are_logged_with_their_code(its: Baileys) -> None:
    its.gateway("g1", "whaticket", logs=True)
    its.session("g1", "26")
    for code in (515, 440, 503, 428, 405, 403):
        its.end("g1", "26", code, reconnects=True)
        its.is_open("g1", "26")
    path = its.log("g1")
    assert [one["statusCode"] for one in records(path, "connection.update")] == [515, 440, 503, 428, 405, 403]
    assert [one["fullErrorNode"]["attrs"].get("code") for one in records(path, "stream errored out")] == [
        "515",
        None,
        "503",
    ]


def test_noise_and_duplicates_are_no_errors(its: Baileys) -> None:
    its.gateway("g1", "whaticket", logs=True, session_field="whatsappId")
    client.baileys_log(its.url, "g1", "noise", session="26")
    client.baileys_log(its.url, "g1", "duplicates", session="26", count=2)
    client.baileys_log(its.url, "g1", "lines", lines=["whatsappId=26 Bad MAC"])
    text = its.log("g1").read_text()
    assert "meu sistema deu erro Bad MAC" in text
    assert text.count("Session error:MessageCounterError: Key used already or never filled") == 2
    assert text.endswith("whatsappId=26 Bad MAC\n")


def test_a_log_is_rotated_by_name_or_truncated_in_place(its: Baileys) -> None:
    its.gateway("g1", "whaticket", logs=True)
    path = its.log("g1")
    client.baileys_log(its.url, "g1", "lines", lines=["one"])
    inode = path.stat().st_ino
    client.baileys_log(its.url, "g1", "rotate")
    client.baileys_log(its.url, "g1", "lines", lines=["two"])
    assert (path.read_text(), Path(f"{path}.1").read_text()) == ("two\n", "one\n")
    assert path.stat().st_ino != inode
    inode = path.stat().st_ino
    client.baileys_log(its.url, "g1", "truncate")
    client.baileys_log(its.url, "g1", "lines", lines=["three"])
    assert (path.read_text(), path.stat().st_ino) == ("three\n", inode)
