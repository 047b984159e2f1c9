"""Servers of a test's own, to be killed, frozen and filled up, and a shop on them."""

import contextlib
import json
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import redis

from pombal.local import Postgres, Server, Valkey, ensure_roles_and_database, start_postgres, start_valkey
from pombal.supervisor import processes
from tests.web.process import pombal


class Door(NamedTuple):
    """Where to post, and with which secret."""

    url: str
    app_secret: str


class Island:
    """A PostgreSQL and a Valkey that no other test uses."""

    def __init__(self, postgres: Postgres, valkey: Valkey) -> None:
        self.postgres, self.valkey = postgres, valkey
        app_url, owner_url = ensure_roles_and_database(postgres)
        self.env = {"DATABASE_URL": app_url, "DATABASE_OWNER_URL": owner_url, "REDIS_URL": valkey.url}

    def pombal(self, *arguments: str) -> str:
        done = pombal(*arguments, env=self.env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def migrate(self) -> None:
        self.pombal("migrate")

    def a_door(self) -> Door:
        """A Meta channel on an app of its own."""
        slug, secret = f"t{uuid.uuid4().hex[:12]}", uuid.uuid4().hex
        self.pombal("tenant", "create", slug, "--name", "A tenant")
        config = json.dumps({"phone_number_id": "880011", "waba_id": "700100", "app_secret": secret})
        made = json.loads(self.pombal("channel", "create", slug, "meta", "--name", "c", "--config", config, "--json"))
        return Door(made["webhook"], secret)

    def superuser(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.postgres.database_url("postgres", "pombal"), autocommit=True)

    def bodies(self) -> list[bytes]:
        """All raw bodies that were kept."""
        with self.superuser() as connection:
            return [bytes(raw) for (raw,) in connection.execute("SELECT raw FROM delivery")]

    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.valkey.url)


@contextlib.contextmanager
def an_island(folder: Path) -> Iterator[Island]:
    with (
        start_postgres(folder, settings={"fsync": "off", "log_min_messages": "fatal"}) as postgres,
        start_valkey(folder) as valkey,
    ):
        yield Island(postgres, valkey)


@contextlib.contextmanager
def frozen(server: Server) -> Iterator[None]:
    """Stop every process of a server for the time of a block: connections stay open, and nothing answers."""
    os.kill(server.pid, signal.SIGSTOP)  # first, so that it forks no more
    family = [server.pid, *(process.pid for process in processes() if process.parent == server.pid)]
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
