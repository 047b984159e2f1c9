"""The bodies of MegaAPI's webhooks (megaapi.md, Webhooks; shapes of content: baileys-sessions.md §5).

Everything is built flat, as the vendor sends it; `formed` turns that into what others say they have seen.
"""

import secrets
from collections.abc import Callable
from typing import Any, NamedTuple

from sandbox.megaapi_files import Sent
from sandbox.megaapi_instances import Instance, lid
from sandbox.meta import JSON

FORMS = ("flat", "wrapped", "seed")
ACK = "message.ack"
CONNECTION = "connection_update"
_CONTEXT: JSON = {"deviceListMetadata": {}, "deviceListMetadataVersion": 2}


class Told(NamedTuple):
    """What a message says, besides its kind.

    text    of it, or its caption
    file    of one with media
    quoted  id of the message it answers or is about
    who     JID of whoever wrote that one
    at      unix seconds
    """

    text: str
    at: int
    file: Sent | None = None
    quoted: str = "3EB0QUOTED0000000000"
    who: str = "5511944440001@s.whatsapp.net"
    from_me: bool = False  # whether that one is ours
    chat: str = "5511944440001@s.whatsapp.net"


def new_id() -> str:
    return f"3EB0{secrets.token_hex(9).upper()}"


def jid(person: str) -> str:
    """Digits, or a JID already."""
    return person if "@" in person else f"{person}@s.whatsapp.net"


def hidden(person: str) -> str:
    """The `@lid` of a person's JID."""
    digits, _, server = person.partition("@")
    return person if server == "lid" else f"{lid(digits)}@lid"


def key(id: str, chat: str, *, from_me: bool, author: str | None = None, lids: str = "never") -> JSON:
    """A message's key. `author` is who wrote it in a group; `lids` is never, with_alt or without_alt."""
    made: JSON = {"remoteJid": chat, "fromMe": from_me, "id": id}
    if author is not None:
        made["participant"] = author
    if lids == "never":
        return made
    field, person = ("remoteJid", chat) if author is None else ("participant", author)
    if person.endswith("@s.whatsapp.net"):
        made[field] = hidden(person)
        if lids == "with_alt":
            made |= {f"{field}Alt": person, "addressingMode": "lid"}
    return made


def message(instance: Instance, its_key: JSON, type: str, content: JSON | None, at: int, name: str) -> JSON:
    """A message; without any content it is one that could not be read."""
    body = {
        **_head(instance, type),
        "key": its_key,
        "messageTimestamp": at,
        "pushName": name,
        "broadcast": False,
        "message": content,
        "isGroup": its_key["remoteJid"].endswith("@g.us"),
    }
    if content is None:
        del body["message"]
        body |= {"messageStubType": 2, "messageStubParameters": ["No matching sessions found for message"]}
    return body


def ack(instance: Instance, its_key: JSON, status: int | str) -> JSON:
    """How far a message of ours has come."""
    return {**_head(instance, ACK), "key": its_key, "update": {"status": status}}


def connection(instance: Instance, word: str) -> JSON:
    """The phone came or went; the message is a string here."""
    return {**_head(instance, CONNECTION), "message": word, "pushName": instance.name}


def formed(form: str, body: JSON) -> JSON:
    """A flat body in this form."""
    if form == "flat":
        return body
    rest = {name: value for name, value in body.items() if name != "instance_key"}
    if form == "wrapped":
        return {"instance_key": body["instance_key"], "data": rest} if "key" in body else body
    type = body["messageType"]
    event = {ACK: "delivery", CONNECTION: "connection"}.get(type, "message")
    if type == ACK:
        rest = {"key": body["key"], "update": body["update"]}
    elif type == CONNECTION:
        rest = {"status": body["message"].removeprefix("phone_")}
    return {"instanceKey": body["instance_key"], "event": event, "data": rest}


def _head(instance: Instance, type: str) -> JSON:
    return {"instance_key": instance.key, "jid": instance.jid, "messageType": type}


# Contents


def _quote(told: Told) -> JSON:
    return {"stanzaId": told.quoted, "participant": told.who, "quotedMessage": {"conversation": "Qual o prazo?"}}


def _other(told: Told) -> JSON:
    """The key of the message that this one is about."""
    return {"remoteJid": told.chat, "fromMe": told.from_me, "id": told.quoted}


def _media(kind: str, **more: Any) -> Callable[[Told], JSON]:
    captioned = kind in ("image", "video", "document")

    def made(told: Told) -> JSON:
        if told.file is None:
            raise ValueError(f"a message of {kind} needs a file")
        caption = {"caption": told.text} if captioned and told.text else {}
        return {f"{kind}Message": told.file.told(told.at) | caption | more}

    return made


