"""What MegaAPI's webhooks change: each shape of megaapi.md as rows, whose it is, and what is done about connections."""

import itertools
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import delete

from models import WebhookToken, standing
from pombal import db, metrics
from pombal.broker import HardenedBroker
from tests.factories import a_shop, a_tenant, all_of, delivery, superuser, texts
from tests.gateways import (
    AT,
    CUSTOMER,
    Gateway,
    a_gateway,
    ack,
    an_id,
    connection,
    deliveries,
    encoded,
    flat,
    media,
)
from tests.workers import tools
from tests.workers.tools import letters, run, run_all, states
from workers import broker

GROUP = "120363000000000001@g.us"
SENT = datetime.fromtimestamp(AT, UTC)
AHEAD = 4_102_444_800  # in 2100


def received(gateway: Gateway, *bodies: Any) -> list[UUID]:
    """Bodies, processed in one job."""
    ids = deliveries(gateway, bodies)
    run(ids)
    return ids


def messages(gateway: Gateway) -> list[dict[str, Any]]:
    return gateway.rows("SELECT * FROM message ORDER BY created_at, id")


def message(gateway: Gateway) -> dict[str, Any]:
    (found,) = messages(gateway)
    return found


def identities(gateway: Gateway) -> dict[tuple[str, str], UUID]:
    found = gateway.rows("SELECT kind, value, contact_id FROM contact_identity")
    return {(row["kind"], row["value"]): row["contact_id"] for row in found}


def everything(gateway: Gateway) -> dict[str, Any]:
    """All that a tenant has, equal before and after what has no effect."""
    tables = ("contact", "contact_identity", "conversation", "event", "media", "message", "message_status", "seen")
    return {table: gateway.rows(f"SELECT * FROM {table} ORDER BY {table}::text") for table in tables}  # noqa: S608


def counted(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0


# -- each shape as its rows ------------------------------------------------------------------------------------------


def test_a_text_is_a_message_of_a_contact_in_a_conversation() -> None:
    gateway = a_gateway()
    id_ = an_id()

    (delivered,) = received(gateway, flat(gateway, id_=id_))

    row = message(gateway)
    assert (row["provider_id"], row["direction"], row["type"], row["status"]) == (id_, "in", "text", "received")
    assert row["body"] == {
        "text": {"body": "Bom dia"},
        "key": {"remoteJid": CUSTOMER, "fromMe": False, "id": id_},
    }
    assert (row["provider_at"], row["channel_id"], row["delivery_id"]) == (SENT, gateway.channel.id, delivered)
    (contact,) = gateway.rows("SELECT id, name FROM contact")
    assert (contact["id"], contact["name"]) == (row["contact_id"], "Bia")
    (conversation,) = gateway.rows("SELECT contact_id, window_until, unread_count FROM conversation")
    assert conversation == {
        "contact_id": contact["id"],
        "window_until": SENT + timedelta(days=1),
        "unread_count": 1,
    }
    (event,) = gateway.rows("SELECT type, message_id FROM event")
    assert event == {"type": "message_received", "message_id": row["id"]}
    assert delivery(delivered).state == "done"


def test_the_number_as_whatsapp_spells_it_is_kept_beside_every_other_spelling() -> None:
    gateway = a_gateway()

    received(gateway, flat(gateway, remoteJid="554888880001@s.whatsapp.net"))

    assert set(identities(gateway)) == {
        ("phone", "554888880001"),
        ("phone", "5548988880001"),
        ("jid", "554888880001"),
    }
    assert len(set(identities(gateway).values())) == 1


def test_the_spelling_of_what_we_sent_is_not_kept_as_whatsapps() -> None:
    gateway = a_gateway()

    received(gateway, flat(gateway, remoteJid="5548988880001@s.whatsapp.net", fromMe=True))
    assert {kind for kind, _ in identities(gateway)} == {"phone"}
    received(gateway, flat(gateway, remoteJid="554888880001@s.whatsapp.net"))

    assert {value for kind, value in identities(gateway) if kind == "jid"} == {"554888880001"}
    assert len(set(identities(gateway).values())) == 1


def test_somebody_by_lid_and_by_phone_is_one_contact_and_the_lids_digits_are_no_phone() -> None:
    gateway = a_gateway()

    received(gateway, flat(gateway), flat(gateway, remoteJid="77@lid", remoteJidAlt=CUSTOMER))
    received(gateway, flat(gateway, remoteJid="77@lid"), flat(gateway, remoteJid="88@lid"))

    known = identities(gateway)
    assert known[("lid", "77")] == known[("phone", "5511944440001")]
    assert known[("lid", "88")] != known[("lid", "77")]
    assert ("phone", "77") not in known
    assert len(gateway.rows("SELECT FROM conversation")) == 2


@pytest.mark.parametrize("kind", ["image", "video", "audio", "document", "sticker"])
def test_a_file_is_expected_with_the_keys_that_open_it(kind: str) -> None:
    gateway = a_gateway()
    said = media(kind, fileName="nf.pdf")

    received(gateway, flat(gateway, said))

    (file,) = gateway.rows("SELECT * FROM media")
    assert (file["message_id"], file["state"], file["kind"]) == (message(gateway)["id"], "pending", kind)
    assert (file["provider_media_id"], file["mime_type"]) == (None, "image/jpeg")
    assert file["sha256"] == said[f"{kind}Message"]["fileSha256"]
    assert file["keys"]["mediaKey"] == said[f"{kind}Message"]["mediaKey"]
    assert file["keys"]["messageType"] == kind


def test_a_message_typed_on_the_phone_is_an_echo_in_the_same_conversation() -> None:
    gateway = a_gateway()

    received(gateway, flat(gateway))
    received(gateway, flat(gateway, {"conversation": "Oi"}, fromMe=True, pushName="Loja"))

    first, second = messages(gateway)
    assert (second["direction"], second["status"], second["sent_at"]) == ("out", "sent", SENT)
    assert second["conversation_id"] == first["conversation_id"]
    assert gateway.rows("SELECT unread_count FROM conversation") == [{"unread_count": 1}]
    assert gateway.rows("SELECT name FROM contact") == [{"name": "Bia"}]


def test_a_group_is_a_conversation_and_its_members_are_contacts() -> None:
    gateway = a_gateway()

    received(
        gateway,
        flat(gateway, remoteJid=GROUP, participant="5511944440001:4@s.whatsapp.net", isGroup=True),
        flat(gateway, remoteJid=GROUP, participant="77@lid", pushName="Ana"),
        flat(gateway, remoteJid=GROUP, fromMe=True),
    )

    known = identities(gateway)
    group = known[("group", "120363000000000001")]
    assert {row["contact_id"] for row in messages(gateway)} == {
        group,
        known[("phone", "5511944440001")],
        known[("lid", "77")],
    }
    assert gateway.rows("SELECT contact_id FROM conversation") == [{"contact_id": group}]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5], ids=str)
