"""Channels, read-only: what customers and dashboards may see of their own."""

import asyncio
from typing import Any
from uuid import UUID

from sqlalchemy import select
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from models import Channel
from pombal import db
from web.errors import Failure
from web.signatures import caller, refused


async def channels(request: Request) -> Response:
    """The tenant's channels, by name."""
    who = await caller(request, "channels:manage")
    rows = await asyncio.to_thread(_channels, who.tenant_id)
    return JSONResponse({"data": rows})


async def channel(request: Request) -> Response:
    """One channel; 404 for a foreign one and a missing one alike (security-reliability.md T3)."""
    who = await caller(request, "channels:manage")
    try:
        id_ = UUID(request.path_params["id"])
        rows = await asyncio.to_thread(_channels, who.tenant_id, id_)
    except ValueError:
        rows = []
    if not rows:
        refused(request, "unknown_id", tenant_id=str(who.tenant_id), key_id=str(who.key.id))
        raise Failure(404, "NOT_FOUND", "no such channel")
    return JSONResponse(rows[0])


def _channels(tenant_id: UUID, id_: UUID | None = None) -> list[dict[str, Any]]:
    query = select(Channel).where(Channel.tenant_id == tenant_id).order_by(Channel.name)
    if id_:
        query = query.where(Channel.id == id_)
    with db.session([tenant_id]) as s:
        return [_shown(row) for row in s.scalars(query)]


def _shown(row: Channel) -> dict[str, Any]:
    """Secrets are write-only: whether there are any is all that is shown (T6)."""
    return {
        "id": str(row.id),
        "kind": row.kind,
        "name": row.name,
        **row.config,
        "has_secrets": row.sealed is not None,
        "created_at": row.created_at.isoformat(),
    }
