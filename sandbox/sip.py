"""A SIP registrar on UDP and TCP, as providers are (sip-registration.md §3 to §6), with habits on demand.

It grants what is asked for, up to an hour, to whoever knows the password, and keeps its own truth: what each account
has bound, when it had nothing bound, and what it was asked. Its users' passwords are nobody's secret.
"""

import argparse
import asyncio
import contextlib
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sandbox import sip_digest as digest
from sandbox.config import SipUser
from sandbox.meta import JSON
from sandbox.sip_digest import Nonces, Shape
from sandbox.sip_habits import Habit, Habits, Rewrite
from sandbox.sip_invites import Invites
from sandbox.sip_journal import Journal, Transaction
from sandbox.sip_links import Connection, Link, Port, Source
from sandbox.sip_odd import Reply, odd
from sandbox.sip_users import Binding, User, Users
from sandbox.sip_words import REASONS, Address, Message, Unreadable, Uri, address, credentials, uri

MOST = 3_600  # seconds of a grant
REMEMBERED = 32.0  # seconds in which a retransmission may come
MAX_REMEMBERED = 30_000  # transactions
MAX_DATAGRAM = 1_300  # bytes of a request over UDP (RFC 3261 §18.1.1)
PORT = 5070
_BRANCH = re.compile(r";\s*branch\s*=\s*([^;,\s]+)", re.IGNORECASE)
_VIA = re.compile(r"^SIP\s*/\s*2\.0\s*/\s*(\w+)\s+([^;,\s]+)", re.IGNORECASE)
_RPORT = re.compile(r";\s*rport(?=\s*(?:[;,]|$))", re.IGNORECASE)
_NEWLINES = {None: "", "folded": "\r\n ", "bare": "\n"}

Key = tuple[str, str, str]


class _Asked(NamedTuple):
    """A request, as far as every reply needs it."""

    message: Message
    key: Key  # branch, sent-by, method
    via_transport: str
    to: Address
    name: str  # user of `to`
    domain: str  # host of the Request-URI
    call_id: str
    cseq: int
    authorization: str
    proxy_authorization: str


class _Done(NamedTuple):
    """A transaction that is over: what a retransmission gets."""

    entry: Transaction
    habit: Habit
    raws: list[bytes]


class _Work:
    """A transaction that is not over."""

    __slots__ = ("asked", "entry", "habit", "link", "raws", "timer", "unheard", "user", "was_in_order")

    def __init__(self, asked: _Asked, entry: Transaction, link: Link, habit: Habit, user: User | None) -> None:
        self.asked, self.entry, self.link, self.habit, self.user = asked, entry, link, habit, user
        self.unheard = -1 if habit.silent == "all" else habit.silent or 0
        self.was_in_order = True
        self.raws: list[bytes] = []
        self.timer: asyncio.TimerHandle | None = None


