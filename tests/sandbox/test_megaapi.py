"""The simulated MegaAPI host: who may ask, what it answers, what it refuses, and what goes wrong on purpose."""

import base64
import hashlib
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from sandbox import client
from sandbox.app import create_app
from sandbox.client import SandboxError
from sandbox.config import MegaInstance
from sandbox.kinds import MEGAAPI_KINDS, MEGAAPI_PLACES, megaapi_fits
from sandbox.meta import JSON
from tests.sandbox.megaapi_servers import HOST_TOKEN, Hook, a_hook, a_megaapi
from tests.sandbox.servers import serve

SHOP = MegaInstance("shop", "megastart-shop", "token-1", number="5511955550201")
AWAY = MegaInstance("away", "megastart-away", "token-2", status="disconnected")
CUSTOMER = "5511944440001@s.whatsapp.net"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def running() -> Iterator[str]:
    with a_megaapi(SHOP, AWAY) as address:
        yield address


@pytest.fixture
def control(running: str) -> str:
    """A host as good as new."""
    client.mega_clear_faults(running)
    client.mega_clear_rules(running)
    client.mega_remove(running)
    client.mega_status(running, "connected", ["shop"])
    client.mega_status(running, "disconnected", ["away"])
    client.mega_clear_calls(running)
    return running


@pytest.fixture
def api(control: str) -> Iterator[httpx.Client]:
    with asking(control, "token-1") as http:
        yield http


@pytest.fixture
def all_of(control: str) -> Iterator[httpx.Client]:
    """With the host's token."""
    with asking(control, HOST_TOKEN) as http:
        yield http


def asking(address: str, token: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(base_url=f"{address}/rest", headers=headers, trust_env=False, timeout=5)


def told(answer: httpx.Response) -> JSON:
    assert answer.status_code == 200, answer.text
    body: JSON = answer.json()
    assert body.get("error") is False, body
    return body


def send(api: httpx.Client, path: str = "text", **data: Any) -> httpx.Response:
    given = {"text": "Pedido confirmado"} if path == "text" and not data.keys() - {"to"} else {}
    return api.post(f"/sendMessage/{SHOP.instance_key}/{path}", json={"messageData": {"to": CUSTOMER, **given, **data}})


def last(control: str) -> JSON:
    call: JSON = client.mega_calls(control, limit=1)["calls"][-1]
    return call


# Status


def test_a_status_has_the_user_with_a_device_suffix(api: httpx.Client) -> None:
    body = told(api.get("/instance/megastart-shop"))

    assert body["message"] == "Instance data fetched"
    assert body["instance"]["key"] == "megastart-shop"
    assert body["instance"]["status"] == "connected"
    assert body["instance"]["user"]["id"] == "5511955550201:12@s.whatsapp.net"


def test_the_user_outlives_a_disconnect_but_not_a_logout(api: httpx.Client, control: str) -> None:
    client.mega_status(control, "disconnected", ["shop"])
    away = told(api.get("/instance/megastart-shop"))["instance"]
    told(api.request("DELETE", "/instance/megastart-shop/logout"))

    out = told(api.get("/instance/megastart-shop"))["instance"]

    assert (away["status"], "user" in away) == ("disconnected", True)
    assert (out["status"], "user" in out) == ("disconnected", False)


def test_the_list_is_for_the_hosts_token_and_has_every_instance(api: httpx.Client, all_of: httpx.Client) -> None:
    refused = api.get("/instance/list")

    listed = told(all_of.get("/instance/list"))

    assert refused.status_code == 401
    assert {one["key"]: one["status"] for one in listed["instances"]} == {
        "megastart-shop": "connected",
        "megastart-away": "disconnected",
    }
    assert listed["createdInstances"] == 2


def test_another_token_is_refused_as_the_family_of_apis_does(control: str) -> None:
    for token in ("token-2", "", "x"):
        with asking(control, token) as http:
            answer = http.get("/instance/megastart-shop")

        assert answer.status_code == 401
        assert answer.json() == {"name": "UNAUTHORIZED", "message": "Unauthorized", "status": 401, "errors": []}
    assert [call["token"] for call in client.mega_calls(control)["calls"]] == ["wrong", "none", "wrong"]


def test_an_unknown_key_is_not_found(all_of: httpx.Client) -> None:
    answer = all_of.get("/instance/megastart-gone")

    assert (answer.status_code, answer.json()["message"]) == (404, "Instance not found")


def test_a_client_without_a_name_of_its_own_is_blocked_at_the_edge(control: str) -> None:
    request = urllib.request.Request(f"{control}/rest/instance/megastart-shop")  # noqa: S310 - it is ours
    request.add_header("Authorization", "Bearer token-1")

    with pytest.raises(urllib.error.HTTPError) as blocked:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)

    assert blocked.value.code == 403
    assert "text/html" in blocked.value.headers["content-type"]
    assert b"Cloudflare" in blocked.value.read()
    assert last(control)["reason"] == "user agent"


