"""The simulated SIP registrar: who may bind, what it answers, and what it does when it is told to misbehave."""

import hashlib
import json
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from uuid import uuid4

import httpx
import pytest

from pombal.cli import main
from pombal.settings import settings
from sandbox import client
from sandbox.app import create_app
from sandbox.client import SandboxError
from sandbox.kinds import SIP_HABITS
from sandbox.sip_digest import is_right
from sandbox.sip_habits import Habit
from sandbox.sip_odd import KINDS
from sandbox.sip_service import Places
from sandbox.sip_thread import SipThread
from sandbox.sip_words import Message, Stream, Unreadable, address, credentials, quoted, split, uri
from tests.sandbox.servers import serve
from tests.sandbox.sip_servers import a_registrar

USER, PASSWORD, DOMAIN = "5511999990000", "s3cret", "trunk.test"


# ------------------------------------------------------------------------------------------------- a phone of our own


@dataclass
class Phone:
    """Registers over a real socket, as a test tells it to."""

    address: tuple[str, int]
    user: str = USER
    password: str = PASSWORD
    call_id: str = "call-1"
    cseq: int = 0
    tcp: bool = False
    sent: bytes = b""
    _stream: Stream = field(default_factory=Stream)
    _came: list[bytes] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM if self.tcp else socket.SOCK_DGRAM)
        self.sock.settimeout(5)
        if self.tcp:
            self.sock.connect(self.address)
        else:
            self.sock.bind(("127.0.0.1", 0))
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    @property
    def contact(self) -> str:
        return f"sip:token-1@127.0.0.1:{self.sock.getsockname()[1]};transport=udp"

    def ask(self, *more: str, method: str = "REGISTER", expires: int | str | None = 300, contact: str = "") -> None:
        """One request with the next CSeq."""
        self.cseq += 1
        kind, port = ("TCP" if self.tcp else "UDP"), self.sock.getsockname()[1]
        contact = contact or f"<{self.contact}>"
        lines = [
            f"{method} sip:{DOMAIN} SIP/2.0",
            f"Via: SIP/2.0/{kind} 127.0.0.1:{port};branch=z9hG4bK{self.call_id}{self.cseq};rport",
            "Max-Forwards: 70",
            f"From: <sip:{self.user}@{DOMAIN}>;tag=f1",
            f"To: <sip:{self.user}@{DOMAIN}>",
            f"Call-ID: {self.call_id}",
            f"CSeq: {self.cseq} {method}",
            *([f"Contact: {contact}"] if contact != "none" else []),
            *([f"Expires: {expires}"] if expires is not None else []),
            *more,
            "Content-Length: 0",
        ]
        self.sent = ("\r\n".join(lines) + "\r\n\r\n").encode()
        self.again()

    def again(self) -> None:
        if self.tcp:
            self.sock.sendall(self.sent)
        else:
            self.sock.sendto(self.sent, self.address)

    def raw(self) -> bytes:
        """The next thing that comes."""
        while self.tcp and not self._came:
            data = self.sock.recv(65_536)
            if not data:
                raise ConnectionResetError("it is closed")
            self._came += self._stream.feed(data)
        return self._came.pop(0) if self.tcp else self.sock.recv(65_536)

    def reply(self) -> Message:
        return Message(self.raw())

    def is_quiet(self) -> bool:
        """Whether nothing has come; ask only when something else shows that it would have."""
        return not self._came and not select.select([self.sock], [], [], 0)[0]

    def answer_to(self, challenge: Message, **other: str) -> str:
        """A header with credentials for its first challenge; `other` parameters instead of the right ones."""
        is_proxy = challenge.status == 407
        line = challenge.get("proxy-authenticate" if is_proxy else "www-authenticate")
        first = re.split(r",\s*(?=Digest )", line)[0]
        name = "Proxy-Authorization" if is_proxy else "Authorization"
        return f"{name}: {self._credentials(credentials(first)[1], **other)}"

    def _credentials(self, asked: dict[str, str], **other: str) -> str:
        algorithm = asked.get("algorithm", "MD5")
        digest = {"MD5": "md5", "SHA-256": "sha256", "SHA-512-256": "sha512_256"}[algorithm.removesuffix("-sess")]

        def h(*parts: str) -> str:
            return hashlib.new(digest, ":".join(parts).encode()).hexdigest()

        given = {"username": self.user, "realm": asked["realm"], "nonce": asked["nonce"], "uri": f"sip:{DOMAIN}"}
        given |= {"cnonce": "c0", "nc": "00000001", **other}
        first = h(given["username"], given["realm"], self.password)
        if algorithm.endswith("-sess"):
            first = h(first, given["nonce"], given["cnonce"])
        second = h("REGISTER", given["uri"])
        count = given.pop("nc")
        plain, middle = {}, [given["nonce"]]
        if "qop" in asked:
            plain, middle = {"qop": "auth", "nc": count}, [given["nonce"], count, given["cnonce"], "auth"]
        given["response"] = h(first, *middle, second)
        if "qop" not in asked and not algorithm.endswith("-sess"):
            del given["cnonce"]
        if "opaque" in asked:
            given["opaque"] = asked["opaque"]
        if "algorithm" in asked:
            plain["algorithm"] = algorithm
        told = [f"{key}={quoted(value)}" for key, value in given.items()] + [
            f"{key}={value}" for key, value in plain.items()
        ]
        return "Digest " + ", ".join(told)

    def register(self, **asked: int | str | None) -> Message:
        """Asks, answers the challenge if there is one, and gives what comes then."""
        self.ask(**asked)  # type: ignore[arg-type]
        first = self.reply()
        if first.status not in (401, 407):
            return first
        self.ask(self.answer_to(first), **asked)  # type: ignore[arg-type]
        return self.reply()


