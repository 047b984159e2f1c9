"""What providers do, met through a worker: what each habit comes to, and when the next try is. Many in one go each.

A reply from an address that nothing was sent to (security-reliability.md R3) is not among them: our sockets are
connected, so the kernel drops it, and no process sees it to count it.
"""

import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import RowMapping

from models.sip_registration import HISTORY
from pombal import metrics
from pombal.settings import settings
from sandbox.sip_thread import SipThread
from tests.factories import a_tenant
from tests.sandbox.sip_servers import a_registrar
from tests.sip.accounts import PASSWORD, Account, an_account, nearby
from workers._registrar import Registrar
from workers.sip_refresh import sip_refresh

_numbers = itertools.count(5511_9700_0001)


@pytest.fixture(autouse=True)
def _inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nearby(monkeypatch, SIP_STARTS_PER_SECOND="1000"):
        yield


@pytest.fixture(scope="module")
def provider() -> Iterator[SipThread]:
    with a_registrar() as running:
        yield running


def a_customer(provider: SipThread, habit: dict[str, Any] | None = None, **given: Any) -> Account:
    """An account at the provider, which has this habit with it."""
    user = str(next(_numbers))
    provider.user(user, PASSWORD)
    if habit:
        provider.habit(user, **habit)
    return an_account("127.0.0.1", provider.port, user, **given)


def customers(provider: SipThread, habits: list[dict[str, Any]], **given: Any) -> dict[str, Account]:
    """An account for each habit, by that."""
    return {json.dumps(habit): a_customer(provider, habit, **given) for habit in habits}


def rows(accounts: dict[str, Account]) -> dict[str, RowMapping]:
    return {habit: account.row() for habit, account in accounts.items()}


# ------------------------------------------------------------------------------------------------------- next times


def is_in_time(row: RowMapping) -> bool:
    """Whether the next REGISTER comes when the sheet's §5 says, and the binding is said to end when it does."""
    granted, began = row["granted"], row["last_register_at"]
    due, ends = (round((row[name] - began).total_seconds(), 3) for name in ("next_refresh_at", "expires_at"))
    latest = granted - (60 if granted >= 120 else granted / 2)
    return bool(ends == granted and latest - min(10, granted / 10) <= due <= latest)


GRANTS: list[tuple[dict[str, Any], int]] = [
    ({"stale": "once"}, 300),
    ({"stale_silently": "once"}, 300),
    ({"algorithms": ["SHA-256", "MD5"]}, 300),
    ({"algorithms": ["MD5-sess"]}, 300),
    ({"algorithms": [""], "qop": "none"}, 300),
    ({"proxy_auth": True}, 300),
    ({"min_expires": 600}, 600),
    ({"others": [{"contact": "sip:other@198.51.100.7:5060", "expires": 3600}]}, 300),
    ({"rewrite_contact": {"host": "203.0.113.9"}}, 300),
    ({"rewrite_contact": {"user": "somebody"}}, 300),
    ({"grant_in": "header"}, 300),
    ({"grant_in": "both_differ"}, 300),
    ({"grant_in": "nowhere"}, 300),
    ({"header": "-1"}, 300),
    ({"unlisted": True}, 300),
    ({"nonce_newline": "folded"}, 300),
    ({"malformed": "folded"}, 300),
    ({"malformed": "bad_length"}, 300),
    ({"grant": 30}, 30),
    ({"grant": 119}, 119),
    ({"grant": 120}, 120),
    ({"grant": 10**12}, 86_400),
    ({"grant": "-5"}, 300),
    ({"grant": "soon"}, 300),
]


def test_whoever_is_registered_is_refreshed_in_time_whatever_the_provider_does(provider: SipThread) -> None:
    accounts = customers(provider, [habit for habit, _ in GRANTS])

    sip_refresh()

    found = rows(accounts)
    assert {habit: (row["status"], row["register_error"], row["granted"]) for habit, row in found.items()} == {
        json.dumps(habit): ("registered", None, granted) for habit, granted in GRANTS
    }
    assert [habit for habit, row in found.items() if not is_in_time(row)] == []


