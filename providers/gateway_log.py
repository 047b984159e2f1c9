"""A gateway's log: bytes in, findings out (baileys-sessions.md §1, §2).

What counts are the records that Baileys writes, one per message (`failed to decrypt message`), never text in other
fields. What libsignal prints beside them names no message and no session, but it says what the record hides: a block
with any `MessageCounterError` belongs to a message that was delivered twice. Blocks and records are matched by the
Signal address in their stacks, in their order. That a message was decrypted after all, no log tells (§3).

Whatever comes, memory is bounded: lines, records and joined lines up to 64 KiB, blocks and what waits for one up to a
distance in bytes. Nothing of a line is kept but ids, addresses and causes: lines may hold private keys (X16).
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, NamedTuple, TypeAlias

from providers import jid
from providers.gateway_lines import PHRASES, Line, from_json, head, moment, on_a_day, pretty_fields, unwrap
from providers.undecrypted import BENIGN, Cause, cause_of

LONGEST = 64 * 1024
"""Bytes of a line, a record or a joined line; longer ones are passed over and counted."""

LOOK_BACK = 512 * 1024
"""A reader that begins this far before a byte knows there what one that began at the start knows."""

FIELDS = ("whatsappId", "session", "sessionId", "instance", "instanceName", "sessionName", "connectionId")
"""Where gateways write the session, if they do, when nobody says where."""

_NEEDLES = (
    *PHRASES, b"session error:", b"stream errored out", b"connection errored", b"connection.update",
    b"messagestubparameters",
)  # fmt: skip
_SAID = tuple(phrase.decode() for phrase in PHRASES)
_OTHER_NEEDLES = tuple(needle.decode() for needle in _NEEDLES if needle not in PHRASES)
_PARTIAL = (b'","stream":"', b'\\n","stream":"')  # Docker splits what is longer than 16 KiB; a needle may be split too
_SLICE = 1024 * 1024
_WAIT = 16 * 1024  # bytes of log for which a record waits for its block; Docker may write one stream before the other
_OPEN = 128 * 1024  # … and for which a record or block may stay open
_BLOCKS = 256  # that wait for their record
_SOURCES = 64
_SESSIONS = 1024
_SAME_ID = 8  # records of one message, as each session that is in a group tells of it
_PATIENCE = timedelta(seconds=1)  # for which a record waits, or stays open, while other lines are being written
_SHORT = timedelta(minutes=5)  # what was written within it may as well have been written at once
_DAY = timedelta(days=1)
_SAME_END = 5.0  # seconds within which a connection's end is told by several lines

_FAILED = "failed to decrypt message"
_ENDS = ("stream errored out", "connection errored", "connection.update")
_STUB = "Message ignored with messageStubParameters: "
_TRACES = (
    ("connection terminated", 428),
    ("connection closed", 428),
    ("connection was lost", 408),
    ("timed out", 408),
    ("qr refs attempts ended", 408),
    ("restart required", 515),
)
_LOUD = {"WARN", "ERROR", "FATAL"}
_OWN_WORDS = (  # that may stand before one of the phrases
    " error err warn warning fatal sessionerror prekeyerror messagecountererror uncaught unhandled exception rejection "
    "session whatsapp wbot baileys libsignal signal whatsappid t z am pm utc gmt mon tue wed thu fri sat sun "
    "jan feb mar apr may jun jul aug sep oct nov dec "
)
_OTHERS_TEXT = ("http/", "get /", "post /", "put /", "://", "body", "text:", "caption", "mensagem")
_OTHERS_FIELDS = ("body", "text", "caption", "conversation")
_SAME_CHAT = ("remoteJid", "previousRemoteJid", "remoteJidAlt", "senderPn", "senderLid")

ME = "me"
"""The participant of a message that another device of the session's own account wrote: it is no contact's."""

RECORD, CONSOLE, DETAIL, WEAK, NO_CHAT, OTHER_TEXT = "record", "console", "detail", "weak", "no_chat", "other_text"
"""What a matching line turned out to be: see `LogReader.matched`."""


class Failure(NamedTuple):
    """A message that could not be decrypted. Benign causes are told too: nobody counts them."""

    session: str | None
    jid: str
    participant: str
    message_id: str
    cause: Cause
    at: datetime
    byte: int

    @property
    def is_benign(self) -> bool:
        return self.cause in BENIGN


class Weak(NamedTuple):
    """A line with one of the phrases and a session, and no message: at most one per second and session."""

    session: str
    at: datetime
    byte: int


class Ended(NamedTuple):
    """A connection ended with this code (§6)."""

    session: str | None
    code: int
    at: datetime
    byte: int


Finding: TypeAlias = Failure | Weak | Ended


class Backlog(NamedTuple):
    """Bytes before `until` were written while nobody looked: after `since`, and the last of them at `written`, which
    lines that tell a time of day alone call `clock` (`last_clock`)."""

    until: int
    since: datetime
    written: datetime
    clock: time | None


@dataclass(slots=True)
class _Block:
    """What libsignal printed for one message: the contact's address, and what stands in it."""

    byte: int
    since: datetime
    address: str | None = None
    is_counter: bool = False
    is_ahead: bool = False
    is_open: bool = True
    started: int = 0  # the byte of the last `Session error:`, and what it says
    says_counter: bool = False
    says_ahead: bool = False


