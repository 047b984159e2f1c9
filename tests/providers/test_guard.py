"""Where a guarded client connects to, and for how long, over real sockets."""

import asyncio
import gc
import socket
import ssl
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from providers import guard

LOOPBACK = ip_network("127.0.0.0/8")
SOON = 1.0  # seconds after which a deadline of a test ends what would never end
FILE = b"a whole file"

# -- a server that says anything -------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A request that came in; `name` is the one TLS was asked for."""

    target: str
    headers: dict[str, str]
    name: str | None


Says = Callable[[socket.socket], None]


class Server:
    """Answers each request with the next of its answers, the last one again and again.

    After bytes the connection stays open for another request; after a function it is closed. `asked` and `connections`
    tell what came in.
    """

    def __init__(self, *answers: bytes | Says, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self.answers = list(answers)
        self.asked: list[Asked] = []
        self.connections = 0
        self.host = host
        self._tls = tls
        self._open: list[socket.socket] = []
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"http{'s' if self._tls else ''}://{self.host}:{self.port}"

    def seen(self) -> int:
        """Connections that have come in up to now: whatever came earlier is accepted before this one."""
        with socket.create_connection((self.host or "127.0.0.1", self.port)) as mine:
            mine.sendall(b"!")
            assert mine.recv(1) == b"!"
        return self.connections

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                self._open.append(connection)
                self._threads.append(threading.Thread(target=self._serve, args=[connection]))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError):  # the client, or the test, has heard enough
            if connection.recv(1, socket.MSG_PEEK) == b"!":
                connection.sendall(connection.recv(1))
                connection.close()
                return
            self.connections += 1
            if self._tls:
                connection = self._tls.wrap_socket(connection, server_side=True)
                self._open.append(connection)
            while self._answer(connection):
                pass
        connection.close()

    def _answer(self, connection: socket.socket) -> bool:
        raw = b""
        while b"\r\n\r\n" not in raw:
            if not (more := connection.recv(65536)):
                return False
            raw += more
        line, *fields = raw.partition(b"\r\n\r\n")[0].decode().split("\r\n")
        headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
        name = getattr(connection.context, "asked_for", None) if isinstance(connection, ssl.SSLSocket) else None
        self.asked.append(Asked(line.split(" ")[1], headers, name))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, bytes):
            connection.sendall(answer)
            return True
        answer(connection)
        return False

    def hang_up(self) -> None:
        for one in self._open:
            with suppress(OSError):  # it is gone
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends `accept`
        self._threads[0].join(10)
        self.hang_up()
        self._listener.close()
        for thread in self._threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in self._threads)


