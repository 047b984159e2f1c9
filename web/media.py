"""Customers read a stored file back, whole or in part; 404 for a foreign one and a missing one alike.

What is served was written by strangers: its type is that of its bytes, nothing of it may run in a browser, and its name
is made harmless (`web/disposition.py`; security-reliability.md M7, M8).
"""

import asyncio
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import NamedTuple, TypeVar
from uuid import UUID

from sqlalchemy import and_, func, select
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from models import File, Media, MediaState
from pombal import db, log, metrics
from providers.sniff import extension
from providers.storage import Missing, StorageUnavailable, storage
from web import errors
from web.disposition import disposition
from web.errors import Failure
from web.limits import Quota
from web.messages import in_time, proven
from web.signatures import refused

_log = log.get()
T = TypeVar("T")
_troubles = Quota(per_second=5)
_RANGE = re.compile(r"bytes=[ \t]*([0-9]{0,99})-([0-9]{0,99})[ \t]*", re.IGNORECASE)
_LONGEST_WAIT = timedelta(hours=1)  # to name, until somebody asks again
_FETCHING = 5  # seconds; a file that is being fetched may be there very soon
_SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cache-Control": "private, max-age=31536000, immutable",  # another content would have another id
    "Accept-Ranges": "bytes",
}


class Seats:
    """So many transfers at a time, and so many of one tenant. For one event loop, so without a lock."""

    def __init__(self, most: int, most_of_one: int) -> None:
        self._most, self._most_of_one = most, most_of_one
        self._taken: Counter[UUID] = Counter()

    @contextmanager
    def taken(self, tenant_id: UUID) -> Iterator[None]:
        """A seat for the time of a block. Raises 429 when the tenant has as many as it may, 503 when none is left."""
        if self._taken[tenant_id] >= self._most_of_one:
            raise Failure(429, "RATE_LIMITED", "too many files at once", retry_after=5, close=True)
        if self._taken.total() >= self._most:
            raise Failure(503, "UNAVAILABLE", "too many files at once", retry_after=5, close=True)
        self._taken[tenant_id] += 1
        try:
            yield
        finally:
            self._taken[tenant_id] -= 1
            self._taken += Counter()  # forgets who has none


# Each costs some 600 KiB and a handful of descriptors. No thread: that is taken for one piece at a time.
_seats = Seats(64, 32)
_readers = ThreadPoolExecutor(8, thread_name_prefix="media")  # its own: a slow storage holds nobody else up


async def media(request: Request) -> Response:
    """The bytes of one file. 409 for one that is not there yet, or will never be; `details` says which and why."""
    who, patience = await proven(request, "messages:read")
    id_ = _id(request)
    row = await in_time(lambda: asyncio.to_thread(_found, who.tenant_id, id_), patience) if id_ else None
    if row is None or id_ is None:
        refused(request, "unknown_id", tenant_id=str(who.tenant_id), key_id=str(who.key.id))
        raise _no_such()
    if row.state != MediaState.STORED:
        raise _not_there(row)
    kept = Kept(who.tenant_id, id_, row)
    if row.digest is None:
        raise kept.missing()
    headers = {
        **_SAFE,
        "ETag": f'"{row.digest.hex()}"',
        "Content-Type": row.mime_type,
        "Content-Disposition": disposition(row.filename or row.kind, row.mime_type, extension(row.mime_type)),
    }
    if _is_known(request, headers["ETag"]):
        del headers["Content-Type"], headers["Content-Disposition"]
        return Response(status_code=304, headers=headers)
    part = _wanted(request, row.bytes, headers["ETag"])
    if part is None:
        return _no_such_part(request, row.bytes)
    if part.is_asked_for:
        headers["Content-Range"] = f"bytes {part.start}-{part.end - 1}/{row.bytes}"
    headers["Content-Length"] = str(part.end - part.start)
    if request.method != "HEAD":
        return Stream(kept, part, headers)
    if await in_storage(_readers, lambda: storage().size(row.key)) is None:
        raise kept.missing()
    return Response(headers=headers)


class Row(NamedTuple):
    """A file as the database knows it; `digest`, `key`, `bytes` and `mime_type` only of a stored one."""

    state: str
    kind: str
    filename: str | None
    error_code: str | None
    error: str | None
    wait: timedelta | None  # until it is due; None while it is being fetched
    next_attempt_at: datetime
    digest: bytes | None = None
    key: str = ""
    bytes: int = 0
    mime_type: str = ""


def _found(tenant_id: UUID, id_: UUID) -> Row | None:
    is_of_it = and_(File.tenant_id == Media.tenant_id, File.digest == Media.digest)
    query = (
        select(Media, File, func.now()).outerjoin(File, is_of_it).where(Media.tenant_id == tenant_id, Media.id == id_)
    )
    with db.session([tenant_id]) as s:
        found = s.execute(query).first()
    if found is None:
        return None
    row, file, now = found
    wait = row.next_attempt_at - now
    is_fetched = row.claim_token is not None and wait > timedelta(0)
    stored = (file.digest, file.key, file.bytes, file.mime_type) if file else ()
    ended = (row.state, row.kind, row.filename, row.error_code, row.error)
    return Row(*ended, None if is_fetched else wait, row.next_attempt_at, *stored)


