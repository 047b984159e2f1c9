"""Everything a webhook says beside messages and their reports: templates, account notices, files, foreign ids."""

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from pombal import metrics
from sandbox import meta
from tests.factories import Shop, a_shop, body_of, delivery, rows, texts
from tests.workers.tools import (
    another_number,
    contacts,
    deliveries,
    letters,
    message,
    messages,
    run,
    run_all,
    shared_shops,
    states,
    totals,
)

AT = 1_788_000_000
CALLER = "5511984440001"


# -- templates -------------------------------------------------------------------------------------------------------

VERDICTS = [("PENDING", AT), ("APPROVED", AT + 10), ("PAUSED", AT + 20), ("REJECTED", AT + 30)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::3], ids=str)
@pytest.mark.parametrize("at_once", [False, True], ids=["one after the other", "in one batch"])
def test_the_newest_verdict_on_a_template_stays(order: Sequence[int], at_once: bool) -> None:
    shop = a_shop()
    bodies = [verdict(shop, *VERDICTS[n]) for n in order]

    for job in [bodies] if at_once else [[body] for body in bodies]:
        run(deliveries(shop, job))

    (template,) = rows(shop, "SELECT name, language, status, reason, category, status_at FROM template")
    assert template == {
        "name": "pedido_enviado",
        "language": "pt_BR",
        "status": "rejected",
        "reason": "ABUSIVE_CONTENT",
        "category": "UTILITY",
        "status_at": moment(AT + 30),
    }


def test_a_verdict_goes_to_every_number_of_its_account_and_to_no_other() -> None:
    shop = a_shop()
    same = another_number(shop, waba_id=shop.number.waba_id)
    other = another_number(shop)

    run(deliveries(shop, [verdict(shop, "APPROVED", AT)]))

    channels = {row["channel_id"] for row in rows(shop, "SELECT channel_id FROM template")}
    assert channels == {shop.channel.id, same.channel.id}
    assert other.channel.id not in channels


# -- notices ---------------------------------------------------------------------------------------------------------

KEPT = [
    "account_update",
    "account_review_update",
    "account_alerts",
    "phone_number_quality_update",
    "business_capability_update",
    "security",
    "template_category_update",
    "history",
    "calls",
    "user_preferences",
    "user_id_update",
    "group_lifecycle_update",
    "smb_app_state_sync",
    "flows",
]


@pytest.mark.parametrize("field", KEPT)
def test_a_notice_is_one_event_of_its_own_name_however_often_it_is_sent(field: str) -> None:
    shop = a_shop()
    another_number(shop, waba_id=shop.number.waba_id)  # whose channel is told too, and which is the same tenant
    body = notice(shop, field)

    run(deliveries(shop, [body, body]))
    run(deliveries(shop, [body]))

    (event,) = rows(shop, "SELECT type, version, message_id, payload FROM event")
    assert (event["type"], event["version"], event["message_id"]) == (field, "v1", None)
    assert meta.change(shop.number, field)["value"].items() <= event["payload"].items()
    assert messages(shop) == []


def test_the_same_notice_at_another_time_is_another_event() -> None:
    shop = a_shop()

    run(deliveries(shop, [notice(shop, "account_update", time) for time in (AT, AT + 1, AT)]))

    assert len(rows(shop, "SELECT FROM event")) == 2


def test_one_notice_sent_fifty_times_at_once_is_one_event() -> None:
    shop = a_shop()

    run_all(deliveries(shop, [notice(shop, "account_update", AT)] * 50), batch=1)

    assert len(rows(shop, "SELECT FROM event")) == len(rows(shop, "SELECT FROM seen")) == 1


def test_a_field_that_is_new_to_us_is_kept() -> None:
    shop = a_shop()
    [id_] = deliveries(shop, [body_of(shop, {"metadata": {}, "sky": "blue"}, field="weather_update", time=AT)])

    run([id_])

    assert delivery(id_).state == "done"
    (event,) = rows(shop, "SELECT type, payload FROM event")
    assert event == {"type": "weather_update", "payload": {"metadata": {}, "sky": "blue"}}