@dataclass(slots=True)
class _Slot:
    """A place in the order of what is told. `block`, or `people` for one that has not come, is what it waits for."""

    byte: int
    since: datetime
    is_done: bool = False
    is_told: bool = False
    finding: Finding | None = None
    block: _Block | None = None
    address: str | None = None
    people: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Open:
    """Lines of one source that belong together and are not all here yet."""

    slot: _Slot
    kind: str  # `join`, `pretty` or `stub`
    heard: datetime
    name: str = ""  # the record's message
    at: datetime | None = None
    fields: dict[str, Any] | None = None
    line: Line | None = None
    lines: list[str] = field(default_factory=list)
    size: int = 0

    def add(self, text: str) -> None:
        self.size += len(text)
        if self.size <= LONGEST:
            self.lines.append(text)
        else:
            self.lines.clear()


class LogReader:
    """Reads one log, from `begin` on.

    `attribute` is the field of a record that names the session, or `prefix` for the name before the bar; without it the
    known ones are tried. `session` says it of all records but those that name another (`is_other`). `day` is for files
    whose lines tell a time of day or none: then times without a zone are UTC; without it (a log that is being written)
    such lines are stamped on arrival.
    """

    def __init__(
        self, *, attribute: str | None = None, session: str | None = None, begin: int = 0, day: date | None = None
    ) -> None:
        self._attribute, self._session, self._day = attribute, session, day
        self._weak_key = f"{attribute if attribute and attribute != 'prefix' else 'whatsappId'}="
        self.matched: Counter[str] = Counter()
        """Lines with one of the phrases, by what they turned out to be."""
        self.too_long = 0
        """Lines, records and joined lines that were passed over."""
        self._base = begin  # the byte of the first that is in `_rest`
        self._byte = begin  # of the line that is read
        self._backlog: Backlog | None = None
        self._rest = bytearray()
        self._is_cut = False  # in the middle of a line that is too long
        self._now = datetime.now(UTC)
        self._last: datetime | None = None
        self._queue: deque[_Slot] = deque()
        self._waiting: list[_Slot] = []
        self._blocks: deque[_Block] = deque()
        self._open_blocks: OrderedDict[str, _Block] = OrderedDict()
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._weak: OrderedDict[str, int] = OrderedDict()
        self._ends: OrderedDict[str | None, tuple[int, datetime]] = OrderedDict()
        self._told_of: OrderedDict[str, deque[_Slot]] = OrderedDict()  # the last records, by message
        self._given: _Slot | None = None

    @property
    def offset(self) -> int:
        """The byte before which everything is told, and nothing from it on."""
        return self._queue[0].byte if self._queue else self._base

    def feed(self, chunk: bytes, now: datetime) -> list[Finding]:
        """What is found in these bytes, together with those before."""
        self._now = now
        told: list[Finding] = []
        for start in range(0, len(chunk), _SLICE):
            self._rest += chunk[start : start + _SLICE]
            self._read()
            told += self._told()
        return told + self._overdue()

    def fell_behind(self, backlog: Backlog) -> None:
        """What comes before `backlog.until` is no news: such lines are not stamped on arrival. Those whose time cannot
        be reckoned are dated a day before, where nobody counts them, unless all were written within minutes."""
        self._backlog = backlog

    def settle(self, now: datetime) -> list[Finding]:
        """Nothing more came for a while: what is open ends here, except for a line without its end."""
        self._now = now
        for source in list(self._open):
            if self._open[source].kind != "join":
                self._close(source)
        for source in list(self._open_blocks):
            self._close_block(source)
        for slot in list(self._waiting):
            self._decide(slot)
        return self._told()

    def _overdue(self) -> list[Finding]:
        """A log that is never silent does not settle: what has waited for too long is told as it is."""
        if not (self._open or self._open_blocks or self._waiting):
            return []
        before = self._now - _PATIENCE
        for source in [one for one, it in self._open.items() if it.kind != "join" and it.heard < before]:
            self._close(source)
        for source in [one for one, block in self._open_blocks.items() if block.since < before]:
            self._close_block(source)
        for slot in [slot for slot in self._waiting if slot.since < before]:
            self._decide(slot)
        return self._told()

    def finish(self, now: datetime) -> list[Finding]:
        """The end of the file: also a line without its end counts."""
        self._now = now
        if self._rest or self._is_cut:
            self._rest += b"\n"
            self._read()
            self._base -= 1
        for source in list(self._open):
            self._close(source)
        return self.settle(now)

    # ------------------------------------------------------------------------------------------------------- lines

    def _read(self) -> None:
        """Take the whole lines out of what came."""
        end = self._rest.rfind(b"\n") + 1
        start = 0
        if self._is_cut and end:
            start = self._rest.index(b"\n") + 1
            self._is_cut = False
        if end > start:
            self._lines(bytes(self._rest[start:end]), self._base + start)
        if not self._is_cut and len(self._rest) - end > LONGEST:
            self._is_cut = True
            self.too_long += 1
            end = len(self._rest)
        if self._is_cut:
            end = len(self._rest)
        del self._rest[:end]
        self._base += end

    def _lines(self, text: bytes, base: int) -> None:
        """Whole lines. While nothing is open, those that hold nothing of interest are jumped over."""
        lower = text.lower()
        long = list(_long_lines(text))
        self.too_long += len(long)
        hits = _Hits(lower)
        at = 0
        while at < len(text):
            if long and at >= long[0][0]:
                at = long.pop(0)[1]
                continue
            if not (self._open or self._open_blocks or self._waiting):
                hit = hits.next_from(at)
                if hit < 0:
                    return
                start = text.rfind(b"\n", at, hit) + 1 or at
                if long and start >= long[0][0]:
                    at = long.pop(0)[1]
                    continue
            else:
                start = at
            end = text.index(b"\n", start) + 1
            self._expire(base + start)
            self._line(unwrap(text[start : end - 1]), base + start)
            at = end

    def _line(self, line: Line, byte: int) -> None:
        """One line; those that were split are joined first."""
        started = self._open.get(line.source)
        if started is not None and started.kind == "join":
            started.add(line.text)
            if not line.is_partial:
                del self._open[line.source]
                self._joined(started, line)
        elif line.is_partial:
            # What was open in this source goes on after it: a split line is no part of it.
            self._close(line.source)
            self._start(_Open(self._slot(byte), "join", self._now, at=line.at), line.source).add(line.text)
        else:
            self._text(line, byte)

    def _joined(self, whole: _Open, last: Line) -> None:
        if whole.size > LONGEST:
            self.too_long += 1
            whole.slot.is_done = True
            return
        self._given = whole.slot
        self._text(last._replace(text="".join(whole.lines), at=whole.at or last.at), whole.slot.byte)
        if self._given is not None:
            self._given.is_done, self._given = True, None

    def _text(self, line: Line, byte: int) -> None:
        self._byte = byte
        lower = line.text.lower()
        is_match = _holds(lower, _SAID)
        kind = self._kind(line, byte, is_match or _holds(lower, _OTHER_NEEDLES))
        if is_match:
            self.matched[kind] += 1

    def _kind(self, line: Line, byte: int, is_of_interest: bool) -> str:
        """Read one line; returns what it is."""
        text = line.text
        if (started := self._open.get(line.source)) is not None:
            if text[:1].isspace() or (started.kind == "stub" and text[:1] in "}]"):
                started.add(text)
                started.heard = self._now
                if started.kind == "stub" and text[:1] in "}]":
                    self._close(line.source)
                return DETAIL
            self._close(line.source)
        block = self._open_blocks.get(line.source)
        if block is not None and text.lstrip().startswith("at "):
            self._frame(block, text, line.source)
            return CONSOLE
        if text.startswith("Session error:"):
            self._session_error(line.source, text, byte)
            return CONSOLE
        self._close_block(line.source)
        if text.startswith("Failed to decrypt message with any known session"):
            self._start_block(line.source, byte)
            return CONSOLE
        if not is_of_interest:
            return OTHER_TEXT
        if text.startswith("    "):
            return DETAIL
        if text.startswith("{"):
            fields = from_json(text.rstrip().encode("utf-8", "replace"))
            return self._json(line, byte, fields) if isinstance(fields, dict) else OTHER_TEXT
        if (start := text.find(_STUB)) >= 0 and _is_evolution(text[:start]):
            record = _Open(self._slot(byte), "stub", self._now, at=self._moment(line, None), line=line)
            self._start(record, line.source)
            record.add(text[start + len(_STUB) :])
            if text.rstrip().endswith("}"):
                self._close(line.source)
            return RECORD
        if (found := head(text)) is not None:
            return self._pretty(line, byte, found.level, found.at, found.message, found.fields)
        return self._weakly(line, text, byte, self._moment(line, None))

    # ----------------------------------------------------------------------------------------------------- records

    def _json(self, line: Line, byte: int, fields: dict[str, Any]) -> str:
        said = fields.get("msg")
        if not isinstance(said, str):
            return OTHER_TEXT
        at = self._moment(line, moment(fields.get("time")))
        if (name := _bare(said)) == _FAILED or name in _ENDS:
            slot = self._slot(byte)
            self._record(slot, name, line, fields, said, at)
            return RECORD if name == _FAILED and (not slot.is_done or slot.finding is not None) else NO_CHAT
        if name == "transaction failed, rolling back":
            return DETAIL
        level = fields.get("level")
        is_loud = isinstance(level, int) and level >= 40 and not any(name in fields for name in _OTHERS_FIELDS)
        return self._weakly(line, said, byte, at) if is_loud else OTHER_TEXT

    def _pretty(
        self, line: Line, byte: int, level: str, said: datetime | time | None, message: str, fields: Any
    ) -> str:
        at = self._moment(line, said)
        if (name := _bare(message)) != _FAILED and name not in _ENDS:
            return self._weakly(line, message, byte, at) if level in _LOUD else OTHER_TEXT
        record = _Open(self._slot(byte), "pretty", self._now, name, at, {**(fields or {}), "msg": message}, line)
        self._start(record, line.source)
        return RECORD

    def _start(self, record: _Open, source: str) -> _Open:
        while len(self._open) >= _SOURCES:
            self._close(next(iter(self._open)))
        self._open[source] = record
        return record

    def _close(self, source: str) -> None:
        """The lines of this source that belong together are all here."""
        record = self._open.pop(source, None)
        if record is None:
            return
        if record.size > LONGEST or record.line is None:
            self.too_long += record.size > LONGEST
            record.slot.is_done = True
        elif record.kind == "pretty":
            fields = {**pretty_fields(record.lines), **(record.fields or {})}
            self._record(record.slot, record.name, record.line, fields, str(fields["msg"]), record.at)
        else:
            self._stub(record)

    def _record(
        self, slot: _Slot, name: str, line: Line, fields: dict[str, Any], said: str, at: datetime | None
    ) -> None:
        at = at or self._now
        session = self._whose(fields, said, line)
        if name == _FAILED:
            error = fields.get("err")
            self._failed(slot, session, fields, error if isinstance(error, dict) else {"message": error}, at)
            return
        slot.is_done = True
        code = _code(name, fields)
        before = self._ends.get(session)
        if code is None or (before and before[0] == code and abs((at - before[1]).total_seconds()) <= _SAME_END):
            return
        _remember(self._ends, session, (code, at))
        slot.finding = Ended(session, code, at, slot.byte)

    def _failed(
        self, slot: _Slot, session: str | None, fields: dict[str, Any], error: dict[str, Any], at: datetime
    ) -> None:
        """A record of a message that failed. When its text hides the cause, it waits for the block that tells."""
        slot.is_done = True
        key = fields.get("key")
        key = key if isinstance(key, dict) else {}
        chat, id_ = _address(key.get("remoteJid")), key.get("id")
        if chat is None or not isinstance(id_, str) or not 0 < len(id_) <= 128 or not id_.isprintable():
            return
        participant = _address(key.get("participant")) if chat.endswith("@g.us") else None
        if key.get("fromMe") is True:
            participant = ME
        text = error.get("message")
        cause = cause_of(text if isinstance(text, str) else "")
        if "MessageCounterError" in (error.get("type"), error.get("name")):
            cause = Cause.DUPLICATE
        slot.finding = Failure(session, chat, participant or "", id_, cause, at, slot.byte)
        _remember(self._told_of, id_, self._told_of.get(id_) or deque(maxlen=_SAME_ID))
        self._told_of[id_].append(slot)
        if cause is not Cause.RATCHET:
            return
        stack = error.get("stack")
        slot.address = next(_frames(stack.split("\n")), None) if isinstance(stack, str) else None
        if slot.address is None:
            told = [key.get(name) for name in ("remoteJid", "remoteJidAlt", "participant", "participantAlt")]
            slot.people = frozenset(filter(None, map(_user, [*told, fields.get("author"), fields.get("sender")])))
        slot.is_done = False
        slot.block = self._block_of(slot)
        if slot.block is None or slot.block.is_open:
            self._waiting.append(slot)
        else:
            self._decide(slot)

    def _stub(self, record: _Open) -> None:
        """Evolution's words for a message that it drops: a stub as Baileys emits it, without the session."""
        found = from_json("\n".join(record.lines).rstrip().encode("utf-8", "replace"))
        parameters = found.get("messageStubParameters") if isinstance(found, dict) else None
        if not isinstance(parameters, list) or not parameters or record.line is None:
            record.slot.is_done = True
            return
        session = self._whose(found, "", record.line)
        key = found.get("key")
        if not self._is_told(key if isinstance(key, dict) else {}, session, record.slot):
            self._failed(record.slot, session, found, {"message": parameters[0]}, record.at or self._now)

    def _is_told(self, key: dict[str, Any], session: str | None, stub: _Slot) -> bool:
        """Whether Baileys' own record told of a stub's message, a moment ago and perhaps under its chat's other name.
        What it does not say, the session, the stub may add; its cause stays what its block makes of it."""
        id_ = key.get("id")
        slots = self._told_of.get(id_, ()) if isinstance(id_, str) else ()
        told = [(slot, slot.finding) for slot in slots if isinstance(slot.finding, Failure)]
        told = [(slot, found) for slot, found in told if _is_of_chat(found.jid, key)]
        if not told:
            return False
        if session is None or any(found.session == session for _, found in told):
            stub.is_done = True
            return True
        for slot, found in told:
            if found.session is None and not slot.is_told:
                slot.finding = found._replace(session=session)
                stub.is_done = True
                return True
        done = next((found for slot, found in told if slot.is_done), None)
        if done is None:
            return False
        stub.finding, stub.is_done = done._replace(session=session, byte=stub.byte), True
        return True

    def _weakly(self, line: Line, text: str, byte: int, at: datetime | None) -> str:
        """Evidence without a message: a phrase that begins what an error says, and the session beside it."""
        session = _named(text, self._weak_key)
        if session is None or not _is_said(text, f"{self._weak_key}{session}"):
            return OTHER_TEXT
        at = at or self._now
        second = int(at.timestamp())
        if self._weak.get(session) != second:
            _remember(self._weak, session, second)
            slot = self._slot(byte)
            slot.finding, slot.is_done = Weak(session, at, byte), True
        return WEAK

    def _whose(self, fields: dict[str, Any], said: str, line: Line) -> str | None:
        """The session of a record, where all are of one: that, unless it names another."""
        named = self._attributed(fields, said, line)
        return named if self._session is None or (named and is_other(named, self._session)) else self._session

    def _attributed(self, fields: dict[str, Any], said: str, line: Line) -> str | None:
        """The session that a record names."""
        if self._attribute == "prefix":
            return line.service or None
        for name in (self._attribute,) if self._attribute else FIELDS:
            value: Any = fields
            for part in name.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            if isinstance(value, str) and 0 < len(value) <= 64 and value.isprintable():
                return value
        if self._attribute in (None, "session") and said.strip().startswith("session:"):  # WAHA's `messageFormat`
            return said.strip()[len("session:") :].partition(" - ")[0][:64] or None
        if self._attribute in (None, "instance", "instanceName"):
            return _evolution_name(line.text)
        return None

    def _moment(self, line: Line, said: datetime | time | None) -> datetime | None:
        """When a line was written, as far as it is sure; None means now."""
        at = said if said is not None else line.at
        if at is None or (self._day is None and (isinstance(at, time) or at.tzinfo is None)):
            if line.at and line.at.tzinfo:
                return line.at
            return self._reckoned(at.time() if isinstance(at, datetime) else at)
        is_reckoned = isinstance(at, time)
        if isinstance(at, time):
            at = on_a_day(at, self._day, self._last) if self._day is not None else None
        elif at.tzinfo is None:
            at = at.replace(tzinfo=UTC)
        # A day that is far from the file's own is not what the times of day after it are reckoned from.
        if at is not None and (is_reckoned or self._day is None or at.toordinal() - self._day.toordinal() <= 2):
            self._last = at
        return at

    def _reckoned(self, clock: time | None) -> datetime | None:
        """When a line of a backlog was written, from its time of day or none; None for what is news."""
        late = self._backlog
        if late is None or self._byte >= late.until:
            return None
        if clock is not None and late.clock is not None and late.written - late.since < _DAY:
            before = timedelta(seconds=(_seconds(late.clock) - _seconds(clock)) % _DAY.total_seconds())
            return late.written - before if before < _DAY - _SHORT else late.written
        return late.since if late.written - late.since <= _SHORT else late.since - _DAY

    # ------------------------------------------------------------------------------------------- libsignal's blocks

    def _start_block(self, source: str, byte: int) -> _Block:
        self._close_block(source)
        while len(self._open_blocks) >= _SOURCES:
            self._close_block(next(iter(self._open_blocks)))
        self._open_blocks[source] = block = _Block(byte, self._now, started=byte)
        return block

    def _session_error(self, source: str, text: str, byte: int) -> None:
        """One stored session of the contact did not open the message."""
        block = self._open_blocks.get(source) or self._start_block(source, byte)
        block.started, block.since = byte, self._now
        block.says_counter = "MessageCounterError" in text
        block.says_ahead = "Over 2000 messages into the future" in text
        if block.address is None:
            block.is_counter |= block.says_counter
            block.is_ahead |= block.says_ahead

    def _frame(self, block: _Block, text: str, source: str) -> None:
        """A frame of its stack: one of them is named after the contact."""
        address = next(_frames([text]), None)
        if address is None:
            return
        if block.address is None:
            block.address = address
            self._blocks.append(block)
            if len(self._blocks) > _BLOCKS:
                self._blocks.popleft()
            self._offer(block)
        elif block.address != address:  # of another contact, and what began it is missing
            counter, ahead = block.says_counter, block.says_ahead
            new = self._start_block(source, block.started)
            new.is_counter, new.is_ahead = counter, ahead
            self._frame(new, text, source)
        else:
            block.is_counter |= block.says_counter
            block.is_ahead |= block.says_ahead

    def _close_block(self, source: str) -> None:
        block = self._open_blocks.pop(source, None)
        if block is None:
            return
        block.is_open = False
        for slot in list(self._waiting):
            if slot.block is block:
                self._decide(slot)

    def _block_of(self, slot: _Slot) -> _Block | None:
        """Take the first block of this record's contact, if one has come."""
        for block in self._blocks:
            if _fits(block, slot):
                self._blocks.remove(block)
                return block
        return None

    def _offer(self, block: _Block) -> None:
        """A block that comes after its record."""
        for slot in self._waiting:
            if slot.block is None and _fits(block, slot):
                self._blocks.remove(block)
                slot.block = block
                return

    def _decide(self, slot: _Slot) -> None:
        """Tell a record's cause by its block, as far as that has come."""
        if slot in self._waiting:
            self._waiting.remove(slot)
        if slot.block is not None and isinstance(slot.finding, Failure):
            if slot.block.is_counter:
                slot.finding = slot.finding._replace(cause=Cause.DUPLICATE)
            elif slot.block.is_ahead:
                slot.finding = slot.finding._replace(cause=Cause.AHEAD)
        slot.is_done = True

    # -------------------------------------------------------------------------------------------------------- order

    def _slot(self, byte: int) -> _Slot:
        if self._given is not None:
            slot, self._given = self._given, None
            return slot
        slot = _Slot(byte, self._now)
        self._queue.append(slot)
        return slot

    def _expire(self, byte: int) -> None:
        """Bound what is open or waits, by how much of the log has come since."""
        while self._blocks and byte - self._blocks[0].byte > 2 * _OPEN:
            self._blocks.popleft()
        if self._queue and byte - self._queue[0].byte > _WAIT:
            for slot in [slot for slot in self._waiting if byte - slot.byte > _WAIT]:
                self._decide(slot)
            for source in [one for one, record in self._open.items() if byte - record.slot.byte > _OPEN]:
                self._close(source)
        while self._open_blocks and byte - next(iter(self._open_blocks.values())).byte > _OPEN:
            self._close_block(next(iter(self._open_blocks)))

    def _told(self) -> list[Finding]:
        """What is decided, in the order of the log."""
        told: list[Finding] = []
        while self._queue and self._queue[0].is_done:
            slot = self._queue.popleft()
            slot.is_told = True
            if slot.finding is not None:
                told.append(slot.finding)
        return told


