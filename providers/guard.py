"""Connections to hosts that somebody else names: to public addresses only, and never for longer than allowed
(security-reliability.md M2, M4, X10, X14).

A name is resolved once, every address it has is checked, and the connection goes to a checked address; the name stays
in `Host` and in TLS. So neither a DNS answer that changes nor a redirect leads inside. In the `httpx.Client` that
`client()` makes this is a network backend of httpcore: nothing that httpx does can pass it by.

`within(seconds)` bounds all that a thread does on such clients, together: connecting, TLS, every read and write. The
one thing it cannot interrupt is the system's resolver (`getaddrinfo`): time lost there is noticed when it answers.

`transport()` makes the same checks for a client of an event loop; names are looked up in threads there (`Lookup`), so
that no resolver holds up the loop.
"""

import asyncio
import math
import select
import socket
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import httpcore
import httpx

Network = IPv4Network | IPv6Network
Resolver = Callable[[str], Sequence[str]]  # a host's name → its addresses

_CONNECT = 10.0  # seconds for one address to answer
_STALL = 30.0  # seconds without a byte
_IDLE = 16  # connections kept for the next file
_KEEP_ALIVE = 20.0  # seconds; servers close an idle one sooner or later, and then perhaps just when it is used
# Bytes to read at once. Larger pieces carry a file of 50 MB a fifth faster, and slow one of 1 MB down: each time their
# buffers are memory new to the process. TLS gives out one record at a time anyway.
_READ, _READ_MORE, _AFTER = 64 * 1024, 512 * 1024, 2 * 1024 * 1024
_RECORD = 16 * 1024
_PORTS = {"https": 443, "http": 80}
_LOOKUPS = 64  # names that one `Lookup` asks for at a time; each holds a thread for as long as the resolver takes
_OF_ONE_PARENT = 4  # … of those that one party can make up, as many as it likes
_HANGS = 5.0  # seconds after which nobody else waits for a name: a resolver's first try has failed by then
_LEFT_ALONE = 15.0  # seconds in which a name is not asked for again whose look-up took so long and failed
# Under a country's code they are everybody's: `com.br`, `co.uk`.
_CATEGORIES = frozenset({"ac", "adv", "app", "co", "com", "eco", "edu", "emp", "gov", "ind", "net", "ne", "or", "org"})

# The special blocks of IANA's registries. `is_global` is asked too, but lets most of those below through (X14), and
# its list differs from one Python to the next.
_SPECIAL = (
    ip_network("192.0.0.0/24"),  # protocol assignments
    ip_network("192.88.99.0/24"),  # 6to4 relays
    ip_network("198.18.0.0/15"),  # benchmarking
    ip_network("224.0.0.0/3"),  # multicast, reserved, broadcast
    ip_network("2001::/23"),  # Teredo, benchmarking, ORCHID and other protocol assignments
    ip_network("2001:db8::/32"),  # documentation
    ip_network("2002::/16"),  # 6to4
    ip_network("3fff::/20"),  # documentation
)
# What is public of IPv6. Outside are, beside the local and multicast blocks, those that stand for an IPv4 address:
# IPv4-mapped, IPv4-compatible and both NAT64 prefixes.
_UNICAST = ip_network("2000::/3")

_ends_at: ContextVar[float] = ContextVar("ends_at", default=math.inf)


class BlockedAddress(Exception):
    """This URL is not one that we connect to. The text names neither host nor URL."""


def client(
    *,
    guarded: bool,
    allowed: Collection[Network] = (),
    ports: Collection[int] | None = (443,),
    schemes: Collection[str] = ("https",),
    verify: ssl.SSLContext | None = None,
    resolve: Resolver | None = None,
    is_free_inside: bool = False,
) -> httpx.Client:
    """A client for the threads of one process, which raises `BlockedAddress` beside httpx's own errors.

    `guarded`: connects to public addresses only, and to `allowed` networks. Without it any address will do: for hosts
    that an operator has named. `ports` and `schemes` hold for both; no port is refused when `ports` is None. With
    `is_free_inside` they do not hold in `allowed` networks, where plain http and odd ports are usual.
    Redirects are not followed, no proxy of the environment is used, and no cookie is kept.
    """
    backend = _Backend(allowed=allowed if guarded else None, resolve=resolve or addresses_of)
    rules = _Rules(ports, schemes, is_free_inside)
    return httpx.Client(
        transport=_Transport(backend, verify or ssl_context(), rules),
        timeout=httpx.Timeout(_STALL, connect=_CONNECT),
        headers={"Accept-Encoding": "identity", "User-Agent": "pombal"},
        cookies=no_cookies(),
        follow_redirects=False,
        trust_env=False,
    )


