"""Alive, ready, and the fleet's numbers (security-reliability.md N1, N2)."""

import asyncio
import json
import re
import time
import uuid

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pombal import metrics
from pombal.supervisor import until
from tests.factories import Shop
from tests.web.conftest import METRICS_TOKEN
from tests.web.process import Answer, Web, request

OUTSIDE = ("X-Forwarded-For", "203.0.113.9")  # believed, because the proxy that says so is on this host


def numbers(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(web: Web) -> str:
    answer = web.http.get("/metrics")
    assert answer.status_code == 200
    return answer.text


def with_token(web: Web, path: str, token: str) -> Answer:
    return web.ask(request("GET", path, OUTSIDE, ("Authorization", f"Bearer {token}")))


def test_health_says_that_the_process_serves(web: Web) -> None:
    response = web.http.get("/health")

    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_ready_when_everything_is_there(web: Web) -> None:
    response = web.http.get("/ready")

    assert (response.status_code, response.json()) == (200, {"status": "ready", "missing": [], "notes": []})


def test_strangers_hear_whether_not_why(web: Web) -> None:
    answer = web.ask(request("GET", "/ready", OUTSIDE))

    assert (answer.status, json.loads(answer.body)) == (200, {"status": "ready"})
    assert "missing" in json.loads(with_token(web, "/ready", METRICS_TOKEN).body)


def test_metrics_need_the_token_from_outside(web: Web) -> None:
    assert web.ask(request("GET", "/metrics", OUTSIDE)).status == 401
    assert with_token(web, "/metrics", METRICS_TOKEN).status == 200


@pytest.mark.parametrize(
    "token", ["", "x", METRICS_TOKEN[:-1], METRICS_TOKEN + "x", METRICS_TOKEN.upper(), "\xe9\xff", "x" * 60_000]
)
def test_a_wrong_token_shows_nothing(web: Web, token: str) -> None:
    answer = with_token(web, "/metrics", token)

    assert (answer.status, answer.code) == (401, "UNAUTHORIZED")
    assert "missing" not in json.loads(with_token(web, "/ready", token).body)


def test_a_forged_address_does_not_make_a_stranger_a_neighbour(web: Web) -> None:
    """The proxy adds the real address at the end; what stands before it is the client's own word."""
    for claim in ("127.0.0.1, 203.0.113.9", "::1, 203.0.113.9", "localhost, 203.0.113.9"):
        assert web.ask(request("GET", "/metrics", ("X-Forwarded-For", claim))).status == 401, claim


def seen_from(host: str, path: str) -> httpx.Response:
    """An answer of the app in this process, which has no METRICS_TOKEN, to a client at that address."""
    from web import app

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=(host, 1))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x") as http,
        ):
            return await http.get(path)

    return asyncio.run(ask())


def test_without_a_token_metrics_are_not_there_for_others() -> None:
    strangers = ("203.0.113.9", "10.0.0.7", "127.0.0.1.evil.example", "2001:db8::1", "::ffff:203.0.113.9")
    for host in strangers:
        response = seen_from(host, "/metrics")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "NOT_FOUND"), host
        assert seen_from(host, "/ready").json() == {"status": "ready"}, host

    assert [seen_from(host, "/metrics").status_code for host in ("127.0.0.1", "::1")] == [200, 200]


def test_one_process_answers_for_the_whole_fleet(web: Web) -> None:
    metrics.sweeps.labels(queue="incoming_message").inc(7)
    here = metrics.REGISTRY.get_sample_value("pombal_sweep_rung_total", {"queue": "incoming_message"})
    assert here is not None

    metrics.Publisher().start().stop()  # the last thing a process does is to publish

    found = numbers(scraped(web))
    assert found[("pombal_sweep_rung_total", (("queue", "incoming_message"),))] >= here
    assert found[("pombal_metrics_complete", ())] == 1


def test_what_a_process_counts_is_published_within_seconds(web: Web, shop: Shop) -> None:
    def accepted() -> float:
        return numbers(scraped(web)).get(
            ("pombal_webhook_requests_total", (("outcome", "accepted"), ("provider", "meta"))), 0.0
        )

    before = accepted()
    for _ in range(3):
        web.post(shop, b"{}")

    assert until(lambda: accepted() >= before + 3, time.monotonic() + 30)


def test_the_agreed_names_are_there(web: Web, shop: Shop) -> None:
    web.post(shop, b"{}")
    names = {
        "pombal_webhook_requests_total",
        "pombal_webhook_seconds_bucket",
        "pombal_oldest_pending_seconds",
        "pombal_pending",
        "pombal_queue_messages",
        "pombal_metrics_complete",
    }

    assert until(lambda: names <= {name for name, _ in numbers(scraped(web))}, time.monotonic() + 30)


def test_waiting_rows_are_measured_when_somebody_asks(web: Web, shop: Shop) -> None:
    key = ("pombal_pending", (("queue", "incoming_message"),))
    before = numbers(scraped(web))[key]

    for _ in range(3):
        web.post(shop, b"{}")

    assert numbers(scraped(web))[key] == before + 3  # nobody works here


def test_hostile_input_makes_no_series_and_no_labels(web: Web, shop: Shop) -> None:
    mark = "x" + uuid.uuid4().hex

    for n in range(60):
        path = f"/webhooks/whatsapp/{mark}{n}"
        fields = [("X-Hub-Signature-256", f"sha256={mark}{n}"), ("User-Agent", mark), ("X-Request-ID", f"{mark}{n}")]
        web.ask(request("POST", path, *fields, ("Content-Length", "0")))
        web.ask(request("GET", f"{path}?hub.mode={mark}&hub.verify_token={mark}{n}"))
        web.ask(request("GET", f"/{mark}{n}"))
        web.ask(request("GET", f"/api/v1/channels/{mark}{n}", ("Authorization", f"Bearer {mark}{n}")))
        web.post(shop, json.dumps({"object": f"{mark}{n}"}).encode())
    refused = ("pombal_webhook_requests_total", (("outcome", "unsigned"), ("provider", "meta")))
    assert until(lambda: numbers(scraped(web)).get(refused, 0) >= 60, time.monotonic() + 30)

    text = scraped(web)
    assert mark not in text
    assert len(numbers(text)) < 1_000


def test_labels_come_from_closed_sets(web: Web, shop: Shop) -> None:
    web.post(shop, b"{}")
    labels = {label for _, labels in numbers(scraped(web)) for label in labels}

    values = {value for name, value in labels if name != "le"}
    assert all(re.fullmatch(r"[a-z_]{1,40}", value) for value in values), values
