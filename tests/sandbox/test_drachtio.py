"""The simulated drachtio, as its clients and its callers meet it: over real sockets, in their own words."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from sandbox.drachtio import Dispatch, Standin
from tests.sandbox.drachtio_servers import SECRET, a_drachtio, wait_until

PATIENT = 10.0  # seconds: never waited for


class Control:
    """A client of the control port, one frame at a time."""

    def __init__(self, standin: Standin, secret: str | None = SECRET) -> None:
        self._socket = socket.create_connection(("127.0.0.1", standin.port), PATIENT)
        self._rest = b""
        if secret is not None:
            self.say(f"a|authenticate|{secret}|")

    def close(self) -> None:
        self._socket.close()

    def say(self, body: str) -> None:
        raw = body.encode()
        self._socket.sendall(b"%d#%b" % (len(raw), raw))

    def send(self, sip: str, proxy: str, *, id: str = "r", transaction: str = "") -> None:
        self.say(f"{id}|sip|{transaction}||{proxy}\r\n{sip}")

    def hear(self) -> tuple[list[str], str]:
        """The next frame's fields without its own id, and SIP. Raises EOFError when it hung up."""
        while b"#" not in self._rest or len(self._rest.partition(b"#")[2]) < int(self._rest.partition(b"#")[0]):
            data = self._socket.recv(65536)
            if not data:
                raise EOFError
            self._rest += data
        length, _, rest = self._rest.partition(b"#")
        body, self._rest = rest[: int(length)], rest[int(length) :]
        head, _, sip = body.decode().partition("\r\n")
        return head.split("|")[1:], sip


