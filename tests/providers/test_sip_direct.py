"""The direct sender against registrars of these tests, over real sockets. T1 is compressed; nothing depends on how long
anything takes, only on what is sent and in which order."""

import asyncio
import os
import re
import resource
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pombal import metrics
from providers import sip_direct
from providers.sip import Account, Attempt, Kind, Outcome, Transport
from providers.sip_direct import DirectFlight
from providers.sip_flight import NotSent, Reply, Trouble
from providers.sip_message import Request
from tests.providers.sip_names import a_nameserver
from tests.sandbox.sip_servers import a_registrar

LOOPBACK = [ip_network("127.0.0.0/8")]
T1 = 0.02
PATIENT = 20.0  # seconds: never waited for
SIDE_BY_SIDE = (
    ("From", "<sip:u@pombal.test>;tag=f"),
    ("To", "<sip:u@pombal.test>"),
    ("Contact", "<sip:token@localhost;transport=udp>"),
    ("Expires", "300"),
)
FIRST = Request("sip:pombal.test", "call-1", 41, SIDE_BY_SIDE)
SECOND = Request("sip:pombal.test", "call-1", 42, (*SIDE_BY_SIDE, ("Authorization", "Digest …")))

# A server's behaviour: what has come so far, this one included → what it answers now.
Behaviour = Callable[[list["Heard"]], Iterable[bytes]]
T = TypeVar("T")


class Heard(NamedTuple):
    text: str
    source: tuple[str, int]

    def header(self, name: str) -> str:
        found = re.search(rf"^{name}: (.*)\r$", self.text, re.MULTILINE)
        assert found
        return found[1]

    @property
    def branch(self) -> str:
        return self.header("Via").partition("branch=")[2].partition(";")[0]


def answer(heard: Heard, status: int = 200, *extra: str, old: str = "", new: str = "", body: bytes = b"") -> bytes:
    """A response to what was heard, with `old` text replaced."""
    lines = [
        f"SIP/2.0 {status} So",
        *(f"{name}: {heard.header(name)}" for name in ("Via", "From", "To", "Call-ID", "CSeq")),
    ]
    lines += [*extra, f"Content-Length: {len(body)}", "", ""]
    text = "\r\n".join(lines)
    assert old in text
    return text.replace(old, new).encode() + body if old else text.encode() + body


def says(*statuses: int) -> Behaviour:
    """The first status for the first request and so on; 0 is silence, the last one goes on for ever."""

    def behave(so_far: list[Heard]) -> Iterable[bytes]:
        status = statuses[min(len(so_far), len(statuses)) - 1]
        return [answer(so_far[-1], status)] if status else []

    return behave


class Datagrams(asyncio.DatagramProtocol):
    """A registrar by UDP."""

    def __init__(self, behave: Behaviour) -> None:
        self._behave = behave
        self.heard: list[Heard] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)
        self.port: int = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.heard.append(Heard(data.decode(), addr))
        for reply in self._behave(self.heard):
            self._transport.sendto(reply, addr)

    def say(self, text: bytes, to: tuple[str, int]) -> None:
        self._transport.sendto(text, to)

    def leave(self) -> None:
        """The port is closed in the loop's next round."""
        self._transport.abort()


@asynccontextmanager
async def by_udp(behave: Behaviour) -> AsyncIterator[Datagrams]:
    transport, server = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: Datagrams(behave), local_addr=("127.0.0.1", 0)
    )
    try:
        yield server
    finally:
        transport.abort()
        await asyncio.sleep(0)


class Stream:
    """A registrar by TCP or TLS. What it answers goes out piece by piece, each piece in a segment of its own; an empty
    piece closes the connection."""

    def __init__(self, behave: Behaviour) -> None:
        self._behave = behave
        self.heard: list[Heard] = []
        self.port = 0
        self.was_left = asyncio.Event()
        self.connections: dict[asyncio.Task[None] | None, asyncio.StreamWriter] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections[asyncio.current_task()] = writer
        with suppress(asyncio.IncompleteReadError, OSError):
            await self._talk(reader, writer)
        self.was_left.set()
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            data = await reader.readuntil(b"\r\n\r\n")
            self.heard.append(Heard(data.decode(), writer.get_extra_info("peername")))
            for piece in self._behave(self.heard):
                if not piece:
                    return
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)


