"""What gateways put into their webhooks that is nobody's to keep: their own API key, the proof that we gave them, QR
codes (baileys-sessions.md §5, "Webhooks"). It is overwritten before a body is stored.

In JSON a quote that no backslash precedes begins or ends a string. So these are whole names of members, at any depth,
never inside of a text; and each value that is a text is overwritten with as many asterisks: nothing else of the body
changes, and no length. A body that is no JSON cannot be understood by anybody, and loses no more than that.
"""

import re
from collections.abc import Iterator

_ALWAYS = (b"apikey", b"apiKey", b"webhookVerifyToken", b"destination", b"pairingCode", b"qrDataUrl", b"qrcode", b"qr")
_OF_A_QR_CODE = (b"code", b"base64")  # … where there is a member `qrcode` with an object in it
_OBJECT = re.compile(rb"[ \t\r\n]*+:[ \t\r\n]*+\{")
_TEXT = re.compile(rb'[ \t\r\n]*+:[ \t\r\n]*+"([^"\\]*+(?:\\.[^"\\]*+)*+)', re.DOTALL)


def without_secrets(raw: bytes) -> bytes:
    """The body with what must not be kept overwritten, and otherwise byte for byte as it came."""
    has_code = any(_OBJECT.match(raw, after) for after in _ends(raw, b"qrcode"))
    left: bytearray | None = None
    for name in _ALWAYS + (_OF_A_QR_CODE if has_code else ()):
        for after in _ends(raw, name):
            if found := _TEXT.match(raw, after):
                left = left or bytearray(raw)
                left[found.start(1) : found.end(1)] = b"*" * (found.end(1) - found.start(1))
    return raw if left is None else bytes(left)


def _ends(raw: bytes, name: bytes) -> Iterator[int]:
    """Where each text ends that is just this name."""
    quoted = b'"' + name + b'"'
    at = raw.find(quoted)
    while at >= 0:
        if at == 0 or raw[at - 1] != 0x5C:
            yield at + len(quoted)
        at = raw.find(quoted, at + len(quoted))
