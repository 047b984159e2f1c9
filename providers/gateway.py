"""What a repair needs of a Baileys gateway, beside what every instance can do (`providers/instance.py`).

Each gateway speaks a dialect (`providers/baileys.py`); `abilities` says which steps of the ladder it can make without
a new QR code (baileys-sessions.md §5, §7).
"""

from typing import Literal, NamedTuple, Protocol

from providers.instance import Instance

Ability = Literal["restart", "stop", "refresh_contact"]
SessionLook = Literal["open", "connecting", "closed", "qr", "unknown"]


class Look(NamedTuple):
    """How a session stands, more closely than `Standing`: `qr` waits for a person with the phone, `closed` has no
    socket. `raw` is the gateway's own word."""

    state: SessionLook
    raw: str = ""


class Gateway(Instance, Protocol):
    """One session of a gateway. Each call ends within 15 seconds, may be repeated, and raises `InstanceFault` alone."""

    abilities: frozenset[Ability]

    async def look(self) -> Look:
        """How the session stands now."""

    async def health(self) -> None:
        """Return if the gateway itself is well."""

    async def stop(self) -> None:
        """Close the socket with the pairing kept. Ability `stop`."""

    async def start(self) -> None:
        """Open the socket again, with the pairing that is there."""

    async def refresh_contact(self, jid: str) -> None:
        """Have a fresh Signal session with this contact made from our side. Ability `refresh_contact`."""
