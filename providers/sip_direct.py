"""The direct sender: REGISTER over UDP, TCP and TLS from sockets of our own (sip-registration.md §2, §3).

`DirectFlight` is one attempt's way to its registrar. It finds the addresses (`sip_dns`), sends and repeats as RFC 3261
says, goes on to the next address after silence, an error or a 503, and stays with the server that has answered. A
request that is too long for a datagram goes by TCP to the same address, if somebody is there (RFC 3261 §18.1.1). Only a
reply with our branch, Call-ID, CSeq number and method counts; all else is dropped and counted (security-reliability.md
R3, R4). `explain` says what a flight would do and sends nothing but questions to DNS.
"""

import asyncio
import errno
import math
import secrets
import socket
import ssl
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cache
from types import TracebackType
from typing import Protocol, Self, cast

from pombal import metrics
from providers import guard, sip_dns
from providers.sip import Transport
from providers.sip_dns import Target, at
from providers.sip_flight import Fence, NotSent, Reply, Trouble
from providers.sip_message import BadFrame, Framer, Request, Response, encode, host_in_uri, read

BUDGET = 32.0  # seconds for an answer: 64 * T1
T1 = 0.5
_T2 = 8  # times T1: the longest pause between datagrams
_SILENT = 4  # a silent server that is not the last may have one part in this many of the budget
_WHOLE = 1.2  # times the budget: all of an attempt, so that its outcome is known within 40 s (R1)
_BACKLOG = 100  # datagrams that wait to be read
_LARGEST_DATAGRAM = 8 * 1024  # bytes that are read; a real answer to REGISTER has 300 to 2,000
_READ = 4 * 1024
_MOST_BY_UDP = 1300  # bytes of a request (RFC 3261 §18.1.1)
_OURS = 200  # bytes at most that a sender adds to a request: Via, our address in the Contact, two short headers
_MOST_FOREIGN = 200  # messages that are not ours: then a connection is given up, and each further datagram has to wait
_TICK = 0.01  # seconds that it waits
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # of this process, or of its machine


