"""Digest: the vectors of the facts and of RFC 7616, and which of several challenges is answered."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.sip_digest import Challenge, Refused, answer, challenges, choose
from providers.sip_message import Response

HEAD = 'Digest realm="pombal.test", nonce="c0ffee0123"'


def offered(*lines: str, status: int = 401) -> list[Challenge]:
    name = "proxy-authenticate" if status == 407 else "www-authenticate"
    return challenges(Response(status, "", "", "", 1, "REGISTER", tuple((name, line) for line in lines)))


def answered(line: str, *, user: str = "alice", nc: int = 1) -> dict[str, str]:
    """Our answer's parameters as they go out, quotes included."""
    [challenge] = offered(line)
    value = answer(challenge, user=user, password="s3cret", uri="sip:pombal.test", cnonce="0a1b2c3d4e5f6071", nc=nc)
    assert value.startswith("Digest ")
    return dict(re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|[^",]+)', value))


def chosen(*lines: str, allows_md5: bool = True, known: str | None = None) -> str:
    return choose(offered(*lines), allows_md5=allows_md5, known=known).algorithm


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "response"),
    [
        (', qop="auth"', "9119cc11ef361f729230ecbe827cda72"),
        (', qop="auth", algorithm=MD5', "9119cc11ef361f729230ecbe827cda72"),
        ("", "18bd3427dbe71d39d52ffb0777bd1472"),
        (', qop="auth,auth-int", algorithm=MD5-sess', "df7bc95345d4c10203a65e58d1d8a108"),
        (', algorithm=SHA-256, qop="auth"', "ab4bc679e6b5ba7c33f7e99bf3ee015c3fe7c9a1ea55ec2bc717d758dc2ab076"),
        (', algorithm=SHA-256-sess, qop="auth"', "84f1055ca0b02a0dd83b3deb319eb5e06366ee41a40cf92551c051488adb2328"),
        (', algorithm=SHA-512-256, qop="auth"', "d69198fc8aa7add2cfe34c46f9432caa1dfc5806f9df338fea0b4e7356a98c5f"),
    ],
)
def test_the_vectors_come_out(rest: str, response: str) -> None:
    assert answered(HEAD + rest)["response"] == f'"{response}"'


@pytest.mark.parametrize(
    ("algorithm", "response"),
    [
        ("MD5", "8ca523f5e9506fed4657c9700eebdbec"),
        ("SHA-256", "753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1"),
    ],
)
def test_the_example_of_the_standard_comes_out(algorithm: str, response: str) -> None:
    [challenge] = offered(
        f'Digest realm="http-auth@example.org", qop="auth, auth-int", algorithm={algorithm}, '
        'nonce="7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v", opaque="FQhe/qaU925kfnzjCev0ciny7QMkPqMAFRtzCUYo5tdS"'
    )

    value = answer(
        challenge,
        user="Mufasa",
        password="Circle of Life",
        uri="/dir/index.html",
        cnonce="f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ",
        method="GET",
    )

    assert f'response="{response}"' in value
    assert 'opaque="FQhe/qaU925kfnzjCev0ciny7QMkPqMAFRtzCUYo5tdS"' in value


def test_an_answer_with_qop_counts_and_one_without_does_not() -> None:
    with_qop, without = answered(f'{HEAD}, qop="auth"', nc=26), answered(HEAD)

    assert (with_qop["qop"], with_qop["nc"], with_qop["cnonce"]) == ("auth", "0000001a", '"0a1b2c3d4e5f6071"')
    assert not {"qop", "nc", "cnonce", "algorithm", "opaque"} & without.keys()
    assert "nc" not in answered(f"{HEAD}, algorithm=MD5-sess")
    assert "cnonce" in answered(f"{HEAD}, algorithm=MD5-sess")


def test_the_algorithm_is_echoed_as_it_came() -> None:
    assert answered(f"{HEAD}, algorithm=md5")["algorithm"] == "md5"
    assert answered(f'{HEAD}, algorithm="SHA-256"')["algorithm"] == "SHA-256"


def test_quotes_and_backslashes_are_escaped() -> None:
    values = answered(r'Digest realm="a \"b\" \\c", nonce="n,1"', user='al"ice')

    assert values["realm"] == r'"a \"b\" \\c"'
    assert values["username"] == r'"al\"ice"'
    assert values["nonce"] == '"n,1"'


# -- which one -------------------------------------------------------------------------------------------------------


def test_the_strongest_is_answered_wherever_it_stands() -> None:
    md5, sha, long = f"{HEAD}, algorithm=MD5", f"{HEAD}, algorithm=SHA-256", f"{HEAD}, algorithm=SHA-512-256"

    assert chosen(md5, sha) == "SHA-256"
    assert chosen(sha, long, md5) == "SHA-512-256"
    assert chosen(f"{md5}, {sha}") == "SHA-256"
    assert chosen(f'Basic realm="x, y", {HEAD}, qop="auth,auth-int", {sha}-sess') == "SHA-256-sess"
    assert chosen(f"Negotiate, {md5}", f"{HEAD}, algorithm=SHA-3") == "MD5"


