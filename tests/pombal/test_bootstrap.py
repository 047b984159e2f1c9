import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pombal import __main__ as bootstrap


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a `.venv` that looks whole: the interpreter is the running one."""
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "VENV", tmp_path / ".venv")
    monkeypatch.delenv("POMBAL_NO_BOOTSTRAP", raising=False)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "uv.lock").write_text("version = 1\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "pyvenv.cfg").touch()
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    return tmp_path


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been run; every step succeeds."""
    done: list[str] = []

    def step(what: str, command: list[str]) -> bool:
        done.append(what)
        return True

    monkeypatch.setattr(bootstrap, "_step", step)
    monkeypatch.setattr(shutil, "which", lambda name: f"/somewhere/{name}")
    return done


def test_an_environment_made_here_is_stale_once_the_lock_changes(checkout: Path, steps: list[str]) -> None:
    bootstrap.prepare()
    assert not bootstrap.stale()

    (checkout / "uv.lock").write_text("version = 2\n")

    assert bootstrap.stale()


def test_an_environment_somebody_else_made_is_left_alone(checkout: Path) -> None:
    assert not bootstrap.stale()


def test_a_second_run_has_nothing_to_do(checkout: Path, steps: list[str]) -> None:
    bootstrap.prepare()
    bootstrap.prepare()

    assert steps == ["installing the locked dependencies"]


def test_what_was_interrupted_is_made_again(checkout: Path, steps: list[str]) -> None:
    (checkout / ".venv" / "pombal-stamp").write_text("unfinished")
    (checkout / ".venv" / "half").touch()

    bootstrap.prepare()

    assert steps == ["making .venv", "installing the locked dependencies"]
    assert not (checkout / ".venv" / "half").exists()


def test_a_broken_interpreter_is_made_again(checkout: Path, steps: list[str]) -> None:
    (checkout / ".venv" / "bin" / "python").unlink()

    bootstrap.prepare()

    assert steps[0] == "making .venv"


def test_a_failed_step_leaves_the_environment_for_the_next_try(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / ".venv" / "pombal-stamp").write_text("of an older lock")
    monkeypatch.setattr(bootstrap, "_step", lambda what, command: False)

    with pytest.raises(bootstrap.BootstrapError):
        bootstrap.prepare()

    assert bootstrap.stale()
    assert bootstrap.stamp_file().read_text() == "of an older lock"


def test_without_uv_it_is_fetched_and_pip_is_the_last_resort(
    checkout: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_uv_wheel(what: str, command: list[str]) -> bool:
        steps.append(what)
        return what != "fetching uv"

    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(bootstrap, "_step", no_uv_wheel)

    bootstrap.prepare()

    assert steps[-2:] == ["fetching uv", "installing with pip instead, newest versions"]


def test_debian_without_its_venv_package_is_told_both_ways_out(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / ".venv" / "pyvenv.cfg").unlink()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(bootstrap.BootstrapError, match=r"python3\.\d+-venv.* or install uv"):
        bootstrap.prepare()


@pytest.mark.parametrize("off", ["variable", "no lock"])
def test_it_can_be_switched_off(checkout: Path, monkeypatch: pytest.MonkeyPatch, off: str) -> None:
    assert bootstrap.switched_on()

    if off == "variable":
        monkeypatch.setenv("POMBAL_NO_BOOTSTRAP", "1")
    else:
        (checkout / "uv.lock").unlink()

    assert not bootstrap.switched_on()


def test_two_at_once_take_turns(checkout: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from pombal import __main__ as b; b.ROOT = Path(sys.argv[1])\n"
        "with b._alone(): print('in', flush=True); sys.stdin.readline()"
    )

    def run() -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", program, str(checkout)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    with run() as first:
        assert first.stdout
        assert first.stdout.readline() == "in\n"
        with run() as second:
            assert second.stderr
            assert "waiting" in second.stderr.readline()
            first.communicate("done\n")

            assert second.communicate("done\n") == ("in\n", "")


def test_outside_it_starts_itself_again_inside(checkout: Path, steps: list[str]) -> None:
    program = (
        "import sys; from pathlib import Path; from pombal import __main__ as b\n"
        "b.ROOT = Path(sys.argv.pop(1)); b.VENV = b.ROOT / '.venv'; b.prepare = lambda: None\n"
        "b.main()"
    )
    inner = checkout / ".venv" / "bin" / "python"
    inner.unlink()
    inner.write_text('#!/bin/sh\necho "$POMBAL_NO_BOOTSTRAP" "$PWD" "$@"\n')
    inner.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "POMBAL_NO_BOOTSTRAP"}

    ran = subprocess.run(
        [sys.executable, "-c", program, str(checkout), "actors", "--json"],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
    )

    assert ran.stdout == "1 / -m pombal actors --json\n"
