"""Sending by MegaAPI (megaapi.md, "Sending", "Retry rules").

POST /rest/sendMessage/{key}/text | mediaUrl | mediaBase64 | location | contactMessage | quoteMessage
POST /rest/chat/{key}/readMessage

No call carries an id of ours, so none may be repeated in doubt: whatever does not say clearly that nothing was sent is
an unknown outcome. Nothing is handed over beforehand: a file of ours goes along with its message, as base64.
"""

import binascii
import mimetypes
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

from pombal.errors import Permanent
from providers import guard, http
from providers.download import allowance
from providers.instance import InstanceFault
from providers.megaapi import (
    EDGE_WAIT,
    THROTTLE_WAIT,
    MegaApi,
    Place,
    call,
    is_edge_block,
    is_error,
    json_object,
    message_of,
    shown,
    wait_of,
)
from providers.outbound import Answer, Attachment, Fault, Kind, Outcome, Outgoing, Quoted, Scope
from providers.sniff import extension

_BY_LINK = 60.0  # seconds: the gateway fetches the file before it answers
_STANDING = 8.0  # seconds for the question how the instance stands
_REJECTED = "rejected"
_MOST_TEXT = 500  # characters of the provider's reason
_TRIES = 6  # of a message that met trouble at the provider
_PIECE = 192 * 1024  # bytes encoded at once; a multiple of 3
_MOST_NAME = 240
_ID = re.compile(r"[\x21-\x7e]{1,512}")
_PHONE = re.compile(r"\+[0-9]{5,20}")
_JID = re.compile(r"[0-9A-Za-z._:-]{1,128}@[a-z.]{1,32}")
_NOT_IN_A_NAME = re.compile(r"[\x00-\x1f\x7f/\\\"<>|?*:]+")
_FILES = ("image", "video", "audio", "document")
_NOT_REACHED = (521, 523)  # of the edge: it came to no machine of the host
# Where only the link is known, and it does not tell.
_USUAL = {
    "image": "image/jpeg",
    "video": "video/mp4",
    "audio": "audio/ogg; codecs=opus",
    "document": "application/octet-stream",
}


class MegaSender:
    """The way out of one instance. Never repeats a call by itself.

    A call ends after `deadline` seconds in all; if that is not given, after 30, with a link 60, and with a file what
    its size allows.
    """

    def __init__(
        self, clients: http.Clients, host: str, instance_key: str, token: str, *, deadline: float | None = None
    ) -> None:
        self._clients = clients
        self._place = Place(host, instance_key, token)
        self._instance = MegaApi(clients, host, instance_key, token)
        self._deadline = deadline

    async def send(self, message: Outgoing) -> Answer:
        """What became of the call. What the attachment's `chunks` raises comes out as it is."""
        if self._place.wrong:
            return _refusal(Kind.AUTH, "misconfigured", self._place.wrong)
        if not self._place.has_token:
            return _refusal(Kind.AUTH, "no_token", "this channel has no token")
        try:
            path, data = payload(message)
        except Unsendable as error:
            return _refusal(Kind.PERMANENT, error.code, error.text)
        file = message.attachment if path == _BASE64 else None
        try:
            if file is None:
                deadline = self._deadline or (_BY_LINK if path == _URL else http.DEADLINE)
                content = msgspec.json.encode({"messageData": data})
                reply = await self._post(path, content, deadline=deadline, is_patient=path == _URL)
            else:
                body, size = _with_file(data, file)
                deadline = self._deadline or allowance(size)
                reply = await self._post(path, body, size=size, deadline=deadline, is_patient=True)
        except guard.BlockedAddress:
            text = "the gateway's host leads to an address that is not public"
            fault = Fault(Kind.AUTH, Scope.CHANNEL, "blocked_address", text)
            return Answer(Outcome.NOT_SENT, fault=fault, why="blocked_address")
        except http.NoReply as error:
            outcome = Outcome.UNKNOWN if error.has_left else Outcome.NOT_SENT
            return Answer(outcome, http_status=error.status, why=error.why)
        answer = read(reply)
        if answer.fault is not None and answer.fault.code == _REJECTED:
            return await self._explained(answer)
        return answer

    async def _explained(self, answer: Answer) -> Answer:
        """A refusal concerns the message only while the instance is connected: what the gateway's words for the other
        case are, nobody knows, so it is asked how the instance stands. It may have come back just now, though."""
        try:
            status = (await self._instance.status(_STANDING)).status
        except InstanceFault:
            status = None
        if status == "connected" and answer.fault is not None:
            fault = msgspec.structs.replace(answer.fault, is_of_a_moment=True)
        elif status == "disconnected":
            fault = Fault(Kind.SESSION, Scope.CHANNEL, "disconnected", "the channel's session is not connected")
        else:
            text = answer.fault.text if answer.fault else ""
            fault = Fault(Kind.TRANSIENT, Scope.MESSAGE, _REJECTED, text, tries=_TRIES)
        return msgspec.structs.replace(answer, fault=fault)

    async def upload(self, file: Attachment) -> Answer:
        """Nothing is handed over beforehand: raises `Permanent`."""
        raise Permanent("a file goes along with its message by this gateway")

    async def _post(self, path: str, content: bytes | AsyncIterator[bytes], **more: Any) -> http.Reply:
        return await call(self._clients, self._place, "POST", path, content, **more)


