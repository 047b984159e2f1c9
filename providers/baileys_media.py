"""Files of Baileys gateways: fetched from WhatsApp's own hosts by what a message says of them, and decrypted here.

A file there is AES-256-CBC, with ten bytes of an HMAC-SHA256 over the IV and the ciphertext behind it. All three keys
come from the message's `mediaKey` by HKDF-SHA256, with a word for each type of file. It is decrypted as it comes: what
went to the sink counts for nothing until `fetch` returns, which it does only when the HMAC was right.
"""

import hmac
import re
from base64 import b64decode
from binascii import Error
from collections.abc import Collection, Mapping
from hashlib import sha256 as new_sha256
from ipaddress import ip_address
from typing import Any

import httpx
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.padding import PKCS7

from providers.download import allowance, download
from providers.guard import Network
from providers.media import HEAD, MediaFault, Received, Sink, digest_of

_HOST = "https://mmg.whatsapp.net"
_OF_WHATSAPP = "whatsapp.net"
_PATH = re.compile(r"/[\x21-\x7e]{1,4096}")
_MAC = 10  # bytes
_BLOCK = 16
_TYPES = {
    "image": "Image",
    "sticker": "Image",
    "video": "Video",
    "ptv": "Video",
    "audio": "Audio",
    "voice": "Audio",
    "document": "Document",
}


class BaileysMedia:
    """One file by the keys that a webhook gave; `client` must be a guarded one. Beside WhatsApp's own hosts a file may
    be at an address in the `allowed` networks alone, written out: its link is the sender's word."""

    def __init__(
        self,
        client: httpx.Client,
        keys: Mapping[str, Any],
        *,
        sha256: str | None = None,
        allowed: Collection[Network] = (),
    ) -> None:
        self._client = client
        self._keys = {name: value for name, value in keys.items() if isinstance(value, str)}
        self._claimed = digest_of(sha256) or digest_of(self._keys.get("fileSha256"))
        self._url = _address(self._keys, allowed)
        self.host = self._url.host if self._url else ""

    def fetch(self, into: Sink, most_bytes: int) -> Received:
        """As `Source.fetch`. The type is the one that the message named."""
        if self._url is None:
            raise MediaFault("blocked_address", "the file is at no host of WhatsApp", is_final=True)
        inside = _Decrypting(self._secret(), self._info(), into, most_bytes)
        most = most_bytes + _BLOCK + _MAC
        download(
            self._client,
            str(self._url),
            headers={"Origin": "https://web.whatsapp.com"},
            into=inside,
            most_bytes=most,
            seconds=allowance(most),
            expected_bytes=None,
            expected_digest=digest_of(self._keys.get("fileEncSha256")),
            may_redirect=False,
        )
        received = inside.finished(self._keys.get("mimetype"))
        if self._claimed is not None and received.digest != self._claimed:
            raise MediaFault("wrong_hash", "its SHA-256 is not the one that its message told")
        return received

    def _secret(self) -> bytes:
        try:
            secret = b64decode(self._keys.get("mediaKey", ""), validate=True)
        except (Error, ValueError):
            secret = b""
        if len(secret) != 32:
            raise MediaFault("rejected", "its message has no key that could decrypt it", is_final=True)
        return secret

    def _info(self) -> bytes:
        type_ = self._keys.get("messageType", "").removesuffix("Message").lower()
        if type_ not in _TYPES:
            raise MediaFault("rejected", "its message is of a type that has no files", is_final=True)
        return f"WhatsApp {_TYPES[type_]} Keys".encode()


class GatewayFile:
    """One file that a gateway keeps itself, as WAHA does. It hands it out for its key, which nobody else may see: no
    redirect is followed."""

    def __init__(
        self, client: httpx.Client, url: str, headers: Mapping[str, str], *, sha256: str | None = None
    ) -> None:
        self._client, self._url, self._headers = client, url, headers
        self._claimed = digest_of(sha256)
        self.host = httpx.URL(url).host

    def fetch(self, into: Sink, most_bytes: int) -> Received:
        """As `Source.fetch`."""
        return download(
            self._client,
            self._url,
            headers=self._headers,
            into=into,
            most_bytes=most_bytes,
            seconds=allowance(most_bytes),
            expected_bytes=None,
            expected_digest=self._claimed,
            may_redirect=False,
        )


class _Decrypting:
    """A sink for the file as it lies at WhatsApp, which writes what it stands for. At most `most_bytes` are written."""

    def __init__(self, secret: bytes, info: bytes, into: Sink, most_bytes: int) -> None:
        keys = HKDF(SHA256(), length=112, salt=None, info=info).derive(secret)
        iv, key = keys[:16], keys[16:48]
        self._into, self._most = into, most_bytes
        self._mac = hmac.new(keys[48:80], iv, "sha256")
        self._decryptor = Cipher(algorithms.AES256(key), modes.CBC(iv)).decryptor()
        self._unpadder = PKCS7(_BLOCK * 8).unpadder()
        self._tail = b""  # perhaps the HMAC
        self._size, self._head, self._digest = 0, bytearray(), new_sha256()

    def write(self, chunk: bytes) -> None:
        known = self._tail + chunk
        body, self._tail = known[:-_MAC], known[-_MAC:]
        if body:
            self._mac.update(body)
            self._out(self._unpadder.update(self._decryptor.update(body)))

    def finished(self, content_type: str | None) -> Received:
        """The whole file, once all of it was given. Raises `MediaFault` for one that was changed, or cut."""
        if len(self._tail) < _MAC or not hmac.compare_digest(self._mac.digest()[:_MAC], self._tail):
            raise MediaFault("wrong_hash", "its HMAC is not the one that its key makes")
        try:
            self._out(self._unpadder.update(self._decryptor.finalize()) + self._unpadder.finalize())
        except ValueError:  # no whole blocks, or no padding behind them
            raise MediaFault("encoded", "it is not encrypted as WhatsApp does") from None
        return Received(self._size, self._digest.digest(), bytes(self._head), content_type)

    def _out(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._most:
            raise MediaFault("too_large", f"more than the {self._most} bytes that are taken", is_final=True)
        if len(self._head) < HEAD:
            self._head += piece[: HEAD - len(self._head)]
        self._digest.update(piece)
        if piece:
            self._into.write(piece)


def _address(keys: Mapping[str, str], allowed: Collection[Network]) -> httpx.URL | None:
    """Where the file is: by its link if that is a good one, else by its path at WhatsApp's usual host."""
    path = keys.get("directPath", "")
    links = (keys.get("url", ""), _HOST + path if _PATH.fullmatch(path) else "")
    for link in links:
        try:
            url = httpx.URL(link)
        except httpx.InvalidURL:
            continue
        is_whatsapp = url.host == _OF_WHATSAPP or url.host.endswith(f".{_OF_WHATSAPP}")
        if url.userinfo == b"" and ((url.scheme == "https" and is_whatsapp) or _is_in(url.host, allowed)):
            return url
    return None


def _is_in(host: str, allowed: Collection[Network]) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return any(address in network for network in allowed)
