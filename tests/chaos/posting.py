"""Bodies on their way to the webhook, sent the way Meta does: whatever is not answered 200 is sent again."""

import contextlib
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Self
from uuid import uuid4

import httpx

from sandbox import meta
from tests.chaos.fleet import Fleet, Shop, certificates, until

_LANES = 12


class Posting:
    """Sends in the background from `with` on; the end of the block waits until every body was accepted.

    accepted   request id → body of every post that was answered 200; each try has an id of its own
    answers    how often each status was answered; None where the connection failed
    """

    def __init__(self, fleet: Fleet, shop: Shop, bodies: Sequence[bytes], *, urls: Sequence[str] = ()) -> None:
        self.accepted: dict[str, bytes] = {}
        self.answers: Counter[int | None] = Counter()
        self.bodies = list(bodies)
        self._urls = [url + shop.path for url in urls or [fleet.url]]
        self._secret = shop.app_secret
        self._run = uuid4().hex[:8]
        self._todo = iter(enumerate(self.bodies))
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._lane) for _ in range(_LANES)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                until(lambda: self._errors or not any(t.is_alive() for t in self._threads), "all was accepted", 120)
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()
        if self._errors:
            raise self._errors[0]

    def until_accepted(self, share: float) -> None:
        """Wait until this share of the bodies has been answered 200."""
        until(lambda: len(self.accepted) >= share * len(self.bodies), f"{share:.0%} were accepted", 120)

    def until_more_are_accepted(self, count: int) -> None:
        """Wait for so many more, begun after this call: what is on its way now does not count."""
        wanted = len(self.accepted) + _LANES + count
        until(lambda: len(self.accepted) >= wanted, f"{count} more were accepted")

    def _lane(self) -> None:
        try:
            with httpx.Client(timeout=10, trust_env=False, verify=certificates()) as client:
                while not self._stop.is_set() and (body := self._next()):
                    self._send(client, *body)
        except BaseException as error:
            self._errors.append(error)

    def _next(self) -> tuple[int, bytes] | None:
        with self._lock:
            return next(self._todo, None)

    def _send(self, client: httpx.Client, n: int, raw: bytes) -> None:
        headers = {"Content-Type": "application/json", "X-Hub-Signature-256": meta.sign(raw, self._secret)}
        pause, attempt = 0.1, 0
        while not self._stop.wait(pause if attempt else 0):
            attempt += 1
            id_ = f"{self._run}-{n}-{attempt}"
            url = self._urls[(n + attempt) % len(self._urls)]
            status: int | None = None
            with contextlib.suppress(httpx.HTTPError):
                status = client.post(url, content=raw, headers={**headers, "X-Request-ID": id_}).status_code
            with self._lock:
                self.answers[status] += 1
                if status == 200:
                    self.accepted[id_] = raw
                    return
            pause = min(pause * 2, 1.0)
