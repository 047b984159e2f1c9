"""Which channel a gateway's webhook is for: the token in its URL or header, remembered by its hash for some seconds.

Gateways do not sign (megaapi.md, "Webhooks"), so the token is all the proof there is (security-reliability.md S6). Who
has none learns nothing: whatever they name, one look-up by a hash is made, and the answer is the same.
"""

import asyncio
import hmac
import time
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import select
from starlette.requests import Request

from models import Tenant, WebhookToken
from pombal import db
from web.errors import Failure

_HEADER = b"x-webhook-token"
_KNOWN_FOR = 10.0  # seconds a token is believed without asking the database: a revoked one stops within that time
_ASK_AGAIN = 2.0  # … and more while it is being asked, or has not answered
_SECONDS_TO_ASK, _SECONDS_TO_REFRESH = 2.5, 0.3  # the second leaves a request its time for the commit (W3)


class Door(NamedTuple):
    """A token that is there: its hash, its channel, and the tenant that it belongs to, by id and slug."""

    digest: bytes
    channel_id: UUID
    tenant_id: UUID
    slug: str

    def opens_for(self, organization: str) -> bool:
        """Whether this organization is the token's own; it may be named by slug or id."""
        given = organization.encode("utf-8", "surrogateescape")
        names = (self.slug.encode(), str(self.tenant_id).encode())
        matches = [hmac.compare_digest(given, name) for name in names]
        return any(matches)


class Tokens:
    """The doors behind tokens, remembered for some seconds, and longer while Postgres is away."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[float, Door]] = {}

    async def door(self, text: str | None) -> Door | None:
        """None for a token that does not exist, and, as late, for none at all. 503 when nobody knows."""
        digest = WebhookToken.digest_of(text or "")
        known = self._known.get(digest)
        if known and time.monotonic() - known[0] < _KNOWN_FOR:
            return known[1]
        if known:  # one request asks, the others go on with what is known
            self._known[digest] = (time.monotonic() - _KNOWN_FOR + _ASK_AGAIN, known[1])
        try:
            async with asyncio.timeout(_SECONDS_TO_REFRESH if known else _SECONDS_TO_ASK):
                found = await asyncio.to_thread(_load, digest)
        except Exception as error:
            if not (isinstance(error, TimeoutError) or db.is_store_trouble(error)):
                raise
            if known:
                return known[1]
            raise Failure(503, "UNAVAILABLE", "the database is away", retry_after=5) from None
        if found is None or not text or not hmac.compare_digest(found.digest, digest):
            self._known.pop(digest, None)  # strangers' guesses must not fill the memory
            return None
        self._known[digest] = (time.monotonic(), found)
        return found


def presented(request: Request) -> str | None:
    """The token of a request; None when it has none or several, in its URL and its header together."""
    given = request.query_params.getlist("token")
    given += [value.decode("latin-1") for name, value in request.scope["headers"] if name == _HEADER]
    return given[0] if len(given) == 1 and given[0] else None


def _load(digest: bytes) -> Door | None:
    with db.session() as s:
        columns = (WebhookToken.digest, WebhookToken.channel_id, WebhookToken.tenant_id, Tenant.slug)
        query = select(*columns).join(Tenant, Tenant.id == WebhookToken.tenant_id)
        found = s.execute(query.where(WebhookToken.digest == digest)).first()
    return Door._make(found) if found else None