@contextmanager
def a_server(*answers: bytes | Says, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    server = Server(*answers, host=host, tls=tls)
    try:
        yield server
    finally:
        server.close()


def an_answer(body: bytes = FILE, status: str = "200 OK", **headers: str) -> bytes:
    given = {"content-length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def drips(start: bytes = b"") -> Says:
    """Says something, and then a header (or whatever it is by then) that never ends, byte by byte."""

    def drip(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(b"x")
            time.sleep(0.02)  # far less than any timeout for a read

    return drip


def says_nothing(connection: socket.socket) -> None:
    while connection.recv(1):
        pass


class Pki(NamedTuple):
    """A server's side with a certificate for some names, and a client's side that trusts it."""

    server: ssl.SSLContext
    client: ssl.SSLContext


def a_pki(folder: Path, *names: str) -> Pki:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(one) for one in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "both.pem").write_bytes(pem + secret)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "both.pem")

    def note(_connection: ssl.SSLObject, asked_for: str | None, context: ssl.SSLContext) -> None:
        context.asked_for = asked_for  # type: ignore[attr-defined]

    server.sni_callback = note
    return Pki(server, ssl.create_default_context(cadata=pem.decode()))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return a_pki(tmp_path_factory.mktemp("pki"), "media.example")


@contextmanager
def a_client(*, guarded: bool = True, **more: Any) -> Iterator[httpx.Client]:
    """Any port and both schemes, unless the test says otherwise: its servers have odd ones."""
    with guard.client(guarded=guarded, **{"ports": None, "schemes": ("https", "http"), **more}) as client:
        yield client


def until(holds: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < ends_at
        time.sleep(0.005)


def leads_to(*addresses: str) -> guard.Resolver:
    return lambda _host: addresses


# -- which addresses are public --------------------------------------------------------------------------------------

# Each with a name as it stands in IANA's registries, or in a transition mechanism's document.
SPECIAL = {
    "this host": "0.0.0.0/8",
    "private 10": "10.0.0.0/8",
    "shared (CGNAT)": "100.64.0.0/10",
    "loopback": "127.0.0.0/8",
    "link local": "169.254.0.0/16",
    "private 172": "172.16.0.0/12",
    "protocol assignments": "192.0.0.0/24",
    "TEST-NET-1": "192.0.2.0/24",
    "6to4 relay": "192.88.99.0/24",
    "private 192": "192.168.0.0/16",
    "benchmarking": "198.18.0.0/15",
    "TEST-NET-2": "198.51.100.0/24",
    "TEST-NET-3": "203.0.113.0/24",
    "multicast": "224.0.0.0/4",
    "reserved": "240.0.0.0/4",
    "unspecified 6": "::/128",
    "loopback 6": "::1/128",
    "IPv4-compatible": "::/96",
    "IPv4-mapped": "::ffff:0:0/96",
    "IPv4-translated": "::ffff:0:0:0/96",
    "NAT64": "64:ff9b::/96",
    "NAT64, local use": "64:ff9b:1::/48",
    "discard only": "100::/64",
    "Teredo": "2001::/32",
    "benchmarking 6": "2001:2::/48",
    "ORCHID": "2001:10::/28",
    "ORCHIDv2": "2001:20::/28",
    "documentation": "2001:db8::/32",
    "6to4": "2002::/16",
    "documentation 2": "3fff::/20",
    "segment routing": "5f00::/16",
    "unique local": "fc00::/7",
    "link local 6": "fe80::/10",
    "site local": "fec0::/10",
    "multicast 6": "ff00::/8",
}


@pytest.mark.parametrize("network", SPECIAL.values(), ids=SPECIAL.keys())
def test_no_address_of_a_special_block_is_public(network: str) -> None:
    @given(st.ip_addresses(network=network))
    def holds(address: IPv4Address | IPv6Address) -> None:
        assert not guard.is_public(address)

    holds()
    assert not guard.is_public(ip_network(network)[0])
    assert not guard.is_public(ip_network(network)[-1])


@given(st.ip_addresses())
def test_what_python_does_not_call_global_is_not_public(address: IPv4Address | IPv6Address) -> None:
    assert address.is_global or not guard.is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("1.1.1.1", "31.13.85.53", "99.255.255.255", "128.0.0.1", "191.252.0.1", "223.255.255.254"),
        *("2001:4860:4860::8888", "2606:4700::1111", "2800:3f0::1", "2a03:2880:f105::1"),
    ],
)
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert guard.is_public(ip_address(address))


# -- refused before a connection is made -----------------------------------------------------------------------------