@pytest.fixture(scope="module")
def running() -> Iterator[SipThread]:
    with a_registrar() as its:
        yield its


@pytest.fixture
def sip(running: SipThread) -> SipThread:
    """A registrar with one account that has nothing bound and was never asked for."""
    running.clear_habits()
    running.remove()
    running.clear()
    running.user(USER, PASSWORD)
    return running


@pytest.fixture
def phone(sip: SipThread) -> Iterator[Phone]:
    with Phone((sip.host, sip.port), call_id=uuid4().hex) as its:
        yield its


@pytest.fixture
def wired(sip: SipThread) -> Iterator[Phone]:
    """One over TCP."""
    with Phone((sip.host, sip.port), call_id=uuid4().hex, tcp=True) as its:
        yield its


# ------------------------------------------------------------------------------------------------------- what is usual


def test_whoever_knows_the_password_is_bound_for_as_long_as_was_asked(sip: SipThread, phone: Phone) -> None:
    phone.ask()
    challenge = phone.reply()
    phone.ask(phone.answer_to(challenge))
    granted = phone.reply()

    assert (challenge.status, granted.status) == (401, 200)
    assert granted.values("contact") == [f"<{phone.contact}>;expires=300"]
    assert f";rport={phone.sock.getsockname()[1]};received=127.0.0.1" in granted.get("via")
    state = sip.state(USER)
    (binding,) = state["bindings"]
    assert (binding["contact"], binding["granted"]) == (phone.contact, 300)
    assert (binding["call_id"], binding["cseq"]) == (phone.call_id, 2)
    assert binding["source"] == f"127.0.0.1:{phone.sock.getsockname()[1]}"
    assert (state["registered"], state["gaps"], state["last_code"]) == (True, [], 200)


def test_the_journal_tells_of_both_transactions_and_of_no_secret(sip: SipThread, phone: Phone) -> None:
    phone.register()

    asked, answered = sip.journal(USER)
    assert [asked["codes"], answered["codes"]] == [[401], [200]]
    assert [asked["was_authorized"], answered["was_authorized"]] == [False, True]
    assert (answered["algorithm"], answered["expires"], answered["transport"]) == ("MD5", "300", "udp")
    assert asked["complaints"] == answered["complaints"] == []
    assert asked["at"] <= asked["ended"] <= answered["at"] <= answered["ended"]
    assert PASSWORD not in json.dumps(sip.journal())
    assert "response=" not in json.dumps(sip.journal())


def test_nobody_is_bound_for_more_than_an_hour(phone: Phone) -> None:
    assert phone.register(expires=90_000).values("contact") == [f"<{phone.contact}>;expires=3600"]


@pytest.mark.parametrize("algorithm", ["MD5", "MD5-sess", "SHA-256", "SHA-256-sess", "SHA-512-256"])
def test_a_response_is_right_as_the_vectors_say(algorithm: str) -> None:
    vectors = {
        "MD5": "9119cc11ef361f729230ecbe827cda72",
        "MD5-sess": "df7bc95345d4c10203a65e58d1d8a108",
        "SHA-256": "ab4bc679e6b5ba7c33f7e99bf3ee015c3fe7c9a1ea55ec2bc717d758dc2ab076",
        "SHA-256-sess": "84f1055ca0b02a0dd83b3deb319eb5e06366ee41a40cf92551c051488adb2328",
        "SHA-512-256": "d69198fc8aa7add2cfe34c46f9432caa1dfc5806f9df338fea0b4e7356a98c5f",
    }
    given = {"username": "alice", "realm": "pombal.test", "uri": "sip:pombal.test", "nonce": "c0ffee0123"}
    given |= {"cnonce": "0a1b2c3d4e5f6071", "nc": "00000001", "qop": "auth", "algorithm": algorithm}
    given["response"] = vectors[algorithm]

    assert is_right(given, "REGISTER", "alice", "s3cret")
    assert not is_right(given, "REGISTER", "alice", "another")
    assert not is_right(given | {"nc": "00000002"}, "REGISTER", "alice", "s3cret")


