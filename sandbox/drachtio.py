"""A stand-in for drachtio, as an SBC that takes calls and registers for others (sip-registration.md §8).

Clients come to its control port, prove the secret, and have SIP requests sent. It keeps its own truth: what it was
asked, what it sent, which calls came in, and who wanted to be given calls.
"""

import argparse
import asyncio
import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar, cast
from uuid import uuid4

import httpx
import msgspec

from sandbox.drachtio_habits import NONE, Asked, Habits, Invite
from sandbox.drachtio_sip import Heard, Sip, Target
from sandbox.meta import JSON
from sandbox.sip_links import Link
from sandbox.sip_words import Message, Unreadable

T = TypeVar("T")
VERSION = "v0.9.10"
PORT, SIP_PORT = 9022, 5060
MOST = 10_000  # entries of a journal
BETWEEN = 0.0005  # seconds between pieces of a frame, so that they arrive as pieces
DISPATCH_TIMEOUT = 5.0


class Dispatch(NamedTuple):
    """Who is asked where a call should go: `GET {url}?contact={request-uri}` with `x-api-key: {key}`."""

    url: str
    key: str


class Standin:
    """For one event loop; all but `start` and `stop` may be called from any thread.

    port, sip_port   0: any free one; the real ones once it has started
    timeout, t1      seconds until a request has failed by itself, and to its first retransmission
    """

    def __init__(
        self,
        secret: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        sip_port: int = 0,
        timeout: float = 32.0,
        t1: float = 0.5,
        dispatch: Dispatch | None = None,
    ) -> None:
        self.secret, self.host, self.port, self.sip_port = secret, host, port, sip_port
        self.dispatch = dispatch
        self.pings = self.logins = self.refused_logins = 0
        self.sip = Sip(timeout, t1, self._invited)
        self._timeout = timeout
        self._habits = NONE
        self._clients: set[_Client] = set()
        self._nobody = asyncio.Event()  # is connected
        self._nobody.set()
        self._requests: deque[Asked] = deque(maxlen=MOST)
        self._invites: deque[Invite] = deque(maxlen=MOST)
        self._routes: list[str] = []
        self._violations: list[str] = []
        self._last = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Raises OSError when a port is taken."""
        self._loop = asyncio.get_running_loop()
        await self.sip.open(self.host, self.sip_port)
        self.sip_port = self.sip.port
        try:
            await self._listen()
        except OSError:
            await self.sip.close()
            raise

    async def stop(self) -> None:
        self._close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.sip.close()
        await self._nobody.wait()

    # What a test asks and wants, from any thread

    def overview(self) -> JSON:
        return self._do(
            lambda: {
                "host": self.host,
                "port": self.port,
                "sip_port": self.sip_port,
                "is_there": self._server is not None,
                "connections": len(self._clients),
                "authenticated": sum(one.is_in for one in self._clients),
                "dispatch": self.dispatch and self.dispatch.url,
                "habits": msgspec.to_builtins(self._habits),
            }
        )

    def set_habits(self, **changes: Any) -> JSON:
        """Only what changes, and all that is set now. Raises ValueError with what is wrong with them."""

        def change() -> JSON:
            self._habits = self._habits.changed(**changes)
            return cast(JSON, msgspec.to_builtins(self._habits))

        return self._do(change)

    def reset_habits(self) -> JSON:
        def reset() -> JSON:
            self._habits = NONE
            return cast(JSON, msgspec.to_builtins(NONE))

        return self._do(reset)

    def requests(self, limit: int = 1000) -> list[JSON]:
        """The latest SIP requests of clients, oldest first."""
        return self._do(lambda: [msgspec.to_builtins(one) for one in list(self._requests)[-limit:]])

    def invites(self, limit: int = 1000) -> list[JSON]:
        """The latest calls that came in, oldest first."""
        return self._do(lambda: [msgspec.to_builtins(one) for one in list(self._invites)[-limit:]])

    def routes(self) -> list[str]:
        """What clients wanted to be given, as `invite`: a fleet that only registers wants nothing."""
        return self._do(lambda: list(self._routes))

    def violations(self) -> list[str]:
        """What drachtio itself would not have survived, or would have hung up on."""
        return self._do(lambda: list(self._violations))

    def forget(self) -> None:
        """The journals are empty, and the counts zero."""

        def forget() -> None:
            for journal in (self._requests, self._invites, self._routes, self._violations):
                journal.clear()
            self.pings = self.logins = self.refused_logins = 0

        self._do(forget)

    def hang_up(self) -> None:
        """All control connections end now."""

        def hang_up() -> None:
            for client in list(self._clients):
                client.abort()

        self._do(hang_up)

    def go_away(self) -> None:
        """The control port is closed, as while drachtio restarts; its SIP port stays."""
        self._do(self._close)

    def come_back(self) -> None:
        """The control port is open again, where it was."""

        def come_back() -> None:
            self._background(self._listen())

        if self._server is None:
            self._do(come_back)

    def deliver(self, sip_text: str, transaction: str = "", source: str = "udp|192.0.2.1|5060") -> None:
        """A network frame that nobody asked for, to all who are let in."""
        raw = sip_text.encode()
        head = f"{uuid4()}|sip|network|{len(raw)}|{source}|{_now()}|{transaction}||"

        def deliver() -> None:
            for client in self._clients:
                if client.is_in:
                    client.say(head, raw)

        self._do(deliver)

    # What its clients do to it

    def take_habits(self) -> Habits:
        """Those for one SIP request."""
        habits = self._habits
        if habits.times:
            self._habits = NONE if habits.times == 1 else msgspec.structs.replace(habits, times=habits.times - 1)
        return habits

    @property
    def habits(self) -> Habits:
        return self._habits

    def next_number(self) -> int:
        self._last += 1
        return self._last

    def asked(self, asked: Asked) -> None:
        self._requests.append(asked)

    def routed(self, verb: str) -> None:
        self._routes.append(verb)

    def violated(self, what: str) -> None:
        self._violations.append(what)

    def joined(self, client: "_Client") -> None:
        self._clients.add(client)
        self._nobody.clear()

    def left(self, client: "_Client") -> None:
        self._clients.discard(client)
        if not self._clients:
            self._nobody.set()

    # Itself

    def _do(self, call: Callable[[], T]) -> T:
        """Call it in the loop's thread, and wait for what it gives."""
        loop = self._loop
        with contextlib.suppress(RuntimeError):
            if asyncio.get_running_loop() is loop:
                loop = None
        if loop is None or not loop.is_running():
            return call()
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(call())
            except Exception as error:
                done.set_exception(error)

        loop.call_soon_threadsafe(run)
        return done.result(10)

    async def _listen(self) -> None:
        sock = socket.create_server((self.host, self.port), backlog=256)
        self.port = sock.getsockname()[1]
        self._server = await asyncio.get_running_loop().create_server(lambda: _Client(self), sock=sock)

    def _close(self) -> None:
        if self._server:
            self._server.close()
            self._server = None
        for client in list(self._clients):
            client.abort()

    def _background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _invited(self, message: Message, link: Link, answer: Callable[[int, str | None], None]) -> None:
        """A call: to whoever wants calls; else where dispatch says, or nowhere."""
        source = f"{link.source[0]}:{link.source[1]}"
        invite = Invite(
            self.next_number(),
            time.time(),
            message.uri,
            message.get("call-id"),
            message.get("from"),
            link.transport,
            source,
        )
        self._invites.append(invite)
        routers = [one for one in self._clients if "invite" in one.wants]

        def end(status: int, contact: str | None = None) -> None:
            invite.status, invite.target = status, contact
            answer(status, contact)

        if routers:
            # It is theirs now. None of ours ever answers, so the caller hears of it when its time is up.
            address = f"{link.transport}|{link.source[0]}|{link.source[1]}"
            head = f"{uuid4()}|sip|network|{message.raw_length}|{address}|{_now()}|{uuid4()}||"
            routers[invite.n % len(routers)].say(head, _again(message))
            asyncio.get_running_loop().call_later(self._timeout, end, 480)
        elif self.dispatch:
            self._background(self._dispatched(self.dispatch, invite, end))
        else:
            end(480)

    async def _dispatched(self, dispatch: Dispatch, invite: Invite, end: Callable[[int, str | None], None]) -> None:
        try:
            async with httpx.AsyncClient(timeout=DISPATCH_TIMEOUT, trust_env=False) as client:
                answer = await client.get(
                    dispatch.url, params={"contact": invite.request_uri}, headers={"x-api-key": dispatch.key}
                )
        except httpx.HTTPError:
            end(503, None)
            return
        invite.dispatch_status = answer.status_code
        target = None
        if answer.status_code == 200:
            with contextlib.suppress(ValueError, AttributeError):
                target = answer.json().get("target")
        end(302 if target else 404, target)


