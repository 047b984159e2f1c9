"""Servers that tests may break, and a worker process that runs `tests/pombal/jobs.py`."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dramatiq
import msgspec
import psycopg
from psycopg.rows import dict_row

from pombal.broker import HardenedBroker, redis_client
from pombal.ids import uuid7
from pombal.local import Postgres, Valkey, ensure_roles_and_database, start_postgres, start_valkey
from tests.pombal.processes import Running, output, running, until


@dataclass
class Servers:
    """A migrated PostgreSQL and a Valkey that tests may kill, and how a process finds them."""

    postgres: Postgres
    valkey: Valkey
    env: dict[str, str]
    folder: Path

    def sql(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        """Run as the superuser: the truth, whatever the policies say."""
        url = self.postgres.database_url("postgres", "pombal")
        with psycopg.connect(url, autocommit=True, row_factory=dict_row) as connection:
            cursor = connection.execute(statement.encode(), values)
            return cursor.fetchall() if cursor.description else []

    def messages(self, queue: str) -> list[dict[str, Any]]:
        """What Redis holds of a queue: waiting, fetched, or (with `.DQ` or `.XQ`) delayed or dead; without junk."""
        with redis_client(self.valkey.url) as client:
            found: Any = client.hvals(f"dramatiq:{queue}.msgs")
        messages = []
        for body in found:
            with contextlib.suppress(msgspec.DecodeError, RecursionError):
                messages.append(msgspec.json.decode(body))
        return [message for message in messages if isinstance(message, dict)]

    def waiting(self, queue: str) -> int:
        """How many are in nobody's hands."""
        with redis_client(self.valkey.url) as client:
            return int(client.llen(f"dramatiq:{queue}"))

    def fetched(self, queue: str) -> int:
        """How many are in some process's hands."""
        with redis_client(self.valkey.url) as client:
            held: Any = [client.scard(key) for key in client.scan_iter(match=f"dramatiq:__acks__.*.{queue}", count=500)]
        return sum(held)

    def clear(self, *queues: str) -> None:
        """Forget what other tests left in these queues, and in anybody's hands."""
        with redis_client(self.valkey.url) as client:
            for queue in queues:
                held = client.scan_iter(match=f"dramatiq:__acks__.*.{queue}*", count=500)
                parts = [f"dramatiq:{queue}{part}{kind}" for part in ("", ".DQ", ".XQ") for kind in ("", ".msgs")]
                client.delete(*parts, *held)

    def a_job(self, actor: str, *args: Any, queue: str | None = None) -> str:
        """Enqueue a job; returns its message id."""
        with redis_client(self.valkey.url) as client:
            message: dramatiq.Message[Any] = dramatiq.Message(
                queue_name=queue or actor, actor_name=actor, args=args, kwargs={}, options={}
            )
            return HardenedBroker(client, []).enqueue(message).message_id

    def a_delivery(self, **columns: str) -> str:
        """A row that waits for its bell; columns are SQL expressions."""
        id_ = str(uuid7())
        given = {
            "id": f"'{id_}'",
            "provider": "'meta'",
            "app_id": "gen_random_uuid()",
            "raw": "'{}'",
            "next_ring_at": "now()",
            **columns,
        }
        names, values = ", ".join(given), ", ".join(given.values())
        self.sql(f"INSERT INTO delivery ({names}) VALUES ({values})")  # noqa: S608 - the test's own words
        return id_


@contextlib.contextmanager
def breakable(data: Path) -> Iterator[Servers]:
    """Start and migrate them."""
    quick = {"fsync": "off", "shared_buffers": "16MB", "log_min_messages": "fatal"}
    with start_postgres(data, settings=quick) as postgres, start_valkey(data) as valkey:
        app_url, owner_url = ensure_roles_and_database(postgres)
        (data / "metrics").mkdir()
        env = {
            "DATABASE_URL": app_url,
            "DATABASE_OWNER_URL": owner_url,
            "REDIS_URL": valkey.url,
            "PROMETHEUS_MULTIPROC_DIR": str(data / "metrics"),
        }
        output("-m", "pombal", "migrate", env=env)
        yield Servers(postgres, valkey, env, data)


