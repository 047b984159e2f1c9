"""What MegaAPI's webhook bodies turn into. The samples are those of megaapi.md and baileys-sessions.md."""

import copy
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pombal.errors import Rejected
from providers.inbound import Change, Connection, Message, Notice, Parsed, Person, Reject, Status
from providers.megaapi_webhook import parse
from sandbox import files
from sandbox import megaapi_words as words
from sandbox.megaapi_files import MegaFiles
from sandbox.megaapi_instances import Instance
from tests.gateways import AT, CUSTOMER, ack, connection, encoded, flat, media

NOW = datetime(2026, 9, 1, 12, 0, tzinfo=UTC)
SENT = datetime.fromtimestamp(AT, UTC)
KEY = "megacode-EXEMPLO"
GROUP = "120363000000000001@g.us"
BIA = Person((("phone", "5511944440001"),), "Bia", (("jid", "5511944440001"),))
BIA_UNHEARD = Person(BIA.identities)  # as somebody is known to whom we wrote
SAMPLE = json.loads("""
    {"instance_key":"megacode-EXEMPLO","jid":"5511900000001@s.whatsapp.net","messageType":"conversation",
     "key":{"remoteJid":"5511900000002@s.whatsapp.net","fromMe":false,"id":"00AA11BB22CC33DD44EE55FF66778899"},
     "messageTimestamp":1745279950,"pushName":"Cliente","broadcast":false,
     "message":{"conversation":"texto","messageContextInfo":{"deviceListMetadata":{},"deviceListMetadataVersion":2}},
     "isGroup":false}
""")


def read(body: Any) -> Parsed:
    return parse(encoded(body), NOW)


def only(body: Any) -> Any:
    parsed = read(body)
    assert (parsed.rejects, parsed.ignored) == ([], None)
    (change,) = parsed.changes
    (item,) = change.items
    return item


def message(*args: Any, **fields: Any) -> Message:
    item = only(flat(KEY, *args, **fields))
    assert isinstance(item, Message)
    return item


# -- envelopes -------------------------------------------------------------------------------------------------------


def test_the_sample_of_the_sheet_is_one_message_of_one_instance() -> None:
    person = Person((("phone", "5511900000002"),), "Cliente", (("jid", "5511900000002"),))

    assert read(SAMPLE) == Parsed(
        [
            Change(
                "$",
                KEY,
                None,
                [
                    Message(
                        path="$",
                        provider_id="00AA11BB22CC33DD44EE55FF66778899",
                        direction="in",
                        type="text",
                        body={
                            "text": {"body": "texto"},
                            "key": {
                                "remoteJid": "5511900000002@s.whatsapp.net",
                                "fromMe": False,
                                "id": "00AA11BB22CC33DD44EE55FF66778899",
                            },
                        },
                        person=person,
                        chat=person,
                        at=datetime.fromtimestamp(1745279950, UTC),
                    )
                ],
            )
        ],
        [],
    )


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda body: [body], "$[0]"),
        (lambda body: {"instanceKey": KEY, "event": "message", "data": body}, "$.data"),
        (lambda body: {"instance": KEY, "event": "messages.upsert", "data": [body]}, "$.data[0]"),
        (lambda body: {"instance": {"key": KEY}, "data": {"messages": [body], "type": "notify"}}, "$.data.messages[0]"),
        (lambda body: {"instance_key": KEY, "messages": [body]}, "$.messages[0]"),
        (lambda body: [{"instance_key": KEY, "data": {"messages": [body]}}], "$[0].data.messages[0]"),
    ],
)
def test_a_wrapped_body_is_the_same_message(wrap: Any, path: str) -> None:
    body = flat(KEY, id_="A")

    (change,) = read(wrap(body)).changes

    assert (change.path, change.number) == (path, KEY)
    assert change.items[0].path == path
    assert isinstance(change.items[0], Message)
    assert change.items[0].body == message(id_="A").body