HERE = [
    *("127.0.0.1", "localhost", "LOCALHOST", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001"),
    *("127.1", "127.0.1", "0", "0.0", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[::]"),
    *("%31%32%37.0.0.1", "１２７.0.0.1", "127。0。0。1"),
]


@pytest.mark.parametrize("host", HERE)
def test_no_way_to_write_this_machine_reaches_it(host: str) -> None:
    with a_server(an_answer(), host="") as server, a_client() as client:
        # Some of these ways are no way to write a host at all.
        with pytest.raises((guard.BlockedAddress, httpx.InvalidURL, httpx.ConnectError)) as refused:
            client.get(f"http://{host}:{server.port}/")

        assert server.seen() == 0
        assert "127" not in str(refused.value) or isinstance(refused.value, httpx.InvalidURL)


@pytest.mark.parametrize(
    "host",
    [
        *("169.254.169.254", "10.0.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "224.0.0.1", "255.255.255.255"),
        *("[64:ff9b::7f00:1]", "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]", "[2001::1]", "[fe80::1]", "[fec0::1]"),
        *("[fd00::1]", "[ff02::1]", "2852039166", "0xa9fea9fe", "169.254.43518"),
    ],
)
def test_an_address_that_is_not_public_is_refused(host: str) -> None:
    with a_client() as client, pytest.raises(guard.BlockedAddress, match="an address that is not public"):
        client.get(f"https://{host}/")


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["127.0.0.1", "1.1.1.1"], ["2606:4700::1111", "127.0.0.1"]])
def test_every_address_of_a_name_must_be_public(addresses: list[str]) -> None:
    with a_server(an_answer()) as server, a_client(resolve=leads_to(*addresses)) as client:
        with pytest.raises(guard.BlockedAddress):
            client.get(f"http://media.example:{server.port}/")

        assert server.seen() == 0


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://{at}/", "scheme"),
        ("ftp://{at}/", "scheme"),
        ("file:///etc/passwd", "scheme"),
        ("unix:///run/docker.sock", "scheme"),
        ("/etc/passwd", "scheme"),
        ("", "scheme"),
        ("https://127.0.0.1:22/", "port"),
        ("https://127.0.0.1:99999999/", "port"),
        ("https://127.0.0.1:0/", "port"),
        ("https://shop:secret@{at}/", "user name"),
        ("https://shop@{at}/", "user name"),
        ("https://media.example@{at}/", "user name"),
        ("https://media.example.:{port}/", "usual name"),
        ("https://:{port}/", "scheme"),
    ],
)
def test_what_a_url_shows_by_itself_is_refused(url: str, why: str, guarded: bool) -> None:
    with a_server(an_answer()) as server:
        options: dict[str, Any] = {"ports": (443, server.port), "resolve": leads_to("127.0.0.1")}
        with guard.client(guarded=guarded, allowed=[LOOPBACK], **options) as client:
            with pytest.raises(guard.BlockedAddress, match=why) as refused:
                client.get(url.format(at=f"127.0.0.1:{server.port}", port=server.port))

            assert server.seen() == 0
            assert "example" not in str(refused.value)


def test_only_https_and_its_port_are_allowed_unless_said_otherwise() -> None:
    with guard.client(guarded=True, resolve=leads_to("127.0.0.1")) as client:
        for url in "https://media.example:8443/", "http://media.example/", "https://media.example:80/":
            with pytest.raises(guard.BlockedAddress, match=r"scheme|port"):
                client.get(url)
        for url in "https://media.example/", "https://media.example:443/":
            with pytest.raises(guard.BlockedAddress, match="not public"):
                client.get(url)


def test_no_socket_of_this_machine_is_connected_to() -> None:
    with pytest.raises(guard.BlockedAddress):
        guard._Backend(allowed=None, resolve=guard.addresses_of).connect_unix_socket("/run/docker.sock")


# -- where it does connect to ----------------------------------------------------------------------------------------


def test_an_allowed_network_is_connected_to_and_no_other() -> None:
    with a_server(an_answer()) as server, a_client(allowed=[ip_network("127.0.0.1/32")]) as client:
        assert client.get(f"{server.url}/a?b=c").content == FILE

        assert [(asked.target, asked.headers["host"]) for asked in server.asked] == [
            ("/a?b=c", f"127.0.0.1:{server.port}")
        ]
        for host in "127.0.0.2", "[::ffff:127.0.0.1]", "10.0.0.1":
            with pytest.raises(guard.BlockedAddress):
                client.get(f"http://{host}:{server.port}/")


def test_an_unguarded_client_connects_to_any_address() -> None:
    with a_server(an_answer()) as server, a_client(guarded=False) as client:
        assert client.get(server.url).content == FILE


def test_a_name_is_resolved_once_and_the_checked_address_is_the_one_connected_to() -> None:
    calls: list[str] = []

    def rebinds(host: str) -> list[str]:
        """An honest answer for whoever checks, another one for whoever asks again."""
        calls.append(host)
        return ["127.0.0.1"] if len(calls) == 1 else ["127.0.0.2"]

    closes = an_answer(connection="close")  # so the second request needs a connection of its own
    with a_server(closes) as server, a_client(allowed=[ip_network("127.0.0.1/32")], resolve=rebinds) as client:
        assert client.get(f"http://media.example:{server.port}/").content == FILE
        assert calls == ["media.example"]

        with pytest.raises(guard.BlockedAddress):
            client.get(f"http://media.example:{server.port}/")
        assert calls == ["media.example"] * 2
        assert server.seen() == 1


