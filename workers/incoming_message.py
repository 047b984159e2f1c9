"""Turn webhook bodies into contacts, conversations, messages, statuses, templates and events.

Queue `incoming_message`, in: ids of `delivery` rows. Rung by the web tier after each commit, by the sweep for what was
forgotten, and by a timer once a minute. Safe to run twice and at once: rows are worked on under a claim, and every
effect commutes (architecture.md, decisions 2 to 4).

The steps: claim (its own commit, so that a body that kills the process leaves a trace) → parse → effects and verdicts
in one commit, fenced by the claim. A batch that fails for a reason of its own is run again with the bad rows bisected
out under savepoints; those go on as jobs of their own, through retries to the dead letters. What an unsigned gateway
says of its connection is not believed: `status_sync` asks it (security-reliability.md S6). What it could not decrypt is
noted for `session_fixer`.
"""

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, NoReturn, TypeAlias
from uuid import UUID, uuid4

from sqlalchemy import RowMapping, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from models import App, DeadLetter, Delivery, DeliveryState, Route, Tick, WebhookToken, standing
from models.dead_letter import letter
from models.delivery import FATAL_CRASHES, LostClaim
from pombal import db, log, metrics
from pombal.broker import HardenedBroker, actor, broker, cron
from pombal.errors import Permanent, Rejected
from pombal.ids import born
from pombal.middleware import GivenUp, bell_may_be_lost, cause, is_store_trouble
from providers import baileys_webhook, inbound, megaapi_webhook, meta
from workers._effects import Settled, Stored, apply_items
from workers.download_media import ring_new

_log = log.get()

BATCH = 200  # deliveries in one job
_BATCH_BYTES = 8 * 1024 * 1024  # … and about so much of them in memory at a time; one alone may have 4 MiB
_ENOUGH_JOBS = 1_000  # in the queue: more bells would tell nobody anything
_RERUNS = 5
_MOST_LETTERS = 100  # of one delivery; a body of four million commas must not become as many rows
_LATE = timedelta(seconds=2)

# A suspect may take this process down: no other suspect must be alive in it then, or it would be blamed as well.
_one_suspect = threading.Lock()


@actor(queue="incoming_message", max_retries=3, min_backoff=1_000, max_backoff=8_000, throws=Permanent)
def incoming_message(ids: list[str]) -> None:
    """Process the deliveries with these ids; those that are done, or in other hands, are left alone.

    A job that comes late means a backlog: then it takes as many rows, but of all sources in turn, so that one's flood
    does not hold up the rest (decision 5). Whose rows it took has a job in the queue too, which does the same.
    """
    wanted = [UUID(id_) for id_ in ids]
    token = uuid4()
    with db.session() as s:
        if len(wanted) > 1 and datetime.now(UTC) - born(min(wanted)) > _LATE:
            wanted = Delivery.in_turn(s, BATCH) or wanted
        claimed = Delivery.claim(s, wanted, token, most_bytes=_BATCH_BYTES)
    if claimed:
        process(claimed, token)
        if sum(len(row["raw"]) for row in claimed) >= _BATCH_BYTES and len(claimed) < len(wanted):
            rest = set(wanted) - {row["id"] for row in claimed}
            incoming_message.send(sorted(str(id_) for id_ in rest))
    # Waiting longer for the turn would keep this thread from others' rows; the sweep rings for the suspect again.
    elif len(wanted) == 1 and _one_suspect.acquire(timeout=1):
        try:
            process_suspect(wanted[0], token)
        finally:
            _one_suspect.release()


@actor(queue="incoming_message", max_retries=0, periodic=cron("* * * * *"))
def incoming_message_tick() -> None:
    """Once a minute: keep the coming days' partitions, and ring for what waits even when no sweep runs."""
    with db.session() as s:
        if not Tick.claim(s, "incoming_message"):
            return
    make_partitions()
    ring_waiting()


def make_partitions() -> None:
    """Make what is missing of the coming week. It needs a lock on all of the table for a moment, and waits for none.

    Somebody who reads the table for long (a backup) would make us wait, and everybody who writes wait behind us.
    """
    try:
        with db.session() as s:
            s.execute(text("SET LOCAL lock_timeout = '100ms'"))
            s.execute(text("SELECT make_partitions(7)"))
    except OperationalError as error:
        if not is_store_trouble(error):
            raise
        _log.warning("partitions_not_made", error=log.described(error))  # the next minute tries again