def _contact(name: str, digits: str) -> JSON:
    vcard = f"BEGIN:VCARD\nVERSION:3.0\nN:;{name};;;\nFN:{name}\nTEL;type=CELL;waid={digits}:+{digits}\nEND:VCARD"
    return {"displayName": name, "vcard": vcard}


_PLACE = {"degreesLatitude": -23.5613, "degreesLongitude": -46.6565}
_image, _document = _media("image"), _media("document")

_CONTENTS: dict[str, Callable[[Told], JSON]] = {
    "text": lambda told: {"conversation": told.text, "messageContextInfo": _CONTEXT},
    "mislabelled": lambda told: {"conversation": told.text},
    "extended": lambda told: {"extendedTextMessage": {"text": told.text, "previewType": "NONE"}},
    "quote": lambda told: {"extendedTextMessage": {"text": told.text, "contextInfo": _quote(told)}},
    "image": _image,
    "video": _media("video"),
    "gif": _media("video", gifPlayback=True),
    "audio": _media("audio"),
    "voice": _media("audio", ptt=True, waveform="AAAACBgQ"),
    "document": _document,
    "document_caption": lambda told: {"documentWithCaptionMessage": {"message": _document(told)}},
    "sticker": _media("sticker", isAnimated=False),
    "location": lambda told: {"locationMessage": {**_PLACE, "name": "Loja", "address": told.text}},
    "live_location": lambda told: {"liveLocationMessage": {**_PLACE, "caption": told.text, "sequenceNumber": "1"}},
    "contact": lambda told: {"contactMessage": _contact("Ana Reis", "5511944440009")},
    "contacts": lambda told: {
        "contactsArrayMessage": {
            "displayName": "2 contatos",
            "contacts": [_contact("Ana Reis", "5511944440009"), _contact("Rui Sá", "5521944440008")],
        }
    },
    "poll": lambda told: {
        "messageContextInfo": _CONTEXT | {"messageSecret": "c2VjcmV0b3NlY3JldG9zZWNyZXRvc2VjcmV0b3M="},
        "pollCreationMessageV3": {
            "name": told.text,
            "options": [{"optionName": "Sim"}, {"optionName": "Não"}],
            "selectableOptionsCount": 1,
        },
    },
    "reaction": lambda told: {
        "reactionMessage": {"key": _other(told), "text": told.text, "senderTimestampMs": str(told.at * 1000)}
    },
    "ephemeral": lambda told: {
        "ephemeralMessage": {
            "message": {"extendedTextMessage": {"text": told.text, "contextInfo": {"expiration": 86400}}}
        }
    },
    "view_once": lambda told: {
        "viewOnceMessageV2": {"message": {"imageMessage": _image(told)["imageMessage"] | {"viewOnce": True}}}
    },
    "edited": lambda told: {
        "editedMessage": {
            "message": {
                "protocolMessage": {
                    "key": _other(told),
                    "type": "MESSAGE_EDIT",
                    "editedMessage": {"conversation": told.text},
                    "timestampMs": str(told.at * 1000),
                }
            }
        }
    },
    "revoked": lambda told: {"protocolMessage": {"key": _other(told), "type": "REVOKE"}},
    "buttons": lambda told: {
        "buttonsResponseMessage": {
            "selectedButtonId": "id-1",
            "selectedDisplayText": told.text,
            "contextInfo": _quote(told),
            "type": "DISPLAY_TEXT",
        }
    },
    "list": lambda told: {
        "listResponseMessage": {
            "title": told.text,
            "listType": "SINGLE_SELECT",
            "singleSelectReply": {"selectedRowId": "row-1"},
            "contextInfo": _quote(told),
        }
    },
    "unknown": lambda told: {"holographicMessage": {"text": told.text, "depth": 3}},
}
_LABELS = {"mislabelled": "extendedTextMessage", "poll": "messageContextInfo"}

MEDIA_KINDS = {
    "image": ("image", "image/jpeg"),
    "view_once": ("image", "image/jpeg"),
    "video": ("video", "video/mp4"),
    "gif": ("video", "video/mp4"),
    "audio": ("audio", "audio/mp4"),
    "voice": ("audio", "audio/ogg; codecs=opus"),
    "document": ("document", "application/pdf"),
    "document_caption": ("document", "application/pdf"),
    "sticker": ("sticker", "image/webp"),
}
"""Kinds of messages with a file: its short kind, and its type where none is given."""

KINDS = (*_CONTENTS, "stub")
"""All kinds of messages; a `stub` could not be read and has no content."""


def content(kind: str, told: Told) -> tuple[str, JSON | None]:
    """`messageType` and `message` of a message of this kind."""
    if kind == "stub":
        return "", None
    made = _CONTENTS[kind](told)
    return _LABELS.get(kind, next(iter(made))), made