def test_the_instance_of_a_wrapper_is_that_of_what_is_in_it() -> None:
    body = flat(KEY, instance_key=..., jid=...)

    assert read({"instanceKey": KEY, "data": body}).changes[0].number == KEY
    assert read(body).changes[0].number is None


def test_a_body_that_names_two_instances_is_rejected() -> None:
    with pytest.raises(Rejected, match="several instances"):
        read({"instanceKey": "another", "data": flat(KEY)})

    assert read([{"instanceKey": "another", "data": flat(KEY)}]).rejects == [Reject("$[0]", "several instances named")]


def test_a_bad_element_is_rejected_alone() -> None:
    bodies = [flat(KEY), 7, {}, flat(KEY, remoteJid="x@y"), flat(KEY, id_="x" * 513), flat(KEY, key={}), flat(KEY)]

    parsed = read(bodies)

    assert [change.path for change in parsed.changes] == ["$[0]", "$[6]"]
    assert parsed.rejects == [
        Reject("$[1]", "not an object"),
        Reject("$[2]", "neither a message nor an event"),
        Reject("$[3]", "unknown kind of address"),
        Reject("$[4]", "id too long"),
        Reject("$[5]", "no id"),
    ]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not JSON"),
        (b"<html>", "not JSON"),
        (encoded(SAMPLE)[:-9], "not JSON"),
        (b'{"a":"\xff\xfe"}', "not UTF-8"),
        (encoded(SAMPLE).decode().encode("utf-16"), "not JSON"),
        (b"42", "neither an object nor a list"),
        (b"null", "neither an object nor a list"),
        (b'"x"', "neither an object nor a list"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"key":' + b"9" * 100_000 + b"}", "number out of range"),
        (b'{"key":NaN}', "not JSON"),
        (b'{"key":1e999}', "number out of range"),
        (b"{}", "neither a message nor an event"),
        (b'{"key":[],"message":7}', "neither a message nor an event"),
        (b'{"instance_key":[],"key":{}}', "instance_key is not text"),
        (encoded(flat(KEY, {"x": json.loads("[" * 70 + "]" * 70)})), "nested too deeply"),
        (encoded({"data": {"data": {"data": {"data": {"data": {"data": SAMPLE}}}}}}), "wrapped too often"),
    ],
)
def test_a_body_that_says_nothing_readable_is_rejected(raw: bytes, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        parse(raw, NOW)


def test_data_beside_messages_hides_none_of_them() -> None:
    both = {"instance_key": KEY, "event": "messages.upsert", "data": {"foo": 1}, "messages": [flat(KEY), flat(KEY)]}

    assert [type(change.items[0]) for change in read(both).changes] == [Notice, Message, Message]
    del both["event"]
    parsed = read(both | {"data": {"foo": 1}})
    assert [change.path for change in parsed.changes] == ["$.messages[0]", "$.messages[1]"]
    assert parsed.rejects == [Reject("$.data", "neither a message nor an event")]
    for data in ([flat(KEY)], {"messages": [flat(KEY)]}, flat(KEY)):
        assert len(read(both | {"data": data}).changes) == 3


def test_only_the_first_rejects_are_told_apart_and_the_rest_are_counted() -> None:
    parsed = parse(b"[" + b"{}," * 100_000 + encoded(flat(KEY)) + b"]", NOW)

    assert [change.path for change in parsed.changes] == ["$[100000]"]
    assert [one.path for one in parsed.rejects[:100]] == [f"$[{n}]" for n in range(100)]
    assert parsed.rejects[100:] == [Reject("$", "99900 more like these")]
    for number in (100, 101):
        rejects = read({"messages": [7] * number}).rejects
        assert len(rejects) == number
        assert rejects[99] == Reject("$.messages[99]", "not an object")
        assert rejects[100:] == [Reject("$", "1 more like these")][: number - 100]


def test_an_empty_list_says_nothing() -> None:
    assert read([]) == Parsed([], [])


# -- messages --------------------------------------------------------------------------------------------------------


def test_the_content_decides_and_not_what_the_envelope_calls_it() -> None:
    """One of the vendor's own samples has a `conversation` under `extendedTextMessage`."""
    assert message({"conversation": "oi"}, messageType="extendedTextMessage").body["text"] == {"body": "oi"}
    assert message({"conversation": "oi"}, messageType=["x"]).type == "text"
    assert message(
        {"messageContextInfo": {}, "pollCreationMessage": {"name": "?"}}, messageType="messageContextInfo"
    ).type == ("pollCreationMessage")


def test_a_message_of_ours_is_an_echo_to_whom_it_went() -> None:
    echo = message(fromMe=True, pushName="Loja")

    assert (echo.direction, echo.may_be_ours) == ("out", True)
    assert echo.person == echo.chat == BIA_UNHEARD
    assert not message().may_be_ours


def test_what_we_sent_is_no_proof_of_how_whatsapp_spells_a_number() -> None:
    ours = only(flat(KEY, fromMe=True, remoteJid="77@lid", remoteJidAlt=CUSTOMER))

    assert ours.chat.identities == (("lid", "77"), ("phone", "5511944440001"))
    assert ours.chat.aliases == only(ack(KEY, "A", 3)).chat.aliases == ()
    assert message().chat.aliases == (("jid", "5511944440001"),)


def test_a_group_message_is_by_its_author_in_the_group() -> None:
    author = "5511944440001:3@s.whatsapp.net"
    group = Person((("group", "120363000000000001"),))

    for made in (
        message(remoteJid=GROUP, participant=author),
        only(flat(KEY, remoteJid=GROUP) | {"participant": author}),
    ):
        assert (made.person, made.chat) == (BIA, group)
        assert made.body["key"]["participant"] == author
    by_lid = message(remoteJid=GROUP, participant="77@lid", participantAlt=CUSTOMER)
    assert by_lid.person.identities == (("lid", "77"), ("phone", "5511944440001"))
    ours = message(remoteJid=GROUP, participant=author, fromMe=True)
    assert ours.person == ours.chat == group
    assert message(remoteJid=GROUP).person == Person(group.identities)


def test_somebody_by_lid_is_known_by_lid_and_their_phone_if_it_is_told() -> None:
    assert message(remoteJid="77@lid").person == Person((("lid", "77"),), "Bia")
    both = message(remoteJid="77@lid", remoteJidAlt="5511944440001:2@s.whatsapp.net").person
    assert both == Person((("lid", "77"), ("phone", "5511944440001")), "Bia", BIA.aliases)
    assert message(remoteJid="77@lid", remoteJidAlt="nonsense").person.identities == (("lid", "77"),)


def test_what_somebody_wrote_to_many_is_in_our_chat_with_them() -> None:
    made = message(remoteJid="1700@broadcast", participant=CUSTOMER)

    assert made.person == made.chat == BIA


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"remoteJid": "status@broadcast", "participant": CUSTOMER}, "a status broadcast"),
        ({"remoteJid": "120363000000000001@newsletter"}, "a newsletter"),
        ({"remoteJid": "1700@broadcast", "fromMe": True}, "a broadcast list"),
    ],
)
def test_what_is_for_nobody_in_particular_is_ignored(fields: Any, reason: str) -> None:
    assert read(flat(KEY, **fields)) == Parsed([], [], ignored=reason)
    assert [type(change.items[0]) for change in read([flat(KEY, **fields), flat(KEY)]).changes] == [Message]


