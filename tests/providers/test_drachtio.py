"""Registering through drachtio: the stand-in at the other end of the control port, a registrar behind it, and for what
neither would do a control port of these tests. Nothing depends on how long anything takes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, closing, suppress
from ipaddress import ip_network
from typing import Any, TypeVar

import pytest

from pombal import metrics
from providers.drachtio import BadFrame, Drachtio, Frames, framed
from providers.sip import Account, Attempt, Kind, Outcome, Transport
from providers.sip_flight import Flight, NotSent, Reply, Trouble
from providers.sip_message import Request
from sandbox.drachtio import Standin
from sandbox.sip_thread import SipThread
from tests.sandbox.drachtio_servers import SECRET, a_drachtio, wait_until
from tests.sandbox.sip_servers import a_registrar

T = TypeVar("T")
USER, PASSWORD = "5511999990000", "s3cret"
LOOPBACK = [ip_network("127.0.0.0/8")]
PATIENT = 20.0  # seconds: never waited for
AT_ONCE = (0.0, 0.0)  # between two tries to connect


@pytest.fixture
def registrar() -> Iterator[SipThread]:
    with a_registrar() as running:
        running.user(USER, PASSWORD)
        yield running


@pytest.fixture
def standin() -> Iterator[Standin]:
    with a_drachtio() as running:
        yield running
        assert running.routes() == []  # or it would give us calls
        assert running.violations() == []


def a_request(cseq: int = 1, call_id: str = "call-1", user: str = USER) -> Request:
    return Request(
        "sip:pombal.test",
        call_id,
        cseq,
        (
            ("From", f"<sip:{user}@pombal.test>;tag=f"),
            ("To", f"<sip:{user}@pombal.test>"),
            ("Contact", "<sip:token@localhost;transport=udp>"),
            ("Expires", "300"),
        ),
    )


def an_account(**more: Any) -> Account:
    given: dict[str, Any] = {"domain": "pombal.test", "user": USER, "auth_user": USER, "password": PASSWORD}
    return Account(**given, contact="sip:token@localhost;transport=udp", call_id="call-1", from_tag="f", **more)


def within(port: int, work: Callable[[Drachtio], Awaitable[T]], secret: str = SECRET, **options: Any) -> T:
    """What `work` gives with a client of this control port."""

    async def run() -> T:
        drachtio = Drachtio("127.0.0.1", port, secret, **{"gap": AT_ONCE, **options})
        try:
            async with asyncio.timeout(PATIENT):
                return await work(drachtio)
        finally:
            await drachtio.close()

    return asyncio.run(run())


def to(drachtio: Drachtio, registrar: SipThread, fence: Callable[[], None] = lambda: None) -> Flight:
    return drachtio.flight("localhost", registrar.port, Transport.UDP, None, fence)


async def attempt(flight: Flight, account: Account, cseq: int = 1) -> Outcome:
    conversation = Attempt(account, cseq=cseq)
    step: Request | Outcome = conversation.begin()
    while isinstance(step, Request):
        step = conversation.answered((await flight.exchange(step)).response)
    return step


async def failure(work: Coroutine[Any, Any, object]) -> NotSent:
    with pytest.raises(NotSent) as caught:
        await work
    return caught.value


async def until(is_so: Callable[[], object]) -> None:
    """What is awaited happens in another thread."""
    await asyncio.to_thread(wait_until, is_so)


def dropped(why: str) -> float:
    return metrics.REGISTRY.get_sample_value("pombal_sip_dropped_total", {"class": why}) or 0.0


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_the_binding_belongs_to_drachtio(standin: Standin, registrar: SipThread, transport: str) -> None:
    async def work(drachtio: Drachtio) -> Outcome:
        return await attempt(
            drachtio.flight("pombal.test", registrar.port, Transport(transport), "localhost", lambda: None),
            an_account(),
        )

    outcome = within(standin.port, work)

    assert (outcome.kind, outcome.granted) == (Kind.REGISTERED, 300)
    [binding] = registrar.state(USER)["bindings"]
    assert binding["contact"].startswith(f"sip:token@127.0.0.1:{standin.sip_port}")
    if transport == "udp":
        assert binding["source"] == f"127.0.0.1:{standin.sip_port}"
    assert [one["complaints"] for one in registrar.journal()] == [[], []]


def test_credentials_go_to_the_address_that_challenged(standin: Standin, registrar: SipThread) -> None:
    async def work(drachtio: Drachtio) -> Outcome:
        return await attempt(to(drachtio, registrar), an_account())

    within(standin.port, work)

    assert [(one["authorized"], one["proxy"]) for one in standin.requests()] == [
        (False, f"sip:localhost:{registrar.port};transport=udp"),
        (True, f"sip:127.0.0.1:{registrar.port};transport=udp"),
    ]


@pytest.mark.parametrize(
    "habits",
    [{"pieces": 2}, {"pieces": 7, "glued": True}, {"early": True}, {"glued": True}, {"early": True, "pieces": 3}],
)
def test_frames_come_in_any_pieces_and_order(standin: Standin, registrar: SipThread, habits: dict[str, Any]) -> None:
    standin.set_habits(**habits)

    async def work(drachtio: Drachtio) -> Outcome:
        return await attempt(to(drachtio, registrar), an_account())

    assert within(standin.port, work).kind is Kind.REGISTERED


def test_all_share_one_connection_and_get_their_own_answers(standin: Standin, registrar: SipThread) -> None:
    names = registrar.users(150, password=PASSWORD)

    async def work(drachtio: Drachtio) -> list[Reply]:
        flights = [to(drachtio, registrar).exchange(a_request(7, f"call-{name}", name)) for name in names]
        return await asyncio.gather(*flights)

    replies = within(standin.port, work)

    assert [reply.response.call_id for reply in replies] == [f"call-{name}" for name in names]
    assert {(reply.response.status, reply.server) for reply in replies} == {(401, f"udp/127.0.0.1:{registrar.port}")}
    assert standin.logins == 1


def test_who_gives_up_takes_nothing_from_the_others(standin: Standin, registrar: SipThread) -> None:
    registrar.user("slow")
    registrar.habit("slow", silent="all")

    async def work(drachtio: Drachtio) -> Reply:
        slow = asyncio.create_task(to(drachtio, registrar).exchange(a_request(1, "call-slow", "slow")))
        await until(lambda: standin.requests())
        slow.cancel()
        await asyncio.wait({slow})
        assert slow.cancelled()
        return await to(drachtio, registrar).exchange(a_request())

    assert within(standin.port, work).response.status == 401


@pytest.mark.parametrize(("drop", "heard"), [("on_request", 0), ("before_response", 1)])
def test_a_lost_connection_leaves_the_outcome_unknown(
    standin: Standin, registrar: SipThread, drop: str, heard: int
) -> None:
    standin.set_habits(drop=drop, times=1)

    async def work(drachtio: Drachtio) -> tuple[NotSent, Reply]:
        lost = await failure(to(drachtio, registrar).exchange(a_request()))
        return lost, await to(drachtio, registrar).exchange(a_request(2))

    lost, reply = within(standin.port, work)

    assert (lost.trouble, lost.text) == (Trouble.TEMPORARY, "connection to drachtio lost; outcome unknown")
    assert reply.response.status == 401  # over a new connection
    assert len(registrar.journal()) == heard + 1


def test_all_who_wait_are_told_of_the_loss(standin: Standin, registrar: SipThread) -> None:
    registrar.habit(USER, silent="all")

    async def work(drachtio: Drachtio) -> list[NotSent]:
        waiting = [
            asyncio.create_task(failure(to(drachtio, registrar).exchange(a_request(1, f"call-{i}")))) for i in range(20)
        ]
        await until(lambda: len(standin.requests()) == 20)
        standin.hang_up()
        return await asyncio.gather(*waiting)

    assert {one.trouble for one in within(standin.port, work)} == {Trouble.TEMPORARY}


@pytest.mark.parametrize(
    ("secret", "text"),
    [
        ("another-one", "refused the secret"),
        ("", "is not set"),
        ("cymru", "sample configuration"),
        ("a|b", "control characters or"),
        ("a\r\nb", "control characters or"),
    ],
)
def test_a_secret_that_does_not_do_is_ours(standin: Standin, registrar: SipThread, secret: str, text: str) -> None:
    async def work(drachtio: Drachtio) -> tuple[NotSent, str | None]:
        return await failure(to(drachtio, registrar).exchange(a_request())), drachtio.away

    failed, away = within(standin.port, work, secret, gap=(60.0, 60.0))

    assert failed.trouble is Trouble.OURS
    assert text in failed.text
    assert away == failed.text
    assert secret not in failed.text or secret in ("", "cymru")
    assert standin.refused_logins == (1 if secret == "another-one" else 0)


def test_nobody_knocks_again_while_drachtio_is_away_and_all_are_told_at_once(
    standin: Standin, registrar: SipThread
) -> None:
    standin.go_away()

    async def work(drachtio: Drachtio) -> tuple[set[str], str | None, int]:
        flights = [failure(to(drachtio, registrar).exchange(a_request(1, f"call-{i}"))) for i in range(50)]
        failures = [*await asyncio.gather(*flights), await failure(to(drachtio, registrar).exchange(a_request()))]
        assert {one.trouble for one in failures} == {Trouble.OURS}
        standin.come_back()
        await until(lambda: standin.overview()["is_there"])
        failures.append(await failure(to(drachtio, registrar).exchange(a_request())))  # it is too early
        return {one.text for one in failures}, drachtio.away, standin.logins

    texts, away, logins = within(standin.port, work, gap=(60.0, 60.0))

    assert texts == {away} == {f"cannot reach drachtio at 127.0.0.1:{standin.port}: refused"}
    assert logins == 0


def test_it_comes_back_by_itself(standin: Standin, registrar: SipThread) -> None:
    async def work(drachtio: Drachtio) -> str:
        await drachtio.hello()
        standin.go_away()
        failed = await failure(to(drachtio, registrar).exchange(a_request()))
        assert failed.trouble in (Trouble.OURS, Trouble.TEMPORARY)  # as it noticed before or after it was sent
        standin.come_back()
        await until(lambda: standin.overview()["is_there"])
        assert drachtio.away is None
        assert (await to(drachtio, registrar).exchange(a_request())).response.status == 401
        return (await drachtio.hello()).version

    assert within(standin.port, work) == "v0.9.10"


def test_it_says_where_it_sends_from(standin: Standin) -> None:
    async def work(drachtio: Drachtio) -> tuple[str, ...]:
        return (await drachtio.hello()).hostports

    where = f"127.0.0.1:{standin.sip_port}"
    assert within(standin.port, work) == (f"udp/{where}", f"tcp/{where}")


@pytest.mark.parametrize(
    ("transport", "habits", "trouble", "text"),
    [
        ("tls", {}, Trouble.OURS, "requested protocol/transport not available"),
        (
            "udp",
            {"nok": f"no way to sip:{USER}@pombal.test or {USER}"},
            Trouble.TEMPORARY,
            "no way to …pombal.test or …",
        ),
        ("udp", {"nok": "for +55.11.98888-7777 or %35511988887777"}, Trouble.TEMPORARY, "for +… or …"),
        ("udp", {"nok": "x" * 400}, Trouble.TEMPORARY, "x" * 120),
        ("udp", {"nok": "Error creating leg"}, Trouble.TEMPORARY, "Error creating leg"),
        ("udp", {"nok": "can not send request to myself"}, Trouble.PERMANENT, "can not send request to myself"),
    ],
)
def test_a_refusal_says_why_and_names_nobody(
    standin: Standin, registrar: SipThread, transport: str, habits: dict[str, Any], trouble: Trouble, text: str
) -> None:
    standin.set_habits(**habits)

    async def work(drachtio: Drachtio) -> NotSent:
        flight = drachtio.flight("pombal.test", registrar.port, Transport(transport), "localhost", lambda: None)
        failed = await failure(flight.exchange(a_request()))
        assert drachtio.away is None  # so it is this account's alone
        return failed

    failed = within(standin.port, work)

    assert (failed.trouble, failed.text) == (trouble, f"drachtio refused the request: {text}")


def test_a_registrar_that_is_drachtio_itself_is_no_trouble_of_ours(standin: Standin) -> None:
    async def work(drachtio: Drachtio) -> NotSent:
        flight = drachtio.flight("127.0.0.1", standin.sip_port, Transport.UDP, None, lambda: None)
        return await failure(flight.exchange(a_request()))

    assert within(standin.port, work).trouble is Trouble.PERMANENT


def test_drachtios_own_408_and_503_are_answers(registrar: SipThread) -> None:
    registrar.habit(USER, silent="all")

    async def work(drachtio: Drachtio) -> list[Reply]:
        silent = await to(drachtio, registrar).exchange(a_request())
        nobody = drachtio.flight("127.0.0.1", 1, Transport.TCP, None, lambda: None)
        return [silent, await nobody.exchange(a_request(2))]

    with a_drachtio(timeout=0.3) as standin:
        replies = within(standin.port, work, allowed=LOOPBACK)

    assert [(reply.response.status, reply.server) for reply in replies] == [(408, "drachtio"), (503, "drachtio")]


def test_silence_is_told_apart(standin: Standin, registrar: SipThread) -> None:
    registrar.habit(USER, silent="all")

    async def work(drachtio: Drachtio) -> list[NotSent]:
        registrars = await failure(to(drachtio, registrar).exchange(a_request()))
        standin.set_habits(silent=True)
        return [registrars, await failure(to(drachtio, registrar).exchange(a_request(2)))]

    registrars, drachtios = within(standin.port, work, wait=0.2)

    assert (registrars.trouble, drachtios.trouble) == (Trouble.TEMPORARY, Trouble.OURS)
    assert registrars.text.startswith("no answer within")
    assert drachtios.text == f"drachtio at 127.0.0.1:{standin.port} does not answer"


def test_what_is_no_frame_ends_the_connection(standin: Standin, registrar: SipThread) -> None:
    standin.set_habits(garbage=True, times=1)

    async def work(drachtio: Drachtio) -> tuple[NotSent, Reply]:
        lost = await failure(to(drachtio, registrar).exchange(a_request()))
        return lost, await to(drachtio, registrar).exchange(a_request(2))

    lost, reply = within(standin.port, work)

    assert lost.trouble is Trouble.TEMPORARY
    assert reply.response.status == 401
    assert standin.logins == 2


def test_nothing_is_sent_once_the_fence_says_no(standin: Standin, registrar: SipThread) -> None:
    class NotOurs(Exception):
        """The claim ran out."""

    asked: list[int] = []

    def fence() -> None:
        asked.append(len(asked))
        if len(asked) == 2:
            raise NotOurs

    async def work(drachtio: Drachtio) -> None:
        with pytest.raises(NotOurs):
            await attempt(to(drachtio, registrar, fence), an_account())

    within(standin.port, work)

    assert [one["authorized"] for one in standin.requests()] == [False]
    assert registrar.state(USER)["bindings"] == []


def test_somebody_is_always_there_or_the_connection_is_given_up(standin: Standin, registrar: SipThread) -> None:
    registrar.habit(USER, silent="all")

    async def work(drachtio: Drachtio) -> NotSent:
        await drachtio.hello()
        await until(lambda: standin.pings >= 3)
        assert standin.logins == 1
        waiting = asyncio.create_task(failure(to(drachtio, registrar).exchange(a_request())))
        await until(lambda: standin.requests())
        standin.set_habits(deaf=True)
        return await waiting

    with a_drachtio(timeout=PATIENT) as standin:
        lost = within(standin.port, work, ping_every=0.05)

    assert lost.text == "connection to drachtio lost; outcome unknown"


def test_private_registrars_are_for_those_who_may(standin: Standin, registrar: SipThread) -> None:
    async def work(drachtio: Drachtio) -> NotSent:
        flight = drachtio.flight("127.0.0.1", registrar.port, Transport.UDP, None, lambda: None)
        return await failure(flight.exchange(a_request()))

    failed = within(standin.port, work, allowed=[])

    assert (failed.trouble, standin.requests()) == (Trouble.PERMANENT, [])
    assert "SIP_ALLOWED_NETWORKS" in failed.text


def test_credentials_never_follow_a_name_to_a_private_address(standin: Standin, registrar: SipThread) -> None:
    async def work(drachtio: Drachtio) -> NotSent:
        return await failure(attempt(to(drachtio, registrar), an_account()))

    assert within(standin.port, work, allowed=[]).trouble is Trouble.PERMANENT
    assert [one["authorized"] for one in standin.requests()] == [False]

    async def allowed(drachtio: Drachtio) -> Outcome:
        return await attempt(to(drachtio, registrar), an_account(), cseq=10)

    assert within(standin.port, allowed, allowed=LOOPBACK).kind is Kind.REGISTERED


@pytest.mark.parametrize(
    "host", ["pombal.test|x", "pombal.test\r\nX: y", "sip:pombal.test", "a b", "u@pombal.test", ""]
)
def test_no_host_can_say_anything_else_to_drachtio(standin: Standin, host: str) -> None:
    async def work(drachtio: Drachtio) -> NotSent:
        return await failure(drachtio.flight(host, 5060, Transport.UDP, None, lambda: None).exchange(a_request()))

    assert within(standin.port, work).trouble is Trouble.PERMANENT
    assert standin.logins == 0


def test_what_would_be_done_is_told_without_doing_it(standin: Standin) -> None:
    drachtio = Drachtio("127.0.0.1", standin.port, SECRET)

    lines = drachtio.explain("pombal.test", None, Transport.TLS, None)

    assert "sip:pombal.test;transport=tls" in lines[0]
    assert SECRET not in repr(drachtio) + "".join(lines)
    assert Drachtio("h", 1, "").explain("pombal.test", None, Transport.UDP, None) == [
        "Nothing would be sent: DRACHTIO_SECRET is not set."
    ]
    assert Drachtio("h", 1, SECRET, allowed=[]).explain("10.0.0.1", None, Transport.UDP, None)[0].startswith("Nothing")
    assert standin.overview()["connections"] == 0


# A control port of our own


@asynccontextmanager
async def a_port(say: Callable[[str, list[str]], list[tuple[str, str]]]) -> AsyncIterator[tuple[int, list[str]]]:
    """Lets everybody in. `say` makes of a `sip` message's id and its lines the frames that come back: what follows the
    frame's own id, and SIP. The proxy URIs are gathered."""
    proxies: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = Frames()
        with closing(writer):
            while data := await reader.read(65536):
                for body in frames.feed(data):
                    head, _, sip = body.decode().partition("\r\n")
                    id, verb, *words = head.split("|")
                    if verb == "authenticate":
                        writer.write(framed(f"u|response|{id}|OK|udp/[::1]:5060|v0.8.1".encode()))
                    elif verb == "sip":
                        proxies.append(words[2])
                        for line, text in say(id, sip.split("\r\n")):
                            writer.write(framed(f"u|{line}\r\n{text}".encode()))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], proxies