def test_hundreds_of_instances_are_added_at_once_and_removed_again(control: str, all_of: httpx.Client) -> None:
    added = client.mega_add(control, count=300, prefix="many", token="t")["instances"]
    client.mega_status(control, "disconnected", [added[0]["name"], added[-1]["instance_key"]])

    assert added[299] == {"name": "many-000300", "instance_key": "many-000300", "token": "t"}
    assert client.mega_instances(control)["by_status"] == {"connected": 299, "disconnected": 3}
    assert len(told(all_of.get("/instance/list"))["instances"]) == 302

    client.mega_remove(control, "many-000001")
    assert all_of.get("/instance/many-000001").status_code == 404
    assert client.mega_remove(control) == {"count": 2}


def test_the_most_requests_at_once_are_counted_by_place(control: str) -> None:
    client.mega_faults(control, "latency", place="status", ms=200)

    with asking(control, "token-1") as http, ThreadPoolExecutor(5) as threads:
        answers = list(threads.map(http.get, ["/instance/megastart-shop"] * 5))
        http.get("/webhook/megastart-shop")

    assert {answer.status_code for answer in answers} == {200}
    summary = client.mega_summary(control)
    assert summary["most_in_flight"] == {"status": 5, "webhook": 1}
    assert summary["in_flight"] == {}
    assert (summary["polled"], summary["polled_max"]) == (1, 5)


def test_a_file_that_changes_brings_and_takes_instances(tmp_path: Path) -> None:
    config = tmp_path / "sandbox.json"
    one = {"name": "a", "instance_key": "key-a", "token": "t"}
    config.write_text(json.dumps({"megaapi": {"host_token": "h", "instances": [one]}}))

    with serve(create_app(config)) as address:
        client.mega_status(address, "disconnected", ["a"])
        two = {"name": "b", "instance_key": "key-b", "token": "t"}
        config.write_text(json.dumps({"megaapi": {"host_token": "h", "instances": [one, two]}}))
        assert client.mega_instances(address)["by_status"] == {"connected": 1, "disconnected": 1}
        config.write_text(json.dumps({"megaapi": {"host_token": "h", "instances": [two]}}))
        assert [one["name"] for one in client.mega_instances(address)["instances"]] == ["b"]
        config.write_text(json.dumps({"megaapi": {"instances": [two, two]}}))
        assert "listed twice" in client.health(address)["config_error"]


# QR, restart, logout, number, webhook


def test_the_qr_is_a_picture_until_somebody_scans_it(all_of: httpx.Client, control: str) -> None:
    picture = told(all_of.get("/instance/qrcode_base64/megastart-away"))["qrcode"]
    page = all_of.get("/instance/qrcode/megastart-away")
    client.mega_scan(control, "away")
    later = all_of.get("/instance/qrcode_base64/megastart-away").json()

    prefix, _, data = picture.partition(",")
    assert prefix == "data:image/png;base64"
    assert base64.b64decode(data, validate=True).startswith(PNG)
    assert re.search(r'<img src="data:image/png;base64,[^"]+"', page.text)
    assert later["message"] == "User is already logged in"
    assert "qrcode" not in later
    assert told(all_of.get("/instance/megastart-away"))["instance"]["status"] == "connected"


