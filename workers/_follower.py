"""Follows logs of Baileys gateways as they are written, and notes what they tell of channels' sessions.

`pombal session follow` runs it. One commit holds what was found and how far the log was read (`LogPosition`), so that
after a crash nothing is noted twice and nothing is missed; the place that a commit starts from is its fence against a
second follower and against a commit whose answer was lost.
"""

import glob
import os
import signal
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from models import Channel, ChannelKind, Tenant
from models.gateway_log import LogPosition, Sign
from models.session_error import SessionError
from pombal import db, log, metrics
from pombal.errors import PombalError, Rejected
from pombal.settings import settings
from providers.baileys_dialects import normal_base
from providers.gateway_log import LOOK_BACK, Backlog, Ended, Failure, Finding, LogReader, is_other, last_clock
from workers._log_files import Place, Tail
from workers.session_fixer import ring_fixer, take_note

_log = log.get()

POLL_SECONDS = 0.25
_CHUNK = 256 * 1024
_SETTLED = 1.0  # seconds without a new byte after which a record is taken for whole
_QUIET_BYTES = 4 * 1024 * 1024  # without a finding, the place is stored after so many bytes or so many seconds
_QUIET_SECONDS = 5.0
_KNOWN_FOR = 5.0  # seconds for which what sessions there are is remembered
_LONGEST_PAUSE = 5.0
_PROGRESS_SECONDS = 5.0
_UNKNOWN = 1_000  # values that are remembered as told
_LAPSE = 5.0  # seconds without a look after which what has come is no news
_SIGN_SECONDS = 5.0  # until it is said again how far logs were read
_SIGN_NEWS_SECONDS = 1.0  # … where one has just been caught up with
_LONG_AGO = timedelta(days=2)  # when what a log held before anybody followed it may have been written
_GONE_SECONDS = 300.0  # for which a deleted log of a pattern is held
_GONE = 64  # logs that were let go, and are remembered


class UnknownChannel(PombalError):
    """There is no such channel, or it has no session on a Baileys gateway."""


class Wanted(NamedTuple):
    """What logs are of: `attribute` is the field that names a session, `channel` (`TENANT/NAME`) says that all of it is
    one channel's. `gateway` and `tenant` narrow which channels are meant. `name` tells followers of equal paths apart.
    """

    attribute: str | None = None
    channel: str | None = None
    gateway: str | None = None
    tenant: str | None = None
    name: str = ""
    from_start: bool = False


class _Over(Exception):
    """We were told to stop."""


class _Moved(Exception):
    """Somebody else has read on in this log."""


class Target(NamedTuple):
    tenant_id: UUID
    channel_id: UUID
    session: str


