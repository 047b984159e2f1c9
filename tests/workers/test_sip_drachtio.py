"""Accounts that drachtio registers: the binding is the SBC's, and calls find their account."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from models import SipRegistration
from pombal import db
from pombal.broker import broker
from pombal.cli.sip_standing import next_try
from pombal.settings import settings
from sandbox.drachtio import Standin
from sandbox.sip_thread import SipThread
from tests.factories import superuser
from tests.sandbox.drachtio_servers import SECRET, a_drachtio
from tests.sandbox.sip_servers import a_registrar
from tests.sip.accounts import PASSWORD, a_registering_worker, an_account, nearby, until
from tests.web.process import running
from workers.sip_refresh import ring_registrations, sip_refresh

FLEET_KEY = "the-key-of-the-drachtio-controller"


@pytest.fixture
def provider() -> Iterator[SipThread]:
    with a_registrar() as running:
        for n in range(5):
            running.user(f"551190000222{n}", PASSWORD)
        yield running


@pytest.fixture
def drachtio(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    with a_drachtio() as standin:
        where = {"DRACHTIO_HOST": "127.0.0.1", "DRACHTIO_PORT": str(standin.port), "DRACHTIO_SECRET": SECRET}
        with nearby(monkeypatch, API_KEY=FLEET_KEY, **where):
            yield standin
        assert standin.violations() == []
        assert standin.routes() == [], "a worker would swallow calls"


def test_a_call_to_what_drachtio_bound_names_its_account_tenant_and_target(
    provider: SipThread, drachtio: Standin, tmp_path: Path
) -> None:
    target = "sip:support@livekit.example"
    account = an_account("127.0.0.1", provider.port, "5511900002220", target=target)
    other = an_account("127.0.0.1", provider.port, "5511900002221")

    sip_refresh()
    call = provider.invite(account.user)

    assert (account.row()["status"], other.row()["status"]) == ("registered", "registered")
    (binding,) = provider.state(account.user)["bindings"]
    assert f"@127.0.0.1:{drachtio.sip_port}" in binding["contact"]
    assert binding["source"].endswith(f":{drachtio.sip_port}"), "it is drachtio's own, and calls come back there"
    (invite,) = drachtio.invites()
    assert invite["request_uri"] == call["request_uri"]
    with running(tmp_path / "web.log", {"API_KEY": FLEET_KEY}) as web:
        asked = {"contact": invite["request_uri"]}
        answer = web.http.get("/api/sip/dispatch", params=asked, headers={"x-api-key": FLEET_KEY}).json()
    assert answer["account"]["id"] == str(account.id)
    assert answer["tenant"]["id"] == str(account.tenant_id)
    assert answer["target"] == target


def test_while_drachtio_is_away_all_wait_and_say_so_and_none_has_failed(provider: SipThread, drachtio: Standin) -> None:
    accounts = [an_account("127.0.0.1", provider.port, f"551190000222{n}") for n in range(5)]
    with a_registering_worker():
        for account in accounts[:2]:
            account.until(lambda row: row["status"] == "registered")
        drachtio.go_away()
        drachtio.hang_up()
        for account in accounts:
            account.ask()
        for account in accounts:
            row = account.until(lambda row: "drachtio" in (row["register_error"] or ""))
            assert SECRET not in row["register_error"]
        assert [account.row()["status"] for account in accounts[:2]] == ["registered"] * 2, "their bindings live"
        assert [account.row()["failures"] for account in accounts] == [0] * 5

        drachtio.come_back()
        for account in accounts:
            account.until(lambda row: row["status"] == "registered" and row["register_error"] is None)


def test_accounts_that_wait_for_drachtio_are_no_sign_of_a_missing_worker_as_long_as_one_lives(
    provider: SipThread, drachtio: Standin
) -> None:
    broker.flush("sip_refresh")
    accounts = [an_account("127.0.0.1", provider.port, f"551190000222{n}") for n in range(2)]
    with a_registering_worker():
        for account in accounts:
            account.until(lambda row: row["status"] == "registered")
        drachtio.go_away()
        drachtio.hang_up()
        accounts[0].ask()
        accounts[0].until(lambda row: "drachtio" in (row["register_error"] or ""))
        accounts[1].disable()
        for account in accounts:
            account.until(lambda row: row["is_held_back"])
            account.set(next_refresh_at="now() - interval '1 minute'")

        assert (ring_registrations(), seconds_to_next()) == (0, None)
        tries = [next_try(account.row()) for account in accounts]
        assert tries[0].startswith("when drachtio is back; it waits: cannot reach drachtio")
        assert tries[1] == "when drachtio is back; it waits: drachtio is away"

    with superuser() as connection:
        connection.execute("UPDATE lease SET until = now() WHERE name = 'drachtio_away'")
    assert all("does a worker of sip_refresh run?" in next_try(account.row()) for account in accounts)
    late = seconds_to_next()
    assert late is not None
    assert late < -15
    assert ring_registrations() == 1


def seconds_to_next() -> float | None:
    """As `pombal_sip_next_refresh_seconds` has it."""
    with db.session() as s:
        db.see_all(s)
        found: float | None = SipRegistration.overview(s)["next_refresh"]
    return found


def test_the_backend_is_told_that_drachtio_is_away(
    provider: SipThread, drachtio: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIP_BACKEND_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("SIP_BACKEND_KEY", "a-key")
    settings.cache_clear()
    account = an_account("127.0.0.1", provider.port, "5511900002220", external_id="1")
    with db.session([account.tenant_id]) as s:
        SipRegistration.hold_back(s, "cannot reach drachtio", is_reported=True)

    row = account.row()
    assert (row["status"], row["register_error"]) == ("failed", "cannot reach drachtio")
    assert row["report_at"] is not None


def test_an_account_may_be_registered_directly_beside_a_drachtio(provider: SipThread, drachtio: Standin) -> None:
    account = an_account("127.0.0.1", provider.port, "5511900002220", sender="direct")

    sip_refresh()

    assert account.row()["status"] == "registered"
    assert drachtio.requests() == []


def test_an_account_of_drachtio_says_what_is_missing_where_none_is_configured(
    provider: SipThread, drachtio: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DRACHTIO_HOST")
    settings.cache_clear()
    account = an_account("127.0.0.1", provider.port, "5511900002220", sender="drachtio")

    sip_refresh()

    assert "DRACHTIO_HOST" in account.row()["register_error"]
    assert (account.row()["status"], account.row()["failures"]) == ("failed", 0)


def test_an_account_that_moves_from_direct_to_drachtio_rings_at_one_place_only(
    provider: SipThread, drachtio: Standin
) -> None:
    account = an_account("127.0.0.1", provider.port, "5511900002220", sender="direct", contact_host="127.0.0.9:5080")
    with a_registering_worker():
        account.until(lambda row: row["status"] == "registered")
        account.change(sender="auto")
        until(lambda: drachtio.requests(), bool)
        account.until(lambda row: row["claimed_until"] is None and "localhost" in (row["contact"] or ""))

    (binding,) = provider.state(account.user)["bindings"]
    assert f":{drachtio.sip_port}" in binding["contact"]


def test_an_account_that_moves_from_drachtio_to_direct_leaves_no_binding_of_drachtios(
    provider: SipThread, drachtio: Standin
) -> None:
    account = an_account("127.0.0.1", provider.port, "5511900002220", contact_host="127.0.0.9:5080")
    with a_registering_worker():
        account.until(lambda row: row["status"] == "registered")
        account.change(sender="direct")
        account.until(lambda row: row["claimed_until"] is None and "127.0.0.9" in (row["contact"] or ""))

    (binding,) = provider.state(account.user)["bindings"]
    assert "127.0.0.9:5080" in binding["contact"]


def test_what_drachtio_bound_is_unregistered_by_drachtio(provider: SipThread, drachtio: Standin) -> None:
    account = an_account("127.0.0.1", provider.port, "5511900002220")
    with a_registering_worker():
        account.until(lambda row: row["status"] == "registered")
        with db.session([account.tenant_id]) as s:
            SipRegistration.change(s, account.tenant_id, account.id, sender="direct", is_enabled=False)
        account.until(lambda row: row["status"] == "pending" and row["next_refresh_at"] is None)

    assert provider.state(account.user)["bindings"] == []