@asynccontextmanager
async def by_tcp(behave: Behaviour, context: ssl.SSLContext | None = None) -> AsyncIterator[Stream]:
    made = Stream(behave)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=context)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        for writer in made.connections.values():
            writer.transport.abort()
        await asyncio.gather(*(task for task in made.connections if task))
        await server.wait_closed()


def flight(port: int | None, *, host: str = "127.0.0.1", patient: bool = False, **given: object) -> DirectFlight:
    """`patient`: the budget is far longer than anything takes, for tests in which an answer comes."""
    known: dict[str, object] = {"transport": Transport.UDP, "fence": lambda: None, "allowed": LOOPBACK, "t1": T1}
    known["budget"] = PATIENT if patient else 64 * T1
    return DirectFlight(host=host, port=port, **(known | given))  # type: ignore[arg-type]


def run(test: Callable[[], Awaitable[T]]) -> T:
    """The result of an async test, which leaves no task behind."""

    async def whole() -> T:
        result = await test()
        if others := asyncio.all_tasks() - {asyncio.current_task()}:  # a server may still be in a handshake
            _, left = await asyncio.wait(others, timeout=PATIENT)
            assert not left
        return result

    return asyncio.run(whole())


def dropped(why: str) -> float:
    return cast(float, metrics.sip_dropped.labels(why)._value.get())


# -- UDP -------------------------------------------------------------------------------------------------------------


def test_an_unanswered_request_is_eleven_equal_datagrams() -> None:
    async def test() -> None:
        async with by_udp(says(0)) as server, flight(server.port) as one:
            with pytest.raises(NotSent) as failure:
                await one.exchange(FIRST)

        assert failure.value.trouble is Trouble.TEMPORARY
        assert re.fullmatch(rf"no answer within 1\.\d s from 127\.0\.0\.1:{server.port}", failure.value.text)
        assert len(server.heard) == 11
        assert len({heard.text for heard in server.heard}) == 1

    run(test)


def test_after_a_provisional_answer_it_is_repeated_at_the_longest_interval_only() -> None:
    async def test() -> None:
        async with by_udp(says(100)) as server, flight(server.port) as one:
            with pytest.raises(NotSent):
                await one.exchange(FIRST)

        assert len(server.heard) <= 1 + 64 // 8

    run(test)


def test_a_request_names_where_it_comes_from() -> None:
    async def test() -> Heard:
        async with by_udp(says(200)) as server, flight(server.port, patient=True) as one:
            reply = await one.exchange(FIRST)
            assert reply.server == f"udp/127.0.0.1:{server.port}"
            assert (reply.response.status, reply.local) == (200, "127.0.0.1")
            return server.heard[0]

    heard = run(test)

    own = "{}:{}".format(*heard.source)
    assert heard.text.startswith("REGISTER sip:pombal.test SIP/2.0\r\n")
    assert re.fullmatch(rf"SIP/2\.0/UDP {own};branch=z9hG4bK[0-9a-f]{{24}};rport", heard.header("Via"))
    # The port is another one each time: with it a registrar would keep a binding for each.
    assert heard.header("Contact") == "<sip:token@127.0.0.1;transport=udp>"


def test_calls_come_to_the_contact_host_where_one_is_given() -> None:
    async def test() -> Heard:
        async with by_udp(says(200)) as server, flight(server.port, patient=True, contact_host="sbc.test:5080") as one:
            await one.exchange(FIRST)
            return server.heard[0]

    assert run(test).header("Contact") == "<sip:token@sbc.test:5080;transport=udp>"


def test_requests_of_one_attempt_differ_in_branch_and_share_a_socket() -> None:
    async def test() -> list[Heard]:
        async with by_udp(says(401, 200)) as server, flight(server.port, patient=True) as one:
            assert (await one.exchange(FIRST)).response.status == 401
            assert (await one.exchange(SECOND)).response.status == 200
            return server.heard

    first, second = run(test)
    assert first.branch != second.branch
    assert first.source == second.source
    assert second.header("CSeq") == "42 REGISTER"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("branch=z9hG4bK", "branch=z9hG4bKx"),
        ("CSeq: 41 ", "CSeq: 40 "),
        (" REGISTER", " OPTIONS"),
        ("Call-ID: call-1", "Call-ID: call-2"),
    ],
)
def test_a_reply_that_is_not_to_our_request_is_dropped_and_counted(old: str, new: str) -> None:
    async def test() -> None:
        before = dropped("foreign")
        behave = lambda so_far: [answer(so_far[-1], 200, old=old, new=new), answer(so_far[-1], 403)]  # noqa: E731

        async with by_udp(behave) as server, flight(server.port, patient=True) as one:
            reply = await one.exchange(FIRST)

        assert reply.response.status == 403
        assert dropped("foreign") == before + 1

    run(test)


