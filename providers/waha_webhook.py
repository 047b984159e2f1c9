"""WAHA's webhooks, `{"event", "session", "payload"}`: a payload in, an element of WhatsApp Web out (baileys-sessions.md
§5, "Webhooks"), so that the rest is the same as for every other gateway.

Its engine that is built on Baileys hands the original on as `_data`; of the others there are the payload's own fields.
Ids are `false_5511…@c.us_3EB0…`, with the member at the end in groups; `@c.us` is `@s.whatsapp.net`. One of its engines
has them as objects, with that text as `_serialized`.
"""

import math
import re
from typing import Any

from pombal.errors import Rejected
from providers.inbound import File, Message
from providers.values import MAX_ID, MAX_NAME, id_of, text_of

MESSAGES = ("message", "message.any", "message.waiting", "message.reaction")
WAITING = "message.waiting"  # "Waiting for this message": it could not be decrypted

_ID = re.compile(r"(true|false)_([^@]{1,64}@[a-z.]{1,32})_([^_]{1,256})(?:_(.{1,128}))?")
_OF_DATA = (
    "key",
    "message",
    "messageTimestamp",
    "pushName",
    "verifiedBizName",
    "participant",
    "messageStubType",
    "messageStubParameters",
)
_MAX_LINK = 2_048
_MEDIA = ("image", "video", "audio", "voice", "document", "sticker")
# Their own scale, by number and by name (baileys-sessions.md §5); None: nothing has become of it yet.
_ACKS: dict[str, str | None] = {
    "-1": "failed",
    "error": "failed",
    "0": None,
    "pending": None,
    "1": "sent",
    "server": "sent",
    "2": "delivered",
    "device": "delivered",
    "3": "read",
    "read": "read",
    "4": "played",
    "played": "played",
}


def element(event: str, payload: dict[str, Any]) -> dict[str, Any]:
    """A message as WhatsApp Web has it. Raises `Rejected` for one without an id."""
    data = payload.get("_data")
    if type(data) is dict and type(data.get("key")) is dict and (data.get("message") or data.get("messageStubType")):
        found = {name: data[name] for name in _OF_DATA if name in data}
    else:
        name = _name(data) if type(data) is dict else None
        found = {"key": _key(payload), "messageTimestamp": payload.get("timestamp"), "pushName": name}
    if event == WAITING:
        stub = {"messageStubType": 2, "messageStubParameters": found.get("messageStubParameters")}
        return {name: value for name, value in found.items() if name != "message"} | stub
    if "message" not in found and "messageStubType" not in found:
        found["message"] = _reaction(payload) if event == "message.reaction" else _content(payload, data)
        found["contextInfo"] = _quoted(payload.get("replyTo"))
    return found


def with_link(message: Message, payload: dict[str, Any]) -> File | None:
    """The message's file: by the keys for what lies at WhatsApp, where the engine hands those on; else by the link
    under which the gateway has it, decrypted. Such a link leads to where a gateway believes itself to be, which may be
    its own localhost."""
    if message.file is not None and message.file.keys is not None:
        return message.file
    media = payload.get("media")
    media = media if type(media) is dict else {}
    link = media.get("url") or payload.get("mediaUrl")
    is_link = type(link) is str and link.startswith(("http://", "https://")) and len(link) <= _MAX_LINK
    if message.type not in _MEDIA or not is_link:
        return message.file
    given = message.file or File(None, message.type)
    return File(
        None,
        given.kind,
        text_of(media, "mimetype", MAX_NAME) or given.mime_type,
        given.sha256,
        text_of(media, "filename", MAX_NAME) or given.filename,
        link=link,
    )


def acknowledged(payload: dict[str, Any]) -> dict[str, Any] | None:
    """An ack as WhatsApp Web has it, its status a word of ours; None while nothing has become of the message."""
    name, number = text_of(payload, "ackName", MAX_NAME), payload.get("ack")
    words = [name.lower()] if name else []
    words += [str(number)] if type(number) in (int, str) else []
    known = next((word for word in words if word in _ACKS), None)
    status = _ACKS[known] if known else next((word for word in words if word != "unknown"), None)
    if status is None:
        return None
    return {"key": _key(payload, is_ack=True), "update": {"status": status}}


