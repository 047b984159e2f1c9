"""`pombal sandbox megaapi …`: what a developer says through the simulated MegaAPI, and sees of it."""

from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from pombal.cli import main
from pombal.settings import settings
from sandbox import client
from sandbox.config import MegaInstance
from sandbox.kinds import MEGAAPI_KINDS
from tests.sandbox.megaapi_servers import Hook, a_hook, a_megaapi

KEY = "megastart-demo"


@pytest.fixture(scope="module")
def hook() -> Iterator[Hook]:
    with a_hook() as running:
        yield running


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch, hook: Hook) -> Iterator[str]:
    hook.clear()
    instances = (
        MegaInstance("demo-megaapi", KEY, "t", webhook_url=hook.url),
        MegaInstance("deaf", "megastart-deaf", "t"),
    )
    with a_megaapi(*instances) as address:
        monkeypatch.setenv("POMBAL_SANDBOX_URL", address)
        settings.cache_clear()
        yield address
    monkeypatch.undo()
    settings.cache_clear()


class Terminal:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str, code: int = 0) -> str:
        ended = main(["sandbox", "megaapi", *arguments])
        out, err = self._capsys.readouterr()
        assert (ended, err) == (code, ""), out
        return out

    def json(self, *arguments: str) -> Any:
        return msgspec.json.decode(self(*arguments))


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(capsys)


def status(control: str) -> httpx.Response:
    headers = {"Authorization": "Bearer t"}
    return httpx.get(f"{control}/rest/instance/{KEY}", headers=headers, trust_env=False)


def test_a_message_is_said_and_its_id_is_told(terminal: Terminal, control: str, hook: Hook) -> None:
    said = terminal("say", "Bom dia", "--from", "5511944440007")
    terminal("say", "--kind", "image", "--group", "120363042378568057@g.us", "--from-me")

    text, image = hook.bodies
    assert said == f"{text['key']['id']}  answered 200\n"
    assert (text["message"]["conversation"], text["key"]["remoteJid"]) == ("Bom dia", "5511944440007@s.whatsapp.net")
    assert (image["messageType"], image["key"]["fromMe"], image["isGroup"]) == ("imageMessage", True, True)
    assert "no webhook is set" in terminal("say", "Oi", "--instance", "deaf", code=1)


def test_an_instance_drops_loudly_or_in_silence(terminal: Terminal, control: str, hook: Hook) -> None:
    terminal("connection", "disconnected")
    terminal("connection", "connected", "--silent")

    assert [body["message"] for body in hook.bodies] == ["phone_disconnected"]
    lines = terminal("instances").splitlines()
    assert lines[0].split() == ["NAME", "INSTANCE_KEY", "STATUS", "NUMBER", "WEBHOOK_ENABLED", "WEBHOOK"]
    assert lines[1].split() == ["demo-megaapi", KEY, "connected", "5511955550200", "True", "True"]
    assert [one["name"] for one in terminal.json("instances", "--json")] == ["demo-megaapi", "deaf"]


def test_a_fault_is_set_listed_and_cleared(terminal: Terminal, control: str) -> None:
    said = terminal("faults", "http429", "--place", "status", "--instance", "demo-megaapi", "--retry-after", "9")

    assert said.splitlines()[1].split() == ["1", "http429", KEY, "0", "retry_after=9", "place=status"]
    assert status(control).headers["retry-after"] == "9"
    assert terminal.json("faults", "--json")[0]["met"] == 1
    assert terminal("faults", "--clear") == "nothing is set to go wrong\n"
    assert status(control).status_code == 200


def test_what_was_asked_is_listed_and_counted(terminal: Terminal, control: str) -> None:
    status(control)

    assert terminal("calls").splitlines()[1].split() == ["1", "status", KEY, "accepted", "200", "True"]
    assert terminal("calls", "--place", "send") == "nothing was asked\n"
    assert terminal.json("calls", "--json", "--instance", "demo-megaapi")[0]["user_agent"].startswith("python-httpx/")
    assert terminal.json("calls", "--summary")["polled"] == 1
    assert terminal("calls", "--clear") == "nothing was asked\n"
    assert client.mega_summary(control)["calls"] == 0


def test_help_tells_every_kind_of_fault(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sandbox", "megaapi", "faults", "--help"])

    said = capsys.readouterr().out
    assert all(f"  {kind} " in said for kind in MEGAAPI_KINDS)
