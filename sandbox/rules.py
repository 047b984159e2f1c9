"""Meta's rules that a test switches on for one channel or for all: windows, rates, statuses, media, the ninth digit.

Everything is off at first, but the statuses and what holds for media. Sections are those of whatsapp-cloud-api.md.
"""

import re
import time
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sandbox.config import Channel
from sandbox.meta import JSON, user_id

WINDOW = 24 * 3600.0  # seconds since the customer's last message (§10)
PAIR_EVERY = 6.0  # seconds between messages from one number to one customer in the long run (§10)
PAIR_BURST = 45

DAY = 24 * 3600.0
URL_SECONDS = 300  # for which a URL of a file is good (§12)

Share = Annotated[float, Meta(ge=0, le=1)]
Lifetime = Annotated[float, Meta(ge=0, le=100 * DAY)]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]
_NINTH_DIGIT = re.compile(r"(55[0-9]{2})9?([0-9]{8})")
_AREAS_WITH_NINE = range(11, 29)


class StatusRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which statuses follow an accepted call, and how.

    delay       fewest and most seconds from one step to the next
    lost        share of the statuses that never come
    duplicates  share that come twice
    shuffle     each of the steps has its own time, so that they come in any order
    """

    words: tuple[Annotated[str, Meta(min_length=1, max_length=64)], ...] = ("sent", "delivered", "read")
    delay: tuple[Seconds, Seconds] = (0.05, 0.5)
    lost: Share = 0.0
    duplicates: Share = 0.0
    shuffle: bool = False


class Rules(NamedTuple):
    """What holds for one channel."""

    window: bool = False
    pair: bool = False
    rate: float | None = None  # accepted messages a second
    statuses: StatusRule = StatusRule()
    drop_ninth_digit: bool = False
    access_token: str | None = None  # instead of the one configured
    check_media: bool = True  # a file that is sent by its id must have been uploaded through the same number
    url_seconds: int = URL_SECONDS  # 0: it has run out as soon as it is told
    media_seconds: float = 7 * DAY  # for which the id of a received file is good, from its message on (§12)
    upload_seconds: float = 30 * DAY  # for which an uploaded one's is
    media_bytes: int | None = None  # the size of every file that customers send from now on; else a small one


class SetRules(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A request to change some of them; what is left out stays."""

    channel: str | None = None
    window: bool | UnsetType = UNSET
    pair: bool | UnsetType = UNSET
    rate: Annotated[float, Meta(gt=0, le=1_000_000)] | UnsetType | None = UNSET
    statuses: StatusRule | UnsetType = UNSET
    drop_ninth_digit: bool | UnsetType = UNSET
    access_token: str | UnsetType | None = UNSET
    check_media: bool | UnsetType = UNSET
    url_seconds: Annotated[int, Meta(ge=0, le=86_400)] | UnsetType = UNSET
    media_seconds: Lifetime | UnsetType = UNSET
    upload_seconds: Lifetime | UnsetType = UNSET
    media_bytes: Annotated[int, Meta(ge=1024, le=2**31)] | UnsetType | None = UNSET


class RuleBook:
    """The rules of every channel. The newest request wins, whether it was for one channel or for all."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._common = Rules()
        self._own: dict[str, dict[str, Any]] = {}
        self._known: dict[str, Rules] = {}

    def of(self, channel: str) -> Rules:
        known = self._known.get(channel)
        if known is None:
            known = self._known[channel] = self._common._replace(**self._own.get(channel, {}))
        return known

    def token(self, channel: Channel) -> str | None:
        """What a request for this channel must bring; None when any token will do."""
        own = self.of(channel.name).access_token
        return channel.access_token if own is None else own

    def set(self, asked: SetRules) -> None:
        given = {name: getattr(asked, name) for name in Rules._fields if getattr(asked, name) is not UNSET}
        self._known.clear()
        if asked.channel is not None:
            self._own.setdefault(asked.channel, {}).update(given)
            return
        self._common = self._common._replace(**given)
        for own in self._own.values():
            for name in given:
                own.pop(name, None)

    def shown(self) -> JSON:
        """The common rules and those of each channel that has its own; no tokens."""
        channels = {name: _shown(self.of(name)) for name, own in self._own.items() if own}
        return {"rules": _shown(self._common), "channels": channels}


def _shown(rules: Rules) -> JSON:
    return {name: msgspec.to_builtins(value) for name, value in rules._asdict().items() if name != "access_token"}


class Limits:
    """What Meta remembers of recent messages: open windows (§10), and how much each pair and number may still send."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._windows: dict[tuple[str, str], float] = {}
        self._pairs: dict[tuple[str, str], float] = {}
        self._numbers: dict[str, float] = {}

    def heard(self, phone_number_id: str, customer: str) -> None:
        """The customer wrote: the window opens, for both ways of writing a Brazilian number (§5)."""
        now = time.time()
        for form in _forms(customer):
            self._windows[phone_number_id, user_id(form)] = now

    def is_open(self, phone_number_id: str, user: str) -> bool:
        """`user` is a BSUID."""
        return self._windows.get((phone_number_id, user), 0.0) + WINDOW > time.time()

    def take_pair(self, phone_number_id: str, customer: str) -> bool:
        """One message to this customer; false when the pair has had too many."""
        return _take(self._pairs, (phone_number_id, customer), PAIR_EVERY, PAIR_BURST)

    def take_rate(self, phone_number_id: str, rate: float) -> bool:
        """One message of this number; false when it is over `rate` a second. One second's worth may come at once."""
        return _take(self._numbers, phone_number_id, 1 / rate, max(rate, 1.0))


def _take(full_at: dict[Any, float], key: object, every: float, burst: float) -> bool:
    """A token bucket of `burst`, one more each `every` seconds; it is kept as the moment when it will be full again."""
    now = time.monotonic()
    then = max(full_at.get(key, now), now) + every
    if then - now > burst * every + 1e-9:
        return False
    full_at[key] = then
    return True


def wa_id(digits: str, drop_ninth_digit: bool) -> str:
    """The canonical id of a phone number (§5): Brazilian numbers outside the areas 11 to 28 lose the ninth digit."""
    brazilian = _NINTH_DIGIT.fullmatch(digits) if drop_ninth_digit else None
    if brazilian is None or int(digits[2:4]) in _AREAS_WITH_NINE:
        return digits
    return brazilian[1] + brazilian[2]


def _forms(customer: str) -> tuple[str, ...]:
    brazilian = _NINTH_DIGIT.fullmatch(customer)
    return (brazilian[1] + brazilian[2], f"{brazilian[1]}9{brazilian[2]}") if brazilian else (customer,)
