"""What a channel of each kind takes, and how its recipients may be written (megaapi.md, "Sending")."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from models import Channel, Hold, Lane
from pombal.cli import admin
from pombal.ids import uuid7
from tests.factories import Shop, a_shop, rows, seen_by
from tests.web.process import Web
from tests.web.test_messages import TO, Customer, error
from web import kinds
from web.errors import Failure
from web.shapes import TYPES, Ask, asked

LID, GROUP, OLD_GROUP = "123456789012345@lid", "120363000000000001@g.us", "5511999990000-1600000000@g.us"
BSUID = "BR.1A2b3C"
A_CARD = {"name": {"formatted_name": "Bia"}, "phones": [{"phone": "+55 11 94444-0001"}]}
A_FILE = "0190c6a2-0000-7000-8000-000000000001"
CONTENT: dict[str, Any] = {
    "text": "Olá",
    "template": {"name": "hello", "language": "pt_BR"},
    "image": {"media_id": A_FILE},
    "video": {"link": "https://example.com/v.mp4"},
    "audio": {"media_id": A_FILE},
    "document": {"media_id": A_FILE, "filename": "a.pdf"},
    "sticker": {"media_id": A_FILE},
    "location": {"latitude": 1, "longitude": 2},
    "contacts": [A_CARD],
    "reaction": {"message_id": "wamid.1", "emoji": "👍"},
    "interactive": {"type": "request_contact_info", "body": {"text": "?"}, "action": {"name": "request_contact_info"}},
}


def ask(type_: str = "text", content: Any = None, **more: Any) -> Ask:
    given = {"type": type_, "to": TO, type_: content if content is not None else CONTENT[type_]} | more
    return asked(json.dumps({name: value for name, value in given.items() if value is not None}).encode())


def refusal(kind: str, *given: Any, **more: Any) -> Any:
    found = kinds.refusal(kind, ask(*given, **more))
    return found and found.details["field"]


def a_customer(web: Web, kind: str = "megaapi", **config: Any) -> Customer:
    """A tenant whose only channel is of that kind."""
    tenant = admin.add_tenant(f"k{uuid7().hex[-12:]}", "A tenant")
    channel = Channel(tenant_id=tenant.id, id=uuid7(), kind=kind, name="gateway", config=config)
    with seen_by(tenant) as s:
        s.add(channel)
    shop = Shop(tenant, channel, None, None, "", "")  # type: ignore[arg-type] # only Meta's channels have these
    _, key = admin.add_key(tenant.id, "a key", ("messages:send", "messages:read"))
    return Customer(shop, key, web)


def identities(customer: Customer, id_: str) -> set[tuple[str, str]]:
    contact = customer.row(id_)["contact_id"]
    found = rows(customer.shop, "SELECT kind, value FROM contact_identity WHERE contact_id = :id", id=contact)
    return {(row["kind"], row["value"]) for row in found}


def heard(customer: Customer, body: dict[str, Any], *, ago: timedelta = timedelta(0)) -> str:
    """A message that came in, in the conversation of the latest one that went out; the provider's id."""
    sent, id_ = customer.rows()[-1], uuid7()
    given = {"id": id_, "body": json.dumps(body), "wamid": f"3A{id_.hex.upper()}"}
    given |= {name: sent[name] for name in ("tenant_id", "channel_id", "conversation_id", "contact_id")}
    with seen_by(customer.shop) as s:
        s.execute(
            text(
                "INSERT INTO message (tenant_id, id, channel_id, conversation_id, contact_id, direction, type, body,"
                " provider_id, status) VALUES (:tenant_id, :id, :channel_id, :conversation_id, :contact_id, 'in',"
                " 'text', CAST(:body AS jsonb), :wamid, 'received')"
            ),
            given,
        )
        until = datetime.now(UTC) + timedelta(hours=24) - ago
        order = "UPDATE conversation SET window_until = :until WHERE id = :id"
        s.execute(text(order), {"until": until, "id": sent["conversation_id"]})
    return str(given["wamid"])


