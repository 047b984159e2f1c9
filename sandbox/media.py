"""Meta's files (whatsapp-cloud-api.md §12): where one is, its bytes, and files handed in for sending.

Graph tells of an id the URL, type, size and SHA-256 (in hex); the URL leads to the media host, which is this server
below PREFIX, and is good for a while only. Any id that `sandbox.meta.media_id` makes has a file, made from the id;
files of one's own are added with `add`, and uploads are kept until they run out. A journal has every request.
"""

import itertools
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import SystemRandom
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlencode
from zlib import compressobj

import msgspec

from sandbox import files, meta
from sandbox.answers import NO_TOKEN, NOTHING, Answer, Exchange, refused
from sandbox.config import App, Channel
from sandbox.faults import Faults, Met, SetFault
from sandbox.files import Content
from sandbox.graph_errors import GraphError, no_such_object, refusal
from sandbox.media_journal import Event, MediaJournal
from sandbox.meta import JSON, MediaHost
from sandbox.multipart import Part, parts
from sandbox.rules import RuleBook

PREFIX = "/media/"
ELSEWHERE = f"{PREFIX}elsewhere/"  # like every path below PREFIX but one, a place where no token should arrive
MAX_UPLOAD = 101 * 2**20  # bytes of a body
MAX_TOLD = 250_000  # files in webhooks of which the channel is remembered
_ATTACHMENTS = PREFIX.rstrip("/") + meta.ATTACHMENTS

MB = 2**20
_OFFICE = "application/vnd.openxmlformats-officedocument."
_KINDS: dict[str, tuple[str, ...]] = {
    "audio": ("audio/aac", "audio/amr", "audio/mpeg", "audio/mp4", "audio/ogg"),
    "document": (
        "text/plain",
        "application/pdf",
        "application/msword",
        "application/vnd.ms-excel",
        "application/vnd.ms-powerpoint",
        f"{_OFFICE}wordprocessingml.document",
        f"{_OFFICE}spreadsheetml.sheet",
        f"{_OFFICE}presentationml.presentation",
    ),
    "image": ("image/jpeg", "image/png"),
    "sticker": ("image/webp",),
    "video": ("video/mp4", "video/3gpp"),
}
_KIND = {mime_type: kind for kind, its_types in _KINDS.items() for mime_type in its_types}
_MOST = {"audio": 16 * MB, "document": 100 * MB, "image": 5 * MB, "video": 16 * MB}


class Item(NamedTuple):
    """A file that can be had.

    owner    the phone_number_id that got it or handed it in; None when any may have
    expires  unix seconds at which its id runs out
    """

    id: str
    content: Content
    mime_type: str
    owner: str | None
    expires: float
    filename: str | None = None

    def shown(self) -> JSON:
        return {
            "id": self.id,
            "mime_type": self.mime_type,
            "sha256": self.content.digest.hex(),
            "file_size": self.content.size,
            "phone_number_id": self.owner,
            "filename": self.filename,
            "expires": self.expires,
        }


class _Told(NamedTuple):
    """What is known of a file from the webhook in which it was."""

    owner: str
    at: float
    size: int | None


class _Request(NamedTuple):
    """One that would be served, but for a fault."""

    exchange: Exchange
    event: Event
    item: Item

    def to_other_name(self) -> str:
        """The file at another name of this server, where it is had without a token."""
        address = self.exchange.address
        other = address.replace("127.0.0.1", "localhost", 1)
        if other == address:
            other = address.replace("localhost", "127.0.0.1", 1)
        return f"{other}{ELSEWHERE}?{urlencode({'mid': self.item.id})}"


