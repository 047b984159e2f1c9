"""What the web process writes down under hostile hands (security-reliability.md L1, L2, L4)."""

import json
import time
import uuid
from collections.abc import Callable

import pytest

from pombal.cli import admin
from pombal.supervisor import until
from sandbox import meta
from tests.factories import Shop, a_shop, a_wamid, texts
from tests.web.process import Web, request

LONGEST = 8 * 1024
MARK = "mArk" + uuid.uuid4().hex


@pytest.fixture(scope="module")
def lines_of_others(web: Web) -> int:
    """How many lines other tests have caused, some of them with a broken storage."""
    return len(web.lines())


@pytest.fixture(scope="module")
def secrets_after_all_that(web: Web, lines_of_others: int) -> dict[str, str]:
    """Do everything a log could quote; returns what must not be in it."""
    shop = a_shop(old_app_secret=f"old-{MARK}", access_token=f"EAAG-{MARK}")
    _, key = admin.add_key(shop.tenant.id, "a key", ("channels:manage",))
    _, weak = admin.add_key(shop.tenant.id, "a key", ("sip:manage",))
    wamid, phone, text = a_wamid(), "5511977778888", f"mensagem {MARK} confidencial"
    raw = texts(shop, wamid, from_=phone, body=text)
    signature = meta.sign(raw, shop.app_secret)

    web.post(shop, raw)
    web.post(shop, raw[:-9])
    fields = [("X-Hub-Signature-256", signature), ("Content-Length", str(len(raw)))]
    web.ask(request("POST", "/webhooks/whatsapp/nobody", *fields, body=raw))
    web.ask(request("POST", shop.url, ("X-Hub-Signature-256", signature), ("Content-Length", "9999999"), body=raw))
    web.ask(request("POST", shop.url, ("Content-Encoding", MARK), *fields, body=raw))
    web.ask(request("POST", f"/{MARK}?token={MARK}", *fields, body=raw))
    web.ask(request("POST", f"{shop.url}?token={MARK}", *fields, body=raw))
    for token in (shop.verify_token, f"{MARK}-wrong"):
        web.http.get(shop.url, params={"hub.mode": "subscribe", "hub.verify_token": token, "hub.challenge": MARK})
    for given in (key, weak, key + "x", f"pombal_{MARK}"):
        for path in ("/api/v1/channels", f"/api/v1/channels/{MARK}", f"/api/v1/channels?q={MARK}"):
            web.ask(request("GET", path, ("Authorization", f"Bearer {given}"), ("X-Request-ID", f"{MARK}!")))
    web.ask(request("GET", "/metrics", ("X-Forwarded-For", "203.0.113.9"), ("Authorization", f"Bearer {MARK}")))
    web.ask(request("GET", "/", ("User-Agent", MARK), ("Referer", MARK), ("Cookie", MARK), host=MARK))
    web.ask(f"GET /{MARK} HTTP/9.9\r\n{MARK}\r\n\r\n".encode())
    with web.wire() as wire:
        wire.send(request("POST", shop.url, ("Content-Length", "5000"), body=raw))
    web.ask(request("GET", "/health", ("Connection", "Upgrade"), ("Upgrade", MARK)))
    return {
        "mark": MARK,
        "app secret": shop.app_secret,
        "verify token": shop.verify_token,
        "signature": signature.removeprefix("sha256="),
        "body": raw.decode()[:80],
        "text": text,
        "phone": phone,
        "business number": shop.number.display_phone_number,
        "wamid": wamid,
        "key": key,
        "key's random part": key.split("_", 2)[2],
        "weak key": weak,
        "traceback": "Traceback",
        "a query": "hub.",
    }


def test_nothing_that_was_said_in_confidence_is_in_the_log(web: Web, secrets_after_all_that: dict[str, str]) -> None:
    lines = web.log().splitlines()

    assert any("webhook_received" in line for line in lines)
    found = {name: line for name, value in secrets_after_all_that.items() for line in lines if value in line}
    assert found == {}


