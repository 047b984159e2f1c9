"""Alive, ready, and the fleet's numbers."""

import asyncio
import hmac
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import redis
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from models import ChannelStatus, Hold, Lane, Media, Repair, RepairPause, SipRegistration, standing
from models.lane import LaneState
from models.sync_report import LEASE
from pombal import db, metrics
from pombal.broker import broker
from pombal.settings import settings
from web.errors import Failure

_LOOPBACK = ("127.0.0.1", "::1")


async def health(request: Request) -> Response:
    """Alive: touches nothing (security-reliability.md N2)."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """200 when Postgres answers and migrations are current. The words are for loopback and the token's bearer."""
    try:
        async with asyncio.timeout(2):
            missing, notes = await asyncio.to_thread(_missing)
    except TimeoutError:
        missing, notes = ["the database does not answer in time"], []
    content: dict[str, object] = {"status": "unavailable" if missing else "ready"}
    if _may_look(request):
        content |= {"missing": missing, "notes": notes}
    return JSONResponse(content, status_code=503 if missing else 200)


async def fleet_metrics(request: Request) -> Response:
    """Prometheus for the whole fleet. Outside loopback it takes `METRICS_TOKEN`; without one set it is not there."""
    if not _may_look(request):
        if not settings().metrics_token:
            raise Failure(404, "NOT_FOUND", "not found")
        raise Failure(401, "UNAUTHORIZED", "the metrics token is needed")
    content = await asyncio.to_thread(_measured)
    return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")


def _may_look(request: Request) -> bool:
    token = settings().metrics_token
    given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    if token and hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode()):
        return True
    # A proxy on this host speaks for others. The header is not believed, only that there is one.
    is_forwarded = any(name in request.headers for name in ("x-forwarded-for", "forwarded", "x-real-ip"))
    return not is_forwarded and request.client is not None and request.client.host in _LOOPBACK


@cache
def newest_migration() -> str:
    """The revision that this code was written for."""
    config = Config(toml_file=str(Path(__file__).parent.parent / "pyproject.toml"))
    return ScriptDirectory.from_config(config).get_current_head() or ""


def _missing() -> tuple[list[str], list[str]]:
    """What keeps this process from accepting, and what else an operator should know; in words."""
    missing, notes = [], []
    try:
        with db.session() as s:
            version = s.scalar(text("SELECT version_num FROM alembic_version"))
        if version != newest_migration():
            missing.append("migrations are not current: run `pombal migrate`")
    except Exception as error:
        if db.is_store_trouble(error):
            missing.append("the database is away")
        else:
            missing.append("the database has no tables yet: run `pombal migrate`")
    try:
        client = metrics.client_for_metrics()
        client.ping()
    except redis.RedisError:
        notes.append("the queue is away: bodies are accepted and wait as rows")
    return missing, notes


def _measured() -> bytes:
    """The sum over all processes, and what is measured now: waiting rows, queue depths, dead letters."""
    client = metrics.client_for_metrics()
    families, is_complete = metrics.fleet(client)
    gauges = [metrics.gauge("pombal_metrics_complete", "Whether all hosts could be asked.", [({}, float(is_complete))])]
    try:
        with db.session() as s:
            gauges.extend(_from_rows(s))
    except Exception as error:
        if not db.is_store_trouble(error):
            raise
    try:
        depths = list(_queue_depths(client))
        gauges.append(metrics.gauge("pombal_queue_messages", "Messages in the queues, by state.", depths))
    except redis.RedisError:
        pass  # said by `pombal_metrics_complete 0`
    return metrics.exposition([*families, *gauges])


