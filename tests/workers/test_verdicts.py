"""What follows from each answer, decided without a database: see whatsapp-cloud-api.md §14."""

from datetime import timedelta

import pytest

from models import Hold, MessageStatus
from providers.outbound import Answer, Fault, Kind, Outcome, Scope
from workers._verdicts import ASK, ONCE_MORE, STOPPED, Verdict, heed, misses, unanswered, verdict


def refused(
    kind: Kind,
    scope: Scope = Scope.MESSAGE,
    *,
    code: str = "1",
    tries: int = 6,
    wait: float = 0.0,
    text: str = "no",
    is_outage: bool = False,
) -> Answer:
    return Answer(Outcome.REFUSED, fault=Fault(kind, scope, code, text, tries, wait, is_outage))


def of(answer: Answer, *, type_: str = "text", tries: int = 0, throttles: int = 0, settle: float = 60) -> Verdict:
    return verdict(answer, type_=type_, tries=tries, throttles=throttles, settle=timedelta(seconds=settle))


NOT_SENT = Answer(Outcome.NOT_SENT, why="ConnectError")
UNKNOWN = Answer(Outcome.UNKNOWN, why="no answer in time")
ACCEPTED = Answer(Outcome.ACCEPTED, provider_id="wamid.1")


def test_a_permanent_refusal_fails_the_message_with_code_and_text() -> None:
    found = of(refused(Kind.PERMANENT, code="131026", text="Undeliverable"))

    assert found == Verdict(MessageStatus.FAILED, error_code="131026", error="Undeliverable")


def test_a_refusal_without_a_fault_fails_the_message_too() -> None:
    assert of(Answer(Outcome.REFUSED)).status is MessageStatus.FAILED


def test_a_transient_refusal_is_met_so_often_and_then_given_up() -> None:
    found = [of(refused(Kind.TRANSIENT, tries=3), tries=tries) for tries in range(3)]

    assert [one.status for one in found] == [MessageStatus.QUEUED, MessageStatus.QUEUED, MessageStatus.FAILED]
    assert [one.is_given_up for one in found] == [False, False, True]
    assert [one.tries for one in found] == [1, 1, 1]


@pytest.mark.parametrize(("tries", "most"), [(0, 2), (1, 4), (2, 8), (4, 32), (7, 256), (8, 300), (50, 300)])
def test_the_back_off_doubles_with_full_jitter_up_to_five_minutes(tries: int, most: float) -> None:
    delays = [of(refused(Kind.TRANSIENT, tries=100), tries=tries).delay or 0 for _ in range(500)]

    assert min(delays) >= 0.2
    assert max(delays) <= most
    assert min(delays) < most / 4
    assert max(delays) > most * 3 / 4


def test_a_transient_refusal_waits_at_least_as_long_as_the_provider_asks() -> None:
    assert (of(refused(Kind.TRANSIENT, wait=90)).delay or 0) >= 90


@pytest.mark.parametrize("throttles", range(8))
def test_a_recipient_who_had_too_many_is_left_alone_for_four_to_the_x_seconds(throttles: int) -> None:
    found = of(refused(Kind.THROTTLE, Scope.PAIR, code="131056"), throttles=throttles)

    expected = [1, 4, 16, 64, 256, 1024, 1024, 1024][throttles]
    assert (found.status, found.delay, found.throttles, found.tries) == (MessageStatus.QUEUED, expected, 1, 0)


def test_a_recipient_may_have_had_too_many_for_ever() -> None:
    assert of(refused(Kind.THROTTLE, Scope.PAIR), throttles=100_000).delay == 1024


def test_a_recipient_is_left_alone_for_longer_when_the_provider_asks() -> None:
    assert of(refused(Kind.THROTTLE, Scope.PAIR, wait=30), throttles=1).delay == 30
    assert of(refused(Kind.THROTTLE, Scope.PAIR, wait=30), throttles=3).delay == 64


def test_a_limit_of_one_message_alone_is_waited_for() -> None:
    found = of(refused(Kind.THROTTLE, Scope.MESSAGE, wait=360))

    assert (found.status, found.delay, found.tries) == (MessageStatus.QUEUED, 360, 0)
    assert heed(refused(Kind.THROTTLE, Scope.MESSAGE, wait=360)) is None


@pytest.mark.parametrize("scope", [Scope.NUMBER, Scope.WABA, Scope.APP])
def test_a_limit_of_many_costs_the_message_nothing(scope: Scope) -> None:
    found = of(refused(Kind.THROTTLE, scope, code="130429"))

    assert (found.status, found.delay, found.tries, found.throttles) == (MessageStatus.QUEUED, 0, 0, 0)
    assert not found.is_given_up


@pytest.mark.parametrize("kind", [Kind.AUTH, Kind.PAYMENT])
def test_what_a_person_must_mend_costs_the_message_nothing(kind: Kind) -> None:
    found = of(refused(kind, Scope.CHANNEL), tries=50, throttles=50)

    assert (found.status, found.delay, found.tries) == (MessageStatus.QUEUED, 0, 0)


