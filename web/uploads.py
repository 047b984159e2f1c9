"""Customers upload a file that messages will send: checked as the provider would, and stored once per tenant.

The body is the file. It goes to the storage's spool as it comes, and gets its final name and its rows only when it is
whole and good: whatever ends before leaves nothing behind (security-reliability.md M10).
"""

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import and_, func, update
from sqlalchemy.dialects.postgresql import insert
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from models import File, Media, MediaState
from pombal import db, log, metrics
from pombal.ids import uuid7
from pombal.settings import settings
from providers.sniff import extension
from providers.storage import key_of, storage
from web.accepted import CONTAINERS, MOST_BYTES, Checked, KiB
from web.errors import Failure
from web.media import Seats, in_storage
from web.messages import in_time, proven
from web.outbox import PATIENCE

_log = log.get()

_PIECE = 256 * KiB  # handed to a thread at once
_STALLED = 10.0  # seconds without a byte
_SECONDS, _RATE = 60.0, 64 * KiB  # for the whole body, and by how many bytes per second it may take longer
_LONGEST_NAME = 1_000

_seats = Seats(8, 4)
_writers = ThreadPoolExecutor(8, thread_name_prefix="uploads")  # one for each seat


async def upload(request: Request) -> Response:
    """201 with the id by which messages name it, once it is stored and committed."""
    who, patience = await proven(request, "messages:send")  # before a byte of the body is read
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Failure(415, "INVALID_PAYLOAD", "content encodings are not supported", close=True)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MOST_BYTES:
        raise _too_large()
    with _seats.taken(who.tenant_id):
        await in_time(lambda: asyncio.to_thread(_check_quota, who.tenant_id), patience)
        async with _opened() as spooled:
            checked = await _read(request, spooled)
            return await _stored(request, who.tenant_id, spooled, checked)


async def _read(request: Request, spooled: "Spooled") -> Checked:
    checked = Checked(request.headers.get("content-type"))
    async for piece in _pieces(request):
        # The connection stays open after a refusal: the server swallows the rest for some seconds, because a sender
        # that is cut off in the middle may never read the answer.
        checked.see(piece.data, is_last=piece.is_last)
        await in_storage(_writers, partial(spooled.write, piece.data))
    return checked


async def _stored(request: Request, tenant_id: UUID, spooled: "Spooled", checked: Checked) -> Response:
    digest, type_ = spooled.digest(), checked.mime_type
    file = {"tenant_id": tenant_id, "digest": digest, "bytes": checked.size}
    known = await in_time(lambda: asyncio.to_thread(_known, file), PATIENCE)
    if known is not None and known.mime_type not in CONTAINERS:
        type_ = known.mime_type  # what was found out the first time
    key = known.key if known else key_of(tenant_id, digest, extension(type_))
    await in_storage(_writers, lambda: spooled.keep(key))
    media = {"tenant_id": tenant_id, "id": uuid7(), "kind": checked.kind, "mime_type": type_, "digest": digest}
    media["filename"] = _name(request)
    await in_time(lambda: asyncio.to_thread(_note, {**file, "key": key, "mime_type": type_}, media), PATIENCE)
    metrics.media_bytes.labels(outcome="known" if known else "uploaded").inc(checked.size)
    shown = {"kind": checked.kind, "mime_type": type_, "bytes": checked.size}
    _log.info(
        "media_uploaded",
        media_id=str(media["id"]),
        tenant_id=str(tenant_id),
        **shown,
        is_new=known is None,
        request_id=request.scope["request_id"],
    )
    shown = {"media_id": str(media["id"]), **shown, "sha256": digest.hex()}
    return JSONResponse(shown, status_code=201, headers={"Location": f"/api/v1/media/{media['id']}"})


def _name(request: Request) -> str | None:
    """The file's own name: only data, but the database takes no NUL."""
    return request.query_params.get("filename", "").replace("\0", "")[:_LONGEST_NAME] or None