def test_names_of_a_wrong_type_are_none_and_businesses_have_another() -> None:
    assert message(pushName=7).person.name is None
    assert message(pushName="", verifiedBizName="Loja SA").person.name == "Loja SA"
    assert message(pushName="x" * 9000).person.name == "x" * 512


@pytest.mark.parametrize(
    ("given", "at"),
    [
        (str(AT), SENT),
        (AT * 1000 + 500, SENT + timedelta(milliseconds=500)),
        ({"low": AT, "high": 0, "unsigned": True}, SENT),
        (int(NOW.timestamp()) + 86_400, NOW + timedelta(days=1)),  # a clock may be ahead
    ],
)
def test_times_in_every_spelling(given: Any, at: datetime) -> None:
    made = message(messageTimestamp=given)

    assert made.at == at
    assert "pombal" not in made.body


def test_a_time_in_two_halves_is_without_a_sign() -> None:
    at = datetime.fromtimestamp(3_000_000_000, UTC)
    body = flat(KEY, messageTimestamp={"low": 3_000_000_000 - 2**32, "high": 0})

    (change,) = parse(encoded(body), at).changes

    (made,) = change.items
    assert isinstance(made, Message)
    assert (made.at, "pombal" in made.body) == (at, False)


@pytest.mark.parametrize(
    "given",
    [
        "soon",
        -5,
        10**20,
        "9" * 5000,
        None,
        True,
        [],
        {"low": 1, "high": 9},
        {"low": "x"},
        ...,
        4_102_444_800,
        int(NOW.timestamp()) + 86_401,
    ],
)
def test_a_message_of_an_odd_time_has_the_received_time_and_says_so(given: Any) -> None:
    made = message(messageTimestamp=given)

    assert (made.at, made.body["pombal"]) == (NOW, {"odd_timestamp": True})


