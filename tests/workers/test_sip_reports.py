"""A backend is told how accounts stand, after their rows and never instead of them."""

import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from models import SipRegistration
from pombal import db
from pombal.settings import settings
from sandbox.sip_thread import SipThread
from tests.sandbox.sip_servers import a_registrar
from tests.sip.accounts import PASSWORD, Account, a_registering_worker, an_account, nearby, until
from tests.web.process import running
from workers.sip_refresh import note_lapses

KEY = "the-key-of-the-backend"
FLEET_KEY = "the-key-of-a-controller-of-the-fleet"


class Backend:
    """Takes reports, or answers as it is told; on a real port."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, str | None, dict[str, Any]]] = []
        self.answers: list[int] = []
        backend = self

        class Handler(BaseHTTPRequestHandler):
            def do_PATCH(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                backend.reports.append((self.path, self.headers["x-api-key"], body))
                self.send_response(backend.answers.pop(0) if backend.answers else 200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    backend = Backend()
    thread = threading.Thread(target=backend.server.serve_forever, args=(0.05,))
    thread.start()
    with nearby(monkeypatch, SIP_BACKEND_URL=backend.url + "/", SIP_BACKEND_KEY=KEY):
        yield backend
    backend.server.shutdown()
    thread.join()
    backend.server.server_close()


@pytest.fixture(scope="module")
def provider() -> Iterator[SipThread]:
    with a_registrar() as registrar:
        registrar.user("5511900001111", PASSWORD)
        yield registrar


def a_customer(provider: SipThread, external_id: str | None) -> Account:
    provider.clear_habits()
    return an_account("127.0.0.1", provider.port, "5511900001111", external_id=external_id)


def test_success_and_failure_are_both_reported_with_iso_times(backend: Backend, provider: SipThread) -> None:
    account = a_customer(provider, "its/own id")
    with a_registering_worker():
        until(lambda: backend.reports, lambda reports: len(reports) == 1)
        provider.habit(account.user, code=403)
        account.ask()
        until(lambda: backend.reports, lambda reports: len(reports) == 2)
        account.until(lambda row: row["report_at"] is None)

    (path, key, first), (_, _, second) = backend.reports
    assert (path, key) == ("/api/sip/provider-registration/its%2Fown%20id", KEY)
    at = account.row()["last_register_at"].strftime("%Y-%m-%dT%H:%M:%SZ")
    assert first == {"registerStatus": "registered", "registerError": None, "lastRegisterAt": at}
    assert (second["registerStatus"], second["lastRegisterAt"]) == ("registered", at), "its binding lives"
    assert "403" in second["registerError"]


def test_a_backend_that_fails_has_nothing_registered_twice_and_is_told_later(
    backend: Backend, provider: SipThread
) -> None:
    backend.answers = [500]
    account = a_customer(provider, "7")
    provider.clear()
    with a_registering_worker():
        row = account.until(lambda row: row["report_error"] is not None)
        assert row["status"] == "registered"
        assert row["register_error"] is None
        account.set(report_at="now()")
        account.until(lambda row: row["reported_at"] is not None and row["report_at"] is None)

    assert len(backend.reports) == 2
    assert [one["codes"] for one in provider.journal(user=account.user)] == [[401], [200]]


def test_a_backend_that_does_not_know_the_account_is_left_alone_for_long(backend: Backend, provider: SipThread) -> None:
    backend.answers = [404]
    account = a_customer(provider, "8")
    with a_registering_worker():
        row = account.until(lambda row: row["report_error"] is not None)

    assert "404" in row["report_error"]
    assert (row["report_at"] - row["now"]).total_seconds() > 3000


def test_an_account_that_the_backend_has_no_id_for_is_not_reported(backend: Backend, provider: SipThread) -> None:
    silent, told = a_customer(provider, None), a_customer(provider, "9")
    with a_registering_worker():
        silent.until(lambda row: row["status"] == "registered")
        told.until(lambda row: row["reported_at"] is not None)

    assert [path.rpartition("/")[2] for path, _, _ in backend.reports] == ["9"]


@pytest.mark.parametrize("missing", ["SIP_BACKEND_URL", "SIP_BACKEND_KEY"])
def test_nothing_leaves_where_the_address_or_the_key_is_not_set(
    backend: Backend, provider: SipThread, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setenv("BACKEND_URL", backend.url)
    monkeypatch.delenv(missing)
    settings.cache_clear()
    account = a_customer(provider, "10")
    with a_registering_worker():
        row = account.until(lambda row: row["status"] == "registered")

    assert backend.reports == []
    assert row["report_at"] is None


def test_what_a_controller_tells_is_told_too_or_a_lapse_would_be_the_last_word(
    backend: Backend, provider: SipThread, tmp_path: Path
) -> None:
    account = a_customer(provider, "14")
    account.set(sender="'external'", register_status="'registered'", expires_at="now() - interval '2 seconds'")
    note_lapses()
    told = {"registerStatus": "registered", "lastRegisterAt": "2026-01-02T03:04:05Z"}
    with a_registering_worker():
        until(lambda: backend.reports, lambda reports: len(reports) == 1)
        with running(tmp_path / "web.log", {"API_KEY": FLEET_KEY}) as web:
            path = f"/api/sip/provider-registration/{account.id}"
            assert web.http.patch(path, json=told, headers={"x-api-key": FLEET_KEY}).status_code == 200
        until(lambda: backend.reports, lambda reports: len(reports) == 2)
        account.until(lambda row: row["report_at"] is None)

    assert [body["registerStatus"] for _, _, body in backend.reports] == ["failed", "registered"]
    assert backend.reports[1][2]["lastRegisterAt"] == told["lastRegisterAt"]


def test_news_that_came_while_a_report_failed_are_told_at_once(backend: Backend, provider: SipThread) -> None:
    account = a_customer(provider, "11")
    account.set(report_at="now() - interval '1 second'")
    with db.session([account.tenant_id]) as s:
        (row,) = SipRegistration.claim_reports(s, 10, timedelta(seconds=20))
    account.set(report_revision="report_revision + 1", report_at="now()")

    with db.session([account.tenant_id]) as s:
        told = (row["report_revision"], "404", timedelta(hours=1))
        SipRegistration.not_reported(s, account.tenant_id, account.id, *told)

    assert account.row()["report_at"] <= account.row()["now"]


def test_an_account_that_lost_its_id_at_the_backend_is_reported_no_more(backend: Backend, provider: SipThread) -> None:
    backend.answers = [500]
    account, other = a_customer(provider, "12"), a_customer(provider, "13")
    with a_registering_worker():
        account.until(lambda row: row["reported_at"] is not None or row["report_error"] is not None)
        account.set(report_at="now()")
        account.change(external_id=None)
        other.until(lambda row: row["reported_at"] is not None)

    assert account.row()["report_at"] is None
