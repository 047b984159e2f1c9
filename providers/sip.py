"""REGISTER as a conversation, without sockets: what to say next, what came of it, and when to come back.

`Attempt.begin()` gives the first request, `Attempt.answered()` the next one or the outcome; `refresh_after` and
`retry_after` say when to come back. Nothing in here has a clock or a socket.

Facts: sip-registration.md §3 to §6; RFC 3261 §10, RFC 7616, RFC 8760.
"""

import re
import secrets
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from urllib.parse import quote, unquote

from pombal.errors import Rejected
from providers.sip_digest import Challenge, Refused, answer, challenges, choose, strength
from providers.sip_flight import NotSent, Trouble
from providers.sip_message import Contact, Request, Response, contacts, encode, host_in_uri, parse_uri
from providers.sip_words import check_host

LONGEST = 24 * 3600  # seconds: what any registrar's word is cut to
SHORTEST = 10  # seconds: a grant of less is no registration
MOST_REQUESTS = 6  # of one attempt
# To the challenges of one asker, the registrar or a proxy before it, so that each may find a nonce stale: four in all,
# whatever else is asked (security-reliability.md R1 has one asker in mind, and allows two).
_MOST_ANSWERS = 2

_TEMPORARY_4XX = frozenset({408, 429, 480, 491})
_PERMANENT_ABOVE_4XX = frozenset({501, 505, 604})

LAST_CALL = 25.0  # seconds before a binding ends: when a failed refresh is tried once more
SHORTEST_WAIT = 5.0
_LONGEST_WAIT, _LONGEST_OF_LIMITED = 100.0, 1800.0  # seconds after what may pass

_NUMBER = re.compile(r"\d(?:[\s()-]{0,3}\d){5,}")  # somebody's, in words of ours: addresses and ports stay
_FOREIGN_NUMBER = re.compile(r"(?<!SHA-)\d(?:\W{0,3}\d){5,}")  # however it is written; SHA-512-256 is none


class Transport(StrEnum):
    UDP = "udp"
    TCP = "tcp"
    TLS = "tls"


@dataclass(frozen=True)
class Account:
    """What a registration is made with. Its repr shows none of it."""

    domain: str = field(repr=False)  # of the address of record, and the Request-URI
    user: str = field(repr=False)
    auth_user: str = field(repr=False)
    password: str = field(repr=False)
    contact: str = field(repr=False)  # URI: `sip:token@host:port;transport=udp`; host `localhost`: the sender's own
    call_id: str = field(repr=False)
    from_tag: str = field(repr=False)
    interval: int = 300  # seconds that are asked for, always
    transport: Transport = Transport.UDP
    port: int | None = None  # of the registrar, or of the proxy if there is one; None: by DNS or the transport's own
    proxy: str | None = field(default=None, repr=False)  # host that all requests go to instead of the domain's
    allows_md5: bool = True
    algorithm: str | None = None  # that worked last: nothing weaker is answered (security-reliability.md R2)


class Kind(StrEnum):
    """Outcome classes (sip-registration.md §6), as `pombal_sip_attempts_total{outcome}` counts them."""

    REGISTERED = "registered"
    UNREGISTERED = "unregistered"
    PERMANENT = "permanent"  # the configuration is wrong: nobody knocks again soon
    TEMPORARY = "temporary"
    OURS = "ours"  # our own SBC is away: says nothing about the account


@dataclass(frozen=True)
class Outcome:
    """What an attempt ended in."""

    kind: Kind
    code: int | None = None  # the last SIP status; None where nobody answered
    error: str | None = None  # fit for `register_error`: no user, no secret; None after success
    granted: int | None = None  # seconds, from when the last request was sent
    retry_after: int | None = None  # seconds that the registrar asked for
    algorithm: str | None = None  # of the challenge that was answered with success
    wants_new_call_id: bool = False  # after a 400 that may be about CSeq
    notes: tuple[str, ...] = ()  # oddities, for the log


