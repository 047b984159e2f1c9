"""REGISTERs a second, refreshes in time, and a soak with kills; beside a thread with a sleep for each account.

    python bench/sip.py [--only rate refreshes soak] [--accounts 5000] [--interval 300] [--minutes 6] [--hosts 8]
    python bench/sip.py --only soak --registrar kamailio [--soak-minutes 5]

All but the latter against simulated registrars in a process of their own, one for each host (127.0.0.1, 127.0.0.2,
…), without latency. An attempt is two transactions: the challenge and the answer. `usual` is `usual_register.py`: no
database, no claims, no restarts. Durable writes as in production: fsync and `synchronous_commit` are on.

`rate`: accounts that all fall due at once, with SIP_STARTS_PER_SECOND out of the way, until all are registered.

`refreshes`: accounts that are registered once (30 a second and host, which is the default), and then whenever a refresh
is due. A refresh's lateness is the time from when it fell due until its first REGISTER is at the registrar, which
also says how much of the grant was left then, and whether any account was unbound.

`soak`: 50 accounts with grants of 60 s, two workers; one of them is killed every 10 s, and started again. With
`--registrar kamailio` at a real registrar, if one is installed: its own binding table is looked at ten times a second.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from registrars import PASSWORD
from rig import HERE, ROOT, Failed, Rig, cpu_seconds, rig, wait

from models import SipRegistration, Tenant
from pombal import db, log
from pombal.settings import settings
from pombal.supervisor import processes, spawn
from tests.sip.kamailio import IS_INSTALLED, Bound, Kamailio, a_kamailio

_EDGES = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
_LATE = 5.0
_STARTS = 30  # SIP_STARTS_PER_SECOND as it is unless set
_LOOK = 2.0
_KILL_EVERY = 10.0


class Providers:
    """The process of `registrars.py`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin
        assert process.stdout
        self._in, self._out, self.pid = process.stdin, process.stdout, process.pid
        self.port = int(self._out.readline())

    def ask(self, what: str) -> Any:
        print(what, file=self._in, flush=True)
        return json.loads(self._out.readline())


class Arrival(NamedTuple):
    user: str
    at: float
    was_authorized: bool
    was_granted: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=["rate", "refreshes", "soak"], default=["rate", "refreshes", "soak"]
    )
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--rate-accounts", type=int, default=5_000)
    parser.add_argument("--repeat", type=int, default=3, help="of `rate`")
    parser.add_argument("--threads", type=int, default=16, help="of `usual` in `rate`")
    parser.add_argument("--accounts", type=int, default=5_000, help="of `refreshes`")
    parser.add_argument("--interval", type=int, default=300, help="seconds of a grant, of `refreshes`")
    parser.add_argument("--minutes", type=float, default=6.0, help="of `refreshes`, each variant")
    parser.add_argument("--soak-minutes", type=float, default=5.0)
    parser.add_argument("--registrar", choices=["simulated", "kamailio"], default="simulated", help="of `soak`")
    given = parser.parse_args()
    with rig(20) as its:
        os.environ |= {"SIP_ALLOWED_NETWORKS": "127.0.0.0/8", "LOG_LEVEL": "WARNING", "TMPDIR": str(its.folder)}
        settings.cache_clear()
        log.setup()
        if "rate" in given.only:
            rate(its, given)
        if "refreshes" in given.only:
            refreshes(its, given)
        if "soak" in given.only:
            soak(its, given)
    return 0