def transport(
    lookup: "Lookup", *, allowed: Collection[Network], verify: ssl.SSLContext | None = None
) -> httpx.AsyncBaseTransport:
    """For an `httpx.AsyncClient` that may be led anywhere by others: its calls raise `BlockedAddress` too.

    As a guarded `client()` with `is_free_inside`: https and its port to public addresses, and whatever is asked for in
    `allowed` networks. A call's own deadline is its caller's affair.
    """
    rules = _Rules((_PORTS["https"],), ("https",), is_free_inside=True)
    return _AsyncTransport(_AsyncBackend(allowed, lookup), verify or ssl_context(), rules)


@cache
def ssl_context() -> ssl.SSLContext:
    """Certificates are verified, always. Made once and shared: it takes some 20 ms."""
    return httpx.create_ssl_context(trust_env=False)


def no_cookies() -> CookieJar:
    """A jar that stays empty: one client serves many tenants, and what one host sets is no other's business."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """What this thread does on clients of this module in the block ends in time, with httpx's timeout errors.

    In a block inside another the earlier end counts.
    """
    token = _ends_at.set(min(_ends_at.get(), time.monotonic() + seconds))
    try:
        yield
    finally:
        _ends_at.reset(token)


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether it is an address of the open internet, and no other way to write one that is not."""
    if address.version == 6 and address not in _UNICAST:
        return False
    return address.is_global and not any(address in network for network in _SPECIAL)


def may_reach(address: IPv4Address | IPv6Address, allowed: Collection[Network] | None) -> bool:
    """Whether it is public or in one of these networks; None allows all."""
    return allowed is None or is_public(address) or any(address in network for network in allowed)