def test_a_restart_keeps_the_pairing_and_a_logout_ends_it(api: httpx.Client, control: str) -> None:
    client.mega_status(control, "disconnected", ["shop"])
    told(api.request("DELETE", "/instance/megastart-shop/restart"))
    assert told(api.get("/instance/megastart-shop"))["instance"]["status"] == "connected"

    told(api.request("DELETE", "/instance/megastart-shop/logout"))
    told(api.request("DELETE", "/instance/megastart-shop/restart"))

    assert told(api.get("/instance/megastart-shop"))["instance"]["status"] == "disconnected"
    assert "qrcode" in told(api.get("/instance/qrcode_base64/megastart-shop"))


def test_a_number_is_on_whatsapp_under_its_real_spelling(api: httpx.Client, control: str) -> None:
    client.mega_rules(control, drop_ninth_digit=True)

    there = api.get("/instance/isOnWhatsApp/megastart-shop", params={"jid": "5531988887777@s.whatsapp.net"}).json()
    nobody = api.get("/instance/isOnWhatsApp/megastart-shop", params={"jid": "0005511@s.whatsapp.net"}).json()
    digits = api.get("/instance/isOnWhatsApp/megastart-shop", params={"phone": "5531988887777"})

    assert there == {"exists": True, "jid": "553188887777@s.whatsapp.net"}
    assert nobody == {"exists": False}
    assert digits.status_code == 400


def test_a_webhook_that_is_set_can_be_read_back(api: httpx.Client, control: str) -> None:
    config = {"webhookUrl": "https://pombal.example/api/webhooks/whatsapp/loja?token=w", "webhookEnabled": True}
    told(api.post("/webhook/megastart-shop/configWebhook", json={"messageData": config}))

    assert told(api.get("/webhook/megastart-shop"))["webhookData"] == config
    client.mega_rules(control, webhook_answer="flat")
    assert told(api.get("/webhook/megastart-shop")).items() >= config.items()
    told(api.post("/webhook/megastart-shop/configWebhook", json={"messageData": config | {"webhookUrl": ""}}))


# Sending


def test_a_message_is_accepted_and_journaled(api: httpx.Client, control: str) -> None:
    body = told(send(api))

    key = body["messageData"]["key"]
    assert (key["remoteJid"], key["fromMe"]) == (CUSTOMER, True)
    call = last(control)
    assert (call["place"], call["instance"], call["to"], call["type"]) == ("send", "megastart-shop", CUSTOMER, "text")
    assert (call["text"], call["id"], call["outcome"]) == ("Pedido confirmado", key["id"], "accepted")


def test_the_answer_may_come_without_an_id(api: httpx.Client, control: str) -> None:
    client.mega_rules(control, instance="shop", answer_id=False)

    assert told(send(api))["messageData"] == {"status": "PENDING"}


def test_a_message_that_is_sent_twice_shows(api: httpx.Client, control: str) -> None:
    for text in ("a", "b", "a"):
        told(send(api, text=text))

    summary = client.mega_summary(control)

    assert (summary["sends"], summary["by_recipient_max"], summary["by_content_max"]) == (3, 3, 2)
    assert summary["recipients"] == {f"megastart-shop {CUSTOMER}": 3}


