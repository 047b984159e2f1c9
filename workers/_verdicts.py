"""What follows from one answer: what becomes of the message, and what the whole lane must heed.

Pure: an answer and what is known of the message in, a decision out (architecture.md, decision 6; whatsapp-cloud-api.md
§14). Not a queue, hence the underscore.
"""

import random
from datetime import timedelta
from typing import NamedTuple

from models import Hold, MessageStatus
from models.outgoing import SETTLE_WAIT
from providers.outbound import Answer, Fault, Kind, Outcome, Scope

_LONGEST_BACKOFF = 300.0
_MOST_STEPS = 5  # of a wait for a recipient's limit: 4^5 seconds
_NO_CONNECTION_WAIT = 2.0
ONCE_MORE, ASK = "once_more", "ask"  # what to do when nobody told what became of a send
STOPPED = Answer(Outcome.NOT_SENT, why="the process was told to stop")  # says nothing of the provider
# Of a file that was to go up: neither says anything of the provider.
NO_STORAGE = Answer(Outcome.NOT_SENT, why="the storage of its file cannot be used")
NO_FILE = Answer(
    Outcome.REFUSED,
    fault=Fault(Kind.PERMANENT, Scope.MESSAGE, "file_missing", "the storage no longer has the file as it was stored"),
)
OWN_TROUBLE = (STOPPED, NO_STORAGE, NO_FILE)
_STORAGE_WAIT = 10.0
_MOMENT = 5.0
DOUBLES_ALLOWED = 1  # extra attempts, each of which may reach the recipient a second time


class Verdict(NamedTuple):
    """Where a message goes next. `delay` in seconds: 0 back to its place, None without a date."""

    status: MessageStatus
    delay: float | None = None
    tries: int = 0
    throttles: int = 0
    unknowns: int = 0
    error_code: str | None = None
    error: str | None = None
    is_given_up: bool = False  # somebody should look at it: a dead letter


class Heed(NamedTuple):
    """What the lane, or its neighbours, must do about an answer."""

    hold: Hold | None = None
    pause: float = 0.0  # seconds
    is_too_fast: bool = False  # and more slowly afterwards
    scope: Scope = Scope.NUMBER  # of the pause
    code: str = ""
    reason: str = ""


def verdict(
    answer: Answer,
    *,
    type_: str,
    tries: int,
    throttles: int,
    settle: timedelta = SETTLE_WAIT,
    is_probe: bool = False,
) -> Verdict:
    """What becomes of a message whose attempt was not accepted. `tries` and `throttles` are those before."""
    if answer is STOPPED:
        return Verdict(MessageStatus.QUEUED, 0)
    if answer is NO_STORAGE:
        wait = _spread(_STORAGE_WAIT)
        return Verdict(MessageStatus.QUEUED, wait, error_code="storage_unavailable", error=answer.why)
    if answer.outcome is Outcome.NOT_SENT:
        return Verdict(MessageStatus.QUEUED, _spread(_NO_CONNECTION_WAIT), error_code="unreachable", error=answer.why)
    if answer.outcome is Outcome.UNKNOWN:
        if type_ == "read":  # marking as read once more does no harm
            return _transient(Fault(Kind.TRANSIENT, Scope.MESSAGE, "no_answer", answer.why, tries=6), tries)
        return Verdict(
            MessageStatus.UNKNOWN, settle.total_seconds(), unknowns=1, error_code="no_answer", error=answer.why
        )
    fault = answer.fault or Fault(Kind.PERMANENT, Scope.MESSAGE, "refused", "refused without a reason")
    if fault.is_outage and is_probe:  # not its doing, perhaps: it uses nothing up, and another one is the next probe
        return Verdict(MessageStatus.QUEUED, 1.0, error_code=fault.code, error=fault.text)
    if fault.kind is Kind.TRANSIENT:
        return _transient(fault, tries)
    if fault.kind is Kind.THROTTLE and fault.scope in (Scope.PAIR, Scope.MESSAGE):
        wait = max(4.0 ** min(throttles, _MOST_STEPS), fault.wait)
        return Verdict(MessageStatus.QUEUED, wait, throttles=1, error_code=fault.code, error=fault.text)
    if fault.kind in (Kind.THROTTLE, Kind.AUTH, Kind.PAYMENT, Kind.SESSION):
        # Not this message's doing: it keeps its place. But perhaps it is (a permission for its type, say): a probe goes
        # to the end, so that another one is the next probe.
        delay = 1.0 if is_probe and fault.kind is not Kind.THROTTLE else 0
        return Verdict(MessageStatus.QUEUED, delay, error_code=fault.code, error=fault.text)
    return Verdict(MessageStatus.FAILED, error_code=fault.code, error=fault.text)


def _transient(fault: Fault, tries: int) -> Verdict:
    if tries + 1 >= fault.tries:
        return Verdict(MessageStatus.FAILED, tries=1, error_code=fault.code, error=fault.text, is_given_up=True)
    # Full jitter: whatever failed together does not come back together.
    backoff = random.uniform(0.2, min(_LONGEST_BACKOFF, 2.0 ** (tries + 1)))  # noqa: S311 - jitter
    return Verdict(MessageStatus.QUEUED, max(backoff, fault.wait), tries=1, error_code=fault.code, error=fault.text)


def with_a_fresh_upload(fault: Fault) -> Verdict:
    """The provider may have forgotten the message's file: at its place, with the file handed over anew."""
    return Verdict(MessageStatus.QUEUED, 0, error_code=fault.code, error=fault.text)


def after_a_moment(fault: Fault) -> Verdict:
    """Perhaps it was refused for what was so then, and is no longer."""
    return Verdict(MessageStatus.QUEUED, _spread(_MOMENT), error_code=fault.code, error=fault.text)


def unanswered(*, unknowns: int, policy: str) -> Verdict:
    """A message of which no status told anything in time (security-reliability.md O2)."""
    if policy == ONCE_MORE and unknowns <= DOUBLES_ALLOWED:
        return Verdict(MessageStatus.QUEUED, 0)
    text = "the provider never said what became of it: it may have been sent"
    return Verdict(MessageStatus.UNKNOWN, error_code="no_answer", error=text, is_given_up=True)


def heed(answer: Answer) -> Heed | None:
    """What else than the message itself an answer concerns."""
    fault = answer.fault
    if fault is None:
        return None
    if fault.kind is Kind.AUTH:
        return Heed(Hold.AUTH, code=fault.code, reason=fault.text)
    if fault.kind is Kind.PAYMENT:
        return Heed(Hold.PAYMENT, code=fault.code, reason=fault.text)
    if fault.kind is Kind.SESSION:
        return Heed(Hold.DISCONNECTED, code=fault.code, reason=fault.text)
    if fault.scope in (Scope.MESSAGE, Scope.PAIR):
        return None
    pause = _spread(max(fault.wait, 2.0))
    return Heed(pause=pause, is_too_fast=fault.code == "130429", scope=fault.scope, code=fault.code)


def misses(answer: Answer) -> int:
    """How much an answer speaks for an outage: nothing, or one or two points."""
    if answer in OWN_TROUBLE:
        return 0
    if answer.outcome is Outcome.NOT_SENT:
        return 2
    is_outage = answer.fault is not None and answer.fault.is_outage
    return int(answer.outcome is Outcome.UNKNOWN or is_outage)


def _spread(seconds: float) -> float:
    """No synchronised return: half of the delay again, at random (security-reliability.md O3)."""
    return seconds * random.uniform(1.0, 1.5)  # noqa: S311 - jitter