def addresses_of(host: str) -> list[str]:
    """All addresses of a host, as the system resolves it: `127.1` and `0x7f.1` are names like others to it."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


class _Sight:
    """Which addresses may be seen: public ones and `allowed` networks, or all when that is None."""

    def __init__(self, allowed: Collection[Network] | None) -> None:
        self._allowed = allowed

    def checked(self, found: Iterable[str]) -> list[IPv4Address | IPv6Address]:
        """All addresses of a name, to connect to. Raises `BlockedAddress` when one of them may not be seen."""
        addresses = [ip_address(address) for address in found]
        if not all(may_reach(address, self._allowed) for address in addresses):
            raise BlockedAddress("an address that is not public")
        return addresses

    def is_inside(self, found: Sequence[str]) -> bool:
        """Whether all of them are in `allowed` networks."""
        addresses = [ip_address(address) for address in found]
        return bool(addresses) and all(any(a in network for network in self._allowed or ()) for a in addresses)


class _Rules:
    """What a URL may show by itself."""

    def __init__(self, ports: Collection[int] | None, schemes: Collection[str], is_free_inside: bool) -> None:
        self._ports, self._schemes, self._is_free_inside = ports, schemes, is_free_inside

    def breach(self, url: httpx.URL) -> str | None:
        """What is wrong with it unless its host is inside. Raises `BlockedAddress` for what is wrong anywhere.

        The address that is connected to later is checked again, and may be a public one by then: no harm is done.
        """
        if url.scheme not in _PORTS:
            raise BlockedAddress("a scheme that is not allowed")
        if url.userinfo:
            raise BlockedAddress("a user name in the address")
        if not url.host or url.host.endswith("."):
            raise BlockedAddress("not a host's usual name")
        why = None
        if url.scheme not in self._schemes:
            why = "a scheme that is not allowed"
        elif self._ports is not None and (_PORTS[url.scheme] if url.port is None else url.port) not in self._ports:
            why = "a port that is not allowed"
        if why and not self._is_free_inside:
            raise BlockedAddress(why)
        return why


class _Transport(httpx.HTTPTransport):
    """Checks what a URL shows by itself, and has its connections made by our backend."""

    def __init__(self, backend: "_Backend", context: ssl.SSLContext, rules: _Rules) -> None:
        super().__init__(verify=context, trust_env=False)
        # httpx has no parameter for this. It is pinned in pyproject.toml, and must not leave us unguarded in silence.
        if not isinstance(getattr(self, "_pool", None), httpcore.ConnectionPool):
            raise RuntimeError("this httpx keeps its connections in another place: nothing would be guarded")
        self._pool = httpcore.ConnectionPool(
            ssl_context=context,
            max_connections=None,  # httpcore's default of 10 would let slow files keep everybody else waiting
            max_keepalive_connections=_IDLE,
            keepalive_expiry=_KEEP_ALIVE,
            network_backend=backend,
        )
        self._backend, self._rules = backend, rules

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        why = self._rules.breach(request.url)
        if why and not self._backend.is_inside(request.url.host):
            raise BlockedAddress(why)
        return super().handle_request(request)


class _Backend(httpcore.NetworkBackend):
    """Makes connections, to checked addresses alone."""

    def __init__(self, *, allowed: Collection[Network] | None, resolve: Resolver) -> None:
        self._sight, self._resolve = _Sight(allowed), resolve

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            addresses = self._sight.checked(self._resolve(host))
        except (OSError, ValueError) as error:  # ValueError: not a name at all
            raise httpcore.ConnectError(type(error).__name__) from error
        failure: Exception = httpcore.ConnectError("no address")
        for address in addresses:
            try:
                return _Stream(_connected(address, port, timeout))
            except TimeoutError as error:
                failure = httpcore.ConnectTimeout(type(error).__name__)
            except (OSError, OverflowError) as error:
                failure = httpcore.ConnectError(type(error).__name__)
        raise failure

    def is_inside(self, host: str) -> bool:
        try:
            return self._sight.is_inside(self._resolve(host))
        except (OSError, ValueError):
            return False

    def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        raise BlockedAddress("a socket of this machine")


class _Asked:
    """A name that is looked up, or waits for its turn."""

    def __init__(self, host: str) -> None:
        self.host, self.parent = host, _parent_of(host)
        self.began_at: float | None = None
        self.wanted_until = 0.0
        self.found: Future[Sequence[str]] = Future()
        # It counts as running from now on: then nobody who gives up cancels it for the others.
        self.found.set_running_or_notify_cancel()

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):  # it was closed at the same moment
            self.found.set_exception(error)


class Lookup:
    """Names looked up in threads of its own. May be shared by all clients, and all event loops, of a process.

    A name is asked for once however many wait for it. What hangs holds its thread until the resolver gives up, and
    nothing can end that sooner: so there are at most a few names of one parent in threads at once (the others wait for
    each other), a name is left alone for a while after it hung, and one that nobody waits for any more is not begun.
    Only somebody with many domains whose names hang can still make the others wait.
    """

    def __init__(self, resolve: Resolver | None = None) -> None:
        self._resolve = resolve or addresses_of
        self._threads = ThreadPoolExecutor(_LOOKUPS, thread_name_prefix="lookup")
        self._lock = threading.Lock()
        self._under_way: dict[str, _Asked] = {}  # those that wait for their turn too
        self._waiting: dict[str, deque[_Asked]] = {}  # … by parent
        self._busy: Counter[str] = Counter()  # threads taken, by parent
        self._left_alone: dict[str, float] = {}  # until when, by name
        self._is_closed = False

    async def addresses(self, host: str, seconds: float) -> Sequence[str]:
        """As `Resolver`. Raises `TimeoutError` when there is no answer in time, or was none lately, beside the
        resolver's own errors."""
        with suppress(ValueError):
            return [str(ip_address(host))]  # nothing to look up
        found = self._asked(host, seconds)
        async with asyncio.timeout(seconds):
            return await asyncio.wrap_future(found)

    def close(self) -> None:
        """Wait for nothing that is still being looked up."""
        with self._lock:
            self._is_closed = True
            unbegun = [one for one in self._under_way.values() if one.began_at is None]
            self._waiting.clear()
            for one in unbegun:
                del self._under_way[one.host]
        self._threads.shutdown(wait=False, cancel_futures=True)
        for one in unbegun:
            one.fail(OSError("closed"))

    def _asked(self, host: str, seconds: float) -> Future[Sequence[str]]:
        now = time.monotonic()
        with self._lock:
            if self._is_closed:
                raise OSError("closed")
            one = self._under_way.get(host)
            hangs = one is not None and one.began_at is not None and now - one.began_at > _HANGS
            if hangs or self._left_alone.get(host, now) > now:
                raise TimeoutError
            if one is None:
                one = self._under_way[host] = _Asked(host)
                self._waiting.setdefault(one.parent, deque()).append(one)
            one.wanted_until = max(one.wanted_until, now + seconds)
            self._begin(one.parent)
        return one.found

    def _begin(self, parent: str) -> None:
        """Give threads to names that wait, as far as their parent may have more. The lock must be held."""
        waiting = self._waiting.get(parent, deque())
        while waiting and self._busy[parent] < _OF_ONE_PARENT:
            self._threads.submit(self._look_up, waiting.popleft())
            self._busy[parent] += 1
        if not waiting:
            self._waiting.pop(parent, None)

    def _look_up(self, one: _Asked) -> None:
        with self._lock:
            is_wanted = one.wanted_until > time.monotonic() and self._under_way.get(one.host) is one
            if is_wanted:
                one.began_at = time.monotonic()
            else:
                self._forget(one)  # now: nobody may begin to wait for it
        # It is forgotten before it is told: who has heard the answer and asks again is given a new one.
        try:
            if not is_wanted:
                raise TimeoutError
            addresses = self._resolve(one.host)
        except Exception as error:
            self._ended(one, has_failed=True)
            one.fail(error)
        else:
            self._ended(one, has_failed=False)
            one.found.set_result(addresses)

    def _ended(self, one: _Asked, *, has_failed: bool) -> None:
        now = time.monotonic()
        with self._lock:
            self._forget(one)
            if has_failed and one.began_at is not None and now - one.began_at > _HANGS:
                self._left_alone = {host: until for host, until in self._left_alone.items() if until > now}
                self._left_alone[one.host] = now + _LEFT_ALONE
            self._busy[one.parent] -= 1
            if not self._busy[one.parent]:
                del self._busy[one.parent]
            self._begin(one.parent)

    def _forget(self, one: _Asked) -> None:
        if self._under_way.get(one.host) is one:
            del self._under_way[one.host]