class Peer:
    """Somebody with a UDP port: a registrar, or a caller."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.settimeout(PATIENT)
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()

    @property
    def uri(self) -> str:
        return f"sip:127.0.0.1:{self.port};transport=udp"

    def hear(self) -> str:
        return self._socket.recv(65536).decode()

    def say(self, text: str, port: int) -> None:
        self._socket.sendto(text.encode(), ("127.0.0.1", port))

    def answer(self, request: str, status: int, standin: Standin) -> None:
        lines = [line for line in request.split("\r\n") if line.startswith(("Via", "From", "To", "Call-ID", "CSeq"))]
        self.say("\r\n".join([f"SIP/2.0 {status} X", *lines, "", ""]), standin.sip_port)


@pytest.fixture
def standin() -> Iterator[Standin]:
    with a_drachtio() as running:
        yield running


@pytest.fixture
def control(standin: Standin) -> Iterator[Control]:
    with closing(Control(standin)) as client:
        assert client.hear()[0][:3] == ["response", "a", "OK"]
        yield client


@pytest.fixture
def peer() -> Iterator[Peer]:
    with closing(Peer()) as one:
        yield one


def a_register(cseq: int = 1) -> str:
    lines = [
        "REGISTER sip:pombal.test SIP/2.0",
        "Via: SIP/2.0/UDP forged;branch=z9hG4bKforged",
        "Route: <sip:elsewhere>",
        "From: <sip:u@localhost>;tag=mine",
        "To: <sip:u@localhost>",
        "Call-ID: call-1",
        f"CSeq: {cseq} REGISTER",
        "Contact: <sip:token@localhost:5060;transport=udp>",
    ]
    return "\r\n".join([*lines, "", ""])


def an_invite(user: str = "token", branch: str = "z9hG4bKinvite") -> str:
    lines = [
        f"INVITE sip:{user}@127.0.0.1 SIP/2.0",
        f"Via: SIP/2.0/UDP 192.0.2.9:5060;branch={branch};rport",
        "Max-Forwards: 70",
        "From: <sip:caller@pombal.test>;tag=c",
        "To: <sip:token@pombal.test>",
        "Call-ID: a-call",
        "CSeq: 1 INVITE",
        "Content-Length: 0",
    ]
    return "\r\n".join([*lines, "", ""])


def statuses(peer: Peer) -> list[int]:
    """Of all answers to a call, up to the final one."""
    found = [100]
    while found[-1] < 200:
        found.append(int(peer.hear().split(" ")[1]))
    return found[1:]


def test_a_request_goes_out_as_drachtios_own(standin: Standin, control: Control, peer: Peer) -> None:
    control.send(a_register(), peer.uri)

    request = peer.hear()
    accepted, as_sent = control.hear()

    assert accepted[:3] == ["response", "r", "OK"]
    assert accepted[3::2][:2] == ["application", "udp"]
    assert as_sent == request
    own = f"127.0.0.1:{standin.sip_port}"
    assert request.count("Via:") == 1
    assert f"Via: SIP/2.0/UDP {own};branch=z9hG4bK" in request
    assert "Max-Forwards: 70\r\n" in request
    assert "Content-Length: 0\r\n" in request
    assert "Route" not in request
    assert f"From: <sip:u@{own}>;tag=mine\r\n" in request
    assert f"Contact: <sip:token@{own};transport=udp>\r\n" in request


def test_responses_go_to_who_sent_the_request(standin: Standin, control: Control, peer: Peer) -> None:
    with closing(Control(standin)) as other:
        other.hear()
        control.send(a_register(), peer.uri)
        request = peer.hear()
        transaction = control.hear()[0][9]
        peer.answer(request, 100, standin)
        peer.answer(request, 401, standin)
        frames = [control.hear(), control.hear()]
        other.say("p|ping")

        assert [(head[0], head[1], head[3:6], head[7]) for head, _ in frames] == [
            ("sip", "network", ["udp", "127.0.0.1", str(peer.port)], transaction)
        ] * 2
        assert [sip.split(" ")[1] for _, sip in frames] == ["100", "401"]
        assert other.hear()[0] == ["response", "p", "OK", "pong"]
    [asked] = standin.requests()
    assert (asked["codes"], asked["self_made"], asked["transaction"]) == ([100, 401], False, transaction)


def test_it_repeats_what_nobody_answers_and_gives_up_by_itself(peer: Peer) -> None:
    with a_drachtio(timeout=0.4) as standin, closing(Control(standin)) as control:
        control.hear()
        control.send(a_register(), peer.uri)
        first, second = peer.hear(), peer.hear()
        control.hear()
        head, sip = control.hear()

        assert first == second
        assert sip.startswith("SIP/2.0 408 ")
        assert head[4] == ""  # it came from nowhere
        assert standin.requests()[0]["self_made"]


@pytest.mark.parametrize("what", ["tls", "itself", "nonsense"])
def test_it_refuses_what_it_cannot_send(standin: Standin, control: Control, what: str) -> None:
    proxy = {"tls": "sip:127.0.0.1;transport=tls", "itself": f"sip:127.0.0.1:{standin.sip_port}", "nonsense": "x"}[what]

    control.send(a_register(), proxy)

    assert control.hear()[0][2] == "NOK"
    assert not standin.requests()[0]["sent"]


@pytest.mark.parametrize("secret", ["wrong", None])
def test_nobody_gets_in_without_the_secret(standin: Standin, secret: str | None) -> None:
    with closing(Control(standin, secret)) as client:
        if secret is None:
            client.send(a_register(), "sip:127.0.0.1:1")
        answer, _ = client.hear()
        with pytest.raises(EOFError):
            client.hear()

    assert answer[2] == "NO"
    assert standin.requests() == []


def test_what_drachtio_would_die_of_is_noted(standin: Standin, control: Control) -> None:
    control.send(a_register(), "sip:127.0.0.1:1", transaction="t")

    with pytest.raises((EOFError, ConnectionResetError)):
        control.hear()
    assert standin.violations() == ["REGISTER in a transaction or dialog"]


def test_a_call_is_noted_and_turned_away(standin: Standin, control: Control, peer: Peer) -> None:
    peer.say(an_invite(), standin.sip_port)

    assert statuses(peer) == [100, 480]
    peer.say(an_invite(), standin.sip_port)  # the answer was lost
    assert statuses(peer) == [480]
    [invite] = standin.invites()
    assert (invite["request_uri"], invite["call_id"], invite["status"]) == ("sip:token@127.0.0.1", "a-call", 480)
    assert invite["from"] == "<sip:caller@pombal.test>;tag=c"
    control.say("p|ping")
    assert control.hear()[0][-1] == "pong"  # no client was given the call


def test_a_call_is_for_who_asked_for_calls(standin: Standin, control: Control, peer: Peer) -> None:
    control.say("x|route|invite")
    control.hear()

    peer.say(an_invite(), standin.sip_port)

    head, sip = control.hear()
    assert head[:2] == ["sip", "network"]
    assert sip.startswith("INVITE sip:token@127.0.0.1 SIP/2.0\r\n")
    assert standin.routes() == ["invite"]


@contextmanager
def a_dispatcher() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Knows where calls to `token` go, that `homeless` goes nowhere, and nobody else; who asked, with which key."""
    asked: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            contact = parse_qs(urlsplit(self.path).query)["contact"][0]
            asked.append((contact, self.headers["x-api-key"]))
            known = "token" in contact or "homeless" in contact
            target = b'"sip:livekit.test:5060"' if "token" in contact else b"null"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(b'{"target": %b}' % target)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/dispatch", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_call_goes_where_dispatch_says(peer: Peer) -> None:
    with a_dispatcher() as (url, asked), a_drachtio(dispatch=Dispatch(url, "key")) as standin:
        for i, user in enumerate(("token", "homeless", "nobody")):
            peer.say(an_invite(user, f"z9hG4bK{i}"), standin.sip_port)
            wait_until(lambda i=i: len(standin.invites()) > i and standin.invites()[i]["status"])  # type: ignore[misc]
        answers = [peer.hear() for _ in range(6)]

        assert [(one["status"], one["target"], one["dispatch_status"]) for one in standin.invites()] == [
            (302, "sip:livekit.test:5060", 200),
            (404, None, 200),
            (404, None, 404),
        ]
    assert "Contact: <sip:livekit.test:5060>\r\n" in answers[1]
    assert asked[0] == ("sip:token@127.0.0.1", "key")


