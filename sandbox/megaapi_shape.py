"""What a request to MegaAPI must look like (megaapi.md, Sending). Stricter than the real one, so that mistakes show."""

import base64
import binascii
import re
from collections.abc import Callable
from typing import Any

import httpx

from sandbox.megaapi_files import SHORT
from sandbox.meta import JSON

JID = re.compile(r"[0-9]{5,20}@(s\.whatsapp\.net|lid)|[0-9]{5,30}(-[0-9]{5,15})?@g\.us")
_DATA = re.compile(r"data:([^;,]+(?:;[^;,]+)*);base64,")
_MIME = re.compile(r"[a-z]+/[A-Za-z0-9.+-]+(; ?[a-z]+=[A-Za-z0-9.+-]+)*")

Check = Callable[[Any], bool]
Fields = dict[str, Check]


class WrongShape(Exception):
    """The message says what is wrong, and holds nothing of the request."""


def message_data(body: Any, path: str) -> JSON:
    """The `messageData` of a request to send through this path, checked. Raises WrongShape."""
    needed, allowed = _SENDING[path]
    data = _only(body, "messageData")
    _check(data, {"to": _is_jid, **needed}, allowed, "messageData")
    return data


def webhook_data(body: Any) -> JSON:
    data = _only(body, "messageData")
    _check(data, {"webhookUrl": _is_url_or_empty, "webhookEnabled": _is_bool}, {}, "messageData")
    return data


def read_key(body: Any) -> JSON:
    """The key of the message to mark as read."""
    data = _only(body, "messageData")
    _check(data, {"key": _is_key}, {}, "messageData")
    found: JSON = data["key"]
    return found


def media_keys(body: Any) -> JSON:
    data = _only(body, "messageKeys")
    needed: Fields = {name: _is_words for name in ("mediaKey", "directPath", "url", "mimetype")}
    _check(data, {**needed, "messageType": lambda value: value in SHORT}, {}, "messageKeys")
    return data


def file_of(data: JSON) -> bytes:
    """The bytes of `base64`, plain or as a data URI whose type is that of `mimeType`. Raises WrongShape."""
    text: str = data["base64"]
    prefix = _DATA.match(text)
    if prefix is not None:
        if prefix[1] != data["mimeType"]:
            raise WrongShape("messageData.base64 is of another type than mimeType")
        text = text[prefix.end() :]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise WrongShape("messageData.base64 is no base64") from error


def _only(body: Any, name: str) -> JSON:
    if not isinstance(body, dict):
        raise WrongShape("the body is no JSON object")
    if list(body) != [name] or not isinstance(body[name], dict):
        raise WrongShape(f"the body is not an object {name} and nothing else")
    found: JSON = body[name]
    return found


def _check(data: JSON, needed: Fields, allowed: Fields, where: str) -> None:
    for name, is_good in needed.items():
        if name not in data:
            raise WrongShape(f"{where}.{name} is missing")
        if not is_good(data[name]):
            raise WrongShape(f"{where}.{name} is not what it should be")
    for name, value in data.items():
        if name not in needed and not allowed.get(name, _never)(value):
            raise WrongShape(f"{where} has something it should not have: {name if name in allowed else 'another key'}")


def _never(value: object) -> bool:
    return False


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _is_words(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_jid(value: object) -> bool:
    return isinstance(value, str) and JID.fullmatch(value) is not None


def _is_mime(value: object) -> bool:
    return isinstance(value, str) and _MIME.fullmatch(value) is not None


def _is_url(value: object) -> bool:
    try:
        url = httpx.URL(value) if isinstance(value, str) else None
    except httpx.InvalidURL:
        return False
    return url is not None and url.scheme in ("http", "https") and bool(url.host)


def _is_url_or_empty(value: object) -> bool:
    return value == "" or _is_url(value)


def _is_key(value: object) -> bool:
    if not isinstance(value, dict) or not value.keys() <= _KEY | {"participant"} or not value.keys() >= _KEY:
        return False
    return (
        _is_jid(value["remoteJid"])
        and _is_bool(value["fromMe"])
        and _is_words(value["id"])
        and ("participant" not in value or _is_jid(value["participant"]))
    )


_KEY = {"remoteJid", "fromMe", "id"}


def _is_vcard(value: object) -> bool:
    names = {"fullName", "displayName", "phoneNumber"}
    if not isinstance(value, dict) or not names <= value.keys() <= names | {"organization"}:
        return False
    return all(isinstance(one, str) for one in value.values()) and all(value[name] for name in names)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and bool(value)


_FILE: Fields = {
    "fileName": _is_words,
    "type": lambda value: value in ("image", "audio", "video", "document"),
    "mimeType": _is_mime,
}
_OF_A_FILE: Fields = {"caption": _is_string, "gifPlayback": _is_bool, "viewOnce": _is_bool}
_SENDING: dict[str, tuple[Fields, Fields]] = {
    "text": ({"text": _is_words}, {"linkPreview": _is_bool, "isGroup": _is_bool}),
    "mediaUrl": ({"url": _is_url, **_FILE}, _OF_A_FILE),
    "mediaBase64": ({"base64": _is_words, **_FILE}, _OF_A_FILE),
    "location": (
        {"latitude": _is_number, "longitude": _is_number},
        {"address": _is_string, "caption": _is_string},
    ),
    "contactMessage": ({"vcard": _is_vcard}, {}),
    "quoteMessage": ({"text": _is_words, "key": _is_key, "message": _is_message}, {}),
}
PATHS = tuple(_SENDING)