def _parent_of(host: str) -> str:
    """The domain whose owner may have made this name up: two labels of it, or three under `com.br` and its like."""
    labels = host.lower().split(".")
    is_shared = len(labels) > 2 and len(labels[-1]) == 2 and labels[-2] in _CATEGORIES
    return ".".join(labels[-3 if is_shared else -2 :])


class _AsyncTransport(httpx.AsyncHTTPTransport):
    """As `_Transport`, of an event loop."""

    def __init__(self, backend: "_AsyncBackend", context: ssl.SSLContext, rules: _Rules) -> None:
        super().__init__(verify=context, trust_env=False)
        if not isinstance(getattr(self, "_pool", None), httpcore.AsyncConnectionPool):
            raise RuntimeError("this httpx keeps its connections in another place: nothing would be guarded")
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=None,
            max_keepalive_connections=None,
            keepalive_expiry=_KEEP_ALIVE,
            network_backend=backend,
        )
        self._backend, self._rules = backend, rules

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        why = self._rules.breach(request.url)
        if why:
            seconds = request.extensions.get("timeout", {}).get("connect") or _CONNECT
            if not await self._backend.is_inside(request.url.host, seconds):
                raise BlockedAddress(why)
        return await super().handle_async_request(request)


class _AsyncBackend(httpcore.AsyncNetworkBackend):
    """As `_Backend`, of an event loop. The time for connecting is shared by the name and all its addresses: whoever
    waits for longer could no longer tell that nothing has left."""

    def __init__(self, allowed: Collection[Network], lookup: Lookup) -> None:
        self._sight, self._lookup = _Sight(allowed), lookup
        self._plain = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's own
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        ends_at = time.monotonic() + (_CONNECT if timeout is None else timeout)
        try:
            addresses = self._sight.checked(await self._lookup.addresses(host, ends_at - time.monotonic()))
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(type(error).__name__) from error
        except (OSError, ValueError) as error:  # ValueError: not a name at all
            raise httpcore.ConnectError(type(error).__name__) from error
        failure: Exception = httpcore.ConnectError("no address")
        for n, address in enumerate(addresses):
            share = max(ends_at - time.monotonic(), 0.0) / (len(addresses) - n)
            try:
                return await self._plain.connect_tcp(str(address), port, timeout=share)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = type(error)(type(error).__name__)  # its text names the address
            except OverflowError as error:
                failure = httpcore.ConnectError(type(error).__name__)
        raise failure

    async def is_inside(self, host: str, seconds: float) -> bool:
        try:
            return self._sight.is_inside(await self._lookup.addresses(host, seconds))
        except TimeoutError as error:
            raise httpx.ConnectTimeout(type(error).__name__) from error
        except (OSError, ValueError):
            return False

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's own
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise BlockedAddress("a socket of this machine")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _connected(address: IPv4Address | IPv6Address, port: int, timeout: float | None) -> socket.socket:
    connection = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(_left(timeout))
        connection.connect((str(address), port))
    except BaseException:
        connection.close()
        raise
    return connection


