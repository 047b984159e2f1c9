"""Sending by Baileys gateways, in each one's dialect (baileys-sessions.md §5). Where to, and in whose sources that was
read, is in `providers/baileys_dialects.py`.

No call carries an id of ours that a gateway would keep, so none may be repeated in doubt: whatever does not say clearly
that nothing was sent is an unknown outcome. The gateways of the Whaticket family put a message in a queue of their own
and answer without an id: an echo of it tells that later.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec

from pombal.errors import Permanent
from providers import http
from providers.baileys import Baileys, Place, Session, is_error, words_of
from providers.baileys_dialects import found_at
from providers.download import allowance
from providers.gateway import SessionLook
from providers.gateway_calls import json_object
from providers.gateway_sends import (
    AWAY,
    BY_LINK,
    DOUBTFUL,
    FILES,
    ID,
    OF_A_CALL,
    REJECTED,
    Named,
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
from providers.outbound import Answer, Attachment, Kind, Outcome, Outgoing, Quoted

_STANDING = 8.0  # seconds for the question how the session stands
_ID_IN = frozenset({"key", "data", "_data", "id"})  # one of them is in each answer of a gateway that tells ids
# What the Whaticket family throws where it has no socket for the session, and Baileys itself where that is not open: a
# message has not left then, however soon it is open again.
_NEVER_LEFT = re.compile(r"(error: )?(err_wapp_not_initialized|connection closed)\b", re.IGNORECASE)

# A look at the session that is refused like this is refused each time: of one send it says nothing. That the gateway
# does not know the session, or answers with an error of its own, may well be what a closed one is called.
_NEVER_TELLS = frozenset({"refused", "misconfigured"})


class Body(NamedTuple):
    """What a call carries: `data` in JSON with the file, if there is one of ours, where `mark` stands; or the fields of
    a form, with the file beside them."""

    data: dict[str, Any]
    mark: str = ""
    form_file: Named | None = None


class BaileysSender:
    """The way out of one session. Never repeats a call by itself.

    A call ends after `deadline` seconds in all; if that is not given, after 30, with a link 60, and with a file what
    its size allows.
    """

    def __init__(self, clients: http.Clients, given: Session, *, deadline: float | None = None) -> None:
        self._clients = clients
        self._place = Place(given, sends=True)
        self._writes = _WRITERS.get(given.gateway, _whaticket)
        self._session = Baileys(clients, given)
        self._says_its_state = not {"state", "list"}.isdisjoint(self._place.paths)
        self._has_a_key_for_sending = given.send_key not in ("", given.api_key)
        self._deadline = deadline

    async def send(self, message: Outgoing) -> Answer:
        """What became of the call. What the attachment's `chunks` raises comes out as it is."""
        if self._place.wrong:
            return refused(Kind.AUTH, "misconfigured", self._place.wrong)
        try:
            body = self._written(message)
        except Unsendable as error:
            return refused(Kind.PERMANENT, error.code, error.text)
        method, path = self._place.call(message.type)
        reply = await self._posted(method, path, body, message.attachment)
        if isinstance(reply, Answer):
            return reply
        answer = self._read(reply, message.type)
        fault = answer.fault
        if fault is None or fault.code not in DOUBTFUL | OF_A_CALL:
            return answer
        away, words = self._place.dialect.away, words_of(reply.body)
        if away and (words or reply.body.decode("utf-8", "replace")).strip().casefold().startswith(away):
            return msgspec.structs.replace(answer, fault=AWAY)
        if fault.code == "forbidden" and self._has_a_key_for_sending:  # of which no question about the session tells
            return answer
        never_left = _NEVER_LEFT.match((words or "").strip()) is not None
        return explained(answer, await self._state(), words or "", message, never_left=never_left)

    async def upload(self, file: Attachment) -> Answer:
        """Nothing is handed over beforehand: raises `Permanent`."""
        raise Permanent("a file goes along with its message by this gateway")

    def _written(self, message: Outgoing) -> Body:
        """What is to be sent. Raises `Unsendable`."""
        dialect, element = self._place.dialect, message.body.get(message.type)
        if message.type not in dialect.types or not isinstance(element, (list if message.type == "contacts" else dict)):
            raise Unsendable("unsupported", f"a message of type {message.type} cannot be sent by this gateway")
        is_reply = "context" in message.body and message.type != "read"
        if is_reply and message.type not in dialect.replies:
            raise Unsendable("unsupported", f"a message of type {message.type} cannot answer another by this gateway")
        if is_reply and message.quoted is None:
            raise Unsendable("unknown_reference", "the message that this one answers is not known any more")
        to = jid(message.recipient)
        if dialect.recipients == ("phone",) and not to.endswith("@s.whatsapp.net"):
            raise Unsendable("bad_recipient", "this gateway reaches phone numbers alone")
        if message.type in FILES:
            if message.attachment is None and not dialect.takes_links:
                raise Unsendable("unsupported", "a file goes from our own storage alone by this gateway, not by link")
            if not dialect.takes_captions and isinstance(element, dict) and text_of(element.get("caption")):
                raise Unsendable("unsupported", "a file has no caption by this gateway")
        return self._writes(Told(self._place.session, to, message, element, message.quoted if is_reply else None))

    async def _posted(self, method: str, path: str, body: Body, file: Attachment | None) -> http.Reply | Answer:
        content: bytes | AsyncIterator[bytes] = b""
        if file is not None and (body.mark or body.form_file):
            more: dict[str, Any] = {}
            if body.form_file:
                content, size, more["content_type"] = _form(body.data, body.form_file, file)
            else:
                content, size = with_file(body.data, body.mark, file)
            deadline = self._deadline or allowance(size)
            return await posted(
                self._clients, self._place, method, path, content, size=size, deadline=deadline, is_patient=True, **more
            )
        by_link = bool(body.mark)
        deadline = self._deadline or (BY_LINK if by_link else http.DEADLINE)
        content = msgspec.json.encode(body.data)
        return await posted(self._clients, self._place, method, path, content, deadline=deadline, is_patient=by_link)

    def _read(self, reply: http.Reply, type_: str) -> Answer:
        """What the gateway's answer to a send means."""
        words = reason(words_of(reply.body) or "")
        if not 200 <= reply.status < 300:
            return verdict(reply, words, is_own=json_object(reply.body) is not None)
        body = json_object(reply.body)
        if is_error(body):
            return refused(Kind.PERMANENT, REJECTED, words, reply.status)
        if type_ == "read":
            return Answer(Outcome.ACCEPTED, http_status=reply.status)
        if body is None:
            return Answer(Outcome.UNKNOWN, http_status=reply.status, why="an answer that is not the gateway's")
        if self._place.dialect.tells_ids and _ID_IN.isdisjoint(body):
            return Answer(
                Outcome.UNKNOWN, http_status=reply.status, why="an answer that does not say what became of it"
            )
        return Answer(Outcome.ACCEPTED, provider_id=_id_in(body, self._place.dialect.ids_at), http_status=reply.status)

    async def _state(self) -> SessionLook | None:
        """How the session stands, as `explained` takes it."""
        if not self._says_its_state:  # nothing but its words for a refusal tells of a closed session
            return None
        try:
            async with asyncio.timeout(_STANDING):
                return (await self._session.look()).state
        except TimeoutError:
            return "unknown"
        except InstanceFault as fault:
            return None if fault.code in _NEVER_TELLS else "unknown"


