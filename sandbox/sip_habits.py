"""What the simulated registrar does to whom: habits that a test sets, key by key (sip-registration.md §3, §6, §10).

Several habits may fit a transaction. Those of everybody come first, then those of its domain, then those of its user,
each in the order in which they were set; of a key that several give, the last one counts.
"""

import itertools
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from sandbox.meta import JSON
from sandbox.sip_odd import KINDS

Text = Annotated[str, Meta(max_length=10_000, pattern=r"^[^\r\n]*$")]
Token = Annotated[str, Meta(max_length=64, pattern=r"^[A-Za-z0-9._-]*$")]
Expires = Annotated[int, Meta(ge=-(2**62), le=2**62)] | Text
When = Literal["any", "first", "authorized"]
Again = Literal["once", "always"]
LATER = frozenset(
    {"min_expires", "grant", "grant_in", "header", "others", "rewrite_contact", "unlisted", "stale", "stale_silently"}
    | {"wrong_password"}
)
"""Keys about requests with credentials: a habit of nothing else is not met by the others."""


class Other(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Somebody else's binding of the same address of record."""

    contact: Text
    expires: Expires


class Rewrite(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a registrar makes of our Contact in its list."""

    host: Text | None = None
    user: Text | None = None
    port: Annotated[int, Meta(ge=0, le=65535)] | None = None


class Habit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """All keys; None leaves a thing as it is.

    code, reason, retry_after   refuses so
    redirect                    a Contact to go to, with 302 or `code`
    min_expires                 423 for whoever asks for less
    grant, grant_in, header     seconds, or any text; where they are told; what `Expires:` says
    others, unlisted            bindings that are listed before ours; ours is not
    endless_401                 the right answer is refused too
    stale, stale_silently       a right answer is refused, with and without saying so; `once`: each first nonce
    wrong_password              what follows: 403, or another challenge
    algorithms, one_line        a challenge each; all in one header line
    omit                        parameters that challenges lack
    nonce_newline               in the middle of the nonce; `folded` as a legal fold, `bare` as a mere line break
    silent                      so many datagrams of a transaction are not heard, or all
    delay                       seconds until it is decided
    provisional                 a 100 comes first
    malformed, only             kinds of `sandbox.sip_odd`, each before the good reply; or instead of it
    tcp_split, tcp_keep_alives  pieces of so many bytes; CRLFs before each reply
    tcp_close                   the connection ends after a challenge, after any answer, or instead of an answer
    """

    code: Annotated[int, Meta(ge=300, le=699)] | None = None
    reason: Text | None = None
    retry_after: Annotated[int, Meta(ge=0)] | Text | None = None
    redirect: Text | None = None
    min_expires: Annotated[int, Meta(ge=0)] | None = None
    grant: Expires | None = None
    grant_in: Literal["contact", "header", "both", "both_differ", "nowhere"] | None = None
    header: Expires | None = None
    others: tuple[Other, ...] | None = None
    rewrite_contact: Rewrite | None = None
    unlisted: bool | None = None
    endless_401: bool | None = None
    stale: Again | None = None
    stale_silently: Again | None = None
    wrong_password: Literal["403", "401", 403, 401] | None = None
    algorithms: tuple[Token, ...] | None = None
    one_line: bool | None = None
    qop: Literal["auth", "auth,auth-int", "auth-int", "none"] | None = None
    scheme: Token | None = None
    realm: Text | None = None
    opaque: Text | None = None
    omit: tuple[str, ...] | None = None
    proxy_auth: bool | None = None
    nonce_newline: Literal["folded", "bare"] | None = None
    silent: Literal["all"] | Annotated[int, Meta(ge=0)] | None = None
    delay: Annotated[float, Meta(ge=0, le=3_600)] | None = None
    provisional: bool | None = None
    malformed: tuple[str, ...] | str | None = None
    only: bool | None = None
    tcp_split: Annotated[int, Meta(ge=1)] | None = None
    tcp_keep_alives: bool | None = None
    tcp_close: Literal["challenge", "request", "answer"] | None = None

    def __post_init__(self) -> None:
        for kind in self.oddities:
            if kind not in KINDS:
                raise ValueError(f"there is no reply {kind!r}; there are {', '.join(KINDS)}")

    @property
    def oddities(self) -> tuple[str, ...]:
        return (self.malformed,) if isinstance(self.malformed, str) else self.malformed or ()


class SetHabit(Habit, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """One that is set.

    user, domain  whom it concerns; neither: everybody
    next          ends after so many transactions
    when          which transactions: all, those without credentials, those with them
    """

    user: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    domain: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    next: Annotated[int, Meta(ge=1)] | None = None
    when: When | None = None

    def __post_init__(self) -> None:
        Habit.__post_init__(self)
        if self.user is not None and self.domain is not None:
            raise ValueError("a habit is a user's or a domain's")
        if not self.keys:
            raise ValueError("a habit of nothing")
        if self.code is not None and self.min_expires is not None:
            raise ValueError("min_expires alone answers 423 with Min-Expires; with a code it would say nothing")

    @property
    def keys(self) -> JSON:
        """Those of its keys that are set."""
        found = {name: getattr(self, name) for name in _KEYS}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def scope(self) -> tuple[str, str]:
        if self.user is not None:
            return "user", self.user
        return ("domain", self.domain.lower()) if self.domain is not None else ("", "")


_KEYS = Habit.__struct_fields__
PLAIN = Habit()


class Set:
    """A habit that holds, and how many transactions met it."""

    def __init__(self, id: int, asked: SetHabit) -> None:
        self.id, self.asked, self.met = id, asked, 0
        self.keys = asked.keys
        self.when = asked.when or ("authorized" if self.keys.keys() <= LATER else "any")

    @property
    def is_over(self) -> bool:
        return self.asked.next is not None and self.met >= self.asked.next

    def shown(self) -> JSON:
        return {"id": self.id, **msgspec.to_builtins(self.asked), "when": self.when, "met": self.met}


class Habits:
    """Those that are set."""

    def __init__(self) -> None:
        self._sets: dict[tuple[str, str], list[Set]] = {}
        self._ids = itertools.count(1)
        self._merged: dict[tuple[int, ...], Habit] = {}

    def set(self, asked: SetHabit) -> Set:
        one = Set(next(self._ids), asked)
        self._sets.setdefault(asked.scope, []).append(one)
        return one

    def clear(self, *, user: str | None = None, id: int | None = None) -> None:
        """A user's, this one, or all of them."""
        if user is not None:
            self._sets.pop(("user", user), None)
        elif id is not None:
            for scope, sets in list(self._sets.items()):
                self._keep(scope, [one for one in sets if one.id != id])
        else:
            self._sets.clear()
        self._merged.clear()

    def meet(self, user: str, domain: str, *, authorized: bool) -> Habit:
        """What this transaction meets; counts."""
        if not self._sets:
            return PLAIN
        met = []
        for scope in (("", ""), ("domain", domain.lower()), ("user", user)):
            sets = self._sets.get(scope)
            if sets is None:
                continue
            fitting = [one for one in sets if one.when in ("any", "authorized" if authorized else "first")]
            for one in fitting:
                one.met += 1
            met += fitting
            if any(one.is_over for one in fitting):
                self._keep(scope, [one for one in sets if not one.is_over])
        if not met:
            return PLAIN
        ids = tuple(one.id for one in met)
        merged = self._merged.get(ids)
        if merged is None:
            keys: JSON = {}
            for one in met:
                keys |= one.keys
            if len(self._merged) > 10_000:
                self._merged.clear()
            merged = self._merged[ids] = Habit(**keys)
        return merged

    def shown(self) -> list[JSON]:
        return sorted((one.shown() for sets in self._sets.values() for one in sets), key=lambda one: int(one["id"]))

    def _keep(self, scope: tuple[str, str], sets: list[Set]) -> None:
        if sets:
            self._sets[scope] = sets
        else:
            self._sets.pop(scope, None)