@pytest.mark.parametrize("at_once", [False, True], ids=["one after the other", "in one batch"])
def test_acks_only_rise_in_whatever_order_they_come(order: tuple[int, ...], at_once: bool) -> None:
    gateway, id_ = a_gateway(), an_id()
    said = [flat(gateway, id_=id_, fromMe=True), ack(gateway, id_, 2), ack(gateway, id_, "4"), ack(gateway, id_, 3)]
    bodies = [said[n] for n in order]

    for job in [bodies] if at_once else [[body] for body in bodies]:
        received(gateway, *job)

    row = message(gateway)
    assert row["status"] == "read"
    assert None not in (row["sent_at"], row["delivered_at"], row["read_at"])


def test_acks_of_every_form_settle_a_message() -> None:
    gateway, id_ = a_gateway(), an_id()
    body = flat(gateway, id_=id_, fromMe=True)
    beside = {"instance_key": gateway.instance, "messageType": "message.ack", "key": body["key"], "status": 3}
    seed = {"instanceKey": gateway.instance, "event": "delivery", "data": {"key": body["key"], "status": "read"}}

    received(gateway, body)
    for form, word in ((beside, "delivered"), (seed, "read"), (body | {"update": {"status": "5"}}, "played")):
        received(gateway, form)
        assert message(gateway)["status"] == word
    assert {row["type"] for row in gateway.rows("SELECT type FROM event")}.isdisjoint({"message_empty"})


def test_a_body_of_countless_bad_elements_leaves_few_letters() -> None:
    gateway = a_gateway()

    (id_,) = received(gateway, b"[" + b"{}," * 5_000 + encoded(flat(gateway)) + b"]")

    assert len(messages(gateway)) == 1
    assert delivery(id_).state == "done"
    assert len(letters(id_)) == 100


