"""Files of Baileys gateways, over real sockets: decrypted, whole and unchanged, or a reason; never whole in memory."""

import base64
import hashlib
import hmac
import os
import tracemalloc
from io import BufferedIOBase
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

import providers
from pombal.errors import Permanent
from providers import guard
from providers.baileys_media import BaileysMedia, GatewayFile
from providers.link import Link
from providers.media import FAULTS, MediaFault, Received
from tests.providers.test_megaapi import LOOPBACK, TLS
from tests.providers.test_megaapi_media import Asked, Kept, a_gateway, an_answer

FILE = b"\xff\xd8\xff\xe0" + bytes(range(256)) * 100
MEDIA_KEY = bytes(range(32))


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def encrypted(content: bytes, word: str = "Image", key: bytes = MEDIA_KEY) -> bytes:
    """As WhatsApp keeps a file, by the description alone."""
    keys = HKDF(SHA256(), length=112, salt=bytes(32), info=f"WhatsApp {word} Keys".encode()).derive(key)
    iv, secret, mac = keys[:16], keys[16:48], keys[48:80]
    missing = 16 - len(content) % 16
    encryptor = Cipher(algorithms.AES256(secret), modes.CBC(iv)).encryptor()
    body = encryptor.update(content + bytes([missing]) * missing) + encryptor.finalize()
    return body + hmac.digest(mac, iv + body, "sha256")[:10]


def keys_for(url: str, raw: bytes, content: bytes = FILE, **more: Any) -> dict[str, Any]:
    known = {
        "mediaKey": b64(MEDIA_KEY),
        "url": url + "/d/f/x.enc?mms3=true",
        "mimetype": "image/jpeg",
        "messageType": "image",
        "fileSha256": b64(hashlib.sha256(content).digest()),
        "fileEncSha256": b64(hashlib.sha256(raw).digest()),
    }
    return {name: value for name, value in {**known, **more}.items() if value is not None}


def fetched(
    raw: bytes | Any, *, content: bytes = FILE, most: int = 10_000_000, allowed: Any = LOOPBACK, **more: Any
) -> tuple[Received, Kept, list[Asked]]:
    into = Kept()
    answer = an_answer(raw) if isinstance(raw, bytes) else raw
    with a_gateway(answer) as (url, asked), a_client() as client:
        keys = keys_for(url, raw if isinstance(raw, bytes) else b"", content, **more)
        return BaileysMedia(client, keys, allowed=allowed).fetch(into, most), into, asked


def answers(raw: bytes) -> Any:
    """Says exactly this."""

    def says(out: BufferedIOBase) -> None:
        out.write(raw)

    return says


def a_client() -> Any:
    return guard.client(guarded=True, allowed=LOOPBACK, is_free_inside=True, verify=TLS)


def fault_of(raw: bytes | Any, **more: Any) -> MediaFault:
    with pytest.raises(MediaFault) as raised:
        fetched(raw, **more)
    assert raised.value.code in FAULTS
    assert "127.0.0.1" not in str(raised.value)
    return raised.value


@pytest.mark.parametrize(
    ("type_", "word"),
    [
        ("image", "Image"),
        ("sticker", "Image"),
        ("video", "Video"),
        ("audio", "Audio"),
        ("document", "Document"),
        ("imageMessage", "Image"),
    ],
)
def test_a_file_of_each_type_is_decrypted(type_: str, word: str) -> None:
    received, into, asked = fetched(encrypted(FILE, word), messageType=type_)

    assert bytes(into.bytes) == FILE
    assert received == Received(len(FILE), hashlib.sha256(FILE).digest(), FILE[:8192], "image/jpeg")
    assert [one.line for one in asked] == ["GET /d/f/x.enc?mms3=true HTTP/1.1"]


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 31, 32])
@pytest.mark.parametrize("cut", [1, 9, 10, 11, 1000])
def test_any_size_in_any_pieces(size: int, cut: int) -> None:
    content = os.urandom(size)
    raw = encrypted(content)

    def says(out: BufferedIOBase) -> None:
        out.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(raw)}\r\n\r\n".encode())
        for at in range(0, len(raw), cut):
            out.write(raw[at : at + cut])
            out.flush()

    received, into, _ = fetched(says, content=content, fileEncSha256=None)

    assert (bytes(into.bytes), received.size) == (content, size)


