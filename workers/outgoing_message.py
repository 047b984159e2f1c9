"""Send what is queued: every message once, in its conversation's order, within the limits of its number.

Queue `outgoing_message`, in: a channel's id. Rung by the web tier after each commit, by whatever frees a lane, and by
the sweep when something falls due. Safe to run twice and anywhere: a lane has one holder at a time (a lease), and a
message is marked `sending`, with its attempt, before its call leaves (architecture.md, decisions 5 and 6).

The job only wakes the lane: sending goes on beside the worker's threads (`_lanes.py`), turn by turn (`_line.py`), and
what follows from each answer is decided in `_verdicts.py`. Outside of a worker the job waits until the lane is done.
"""

from uuid import UUID

from models import Lane, Tick, outgoing
from pombal import db, metrics
from pombal.broker import HardenedBroker, actor, broker, cron
from pombal.errors import Permanent
from workers._lanes import Lanes

_MOST_LANES = 500  # rung in one round of the sweep
_ENOUGH_JOBS = 1_000
_NEXT_PROCESS_MS = 1_000


@actor(queue="outgoing_message", max_retries=3, min_backoff=1_000, max_backoff=8_000, throws=Permanent)
def outgoing_message(channel_id: str) -> None:
    """Send from this channel's lane, unless somebody else has it or nothing is due."""
    try:
        id_ = UUID(channel_id)
    except ValueError:
        raise Permanent("not the id of a channel") from None
    if lanes.stopping:  # its bells are somebody else's
        outgoing_message.send_with_options(args=(channel_id,), delay=_NEXT_PROCESS_MS)
        return
    done = lanes.wake(id_)
    if not lanes.has_worker:
        done.result()


@actor(queue="outgoing_message", max_retries=0, periodic=cron("* * * * *"))
def outgoing_message_tick() -> None:
    """Once a minute: ring for what is due even when no sweep runs, and for what nobody would ever wake."""
    with db.session() as s:
        if not Tick.claim(s, "outgoing_message"):
            return
    with db.session() as s:
        db.see_all(s)
        outgoing.wake_forgotten(s)
    lanes.decide_held()
    ring_lanes()


def ring_lanes(*, at_once: bool = False) -> int:
    """Enqueue a job for each lane that needs somebody and has nobody; returns how many. `at_once`: Redis lost them."""
    if not at_once and isinstance(broker, HardenedBroker) and broker.waiting("outgoing_message") > _ENOUGH_JOBS:
        return 0
    with db.session() as s:
        waiting = Lane.to_ring(s, _MOST_LANES, at_once=at_once)
    for channel_id in waiting:
        ring(channel_id)
    metrics.sweeps.labels(queue="outgoing_message").inc(len(waiting))
    return len(waiting)


def ring(channel_id: UUID) -> None:
    outgoing_message.send(str(channel_id))


lanes = Lanes(ring)
broker.add_middleware(lanes)
