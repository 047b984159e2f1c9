"""One file from a place that may be hostile, over real sockets: whole and unchanged, or a fault that says why not."""

import errno
import gzip
import hashlib
import socket
import ssl
import struct
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers import guard
from providers.download import allowance, download
from providers.media import FAULTS, HEAD, MediaFault, Received, digest_of
from tests.providers.test_guard import SOON, Pki, Says, a_pki, a_server, an_answer, drips, leads_to, until

HERE_ONLY = ip_network("127.0.0.1/32")
FILE = bytes(range(256)) * 100
DIGEST = hashlib.sha256(FILE).digest()
SECRET = "EAAB-a-token-that-nobody-else-may-see"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return a_pki(tmp_path_factory.mktemp("pki"), "media.example", "other.example")


class Kept:
    """A place for bytes."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []

    def write(self, chunk: bytes) -> None:
        self.chunks.append(chunk)

    @property
    def bytes(self) -> bytes:
        return b"".join(self.chunks)


@contextmanager
def a_client(**more: Any) -> Iterator[httpx.Client]:
    options = {"guarded": True, "allowed": [HERE_ONLY], "ports": None, "schemes": ("https", "http"), **more}
    with guard.client(**options) as client:
        yield client


def fetched(client: httpx.Client, url: str, into: Any = None, **more: Any) -> Received:
    options: dict[str, Any] = {
        "headers": {},
        "most_bytes": 1_000_000,
        "seconds": 60,
        "expected_bytes": None,
        "expected_digest": None,
        "may_redirect": False,
        **more,
    }
    return download(client, url, into=Kept() if into is None else into, **options)


def fault(client: httpx.Client, url: str, into: Any = None, **more: Any) -> MediaFault:
    """Why it is not taken. Whatever the reason: its text and what comes with it name no host, URL or secret."""
    with pytest.raises(MediaFault) as raised:
        fetched(client, url, into, **more)
    found = raised.value
    assert found.code in FAULTS
    assert found.__cause__ is None
    assert found.__suppress_context__ or found.__context__ is None
    assert not any(word in str(found) for word in ("127.0.0.1", "localhost", "example", "http:", "https:", SECRET))
    return found


def heard(*answers: bytes | Says, into: Any = None, **more: Any) -> MediaFault:
    """What a fetch is taken for when the server says this."""
    with a_server(*answers) as server, a_client() as client:
        return fault(client, f"{server.url}/file", into, **more)


def closes_after(raw: bytes) -> Says:
    return lambda connection: connection.sendall(raw)


def resets_after(raw: bytes) -> Says:
    def reset(connection: socket.socket) -> None:
        connection.sendall(raw)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return reset


def never_ends(head: str, chunk: bytes) -> Says:
    def say(connection: socket.socket) -> None:
        connection.sendall(head.encode())
        while True:
            connection.sendall(chunk)

    return say


def chunked(*parts: bytes) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body


# -- a file that comes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        an_answer(FILE, content_type="image/jpeg"),
        chunked(FILE[:1], FILE[1:HEAD], FILE[HEAD:]).replace(b"\r\n\r\n", b"\r\ncontent-type: image/jpeg\r\n\r\n", 1),
        closes_after(b"HTTP/1.0 200 OK\r\ncontent-type: image/jpeg\r\n\r\n" + FILE),
        an_answer(FILE, "203 From a cache", content_type="image/jpeg", content_encoding="identity"),
    ],
    ids=["with its length", "in chunks", "until the end", "identity"],
)
def test_a_file_comes_whole_and_is_known_by_its_hash(answer: bytes | Says) -> None:
    into = Kept()

    with a_server(answer) as server, a_client() as client:
        received = fetched(client, server.url, into, expected_bytes=len(FILE), expected_digest=DIGEST)

    assert received == Received(len(FILE), DIGEST, FILE[:HEAD], "image/jpeg")
    assert into.bytes == FILE


def test_an_empty_file_is_a_file_and_may_lack_a_type() -> None:
    with a_server(an_answer(b"")) as server, a_client() as client:
        assert fetched(client, server.url) == Received(0, hashlib.sha256().digest(), b"", None)


def test_the_request_carries_what_it_was_given_and_asks_for_plain_bytes() -> None:
    headers = {"Authorization": f"Bearer {SECRET}", "accept-encoding": "gzip", "X-Key": "1"}

    with a_server(an_answer()) as server, a_client() as client:
        fetched(client, f"{server.url}/a%2Fb?c=d&e=%20", headers=headers)

    (asked,) = server.asked
    assert asked.target == "/a%2Fb?c=d&e=%20"
    assert asked.headers["authorization"] == f"Bearer {SECRET}"
    assert asked.headers["accept-encoding"] == "identity"
    assert asked.headers["user-agent"] == "pombal"
    assert asked.headers["x-key"] == "1"
    assert headers["accept-encoding"] == "gzip"


def test_one_connection_serves_one_file_after_the_other() -> None:
    with a_server(an_answer(FILE)) as server, a_client() as client:
        for _ in range(3):
            fetched(client, server.url)

        assert server.connections == 1


@given(st.lists(st.binary(min_size=1, max_size=3 * HEAD), max_size=6), st.booleans())
@settings(max_examples=30, deadline=None)
def test_hash_and_head_do_not_depend_on_how_the_bytes_come(parts: list[bytes], is_chunked: bool) -> None:
    whole, into = b"".join(parts), Kept()

    with a_server(chunked(*parts) if is_chunked else an_answer(whole)) as server, a_client() as client:
        received = fetched(client, server.url, into)

    assert received == Received(len(whole), hashlib.sha256(whole).digest(), whole[:HEAD], None)
    assert into.bytes == whole


def test_a_large_file_is_never_whole_in_memory() -> None:
    size, part = 100_000_000, b"\xa5" * 1_000_000
    digest = hashlib.sha256(part * 100).digest()

    def says(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        for _ in range(100):
            connection.sendall(part)

    class Nowhere:
        def write(self, chunk: bytes) -> None:
            assert len(chunk) <= 1_000_000

    with a_server(says) as server, a_client() as client:
        tracemalloc.start()
        try:
            received = fetched(client, server.url, Nowhere(), most_bytes=size, expected_digest=digest)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    assert received.size == size
    assert peak < 10_000_000


# -- a file that is not the one announced ----------------------------------------------------------------------------


def test_another_size_or_hash_than_announced_is_not_taken() -> None:
    for expected in len(FILE) - 1, len(FILE) + 1:
        found = heard(an_answer(FILE), expected_bytes=expected)
        assert (found.code, found.is_final) == ("wrong_size", False)
    for claimed in hashlib.sha256(b"another").hexdigest(), "A" * 43 + "=":
        found = heard(an_answer(FILE), expected_digest=digest_of(claimed))
        assert (found.code, found.is_final) == ("wrong_hash", False)


# -- too much --------------------------------------------------------------------------------------------------------


def test_a_length_over_the_limit_is_refused_before_a_byte_is_read() -> None:
    into = Kept()

    found = heard(drips(b"HTTP/1.1 200 OK\r\ncontent-length: 1001\r\n\r\n"), into=into, most_bytes=1000)

    assert (found.code, found.is_final) == ("too_large", True)
    assert into.chunks == []


@pytest.mark.parametrize(
    "says",
    [
        never_ends("HTTP/1.1 200 OK\r\n\r\n", b"x" * 999),
        never_ends("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"3e7\r\n" + b"x" * 999 + b"\r\n"),
        chunked(b"x" * 1000, b"x"),
        closes_after(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1001),
        # A length beside chunks does not count.
        chunked(b"x" * 1001).replace(b"\r\n\r\n", b"\r\ncontent-length: 5\r\n\r\n", 1),
    ],
)
def test_more_than_the_limit_is_not_taken_whatever_was_said(says: bytes | Says) -> None:
    into = Kept()

    found = heard(says, into=into, most_bytes=1000)

    assert (found.code, found.is_final) == ("too_large", True)
    assert len(into.bytes) <= 1000


def test_exactly_the_limit_is_taken() -> None:
    for answer in an_answer(b"x" * 1000), chunked(b"x" * 1000):
        with a_server(answer) as server, a_client() as client:
            assert fetched(client, server.url, most_bytes=1000).size == 1000


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "deflate", "x-own", "identity, gzip", "GZIP"])
def test_an_encoded_answer_is_refused_unread(encoding: str) -> None:
    into = Kept()

    found = heard(an_answer(gzip.compress(bytes(1_000_000)), content_encoding=encoding), into=into)

    assert (found.code, found.is_final) == ("encoded", False)
    assert into.chunks == []


# -- too little ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "says",
    [
        closes_after(an_answer(FILE)[:-1]),
        closes_after(an_answer(FILE)[: -len(FILE)]),
        closes_after(chunked(FILE)[:-5]),
        closes_after(chunked(FILE, FILE)[:30_000]),
        resets_after(an_answer(FILE)[:-1]),
        closes_after(chunked(FILE).replace(b"6400\r\n", b"lots\r\n")),
    ],
)
def test_an_end_before_the_files_end_is_cut_short(says: Says) -> None:
    found = heard(says)

    assert (found.code, found.is_final) == ("cut_short", False)


def test_an_end_that_tls_does_not_confirm_is_cut_short(pki: Pki) -> None:
    body = b"HTTP/1.1 200 OK\r\n\r\n" + FILE

    def just_closes(connection: socket.socket) -> None:
        connection.sendall(body)

    def says_goodbye(connection: socket.socket) -> None:
        assert isinstance(connection, ssl.SSLSocket)
        connection.sendall(body)
        connection.unwrap()

    options: dict[str, Any] = {"verify": pki.client, "resolve": leads_to("127.0.0.1")}
    with a_server(says_goodbye, just_closes, tls=pki.server) as server, a_client(**options) as client:
        url = f"https://media.example:{server.port}/"
        assert fetched(client, url, expected_digest=DIGEST).size == len(FILE)
        assert fault(client, url).code == "cut_short"


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nx-never-ends: ",
        b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nlocation: ",
    ],
    ids=["status line", "headers", "body", "redirect"],
)
def test_a_drip_ends_at_the_total_deadline(start: bytes) -> None:
    found = heard(drips(start), seconds=SOON)

    assert (found.code, found.is_final) == ("timeout", False)


def test_redirects_share_one_deadline() -> None:
    with a_server(an_answer(b"", "302 Found", location="/next"), drips()) as server, a_client() as client:
        assert fault(client, server.url, seconds=SOON, may_redirect=True).code == "timeout"


def test_a_large_file_is_given_more_time() -> None:
    assert allowance(0) == 60
    assert 200 < allowance(100 * 1024 * 1024) < 300


# -- no file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (404, "not_found"),
        (410, "not_found"),
        (401, "refused"),
        (403, "refused"),
        (400, "provider_error"),
        (416, "provider_error"),
        (429, "provider_error"),
        (500, "provider_error"),
        (503, "provider_error"),
        (300, "redirect"),
        (304, "redirect"),
        (101, "provider_error"),
        (204, "provider_error"),
        (206, "provider_error"),
    ],
)
def test_only_an_answer_with_a_whole_file_is_one(status: int, code: str) -> None:
    into = Kept()

    found = heard(an_answer(FILE, f"{status} Anything"), into=into)

    assert (found.code, found.is_final, found.wait) == (code, False, 0)
    assert into.chunks == []


@pytest.mark.parametrize(
    ("value", "wait"),
    [
        *[("7", 7), ("0", 0), ("3600", 3600), ("999999", 3600), ("9" * 400, 3600), ("-1", 0), ("1.5", 0), ("7²", 0)],
        *[("Wed, 21 Oct 2026 07:28:00 GMT", 0), ("", 0)],
    ],
)
def test_how_long_to_wait_is_heard_within_reason(value: str, wait: float) -> None:
    for status in "503 Busy", "429 Slow down":
        found = heard(an_answer(b"", status, retry_after=value))
        assert (found.code, found.wait) == ("provider_error", wait)


@pytest.mark.parametrize(
    ("says", "code"),
    [
        (closes_after(b""), "provider_error"),
        (closes_after(b"SSH-2.0-OpenSSH_9.9\r\n"), "provider_error"),
        (closes_after(b"\x16\x03\x01"), "provider_error"),
        (closes_after(b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n"), "provider_error"),
        (closes_after(b"HTTP/1.1 200 OK\r\ncontent-length: 5, 6\r\n\r\n"), "provider_error"),
        (closes_after(b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n"), "provider_error"),
        (closes_after(b"HTTP/1.1 200 OK\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\n"), "provider_error"),
        (closes_after(b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n"), "provider_error"),
        (closes_after(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000 + b"\r\n\r\n"), "provider_error"),
        (never_ends("HTTP/1.1 200 OK\r\n", b"x: y\r\n" * 1000), "provider_error"),
        (resets_after(b"HTTP/1.1 200 OK\r\n"), "unreachable"),
    ],
)
def test_an_answer_that_is_not_proper_http_is_no_file(says: Says, code: str) -> None:
    found = heard(says)

    assert (found.code, found.is_final) == (code, False)


def test_nobody_there_is_unreachable(pki: Pki) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with a_client() as client:
        found = fault(client, f"http://127.0.0.1:{port}/")
    assert (found.code, found.is_final) == ("unreachable", False)
    assert "ConnectionRefusedError" in found.text

    with a_server(an_answer(), tls=pki.server) as server, a_client(resolve=leads_to("127.0.0.1")) as client:
        found = fault(client, f"https://media.example:{server.port}/")
    assert (found.code, found.is_final) == ("unreachable", False)
    assert "SSLCertVerificationError" in found.text


# -- where it leads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.2/", "http://169.254.169.254/latest/meta-data/", "file:///etc/passwd", "gopher://127.0.0.1/"),
        *("http://user:pass@127.0.0.1/", "http://[::1", "http://127.0.0.1:port/", "", "nothing", "http://"),
        *("http://exa\x00mple/", "http://\udcff/", "//127.0.0.1/", "http:127.0.0.1", f"http://{'a' * 70_000}/"),
    ],
    ids=lambda url: ascii(url)[:40],
)
def test_a_bad_address_is_final(url: str) -> None:
    with a_client() as client:
        found = fault(client, url)

    assert (found.code, found.is_final) == ("blocked_address", True)


def moved(to: str, status: str = "302 Found") -> bytes:
    return an_answer(b"gone", status, location=to, set_cookie="who=someone")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_where_it_may_be(status: int) -> None:
    with a_server(moved("../there?x=y", f"{status} Moved"), an_answer(FILE)) as server, a_client() as client:
        assert fetched(client, f"{server.url}/a/b", may_redirect=True).digest == DIGEST

        assert [asked.target for asked in server.asked] == ["/a/b", "/there?x=y"]


def test_a_redirect_is_refused_where_it_may_not_be() -> None:
    with a_server(moved("/there")) as server, a_client() as client:
        found = fault(client, server.url, may_redirect=False)

        assert (found.code, found.is_final) == ("redirect", False)
        assert len(server.asked) == 1


def test_three_redirects_are_followed_and_no_fourth() -> None:
    with a_server(moved("/1"), moved("/2"), moved("/3"), an_answer(FILE)) as server, a_client() as client:
        assert fetched(client, server.url, may_redirect=True).digest == DIGEST
    with a_server(moved("/again")) as server, a_client() as client:
        assert fault(client, server.url, may_redirect=True).code == "redirect"

        assert len(server.asked) == 4


def test_nothing_that_proves_who_we_are_follows_a_redirect_not_even_to_the_same_host() -> None:
    headers = {"AUTHORIZATION": f"Bearer {SECRET}", "Cookie": f"s={SECRET}", "X-Api-Key": SECRET, "User-Agent": "who"}

    with a_server(an_answer(FILE)) as other, a_server(moved("/own"), moved(f"{other.url}/x")) as server:
        with a_client() as client:
            fetched(client, server.url, headers=headers, may_redirect=True)

        first, *later = [*server.asked, *other.asked]
        assert first.headers["authorization"] == f"Bearer {SECRET}"
        assert first.headers["x-api-key"] == SECRET
        assert [asked.target for asked in later] == ["/own", "/x"]
        for asked in later:
            assert not {"authorization", "cookie", "x-api-key", "referer"} & set(asked.headers)
            assert asked.headers["user-agent"] == "who"
            assert asked.headers["accept-encoding"] == "identity"
        assert other.asked[0].headers["host"] == f"127.0.0.1:{other.port}"


@pytest.mark.parametrize(
    "to",
    [
        *("http://169.254.169.254/latest/meta-data/", "http://127.0.0.2:{port}/", "//127.0.0.2:{port}/"),
        *("http://localhost.:{port}/", "http://[::1]:{port}/", "http://user@127.0.0.1:{port}/"),
        *("http://2130706434:{port}/", "file:///etc/passwd", "gopher://127.0.0.1/", "javascript:alert(1)"),
    ],
)
def test_a_redirect_is_checked_like_the_first_address(to: str) -> None:
    with a_server(an_answer(FILE), host="0.0.0.0") as inside, a_client() as client:  # noqa: S104
        with a_server(moved(to.format(port=inside.port))) as server:
            found = fault(client, server.url, may_redirect=True)

        assert (found.code, found.is_final) == ("blocked_address", True)
        assert inside.asked == []


def test_a_redirect_may_lead_from_http_to_https_and_never_back(pki: Pki) -> None:
    options: dict[str, Any] = {"verify": pki.client, "resolve": leads_to("127.0.0.1")}
    with (
        a_server(an_answer(FILE)) as plain,
        a_server(an_answer(FILE), tls=pki.server) as safe,
        a_client(**options) as c,
    ):
        with a_server(moved(f"https://other.example:{safe.port}/")) as server:
            assert fetched(c, f"http://media.example:{server.port}/", may_redirect=True).digest == DIGEST

        assert safe.asked[0].name == "other.example"

        with a_server(moved(f"http://media.example:{plain.port}/"), tls=pki.server) as server:
            found = fault(c, f"https://media.example:{server.port}/", may_redirect=True)

        assert (found.code, found.is_final) == ("blocked_address", True)
        assert plain.asked == []


_ODD = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=40)


@given(st.one_of(_ODD, _ODD.map("http://127.0.0.1{}".format), _ODD.map("https://{}/x".format), _ODD.map("//{}".format)))
@settings(max_examples=60, deadline=None)
def test_no_place_that_a_redirect_names_can_do_more_than_fail(to: str) -> None:
    with a_client(resolve=leads_to("127.0.0.2")) as client, a_server(moved(to)) as server:
        fault(client, server.url, may_redirect=True)


@given(_ODD)
@settings(max_examples=100, deadline=None)
def test_no_url_can_do_more_than_fail(url: str) -> None:
    with a_client(resolve=leads_to("127.0.0.2")) as client:
        for one in url, f"https://{url}/", f"http://media.example{url}":
            assert fault(client, one).code == "blocked_address"


# -- trouble of our own ----------------------------------------------------------------------------------------------


def test_an_error_of_the_place_for_the_bytes_comes_through_as_it_is() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    class Full:
        def write(self, _chunk: bytes) -> None:
            raise full

    with a_server(an_answer(FILE)) as server, a_client() as client:
        with pytest.raises(OSError, match="No space") as raised:
            fetched(client, server.url, Full())
        assert raised.value is full

        assert fetched(client, server.url).digest == DIGEST


def test_no_connection_is_left_open_by_what_went_wrong() -> None:
    with a_server(never_ends("HTTP/1.1 200 OK\r\n\r\n", b"x" * 1000)) as server, a_client() as client:
        assert fault(client, server.url, most_bytes=10).code == "too_large"

        until(lambda: not any(thread.is_alive() for thread in server._threads[1:]))


def test_several_threads_share_one_client() -> None:
    with a_server(an_answer(FILE)) as server, a_client() as client:
        outcomes: list[bytes] = []
        threads = [
            threading.Thread(target=lambda: outcomes.extend(fetched(client, server.url).digest for _ in range(10)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

    assert outcomes == [DIGEST] * 80
