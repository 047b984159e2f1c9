"""The commands that speak to the simulated Baileys gateways."""

import json
import shutil
from collections.abc import Callable, Iterator

import pytest

from pombal.cli import main
from sandbox import client
from tests.sandbox.baileys_servers import Baileys, a_baileys
from tests.sandbox.megaapi_servers import Hook, a_hook

Run = Callable[..., str]


@pytest.fixture(scope="module")
def running() -> Iterator[Baileys]:
    with a_baileys() as its:
        yield its


@pytest.fixture
def hook() -> Iterator[Hook]:
    with a_hook() as its:
        yield its


@pytest.fixture
def its(running: Baileys, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> Iterator[Baileys]:
    """A stand-in with the demo's gateway and session."""
    monkeypatch.setenv("POMBAL_SANDBOX_URL", running.url)
    running.gateway("demo")
    running.session("demo", "1", webhook_url=hook.url)
    yield running
    client.baileys_stop_storm(running.url)
    client.baileys_remove(running.url)
    client.baileys_clear_faults(running.url)
    client.baileys_clear_calls(running.url)
    shutil.rmtree(running.root, ignore_errors=True)


@pytest.fixture
def run(its: Baileys, capsys: pytest.CaptureFixture[str]) -> Run:
    port = its.url.rpartition(":")[2]

    def run(*words: str, ends: int = 0) -> str:
        assert main(["sandbox", "--port", port, "baileys", *words]) == ends
        return capsys.readouterr().out

    return run


def test_a_customer_writes(run: Run, hook: Hook) -> None:
    told = run("say", "Olá", "--from", "5511944440007")
    message = hook.bodies[0]["data"]["messages"][0]
    assert (message["key"]["remoteJid"], message["message"]["conversation"]) == ("5511944440007@s.whatsapp.net", "Olá")
    assert message["key"]["id"] in told
    run("say", "--stub", "Bad MAC")
    assert hook.bodies[1]["data"]["messages"][0]["messageStubParameters"] == ["Bad MAC"]


def test_a_storm_comes_and_is_stopped(its: Baileys, run: Run) -> None:
    run("storm", "prekey", "--messages", "3", "--pace", "100", "--contacts", "2")
    its.until(lambda: len(json.loads(run("storm", "--json"))[0]["failed"]) >= 3)
    assert "stopped" in run("storm", "--stop")


def test_a_session_ends_and_is_scanned(its: Baileys, run: Run) -> None:
    run("end", "401")
    assert json.loads(run("sessions", "--json"))[0]["state"] == "closed"
    run("scan")
    its.is_open("demo", "1")
    assert "CONNECTED" in run("sessions")


def test_faults_are_set_and_calls_are_told(run: Run) -> None:
    assert "http500" in run("faults", "http500", "--place", "stop", "--count", "1")
    assert "nothing is set to go wrong" in run("faults", "--clear")
    assert "nothing was asked" in run("calls")
