"""Files to serve: small, valid, different for each seed, of any size and never in memory as a whole.

A file is a head, a unit that is repeated, and a tail that holds what the seed decides, so that files of one type and
size share all but their last bytes, and the hash over what they share is taken once.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

CHUNK = 2**18  # bytes served at a time, about


class Content(Protocol):
    """What can be served: so many bytes, their SHA-256, and themselves in chunks."""

    @property
    def size(self) -> int: ...

    @property
    def digest(self) -> bytes: ...

    def chunks(self) -> Iterator[bytes]: ...


class _Shared(NamedTuple):
    """What all files of one type and size begin with."""

    head: bytes
    unit: bytes
    units: int
    rest: int  # bytes left for the tail

    @property
    def size(self) -> int:
        return len(self.head) + len(self.unit) * self.units

    def chunks(self) -> Iterator[bytes]:
        if self.head:
            yield self.head
        if self.units:
            together = max(1, CHUNK // len(self.unit))
            chunk = self.unit * min(together, self.units)
            for _ in range(self.units // together):
                yield chunk
            if self.units % together:
                yield self.unit * (self.units % together)


@dataclass(frozen=True)
class Made:
    """A file of `make`."""

    shared: _Shared
    tail: bytes

    @property
    def size(self) -> int:
        return self.shared.size + len(self.tail)

    @property
    def digest(self) -> bytes:
        so_far = _hashed(self.shared).copy()
        so_far.update(self.tail)
        return so_far.digest()

    def chunks(self) -> Iterator[bytes]:
        yield from self.shared.chunks()
        yield self.tail


@dataclass(frozen=True)
class Given:
    """These very bytes."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    @cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(self.data).digest()

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, len(self.data), CHUNK):
            yield self.data[start : start + CHUNK]