class Targets:
    """Which channel a session's name means."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self.only: str | None = None
        """Of a log that serves one channel: its session."""
        self._known: dict[str, list[Target]] = {}
        self._read_at = -_KNOWN_FOR
        self._told: OrderedDict[str | None, None] = OrderedDict()

    def of(self, found: Finding) -> Target | None:
        """The channel; None when there is none, or more than one. Raises store errors."""
        age = time.monotonic() - self._read_at
        is_named = self._wanted.channel is None and found.session is not None
        if age > _KNOWN_FOR or (is_named and found.session not in self._known and age > POLL_SECONDS):
            self.read()
        if self._wanted.channel is not None:
            one = next((target for targets in self._known.values() for target in targets), None)
            # What a log of one session says of another's is not ours.
            named = found.session
            return one if one and (named in (None, self.only) or not is_other(named, one.session)) else None
        targets = self._known.get(found.session or "", [])
        return targets[0] if len(targets) == 1 else None

    def forget(self) -> None:
        self._read_at = -_KNOWN_FOR

    def unattributed(self, found: Finding) -> None:
        """Count what is of no channel, and say so once for each name."""
        metrics.session_errors_unattributed.inc()
        if found.session in self._told:
            return
        self._told[found.session] = None
        while len(self._told) > _UNKNOWN:
            self._told.popitem(last=False)
        several = len(self._known.get(found.session or "", []))
        _log.warning("session_of_no_channel", session=_veiled(found.session), channels=several)

    def read(self) -> None:
        """Look at the channels there are. Raises `UnknownChannel`, and store errors."""
        wanted = self._wanted
        tenant, _, name = (wanted.channel or "").rpartition("/")
        query = select(Channel.tenant_id, Channel.id, Channel.name, Channel.config).join(
            Tenant, Tenant.id == Channel.tenant_id
        )
        query = query.where(Channel.kind == ChannelKind.BAILEYS)
        if tenant or wanted.tenant:
            query = query.where(Tenant.slug == (tenant or wanted.tenant))
        if name:
            query = query.where(Channel.name == name)
        hosts = None if wanted.gateway is None else _meant(wanted.gateway)
        known: dict[str, list[Target]] = {}
        with db.session() as s:
            db.see_all(s)
            for row in s.execute(query):
                session = row.config.get("log_name") or row.config.get("session")
                host = row.config.get("host") or settings().backend_url
                if isinstance(session, str) and (hosts is None or _plain(host) in hosts):
                    known.setdefault(session, []).append(Target(row.tenant_id, row.id, session))
        if wanted.channel is not None and sum(map(len, known.values())) != 1:
            raise UnknownChannel(f"{wanted.channel} is not one channel on a Baileys gateway; give TENANT/NAME")
        if wanted.channel is not None and self.only is None:
            self.only = next(iter(known))
        self._known, self._read_at = known, time.monotonic()


def _plain(host: str) -> str:
    try:
        return normal_base(host)
    except Rejected:  # what a channel has is not what somebody types here
        return host.strip().rstrip("/").lower()


def _meant(gateway: str) -> set[str]:
    """The addresses that `--gateway` means: without a scheme, by any. Raises `Rejected`."""
    given = gateway.strip()
    return {normal_base(one) for one in ([given] if "://" in given else [f"https://{given}", f"http://{given}"])}


def _veiled(session: str | None) -> str | None:
    """What may be told of a name that no channel has: a short number, else a digest. It may be a phone number's, or
    what somebody wrote into a chat."""
    if session is None or (session.isdecimal() and len(session) <= 6):
        return session
    return f"name:{blake2b(session.encode('utf-8', 'replace'), digest_size=3).hexdigest()}"


def key_of(wanted: Wanted, path: Path | str) -> str:
    """What a log's place is stored under; without a path, how that of all logs begins."""
    whose = wanted.channel or wanted.attribute or ""
    return LogPosition.key(wanted.name, whose, wanted.tenant or "", wanted.gateway or "", str(path))