class Media:
    """The files of all channels; `channels` gives those by phone_number_id."""

    def __init__(
        self, rules: RuleBook, faults: Faults, channels: Callable[[], Mapping[str, tuple[App, Channel]]]
    ) -> None:
        self.journal = MediaJournal()
        self._rules = rules
        self._faults = faults
        self._channels = channels
        self._rng = SystemRandom()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._told: dict[str, _Told] = {}
        self._own: dict[str, Item] = {}
        self._uploads: dict[str, Item] = {}
        self._deleted: set[str] = set()

    def close(self) -> None:
        """Remove what was uploaded."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    # For the control port

    def host_for(self, channel: Channel, address: str) -> MediaHost:
        """The media host that this channel's next webhooks shall name; `address` is this server's."""
        rules = self._rules.of(channel.name)
        return MediaHost(address + PREFIX.rstrip("/"), rules.url_seconds, rules.media_bytes)

    def told(self, media_id: str, owner: str, at: float, size: int | None) -> None:
        """A webhook for this phone_number_id names a file that is made from its id, of this size."""
        self._told.pop(media_id, None)
        self._told[media_id] = _Told(owner, at, size)
        if len(self._told) > MAX_TOLD:
            del self._told[next(iter(self._told))]

    def add(
        self, id: str | None, content: Content, mime_type: str, owner: Channel | None, filename: str | None
    ) -> Item:
        """A file of one's own; one with the same id is replaced."""
        id = id or str(920_000_000_000_000 + self._rng.randrange(10**13))
        lifetime = self._rules.of(owner.name if owner else "").media_seconds
        number = owner.phone_number_id if owner else None
        item = Item(id, content, mime_type, number, time.time() + lifetime, filename)
        self._own[id] = item
        self._deleted.discard(id)
        return item

    def webhook_object(self, item: Item, address: str) -> JSON:
        """What a webhook says of it from now on: the `object` of an image, a document, and so on."""
        channel = self._channels().get(item.owner or "")
        seconds = self._rules.of(channel[1].name if channel else "").url_seconds
        said = meta.media_object(item.id, item.content, time.time(), MediaHost(address + PREFIX.rstrip("/"), seconds))
        return said | {"mime_type": item.mime_type} | ({"filename": item.filename} if item.filename else {})

    def listed(self) -> list[JSON]:
        """The files of one's own, then the uploads, each with how often it was asked for and had."""
        items = itertools.chain(self._own.values(), self._uploads.values())
        return [{**item.shown(), **self.journal.counts_of(item.id)} for item in items]

    def clear(self) -> None:
        """Forget the files of one's own, the uploads, and what was deleted."""
        self.close()
        self._own.clear()
        self._uploads.clear()
        self._deleted.clear()

    def wrong_in(self, body: JSON, channel: Channel) -> GraphError | None:
        """What is wrong with the file that a well-shaped message names by its id."""
        kind = body.get("type", "text")
        id = body[kind].get("id") if kind in meta.MEDIA_TYPES else None
        if id is None:
            return None
        upload = self._uploads.get(id)
        if upload is None or upload.owner != channel.phone_number_id or upload.expires <= time.time():
            return refusal(
                100, title=f"Param {kind}['id'] is not a valid whatsapp business account media attachment ID"
            )
        if _KIND[_bare(upload.mime_type)] != kind:
            return refusal(131053, f"A file of type {upload.mime_type} cannot be sent as {kind}")
        return None

    # Graph

    async def resolve(self, id: str, exchange: Exchange) -> None:
        """`GET /{media_id}?phone_number_id=…`: where the file is, and what."""
        with self._begun("resolve", id, exchange) as event:
            found = self._asked_for(id, exchange)
            if isinstance(found, GraphError):
                event.code = found.code
                await exchange.deliver(refused(found), None, "", event)
                return
            number = _only(exchange, "phone_number_id")
            if found.owner is None and number and id not in self._own:
                # It was in a webhook that this sandbox did not send, so whoever asks first is who got it.
                self.told(id, number, time.time(), None)
            event.channel = self._name(found.owner or number)
            met = self._meet(event)
            answer = self._whereabouts(_Request(exchange, event, found), met.fault)
            if met.latency and await exchange.leaves(met.latency):
                return
            await exchange.deliver(answer, met.fault, _bare_kind(met.fault), event)

    async def delete(self, id: str, exchange: Exchange) -> None:
        """`DELETE /{media_id}?phone_number_id=…`: the id is gone at once."""
        with self._begun("delete", id, exchange) as event:
            found = self._asked_for(id, exchange)
            if isinstance(found, GraphError):
                event.code = found.code
                await exchange.deliver(refused(found), None, "", event)
                return
            self._deleted.add(id)
            self._own.pop(id, None)
            upload = self._uploads.pop(id, None)
            if upload is not None and isinstance(upload.content, files.OnDisk):
                upload.content.path.unlink()
            await exchange.deliver(Answer(200, b'{"success":true}'), None, "", event)

    async def upload(self, id: str, exchange: Exchange) -> None:
        """`POST /{phone_number_id}/media`: a file to be sent later, good for this number only."""
        body = await exchange.read(MAX_UPLOAD)
        if body is None:
            return
        with self._begun("upload", None, exchange) as event:
            known = self._channels().get(id)
            event.channel = known[1].name if known else None
            given = self._wrong_sender(known, id, exchange) or _handed_in(body, exchange)
            met = Met(None, 0.0) if isinstance(given, GraphError) else self._meet(event)
            kind = _bare_kind(met.fault)
            if met.fault is not None and kind == "code":
                given = _as_set(met.fault)
            if isinstance(given, GraphError):
                event.code = given.code
                answer = refused(given, met.fault.retry_after if met.fault else None)
            else:
                answer = NOTHING if kind == "outage" else self._keep(id, given, event)
            if met.latency and await exchange.leaves(met.latency):
                return
            await exchange.deliver(answer, met.fault, kind, event)

    def _whereabouts(self, request: _Request, fault: SetFault | None) -> Answer:
        exchange, event, item = request
        kind = _bare_kind(fault)
        if fault is not None and kind in ("code", "gone"):
            error = no_such_object("get", item.id) if kind == "gone" else _as_set(fault)
            event.code = error.code
            return refused(error, fault.retry_after)
        now = time.time()
        rules = self._rules.of(event.channel or "")
        host = exchange.address + PREFIX.rstrip("/")
        seconds = 0 if kind == "expired" else rules.url_seconds
        told = meta.media_object(item.id, item.content, now, MediaHost(host, seconds))
        digest = item.content.digest
        if kind == "wrong_hash":
            digest = bytes([digest[0] ^ 1]) + digest[1:]
        url = told["url"]
        if fault is not None and kind == "elsewhere":
            url = fault.location or request.to_other_name()
        answer = {
            "messaging_product": "whatsapp",
            "url": url,
            "mime_type": "text/html" if kind == "wrong_type" else item.mime_type,
            "sha256": digest.hex(),
            "file_size": item.content.size + (kind == "wrong_size"),
            "id": item.id,
        }
        return Answer(200, msgspec.json.encode(answer))

    def _keep(self, owner: str, given: "_File", event: Event) -> Answer:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="sandbox-media-")
        id = str(10**15 + self._rng.randrange(10**15))
        content = files.written(Path(self._folder.name, id), given.part.data)
        lifetime = self._rules.of(event.channel or "").upload_seconds
        self._uploads[id] = Item(id, content, given.mime_type, owner, time.time() + lifetime, given.part.filename)
        event.id, event.bytes, event.whole = id, content.size, True
        event.mime_type, event.sha256 = given.mime_type, content.digest.hex()
        return Answer(200, msgspec.json.encode({"id": id}))

    # The media host

    async def host(self, exchange: Exchange) -> None:
        """A request for any path below PREFIX. Only one of them is Meta's; the others show who brings a token there."""
        id = _only(exchange, "mid")
        is_metas = exchange.scope["path"] == _ATTACHMENTS
        with self._begun("download" if is_metas else "elsewhere", id, exchange) as event:
            event.path = None if is_metas else exchange.scope["path"]
            item = self._item(id) if id else None
            event.channel = self._name(item.owner) if item else None
            status = self._wrong_download(item, exchange, is_metas=is_metas)
            if item is None or status != 200:
                await exchange.deliver(Answer(status, headers=()), None, "", event)
                return
            met = self._meet(event) if is_metas else Met(None, 0.0)
            if met.latency and await exchange.leaves(met.latency):
                return
            await self._download(_Request(exchange, event, item), met.fault)

    def _wrong_download(self, item: Item | None, exchange: Exchange, *, is_metas: bool) -> int:
        """The status to answer with; 200 when nothing is wrong."""
        if exchange.scope["method"] != "GET":
            return 405
        if not is_metas:
            return 200 if item else 404
        if not self._is_token_of(item.owner if item else None, exchange.token):
            return 401
        expires, proof = _only(exchange, "ext"), _only(exchange, "hash")
        if item is None or not secrets.compare_digest(proof.encode(), meta.media_hash(item.id, expires).encode()):
            return 404
        return 200 if int(expires) > time.time() else 404

    async def _download(self, request: _Request, fault: SetFault | None) -> None:
        kind = _bare_kind(fault)
        if fault is not None and kind in ("status", "html", "outage", "redirect", "hang"):
            if kind == "redirect" and fault.location is None:
                fault = msgspec.structs.replace(fault, location=request.to_other_name())
            await request.exchange.deliver(NOTHING, fault, kind, request.event)
            return
        connection = request.exchange.connection
        connection.held = fault is not None
        try:
            await _serve(request, fault, kind)
        finally:
            connection.held = False

    # What they share

    def _begun(self, kind: str, id: str | None, exchange: Exchange) -> Any:
        return self.journal.event(kind, id, has_token=bool(exchange.header(b"authorization")))

    def _meet(self, event: Event) -> Met:
        met = self._faults.meet(event.channel, event.id, at=event.kind)
        event.fault = met.fault.kind if met.fault else (f"{event.kind}_latency" if met.latency else None)
        return met

    def _item(self, id: str) -> Item | None:
        """The file of that id, unless it has run out."""
        item = self._uploads.get(id) or self._own.get(id)
        kind = meta.media_type(id)
        if item is None and kind is not None:
            told = self._told.get(id)
            content = meta.media_file(kind, id, told.size if told else None)
            expires = told.at + self._rules.of(self._name(told.owner) or "").media_seconds if told else float("inf")
            item = Item(id, content, meta.media_mime_type(kind), told.owner if told else None, expires)
        if item is None or id in self._deleted or item.expires <= time.time():
            return None
        return item

    def _asked_for(self, id: str, exchange: Exchange) -> Item | GraphError:
        """The file that a request to Graph names, if whoever asks may have it."""
        if not exchange.token:
            return NO_TOKEN
        item = self._item(id)
        number = _only(exchange, "phone_number_id")
        if not self._is_token_of(number or (item.owner if item else None), exchange.token):
            return refusal(190)
        is_strange = number and (number not in self._channels() or (item and item.owner not in (None, number)))
        if item is None or is_strange:
            return no_such_object(exchange.scope["method"].lower(), id)
        return item

    def _wrong_sender(self, known: tuple[App, Channel] | None, id: str, exchange: Exchange) -> GraphError | None:
        if not exchange.token:
            return NO_TOKEN
        if known is None:
            return no_such_object("post", id)
        return None if self._is_token_of(id, exchange.token) else refusal(190)

    def _is_token_of(self, owner: str | None, token: str | None) -> bool:
        """Whether it is the token of this phone_number_id, or of any channel where that one is not known."""
        channels = self._channels()
        known = channels.get(owner or "")
        asked = [known] if known else list(channels.values())
        expected = [self._rules.token(channel) for _, channel in asked]
        return bool(token) and (None in expected or token in expected)

    def _name(self, owner: str | None) -> str | None:
        known = self._channels().get(owner or "")
        return known[1].name if known else None


