"""`python3 -m pombal …` on a machine that has Python and a checkout, and nothing else.

Outside the checkout's `.venv` this makes it, installs the locked dependencies and starts itself again inside. Inside,
it brings an environment that it made up to date when `pyproject.toml` or `uv.lock` have changed; one that somebody else
made has no stamp and is left alone. `POMBAL_NO_BOOTSTRAP=1` or a missing `uv.lock` (an installed package, an image)
switch all of it off. Standard library only: nothing is installed yet when it runs.
"""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
_UNFINISHED = "unfinished"


def main() -> int:
    """Bootstrap where that is called for, then run the command line. Returns the exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this file is read by whatever `python3` is
        return _fail(f"Python 3.11 or newer is needed, and this is {sys.version.split()[0]}: try python3.11 -m pombal")
    if switched_on() and (not inside() or stale()):
        try:
            prepare()
        except KeyboardInterrupt:
            return _fail("interrupted; the next run goes on from here", 130)
        except (BootstrapError, OSError) as error:
            return _fail(str(error))
        # Never again in this family of processes: each would spend time to find the same.
        environment = {**os.environ, "POMBAL_NO_BOOTSTRAP": "1"}
        command = [str(python()), "-m", "pombal", *sys.argv[1:]]
        os.execve(command[0], command, environment)  # noqa: S606 - our own interpreter

    from pombal.cli import main as run  # only now are its libraries here

    return run()


class BootstrapError(Exception):
    """The environment could not be made; the message is the one line to show."""


def switched_on() -> bool:
    """Whether there is a checkout to prepare and nobody said not to. Procfile processes use their host's libraries."""
    from_procfile = sys.argv[1:2] and sys.argv[1] in ("web", "worker", "clock", "migrate")
    return os.environ.get("POMBAL_NO_BOOTSTRAP") != "1" and (ROOT / "uv.lock").is_file() and not from_procfile


def inside() -> bool:
    """Whether this very Python is the environment's."""
    return Path(sys.prefix).resolve() == VENV.resolve()


def stale() -> bool:
    """Whether an environment made here no longer is what the lock says; false where somebody else made it."""
    return stamp_file().is_file() and stamp_file().read_text() != fingerprint()


def stamp_file() -> Path:
    """Holds the fingerprint of what is installed."""
    return VENV / "pombal-stamp"


def python() -> Path:
    """The environment's interpreter."""
    return VENV / "bin" / "python"


def fingerprint() -> str:
    """What the environment depends on: the two files that say what to install, and its Python's version."""
    digest = hashlib.sha256()
    for name in "pyproject.toml", "uv.lock":
        digest.update((ROOT / name).read_bytes())
    # Asked, not read from pyvenv.cfg: an upgrade of the system's Python swaps the interpreter behind the same link.
    digest.update(python_version().encode())
    return digest.hexdigest()


def python_version() -> str:
    """`3.11` for the environment's Python; empty when there is none that works, or it is too old."""
    if not (VENV / "pyvenv.cfg").is_file():
        return ""
    question = "import sys; print(*sys.version_info[:2], sep='.'); sys.exit(sys.version_info < (3, 11))"
    try:
        answer = subprocess.run([str(python()), "-I", "-S", "-c", question], capture_output=True, text=True)  # noqa: S603 - ours
    except OSError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def prepare() -> None:
    """Make `.venv` what the lock says; nothing to do when it is. Raises `BootstrapError`.

    One at a time: a second run waits for the first and finds the work done. What an interruption left half-made is made
    again from nothing; after a step that failed (no network) the environment stays as usable as it was.
    """
    with _alone():
        before = stamp_file().read_text() if stamp_file().is_file() else ""
        if before == fingerprint():
            return
        begun = time.monotonic()
        if before == _UNFINISHED or not python_version():
            _make()
            before = ""
        stamp_file().write_text(_UNFINISHED)
        done = _sync_with(shutil.which("uv")) or _sync_with(_fetched_uv()) or _install_with_pip()
        stamp_file().write_text(fingerprint() if done else before)
        if not done:
            raise BootstrapError(
                "the dependencies could not be installed, see above "
                f"(POMBAL_NO_BOOTSTRAP=1 runs with what is there; removing {VENV} begins anew)"
            )
        _say(f"ready in {time.monotonic() - begun:.1f} s")


