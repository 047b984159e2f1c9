"""A file that came inside an answer, as base64 (security-reliability.md M12)."""

import base64
import binascii
import hashlib
import re

from providers.media import HEAD, MediaFault, Received, Sink

_PIECE = 1024 * 1024  # characters decoded at once; a multiple of 4
_PREFIX = re.compile(r"data:([-\w.+]+/[-\w.+]+)?(;[-\w.+]+=[-\w.+\"]*)*;base64,", re.ASCII)
_LONGEST_PREFIX = 256


class Inline:
    """One file of which all is here; `host` is whoever gave the answer."""

    def __init__(self, text: str, *, host: str) -> None:
        self.host = host
        self._text = text

    def fetch(self, into: Sink, most_bytes: int) -> Received:
        """As `Source.fetch`. Strict: what is not base64 is a fault, and nothing is decoded that is too long."""
        match = _PREFIX.match(self._text[:_LONGEST_PREFIX])
        start = match.end() if match else 0
        length = len(self._text) - start
        if length % 4:
            raise MediaFault("encoded", "it is not whole base64")
        if length // 4 * 3 - self._text.count("=", -2) > most_bytes:
            raise MediaFault("too_large", f"more than the {most_bytes} bytes that are taken", is_final=True)
        size, head, digest = 0, b"", hashlib.sha256()
        for at in range(start, len(self._text), _PIECE):
            piece = self._text[at : at + _PIECE]
            try:
                chunk = base64.b64decode(piece, validate=True)
            except (binascii.Error, ValueError):  # ValueError: not ASCII
                raise MediaFault("encoded", "it is not base64") from None
            if "=" in piece and at + _PIECE < len(self._text):
                raise MediaFault("encoded", "it is not one piece of base64")
            size += len(chunk)
            head += chunk[: HEAD - len(head)]
            digest.update(chunk)
            into.write(chunk)
        return Received(size, digest.digest(), head, match.group(1) if match else None)
