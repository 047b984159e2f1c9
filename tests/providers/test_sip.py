"""A REGISTER as a conversation: what is asked next, what each answer means, and when to come back."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.sip import MOST_REQUESTS, Account, Attempt, Kind, Outcome, dry, refresh_after, retry_after
from providers.sip_flight import NotSent, Trouble
from providers.sip_message import Request, Response

ACCOUNT = Account(
    domain="pombal.test",
    user="5511987654321",
    auth_user="alice",
    password="s3cret",
    contact="sip:p7f0c2@sbc.example:5060;transport=udp",
    call_id="0f8b7a52",
    from_tag="9f31c2",
)
OWN = "<sip:p7f0c2@SBC.example;transport=udp>"
SECRETS = ("5511987654321", "alice", "s3cret", "p7f0c2", "c0ffee")


def said(status: int, reason: str = "", /, **headers: str | Sequence[str]) -> Response:
    """A response with these headers; `_` in a name is `-`."""
    lines = tuple(
        (name.replace("_", "-"), value)
        for name, values in headers.items()
        for value in ([values] if isinstance(values, str) else values)
    )
    return Response(status, reason, "z9hG4bK1", ACCOUNT.call_id, 1, "REGISTER", lines)


def challenged(nonce: str = "c0ffee0123", rest: str = ', qop="auth"', *, status: int = 401) -> Response:
    line = f'Digest realm="pombal.test", nonce="{nonce}"{rest}'
    return said(status, "Unauthorized", **{"proxy_authenticate" if status == 407 else "www_authenticate": line})


OTHERS = ("1 other contact bound: calls ring there too",)  # as in the sheet's answer


def granted(seconds: int = 280) -> Response:
    return said(200, "OK", contact=["<sip:other@198.51.100.7>;expires=3600", f"{OWN};expires={seconds}"])


def converse(
    *answers: Response, account: Account = ACCOUNT, unregister: bool = False
) -> tuple[Outcome | None, list[Request]]:
    """What it came to (None: it would ask once more) and all that was asked."""
    attempt = Attempt(account, cseq=41, unregister=unregister, cnonce=lambda: "0a1b2c3d4e5f6071")
    step: Request | Outcome = attempt.begin()
    asked: list[Request] = []
    for answer in answers:
        assert isinstance(step, Request), f"it ended before {answer}"
        asked.append(step)
        step = attempt.answered(answer)
    if isinstance(step, Request):
        asked.append(step)
    assert attempt.cseq == asked[-1].cseq
    return (None, asked) if isinstance(step, Request) else (step, asked)


def outcome(*answers: Response, account: Account = ACCOUNT, unregister: bool = False) -> Outcome:
    came, _ = converse(*answers, account=account, unregister=unregister)
    assert came is not None
    return came


def header(request: Request, name: str) -> str | None:
    return dict(request.headers).get(name)


# -- the conversation ------------------------------------------------------------------------------------------------


def test_the_first_request_asks_for_the_configured_interval_without_credentials() -> None:
    request = Attempt(ACCOUNT, cseq=41).begin()

    assert (request.uri, request.call_id, request.cseq) == ("sip:pombal.test", "0f8b7a52", 41)
    assert request.headers == (
        ("From", "<sip:5511987654321@pombal.test>;tag=9f31c2"),
        ("To", "<sip:5511987654321@pombal.test>"),
        ("Contact", "<sip:p7f0c2@sbc.example:5060;transport=udp>"),
        ("Expires", "300"),
        ("User-Agent", "pombal"),
    )


def test_a_challenge_is_answered_and_the_own_binding_counts() -> None:
    came, asked = converse(challenged(), granted(280))

    assert came == Outcome(Kind.REGISTERED, 200, granted=280, algorithm="MD5", notes=OTHERS)
    assert [request.cseq for request in asked] == [41, 42]
    assert asked[1].headers[:-1] == asked[0].headers
    assert (asked[1].uri, asked[1].call_id) == (asked[0].uri, asked[0].call_id)
    assert re.search(r'username="alice".*uri="sip:pombal.test".*nc=00000001', header(asked[1], "Authorization") or "")


def test_without_a_challenge_no_algorithm_is_learnt() -> None:
    assert outcome(granted()) == Outcome(Kind.REGISTERED, 200, granted=280, notes=OTHERS)


def test_a_domain_that_is_an_ipv6_address_stands_in_brackets() -> None:
    request = Attempt(replace(ACCOUNT, domain="2001:db8::1", user="a b"), cseq=1).begin()

    assert request.uri == "sip:[2001:db8::1]"
    assert header(request, "To") == "<sip:a%20b@[2001:db8::1]>"


@pytest.mark.parametrize("rest", [', qop="auth", stale=true', ', qop="auth"'], ids=["stale", "stale is omitted"])
def test_a_new_nonce_is_answered_once_more(rest: str) -> None:
    came, asked = converse(challenged("c0ffee01"), challenged("c0ffee02", rest), granted())

    assert came is not None
    assert came.kind is Kind.REGISTERED
    assert 'nonce="c0ffee02"' in (header(asked[2], "Authorization") or "")


@pytest.mark.parametrize(
    "answers",
    [
        [challenged(), challenged()],
        [challenged("c0ffee1"), challenged("c0ffee2"), challenged("c0ffee3")],
        [challenged("c0ffee1"), *[challenged(f"c0ffee{n}", ", stale=true") for n in (2, 3)]],
    ],
    ids=["same nonce", "always another nonce", "always stale"],
)
def test_endless_challenges_are_wrong_credentials(answers: list[Response]) -> None:
    assert outcome(*answers) == Outcome(Kind.PERMANENT, 401, "401: the credentials were not accepted")


def test_a_proxy_and_the_registrar_are_both_answered() -> None:
    came, asked = converse(challenged("c0ffee01", ", algorithm=SHA-256", status=407), challenged("c0ffee02"), granted())

    assert came == Outcome(Kind.REGISTERED, 200, granted=280, algorithm="MD5", notes=OTHERS)
    assert 'nonce="c0ffee01"' in (header(asked[2], "Proxy-Authorization") or "")
    assert 'nonce="c0ffee02"' in (header(asked[2], "Authorization") or "")


def test_a_second_challenge_cannot_ask_for_something_weaker() -> None:
    came = outcome(challenged("c0ffee1", ", algorithm=SHA-256"), challenged("c0ffee2", ", algorithm=MD5, stale=true"))

    assert came == Outcome(Kind.PERMANENT, 401, "401: only MD5 is offered, but SHA-256 was used before: not downgraded")


@pytest.mark.parametrize(
    ("change", "rest", "why"),
    [
        ({"allows_md5": False}, "", "only MD5 is offered"),
        ({"algorithm": "SHA-256"}, ", algorithm=MD5", "not downgraded"),
        ({}, ", algorithm=SHA-3-512", "SHA-3-512"),
        ({}, ', qop="auth-int"', "auth-int"),
    ],
)
def test_a_challenge_that_is_refused_sends_no_credentials(change: dict[str, str | bool], rest: str, why: str) -> None:
    came, asked = converse(challenged(rest=rest), account=replace(ACCOUNT, **change))  # type: ignore[arg-type]

    assert came is not None
    assert came.kind is Kind.PERMANENT
    assert why in (came.error or "")
    assert len(asked) == 1


def test_too_brief_an_interval_is_raised_once_and_may_be_challenged_anew() -> None:
    came, asked = converse(
        challenged("c0ffee1"),
        said(423, min_expires="600"),
        challenged("c0ffee2"),
        said(200, contact=f"{OWN};expires=600"),
    )

    assert came == Outcome(Kind.REGISTERED, 200, granted=600, algorithm="MD5")
    assert [header(request, "Expires") for request in asked] == ["300", "300", "600", "600"]
    assert "nc=00000002" in (header(asked[2], "Authorization") or "")
    assert "nc=00000001" in (header(asked[3], "Authorization") or "")


@pytest.mark.parametrize("least", ["300", "60", "86401", "-1", "soon", None])
def test_an_interval_that_makes_no_sense_is_not_asked_for(least: str | None) -> None:
    came = outcome(said(423, **({"min_expires": least} if least else {})))

    assert came.kind is Kind.PERMANENT
    assert "300 s were asked for" in (came.error or "")


def test_a_second_423_names_both_values() -> None:
    came = outcome(said(423, min_expires="600"), said(423, min_expires="900"))

    assert came.kind is Kind.PERMANENT
    assert came.error == "423: the interval is too brief, at least 900 s are wanted; 600 s were asked for"


def test_answers_before_a_423_count_too_and_one_more_is_for_a_nonce_that_ran_out_meanwhile() -> None:
    before = [challenged("c0ffee1"), challenged("c0ffee2"), said(423, min_expires="600")]
    refused = Outcome(Kind.PERMANENT, 401, "401: the credentials were not accepted")

    assert converse(*before, challenged("c0ffee3"), said(200, contact=f"{OWN};expires=600"))[0] == Outcome(
        Kind.REGISTERED, 200, granted=600, algorithm="MD5"
    )
    assert outcome(*before, challenged("c0ffee2")) == refused
    assert outcome(*before, challenged("c0ffee3"), challenged("c0ffee4")) == refused
    assert outcome(said(423, min_expires="600"), *[challenged(f"c0ffee{n}") for n in range(3)]) == refused


def test_a_challenge_too_long_to_repeat_is_refused() -> None:
    came, asked = converse(challenged("n" * 5_000))

    assert came == Outcome(Kind.PERMANENT, 401, "401: the challenge is too long")
    assert len(asked) == 1


@pytest.mark.parametrize(
    "left", [OWN, "<sip:p7f0c2@10.0.0.1:9>"], ids=["as it was bound", "as the registrar has rewritten it"]
)
def test_an_un_register_that_leaves_us_bound_has_failed(left: str) -> None:
    def answered(seconds: int) -> Response:
        return said(200, contact=["<sip:other@198.51.100.7>;expires=900", f"{left};expires={seconds}"])

    came = outcome(answered(290), unregister=True)

    assert (came.kind, came.error) == (Kind.TEMPORARY, "200, but our contact is still bound")
    assert outcome(answered(0), unregister=True).kind is Kind.UNREGISTERED
    assert outcome(said(200, contact=left), unregister=True).kind is Kind.UNREGISTERED


def test_an_un_register_asks_for_no_time_and_answers_challenges_too() -> None:
    came, asked = converse(challenged(), said(200, contact="<sip:other@198.51.100.7>;expires=900"), unregister=True)

    assert came == Outcome(Kind.UNREGISTERED, 200, algorithm="MD5")
    assert [header(request, "Expires") for request in asked] == ["0", "0"]
    assert header(asked[0], "Contact") == "<sip:p7f0c2@sbc.example:5060;transport=udp>"
    assert outcome(said(423, min_expires="60"), unregister=True).kind is Kind.PERMANENT


ANY_ANSWER = st.one_of(
    st.builds(
        challenged,
        st.sampled_from(["n1", "n2", "n3", "n4"]),
        st.sampled_from(["", ", stale=true", ", algorithm=SHA-256"]),
        status=st.sampled_from([401, 407]),
    ),
    st.builds(lambda least: said(423, min_expires=least), st.sampled_from(["60", "600", "900", "x"])),
    st.builds(said, st.integers(100, 699)),
)


@given(st.lists(ANY_ANSWER, min_size=MOST_REQUESTS, max_size=MOST_REQUESTS))
def test_every_conversation_ends_soon(answers: list[Response]) -> None:
    attempt = Attempt(ACCOUNT, cseq=1)
    step: Request | Outcome = attempt.begin()

    for answer in answers:
        if isinstance(step, Request):
            step = attempt.answered(answer)

    assert isinstance(step, Outcome)
    assert attempt.cseq <= MOST_REQUESTS
    assert step.error is None or not any(secret in step.error for secret in SECRETS)


def test_a_proxy_and_a_registrar_with_a_stale_nonce_each_are_both_answered() -> None:
    asked_for = [challenged(f"c0ffee{n}", status=status) for n, status in enumerate((407, 407, 401, 401))]

    assert outcome(*asked_for, granted()).kind is Kind.REGISTERED


def test_whoever_goes_on_challenging_gets_no_more_answers_than_these_two_need() -> None:
    most = 0
    for statuses in itertools.product((401, 407, 423), repeat=MOST_REQUESTS):
        attempt = Attempt(ACCOUNT, cseq=1)
        step: Request | Outcome = attempt.begin()
        answered = 0
        for n, status in enumerate(statuses):
            if isinstance(step, Request):
                is_brief = status == 423
                step = attempt.answered(said(423, min_expires="600") if is_brief else challenged(f"{n}", status=status))
                answered += isinstance(step, Request) and not is_brief
        assert isinstance(step, Outcome)
        most = max(most, answered)

    assert most == 4


# -- what was granted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "seconds", "note"),
    [
        ({"contact": f"{OWN};expires=120", "expires": "900"}, 120, None),
        ({"contact": OWN, "expires": "900"}, 900, None),
        ({"contact": f"{OWN};expires=10"}, 10, None),
        ({"contact": OWN}, 300, "taken as asked for"),
        ({}, 300, "taken as asked for"),
        ({"expires": "90"}, 90, "not listed"),
        ({"contact": "<sip:p7f0c2@10.0.0.1:9999;transport=tcp>;expires=77", "expires": "900"}, 77, None),
        ({"contact": ["<sip:p7f0c2@10.0.0.1>;expires=290", "<sip:p7f0c2@10.0.0.2>;expires=60"]}, 60, "more than once"),
        ({"contact": ["<sip:p7f0c2@10.0.0.1>;expires=9", "<sip:p7f0c2@10.0.0.2>;expires=99"]}, 99, "more than once"),
        ({"contact": ["<sip:p7f0c2@10.0.0.1>;expires=0", "<sip:p7f0c2@10.0.0.2>;expires=99"]}, 99, "more than once"),
        ({"contact": ["<sip:p7f0c2@10.0.0.1>;expires=60", f"{OWN};expires=290"]}, 290, None),
        ({"contact": ["<sip:x@h>;expires=5", "<sip:5511987654321@1.2.3.4>;expires=66"]}, 66, "not listed"),
        ({"contact": ["<sip:x@h>;expires=5"]}, 300, "1 other contact bound"),
        ({"contact": ["<sip:x@h>;expires=5", f"{OWN};expires=290"]}, 290, "1 other contact bound"),
        ({"contact": f"{OWN};expires=-1", "expires": "200"}, 200, None),
        ({"contact": f"{OWN};expires=abc"}, 300, "taken as asked for"),
        ({"contact": f"{OWN};expires=1000000000000"}, 86400, "taken as 86400"),
        ({"contact": f"{OWN};expires={'9' * 6000}"}, 86400, "taken as 86400"),
        ({"expires": "-60"}, 300, "taken as asked for"),
    ],
)
def test_the_interval_is_that_of_our_own_binding(
    headers: dict[str, str | Sequence[str]], seconds: int, note: str | None
) -> None:
    came = outcome(said(200, **headers))

    assert (came.kind, came.granted) == (Kind.REGISTERED, seconds)
    assert note in " / ".join(came.notes) if note else not came.notes


@pytest.mark.parametrize("headers", [{"contact": f"{OWN};expires=0", "expires": "300"}, {"expires": "0"}])
def test_a_grant_of_nothing_is_no_registration(headers: dict[str, str]) -> None:
    came = outcome(said(200, **headers))

    assert (came.kind, came.code, came.error) == (Kind.TEMPORARY, 200, "200, but 0 seconds were granted")


@pytest.mark.parametrize("seconds", [1, 5, 9])
def test_a_grant_that_ends_before_the_next_register_is_no_registration(seconds: int) -> None:
    came = outcome(said(200, contact=f"{OWN};expires={seconds}"))

    assert (came.kind, came.code, came.granted) == (Kind.TEMPORARY, 200, None)
    assert came.error == f"200, but only {seconds} s were granted"


# -- what went wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 402, 403, 404, 405, 410, 416, 420, 494, 501, 505, 604])
def test_a_wrong_configuration_is_permanent(status: int) -> None:
    came = outcome(said(status, "No"))

    assert (came.kind, came.code, came.error) == (Kind.PERMANENT, status, f"{status} No")
    assert came.wants_new_call_id is (status == 400)


@pytest.mark.parametrize("status", [100, 183, 408, 429, 480, 491, 500, 502, 503, 504, 580, 600, 603, 606, 699])
def test_what_may_pass_is_temporary(status: int) -> None:
    assert outcome(said(status, "Later")).kind is Kind.TEMPORARY


def test_a_redirection_is_not_followed() -> None:
    came, asked = converse(said(302, "Moved Temporarily", contact="<sip:evil.example>"))

    assert came == Outcome(Kind.PERMANENT, 302, "302: moved to evil.example; not followed")
    assert len(asked) == 1


def test_numbers_that_fell_behind_are_soon_tried_under_another_call_id() -> None:
    came = outcome(said(400, "Bad Request", p_registrar_error="Invalid CSeq number"))

    assert (came.kind, came.wants_new_call_id) == (Kind.TEMPORARY, True)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120),
        ("120 (in, a meeting)", 120),
        ("120;duration=60", 120),
        ("1000000000000", 86400),
        ("-5", None),
        ("1.5", None),
        ("Fri, 13 Nov", None),
    ],
)
def test_the_patience_that_a_registrar_asks_for_is_read(text: str, seconds: int | None) -> None:
    assert outcome(said(503, "Busy", retry_after=text)).retry_after == seconds


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (Trouble.TEMPORARY, Kind.TEMPORARY),
        (Trouble.PERMANENT, Kind.PERMANENT),
        (Trouble.OURS, Kind.OURS),
    ],
)
def test_no_answer_is_an_outcome_too(trouble: Trouble, kind: Kind) -> None:
    attempt = Attempt(ACCOUNT, cseq=1)
    attempt.begin()

    assert attempt.failed(NotSent(trouble, "no answer within 32 s from pombal.test:5060")) == Outcome(
        kind, None, "no answer within 32 s from pombal.test:5060"
    )


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("Forbidden (bad password)", "403 Forbidden (bad password)"),
        ("sip:5511987654321@pombal.test with S3CRET of Alice", "403 sip:…@pombal.test with … of …"),
        ("call +55 (11) 98888-7777 from 203.0.113.5", "403 call +… from …"),
        ("user +55.11.98888.7777 or 55/11/98888/7777", "403 user +… or …"),
        ("sip:%35%35%31%31%39%38%37%36%35%34%33%32%31@h of %41lice, %2B5511988887777", "403 sip:…@h of …, +…"),
        ("100%ff%00", "403 100\ufffd"),
        ("a\x1b[31mb\x00\r\n\u202ec", "403 a [31mb   \u0020c"),
        ("long " * 40, "403 " + ("long " * 40)[:80].strip()),
        ("", "403"),
    ],
)
def test_foreign_words_are_shown_without_secrets_and_short(reason: str, shown: str) -> None:
    assert outcome(said(403, reason)).error == shown


def test_where_something_is_may_be_said_in_our_own_words() -> None:
    attempt = Attempt(ACCOUNT, cseq=1)
    attempt.begin()
    text = "no answer within 32 s from 203.0.113.5:5060 by 198.51.100.70, for +55 11 98888-7777"

    assert attempt.failed(NotSent(Trouble.TEMPORARY, text)).error == text.replace("55 11 98888-7777", "…")


def test_algorithms_are_not_taken_for_numbers() -> None:
    account = replace(ACCOUNT, algorithm="SHA-512-256")

    error = outcome(challenged(rest=", algorithm=SHA-256"), account=account).error

    assert error == "401: only SHA-256 is offered, but SHA-512-256 was used before: not downgraded"


def test_a_short_secret_does_not_tear_words_apart() -> None:
    account = replace(ACCOUNT, password="a", auth_user="of")

    assert outcome(said(403, "a lack of offers"), account=account).error == "403 … lack … offers"


def test_nothing_that_is_printed_tells_a_secret() -> None:
    attempt = Attempt(ACCOUNT, cseq=1)
    request = attempt.begin()
    step = attempt.answered(challenged())

    for thing in (ACCOUNT, attempt, request, step, vars(attempt)["_credentials"], outcome(challenged(), granted())):
        assert not any(secret in repr(thing) for secret in SECRETS)


def test_a_dry_run_shows_the_request_without_credentials() -> None:
    text = dry(ACCOUNT)

    assert text.startswith("REGISTER sip:pombal.test SIP/2.0\r\nCall-ID: 0f8b7a52\r\nCSeq: 1 REGISTER\r\n")
    assert "<sip:p7f0c2@sbc.example:5060;transport=udp>" in text
    assert "Authorization" not in text
    assert "s3cret" not in text


# -- when to come back -----------------------------------------------------------------------------------------------

DICE = st.integers(0, 2**32).map(Random)
LATER = Outcome(Kind.TEMPORARY, 503, "503 Busy")


@given(st.integers(1, 86400), DICE)
def test_a_refresh_is_before_the_end_and_never_a_tight_loop(seconds: int, dice: Random) -> None:
    after = refresh_after(seconds, dice)
    lead = 60 if seconds >= 120 else seconds / 2

    assert max(5, seconds - lead - min(10, seconds / 10)) <= after <= max(5, seconds - lead)


@given(st.integers(1, 10_000), DICE)
def test_nobody_waits_longer_than_100_s_for_what_may_pass(failures: int, dice: Random) -> None:
    most = min(100, 30 * 2 ** min(failures, 20))

    for left in (None, -3.0, 3600.0):
        assert most / 2 <= retry_after(LATER, failures, dice, bound_seconds=left) <= most


@given(st.integers(1, 10_000), DICE)
def test_who_is_told_that_he_asks_too_often_backs_off_up_to_half_an_hour(failures: int, dice: Random) -> None:
    most = min(1800, 30 * 2 ** min(failures, 20))

    limited = Outcome(Kind.TEMPORARY, 429, "429 Too Many Requests")
    assert most / 2 <= retry_after(limited, failures, dice, bound_seconds=None) <= most


@given(DICE)
def test_the_first_retry_comes_after_30_to_60_seconds(dice: Random) -> None:
    assert 30 <= retry_after(LATER, 1, dice, bound_seconds=None) <= 60


@given(DICE)
def test_a_first_permanent_refusal_is_checked_once_more_before_the_binding_ends(dice: Random) -> None:
    assert retry_after(Outcome(Kind.PERMANENT, 403), 1, dice, bound_seconds=55) == 30
    patient = Outcome(Kind.PERMANENT, 403, retry_after=900)
    assert retry_after(patient, 1, dice, bound_seconds=55) == 900


@pytest.mark.parametrize(
    "contact", ["<sip:5511987654321>", "<sip:a@5511987654321>", "<tel:+5511987654321>", "<sip:;x>"]
)
def test_a_redirection_to_what_is_no_hosts_name_shows_none_of_it(contact: str) -> None:
    came, _ = converse(said(302, "Moved Temporarily", contact=contact))

    assert came == Outcome(Kind.PERMANENT, 302, "302: moved; not followed")


@given(DICE, st.integers(1, 50), st.sampled_from([None, 1.0, 30.0, 900.0]))
def test_permanent_refusals_wait_about_an_hour_whatever_lives(dice: Random, failures: int, bound: float | None) -> None:
    failures += bound is not None  # the first one while a binding lives is another matter
    assert 3240 <= retry_after(Outcome(Kind.PERMANENT, 403), failures, dice, bound_seconds=bound) <= 3960


@given(DICE, st.integers(0, 50), st.sampled_from([None, 1.0, 30.0]))
def test_our_own_trouble_is_looked_at_soon(dice: Random, failures: int, bound: float | None) -> None:
    assert 5 <= retry_after(Outcome(Kind.OURS), failures, dice, bound_seconds=bound) <= 10


@given(DICE, st.sampled_from([Kind.TEMPORARY, Kind.PERMANENT, Kind.OURS]))
def test_the_registrars_patience_wins_when_longer(dice: Random, kind: Kind) -> None:
    patient, hasty = Outcome(kind, 503, retry_after=7200), Outcome(kind, 503, retry_after=1)

    assert retry_after(patient, 1, dice, bound_seconds=40) == 7200
    assert retry_after(hasty, 1, dice, bound_seconds=None) >= 5


@given(DICE, st.integers(3, 50))
def test_a_binding_that_still_lives_is_tried_once_more_before_it_ends(dice: Random, failures: int) -> None:
    assert retry_after(LATER, failures, dice, bound_seconds=60) == 35
    assert retry_after(LATER, failures, dice, bound_seconds=28) == 5
    assert retry_after(LATER, failures, dice, bound_seconds=24) >= 50
    assert retry_after(LATER, failures, dice, bound_seconds=-3) >= 50


@given(DICE)
def test_a_short_grant_is_tried_once_more_too(dice: Random) -> None:
    assert retry_after(LATER, 1, dice, bound_seconds=14) == 5
    assert retry_after(LATER, 2, dice, bound_seconds=9) >= 50
    assert retry_after(LATER, 1, dice, bound_seconds=3600) <= 60