def test_a_wrong_password_is_403_or_another_challenge(sip: SipThread, phone: Phone) -> None:
    phone.password = "wrong"
    assert phone.register().status == 403

    sip.habit(USER, wrong_password="401")
    assert phone.register().status == 401
    assert not sip.state(USER)["registered"]


def test_nobody_of_that_name_or_domain_is_404(sip: SipThread, phone: Phone) -> None:
    sip.user("elsewhere", domain="other.test")
    for phone.user in ("nobody", "elsewhere"):
        assert phone.register().status == 404


def test_credentials_may_have_another_name_and_realm(sip: SipThread, phone: Phone) -> None:
    sip.user(USER, PASSWORD, auth_user="trunk-7", realm="Asterisk")
    phone.ask()
    challenge = phone.reply()
    phone.ask(phone.answer_to(challenge, username="trunk-7"))

    assert 'realm="Asterisk"' in challenge.get("www-authenticate")
    assert phone.reply().status == 200


def test_a_cseq_that_does_not_grow_is_400_unless_the_call_id_is_new(phone: Phone) -> None:
    phone.cseq = 40
    assert phone.register().status == 200
    phone.cseq = 10
    assert phone.register().status == 400
    phone.cseq, phone.call_id = 10, "new"
    assert phone.register().status == 200


def test_a_retransmission_gets_the_same_reply_and_counts_once(sip: SipThread, phone: Phone) -> None:
    phone.ask()
    first = phone.raw()
    phone.again()

    assert phone.raw() == first
    (one,) = sip.journal(USER)
    assert (one["retransmissions"], one["codes"]) == (1, [401])
    assert sip.state(USER)["registers"] == 1


def test_a_nonce_serves_again_with_a_higher_count_only(phone: Phone) -> None:
    phone.ask()
    challenge = phone.reply()
    answers = []
    for count in ("00000001", "00000002", "00000002"):
        phone.ask(phone.answer_to(challenge, nc=count))
        answers.append(phone.reply())

    assert [answer.status for answer in answers] == [200, 200, 401]
    assert "stale=true" in answers[2].get("www-authenticate")


def test_bindings_are_listed_ours_last_and_removed_one_by_one_or_all(sip: SipThread, phone: Phone) -> None:
    phone.register()
    phone.register(contact="<sip:other@192.0.2.7:5070>;expires=120")
    listed = [address(value).uri for value in phone.register().values("contact")]
    assert listed == ["sip:other@192.0.2.7:5070", phone.contact]

    asked = phone.register(contact="none", expires=None)
    assert len(asked.values("contact")) == 2

    left = phone.register(expires=0)
    assert [address(value).uri for value in left.values("contact")] == ["sip:other@192.0.2.7:5070"]
    assert phone.register(contact="*", expires=300).status == 400
    assert phone.register(contact="*", expires=0).values("contact") == []
    assert sip.state(USER)["bindings"] == []


def test_times_without_a_binding_are_gaps(sip: SipThread, phone: Phone) -> None:
    sip.user("gaps")
    phone.user = "gaps"
    sip.habit("gaps", grant=1)
    phone.register()
    sip.until(lambda: sip.state("gaps")["gaps"])
    (gap,) = sip.state("gaps")["gaps"]
    assert (gap["to"], gap["why"], sip.state("gaps")["bindings"]) == (None, "expired", [])
    assert gap["from"] >= sip.journal("gaps")[-1]["at"] + 1

    sip.clear_habits("gaps")
    phone.register()
    (binding,) = sip.state("gaps")["bindings"]
    (gap,) = sip.state("gaps")["gaps"]
    assert gap["to"] == binding["made_at"] > gap["from"]

    phone.register()
    phone.register(expires=0)
    assert [gap["why"] for gap in sip.state("gaps")["gaps"]] == ["expired", "removed"]


def test_what_is_no_sip_is_counted_and_dropped(sip: SipThread, phone: Phone) -> None:
    for junk in (b"\r\n\r\n", b"hello", b"\xff" * 60_000, b"REGISTER sip:x SIP/2.0\r\n\r\n", b"a b c\r\nd\r\n\r\n"):
        phone.sock.sendto(junk, phone.address)

    assert phone.register().status == 200
    assert sum(sip.summary()["dropped"].values()) == 4


def test_what_breaks_the_rules_is_served_and_noted(sip: SipThread, phone: Phone) -> None:
    phone.ask()
    challenge = phone.reply()
    phone.ask(phone.answer_to(challenge, uri="sip:elsewhere", nc="1"), "Max-Forwards: 70")

    assert phone.reply().status == 200
    assert sorted(sip.journal(USER)[-1]["complaints"]) == [
        "nc is not eight hexadecimal digits",
        "several max-forwards",
        "the digest's uri is not the Request-URI",
    ]


def test_it_serves_no_other_method_but_options(phone: Phone) -> None:
    assert phone.register(method="SUBSCRIBE").status == 405
    assert phone.register(method="OPTIONS").status == 200