def _from_rows(s: Session) -> Iterator[metrics.Family]:
    db.see_all(s)
    coming, going = s.execute(_COMING).one(), Lane.waiting(s)
    files = Media.waiting(s)
    lines = (("incoming_message", coming), ("outgoing_message", going), ("download_media", files))
    by_queue = [({"queue": queue}, row) for queue, row in lines]
    yield metrics.gauge("pombal_pending", "Rows that wait for work.", [(q, float(row.pending)) for q, row in by_queue])
    yield metrics.gauge(
        "pombal_oldest_pending_seconds",
        "Age of the oldest waiting row.",
        [(q, float(row.oldest)) for q, row in by_queue],
    )
    if files.nearest is not None:
        yield metrics.gauge(
            "pombal_media_deadline_seconds",
            "Time to the nearest deadline of a file that is not fetched yet.",
            [({}, float(files.nearest))],
        )
    yield metrics.gauge("pombal_scheduled", "Messages to be sent later.", [({}, float(going.scheduled))])
    yield metrics.gauge(
        "pombal_unknown_messages", "Sent, perhaps: nobody told what became of them.", [({}, float(going.unknown))]
    )
    states, holds = Lane.in_states(s), Lane.on_hold(s)
    yield metrics.gauge(
        "pombal_lanes", "Channels that send, by state.", [({"state": n}, float(states.get(n, 0))) for n in LaneState]
    )
    yield metrics.gauge(
        "pombal_lanes_held", "Channels whose sending is held.", [({"hold": n}, float(holds.get(n, 0))) for n in Hold]
    )
    lag = s.scalar(text("SELECT extract(epoch FROM now() - max(done_at)) FROM lease WHERE name = 'sweep'"))
    if lag is not None:
        yield metrics.gauge(
            "pombal_clock_lag_seconds", "Time since a sweep last ended a round without a failure.", [({}, float(lag))]
        )
    yield from _standings(s)
    yield from _repairs(s)
    yield from _accounts(s)
    letters = s.execute(text("SELECT actor, count(*) FROM dead_letter WHERE state = 'open' GROUP BY actor"))
    known = broker.get_declared_actors()
    samples: dict[str, float] = dict.fromkeys(sorted(known), 0)  # so that a first one is seen to come
    for actor, count in letters:
        name = actor if actor in known else "unknown"
        samples[name] = samples.get(name, 0) + count
    yield metrics.gauge(
        "pombal_dead_letters",
        "Dead letters that wait for an operator.",
        [({"actor": name}, count) for name, count in samples.items()],
    )


def _standings(s: Session) -> Iterator[metrics.Family]:
    counts = {(str(kind), str(status)): 0.0 for kind in standing.POLLED for status in ChannelStatus}
    counts |= {(kind, status): float(channels) for kind, status, channels in standing.in_statuses(s)}
    yield metrics.gauge(
        "pombal_channels",
        "Channels with a session, by how it stands; unknown: nobody could tell when last asked.",
        [({"provider": kind, "status": status}, count) for (kind, status), count in counts.items()],
    )
    silent = float(standing.silent_count(s))
    yield metrics.gauge(
        "pombal_channels_silent", "Connected channels without any traffic for their time.", [({}, silent)]
    )
    age = s.scalar(_SYNC_AGE, {"name": LEASE, "kinds": list(standing.POLLED)})
    if age is not None:
        yield metrics.gauge(
            "pombal_sync_age_seconds",
            "Time since a round over all channels' states ended; before the first, since there are such channels.",
            [({}, float(age))],
        )


def _repairs(s: Session) -> Iterator[metrics.Family]:
    states, pauses = Repair.in_states(s), RepairPause.counts(s)
    yield metrics.gauge(
        "pombal_repair_incidents",
        "Sessions with an incident; stopped: in the middle of a step, perhaps without a socket; waiting: for a person.",
        [({"state": name}, float(states.get(name, 0))) for name in ("open", "stopped", "waiting")],
    )
    yield metrics.gauge(
        "pombal_repairs_paused",
        "Pauses of repairs, of all and of single channels.",
        [({"kind": kind}, float(count)) for kind, count in pauses.items()],
    )


def _accounts(s: Session) -> Iterator[metrics.Family]:
    seen = SipRegistration.overview(s)
    yield metrics.gauge(
        "pombal_sip_registrations",
        "SIP accounts, by how each stands now; disabled: not to be registered.",
        [({"status": name}, float(seen[name])) for name in ("pending", "registered", "failed", "disabled")],
    )
    if seen["next_refresh"] is not None:
        yield metrics.gauge(
            "pombal_sip_next_refresh_seconds",
            "Time to the next REGISTER of any SIP account that does not wait for drachtio; negative: it is late.",
            [({}, seen["next_refresh"])],
        )
    yield metrics.gauge(
        "pombal_sip_unregistered_seconds",
        "Time that the enabled SIP account without a binding for the longest has been without; 0: all have one.",
        [({}, seen["unregistered"])],
    )
    yield metrics.gauge(
        "pombal_sip_unreported_seconds", "Time that a report to the backend waits.", [({}, seen["unreported"])]
    )


_SYNC_AGE = text("""
    SELECT extract(epoch FROM now() - coalesce(
        (SELECT done_at FROM lease WHERE name = :name), (SELECT min(created_at) FROM channel WHERE kind = ANY(:kinds))
    ))
""")

_COMING = text("""
    SELECT count(*) AS pending, coalesce(extract(epoch FROM now() - min(received_at)), 0) AS oldest
    FROM delivery WHERE state = 'pending'
""")


def _queue_depths(client: redis.Redis) -> Iterator[tuple[dict[str, str], float]]:
    for queue in sorted(broker.get_declared_queues()):
        for state, key in (("ready", f"{queue}.msgs"), ("delayed", f"{queue}.DQ.msgs"), ("dead", f"{queue}.XQ.msgs")):
            yield {"queue": queue, "state": state}, float(client.hlen(f"dramatiq:{key}"))
