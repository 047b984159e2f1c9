"""The plain values of an instance, the same for every gateway: how it stands, its QR code, and why it did not say.

An instance is a gateway's session of WhatsApp Web for one number. What a gateway does not say clearly is *unknown*, and
unknown is not disconnected (architecture.md, decision 10).
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol

MOST_RAW = 200  # characters that are kept of a gateway's own word


class Standing(NamedTuple):
    """How an instance stands. `status` is None when the gateway's answer says neither; `raw` is its own word, or what
    stood in its place. `own_id` are the digits of the number that is logged in."""

    status: Literal["connected", "disconnected"] | None
    raw: str = ""
    own_id: str | None = None


class Picture(NamedTuple):
    """A QR code to scan, as it came: an image of at most 1 MiB whose type its bytes tell."""

    mime_type: str
    content: bytes


class Hook(NamedTuple):
    """Where a gateway delivers an instance's events."""

    url: str
    is_enabled: bool


class InstanceFault(Exception):
    """A call about an instance that brought no answer to use.

    `code` is one of `FAULTS` (it labels a metric), `text` is for the tenant and names no host, key or URL; `raw` is
    what came instead of an answer, cut. `is_transient`: another try may help. `wait`: seconds the other side wants to
    be left alone, 0 when it does not say.
    """

    def __init__(self, code: str, text: str, *, is_transient: bool = False, wait: float = 0.0, raw: str = "") -> None:
        super().__init__(f"{code}: {text}")
        self.code, self.text, self.is_transient, self.wait = code, text, is_transient, wait
        self.raw = raw[:MOST_RAW]


# What `InstanceFault.code` may be, and `channel.unknown_reason` beside `not_listed`, `odd_answer` and `not_reached`.
FAULTS = frozenset(
    {
        "timeout",
        "unreachable",  # no connection, or it broke
        "blocked_address",  # the host leads to an address that is not public
        "edge_blocked",  # a 403 of the edge in front of the gateway, in HTML: says nothing about the token
        "refused",  # the token
        "not_found",  # no such instance; or it was logged out (megaapi.md, "Still UNCONFIRMED")
        "throttled",
        "rejected",  # understood, and answered with an error
        "provider_error",  # 5xx
        "unreadable",  # not what was asked for
        "misconfigured",  # our own settings or secrets
    }
)


class Instance(Protocol):
    """One instance of a channel. Each call ends in time, may be repeated, and raises `InstanceFault` alone."""

    host: str  # whose calls are bounded together

    async def status(self, deadline: float) -> Standing:
        """How it stands, within so many seconds."""

    async def listed(self, deadline: float) -> Mapping[str, Standing]:
        """All instances of the host, by key. Only with a token of the host."""

    async def qr(self) -> Picture | None:
        """The QR code to scan now; None when somebody is logged in."""

    async def restart(self) -> None:
        """Connect anew, with the pairing kept."""

    async def logout(self) -> None:
        """End the pairing: it takes a new QR code to connect again."""

    async def hook(self) -> Hook:
        """Where its events go."""

    async def set_hook(self, url: str) -> None:
        """Have its events delivered to this URL."""