# -------------------------------------------------------------------------------------------------------------- habits


def test_a_short_interval_is_refused_before_or_after_the_challenge(sip: SipThread, phone: Phone) -> None:
    sip.habit(USER, min_expires=600)
    refused = phone.register()
    assert (refused.status, refused.get("min-expires")) == (423, "600")
    phone.ask(expires=600)
    assert phone.reply().status == 401
    assert phone.register(expires=600).status == 200

    sip.clear_habits()
    sip.habit(USER, min_expires=900, when="any", next=1)
    phone.ask()
    assert phone.reply().status == 423
    assert phone.register().status == 200


@pytest.mark.parametrize(
    ("habit", "contacts", "expires"),
    [
        ({"grant": 30}, [";expires=30"], ""),
        ({"grant": 0}, [";expires=0"], ""),
        ({"grant": "soon"}, [";expires=soon"], ""),
        ({"grant": 10**12, "grant_in": "both"}, [f";expires={10**12}"], str(10**12)),
        ({"grant": 90, "grant_in": "header"}, [""], "90"),
        ({"grant": 90, "grant_in": "both_differ"}, [";expires=90"], "1090"),
        ({"grant_in": "nowhere"}, [""], ""),
        ({"header": -5}, [";expires=300"], "-5"),
        ({"unlisted": True, "header": 60}, [], "60"),
    ],
)
def test_it_grants_other_than_asked_and_tells_it_elsewhere(
    sip: SipThread, phone: Phone, habit: dict[str, object], contacts: list[str], expires: str
) -> None:
    sip.habit(USER, **habit)
    granted = phone.register()

    assert granted.values("contact") == [f"<{phone.contact}>{one}" for one in contacts]
    assert granted.get("expires") == expires
    assert sip.state(USER)["registered"] is (habit.get("grant") != 0)


def test_it_lists_others_and_rewrites_ours(sip: SipThread, phone: Phone) -> None:
    others = [{"contact": "sip:other@198.51.100.7:5060", "expires": 3600}]
    sip.habit(USER, others=others, rewrite_contact={"host": "203.0.113.9", "user": "x", "port": 0})

    assert phone.register().values("contact") == [
        "<sip:other@198.51.100.7:5060>;expires=3600",
        "<sip:x@203.0.113.9;transport=udp>;expires=300",
    ]


def test_it_refuses_with_any_code_for_the_next_few_transactions(sip: SipThread, phone: Phone) -> None:
    sip.habit(USER, code=503, reason="Busy é", retry_after=120, next=2)
    sip.habit(USER, code=403, when="authorized", next=1)
    phone.ask()
    refused = phone.reply()
    phone.ask()

    assert (refused.status, refused.reason, refused.get("retry-after")) == (503, "Busy é", "120")
    assert phone.reply().status == 503
    assert [phone.register().status for _ in range(2)] == [403, 200]


def test_it_sends_us_elsewhere(sip: SipThread, phone: Phone) -> None:
    sip.habit(domain=DOMAIN, redirect="sip:5511999990000@198.51.100.9")
    moved = phone.register()
    assert (moved.status, moved.get("contact")) == (302, "<sip:5511999990000@198.51.100.9>")


@pytest.mark.parametrize(
    "habit",
    [
        *({"algorithms": [name]} for name in ("", "SHA-256", "MD5-sess", "SHA-256-sess", "SHA-512-256")),
        *({"qop": qop} for qop in ("none", "auth,auth-int")),
        {"algorithms": ["SHA-256", "MD5"], "one_line": True},
        {"proxy_auth": True},
        {"opaque": 'o,p"q'},
    ],
    ids=str,
)
def test_an_answer_to_any_challenge_is_taken(sip: SipThread, phone: Phone, habit: dict[str, object]) -> None:
    sip.habit(USER, **habit)

    assert phone.register().status == 200
    assert sip.journal(USER)[-1]["complaints"] == []


def test_challenges_may_be_several_unknown_or_without_what_they_need(sip: SipThread, phone: Phone) -> None:
    sip.habit(USER, algorithms=["SHA-256", "FOO"], qop="auth-int", omit=["realm"], scheme="Basic")
    phone.ask()
    challenge = phone.reply()

    told = [credentials(line) for line in challenge.headers["www-authenticate"]]
    assert [scheme for scheme, _ in told] == ["Basic", "Basic"]
    assert [params["algorithm"] for _, params in told] == ["SHA-256", "FOO"]
    assert [(params["qop"], "realm" in params) for _, params in told] == [("auth-int", False)] * 2


def test_a_nonce_may_be_broken_by_a_new_line(sip: SipThread, phone: Phone) -> None:
    sip.habit(USER, nonce_newline="folded")
    phone.ask()
    raw = phone.raw()
    assert re.search(rb'nonce="[0-9a-f]+\r\n [0-9a-f]+"', raw)
    phone.ask(phone.answer_to(Message(raw)))
    assert phone.reply().status == 200

    sip.habit(USER, nonce_newline="bare")
    phone.ask()
    assert re.search(rb'nonce="[0-9a-f]+\n[0-9a-f]+"', phone.raw())


