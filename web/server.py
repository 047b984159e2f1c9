"""uvicorn with httptools, and an end for clients that say nothing, drip, or never stop talking.

ASGI sees a request only when its headers are complete, so what comes before is watched here, on the connection
(security-reliability.md W5-W7). httptools itself refuses ambiguous lengths (W8).
"""

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from web.limits import Quota

_HEADER_SECONDS = 10.0
_HEADER_BYTES = 64 * 1024
_HEADER_FIELDS = 200
_UNREAD_SECONDS = 60.0  # that an answer may wait for its reader to take any more of it
_GRACE = 20  # seconds for requests in flight at SIGTERM; hosts kill after 25 to 30
_oddities = Quota(per_second=10)


class GuardedProtocol(HttpToolsProtocol):
    """Ends a connection whose next request does not take shape, in time or in size.

    Requests that came before it on the same connection are answered first, and none of them gets its bytes.
    """

    _deadline: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _idle_bytes = 0  # received since the last headers or body byte: an endless line, trailer or chunk size counts
    _field_bytes = 0
    _in_body = False
    _deaf = False  # whatever comes is ignored: what is in flight is answered, then the connection ends

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn declares it
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        self._was_read()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:  # not closed but cut: a close would wait for the reader as well
            self._unread = self.loop.call_later(_UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._was_read()
        super().resume_writing()

    def _was_read(self) -> None:
        if self._unread:
            self._unread.cancel()
            self._unread = None

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if self._deadline is None and self.cycle is not None and self.cycle.response_complete:
            # It cancels uvicorn's keep-alive timer, even if it is an empty line or a body nobody waits for.
            self._expect_headers()
        self._idle_bytes += len(data)
        super().data_received(data)
        if self._idle_bytes > _HEADER_BYTES:
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
        self._idle_bytes = 0
        if self._understands():
            self._in_body = True
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._idle_bytes = 0
        if self._understands():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._idle_bytes = 0
        if self._understands():
            self._in_body = False
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(b"400 Bad Request")

    def _unsupported_upgrade_warning(self) -> None:
        # The request is answered as if it had not asked. Its parser has given up on the rest, which may be a body.
        self._deaf = True
        self.cycle.keep_alive = False

    def _understands(self) -> bool:
        return not self._deaf and not self.transport.is_closing()

    def _expect_headers(self) -> None:
        self._cancel()
        self._idle_bytes = self._field_bytes = 0
        self._deadline = self.loop.call_later(_HEADER_SECONDS, self._refuse, b"408 Request Timeout")

    def _cancel(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: bytes) -> None:
        self._cancel()
        if not self._understands():
            return
        self._deaf = True
        if self.cycle is not None and not self.cycle.response_complete and not self._in_body:
            self.cycle.keep_alive = False  # an earlier request in this row: its answer comes first, and ends it
            return
        self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        self.transport.close()


class Server(uvicorn.Server):
    """Ends with status 0 on SIGTERM: uvicorn raises the signal again after a clean stop, which reads like a crash."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        try:
            yield
        finally:
            # Ignored from here on: the process ends now, and a late signal would make that look like a crash.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self.should_exit = True  # a second signal changes nothing (D9)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    # Anybody can cause uvicorn's warnings, by sending what is not HTTP.
    return record.levelno != logging.WARNING or _oddities.allows()


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
        proxy_headers=False,
        date_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_GRACE,
        backlog=2048,
    )
    logging.getLogger("uvicorn.error").addFilter(_is_worth_a_line)
    Server(config).run()
