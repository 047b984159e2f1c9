"""What messages to all gateways of WhatsApp Web have in common: whom they go to, what they quote, what a file is called
and how one of ours goes along, and what an answer means (megaapi.md, "Sending"; baileys-sessions.md §5, "Key")."""

import binascii
import mimetypes
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec

from providers import guard, http
from providers.gateway import SessionLook
from providers.gateway_calls import EDGE_WAIT, THROTTLE_WAIT, Place, call, is_edge_block, shown, wait_of
from providers.outbound import Answer, Attachment, Fault, Kind, Outcome, Outgoing, Quoted, Scope
from providers.sniff import extension

BY_LINK = 60.0  # seconds: the gateway fetches the file before it answers
TRIES = 6  # of a message that met trouble at the provider
_TRIES_OF_A_CALL = 3  # … of one whose call the gateway has not, or does not let us make
ID = re.compile(r"[\x21-\x7e]{1,512}")
_MOST_TEXT = 500  # characters of the provider's reason
_NOT_REACHED = (521, 523)  # of the edge: it came to no machine of the host
_PIECE = 192 * 1024  # bytes encoded at once; a multiple of 3
_MOST_NAME = 240
_PHONE = re.compile(r"\+[0-9]{5,20}")
_JID = re.compile(r"[0-9A-Za-z._:-]{1,128}@[a-z.]{1,32}")
_NOT_IN_A_NAME = re.compile(r"[\x00-\x1f\x7f/\\\"<>|?*:]+")
FILES = ("image", "video", "audio", "document")
# Where only the link is known, and it does not tell.
_USUAL = {
    "image": "image/jpeg",
    "video": "video/mp4",
    "audio": "audio/ogg; codecs=opus",
    "document": "application/octet-stream",
}


class Unsendable(Exception):
    """A message that this gateway cannot be asked to send. The text is for the tenant."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(code)
        self.code, self.text = code, text


def jid(recipient: str | None) -> str:
    """A recipient as WhatsApp Web writes it. Raises `Unsendable` for one that it has no word for."""
    if recipient and _PHONE.fullmatch(recipient):
        return f"{recipient[1:]}@s.whatsapp.net"
    if recipient and _JID.fullmatch(recipient):
        return recipient
    raise Unsendable("bad_recipient", "this gateway reaches phone numbers, groups and JIDs")


def key_of(chat: str, quoted: Quoted) -> dict[str, Any]:
    author = {"participant": quoted.author} if quoted.author else {}
    return {"remoteJid": chat, "fromMe": quoted.is_ours, "id": quoted.provider_id, **author}


def read_key(chat: str, element: Mapping[str, Any], quoted: Quoted | None) -> dict[str, Any]:
    if quoted is not None:
        return key_of(chat, quoted)
    return {"remoteJid": chat, "fromMe": False, "id": element["message_id"]}


def quoted_content(quoted: Quoted) -> dict[str, Any]:
    """As much of a message as its quote shows: its text, or what kind of file it was."""
    element = quoted.body.get(quoted.type)
    if isinstance(element, dict):
        text = element.get("body")
        if quoted.type == "text" and isinstance(text, str):
            return {"conversation": text}
        kind = {"voice": "audio"}.get(quoted.type, quoted.type)
        if kind in (*FILES, "sticker"):
            names = {"mime_type": "mimetype", "caption": "caption", "filename": "fileName"}
            return {f"{kind}Message": {new: element[old] for old, new in names.items() if text_of(element.get(old))}}
        if kind == "location":
            names = {"latitude": "degreesLatitude", "longitude": "degreesLongitude", "name": "name"}
            return {"locationMessage": {new: element[old] for old, new in names.items() if old in element}}
    return {"conversation": ""}


class Named(NamedTuple):
    """A file to send, as far as is known of it; `link` is None of one of ours."""

    name: str
    mime_type: str
    link: str | None


def file_of(type_: str, element: Mapping[str, Any], file: Attachment | None) -> Named:
    """What the file of a message is called. Raises `Unsendable` for one that is known by an id alone."""
    link, given = text_of(element.get("link")), _name_of(element.get("filename"))
    if file is not None:
        return Named(given or _named_by(file.mime_type), file.mime_type, None)
    if link is None:
        raise Unsendable("unsupported", "a file goes by link or from our own storage by this gateway")
    path = _path_of(link)
    mime = text_of(element.get("mime_type")) or mimetypes.guess_type(path)[0] or _USUAL[type_]
    return Named(given or _name_in(path) or _named_by(mime), mime, link)


def _path_of(link: str) -> str:
    try:
        return unquote(urlsplit(link).path)
    except ValueError:  # the gateway says what it thinks of it
        return ""


def _name_in(path: str) -> str | None:
    name = _name_of(path.rpartition("/")[2])
    return name if name and "." in name.strip(".") else None


def _named_by(mime_type: str) -> str:
    return f"file{extension(mime_type.partition(';')[0].strip().lower())}"


def _name_of(given: Any) -> str | None:
    """A file's name without any path; None when nothing is left of it."""
    name = _NOT_IN_A_NAME.sub("_", given).strip(" .")[-_MOST_NAME:] if isinstance(given, str) else ""
    return name if name.strip("_") else None


