"""HTTP towards providers: one pooled client per process, and a call that always ends.

The total time of a call is bounded, and so is what is read of its answer; redirects are not followed, no proxy of the
environment is used, no cookie is kept, and an encoded answer is refused unread (security-reliability.md O5, O7, X10).
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NamedTuple

import httpx

from pombal.settings import settings
from providers import guard

DEADLINE = 30.0  # seconds for a whole call, from connecting to the last byte
MOST_BYTES = 1024 * 1024
_CONNECT = 10.0
# A server may close an idle connection just when it is used again, which looks like an answer that was lost: use one
# only for so long as no server is known to close it.
_KEEP_ALIVE = 20.0
_MOST_WAIT = 3600.0

# For a call that moves much: a minute without a byte ends it, and its deadline does.
PATIENT = httpx.Timeout(60.0, connect=_CONNECT, pool=_CONNECT)


class Reply(NamedTuple):
    """A whole answer, of whatever status."""

    status: int
    headers: httpx.Headers
    body: bytes


class NoReply(Exception):
    """No usable answer came. `has_left` is False when the request certainly reached nobody. The text names no host."""

    def __init__(self, why: str, *, has_left: bool, status: int | None = None) -> None:
        super().__init__(why)
        self.why, self.has_left, self.status = why, has_left, status


def new_client(
    verify: ssl.SSLContext | None = None, transport: httpx.AsyncBaseTransport | None = None
) -> httpx.AsyncClient:
    """A client for one event loop. Connections are kept alive and shared by all channels.

    With a `transport` it keeps its own rules on connections.
    """
    return httpx.AsyncClient(
        verify=verify or guard.ssl_context(),
        transport=transport,
        timeout=httpx.Timeout(DEADLINE, connect=_CONNECT, pool=_CONNECT),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEP_ALIVE),
        headers={"Accept-Encoding": "identity", "User-Agent": "pombal"},
        cookies=guard.no_cookies(),
        follow_redirects=False,
        trust_env=False,
    )


class Clients:
    """Several clients in place of one: a pool of httpx looks at each of its connections for every request.

    With 64 calls at once that look costs more than the call (3 of 4 ms); over 32 clients it is not noticed.

    For hosts that a tenant names there is as many again, made when the first of them is asked for. They connect to
    public addresses by https, and to `allowed` networks by any way (security-reliability.md M2); that is
    MEDIA_ALLOWED_NETWORKS unless given.
    """

    def __init__(
        self, count: int = 32, *, allowed: Collection[guard.Network] | None = None, verify: ssl.SSLContext | None = None
    ) -> None:
        self._count, self._allowed = count, allowed
        self._context = verify or guard.ssl_context()
        self._plain = _Shared([new_client(self._context) for _ in range(count)])
        self._guarded: _Shared | None = None
        self._lookup = guard.Lookup()

    def client(self, *, guarded: bool = False) -> AbstractAsyncContextManager[httpx.AsyncClient]:
        """One for hosts that the operator has named, or a `guarded` one. Raises `Misconfigured`."""
        return (self._for_others() if guarded else self._plain).least_busy()

    def _for_others(self) -> "_Shared":
        if self._guarded is None:
            allowed = settings().require_media_networks() if self._allowed is None else self._allowed
            ways = [guard.transport(self._lookup, allowed=allowed, verify=self._context) for _ in range(self._count)]
            self._guarded = _Shared([new_client(self._context, way) for way in ways])
        return self._guarded

    async def close(self) -> None:
        await self._plain.close()
        if self._guarded:
            await self._guarded.close()
        self._lookup.close()


class _Shared:
    """Clients that share the calls among them."""

    def __init__(self, clients: list[httpx.AsyncClient]) -> None:
        self._clients = clients
        self._busy = [0] * len(clients)

    @asynccontextmanager
    async def least_busy(self) -> AsyncIterator[httpx.AsyncClient]:
        """The first of them, so that few connections are kept warm."""
        n = self._busy.index(min(self._busy))
        self._busy[n] += 1
        try:
            yield self._clients[n]
        finally:
            self._busy[n] -= 1

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()


async def call(
    client: httpx.AsyncClient, request: httpx.Request, *, deadline: float = DEADLINE, most_bytes: int = MOST_BYTES
) -> Reply:
    """The answer, in time and in bounds. Raises `NoReply`, and nothing else that the network could cause.

    What the request's own content raises while it is sent comes out as it is, and so does a guarded client's
    `guard.BlockedAddress`.
    """
    has_left = False
    try:
        async with asyncio.timeout(deadline):
            # Until there is a connection nothing has left; httpx tells by the type of its errors.
            response = await client.send(request, stream=True)
            has_left = True
            try:
                if response.headers.get("content-encoding", "identity").lower() != "identity":
                    raise NoReply("an encoded answer", has_left=True, status=response.status_code)
                body = bytearray()
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > most_bytes:
                        why = f"an answer over {most_bytes // 1024**2} MiB"
                        raise NoReply(why, has_left=True, status=response.status_code)
            finally:
                await response.aclose()
            return Reply(response.status_code, response.headers, bytes(body))
    except TimeoutError:
        raise NoReply("no answer in time", has_left=True) from None
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol) as error:
        raise NoReply(type(error).__name__, has_left=has_left) from None
    except httpx.HTTPError as error:
        raise NoReply(type(error).__name__, has_left=True) from None


def asked_to_wait(headers: httpx.Headers) -> float:
    """`Retry-After` in seconds, within reason; a date, or what is no number, counts as silence: 0."""
    value = headers.get("retry-after", "").strip()
    return min(float(value), _MOST_WAIT) if value.isascii() and value.isdecimal() else 0.0
