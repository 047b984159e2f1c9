"""What each refusal of Meta's means. The table is that of whatsapp-cloud-api.md §13, written down from the sheet."""

from typing import Any

import pytest

from providers.meta_errors import fault
from providers.outbound import Kind, Scope

AUTH = (Kind.AUTH, Scope.CHANNEL)  # the sheet's A, and its H: a person must mend it
PAYMENT = (Kind.PAYMENT, Scope.CHANNEL)  # H, where money mends it
NEVER = (Kind.PERMANENT, Scope.MESSAGE)  # P, and I: an inbound word is no reason to send again
AGAIN = (Kind.TRANSIENT, Scope.MESSAGE)  # T


def throttle(scope: Scope) -> tuple[Kind, Scope]:
    return Kind.THROTTLE, scope


SHEET: dict[int, tuple[Kind, Scope]] = {
    0: AUTH,
    1: AGAIN,
    2: AGAIN,
    3: AUTH,
    4: throttle(Scope.APP),
    10: AUTH,
    33: AUTH,
    100: NEVER,
    104: AUTH,
    190: AUTH,
    **dict.fromkeys(range(200, 300), AUTH),
    368: AUTH,
    613: throttle(Scope.NUMBER),
    138013: throttle(Scope.NUMBER),
    80007: throttle(Scope.WABA),
    130403: NEVER,
    130429: throttle(Scope.NUMBER),
    130472: NEVER,
    130497: NEVER,
    131000: AGAIN,
    131005: AUTH,
    131008: NEVER,
    131009: NEVER,
    131016: AGAIN,
    131021: NEVER,
    131026: NEVER,
    131030: NEVER,
    131031: AUTH,
    131037: AUTH,
    131042: PAYMENT,
    131045: AUTH,
    131047: NEVER,
    131048: throttle(Scope.NUMBER),
    131049: NEVER,
    131050: NEVER,
    131051: NEVER,
    131052: NEVER,
    131053: NEVER,
    131055: NEVER,
    131056: throttle(Scope.PAIR),
    131057: (Kind.TRANSIENT, Scope.NUMBER),
    131062: NEVER,
    131063: NEVER,
    131064: throttle(Scope.WABA),
    131020: NEVER,
    131041: NEVER,
    131059: NEVER,
    **dict.fromkeys(range(131200, 131300), NEVER),
    131208: throttle(Scope.NUMBER),
    132000: NEVER,
    132001: NEVER,
    132005: NEVER,
    132007: NEVER,
    132008: NEVER,
    132012: NEVER,
    132015: NEVER,
    132016: NEVER,
    132018: NEVER,
    132068: NEVER,
    132069: throttle(Scope.MESSAGE),
    133000: AUTH,
    133004: AGAIN,
    133005: AUTH,
    133006: AUTH,
    133008: throttle(Scope.NUMBER),
    133009: throttle(Scope.NUMBER),
    133010: AUTH,
    133015: (Kind.TRANSIENT, Scope.NUMBER),
    133016: throttle(Scope.NUMBER),
    134011: PAYMENT,
    134100: NEVER,
    134101: AGAIN,
    134102: AUTH,
    135000: AGAIN,
    137000: NEVER,
    **dict.fromkeys((138000, 138012, 138014, 138018, 139000, 139101, 139999, 147000, 147999), NEVER),
    **dict.fromkeys((2388000, 2388001, 2388999, 2494000, 2494010, 2494999, 2593107, 2593108), NEVER),
}


def of(code: Any, http_status: int = 400, *, has_link: bool = False, **more: Any) -> tuple[Kind, Scope]:
    found = fault({"code": code, **more}, http_status, {}, has_link=has_link)
    return found.kind, found.scope


@pytest.mark.parametrize("code", SHEET)
def test_a_code_means_what_the_sheet_says_whatever_the_http_status(code: int) -> None:
    assert {of(code, http_status) for http_status in (200, 400, 401, 403, 404, 429, 500, 503)} == {SHEET[code]}


@pytest.mark.parametrize(("code", "tries"), [(1, 3), (131000, 5), (135000, 2)])
def test_a_transient_code_may_be_met_as_often_as_the_sheet_says(code: int, tries: int) -> None:
    assert fault({"code": code}, 500, {}).tries == tries


@pytest.mark.parametrize(("code", "seconds"), [(131057, 60), (133015, 300), (134101, 600)])
def test_a_transient_code_is_left_alone_as_long_as_the_sheet_says(code: int, seconds: int) -> None:
    assert fault({"code": code}, 400, {}).wait >= seconds


