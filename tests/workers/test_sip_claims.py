"""How long an account is nobody else's whose requests drachtio sends, which goes on when the worker has died."""

from collections.abc import Iterator

import pytest

from sandbox.drachtio import Standin
from sandbox.sip_thread import SipThread
from tests.sandbox.drachtio_servers import SECRET, a_drachtio
from tests.sandbox.sip_servers import a_registrar
from tests.sip.accounts import PASSWORD, Account, a_registering_worker, an_account, nearby, until

USER = "5511940002220"


@pytest.fixture
def provider() -> Iterator[SipThread]:
    with a_registrar() as running:
        running.user(USER, PASSWORD)
        yield running


@pytest.fixture
def drachtio(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    with a_drachtio(timeout=32.0) as standin:
        where = {"DRACHTIO_HOST": "127.0.0.1", "DRACHTIO_PORT": str(standin.port), "DRACHTIO_SECRET": SECRET}
        with nearby(monkeypatch, **where):
            yield standin


def claimed(account: Account) -> float:
    """Seconds from when the attempt began until the claim would run out."""
    row = account.row()
    return float((row["claimed_until"] - row["last_attempt_at"]).total_seconds())


def test_what_drachtio_was_given_is_waited_for_from_then_and_not_from_the_last_sign_of_life(
    provider: SipThread, drachtio: Standin
) -> None:
    account = an_account("127.0.0.1", provider.port, USER)
    provider.habit(USER, silent="all")
    with a_registering_worker() as registrar:
        until(lambda: provider.journal(user=USER), bool)
        (held,) = registrar._held.values()
        first, given = held.until, claimed(account)
        until(lambda: held.until, lambda now: now > first)  # it was renewed

        assert claimed(account) == given
        drachtio.hang_up()  # which ends it
        account.until(lambda row: row["status"] == "failed")


def test_before_drachtio_is_given_another_request_the_claim_is_made_to_outlast_that_too(
    provider: SipThread, drachtio: Standin
) -> None:
    account = an_account("127.0.0.1", provider.port, USER)
    provider.habit(USER, delay=3.0, when="any")
    with a_registering_worker() as registrar:
        until(lambda: provider.journal(user=USER), bool)
        (held,) = registrar._held.values()
        assert held.covered > held.until, "as it began"
        held.covered = 0.0  # as if the challenge had taken long
        until(lambda: len(provider.journal(user=USER)), lambda n: n == 2)

        assert claimed(account) > 45.5
        account.until(lambda row: row["status"] == "registered")


def test_a_claim_that_is_lost_by_then_has_nothing_more_sent(provider: SipThread, drachtio: Standin) -> None:
    account = an_account("127.0.0.1", provider.port, USER)
    provider.habit(USER, delay=3.0)
    with a_registering_worker() as registrar:
        until(lambda: provider.journal(user=USER), bool)
        (held,) = registrar._held.values()
        held.covered = 0.0
        account.set(claim_token="gen_random_uuid()", claimed_until="now() + interval '1 hour'")
        until(lambda: len(registrar._held), lambda n: n == 0)

    assert len(provider.journal(user=USER)) == 1
