"""Files of incoming messages as they lie at WhatsApp: encrypted, with a key that only the message holds.

HKDF-SHA256 over the `mediaKey` gives an IV, a key for AES-256-CBC and one for a MAC, of which 10 bytes end the file.
"""

import hashlib
import hmac
import secrets
from base64 import b64encode
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from cryptography.hazmat.primitives import hashes, padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sandbox.files import Content
from sandbox.megaapi_files import Sent
from sandbox.meta import JSON

PREFIX = "/baileys-media/"
MOST = 200  # files kept; the oldest are forgotten
INFOS = {
    "image": b"WhatsApp Image Keys",
    "sticker": b"WhatsApp Image Keys",
    "video": b"WhatsApp Video Keys",
    "audio": b"WhatsApp Audio Keys",
    "document": b"WhatsApp Document Keys",
}
Spoil = Literal["mac", "hash", "cut", "gone"]


@dataclass(frozen=True)
class Encrypted(Sent):
    """One file. `spoil` is what is wrong with it: its MAC, its SHA-256 as told, half of it missing, or all of it."""

    address: str = ""
    id: str = ""
    raw_key: bytes = b""
    spoil: Spoil | None = None

    @property
    def url(self) -> str:
        return f"{self.address}{PREFIX}{self.id}.enc"

    @cached_property
    def encrypted(self) -> bytes:
        """What the address gives."""
        keys = HKDF(hashes.SHA256(), 112, None, INFOS[self.kind]).derive(self.raw_key)
        iv, key, mac_key = keys[:16], keys[16:48], keys[48:80]
        padder = padding.PKCS7(128).padder()
        encryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
        plain = b"".join(self.content.chunks())
        body = encryptor.update(padder.update(plain) + padder.finalize()) + encryptor.finalize()
        mac = hmac.digest(mac_key, iv + body, "sha256")[:10]
        if self.spoil == "mac":
            mac = bytes([mac[0] ^ 1]) + mac[1:]
        return body + mac

    @property
    def served(self) -> bytes | None:
        if self.spoil == "gone":
            return None
        return self.encrypted[: len(self.encrypted) // 2] if self.spoil == "cut" else self.encrypted

    def told(self, at: int) -> JSON:
        told = super().told(at)
        told["fileEncSha256"] = b64encode(hashlib.sha256(self.encrypted).digest()).decode()
        if self.spoil == "hash":
            told["fileSha256"] = b64encode(bytes(32)).decode()
        return told


class BaileysFiles:
    """Those of one stand-in."""

    def __init__(self) -> None:
        self._by_id: OrderedDict[str, Encrypted] = OrderedDict()

    def add(
        self,
        content: Content,
        mime_type: str,
        kind: str,
        filename: str | None = None,
        *,
        address: str,
        spoil: Spoil | None = None,
    ) -> Encrypted:
        raw_key, id = secrets.token_bytes(32), secrets.token_hex(16)
        path = f"/v/t62.7118-24/{id}.enc?ccb=11-4&oe=7FFFFFFF"
        key = b64encode(raw_key).decode()
        made = Encrypted(content, mime_type, kind, key, path, filename, address, id, raw_key, spoil)
        self._by_id[id] = made
        while len(self._by_id) > MOST:
            self._by_id.popitem(last=False)
        return made

    def get(self, id: str) -> Encrypted | None:
        return self._by_id.get(id)