def ring_waiting(*, at_once: bool = False, limit: int = 10 * BATCH) -> int:
    """Enqueue jobs for deliveries that wait and were not rung lately; returns how many. Suspects get a job each.

    While enough jobs wait already, no more are added: nobody works, or not fast enough. `at_once` does not ask.
    """
    if not at_once and isinstance(broker, HardenedBroker) and broker.waiting("incoming_message") > _ENOUGH_JOBS:
        return 0
    with db.session() as s:
        waiting = Delivery.to_ring(s, limit, at_once=at_once)
    for start in range(0, len(waiting), BATCH):
        chunk = waiting[start : start + BATCH]
        clean = [str(id_) for id_, is_suspect in chunk if not is_suspect]
        for job in [clean, *([str(id_)] for id_, is_suspect in chunk if is_suspect)]:
            if job:
                incoming_message.send(job)
        with db.session() as s:
            Delivery.rung(s, [id_ for id_, _ in chunk])
    metrics.sweeps.labels(queue="incoming_message").inc(len(waiting))
    return len(waiting)


def process(claimed: list[RowMapping], token: UUID) -> None:
    """One commit for all of them; a bad row does not keep its neighbours."""
    began = time.monotonic()
    batch = [Reading(row) for row in claimed]
    try:
        bad = commit_or_isolate(batch, token)
    except LostClaim:
        _log.warning("claim_lost", deliveries=len(batch))  # it took too long; whoever has the rows now does the work
        return
    except Exception as error:
        if len(batch) == 1 and is_own(error):
            fail(batch[0], token, error)
        give_back(batch, token)
        raise
    ring_new([(m.tenant_id, m.media_id) for reading in batch for m in reading.stored if m.media_id])
    ask_about({channel for reading in batch if reading not in bad for channel in reading.told})
    ring_fixers(batch[0].ailing)
    report(batch, bad, time.monotonic() - began)
    for reading in bad:
        incoming_message.send([str(reading.id)])


def process_suspect(id_: UUID, token: UUID) -> None:
    """Run alone a row whose last claim ended without a verdict, or park it when it has killed often enough."""
    with db.session() as s:
        row = Delivery.claim_suspect(s, id_, token)
    if row is None:
        return
    if row["crashes"] < FATAL_CRASHES:
        process([row], token)
        return
    reason = f"its process died {row['crashes']} times while it was worked on alone"
    with db.session() as s:
        tenants = tenants_of(s, [row])
        db.see(s, tenants.values())
        Delivery.finish(s, {id_: (DeliveryState.DEAD, reason)}, token)
        DeadLetter.record(s, [delivery_letter(row, reason, tenants.get(source_of(row)))])
    metrics.deliveries.labels(provider=row["provider"], outcome="parked").inc()
    _log.error("job_dead", delivery_id=str(id_), request_id=row["request_id"], error=reason)


PARSERS = {"meta": meta.parse, "megaapi": megaapi_webhook.parse, "baileys": baileys_webhook.parse}


class Reading:
    """One claimed delivery, parsed: what it says, and what became of it."""

    def __init__(self, row: RowMapping) -> None:
        self.row = row
        self.id: UUID = row["id"]
        self.parsed = inbound.Parsed([], [])
        self.rejected: str | None = None
        self.broken: Exception | None = None
        self.letters: list[dict[str, Any]] = []
        self.unusable = 0  # parts that were rejected or are foreign; the first of them have letters
        self.tenants: set[UUID] = set()
        self.told: set[UUID] = set()  # channels whose connection it says something of
        self.stored: list[Stored] = []
        self.settled: list[Settled] = []  # by all that were applied with this one, which is the first of them
        self.ailing: set[tuple[UUID, UUID]] = set()  # sessions that these have bad news of, by tenant and channel
        try:
            self.parsed = PARSERS[row["provider"]](row["raw"], row["received_at"])
        except Rejected as error:
            self.rejected = str(error)
        except Exception as error:  # a fault of the parser is this row's trouble, not its neighbours'
            self.broken = error

    def verdict(self) -> tuple[DeliveryState, str | None]:
        """`dead` only where nothing at all of it could be used."""
        if self.rejected:
            return DeliveryState.DEAD, self.rejected
        if self.parsed.ignored:
            return DeliveryState.IGNORED, self.parsed.ignored
        if self.letters:
            reason = f"{self.unusable} rejected, first: {self.letters[0]['error']}"
            return (DeliveryState.DONE if self.tenants else DeliveryState.DEAD), reason
        return DeliveryState.DONE, None


