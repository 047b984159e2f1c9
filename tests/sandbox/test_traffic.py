import json
from collections import Counter
from collections.abc import Iterable

import pytest

from sandbox import traffic

NUMBERS = [("880011223344556", "700100200300400"), ("880011223344557", "700100200300400"), ("99", "70")]
Key = tuple[str, str]
Found = tuple[dict[Key, str], set[Key], dict[Key, str], Counter[bytes], int]
RANK = ["sent", "delivered", "read", "played", "failed"]


def read(bodies: Iterable[bytes]) -> Found:
    """What a naive but correct receiver makes of the bodies: incoming, outgoing, statuses in rank, malformed ones."""
    incoming: dict[Key, str] = {}
    outgoing: set[Key] = set()
    statuses: dict[Key, str] = {}
    malformed: Counter[bytes] = Counter()
    elements = 0
    for raw in bodies:
        try:
            values = [
                (change["field"], change["value"]) for entry in json.loads(raw)["entry"] for change in entry["changes"]
            ]
            keyed = [(field, value, value["metadata"]["phone_number_id"]) for field, value in values]
        except (ValueError, TypeError, KeyError):
            malformed[raw] += 1
            continue
        for field, value, number in keyed:
            for message in value.get("messages", []):
                incoming[number, message["id"]] = message["type"]
            for echo in value.get("message_echoes", []):
                assert field == "smb_message_echoes"
                outgoing.add((number, echo["id"]))
            for status in value.get("statuses", []):
                key = number, status["id"]
                statuses[key] = max(status["status"], statuses.get(key, "sent"), key=RANK.index)
            elements += sum(len(value.get(name, [])) for name in ("messages", "message_echoes", "statuses"))
    return incoming, outgoing, statuses, malformed, elements


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_truth_is_what_a_receiver_finds_in_the_bodies(seed: int, shuffle: bool) -> None:
    made = traffic.mixed(seed, 300, numbers=NUMBERS, malformed=0.03, shuffle=shuffle)

    incoming, outgoing, statuses, malformed, elements = read(made.bodies)

    assert incoming == made.truth.incoming
    assert outgoing == made.truth.outgoing
    assert statuses == made.truth.statuses
    assert set(statuses) == outgoing
    assert len(malformed) == made.truth.malformed
    assert malformed.total() == made.truth.malformed_bodies
    assert len(made.bodies) == 300
    assert len(set(made.bodies)) == 240
    assert elements > 1.3 * len(incoming)


def test_the_seed_decides_every_byte() -> None:
    assert traffic.mixed(7, 50, numbers=NUMBERS) == traffic.mixed(7, 50, numbers=NUMBERS)
    assert traffic.mixed(7, 50, numbers=NUMBERS).bodies != traffic.mixed(8, 50, numbers=NUMBERS).bodies
    assert list(traffic.one_message(7, 20, NUMBERS)) == list(traffic.one_message(7, 20, NUMBERS))


def test_the_start_changes_no_id() -> None:
    early, late = (traffic.mixed(7, 50, numbers=NUMBERS, start=start) for start in (1_000_000_000, 1_788_000_000))

    assert early.truth == late.truth
    assert early.bodies != late.bodies


def test_elements_repeat_in_other_batches_too() -> None:
    made = traffic.mixed(1, 100, numbers=NUMBERS, malformed=0, duplicates=0.2)

    _, _, _, _, elements = read(set(made.bodies))
    distinct = traffic.mixed(1, 80, numbers=NUMBERS, malformed=0, duplicates=0)

    assert elements == read(distinct.bodies)[4]
    assert len(made.truth.incoming) < len(distinct.truth.incoming)


def test_messages_made_elsewhere_get_statuses() -> None:
    keys = [("99", f"wamid.OUT{i}") for i in range(20)]

    made = traffic.mixed(1, 50, numbers=NUMBERS, statuses_for=keys)

    assert set(keys) <= set(made.truth.statuses)
    assert not set(keys) & made.truth.outgoing
    assert read(made.bodies)[2] == made.truth.statuses


def test_too_many_statuses_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        traffic.mixed(1, 1, numbers=NUMBERS, statuses_for=[("99", f"wamid.OUT{i}") for i in range(60)])


@pytest.mark.parametrize("bodies", [1, 2, 3])
def test_a_very_small_run_has_a_good_body(bodies: int) -> None:
    made = traffic.mixed(1, bodies, numbers=NUMBERS, duplicates=0.5, malformed=0.5, per_body=(1, 1))

    assert len(made.bodies) == bodies
    assert len(made.truth.incoming) >= 1


def test_one_message_bodies_hold_one_text_each() -> None:
    bodies = list(traffic.one_message(1, 500, NUMBERS))

    incoming, _, _, malformed, elements = read(bodies)

    assert len(incoming) == elements == 500
    assert set(incoming.values()) == {"text"}
    assert {number for number, _ in incoming} == {number for number, _ in NUMBERS}
    assert not malformed
