"""Who is who: one person is one contact, by whichever of their identities a message comes."""

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from sqlalchemy.orm import Session

from pombal import db
from providers.inbound import Message, Person
from sandbox import meta
from tests.factories import Shop, a_shop, a_wamid, echoes, rows
from tests.workers.tools import (
    another_number,
    contacts,
    deliveries,
    identities,
    in_background,
    messages,
    run,
    together,
    until_somebody_waits_for_a_lock,
)
from workers._effects import apply_items

AT = 1_788_000_000
MOBILE_12, MOBILE_13 = "551184440001", "5511984440001"
BSUID = "BR.90000000000000001"


def test_somebody_without_a_phone_number_is_a_contact_by_their_user_id() -> None:
    shop = a_shop()

    process(shop, [said(bsuid=BSUID, name="Bia")], [said(bsuid=BSUID)])

    assert [contact["name"] for contact in contacts(shop)] == ["Bia"]
    assert set(identities(shop)) == {("bsuid", BSUID)}
    assert len(messages(shop)) == 2


@pytest.mark.parametrize("order", ["phone both bsuid", "bsuid both phone", "both phone bsuid", "both bsuid phone"])
@pytest.mark.parametrize("at_once", [False, True], ids=["each in its body", "in one body"])
def test_a_message_with_both_ids_ties_the_phone_to_the_user_id(order: str, at_once: bool) -> None:
    shop = a_shop()
    ids = {"phone": (MOBILE_12, None), "bsuid": (None, BSUID), "both": (MOBILE_13, BSUID)}
    given = [said(phone=phone, bsuid=bsuid) for phone, bsuid in (ids[word] for word in order.split())]

    process(shop, given) if at_once else process(shop, *([one] for one in given))

    assert len(contacts(shop)) == 1
    assert set(identities(shop)) == {("bsuid", BSUID), ("phone", MOBILE_13), ("phone", MOBILE_12)}
    (conversation,) = rows(shop, "SELECT unread_count FROM conversation")
    assert conversation["unread_count"] == 3


def test_a_phone_that_was_known_alone_gets_its_user_id() -> None:
    shop = a_shop()

    process(shop, [said(phone=MOBILE_13)], [said(bsuid=BSUID, phone=MOBILE_13)], [said(bsuid=BSUID)])

    assert len(contacts(shop)) == 1


@pytest.mark.parametrize(("first", "second"), [(MOBILE_12, MOBILE_13), (MOBILE_13, MOBILE_12)])
@pytest.mark.parametrize("at_once", [False, True], ids=["one body after the other", "in one body"])
def test_a_mobile_with_and_without_the_ninth_digit_is_one_contact(first: str, second: str, at_once: bool) -> None:
    shop = a_shop()
    spelt = [said(phone=first), said(phone=second)]

    process(shop, spelt) if at_once else process(shop, spelt[:1], spelt[1:])

    assert len(contacts(shop)) == 1
    assert set(identities(shop)) == {("phone", MOBILE_12), ("phone", MOBILE_13)}
    (conversation,) = rows(shop, "SELECT unread_count FROM conversation")
    assert conversation["unread_count"] == 2


def test_both_spellings_met_at_once_are_one_contact() -> None:
    shop = a_shop()
    people = [f"55119{n:08d}" for n in range(80_000_000, 80_000_020)]
    ids = [
        deliveries(shop, [body(shop, said(phone=phone)) for phone in spelt])
        for spelt in (people, [phone[:4] + phone[5:] for phone in people], list(reversed(people)))
    ]

    together(*(partial(run, batch) for batch in ids))

    assert len(contacts(shop)) == len(people)
    assert len(identities(shop)) == 2 * len(people)
    assert len(messages(shop)) == 3 * len(people)


