"""What was given up: one row per cause and place, reopened when it comes back."""

from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import update

from models import DeadLetter
from models.dead_letter import LetterState, letter
from pombal import db
from pombal.ids import uuid7
from tests.factories import a_tenant, all_of


@pytest.fixture
def key() -> str:
    return f"test:{uuid4()}"


def test_a_letter_that_comes_back_is_counted_and_keeps_its_id(key: str) -> None:
    record(a_letter(key, error="first", failures=1))
    before = stored(key)

    record(a_letter(key, error="second", failures=4))

    after = stored(key)
    assert after["id"] == before["id"]
    assert (after["count"], after["error"], after["failures"]) == (2, "second", 4)
    assert after["fingerprint"] != before["fingerprint"]
    assert after["last_at"] >= before["last_at"]


@pytest.mark.parametrize("state", [LetterState.RETRIED, LetterState.DROPPED])
def test_a_closed_letter_that_comes_back_is_open_again(key: str, state: LetterState) -> None:
    record(a_letter(key))
    with db.session() as s:
        s.execute(update(DeadLetter).where(DeadLetter.key == key).values(state=state))
        assert key not in [row.key for row in s.scalars(DeadLetter.open_letters())]

    record(a_letter(key))

    with db.session() as s:
        assert key in [row.key for row in s.scalars(DeadLetter.open_letters())]


def test_a_letter_keeps_its_tenant_when_it_comes_back_without_one(key: str) -> None:
    tenant = a_tenant()

    for owner in (None, tenant.id, None):
        with db.session([tenant.id]) as s:
            DeadLetter.record(s, [a_letter(key, tenant_id=owner)])

    with db.session([tenant.id]) as s:
        (row,) = all_of(s, "SELECT tenant_id, count FROM dead_letter WHERE key = :key", key=key)
    assert row == {"tenant_id": tenant.id, "count": 3}


def test_one_key_twice_in_one_record_is_one_letter(key: str) -> None:
    record(a_letter(key, error="first"), a_letter(key, error="second"))

    assert (stored(key)["count"], stored(key)["error"]) == (1, "second")


def test_nothing_to_record_is_nothing() -> None:
    record()


def test_letters_of_one_cause_share_a_fingerprint() -> None:
    by_text = [a_letter("a")["fingerprint"], a_letter("b")["fingerprint"], a_letter("c", error="other")["fingerprint"]]
    by_cause = [a_letter("a", error=error, cause="here")["fingerprint"] for error in ("x", "y")]

    assert by_text[0] == by_text[1] != by_text[2]
    assert by_cause[0] == by_cause[1] not in by_text


def test_open_letters_are_listed_newest_first_and_by_fingerprint() -> None:
    cause = uuid4().hex
    keys = [f"test:{uuid7()}" for _ in range(3)]
    for key in keys:
        record(a_letter(key, cause=cause))
    fingerprint = a_letter("any", cause=cause)["fingerprint"]

    with db.session() as s:
        assert [row.key for row in s.scalars(DeadLetter.open_letters(fingerprint))] == keys[::-1]


def a_letter(key: str, **given: Any) -> dict[str, Any]:
    return letter(**{"key": key, "actor": "incoming_message", "error": "because", "args": [[]], **given})


def record(*letters: dict[str, Any]) -> None:
    with db.session() as s:
        DeadLetter.record(s, list(letters))


def stored(key: str) -> dict[str, Any]:
    with db.session() as s:
        (row,) = all_of(s, "SELECT * FROM dead_letter WHERE key = :key", key=key)
    return row