@dataclass(frozen=True)
class OnDisk:
    """A file that was written down, such as an upload; whoever wrote it removes it."""

    path: Path
    size: int
    digest: bytes

    def chunks(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk


def written(path: Path, data: bytes | memoryview) -> OnDisk:
    """`data` as a file of that path."""
    path.write_bytes(data)
    return OnDisk(path, len(data), hashlib.sha256(data).digest())


def make(mime_type: str, seed: str, size: int | None = None) -> Made:
    """A file of this type, its last bytes decided by `seed`; the smallest there is, or exactly `size` bytes.

    Raises ValueError for a size below the smallest. Types that are not known get lines of text.
    """
    shared, format = _planned(mime_type.partition(";")[0].strip().lower(), size)
    mark = hashlib.sha256(seed.encode()).hexdigest()[:_MARK].encode()
    return Made(shared, format.tail(shared, mark))


# What is shared


class _Format(NamedTuple):
    """How files of a type are made.

    head   of a file of so many bytes
    unit   bytes that may stand between head and tail, any number of times
    tail   the end of a file that begins like that, `rest` bytes long, with the mark in it
    least  the fewest bytes of a tail; any more are possible
    """

    head: Callable[[int], bytes]
    unit: bytes
    tail: Callable[[_Shared, bytes], bytes]
    least: int


@lru_cache(maxsize=256)
def _planned(mime_type: str, size: int | None) -> tuple[_Shared, _Format]:
    format = _FORMATS.get(mime_type, _TEXT)
    smallest = len(format.head(0)) + format.least
    if size is None:
        size = smallest
    if size < smallest:
        raise ValueError(f"the smallest file of type {mime_type} has {smallest} bytes")
    count, more = divmod(size - smallest, len(format.unit))
    return _Shared(format.head(size), format.unit, count, format.least + more), format


@lru_cache(maxsize=64)
def _hashed(shared: _Shared) -> "hashlib._Hash":
    so_far = hashlib.sha256()
    for chunk in shared.chunks():
        so_far.update(chunk)
    return so_far


# Formats

_MARK = 32  # bytes
_FILLER = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-\n"  # 64 of them


def _fill(count: int) -> bytes:
    return (_FILLER * (count // len(_FILLER) + 1))[:count]


def _text_tail(shared: _Shared, mark: bytes) -> bytes:
    return _fill(shared.rest - _MARK) + mark


_TEXT = _Format(lambda size: b"", _FILLER, _text_tail, _MARK)


def _jpeg_comment(content: bytes) -> bytes:
    return b"\xff\xfe" + (len(content) + 2).to_bytes(2) + content


_JPEG_START = b"\xff\xd8\xff\xe0" + (16).to_bytes(2) + b"JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
_JPEG_IMAGE = b"".join(  # one grey pixel
    (
        b"\xff\xdb" + (67).to_bytes(2) + b"\0" + b"\x01" * 64,
        b"\xff\xc0" + (11).to_bytes(2) + b"\x08\0\x01\0\x01\x01\x01\x11\0",
        b"\xff\xc4" + (20).to_bytes(2) + b"\0" + b"\x01" + bytes(15) + b"\0",
        b"\xff\xc4" + (20).to_bytes(2) + b"\x10" + b"\x01" + bytes(15) + b"\0",
        b"\xff\xda" + (8).to_bytes(2) + b"\x01\x01\0\0\x3f\0" + b"\x3f",
        b"\xff\xd9",
    )
)
_JPEG_UNIT = _jpeg_comment(_fill(2**14 - 4))


def _jpeg_tail(shared: _Shared, mark: bytes) -> bytes:
    return _jpeg_comment(_fill(shared.rest - 4 - _MARK - len(_JPEG_IMAGE)) + mark) + _JPEG_IMAGE


_JPEG = _Format(lambda size: _JPEG_START, _JPEG_UNIT, _jpeg_tail, 4 + _MARK + len(_JPEG_IMAGE))


def _png_chunk(name: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)


_PNG_START = b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", b"\0\0\0\x01\0\0\0\x01\x08\0\0\0\0")
_PNG_END = _png_chunk(b"IDAT", zlib.compress(b"\0\x80")) + _png_chunk(b"IEND", b"")
_PNG_UNIT = _png_chunk(b"saNd", _fill(2**14 - 12))


def _png_tail(shared: _Shared, mark: bytes) -> bytes:
    return _png_chunk(b"saNd", _fill(shared.rest - 12 - _MARK - len(_PNG_END)) + mark) + _PNG_END


_PNG = _Format(lambda size: _PNG_START, _PNG_UNIT, _png_tail, 12 + _MARK + len(_PNG_END))

_WEBP_IMAGE = bytes.fromhex("5650384c0d0000002f00000010071011118888fe0700")  # VP8L, one pixel


def _webp_head(size: int) -> bytes:
    # A RIFF of odd length would need a byte more than its header says, so the last one stays outside.
    size -= size % 2
    junk = max(0, size - 12 - len(_WEBP_IMAGE) - 8)
    return (
        b"RIFF" + max(0, size - 8).to_bytes(4, "little") + b"WEBP" + _WEBP_IMAGE + b"JUNK" + junk.to_bytes(4, "little")
    )


_WEBP = _Format(_webp_head, _FILLER, _text_tail, _MARK)


def _box(name: bytes, content: bytes, more: int = 0) -> bytes:
    """A box of MP4; `more` bytes of its content follow elsewhere."""
    return (len(content) + 8 + more).to_bytes(4) + name + content


def _mp4(brand: bytes) -> _Format:
    rate = (0x10000).to_bytes(4) + (0x100).to_bytes(2) + bytes(10)
    matrix = b"".join(one.to_bytes(4) for one in (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000))
    movie = bytes(12) + (1000).to_bytes(4) + bytes(4) + rate + matrix + bytes(24) + (1).to_bytes(4)
    start = _box(b"ftyp", brand + (512).to_bytes(4) + brand + b"isom") + _box(b"moov", _box(b"mvhd", movie))

    def head(size: int) -> bytes:
        return start + _box(b"mdat", b"", max(0, size - len(start) - 8))

    return _Format(head, _FILLER, _text_tail, _MARK)


_PDF_START = b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n"
_PDF_OBJECTS = (
    b"1 0 obj\n<</Type/Catalog/Pages 2 0 R>>\nendobj\n",
    b"2 0 obj\n<</Type/Pages/Kids[3 0 R]/Count 1>>\nendobj\n",
    b"3 0 obj\n<</Type/Page/Parent 2 0 R/MediaBox[0 0 72 72]/Resources<<>>>>\nendobj\n",
)
_PDF_PLACES = [len(_PDF_START) + sum(map(len, _PDF_OBJECTS[:i])) for i in range(len(_PDF_OBJECTS))]
_PDF_TABLE = b"".join(
    (
        b"xref\n0 4\n0000000000 65535 f \n",
        *(b"%010d 00000 n \n" % place for place in _PDF_PLACES),
        b"trailer\n<</Size 4/Root 1 0 R>>\nstartxref\n",
    )
)


def _pdf_tail(shared: _Shared, mark: bytes) -> bytes:
    comment = b"%" + _fill(shared.rest - _PDF_LEAST).replace(b"\n", b"+") + mark + b"\n"
    return comment + _PDF_TABLE + b"%010d\n%%%%EOF\n" % (shared.size + len(comment))


_PDF_LEAST = 1 + _MARK + 1 + len(_PDF_TABLE) + 10 + len(b"\n%%EOF\n")
_PDF = _Format(
    lambda size: _PDF_START + b"".join(_PDF_OBJECTS), b"%" + _FILLER.replace(b"-\n", b"\n"), _pdf_tail, _PDF_LEAST
)


def _crc_of_ogg() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)
        table.append(value & 0xFFFFFFFF)
    return table


_OGG_CRC = _crc_of_ogg()
_SILENCE = b"\xf8\xff\xfe"  # 20 ms of Opus
_BEGINS, _GOES_ON, _ENDS = 2, 0, 4


def _ogg_page(flags: int, number: int, samples: int, *packets: bytes) -> bytes:
    lacing = b"".join(b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255]) for packet in packets)
    before = b"OggS\0" + bytes([flags]) + samples.to_bytes(8, "little") + b"SAND" + number.to_bytes(4, "little")
    after = bytes([len(lacing)]) + lacing + b"".join(packets)
    crc = 0
    for byte in before + bytes(4) + after:
        crc = (crc << 8) & 0xFFFFFFFF ^ _OGG_CRC[crc >> 24 ^ byte]
    return before + crc.to_bytes(4, "little") + after


