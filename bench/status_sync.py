"""A round over 2,000 instances whose gateways take 200 ms each, beside a poller that asks one after the other.

    python bench/status_sync.py [--instances 2000] [--hosts 4] [--ms 200] [--at-once 16] [--sample 40] [--hanging 0]

The gateways are one process that plays as many hosts (`gateways.py`). `sequential` asks a sample of the same instances
with one client over one connection per host, one after the other and without a database, and is extrapolated to all of
them. Then come rounds as the fleet makes them, in this process: the first (all is news), a quiet one, one in which a
hundredth has changed, and a quiet one that is due, so spread over 45 s. After each, what it wrote is counted in the
tables: rows that another transaction wrote than before, and rows that are new.

`--hanging N`: as many hosts more, with as many instances as the others, that never answer.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import psycopg
from psycopg.types.json import Jsonb
from rig import HERE, Failed, Rig, rig

from pombal import log
from pombal.ids import uuid7
from pombal.secrets import seal
from pombal.settings import settings

TOKEN = "a-token"  # noqa: S105 - of nobody


class Instance(NamedTuple):
    host: str
    key: str


class Written(NamedTuple):
    """Rows by table, as the superuser sees them."""

    channels: dict[Any, int]
    counts: dict[str, int]

    def since(self, before: "Written") -> str:
        rewritten = sum(version != before.channels[id_] for id_, version in self.channels.items())
        new = {name: count - before.counts[name] for name, count in self.counts.items()}
        return ", ".join(f"{name} {count}" for name, count in {"channel": rewritten, **new}.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=2000, help="on the hosts that answer")
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--ms", type=int, default=200, help="that an answer takes")
    parser.add_argument("--at-once", type=int, default=16, help="STATUS_SYNC_AT_ONCE")
    parser.add_argument("--sample", type=int, default=40, help="instances that `sequential` asks")
    parser.add_argument("--hanging", type=int, default=0, help="hosts that never answer")
    given = parser.parse_args()
    with rig(20) as its, gateways(given) as hosts:
        os.environ |= {"MEDIA_ALLOWED_NETWORKS": "127.0.0.0/8", "STATUS_SYNC_AT_ONCE": str(given.at_once)}
        os.environ |= {"LOG_LEVEL": "ERROR", "TMPDIR": str(its.folder)}
        settings.cache_clear()
        log.setup()
        each = given.instances // given.hosts
        instances = [Instance(host, f"i-{n}-{m}") for n, host in enumerate(hosts) for m in range(each)]
        add(its, instances)
        living = instances[: each * given.hosts]
        print(f"{len(living)} instances on {given.hosts} hosts at {given.ms} ms, {given.at_once} at once", flush=True)
        sequential(living, given.sample)
        rounds(its, hosts, living)
    return 0


@contextmanager
def gateways(given: argparse.Namespace) -> Iterator[list[str]]:
    words = [str(given.hosts), str(given.ms / 1000), str(given.hanging)]
    command = [sys.executable, str(HERE / "gateways.py"), *words]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    try:
        yield [f"http://127.0.0.1:{port}" for port in server.stdout.readline().split()]
    finally:
        server.kill()
        server.wait()


def add(its: Rig, instances: list[Instance]) -> None:
    """A channel for each, spread over the tenants."""
    with its.superuser("pombal") as connection, connection.cursor() as cursor:
        tenants = [id_ for (id_,) in connection.execute("SELECT id FROM tenant ORDER BY id").fetchall()]
        rows = []
        for n, instance in enumerate(instances):
            id_ = uuid7()
            config = Jsonb({"host": instance.host, "instance_key": instance.key})
            rows.append((tenants[n % len(tenants)], id_, instance.key, config, seal(id_, {"token": TOKEN})))
        columns = "tenant_id, id, kind, name, config, sealed"
        cursor.executemany(f"INSERT INTO channel ({columns}) VALUES (%s, %s, 'megaapi', %s, %s, %s)", rows)  # noqa: S608
        connection.execute("ANALYZE")


def sequential(instances: list[Instance], count: int) -> None:
    step = max(1, len(instances) // count)
    sample = instances[::step][:count]
    with httpx.Client(headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False) as client:
        began = time.monotonic()
        for instance in sample:
            answer = client.get(f"{instance.host}/rest/instance/{instance.key}").json()
            if answer["instance"]["status"] != "connected":
                raise Failed("the gateway says something else")
        took = time.monotonic() - began
    whole = took / len(sample) * len(instances)
    print(f"sequential   {took:6.1f} s for {len(sample)}: extrapolated {whole:.0f} s for all", flush=True)


def rounds(its: Rig, hosts: list[str], living: list[Instance]) -> None:
    with its.superuser("pombal") as connection:
        one_round(connection, hosts, "first", living)
        one_round(connection, hosts, "quiet", living)
        changed = [instance.key for instance in living[::100]]
        httpx.get(f"{hosts[0]}/change/{','.join(changed)}", trust_env=False)
        one_round(connection, hosts, "1 % changed", living, disconnected=len(changed))
        one_round(connection, hosts, "due, quiet", living, disconnected=len(changed), is_due=True)


def one_round(
    connection: psycopg.Connection[Any],
    hosts: list[str],
    name: str,
    living: list[Instance],
    *,
    disconnected: int = 0,
    is_due: bool = False,
) -> None:
    from pombal import db
    from workers.status_sync import SyncReport, make

    httpx.get(f"{hosts[0]}/most", trust_env=False)
    before = written(connection)
    used, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()

    with db.session() as s:
        id_, _ = SyncReport.open(s, None, is_dry=False, is_due=is_due)
    make(id_)

    took, now = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    check(connection, living, disconnected)
    most = httpx.get(f"{hosts[0]}/most", trust_env=False).json()
    line = f"{name:<12} {took:6.1f} s, CPU {cpu:.1f} s, most at once {'/'.join(map(str, most))}"
    print(f"{line}; rows: {written(connection).since(before)}", flush=True)


def written(connection: psycopg.Connection[Any]) -> Written:
    channels = dict(connection.execute("SELECT id, xmin::text::bigint FROM channel WHERE kind = 'megaapi'").fetchall())
    counts = {}
    for table in ("event", "lane", "sync_report"):
        row = connection.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608
        counts[table] = row[0] if row else 0
    return Written(channels, counts)


def check(connection: psycopg.Connection[Any], living: list[Instance], disconnected: int) -> None:
    """Every instance that answers must be known, and be what its gateway says."""
    query = "SELECT status, count(*) FROM channel WHERE name = ANY(%s) AND unknown_since IS NULL GROUP BY 1"
    found = dict(connection.execute(query, [[instance.key for instance in living]]).fetchall())
    wanted = {"connected": len(living) - disconnected} | ({"disconnected": disconnected} if disconnected else {})
    if found != wanted:
        raise Failed(f"{found} instead of {wanted}")


if __name__ == "__main__":
    sys.exit(main())
