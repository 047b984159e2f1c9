"""Simulated MegaAPI hosts on real sockets, and a place for their webhooks, for any test."""

import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from sandbox.app import create_app
from sandbox.config import MegaHost, MegaInstance
from sandbox.meta import JSON
from tests.sandbox.servers import serve

HOST_TOKEN = "host-token"


@contextmanager
def a_megaapi(*instances: MegaInstance, host_token: str | None = HOST_TOKEN) -> Iterator[str]:
    """One MegaAPI host with these instances; gives its address, for the API and for `sandbox.client`."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "sandbox.json")
        config.write_text(json.dumps({"megaapi": msgspec.to_builtins(MegaHost(host_token, instances))}))
        with serve(create_app(config)) as address:
            yield address


@dataclass
class Hook:
    """A webhook endpoint that keeps what it gets; the next requests are answered with `failures`, all others 200."""

    url: str = ""
    failures: list[int] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    _news: threading.Condition = field(default_factory=threading.Condition, repr=False)

    @property
    def bodies(self) -> list[JSON]:
        return [json.loads(raw) for raw in self.raw]

    def until(self, enough: Callable[[list[JSON]], object], *, seconds: float = 10) -> list[JSON]:
        """Wait until the bodies are as they should be."""
        with self._news:
            assert self._news.wait_for(lambda: enough(self.bodies), seconds), self.bodies
            return self.bodies

    def clear(self) -> None:
        with self._news:
            self.raw.clear()
            self.headers.clear()

    async def receive(self, request: Request) -> Response:
        raw = await request.body()
        with self._news:
            self.raw.append(raw)
            self.headers.append(dict(request.headers))
            self._news.notify_all()
            status = self.failures.pop(0) if self.failures else 200
        return PlainTextResponse("ok", status_code=status)


@contextmanager
def a_hook() -> Iterator[Hook]:
    its = Hook()
    with serve(Starlette(routes=[Route("/hook", its.receive, methods=["POST"])])) as address:
        its.url = f"{address}/hook?token=w-1"
        yield its
