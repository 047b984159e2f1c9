"""What a provider reports of one message: any order, any repetition, and before or after the message itself."""

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest

from pombal import db
from providers.inbound import Message, Person, Status
from sandbox import meta
from tests.factories import Shop, a_shop, a_wamid, body_of, echoes, rows, superuser, texts
from tests.workers.tools import (
    deliveries,
    in_background,
    message,
    messages,
    run,
    run_all,
    states,
    together,
    totals,
    until_somebody_waits_for_a_lock,
)
from workers._effects import apply_items

AT = 1_788_000_000
WORDS = ("sent", "delivered", "read", "failed")
WHEN = {word: AT + 10 * n for n, word in enumerate(WORDS)}


def test_one_body_fifty_times_at_once_is_one_message() -> None:
    shop = a_shop()
    ids = deliveries(shop, [texts(shop, "wamid.1")] * 50)

    run_all(ids, batch=1, threads=20)

    assert len(messages(shop)) == 1
    assert set(states(ids).values()) == {"done"}
    (conversation,) = rows(shop, "SELECT unread_count FROM conversation")
    assert conversation["unread_count"] == 1
    assert len(rows(shop, "SELECT FROM event")) == len(rows(shop, "SELECT FROM contact")) == 1


def test_one_message_in_fifty_different_bodies_is_one_row() -> None:
    shop = a_shop()
    ids = deliveries(shop, [texts(shop, "wamid.1", a_wamid()) for _ in range(50)])

    run_all(ids, batch=5, threads=10)

    assert len(messages(shop)) == 51
    (conversation,) = rows(shop, "SELECT unread_count FROM conversation")
    assert conversation["unread_count"] == 51


@pytest.mark.parametrize("order", list(itertools.permutations(WORDS)), ids="-".join)
def test_every_order_of_reports_ends_in_the_same_state(order: Sequence[str]) -> None:
    shop = a_shop()
    run(deliveries(shop, [echoes(shop, "each alone", "in one body", "in one batch", "before its message", at=AT)]))

    for word in order:
        run(deliveries(shop, [reports(shop, "each alone", word)]))
    run(deliveries(shop, [reports(shop, "in one body", *order)]))
    run(deliveries(shop, [reports(shop, "in one batch", word) for word in order]))

    for wamid in ("each alone", "in one body", "in one batch"):
        stored = message(shop, wamid)
        assert stored["status"] == "failed"
        assert [stored[f"{word}_at"] for word in WORDS] == [moment(word) for word in WORDS]
        assert stored["error_code"] == "131047"


@pytest.mark.parametrize("order", list(itertools.permutations(("sent", "delivered", "read", "echo"))), ids="-".join)
def test_reports_that_come_before_their_message_are_joined_to_it(order: Sequence[str]) -> None:
    shop = a_shop()
    given = {word: reports(shop, "wamid.1", word) for word in WORDS} | {"echo": echoes(shop, "wamid.1", at=AT)}

    for word in order:
        run(deliveries(shop, [given[word]]))

    stored = message(shop, "wamid.1")
    assert stored["status"] == "read"
    assert [stored[f"{word}_at"] for word in WORDS] == [moment(word) for word in WORDS[:3]] + [None]


@pytest.mark.parametrize("first", ["echo", "report"])
def test_a_report_and_its_message_in_two_transactions_at_once_find_each_other(first: str) -> None:
    shop = a_shop()
    at = moment("delivered")
    person = Person((("phone", "5511984440001"),))
    items = {
        "echo": Message("$", "wamid.1", "out", "text", {}, person, person, moment("sent")),
        "report": Status("$", "wamid.1", "delivered", at),
    }
    bodies = {"echo": echoes(shop, "wamid.1", at=AT), "report": reports(shop, "wamid.1", "delivered")}
    later = deliveries(shop, [bodies["report" if first == "echo" else "echo"]])

    with db.session([shop.tenant.id]) as s:
        apply_items(s, [(None, shop.tenant.id, shop.channel.id, items[first])])
        slower = in_background(partial(run, later))
        until_somebody_waits_for_a_lock()
    slower()

    stored = message(shop, "wamid.1")
    assert (stored["status"], stored["delivered_at"]) == ("delivered", at)


