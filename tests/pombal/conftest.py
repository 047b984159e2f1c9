"""Fixtures that import the fleet only when they run: pytest loads this file before the addresses are known."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.pombal.breakable import Errands, Servers


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Servers]":
    """A PostgreSQL and a Valkey that tests may break."""
    from tests.pombal.breakable import breakable

    with breakable(tmp_path_factory.mktemp("breakable")) as servers:
        yield servers


@pytest.fixture(scope="session")
def errand_worker(servers: "Servers") -> "Iterator[Errands]":
    from tests.pombal.breakable import Errands, at_work

    effects = servers.folder / "effects"
    with at_work(servers, "errands", effects, threads=4, env={}) as worker:
        errands = Errands(servers, worker, effects)
        errands.post("note", "ready")
        errands.wait_for("ready")
        yield errands


@pytest.fixture
def errands(errand_worker: "Errands") -> "Iterator[Errands]":
    """The shared worker; whatever a test did, its processes must have survived it."""
    before = errand_worker.worker.group()
    yield errand_worker
    assert errand_worker.worker.group() == before, errand_worker.worker.text()
