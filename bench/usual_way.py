"""The usual way to do the same: for each webhook one row, one Dramatiq message and one transaction.

    python bench/usual_way.py PORT                      its web tier
    dramatiq --path bench usual_way:broker …            its worker, with the options that `pombal worker` gives

The web handler proves the sender with the fleet's own code, commits one `delivery` row, enqueues its id and answers.
The actor reads the row, parses it and makes the same upserts, marks the row done, and commits. Same libraries, tables,
row-level security, parser, SQL, log lines and server.

Where there was a choice it was made in this baseline's favour: rows are inserted over a pool of asynchronous psycopg
connections, one statement each (quicker than an ORM session in a thread); the enqueue blocks the event loop for its one
round trip to Redis (quicker than a thread, if Redis is near); the broker is Dramatiq's stock one with its stock
middleware, which costs a round trip less than the fleet's; there is no claim, hence no second transaction.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypedDict
from uuid import UUID

import dramatiq
import psycopg
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import default_middleware
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from pombal import db, log, metrics
from pombal.broker import redis_client
from pombal.ids import uuid7
from pombal.middleware import JobMetrics, LogContext
from pombal.settings import settings
from web import RequestId
from web.errors import HANDLERS, Failure
from web.server import serve
from web.signatures import Apps, MiB, read_body, signer
from workers.incoming_message import Reading, Routes, apply_together, report

_CONNECTIONS = 16  # as in the fleet's pool

_INSERT = "INSERT INTO delivery (id, provider, app_id, request_id, raw) VALUES (%b, 'meta', %b, %b, %b)"
_READ = text("""
    SELECT id, provider, app_id, channel_id, request_id, raw, received_at, failures FROM delivery WHERE id = :id
""")
_DONE = text("UPDATE delivery SET state = :state, reason = :reason, finished_at = now() WHERE id = :id")

_log = log.get()
broker = RedisBroker(  # type: ignore[no-untyped-call] # Dramatiq leaves it untyped
    client=redis_client(), middleware=[LogContext(), JobMetrics(), *(kind() for kind in default_middleware)]
)
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name="usual_way", max_retries=3, min_backoff=1_000, max_backoff=8_000, broker=broker)
def usual_way(id_: str) -> None:
    began = time.monotonic()
    with db.session() as s:
        reading = Reading(s.execute(_READ, {"id": UUID(id_)}).mappings().one())
        routes = Routes(s, [reading])
        db.see(s, routes.tenants)
        apply_together(s, [reading], routes)
        routes.quarantine(reading)
        state, reason = reading.verdict()
        s.execute(_DONE, {"state": state, "reason": reason, "id": reading.id})
    report([reading], [], time.monotonic() - began)


Pool = asyncio.LifoQueue[psycopg.AsyncConnection[Any]]


class State(TypedDict):
    apps: Apps
    pool: Pool


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[State]:
    publisher = metrics.Publisher().start()
    pool: Pool = asyncio.LifoQueue()
    url = settings().require_database()
    for _ in range(_CONNECTIONS):
        pool.put_nowait(await psycopg.AsyncConnection.connect(url, autocommit=True, **db.CONNECT))
    yield {"apps": Apps(), "pool": pool}
    while not pool.empty():
        await pool.get_nowait().close()
    publisher.stop()


async def meta(request: Request) -> Response:
    began = time.monotonic()
    sender = await request.state.apps.get(request.path_params["app"])
    raw = await read_body(request, 4 * MiB)
    signed_by = signer(raw, request.headers.get("x-hub-signature-256", "").encode(), sender.secrets)
    if signed_by is None:
        raise Failure(401, "UNAUTHORIZED", "the signature does not match")
    id_, request_id = uuid7(), request.scope["request_id"]
    connection = await request.state.pool.get()
    try:
        await connection.execute(_INSERT, [id_, sender.app_id, request_id, raw])
    finally:
        request.state.pool.put_nowait(connection)
    usual_way.send(str(id_))
    metrics.webhook_requests.labels(provider="meta", outcome="accepted").inc()
    metrics.webhook_seconds.labels(provider="meta").observe(time.monotonic() - began)
    _log.info(
        "webhook_received",
        provider="meta",
        delivery_id=str(id_),
        request_id=request_id,
        app_id=str(sender.app_id),
        secret=signed_by,
        bytes=len(raw),
    )
    return PlainTextResponse("EVENT_RECEIVED")


app = Starlette(
    routes=[Route("/webhooks/whatsapp/{app}", meta, methods=["POST"])],
    middleware=[Middleware(RequestId)],
    exception_handlers=HANDLERS,
    lifespan=lifespan,
)


if __name__ == "__main__":
    log.setup()
    serve(app, "127.0.0.1", int(sys.argv[1]))
