"""The steps of sessions: connect, show a QR code until it is scanned or nobody scans it, end.

Queue `channel_session`, in: the ids of a tenant and of a channel. Rung by the routes that note a wish, by each step for
the next one, and by the sweep. Beside them: checks of how one channel stands, by its id (`_checks.py`). Safe to run
twice and anywhere: a step is made under a claim on the session's row, and what it came to is dropped when the wish is
another by then. Each step first asks how things stand, so one that died half-way is simply made again (megaapi.md,
"Endpoints").
"""

import asyncio
import random
import time
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from sqlalchemy import RowMapping

import providers
from models import ChannelKind, SessionState, SessionWish, WaSession, standing
from models.session import Settled
from pombal import db, log, metrics
from pombal.broker import HardenedBroker, actor, broker
from pombal.errors import Misconfigured, Permanent
from pombal.middleware import bell_may_be_lost, is_store_trouble
from pombal.secrets import unseal
from pombal.settings import settings
from providers.http import Clients
from providers.instance import Instance, InstanceFault, Picture, Standing
from providers.stub import PAUSES, new_picture
from workers._checks import check
from workers._circuit import Circuit
from workers._standing import tell, write

_log = log.get()

LOOK = 5.0  # seconds between looks whether the code was scanned
REFRESH = 20.0  # … after which the gateway has another picture
PATIENCE = 300.0  # … that a code is shown for
LINGERS = 60.0  # … that a gateway gets to notice that it has logged an instance out
_RECONNECTS = 15.0  # … that an instance which was restarted gets
_STATUS_DEADLINE = 8.0
_LONGEST_STEP = 40.0  # less than a claim
_LONGEST_WAIT = {True: 60.0, False: 300.0}  # between steps that fail, by whether that is expected to pass
_MOST_STEPS = 20  # of one job
_MOST_RUNS = 4  # of a transaction that meets others in a deadlock
_MOST_RUNG = 500  # in one round of the sweep
_ENOUGH_JOBS = 1_000
# Of a logout that may come to the same as one: some gateways refuse it where nobody is logged in.
_REFUSALS = ("rejected", "provider_error", "unreadable")

EXPIRED = ("qr_expired", "nobody scanned the QR code in time")
STILL_CONNECTED = ("still_connected", "the gateway logged it out, and yet says that it is connected")
NOT_CONNECTED = ("not_connected", "it is paired with a phone, and yet the gateway did not connect it")


@actor(queue="channel_session", max_retries=3, min_backoff=1_000, max_backoff=8_000, throws=Permanent)
def channel_session(tenant_id: str, channel_id: str) -> None:
    """Make the next step of this channel's session if it is due, and all that are due at once after it."""
    try:
        tenant, channel = UUID(tenant_id), UUID(channel_id)
    except ValueError:
        raise Permanent("not the ids of a tenant and a channel") from None
    wait: float | None = 0.0
    for _ in range(_MOST_STEPS):
        with db.session([tenant]) as s:
            row = WaSession.claim(s, tenant, channel, uuid4())
        if row is None:
            return
        wait = Turn(row).run()
        if wait is None:
            return
        if wait > 0:
            break
    ring_session(tenant, channel, wait or 0.0)


@actor(queue="channel_session", max_retries=3, min_backoff=1_000, max_backoff=30_000, throws=Permanent)
def status_check(channel_id: str, tries: int = 0) -> None:
    """Ask how a channel stands, since its provider said by itself that something changed (`_checks.py`); the next round
    of the status sync asks in any case."""
    try:
        id_ = UUID(channel_id)
    except ValueError:
        raise Permanent("not the id of a channel") from None
    wait = check(id_, tries)
    if wait is not None:
        again = (channel_id, tries + 1) if wait else (channel_id,)
        status_check.send_with_options(args=again, delay=int(wait * 1000) or None)


def ring_session(tenant_id: UUID, channel_id: UUID, wait: float = 0.0) -> None:
    """Enqueue the step that is due after so many seconds; while Redis is away the sweep does it later."""
    with bell_may_be_lost("session_not_rung", channel_id=str(channel_id)):
        channel_session.send_with_options(args=(str(tenant_id), str(channel_id)), delay=int(wait * 1000) or None)


def ring_sessions(*, at_once: bool = False) -> int:
    """Enqueue a job for each session whose step is due and was not rung for lately; returns how many. `at_once`: Redis
    lost them."""
    if not at_once and isinstance(broker, HardenedBroker) and broker.waiting("channel_session") > _ENOUGH_JOBS:
        return 0
    with db.session() as s:
        db.see_all(s)
        due = WaSession.to_ring(s, _MOST_RUNG, at_once=at_once)
    for tenant_id, channel_id in due:
        channel_session.send(str(tenant_id), str(channel_id))
    metrics.sweeps.labels(queue="channel_session").inc(len(due))
    return len(due)


