"""One PostgreSQL and one Valkey for each process of the run, migrated as in production; a fresh tenant for each test.

The addresses are put into the environment before any test module is imported: the broker is made at import.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from models import Tenant
    from tests.sandbox.baileys_servers import Baileys

_running = ExitStack()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """What `-n auto` is: two for each core, since tests wait for half of their time."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # xdist knows
    return 2 * (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def pytest_configure(config: pytest.Config) -> None:
    """Start the servers and migrate. Nothing of the fleet may be imported before."""
    # A thousand processes are started: without compiled files each takes four times as long until it does anything.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # the one that hands the tests out runs none itself
    from pombal import garbage
    from pombal.local import ensure_roles_and_database, start_postgres, start_valkey
    from pombal.secrets import new_fernet_key
    from pombal.settings import settings

    garbage.starting()
    data = Path(tempfile.mkdtemp(prefix="pombal-tests-"))
    _running.callback(shutil.rmtree, data, ignore_errors=True)
    postgres = _running.enter_context(start_postgres(data, settings={"fsync": "off", "log_min_messages": "fatal"}))
    valkey = _running.enter_context(start_valkey(data))
    app_url, owner_url = ensure_roles_and_database(postgres)
    os.environ |= {
        "DATABASE_URL": app_url,
        "DATABASE_OWNER_URL": owner_url,
        "REDIS_URL": valkey.url,
        "POMBAL_DATA": str(data),
        "POMBAL_MODE": "development",
        "POMBAL_NO_BOOTSTRAP": "1",
        "POMBAL_SECRET_KEYS": new_fernet_key(),
        "POMBAL_TEST_SUPERUSER_URL": postgres.database_url("postgres", "pombal"),
        "LOG_FORMAT": "json",
    }
    settings.cache_clear()

    from pombal.cli.fleet import upgrade

    upgrade()


def pytest_collection_finish(session: pytest.Session) -> None:
    """All modules and thousands of tests are there now, and stay: no test spends its time on looking through them."""
    from pombal import garbage

    garbage.settled()


def pytest_unconfigure(config: pytest.Config) -> None:
    if "POMBAL_TEST_SUPERUSER_URL" in os.environ:
        from pombal import db

        db.engine().dispose()
    _running.close()


@pytest.fixture
def queues() -> Iterator[None]:
    """Empty queues before and after: what a test enqueues is its own."""
    from workers import broker

    broker.flush_all()
    yield
    broker.flush_all()


@pytest.fixture
def _near_gateways(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gateways on this machine may be reached."""
    from pombal.settings import settings

    monkeypatch.setenv("MEDIA_ALLOWED_NETWORKS", "127.0.0.0/8")
    settings.cache_clear()
    yield
    monkeypatch.undo()
    settings.cache_clear()


@pytest.fixture
def tenant() -> "Tenant":
    from tests.factories import a_tenant

    return a_tenant()


@pytest.fixture
def baileys() -> "Iterator[Baileys]":
    """Simulated Baileys gateways."""
    from tests.sandbox.baileys_servers import a_baileys

    with a_baileys() as its:
        yield its
