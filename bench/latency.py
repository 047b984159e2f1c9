"""What a user or an operator would notice: a lone webhook's way to its row, an idle fleet's CPU, one poison in a batch.

    python bench/latency.py [--lone 50] [--idle 20] [--batches 15]

Runs on servers of its own, on loopback, and ends by itself.
"""

import argparse
import os
import socket
import statistics
import time
from random import Random
from typing import Any
from uuid import UUID

import psycopg
from rig import SEED, Failed, Rig, Shop, cpu_seconds, request, rig, wait
from throughput import say, started

from models import App, Delivery, DeliveryState
from pombal import db, log
from pombal.ids import uuid7
from pombal.settings import settings
from sandbox import meta, traffic

BATCH = 200
_MARK = "refuse this one"

_REFUSE = f"""
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.body::text LIKE '%{_MARK}%' THEN RAISE EXCEPTION 'refused'; END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER refuse BEFORE INSERT ON message FOR EACH ROW EXECUTE FUNCTION refuse();
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lone", type=int, default=50, help="webhooks, one at a time")
    parser.add_argument("--idle", type=float, default=20, help="seconds to watch a fleet that has nothing to do")
    parser.add_argument("--batches", type=int, default=15, help="batches of each kind")
    given = parser.parse_args()
    with rig(1) as its:
        dbname = its.copy()
        with started(its, "ours", dbname) as (port, pids):
            lone(its, dbname, port, given.lone)
            idle(its, pids, given.idle)
        poison(its, given.batches)
    return 0


def lone(its: Rig, dbname: str, port: int, count: int) -> None:
    """Post one webhook at a time, with pauses; time its answer, and its message's row as another session sees it."""
    rng = Random(SEED)
    answers, rows = [], []
    bodies = list(traffic.one_message(SEED, count + 3, [its.shops[0].number]))
    with its.superuser(dbname) as watcher, socket.create_connection(("127.0.0.1", port)) as web:
        for n, raw in enumerate(bodies):
            time.sleep(rng.uniform(0.1, 0.5))
            answer, row = _post(web, watcher, its.shops[0], raw)
            if n >= 3:  # the first ones open connections and load the app's secrets
                answers.append(answer)
                rows.append(row)
    for what, seconds in ("answer", answers), ("row", rows):
        say(f"lone webhook: {what:6} median {_ms(statistics.median(seconds))}, worst {_ms(max(seconds))}, of {count}")


def _post(web: socket.socket, watcher: psycopg.Connection[Any], shop: Shop, raw: bytes) -> tuple[float, float]:
    wamid = raw.partition(b'"id":"wamid.')[2].partition(b'"')[0].replace(b"\\/", b"/").decode()
    query = "SELECT EXISTS (SELECT FROM message WHERE provider_id = %s)"
    began = time.monotonic()
    web.sendall(request(shop, raw))
    answer = b""
    while not answer.endswith(b"EVENT_RECEIVED"):
        more = web.recv(4096)
        answer += more
        if not more or not b"HTTP/1.1 200".startswith(answer[:12]):
            raise Failed(f"a wrong answer: {answer[:300]!r}")
    answered = time.monotonic()
    wait(lambda: watcher.execute(query, [f"wamid.{wamid}"]).fetchone() == (True,), "no row came of it", 10, 0.001)
    return answered - began, time.monotonic() - began


def idle(its: Rig, pids: dict[str, int], seconds: float) -> None:
    pids = pids | {"postgres": its.postgres.pid, "valkey": its.valkey.pid}
    time.sleep(3)
    before, began = cpu_seconds(pids), time.monotonic()
    time.sleep(seconds)
    after, took = cpu_seconds(pids), time.monotonic() - began
    shares = {name: (after[name] - before[name]) / took for name in pids}
    each = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    say(f"idle fleet: {sum(shares.values()):.1%} of a core over {took:.0f} s ({each})")


def poison(its: Rig, count: int) -> None:
    """Time batches of 200 in this process, without and with one row that the database refuses."""
    os.environ["LOG_LEVEL"] = "ERROR"
    settings.cache_clear()
    log.setup()
    from workers import incoming_message  # needs the addresses in the environment

    with its.superuser("pombal") as connection:
        connection.execute(_REFUSE)
    times: dict[bool, list[float]] = {False: [], True: []}
    for n in range(2 * (count + 2)):
        is_poisoned = bool(n % 2)
        ids = _batch(its.shops[0], n, is_poisoned=is_poisoned)
        began = time.monotonic()
        incoming_message.fn(ids)
        seconds = time.monotonic() - began
        with db.session() as s:
            left = s.query(Delivery).filter(Delivery.state == DeliveryState.PENDING).count()
        if left != n // 2 + is_poisoned:
            raise Failed(f"after batch {n}, {left} rows are pending")
        if n >= 4:
            times[is_poisoned].append(seconds)
    clean, poisoned = (statistics.median(times[kind]) for kind in (False, True))
    say(f"batch of {BATCH}: {_ms(clean)} clean, {_ms(poisoned)} with one poison ({poisoned / clean:.1f} x), of {count}")
    db.engine().dispose()


def _batch(shop: Shop, n: int, *, is_poisoned: bool) -> list[str]:
    """Deliveries as the web tier leaves them."""
    bodies = list(traffic.one_message(SEED + n, BATCH, [shop.number], contacts=200))
    if is_poisoned:
        value = {"messages": [meta.text_message(f"wamid.{n}", "5511944440001", _MARK, traffic.START)]}
        change = meta.change(shop.number, "messages", value)
        bodies[Random(n).randrange(BATCH)] = meta.encode(meta.envelope([meta.entry(shop.number.waba_id, [change])]))
    ids: list[UUID] = []
    with db.session() as s:
        app = s.scalars(App.by_slug(shop.slug)).one()
        for raw in bodies:
            ids.append(uuid7())
            s.add(Delivery(id=ids[-1], provider="meta", app_id=app.id, request_id=ids[-1].hex, raw=raw))
    return [str(id_) for id_ in ids]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


if __name__ == "__main__":
    raise SystemExit(main())