class DirectFlight:
    """A `Flight` over sockets of its own, which are closed when it is left.

    `host`: the proxy or the domain. `tls_name`: whom the certificate must name, the host unless given.
    `contact_host`: `host[:port]` where calls should come to, for a Contact that says `localhost`; without it the
    address of the socket that sends. `fence` is called before anything is sent.
    Each exchange ends within `budget` seconds, the whole attempt within 1.2 times that.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int | None,
        transport: Transport,
        fence: Fence,
        allowed: Collection[guard.Network] = (),
        nameserver: str | None = None,
        tls_name: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        contact_host: str | None = None,
        budget: float = BUDGET,
        t1: float = T1,
    ) -> None:
        self._host, self._port, self._transport = host, port, transport
        self._fence, self._allowed, self._nameserver = fence, allowed, nameserver
        self._tls_name, self._ssl_context = tls_name or host.strip("[]"), ssl_context
        self._contact_host, self._budget, self._t1 = contact_host or None, budget, t1
        self._ends_at: float | None = None  # of the attempt, once it has begun
        self._way: _Way | None = None  # to the server that has answered

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._way is not None:
            await self._way.close()

    async def exchange(self, request: Request) -> Reply:
        """The final response to this request. Raises `NotSent`, or whatever the fence raises."""
        if self._ends_at is None:
            self._ends_at = time.monotonic() + _WHOLE * self._budget
        if self._way is not None:
            try:
                return await self._again(self._way, request)
            except _Lost as lost:
                raise self._not_sent([lost]) from None
        plan = await sip_dns.targets(
            self._host, self._port, self._transport, allowed=self._allowed, nameserver=self._nameserver
        )
        return await self._first_of(plan.targets, request)

    async def _first_of(self, targets: Sequence[Target], request: Request) -> Reply:
        """The answer of the first server that has one. That of a busy one counts when nobody else has any."""
        busy: Reply | None = None
        lost: list[_Lost] = []
        until = self._until()
        for number, target in enumerate(targets):
            left = until - time.monotonic()
            to_come = len(targets) - number
            window = left if to_come == 1 else min(left / to_come, self._budget / _SILENT)
            try:
                way, reply = await self._try(target, request, window)
            except _Lost as why:
                lost.append(why)
                continue
            if reply.response.status != 503:
                self._way = way
                return reply
            await way.close()
            busy = reply
        if busy is not None:
            return busy
        raise self._not_sent(lost)

    async def _again(self, way: "_Way", request: Request) -> Reply:
        """The answer of the server that has answered before, and of no other: it knows the nonce it gave us."""
        until = self._until()
        if way.is_open and not _needs_tcp(way.target, request):
            try:
                return await self._ask(way, request, until - time.monotonic())
            except _HungUp:
                # Some servers close the connection behind their challenge, others one that was idle.
                pass
        await way.close()
        self._way = None
        self._way, reply = await self._try(way.target, request, until - time.monotonic())
        return reply

    async def _try(self, target: Target, request: Request, window: float) -> tuple["_Way", Reply]:
        """A new way to this server, and its answer. Raises `_Lost`."""
        began = time.monotonic()
        if _needs_tcp(target, request):
            try:
                return await self._by(target._replace(transport=Transport.TCP), request, window)
            except _RefusedBy:
                pass  # so it goes in fragments after all
        return await self._by(target, request, window - (time.monotonic() - began))

    async def _by(self, target: Target, request: Request, window: float) -> tuple["_Way", Reply]:
        began = time.monotonic()
        way = await self._open(target, window)
        try:
            return way, await self._ask(way, request, window - (time.monotonic() - began), window)
        except BaseException:
            await way.close()
            raise

    async def _open(self, target: Target, window: float) -> "_Way":
        self._fence()
        try:
            async with asyncio.timeout(max(window, 0)):
                if target.transport is Transport.UDP:
                    return await _Datagrams.open(target)
                context = None
                if target.transport is Transport.TLS:
                    context = self._ssl_context or _ssl_context()
                return await _Stream.open(target, context, self._tls_name)
        except TimeoutError:
            raise _Lost(target, f"no answer within {_seconds(window)} from {{}}") from None

    async def _ask(self, way: "_Way", request: Request, seconds: float, window: float | None = None) -> Reply:
        """Send, send again over UDP, and wait for the final response that belongs to it.

        `window` is what is told as the time without an answer, where connecting was part of it.
        """
        local = at(*way.local)
        branch = f"z9hG4bK{secrets.token_hex(12)}"
        via = f"SIP/2.0/{way.target.transport.upper()} {local};branch={branch};rport"
        # Without the port, which is another one each time: as many bindings would ring one after the other.
        contact_host = self._contact_host or host_in_uri(way.local[0])
        text = encode(request.at_contact_host(contact_host), via=via)
        ours = (branch, request.call_id, request.cseq, request.method)

        began = time.monotonic()
        pause, due = self._t1, math.inf if way.is_reliable else 0.0  # of the next datagram, counted from the first
        is_provisional = False
        while True:
            self._fence()
            way.send(text)
            due += pause
            pause = min(2 * pause, _T2 * self._t1)
            while (response := await way.heard(began + min(due, seconds))) is not None:
                if (response.branch, response.call_id, response.cseq, response.method) != ours:
                    await way.drop("foreign")
                    if time.monotonic() - began >= min(due, seconds):  # else a flood could go on for ever
                        break
                elif response.status >= 200:
                    return Reply(response, way.target.where, began, contact_host)
                elif not is_provisional and not way.is_reliable:
                    is_provisional, pause = True, _T2 * self._t1
                    due = time.monotonic() - began + pause
            if due >= seconds:
                raise _Lost(way.target, f"no answer within {_seconds(window or seconds)} from {{}}")

    def _until(self) -> float:
        now = time.monotonic()
        return min(now + self._budget, self._ends_at or math.inf)

    def _not_sent(self, lost: Sequence["_Lost"]) -> NotSent:
        """Permanent only when each server is: one that is merely away today may be in order tomorrow. Ours when we
        could not ask each."""
        troubles = {one.trouble for one in lost}
        is_ours = Trouble.OURS in troubles
        trouble = Trouble.OURS if is_ours else troubles.pop() if len(troubles) == 1 else Trouble.TEMPORARY
        host = self._host.strip("[]")
        if len(lost) == 1:
            return NotSent(trouble, lost[0].told(at(host, lost[0].target.port)))
        return NotSent(
            trouble, f"{host}: {'; '.join(one.told(at(one.target.address, one.target.port)) for one in lost)}"
        )


async def explain(
    *,
    host: str,
    port: int | None,
    transport: Transport,
    allowed: Collection[guard.Network] = (),
    nameserver: str | None = None,
    tls_name: str | None = None,
    contact_host: str | None = None,
    budget: float = BUDGET,
    t1: float = T1,
) -> list[str]:
    """What a flight would do, as sentences in order. Only DNS is asked."""
    said: list[str] = []
    try:
        plan = await sip_dns.targets(host, port, transport, allowed=allowed, nameserver=nameserver, notes=said)
    except NotSent as error:
        return [*said, f"Nothing would be sent: {error.text}."]
    for number, target in enumerate(plan.targets):
        to = f"{transport.upper()} to {at(target.address, target.port)}"
        local = _local_address(target)
        from_here = f", from {local}" if local else ", which cannot be reached from here"
        if number == 0:
            said.append(f"REGISTER goes by {to}{from_here}.")
        else:
            said.append(f"If it is silent, refuses or says 503: by {to}{from_here}.")
    if transport is Transport.UDP:
        said.append(
            f"It is repeated after {_seconds(t1)}, then at doubled intervals up to {_seconds(_T2 * t1)}:"
            f" {_datagrams(t1, budget)} datagrams in {_seconds(budget)} without an answer."
        )
    else:
        said.append(f"It is sent once, and an answer is awaited for {_seconds(budget)}.")
    if len(plan.targets) > 1:
        part = min(budget / len(plan.targets), budget / _SILENT)
        said.append(f"A silent server that is not the last has {_seconds(part)}.")
    if transport is Transport.TLS:
        said.append(f"The certificate must be valid for {tls_name or host.strip('[]')}.")
    said.append(f"Calls would come to {contact_host or 'the address it is sent from'}.")
    return said


class _Lost(Exception):
    """No answer by one target. `{}` in the text is where it is."""

    def __init__(self, target: Target, text: str, trouble: Trouble = Trouble.TEMPORARY) -> None:
        super().__init__(text)
        self.target, self.trouble = target, trouble
        self._text = text

    def told(self, where: str) -> str:
        return self._text.replace("{}", where)


class _RefusedBy(_Lost):
    """Nobody listens there."""


class _HungUp(_Lost):
    """The connection is gone, by the server's will or the network's."""


class _Way(Protocol):
    """A socket to one server."""

    target: Target
    local: tuple[str, int]
    is_reliable: bool

    @property
    def is_open(self) -> bool: ...

    def send(self, text: bytes) -> None: ...

    async def heard(self, until: float) -> Response | None:
        """The next response, whoever's; None when there is none until then (`time.monotonic()`). Raises `_Lost`."""
        ...

    async def drop(self, why: str) -> None:
        """Counts what is not ours. After many of them it takes its time, or raises `_Lost`: a server that floods us
        shall hold up its own account only."""
        ...

    async def close(self) -> None: ...