class Followed:
    """One log, and how far it is read."""

    def __init__(
        self,
        path: Path,
        wanted: Wanted,
        targets: Targets,
        is_over: Callable[[], bool],
        *,
        is_followed: Callable[[Path], bool] = lambda path: False,
        is_new: bool = False,
    ) -> None:
        self.path = path
        self.tail = Tail(path, is_followed)
        self._wanted, self._targets, self._is_over = wanted, targets, is_over
        self.key = key_of(wanted, path)
        self._reader = LogReader()
        # All that stood in the log at a moment is told; what is told up to a byte is all of another moment's.
        self._all_told_at: float | None = None
        self._ended: tuple[float, int] | None = None
        self._is_signed = False
        self._told_until = 0
        self._stored: tuple[int, int] | None = None
        self._stored_byte, self._stored_at = 0, time.monotonic()
        self._heard_at = time.monotonic()
        self._is_settled = True
        self._is_new = is_new  # it has come while we looked: all of it is news
        self._was_missing = False
        self._missing_since = self._looked_at = time.monotonic()
        self._read, self._said_at, self._wait_until = 0, time.monotonic(), 0.0

    def step(self) -> bool:
        """Read a piece of it, and note what that tells. Returns whether there may be more at once."""
        if time.monotonic() < self._wait_until:
            return False
        try:
            return self._step()
        except _Moved:
            _log.warning("log_is_followed_by_another", path=str(self.path))
            self.tail.close()
            self._wait_until = time.monotonic() + _LONGEST_PAUSE
        except OSError as error:
            _log.warning("log_not_readable", path=str(self.path), error=error.strerror)
            self.tail.close()
            self._wait_until = time.monotonic() + _LONGEST_PAUSE
        return False

    def _step(self) -> bool:
        if not self.tail.is_open:
            if not self._open():
                return False
        elif (lapse := time.monotonic() - self._looked_at) > _LAPSE:
            self._fell_behind(datetime.now(UTC) - timedelta(seconds=lapse))
        looked_at = time.monotonic()
        data = self.tail.read(_CHUNK)
        self._looked_at = time.monotonic()
        if self.tail.missed_since:
            self._fell_behind(self.tail.missed_since)
            self.tail.missed_since = None
        self._say_whether_missing()
        if self.tail.lost_at:
            _log.warning("log_lines_may_be_missing", path=str(self.path), why=self.tail.lost_at)
            self.tail.lost_at = None
        now = datetime.now(UTC)
        found: list[Finding] = []
        if data:
            self._heard_at, self._is_settled = time.monotonic(), False
            found = self._reader.feed(data, now)
            self._progress(len(data))
        elif not self._is_settled and time.monotonic() - self._heard_at >= _SETTLED:
            self._is_settled = True
            found = self._reader.settle(now)
        self._note([one for one in found if one.byte >= self._told_until])
        self._see_whether_all_is_told(looked_at)
        return bool(data)

    def _see_whether_all_is_told(self, looked_at: float) -> None:
        """The end of a log that is never silent is told a little later than it is reached."""
        if self.tail.is_at_end and self._is_settled:
            self._all_told_at, self._ended = looked_at, None
        elif self._ended and self._reader.offset >= self._ended[1]:
            self._all_told_at, self._ended = self._ended[0], None
        elif self.tail.is_at_end and self._ended is None:
            self._ended = looked_at, self.tail.end

    @property
    def has_come_to_its_end(self) -> bool:
        """Whether it is read to its end for the first time since it was opened, and nobody was told."""
        return self.tail.is_open and self._all_told_at is not None and not self._is_signed

    def sign(self, now: datetime, at: float) -> Sign | None:
        """How far it is read, if it is; `at` is the moment that the database calls `now`."""
        if not self.tail.is_open or self._stored is None:
            return None
        told_at = self._all_told_at
        self._is_signed = told_at is not None
        return Sign(self.key, *self._stored, now - timedelta(seconds=at - told_at) if told_at is not None else None)

    def _open(self) -> bool:
        with db.session() as s:
            row = s.get(LogPosition, self.key)
            place = Place(row.inode, row.offset, row.head) if row else None
            since = min(row.read_until, row.updated_at) if row else datetime.now(UTC) - _LONG_AGO
        at_end = not (self._wanted.from_start or self._was_missing or self._is_new)
        opened_at = time.monotonic()
        opened = self.tail.open(place, at_end=at_end, look_back=LOOK_BACK)
        if opened is None:
            self._say_whether_missing()
            return False
        begin, self._told_until = opened
        self._reader = LogReader(attribute=self._wanted.attribute, session=self._targets.only, begin=begin)
        if not (self._is_new or self._was_missing):
            self._fell_behind(since)
        self._is_new = False
        self._ended, self._is_signed = None, False
        self._all_told_at = opened_at if place is None and at_end else None
        self._stored = (place.inode, place.offset) if place else None
        self._stored_byte = -_QUIET_BYTES if place is None else self._told_until
        _log.info("log_followed", path=str(self.path), offset=self._told_until, bytes=self.tail.behind())
        self._note([])
        return True

    def _say_whether_missing(self) -> None:
        if self.tail.is_missing != self._was_missing:
            self._was_missing, self._missing_since = self.tail.is_missing, time.monotonic()
            if self._was_missing:
                _log.warning("log_missing", path=str(self.path))
            else:
                _log.info("log_is_back", path=str(self.path))

    def _fell_behind(self, since: datetime) -> None:
        """What is in the log now was written while nobody looked, since then."""
        written, text = self.tail.written()
        self._reader.fell_behind(Backlog(self.tail.end, since, min(written, datetime.now(UTC)), last_clock(text)))

    def is_gone(self) -> bool:
        """Whether it was deleted a while ago, and is read out."""
        if not self._was_missing or time.monotonic() - self._missing_since < _GONE_SECONDS:
            return False
        return not self.tail.is_open or (self._is_settled and self.tail.is_deleted and not self.tail.behind())

    def _progress(self, size: int) -> None:
        self._read += size
        if time.monotonic() - self._said_at >= _PROGRESS_SECONDS:
            if self._read > _QUIET_BYTES:
                _log.info("log_read", path=str(self.path), bytes=self._read, left=self.tail.behind())
            self._read, self._said_at = 0, time.monotonic()

    # ---------------------------------------------------------------------------------------------------- what is told

    def _note(self, found: list[Finding]) -> None:
        """Write down what was found, and how far was read."""
        byte = max(self._reader.offset, self._told_until)
        is_due = byte - self._stored_byte >= _QUIET_BYTES or (
            byte != self._stored_byte and time.monotonic() - self._stored_at >= _QUIET_SECONDS
        )
        if not found and not is_due:
            return
        place = self.tail.place(byte)
        if (place.inode, place.offset) != self._stored or found:
            rung = self._committed(place, found)
            self._stored = (place.inode, place.offset)
            for tenant_id, channel_id in sorted(rung):
                ring_fixer(tenant_id, channel_id)
        self._stored_byte, self._stored_at = byte, time.monotonic()

    def _committed(self, place: Place, found: list[Finding]) -> set[tuple[UUID, UUID]]:
        """Commit it, however long the database is away. Returns for whom to ring."""
        pause, away_since = POLL_SECONDS, None
        unknown = 3  # channels may be deleted between the look at them and the commit
        is_repeated = is_careful = False
        while True:
            try:
                rung = self._commit(place, found, is_repeated=is_repeated, is_careful=is_careful)
            except IntegrityError:
                unknown -= 1
                if not unknown:
                    raise
                self._targets.forget()
            except DataError as error:
                if is_careful:
                    raise
                is_careful = True
                _log.warning("finding_not_stored", path=str(self.path), error=log.described(error))
            except Exception as error:
                if not (db.is_store_trouble(error) or db.is_too_slow(error) or db.is_worth_rerunning(error)):
                    raise
                is_repeated = True
                if away_since is None:
                    away_since = time.monotonic()
                    _log.warning("database_away", error=log.described(error))
                self._wait(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
            else:
                if away_since is not None:
                    _log.info("database_back", seconds=round(time.monotonic() - away_since, 1))
                return rung

    def _commit(
        self, place: Place, found: list[Finding], *, is_repeated: bool, is_careful: bool
    ) -> set[tuple[UUID, UUID]]:
        mine = [(self._targets.of(one), one) for one in found]
        tenants = {target.tenant_id for target, _ in mine if target is not None}
        with db.session(tenants) as s:
            row = s.get(LogPosition, self.key, with_for_update=True)
            at = (row.inode, row.offset) if row else None
            if at != self._stored:
                if is_repeated and row is not None and Place(row.inode, row.offset, row.head) == place:
                    # It went through, and we never heard.
                    return {(target.tenant_id, target.channel_id) for target, _ in mine if target is not None}
                raise _Moved
            if row is None:
                row = LogPosition(path=self.key)
                if self._all_told_at is None:  # nobody knows yet since when something stands in it
                    row.read_until = func.now() - _LONG_AGO
                s.add(row)
            row.inode, row.offset, row.head = place
            row.updated_at = func.now()
            s.flush()
            rung = (_carefully if is_careful else _written)(
                s, self.key, [(of, one) for of, one in mine if of is not None]
            )
        for target, one in mine:
            if target is None:
                self._targets.unattributed(one)
        return rung

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._is_over():
                raise _Over
            time.sleep(min(POLL_SECONDS, max(end - time.monotonic(), 0)))


def _written(s: Session, log_key: str, found: Iterable[tuple[Target, Finding]]) -> set[tuple[UUID, UUID]]:
    """Note this log's findings in this transaction; returns the (tenant, channel) pairs with news."""
    errors: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    rung: set[tuple[UUID, UUID]] = set()
    for target, one in found:
        where = {"tenant_id": target.tenant_id, "channel_id": target.channel_id, "at": one.at, "source": "log"}
        if isinstance(one, Failure):
            if not one.is_benign:
                names = {"jid": one.jid, "participant": one.participant, "message_id": one.message_id}
                errors.append({**where, **names, "cause": str(one.cause), "log": log_key})
        elif isinstance(one, Ended):
            ends.append({**where, "code": one.code})
        elif SessionError.weak(s, target.tenant_id, target.channel_id, one.at, log_key):
            rung.add((target.tenant_id, target.channel_id))
    return rung | take_note(s, errors, ends)


def _carefully(s: Session, log_key: str, found: Iterable[tuple[Target, Finding]]) -> set[tuple[UUID, UUID]]:
    """The same one by one, without what the database refuses: no line of a log may keep the others from being told."""
    rung: set[tuple[UUID, UUID]] = set()
    for one in found:
        try:
            with s.begin_nested():
                rung |= _written(s, log_key, [one])
        except DataError:
            metrics.session_errors_unattributed.inc()
    return rung


class Follower:
    """Follows all logs that these names and patterns mean, until it is told to stop."""

    def __init__(self, patterns: list[str], wanted: Wanted, is_over: Callable[[], bool]) -> None:
        self._patterns, self._wanted, self._is_over = patterns, wanted, is_over
        self._targets = Targets(wanted)
        self._logs: dict[Path, Followed] = {}
        self._gone: deque[Tail] = deque(maxlen=_GONE)
        self._found_at = -1.0
        self._signed_at = -_SIGN_SECONDS
        self._deleted: list[str] = []  # keys of logs that were let go since then
        self._is_first = True

    def run(self) -> None:
        pause = POLL_SECONDS
        while not self._is_over():
            try:
                is_busy = self.step()
            except _Over:
                return
            except Exception as error:
                if not (db.is_store_trouble(error) or db.is_too_slow(error)):
                    raise
                _log.warning("follower_waits", error=log.described(error))
                self._pause(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
            else:
                pause = POLL_SECONDS
                if not is_busy:
                    self._pause(POLL_SECONDS)

    def step(self) -> bool:
        """One piece of each log. Returns whether there may be more at once."""
        if self._is_first:
            self._targets.read()
        if time.monotonic() - self._found_at >= 1:
            self._find()
        is_busy = False
        for followed in self._logs.values():
            is_busy |= followed.step()
            if self._is_over():
                break
        metrics.log_lag.set(sum(followed.tail.behind() for followed in self._logs.values()))
        is_news = any(followed.has_come_to_its_end for followed in self._logs.values())
        if time.monotonic() - self._signed_at >= (_SIGN_NEWS_SECONDS if is_news else _SIGN_SECONDS):
            self._sign()
        return is_busy

    def _sign(self) -> None:
        """Say how far logs are read, also where they are silent: a follower that is dead must not look like that."""
        self._signed_at = time.monotonic()
        try:
            with db.session() as s:
                now = s.scalars(select(func.now())).one()
                at = time.monotonic()  # later than `now`: nothing is said to be read that is not
                signs = [sign for followed in self._logs.values() if (sign := followed.sign(now, at))]
                LogPosition.sign(s, signs)
                LogPosition.let_go(s, [*self._deleted, *self._vanished(s)])
        except Exception as error:
            if not (db.is_store_trouble(error) or db.is_too_slow(error)):
                raise
            _log.warning("logs_not_signed", error=log.described(error))  # what was read stays so: it is said later
        else:
            self._deleted.clear()

    def _vanished(self, s: Session) -> list[str]:
        """The keys of a pattern's logs that were deleted while nobody followed. Where a pattern finds nothing at all,
        its folder may be out of reach."""
        patterns = [os.path.abspath(one) for one in self._patterns if glob.has_magic(one)]
        alive = [one for one in patterns if any(fnmatchcase(str(path), one) for path in self._logs)]
        known = LogPosition.to_follow(s, key_of(self._wanted, "")) if alive else []
        missing = [one for one in known if Path(one.file) not in self._logs and not os.path.exists(one.file)]
        return [one.path for one in missing if any(fnmatchcase(one.file, pattern) for pattern in alive)]

    def _find(self) -> None:
        """Logs that have come. A rotated file matches its pattern too, and is read already."""
        self._found_at = time.monotonic()
        self._let_go()
        for pattern in self._patterns:
            is_pattern = glob.has_magic(pattern)
            for name in sorted(glob.glob(pattern)) if is_pattern else [pattern]:
                path = Path(os.path.abspath(name))
                if path in self._logs or name.endswith(".gz"):
                    continue
                if is_pattern and not self._is_first and self._is_read(path):
                    continue
                self._logs[path] = Followed(
                    path,
                    self._wanted,
                    self._targets,
                    self._is_over,
                    is_followed=self._logs.__contains__,
                    is_new=is_pattern and not self._is_first,
                )
        if self._is_first and not self._logs:
            _log.warning("no_log_yet", patterns=len(self._patterns))
        self._is_first = False

    def _let_go(self) -> None:
        """Deleted logs that a pattern has found: where containers come and go, there are ever more."""
        named = {Path(os.path.abspath(one)) for one in self._patterns if not glob.has_magic(one)}
        for path in [path for path, followed in self._logs.items() if path not in named and followed.is_gone()]:
            followed = self._logs.pop(path)
            followed.tail.let_go()
            self._gone.append(followed.tail)
            self._deleted.append(followed.key)
            _log.info("log_let_go", path=str(path))

    def _is_read(self, path: Path) -> bool:
        try:
            return any(tail.knows(path) for tail in [*(one.tail for one in self._logs.values()), *self._gone])
        except OSError:
            return True  # once it may be read it is looked at again

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._is_over() and time.monotonic() < end:
            time.sleep(min(0.1, seconds))

    def close(self) -> None:
        for followed in self._logs.values():
            followed.tail.close()


def main(patterns: list[str], wanted: Wanted) -> int:
    """Follow until SIGTERM or SIGINT, then 0."""
    orders: list[int] = []

    def end(signum: int, frame: FrameType | None) -> None:
        orders.append(signum)  # nothing that locks: a handler may interrupt itself

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    publisher = metrics.Publisher().start()
    _log.info("follower_started", pid=os.getpid())
    follower = Follower(patterns, wanted, lambda: bool(orders))
    try:
        follower.run()
    finally:
        follower.close()
        publisher.stop()
    _log.info("follower_stopped")
    return 0
