"""What leaves for a message: its body in the provider's words, to whom, and what goes along.

A row of the line names files and other messages by our ids; here they get the provider's, or come along themselves.
Not a queue, hence the underscore.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import RowMapping
from sqlalchemy.orm import Session

from models import ContactIdentity, MediaUpload, Message, MessageStatus, outgoing
from providers.outbound import Quoted
from workers._manners import Manner
from workers._verdicts import Verdict

_FREE_FORM_PASS = ("template", "read")  # what the 24-hour window does not concern
_WINDOW_CLOSED = "more than 24 hours since the customer last wrote: only a template may be sent"
_NO_SUCH_FILE = "its file is no longer there"
_NOT_SENT = "the message it refers to was not sent"
_NOT_KNOWN = "the message it refers to is not known as the gateway knows it"
_NO_ID_YET = "the gateway has not told its id of the message it refers to"
_ID_WAIT, _ID_TRIES = 5.0, 6  # seconds between looks for that id, which an echo tells, and how many


class Stored(NamedTuple):
    """A file of ours that goes along with its message."""

    key: str
    size: int
    mime_type: str


class Parcel(NamedTuple):
    """What a call is made of. `files` are ours that the body names by the provider's ids."""

    body: dict[str, Any]
    recipient: str | None
    files: tuple[str, ...] = ()
    stored: Stored | None = None
    quoted: Quoted | None = None


def is_too_late(row: RowMapping, manner: Manner) -> bool:
    """Whether the 24 hours are over in which it could have been sent."""
    return manner.has_window and bool(row["is_window_closed"]) and row["type"] not in _FREE_FORM_PASS


def carries(row: RowMapping, manner: Manner) -> bool:
    """Whether a file of ours goes along with it."""
    return not manner.uploads and "media_id" in _element(row)


def pack(
    s: Session, tenant_id: UUID, channel_id: UUID, manner: Manner, rows: list[RowMapping]
) -> tuple[dict[UUID, Parcel], list[tuple[RowMapping, Verdict]]]:
    """What to send of each message, by its id, and what becomes of those that cannot be sent; one whose file the
    provider has forgotten meanwhile is in neither."""
    packing = _Packing(s, tenant_id, channel_id, manner, rows)
    parcels: dict[UUID, Parcel] = {}
    refused: list[tuple[RowMapping, Verdict]] = []
    for row in rows:
        if is_too_late(row, manner):
            refused.append((row, _failed("131047", _WINDOW_CLOSED)))
            continue
        packed = packing.of(row)
        if isinstance(packed, Verdict):
            refused.append((row, packed))
        elif packed is not None:
            parcels[row["id"]] = packed
    return parcels, refused


