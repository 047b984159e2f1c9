"""Bring channels in line with what their providers say of them: all of them every five minutes, one when it is told.

Queue `status_sync`, in: the id of a report (`models/sync_report.py`), or nothing for a round over all. Rung by the
clock, by the web tier for whoever asks, and by the sweep for what waits. Checks of one channel are on another queue
(`channel_session.py`): gateways that hang must not hold the threads of the rounds. Safe to run twice and anywhere: one
round runs at a time, under a lease; what a poll says counts by when it was asked (`models/standing.py`), so neither a
slow answer nor a second run can turn the clock back; and only what is news is written.

No transaction is open while providers are asked (`_rounds.py`); what follows from news is in `_standing.py`.
"""

import asyncio
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from dramatiq import Broker, Worker
from dramatiq.middleware import Middleware
from sqlalchemy import RowMapping, func, select
from sqlalchemy.orm import Session

from models import Event, Lane, Lease, SyncReport, Tick, WaSession, standing
from models.sync_report import LEASE
from pombal import db, log, metrics
from pombal.broker import actor, broker, cron
from pombal.errors import Permanent, PombalError
from pombal.middleware import bell_may_be_lost, is_redis_trouble, is_store_trouble
from pombal.settings import settings
from workers import _standing
from workers._rounds import DatabaseClock, Found, Round, Stopping, new_loop
from workers.channel_session import status_check

_log = log.get()

_ROUND_SECONDS = 58.0  # from its tick until a round is over; the next tick is far
_SHORTEST_ROUND = 45.0  # … of one that began late, since no worker was there for its tick
_SPREAD = 45.0  # seconds over which a due round is spread at most
_SPREAD_EACH = 0.05  # … and for each channel
_TIME_FOR_ANSWERS = 13.0  # after the last one was asked
_LEASE = timedelta(seconds=30)
_RENEW = 5.0  # seconds
_MOST_AT_ONCE = 200  # channels in a transaction
_STORE_PATIENCE = 10.0  # seconds that what was found is held in memory for a database that is away
_MOST_LISTED = 1_000  # entries of each list of a report
_PROGRESS = 10.0  # seconds


@actor(queue="status_sync", max_retries=3, min_backoff=1_000, max_backoff=30_000, throws=Permanent)
def status_sync(report_id: str | None = None) -> None:
    """Make this report, unless another round runs: whoever makes that one rings for the next. Without an id: for all
    channels, now."""
    if report_id is None:
        with db.session() as s:
            id_, _ = SyncReport.open(s, None, is_dry=False)
    else:
        try:
            id_ = UUID(report_id)
        except ValueError:
            raise Permanent("not the id of a report") from None
    make(id_)


@actor(queue="status_sync", max_retries=0, periodic=cron("*/5 * * * *"))
def status_sync_tick() -> None:
    """A round over all channels, spread over a while."""
    with db.session() as s:
        if not Tick.claim(s, "status_sync"):
            return
        SyncReport.forget(s)
        if Lease.take(s, LEASE, token := uuid4(), _LEASE):
            SyncReport.fail_dead(s)  # or the round that died would be taken for one on its way
            Lease.release(s, LEASE, token)
        id_, is_new = SyncReport.open(s, None, is_dry=False, is_due=True)
        (state,) = s.execute(select(SyncReport.state).where(SyncReport.id == id_)).one()
    if not is_new and state == "running":
        metrics.sync_seconds.labels(outcome="skipped").observe(0)
        _log.warning("sync_skipped", report_id=str(id_))
        return
    make(id_)


def ask_soon(tenant_id: UUID, channel_id: UUID) -> None:
    """Something else than a poll told how this channel stands: have its provider asked. A store that is away costs
    minutes, for the next round asks in any case."""
    try:
        with db.session([tenant_id]) as s:
            standing.told(s, [(tenant_id, channel_id, s.execute(select(func.clock_timestamp())).scalar_one())])
        status_check.send(str(channel_id))
    except Exception as error:
        if not is_store_trouble(error) and not is_redis_trouble(error):
            raise
        _log.warning("status_check_not_rung", channel_id=str(channel_id), error=log.described(error))