class Attempt:
    """One attempt to register, or to un-register, an account.

    `cseq` is the number of its first request, and later of its last. At most `MOST_REQUESTS` numbers are used.
    """

    def __init__(
        self,
        account: Account,
        *,
        cseq: int,
        unregister: bool = False,
        cnonce: Callable[[], str] = secrets.token_hex,
    ) -> None:
        self.cseq = cseq
        self._account = account
        self._unregister = unregister
        self._cnonce = cnonce
        self._asked = 0 if unregister else account.interval
        self._requests = 0
        self._was_too_brief = False
        self._credentials: dict[bool, _Credentials] = {}  # by whether they are for a proxy
        self._answers: Counter[bool] = Counter()  # to challenges, by the same
        self._answers_to_brief: Counter[bool] = Counter()  # those before a 423
        self._notes: list[str] = []

    def begin(self) -> Request:
        """The first request."""
        return self._request()

    def answered(self, response: Response) -> Request | Outcome:
        """What follows from a final response: the next request, or what the attempt has come to."""
        status = response.status
        if status in (401, 407):
            return self._challenged(response)
        if status == 423:
            return self._too_brief(response)
        if 200 <= status < 300:
            return self._accepted(response)
        return self._refused(response)

    def failed(self, not_sent: NotSent) -> Outcome:
        """What the attempt has come to when no final response came."""
        kind = {
            Trouble.TEMPORARY: Kind.TEMPORARY,
            Trouble.PERMANENT: Kind.PERMANENT,
            Trouble.OURS: Kind.OURS,
        }[not_sent.trouble]
        return self._outcome(kind, not_sent.code, self._clean(not_sent.text, _NUMBER, most=200))

    # ------------------------------------------------------------------------------------------------- requests

    def _request(self) -> Request:
        if self._requests:
            self.cseq += 1
        self._requests += 1
        account = self._account
        uri = f"sip:{host_in_uri(account.domain)}"
        address = f"<sip:{_escaped(account.user)}@{host_in_uri(account.domain)}>"
        headers = [
            ("From", f"{address};tag={account.from_tag}"),
            ("To", address),
            ("Contact", f"<{account.contact}>"),
            ("Expires", str(self._asked)),
            ("User-Agent", "pombal"),
        ]
        for credentials in self._credentials.values():
            headers.append((credentials.challenge.answer_header, credentials.next_answer(account, uri)))
        return Request(uri=uri, call_id=account.call_id, cseq=self.cseq, headers=tuple(headers))

    def _challenged(self, response: Response) -> Request | Outcome:
        """Answer, and once more if only the nonce was wrong. Peers that omit `stale` send a new nonce instead."""
        is_proxy = response.status == 407
        before = self._credentials.get(is_proxy)
        try:
            challenge = choose(challenges(response), allows_md5=self._account.allows_md5, known=self._known(before))
        except Refused as refused:
            error = f"{response.status}: {self._clean_foreign(str(refused))}"
            return self._outcome(Kind.PERMANENT, response.status, error)
        is_about_nonce = before is None or challenge.is_stale or challenge.nonce != before.challenge.nonce
        # The nonce of answers that a 423 followed may have run out: one more, whatever their number.
        most = max(_MOST_ANSWERS, self._answers_to_brief[is_proxy] + 1)
        if not is_about_nonce or self._answers[is_proxy] >= most:
            return self._outcome(
                Kind.PERMANENT, response.status, f"{response.status}: the credentials were not accepted"
            )
        if self._requests >= MOST_REQUESTS:
            return self._outcome(Kind.PERMANENT, response.status, f"{response.status}: challenged again and again")
        self._answers[is_proxy] += 1
        self._credentials[is_proxy] = _Credentials(challenge, self._cnonce())
        return self._request()

    def _known(self, before: "_Credentials | None") -> str | None:
        """The algorithm that a challenge must not fall below: a forged second challenge might ask for a weaker one."""
        known = self._account.algorithm
        if before and strength(before.challenge.algorithm) > strength(known or ""):
            return before.challenge.algorithm
        return known

    def _too_brief(self, response: Response) -> Request | Outcome:
        """Ask for what the registrar wants at least, once. It may challenge that request anew."""
        least = _seconds(response.first("min-expires"))
        if least is None:
            error = f"423: the interval is too brief, without a Min-Expires; {self._asked} s were asked for"
        else:
            error = f"423: the interval is too brief, at least {least} s are wanted; {self._asked} s were asked for"
            is_usable = self._asked < least <= LONGEST and not self._was_too_brief and not self._unregister
            if is_usable and self._requests < MOST_REQUESTS:
                self._was_too_brief = True
                self._asked = least
                self._answers_to_brief = self._answers.copy()
                return self._request()
        return self._outcome(Kind.PERMANENT, 423, error)

    # ------------------------------------------------------------------------------------------------- outcomes

    def _accepted(self, response: Response) -> Outcome:
        # The weakest of a proxy's and the registrar's: the account knows one algorithm for both.
        answered = [credentials.challenge.algorithm for credentials in self._credentials.values()]
        algorithm = min(answered, key=strength, default=None)
        if self._unregister:
            return self._unbound(response, algorithm)
        granted = self._granted(response)
        if granted > LONGEST:
            self._note(f"{granted} seconds were granted; taken as {LONGEST}")
            granted = LONGEST
        if granted < SHORTEST:
            # Nobody can keep that up: it would end before the next REGISTER more often than not, and what was not
            # granted is not claimed (R5 would take it as 30 s).
            only = f"only {granted} s were granted" if granted else "0 seconds were granted"
            error = f"{response.status}, but {only}"
            return self._outcome(Kind.TEMPORARY, response.status, error, retry_after=_retry_after(response))
        return self._outcome(Kind.REGISTERED, response.status, granted=granted, algorithm=algorithm)

    def _unbound(self, response: Response, algorithm: str | None) -> Outcome:
        """What is left is listed (RFC 3261 §10.3): other people's bindings may be, ours not."""
        own = parse_uri(self._account.contact)
        left = [_seconds(contact.expires) for contact in contacts(response) if own and contact.uri.user == own.user]
        if any(left):
            error = f"{response.status}, but our contact is still bound"
            return self._outcome(Kind.TEMPORARY, response.status, error, retry_after=_retry_after(response))
        return self._outcome(Kind.UNREGISTERED, response.status, algorithm=algorithm)

    def _granted(self, response: Response) -> int:
        """What our own binding got, not somebody else's, which is listed too (sip-registration.md §3)."""
        listed = contacts(response)
        own = parse_uri(self._account.contact)
        ours = [contact for contact in listed if own and contact.uri.same(own)] or [
            contact for contact in listed if own and contact.uri.user == own.user
        ]
        if strangers := sum(own is None or contact.uri.user != own.user for contact in listed):
            self._note(f"{strangers} other contact{'s' if strangers > 1 else ''} bound: calls ring there too")
        if (seconds := self._best(ours)) is not None:
            return seconds
        if not ours:
            self._note("our contact is not listed")
        if (seconds := _seconds(response.first("expires"))) is not None:
            return seconds
        others = [_seconds(contact.expires) for contact in listed if contact.uri.user == self._account.user]
        if not ours and (known := [seconds for seconds in others if seconds is not None]):
            return min(known)
        self._note("no interval was granted; taken as asked for")
        return self._asked

    def _best(self, ours: list[Contact]) -> int | None:
        """Of several bindings with our token the others are of earlier addresses of ours; nobody can tell which.

        The one that ends first counts: to come too early does no harm. One that is as good as over does not.
        """
        given = [seconds for contact in ours if (seconds := _seconds(contact.expires)) is not None]
        if len(given) > 1:
            self._note("our contact is listed more than once")
        return min([seconds for seconds in given if seconds >= SHORTEST], default=max(given, default=None))

    def _refused(self, response: Response) -> Outcome:
        status = response.status
        error = f"{status} {self._clean_foreign(response.reason)}".rstrip()
        retry_after = _retry_after(response)
        if status < 200:
            return self._outcome(Kind.TEMPORARY, status, f"{error}: no final answer", retry_after=retry_after)
        if status < 400:
            # Whoever answers could send our credentials anywhere (security-reliability.md R6).
            error = f"{status}: moved{_new_host(response)}; not followed"
            return self._outcome(Kind.PERMANENT, status, error, retry_after=retry_after)
        if status == 400 and _is_about_cseq(response):
            # Our numbers fell behind those that the registrar remembers: with another Call-ID they do not matter.
            error += ": CSeq fell behind; the next attempt has a new Call-ID"
            return self._outcome(Kind.TEMPORARY, status, error, retry_after=retry_after, wants_new_call_id=True)
        is_temporary = status in _TEMPORARY_4XX if status < 500 else status not in _PERMANENT_ABOVE_4XX
        kind = Kind.TEMPORARY if is_temporary else Kind.PERMANENT
        return self._outcome(kind, status, error, retry_after=retry_after, wants_new_call_id=status == 400)

    def _outcome(
        self,
        kind: Kind,
        code: int | None,
        error: str | None = None,
        *,
        granted: int | None = None,
        retry_after: int | None = None,
        algorithm: str | None = None,
        wants_new_call_id: bool = False,
    ) -> Outcome:
        return Outcome(kind, code, error, granted, retry_after, algorithm, wants_new_call_id, tuple(self._notes))

    def _note(self, text: str) -> None:
        self._notes.append(text)

    def _clean(self, text: str, number: re.Pattern[str], most: int) -> str:
        """Words fit for an operator: printable, short, without the account's secrets or anybody's number."""
        account = self._account
        token = uri.user if (uri := parse_uri(account.contact)) else ""
        for secret in sorted({account.user, account.auth_user, account.password, token}, key=len, reverse=True):
            for form in {secret, _escaped(secret)} if secret else ():
                # One or two letters occur in any sentence: these only as a word of their own.
                pattern = re.escape(form) if len(form) > 2 else rf"(?<!\w){re.escape(form)}(?!\w)"
                text = re.sub(pattern, "…", text, flags=re.IGNORECASE)
        text = number.sub("…", text)
        return "".join(char if char.isprintable() else " " for char in text).strip()[:most]

    def _clean_foreign(self, text: str) -> str:
        """The same for the provider's words, in which a number may be written in any way."""
        return self._clean(unquote(text, errors="replace"), _FOREIGN_NUMBER, most=80)


