"""Accounts stay registered while whoever registers them is killed, put to sleep and cut off; the registrar's own table
is the witness."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import pytest

from pombal.supervisor import LINUX
from sandbox.sip_thread import SipThread
from tests.chaos.fleet import ROOT, Fleet, until
from tests.sandbox.sip_servers import a_registrar
from tests.sip.kamailio import PASSWORD, Bound, a_kamailio, needs_kamailio

pytestmark = pytest.mark.skipif(not LINUX, reason="processes are found through /proc")

# Rows in the order in which workers, who may be at them, take them.
MINE = """
    WITH mine AS MATERIALIZED (
        SELECT tenant_id, id FROM sip_registration WHERE id = ANY(%s::uuid[]) ORDER BY tenant_id, id FOR UPDATE
    )
"""
LONG = 180.0  # seconds; how long a condition may take on a busy machine


class Registering(Fleet):
    """A fleet whose registering workers are the test's own to start and to hurt."""

    def begin_worker(self, name: str) -> None:
        self.join(name, "worker", "sip_refresh", "--threads", "2")

    def signal_worker(self, name: str, number: signal.Signals) -> None:
        """To all processes of it."""
        os.killpg(self._members[name].pid, number)

    def kill_worker(self, name: str) -> None:
        self.signal_worker(name, signal.SIGKILL)
        self._members.pop(name).wait()

    def end_workers(self) -> None:
        for name in list(self._members):
            self.signal_worker(name, signal.SIGKILL)
            self._members.pop(name).wait()

    def said_by(self, name: str) -> str:
        return self.data.with_name(f"{self.data.name}-{name}.out").read_text(errors="replace")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registering]:
    data = tmp_path_factory.mktemp("chaos") / "registrations"
    given = {"SIP_ALLOWED_NETWORKS": "127.0.0.0/8", "LOG_FORMAT": "json"}
    with Registering(data, "--procs", "web,clock", **given) as fleet:
        fleet.start()
        yield fleet


@pytest.fixture
def fleet(running: Registering) -> Iterator[Registering]:
    """Without any worker, before and after."""
    try:
        yield running
    finally:
        running.end_workers()


# --------------------------------------------------------------------------------------------------------- the witness


class Table(Protocol):
    """Where the truth is."""

    @property
    def port(self) -> int: ...

    def bindings(self) -> dict[str, list[Bound]]: ...


class Simulated:
    """The simulated registrar's table, where there is no Kamailio."""

    def __init__(self, registrar: SipThread, users: int) -> None:
        self.port = registrar.port
        self._registrar = registrar
        self._users = registrar.users(users, password=PASSWORD)

    def bindings(self) -> dict[str, list[Bound]]:
        found = {user: self._registrar.state(user)["bindings"] for user in self._users}
        return {
            user: [Bound(one["contact"], one["expires_at"], one["call_id"], one["cseq"]) for one in bound]
            for user, bound in found.items()
            if bound
        }


@contextmanager
def a_table(*, grants: int, users: int) -> Iterator[Table]:
    if needs_kamailio.args[0]:
        with a_registrar() as registrar:
            registrar.habit(grant=grants)
            yield Simulated(registrar, users)
    else:
        with a_kamailio(most=grants) as kamailio:
            yield kamailio


class Witness(threading.Thread):
    """Looks at the table again and again: `gaps` are the users that were bound once and then were not."""

    def __init__(self, table: Table) -> None:
        super().__init__(name="witness", daemon=True)
        self.gaps: list[tuple[str, float]] = []  # and the seconds since they were last seen
        self.closest: dict[str, float] = {}  # the fewest seconds that were left of a binding
        self.seen: dict[str, list[int]] = {}  # CSeq of each binding
        self.error: BaseException | None = None
        self._table = table
        self._ending = threading.Event()

    def __enter__(self) -> "Witness":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self.join()
        if self.error is not None:
            raise self.error

    def sees_more(self, count: int) -> None:
        """Returns when so many more REGISTERs have bound something."""
        wanted = self._accepted() + count
        until(lambda: self._accepted() >= wanted, "more were registered", LONG)

    def _accepted(self) -> int:
        return sum(len(cseqs) for cseqs in list(self.seen.values()))

    def run(self) -> None:
        last: dict[str, float] = {}
        try:
            while not self._ending.wait(0.1):
                now, bound = time.time(), self._table.bindings()
                for user, bindings in bound.items():
                    latest = max(bindings, key=lambda one: one.ends)
                    cseqs = self.seen.setdefault(user, [])
                    if latest.cseq not in cseqs:
                        cseqs.append(latest.cseq)
                    self.closest[user] = min(self.closest.get(user, latest.ends - now), latest.ends - now)
                self.gaps += [(user, now - at) for user, at in last.items() if user not in bound]
                last = dict.fromkeys(bound, now)
        except BaseException as error:
            self.error = error