def test_whoever_meets_somebody_a_moment_later_joins_the_contact_of_the_faster() -> None:
    shop = a_shop()
    [later] = deliveries(shop, [body(shop, said(bsuid=BSUID, phone=MOBILE_12, name="Bia"))])

    with db.session([shop.tenant.id]) as s:
        met(s, shop, ("phone", MOBILE_13))
        slower = in_background(lambda: run([later]))
        until_somebody_waits_for_a_lock()
    slower()

    (contact,) = contacts(shop)
    assert contact["name"] == "Bia"
    assert set(identities(shop).values()) == {contact["id"]}
    assert {m["contact_id"] for m in messages(shop)} == {contact["id"]}


@pytest.mark.parametrize("kind", ["551133334444", "551123334444"])
def test_a_landline_is_not_the_mobile_with_a_nine_before_it(kind: str) -> None:
    shop = a_shop()

    process(shop, [said(phone=kind), said(phone=f"{kind[:4]}9{kind[4:]}")])

    assert len(contacts(shop)) == 2


def test_two_numbers_of_a_company_keep_their_customers_apart() -> None:
    shop = a_shop()
    other = another_number(shop)

    process(shop, [said(bsuid=BSUID)])
    process(other, [said(bsuid=BSUID)])

    assert len(contacts(shop)) == 2
    assert len(identities(shop)) == len(identities(other)) == 1


def test_the_recipient_of_an_echo_is_the_same_contact() -> None:
    shop = a_shop()

    run(deliveries(shop, [echoes(shop, a_wamid(), to=MOBILE_12), body(shop, said(phone=MOBILE_13))]))

    assert len(contacts(shop)) == 1
    (conversation,) = rows(shop, "SELECT unread_count FROM conversation")
    assert conversation["unread_count"] == 1


# -- changed numbers -------------------------------------------------------------------------------------------------


def test_a_changed_number_leads_to_the_same_contact() -> None:
    shop = a_shop()
    new = "5521988880001"

    process(shop, [said(phone=MOBILE_13)], [changed_number(MOBILE_13, new)], [said(phone=new, bsuid="BR.9001")])

    assert len(contacts(shop)) == 1
    assert len({m["conversation_id"] for m in messages(shop)}) == 1


def test_a_changed_number_takes_nobody_elses() -> None:
    shop = a_shop()
    taken = "5521988880001"

    process(shop, [said(phone=taken)], [said(phone=MOBILE_13)], [changed_number(MOBILE_13, taken)])

    known = identities(shop)
    assert len(contacts(shop)) == 2
    assert known[("phone", taken)] != known[("phone", MOBILE_13)]


def test_a_changed_number_takes_nobody_elses_who_comes_at_the_same_moment() -> None:
    shop = a_shop()
    taken = "5521988880001"
    process(shop, [said(phone=MOBILE_13)])
    (old,) = contacts(shop)
    [later] = deliveries(shop, [body(shop, changed_number(MOBILE_13, taken))])
    [newcomer] = deliveries(shop, [body(shop, changed_number("5531988880002", taken))])

    with db.session([shop.tenant.id]) as s:
        met(s, shop, ("phone", taken))
        slower = in_background(lambda: together(lambda: run([later]), lambda: run([newcomer])))
        until_somebody_waits_for_a_lock()
    slower()

    known = identities(shop)
    assert known[("phone", MOBILE_13)] == old["id"]
    assert len({known[("phone", phone)] for phone in (MOBILE_13, taken, "5531988880002")}) == 3
    assert len(contacts(shop)) == 3


def test_a_contact_that_was_there_keeps_its_phone_when_another_batch_takes_its_user_id_first() -> None:
    shop = a_shop()
    process(shop, [said(phone=MOBILE_13)])
    (old,) = contacts(shop)
    [later] = deliveries(shop, [body(shop, said(bsuid=BSUID, phone=MOBILE_13))])

    with db.session([shop.tenant.id]) as s:
        met(s, shop, ("bsuid", BSUID))
        slower = in_background(lambda: run([later]))
        until_somebody_waits_for_a_lock()
    slower()

    known = identities(shop)
    assert known[("phone", MOBILE_13)] == known[("phone", MOBILE_12)] == old["id"]
    (by_bsuid,) = (m for m in messages(shop) if m["delivery_id"] == later)
    assert by_bsuid["contact_id"] == known[("bsuid", BSUID)]