def _too_large() -> Failure:
    return Failure(413, "PAYLOAD_TOO_LARGE", f"at most {MOST_BYTES} bytes", details={"limit": MOST_BYTES}, close=True)


# ------------------------------------------------------------------------------------------------------------ the body


class Piece(NamedTuple):
    data: bytes
    is_last: bool


async def _pieces(request: Request) -> AsyncIterator[Piece]:
    """The body in pieces worth a thread's while. 413 at the first byte too many; 408 when it comes too slowly.

    Only what is spent waiting for the sender counts. Its key is known by now: bodies of strangers have ten seconds.
    """
    loop = asyncio.get_running_loop()
    body, pending, size, waited = request.stream(), bytearray(), 0, 0.0
    while True:
        began = loop.time()
        left = _SECONDS + size / _RATE - waited
        try:
            async with asyncio.timeout(max(0.0, min(_STALLED, left))):
                chunk = await anext(body)  # an empty one ends it
        except TimeoutError:
            raise Failure(408, "INVALID_PAYLOAD", "the body took too long", close=True) from None
        waited += loop.time() - began
        size += len(chunk)
        if size > MOST_BYTES:
            raise _too_large()
        pending += chunk
        if len(pending) >= _PIECE or not chunk:
            yield Piece(bytes(pending), not chunk)
            pending.clear()
        if not chunk:
            return


# ----------------------------------------------------------------------------------------------------------- the spool


@contextlib.asynccontextmanager
async def _opened() -> AsyncIterator["Spooled"]:
    spooled = await in_storage(_writers, Spooled)
    try:
        yield spooled
    finally:
        await in_storage(_writers, spooled.close)


class Spooled:
    """What has come so far, on the disk. For threads, one at a time: the last piece may still be on its way when its
    request is cut off."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hash = hashlib.sha256()
        self._spool = storage().spool()

    def write(self, piece: bytes) -> None:
        with self._lock:
            self._spool.write(piece)
            self._hash.update(piece)

    def digest(self) -> bytes:
        """The SHA-256 of all of it."""
        return self._hash.digest()

    def keep(self, key: str) -> None:
        """Give it its final name, unless the storage has this file."""
        with self._lock:
            storage().keep(self._spool, key)

    def close(self) -> None:
        with self._lock:
            self._spool.close()


# ---------------------------------------------------------------------------------------------------------------- rows


def _check_quota(tenant_id: UUID, more: int = 1) -> None:
    """Whether a tenant may store so many bytes more. Several uploads at once may exceed it by as much as they are."""
    quota = settings().media_quota
    if not quota:
        return
    with db.session([tenant_id]) as s:
        if File.total(s, tenant_id) + more > quota:
            details = {"reason": "quota_reached", "limit": quota}
            raise Failure(409, "CONFLICT", "the tenant's files have as many bytes as they may", details=details)


def _known(file: dict[str, Any]) -> File | None:
    """The same content, if the tenant has stored it before; else there must be room for it."""
    with db.session([file["tenant_id"]]) as s:
        known = s.get(File, (file["tenant_id"], file["digest"]))
    if known is None:
        _check_quota(file["tenant_id"], file["bytes"])
    return known


def _note(file: dict[str, Any], media: dict[str, Any]) -> None:
    """Both rows in one commit. Safe to repeat."""
    now = {"state": MediaState.STORED, "deadline": func.now(), "ended_at": func.now()}
    is_it = and_(File.tenant_id == file["tenant_id"], File.digest == file["digest"])
    with db.session([file["tenant_id"]]) as s:
        File.keep(s, file)
        # One that came in as an archive of some kind is known better now.
        s.execute(update(File).where(is_it, File.mime_type.in_(CONTAINERS)).values(mime_type=file["mime_type"]))
        s.execute(insert(Media).values(**media, **now).on_conflict_do_nothing())
