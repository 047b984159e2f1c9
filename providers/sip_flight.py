"""How a request of an attempt gets to its registrar and an answer back: what both senders have in common."""

from collections.abc import Callable
from enum import StrEnum
from types import TracebackType
from typing import NamedTuple, Protocol, Self, TypeAlias

from providers.sip_message import Request, Response

# Called before anything is sent. Raises when this attempt is no longer ours to make.
Fence: TypeAlias = Callable[[], None]


class Trouble(StrEnum):
    """Why nothing came back (sip-registration.md §6)."""

    TEMPORARY = "temporary"  # silence, refused, DNS, connection lost
    PERMANENT = "permanent"  # a bad certificate, an address that may not be reached
    OURS = "ours"  # drachtio unreachable or misconfigured: says nothing about the account


class NotSent(Exception):
    """No final response came. `text` is fit for the account's error: who and what, without user or secret."""

    def __init__(self, trouble: Trouble, text: str, *, code: int | None = None) -> None:
        super().__init__(text)
        self.trouble, self.text, self.code = trouble, text, code


class Reply(NamedTuple):
    """A final response (status ≥ 200) that belongs to the request."""

    response: Response
    server: str  # who answered: `udp/192.0.2.1:5060`
    sent_at: float  # when the request was first sent to it, `time.monotonic()`
    local: str = "localhost"  # what a Contact that says `localhost` was sent with, or that itself if nobody can tell


class Flight(Protocol):
    """One attempt's way to its registrar. Requests of one attempt go to one server, once it has challenged us."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def exchange(self, request: Request) -> Reply:
        """The final response to this request. Raises `NotSent`, or whatever the fence raises."""
        ...
