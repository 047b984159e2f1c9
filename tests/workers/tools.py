"""What the tests of this folder share: running things at once, waiting for a condition, looking at what was stored."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

from pombal import db
from pombal.ids import uuid7
from pombal.middleware import is_store_trouble
from tests.factories import Shop, a_shop, all_of, rows, superuser
from workers import incoming_message

PATIENCE = 60.0  # seconds; how long a condition may take on a busy machine, never how long it should


def another_number(shop: Shop, **config: Any) -> Shop:
    """A second channel of the same tenant and app."""
    return a_shop(shop.tenant, app=shop.app.slug, app_secret=None, verify_token=None, **config)


def shared_shops(count: int) -> list[Shop]:
    """Numbers of as many tenants behind one app, which belongs to none of them."""
    first = a_shop()
    with superuser() as connection:
        connection.execute("UPDATE app SET tenant_id = NULL WHERE id = %s", [first.app.id])
    return [first, *(a_shop(app=first.app.slug, app_secret=None, verify_token=None) for _ in range(count - 1))]


def deliveries(shop: Shop, bodies: Iterable[bytes]) -> list[UUID]:
    """Bodies as the web tier leaves them, in one commit: pending, and their bells not yet rung."""
    raws = list(bodies)
    ids = [uuid7() for _ in raws]
    with superuser() as connection:
        connection.execute(
            """
            INSERT INTO delivery (id, provider, app_id, request_id, raw)
            SELECT id, 'meta', %s, id::text, raw FROM unnest(%s::uuid[], %s::bytea[]) AS given (id, raw)
            """,
            [shop.app.id, ids, raws],
        )
    return ids


def run(ids: Sequence[UUID]) -> None:
    """One job."""
    incoming_message([str(id_) for id_ in ids])


def run_all(ids: Sequence[UUID], *, batch: int = 200, threads: int = 8) -> None:
    """Jobs of `batch` ids each, from several threads at once, until none of the rows is pending.

    More rounds than one happen: a late job may take other rows than those it was rung for.
    """
    left = list(ids)
    for _ in range(5):
        jobs = [left[n : n + batch] for n in range(0, len(left), batch)]
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(run, job) for job in jobs]:
                error = done.exception()
                if error and not is_store_trouble(error):  # as the queue does: that one is tried again
                    raise error
        left = [id_ for id_, state in states(left).items() if state == "pending"]
        if not left:
            return
    raise AssertionError(f"{len(left)} deliveries are still pending")


def states(ids: Iterable[UUID]) -> dict[UUID, str]:
    """The state of each delivery."""
    with db.session() as s:
        found = all_of(s, "SELECT id, state FROM delivery WHERE id = ANY(:ids)", ids=list(ids))
    return {row["id"]: row["state"] for row in found}


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Run the calls at once, each in a thread of its own; their results, or the first error."""
    gate = threading.Barrier(len(calls))

    def start(call: Callable[[], Any]) -> Any:
        gate.wait(PATIENCE)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        running = [pool.submit(start, call) for call in calls]
    return [one.result() for one in running]


def in_background(call: Callable[[], Any]) -> Callable[[], Any]:
    """Start the call in a thread; the returned function waits for its end and gives its result or raises its error."""
    pool = ThreadPoolExecutor(1)
    running = pool.submit(call)
    pool.shutdown(wait=False)
    return lambda: running.result(PATIENCE)


def until(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Wait for a condition to be true, and return its value."""
    end = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)
    return value


def until_somebody_waits_for_a_lock() -> None:
    """Wait for a transaction of the app to stand behind another one's."""
    with superuser() as connection:
        until(
            lambda: (
                connection.execute(
                    "SELECT FROM pg_stat_activity WHERE usename = 'pombal' AND wait_event_type = 'Lock'"
                ).rowcount
            ),
            "a transaction that waits for a lock",
        )


def messages(shop: Shop) -> list[dict[str, Any]]:
    return rows(shop, "SELECT * FROM message WHERE channel_id = :channel ORDER BY provider_id", channel=shop.channel.id)


def message(shop: Shop, wamid: str) -> dict[str, Any]:
    """The one row of a message."""
    (found,) = rows(
        shop,
        "SELECT * FROM message WHERE channel_id = :channel AND provider_id = :wamid",
        channel=shop.channel.id,
        wamid=wamid,
    )
    return found


def contacts(shop: Shop) -> list[dict[str, Any]]:
    """Everybody the tenant knows."""
    return rows(shop, "SELECT id, name, named_at FROM contact ORDER BY id")


def identities(shop: Shop) -> dict[tuple[str, str], UUID]:
    """Who has which identity on the shop's channel."""
    found = rows(shop, "SELECT kind, value, contact_id FROM contact_identity WHERE channel_id = :c", c=shop.channel.id)
    return {(row["kind"], row["value"]): row["contact_id"] for row in found}


def letters(*ids: UUID) -> list[dict[str, Any]]:
    """The dead letters of deliveries, as an operator of the fleet sees them."""
    with superuser() as connection:
        found = connection.execute(
            """
            SELECT tenant_id, delivery_id, path, error, failures, count, state, traceback, args FROM dead_letter
            WHERE delivery_id = ANY(%s) ORDER BY delivery_id, path NULLS FIRST
            """,
            [list(ids)],
        )
        names = [column.name for column in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found]


def totals(shop: Shop) -> dict[str, Any]:
    """Everything a tenant has, in numbers and states: equal before and after whatever had no effect."""
    return {
        table: rows(shop, f"SELECT * FROM {table} ORDER BY {table}::text")  # noqa: S608 - names of ours
        for table in (
            "contact",
            "contact_identity",
            "conversation",
            "event",
            "media",
            "message",
            "message_status",
            "seen",
            "template",
        )
    }
