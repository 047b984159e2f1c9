"""Accounts stay registered, and their rows tell the truth: a registrar of a worker against a registrar of SIP."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from pombal.settings import settings
from sandbox.sip_thread import SipThread
from tests.factories import superuser
from tests.sandbox.sip_servers import a_registrar
from tests.sip.accounts import PASSWORD, PATIENCE, Account, a_registering_worker, an_account, nobody_registers, until
from workers.sip_refresh import ring_registrations, sip_refresh

_numbers = itertools.count(5511_9000_0001)


@pytest.fixture(autouse=True)
def _inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SIP_ALLOWED_NETWORKS", "127.0.0.0/8")
    settings.cache_clear()
    yield
    nobody_registers()
    monkeypatch.undo()
    settings.cache_clear()


@pytest.fixture(scope="module")
def provider() -> Iterator[SipThread]:
    with a_registrar() as running:
        yield running


def a_customer(provider: SipThread, **given: Any) -> Account:
    """An account at the provider, and its row."""
    user = str(next(_numbers))
    provider.user(user, PASSWORD)
    return an_account("127.0.0.1", provider.port, user, **given)


def kinds(account: Account) -> list[str]:
    """Its events, oldest first."""
    with superuser() as connection:
        found = connection.execute("SELECT type FROM event WHERE tenant_id = %s ORDER BY id", [account.tenant_id])
        return [type_ for (type_,) in found.fetchall()]


# ------------------------------------------------------------------------------------------------------- registered


def test_a_new_account_is_registered_and_its_row_says_until_when(provider: SipThread) -> None:
    account = a_customer(provider)

    with a_registering_worker():
        row = account.until(lambda row: row["status"] == "registered")

    assert row["register_error"] is None
    assert 290 < (row["expires_at"] - row["now"]).total_seconds() <= 300
    assert 220 < (row["next_refresh_at"] - row["now"]).total_seconds() <= 240
    assert provider.state(account.user)["registered"]
    assert kinds(account) == ["sip_registered"]


def test_a_job_in_a_process_without_a_worker_registers_what_is_due_and_ends(provider: SipThread) -> None:
    accounts = [a_customer(provider) for _ in range(3)]

    sip_refresh()

    assert [account.row()["status"] for account in accounts] == ["registered"] * 3
    sip_refresh()
    assert [provider.state(account.user)["granted"] for account in accounts] == [1] * 3


def test_a_refresh_comes_before_the_grant_ends_and_keeps_call_id_and_a_growing_cseq(provider: SipThread) -> None:
    account = a_customer(provider)
    provider.habit(account.user, grant=6)

    with a_registering_worker():
        provider.until(lambda: provider.state(account.user)["granted"] >= 3, seconds=PATIENCE)

    seen = provider.journal(user=account.user)
    assert len({one["call_id"] for one in seen}) == 1
    assert [one["cseq"] for one in seen] == sorted({one["cseq"] for one in seen})
    assert not provider.state(account.user)["gaps"]
    assert kinds(account) == ["sip_registered"], "a refresh is no news"


# ---------------------------------------------------------------------------------------------------------- refused


def test_a_wrong_password_fails_at_once_and_is_not_tried_again_soon(provider: SipThread) -> None:
    account = a_customer(provider)
    account.change(password="something else")

    with a_registering_worker():
        row = account.until(lambda row: row["status"] == "failed")

    assert "403" in row["register_error"]
    assert (row["next_refresh_at"] - row["now"]).total_seconds() > 3000
    assert row["failures"] == 1
    assert kinds(account) == ["sip_failed"]


def test_a_refresh_that_fails_while_the_binding_lives_leaves_it_registered_with_the_error(provider: SipThread) -> None:
    account = a_customer(provider)
    with a_registering_worker():
        account.until(lambda row: row["status"] == "registered")
        provider.habit(account.user, code=503)
        account.ask()
        row = account.until(lambda row: row["register_error"] is not None)
        assert row["status"] == "registered"
        assert "503" in row["register_error"]
        assert row["next_refresh_at"] < row["expires_at"]

        account.set(expires_at="now() - interval '1 second'", next_refresh_at="now() + interval '1 hour'")
        assert account.row()["status"] == "failed", "before anybody wrote that down"
        ring_registrations()

    assert account.row()["register_status"] == "failed"
    assert "503" in account.row()["register_error"]
    assert kinds(account) == ["sip_registered", "sip_failed"]
    provider.clear_habits(account.user)


# ----------------------------------------------------------------------------------------------------------- wishes


def test_a_disabled_account_is_unregistered_and_stays_so_until_it_is_asked_for(provider: SipThread) -> None:
    account = a_customer(provider)
    with a_registering_worker():
        account.until(lambda row: row["status"] == "registered")

        account.disable()
        row = account.until(lambda row: row["status"] == "pending")
        assert row["next_refresh_at"] is None
        assert row["expires_at"] is None
        assert not provider.state(account.user)["bindings"]

        account.ask()
        account.until(lambda row: row["status"] == "registered")
    assert kinds(account) == ["sip_registered", "sip_unregistered", "sip_registered"]


def test_a_removed_account_is_unregistered_before_its_row_goes(provider: SipThread) -> None:
    account = a_customer(provider)
    with a_registering_worker():
        account.until(lambda row: row["status"] == "registered")
        account.remove()
        until(lambda: count(account), lambda n: n == 0)

    assert not provider.state(account.user)["bindings"]


def count(account: Account) -> int:
    with superuser() as connection:
        found = connection.execute("SELECT count(*) FROM sip_registration WHERE id = %s", [account.id]).fetchone()
    assert found is not None
    return int(found[0])


def test_an_account_that_never_knocked_is_removed_without_a_word_to_its_provider(provider: SipThread) -> None:
    account = a_customer(provider)
    account.remove()

    with a_registering_worker():
        until(lambda: count(account), lambda n: n == 0)

    assert provider.journal(user=account.user) == []


def test_a_new_password_is_used_at_once(provider: SipThread) -> None:
    account = a_customer(provider)
    account.change(password="something else")
    with a_registering_worker():
        account.until(lambda row: row["status"] == "failed")
        account.change(password=PASSWORD)
        account.until(lambda row: row["status"] == "registered")


def test_nothing_of_an_account_of_a_controller_is_sent_from_here(provider: SipThread) -> None:
    theirs, ours = a_customer(provider, sender="external"), a_customer(provider)

    with a_registering_worker():
        ours.until(lambda row: row["status"] == "registered")

    assert provider.journal(user=theirs.user) == []
    assert theirs.row()["status"] == "pending"
