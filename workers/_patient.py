"""A session as its repair sees it: its gateway, the store of its keys, its errors. Not a queue: the underscore."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias, TypeVar
from uuid import UUID

from sqlalchemy import RowMapping

import providers
from models import Repair, SessionEnd, SessionError
from models.repair import Step
from models.session_error import Tally
from pombal import db
from pombal.errors import Rejected
from pombal.secrets import unseal
from pombal.settings import settings
from providers import authstore
from providers.authstore import Store
from providers.baileys_dialects import normal_base
from providers.gateway import Gateway
from providers.http import Clients
from workers import _ladder
from workers._circuit import Circuit
from workers._ladder import Means

T = TypeVar("T")
Row: TypeAlias = RowMapping | dict[str, Any]

LATELY = timedelta(minutes=30)  # when a connection ended that matters still
_MEMORY = timedelta(days=365)  # of a gateway whose restart asked for a QR code
_MOST_CONTACTS = 5  # that are refreshed at once
_MOST_GROUPS = 50


class Patient:
    """`row` has a channel's `tenant_id`, `channel_id`, `kind`, `config`, `sealed` and `own_id`, and of its incident
    `host`, `since` (None: there is none yet) and `wanted_step`."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.tenant_id: UUID = row["tenant_id"]
        self.channel_id: UUID = row["channel_id"]
        self.since: datetime = row["since"] or datetime.now(UTC) - settings().require_error_window()

    def ask(self, what: Callable[[Gateway], Awaitable[T]]) -> T:
        """Do this with the session's gateway. Raises `InstanceFault`, `Misconfigured`, `Permanent` or `Rejected`."""

        async def call() -> T:
            clients = Clients(1)
            try:
                gateway = providers.gateway_of(self.row["kind"], clients, self.row["config"], self._secrets())
                # A gateway that hangs must not take the threads of other gateways' sessions, which may be closed.
                return await circuit.reach(gateway.host, self.channel_id, lambda: what(gateway))
            finally:
                await clients.close()

        return asyncio.run(call())

    def store(self) -> Store | None:
        """Where its keys are, if the channel says so. Raises `StoreFault`."""
        return authstore.store(self.row["config"], self._secrets(), self.row["own_id"])

    def means(self, gateway: Gateway) -> Means:
        """What may and can be done to it."""
        config = self.row["config"]
        with db.session() as s:
            db.see_all(s)
            loses = Repair.asked_for_a_qr_code(s, self.row["host"], since=_MEMORY)
        return Means(
            gateway.abilities,
            has_store=config.get("auth") is not None,
            may_refresh_contacts=config.get("may_refresh_contacts") is True,
            may_drop_keys=config.get("may_drop_keys") is True,
            may_restore_creds=config.get("may_restore_creds") is True,
            restarts_lose_pairing=loses and self.row["wanted_step"] is None,
        )

    def store_for(self, step: Step, gateway: Gateway) -> Store | None:
        """The store that this step works on; None for what the gateway does by itself."""
        is_by_gateway = step == Step.CONTACT_REFRESH and "refresh_contact" in gateway.abilities
        return None if is_by_gateway or step == Step.RESTART else self.store()

    def names_for(self, step: Step, store: Store, *, is_of_groups: bool = False) -> list[str]:
        """The entries that this step would drop or put back; nothing is touched. Raises `StoreFault`."""
        store.check()
        match step:
            case Step.CONTACT_REFRESH:
                return store.plan_contacts(self.affected())
            case Step.DROP_KEYS:
                groups = [jid for jid in self.affected(_MOST_GROUPS) if jid.endswith("@g.us")]
                return store.plan_derived(groups if is_of_groups else None)
            case Step.RESTORE_CREDS:
                kept = store.plan_restore()
                return [kept] if kept is not None else []
        return []

    def heal(self) -> None:
        """Mark the errors whose messages have arrived."""
        with db.session([self.tenant_id]) as s:
            SessionError.heal(s, self.tenant_id, self.channel_id)

    def tally(self) -> Tally:
        """The errors of the incident that count; without one, those that would open it."""
        with db.session([self.tenant_id]) as s:
            window, since = settings().require_error_window(), self.row["since"]
            return SessionError.tally(s, self.tenant_id, self.channel_id, window, since=since)

    def heard(self, after: datetime, *, grace: float, weak: bool) -> RowMapping:
        """What came in since then, as `SessionError.heard_since` tells it."""
        with db.session([self.tenant_id]) as s:
            given = (self.tenant_id, self.channel_id, self.since, after)
            return SessionError.heard_since(s, *given, grace=grace, weak=weak)

    def read_until(self) -> datetime:
        """What its gateway told before then has been read."""
        with db.session([self.tenant_id]) as s:
            return SessionError.read_until(s, self.tenant_id, self.channel_id)

    def affected(self, most: int = _MOST_CONTACTS) -> list[str]:
        """The chats with the most errors."""
        with db.session([self.tenant_id]) as s:
            return SessionError.affected(s, self.tenant_id, self.channel_id, self.since, most)

    def hopeless(self, *, is_open: bool) -> str | None:
        """What a person is told when its connection ended lately for a reason that no repair cures."""
        return hopeless(self.tenant_id, self.channel_id, is_open=is_open)

    def _secrets(self) -> dict[str, Any]:
        return unseal(self.channel_id, self.row["sealed"]) if self.row["sealed"] else {}


def hopeless(tenant_id: UUID, channel_id: UUID, *, is_open: bool) -> str | None:
    """What a person has to do about a session whose connection ended lately for a reason that no repair cures."""
    with db.session([tenant_id]) as s:
        ends = SessionEnd.lately(s, tenant_id, channel_id, LATELY)
    return _ladder.hopeless(ends, is_open=is_open)


def host_of(config: dict[str, Any]) -> str:
    """Which gateway a channel's session is at: what one session of it did may be expected of the others."""
    given = str(config.get("host") or settings().backend_url)
    try:
        return normal_base(given).lower()
    except Rejected:  # nothing can be asked there: `pombal doctor` says so
        return given


circuit = Circuit()