def test_the_next_address_is_tried_when_one_does_not_answer() -> None:
    resolve = leads_to("127.0.0.2", "127.0.0.3")
    with a_server(an_answer(), host="127.0.0.3") as server, a_client(allowed=[LOOPBACK], resolve=resolve) as client:
        assert client.get(f"http://media.example:{server.port}/").content == FILE


def test_the_name_stays_in_the_request_and_in_tls(pki: Pki) -> None:
    with a_server(an_answer(), tls=pki.server) as server:
        with a_client(allowed=[LOOPBACK], resolve=leads_to("127.0.0.1"), verify=pki.client) as client:
            assert client.get(f"https://media.example:{server.port}/").content == FILE

        assert server.asked[0].name == "media.example"
        assert server.asked[0].headers["host"] == f"media.example:{server.port}"


@pytest.mark.parametrize("guarded", [True, False])
def test_a_certificate_must_be_for_the_name_and_of_somebody_we_trust(pki: Pki, guarded: bool) -> None:
    options: dict[str, Any] = {"guarded": guarded, "allowed": [LOOPBACK], "resolve": leads_to("127.0.0.1")}
    with a_server(an_answer(), tls=pki.server) as server:
        for host, trusted in ("other.example", pki.client), ("media.example", None):
            with (
                a_client(**options, verify=trusted) as client,
                pytest.raises(httpx.ConnectError, match="SSLCertVerificationError") as failed,
            ):
                client.get(f"https://{host}:{server.port}/")
            assert "example" not in str(failed.value)

        assert server.asked == []


def test_a_connection_serves_again_until_its_server_closes_it() -> None:
    with a_server(an_answer()) as server, a_client(allowed=[LOOPBACK]) as client:
        for _ in range(2):
            assert client.get(server.url).content == FILE
        assert server.connections == 1

        server.hang_up()
        pool = client._transport._pool  # type: ignore[attr-defined]
        until(lambda: pool.connections[0].has_expired())

        assert client.get(server.url).content == FILE
        assert server.connections == 2


def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_server(an_answer()) as server, a_server(an_answer(b"the proxy's")) as proxy:
        for name in "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy":
            monkeypatch.setenv(name, proxy.url)
        with a_client(allowed=[LOOPBACK]) as client:
            assert client.get(server.url).content == FILE

        assert proxy.seen() == 0


def test_a_redirect_is_not_followed_and_no_cookie_is_kept() -> None:
    moved = an_answer(b"", "302 Found", location="/other", set_cookie="who=someone; Path=/")
    with a_server(moved) as server, a_client(allowed=[LOOPBACK]) as client:
        for _ in range(2):
            assert client.get(server.url).status_code == 302

        assert [asked.target for asked in server.asked] == ["/", "/"]
        assert all("cookie" not in asked.headers for asked in server.asked)


def no_such_name(_host: str) -> list[str]:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize(
    ("host", "resolve"),
    [
        ("media.example", no_such_name),
        ("media.example", leads_to()),
        ("media.example", leads_to("not an address")),
        (f"{'a' * 64}.example", guard.addresses_of),
        ("a..example", guard.addresses_of),
        (".example", leads_to("127.0.0.1")),
    ],
)
def test_a_name_that_leads_nowhere_is_a_connection_that_failed(pki: Pki, host: str, resolve: guard.Resolver) -> None:
    with a_server(an_answer(), tls=pki.server) as server, a_client(allowed=[LOOPBACK], resolve=resolve) as client:
        with pytest.raises((httpx.ConnectError, httpx.InvalidURL)) as failed:
            client.get(f"https://{host}:{server.port}/")

        assert "example" not in str(failed.value)
        assert server.asked == []


def test_a_port_where_nobody_listens_and_one_that_cannot_be() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with a_client(allowed=[LOOPBACK]) as client:
        for one, why in (port, "ConnectionRefusedError"), (99_999_999, "OverflowError"):
            with pytest.raises(httpx.ConnectError, match=f"^{why}$"):
                client.get(f"http://127.0.0.1:{one}/")


def test_another_httpx_than_the_one_we_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpx.HTTPTransport, "__init__", lambda _self, **_options: None)

    with pytest.raises(RuntimeError, match="nothing would be guarded"):
        guard.client(guarded=True)


