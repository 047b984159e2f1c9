"""What was asked of the simulated Meta about files, and what was given: the provider's own truth."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import msgspec

from sandbox.meta import JSON

MOST = 250_000  # events remembered; half of them are forgotten when there are more


class Event(msgspec.Struct, eq=False):
    """One request.

    n              counts from 1 and never starts again
    at             unix seconds at which it was read
    kind           resolve, download, upload, delete, or elsewhere: below the media host's paths, but not Meta's
    id             of the file; of an upload, the new one
    authorization  whether it brought that header
    http           the status line sent, None when none was
    answered       whether the whole HTTP answer was written while the client was still there
    bytes          of the file that were sent, or taken
    whole          whether they are all of it, and true
    code           Graph's error
    fault          the kind of fault it met
    path           of one that went elsewhere
    mime_type, sha256   of an upload
    """

    n: int
    at: float
    kind: str
    id: str | None
    authorization: bool
    channel: str | None = None
    http: int | None = None
    answered: bool = False
    bytes: int = 0
    whole: bool = False
    code: int | None = None
    fault: str | None = None
    path: str | None = None
    mime_type: str | None = None
    sha256: str | None = None


class MediaJournal:
    """The journal of one sandbox."""

    def __init__(self) -> None:
        self._last = 0
        self._open = 0
        self.clear()

    def clear(self) -> None:
        """Forget all; requests under way are no longer counted when they end."""
        self._events: list[Event] = []
        self._kinds: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._asked: Counter[str] = Counter()
        self._had: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    @contextmanager
    def event(self, kind: str, id: str | None, *, has_token: bool) -> Iterator[Event]:
        """A request was read; it is counted when it has ended."""
        self._last += 1
        event = Event(self._last, time.time(), kind, id or None, has_token)
        events = self._events
        events.append(event)
        if len(events) > MOST:
            del events[: MOST // 2]
        self._open += 1
        try:
            yield event
        finally:
            self._open -= 1
            if events is self._events:
                self._count(event)

    def _count(self, event: Event) -> None:
        self._kinds[event.kind] += 1
        self._bytes[event.kind] += event.bytes
        if event.fault is not None:
            self._faults[event.fault] += 1
        if event.kind == "resolve" and event.id:
            self._asked[event.id] += 1
        if event.kind == "download" and event.whole and event.id:
            self._had[event.id] += 1

    def counts_of(self, id: str) -> JSON:
        """How often that file was resolved, and downloaded as a whole."""
        return {"resolved": self._asked[id], "downloaded": self._had[id]}

    def listed(
        self, limit: int, *, kind: str | None = None, id: str | None = None, after: int | None = None
    ) -> list[Event]:
        """The latest `limit` events, or with `after` the first `limit` of those with a higher `n`; newest last."""

        def fits(event: Event) -> bool:
            return kind in (None, event.kind) and id in (None, event.id)

        if after is not None:
            return list(islice((event for event in self._events if event.n > after and fits(event)), limit))
        return list(islice((event for event in reversed(self._events) if fits(event)), limit))[::-1]

    def summary(self) -> JSON:
        """Counts of the requests that have ended since the last `clear`.

        files          how many different files were downloaded as a whole
        by_file_max    how often the one that was downloaded most was, as a whole
        bytes          sent by downloads, whole or not
        uploaded_bytes taken
        in_flight      requests that have not ended
        """
        return {
            "resolves": self._kinds["resolve"],
            "downloads": self._kinds["download"],
            "whole": self._had.total(),
            "files": len(self._had),
            "by_file_max": max(self._had.values(), default=0),
            "bytes": self._bytes["download"],
            "elsewhere": self._kinds["elsewhere"],
            "uploads": self._kinds["upload"],
            "uploaded_bytes": self._bytes["upload"],
            "deletes": self._kinds["delete"],
            "by_fault": dict(sorted(self._faults.items())),
            "in_flight": self._open,
        }
