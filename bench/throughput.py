"""How many webhooks a second are accepted, and how many become committed rows; against two baselines in the same run.

    python bench/throughput.py [--bodies 20000] [--connections 50 200] [--repeat 3] [--only ours …] [--profile]

`ours` is the fleet: web, worker and clock. `usual` is one Dramatiq message and one transaction per webhook
(`usual_way.py`). `bare` answers and does nothing (`bare.py`): the ceiling of the server and of the load generator.
Every run has a fresh copy of the same database, and its rows are counted at its end: a wrong count ends the script.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
from load import Seen
from rig import (
    HERE,
    Failed,
    Rig,
    cpu_seconds,
    free_port,
    requests_for,
    rig,
    wait,
    wait_until_open,
    wait_until_ready,
    written,
)

WARM_UP = 500  # bodies sent before the clock starts: connections, imports and caches are there
_DRAIN_SECONDS = 600.0
_WORKER = ("--processes", "1", "--threads", "4")  # what `pombal worker` starts by default


class Run(NamedTuple):
    """One variant under one load."""

    variant: str
    connections: int
    accepted: float  # a second
    committed: float  # a second; 0 where nothing is kept
    p50: float  # seconds from a request to its answer
    p99: float
    cpu: dict[str, float]  # milliseconds per body


def main() -> int:
    given = arguments()
    variants = given.only or ["bare", "usual", "ours"]
    with rig(given.tenants, statements=given.profile) as its:
        requests = requests_for(its.shops, WARM_UP + given.bodies, given.contacts)
        file = written(its.folder, requests)
        expected = counts(requests)
        runs = []
        for _ in range(given.repeat):
            for connections in given.connections:
                for variant in variants:
                    runs.append(run(its, variant, connections, file, given.bodies, expected, profile=given.profile))
                    say(line(runs[-1]))
    if not given.profile:
        say()
        report(runs, given.connections, variants)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bodies", type=int, default=20_000)
    parser.add_argument("--connections", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--tenants", type=int, default=10)
    parser.add_argument("--contacts", type=int, default=2_000, help="of all tenants together")
    parser.add_argument("--repeat", type=int, default=1, help="the table then shows medians")
    parser.add_argument("--only", nargs="+", choices=["ours", "usual", "bare"])
    parser.add_argument("--profile", action="store_true", help="say where the time goes (py-spy if it is on PATH)")
    return parser.parse_args()


def counts(requests: list[bytes]) -> dict[str, int]:
    """The rows that must be there at the end, read from the requests themselves."""
    people, wamids = set(), set()
    for request in requests:
        value = json.loads(request.partition(b"\r\n\r\n")[2])["entry"][0]["changes"][0]["value"]
        contact = value["contacts"][0]
        people.add((value["metadata"]["phone_number_id"], contact.get("user_id"), contact.get("wa_id")))
        wamids.add(value["messages"][0]["id"])
    n = len(wamids)
    return {"delivery": len(requests), "message": n, "event": n, "unread": n, "conversation": len(people)}


def run(
    its: Rig, variant: str, connections: int, file: Path, bodies: int, expected: dict[str, int], *, profile: bool
) -> Run:
    """Start the variant on a database of its own, load it, wait for the last commit, count, and stop it."""
    dbname = its.copy()
    with started(its, variant, dbname) as (port, pids):
        keeps = variant != "bare"
        with its.superuser(dbname) as connection:

            def nothing_waits() -> bool:
                row = connection.execute("SELECT EXISTS (SELECT FROM delivery WHERE state = 'pending')").fetchone()
                return row == (False,)

            load(port, connections, file, 0, WARM_UP)
            if keeps:
                wait(nothing_waits, "the warm-up was not worked off")
            if its.statements:
                connection.execute("SELECT pg_stat_statements_reset()")
            pids |= {"postgres": its.postgres.pid, "valkey": its.valkey.pid}
            before = cpu_seconds(pids)
            with profiled(its.folder, pids) if profile else ExitStack():
                seen = load(port, connections, file, WARM_UP, bodies)
                if keeps:
                    wait(nothing_waits, "not all were worked off", seconds=_DRAIN_SECONDS, every=0.02)
                ended = time.monotonic()
            after = cpu_seconds(pids)
            if keeps:
                check(its, dbname, expected)
            if its.statements:
                statements(its, dbname)
    its.drop(dbname)
    cpu = {name: (after[name] - before[name]) * 1000 / bodies for name in pids} | {"load": seen.cpu * 1000 / bodies}
    latencies = statistics.quantiles(seen.latencies, n=100)
    return Run(
        variant,
        connections,
        bodies / (seen.ended - seen.began),
        bodies / (ended - seen.began) if keeps else 0.0,
        latencies[49],
        latencies[98],
        cpu,
    )


@contextmanager
def started(its: Rig, variant: str, dbname: str) -> Iterator[tuple[int, dict[str, int]]]:
    """The variant's processes, ready; gives its port and their ids."""
    port = free_port()
    web = {
        "ours": ["-m", "pombal", "web", "--host", "127.0.0.1", "--port", str(port)],
        "usual": [str(HERE / "usual_way.py"), str(port)],
        "bare": [str(HERE / "bare.py"), str(port)],
    }
    stock = ["--queues", "usual_way", *_WORKER, "--worker-shutdown-timeout", "20000", "--skip-logging"]
    others = {
        "ours": {
            "worker": ["-m", "pombal", "worker", "incoming_message", *_WORKER],
            "clock": ["-m", "pombal", "clock"],
        },
        "usual": {"worker": ["-m", "dramatiq", "usual_way:broker", *stock]},
        "bare": {},
    }
    with ExitStack() as running:
        pids = {
            name: running.enter_context(its.process(name, dbname, *words))
            for name, words in {"web": web[variant], **others[variant]}.items()
        }
        wait_until_open(port)
        if variant == "ours":
            wait_until_ready(port)
        yield port, pids


