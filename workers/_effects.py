"""What incoming items change: contacts, conversations, messages, statuses, templates, files and events.

The same for every provider, since parsers return the same plain values. Effects commute: any order and any repetition
of items ends in the same rows. Each table is written once per batch, sorted by its key, and always in the same order
of tables, so that two batches cannot deadlock (architecture.md, decision 2). Not a queue, hence the underscore.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

import msgspec
from sqlalchemy import RowMapping, text
from sqlalchemy.orm import Session

from models import (
    Attempt,
    ContactIdentity,
    Conversation,
    DeadLetter,
    Event,
    Hold,
    Lane,
    Media,
    Message,
    MessageStatus,
    Outcome,
    Seen,
    StatusReport,
    Template,
    outgoing,
)
from models.contact import Meeting
from pombal import log, metrics
from pombal.ids import uuid7
from providers import inbound
from providers.meta_errors import late_fault
from providers.outbound import Kind
from workers import _echoes, _late

_log = log.get()

_WINDOW = timedelta(hours=24)  # for free-form answers after a customer's message or call (whatsapp-cloud-api.md §10)
_RECENT = timedelta(minutes=5)
_MEDIA_LIFE = timedelta(days=7)  # of a media id (whatsapp-cloud-api.md §12)

Source = TypeVar("Source")  # where an item came from; handed back beside what became of it


class Settled(msgspec.Struct, frozen=True):
    """A status told that a send was accepted before its answer did, or in its place (`had_no_answer`).

    `is_double`: the message had been sent again meanwhile.
    """

    message_id: UUID
    channel_id: UUID
    had_no_answer: bool
    is_double: bool


class Stored(msgspec.Struct, frozen=True):
    """A message of the batch: `is_new` is False when it was there before, or twice in the batch."""

    id: UUID
    tenant_id: UUID
    channel_id: UUID
    direction: str
    is_new: bool
    media_id: UUID | None = None  # of a new one's file, which is to be fetched


def apply_items(
    s: Session, given: Iterable[tuple[Source, UUID, UUID, Any]]
) -> tuple[list[tuple[Source, Stored]], list[Settled]]:
    """Write all effects of `(source, tenant, channel, item)`; returns its messages beside their sources, and the sends
    that it settled.

    Needs a transaction that sees the tenants. `source.id` is noted as the message's delivery.
    """
    told = Told()
    sources = []
    for source, tenant, channel, item in given:
        id_ = told.add(getattr(source, "id", None), tenant, channel, item)
        if id_ is not None:
            sources.append((source, id_, tenant, channel, item.direction))
    told.people.settle(s)
    # Of channels whose echoes may be of our own sends, before a row of theirs is written: what a turn of the lane is
    # writing down at the same time may have the same id.
    Lane.lock(s, told.channels_of_gateways())
    events = take_back_acks(s, told)
    settled = settle_sends(s, claimed_by_echoes(s, told))
    new = Message.store(s, told.message_rows())
    StatusReport.fold(s, told.status_rows())
    reported = Attempt.reported(s, list(told.callbacks))
    # All other lanes that something moves in, at once and in their order, before any message is touched.
    Lane.lock(s, sorted({row["channel_id"] for row in reported} | {channel for _, channel in told.failures}))
    held = hold_lanes(s, told.failures)
    settled += settle_sends(s, [dict(row) for row in reported] + claimed_by_acks(s, told))
    risen = Message.catch_up(s, told.reported_keys())
    Conversation.touch(s, told.conversation_rows(new))
    Template.heard(s, told.template_rows())
    files = told.media_rows(new)
    Media.expect(s, files)
    notices = Seen.first_time(s, set(told.notices))
    events += [event for _, event in settled if event] + told.event_rows(new, risen, notices) + held
    retried, letters = _late.try_again(s, risen)
    Event.append(s, events + retried)  # their ids were made in this order, which is the one they are read in
    DeadLetter.settle(s, [one.message_id for one, _ in settled if not one.is_double])
    DeadLetter.record(s, letters)
    # Whatever a deferred foreign key has to say belongs to these items, and not to the commit.
    s.execute(text("SET CONSTRAINTS ALL IMMEDIATE"))
    s.execute(text("SET CONSTRAINTS ALL DEFERRED"))
    outcome = []
    fresh, media = set(new), {file["message_id"]: file["id"] for file in files}
    for source, told_id, tenant, channel, direction in sources:
        id_ = told.ours.get(told_id, told_id)
        outcome.append((source, Stored(id_, tenant, channel, direction, id_ in fresh, media.pop(id_, None))))
        fresh.discard(id_)
    return outcome, [one for one, _ in settled]


def hold_lanes(s: Session, failures: dict[tuple[UUID, UUID], list[inbound.Status]]) -> list[dict[str, Any]]:
    """Statuses that failed for a reason of the whole account (payment, say) hold its sending; returns the events."""
    events = []
    for (tenant, channel), items in sorted(failures.items(), key=lambda one: one[0]):
        # An old one may come again, or late: what was wrong then may be mended by now.
        recent = [item for item in items if item.at > datetime.now(UTC) - _RECENT and item.error_code]
        faults = [late_fault(item.error_code or "", item.error or "") for item in recent]
        fault = next((fault for fault in faults if fault.kind in (Kind.AUTH, Kind.PAYMENT)), None)
        if fault is None:
            continue
        hold = Hold(fault.kind.value)
        if Lane.set_hold(s, channel, hold, code=fault.code, reason=fault.text, is_of_status=True):
            events.append(Event.row("channel_held", tenant, channel, None, {"hold": hold, "code": fault.code}))
            metrics.holds.labels(hold=hold).inc()
            _log.error("channel_held", channel_id=str(channel), hold=hold, code=fault.code)
    return events


def claimed_by_echoes(s: Session, told: "Told") -> list[dict[str, Any]]:
    """The attempts that echoes of gateways are of, as `settle_sends` takes them. Needs the lanes' locks."""
    heard = told.echoes()
    known = Message.known(s, [one.key for one in heard])
    found = _echoes.claimed(s, [one for one in heard if one.key not in known])
    for key, message_id in known.items():  # it may be of an attempt that was not the message's last
        told.is_ours(key, message_id)
    for one, attempt in found:
        told.is_ours(one.key, attempt["message_id"])
    return [_told_of(one, attempt, "echo") for one, attempt in found]