def a_response(status: int, lines: list[str], *extra: str, **instead: str) -> str:
    """An answer to a request, with some headers instead of its own."""
    names = {"From": "", "To": "", "Call-ID": "", "CSeq": ""}
    for line in lines:
        name, _, value = line.partition(": ")
        if name in names:
            names[name] = value
    names |= {name.replace("_", "-"): value for name, value in instead.items()}
    return "\r\n".join([f"SIP/2.0 {status} X", *(f"{name}: {value}" for name, value in names.items()), *extra, "", ""])


def network(transaction: str, origin: str = "udp|192.0.2.1|5060") -> str:
    return f"sip|network|9|{origin}|12:00:00.1|{transaction}||"


def accepted(id: str, transaction: str) -> str:
    return f"response|{id}|OK|application|9|udp|192.0.2.1|5060|12:00:00.1|{transaction}|Msg sent:|"


async def against(
    say: Callable[[str, list[str]], list[tuple[str, str]]],
    work: Callable[[Flight], Awaitable[T]],
    transport: Transport = Transport.UDP,
    **options: Any,
) -> tuple[T, list[str]]:
    async with a_port(say) as (port, proxies):
        drachtio = Drachtio("127.0.0.1", port, SECRET, **options)
        try:
            async with asyncio.timeout(PATIENT):
                flight = drachtio.flight("pombal.test", None, transport, None, lambda: None)
                return await work(flight), proxies
        finally:
            await drachtio.close()


