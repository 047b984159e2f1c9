"""Fetch the files of messages: in time, checked, stored once per tenant; or failed with a reason that can be read.

Queue `download_media`, in: a tenant's id and the id of one of its files. Rung for by whoever noted the file, and by the
sweep when one falls due. Safe to run twice and anywhere: a file is worked on under a claim, which counts the attempt
before the work, is extended while its process lives, and fences the verdict.

A job is a bell for its tenant as well: after its own file it goes on for a while with others that are due, the newest
message's first (what is about to expire before that). The first failures are tried again by Dramatiq within seconds,
the later ones wait as rows until the provider's own deadline.
"""

import random
import threading
import time
from datetime import timedelta
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from dramatiq import Broker, Worker
from dramatiq.errors import Retry
from dramatiq.middleware import Middleware
from sqlalchemy import RowMapping

import providers
from models import DeadLetter, Event, File, Media, Tick
from models.dead_letter import letter
from models.media import FATAL_CRASHES
from pombal import db, log, metrics
from pombal.broker import HardenedBroker, actor, broker, cron
from pombal.errors import Misconfigured, Permanent, PombalError
from pombal.middleware import bell_may_be_lost, is_store_trouble
from pombal.secrets import unseal
from pombal.settings import settings
from providers.media import OF_THE_HOST, MediaFault, Received, Source
from providers.sniff import agrees, extension, sniff
from providers.storage import Spool, StorageUnavailable, key_of, storage
from workers._circuit import Circuit
from workers._claims import Claims

_log = log.get()

MIB = 1024 * 1024
# Wider than what Meta takes for sending (whatsapp-cloud-api.md §12): what a phone could send is a customer's file.
MOST_BYTES = {"sticker": 5 * MIB, "image": 32 * MIB, "audio": 64 * MIB, "voice": 64 * MIB}
MOST_BYTES_OF_OTHERS = 100 * MIB

# Seconds after the first failure, the second, …; the last one goes on until the deadline.
WAITS = (1, 5, 30, 120, 600, 1_800, 3_600, 7_200, 14_400, 21_600)
_SOON = 10.0  # what is due so soon is tried again by Dramatiq; the others wait as rows
# What will hardly change: so many attempts, instead of trying until the deadline.
_FEW = {"wrong_hash": 5, "wrong_size": 5, "encoded": 5, "redirect": 5, "gone": 8, "rejected": 8, "internal": 8}
# What is not the file's fault is no attempt; tried again after so many seconds.
_NOT_COUNTED = {
    "storage_unavailable": 30.0,
    "quota_reached": 600.0,
    "paused": 40.0,
    "throttled": 60.0,
    "misconfigured": 300.0,
    "stopping": 1.0,
}
_STORAGE = "storage"  # in the circuit, where no host is called so

_SLICE = 20.0  # seconds for which a job goes on with other files
_ENOUGH_JOBS = 1_000
_ABANDONED = timedelta(hours=1)


@actor(
    queue="download_media", max_retries=5, min_backoff=1_000, max_backoff=8_000, throws=Permanent, time_limit=900_000
)
def download_media(tenant_id: str, media_id: str) -> None:
    """Fetch this file if it is due, then what else is due of its tenant."""
    try:
        tenant, wanted = UUID(tenant_id), UUID(media_id)
    except ValueError:
        raise Permanent("not the ids of a tenant and a file") from None
    began = time.monotonic()
    row = claim(tenant, wanted) or claim(tenant)
    while row is not None:
        wait = Download(row).run()
        # Of another file's failure the sweep knows: a job that was retried for all of them would be given up some day.
        if wait is not None and wait < _SOON and row["id"] == wanted:
            raise Retry(delay=int(wait * 1000) + 50)
        if stop.is_set() or time.monotonic() - began > _SLICE:
            ring(tenant, wanted)  # more may be due: the next job sees
            return
        row = claim(tenant)


@actor(queue="download_media", max_retries=0, periodic=cron("* * * * *"))
def download_media_tick() -> None:
    """Once a minute: ring for what is due even when no sweep runs, and clear away what dead processes left behind."""
    with db.session() as s:
        if not Tick.claim(s, "download_media"):
            return
    ring_media()
    try:
        abandoned = storage().sweep(_ABANDONED)
    except StorageUnavailable as error:  # whoever wants to store something says so louder
        _log.warning("media_spools_not_looked_at", why=error.why)
        return
    if abandoned:
        _log.info("media_spools_removed", count=abandoned)


def ring_media(*, at_once: bool = False) -> int:
    """Enqueue jobs for files that are due and that nobody was rung for lately; returns how many. `at_once`: Redis lost
    them."""
    if not at_once and isinstance(broker, HardenedBroker) and broker.waiting("download_media") > _ENOUGH_JOBS:
        return 0
    with db.session() as s:
        db.see_all(s)
        due = Media.to_ring(s, at_once=at_once)
    for tenant_id, media_id in due:
        ring(tenant_id, media_id)
    metrics.sweeps.labels(queue="download_media").inc(len(due))
    return len(due)


