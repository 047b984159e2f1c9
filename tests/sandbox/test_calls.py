import pytest

from sandbox import calls
from sandbox.calls import BusiestSecond, Call, Calls


def begin(journal: Calls, text: str, *, is_gone: bool = False) -> Call:
    return journal.begin(
        lambda: is_gone,
        phone_number_id="1",
        channel="shop",
        to="+5511944440001",
        type="text",
        text=text,
        callback=None,
        body_hash="",
    )


@pytest.mark.parametrize(
    ("moments", "most"),
    [
        ([], 0),
        ([0], 1),
        ([0, 0.5, 0.999], 3),
        ([0, 0.5, 1.0], 2),  # a second after the first is another second
        ([0, 1, 1.2, 1.4, 3, 3.5, 4.9], 3),
        ([0, 0.6, 1.2, 1.5, 1.59, 9], 4),
    ],
)
def test_the_busiest_second_may_begin_at_any_moment(moments: list[float], most: int) -> None:
    busiest = BusiestSecond()

    for at in moments:
        busiest.add(at)

    assert busiest.most == most


def test_the_oldest_calls_are_forgotten_but_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MOST", 4)
    journal = Calls()

    for n in range(1, 6):
        journal.accepted(begin(journal, f"text {n}"), f"wamid.{n}")

    assert [call.n for call in journal.listed(10)] == [3, 4, 5]
    assert [call.n for call in journal.listed(10, after=1)] == [3, 4, 5]
    assert [call.n for call in journal.listed(1, after=3)] == [4]
    assert (journal.summary()["calls"], journal.summary()["texts"]) == (5, 5)


def test_calls_under_way_outlive_the_clearing_of_the_journal() -> None:
    journal = Calls()
    call = begin(journal, "oi")

    journal.clear()

    assert journal.summary()["in_flight"] == 1
    begin(journal, "oi")
    assert journal.summary()["max_in_flight_per_recipient"] == 2
    journal.end(call)
    assert journal.summary()["in_flight"] == 1


def test_a_call_whose_client_has_left_is_not_open() -> None:
    journal = Calls()
    begin(journal, "oi", is_gone=True)
    begin(journal, "oi")

    assert journal.summary()["in_flight"] == 1
    assert journal.summary()["max_in_flight_per_recipient"] == 1