def test_a_message_type_that_is_new_to_us_is_a_message() -> None:
    shop = a_shop()
    said = meta.message("hologram", "wamid.1", "5511984440001", AT, {"id": 7})

    run(deliveries(shop, [body_of(shop, {"messages": [said]})]))

    assert (message(shop, "wamid.1")["type"], message(shop, "wamid.1")["body"]) == ("hologram", {"hologram": {"id": 7}})


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", meta.MEDIA_TYPES)
def test_a_file_waits_to_be_fetched_for_seven_days(kind: str) -> None:
    shop = a_shop()
    at = int(datetime.now(UTC).timestamp()) - 3600
    said = meta.message(kind, "wamid.1", "5511984440001", at)
    body = body_of(shop, {"messages": [said]})

    run(deliveries(shop, [body, body]))
    run(deliveries(shop, [body]))

    (file,) = rows(shop, "SELECT * FROM media")
    assert file["message_id"] == message(shop, "wamid.1")["id"]
    assert (file["state"], file["kind"], file["channel_id"]) == ("pending", kind, shop.channel.id)
    assert (file["provider_media_id"], file["mime_type"]) == (said[kind]["id"], said[kind]["mime_type"])
    assert file["deadline"] == moment(at) + timedelta(days=7)


def test_a_text_has_no_file() -> None:
    shop = a_shop()

    run(deliveries(shop, [texts(shop, "wamid.1")]))

    assert rows(shop, "SELECT FROM media") == []


# -- conversations ---------------------------------------------------------------------------------------------------


def test_a_customers_message_opens_the_window_for_a_day_and_an_older_one_does_not_shorten_it() -> None:
    shop = a_shop()

    for at in (AT, AT - 3600):
        run(deliveries(shop, [texts(shop, f"wamid.{at}", at=at)]))

    (conversation,) = rows(shop, "SELECT window_until, last_message_at, status FROM conversation")
    assert conversation == {
        "window_until": moment(AT) + timedelta(days=1),
        "last_message_at": moment(AT),
        "status": "open",
    }


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5], ids=str)
@pytest.mark.parametrize("at_once", [False, True], ids=["one after the other", "in one batch"])
def test_a_customers_call_opens_the_window_as_a_message_does(order: Sequence[int], at_once: bool) -> None:
    shop = a_shop()
    early, late = a_call(shop, AT), a_call(shop, AT + 7200)
    bodies = [texts(shop, "wamid.1", from_=CALLER, at=AT + 3600), early, late, late]

    for job in [[bodies[n] for n in order]] if at_once else [[bodies[n]] for n in order]:
        run(deliveries(shop, job))

    (conversation,) = rows(shop, "SELECT window_until, last_message_at, unread_count FROM conversation")
    assert conversation == {
        "window_until": moment(AT + 7200) + timedelta(days=1),
        "last_message_at": moment(AT + 3600),
        "unread_count": 1,
    }
    assert len(contacts(shop)) == len(messages(shop)) == 1
    assert len(rows(shop, "SELECT FROM event WHERE type = 'calls'")) == 2


def test_somebody_who_calls_before_they_write_is_a_contact_with_a_conversation() -> None:
    shop = a_shop()

    run(deliveries(shop, [a_call(shop, AT)]))

    assert [contact["name"] for contact in contacts(shop)] == ["Bia"]
    (conversation,) = rows(shop, "SELECT window_until, last_message_at, unread_count, status FROM conversation")
    assert conversation == {
        "window_until": moment(AT) + timedelta(days=1),
        "last_message_at": None,
        "unread_count": 0,
        "status": "open",
    }
    assert messages(shop) == []


def test_a_new_message_opens_a_closed_conversation_and_a_repeated_one_does_not() -> None:
    shop = a_shop()
    run(deliveries(shop, [texts(shop, "wamid.1")]))

    opened = []
    for wamid in ("wamid.1", "wamid.2"):
        with_rows = "UPDATE conversation SET status = 'closed' RETURNING 1 AS one"
        assert rows(shop, with_rows)
        run(deliveries(shop, [texts(shop, wamid)]))
        opened += rows(shop, "SELECT status FROM conversation")

    assert [row["status"] for row in opened] == ["closed", "open"]


# -- whose it is -----------------------------------------------------------------------------------------------------