def ring(tenant_id: UUID, media_id: UUID) -> None:
    download_media.send(str(tenant_id), str(media_id))


def ring_new(given: list[tuple[UUID, UUID]]) -> None:
    """Ring for files that were noted just now; while Redis is away the sweep does it later."""
    with bell_may_be_lost("media_not_rung"):
        for tenant_id, media_id in given:
            ring(tenant_id, media_id)


def claim(tenant: UUID, id_: UUID | None = None) -> RowMapping | None:
    with db.session([tenant]) as s:
        return Media.claim(s, tenant, uuid4(), id_)


class Stop(Middleware):
    """Downloads end when the worker does: they give their files back instead of being killed with them."""

    def __init__(self) -> None:
        self._stopping = threading.Event()
        self.is_set = self._stopping.is_set

    def before_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        self._stopping.set()

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        self._stopping.clear()  # whoever calls a job without a worker stops nothing


class Stopping(PombalError):
    """This process is about to end."""


class LostClaim(PombalError):
    """It took too long, and somebody else has the file now."""


class Verdict(NamedTuple):
    """What a download came to: `wait` seconds until the next try, or None when this is the end."""

    code: str
    text: str
    wait: float | None = None
    counts: bool = True


class Download:
    """One claimed file on its way into the storage."""

    def __init__(self, row: RowMapping) -> None:
        self.row = row
        self.tenant: UUID = row["tenant_id"]
        self._began = time.monotonic()

    def run(self) -> float | None:
        """Fetch, store, write down what became of it. Returns the seconds until it is due again, None when it is over.

        Raises only what is the database's trouble.
        """
        claims.hold(self.row)
        try:
            verdict = self.brought()
            return self.settle(verdict) if verdict else None
        except LostClaim:
            _log.warning("claim_lost", media_id=str(self.row["id"]))
            return None
        except Exception as error:
            if is_store_trouble(error):
                self.give_back()
            raise
        finally:
            claims.drop(self.row)

    def brought(self) -> Verdict | None:
        """None when the file is stored, and that is committed."""
        try:
            if self.row["crashes"] > FATAL_CRASHES:
                raise MediaFault("crashed", f"its download ended {FATAL_CRASHES} processes", is_final=True)
            self.bring()
        except LostClaim:
            raise
        except Exception as error:
            if is_store_trouble(error):
                raise
            return self.judged(error)
        return None

    def give_back(self) -> None:
        """The database is in trouble: end the claim now if that is possible, so that it counts for nothing."""
        try:
            with db.session([self.tenant]) as s:
                Media.put_back(s, self.row, 1.0, code=None, error=None, counts=False)
        except Exception as error:
            if not is_store_trouble(error):
                raise
            _log.warning("claim_runs_out", media_id=str(self.row["id"]), error=log.described(error))

    def bring(self) -> None:
        row = self.row
        quota = settings().media_quota
        if quota:
            with db.session([self.tenant]) as s:
                if File.total(s, self.tenant) >= quota:
                    raise MediaFault("quota_reached", "the tenant has as many bytes as it may")
        if not circuit.allows(_STORAGE):
            raise MediaFault("paused", "the storage could not be used several times in a row")
        secrets = unseal(row["channel_id"], row["sealed"]) if row["sealed"] else {}
        source = providers.source(row["channel_kind"], row["config"], secrets, dict(row))
        with storage().spool() as spool:
            received = self.fetch(source, spool)
            file, is_new = self.keep(spool, received)
        self.note(file, is_new=is_new)

    def fetch(self, source: Source, spool: Spool) -> Received:
        if not circuit.allows(source.host):
            raise MediaFault("paused", "its host did not answer several times in a row")
        try:
            received = source.fetch(Sink(self, spool), MOST_BYTES.get(self.row["kind"], MOST_BYTES_OF_OTHERS))
        except MediaFault as fault:
            if fault.code not in OF_THE_HOST:
                circuit.answered(source.host)
            elif circuit.failed(source.host, self.row["id"]):
                _log.error("media_host_paused", provider=self.row["channel_kind"], code=fault.code)
            raise
        circuit.answered(source.host)
        return received

    def keep(self, spool: Spool, received: Received) -> tuple[dict[str, Any], bool]:
        """Put the bytes under their final name, unless this tenant has them there; the row of `file`."""
        mime_type = sniff(received.head)
        with db.session([self.tenant]) as s:
            known = s.get(File, (self.tenant, received.digest))
        key = known.key if known else key_of(self.tenant, received.digest, extension(mime_type))
        is_new = known is None or storage().size(key) != received.size
        if is_new:
            storage().keep(spool, key)
        circuit.answered(_STORAGE)
        file = {"tenant_id": self.tenant, "digest": received.digest, "key": key, "bytes": received.size}
        return {**file, "mime_type": known.mime_type if known else mime_type}, is_new

    def note(self, file: dict[str, Any], *, is_new: bool) -> None:
        row = self.row
        is_mislabelled = not agrees(row["mime_type"], file["mime_type"])
        payload = {"media_id": row["id"], "mime_type": file["mime_type"], "bytes": file["bytes"]}
        with db.session([self.tenant]) as s:
            File.keep(s, file)
            if not Media.stored(s, row, digest=file["digest"], is_mislabelled=is_mislabelled):
                raise LostClaim
            Event.append(s, [Event.row("media_stored", self.tenant, row["channel_id"], row["message_id"], payload)])
        metrics.media_files.labels(provider=row["channel_kind"], outcome="stored").inc()
        metrics.media_bytes.labels(outcome="stored" if is_new else "known").inc(file["bytes"])
        metrics.media_seconds.labels(provider=row["channel_kind"]).observe(time.monotonic() - self._began)
        if is_mislabelled:
            metrics.media_files.labels(provider=row["channel_kind"], outcome="mislabelled").inc()
        _log.info("media_stored", **self.names(), bytes=file["bytes"], mime_type=file["mime_type"], is_new=is_new)

    def judged(self, error: Exception) -> Verdict:
        """What follows from a failure: when to try again, or why not."""
        match error:
            case MediaFault():
                code, text, wait = error.code, error.text, error.wait
            case StorageUnavailable():
                code, text, wait = "storage_unavailable", "the file could not be stored", 0.0
                circuit.failed(_STORAGE, self.row["id"])
                _log.error("media_storage_unavailable", why=error.why)
            case Stopping():
                code, text, wait = "stopping", "its worker stopped", 0.0
            case Misconfigured():
                code, text, wait = "misconfigured", "a setting of this installation is wrong", 0.0
                _log.error("media_misconfigured", error=str(error))
            case _:
                code, text, wait = "internal", "an error of our own", 0.0
                _log.error("media_failed_inside", **self.names(), traceback=log.redacted(error))
        if code in _NOT_COUNTED:
            return Verdict(code, text, wait=max(wait, _jittered(_NOT_COUNTED[code])), counts=False)
        attempts = self.row["attempts"]
        if self.row["is_overdue"]:
            return Verdict("expired", f"its time ran out; the last try: {code}, {text}")
        if (isinstance(error, MediaFault) and error.is_final) or attempts >= _FEW.get(code, attempts + 1):
            return Verdict(code, text)
        return Verdict(code, text, wait=max(1.0, wait, _jittered(WAITS[min(attempts, len(WAITS)) - 1])))

    def settle(self, verdict: Verdict) -> float | None:
        row, provider = self.row, self.row["channel_kind"]
        with db.session([self.tenant]) as s:
            if verdict.wait is not None:
                is_ours = Media.put_back(
                    s, row, verdict.wait, code=verdict.code, error=verdict.text, counts=verdict.counts
                )
            else:
                is_ours = Media.failed(s, row, code=verdict.code, error=verdict.text)
                payload = {"media_id": row["id"], "error_code": verdict.code}
                Event.append(s, [Event.row("media_failed", self.tenant, row["channel_id"], row["message_id"], payload)])
                DeadLetter.record(s, [self.letter(verdict)])
            if not is_ours:
                raise LostClaim
        outcome = "failed" if verdict.wait is None else "retried" if verdict.counts else "put_back"
        metrics.media_files.labels(provider=provider, outcome=outcome).inc()
        metrics.media_faults.labels(provider, verdict.code).inc()
        said = {**self.names(), "code": verdict.code, "attempts": row["attempts"], "wait": verdict.wait}
        if verdict.wait is None:
            _log.error("media_failed", **said)
        elif verdict.counts:
            _log.warning("media_retried", **said)
        else:
            _log.debug("media_put_back", **said)  # there may be thousands; its cause has a line of its own
        return verdict.wait

    def letter(self, verdict: Verdict) -> dict[str, Any]:
        row = self.row
        return letter(
            key=f"media:{row['id']}",
            actor="download_media",
            args=[str(self.tenant), str(row["id"])],
            tenant_id=self.tenant,
            message_id=row["message_id"],
            error=f"{verdict.code}: {verdict.text}",
            cause=verdict.code,
            failures=row["attempts"],
        )

    def names(self) -> dict[str, str]:
        """Of whom a log line speaks; ids of ours alone."""
        named = ("id", "tenant_id", "channel_id", "message_id")
        return {"media_id" if name == "id" else name: str(self.row[name]) for name in named}

    def goes_on(self) -> None:
        """Called with every piece of the file: may it go on? Raises `Stopping` or `LostClaim`."""
        if stop.is_set():
            raise Stopping
        if not claims.has(self.row):
            raise LostClaim


class Sink:
    """A spool that asks for leave before each piece."""

    def __init__(self, download: Download, spool: Spool) -> None:
        self._download = download
        self._spool = spool

    def write(self, chunk: bytes) -> None:
        self._download.goes_on()
        self._spool.write(chunk)


def _jittered(seconds: float) -> float:
    """Spread over a fifth, so that what failed together does not come back together."""
    return seconds * random.uniform(0.9, 1.1)  # noqa: S311 - jitter


circuit = Circuit()
claims = Claims()
stop = Stop()
broker.add_middleware(stop)
