"""What goes wrong is said in one shape, with a request id and nothing about the inside (W10, W12)."""

import json
import re
import uuid
from datetime import datetime
from typing import Any

import pytest

from tests.factories import Shop, rows
from tests.web.process import Answer, Web, request


def said(answer: Answer) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(answer.body)["error"]
    return error


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/nope",
        "/webhooks",
        "/webhooks/whatsapp/a/b",
        "/health/",
        "/webhooks/whatsapp/",
        "/../etc/passwd",
        "//",
        "/docs",
        "/openapi.json",
    ],
)
def test_an_unknown_path_is_not_found(web: Web, path: str) -> None:
    response = web.ask(request("GET", path))

    assert (response.status, response.code) == (404, "NOT_FOUND")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/webhooks/whatsapp"),
        ("DELETE", "/webhooks/whatsapp/x"),
        ("PATCH", "/webhooks/whatsapp/x"),
        ("OPTIONS", "/webhooks/whatsapp/x"),
        ("TRACE", "/webhooks/whatsapp/x"),
        ("POST", "/health"),
        ("POST", "/metrics"),
        ("DELETE", "/api/v1/channels"),
        ("POST", "/api/v1/channels"),
    ],
)
def test_a_wrong_method_is_named(web: Web, method: str, path: str) -> None:
    response = web.ask(request(method, path, ("Content-Length", "0")))

    assert (response.status, response.code) == (405, "INVALID_PAYLOAD")
    assert "allow" in response.headers


def test_an_error_has_the_agreed_shape(web: Web, shop: Shop) -> None:
    answers = [
        web.ask(request("GET", "/nope")),
        web.ask(request("PUT", "/webhooks/whatsapp")),
        web.ask(request("POST", shop.url, ("Content-Length", "0"))),
        web.ask(request("POST", shop.url, ("Content-Length", "99999999"))),
        web.ask(request("POST", shop.url, ("Content-Encoding", "gzip"), ("Content-Length", "0"))),
        web.ask(request("GET", "/api/v1/channels")),
        web.ask(request("GET", shop.url)),
    ]

    assert [answer.status for answer in answers] == [404, 405, 401, 413, 415, 401, 403]
    for answer in answers:
        error = said(answer)
        assert list(json.loads(answer.body)) == ["error"]
        assert set(error) == {"code", "message", "details", "request_id", "timestamp"}
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-request-id"] == error["request_id"]
        offset = datetime.fromisoformat(error["timestamp"]).utcoffset()
        assert offset is not None
        assert not offset


def test_no_answer_tells_what_serves_it(web: Web, shop: Shop) -> None:
    for path in ("/nope", "/health", shop.url):
        answer = web.ask(request("GET", path))
        text = repr(answer.headers) + answer.body.decode()

        assert not re.search(r"uvicorn|starlette|python|pombal|postgres|\.py|traceback", text, re.IGNORECASE)
        assert "server" not in answer.headers


@pytest.mark.parametrize("given", ["a", "0af7651916cd43dd8448eb211c80319c", str(uuid.UUID(int=7)), "x" * 64, "A.b_c-9"])
def test_a_harmless_request_id_comes_back(web: Web, given: str) -> None:
    for path in ("/health", "/nope"):
        assert web.ask(request("GET", path, ("X-Request-ID", given))).headers["x-request-id"] == given


@pytest.mark.parametrize(
    "given", ["", "x" * 65, "a b", "a;b", "<script>", "\xe9", "a\tb", "%0d%0a", '"', "../x", "x" * 5000]
)
def test_a_hostile_request_id_is_replaced(web: Web, given: str) -> None:
    for path in ("/health", "/nope"):
        answer = web.ask(request("GET", path, ("X-Request-ID", given)))

        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"]), path
        if path == "/nope":
            assert said(answer)["request_id"] == answer.headers["x-request-id"]


def test_each_request_has_an_id_of_its_own(web: Web) -> None:
    ids = {web.ask(request("GET", "/health")).headers["x-request-id"] for _ in range(20)}

    assert len(ids) == 20


def test_the_request_id_finds_the_line_in_the_log_and_the_row(web: Web, shop: Shop) -> None:
    given = uuid.uuid4().hex
    web.post(shop, b"{}", **{"X-Request-ID": given})

    (line,) = [line for line in web.lines() if line.get("request_id") == given]
    (row,) = rows(shop, "SELECT id FROM delivery WHERE request_id = :given", given=given)
    assert (line["event"], line["delivery_id"]) == ("webhook_received", str(row["id"]))


def test_the_host_header_is_not_believed(web: Web) -> None:
    for path in ("/health/", "/webhooks/whatsapp/", "/nope", "/api/v1/channels/"):
        answer = web.ask(request("GET", path, host="evil.example"))

        assert "evil.example" not in repr(answer)
        assert answer.status not in (301, 302, 307, 308)
