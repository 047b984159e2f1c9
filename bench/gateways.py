"""Hosts of a gateway, as many as are asked for, each on a port of its own and in one process (for `status_sync.py`).

    python bench/gateways.py HOSTS SECONDS [HANGING]

Every instance is connected, until `GET /change/KEY,KEY,…` says otherwise; each answer takes so many seconds, and those
of the last HANGING hosts never come. `GET /most` tells the most questions that each host had at once, and begins anew.
"""

import asyncio
import json
import sys


class Hosts:
    def __init__(self, hosts: int, seconds: float, hanging: int) -> None:
        self.count, self.seconds, self.hanging = hosts + hanging, seconds, hanging
        self.changed: set[str] = set()
        self.now, self.most = [0] * self.count, [0] * self.count

    async def answer(self, n: int, path: str, reader: asyncio.StreamReader) -> object:
        word, _, rest = path.removeprefix("/").partition("/")
        if word == "most":
            said, self.most = self.most, [0] * self.count
            return said
        if word == "change":
            self.changed.update(rest.split(","))
            return None
        self.now[n] += 1
        self.most[n] = max(self.most[n], self.now[n])
        try:
            if n >= self.count - self.hanging:
                await reader.read()  # until the other side gives up
                raise ConnectionError
            await asyncio.sleep(self.seconds)
        finally:
            self.now[n] -= 1
        key = rest.rpartition("/")[2]
        status = "disconnected" if key in self.changed else "connected"
        found = {"key": key, "status": status, "user": {"id": "5511955550200:3@s.whatsapp.net", "name": "x"}}
        return {"error": False, "message": "Instance data fetched", "instance": found}

    async def serve(self, n: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = json.dumps(await self.answer(n, head.split(b" ", 2)[1].decode(), reader)).encode()
                fields = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
                writer.write(fields + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


async def main() -> None:
    hosts = Hosts(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    ports = []
    for n in range(hosts.count):
        server = await asyncio.start_server(lambda r, w, n=n: hosts.serve(n, r, w), "127.0.0.1", 0, backlog=1024)
        ports.append(server.sockets[0].getsockname()[1])
    print(*ports, flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