def test_a_nonce_goes_stale_once_or_ever_again_and_says_so_or_not(sip: SipThread, phone: Phone) -> None:
    def answers(count: int) -> list[tuple[int, bool]]:
        phone.ask()
        found = []
        challenge = phone.reply()
        for _ in range(count):
            phone.ask(phone.answer_to(challenge))
            challenge = phone.reply()
            found.append((challenge.status, "stale=true" in challenge.get("www-authenticate")))
        return found

    id = sip.habit(USER, stale="once")
    assert answers(2) == [(401, True), (200, False)]
    sip.clear_habits(id=id)
    id = sip.habit(USER, stale_silently="once")
    assert answers(2) == [(401, False), (200, False)]
    sip.clear_habits(id=id)
    id = sip.habit(USER, stale="always")
    assert answers(3) == [(401, True)] * 3
    sip.clear_habits(id=id)
    sip.habit(USER, endless_401=True)
    assert answers(3) == [(401, False)] * 3


def test_it_is_deaf_for_some_datagrams(sip: SipThread, phone: Phone) -> None:
    sip.habit(USER, silent=2, next=1)
    phone.ask()
    for _ in range(2):
        phone.again()

    assert phone.reply().status == 401
    assert phone.is_quiet()
    (one,) = sip.journal(USER)
    assert (one["retransmissions"], one["codes"]) == (2, [401])


def test_it_is_silent_for_good(sip: SipThread, phone: Phone) -> None:
    sip.habit(USER, silent="all", next=1)
    phone.ask()
    phone.again()
    sip.until(lambda: sip.summary()["retransmissions"])

    assert phone.is_quiet()
    assert sip.journal(USER)[0]["ended"] is None
    assert phone.register().status == 200
    assert sip.state(USER)["overlaps"] == 0  # that one will never be answered


def test_what_comes_while_another_waits_for_its_answer_overlaps(sip: SipThread, phone: Phone) -> None:
    sip.habit(USER, delay=3_600, provisional=True, next=1)
    phone.ask()
    assert phone.reply().status == 100
    phone.ask()

    assert phone.reply().get("cseq") == "2 REGISTER"
    assert [(one["overlapped"], one["codes"]) for one in sip.journal(USER)] == [(False, [100]), (True, [401])]
    assert (sip.state(USER)["overlaps"], sip.summary()["overlaps"]) == (1, 1)


def test_a_late_answer_is_one_all_the_same(sip: SipThread, phone: Phone) -> None:
    sip.habit(USER, delay=0.05)
    assert phone.register().status == 200
    asked, _ = sip.journal(USER)
    assert asked["ended"] - asked["at"] >= 0.05


def test_a_habit_is_everybodys_a_domains_or_a_users_and_the_closest_one_counts(sip: SipThread, phone: Phone) -> None:
    sip.user("b")
    sip.habit(code=500)
    sip.habit(domain=DOMAIN, code=501, retry_after=7)
    sip.habit("b", code=480)
    assert phone.register().status == 501
    phone.user = "b"
    refused = phone.register()
    assert (refused.status, refused.get("retry-after")) == (480, "7")

    sip.clear_habits("b")
    assert phone.register().status == 501
    sip.clear_habits()
    assert phone.register().status == 200


def test_a_habit_of_nothing_or_of_nonsense_is_refused(sip: SipThread) -> None:
    for keys in ({}, {"malformed": "rude"}, {"code": 200}, {"loud": True}, {"domain": "a", "code": 500}):
        with pytest.raises(ValueError, match=r"\w"):
            sip.habit(USER, **keys)


# ----------------------------------------------------------------------------------------------------- odd replies


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_odd_reply_comes_before_the_good_one_or_instead(sip: SipThread, phone: Phone, kind: str) -> None:
    sip.habit(USER, malformed=kind, next=1)
    phone.ask()
    replies = [phone.raw(), phone.raw()]
    if kind == "foreign_source":
        replies.sort(key=lambda raw: b" 200 OK" not in raw)  # two sockets: either may be first
    bad, good = replies

    assert Message(good).status == 401
    assert bad != good
    branch, cseq = f"branch=z9hG4bK{phone.call_id}1;", "1 REGISTER"
    try:
        read = Message(bad)
    except Unreadable:
        assert kind in ("no_status_line", "garbage", "truncated")
        return
    its = (branch in read.get("via"), read.get("call-id") == phone.call_id, read.get("cseq") == cseq)
    strange = {"foreign_branch": 0, "foreign_call_id": 1, "foreign_cseq": 2, "foreign_method": 2}.get(kind)
    if kind != "truncated":
        assert [i for i, one in enumerate(its) if not one] == ([] if strange is None else [strange])
    assert read.status == (200 if kind.startswith("foreign") else 401)

    sip.habit(USER, malformed=kind, only=True, next=1)
    phone.ask()
    assert phone.raw() != good
    phone.ask()
    assert phone.reply().get("cseq") == "3 REGISTER"


