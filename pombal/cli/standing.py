"""How the sessions of channels stand: what is stored, and, if asked for, what their providers say now."""

import asyncio
from argparse import Namespace
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import select

from models import Channel, ChannelKind, Lease, Tenant, standing
from models.sync_report import LEASE
from pombal import db, log
from pombal.cli import as_json, say, table
from pombal.cli.admin import tenant_named
from pombal.settings import settings

_SECONDS = 58.0  # for all that are asked


def status(given: Namespace) -> int:
    """One row for each channel that has a session. `--check` asks in this process, and writes nothing."""
    only = tenant_named(given.tenant).id if given.tenant else None
    with db.session() as s:
        if only is None:
            db.see_all(s)
        else:
            db.see(s, [only])
        slugs = {row.id: row.slug for row in s.execute(select(Tenant.id, Tenant.slug))}
        query = select(Channel).where(Channel.kind != ChannelKind.META)
        found = list(s.scalars(query.where(Channel.tenant_id == only) if only else query))
        lease = s.get(Lease, LEASE)
    said = _asked(only) if given.check else {}
    rows = [_shown(row, slugs[row.tenant_id]) | said.get(row.id, {}) for row in found]
    rows.sort(key=lambda row: (row["tenant"], row["channel"]))
    if given.json:
        as_json(rows)
        return 0
    table([_line(row, is_checked=given.check) for row in rows], empty="no channels that have a session")
    if rows:
        say(f"last round over all: {_minute(lease.done_at) if lease and lease.done_at else 'none yet'}")
    return 0


def _asked(tenant_id: UUID | None) -> dict[UUID, dict[str, Any]]:
    """What the providers say now, by channel."""
    from workers._rounds import Round, new_loop  # imports the fleet
    from workers.status_sync import channels

    log.setup()
    rows, clock = channels(tenant_id=tenant_id)
    asked = Round(rows, clock, at_once=settings().status_sync_at_once, seconds=_SECONDS)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(asked.run(lambda _: None))
    return {
        id_: {"now": found.status or "unknown", "now_raw": found.raw, "now_reason": found.reason}
        for id_, found in asked.found.items()
    }


def _shown(row: Channel, slug: str) -> dict[str, Any]:
    return {
        "tenant": slug,
        "channel": row.name,
        "id": row.id,
        "kind": row.kind,
        "status": standing.shown(row.status, row.unknown_reason),
        "status_raw": row.status_raw,
        "status_since": row.status_since,
        "last_status": row.status,
        "unknown_since": row.unknown_since,
        "unknown_reason": row.unknown_reason,
        "silent_since": row.silent_since,
    }


def _line(row: dict[str, Any], *, is_checked: bool) -> dict[str, object]:
    """The same for a terminal."""
    notes = []
    if row["unknown_since"]:
        notes.append(f"{row['last_status'] or 'never known'} before; {row['unknown_reason']}")
    if row["silent_since"]:
        notes.append(f"silent since {_minute(row['silent_since'])}")
    if row.get("now_reason"):
        notes.append(f"now {row['now_reason']}")
    if row.get("now") not in (None, row["status"]):
        notes.append("differs")
    return {
        "channel": f"{row['tenant']}/{row['channel']}",
        "id": row["id"].hex[-8:],
        "kind": row["kind"],
        "status": row["status"],
        "since": _minute(row["unknown_since"] or row["status_since"]),
        **({"now": row.get("now", "not asked")} if is_checked else {}),
        "notes": "; ".join(notes),
    }


def _minute(at: datetime | None) -> str:
    return at.isoformat(timespec="seconds") if at else ""
