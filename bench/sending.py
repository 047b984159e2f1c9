"""How many messages a second are sent, and how soon a lone one leaves; beside the usual way, in the same run.

    python bench/sending.py [--messages 3000] [--lanes 1 20] [--latency 0 100] [--repeat 1] [--lone 50] [--profile]

`ours` is the fleet's worker, `usual` one Dramatiq message per message and a blocking client (`usual_send.py`). Both
send the same rows, each to a recipient of its own, to the same simulated Meta, with the limits of the numbers off. A
run ends when every row is sent; then the provider's journal must hold each text once.

`lone`: an idle fleet gets one message at a time; the time is from its commit to the provider.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from typing import NamedTuple
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb
from rig import SEED, Failed, Rig, cpu_seconds, free_port, rig, wait, wait_until_open
from throughput import profiled, say, statements

from pombal.ids import uuid7
from sandbox import client

_THREADS = {"ours": "4", "usual": "8"}  # what `pombal worker` and `dramatiq` start by default


class Run(NamedTuple):
    variant: str
    lanes: int
    latency: int
    per_second: float
    cpu: dict[str, float]  # milliseconds a message


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=3_000)
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--latency", type=int, nargs="+", default=[0, 100], help="milliseconds of the provider")
    parser.add_argument("--repeat", type=int, default=1, help="the table then shows medians")
    parser.add_argument("--only", nargs="+", choices=["ours", "usual"])
    parser.add_argument("--lone", type=int, default=50, help="messages, one at a time")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    port = free_port()
    os.environ["WHATSAPP_GRAPH_URL"] = f"http://127.0.0.1:{port}"
    with rig(max(given.lanes), statements=given.profile) as its, meta(its, port) as url:
        runs = []
        for _ in range(given.repeat):
            for lanes in given.lanes:
                for latency in given.latency:
                    for variant in given.only or ["usual", "ours"]:
                        count = given.messages if latency == 0 or variant == "ours" else given.messages // 3
                        runs.append(run(its, url, variant, lanes, latency, count, profile=given.profile))
                        say(line(runs[-1]))
        if given.repeat > 1 or not given.only:
            report(runs)
        if given.lone:
            lone(its, url, given.lone)
    return 0


@contextmanager
def meta(its: Rig, port: int) -> Iterator[str]:
    """A simulated Meta for all shops; it sends no statuses back."""
    apps = [
        {
            "url": "http://127.0.0.1:9/nobody",
            "app_secret": shop.secret,
            "verify_token": shop.secret,
            "channels": [
                {"name": shop.slug, "phone_number_id": shop.number.phone_number_id, "waba_id": shop.number.waba_id}
            ],
        }
        for shop in its.shops
    ]
    config = its.folder / "sandbox.json"
    config.write_text(json.dumps({"apps": apps}))
    words = ["-m", "sandbox", "--port", str(port), "--config", str(config)]
    with its.process("sandbox", "pombal", *words) as pid:
        wait_until_open(port)
        url = f"http://127.0.0.1:{port}"
        client.rules(url, statuses={"words": []})
        its.sandbox_pid = pid
        yield url


def run(its: Rig, url: str, variant: str, lanes: int, latency: int, count: int, *, profile: bool) -> Run:
    dbname = its.copy()
    client.clear_calls(url)
    client.clear_faults(url)
    if latency:
        client.faults(url, kind="latency", ms=latency)
    with its.superuser(dbname) as connection, started(its, variant, dbname) as pids:
        queued = queue(connection, lanes, count)
        pids |= {"postgres": its.postgres.pid, "valkey": its.valkey.pid, "sandbox": its.sandbox_pid}
        if its.statements:
            connection.execute("SELECT pg_stat_statements_reset()")
        before, began = cpu_seconds(pids), time.monotonic()

        with profiled(its.folder, pids) if profile else ExitStack():
            ring(its, variant, dbname, queued)
            wait(lambda: _is_sent(connection), "not all were sent", seconds=600, every=0.02)
            took = time.monotonic() - began
        after = cpu_seconds(pids)
        if its.statements:
            statements(its, dbname)
    texts = [call["text"] for call in client.calls(url, limit=100_000)["calls"] if call["outcome"] == "accepted"]
    if sorted(texts) != sorted(str(n) for n in range(count)):
        raise Failed(f"{count} were to be sent once each; the provider has {len(texts)}, {len(set(texts))} different")
    its.drop(dbname)
    cpu = {name: (after[name] - before[name]) * 1000 / count for name in pids}
    return Run(variant, lanes, latency, count / took, cpu)


@contextmanager
def started(its: Rig, variant: str, dbname: str) -> Iterator[dict[str, int]]:
    threads = ["--threads", _THREADS[variant]]
    stock = ["--queues", "usual_send", "--processes", "1", *threads, "--worker-shutdown-timeout", "20000"]
    words = {
        "ours": ["-m", "pombal", "worker", "outgoing_message", *threads],
        "usual": ["-m", "dramatiq", "usual_send:broker", *stock, "--skip-logging"],
    }[variant]
    with its.process("worker", dbname, *words) as pid:
        yield {"worker": pid}


def queue(connection: psycopg.Connection[object], lanes: int, count: int) -> list[tuple[UUID, UUID, UUID]]:
    """So many messages over so many channels, each to somebody else; `(tenant, channel, message)` of each."""
    rows = connection.execute("SELECT tenant_id, id FROM channel ORDER BY id LIMIT %s", [lanes]).fetchall()
    channels: list[tuple[UUID, UUID]] = [(row[0], row[1]) for row in rows]  # type: ignore[index]
    made = [(*channels[n % lanes], uuid7(), uuid7(), uuid7(), n) for n in range(count)]
    with connection.transaction(), connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO contact (tenant_id, id) VALUES (%s, %s)",
            [(tenant, person) for tenant, _, _, person, _, _ in made],
        )
        cursor.executemany(
            "INSERT INTO conversation (tenant_id, id, channel_id, contact_id) VALUES (%s, %s, %s, %s)",
            [(tenant, chat, channel, person) for tenant, channel, _, person, chat, _ in made],
        )
        cursor.executemany(
            """
            INSERT INTO message (tenant_id, id, channel_id, conversation_id, contact_id, direction, type, body, status,
                recipient, turn_at, due_at)
            VALUES (%s, %s, %s, %s, %s, 'out', 'text', %s, 'queued', %s, now(), now())
            """,
            [
                (tenant, id_, channel, chat, person, Jsonb({"text": {"body": str(n)}}), f"+55119{40_000_000 + n}")
                for tenant, channel, id_, person, chat, n in made
            ],
        )
        cursor.executemany(
            "INSERT INTO lane (tenant_id, channel_id, next_due_at) VALUES (%s, %s, now())"
            " ON CONFLICT (channel_id) DO UPDATE SET next_due_at = now()",
            channels,
        )
    connection.execute("ANALYZE")
    return [(tenant, channel, id_) for tenant, channel, id_, *_ in made]


def ring(its: Rig, variant: str, dbname: str, queued: list[tuple[UUID, UUID, UUID]]) -> None:
    """Enqueue what the web tier would."""
    if variant == "usual":
        from usual_send import usual_send  # needs the addresses in the environment

        for tenant, _, id_ in queued:
            usual_send.send(str(tenant), str(id_))
        return
    from workers import outgoing_message

    for channel in {channel for _, channel, _ in queued}:
        outgoing_message.send(str(channel))


def lone(its: Rig, url: str, count: int) -> None:
    """One message at a time, with pauses, in an idle fleet: from its commit to the provider's journal."""
    rng = Random(SEED)
    client.clear_faults(url)
    times = []
    dbname = its.copy()
    with its.superuser(dbname) as connection, started(its, "ours", dbname):
        for n in range(count + 3):
            time.sleep(rng.uniform(0.1, 0.5))
            client.clear_calls(url)
            queued = queue(connection, 1, 1)
            committed = time.time()
            ring(its, "ours", dbname, queued)
            wait(lambda: bool(client.calls(url)["calls"]), "it did not leave", 10, 0.005)
            if n >= 3:
                times.append(client.calls(url)["calls"][0]["at"] - committed)
            wait(lambda: _is_sent(connection), "it was not recorded", 10, 0.005)
    cuts = statistics.quantiles(times, n=100)
    say(f"lone message: commit to wire p50 {cuts[49] * 1000:.0f} ms, p99 {cuts[98] * 1000:.0f} ms, of {count}")


