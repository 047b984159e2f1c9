"""What goes wrong on purpose: faults that a test sets, and which of them meet a call.

A call meets the first fault set that fits it, and every `latency` that fits it besides. Of the faults of sending,
kinds whose name ends in `_after` (and `empty`, `drip`, `huge`, `gzip`, `failed_status`) concern calls that Graph
accepts: only the answer is spoiled. All others but `latency` keep the call from being accepted. Those of media
(`resolve_…`, `download_…`, `upload_…`) are met by requests that would be served; an upload is kept all the same, but
for a `code`. `sandbox.kinds` has a line about each.
"""

import itertools
import time
from dataclasses import dataclass
from random import Random
from typing import Annotated, Generic, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from sandbox.kinds import KINDS, place
from sandbox.meta import JSON
from sandbox.rules import Share

BEFORE = frozenset({"code", "hang_before", "reset_before", "garbage_before", "html", "redirect", "outage"})
"""Kinds that keep a call from being accepted."""


class AnyFault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A fault of any provider, as it is asked for.

    to           only this recipient
    share, seed  the share of the fitting calls that meet it, drawn with this seed
    count        ends after so many calls
    seconds      ends after this time
    http         the status of what is answered instead
    ms           of a `latency`, and between the pieces of a `drip`
    bytes        how many come, or are claimed, before it goes wrong
    location     where a redirect leads
    retry_after  seconds, a header of what is refused
    """

    kind: str
    to: Annotated[str, Meta(min_length=1, max_length=140)] | None = None
    share: Share = 1.0
    seed: int = 0
    count: Annotated[int, Meta(ge=1)] | None = None
    seconds: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    http: Annotated[int, Meta(ge=200, le=599)] | None = None
    ms: Annotated[int, Meta(ge=0, le=3_600_000)] = 100
    bytes: Annotated[int, Meta(ge=0, le=2**40)] | None = None
    location: Annotated[str, Meta(min_length=1, max_length=2_000, pattern=r"^[!-~]+$")] | None = None
    retry_after: Annotated[int, Meta(ge=0)] | None = None

    @property
    def only(self) -> str | None:
        """The one channel it concerns."""
        raise NotImplementedError

    def is_at(self, at: str) -> bool:
        """Whether calls of this place can meet it."""
        raise NotImplementedError


class SetFault(AnyFault, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One of Meta's.

    kind         a key of `sandbox.kinds.KINDS`
    channel      only this channel; else all
    to           digits with or without a plus, or a BSUID; of media, a media id
    code, subcode, http, details   of a `code`; code also of a `failed_status`, http also of a page or a status
    bytes        of a `download_…`
    location     also the URL of a `resolve_elsewhere`
    """

    channel: str | None = None
    code: Annotated[int, Meta(ge=0)] | None = None
    subcode: int | None = None
    details: Annotated[str, Meta(max_length=10_000)] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"there is no fault {self.kind!r}; there are {', '.join(KINDS)}")

    @property
    def only(self) -> str | None:
        return self.channel

    def is_at(self, at: str) -> bool:
        return self.kind == "outage" or place(self.kind) == at


F = TypeVar("F", bound=AnyFault)


@dataclass
class Fault(Generic[F]):
    """One that is set, and how often it was met."""

    id: int
    asked: F
    ends_at: float | None  # on the monotonic clock
    rng: Random
    met: int = 0

    @property
    def is_over(self) -> bool:
        asked = self.asked
        return (asked.count is not None and self.met >= asked.count) or (
            self.ends_at is not None and time.monotonic() >= self.ends_at
        )

    def fits(self, channel: str | None, to: str | None) -> bool:
        asked = self.asked
        return asked.only in (None, channel) and (
            asked.to is None or (to is not None and asked.to.lstrip("+") == to.lstrip("+"))
        )

    def meets(self) -> bool:
        """Whether the next fitting call meets it; counts if so."""
        if self.asked.share < 1 and self.rng.random() >= self.asked.share:
            return False
        self.met += 1
        return True


class AnyMet(NamedTuple, Generic[F]):
    """What awaits one call."""

    fault: F | None
    latency: float  # seconds


Met = AnyMet[SetFault]


class FaultList(Generic[F]):
    """Those that are set, in their order."""

    def __init__(self) -> None:
        self._faults: list[Fault[F]] = []
        self._ids = itertools.count(1)

    def set(self, asked: F) -> Fault[F]:
        ends_at = None if asked.seconds is None else time.monotonic() + asked.seconds
        fault = Fault(next(self._ids), asked, ends_at, Random(asked.seed))  # noqa: S311 - test data
        self._faults.append(fault)
        return fault

    def clear(self) -> None:
        self._faults.clear()

    def meet(self, channel: str | None, to: str | None, *, at: str = "send", only: str | None = None) -> AnyMet[F]:
        """What the next call to this recipient of this channel meets; `only` asks for no other kind.

        `at` is the place (`sandbox.kinds.place`), and the recipient there a media id.
        """
        if not self._faults:
            return AnyMet(None, 0.0)
        self._forget()
        first: F | None = None
        latency = 0.0
        for fault in self._faults:
            asked = fault.asked
            is_latency = asked.kind.endswith("latency")
            if only not in (None, asked.kind) or (first is not None and not is_latency):
                continue
            if asked.is_at(at) and fault.fits(channel, to) and fault.meets():
                if is_latency:
                    latency += asked.ms / 1000
                else:
                    first = asked
        return Met(first, latency)

    def shown(self) -> list[JSON]:
        self._forget()
        return [{"id": fault.id, **msgspec.to_builtins(fault.asked), "met": fault.met} for fault in self._faults]

    def _forget(self) -> None:
        self._faults = [fault for fault in self._faults if not fault.is_over]


class Faults(FaultList[SetFault]):
    """Meta's."""
