"""The process supervisor of `pombal up`: start in order, prefix the output, restart what dies, stop everything.

Also `spawn`, the way pombal starts any process that must not outlive it (the embedded servers use it too).

Three things keep orphans away. A child asks the kernel for a signal when its parent dies (Linux). Every child leads a
session of its own, so a stop reaches what it forked. And when we are killed, no handler of ours runs: a small warden
process, which notices our death by the end of a pipe, then stops the groups that are left.
"""

import contextlib
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, NamedTuple, TextIO

LINUX = platform.system() == "Linux"
LONGEST_LINE = 64 * 1024
_STOP_REPEAT = 3.0  # a Ctrl-C repeated sooner is an echo (terminal and wrapper both send one), later it means "now"
_LEFTOVERS = 5.0  # what a dead child forked gets this long to end before the child is started again
_COLOURS = ("36", "33", "32", "35", "34", "96", "93", "92", "95", "94")


# Runs between fork and exec, as a process of its own: Python code after a fork is not safe in a program with threads.
_GUARD = """
import ctypes, os, signal, sys
parent, number, identity = map(int, sys.argv[1:4])
argv = sys.argv[4:]
libc = ctypes.CDLL(None, use_errno=True)
if identity == 1:  # a user namespace in which we are nobody; files keep their owner
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(0x10000000):  # CLONE_NEWUSER
        sys.exit("cannot unshare: " + os.strerror(ctypes.get_errno()))
    for name, text in ("setgroups", "deny"), ("uid_map", f"65534 {uid} 1"), ("gid_map", f"65534 {gid} 1"):
        with open("/proc/self/" + name, "w") as file:
            file.write(text)
elif identity == 2:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
if sys.platform == "linux":
    libc.prctl(1, number, 0, 0, 0)  # PR_SET_PDEATHSIG; last, because a change of credentials clears it
if os.getppid() != parent:
    sys.exit("the parent died before its child began")
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores both at start, and exec would pass that on
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
try:
    os.execv(argv[0], argv)
except OSError as error:
    print(f"cannot run {argv[0]}: {error.strerror}", file=sys.stderr, flush=True)
    os._exit(127)
"""

# Reads "+group" and "-group" lines; at the end of the pipe, stops the groups that are left.
_WARDEN = """
import os, signal, sys, time
for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
    signal.signal(number, signal.SIG_IGN)
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
def tell(number):
    for group in list(groups):
        try:
            os.killpg(group, number)
        except OSError:
            groups.discard(group)
end = time.monotonic() + float(sys.argv[1])
tell(signal.SIGTERM)
while groups and time.monotonic() < end:
    time.sleep(0.1)
    tell(0)
tell(signal.SIGKILL)
"""

AS_OURSELVES, AS_NOBODY_HERE, AS_NOBODY = range(3)
"""Who a spawned program is: our own user; nobody in a user namespace, owning our files; or the real user 65534."""


@cache
def _spawner(_pid: int) -> "queue.SimpleQueue[Callable[[], None]]":
    orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            orders.get()()

    threading.Thread(target=work, name="spawner", daemon=True).start()
    return orders


def guarded(argv: Sequence[str], death_signal: signal.Signals, identity: int = AS_OURSELVES) -> list[str]:
    """The command that becomes `argv` after asking for `death_signal` on our death and changing to `identity`."""
    interpreter = [sys.executable, "-I", "-S", "-c", _GUARD]
    return [*interpreter, str(os.getpid()), str(int(death_signal)), str(identity), *argv]


def spawn(
    argv: Sequence[str], *, death_signal: signal.Signals, identity: int = AS_OURSELVES, **popen: Any
) -> "subprocess.Popen[bytes]":
    """Start `argv` (its first word an absolute path) in a session of its own, to be sent `death_signal` when we die.

    Other arguments go to `subprocess.Popen`. A program that cannot be executed ends with code 127 and a line on its
    standard error.
    """
    answer: Future[subprocess.Popen[bytes]] = Future()

    def start() -> None:
        try:
            command = guarded(argv, death_signal, identity)
            answer.set_result(subprocess.Popen(command, start_new_session=True, **popen))  # noqa: S603 - the caller's own command
        except BaseException as error:
            answer.set_exception(error)

    # The kernel takes the death of the *thread* that forked for the parent's: one thread that never ends does it all.
    _spawner(os.getpid()).put(start)
    return answer.result()


def until(condition: Callable[[], bool], end: float) -> bool:
    """True as soon as the condition is, false when it is not at `end` (monotonic)."""
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(0.02)
    return True


class Process(NamedTuple):
    """One line of the process table, zombies left out: whoever should reap an orphan may never do so."""

    pid: int
    parent: int
    group: int


