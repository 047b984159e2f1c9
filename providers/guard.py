"""Connections to hosts that somebody else names: to public addresses only, and never for longer than allowed
(security-reliability.md M2, M4, X10, X14).

A name is resolved once, every address it has is checked, and the connection goes to a checked address; the name stays
in `Host` and in TLS. So neither a DNS answer that changes nor a redirect leads inside. In the `httpx.Client` that
`client()` makes this is a network backend of httpcore: nothing that httpx does can pass it by.

`within(seconds)` bounds all that a thread does on such clients, together: connecting, TLS, every read and write. The
one thing it cannot interrupt is the system's resolver (`getaddrinfo`): time lost there is noticed when it answers.
"""

import math
import select
import socket
import ssl
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import httpcore
import httpx

from providers import http

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
    context = verify or http.ssl_context()
    backend = _Backend(allowed=allowed if guarded else None, resolve=resolve or addresses_of)
    return httpx.Client(
        transport=_Transport(backend, context, ports=ports, schemes=schemes, is_free_inside=is_free_inside),
        timeout=httpx.Timeout(_STALL, connect=_CONNECT),
        headers={"Accept-Encoding": "identity", "User-Agent": "pombal"},
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        follow_redirects=False,
        trust_env=False,
    )


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


def addresses_of(host: str) -> list[str]:
    """All addresses of a host, as the system resolves it: `127.1` and `0x7f.1` are names like others to it."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


class _Transport(httpx.HTTPTransport):
    """Checks what a URL shows by itself, and has its connections made by our backend."""

    def __init__(
        self,
        backend: "_Backend",
        context: ssl.SSLContext,
        *,
        ports: Collection[int] | None,
        schemes: Collection[str],
        is_free_inside: bool,
    ) -> None:
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
        self._backend, self._ports, self._schemes, self._is_free_inside = backend, ports, schemes, is_free_inside

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        if url.scheme not in _PORTS:
            raise BlockedAddress("a scheme that is not allowed")
        if url.userinfo:
            raise BlockedAddress("a user name in the address")
        if not url.host or url.host.endswith("."):
            raise BlockedAddress("not a host's usual name")
        # The address that is connected to later is checked again, and may be a public one by then: no harm is done.
        if not (self._is_free_inside and self._backend.is_inside(url.host)):
            if url.scheme not in self._schemes:
                raise BlockedAddress("a scheme that is not allowed")
            port = _PORTS.get(url.scheme) if url.port is None else url.port
            if self._ports is not None and port not in self._ports:
                raise BlockedAddress("a port that is not allowed")
        return super().handle_request(request)


class _Backend(httpcore.NetworkBackend):
    """Makes connections: to public addresses and `allowed` networks, or to all when that is None."""

    def __init__(self, *, allowed: Collection[Network] | None, resolve: Resolver) -> None:
        self._allowed, self._resolve = allowed, resolve

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            addresses = [ip_address(address) for address in self._resolve(host)]
        except (OSError, ValueError) as error:  # ValueError: not a name at all
            raise httpcore.ConnectError(type(error).__name__) from error
        if not all(self._may_see(address) for address in addresses):
            raise BlockedAddress("an address that is not public")
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
        """Whether all its addresses are in `allowed` networks."""
        try:
            addresses = [ip_address(address) for address in self._resolve(host)]
        except (OSError, ValueError):
            return False
        return bool(addresses) and all(any(a in network for network in self._allowed or ()) for a in addresses)

    def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        raise BlockedAddress("a socket of this machine")

    def _may_see(self, address: IPv4Address | IPv6Address) -> bool:
        return self._allowed is None or is_public(address) or any(address in network for network in self._allowed)


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
