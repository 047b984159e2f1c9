"""Storms: many messages of some contacts, after something broke that makes them undecryptable.

A storm breaks what its kind is named for and goes on sending; whether a message decrypts is decided by the session's
files alone, so that a storm heals when the right step was made, and only then. `sandbox.kinds` tells which step heals
which kind.
"""

import asyncio
import itertools
import secrets
import time
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from sandbox import megaapi_words as words
from sandbox.baileys_keys import Failure
from sandbox.baileys_sessions import Incoming, Session
from sandbox.kinds import BAILEYS_STORMS
from sandbox.meta import JSON

_CONTACTS = {"retry": 6, "prekey": 8, "ratchet": 2, "derived": 8, "sender_key": 3, "identity": 5, "duplicate": 3}
_QUIET = ("version", "twin", "logged_out")  # no messages unless they are asked for
GROUP = "120363000000000001@g.us"

Seconds = Annotated[float, Meta(ge=0, le=86_400)]
Digits = Annotated[str, Meta(pattern=r"^[0-9]{5,20}$")]


class StormPlan(msgspec.Struct, forbid_unknown_fields=True):
    """What happens to one session.

    kind            a key of `sandbox.kinds.BAILEYS_STORMS`
    contacts        how many, or their numbers
    group           of a `sender_key`
    messages        of the burst, in turns from the contacts; `pace` of them a second
    then_every      seconds from one further message of theirs to the next, until the storm is stopped; 0 for none
    also            normal messages of other people for each of theirs
    repeats         how often an undecryptable message is tried again, under the same id
    retry_after     seconds until the sender answers a retry receipt
    entries         stored sessions of each contact: each prints its own error
    old_ids_return  what failed comes again, decrypted, once its sender's messages can be read
    twin_every      seconds between a twin's visits
    lid             contacts are told by their hidden address
    """

    gateway: str
    session: str
    kind: str
    contacts: Annotated[int, Meta(ge=1, le=1_000)] | list[Digits] | None = None
    group: Annotated[str, Meta(pattern=r"^[0-9-]{5,40}@g\.us$")] = GROUP
    messages: Annotated[int, Meta(ge=0, le=100_000)] | None = None
    pace: Annotated[float, Meta(gt=0, le=10_000)] = 20.0
    then_every: Seconds = 0.2
    also: Annotated[int, Meta(ge=0, le=100)] = 0
    repeats: Annotated[int, Meta(ge=0, le=20)] = 0
    retry_after: Seconds = 0.3
    entries: Annotated[int, Meta(ge=1, le=40)] = 1
    old_ids_return: bool = False
    twin_every: Annotated[float, Meta(ge=0.05, le=3_600)] = 0.5
    lid: Literal["never", "with_alt", "without_alt"] = "never"

    def __post_init__(self) -> None:
        if self.kind not in BAILEYS_STORMS:
            raise ValueError(f"there is no storm {self.kind!r}; there are {', '.join(BAILEYS_STORMS)}")

    def people(self, n: int) -> list[str]:
        """JIDs of the contacts; those of the n-th storm are not those of another."""
        if isinstance(self.contacts, list):
            numbers = self.contacts
        else:
            count = self.contacts or _CONTACTS.get(self.kind, 6)
            numbers = [f"55119{60 + n % 30:02}{i:06}" for i in range(1, count + 1)]
        return [words.jid(number) for number in numbers]


