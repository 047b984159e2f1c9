"""Meta's WhatsApp Cloud API: a signed webhook body in, plain values out (whatsapp-cloud-api.md §3, §5-8).

    body ─ entry[] (an account) ─ changes[] (one field) ─ value ─ messages[], statuses[], errors[]

What cannot be understood is rejected as narrowly as possible: the whole body only when there is no body to walk,
else the one entry, change, message or status, by its path (security-reliability.md B1, B2). What is merely unknown
is kept: a new message type as a message, a new field as a notice (B5).
"""

import hashlib
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, Literal

import msgspec

from pombal.errors import Rejected
from providers.inbound import (
    Called,
    Change,
    File,
    Item,
    Message,
    Notice,
    Parsed,
    Person,
    Reject,
    Status,
    TemplateStatus,
)
from providers.values import (
    MAX_ERROR,
    MAX_NAME,
    MAX_STATUS,
    MAX_TYPE,
    decode,
    id_of,
    object_of,
    required_id,
    status_word,
    storable,
    text_of,
    time_of,
    word_of,
)

_OBJECT = "whatsapp_business_account"

_MAX_CALLBACK_DATA = 512

_BY_NUMBER = frozenset({"messages", "smb_message_echoes"})
_MEDIA = frozenset({"image", "video", "audio", "voice", "document", "sticker"})  # `voice`: old gateways
_CHANGED = ("user_changed_number", "customer_changed_number", "user_changed_user_id")

# Keys of a message that become fields of Message or identities of its Person; everything else is its body.
_HEAD = {
    "from": frozenset({"id", "timestamp", "type", "from", "from_user_id"}),
    "to": frozenset({"id", "timestamp", "type", "from", "from_user_id", "to", "to_user_id"}),
}


def parse(raw: bytes, received_at: datetime) -> Parsed:
    """Everything that a body says, in its order. Raises Rejected, and nothing else, when it says nothing readable."""
    body = decode(raw)
    if type(body) is not dict:
        raise Rejected("not an object")
    name = body.get("object")
    if type(name) is not str:
        raise Rejected("no object name")
    if name != _OBJECT:
        return Parsed([], [], ignored=f"object is not {_OBJECT}")
    if type(body.get("entry")) is not list:
        raise Rejected("no entry list")
    reader = _Reader(received_at)
    reader.each("$.entry", body["entry"], reader.entry)
    return Parsed(reader.changes, reader.rejects)


# -- entries and changes ---------------------------------------------------------------------------------------------


class _Origin(msgspec.Struct, frozen=True, gc=False):
    """The entry that a change came in: the account's id and, on account and template fields, Meta's time."""

    waba: str | None
    time: str | int | None


class _Contact(msgspec.Struct, frozen=True, gc=False):
    """What `value.contacts[]` knows of somebody; every part may be missing."""

    phone: str | None = None
    bsuid: str | None = None
    parent: str | None = None
    name: str | None = None


_NOBODY = _Contact()


class _Contacts(msgspec.Struct, frozen=True, gc=False):
    """The contacts of one value, by phone and by BSUID; `sole` when there is exactly one."""

    by_id: dict[str | None, _Contact]
    sole: _Contact | None


