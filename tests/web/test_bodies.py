"""How large and how encoded a body may be (security-reliability.md W4, W9, W13)."""

import contextlib
import time

import pytest

from pombal.supervisor import until
from sandbox import meta
from tests.factories import Shop, rows
from tests.web.process import Web, request, signed

MiB = 1024 * 1024
SLACK = 24 * MiB  # what the allocator may keep beside the 16 MiB


def posting(shop: Shop, *fields: tuple[str, str], body: bytes = b"") -> bytes:
    signature = ("X-Hub-Signature-256", meta.sign(body, shop.app_secret))
    return request("POST", shop.url, signature, *fields, body=body)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def test_three_megabytes_are_accepted(web: Web, shop: Shop) -> None:
    raw = b"{" + b"x" * (3 * 10**6) + b"}"

    assert web.post(shop, raw).status_code == 200


def test_exactly_the_limit_is_accepted_and_one_byte_more_is_not(web: Web, shop: Shop) -> None:
    assert web.post(shop, b"x" * (4 * MiB)).status_code == 200

    response = web.ask(posting(shop, ("Content-Length", str(4 * MiB + 1))))

    assert (response.status, response.code) == (413, "PAYLOAD_TOO_LARGE")


@pytest.mark.parametrize("length", [4 * MiB + 1, 10**10, 2**63 - 1])
def test_a_declared_length_over_the_limit_is_refused_before_a_byte_of_it_is_read(
    web: Web, shop: Shop, length: int
) -> None:
    with web.wire() as wire:
        response = wire.send(posting(shop, ("Content-Length", str(length)))).answer()

        assert response.status == 413
        assert response.headers["connection"] == "close"
        assert wire.is_closed_by_peer()


def test_the_same_refusal_for_an_app_that_does_not_exist(web: Web) -> None:
    field = ("Content-Length", str(4 * MiB + 1))

    assert web.ask(request("POST", "/webhooks/whatsapp/nobody", field)).status == 413


def test_a_sender_that_waits_for_leave_is_refused_without_it(web: Web, shop: Shop) -> None:
    fields = [("Expect", "100-continue"), ("Content-Length", str(5 * MiB))]

    assert web.ask(posting(shop, *fields)).status == 413


def test_a_sender_that_waits_for_leave_gets_it(web: Web, shop: Shop) -> None:
    raw = b"{}"
    with web.wire() as wire:
        wire.send(posting(shop, ("Expect", "100-continue"), ("Content-Length", "2"), body=raw)[: -len(raw)])
        assert wire.answer().status == 100

        assert wire.send(b"xx").answer().status == 401  # other bytes than were signed


def test_a_chunked_body_is_accepted(web: Web, shop: Shop) -> None:
    head = request(
        "POST", shop.url, ("Transfer-Encoding", "chunked"), ("X-Hub-Signature-256", meta.sign(b"olhe", shop.app_secret))
    )

    assert web.ask(head + chunk(b"ol") + chunk(b"he") + chunk(b"")).status == 200


def test_a_chunked_body_is_cut_off_at_the_limit_with_little_memory(web: Web, shop: Shop) -> None:
    before = web.memory()
    with web.wire() as wire:
        wire.send(posting(shop, ("Transfer-Encoding", "chunked")))
        sent = 0
        with contextlib.suppress(ConnectionError):  # closed while we were still sending
            for _ in range(64):
                wire.send(chunk(b"x" * MiB))
                sent += 1

        assert sent < 64
        assert web.memory() - before < 16 * MiB + SLACK
        assert wire.is_closed_by_peer()


def test_the_refusal_of_a_chunked_body_is_heard(web: Web, shop: Shop) -> None:
    with web.wire() as wire:
        wire.send(posting(shop, ("Transfer-Encoding", "chunked")))
        for _ in range(4):
            wire.send(chunk(b"x" * MiB))
        response = wire.send(b"1\r\nx").answer()

        assert (response.status, response.headers["connection"]) == (413, "close")
        assert wire.is_closed_by_peer()


def test_what_follows_the_last_chunk_may_not_fill_the_memory(web: Web, shop: Shop) -> None:
    before = web.memory()
    with web.wire() as wire:
        wire.send(posting(shop, ("Transfer-Encoding", "chunked")) + chunk(b"x") + b"0\r\nX-Trailer: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                wire.send(b"x" * MiB)

        assert web.memory() - before < 16 * MiB + SLACK
        assert wire.is_closed_by_peer()


def test_an_endless_chunk_extension_is_cut_off(web: Web, shop: Shop) -> None:
    with web.wire() as wire:
        wire.send(posting(shop, ("Transfer-Encoding", "chunked")) + b"5;x=")
        sent = 0
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                wire.send(b"x" * MiB)
                sent += 1

        assert sent < 64
        assert wire.is_closed_by_peer()


def test_bodies_that_do_not_end_may_not_fill_the_memory_together(web: Web, shop: Shop) -> None:
    """Unproven bodies share a budget; what fits into a small buffer goes past it."""
    before = web.memory()
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(web.wire()) for _ in range(80)]
        for wire in wires:
            with contextlib.suppress(ConnectionError):
                wire.send(posting(shop, ("Content-Length", str(4 * MiB))) + b"x" * (4 * MiB - 1))

        assert web.post(shop, b"{}").status_code == 200
        assert web.memory() - before < 200 * MiB
    assert until(lambda: web.post(shop, b"x" * (3 * MiB)).status_code == 200, time.monotonic() + 20)


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "gzip, identity", "nonsense", ""])
def test_an_encoded_body_is_refused(web: Web, shop: Shop, encoding: str) -> None:
    response = web.ask(posting(shop, ("Content-Encoding", encoding), ("Content-Length", "2"), body=b"{}"))

    assert response.status == 415


def test_identity_is_no_encoding(web: Web, shop: Shop) -> None:
    assert web.post(shop, b"{}", **{"Content-Encoding": "identity"}).status_code == 200


def test_a_sender_that_leaves_in_the_middle_leaves_no_row_and_wakes_nobody(web: Web, shop: Shop) -> None:
    marker = "x-left-in-the-middle"
    before = len(rows(shop, "SELECT 1 FROM delivery"))
    for _ in range(3):
        with web.wire() as wire:
            wire.send(posting(shop, ("X-Request-ID", marker), ("Content-Length", "100")) + b"half")
            # The whole of what was sent is with the server once it answers on a later connection.
        assert web.post(shop, b"{}").status_code == 200

    assert len(rows(shop, "SELECT 1 FROM delivery")) == before + 3
    assert not [line for line in web.lines() if line["level"] == "error" and line.get("request_id") == marker]


def test_bytes_beyond_the_declared_length_are_not_part_of_the_body(web: Web, shop: Shop) -> None:
    with web.wire() as wire:
        assert wire.send(signed(shop, b"{}") + b"garbage\r\n\r\n").answer().status == 200
        assert wire.is_closed_by_peer()
