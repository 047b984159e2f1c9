"""Logs of Baileys gateways: what files tell of sessions, and the process that follows logs as they are written."""

import gzip
import sys
import zlib
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

from pombal import garbage
from pombal.cli import as_json, say, table
from pombal.cli.admin import Refused
from pombal.errors import PombalError, Rejected
from pombal.settings import settings
from providers.baileys_dialects import normal_base
from providers.gateway_log import RECORD, Ended, Failure, Finding, LogReader, Weak
from providers.undecrypted import Cause

_CHUNK = 1024 * 1024
_REASONS = {
    "console": "libsignal's own lines, several per message",
    "detail": "more lines of a record",
    "duplicate": "a message that was delivered twice",
    "repeated": "a message that was told before",
    "absent": "a message without anything to decrypt",
    "weak": "a session, and no message",
    "no_chat": "of no chat: stories, newsletters, or no message id",
    "other_text": "the words in somebody's text, a request, or another tool's line",
}


class Unreadable(PombalError):
    """A log that cannot be opened."""


class Told:
    """What logs tell of one session. Messages count once, however often they are told."""

    def __init__(self) -> None:
        self.failed: dict[tuple[str, str], datetime] = {}
        self.healed: set[tuple[str, str]] = set()
        self.duplicates: set[tuple[str, str]] = set()
        self.weak_at: list[datetime] = []
        self.ends: Counter[int] = Counter()

    def add(self, failure: Failure) -> str:
        """Count it; returns `counted`, or why it is not. A message that is delivered twice has been decrypted once."""
        message = (failure.jid, failure.message_id)
        if failure.cause is Cause.DUPLICATE:
            if message in self.failed:
                self.healed.add(message)
            self.duplicates.add(message)
            return "duplicate"
        if failure.is_benign:
            return "absent"
        if message in self.failed or message in self.duplicates:
            return "repeated"
        self.failed[message] = failure.at
        return "counted"

    def most_within(self, window: timedelta) -> int:
        return _most_within(self.failed.values(), window)

    def is_over(self, threshold: int, window: timedelta) -> bool:
        """Whether so many fail within one window, and do not heal, that a repair would begin."""
        unhealed = [at for message, at in self.failed.items() if message not in self.healed]
        return max(_most_within(unhealed, window), _most_within(self.weak_at, window)) > threshold

    def shown(self, window: timedelta) -> dict[str, int]:
        return {
            "failed_messages_distinct": len(self.failed),
            "healed_by_retry": len(self.healed),
            "failed_unhealed": len(self.failed) - len(self.healed),
            "duplicate_deliveries_benign": len(self.duplicates),
            f"max_failed_distinct_in_{int(window.total_seconds())}s": self.most_within(window),
        }


def _most_within(times: Iterable[datetime], window: timedelta) -> int:
    most = 0
    recent: deque[datetime] = deque()
    for at in sorted(times):
        recent.append(at)
        while at - recent[0] > window:
            recent.popleft()
        most = max(most, len(recent))
    return most


class Scan:
    """The tally over any number of logs."""

    def __init__(self) -> None:
        self.sessions: dict[str | None, Told] = {}
        self.lines: Counter[str] = Counter()
        self.matched = 0
        self.too_long = 0

    def read(self, file: IO[bytes], reader: LogReader) -> None:
        now = datetime.now(UTC)
        while chunk := file.read(_CHUNK):
            self._add(reader.feed(chunk, now))
        self._add(reader.finish(now))
        self.matched += reader.matched.total()
        self.too_long += reader.too_long
        self.lines.update(reader.matched)

    def _add(self, found: list[Finding]) -> None:
        for one in found:
            told = self.sessions.setdefault(one.session, Told())
            if isinstance(one, Failure):
                self.lines[told.add(one)] += 1
            elif isinstance(one, Weak):
                told.weak_at.append(one.at)
            elif isinstance(one, Ended):
                told.ends[one.code] += 1

    def not_counted(self) -> dict[str, int]:
        """Matching lines that counted for nothing, by the reason."""
        counts = {reason: self.lines[reason] for reason in _REASONS}
        told = sum(self.lines[outcome] for outcome in ("counted", "duplicate", "repeated", "absent"))
        counts["no_chat"] += max(self.lines[RECORD] - told, 0)
        return {reason: count for reason, count in counts.items() if count}


