"""The walk through a body of a gateway that speaks WhatsApp Web: whatever it is wrapped in, element by element.

Envelopes differ between gateways, between their versions, and between what is documented and what is sent; so what
lies inside decides, and not what is written on it. An element that cannot be understood is rejected alone
(security-reliability.md B1, B2). Who knows a gateway's words derives a `Walk` of its own.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, ClassVar, NamedTuple

import msgspec

from pombal.errors import Rejected
from providers.inbound import Change, Connection, Item, Notice, Parsed, Reject
from providers.values import MAX_TYPE, decode, id_of, text_of
from providers.webinfo import Ignored, ack, is_ack_word, read
from providers.webmessage import kept

_WRAPPED = 4  # times
_MOST_REJECTS = 100  # of one body that are told apart; a body of four million commas must not become as many objects
_ACK = re.compile(r"(^|[._])ack$|^delivery$|^messages?[._]update$")
_WORD = re.compile(r"[a-z][a-z0-9_.-]{0,31}")


def walked(raw: bytes, walk: "Walk") -> Parsed:
    """Everything that a body says, in its order. Raises `Rejected`, and nothing else, when it says nothing readable."""
    body = decode(raw)
    if type(body) is list:
        walk.each("$", body, Around())
    elif type(body) is dict:
        walk.body("$", body, Around())
    else:
        raise Rejected("neither an object nor a list")
    return walk.parsed()


class Around(NamedTuple):
    """What the objects around an element say of it."""

    instance: str | None = None
    account: str | None = None  # the JID of our own number
    event: str | None = None
    levels: int = 0


class Walk:
    """One walk through a body: what was read so far, and what was rejected."""

    instance_names: ClassVar[tuple[str, ...]] = ("instance",)
    wrappers: ClassVar[tuple[str, ...]] = ("data", "messages")
    connection_events: ClassVar[re.Pattern[str]] = re.compile(
        r"connection|qr|^status(\.instance)?$|pairing|logged|logout"
    )
    connection_words: ClassVar[tuple[str, ...]] = ("message", "status", "state", "connection")

    def __init__(self, received_at: datetime) -> None:
        self.received_at = received_at
        self._changes: list[Change] = []
        self._rejects: list[Reject] = []  # the first of them
        self._more = 0  # … and how many there are beside
        self._ignored: str | None = None  # why the last of those was that are not for us

    def parsed(self) -> Parsed:
        more = [Reject("$", f"{self._more} more like these")] if self._more else []
        nothing = not self._changes and not self._rejects
        return Parsed(self._changes, self._rejects + more, self._ignored if nothing else None)

    def each(self, path: str, elements: list[Any], around: Around) -> None:
        """Read each element. A rejection ends here, so that it never takes its neighbours along."""
        for i, element in enumerate(elements):
            here = f"{path}[{i}]"
            try:
                if type(element) is not dict:
                    raise Rejected("not an object")
                self.body(here, element, around)
            except Rejected as error:
                self._reject(here, error)

    def body(self, path: str, body: dict[str, Any], around: Around) -> None:
        """Read an element, or what it is wrapped around."""
        around = self._inside(body, around)
        found = self.element(path, body, around)
        if found is not None:
            self._keep(path, found, around)
            return
        inner = [name for name in self.wrappers if type(body.get(name)) in (dict, list) and body[name]]
        if inner and around.levels > _WRAPPED:
            raise Rejected("wrapped too often")
        for name in inner:
            walk: Callable[[str, Any, Around], None] = self.body if type(body[name]) is dict else self.each
            try:
                walk(f"{path}.{name}", body[name], around)
            except Rejected as error:
                if len(inner) == 1:
                    raise
                self._reject(f"{path}.{name}", error)
        if not inner:
            self._keep(path, self.event(path, body, around), around)

    def element(self, path: str, body: dict[str, Any], around: Around) -> Sequence[Item | Ignored] | None:
        """What an element says that names a message by its key; None for what is none, or is wrapped around some."""
        if type(body.get("key")) is not dict or self._has_only_a_word(body, around):
            return None
        return self.keyed(path, body, around)

    def keyed(self, path: str, body: dict[str, Any], around: Around) -> Sequence[Item | Ignored]:
        """What an element with a key says."""
        account = around.instance or around.account
        return read(path, body, account, self.received_at, is_ack=_is_ack(around.event, body))

    def event(self, path: str, body: dict[str, Any], around: Around) -> Sequence[Item | Ignored]:
        """An element that is about no message, or about one without naming its key."""
        kind = around.event
        if kind is None:
            raise Rejected("neither a message nor an event")
        # An instance has an id and a status too: only a message has an address as well.
        has_id = any(body.get(name) for name in ("keyId", "messageId", "id"))
        if has_id and (body.get("remoteJid") or body.get("to")) and _is_ack(kind, body):
            return [ack(path, body, self.received_at)]
        if self.is_of_connection(kind, body):
            return self.connection(path, kind, body)
        return [self.notice(path, kind, body, around)]

    def connection(self, path: str, kind: str, body: dict[str, Any]) -> list[Item | Ignored]:
        """What a gateway says of its connection: a word, if it is a plain one. It may be what a QR code holds, and that
        is a secret."""
        for name in self.connection_words:
            value = body.get(name)
            if type(value) is str and _WORD.fullmatch(value.lower()):
                return [Connection(path, value.lower())]
        return [Connection(path, kind if _WORD.fullmatch(kind) else "unknown")]

    def notice(self, path: str, kind: str, body: dict[str, Any], around: Around) -> Notice:
        """Kept as it is, under a name that is never one of our own: nobody signed it. It has neither an id nor a time
        that we know of: told again on another day, it is news."""
        payload = kept(body)
        day = self.received_at.date().isoformat()
        canonical = msgspec.json.encode([around.instance or around.account, kind, payload, day], order="deterministic")
        return Notice(path, f"gateway_{kind}", payload, hashlib.sha256(canonical).digest(), self.received_at)

    def is_of_connection(self, kind: str, body: dict[str, Any]) -> bool:
        """Whether an element without a key tells of the connection."""
        return self.connection_events.search(kind) is not None

    def _has_only_a_word(self, body: dict[str, Any], around: Around) -> bool:
        """Of a connection the `message` is a word, of all else an object; and no chat belongs to it."""
        is_one = type(body.get("message")) is str or not body["key"].get("remoteJid")
        return is_one and self.connection_events.search(around.event or "") is not None

    def event_of(self, body: dict[str, Any]) -> str | None:
        """What the element is called, in one spelling."""
        word = text_of(body, "event", MAX_TYPE)
        return word.strip().lower() if word else None

    def account_of(self, body: dict[str, Any]) -> str | None:
        """The JID of our own number, where an element names it."""
        return None

    def _inside(self, body: dict[str, Any], around: Around) -> Around:
        named = {around.instance, *(_instance(body, name) for name in self.instance_names)} - {None}
        if len(named) > 1:
            raise Rejected("several instances named")
        own, event = self.account_of(body), self.event_of(body)
        return Around(next(iter(named), None), own or around.account, event or around.event, around.levels + 1)

    def _keep(self, path: str, found: Sequence[Item | Ignored], around: Around) -> None:
        self._ignored = next((one.reason for one in found if isinstance(one, Ignored)), self._ignored)
        items = [one for one in found if not isinstance(one, Ignored)]
        if items:
            self._changes.append(Change(path, around.instance, None, items))

    def _reject(self, path: str, error: Rejected) -> None:
        if len(self._rejects) < _MOST_REJECTS:
            self._rejects.append(Reject(path, str(error)))
        else:
            self._more += 1


def _instance(body: dict[str, Any], name: str) -> str | None:
    value = body.get(name)
    return id_of(value, "key") if type(value) is dict else id_of(body, name)


def _is_ack(event: str | None, body: dict[str, Any]) -> bool:
    """Whether a `status` in it is that of a message. An event that is called `status` may be of a connection too."""
    if "status" not in body or event is None:
        return False
    return _ACK.search(event) is not None or (event == "status" and is_ack_word(body["status"]))