# -- how long it may take --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "says",
    [
        says_nothing,
        drips(),
        drips(b"HTTP/1.1 200 OK\r\nx-never-ends: "),
        drips(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n"),
        drips(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffff\r\n"),
        drips(b"HTTP/1.1 200 OK\r\n\r\n"),
    ],
    ids=["nothing", "no HTTP", "headers", "body", "chunk", "body without length"],
)
def test_neither_silence_nor_a_drip_outlives_the_deadline(says: Says) -> None:
    with (
        a_server(says) as server,
        a_client(allowed=[LOOPBACK]) as client,
        pytest.raises(httpx.ReadTimeout),
        guard.within(SOON),
    ):
        client.get(server.url)


def test_a_handshake_that_does_not_end_is_given_up_in_time() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as deaf,
        a_client(allowed=[LOOPBACK]) as client,
        pytest.raises(httpx.ConnectTimeout),
        guard.within(SOON),
    ):
        client.get(f"https://127.0.0.1:{deaf.getsockname()[1]}/")


def test_a_server_that_does_not_read_is_given_up_in_time() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as deaf,
        a_client(allowed=[LOOPBACK]) as client,
        pytest.raises(httpx.WriteTimeout),
        guard.within(SOON),
    ):
        client.post(f"http://127.0.0.1:{deaf.getsockname()[1]}/", content=b"x" * 50_000_000)


