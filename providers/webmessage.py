"""What a message of WhatsApp Web says: its protobuf object `message` as JSON in, Meta's normal form out.

Shared by all gateways that speak this protocol (baileys-sessions.md §5, "Message content"; whatsapp-cloud-api.md §6 for
the form). The kind is told by the content that is there, not by what an envelope calls it: gateways get that wrong
(megaapi.md, "Webhooks"). A kind unknown to us keeps its own name as type and its object as body.
"""

import base64
import re
from collections.abc import Callable
from typing import Any

import msgspec

from pombal.errors import Rejected
from providers import jid
from providers.inbound import File
from providers.values import MAX_ID, MAX_NAME, MAX_TYPE, id_of, storable, text_of

_WRAPPED = 5  # times; no client goes deeper
_WRAPPERS = (
    "ephemeralMessage",
    "viewOnceMessage",
    "viewOnceMessageV2",
    "viewOnceMessageV2Extension",
    "documentWithCaptionMessage",
    "editedMessage",
    "associatedChildMessage",
    "groupStatusMessage",
    "groupStatusMessageV2",
    "groupMentionedMessage",
    "lottieStickerMessage",
    "deviceSentMessage",
)
# They come beside or before the content, and say nothing to anybody.
_NO_CONTENT = frozenset(
    {"senderKeyDistributionMessage", "fastRatchetKeySenderKeyDistributionMessage", "messageContextInfo"}
)
# Kinds of `protocolMessage`, by number and by name. Zero may be missing: serializers leave defaults out.
_DELETED, _EDITED = (0, "0", "REVOKE"), (14, "14", "MESSAGE_EDIT")

_MAX_KEPT = 64 * 1024  # bytes of an object that we only keep
_MAX_NAMES = 100  # … of which only they are kept
_MAX_VCARD = 64 * 1024
_MAX_PHONES = 20  # of one vCard
_MAX_CONTACTS = 300
_MAX_MENTIONED = 1_024  # members of a group
_MAX_LINK = 2_048
_MAX_BYTES = 512  # of a key or a checksum
_OFTEN_FORWARDED = 5  # from here on WhatsApp says "many times"
# Pictures and key material inside objects that we keep: large, or secret, and of no use to a reader.
# Named as `_plain` has it.
_LEFT_OUT = frozenset(
    {
        "apikey",
        "authorization",
        "base64",
        "fileencsha256",
        "jpegthumbnail",
        "mediakey",
        "messagesecret",
        "pairingcode",
        "pngthumbnail",
        "qrcode",
        "scanssidecar",
        "streamingsidecar",
        "thumbnail",
        "token",
        "waveform",
    }
)
_TEL = re.compile(r"(?:[a-z0-9-]+\.)?tel((?:;[^:]*)?):(.*)", re.IGNORECASE)
_WAID = re.compile(r";waid=([0-9]{1,32})", re.IGNORECASE)


class Content(msgspec.Struct, frozen=True, gc=False):
    """`type` and `body` as `inbound.Message` has them. `is_protocol`: between devices, and said by nobody."""

    type: str
    body: dict[str, Any]
    file: File | None = None
    is_protocol: bool = False


def content(message: dict[str, Any], beside: Any = None) -> Content | None:
    """What is said; None when nothing is. Raises `Rejected` for what cannot be stored.

    `beside` is a `contextInfo` that the gateway took out of the message.
    """
    storable(message)
    kinds = _kinds(_unwrapped(message))
    for name, value in kinds:
        read = _READERS.get(name)
        found = read(value) if read else None
        if found is not None:
            return _with_context(found, value, beside)
    if not kinds:
        return None
    name, value = kinds[0]
    if len(name) > MAX_TYPE:
        raise Rejected("type too long")
    return _with_context(Content(name, kept({name: value})), value, beside)


