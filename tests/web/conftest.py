"""One web process for the tests that leave it as they found it; those that hurt it start their own."""

from collections.abc import Iterator

import pytest

from tests.factories import Shop, a_shop
from tests.web.process import Web, running


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    # The token is for whoever asks from outside; tests come from loopback unless they say otherwise.
    env = {"METRICS_TOKEN": METRICS_TOKEN}
    with running(tmp_path_factory.mktemp("web") / "web.log", env) as web:
        yield web


@pytest.fixture(scope="session")
def shop() -> Shop:
    return a_shop()


METRICS_TOKEN = "m" * 20 + "e7r1c5-0f-the-fl33t"