def test_a_call_that_never_left_costs_nothing_however_often() -> None:
    found = of(NOT_SENT, tries=50)

    assert (found.status, found.tries, found.unknowns, found.is_given_up) == (MessageStatus.QUEUED, 0, 0, False)
    assert 2 <= (found.delay or 0) <= 3


def test_a_call_that_a_stop_forestalled_keeps_its_place_and_says_nothing_of_the_provider() -> None:
    assert of(STOPPED) == Verdict(MessageStatus.QUEUED, 0)
    assert heed(STOPPED) is None


def test_no_answer_is_waited_for_as_long_as_the_channel_says() -> None:
    found = of(UNKNOWN, settle=7)

    assert (found.status, found.delay, found.unknowns, found.tries) == (MessageStatus.UNKNOWN, 7, 1, 0)


def test_a_receipt_without_an_answer_is_sent_again() -> None:
    assert of(UNKNOWN, type_="read").status is MessageStatus.QUEUED
    assert of(UNKNOWN, type_="read", tries=5).status is MessageStatus.FAILED


def test_once_more_means_once() -> None:
    assert unanswered(unknowns=1, policy=ONCE_MORE) == Verdict(MessageStatus.QUEUED, 0)

    second = unanswered(unknowns=2, policy=ONCE_MORE)
    assert (second.status, second.delay, second.is_given_up) == (MessageStatus.UNKNOWN, None, True)


@pytest.mark.parametrize("policy", [ASK, "a word nobody knows", ""])
def test_any_other_policy_leaves_it_to_a_person(policy: str) -> None:
    found = unanswered(unknowns=1, policy=policy)

    assert (found.status, found.delay, found.is_given_up) == (MessageStatus.UNKNOWN, None, True)


@pytest.mark.parametrize(("kind", "hold"), [(Kind.AUTH, Hold.AUTH), (Kind.PAYMENT, Hold.PAYMENT)])
def test_what_a_person_must_mend_holds_the_channel(kind: Kind, hold: Hold) -> None:
    found = heed(refused(kind, Scope.CHANNEL, code="190", text="expired"))

    assert found is not None
    assert (found.hold, found.code, found.reason, found.pause) == (hold, "190", "expired", 0)


@pytest.mark.parametrize("scope", [Scope.NUMBER, Scope.WABA, Scope.APP])
def test_a_limit_of_many_pauses_them_all_and_they_do_not_come_back_at_once(scope: Scope) -> None:
    found = [heed(refused(Kind.THROTTLE, scope, code="4", wait=60)) for _ in range(500)]

    pauses = [one.pause for one in found if one and one.scope is scope and one.hold is None]
    assert len(pauses) == 500
    assert min(pauses) >= 60
    assert max(pauses) - min(pauses) > 25  # half of the delay, at random
    assert not any(one.is_too_fast for one in found if one)


def test_a_limit_that_names_no_time_is_waited_for_all_the_same() -> None:
    found = heed(refused(Kind.THROTTLE, Scope.NUMBER, code="130429"))

    assert found is not None
    assert found.pause >= 2
    assert found.is_too_fast


def test_maintenance_pauses_the_number_and_counts_against_the_message() -> None:
    answer = refused(Kind.TRANSIENT, Scope.NUMBER, code="131057", wait=60)

    found = heed(answer)
    assert found is not None
    assert (found.hold, found.scope) == (None, Scope.NUMBER)
    assert found.pause >= 60
    assert of(answer).tries == 1


@pytest.mark.parametrize(
    "answer",
    [
        ACCEPTED,
        UNKNOWN,
        NOT_SENT,
        refused(Kind.PERMANENT),
        refused(Kind.TRANSIENT),
        refused(Kind.THROTTLE, Scope.PAIR),
    ],
    ids=lambda answer: f"{answer.outcome} {answer.fault.kind if answer.fault else ''}",
)
def test_what_concerns_one_message_or_recipient_is_no_reason_to_stop_the_others(answer: Answer) -> None:
    assert heed(answer) is None


@pytest.mark.parametrize(
    ("answer", "points"),
    [
        (ACCEPTED, 0),
        (refused(Kind.PERMANENT), 0),
        (refused(Kind.THROTTLE, Scope.NUMBER), 0),
        (refused(Kind.AUTH, Scope.CHANNEL), 0),
        (refused(Kind.TRANSIENT), 0),
        (refused(Kind.TRANSIENT, is_outage=True), 1),
        (UNKNOWN, 1),
        (NOT_SENT, 2),
    ],
    ids=lambda value: value if isinstance(value, int) else f"{value.outcome} {value.fault.kind if value.fault else ''}",
)
def test_only_silence_and_trouble_speak_for_an_outage(answer: Answer, points: int) -> None:
    assert misses(answer) == points
