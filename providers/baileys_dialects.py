"""The dialects of Baileys gateways, as data: calls, words and abilities of each (baileys-sessions.md §5).

Read in the sources of Ticketz (2026-08), WhaticketSaas, Evolution 2.3, WAHA (2024-10) and fazer-ai's baileys-api
(2026-07). UNCONFIRMED, as no running gateway was asked: `whaticket`, the shape that the old system called, and which no
fork that we know has (so its paths can be set); WAHA's `sendVoice` for audio, and `messageIds` of its `sendSeen`.

A channel may set single calls anew (`paths`); what ends a pairing cannot be put in the place of a step that keeps it.
"""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from pombal.errors import Rejected
from providers.gateway import Ability, SessionLook
from providers.gateway_calls import normal_host

# The calls that a dialect or a channel may name; those of the last two lines make or change nothing of a session.
STEPS = ("start", "stop", "restart", "refresh_contact")
_OF_ONE = (*STEPS, "state", "qr", "logout", "hook", "set_hook")
CALLS = (*_OF_ONE, "list", "health", "text", "image", "video", "audio", "document", "location", "contacts", "read")

_CALL = re.compile(r"(GET|POST|PUT|PATCH|DELETE) (/\S*)")
_SEGMENT = re.compile(r"[A-Za-z0-9_~-][A-Za-z0-9._~-]*|\{session\}|\{jid\}")
_PREFIX = re.compile(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PHONE = re.compile(r"\+?[0-9]{5,15}")
# What a step must not be: it takes a new QR code afterwards (§5: `PUT /whatsappsession/:id` blanks the stored session).
_ENDS_A_PAIRING = re.compile(
    r"DELETE .*|.*/[^/]*(log-?out|reset|delete|clear|unpair|terminate)[^/]*(/.*)?|PUT .*/whatsappsession/\S*",
    re.IGNORECASE,
)

# Of the Whaticket family. OPENED is what the old system's script took for open, and no fork sets.
_WORDS: dict[str, SessionLook] = {
    "connected": "open",
    "opened": "open",
    "opening": "connecting",
    "pending": "connecting",  # the socket ended, and comes back within seconds
    "qrcode": "qr",
    "disconnected": "closed",
}


class Dialect(msgspec.Struct, frozen=True, kw_only=True):
    """How one kind of gateway is spoken to. Places in an answer are names joined by dots, in the order of trust."""

    paths: Mapping[str, str]  # call → "METHOD /path"
    header: str  # that carries the key
    scheme: str = ""  # what stands before the key in it
    words: Mapping[str, SessionLook]  # of a session's state, in lower case
    word_at: tuple[str, ...]  # in what `state` answers, or in a row of `list`
    names_at: tuple[str, ...] = ("name",)  # in a row of `list`: what the session may be called
    own_at: tuple[str, ...] = ()  # the number that is logged in
    code_at: tuple[str, ...] = ()  # the QR code's text, or its picture as base64
    hides_scans: bool = False  # it says that a session connects, while it waits for somebody to scan a code
    abilities: frozenset[Ability] = frozenset()
    has_ids: bool = False  # a call takes the session's id, which the list tells by its name
    types: tuple[str, ...]  # of messages, as `Outgoing.type`
    replies: tuple[str, ...] = ()  # … that may quote another
    recipients: tuple[str, ...] = ("phone", "lid", "group")
    takes_links: bool = False  # a file may go by link; else one of our own alone
    takes_captions: bool = True
    # … and in the answer to a send, the id under which WhatsApp knows the message. Without any an echo tells it: what
    # such a gateway calls `id` is a row of its own database.
    ids_at: tuple[str, ...] = ("key.id", "data.key.id", "message.key.id")
    away: str = ""  # how a refusal to send begins, in lower case, that is none of the message but of a closed session

    @property
    def tells_ids(self) -> bool:
        """Whether the answer to a send has the message's id."""
        return bool(self.ids_at)


_FILES = ("image", "video", "audio", "document")

DIALECTS: dict[str, Dialect] = {
    # The shape that the old system called: `disconnect` closes the socket and keeps the files.
    "whaticket": Dialect(
        paths={
            "list": "GET /whatsapp",
            "start": "PUT /whatsapp/{session}/start-session",
            "stop": "PUT /whatsapp/{session}/disconnect",
            "health": "GET /health",
            **dict.fromkeys(("text", *_FILES), "POST /api/messages/send"),
        },
        header="Authorization",
        scheme="Bearer ",
        words=_WORDS,
        word_at=("status",),
        names_at=("id", "name"),
        own_at=("number",),
        code_at=("qrcode",),
        abilities=frozenset({"stop"}),  # and a start after it: there is no restart in one
        has_ids=True,
        types=("text", *_FILES),
        recipients=("phone",),
        ids_at=(),
    ),
    # No call that only stops; `refresh` closes the socket, which comes back by itself. No health check of its own.
    "ticketz": Dialect(
        paths={
            "list": "GET /whatsapp/",
            "start": "POST /whatsappsession/{session}",
            "restart": "GET /whatsappsession/refresh/{session}",
            "logout": "DELETE /whatsappsession/{session}",
            **dict.fromkeys(("text", *_FILES), "POST /api/messages/send"),
        },
        header="Authorization",
        scheme="Bearer ",
        words={**_WORDS, "passkey_required": "qr", "importing": "connecting"},
        word_at=("status",),
        names_at=("id", "name"),
        own_at=("number",),
        code_at=("qrcode",),
        abilities=frozenset({"restart"}),
        has_ids=True,
        types=("text", *_FILES),
        takes_captions=False,  # it writes the file's name in the caption's place
        ids_at=(),
    ),
    "evolution": Dialect(
        paths={
            "list": "GET /instance/fetchInstances",
            "state": "GET /instance/connectionState/{session}",
            "qr": "GET /instance/connect/{session}",
            "start": "GET /instance/connect/{session}",
            "restart": "POST /instance/restart/{session}",
            "logout": "DELETE /instance/logout/{session}",
            "health": "GET /",
            "hook": "GET /webhook/find/{session}",
            "set_hook": "POST /webhook/set/{session}",
            "text": "POST /message/sendText/{session}",
            **dict.fromkeys(_FILES, "POST /message/sendMedia/{session}"),
            "location": "POST /message/sendLocation/{session}",
            "contacts": "POST /message/sendContact/{session}",
            "read": "POST /chat/markMessageAsRead/{session}",
        },
        header="apikey",
        words={"open": "open", "connecting": "connecting", "close": "closed", "closed": "closed", "refused": "closed"},
        word_at=("instance.state", "connectionStatus", "instance.status"),
        names_at=("name", "instance.instanceName", "id"),
        own_at=("ownerJid", "instance.owner"),
        code_at=("base64", "qrcode.base64", "code"),
        hides_scans=True,
        abilities=frozenset({"restart"}),
        types=("text", *_FILES, "location", "contacts", "read"),
        replies=("text", *_FILES, "location", "contacts"),
        takes_links=True,
    ),
    # `GET /health` is of its paid edition.
    "waha": Dialect(
        paths={
            "list": "GET /api/sessions?all=true",
            "state": "GET /api/sessions/{session}",
            "qr": "GET /api/{session}/auth/qr",
            "start": "POST /api/sessions/{session}/start",
            "stop": "POST /api/sessions/{session}/stop",
            "restart": "POST /api/sessions/{session}/restart",
            "logout": "POST /api/sessions/{session}/logout",
            "health": "GET /ping",
            "text": "POST /api/sendText",
            "image": "POST /api/sendImage",
            "video": "POST /api/sendVideo",
            "audio": "POST /api/sendVoice",
            "document": "POST /api/sendFile",
            "location": "POST /api/sendLocation",
            "contacts": "POST /api/sendContactVcard",
            "read": "POST /api/sendSeen",
        },
        header="X-Api-Key",
        words={
            "working": "open",
            "starting": "connecting",
            "scan_qr_code": "qr",
            "stopped": "closed",
            "failed": "closed",
        },
        word_at=("status",),
        own_at=("me.id",),
        code_at=("data", "value"),
        abilities=frozenset({"restart", "stop"}),
        types=("text", *_FILES, "location", "contacts", "read"),
        replies=("text", *_FILES, "location"),
        takes_links=True,
        ids_at=("key.id", "_data.key.id", "id._serialized", "id.id", "id"),
        away="session status is not as expected",
    ),
    # It says by webhook alone how a session stands. What connects anew does nothing to a socket that is open, so it is
    # no step of a repair.
    "fazer": Dialect(
        paths={
            "start": "POST /connections/{session}",
            "restart": "POST /connections/{session}",
            "logout": "DELETE /connections/{session}",
            "health": "GET /status",
            "set_hook": "POST /connections/{session}",
            **dict.fromkeys(("text", *_FILES), "POST /connections/{session}/send-message"),
            "read": "POST /connections/{session}/read-messages",
        },
        header="x-api-key",
        words={"open": "open", "connecting": "connecting", "reconnecting": "connecting", "close": "closed"},
        word_at=("connection", "state", "status"),
        types=("text", *_FILES, "read"),
        replies=("text", *_FILES),
        away="phone number not connected",
    ),
}


def dialect_of(gateway: str) -> Dialect:
    """The dialect of this name. Raises `Rejected`."""
    if gateway not in DIALECTS:
        raise Rejected(f"a Baileys gateway is one of {', '.join(DIALECTS)}")
    return DIALECTS[gateway]


def check_session(gateway: str, session: str) -> str:
    """A session's name or id as it may stand in a path (F6); of fazer-ai's gateway its phone number, with the `+`.
    Raises `Rejected`."""
    dialect_of(gateway)
    if gateway == "fazer":
        if not _PHONE.fullmatch(session):
            raise Rejected("of this gateway the session is its phone number: + and 5 to 15 digits")
        return "+" + session.removeprefix("+")
    if not _NAME.fullmatch(session):
        raise Rejected("the session may have letters, digits, hyphens and underscores, at most 64 in all")
    return session


def check_paths(gateway: str, paths: Mapping[str, str]) -> dict[str, str]:
    """Calls that a channel sets anew, such as `{"stop": "PUT /whatsapp/{session}/disconnect"}`. Raises `Rejected`."""
    dialect_of(gateway)
    for name, call in paths.items():
        if name not in CALLS:
            raise Rejected(f"no call of a gateway is named {name!r}: they are {', '.join(CALLS)}")
        if not isinstance(call, str) or not (match := _CALL.fullmatch(call)):
            raise Rejected(f"the call {name} must be a method and a path, such as PUT /whatsapp/{{session}}/disconnect")
        segments = match[2][1:].split("/")
        if segments[-1] == "" and len(segments) > 1:
            segments.pop()  # a slash at the end is some gateways' way
        is_plain = segments == [""] or all(_SEGMENT.fullmatch(one) for one in segments)
        if "//" in match[2] or not is_plain:
            raise Rejected(f"the path of {name} may have plain words, {{session}} and {{jid}} between its slashes")
        if name in _OF_ONE and segments.count("{session}") != 1:
            raise Rejected(f"the path of {name} must have {{session}} in it, once: it may concern no other session")
        if name in ("list", "health") and "{session}" in segments:
            raise Rejected(f"the path of {name} is of the whole gateway, and has no session in it")
        if segments.count("{jid}") != (name == "refresh_contact"):
            raise Rejected("{jid} stands once in the path of refresh_contact, and in no other")
        if name in STEPS and _ENDS_A_PAIRING.fullmatch(call):
            raise Rejected(f"{call} ends the pairing: {name} must be one that keeps it")
    return dict(paths)


def normal_base(text: str) -> str:
    """The address that all calls to a gateway begin with: `https://host[:port][/prefix]`. Raises `Rejected`."""
    given = text.strip()
    try:
        parts = urlsplit(given if "://" in given else f"https://{given}")
    except ValueError:
        raise Rejected("the host is not an address") from None
    prefix = parts.path.rstrip("/")
    if not _PREFIX.fullmatch(prefix):
        raise Rejected("the path behind the host may have plain words alone between its slashes")
    if "?" in given or "#" in given:
        raise Rejected("the host must be given without a query")
    return normal_host(f"{parts.scheme}://{parts.netloc}") + prefix


def found_at(answer: Any, places: tuple[str, ...]) -> Any:
    """What stands at the first of these places that has something: text, or a number as text; None without any."""
    for place in places:
        value = answer
        for name in place.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and value:
            return value
    return None
