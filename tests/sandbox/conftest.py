"""What several test files of the sandbox start."""

from collections.abc import Iterator

import pytest

from tests.sandbox.servers import Receiver, receiver


@pytest.fixture(scope="module")
def there() -> Iterator[Receiver]:
    """Where the simulated Meta sends its webhooks to."""
    with receiver() as running:
        yield running