@contextmanager
def providers(hosts: int, accounts: int) -> Iterator[Providers]:
    command = [sys.executable, str(HERE / "registrars.py"), str(hosts), str(accounts)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    try:
        yield Providers(process)
    finally:
        process.kill()
        process.wait()


def add(its: Rig, accounts: int, hosts: int, port: int, interval: int) -> None:
    """Rows for as many, spread over the tenants, in place of those that are there; due when `let` says so."""
    with its.superuser("pombal") as connection:
        connection.execute("TRUNCATE sip_registration")
    with db.session() as s:
        db.see_all(s)
        tenants = [tenant.id for tenant in s.query(Tenant).order_by(Tenant.id)]
    with db.session(tenants) as s:
        for n in range(accounts):
            row = SipRegistration.make(
                tenants[n % len(tenants)],
                name=f"account-{n}",
                host=f"127.0.0.{n % hosts + 1}",
                port=port,
                username=f"u{n}",
                password=PASSWORD,
                interval=interval,
            )
            s.add(row)
    with its.superuser("pombal") as connection:
        connection.execute("UPDATE sip_registration SET next_refresh_at = NULL")
        connection.execute("VACUUM ANALYZE sip_registration")


def let(its: Rig, most: int | None = None) -> None:
    """Let them fall due; or so many of them."""
    query = """
        UPDATE sip_registration SET next_refresh_at = now()
        WHERE id IN (SELECT id FROM sip_registration WHERE next_refresh_at IS NULL LIMIT %s)
    """
    with its.superuser("pombal") as connection:
        connection.execute(query, [most])


@contextmanager
def worker(its: Rig, starts: int) -> Iterator[int]:
    os.environ["SIP_STARTS_PER_SECOND"] = str(starts)
    with its.process("worker", "pombal", "-m", "pombal", "worker", "sip_refresh", "--threads", "2") as pid:
        yield pid


# ---------------------------------------------------------------------------------------------------------------- rate


def rate(its: Rig, given: argparse.Namespace) -> None:
    count, warm = given.rate_accounts, 200
    print(f"rate: {count} accounts at {given.hosts} hosts, all due at once", flush=True)
    ours, usual = [], []
    for _ in range(given.repeat):
        with providers(given.hosts, count + warm) as there:
            usual.append(one_usual_rate(there, given))
        with providers(given.hosts, count + warm) as there:
            ours.append(one_rate(its, there, given.hosts, count, warm))
    for name, figures in (("usual", usual), ("ours", ours)):
        says = {what: statistics.median(one[what] for one in figures) for what in figures[0]}
        cpu = ", ".join(f"{what[4:]} {ms:.2f}" for what, ms in says.items() if what.startswith("cpu "))
        per_second = f"{says['rate']:6.0f} accounts/s = {2 * says['rate']:.0f} REGISTER transactions/s"
        print(f"  {name:<6} {per_second}; CPU ms an account: {cpu}", flush=True)


def one_rate(its: Rig, there: Providers, hosts: int, count: int, warm: int) -> dict[str, float]:
    from workers.sip_refresh import ring_registrar

    add(its, count + warm, hosts, there.port, 3_600)
    with worker(its, 10_000) as pid:
        let(its, warm)
        wait(lambda: there.ask("summary")["granted"] == warm, "it did not warm up", 60)
        roots = {"worker": pid, "postgres": its.postgres.pid, "registrars": there.pid}
        before, began = cpu_seconds(roots), time.monotonic()
        let(its)
        ring_registrar()
        wait(lambda: there.ask("summary")["granted"] >= warm + count, "not all were registered", 600)
        took, after = time.monotonic() - began, cpu_seconds(roots)
        wait(lambda: registered(its) == warm + count, "not all was written down", 60)
        check(there, count + warm)
    return {"rate": count / took, **{f"cpu {name}": (after[name] - before[name]) / count * 1000 for name in roots}}


def one_usual_rate(there: Providers, given: argparse.Namespace) -> dict[str, float]:
    before = cpu_seconds({"registrars": there.pid})["registrars"]
    words = [there.port, given.hosts, given.rate_accounts, 3_600, "once", given.threads]
    told = json.loads(usual(words).communicate()[0])
    after = cpu_seconds({"registrars": there.pid})["registrars"]
    check(there, given.rate_accounts)
    count = given.rate_accounts
    spent = {"cpu worker": told["cpu"] / count * 1000, "cpu registrars": (after - before) / count * 1000}
    return {"rate": count / told["seconds"], **spent}


def usual(words: list[Any]) -> "subprocess.Popen[str]":
    command = [sys.executable, str(HERE / "usual_register.py"), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def registered(its: Rig) -> int:
    query = "SELECT count(*) FROM sip_registration WHERE register_status = 'registered' AND expires_at > now()"
    with its.superuser("pombal") as connection:
        row = connection.execute(query).fetchone()
    return int(row[0]) if row else 0


def check(there: Providers, accounts: int) -> None:
    """What makes the other figures worth nothing."""
    told = there.ask("summary")
    bad = {name: told[name] for name in ("overlaps", "complaints", "refused") if told[name]}
    if bad or told["registered"] != accounts:
        raise Failed(f"{told['registered']} of {accounts} are registered; {bad}")


# ----------------------------------------------------------------------------------------------------------- refreshes


def refreshes(its: Rig, given: argparse.Namespace) -> None:
    print(
        f"refreshes: {given.accounts} accounts at {given.hosts} hosts, grants of {given.interval} s, "
        f"{given.minutes:g} minutes",
        flush=True,
    )
    seconds = given.minutes * 60
    with providers(given.hosts, given.accounts) as there:
        words = [there.port, given.hosts, given.accounts, given.interval, _STARTS * given.hosts, seconds + 5]
        process = usual(words)
        roots = {"usual": process.pid, "registrars": there.pid}
        watch = Watch(there, given.accounts, roots, "usual")
        watch.look_until(time.monotonic() + seconds)
        watch.due = {user: [at for at in due] for user, due in json.loads(process.communicate()[0]).items()}
        watch.tell(given.interval)
    with providers(given.hosts, given.accounts) as there:
        add(its, given.accounts, given.hosts, there.port, given.interval)
        with worker(its, _STARTS) as pid:
            roots = {"worker": pid, "postgres": its.postgres.pid, "registrars": there.pid}
            watch = Watch(there, given.accounts, roots, "worker", its)
            let(its)
            watch.look_until(time.monotonic() + seconds)
            watch.tell(given.interval)


class Watch:
    """Looks every two seconds at what arrived, what is due, and what it costs."""

    def __init__(
        self, there: Providers, accounts: int, roots: dict[str, int], name: str, its: Rig | None = None
    ) -> None:
        self.there, self.accounts, self.roots, self.name, self.its = there, accounts, roots, name, its
        self.due: dict[str, list[float]] = {}
        self.arrivals: list[Arrival] = []
        self.whole: float | None = None  # seconds until all were registered
        self.fewest = accounts
        self.memory = self.threads = 0
        self._began = time.monotonic()
        self._before = cpu_seconds(roots)
        self._cpu: dict[str, float] = {}
        self._steady = (self._began, self._before)

    def look_until(self, end: float) -> None:
        while time.monotonic() < end:
            self._look()
            time.sleep(_LOOK)
        self._look()
        began, before = self._steady
        took = time.monotonic() - began
        now = cpu_seconds(self.roots)
        self._cpu = {name: (now[name] - before[name]) / took for name in now}

    def _look(self) -> None:
        self.arrivals += [Arrival(*one) for one in self.there.ask("arrivals")]
        there = self.there.ask("summary")["registered"]
        if self.whole is not None:
            self.fewest = min(self.fewest, there)
        elif there == self.accounts:
            self.whole = time.monotonic() - self._began
            self._steady = (time.monotonic(), cpu_seconds(self.roots))
        memory, threads = size(self.roots[self.name])
        self.memory, self.threads = max(self.memory, memory), max(self.threads, threads)
        if self.its is not None:
            query = (
                "SELECT username, extract(epoch FROM next_refresh_at)::float FROM sip_registration WHERE granted > 0"
            )
            with self.its.superuser("pombal") as connection:
                for user, at in connection.execute(query).fetchall():
                    known = self.due.setdefault(user, [])
                    if at is not None and at not in known:
                        known.append(at)

    def tell(self, interval: int) -> None:
        late, left = self._late(interval)
        if not late:
            raise Failed("nothing was refreshed: longer, or with a shorter interval")
        told = self.there.ask("summary")
        whole = f"{self.whole:.0f} s" if self.whole is not None else "never"
        cpu = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self._cpu.items())
        counts = [bisect_left(sorted(late), edge) for edge in _EDGES]
        shares = [f"≤ {edge:g} s {count}" for edge, count in zip(_EDGES, counts, strict=True)]
        print(f"  {self.name}: all registered after {whole}, then never fewer than {self.fewest} of {self.accounts}")
        print(
            f"    {len(late)} refreshes; late: median {statistics.median(late):.2f} s, worst {max(late):.2f} s, "
            f"by more than {_LATE:g} s {sum(one > _LATE for one in late)}; {', '.join(shares)}"
        )
        print(
            f"    of a grant at least {min(left):.1f} s were left; {told['gaps']} gaps, {told['overlaps']} overlaps, "
            f"{told['retransmissions']} retransmissions, {told['refused']} refusals"
        )
        print(f"    CPU of a core {cpu}; {self.memory / 2**20:.0f} MiB, {self.threads} threads", flush=True)

    def _late(self, interval: int) -> tuple[list[float], list[float]]:
        """Of each refresh: seconds after it fell due, and those that were left of the grant."""
        late, left = [], []
        bound: dict[str, float] = {}
        nth: dict[str, int] = {}
        for one in sorted(self.arrivals, key=lambda arrival: arrival.at):
            if one.was_granted and one.was_authorized:
                bound[one.user] = one.at
                nth[one.user] = nth.get(one.user, -1) + 1
            elif not one.was_authorized and one.user in bound:
                left.append(bound[one.user] + interval - one.at)
                due = self.due.get(one.user, [])
                if nth[one.user] < len(due):
                    late.append(one.at - due[nth[one.user]])
        return late, left


def size(root: int) -> tuple[int, int]:
    """Bytes of memory and threads of a process and of all that it has started."""
    family, more = {root}, True
    running = list(processes())
    while more:
        found = {one.pid for one in running if one.parent in family} - family
        family |= found
        more = bool(found)
    memory = threads = 0
    for pid in family:
        try:
            told = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        except OSError:
            continue  # it has just ended
        memory += int(told.get("VmRSS", "0 kB").split()[0]) * 1024
        threads += int(told.get("Threads", "0"))
    return memory, threads


# ---------------------------------------------------------------------------------------------------------------- soak


_SOAKED, _GRANT = 50, 60


def soak(its: Rig, given: argparse.Namespace) -> None:
    kind, minutes = given.registrar, given.soak_minutes
    print(
        f"soak: {_SOAKED} accounts at a {kind} registrar, grants of {_GRANT} s, {minutes:g} minutes, "
        f"a kill every {_KILL_EVERY:g} s",
        flush=True,
    )
    os.environ["SIP_STARTS_PER_SECOND"] = str(_STARTS)
    with (real if kind == "kamailio" else simulated)() as witness, ExitStack() as ending:
        add(its, _SOAKED, 1, witness.port, _GRANT)
        let(its)
        running = [begun(its), begun(its)]
        ending.callback(end_all, running)
        wait(lambda: witness.bound() == _SOAKED, "not all were registered", 60)
        end, kills, fewest = time.monotonic() + minutes * 60, 0, _SOAKED
        next_kill = time.monotonic() + _KILL_EVERY
        while time.monotonic() < end:
            fewest = min(fewest, witness.bound())
            if time.monotonic() >= next_kill:
                kill(running[kills % 2])
                running[kills % 2] = begun(its)
                kills += 1
                next_kill += _KILL_EVERY
            time.sleep(0.1)
        told, bad = witness.tells()
        rows = registered(its)
    print(f"  {kills} kills; never fewer than {fewest} bound, and {rows} rows say so at the end\n  {told}", flush=True)
    if bad or fewest < _SOAKED:
        raise Failed("an account was unbound, or registered twice at once")


class Witness(Protocol):
    """A registrar of the soak."""

    port: int

    def bound(self) -> int:
        """How many accounts are bound now."""

    def tells(self) -> tuple[str, bool]:
        """What it has seen, and whether any of it must not be."""


class Simulated:
    def __init__(self, there: Providers) -> None:
        self._there, self.port = there, there.port

    def bound(self) -> int:
        return int(self._there.ask("summary")["registered"])

    def tells(self) -> tuple[str, bool]:
        told = self._there.ask("summary")
        names = {"granted": "registrations"} | {
            name: name for name in ("gaps", "overlaps", "refused", "retransmissions", "complaints")
        }
        said = ", ".join(f"{told[name]} {what}" for name, what in names.items())
        return said, bool(told["gaps"] or told["overlaps"])


@contextmanager
def simulated() -> Iterator[Witness]:
    with providers(1, _SOAKED) as there:
        yield Simulated(there)


class BindingTable:
    """Kamailio's own, as often as it is looked at."""

    def __init__(self, kamailio: Kamailio) -> None:
        self._kamailio, self.port = kamailio, kamailio.port
        self._last: dict[str, Bound] = {}
        self._refreshes = self._unbound = self._several = self._fell_back = 0
        self._least = float(_GRANT)

    def bound(self) -> int:
        """Also notes what has changed."""
        found = self._kamailio.bindings()
        now = time.time()
        for user, before in self._last.items():
            if not (bindings := found.get(user)):
                self._unbound += 1
                continue
            self._several += len(bindings) > 1
            newest = max(bindings, key=lambda one: one.cseq)
            self._least = min(self._least, newest.ends - now)
            self._refreshes += newest.cseq > before.cseq
            self._fell_back += newest.cseq < before.cseq or newest.call_id != before.call_id
        self._last |= {user: max(bindings, key=lambda one: one.cseq) for user, bindings in found.items()}
        return len(found)

    def tells(self) -> tuple[str, bool]:
        said = (
            f"{self._refreshes} refreshes, at least {self._least:.0f} s were left of each; "
            f"{self._unbound} times unbound, {self._several} times twice, "
            f"{self._fell_back} times with another Call-ID or a lower CSeq"
        )
        return said, bool(self._unbound or self._several or self._fell_back)


@contextmanager
def real() -> Iterator[Witness]:
    if not IS_INSTALLED:
        raise Failed("kamailio is not installed (Debian: apt-get install kamailio)")
    with a_kamailio(most=_GRANT) as kamailio:
        yield BindingTable(kamailio)


def begun(its: Rig) -> "subprocess.Popen[bytes]":
    env = {**os.environ, "LOG_FORMAT": "json"}
    with (its.folder / "soak.log").open("ab") as out:
        command = [sys.executable, "-m", "pombal", "worker", "sip_refresh", "--threads", "2"]
        return spawn(command, death_signal=signal.SIGTERM, env=env, cwd=ROOT, stdout=out, stderr=out)


def end_all(running: list["subprocess.Popen[bytes]"]) -> None:
    for process in running:
        kill(process)


def kill(process: "subprocess.Popen[bytes]") -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
