"""The load generator, a process of its own: requests made beforehand, over connections that are kept open.

    python bench/load.py PORT CONNECTIONS FILE FIRST COUNT RESULT

FILE holds a msgpack list of whole HTTP requests, of which COUNT are sent from FIRST on. Each connection sends its next
request when the last one is answered. Writes what it saw to the file RESULT; stops at the first answer that is not
`200 … EVENT_RECEIVED`. Times are CLOCK_MONOTONIC, the same for all processes of a host.
"""

import asyncio
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import uvloop

_LIMIT = 600.0  # seconds for all of it


class Seen(msgspec.Struct):
    """What came of the requests: times in seconds, `latencies` one per request, in the order of the answers."""

    began: float
    ended: float
    cpu: float
    latencies: list[float]
    wrong: str = ""


class Connection(asyncio.Protocol):
    """One kept-alive connection that works through the shared requests."""

    def __init__(self, requests: Iterator[bytes], latencies: list[float]) -> None:
        self._requests, self._latencies = requests, latencies
        self._sent = 0.0
        self._answer = b""
        self._transport: asyncio.WriteTransport | None = None
        self.done: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment] # of a TCP connection

    def next(self) -> None:
        assert self._transport
        request = next(self._requests, None)
        if request is None:
            self.done.set_result("")
            return
        self._sent = time.monotonic()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if self._answer.endswith(b"EVENT_RECEIVED") and self._answer.startswith(b"HTTP/1.1 200 "):
            self._latencies.append(time.monotonic() - self._sent)
            self._answer = b""
            self.next()
        elif not b"HTTP/1.1 200 ".startswith(self._answer[:13]):
            self._end(self._answer.decode("latin-1")[:500])

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"the connection was lost: {exc!r}")

    def _end(self, wrong: str) -> None:
        if not self.done.done():
            self.done.set_result(wrong)


async def drive(port: int, connections: int, requests: list[bytes]) -> Seen:
    """Send them all; returns early at the first wrong answer."""
    loop = asyncio.get_running_loop()
    shared = iter(requests)
    latencies: list[float] = []
    made = [
        (await loop.create_connection(lambda: Connection(shared, latencies), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    cpu = _cpu()
    began = time.monotonic()
    for connection in made:
        connection.next()
    wrong = ""
    try:
        async with asyncio.timeout(_LIMIT):
            for done in asyncio.as_completed([connection.done for connection in made]):
                wrong = await done
                if wrong:
                    break
    except TimeoutError:
        wrong = f"not done after {_LIMIT:.0f} s"
    return Seen(began, time.monotonic(), _cpu() - cpu, latencies, wrong)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    port, connections, file, first, count, result = sys.argv[1:]
    requests = msgspec.msgpack.decode(Path(file).read_bytes(), type=list[bytes])
    seen = uvloop.run(drive(int(port), int(connections), requests[int(first) : int(first) + int(count)]))
    Path(result).write_bytes(msgspec.msgpack.encode(seen))


if __name__ == "__main__":
    main()
