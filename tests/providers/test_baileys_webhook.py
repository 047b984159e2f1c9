"""What the webhook bodies of Baileys gateways turn into, in every dialect (baileys-sessions.md §1, §5, §6)."""

import copy
import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pombal.errors import Rejected
from providers.baileys_webhook import parse
from providers.inbound import (
    Change,
    Connection,
    Ended,
    File,
    Message,
    Notice,
    Parsed,
    Person,
    Reject,
    Status,
    Undecrypted,
)
from providers.undecrypted import Cause
from sandbox import baileys_words as words
from tests.baileys import (
    boom,
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
from tests.gateways import AT, CUSTOMER, encoded, media

NOW = datetime(2026, 9, 1, 12, 0, tzinfo=UTC)
SENT = datetime.fromtimestamp(AT, UTC)
NAME = "loja"
GROUP = "120363000000000001@g.us"
BIA = Person((("phone", "5511944440001"),), "Bia", (("jid", "5511944440001"),))
WAHAS_ID = "false_5511944440001@c.us_A"
UNHEARD = Person(BIA.identities)
KEY = {"remoteJid": CUSTOMER, "fromMe": False, "id": "A"}
OURS = KEY | {"fromMe": True}


def read(body: Any) -> Parsed:
    return parse(encoded(body), NOW)


def items(body: Any) -> list[Any]:
    parsed = read(body)
    assert (parsed.rejects, parsed.ignored) == ([], None)
    return [item for change in parsed.changes for item in change.items]


def only(body: Any) -> Any:
    (item,) = items(body)
    return item


# -- messages --------------------------------------------------------------------------------------------------------

PLAIN = message(id_="A")
SHAPES: dict[str, tuple[Any, str, str | None]] = {
    "Evolution": (evolution_message(NAME, id_="A"), "$.data", NAME),
    "Evolution, a list": (evolution(NAME, "messages.upsert", [PLAIN]), "$.data[0]", NAME),
    "Evolution, Baileys' own": (evolution(NAME, "MESSAGES_UPSERT", upsert(PLAIN)), "$.data.messages[0]", NAME),
    "Evolution, by events": (evolution(NAME, "messages-upsert", PLAIN), "$.data", NAME),
    "WAHA": (waha(NAME, "message", waha_message()), "$", NAME),
    "WAHA, any": (waha(NAME, "message.any", waha_message()), "$", NAME),
    "WAHA, with the original": (waha(NAME, "message", waha_message(_data=PLAIN)), "$", NAME),
    "fazer-ai": (fazer("messages.upsert", upsert(PLAIN)), "$.data.messages[0]", None),
    "plain": (upsert(PLAIN), "$.messages[0]", None),
    "a list": ([PLAIN], "$[0]", None),
    "one": (PLAIN, "$", None),
    "a session's id": (
        {"event": "messages.upsert", "whatsappId": 26, "data": upsert(PLAIN)},
        "$.data.messages[0]",
        None,
    ),
    "in `message`": ({"whatsappId": 26, "companyId": 1, "message": PLAIN}, "$.message", None),
    "in `msg`": ({"whatsappId": "26", "type": "chat", "msg": PLAIN}, "$.msg", None),
    "a session's name and its id": (
        {"event": "messages.upsert", "session": NAME, "whatsappId": 26, "data": upsert(PLAIN)},
        "$.data.messages[0]",
        NAME,
    ),
    "in `payload`, Baileys' own": (
        {"event": "messages.upsert", "whatsappId": 26, "payload": upsert(PLAIN)},
        "$.payload.messages[0]",
        None,
    ),
    "in `data` of `payload`": (
        {"event": "MESSAGES_UPSERT", "session": NAME, "payload": {"data": PLAIN}},
        "$.payload.data",
        NAME,
    ),
    "in `message` of `payload`": (
        {"event": "messages.upsert", "session": NAME, "payload": {"message": PLAIN}},
        "$.payload.message",
        NAME,
    ),
    "WAHA, its ids objects": (waha(NAME, "message", waha_message() | {"id": {"_serialized": WAHAS_ID}}), "$", NAME),
    "in `payload`": ({"event": "messages.upsert", "session": NAME, "payload": PLAIN}, "$.payload", NAME),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_message(shape: str) -> None:
    body, path, name = SHAPES[shape]

    assert read(body) == Parsed(
        [
            Change(
                path,
                name,
                None,
                [
                    Message(
                        path=path,
                        provider_id="A",
                        direction="in",
                        type="text",
                        body={"text": {"body": "Bom dia"}, "key": KEY},
                        person=BIA,
                        chat=BIA,
                        at=SENT,
                    )
                ],
            )
        ],
        [],
    )


@pytest.mark.parametrize(
    "body",
    [
        evolution(NAME, "send.message", message(id_="A", fromMe=True, status="PENDING")),
        waha(NAME, "message.any", waha_message(from_me=True)),
        fazer("messages.upsert", {"messages": [message(id_="A", fromMe=True)], "type": "append"}),
    ],
)
def test_what_left_from_our_number_may_be_ours(body: Any) -> None:
    made = only(body)

    assert (made.provider_id, made.direction, made.may_be_ours, made.chat) == ("A", "out", True, UNHEARD)


def test_somebody_by_lid_is_known_by_the_phone_beside_it() -> None:
    made = only(upsert(message(remoteJid="77@lid", remoteJidAlt=CUSTOMER)))

    assert made.person.identities == (("lid", "77"), ("phone", "5511944440001"))


def test_a_file_comes_with_all_that_opens_it() -> None:
    said = media("document", fileName="nf.pdf")
    given = said["documentMessage"]

    made = only(upsert(message(said)))

    names = ("url", "directPath", "mediaKey", "mimetype", "fileSha256", "fileEncSha256")
    assert made.file.keys == {name: given[name] for name in names} | {"messageType": "document"}
    assert (made.file.sha256, made.file.filename, made.file.link) == (given["fileSha256"], "nf.pdf", None)
    for wrapped in (
        {"documentWithCaptionMessage": {"message": said}},
        {"protocolMessage": {"key": {"id": "OLD"}, "type": 14, "editedMessage": said}},
    ):
        assert only(upsert(message(wrapped))).file == made.file


def test_bytes_as_javascript_spells_them_are_base64() -> None:
    raw = bytes(range(32))
    said = media(
        mediaKey={"type": "Buffer", "data": list(raw)}, fileEncSha256={str(n): one for n, one in enumerate(raw)}
    )

    keys = only(fazer("messages.upsert", upsert(message(said)))).file.keys

    assert keys["mediaKey"] == keys["fileEncSha256"] == "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


def test_a_file_inside_of_a_body_is_not_kept() -> None:
    made = only(evolution_message(NAME, said=media() | {"base64": "aGVsbG8=" * 9_000}))

    assert made.file.keys["messageType"] == "image"
    assert "aGVsbG8" not in str(made)


# -- WAHA's own fields -----------------------------------------------------------------------------------------------


def test_a_file_of_waha_is_fetched_by_its_keys_and_else_by_a_link() -> None:
    link = "http://waha:3000/api/files/loja/A.jpeg"
    told = {"url": link, "mimetype": "image/jpeg", "filename": None}

    bare = only(waha(NAME, "message", waha_message(body="nota", hasMedia=True, media=told)))
    full = only(waha(NAME, "message", waha_message(hasMedia=True, media=told, _data=message(media("video"), id_="A"))))
    without = only(waha(NAME, "message", waha_message(hasMedia=True, media=None, _data=message(media(), id_="A"))))

    assert (bare.type, bare.body["image"]) == ("image", {"caption": "nota", "mime_type": "image/jpeg"})
    assert bare.file == File(None, "image", "image/jpeg", link=link)
    assert full.file == only(message(media("video"))).file
    assert (full.file.link, full.file.keys["messageType"]) == (None, "video")
    original = message(media("video", mediaKey=None), id_="A")
    keyless = only(waha(NAME, "message", waha_message(hasMedia=True, media=told, _data=original)))
    assert (keyless.file.kind, keyless.file.link, keyless.file.keys) == ("video", link, None)
    assert (without.file.link, without.file.keys["messageType"]) == (None, "image")


@pytest.mark.parametrize("url", [None, 7, "", "file:///etc/passwd", "http://" + "x" * 3_000])
def test_what_is_no_link_costs_the_file_and_not_the_message(url: Any) -> None:
    made = only(waha(NAME, "message", waha_message(hasMedia=True, media={"url": url, "mimetype": "audio/ogg"})))

    assert (made.type, made.file) == ("audio", None)


@pytest.mark.parametrize(
    ("fields", "type_", "body"),
    [
        (
            {"location": {"latitude": "-27.5", "longitude": 2, "description": "Loja"}},
            "location",
            {"latitude": -27.5, "longitude": 2, "name": "Loja"},
        ),
        ({"vCards": ["BEGIN:VCARD\nTEL:190\nEND:VCARD"]}, "contacts", ...),
        ({"hasMedia": True, "body": None, "media": {"mimetype": "application/pdf"}}, "document", ...),
        ({"hasMedia": True, "media": {"mimetype": "audio/ogg; codecs=opus"}, "_data": {"type": "ptt"}}, "voice", ...),
        ({"hasMedia": True, "media": {"mimetype": "image/webp"}, "_data": {"type": "sticker"}}, "sticker", ...),
    ],
)
def test_kinds_of_waha_are_told_by_what_is_there(fields: Any, type_: str, body: Any) -> None:
    made = only(waha(NAME, "message", waha_message(**fields)))

    assert made.type == type_
    assert body is ... or made.body[type_] == body


def test_answers_and_reactions_of_waha_name_the_message_by_its_bare_id() -> None:
    target = "false_5511944440001@c.us_OLD"
    reply = only(waha(NAME, "message", waha_message(replyTo={"id": target, "participant": "5511955550300@c.us"})))
    reaction = only(
        waha(NAME, "message.reaction", waha_message(body=..., reaction={"text": "👍", "messageId": target}))
    )
    raw = {"fromMe": False, "remote": "5511944440001@c.us", "id": "OLD", "_serialized": target}
    with_objects = waha_message(body=..., reaction={"text": "👍", "messageId": raw}) | {"id": {"_serialized": WAHAS_ID}}

    assert reply.body["context"] == {"id": "OLD", "from": "5511955550300"}
    assert reaction.body["reaction"] == {"message_id": "OLD", "emoji": "👍"}
    assert only(waha(NAME, "message.reaction", with_objects)) == reaction
    assert only(waha(NAME, "message", waha_message(replyTo={"id": raw}))).body["context"] == {"id": "OLD"}


@pytest.mark.parametrize("id_", [None, "", {}, {"_serialized": None}, {"id": "A"}, {"_serialized": 7.5}, [WAHAS_ID]])
def test_a_message_of_waha_without_an_id_is_rejected(id_: Any) -> None:
    assert [one.path for one in read([waha(NAME, "message", waha_message() | {"id": id_})]).rejects] == ["$[0]"]


def test_a_group_of_waha_has_members() -> None:
    made = only(waha(NAME, "message", waha_message() | {"id": f"false_{GROUP}_A_5511944440001@c.us", "from": GROUP}))

    assert (made.provider_id, made.chat.identities) == ("A", (("group", "120363000000000001"),))
    assert made.person == BIA


# -- acks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "word"), [(0, "failed"), (2, "sent"), (3, "delivered"), (4, "read"), (5, "played"), ("READ", "read")]
)
def test_acks_of_baileys(number: Any, word: str) -> None:
    beside = {"keyId": "A", "remoteJid": CUSTOMER, "fromMe": True, "participant": None, "status": number}
    for body in (
        evolution(NAME, "messages.update", beside | {"messageId": "of-its-database", "instanceId": "i"}),
        fazer("messages.update", [{"key": OURS, "update": {"status": number}}]),
        {"event": "messages.update", "whatsappId": 26, "data": [{"key": OURS, "update": {"status": number}}]},
    ):
        made = only(body)
        assert (type(made), made.provider_id, made.status, made.at, made.chat) == (Status, "A", word, NOW, UNHEARD)


@pytest.mark.parametrize(
    ("number", "name", "word"),
    [
        (-1, "ERROR", "failed"),
        (1, "SERVER", "sent"),
        (2, "DEVICE", "delivered"),
        (3, "READ", "read"),
        (4, "PLAYED", "played"),
        (3, ..., "read"),
        (..., "DEVICE", "delivered"),
        (9, "TELEPORTED", "teleported"),
    ],
)
def test_acks_of_waha_are_on_a_scale_of_its_own(number: Any, name: Any, word: str) -> None:
    payload = waha_message(from_me=True, body=..., hasMedia=..., ack=number, ackName=name)

    made = only(waha(NAME, "message.ack", payload))

    assert (type(made), made.provider_id, made.status, made.chat) == (Status, "A", word, UNHEARD)


@pytest.mark.parametrize(
    "body",
    [
        fazer("messages.update", [{"key": OURS, "update": {"status": 1}}]),
        waha(NAME, "message.ack", waha_message(from_me=True, ack=0, ackName="PENDING")),
        waha(NAME, "message.ack", waha_message(from_me=True, ack=None, ackName="UNKNOWN")),
        fazer("message-receipt.update", [{"key": OURS, "receipt": {"userJid": CUSTOMER}}]),
    ],
)
def test_an_ack_that_says_nothing_yet_is_ignored(body: Any) -> None:
    assert read(body) == Parsed([], [], ignored="nothing has become of it yet")


@pytest.mark.parametrize(
    ("receipt", "word"),
    [
        ({"receiptTimestamp": AT}, "delivered"),
        ({"readTimestamp": str(AT)}, "read"),
        ({"playedTimestamp": AT, "readTimestamp": 1}, "played"),
    ],
)
def test_receipts_in_groups_name_the_member_and_its_time(receipt: Any, word: str) -> None:
    key = OURS | {"remoteJid": GROUP}
    given = {"userJid": "5511944440001:3@s.whatsapp.net"} | receipt

    made = only(fazer("message-receipt.update", [{"key": key, "receipt": given}]))

    assert (made.status, made.participant, made.at) == (word, "5511944440001", SENT)


# -- what could not be decrypted -------------------------------------------------------------------------------------


def test_the_sample_is_nine_messages_that_could_not_be_decrypted() -> None:
    found = items(evolution(NAME, "messages.upsert", upsert(*sample())))

    assert [type(one) for one in found] == [Undecrypted] * 9
    assert [one.cause for one in found] == [
        Cause.RATCHET,
        Cause.PREKEY,
        Cause.NO_SESSION,
        Cause.RATCHET,
        Cause.RATCHET,
        Cause.SENDER_KEY,
        Cause.NO_SESSION,
        Cause.RATCHET,
        Cause.AHEAD,
    ]
    assert {one.at for one in found} == {NOW}
    assert [one.message_id for one in found] == [one["key"]["id"] for one in sample()]
    assert [one.jid for one in found] == [one["key"]["remoteJid"] for one in sample()]
    in_group, by_lid = found[5], found[6]
    assert in_group.participant == "5511911110007@s.whatsapp.net"
    assert in_group.person.identities == (("phone", "5511911110007"),)
    assert {one.participant for one in found if one is not in_group} == {""}
    assert by_lid.person.identities == (("lid", "277000000000008"), ("phone", "5511911110008"))


@pytest.mark.parametrize(
    "body",
    [
        stub(id_="A"),
        stub(id_="A", messageTimestamp=1),
        stub(id_="A") | {"messageStubType": "CIPHERTEXT"},
        stub(id_="A") | {"message": None},
        stub(id_="A") | {"message": {"senderKeyDistributionMessage": {"groupId": GROUP}}},
        upsert(stub(id_="A")),
        [stub(id_="A")],
        fazer("messages.upsert", upsert(stub(id_="A"))),
        stub(id_="A", remoteJid="5511944440001:7@s.whatsapp.net"),
        waha(NAME, "message", waha_message(_data=stub(id_="A"))),
        waha(NAME, "message.waiting", waha_message(_data=stub(id_="A"))),
    ],
)
def test_one_message_has_one_spelling_in_every_shape(body: Any) -> None:
    made = only(body)

    assert (made.jid, made.message_id, made.participant) == (CUSTOMER, "A", "")
    assert (made.cause, made.at, made.person) == (Cause.NO_SESSION, NOW, BIA)


@pytest.mark.parametrize(
    "body", [stub(None), stub("Novel trouble"), waha(NAME, "message.waiting", waha_message(body=""))]
)
def test_a_text_that_nobody_has_seen_counts_all_the_same(body: Any) -> None:
    assert only(body).cause == Cause.OTHER


@pytest.mark.parametrize("text", ["Key used already or never filled", "Message absent from node"])
def test_what_loses_no_message_is_ignored(text: str) -> None:
    assert read(stub(text)) == Parsed([], [], ignored="delivered twice, or nothing to decrypt")
    assert len(items([stub(text), PLAIN])) == 1


@pytest.mark.parametrize("remote", ["status@broadcast", "120363000000000001@newsletter"])
def test_stories_that_cannot_be_decrypted_are_nobodys_messages(remote: str) -> None:
    assert read(stub(remoteJid=remote, participant=CUSTOMER)).changes == []


def test_one_that_another_device_of_ours_wrote_is_of_that_device_in_every_chat() -> None:
    made = only(stub(fromMe=True, id_="A"))
    in_group = only(stub(fromMe=True, id_="A", remoteJid=GROUP, participant="5511955550300@s.whatsapp.net"))

    assert (made.jid, made.message_id, made.participant, made.person) == (CUSTOMER, "A", "me", UNHEARD)
    assert (in_group.jid, in_group.participant) == (GROUP, "me")


def test_one_that_a_gateway_wraps_in_a_payload_is_not_lost() -> None:
    made = only({"event": "messages.upsert", "whatsappId": 26, "payload": upsert(stub(id_="A"))})

    assert (made.path, made.message_id, made.cause) == ("$.payload.messages[0]", "A", Cause.NO_SESSION)


def test_what_came_decrypted_after_all_is_a_message() -> None:
    again = {"key": KEY, "update": {"message": {"conversation": "Bom dia"}, "messageTimestamp": AT, "pushName": "Bia"}}
    edit = {"key": KEY, "update": {"message": {"editedMessage": {"message": {"conversation": "x"}}}}}

    assert only(fazer("messages.update", [again])) == msgspec.structs.replace(only(PLAIN), path="$.data[0]")
    assert isinstance(only(fazer("messages.update", [edit])), Notice)
    assert isinstance(only(stub() | {"message": {"conversation": "oi"}}), Message)


def test_people_who_write_about_it_are_heard_and_not_counted() -> None:
    for text in ("Bad MAC", "failed to decrypt message", "Invalid PreKey ID", '"messageStubType":2'):
        assert only(upsert(message({"conversation": text}))).body["text"] == {"body": text}


# -- connections -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "word", "code"),
    [
        (evolution(NAME, "connection.update", {"instance": NAME, "state": "open", "statusReason": 200}), "open", None),
        (evolution(NAME, "connection.update", {"instance": NAME, "state": "close", "statusReason": 440}), "close", 440),
        (evolution(NAME, "CONNECTION_UPDATE", {"state": "connecting", "statusReason": 428}), "connecting", None),
        (evolution(NAME, "connection.update", {"state": "refused", "statusReason": 428}), "refused", None),
        (evolution(NAME, "connection.update", {"state": "close", "statusReason": 200}), "close", None),
        (evolution(NAME, "status.instance", {"status": "closed", "disconnectionReasonCode": 401}), "closed", 401),
        (evolution(NAME, "qrcode.updated", {"qrcode": {"code": "2@s", "base64": "x"}}), "qrcode.updated", None),
        (waha(NAME, "session.status", {"name": NAME, "status": "SCAN_QR_CODE"}), "scan_qr_code", None),
        (waha(NAME, "session.status", {"name": NAME, "status": "FAILED"}), "failed", None),
        (fazer("connection.update", {"connection": "close", "lastDisconnect": boom(515)}), "close", 515),
        (fazer("connection.update", {"connection": "open", "epoch": 4}), "open", None),
        (fazer("connection.update", {"qrDataUrl": "data:image/png;base64,xx"}), "connection.update", None),
        (
            fazer("connection.update", {"error": "reconnect_loop_detected", "quarantine": {"strikes": 2, "until": 9}}),
            "reconnect_loop_detected",
            None,
        ),
        ({"connection": "close", "lastDisconnect": boom(428)}, "close", 428),
        ({"connection": "close", "lastDisconnect": boom(0)}, "close", None),
        ({"connection": "close", "lastDisconnect": {"error": {"output": {"statusCode": "401"}}}}, "close", None),
        (
            {"event": "connection.update", "whatsappId": 26, "data": {"qr": "2@secretOfTheCode"}},
            "connection.update",
            None,
        ),
    ],
)
def test_a_connection_event_is_a_word_and_the_code_of_its_end(body: Any, word: str, code: int | None) -> None:
    connection, *ended = items(body)

    assert isinstance(connection, Connection)
    assert connection.word == word
    assert ended == ([Ended(connection.path, code, NOW)] if code else [])
    assert "secret" not in str(connection)


