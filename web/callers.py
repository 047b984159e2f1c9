"""Requests in flight with the same key share one look-up of it.

A look-up begins after all who share it have come, so a key that was revoked is still refused at once. Who is refused
is looked up alone, so that each refusal is counted and leaves its line.
"""

import asyncio
from typing import TypeAlias

from starlette.requests import Request

from web.errors import Failure
from web.signatures import Caller, caller

_Slot: TypeAlias = tuple[str, str]  # what was presented, and for which scope


class Callers:
    """For one event loop, so without a lock. At most one look-up of a key runs, and one waits to begin."""

    def __init__(self) -> None:
        self._running: dict[_Slot, asyncio.Task[Caller]] = {}
        self._waiting: dict[_Slot, asyncio.Task[Caller]] = {}

    async def get(self, request: Request, scope: str) -> Caller:
        """As `caller`: the tenant behind the request's key, or `Failure`."""
        slot = (request.headers.get("authorization", ""), scope)
        shared = self._waiting.get(slot)
        if shared is not None:
            try:
                return await asyncio.shield(shared)
            except Failure:
                return await caller(request, scope)
        mine = asyncio.create_task(self._look_up(slot, request, scope))
        mine.add_done_callback(_is_noted)
        self._waiting[slot] = mine
        return await asyncio.shield(mine)

    async def _look_up(self, slot: _Slot, request: Request, scope: str) -> Caller:
        while (before := self._running.get(slot)) is not None:
            await asyncio.wait({before})
        mine = self._running[slot] = self._waiting.pop(slot)
        try:
            return await caller(request, scope)
        finally:
            if self._running.get(slot) is mine:
                del self._running[slot]


def _is_noted(task: asyncio.Task[Caller]) -> None:
    """Whoever wanted to know may have left: an error is no news to the event loop then."""
    if not task.cancelled():
        task.exception()
