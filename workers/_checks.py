"""One check of how a channel stands, because its provider said by itself that something changed (`told_at`).

One at a time for each channel, however often that says something; what it says meanwhile is asked about after. A host
that hangs is left to the rounds (`status_sync.py`), and so is a channel that hangs on a host that does not. Not a
queue, hence the underscore.
"""

import asyncio
from datetime import timedelta
from uuid import UUID, uuid4

from sqlalchemy import RowMapping

from models import standing
from pombal import db
from workers import _standing
from workers._circuit import Circuit
from workers._rounds import DatabaseClock, Round, new_loop

_SECONDS = 10.0
_HELD = timedelta(seconds=_SECONDS + 5)
_WAITS = (2.0, 5.0, 15.0)  # seconds before a check that had no answer is made again
_LONGEST_WAIT = 120.0  # … that a gateway may ask for; then it is the next round's


def check(id_: UUID, tries: int) -> float | None:
    """Ask about this channel if that is needed, and write down what is found. Seconds until the next check, if one is
    due: what had no answer is asked again a few times, and noted as unknown then."""
    with db.session() as s:
        db.see_all(s)
        row = standing.take_check(s, id_, _HELD, is_again=tries > 0)
    if row is None:
        return None  # not needed any more; or it is gone, or of a kind that is not asked
    # Those without a host of their own are at one of the operator's, which each kind has its own of.
    host, name = f"{row['kind']} {row['config'].get('host') or ''}", str(id_)
    if not (circuit.allows(host) and alone.allows(name)):  # it hangs, and so would we, one event after the other
        _leave(row)
        return None
    round_ = Round([row], DatabaseClock(row["now"]), at_once=1, seconds=_SECONDS)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(round_.run(lambda _: None))
    found = round_.found[id_]
    if found.is_transient:
        circuit.failed(host, id_)
        alone.failed(name, uuid4())
        wait = max(_WAITS[tries], found.wait) if tries < len(_WAITS) else None
        if wait is not None and wait <= _LONGEST_WAIT:
            _leave(row, wait)
            return wait
    else:
        circuit.answered(host)
        alone.answered(name)
    _standing.keep([row["tenant_id"]], [found.of(row)], is_probe=True)
    return 0.0 if _leave(row) else None


def _leave(row: RowMapping, wait: float | None = None) -> bool:
    """Leave the channel to others: now, or to the check that comes after so long; half of it, for clocks differ. True
    when it told something since it was taken."""
    with db.session([row["tenant_id"]]) as s:
        return standing.leave_check(s, row, None if wait is None else timedelta(seconds=wait / 2))


circuit = Circuit()  # of hosts
alone = Circuit()  # … and of channels
