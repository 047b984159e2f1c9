"""`pombal sandbox …`: what a developer sets and sees in a terminal."""

from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from pombal.cli import main
from pombal.settings import settings
from sandbox import client
from sandbox.config import Channel
from sandbox.faults import BEFORE
from sandbox.kinds import KINDS
from tests.sandbox.servers import a_meta
from tests.sandbox.test_graph import a_text, accepted, refused

SHOP = Channel("shop", "880011223344556", "700100200300400")


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with a_meta(SHOP) as address:
        monkeypatch.setenv("POMBAL_SANDBOX_URL", address)
        settings.cache_clear()
        yield address
    monkeypatch.undo()
    settings.cache_clear()


class Terminal:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> str:
        code = main(["sandbox", *arguments])
        out, err = self._capsys.readouterr()
        assert (code, err) == (0, ""), out
        return out

    def json(self, *arguments: str) -> Any:
        return msgspec.json.decode(self(*arguments))

    def refused(self, *arguments: str) -> str:
        assert main(["sandbox", *arguments]) == 1
        return self._capsys.readouterr().err


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(capsys)


def send(control: str) -> httpx.Response:
    url = f"{control}/v25.0/{SHOP.phone_number_id}/messages"
    return httpx.post(url, json=a_text(), headers={"Authorization": "Bearer t"})


def test_a_fault_is_set_listed_and_cleared(terminal: Terminal, control: str) -> None:
    said = terminal("faults", "code", "--code", "131056", "--channel", "shop", "--count", "2")

    assert said.splitlines()[0].split() == ["ID", "KIND", "CHANNEL", "MET", "MORE"]
    assert said.splitlines()[1].split() == ["1", "code", "shop", "0", "count=2", "code=131056"]
    assert refused(send(control)) == (400, 131056)
    (fault,) = terminal.json("faults", "--json")
    assert fault["met"] == 1
    assert terminal("faults", "--clear") == "nothing is set to go wrong\n"
    accepted(send(control))


def test_clearing_comes_before_setting(terminal: Terminal, control: str) -> None:
    terminal("faults", "html")

    (fault,) = terminal.json("faults", "outage", "--share", "0.5", "--seconds", "60", "--clear", "--json")

    assert (fault["kind"], fault["share"], fault["seconds"]) == ("outage", 0.5, 60)


def test_a_fault_nobody_knows_is_answered_with_those_that_there_are(
    control: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sandbox", "faults", "meteor"])
    with pytest.raises(client.SandboxError) as refused:
        client.faults(control, "meteor")

    assert ended.value.code == 2
    for said in (capsys.readouterr().err, str(refused.value)):
        assert "'meteor'" in said
        assert [kind for kind in KINDS if kind not in said] == []


def test_help_has_a_line_for_each_kind_of_fault(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sandbox", "faults", "--help"])

    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [kind for kind, does in KINDS.items() if f"{kind} {does}" not in lines] == []
    assert any(line.startswith("--clear") for line in lines)
    assert set(KINDS) >= BEFORE


def test_every_kind_of_fault_can_be_set(control: str) -> None:
    for kind in KINDS:
        client.faults(control, kind)

    assert [fault["kind"] for fault in client.faults(control)["faults"]] == list(KINDS)


def test_clearing_the_calls_sets_the_count_of_statuses_to_zero(terminal: Terminal, control: str) -> None:
    client.rules(control, statuses={"words": ["sent", "delivered"], "delay": [0, 0]})
    send(control)
    while (statuses := client.summary(control)["statuses"])["waiting"]:
        pass
    assert statuses["sent"] == 2

    assert terminal("calls", "--clear") == "nothing was sent\n"

    assert client.summary(control)["statuses"] == {"waiting": 0, "sent": 0}


def test_rules_are_set_and_shown(terminal: Terminal, control: str) -> None:
    shown = terminal.json(
        *("rules", "--window", "--rate", "80", "--statuses", "sent,failed", "--delay", "0", "1.5", "--lost", "0.1")
    )["rules"]

    assert (shown["window"], shown["pair"], shown["rate"]) == (True, False, 80)
    assert shown["statuses"]["words"] == ["sent", "failed"]
    assert (shown["statuses"]["delay"], shown["statuses"]["lost"]) == ([0, 1.5], 0.1)
    again = terminal.json("rules", "--no-window", "--rate", "off", "--channel", "shop", "--statuses", "")
    assert again["rules"]["window"] is True
    assert (again["channels"]["shop"]["window"], again["channels"]["shop"]["rate"]) == (False, None)
    assert again["channels"]["shop"]["statuses"]["words"] == []
    assert terminal.json("rules", "--clear")["rules"]["rate"] is None
    assert "a number or `off`" in terminal.refused("rules", "--rate", "fast")


def test_rules_of_media_are_set_and_shown(terminal: Terminal, control: str) -> None:
    shown = terminal.json(
        *("rules", "--no-check-media", "--url-seconds", "1", "--media-bytes", "100000"),
        *("--media-seconds", "60", "--upload-seconds", "0.5"),
    )["rules"]

    names = ("check_media", "url_seconds", "media_bytes", "media_seconds", "upload_seconds")
    assert [shown[name] for name in names] == [False, 1, 100_000, 60, 0.5]
    assert terminal.json("rules", "--media-bytes", "off")["rules"]["media_bytes"] is None
    assert "--media-bytes is a number or `off`" in terminal.refused("rules", "--media-bytes", "large")


def test_faults_of_media_are_set_and_requests_for_files_listed(terminal: Terminal, control: str) -> None:
    url = client.add_media_file(control, "image/jpeg", id="77", channel="shop")["object"]["url"]
    terminal("faults", "download_status", "--http", "404", "--to", "77", "--count", "1")
    terminal("faults", "download_close", "--bytes", "9")
    (_, close) = terminal.json("faults", "download_redirect", "--location", "http://10.0.0.1/", "--json")[:2]
    bearer = {"Authorization": "Bearer t"}

    assert httpx.get(url, headers=bearer).status_code == 404
    assert httpx.get(url).status_code == 401

    assert close["bytes"] == 9
    lines = [line.split() for line in terminal("media").splitlines()]
    assert [line[1:6] for line in lines[1:]] == [
        ["download", "77", "shop", "True", "404"],
        ["download", "77", "shop", "False", "401"],
    ]
    (event,) = terminal.json("media", "--limit", "1", "--kind", "download", "--id", "77", "--json")
    assert event["http"] == 401
    assert terminal.json("media", "--summary")["by_fault"] == {"download_status": 1}
    assert terminal("media", "--clear") == "nothing was asked\n"


def test_calls_are_listed_counted_and_forgotten(terminal: Terminal, control: str) -> None:
    terminal("faults", "html", "--count", "1")
    send(control)
    send(control)

    lines = terminal("calls").splitlines()
    assert [line.split()[4] for line in lines[1:]] == ["dropped_before", "accepted"]
    (call,) = terminal.json("calls", "--limit", "1", "--channel", "shop", "--json")
    assert (call["outcome"], call["text"]) == ("accepted", "Pedido confirmado")
    summary = terminal.json("calls", "--summary")
    assert (summary["calls"], summary["accepted"]) == (2, 1)
    assert terminal("calls", "--clear") == "nothing was sent\n"
