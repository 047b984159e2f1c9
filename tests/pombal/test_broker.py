"""What the queue keeps through outages, junk and deaths: real workers on real servers that tests may break."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pombal import metrics
from pombal.broker import HardenedBroker, Wake, redis_client
from tests.pombal.breakable import JUNK, Errands, Servers, at_work
from tests.pombal.processes import output, running, until

PERIODIQ = ("-c", "import periodiq; periodiq.entrypoint()", "workers")


@contextmanager
def asking(url: str) -> Iterator[Any]:
    with redis_client(url) as client:
        yield client


# -------------------------------------------------------------------------------------------------------- outages


def test_an_outage_of_redis_costs_no_job(errands: Errands, tmp_path: Path) -> None:
    gate, valkey = tmp_path / "gate", errands.servers.valkey
    delayed = [f"delayed {n}" for n in range(30)]
    plain = [f"plain {n}" for n in range(10)]
    errands.post("fails_once_after", "fails meanwhile", str(gate))
    errands.wait_for("fails meanwhile")
    last = time.time() + 3
    for n, id_ in enumerate(delayed):
        errands.post("note", id_, delay=500 + n * 80)
    # All are in the worker's memory, which is where stock Dramatiq forgets them.
    until(lambda: not errands.servers.waiting("errands.DQ"))
    for id_ in plain:
        errands.post("note", id_)

    valkey.kill()
    gate.touch()
    errands.wait_for("fails meanwhile tried")
    until(lambda: time.time() > last)  # meanwhile every delay has fallen due
    valkey.restart()

    errands.wait_for("fails meanwhile done")
    for id_ in (*delayed, *plain):
        errands.wait_for(id_)
    until(errands.is_drained)
    assert not errands.letters("fails meanwhile")


def test_a_redis_that_hangs_when_a_job_ends_is_told_later(errands: Errands, tmp_path: Path) -> None:
    gate, valkey = tmp_path / "gate", errands.servers.valkey
    errands.post("waits", "hung", str(gate))
    errands.wait_for("hung")

    os.kill(valkey.pid, signal.SIGSTOP)
    try:
        gate.touch()
        errands.worker.says("Failed to post_process_message(waits('hung'")  # the socket's time is up
    finally:
        os.kill(valkey.pid, signal.SIGCONT)

    until(errands.is_drained)
    assert errands.count("hung done") == 1


def test_a_redis_that_is_full_costs_no_job(errands: Errands, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    errands.post("fails_once_after", "fails while full", str(gate))
    errands.wait_for("fails while full")
    errands.post("note", "due while full", delay=1)
    with asking(errands.servers.valkey.url) as client:
        client.config_set("maxmemory", 1)
        try:
            gate.touch()
            errands.wait_for("fails while full tried")
            until(lambda: "OutOfMemoryError" in errands.worker.text())
        finally:
            client.config_set("maxmemory", 0)

    errands.wait_for("fails while full done")
    errands.wait_for("due while full")
    until(errands.is_drained)
    assert not errands.letters("fails while full")


def test_a_redis_that_cannot_write_to_its_disk_costs_no_job(errands: Errands, tmp_path: Path) -> None:
    gate, valkey = tmp_path / "gate", errands.servers.valkey
    errands.post("fails_once_after", "fails unsaved", str(gate))
    errands.wait_for("fails unsaved")
    (valkey.folder / "dump.rdb").mkdir()  # a folder there, so the snapshot fails, and with it every write from then on
    with asking(valkey.url) as client:
        client.config_set("save", "3600 1")
        try:
            client.bgsave()
            until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
            gate.touch()
            errands.wait_for("fails unsaved tried")
            until(lambda: '"queue":"errands.DQ","error":"ResponseError"' in errands.worker.text())
        finally:
            client.config_set("save", "")
            (valkey.folder / "dump.rdb").rmdir()

    errands.wait_for("fails unsaved done")
    until(errands.is_drained)
    assert not errands.letters("fails unsaved")


# ----------------------------------------------------------------------------------------------------------- junk


def test_junk_is_buried_and_counted_and_its_neighbours_are_processed(errands: Errands) -> None:
    before = counted(errands)
    good = [f"neighbour {n}" for n in range(len(JUNK))]
    for body, id_ in zip(JUNK, good, strict=True):
        errands.put(body)
        errands.post("note", id_)

    for id_ in good:
        errands.wait_for(id_)
    until(
        errands.is_drained, seconds=10, why=lambda: (errands.servers.messages("errands"), errands.worker.text()[-8000:])
    )

    assert errands.count("junk") == 0
    with asking(errands.servers.valkey.url) as client:
        assert set(JUNK) <= set(client.hvals("dramatiq:errands.XQ.msgs"))
    letters = errands.servers.sql("SELECT * FROM dead_letter WHERE key LIKE 'junk:%%'")
    assert len(letters) == len(JUNK)
    assert {(letter["actor"], letter["queue"]) for letter in letters} == {("unknown", "errands")}
    until(lambda: counted(errands) - before == len(JUNK), why=lambda: counted(errands))


def test_junk_that_redis_went_away_with_is_buried_when_it_is_back(servers: Servers) -> None:
    with asking(servers.valkey.url) as client:
        broker = HardenedBroker(client, [])
        servers.a_job("nobody", queue="unattended")
        broker.do_enqueue("unattended", "its-id", b"junk")
        consumer: Any = broker.consume("unattended", prefetch=2)
        assert next(consumer).actor_name == "nobody"
        servers.valkey.kill()
        assert next(consumer) is None
        servers.valkey.restart()

        until(lambda: next(consumer) is None and client.hvals("dramatiq:unattended.XQ.msgs") == [b"junk"])


def counted(errands: Errands) -> float:
    """What the fleet's metrics say of junk in this queue."""
    with asking(errands.servers.valkey.url) as client:
        families, _ = metrics.fleet(client)
    samples = [sample for family in families for sample in family.samples if sample[0] == "pombal_junk_messages_total"]
    return sum(value for _, labels, value in samples if labels == {"queue": "errands"})


