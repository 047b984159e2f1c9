"""Secrets at rest: MultiFernet under the keys of `POMBAL_SECRET_KEYS`, newest first.

The row's id is inside the ciphertext and checked on opening, so that a ciphertext copied to another row is refused
(security-reliability.md C1).
"""

import hashlib
import secrets
from functools import cache
from typing import Any
from uuid import UUID

import msgspec
from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from pombal.errors import Misconfigured
from pombal.settings import settings


@cache
def _box() -> MultiFernet:
    keys = [key.strip() for key in settings().secret_keys.split(",") if key.strip()]
    if not keys:
        raise Misconfigured("POMBAL_SECRET_KEYS is not set: give one or more Fernet keys, newest first")
    return MultiFernet([Fernet(key) for key in keys])


def seal(row: UUID, values: dict[str, Any]) -> bytes:
    """Encrypt `values` for one row, under the newest key."""
    return _box().encrypt(msgspec.json.encode({"row": str(row), "values": values}))


def unseal(row: UUID, sealed: bytes) -> dict[str, Any]:
    """Decrypt what `seal` made for the same row. Raises `Misconfigured` when no key opens it or it is another row's."""
    try:
        content = msgspec.json.decode(_box().decrypt(sealed))
    except InvalidToken:
        raise Misconfigured(f"no key of POMBAL_SECRET_KEYS opens the secrets of row {row}") from None
    if content["row"] != str(row):
        raise Misconfigured(f"the secrets of row {row} were sealed for another row")
    values: dict[str, Any] = content["values"]
    return values


def new_fernet_key() -> str:
    """A fresh key for `POMBAL_SECRET_KEYS`."""
    return Fernet.generate_key().decode()


def new_token() -> str:
    """256 random bits in URL-safe base64."""
    return secrets.token_urlsafe(32)


def fingerprint(token: str) -> bytes:
    """SHA-256 of a token of ours. Such tokens hold 256 random bits, so a slow hash would add nothing (C3)."""
    return hashlib.sha256(token.encode()).digest()