# Bytes


async def _serve(request: _Request, fault: SetFault | None, kind: str) -> None:
    """The file, with what the fault does to it."""
    exchange, event, item = request
    connection = exchange.connection
    size, by = item.content.size, fault.bytes if fault else None
    claimed = size
    if kind == "long_length":
        claimed += 1000 if by is None else by
    elif kind == "short_length":
        claimed -= size // 2 if by is None else min(size, by)
    headers = [(b"content-type", b"text/html" if kind == "wrong_type" else item.mime_type.encode())]
    if kind == "gzip":
        headers.append((b"content-encoding", b"gzip"))
    elif kind not in ("no_length", "endless"):
        headers.append((b"content-length", str(claimed).encode()))
    event.http = 200
    await exchange.start(200, tuple(headers))
    for chunk in _pieces(item.content, fault, kind):
        if kind == "drip" and fault is not None and await exchange.leaves(fault.ms / 1000):
            return
        if kind == "short_length":
            await connection.write(chunk)
        else:
            await exchange.more(chunk)
        if connection.is_gone():
            return
        event.bytes += len(chunk)
    match kind:
        case "stall":
            await exchange.leaves(None)
        case "reset":
            connection.reset()
            await exchange.left()
        case "close" | "long_length" | "short_length":
            connection.close()
            await exchange.left()
        case _:
            await exchange.more(b"", is_last=True)
            event.answered = True
            event.whole = kind not in ("gzip", "wrong_hash")