def test_a_foreign_reply_is_the_opposite_of_the_true_one(sip: SipThread, phone: Phone) -> None:
    sip.habit(USER, malformed=["foreign_branch", "foreign_cseq"], when="authorized")

    assert phone.register().status == 403
    assert [phone.reply().status for _ in range(2)] == [403, 200]


# ------------------------------------------------------------------------------------------------------------------ TCP


def test_it_serves_tcp_on_the_same_port(sip: SipThread, wired: Phone) -> None:
    assert wired.register().status == 200
    assert sip.state(USER)["bindings"][0]["transport"] == "tcp"
    assert sip.journal(USER)[-1]["complaints"] == []


def test_replies_over_tcp_come_split_glued_and_between_keep_alives(sip: SipThread, wired: Phone) -> None:
    sip.habit(USER, tcp_split=7, tcp_keep_alives=True, provisional=True)
    wired.ask()
    assert wired.sock.recv(65_536, socket.MSG_PEEK).startswith(b"\r\n")
    assert [wired.reply().status for _ in range(2)] == [100, 401]

    sip.clear_habits()
    sip.habit(USER, malformed="folded", next=1)
    wired.ask()
    data = wired.sock.recv(65_536)
    assert data.count(b"SIP/2.0 401") == 2


@pytest.mark.parametrize(("when", "answers"), [("challenge", 1), ("answer", 1), ("request", 0)])
def test_a_connection_ends_when_it_should_not(sip: SipThread, wired: Phone, when: str, answers: int) -> None:
    sip.habit(USER, tcp_close=when)
    wired.ask()

    assert [wired.reply().status for _ in range(answers)] == [401] * answers
    with pytest.raises(ConnectionResetError):
        wired.reply()
    assert len(sip.journal(USER)[0]["codes"]) == answers


# --------------------------------------------------------------------------------------------- there, not there, calls


def test_it_goes_away_and_comes_back_with_what_was_bound(sip: SipThread, wired: Phone) -> None:
    wired.register()
    sip.away()
    with pytest.raises(ConnectionResetError):
        wired.reply()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((sip.host, sip.port), timeout=5)

    sip.back()
    assert sip.state(USER)["registered"]
    with Phone((sip.host, sip.port), call_id="back") as phone:
        assert phone.register().status == 200


@dataclass
class Callee:
    """Takes calls, or does not, with this status."""

    status: int
    heard: list[Message] = field(default_factory=list)

    def serve(self, sock: socket.socket) -> None:
        while not self.heard or self.heard[-1].method not in ("ACK", "BYE"):
            raw, source = sock.recvfrom(65_536)
            message = Message(raw)
            self.heard.append(message)
            if message.method == "INVITE":
                lines = [f"SIP/2.0 {self.status} Well", *(f"Via: {via}" for via in message.headers["via"])]
                lines += [f"{name}: {message.get(name)}" for name in ("from", "call-id", "cseq")]
                lines += [f"To: {message.get('to')};tag=x", "Contact: <sip:me@127.0.0.1:9>", "Content-Length: 0"]
                sock.sendto(("\r\n".join(lines) + "\r\n\r\n").encode(), source)


@pytest.mark.parametrize("status", [200, 302, 486])
@pytest.mark.parametrize("received", [False, True])
def test_a_call_goes_to_where_the_binding_points_or_came_from(
    sip: SipThread, phone: Phone, status: int, received: bool
) -> None:
    host = "203.0.113.5:5060" if received else f"localhost:{phone.sock.getsockname()[1]}"
    contact = f"sip:token-7@{host};transport=udp"
    phone.register(contact=f"<{contact}>")
    callee = Callee(status)
    thread = threading.Thread(target=callee.serve, args=(phone.sock,))
    thread.start()
    outcome = sip.invite(USER, received=received)
    thread.join()

    assert (outcome["request_uri"], outcome["status"]) == (contact, status)
    assert outcome["contact_of_answer"] == "sip:me@127.0.0.1:9"
    assert callee.heard[0].uri == contact
    assert [message.method for message in callee.heard][:2] == ["INVITE", "ACK"]


def test_a_call_for_whom_nobody_answers_or_knows(sip: SipThread, phone: Phone) -> None:
    with pytest.raises(LookupError, match="has no binding"):
        sip.invite(USER)
    phone.register()
    assert sip.invite(USER, seconds=0.05)["status"] is None


# ----------------------------------------------------------------------------------------------------- control routes


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    config = tmp_path_factory.mktemp("sip") / "sandbox.json"
    config.write_text(json.dumps({"sip": {"users": [{"name": USER, "password": PASSWORD}]}}))
    with serve(create_app(config, Places(port=0))) as address:
        yield address, config


