"""Real servers on real sockets for the sandbox's tests."""

import asyncio
import hashlib
import hmac
import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from sandbox import client
from sandbox.app import create_app, server
from sandbox.config import Channel

SECRET = "app-secret-ção"
VERIFY_TOKEN = "verify-me"

# Of a client that soon goes away without an answer, but never before it has asked.
LEAVES = httpx.Timeout(20, read=0.5)


@dataclass
class Receiver:
    """A webhook endpoint that answers with `failures` first, one status for each request, and 200 from then on."""

    failures: Sequence[int] = ()
    url: str = ""
    received: list[bytes] = field(default_factory=list)
    accepted: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    async def verify(self, request: Request) -> Response:
        asked = request.query_params
        if asked.get("hub.mode") != "subscribe" or asked.get("hub.verify_token") != VERIFY_TOKEN:
            return PlainTextResponse("Forbidden", status_code=403)
        return PlainTextResponse(asked["hub.challenge"])

    async def receive(self, request: Request) -> Response:
        raw = await request.body()
        self.received.append(raw)
        self.headers.append(dict(request.headers))
        good = "sha256=" + hmac.new(SECRET.encode(), raw, hashlib.sha256).hexdigest()
        if request.headers.get("x-hub-signature-256") != good:
            return PlainTextResponse("Unauthorized", status_code=401)
        if len(self.received) <= len(self.failures):
            return Response(status_code=self.failures[len(self.received) - 1])
        self.accepted.append(raw)
        return PlainTextResponse("EVENT_RECEIVED")

    def app(self) -> Starlette:
        return Starlette(
            routes=[Route("/hook", self.verify), Route("/hook", self.receive, methods=["POST"])],
        )


class Prompt(uvicorn.Server):
    """Ends in uvicorn's order, but without its pauses: tenths of a second that add up to minutes over all tests."""

    async def main_loop(self) -> None:
        ticks = 0
        while not await self.on_tick(ticks):
            ticks += 1
            await asyncio.sleep(0.01)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        end = time.monotonic() + (self.config.timeout_graceful_shutdown or 0)
        for listening in self.servers:
            listening.close()
        for listener in sockets or ():
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        its = self.server_state
        while (its.connections or its.tasks) and time.monotonic() < end:  # noqa: ASYNC110 - uvicorn tells nobody
            await asyncio.sleep(0.005)
        for task in self.server_state.tasks:
            task.cancel()
        await self.lifespan.shutdown()


@contextmanager
def serve(app: Starlette) -> Iterator[str]:
    """Serve an app from a thread; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    serving = Prompt(server(app, timeout_graceful_shutdown=1).config)
    thread = threading.Thread(target=serving.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        serving.should_exit = True
        thread.join()


@contextmanager
def receiver(*failures: int) -> Iterator[Receiver]:
    its = Receiver(failures)
    with serve(its.app()) as address:
        its.url = f"{address}/hook"
        yield its


@contextmanager
def a_meta(
    *channels: Channel,
    webhook_url: str | None = None,
    app_secret: str = SECRET,
    verify_token: str = VERIFY_TOKEN,
) -> Iterator[str]:
    """A simulated Meta with one app that has these channels; gives its address, for Graph and for `sandbox.client`.

    Without a `webhook_url` nothing is sent there: no status follows a call.
    """
    app = {
        "url": webhook_url or "http://127.0.0.1:9/nobody",
        "app_secret": app_secret,
        "verify_token": verify_token,
        "channels": msgspec.to_builtins(channels),
    }
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "sandbox.json")
        config.write_text(json.dumps({"apps": [app]}))
        with serve(create_app(config)) as address:
            if webhook_url is None:
                client.rules(address, statuses={"words": []})
            yield address