class _Client(asyncio.Protocol):
    """One control connection."""

    def __init__(self, standin: Standin) -> None:
        self.is_in = False
        self.wants: set[str] = set()
        self._standin = standin
        self._buffer = bytearray()
        self._pieces: deque[tuple[float, bytes]] = deque()  # with the seconds before each
        self._is_writing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._standin.joined(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pieces.clear()
        self._standin.left(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while b"#" in self._buffer and not self._transport.is_closing():
            digits, _, rest = self._buffer.partition(b"#")
            if not digits.isdigit() or len(digits) > 5:
                self._standin.violated("a frame without its length")
                self.abort()
                return
            if len(rest) < int(digits):
                return
            body = bytes(rest[: int(digits)])
            self._buffer = rest[int(digits) :]
            self._take(body)

    def abort(self) -> None:
        self._transport.abort()

    def say(self, head: str, sip: bytes | None = None) -> None:
        """A frame."""
        self._write(_framed(head, sip), self._standin.habits)

    def _write(self, data: bytes, habits: Habits) -> None:
        size = habits.pieces or len(data)
        for start in range(0, len(data), size):
            self._pieces.append((BETWEEN if start else habits.delay, data[start : start + size]))
        if not self._is_writing:
            self._next()

    def _next(self) -> None:
        """Write what is due, in order."""
        while self._pieces and not self._pieces[0][0]:
            self._transport.write(self._pieces.popleft()[1])
        self._is_writing = bool(self._pieces)
        if self._pieces:
            seconds, data = self._pieces.popleft()
            self._pieces.appendleft((0, data))
            asyncio.get_running_loop().call_later(seconds, self._next)

    def _take(self, body: bytes) -> None:
        head, _, sip = body.partition(b"\r\n")
        id, verb, *words = (*head.decode("utf-8", "replace").split("|"), "")
        if verb == "authenticate":
            self._authenticate(id, words[0])
        elif not self.is_in:
            self._standin.violated(f"{verb} before the secret")
            self._refuse(id, "not authenticated")
        elif verb == "ping":
            self._standin.pings += 1
            if not self._standin.habits.deaf:
                self.say(f"{uuid4()}|response|{id}|OK|pong")
        elif verb == "sip":
            self._sip(id, words, sip)
        elif verb == "route":
            self._standin.routed(words[0].lower())
            self.wants.add(words[0].lower())
            self.say(f"{uuid4()}|response|{id}|OK")
        elif verb == "remove_route":
            self.wants.discard(words[0].lower())
            self.say(f"{uuid4()}|response|{id}|OK")
        else:
            self._standin.violated(f"the unknown verb {verb}")
            self._refuse(id, "Unknown message type")

    def _authenticate(self, id: str, secret: str) -> None:
        if secret != self._standin.secret or self._standin.habits.wrong_secret:
            self._standin.refused_logins += 1
            self._refuse(id, "incorrect secret")
            return
        self.is_in = True
        self._standin.logins += 1
        address = self._standin.sip.address
        self.say(f"{uuid4()}|response|{id}|OK|udp/{address},tcp/{address}|{VERSION}|{address}")

    def _refuse(self, id: str, why: str) -> None:
        """Say so, and hang up."""
        self._transport.write(_framed(f"{uuid4()}|response|{id}|NO|{why}"))
        self._transport.close()

    def _sip(self, id: str, words: list[str], sip: bytes) -> None:
        transaction, dialog, proxy = (*words, "", "", "")[:3]
        habits = self._standin.take_habits()
        try:
            message = Message(sip)
        except Unreadable:
            self._standin.violated("SIP that cannot be read")
            self.say(f"{uuid4()}|response|{id}|NOK|invalid message")
            return
        asked = Asked(
            self._standin.next_number(),
            time.time(),
            message.method,
            message.get("call-id"),
            message.get("cseq"),
            bool(message.get("authorization") or message.get("proxy-authorization")),
            proxy,
        )
        self._standin.asked(asked)
        if message.status or dialog or (transaction and message.method != "CANCEL"):
            self._standin.violated(f"{message.method or 'a response'} in a transaction or dialog")
            self.abort()
            return
        if habits.drop == "on_request":
            self.abort()
            return
        if habits.silent:
            return
        if habits.garbage:
            self._transport.write(b"OK, sent it#")
            return
        target = self._standin.sip.target(proxy or message.uri)
        refusal = habits.nok or (target if isinstance(target, str) else None)
        if refusal or isinstance(target, str):
            asked.nok = refusal
            self.say(f"{uuid4()}|response|{id}|NOK|{refusal}")
            return
        self._send(id, asked, habits, target, sip)

    def _send(self, id: str, asked: Asked, habits: Habits, target: Target, sip: bytes) -> None:
        branch = f"z9hG4bK{uuid4().hex}"
        raw = self._standin.sip.outgoing(sip, target, branch)
        asked.sent, asked.transport, asked.transaction = True, target.transport, str(uuid4())
        meta = f"{len(raw)}|{target.transport}|{target.host}|{target.port}|{_now()}"
        accepted = _framed(f"{uuid4()}|response|{id}|OK|application|{meta}|{asked.transaction}|Msg sent:|", raw)
        waits = habits.early or habits.glued

        def heard(heard: Heard) -> None:
            asked.codes.append(heard.status)
            asked.self_made = heard.source is None
            if heard.status >= 200 and habits.drop == "before_response":
                self.abort()
                return
            host, port = heard.source or ("", 0)
            meta = f"{len(heard.raw)}|{heard.transport}|{host}|{port}|{_now()}"
            response = _framed(f"{uuid4()}|sip|network|{meta}|{asked.transaction}||", heard.raw)
            if not waits or heard.status < 200:
                self._write(response, habits)
            elif habits.glued:
                self._write(accepted + response, habits)
            else:
                self._write(response, habits)
                self._write(accepted, habits)

        self._standin.sip.send(raw, asked.method, target, branch, heard)
        if not waits:
            self._write(accepted, habits)


def _framed(head: str, sip: bytes | None = None) -> bytes:
    body = head.encode() + (b"" if sip is None else b"\r\n" + sip)
    return b"%d#%b" % (len(body), body)


def _now() -> str:
    seconds = time.time()
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1e6):06d}"