# -------------------------------------------------------------------------------------------------------- what leaves


class Told(NamedTuple):
    """A message to write in a dialect: checked against what that takes. `to` is a JID."""

    session: str
    to: str
    message: Outgoing
    element: Any
    quoted: Quoted | None

    @property
    def type(self) -> str:
        return self.message.type

    @property
    def caption(self) -> dict[str, str]:
        caption = text_of(self.element.get("caption"))
        return {"caption": caption} if caption else {}

    def file(self) -> Named:
        return file_of(self.type, self.element, self.message.attachment)


def _whaticket(told: Told) -> Body:
    """JSON for a text: a form without a file is answered with success, and sends nothing."""
    number = told.to.removesuffix("@s.whatsapp.net")
    if told.type == "text":
        return Body({"number": number, "body": told.element["body"]})
    caption = {"body": told.caption["caption"]} if told.caption else {}
    return Body({"number": number, **caption}, form_file=told.file())


def _evolution(told: Told) -> Body:
    if told.type == "read":
        return Body({"readMessages": [read_key(told.to, told.element, told.message.quoted)]})
    data: dict[str, Any] = {"number": told.to.removesuffix("@s.whatsapp.net")}
    if told.quoted is not None:
        data["quoted"] = {"key": key_of(told.to, told.quoted), "message": quoted_content(told.quoted)}
    if told.type == "text":
        preview = {"linkPreview": told.element["preview_url"]} if "preview_url" in told.element else {}
        return Body({**data, "text": told.element["body"], **preview})
    if told.type == "location":
        return Body({**data, **_spot(told.element), **_of_spot(told.element)})
    if told.type == "contacts":
        card = card_of(told.element)
        return Body({**data, "contact": [{**card, "wuid": card["phoneNumber"]}]})
    file, mark = told.file(), uuid4().hex
    more = {"mediatype": told.type, "mimetype": file.mime_type, "fileName": file.name, **told.caption}
    return Body({**data, **more, "media": file.link or mark}, mark)


