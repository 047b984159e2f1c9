"""Sessions over the real web tier: started, watched, scanned and ended, whatever the kind of channel."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import httpx
import pytest

from models import Channel
from pombal.broker import HardenedBroker, broker
from pombal.cli import admin
from pombal.settings import settings
from sandbox import client
from sandbox.config import MegaInstance
from tests.factories import a_shop, all_of, seen_by
from tests.sandbox.megaapi_servers import a_megaapi
from tests.web.process import Web
from tests.workers.test_sessions import (
    KEY,
    TOKEN,
    Gateway,
    Line,
    a_gateway,
    a_line,
    channel_of,
    elapse,
    session_of,
    step,
    told,
)
from tests.workers.tools import until
from web import sessions
from web.errors import Failure
from workers import outgoing_message
from workers.channel_session import LOOK

pytestmark = pytest.mark.usefixtures("queues")

BASE = "/api/v1/whatsapp"
PNG = b"\x89PNG\r\n\x1a\n"


class Client:
    """Somebody with a key of one tenant."""

    def __init__(self, web: Web, line: Line, *scopes: str) -> None:
        _, key = admin.add_key(line.tenant.id, "a key", scopes or ("channels:manage", "messages:send", "messages:read"))
        self._http, self._headers = web.http, {"Authorization": f"Bearer {key}"}

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {**self._headers, **options.pop("headers", {})}
        return self._http.request(method, BASE + path, headers=headers, **options)

    def start(self, **options: Any) -> dict[str, Any]:
        answer = self.ask("POST", "/session/start", **options)
        assert answer.status_code == 202, answer.text
        started: dict[str, Any] = answer.json()
        return started

    def status(self) -> dict[str, Any]:
        answer = self.ask("GET", "/session/status")
        assert answer.status_code == 200, answer.text
        shown: dict[str, Any] = answer.json()
        return shown

    def qr(self, **options: Any) -> httpx.Response:
        return self.ask("GET", "/session/qr", **options)

    def stop(self) -> int:
        return self.ask("DELETE", "/session").status_code


@pytest.fixture
def line() -> Line:
    return a_line("stub")


@pytest.fixture
def somebody(web: Web, line: Line) -> Client:
    return Client(web, line)


@pytest.fixture
def _fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WHATSAPP_STUB_FAST", "1")
    settings.cache_clear()
    yield
    monkeypatch.undo()
    settings.cache_clear()


# -------------------------------------------------------------------------------------------------------------- a life


def test_a_stub_lives_as_a_real_session_does(somebody: Client, line: Line) -> None:
    new = somebody.status()
    assert (new["channel"], new["kind"], new["state"]) == (str(line.channel.id), "stub", "disconnected")
    assert (new["has_qr"], new["error"], new["wish"]) == (False, None, None)

    assert somebody.start() == {"channel": str(line.channel.id), "state": "connecting"}
    step(line)
    assert somebody.status()["state"] == "connecting"  # its second has not passed
    assert somebody.qr().status_code == 404

    elapse(line, 1)
    step(line)
    shown = somebody.status()
    assert (shown["state"], shown["has_qr"], shown["wish"]) == ("qrcode", True, "start")
    picture = somebody.qr()
    assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
    assert (picture.headers["cache-control"], picture.content[:8]) == ("no-store", PNG)

    elapse(line, 3)
    step(line)
    assert somebody.status()["state"] == "authenticated"
    assert somebody.qr().status_code == 404
    assert channel_of(line)["status"] is None

    elapse(line, 1)
    step(line)
    ready = somebody.status()
    assert (ready["state"], ready["wish"]) == ("ready", None)
    assert datetime.fromisoformat(ready["since"]) > datetime.fromisoformat(new["since"])
    assert channel_of(line)["status"] == "connected"

    assert somebody.stop() == 204
    step(line)
    assert somebody.status()["state"] == "disconnected"
    assert channel_of(line)["status"] == "disconnected"
    assert told(line) == ["connecting", "qrcode", "picture", "authenticated", "ready", "disconnected"]


@pytest.mark.usefixtures("_fast")
def test_a_fast_stub_is_ready_after_one_job(somebody: Client, line: Line) -> None:
    somebody.start()

    step(line)

    assert somebody.status()["state"] == "ready"
    assert told(line) == ["connecting", "qrcode", "picture", "authenticated", "ready"]


@pytest.mark.usefixtures("_fast")
def test_messages_go_through_a_stub(somebody: Client, line: Line) -> None:
    somebody.start()
    step(line)

    answer = somebody.ask("POST", "/messages", json={"to": "+5511944440001", "type": "text", "text": "Olá"})

    assert answer.status_code == 202
    outgoing_message(str(line.channel.id))
    row = the_message(line, answer.json()["message_id"])
    assert (row["status"], row["body"]) == ("sent", {"text": {"body": "Olá"}})
    assert row["provider_id"].startswith("stub-")


@pytest.mark.usefixtures("_fast")
def test_messages_wait_while_a_session_is_ended(somebody: Client, line: Line) -> None:
    somebody.start()
    step(line)
    somebody.stop()
    step(line)
    given = {"to": "+5511944440001", "type": "text", "text": {"body": "Olá"}}
    id_ = somebody.ask("POST", "/messages", json=given).json()["message_id"]
    outgoing_message(str(line.channel.id))
    assert the_message(line, id_)["status"] == "queued"

    somebody.start()
    step(line)
    outgoing_message(str(line.channel.id))

    assert the_message(line, id_)["status"] == "sent"


def the_message(line: Line, id_: str) -> dict[str, Any]:
    with seen_by(line.tenant) as s:
        (row,) = all_of(s, "SELECT status, body, provider_id FROM message WHERE id = :id", id=id_)
    return row


@pytest.mark.usefixtures("_near_gateways")
def test_a_session_at_a_simulated_gateway_from_start_to_end(web: Web) -> None:
    there = MegaInstance("shop", KEY, TOKEN, status="disconnected", number="5511955550200")
    with a_megaapi(there) as address:
        line = a_line("megaapi", host=address)
        somebody = Client(web, line)
        somebody.start()
        step(line)
        assert somebody.qr().content[:8] == PNG

        client.mega_scan(address, "shop")
        elapse(line, LOOK)
        step(line)
        assert somebody.status()["state"] == "ready"
        assert channel_of(line)["own_id"] == "5511955550200"

        assert somebody.stop() == 204
        step(line)
        assert somebody.status()["state"] == "disconnected"
        assert [call["outcome"] for call in client.mega_calls(address)["calls"]] == ["accepted"] * 5
    assert told(line) == ["connecting", "qrcode", "picture", "authenticated", "ready", "disconnected"]


def test_the_web_tier_asks_no_gateway(web: Web) -> None:
    with a_gateway() as gateway:
        line = a_line("megaapi", host=gateway.host)
        somebody = Client(web, line)
        somebody.start()
        somebody.status()
        somebody.qr()
        assert somebody.stop() == 204
        assert gateway.calls == []


def test_a_gateways_picture_is_shown_as_it_came(web: Web, gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    somebody = Client(web, line)
    somebody.start()
    step(line)

    picture = somebody.qr()

    assert picture.content == bytes(session_of(line)["qr"])
    assert picture.content[:8] == PNG


def test_an_error_stays_in_sight_until_it_is_over(web: Web, gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    somebody = Client(web, line)
    gateway.broken["status"] = (404, {"name": "NOT_FOUND", "message": "Instance not found", "status": 404})
    somebody.start()
    step(line)

    shown = somebody.status()

    assert (shown["state"], shown["wish"], shown["error"]["code"]) == ("connecting", "start", "not_found")
    assert gateway.host not in json.dumps(shown)
    gateway.broken.clear()
    somebody.start()
    step(line)
    assert somebody.status()["error"] is None


def test_a_picture_that_nobody_renewed_is_not_shown(somebody: Client, line: Line) -> None:
    somebody.start()
    elapse(line, 1)
    step(line)

    elapse(line, 61)

    assert somebody.qr().status_code == 404
    assert not somebody.status()["has_qr"]


# ---------------------------------------------------------------------------------------------------- asked more often


def test_to_ask_twice_is_to_ask_once(somebody: Client, line: Line) -> None:
    assert somebody.start() == somebody.start()
    assert told(line) == ["connecting"]

    assert [somebody.stop(), somebody.stop()] == [204, 204]
    step(line)
    assert somebody.stop() == 204
    step(line)
    assert told(line) == ["connecting", "disconnected"]


def test_a_session_that_was_never_started_can_be_ended(somebody: Client, line: Line) -> None:
    assert somebody.stop() == 204

    step(line)

    assert somebody.status()["state"] == "disconnected"


def test_what_is_to_be_ended_shows_no_picture(somebody: Client, line: Line) -> None:
    somebody.start()
    elapse(line, 1)
    step(line)
    assert somebody.qr().status_code == 200

    somebody.stop()

    assert somebody.qr().status_code == 404
    assert somebody.status()["wish"] == "stop"


def test_a_start_rings_for_its_job(somebody: Client, line: Line) -> None:
    somebody.start()

    assert isinstance(broker, HardenedBroker)
    bells = f"{broker.namespace}:channel_session.msgs"
    until(lambda: str(line.channel.id) in str(broker.client.hvals(bells)), "the bell")


# ------------------------------------------------------------------------------------------------- kinds and channels


def test_a_channel_of_metas_is_always_ready(web: Web) -> None:
    shop = a_shop()
    somebody = Client(web, Line(shop.tenant, shop.channel))

    assert somebody.start()["state"] == "ready"
    shown = somebody.status()
    assert (shown["kind"], shown["state"], shown["has_qr"]) == ("meta", "ready", False)
    assert somebody.qr().status_code == 404
    refused = somebody.ask("DELETE", "/session")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "CONFLICT")


def test_a_channel_is_named_by_id_or_name_where_there_are_several(web: Web, line: Line) -> None:
    second = a_line("stub", line.tenant)
    somebody = Client(web, line)

    unnamed = somebody.ask("POST", "/session/start")
    assert (unnamed.status_code, unnamed.json()["error"]["code"]) == (422, "INVALID_PAYLOAD")
    assert somebody.start(json={"channel": second.channel.name})["channel"] == str(second.channel.id)
    assert somebody.start(params={"channel": str(line.channel.id)})["channel"] == str(line.channel.id)

    with seen_by(line.tenant) as s:
        s.get_one(Channel, (line.tenant.id, second.channel.id)).config = {"default": True}
    assert somebody.status()["channel"] == str(second.channel.id)


def test_a_foreign_channel_looks_like_a_missing_one(web: Web, somebody: Client, line: Line) -> None:
    foreign = a_line("stub")
    missing = "0198c0de-0198-7000-8000-000000000000"
    for method, path in (
        ("POST", "/session/start"),
        ("GET", "/session/status"),
        ("GET", "/session/qr"),
        ("DELETE", "/session"),
    ):
        answers = [
            somebody.ask(method, path, params={"channel": name})
            for name in (str(foreign.channel.id), foreign.channel.name, missing)
        ]
        assert {answer.status_code for answer in answers} == {404}
        assert len({answer.json()["error"]["message"] for answer in answers}) == 1
    assert told(foreign) == []


@pytest.mark.parametrize("scope", ["messages:send", "messages:read"])
def test_sessions_need_their_scope(web: Web, line: Line, scope: str) -> None:
    somebody = Client(web, line, scope)

    asked = [
        somebody.ask("POST", "/session/start"),
        somebody.ask("GET", "/session/status"),
        somebody.qr(),
        somebody.ask("DELETE", "/session"),
    ]

    assert [answer.status_code for answer in asked] == [403] * 4
    assert told(line) == []


def test_who_manages_channels_may_not_send(web: Web, line: Line) -> None:
    somebody = Client(web, line, "channels:manage")

    answer = somebody.ask("POST", "/messages", json={"to": "+5511944440001", "type": "text", "text": "Olá"})

    assert answer.status_code == 403


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 422),
        (b'{"channel": 7}', 422),
        (b'{"channel": "a\\u0000b"}', 422),
        (b'{"chanel": "x"}', 422),
        (b"x" * 5000, 413),
        (b"", 202),
        (b"{}", 202),
    ],
)
def test_the_body_of_a_start_is_looked_at(somebody: Client, body: bytes, status: int) -> None:
    assert somebody.ask("POST", "/session/start", content=body).status_code == status


# ------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("query", "accept", "found"),
    [
        ("", "*/*", "image/png"),
        ("", "image/svg+xml", "image/svg+xml"),
        ("", "image/svg+xml, image/png;q=0.5", "image/svg+xml"),
        ("", "image/avif,image/webp,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5", "image/png"),
        ("", "nonsense;q=x, ;;, =", "image/png"),
        ("?format=svg", "image/png", "image/svg+xml"),
        ("?format=png", "image/svg+xml", "image/png"),
    ],
)
def test_a_picture_comes_as_it_is_wanted(somebody: Client, line: Line, query: str, accept: str, found: str) -> None:
    somebody.start()
    elapse(line, 1)
    step(line)

    picture = somebody.ask("GET", f"/session/qr{query}", headers={"Accept": accept})

    assert picture.headers["content-type"].partition(";")[0] == found
    assert picture.headers["cache-control"] == "no-store"
    if found == "image/svg+xml":
        (image,) = ET.fromstring(picture.content).iter("{http://www.w3.org/2000/svg}image")  # noqa: S314 - our own
        assert image.attrib["href"].startswith("data:image/png;base64,")


def test_another_format_is_refused(somebody: Client) -> None:
    answer = somebody.qr(params={"format": "gif"})

    assert (answer.status_code, answer.json()["error"]["details"]["limit"]) == (422, ["png", "svg"])


# ------------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    "given",
    [
        {"text": "Olá"},
        {"text": {"body": "Olá"}},
        {"payload": "Olá"},
        {"payload": {"text": "Olá"}},
        {"payload": {"body": "Olá"}},
    ],
)
@pytest.mark.parametrize("to", ["+5511944440001", "5511944440001"])
def test_a_text_may_be_given_in_any_of_its_forms(given: dict[str, Any], to: str) -> None:
    ask = sessions.asked(json.dumps({"to": to, "type": "text", **given}).encode())

    assert (ask.type, ask.recipient, ask.element) == ("text", "+5511944440001", {"body": "Olá"})


def test_other_types_take_their_payload_as_it_is() -> None:
    element = {"latitude": -23.5, "longitude": -46.6}

    ask = sessions.asked(json.dumps({"to": "+5511944440001", "type": "location", "payload": element}).encode())

    assert ask.element == element


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"type": "text", "payload": {"body": ""}}, "$.payload.body"),
        ({"type": "text", "payload": 7}, "$.payload"),
        ({"type": "text", "payload": "x", "text": "y"}, "$.payload"),
        ({"type": "text", "text": ""}, "$.text.body"),
        ({"type": "text"}, "$.text"),
        ({"type": "fax", "payload": "x"}, "$.type"),
        ({"type": "text", "payload": "x", "colour": "red"}, "$.colour"),
    ],
)
def test_a_wrong_message_is_refused_by_its_field(given: dict[str, Any], field: str) -> None:
    with pytest.raises(Failure) as refused:
        sessions.asked(json.dumps({"to": "+5511944440001", **given}).encode())

    assert refused.value.details["field"] == field
    assert refused.value.message.startswith(field)


@pytest.fixture
def gateway(_near_gateways: None) -> Iterator[Gateway]:
    with a_gateway() as one:
        yield one