def is_own(error: Exception) -> bool:
    """Whether the fault lies in the rows, rather than with the stores or with other batches."""
    return not is_store_trouble(error) and not db.is_worth_rerunning(error)


def commit_or_isolate(batch: list[Reading], token: UUID) -> list[Reading]:
    """Commit the batch; returns the rows that cannot be, if it takes leaving them out."""
    try:
        commit(batch, token, apply_together)
        return []
    except LostClaim:
        raise
    except Exception as error:
        if len(batch) == 1 or not (is_own(error) or db.is_too_slow(error)):
            raise
    return commit(batch, token, apply_isolated)


def commit(batch: list[Reading], token: UUID, how: "Apply") -> list[Reading]:
    """Write effects, verdicts and dead letters in one commit; returns the rows left out. Reruns after a deadlock."""
    for attempt in range(1, _RERUNS + 1):
        try:
            with db.session() as s:
                routes = Routes(s, batch)
                db.see(s, routes.tenants)
                db.by_key(s)
                # Before all else: whoever locks a channel's row and its lane takes them in this order.
                standing.told(s, routes.connections(batch))
                bad = how(s, batch, routes)
                good = [reading for reading in batch if reading not in bad]
                for reading in good:
                    routes.quarantine(reading)
                DeadLetter.record(s, [row for reading in good for row in reading.letters])
                Delivery.finish(s, {reading.id: reading.verdict() for reading in good}, token)
                Delivery.set_apart(s, [reading.id for reading in bad], token)
                batch[0].ailing = note_failures(s, good, routes)
            return bad
        except Exception as error:
            if not db.is_worth_rerunning(error) or attempt == _RERUNS:
                raise
    raise AssertionError("unreachable")


Apply: TypeAlias = "Callable[[Session, list[Reading], Routes], list[Reading]]"


def apply_together(s: Session, batch: list[Reading], routes: "Routes") -> list[Reading]:
    """Apply all or raise."""
    for reading in batch:
        if reading.broken:
            raise reading.broken
    for reading in batch:
        reading.stored, reading.settled = [], []
    given = [
        (reading, route.tenant_id, route.channel_id, item)
        for reading in batch
        for change in reading.parsed.changes
        for route in routes.of(reading, change)
        for item in change.items
    ]
    stored, settled = apply_items(s, given)
    for reading, message in stored:
        reading.stored.append(message)
    batch[0].settled = settled
    return []


_OF_AN_ERROR = ("jid", "message_id", "participant", "cause", "at")


def note_failures(s: Session, good: list[Reading], routes: "Routes") -> set[tuple[UUID, UUID]]:
    """Write down what gateways could not decrypt and how their connections ended, after all else that is locked;
    returns the sessions to ring for after the commit."""
    errors: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    for reading in good:
        for change in reading.parsed.changes:
            bad_news = [item for item in change.items if isinstance(item, inbound.Undecrypted | inbound.Ended)]
            for place in routes.of(reading, change) if bad_news else ():
                names = {"tenant_id": place.tenant_id, "channel_id": place.channel_id, "source": "webhook"}
                for item in bad_news:
                    if isinstance(item, inbound.Undecrypted):
                        errors.append(names | {name: getattr(item, name) for name in _OF_AN_ERROR})
                    else:
                        ends.append(names | {"code": item.code, "at": item.at})
    if not errors and not ends:
        return set()
    from workers.session_fixer import take_note  # here, since few bodies are of a failure

    return take_note(s, errors, ends)


def apply_isolated(s: Session, batch: list[Reading], routes: "Routes") -> list[Reading]:
    """Apply what can be applied, halving around what cannot; returns the rows that failed by themselves."""
    try:
        with s.begin_nested():
            return apply_together(s, batch, routes)
    except Exception as error:
        if not (is_own(error) or db.is_too_slow(error)):
            raise
        if len(batch) == 1:
            return batch
    half = len(batch) // 2
    return apply_isolated(s, batch[:half], routes) + apply_isolated(s, batch[half:], routes)