def test_a_challenge_from_ipv6_is_answered_there() -> None:
    def say(id: str, lines: list[str]) -> list[tuple[str, str]]:
        return [(accepted(id, id), ""), (network(id, "tcp|2001:db8::7|5080"), a_response(401, lines))]

    async def work(flight: Flight) -> list[str]:
        return [(await flight.exchange(a_request(i))).server for i in (1, 2)]

    servers, proxies = asyncio.run(against(say, work))

    assert servers == ["tcp/[2001:db8::7]:5080"] * 2
    assert proxies == ["sip:pombal.test;transport=udp", "sip:[2001:db8::7]:5080;transport=tcp"]


def test_only_the_final_response_to_this_very_request_counts() -> None:
    def say(id: str, lines: list[str]) -> list[tuple[str, str]]:
        return [
            (network("early"), a_response(200, lines)),  # before its transaction is known, and of another
            (accepted(id, "ours"), ""),
            (network("ours"), a_response(100, lines)),
            (network("other"), a_response(200, lines)),
            (network("ours"), a_response(200, lines, CSeq="2 REGISTER")),
            (network("ours"), a_response(200, lines, CSeq="1 INVITE")),
            (network("ours"), a_response(200, lines, Call_ID="another")),
            (network("ours"), "INVITE sip:us SIP/2.0\r\n\r\n"),
            ("sip|network", a_response(200, lines)),
            ("cdr:attempt|network", ""),
            (network("ours"), a_response(403, lines)),
        ]

    async def work(flight: Flight) -> Reply:
        return await flight.exchange(a_request())

    foreign, malformed = dropped("foreign"), dropped("malformed")
    reply, _ = asyncio.run(against(say, work))

    assert (reply.response.status, reply.server) == (403, "udp/192.0.2.1:5060")
    assert (dropped("foreign") - foreign, dropped("malformed") - malformed) == (5, 2)


