"""What a message of WhatsApp Web says, in Meta's normal form (baileys-sessions.md §5, whatsapp-cloud-api.md §6)."""

from typing import Any

import pytest

from pombal.errors import Rejected
from providers import jid
from providers.inbound import File
from providers.jid import Jid
from providers.webmessage import Content, content
from tests.gateways import media

SHA256 = "m04pFf2ERdaopTyFkGPA0+bX3i+YY2dYgVFwOgDLSDI="


def said(message: dict[str, Any], **more: Any) -> Content:
    found = content(message, **more)
    assert found is not None
    return found


def wrapped(message: dict[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        message = {name: {"message": message}}
    return message


def edited(message: dict[str, Any], type_: Any = 14) -> dict[str, Any]:
    return {"protocolMessage": {"key": {"id": "OLD"}, "type": type_, "editedMessage": message, "timestampMs": "1"}}


VCARD = (
    "BEGIN:VCARD\r\nVERSION:3.0\r\nFN:Ana Luz\r\nitem1.TEL;type=CELL;waid=5548955550002:+55 48 95555-0002\r\n"
    "TEL:190\r\nEND:VCARD"
)
ANA = {
    "name": {"formatted_name": "Ana Luz"},
    "phones": [{"phone": "+55 48 95555-0002", "wa_id": "5548955550002"}, {"phone": "190"}],
    "vcard": VCARD,
}
FORMS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "conversation": ({"conversation": "oi"}, "text", {"text": {"body": "oi"}}),
    "extended text": ({"extendedTextMessage": {"text": "oi"}}, "text", {"text": {"body": "oi"}}),
    "location": (
        {"locationMessage": {"degreesLatitude": -27.59, "degreesLongitude": -48, "name": "Loja", "address": "Rua A"}},
        "location",
        {"location": {"latitude": -27.59, "longitude": -48, "name": "Loja", "address": "Rua A"}},
    ),
    "live location": (
        {"liveLocationMessage": {"degreesLatitude": 1.5, "degreesLongitude": 2.5, "caption": "indo"}},
        "location",
        {"location": {"latitude": 1.5, "longitude": 2.5, "live": True, "caption": "indo"}},
    ),
    "contact": (
        {"contactMessage": {"displayName": "Ana Luz", "vcard": VCARD}},
        "contacts",
        {"contacts": [ANA]},
    ),
    "contacts": (
        {"contactsArrayMessage": {"displayName": "2", "contacts": [{"displayName": "Ana Luz", "vcard": VCARD}, 7, {}]}},
        "contacts",
        {"contacts": [ANA, {}]},
    ),
    "reaction": (
        {"reactionMessage": {"key": {"id": "OLD", "fromMe": True}, "text": "👍", "senderTimestampMs": "1"}},
        "reaction",
        {"reaction": {"message_id": "OLD", "emoji": "👍"}},
    ),
    "a reaction taken back": (
        {"reactionMessage": {"key": {"id": "OLD"}, "text": ""}},
        "reaction",
        {"reaction": {"message_id": "OLD", "emoji": ""}},
    ),
    "edit": (
        {"editedMessage": {"message": edited({"conversation": "corrigido"})}},
        "edit",
        {"edit": {"original_message_id": "OLD", "message": {"type": "text", "text": {"body": "corrigido"}}}},
    ),
    "edit by name": (
        edited({"imageMessage": {"caption": "nova"}}, "MESSAGE_EDIT"),
        "edit",
        {"edit": {"original_message_id": "OLD", "message": {"type": "image", "image": {"caption": "nova"}}}},
    ),
    "deletion": (
        {"protocolMessage": {"key": {"id": "OLD"}, "type": 0}},
        "revoke",
        {"revoke": {"original_message_id": "OLD"}},
    ),
    "deletion by name": (
        {"protocolMessage": {"key": {"id": "OLD"}, "type": "REVOKE"}},
        "revoke",
        {"revoke": {"original_message_id": "OLD"}},
    ),
    "deletion without the default": (
        {"protocolMessage": {"key": {"id": "OLD"}}},
        "revoke",
        {"revoke": {"original_message_id": "OLD"}},
    ),
    "buttons": (
        {"buttonsResponseMessage": {"selectedButtonId": "yes", "selectedDisplayText": "Sim", "type": 1}},
        "interactive",
        {"interactive": {"type": "button_reply", "button_reply": {"id": "yes", "title": "Sim"}}},
    ),
    "list": (
        {"listResponseMessage": {"title": "Ouro", "description": "12x", "singleSelectReply": {"selectedRowId": "g"}}},
        "interactive",
        {"interactive": {"type": "list_reply", "list_reply": {"id": "g", "title": "Ouro", "description": "12x"}}},
    ),
    "template button": (
        {"templateButtonReplyMessage": {"selectedId": "c:7", "selectedDisplayText": "Confirmar", "selectedIndex": 0}},
        "button",
        {"button": {"payload": "c:7", "text": "Confirmar"}},
    ),
    "flow": (
        {
            "interactiveResponseMessage": {
                "body": {"text": "Sent"},
                "nativeFlowResponseMessage": {"name": "flow", "paramsJson": '{"a":1}', "version": 3},
            }
        },
        "interactive",
        {
            "interactive": {
                "type": "nfm_reply",
                "nfm_reply": {"name": "flow", "body": "Sent", "response_json": '{"a":1}'},
            }
        },
    ),
    "poll": (
        {"messageContextInfo": {"messageSecret": "x"}, "pollCreationMessageV3": {"name": "Quando?", "options": [{}]}},
        "pollCreationMessageV3",
        {"pollCreationMessageV3": {"name": "Quando?", "options": [{}]}},
    ),
    "unknown": (
        {"hologramMessage": {"x": [1, 2.5, None], "jpegThumbnail": "////", "mediaKey": "secret"}},
        "hologramMessage",
        {"hologramMessage": {"x": [1, 2.5, None]}},
    ),
    "unknown without the word": ({"call": {"callKey": "x"}}, "call", {"call": {"callKey": "x"}}),
    "a known kind in an unknown form": (
        {"locationMessage": {"x": 1}},
        "locationMessage",
        {"locationMessage": {"x": 1}},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_kind_has_its_normal_form(name: str) -> None:
    message, type_, body = FORMS[name]

    found = said(message)

    assert (found.type, found.body, found.file) == (type_, body, None)


@pytest.mark.parametrize(
    ("kind", "fields", "type_", "body"),
    [
        ("image", {"caption": "nota"}, "image", {"caption": "nota"}),
        ("video", {"caption": "x" * 5000, "seconds": 3}, "video", {"caption": "x" * 5000, "seconds": 3}),
        ("ptv", {}, "video", {}),
        ("audio", {"seconds": 9}, "audio", {"seconds": 9}),
        ("audio", {"ptt": True}, "voice", {"voice": True}),
        ("document", {"fileName": "../nf.pdf", "caption": "a"}, "document", {"filename": "../nf.pdf", "caption": "a"}),
        ("document", {"title": "nf"}, "document", {"filename": "nf"}),
        ("sticker", {"isAnimated": True}, "sticker", {"animated": True}),
    ],
)
def test_a_file_is_known_by_the_keys_that_open_it(kind: str, fields: Any, type_: str, body: Any) -> None:
    message = media(kind, **fields)
    given = message[f"{kind}Message"]

    found = said(message)

    assert found.type == type_
    assert found.body == {type_: {"mime_type": "image/jpeg", "sha256": SHA256, **body}}
    short = {"voice": "audio"}.get(type_, type_)
    keys = {name: given[name] for name in ("mediaKey", "directPath", "url", "mimetype")} | {"messageType": short}
    assert found.file == File(None, type_, "image/jpeg", SHA256, body.get("filename"), keys=keys)


def test_bytes_that_a_gateway_forgot_to_encode_are_base64() -> None:
    key = bytes(range(32))
    by_index = {str(n): byte for n, byte in enumerate(key)}
    buffer = {"type": "Buffer", "data": list(key)}

    found = said(media(mediaKey=by_index, fileSha256=buffer))

    assert found.file is not None
    assert found.file.keys is not None
    assert found.file.keys["mediaKey"] == found.file.sha256 == "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


@pytest.mark.parametrize(
    "fields",
    [
        {"mediaKey": None},
        {"mediaKey": ""},
        {"mediaKey": {"0": 256}},
        {"mediaKey": ["x"]},
        {"mediaKey": "x" * 5000},
        {"url": None, "directPath": 7},
        {"url": "https://" + "x" * 3000, "directPath": ""},
    ],
)
def test_a_file_without_its_keys_is_a_message_without_a_file(fields: Any) -> None:
    found = said(media(**fields))

    assert (found.type, found.file) == ("image", None)


@pytest.mark.parametrize(
    "names",
    [
        ("ephemeralMessage",),
        ("viewOnceMessageV2Extension", "ephemeralMessage"),
        ("documentWithCaptionMessage",),
        ("viewOnceMessage", "viewOnceMessageV2", "associatedChildMessage", "groupStatusMessageV2", "ephemeralMessage"),
    ],
)
def test_wrappers_are_taken_off(names: tuple[str, ...]) -> None:
    found = said(wrapped(media(caption="nota"), *names))

    assert (found.type, found.body["image"]["caption"], found.file is not None) == ("image", "nota", True)


def test_what_is_wrapped_six_times_is_kept_as_it_is() -> None:
    found = said(wrapped({"conversation": "oi"}, *["ephemeralMessage"] * 6))

    assert found.type == "ephemeralMessage"


def test_keys_for_the_group_come_beside_the_content_and_are_none() -> None:
    keys = {"senderKeyDistributionMessage": {"groupId": "1@g.us", "axolotlSenderKeyDistributionMessage": "x"}}

    assert said(keys | {"messageContextInfo": {}, "conversation": "oi"}).body == {"text": {"body": "oi"}}
    assert content(keys) is None
    assert content({"messageContextInfo": {"messageSecret": "x"}, "conversation": "", "imageMessage": None}) is None
    assert content({}) is None


def test_a_quote_names_the_message_and_whom_it_was_by() -> None:
    info = {"stanzaId": "OLD", "participant": "5511955550100:7@s.whatsapp.net", "quotedMessage": {"conversation": "?"}}
    text = {"text": "sim", "contextInfo": info}

    assert said({"extendedTextMessage": text}).body == {
        "text": {"body": "sim"},
        "context": {"id": "OLD", "from": "5511955550100"},
    }
    # One gateway rewrites the text to a conversation, and puts the quote beside the message.
    assert said({"conversation": "sim"}, beside=info).body["context"]["id"] == "OLD"
    assert said(media(contextInfo=info | {"participant": "77@lid"})).body["context"]["from"] == "77@lid"


def test_forwards_and_mentions_are_context() -> None:
    def context(**info: Any) -> Any:
        return said({"extendedTextMessage": {"text": "oi", "contextInfo": info}}).body.get("context")

    assert context(isForwarded=True, forwardingScore=1) == {"forwarded": True}
    assert context(isForwarded=True, forwardingScore=5) == {"frequently_forwarded": True}
    assert context(mentionedJid=["5511944440001@s.whatsapp.net", "9@lid", 7, "?"]) == {
        "mentioned": ["5511944440001", "9@lid"]
    }
    assert context(stanzaId="x" * 513, participant=[]) is None
    assert context(stanzaId=7, mentionedJid={}, isForwarded="yes") is None


def test_an_advertisement_that_somebody_came_by_is_a_referral_and_a_preview_is_none() -> None:
    ad = {"title": "Oferta", "body": "Só hoje", "sourceUrl": "https://fb.example/ad", "mediaType": 1}

    def referral(**fields: Any) -> Any:
        info = {"externalAdReply": ad | fields}
        return said({"extendedTextMessage": {"text": "oi", "contextInfo": info}}).body.get("referral")

    assert referral() is None
    assert referral(sourceId="12", sourceType="ad", ctwaClid="c") == {
        "source_url": "https://fb.example/ad",
        "source_id": "12",
        "source_type": "ad",
        "headline": "Oferta",
        "body": "Só hoje",
        "ctwa_clid": "c",
    }


@pytest.mark.parametrize("type_", [3, 5, "APP_STATE_SYNC_KEY_SHARE", None, [], {}])
def test_what_devices_tell_each_other_is_no_message(type_: Any) -> None:
    found = said({"protocolMessage": {"type": type_, "appStateSyncKeyShare": {"keys": ["secret"]}}})

    assert found.is_protocol
    assert "secret" not in str(found.body)


@pytest.mark.parametrize("type_", [False, True, 0.0, 14.0, [], {}])
def test_only_a_number_or_a_name_can_be_that_of_a_deletion_or_an_edit(type_: Any) -> None:
    assert said(edited({"conversation": "x"}, type_)).is_protocol
    assert said({"protocolMessage": {"key": {"id": "OLD"}, "type": type_}}).is_protocol


@pytest.mark.parametrize("inner", [{}, edited({"conversation": "x"}), {"protocolMessage": {"type": 3}}])
def test_an_edit_of_nothing_is_no_message(inner: dict[str, Any]) -> None:
    assert said(edited(inner)).is_protocol


def test_a_large_object_that_we_only_keep_is_left_out_and_a_large_text_is_not() -> None:
    assert said({"hologramMessage": {"x": "y" * 100_000}}).body == {
        "hologramMessage": None,
        "pombal": {"too_large": True},
    }
    assert len(said({"conversation": "y" * 100_000}).body["text"]["body"]) == 100_000


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"x" * 65: {}, "y" * 65: {"a": 1}}, "type too long"),
        ({"reactionMessage": {"key": {"id": "x" * 513}}}, "id too long"),
        ({"reactionMessage": {"key": {"id": []}}}, "id is not text"),
        ({"hologramMessage": {"x": 10**309}}, "number out of range"),
    ],
)
def test_what_cannot_be_stored_is_rejected(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        content(message)


def test_depth_is_rejected_before_it_hurts() -> None:
    message: dict[str, Any] = {"conversation": "x"}
    for _ in range(400):
        message = edited(message)

    with pytest.raises(Rejected, match="nested too deeply"):
        content(message)


# -- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("5511944440001@s.whatsapp.net", Jid("phone", "5511944440001")),
        ("5511944440001:12@s.whatsapp.net", Jid("phone", "5511944440001")),
        ("5511944440001_1:12@S.WhatsApp.Net", Jid("phone", "5511944440001")),
        ("5511944440001@c.us", Jid("phone", "5511944440001")),
        ("123456789012345:3@lid", Jid("lid", "123456789012345")),
        ("123456789012345@hosted.lid", Jid("lid", "123456789012345")),
        ("120363000000000001@g.us", Jid("group", "120363000000000001")),
        ("5511944440001-1600000000@g.us", Jid("group", "5511944440001-1600000000")),
        ("status@broadcast", Jid("status", "status")),
        ("1700000000@broadcast", Jid("list", "1700000000")),
        ("120363000000000001@newsletter", Jid("newsletter", "120363000000000001")),
        ("5511944440001", None),
        ("+5511944440001@s.whatsapp.net", None),
        ("ana@s.whatsapp.net", None),
        ("٥٥١١@s.whatsapp.net", None),
        ("1@s.whatsapp.net.evil", None),
        ("1@sXwhatsapp.net", None),
        ("@lid", None),
        ("", None),
    ],
)
def test_addresses(text: str, found: Jid | None) -> None:
    assert jid.parse(text) == found


def test_a_lid_is_never_a_phone_and_its_phone_stands_beside_it() -> None:
    lid, phone = Jid("lid", "77"), Jid("phone", "5511944440001")

    assert jid.person(lid).identities == (("lid", "77"),)
    assert jid.person(lid).aliases == ()
    for person in (jid.person(lid, phone), jid.person(phone, lid)):
        assert person.identities == (("lid", "77"), ("phone", "5511944440001"))
        assert person.aliases == (("jid", "5511944440001"),)
