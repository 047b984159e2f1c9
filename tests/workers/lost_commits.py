"""A way to the database on which a commit is made and its answer is lost: whoever asked cannot know of it."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import psycopg.conninfo
import pytest

from pombal import db
from pombal.settings import settings


class LostCommits:
    """Forwards connections to the database; `lose(n)` cuts off the n-th COMMIT from now once it was carried out."""

    def __init__(self, url: str) -> None:
        there = psycopg.conninfo.conninfo_to_dict(url)
        self._path = f"{there['host']}/.s.PGSQL.{there['port']}"
        self._server = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._left = 0
        self._open: list[socket.socket] = [self._server]
        self.lost = 0
        self.url = f"postgresql://{there['user']}@127.0.0.1:{self._server.getsockname()[1]}/{there['dbname']}"
        threading.Thread(target=self._accept, daemon=True).start()

    def lose(self, n: int) -> None:
        self._left = n

    def close(self) -> None:
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                database = socket.socket(socket.AF_UNIX)
                database.connect(self._path)
                self._open += [client, database]
                is_cut = threading.Event()
                threading.Thread(target=self._ask, args=(client, database, is_cut), daemon=True).start()
                threading.Thread(target=self._answer, args=(client, database, is_cut), daemon=True).start()

    def _ask(self, client: socket.socket, database: socket.socket, is_cut: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while said := client.recv(1 << 20):
                if b"COMMIT" in said and self._is_the_one():
                    is_cut.set()
                database.sendall(said)
            database.shutdown(socket.SHUT_WR)

    def _answer(self, client: socket.socket, database: socket.socket, is_cut: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while said := database.recv(1 << 20):
                if is_cut.is_set():
                    self.lost += 1
                    break
                client.sendall(said)
            client.shutdown(socket.SHUT_RDWR)

    def _is_the_one(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left == 0


@contextlib.contextmanager
def lost_commits(monkeypatch: pytest.MonkeyPatch) -> Iterator[LostCommits]:
    """This process reaches its database by that way, until the end of the block."""
    way = LostCommits(os.environ["DATABASE_URL"])
    db.engine().dispose()
    with monkeypatch.context() as patch:
        patch.setenv("DATABASE_URL", way.url)
        settings.cache_clear()
        db.engine.cache_clear()
        try:
            yield way
        finally:
            db.engine().dispose()
            patch.undo()
            settings.cache_clear()
            db.engine.cache_clear()
            way.close()
