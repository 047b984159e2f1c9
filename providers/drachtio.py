"""REGISTER through drachtio, so that the binding belongs to the SBC that takes the calls (sip-registration.md §2, §8).

One connection to drachtio's control port carries all requests of a process. A frame is its length in bytes, `#`, and
`msgid|verb|…`; SIP follows after the first line. What is said there:

    authenticate    once; drachtio hangs up on a wrong secret
    ping            now and then; silence means that nobody is there
    sip             a request for a proxy URI; drachtio answers with a transaction, and later with the SIP response

`route` is never said: drachtio would give us calls that its own applications wait for.
"""

import asyncio
import re
import socket
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import count
from types import TracebackType
from typing import NamedTuple, Self, TypeAlias
from urllib.parse import unquote
from uuid import uuid4

from pombal import log, metrics
from providers.guard import Network, may_reach
from providers.sip import Transport
from providers.sip_flight import Fence, Flight, NotSent, Reply, Trouble
from providers.sip_message import Request, Response, encode, host_in_uri, read

_KNOWN_TO_ALL = "cymru"  # the secret in drachtio's sample configuration
_CONNECT = 5.0  # seconds to connect and be let in
_ACCEPT = 10.0  # seconds until drachtio says what it makes of a request; it does so before anything is answered to it
_WAIT = 35.0
_PONG = 10.0  # seconds in which anything must come after a ping
_GAP, _WIDEST_GAP = 1.0, 5.0  # seconds between two tries to connect
_MOST_DIGITS = 5  # of a frame's length
_MOST_BEFORE = 100  # frames until we are let in
_MOST_EARLY = 8  # responses kept for one request whose transaction is not known yet

_HOST = re.compile(r"[A-Za-z0-9._-]{1,255}", re.ASCII)
_PORT = re.compile(r"\d{1,5}", re.ASCII)
# Users and numbers, however they are written, which are nobody's business in an error.
_PRIVATE = re.compile(r"\S+@|\d(?:\W{0,3}\d){5,}")
_ITSELF = re.compile(r"request to myself|server itself", re.IGNORECASE)  # in a NOK: no such registrar will ever do
_RANK = {Transport.UDP: 0, Transport.TCP: 1, Transport.TLS: 2}

_log = log.get()

_Address: TypeAlias = IPv4Address | IPv6Address


class Hello(NamedTuple):
    """What drachtio says of itself: `v0.9.10`, and its SIP addresses: `udp/10.0.0.1:5060`."""

    version: str
    hostports: tuple[str, ...]


class BadFrame(ValueError):
    """What came is no frame, so the next one cannot be found either."""


class Frames:
    """Cuts the control connection's stream into frames, wherever segments begin and end."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that are complete with this piece, without their lengths. Raises `BadFrame`."""
        self._buffer += data
        frames: list[bytes] = []
        while self._buffer:
            mark = self._buffer.find(b"#", 0, _MOST_DIGITS + 1)
            digits = bytes(self._buffer[: _MOST_DIGITS if mark < 0 else mark])
            if not digits.isdigit() or (mark < 0 and len(self._buffer) > _MOST_DIGITS):
                raise BadFrame("a frame without its length")
            end = mark + 1 + int(digits)
            if mark < 0 or len(self._buffer) < end:
                break
            frames.append(bytes(self._buffer[mark + 1 : end]))
            del self._buffer[:end]
        return frames


def framed(body: bytes) -> bytes:
    """A body as it goes over the connection. Raises `BadFrame` if it is longer than five digits can say."""
    if len(body) >= 10**_MOST_DIGITS:
        raise BadFrame("a frame may have 99999 bytes at most")
    return b"%d#%b" % (len(body), body)


class _Origin(NamedTuple):
    """Where a response came from."""

    protocol: Transport
    address: _Address
    port: int

    def __str__(self) -> str:
        return f"{self.protocol}/{host_in_uri(str(self.address))}:{self.port}"


class _Final(NamedTuple):
    response: Response
    origin: _Origin | None  # None: drachtio made it, as its 408


@dataclass(eq=False)
class _Exchange:
    """A request on its way. Both events are also set when the connection is lost."""

    request: Request = field(repr=False)
    accepted: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    refusal: str | None = None  # drachtio's NOK
    transaction: str | None = None
    final: _Final | None = None
    early: dict[str, _Final] = field(default_factory=dict, repr=False)  # by transaction, until ours is known

    def is_answered_by(self, response: Response) -> bool:
        ours = self.request
        return (response.call_id, response.cseq, response.method) == (ours.call_id, ours.cseq, ours.method)


