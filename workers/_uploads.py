"""Files that go up before the messages that name them: which, for whom, and their bytes on the way.

A message whose file the provider does not have stays queued and is *set aside* while the file goes up, so that its lane
goes on with others and a process that dies leaves nothing in doubt. One upload per content serves all who wait for it.
Not a queue, hence the underscore.
"""

import asyncio
from collections.abc import AsyncGenerator, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import RowMapping

from providers.storage import storage

AT_ONCE = 4  # of one lane
_MOST_WAITING = 2_000  # messages of one lane that are remembered; others come back by themselves
SET_ASIDE, SET_ASIDE_LONG = 20.0, 60.0  # seconds after which they do, if nobody brings them back, or remembers them


class Damaged(Exception):
    """The storage has other bytes than were put there."""


class Upload(NamedTuple):
    """A file to hand to the provider."""

    digest: bytes
    key: str
    mime_type: str
    size: int
    is_probe: bool  # of a lane that is held

    @classmethod
    def of(cls, row: RowMapping, *, is_probe: bool) -> "Upload":
        """From a row of `MediaUpload.of`."""
        return cls(row["digest"], row["key"], row["mime_type"], row["bytes"], is_probe)


class Waiter(NamedTuple):
    """A message that waits for a file, with what it takes to judge it by the upload's failure."""

    id: UUID
    attempt_id: UUID | None
    type: str
    tries: int
    throttles: int

    @classmethod
    def of(cls, row: RowMapping) -> "Waiter":
        return cls(row["id"], row["attempt_id"], row["type"], row["tries"], row["throttles"])


class Uploads:
    """Of one lane: what goes up, what is next, and who waits for it. Knows only what was committed."""

    def __init__(self) -> None:
        self._waiters: dict[bytes, dict[UUID, Waiter]] = {}
        self._next: dict[bytes, Upload] = {}
        self._under_way: dict[bytes, Upload] = {}

    @property
    def room(self) -> int:
        """How many more messages can be remembered."""
        return max(0, _MOST_WAITING - sum(len(waiters) for waiters in self._waiters.values()))

    def is_probing(self, but: Collection[Upload] = ()) -> bool:
        """Whether a file goes up, or will, to find out if the provider takes anything; `but` have come to their end."""
        return any(one.is_probe and one not in but for one in (*self._next.values(), *self._under_way.values()))

    def waiting_for(self, upload: Upload) -> list[Waiter]:
        return list(self._waiters.get(upload.digest, {}).values())

    def waiting(self) -> list[UUID]:
        """All messages that are set aside."""
        return [id_ for waiters in self._waiters.values() for id_ in waiters]

    def expect(self, upload: Upload, waiter: Waiter) -> None:
        """A message was set aside until this file is up; again, if it had been before."""
        self._waiters.setdefault(upload.digest, {})[waiter.id] = waiter
        if upload.digest not in self._under_way and (upload.is_probe or upload.digest not in self._next):
            self._next[upload.digest] = upload

    def begin(self, *, only_probes: bool) -> list[Upload]:
        """What shall go up now, the longest expected first."""
        free = AT_ONCE - len(self._under_way)
        begun = [upload for upload in self._next.values() if upload.is_probe or not only_probes][: max(0, free)]
        for upload in begun:
            self._under_way[upload.digest] = self._next.pop(upload.digest)
        return begun

    def ended(self, upload: Upload) -> None:
        """What came of it is committed; perhaps for the second time."""
        self._under_way.pop(upload.digest, None)
        self._waiters.pop(upload.digest, None)


async def chunks(key: str, size: int) -> AsyncGenerator[bytes, None]:
    """A stored file's bytes, read in a thread of its own. To be closed.

    Raises `Missing` and `StorageUnavailable`, and `Damaged` for a file of another size.
    """
    loop = asyncio.get_running_loop()
    thread = ThreadPoolExecutor(1, thread_name_prefix="upload")
    try:
        reading = await loop.run_in_executor(thread, lambda: storage().read(key))
        try:
            while chunk := await loop.run_in_executor(thread, next, reading, b""):
                size -= len(chunk)
                if size < 0:
                    raise Damaged
                yield chunk
        finally:
            thread.submit(reading.close)  # after the piece that it may be reading still
        if size:
            raise Damaged
    finally:
        thread.shutdown(wait=False)
