"""Accounts stay registered, and their rows tell the truth: a registrar of a worker against a registrar of SIP."""

import socket
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from dramatiq import Worker

from models import Lease, RegisterStatus, SipRegistration
from pombal import db, metrics
from pombal.broker import broker, redis_client
from pombal.clock import Clock, Sight
from pombal.secrets import seal
from pombal.settings import settings
from providers.sip import Kind, Outcome
from sandbox.sip_thread import SipThread
from tests.factories import a_tenant, superuser
from tests.sandbox.sip_servers import a_registrar
from tests.sip.accounts import PASSWORD, PATIENCE, Account, a_customer, a_registering_worker, an_account, nearby, until
from workers._registrar import _MOST_OF_A_PLACE, Held, Registrar
from workers._sip_attempt import Result
from workers.sip_refresh import note_lapses, ring_registrar, ring_registrations, sip_refresh


@pytest.fixture(autouse=True)
def _inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nearby(monkeypatch):
        yield


@pytest.fixture(scope="module")
def provider() -> Iterator[SipThread]:
    with a_registrar() as running:
        yield running


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
    provider.habit(account.user, grant=12)

    with a_registering_worker():
        provider.until(lambda: provider.state(account.user)["granted"] >= 2, seconds=PATIENCE)

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
        note_lapses()

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


# --------------------------------------------------------------------------------- what providers do (the sheet's §6)

HOUR, MINUTE = (3200.0, 4000.0), (14.0, 61.0)


@pytest.mark.parametrize(
    ("habit", "error", "again"),
    [
        ({"code": 403}, "403", HOUR),
        ({"code": 404}, "404", HOUR),
        ({"code": 604}, "604", HOUR),
        ({"endless_401": True}, "credentials", HOUR),
        ({"algorithms": ["FOO"]}, "FOO", HOUR),
        ({"qop": "auth-int"}, "auth-int", HOUR),
        ({"min_expires": 100_000}, "423", HOUR),
        ({"redirect": "sip:elsewhere@127.0.0.9"}, "302", HOUR),
        ({"code": 500}, "500", MINUTE),
        ({"code": 480}, "480", MINUTE),
        ({"code": 503, "retry_after": 200}, "503", (195.0, 205.0)),
        ({"grant": 0}, "0", MINUTE),
        ({"grant": 5}, "5", MINUTE),
        ({"scheme": "Bearer"}, "Bearer", HOUR),
        ({"omit": ["realm"]}, "realm", HOUR),
        ({"omit": ["nonce"]}, "nonce", HOUR),
        ({"nonce_newline": "bare"}, "401", HOUR),
        ({"code": 408}, "408", MINUTE),
        ({"code": 405}, "405", HOUR),
        ({"code": 603}, "603", MINUTE),
    ],
    ids=lambda given: "-".join(f"{k}={v}" for k, v in given.items()) if isinstance(given, dict) else "",
)
def test_what_a_provider_refuses_is_told_with_its_reason_and_tried_again_in_due_time(
    provider: SipThread, habit: dict[str, Any], error: str, again: tuple[float, float]
) -> None:
    account = a_customer(provider)
    provider.habit(account.user, **habit)

    sip_refresh()

    row = account.row()
    assert row["status"] == "failed"
    assert error in row["register_error"]
    assert again[0] < (row["next_refresh_at"] - row["updated_at"]).total_seconds() < again[1]
    assert row["failures"] == 1
    assert account.user not in row["register_error"]
    assert PASSWORD not in str(dict(row))


