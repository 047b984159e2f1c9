"""Webhooks of gateways built on Baileys: a body in, plain values out (baileys-sessions.md §1, §5, §6).

    Evolution  {"event": "messages.upsert", "instance", "data": {…}}, and `messages.update`, `connection.update`, …
    WAHA       {"event": "message", "session", "payload": {…}} (`providers/waha_webhook.py`)
    fazer-ai   {"event", "data"} with Baileys' own events: {"messages": […], "type"}, [{"key", "update": {"status"}}]
    others     Baileys' events or messages, bare or wrapped: {"whatsappId", "data": …}, {"messages": […]}, a list, one

Which gateway it is, nobody needs to say. A `whatsappId` names nobody: a channel may know its session by name, and such
a gateway tells it by its id. A message that could not be decrypted is an `Undecrypted` here: it is what a
session's repair counts.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec

from providers import jid, waha_webhook
from providers.inbound import OUR_OTHER_DEVICE, Connection, Ended, Item, Message, Notice, Parsed, Undecrypted
from providers.undecrypted import BENIGN, cause_of
from providers.values import MAX_TYPE, text_of
from providers.webbody import Around, Walk, walked
from providers.webinfo import UNDECRYPTABLE, Ignored, key_of, read
from providers.webmessage import hashes

# What the phone had before, who is online, names of chats: they come in thousands, and say nothing of a message.
_NOT_FOR_US = re.compile(
    r"(presence|contacts|chats?|labels?|messaging\.history|lid\.mapping|blocklist|engine)\.|messages\.set$"
)
_HARMLESS = ("open", "connecting", "reconnecting", "refused")  # the last is of QR codes that nobody scanned
_RECEIPTS = (("playedTimestamp", "played"), ("readTimestamp", "read"), ("receiptTimestamp", "delivered"))


def parse(raw: bytes, received_at: datetime) -> Parsed:
    """Everything that a body says, in its order. Raises `Rejected`, and nothing else, when it says nothing readable."""
    return walked(raw, _Walk(received_at))


class _Walk(Walk):
    instance_names = ("instance", "session")
    wrappers = ("data", "messages", "message", "msg", "payload")
    connection_events = re.compile(
        r"connection|qr|^status(\.instance)?$|pairing|^(session|state)\.(status|change)$|^(logout|remove)\.instance$"
    )
    connection_words = ("message", "status", "state", "connection", "error")

    def event_of(self, body: dict[str, Any]) -> str | None:
        """In Baileys' spelling: gateways write `MESSAGES_UPSERT` and `messages-upsert` as well."""
        word = text_of(body, "event", MAX_TYPE)
        if not word and ("lastDisconnect" in body or type(body.get("connection")) is str):
            return "connection.update"
        return word.strip().lower().replace("_", ".").replace("-", ".") if word else None

    def element(self, path: str, body: dict[str, Any], around: Around) -> Sequence[Item | Ignored] | None:
        event = around.event or ""
        if _NOT_FOR_US.match(event):
            return [Ignored("neither a message nor of the connection")]
        payload = body.get("payload")
        if event and type(payload) is dict and not _is_around_messages(payload):
            return self.waha(path, event, payload, around)
        return super().element(path, body, around)

    def keyed(self, path: str, body: dict[str, Any], around: Around) -> Sequence[Item | Ignored]:
        if type(body.get("receipt")) is dict:
            body = _receipt(body)
        elif around.event == "messages.edited":  # its key is that of the message it was
            return [self.notice(path, "messages.edited", body, around)]
        body = _completed(body)
        return [self._own(path, one, body) for one in super().keyed(path, body, around)]

    def connection(self, path: str, kind: str, body: dict[str, Any]) -> list[Item | Ignored]:
        found = super().connection(path, kind, body)
        code = _code(body)
        is_end = code is not None and not any(isinstance(one, Connection) and one.word in _HARMLESS for one in found)
        return [*found, Ended(path, code, self.received_at)] if is_end and code is not None else found

    def waha(self, path: str, event: str, payload: dict[str, Any], around: Around) -> Sequence[Item | Ignored]:
        """What a payload of WAHA says; by what it is called, since payloads of all kinds look alike."""
        account = around.instance or around.account
        if event in waha_webhook.MESSAGES:
            element = waha_webhook.element(event, payload)
            found = read(path, element, account, self.received_at)
            return [self._with_link(self._own(path, one, element), payload) for one in found]
        if event.startswith("message.ack"):
            ack = waha_webhook.acknowledged(payload)
            if ack is None:
                return [Ignored("nothing has become of it yet")]
            return read(path, ack, account, self.received_at, is_ack=True)
        if self.connection_events.search(event):
            return self.connection(path, event, payload)
        return [self.notice(path, event, payload, around)]

    def _own(self, path: str, one: Item | Ignored, element: dict[str, Any]) -> Item | Ignored:
        """The same with what only these gateways need: the hashes of its file, the cause of what was not decrypted."""
        if isinstance(one, Message) and one.file is not None and one.file.keys is not None:
            keys = one.file.keys | hashes(element["message"])
            return msgspec.structs.replace(one, file=msgspec.structs.replace(one.file, keys=keys))
        if isinstance(one, Notice) and one.type == UNDECRYPTABLE:
            return self._undecrypted(path, one.payload["messageStubParameters"], element)
        return one

    def _undecrypted(self, path: str, told: list[str], element: dict[str, Any]) -> Undecrypted | Ignored:
        """It failed now, whatever time the message has. One of ours is by another device of ours: that one's session is
        broken, and not the one with whom it was written to."""
        key = key_of(element)
        if isinstance(key, Ignored):
            return key
        cause = cause_of(told[0] if told else "")
        if cause in BENIGN:
            return Ignored("delivered twice, or nothing to decrypt")
        participant = ""
        if key.is_ours:
            participant = OUR_OTHER_DEVICE
        elif key.chat.kind == "group" and key.author is not None:
            participant = jid.address(key.author)
        chat = jid.address(key.chat)
        return Undecrypted(path, chat, key.id, cause, key.person, self.received_at, participant)

    @staticmethod
    def _with_link(one: Item | Ignored, payload: dict[str, Any]) -> Item | Ignored:
        if not isinstance(one, Message):
            return one
        return msgspec.structs.replace(one, file=waha_webhook.with_link(one, payload))