class _Datagrams(asyncio.DatagramProtocol):
    """A connected UDP socket: the system drops what comes from elsewhere, and tells of ICMP errors."""

    is_reliable = False
    is_open = True

    def __init__(self, target: Target) -> None:
        self.target = target
        self._came: asyncio.Queue[bytes | OSError] = asyncio.Queue(_BACKLOG)
        self._dropped = 0
        self._is_closed = asyncio.get_running_loop().create_future()

    @classmethod
    async def open(cls, target: Target) -> Self:
        loop = asyncio.get_running_loop()
        try:
            _, way = await loop.create_datagram_endpoint(lambda: cls(target), remote_addr=(target.address, target.port))
        except OSError as error:
            raise _lost(target, error) from None
        return way

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)
        self.local = transport.get_extra_info("sockname")[:2]

    def datagram_received(self, data: bytes, addr: object) -> None:
        if len(data) > _LARGEST_DATAGRAM:
            metrics.sip_dropped.labels("malformed").inc()
        elif self._came.full():  # somebody is flooding us
            metrics.sip_dropped.labels("foreign").inc()
        else:
            self._came.put_nowait(data)

    def error_received(self, exc: Exception) -> None:
        if isinstance(exc, OSError) and not self._came.full():
            self._came.put_nowait(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._is_closed.done():
            self._is_closed.set_result(None)

    def send(self, text: bytes) -> None:
        self._transport.sendto(text)

    async def heard(self, until: float) -> Response | None:
        with suppress(TimeoutError):
            async with asyncio.timeout(max(until - time.monotonic(), 0)):
                while True:
                    data = await self._came.get()
                    if isinstance(data, OSError):
                        raise _lost(self.target, data)
                    if not data.strip(b"\r\n\0"):  # keep-alives
                        continue
                    if (response := read(data)) is not None:
                        return response
                    await self.drop("malformed")
        return None

    async def drop(self, why: str) -> None:
        """Anybody can send us datagrams in the server's name: that must not end the wait for its own."""
        metrics.sip_dropped.labels(why).inc()
        self._dropped += 1
        if self._dropped > _MOST_FOREIGN:
            await asyncio.sleep(_TICK)

    async def close(self) -> None:
        self._transport.abort()
        await self._is_closed


class _Stream:
    """A TCP or TLS connection."""

    is_reliable = True

    def __init__(self, target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.target, self._reader, self._writer = target, reader, writer
        self.local: tuple[str, int] = writer.get_extra_info("sockname")[:2]
        self._framer = Framer()
        self._frames: list[bytes] = []
        self._dropped = 0

    @classmethod
    async def open(cls, target: Target, context: ssl.SSLContext | None, name: str) -> Self:
        """Raises `_Lost`; a certificate that is not in order is permanent."""
        try:
            reader, writer = await asyncio.open_connection(
                target.address, target.port, ssl=context, server_hostname=name if context else None
            )
        except ssl.SSLCertVerificationError as error:
            text = f"{{}}: certificate is not valid for {name} ({error.verify_message})"
            raise _Lost(target, text, Trouble.PERMANENT) from None
        except ssl.SSLError as error:
            raise _Lost(target, f"TLS with {{}} failed ({error.reason or type(error).__name__})") from None
        except OSError as error:
            raise _lost(target, error) from None
        return cls(target, reader, writer)

    @property
    def is_open(self) -> bool:
        return not self._reader.at_eof() and not self._writer.transport.is_closing()

    def send(self, text: bytes) -> None:
        # Not drained: whether these few bytes have arrived, only the answer tells.
        self._writer.write(text)

    async def heard(self, until: float) -> Response | None:
        with suppress(TimeoutError):
            async with asyncio.timeout(max(until - time.monotonic(), 0)):
                while True:
                    while self._frames:
                        if (response := read(self._frames.pop(0))) is not None:
                            return response
                        await self.drop("malformed")
                    self._frames = await self._more()
        return None

    async def _more(self) -> list[bytes]:
        try:
            data = await self._reader.read(_READ)
        except OSError:
            data = b""
        if not data:
            raise _HungUp(self.target, "{} closed the connection")
        try:
            return self._framer.feed(data)
        except BadFrame:
            metrics.sip_dropped.labels("malformed").inc()
            raise _Lost(self.target, "what {} sends is not SIP") from None

    async def drop(self, why: str) -> None:
        metrics.sip_dropped.labels(why).inc()
        self._dropped += 1
        if self._dropped > _MOST_FOREIGN:
            raise _Lost(self.target, "{} sends too much that is no answer")

    async def close(self) -> None:
        self._writer.transport.abort()
        with suppress(OSError):
            await self._writer.wait_closed()


@cache
def _ssl_context() -> ssl.SSLContext:
    return guard.ssl_context()


def _lost(target: Target, error: OSError) -> _Lost:
    if isinstance(error, ConnectionRefusedError):
        return _RefusedBy(target, "refused by {}")
    trouble = Trouble.OURS if error.errno in _EXHAUSTED else Trouble.TEMPORARY
    return _Lost(target, f"cannot reach {{}} ({error.strerror or type(error).__name__})", trouble)


def _needs_tcp(target: Target, request: Request) -> bool:
    return target.transport is Transport.UDP and len(encode(request)) + _OURS > _MOST_BY_UDP


def _seconds(number: float) -> str:
    return f"{round(number, 1):g} s"


def _datagrams(t1: float, budget: float) -> int:
    """How often an unanswered request is sent."""
    number, due, pause = 1, t1, 2 * t1
    while due < budget:
        number, due, pause = number + 1, due + pause, min(2 * pause, _T2 * t1)
    return number


def _local_address(target: Target) -> str | None:
    """What the system would send from. Connecting a UDP socket sends nothing."""
    family = socket.AF_INET6 if ":" in target.address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as one:
        try:
            one.connect((target.address, target.port))
        except OSError:
            return None
        return str(one.getsockname()[0])