@pytest.mark.parametrize(
    ("said", "type_", "body"),
    [
        (
            {"locationMessage": {"degreesLatitude": 1.5, "degreesLongitude": 2}},
            "location",
            {"latitude": 1.5, "longitude": 2},
        ),
        ({"reactionMessage": {"key": {"id": "OLD"}, "text": "👍"}}, "reaction", {"message_id": "OLD", "emoji": "👍"}),
        ({"protocolMessage": {"key": {"id": "OLD"}, "type": 0}}, "revoke", {"original_message_id": "OLD"}),
        (
            {"ephemeralMessage": {"message": {"audioMessage": {"ptt": True, "seconds": 3}}}},
            "voice",
            {"voice": True, "seconds": 3},
        ),
        ({"hologramMessage": {"x": 1}}, "hologramMessage", {"x": 1}),
    ],
)
def test_every_other_kind_is_a_message_in_its_normal_form(said: Any, type_: str, body: Any) -> None:
    gateway = a_gateway()

    received(gateway, flat(gateway, said))

    row = message(gateway)
    assert (row["type"], row["body"][type_]) == (type_, body)


def test_what_cannot_be_decrypted_is_an_event_and_the_message_may_still_come() -> None:
    gateway, id_ = a_gateway(), an_id()
    stub = flat(gateway, ..., id_=id_, messageStubType=2, messageStubParameters=["No session record"])

    received(gateway, stub, stub)
    received(gateway, stub | {"messageTimestamp": AT + 60})
    received(gateway, flat(gateway, id_=id_))

    assert message(gateway)["provider_id"] == id_
    types = [row["type"] for row in gateway.rows("SELECT type FROM event ORDER BY id")]
    assert types == ["message_undecryptable", "message_received"]


def test_wrapped_bodies_and_lists_are_the_same_messages() -> None:
    gateway = a_gateway()
    bodies = [flat(gateway) for _ in range(4)]
    seed = {"instanceKey": gateway.instance, "event": "message", "data": bodies[0]}

    received(gateway, seed, {"instance": gateway.instance, "data": {"messages": bodies[1:3]}}, bodies)

    assert {row["provider_id"] for row in messages(gateway)} == {body["key"]["id"] for body in bodies}


@pytest.mark.parametrize("remote", ["status@broadcast", "120363000000000001@newsletter"])
def test_stories_and_newsletters_are_ignored(remote: str) -> None:
    gateway = a_gateway()

    (id_,) = received(gateway, flat(gateway, remoteJid=remote, participant=CUSTOMER))

    assert delivery(id_).state == "ignored"
    assert not any(everything(gateway).values())
    assert letters(id_) == []


# -- again, and hostile ----------------------------------------------------------------------------------------------


def test_the_same_event_fifty_times_at_once_is_one_row() -> None:
    gateway = a_gateway()
    body = flat(gateway, media(), id_=an_id())
    forms = [body, {"data": body}, [body], dict(reversed(body.items())), body | {"pushName": "Bia Prado"}]
    bodies: list[bytes] = [encoded(forms[n % 5]) + b" " * n for n in range(50)]

    ids = deliveries(gateway, bodies)
    run_all(ids, batch=7)

    assert set(states(ids).values()) == {"done"}
    for table in ("message", "media", "conversation", "contact"):
        assert len(gateway.rows(f"SELECT FROM {table}")) == 1, table
    assert len(gateway.rows("SELECT FROM event WHERE type = 'message_received'")) == 1
    assert gateway.rows("SELECT unread_count FROM conversation") == [{"unread_count": 1}]


def test_hostile_bodies_are_quarantined_and_their_neighbours_are_fine() -> None:
    gateway = a_gateway()
    text = encoded(flat(gateway, {"conversation": "@@"}))
    hostile = [
        b"",
        b"<xml/>",
        text[:-7],
        b'{"a":"\xff\xfe"}',
        text.decode().encode("utf-16"),
        b"42",
        b"[" * 100_000,
        b'{"key":' + b"9" * 100_000 + b"}",
        b'{"key":NaN}',
        b"{}",
        b'{"key":{},"message":{}}',
        text.replace(b"@@", b"\x00"),
        text.replace(CUSTOMER.encode(), b"nobody"),
        encoded(flat(gateway, id_="x" * 513)),
        encoded(flat(gateway, {"hologramMessage": json.loads("[" * 90 + "]" * 90)})),
    ]
    good = [
        flat(gateway),
        text.replace(b"@@", b"\\u0000\\ud800"),
        text.replace(b"@@", b"x" * 100_000),
        encoded([7, flat(gateway), {"key": 1}]),
    ]

    ids = received(gateway, *itertools.chain(*itertools.zip_longest(hostile, good, fillvalue=b"null")))

    found = states(ids)
    bad = {id_ for id_ in ids if found[id_] == "dead"}
    assert len(messages(gateway)) == 3  # two of the good ones have the same id
    assert len(bad) == 2 * len(hostile) - len(good)
    assert all(found[id_] == "done" for id_ in ids if id_ not in bad)
    made = letters(*ids)
    assert {row["tenant_id"] for row in made} == {gateway.tenant.id}
    assert {row["delivery_id"] for row in made} == {*bad, ids[7]}
    assert [row["path"] for row in made if row["delivery_id"] == ids[7]] == ["$[0]", "$[2]"]
    assert "5511" not in str([row["error"] for row in made])