def test_text_is_clean_for_the_database() -> None:
    raw = encoded(flat(KEY, {"conversation": "@@"})).replace(b"@@", b"a\\u0000b\\ud800c\\u202e")

    ((item,),) = [change.items for change in parse(raw, NOW).changes]

    assert isinstance(item, Message)
    assert item.body["text"] == {"body": "a\ufffdb\ufffdc\u202e"}


def test_a_file_comes_with_its_message() -> None:
    made = message(media("document", fileName="nf.pdf"))

    assert made.file is not None
    assert (made.file.kind, made.file.filename, made.body["document"]["filename"]) == ("document", "nf.pdf", "nf.pdf")


# -- acks ------------------------------------------------------------------------------------------------------------


def an_ack(word: str) -> Status:
    """Of what went to Bia; one that failed tells who said so."""
    why = "the gateway says that WhatsApp did not take it"
    more: dict[str, Any] = {"error_code": "ack_error", "error": why} if word == "failed" else {}
    return Status("$", "A", word, NOW, chat=BIA_UNHEARD, **more)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (0, "failed"),
        (2, "sent"),
        ("2", "sent"),
        (3, "delivered"),
        (4, "read"),
        (5, "played"),
        ("DELIVERY_ACK", "delivered"),
        ("SERVER_ACK", "sent"),
        ("viewed", "read"),
        ("READ", "read"),
        (9, "9"),
        ("teleported", "teleported"),
    ],
)
def test_an_ack_is_a_status_on_its_own_scale(given: Any, word: str) -> None:
    assert only(ack(KEY, "A", given)) == an_ack(word)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        *((0, "failed"), (2, "sent"), ("3", "delivered"), (4, "read"), ("5", "played"), ("READ", "read")),
        *((one, one) for one in ("sent", "delivered", "read", "played", "failed")),
    ],
)
def test_the_status_of_an_ack_may_lie_beside_its_key(given: Any, word: str) -> None:
    flat_one = ack(KEY, "A", ...) | {"status": given}
    del flat_one["update"]
    key = flat_one["key"]
    unsaid = {name: value for name, value in key.items() if name != "fromMe"}

    assert only(flat_one) == an_ack(word)
    for event in ("delivery", "status", "message.ack", "messages.update"):
        for one in (key, unsaid):
            made = only({"instanceKey": KEY, "event": event, "data": {"key": one, "status": given}})
            assert (made.status, made.provider_id, made.chat) == (word, "A", BIA_UNHEARD)
    assert only({"instanceKey": KEY, "key": key, "status": given}).status == word


