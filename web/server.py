"""uvicorn with httptools, and an end for clients that say nothing, drip, or never stop talking.

ASGI sees a request only when its headers are complete, so what comes before is watched here, on the connection
(security-reliability.md W5-W7). httptools itself refuses ambiguous lengths (W8).
"""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_HEADER_SECONDS = 10.0
_HEADER_BYTES = 64 * 1024
_HEADER_FIELDS = 200
_GRACE = 20  # seconds for requests in flight at SIGTERM; hosts kill after 25 to 30


class GuardedProtocol(HttpToolsProtocol):
    """Closes a connection whose request headers do not come to an end, in time or in size."""

    _deadline: asyncio.TimerHandle | None = None
    _header_bytes = 0  # received while headers are incomplete: one endless line counts too
    _field_bytes = 0
    _in_headers = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn declares it
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_headers and self._header_bytes > _HEADER_BYTES:
            self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._field_bytes += len(name) + len(value)
        if len(self.headers) > _HEADER_FIELDS or self._field_bytes > _HEADER_BYTES:
            self._refuse(b"431 Request Header Fields Too Large")

    def on_headers_complete(self) -> None:
        self._cancel()
        self._in_headers = False
        if not self.transport.is_closing():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle is not None:  # None: its headers were refused
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.cycle is not None:
            super().on_message_complete()

    def _expect_headers(self) -> None:
        self._cancel()
        self._in_headers, self._header_bytes, self._field_bytes = True, 0, 0
        self._deadline = self.loop.call_later(_HEADER_SECONDS, self._refuse, b"408 Request Timeout")

    def _cancel(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: bytes) -> None:
        self._cancel()
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()


class Server(uvicorn.Server):
    """Ends with status 0 on SIGTERM: uvicorn raises the signal again after a clean stop, which reads like a crash."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self._stop) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self.should_exit = True  # a second signal changes nothing (D9)


def serve(app: Any, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight get 20 seconds."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=GuardedProtocol,
        ws="none",
        lifespan="on",
        access_log=False,  # the webhook's own line says more, and no URL with a token in it
        log_config=None,
        server_header=False,
        date_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_GRACE,
        backlog=2048,
    )
    Server(config).run()