@pytest.mark.parametrize("status", [401, 407])
@pytest.mark.parametrize(
    "origin",
    [
        "udp||0",
        "|2001:db8::x|5060",
        "udp|fe80::1%eth0|5060",
        "udp|registrar.internal|5060",
        "udp|192.0.2.1|0",
        "udp|192.0.2.1|99999",
        f"udp|192.0.2.1|{'9' * 5_000}",
        "udp|192.0.2.1|٥٠٦٠",
        "ws|192.0.2.1|80",
    ],
)
def test_nobody_knows_who_would_get_credentials_for_a_challenge_from_nowhere(origin: str, status: int) -> None:
    def say(id: str, lines: list[str]) -> list[tuple[str, str]]:
        return [(accepted(id, id), ""), (network(id, origin), a_response(status, lines))]

    async def work(flight: Flight) -> NotSent:
        return await failure(flight.exchange(a_request()))

    failed, proxies = asyncio.run(against(say, work))

    assert failed.trouble is Trouble.TEMPORARY
    assert failed.text == "drachtio did not say where the challenge came from"
    assert len(proxies) == 1


@pytest.mark.parametrize("status", [200, 401, 403, 503])
def test_no_answer_counts_that_came_from_where_nobody_may_be_registered(status: int) -> None:
    def say(id: str, lines: list[str]) -> list[tuple[str, str]]:
        return [(accepted(id, id), ""), (network(id, "udp|10.0.0.5|5060"), a_response(status, lines))]

    async def work(flight: Flight) -> NotSent:
        return await failure(flight.exchange(a_request()))

    failed, _ = asyncio.run(against(say, work, allowed=[]))

    assert failed.trouble is Trouble.PERMANENT
    assert "SIP_ALLOWED_NETWORKS" in failed.text


