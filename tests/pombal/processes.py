"""Real processes of the fleet for tests: started as a host starts them, each leading a group, gone at the end."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from pombal.cli.fleet import ROOT
from pombal.supervisor import processes, runs


def until(condition: Callable[[], Any], *, seconds: float = 60, why: Callable[[], object] = str) -> None:
    """Wait for a condition; the deadline only keeps a broken test from hanging."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not come true; {why()}"
        time.sleep(0.02)


class Running:
    """A process and what it printed."""

    def __init__(self, arguments: list[str], env: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**os.environ, **env, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return self.process.poll() is None

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        """Its log lines of one event."""
        lines = [line for line in self.text().splitlines() if line.startswith("{") and f'"event":"{name}"' in line]
        return [msgspec.json.decode(line) for line in lines]

    def says(self, what: str, *, seconds: float = 60) -> None:
        """Wait until it has printed this."""
        until(lambda: what in self.text() or not self.alive(), seconds=seconds, why=self.text)
        assert what in self.text(), self.text()

    def tell_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def group(self) -> list[int]:
        return [process.pid for process in processes() if process.group == self.pid]

    def code(self, *, seconds: float = 60) -> int:
        """Wait for its end; its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.tell_group(signal.SIGABRT)  # each of them prints where its threads are
            self.process.wait()
            raise AssertionError(f"it did not end: {self.text()}") from None


def tell_a_thread(pid: int, number: signal.Signals) -> None:
    """Send a signal as the kernel may when two come at once: to a thread that is not the main one. Linux only."""
    thread = max(int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir())
    assert thread != pid
    assert ctypes.CDLL(None).tgkill(pid, thread, int(number)) == 0


@contextlib.contextmanager
def running(*arguments: str, env: dict[str, str], log: Path) -> Iterator[Running]:
    """`python ARGUMENTS` in the project's folder, until the end of the block."""
    process = Running(list(arguments), env, log)
    try:
        yield process
    finally:
        family = process.group()
        process.tell_group(signal.SIGKILL)
        process.process.wait()
        until(lambda: not any(map(runs, family)))


def output(*arguments: str, env: dict[str, str] | None = None, code: int = 0) -> str:
    """What `python ARGUMENTS` prints; it must end with this code."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr
