"""Files from MegaAPI, over real sockets: whole and unchanged, or a reason; and never whole in memory."""

import base64
import hashlib
import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from ipaddress import ip_network
from threading import Thread
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import providers
from pombal.errors import Permanent
from providers import guard
from providers.inline import Decoder
from providers.link import Link
from providers.media import FAULTS, MediaFault, Received
from providers.megaapi_media import Answer, MegaMedia
from tests.providers.test_guard import SOON, drips, says_nothing
from tests.providers.test_guard import a_server as a_raw_server
from tests.providers.test_megaapi import KEY, TLS, TOKEN

FILE = b"\xff\xd8\xff\xe0" + bytes(range(256)) * 100
TEXT = base64.b64encode(FILE).decode()
SHA256 = base64.b64encode(hashlib.sha256(FILE).digest()).decode()
KEYS = {
    "mediaKey": "bWVkaWFLZXk=",
    "directPath": "/v/t62.7118-24/1?oe=68",
    "url": "https://mmg.whatsapp.net/v/1.enc",
    "mimetype": "image/jpeg",
    "messageType": "image",
}
LOOPBACK = [ip_network("127.0.0.0/8")]

Says = Callable[[BufferedIOBase], None]


class Asked(NamedTuple):
    line: str
    headers: dict[str, str]
    body: bytes


class Kept:
    """A place for the bytes that knows how many came at once."""

    def __init__(self) -> None:
        self.bytes = bytearray()

    def write(self, chunk: bytes) -> None:
        self.bytes += chunk


@contextmanager
def a_gateway(answer: bytes | Says) -> Iterator[tuple[str, list[Asked]]]:
    """Answers every request with this, and then closes the connection."""
    asked: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            line = self.rfile.readline().decode().strip()
            fields = iter(lambda: self.rfile.readline().decode().strip(), "")
            headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
            asked.append(Asked(line, headers, self.rfile.read(int(headers.get("content-length", "0")))))
            try:
                if isinstance(answer, bytes):
                    self.wfile.write(answer)
                else:
                    answer(self.wfile)
            except ConnectionError:
                pass  # the client has heard enough
            self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def an_answer(body: str | bytes, status: str = "200 OK", **headers: str) -> bytes:
    raw = body.encode() if isinstance(body, str) else body
    given = {"content-length": str(len(raw)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + raw


def a_body(data: Any = f"data:image/png;base64,{TEXT}", *, error: Any = False, **more: Any) -> str:
    return json.dumps({"error": error, "message": "ok", "data": data, **more})


def fetched(
    url: str, into: Any = None, *, most: int = 10_000_000, sha256: str | None = SHA256, **more: Any
) -> Received:
    options = {"guarded": True, "allowed": LOOPBACK, "is_free_inside": True, "verify": TLS, **more.pop("client", {})}
    with guard.client(**options) as client:
        given = {"host": url, "instance_key": KEY, "token": TOKEN, "keys": KEYS, "sha256": sha256, **more}
        return MegaMedia(client, **given).fetch(into if into is not None else Kept(), most)


def heard(answer: bytes | Says, into: Any = None, **more: Any) -> Received:
    with a_gateway(answer) as (url, _):
        return fetched(url, into, **more)


def fault_of(answer: bytes | Says, into: Any = None, **more: Any) -> MediaFault:
    with pytest.raises(MediaFault) as raised:
        heard(answer, into, **more)
    assert raised.value.code in FAULTS
    for secret in (TOKEN, KEY, "127.0.0.1", "mmg.whatsapp.net"):
        assert secret not in str(raised.value)
    return raised.value


# -- a file ----------------------------------------------------------------------------------------------------------


def test_a_file_is_asked_for_by_its_keys_and_comes_whole() -> None:
    into = Kept()

    with a_gateway(an_answer(a_body())) as (url, asked):
        received = fetched(url, into)

    assert received == Received(len(FILE), hashlib.sha256(FILE).digest(), FILE[:8192], "image/png")
    assert into.bytes == FILE
    assert asked[0].line == f"POST /rest/instance/downloadMediaMessage/{KEY} HTTP/1.1"
    assert json.loads(asked[0].body) == {"messageKeys": KEYS}
    assert asked[0].headers["authorization"] == f"Bearer {TOKEN}"
    assert asked[0].headers["user-agent"] == "pombal"
    assert asked[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "body",
    [
        a_body(TEXT),
        a_body().replace("/", "\\/"),
        json.dumps({"data": f"data:;base64,{TEXT}", "error": False}),
        json.dumps({"data": TEXT}),
        json.dumps({"x": {"data": "no", "y": ["data", {"data": 1}]}, 'q"\\': "data", "data": TEXT}, indent=4),
        json.dumps({"message": "data", "erro": False, "z": '"data":"no"', "data": TEXT}),
    ],
    ids=["no prefix", "slashes", "no type", "data alone", "others of that name", "its name in a text"],
)
def test_it_may_be_written_in_other_ways(body: str) -> None:
    into = Kept()

    received = heard(an_answer(body), into)

    assert into.bytes == FILE
    assert received.content_type in ("image/jpeg", "image/png")  # of the message, or of the answer


def in_chunks(body: bytes, cuts: list[int]) -> bytes:
    parts, at = [], 0
    for cut in [*cuts, len(body)]:
        parts.append(body[at : at + cut])
        at += cut
    lines = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts if part)
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + lines + b"0\r\n\r\n"


@given(st.binary(max_size=200), st.lists(st.integers(1, 40), max_size=20), st.booleans())
@settings(max_examples=40, deadline=None)
def test_it_does_not_matter_how_the_bytes_come(content: bytes, cuts: list[int], has_slashes: bool) -> None:
    into = Kept()
    body = a_body(f"data:image/png;base64,{base64.b64encode(b'x' + content).decode()}")
    text = body.replace("/", "\\/") if has_slashes else body

    heard(in_chunks(text.encode(), cuts), into, sha256=None)

    assert into.bytes == b"x" + content


@given(st.text(st.sampled_from('\\"/ab= é\n'), max_size=12), st.lists(st.integers(1, 20), max_size=20), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_text_of_an_error_is_understood_however_it_is_cut(text: str, cuts: list[int], is_ascii: bool) -> None:
    body = json.dumps({"data": f"no {text}", "error": True, "message": "no"}, ensure_ascii=is_ascii)

    assert answered(body.encode(), cuts) == "rejected"


@pytest.mark.parametrize("cut", range(1, 40))
def test_an_escape_may_be_cut_in_two(cut: int) -> None:
    assert answered(b'{"data":"abcd\\"efgh \\u00e9","error":true}', [cut]) == "rejected"


def answered(body: bytes, cuts: list[int]) -> str:
    """The code of the fault that a body is, whose pieces are so long."""
    answer = Answer(Decoder(Kept(), 1_000))
    try:
        for cut in cuts:
            answer.feed(body[:cut])
            body = body[cut:]
        answer.feed(body)
        answer.finished()
    except MediaFault as fault:
        return fault.code
    return "none"


def test_a_large_file_is_never_whole_in_memory() -> None:
    part = b"\xa5" * 750_000
    size, text = 51_000_000, base64.b64encode(part)
    sha256 = hashlib.sha256(part * 68).hexdigest()

    def says(connection: BufferedIOBase) -> None:
        connection.write(b'HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{"error":false,"data":"data:video/mp4;base64,')
        for _ in range(68):
            connection.write(text)
        connection.write(b'"}')

    class Nowhere:
        def write(self, chunk: bytes) -> None:
            assert len(chunk) <= 1_000_000

    tracemalloc.start()
    try:
        received = heard(says, Nowhere(), most=size, sha256=sha256)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert (received.size, received.content_type) == (size, "video/mp4")
    assert peak < 10_000_000


# -- no file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (a_body("", error=True), "rejected"),
        (a_body(error=True), "rejected"),
        (json.dumps({"data": "media not found", "error": True}), "rejected"),
        (json.dumps({"data": 'no "media"/\\, é: "data":"x', "error": True}), "rejected"),
        (json.dumps({"erro": True, "message": "não"}), "rejected"),
        (a_body(""), "rejected"),
        (a_body("data:image/png;base64,"), "rejected"),
        (a_body(None), "rejected"),
        (json.dumps({"error": False}), "rejected"),
        (a_body(7), "provider_error"),
        (a_body({"base64": TEXT}), "provider_error"),
        (a_body([TEXT]), "provider_error"),
        (json.dumps([{"data": TEXT}]), "provider_error"),
        (f'{{"data":"{TEXT}","data":"{TEXT}"}}', "provider_error"),
        (f'{{"data":"{TEXT}"', "provider_error"),
        (f'{{"data":"{TEXT}', "provider_error"),
        (f'{{"data":"{TEXT}"}} more', "provider_error"),
        (f'{{"data" "{TEXT}"}}', "provider_error"),
        (f'{{"x":"{"y" * 70_000}","data":"{TEXT}"}}', "provider_error"),
        (f'{{"data":"{TEXT}","x":"{"y" * 70_000}"}}', "provider_error"),
        ("{" * 70_000, "provider_error"),
        ("", "provider_error"),
        ("OK", "provider_error"),
        (f"data:image/png;base64,{TEXT}", "provider_error"),
        (a_body(TEXT[:-1]), "encoded"),
        (a_body("!" + TEXT[1:]), "encoded"),
        (a_body(TEXT[:100] + "\n" + TEXT[100:]), "encoded"),
        (a_body(TEXT[:100] + '"' + TEXT[100:]), "encoded"),
        (a_body(TEXT[:100] + "\\" + TEXT[100:]), "encoded"),
        (a_body(TEXT + "===="), "encoded"),
        (a_body("https://mmg.whatsapp.net/v/1.enc"), "encoded"),
        (a_body("!" * 200_000), "encoded"),
        (a_body(base64.b64encode(FILE + b"x").decode()), "wrong_hash"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_an_answer_without_a_whole_file_has_a_reason(body: str, code: str) -> None:
    assert fault_of(an_answer(body)).code == code


def test_a_file_over_the_limit_is_given_up_before_it_is_decoded() -> None:
    written = 0

    def endless(connection: BufferedIOBase) -> None:
        nonlocal written
        connection.write(b'HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{"error":false,"data":"')
        while written < 200_000_000:
            connection.write(b"A" * 65_536)
            written += 65_536

    into = Kept()
    fault = fault_of(endless, into, most=100_000)

    assert (fault.code, fault.is_final) == ("too_large", True)
    assert len(into.bytes) <= 100_000
    assert written < 50_000_000  # what it takes to fill the buffers between them
    assert heard(an_answer(a_body()), most=len(FILE)).size == len(FILE)
    assert fault_of(an_answer(a_body()), most=len(FILE) - 1).code == "too_large"


@pytest.mark.parametrize(
    ("answer", "code", "wait"),
    [
        (an_answer('{"message":"no"}', "401 No"), "refused", 0),
        (an_answer('{"message":"no"}', "403 No"), "refused", 0),
        (an_answer("<html>", "403 No", content_type="text/html"), "throttled", 60),
        (an_answer('{"message":"no"}', "404 No"), "not_found", 0),
        (an_answer("{}", "429 Many", retry_after="9"), "throttled", 9),
        (an_answer("{}", "400 Bad"), "rejected", 0),
        (an_answer("<html>", "502 Bad"), "provider_error", 0),
        (an_answer(a_body(), "500 Oops"), "provider_error", 0),
        (an_answer(b" " * 1_000_000, "503 Oops", retry_after="7"), "provider_error", 7),
        (an_answer("", "307 Moved", location="https://elsewhere.example/"), "redirect", 0),
        (an_answer(a_body(), content_encoding="gzip"), "encoded", 0),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9999999\r\n\r\n" + a_body().encode()[:5000], "cut_short", 0),
        (b"HTTP/1.1 502 Bad\r\ncontent-length: 500\r\n\r\n<", "provider_error", 0),
        (b"garbage\r\n\r\n", "provider_error", 0),
        (b"", "provider_error", 0),
    ],
    ids=lambda value: value[9:30].decode() if isinstance(value, bytes) else None,
)
def test_an_answer_that_is_none_has_a_reason(answer: bytes, code: str, wait: float) -> None:
    fault = fault_of(answer)

    assert (fault.code, fault.wait) == (code, wait)


@pytest.mark.parametrize("says", [says_nothing, drips(b'HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{"data":"')])
def test_silence_and_drips_end_at_the_deadline(says: Any) -> None:
    with a_raw_server(says) as server, guard.within(SOON), pytest.raises(MediaFault) as raised:
        fetched(server.url)

    assert raised.value.code in ("timeout", "encoded")  # `x` for ever is no base64 at some time


def test_a_redirect_is_not_followed_and_the_token_stays() -> None:
    with a_gateway(an_answer(a_body())) as (elsewhere, there):
        assert fault_of(an_answer("", "302 Moved", location=f"{elsewhere}/")).code == "redirect"

    assert there == []


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"client": {"allowed": []}}, "blocked_address"),
        ({"token": ""}, "no_token"),
        ({"token": "a\nb"}, "misconfigured"),
        ({"instance_key": ".."}, "misconfigured"),
        ({"host": ""}, "misconfigured"),
    ],
)
def test_what_may_not_be_asked_leaves_nothing_out(more: dict[str, Any], code: str) -> None:
    with a_gateway(an_answer(a_body())) as (url, asked), pytest.raises(MediaFault) as raised:
        fetched(url, **more)

    assert (raised.value.code, asked) == (code, [])


def test_nobody_there_is_unreachable() -> None:
    with a_gateway(b"") as (url, _):
        pass
    with pytest.raises(MediaFault) as raised:
        fetched(url)

    assert raised.value.code == "unreachable"


def test_an_error_of_the_place_for_the_bytes_comes_through_as_it_is() -> None:
    class Full:
        def write(self, _chunk: bytes) -> None:
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        heard(an_answer(a_body()), Full())


# -- the way to it ---------------------------------------------------------------------------------------------------


def test_a_file_with_keys_comes_from_the_gateway() -> None:
    config = {"host": "api2.megaapi.com.br", "instance_key": KEY}
    row = {"link": None, "keys": KEYS, "provider_media_id": None, "sha256": SHA256}

    source = providers.source("megaapi", config, {"token": TOKEN}, row)

    assert isinstance(source, MegaMedia)
    assert source.host == "api2.megaapi.com.br"
    assert isinstance(providers.source("megaapi", config, {}, {**row, "link": "https://a.example/a"}), Link)
    with pytest.raises(Permanent):
        providers.source("megaapi", config, {}, {**row, "keys": None})
