"""The simulated Baileys gateways: what each dialect answers, how sessions start and stop, and what goes wrong."""

import base64
import shutil
from collections.abc import Iterator

import httpx
import pytest

from sandbox import client
from sandbox.client import SandboxError
from sandbox.kinds import BAILEYS_KINDS
from sandbox.meta import JSON
from tests.sandbox.baileys_servers import API_KEY, Baileys, a_baileys
from tests.sandbox.megaapi_servers import Hook, a_hook

BEARER = {"Authorization": f"Bearer {API_KEY}"}


@pytest.fixture(scope="module")
def running() -> Iterator[Baileys]:
    with a_baileys() as its:
        yield its


@pytest.fixture
def its(running: Baileys) -> Iterator[Baileys]:
    yield running
    client.baileys_stop_storm(running.url)
    client.baileys_remove(running.url)
    client.baileys_clear_faults(running.url)
    client.baileys_clear_calls(running.url)
    shutil.rmtree(running.root, ignore_errors=True)


@pytest.fixture
def hook() -> Iterator[Hook]:
    with a_hook() as its:
        yield its


def ask(
    its: Baileys, method: str, path: str, *, headers: dict[str, str] | None = None, **more: object
) -> httpx.Response:
    return httpx.request(
        method,
        its.host("g1") + path,
        headers=BEARER if headers is None else headers,
        trust_env=False,
        timeout=10,
        **more,  # type: ignore[arg-type] # of httpx
    )


# The Whaticket family


def test_whaticket_lists_stops_and_starts_a_session_without_losing_its_pairing(its: Baileys) -> None:
    its.gateway("g1", "whaticket")
    its.session("g1", "26")
    registration = its.look("g1", "26")["registration_id"]
    assert [(one["id"], one["status"]) for one in ask(its, "GET", "/whatsapp").json()] == [(26, "CONNECTED")]
    assert ask(its, "PUT", "/whatsapp/26/disconnect").status_code == 200
    assert ask(its, "GET", "/whatsapp/").json()[0]["status"] == "DISCONNECTED"
    assert ask(its, "PUT", "/whatsapp/26/start-session").status_code == 200
    its.is_open("g1", "26")
    assert its.look("g1", "26")["registration_id"] == registration
    assert its.operations("g1", "26") == ["stop", "start"]
    assert ask(its, "GET", "/health", headers={}).status_code == 200


@pytest.mark.parametrize("dialect", ["whaticket", "ticketz", "evolution", "waha", "fazer"])
def test_every_dialect_refuses_a_wrong_key(its: Baileys, dialect: str) -> None:
    its.gateway("g1", dialect)
    its.session("g1", "+5511955550301")
    path = {"evolution": "/instance/fetchInstances", "waha": "/api/sessions", "fazer": "/status"}.get(
        dialect, "/whatsapp"
    )
    for headers in ({}, {"Authorization": "Bearer no", "apikey": "no", "x-api-key": "no"}):
        assert ask(its, "GET", path, headers=headers).status_code == 401
    assert [call["key"] for call in its.calls()] == ["none", "wrong"]
    assert {call["outcome"] for call in its.calls()} == {"refused"}


def test_ticketz_refreshes_and_a_logout_needs_a_new_code(its: Baileys) -> None:
    its.gateway("g1", "ticketz")
    its.session("g1", "7")
    assert ask(its, "GET", "/whatsappsession/refresh/7").status_code == 200
    its.is_open("g1", "7")
    assert ask(its, "DELETE", "/whatsappsession/7").status_code == 200
    assert ask(its, "POST", "/whatsappsession/7").status_code == 200
    its.until(lambda: its.state("g1", "7") == "qr")
    row = ask(its, "GET", "/whatsapp/").json()[0]
    assert row["status"] == "qrcode"
    assert row["qrcode"].startswith("2@")
    its.scan("g1", "7")
    its.is_open("g1", "7")


def test_a_path_of_ones_own_makes_a_call(its: Baileys) -> None:
    its.gateway("g1", "ticketz", paths={"refresh_contact": "POST /fresh/{session}/{jid}"})
    its.session("g1", "7")
    assert ask(its, "POST", "/fresh/7/5511944440001@s.whatsapp.net").status_code == 200
    assert its.operations("g1", "7") == ["refresh_contact"]


# Evolution, WAHA, fazer-ai


def test_evolution_connects_restarts_and_refuses_a_restart_when_closed(its: Baileys, hook: Hook) -> None:
    its.gateway("g1", "evolution")
    its.session("g1", "loja", webhook_url=hook.url)
    key = {"apikey": API_KEY}
    assert ask(its, "GET", "/instance/connectionState/loja", headers=key).json()["instance"]["state"] == "open"
    assert ask(its, "POST", "/instance/restart/loja", headers=key).status_code == 200
    its.is_open("g1", "loja")
    hook.until(lambda bodies: any(body["data"].get("state") == "open" for body in bodies))
    its.end("g1", "loja", 403)
    told = hook.until(lambda bodies: any(body["event"] == "status.instance" for body in bodies))
    assert [one["data"]["disconnectionReasonCode"] for one in told if one["event"] == "status.instance"] == [403]
    assert ask(its, "POST", "/instance/restart/loja", headers=key).status_code == 400
    assert ask(its, "GET", "/instance/connect/loja", headers=key).json()["instance"]["state"] == "open"
    assert ask(its, "GET", "/instance/connectionState/none", headers=key).status_code == 404
    assert its.operations("g1", "loja") == ["state", "restart", "restart", "start"]