def test_a_status_beside_a_key_is_no_ack_where_nothing_says_so() -> None:
    theirs = {"instance_key": KEY, "key": flat(KEY, id_="A")["key"]}

    assert read(theirs | {"messageType": "message.ack", "status": 4}).ignored == "an ack of a message of somebody else"
    for body in (
        theirs | {"status": 4},
        ack(KEY, "A", 3) | {"messageType": "x", "update": ..., "status": "warm"},
        stub(fromMe=True, status=2),
    ):
        assert isinstance(only({name: value for name, value in body.items() if value is not ...}), Notice)
    assert [type(one) for one in read(flat(KEY, fromMe=True, status=2)).changes[0].items] == [Message]
    with pytest.raises(Rejected, match="no status"):
        read({"instance_key": KEY, "messageType": "message.ack", "key": theirs["key"], "status": None})


@pytest.mark.parametrize("update", [{}, {"starred": True}, {"status": None}, {"status": "x" * 99}, {"status": 4}])
def test_a_message_with_an_update_beside_it_is_a_message(update: Any) -> None:
    assert message(update=update).body["text"] == {"body": "Bom dia"}


@pytest.mark.parametrize("more", [{"update": {"status": 4, "timestamp": AT}}, {"messageType": "delivery", "status": 4}])
def test_an_ack_that_brings_its_message_along_is_both(more: Any) -> None:
    (change,) = read(flat(KEY, id_="A", fromMe=True) | more).changes
    said, became = change.items

    assert isinstance(said, Message)
    assert became == Status("$", "A", "read", SENT if "update" in more else NOW, chat=BIA_UNHEARD)


def test_a_pending_ack_says_nothing_and_one_of_a_message_of_somebody_else_neither() -> None:
    for body in (ack(KEY, "A", 1), ack(KEY, "A", "PENDING")):
        assert read(body) == Parsed([], [], ignored="nothing has become of it yet")
    theirs = ack(KEY, "A", 4)
    theirs["key"]["fromMe"] = False
    assert read(theirs).ignored == "an ack of a message of somebody else"


@pytest.mark.parametrize("given", [None, "", True, [], 2.5, "x" * 33])
def test_an_ack_of_an_odd_status_is_rejected(given: Any) -> None:
    with pytest.raises(Rejected, match="status"):
        read(ack(KEY, "A", given))


def test_an_ack_in_a_group_names_the_member_and_its_time() -> None:
    made = only(ack(KEY, "A", 4, remoteJid=GROUP, participant="5511944440001:2@s.whatsapp.net") | {"timestamp": AT})

    assert (made.participant, made.at) == ("5511944440001", SENT)
    assert made.chat == Person((("group", "120363000000000001"),))
    assert only(ack(KEY, "A", 4, remoteJid=GROUP, participant="77@lid")).participant == "77@lid"


def test_an_ack_may_be_wrapped_and_without_a_key() -> None:
    data = {"keyId": "A", "remoteJid": CUSTOMER, "fromMe": True, "status": "READ"}

    made = only({"instance": KEY, "event": "messages.update", "data": data})
    seed = only({"instanceKey": KEY, "event": "delivery", "data": {"id": "A", "to": CUSTOMER, "status": 3}})

    assert (made.provider_id, made.status, made.chat) == ("A", "read", BIA_UNHEARD)
    assert (seed.provider_id, seed.status) == ("A", "delivered")


# -- connections -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (connection(KEY), "phone_connected"),
        ({"instanceKey": KEY, "event": "connection", "data": {"status": "Connected"}}, "connected"),
        ({"instanceKey": KEY, "event": "status", "data": {"status": "disconnected"}}, "disconnected"),
        ({"instance": KEY, "event": "connection.update", "data": {"state": "close", "statusReason": 401}}, "close"),
        ({"instance_key": KEY, "messageType": "qrcode_update", "message": "2@secretOfTheCode,x"}, "qrcode_update"),
        ({"instance_key": KEY, "messageType": "connection_update", "message": "9" * 40}, "connection_update"),
        ({"instance_key": KEY, "messageType": "hologram", "message": "phone_gone"}, "phone_gone"),
        (connection(KEY) | {"key": {"remoteJid": CUSTOMER, "fromMe": True, "id": "A"}}, "phone_connected"),
        ({"instanceKey": KEY, "event": "connection", "data": {}}, "connection"),
        ({"instanceKey": KEY, "event": "status", "data": {"id": "k", "status": "disconnected"}}, "disconnected"),
        ({"instanceKey": KEY, "event": "status", "data": {"key": {"id": "k"}, "status": "close"}}, "close"),
        ({"instanceKey": KEY, "event": "status", "data": {"id": "k", "to": CUSTOMER, "status": "open"}}, "open"),
    ],
)
def test_a_connection_event_is_a_word_and_no_state(body: Any, word: str) -> None:
    item = only(body)

    assert isinstance(item, Connection)
    assert item.word == word
    assert read(body).changes[0].number == KEY


