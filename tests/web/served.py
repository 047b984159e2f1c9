"""The web tier's own server in a thread of the tests: for time limits that a test cannot wait out."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from pombal.supervisor import until
from tests.web.process import START, a_port
from web.server import GuardedProtocol, Server


@contextlib.contextmanager
def served(app: Any) -> Iterator[int]:
    """The port on which an application is served for the time of a block."""
    port = a_port()
    config = uvicorn.Config(
        app, host="127.0.0.1", port=port, http=GuardedProtocol, ws="none", lifespan="off", log_config=None
    )
    server = Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert until(lambda: server.started, time.monotonic() + START)
        yield port
    finally:
        server.should_exit = True
        thread.join()