def test_a_dispatch_that_is_away_turns_calls_away(peer: Peer) -> None:
    with a_drachtio(dispatch=Dispatch("http://127.0.0.1:1/", "key")) as standin:
        peer.say(an_invite(), standin.sip_port)

        assert statuses(peer) == [100, 503]


def test_habits_hold_as_long_as_they_are_wanted(standin: Standin, control: Control, peer: Peer) -> None:
    standin.set_habits(nok="not now", times=2)
    for _ in range(3):
        control.send(a_register(), peer.uri)

    assert [control.hear()[0][2:4] for _ in range(3)] == [["NOK", "not now"], ["NOK", "not now"], ["OK", "application"]]
    assert standin.overview()["habits"]["nok"] == ""


@pytest.mark.parametrize("habits", [{"nonsense": 1}, {"pieces": -1}, {"drop": "always"}, {"nok": "a|b"}])
def test_what_is_no_habit_is_refused(standin: Standin, habits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a habit of drachtio"):
        standin.set_habits(**habits)

    assert standin.reset_habits() == standin.overview()["habits"]


def test_it_goes_away_and_comes_back_to_the_same_port(standin: Standin, control: Control) -> None:
    standin.go_away()
    with pytest.raises((EOFError, ConnectionResetError)):
        control.hear()
    with pytest.raises(ConnectionRefusedError):
        Control(standin)

    standin.come_back()
    wait_until(lambda: standin.overview()["is_there"])

    with closing(Control(standin)) as client:
        assert client.hear()[0][2] == "OK"
    assert standin.logins == 2
    standin.forget()
    assert (standin.logins, standin.requests()) == (0, [])


def test_it_also_runs_in_a_loop_of_ones_own() -> None:
    async def work() -> tuple[int, int]:
        standin = Standin(SECRET)
        await standin.start()
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", standin.port)
            with suppress(OSError):
                writer.close()
                await writer.wait_closed()
            standin.set_habits(deaf=True)
            return standin.overview()["port"], standin.port
        finally:
            await standin.stop()

    told, real = asyncio.run(work())
    assert told == real > 0
