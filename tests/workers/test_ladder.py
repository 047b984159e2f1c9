"""Which step of a repair comes first, and which next: by cause, spread, and means (baileys-sessions.md §7)."""

from typing import Any

import pytest

from models.repair import Step
from models.session_error import Tally
from providers.undecrypted import Cause, cause_of
from workers._ladder import Means, choose, hopeless, is_of_groups, path

EVERYTHING = Means(
    frozenset({"restart", "stop", "refresh_contact"}),
    has_store=True,
    may_refresh_contacts=True,
    may_drop_keys=True,
    may_restore_creds=True,
)


def tally(contacts: int, **causes: int) -> Tally:
    count = sum(causes.values())
    strong = count - causes.get("weak", 0)
    return Tally(count, strong, count, contacts, 0, causes)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (tally(2, ratchet=6), ["contact_refresh", "restart", "drop_keys", "person"]),
        (tally(1, ahead=6), ["contact_refresh", "restart", "drop_keys", "person"]),
        (tally(3, no_session=9), ["contact_refresh", "restart", "drop_keys", "person"]),
        (tally(8, ratchet=9), ["restart", "drop_keys", "person"]),
        (tally(8, prekey=9), ["restart", "drop_keys", "person"]),
        (tally(1, prekey=6), ["restart", "drop_keys", "person"]),
        (tally(8, other=9), ["restart", "person"]),  # nothing is deleted for a reason that nobody knows
        (tally(5, identity=9), ["restore_creds", "person"]),
        (tally(1, identity=6), ["restart", "drop_keys", "person"]),  # one contact alone is no proof of all
        (tally(3, sender_key=9), ["drop_keys", "restart", "person"]),
        (tally(0, weak=9), ["restart", "person"]),
        (tally(4, ratchet=6, weak=9), ["restart", "drop_keys", "person"]),  # lines of a log change nothing
        (tally(1, ratchet=5, weak=9), ["restart", "person"]),  # … and do not make too few messages more
        (tally(4, sender_key=9, ratchet=2), ["drop_keys", "restart", "person"]),
    ],
)
def test_each_class_has_its_path(seen: Tally, expected: list[str]) -> None:
    steps, why = path(seen, 5)

    assert list(steps) == expected
    assert why
    tried: list[str] = []
    for step in expected:
        assert choose(seen, 5, tried, EVERYTHING).step == step
        tried.append(step)


def test_steps_that_nobody_allowed_are_left_out_and_say_why() -> None:
    choice = choose(tally(2, ratchet=6), 5, [], Means(frozenset({"restart"})))
    assert choice.step == Step.RESTART
    assert [step for step, _ in choice.skipped] == [Step.CONTACT_REFRESH]

    choice = choose(tally(2, ratchet=6), 5, [Step.RESTART], Means(frozenset({"restart"})))
    assert choice.step == Step.PERSON
    assert [step for step, _ in choice.skipped] == [Step.CONTACT_REFRESH, Step.DROP_KEYS]
    assert all("does not allow" in why for _, why in choice.skipped)


@pytest.mark.parametrize(
    ("means", "step"),
    [
        ({"abilities": frozenset()}, Step.RESTART),
        ({"abilities": frozenset({"restart"})}, Step.DROP_KEYS),  # keys are touched only while it is stopped
        ({"may_drop_keys": False}, Step.DROP_KEYS),
        ({"has_store": False}, Step.RESTORE_CREDS),
        ({"restarts_lose_pairing": True}, Step.RESTART),
        ({"restarts_lose_pairing": True}, Step.DROP_KEYS),
    ],
)
def test_a_step_needs_its_means(means: dict[str, Any], step: Step) -> None:
    assert EVERYTHING.lacks(step) is None
    assert EVERYTHING._replace(**means).lacks(step) is not None


def test_only_a_groups_own_keys_are_dropped_for_it() -> None:
    assert is_of_groups(tally(3, sender_key=9, weak=2))
    assert is_of_groups(tally(3, sender_key=9, ratchet=1))
    assert not is_of_groups(tally(3, sender_key=1, ratchet=9))
    assert not is_of_groups(tally(0))


@pytest.mark.parametrize("code", [440, 405, 401, 411, 403, 402, 406])
def test_no_repair_is_made_where_none_can_help(code: int) -> None:
    assert hopeless([428, code], is_open=False)
    assert bool(hopeless([428, code], is_open=True)) == (code == 440)  # it was paired again since


def test_other_ends_say_nothing_against_a_repair() -> None:
    assert hopeless([515, 428, 408, 503, 500], is_open=False) is None


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("No matching sessions found for message", Cause.RATCHET),
        ("Over 2000 messages into the future!", Cause.AHEAD),
        ("Bad MAC", Cause.IDENTITY),
        ("Invalid PreKey ID", Cause.PREKEY),
        ("No session record", Cause.NO_SESSION),
        ("No session found to decrypt message", Cause.SENDER_KEY),
        ("No SenderKeyRecord found for decryption", Cause.SENDER_KEY),
        ("Key used already or never filled", Cause.DUPLICATE),
        ("Received message with old counter: 3, 2", Cause.DUPLICATE),
        ("Message absent from node", Cause.ABSENT),
        ("something that nobody has seen", Cause.OTHER),
        ("", Cause.OTHER),
    ],
)
def test_a_text_names_its_cause(text: str, cause: Cause) -> None:
    assert cause_of(text) == cause
