"""MegaAPI's webhooks: a body in, plain values out (megaapi.md, "Webhooks" and "Reconciliation").

    flat       {"instance_key", "jid", "messageType", "key", "message", "messageTimestamp", "pushName"}
    ack        {"instance_key", "messageType": "message.ack", "key", "update": {"status"}}, or "status" beside the key
    connection {"instance_key", "messageType": "connection_update", "message": "phone_connected"}
    wrapped    {"instanceKey", "event", "data": {…}}, {"instance", "data": […]}, {"messages": […]}, or a list of bodies

Only the flat forms are confirmed, so the others are taken as they come: what lies inside decides, and not what is
written on it. An element that cannot be understood is rejected alone (security-reliability.md B1, B2).
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from pombal.errors import Rejected
from providers.inbound import Change, Connection, Item, Notice, Parsed, Reject
from providers.values import MAX_TYPE, decode, id_of, text_of
from providers.webinfo import Ignored, ack, is_ack_word, read
from providers.webmessage import kept

_INSTANCE = ("instance_key", "instanceKey", "instance")
_WRAPPED = 4  # times
_MOST_REJECTS = 100  # of one body that are told apart; a body of four million commas must not become as many objects
_CONNECTION = re.compile(r"connection|qr|^status(\.instance)?$|pairing|logged|logout")
_ACK = re.compile(r"(^|[._])ack$|^delivery$|^messages?[._]update$")
_WORD = re.compile(r"[a-z][a-z0-9_.-]{0,31}")


def parse(raw: bytes, received_at: datetime) -> Parsed:
    """Everything that a body says, in its order. Raises `Rejected`, and nothing else, when it says nothing readable."""
    body = decode(raw)
    reader = _Reader(received_at)
    if type(body) is list:
        reader.each("$", body, _Around())
    elif type(body) is dict:
        reader.body("$", body, _Around())
    else:
        raise Rejected("neither an object nor a list")
    if reader.more:
        reader.rejects.append(Reject("$", f"{reader.more} more like these"))
    nothing = not reader.changes and not reader.rejects
    return Parsed(reader.changes, reader.rejects, reader.ignored if nothing else None)


class _Around(NamedTuple):
    """What the objects around an element say of it."""

    instance: str | None = None
    account: str | None = None  # the JID of our own number
    event: str | None = None
    levels: int = 0


class _Reader:
    """One walk through a body: what was read so far, and what was rejected."""

    def __init__(self, received_at: datetime) -> None:
        self.received_at = received_at
        self.changes: list[Change] = []
        self.rejects: list[Reject] = []  # the first of them
        self.more = 0  # … and how many there are beside
        self.ignored: str | None = None  # why the last of those was that are not for us

    def each(self, path: str, elements: list[Any], around: _Around) -> None:
        """Read each element. A rejection ends here, so that it never takes its neighbours along."""
        for i, element in enumerate(elements):
            here = f"{path}[{i}]"
            try:
                if type(element) is not dict:
                    raise Rejected("not an object")
                self.body(here, element, around)
            except Rejected as error:
                self.reject(here, error)

    def body(self, path: str, body: dict[str, Any], around: _Around) -> None:
        """Read an element, or what it is wrapped around."""
        around = _inside(body, around)
        if type(body.get("key")) is dict and not _is_connection(body, around):
            is_ack = _is_ack(around.event, body)
            found = read(path, body, around.instance or around.account, self.received_at, is_ack=is_ack)
            self.keep(path, found, around)
            return
        inner = [name for name in ("data", "messages") if type(body.get(name)) in (dict, list) and body[name]]
        if inner and around.levels > _WRAPPED:
            raise Rejected("wrapped too often")
        for name in inner:
            walk: Callable[[str, Any, _Around], None] = self.body if type(body[name]) is dict else self.each
            try:
                walk(f"{path}.{name}", body[name], around)
            except Rejected as error:
                if len(inner) == 1:
                    raise
                self.reject(f"{path}.{name}", error)
        if not inner:
            self.keep(path, [self.event(path, body, around)], around)

    def event(self, path: str, body: dict[str, Any], around: _Around) -> Item | Ignored:
        """An element that is about no message, or about one without naming its key."""
        kind = around.event
        if kind is None:
            raise Rejected("neither a message nor an event")
        # An instance has an id and a status too: only a message has an address as well.
        has_id = any(body.get(name) for name in ("keyId", "messageId", "id"))
        if has_id and (body.get("remoteJid") or body.get("to")) and _is_ack(kind, body):
            return ack(path, body, self.received_at)
        if _CONNECTION.search(kind) or type(body.get("message")) is str:
            return Connection(path, _word(body, kind))
        return self.notice(path, kind, body, around)

    def notice(self, path: str, kind: str, body: dict[str, Any], around: _Around) -> Notice:
        """Kept as it is. It has neither an id nor a time that we know of: told again on another day, it is news."""
        payload = kept(body)
        day = self.received_at.date().isoformat()
        canonical = msgspec.json.encode([around.instance or around.account, kind, payload, day], order="deterministic")
        return Notice(path, kind, payload, hashlib.sha256(canonical).digest(), self.received_at)

    def keep(self, path: str, found: Sequence[Item | Ignored], around: _Around) -> None:
        self.ignored = next((one.reason for one in found if isinstance(one, Ignored)), self.ignored)
        items = [one for one in found if not isinstance(one, Ignored)]
        if items:
            self.changes.append(Change(path, around.instance, None, items))

    def reject(self, path: str, error: Rejected) -> None:
        if len(self.rejects) < _MOST_REJECTS:
            self.rejects.append(Reject(path, str(error)))
        else:
            self.more += 1


def _inside(body: dict[str, Any], around: _Around) -> _Around:
    named = {around.instance, *(_instance(body, name) for name in _INSTANCE)} - {None}
    if len(named) > 1:
        raise Rejected("several instances named")
    own = text_of(body, "jid", MAX_TYPE)
    word = text_of(body, "messageType", MAX_TYPE) or text_of(body, "event", MAX_TYPE)
    event = word.strip().lower() if word else None
    return _Around(next(iter(named), None), own or around.account, event or around.event, around.levels + 1)


def _instance(body: dict[str, Any], name: str) -> str | None:
    value = body.get(name)
    return id_of(value, "key") if type(value) is dict else id_of(body, name)


def _is_connection(body: dict[str, Any], around: _Around) -> bool:
    """Of a connection the `message` is a word, of all else an object; and no chat belongs to it."""
    is_one = type(body.get("message")) is str or not body["key"].get("remoteJid")
    return is_one and _CONNECTION.search(around.event or "") is not None


def _is_ack(event: str | None, body: dict[str, Any]) -> bool:
    """Whether a `status` in it is that of a message. An event that is called `status` may be of a connection too."""
    if "status" not in body or event is None:
        return False
    return _ACK.search(event) is not None or (event == "status" and is_ack_word(body["status"]))


def _word(body: dict[str, Any], kind: str) -> str:
    """What a connection event says, if it is a plain word: it may be what a QR code holds, and that is a secret."""
    for name in ("message", "status", "state", "connection"):
        value = body.get(name)
        if type(value) is str and _WORD.fullmatch(value.lower()):
            return value.lower()
    return kind if _WORD.fullmatch(kind) else "unknown"