# -- names -----------------------------------------------------------------------------------------------------------

NAMED = [("Bia", AT + 10), ("Beatriz", AT + 20), (None, AT + 50), ("Bia Prado", AT + 40), ("B. Prado", AT + 30)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(5)))[::7], ids=str)
@pytest.mark.parametrize("at_once", [False, True], ids=["each in its body", "in one body"])
def test_the_name_is_the_one_of_the_newest_message_that_has_one(order: Sequence[int], at_once: bool) -> None:
    shop = a_shop()
    given = [said(phone=MOBILE_13, name=NAMED[n][0], at=NAMED[n][1]) for n in order]

    if at_once:
        run(deliveries(shop, [body(shop, one) for one in given]))
    else:
        process(shop, *([one] for one in given))

    assert [contact["name"] for contact in contacts(shop)] == ["Bia Prado"]


def test_of_two_names_in_one_second_every_order_leaves_the_same() -> None:
    names = []
    for order in (("Ana", "Bia"), ("Bia", "Ana")):
        shop = a_shop()
        process(shop, *([said(phone=MOBILE_13, name=name, at=AT)] for name in order))
        names += [contact["name"] for contact in contacts(shop)]

    assert len(set(names)) == 1


# -- groups ----------------------------------------------------------------------------------------------------------


def test_a_groups_messages_are_one_conversation_of_several_people() -> None:
    shop = a_shop()
    people = [said(phone=phone, group_id="grp-1") for phone in (MOBILE_13, "5521988880001", MOBILE_12)]

    process(shop, people[:1], people[1:])

    stored = messages(shop)
    (conversation,) = rows(shop, "SELECT id, contact_id, unread_count FROM conversation")
    assert conversation["contact_id"] == identities(shop)[("group", "grp-1")]
    assert conversation["unread_count"] == 3
    assert {m["conversation_id"] for m in stored} == {conversation["id"]}
    assert {m["contact_id"] for m in stored} == {
        identities(shop)[("phone", MOBILE_13)],
        identities(shop)[("phone", "5521988880001")],
    }


# -- makers ----------------------------------------------------------------------------------------------------------


def said(
    *, phone: str | None = None, bsuid: str | None = None, name: str | None = None, at: int = AT, **extra: Any
) -> dict[str, Any]:
    """A value with one text message and its contact."""
    ids = {"from": phone, "from_user_id": bsuid}
    known = {"wa_id": phone, "user_id": bsuid, "profile": {"name": name} if name else None}
    message = {"id": a_wamid(), "timestamp": str(at), "type": "text", "text": {"body": "oi"}, **extra}
    return {
        "contacts": [{key: value for key, value in known.items() if value}],
        "messages": [{key: value for key, value in ids.items() if value} | message],
    }


def met(s: Session, shop: Shop, identity: tuple[str, str]) -> None:
    """Another worker's transaction that has met somebody, and has not committed yet."""
    person = Person((identity,))
    item = Message("$", a_wamid(), "in", "text", {}, person, person, datetime.fromtimestamp(AT, UTC))
    apply_items(s, [(None, shop.tenant.id, shop.channel.id, item)])


def changed_number(old: str, new: str) -> dict[str, Any]:
    system = {"body": "changed number", "type": "user_changed_number", "wa_id": new}
    return {
        "messages": [{"from": old, "id": a_wamid(), "timestamp": str(AT), "type": "system", "system": system}],
    }


def body(shop: Shop, *values: dict[str, Any]) -> bytes:
    changes = [meta.change(shop.number, "messages", value) for value in values]
    return meta.encode(meta.envelope([meta.entry(shop.number.waba_id, changes)]))


def process(shop: Shop, *bodies: list[dict[str, Any]]) -> None:
    """Each list of values as a body and a job of its own, one after the other."""
    for values in bodies:
        run(deliveries(shop, [body(shop, *values)]))