def take_back_acks(s: Session, told: "Told") -> list[dict[str, Any]]:
    """Sends that an ack has settled whose id is another message's, as its echo shows now; returns the events."""
    heard = {one.key: one for one in told.echoes()}
    wrong: list[Mapping[str, Any]] = []
    for row in Attempt.settled_by_ack(s, heard):
        echo = heard[(row["tenant_id"], row["channel_id"], row["provider_id"])]
        if _echoes.fingerprint(row["type"], row["body"]) != _echoes.fingerprint(echo.type or "", echo.body or {}):
            wrong.append(dict(row))
    undone = Attempt.unsettle(s, wrong, outgoing.SETTLE_WAIT)
    Lane.expect(s, [{name: row[name] for name in ("tenant_id", "channel_id", "due_at")} for row in undone])
    return [outgoing.event(row, MessageStatus.UNKNOWN) for row in undone]


def claimed_by_acks(s: Session, told: "Told") -> list[dict[str, Any]]:
    """The same of acks under ids that nobody has told before. Needs the lanes' locks, and the messages stored."""
    known = Message.known(s, told.acks)
    nameless = {key: item for key, item in told.acks.items() if key not in known and item.status in _PROOFS}
    people = {
        (tenant, channel, *identity)
        for (tenant, channel, _), item in nameless.items()
        for identity in (item.chat.identities if item.chat else ())
    }
    contacts = ContactIdentity.owners(s, people)
    heard = []
    for (tenant, channel, provider_id), item in nameless.items():
        mine = [(tenant, channel, *identity) for identity in (item.chat.identities if item.chat else ())]
        chats = {Conversation.id_of(channel, contacts[key]) for key in mine if key in contacts}
        heard.append(_echoes.Heard(tenant, channel, tuple(chats), provider_id, item.at))
    first_told = StatusReport.first_told(s, nameless)
    return [
        _told_of(one, attempt, "ack")
        for one, attempt in _echoes.claimed(s, heard)
        if first_told.get(one.key, one.at) > attempt["started_at"]
    ]