@pytest.mark.parametrize("at", [0, 5_000, -11, -10, -1])
def test_one_changed_bit_anywhere_is_no_file(at: int) -> None:
    raw = bytearray(encrypted(FILE))
    raw[at] ^= 1

    assert fault_of(bytes(raw)).code == "wrong_hash"
    assert fault_of(bytes(raw), fileEncSha256=None, fileSha256=None).code == "wrong_hash"


@pytest.mark.parametrize("left", [0, 5, 10, 26, 5_000, -16, -1])
def test_a_file_that_is_cut_short_is_none(left: int) -> None:
    assert fault_of(encrypted(FILE)[:left], fileEncSha256=None, fileSha256=None).code == "wrong_hash"


def test_a_key_of_another_file_opens_nothing() -> None:
    raw = encrypted(FILE, key=bytes(32))

    assert fault_of(raw, fileSha256=None).code == "wrong_hash"
    assert fault_of(encrypted(FILE, "Video"), fileSha256=None).code == "wrong_hash"


def test_both_claimed_hashes_are_held_against_it() -> None:
    raw, other = encrypted(FILE), b64(hashlib.sha256(b"x").digest())

    assert fault_of(raw, fileEncSha256=other).code == "wrong_hash"
    assert fault_of(raw, fileSha256=other).code == "wrong_hash"


def test_what_was_encrypted_without_padding_is_no_file() -> None:
    keys = HKDF(SHA256(), length=112, salt=bytes(32), info=b"WhatsApp Image Keys").derive(MEDIA_KEY)
    encryptor = Cipher(algorithms.AES256(keys[16:48]), modes.CBC(keys[:16])).encryptor()
    body = encryptor.update(bytes(32)) + encryptor.finalize()
    for ciphertext in (body, body[:20]):
        raw = ciphertext + hmac.digest(keys[48:80], keys[:16] + ciphertext, "sha256")[:10]
        assert fault_of(raw, fileSha256=None).code == "encoded"


@pytest.mark.parametrize("media_key", [None, "", "x", b64(bytes(31)), b64(bytes(33)), "é"])
def test_without_a_key_nothing_is_asked_for(media_key: str | None) -> None:
    fault = fault_of(encrypted(FILE), mediaKey=media_key)

    assert (fault.code, fault.is_final) == ("rejected", True)
    assert fault_of(encrypted(FILE), messageType="pollCreation").is_final


def test_a_file_over_the_limit_ends_early_and_one_at_it_does_not() -> None:
    assert fault_of(encrypted(FILE), most=len(FILE) - 1).code == "too_large"
    assert fetched(encrypted(FILE), most=len(FILE))[0].size == len(FILE)
    assert fault_of(encrypted(FILE), most=1000).is_final


@pytest.mark.parametrize(
    ("keys", "url"),
    [
        ({"url": "https://mmg.whatsapp.net/a.enc"}, "https://mmg.whatsapp.net/a.enc"),
        ({"url": "https://media-gru1-1.cdn.whatsapp.net/a"}, "https://media-gru1-1.cdn.whatsapp.net/a"),
        ({"url": "http://127.0.0.1:99/a"}, "http://127.0.0.1:99/a"),
        ({"directPath": "/v/t62.7118-24/1?oe=68"}, "https://mmg.whatsapp.net/v/t62.7118-24/1?oe=68"),
        ({"url": "https://evil.example/a", "directPath": "/v/1"}, "https://mmg.whatsapp.net/v/1"),
        ({"url": "https://mmg.whatsapp.net@evil.example/a"}, None),
        ({"url": "https://u@mmg.whatsapp.net/a"}, None),
        ({"url": "http://mmg.whatsapp.net/a"}, None),
        ({"url": "https://evilwhatsapp.net/a"}, None),
        ({"url": "https://mmg.whatsapp.net.evil.example/a"}, None),
        ({"url": "http://169.254.169.254/a"}, None),
        ({"url": "http://localhost/a"}, None),
        ({"url": "https://["}, None),
        ({"directPath": "@evil.example/a"}, None),
        ({"directPath": "/a\r\nHost: evil"}, None),
        ({}, None),
    ],
)
def test_a_file_is_looked_for_at_whatsapp_alone(keys: dict[str, str], url: str | None) -> None:
    with a_client() as client:
        media = BaileysMedia(client, {**keys, "mediaKey": b64(MEDIA_KEY), "messageType": "image"}, allowed=LOOPBACK)

        assert (str(media._url) if media._url else None) == url
        if url is None:
            with pytest.raises(MediaFault) as raised:
                media.fetch(Kept(), 1000)
            assert (raised.value.code, raised.value.is_final) == ("blocked_address", True)


