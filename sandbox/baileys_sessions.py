"""One session of a simulated Baileys gateway: its socket, its folder, and what comes in through it.

How it stands is derived from its files when the socket starts (`sandbox.baileys_keys`), and from what a test has it
do: habits, a twin, a version that WhatsApp refuses. What arrives while the socket is closed waits, as at WhatsApp.
"""

import asyncio
import io
import secrets
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import segno

from sandbox import baileys_lines as lines
from sandbox import baileys_words as said
from sandbox import megaapi_words as words
from sandbox.baileys_folder import Folder
from sandbox.baileys_keys import Failure, Keys
from sandbox.baileys_words import Ending, State
from sandbox.config import BaileysSession
from sandbox.meta import JSON

LOOK = 0.1  # seconds between two looks at the folder of a socket that lives
RECONNECT = 0.3  # seconds after which a gateway connects again by itself
FINAL = frozenset({401, 402, 403, 406, 411})  # ends after which it does not


class Habits(msgspec.Struct, forbid_unknown_fields=True):
    """What a session does wrong, until it is told otherwise.

    asks_qr_after_start  its next start and each after it ends with a QR code, whatever its files say
    hangs                calls about it are never answered
    slow_stop            seconds for which the socket lives on after a stop was accepted
    slow_start           seconds until a start has come to something
    stop_is_ignored      a stop is accepted, and nothing happens
    start_fails          a start is accepted, and the session stays closed
    """

    asks_qr_after_start: bool = False
    hangs: bool = False
    slow_stop: float = 0.0
    slow_start: float = 0.05
    stop_is_ignored: bool = False
    start_fails: bool = False


class Watch(Protocol):
    """Who wants to know what became of a message."""

    def failed(self, id: str, jid: str, failure: Failure) -> None: ...
    def decrypted(self, id: str, jid: str) -> None: ...
    def healed(self, id: str, jid: str) -> None: ...


@dataclass(eq=False)
class Incoming:
    """A message on its way in.

    person   JID of who wrote it, as its keys are filed; group: the chat, if it is one
    key      as it is told
    stub     it is told as undecryptable, with this text, and nothing is tried
    waits    seconds until the sender's answer to a retry receipt arrives
    entries  stored sessions of the contact, for the log
    retried  this is that answer
    """

    person: str
    key: JSON
    content: JSON
    name: str
    at: int
    group: str | None = None
    stub: Failure | None = None
    waits: float = 0.3
    entries: int = 1
    retried: bool = False
    media_url: str | None = None
    watch: Watch | None = None


class Outside(Protocol):
    """What a session needs of its gateway."""

    def emit(self, session: "Session", bodies: list[JSON]) -> Any: ...
    def print(self, session: "Session", entries: list[lines.Entry]) -> None: ...
    def print_ignored(self, session: "Session", message: JSON) -> None: ...
    def who(self, session: "Session") -> said.Who: ...


