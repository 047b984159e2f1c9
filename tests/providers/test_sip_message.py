"""SIP messages: what is written, what is understood, and that nothing a peer sends can hurt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.sip_message import (
    LARGEST,
    BadFrame,
    Framer,
    Request,
    Response,
    contacts,
    encode,
    host_in_uri,
    parse_uri,
    read,
)

OK = b"""SIP/2.0 200 OK\r
Via: SIP/2.0/UDP 192.0.2.10:5080;branch=z9hG4bK7c1e5a90d2;rport=5080;received=203.0.113.5\r
From: <sip:5511999@provider.example>;tag=9f31c2\r
To: <sip:5511999@provider.example>;tag=b1\r
Call-ID: 0f8b7a52-registration-17\r
CSeq: 42 REGISTER\r
Contact: <sip:other@198.51.100.7:5060>;expires=3600\r
Contact: <sip:5511999@sbc.example:5060;transport=udp>;expires=280\r
Content-Length: 0\r
\r
"""


def request(contact: str = "<sip:p1@localhost;transport=udp>") -> Request:
    return Request(
        uri="sip:provider.example",
        call_id="0f8b7a52",
        cseq=41,
        headers=(("From", "<sip:5511999@provider.example>;tag=9f31c2"), ("Contact", contact), ("Expires", "300")),
    )


def understood(data: bytes) -> Response:
    response = read(data)
    assert response is not None
    return response


def with_header(line: bytes) -> bytes:
    return OK.replace(b"Content-Length: 0\r\n", line + b"\r\nContent-Length: 0\r\n")


# -- requests --------------------------------------------------------------------------------------------------------


def test_a_request_of_our_own_socket_has_what_its_transport_adds() -> None:
    assert encode(request(), via="SIP/2.0/UDP 192.0.2.10:5080;branch=z9hG4bK1;rport").decode().split("\r\n") == [
        "REGISTER sip:provider.example SIP/2.0",
        "Via: SIP/2.0/UDP 192.0.2.10:5080;branch=z9hG4bK1;rport",
        "Max-Forwards: 70",
        "Call-ID: 0f8b7a52",
        "CSeq: 41 REGISTER",
        "From: <sip:5511999@provider.example>;tag=9f31c2",
        "Contact: <sip:p1@localhost;transport=udp>",
        "Expires: 300",
        "Content-Length: 0",
        "",
        "",
    ]


def test_a_request_for_drachtio_leaves_to_it_what_it_adds() -> None:
    names = [line.partition(":")[0] for line in encode(request()).decode().split("\r\n")[1:-2]]

    assert names == ["Call-ID", "CSeq", "From", "Contact", "Expires"]


def test_a_line_end_in_a_value_never_becomes_a_header() -> None:
    with pytest.raises(ValueError, match="control characters"):
        encode(request(contact="<sip:p1@localhost>\r\nRoute: <sip:evil.example>"))


def test_a_sender_fills_its_address_in_where_the_contact_says_localhost() -> None:
    filled = request().at_contact_host("[2001:db8::1]:5080")

    assert ("Contact", "<sip:p1@[2001:db8::1]:5080;transport=udp>") in filled.headers
    assert request("<sip:p1@sbc.example:5060>").at_contact_host("192.0.2.1") == request("<sip:p1@sbc.example:5060>")


def test_a_request_shows_no_user_when_it_is_printed() -> None:
    assert "5511999" not in repr(request())
    assert "5511999" not in repr(understood(OK))
    assert "5511999" not in repr(contacts(understood(OK)))


# -- responses -------------------------------------------------------------------------------------------------------


def test_a_response_says_what_it_belongs_to() -> None:
    response = understood(OK)

    assert (response.status, response.reason, response.branch) == (200, "OK", "z9hG4bK7c1e5a90d2")
    assert (response.call_id, response.cseq, response.method) == ("0f8b7a52-registration-17", 42, "REGISTER")


def test_short_names_other_cases_folds_and_bare_line_feeds_are_understood() -> None:
    response = understood(
        b"\r\n\r\nsip/2.0 200\n"
        b"v : SIP/2.0/TCP a;branch=one , SIP/2.0/TCP b;branch=two\n"
        b"i:abc\n"
        b"cSEQ:\n"
        b"   7\n"
        b"\tREGISTER\n"
        b'm: "Doe, \\"J\\"" <sip:a@h>;expires=1, sip:b@h;expires=2\n'
        b"no header at all\n"
        b"l: 0\n\n"
    )

    assert (response.branch, response.call_id, response.cseq, response.reason) == ("one", "abc", 7, "")
    assert response.all("Via") == ["SIP/2.0/TCP a;branch=one", "SIP/2.0/TCP b;branch=two"]
    assert [(contact.uri.user, contact.expires) for contact in contacts(response)] == [("a", "1"), ("b", "2")]


def test_bytes_that_are_not_utf8_do_not_hide_a_response() -> None:
    response = understood(OK.replace(b"200 OK", b"403 Proibido n\xe3o"))

    assert (response.status, response.reason) == (403, "Proibido n\ufffdo")


def test_challenges_and_dates_are_left_whole() -> None:
    line = 'Digest realm="a,b", qop="auth,auth-int", nonce="n"'

    assert understood(with_header(b"WWW-Authenticate: " + line.encode())).all("www-authenticate") == [line]
    assert understood(OK).first("www-authenticate") is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\r\n\r\n",
        b"jaK\x00" * 4,
        b"OPTIONS sip:us SIP/2.0\r\nCall-ID: a\r\nCSeq: 1 OPTIONS\r\n\r\n",
        OK.replace(b"SIP/2.0 200", b"SIP/3.0 200"),
        OK.replace(b"SIP/2.0 200", b"SIP/2.0 999"),
        OK.replace(b"Call-ID", b"X-ID"),
        OK.replace(b"CSeq: 42 ", b"CSeq: -42 "),
        OK.replace(b"CSeq: 42 REGISTER", b"CSeq: 42"),
        with_header(b"CSeq: 43 REGISTER"),
        with_header(b"Call-ID: another"),
        OK.replace(b"Content-Length: 0", b"Content-Length: -1"),
        OK.replace(b"Content-Length: 0", b"Content-Length: 10"),
        OK.replace(b"Content-Length: 0", b"Content-Length: " + b"9" * 5000),
        with_header(b"l: 1"),
        with_header(b"\r\n".join([b"Via: SIP/2.0/UDP h;branch=b"] * 3000)),
        OK + b"x" * LARGEST,
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_no_sound_response_is_none(data: bytes) -> None:
    assert read(data) is None


def test_thousands_of_values_in_one_line_are_cut_off() -> None:
    line = b", ".join([b"SIP/2.0/UDP h;branch=first"] + [b"SIP/2.0/UDP h;branch=b"] * 2400)

    response = understood(OK.replace(b"Via: ", b"Via: " + line + b", "))

    assert response.branch == "first"
    assert len(response.all("via")) == 100


PIECES = st.one_of(
    st.sampled_from([b"SIP/2.0 200 OK\r\n", b"Via: SIP/2.0/UDP h;branch=b", b"Call-ID: a", b"CSeq: 1 REGISTER"]),
    st.sampled_from([b"Contact: ", b"<sip:", b">;expires=", b"l: ", b"\r\n", b"\n", b"\xff", b"99999"]),
    st.sampled_from([b" ", b"@", b'"', b"\\", b",", b";", b":", b"[", b"*"]),
)


@given(st.one_of(st.binary(max_size=300), st.lists(PIECES, max_size=40).map(b"".join)))
def test_nothing_that_comes_in_raises(data: bytes) -> None:
    for response in (read(data), read(OK[:60] + data), read(with_header(data.replace(b"\r\n\r\n", b"")))):
        if response is not None:
            contacts(response)
            response.all("via")


# -- contacts --------------------------------------------------------------------------------------------------------


def test_odd_contacts_are_passed_over() -> None:
    response = understood(
        with_header(b'm: *, <tel:+55>, <sip:a@h:99999>, <sip:@h>, "open\r\nm: <sip:c@[2001:db8::1]:5070>')
    )

    assert [contact.uri.user for contact in contacts(response)] == ["other", "5511999", "c"]
    assert contacts(response)[-1].uri.port == 5070


def test_without_brackets_parameters_belong_to_the_binding() -> None:
    [*_, contact] = contacts(understood(with_header(b'm: sip:a@h;Expires="60"')))

    assert (contact.expires, contact.uri.params) == ("60", {})


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        ("sip:p1@SBC.example:5060;transport=udp", "sip:p1@sbc.example", True),
        ("sip:p1@sbc.example;transport=TCP", "sip:p1@sbc.example:5060;transport=tcp;ob", True),
        ("sip:p%31@sbc.example", "sip:p1@sbc.example", True),
        ("sip:p1@sbc.example;transport=tls", "sip:p1@sbc.example:5061;transport=tls", True),
        ("sip:p1@sbc.example;transport=tcp", "sip:p1@sbc.example", False),
        ("sip:P1@sbc.example", "sip:p1@sbc.example", False),
        ("sip:p1@sbc.example:5080", "sip:p1@sbc.example", False),
        ("sips:p1@sbc.example", "sip:p1@sbc.example", False),
        ("sip:p1@sbc.example;line=a", "sip:p1@sbc.example;line=b", False),
    ],
)
def test_bindings_are_compared_as_registrars_rewrite_them(one: str, other: str, are_same: bool) -> None:
    first, second = parse_uri(one), parse_uri(other)
    assert first is not None
    assert second is not None

    assert first.same(second) is are_same
    assert second.same(first) is are_same


def test_only_sip_uris_are_uris() -> None:
    assert parse_uri("tel:+551199") is None
    assert parse_uri("https://sip.example") is None
    assert host_in_uri("2001:db8::1") == "[2001:db8::1]"
    assert host_in_uri("sip.example") == "sip.example"


# -- streams ---------------------------------------------------------------------------------------------------------

WITH_BODY = OK.replace(b"Content-Length: 0", b"l:  7") + b"a\r\n\r\nbc"


@given(st.lists(st.integers(0, 3 * len(WITH_BODY)), max_size=12))
def test_messages_come_out_whole_however_the_stream_is_cut(cuts: list[int]) -> None:
    stream = b"\r\n\r\n" + OK + WITH_BODY + b"\r\n" + OK.replace(b"Content-Length: 0\r\n", b"")
    framer, messages, start = Framer(), [], 0

    for end in [*sorted(cuts), len(stream)]:
        messages += framer.feed(stream[start:end])
        start = max(start, end)

    assert messages == [OK, WITH_BODY, OK.replace(b"Content-Length: 0\r\n", b"")]


def test_a_stream_may_come_in_single_bytes() -> None:
    framer = Framer()

    assert [message for byte in OK + OK for message in framer.feed(bytes([byte]))] == [OK, OK]


@pytest.mark.parametrize(
    "data",
    [
        OK.replace(b"Content-Length: 0", b"Content-Length: none"),
        OK.replace(b"Content-Length: 0", b"Content-Length: -5"),
        OK.replace(b"Content-Length: 0", b"Content-Length: 999999999999"),
        OK.replace(b"Content-Length: 0", b"Content-Length: 65000\r\nl: 0"),
        OK.replace(b"Content-Length: 0", b"Content-Length: 65536"),
        b"\r\n".join([OK[:40], *[b"Via: x"] * 500]) + b"\r\n\r\n",
        b"SIP/2.0 200 " + b"x" * LARGEST,
    ],
)
def test_a_stream_that_cannot_be_cut_is_given_up(data: bytes) -> None:
    with pytest.raises(BadFrame):
        Framer().feed(data)