def test_an_odd_time_never_stops_a_message() -> None:
    gateway = a_gateway()

    received(gateway, *(flat(gateway, messageTimestamp=odd) for odd in ("soon", -1, 10**20, AT * 1000, None, AHEAD)))

    assert len(messages(gateway)) == 6
    assert all(one["provider_at"] <= one["created_at"] for one in messages(gateway))


def test_a_wrong_clock_does_not_hide_that_a_channel_is_silent() -> None:
    """An echo and an ack of a time that is far ahead are of now, and no traffic of that time."""
    gateway = a_gateway()
    id_ = an_id()

    received(
        gateway, flat(gateway, id_=id_, fromMe=True, messageTimestamp=AHEAD), ack(gateway, id_, 3, timestamp=AHEAD)
    )
    delivered = ack(gateway, id_, 3)
    delivered["update"]["timestamp"] = AHEAD
    received(gateway, delivered)

    found = message(gateway)
    assert found["body"]["pombal"] == {"odd_timestamp": True}
    (told,) = gateway.rows("SELECT last_message_at, now() AS now FROM conversation")
    times = [found[name] for name in ("sent_at", "delivered_at", "provider_at")] + [told["last_message_at"]]
    assert all(at <= told["now"] for at in times)
    with superuser() as connection:  # what time does
        connection.execute(
            "UPDATE message SET sent_at = sent_at - interval '3 days' WHERE channel_id = %s", [gateway.channel.id]
        )
        connection.execute(
            "UPDATE channel SET status = 'connected', status_since = now() - interval '3 days' WHERE id = %s",
            [gateway.channel.id],
        )
    with db.session([gateway.tenant.id]) as s:
        assert [row["id"] for row in standing.find_silent(s)] == [gateway.channel.id]


def test_no_body_makes_an_event_that_is_ours() -> None:
    """A body is not signed: what it calls itself is never the name of what we found out by asking."""
    gateway = a_gateway()
    forged = ("channel_status", "channel_held", "channel_silent", "message_status", "session_status", "sip_failed")
    changed = {"channel": str(gateway.channel.id), "from": "connected", "to": "disconnected"}

    received(gateway, *({"instanceKey": gateway.instance, "event": word, "data": changed} for word in forged))

    told = gateway.rows("SELECT type, payload FROM event ORDER BY type")
    assert [row["type"] for row in told] == sorted(f"gateway_{word}" for word in forged)
    assert all(row["payload"] == changed for row in told)


def test_what_became_of_each_body_is_counted_and_has_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    gateway = a_gateway()

    def counts() -> list[float]:
        states_ = [counted("pombal_deliveries_total", provider="megaapi", outcome=one) for one in OUTCOMES]
        return [*states_, counted("pombal_delivery_lag_seconds_count", provider="megaapi")]

    before = counts()
    lag = counted("pombal_delivery_lag_seconds_sum", provider="megaapi")
    ids = received(gateway, flat(gateway), flat(gateway, remoteJid="status@broadcast"), b"{")

    assert [new - old for new, old in zip(counts(), before, strict=True)] == [1, 1, 1, 3]
    assert 0 <= counted("pombal_delivery_lag_seconds_sum", provider="megaapi") - lag < 600
    with db.session() as s:
        found = all_of(s, "SELECT id, request_id FROM delivery WHERE id = ANY(:ids)", ids=ids)
    requests = {row["id"]: row["request_id"] for row in found}
    lines = [line for line in "".join(capfd.readouterr()).splitlines() if "webhook_processed" in line]
    assert len(lines) == 3
    for id_, outcome in zip(ids, OUTCOMES, strict=True):
        (line,) = [line for line in lines if str(id_) in line]
        assert all(word in line for word in (outcome, requests[id_], "seconds"))


OUTCOMES = ("done", "ignored", "dead")