def hashes(message: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of a message's file, plain and encrypted, as its sender tells them; for who fetches it at WhatsApp."""
    for name, value in _kinds(_unwrapped(message)):
        if name == "protocolMessage" and type(value) is dict and type(value.get("editedMessage")) is dict:
            value = next((inner for _, inner in _kinds(_unwrapped(value["editedMessage"]))), None)
        if type(value) is dict and "mediaKey" in value:
            told = {which: _base64(value.get(which)) for which in ("fileSha256", "fileEncSha256")}
            return {which: one for which, one in told.items() if one is not None}
    return {}


def kept(value: dict[str, Any]) -> dict[str, Any]:
    """An object to keep as it is, but for pictures and secrets; only the names in it where it is too large for that."""
    storable(value)
    value = _without(value)
    if len(msgspec.json.encode(value)) > _MAX_KEPT:
        return {name[:MAX_TYPE]: None for name in list(value)[:_MAX_NAMES]} | {"pombal": {"too_large": True}}
    return value


def _without(value: Any) -> Any:
    if type(value) is dict:
        return {name: _without(inner) for name, inner in value.items() if _plain(name) not in _LEFT_OUT}
    return [_without(inner) for inner in value] if type(value) is list else value


def _plain(name: str) -> str:
    """A name without what one gateway writes differently from another: `apiKey`, `APIKEY`, `api_key`."""
    return name.lower().replace("_", "").replace("-", "")


def _unwrapped(message: dict[str, Any]) -> dict[str, Any]:
    for _ in range(_WRAPPED):
        wrappers = (message[name] for name in _WRAPPERS if type(message.get(name)) is dict)
        inner = next((one["message"] for one in wrappers if type(one.get("message")) is dict), None)
        if inner is None:
            break
        message = inner
    return message


def _kinds(message: dict[str, Any]) -> list[tuple[str, Any]]:
    """Names and values of what may be content, in the message's order, without what is there but empty."""
    return [
        (name, value)
        for name, value in message.items()
        if name not in _NO_CONTENT and value is not None and value not in ("", {})
    ]


# -- quotes, forwards, mentions, ads ---------------------------------------------------------------------------------


def _with_context(found: Content, value: Any, beside: Any) -> Content:
    info = value.get("contextInfo") if type(value) is dict else None
    info = info if type(info) is dict else beside
    if type(info) is not dict or found.is_protocol:
        return found
    context = _context(info)
    referral = _referral(info.get("externalAdReply"))
    more = {name: value for name, value in (("context", context), ("referral", referral)) if value}
    return msgspec.structs.replace(found, body=found.body | more) if more else found


def _context(info: dict[str, Any]) -> dict[str, Any]:
    """The message that is answered to, by its id, and by whom it was. A bad one costs the quote, not the message."""
    context: dict[str, Any] = {}
    stanza = text_of(info, "stanzaId", MAX_ID + 1)
    if stanza and len(stanza) <= MAX_ID:
        context["id"] = stanza
        author = jid.parse(text_of(info, "participant", MAX_ID) or "")
        if author is not None:
            context["from"] = jid.spelt(author)
    score = info.get("forwardingScore")
    if info.get("isForwarded") is True:
        often = type(score) is int and score >= _OFTEN_FORWARDED
        context["frequently_forwarded" if often else "forwarded"] = True
    if type(info.get("mentionedJid")) is list:
        texts = [one for one in info["mentionedJid"][:_MAX_MENTIONED] if type(one) is str]
        mentioned = [jid.spelt(one) for one in map(jid.parse, texts) if one is not None]
        if mentioned:
            context["mentioned"] = mentioned
    return context


_REFERRAL = {
    "source_url": "sourceUrl",
    "source_id": "sourceId",
    "source_type": "sourceType",
    "headline": "title",
    "body": "body",
    "thumbnail_url": "thumbnailUrl",
    "ctwa_clid": "ctwaClid",
}


def _referral(ad: Any) -> dict[str, Any] | None:
    """The advertisement that somebody came by. A link's preview has the same form, but neither source nor click."""
    if type(ad) is not dict or not (ad.get("sourceId") or ad.get("ctwaClid")):
        return None
    return _present({name: text_of(ad, theirs, _MAX_LINK) for name, theirs in _REFERRAL.items()})


# -- one reader per kind: the object in, its content out; None when it is not of the form that we know ----------------


def _conversation(value: Any) -> Content | None:
    return Content("text", {"text": {"body": value}}) if type(value) is str else None


def _extended(value: Any) -> Content | None:
    return _conversation(value.get("text")) if type(value) is dict else None


def _media(kind: str) -> Callable[[Any], Content | None]:
    def read(value: Any) -> Content | None:
        if type(value) is not dict:
            return None
        as_ = "voice" if kind == "audio" and value.get("ptt") is True else kind
        sha256 = _base64(value.get("fileSha256"))
        mime_type = text_of(value, "mimetype", MAX_NAME)
        filename = None
        if kind == "document":
            filename = text_of(value, "fileName", MAX_NAME) or text_of(value, "title", MAX_NAME)
        said = {
            "caption": _whole(value, "caption"),
            "mime_type": mime_type,
            "sha256": sha256,
            "filename": filename,
            "seconds": _number(value.get("seconds")),
            "voice": as_ == "voice" or None,
            "animated": value.get("isAnimated") is True or None,
        }
        keys = _present(
            {
                "mediaKey": _base64(value.get("mediaKey")),
                "directPath": _link(value, "directPath"),
                "url": _link(value, "url"),
                "mimetype": mime_type,
                "messageType": kind,
            }
        )
        file = None
        if "mediaKey" in keys and ("directPath" in keys or "url" in keys):
            file = File(None, as_, mime_type, sha256, filename, keys=keys)
        return Content(as_, {as_: _present(said)}, file)

    return read


def _location(value: Any) -> Content | None:
    if type(value) is not dict:
        return None
    place = {
        "latitude": _number(value.get("degreesLatitude")),
        "longitude": _number(value.get("degreesLongitude")),
        "name": text_of(value, "name", MAX_NAME),
        "address": text_of(value, "address", _MAX_LINK),
        "url": text_of(value, "url", _MAX_LINK),
    }
    return Content("location", {"location": _present(place)}) if place["latitude"] is not None else None


def _live_location(value: Any) -> Content | None:
    place = _location(value)
    if place is None:
        return None
    more = _present({"live": True, "caption": text_of(value, "caption", _MAX_LINK)})
    return Content("location", {"location": place.body["location"] | more})


def _contact(value: Any) -> Content | None:
    return Content("contacts", {"contacts": [_card(value)]}) if type(value) is dict else None


def _contacts(value: Any) -> Content | None:
    cards = value.get("contacts") if type(value) is dict else None
    if type(cards) is not list:
        return None
    return Content("contacts", {"contacts": [_card(one) for one in cards[:_MAX_CONTACTS] if type(one) is dict]})


def _card(value: dict[str, Any]) -> dict[str, Any]:
    """One contact; its vCard is kept as text, for only its phones are read from it."""
    vcard = text_of(value, "vcard", _MAX_VCARD)
    name = text_of(value, "displayName", MAX_NAME)
    card = {"name": {"formatted_name": name} if name else None, "phones": _phones(vcard or "") or None, "vcard": vcard}
    return _present(card)


def _phones(vcard: str) -> list[dict[str, str]]:
    phones: list[dict[str, str]] = []
    for line in vcard.splitlines():
        match = _TEL.fullmatch(line.strip()[:MAX_NAME])
        if match and len(phones) < _MAX_PHONES:
            waid = _WAID.search(match[1])
            phones.append({"phone": match[2].strip()} | ({"wa_id": waid[1]} if waid else {}))
    return phones


def _reaction(value: Any) -> Content | None:
    key = value.get("key") if type(value) is dict else None
    target = id_of(key, "id") if type(key) is dict else None
    if target is None:
        return None
    emoji = text_of(value, "text", MAX_TYPE) or ""  # none: it is taken back
    return Content("reaction", {"reaction": {"message_id": target, "emoji": emoji}})


def _protocol(value: Any) -> Content | None:
    """An edit or a deletion of an earlier message, as Meta tells them; all else is for devices alone."""
    if type(value) is not dict:
        return None
    key, type_ = value.get("key"), value.get("type")
    target = id_of(key, "id") if type(key) is dict else None
    edited = value.get("editedMessage")
    if target is not None and type(edited) is dict and _is_of(type_, _EDITED):
        new = content(edited)
        if new is not None and new.type not in ("edit", "protocol"):
            message = {"type": new.type, **new.body}
            return Content("edit", {"edit": {"original_message_id": target, "message": message}}, new.file)
    elif target is not None and _is_of(type_, _DELETED):
        return Content("revoke", {"revoke": {"original_message_id": target}})
    said = type_ if type(type_) is int else text_of(value, "type", MAX_TYPE)
    return Content("protocol", _present({"type": said}), is_protocol=True)


def _is_of(type_: Any, kinds: tuple[int | str, ...]) -> bool:
    """Python finds that `False`, and 0.0, is among numbers with a zero: neither is a kind."""
    return type_ is None or (type(type_) in (int, str) and type_ in kinds)


def _buttons_reply(value: Any) -> Content | None:
    return _reply("button_reply", value, "selectedButtonId", "selectedDisplayText")


def _list_reply(value: Any) -> Content | None:
    if type(value) is not dict or type(value.get("singleSelectReply")) is not dict:
        return None
    row = {"id": text_of(value["singleSelectReply"], "selectedRowId", _MAX_LINK)}
    said = row | {"title": text_of(value, "title", _MAX_LINK), "description": text_of(value, "description", _MAX_LINK)}
    return Content("interactive", {"interactive": {"type": "list_reply", "list_reply": _present(said)}})


def _reply(kind: str, value: Any, id_: str, title: str) -> Content | None:
    if type(value) is not dict:
        return None
    said = _present({"id": text_of(value, id_, _MAX_LINK), "title": text_of(value, title, _MAX_LINK)})
    return Content("interactive", {"interactive": {"type": kind, kind: said}}) if said else None


def _template_reply(value: Any) -> Content | None:
    if type(value) is not dict:
        return None
    payload, text = text_of(value, "selectedId", _MAX_LINK), text_of(value, "selectedDisplayText", _MAX_LINK)
    return Content("button", {"button": _present({"payload": payload, "text": text})}) if payload or text else None


def _flow_reply(value: Any) -> Content | None:
    flow = value.get("nativeFlowResponseMessage") if type(value) is dict else None
    if type(flow) is not dict:
        return None
    body = value.get("body")
    said = {
        "name": text_of(flow, "name", MAX_NAME),
        "body": text_of(body, "text", _MAX_LINK) if type(body) is dict else None,
        "response_json": text_of(flow, "paramsJson", _MAX_KEPT),
    }
    return Content("interactive", {"interactive": {"type": "nfm_reply", "nfm_reply": _present(said)}})


_READERS: dict[str, Callable[[Any], Content | None]] = {
    "conversation": _conversation,
    "extendedTextMessage": _extended,
    "imageMessage": _media("image"),
    "videoMessage": _media("video"),
    "ptvMessage": _media("video"),
    "audioMessage": _media("audio"),
    "documentMessage": _media("document"),
    "stickerMessage": _media("sticker"),
    "locationMessage": _location,
    "liveLocationMessage": _live_location,
    "contactMessage": _contact,
    "contactsArrayMessage": _contacts,
    "reactionMessage": _reaction,
    "protocolMessage": _protocol,
    "buttonsResponseMessage": _buttons_reply,
    "listResponseMessage": _list_reply,
    "templateButtonReplyMessage": _template_reply,
    "interactiveResponseMessage": _flow_reply,
}


# -- single values ---------------------------------------------------------------------------------------------------


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _number(value: Any) -> int | float | None:
    if type(value) is int:
        return value if abs(value) < 2**53 else None
    return value if type(value) is float else None


def _whole(holder: dict[str, Any], key: str) -> str | None:
    """A text that somebody wrote, however long."""
    value = holder.get(key)
    return value or None if type(value) is str else None


def _link(holder: dict[str, Any], key: str) -> str | None:
    """A whole address or none: half of one leads nowhere."""
    value = holder.get(key)
    return value if type(value) is str and 0 < len(value) <= _MAX_LINK else None


def _base64(value: Any) -> str | None:
    """Bytes as base64. Gateways that forget to encode them send what JavaScript makes of a byte array: an object of
    numbers by index, or `{"type": "Buffer", "data": [numbers]}`."""
    if type(value) is str:
        return value if 0 < len(value) <= 2 * _MAX_BYTES else None
    if type(value) is dict:
        value = value["data"] if type(value.get("data")) in (list, str) else list(value.values())
        if type(value) is str:
            return _base64(value)
    if type(value) is not list or not 0 < len(value) <= _MAX_BYTES:
        return None
    if any(type(one) is not int or not 0 <= one < 256 for one in value):
        return None
    return base64.b64encode(bytes(value)).decode()