class _Reader:
    """One walk through a body: what was read so far, and what was rejected."""

    def __init__(self, received_at: datetime) -> None:
        self.received_at = received_at
        self.changes: list[Change] = []
        self.rejects: list[Reject] = []

    def each(self, path: str, elements: Any, read: Callable[[str, dict[str, Any]], None]) -> None:
        """Read every element of a list that may be absent; one that cannot be understood is rejected alone."""
        if elements is None:
            return
        if type(elements) is not list:
            self.rejects.append(Reject(path, "not a list"))
            return
        for i, element in enumerate(elements):
            self.one(f"{path}[{i}]", element, read)

    def one(self, path: str, element: Any, read: Callable[[str, dict[str, Any]], None]) -> None:
        """Read one element. A rejection ends here, so that it never takes its neighbours or its parent along."""
        try:
            if type(element) is not dict:
                raise Rejected("not an object")
            read(path, element)
        except Rejected as error:
            self.rejects.append(Reject(path, str(error)))

    def entry(self, path: str, entry: dict[str, Any]) -> None:
        time = entry.get("time")
        origin = _Origin(id_of(entry, "id"), time if type(time) in (str, int) else None)
        changes = entry.get("changes")
        if changes is None:
            raise Rejected("no changes list")
        self.each(f"{path}.changes", changes, lambda here, change: self.change(here, change, origin))

    def change(self, path: str, change: dict[str, Any], origin: _Origin) -> None:
        field = word_of(change, "field")
        value = change.get("value")
        if type(value) is not dict:
            self.rejects.append(Reject(f"{path}.value", "not an object"))
            return
        metadata = value.get("metadata")
        number = id_of(metadata, "phone_number_id") if type(metadata) is dict else None
        if number is None and field in _BY_NUMBER:
            raise Rejected("no phone_number_id")
        if number is None and origin.waba is None:
            raise Rejected("no account id")
        made = Change(path, number, origin.waba, [])
        path = f"{path}.value"
        if field == "messages":
            self.messages(path, value, origin, made.items)
        elif field == "smb_message_echoes":
            self.echoes(path, value, made.items)
        else:
            self.one(path, value, lambda here, _: made.items.append(self.notice(here, field, value, origin)))
            if field == "message_template_status_update":
                self.one(path, value, lambda here, _: made.items.append(_template_status(here, value, self.at(origin))))
            elif field == "calls" and number is not None:
                self.calls(path, value, made.items)
        if made.items:
            self.changes.append(made)

    def messages(self, path: str, value: dict[str, Any], origin: _Origin, items: list[Item]) -> None:
        """Messages and statuses may come together, and an error may come with neither."""
        messages: Any = value.get("messages")
        statuses, errors = value.get("statuses"), value.get("errors")
        contacts = self.contacts(path, value.get("contacts"))

        def message(here: str, element: dict[str, Any]) -> None:
            if element.get("type") == "request_welcome":  # withdrawn by Meta: nothing was said, so nothing to answer
                sent = _Origin(origin.waba, element.get("timestamp"))
                items.append(self.notice(here, "request_welcome", element, sent))
            else:
                items.append(_message(here, element, contacts, "in", self.received_at))

        def status(here: str, element: dict[str, Any]) -> None:
            items.append(_status(here, element, self.received_at))

        if errors and _takes_errors(messages):
            messages[0]["errors"], errors = errors, None
        self.each(f"{path}.messages", messages, message)
        self.each(f"{path}.statuses", statuses, status)
        if errors:
            # They carry no time: the same trouble on another number or another day is another notice.
            payload = {"errors": errors, "metadata": value.get("metadata"), "day": self.received_at.date().isoformat()}
            self.one(f"{path}.errors", payload, lambda at, _: items.append(self.notice(at, "errors", payload, origin)))
        elif not messages and not statuses:  # a list that is new to us, perhaps: keep it
            self.one(path, value, lambda at, _: items.append(self.notice(at, "messages", value, origin)))

    def echoes(self, path: str, value: dict[str, Any], items: list[Item]) -> None:
        """What the business sent from its phone app: outgoing, whoever is named in `from` (§15: bot loops)."""
        if value.get("message_echoes") is None:
            raise Rejected("no message_echoes list")
        contacts = self.contacts(path, value.get("contacts"))

        def echo(here: str, element: dict[str, Any]) -> None:
            items.append(_message(here, element, contacts, "out", self.received_at))

        self.each(f"{path}.message_echoes", value["message_echoes"], echo)

    def calls(self, path: str, value: dict[str, Any], items: list[Item]) -> None:
        """The beginnings of users' calls; whatever else is said of calls is in the notice alone (§8)."""
        contacts = self.contacts(path, value.get("contacts"))

        def call(here: str, element: dict[str, Any]) -> None:
            if (element.get("direction"), element.get("event")) == ("USER_INITIATED", "connect"):
                items.append(_called(here, element, contacts))

        self.each(f"{path}.calls", value.get("calls"), call)

    def contacts(self, path: str, elements: Any) -> _Contacts:
        by_id: dict[str | None, _Contact] = {}
        contact = None

        def keep(_: str, element: dict[str, Any]) -> None:
            nonlocal contact
            contact = _contact(element)
            for key in (contact.bsuid, contact.phone):
                if key is not None:
                    by_id[key] = contact

        self.each(f"{path}.contacts", elements, keep)
        return _Contacts(by_id, contact if type(elements) is list and len(elements) == 1 else None)

    def notice(self, path: str, field: str, value: dict[str, Any], origin: _Origin) -> Notice:
        """Kept raw. Its digest is our deduplication key, for Meta gives these no id of their own (§4)."""
        storable(value)
        canonical = msgspec.json.encode([origin.waba, origin.time, field, value], order="deterministic")
        return Notice(path, field, value, hashlib.sha256(canonical).digest(), self.at(origin))

    def at(self, origin: _Origin) -> datetime:
        return time_of(origin.time) or self.received_at


