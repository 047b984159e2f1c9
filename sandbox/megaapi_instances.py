"""The instances of one simulated MegaAPI host: those of the configuration, and those that a test adds."""

import hashlib
import io
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import segno

from sandbox.config import Config, MegaInstance
from sandbox.meta import JSON

CONNECTED = "connected"
DISCONNECTED = "disconnected"


@dataclass(eq=False)
class Instance:
    """One, as it is now.

    paired   whether it has a phone; a restart connects it again, a logout ends it
    """

    name: str
    key: str
    token: str
    status: str
    number: str
    webhook_url: str | None
    webhook_enabled: bool = True
    paired: bool = False
    flaps: float = 0.0  # seconds between one status and the other
    _code: str = field(default_factory=lambda: f"2@{secrets.token_urlsafe(96)}", repr=False)

    def __post_init__(self) -> None:
        self.paired = self.status == CONNECTED

    @property
    def is_connected(self) -> bool:
        return self.status == CONNECTED

    @property
    def jid(self) -> str:
        return f"{self.number}@s.whatsapp.net"

    @property
    def url(self) -> str | None:
        """Where its webhooks go now."""
        return self.webhook_url if self.webhook_url and self.webhook_enabled else None

    def becomes(self, status: str) -> bool:
        """Change the status; false when it was that already."""
        changed = self.status != status
        self.status = status
        self.paired = self.paired or status == CONNECTED
        return changed

    def log_out(self) -> None:
        self.status = DISCONNECTED
        self.paired = False
        self._code = f"2@{secrets.token_urlsafe(96)}"

    def qr(self) -> bytes:
        """A PNG to scan."""
        drawn = io.BytesIO()
        segno.make(self._code, error="l").save(drawn, kind="png", scale=4)
        return drawn.getvalue()

    def told(self) -> JSON:
        """As the API tells it. The user outlives a disconnect, and its id has a device suffix."""
        known: JSON = {"key": self.key, "status": self.status}
        if self.paired:
            known["user"] = {
                "id": f"{self.number}:12@s.whatsapp.net",
                "name": self.name,
                "lid": f"{lid(self.number)}:12@lid",
            }
        return known

    def shown(self) -> JSON:
        """For whoever controls the sandbox."""
        return {
            "name": self.name,
            "instance_key": self.key,
            "status": self.status,
            "number": self.number,
            "paired": self.paired,
            "webhook_url": self.webhook_url,
            "webhook_enabled": self.webhook_enabled,
            "flaps": self.flaps,
        }


class Instances:
    """All of them, by key."""

    def __init__(self) -> None:
        self._by_key: dict[str, Instance] = {}
        self._by_name: dict[str, Instance] = {}
        self._configured: dict[str, MegaInstance] = {}
        self._config: Config | None = None

    def __iter__(self) -> Iterator[Instance]:
        return iter(list(self._by_key.values()))

    def __len__(self) -> int:
        return len(self._by_key)

    def configure(self, config: Config) -> None:
        """Those whose entry in the file is new or another begin afresh, those that are gone from it go."""
        if config is self._config:
            return
        self._config = config
        configured = {one.instance_key: one for one in config.megaapi.instances}
        for key in self._configured.keys() - configured.keys():
            self._by_key.pop(key, None)
        for key, one in configured.items():
            if self._configured.get(key) != one:
                self._by_key[key] = _made(one)
        self._configured = configured
        self._name()

    def get(self, key: str) -> Instance | None:
        return self._by_key.get(key)

    def find(self, name: str) -> Instance | None:
        """By name or key."""
        return self._by_key.get(name) or self._by_name.get(name)

    def add(self, one: MegaInstance) -> Instance:
        """Raises ValueError when its name or key is taken."""
        if self.find(one.name) or self.find(one.instance_key):
            raise ValueError(f"there is an instance {one.name!r} already")
        made = self._by_key[one.instance_key] = self._by_name[one.name] = _made(one)
        return made

    def remove(self, instance: Instance) -> None:
        self._by_key.pop(instance.key, None)
        self._by_name.pop(instance.name, None)

    def remove_added(self) -> None:
        """All that are not in the file."""
        self._by_key = {key: one for key, one in self._by_key.items() if key in self._configured}
        self._name()

    def by_status(self) -> dict[str, int]:
        return dict(sorted(Counter(one.status for one in self._by_key.values()).items()))

    def _name(self) -> None:
        self._by_name = {one.name: one for one in self._by_key.values()}


def lid(digits: str) -> str:
    """What WhatsApp calls that number where it hides it; always the same, and 15 digits."""
    return str(10**14 + int.from_bytes(hashlib.sha256(digits.encode()).digest()[:6]) % (9 * 10**14))


def _made(one: MegaInstance) -> Instance:
    return Instance(one.name, one.instance_key, one.token, one.status, one.number, one.webhook_url)