class Unsendable(Exception):
    """A message that this gateway cannot be asked to send. The text is for the tenant."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(code)
        self.code, self.text = code, text


# -------------------------------------------------------------------------------------------------------- what leaves

_TEXT, _QUOTE = "/rest/sendMessage/{key}/text", "/rest/sendMessage/{key}/quoteMessage"
_URL, _BASE64 = "/rest/sendMessage/{key}/mediaUrl", "/rest/sendMessage/{key}/mediaBase64"
_LOCATION, _CONTACT = "/rest/sendMessage/{key}/location", "/rest/sendMessage/{key}/contactMessage"
_READ = "/rest/chat/{key}/readMessage"


def payload(message: Outgoing) -> tuple[str, dict[str, Any]]:
    """Path and `messageData` of a send; of one with an attachment all but the file. Raises `Unsendable`."""
    to = jid(message.recipient)
    element = message.body.get(message.type)
    if message.type == "read" and isinstance(element, dict):
        return _READ, {"key": _read_key(to, element, message.quoted)}
    is_reply = "context" in message.body
    if message.type == "text" and isinstance(element, dict):
        if not is_reply:
            preview = {"linkPreview": element["preview_url"]} if "preview_url" in element else {}
            return _TEXT, {"to": to, "text": element["body"], **preview}
        if message.quoted is None:
            raise Unsendable("unknown_reference", "the message that this one answers is not known any more")
        quoted = message.quoted
        return _QUOTE, {"to": to, "text": element["body"], "key": _key(to, quoted), "message": _quoted(quoted)}
    if is_reply:
        raise Unsendable("unsupported", "only a text can answer another message by this gateway")
    if message.type in _FILES and isinstance(element, dict):
        return _file(to, message.type, element, message.attachment)
    if message.type == "location" and isinstance(element, dict):
        address, name = element.get("address"), element.get("name")
        place = {"latitude": element["latitude"], "longitude": element["longitude"]}
        return _LOCATION, {"to": to, "address": address or "", "caption": name or "", **place}
    if message.type == "contacts" and isinstance(element, list):
        return _CONTACT, {"to": to, "vcard": _card(element)}
    raise Unsendable("unsupported", f"a message of type {message.type} cannot be sent by this gateway")


def jid(recipient: str | None) -> str:
    """A recipient as WhatsApp Web writes it. Raises `Unsendable` for one that it has no word for."""
    if recipient and _PHONE.fullmatch(recipient):
        return f"{recipient[1:]}@s.whatsapp.net"
    if recipient and _JID.fullmatch(recipient):
        return recipient
    raise Unsendable("bad_recipient", "this gateway reaches phone numbers, groups and JIDs")


def _key(chat: str, quoted: Quoted) -> dict[str, Any]:
    author = {"participant": quoted.author} if quoted.author else {}
    return {"remoteJid": chat, "fromMe": quoted.is_ours, "id": quoted.provider_id, **author}


def _read_key(chat: str, element: Mapping[str, Any], quoted: Quoted | None) -> dict[str, Any]:
    if quoted is not None:
        return _key(chat, quoted)
    return {"remoteJid": chat, "fromMe": False, "id": element["message_id"]}


def _quoted(quoted: Quoted) -> dict[str, Any]:
    """As much of a message as its quote shows: its text, or what kind of file it was."""
    element = quoted.body.get(quoted.type)
    if isinstance(element, dict):
        text = element.get("body")
        if quoted.type == "text" and isinstance(text, str):
            return {"conversation": text}
        kind = {"voice": "audio"}.get(quoted.type, quoted.type)
        if kind in (*_FILES, "sticker"):
            names = {"mime_type": "mimetype", "caption": "caption", "filename": "fileName"}
            return {f"{kind}Message": {new: element[old] for old, new in names.items() if _text(element.get(old))}}
        if kind == "location":
            names = {"latitude": "degreesLatitude", "longitude": "degreesLongitude", "name": "name"}
            return {"locationMessage": {new: element[old] for old, new in names.items() if old in element}}
    return {"conversation": ""}


def _file(to: str, type_: str, element: Mapping[str, Any], file: Attachment | None) -> tuple[str, dict[str, Any]]:
    link, given = _text(element.get("link")), _text(element.get("filename"))
    data = {"to": to, "type": type_, "caption": _text(element.get("caption")) or ""}
    if file is not None:
        name = _name(given) or _named_by(file.mime_type)
        return _BASE64, {**data, "fileName": name, "mimeType": file.mime_type}
    if link is None:
        raise Unsendable("unsupported", "a file goes by link or from our own storage by this gateway")
    path = _path_of(link)
    mime = _text(element.get("mime_type")) or mimetypes.guess_type(path)[0] or _USUAL[type_]
    name = _name(given) or _name_in(path) or _named_by(mime)
    return _URL, {**data, "url": link, "fileName": name, "mimeType": mime}


def _card(cards: list[Any]) -> dict[str, str]:
    card = cards[0] if len(cards) == 1 and isinstance(cards[0], dict) else {}
    phones = card.get("phones")
    phone = phones[0] if isinstance(phones, list) and phones and isinstance(phones[0], dict) else {}
    digits = re.sub(r"[^0-9]", "", str(phone.get("wa_id") or phone.get("phone") or ""))
    name = _text(card["name"].get("formatted_name")) if isinstance(card.get("name"), dict) else None
    if not digits or name is None:
        raise Unsendable("unsupported", "a contacts message holds one contact with a phone number by this gateway")
    company = _text(card["org"].get("company")) if isinstance(card.get("org"), dict) else None
    return {"fullName": name, "displayName": name, "organization": company or "", "phoneNumber": digits}


def _path_of(link: str) -> str:
    try:
        return unquote(urlsplit(link).path)
    except ValueError:  # the gateway says what it thinks of it
        return ""


def _name_in(path: str) -> str | None:
    name = _name(path.rpartition("/")[2])
    return name if name and "." in name.strip(".") else None


def _named_by(mime_type: str) -> str:
    return f"file{extension(mime_type.partition(';')[0].strip().lower())}"


def _name(given: Any) -> str | None:
    """A file's name without any path; None when nothing is left of it."""
    name = _NOT_IN_A_NAME.sub("_", given).strip(" .")[-_MOST_NAME:] if isinstance(given, str) else ""
    return name if name.strip("_") else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _with_file(data: dict[str, Any], file: Attachment) -> tuple[AsyncIterator[bytes], int]:
    """The request's body, made while it is sent, and its exact length."""
    before = msgspec.json.encode({"messageData": data})[:-2] + b',"base64":"'
    after = b'"}}'
    size = len(before) + (file.size + 2) // 3 * 4 + len(after)
    return _around(before, file.chunks, after), size