def test_more_than_anybody_answers_is_not_even_read() -> None:
    def behave(so_far: list[Heard]) -> list[bytes]:
        return [answer(so_far[-1], 200, "X: " + "x" * 8_192), answer(so_far[-1], 403)]

    async def test() -> None:
        before = dropped("malformed")
        async with by_udp(behave) as server, flight(server.port, patient=True) as one:
            assert (await one.exchange(FIRST)).response.status == 403
        assert dropped("malformed") == before + 1

    run(test)


@pytest.mark.parametrize("noise", ["foreign", "malformed"])
def test_a_server_that_floods_us_ends_with_its_time_and_holds_up_nobody_else(noise: str) -> None:
    async def test() -> None:
        before, is_flooded = dropped(noise), asyncio.Event()
        async with by_udp(lambda so_far: []) as server, by_udp(says(200)) as other:

            async def flood() -> None:
                while True:
                    for heard in server.heard[:1]:
                        alien = b"x" if noise == "malformed" else answer(heard, old="CSeq: 41", new="CSeq: 7")
                        for _ in range(50):
                            server.say(alien, heard.source)
                    if dropped(noise) >= before + 220:
                        is_flooded.set()
                    await asyncio.sleep(0)

            flooding = asyncio.create_task(flood())
            async with flight(server.port, budget=2.0, t1=0.5) as flooded, asyncio.timeout(PATIENT):
                waiting = asyncio.create_task(flooded.exchange(FIRST))
                await is_flooded.wait()
                async with flight(other.port, patient=True) as one:
                    assert (await one.exchange(FIRST)).response.status == 200
                with pytest.raises(NotSent, match="no answer within 2 s"):
                    await waiting
            flooding.cancel()
            await asyncio.wait({flooding})
        if noise == "malformed":  # these are counted as they are read: 200, and then 100 a second
            assert dropped(noise) - before <= 401

    run(test)


def test_what_is_no_response_is_dropped_and_counted() -> None:
    garbage = [
        b"\xff" * 60_000,
        b"SIP/2.0 200\r\n",
        b"OPTIONS sip:u SIP/2.0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"\r\n\r\n",
    ]

    async def test() -> None:
        before = dropped("malformed")

        async with (
            by_udp(lambda so_far: [*garbage, answer(so_far[-1], 200)]) as server,
            flight(server.port, patient=True) as one,
        ):
            assert (await one.exchange(FIRST)).response.status == 200

        assert dropped("malformed") == before + 4

    run(test)


@pytest.mark.parametrize("transport", [Transport.UDP, Transport.TCP])
def test_a_process_without_a_file_to_spare_does_not_blame_the_account(transport: Transport) -> None:
    async def test() -> None:
        async with flight(9, transport=transport) as one:
            with no_more_files(), pytest.raises(NotSent) as failure:
                await one.exchange(FIRST)

        assert failure.value.trouble is Trouble.OURS
        assert failure.value.text == "cannot reach 127.0.0.1:9 (Too many open files)"

    run(test)