# -- all else --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    ["presence.update", "CONTACTS_UPSERT", "chats.update", "messages.set", "messaging-history.set", "labels.edit"],
)
def test_what_the_phone_knows_besides_is_ignored(event: str) -> None:
    assert read(evolution(NAME, event, [PLAIN, {"id": CUSTOMER}])).ignored is not None


@pytest.mark.parametrize(
    ("body", "type_"),
    [
        (evolution(NAME, "groups.upsert", {"id": GROUP, "apikey": "secret"}), "gateway_groups.upsert"),
        (evolution(NAME, "messages.edited", {"key": KEY, "type": 14, "editedMessage": {"conversation": "x"}}), ...),
        (waha(NAME, "call.received", {"id": "x", "from": CUSTOMER, "token": "secret"}), "gateway_call.received"),
        (evolution(NAME, "call", {"id": "x", "status": "offer", "pairingCode": "secret"}), "gateway_call"),
    ],
)
def test_whatever_else_is_kept_as_a_notice_without_secrets(body: Any, type_: Any) -> None:
    made = only(body)

    assert isinstance(made, Notice)
    assert made.type == ("gateway_messages.edited" if type_ is ... else type_)
    for word in ("secret", "the-gateways-own-key", "gateway:8080", "our-own-proof"):
        assert word not in str(made.payload)