# -- notices ---------------------------------------------------------------------------------------------------------


def stub(kind: Any = 2, **fields: Any) -> dict[str, Any]:
    parameters = ["No session record", 7, "x" * 9000]
    return flat(KEY, ..., id_="A", messageStubType=kind, messageStubParameters=parameters, **fields)


def test_a_message_that_could_not_be_decrypted_is_a_notice() -> None:
    made = only(stub())

    assert isinstance(made, Notice)
    assert (made.type, made.at) == ("message_undecryptable", SENT)
    assert made.payload == {
        "key": {"remoteJid": CUSTOMER, "fromMe": False, "id": "A"},
        "messageStubType": 2,
        "messageStubParameters": ["No session record", "x" * 512],
    }


@pytest.mark.parametrize(
    ("body", "type_"),
    [
        (stub("CIPHERTEXT"), "message_undecryptable"),
        (stub(27, remoteJid=GROUP), "message_stub"),
        (stub("GROUP_PARTICIPANT_ADD"), "message_stub"),
        (stub(10**50), "message_empty"),
        (flat(KEY, None), "message_empty"),
        (flat(KEY, []), "message_empty"),
        (flat(KEY, {"senderKeyDistributionMessage": {"groupId": GROUP}}), "message_empty"),
        (flat(KEY, {"protocolMessage": {"type": 5}}), "protocol_message"),
        (flat(KEY, ..., update={"starred": True}), "message_update"),
        (
            {"instance": KEY, "event": "Presence.Update", "data": {"id": CUSTOMER, "apikey": "s"}},
            "gateway_presence.update",
        ),
        ({"instance": KEY, "event": "delivery", "data": {"x": 1}}, "gateway_delivery"),
        ({"instance": KEY, "event": "delivery", "data": {"id": "A", "status": 3}}, "gateway_delivery"),
        ({"instance": KEY, "event": "message_undecryptable", "data": {"x": 1}}, "gateway_message_undecryptable"),
    ],
)
def test_whatever_else_is_kept_as_a_notice(body: Any, type_: str) -> None:
    made = only(body)

    assert isinstance(made, Notice)
    assert made.type == type_
    assert "apikey" not in made.payload


def test_no_spelling_of_a_secrets_name_is_kept() -> None:
    secrets = dict.fromkeys(("token", "Token", "TOKEN", "apiKey", "api_key", "X", "MediaKey", "pairing-code"), "secret")

    made = only({"instance": KEY, "event": "foo", "data": {"deep": [secrets]}})

    assert made.payload == {"deep": [{"X": "secret"}]}


def test_told_again_it_is_the_same_notice_and_another_one_is_not() -> None:
    def digest(body: Any, at: datetime = NOW) -> bytes:
        ((item,),) = [change.items for change in parse(encoded(body), at).changes]
        assert isinstance(item, Notice)
        return item.digest

    event = {"instance_key": KEY, "event": "presence", "data": {"state": "composing"}}
    reordered = {"event": "presence", "data": {"state": "composing"}, "instance_key": KEY}

    assert digest(stub()) == digest(stub(messageTimestamp=AT + 9), NOW + timedelta(days=3))
    assert len({digest(one) for one in (stub(), stub(27), stub(remoteJid=GROUP), stub() | {"instance_key": "b"})}) == 4
    assert digest(event) == digest(reordered)
    assert len({digest(event), digest(event | {"instance_key": "b"}), digest(event, NOW + timedelta(days=1))}) == 3


