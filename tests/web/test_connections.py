"""Clients that are slow, silent, ambiguous or never stop, and those that are merely unusual (W5-W8)."""

import contextlib
import os
import threading
import time

import pytest

from pombal.supervisor import until
from sandbox import meta
from tests.factories import Shop
from tests.web.process import Answer, Web, Wire, request, signed

CLOSED_BY = 30.0  # seconds
DEADLINE = 10.0  # … and what we hold ourselves to


class Slow:
    """A connection that says a little, then drips, and how long the server bears it."""

    def __init__(self, web: Web, *first: bytes, drip: bytes = b"") -> None:
        self.wire = web.wire(timeout=CLOSED_BY)
        self.answers: list[Answer] = []
        for part in first[:-1]:
            self.answers.append(self.wire.send(part).answer())
        if first:
            self.wire.send(first[-1])
        self._began = time.monotonic()
        self._drip = drip
        self.lasted = CLOSED_BY
        self._thread = threading.Thread(target=self._watch)
        self._dripping = threading.Thread(target=self._drips)
        self._gone = threading.Event()
        self._thread.start()
        self._dripping.start()

    def _watch(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while not self._gone.is_set():
                self.answers.append(self.wire.answer())
                self._gone.set() if self.answers[-1].headers.get("connection") == "close" else None
        with contextlib.suppress(OSError):
            if self.wire.is_closed_by_peer():
                self.lasted = time.monotonic() - self._began
        self._gone.set()

    def _drips(self) -> None:
        while self._drip and not self._gone.wait(0.5):
            with contextlib.suppress(OSError):
                self.wire.send(self._drip)

    def end(self) -> float:
        self._thread.join()
        self._dripping.join()
        self.wire.close()
        return self.lasted


def test_no_slow_client_keeps_its_connection(web: Web, shop: Shop) -> None:
    """All at once, because each takes ten seconds."""
    good = request("GET", "/health")
    post = request("POST", shop.url, ("Content-Length", "1000"))
    slow = {
        "silent": Slow(web),
        "half a request line": Slow(web, b"POST /web"),
        "drips its headers": Slow(web, b"POST / HTTP/1.1\r\nX-Long: ", drip=b"x"),
        "silent after some headers": Slow(web, b"POST / HTTP/1.1\r\nHost: x\r\n"),
        "silent instead of a body": Slow(web, post),
        "drips its body": Slow(web, post, drip=b"x"),
        "drips chunks": Slow(web, request("POST", shop.url, ("Transfer-Encoding", "chunked")), drip=b"1\r\nx\r\n"),
        "drips a chunk's size": Slow(web, request("POST", shop.url, ("Transfer-Encoding", "chunked")), drip=b"0"),
        "a good request, then half of one": Slow(web, good, b"GET /hea"),
        "a good request, then an empty line": Slow(web, good, b"\r\n"),
        "a good request, then drips empty lines": Slow(web, good, drip=b"\r\n"),
        "a body that nobody waits for": Slow(web, request("POST", "/nope", ("Content-Length", "1000")), b"x"),
        "drips a body that nobody waits for": Slow(
            web, request("GET", "/health", ("Content-Length", "1000")), drip=b"x"
        ),
    }

    lasted = {name: client.end() for name, client in slow.items()}

    assert {name: seconds for name, seconds in lasted.items() if seconds > DEADLINE + 8} == {}
    assert min(lasted.values()) > 5  # and nobody is cut off who is only a little slow
    assert [answer.status for answer in slow["drips its body"].answers] == [408]
    assert [answer.status for answer in slow["a good request, then half of one"].answers] == [200, 408]


def test_two_hundred_silent_connections_keep_nobody_out(web: Web, shop: Shop) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(web.wire())
        began = time.monotonic()
        response = web.ask(signed(shop, b"{}"))

        assert response.status == 200
        assert time.monotonic() - began < 6


def test_a_header_line_without_end_is_refused(web: Web, shop: Shop) -> None:
    before = web.memory()
    with web.wire() as wire:
        wire.send(b"POST / HTTP/1.1\r\nX-Long: ")
        sent = 0
        with contextlib.suppress(ConnectionError):
            for _ in range(256):
                wire.send(b"x" * 64 * 1024)
                sent += 1

        assert sent < 256
        assert wire.is_closed_by_peer()
    assert web.memory() - before < 16 * 1024 * 1024


@pytest.mark.parametrize(
    "fields",
    [
        [(f"X-{n}", "v") for n in range(201)],
        [("X-Large", "v" * 70_000)],
        [(f"X-{n}", "v" * 1000) for n in range(70)],
        [("X-Long-Name-" + "n" * 70_000, "v")],
        [("Cookie", "v" * 1_000_000)],
        [("Authorization", "Bearer " + "v" * 1_000_000)],
    ],
    ids=["201 fields", "a 70 KB value", "70 KB in all", "a 70 KB name", "1 MB cookie", "1 MB key"],
)
def test_too_many_or_too_large_headers_are_refused(web: Web, shop: Shop, fields: list[tuple[str, str]]) -> None:
    signature = ("X-Hub-Signature-256", meta.sign(b"", shop.app_secret))
    with web.wire() as wire:
        with contextlib.suppress(ConnectionError):
            wire.send(request("POST", shop.url, signature, *fields, ("Content-Length", "0")))
        with contextlib.suppress(ConnectionError, EOFError):
            assert wire.answer().status in (400, 431)
        assert wire.is_closed_by_peer()


def test_a_url_without_end_is_refused(web: Web) -> None:
    with web.wire() as wire:
        with contextlib.suppress(ConnectionError):
            wire.send(b"GET /")
            for _ in range(64):
                wire.send(b"x" * 64 * 1024)
        assert wire.is_closed_by_peer()


def test_headers_within_the_limits_are_read(web: Web) -> None:
    many = [(f"X-{n}", "v" * 200) for n in range(190)]

    assert web.ask(request("GET", "/health", *many)).status == 200


AMBIGUOUS = {
    "length twice": [("Content-Length", "2"), ("Content-Length", "2")],
    "two lengths": [("Content-Length", "2"), ("Content-Length", "3")],
    "length list": [("Content-Length", "2, 2")],
    "negative": [("Content-Length", "-2")],
    "signed": [("Content-Length", "+2")],
    "hexadecimal": [("Content-Length", "0x2")],
    "a word": [("Content-Length", "two")],
    "too large to count": [("Content-Length", "9" * 40)],
    "length and chunks": [("Content-Length", "2"), ("Transfer-Encoding", "chunked")],
    "chunks and length": [("Transfer-Encoding", "chunked"), ("Content-Length", "2")],
    "unknown transfer encoding": [("Transfer-Encoding", "gzip")],
    "chunked is not last": [("Transfer-Encoding", "chunked, gzip")],
    "space before the colon": [("Content-Length ", "2")],
    "a NUL in a value": [("X-A", "a\x00b")],
    "a bare carriage return": [("X-A", "a\rb")],
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_an_ambiguous_request_is_refused(web: Web, shop: Shop, name: str) -> None:
    signature = ("X-Hub-Signature-256", meta.sign(b"{}", shop.app_secret))
    with web.wire() as wire:
        response = wire.send(request("POST", shop.url, signature, *AMBIGUOUS[name], body=b"{}")).answer()

        assert response.status == 400
        assert wire.is_closed_by_peer()


@pytest.mark.parametrize(
    "noise",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x00" * 64,
        b"GET /\xe9 HTTP/1.1\r\n\r\n",
        b"GET http:// HTTP/1.1\r\n\r\n",
    ],
    ids=["TLS", "HTTP/2", "zeros", "not ASCII", "half a URL"],
)
def test_what_is_not_http_is_refused(web: Web, noise: bytes) -> None:
    with web.wire() as wire:
        wire.send(noise)
        with contextlib.suppress(EOFError):
            assert wire.answer().status in (400, 404)


def test_a_connection_is_used_again(web: Web, shop: Shop) -> None:
    with web.wire() as wire:
        answers = [wire.send(signed(shop, b"{}")).answer() for _ in range(5)]

    assert [answer.status for answer in answers] == [200] * 5


def test_requests_in_a_row_are_answered_in_that_row(web: Web, shop: Shop) -> None:
    with web.wire() as wire:
        wire.send(signed(shop, b"{}") + request("GET", "/nope") + signed(shop, b"[]") + request("GET", "/health"))

        assert [wire.answer().status for _ in range(4)] == [200, 404, 200, 200]


def test_a_bad_request_in_a_row_spoils_none_before_it(web: Web, shop: Shop) -> None:
    too_many = request("POST", shop.url, *[("X-A", "v")] * 201, ("Content-Length", "5"), body=b"hello")
    with web.wire() as wire:
        wire.send(signed(shop, b'{"first":1}') + too_many)

        assert wire.answer().status == 200
        assert wire.is_closed_by_peer()


def test_a_body_is_a_body_even_where_an_upgrade_is_asked_for(web: Web, shop: Shop) -> None:
    """What follows must never be taken for a request of its own."""
    smuggled = request("GET", "/smuggled")
    fields = [("Connection", "Upgrade"), ("Upgrade", "h2c"), ("Content-Length", str(len(smuggled)))]
    with web.wire() as wire:
        wire.send(request("POST", shop.url, *fields))
        with contextlib.suppress(ConnectionError):
            wire.send(smuggled)
        assert wire.answer().status in (400, 401)
        with contextlib.suppress(EOFError, ConnectionError):
            assert wire.answer().status is None, "a second answer"


def test_an_upgrade_that_is_not_offered_is_ignored(web: Web) -> None:
    fields = [("Connection", "Upgrade"), ("Upgrade", "websocket")]

    assert web.ask(request("GET", "/health", *fields)).status == 200


def test_hundreds_of_clients_that_come_and_go_leave_nothing_behind(web: Web, shop: Shop) -> None:
    def descriptors() -> int:
        return len(os.listdir(f"/proc/{web.process.pid}/fd"))

    before = descriptors()
    for n in range(300):
        with Wire(web.port) as wire:
            wire.send([b"", b"GET / HT", request("POST", shop.url, ("Content-Length", "9"), body=b"x")][n % 3])

    assert until(lambda: descriptors() <= before + 3, time.monotonic() + 20)