def _key(payload: dict[str, Any], *, is_ack: bool = False) -> dict[str, Any]:
    """The key that a payload is about. At the end of an ack's id is who wrote the message, not who read it."""
    given = _id_in(payload, "id")
    if given is None:
        raise Rejected("no id")
    participant = text_of(payload, "participant", MAX_ID) or text_of(payload, "author", MAX_ID)
    if match := _ID.fullmatch(given):
        from_me, chat, id_ = match[1] == "true", match[2], match[3]
        participant = participant or (None if is_ack else match[4])
    else:
        from_me, id_ = payload.get("fromMe") is True, given
        chat = (from_me and text_of(payload, "to", MAX_ID)) or text_of(payload, "from", MAX_ID) or ""
    if chat.endswith("@c.us"):
        chat = chat.removesuffix("@c.us") + "@s.whatsapp.net"
    key = {"remoteJid": chat, "fromMe": from_me, "id": id_}
    return key | ({"participant": participant} if participant else {})


def _id_in(holder: dict[str, Any], name: str) -> str | None:
    """The id at a name. Raises `Rejected` for what cannot be one."""
    value = holder.get(name)
    return id_of(value, "_serialized") if type(value) is dict else id_of(holder, name)


def _name(data: dict[str, Any]) -> str | None:
    """The sender's name, where each engine has it."""
    info = data.get("Info")
    beside = text_of(data, "pushName", MAX_NAME) or text_of(data, "notifyName", MAX_NAME)
    return beside or (text_of(info, "PushName", MAX_NAME) if type(info) is dict else None)


def _content(payload: dict[str, Any], data: Any) -> dict[str, Any] | None:
    body = payload.get("body") if type(payload.get("body")) is str else None
    if payload.get("hasMedia") is True:
        return _media(payload, data, body)
    if type(payload.get("location")) is dict:
        place = payload["location"]
        said = {
            "degreesLatitude": _degrees(place.get("latitude")),
            "degreesLongitude": _degrees(place.get("longitude")),
        }
        return {"locationMessage": said | {"name": place.get("description")}}
    cards = payload.get("vCards")
    if type(cards) is list and cards:
        return {"contactsArrayMessage": {"contacts": [{"vcard": one} for one in cards if type(one) is str]}}
    return {"conversation": body} if body else None


def _media(payload: dict[str, Any], data: Any, caption: str | None) -> dict[str, Any]:
    media = payload.get("media")
    media = media if type(media) is dict else {}
    mime_type = text_of(media, "mimetype", MAX_NAME) or ""
    said_type = text_of(data, "type", MAX_NAME) if type(data) is dict else None
    kind = said_type if said_type == "sticker" else mime_type.partition("/")[0]
    if kind not in ("image", "video", "audio", "sticker"):
        kind = "document"
    said = {"mimetype": mime_type or None, "caption": caption, "fileName": media.get("filename")}
    return {f"{kind}Message": said | {"ptt": said_type == "ptt"}}


def _reaction(payload: dict[str, Any]) -> dict[str, Any] | None:
    reaction = payload.get("reaction")
    target = _id_in(reaction, "messageId") if type(reaction) is dict else None
    if type(reaction) is not dict or target is None:
        return None
    match = _ID.fullmatch(target)
    return {"reactionMessage": {"key": {"id": match[3] if match else target}, "text": reaction.get("text")}}


def _quoted(reply: Any) -> dict[str, Any] | None:
    if type(reply) is not dict:
        return None
    beside = reply.get("id")
    given = text_of(beside, "_serialized", MAX_ID) if type(beside) is dict else text_of(reply, "id", MAX_ID)
    if given is None:
        return None
    match = _ID.fullmatch(given)
    return {"stanzaId": match[3] if match else given, "participant": reply.get("participant")}


def _degrees(value: Any) -> Any:
    """A number, which some engines write as text."""
    if type(value) is not str or len(value) > 32:
        return value
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