# --------------------------------------------------------------------------------------------------------- recipients


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        ("5511944440001@s.whatsapp.net", "+5511944440001"),
        ("551194440001@s.whatsapp.net", "+551194440001"),  # as it was registered: without the ninth digit
        (LID, LID),
        (GROUP, GROUP),
        (OLD_GROUP, OLD_GROUP),
    ],
)
def test_a_recipient_may_be_a_jid(given: str, understood: str) -> None:
    assert ask(to=given).recipient == understood


@pytest.mark.parametrize(
    "given",
    [
        "5511944440001:12@s.whatsapp.net",
        "@s.whatsapp.net",
        "55119@s.whatsapp.net",
        "00000000001@s.whatsapp.net",
        "+5511944440001@s.whatsapp.net",
        "abc@lid",
        "@lid",
        "123@lid\n",
        "12345@g.us@g.us",
        "1/2@g.us",
        "١٢٣٤٥٦٧@lid",
        "status@broadcast",
        "120363000000000001@newsletter",
        "5511944440001@c.us",
    ],
)
def test_what_only_looks_like_a_jid_is_refused(given: str) -> None:
    with pytest.raises(Failure) as caught:
        ask(to=given)

    assert caught.value.details["field"] == "$.to"
    assert given.partition("@")[0] not in caught.value.message or given.startswith("@")


@pytest.mark.parametrize(
    ("to", "known"),
    [
        ("5511988880001@s.whatsapp.net", {("phone", "5511988880001"), ("phone", "551188880001")}),
        (LID, {("lid", "123456789012345")}),
        (GROUP, {("group", "120363000000000001")}),
    ],
)
def test_a_jid_belongs_to_whom_webhooks_would_name_so(web: Web, to: str, known: set[tuple[str, str]]) -> None:
    customer = a_customer(web)

    id_ = customer.sent(to=to)

    assert identities(customer, id_) == known
    assert customer.row(id_)["recipient"] == ("+5511988880001" if "s.whatsapp.net" in to else to)


def test_a_jid_and_its_number_are_one_conversation(web: Web) -> None:
    customer = a_customer(web)
    ids = [customer.sent(to="5511944440001@s.whatsapp.net"), customer.sent(to="+5511944440001")]

    assert len({customer.row(id_)["conversation_id"] for id_ in ids}) == 1


def test_a_kind_takes_the_recipients_that_its_provider_knows(web: Web) -> None:
    for to in (LID, GROUP):
        answer = Customer(shop := a_shop(), key_of(shop), web).sends(to=to)
        assert (answer.status_code, error(answer)["details"]["field"]) == (422, "$.to")
    for kind in ("megaapi", "stub"):
        answer = a_customer(web, kind).sends(to=BSUID)
        assert (answer.status_code, error(answer)["details"]["field"]) == (422, "$.to")
    assert refusal("meta", to=BSUID) is None


def key_of(shop: Shop) -> str:
    return admin.add_key(shop.tenant.id, "a key", ("messages:send", "messages:read"))[1]


# --------------------------------------------------------------------------------------------------------------- types


def test_each_kind_takes_its_types() -> None:
    def taken(kind: str) -> set[str]:
        return {type_ for type_ in CONTENT if refusal(kind, type_) is None}

    assert taken("meta") == taken("stub") == set(TYPES) - {"read"}
    assert taken("megaapi") == {"text", "image", "video", "audio", "document", "location", "contacts"}
    assert {refusal("megaapi", type_) for type_ in set(CONTENT) - taken("megaapi")} == {"$.type"}
    assert refusal("carrier-pigeon") == "$.channel"