@pytest.mark.parametrize(
    "habit",
    [
        {"stale": "once"},
        {"stale_silently": "once"},
        {"algorithms": ["SHA-256", "MD5"]},
        {"algorithms": ["MD5-sess"]},
        {"algorithms": [""], "qop": "none"},
        {"proxy_auth": True},
        {"min_expires": 600},
        {"others": [{"contact": "sip:other@198.51.100.7:5060", "expires": 3600}]},
        {"rewrite_contact": {"host": "203.0.113.9"}},
        {"grant_in": "header"},
        {"grant_in": "both_differ"},
        {"grant_in": "nowhere"},
        {"header": "-1"},
        {"unlisted": True},
        {"rewrite_contact": {"user": "somebody"}},
        {"realm": "another.example"},
        {"opaque": "abc"},
        {"one_line": True, "algorithms": ["FOO", "SHA-256", "MD5"]},
        {"delay": 1.0},
        {"provisional": True},
        {"silent": 1},
        {"malformed": ["garbage", "no_status_line", "huge", "latin1", "many_via", "truncated"]},
        {"malformed": ["foreign_branch", "foreign_cseq", "foreign_call_id", "foreign_method", "foreign_source"]},
    ],
    ids=lambda habit: "-".join(habit),
)
def test_what_a_provider_asks_for_or_gets_wrong_keeps_no_account_from_being_registered(
    provider: SipThread, habit: dict[str, Any]
) -> None:
    account = a_customer(provider)
    provider.habit(account.user, **habit)

    sip_refresh()

    row = account.row()
    assert (row["status"], row["register_error"]) == ("registered", None)
    assert 250 < (row["expires_at"] - row["now"]).total_seconds() <= 600
    assert provider.state(account.user)["registered"]
    assert [one["complaints"] for one in provider.journal(user=account.user) if one["complaints"]] == []


@pytest.mark.parametrize(
    "habit",
    [
        {"tcp_split": 1},
        {"tcp_keep_alives": True},
        {"tcp_close": "answer"},
        {"tcp_close": "challenge"},
        {"provisional": True},
        {"malformed": ["foreign_branch", "foreign_call_id"]},
    ],
    ids=lambda habit: "-".join(habit),
)
def test_what_a_provider_does_to_a_connection_keeps_no_account_from_being_registered(
    provider: SipThread, habit: dict[str, Any]
) -> None:
    account = a_customer(provider, transport="tcp")
    provider.habit(account.user, **habit)

    sip_refresh()

    assert (account.row()["status"], account.row()["register_error"]) == ("registered", None)


def test_silence_and_nonsense_are_named_with_the_time_they_had_and_tried_again_soon(provider: SipThread) -> None:
    silent, odd = a_customer(provider), a_customer(provider)
    provider.habit(silent.user, silent="all")
    provider.habit(odd.user, malformed=["garbage", "no_status_line"], only=True)

    sip_refresh()

    for account in (silent, odd):
        row = account.row()
        assert (row["status"], row["last_outcome"]) == ("failed", "temporary")
        assert row["register_error"] == f"no answer within 32 s from 127.0.0.1:{provider.port}"
        assert 14 < (row["next_refresh_at"] - row["updated_at"]).total_seconds() < 61


def test_a_provider_that_nobody_hears_holds_up_no_other(provider: SipThread) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as deaf:
        deaf.bind(("127.0.0.3", 0))
        tenant = a_tenant().id
        silent = [
            an_account("127.0.0.3", deaf.getsockname()[1], f"s{n}", tenant_id=tenant) for n in range(_MOST_OF_A_PLACE)
        ]
        with a_registering_worker() as registrar:
            until(lambda: len(registrar._held), lambda n: n > 50)
            heard = [a_customer(provider) for _ in range(5)]
            for account in heard:
                account.until(lambda row: row["status"] == "registered")
            assert len(registrar._held) > 50, "the silent ones have not ended yet"

        # Ended before their time, they are nobody's: another worker may begin at once.
        assert {account.row()["claimed_until"] for account in silent} == {None}
        assert {account.row()["status"] for account in silent} == {"pending"}


def test_a_provider_without_an_answer_is_named_with_the_time_it_had(provider: SipThread) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1", 0))
        port = gone.getsockname()[1]
    account = an_account("127.0.0.1", port, "nobody")

    sip_refresh()

    assert account.row()["status"] == "failed"
    assert f"127.0.0.1:{port}" in account.row()["register_error"]
    assert account.row()["last_outcome"] == "temporary"


# ---------------------------------------------------------------------------------------------------- one at a time


