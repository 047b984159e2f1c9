"""What the stores of Baileys sessions are filled with, and a kill -9 before each step that a store takes."""

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from pombal.cli.fleet import ROOT

OWN_ID = "5511911110000"


def a_pair(name: str) -> dict[str, Any]:
    return {side: {"type": "Buffer", "data": f"{name}-{side}"} for side in ("private", "public")}


def creds(pairing: int = 1, pre_key: int = 1, **more: Any) -> dict[str, Any]:
    """Credentials in the order of fields that Baileys writes; `pre_key` numbers the signed pre-key."""
    return {
        "noiseKey": a_pair(f"noise{pairing}"),
        "pairingEphemeralKeyPair": a_pair(f"ephemeral{pairing}"),
        "signedIdentityKey": a_pair(f"identity{pairing}"),
        "signedPreKey": {
            "keyPair": a_pair(f"signed{pairing}.{pre_key}"),
            "signature": {"type": "Buffer", "data": "c2ln"},
            "keyId": pre_key,
        },
        "registrationId": 100 + pairing,
        "advSecretKey": "c2VjcmV0",
        "processedHistoryMessages": [],
        "nextPreKeyId": 31,
        "firstUnuploadedPreKeyId": 31,
        "accountSyncCounter": 0,
        "registered": True,
        "me": {"id": f"{OWN_ID}:7@s.whatsapp.net", "lid": "200000000000001:7@lid", "name": "Loja \ud83d é"},
        **copy.deepcopy(more),
    }


def dumped(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def cut_after(field: str, told: dict[str, Any]) -> bytes:
    """Credentials whose writing ended just behind this field."""
    text = dumped(told)
    value = dumped(told[field])
    start = text.index(f'"{field}":'.encode())
    return text[: text.index(value, start) + len(value) + 5]


def when(happens: Callable[[str], bool], then: Callable[[], object]) -> None:
    """Do something just before the first call into C (`os.fsync`, …) that fits; until `sys.setprofile(None)`."""

    def look(frame: FrameType, event: str, what: Any) -> None:
        if event == "c_call" and happens(getattr(what, "__name__", "")):
            sys.setprofile(None)
            then()

    sys.setprofile(look)


def killed_before_each_step(fresh: Callable[[], None], act: Callable[[], object], check: Callable[[], None]) -> int:
    """Kill `act` before its first call of the system, before its second, … each time in a process forked for it, on
    what `fresh` made; after each, `check`. Returns how many steps there were. For a process with one thread."""
    step = 0
    while True:
        step += 1
        fresh()
        child = os.fork()
        if child == 0:
            sys.setprofile(_kill_at(step))
            act()
            sys.setprofile(None)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        check()
        if os.waitstatus_to_exitcode(status) == 0:
            return step
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def _kill_at(step: int) -> Callable[[FrameType, str, Any], None]:
    count = 0

    def look(frame: FrameType, event: str, what: Any) -> None:
        nonlocal count
        if event == "c_call":
            is_step = getattr(what, "__module__", "") in ("posix", "fcntl")
        else:  # a statement of psycopg's: before it, and after it
            is_step = frame.f_code.co_name in ("execute", "commit") and "psycopg" in frame.f_code.co_filename
        if is_step:
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

    return look


def run_alone(module: str, function: str, *arguments: str) -> None:
    """Run a function of a test module in a process of its own, which may fork."""
    code = f"import sys; from {module} import {function}; {function}(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