def scan(given: Namespace) -> int:
    """What logs tell of each session. Needs no database, and prints no contact and no message."""
    result = Scan()
    for name in given.logs:
        try:
            for file, day in _opened(name):
                result.read(file, LogReader(attribute=given.attribute, session=given.channel, day=day.date()))
        except (OSError, EOFError, zlib.error) as error:
            raise Unreadable(f"{name}: {getattr(error, 'strerror', None) or 'not a whole gzip file'}") from None
    window, threshold = settings().require_error_window(), settings().threshold_errors
    sessions = {name: told for name, told in sorted(result.sessions.items(), key=lambda one: str(one[0]))}
    counted = result.lines["counted"]
    if given.json:
        as_json(
            {
                "sessions": {name: told.shown(window) for name, told in sessions.items() if name is not None},
                "unattributed": sessions.get(None, Told()).shown(window),
                "over_threshold": [name for name, told in sessions.items() if name and told.is_over(threshold, window)],
                "ends": {name or "": dict(sorted(told.ends.items())) for name, told in sessions.items() if told.ends},
                "lines": {
                    "matched": result.matched,
                    "counted": counted,
                    "not_counted": result.not_counted(),
                    "too_long": result.too_long,
                },
            }
        )
        return 0
    rows = [_row(name, told, window, threshold) for name, told in sessions.items()]
    table(rows, empty="no message failed to decrypt")
    if rows:
        say("healed: at least; a log of level error tells nothing of messages that arrive after all")
    say(f"lines that match {result.matched}, messages that count {counted}")
    for reason, count in result.not_counted().items():
        say(f"  not counted: {count} ({reason}: {_REASONS[reason]})")
    if result.too_long:
        say(f"  passed over: {result.too_long} longer than 64 KiB")
    return 0


def _row(name: str | None, told: Told, window: timedelta, threshold: int) -> dict[str, object]:
    is_over = name is not None and told.is_over(threshold, window)  # what is of no session opens nothing
    failed, healed, unhealed, duplicates, most = told.shown(window).values()
    return {
        "session": "(none named)" if name is None else name,
        "failed": failed,
        "healed": healed,
        "unhealed": unhealed,
        "duplicates": duplicates,
        f"most in {int(window.total_seconds())} s": most,
        "weak": len(told.weak_at),
        f"over {threshold}": "yes" if is_over else "no",
        "ended": ", ".join(f"{code} ({n})" if n > 1 else str(code) for code, n in sorted(told.ends.items())),
    }


def _opened(name: str) -> Iterator[tuple[IO[bytes], datetime]]:
    """A log, and when it was last written: its lines may tell a time of day alone."""
    if name == "-":
        yield sys.stdin.buffer, datetime.now(UTC)
        return
    with Path(name).open("rb") as file:
        written = datetime.fromtimestamp(Path(name).stat().st_mtime, UTC)
        if name.endswith(".gz"):
            with gzip.open(file) as unpacked:
                yield unpacked, written  # type: ignore[misc] # reads bytes like any other
        else:
            yield file, written


def follow(given: Namespace) -> int:
    """Follow logs until SIGTERM or SIGINT. Waits for files, and for the database, as long as it takes; without any log,
    as where the Procfile's GATEWAY_LOGS is not set, for its end."""
    from pombal.cli.fleet import _ready

    _ready("follower_starting")
    if given.tenant is not None:
        _require_tenant(given.tenant)
    if given.gateway is not None:
        try:
            normal_base(given.gateway)
        except Rejected as error:
            raise Refused(f"--gateway: {error}") from None
    from workers._follower import Wanted, main

    garbage.settled()
    # Who starts a Procfile's line without a shell hands the variable's name on.
    logs = [one for one in given.logs if one != "$GATEWAY_LOGS"]
    if not logs:
        say("no log to follow: GATEWAY_LOGS has none")
    return main(
        logs,
        Wanted(
            attribute=given.attribute,
            channel=given.channel,
            gateway=given.gateway,
            tenant=given.tenant,
            name=given.name,
            from_start=given.from_start,
        ),
    )


def _require_tenant(slug: str) -> None:
    """Raises `Refused` when there is none of this name. A database that is away is waited for, later."""
    from sqlalchemy.exc import DBAPIError

    from models import Tenant
    from pombal import db

    try:
        with db.session() as s:
            if s.scalars(Tenant.by_slug(slug)).first() is None:
                raise Refused(f"--tenant: there is no tenant {slug}")
    except DBAPIError as error:
        if not db.is_store_trouble(error):
            raise