HOUR, MINUTE = (3200.0, 4000.0), (14.0, 61.0)
REFUSALS: list[tuple[dict[str, Any], str, tuple[float, float]]] = [
    ({"stale": "always"}, "401: the credentials were not accepted", HOUR),
    ({"stale_silently": "always"}, "401: the credentials were not accepted", HOUR),
    ({"grant": 0}, "200, but 0 seconds were granted", MINUTE),
    ({"code": 503, "retry_after": "120 (in a meeting)"}, "503 Service Unavailable", (115.0, 125.0)),
    ({"code": 503, "retry_after": "in a while"}, "503 Service Unavailable", MINUTE),
    ({"code": 503, "retry_after": "-7"}, "503 Service Unavailable", MINUTE),
]


def test_whoever_is_refused_is_tried_again_when_the_refusal_says(provider: SipThread) -> None:
    accounts = customers(provider, [habit for habit, _, _ in REFUSALS])
    unknown = a_customer(provider, {"wrong_password": "401"}, password="another")
    hung_up = a_customer(provider, {"tcp_close": "request"}, transport="tcp")
    accounts |= {"wrong password": unknown, "hung up": hung_up}

    sip_refresh()

    found = rows(accounts)
    assert {habit: (row["status"], row["register_error"]) for habit, row in found.items()} == {
        **{json.dumps(habit): ("failed", error) for habit, error, _ in REFUSALS},
        "wrong password": ("failed", "401: the credentials were not accepted"),
        "hung up": ("failed", f"127.0.0.1:{provider.port} closed the connection"),
    }
    waits = {json.dumps(habit): wait for habit, _, wait in REFUSALS} | {"wrong password": HOUR, "hung up": MINUTE}
    assert [
        habit
        for habit, (least, most) in waits.items()
        if not least < (found[habit]["next_refresh_at"] - found[habit]["updated_at"]).total_seconds() < most
    ] == []


def test_a_port_that_nobody_has_is_noticed_at_once_and_not_after_half_a_minute() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1", 0))
        port = gone.getsockname()[1]
    account = an_account("127.0.0.1", port, "nobody")

    sip_refresh()

    assert account.row()["register_error"] == f"refused by 127.0.0.1:{port}"


# ------------------------------------------------------------------------------------------------------ what is kept


def test_the_last_twenty_outcomes_are_kept(provider: SipThread) -> None:
    account = a_customer(provider)
    older = [{"at": "2026-01-01T00:00:00+00:00", "outcome": f"{n}", "seconds": 0} for n in range(HISTORY)]
    account.set(history=f"'{json.dumps(older)}'")

    sip_refresh()

    assert HISTORY == 20
    assert account.outcomes == [*(f"{n}" for n in range(1, 20)), "registered"]


def test_how_late_an_attempt_begins_is_measured_unless_somebody_asked_for_it(provider: SipThread) -> None:
    late, asked = a_customer(provider), a_customer(provider)
    late.set(next_refresh_at="now() - interval '40 seconds'")
    asked.ask()
    before = lateness()

    sip_refresh()

    attempts, seconds = (now - then for now, then in zip(lateness(), before, strict=True))
    assert attempts == 1
    assert seconds >= 40


def lateness() -> tuple[float, float]:
    """How many were measured, and the sum of their seconds."""
    found = (metrics.REGISTRY.get_sample_value(f"pombal_sip_lateness_seconds_{what}") for what in ("count", "sum"))
    attempts, seconds = (value or 0.0 for value in found)
    return attempts, seconds


# ------------------------------------------------------------------------------------------------------------ spread


def test_a_start_goes_on_at_the_pace_of_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIP_STARTS_PER_SECOND", "4")
    settings.cache_clear()
    tenant = a_tenant().id
    for n in range(12):
        an_account("127.0.0.1", 5999, f"h{n}", tenant_id=tenant)
    registrar, begun = Registrar(), 0
    since = time.monotonic()

    while begun < 12:
        claimed, left = registrar._claim()
        begun += len(claimed)
        assert begun <= 4 + 4 * (time.monotonic() - since), "a second's worth at once, then so many a second"
        assert left == 12 - begun
        threading.Event().wait(0.05)