def test_a_file_in_base64_is_told_by_its_hash(api: httpx.Client, control: str) -> None:
    data = bytes(range(256)) * 9
    text = base64.b64encode(data).decode()
    kind = {"fileName": "a.pdf", "type": "document", "mimeType": "application/pdf"}

    for given in (text, f"data:application/pdf;base64,{text}"):
        told(send(api, "mediaBase64", base64=given, caption="Segue", **kind))
        call = last(control)
        assert (call["size"], call["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert (call["type"], call["text"]) == ("document", "Segue")
    assert send(api, "mediaBase64", base64=f"data:image/png;base64,{text}", **kind).status_code == 400
    assert send(api, "mediaBase64", base64=text[:-1], **kind).status_code == 400


def test_a_file_behind_a_link_is_fetched_when_the_rules_say_so(api: httpx.Client, control: str) -> None:
    client.mega_rules(control, fetch_urls=True)
    kind = {"fileName": "a.txt", "type": "document", "mimeType": "text/plain"}

    told(send(api, "mediaUrl", url=f"{control}/health", **kind))
    call = last(control)
    gone = send(api, "mediaUrl", url=f"{control}/nothing-there", **kind)

    assert (call["url"], call["sha256"]) == (
        f"{control}/health",
        hashlib.sha256(httpx.get(f"{control}/health").content).hexdigest(),
    )
    assert gone.json()["error"] is True


def test_the_other_kinds_of_messages_are_accepted_in_the_sheets_shape(api: httpx.Client) -> None:
    card = {"fullName": "Ana Reis", "displayName": "Ana", "organization": "Loja", "phoneNumber": "5511944440009"}
    key = {"remoteJid": CUSTOMER, "fromMe": False, "id": "3EB0AA"}

    told(send(api, "location", latitude=-23.5, longitude=-46, address="Av. Paulista", caption="Loja"))
    told(send(api, "contactMessage", vcard=card))
    told(send(api, "quoteMessage", text="Sim", key=key, message={"conversation": "Chegou?"}))
    told(send(api, to="120363042378568057@g.us"))
    told(send(api, to="123456789012345@lid"))
    told(api.post("/chat/megastart-shop/readMessage", json={"messageData": {"key": key}}))


FILE = {"fileName": "a.pdf", "type": "document", "mimeType": "application/pdf"}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "sendMessage/{}/text", {"to": CUSTOMER, "text": "x"}),
        ("POST", "sendMessage/{}/text", {"messageData": {"to": CUSTOMER, "text": "x"}, "more": 1}),
        ("POST", "sendMessage/{}/text", {"messageData": {"to": "5511944440001", "text": "x"}}),
        ("POST", "sendMessage/{}/text", {"messageData": {"to": "+5511944440001", "text": "x"}}),
        ("POST", "sendMessage/{}/text", {"messageData": {"to": CUSTOMER, "text": ""}}),
        ("POST", "sendMessage/{}/text", {"messageData": {"to": CUSTOMER, "text": "x", "caption": "y"}}),
        ("POST", "sendMessage/{}/mediaUrl", {"messageData": {"to": CUSTOMER, "mediaUrl": "https://a.example", **FILE}}),
        ("POST", "sendMessage/{}/mediaUrl", {"messageData": {"to": CUSTOMER, "url": "/a.pdf", **FILE}}),
        ("POST", "sendMessage/{}/mediaBase64", {"messageData": {"to": CUSTOMER, "base64": "YQ==", "type": "image"}}),
        ("POST", "sendMessage/{}/location", {"messageData": {"to": CUSTOMER, "latitude": "-23", "longitude": -46}}),
        (
            "POST",
            "sendMessage/{}/quoteMessage",
            {"messageData": {"to": CUSTOMER, "text": "x", "key": {}, "message": {}}},
        ),
        ("POST", "chat/{}/readMessage", {"messageData": {"id": "3EB0AA"}}),
        ("POST", "webhook/{}/configWebhook", {"messageData": {"webhookUrl": "x", "webhookEnabled": True}}),
        ("POST", "instance/downloadMediaMessage/{}", {"messageData": {"mediaKey": "a"}}),
        ("GET", "instance/{}/restart", None),
        ("POST", "instance/{}", {}),
    ],
)
def test_what_is_not_as_the_sheet_says_is_refused_and_journaled(
    api: httpx.Client, control: str, method: str, path: str, body: Any
) -> None:
    answer = api.request(method, f"/{path.format('megastart-shop')}", json=body)

    assert answer.status_code == 400
    assert answer.json()["name"] == "BAD_REQUEST"
    call = last(control)
    assert (call["outcome"], call["http"]) == ("refused", 400)
    assert call["reason"]
    assert client.mega_summary(control)["sends"] == 0


def test_a_path_that_nobody_knows_is_not_found(api: httpx.Client, control: str) -> None:
    assert api.get("/instance/status/megastart-shop").status_code == 404
    assert last(control)["place"] == "elsewhere"


def test_an_instance_that_is_away_does_not_send(all_of: httpx.Client, control: str) -> None:
    message = {"messageData": {"to": CUSTOMER, "text": "x"}}

    away = (("error_true", 200, True), ("http400", 400, True), ("http404", 404, None), ("accept", 200, False))
    for offline, status, error in away:
        client.mega_rules(control, offline=offline)
        answer = all_of.post("/sendMessage/megastart-away/text", json=message)
        assert (answer.status_code, answer.json().get("error")) == (status, error)
    assert client.mega_summary(control)["sends"] == 1


