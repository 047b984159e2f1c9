"""Sending by MegaAPI (megaapi.md, "Sending", "Retry rules").

POST /rest/sendMessage/{key}/text | mediaUrl | mediaBase64 | location | contactMessage | quoteMessage
POST /rest/chat/{key}/readMessage

No call carries an id of ours, so none may be repeated in doubt: whatever does not say clearly that nothing was sent is
an unknown outcome. Nothing is handed over beforehand: a file of ours goes along with its message, as base64.
"""

from collections.abc import AsyncIterator, Mapping
from typing import Any
from uuid import uuid4

import msgspec

from pombal.errors import Permanent
from providers import http
from providers.download import allowance
from providers.gateway import SessionLook
from providers.gateway_calls import json_object
from providers.gateway_sends import (
    BY_LINK,
    DOUBTFUL,
    FILES,
    ID,
    OF_A_CALL,
    REJECTED,
    Unsendable,
    card_of,
    explained,
    file_of,
    jid,
    key_of,
    posted,
    quoted_content,
    read_key,
    reason,
    refused,
    text_of,
    verdict,
    with_file,
)
from providers.instance import InstanceFault
from providers.megaapi import MegaApi, Place, is_error, message_of
from providers.outbound import Answer, Attachment, Kind, Outcome, Outgoing

_STANDING = 8.0  # seconds for the question how the instance stands
_STATES: dict[str | None, SessionLook] = {"connected": "open", "disconnected": "closed"}


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
            return refused(Kind.AUTH, "misconfigured", self._place.wrong)
        if not self._place.has_token:
            return refused(Kind.AUTH, "no_token", "this channel has no token")
        try:
            path, data = payload(message)
        except Unsendable as error:
            return refused(Kind.PERMANENT, error.code, error.text)
        file = message.attachment if path == _BASE64 else None
        if file is None:
            deadline = self._deadline or (BY_LINK if path == _URL else http.DEADLINE)
            content = msgspec.json.encode({"messageData": data})
            reply = await self._post(path, content, deadline=deadline, is_patient=path == _URL)
        else:
            mark = uuid4().hex
            body, size = with_file({"messageData": {**data, "base64": mark}}, mark, file)
            deadline = self._deadline or allowance(size)
            reply = await self._post(path, body, size=size, deadline=deadline, is_patient=True)
        if isinstance(reply, Answer):
            return reply
        answer, said = read(reply), json_object(reply.body) or {}
        code = answer.fault.code if answer.fault else ""
        if code in OF_A_CALL or (code in DOUBTFUL and _is_its_own(said)):
            return explained(answer, await self._state(), message_of(said), message)
        return answer

    async def _state(self) -> SessionLook | None:
        """How the instance stands, as `explained` takes it. A look that is refused each time leaves it unknown, too:
        nobody knows this gateway's words for a closed one."""
        try:
            return _STATES.get((await self._instance.status(_STANDING)).status, "unknown")
        except InstanceFault:
            return "unknown"

    async def upload(self, file: Attachment) -> Answer:
        """Nothing is handed over beforehand: raises `Permanent`."""
        raise Permanent("a file goes along with its message by this gateway")

    async def _post(self, path: str, content: bytes | AsyncIterator[bytes], **more: Any) -> http.Reply | Answer:
        return await posted(self._clients, self._place, "POST", path, content, **more)


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
        return _READ, {"key": read_key(to, element, message.quoted)}
    is_reply = "context" in message.body
    if message.type == "text" and isinstance(element, dict):
        if not is_reply:
            preview = {"linkPreview": element["preview_url"]} if "preview_url" in element else {}
            return _TEXT, {"to": to, "text": element["body"], **preview}
        if message.quoted is None:
            raise Unsendable("unknown_reference", "the message that this one answers is not known any more")
        quoted = message.quoted
        return _QUOTE, {"to": to, "text": element["body"], "key": key_of(to, quoted), "message": quoted_content(quoted)}
    if is_reply:
        raise Unsendable("unsupported", "only a text can answer another message by this gateway")
    if message.type in FILES and isinstance(element, dict):
        data = {"to": to, "type": message.type, "caption": text_of(element.get("caption")) or ""}
        file = file_of(message.type, element, message.attachment)
        data = {**data, "fileName": file.name, "mimeType": file.mime_type}
        return (_BASE64, data) if file.link is None else (_URL, {**data, "url": file.link})
    if message.type == "location" and isinstance(element, dict):
        address, name = element.get("address"), element.get("name")
        place = {"latitude": element["latitude"], "longitude": element["longitude"]}
        return _LOCATION, {"to": to, "address": address or "", "caption": name or "", **place}
    if message.type == "contacts" and isinstance(element, list):
        card = card_of(element)
        return _CONTACT, {"to": to, "vcard": {**card, "displayName": card["fullName"]}}
    raise Unsendable("unsupported", f"a message of type {message.type} cannot be sent by this gateway")


# ----------------------------------------------------------------------------------------------------- what came back


def read(reply: http.Reply) -> Answer:
    """What MegaAPI's answer to a send means."""
    body = json_object(reply.body)
    if 200 <= reply.status < 300:
        return _answered(reply, body)
    return verdict(reply, _reason(body or {}), is_own=body is not None and _is_its_own(body))


def _answered(reply: http.Reply, body: dict[str, Any] | None) -> Answer:
    if body is None:
        return Answer(Outcome.UNKNOWN, http_status=reply.status, why="an answer that is not MegaAPI's")
    if is_error(body):
        return refused(Kind.PERMANENT, REJECTED, _reason(body), reply.status)
    data = body.get("messageData")
    if not isinstance(data, dict) and "error" not in body and "erro" not in body:
        return Answer(Outcome.UNKNOWN, http_status=reply.status, why="an answer that does not say what became of it")
    key = data.get("key") if isinstance(data, dict) else None
    id_ = key.get("id") if isinstance(key, dict) else None
    known = id_ if isinstance(id_, str) and ID.fullmatch(id_) else None  # "Responses": whether it comes is not known
    return Answer(Outcome.ACCEPTED, provider_id=known, http_status=reply.status)


def _is_its_own(body: Mapping[str, Any]) -> bool:
    """An error that the gateway itself wrote, in one of its two forms; not a page of some machine on the way."""
    return is_error(body) or (isinstance(body.get("name"), str) and "message" in body and "status" in body)


def _reason(body: Mapping[str, Any]) -> str:
    return reason(message_of(body))
