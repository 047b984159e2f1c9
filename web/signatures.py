"""Who sent it: HMAC over the raw bytes, tokens, API keys. Constant time throughout; nothing configured means closed."""

import asyncio
import hashlib
import hmac
import re
import secrets
from typing import NamedTuple
from uuid import UUID

from starlette.requests import Request

from models import ApiKey, App
from models.app import DEFAULT_SLUG
from pombal import db, log, metrics
from pombal.settings import settings
from web.errors import Failure
from web.limits import Quota
from web.remembered import Remembered

_log = log.get()
_refusals = Quota(per_second=10)

MiB = 1024 * 1024
_BODY_SECONDS = 10.0  # for the whole body (security-reliability.md W5)
_UNPROVEN = 64 * MiB  # of bodies that are being read: anybody may send them, so they may not fill the memory (W13)
_SMALL = 64 * 1024  # bytes of each body that are read in any case, so that large ones do not keep small ones out
_SIGNATURE = re.compile(rb"sha256=([0-9a-f]{64})")
_NOBODY = secrets.token_bytes(32)  # what an unknown app is checked against, so that it costs the same


class AppSecrets(NamedTuple):
    """`app_id` is None for an app that does not exist; nothing proves itself against it."""

    app_id: UUID | None
    secrets: list[bytes]
    verify_token: bytes


class Apps:
    """The secrets of apps by their URL slug."""

    def __init__(self) -> None:
        self._known = Remembered(_load, lambda app: app.app_id is not None)

    async def get(self, slug: str) -> AppSecrets:
        """Never raises for an unknown app: it looks like any other to whoever guesses (W10)."""
        return await self._known.get(slug)


def _load(slug: str) -> AppSecrets:
    with db.session() as s:
        app = s.scalars(App.by_slug(slug)).first()
    given = settings()
    if app is None:  # the handshake of the default app may come before its first channel
        return AppSecrets(None, [_NOBODY], given.whatsapp_webhook_verify_token.encode() * (slug == DEFAULT_SLUG))
    kept = app.secrets()
    app_secrets = kept["app_secrets"] or [given.whatsapp_app_secret] * (slug == DEFAULT_SLUG)
    verify_token = kept["verify_token"] or given.whatsapp_webhook_verify_token * (slug == DEFAULT_SLUG)
    return AppSecrets(app.id, [one.encode() for one in app_secrets if one], verify_token.encode())


def signer(raw: bytes, header: bytes | None, keys: list[bytes]) -> int | None:
    """Which of the keys signed these bytes, by its place; None if none did (whatsapp-cloud-api.md §2)."""
    match = _SIGNATURE.fullmatch(header or b"")
    claimed = match[1] if match else b"0" * 64
    matches = [
        hmac.compare_digest(hmac.digest(key, raw, hashlib.sha256).hex().encode(), claimed) for key in keys or [_NOBODY]
    ]
    return matches.index(True) if match and keys and True in matches else None


def is_token(given: str, kept: bytes) -> bool:
    """Compare a token in constant time; an empty kept one matches nothing."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), kept or _NOBODY)


class Room:
    """Memory that bodies share while they are being read. For one event loop, so without a lock."""

    def __init__(self, size: int) -> None:
        self._left = size

    def take(self, size: int) -> None:
        if size > self._left:
            raise Failure(503, "UNAVAILABLE", "too many large bodies at once", retry_after=1, close=True)
        self._left -= size

    def give_back(self, size: int) -> None:
        self._left += size


_room = Room(_UNPROVEN)


async def read_body(request: Request, limit: int) -> bytes:
    """The raw body. 413 at the first byte over `limit`, declared or not; 408 after 10 s; 415 for an encoded one.

    503 for a large one while too many are being read.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Failure(415, "INVALID_PAYLOAD", "content encodings are not supported", close=True)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise Failure(413, "PAYLOAD_TOO_LARGE", f"at most {limit} bytes", close=True)
    chunks, size, taken = [], 0, 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise Failure(413, "PAYLOAD_TOO_LARGE", f"at most {limit} bytes", close=True)
                if size - _SMALL > taken:
                    _room.take(size - _SMALL - taken)
                    taken = size - _SMALL
                chunks.append(chunk)
    except TimeoutError:
        raise Failure(408, "INVALID_PAYLOAD", "the body took too long", close=True) from None
    finally:
        _room.give_back(taken)
    return b"".join(chunks)


class Caller(NamedTuple):
    """Who an API key belongs to. Scope comes from the credential alone (T1)."""

    tenant_id: UUID
    key: ApiKey


async def caller(request: Request, scope: str) -> Caller:
    """The tenant behind `Authorization: Bearer <api key>`. Raises 401 without a good key, 403 without the scope."""
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    return await owner(request, text.strip() if scheme.lower() == "bearer" else "", scope)


async def owner(request: Request, text: str, scope: str) -> Caller:
    """The tenant behind the key that `request` presents, wherever that stood. Raises as `caller` does."""
    tenant_id = ApiKey.tenant_named_in(text)
    key = await asyncio.to_thread(_key, tenant_id, text) if tenant_id else None
    if key is None:
        refused(request, "bad_key")
        raise Failure(401, "UNAUTHORIZED", "a valid API key is needed")
    if not key.allows(scope):
        refused(request, "missing_scope", tenant_id=str(key.tenant_id), key_id=str(key.id))
        raise Failure(403, "FORBIDDEN", f"this key lacks the scope {scope}")
    return Caller(key.tenant_id, key)


def _key(tenant_id: UUID, text: str) -> ApiKey | None:
    with db.session([tenant_id]) as s:
        key = s.scalars(ApiKey.presented(text)).first()
        if key:
            key.was_used(s)
        return key


def refused(request: Request, kind: str, **who: str) -> None:
    """Count a refused access, and leave a line about it; a flood leaves a few."""
    metrics.security_events.labels(kind=kind).inc()
    if _refusals.allows():
        _log.warning("access_refused", kind=kind, request_id=request.scope.get("request_id"), **who)