def _pieces(content: Content, fault: SetFault | None, kind: str) -> Iterator[bytes]:
    """What is sent of a file, in the pieces in which it is."""
    chunks = content.chunks()
    if fault is None:
        return chunks
    match kind:
        case "wrong_hash":
            return _changed(chunks, content.size - 1)
        case "endless":
            return itertools.chain(chunks, itertools.repeat(bytes(files.CHUNK)))
        case "drip":
            return _cut(chunks, fault.bytes or 1)
        case "stall" | "close" | "reset":
            return _first(chunks, content.size // 2 if fault.bytes is None else fault.bytes)
        case "gzip":
            return _zipped(chunks if fault.bytes is None else _zeros(fault.bytes))
    return chunks


def _changed(chunks: Iterator[bytes], place: int) -> Iterator[bytes]:
    """With another bit in the byte at that place."""
    for chunk in chunks:
        if 0 <= place < len(chunk):
            chunk = chunk[:place] + bytes([chunk[place] ^ 1]) + chunk[place + 1 :]
        place -= len(chunk)
        yield chunk


def _cut(chunks: Iterator[bytes], size: int) -> Iterator[bytes]:
    for chunk in chunks:
        for start in range(0, len(chunk), size):
            yield chunk[start : start + size]


def _first(chunks: Iterator[bytes], count: int) -> Iterator[bytes]:
    for chunk in chunks:
        if count <= 0:
            return
        yield chunk[:count]
        count -= len(chunk)


def _zeros(count: int) -> Iterator[bytes]:
    return _first(itertools.repeat(bytes(files.CHUNK)), count)


def _zipped(chunks: Iterator[bytes]) -> Iterator[bytes]:
    packer = compressobj(wbits=31)
    for chunk in chunks:
        if packed := packer.compress(chunk):
            yield packed
    yield packer.flush()


# Requests


class _File(NamedTuple):
    """One that was handed in and may be kept."""

    part: Part
    mime_type: str


def _handed_in(body: bytes | bytearray, exchange: Exchange) -> _File | GraphError:
    """The file in the body of an upload, checked as §12 has it."""
    if len(body) > MAX_UPLOAD:
        return refusal(1, title="Please reduce the amount of data you're asking for", http=413)
    given = parts(body, exchange.header(b"content-type"))
    if given is None:
        return refusal(100, "The body is not multipart/form-data")
    for name in ("messaging_product", "type", "file"):
        if name not in given:
            return refusal(100, title=f"The parameter {name} is required.")
    if bytes(given["messaging_product"].data) != b"whatsapp":
        return refusal(100, title="Param messaging_product must be one of {WHATSAPP}")
    part = given["file"]
    named = bytes(given["type"].data).decode("utf-8", "replace")
    # The type of the part wins at Meta, so that a file without one is refused whatever `type` says.
    received = part.content_type or "application/octet-stream"
    if _bare(named) not in _KIND or received not in _KIND:
        wrong = received if received not in _KIND else named
        title = f"Param file must be a file with one of the following types: {', '.join(_KIND)}."
        return refusal(100, title=f"{title} Received file of type '{wrong}'.")
    if _bare(named) != received:
        return refusal(100, f"The file is of type {received}, and type says {named}")
    most = _most_bytes(_KIND[received], part.data)
    if not 0 < len(part.data) <= most:
        return refusal(131053, f"A file of type {received} has from 1 to {most} bytes, this one {len(part.data)}")
    return _File(part, named)


def _most_bytes(kind: str, data: memoryview) -> int:
    if kind != "sticker":
        return _MOST[kind]
    is_animated = bytes(data[12:16]) == b"VP8X" and len(data) > 20 and data[20] & 2
    return 500 * 1024 if is_animated else 100 * 1024


def _only(exchange: Exchange, name: str) -> str:
    """The value of a parameter in the query, "" when it is not there."""
    return parse_qs(exchange.query).get(name, [""])[-1]


def _bare(mime_type: str) -> str:
    return mime_type.partition(";")[0].strip().lower()


def _bare_kind(fault: SetFault | None) -> str:
    """A fault's kind without its place; "" without a fault."""
    if fault is None:
        return ""
    before, _, kind = fault.kind.partition("_")
    return kind or before


def _as_set(fault: SetFault) -> GraphError:
    code = 131000 if fault.code is None else fault.code
    return refusal(code, fault.details or "", http=fault.http, subcode=fault.subcode)
