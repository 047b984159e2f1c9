"""Which channel a gateway's webhook is for: the token in its URL or header, remembered by its hash for some seconds.

Gateways do not sign (megaapi.md, "Webhooks"), so the token is all the proof there is (security-reliability.md S6). Who
has none learns nothing: whatever they name, one look-up by a hash is made, and the answer is the same.
"""

import hmac
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import select
from starlette.requests import Request

from models import Tenant, WebhookToken
from pombal import db
from web.remembered import Remembered

_HEADER = b"x-webhook-token"
_BAILEYS_HEADERS = (_HEADER, b"x-api-key")


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

    def is_of(self, channel: str) -> bool:
        """Whether this channel, named by its id, is the token's own."""
        return hmac.compare_digest(channel.encode("utf-8", "surrogateescape"), str(self.channel_id).encode())


class Tokens:
    """The doors behind tokens, by their hashes."""

    def __init__(self) -> None:
        self._known = Remembered(_load, lambda door: door is not None)

    async def door(self, text: str | None) -> Door | None:
        """None for a token that does not exist, and, as late, for none at all. 503 when nobody knows."""
        digest = WebhookToken.digest_of(text or "")
        found = await self._known.get(digest)
        return found if found is not None and text and hmac.compare_digest(found.digest, digest) else None


def presented(request: Request) -> str | None:
    """The token of a request; None when it has none or several, in its URL and its header together."""
    return _only(request.query_params.getlist("token"), request, (_HEADER,))


def presented_to_baileys(request: Request) -> str | None:
    """The same, or as `x-api-key`. Evolution, told to name its events in the path, writes them behind the whole URL:
    `?token=…/messages-upsert`; no token has a slash."""
    given = [token.partition("/")[0] for token in request.query_params.getlist("token")]
    return _only(given, request, _BAILEYS_HEADERS)


def _only(given: list[str], request: Request, headers: tuple[bytes, ...]) -> str | None:
    given += [value.decode("latin-1") for name, value in request.scope["headers"] if name in headers]
    return given[0] if len(given) == 1 and given[0] else None


def _load(digest: bytes) -> Door | None:
    with db.session() as s:
        columns = (WebhookToken.digest, WebhookToken.channel_id, WebhookToken.tenant_id, Tenant.slug)
        query = select(*columns).join(Tenant, Tenant.id == WebhookToken.tenant_id)
        found = s.execute(query.where(WebhookToken.digest == digest)).first()
    return Door._make(found) if found else None