def card_of(cards: list[Any]) -> dict[str, str]:
    """The one contact of a message of contacts. Raises `Unsendable` for what gateways have no room for."""
    card = cards[0] if len(cards) == 1 and isinstance(cards[0], dict) else {}
    phones = card.get("phones")
    phone = phones[0] if isinstance(phones, list) and phones and isinstance(phones[0], dict) else {}
    digits = re.sub(r"[^0-9]", "", str(phone.get("wa_id") or phone.get("phone") or ""))
    name = text_of(card["name"].get("formatted_name")) if isinstance(card.get("name"), dict) else None
    if not digits or name is None:
        raise Unsendable("unsupported", "a contacts message holds one contact with a phone number by this gateway")
    company = text_of(card["org"].get("company")) if isinstance(card.get("org"), dict) else None
    return {"fullName": name, "organization": company or "", "phoneNumber": digits}


def text_of(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def with_file(document: Mapping[str, Any], mark: str, file: Attachment) -> tuple[AsyncIterator[bytes], int]:
    """A request's body in JSON, made while it is sent, and its exact length: `document` with the file, in base64, in
    place of the string `mark`, which nothing else in it may be."""
    before, _, after = msgspec.json.encode(document).partition(mark.encode())
    return _around(before, file.chunks, after), len(before) + (file.size + 2) // 3 * 4 + len(after)


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


async def posted(
    clients: http.Clients, place: Place, method: str, path: str, *given: Any, **more: Any
) -> http.Reply | Answer:
    """The reply to a call that sends, or what it means that there is none. What the content raises comes out."""
    try:
        return await call(clients, place, method, path, *given, **more)
    except guard.BlockedAddress:
        text = "the gateway's host leads to an address that is not public"
        fault = Fault(Kind.AUTH, Scope.CHANNEL, "blocked_address", text)
        return Answer(Outcome.NOT_SENT, fault=fault, why="blocked_address")
    except http.NoReply as error:
        outcome = Outcome.UNKNOWN if error.has_left else Outcome.NOT_SENT
        return Answer(outcome, http_status=error.status, why=error.why)


def verdict(reply: http.Reply, words: str, *, is_own: bool) -> Answer:
    """What it means that a send was not answered with success. `words` are the gateway's; `is_own` says that it wrote
    them, and no machine on the way."""
    status = reply.status
    if 300 <= status < 400:
        return refused(Kind.AUTH, "redirect", "the gateway's host sends us elsewhere: set the right one", status)
    if status in _NOT_REACHED:
        return _trouble(status, "the gateway's host could not be reached behind its edge")
    # Of a 500 it is not certain: a send that timed out inside the gateway may have left it.
    if status == 503 and is_own:
        return _trouble(status, words)
    if status >= 500:
        return Answer(Outcome.UNKNOWN, http_status=status, why=f"HTTP {status}")
    if status == 429:
        wait = wait_of(reply, THROTTLE_WAIT)
        return refused(Kind.THROTTLE, "throttled", "the gateway wants fewer requests", status, wait=wait)
    if is_edge_block(reply):
        wait = wait_of(reply, EDGE_WAIT)
        text = "the edge in front of the gateway turns us away"
        return refused(Kind.THROTTLE, "edge_blocked", text, status, wait=wait)
    if status in _OF_THE_CHANNEL:
        code, text = _OF_THE_CHANNEL[status]
        return refused(Kind.AUTH, code, text, status)
    if status == 408:
        return _trouble(status, "the gateway did not wait for the request")
    code = "bad_request" if status == 400 else f"http_{status}"
    return refused(Kind.PERMANENT, code, words, status)


_OF_THE_CHANNEL = {
    401: ("unauthorized", "the gateway does not take the channel's token"),
    403: ("forbidden", "the gateway does not let the channel's token do this"),
    404: ("not_found", "the gateway knows no such instance"),
}

# Refusals by which a gateway may as well mean this one call: it has none of that kind, or not for this token's plan.
OF_A_CALL = frozenset({"forbidden", "not_found"})
REJECTED = "rejected"
# … and those that may be none of the message, but of a session that is closed: what gateways say then differs.
DOUBTFUL = frozenset({REJECTED, "bad_request", "http_422"})


AWAY = Fault(Kind.SESSION, Scope.CHANNEL, "disconnected", "the channel's session is not connected")
# … as a look has found just after a refusal: a send that timed out inside the gateway may have left before it closed.
AWAY_BY_NOW = Fault(Kind.SESSION, Scope.CHANNEL, "closed_meanwhile", "the channel's session is not connected")


def explained(
    answer: Answer, state: SessionLook | None, words: str, message: Outgoing, *, never_left: bool = False
) -> Answer:
    """What a refusal of `DOUBTFUL` or `OF_A_CALL` is by how the session stands just after it, None where nobody ever
    tells that. It concerns the message only while the session is open, and may be of what was so a moment before.

    `words` are the gateway's own; `never_left`: they say that it could not even begin to send.
    """
    fault = answer.fault
    assert fault is not None  # noqa: S101 - nothing else is to be explained
    if state in ("closed", "qr"):
        fault = AWAY_BY_NOW if fault.code in DOUBTFUL and not never_left else AWAY
    elif never_left:
        text = "the gateway's session is not connected just now"
        fault = Fault(Kind.TRANSIENT, Scope.MESSAGE, "not_connected", text, tries=TRIES, is_outage=True)
    elif fault.code in OF_A_CALL:
        # A plain text is what every gateway has a call for: if that one is not to be had, none is.
        if state != "open" or (message.type == "text" and "context" not in message.body):
            return answer
        fault = _of_the_call(fault, words, message.type)
    elif state in ("open", None):
        fault = msgspec.structs.replace(fault, is_of_a_moment=True)
    else:
        return _in_doubt(answer)
    return msgspec.structs.replace(answer, fault=fault)


def _of_the_call(fault: Fault, words: str, type_: str) -> Fault:
    """What one of `OF_A_CALL` is while the session is open: a matter of this message alone. Tried again soon, since it
    may have been so for a moment; then somebody should look at it, unless it is a receipt."""
    code, text = fault.code, fault.text
    if code == "not_found":
        code, text = "http_404", "the gateway knows the session, and yet has no call for this"
    text = shown(words, _MOST_TEXT) or text
    if type_ == "read":
        return Fault(Kind.PERMANENT, Scope.MESSAGE, code, text, is_of_a_moment=True)
    return Fault(Kind.TRANSIENT, Scope.MESSAGE, code, text, tries=_TRIES_OF_A_CALL)


def _in_doubt(answer: Answer) -> Answer:
    """A refusal of which nobody can tell whether it is true: a send that timed out inside the gateway may have left,
    and one that is just connecting again is where that happens."""
    why = "the gateway refused it, and how its session stands is not known"
    return msgspec.structs.replace(answer, outcome=Outcome.UNKNOWN, why=why)


def reason(words: str) -> str:
    """A gateway's own words for a tenant to read, or that there are none."""
    return shown(words, _MOST_TEXT) or "the gateway gave no reason"


def _trouble(status: int, text: str) -> Answer:
    fault = Fault(Kind.TRANSIENT, Scope.MESSAGE, f"http_{status}", text, tries=TRIES, is_outage=True)
    return Answer(Outcome.REFUSED, http_status=status, fault=fault)


def refused(kind: Kind, code: str, text: str, status: int | None = None, *, wait: float = 0.0) -> Answer:
    """A clear no, at the scope that its kind has."""
    scope = {Kind.AUTH: Scope.CHANNEL, Kind.THROTTLE: Scope.NUMBER}.get(kind, Scope.MESSAGE)
    return Answer(Outcome.REFUSED, http_status=status, fault=Fault(kind, scope, code, text, wait=wait))
