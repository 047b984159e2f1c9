"""What an account may be configured with."""

from collections.abc import Callable

import pytest

from pombal.errors import Rejected
from providers.sip_words import (
    check_auth_user,
    check_contact_host,
    check_host,
    check_password,
    check_port,
    check_user,
)

BREAKS = ["", "a\r\nX: b", "a\n", "\ra", "a b", "a\x00", 'a"b', "<a", "a>", "a\u2028b", "x" * 256]


@pytest.mark.parametrize("text", [*BREAKS, "a@b"])
def test_a_user_holds_nothing_that_could_end_a_header(text: str) -> None:
    with pytest.raises(Rejected):
        check_user(text)


@pytest.mark.parametrize("text", BREAKS)
def test_an_authentication_user_may_hold_an_at_sign_only(text: str) -> None:
    with pytest.raises(Rejected):
        check_auth_user(text)
    assert check_auth_user("alice@pombal.test") == "alice@pombal.test"


@pytest.mark.parametrize("text", ["", "a\nb", "a\x00", "x" * 256])
def test_a_password_is_one_line(text: str) -> None:
    with pytest.raises(Rejected):
        check_password(text)
    assert check_password(' pa"ss <ção>@ ') == ' pa"ss <ção>@ '


@pytest.mark.parametrize(
    "text",
    [
        *BREAKS,
        "https://sip.example",
        "sip:sip.example",
        "sip.example/path",
        "user@sip.example",
        "sip.example:5060",
        "sip..example",
        "-sip.example",
        "sip.example;transport=tcp",
        "sípp.example",
        "127.1",
        "0177.0.0.1",
        "256.1.1.1",
        "fe80::1%eth0",
        "[::1",
        "sip.example\r\nRoute: x",
        "a" * 64 + ".example",
        ".".join(["a" * 60] * 5),
    ],
)
def test_a_host_is_a_name_or_an_address(text: str) -> None:
    with pytest.raises(Rejected):
        check_host(text)
    with pytest.raises(Rejected):
        check_contact_host(text.removesuffix(":5060") if text != "sip.example:5060" else "")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" SIP.Example. ", "sip.example"),
        ("localhost", "localhost"),
        ("192.0.2.1", "192.0.2.1"),
        ("[2001:DB8::1]", "2001:db8::1"),
        ("2001:db8:0:0::1", "2001:db8::1"),
        ("_sip.x-1.example", "_sip.x-1.example"),
    ],
)
def test_a_host_is_kept_in_one_form(text: str, kept: str) -> None:
    assert check_host(text) == kept


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("SBC.example:5080", "sbc.example:5080"),
        ("192.0.2.1", "192.0.2.1"),
        ("[2001:db8::1]:5060", "[2001:db8::1]:5060"),
        ("[::1]", "[::1]"),
    ],
)
def test_a_contact_host_may_have_a_port(text: str, kept: str) -> None:
    assert check_contact_host(text) == kept


@pytest.mark.parametrize("text", ["sbc.example:0", "sbc.example:65536", "sbc.example:", "::1", "sbc.example:5060:1"])
def test_a_contact_host_with_an_impossible_port_is_refused(text: str) -> None:
    with pytest.raises(Rejected):
        check_contact_host(text)


@pytest.mark.parametrize(
    "text",
    [
        'sbc.example>;x="',
        "sbc.example;maddr=10.0.0.1",
        "sbc.example:5060;maddr=10.0.0.1",
        "sbc.example\r\nX-Evil: 1",
        "sbc.example:5060\r\n",
        "sbc.example\n",
        "me@sbc.example",
        "sbc.example?x=y",
        "sbc.example:٥",
        "",
    ],
)
def test_a_contact_host_holds_nothing_that_could_end_a_uri(text: str) -> None:
    with pytest.raises(Rejected):
        check_contact_host(text)


def test_a_port_is_a_port() -> None:
    assert check_port(5060) == 5060
    with pytest.raises(Rejected):
        check_port(0)


@pytest.mark.parametrize("check", [check_user, check_auth_user, check_host, check_contact_host, check_password])
def test_a_refusal_does_not_repeat_what_was_given(check: Callable[[str], str]) -> None:
    with pytest.raises(Rejected) as refused:
        check("s3cret\r\nX: y")

    assert "s3cret" not in str(refused.value)