def fail(reading: Reading, token: UUID, error: Exception) -> NoReturn:
    """Count the failure of a row that ran alone, and raise: its own error, or `GivenUp` when it had its tries."""
    limit = incoming_message.options["max_retries"]
    with db.session() as s:
        failures = Delivery.failed(s, reading.id, token, limit=limit)
        if failures > limit:
            tenants = tenants_of(s, [reading.row])
            db.see(s, tenants.values())
            row = delivery_letter(reading.row, log.described(error), tenants.get(source_of(reading.row)))
            row |= {"traceback": log.redacted(error), "failures": failures}
            row["fingerprint"] = delivery_letter(reading.row, cause(error), None)["fingerprint"]
            DeadLetter.record(s, [row])
    if failures > limit:
        metrics.deliveries.labels(provider=reading.row["provider"], outcome="dead").inc()
        raise GivenUp(f"delivery {reading.id} failed {failures} times: {log.described(error)}") from error
    raise error


def give_back(batch: list[Reading], token: UUID) -> None:
    """The store is away: end the claim now if that is possible, else it runs out."""
    try:
        with db.session() as s:
            Delivery.release(s, [reading.id for reading in batch], token)
    except Exception as error:
        if not is_store_trouble(error):
            raise
        _log.warning("claim_not_released", deliveries=len(batch), error=log.described(error))


class Place(NamedTuple):
    """Where a change belongs."""

    tenant_id: UUID
    channel_id: UUID


class Routes:
    """Where the changes of a batch belong, and the tenants that its transaction may touch."""

    def __init__(self, s: Session, batch: list[Reading]) -> None:
        wanted = {
            _route_key(reading.row, change)
            for reading in batch
            for change in reading.parsed.changes
            if reading.row["channel_id"] is None
        }
        self._found: dict[tuple[UUID, str, str], list[Place]] = {}
        for route in Route.among(s, wanted):
            key = (route.app_id, route.kind, route.value)
            self._found.setdefault(key, []).append(Place(route.tenant_id, route.channel_id))
        rows = [reading.row for reading in batch]
        self._gateways = gateways_of(s, rows)
        self._tenants = tenants_of_apps(s, rows)
        self._tenants.update({channel_id: place.tenant_id for channel_id, (place, _) in self._gateways.items()})
        self.tenants = {place.tenant_id for places in self._found.values() for place in places}
        self.tenants.update(self._tenants.values())

    def of(self, reading: Reading, change: inbound.Change) -> list[Place]:
        """The channel of a number, all channels of an account, or the channel that a gateway's delivery came for; empty
        when the change is not this source's."""
        channel_id = reading.row["channel_id"]
        if channel_id is None:
            return self._found.get(_route_key(reading.row, change), [])
        place, instances = self._gateways.get(channel_id, (None, set()))
        is_its_own = change.number is None or None in instances or change.number in instances
        return [place] if place and is_its_own else []

    def connections(self, batch: list[Reading]) -> list[tuple[UUID, UUID, datetime]]:
        """The channels of whose connection a body says something, with the time when it came; noted on the bodies."""
        told = []
        for reading in batch:
            reading.told = set()
            for change in reading.parsed.changes:
                if any(isinstance(item, inbound.Connection) for item in change.items):
                    for place in self.of(reading, change):
                        reading.told.add(place.channel_id)
                        told.append((*place, reading.row["received_at"]))
        return told

    def quarantine(self, reading: Reading) -> None:
        """Write the dead letters of what cannot be used: a whole body, single elements, and foreign ids."""
        row, tenant = reading.row, self._tenants.get(source_of(reading.row))
        unusable: list[tuple[str, str | None]] = [(reject.reason, reject.path) for reject in reading.parsed.rejects]
        reading.tenants = set()
        if reading.rejected:
            unusable.append((reading.rejected, None))
        for change in reading.parsed.changes:
            places = self.of(reading, change)
            reading.tenants.update(place.tenant_id for place in places)
            if not places:
                unusable.append((FOREIGN if row["channel_id"] is None else FOREIGN_INSTANCE, change.path))
        reading.unusable = len(unusable)
        reading.letters = [delivery_letter(row, reason, tenant, path) for reason, path in unusable[:_MOST_LETTERS]]


FOREIGN = "foreign_id: no channel of this app has this number or account"
FOREIGN_INSTANCE = "foreign_id: the token that it came with is of no channel of this instance"


def _route_key(row: RowMapping, change: inbound.Change) -> tuple[UUID, str, str]:
    if change.number is not None:
        return row["app_id"], "number", change.number
    return row["app_id"], "waba", change.waba or ""


def source_of(row: RowMapping) -> UUID:
    """Whose webhook a delivery came by: an app's, or a gateway's channel's."""
    source: UUID = row["app_id"] or row["channel_id"]
    return source


def tenants_of(s: Session, rows: list[RowMapping]) -> dict[UUID, UUID]:
    """The tenant of each source that has one."""
    gateways = gateways_of(s, rows)
    return tenants_of_apps(s, rows) | {channel_id: place.tenant_id for channel_id, (place, _) in gateways.items()}


def tenants_of_apps(s: Session, rows: list[RowMapping]) -> dict[UUID, UUID]:
    """The tenant of each app that has one; a shared app's letters are the operators'."""
    apps = {row["app_id"] for row in rows if row["app_id"]}
    return App.tenants_of(s, apps) if apps else {}


def gateways_of(s: Session, rows: list[RowMapping]) -> dict[UUID, tuple[Place, set[str | None]]]:
    """Of each channel that a delivery came for: its place, and the instances whose events may come with its tokens."""
    found: dict[UUID, tuple[Place, set[str | None]]] = {}
    channels = {row["channel_id"] for row in rows if row["channel_id"]}
    for row in WebhookToken.owners(s, channels) if channels else ():
        found.setdefault(row.channel_id, (Place(row.tenant_id, row.channel_id), set()))[1].add(row.instance)
    return found


def ask_about(channels: set[UUID]) -> None:
    """Their gateways said that something changed: ask them how they stand. A lost bell costs minutes, not the news."""
    if not channels:
        return
    from workers.channel_session import status_check  # here, since few bodies are of a connection

    with bell_may_be_lost("status_checks_not_rung", channels=len(channels)):
        for channel_id in sorted(channels):
            status_check.send(str(channel_id))


def ring_fixers(sessions: set[tuple[UUID, UUID]]) -> None:
    """Something is wrong with these sessions: have the fixer look at them."""
    if not sessions:
        return
    from workers.session_fixer import ring_fixer  # here, since few bodies are of a failure

    for tenant_id, channel_id in sorted(sessions):
        ring_fixer(tenant_id, channel_id)


def delivery_letter(row: RowMapping, reason: str, tenant: UUID | None, path: str | None = None) -> dict[str, Any]:
    key = f"delivery:{row['id']}" + (f":{path}" if path else "")
    return letter(
        key=key,
        actor="incoming_message",
        args=[[str(row["id"])]],
        delivery_id=row["id"],
        path=path,
        tenant_id=tenant,
        error=reason,
        failures=row["failures"],
    )


def report(batch: list[Reading], bad: list[Reading], seconds: float) -> None:
    """Count and log what a committed batch came to."""
    now = datetime.now(UTC)
    for reading in batch:
        if reading in bad:
            continue
        provider, (state, reason) = reading.row["provider"], reading.verdict()
        metrics.deliveries.labels(provider=provider, outcome=state).inc()
        lag = (now - reading.row["received_at"]).total_seconds()
        metrics.delivery_lag.labels(provider=provider).observe(max(0.0, lag))
        for row in reading.letters:
            kind = "foreign_id" if row["error"] in (FOREIGN, FOREIGN_INSTANCE) else "element" if row["path"] else "body"
            metrics.quarantined.labels(provider=provider, kind=kind).inc()
            if kind == "foreign_id":
                metrics.security_events.labels(kind="foreign_id").inc()
        for message in reading.stored:
            outcome = "stored" if message.is_new else "duplicate"
            metrics.messages.labels(direction=message.direction, provider=provider, outcome=outcome).inc()
            if message.is_new:
                _log.info(
                    "message_received",
                    message_id=str(message.id),
                    direction=message.direction,
                    tenant_id=str(message.tenant_id),
                    channel_id=str(message.channel_id),
                    delivery_id=str(reading.id),
                )
        for send in reading.settled:
            if send.had_no_answer:
                metrics.unknown_sends.labels(provider=provider, outcome="settled").inc()
            if send.is_double:
                metrics.double_sends.labels(provider=provider).inc()
        _log.info(
            "webhook_processed",
            delivery_id=str(reading.id),
            request_id=reading.row["request_id"],
            state=state,
            reason=reason,
            messages=len(reading.stored),
            tenants=[str(tenant) for tenant in sorted(reading.tenants)],
            batch=len(batch),
            seconds=round(seconds, 4),
        )