def load(port: int, connections: int, file: Path, first: int, count: int) -> Seen:
    result = file.with_suffix(".seen")
    words = [str(port), str(connections), str(file), str(first), str(count), str(result)]
    if subprocess.call([sys.executable, str(HERE / "load.py"), *words]):
        raise Failed("the load generator broke")
    seen = msgspec.msgpack.decode(result.read_bytes(), type=Seen)
    if seen.wrong or len(seen.latencies) != count:
        raise Failed(f"{len(seen.latencies)} of {count} were accepted; a wrong answer: {seen.wrong}")
    return seen


def check(its: Rig, dbname: str, expected: dict[str, int]) -> None:
    """Every body became what it should, once."""
    with its.superuser(dbname) as connection:
        found = {}
        for name, query in {
            "delivery": "SELECT count(*) FROM delivery WHERE state = 'done' AND reason IS NULL",
            "message": "SELECT count(DISTINCT (tenant_id, provider_id)) FROM message",
            "event": "SELECT count(*) FROM event WHERE type = 'message_received'",
            "unread": "SELECT sum(unread_count) FROM conversation",
            "conversation": "SELECT count(*) FROM conversation",
        }.items():
            row = connection.execute(query).fetchone()
            found[name] = int(row[0] or 0) if row else 0
    if found != expected:
        raise Failed(f"expected {expected}, found {found}")


# ------------------------------------------------------------------------------------------------------------ showing


def line(run: Run) -> str:
    cpu = " ".join(f"{name} {ms:.2f}" for name, ms in run.cpu.items())
    return (
        f"{run.variant:6} {run.connections:4} connections: accepted {run.accepted:7.0f}/s  committed "
        f"{run.committed:6.0f}/s  p50 {run.p50 * 1000:6.1f} ms  p99 {run.p99 * 1000:6.1f} ms  CPU ms/body: {cpu}"
    )


