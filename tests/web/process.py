"""A web process over real sockets, its log in a file, and raw connections for clients that misbehave."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import httpx

from pombal.supervisor import until
from sandbox import meta


class Door(Protocol):
    """Where and with which secret to post: a `Shop`, or one on another database."""

    @property
    def url(self) -> str: ...
    @property
    def app_secret(self) -> str: ...


START = 60.0  # seconds; generous, because the machine may be busy


def a_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def pombal(*arguments: str, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    command = [sys.executable, "-m", "pombal", *arguments]
    environment = {**os.environ, **(env or {})}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START, **options)


class Answer(NamedTuple):
    """What came back on a raw connection."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        code: str = json.loads(self.body)["error"]["code"]
        return code


class Wire:
    """A connection that sends exactly the bytes it is told to."""

    def __init__(self, port: int, timeout: float = 30.0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self._file = self.socket.makefile("rb")

    def send(self, data: bytes) -> Self:
        self.socket.sendall(data)
        return self

    def answer(self) -> Answer:
        """Read one answer. Raises `EOFError` when the connection ends without one."""
        line = self._file.readline()
        if not line:
            raise EOFError
        headers: dict[str, str] = {}
        while (header := self._file.readline().decode("latin-1").strip()) != "":
            name, _, value = header.partition(":")
            headers[name.lower()] = value.strip()
        return Answer(int(line.split()[1]), headers, self._file.read(int(headers.get("content-length", "0"))))

    def is_closed_by_peer(self) -> bool:
        """Wait for the end of the connection; false when it stays open for the whole timeout."""
        try:
            while self._file.read(65536):
                pass
        except TimeoutError:
            return False
        except ConnectionError:
            return True
        return True

    def close(self) -> None:
        self._file.close()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Web:
    """`python -m pombal web` on a port of its own."""

    def __init__(self, log: Path, env: Mapping[str, str] | None = None) -> None:
        self.port = a_port()
        self.log_file = log
        command = [sys.executable, "-m", "pombal", "web", "--host", "127.0.0.1", "--port", str(self.port)]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30, trust_env=False)

    def wait(self, path: str = "/ready", status: int = 200) -> Self:
        """Return when `path` answers with `status`."""
        assert until(lambda: self._says(path, status), time.monotonic() + START), self.log()
        return self

    def _says(self, path: str, status: int) -> bool:
        assert self.process.poll() is None, self.log()
        try:
            return self.http.get(path).status_code == status
        except httpx.TransportError:
            return False

    def post(self, shop: Door, raw: bytes, **headers: str) -> httpx.Response:
        """Post like Meta: signed, with the shop's secret."""
        signed = {"X-Hub-Signature-256": meta.sign(raw, shop.app_secret), "Content-Type": "application/json"}
        return self.http.post(shop.url, content=raw, headers=signed | headers)

    def wire(self, timeout: float = 30.0) -> Wire:
        return Wire(self.port, timeout)

    def ask(self, data: bytes, timeout: float = 30.0) -> Answer:
        """Send bytes on a connection of their own, and read one answer."""
        with self.wire(timeout) as wire:
            return wire.send(data).answer()

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log().splitlines()]

    def memory(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(45)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@contextlib.contextmanager
def running(log: Path, env: Mapping[str, str] | None = None, *, ready: bool = True) -> Iterator[Web]:
    """A web process for the time of a block."""
    web = Web(log, env)
    try:
        yield web.wait() if ready else web
    finally:
        web.stop()


def request(method: str, path: str, *fields: tuple[str, str], body: bytes = b"", host: str = "x") -> bytes:
    """A request's bytes; `fields` are added to `Host` and may repeat or contradict each other."""
    head = [f"{method} {path} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in fields)]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def signed(shop: Door, raw: bytes) -> bytes:
    """A good webhook request's bytes."""
    signature = ("X-Hub-Signature-256", meta.sign(raw, shop.app_secret))
    return request("POST", shop.url, signature, ("Content-Length", str(len(raw))), body=raw)