@contextmanager
def no_more_files() -> Iterator[None]:
    """As many as are open may be; the lowest number that is free is what the next one would get."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as lowest:
        number = lowest.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_closed_port_is_known_at_once() -> None:
    async def test() -> None:
        async with by_udp(says(0)) as server:
            port = server.port
        async with flight(port, patient=True, t1=PATIENT) as one:
            with pytest.raises(NotSent) as failure:
                await one.exchange(FIRST)

        assert (failure.value.trouble, failure.value.text) == (Trouble.TEMPORARY, f"refused by 127.0.0.1:{port}")

    run(test)


LONG = Request("sip:pombal.test", "call-1", 42, (*SIDE_BY_SIDE, ("Authorization", "Digest " + "x" * 1_200)))


@asynccontextmanager
async def by_both(udp: Behaviour, tcp: Behaviour) -> AsyncIterator[tuple[Datagrams, Stream]]:
    """A registrar with one port for both."""
    async with by_udp(udp) as datagrams:
        made = Stream(tcp)
        server = await asyncio.start_server(made.serve, "127.0.0.1", datagrams.port)
        try:
            yield datagrams, made
        finally:
            server.close()
            await asyncio.gather(*(task for task in made.connections if task))
            await server.wait_closed()


def test_what_is_too_long_for_a_datagram_goes_by_tcp_to_the_same_address_and_stays_there() -> None:
    async def test() -> None:
        async with by_both(says(401), says(200)) as (datagrams, stream):
            async with flight(datagrams.port, patient=True) as one:
                assert (await one.exchange(FIRST)).server == f"udp/127.0.0.1:{datagrams.port}"
                assert (await one.exchange(LONG)).server == f"tcp/127.0.0.1:{datagrams.port}"
                assert (await one.exchange(SECOND)).server == f"tcp/127.0.0.1:{datagrams.port}"
            assert len(datagrams.heard) == 1
            assert [heard.header("Via").split()[0] for heard in stream.heard] == ["SIP/2.0/TCP"] * 2

    run(test)


def test_where_nobody_listens_by_tcp_a_long_request_is_a_datagram_after_all() -> None:
    async def test() -> None:
        async with by_udp(says(200)) as server, flight(server.port, patient=True) as one:
            assert (await one.exchange(LONG)).server == f"udp/127.0.0.1:{server.port}"
            assert len(server.heard) == 1

    run(test)


# -- several servers -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def servers(*behaviours: Behaviour | None) -> AsyncIterator[tuple[list[Datagrams], str]]:
    """Registrars that SRV records name in this order, None for a closed port, and the nameserver that says so."""
    made = []
    kept = []
    for behave in behaviours:
        one = by_udp(behave or says(0))
        made.append(await one.__aenter__())
        if behave is None:
            await one.__aexit__(None, None, None)
        else:
            kept.append(one)
    records = [f"{number} 0 {server.port} a.pombal.test." for number, server in enumerate(made)]
    zone = {("_sip._udp.pombal.test", "SRV"): records, ("a.pombal.test", "A"): ["127.0.0.1"]}
    try:
        async with a_nameserver(zone) as names:
            yield made, names.address
    finally:
        for one in kept:
            await one.__aexit__(None, None, None)


def test_the_next_server_is_asked_when_one_refuses_is_silent_or_busy() -> None:
    async def test() -> None:
        async with (
            servers(None, says(0), says(503), says(200)) as (made, names),
            flight(None, host="pombal.test", nameserver=names, t1=0.1, budget=6.4) as one,
        ):
            reply = await one.exchange(FIRST)

        assert reply.server == f"udp/127.0.0.1:{made[3].port}"
        assert len(made[1].heard) == 5  # at 0, 1, 3, 7 and 15 times T1: a quarter of the time
        assert len(made[2].heard) == 1
        branches = {server.heard[0].branch for server in made[1:]}
        assert len(branches) == 3

    run(test)


def test_a_server_that_has_challenged_us_is_not_left_for_another() -> None:
    async def test() -> None:
        async with (
            servers(says(401), says(200)) as (made, names),
            flight(None, host="pombal.test", nameserver=names, patient=True) as one,
        ):
            await one.exchange(FIRST)
            made[0].leave()
            await asyncio.sleep(0)
            with pytest.raises(NotSent, match=f"refused by pombal.test:{made[0].port}"):
                await one.exchange(SECOND)

        assert made[1].heard == []

    run(test)


def test_when_all_are_busy_the_last_says_so() -> None:
    def busy(so_far: list[Heard]) -> list[bytes]:
        return [answer(so_far[-1], 503, "Retry-After: 120")]

    async def test() -> Reply:
        async with (
            servers(None, busy, busy) as (_, names),
            flight(None, host="pombal.test", nameserver=names, patient=True) as one,
        ):
            return await one.exchange(FIRST)

    reply = run(test)
    assert (reply.response.status, reply.response.first("retry-after")) == (503, "120")


def test_when_none_has_an_answer_each_is_named() -> None:
    async def test() -> None:
        async with (
            servers(None, says(0)) as (made, names),
            flight(None, host="pombal.test", nameserver=names) as one,
        ):
            with pytest.raises(NotSent) as failure:
                await one.exchange(FIRST)

        first, second = (f"127.0.0.1:{server.port}" for server in made)
        told = rf"pombal\.test: refused by {first}; no answer within 1\.?\d? s from {second}"
        assert re.fullmatch(told, failure.value.text)

    run(test)


# -- the fence, the address policy, the end --------------------------------------------------------------------------


class NotOurs(Exception):
    pass


@contextmanager
def a_fence(lets: int) -> Iterator[Callable[[], None]]:
    """Lets so many things through."""
    passed = 0

    def fence() -> None:
        nonlocal passed
        passed += 1
        if passed > lets:
            raise NotOurs

    yield fence


@pytest.mark.parametrize("transport", [Transport.UDP, Transport.TCP])
def test_nothing_is_sent_once_the_fence_is_down(transport: Transport) -> None:
    async def test() -> None:
        with a_fence(lets=2) as fence:  # a socket, and what is sent first
            server_of = by_udp(says(401)) if transport is Transport.UDP else by_tcp(says(401))
            async with server_of as server:
                async with flight(server.port, transport=transport, fence=fence, patient=True, t1=PATIENT) as one:
                    assert (await one.exchange(FIRST)).response.status == 401
                    with pytest.raises(NotOurs):
                        await one.exchange(SECOND)

                assert len(server.heard) == 1

    run(test)


def test_a_fence_that_goes_down_while_a_server_is_silent_ends_the_attempt() -> None:
    async def test() -> None:
        with a_fence(lets=4) as fence:
            async with (
                servers(says(0), says(200)) as (made, names),
                flight(None, host="pombal.test", nameserver=names, fence=fence, patient=True) as one,
            ):
                with pytest.raises(NotOurs):
                    await one.exchange(FIRST)

            assert [len(server.heard) for server in made] == [3, 0]

    run(test)


def test_a_private_address_is_not_sent_to() -> None:
    async def test() -> None:
        async with by_udp(says(200)) as server:
            async with flight(server.port, allowed=[]) as one:
                with pytest.raises(NotSent, match="SIP_ALLOWED_NETWORKS") as failure:
                    await one.exchange(FIRST)

            assert failure.value.trouble is Trouble.PERMANENT
            assert server.heard == []

    run(test)


@pytest.mark.parametrize("transport", [Transport.UDP, Transport.TCP])
def test_a_flight_that_is_cancelled_leaves_nothing_behind(transport: Transport) -> None:
    async def test() -> None:
        has_come = asyncio.Event()

        def behave(so_far: list[Heard]) -> list[bytes]:
            has_come.set()
            return []

        async with by_udp(behave) if transport is Transport.UDP else by_tcp(behave) as server:

            async def attempt() -> None:
                async with flight(server.port, transport=transport, patient=True) as one:
                    await one.exchange(FIRST)

            task = asyncio.create_task(attempt())
            await has_come.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            if isinstance(server, Stream):
                async with asyncio.timeout(PATIENT):
                    await server.was_left.wait()

    run(test)


# -- TCP -------------------------------------------------------------------------------------------------------------


def test_a_stream_may_be_cut_anywhere_and_hold_keep_alives() -> None:
    def behave(so_far: list[Heard]) -> Iterator[bytes]:
        whole = (
            b"\r\n\r\n" + answer(so_far[-1], 100) + b"\r\n" + answer(so_far[-1], 401, body=b"a body\r\n\r\n") + b"\r\n"
        )
        yield from (whole[at : at + 1] for at in range(len(whole)))

    async def test() -> list[Heard]:
        async with by_tcp(behave) as server:
            async with flight(server.port, transport=Transport.TCP, patient=True) as one:
                reply = await one.exchange(FIRST)
                assert (reply.response.status, reply.server) == (401, f"tcp/127.0.0.1:{server.port}")
                assert (await one.exchange(SECOND)).response.status == 401
            return server.heard

    first, second = run(test)
    assert first.header("Via").startswith("SIP/2.0/TCP ")
    assert first.source == second.source


def test_glued_answers_are_told_apart() -> None:
    def behave(so_far: list[Heard]) -> list[bytes]:
        return [
            b"".join((answer(so_far[-1], 200, old="CSeq: 41", new="CSeq: 4"), b"\r\n\r\n", answer(so_far[-1], 404)))
        ]

    async def test() -> Reply:
        async with by_tcp(behave) as server, flight(server.port, transport=Transport.TCP, patient=True) as one:
            return await one.exchange(FIRST)

    assert run(test).response.status == 404


def test_a_request_by_tcp_is_sent_once() -> None:
    async def test() -> None:
        async with by_tcp(says(0)) as server:
            async with flight(server.port, transport=Transport.TCP, budget=0.5) as one:
                with pytest.raises(NotSent, match=r"no answer within 0\.\d s from 127\.0\.0\.1"):
                    await one.exchange(FIRST)

            assert len(server.heard) == 1

    run(test)


def test_a_request_by_tcp_is_sent_once_whatever_the_server_says_meanwhile() -> None:
    async def test() -> None:
        async with by_tcp(says(100)) as server:
            async with flight(server.port, transport=Transport.TCP) as one:  # 64 T1: several of the longest intervals
                with pytest.raises(NotSent, match="no answer within"):
                    await one.exchange(FIRST)

            assert len(server.heard) == 1

    run(test)


def test_a_connection_closed_behind_the_challenge_is_made_again_to_the_same_server() -> None:
    def behave(so_far: list[Heard]) -> list[bytes]:
        return [answer(so_far[-1], 401), b""] if len(so_far) == 1 else [answer(so_far[-1], 200)]

    async def test() -> list[Heard]:
        async with by_tcp(behave) as server:
            async with flight(server.port, transport=Transport.TCP, patient=True) as one:
                assert (await one.exchange(FIRST)).response.status == 401
                assert (await one.exchange(SECOND)).response.status == 200
            return server.heard

    heard = run(test)
    assert heard[0].source != heard[-1].source


@pytest.mark.parametrize(
    ("piece", "text"),
    [(b"", "{} closed the connection"), (b"SIP/2.0 200 OK\r\nContent-Length: x\r\n\r\n", "what {} sends is not SIP")],
)
def test_a_connection_that_is_of_no_use_is_given_up(piece: bytes, text: str) -> None:
    async def test() -> None:
        async with (
            by_tcp(lambda so_far: [piece]) as server,
            flight(server.port, transport=Transport.TCP, patient=True) as one,
        ):
            with pytest.raises(NotSent) as failure:
                await one.exchange(FIRST)

        told = text.replace("{}", f"127.0.0.1:{server.port}")
        assert (failure.value.trouble, failure.value.text) == (Trouble.TEMPORARY, told)

    run(test)


def test_a_server_that_never_stops_talking_of_other_things_is_given_up() -> None:
    async def test() -> None:
        async with (
            by_tcp(lambda so_far: [answer(so_far[-1], old="CSeq: 41", new="CSeq: 7") * 1_001]) as server,
            flight(server.port, transport=Transport.TCP, patient=True) as one,
        ):
            with pytest.raises(NotSent, match="sends too much that is no answer"):
                await one.exchange(FIRST)

    run(test)


# -- TLS -------------------------------------------------------------------------------------------------------------


class Pki(NamedTuple):
    """A server's side for `pombal.test`, and the side of somebody who trusts it."""

    server: ssl.SSLContext
    client: ssl.SSLContext


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("pombal.test")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path: Path = tmp_path_factory.mktemp("pki") / "both.pem"
    pem = serialization.Encoding.PEM
    path.write_bytes(
        certificate.public_bytes(pem)
        + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return Pki(server, ssl.create_default_context(cafile=path))


def test_tls_is_checked_against_the_domain_and_not_against_what_srv_says(pki: Pki) -> None:
    async def test() -> tuple[str, Heard]:
        async with by_tcp(says(401, 200), pki.server) as server:
            zone = {
                ("_sips._tcp.pombal.test", "SRV"): [f"0 0 {server.port} other.test."],
                ("other.test", "A"): ["127.0.0.1"],
            }
            async with (
                a_nameserver(zone) as names,
                flight(
                    None,
                    host="pombal.test",
                    transport=Transport.TLS,
                    nameserver=names.address,
                    ssl_context=pki.client,
                    patient=True,
                ) as one,
            ):
                await one.exchange(FIRST)
                reply = await one.exchange(SECOND)
            return reply.server.partition("/")[0], server.heard[1]

    transport, heard = run(test)
    assert transport == "tls"
    assert heard.header("Via").startswith("SIP/2.0/TLS ")


@pytest.mark.parametrize("why", ["another name", "nobody we trust"])
def test_a_certificate_that_is_not_in_order_is_permanent_and_nothing_is_said(pki: Pki, why: str) -> None:
    async def test() -> None:
        context = pki.client if why == "another name" else ssl.create_default_context()
        name = "other.test" if why == "another name" else "pombal.test"
        async with by_tcp(says(200), pki.server) as server:
            async with flight(
                server.port, transport=Transport.TLS, tls_name=name, ssl_context=context, patient=True
            ) as one:
                with pytest.raises(NotSent, match=f"certificate is not valid for {name}") as failure:
                    await one.exchange(FIRST)

            assert failure.value.trouble is Trouble.PERMANENT
            assert server.heard == []

    run(test)


def test_a_server_without_tls_is_a_passing_trouble(pki: Pki) -> None:
    async def test() -> None:
        async with by_tcp(says(200)) as server:
            async with flight(server.port, transport=Transport.TLS, ssl_context=pki.client, budget=0.3) as one:
                with pytest.raises(NotSent) as failure:
                    await one.exchange(FIRST)
            assert failure.value.trouble is Trouble.TEMPORARY
            assert server.heard == []

    run(test)


# -- for an operator -------------------------------------------------------------------------------------------------


def test_what_would_be_done_is_said_and_not_done() -> None:
    async def test() -> tuple[list[str], list[Datagrams]]:
        async with servers(says(200), says(200)) as (made, names):
            said = await sip_direct.explain(
                host="pombal.test", port=None, transport=Transport.UDP, allowed=LOOPBACK, nameserver=names
            )
            return said, made

    said, made = run(test)

    assert said[0].startswith("SRV _sip._udp.pombal.test: a.pombal.test:")
    assert f"REGISTER goes by UDP to 127.0.0.1:{made[0].port}, from 127.0.0.1." in said
    assert any("11 datagrams in 32 s" in sentence for sentence in said)
    assert [server.heard for server in made] == [[], []]


def test_why_nothing_would_be_done_is_said_as_well() -> None:
    said = asyncio.run(sip_direct.explain(host="10.0.0.1", port=None, transport=Transport.TLS))

    assert said[-1].startswith("Nothing would be sent: 10.0.0.1 leads to an address that is not public")


# -- with an attempt, at the sandbox's registrar ---------------------------------------------------------------------


@pytest.mark.parametrize("transport", [Transport.UDP, Transport.TCP])
@pytest.mark.parametrize(
    "habit", [{}, {"others": [{"contact": "sip:x@192.0.2.9", "expires": 7}], "algorithms": ["SHA-256"]}]
)
def test_an_account_registers_and_goes_again(transport: Transport, habit: dict[str, object]) -> None:
    account = Account(
        domain="pombal.test",
        user="alice",
        auth_user="alice",
        password="s3cret",
        contact=f"sip:token@localhost;transport={transport}",
        call_id="call-1",
        from_tag="f",
        transport=transport,
    )

    async def attempt(port: int, *, cseq: int, unregister: bool) -> Outcome:
        one = Attempt(account, cseq=cseq, unregister=unregister)
        step: Request | Outcome = one.begin()
        async with flight(port, transport=transport, patient=True) as way:
            while isinstance(step, Request):
                step = one.answered((await way.exchange(step)).response)
        return step

    with a_registrar() as sip:
        sip.user("alice", "s3cret")
        if habit:
            sip.habit("alice", **habit)

        came = run(lambda: attempt(sip.port, cseq=1, unregister=False))
        assert (came.kind, came.granted) == (Kind.REGISTERED, 300)
        assert sip.state("alice")["registered"]

        went = run(lambda: attempt(sip.port, cseq=20, unregister=True))
        assert went.kind is Kind.UNREGISTERED
        assert not sip.state("alice")["registered"]
        assert [one["complaints"] for one in sip.journal()] == [[], [], [], []]
