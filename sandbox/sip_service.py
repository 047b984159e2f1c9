"""The SIP registrar and the drachtio as parts of the sandbox process: their ports, and what the configuration says."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import NamedTuple

from sandbox.config import Config, ConfigError, ConfigFile
from sandbox.drachtio import Dispatch, Standin
from sandbox.sip import PORT, Registrar

log = logging.getLogger("sandbox")
LOOK = 1.0  # seconds between looks at the configuration

USUAL = -1
"""The usual port, or any that is free when somebody has it."""


class Places(NamedTuple):
    """Where they are.

    port, drachtio_port, drachtio_sip_port  0: any; None: none. The first may be `USUAL`
    """

    host: str = "127.0.0.1"
    port: int | None = None
    drachtio_port: int | None = None
    drachtio_sip_port: int = 0


NOWHERE = Places()


class Sip:
    """`registrar` can be told of accounts and habits at once, and answers while `running` is entered.

    Without a port nobody can register. `drachtio` is None unless it has a port.
    """

    def __init__(self, config: ConfigFile, places: Places) -> None:
        self.registrar = Registrar()
        self.drachtio: Standin | None = None
        self._file, self._places, self._last = config, places, Config()
        if places.drachtio_port is not None:
            secret, sip_port = self._config.drachtio.secret, places.drachtio_sip_port
            self.drachtio = Standin(secret, host=places.host, port=places.drachtio_port, sip_port=sip_port)

    @property
    def address(self) -> str | None:
        its = self.registrar
        return None if its.port is None else f"{its.host}:{its.port}"

    def configure(self) -> None:
        """Read the configuration again if it has changed; one that cannot be read changes nothing."""
        config = self._config
        self.registrar.users.configure(config.sip.users)
        its = config.drachtio
        if self.drachtio is not None:
            self.drachtio.secret = its.secret
            self.drachtio.dispatch = Dispatch(its.dispatch_url, its.dispatch_key) if its.dispatch_url else None

    @property
    def _config(self) -> Config:
        with suppress(ConfigError):  # `GET /health` says what is wrong with it
            self._last = self._file.read()
        return self._last

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Raises OSError when a port is taken."""
        async with AsyncExitStack() as stack:
            if self._places.port is not None:
                await self._open(self._places.host, self._places.port)
                stack.callback(self.registrar.close)
                log.info("SIP registrar on %s, UDP and TCP", self.address)
            if self.drachtio is not None:
                await self._start(self.drachtio)
                stack.push_async_callback(self.drachtio.stop)
                log.info("drachtio on port %d, SIP on port %d", self.drachtio.port, self.drachtio.sip_port)
            task = asyncio.create_task(self._follow())
            try:
                yield
            finally:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def _open(self, host: str, port: int) -> None:
        if port == USUAL:
            try:
                await self.registrar.open(host, PORT)
                return
            except OSError:
                port = 0
        try:
            await self.registrar.open(host, port)
        except OSError as error:
            log.error("no SIP registrar on %s:%d: %s", host, port, error.strerror)
            raise

    async def _start(self, drachtio: Standin) -> None:
        try:
            await drachtio.start()
        except OSError as error:
            log.error("no drachtio on ports %d and %d: %s", drachtio.port, drachtio.sip_port, error.strerror)
            raise

    async def _follow(self) -> None:
        while True:
            self.configure()
            await asyncio.sleep(LOOK)