def report(runs: list[Run], connections: list[int], variants: list[str]) -> None:
    """A Markdown table of medians, and the ratios."""
    medians = {
        (v, c): median([r for r in runs if (r.variant, r.connections) == (v, c)]) for c in connections for v in variants
    }
    say("| variant | connections | accepted/s | committed/s | p50 ms | p99 ms | CPU ms per body |")
    say("|---|---|---|---|---|---|---|")
    for run in medians.values():
        committed = f"{run.committed:.0f}" if run.committed else "–"
        cpu = ", ".join(f"{name} {ms:.2f}" for name, ms in run.cpu.items())
        say(
            f"| {run.variant} | {run.connections} | {run.accepted:.0f} | {committed} "
            f"| {run.p50 * 1000:.1f} | {run.p99 * 1000:.1f} | {cpu} |"
        )
    say()
    for number in connections:
        if {"ours", "usual"} <= set(variants):
            ratio = medians["ours", number].committed / medians["usual", number].committed
            say(f"{number} connections: committed/s of ours is {ratio:.2f} x the usual way's")
        if {"ours", "bare"} <= set(variants):
            ratio = medians["ours", number].accepted / medians["bare", number].accepted
            say(f"{number} connections: accepted/s of ours is {ratio:.2f} x the bare server's")


def median(runs: list[Run]) -> Run:
    """The median of each figure by itself."""
    middle = statistics.median
    return Run(
        runs[0].variant,
        runs[0].connections,
        middle(r.accepted for r in runs),
        middle(r.committed for r in runs),
        middle(r.p50 for r in runs),
        middle(r.p99 for r in runs),
        {name: middle(r.cpu[name] for r in runs) for name in runs[0].cpu},
    )


def say(text: str = "", end: str = "\n") -> None:
    print(text, flush=True, end=end)


# ---------------------------------------------------------------------------------------------------------- profiling


@contextmanager
def profiled(folder: Path, pids: dict[str, int]) -> Iterator[None]:
    """Sample the Python processes with py-spy, and print where they spent their time."""
    spy = shutil.which("py-spy")
    if not spy:
        say("py-spy is not on PATH: no profile of the Python processes")
        yield
        return
    samplers = {}
    for name in ("web", "worker"):
        if name in pids:
            file = folder / f"{name}.collapsed"
            words = ["record", "--subprocesses", "--gil", "--rate", "200", "--format", "raw", "--output", str(file)]
            words += ["--pid", str(pids[name])]
            samplers[name] = subprocess.Popen([spy, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(1)
    try:
        yield
    finally:
        for name, sampler in samplers.items():
            sampler.send_signal(2)
            sampler.wait(60)
            file = folder / f"{name}.collapsed"
            if file.exists():
                say(f"\n-- {name}: share of samples that hold the GIL, by function itself, and with what it calls")
                show_samples(file.read_text())


def show_samples(collapsed: str, top: int = 25) -> None:
    own: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for stack, _, count in (entry.rpartition(" ") for entry in collapsed.splitlines()):
        frames = [frame.rsplit(":", 1)[0] for frame in stack.split(";")]
        own[frames[-1]] += int(count)
        for frame in set(frames):
            whole[frame] += int(count)
    total = sum(own.values()) or 1
    for (mine, n), (all_, m) in zip(own.most_common(top), whole.most_common(top), strict=False):
        say(f"{n / total:6.1%} {mine[:62]:62} {m / total:6.1%} {all_[:62]}")


def statements(its: Rig, dbname: str) -> None:
    with its.superuser(dbname) as connection:
        rows = connection.execute("""
            SELECT calls, total_exec_time, rows, regexp_replace(query, '\\s+', ' ', 'g') FROM pg_stat_statements
            WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
            ORDER BY total_exec_time DESC LIMIT 16
        """).fetchall()
    say("\n-- PostgreSQL: calls, total ms, ms per call, rows")
    for calls, ms, n, query in rows:
        say(f"{calls:7} {ms:9.0f} {ms / calls:8.3f} {n:7}  {query.strip()[:90]}")


if __name__ == "__main__":
    raise SystemExit(main())