class Registrar:
    """For one event loop. `news` is called when a transaction has been answered or has come to nothing."""

    def __init__(self, news: Callable[[], None] = lambda: None) -> None:
        self.users = Users()
        self.habits = Habits()
        self.journal = Journal()
        self.host = ""
        self.port: int | None = None
        self._news = news
        self._nonces = Nonces()
        self._invites = Invites()
        self._link = Port(self._heard, self._lost)
        self._works: dict[Key, _Work | _Done] = {}
        self._ages: deque[tuple[float, Key]] = deque()
        self._waiting: set[_Work] = set()

    # Being there

    async def open(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Answers from now on. Gives the port; raises OSError when that one is taken."""
        self.host, self.port = host, await self._link.open(host, port)
        return self.port

    def close(self) -> None:
        """Nobody is there any more; what was being decided is left undone, bindings stay."""
        for work in list(self._waiting):
            self._end(work)
        self._works.clear()
        self._ages.clear()
        self._link.close()

    @property
    def is_away(self) -> bool:
        return self._link.datagrams is None

    async def come_back(self) -> None:
        """Again on the port where it was."""
        if self.is_away and self.port is not None:
            await self.open(self.host, self.port)

    def forget(self, name: str | None = None) -> None:
        """Bindings are gone, of one user or of all, as after a restart."""
        for user in self.users if name is None else filter(None, [self.users.find(name)]):
            user.unbind()
            user.cseqs.clear()

    def summary(self) -> JSON:
        return {
            "users": len(self.users),
            "registered": sum(1 for user in self.users if user.bindings()),
            "gaps": sum(len(user.all_gaps()) for user in self.users),
            **self.journal.summary(),
        }

    async def invite(self, name: str, *, received: bool = False, seconds: float = 5.0) -> JSON:
        """A call for this user's latest binding, over UDP. Raises LookupError without one, or without a way to it.

        `received` sends it to where the REGISTER came from, instead of where its Contact points.
        """
        user, sock = self.users.find(name), self._link.datagrams
        bindings = [] if user is None else user.bindings()
        if not bindings:
            raise LookupError(f"{name!r} has no binding")
        if sock is None or self.port is None:
            raise LookupError("the registrar is away")
        binding = bindings[-1]
        if received and binding.transport != "udp":
            raise LookupError("its binding came over TCP")
        to = binding.source if received else await _resolved(binding.uri)
        return await self._invites.call(sock, (self.host, self.port), binding.contact, to, seconds)

    # Requests come in

    def _heard(self, raw: bytes, link: Link) -> None:
        if raw.startswith(b"SIP/2.0 "):
            self._invites.answered(raw)
            return
        if not raw.strip():
            return  # a keep-alive
        try:
            asked = _asked(raw)
        except Unreadable as error:
            self.journal.dropped[str(error)] += 1
            return
        if asked.key[2] == "ACK":
            return
        work = self._works.get(asked.key)
        if work is None:
            self._begin(asked, link)
        else:
            self._again(work, link)

    def _begin(self, asked: _Asked, link: Link) -> None:
        message, authorized = asked.message, bool(asked.authorization or asked.proxy_authorization)
        now = time.time()
        contact = message.get("contact") or None
        entry = Transaction(
            n=self.journal.next(),
            at=now,
            user=asked.name,
            domain=asked.domain,
            method=message.method,
            call_id=asked.call_id,
            from_tag=message.get("from").partition("tag=")[2].partition(";")[0],
            cseq=asked.cseq,
            branch=asked.key[0],
            transport=link.transport,
            source="{}:{}".format(*link.source),
            expires=_expires(contact, message),
            contact=contact,
            was_authorized=authorized,
            user_agent=message.get("user-agent"),
            complaints=_complaints(asked, link),
        )
        user = self.users.find(asked.name)
        habit = self.habits.meet(asked.name, asked.domain, authorized=authorized)
        work = _Work(asked, entry, link, habit, user)
        self.journal.begin(entry)
        self._remember(asked.key, work)
        if user is not None:
            user.registers += 1
            if user.waiting:
                entry.overlapped = True
                user.overlaps += 1
                self.journal.overlaps += 1
        self._hear(work)

    def _again(self, work: _Work | _Done, link: Link) -> None:
        """The same request once more: the same answer, if there is one."""
        work.entry.retransmissions += 1
        self.journal.retransmissions += 1
        if work.raws:
            link.send(work.raws, work.habit)
        elif isinstance(work, _Work) and work not in self._waiting:
            self._hear(work)

    def _hear(self, work: _Work) -> None:
        if work.unheard:
            work.unheard -= work.unheard > 0
            return
        asked, user, habit = work.asked, work.user, work.habit
        self._waiting.add(work)
        if user is not None:
            user.waiting.add(work.entry)
            work.was_in_order = user.advances(asked.call_id, asked.cseq)
        if habit.provisional:
            self.journal.answered(work.entry, 100)
            work.raws = [_reply(asked, work, 100).encode()]
            work.link.send(work.raws, habit)
        if habit.delay:
            work.timer = asyncio.get_running_loop().call_later(habit.delay, self._answer, work)
        else:
            self._answer(work)

    def _lost(self, connection: Connection) -> None:
        for work in [work for work in self._waiting if work.link is connection]:
            self._end(work)

    def _remember(self, key: Key, work: _Work) -> None:
        now, ages = time.monotonic(), self._ages
        self._works[key] = work
        ages.append((now, key))
        while len(ages) > MAX_REMEMBERED or ages[0][0] < now - REMEMBERED:
            del self._works[ages.popleft()[1]]

    # Replies go out

    def _answer(self, work: _Work) -> None:
        asked, habit, link = work.asked, work.habit, work.link
        reply = self._decide(asked, work)
        if habit.tcp_close == "request" and isinstance(link, Connection):
            self._end(work)
            link.send([], then_close=True)
            return
        raws = []
        if habit.malformed is not None:
            status = 403 if reply.status == 200 else 200
            granted = [("Contact", f"{value};expires=3600") for value in asked.message.values("contact")]
            opposite = _reply(asked, work, status, headers=granted if status == 200 else [])
            raws = [(kind, odd(kind, reply, opposite)) for kind in habit.oddities]
            if link.transport == "udp":
                for kind, raw in raws:
                    if kind == "foreign_source":
                        self._link.send_from_elsewhere(raw, link.source)
        work.raws = [raw for kind, raw in raws if kind != "foreign_source"]
        if not habit.only:
            work.raws.append(reply.encode())
        closes = habit.tcp_close == "answer" or (habit.tcp_close == "challenge" and reply.status in (401, 407))
        link.send(work.raws, habit, then_close=closes)
        self.journal.answered(work.entry, reply.status)
        if work.user is not None:
            work.user.last_code = reply.status
        self._end(work)

    def _end(self, work: _Work) -> None:
        if work.timer is not None:
            work.timer.cancel()
            work.timer = None
        self._waiting.discard(work)
        if work.user is not None:
            work.user.waiting.discard(work.entry)
        work.entry.ended = time.time()
        self.journal.complaints += bool(work.entry.complaints)
        if work.asked.key in self._works:
            self._works[work.asked.key] = _Done(work.entry, work.habit, work.raws)
        self._news()

    def _decide(self, asked: _Asked, work: _Work) -> Reply:
        habit, user, method = work.habit, work.user, asked.message.method
        if habit.redirect is not None or habit.code is not None:
            return self._refused(asked, work)
        if method == "OPTIONS":
            return _reply(asked, work, 200, headers=[("Allow", "REGISTER, OPTIONS")])
        if method != "REGISTER":
            return _reply(asked, work, 405, headers=[("Allow", "REGISTER, OPTIONS")])
        if not asked.call_id or asked.cseq < 0:
            return _reply(asked, work, 400)
        if user is None or (user.domain is not None and user.domain.lower() != asked.domain):
            return _reply(asked, work, 404)
        if not work.was_in_order:
            return _reply(asked, work, 400, "Invalid CSeq number")
        given = asked.proxy_authorization if habit.proxy_auth else asked.authorization
        if not given:
            return self._too_brief(asked, work) or self._challenge(asked, work, user)
        return self._credentials(asked, work, user, given) or self._too_brief(asked, work) or _bound(asked, work, user)

    def _refused(self, asked: _Asked, work: _Work) -> Reply:
        habit = work.habit
        headers = []
        if habit.redirect is not None:
            headers.append(("Contact", f"<{habit.redirect}>"))
        if habit.retry_after is not None:
            headers.append(("Retry-After", str(habit.retry_after)))
        return _reply(asked, work, habit.code or 302, habit.reason, headers)

    def _too_brief(self, asked: _Asked, work: _Work) -> Reply | None:
        least, expires = work.habit.min_expires, _seconds(work.entry.expires)
        if least is None or expires is None or not 0 < expires < least:
            return None
        return _reply(asked, work, 423, headers=[("Min-Expires", str(least))])

    def _challenge(self, asked: _Asked, work: _Work, user: User, *, stale: bool = False, marked: bool = False) -> Reply:
        habit = work.habit
        shape = _shape(asked, habit, user)
        made = digest.challenges(shape, self._nonces.new(marked=marked), stale=stale)
        name = "Proxy-Authenticate" if habit.proxy_auth else "WWW-Authenticate"
        headers = [(name, ", ".join(made))] if habit.one_line else [(name, one) for one in made]
        return _reply(asked, work, 407 if habit.proxy_auth else 401, headers=headers)

    def _credentials(self, asked: _Asked, work: _Work, user: User, authorization: str) -> Reply | None:
        """A refusal, unless these are the right ones."""
        habit, entry = work.habit, work.entry
        scheme, given = credentials(authorization)
        shape = _shape(asked, habit, user)
        entry.algorithm = given.get("algorithm") or "MD5"
        entry.complaints += digest.complaints(given, asked.message.uri, shape)
        nonce = digest.nonce_of(given)
        if scheme.lower() != "digest" or given.get("realm") != shape.realm or not self._nonces.is_ours(nonce):
            return self._challenge(asked, work, user)
        if not digest.is_right(given, asked.message.method, user.auth_user, user.password, asked.message.body):
            if str(habit.wrong_password) == "401":
                return self._challenge(asked, work, user)
            return _reply(asked, work, 403)
        count = int(given["nc"], 16) if re.fullmatch(r"[0-9a-fA-F]{1,8}", given.get("nc", "")) else 0
        if nonce == user.nonce and count <= user.nonce_count:
            return self._challenge(asked, work, user, stale=True, marked=True)
        user.nonce, user.nonce_count = nonce, count
        if habit.endless_401:
            return self._challenge(asked, work, user)
        for again, says_so in ((habit.stale, True), (habit.stale_silently, False)):
            if again == "always" or (again == "once" and not self._nonces.is_marked(nonce)):
                return self._challenge(asked, work, user, stale=says_so, marked=True)
        return None


# Bindings


def _bound(asked: _Asked, work: _Work, user: User) -> Reply:
    """What is asked for is done, and everything that is bound then is listed, ours last."""
    contacts = asked.message.values("contact")
    if "*" in contacts:
        if len(contacts) > 1 or work.entry.expires != "0":
            return _reply(asked, work, 400, "Invalid Contact")
        user.unbind()
        return _reply(asked, work, 200)
    ours: dict[tuple[str, str, str, int, str], Binding] = {}
    for value in contacts:
        try:
            its = address(value)
            target = uri(its.uri)
        except Unreadable:
            return _reply(asked, work, 400, "Invalid Contact")
        told = its.params.get("expires") or work.entry.expires
        wanted = _seconds(told)
        if told is not None and wanted is None:
            return _reply(asked, work, 400, "Invalid Expires")
        if wanted == 0:
            user.unbind(target)
        else:
            binding = _binding(asked, work, its.uri, target, MOST if wanted is None else min(wanted, MOST))
            if binding.granted > 0:
                user.bind(binding)
                user.granted += 1
            else:
                user.unbind(target)
            ours[target.key] = binding
    return _reply(asked, work, 200, headers=_listed(work, user, ours))


def _binding(asked: _Asked, work: _Work, contact: str, target: Uri, granted: int) -> Binding:
    given, now = work.habit.grant, time.time()
    if isinstance(given, int):
        granted = max(0, min(given, 10**9))
    link = work.link
    call = (asked.call_id, asked.cseq)
    return Binding(contact, target, now + granted, granted, *call, link.source, link.transport, now)


def _listed(work: _Work, user: User, ours: dict[tuple[str, str, str, int, str], Binding]) -> list[tuple[str, str]]:
    habit, now = work.habit, time.time()
    listed = [f"<{one.contact}>;expires={one.expires}" for one in habit.others or ()]
    for one in user.bindings(now):
        if one.uri.key not in ours:
            listed.append(f"<{one.contact}>;expires={max(1, round(one.expires_at - now))}")
    where = habit.grant_in or "contact"
    header: str | int | None = None
    for binding in ours.values():
        told = binding.granted if habit.grant is None else habit.grant
        contact = binding.contact if habit.rewrite_contact is None else _rewritten(binding.uri, habit.rewrite_contact)
        if where in ("header", "both"):
            header = told
        elif where == "both_differ":
            header = binding.granted + 1_000
        if not habit.unlisted:
            listed.append(f"<{contact}>" + (f";expires={told}" if where not in ("header", "nowhere") else ""))
    header = habit.header if habit.header is not None else header
    headers = [("Contact", one) for one in listed]
    return headers if header is None else [*headers, ("Expires", str(header))]


def _rewritten(target: Uri, new: Rewrite) -> str:
    return str(
        target._replace(
            host=new.host or target.host,
            user=new.user or target.user,
            port=target.port if new.port is None else new.port or None,
        )
    )


# Reading and writing


def _asked(raw: bytes) -> _Asked:
    message = Message(raw)
    via = message.get("via")
    first = _VIA.match(via)
    branch = _BRANCH.search(via)
    if message.status or first is None or branch is None:
        raise Unreadable("not a request, or without a Via to answer to")
    number = message.get("cseq").partition(" ")[0]
    to, target = address(message.get("to")), uri(message.uri)
    return _Asked(
        message=message,
        key=(branch[1], first[2].lower(), message.method),
        via_transport=first[1].lower(),
        to=to,
        name=uri(to.uri).user,
        domain=target.host,
        call_id=message.get("call-id"),
        cseq=int(number) if number.isdecimal() else -1,
        authorization=message.get("authorization"),
        proxy_authorization=message.get("proxy-authorization"),
    )


def _complaints(asked: _Asked, link: Link) -> list[str]:
    """What breaks RFC 3261 §8, §10, §18 or RFC 3581, and is served all the same."""
    message, found = asked.message, []
    if not asked.key[0].startswith("z9hG4bK"):
        found.append("the branch lacks its z9hG4bK")
    if asked.via_transport != link.transport:
        found.append("Via tells another transport")
    if link.transport == "udp" and "rport" not in message.get("via").lower():
        found.append("Via without rport")
    if not message.get("max-forwards"):
        found.append("no Max-Forwards")
    if "tag=" not in message.get("from"):
        found.append("From without a tag")
    if message.get("cseq").partition(" ")[2].strip() != message.method:
        found.append("CSeq tells another method")
    length = message.get("content-length")
    if (length or link.transport == "tcp") and length != str(len(message.body)):
        found.append("Content-Length is missing or wrong")
    if link.transport == "udp" and message.raw_length > MAX_DATAGRAM:
        found.append("too large for UDP")
    for name in ("from", "to", "call-id", "cseq", "expires", "max-forwards", "content-length", "authorization"):
        if len(message.headers.get(name, ())) > 1:
            found.append(f"several {name}")
    if message.method == "REGISTER":
        if "@" in message.uri:
            found.append("the Request-URI has a user part")
        if "tag" in asked.to.params:
            found.append("To has a tag")
    return found


def _expires(contact: str | None, message: Message) -> str | None:
    """What is asked for, by the first Contact or by the header."""
    if contact is not None and contact != "*" and "expires" in contact.lower():
        try:
            told = address(message.values("contact")[0]).params.get("expires")
        except Unreadable:
            told = None
        if told:
            return told
    return message.get("expires") or None


def _seconds(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _shape(asked: _Asked, habit: Habit, user: User) -> Shape:
    return Shape(
        realm=user.realm or asked.domain if habit.realm is None else habit.realm,
        algorithms=("MD5",) if habit.algorithms is None else habit.algorithms,
        qop=habit.qop or "auth",
        scheme=habit.scheme or "Digest",
        opaque=habit.opaque or "",
        omit=habit.omit or (),
        newline=_NEWLINES[habit.nonce_newline],
    )


def _reply(
    asked: _Asked,
    work: _Work,
    status: int,
    reason: str | None = None,
    headers: Sequence[tuple[str, str]] = (),
) -> Reply:
    message, source = asked.message, work.link.source
    top, *vias = message.headers["via"]
    received = f";received={source[0]}"
    top = _RPORT.sub(f";rport={source[1]}{received}", top, count=1) if ";rport" in top else top
    to = message.get("to")
    if status > 100 and "tag" not in asked.to.params:
        to = f"{to};tag={work.entry.n:x}"
    made = [
        *(("Via", via) for via in (top, *vias)),
        ("From", message.get("from")),
        ("To", to),
        ("Call-ID", asked.call_id),
        ("CSeq", message.get("cseq")),
        ("Server", "pombal-sandbox"),
        *headers,
    ]
    return Reply(status, REASONS.get(status, "Refused") if reason is None else reason, made)


async def _resolved(target: Uri) -> Source:
    port = target.port or 5060
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(target.host.strip("[]"), port, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise LookupError(f"its Contact's host is not found: {error.strerror}") from error
    v4 = [one for one in found if one[0] == socket.AF_INET]
    its = (v4 or found)[0][4]
    return str(its[0]), int(its[1])


# Alone


async def serve(host: str, port: int, users: list[SipUser]) -> None:
    registrar = Registrar()
    for user in users:
        registrar.users.add(user)
    print(f"SIP registrar on {host}:{await registrar.open(host, port)}, UDP and TCP", flush=True)  # noqa: T201
    try:
        await asyncio.Event().wait()
    finally:
        registrar.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until it is interrupted."""
    parser = argparse.ArgumentParser(prog="sandbox.sip", description="A SIP registrar, without any control port.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=PORT, help=f"UDP and TCP ({PORT}; 0: any)")
    parser.add_argument("--user", action="append", default=[], metavar="NAME:PASSWORD", help="an account")
    parser.add_argument("--count", type=int, default=0, help="so many more, u0 and so on, with the password s3cret")
    args = parser.parse_args(argv)
    users = [SipUser(*one.split(":", 1)) for one in args.user]
    users += [SipUser(f"u{i}", "s3cret") for i in range(args.count)]
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(args.host, args.port, users))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