def test_each_line_is_one_json_object_of_bounded_size(web: Web, secrets_after_all_that: dict[str, str]) -> None:
    for line in web.log_file.read_bytes().splitlines():
        decoded = json.loads(line)
        assert {"event", "level", "timestamp"} <= set(decoded)
        assert len(line) <= LONGEST
        assert not any(byte < 0x20 for byte in line)


def test_hostile_hands_cause_no_error_lines(
    web: Web, lines_of_others: int, secrets_after_all_that: dict[str, str]
) -> None:
    assert [line for line in web.lines()[lines_of_others:] if line["level"] in ("error", "critical")] == []


@pytest.mark.parametrize(
    "hostile",
    [
        'x"}{"event":"forged"}',
        "\x1b[2Jforged",
        "\x7f\x85forged",
        "x\tforged",
        "\xff\xfe",
        "forged\u2028".encode().decode("latin-1"),
    ],
    ids=["JSON", "ANSI", "control", "tab", "bytes", "line separator"],
)
def test_no_header_forges_a_line(web: Web, shop: Shop, hostile: str) -> None:
    for name in ("X-Request-ID", "X-Hub-Signature-256", "User-Agent", "Host", "X-Forwarded-For", "Authorization"):
        web.ask(request("POST", shop.url, (name, hostile), ("Content-Length", "0")))

    assert "forged" not in web.log()
    assert all(isinstance(line, dict) for line in web.lines())


def test_no_path_and_no_query_forges_a_line(web: Web) -> None:
    for path in (
        "/%0d%0aforged",
        "/%1b[2Jforged",
        "/webhooks/whatsapp/%0aforged",
        "/webhooks/whatsapp?hub.mode=%0aforged",
    ):
        web.ask(request("GET", path))

    assert "forged" not in web.log()


def flooded(web: Web, event: str, send: Callable[[], object]) -> tuple[int, float]:
    """How many lines about `event` a flood leaves, at least one, and how many ten per second would be."""
    before, began = lines_of(web, event), time.monotonic()

    def is_told() -> bool:
        for _ in range(400):
            send()
        return lines_of(web, event) > before

    # One flood may fall into a second whose lines others have used up.
    assert until(is_told, time.monotonic() + 30)
    return lines_of(web, event) - before, 10 * (time.monotonic() - began + 2)


def lines_of(web: Web, event: str) -> int:
    return sum(line["event"].startswith(event) for line in web.lines())


def test_a_flood_of_refusals_leaves_a_few_lines(web: Web, shop: Shop) -> None:
    unsigned = {"X-Hub-Signature-256": "sha256=" + "0" * 64}

    lines, most = flooded(web, "webhook_rejected", lambda: web.http.post(shop.url, content=b"{}", headers=unsigned))

    assert lines <= most


def test_a_flood_of_noise_leaves_a_few_lines(web: Web) -> None:
    lines, most = flooded(web, "Invalid HTTP request", lambda: web.ask(b"\x16\x03\x01\x02\r\n\r\n"))

    assert lines <= most


def test_a_flood_of_bad_keys_leaves_a_few_lines(web: Web) -> None:
    bad = {"Authorization": "Bearer x"}

    lines, most = flooded(web, "access_refused", lambda: web.http.get("/api/v1/channels", headers=bad))

    assert lines <= most


def test_an_accepted_body_is_told_by_ids_alone(web: Web, shop: Shop) -> None:
    mark = uuid.uuid4().hex
    raw = texts(shop, a_wamid())

    web.post(shop, raw, **{"X-Request-ID": mark})

    (line,) = [line for line in web.lines() if line.get("request_id") == mark]
    assert set(line) == {
        "event",
        "level",
        "timestamp",
        "provider",
        "outcome",
        "seconds",
        "delivery_id",
        "request_id",
        "app_id",
        "secret",
        "bytes",
    }
    assert (line["event"], line["bytes"], line["app_id"]) == ("webhook_received", len(raw), str(shop.app.id))