@pytest.mark.parametrize(("wanted", "came"), [("tls", "tcp"), ("tls", "udp"), ("tcp", "udp")])
@pytest.mark.parametrize("status", [200, 401])
def test_the_transport_of_an_account_is_never_lowered(wanted: str, came: str, status: int) -> None:
    def say(id: str, lines: list[str]) -> list[tuple[str, str]]:
        return [(accepted(id, id), ""), (network(id, f"{came}|192.0.2.1|5060"), a_response(status, lines))]

    async def work(flight: Flight) -> NotSent:
        return await failure(flight.exchange(a_request()))

    failed, proxies = asyncio.run(against(say, work, Transport(wanted)))

    assert failed.trouble is Trouble.PERMANENT
    assert failed.text == f"the answer came by {came.upper()}, but the account's transport is {wanted.upper()}"
    assert proxies == [f"sip:pombal.test;transport={wanted}"]


@pytest.mark.parametrize(("frames", "is_let_in"), [(100, True), (101, False)])
def test_who_talks_before_letting_us_in_is_not_listened_to_for_ever(frames: int, is_let_in: bool) -> None:
    async def run() -> NotSent | str:
        was_left = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with closing(writer):
                id = (await reader.read(65536)).partition(b"#")[2].partition(b"|")[0].decode()
                writer.write(framed(b"u|cdr:attempt|network\r\n") * frames)
                writer.write(framed(f"u|response|{id}|OK|udp/127.0.0.1:5060|v0.9.10".encode()))
                with suppress(OSError):
                    while await reader.read(65536):
                        pass
                was_left.set()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server, asyncio.timeout(PATIENT):
            drachtio = Drachtio("127.0.0.1", server.sockets[0].getsockname()[1], SECRET)
            try:
                return (await drachtio.hello()).version
            except NotSent as failed:
                await was_left.wait()  # before it is closed: the connection did not outlive the failure
                return failed
            finally:
                await drachtio.close()
                await was_left.wait()

    came = asyncio.run(run())

    if is_let_in:
        assert came == "v0.9.10"
    else:
        assert isinstance(came, NotSent)
        assert came.trouble is Trouble.OURS
        assert "it did not let us in" in came.text


# Frames


def test_frames_are_found_wherever_the_stream_is_cut() -> None:
    bodies = [b"a|response|b|OK", "ção\r\nSIP".encode(), b"12#34", b"x" * 99_999]
    stream = b"".join(framed(body) for body in bodies)

    for size in (1, 2, 3, 5, 8, 4096, len(stream)):
        frames = Frames()
        found = [body for at in range(0, len(stream), size) for body in frames.feed(stream[at : at + size])]

        assert found == bodies


@pytest.mark.parametrize("garbage", [b"#x", b"100000#", b"123456", b"12a#", b"-1#", b" 1#x", b"SIP/2.0", "٣#".encode()])
def test_a_length_has_at_most_five_digits(garbage: bytes) -> None:
    with pytest.raises(BadFrame):
        Frames().feed(garbage)


def test_no_frame_is_longer_than_five_digits_say() -> None:
    with pytest.raises(BadFrame):
        framed(b"x" * 100_000)
