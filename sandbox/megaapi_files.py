"""Files that travel in messages of the simulated MegaAPI: what a webhook says of one, and its bytes for who asks."""

import hashlib
import secrets
from base64 import b64encode
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.files import Content
from sandbox.meta import JSON

SHORT = ("image", "audio", "video", "document", "sticker")
"""The kinds that a download knows."""

MOST_BYTES = 256 * 2**20  # of all files kept; the oldest are forgotten
_PATHS = {"image": "v/t62.7118-24", "audio": "v/t62.7117-24", "video": "v/t62.7161-24", "document": "v/t62.7119-24"}
_THUMBNAIL = "/9j/4AAQSkZJRgABAQAAAQABAAD/2Q=="  # its slashes matter to some


@dataclass(frozen=True)
class Sent:
    """One file as it lies at WhatsApp, encrypted with a key that only its messages hold."""

    content: Content
    mime_type: str
    kind: str  # of SHORT
    media_key: str
    direct_path: str
    filename: str | None

    @property
    def url(self) -> str:
        return f"https://mmg.whatsapp.net{self.direct_path}&mms3=true"

    @property
    def keys(self) -> JSON:
        """What `downloadMediaMessage` wants to know."""
        return {
            "mediaKey": self.media_key,
            "directPath": self.direct_path,
            "url": self.url,
            "mimetype": self.mime_type,
            "messageType": self.kind,
        }

    def told(self, at: int) -> JSON:
        """As it is in a message."""
        encrypted = hashlib.sha256(self.media_key.encode() + self.content.digest).digest()
        told: JSON = {
            "url": self.url,
            "mimetype": self.mime_type,
            "fileSha256": b64encode(self.content.digest).decode(),
            "fileLength": str(self.content.size),
            "mediaKey": self.media_key,
            "fileEncSha256": b64encode(encrypted).decode(),
            "directPath": self.direct_path,
            "mediaKeyTimestamp": str(at),
        }
        match self.kind:
            case "image" | "sticker":
                told |= {"height": 640, "width": 480}
            case "video":
                told |= {"height": 640, "width": 480, "seconds": 3}
            case "audio":
                told |= {"seconds": 3, "ptt": False}
            case "document":
                told |= {"fileName": self.filename or "file", "title": self.filename or "file", "pageCount": 1}
        if self.kind in ("image", "video"):
            told["jpegThumbnail"] = _THUMBNAIL
        return told


class MegaFiles:
    """Those of one host, by their keys."""

    def __init__(self) -> None:
        self._by_key: OrderedDict[str, Sent] = OrderedDict()
        self._bytes = 0

    def add(self, content: Content, mime_type: str, kind: str, filename: str | None = None) -> Sent:
        name = f"{secrets.randbelow(10**8)}_{secrets.randbelow(10**15)}_{secrets.randbelow(10**19)}_n.enc"
        # `oe`, the end of its life, is in hexadecimal.
        query = f"ccb=11-4&oh=01_{secrets.token_urlsafe(24)}&oe=7FFFFFFF&_nc_sid=5e03e0"
        path = f"/{_PATHS.get(kind, 'v/t62.15575-24')}/{name}?{query}"
        sent = Sent(content, mime_type, kind, b64encode(secrets.token_bytes(32)).decode(), path, filename)
        self._by_key[sent.media_key] = sent
        self._bytes += content.size
        while self._bytes > MOST_BYTES and len(self._by_key) > 1:
            self._bytes -= self._by_key.popitem(last=False)[1].content.size
        return sent

    def get(self, keys: JSON) -> Sent | None:
        """The file of these keys, if all of them are its own."""
        sent = self._by_key.get(keys["mediaKey"])
        if sent is None or any(keys[name] != sent.keys[name] for name in ("directPath", "url", "messageType")):
            return None
        return sent


def in_base64(content: Content) -> Iterator[bytes]:
    """A file as base64, in pieces that can be joined."""
    left = b""
    for chunk in content.chunks():
        left += chunk
        whole = len(left) - len(left) % 3
        yield b64encode(left[:whole])
        left = left[whole:]
    yield b64encode(left)
