"""Simulated Baileys gateways on real sockets, for any test; webhooks go to `megaapi_servers.a_hook`."""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox import client
from sandbox.app import create_app
from sandbox.meta import JSON
from tests.sandbox.servers import serve

API_KEY = "baileys-key"


@dataclass
class Baileys:
    """A running stand-in. `url` is for `sandbox.client`; folders are `root`/gateway/session."""

    url: str
    root: Path

    def host(self, gateway: str) -> str:
        """The `host` of a channel."""
        return f"{self.url}/baileys/{gateway}"

    def folder(self, gateway: str, session: str) -> Path:
        return self.root / gateway / session

    def log(self, gateway: str) -> Path:
        """Where `gateway(…, logs=True)` writes."""
        return self.root / f"{gateway}.log"

    def gateway(self, name: str = "g1", dialect: str = "whaticket", *, logs: bool = False, **more: Any) -> JSON:
        if logs:
            more["log"] = str(self.log(name))
        given = {"root": str(self.root / name), "api_key": API_KEY, **more}
        return client.baileys_add(self.url, name, dialect, **given)

    def session(self, gateway: str, session: str, **more: Any) -> JSON:
        return client.baileys_add_session(self.url, gateway, session, **more)

    def look(self, gateway: str, session: str) -> JSON:
        return client.baileys_session(self.url, gateway, session)

    def state(self, gateway: str, session: str) -> str:
        state: str = self.look(gateway, session)["state"]
        return state

    def habits(self, gateway: str, session: str | None = None, **habits: Any) -> JSON:
        return client.baileys_habits(self.url, gateway, session, **habits)

    def end(self, gateway: str, session: str, code: int, **more: Any) -> JSON:
        return client.baileys_end(self.url, gateway, session, code, **more)

    def scan(self, gateway: str, session: str) -> JSON:
        return client.baileys_scan(self.url, gateway, session)

    def unpair(self, gateway: str, session: str) -> JSON:
        return client.baileys_unpair(self.url, gateway, session)

    def twin(self, gateway: str, session: str, running: bool = True, **more: Any) -> JSON:
        return client.baileys_twin(self.url, gateway, session, running, **more)

    def break_(self, gateway: str, session: str, what: str, **more: Any) -> JSON:
        return client.baileys_break(self.url, gateway, session, what, **more)

    def storm(self, gateway: str, session: str, kind: str, **plan: Any) -> int:
        """The storm's id."""
        id: int = client.baileys_storm(self.url, gateway, session, kind, **plan)["id"]
        return id

    def progress(self, storm: int) -> JSON:
        return client.baileys_storm_progress(self.url, storm)

    def stop_storm(self, storm: int | None = None) -> JSON:
        return client.baileys_stop_storm(self.url, storm)

    def say(self, gateway: str, session: str, text: str | None = None, **more: Any) -> JSON:
        return client.baileys_say(self.url, gateway, session, text, **more)

    def faults(self, kind: str, **more: Any) -> JSON:
        return client.baileys_faults(self.url, kind, **more)

    def calls(self, **only: Any) -> list[JSON]:
        calls: list[JSON] = client.baileys_calls(self.url, **only)["calls"]
        return calls

    def operations(self, gateway: str, session: str, *only: str) -> list[str]:
        """What was asked of a session, in order; only these operations, if any are named."""
        asked = [call["operation"] for call in self.calls(gateway=gateway, session=session)]
        return [one for one in asked if not only or one in only]

    def touches(self, gateway: str | None = None, session: str | None = None) -> list[JSON]:
        touches: list[JSON] = client.baileys_touches(self.url, gateway, session)["touches"]
        return touches

    def violations(self, gateway: str | None = None, session: str | None = None) -> list[JSON]:
        """Files that were touched while the socket lived."""
        return [one for one in self.touches(gateway, session) if one["kind"] == "touched_while_open"]

    def until(self, is_so: Callable[[], object], *, seconds: float = 10) -> None:
        """Wait until it is."""
        end, never = time.monotonic() + seconds, threading.Event()
        while not is_so():
            assert time.monotonic() < end, "it did not come to be so"
            never.wait(0.02)

    def is_open(self, gateway: str, session: str, *, seconds: float = 10) -> None:
        """Wait until a session is."""
        self.until(lambda: self.state(gateway, session) == "open", seconds=seconds)


@contextmanager
def a_baileys(*, root: Path | None = None) -> Iterator[Baileys]:
    """A stand-in without any gateway yet: there is no configuration, they are added through the control routes."""
    with tempfile.TemporaryDirectory() as folder, serve(create_app(Path(folder, "none.json"))) as address:
        yield Baileys(address, root or Path(folder, "sessions"))
