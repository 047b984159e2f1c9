"""Files as small as their types allow, a customer who keeps and fetches them, and what lies on the disk."""

import io
import os
import zipfile
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import httpx
from sqlalchemy import insert

from models import File, Media
from pombal.cli import admin
from pombal.ids import uuid7
from pombal.settings import settings
from providers.sniff import extension, sniff
from providers.storage import key_of, storage
from tests.factories import Shop, a_shop, rows, seen_by
from tests.web.process import Web

URL = "/api/v1/media"
KiB, MiB = 1024, 1024 * 1024


class Customer(NamedTuple):
    """A tenant, a key to it, and the web process it talks to."""

    shop: Shop
    key: str
    web: Web

    @property
    def fields(self) -> tuple[tuple[str, str], ...]:
        return (("Authorization", f"Bearer {self.key}"),)

    def asks(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = dict(self.fields) | options.pop("headers", {})
        return self.web.http.request(method, path, headers=headers, **options)

    def reads(self, id_: object, **headers: str) -> httpx.Response:
        return self.asks("GET", f"{URL}/{id_}", headers=headers)

    def uploads(self, content: Any, claimed: str = "application/octet-stream", **params: str) -> httpx.Response:
        return self.asks("POST", URL, content=content, headers={"Content-Type": claimed}, params=params)

    def uploaded(self, content: Any, claimed: str = "application/octet-stream", **params: str) -> dict[str, Any]:
        answer = self.uploads(content, claimed, **params)
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def media(self) -> list[dict[str, Any]]:
        return rows(self.shop, "SELECT * FROM media WHERE tenant_id = :tenant ORDER BY id")

    def files(self) -> list[dict[str, Any]]:
        return rows(self.shop, "SELECT * FROM file WHERE tenant_id = :tenant ORDER BY key")

    def keeps(self, content: bytes, name: str | None = None, kind: str = "document", **columns: Any) -> UUID:
        """A file that has come with a message: stored, as the worker does it. Its media's id."""
        digest, mime_type = sha256(content).digest(), sniff(content[: 8 * KiB])
        key = key_of(self.shop.tenant.id, digest, extension(mime_type))
        with storage().spool() as spool:
            spool.write(content)
            storage().keep(spool, key)
        file = {"tenant_id": self.shop.tenant.id, "digest": digest, "key": key, "bytes": len(content)}
        with seen_by(self.shop) as s:
            File.keep(s, {**file, "mime_type": mime_type})
        return self.has(kind=kind, filename=name, state="stored", digest=digest, **columns)

    def has(self, **columns: Any) -> UUID:
        """A row of `media`; its id."""
        id_ = uuid7()
        given = {"tenant_id": self.shop.tenant.id, "id": id_, "kind": "document", "deadline": datetime.now(UTC)}
        with seen_by(self.shop) as s:
            s.execute(insert(Media).values(given | columns))
        return id_


def a_customer(web: Web, *scopes: str, shop: Shop | None = None) -> Customer:
    shop = shop or a_shop()
    _, key = admin.add_key(shop.tenant.id, "a key", scopes or ("messages:send", "messages:read"))
    return Customer(shop, key, web)


def root_of(web_media_url: str | None = None) -> Path:
    """The folder of the storage: the tests' own, or another one."""
    return Path((web_media_url or settings().require_media()).removeprefix("file://"))


def lying_in(root: Path) -> list[str]:
    """The files below a folder, as paths in it."""
    return sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())


def open_in(web: Web, root: Path) -> list[str]:
    """Files below a folder that the web process has open."""
    found = []
    for link in Path(f"/proc/{web.process.pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except FileNotFoundError:
            continue
        if target.startswith(f"{root}/") and not os.path.isdir(target):
            found.append(target)
    return found


# --------------------------------------------------------------------------------------------------------------- bytes


def jpeg(size: int = 1_000) -> bytes:
    return (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + os.urandom(16)).ljust(size, b"j")


def png(size: int = 1_000) -> bytes:
    return (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + os.urandom(16)).ljust(size, b"p")


def pdf(size: int = 1_000) -> bytes:
    return (b"%PDF-1.7\n" + os.urandom(16).hex().encode()).ljust(size, b"%")


def webp(size: int = 1_000, *, width: int = 512, height: int = 512, moves: bool = False) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    head = b"WEBPVP8X" + (10).to_bytes(4, "little") + bytes([0x02 if moves else 0, 0, 0, 0]) + sides
    return (b"RIFF" + size.to_bytes(4, "little") + head + os.urandom(16)).ljust(size, b"w")


def webp_lossy(width: int = 512, height: int = 512) -> bytes:
    sides = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    return b"RIFF\xff\0\0\0WEBPVP8 \xf0\0\0\0" + b"\x30\x01\x00\x9d\x01\x2a" + sides + os.urandom(64)


def webp_lossless(width: int = 512, height: int = 512) -> bytes:
    bits = (width - 1) | (height - 1) << 14
    return b"RIFF\xff\0\0\0WEBPVP8L\xf0\0\0\0" + b"\x2f" + bits.to_bytes(4, "little") + os.urandom(64)


def ogg(codec: bytes = b"OpusHead", channels: int = 1) -> bytes:
    page = b"OggS\0\x02" + bytes(8) + os.urandom(4) + bytes(8) + b"\x01\x13"
    return page + codec + bytes([1, channels]) + os.urandom(200)


def mp4(brand: bytes = b"isom") -> bytes:
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\2\0" + brand + b"mp41" + os.urandom(200)


def office(folder: str) -> bytes:
    """A ZIP like Word's (`word`), Excel's (`xl`) or PowerPoint's (`ppt`)."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr(f"{folder}/document.xml", os.urandom(16).hex())
    return packed.getvalue()


def old_office() -> bytes:
    """An OLE file whose directory is too far away to be seen."""
    return (
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(22) + b"\x09\0" + bytes(16) + b"\xff\xff\xff\0" + os.urandom(2_000)
    )
