"""The simulated providers: start them, or say something through those that run."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from pombal.cli import as_json
from pombal.cli import say as tell
from pombal.errors import PombalError
from pombal.settings import data_folder, settings


class SandboxAway(PombalError):
    """The sandbox did not do it; the message says why."""


def sandbox(given: Namespace) -> int:
    from sandbox.app import main

    config = given.config or str(data_folder() / "sandbox.json")
    return main(["--port", str(given.port), "--config", config])


def say(given: Namespace) -> int:
    """A text from a demo customer; prints the wamid, so that `pombal trace` finds it."""
    from sandbox import client

    answer = _asked(lambda url: client.say(url, given.channel, given.text), given)
    tell(f"{answer['wamid']}  answered {answer['status']}")
    return 0 if answer["accepted"] else 1


def traffic(given: Namespace) -> int:
    """Start a run of mixed traffic and wait for its end, with a line of progress each second."""
    import time

    from sandbox import client

    plan = {"bodies": given.bodies, "rate": given.rate, "seed": given.seed}
    begun = _asked(
        lambda url: client.traffic(url, [given.channel], **{k: v for k, v in plan.items() if v is not None}), given
    )
    while True:
        now = _asked(lambda url: client.progress(url, begun["id"], truth=True), given)
        tell(f"{now['state']}: {now['accepted']} of {now['bodies']} accepted, {now['pending']} pending")
        if now["state"] not in ("preparing", "running"):
            as_json(now)
            return 0 if now["state"] == "done" else 1
        time.sleep(1)  # a line a second for people; the sandbox works on by itself


def _asked(ask: Callable[[str], dict[str, Any]], given: Namespace) -> dict[str, Any]:
    import httpx

    from sandbox.client import SandboxError

    url = settings().sandbox_url or f"http://127.0.0.1:{given.port}"
    try:
        return ask(url)
    except SandboxError as error:
        raise SandboxAway(f"the sandbox at {url}: {error}") from None
    except httpx.HTTPError as error:
        raise SandboxAway(f"no sandbox answers at {url} ({type(error).__name__}); `pombal up` starts one") from None
