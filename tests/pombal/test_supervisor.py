import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pombal.supervisor import LONGEST_LINE, Command, Supervisor, runs
from tests.pombal.processes import tell_a_thread

SLEEP = "import time; time.sleep(600)"


def until(condition: Callable[[], Any], what: str = "the condition") -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, f"{what} did not come true"
        time.sleep(0.01)


def python(name: str, program: str, *arguments: str) -> Command:
    return Command(name, [sys.executable, "-c", program, *arguments])


@contextlib.contextmanager
def running(supervisor: Supervisor) -> Iterator[None]:
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        yield
    finally:
        supervisor.stop()
        thread.join(30)
        assert not thread.is_alive()


def test_each_line_carries_the_name_of_its_process() -> None:
    out = io.StringIO()
    commands = [python("web", f"print('olá', flush=True); {SLEEP}"), python("worker", f"print('oi'); {SLEEP}")]

    with running(Supervisor(commands, out=out)):
        until(lambda: "web    | olá\n" in out.getvalue())
        until(lambda: "worker | oi\n" in out.getvalue())

    assert "\x1b" not in out.getvalue()


def test_names_are_coloured_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()

    with running(Supervisor([python("web", f"print('hi'); {SLEEP}")], out=out)):
        until(lambda: "\x1b[36mweb    |\x1b[0m hi\n" in out.getvalue())


def test_a_killed_process_is_started_again(tmp_path: Path) -> None:
    out = io.StringIO()
    started: list[tuple[str, int]] = []
    ended: list[tuple[str, int, int]] = []
    supervisor = Supervisor(
        [python("web", SLEEP)],
        data=tmp_path,
        out=out,
        first_pause=0.01,
        on_start=lambda *facts: started.append(facts),
        on_exit=lambda *facts: ended.append(facts),
    )

    with running(supervisor):
        until(lambda: len(started) == 1)
        first = started[0][1]
        assert json.loads((tmp_path / "pids.json").read_text()) == {"web": first}
        os.kill(first, signal.SIGKILL)
        until(lambda: len(started) == 2)
        assert json.loads((tmp_path / "pids.json").read_text()) == {"web": started[1][1]}
        assert supervisor.pids == {"web": started[1][1]}

    assert "pombal | web died (signal 9), again in 0.01 s\n" in out.getvalue()
    assert ended[0] == ("web", first, -signal.SIGKILL)
    assert not (tmp_path / "pids.json").exists()


def test_the_pause_doubles_up_to_its_limit() -> None:
    out = io.StringIO()

    with running(Supervisor([python("clock", "raise SystemExit(3)")], out=out, first_pause=0.01, longest_pause=0.04)):
        until(lambda: out.getvalue().count("died") >= 4)

    said = [line.rpartition("again in ")[2] for line in out.getvalue().splitlines() if "clock died (exit 3)" in line]
    assert said[:4] == ["0.01 s", "0.02 s", "0.04 s", "0.04 s"]


def test_after_a_steady_life_the_pause_starts_anew() -> None:
    out = io.StringIO()

    with running(Supervisor([python("clock", "")], out=out, first_pause=0.01, steady=0)):
        until(lambda: out.getvalue().count("died") >= 3)

    assert "0.02 s" not in out.getvalue()


def test_a_program_that_is_not_there_is_a_death_like_any_other() -> None:
    out = io.StringIO()

    with running(Supervisor([Command("web", ["/nowhere/web"])], out=out)):
        until(lambda: "web died (exit 127)" in out.getvalue())

    assert "web    | cannot run /nowhere/web: No such file or directory" in out.getvalue()


def test_a_stop_reaches_what_a_child_forked() -> None:
    out = io.StringIO()
    fork = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', '{SLEEP}']).pid); {SLEEP}"

    with running(Supervisor([python("worker", fork)], out=out)):
        until(lambda: "worker | " in out.getvalue())
        grandchild = int(out.getvalue().split()[-1])
        assert runs(grandchild)

    assert not runs(grandchild)


def test_what_a_killed_child_forked_is_gone_before_it_starts_again() -> None:
    out = io.StringIO()
    fork = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', '{SLEEP}']).pid); {SLEEP}"
    started: list[bool] = []

    def on_start(name: str, pid: int) -> None:
        started.append(not grandchildren or not runs(grandchildren[0]))

    grandchildren: list[int] = []
    with running(Supervisor([python("worker", fork)], out=out, first_pause=0.01, on_start=on_start)) as _:
        until(lambda: "worker | " in out.getvalue())
        grandchildren.append(int(out.getvalue().split()[-1]))
        os.kill(os.getpgid(grandchildren[0]), signal.SIGKILL)
        until(lambda: len(started) == 2)

    assert started == [True, True]


def test_what_does_not_stop_is_killed() -> None:
    out = io.StringIO()
    deaf = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); {SLEEP}"
    codes: list[int] = []

    with running(
        Supervisor([python("web", deaf)], out=out, grace=0.1, on_exit=lambda name, pid, code: codes.append(code))
    ):
        until(lambda: "web    | deaf" in out.getvalue())

    assert "web did not stop in time, killed" in out.getvalue()
    assert codes == [-signal.SIGKILL]


def test_a_line_without_end_comes_in_pieces() -> None:
    out = io.StringIO()

    with running(Supervisor([python("web", f"print('x' * {LONGEST_LINE * 2 + 5}); {SLEEP}")], out=out)):
        until(lambda: out.getvalue().endswith("| xxxxx\n"))

    assert max(map(len, out.getvalue().splitlines())) == LONGEST_LINE + len("web    | ")


def test_a_hook_that_fails_stops_nothing() -> None:
    out = io.StringIO()

    def on_start(name: str, pid: int) -> None:
        raise RuntimeError("oops")

    with running(Supervisor([python("web", f"print('here'); {SLEEP}")], out=out, on_start=on_start)):
        until(lambda: "web    | here" in out.getvalue() and "oops" in out.getvalue())


PROGRAM = """
import sys
from pathlib import Path
from pombal.supervisor import Command, Supervisor
fork = "import subprocess, sys, time; c = [sys.executable, '-c', 'import time; time.sleep(600)']"
fork += "; print('forked', subprocess.Popen(c).pid); time.sleep(600)"
raise SystemExit(Supervisor([Command("worker", [sys.executable, "-c", fork])], data=Path(sys.argv[1])).run())
"""


@contextlib.contextmanager
def supervisor_process(data: Path) -> Iterator[tuple["subprocess.Popen[str]", int, int]]:
    """A supervisor as a process of its own, its child and its grandchild."""
    command = [sys.executable, "-c", PROGRAM, str(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            grandchild = int(process.stdout.readline().split()[-1])
            yield process, json.loads((data / "pids.json").read_text())["worker"], grandchild
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_and_is_a_clean_end(tmp_path: Path, number: signal.Signals) -> None:
    with supervisor_process(tmp_path) as (process, child, grandchild):
        process.send_signal(number)

        assert process.wait(30) == 0
        assert not runs(child)
        assert not runs(grandchild)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_that_another_thread_gets_is_heard_too(tmp_path: Path) -> None:
    with supervisor_process(tmp_path) as (process, child, _):
        tell_a_thread(process.pid, signal.SIGTERM)

        assert process.wait(30) == 0
        assert not runs(child)


def test_a_killed_supervisor_leaves_no_orphans(tmp_path: Path) -> None:
    with supervisor_process(tmp_path) as (process, child, grandchild):
        process.kill()

        until(lambda: not runs(child) and not runs(grandchild))