def last_clock(text: bytes) -> time | None:
    """The time of day of the last line that tells no more than that; None without one, or where the last is sure."""
    for raw in reversed(text.split(b"\n")):
        line = unwrap(raw[:LONGEST])
        found = head(line.text)
        at = line.at or (found.at if found is not None else None)
        if isinstance(at, time):
            return at
        if at is not None:
            return at.time() if at.tzinfo is None else None
    return None


def is_other(named: str, session: str) -> bool:
    """Whether a name means another session than this one. A number says nothing of one that is known by a name."""
    return named != session and _kind_of(named) == _kind_of(session)


def _kind_of(name: str) -> str:
    return "id" if name.isdecimal() else "phone" if name.startswith("+") else "name"


class _Hits:
    """Where the next line of interest may be. Each needle is looked for once per place."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._next = dict.fromkeys(_NEEDLES, -2)
        self._partial = -2

    def next_from(self, at: int) -> int:
        """The first place from `at` on; -1 for none."""
        found = -1
        for needle, where in self._next.items():
            if where == -2 or 0 <= where < at:
                where = self._next[needle] = self._text.find(needle, at)
            if where >= 0 and (found < 0 or where < found):
                found = where
        if self._partial == -2 or 0 <= self._partial < at:
            self._partial = self._split_from(at)
        return self._partial if self._partial >= 0 and (found < 0 or self._partial < found) else found

    def _split_from(self, at: int) -> int:
        """The first envelope of Docker's from `at` on that holds only a part of a line."""
        mark, whole = _PARTIAL
        where = self._text.find(mark, at)
        while where >= 0:
            if self._text[where - 2 : where] != whole[:2]:
                return where
            where = self._text.find(mark, where + len(mark))
        return -1


