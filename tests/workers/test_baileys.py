"""What the webhooks of Baileys gateways change: messages and acks, connections, and what counts for a repair."""

import json
from typing import Any
from uuid import UUID

import pytest

from models import SessionError
from pombal import db, metrics
from pombal.broker import HardenedBroker
from tests.baileys import (
    Session,
    a_session,
    boom,
    deliveries,
    evolution,
    evolution_message,
    fazer,
    message,
    sample,
    stub,
    upsert,
    waha,
    waha_message,
)
from tests.factories import a_tenant, delivery
from tests.gateways import CUSTOMER, a_gateway, an_id, encoded, flat, media
from tests.gateways import deliveries as of_megaapi
from tests.workers.conftest import OnStoring
from tests.workers.tools import letters, run, run_all, states
from workers import broker

GROUP = "120363000000000001@g.us"


def received(session: Session, *bodies: Any) -> list[UUID]:
    """Bodies, processed in one job."""
    ids = deliveries(session, bodies)
    run(ids)
    return ids


def messages(session: Session) -> list[dict[str, Any]]:
    return session.rows("SELECT * FROM message ORDER BY created_at, id")


def errors(session: Session) -> list[dict[str, Any]]:
    return session.rows("SELECT * FROM session_error ORDER BY at, message_id")


def ends(session: Session) -> list[dict[str, Any]]:
    return session.rows("SELECT code, source, times FROM session_end ORDER BY code")