# ---------------------------------------------------------------------------------------------------------- bells


def test_a_bell_wakes_who_waits_and_junk_on_its_line_does_not_break_it(servers: Servers) -> None:
    client = redis_client(servers.valkey.url)  # stays open: it is listened on for as long as the process lives
    wake = Wake(client)
    wake.wait("unattended", 0)  # begins to listen
    until(lambda: wake.hears)
    waiter = threading.Thread(target=wake.wait, args=("unattended", 3600), daemon=True)
    waiter.start()

    client.publish("pombal:wake", b"\xff\xfe")
    client.publish("pombal:wake", "of another queue")
    servers.a_job("nobody", queue="unattended")

    waiter.join(30)
    assert not waiter.is_alive()


def test_a_worker_that_hears_no_bell_finds_its_jobs_all_the_same(servers: Servers, tmp_path: Path) -> None:
    with asking(servers.valkey.url) as client:
        client.execute_command("ACL", "SETUSER", "deaf", "on", ">secret", "~*", "+@all", "resetchannels")
        path = servers.valkey.url.removeprefix("unix://")
        env = {"REDIS_URL": f"unix://deaf:secret@{path}"}
        with at_work(servers, "doomed", tmp_path / "effects", threads=1, env=env) as worker:
            errands = Errands(servers, worker, tmp_path / "effects")
            for id_ in ("first", "second"):
                errands.post("is_on_a_doomed_queue", id_, queue="doomed")
                errands.wait_for(id_)

            its = [connection for connection in client.client_list() if connection["user"] == "deaf"]
            assert its
            assert all(connection["sub"] == "0" for connection in its)


@pytest.mark.parametrize(
    ("url", "kind"),
    [("memory://", "StubBroker"), ("redis://nowhere.invalid:1/0", "HardenedBroker")],
)
def test_the_broker_in_memory_is_chosen_by_its_name_only(url: str, kind: str) -> None:
    code = "from pombal.broker import broker; print(type(broker).__name__)"

    assert output("-c", code, env={"REDIS_URL": url}).strip() == kind


def test_without_an_address_there_is_no_broker(tmp_path: Path) -> None:
    said = output("-m", "pombal", "actors", env={"REDIS_URL": "", "POMBAL_DATA": str(tmp_path)}, code=1)

    assert said.startswith("pombal: REDIS_URL is not set")


# ------------------------------------------------------------------------------------------------ stops and starts


def ring(servers: Servers, *ids: str) -> None:
    for id_ in ids:
        servers.a_job("incoming_message", [id_])


def pending(servers: Servers, ids: list[str]) -> set[str]:
    found = servers.sql("SELECT id FROM delivery WHERE id = ANY(%s::uuid[]) AND state = 'pending'", ids)
    return {str(row["id"]) for row in found}