def test_a_number_on_no_whatsapp_gets_nothing(api: httpx.Client) -> None:
    assert send(api, to="00055119@s.whatsapp.net").json()["error"] is True


# Files


def a_file(control: str, **media: Any) -> JSON:
    given: JSON = client.mega_say(control, "shop", kind="image", media=media)["file"]
    return given


def download(api: httpx.Client, keys: JSON) -> httpx.Response:
    return api.post("/instance/downloadMediaMessage/megastart-shop", json={"messageKeys": keys})


def test_a_file_is_given_for_its_keys_alone(api: httpx.Client, control: str) -> None:
    file = a_file(control, size=700_001)

    answer = download(api, file["keys"])

    prefix, _, data = told(answer)["data"].partition(",")
    assert prefix == "data:image/jpeg;base64"
    assert hashlib.sha256(base64.b64decode(data, validate=True)).hexdigest() == file["sha256"]
    for name, value in (("mediaKey", "AAAA"), ("directPath", "/v/other"), ("messageType", "video")):
        wrong = download(api, file["keys"] | {name: value})
        assert (wrong.status_code, wrong.json()["error"], wrong.json()["data"]) == (200, True, "")
    assert download(api, file["keys"] | {"messageType": "imageMessage"}).status_code == 400


def test_spoilt_files_are_spoilt_as_asked(api: httpx.Client, control: str) -> None:
    file = a_file(control, size=30_000)
    good = download(api, file["keys"])

    def spoilt(kind: str, **more: Any) -> httpx.Response:
        client.mega_faults(control, kind, count=1, **more)
        return download(api, file["keys"])

    def clear(answer: httpx.Response) -> bytes:
        return base64.b64decode(told(answer)["data"].partition(",")[2], validate=True)

    assert spoilt("slashes").json() == good.json()
    assert b"\\/" in spoilt("slashes").content
    with pytest.raises(ValueError, match="base64"):
        clear(spoilt("bad_base64"))
    assert clear(good).startswith(clear(spoilt("truncated")))
    assert len(clear(spoilt("truncated"))) == 15_000
    assert len(clear(spoilt("wrong_hash"))) == 30_000
    assert clear(spoilt("wrong_hash")) != clear(good)
    assert told(spoilt("wrong_mime"))["data"].startswith("data:text/html;base64,")
    assert base64.b64decode(told(spoilt("no_prefix"))["data"]) == clear(good)
    huge = spoilt("huge_base64", bytes=200_000)
    assert len(told(huge)["data"]) > 200_000
    assert "content-length" not in huge.headers
    with pytest.raises(httpx.RemoteProtocolError):
        spoilt("close")
    api.timeout = httpx.Timeout(0.2)
    with pytest.raises(httpx.ReadTimeout):
        spoilt("stall")


# Faults


def test_faults_of_a_status_keep_to_their_instance_and_count(control: str, all_of: httpx.Client) -> None:
    client.mega_faults(control, "missing_status", instance="shop", place="status", count=1)
    client.mega_faults(control, "unknown_word", instance="shop", place="status", word="banned", count=1)
    client.mega_faults(control, "missing_instance", instance="shop", count=1)

    answers = [told(all_of.get("/instance/megastart-shop")) for _ in range(4)]

    assert "status" not in answers[0]["instance"]
    assert answers[1]["instance"]["status"] == "banned"
    assert "instance" not in answers[2]
    assert answers[3]["instance"]["status"] == "connected"
    assert told(all_of.get("/instance/megastart-away"))["instance"]["status"] == "disconnected"
    assert client.mega_faults(control)["faults"] == []


def test_faults_of_one_instance_concern_its_entry_in_the_list(control: str, all_of: httpx.Client) -> None:
    client.mega_faults(control, "absent", instance="away")
    client.mega_faults(control, "unknown_word", instance="shop", place="list", word="qr")

    listed = told(all_of.get("/instance/list"))["instances"]

    assert [(one["key"], one["status"]) for one in listed] == [("megastart-shop", "qr")]
    assert told(all_of.get("/instance/megastart-shop"))["instance"]["status"] == "connected"