class _Packing:
    """What some messages refer to and carry, looked up for all of them at once."""

    def __init__(self, s: Session, tenant_id: UUID, channel_id: UUID, manner: Manner, rows: list[RowMapping]) -> None:
        self._manner = manner
        refers = _named_in if manner.is_gateway else outgoing.reference
        self._named = {row["id"]: name for row in rows if (name := refers(row["body"]))}
        found = Message.named(s, [(tenant_id, channel_id, name) for name in self._named.values()])
        self._targets = {name: target for (_, _, name), target in found.items()}
        carried = sorted({id_ for row in rows for id_ in outgoing.media_ids(row["body"])})
        self._files = MediaUpload.of(s, tenant_id, channel_id, carried)
        self._bodies: Mapping[UUID, dict[str, Any]] = {}
        self._jids: Mapping[str, str] = {}
        if manner.is_gateway:
            self._bodies = Message.bodies(s, tenant_id, sorted(target["id"] for target in self._targets.values()))
            phones = {row["recipient"][1:] for row in rows if (row["recipient"] or "").startswith("+")}
            self._jids = ContactIdentity.jids(s, tenant_id, channel_id, phones)

    def of(self, row: RowMapping) -> Parcel | Verdict | None:
        """One message's parcel, or why there is none; None when its file must go up once more."""
        name = self._named.get(row["id"])
        target = self._targets.get(name) if name else None
        if target is not None and target["provider_id"] is None:
            return self._without_an_id(row, target)
        carried = outgoing.media_ids(row["body"])
        if any(id_ not in self._files for id_ in carried):
            return _failed("file_missing", _NO_SUCH_FILE)
        body = outgoing.referring(row["body"], target["provider_id"]) if target else row["body"]
        if self._manner.uploads:
            ids = {id_: known for id_ in carried if (known := self._files[id_]["provider_media_id"])}
            if len(ids) < len(set(carried)):
                return None
            return Parcel(outgoing.carrying(body, ids) if ids else body, row["recipient"], tuple(ids.values()))
        if name and target is None and self._manner.is_gateway:
            return _failed("unknown_reference", _NOT_KNOWN)
        quoted = self._quoted(target) if target is not None and self._manner.is_gateway else None
        recipient = self._recipient(row, quoted)
        if self._manner.is_gateway and recipient is None:
            return _failed("unknown_reference", _NOT_KNOWN)
        return self._along(row, body, recipient, quoted)

    def _without_an_id(self, row: RowMapping, target: RowMapping) -> Verdict:
        """The message it refers to has no id of the provider's: not yet, or never."""
        if target["status"] not in (MessageStatus.SENT, MessageStatus.UNKNOWN):
            return _failed("reference_not_sent", _NOT_SENT)
        if row["tries"] + 1 >= _ID_TRIES:
            return _failed("reference_without_id", _NO_ID_YET)
        return Verdict(MessageStatus.QUEUED, _ID_WAIT, tries=1, error_code="reference_without_id", error=_NO_ID_YET)

    def _quoted(self, target: RowMapping) -> Quoted:
        body = self._bodies.get(target["id"], {})
        author = _key_of(body).get("participant")
        return Quoted(
            target["provider_id"],
            target["direction"] == "out",
            author if isinstance(author, str) else None,
            target["type"],
            body,
        )

    def _recipient(self, row: RowMapping, quoted: Quoted | None) -> str | None:
        """To whom it goes: as WhatsApp spells the number, and a receipt to where the message came from."""
        to: str | None = row["recipient"]
        if not self._manner.is_gateway:
            return to
        if to is None:
            came_from = _key_of(quoted.body).get("remoteJid") if quoted else None
            return came_from if isinstance(came_from, str) else None
        spelt = self._jids.get(to[1:]) if to.startswith("+") else None
        return f"{spelt}@s.whatsapp.net" if spelt else to

    def _along(self, row: RowMapping, body: dict[str, Any], recipient: str | None, quoted: Quoted | None) -> Parcel:
        element = _element(row)
        if "media_id" not in element:
            return Parcel(body, recipient, quoted=quoted)
        file = self._files[UUID(element["media_id"])]
        named = {"filename": file["filename"]} if file["filename"] else {}
        element = named | {key: value for key, value in element.items() if key != "media_id"}
        stored = Stored(file["key"], file["bytes"], file["mime_type"])
        return Parcel(body | {row["type"]: element}, recipient, stored=stored, quoted=quoted)


def _failed(code: str, text: str) -> Verdict:
    return Verdict(MessageStatus.FAILED, error_code=code, error=text)


def _element(row: RowMapping) -> Mapping[str, Any]:
    element = row["body"].get(row["type"])
    return element if isinstance(element, dict) else {}


def _named_in(body: Mapping[str, Any]) -> str | None:
    """The message that this one quotes or marks as read, by our id or by the provider's."""
    name = (body.get("context") or body.get("read") or {}).get("message_id")
    return name if isinstance(name, str) else None


def _key_of(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """What WhatsApp Web calls a message: its chat, its id, in a group its author."""
    key = body.get("key")
    return key if isinstance(key, dict) else {}
