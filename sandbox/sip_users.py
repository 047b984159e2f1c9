"""The accounts of the simulated registrar, their bindings, and when they had none."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from sandbox.config import SipUser
from sandbox.meta import JSON
from sandbox.sip_words import Uri

if TYPE_CHECKING:
    from sandbox.sip_journal import Transaction

MAX_CALL_IDS = 16  # of a user, whose CSeqs are known
MAX_GAPS = 1_000

Key = tuple[str, str, str, int, str]


class Gap(NamedTuple):
    """A time without any binding, after the first one."""

    start: float
    end: float | None
    why: str  # `expired` or `removed`

    def shown(self) -> JSON:
        return {"from": self.start, "to": self.end, "why": self.why}


@dataclass
class Binding:
    contact: str  # the URI as it was given
    uri: Uri
    expires_at: float
    granted: int
    call_id: str
    cseq: int
    source: tuple[str, int]
    transport: str
    made_at: float

    def shown(self) -> JSON:
        return {
            "contact": self.contact,
            "expires_at": self.expires_at,
            "granted": self.granted,
            "call_id": self.call_id,
            "cseq": self.cseq,
            "source": "{}:{}".format(*self.source),
            "transport": self.transport,
            "made_at": self.made_at,
        }


@dataclass(eq=False)
class User:
    """One account. Times are those of `time.time()`."""

    name: str
    password: str = field(repr=False)
    auth_user: str
    domain: str | None
    realm: str | None
    registers: int = 0
    granted: int = 0
    overlaps: int = 0
    last_code: int | None = None
    waiting: "set[Transaction]" = field(default_factory=set, repr=False)  # heard, and not answered yet
    nonce: str = field(default="", repr=False)  # that was answered last, and its count
    nonce_count: int = 0
    cseqs: dict[str, int] = field(default_factory=dict, repr=False)
    gaps: list[Gap] = field(default_factory=list, repr=False)
    _bindings: dict[Key, Binding] = field(default_factory=dict, repr=False)
    _until: float | None = None  # when the last binding ends, or ended; None until there was one
    _why: str = "expired"

    def bindings(self, now: float | None = None) -> list[Binding]:
        """Those that live, the oldest first."""
        now = time.time() if now is None else now
        gone = [key for key, one in self._bindings.items() if one.expires_at <= now]
        for key in gone:
            del self._bindings[key]
        return list(self._bindings.values())

    def bind(self, binding: Binding) -> None:
        now = binding.made_at
        if self._until is not None and self._until < now:
            self.gaps.append(Gap(self._until, now, self._why))
            del self.gaps[:-MAX_GAPS]
        self.bindings(now)
        self._bindings.pop(binding.uri.key, None)  # to the end
        self._bindings[binding.uri.key] = binding
        self._covered(now)

    def unbind(self, uri: Uri | None = None) -> None:
        """One binding, or all of them."""
        now = time.time()
        if not self.bindings(now):
            return
        if uri is None:
            self._bindings.clear()
        else:
            self._bindings.pop(uri.key, None)
        self._covered(now)

    def advances(self, call_id: str, cseq: int) -> bool:
        """Whether the CSeq is higher than the last one of this Call-ID; it is the last one then."""
        last = self.cseqs.pop(call_id, -1)
        self.cseqs[call_id] = max(last, cseq)
        if len(self.cseqs) > MAX_CALL_IDS:
            del self.cseqs[next(iter(self.cseqs))]
        return cseq > last

    def all_gaps(self) -> list[Gap]:
        """The one that goes on too."""
        is_open = self._until is not None and self._until <= time.time()
        return [*self.gaps, Gap(self._until or 0.0, None, self._why)] if is_open else self.gaps

    def shown(self) -> JSON:
        bindings = self.bindings()
        return {
            "name": self.name,
            "bindings": [one.shown() for one in bindings],
            "registered": bool(bindings),
            "gaps": [gap.shown() for gap in self.all_gaps()],
            "registers": self.registers,
            "granted": self.granted,
            "overlaps": self.overlaps,
            "last_code": self.last_code,
        }

    def _covered(self, now: float) -> None:
        latest = max((one.expires_at for one in self._bindings.values()), default=-math.inf)
        self._until, self._why = (latest, "expired") if latest > now else (now, "removed")


class Users:
    """Those of the configuration, and those that a test adds."""

    def __init__(self) -> None:
        self._users: dict[str, User] = {}
        self._configured: tuple[SipUser, ...] = ()

    def __iter__(self) -> Iterator[User]:
        return iter(self._users.values())

    def __len__(self) -> int:
        return len(self._users)

    def find(self, name: str) -> User | None:
        return self._users.get(name)

    def add(self, given: SipUser) -> User:
        """A new one, or new credentials for one that there is; what it has bound stays."""
        known = self._users.get(given.name)
        if known is None:
            auth_user = given.auth_user or given.name
            known = self._users[given.name] = User(given.name, given.password, auth_user, given.domain, given.realm)
        known.password, known.auth_user = given.password, given.auth_user or given.name
        known.domain, known.realm = given.domain, given.realm
        return known

    def remove(self, name: str) -> None:
        self._users.pop(name, None)

    def clear(self) -> None:
        """Only those of the configuration are left."""
        self._users.clear()
        for one in self._configured:
            self.add(one)

    def configure(self, users: tuple[SipUser, ...]) -> None:
        if users == self._configured:
            return
        for gone in {one.name for one in self._configured} - {one.name for one in users}:
            self.remove(gone)
        self._configured = users
        for one in users:
            self.add(one)
