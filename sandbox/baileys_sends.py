"""Messages that a Baileys gateway is asked to send: what each dialect's request says, and what is answered."""

import base64
import binascii
import re
import time
from typing import Any, NamedTuple

from sandbox import multipart
from sandbox.answers import Answer
from sandbox.baileys_words import Who
from sandbox.megaapi_faults import told
from sandbox.meta import JSON

FILES = ("image", "video", "audio", "document", "sticker")
_WAHA = {
    "sendText": "text",
    "sendImage": "image",
    "sendVideo": "video",
    "sendVoice": "audio",
    "sendFile": "document",
    "sendLocation": "location",
    "sendContactVcard": "contacts",
}
_EVOLUTION = {
    "sendText": "text",
    "sendMedia": "media",
    "sendWhatsAppAudio": "audio",
    "sendSticker": "sticker",
    "sendLocation": "location",
    "sendContact": "contacts",
}


class WrongShape(Exception):
    """The request is not what this gateway takes; the message says why."""


class Asked(NamedTuple):
    """A message to send. `to` is a JID; the file is in `data`, or behind `url`."""

    to: str
    type: str
    text: str = ""
    data: bytes | None = None
    url: str | None = None
    mime_type: str = ""
    filename: str | None = None
    quoted: str | None = None

    def content(self) -> JSON:
        """As WhatsApp gets it."""
        if self.type == "text":
            return {"extendedTextMessage": {"text": self.text}}
        caption = {"caption": self.text} if self.text else {}
        name = {"fileName": self.filename} if self.filename else {}
        if self.type in FILES:
            return {f"{self.type}Message": {"mimetype": self.mime_type, **caption, **name}}
        return {f"{'contact' if self.type == 'contacts' else self.type}Message": {"displayName": self.text}}


def asked(dialect: str, what: str, body: Any, raw: bytes | bytearray, content_type: str) -> Asked:
    """What the request says. Raises WrongShape."""
    if dialect in ("whaticket", "ticketz"):
        return _whaticket(body, raw, content_type)
    if not isinstance(body, dict):
        raise WrongShape("the body is no JSON object")
    if dialect == "evolution":
        return _evolution(what, body)
    return _waha(what, body) if dialect == "waha" else _fazer(body)


def answered(who: Who, key: JSON, content: JSON, *, with_id: bool) -> Answer:
    """What the gateway says of a message that it took."""
    now = int(time.time())
    match who.dialect:
        case "evolution":
            value: JSON = {"pushName": who.name, "status": "PENDING", "message": content, "contextInfo": None}
            value |= {"messageType": next(iter(content)), "messageTimestamp": now, "instanceId": f"id-{who.session}"}
            return told(201, {"key": key, **value} if with_id else value)
        case "waha":
            id = f"true_{key['remoteJid'].replace('@s.whatsapp.net', '@c.us')}_{key['id']}"
            return told(201, {"id": id, "timestamp": now, "_data": {"key": key}} if with_id else {"timestamp": now})
        case "fazer":
            return told(200, {"data": {"key": key, "messageTimestamp": now} if with_id else None})
    return told(200, {"mensagem": "Mensagem enviada", **({"key": key} if with_id else {})})


def read_keys(dialect: str, body: Any) -> list[JSON]:
    """The messages that are marked as read. Raises WrongShape."""
    if not isinstance(body, dict):
        raise WrongShape("the body is no JSON object")
    if dialect == "waha":
        return [{"remoteJid": _text(body, "chatId"), "id": body.get("messageId")}]
    keys = body.get("readMessages" if dialect == "evolution" else "keys")
    if not isinstance(keys, list) or not all(isinstance(key, dict) and "id" in key for key in keys):
        raise WrongShape("no keys of messages")
    return keys


# Requests


