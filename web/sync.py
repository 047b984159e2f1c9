"""How channels stand at their providers, asked for now: what differs, and the same written down.

Routes call no provider: a job makes the report (`workers/status_sync.py`), the route waits for its row a while.
"""

import asyncio
import time
from typing import Any
from uuid import UUID

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from models import ReportState, SyncReport
from pombal import db
from pombal.middleware import bell_may_be_lost
from pombal.settings import settings
from web.errors import Failure
from web.signatures import caller, is_token, refused
from workers.status_sync import status_sync

_PATIENCE = 5.0  # seconds that a request waits for its report
_FIRST_LOOK, _LAST_LOOK = 0.05, 0.4  # seconds between looks at it, more with each

_ringing: set["asyncio.Task[None]"] = set()  # so that they live until they are through


async def differences(request: Request) -> Response:
    """What differs between what is stored of the tenant's channels and what their providers say; nothing is written."""
    who = await caller(request, "channels:manage")
    return await _answer(who.tenant_id, is_dry=True)


async def apply(request: Request) -> Response:
    """The same, and what differs is written down."""
    who = await caller(request, "channels:manage")
    return await _answer(who.tenant_id, is_dry=False)


async def report(request: Request) -> Response:
    """A report of the tenant's own, later; 404 for a foreign one and a missing one alike (security-reliability.md
    T3)."""
    who = await caller(request, "channels:manage")
    try:
        found = await asyncio.to_thread(_found, UUID(request.path_params["id"]), who.tenant_id)
    except ValueError:
        found = None
    if found is None:
        refused(request, "unknown_id", tenant_id=str(who.tenant_id), key_id=str(who.key.id))
        raise Failure(404, "NOT_FOUND", "no such report")
    return JSONResponse(
        {
            "report_id": str(found.id),
            "state": found.state,
            "applies": not found.is_dry,
            "created_at": found.created_at.isoformat(),
            "finished_at": found.finished_at.isoformat() if found.finished_at else None,
            "result": _result(found),
            "error": found.error,
        }
    )


async def cron(request: Request) -> Response:
    """A round over all tenants' channels, for an outside cron with the operator's secret (S7). Of what was found it
    hears the numbers alone."""
    secret = settings().cron_secret
    if not secret:
        raise Failure(503, "UNAVAILABLE", "CRON_SECRET is not set")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if not is_token(given.strip() if scheme.lower() == "bearer" else "", secret.encode()):
        refused(request, "bad_cron_secret")
        raise Failure(401, "UNAUTHORIZED", "the cron secret is needed")
    made = await _made(None, is_dry=False)
    counts = {name: len(found) if isinstance(found, list) else found for name, found in (_result(made) or {}).items()}
    return _shown(made, {"report_id": str(made.id), "state": made.state, **counts})


async def _answer(tenant_id: UUID, *, is_dry: bool) -> Response:
    made = await _made(tenant_id, is_dry=is_dry)
    return _shown(made, made.result)


def _result(made: SyncReport) -> dict[str, Any] | None:
    """What it came to; nothing while it is on its way, though it may have found something."""
    return made.result if made.state == ReportState.DONE else None


def _shown(made: SyncReport, result: Any) -> Response:
    if made.state == ReportState.DONE:
        return JSONResponse(result)
    if made.state == ReportState.FAILED:
        raise Failure(503, "UNAVAILABLE", "the sync failed: ask again", details={"report_id": str(made.id)})
    return JSONResponse({"report_id": str(made.id), "state": made.state}, status_code=202)


async def _made(tenant_id: UUID | None, *, is_dry: bool) -> SyncReport:
    """The report that is on its way, or a new one, as it stands when it has ended or the time is up."""
    end = time.monotonic() + _PATIENCE
    id_, is_new = await asyncio.to_thread(_opened, tenant_id, is_dry)
    if is_new:  # else whoever made it has rung, or the sweep does
        # Beside the wait: while Redis is away that takes its time.
        ringing = asyncio.create_task(asyncio.to_thread(_ring, id_))
        _ringing.add(ringing)
        ringing.add_done_callback(_ringing.discard)
    look = _FIRST_LOOK
    while True:
        await asyncio.sleep(look)
        found = await asyncio.to_thread(_found, id_, tenant_id)
        if found is None:  # its tenant is gone
            raise Failure(404, "NOT_FOUND", "no such report")
        left = end - time.monotonic()
        if found.state in (ReportState.DONE, ReportState.FAILED) or left <= 0:
            return found
        look = min(look * 1.5, _LAST_LOOK, left)


def _opened(tenant_id: UUID | None, is_dry: bool) -> tuple[UUID, bool]:
    with db.session() as s:
        return SyncReport.open(s, tenant_id, is_dry=is_dry)


def _found(id_: UUID, tenant_id: UUID | None) -> SyncReport | None:
    with db.session() as s:
        return SyncReport.of(s, id_, tenant_id)


def _ring(id_: UUID) -> None:
    with bell_may_be_lost(report_id=str(id_)):
        status_sync.send(str(id_))