def test_a_server_that_hangs_up_on_what_we_write_is_an_error_of_httpx() -> None:
    def hangs_up(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with (
        a_server(hangs_up) as server,
        a_client(allowed=[LOOPBACK]) as client,
        pytest.raises((httpx.NetworkError, httpx.RemoteProtocolError)),  # by what is noticed first
        guard.within(60),
    ):
        client.post(server.url, content=b"x" * 50_000_000)


def test_a_deadline_that_has_passed_lets_nothing_out() -> None:
    with a_server(an_answer()) as server, a_client(allowed=[LOOPBACK]) as client:
        with pytest.raises(httpx.ConnectTimeout), guard.within(0):
            client.get(server.url)
        assert server.seen() == 0

        assert client.get(server.url).content == FILE
        with pytest.raises(httpx.WriteTimeout), guard.within(0):
            client.get(server.url)
        assert len(server.asked) == 1


def test_a_resolver_that_took_too_long_is_noticed_when_it_answers() -> None:
    def late(_host: str) -> list[str]:
        with suppress(TimeoutError):
            while guard._left(None):
                time.sleep(0.01)
        return ["127.0.0.1"]

    with a_server(an_answer()) as server, a_client(allowed=[LOOPBACK], resolve=late) as client:
        with pytest.raises(httpx.ConnectTimeout), guard.within(SOON):
            client.get(f"http://media.example:{server.port}/")

        assert server.seen() == 0


def test_of_two_deadlines_the_earlier_counts_and_each_ends_with_its_block() -> None:
    with a_server(an_answer()) as server, a_client(allowed=[LOOPBACK]) as client:
        with guard.within(0), guard.within(60), pytest.raises(httpx.TimeoutException):
            client.get(server.url)
        with guard.within(60):
            with guard.within(0), pytest.raises(httpx.TimeoutException):
                client.get(server.url)
            assert client.get(server.url).content == FILE
        assert client.get(server.url).content == FILE


def test_a_deadline_is_its_threads_own() -> None:
    with (
        a_server(an_answer()) as server,
        a_client(allowed=[LOOPBACK]) as client,
        ThreadPoolExecutor(1) as other,
        guard.within(0),
    ):
        assert other.submit(client.get, server.url).result(10).content == FILE


def test_plain_http_and_odd_ports_are_for_allowed_networks_alone() -> None:
    def resolve(host: str) -> list[str]:
        return {"inside.example": ["127.0.0.1"], "both.example": ["127.0.0.1", "93.184.216.34"]}.get(
            host, ["93.184.216.34"]
        )

    with guard.client(guarded=True, allowed=[LOOPBACK], resolve=resolve, is_free_inside=True) as client:
        for url in ("http://public.example/", "https://public.example:25/", "http://both.example:8080/"):
            with pytest.raises(guard.BlockedAddress):
                client.get(url)
        with a_server(an_answer()) as server, guard.within(30):
            port = httpx.URL(server.url).port
            assert client.get(f"http://inside.example:{port}/").status_code == 200


def test_connections_that_wait_keep_no_other_from_being_made() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent, a_client(allowed=[LOOPBACK]) as client:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"

        def waits(_: int) -> bool:
            with guard.within(10):
                try:
                    client.get(url)
                except httpx.TransportError:
                    return True
            return False

        with ThreadPoolExecutor(24) as pool:
            waiting = [pool.submit(waits, n) for n in range(24)]
            accepted = [silent.accept()[0] for _ in waiting]
            try:
                with a_server(an_answer()) as server, guard.within(5):
                    assert client.get(server.url).status_code == 200
            finally:
                for connection in accepted:
                    connection.close()
            assert all(one.result() for one in waiting)


# -- of an event loop ------------------------------------------------------------------------------------------------


def asked_by_a_loop(*urls: str, seconds: float | None = None, **more: Any) -> list[int | Exception]:
    """What a client of an event loop gets for each, one after the other: the status of the answer, or an error."""
    lookup = guard.Lookup(more.pop("resolve", None))

    async def ask(client: httpx.AsyncClient, url: str) -> int | Exception:
        try:
            return (await client.get(url)).status_code
        except (guard.BlockedAddress, httpx.HTTPError, httpx.InvalidURL) as error:
            return error

    async def run() -> list[int | Exception]:
        way = guard.transport(lookup, **{"allowed": [], **more})
        async with httpx.AsyncClient(transport=way, timeout=httpx.Timeout(20, connect=seconds or 10)) as client:
            return [await ask(client, url) for url in urls]

    try:
        return asyncio.run(run())
    finally:
        lookup.close()


@pytest.mark.parametrize("host", HERE)
def test_a_loops_client_reaches_this_machine_in_no_way_either(host: str) -> None:
    with a_server(an_answer(), host="") as server:
        found = asked_by_a_loop(f"https://{host}/", f"https://{host}:{server.port}/", f"http://{host}:{server.port}/")

        assert server.seen() == 0
    # Some of these ways are no way to write a host at all.
    assert all(isinstance(one, guard.BlockedAddress | httpx.InvalidURL | httpx.ConnectError) for one in found)


def test_every_address_of_a_name_must_be_public_to_a_loops_client() -> None:
    for addresses in (["127.0.0.1"], ["1.1.1.1", "127.0.0.1"], ["::1", "2606:4700::1111"], ["169.254.169.254"]):
        (found,) = asked_by_a_loop("https://media.example/", resolve=leads_to(*addresses))

        assert isinstance(found, guard.BlockedAddress)
        assert "example" not in str(found)


def test_a_loops_client_connects_to_the_address_that_was_checked(pki: Pki) -> None:
    answers = iter([["127.0.0.1"], ["127.0.0.1"], ["127.0.0.2"]])  # for the URL's port, for the connection, for nobody

    with a_server(an_answer(), tls=pki.server) as server:
        found = asked_by_a_loop(
            f"https://media.example:{server.port}/",
            allowed=[LOOPBACK],
            verify=pki.client,
            resolve=lambda _host: next(answers),
        )

    assert found == [200]
    assert (server.asked[0].headers["host"], server.asked[0].name) == (f"media.example:{server.port}", "media.example")
    assert list(answers) == [["127.0.0.2"]]


def test_a_name_that_leads_elsewhere_the_second_time_is_checked_again() -> None:
    answers = iter([["127.0.0.1"], ["127.0.0.2"]])

    with a_server(an_answer(), host="") as server:
        (found,) = asked_by_a_loop(
            f"http://media.example:{server.port}/",
            allowed=[ip_network("127.0.0.1/32")],
            resolve=lambda _host: next(answers),
        )

        assert server.seen() == 0
    assert isinstance(found, guard.BlockedAddress)


def test_odd_ports_and_plain_http_are_for_allowed_networks_alone_in_a_loop_too() -> None:
    urls = ["http://media.example/", "https://media.example:8443/", "ftp://media.example/", "https://u@media.example/"]
    public = asked_by_a_loop(*urls, "https://media.example./", resolve=leads_to("1.1.1.1"))
    with a_server(an_answer()) as server:
        inside = asked_by_a_loop(f"http://127.0.0.1:{server.port}/", allowed=[LOOPBACK])

    assert all(isinstance(one, guard.BlockedAddress) for one in public)
    assert inside == [200]


def test_a_loops_client_follows_no_redirect_inside() -> None:
    with a_server(an_answer()) as there, a_server(an_answer(b"", "302 Moved", location=there.url)) as here:
        assert asked_by_a_loop(here.url, allowed=[LOOPBACK]) == [302]
        assert there.seen() == 0


def test_the_next_address_is_tried_in_a_loop_too() -> None:
    with a_server(an_answer()) as server:
        found = asked_by_a_loop(
            f"http://media.example:{server.port}/", allowed=[LOOPBACK], resolve=leads_to("127.0.0.9", "127.0.0.1")
        )

    assert found == [200]


def test_no_resolver_holds_up_a_loop_nor_those_who_ask_for_other_names() -> None:
    asked: list[str] = []
    goes_on = threading.Event()

    def resolve(host: str) -> list[str]:
        asked.append(host)
        if host == "slow.example":
            goes_on.wait(20)
        return ["127.0.0.1"]

    async def run(url: str) -> tuple[int, list[BaseException | httpx.Response]]:
        lookup = guard.Lookup(resolve)
        way = guard.transport(lookup, allowed=[LOOPBACK])
        async with httpx.AsyncClient(transport=way, timeout=httpx.Timeout(20, connect=SOON)) as client:
            slow = [asyncio.create_task(client.get("https://slow.example/")) for _ in range(50)]
            await asyncio.sleep(0)
            quick = await client.get(url, timeout=20)
            found = await asyncio.gather(*slow, return_exceptions=True)
        goes_on.set()
        lookup.close()
        return quick.status_code, found

    with a_server(an_answer()) as server:
        quick, slow = asyncio.run(run(f"http://quick.example:{server.port}/"))

    assert quick == 200
    assert all(isinstance(one, httpx.ConnectTimeout) for one in slow)
    assert asked.count("slow.example") == 1


class Names:
    """A resolver, to which every name that has `tar` in it hangs until it `goes_on`, and is none then."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.goes_on = threading.Event()

    def __call__(self, host: str) -> list[str]:
        self.asked.append(host)
        if "tar" in host:
            self.goes_on.wait(20)
            raise OSError("no such name")
        return ["1.1.1.1"]


def looked_up(does: Callable[[guard.Lookup, Names], Awaitable[None]]) -> list[dict[str, Any]]:
    """Run it, and then let go what hangs; returns what the event loop had to complain about."""
    names, complaints = Names(), list[dict[str, Any]]()
    lookup = guard.Lookup(names)

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
        try:
            await does(lookup, names)
        finally:
            names.goes_on.set()
        with suppress(OSError):
            await lookup.addresses("good.example", 20)
        gc.collect()

    try:
        asyncio.run(run())
    finally:
        lookup.close()
    return complaints


async def gives_up(lookup: guard.Lookup, *hosts: str) -> None:
    """Nobody gets an answer in time."""
    found = await asyncio.gather(*(lookup.addresses(host, 0.1) for host in hosts), return_exceptions=True)
    assert all(isinstance(one, TimeoutError) for one in found)


async def hang(lookup: guard.Lookup, names: Names, *hosts: str) -> None:
    """All of them are asked for, and whoever asked has gone away."""
    tasks = [asyncio.create_task(lookup.addresses(host, 60)) for host in hosts]
    await asyncio.to_thread(until, lambda: set(hosts) <= set(names.asked))
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def test_names_that_hang_leave_room_for_others() -> None:
    async def does(lookup: guard.Lookup, names: Names) -> None:
        for n in range(0, 48, 16):
            await hang(lookup, names, *(f"tar{n + m}.example" for m in range(16)))
            assert await lookup.addresses("good.example", 10) == ["1.1.1.1"]

    assert looked_up(does) == []


@pytest.mark.parametrize(("theirs", "ours"), [("their.example", "our.example"), ("their.com.br", "our.com.br")])
def test_a_domain_that_makes_up_names_holds_up_its_own_alone(theirs: str, ours: str) -> None:
    async def does(lookup: guard.Lookup, names: Names) -> None:
        await hang(lookup, names, *(f"tar{n}.{theirs}" for n in range(4)))
        await gives_up(lookup, *(f"tar{n}.{theirs}" for n in range(200)))
        assert await lookup.addresses(f"api2.{ours}", 10) == ["1.1.1.1"]
        assert len(names.asked) == 5
        await gives_up(lookup, f"good.{theirs}")

    assert looked_up(does) == []


def test_names_of_one_domain_wait_for_each_other() -> None:
    async def does(lookup: guard.Lookup, names: Names) -> None:
        good = [f"good{n}.our.example" for n in range(50)]
        found = await asyncio.gather(*(lookup.addresses(host, 20) for host in good))
        assert found == [["1.1.1.1"]] * 50
        assert sorted(names.asked) == sorted(good)

    assert looked_up(does) == []


def test_a_name_that_nobody_waits_for_any_more_is_not_begun() -> None:
    async def does(lookup: guard.Lookup, names: Names) -> None:
        hanging, late = [[f"tar{n}.our.example" for n in range(start, start + 4)] for start in (0, 4)]
        await hang(lookup, names, *hanging)
        await gives_up(lookup, *late)
        names.goes_on.set()
        assert await lookup.addresses("good.our.example", 10) == ["1.1.1.1"]
        assert sorted(names.asked) == ["good.our.example", *hanging]

    assert looked_up(does) == []


def test_a_name_that_hung_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_HANGS", 0.0)

    async def does(lookup: guard.Lookup, names: Names) -> None:
        await hang(lookup, names, "tar.example")
        names.goes_on.set()
        await asyncio.to_thread(until, lambda: not lookup._under_way)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await lookup.addresses("tar.example", 10)
        assert await lookup.addresses("good.example", 10) == ["1.1.1.1"]
        assert names.asked == ["tar.example", "good.example"]
        monkeypatch.setattr(guard, "_LEFT_ALONE", 0.0)
        lookup._left_alone.clear()
        for _ in range(3):
            with pytest.raises(OSError, match="no such name"):
                await lookup.addresses("tar.example", 10)

    assert looked_up(does) == []


def test_a_name_that_fails_at_once_may_be_asked_for_again_at_once() -> None:
    async def does(lookup: guard.Lookup, names: Names) -> None:
        names.goes_on.set()
        for _ in range(3):
            with pytest.raises(OSError, match="no such name"):
                await lookup.addresses("tar.example", 10)
        assert len(names.asked) == 3

    assert looked_up(does) == []


def test_those_who_gave_up_leave_no_error_behind() -> None:
    async def does(lookup: guard.Lookup, names: Names) -> None:
        await hang(lookup, names, "tar.example", "tar.example")
        await gives_up(lookup, "tar.example")
        names.goes_on.set()
        with suppress(OSError):
            await lookup.addresses("tar.example", 10)
        await asyncio.to_thread(until, lambda: not lookup._under_way)

    assert looked_up(does) == []


def test_a_closed_lookup_keeps_nobody_waiting() -> None:
    async def does(lookup: guard.Lookup, names: Names) -> None:
        await hang(lookup, names, *(f"tar{n}.our.example" for n in range(4)))
        waits = asyncio.ensure_future(lookup.addresses("good.our.example", 60))
        await asyncio.sleep(0)
        lookup.close()
        for late in (waits, lookup.addresses("good.example", 60)):
            with pytest.raises(OSError, match="closed"):
                await late

    assert looked_up(does) == []


@pytest.mark.parametrize("resolve", [leads_to(), leads_to("not an address"), no_such_name])
def test_a_name_that_leads_nowhere_is_a_connection_that_failed_in_a_loop_too(resolve: guard.Resolver) -> None:
    (found,) = asked_by_a_loop("https://media.example/", resolve=resolve)

    assert isinstance(found, httpx.ConnectError)


def test_a_loops_client_needs_the_httpx_that_we_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpx.AsyncHTTPTransport, "__init__", lambda *_args, **_kwargs: None)
    lookup = guard.Lookup()

    with pytest.raises(RuntimeError, match="nothing would be guarded"):
        guard.transport(lookup, allowed=[])
