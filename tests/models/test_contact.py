"""The spellings of one identity."""

import pytest

from models.contact import spellings


@pytest.mark.parametrize(
    ("given", "other"),
    [
        ("5511984440001", "551184440001"),
        ("551184440001", "5511984440001"),
        ("5548969990002", "554869990002"),
        ("554869990002", "5548969990002"),
    ],
)
def test_a_brazilian_mobile_has_two_spellings_the_given_one_first(given: str, other: str) -> None:
    assert spellings("phone", given) == [("phone", given), ("phone", other)]
    assert sorted(spellings("phone", other)) == sorted(spellings("phone", given))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("phone", "551133334444"),  # a landline
        ("phone", "5511933334444"),  # a nine before what would be a landline
        ("phone", "5511884440001"),  # 13 digits without the nine
        ("phone", "55119844400011"),  # too long
        ("phone", "55118444000"),  # too short
        ("phone", "5491184440001"),  # Argentina
        ("phone", "4911984440001"),
        ("phone", "5511X84440001"),
        ("phone", "٥٥١١٩٨٤٤٤٠٠٠١"),
        ("bsuid", "5511984440001"),
        ("group", "5511984440001"),
        ("phone", ""),
    ],
)
def test_everything_else_has_one_spelling(kind: str, value: str) -> None:
    assert spellings(kind, value) == [(kind, value)]
