"""A small gateway on a real socket that answers exactly as a test says, and channels at it.

The sandbox's MegaAPI plays the whole API; this one holds an answer back until the test lets it go.
"""

import asyncio
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import msgspec

from models import Channel, Tenant
from pombal.cli import gateways
from pombal.ids import uuid7
from pombal.secrets import seal
from tests.factories import a_tenant, superuser
from tests.workers.tools import PATIENCE

TOKEN = "a-token"
HANGS = "hangs"


def instance(status: str | None = "connected", number: str | None = "5511955550200") -> bytes:
    """The body about one instance, as MegaAPI writes it (megaapi.md, "Responses")."""
    found: dict[str, Any] = {"key": "k"} if status is None else {"key": "k", "status": status}
    if number is not None:
        found["user"] = {"id": f"{number}:7@s.whatsapp.net", "name": "x"}
    return json.dumps({"error": False, "message": "Instance data fetched", "instance": found}).encode()


class Answer(msgspec.Struct):
    """What is answered; `HANGS` in place of it never is."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"


class Gate:
    """An answer that waits for the test."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._open = threading.Event()
        self._answer: Answer | None = None

    def release(self, word: str = "connected") -> None:
        self._answer = Answer(body=instance(word))
        self._open.set()

    def hang_up(self) -> None:
        """There is none, to whoever waits and whoever asks from now on."""
        self._open.set()

    def wait_until_asked(self) -> None:
        assert self.asked.wait(PATIENCE)

    async def pass_through(self) -> Answer:
        self.asked.set()
        while not self._open.is_set():  # noqa: ASYNC110 - opened by another thread
            await asyncio.sleep(0.005)
        if self._answer is None:
            raise ConnectionError
        return self._answer


class Gateway:
    """One host. What it answers of an instance: a word, an `Answer`, a `Gate`, or `HANGS`; `usual` of all others."""

    def __init__(self, delay: float = 0.0) -> None:
        self.address = ""
        self.usual: str | Answer | Gate = "connected"
        self.says: dict[str, str | Answer | Gate] = {}
        self.second: dict[str, str | Answer] = {}  # … to the second question
        self.delay = delay
        self.asked: Counter[str] = Counter()  # by the last part of the path
        self.answered = 0
        self.last_asked = 0.0  # monotonic
        self.in_flight = self.most_in_flight = 0
        self.lists: list[dict[str, Any]] | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                key = head.split(b" ", 2)[1].decode().rpartition("/")[2]
                is_allowed = f"Authorization: Bearer {TOKEN}".lower().encode() in head.lower()
                self.asked[key] += 1
                self.last_asked = time.monotonic()
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    answer = await self._answer(key, reader) if is_allowed else Answer(401, b"{}")
                finally:
                    self.in_flight -= 1
                writer.write(
                    f"HTTP/1.1 {answer.status} x\r\nContent-Type: {answer.content_type}\r\n"
                    f"Content-Length: {len(answer.body)}\r\n\r\n".encode()
                    + answer.body
                )
                await writer.drain()
                self.answered += 1
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass  # the other side has gone, or the test is over
        finally:
            writer.close()

    async def _answer(self, key: str, reader: asyncio.StreamReader) -> Answer:
        await asyncio.sleep(self.delay)
        if key == "list" and self.lists is not None:
            return Answer(body=json.dumps({"error": False, "instances": self.lists}).encode())
        says: str | Answer | Gate = self.says.get(key, self.usual)
        if self.asked[key] == 2 and key in self.second:
            says = self.second[key]
        if says == HANGS:
            await reader.read()  # until the other side gives up
            raise ConnectionError
        if isinstance(says, Gate):
            return await says.pass_through()
        return says if isinstance(says, Answer) else Answer(body=instance(str(says)))


@contextmanager
def a_gateway(delay: float = 0.0) -> Iterator[Gateway]:
    """One host, in a thread of its own."""
    gateway = Gateway(delay)
    loop = asyncio.new_event_loop()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(gateway.serve, "127.0.0.1", 0, backlog=512)

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(start(), loop).result(PATIENCE)
    gateway.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield gateway
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result(PATIENCE)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE)
        loop.close()


async def _end(server: asyncio.Server) -> None:
    server.close()
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others)


def a_channel(gateway: Gateway | str, tenant: Tenant | None = None, key: str | None = None, **config: Any) -> Channel:
    """A channel of MegaAPI at this host; its instance's key is its name. `config` as `channel set` takes it."""
    host = gateway if isinstance(gateway, str) else gateway.address
    name = key or f"i{next(_count)}"
    given = gateways.MegaConfig(instance_key=name, host=host, token=TOKEN, **config)
    channel, _ = gateways.add_mega_channel(tenant or a_tenant(), name, given)
    return channel


def many_channels(gateway: Gateway, tenant: Tenant, count: int) -> list[UUID]:
    """So many channels of one tenant at this host, quickly."""
    first = a_channel(gateway, tenant)
    ids = [uuid7() for _ in range(count - 1)]
    with superuser() as connection, connection.cursor() as cursor:
        cursor.executemany(
            """
            INSERT INTO channel (tenant_id, id, kind, name, config, sealed)
            SELECT c.tenant_id, given.id, c.kind, given.name,
                c.config || jsonb_build_object('instance_key', given.name), given.sealed
            FROM channel AS c, (SELECT %s::uuid AS id, %s::text AS name, %s::bytea AS sealed) AS given WHERE c.id = %s
            """,
            [(id_, f"{first.name}-{n}", seal(id_, {"token": TOKEN}), first.id) for n, id_ in enumerate(ids)],
        )
    return [first.id, *ids]


def stored(channel: Channel) -> dict[str, Any]:
    """What is believed of a channel."""
    with superuser() as connection:
        found = connection.execute("SELECT * FROM channel WHERE id = %s", [channel.id])
        names = [column.name for column in found.description or ()]
        return dict(zip(names, found.fetchone() or (), strict=True))


def set_stored(channel: Channel, **columns: Any) -> None:
    """Let a channel stand otherwise than any poll said."""
    with superuser() as connection:
        for name, value in columns.items():
            connection.execute(f"UPDATE channel SET {name} = %s WHERE id = %s", [value, channel.id])  # noqa: S608 - ours


def events(tenant: Tenant, *types: str) -> list[dict[str, Any]]:
    """The payloads of a tenant's events of these types, in order."""
    with superuser() as connection:
        found = connection.execute(
            "SELECT payload FROM event WHERE tenant_id = %s AND type = ANY(%s) ORDER BY id", [tenant.id, list(types)]
        )
        return [payload for (payload,) in found]


_count = itertools.count(1)
