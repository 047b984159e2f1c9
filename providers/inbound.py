"""The plain values every webhook parser returns: what a provider told us, in one form for all providers.

Text in them is clean for PostgreSQL: NUL and lone surrogates are already U+FFFD (security-reliability.md B3).
Times are timezone-aware UTC. `path` is the JSON path of the element in the body as it arrived
(`$.entry[0].changes[1].value.messages[3]`), so that a dead letter can name it.
"""

from datetime import datetime
from typing import Any, Literal, TypeAlias

import msgspec


class Person(msgspec.Struct, frozen=True, gc=False):
    """Somebody (or a group) on the other side of a channel.

    `identities` are `(kind, value)` pairs, strongest first: `bsuid`, `lid` (digits), `phone` (digits without
    `+`, as the provider spelt it), `group` (of WhatsApp Web: the part before `@g.us`). Never empty. `aliases` are
    identities that a provider says belong to the same person from now on (a changed number; the JID that it is really
    written to), weaker than every identity.
    """

    identities: tuple[tuple[str, str], ...]
    name: str | None = None
    aliases: tuple[tuple[str, str], ...] = ()


class File(msgspec.Struct, frozen=True, gc=False):
    """A file that a message carries, by the provider's media id, by a link, or by the keys with which a gateway fetches
    and decrypts it; bytes are fetched by a later job."""

    provider_media_id: str | None
    kind: str
    mime_type: str | None = None
    sha256: str | None = None
    filename: str | None = None
    link: str | None = None
    keys: dict[str, Any] | None = None


class Message(msgspec.Struct, frozen=True, gc=False):
    """One message, incoming or an echo of one that the business sent elsewhere (`direction` out).

    `person` is the contact: the sender of an incoming message, the recipient of an echo. `chat` is whom the
    conversation is with: the same person, or the group. `type` is the provider's own word, also when
    unknown to us; `body` is the JSON object to keep for it.
    """

    path: str
    provider_id: str
    direction: Literal["in", "out"]
    type: str
    body: dict[str, Any]
    person: Person
    chat: Person
    at: datetime
    file: File | None = None
    may_be_ours: bool = False  # an echo that its provider does not tell apart from what we sent ourselves


class Called(msgspec.Struct, frozen=True, gc=False):
    """Somebody called one of our numbers at `at`: no message, but it opens the window as one does."""

    path: str
    person: Person
    at: datetime


class Status(msgspec.Struct, frozen=True, gc=False):
    """What became of a message that we sent. `participant` is '' except in groups: one report per member there."""

    path: str
    provider_id: str
    status: str
    at: datetime
    participant: str = ""
    callback_data: str | None = None
    error_code: str | None = None
    error: str | None = None
    pricing: dict[str, Any] | None = None
    conversation: dict[str, Any] | None = None
    chat: Person | None = None  # whom the message was sent to, where the provider tells and gives no callback data


class Connection(msgspec.Struct, frozen=True, gc=False):
    """A gateway says by itself that something changed about its connection. `word` is its own, in lower case.

    Deliveries of gateways are unsigned: whoever hears of it asks the gateway before believing anything.
    """

    path: str
    word: str


OUR_OTHER_DEVICE = "me"


class Undecrypted(msgspec.Struct, frozen=True, gc=False):
    """A message that a gateway received and could not decrypt: `jid` is the chat's, without a device; `participant` is
    who wrote in a group, else ''; `cause` one of `providers.undecrypted.Cause`. `person` is who wrote it, `at` when it
    failed.

    One that another device of our own wrote has the participant `me`, in whatever chat: the broken session is that
    device's. So whoever it was written to has nothing that could be refreshed, and is no contact whose messages fail.
    """

    path: str
    jid: str
    message_id: str
    cause: str
    person: Person
    at: datetime
    participant: str = ""


class Ended(msgspec.Struct, frozen=True, gc=False):
    """A gateway's connection to WhatsApp ended, with Baileys' code for the reason (baileys-sessions.md §6)."""

    path: str
    code: int
    at: datetime


class TemplateStatus(msgspec.Struct, frozen=True, gc=False):
    """The provider's verdict on a message template. `status` is its word in lower case (`approved`, `rejected`…)."""

    path: str
    name: str
    language: str
    status: str
    at: datetime
    category: str | None = None
    reason: str | None = None


class Notice(msgspec.Struct, frozen=True, gc=False):
    """Anything else, kept raw under its own type name. `digest` is equal for re-sends of the same notice."""

    path: str
    type: str
    payload: dict[str, Any]
    digest: bytes
    at: datetime


class Reject(msgspec.Struct, frozen=True, gc=False):
    """One element that could not be understood. `reason` names the rule, never the content."""

    path: str
    reason: str


Item: TypeAlias = Message | Called | Status | TemplateStatus | Notice | Connection | Undecrypted | Ended


class Change(msgspec.Struct, frozen=True, gc=False):
    """One routed part of a body: `number` is the provider's id of our number (of a gateway: the key of the instance,
    None where the body does not say), else `waba` names the account."""

    path: str
    number: str | None
    waba: str | None
    items: list[Item]


class Parsed(msgspec.Struct, frozen=True, gc=False):
    """A whole body: its changes, and what was rejected. `ignored` says why when none of it is for us."""

    changes: list[Change]
    rejects: list[Reject]
    ignored: str | None = None