@pytest.fixture
def control(served: tuple[str, Path]) -> str:
    client.sip_clear_habits(served[0])
    client.sip_remove(served[0])
    client.sip_forget(served[0], USER)
    client.sip_clear(served[0])
    return served[0]


@pytest.fixture
def caller(control: str) -> Iterator[Phone]:
    where = client.sip(control)
    with Phone((where["host"], where["port"]), call_id=uuid4().hex) as its:
        yield its


def test_the_control_port_tells_where_the_registrar_is(control: str) -> None:
    its = client.sip(control)
    assert client.health(control)["sip"] == f"127.0.0.1:{its['port']}"
    assert (its["away"], its["users"], its["registered"]) == (False, 1, 0)
    listed = {route["path"] for route in httpx.get(control).json()["routes"]}
    assert {"/sip", "/sip/users/{name}", "/sip/habits"} <= listed


def test_accounts_are_made_by_the_thousand_and_register(control: str, caller: Phone) -> None:
    assert client.sip_users(control, count=5000, prefix="u", password="p") == {
        "count": 5000,
        "first": "u0",
        "last": "u4999",
    }
    caller.user, caller.password = "u4999", "p"
    assert caller.register().status == 200

    assert client.sip_state(control, "u4999")["registered"]
    assert client.sip_summary(control)["registered"] == 1
    assert len(client.sip_users(control)["users"]) == 5001
    assert [one["codes"] for one in client.sip_transactions(control, user="u4999")["transactions"]] == [[401], [200]]
    with pytest.raises(SandboxError, match="no account 'nobody'"):
        client.sip_state(control, "nobody")


def test_habits_are_set_listed_and_cleared(control: str, caller: Phone) -> None:
    client.sip_habit(control, USER, code=503, next=3)
    assert caller.register().status == 503
    (shown,) = client.sip_habits(control)["habits"]
    assert (shown["user"], shown["code"], shown["next"], shown["met"], shown["when"]) == (USER, 503, 3, 1, "any")

    assert client.sip_clear_habits(control, USER) == {"habits": []}
    assert caller.register().status == 200
    with pytest.raises(SandboxError, match="a habit of nothing"):
        client.sip_habit(control, USER)


def test_the_registrar_goes_and_comes_by_a_word(control: str) -> None:
    where = client.sip(control)
    assert client.sip_away(control) == {"away": True}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((where["host"], where["port"]), timeout=5)
    assert client.sip_away(control, False) == {"away": False}
    socket.create_connection((where["host"], where["port"]), timeout=5).close()


def test_a_call_without_a_binding_is_a_conflict(control: str) -> None:
    with pytest.raises(SandboxError) as refused:
        client.sip_invite(control, USER)
    assert refused.value.code == "CONFLICT"


def test_accounts_of_the_configuration_come_and_go_with_it(served: tuple[str, Path], control: str) -> None:
    config = served[1]
    before = config.read_text()
    config.write_text(json.dumps({"sip": {"users": [{"name": "new-one", "password": "p"}]}}))
    assert [one["name"] for one in client.sip_users(control)["users"]] == ["new-one"]
    config.write_text(before)
    assert [one["name"] for one in client.sip_users(control)["users"]] == [USER]


def test_without_a_port_nobody_can_register(tmp_path: Path) -> None:
    with serve(create_app(tmp_path / "none.json")) as address:
        assert "sip" not in client.health(address)
        with pytest.raises(SandboxError, match="without a SIP port"):
            client.sip_away(address)


def test_the_sandbox_has_a_drachtio_if_it_is_told_so(tmp_path: Path) -> None:
    config = tmp_path / "sandbox.json"
    config.write_text(json.dumps({"drachtio": {"secret": "of-the-test"}}))
    with serve(create_app(config, Places(drachtio_port=0))) as address:
        its = client.sip_drachtio(address)
        with socket.create_connection(("127.0.0.1", its["port"]), timeout=5) as control:
            control.sendall(b"29#m1|authenticate|of-the-test|x")
            assert b"|response|m1|OK|" in control.recv(65_536)
            assert client.sip_drachtio(address)["authenticated"] == 1
        assert client.sip_drachtio_habits(address, nok="no", times=2)["habits"]["nok"] == "no"
        assert client.sip_drachtio_habits(address)["habits"]["nok"] == ""
        with pytest.raises(SandboxError, match="loud"):
            client.sip_drachtio_habits(address, loud=True)
        assert client.sip_drachtio_requests(address) == {"requests": []}

    with (
        serve(create_app(config)) as address,
        pytest.raises(SandboxError, match="without a drachtio"),
    ):
        client.sip_drachtio(address)


