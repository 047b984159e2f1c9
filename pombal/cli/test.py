"""`pombal test`: the suite on embedded servers of its own, with coverage if asked."""

import os
import subprocess
import sys
from argparse import Namespace

from pombal.cli import say
from pombal.cli.fleet import ROOT

# File by file, since a file's tests may share what they start; and in the order of the folders, in which the longest
# come first: by itself it would take those with the fewest tests last, one after another.
_PARALLEL = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"]
_FLOORS = {"": 85, "models/*": 90, "web/*": 80}  # per cent, as the contract has them


def test(given: Namespace) -> int:
    """Exit code of pytest; 1 when coverage is asked for and below a floor."""
    command = [sys.executable, "-m"]
    command += ["coverage", "run", "-m", "pytest"] if given.cov else ["pytest"]
    # All of them take half an hour one by one, and much of that is waiting.
    everything = [] if given.arguments else _PARALLEL
    # A developer's own servers must not be what the tests run on.
    env = {k: v for k, v in os.environ.items() if k not in ("DATABASE_URL", "DATABASE_OWNER_URL", "REDIS_URL")}
    if given.cov:
        _coverage("erase")
    code = subprocess.call([*command, *everything, *given.arguments], cwd=ROOT, env=env)  # noqa: S603 - our own interpreter
    if not given.cov or code:
        return code
    _coverage("combine", "--quiet")
    for pattern, floor in _FLOORS.items():
        include = [f"--include={pattern}"] if pattern else []
        if _coverage("report", f"--fail-under={floor}", "--skip-covered", *include):
            say(f"coverage of {pattern or 'everything'} is below {floor} %")
            code = 1
    return code


def _coverage(*arguments: str) -> int:
    return subprocess.call([sys.executable, "-m", "coverage", *arguments], cwd=ROOT)  # noqa: S603 - as above
