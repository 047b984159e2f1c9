"""After an outage: lapses are told however they are found, accounts come back soon, and times are true."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from models import RegisterStatus, SipRegistration
from pombal import db, metrics
from sandbox.sip_thread import SipThread
from tests.factories import superuser
from tests.sandbox.sip_servers import a_registrar
from tests.sip.accounts import PASSWORD, Account, a_customer, a_number, a_registering_worker, an_account, nearby, until
from workers.sip_refresh import note_lapses, sip_refresh

FOREIGN = "503 for 5511999990000, Authorization: Digest of somebody"


@pytest.fixture(autouse=True)
def _inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nearby(monkeypatch):
        yield


@pytest.fixture(scope="module")
def provider() -> Iterator[SipThread]:
    with a_registrar() as running:
        yield running


def events(account: Account) -> list[tuple[str, dict[str, Any]]]:
    with superuser() as connection:
        query = "SELECT type, payload FROM event WHERE tenant_id = %s ORDER BY id"
        return list(connection.execute(query, [account.tenant_id]).fetchall())


def kinds(account: Account) -> list[str]:
    return [kind for kind, _ in events(account)]


def lapses() -> float:
    return metrics.REGISTRY.get_sample_value("pombal_sip_lapses_total") or 0.0


def binding_ended(account: Account, **columns: str) -> None:
    """As it is when nobody was there to refresh it, nor to write that down."""
    ended = {"expires_at": "now() - interval '10 minutes'", "registered_since": "now() - interval '1 hour'"}
    account.set(register_status="'registered'", **ended, unregistered_since="NULL", **columns)


# ------------------------------------------------------------------------------------------------------------- lapses


def test_a_lapse_that_an_attempt_ends_is_told_before_its_end(
    provider: SipThread, capfd: pytest.CaptureFixture[str]
) -> None:
    account, before = a_customer(provider), lapses()
    binding_ended(account)

    sip_refresh()

    row = account.row()
    assert row["status"] == "registered"
    assert (row["now"] - row["registered_since"]).total_seconds() < 300
    assert [(kind, payload["status"]) for kind, payload in events(account)] == [
        ("sip_failed", "failed"),
        ("sip_registered", "registered"),
    ]
    assert events(account)[0][1]["error"] == "expired without a refresh"
    assert lapses() == before + 1
    (line,) = [line for line in "".join(capfd.readouterr()).splitlines() if "sip_lapsed" in line]
    assert str(account.id) in line
    note_lapses()
    assert lapses() == before + 1, "it is told once"


def test_a_lapse_is_counted_once_whoever_finds_it(provider: SipThread) -> None:
    noted, refused, before = a_customer(provider), a_customer(provider), lapses()
    provider.habit(refused.user, code=503)
    for account in (noted, refused):
        binding_ended(account)
    noted.set(next_refresh_at="now() + interval '1 hour'")

    sip_refresh()
    note_lapses()
    note_lapses()

    assert (kinds(noted), kinds(refused)) == (["sip_failed"], ["sip_failed"])
    assert lapses() == before + 2


def test_a_refresh_that_was_sent_in_time_is_no_lapse_however_late_it_is_written_down(provider: SipThread) -> None:
    account, before = a_customer(provider), lapses()
    with a_registering_worker():
        account.until(lambda row: row["status"] == "registered")
        provider.habit(account.user, delay=1.0, when="any")
        provider.clear()
        account.ask()
        until(lambda: len(provider.journal(user=account.user)), lambda n: n == 2)
        account.set(expires_at="clock_timestamp()")  # after the request that will be granted, before its answer
        row = account.until(lambda row: row["last_outcome"] == "registered" and row["asked_at"] is None)

    assert row["register_error"] is None
    assert kinds(account) == ["sip_registered"]
    assert lapses() == before


def test_the_end_of_a_binding_that_nobody_wants_any_more_is_no_alarm(
    provider: SipThread, capfd: pytest.CaptureFixture[str]
) -> None:
    account, before = a_customer(provider), lapses()
    binding_ended(account, is_enabled="false")

    note_lapses()

    assert account.row()["register_status"] == "pending"
    assert kinds(account) == ["sip_unregistered"]
    assert lapses() == before
    said = "".join(capfd.readouterr())
    assert "sip_lapsed" not in said
    assert "sip_unregistered" in said


def told(account: Account) -> None:
    """By a controller, which names what nobody should."""
    with db.session([account.tenant_id]) as s:
        is_it = SipRegistration.told(
            s,
            account.tenant_id,
            account.id,
            status=RegisterStatus.REGISTERED,
            error=FOREIGN,
            last_register_at=None,
            expires_at=account.row()["now"],
        )
    assert is_it


def test_a_controllers_own_words_are_in_no_event_and_no_line_when_its_account_lapses(
    provider: SipThread, capfd: pytest.CaptureFixture[str]
) -> None:
    theirs, taken_over = a_customer(provider), a_customer(provider)
    for account in (theirs, taken_over):
        told(account)
    with db.session([taken_over.tenant_id]) as s:
        SipRegistration.ask(s, taken_over.tenant_id, taken_over.id, sender="auto")

    note_lapses()

    said = str(events(theirs) + events(taken_over)) + "".join(capfd.readouterr())
    assert said.count("sip_lapsed") == 2
    assert (kinds(theirs), kinds(taken_over)) == (["sip_failed"], ["sip_failed"])
    assert FOREIGN not in said
    assert theirs.row()["register_error"] == FOREIGN, "for whoever asks for the account"
    assert "5511999990000" not in said


# --------------------------------------------------------------------------------------------------------- recovering


def waiting(host: str = "127.0.0.1", port: int | None = 9, **columns: str) -> Account:
    """One that failed again and again, and would be tried in a minute or more."""
    account = an_account(host, port, a_number())
    failed = {"register_status": "'failed'", "failures": "6", "last_outcome": "'temporary'"}
    times = {"next_refresh_at": "now() + interval '25 minutes'", "last_attempt_at": "now() - interval '40 seconds'"}
    account.set(**{**failed, **times, **columns})
    return account


def wait_of(account: Account) -> float:
    row = account.row()
    return float((row["next_refresh_at"] - row["now"]).total_seconds())


def test_whoever_waits_at_a_provider_that_registers_another_one_is_tried_at_once(provider: SipThread) -> None:
    waits = waiting(port=provider.port)
    provider.user(waits.user, PASSWORD)
    behind = waiting("sip.example", provider.port)
    behind.set(proxy="'127.0.0.1'")
    provider.user(behind.user, PASSWORD, domain="sip.example")
    a_customer(provider)

    sip_refresh()

    assert [account.row()["status"] for account in (waits, behind)] == ["registered"] * 2
    assert waits.row()["failures"] == 0


def test_nobody_else_is_tried_before_its_time(provider: SipThread) -> None:
    elsewhere = waiting("127.0.0.2")
    refused = waiting(last_outcome="'permanent'")
    limited = waiting(last_status_code="429")
    patient = waiting(history="'[{\"retry_after\": 600}]'")
    disabled = waiting(is_enabled="false")
    bound = waiting(register_status="'registered'", expires_at="now() + interval '1 hour'")
    just_tried = waiting(last_attempt_at="now()")
    long_tried = waiting(last_attempt_at="now() - interval '40 seconds'", history="'[{\"seconds\": 32}]'")
    a_customer(provider)

    sip_refresh()

    assert all(wait_of(one) > 1200 for one in (elsewhere, refused, limited, patient, disabled, bound))
    assert -10 < wait_of(just_tried) <= 30, "it was tried when the provider was away, or is itself at fault"
    assert -10 < wait_of(long_tried) <= 22


def test_who_was_asked_for_patience_is_known(provider: SipThread) -> None:
    account, other = a_customer(provider), a_customer(provider)
    provider.habit(account.user, code=503, retry_after=90)
    other.set(next_refresh_at="now() + interval '1 hour'")
    sip_refresh()
    account.set(last_attempt_at="now() - interval '1 hour'")
    other.ask()

    sip_refresh()

    assert account.row()["history"][-1]["retry_after"] == 90
    assert (account.outcomes, other.outcomes) == (["temporary"], ["registered"])


# -------------------------------------------------------------------------------------------------------------- times


def test_however_long_the_database_keeps_the_verdict_waiting_nobody_is_registered_beyond_the_grant(
    provider: SipThread,
) -> None:
    account = a_customer(provider)
    provider.habit(account.user, grant=12, delay=1.0)
    with a_registering_worker() as registrar:
        until(lambda: len(registrar._held), lambda n: n == 1)
        with superuser() as connection, connection.transaction():
            connection.execute("SELECT 1 FROM sip_registration WHERE id = %s FOR UPDATE", [account.id])
            (binding,) = until(lambda: provider.state(account.user)["bindings"], bool)
            until(time.time, lambda now: now > binding["expires_at"] - 12 + 4)
        row = account.until(lambda row: row["status"] == "registered")

    assert row["expires_at"].timestamp() <= binding["expires_at"] + 1
    assert row["next_refresh_at"].timestamp() <= binding["expires_at"] - 5
    assert row["last_register_at"].timestamp() <= binding["expires_at"] - 11