def test_two_sigterms_to_the_whole_group_end_a_worker_in_order(servers: Servers, tmp_path: Path) -> None:
    servers.clear("incoming_message")
    ids = [servers.a_delivery() for _ in range(20)]
    held = "SELECT count(*) AS n FROM pg_locks WHERE relation = 'delivery'::regclass AND NOT granted"
    with (
        running("-m", "pombal", "worker", "incoming_message", env=servers.env, log=tmp_path / "log") as worker,
        psycopg.connect(servers.postgres.database_url("postgres", "pombal")) as blocker,
    ):
        blocker.execute("LOCK TABLE delivery")
        ring(servers, *ids)
        until(lambda: servers.sql(held)[0]["n"] == 4 and servers.fetched("incoming_message") == 8, why=worker.text)

        worker.tell_group(signal.SIGTERM)
        worker.tell_group(signal.SIGTERM)

        assert worker.code(seconds=25) == 0
    # The four that ran met the lock and wait for another try; the other four in hand went back; the rest never left.
    queues = ("incoming_message", "incoming_message.DQ")
    assert [servers.fetched(queue) for queue in queues] == [0, 0]
    left = [message["args"][0][0] for queue in queues for message in servers.messages(queue)]
    assert sorted(left) == sorted(ids)
    assert sum(servers.waiting(queue) for queue in queues) == len(left)


def test_a_consumer_that_ends_gives_back_what_it_has_not_handed_on(servers: Servers) -> None:
    servers.clear("unattended")
    for _ in range(4):
        servers.a_job("nobody", queue="unattended")
    with asking(servers.valkey.url) as client:
        consumer: Any = HardenedBroker(client, []).consume("unattended", prefetch=4)
        assert next(consumer)
        assert (servers.waiting("unattended"), servers.fetched("unattended")) == (0, 4)

        consumer.close()

    assert (servers.waiting("unattended"), servers.fetched("unattended")) == (3, 1)


def test_a_worker_stops_in_order_while_redis_is_away(servers: Servers, tmp_path: Path) -> None:
    servers.clear("doomed")
    with at_work(servers, "doomed", tmp_path / "effects", threads=1, env={}) as worker:
        errands = Errands(servers, worker, tmp_path / "effects")
        errands.post("is_on_a_doomed_queue", "much later", queue="doomed", delay=3_600_000)
        until(lambda: servers.fetched("doomed.DQ"))
        servers.valkey.kill()
        try:
            worker.tell_group(signal.SIGTERM)

            assert worker.code(seconds=25) == 0, worker.text()
        finally:
            servers.valkey.restart()
    assert [message["args"] for message in servers.messages("doomed.DQ")] == [["much later"]]


def test_processes_of_one_worker_share_no_connection(servers: Servers, tmp_path: Path) -> None:
    servers.clear("incoming_message")
    ids = [servers.a_delivery() for _ in range(60)]
    arguments = ("-m", "pombal", "worker", "incoming_message", "--processes", "2")
    with running(*arguments, env=servers.env, log=tmp_path / "log") as worker:
        ring(servers, *ids)
        until(lambda: not pending(servers, ids) or worker.events("job_retried"), why=worker.text)

        for trouble in ("job_retried", "job_deferred", "job_dead", "claim_lost"):
            assert not worker.events(trouble)
    assert not pending(servers, ids)


def test_the_stock_commands_run_the_fleet(servers: Servers, tmp_path: Path) -> None:
    servers.clear("incoming_message", "doomed")
    with asking(servers.valkey.url) as client:
        HardenedBroker(client, []).do_enqueue("doomed", "its-id", b"not this worker's")
    (id_,) = [servers.a_delivery()]
    env = {**servers.env, "POMBAL_TEST_EFFECTS": str(tmp_path / "effects")}

    # Two schedulers, both send their ticks at once at the start, or at the next minute when that is near.
    with (
        running(*PERIODIQ, env=env, log=tmp_path / "one") as one,
        running(*PERIODIQ, env=env, log=tmp_path / "two") as two,
    ):
        for scheduler in (one, two):
            scheduler.says("workers.incoming_message:incoming_message_tick@incoming_message")
            scheduler.says("Scheduling")
        until(lambda: len(servers.messages("incoming_message")) >= 2)
    ticks = servers.messages("incoming_message")
    assert {tick["actor_name"] for tick in ticks} == {"incoming_message_tick"}
    assert all(tick["options"]["scheduled_at"] for tick in ticks)

    ring(servers, id_)
    stock = ("-m", "dramatiq", "workers", "tests.pombal.jobs", "-Q", "incoming_message", "-p", "1", "-t", "1")
    with running(*stock, env=env, log=tmp_path / "worker") as worker:
        until(lambda: not servers.messages("incoming_message"), why=worker.text)

    assert not pending(servers, [id_])
    assert servers.waiting("doomed") == 1
    assert not worker.events("job_retried")