class Drachtio:
    """A process's way to drachtio, for one event loop. Connects when a request needs it, again after a loss.

    ping_every   seconds between pings
    allowed      None: registrars may be anywhere. Otherwise only at public addresses and in these networks. Names are
                 resolved by drachtio, so what is checked is an address in the configuration, and the one that an
                 answer came from: before credentials go there, and before it counts.
    gap          seconds between tries to connect while drachtio is away: the first, and the longest
    wait         seconds for a final response; drachtio's own 408 comes after 32
    """

    def __init__(
        self,
        host: str,
        port: int,
        secret: str,
        *,
        ping_every: float = 30.0,
        allowed: Collection[Network] | None = None,
        gap: tuple[float, float] = (_GAP, _WIDEST_GAP),
        wait: float = _WAIT,
    ) -> None:
        self.where = f"drachtio at {host_in_uri(host)}:{port}"
        self.wait = wait
        self._host, self._port, self._secret = host, port, secret
        self._ping_every, self._allowed = ping_every, allowed
        self._first_gap, self._widest_gap = gap
        self._gap = self._first_gap
        self._next_try = 0.0
        self._why = ""  # of the last failure to connect, or of the loss
        self._link: _Link | None = None
        self._connecting: asyncio.Task[_Link | None] | None = None
        self._is_closed = False

    @property
    def away(self) -> str | None:
        """Why nobody can send now; None while connected, and as soon as it may be tried (again)."""
        if (self._link and self._link.is_up) or time.monotonic() >= self._next_try:
            return self._bad_secret()
        return self._why

    def flight(self, domain: str, port: int | None, transport: Transport, proxy: str | None, fence: Fence) -> Flight:
        """One attempt's way to the registrar: to `proxy` if there is one, else to `domain`."""
        return _Flight(self, proxy or domain, port, transport, fence)

    async def hello(self) -> Hello:
        """What drachtio says of itself; connects for it. Raises `NotSent`."""
        return (await self.link()).hello

    def explain(self, domain: str, port: int | None, transport: Transport, proxy: str | None) -> list[str]:
        """What would be done with a request, in order, for `--dry-run`. Nothing is sent, not even to drachtio."""
        if reason := self._bad_secret():
            return [f"Nothing would be sent: {reason}."]
        try:
            target = self.target(proxy or domain, port, transport)
        except NotSent as refusal:
            return [f"Nothing would be sent: {refusal.text}."]
        return [
            f"{self.where} would send it, from its own {transport.value} address, to {target}.",
            "It looks up the name, puts its own address in place of `localhost` in the Contact, and adds Via.",
            f"It sends again what gets lost; after {self.wait:.0f} s without a final response the attempt has failed.",
            "An answer with credentials would go to the address that the challenge came from.",
        ]

    async def close(self) -> None:
        """Everything that waits for a response is told that its connection is lost; nothing can be sent after this."""
        self._is_closed = True
        if self._connecting:
            self._connecting.cancel()
            await asyncio.wait({self._connecting})
        if self._link:
            await self._link.close()

    async def link(self) -> "_Link":
        """The connection, made if there is none. Raises `NotSent`, at once while it is too early for another try."""
        if self._link and self._link.is_up:
            return self._link
        if self._is_closed:
            raise NotSent(Trouble.OURS, f"the connection to {self.where} was closed by us")
        if reason := self._bad_secret():
            raise NotSent(Trouble.OURS, reason)
        if self._connecting is None:
            if time.monotonic() < self._next_try:
                raise NotSent(Trouble.OURS, self._why)
            self._connecting = asyncio.create_task(self._connect())
        connecting = self._connecting
        # Not awaited itself: who is cancelled must not cancel it for those who wait for it too.
        await asyncio.wait({connecting})
        link = None if connecting.cancelled() else connecting.result()
        if link is None:
            raise NotSent(Trouble.OURS, self._why or f"cannot reach {self.where}")
        return link

    def target(self, host: str, port: int | None, transport: Transport) -> str:
        """The proxy URI of a request. Without a port drachtio asks DNS for it. Raises `NotSent`."""
        address = _address(host)
        if address is None and not _HOST.fullmatch(host):
            raise NotSent(Trouble.PERMANENT, "the registrar's host is not a host's name")
        if address is not None:
            self.check(address)
        suffix = f":{port}" if port else ""
        return f"sip:{host_in_uri(str(address or host))}{suffix};transport={transport.value}"

    def check(self, address: _Address) -> None:
        """Raises `NotSent` when nobody may be registered there."""
        if may_reach(address, self._allowed):
            return
        raise NotSent(
            Trouble.PERMANENT, f"{address} is not a public address, and not in a network of SIP_ALLOWED_NETWORKS"
        )

    def lost(self, why: str, waiting: int) -> None:
        """Called by the connection when it ends."""
        self._why = f"connection to {self.where} lost"
        if not self._is_closed:
            _log.warning("drachtio_lost", why=why, waiting=waiting)

    def _bad_secret(self) -> str | None:
        if not self._secret:
            return "DRACHTIO_SECRET is not set"
        if self._secret == _KNOWN_TO_ALL:
            return "DRACHTIO_SECRET is the one of drachtio's sample configuration; choose another"
        if not self._secret.isprintable() or "|" in self._secret:
            return "DRACHTIO_SECRET must not have control characters or `|` in it"
        return None

    async def _connect(self) -> "_Link | None":
        """One try. Its failure is in `_why`; it is told once in an outage."""
        self._next_try = time.monotonic() + self._gap
        was_up = not self._why or self._link is not None
        link = None
        try:
            async with asyncio.timeout(_CONNECT):
                link = _Link(self, *await asyncio.open_connection(self._host, self._port))
                await link.open(self._secret, self._ping_every)
        except (OSError, UnicodeError, BadFrame, _Refused) as error:
            if link:
                await link.close()
            self._why = f"cannot reach {self.where}: {_cause(error)}"
            self._link = None
            self._gap = min(self._gap * 1.5, self._widest_gap)
            self._next_try = time.monotonic() + self._gap
            if was_up:
                _log.warning("drachtio_unreachable", why=self._why)
            return None
        except BaseException:
            if link:
                await link.close()
            raise
        finally:
            self._connecting = None
        self._link, self._gap, self._why = link, self._first_gap, ""
        _log.info("drachtio_connected", version=link.hello.version)
        return link