class Step(NamedTuple):
    """What a step came to: the states it went through, and when the next one is due; `wait` None: it is done."""

    states: tuple[SessionState, ...] = ()
    wait: float | None = None
    picture: Picture | None = None
    error: tuple[str, str] | None = None
    has_failed: bool = False


class Turn:
    """One claimed step."""

    def __init__(self, row: RowMapping) -> None:
        self.row = row
        self.state = SessionState(row["state"])
        self._began = time.monotonic()
        self._told_at: datetime | None = None
        self._said: dict[str, Any] | None = None  # how the channel stands, for `models/standing.py`

    def run(self) -> float | None:
        """Make it and write it down. Seconds until the next one, None when there is none. Raises only what is the
        database's trouble: the claim runs out then, and the step is made again."""
        step = self._made()
        news, settled = self._kept(step)
        tell(news)
        if settled is None:
            _log.warning("claim_lost", **self._names())
            return None
        for state in settled.states:
            _log.info("session_status", **self._names(), state=str(state))
        return settled.wait

    def _kept(self, step: Step) -> tuple[list[dict[str, Any]], Settled | None]:
        """Write it down: what is news of the channel, and what came of the session."""
        row, tenant = self.row, self.row["tenant_id"]
        for left in reversed(range(_MOST_RUNS)):
            try:
                with db.session([tenant]) as s:
                    # Channels before lanes before sessions, as everywhere.
                    if self._told_at is not None:
                        standing.told(s, [(tenant, row["channel_id"], self._told_at)])
                    # Asked on purpose: a poll that was asked before must not undo it, be it news or not.
                    news = write(s, [self._said], is_probe=True) if self._said is not None else []
                    return news, WaSession.settle(
                        s,
                        row,
                        step.states,
                        wait=step.wait,
                        picture=step.picture,
                        error=step.error,
                        has_failed=step.has_failed,
                    )
            except Exception as error:
                if not (left and db.is_worth_rerunning(error)):
                    raise
        raise AssertionError("the last run returns or raises")

    def _made(self) -> Step:
        try:
            if self.row["kind"] == ChannelKind.STUB:
                return self._played()
            return asyncio.run(self._asked())
        except InstanceFault as fault:
            return self._failed(fault.code, fault.text, fault.wait, is_transient=fault.is_transient)
        except Misconfigured as error:
            _log.error("session_misconfigured", **self._names(), error=str(error))
            return self._failed("misconfigured", "a setting of this installation is wrong")
        except Exception as error:
            if is_store_trouble(error):
                raise
            _log.error("session_failed_inside", **self._names(), traceback=log.redacted(error))
            return self._failed("internal", "an error of our own")

    def _failed(self, code: str, text: str, wait: float = 0.0, *, is_transient: bool = False) -> Step:
        """The wish stays, whatever it was; but a code that nobody can see any more is not shown for ever."""
        _log.warning("session_step_failed", **self._names(), code=code, failures=self.row["attempts"] + 1)
        if self.row["wish"] == SessionWish.START and self._is_out_of_patience():
            return Step((SessionState.DISCONNECTED,), error=EXPIRED)
        first = 2.0 if is_transient else 15.0
        backoff = min(first * 2 ** min(self.row["attempts"], 10), _LONGEST_WAIT[is_transient])
        wait = max(wait, backoff * random.uniform(0.9, 1.1))  # noqa: S311 - jitter
        return Step(wait=wait, error=(code, text), has_failed=True)

    # ------------------------------------------------------------------------------------------------- a real gateway

    async def _asked(self) -> Step:
        row = self.row
        clients = Clients(1)
        try:
            secrets = unseal(row["channel_id"], row["sealed"]) if row["sealed"] else {}
            instance = providers.instance(row["kind"], clients, row["config"], secrets)
            return await circuit.reach(instance.host, self.row["channel_id"], lambda: self._in_time(instance))
        finally:
            await clients.close()

    async def _in_time(self, instance: Instance) -> Step:
        try:
            async with asyncio.timeout(_LONGEST_STEP):
                ends = self.row["wish"] == SessionWish.STOP
                return await (self._ended(instance) if ends else self._connected(instance))
        except TimeoutError:
            raise InstanceFault("timeout", "the gateway did not answer in time", is_transient=True) from None

    async def _connected(self, instance: Instance) -> Step:
        seen = await self._status(instance)
        if seen.status == "connected":
            is_scanned = self.state == SessionState.QRCODE
            return Step((*[SessionState.AUTHENTICATED] * is_scanned, SessionState.READY))
        if self._is_out_of_patience():
            return Step((SessionState.DISCONNECTED,), error=EXPIRED)
        if self.state == SessionState.QRCODE and self._age(self.row["qr_at"]) < REFRESH:
            return Step(wait=LOOK)
        begun = () if self.state == SessionState.QRCODE else (SessionState.CONNECTING,)
        found = await instance.qr()
        if found is not None:
            return Step((*begun, SessionState.QRCODE), wait=LOOK, picture=found)
        if self._age(self.row["wished_at"]) >= PATIENCE:
            return Step((SessionState.DISCONNECTED,), error=NOT_CONNECTED)
        if seen.status != "disconnected":  # logged in, and its status may need a moment more to say so
            return Step(begun, wait=LOOK)
        await instance.restart()  # paired, and not connected
        return Step(begun, wait=_RECONNECTS)

    async def _ended(self, instance: Instance) -> Step:
        """Log out, however it stands: one that is disconnected may be paired, and would connect again by itself."""
        try:
            await instance.logout()
        except InstanceFault as fault:
            if fault.code == "not_found":
                return Step((SessionState.DISCONNECTED,), error=(fault.code, fault.text))  # nothing is left to be ended
            if fault.code not in _REFUSALS or not await self._waits_for_a_scan(instance):
                raise
        self._told_at = self._now()  # whatever was asked before is out of date
        try:
            seen = await self._status(instance)
        except InstanceFault as fault:
            # It need not say how it stands to be ended; what is the matter with it shows then.
            _log.debug("session_status_unknown", **self._names(), code=fault.code)
            return Step((SessionState.DISCONNECTED,))
        if seen.status != "connected":
            return Step((SessionState.DISCONNECTED,))
        was_so = self.row["error_code"] == STILL_CONNECTED[0]  # at the step before this one
        if not was_so or self._age(self.row["wished_at"]) < LINGERS:
            return Step(wait=LOOK, error=STILL_CONNECTED)
        return Step((SessionState.READY,), error=STILL_CONNECTED)

    async def _waits_for_a_scan(self, instance: Instance) -> bool:
        """Whether nobody is logged in, as far as the gateway says."""
        try:
            seen = await instance.status(_STATUS_DEADLINE)
            return seen.status == "disconnected" and await instance.qr() is not None
        except InstanceFault as fault:
            _log.debug("session_status_unknown", **self._names(), code=fault.code)
            return False

    async def _status(self, instance: Instance) -> Standing:
        """How it stands; that is noted for the channel too, and so is that it did not say."""
        said = {"tenant_id": self.row["tenant_id"], "id": self.row["channel_id"], "asked_at": self._now()}
        try:
            seen = await instance.status(_STATUS_DEADLINE)
        except InstanceFault as fault:
            self._said = {**said, "status": None, "raw": fault.raw, "reason": fault.code, "own_id": None}
            raise
        reason = None if seen.status else "odd_answer"
        self._said = {**said, "status": seen.status, "raw": seen.raw, "reason": reason, "own_id": seen.own_id}
        return seen

    # ------------------------------------------------------------------------------------------------- the stub's play

    def _played(self) -> Step:
        if self.row["wish"] == SessionWish.STOP:
            return self._plays(SessionState.DISCONNECTED)
        pause = 0.0 if settings().whatsapp_stub_fast else PAUSES.get(self.state, 0.0)
        if self.row["in_state"] < pause:
            return Step(wait=pause - self.row["in_state"])
        match self.state:
            case SessionState.CONNECTING:
                return self._plays(SessionState.QRCODE, new_picture())
            case SessionState.QRCODE:
                return self._plays(SessionState.AUTHENTICATED)
            case SessionState.DISCONNECTED:
                return self._plays(SessionState.CONNECTING)
        return self._plays(SessionState.READY)

    def _plays(self, state: SessionState, picture: Picture | None = None) -> Step:
        """On to this state; `channel.status` says whether it is ready."""
        if state in (SessionState.READY, SessionState.DISCONNECTED):
            status = "connected" if state == SessionState.READY else "disconnected"
            names = {"tenant_id": self.row["tenant_id"], "id": self.row["channel_id"], "asked_at": self._now()}
            self._said = {**names, "status": status, "raw": "stub", "reason": None, "own_id": None}
            return Step((state,))
        return Step((state,), wait=0.0 if settings().whatsapp_stub_fast else PAUSES[state], picture=picture)

    # ----------------------------------------------------------------------------------------------------------- time

    def _now(self) -> datetime:
        """By the database's clock. Later than whatever was asked before."""
        now: datetime = self.row["now"] + timedelta(seconds=time.monotonic() - self._began)
        return now if self._told_at is None else max(now, self._told_at + timedelta(microseconds=1))

    def _age(self, at: datetime | None) -> float:
        return float("inf") if at is None else (self._now() - at).total_seconds()

    def _is_out_of_patience(self) -> bool:
        return self.state == SessionState.QRCODE and self._age(self.row["state_since"]) >= PATIENCE

    def _names(self) -> dict[str, str]:
        """Of whom a log line speaks; ids of ours alone."""
        return {name: str(self.row[name]) for name in ("tenant_id", "channel_id")}


circuit = Circuit()
