"""A web process whose database has no tables: an honest way to an error that nobody foresaw (W12, N2)."""

import json
import re
from collections.abc import Iterator

import pytest

from tests.web.island import Door, Island, an_island
from tests.web.process import Web, request, running, signed

NEVER_MADE = Door("/webhooks/whatsapp/some-app", "some-secret")


@pytest.fixture(scope="module")
def island(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Island]:
    with an_island(tmp_path_factory.mktemp("unmigrated")) as island:
        yield island


@pytest.fixture(scope="module")
def web(island: Island, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with running(tmp_path_factory.mktemp("web") / "web.log", island.env, ready=False) as web:
        yield web.wait("/health")


def test_it_says_what_is_missing(web: Web) -> None:
    response = web.http.get("/ready")

    assert response.status_code == 503
    assert response.json()["missing"] == ["the database has no tables yet: run `pombal migrate`"]
    assert web.ask(request("GET", "/ready", ("X-Forwarded-For", "203.0.113.9"))).status == 503


def test_an_error_of_our_own_tells_nothing_about_the_inside(web: Web) -> None:
    answer = web.ask(signed(NEVER_MADE, b'{"text":"a message"}'))

    error = json.loads(answer.body)["error"]
    assert (answer.status, error["code"]) == (500, "INTERNAL_ERROR")
    assert answer.headers["x-request-id"] == error["request_id"]
    assert not re.search(r"app|sql|relation|psycopg|line \d|\.py|Error\b", error["message"], re.IGNORECASE)
    assert set(error) == {"code", "message", "details", "request_id", "timestamp"}


def test_the_request_id_finds_the_error_in_the_log_without_its_values(web: Web) -> None:
    raw = b'{"text":"uma mensagem"}'
    data = signed(NEVER_MADE, raw).replace(b"Host: x", b"Host: x\r\nX-Request-ID: find-me")

    assert web.ask(data).headers["x-request-id"] == "find-me"

    lines = [line for line in web.lines() if line.get("request_id") == "find-me"]
    assert [(line["event"], line["level"]) for line in lines] == [("request_failed", "error")]
    assert "(SQLSTATE 42P01)" in lines[0]["exception"]
    for value in ("some-app", "some-secret", "uma mensagem", "SELECT", "relation", "Traceback"):
        assert value not in web.log()


def test_a_flood_of_errors_is_a_few_lines(web: Web) -> None:
    for _ in range(100):
        assert web.ask(signed(NEVER_MADE, b"{}")).status == 500

    assert len([line for line in web.lines() if line["level"] == "error"]) < 100


def test_migrating_makes_it_ready_without_a_restart(web: Web, island: Island) -> None:
    island.migrate()

    assert web.http.get("/ready").json() == {"status": "ready", "missing": [], "notes": []}
    door = island.a_door()
    assert web.post(door, b"{}").status_code == 200
    assert island.bodies() == [b"{}"]


def test_tables_of_another_version_are_said(web: Web, island: Island) -> None:
    with island.superuser() as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'other'")

    response = web.http.get("/ready")

    assert response.status_code == 503
    assert response.json()["missing"] == ["migrations are not current: run `pombal migrate`"]
    assert "other" not in response.text