def _template_status(path: str, value: dict[str, Any], at: datetime) -> TemplateStatus:
    reason = text_of(value, "reason", MAX_ERROR)
    return TemplateStatus(
        path=path,
        name=required_id(value, "message_template_name"),
        language=required_id(value, "message_template_language"),
        status=status_word(value, "event"),
        at=at,
        category=text_of(value, "message_template_category", MAX_TYPE),
        reason=None if reason == "NONE" else reason,
    )


# -- messages --------------------------------------------------------------------------------------------------------


def _message(
    path: str, element: dict[str, Any], contacts: _Contacts, direction: Literal["in", "out"], received_at: datetime
) -> Message:
    """One message of any type, known to us or not. Its body is all of the element that has no other place (§6)."""
    other = "from" if direction == "in" else "to"
    provider_id = required_id(element, "id")
    kind = "unknown" if element.get("type") is None else word_of(element, "type")
    person, parent = _person(element, contacts, other)
    group = id_of(element, "group_id")
    head = _HEAD[other]
    body = {key: value for key, value in element.items() if key not in head}
    storable(body)
    if parent is not None:
        body.setdefault(f"{other}_parent_user_id", parent)
    at = time_of(element.get("timestamp"))
    if at is None:
        at = received_at
        body["pombal"] = {"odd_timestamp": True}
    return Message(
        path=path,
        provider_id=provider_id,
        direction=direction,
        type=kind,
        body=body,
        person=person,
        chat=person if group is None else Person((("group", group),)),
        at=at,
        file=_file(kind, element),
    )


def _called(path: str, element: dict[str, Any], contacts: _Contacts) -> Called:
    """A call from a user. Without a time of its own it would be another one each time that it is sent again."""
    person, _ = _person(element, contacts, "from")
    at = time_of(element.get("timestamp"))
    if at is None:
        raise Rejected("no timestamp")
    return Called(path, person, at)


def _person(element: dict[str, Any], contacts: _Contacts, other: str) -> tuple[Person, str | None]:
    """Who is on the other side, and the parent BSUID that the contact adds.

    A user with a username has no phone here, an old one no BSUID (§5); the contact with either id completes the other.
    """
    system = element.get("system")
    if type(system) is not dict:
        system = {}
    bsuid = id_of(element, f"{other}_user_id")
    phone = _phone(element, other) or _phone(system, "customer")
    contact = contacts.by_id.get(bsuid) or contacts.by_id.get(phone) or _NOBODY
    if bsuid is None and phone is None:
        contact = contacts.sole or _NOBODY
    bsuid, phone = bsuid or contact.bsuid, phone or contact.phone
    if bsuid is not None:
        identities = (("bsuid", bsuid),) if phone is None else (("bsuid", bsuid), ("phone", phone))
    elif phone is not None:
        identities = (("phone", phone),)
    else:
        raise Rejected("no sender" if other == "from" else "no recipient")
    aliases = tuple(alias for alias in _new_identities(system) if alias not in identities) if system else ()
    return Person(identities, contact.name, aliases), contact.parent