def _is_sent(connection: psycopg.Connection[object]) -> bool:
    return connection.execute("SELECT count(*) FROM message WHERE status <> 'sent'").fetchone() == (0,)


def line(run: Run) -> str:
    cpu = " ".join(f"{name} {ms:.2f}" for name, ms in run.cpu.items())
    what = f"{run.variant:6} {run.lanes:3} lanes, {run.latency:4} ms"
    return f"{what}: {run.per_second:6.0f}/s   CPU ms a message: {cpu}"


def report(runs: list[Run]) -> None:
    def rate(variant: str, lanes: int, latency: int) -> float:
        same = [r.per_second for r in runs if (r.variant, r.lanes, r.latency) == (variant, lanes, latency)]
        return statistics.median(same) if same else 0.0

    say()
    say("| lanes | provider answers after | usual way, messages/s | pombal, messages/s | ratio |")
    say("|---|---|---|---|---|")
    for lanes, latency in dict.fromkeys((r.lanes, r.latency) for r in runs):
        usual, ours = rate("usual", lanes, latency), rate("ours", lanes, latency)
        ratio = f"{ours / usual:.1f}" if usual else "–"
        say(f"| {lanes} | {latency} ms | {usual:.0f} | {ours:.0f} | {ratio} |")
    say()


if __name__ == "__main__":
    raise SystemExit(main())
