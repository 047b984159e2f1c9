"""How requests reach the simulated registrar, and its replies go back: datagrams and connections on one port."""

import asyncio
import contextlib
import errno
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

from sandbox.sip_habits import PLAIN, Habit
from sandbox.sip_words import Stream, Unreadable

Source = tuple[str, int]
_AT_ONCE = 64  # datagrams that are read before anything else gets its turn
_BUFFER = 4 * 2**20
_BETWEEN = 0.001  # seconds between pieces of a stream, so that they arrive as pieces
_TRIES = 50  # to find a port that is free for both


class Link(Protocol):
    """Whence a request came, and whither its reply goes."""

    transport: str
    source: Source

    def send(self, raws: list[bytes], habit: Habit = PLAIN, *, then_close: bool = False) -> None: ...


class Datagrams:
    """The UDP socket. What cannot be sent at once is lost, as datagrams are."""

    def __init__(self, sock: socket.socket, heard: Callable[[bytes, "Link"], None]) -> None:
        self._socket, self._heard = sock, heard
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        self._loop.add_reader(sock, self._read)

    def send(self, raw: bytes, to: Source) -> None:
        with contextlib.suppress(OSError):  # nobody is there any more, or the buffer is full
            self._socket.sendto(raw, to)

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _read(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                raw, source = self._socket.recvfrom(65_536)
            except BlockingIOError:
                return
            except OSError:
                continue  # word that an earlier reply reached nobody
            self._heard(raw, Datagram(self, source[:2]))


class Datagram:
    """Where one came from."""

    __slots__ = ("_socket", "source")
    transport = "udp"

    def __init__(self, sock: Datagrams, source: Source) -> None:
        self._socket, self.source = sock, source

    def send(self, raws: list[bytes], habit: Habit = PLAIN, *, then_close: bool = False) -> None:
        for raw in raws:
            self._socket.send(raw, self.source)


class Connection(asyncio.Protocol):
    """One over TCP."""

    transport = "tcp"

    def __init__(self, heard: Callable[[bytes, "Link"], None], lost: Callable[["Connection"], None]) -> None:
        self.source: Source = ("", 0)
        self._heard, self._lost = heard, lost
        self._stream = Stream()
        self._pieces: deque[bytes] = deque()
        self._closes = False
        self._is_writing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.source = transport.get_extra_info("peername")[:2]
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        try:
            for raw in self._stream.feed(data):
                self._heard(raw, self)
        except Unreadable:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost(self)

    def send(self, raws: list[bytes], habit: Habit = PLAIN, *, then_close: bool = False) -> None:
        keep_alive = b"\r\n\r\n" if habit.tcp_keep_alives else b""
        data = b"".join(keep_alive + raw for raw in raws)
        size = habit.tcp_split or len(data) or 1
        self._pieces.extend(data[i : i + size] for i in range(0, len(data), size))
        self._closes = self._closes or then_close
        if not self._is_writing:
            self._write()

    def reset(self) -> None:
        """Ends without a goodbye."""
        sock = self._transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _write(self) -> None:
        if self._pieces and not self._transport.is_closing():
            self._transport.write(self._pieces.popleft())
        self._is_writing = bool(self._pieces)
        if self._is_writing:
            asyncio.get_running_loop().call_later(_BETWEEN, self._write)
        elif self._closes:
            self._transport.close()


class Port:
    """UDP and TCP on one port, while it is open."""

    def __init__(self, heard: Callable[[bytes, Link], None], lost: Callable[[Connection], None]) -> None:
        self._heard, self._lost = heard, lost
        self._connections: set[Connection] = set()
        self.datagrams: Datagrams | None = None

    async def open(self, host: str, port: int) -> int:
        """Gives the port, which is any free one for 0. Raises OSError when it is taken."""
        udp, tcp = _pair(host, port)
        self.datagrams = Datagrams(udp, self._heard)
        self._elsewhere = socket.socket(udp.family, socket.SOCK_DGRAM)
        self._elsewhere.bind((host, 0))
        self._server = await asyncio.get_running_loop().create_server(self._connected, sock=tcp)
        return int(tcp.getsockname()[1])

    def close(self) -> None:
        if self.datagrams is None:
            return
        self.datagrams.close()
        self.datagrams = None
        self._elsewhere.close()
        self._server.close()
        for connection in list(self._connections):
            connection.reset()

    def send_from_elsewhere(self, raw: bytes, to: Source) -> None:
        """A datagram from a port that nobody has ever written to."""
        self._elsewhere.sendto(raw, to)

    def _connected(self) -> Connection:
        connection = Connection(self._heard, self._disconnected)
        self._connections.add(connection)
        return connection

    def _disconnected(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._lost(connection)


def _pair(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for _ in range(_TRIES):
        tcp = socket.create_server((host, port), family=family, backlog=1_024)
        udp = socket.socket(family, socket.SOCK_DGRAM)
        try:
            udp.bind((host, tcp.getsockname()[1]))
        except OSError:
            tcp.close()
            udp.close()
            if port:
                raise
        else:
            return udp, tcp
    raise OSError(errno.EADDRINUSE, "no port is free for both UDP and TCP")
