"""A whole fleet as a user starts it: `pombal up` as a process of its own, and the means to hurt it.

Everything is awaited by condition and with a generous deadline; no test looks at the time.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx
import psycopg
import redis

from pombal.supervisor import processes

ROOT = Path(__file__).parent.parent.parent

QUIET = 150.0  # seconds for everything to be done after a fault: the promise is 120
STOPPED = 40.0  # seconds for a stop: the promise is 25

# What the suite itself runs on must not be what a fleet under test runs on.
_NOT_THEIRS = ("DATABASE_URL", "DATABASE_OWNER_URL", "REDIS_URL", "LOG_FORMAT", "PROMETHEUS_MULTIPROC_DIR")


def until(condition: Callable[[], Any], what: str, seconds: float = 60.0, *, pause: float = 0.05) -> None:
    """Wait for a condition; fails when it did not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(pause)


@cache
def certificates() -> ssl.SSLContext:
    """For every client of httpx that asks a fleet: by itself each reads them anew, for longer than it then asks."""
    return ssl.create_default_context()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Shop(NamedTuple):
    """A tenant with one Meta channel on an app of its own."""

    tenant_id: str
    channel_id: str
    app_id: str
    phone_number_id: str
    waba_id: str
    app_secret: str
    path: str


class Fleet:
    """`pombal up` on one data folder, to be started, hurt, stopped and started again.

    As a context manager it leaves no process behind, whatever happened.
    """

    def __init__(self, data: Path, *options: str, **environment: str) -> None:
        self.data = data.resolve()
        # Of its own, also for the sandbox: of two fleets that begin at once both would find the usual one free.
        self.port, self._sandbox_port, self._sip_port = free_port(), free_port(), free_port()
        self.options = options
        self._environment = environment
        self._output = self.data.with_name(f"{self.data.name}.out")  # not inside: `--reset` deletes that
        self._process: subprocess.Popen[bytes] | None = None
        self._members: dict[str, subprocess.Popen[bytes]] = {}
        self._sockets: set[Path] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    # ------------------------------------------------------------------------------------------- starting, stopping

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        """What this run has printed so far."""
        return self._output.read_text(errors="replace")

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None, "the fleet does not run"
        return self._process

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, *options: str) -> Self:
        """Start and wait until it says that it is ready."""
        self.begin(*options)
        until(lambda: "ready after" in self._living_output(), "the fleet is ready", 120)
        until(self.is_whole, "all processes run")
        return self

    def begin(self, *options: str) -> None:
        """Start without waiting for anything."""
        ports = ["--port", str(self.port), "--sandbox-port", str(self._sandbox_port), "--sip-port", str(self._sip_port)]
        arguments = ["up", "--data", str(self.data), *ports, *self.options, *options]
        with self._output.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pombal", *arguments],
                cwd=ROOT,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end, and hold it to a clean end."""
        self.note_sockets()
        self.process.send_signal(number)
        self.has_ended_cleanly()

    def has_ended_cleanly(self) -> None:
        """Exit code 0 in time, and nothing of it is left: no process, no socket, no list of processes."""
        code = self.process.wait(STOPPED)
        assert code == 0, f"exit code {code}:\n{self.output[-2000:]}"
        assert self.pids() == []
        assert [str(folder) for folder in self._sockets if folder.exists()] == []
        assert not (self.data / "pids.json").exists()

    def signal_all(self, number: signal.Signals) -> None:
        """To `pombal up` and to every process of the fleet at once, as hosts do that signal a whole group."""
        groups = [self.process.pid]
        with contextlib.suppress(OSError):
            groups += self.named().values()
        for group in groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)

    def end(self) -> None:
        """Kill what is left of it, for the end of a test."""
        self.note_sockets()
        for process in [*self._members.values(), *([self._process] if self._process else [])]:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._members.clear()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: self.pids() == [], "nothing of the fleet is left")
        for folder in self._sockets:
            shutil.rmtree(folder, ignore_errors=True)

    def note_sockets(self) -> None:
        """Remember where its servers' sockets are, to see later that they are gone."""
        for note in self.data.glob("*.sockets"):
            with contextlib.suppress(OSError):
                self._sockets.add(Path(note.read_text()))

    def _living_output(self) -> str:
        assert self.is_running, f"`pombal up` ended with {self.process.returncode}:\n{self.output[-2000:]}"
        return self.output

    def is_whole(self) -> bool:
        """Whether every process that was asked for runs, the web tier is ready, and the queue answers."""
        try:
            if set(self.named()) != set(self.wanted()):
                return False
            answer = httpx.get(f"{self.url}/ready", trust_env=False, verify=certificates())
            return answer.status_code == 200 and bool(self.redis().ping())
        except (httpx.HTTPError, redis.RedisError, OSError):
            return False

    def wanted(self) -> list[str]:
        if "--procs" in self.options:
            return self.options[self.options.index("--procs") + 1].split(",")
        names = ("sandbox", "web", "worker", "media", "upkeep", "sessions", "fixer", "sip", "follower", "clock")
        return [name for name in names if f"--no-{name}" not in self.options]

    # ---------------------------------------------------------------------------------------------------- processes

    def named(self) -> dict[str, int]:
        """`pids.json`: the processes of the fleet by name."""
        pids: dict[str, int] = json.loads((self.data / "pids.json").read_text())
        return pids

    def server(self, name: str) -> int:
        """The process id of an embedded server, as it wrote it down itself."""
        pattern = {"valkey": "valkey/valkey.pid", "postgres": "pg*/postmaster.pid"}[name]
        (file,) = self.data.glob(pattern)
        return int(file.read_text().split()[0])

    def pids(self) -> list[int]:
        """Every process of this fleet, of whatever parent: known by its data folder."""
        return [process.pid for process in processes() if self._is_ours(process.pid)]

    def _is_ours(self, pid: int) -> bool:
        here, data = Path(f"/proc/{pid}"), str(self.data).encode()
        try:
            said = (here / "cmdline").read_bytes().split(b"\0")
            told = (here / "environ").read_bytes().split(b"\0")
            folder = os.fsencode((here / "cwd").readlink())  # PostgreSQL overwrites the other two, and works in there
        except OSError:
            return False
        return data in said or b"POMBAL_DATA=" + data in told or any(w.startswith(data + b"/") for w in [*said, folder])

    def kill(self, name: str) -> None:
        """SIGKILL, and wait until the fleet has put another in its place.

        `web`, `clock`, `sandbox`; `worker` and `media` with all that they forked, or `worker master` alone; `valkey`,
        `postgres`.
        """
        before = self.identity(name)
        self.strike(name)
        until(lambda: self.identity(name) not in (None, before), f"another {name} is there")

    def strike(self, name: str) -> None:
        """SIGKILL and nothing more."""
        pid = self.identity(name)
        assert pid is not None
        if name in ("worker", "media", "upkeep", "sessions", "fixer", "sip"):
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)

    def identity(self, name: str) -> int | None:
        """The process id behind a name; None while there is none."""
        try:
            return self.server(name) if name in ("valkey", "postgres") else self.named().get(name.split()[0])
        except (OSError, ValueError, IndexError):
            return None

    @contextlib.contextmanager
    def nobody_restarts(self) -> Iterator[None]:
        """Hold `pombal up` still, so that what dies stays dead meanwhile. Only briefly: nobody reads its pipes."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    # --------------------------------------------------------------------------------------- joining from elsewhere

    def environment(self, **more: str) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if k not in _NOT_THEIRS and not k.startswith("POMBAL_")}
        return {**clean, "POMBAL_NO_BOOTSTRAP": "1", **self._environment, **more}

    def run(self, *arguments: str) -> str:
        """`pombal …` in a second terminal; its output."""
        done = subprocess.run(
            [sys.executable, "-m", "pombal", *arguments],
            cwd=ROOT,
            env=self.environment(POMBAL_DATA=str(self.data)),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def shell(self, command: str) -> str:
        """What somebody copied into a shell in the checkout; its output. Nothing in the environment helps it along."""
        command = command.replace("python3 -m", f"{sys.executable} -m")  # this very environment, not the system's
        done = subprocess.run(
            ["sh", "-c", command], cwd=ROOT, env=self.environment(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def rival(self, *options: str) -> "subprocess.CompletedProcess[str]":
        """Somebody else's `pombal up` on the same data, which is expected to end soon."""
        return subprocess.run(
            [sys.executable, "-m", "pombal", "up", "--data", str(self.data), "--port", str(free_port()), *options],
            cwd=ROOT,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )

    def join(self, name: str, *arguments: str, **environment: str) -> None:
        """Start one more process against the same servers, as another machine would."""
        with self.data.with_name(f"{self.data.name}-{name}.out").open("wb") as out:
            self._members[name] = subprocess.Popen(
                [sys.executable, "-m", "pombal", *arguments],
                cwd=ROOT,
                env=self.environment(POMBAL_DATA=str(self.data), **environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop_without_its_child(self, name: str) -> None:
        """Tell a worker that joined to stop, just after its child died while it booted."""
        member = self._members.pop(name)

        def children() -> list[int]:
            return [process.pid for process in processes() if process.parent == member.pid]

        until(children, "it has forked", pause=0.005)
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        member.terminate()
        member.wait(25)  # the promise itself: a master that waits for a child that will never answer takes 30

    def leave(self, name: str) -> None:
        """End one that joined; it must end cleanly."""
        member = self._members.pop(name)
        member.terminate()
        assert member.wait(STOPPED) == 0

    # ------------------------------------------------------------------------------------------------ looking inside

    @property
    def demo(self) -> dict[str, Any]:
        demo: dict[str, Any] = json.loads((self.data / "demo.json").read_text())
        return demo

    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.demo["redis_url"], socket_timeout=5)

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows as they truly are: asked as the superuser, whom no policy hides anything from."""
        address = self.demo["database_url"].replace("//pombal@", "//postgres@", 1)
        with psycopg.connect(address, autocommit=True) as connection:
            return connection.execute(query.encode(), values).fetchall()

    def count(self, query: str, *values: object) -> int:
        return int(self.rows(query, *values)[0][0])

    def shop(self) -> Shop:
        """A tenant of a test's own."""
        (made,) = self.shops(1, 1)
        (channel,) = made["channels"]
        ((app_id,),) = self.rows("SELECT id FROM app WHERE slug = %s", made["slug"])
        numbers = (channel["phone_number_id"], channel["waba_id"], made["secret"])
        return Shop(made["tenant_id"], channel["id"], str(app_id), *numbers, f"/webhooks/whatsapp/{made['slug']}")

    def shops(self, tenants: int, channels: int, **config: Any) -> list[dict[str, Any]]:
        """Tenants, and channels over them, as `tests.chaos.make_shops` tells them: one process for all."""
        words = [sys.executable, "-m", "tests.chaos.make_shops", str(tenants), str(channels), json.dumps(config)]
        env = self.environment(POMBAL_DATA=str(self.data))
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        made: list[dict[str, Any]] = json.loads(done.stdout)
        return made

    def demo_shop(self) -> Shop:
        """The tenant that every fleet has."""
        channel = self.demo["tenants"][0]["channels"][0]
        ((tenant_id, app_id),) = self.rows("SELECT tenant_id, app_id FROM channel WHERE id = %s", channel["id"])
        numbers = (channel["phone_number_id"], channel["waba_id"], channel["app_secret"])
        return Shop(str(tenant_id), channel["id"], str(app_id), *numbers, "/webhooks/whatsapp")

    def waits(self, shop: Shop) -> int:
        """How many bodies of a shop still wait for work."""
        return self.count("SELECT count(*) FROM delivery WHERE app_id = %s AND state = 'pending'", shop.app_id)

    def is_quiet(self) -> bool:
        """Whether nothing waits any more, neither as a row nor in a queue."""
        queues = ("incoming_message", "incoming_message.DQ")
        try:
            in_queues = sum(int(self.redis().hlen(f"dramatiq:{queue}.msgs")) for queue in queues)
            return in_queues == 0 and self.count("SELECT count(*) FROM delivery WHERE state = 'pending'") == 0
        except (redis.RedisError, psycopg.OperationalError):
            return False