def channels(
    *, tenant_id: UUID | None = None, channel_id: UUID | None = None
) -> tuple[list[RowMapping], DatabaseClock]:
    """Those that can be asked about, as `standing.polled` gives them, and a clock that goes on from then."""
    with db.session() as s:
        _see(s, tenant_id)
        rows = standing.polled(s, tenant_id=tenant_id, channel_id=channel_id)
        now = min((row["now"] for row in rows), default=None) or s.execute(select(func.now())).scalar_one()
    return rows, DatabaseClock(now)


def _see(s: Session, tenant_id: UUID | None) -> None:
    if tenant_id is None:
        db.see_all(s)
    else:
        db.see(s, [tenant_id])


def ring_reports(*, at_once: bool = False) -> int:
    """Enqueue a job for the next report that waits, if no round runs; returns how many. `at_once`: Redis lost it."""
    with db.session() as s:
        id_ = SyncReport.to_ring(s, at_once=at_once)
    if id_ is None:
        return 0
    status_sync.send(str(id_))
    metrics.sweeps.labels(queue="status_sync").inc()
    return 1


# ----------------------------------------------------------------------------------------------------------- one round


def make(id_: UUID) -> None:
    """Make a report if it is pending and no round runs; then ring for the next one."""
    token = uuid4()
    with db.session() as s:
        if not Lease.take(s, LEASE, token, _LEASE):
            _log.info("sync_waits", report_id=str(id_))
            return
        dead = SyncReport.fail_dead(s)
        report = SyncReport.begin(s, id_)
        if report is None:
            Lease.release(s, LEASE, token)
    for one in dead:
        _log.error("sync_failed", report_id=str(one), error="its process ended")
    if report is not None:
        Sync(report, token).make()
    _ring_next()


def _ring_next() -> None:
    with bell_may_be_lost():
        ring_reports(at_once=True)


class LostLease(PombalError):
    """It took too long, and somebody else makes the rounds now."""


class GivesWay(Stopping):
    """A round over all channels waits. This one is made anew after it."""


class Sync:
    """One report on its way: under the lease, from what is believed to what was found."""

    def __init__(self, report: RowMapping, token: UUID) -> None:
        self.id: UUID = report["id"]
        self.tenant_id: UUID | None = report["tenant_id"]
        self.is_dry: bool = report["is_dry"]
        self._is_due: bool = report["is_due"]
        self._waited = float(report["waited"])
        self._token = token
        self._began = self._renewed = self._told = time.monotonic()
        self._left: list[UUID] = []  # found, and not looked at yet
        self._failing_since: float | None = None
        before = report["result"] or {}  # told, and written down, by this one until it was put back
        self._changed: list[dict[str, Any]] = before.get("changed", [])
        self._differs: list[dict[str, Any]] = before.get("differs", [])

    @property
    def is_whole(self) -> bool:
        """It leaves no channel unasked, and writes down what it finds."""
        return self.tenant_id is None and not self.is_dry

    def make(self) -> None:
        outcome = "failed"
        try:
            result = self._found_out()
            outcome = "done" if self._finish(result) else "lost"
            if outcome == "done" and not self.is_dry:
                self._look_for_silence()
        except Stopping as why:
            outcome = "stopped"
            self._put_back()
            _log.info("sync_stopped", report_id=str(self.id), gives_way=isinstance(why, GivesWay))
        except LostLease:
            outcome = "lost"
        except Exception as error:
            if is_store_trouble(error):
                self._put_back()
                raise
            _log.error("sync_failed", report_id=str(self.id), traceback=log.redacted(error))
            self._settle(SyncReport.fail, self.id, log.described(error))
            raise Permanent("a round of the status sync failed") from error
        finally:
            if outcome != "lost":
                self._settle(Lease.release, LEASE, self._token)
            else:
                _log.error("sync_failed", report_id=str(self.id), error="the lease was lost")
            metrics.sync_seconds.labels(outcome=outcome).observe(time.monotonic() - self._began)

    def _put_back(self) -> None:
        """What is written down already would be no news to whoever makes it anew."""
        written = {} if self.is_dry else {"changed": self._changed, "differs": self._differs}
        self._settle(SyncReport.put_back, self.id, written)

    def _settle(self, write: Any, *given: Any) -> None:
        """What is tried and need not succeed: a lease runs out, and a report that nobody makes is given up then."""
        try:
            with db.session() as s:
                write(s, *given)
        except Exception as error:
            if not is_store_trouble(error):
                raise
            _log.warning("sync_waits_for_a_store", report_id=str(self.id), error=log.described(error))

    def _found_out(self) -> dict[str, Any]:
        rows, clock = channels(tenant_id=self.tenant_id)
        seconds, spread = self._times(len(rows))
        _log.info(
            "sync_started",
            report_id=str(self.id),
            tenant_id=str(self.tenant_id) if self.tenant_id else None,
            is_dry=self.is_dry,
            channels=len(rows),
        )
        at_once = settings().status_sync_at_once
        self._round = Round(rows, clock, at_once=at_once, seconds=seconds, spread=spread)
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(self._round.run(self._hand_on, stop.is_set))
        return self._concluded()

    def _times(self, count: int) -> tuple[float, float]:
        """Seconds until the round is over, and over which it is spread."""
        if not self._is_due:
            return _ROUND_SECONDS, 0.0
        seconds = max(_ROUND_SECONDS - self._waited, _SHORTEST_ROUND)
        return seconds, min(_SPREAD, _SPREAD_EACH * count, seconds - _TIME_FOR_ANSWERS)

    def _hand_on(self, fresh: list[UUID]) -> None:
        """In a thread, each second of the round: write down what is news, and keep the lease."""
        now = time.monotonic()
        if now - self._told > _PROGRESS:
            self._told = now
            _log.info("sync_progressed", checked=len(self._round.found), channels=len(self._round.rows))
        self._left += fresh
        try:
            if now - self._renewed > _RENEW:
                with db.session() as s:
                    if not Lease.take(s, LEASE, self._token, _LEASE):
                        raise LostLease
                self._renewed = now
            if not self.is_dry:
                self._keep(self._round.rows, self._left)
            self._left = []
            self._failing_since = None
            if self.tenant_id is not None and len(self._round.found) < len(self._round.rows):
                self._give_way()
        except Exception as error:
            if not is_store_trouble(error):
                raise
            self._failing_since = self._failing_since or now
            if now - self._failing_since > _STORE_PATIENCE:
                raise
            _log.warning("answers_wait_for_a_store", answers=len(self._left), error=log.described(error))

    def _give_way(self) -> None:
        """A round over all channels has a minute from its tick on: it does not wait for those that tenants ask for,
        save one that has stood back for long."""
        with db.session() as s:
            if SyncReport.is_in_the_way(s, self.id):
                raise GivesWay

    def _keep(self, rows: dict[UUID, RowMapping], ids: Iterable[UUID]) -> None:
        """Write down what is news to what these rows say."""
        given = [(rows[id_], self._round.found[id_]) for id_ in ids if id_ in rows]
        news = [found.of(row) for row, found in given if standing.is_news(row, **found.said())]
        for n in range(0, len(news), _MOST_AT_ONCE):
            part = news[n : n + _MOST_AT_ONCE]
            written, changes = _standing.keep({row["tenant_id"] for row in part}, part)
            self._changed += [
                {"name": rows[UUID(change["channel"])]["name"], **change, "at": self._at(UUID(change["channel"]))}
                for change in changes
            ]
            for row in written:
                was = standing.shown(row["was"], row["was_unknown"])
                self._compare(rows[row["id"]], was, self._round.found[row["id"]])

    def _compare(self, row: RowMapping, stored: str, found: Found) -> None:
        if found.status is not None and found.status != stored:
            self._differs.append(
                {
                    "channel": str(row["id"]),
                    "name": row["name"],
                    "instance": row["config"].get("instance_key") or row["config"].get("session"),
                    "stored": stored,
                    "provider": found.status,
                    "raw": found.raw,
                    "at": self._at(row["id"]),
                }
            )

    def _at(self, id_: UUID) -> str:
        return self._round.found[id_].asked_at.isoformat()

    def _concluded(self) -> dict[str, Any]:
        """The last look: others may have written while the round ran, and what was no news may be by now."""
        now, _ = channels(tenant_id=self.tenant_id)
        rows = {row["id"]: row for row in now if row["id"] in self._round.found}
        found = self._round.found
        if self.is_dry:
            for row in rows.values():
                if not standing.is_overtaken(row, found[row["id"]].asked_at):
                    self._compare(row, standing.shown(row["status"], row["unknown_reason"]), found[row["id"]])
        else:
            self._keep(rows, rows)
            self._repair()
        unknown = [
            {"channel": str(id_), "name": row["name"], "reason": found[id_].reason}
            for id_, row in rows.items()
            if found[id_].reason is not None
        ]
        lists = {"differs": self._differs, "unknown": unknown, "changed": self._changed}
        result: dict[str, Any] = {"checked": len(self._round.rows)}
        result |= {name: entries[:_MOST_LISTED] for name, entries in lists.items()}
        left_out = sum(max(0, len(entries) - _MOST_LISTED) for entries in lists.values())
        return result | ({"left_out": left_out} if left_out else {})

    def _repair(self) -> None:
        """What hangs on a channel and yet says otherwise: its session, its lane."""
        if repaired := _standing.rerun(self._repaired):
            _log.warning("sessions_repaired", report_id=str(self.id), sessions=repaired)
        for channel_id in _standing.rerun(self._freed):
            _standing.say_resumed(channel_id)

    def _repaired(self) -> int:
        with db.session() as s:
            _see(s, self.tenant_id)
            return WaSession.repair(s)

    def _freed(self) -> set[UUID]:
        with db.session() as s:
            _see(s, self.tenant_id)
            held = standing.held_in_vain(s)
            Lane.lock(s, [channel_id for _, channel_id in held])
            return _standing.resume(s, held)

    def _look_for_silence(self) -> None:
        """Nothing waits for this: that it takes too long must not have the whole fleet asked again."""
        try:
            quiet = _standing.rerun(self._found_silent)
        except Exception as error:
            if not is_store_trouble(error):
                raise
            _log.warning("silence_not_looked_for", report_id=str(self.id), error=log.described(error))
            return
        for row in quiet:
            event = "channel_heard" if row["silent_since"] is None else "channel_silent"
            _log.info(event, tenant_id=str(row["tenant_id"]), channel_id=str(row["id"]))

    def _found_silent(self) -> list[RowMapping]:
        """The channels that fell silent or are heard again."""
        with db.session() as s:
            _see(s, self.tenant_id)
            db.by_key(s)
            quiet = standing.find_silent(s)
            events = []
            for row in quiet:
                kind = "channel_heard" if row["silent_since"] is None else "channel_silent"
                payload = {"channel": str(row["id"]), "silent_since": row["silent_since"]}
                events.append(Event.row(kind, row["tenant_id"], row["id"], None, payload))
            Event.append(s, events)
            return quiet

    def _finish(self, result: dict[str, Any]) -> bool:
        with db.session() as s:
            is_ours = SyncReport.finish(s, self.id, result)
            if is_ours and self.is_whole:
                Lease.finished(s, LEASE, self._token)
        if is_ours:
            counts = {name: len(value) for name, value in result.items() if isinstance(value, list)}
            _log.info(
                "sync_finished",
                report_id=str(self.id),
                checked=result["checked"],
                **counts,
                seconds=round(time.monotonic() - self._began, 3),
            )
        return is_ours


class Stop(Middleware):
    """Rounds end when the worker does: another process makes them anew."""

    def __init__(self) -> None:
        self._stopping = threading.Event()
        self.is_set = self._stopping.is_set

    def before_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        self._stopping.set()

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        self._stopping.clear()  # whoever calls a job without a worker stops nothing


stop = Stop()
broker.add_middleware(stop)