@dataclass
class _Credentials:
    """A challenge that was answered. Later requests of the attempt go on counting, with the same session key."""

    challenge: Challenge
    cnonce: str = field(repr=False)
    used: int = 0

    def next_answer(self, account: Account, uri: str) -> str:
        self.used += 1
        return answer(
            self.challenge, user=account.auth_user, password=account.password, uri=uri, cnonce=self.cnonce, nc=self.used
        )


def refresh_after(granted: int, dice: Random) -> float:
    """Seconds from when the request was sent until the next REGISTER: 60 s before the end, half way for short grants.

    Up to 10 s earlier by chance, never later, and never less than 5 s. Grants under 10 s do not come here: they are
    failures, since an account would lapse and come back each few seconds. security-reliability.md R5 takes them as
    30 s; we do not say that we are registered for longer than was granted.
    """
    lead = 60.0 if granted >= 120 else granted / 2
    jitter = dice.uniform(0, min(10.0, granted / 10))
    return max(SHORTEST_WAIT, granted - lead - jitter)


def retry_after(outcome: Outcome, failures: int, dice: Random, *, bound_seconds: float | None) -> float:
    """Seconds from now until the next attempt after one that failed.

    `failures` in a row, this one included; `bound_seconds` that a binding still lives, None where there is none. While
    it lives there is one more try about 25 s before its end, unless the registrar asked for more patience.

    What may pass is tried again after 100 s at the most, where sip-registration.md §6 (RFC 5626 §4.5) would wait for up
    to half an hour: an account that waits gets no calls, and 120 s after an outage nothing may be pending
    (security-reliability.md P4). 5,000 such accounts would ask some 70 times a second; SIP_STARTS_PER_SECOND has a
    worker ask any one host 30 times at most. Only a 429, which is about asking too often, backs off as the sheet says.
    """
    patience = float(outcome.retry_after or 0)
    if outcome.kind is Kind.OURS:
        return max(patience, dice.uniform(5, 10))
    if outcome.kind is Kind.PERMANENT:
        wait = dice.uniform(0.9, 1.1) * 3600
        # A single stray refusal shall not cost an hour without calls; a second one is meant.
        if failures <= 1 and bound_seconds is not None and bound_seconds > LAST_CALL + SHORTEST_WAIT:
            wait = min(wait, bound_seconds - LAST_CALL)
        return max(patience, wait)
    most = min(_LONGEST_OF_LIMITED if outcome.code == 429 else _LONGEST_WAIT, 30.0 * 2 ** min(failures, 10))
    wait = dice.uniform(most / 2, most)
    # With less left than that the try was made, unless this was the first failure.
    if bound_seconds is not None and bound_seconds > 0 and (bound_seconds > LAST_CALL or failures <= 1):
        wait = min(wait, max(SHORTEST_WAIT, bound_seconds - LAST_CALL))
    return max(patience, wait)