def test_an_address_inside_is_none_of_a_file_unless_it_is_allowed() -> None:
    assert fault_of(encrypted(FILE), allowed=[]).code == "blocked_address"


@pytest.mark.parametrize(
    ("status", "code"), [("404 Not Found", "not_found"), ("410 Gone", "not_found"), ("403 Forbidden", "refused")]
)
def test_a_file_that_is_not_there(status: str, code: str) -> None:
    assert fault_of(answers(an_answer("", status))).code == code


def test_a_redirect_is_not_followed() -> None:
    assert fault_of(answers(an_answer("", "302 Found", location="http://127.0.0.1/x"))).code == "redirect"


def test_a_large_file_is_never_whole_in_memory() -> None:
    part = bytes(1_000_000)
    raw = encrypted(part * 20)

    class Nowhere:
        def write(self, chunk: bytes) -> None:
            pass

    def says(out: BufferedIOBase) -> None:
        out.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(raw)}\r\n\r\n".encode())
        for at in range(0, len(raw), 65_536):
            out.write(raw[at : at + 65_536])

    with a_gateway(says) as (url, _), a_client() as client:
        keys = keys_for(url, raw, fileSha256=None)
        media = BaileysMedia(client, keys, allowed=LOOPBACK)
        tracemalloc.start()
        try:
            received = media.fetch(Nowhere(), 30_000_000)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert received.size == 20_000_000
    assert peak < 5_000_000


# -- which source a file of a channel has ----------------------------------------------------------------------------

CONFIG = {"gateway": "waha", "host": "http://127.0.0.1:3000", "session": "loja"}
EMPTY = {"link": None, "keys": None, "sha256": None, "provider_media_id": None}


def test_a_file_is_fetched_by_its_keys_or_from_the_gateway_itself_with_its_key() -> None:
    def source(**file: Any) -> Any:
        return providers.source("baileys", CONFIG, {"api_key": "k"}, {**EMPTY, **file})

    assert isinstance(source(keys={"mediaKey": "x"}), BaileysMedia)
    assert isinstance(source(link="http://127.0.0.1:3000/api/files/a.jpg"), GatewayFile)
    assert isinstance(source(link="http://127.0.0.1:3001/api/files/a.jpg"), Link)
    assert isinstance(source(link="http://u@127.0.0.1:3000/api/files/a.jpg"), Link)
    with pytest.raises(Permanent):
        source()


def test_the_key_of_a_gateway_goes_to_it_alone() -> None:
    with a_gateway(an_answer(FILE)) as (url, asked), a_client() as client:
        received = GatewayFile(client, f"{url}/api/files/a", {"X-Api-Key": "k"}).fetch(Kept(), 1_000_000)
        assert (received.size, asked[0].headers["x-api-key"]) == (len(FILE), "k")
    with a_gateway(an_answer("", "302 Found", location="http://127.0.0.1:1/")) as (url, _), a_client() as client:
        with pytest.raises(MediaFault) as raised:
            GatewayFile(client, f"{url}/api/files/a", {"X-Api-Key": "k"}).fetch(Kept(), 1_000_000)
        assert raised.value.code == "redirect"
