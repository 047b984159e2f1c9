"""One element of a gateway's webhook, `{"key", "message", "messageTimestamp", …}`: JSON in, an inbound item out.

This is WhatsApp Web's `WebMessageInfo`, which gateways hand on more or less as it is (megaapi.md, "Webhooks";
baileys-sessions.md §5): a message, an ack (`update`), or a stub that stands for a message which is not there.
"""

import hashlib
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypeAlias

import msgspec

from pombal.errors import Rejected
from providers import jid
from providers.inbound import Message, Notice, Person, Status
from providers.jid import Jid
from providers.values import MAX_ID, MAX_NAME, MAX_STATUS, MAX_TYPE, id_of, required_id, text_of, time_of
from providers.webmessage import Content, content, kept

# `WebMessageInfo.Status`, by number and by name; None: nothing has become of it yet.
_ACKS: Mapping[str, str | None] = {
    "0": "failed",
    "error": "failed",
    "1": None,
    "pending": None,
    "2": "sent",
    "server_ack": "sent",
    "3": "delivered",
    "delivery_ack": "delivered",
    "4": "read",
    "viewed": "read",
    "5": "played",
}
_NOT_TAKEN = "the gateway says that WhatsApp did not take it"
_WORDS = frozenset({*_ACKS, "sent", "delivered", "read", "played", "failed"})
UNDECRYPTABLE = "message_undecryptable"  # the notice of a message that could not be decrypted
_CIPHERTEXT = (2, "2", "CIPHERTEXT")
_MAX_PARAMETERS = 20
_MOST_STUBS = 1_000  # there are some two hundred kinds
_MOST_AHEAD = timedelta(days=1)  # that the clock of a phone or a gateway may be


class Ignored(NamedTuple):
    """An element that is not for us, and why."""

    reason: str


class Key(NamedTuple):
    """A message's key: whose chat, by whom, and its id. `given` is what a gateway needs to find it again."""

    id: str
    chat: Jid
    person: Person
    chat_person: Person
    author: Jid | None
    is_ours: bool
    given: dict[str, Any]


Found: TypeAlias = Message | Status | Notice | Ignored


def read(
    path: str, element: dict[str, Any], account: str | None, received_at: datetime, *, is_ack: bool = False
) -> list[Found]:
    """What an element with a `key` says: one thing, or two where an ack brings its message along.

    `account` tells notices of one instance from those of another; `is_ack`: it is called an ack, so that its own
    `status` is one. Raises `Rejected` for one that cannot be understood.
    """
    message = element.get("message")
    if type(message) is str:
        message = {"conversation": message}
    if is_ack and not message and "fromMe" not in element["key"]:  # acks are of what we sent
        element = element | {"key": element["key"] | {"fromMe": True}}
    key = key_of(element)
    if isinstance(key, Ignored):
        return [key]
    update = element.get("update")
    at = _time(element, received_at)
    said = content(message, element.get("contextInfo")) if type(message) is dict else None
    holder = _with_status(element, key, is_ack=is_ack, is_empty=said is None)
    if said is not None and not said.is_protocol:
        found: list[Found] = [_message(path, key, said, at, received_at)]
        if holder and is_ack_word(holder["status"]):
            told_at = None if holder is element else _time(holder, received_at)  # its own time is the message's
            found.append(_ack(path, key, holder["status"], told_at or received_at))
        return found
    if holder:
        return [_ack(path, key, holder["status"], _time(holder, received_at) or at or received_at)]
    if type(update) is dict and said is None:
        changed = {"update": kept(update)}
        return [_notice(path, "message_update", key, changed, [account, changed], at or received_at)]
    kind, details = _silent(element) if said is None else ("protocol_message", said.body)
    return [_notice(path, kind, key, details, [account], at or received_at)]


def _with_status(element: dict[str, Any], key: Key, *, is_ack: bool, is_empty: bool) -> dict[str, Any] | None:
    """The object whose `status` is an ack, if there is one. A message has a status too, which says nothing new; one of
    ours without any content says nothing else."""
    update = element.get("update")
    if type(update) is dict and "status" in update:
        return update
    if "status" not in element:
        return None
    is_alone = is_empty and key.is_ours and not element.get("messageStubType") and is_ack_word(element["status"])
    return element if is_ack or is_alone else None


def is_ack_word(status: Any) -> bool:
    """Whether it is known to be what became of a message, as a word or a number."""
    return type(status) in (int, str) and str(status).lower() in _WORDS


def _message(path: str, key: Key, said: Content, at: datetime | None, received_at: datetime) -> Message:
    body = said.body | {"key": key.given}
    if at is None:
        body["pombal"] = body.get("pombal", {}) | {"odd_timestamp": True}
    return Message(
        path=path,
        provider_id=key.id,
        direction="out" if key.is_ours else "in",
        type=said.type,
        body=body,
        person=key.person,
        chat=key.chat_person,
        at=at or received_at,
        file=said.file,
        may_be_ours=key.is_ours,
    )