def test_another_tenants_number_in_a_signed_body_is_quarantined_under_the_signer() -> None:
    ours, theirs = a_shop(), a_shop()
    before = totals(theirs)
    [id_] = deliveries(ours, [texts(theirs, "wamid.1")])  # signed by our app, with their phone_number_id

    run([id_])

    assert totals(theirs) == before
    assert messages(ours) == []
    foreign = delivery(id_)
    assert (foreign.state, foreign.failures) == ("dead", 0)
    (letter,) = letters(id_)
    assert letter["tenant_id"] == ours.tenant.id
    assert letter["path"] == "$.entry[0].changes[0]"
    assert "foreign_id" in letter["error"]
    assert theirs.number.phone_number_id not in letter["error"]


def test_another_tenants_account_in_a_signed_body_is_quarantined_under_the_signer() -> None:
    ours, theirs = a_shop(), a_shop()
    [id_] = deliveries(ours, [verdict(theirs, "REJECTED", AT)])

    run([id_])

    assert rows(theirs, "SELECT FROM template") == rows(ours, "SELECT FROM template") == []
    assert [letter["tenant_id"] for letter in letters(id_)] == [ours.tenant.id]


def test_the_own_part_of_a_body_with_a_foreign_part_is_processed() -> None:
    ours, theirs = a_shop(), a_shop()
    entries = [
        meta.entry(shop.number.waba_id, [meta.change(shop.number, "messages", {"messages": [said]})])
        for shop, said in (
            (theirs, meta.text_message("wamid.theirs", "5511984440001", "oi", AT)),
            (ours, meta.text_message("wamid.ours", "5511984440001", "oi", AT)),
        )
    ]
    [id_] = deliveries(ours, [meta.encode(meta.envelope(entries))])

    run([id_])

    assert [m["provider_id"] for m in messages(ours)] == ["wamid.ours"]
    assert messages(theirs) == []
    assert delivery(id_).state == "done"
    assert [letter["path"] for letter in letters(id_)] == ["$.entry[0].changes[0]"]


def test_a_foreign_id_is_counted_as_an_attempt_on_a_tenant() -> None:
    ours, theirs = a_shop(), a_shop()
    before = counted("pombal_security_events_total", kind="foreign_id")

    run(deliveries(ours, [texts(theirs, "wamid.1")]))

    assert counted("pombal_security_events_total", kind="foreign_id") == before + 1


def test_the_numbers_of_a_shared_app_are_their_own_tenants() -> None:
    first, second = shared_shops(2)

    run(deliveries(first, [texts(first, "wamid.1"), texts(second, "wamid.1")]))

    assert len(messages(first)) == len(messages(second)) == 1
    assert len(rows(first, "SELECT FROM contact")) == len(rows(second, "SELECT FROM contact")) == 1


def test_what_no_tenant_of_a_shared_app_knows_is_the_operators() -> None:
    first, _ = shared_shops(2)
    ids = deliveries(first, [texts(a_shop(), "wamid.1"), b"not JSON"])

    run(ids)

    assert set(states(ids).values()) == {"dead"}
    assert [letter["tenant_id"] for letter in letters(*ids)] == [None, None]


# -- makers ----------------------------------------------------------------------------------------------------------


def verdict(shop: Shop, event: str, at: int) -> bytes:
    value = meta.change(shop.number, "message_template_status_update")["value"] | {"event": event}
    if event == "REJECTED":
        value["reason"] = "ABUSIVE_CONTENT"
    return body_of(shop, value, field="message_template_status_update", time=at)


def a_call(shop: Shop, at: int) -> bytes:
    value = {
        "contacts": [meta.contact(CALLER, "Bia")],
        "calls": [
            {
                "id": f"wacid.{at}",
                "from": CALLER,
                "event": "connect",
                "direction": "USER_INITIATED",
                "timestamp": str(at),
            }
        ],
    }
    return body_of(shop, value, field="calls")


def notice(shop: Shop, field: str, time: int = AT) -> bytes:
    return meta.encode(meta.envelope([meta.entry(shop.number.waba_id, [meta.change(shop.number, field)], time)]))


def moment(at: int) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def counted(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0