def counted(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0


def jobs(queue: str) -> list[tuple[str, list[str]]]:
    """What waits in a queue: actor and arguments."""
    assert isinstance(broker, HardenedBroker)
    found = broker.client.hvals(f"{broker.namespace}:{queue}.msgs")
    return sorted((job["actor_name"], job["args"]) for job in map(json.loads, found))


# -- messages and acks -----------------------------------------------------------------------------------------------


def test_a_message_is_one_row_whichever_gateway_tells_of_it_and_however_often() -> None:
    session, id_ = a_session(), an_id()
    said = message(id_=id_)
    bodies = [
        evolution_message(session.name, id_=id_),
        evolution(session.name, "messages.upsert", [said]),
        fazer("messages.upsert", upsert(said)),
        waha(session.name, "message.any", waha_message(id_)),
        waha(session.name, "message", waha_message(id_, _data=said)),
        [said],
    ]

    ids = deliveries(session, bodies * 5)
    run_all(ids, batch=4)

    assert set(states(ids).values()) == {"done"}
    (row,) = messages(session)
    assert (row["provider_id"], row["direction"], row["type"]) == (id_, "in", "text")
    assert row["body"]["key"] == {"remoteJid": CUSTOMER, "fromMe": False, "id": id_}
    for table in ("contact", "conversation"):
        assert len(session.rows(f"SELECT FROM {table}")) == 1, table
    assert session.rows("SELECT unread_count FROM conversation") == [{"unread_count": 1}]


def test_acks_of_each_scale_raise_the_same_message() -> None:
    session, id_ = a_session(), an_id()
    beside = {"keyId": id_, "remoteJid": CUSTOMER, "fromMe": True}
    key = {"remoteJid": CUSTOMER, "fromMe": True, "id": id_}

    received(session, evolution(session.name, "send.message", message(id_=id_, fromMe=True, status="PENDING")))
    for body, word in (
        (waha(session.name, "message.ack", waha_message(id_, from_me=True, ack=1, ackName="SERVER")), "sent"),
        (fazer("messages.update", [{"key": key, "update": {"status": 3}}]), "delivered"),
        (waha(session.name, "message.ack", waha_message(id_, from_me=True, ack=2, ackName="DEVICE")), "delivered"),
        (evolution(session.name, "messages.update", beside | {"status": "READ"}), "read"),
        (waha(session.name, "message.ack", waha_message(id_, from_me=True, ack=4, ackName="PLAYED")), "played"),
    ):
        received(session, body)
        (row,) = messages(session)
        assert (row["status"], row["direction"]) == (word, "out")


def test_a_file_is_expected_by_its_keys_or_its_link() -> None:
    session = a_session()
    told = {"url": "http://waha:3000/api/files/x.jpeg", "mimetype": "image/jpeg"}

    received(session, evolution_message(session.name, said=media()))
    received(session, waha(session.name, "message", waha_message(an_id(), hasMedia=True, media=told)))

    by_key, by_link = session.rows("SELECT keys, link, kind, state FROM media ORDER BY id")
    names = {"url", "directPath", "mediaKey", "mimetype", "fileSha256", "fileEncSha256", "messageType"}
    assert (set(by_key["keys"]), by_key["link"]) == (names, None)
    assert (by_link["keys"], by_link["link"]) == (None, told["url"])


# -- what could not be decrypted -------------------------------------------------------------------------------------


def test_each_message_counts_once_however_often_it_is_told() -> None:
    session = a_session()
    before = counted("pombal_session_errors_total", **{"class": "ratchet"})
    told = [fazer("messages.upsert", upsert(*sample())), sample(), *sample()]

    ids = received(session, *told)
    run_all(deliveries(session, told * 3), batch=5)

    found = errors(session)
    assert {(row["jid"], row["message_id"]) for row in found} == {
        (one["key"]["remoteJid"], one["key"]["id"]) for one in sample()
    }
    assert len(found) == 9
    causes = sorted(row["cause"] for row in found)
    assert causes == sorted(["ratchet"] * 4 + ["prekey", "no_session", "no_session", "sender_key", "ahead"])
    assert {row["participant"] for row in found} == {"", "5511911110007@s.whatsapp.net"}
    assert {(row["source"], row["channel_id"]) for row in found} == {("webhook", session.channel.id)}
    assert all(row["times"] > 1 for row in found)
    received_at = {delivery(id_).received_at for id_ in ids}
    assert {row["at"] for row in found} <= received_at  # now, and not when the message was written
    assert counted("pombal_session_errors_total", **{"class": "ratchet"}) == before + 4


def test_what_was_not_decrypted_makes_neither_a_contact_nor_a_message_nor_an_event() -> None:
    session = a_session()

    (id_,) = received(session, sample())

    assert delivery(id_).state == "done"
    for table in ("contact", "contact_identity", "conversation", "message", "event", "seen"):
        assert session.rows(f"SELECT FROM {table}") == [], table
    assert letters(id_) == []


def test_what_came_after_all_or_had_come_before_is_healed() -> None:
    session, id_, twice, lost = a_session(), an_id(), an_id(), an_id()

    received(session, evolution_message(session.name, id_=twice))
    received(session, stub(id_=id_), stub("No matching sessions found for message", id_=twice), stub(id_=lost))
    received(session, evolution_message(session.name, id_=id_))
    with db.session([session.tenant.id]) as s:
        healed = SessionError.heal(s, session.tenant.id, session.channel.id)

    assert healed == 2
    found = {row["message_id"]: row["healed_at"] is not None for row in errors(session)}
    assert found == {id_: True, twice: True, lost: False}
    assert [row["provider_id"] for row in messages(session)] == [twice, id_]


@pytest.mark.usefixtures("queues")
def test_what_is_no_failure_counts_for_nothing() -> None:
    session, mega = a_session(), a_gateway()
    said = [{"conversation": text} for text in ("Bad MAC", "Invalid PreKey ID", "failed to decrypt message")]

    (benign, stories, _) = received(
        session,
        [stub("Key used already or never filled"), stub("Message absent from node")],
        stub(remoteJid="status@broadcast", participant=CUSTOMER),
        upsert(*map(message, said)),
    )
    run(of_megaapi(mega, [flat(mega, ..., messageStubType=2, messageStubParameters=["Bad MAC"])]))

    assert errors(session) == []
    assert mega.rows("SELECT FROM session_error") == []
    assert [delivery(one).state for one in (benign, stories)] == ["ignored"] * 2
    assert [row["type"] for row in mega.rows("SELECT type FROM event")] == ["message_undecryptable"]
    assert jobs("session_fixer") == []


def test_the_same_id_in_two_chats_and_of_two_sessions_is_as_many_errors() -> None:
    tenant = a_tenant()
    one, two = a_session(tenant), a_session(tenant)
    told = [stub(id_="SAME"), stub(id_="SAME", remoteJid="77@lid"), stub(id_="SAME", remoteJid=GROUP)]

    received(one, told)
    received(two, told)

    found = errors(one)
    assert len(found) == 6
    assert {row["channel_id"] for row in found} == {one.channel.id, two.channel.id}


def test_bad_bodies_beside_them_take_no_failure_along() -> None:
    session, id_ = a_session(), an_id()
    hostile = [
        b"",
        b"<xml/>",
        encoded(stub())[:-7],
        b"[" * 100_000,
        encoded(stub(id_="x" * 513)),
        encoded(stub("x") | {"key": {}}),
    ]

    ids = received(session, *hostile, stub("x" * 9_000, id_=id_), [7, stub("a\u0000b\ud800", remoteJid=GROUP)])

    assert list(states(ids).values()).count("dead") == len(hostile)
    assert {row["cause"] for row in errors(session)} == {"other"}
    assert len(errors(session)) == 2


def test_a_body_of_another_session_is_foreign_and_counts_nowhere() -> None:
    ours, theirs = a_session(), a_session()
    told = stub()

    (id_,) = received(
        ours,
        [
            evolution(theirs.name, "messages.upsert", told),
            evolution(theirs.name, "connection.update", {"state": "close", "statusReason": 401}),
            evolution(ours.name, "messages.upsert", stub()),
        ],
    )

    assert [row["error"].partition(":")[0] for row in letters(id_)] == ["foreign_id"] * 2
    assert (len(errors(ours)), errors(theirs)) == (1, [])
    assert (ends(ours), ends(theirs)) == ([], [])


def test_a_session_that_is_known_by_its_name_may_be_told_of_by_its_id() -> None:
    session = a_session(dialect="whaticket")
    told = {"event": "messages.upsert", "whatsappId": 26}

    ids = received(
        session,
        told | {"data": upsert(message(id_="A"))},
        told | {"session": session.name, "payload": upsert(message(id_="B"), stub(id_="C"))},
    )

    assert set(states(ids).values()) == {"done"}
    assert {row["provider_id"] for row in messages(session)} == {"A", "B"}
    assert [row["message_id"] for row in errors(session)] == ["C"]


# -- connections and bells -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("queues")
def test_an_end_is_noted_with_its_code_and_believed_by_nobody() -> None:
    session = a_session()
    close = {"instance": session.name, "state": "close", "statusReason": 440}

    received(session, evolution(session.name, "connection.update", close))
    received(session, fazer("connection.update", {"connection": "close", "lastDisconnect": boom(515)}))
    received(session, evolution(session.name, "connection.update", {"state": "open", "statusReason": 200}))

    assert ends(session) == [
        {"code": 440, "source": "webhook", "times": 1},
        {"code": 515, "source": "webhook", "times": 1},
    ]
    (row,) = session.rows("SELECT status, told_at FROM channel")
    assert row["status"] is None
    assert row["told_at"] is not None
    ids = [str(session.channel.id)]
    assert jobs("channel_session") == [("status_check", ids)] * 3
    assert jobs("session_fixer") == [("session_fixer", [str(session.tenant.id), *ids])] * 2
    assert session.rows("SELECT FROM event") == []


@pytest.mark.usefixtures("queues")
def test_the_fixer_is_rung_once_for_each_session_of_a_job() -> None:
    tenant = a_tenant()
    one, two, well = a_session(tenant), a_session(tenant), a_session(tenant)
    ids = [*deliveries(one, [sample(), stub()]), *deliveries(two, [stub()]), *deliveries(well, [message()])]

    run(ids)

    rung = [("session_fixer", [str(tenant.id), str(session.channel.id)]) for session in (one, two)]
    assert jobs("session_fixer") == sorted(rung)


@pytest.mark.usefixtures("queues")
def test_a_poisoned_neighbour_keeps_no_failure_from_being_counted(on_storing: OnStoring) -> None:
    """Bodies that cannot be committed are bisected out; those beside them are written and rung for."""
    session = a_session()
    on_storing("poison", "RAISE EXCEPTION 'refused';")

    ids = received(session, stub(), [message({"conversation": "poison"}), stub(id_="BESIDE")], stub())

    assert [delivery(id_).state for id_ in ids] == ["done", "pending", "done"]
    assert len(errors(session)) == 2
    assert "BESIDE" not in {row["message_id"] for row in errors(session)}
    assert len(jobs("session_fixer")) == 1