def _told_of(heard: _echoes.Heard, attempt: RowMapping, by: str) -> dict[str, Any]:
    ids = {name: attempt[name] for name in ("tenant_id", "channel_id", "id", "message_id", "outcome")}
    return ids | {"provider_id": heard.provider_id, "sent_at": heard.at, "settled_by": by}


def settle_sends(s: Session, reported: Sequence[Mapping[str, Any]]) -> list[tuple[Settled, dict[str, Any] | None]]:
    """Attempts whose answer nobody has heard (yet), or whose answer told no id: somebody told that they were accepted.

    Returns what was settled, each with its event if it is news. Needs the lanes' locks: their lines move.
    """
    without = {row["message_id"] for row in reported if row["outcome"] == Outcome.UNKNOWN}
    answered = {row["message_id"] for row in reported if row["outcome"] == Outcome.ACCEPTED}
    outcome: list[tuple[Settled, dict[str, Any] | None]] = []
    freed = []
    for row in Attempt.settle(s, reported):
        kind = "sent" if row["is_adopted"] else "sent_twice"
        settled = Settled(row["id"], row["channel_id"], row["id"] in without, not row["is_adopted"])
        if row["id"] in answered and row["is_adopted"]:
            outcome.append((settled, None))
            continue
        outcome.append((settled, outgoing.event(row, kind)))
        outgoing.wake(s, row["tenant_id"], {row["conversation_id"]})
        freed.append({"tenant_id": row["tenant_id"], "channel_id": row["channel_id"], "due_at": None})
    Lane.expect(s, freed)
    return outcome


