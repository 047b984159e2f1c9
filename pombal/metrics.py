"""Every metric on one screen, and how the fleet's numbers come together.

Each process writes a snapshot of its registry every 5 seconds to Redis (it expires after 30) and to a folder of its
host. Any web process answers `/metrics` for all: the sum over the snapshots in Redis, or, while Redis is away, over its
own host's folder. What is shared anyway (queue depths, ages, dead letters) is measured when somebody asks.
Labels come from closed sets: never an id, a phone number or free text (security-reliability.md N1).
"""

import contextlib
import hashlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import redis
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from pombal import log
from pombal.settings import settings

# `PROMETHEUS_MULTIPROC_DIR` is for our snapshots; the library would put files of its own there, and fail without it.
values.ValueClass = values.MutexValue

REGISTRY = CollectorRegistry()
PERIOD = 5.0  # seconds between snapshots
_EXPIRES = 30  # seconds a snapshot counts
_FORGOTTEN = 3600  # seconds after which a dead process's file is removed
_PREFIX = "pombal:metrics:"
_FAST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SLOW = (*_FAST, 30, 60, 120, 300)

_log = log.get()

webhook_requests = Counter(
    "pombal_webhook_requests_total", "Webhook requests answered.", ["provider", "outcome"], registry=REGISTRY
)
webhook_seconds = Histogram(
    "pombal_webhook_seconds",
    "Time from a webhook's first byte to its answer.",
    ["provider"],
    buckets=_FAST,
    registry=REGISTRY,
)
inbox_waiting = Gauge("pombal_inbox_waiting", "Proven bodies in memory that wait for their commit.", registry=REGISTRY)
inbox_flush_rows = Histogram(
    "pombal_inbox_flush_rows",
    "Bodies committed together.",
    buckets=(1, 2, 5, 10, 20, 50, 100, 200),
    registry=REGISTRY,
)
bells = Counter("pombal_bells_total", "Jobs enqueued for accepted bodies.", ["outcome"], registry=REGISTRY)
deliveries = Counter("pombal_deliveries_total", "Webhook bodies processed.", ["provider", "outcome"], registry=REGISTRY)
delivery_lag = Histogram(
    "pombal_delivery_lag_seconds",
    "Time from a body's receipt to the commit of its effects.",
    ["provider"],
    buckets=_SLOW,
    registry=REGISTRY,
)
quarantined = Counter(
    "pombal_quarantined_total", "Bodies or elements set aside.", ["provider", "kind"], registry=REGISTRY
)
session_errors = Counter(
    "pombal_session_errors_total",
    "Messages that gateways could not decrypt, each counted once.",
    ["class"],
    registry=REGISTRY,
)
session_errors_unattributed = Counter(
    "pombal_session_errors_unattributed_total",
    "Errors in followed logs of gateways that are of no channel, or of more than one.",
    registry=REGISTRY,
)
log_lag = Gauge("pombal_log_lag_bytes", "What followed logs hold that was not read yet.", registry=REGISTRY)
fixer_mode = Gauge(
    "pombal_session_fixer", "Whether the fixer repairs, only observes, or is off.", ["state"], registry=REGISTRY
)
repairs = Counter(
    "pombal_repairs_total", "Steps of repairs, and what came of each.", ["step", "outcome"], registry=REGISTRY
)
sip_attempts = Counter(
    "pombal_sip_attempts_total",
    "Attempts to register or un-register, by what they came to.",
    ["outcome"],
    registry=REGISTRY,
)
sip_attempt_seconds = Histogram(
    "pombal_sip_attempt_seconds",
    "Time from an attempt's start to its last answer.",
    ["outcome"],
    buckets=_SLOW,
    registry=REGISTRY,
)
sip_lateness = Histogram(
    "pombal_sip_lateness_seconds",
    "Time from when a registration fell due to the start of its attempt.",
    buckets=_SLOW,
    registry=REGISTRY,
)
sip_dropped = Counter(
    "pombal_sip_dropped_total", "What came on SIP sockets and was no answer to us.", ["class"], registry=REGISTRY
)
sip_lapses = Counter("pombal_sip_lapses_total", "Registrations that expired without a refresh.", registry=REGISTRY)
sip_reports = Counter(
    "pombal_sip_reports_total", "Reports of registrations to the backend.", ["outcome"], registry=REGISTRY
)
messages = Counter(
    "pombal_messages_total", "Messages stored or reported on.", ["direction", "provider", "outcome"], registry=REGISTRY
)
provider_seconds = Histogram(
    "pombal_provider_request_seconds",
    "Time from a call's start to its whole answer, or to its end without one.",
    ["provider", "operation"],
    buckets=_SLOW,
    registry=REGISTRY,
)
provider_errors = Counter(
    "pombal_provider_errors_total",
    "Calls that did not do what they were for.",
    ["provider", "class"],
    registry=REGISTRY,
)
send_wait = Histogram(
    "pombal_send_wait_seconds",
    "Time from a message's turn to the start of its first call.",
    ["provider"],
    buckets=_SLOW,
    registry=REGISTRY,
)
unknown_sends = Counter(
    "pombal_unknown_sends_total",
    "Sends without an answer, and how each was decided.",
    ["provider", "outcome"],
    registry=REGISTRY,
)
double_sends = Counter(
    "pombal_double_sends_total", "Messages that the provider accepted twice.", ["provider"], registry=REGISTRY
)
holds = Counter("pombal_lane_holds_total", "Times that a channel's sending was held.", ["hold"], registry=REGISTRY)
channel_changes = Counter(
    "pombal_channel_changes_total",
    "Times that a channel's session became what it was not, or was no longer known.",
    ["provider", "status"],
    registry=REGISTRY,
)
status_polls = Counter(
    "pombal_status_polls_total",
    "Answers about an instance's state, by what they came to.",
    ["provider", "outcome"],
    registry=REGISTRY,
)
sync_seconds = Histogram(
    "pombal_sync_round_seconds",
    "Time of a round over all instances.",
    ["outcome"],
    buckets=_SLOW,
    registry=REGISTRY,
)
media_files = Counter(
    "pombal_media_files_total", "Downloads of files, by what they came to.", ["provider", "outcome"], registry=REGISTRY
)
media_faults = Counter("pombal_media_faults_total", "Why files did not come.", ["provider", "class"], registry=REGISTRY)
media_bytes = Counter("pombal_media_bytes_total", "Bytes of files.", ["outcome"], registry=REGISTRY)
media_seconds = Histogram(
    "pombal_media_seconds",
    "Time from a file's claim to the commit that it is stored.",
    ["provider"],
    buckets=_SLOW,
    registry=REGISTRY,
)
jobs = Counter("pombal_jobs_total", "Jobs run, by how they ended.", ["actor", "outcome"], registry=REGISTRY)
job_seconds = Histogram("pombal_job_seconds", "Running time of a job.", ["actor"], buckets=_SLOW, registry=REGISTRY)
job_wait = Histogram(
    "pombal_job_wait_seconds", "Time from enqueue to start of a job.", ["queue"], buckets=_SLOW, registry=REGISTRY
)
job_retries = Counter("pombal_job_retries_total", "Jobs that will be tried again.", ["actor"], registry=REGISTRY)
junk = Counter("pombal_junk_messages_total", "Queue messages nobody could decode.", ["queue"], registry=REGISTRY)
sweeps = Counter("pombal_sweep_rung_total", "Rows whose bell the sweep rang again.", ["queue"], registry=REGISTRY)
security_events = Counter(
    "pombal_security_events_total", "Refused credentials and foreign ids.", ["kind"], registry=REGISTRY
)