@pytest.mark.parametrize("code", [131048, 131064, 132069])
def test_limits_that_last_for_hours_are_not_asked_about_every_few_seconds(code: int) -> None:
    assert fault({"code": code}, 400, {}).wait >= 300


def test_media_that_could_not_be_uploaded_is_tried_again_only_when_meta_had_to_fetch_it() -> None:
    assert of(131053, has_link=True) == AGAIN
    assert fault({"code": 131053}, 400, {}, has_link=True).tries == 3
    assert of(131053, has_link=False) == NEVER


def test_an_object_of_ours_that_is_gone_is_not_the_messages_fault() -> None:
    """Whoever calls without the rights to a number is told that the number does not exist."""
    assert of(100, type="GraphMethodException", error_subcode=33) == AUTH
    assert of(100, type="OAuthException", error_subcode=33) == NEVER
    assert of(100, type="GraphMethodException") == NEVER


@pytest.mark.parametrize(
    ("http_status", "is_transient", "expected"),
    [
        (400, False, NEVER),
        (404, False, NEVER),
        (400, True, AGAIN),
        (403, True, AGAIN),
        (500, False, AGAIN),
        (503, False, AGAIN),
        (429, False, throttle(Scope.NUMBER)),
        (401, False, AUTH),
        (403, False, AUTH),
    ],
)
def test_a_code_that_nobody_knows_goes_by_what_else_is_said(
    http_status: int, is_transient: bool, expected: tuple[Kind, Scope]
) -> None:
    assert of(987_654, http_status, is_transient=is_transient) == expected


@pytest.mark.parametrize(
    ("http_status", "expected"),
    [(400, NEVER), (401, AUTH), (403, AUTH), (422, NEVER), (429, throttle(Scope.NUMBER)), (500, AGAIN), (502, AGAIN)],
)
def test_a_refusal_without_an_error_goes_by_its_status(http_status: int, expected: tuple[Kind, Scope]) -> None:
    found = fault(None, http_status, {})

    assert (found.kind, found.scope) == expected
    assert (found.code, found.text) == (f"http_{http_status}", f"HTTP {http_status}")


def test_a_code_in_quotes_is_the_same_code() -> None:
    assert of("131056") == throttle(Scope.PAIR)
    assert fault({"code": "131056"}, 400, {}).code == "131056"


@pytest.mark.parametrize(
    "code", [None, True, 190.0, [190], {"code": 190}, "", "a code", "１９０", "-1", "1" * 5_000, 10**40, -190]
)
def test_a_code_of_any_shape_is_taken_for_one_that_nobody_knows(code: Any) -> None:
    found = fault({"code": code}, 400, {})

    assert (found.kind, found.scope) == NEVER
    assert 0 < len(found.code) < 100


def test_the_text_is_the_message_and_its_details() -> None:
    error = {"code": 131026, "message": "(#131026) Undeliverable", "error_data": {"details": "not on WhatsApp"}}

    assert fault(error, 400, {}).text == "(#131026) Undeliverable: not on WhatsApp"


def test_details_may_be_a_plain_string() -> None:
    error = {"code": 131026, "message": "Undeliverable", "error_data": "not on WhatsApp"}

    assert fault(error, 400, {}).text == "Undeliverable: not on WhatsApp"


@pytest.mark.parametrize("odd", [None, 7, [], {}, "", {"details": 7}, {"details": ["x"]}, ["details"]])
def test_texts_of_any_shape_do_no_harm(odd: Any) -> None:
    assert fault({"code": 190, "message": odd, "error_data": odd}, 401, {}).text == "HTTP 401"


def test_a_text_is_cut_and_can_be_stored() -> None:
    text = fault({"code": 190, "message": "a\0b" * 10_000}, 401, {}).text

    assert len(text) <= 1_000
    assert "\0" not in text


@pytest.mark.parametrize(
    ("header", "wait"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("999999", 3600.0),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0),
        ("-5", 0.0),
        ("1.5", 0.0),
        ("٣", 0.0),
        ("1" * 5_000, 0.0),
        ("", 0.0),
    ],
)
def test_retry_after_is_heeded_in_seconds_and_within_reason(header: str, wait: float) -> None:
    assert fault({"code": 131056}, 400, {"retry-after": header}).wait == wait


def test_retry_after_may_ask_for_more_than_a_code_does_and_never_for_less() -> None:
    assert fault({"code": 80007}, 400, {"retry-after": "90"}).wait == 90
    assert fault({"code": 80007}, 400, {"retry-after": "5"}).wait == 60
    assert fault({"code": 131026}, 400, {"retry-after": "5"}).wait == 0