class _Refused(Exception):
    """drachtio did not let us in."""


class _Link:
    """One connection to the control port, from authentication to its loss."""

    def __init__(self, owner: Drachtio, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.hello = Hello("", ())
        self.is_up = False
        self._owner, self._reader, self._writer = owner, reader, writer
        self._writing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._heard = asyncio.Event()  # something came since the last ping
        self._prefix, self._numbers = uuid4().hex, count(1)
        self._by_id: dict[str, _Exchange] = {}
        self._by_call: dict[tuple[str, int], _Exchange] = {}
        self._by_transaction: dict[str, _Exchange] = {}

    async def open(self, secret: str, ping_every: float) -> None:
        """Be let in. Raises `OSError`, `BadFrame` or `_Refused`."""
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._writer.transport.set_write_buffer_limits(high=0)  # so that `drain` waits until all has left
        id = self._new_id()
        self._writer.write(framed(f"{id}|authenticate|{secret}|".encode()))
        frames, answer = Frames(), None
        rest: list[bytes] = []
        while answer is None:
            data = await self._reader.read(65536)
            if not data:
                raise _Refused("it hung up before it let us in")
            for body in frames.feed(data):
                words = _words(body)
                if words[1:3] == ["response", id]:
                    answer = words[3:]
                elif len(rest) < _MOST_BEFORE:
                    rest.append(body)
                else:
                    raise _Refused("it did not let us in, and talked of other things")
        if answer[:1] != ["OK"]:
            raise _Refused("it refused the secret (DRACHTIO_SECRET)")
        hostports, version = (*answer[1:3], "", "")[:2]
        self.hello = Hello(version, tuple(one for one in hostports.split(",") if one))
        self.is_up = True
        for body in rest:
            self._take(body)
        self._tasks = [asyncio.create_task(self._read(frames)), asyncio.create_task(self._ping(ping_every))]

    async def close(self) -> None:
        self._lose("closed by us")
        if self._tasks:
            await asyncio.wait(self._tasks)
        with suppress(OSError):  # of a connection that is given up anyway
            await self._writer.wait_closed()

    async def exchange(self, request: Request, target: str, fence: Fence) -> tuple[_Final, float]:
        """The final response, and when its request was sent. Raises `NotSent`, or whatever the fence raises."""
        id, exchange = self._new_id(), _Exchange(request)
        call, wait = (request.call_id, request.cseq), self._owner.wait
        head = f"{id}|sip|||{target}\r\n"
        try:
            data = framed(head.encode() + encode(request))
        except BadFrame:  # it repeats what a challenge said, so its length is not in our hands
            raise NotSent(Trouble.PERMANENT, "the answer to the challenge is too long for drachtio") from None
        try:
            async with asyncio.timeout(min(_ACCEPT, wait)):
                sent_at = await self._send(data, fence, (id, call, exchange))
                await exchange.accepted.wait()
            self._check(exchange)
            if exchange.refusal is not None:
                raise _refused(exchange.refusal)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait - (time.monotonic() - sent_at)):
                    await exchange.ended.wait()
            if exchange.final is None:
                self._check(exchange)
                raise NotSent(Trouble.TEMPORARY, f"no answer within {wait:.0f} s from {target} by {self._owner.where}")
            return exchange.final, sent_at
        except TimeoutError:
            raise NotSent(Trouble.OURS, f"{self._owner.where} does not answer") from None
        finally:
            self._by_id.pop(id, None)
            if self._by_call.get(call) is exchange:
                del self._by_call[call]
            if exchange.transaction is not None:
                self._by_transaction.pop(exchange.transaction, None)

    def _check(self, exchange: _Exchange) -> None:
        """Raises `NotSent` when the connection is gone and took this request's outcome with it."""
        if not self.is_up and exchange.final is None and exchange.refusal is None:
            raise NotSent(Trouble.TEMPORARY, "connection to drachtio lost; outcome unknown")

    async def _send(self, data: bytes, fence: Fence, entry: tuple[str, tuple[str, int], _Exchange]) -> float:
        """Send a request, once all that was written before has left: the fence speaks of now. Gives the time."""
        async with self._writing:
            await self._drained()
            fence()
            id, call, exchange = entry
            self._by_id[id] = self._by_call[call] = exchange
            sent_at = time.monotonic()
            self._writer.write(data)
        return sent_at

    async def _drained(self) -> None:
        try:
            await self._writer.drain()
        except OSError:
            self._lose("its end was closed")
        if not self.is_up:
            raise NotSent(Trouble.OURS, f"connection to {self._owner.where} lost")

    def _new_id(self) -> str:
        return f"{self._prefix}-{next(self._numbers)}"

    async def _ping(self, every: float) -> None:
        while self.is_up:
            await asyncio.sleep(every)
            self._heard.clear()
            async with self._writing:
                self._writer.write(framed(f"{self._new_id()}|ping".encode()))
            try:
                # Whatever comes shows that somebody is there; a server before 0.8.2 does not know the word.
                async with asyncio.timeout(min(_PONG, every)):
                    await self._heard.wait()
            except TimeoutError:
                self._lose("nothing came after a ping")

    async def _read(self, frames: Frames) -> None:
        why = "it hung up"
        try:
            while self.is_up and (data := await self._reader.read(65536)):
                self._heard.set()
                for body in frames.feed(data):
                    self._take(body)
        except (OSError, BadFrame) as error:
            why = _cause(error)
        finally:
            self._lose(why)

    def _lose(self, why: str) -> None:
        """Give the connection up. Who waits for an answer is told."""
        self._writer.transport.abort()
        if not self.is_up:
            return
        self.is_up = False
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        waiting = {*self._by_id.values(), *self._by_transaction.values()}
        self._owner.lost(why, len(waiting))
        for exchange in waiting:
            exchange.accepted.set()
            exchange.ended.set()

    def _take(self, body: bytes) -> None:
        """A whole frame. Other verbs than these are about calls."""
        words = _words(body)
        if words[1:2] == ["response"]:
            self._answered(words)
        elif words[1:2] == ["sip"]:
            self._arrived(words, body.partition(b"\r\n")[2])

    def _answered(self, words: list[str]) -> None:
        """What drachtio makes of a request: it has sent it, or why not."""
        exchange = self._by_id.pop((*words, "", "")[2], None)
        if exchange is None:  # a pong, or nobody waits for it any more
            return
        if words[3:4] != ["OK"]:
            exchange.refusal = (*words[4:], "")[0]
        elif len(words) > 10 and words[10]:
            exchange.transaction = words[10]
            self._by_transaction[words[10]] = exchange
            if final := exchange.early.pop(words[10], None):
                exchange.final = final
                exchange.ended.set()
            for _ in exchange.early:
                _dropped("foreign")
            exchange.early.clear()
        else:
            self._lose("it accepted a request without naming a transaction")
        exchange.accepted.set()

    def _arrived(self, words: list[str], sip: bytes) -> None:
        """A SIP message: the response that somebody waits for, or it is dropped."""
        response = read(sip)
        if response is None or len(words) < 9:
            _dropped("malformed")
            return
        transaction = words[8]
        exchange = self._by_transaction.get(transaction)
        if exchange is None:
            # It may have overtaken the frame that names its transaction.
            exchange = self._by_call.get((response.call_id, response.cseq))
            if exchange and (exchange.transaction is not None or len(exchange.early) >= _MOST_EARLY):
                exchange = None
        if exchange is None or not exchange.is_answered_by(response) or exchange.final:
            _dropped("foreign")
        elif response.status >= 200:
            final = _Final(response, _origin(*words[4:7]))
            if exchange.transaction is None:
                exchange.early[transaction] = final
            else:
                exchange.final = final
                exchange.ended.set()