def _make() -> None:
    uv = shutil.which("uv")
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing and not uv:  # Debian and Ubuntu keep them in a package of their own
        version = "{}.{}".format(*sys.version_info[:2])
        raise BootstrapError(
            f"this Python lacks `{missing[0]}`: install the package python{version}-venv, "
            "or install uv (https://docs.astral.sh/uv/), then run the same command again"
        )
    if VENV.is_symlink():
        VENV.unlink()
    elif VENV.exists():
        _say(f"{VENV} is half-made or does not work, making it again")
        shutil.rmtree(VENV)
    VENV.mkdir()
    stamp_file().write_text(_UNFINISHED)
    base = getattr(sys, "_base_executable", sys.executable)  # ours may just have been removed with the environment
    made = uv and _step("making .venv", [uv, "venv", "--quiet", "--allow-existing", "--python", base, str(VENV)])
    if not made and not _step("making .venv", [base, "-m", "venv", str(VENV)]):
        raise BootstrapError(f"{VENV} could not be made, see above")


def _fetched_uv() -> "str | None":
    """uv, installed into the environment by pip; None where that cannot be done."""
    # uv makes environments without pip.
    has_pip = subprocess.run([str(python()), "-m", "pip", "--version"], capture_output=True).returncode == 0  # noqa: S603 - ours
    if not has_pip and not _step("adding pip", [str(python()), "-m", "ensurepip", "--upgrade"]):
        return None
    # Only as a wheel: from its source it needs a Rust compiler and a quarter of an hour.
    fetched = _step("fetching uv", [*_pip_install(), "--only-binary", "uv", "uv"])
    return str(VENV / "bin" / "uv") if fetched else None


def _sync_with(uv: "str | None") -> bool:
    if uv is None:
        return False
    # --inexact, or uv would uninstall itself.
    options = ["--frozen", "--inexact", "--extra", "dev", "--project", str(ROOT), "--python", str(python())]
    return _step("installing the locked dependencies", [uv, "sync", "--quiet", *options])


def _install_with_pip() -> bool:
    return _step("installing with pip instead, newest versions", [*_pip_install(), "-e", f"{ROOT}[dev]"])


def _pip_install() -> "list[str]":
    return [str(python()), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]


def _step(what: str, command: "list[str]") -> bool:
    """Run one step, saying what it is and how long it took; its output is shown only when it fails."""
    sys.stderr.write(f"pombal: {what} … ")
    sys.stderr.flush()
    begun = time.monotonic()
    # The environment of another project may be active; uv and pip must not take it for ours.
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONHOME")}
    environment["UV_PROJECT_ENVIRONMENT"] = str(VENV)
    try:
        done = subprocess.run(  # noqa: S603 - the fixed commands of this file
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except BaseException:
        sys.stderr.write("\n")
        raise
    sys.stderr.write(f"{'' if done.returncode == 0 else 'failed after '}{time.monotonic() - begun:.1f} s\n")
    if done.returncode:
        sys.stderr.write(done.stdout.decode(errors="replace").rstrip() + "\n")
    return done.returncode == 0


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hold the lock of this checkout: the folder itself, so that no file is left behind."""
    try:
        import fcntl
    except ImportError:
        raise BootstrapError("on Windows, use WSL or make the environment by hand") from None
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems lock no folders: then two at once may collide
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say("another run is preparing .venv, waiting for it")
                fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _say(line: str) -> None:
    sys.stderr.write(f"pombal: {line}\n")


def _fail(line: str, code: int = 1) -> int:
    _say(line)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