def test_a_bad_element_is_rejected_alone() -> None:
    bodies = [PLAIN, 7, {}, message(remoteJid="x@y"), stub(id_="x" * 513), {"key": {}}, PLAIN]

    parsed = read(fazer("messages.upsert", {"messages": bodies, "type": "notify"}))

    assert [change.path for change in parsed.changes] == [f"$.data.messages[{n}]" for n in (0, 2, 6)]
    assert parsed.rejects == [
        Reject("$.data.messages[1]", "not an object"),
        Reject("$.data.messages[3]", "unknown kind of address"),
        Reject("$.data.messages[4]", "id too long"),
        Reject("$.data.messages[5]", "no id"),
    ]


# -- hostile ---------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
BODIES = [
    *(body for body, _, _ in SHAPES.values()),
    evolution(NAME, "messages.update", {"keyId": "A", "remoteJid": CUSTOMER, "fromMe": True, "status": "READ"}),
    evolution(NAME, "connection.update", {"instance": NAME, "state": "close", "statusReason": 440}),
    fazer("messages.upsert", upsert(message(media("audio", ptt=True), remoteJid=GROUP, participant=CUSTOMER))),
    fazer("messages.upsert", upsert(*sample()[5:7])),
    fazer("messages.update", [{"key": KEY, "update": {"message": {"conversation": "x"}, "status": 3}}]),
    fazer("message-receipt.update", [{"key": OURS, "receipt": {"userJid": CUSTOMER, "readTimestamp": AT}}]),
    fazer("connection.update", {"connection": "close", "lastDisconnect": boom(515)}),
    waha(NAME, "message", waha_message(hasMedia=True, media={"url": "http://x/y", "mimetype": "a/b", "filename": "c"})),
    waha(NAME, "message", waha_message(location={"latitude": "1", "longitude": 2}, vCards=["x"], replyTo={"id": "A"})),
    waha(NAME, "message.reaction", waha_message(reaction={"text": "y", "messageId": "A"})),
    waha(NAME, "message.ack", waha_message(from_me=True)),
    waha(NAME, "message.waiting", waha_message(_data=stub())),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, one in inner:
        found += places(one, (*path, name))
    return found


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_anything_anywhere_in_a_body_is_parsed_or_rejected(data: st.DataObject) -> None:
    body = [copy.deepcopy(data.draw(st.sampled_from(BODIES)))]
    *parents, last = data.draw(st.sampled_from(places(body)[1:]))
    holder: Any = body
    for name in parents:
        holder = holder[name]
    holder[last] = data.draw(JSON)

    try:
        parsed = parse(encoded(body), NOW)
    except Rejected:
        return

    for change in parsed.changes:
        encoded([(getattr(item, "body", None) or getattr(item, "payload", None)) for item in change.items])
        assert all(item.path.startswith("$[0]") for item in change.items)
        assert all(item.at == NOW for item in change.items if isinstance(item, Undecrypted | Ended))
    for reject in parsed.rejects:
        assert reject.path.startswith("$[0]")
        assert len(reject.reason) < 100


@pytest.mark.parametrize(
    "raw", [b"", b"<html>", b"42", b"[" * 100_000, b'{"key":NaN}', b'{"a":"\xff"}', encoded(PLAIN)[:-9]]
)
def test_what_is_no_json_is_rejected(raw: bytes) -> None:
    with pytest.raises(Rejected):
        parse(raw, NOW)


# -- what the sandbox sends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["whaticket", "ticketz", "evolution", "waha", "fazer"])
def test_every_dialect_of_the_sandbox_is_understood(dialect: Any) -> None:
    session = "26" if dialect in ("whaticket", "ticketz") else NAME
    who = words.Who(dialect, session, "Loja", "5511955550300", "its-key", "http://x/?token=t", "v")
    ours = OURS | {"id": "B"}
    names = {session} if dialect in ("evolution", "waha") else {None}

    def said(bodies: Any) -> list[Any]:
        bodies = [json.loads(json.dumps(body)) for body in bodies]
        assert {change.number for body in bodies for change in read(body).changes} <= names
        return [item for body in bodies for item in items(body)]

    (text,) = said(words.upsert(who, words.message(KEY, {"conversation": "oi"}, AT, "Bia")))
    (file,) = said(words.upsert(who, words.message(KEY, media(), AT, "Bia"), media_url="http://x/y"))
    lost = said(words.upsert(who, words.message(KEY, None, AT, "Bia", "Invalid PreKey ID")))
    became = [said(words.update(who, ours, number)) for number in (2, 3, 4, 5)]
    ended = said(words.connection(who, "closed", words.Ending(401, True), None))
    opened = said(words.connection(who, "open", None, None))
    asking = said(words.connection(who, "qr", None, ("2@secret", "data:image/png;base64,secret")))

    assert (text.body["text"]["body"], text.person, text.chat) == ("oi", BIA, BIA)
    assert (file.type, file.file.link, file.file.keys["messageType"]) == ("image", None, "image")
    assert [one.cause for one in lost] == ([] if dialect in ("evolution", "waha") else [Cause.PREKEY])
    assert [one.status for (one,) in became] == ["sent", "delivered", "read", "played"]
    assert {one.code for one in ended if isinstance(one, Ended)} == (set() if dialect == "waha" else {401})
    assert {type(one) for one in opened + asking} == {Connection}
    assert "secret" not in str(asking)