def test_evolution_gives_a_code_as_text_and_picture(its: Baileys, hook: Hook) -> None:
    its.gateway("g1", "evolution")
    its.session("g1", "loja", paired=False, open=False, webhook_url=hook.url)
    told = ask(its, "GET", "/instance/connect/loja", headers={"apikey": API_KEY}).json()
    assert told["code"].startswith("2@")
    assert told["base64"].startswith("data:image/png;base64,iVBOR")
    by_hook = hook.until(lambda bodies: any(body["event"] == "qrcode.updated" for body in bodies))[-1]
    assert by_hook["data"]["qrcode"]["code"] == told["code"]
    assert by_hook["apikey"] == API_KEY


def test_evolution_keeps_a_webhook(its: Baileys) -> None:
    its.gateway("g1", "evolution")
    its.session("g1", "loja")
    key = {"apikey": API_KEY}
    assert ask(its, "GET", "/webhook/find/loja", headers=key).json() is None
    wanted = {"webhook": {"enabled": True, "url": "http://127.0.0.1:9/hook", "events": ["MESSAGES_UPSERT"]}}
    assert ask(its, "POST", "/webhook/set/loja", headers=key, json=wanted).status_code == 201
    assert ask(its, "GET", "/webhook/find/loja", headers=key).json()["url"] == "http://127.0.0.1:9/hook"


def test_waha_tells_its_words_and_a_picture_of_the_code(its: Baileys) -> None:
    its.gateway("g1", "waha")
    its.session("g1", "s1")
    key = {"X-Api-Key": API_KEY}
    for action, word in (("stop", "STOPPED"), ("start", "WORKING"), ("restart", "WORKING"), ("logout", "STOPPED")):
        assert ask(its, "POST", f"/api/sessions/s1/{action}", headers=key).status_code == 201
        its.until(lambda word=word: ask(its, "GET", "/api/sessions/s1", headers=key).json()["status"] == word)  # type: ignore[misc]
    ask(its, "POST", "/api/sessions/s1/start", headers=key)
    its.until(lambda: its.state("g1", "s1") == "qr")
    assert ask(its, "GET", "/api/s1/auth/qr", headers=key).content.startswith(b"\x89PNG")
    assert ask(its, "GET", "/ping", headers={}).status_code == 200


def test_fazer_connects_a_number_it_has_not_seen(its: Baileys, hook: Hook) -> None:
    its.gateway("g1", "fazer")
    key = {"x-api-key": API_KEY}
    given = {"webhookUrl": hook.url, "webhookVerifyToken": "verify-1"}
    assert ask(its, "POST", "/connections/+5511955550309", headers=key, json=given).status_code == 200
    told = hook.until(lambda bodies: any("qrDataUrl" in body["data"] for body in bodies))
    assert {body["webhookVerifyToken"] for body in told} == {"verify-1"}
    sent = {"jid": "5511944440001@s.whatsapp.net", "messageContent": {"text": "Olá"}}
    refused = ask(its, "POST", "/connections/+5511955550309/send-message", headers=key, json=sent)
    assert (refused.status_code, refused.text) == (404, "Phone number not connected")


# Sending


SENDS: dict[str, tuple[str, dict[str, str], JSON]] = {
    "whaticket": ("/api/messages/send", BEARER, {"number": "5511944440001", "body": "Olá"}),
    "evolution": ("/message/sendText/26", {"apikey": API_KEY}, {"number": "5511944440001", "text": "Olá"}),
    "waha": ("/api/sendText", {"X-Api-Key": API_KEY}, {"session": "26", "chatId": "5511944440001@c.us", "text": "Olá"}),
    "fazer": (
        "/connections/26/send-message",
        {"x-api-key": API_KEY},
        {"jid": "5511944440001@s.whatsapp.net", "messageContent": {"text": "Olá"}},
    ),
}


@pytest.mark.parametrize("dialect", SENDS)
def test_a_text_that_is_sent_comes_back_as_an_echo_and_acks(its: Baileys, hook: Hook, dialect: str) -> None:
    path, headers, body = SENDS[dialect]
    its.gateway("g1", dialect)
    its.session("g1", "26", webhook_url=hook.url)
    answer = ask(its, "POST", path, headers=headers, json=body)
    assert answer.is_success
    call = its.calls(operation="send")[0]
    assert (call["to"], call["text"], call["outcome"]) == ("5511944440001@s.whatsapp.net", "Olá", "accepted")
    assert (call["id"] in answer.text) == (dialect != "whaticket")
    bodies = hook.until(lambda bodies: len(bodies) == 4)
    assert all(call["id"] in str(body) for body in bodies)
    last = {"whaticket": 4, "fazer": 4, "evolution": "READ", "waha": 3}[dialect]
    data = bodies[-1]["payload"] if dialect == "waha" else bodies[-1]["data"]
    numbers = (
        [data["ack"] if dialect == "waha" else data["status"]]
        if isinstance(data, dict)
        else [data[0]["update"]["status"]]
    )
    assert numbers == [last]


