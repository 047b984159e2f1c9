"""A day's traffic in small: batches, repeats, disorder, broken bodies, and afterwards every row is counted."""

from typing import Any, NamedTuple
from uuid import UUID

import msgspec
import pytest

from sandbox import traffic
from sandbox.traffic import Traffic
from tests.factories import Shop, rows
from tests.workers.tools import another_number, deliveries, letters, run_all, shared_shops, states, totals


class Day(NamedTuple):
    """Two tenants' numbers behind one app (the first tenant has two), and what Meta sent there."""

    shops: list[Shop]
    sent: Traffic
    ids: list[UUID]


@pytest.fixture(scope="module")
def day() -> Day:
    """300 bodies of 1 to 50 elements, one in five a repeat, processed by several threads at once."""
    first, second = shared_shops(2)
    shops = [first, another_number(first), second]
    sent = traffic.mixed(20261122, 300, numbers=[shop.number for shop in shops])
    ids = deliveries(first, sent.bodies)
    run_all(ids[:200], batch=25)
    run_all(ids[200:], batch=100)
    return Day(shops, sent, ids)


def test_every_message_in_and_out_is_one_row(day: Day) -> None:
    stored = [(shop.number.phone_number_id, m["provider_id"], m["direction"]) for shop in day.shops for m in of(shop)]

    assert len(stored) == len(set(stored))
    assert {(n, w) for n, w, d in stored if d == "in"} == set(day.sent.truth.incoming)
    assert {(n, w) for n, w, d in stored if d == "out"} == day.sent.truth.outgoing


def test_each_incoming_message_has_its_type(day: Day) -> None:
    types = {
        (shop.number.phone_number_id, m["provider_id"]): m["type"]
        for shop in day.shops
        for m in of(shop)
        if m["direction"] == "in"
    }

    assert types == day.sent.truth.incoming


def test_each_outgoing_message_ends_in_its_highest_status(day: Day) -> None:
    found = {
        (shop.number.phone_number_id, m["provider_id"]): m["status"]
        for shop in day.shops
        for m in of(shop)
        if m["direction"] == "out"
    }

    assert found == day.sent.truth.statuses


def test_unread_counts_are_the_incoming_messages(day: Day) -> None:
    counted = """
        SELECT c.unread_count, count(*) FILTER (WHERE m.direction = 'in') AS messages
        FROM conversation AS c LEFT JOIN message AS m ON (m.tenant_id, m.conversation_id) = (c.tenant_id, c.id)
        WHERE c.channel_id = :channel GROUP BY c.tenant_id, c.id
    """

    found = [row for shop in day.shops for row in rows(shop, counted, channel=shop.channel.id)]

    assert all(row["unread_count"] == row["messages"] for row in found)
    assert sum(row["unread_count"] for row in found) == len(day.sent.truth.incoming)


def test_each_customer_is_one_contact_of_each_number(day: Day) -> None:
    met = people(day.sent)

    for shop in day.shops:
        contacts = rows(
            shop,
            "SELECT DISTINCT contact_id FROM contact_identity WHERE channel_id = :c AND kind = 'bsuid'"
            " AND value <> 'BR.90000000000000009'",
            c=shop.channel.id,
        )
        assert len(contacts) == len({person for number, person in met if number == shop.number.phone_number_id})


def test_each_stored_message_was_told_once(day: Day) -> None:
    for shop in day.shops:
        told = rows(
            shop,
            "SELECT message_id FROM event WHERE channel_id = :c AND type IN ('message_received', 'message_echoed')",
            c=shop.channel.id,
        )
        assert sorted(row["message_id"] for row in told) == sorted(m["id"] for m in of(shop))


def test_broken_bodies_are_dead_letters_and_all_others_are_done(day: Day) -> None:
    ended = list(states(day.ids).values())
    dead = [id_ for id_, state in states(day.ids).items() if state == "dead"]

    assert ended.count("dead") == day.sent.truth.malformed_bodies > 0
    assert ended.count("done") == len(day.sent.bodies) - day.sent.truth.malformed_bodies
    found = letters(*day.ids)
    assert {letter["delivery_id"] for letter in found} == set(dead)
    assert {letter["state"] for letter in found} == {"open"}


def test_the_same_traffic_again_changes_nothing(day: Day) -> None:
    before = [totals(shop) for shop in (day.shops[0], day.shops[2])]

    run_all(deliveries(day.shops[0], day.sent.bodies), batch=200, threads=2)

    assert [totals(shop) for shop in (day.shops[0], day.shops[2])] == before


def of(shop: Shop) -> list[dict[str, Any]]:
    return rows(
        shop,
        "SELECT id, provider_id, direction, type, status FROM message WHERE channel_id = :c",
        c=shop.channel.id,
    )


def people(sent: Traffic) -> set[tuple[str, str]]:
    """(phone_number_id, BSUID) of everybody who wrote or was written to from the phone app."""
    met = set()
    for raw in sent.bodies:
        try:
            body = msgspec.json.decode(raw)
            values = [change["value"] for entry in body["entry"] for change in entry["changes"]]
            numbers = [value["metadata"]["phone_number_id"] for value in values]
        except (ValueError, TypeError, KeyError):
            continue
        for number, value in zip(numbers, values, strict=True):
            met |= {(number, m["from_user_id"]) for m in value.get("messages", ())}
            met |= {(number, m["to_user_id"]) for m in value.get("message_echoes", ())}
    return met