async def _around(before: bytes, chunks: AsyncIterator[bytes], after: bytes) -> AsyncIterator[bytes]:
    yield before
    rest = b""
    async for chunk in chunks:
        text = memoryview(rest + chunk if rest else chunk)
        whole = len(text) // 3 * 3
        for at in range(0, whole, _PIECE):
            yield binascii.b2a_base64(text[at : min(at + _PIECE, whole)], newline=False)
        rest = bytes(text[whole:])
    if rest:
        yield binascii.b2a_base64(rest, newline=False)
    yield after


# ----------------------------------------------------------------------------------------------------- what came back


def read(reply: http.Reply) -> Answer:
    """What MegaAPI's answer to a send means."""
    body, status = json_object(reply.body), reply.status
    if 200 <= status < 300:
        return _answered(reply, body)
    if 300 <= status < 400:
        return _refusal(Kind.AUTH, "redirect", "the gateway's host sends us elsewhere: set the right one", status)
    if status in _NOT_REACHED:
        return _trouble(status, "the gateway's host could not be reached behind its edge")
    # Of a 500 it is not certain: a send that timed out inside the gateway may have left it.
    if status == 503 and body is not None and _is_its_own(body):
        return _trouble(status, _reason(body))
    if status >= 500:
        return Answer(Outcome.UNKNOWN, http_status=status, why=f"HTTP {status}")
    if status == 429:
        wait = wait_of(reply, THROTTLE_WAIT)
        return _refusal(Kind.THROTTLE, "throttled", "the gateway wants fewer requests", status, wait=wait)
    if is_edge_block(reply):
        wait = wait_of(reply, EDGE_WAIT)
        return _refusal(
            Kind.THROTTLE, "edge_blocked", "the edge in front of the gateway turns us away", status, wait=wait
        )
    if status in _OF_THE_CHANNEL:
        code, text = _OF_THE_CHANNEL[status]
        return _refusal(Kind.AUTH, code, text, status)
    if status == 408:
        return _trouble(status, "the gateway did not wait for the request")
    code = "bad_request" if status == 400 else f"http_{status}"
    return _refusal(Kind.PERMANENT, code, _reason(body or {}), status)


