"""HTTP towards providers: one pooled client per process, and a call that always ends.

The total time of a call is bounded, and so is what is read of its answer; redirects are not followed, no proxy of the
environment is used, and an encoded answer is refused unread (security-reliability.md O5, O7, X10).
"""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import httpx

DEADLINE = 30.0  # seconds for a whole call, from connecting to the last byte
MOST_BYTES = 1024 * 1024
_CONNECT = 10.0
# A server may close an idle connection just when it is used again, which looks like an answer that was lost: use one
# only for so long as no server is known to close it.
_KEEP_ALIVE = 20.0

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


def new_client(verify: ssl.SSLContext | None = None) -> httpx.AsyncClient:
    """A client for one event loop. Connections are kept alive and shared by all channels."""
    return httpx.AsyncClient(
        verify=verify or ssl_context(),
        timeout=httpx.Timeout(DEADLINE, connect=_CONNECT, pool=_CONNECT),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEP_ALIVE),
        headers={"Accept-Encoding": "identity", "User-Agent": "pombal"},
        follow_redirects=False,
        trust_env=False,
    )


def ssl_context() -> ssl.SSLContext:
    """Certificates are verified, always. Made once and shared: it takes some 10 ms."""
    return httpx.create_ssl_context(trust_env=False)


class Clients:
    """Several clients in place of one: a pool of httpx looks at each of its connections for every request.

    With 64 calls at once that look costs more than the call (3 of 4 ms); over 32 clients it is not noticed.
    """

    def __init__(self, count: int = 32) -> None:
        context = ssl_context()
        self._clients = [new_client(context) for _ in range(count)]
        self._busy = [0] * count

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """The least busy one; the first of them, so that few connections are kept warm."""
        n = self._busy.index(min(self._busy))
        self._busy[n] += 1
        try:
            yield self._clients[n]
        finally:
            self._busy[n] -= 1

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()


async def call(client: httpx.AsyncClient, request: httpx.Request, *, deadline: float = DEADLINE) -> Reply:
    """The answer, in time and in bounds. Raises `NoReply`, and nothing else that the network could cause.

    What the request's own content raises while it is sent comes out as it is.
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
                    if len(body) > MOST_BYTES:
                        raise NoReply("an answer over 1 MiB", has_left=True, status=response.status_code)
            finally:
                await response.aclose()
            return Reply(response.status_code, response.headers, bytes(body))
    except TimeoutError:
        raise NoReply("no answer in time", has_left=True) from None
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol) as error:
        raise NoReply(type(error).__name__, has_left=has_left) from None
    except httpx.HTTPError as error:
        raise NoReply(type(error).__name__, has_left=True) from None