class Storm:
    """One that was told to come. `failed`, `healed` and `decrypted` are ids, as they were met."""

    def __init__(self, id: int, plan: StormPlan, session: Session) -> None:
        self.id = id
        self.plan = plan
        self.session = session
        self.state: Literal["running", "done", "stopped"] = "running"
        self.people = plan.people(id)
        self.sent = 0
        self.outcomes: dict[str, list[str]] = {"failed": [], "healed": [], "decrypted": []}
        self._of: dict[str, str] = {}  # who failed, by id
        self._last: Failure | None = None
        self._turn = itertools.cycle(self.people)
        self._incoming: dict[str, Incoming] = {}

    async def run(self) -> None:
        """Break it, send the burst, and go on sending."""
        self._break()
        messages = self.plan.messages
        if messages is None:
            messages = 0 if self.plan.kind in _QUIET else 12
        for _ in range(messages):
            self._message(is_burst=True)
            await asyncio.sleep(1 / self.plan.pace)
        self.state = "done"
        while self.plan.then_every and messages:
            await asyncio.sleep(self.plan.then_every)
            self._message(is_burst=False)

    def stop(self) -> None:
        """No more of it; what is broken stays so, but for a twin and a version that is refused."""
        self.state = "stopped"
        if self.plan.kind == "version":
            self.session.refuses_version = False
        if self.plan.kind == "twin":
            self.session.meet_twin(None)

    def shown(self) -> JSON:
        return {
            "id": self.id,
            "gateway": self.plan.gateway,
            "session": self.plan.session,
            "kind": self.plan.kind,
            "state": self.state,
            "sent": self.sent,
            "contacts": self.people,
            "group": self.plan.group if self.plan.kind == "sender_key" else None,
            "failed_contacts": sorted(set(self._of.values())),
            **self.outcomes,
        }

    # What became of its messages

    def failed(self, id: str, jid: str, failure: Failure) -> None:
        self._last = failure
        if id not in self._of:
            self.outcomes["failed"].append(id)
        self._of[id] = jid

    def decrypted(self, id: str, jid: str) -> None:
        came = "healed" if id in self._of else "decrypted"
        self.outcomes[came].append(id)
        if came == "decrypted" and self.plan.old_ids_return:
            for old in [one for one, its in self._of.items() if its == jid and one not in self.outcomes["healed"]]:
                self.session.receive(self._incoming[old])

    def healed(self, id: str, jid: str) -> None:
        if id not in self.outcomes["healed"]:
            self.outcomes["healed"].append(id)

    # Breaking and sending

    def _break(self) -> None:
        plan, session = self.plan, self.session
        for i in range(plan.also):
            session.keys.know(_other(i))  # whose messages are to be read all the while
        match plan.kind:
            case "prekey":
                session.keys.lose_pre_keys()
            case "ratchet" | "derived":
                for person in self._filed():
                    session.keys.break_ratchet(person, stubborn=plan.kind == "derived")
            case "sender_key":
                for person in self._filed():
                    session.keys.break_sender_key(plan.group, person)
            case "identity":
                session.keys.lose_identity()
            case "version":
                session.refuses_version = True
                session.end(405)
            case "twin":
                session.meet_twin(plan.twin_every)
            case "logged_out":
                session.end(401)

    def _message(self, *, is_burst: bool) -> None:
        plan, session = self.plan, self.session
        person = next(self._turn)
        if plan.kind == "duplicate":
            self._duplicate(person)
        else:
            if plan.kind == "retry" and is_burst:
                session.keys.forget(self._file_of(person))
            one = self._made(person)
            self._incoming[one.key["id"]] = one
            session.receive(one)
            if one.key["id"] in self._of:
                again = None if self._last is None else self._last._replace(heals=False)
                for _ in range(plan.repeats):
                    session.receive(Incoming(**{**vars(one), "stub": again, "watch": None}))
        self.sent += 1
        for i in range(plan.also):
            session.receive(self._made(_other(i), is_other=True))

    def _duplicate(self, person: str) -> None:
        one = self._made(person)
        self.session.receive(one)
        self.session.repeat(one)

    def _made(self, person: str, *, is_other: bool = False) -> Incoming:
        plan = self.plan
        group = plan.group if plan.kind == "sender_key" and not is_other else None
        author = person if group else None
        key = words.key(_id(), group or person, from_me=False, author=author, lids=plan.lid)
        return Incoming(
            person=self._file_of(person),
            key=key,
            content={"conversation": f"Mensagem {self.sent + 1}"},
            name="Bia Prado",
            at=int(time.time()),
            group=group,
            waits=plan.retry_after,
            entries=plan.entries,
            watch=None if is_other else self,
        )

    def _filed(self) -> Iterator[str]:
        return (self._file_of(person) for person in self.people)

    def _file_of(self, person: str) -> str:
        """The address under which the contact's keys are filed."""
        return person if self.plan.lid == "never" else words.hidden(person)


def _other(i: int) -> str:
    """A contact whom the storm does not concern."""
    return words.jid(f"5511950{i:06}")


def _id() -> str:
    return secrets.token_hex(16).upper()
