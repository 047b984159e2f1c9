"""Accounts, and the registrar of a worker on a thread of its own, for tests of registrations."""

import asyncio
import itertools
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import RowMapping

from models import SipRegistration
from pombal import db
from pombal.settings import settings
from sandbox.sip_thread import SipThread
from tests.factories import a_tenant, superuser
from workers._registrar import Registrar
from workers._rounds import new_loop

PATIENCE = 60.0  # seconds; how long a condition may take on a busy machine, never how long it should
PASSWORD = "s3cret"
_numbers = itertools.count(5511_9000_0001)


class Account:
    """One row, and what a test looks at of it."""

    def __init__(self, row: SipRegistration) -> None:
        self.tenant_id, self.id = row.tenant_id, row.id
        self.user, self.token = row.username, row.contact_token

    def row(self) -> RowMapping:
        with db.session([self.tenant_id]) as s:
            return SipRegistration.listing(s, id_=self.id)[0]

    def until(self, condition: Callable[[RowMapping], bool]) -> RowMapping:
        """The row, once it is so."""
        row: RowMapping = until(self.row, condition)
        return row

    def ask(self) -> None:
        with db.session([self.tenant_id]) as s:
            assert SipRegistration.ask(s, self.tenant_id, self.id)

    def disable(self) -> None:
        with db.session([self.tenant_id]) as s:
            assert SipRegistration.disable(s, self.tenant_id, self.id)

    def remove(self) -> None:
        with db.session([self.tenant_id]) as s:
            assert SipRegistration.remove(s, self.tenant_id, self.id)

    def change(self, **given: Any) -> None:
        with db.session([self.tenant_id]) as s:
            assert SipRegistration.change(s, self.tenant_id, self.id, **given)

    def set(self, **columns: Any) -> None:
        """Write columns as nobody would, to make what takes hours be so now; an SQL expression as `text`."""
        with superuser() as connection:
            for name, value in columns.items():
                connection.execute(
                    f"UPDATE sip_registration SET {name} = {value} WHERE id = %s",  # noqa: S608 - a test's own words
                    [self.id],
                )

    @property
    def outcomes(self) -> list[str]:
        return [one["outcome"] for one in self.row()["history"]]


def until(look: Callable[[], Any], condition: Callable[[Any], bool]) -> Any:
    """What is seen, once the condition holds."""
    last = time.monotonic() + PATIENCE
    while not condition(seen := look()):
        assert time.monotonic() < last, f"never so; last seen: {seen}"
        threading.Event().wait(0.02)
    return seen


def an_account(
    host: str, port: int | None, user: str, *, password: str = PASSWORD, tenant_id: UUID | None = None, **given: Any
) -> Account:
    """An account of a new tenant, due at once."""
    row = SipRegistration.make(
        tenant_id or a_tenant().id,
        name=f"account-{secrets.token_hex(4)}",
        host=host,
        username=user,
        password=password,
        port=port,
        **given,
    )
    with db.session([row.tenant_id]) as s:
        s.add(row)
    return Account(row)


@contextmanager
def a_registering_worker() -> Iterator[Registrar]:
    """What a worker of the queue has: a registrar that runs until the end, on a thread of its own."""
    made: list[tuple[asyncio.AbstractEventLoop, Registrar]] = []
    is_up, failures = threading.Event(), []

    async def registering() -> None:
        made.append((asyncio.get_running_loop(), Registrar()))
        is_up.set()
        await made[0][1].run()

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=new_loop) as runner:
                runner.run(registering())
        except BaseException as error:
            failures.append(error)
        finally:
            is_up.set()

    thread = threading.Thread(target=run)
    thread.start()
    is_up.wait()
    try:
        yield made[0][1]
    finally:
        if thread.is_alive():
            made[0][0].call_soon_threadsafe(made[0][1].stop)
        thread.join(PATIENCE)
    assert not failures, failures


def a_number() -> str:
    """A user that no other test of this process has."""
    return str(next(_numbers))


def a_customer(provider: SipThread, **given: Any) -> Account:
    """An account at the provider, and its row."""
    user = a_number()
    provider.user(user, PASSWORD)
    return an_account("127.0.0.1", provider.port, user, **given)


@contextmanager
def nearby(monkeypatch: pytest.MonkeyPatch, **given: str) -> Iterator[None]:
    """These settings, and registrars on this machine may be reached. Nobody else's account is due, nor one later."""
    for name, value in {"SIP_ALLOWED_NETWORKS": "127.0.0.0/8", **given}.items():
        monkeypatch.setenv(name, value)
    settings.cache_clear()
    nobody_registers()
    try:
        yield
    finally:
        nobody_registers()
        monkeypatch.undo()
        settings.cache_clear()


def nobody_registers() -> None:
    """No account that a test left behind is due for another's worker, and no drachtio of one is said to be away."""
    with superuser() as connection:
        connection.execute("DELETE FROM sip_registration")
        connection.execute("DELETE FROM lease WHERE name = 'drachtio_away'")
