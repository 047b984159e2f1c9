"""What the simulated MegaAPI sends: messages of every kind, echoes and acks of what was sent, in every order."""

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from sandbox import client, megaapi_words
from sandbox.client import SandboxError
from sandbox.config import MegaInstance
from sandbox.meta import JSON
from tests.sandbox.megaapi_servers import Hook, a_hook, a_megaapi

CUSTOMER = "5511944440001@s.whatsapp.net"
AT_ONCE: JSON = {"echo_delay": [0, 0], "ack_delay": [0.001, 0.002]}


@pytest.fixture(scope="module")
def there() -> Iterator[Hook]:
    with a_hook() as running:
        yield running


@pytest.fixture(scope="module")
def running(there: Hook) -> Iterator[str]:
    with a_megaapi(
        MegaInstance("shop", "megastart-shop", "token-1", number="5511955550201", webhook_url=there.url)
    ) as url:
        yield url


@pytest.fixture
def control(running: str, there: Hook) -> str:
    client.mega_clear_faults(running)
    client.mega_clear_rules(running)
    client.mega_rules(running, **AT_ONCE)
    client.mega_clear_calls(running)
    there.clear()
    return running


@pytest.fixture
def api(control: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": "Bearer token-1"}
    with httpx.Client(base_url=f"{control}/rest", headers=headers, trust_env=False, timeout=5) as http:
        yield http


def send(api: httpx.Client, to: str = CUSTOMER, path: str = "text", **data: Any) -> JSON:
    body = {"messageData": {"to": to, **(data or {"text": "Pedido confirmado"})}}
    answer = api.post(f"/sendMessage/megastart-shop/{path}", json=body)
    assert answer.status_code == 200, answer.text
    sent: JSON = answer.json()["messageData"]
    return sent


def is_ack(body: JSON) -> bool:
    return bool(body["messageType"] == "message.ack")


def acks(bodies: list[JSON]) -> list[Any]:
    return [body["update"]["status"] for body in bodies if is_ack(body)]


# What customers write


def test_a_text_is_flat_as_the_vendor_sends_it(control: str, there: Hook) -> None:
    said = client.mega_say(control, "shop", "Bom dia", name="Cliente", at=1_745_279_950, id="00AA11")

    (body,) = there.bodies
    assert said["accepted"]
    assert (said["ids"], said["body"]) == (["00AA11"], body)
    assert body == {
        "instance_key": "megastart-shop",
        "jid": "5511955550201@s.whatsapp.net",
        "messageType": "conversation",
        "key": {"remoteJid": CUSTOMER, "fromMe": False, "id": "00AA11"},
        "messageTimestamp": 1_745_279_950,
        "pushName": "Cliente",
        "broadcast": False,
        "message": {
            "conversation": "Bom dia",
            "messageContextInfo": {"deviceListMetadata": {}, "deviceListMetadataVersion": 2},
        },
        "isGroup": False,
    }
    assert "authorization" not in there.headers[0]


@pytest.mark.parametrize("kind", megaapi_words.KINDS)
def test_every_kind_can_be_said_in_every_form(control: str, there: Hook, kind: str) -> None:
    flat = client.mega_say(control, "shop", kind=kind, id="A", at=1)["body"]
    for form in ("wrapped", "seed"):
        client.mega_say(control, "shop", kind=kind, id="A", at=1, form=form)

    first, wrapped, seed = there.bodies
    assert first == flat
    assert list(wrapped) == ["instance_key", "data"]
    assert list(seed) == ["instanceKey", "event", "data"]
    assert seed["event"] == "message"
    assert wrapped["data"].keys() == seed["data"].keys() == flat.keys() - {"instance_key"}
    assert ("message" in flat) is (kind != "stub")


def test_labels_and_contents_may_differ(control: str) -> None:
    def said(kind: str) -> JSON:
        body: JSON = client.mega_say(control, "shop", kind=kind)["body"]
        return body

    assert said("mislabelled")["messageType"] == "extendedTextMessage"
    assert list(said("mislabelled")["message"]) == ["conversation"]
    assert said("poll")["messageType"] == "messageContextInfo"
    assert "pollCreationMessageV3" in said("poll")["message"]
    assert list(said("view_once")["message"]["viewOnceMessageV2"]["message"]) == ["imageMessage"]


def test_groups_hidden_numbers_and_the_companys_own_phone(control: str) -> None:
    def key(**more: Any) -> JSON:
        found: JSON = client.mega_say(control, "shop", "Oi", **more)["keys"][0]
        del found["id"]
        return found

    group = "120363042378568057@g.us"
    lid = key(lid="without_alt")["remoteJid"]
    assert lid.endswith("@lid")
    assert not lid.startswith("5511944440001")
    assert key(lid="with_alt") == {
        "remoteJid": lid,
        "fromMe": False,
        "remoteJidAlt": CUSTOMER,
        "addressingMode": "lid",
    }
    assert key(group=group) == {"remoteJid": group, "fromMe": False, "participant": CUSTOMER}
    assert key(group=group, lid="with_alt")["participantAlt"] == CUSTOMER
    assert key(from_me=True) == {"remoteJid": CUSTOMER, "fromMe": True}
    assert key(from_me=True, group=group)["participant"] == "5511955550201@s.whatsapp.net"
    assert key(from_=lid) == {"remoteJid": lid, "fromMe": False}


def test_a_files_message_leads_to_its_bytes(control: str, api: httpx.Client) -> None:
    content = b"OggS" + bytes(range(256))
    said = client.mega_say(control, "shop", kind="voice", media={"base64": base64.b64encode(content).decode()})

    told = said["body"]["message"]["audioMessage"]
    assert told["ptt"] is True
    assert base64.b64decode(told["fileSha256"]) == hashlib.sha256(content).digest()
    assert told["fileLength"] == str(len(content))
    keys = {name: told[name] for name in ("mediaKey", "directPath", "url", "mimetype")} | {"messageType": "audio"}
    assert keys == said["file"]["keys"]
    data = api.post("/instance/downloadMediaMessage/megastart-shop", json={"messageKeys": keys}).json()["data"]
    assert data == f"data:audio/ogg; codecs=opus;base64,{base64.b64encode(content).decode()}"


def test_anything_can_be_said(control: str, there: Hook) -> None:
    client.mega_say(
        control, "shop", object={"newMessage": {"a": 1}}, extra={"verifiedBizName": "Loja", "isGroup": None}
    )
    client.mega_raw(control, "shop", body="no json", content_type="text/plain")
    client.mega_ack(control, "shop", "3EB0ZZ", "5", to="120363042378568057@g.us", participant="5511944440002")

    assert json.loads(there.raw[0]).items() >= {"messageType": "newMessage", "verifiedBizName": "Loja"}.items()
    assert (there.raw[1], there.headers[1]["content-type"]) == (b"no json", "text/plain")
    assert json.loads(there.raw[2])["key"]["participant"] == "5511944440002@s.whatsapp.net"
    assert json.loads(there.raw[2])["update"] == {"status": "5"}
    with pytest.raises(SandboxError, match="no kind"):
        client.mega_say(control, "shop", kind="smell")


def test_what_is_not_answered_with_200_is_sent_again(control: str, there: Hook) -> None:
    there.failures[:] = [503, 401]

    said = client.mega_say(control, "shop", "Oi")

    assert said["accepted"]
    assert len(there.raw) == 3
    assert len(set(there.raw)) == 1
    assert client.mega_journal(control, limit=1)["deliveries"][0]["attempts"] == 3


# What follows a message that was sent


def test_a_send_is_followed_by_its_echo_and_its_acks(control: str, there: Hook, api: httpx.Client) -> None:
    key = send(api)["key"]

    bodies = there.until(lambda bodies: len(bodies) == 4)

    (echo,) = [body for body in bodies if not is_ack(body)]
    assert echo["key"] == key
    assert echo["message"] == {"extendedTextMessage": {"text": "Pedido confirmado"}}
    assert sorted(acks(bodies)) == [2, 3, 4]
    assert all(body["key"] == key for body in bodies)


def test_an_echo_and_acks_may_come_before_the_answer(control: str, there: Hook, api: httpx.Client) -> None:
    client.mega_rules(control, echo="before", acks_before=True, acks=[2], ack_strings=True, answer_id=False)

    sent = send(api)

    echo, ack = there.bodies  # they were there when the answer came
    assert sent == {"status": "PENDING"}
    assert (echo["key"]["fromMe"], ack["update"]) == (True, {"status": "2"})
    assert echo["key"] == ack["key"]


def test_an_echo_settles_what_was_never_answered(control: str, there: Hook, api: httpx.Client) -> None:
    client.mega_faults(control, "hang_after", place="send")
    api.timeout = httpx.Timeout(0.2)

    with pytest.raises(httpx.ReadTimeout):
        send(api)

    there.until(lambda bodies: any(not is_ack(body) for body in bodies))


def test_there_may_be_no_echo_and_acks_get_lost_or_come_twice(control: str, there: Hook, api: httpx.Client) -> None:
    client.mega_rules(control, echo="never", ack_lost=1)
    send(api)
    client.mega_rules(control, ack_lost=0, ack_duplicates=1, ack_shuffle=True)
    send(api)

    assert sorted(acks(there.until(lambda bodies: len(bodies) == 6))) == [2, 2, 3, 3, 4, 4]


def test_echoes_know_chats_by_other_names(control: str, there: Hook, api: httpx.Client) -> None:
    client.mega_rules(control, acks=[], echo="before", drop_ninth_digit=True)
    send(api, "5531988887777@s.whatsapp.net")
    client.mega_rules(control, lid="with_alt", form="wrapped")
    send(api, CUSTOMER)

    spelt, hidden = there.bodies
    assert spelt["key"]["remoteJid"] == "553188887777@s.whatsapp.net"
    assert hidden["data"]["key"]["remoteJidAlt"] == CUSTOMER


def test_the_echo_of_a_file_leads_to_its_bytes(control: str, there: Hook, api: httpx.Client) -> None:
    client.mega_rules(control, acks=[], echo="before")
    content = b"%PDF-1.4"
    file = {"fileName": "a.pdf", "type": "document", "mimeType": "application/pdf"}
    send(api, path="mediaBase64", base64=base64.b64encode(content).decode(), **file)

    told = there.bodies[0]["message"]["documentMessage"]
    keys = {name: told[name] for name in ("mediaKey", "directPath", "url", "mimetype")} | {"messageType": "document"}
    data = api.post("/instance/downloadMediaMessage/megastart-shop", json={"messageKeys": keys}).json()["data"]
    assert base64.b64decode(data.partition(",")[2]) == content
