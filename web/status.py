"""Channels, read-only: what customers and dashboards may see of their own."""

import asyncio
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import RowMapping, select
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from models import Channel, ChannelStatus, Hold, Lane, Lease, standing
from models.lane import LaneState
from models.sync_report import LEASE
from pombal import db
from web.errors import Failure
from web.signatures import caller, refused

_OPERATORS = ("auth",)  # settings that tell of the operator's own machines
_ROUND = timedelta(seconds=75)  # that a round takes at most


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
        found = list(s.scalars(query))
        if not found:
            return []
        lanes = {row["channel_id"]: row for row in Lane.overview(s, id_)}
        lease = s.get(Lease, LEASE)
        synced_at = lease.done_at if lease else None
        db.by_key(s)
        traffic = standing.last_traffic(s, tenant_id, [row.id for row in found])
        return [_shown(row, lanes.get(row.id), traffic[row.id], synced_at) for row in found]


def _shown(
    row: Channel, lane: RowMapping | None, last_traffic_at: datetime | None, synced_at: datetime | None
) -> dict[str, Any]:
    """Secrets are write-only: whether there are any is all that is shown (T6)."""
    return {
        "id": str(row.id),
        "kind": row.kind,
        "name": row.name,
        **{name: value for name, value in row.config.items() if name not in _OPERATORS},
        "has_secrets": row.sealed is not None,
        **_standing(row, synced_at),
        "sending": _sending(lane),
        "last_traffic_at": _at(last_traffic_at),
        "created_at": row.created_at.isoformat(),
    }


def _standing(row: Channel, synced_at: datetime | None) -> dict[str, Any]:
    """How its session stands; nulls for a kind that has none. `status` is what was last proven, also while it cannot be
    told (`unknown`).

    `status_checked_at`: a quiet round writes nothing, so what it found as it was counts as checked when it ended;
    unless the provider told something while it may have been under way, which makes its poll count for nothing.
    `last_seen_at`: when it was last known to be connected, to within one round.
    """
    status, is_known = row.status, row.status is not None and row.unknown_since is None
    if status is None and row.kind in standing.POLLED:
        status = ChannelStatus.UNKNOWN
    is_synced = row.kind in standing.POLLED and synced_at is not None
    if synced_at is not None and row.told_at is not None and row.told_at > synced_at - _ROUND:
        is_synced = False
    checked = (row.status_at, synced_at if is_synced else None)
    checked_at = max((at for at in checked if at is not None), default=None) if is_known else None
    if row.status == ChannelStatus.CONNECTED:
        seen_at = checked_at if is_known else row.unknown_since
    else:  # if anybody was ever logged in, until it was found disconnected
        seen_at = row.status_since if row.own_id is not None else None
    return {
        "status": status,
        "status_raw": row.status_raw,
        "status_since": _at(row.status_since),
        "status_checked_at": _at(checked_at),
        "unknown": {"since": _at(row.unknown_since), "reason": row.unknown_reason} if row.unknown_since else None,
        "silent_since": _at(row.silent_since),
        "last_seen_at": _at(seen_at),
    }


def _sending(lane: RowMapping | None) -> dict[str, Any]:
    """How sending goes; a channel that never had anything to send has no lane."""
    if lane is None:
        nothing = {"hold": None, "paused_until": None, "queued": 0, "unknown": 0, "oldest_queued_at": None}
        return {"state": LaneState.IDLE, **nothing}
    return {
        "state": lane["state"],
        "hold": _hold(lane) if lane["hold"] else None,
        "paused_until": _at(lane["paused_until"]),
        "queued": lane["queued"],
        "unknown": lane["unknown"],
        "oldest_queued_at": _at(lane["oldest_queued_at"]),
    }


def _hold(lane: RowMapping) -> dict[str, Any]:
    is_probed = lane["hold"] not in (Hold.OPERATOR, Hold.DISCONNECTED)
    return {
        "kind": lane["hold"],
        "code": lane["hold_code"],
        "reason": lane["hold_reason"],
        "since": _at(lane["held_at"]),
        "next_probe_at": _at(lane["next_probe_at"]) if is_probed else None,
    }


def _at(at: datetime | None) -> str | None:
    return at.isoformat() if at is not None else None