class Family(msgspec.Struct):
    """One metric family of one process: `samples` are `(name, labels, value)`."""

    name: str
    type: str
    help: str
    samples: list[tuple[str, dict[str, str], float]]


def snapshot() -> list[Family]:
    """What this process has counted so far. `_created` timestamps do not add up over processes and are left out."""
    return [
        Family(
            family.name,
            family.type,
            family.documentation,
            [(s.name, s.labels, s.value) for s in family.samples if not s.name.endswith("_created")],
        )
        for family in REGISTRY.collect()
    ]


class Publisher:
    """Writes this process's snapshot down every 5 seconds, in a thread, until stopped."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._key = f"{socket.gethostname()}:{os.getpid()}"

    def start(self) -> "Publisher":
        for file in host_folder().glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # another process cleared it away first
                if time.time() - file.stat().st_mtime > _FORGOTTEN:
                    file.unlink()
        self._thread.start()
        return self

    def stop(self) -> None:
        """Write once more, so that the last seconds count, and end."""
        self._stop.set()
        self._thread.join(timeout=3)

    def _run(self) -> None:
        client = client_for_metrics()
        file = host_folder() / f"{os.getpid()}.json"
        while True:
            stopping = self._stop.wait(PERIOD)
            content = msgspec.json.encode(snapshot())
            try:
                client.set(_PREFIX + self._key, content, ex=_EXPIRES)
            except redis.RedisError:
                _log.debug("metrics_not_published")
            try:
                partial = file.with_suffix(".part")
                partial.write_bytes(content)
                partial.replace(file)
            except OSError:
                _log.debug("metrics_not_written")  # a full disk, say: the copy in Redis is the one that counts
            if stopping:
                client.close()
                return


def client_for_metrics() -> redis.Redis:
    """A client that gives up fast: numbers may be late, a scrape may not."""
    url = settings().require_redis()
    if url == "memory://":
        # The stub broker has no server; nothing listens here, and the host's folder answers instead.
        url = f"unix://{os.devnull}"
    return redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1)


def host_folder() -> Path:
    """Where the processes of one fleet on one host leave their snapshots."""
    chosen = settings().metrics_dir
    if chosen:
        folder = Path(chosen)
    else:
        # Named after the database, so that two fleets on a host do not meet.
        fleet = hashlib.sha256(settings().require_database().encode()).hexdigest()[:12]
        folder = Path(tempfile.gettempdir()) / f"pombal-metrics-{os.getuid()}-{fleet}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def fleet(client: redis.Redis) -> tuple[list[Family], bool]:
    """The sum over all processes, and whether it is complete: False when only this host could be asked."""
    try:
        keys = list(client.scan_iter(match=_PREFIX + "*", count=500))
        contents: list[bytes | None] = client.mget(keys) if keys else []  # type: ignore[assignment]
        return _added_up(c for c in contents if c is not None), True
    except redis.RedisError:
        return _added_up(_on_this_host()), False


def _on_this_host() -> Iterator[bytes]:
    oldest = time.time() - _EXPIRES
    for file in host_folder().glob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # cleared away just now
            if file.stat().st_mtime >= oldest:
                yield file.read_bytes()


def _added_up(contents: Iterable[bytes]) -> list[Family]:
    families: dict[str, Family] = {}
    sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for content in contents:
        for family in msgspec.json.decode(content, type=list[Family]):
            families.setdefault(family.name, family)
            into = sums.setdefault(family.name, {})
            for name, labels, value in family.samples:
                key = (name, tuple(labels.items()))
                into[key] = into.get(key, 0.0) + value
    return [
        Family(f.name, f.type, f.help, [(name, dict(labels), v) for (name, labels), v in sums[f.name].items()])
        for f in families.values()
    ]


class _Fixed(Collector):
    def __init__(self, families: list[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            metric = Metric(family.name, family.help, family.type)
            for name, labels, value in family.samples:
                metric.add_sample(name, labels, value)
            yield metric


def gauge(name: str, help_: str, samples: Iterable[tuple[dict[str, str], float]]) -> Family:
    """A gauge measured just now."""
    return Family(name, "gauge", help_, [(name, labels, value) for labels, value in samples])


def exposition(families: list[Family]) -> bytes:
    """The Prometheus text format."""
    registry = CollectorRegistry()
    registry.register(_Fixed(families))
    text: bytes = generate_latest(registry)
    return text


def labels_of(metric: Any) -> tuple[str, ...]:
    """The label names of a metric; tests hold them to closed sets."""
    return tuple(metric._labelnames)
