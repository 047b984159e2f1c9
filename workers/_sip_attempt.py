"""One attempt to register an account or to un-register it, from its row to what came of it. No queue (underscore)."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TypeAlias

from sqlalchemy import RowMapping

from models import SipSender
from models.sip_registration import AT_SENDER, CSEQS, is_drachtios
from pombal.errors import Misconfigured, PombalError
from pombal.secrets import unseal
from pombal.settings import settings
from providers.drachtio import Drachtio
from providers.sip import Account, Attempt, Kind, Outcome, Transport
from providers.sip_direct import DirectFlight
from providers.sip_flight import Fence, Flight, NotSent, Reply, Trouble
from providers.sip_message import Request

_FOR_THE_OLD = 5.0  # seconds that a Contact which is replaced has to go
_LONGEST = 39.0  # seconds; an error is written down within 40 (security-reliability.md R1)

# Awaited before drachtio is given a request. Raises when this attempt is no longer ours to make.
Cover: TypeAlias = Callable[[], Awaitable[None]]


class LostClaim(PombalError):
    """Somebody else may be working on this account by now: what the fence and the cover of an attempt raise."""


@dataclass(frozen=True)
class Result:
    """What an attempt came to. Times are monotonic, but for `began_at`; `sent`: when the request that was answered last
    was first sent."""

    outcome: Outcome
    began_at: datetime
    began: float
    sent: float
    ended: float
    server: str | None = None
    contact: str | None = None  # that was bound
    is_doubtful: bool = False  # another Contact was un-registered, and that may have taken this one with it
    was_unregister: bool = False

    @classmethod
    def without_an_attempt(cls, outcome: Outcome, *, was_unregister: bool = False) -> "Result":
        now = time.monotonic()
        return cls(outcome, datetime.now(UTC), now, now, now, was_unregister=was_unregister)


def sender_of(row: RowMapping) -> SipSender:
    """Who sends for this account: drachtio wherever one is configured, unless the account says otherwise."""
    chosen = SipSender(row["sender"])
    if chosen is SipSender.AUTO:
        return SipSender.DRACHTIO if settings().drachtio_host else SipSender.DIRECT
    return chosen


def account_of(row: RowMapping, *, password: str) -> Account:
    """What it is registered with, at the Contact that `contacts_of` wants."""
    return Account(
        domain=row["host"],
        user=row["username"],
        auth_user=row["auth_username"] or row["username"],
        password=password,
        contact=contacts_of(row)[0],
        call_id=row["call_id"],
        from_tag=row["from_tag"],
        interval=row["interval"],
        transport=Transport(row["transport"]),
        port=row["port"],
        proxy=row["proxy"],
        allows_md5=row["allows_md5"],
        algorithm=row["algorithm"],
    )


def contacts_of(row: RowMapping) -> tuple[str, str | None]:
    """The Contact to bind, and another one that is still bound: once the new one is, it must go, or both would ring.

    It points at whoever sends (`localhost`), unless a direct sender is told where calls should come to. One that nobody
    told goes on as it is bound, whichever host the worker that refreshes it runs on.
    """
    is_bound = (row["bound_seconds"] or 0) > 0
    bound: str | None = row["contact"] if is_bound else None
    host = None
    if sender_of(row) is SipSender.DIRECT:
        host = row["contact_host"] or settings().sip_contact or None
        is_ours = bound is not None and not is_drachtios(bound) and bound.endswith(f";transport={row['transport']}")
        if host is None and bound is not None and is_ours:
            return bound, None
    wanted = f"sip:{row['contact_token']}@{host or 'localhost'};transport={row['transport']}"
    is_the_same = bound == wanted and (host is not None or sender_of(row) is SipSender.DRACHTIO)
    return wanted, None if is_the_same else bound


async def attempt(row: RowMapping, drachtio: Drachtio | None, fence: Fence, cover: Cover) -> Result:
    """Register it, or un-register it if it is disabled. Raises only what the fence and the cover raise."""
    began_at, began = datetime.now(UTC), time.monotonic()
    is_over = not row["is_enabled"]
    try:
        account = account_of(row, password=unseal(row["id"], row["sealed"])["password"])
    except Misconfigured as error:
        outcome = Outcome(Kind.OURS, error=f"its password cannot be read: {error}")
        return Result.without_an_attempt(outcome, was_unregister=is_over)
    sender = sender_of(row)
    _, old = contacts_of(row)
    if is_over and row["contact"] is not None:
        account = replace(account, contact=row["contact"])
        sender = SipSender.DRACHTIO if is_drachtios(row["contact"]) else sender
    way = _Way(account, drachtio, fence, cover)
    steps = Attempt(account, cseq=row["cseq"] - CSEQS + 1, unregister=is_over)
    try:
        async with asyncio.timeout(_LONGEST):
            outcome, reply = await _converse(steps, way, sender)
    except TimeoutError:
        outcome, reply = Outcome(Kind.TEMPORARY, error=f"no end within {_LONGEST:.0f} s"), None
    is_doubtful = False
    if outcome.kind is Kind.REGISTERED and old is not None and old != _bound(account, reply):
        again = await _replace(account, old, way, sender, steps.cseq + 1)
        is_doubtful, (outcome, reply) = again is None, again or (outcome, reply)
    sent, server = (reply.sent_at, reply.server) if reply else (began, None)
    contact = _bound(account, reply)
    return Result(outcome, began_at, began, sent, time.monotonic(), server, contact, is_doubtful, is_over)


def _bound(account: Account, reply: Reply | None) -> str | None:
    return account.contact.replace(AT_SENDER, f"@{reply.local};") if reply else None


async def _replace(
    account: Account, old: str, way: "_Way", sender: SipSender, cseq: int
) -> tuple[Outcome, Reply | None] | None:
    """Un-register the old Contact, then register the new one again: some registrars keep one binding, whichever was
    last. None if that did not work: the old one ends by itself then, with its grant."""
    undo = Attempt(replace(account, contact=old), cseq=cseq, unregister=True)
    by = SipSender.DRACHTIO if is_drachtios(old) else SipSender.DIRECT
    with suppress(TimeoutError, LostClaim):
        async with asyncio.timeout(_FOR_THE_OLD):
            await _converse(undo, way, by)
            again = await _converse(Attempt(account, cseq=undo.cseq + 1), way, sender)
            if again[0].kind is Kind.REGISTERED:
                return again
    return None


async def _converse(steps: Attempt, way: "_Way", sender: SipSender) -> tuple[Outcome, Reply | None]:
    """Until its outcome; with the last reply, if there was one."""
    reply = None
    try:
        async with way.flight(sender) as flight:
            step: Request | Outcome = steps.begin()
            while not isinstance(step, Outcome):
                if sender is SipSender.DRACHTIO:
                    await way.cover()
                reply = await flight.exchange(step)
                step = steps.answered(reply.response)
            return step, reply
    except NotSent as trouble:
        return steps.failed(trouble), reply


@dataclass(frozen=True)
class _Way:
    """How the requests of an attempt leave, whoever sends them."""

    account: Account
    drachtio: Drachtio | None
    fence: Fence
    cover: Cover

    def flight(self, sender: SipSender) -> Flight:
        account = self.account
        if sender is SipSender.DRACHTIO:
            if self.drachtio is None:
                raise NotSent(Trouble.OURS, "this account is drachtio's, and DRACHTIO_HOST is not set")
            return self.drachtio.flight(account.domain, account.port, account.transport, account.proxy, self.fence)
        given = settings()
        return DirectFlight(
            host=account.proxy or account.domain,
            port=account.port,
            transport=account.transport,
            fence=self.fence,
            allowed=given.require_sip_networks(),
            nameserver=given.sip_nameserver or None,
            contact_host=None,  # the account's Contact says it already
        )
