"""The SIP side of the simulated drachtio: requests of its clients go out, calls come in."""

import asyncio
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from sandbox.sip_links import Connection, Link, Port, Source
from sandbox.sip_words import REASONS, Message, Unreadable, encode, uri

T2 = 4.0  # seconds between retransmissions at most
MAX_ANSWERED = 1_000  # calls whose answers are remembered for retransmissions
_IGNORED = frozenset({"via", "v", "route", "record-route", "rseq", "content-length", "l"})
_ADDRESSES = frozenset({"from", "f", "to", "t", "contact", "m"})
_LOCALHOST = re.compile(r"@localhost(?::\d+)?(?=[;>\s,]|$)", re.IGNORECASE)
_BRANCH = re.compile(r";\s*branch\s*=\s*([^;,\s]+)", re.IGNORECASE)
_RPORT = re.compile(r";\s*rport(?=\s*(?:[;,]|$))", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """Where a proxy URI leads."""

    host: str
    port: int
    transport: str


@dataclass(frozen=True)
class Heard:
    """A response: `source` is None for one that drachtio made."""

    raw: bytes
    status: int
    transport: str
    source: Source | None


@dataclass(eq=False)
class _Sent:
    """A request until its final response."""

    method: str
    heard: Callable[[Heard], None]
    ended: asyncio.Event
    is_provisional: bool = False


class Sip:
    """UDP and TCP on one port, for one event loop. `invited` gets each call once, with a way to answer it."""

    def __init__(
        self, timeout: float, t1: float, invited: Callable[[Message, Link, Callable[[int, str | None], None]], None]
    ) -> None:
        self.host, self.port = "", 0
        self._timeout, self._t1, self._invited = timeout, t1, invited
        self._socket = Port(self._heard, lambda _: None)
        self._waiting: dict[str, _Sent] = {}  # by branch
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams: dict[Target, Connection] = {}  # the latest to each
        self._connections: set[Connection] = set()
        self._answered: OrderedDict[str, list[bytes]] = OrderedDict()  # calls' answers by branch

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    async def open(self, host: str, port: int) -> None:
        """Raises OSError when the port is taken."""
        self.host, self.port = host, await self._socket.open(host, port)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for connection in list(self._connections):
            connection.reset()
        self._socket.close()

    def target(self, text: str) -> Target | str:
        """Where a proxy URI leads, or drachtio's reason to refuse it."""
        try:
            its = uri(text)
        except Unreadable:
            return "invalid proxy uri"
        found = re.search(r";transport=([^;?]*)", its.params, re.IGNORECASE)
        transport = found[1].lower() if found else "tls" if its.scheme == "sips" else "udp"
        if transport not in ("udp", "tcp"):
            return "requested protocol/transport not available"
        host, port = its.host.strip("[]"), its.port or 5060
        if (host, port) in ((self.host, self.port), ("localhost", self.port)):
            return "the request is for this server itself"
        return Target(host, port, transport)

    def outgoing(self, raw: bytes, target: Target, branch: str) -> bytes:
        """A client's request with what drachtio adds, and without what it ignores."""
        head, _, body = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("utf-8", "surrogateescape").split("\r\n")
        headers = [("Via", f"SIP/2.0/{target.transport.upper()} {self.address};branch={branch};rport")]
        names = set()
        for line in lines:
            name, _, value = line.partition(":")
            name, value, lower = name.strip(), value.strip(), name.strip().lower()
            if not name or lower in _IGNORED:
                continue
            if lower in _ADDRESSES:
                value = _LOCALHOST.sub(f"@{self.address}", value)
            if lower in ("from", "f") and ";tag=" not in value.lower():
                value += f";tag={secrets.token_hex(5)}"
            names.add(lower)
            headers.append((name, value))
        if "max-forwards" not in names:
            headers.insert(1, ("Max-Forwards", "70"))
        if not names & {"call-id", "i"}:
            headers.append(("Call-ID", secrets.token_hex(16)))
        if "cseq" not in names:
            headers.append(("CSeq", f"{int(time.time()) // 2} {first.split(' ')[0]}"))
        lines = [first, *(f"{name}: {value}" for name, value in headers), f"Content-Length: {len(body)}", "", ""]
        return "\r\n".join(lines).encode("utf-8", "surrogateescape") + body

    def send(self, raw: bytes, method: str, target: Target, branch: str, heard: Callable[[Heard], None]) -> None:
        """Send until there is a final response; `heard` gets all of them, at last perhaps one of drachtio's own."""
        sent = self._waiting[branch] = _Sent(method, heard, asyncio.Event())
        task = asyncio.create_task(self._sending(raw, target, sent))
        self._tasks.add(task)

        def over(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._waiting.pop(branch, None)

        task.add_done_callback(over)

    async def _sending(self, raw: bytes, target: Target, sent: _Sent) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                if target.transport == "tcp":
                    (await self._stream(target)).send([raw])
                    await sent.ended.wait()
                else:
                    await self._repeat(raw, await self._resolved(target), sent)
        except TimeoutError:
            sent.heard(self._own(raw, 408, target))
        except OSError:
            sent.heard(self._own(raw, 503, target))

    async def _repeat(self, raw: bytes, to: Source, sent: _Sent) -> None:
        """Over UDP, as RFC 3261 §17.1.2 has it."""
        wait = self._t1
        while self._socket.datagrams:
            self._socket.datagrams.send(raw, to)
            try:
                async with asyncio.timeout(T2 if sent.is_provisional else wait):
                    await sent.ended.wait()
                return
            except TimeoutError:
                wait = min(wait * 2, T2)

    async def _resolved(self, target: Target) -> Source:
        found = await asyncio.get_running_loop().getaddrinfo(target.host, target.port, type=2)
        host, port, *_ = next(sockaddr for *_, sockaddr in found)
        return str(host), int(port)

    async def _stream(self, target: Target) -> Connection:
        """The connection to a host, made if there is none."""

        def lost(connection: Connection) -> None:
            self._connections.discard(connection)
            if self._streams.get(target) is connection:
                del self._streams[target]

        if (found := self._streams.get(target)) is not None:
            return found
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self._heard, lost), target.host, target.port
        )
        self._streams[target] = connection
        self._connections.add(connection)
        return connection

    def _own(self, raw: bytes, status: int, target: Target) -> Heard:
        return Heard(_reply(Message(raw), status), status, target.transport, None)

    def _heard(self, raw: bytes, link: Link) -> None:
        try:
            message = Message(raw)
        except Unreadable:
            return
        branch = (_BRANCH.search(message.get("via")) or ["", ""])[1]
        if message.status:
            self._response(raw, message, branch, link)
        elif message.method == "INVITE":
            self._call(message, branch, link)
        elif message.method == "OPTIONS":
            link.send([_reply(message, 200, link.source)])
        elif message.method != "ACK":
            link.send([_reply(message, 405, link.source)])

    def _response(self, raw: bytes, message: Message, branch: str, link: Link) -> None:
        sent = self._waiting.get(branch)
        if sent is None or message.get("cseq").split()[1:] != [sent.method] or sent.ended.is_set():
            return
        sent.is_provisional = message.status < 200
        if message.status >= 200:
            sent.ended.set()
        sent.heard(Heard(raw, message.status, link.transport, link.source))

    def _call(self, message: Message, branch: str, link: Link) -> None:
        if branch in self._answered:  # again, because an answer was lost
            link.send(self._answered[branch])
            return
        answers = self._answered[branch] = [_reply(message, 100, link.source)]
        while len(self._answered) > MAX_ANSWERED:
            self._answered.popitem(last=False)
        link.send(answers)

        def answer(status: int, contact: str | None) -> None:
            answers[:] = [_reply(message, status, link.source, contact)]
            link.send(answers)

        self._invited(message, link, answer)


def _reply(message: Message, status: int, source: Source | None = None, contact: str | None = None) -> bytes:
    """An answer to a request; `source` is where that came from."""
    vias = list(message.headers.get("via", ()))
    if vias and source:
        vias[0] = _RPORT.sub(f";rport={source[1]};received={source[0]}", vias[0])
    to = message.get("to")
    if status > 100 and ";tag=" not in to.lower():
        to += f";tag={secrets.token_hex(5)}"
    headers = [("Via", via) for via in vias]
    headers += [("From", message.get("from")), ("To", to)]
    headers += [("Call-ID", message.get("call-id")), ("CSeq", message.get("cseq"))]
    if contact:
        headers.append(("Contact", f"<{contact}>"))
    return encode(f"SIP/2.0 {status} {REASONS.get(status, 'Answer')}", headers)