def dry(account: Account, *, cseq: int = 1) -> str:
    """The text of the first request, for an operator's terminal: it names the account, and holds no credentials."""
    return encode(Attempt(account, cseq=cseq).begin()).decode()


def _escaped(user: str) -> str:
    """As the user part of a SIP URI (RFC 3261 §25.1)."""
    return quote(user, safe="-_.!~*'()&=+$,;?/")


def _seconds(text: str | None) -> int | None:
    """Delta seconds; None for nothing, a sign, a fraction, words. Absurdly many are still many."""
    digits = (text or "").strip()
    if not digits.isascii() or not digits.isdigit():
        return None
    return int(digits) if len(digits) < 10 else 10**9


def _retry_after(response: Response) -> int | None:
    """`120`, `120 (in a meeting)` or `120;duration=60`; at most a day."""
    start = re.match(r"\s*(\d+)\s*(?:[;(]|\Z)", response.first("retry-after") or "", re.ASCII)
    seconds = _seconds(start[1]) if start else None
    return None if seconds is None else min(seconds, LONGEST)


def _new_host(response: Response) -> str:
    """` to host` of a redirect, if it is fit to be shown."""
    for contact in contacts(response)[:1]:
        with suppress(Rejected):
            host = check_host(contact.uri.host)
            return "" if re.search(r"\d{6}", host) else f" to {host}"
    return ""


def _is_about_cseq(response: Response) -> bool:
    words = [response.reason, *response.all("p-registrar-error"), *response.all("warning")]
    return any("cseq" in text.lower() for text in words)
