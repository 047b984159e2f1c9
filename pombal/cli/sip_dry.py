"""`pombal sip register --dry-run`: what would be done, in order. Only DNS is asked, and nothing is written."""

import asyncio
from collections.abc import Iterator
from random import Random
from typing import Any, cast

from sqlalchemy import RowMapping, select

from models import SipRegistration, SipSender
from pombal import db
from pombal.cli import say
from pombal.cli.sip_standing import Found, next_try, sender_before
from pombal.errors import Misconfigured
from pombal.secrets import unseal
from pombal.settings import settings
from providers import sip, sip_direct
from providers.drachtio import Drachtio
from providers.sip import Account, Kind, Outcome
from workers._sip_attempt import account_of, contacts_of, sender_of

_STRONGEST_FIRST = ("SHA-512-256", "SHA-256", "MD5")
_NOTHING = "Nothing would be sent"


def foretell(found: Found, *, takes_over: bool, allows_downgrade: bool) -> int:
    """Say it. Exit code 0 when something would be sent, 1 when something is in the way."""
    is_external = found.row["sender"] == SipSender.EXTERNAL
    meant: dict[str, Any] = dict(found.row)
    if is_external:
        meant["sender"] = sender_before(found.row)
    if allows_downgrade:
        meant["algorithm"] = None
    row = cast(RowMapping, meant)
    account = account_of(row, password="")
    hindered = list(_hindrances(found, takes_over=takes_over))
    way = [*_way(row, account), *_stale(row)]
    parts = [
        ("in the way", hindered or ["Nothing."]),
        ("who sends", [_sender(row, is_taken_over=is_external)]),
        ("where to, as seen from here", way),
        ("first request", sip.dry(account, cseq=row["cseq"] + 1).rstrip().splitlines()),
        ("if credentials are asked for", list(_credentials(account))),
        ("then", list(_afterwards(row, account))),
    ]
    say(f"{found.name}: nothing is sent but questions to DNS, and nothing is written.")
    say("All of this goes by the settings of this shell: what a worker does, its own environment decides.")
    for head, lines in parts:
        say(f"\n{head}:")
        for line in lines:
            say(f"    {line}")
    return 1 if any(line.startswith(_NOTHING) for line in (*hindered, *way)) else 0


def _hindrances(found: Found, *, takes_over: bool) -> Iterator[str]:
    row = found.row
    if row["sender"] == SipSender.EXTERNAL and not takes_over:
        yield f"{_NOTHING}: a controller registers it. --take-over makes it ours; stop the controller before."
    if not row["is_enabled"]:
        yield "It is disabled: `pombal sip register` enables it."
    if row["claimed_until"] is not None and row["claimed_until"] > row["now"]:
        yield "A worker is at it now. Its attempt ends first, then another one begins."
    if not row["allows_md5"] and (row["algorithm"] or "").startswith("MD5"):
        yield "MD5 was accepted last, and is no longer allowed: a registrar that offers nothing else is refused."
    tenant_id, id_ = found.ids
    query = select(SipRegistration.sealed).where(SipRegistration.tenant_id == tenant_id, SipRegistration.id == id_)
    with db.session([tenant_id]) as s:
        sealed = s.scalars(query).one()
    try:
        if not unseal(id_, sealed)["password"]:
            yield f"{_NOTHING}: it has no password (`pombal sip change {found.name} --password-stdin`)."
    except Misconfigured as error:
        yield f"{_NOTHING}: {error}."
    if row["sender"] != SipSender.EXTERNAL:
        yield f"Without being asked the next try is: {next_try(row)}."


def _sender(row: RowMapping, *, is_taken_over: bool) -> str:
    is_set = bool(settings().drachtio_host)
    chosen = sender_of(row)
    if row["sender"] != SipSender.AUTO:
        why = "since the account says so"
    else:
        why = f"since DRACHTIO_HOST is {'set' if is_set else 'not set'} here"
    taken = " Its controller is taken over from." if is_taken_over else ""
    if chosen is SipSender.DRACHTIO and not is_set:
        return f"drachtio, {why}; but DRACHTIO_HOST is not set here.{taken}"
    who = (
        "drachtio: the binding belongs to it, so calls come to it"
        if chosen is SipSender.DRACHTIO
        else "the worker itself"
    )
    return f"{who}, {why}.{taken}"


def _way(row: RowMapping, account: Account) -> Iterator[str]:
    given = settings()
    if sender_of(row) is SipSender.DRACHTIO:
        if not given.drachtio_host:
            yield f"{_NOTHING}: this account is drachtio's, and DRACHTIO_HOST is not set."
            return
        allowed = given.require_sip_networks()
        drachtio = Drachtio(given.drachtio_host, given.drachtio_port, given.drachtio_secret, allowed=allowed)
        yield from drachtio.explain(account.domain, account.port, account.transport, account.proxy)
        return
    yield from asyncio.run(
        sip_direct.explain(
            host=account.proxy or account.domain,
            port=account.port,
            transport=account.transport,
            allowed=given.require_sip_networks(),
            nameserver=given.sip_nameserver or None,
            contact_host=row["contact_host"] or given.sip_contact or None,
        )
    )


def _stale(row: RowMapping) -> Iterator[str]:
    if contacts_of(row)[1] is not None:
        yield "It is bound at another Contact: that one is un-registered before, or calls would ring at both."


def _credentials(account: Account) -> Iterator[str]:
    floor = account.algorithm
    known = [name for name in _STRONGEST_FIRST if account.allows_md5 or name != "MD5"]
    yield f"The strongest of what is offered is answered: {', '.join(known)}, each with -sess too; quality auth."
    if floor and not floor.startswith("MD5"):
        yield f"Nothing weaker than {floor}, which was accepted last (--allow-downgrade forgets it)."
    yield "At most twice, the second time for a new nonce alone. A third demand means that the password is wrong."
    yield "A proxy before the registrar is one more that may ask."


def _afterwards(row: RowMapping, account: Account) -> Iterator[str]:
    asked = account.interval
    soonest, latest = (sip.refresh_after(asked, dice) for dice in (_Highest(), _Lowest()))
    yield f"If {asked} s are granted: registered until then, and registered anew after {soonest:.0f} to {latest:.0f} s."
    yield f"If it is refused: `failed`, with its reason, and tried again after {_wait(Kind.PERMANENT)}."
    yield f"If nobody answers, or 5xx: tried again after {_wait(Kind.TEMPORARY)}, then after 100 s at the most."
    yield "A binding that is alive stays `registered` meanwhile, until it ends."
    if row["external_id"] is not None:
        is_told = settings().require_sip_backend() is not None
        yield (
            "The backend is told."
            if is_told
            else "No backend is told: SIP_BACKEND_URL and SIP_BACKEND_KEY are not set."
        )


def _wait(kind: Kind) -> str:
    dice = (_Lowest(), _Highest())
    soonest, latest = (sip.retry_after(Outcome(kind), 1, one, bound_seconds=None) for one in dice)
    return f"{soonest / 60:.0f} to {latest / 60:.0f} min" if soonest >= 120 else f"{soonest:.0f} to {latest:.0f} s"


class _Lowest(Random):
    def uniform(self, a: float, b: float) -> float:
        return a


class _Highest(Random):
    def uniform(self, a: float, b: float) -> float:
        return b