def _whaticket(body: Any, raw: bytes | bytearray, content_type: str) -> Asked:
    if content_type.startswith("multipart/form-data"):
        parts = multipart.parts(raw, content_type)
        if parts is None or "number" not in parts:
            raise WrongShape("the form is broken, or has no number")
        fields = {name: bytes(part.data) for name, part in parts.items()}
        number, text = fields["number"].decode(), fields.get("body", b"").decode()
        if "medias" not in parts:
            raise WrongShape("a form without a file sends nothing")
        file = parts["medias"]
        mime_type = file.content_type or "application/octet-stream"
        return Asked(_jid(number), _kind(mime_type), text, bytes(file.data), None, mime_type, file.filename)
    if not isinstance(body, dict):
        raise WrongShape("the body is no JSON object")
    return Asked(_jid(_text(body, "number")), "text", _text(body, "body"))


def _evolution(what: str, body: JSON) -> Asked:
    type = _EVOLUTION.get(what)
    to = _jid(_text(body, "number"))
    quoted = body.get("quoted")
    id = quoted["key"]["id"] if isinstance(quoted, dict) and isinstance(quoted.get("key"), dict) else None
    if type is None:
        raise WrongShape(f"no way to send {what}")
    if type == "text":
        return Asked(to, type, _text(body, "text"), quoted=id)
    if type in ("location", "contacts"):
        return Asked(to, type, str(body.get("name", "")), quoted=id)
    if type == "media":
        type = _text(body, "mediatype")
        if type not in FILES:
            raise WrongShape("mediatype is not one of image, document, video or audio")
    data, url = _content(_text(body, "audio" if what == "sendWhatsAppAudio" else "media"))
    name, mime_type = body.get("fileName"), str(body.get("mimetype", ""))
    return Asked(to, type, str(body.get("caption") or ""), data, url, mime_type, name, id)


def _waha(what: str, body: JSON) -> Asked:
    type = _WAHA.get(what)
    if type is None:
        raise WrongShape(f"no way to send {what}")
    to = _text(body, "chatId").replace("@c.us", "@s.whatsapp.net")
    _text(body, "session")
    more: JSON = {"quoted": body.get("reply_to")}
    if type == "text":
        return Asked(to, type, _text(body, "text"), **more)
    if type in ("location", "contacts"):
        return Asked(to, type, str(body.get("title", "")), **more)
    file = body.get("file")
    if not isinstance(file, dict):
        raise WrongShape("no file")
    data, url = _content(_text(file, "data" if "data" in file else "url"))
    name, mime_type = file.get("filename"), _text(file, "mimetype")
    return Asked(to, type, str(body.get("caption") or ""), data, url, mime_type, name, **more)


def _fazer(body: JSON) -> Asked:
    content = body.get("messageContent")
    if not isinstance(content, dict):
        raise WrongShape("no messageContent")
    to = _text(body, "jid")
    if "text" in content:
        return Asked(to, "text", _text(content, "text"))
    type = next((name for name in FILES if name in content), None)
    if type is None:
        raise WrongShape("a messageContent of no kind")
    data, url = _content(_text(content, type))
    mime_type = str(content.get("mimetype", ""))
    return Asked(to, type, str(content.get("caption") or ""), data, url, mime_type, content.get("fileName"))


def _text(body: JSON, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise WrongShape(f"no {name}")
    return value


def _jid(number: str) -> str:
    if "@" in number:
        return number
    digits = re.sub(r"\D", "", number)
    if not 5 <= len(digits) <= 20:
        raise WrongShape("the number is no number")
    return f"{digits}@s.whatsapp.net"


def _content(given: str) -> tuple[bytes | None, str | None]:
    """The bytes of base64, or the link."""
    if given.startswith(("http://", "https://")):
        return None, given
    text = given.partition(";base64,")[2] if given.startswith("data:") else given
    try:
        return base64.b64decode(text, validate=True), None
    except (binascii.Error, ValueError) as error:
        raise WrongShape("the file is no base64") from error


def _kind(mime_type: str) -> str:
    kind = mime_type.partition("/")[0]
    return kind if kind in ("image", "video", "audio") else "document"
