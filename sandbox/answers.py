"""How Graph and its media host take requests and answer them, well or, when a fault says so, badly.

It needs `Protocol` on the connection, which can end one without an answer.
"""

import asyncio
import gzip
import os
import socket
import struct
from typing import NamedTuple
from typing import Protocol as Interface

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sandbox.faults import AnyFault
from sandbox.graph_errors import GraphError, refusal

HUGE = 2 * 2**20  # bytes of an answer nobody should read to its end
_CONNECTION = "sandbox.connection"
_NOT_JSON = b'{"messaging_product":"whatsapp","contacts":[{"inp'
_HTML = b"<!DOCTYPE html><html><head><title>Error</title></head><body>Sorry, something went wrong.</body></html>"
_JSON_TYPE = (b"content-type", b"application/json; charset=UTF-8")
_HTML_TYPE = (b"content-type", b"text/html; charset=utf-8")


class Protocol(HttpToolsProtocol):
    """uvicorn's, with a way to end the connection under a request: the request finds it in its scope."""

    held = False  # a fault keeps the request waiting, so a shutdown need not

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {_CONNECTION: self}  # type: ignore[dict-item] # ours, not one of ASGI's

    def is_gone(self) -> bool:
        return self.transport.is_closing()

    def close(self) -> None:
        """End it once all that was written is sent."""
        self.transport.close()

    def reset(self) -> None:
        """End it with a TCP RST: what was written but not sent yet is lost."""
        # Through a descriptor of our own, since uvloop does not hand out one that can be set.
        with socket.socket(fileno=os.dup(self.transport.get_extra_info("socket").fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    async def write(self, data: bytes) -> None:
        """These bytes, whatever the headers have promised."""
        if self.flow.write_paused:
            await self.flow.drain()
        if not self.is_gone():
            self.transport.write(data)

    def shutdown(self) -> None:
        if self.held:
            self.transport.abort()
        else:
            super().shutdown()


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = (_JSON_TYPE,)


class Record(Interface):
    """What a journal wants to know: the status line sent, and whether the whole answer found the client there."""

    http: int | None
    answered: bool


NOTHING = Answer(200)
NO_TOKEN = refusal(190, title="An access token is required to request this resource.")


def refused(error: GraphError, retry_after: int | None = None) -> Answer:
    return _with_retry_after(Answer(error.http, error.json()), retry_after)


def spoilt(kind: str, fault: AnyFault, answer: Answer) -> Answer:
    """What comes instead of this answer, for kinds whose answer comes in one piece."""
    match kind:
        case "garbage" | "garbage_before" | "garbage_after":
            return Answer(200, _NOT_JSON)
        case "html" | "html_after" | "outage":
            status = fault.http or (503 if kind == "outage" else 502)
            return _with_retry_after(Answer(status, _HTML, (_HTML_TYPE,)), fault.retry_after)
        case "status":
            return _with_retry_after(Answer(fault.http or 500, headers=()), fault.retry_after)
        case "redirect":
            return Answer(302, headers=((b"location", (fault.location or "/moved").encode()),))
        case "empty":
            return Answer(200)
        case "huge":
            return answer._replace(body=answer.body[:-1] + b',"padding":"' + b"x" * HUGE + b'"}')
        case "gzip":
            headers = (*answer.headers, (b"content-encoding", b"gzip"))
            return answer._replace(body=gzip.compress(answer.body), headers=headers)
    return answer


class Exchange(NamedTuple):
    """One request and the way back."""

    scope: Scope
    receive: Receive
    send: Send

    @property
    def connection(self) -> Protocol:
        connection: Protocol = self.scope["extensions"][_CONNECTION]
        return connection

    @property
    def token(self) -> str | None:
        scheme, _, token = self.header(b"authorization").partition(" ")
        return token.strip() if scheme.lower() == "bearer" else None

    def header(self, name: bytes) -> str:
        for its_name, value in self.scope["headers"]:
            if its_name == name:
                found: str = value.decode("latin-1")
                return found
        return ""

    @property
    def query(self) -> str:
        query: str = self.scope["query_string"].decode("latin-1")
        return query

    @property
    def address(self) -> str:
        """This server's, as the client wrote it."""
        return f"{self.scope['scheme']}://{self.header(b'host')}"

    async def read(self, most: int) -> bytes | bytearray | None:
        """The body, at most a little over `most` bytes of it; None when the client left."""
        body = bytearray()
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                return None
            if len(body) <= most:
                body += message["body"]
            if not message["more_body"]:
                return body

    async def left(self) -> None:
        """Wait until the client leaves, or the connection has ended; its request was read to the end."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def leaves(self, seconds: float | None) -> bool:
        """Keep the client waiting so long, or as long as it likes; true when it leaves."""
        self.connection.held = True
        try:
            async with asyncio.timeout(seconds):
                await self.left()
        except TimeoutError:
            return False
        finally:
            self.connection.held = False
        return True

    async def write(self, answer: Answer) -> None:
        await self.start(answer.status, _with_length(answer))
        await self.send({"type": "http.response.body", "body": answer.body})

    async def start(self, status: int, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        await self.send({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def more(self, body: bytes, *, is_last: bool = False) -> None:
        await self.send({"type": "http.response.body", "body": body, "more_body": not is_last})

    async def deliver(self, answer: Answer, fault: AnyFault | None, kind: str, record: Record) -> None:
        """Answer, or do what a fault of this kind does instead; the record learns what was sent."""
        if fault is not None:
            if kind.startswith("hang"):
                await self.leaves(None)
                return
            if kind.startswith("reset"):
                self.connection.reset()
                await self.left()
                return
            if kind == "drip":
                record.http = answer.status
                record.answered = await self._drip(answer, fault.ms / 1000)
                return
            answer = spoilt(kind, fault, answer)
        if not self.connection.is_gone():
            record.http = answer.status
            await self.write(answer)
            record.answered = True

    async def _drip(self, answer: Answer, every: float) -> bool:
        """One byte at a time; false when the client leaves before the last."""
        await self.start(answer.status, _with_length(answer))
        last = len(answer.body) - 1
        for i in range(last + 1):
            if await self.leaves(every):
                return False
            await self.more(answer.body[i : i + 1], is_last=i == last)
        return True


def _with_length(answer: Answer) -> tuple[tuple[bytes, bytes], ...]:
    return *answer.headers, (b"content-length", str(len(answer.body)).encode())


def _with_retry_after(answer: Answer, seconds: int | None) -> Answer:
    if seconds is None:
        return answer
    return answer._replace(headers=(*answer.headers, (b"retry-after", str(seconds).encode())))