def test_two_workers_never_have_two_requests_of_one_account_under_way(provider: SipThread) -> None:
    accounts = [a_customer(provider) for _ in range(10)]
    provider.clear()
    for account in accounts:
        provider.habit(account.user, grant=12, delay=0.3)

    with a_registering_worker(), a_registering_worker():
        for _ in range(3):
            for account in accounts:
                account.ask()
            for account in accounts:
                account.until(lambda row: row["asked_at"] is None and row["claimed_until"] is None)

    states = [provider.state(account.user) for account in accounts]
    assert [state["overlaps"] for state in states] == [0] * 10
    assert all(state["granted"] >= 3 and not state["gaps"] for state in states)
    assert [account.row()["status"] for account in accounts] == ["registered"] * 10


def test_who_loses_a_claim_sends_nothing_more_and_writes_nothing(provider: SipThread) -> None:
    account = a_customer(provider)
    provider.habit(account.user, silent="all")

    with a_registering_worker() as registrar:
        until(lambda: len(registrar._held), lambda n: n == 1)
        account.set(claim_token="gen_random_uuid()", claimed_until="now() + interval '1 hour'")
        until(lambda: len(registrar._held), lambda n: n == 0)

    row = account.row()
    assert (row["status"], row["history"]) == ("pending", [])
    assert row["claimed_until"] is not None


def test_what_came_of_an_attempt_counts_no_more_once_a_controller_said_how_it_stands(provider: SipThread) -> None:
    account = a_customer(provider)
    provider.habit(account.user, delay=0.5)
    with a_registering_worker() as registrar:
        until(lambda: len(registrar._held), lambda n: n == 1)
        with db.session([account.tenant_id]) as s:
            failed = RegisterStatus.FAILED
            assert SipRegistration.told(
                s, account.tenant_id, account.id, status=failed, error="busy", last_register_at=None, expires_at=None
            )
        until(lambda: len(registrar._held), lambda n: n == 0)

    row = account.row()
    assert (row["status"], row["register_error"], row["sender"]) == ("failed", "busy", "external")
    assert row["next_refresh_at"] is None


def test_a_change_during_an_attempt_has_it_made_again(provider: SipThread) -> None:
    account = a_customer(provider)
    provider.habit(account.user, delay=0.5)
    with a_registering_worker() as registrar:
        until(lambda: len(registrar._held), lambda n: n == 1)
        account.disable()
        account.until(lambda row: row["status"] == "pending" and row["next_refresh_at"] is None)

    assert not provider.state(account.user)["bindings"]


def test_a_process_that_died_with_a_claim_is_followed_by_another_once_it_ran_out(provider: SipThread) -> None:
    account = a_customer(provider)
    dead = Registrar()
    (row,), _ = dead._claim()
    assert row["id"] == account.id

    sip_refresh()
    assert account.row()["history"] == [], "it is still claimed"
    account.set(claimed_until="clock_timestamp()")
    sip_refresh()

    assert account.row()["status"] == "registered"
    assert account.outcomes == ["unknown", "registered"]
    assert provider.journal(user=account.user)[0]["cseq"] > row["cseq"]