def test_many_messages_and_their_reports_at_once_all_end_at_their_highest() -> None:
    shop = a_shop()
    wamids = [f"wamid.{n:03}" for n in range(100)]
    bodies = [
        [echoes(shop, *wamids[n : n + 10], at=AT) for n in range(0, 100, 10)],
        *([reports(shop, wamid, word) for wamid in reversed(wamids)] for word in ("delivered", "sent")),
        [reports(shop, wamid, "read") for wamid in wamids[::2]],
    ]

    together(*(partial(run, deliveries(shop, one)) for one in bodies))

    stored = messages(shop)
    assert [m["status"] for m in stored] == ["read", "delivered"] * 50
    assert {m["sent_at"] for m in stored} == {moment("sent")}
    assert {m["delivered_at"] for m in stored} == {moment("delivered")}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_of_a_repeated_report_the_earliest_time_counts(order: Sequence[int]) -> None:
    shop = a_shop()
    run(deliveries(shop, [echoes(shop, *WORDS, at=AT + 100)]))

    for n in order:
        bodies = [body_of(shop, {"statuses": [meta.status(word, word, AT + n, "5511944440001")]}) for word in WORDS]
        run(deliveries(shop, bodies))

    assert {word: message(shop, word)[f"{word}_at"] for word in WORDS} == dict.fromkeys(WORDS, moment("sent"))


def test_a_report_never_lowers_what_was_reported_before() -> None:
    shop = a_shop()
    run(deliveries(shop, [echoes(shop, "wamid.1"), reports(shop, "wamid.1", "read")]))
    before = totals(shop)["event"]

    run(deliveries(shop, [reports(shop, "wamid.1", "sent")]))
    run(deliveries(shop, [reports(shop, "wamid.1", "sent", "read")]))

    assert message(shop, "wamid.1")["status"] == "read"
    assert len(totals(shop)["event"]) - len(before) <= 1  # the time of `sent` was news, and once


def test_played_is_more_than_read() -> None:
    shop = a_shop()
    run(deliveries(shop, [echoes(shop, "wamid.1")]))

    for word in ("played", "read"):
        run(deliveries(shop, [reports(shop, "wamid.1", word, at=AT)]))

    assert message(shop, "wamid.1")["status"] == "played"


def test_a_word_that_is_new_to_us_is_kept_and_moves_nothing() -> None:
    shop = a_shop()
    run(deliveries(shop, [echoes(shop, "wamid.1", at=AT)]))

    run(deliveries(shop, [reports(shop, "wamid.1", "warmed", at=AT)]))

    assert message(shop, "wamid.1")["status"] == "sent"
    (report,) = rows(shop, "SELECT status, rank FROM message_status")
    assert report == {"status": "warmed", "rank": 0}


def test_a_report_on_a_customers_message_does_not_make_it_ours() -> None:
    shop = a_shop()
    run(deliveries(shop, [texts(shop, "wamid.1")]))

    run(deliveries(shop, [reports(shop, "wamid.1", "failed")]))

    assert message(shop, "wamid.1")["status"] == "received"


def test_a_report_on_an_unknown_message_makes_none() -> None:
    shop = a_shop()

    run(deliveries(shop, [reports(shop, "wamid.1", "read")]))

    assert messages(shop) == []
    assert len(rows(shop, "SELECT FROM message_status")) == 1


MEMBERS = {"ana": "failed", "bia": "delivered", "zoe": "read"}


@pytest.mark.parametrize("order", list(itertools.permutations(MEMBERS)), ids="-".join)
@pytest.mark.parametrize("origin", ["phone app", "our send"])
def test_one_members_failure_is_not_the_groups(order: Sequence[str], origin: str) -> None:
    shop = a_shop()
    run(deliveries(shop, [echoes(shop, "wamid.1", at=AT)]))
    if origin == "our send":  # such a message has no report of its own beside the members'
        with superuser() as connection:
            connection.execute("DELETE FROM message_status WHERE tenant_id = %s", [shop.tenant.id])

    for member in order:
        run(deliveries(shop, [body_of(shop, {"statuses": [of_member(member)]})]))

    stored = message(shop, "wamid.1")
    assert stored["status"] == "read"
    assert (stored["failed_at"], stored["error_code"]) == (None, None)
    assert len(rows(shop, "SELECT FROM message_status WHERE participant <> ''")) == 3


def of_member(member: str) -> dict[str, Any]:
    return meta.status("wamid.1", MEMBERS[member], AT, "grp-1", recipient_type="group", recipient_participant_id=member)


def reports(shop: Shop, wamid: str, *words: str, at: int | None = None) -> bytes:
    """A body of reports, each at its word's own moment."""
    said = [meta.status(wamid, word, WHEN[word] if at is None else at, "5511944440001") for word in words]
    return body_of(shop, {"statuses": said})


def moment(word: str) -> datetime:
    return datetime.fromtimestamp(WHEN[word], UTC)