class _Flight:
    """One attempt. After a challenge it stays with the address that challenged, whatever the name leads to by then, and
    with its transport: drachtio takes TCP for what is too long for UDP. Nothing less than the account's own is taken.
    """

    def __init__(self, drachtio: Drachtio, host: str, port: int | None, transport: Transport, fence: Fence) -> None:
        self._drachtio = drachtio
        self._host, self._port, self._transport = host, port, transport
        self._least = transport
        self._fence = fence

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is its own: requests that still wait ended with the tasks that made them."""

    async def exchange(self, request: Request) -> Reply:
        target = self._drachtio.target(self._host, self._port, self._transport)
        link = await self._drachtio.link()
        final, sent_at = await link.exchange(request, target, self._fence)
        origin = final.origin
        if origin is not None:
            self._drachtio.check(origin.address)
            if _RANK[origin.protocol] < _RANK[self._least]:
                came, wanted = origin.protocol.upper(), self._least.upper()
                raise NotSent(Trouble.PERMANENT, f"the answer came by {came}, but the account's transport is {wanted}")
        if final.response.status in (401, 407):
            if origin is None:  # so nobody knows who would get the credentials
                raise NotSent(Trouble.TEMPORARY, "drachtio did not say where the challenge came from")
            self._host, self._port, self._transport = str(origin.address), origin.port, origin.protocol
        return Reply(final.response, str(origin or "drachtio"), sent_at)


def _words(body: bytes) -> list[str]:
    """The fields of a frame's first line."""
    return body.partition(b"\r\n")[0].decode("utf-8", "replace").split("|")


