"""What gateways put into their webhooks that is nobody's to keep: their own API key, the proof that we gave them, QR
codes (baileys-sessions.md §5, "Webhooks"). It is overwritten before a body is stored.

In JSON a quote that no backslash precedes begins or ends a string. So these are whole names of members, at any depth,
never inside of a text; and each value that is a text is overwritten with as many asterisks: nothing else of the body
changes, and no length. A body that is no JSON cannot be understood by anybody, and loses no more than that.

A server's loop waits meanwhile, so what is done for one body is bounded: one with more such values than any gateway has
to say loses all that comes after them.
"""

import re

_ALWAYS = (b"apikey", b"apiKey", b"webhookVerifyToken", b"destination", b"pairingCode", b"qrDataUrl", b"qrcode", b"qr")
_OF_A_QR_CODE = (
    b"code",
    b"base64",
)  # … where there is a member `qrcode` with an object in it, or an event of that name
_OF_ITS_EVENT = (*_OF_A_QR_CODE, b"data")
_MOST = 10_000
_GAP = rb"[ \t\r\n]*+:[ \t\r\n]*+"
_TEXT = rb'"([^"\\]*+(?:\\.[^"\\]*+)*+)'


def _name(name: bytes) -> bytes:
    r"""It, in any spelling that is the same to whoever reads JSON: `qr`, `\u0071r`."""
    return b"".join(rb"(?:%c|\\u00(?i:%02x))" % (one, one) for one in name)


def _member(names: tuple[bytes, ...], value: bytes) -> re.Pattern[bytes]:
    firsts = bytes(sorted({name[0] for name in names}))
    spelt = b"|".join(_name(name) for name in names)
    return re.compile(rb'"(?=[%s\\])(?<!\\")(?:%s)"%s%s' % (firsts, spelt, _GAP, value), re.DOTALL)


_SECRETS = _member(_ALWAYS, _TEXT)
_BY_A_QR_CODE = _member(_ALWAYS + _OF_A_QR_CODE, _TEXT)
_BY_ITS_EVENT = _member(_ALWAYS + _OF_ITS_EVENT, _TEXT)
_OBJECT = _member((b"qrcode",), rb"\{")
_EVENT = _member((b"event",), rb'"[^"\\]{0,64}(?i:%s|%s)' % (_name(b"qr"), _name(b"QR")))


def without_secrets(raw: bytes) -> bytes:
    """The body with what must not be kept overwritten, and otherwise byte for byte as it came."""
    wanted = _SECRETS
    if b"qr" in raw.lower() or b"\\u00" in raw:  # … which spares nearly all bodies two more looks
        if _EVENT.search(raw):
            wanted = _BY_ITS_EVENT
        elif _OBJECT.search(raw):
            wanted = _BY_A_QR_CODE
    left: bytearray | None = None
    for count, found in enumerate(wanted.finditer(raw), 1):
        left = left or bytearray(raw)
        start, end = found.span(1)
        if count > _MOST:
            end = len(raw)
        left[start:end] = b"*" * (end - start)
        if count > _MOST:
            break
    return raw if left is None else bytes(left)