@pytest.mark.parametrize("kind", ["http400", "http401", "http403", "http404", "http429", "http500"])
def test_refusals_are_json_with_a_name_and_nothing_is_done(api: httpx.Client, control: str, kind: str) -> None:
    client.mega_faults(control, kind, place="send", retry_after=7)

    answer = send(api)

    assert answer.status_code == int(kind.removeprefix("http"))
    assert answer.json()["status"] == answer.status_code
    assert answer.headers["retry-after"] == "7"
    assert client.mega_summary(control)["sends"] == 0


@pytest.mark.parametrize(
    ("kind", "done"),
    [
        ("html403", 0),
        ("html502", 0),
        ("html502_after", 1),
        ("error_true", 0),
        ("error_true_after", 1),
        ("garbage", 1),
        ("empty", 1),
        ("huge", 1),
        ("redirect", 0),
        ("outage", 0),
        ("hang_before", 0),
        ("hang_after", 1),
        ("reset_before", 0),
        ("reset_after", 1),
        ("drip", 1),
    ],
)
def test_whether_anything_was_done_is_in_the_faults_name(control: str, kind: str, done: int) -> None:
    client.mega_faults(control, kind, place="send", ms=1)
    outcome: object

    with asking(control, "token-1") as api:
        if kind.startswith("hang"):
            api.timeout = httpx.Timeout(0.3)
        try:
            answer = send(api)
            outcome = answer.status_code
        except httpx.HTTPError as error:
            outcome = type(error)

    expected = {
        "html403": 403,
        "html502": 502,
        "html502_after": 502,
        "redirect": 302,
        "outage": 503,
        "hang_before": httpx.ReadTimeout,
        "hang_after": httpx.ReadTimeout,
        "reset_before": httpx.ReadError,
        "reset_after": httpx.ReadError,
    }
    assert outcome == expected.get(kind, 200)
    assert client.mega_summary(control)["sends"] == done


def test_every_kind_of_fault_is_met_somewhere_and_others_are_refused(control: str) -> None:
    for kind in MEGAAPI_KINDS:
        assert any(megaapi_fits(kind, at) for at in (*MEGAAPI_PLACES, "entry"))
    for wrong in ({"kind": "nothing"}, {"kind": "slashes", "place": "send"}, {"kind": "latency", "place": "nowhere"}):
        with pytest.raises(SandboxError):
            client.mega_faults(control, **wrong)
    with pytest.raises(SandboxError, match="no instance"):
        client.mega_faults(control, "latency", instance="nobody")


# What a phone says


@pytest.fixture
def hook(control: str) -> Iterator[Hook]:
    """The webhook of an instance `phone`."""
    with a_hook() as running:
        client.mega_add(control, [{"name": "phone", "instance_key": "key-1", "token": "t", "webhook_url": running.url}])
        yield running


def test_a_status_that_changes_is_told_when_asked(control: str, hook: Hook) -> None:
    client.mega_status(control, "disconnected", ["phone"])
    client.mega_connection(control, "phone", "connected", form="seed")
    client.mega_scan(control, "phone")
    client.mega_status(control, "disconnected", ["phone"], emit=True)

    seed, flat, away = hook.until(lambda bodies: len(bodies) == 3)
    assert seed == {"instanceKey": "key-1", "event": "connection", "data": {"status": "connected"}}
    assert (flat["messageType"], flat["message"]) == ("connection_update", "phone_connected")
    assert (away["jid"], away["message"]) == ("5511955550200@s.whatsapp.net", "phone_disconnected")
    assert hook.headers[0]["user-agent"] == "axios/1.7.7"


def test_an_instance_flaps_until_it_is_told_to_stop(control: str, hook: Hook) -> None:
    client.mega_flap(control, "phone", 0.01)
    hook.until(lambda bodies: {"phone_connected", "phone_disconnected"} <= {body["message"] for body in bodies})

    assert client.mega_flap(control, "phone", 0)["flaps"] == 0
    with asking(control, "t") as api:
        status = told(api.get("/instance/key-1"))["instance"]["status"]
        assert all(told(api.get("/instance/key-1"))["instance"]["status"] == status for _ in range(30))