def _again(message: Message) -> bytes:
    lines = [f"{message.method} {message.uri} SIP/2.0"]
    lines += [f"{name}: {value}" for name, values in message.headers.items() for value in values]
    return "\r\n".join([*lines, "", ""]).encode() + message.body


@contextlib.contextmanager
def in_a_thread(standin: Standin) -> Iterator[Standin]:
    """It runs in a thread and a loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="drachtio", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(standin.start(), loop).result(10)
        try:
            yield standin
        finally:
            asyncio.run_coroutine_threadsafe(standin.stop(), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


# Alone


async def serve(standin: Standin) -> None:
    await standin.start()
    where = f"control port {standin.host}:{standin.port}, SIP on {standin.sip.address}"
    print(f"drachtio stand-in: {where}, UDP and TCP", flush=True)  # noqa: T201
    try:
        await asyncio.Event().wait()
    finally:
        await standin.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until it is interrupted."""
    parser = argparse.ArgumentParser(prog="sandbox.drachtio", description="A stand-in for drachtio.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=PORT, help=f"of the control port ({PORT}; 0: any)")
    parser.add_argument("--sip-port", type=int, default=SIP_PORT, help=f"UDP and TCP ({SIP_PORT}; 0: any)")
    parser.add_argument("--secret", required=True, help="what clients must know")
    parser.add_argument("--dispatch", nargs=2, metavar=("URL", "KEY"), help="who is asked where calls should go")
    args = parser.parse_args(argv)
    dispatch = Dispatch(*args.dispatch) if args.dispatch else None
    standin = Standin(args.secret, host=args.host, port=args.port, sip_port=args.sip_port, dispatch=dispatch)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(standin))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