def test_files_are_taken_by_base64_by_link_and_in_a_form(its: Baileys) -> None:
    png = b"\x89PNG\r\n\x1a\n"
    encoded = base64.b64encode(png).decode()
    its.gateway("g1", "evolution")
    its.session("g1", "26")
    given = {"number": "5511944440001", "mediatype": "image", "mimetype": "image/png", "fileName": "a.png"}
    for media in (encoded, "https://example.org/a.png"):
        sent = ask(its, "POST", "/message/sendMedia/26", headers={"apikey": API_KEY}, json={**given, "media": media})
        assert sent.status_code == 201
    assert [(call["size"], call["url"]) for call in its.calls()] == [(8, None), (None, "https://example.org/a.png")]
    client.baileys_remove(its.url)
    its.gateway("g1", "whaticket")
    its.session("g1", "26")
    file = {"medias": ("a.png", png, "image/png")}
    form = {"number": "5511944440001", "body": "Foto"}
    assert ask(its, "POST", "/api/messages/send", data=form, files=file).status_code == 200
    call = its.calls(operation="send")[-1]
    assert (call["type"], call["text"], call["size"]) == ("image", "Foto", 8)


def test_nothing_is_sent_by_a_session_that_is_closed(its: Baileys) -> None:
    its.gateway("g1", "waha")
    its.session("g1", "26", open=False)
    path, headers, body = SENDS["waha"]
    answer = ask(its, "POST", path, headers=headers, json=body)
    assert answer.status_code == 422
    assert answer.json()["message"].startswith("Session status is not as expected")
    assert its.calls()[0]["id"] is None


# Habits and faults


def test_a_session_may_ask_for_a_code_after_its_next_start(its: Baileys) -> None:
    its.gateway()
    its.session("g1", "26")
    its.habits("g1", "26", asks_qr_after_start=True)
    ask(its, "PUT", "/whatsapp/26/disconnect")
    ask(its, "PUT", "/whatsapp/26/start-session")
    its.until(lambda: its.state("g1", "26") == "qr")
    assert its.look("g1", "26")["qrs"] == 1


def test_a_stop_may_be_slow_or_ignored(its: Baileys) -> None:
    its.gateway()
    its.session("g1", "26")
    its.habits("g1", "26", slow_stop=0.4)
    ask(its, "PUT", "/whatsapp/26/disconnect")
    assert its.state("g1", "26") == "open"
    its.until(lambda: its.state("g1", "26") == "closed")
    ask(its, "PUT", "/whatsapp/26/start-session")
    its.is_open("g1", "26")
    its.habits("g1", "26", slow_stop=0, stop_is_ignored=True)
    assert ask(its, "PUT", "/whatsapp/26/disconnect").status_code == 200
    assert its.state("g1", "26") == "open"


def test_a_gateway_may_be_down_or_a_session_hang(its: Baileys) -> None:
    its.gateway()
    its.session("g1", "26")
    its.habits("g1", down="unhealthy")
    assert ask(its, "GET", "/health").status_code == 503
    its.habits("g1", down="500")
    assert ask(its, "GET", "/whatsapp").status_code == 500
    its.habits("g1", down="reset")
    with pytest.raises(httpx.HTTPError):
        ask(its, "GET", "/whatsapp")
    its.habits("g1", down=None)
    its.habits("g1", "26", hangs=True)
    with pytest.raises(httpx.TimeoutException):
        httpx.put(its.host("g1") + "/whatsapp/26/disconnect", headers=BEARER, timeout=0.2, trust_env=False)
    assert its.state("g1", "26") == "open"


@pytest.mark.parametrize("kind", [kind for kind in BAILEYS_KINDS if not kind.startswith(("hang", "drip", "latency"))])
def test_every_fault_happens_once_and_is_journalled(its: Baileys, kind: str) -> None:
    its.gateway()
    its.session("g1", "26")
    its.faults(kind, place="stop", session="26", count=1)
    try:
        answer: httpx.Response | None = ask(its, "PUT", "/whatsapp/26/disconnect")
    except httpx.HTTPError:
        answer = None
    call = its.calls()[-1]
    assert call["fault"] == kind
    assert (answer is None) == kind.startswith("reset")
    is_done = call["outcome"] == "accepted"
    assert its.state("g1", "26") == ("closed" if is_done else "open")
    assert ask(its, "PUT", "/whatsapp/26/disconnect").json() == {"message": "Session disconnected."}


def test_unknown_gateways_and_sessions_are_refused_by_the_control_routes(its: Baileys) -> None:
    its.gateway()
    for name in ("none", "g1"):
        with pytest.raises(SandboxError, match="no "):
            its.look(name, "26")
    with pytest.raises(SandboxError, match="already"):
        its.gateway()