# -- hostile ---------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
BODIES = [
    SAMPLE,
    flat(KEY, media("audio", ptt=True), remoteJid=GROUP, participant=CUSTOMER),
    flat(
        KEY, {"editedMessage": {"message": {"protocolMessage": {"key": {"id": "x"}, "type": 14, "editedMessage": {}}}}}
    ),
    flat(KEY, {"reactionMessage": {"key": {"id": "x"}, "text": "y"}}),
    flat(KEY, {"contactsArrayMessage": {"contacts": [{"vcard": "TEL:1"}]}}),
    flat(KEY, {"extendedTextMessage": {"text": "x", "contextInfo": {"stanzaId": "a", "mentionedJid": ["1@lid"]}}}),
    ack(KEY, "A", 3),
    stub(),
    connection(KEY),
    {"instanceKey": KEY, "event": "delivery", "data": {"key": flat(KEY, fromMe=True)["key"], "status": "read"}},
    {"instanceKey": KEY, "event": "status", "data": {"id": "k", "status": "disconnected"}, "messages": [flat(KEY)]},
    {"instanceKey": KEY, "event": "message", "data": {"messages": [flat(KEY)]}},
    {"instanceKey": KEY, "event": "delivery", "data": {"id": "A", "to": CUSTOMER, "status": 3}},
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, one in inner:
        found += places(one, (*path, name))
    return found


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
    for reject in parsed.rejects:
        assert reject.path.startswith("$[0]")
        assert len(reject.reason) < 100


# -- what the sandbox sends ------------------------------------------------------------------------------------------

SANDBOX_TYPES = {
    "mislabelled": "text",
    "extended": "text",
    "quote": "text",
    "ephemeral": "text",
    "gif": "video",
    "document_caption": "document",
    "view_once": "image",
    "live_location": "location",
    "contact": "contacts",
    "poll": "pollCreationMessageV3",
    "edited": "edit",
    "revoked": "revoke",
    "buttons": "interactive",
    "list": "interactive",
    "unknown": "holographicMessage",
}  # where they are not named alike


@pytest.mark.parametrize("form", words.FORMS)
@pytest.mark.parametrize("kind", words.KINDS)
def test_every_kind_and_form_of_the_sandbox_is_understood(kind: str, form: str) -> None:
    instance = Instance("a", KEY, "t", "connected", "5511955550100", None)
    short, mime_type = words.MEDIA_KINDS.get(kind, ("image", "image/jpeg"))
    sent = MegaFiles().add(files.make(mime_type, kind), mime_type, short, "nf.pdf")
    type_, said = words.content(kind, words.Told("oi", AT, sent))
    key = words.key("A", CUSTOMER, from_me=False, lids="with_alt")

    parsed = read(words.formed(form, words.message(instance, key, type_, said, AT, "Bia")))

    (change,) = parsed.changes
    (item,) = change.items
    assert change.number == KEY
    if kind == "stub":
        assert isinstance(item, Notice)
        assert item.type == "message_undecryptable"
        return
    assert isinstance(item, Message)
    assert item.type == SANDBOX_TYPES.get(kind, kind)
    assert item.person.identities[1] == ("phone", "5511944440001")
    assert (item.file.keys if item.file else None) == (sent.keys if kind in words.MEDIA_KINDS else None)
    assert "context" in item.body or kind not in ("quote", "buttons", "list")


@pytest.mark.parametrize("form", words.FORMS)
def test_acks_and_connections_of_the_sandbox_are_understood(form: str) -> None:
    instance = Instance("a", KEY, "t", "connected", "5511955550100", None)
    key = words.key("A", CUSTOMER, from_me=True)

    said = only(words.formed(form, words.ack(instance, key, "3")))
    told = only(words.formed(form, words.connection(instance, "phone_connected")))

    assert (type(said), said.status) == (Status, "delivered")
    assert (type(told), told.word.removeprefix("phone_")) == (Connection, "connected")