def processes() -> Iterator[Process]:
    """Every process of the machine; Linux only."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (process := _process(int(entry))):
            yield process


def _process(pid: int) -> Process | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, parent, group = text.rpartition(")")[2].split()[:3]  # the name before it may hold anything
    return None if state in "ZX" else Process(pid, int(parent), int(group))


def runs(pid: int) -> bool:
    """Whether a process exists and is more than a zombie (zombies count where there is no /proc)."""
    return _process(pid) is not None if LINUX else _answers(pid)


def _group_runs(group: int) -> bool:
    return _answers(-group) and (not LINUX or any(process.group == group for process in processes()))


def _answers(target: int) -> bool:
    try:
        os.kill(target, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's; of a group of zombies macOS says this too
        return target > 0
    return True


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


@dataclass(frozen=True)
class Command:
    """One process of the fleet: its name, what to run (first word absolute), what to add to the environment."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


def _nothing(*_: object) -> None:
    pass


class Supervisor:
    """Runs commands until it is told to stop.

    `data` is where `pids.json` is kept (`{"web": 4711}`, only what runs). `grace`: seconds from SIGTERM to SIGKILL.
    `first_pause` doubles up to `longest_pause` between restarts, and starts anew after a life of `steady` seconds.
    `on_start(name, pid)` and `on_exit(name, pid, code)` are called from the thread that watches that command; `code` is
    negative for a signal, as in `subprocess`. An exception in one of them is shown and otherwise ignored.
    """

    def __init__(
        self,
        commands: Sequence[Command],
        *,
        data: Path | None = None,
        out: TextIO | None = None,
        grace: float = 28.0,
        first_pause: float = 1.0,
        longest_pause: float = 30.0,
        steady: float = 60.0,
        on_start: Callable[[str, int], object] = _nothing,
        on_exit: Callable[[str, int, int], object] = _nothing,
    ) -> None:
        names = [command.name for command in commands]
        if len(set(names)) != len(names):
            raise ValueError("two commands of one name")
        self.commands = list(commands)
        self.grace = grace
        self._pids_file = data / "pids.json" if data else None
        self._out = sys.stdout if out is None else out
        self._first_pause, self._longest_pause, self._steady = first_pause, longest_pause, steady
        self._on_start, self._on_exit = on_start, on_exit
        self._requests: queue.SimpleQueue[float] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._running_lock = threading.Lock()
        self._out_lock = threading.Lock()
        self._width = max(map(len, ["pombal", *names]))
        self._coloured = self._out.isatty() and not os.environ.get("NO_COLOR")
        self._colour = dict(zip(names, _COLOURS * (len(names) // len(_COLOURS) + 1), strict=False))
        self._warden: subprocess.Popen[bytes] | None = None

    @property
    def pids(self) -> dict[str, int]:
        """What runs now."""
        with self._running_lock:
            return {name: child.pid for name, child in self._running.items()}

    def stop(self) -> None:
        """Ask `run` to stop everything and return; from any thread or signal handler."""
        self._requests.put(time.monotonic())

    def run(self) -> int:
        """Start the commands in their order, keep them running until SIGINT, SIGTERM or `stop()`; then 0.

        Signals are taken over only in the main thread, and given back at the end. A second signal, some seconds after
        the first, kills what has not stopped yet.
        """
        in_main = threading.current_thread() is threading.main_thread()
        # A queue and not an Event: setting an Event in a handler can deadlock with the wait it interrupts.
        before = {
            number: signal.signal(number, lambda *_: self.stop())
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if in_main and not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN)  # nohup
        }
        if isinstance(self._out, TextIOWrapper):
            self._out.reconfigure(errors="backslashreplace")  # a child may print what a Latin-1 terminal has not
        warden = [sys.executable, "-I", "-S", "-c", _WARDEN, str(self.grace)]
        self._warden = subprocess.Popen(  # noqa: S603 - our own text
            warden,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # or `pombal up | tee` would wait for the warden
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        keepers = []
        try:
            for command in self.commands:
                started = threading.Event()
                keeper = threading.Thread(target=self._keep, args=(command, started), name=f"keep {command.name}")
                keeper.start()
                keepers.append(keeper)
                started.wait()
            self._shut_down(keepers, self._first_request())
        finally:
            self._stopping.set()
            for child in list(self._running.values()):
                _signal_group(child.pid, signal.SIGKILL)  # nobody is left unless the lines above raised
            for keeper in keepers:
                keeper.join()
            assert self._warden.stdin is not None  # noqa: S101 - for the type checker
            self._warden.stdin.close()
            self._warden.wait()
            if self._pids_file:
                self._pids_file.unlink(missing_ok=True)
            for number, handler in before.items():
                signal.signal(number, handler)
        return 0

    def _first_request(self) -> float:
        # A wait without an end could last for ever: of two signals at once one may go to a thread that is not this one.
        while True:
            with contextlib.suppress(queue.Empty):
                return self._requests.get(timeout=0.2)

    def say(self, line: str) -> None:
        """One line of the supervisor's own."""
        self._print("pombal", line)

    def show(self, lines: Sequence[str]) -> None:
        """Lines as they are, together and without a prefix, so that a shell takes what is copied from them."""
        self._write("".join(f"{line}\n" for line in lines))

    # ------------------------------------------------------------------------------------------------ one command

    def _keep(self, command: Command, started: threading.Event) -> None:
        name, pause = command.name, self._first_pause
        while not self._stopping.is_set():
            born = time.monotonic()
            try:
                child, reader = self._start(command)
            except OSError as error:  # no memory, no process slots: as passing as any other death
                started.set()
                self.say(f"{name} did not start ({error.strerror}), again in {pause:g} s")
            else:
                started.set()
                code = child.wait()
                reader.join(0.5)  # its last words first; what it forked may hold the pipe open for longer
                if time.monotonic() - born >= self._steady:
                    pause = self._first_pause
                if not self._stopping.is_set():
                    why = f"signal {-code}" if code < 0 else f"exit {code}"
                    self.say(f"{name} died ({why}), again in {pause:g} s")
                self._bury(name, child)
                self._call(self._on_exit, name, child.pid, code)
            self._stopping.wait(pause)
            pause = min(pause * 2, self._longest_pause)

    def _start(self, command: Command) -> "tuple[subprocess.Popen[bytes], threading.Thread]":
        child = spawn(
            command.argv,
            death_signal=signal.SIGTERM,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **command.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._note(command.name, child)
        reader = threading.Thread(target=self._copy, args=(command.name, child.stdout), daemon=True)
        reader.start()
        self._call(self._on_start, command.name, child.pid)
        if self._stopping.is_set():  # the stop went round before it knew this one
            _signal_group(child.pid, signal.SIGTERM)
        return child, reader

    def _bury(self, name: str, child: "subprocess.Popen[bytes]") -> None:
        """Wait for, and in the end kill, what a dead child forked; then forget it."""
        if self._stopping.is_set():  # `_shut_down` has sent the SIGTERM and brings the SIGKILL
            patience = self.grace
        else:
            _signal_group(child.pid, signal.SIGTERM)
            patience = _LEFTOVERS
        if not until(lambda: not _group_runs(child.pid), time.monotonic() + patience):
            _signal_group(child.pid, signal.SIGKILL)
        self._note(name, child, gone=True)

    def _note(self, name: str, child: "subprocess.Popen[bytes]", *, gone: bool = False) -> None:
        """Tell the warden and `pids.json`."""
        with self._running_lock:
            if gone:
                self._running.pop(name, None)
            else:
                self._running[name] = child
            if self._warden and self._warden.stdin:
                with contextlib.suppress(OSError):  # somebody killed it: the kernel's signal remains
                    self._warden.stdin.write(f"{'-' if gone else '+'}{child.pid}\n".encode())
                    self._warden.stdin.flush()
            if self._pids_file:
                pids = {running: process.pid for running, process in self._running.items()}
                fresh = self._pids_file.with_suffix(".new")
                fresh.write_text(json.dumps(pids) + "\n")
                fresh.replace(self._pids_file)

    # ----------------------------------------------------------------------------------------------------- stopping

    def _shut_down(self, keepers: Sequence[threading.Thread], asked: float) -> None:
        self._stopping.set()
        self.say("stopping")
        with self._running_lock:
            children = dict(self._running)
        for child in children.values():
            _signal_group(child.pid, signal.SIGTERM)
        end = time.monotonic() + self.grace
        while any(keeper.is_alive() for keeper in keepers):
            with contextlib.suppress(queue.Empty):
                if self._requests.get(timeout=0.05) > asked + _STOP_REPEAT:
                    end = 0.0
            if time.monotonic() < end:
                continue
            for name, pid in self.pids.items():
                self.say(f"{name} did not stop in time, killed")
                _signal_group(pid, signal.SIGKILL)
            return

    # ------------------------------------------------------------------------------------------------------- output

    def _copy(self, name: str, pipe: IO[bytes]) -> None:
        with pipe:
            while line := pipe.readline(LONGEST_LINE):
                self._print(name, line.decode(errors="replace").rstrip("\r\n"))

    def _print(self, name: str, line: str) -> None:
        prefix = f"{name:<{self._width}} |"
        if self._coloured:
            prefix = f"\x1b[{self._colour.get(name, '1')}m{prefix}\x1b[0m"
        self._write(f"{prefix} {line}\n")

    def _write(self, text: str) -> None:
        # Whoever read us is gone or full: the children's pipes must be drained all the same, or they stand still.
        with self._out_lock, contextlib.suppress(OSError, ValueError):
            self._out.write(text)
            self._out.flush()

    def _call(self, callback: Callable[..., object], *facts: object) -> None:
        try:
            callback(*facts)
        except Exception as error:  # a hook of the caller must not end the thread that keeps a process alive
            self.say(f"{callback} failed: {error!r}")
