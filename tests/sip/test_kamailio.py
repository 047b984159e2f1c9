"""Accounts at a registrar that others wrote: what its location table holds is what our rows say."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from tests.sip.accounts import Account, a_registering_worker, an_account, nearby, until
from tests.sip.kamailio import PASSWORD, Kamailio, a_kamailio, needs_kamailio

pytestmark = needs_kamailio

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nearby(monkeypatch):
        yield


@pytest.fixture(scope="module")
def kamailio() -> Iterator[Kamailio]:
    with a_kamailio() as running:
        yield running


def a_customer(kamailio: Kamailio, **given: Any) -> Account:
    """An account that nobody has used yet, at pombal.test by way of the proxy that Kamailio is for it."""
    way = {"host": "pombal.test", "proxy": kamailio.host, "password": PASSWORD, **given}
    return an_account(port=kamailio.port, user=f"u{next(_numbers) % 50}", **way)


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_an_account_is_bound_by_its_token_over_either_transport_until_it_is_disabled(
    kamailio: Kamailio, transport: str
) -> None:
    account = a_customer(kamailio, transport=transport)

    with a_registering_worker():
        row = account.until(lambda row: row["status"] == "registered")
        (bound,) = kamailio.bindings()[account.user]
        account.disable()
        account.until(lambda row: row["status"] == "pending")

    assert bound.contact == row["contact"] == f"sip:{account.token}@127.0.0.1;transport={transport}"
    assert row["expires_at"].timestamp() < bound.ends + 2, "it counts in whole seconds"
    assert bound.call_id == row["call_id"]
    assert row["granted"] == 300
    assert row["server"] == f"{transport}/127.0.0.1:{kamailio.port}"
    assert account.user not in kamailio.bindings()
    assert account.outcomes == ["registered", "unregistered"]


def test_a_domain_that_is_the_registrars_own_address_needs_no_proxy(kamailio: Kamailio) -> None:
    account = a_customer(kamailio, host="127.0.0.1", proxy=None)

    with a_registering_worker():
        account.until(lambda row: row["status"] == "registered")

    assert account.user in kamailio.bindings()


def test_a_wrong_password_is_refused_and_nothing_is_bound(kamailio: Kamailio) -> None:
    account = a_customer(kamailio, password="something else")

    with a_registering_worker():
        row = account.until(lambda row: row["status"] == "failed")

    assert row["register_error"] == "403 Forbidden (bad password)"
    assert (row["next_refresh_at"] - row["now"]).total_seconds() > 3000
    assert account.user not in kamailio.bindings()


def test_a_user_that_it_does_not_know_is_refused_for_good(kamailio: Kamailio) -> None:
    account = an_account("pombal.test", kamailio.port, "nobody", password=PASSWORD, proxy=kamailio.host)

    with a_registering_worker():
        row = account.until(lambda row: row["status"] == "failed")

    assert (row["last_status_code"], row["last_outcome"]) == (404, "permanent")


def test_another_worker_goes_on_with_the_binding_that_is_there(kamailio: Kamailio) -> None:
    account = a_customer(kamailio, contact_host="198.51.100.7:5080")
    seen = []

    for _ in range(3):
        account.ask()
        with a_registering_worker():
            account.until(lambda row: row["asked_at"] is None and row["status"] == "registered")
        (bound,) = kamailio.bindings()[account.user]
        seen.append(bound)

    assert len({(bound.contact, bound.call_id) for bound in seen}) == 1
    assert seen[0].contact == f"sip:{account.token}@198.51.100.7:5080;transport=udp"
    assert seen[0].cseq < seen[1].cseq < seen[2].cseq
    assert account.outcomes == ["registered"] * 3


def test_numbers_that_fell_behind_are_refused_and_another_call_id_mends_it(kamailio: Kamailio) -> None:
    account = a_customer(kamailio, contact_host="198.51.100.7:5080")
    with a_registering_worker():
        account.until(lambda row: row["status"] == "registered")
        account.ask()
        first = account.until(lambda row: row["cseq"] == 40 and row["claimed_until"] is None)
        (ours,) = kamailio.bindings()[account.user]

        account.set(cseq="0")
        account.ask()
        refused = account.until(lambda row: row["failures"] == 1)
        account.ask()
        mended = account.until(lambda row: row["failures"] == 0 and row["last_outcome"] == "registered")

    assert refused["last_status_code"] == 400
    assert refused["last_outcome"] == "temporary"
    assert refused["status"] == "registered", "what is bound still is"
    assert "CSeq" in refused["register_error"]
    assert mended["call_id"] != first["call_id"]
    (bound,) = kamailio.bindings()[account.user]
    assert (bound.contact, bound.call_id) == (ours.contact, mended["call_id"])


def test_sha_256_is_spoken_and_kept_to() -> None:
    with a_kamailio(algorithm="SHA-256") as kamailio, a_registering_worker():
        account = a_customer(kamailio, allows_md5=False)
        row = account.until(lambda row: row["last_outcome"] is not None)

        assert (row["status"], row["algorithm"]) == ("registered", "SHA-256")
        assert account.user in kamailio.bindings()


def test_a_registrar_that_fell_back_to_md5_is_not_answered() -> None:
    with a_registering_worker():
        with a_kamailio(algorithm="SHA-256") as kamailio:
            account = a_customer(kamailio)
            account.until(lambda row: row["status"] == "registered")
        with a_kamailio(port=kamailio.port) as fallen:
            account.ask()
            row = account.until(lambda row: row["failures"] == 1)
            assert account.user not in fallen.bindings()

    assert row["last_outcome"] == "permanent"
    assert row["algorithm"] == "SHA-256"


def test_an_interval_that_is_too_brief_is_asked_for_again_as_the_registrar_wants_it() -> None:
    with a_kamailio(least=400) as kamailio, a_registering_worker():
        account = a_customer(kamailio)
        row = account.until(lambda row: row["last_outcome"] is not None)
        (bound,) = kamailio.bindings()[account.user]

    assert (row["status"], row["granted"], row["failures"]) == ("registered", 400, 0)
    assert bound.call_id == row["call_id"]


def test_a_grant_that_was_cut_short_is_what_counts() -> None:
    with a_kamailio(most=90) as kamailio, a_registering_worker():
        account = a_customer(kamailio)
        row = account.until(lambda row: row["status"] == "registered")

    assert row["granted"] == 90
    assert (row["expires_at"] - row["last_register_at"]).total_seconds() == 90
    assert 36 <= (row["next_refresh_at"] - row["last_register_at"]).total_seconds() <= 46


def test_a_registrar_that_went_and_came_back_without_its_table_is_registered_with_again() -> None:
    with a_registering_worker():
        with a_kamailio() as kamailio:
            account = a_customer(kamailio)
            account.until(lambda row: row["status"] == "registered")
        account.ask()
        refused = account.until(lambda row: row["failures"] == 1)
        with a_kamailio(port=kamailio.port) as again:
            account.ask()
            until(lambda: again.bindings().get(account.user), bool)
            row = account.until(lambda row: row["failures"] == 0)

    assert refused["status"] == "registered", "its grant has not ended"
    assert refused["register_error"]
    assert row["register_error"] is None
