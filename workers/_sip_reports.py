"""Tell a backend how accounts stand: after their rows, never instead of them. No queue: the underscore.

What is told is how the account stands when it is told, so a report that was late or came twice is no untruth. One of an
account is under way at a time.
"""

import asyncio
from datetime import timedelta

from sqlalchemy import RowMapping

from models import SipRegistration
from pombal import db, log, metrics
from providers.sip_backend import NotTold, SipBackend
from workers._sip_outcomes import names_of

_log = log.get()

_MOST = 20  # at once
_CLAIM = timedelta(seconds=20)  # longer than a report takes
_SOON, _LATEST, _REFUSED = 5.0, 600.0, 3600.0  # seconds until the next try


async def tell(backend: SipBackend) -> bool:
    """Make the reports that are due; True when there may be more of them."""
    rows = await asyncio.to_thread(_claimed)
    await asyncio.gather(*(_report(backend, row) for row in rows))
    return len(rows) == _MOST


async def _report(backend: SipBackend, row: RowMapping) -> None:
    names = names_of(row)
    try:
        await backend.report(row["external_id"], row["status"], row["register_error"], row["last_register_at"])
    except Exception as error:
        if not isinstance(error, NotTold):  # a mistake of ours: not at once again, and no other waits for it
            _log.error("sip_report_broke", **names, traceback=log.redacted(error))
            error = NotTold("internal error; see the log", is_final=True)
        wait = _REFUSED if error.is_final else min(_LATEST, _SOON * 2 ** min(row["report_failures"], 10))
        await asyncio.to_thread(_not_taken, row, str(error), timedelta(seconds=wait))
        metrics.sip_reports.labels(outcome="failed").inc()
        _log.warning("sip_status_not_reported", **names, error=str(error), again_in=wait)
        return
    await asyncio.to_thread(_taken, row)
    metrics.sip_reports.labels(outcome="done").inc()
    _log.info("sip_status_reported", **names, status=row["status"])


def _claimed() -> list[RowMapping]:
    with db.session() as s:
        db.see_all(s)
        return list(SipRegistration.claim_reports(s, _MOST, _CLAIM))


def _taken(row: RowMapping) -> None:
    with db.session([row["tenant_id"]]) as s:
        SipRegistration.reported(s, row["tenant_id"], row["id"], row["report_revision"])


def _not_taken(row: RowMapping, error: str, wait: timedelta) -> None:
    with db.session([row["tenant_id"]]) as s:
        SipRegistration.not_reported(s, row["tenant_id"], row["id"], row["report_revision"], error, wait)
