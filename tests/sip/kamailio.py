"""A real registrar, Kamailio, on a free port; tests that want it are skipped where it is not installed."""

import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from pombal.supervisor import spawn

PASSWORD = "s3cret"
_CONFIG = Path(__file__).with_name("kamailio.cfg")
_PATIENCE = 60.0  # seconds
_PROGRAM = shutil.which("kamailio") or shutil.which("kamailio", path="/usr/sbin:/usr/local/sbin")

IS_INSTALLED = _PROGRAM is not None
needs_kamailio = pytest.mark.skipif(
    not IS_INSTALLED, reason="kamailio is not installed (Debian: apt-get install kamailio)"
)


class Bound(NamedTuple):
    """One binding. `ends` is a time of `time.time()`, a second more or less."""

    contact: str
    ends: float
    call_id: str
    cseq: int


class Kamailio:
    """Knows the accounts u0 to u49 with `PASSWORD`."""

    host = "127.0.0.1"

    def __init__(self, port: int) -> None:
        self.port = port
        self._http = httpx.Client(trust_env=False, timeout=5)

    def bindings(self) -> dict[str, list[Bound]]:
        """What its location table holds and has not expired, by user."""
        asked = {"jsonrpc": "2.0", "method": "ul.dump", "id": 1}
        answer = self._http.post(f"http://{self.host}:{self.port}/RPC", json=asked).raise_for_status().json()
        found: dict[str, list[Bound]] = {}
        for domain in answer["result"]["Domains"]:
            for record in domain["Domain"]["AoRs"]:
                bound = [_bound(one["Contact"]) for one in record["Info"]["Contacts"]]
                found[record["Info"]["AoR"]] = [one for one in bound if one is not None]
        return {user: bound for user, bound in found.items() if bound}

    def close(self) -> None:
        self._http.close()


def _bound(told: dict[str, Any]) -> Bound | None:
    if not isinstance(told["Expires"], int):  # `expired`, `deleted`
        return None
    return Bound(told["Address"], time.time() + told["Expires"], told["Call-ID"], told["CSeq"])


@contextmanager
def a_kamailio(
    *, algorithm: str = "MD5", most: int = 600, least: int = 0, port: int | None = None
) -> Iterator[Kamailio]:
    """One that grants `most` seconds at most, and answers 423 to who asks for less than `least`."""
    assert _PROGRAM is not None
    port = port or _free_port()
    given = {
        "SIP_PORT": port,
        "PASSWORD": f'"{PASSWORD}"',
        "ALGORITHM": f'"{algorithm}"',
        "MAX_EXPIRES": most,
        "MIN_EXPIRES": least,
    }
    with tempfile.TemporaryDirectory(prefix="kamailio-") as folder:
        words = [
            "-f",
            str(_CONFIG),
            "-DD",
            "-E",
            "-w",
            folder,
            "-Y",
            folder,
            "-P",
            f"{folder}/pid",
            "-m",
            "16",
            "-M",
            "4",
        ]
        words += [word for name, value in given.items() for word in ("-A", f"{name}={value}")]
        log = Path(folder, "log")
        with log.open("wb") as out:
            process = spawn([_PROGRAM, *words], death_signal=signal.SIGTERM, stdout=out, stderr=out)
        registrar = Kamailio(port)
        try:
            _wait_until_it_answers(registrar, process, log)
            yield registrar
        finally:
            registrar.close()
            process.terminate()
            process.wait(_PATIENCE)


def _wait_until_it_answers(registrar: Kamailio, process: "subprocess.Popen[bytes]", log: Path) -> None:
    last = time.monotonic() + _PATIENCE
    while True:
        try:
            registrar.bindings()
        except httpx.HTTPError:
            assert process.poll() is None, log.read_text(errors="replace")[-2000:]
            assert time.monotonic() < last, "kamailio does not answer"
            threading.Event().wait(0.05)
        else:
            return


def _free_port() -> int:
    """One that is free for UDP and TCP alike."""
    while True:
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", 0))
            try:
                udp.bind(tcp.getsockname())
            except OSError:
                continue
            return int(tcp.getsockname()[1])