def _address(text: str) -> _Address | None:
    try:
        found = ip_address(text.strip("[]"))
    except ValueError:
        return None
    return None if isinstance(found, IPv6Address) and found.scope_id else found  # a scope could say anything


def _origin(protocol: str, address: str, port: str) -> _Origin | None:
    found = _address(address)
    if found is None or protocol not in set(Transport) or not _PORT.fullmatch(port) or not 0 < int(port) < 65536:
        return None
    return _Origin(Transport(protocol), found, int(port))


def _dropped(reason: str) -> None:
    metrics.sip_dropped.labels(reason).inc()


def _refused(reason: str) -> NotSent:
    """drachtio's NOK. A transport that it does not have is its configuration, itself as the registrar the account's; of
    what else it says nobody knows how long it lasts."""
    if "not available" in reason.lower():
        trouble = Trouble.OURS
    else:
        trouble = Trouble.PERMANENT if _ITSELF.search(reason) else Trouble.TEMPORARY
    reason = "".join(char if char.isprintable() else " " for char in unquote(reason, errors="replace"))
    words = _PRIVATE.sub("…", reason).strip()[:120]
    return NotSent(trouble, f"drachtio refused the request: {words or 'it did not say why'}")


def _cause(error: Exception) -> str:
    """Why a connection failed, in words."""
    match error:
        case TimeoutError():
            return f"no answer within {_CONNECT:.0f} s"
        case ConnectionRefusedError():
            return "refused"
        case socket.gaierror() | UnicodeError():
            return "no such host"
        case OSError():
            return error.strerror or "connection lost"
        case _:
            return str(error)
