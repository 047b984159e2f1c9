"""The webhooks of the simulated Baileys gateways, and the files of their messages."""

import base64
import hashlib
import hmac
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import hashes, padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sandbox import client
from sandbox.app import create_app
from tests.sandbox.baileys_servers import API_KEY, Baileys, a_baileys
from tests.sandbox.megaapi_servers import Hook, a_hook
from tests.sandbox.servers import serve

CUSTOMER = "5511944440001"
INFOS = {"image": "Image", "video": "Video", "voice": "Audio", "document": "Document", "sticker": "Image"}


@pytest.fixture(scope="module")
def running() -> Iterator[Baileys]:
    with a_baileys() as its:
        yield its


@pytest.fixture
def its(running: Baileys) -> Iterator[Baileys]:
    yield running
    client.baileys_remove(running.url)
    shutil.rmtree(running.root, ignore_errors=True)


@pytest.fixture
def hook() -> Iterator[Hook]:
    with a_hook() as its:
        yield its


def test_a_text_arrives_in_each_dialects_form(its: Baileys, hook: Hook) -> None:
    for dialect in ("whaticket", "ticketz", "fazer", "evolution", "waha"):
        its.gateway(dialect, dialect)
        its.session(dialect, "26", webhook_url=hook.url)
        hook.clear()
        told = its.say(dialect, "26", "Bom dia", kind="extended")
        assert told["accepted"]
        body = hook.bodies[0]
        if dialect == "evolution":
            assert (body["event"], body["instance"], body["data"]["key"]["id"]) == (
                "messages.upsert",
                "26",
                told["ids"][0],
            )
            assert body["data"]["message"] == {"conversation": "Bom dia"}
        elif dialect == "waha":
            assert (body["event"], body["payload"]["body"]) == ("message", "Bom dia")
            assert body["payload"]["id"] == f"false_{CUSTOMER}@c.us_{told['ids'][0]}"
        else:
            message = body["data"]["messages"][0]
            assert (body["event"], message["key"]["id"]) == ("messages.upsert", told["ids"][0])
            assert message["message"]["extendedTextMessage"]["text"] == "Bom dia"


def test_acks_are_told_on_each_dialects_scale(its: Baileys, hook: Hook) -> None:
    found = []
    for dialect in ("whaticket", "fazer", "evolution", "waha"):
        its.gateway(dialect, dialect)
        its.session(dialect, "26", webhook_url=hook.url)
        hook.clear()
        client.baileys_ack(its.url, dialect, "26", "3EB0AA", 3)
        found.append(hook.bodies[0])
    whaticket, fazer, evolution, waha = found
    assert whaticket["data"][0]["update"] == fazer["data"][0]["update"] == {"status": 3}
    assert evolution["data"]["status"] == "DELIVERY_ACK"
    assert (waha["payload"]["ack"], waha["payload"]["ackName"]) == (2, "DEVICE")


def test_ends_of_connections_carry_their_code(its: Baileys, hook: Hook) -> None:
    its.gateway("g1", "fazer")
    its.session("g1", "+5511955550300", webhook_url=hook.url)
    its.end("g1", "+5511955550300", 440)
    bodies = hook.until(lambda bodies: any(body["data"].get("connection") == "open" for body in bodies))
    closed = next(body["data"] for body in bodies if body["data"]["connection"] == "close")
    assert closed["lastDisconnect"]["error"]["output"]["statusCode"] == 440
    client.baileys_connection(its.url, "g1", "+5511955550300", quarantine={"strikes": 3, "until": 1_788_000_000})
    assert hook.bodies[-1]["data"]["error"] == "reconnect_loop_detected"


def test_a_token_goes_along_in_the_query_or_in_a_header(its: Baileys, hook: Hook) -> None:
    its.gateway("g1", "whaticket")
    its.session("g1", "1", webhook_url=hook.url, webhook_token="t-1")
    its.session("g1", "2", webhook_url=hook.url, webhook_token="t-2", token_in_header=True)
    assert its.say("g1", "1", "Olá")["accepted"]
    assert its.say("g1", "2", "Olá")["accepted"]
    assert [one.get("x-api-key") for one in hook.headers] == [None, "t-2"]
    listed = client.baileys_gateways(its.url)["gateways"][0]["sessions"]
    assert listed[0]["webhook"].endswith("token=t-1")