_OF_THE_CHANNEL = {
    401: ("unauthorized", "the gateway does not take the channel's token"),
    403: ("forbidden", "the gateway does not let the channel's token do this"),
    404: ("not_found", "the gateway knows no such instance"),
}


def _answered(reply: http.Reply, body: dict[str, Any] | None) -> Answer:
    if body is None:
        return Answer(Outcome.UNKNOWN, http_status=reply.status, why="an answer that is not MegaAPI's")
    if is_error(body):
        return _refusal(Kind.PERMANENT, _REJECTED, _reason(body), reply.status)
    data = body.get("messageData")
    if not isinstance(data, dict) and "error" not in body and "erro" not in body:
        return Answer(Outcome.UNKNOWN, http_status=reply.status, why="an answer that does not say what became of it")
    key = data.get("key") if isinstance(data, dict) else None
    id_ = key.get("id") if isinstance(key, dict) else None
    known = id_ if isinstance(id_, str) and _ID.fullmatch(id_) else None  # "Responses": whether it comes is not known
    return Answer(Outcome.ACCEPTED, provider_id=known, http_status=reply.status)


def _is_its_own(body: Mapping[str, Any]) -> bool:
    """An error that the gateway itself wrote, in one of its two forms; not a page of some machine on the way."""
    return is_error(body) or (isinstance(body.get("name"), str) and "message" in body and "status" in body)


def _reason(body: Mapping[str, Any]) -> str:
    return shown(message_of(body), _MOST_TEXT) or "the gateway gave no reason"


def _trouble(status: int, text: str) -> Answer:
    fault = Fault(Kind.TRANSIENT, Scope.MESSAGE, f"http_{status}", text, tries=_TRIES, is_outage=True)
    return Answer(Outcome.REFUSED, http_status=status, fault=fault)


def _refusal(kind: Kind, code: str, text: str, status: int | None = None, *, wait: float = 0.0) -> Answer:
    scope = {Kind.AUTH: Scope.CHANNEL, Kind.THROTTLE: Scope.NUMBER}.get(kind, Scope.MESSAGE)
    return Answer(Outcome.REFUSED, http_status=status, fault=Fault(kind, scope, code, text, wait=wait))