def _waha(told: Told) -> Body:
    chat = _at_waha(told.to)
    data: dict[str, Any] = {"session": told.session, "chatId": chat}
    if told.type == "read":
        key = read_key(told.to, told.element, told.message.quoted)
        id_ = _id_of_waha(chat, is_ours=key["fromMe"], id_=key["id"], author=key.get("participant"))
        author = {"participant": _at_waha(key["participant"])} if "participant" in key else {}
        return Body({**data, "messageId": id_, "messageIds": [id_], **author})
    if told.quoted is not None:
        quoted = told.quoted
        data["reply_to"] = _id_of_waha(chat, is_ours=quoted.is_ours, id_=quoted.provider_id, author=quoted.author)
    if told.type == "text":
        preview = {"linkPreview": told.element["preview_url"]} if "preview_url" in told.element else {}
        return Body({**data, "text": told.element["body"], **preview})
    if told.type == "location":
        return Body({**data, **_spot(told.element), "title": _of_spot(told.element)["name"]})
    if told.type == "contacts":
        card = card_of(told.element)
        return Body({**data, "contacts": [{**card, "whatsappId": card["phoneNumber"]}]})
    file, mark = told.file(), uuid4().hex
    content = {"url": file.link} if file.link else {"data": mark}
    if told.type == "audio":  # goes as a voice message, which is Opus
        data["convert"] = not file.mime_type.startswith("audio/ogg")
    return Body({**data, "file": {"mimetype": file.mime_type, "filename": file.name, **content}, **told.caption}, mark)


def _fazer(told: Told) -> Body:
    if told.type == "read":
        return Body({"keys": [read_key(told.to, told.element, told.message.quoted)]})
    content: dict[str, Any] = {}
    if told.quoted is not None:
        content["quotedMessage"] = {"key": key_of(told.to, told.quoted), "message": quoted_content(told.quoted)}
    if told.type == "text":
        return Body({"jid": told.to, "messageContent": {**content, "text": told.element["body"]}})
    file, mark = told.file(), uuid4().hex
    content |= {told.type: mark, "mimetype": file.mime_type, **(told.caption if told.type != "audio" else {})}
    if told.type == "document":
        content["fileName"] = file.name
    return Body({"jid": told.to, "messageContent": content}, mark)


_WRITERS: dict[str, Callable[[Told], Body]] = {
    "whaticket": _whaticket,
    "ticketz": _whaticket,
    "evolution": _evolution,
    "waha": _waha,
    "fazer": _fazer,
}


def _spot(element: Mapping[str, Any]) -> dict[str, Any]:
    return {"latitude": element["latitude"], "longitude": element["longitude"]}


def _of_spot(element: Mapping[str, Any]) -> dict[str, str]:
    return {"name": text_of(element.get("name")) or "", "address": text_of(element.get("address")) or ""}


def _at_waha(to: str) -> str:
    """WAHA writes a phone as WhatsApp's first web client did."""
    return to.replace("@s.whatsapp.net", "@c.us")


def _id_of_waha(chat: str, *, is_ours: bool, id_: str, author: str | None) -> str:
    by = f"_{_at_waha(author)}" if author else ""
    return f"{'true' if is_ours else 'false'}_{chat}_{id_}{by}"


def _form(fields: Mapping[str, str], named: Named, file: Attachment) -> tuple[AsyncIterator[bytes], int, str]:
    """A form with one file, made while it is sent, its exact length, and its type."""
    boundary = uuid4().hex
    before = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    )
    before += (
        f'--{boundary}\r\nContent-Disposition: form-data; name="medias"; filename="{named.name}"\r\n'
        f"Content-Type: {_one_line(named.mime_type)}\r\n\r\n"
    ).encode()
    after = f"\r\n--{boundary}--\r\n".encode()

    async def pieces() -> AsyncIterator[bytes]:
        yield before
        async for chunk in file.chunks:
            yield chunk
        yield after

    return pieces(), len(before) + file.size + len(after), f"multipart/form-data; boundary={boundary}"


def _one_line(mime_type: str) -> str:
    return "".join(c for c in mime_type if c.isprintable())


# ----------------------------------------------------------------------------------------------------- what came back


def _id_in(body: Mapping[str, Any], places: tuple[str, ...]) -> str | None:
    """The id under which WhatsApp knows the message; None when the answer does not tell it."""
    id_ = found_at(body, places)
    if id_ is not None and id_.startswith(("true_", "false_")):
        id_ = [*id_.split("_"), "", ""][2]  # WAHA's: whose_chat_id, and in a group the author
    return id_ if id_ and ID.fullmatch(id_) else None