def _phone(holder: dict[str, Any], key: str) -> str | None:
    value = id_of(holder, key)
    return value.removeprefix("+") or None if value else None


def _new_identities(system: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The phone and the BSUID that somebody has from now on. A change of phone also makes a new BSUID (§5, §6)."""
    if system.get("type") not in _CHANGED:
        return
    phone, bsuid = _phone(system, "wa_id") or _phone(system, "new_wa_id"), id_of(system, "user_id")
    if phone is not None:
        yield "phone", phone
    if bsuid is not None:
        yield "bsuid", bsuid


def _contact(element: dict[str, Any]) -> _Contact:
    profile = element.get("profile")
    if type(profile) is not dict:
        profile = {}
    return _Contact(
        phone=_phone(element, "wa_id"),
        bsuid=id_of(element, "user_id"),
        parent=id_of(element, "parent_user_id"),
        name=text_of(profile, "name", MAX_NAME) or text_of(profile, "username", MAX_NAME),
    )


def _file(kind: str, element: dict[str, Any]) -> File | None:
    """The file of a media message, also of one inside an edit; None when Meta could not give its id."""
    if kind == "edit":
        edit = element.get("edit")
        inner = edit.get("message") if type(edit) is dict else None
        if type(inner) is not dict or type(inner.get("type")) is not str:
            return None
        element, kind = inner, inner["type"]
    media = element.get(kind) if kind in _MEDIA else None
    media_id = id_of(media, "id") if type(media) is dict else None
    if media is None or media_id is None:
        return None
    return File(
        media_id,
        kind,
        text_of(media, "mime_type", MAX_NAME),
        text_of(media, "sha256", MAX_NAME),
        text_of(media, "filename", MAX_NAME),
    )


def _takes_errors(messages: Any) -> bool:
    """Whether `value.errors` belongs to the one message beside it, as when Meta lost its interactive object (§6)."""
    return type(messages) is list and len(messages) == 1 and type(messages[0]) is dict and not messages[0].get("errors")


# -- statuses --------------------------------------------------------------------------------------------------------


def _status(path: str, element: dict[str, Any], received_at: datetime) -> Status:
    """One status, its word kept also when unknown to us (§7). Only a group send names a participant."""
    code, error = _error(element.get("errors"))
    return Status(
        path=path,
        provider_id=required_id(element, "id"),
        status=status_word(element, "status"),
        at=time_of(element.get("timestamp")) or received_at,
        participant=id_of(element, "recipient_participant_id") or id_of(element, "recipient_participant_user_id") or "",
        callback_data=text_of(element, "biz_opaque_callback_data", _MAX_CALLBACK_DATA),
        error_code=code,
        error=error,
        pricing=object_of(element, "pricing"),
        conversation=object_of(element, "conversation"),
    )


def _error(errors: Any) -> tuple[str | None, str | None]:
    """Code and text of the first error. `error_data` is an object, or at times a plain string (§13)."""
    if type(errors) is not list or not errors or type(errors[0]) is not dict:
        return None, None
    first = errors[0]
    code = first.get("code")
    data = first.get("error_data")
    details = text_of(data, "details", MAX_ERROR) if type(data) is dict else text_of(first, "error_data", MAX_ERROR)
    title = text_of(first, "title", MAX_ERROR) or text_of(first, "message", MAX_ERROR)
    text = ": ".join(part for part in (title, details) if part)
    return str(code)[:MAX_STATUS] if type(code) in (str, int) else None, text[:MAX_ERROR] or None