def test_of_equals_the_topmost_is_answered() -> None:
    assert chosen(f"{HEAD}, algorithm=SHA-256-sess", f"{HEAD}, algorithm=SHA-256") == "SHA-256-sess"


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], "without a challenge"),
        ([f"{HEAD}, algorithm=SHA-3-512"], "algorithm SHA-3-512 is not supported"),
        (['Bearer realm="x"'], "scheme Bearer is not supported"),
        (["NTLM"], "scheme NTLM is not supported"),
        ([f'{HEAD}, qop="auth-int"'], "qop auth-int is not supported"),
        (['Digest realm="pombal.test"'], "no nonce"),
        (['Digest nonce="n"'], "no nonce or no realm"),
        (['Digest realm="a", nonce="n\r1"'], "control characters"),
        (['Digest realm="n\ufffdo", nonce="n"'], "not UTF-8"),
        ([f'{HEAD}, algorithm="SHA-256'], "cannot be understood"),
        ([f'{HEAD}, qop="auth'], "cannot be understood"),
    ],
)
def test_what_cannot_be_answered_is_named(lines: list[str], why: str) -> None:
    with pytest.raises(Refused, match=why):
        chosen(*lines)


def test_md5_is_answered_only_where_the_account_allows_it() -> None:
    with pytest.raises(Refused, match="only MD5"):
        chosen(f"{HEAD}, algorithm=MD5-sess", allows_md5=False)
    assert chosen(HEAD, f"{HEAD}, algorithm=SHA-256", allows_md5=False) == "SHA-256"


def test_nothing_weaker_than_what_worked_is_answered() -> None:
    with pytest.raises(Refused, match="SHA-512-256 was used before"):
        chosen(f"{HEAD}, algorithm=SHA-256", known="SHA-512-256")
    assert chosen(f"{HEAD}, algorithm=SHA-256-sess", known="SHA-256") == "SHA-256-sess"
    assert chosen(f"{HEAD}, algorithm=SHA-256", known="MD5") == "SHA-256"


def test_a_proxy_is_answered_in_its_own_header() -> None:
    [challenge] = offered(HEAD, status=407)

    assert challenge.answer_header == "Proxy-Authorization"
    assert offered(HEAD)[0].answer_header == "Authorization"


def test_a_challenge_shows_no_nonce_when_it_is_printed() -> None:
    assert "c0ffee" not in repr(offered(HEAD))


@given(st.text(alphabet='Digestralmnoc=", \\\t\r-256', max_size=80))
def test_no_challenge_raises(line: str) -> None:
    for challenge in offered(line, f"{HEAD}{line}"):
        if challenge.problem() is None:
            answer(challenge, user="alice", password="s3cret", uri="sip:pombal.test", cnonce="c")


# -- no more than is sensible ----------------------------------------------------------------------------------------


def test_an_empty_algorithm_is_md5_and_not_repeated() -> None:
    def said(line: str) -> str:
        return answer(offered(line)[0], user="alice", password="s3cret", uri="sip:pombal.test", cnonce="0a1b")

    assert said(HEAD + ', algorithm=""') == said(HEAD)


@pytest.mark.parametrize("name", ["realm", "nonce", "opaque"])
def test_what_is_too_long_to_repeat_is_passed_over(name: str) -> None:
    params = {"realm": "r", "nonce": "n", "opaque": "o"} | {name: "x" * 4_095}
    long = "Digest algorithm=SHA-256, " + ", ".join(f'{key}="{value}"' for key, value in params.items())

    with pytest.raises(Refused, match="the challenge is too long"):
        chosen(long)
    assert chosen(long, HEAD) == "MD5"
    assert chosen(long.replace("x" * 4_095, "x" * 4_000)) == "SHA-256"


def test_no_more_than_twenty_challenges_are_looked_at() -> None:
    weak = HEAD + ", algorithm=MD5"
    strong = HEAD + ", algorithm=SHA-256"

    assert chosen(", ".join([weak] * 19 + [strong])) == "SHA-256"
    assert chosen(", ".join([weak] * 20 + [strong])) == "MD5"
    assert chosen(*[weak] * 20, strong) == "MD5"
    assert len(offered(*[", ".join([weak] * 9)] * 9)) == 20


def test_a_challenge_of_endless_parameters_is_not_answered() -> None:
    with pytest.raises(Refused, match="cannot be understood"):
        chosen(HEAD + "".join(f", x{n}=y" for n in range(1_000)))