class Accounts:
    """As many as are wanted, of a tenant of their own, at one registrar."""

    def __init__(self, fleet: Fleet, count: int, port: int, **given: Any) -> None:
        self.fleet, self.count = fleet, count
        told = json.dumps({"host": "127.0.0.1", "port": port, **given})
        done = subprocess.run(
            [sys.executable, "-m", "tests.chaos.make_accounts", str(count), PASSWORD, told],
            cwd=ROOT,
            env=fleet.environment(POMBAL_DATA=str(fleet.data)),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        self.ids: dict[str, str] = json.loads(done.stdout)

    def become_due(self, *, over: float = 0.0) -> None:
        """One after the other in so many seconds, or all now."""
        query = """
            UPDATE sip_registration r
            SET next_refresh_at = now() + substr(r.username, 2)::int * %s * interval '1 second'
            FROM mine WHERE r.tenant_id = mine.tenant_id AND r.id = mine.id RETURNING 1
        """
        assert len(self.fleet.rows(MINE + query, list(self.ids.values()), over / self.count)) == self.count

    def column(self, what: str) -> list[Any]:
        query = f"SELECT {what} FROM sip_registration WHERE id = ANY(%s::uuid[]) ORDER BY id"  # noqa: S608 - our words
        return [value for (value,) in self.fleet.rows(query, list(self.ids.values()))]

    def statuses(self) -> Counter[str]:
        """As they truly are, whether or not that was written down."""
        return Counter(
            self.column("CASE WHEN register_status = 'registered' AND expires_at <= now() THEN 'expired'"
                        " ELSE register_status END")
        )  # fmt: skip

    def events(self) -> dict[str, list[str]]:
        """Their kinds by account, oldest first."""
        query = "SELECT payload->>'account', type FROM event WHERE payload->>'account' = ANY(%s) ORDER BY id"
        found: dict[str, list[str]] = {}
        for account, kind in self.fleet.rows(query, list(self.ids.values())):
            found.setdefault(account, []).append(kind)
        return found

    def remove(self) -> None:
        query = """
            DELETE FROM sip_registration r USING mine WHERE r.tenant_id = mine.tenant_id AND r.id = mine.id RETURNING 1
        """
        self.fleet.rows(MINE + query, list(self.ids.values()))


# --------------------------------------------------------------------------------------------------------- the tests


def test_no_account_is_unbound_while_workers_clocks_and_the_database_are_killed(fleet: Registering) -> None:
    # 40 s are granted, so refreshes begin 20 s before the end: a killed worker's claim takes 10 of them.
    with a_table(grants=40, users=20) as table:
        accounts = Accounts(fleet, 20, table.port)
        for name in ("one", "two"):
            fleet.begin_worker(name)
        fleet.join("clock", "clock")  # a second one
        accounts.become_due(over=16)

        with Witness(table) as witness:
            for name in ("one", "two", "one", "clock", "postgres", "one", "two"):
                witness.sees_more(4)
                if name in ("clock", "postgres"):
                    fleet.kill(name)
                else:
                    fleet.kill_worker(name)
                    fleet.begin_worker(name)
            until(lambda: all(len(seen) >= 3 for seen in bound_of(witness)), "each was refreshed twice", LONG)
            statuses, gaps, seen = accounts.statuses(), list(witness.gaps), dict(witness.seen)

        assert gaps == [], f"left at the closest: {witness.closest}"
        assert statuses == {"registered": 20}
        assert set(seen) == set(accounts.ids)
        assert [cseqs for cseqs in seen.values() if cseqs != sorted(set(cseqs))] == []
        assert accounts.events() == {id_: ["sip_registered"] for id_ in accounts.ids.values()}
        accounts.remove()


def bound_of(witness: Witness) -> list[list[int]]:
    """The CSeqs of each account; nobody's are none."""
    return [witness.seen.get(f"u{n}", []) for n in range(20)]


def test_accounts_outlive_a_redis_that_is_away_and_two_clocks_write_a_lapse_down_once(fleet: Registering) -> None:
    with a_table(grants=12, users=20) as table:
        accounts = Accounts(fleet, 20, table.port)
        for name in ("one", "two"):
            fleet.begin_worker(name)
        fleet.join("clock", "clock")
        accounts.become_due(over=4)

        with Witness(table) as witness:
            until(lambda: len(witness.seen) == 20, "all are registered", LONG)
            with fleet.nobody_restarts():
                fleet.strike("valkey")
                before = {user: len(cseqs) for user, cseqs in witness.seen.items()}
                until(
                    lambda: all(len(cseqs) >= before[user] + 2 for user, cseqs in witness.seen.items()),
                    "each was refreshed twice without Redis",
                    LONG,
                )
            until(fleet.is_whole, "Redis is back", LONG)
            witness.sees_more(20)
            statuses, gaps = accounts.statuses(), list(witness.gaps)

        assert gaps == [], f"left at the closest: {witness.closest}"
        assert statuses == {"registered": 20}
    # The registrar is gone: every grant ends.
    until(lambda: set(accounts.column("register_status")) == {"failed"}, "it is written down", LONG)
    until(lambda: len(accounts.events()) == 20, "and told", LONG)
    assert accounts.events() == {id_: ["sip_registered", "sip_failed"] for id_ in accounts.ids.values()}
    accounts.remove()


def test_no_two_registers_of_an_account_are_under_way_whoever_is_killed_in_the_middle(fleet: Registering) -> None:
    with a_registrar() as registrar:
        registrar.users(20, password=PASSWORD)
        registrar.habit(grant=40, delay=1, when="any")  # a killed worker's claim takes 10 s of it
        accounts = Accounts(fleet, 20, registrar.port)
        for name in ("one", "two"):
            fleet.begin_worker(name)
        accounts.become_due()
        registrar.until(lambda: registrar.summary()["registered"] == 20, seconds=LONG)
        orphaned = 0

        for name in ("one", "two"):
            until(lambda: not any(accounts.column("claim_token IS NOT NULL")), "nothing is under way", LONG)
            granted = {user: registrar.state(user)["granted"] for user in accounts.ids}
            accounts.become_due()
            registrar.until(lambda: under_way(registrar) >= 15, seconds=LONG)
            fleet.kill_worker(name)
            orphaned += under_way(registrar)
            registrar.until(partial(all_granted_more, registrar, granted), seconds=LONG)
            fleet.begin_worker(name)

        summary = registrar.summary()
        assert orphaned >= 15, "that is what was to be tried"
        assert summary["overlaps"] == 0
        assert summary["gaps"] == 0
        assert complaints(registrar) == []
        assert accounts.statuses() == {"registered": 20}
        assert numbers_that_fell(registrar) == []
        accounts.remove()


def test_a_worker_that_slept_longer_than_its_claims_sends_nothing_when_it_wakes(fleet: Registering) -> None:
    with a_registrar() as registrar:
        registrar.users(10, password=PASSWORD)
        registrar.habit(grant=300)
        accounts = Accounts(fleet, 10, registrar.port)
        fleet.begin_worker("sleeper")
        accounts.become_due()
        registrar.until(lambda: registrar.summary()["registered"] == 10, seconds=LONG)
        until(lambda: not any(accounts.column("claim_token IS NOT NULL")), "nothing is under way", LONG)
        slow = registrar.habit(delay=1, when="any")
        accounts.become_due()
        registrar.until(lambda: under_way(registrar) == 10, seconds=LONG)

        fleet.signal_worker("sleeper", signal.SIGSTOP)  # its answers come meanwhile, and its claims run out
        registrar.clear_habits(id=slow)
        fleet.begin_worker("other")
        registrar.until(lambda: all(registrar.state(user)["granted"] == 2 for user in accounts.ids), seconds=LONG)
        before = registrar.summary()
        fleet.signal_worker("sleeper", signal.SIGCONT)
        until(lambda: fleet.said_by("sleeper").count("sip_claim_lost") == 10, "it knows", LONG)

        after = registrar.summary()
        assert (after["transactions"], after["retransmissions"]) == (before["transactions"], before["retransmissions"])
        assert after["overlaps"] == 0
        assert numbers_that_fell(registrar) == []
        assert accounts.statuses() == {"registered": 10}
        assert set(accounts.column("failures")) == {0}

        accounts.become_due()  # and it is of use again
        fleet.kill_worker("other")
        until(lambda: not any(accounts.column("claim_token IS NOT NULL")), "all was done", LONG)
        registrar.until(lambda: all(registrar.state(user)["granted"] >= 3 for user in accounts.ids), seconds=LONG)
        accounts.remove()


def all_granted_more(registrar: SipThread, than: dict[str, int]) -> bool:
    return all(registrar.state(user)["granted"] > n for user, n in than.items())


def under_way(registrar: SipThread) -> int:
    """REGISTERs that have not been answered."""
    return sum(one["ended"] is None for one in registrar.journal())


def complaints(registrar: SipThread) -> list[str]:
    return [said for one in registrar.journal() for said in one["complaints"]]


def numbers_that_fell(registrar: SipThread) -> list[str]:
    """Users whose CSeq was once not higher than before."""
    last: dict[str, int] = {}
    found = []
    for one in registrar.journal():
        if one["cseq"] <= last.get(one["user"], 0):
            found.append(one["user"])
        last[one["user"]] = one["cseq"]
    return found
