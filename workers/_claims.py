"""Claims on files that this process works on: extended while it lives, so that they can be short.

A process that dies is noticed by its claims running out, within `models.media.CLAIM`.
"""

import threading
from uuid import UUID

from sqlalchemy import RowMapping

from models import Media
from pombal import db, log
from pombal.middleware import is_store_trouble

_EVERY = 5.0  # seconds

_log = log.get()


class Claims:
    """Safe for threads; its own thread begins with the first claim."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[UUID, RowMapping] = {}  # by token
        self._thread: threading.Thread | None = None

    def hold(self, row: RowMapping) -> None:
        """Extend this claim from now on."""
        with self._lock:
            self._held[row["claim_token"]] = row
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="claims", daemon=True)
                self._thread.start()

    def has(self, row: RowMapping) -> bool:
        """Whether it is still ours, as far as is known."""
        return row["claim_token"] in self._held

    def drop(self, row: RowMapping) -> None:
        """It is over."""
        with self._lock:
            self._held.pop(row["claim_token"], None)

    def _run(self) -> None:
        pause = threading.Event()
        while not pause.wait(_EVERY):
            with self._lock:
                held = dict(self._held)
            if held:
                self._extend(held)

    def _extend(self, held: dict[UUID, RowMapping]) -> None:
        try:
            with db.session({row["tenant_id"] for row in held.values()}) as s:
                ours = Media.extend(s, list(held.values()))
        except Exception as error:
            # They run out if this goes on; whoever takes them over then finds this one's verdict fenced.
            if not is_store_trouble(error):
                _log.error("claims_not_extended", exc_info=error)
            return
        for token in held.keys() - ours:
            with self._lock:
                self._held.pop(token, None)