class Errands:
    """Orders for the test actors, and what became of them."""

    def __init__(self, servers: Servers, worker: Running, effects: Path) -> None:
        self.servers = servers
        self.worker = worker
        self._effects = effects
        self._broker = HardenedBroker(redis_client(servers.valkey.url), [])

    def post(self, actor: str, id_: str, *more: str, queue: str = "errands", delay: int | None = None) -> str:
        """Enqueue a job as the web tier does; returns its message id."""
        message = dramatiq.Message(queue_name=queue, actor_name=actor, args=(id_, *more), kwargs={}, options={})  # type: dramatiq.Message[Any]
        return self._broker.enqueue(message, delay=delay).message_id

    def put(self, body: bytes, queue: str = "errands") -> None:
        """Put bytes into the queue as somebody might who is not of this fleet."""
        self._broker.do_enqueue(queue, uuid7().hex, body)

    def done(self) -> list[str]:
        return self._effects.read_text().splitlines()

    def count(self, what: str) -> int:
        return self.done().count(what)

    def wait_for(self, what: str, times: int = 1) -> None:
        until(
            lambda: self.count(what) >= times, why=lambda: f"{what}: {self.count(what)}; {self.worker.text()[-5000:]}"
        )

    def letters(self, id_: str) -> list[dict[str, Any]]:
        """The dead letters of the job with this id."""
        return self.servers.sql("SELECT * FROM dead_letter WHERE args->'args'->>0 = %s", id_)

    def buried(self, id_: str) -> list[dict[str, Any]]:
        """The job in its queue's `.XQ`."""
        return [
            m for m in self.servers.messages("errands.XQ") if isinstance(m.get("args"), list) and m["args"][:1] == [id_]
        ]

    def is_drained(self) -> bool:
        """Nothing waits, is delayed, or sits in somebody's hands."""
        queues = ("errands", "errands.DQ")
        return not any(self.servers.messages(q) or self.servers.waiting(q) or self.servers.fetched(q) for q in queues)


@contextlib.contextmanager
def at_work(servers: Servers, queue: str, effects: Path, *, threads: int, env: dict[str, str]) -> Iterator[Running]:
    """A worker process on one queue of `tests/pombal/jobs.py`."""
    effects.touch()
    given = {**servers.env, "POMBAL_TEST_EFFECTS": str(effects), **env}
    log = servers.folder / f"{queue}-{uuid7().hex}.log"
    arguments = ("-m", "dramatiq", "tests.pombal.jobs", "-Q", queue, "-p", "1", "-t", str(threads), "--skip-logging")
    with running(*arguments, env=given, log=log) as worker:
        yield worker


def a_message(**fields: Any) -> bytes:
    """A message of the errands, spoilt by some fields."""
    given: dict[str, Any] = {
        "queue_name": "errands",
        "actor_name": "note",
        "args": ["junk"],
        "kwargs": {},
        "options": {"redis_message_id": "some"},
        "message_id": "one",
        "message_timestamp": 1,
    }
    return msgspec.json.encode({**given, **fields})


JUNK = [
    b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07a pickle\x94.",
    b"not JSON",
    b"",
    b"[" * 20_000,
    b"[]",
    b"5",
    b"null",
    b"{}",
    b'{"queue_name":"errands"}',
    a_message(queue_name="incoming_message"),
    a_message(queue_name=None),
    a_message(args=5),
    a_message(kwargs=[]),
    a_message(options=[]),
    a_message(options=None),
    a_message(options={}),
    a_message(options={"redis_message_id": 7}),
    a_message(actor_name=7),
    a_message(message_id={}),
    a_message(message_timestamp="soon"),
    a_message(more="fields"),
    # These would end the thread that runs the job, or keep its dead letter from being written.
    a_message(actor_name="fails", options={"redis_message_id": "some", "throws": "anything"}),
    a_message(actor_name="fails", options={"redis_message_id": "some", "retries": "many"}),
]