@pytest.mark.parametrize(
    ("type_", "content", "field"),
    [
        ("image", {"id": "1234"}, "$.image.id"),
        ("audio", {"media_id": A_FILE, "voice": True}, "$.audio.voice"),
        ("contacts", [A_CARD, A_CARD], "$.contacts"),
        ("contacts", [{"name": {"formatted_name": "Bia"}}], "$.contacts[0].phones"),
        ("contacts", [A_CARD | {"phones": [{"type": "HOME"}, {"phone": "1"}]}], "$.contacts[0].phones"),
    ],
)
def test_what_a_gateway_would_leave_out_is_refused_with_its_field(type_: str, content: Any, field: str) -> None:
    assert refusal("megaapi", type_, content) == field
    assert refusal("meta", type_, content) is None
    assert refusal("stub", type_, content) is None


def test_the_field_is_where_the_content_stood() -> None:
    assert refusal("megaapi", "image", None, image=None, media={"id": "1234"}) == "$.media.id"


def test_a_refusal_says_what_would_do(web: Web) -> None:
    answer = a_customer(web).sends(type="sticker", text=None, sticker={"link": "https://example.com/a.webp"})

    assert answer.status_code == 422
    told = error(answer)
    assert told["details"] == {"field": "$.type", "limit": list(kinds._OF_GATEWAYS)}
    assert "sticker" in told["message"]
    assert "megaapi" in told["message"]


# ------------------------------------------------------------------------------------------------------------ messages


def test_only_a_text_may_reply_on_a_gateway(web: Web) -> None:
    customer = a_customer(web)
    customer.sent()
    wamid = heard(customer, {"text": {"body": "Oi"}})

    reply = customer.sent(reply_to=wamid)
    answer = customer.sends(type="location", text=None, location=CONTENT["location"], reply_to=wamid)

    assert customer.row(reply)["body"]["context"] == {"message_id": wamid}
    assert (answer.status_code, error(answer)["details"]["field"]) == (422, "$.reply_to")
    assert refusal("meta", "location", reply_to=wamid) is None


def test_what_was_received_may_be_marked_as_read(web: Web) -> None:
    customer = a_customer(web)
    customer.sent()
    wamid = heard(customer, {"text": {"body": "Oi"}})

    id_ = customer.sent(type="read", to=None, text=None, message_id=wamid)

    assert (customer.row(id_)["recipient"], customer.row(id_)["body"]) == (None, {"read": {"message_id": wamid}})


def test_a_gateway_has_no_window(web: Web) -> None:
    customer = a_customer(web)
    customer.sent()
    heard(customer, {"text": {"body": "Oi"}}, ago=timedelta(days=30))

    assert customer.sends().status_code == 202


def test_a_message_of_a_disconnected_channel_waits_and_says_so(web: Web) -> None:
    customer = a_customer(web)
    id_ = customer.sent()
    assert customer.looks(id_)["waiting"]["reason"] == "line"

    with seen_by(customer.shop) as s:
        Lane.set_hold(s, UUID(str(customer.shop.channel.id)), Hold.DISCONNECTED, code="disconnected", reason="not here")

    waiting = customer.looks(id_)["waiting"]
    assert (waiting["reason"], waiting["hold"], waiting["code"]) == ("hold", "disconnected", "disconnected")
    assert (waiting["next_probe_at"], bool(waiting["since"])) == (None, True)  # nothing probes it


@pytest.mark.parametrize(
    ("gateway", "given", "field"),
    [
        ("evolution", ask("image", {"link": "https://example.com/a.png", "caption": "x"}), None),
        ("whaticket", ask("image", {"link": "https://example.com/a.png"}), "$.image.link"),
        ("ticketz", ask("image", {"media_id": A_FILE, "caption": "x"}), "$.image.caption"),
        ("whaticket", ask(to=GROUP), "$.to"),
        ("ticketz", ask(to=GROUP), None),
        ("fazer", ask("location"), "$.type"),
        ("waha", ask("contacts", reply_to="wamid.1"), "$.reply_to"),
        ("evolution", ask("contacts", reply_to="wamid.1"), None),
        ("", ask(), "$.channel"),
    ],
)
def test_a_baileys_gateway_takes_what_its_dialect_has_calls_for(gateway: str, given: Ask, field: str | None) -> None:
    found = kinds.refusal("baileys", given, gateway)

    assert (found and found.details["field"]) == field
