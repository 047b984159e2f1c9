"""How the fleet's numbers come together (security-reliability.md N1)."""

import math
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from pombal import metrics
from pombal.settings import settings
from pombal.supervisor import until
from workers import broker

OURS = [value for value in vars(metrics).values() if isinstance(value, Counter | Gauge | Histogram)]


@pytest.fixture
def client() -> Iterator[redis.Redis]:
    client = metrics.client_for_metrics()
    client.delete(*(client.keys("pombal:metrics:*") or ["none"]))
    yield client
    client.delete(*(client.keys("pombal:metrics:*") or ["none"]))
    client.close()


@pytest.fixture
def nowhere(tmp_path: Path) -> Iterator[redis.Redis]:
    """A Redis that is away."""
    client = redis.Redis.from_url(f"unix://{tmp_path}/nobody.sock")
    yield client
    client.close()


def values(families: list[metrics.Family]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = metrics.exposition(families).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def a_snapshot(value: float, **labels: str) -> bytes:
    family = metrics.Family("pombal_x", "counter", "A test.", [("pombal_x_total", labels, value)])
    return msgspec.json.encode([family])


def test_names_say_whose_they_are_and_what_they_count() -> None:
    for metric in OURS:
        (family,) = metric.collect()
        assert family.name.startswith("pombal_")
        assert family.documentation.endswith(".")
        if isinstance(metric, Histogram) and "rows" not in family.name:
            assert family.name.endswith(("_seconds", "_bytes"))


def test_labels_are_of_a_closed_kind() -> None:
    """Never an id, a phone number, a URL or free text."""
    known = {
        "provider",
        "outcome",
        "direction",
        "actor",
        "queue",
        "kind",
        "state",
        "status",
        "class",
        "operation",
        "step",
        "hold",
    }

    assert {label for metric in OURS for label in metrics.labels_of(metric)} <= known


def test_counts_of_several_processes_are_added_up(client: redis.Redis) -> None:
    client.set("pombal:metrics:a:1", a_snapshot(2, outcome="ok"), ex=30)
    client.set("pombal:metrics:a:2", a_snapshot(3, outcome="ok"), ex=30)
    client.set("pombal:metrics:b:1", a_snapshot(5, outcome="bad"), ex=30)

    families, is_complete = metrics.fleet(client)

    assert is_complete
    found = values(families)
    assert found[("pombal_x_total", (("outcome", "ok"),))] == 5
    assert found[("pombal_x_total", (("outcome", "bad"),))] == 5


def test_a_process_publishes_until_its_end_and_is_forgotten_soon(client: redis.Redis) -> None:
    metrics.junk.labels(queue="incoming_message").inc()
    metrics.Publisher().start().stop()

    (key,) = client.keys("pombal:metrics:*")
    assert 0 < int(client.ttl(key)) <= 30
    found = values(metrics.fleet(client)[0])
    here = metrics.REGISTRY.get_sample_value("pombal_junk_messages_total", {"queue": "incoming_message"})
    assert found[("pombal_junk_messages_total", (("queue", "incoming_message"),))] == here


def test_without_redis_the_own_host_answers_and_says_so(nowhere: redis.Redis) -> None:
    metrics.junk.labels(queue="incoming_message").inc()
    metrics.Publisher().start().stop()

    families, is_complete = metrics.fleet(nowhere)

    assert not is_complete
    assert values(families)[("pombal_junk_messages_total", (("queue", "incoming_message"),))] > 0


def test_what_a_dead_process_left_on_the_host_is_not_counted_for_ever(nowhere: redis.Redis) -> None:
    file = metrics.host_folder() / "999999.json"
    file.write_bytes(a_snapshot(7))
    assert values(metrics.fleet(nowhere)[0])[("pombal_x_total", ())] == 7

    long_ago = time.time() - 60
    os.utime(file, (long_ago, long_ago))

    assert ("pombal_x_total", ()) not in values(metrics.fleet(nowhere)[0])
    file.unlink()


def test_the_hosts_folder_is_ours_alone() -> None:
    assert stat.S_IMODE(metrics.host_folder().stat().st_mode) == 0o700


def test_the_exposition_is_read_back_as_it_was_written() -> None:
    hostile = 'a"b\\c\nd'
    family = metrics.Family("pombal_y", "gauge", "A test.", [("pombal_y", {"kind": hostile}, math.inf)])

    assert values([family]) == {("pombal_y", (("kind", hostile),)): math.inf}


def test_times_of_birth_are_left_out() -> None:
    """They would add up to nonsense."""
    metrics.junk.labels(queue="incoming_message").inc()

    assert not [s for f in metrics.snapshot() for s in f.samples if s[0].endswith("_created")]


def test_the_stub_brokers_fleet_is_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "memory://")
    settings.cache_clear()
    try:
        client = metrics.client_for_metrics()
        assert metrics.fleet(client)[1] is False
        client.close()
    finally:
        monkeypatch.undo()
        settings.cache_clear()


def test_every_queue_has_a_name_that_may_be_a_label() -> None:
    for name in [*broker.get_declared_queues(), *broker.get_declared_actors()]:
        assert re.fullmatch(r"[a-z_]{1,40}", name)


def test_a_publisher_survives_redis_being_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REDIS_URL", f"unix://{tmp_path}/nobody.sock")
    settings.cache_clear()
    try:
        file = metrics.host_folder() / f"{os.getpid()}.json"
        file.unlink(missing_ok=True)
        metrics.Publisher().start().stop()
        assert until(file.is_file, time.monotonic() + 5)
    finally:
        monkeypatch.undo()
        settings.cache_clear()