class Told:
    """What a batch says, merged by natural key: the same key twice in one statement is an error in SQL."""

    def __init__(self) -> None:
        self.people = Meeting()
        self.notices: dict[tuple[UUID, bytes], tuple[UUID, inbound.Notice]] = {}
        self.callbacks: set[tuple[UUID, UUID, str, str]] = set()  # with the data that a send carried, by its status
        self.failures: dict[tuple[UUID, UUID], list[inbound.Status]] = {}  # reported ones, by channel
        self.acks: dict[tuple[UUID, UUID, str], inbound.Status] = {}  # of gateways, which name no attempt
        self._gateways: set[UUID] = set()  # channels that these are of
        self.ours: dict[UUID, UUID] = {}  # echoes of messages of ours: the ids they would have had, and have
        self._messages: dict[tuple[UUID, UUID, str], tuple[UUID, UUID | None, inbound.Message]] = {}
        self._calls: list[tuple[UUID, UUID, inbound.Called]] = []
        self._statuses: dict[tuple[UUID, UUID, str, str], dict[str, Any]] = {}
        self._templates: dict[tuple[UUID, UUID, str, str], inbound.TemplateStatus] = {}

    def add(self, delivery: UUID | None, tenant: UUID, channel: UUID, item: Any) -> UUID | None:
        """Take one item in; returns the id under which a message will be stored if it is new."""
        match item:
            case inbound.Message():
                known = self._messages.get((tenant, channel, item.provider_id))
                if known is None:
                    known = self._messages[(tenant, channel, item.provider_id)] = (uuid7(), delivery, item)
                    self._meet(tenant, channel, item)
                return known[0]
            case inbound.Called():
                self._calls.append((tenant, channel, item))
                self.people.meet(tenant, channel, item.person.identities, (), item.person.name, item.at)
            case inbound.Status():
                self._report(tenant, channel, item)
            case inbound.TemplateStatus():
                key = (tenant, channel, item.name, item.language)
                verdict = self._templates.get(key)
                if verdict is None or (verdict.at, verdict.status) < (item.at, item.status):
                    self._templates[key] = item
            case inbound.Notice():
                # An account's notice is routed to each of its channels, and is one event per tenant.
                self.notices.setdefault((tenant, item.digest), (channel, item))
        return None

    def channels_of_gateways(self) -> list[UUID]:
        """Those that something was told of which may concern a send of ours without naming it."""
        told = {channel for (_, channel, _), (_, _, item) in self._messages.items() if item.may_be_ours}
        return sorted(told | self._gateways)

    def echoes(self) -> list[_echoes.Heard]:
        heard = []
        for (tenant, channel, provider_id), (_, _, item) in self._messages.items():
            if item.may_be_ours:
                people = self.people.all_of(tenant, channel, item.chat.identities)
                chats = tuple(Conversation.id_of(channel, person) for person in people)
                heard.append(_echoes.Heard(tenant, channel, chats, provider_id, item.at, item.type, item.body))
        return heard

    def is_ours(self, key: tuple[UUID, UUID, str], message_id: UUID) -> None:
        """This echo is of a message of ours, and gets no row of its own."""
        self.ours[self._messages[key][0]] = message_id

    def _meet(self, tenant: UUID, channel: UUID, item: inbound.Message) -> None:
        for person in (item.person, item.chat) if item.chat is not item.person else (item.person,):
            self.people.meet(tenant, channel, person.identities, person.aliases, person.name, item.at)

    def _report(self, tenant: UUID, channel: UUID, item: inbound.Status) -> None:
        key = (tenant, channel, item.provider_id, item.participant)
        row = self._statuses.setdefault(key, _empty_report(*key))
        rank = StatusReport.rank_of(item.status)
        if row["status"] is None or rank > row["rank"]:
            row["status"], row["rank"] = item.status, rank
        if item.status == "failed":
            self.failures.setdefault((tenant, channel), []).append(item)
        if item.chat is not None:
            self._gateways.add(channel)
            self.acks.setdefault((tenant, channel, item.provider_id), item)
        if item.callback_data:
            self.callbacks.add((tenant, channel, item.provider_id, item.callback_data))
        for column in REPORTED_AT.get(item.status, ()):
            row[column] = min(row[column] or item.at, item.at)
        for column in ("error_code", "error", "callback_data"):
            row[column] = row[column] or getattr(item, column)
        for column in ("pricing", "conversation"):
            said = getattr(item, column)
            row[column] = row[column] or (_json(said) if said else None)

    def message_rows(self) -> list[dict[str, Any]]:
        rows = []
        for (tenant, channel, provider_id), (id_, delivery, item) in self._messages.items():
            if id_ in self.ours:
                continue
            is_in = item.direction == "in"
            chat = self.people.whom(tenant, channel, item.chat.identities)
            rows.append(
                {
                    "tenant_id": tenant,
                    "id": id_,
                    "channel_id": channel,
                    "conversation_id": Conversation.id_of(channel, chat),
                    "contact_id": self.people.whom(tenant, channel, item.person.identities),
                    "direction": item.direction,
                    "type": item.type,
                    "body": _json(item.body),
                    "provider_id": provider_id,
                    "status": MessageStatus.RECEIVED if is_in else MessageStatus.SENT,
                    "sent_at": None if is_in else item.at,
                    "provider_at": item.at,
                    "delivery_id": delivery,
                }
            )
        return rows

    def status_rows(self) -> list[dict[str, Any]]:
        """Reports, and an empty one for each echo: whoever comes second sees the other's row (`StatusReport`)."""
        for (tenant, channel, provider_id), (_, _, item) in self._messages.items():
            if item.direction == "out":
                key = (tenant, channel, provider_id, "")
                self._statuses.setdefault(key, _empty_report(*key))
        return list(self._statuses.values())

    def reported_keys(self) -> list[tuple[UUID, UUID, str]]:
        return [(tenant, channel, provider_id) for tenant, channel, provider_id, _ in self._statuses]

    def conversation_rows(self, new: set[UUID]) -> list[dict[str, Any]]:
        """One row per conversation that got a new message or a call; only new incoming messages count as unread."""
        rows: dict[UUID, dict[str, Any]] = {}

        def row_of(tenant: UUID, channel: UUID, chat: inbound.Person) -> dict[str, Any]:
            contact = self.people.whom(tenant, channel, chat.identities)
            id_ = Conversation.id_of(channel, contact)
            row = {"tenant_id": tenant, "id": id_, "channel_id": channel, "contact_id": contact}
            return rows.setdefault(id_, row | {"last_message_at": None, "window_until": None, "unread_count": 0})

        def open_window(row: dict[str, Any], at: datetime) -> None:
            row["window_until"] = max(row["window_until"] or at + _WINDOW, at + _WINDOW)

        for (tenant, channel, _), (id_, _, item) in self._messages.items():
            if id_ not in new:
                continue
            row = row_of(tenant, channel, item.chat)
            row["last_message_at"] = max(row["last_message_at"] or item.at, item.at)
            if item.direction == "in":
                open_window(row, item.at)
                row["unread_count"] += 1
        for tenant, channel, call in self._calls:
            open_window(row_of(tenant, channel, call.person), call.at)
        return list(rows.values())

    def template_rows(self) -> list[dict[str, Any]]:
        return [
            {
                "tenant_id": tenant,
                "channel_id": channel,
                "name": name,
                "language": language,
                "category": item.category,
                "status": item.status,
                "reason": item.reason,
                "status_at": item.at,
            }
            for (tenant, channel, name, language), item in self._templates.items()
        ]

    def media_rows(self, new: set[UUID]) -> list[dict[str, Any]]:
        return [
            {
                "tenant_id": tenant,
                "id": uuid7(),
                "message_id": id_,
                "channel_id": channel,
                "provider_media_id": item.file.provider_media_id,
                "link": item.file.link,
                "keys": item.file.keys,
                "kind": item.file.kind,
                "mime_type": item.file.mime_type,
                "sha256": item.file.sha256,
                "filename": item.file.filename,
                "deadline": _deadline(item.at),
            }
            for (tenant, channel, _), (id_, _, item) in self._messages.items()
            if id_ in new and item.file
        ]

    def event_rows(
        self, new: set[UUID], risen: list[RowMapping], notices: set[tuple[UUID, bytes]]
    ) -> list[dict[str, Any]]:
        """What listeners are told: ids and states; texts stay in the message."""
        rows = []
        for (tenant, channel, _), (id_, _, item) in self._messages.items():
            if id_ in new:
                chat = Conversation.id_of(channel, self.people.whom(tenant, channel, item.chat.identities))
                kind = "message_received" if item.direction == "in" else "message_echoed"
                payload = {"message_id": id_, "conversation_id": chat, "type": item.type}
                rows.append(Event.row(kind, tenant, channel, id_, payload))
        for row in risen:
            payload = {"message_id": row["id"], "status": row["status"]}
            rows.append(Event.row("message_status", row["tenant_id"], row["channel_id"], row["id"], payload))
        for tenant, digest in sorted(notices):
            channel, notice = self.notices[(tenant, digest)]
            rows.append(Event.row(notice.type, tenant, channel, None, notice.payload))
        return rows


# Of these an ack proves that a message was just sent; what is read may be old.
_PROOFS = ("sent", "delivered")

# `read` without `delivered` is common: the step was skipped, not missed (whatsapp-cloud-api.md §4).
REPORTED_AT = {
    "sent": ("sent_at",),
    "delivered": ("delivered_at",),
    "read": ("read_at",),
    "played": ("read_at",),
    "failed": ("failed_at",),
}


def _deadline(at: datetime) -> datetime:
    """When the provider forgets a message's file; from now on where its time cannot be true."""
    now = datetime.now(UTC)
    return (at if now - _MEDIA_LIFE <= at <= now else now) + _MEDIA_LIFE


def _empty_report(tenant: UUID, channel: UUID, provider_id: str, participant: str) -> dict[str, Any]:
    return {
        "tenant_id": tenant,
        "channel_id": channel,
        "provider_id": provider_id,
        "participant": participant,
        "rank": 0,
        "status": None,
        "sent_at": None,
        "delivered_at": None,
        "read_at": None,
        "failed_at": None,
        "error_code": None,
        "error": None,
        "pricing": None,
        "conversation": None,
        "callback_data": None,
    }


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