def test_a_start_is_spread_over_time_for_each_host(provider: SipThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIP_STARTS_PER_SECOND", "4")
    settings.cache_clear()
    tenant = a_tenant().id
    here = [an_account("127.0.0.1", 5999, f"h{n}", tenant_id=tenant) for n in range(10)]
    there = [an_account("127.0.0.2", 5999, f"t{n}", tenant_id=tenant) for n in range(2)]
    here[7].ask()

    rows, left = Registrar()._claim()

    ids = {row["id"] for row in rows}
    assert len(ids & {account.id for account in here}) == 4
    assert ids >= {account.id for account in there}
    assert here[7].id in ids, "somebody waits for it"
    assert left == 6


def test_a_claim_that_ran_out_ends_its_attempt_before_the_next_one_begins() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.4", 0))
        deaf.listen()
        deaf.settimeout(PATIENCE)
        account = an_account("127.0.0.4", deaf.getsockname()[1], "tcp", transport="tcp")
        with a_registering_worker():
            first, _ = deaf.accept()
            account.set(claimed_until="now() - interval '1 second'")
            second, _ = deaf.accept()
            with first, second:
                first.settimeout(PATIENCE)
                while first.recv(65_536):  # until it was hung up, which it was before the second came
                    pass


def test_what_came_of_an_attempt_is_written_once_however_often_that_is_tried(provider: SipThread) -> None:
    account = a_customer(provider)
    registrar = Registrar()
    (row,), _ = registrar._claim()
    refused = Result.without_an_attempt(Outcome(Kind.TEMPORARY, code=503, error="503"))

    for _ in range(2):
        registrar._settle([(Held(row, 0.0), refused)])

    assert (account.row()["failures"], account.outcomes) == (1, ["temporary"])


def test_however_many_hosts_hang_there_is_room_for_one_that_does_not() -> None:
    registrar = Registrar()
    busy: Counter[str] = Counter()
    hanging = {f"hanging{n}": 10_000 for n in range(40)}
    while budget := registrar._budget(hanging, busy):
        busy.update(budget)

    assert registrar._budget({**hanging, "good": 5}, busy)["good"] == 5


# ----------------------------------------------------------------------------------------------------------- Contacts


def test_a_contact_that_changes_leaves_no_second_binding(provider: SipThread) -> None:
    account = a_customer(provider, contact_host="127.0.0.8:5080")
    with a_registering_worker():
        account.until(lambda row: row["status"] == "registered")
        account.change(contact_host="127.0.0.9:5080")
        account.until(lambda row: row["contact"] is not None and "127.0.0.9" in row["contact"])

    (binding,) = provider.state(account.user)["bindings"]
    assert binding["contact"] == f"sip:{account.token}@127.0.0.9:5080;transport=udp"


def test_a_new_contact_that_is_refused_leaves_the_old_one_bound_and_the_row_true(provider: SipThread) -> None:
    account = a_customer(provider, contact_host="127.0.0.8:5080")
    with a_registering_worker():
        account.until(lambda row: row["status"] == "registered")
        provider.habit(account.user, code=403)
        account.change(contact_host="127.0.0.9:5080")
        row = account.until(lambda row: row["register_error"] is not None)

    (binding,) = provider.state(account.user)["bindings"]
    assert binding["contact"] == row["contact"]
    assert "127.0.0.8" in row["contact"]
    assert row["status"] == "registered"


# ------------------------------------------------------------------------------------------------ workers and clocks


def test_a_worker_of_the_queue_registers_without_being_rung_and_ends_in_time(provider: SipThread) -> None:
    account = a_customer(provider)
    worker = Worker(broker, queues={"sip_refresh"}, worker_threads=1, worker_timeout=50)
    worker.start()
    try:
        account.until(lambda row: row["status"] == "registered")
        account.ask()
        ring_registrar()
        until(lambda: provider.state(account.user)["granted"], lambda n: n == 2)
    finally:
        worker.stop()
    assert "registrar" not in {thread.name for thread in threading.enumerate()}


def test_the_sweep_rings_once_for_what_waits_and_not_for_what_is_worked_on(provider: SipThread) -> None:
    broker.flush("sip_refresh")
    account = a_customer(provider)
    assert ring_registrations() == 0
    account.set(next_refresh_at="now() - interval '1 minute'")
    assert ring_registrations() == 1
    assert ring_registrations() == 0, "a job waits already"
    broker.flush("sip_refresh")
    account.set(claimed_until="now() + interval '1 minute'")
    assert ring_registrations() == 0


def test_what_lapses_while_redis_is_away_is_written_down(provider: SipThread) -> None:
    account = a_customer(provider, sender="external")
    account.set(register_status="'registered'", expires_at="now() - interval '1 minute'")
    account.set(updated_at="now() - interval '2 minutes'")
    clock = Clock()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        clock._sight = Sight(redis.Redis(port=nobody.getsockname()[1]))
        with pytest.raises(redis.ConnectionError):
            clock.sweep()

    row = account.row()
    assert (row["register_status"], row["unregistered_since"]) == ("failed", row["expires_at"])
    assert kinds(account) == ["sip_failed"]
    with db.session() as s:
        Lease.release(s, "sweep", clock._token)


def test_a_lapse_that_an_attempt_finds_first_is_news_all_the_same(provider: SipThread) -> None:
    account = a_customer(provider)
    account.set(register_status="'registered'", expires_at="now() - interval '1 minute'", unregistered_since="NULL")
    provider.habit(account.user, code=503)

    sip_refresh()

    assert account.row()["unregistered_since"] == account.row()["expires_at"]
    assert kinds(account) == ["sip_failed"]


def test_what_is_wrong_on_our_side_is_looked_at_again_before_a_binding_ends(provider: SipThread) -> None:
    account = a_customer(provider, sender="drachtio")
    account.set(register_status="'registered'", expires_at="now() + interval '55 seconds'")

    sip_refresh()

    row = account.row()
    assert "DRACHTIO_HOST" in row["register_error"]
    assert row["status"] == "registered"
    assert (row["expires_at"] - row["next_refresh_at"]).total_seconds() > 20


def test_an_account_whose_password_is_lost_can_be_removed(provider: SipThread) -> None:
    account = a_customer(provider)
    with superuser() as connection:
        sealed = seal(account.id, {})
        connection.execute("UPDATE sip_registration SET sealed = %s, last_attempt_at = now()", [sealed])
    account.remove()

    sip_refresh()

    assert count(account) == 0


def test_an_account_that_was_disabled_for_long_is_missed_only_since_it_was_asked_for(provider: SipThread) -> None:
    account = a_customer(provider)
    account.set(is_enabled="false", unregistered_since="now() - interval '7 days'")
    account.ask()

    row = account.row()
    assert (row["now"] - row["unregistered_since"]).total_seconds() < 3600


def test_an_account_that_was_taken_over_from_a_controller_is_not_registered_by_its_word(provider: SipThread) -> None:
    account = a_customer(provider)
    with db.session([account.tenant_id]) as s:
        status = RegisterStatus.REGISTERED
        SipRegistration.told(
            s, account.tenant_id, account.id, status=status, error=None, last_register_at=None, expires_at=None
        )
    assert account.row()["status"] == "registered"
    provider.habit(account.user, code=503)

    with db.session([account.tenant_id]) as s:
        SipRegistration.ask(s, account.tenant_id, account.id, sender="auto")
    sip_refresh()

    assert account.row()["status"] == "failed"


def test_an_account_that_is_given_to_a_controller_is_never_due_whatever_is_changed(provider: SipThread) -> None:
    account = a_customer(provider)
    provider.habit(account.user, delay=0.5)
    with a_registering_worker() as registrar:
        until(lambda: len(registrar._held), lambda n: n == 1)
        account.change(sender="external")
        until(lambda: len(registrar._held), lambda n: n == 0)
    account.change(target="sip:elsewhere@livekit.example")

    row = account.row()
    assert (row["status"], row["next_refresh_at"], row["history"]) == ("pending", None, [])


def test_the_last_word_on_a_contact_that_changes_is_the_new_one_for_registrars_that_keep_one(
    provider: SipThread,
) -> None:
    account = a_customer(provider, contact_host="127.0.0.8:5080")
    with a_registering_worker():
        account.until(lambda row: row["status"] == "registered")
        account.change(contact_host="127.0.0.9:5080")
        account.until(lambda row: "127.0.0.9" in (row["contact"] or ""))

    asked = [(one["contact"].partition("@")[2][:9], one["expires"]) for one in provider.journal(user=account.user)]
    assert ("127.0.0.8", "0") in asked
    assert asked[-1] == ("127.0.0.9", "300")


def test_no_password_is_in_a_log_a_row_an_event_a_metric_or_a_job(
    provider: SipThread, capfd: pytest.CaptureFixture[str]
) -> None:
    accounts = [a_customer(provider) for _ in range(3)]
    provider.habit(accounts[1].user, code=403)
    accounts[2].change(password="another-" + PASSWORD)

    sip_refresh()
    ring_registrar()

    with superuser() as connection:
        rows = str(connection.execute("SELECT r::text FROM sip_registration r").fetchall())
        events = str(connection.execute("SELECT e::text FROM event e").fetchall())
    jobs = str(redis_client().hgetall("dramatiq:sip_refresh.msgs"))
    said = "".join(capfd.readouterr()) + events + jobs + metrics.exposition(metrics.snapshot()).decode()
    assert all(word in said for word in ("sip_registered", "sip_failed", "pombal_sip_attempts_total"))
    assert "sip_refresh" in jobs
    for secret in (PASSWORD, "Digest ", "response="):
        assert secret not in said + rows
    for personal in (account.user for account in accounts):
        assert personal not in said