class _Stream(httpcore.NetworkStream):
    """One connection; each of its steps ends in time. The text of an error is no more than its type's name."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._is_tls = isinstance(connection, ssl.SSLSocket)
        self._came = 0  # bytes of this answer
        self._has_ended = False  # TLS can say so while the connection below stays open

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        most = _RECORD if self._is_tls else _READ if self._came < _AFTER else _READ_MORE
        try:
            self._connection.settimeout(_left(timeout))
            chunk = self._connection.recv(most)
        except TimeoutError as error:
            raise httpcore.ReadTimeout(type(error).__name__) from error
        except OSError as error:
            raise httpcore.ReadError(type(error).__name__) from error
        self._came += len(chunk)
        self._has_ended = not chunk
        return chunk

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._came = 0
        rest = memoryview(buffer)
        try:
            while rest:
                self._connection.settimeout(_left(timeout))
                rest = rest[self._connection.send(rest) :]
        except TimeoutError as error:
            raise httpcore.WriteTimeout(type(error).__name__) from error
        except OSError as error:
            raise httpcore.WriteError(type(error).__name__) from error

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        try:
            (server_hostname or "").encode("idna")  # `wrap_socket` would do it too late to close what it was given
            self._connection.settimeout(_left(timeout))
            # An end without TLS's own goodbye may be an attacker's: it must not pass for the end of a file.
            return _Stream(
                ssl_context.wrap_socket(self._connection, server_hostname=server_hostname, suppress_ragged_eofs=False)
            )
        except TimeoutError as error:
            self.close()
            raise httpcore.ConnectTimeout(type(error).__name__) from error
        except (OSError, ValueError) as error:  # ValueError: a name that no certificate can have
            self.close()
            raise httpcore.ConnectError(type(error).__name__) from error

    def close(self) -> None:
        self._connection.close()

    def get_extra_info(self, info: str) -> Any:
        """Only what HTTP/1.1 asks for: whether the other side has closed an idle connection."""
        if info != "is_readable":
            return None
        if self._has_ended or self._connection.fileno() < 0:
            return True
        waiting = select.poll()
        waiting.register(self._connection, select.POLLIN)
        return bool(waiting.poll(0))


def _left(timeout: float | None) -> float | None:
    """What a step may take: its own timeout, or what is left of `within`. Raises `TimeoutError` when nothing is."""
    ends_at = _ends_at.get()
    if ends_at == math.inf:
        return timeout
    left = ends_at - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left if timeout is None else min(timeout, left)