@dataclass(eq=False)
class Session:
    plan: BaileysSession
    dialect: said.Dialect
    version: str
    keys: Keys
    outside: Outside
    state: State = "closed"
    code: int | None = None  # of the last end
    habits: Habits = field(default_factory=Habits)
    refuses_version: bool = False
    twin_every: float | None = None  # another process takes the connection over, so often
    counts: dict[str, int] = field(default_factory=lambda: {"starts": 0, "stops": 0, "restarts": 0, "qrs": 0})
    ends: Counter[int] = field(default_factory=Counter)
    waiting: list[Incoming] = field(default_factory=list)
    heard: list[Incoming] = field(default_factory=list)  # what was decrypted lately
    settled: asyncio.Event = field(default_factory=asyncio.Event, repr=False)  # it is not connecting
    _code: str = ""  # the QR code's text
    _tasks: set[asyncio.Task[None]] = field(default_factory=set, repr=False)
    _socket: asyncio.Task[None] | None = None
    _closing: bool = False
    _start_again: bool = False

    @property
    def id(self) -> str:
        return self.plan.session

    @property
    def folder(self) -> Folder:
        return self.keys.folder

    @property
    def word(self) -> str:
        return said.state(self.dialect, self.state, self.code)

    def begin(self) -> None:
        """As it is when the stand-in starts."""
        if not self.keys.adopt() and self.plan.paired:
            self.keys.pair(self.plan.pre_keys)
        for n in range(self.plan.contacts):
            self.keys.know(words.jid(f"55119700{n:05}"))
        if self.plan.open and self.keys.pairing is not None and self.keys.log_in() == "open":
            self.state = "open"
            self._live()

    async def close(self) -> None:
        """The stand-in ends."""
        tasks = [*self._tasks, *([self._socket] if self._socket else [])]
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task

    # What the API asks

    def start(self) -> None:
        self.counts["starts"] += 1
        if self._closing:
            self._start_again = True
        elif self.state in ("closed", "qr"):
            self._connect(asked=True)

    def stop(self) -> None:
        self.counts["stops"] += 1
        if self.habits.stop_is_ignored:
            return
        if self.state == "closed":
            self._disconnect()  # it would have connected again
        elif self.habits.slow_stop:
            self._closing = True
            self.later(self.habits.slow_stop, self._stopped)
        else:
            self._stopped()

    def restart(self) -> None:
        self.counts["restarts"] += 1
        self._disconnect()
        self._connect(asked=True)

    def log_out(self) -> None:
        """The device is removed; the next start asks for a code."""
        self._disconnect()
        self.keys.pairing = None
        self.folder.empty()
        self._becomes("closed", Ending(401, True))

    def scan(self) -> None:
        """Somebody scans the code."""
        self._disconnect()
        self.habits.asks_qr_after_start = False
        self.keys.pair(self.plan.pre_keys)
        self._connect()

    def send(self, jid: str) -> None:
        """We write to a contact; who has no session gets one."""
        if not jid.endswith("@g.us"):
            self.keys.reach(jid)

    # What happens to it

    def end(self, code: int, *, reconnects: bool | None = None) -> None:
        """The connection ends with this code."""
        is_final = code in FINAL if reconnects is None else not reconnects
        self._disconnect()
        self.code = code
        self.ends[code] += 1
        self.outside.print(self, lines.ended(code))
        if code == 401:
            self.keys.pairing = None
            self.folder.empty()  # as gateways do with a pairing that is gone
        self._becomes("closed", Ending(code, is_final))
        if not is_final:
            self._socket = asyncio.create_task(self._reconnect())

    def meet_twin(self, every: float | None) -> None:
        """Another process runs with the same credentials, or has been told to stop."""
        self.twin_every = every
        if every is not None and self.state == "open":
            self.end(440)

    def qr(self) -> tuple[str, bytes] | None:
        """The code that waits to be scanned: its text, and a picture."""
        if self.state != "qr":
            return None
        drawn = io.BytesIO()
        segno.make(self._code, error="l").save(drawn, kind="png", scale=4)
        return self._code, drawn.getvalue()

    def receive(self, one: Incoming) -> Any:
        """A message arrives, is decrypted or not, and is told of; it waits while the socket is closed."""
        if self.state != "open":
            self.waiting.append(one)
            return None
        failure = one.stub
        if failure is None:
            opening = self.keys.retry if one.retried else self.keys.open
            failure = None if one.key["fromMe"] else opening(one.person, one.group)
        if failure is not None:
            return self._missed(one, failure)
        if one.retried:
            self.outside.print(self, lines.healed())
        self.heard = [*self.heard[-99:], one]
        if one.watch is not None:
            (one.watch.healed if one.retried else one.watch.decrypted)(one.key["id"], one.person)
        told = said.message(one.key, one.content, one.at, one.name)
        return self.outside.emit(self, said.upsert(self.outside.who(self), told, media_url=one.media_url))

    def repeat(self, one: Incoming) -> None:
        """The server delivers a message twice: benign, and the log looks as if it were not."""
        failure = Failure("SessionError", "No matching sessions found for message", "msg")
        self.outside.print(self, lines.duplicate(lines.Missed(one.key, failure, self._address(one)), self.version))
        if self.version == "7":
            self._tell_stub(one, failure)

    def later(self, seconds: float, what: Callable[[], object]) -> None:
        self.spawn(_after(seconds, what))

    def spawn(self, what: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def shown(self) -> JSON:
        self.folder.guard()
        return {
            "session": self.id,
            "name": self.plan.name,
            "number": self.plan.number,
            "state": self.state,
            "word": self.word,
            "code": self.code,
            "folder": str(self.folder.path),
            "registration_id": self.keys.registration_id,
            "paired": self.keys.pairing is not None,
            "waiting": len(self.waiting),
            "twin": self.twin_every is not None,
            "refuses_version": self.refuses_version,
            "habits": msgspec.to_builtins(self.habits),
            "ends": {str(code): n for code, n in self.ends.items()},
            **self.counts,
        }

    # The socket

    def _connect(self, *, asked: bool = False) -> None:
        if self._socket is not None and self._socket is not asyncio.current_task():
            self._socket.cancel()
        self._becomes("connecting")
        self._socket = asyncio.create_task(self._connecting(asked))

    async def _reconnect(self) -> None:
        await asyncio.sleep(RECONNECT)
        self._connect()

    async def _connecting(self, asked: bool) -> None:
        await asyncio.sleep(self.habits.slow_start)
        if self.habits.start_fails:
            self._becomes("closed", Ending(408, True))
            return
        if asked and self.habits.asks_qr_after_start:
            self.keys.pairing = None
            self.folder.empty()
        self.outside.print(self, lines.connected())
        found = self.keys.log_in()
        if found == "open" and self.refuses_version:
            self.end(405)
        elif found == "open":
            self._becomes("open")
            self._live()
        elif found == "refused":
            self.end(401)
        else:
            self.counts["qrs"] += 1
            self._code = f"2@{secrets.token_urlsafe(96)}"
            self._becomes("qr")
            self._live()

    def _live(self) -> None:
        self._socket = asyncio.create_task(self._living())
        arrived, self.waiting = self.waiting, []
        for one in arrived:
            self.receive(one)

    async def _living(self) -> None:
        """Look after the folder; a twin takes the connection away now and then."""
        lost_at = None if self.twin_every is None else time.monotonic() + self.twin_every
        while True:
            await asyncio.sleep(LOOK)
            self.folder.guard()
            if lost_at is not None and self.twin_every is not None and time.monotonic() >= lost_at:
                if self.state == "open":
                    self.end(440)
                    return
                lost_at = None

    def _disconnect(self) -> None:
        """The socket is gone, and its folder may be touched."""
        if self._socket is not None and self._socket is not asyncio.current_task():
            self._socket.cancel()
        self._socket = None
        self._closing = False
        self.folder.release()

    def _stopped(self) -> None:
        again, self._start_again = self._start_again, False
        self._disconnect()
        self.code = None
        self._becomes("closed", Ending(None, False))
        if again:
            self._connect(asked=True)

    def _becomes(self, state: State, ending: Ending | None = None) -> None:
        self.state = state
        if state == "connecting":
            self.settled.clear()
        else:
            self.settled.set()
        qr = self.qr()
        shown = None if qr is None else (qr[0], "data:image/png;base64," + _base64(qr[1]))
        if state == "open":
            self.code = None
        self.outside.emit(self, said.connection(self.outside.who(self), state, ending, shown))

    # Messages

    def _missed(self, one: Incoming, failure: Failure) -> Any:
        if one.watch is not None:
            one.watch.failed(one.key["id"], one.person, failure)
        missed = lines.Missed(one.key, failure, self._address(one), one.entries)
        self.outside.print(self, lines.missed(missed, self.version))
        if one.stub is None and not one.retried:
            self.outside.print(self, lines.retry_receipt(one.key, 1, one.name))
        if failure.heals:
            again = Incoming(**{**vars(one), "retried": True})
            self.later(one.waits, lambda: self.receive(again))
        return self._tell_stub(one, failure)

    def _tell_stub(self, one: Incoming, failure: Failure) -> Any:
        told = said.message(one.key, None, one.at, one.name, stub=failure.text)
        if self.dialect == "evolution":
            self.outside.print_ignored(self, told)
        return self.outside.emit(self, said.upsert(self.outside.who(self), told))

    @staticmethod
    def _address(one: Incoming) -> str:
        user, _, server = one.person.partition("@")
        return f"{user}{'_1' if server == 'lid' else ''}.0"


async def _after(seconds: float, what: Callable[[], object]) -> None:
    await asyncio.sleep(seconds)
    what()


def _base64(raw: bytes) -> str:
    return b64encode(raw).decode()
