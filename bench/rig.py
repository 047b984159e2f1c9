"""What the benchmarks share: embedded servers in a temporary folder, a seeded database to copy, processes, CPU time.

Nothing here listens elsewhere than on loopback or a socket, and everything ends with the script.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec
import psycopg
import redis

from pombal.local import Postgres, Valkey, ensure_roles_and_database, start_postgres, start_valkey
from pombal.secrets import new_fernet_key
from pombal.settings import settings
from pombal.supervisor import processes, spawn
from sandbox import meta, traffic

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SEED = 7
_START_SECONDS = 20.0


class Failed(SystemExit):
    """The benchmark cannot go on, and its figures must not be believed."""

    def __init__(self, why: str) -> None:
        super().__init__(f"FAILED: {why}")


class Shop(NamedTuple):
    """A tenant with one number on an app of its own."""

    slug: str
    number: meta.Number
    secret: str


class Rig:
    """Servers that run, and a migrated and seeded database `pombal` of which every run gets a copy."""

    def __init__(self, folder: Path, postgres: Postgres, valkey: Valkey, *, statements: bool) -> None:
        self.folder, self.postgres, self.valkey = folder, postgres, valkey
        self.statements = statements
        self.shops: list[Shop] = []
        self.sandbox_pid = 0  # of the simulated Meta, where a benchmark has one
        self._copies = 0

    def seed(self, tenants: int) -> None:
        from pombal import db
        from pombal.cli import admin

        for n in range(tenants):
            slug, secret = f"shop-{n}", uuid4().hex
            number = meta.Number(str(880_000_000_000_001 + n), str(990_000_000_000_001 + n))
            config = admin.MetaConfig(
                phone_number_id=number.phone_number_id,
                waba_id=number.waba_id,
                app_secret=secret,
                verify_token=secret,
                access_token=secret,
            )
            channel, _ = admin.add_meta_channel(admin.add_tenant(slug, slug), slug, config)
            with db.session([channel.tenant_id]) as s:  # only `sending.py` sends, and it wants no limit
                channel.config = channel.config | {"messages_per_second": 100_000}
                s.merge(channel)
            self.shops.append(Shop(slug, number, secret))
        db.engine().dispose()

    def copy(self) -> str:
        """A new database, equal to the seeded one; returns its name. The queue is emptied."""
        self._copies += 1
        name = f"run_{self._copies}"
        with psycopg.connect(self.postgres.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE pombal OWNER pombal_owner")
            connection.execute("CHECKPOINT")
        if self.statements:
            with self.superuser(name) as connection:
                connection.execute("CREATE EXTENSION pg_stat_statements")
        with redis.Redis.from_url(self.valkey.url) as client:
            client.flushall()
        return name

    def drop(self, name: str) -> None:
        with psycopg.connect(self.postgres.url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def superuser(self, dbname: str) -> psycopg.Connection[Any]:
        """A connection that skips every policy."""
        return psycopg.connect(self.postgres.database_url("postgres", dbname), autocommit=True)

    @contextmanager
    def process(self, name: str, dbname: str, *arguments: str) -> Iterator[int]:
        """Run `python ARGUMENTS` on one of the databases until the end of the block; gives its process id."""
        env = {
            **os.environ,
            "DATABASE_URL": self.postgres.database_url("pombal", dbname),
            "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}",
            "LOG_FORMAT": "json",
            "TMPDIR": str(self.folder),  # for the snapshots of the metrics
        }
        log = self.folder / f"{dbname}-{name}.log"
        with log.open("ab") as out:
            child = spawn(
                [sys.executable, *arguments], death_signal=signal.SIGTERM, env=env, cwd=ROOT, stdout=out, stderr=out
            )
        try:
            yield child.pid
            if child.poll() is not None:
                raise Failed(f"{name} ended by itself")
        except Failed:
            print(f"the log of {name} ends:\n{log.read_text()[-2000:]}", file=sys.stderr)
            raise
        finally:
            child.terminate()
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


@contextmanager
def rig(tenants: int, *, statements: bool = False) -> Iterator[Rig]:
    """Servers as `pombal up` starts them (fsync on, synchronous_commit on), migrated, with so many tenants."""
    with ExitStack() as running:
        folder = Path(tempfile.mkdtemp(prefix="pombal-bench-"))
        running.callback(shutil.rmtree, folder, ignore_errors=True)
        library = {"shared_preload_libraries": "pg_stat_statements"} if statements else {}
        postgres = running.enter_context(start_postgres(folder, settings=library))
        valkey = running.enter_context(start_valkey(folder))
        app_url, owner_url = ensure_roles_and_database(postgres)
        for name in ("HOST", "PORT", "LOG_LEVEL", "METRICS_TOKEN", "WHATSAPP_APP_SECRET", "PROMETHEUS_MULTIPROC_DIR"):
            os.environ.pop(name, None)
        os.environ |= {
            "DATABASE_URL": app_url,
            "DATABASE_OWNER_URL": owner_url,
            "REDIS_URL": valkey.url,
            "POMBAL_DATA": str(folder),
            "POMBAL_MODE": "development",
            "POMBAL_NO_BOOTSTRAP": "1",
            "POMBAL_SECRET_KEYS": new_fernet_key(),
        }
        settings.cache_clear()
        subprocess.run([sys.executable, "-m", "pombal", "migrate"], cwd=ROOT, check=True, capture_output=True)
        made = Rig(folder, postgres, valkey, statements=statements)
        made.seed(tenants)
        yield made


def requests_for(shops: list[Shop], bodies: int, contacts: int) -> list[bytes]:
    """Signed requests of one message each, spread evenly over the shops and their customers, in a random order."""
    made = []
    for n, shop in enumerate(shops):
        share = bodies // len(shops) + (n < bodies % len(shops))
        for raw in traffic.one_message(SEED + n, share, [shop.number], contacts=contacts // len(shops)):
            made.append(request(shop, raw))
    Random(SEED).shuffle(made)
    return made


def request(shop: Shop, raw: bytes) -> bytes:
    """One whole HTTP request, as Meta sends it."""
    head = (
        f"POST /webhooks/whatsapp/{shop.slug} HTTP/1.1\r\n"
        "Host: localhost\r\n"
        "Accept: */*\r\n"
        "User-Agent: facebookexternalua\r\n"
        "Content-Type: application/json\r\n"
        f"X-Hub-Signature-256: {meta.sign(raw, shop.secret)}\r\n"
        f"Content-Length: {len(raw)}\r\n\r\n"
    )
    return head.encode() + raw


def written(folder: Path, requests: Iterable[bytes]) -> Path:
    """The file that `load.py` reads."""
    file = folder / "requests.msgpack"
    file.write_bytes(msgspec.msgpack.encode(list(requests)))
    return file


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_open(port: int) -> None:
    """Until something listens; for the fleet's own web tier see `wait_until_ready`."""

    def is_open() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait(is_open, f"nothing listens on port {port}")


def wait_until_ready(port: int) -> None:
    def is_ready() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    wait(is_ready, "the web tier is not ready")


def wait(condition: Callable[[], bool], otherwise: str, seconds: float = _START_SECONDS, every: float = 0.05) -> None:
    """Return when the condition holds. Fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Failed(f"{otherwise}, after {seconds:.0f} s")
        time.sleep(every)


def cpu_seconds(roots: Mapping[str, int]) -> dict[str, float]:
    """CPU time that each process and all it has started have used so far."""
    children: dict[int, list[int]] = {}
    for process in processes():
        children.setdefault(process.parent, []).append(process.pid)
    return {name: sum(_used(pid) for pid in _family(pid, children)) for name, pid in roots.items()}


def _family(pid: int, children: Mapping[int, list[int]]) -> Iterator[int]:
    yield pid
    for child in children.get(pid, ()):
        yield from _family(child, children)


def _used(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0  # it has just ended; its parent has its time
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # user, system, and of children that have ended