class Kept(NamedTuple):
    """A stored file, and whose it is."""

    tenant_id: UUID
    id: UUID
    row: Row

    def missing(self) -> Failure:
        """The answer when the storage does not have what the database says; somebody should know."""
        if _troubles.allows():
            _log.error("media_missing", media_id=str(self.id), tenant_id=str(self.tenant_id))
        metrics.media_faults.labels("storage", "not_found").inc()
        return _no_such()


def _no_such() -> Failure:
    return Failure(404, "NOT_FOUND", "no such file")


def _not_there(row: Row) -> Failure:
    if row.state == MediaState.FAILED:
        details = {"state": row.state, "error_code": row.error_code, "error": row.error}
        return Failure(409, "CONFLICT", "this file could not be fetched", details=details)
    at = row.next_attempt_at.isoformat() if row.wait is not None else None
    seconds = _FETCHING if row.wait is None else math.ceil(min(row.wait, _LONGEST_WAIT).total_seconds()) + 1
    details = {"state": row.state, "error_code": row.error_code, "next_attempt_at": at}
    return Failure(409, "CONFLICT", "this file is not fetched yet", details=details, retry_after=max(1, seconds))


def _id(request: Request) -> UUID | None:
    try:
        return UUID(request.path_params["id"])
    except ValueError:
        return None


# ----------------------------------------------------------------------------------------------------- which part of it


def _is_known(request: Request, etag: str) -> bool:
    """Whether the caller has it already (RFC 9110 §13.1.2)."""
    given = ",".join(request.headers.getlist("if-none-match"))
    return any(one.strip().removeprefix("W/") in (etag, "*") for one in given.split(","))


class Part(NamedTuple):
    """From which byte up to which; `is_asked_for` unless it is the whole because nobody asked for less."""

    start: int
    end: int
    is_asked_for: bool = True


def _wanted(request: Request, size: int, etag: str) -> Part | None:
    """None for a part that lies behind the end. What is not one good range is none at all, and the whole file is the
    answer (RFC 9110 §14.2)."""
    whole = Part(0, size, is_asked_for=False)
    given, condition = request.headers.getlist("range"), request.headers.getlist("if-range")
    match = _RANGE.fullmatch(given[0]) if len(given) == 1 else None
    if request.method != "GET" or match is None or (condition and condition != [etag]):
        return whole
    first, last = (int(number) if number else None for number in match.groups())
    if first is None:
        if last is None:
            return whole
        return Part(max(0, size - last), size) if last and size else None
    if last is not None and last < first:
        return whole
    return Part(first, size if last is None else min(size, last + 1)) if first < size else None


def _no_such_part(request: Request, size: int) -> Response:
    details = {"field": "Range", "limit": size}
    headers = {"Content-Range": f"bytes */{size}", "Accept-Ranges": "bytes"}
    return errors.answer(request, 416, "INVALID_PAYLOAD", "the file has fewer bytes", headers, details)


# --------------------------------------------------------------------------------------------------------- its bytes


async def in_storage(pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    """What the storage says, asked in a thread. Raises 503 when it is away, and `Missing`."""
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, work)
    except StorageUnavailable as error:
        if _troubles.allows():
            _log.error("media_storage_unavailable", why=error.why)
        metrics.media_faults.labels("storage", "storage_unavailable").inc()
        raise Failure(503, "UNAVAILABLE", "the storage is away", retry_after=5, close=True) from None


class Reading:
    """A file that is being read, piece by piece in a thread of a pool. One at a time: a caller who has left closes it
    while the last piece may still be on its way."""

    def __init__(self, key: str, start: int, end: int) -> None:
        self._lock = threading.Lock()
        self._chunks = storage().read(key, start, end)

    def next(self) -> bytes:
        """The next piece; empty at the end."""
        with self._lock:
            return next(self._chunks, b"")

    def close(self) -> None:
        with self._lock:
            self._chunks.close()


class Stream(Response):
    """The answer that carries the file. It begins once the first piece is read: until then it can say what is wrong."""

    def __init__(self, kept: Kept, part: Part, headers: dict[str, str]) -> None:
        super().__init__(status_code=206 if part.is_asked_for else 200, headers=headers)
        self._kept, self._start, self._end = kept, part.start, part.end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with _seats.taken(self._kept.tenant_id):
            try:
                reading = await in_storage(_readers, lambda: Reading(self._kept.row.key, self._start, self._end))
            except Missing:
                raise self._kept.missing() from None
            try:
                await self._send(reading, receive, send)
            except Missing:  # a bucket says so with the first piece, before anything was sent
                raise self._kept.missing() from None
            finally:
                await in_storage(_readers, reading.close)

    async def _send(self, reading: Reading, receive: Receive, send: Send) -> None:
        piece = await in_storage(_readers, reading.next)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        gone = asyncio.create_task(_left(receive))
        sent = 0
        try:
            while piece and not gone.done():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                sent += len(piece)
                piece = await in_storage(_readers, reading.next)
        except (Failure, Missing):
            pass  # too late to say so: it is a file that ends too early
        finally:
            gone.cancel()
            metrics.media_bytes.labels(outcome="served").inc(sent)
        if sent == self._end - self._start:
            await send({"type": "http.response.body"})
        elif not gone.done() and _troubles.allows():
            _log.error("media_cut_short", media_id=str(self._kept.id), tenant_id=str(self._kept.tenant_id))


async def _left(receive: Receive) -> None:
    """Returns when the caller has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
