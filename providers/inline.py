"""A file that comes inside an answer, as base64: decoded strictly, piece by piece, and never more of it than may be
(security-reliability.md M12)."""

import binascii
import hashlib
import re

from providers.media import HEAD, MediaFault, Received, Sink

# Whatever stands in it but the last word: gateways write `data:undefined;base64,`, and names of files.
_PREFIX = re.compile(rb"data:([^,;]*)(?:;[^,]*)?;base64,", re.IGNORECASE)
_MIME = re.compile(rb"[-\w.+]+/[-\w.+]+", re.ASCII)
_LONGEST_PREFIX = 256


class Decoder:
    """Takes base64 in pieces of any size, with or without the beginning of a data URI, and writes what it stands for.

    Its methods raise `MediaFault`, and the errors of `into.write`. At most `most_bytes` are written, none of them
    before it is known that they are not too many.
    """

    def __init__(self, into: Sink, most_bytes: int) -> None:
        self._into, self._most = into, most_bytes
        self._start: bytearray | None = bytearray()  # until it is known whether there is a prefix
        self._rest = b""  # of four characters that are not whole yet
        self._has_ended = False  # by padding
        self._mime: str | None = None
        self._size, self._head, self._digest = 0, bytearray(), hashlib.sha256()

    def feed(self, piece: bytes) -> None:
        """The next piece of the text."""
        if self._start is not None:
            self._start += piece
            if not _is_settled(self._start):
                return
            piece, self._start = self._without_prefix(bytes(self._start)), None
        self._decode(piece)

    def finished(self) -> Received:
        """The whole file, once all of its text was given; its type is the prefix's."""
        if self._start is not None:
            piece, self._start = self._without_prefix(bytes(self._start)), None
            self._decode(piece)
        if self._rest:
            raise MediaFault("encoded", "it is not whole base64")
        return Received(self._size, self._digest.digest(), bytes(self._head), self._mime)

    def _without_prefix(self, start: bytes) -> bytes:
        match = _PREFIX.match(start[:_LONGEST_PREFIX])
        if match is None:
            return start  # a colon, or whatever else is wrong with it, is no base64
        mime = _MIME.fullmatch(match.group(1).strip())
        self._mime = mime.group().decode().lower() if mime else None
        return start[match.end() :]

    def _decode(self, piece: bytes) -> None:
        if not piece:
            return
        if self._has_ended:
            raise MediaFault("encoded", "it is not one piece of base64")
        text = self._rest + piece if self._rest else piece
        whole = len(text) // 4 * 4
        self._rest = text[whole:]
        text = text[:whole] if self._rest else text
        padding = text.count(b"=", -2) if text else 0
        if self._size + whole // 4 * 3 - padding > self._most:
            raise MediaFault("too_large", f"more than the {self._most} bytes that are taken", is_final=True)
        try:
            chunk = binascii.a2b_base64(text, strict_mode=True)
        except binascii.Error:
            raise MediaFault("encoded", "it is not base64") from None
        if padding:
            self._has_ended = True
            if self._rest:
                raise MediaFault("encoded", "it is not one piece of base64")
        if not chunk:
            return
        self._size += len(chunk)
        if len(self._head) < HEAD:
            self._head += chunk[: HEAD - len(self._head)]
        self._digest.update(chunk)
        self._into.write(chunk)


def _is_settled(start: bytearray) -> bool:
    """Whether this beginning is long enough to say if it is a prefix."""
    if not b"data:".startswith(start[:5].lower()):
        return True
    return len(start) > 5 and (b"," in start or len(start) >= _LONGEST_PREFIX)