_OPUS_START = _ogg_page(
    _BEGINS, 0, 0, b"OpusHead\x01\x01" + (312).to_bytes(2, "little") + (48000).to_bytes(4, "little") + b"\0\0\0"
) + _ogg_page(_GOES_ON, 1, 0, b"OpusTags" + (7).to_bytes(4, "little") + b"sandbox" + bytes(4))
# Repeated with one number, it is a page that came again: a player skips it.
_OPUS_UNIT = _ogg_page(_GOES_ON, 2, 960 * 64, *[_SILENCE] * 64)


def _opus_tail(shared: _Shared, mark: bytes) -> bytes:
    """One page. Its packets are as long as it takes: a length below 255 takes one byte to tell."""
    room = shared.rest - _OPUS_LEAST
    own = min(room, 200) - (room == 201)  # what is left is filled with packets of two bytes or more, length and all
    packets = [b"\xf8" + bytes(own) + mark]
    room -= own
    while room:
        taken = min(room, 250) - (room == 251)
        packets.append(b"\xf8" + bytes(taken - 2))
        room -= taken
    return _ogg_page(_ENDS, 3, 960 * (64 + len(packets)), *packets)


_OPUS_LEAST = 27 + 1 + 1 + _MARK
_OPUS = _Format(lambda size: _OPUS_START, _OPUS_UNIT, _opus_tail, _OPUS_LEAST)

_FORMATS = {
    "image/jpeg": _JPEG,
    "image/png": _PNG,
    "image/webp": _WEBP,
    "audio/ogg": _OPUS,
    "audio/mp4": _mp4(b"M4A "),
    "video/mp4": _mp4(b"mp42"),
    "video/3gpp": _mp4(b"3gp4"),
    "application/pdf": _PDF,
}