def _is_around_messages(payload: dict[str, Any]) -> bool:
    """Whether Baileys' own messages are in a payload, which WAHA's never has: it is one message, or about one."""
    if type(payload.get("key")) is dict:
        return True
    if any(type(payload.get(name)) in (dict, list) for name in ("messages", "data")):
        return True
    beside = (payload.get(name) for name in ("message", "msg"))
    return any(type(one) is dict and type(one.get("key")) is dict for one in beside)


def _completed(body: dict[str, Any]) -> dict[str, Any]:
    """With the message that an update brings: one that came when its sender was asked again. Not that of an edit."""
    update = body.get("update")
    message = update.get("message") if type(update) is dict else None
    if type(update) is not dict or type(message) is not dict or body.get("message") or "editedMessage" in message:
        return body
    return body | {name: update[name] for name in ("message", "messageTimestamp", "pushName") if name in update}


def _receipt(body: dict[str, Any]) -> dict[str, Any]:
    """A receipt in a group, as the ack that it is: who gave it, what for, and when."""
    receipt = body["receipt"]
    told = next(((receipt[name], word) for name, word in _RECEIPTS if receipt.get(name)), (None, "pending"))
    key = body["key"]
    member = text_of(receipt, "userJid", MAX_TYPE) or key.get("participant")
    return {"key": key | {"participant": member}, "update": {"status": told[1], "timestamp": told[0]}}


def _code(body: dict[str, Any]) -> int | None:
    """Why a connection ended (baileys-sessions.md §6), where each gateway has it."""
    found = [body.get("disconnectionReasonCode"), body.get("statusReason")]
    inner: Any = body
    for name in ("lastDisconnect", "error", "output", "statusCode"):
        inner = inner.get(name) if type(inner) is dict else None
    codes = (one for one in (*found, inner) if type(one) is int)
    return next((code for code in codes if 400 <= code < 600), None)