def test_a_call_for_a_binding_at_drachtio_arrives_there(tmp_path: Path, sip: SipThread, phone: Phone) -> None:
    with serve(create_app(tmp_path / "none.json", Places(drachtio_port=0))) as address:
        port = client.sip_drachtio(address)["sip_port"]
        phone.register(contact=f"<sip:token-9@127.0.0.1:{port};transport=udp>")

        assert sip.invite(USER)["status"] == 480  # there is nobody to ask where it should go
        (call,) = client.sip_drachtio_invites(address)["invites"]
        assert call["request_uri"] == f"sip:token-9@127.0.0.1:{port};transport=udp"


def test_a_port_that_somebody_has_ends_the_process_with_a_word(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["--port", "0", "--config", str(tmp_path / "none.json"), "--sip-port", str(port)]
        ended = subprocess.run(
            [sys.executable, "-m", "sandbox", *words], check=False, capture_output=True, text=True, timeout=60
        )

    assert ended.returncode
    assert f"no SIP registrar on 127.0.0.1:{port}" in ended.stderr


# ---------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def run(control: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    port = control.rpartition(":")[2]

    def run(*words: str, ends: int = 0) -> str:
        assert main(["sandbox", "--port", port, "sip", *words]) == ends
        return capsys.readouterr().out

    return run


def test_commands_add_an_account_and_tell_how_it_stands(run: Callable[..., str], caller: Phone) -> None:
    caller.user, caller.password = "shop", "p"
    assert "shop" in run("users", "--add", "shop", "--password", "p")
    caller.register()

    assert caller.contact in run("bindings", "--user", "shop")
    (binding,) = json.loads(run("bindings", "--json"))
    assert (binding["user"], binding["granted"]) == ("shop", 300)
    assert [call["codes"] for call in json.loads(run("calls", "--user", "shop", "--json"))] == [[401], [200]]
    assert json.loads(run("calls", "--summary"))["codes"] == {"200": 1, "401": 1}
    assert "401" in run("calls")
    assert "nothing was asked" in run("calls", "--clear")


def test_a_command_sets_a_habit_and_ends_it(run: Callable[..., str], caller: Phone) -> None:
    assert "code=503 retry_after=9" in run("habit", "code=503", "retry_after=9", "--user", USER, "--next", "2")
    assert caller.register().get("retry-after") == "9"
    (shown,) = json.loads(run("habit", "--json"))
    assert (shown["user"], shown["met"]) == (USER, 1)
    assert "it does what it should" in run("habit", "--clear")


def test_a_habit_that_cannot_work_is_refused_or_warned_of(
    run: Callable[..., str], control: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "warning: the registrar has no account 'nobody'" in run("habit", "code=503", "--user", "nobody")
    assert "warning" not in run("habit", "code=503", "--user", USER)
    for words, reason in (
        (("loud=true",), "there is no key 'loud'; there are code, reason, "),
        (("code=423", "min_expires=900"), "min_expires alone answers 423 with Min-Expires"),
        (("code=200",), "code"),
    ):
        assert main(["sandbox", "--port", control.rpartition(":")[2], "sip", "habit", *words]) == 1
        assert reason in capsys.readouterr().err


def test_help_has_every_key_of_a_habit_with_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(SIP_HABITS) == Habit.__struct_fields__

    with pytest.raises(SystemExit):
        main(["sandbox", "sip", "habit", "--help"])

    said = capsys.readouterr().out
    assert all(f"  {key:<16} {does}\n" in said for key, does in SIP_HABITS.items())


def test_a_port_that_is_given_wins_over_the_sandbox_that_is_written_down(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POMBAL_SANDBOX_URL", "http://127.0.0.1:9")
    settings.cache_clear()
    try:
        assert "nothing was asked" in run("calls", "--clear")
        assert main(["sandbox", "sip", "calls"]) == 1
    finally:
        monkeypatch.undo()
        settings.cache_clear()


def test_a_command_lets_a_call_come_in(run: Callable[..., str], caller: Phone) -> None:
    caller.register()
    callee = Callee(486)
    thread = threading.Thread(target=callee.serve, args=(caller.sock,))
    thread.start()
    assert run("invite", USER).strip().endswith(": 486")
    thread.join()


# -------------------------------------------------------------------------------------------------------------- words


def test_values_are_split_outside_of_quotes_and_brackets() -> None:
    line = '"Prado, Bia" <sip:a,b@c>;q=1, <sip:d@e>, Digest realm="a,\\"b", nonce="x"'
    assert split(line) == ['"Prado, Bia" <sip:a,b@c>;q=1', "<sip:d@e>", 'Digest realm="a,\\"b"', 'nonce="x"']


def test_uris_that_mean_the_same_have_one_key() -> None:
    assert uri("sip:a@HOST.test").key == uri("sip:a@host.test:5060;transport=UDP").key
    assert uri("sip:a@host.test").key != uri("sip:A@host.test").key
    assert uri("sip:a@[::1]:5070;transport=tcp").host == "[::1]"
    with pytest.raises(Unreadable):
        uri("http://host.test")