# -- whose it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_theirs_known", [True, False])
def test_another_instances_body_is_quarantined_under_the_tokens_tenant(is_theirs_known: bool) -> None:
    ours, theirs = a_gateway(), a_gateway()
    instance = theirs.instance if is_theirs_known else "megacode-nobodys"
    before = counted("pombal_security_events_total", kind="foreign_id")
    beside = flat(ours)

    (id_,) = received(ours, [flat(instance), connection(instance), beside])

    assert not any(everything(theirs).values())
    assert [row["provider_id"] for row in messages(ours)] == [beside["key"]["id"]]
    made = letters(id_)
    assert [(row["tenant_id"], row["path"]) for row in made] == [(ours.tenant.id, "$[0]"), (ours.tenant.id, "$[1]")]
    assert all(row["error"].startswith("foreign_id") and instance not in row["error"] for row in made)
    assert counted("pombal_security_events_total", kind="foreign_id") == before + 2
    assert ours.rows("SELECT told_at FROM channel") == theirs.rows("SELECT told_at FROM channel") == [{"told_at": None}]


def test_a_body_that_names_no_instance_is_its_tokens_and_an_unbound_token_takes_what_comes() -> None:
    bound, unbound = a_gateway(), a_gateway(is_bound=False)

    received(bound, flat(bound, instance_key=...))
    received(unbound, flat("megacode-whatever"))

    assert len(messages(bound)) == len(messages(unbound)) == 1


def test_two_channels_of_a_tenant_do_not_mix() -> None:
    tenant = a_tenant()
    one, two = a_gateway(tenant), a_gateway(tenant)
    body = flat(one, id_="SAME")

    received(one, body)
    received(two, body | {"instance_key": two.instance})

    assert {row["channel_id"] for row in messages(one)} == {one.channel.id, two.channel.id}
    assert len(one.rows("SELECT FROM contact")) == 2


def test_deliveries_of_apps_and_gateways_are_worked_on_in_one_job() -> None:
    gateway, shop = a_gateway(), a_shop()
    ids = [*deliveries(gateway, [flat(gateway)]), *tools.deliveries(shop, [texts(shop, "wamid.1")])]

    run(ids)

    assert set(states(ids).values()) == {"done"}
    assert len(messages(gateway)) == len(tools.messages(shop)) == 1


def test_a_delivery_of_a_channel_whose_tokens_are_gone_is_nobodys() -> None:
    gateway = a_gateway()
    (id_,) = deliveries(gateway, [flat(gateway)])
    with db.session() as s:
        s.execute(delete(WebhookToken).where(WebhookToken.channel_id == gateway.channel.id))

    run([id_])

    assert delivery(id_).state == "dead"
    (letter,) = letters(id_)
    assert letter["tenant_id"] is None
    assert messages(gateway) == []


# -- connections -----------------------------------------------------------------------------------------------------


def asked_about() -> list[str]:
    """The channels that somebody is to ask the gateway about."""
    assert isinstance(broker, HardenedBroker)
    found = broker.client.hvals(f"{broker.namespace}:channel_session.msgs")
    return sorted(job["args"][0] for job in map(json.loads, found) if job["actor_name"] == "status_check")


@pytest.mark.usefixtures("queues")
def test_a_connection_event_changes_no_status_and_has_the_gateway_asked() -> None:
    gateway, other = a_gateway(), a_gateway()
    seed = {"instanceKey": gateway.instance, "event": "connection", "data": {"status": "disconnected"}}

    ids = received(gateway, connection(gateway), seed, flat(gateway), connection("megacode-nobodys"))

    (row,) = gateway.rows("SELECT status, status_at, told_at FROM channel")
    assert (row["status"], row["status_at"]) == (None, None)
    assert row["told_at"] == max(delivery(id_).received_at for id_ in ids)
    assert other.rows("SELECT told_at FROM channel") == [{"told_at": None}]
    assert asked_about() == [str(gateway.channel.id)]
    assert [delivery(id_).state for id_ in ids] == ["done", "done", "done", "dead"]
    assert gateway.rows("SELECT type FROM event") == [{"type": "message_received"}]


@pytest.mark.usefixtures("queues")
def test_messages_have_nobody_asked() -> None:
    gateway = a_gateway()

    received(gateway, flat(gateway), ack(gateway, "A", 3))

    assert asked_about() == []
    assert gateway.rows("SELECT told_at FROM channel") == [{"told_at": None}]


@pytest.fixture
def full_queues() -> Iterator[None]:
    """A Valkey that takes nothing more."""
    assert isinstance(broker, HardenedBroker)
    broker.client.config_set("maxmemory", 1)
    yield
    broker.client.config_set("maxmemory", 0)


@pytest.mark.usefixtures("queues", "full_queues")
def test_a_lost_bell_is_no_loss() -> None:
    """The next round asks in any case."""
    gateway = a_gateway()

    (id_,) = received(gateway, connection(gateway))

    assert delivery(id_).state == "done"
    assert gateway.rows("SELECT told_at FROM channel") == [{"told_at": delivery(id_).received_at}]