def _holds(text: str, words: tuple[str, ...]) -> bool:
    for word in words:  # noqa: SIM110 - `any` takes three times as long, and this is done for each line
        if word in text:
            return True
    return False


def _long_lines(text: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of each line that is too long."""
    at = 0
    while len(text) - at > LONGEST + 1:
        end = text.rfind(b"\n", at, at + LONGEST + 1) + 1
        if not end:
            end = text.index(b"\n", at) + 1
            yield at, end
        at = end


def _bare(message: str) -> str:
    """A record's message without what gateways write before it (§1: Ticketz, WAHA)."""
    message = message.strip()
    if message.startswith("[") and (end := message.find("]: ", 0, 64)) > 0:
        return message[end + 3 :].strip()
    if message.startswith("session:") and (end := message.find(" - ", 0, 96)) > 0:
        return message[end + 3 :].strip()
    return message


def _code(name: str, fields: dict[str, Any]) -> int | None:
    """With what code a connection ended, as this record tells (§6)."""
    if name == "connection.update":
        found = fields.get("statusCode") if fields.get("connection") == "close" else None
    elif name == "connection errored":
        trace = str(fields.get("trace", "")).partition("\n")[0].lower()
        found = next((code for words, code in _TRACES if words in trace), None)
    else:
        node, reason = fields.get("fullErrorNode"), fields.get("reasonNode")
        attrs = node.get("attrs") if isinstance(node, dict) else None
        found = attrs.get("code") if isinstance(attrs, dict) else None
        if found is None and (isinstance(node, dict) or isinstance(reason, dict)):
            is_conflict = isinstance(reason, dict) and reason.get("tag") == "conflict"
            found = 440 if is_conflict else 500
    if isinstance(found, str) and found.isascii() and found.isdecimal() and len(found) == 3:
        found = int(found)
    return found if isinstance(found, int) and not isinstance(found, bool) and 400 <= found <= 599 else None


def _address(said: object) -> str | None:
    """A chat or person without a device, in the one spelling; None for stories, lists and what is none."""
    found = jid.parse(said) if isinstance(said, str) and len(said) <= 128 else None
    if found is None or found.kind not in ("phone", "lid", "group"):
        return None
    return f"{found.value}@{({'phone': 's.whatsapp.net', 'lid': 'lid', 'group': 'g.us'})[found.kind]}"


def _user(said: object) -> str | None:
    """The part of a Signal address before its domain and device."""
    found = jid.parse(said) if isinstance(said, str) and len(said) <= 128 else None
    return found.value if found is not None and found.kind in ("phone", "lid") else None


def _frames(lines: list[str]) -> Iterator[str]:
    """The Signal addresses that frames are named after: `<user>[_<domain>].<device> [as awaitable]`."""
    for line in lines:
        before, found, _ = line.partition(" [as awaitable]")
        if found and before.lstrip().startswith("at "):
            address = before.rsplit(" ", 1)[-1].removeprefix("Object.")
            user, dot, device = address.partition(".")
            if dot and user and len(user) <= 40 and device.isdecimal() and len(device) <= 5:
                yield address


def _fits(block: _Block, slot: _Slot) -> bool:
    """Whether a block is of a record's contact: by the address in its stack, else by the person."""
    if block.address is None:
        return False
    if slot.address is not None:
        return block.address == slot.address
    return block.address.partition(".")[0].partition("_")[0] in slot.people


def _is_of_chat(told: str, key: dict[str, Any]) -> bool:
    """Whether this chat may be that of a stub: under the same name, or under the other one that a person has. Evolution
    writes a stub after it has put a phone in the place of a `@lid`."""
    if told in [_address(key.get(name)) for name in _SAME_CHAT]:
        return True
    other = _address(key.get("remoteJid")) or ""
    return {told.partition("@")[2], other.partition("@")[2]} == {"lid", "s.whatsapp.net"}


def _seconds(clock: time) -> float:
    return clock.hour * 3600 + clock.minute * 60 + clock.second + clock.microsecond / 1e6


def _is_evolution(before: str) -> bool:
    """Whether this stands before a message of Evolution's logger, or nothing does."""
    return not before.strip() or "[Evolution API]" in before or before.rstrip().endswith("]")


def _evolution_name(text: str) -> str | None:
    """The instance in `[Evolution API] [name] v2.3.6 …`; most versions do not write it."""
    _, found, rest = text.partition("[Evolution API]")
    rest = rest.lstrip()
    if not found or not rest.startswith("["):
        return None
    name, found, rest = rest[1:].partition("]")
    return name if found and 0 < len(name) <= 64 and rest.lstrip()[:1] in ("v", "-") else None


def _named(text: str, key: str) -> str | None:
    """The whole value of `key=`: of `whatsappId=26` it is 26, and never 2."""
    at = text.find(key)
    while at >= 0:
        before = text[at - 1 : at]
        end = at + len(key)
        while end < len(text) and end - at - len(key) <= 64 and (text[end].isalnum() or text[end] in "_-"):
            end += 1
        value = text[at + len(key) : end]
        if 0 < len(value) <= 64 and value.isascii() and not (before.isalnum() or before in set("_-.?&%")):
            return value
        at = text.find(key, at + 1)
    return None


def _is_said(text: str, named: str) -> bool:
    """Whether the first of the phrases is what the line itself says: before it stand no words but those of errors and
    times, and the session (`named`); and it is not in quotes, in a request, or the text of somebody's message."""
    lower = text.lower()
    if any(mark in lower for mark in _OTHERS_TEXT):
        return False
    at = min((at for at in map(lower.find, _SAID) if at >= 0), default=-1)
    if at < 0:
        return False
    before = lower[:at].replace(named.lower(), " ").rstrip()
    words = "".join(one if one.isalpha() else " " for one in before).split()
    return before[-1:] not in ('"', "'", "`") and all(f" {word} " in _OWN_WORDS for word in words)


def _remember(known: "OrderedDict[Any, Any]", key: Any, value: Any) -> None:
    known[key] = value
    known.move_to_end(key)
    while len(known) > _SESSIONS:
        known.popitem(last=False)