def ack(path: str, body: dict[str, Any], received_at: datetime) -> Status | Ignored:
    """An ack without a `key`: its fields lie beside each other. Raises `Rejected` without an id or a status."""
    id_ = id_of(body, "keyId") or id_of(body, "messageId") or required_id(body, "id")
    fields = {"remoteJid": body.get("remoteJid") or body.get("to"), "participant": body.get("participant"), "id": id_}
    key = key_of({"key": fields | {"fromMe": body.get("fromMe", True)}})
    at = _time(body, received_at) or received_at
    return key if isinstance(key, Ignored) else _ack(path, key, body.get("status"), at)


def key_of(element: dict[str, Any]) -> Key | Ignored:
    """The key of an element, read. Raises `Rejected` for one that cannot be understood."""
    key = element["key"]
    id_, remote = required_id(key, "id"), required_id(key, "remoteJid")
    chat = jid.parse(remote)
    if chat is None:
        raise Rejected("unknown kind of address")
    if chat.kind in ("status", "newsletter"):
        return Ignored("a status broadcast" if chat.kind == "status" else "a newsletter")
    is_ours = key.get("fromMe") is True or key.get("fromMe") == "true"
    participant = text_of(key, "participant", MAX_ID) or text_of(element, "participant", MAX_ID)
    author = jid.parse(participant) if participant else None
    given = {"remoteJid": remote, "fromMe": is_ours, "id": id_} | ({"participant": participant} if participant else {})
    # Our name comes with our own messages.
    name = None if is_ours else text_of(element, "pushName", MAX_NAME) or text_of(element, "verifiedBizName", MAX_NAME)
    if author is not None and author.kind not in ("phone", "lid"):
        author = None
    if chat.kind == "list":  # somebody wrote to many at once, us among them: in our chat with them
        if author is None or is_ours:
            return Ignored("a broadcast list")
        chat = author
    if chat.kind == "group":
        chat_person = jid.person(chat)
        beside = _other(key, "participantAlt", "participantPn", "participantLid")
        person = chat_person if author is None or is_ours else jid.person(author, beside, name)
    else:
        beside = _other(key, "remoteJidAlt", "senderPn", "senderLid")
        person = chat_person = jid.person(chat, beside, name, is_own_word=not is_ours)
    return Key(id_, chat, person, chat_person, author, is_ours, given)


def _other(key: dict[str, Any], *names: str) -> Jid | None:
    """The same person's other address, by the name that this version of the gateway has for it."""
    texts = (text_of(key, name, MAX_ID) for name in names)
    found = (jid.parse(text) for text in texts if text)
    return next((one for one in found if one is not None and one.kind in ("phone", "lid")), None)


def _ack(path: str, key: Key, status: Any, at: datetime) -> Status | Ignored:
    """One ack. Of a message that somebody else sent it says only what we did with it."""
    if type(status) not in (int, str) or status == "":
        raise Rejected("no status")
    word = str(status).lower()
    if len(word) > MAX_STATUS:
        raise Rejected("status too long")
    word_or_none = _ACKS.get(word, word)
    if not key.given["fromMe"]:
        return Ignored("an ack of a message of somebody else")
    if word_or_none is None:
        return Ignored("nothing has become of it yet")
    in_group = key.chat.kind == "group" and key.author is not None
    participant = jid.spelt(key.author) if in_group and key.author else ""
    code, why = ("ack_error", _NOT_TAKEN) if word_or_none == "failed" else (None, None)
    return Status(path, key.id, word_or_none, at, participant, error_code=code, error=why, chat=key.chat_person)


def _silent(element: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A message without content: a stub (it could not be decrypted, a group changed, …), or nothing that we can see.

    No message of ours is made of it: the real one may come later under the same id.
    """
    stub = element.get("messageStubType")
    if not ((type(stub) is int and 0 < stub < _MOST_STUBS) or (type(stub) is str and 0 < len(stub) <= MAX_TYPE)):
        return "message_empty", {}
    given = element.get("messageStubParameters")
    parameters = given[:_MAX_PARAMETERS] if type(given) is list else []
    return UNDECRYPTABLE if stub in _CIPHERTEXT else "message_stub", {
        "messageStubType": stub,
        "messageStubParameters": [one[:MAX_NAME] for one in parameters if type(one) is str],
    }


def _notice(path: str, kind: str, key: Key, details: dict[str, Any], told: list[Any], at: datetime) -> Notice:
    """Told again, at another time or for another reason, it is the same notice; `told` is what must be equal too."""
    canonical = [kind, key.given["remoteJid"], key.id, key.given.get("participant", ""), *told]
    digest = hashlib.sha256(msgspec.json.encode(canonical, order="deterministic")).digest()
    return Notice(path, kind, {"key": key.given, **details}, digest, at)


def _time(holder: dict[str, Any], received_at: datetime) -> datetime | None:
    """Its time, which some serializers write as a 64-bit number in two halves. None for one that is far ahead: it would
    be the last that was heard of its chat and its channel, for years."""
    given = holder.get("messageTimestamp", holder.get("timestamp"))
    if type(given) is dict and type(given.get("low")) is int and given.get("high", 0) in (0, None):
        given = given["low"] % 2**32
    at = time_of(given)
    return at if at is not None and at <= received_at + _MOST_AHEAD else None