def test_evolution_does_not_repeat_what_was_refused(its: Baileys, hook: Hook) -> None:
    hook.failures += [401, 500, 200]
    its.gateway("g1", "evolution")
    its.session("g1", "26", webhook_url=hook.url)
    assert its.say("g1", "26", "Olá")["status"] == 401
    assert its.say("g1", "26", "Tudo bem?")["accepted"]
    assert len(hook.bodies) == 3


def opened(encrypted: bytes, key: str, kind: str) -> bytes:
    """What a client makes of it; raises when the MAC is another."""
    keys = HKDF(hashes.SHA256(), 112, None, f"WhatsApp {INFOS[kind]} Keys".encode()).derive(base64.b64decode(key))
    body, mac = encrypted[:-10], encrypted[-10:]
    if hmac.digest(keys[48:80], keys[:16] + body, "sha256")[:10] != mac:
        raise ValueError("MAC")
    decryptor = Cipher(algorithms.AES(keys[16:48]), modes.CBC(keys[:16])).decryptor()
    unpadder = padding.PKCS7(128).unpadder()
    return unpadder.update(decryptor.update(body) + decryptor.finalize()) + unpadder.finalize()


def media(body: Any) -> Any:
    return next(iter(body["data"]["messages"][0]["message"].values()))


@pytest.mark.parametrize("kind", INFOS)
def test_a_file_is_encrypted_as_by_whatsapp(its: Baileys, hook: Hook, kind: str) -> None:
    its.gateway("g1", "whaticket")
    its.session("g1", "26", webhook_url=hook.url)
    its.say("g1", "26", kind=kind, media={"base64": base64.b64encode(b"x" * 1000).decode()})
    told = media(hook.bodies[0])
    encrypted = httpx.get(told["url"], trust_env=False).content
    assert hashlib.sha256(encrypted).digest() == base64.b64decode(told["fileEncSha256"])
    assert opened(encrypted, told["mediaKey"], kind) == b"x" * 1000
    assert hashlib.sha256(b"x" * 1000).digest() == base64.b64decode(told["fileSha256"])


def test_a_file_may_be_spoilt(its: Baileys, hook: Hook) -> None:
    its.gateway("g1", "whaticket")
    its.session("g1", "26", webhook_url=hook.url)
    answers = {}
    for spoil in ("mac", "cut", "gone"):
        hook.clear()
        its.say("g1", "26", kind="image", media={"size": 5_000, "spoil": spoil})
        answers[spoil] = httpx.get(media(hook.bodies[0])["url"], trust_env=False)
    assert answers["gone"].status_code == 410
    for spoil in ("mac", "cut"):
        with pytest.raises(ValueError, match="MAC"):
            opened(answers[spoil].content, media(hook.bodies[0])["mediaKey"], "image")


def test_waha_serves_a_file_that_is_decrypted_already(its: Baileys, hook: Hook) -> None:
    its.gateway("g1", "waha")
    its.session("g1", "26", webhook_url=hook.url)
    its.say(
        "g1",
        "26",
        kind="document",
        media={"base64": base64.b64encode(b"%PDF-1").decode(), "mime_type": "application/pdf"},
    )
    url = hook.bodies[0]["payload"]["media"]["url"]
    assert httpx.get(url, trust_env=False).status_code == 401
    assert httpx.get(url, headers={"X-Api-Key": API_KEY}, trust_env=False).content == b"%PDF-1"


def test_gateways_of_the_configuration_are_there(tmp_path: Path) -> None:
    session = {"session": "demo-baileys", "number": "5511955550300"}
    gateway = {"name": "demo", "dialect": "evolution", "api_key": "k", "sessions": [session]}
    config = tmp_path / "sandbox.json"
    config.write_text(json.dumps({"baileys": {"root": str(tmp_path / "sessions"), "gateways": [gateway]}}))
    with serve(create_app(config)) as address:
        state = httpx.get(f"{address}/baileys/demo/instance/connectionState/demo-baileys", headers={"apikey": "k"})
        assert state.json()["instance"]["state"] == "open"
        assert (tmp_path / "sessions" / "demo" / "demo-baileys" / "creds.json").exists()
        config.write_text(json.dumps({"baileys": {"gateways": []}}))
        assert client.baileys_gateways(address)["gateways"] == []
