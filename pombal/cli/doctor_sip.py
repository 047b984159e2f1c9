"""What `pombal doctor` finds out about SIP accounts and about who registers them (docs/sip.md).

drachtio is asked whether it lets us in; no registrar is, and nothing is changed.
"""

import asyncio
from collections.abc import Callable, Generator, Iterator
from ipaddress import ip_address
from itertools import groupby

from sqlalchemy import select

from models import RegisterStatus, SipRegistration, SipSender
from pombal import db
from pombal.cli.doctor import Finding, some
from pombal.cli.sip_standing import LATE, Found, accounts, bound_by, is_shut
from pombal.errors import Misconfigured, Rejected
from pombal.secrets import unseal
from pombal.settings import settings
from providers import sip_words
from providers.drachtio import Drachtio
from providers.sip_flight import NotSent

_NO_SECRETS = ("", "cymru")
_PART = 0.8  # of its interval, after which an account is registered anew: 240 s of 300


def findings() -> Iterator[Finding]:
    is_sound = True
    for finding in _settings():
        is_sound = is_sound and finding.level != "error"
        yield finding
    if not is_sound:
        return
    has_drachtio = yield from _drachtio()
    there = [one for one in accounts() if one.row["is_enabled"]]
    yield from _unreadable()
    ours = [one for one in there if one.row["sender"] != SipSender.EXTERNAL]
    yield from _senders(ours)
    yield from _hosts(ours)
    yield from _pace(ours)
    yield from _twice(there)
    yield from _standing(there)
    yield from _late([one for one in ours if has_drachtio or not _is_drachtios(one)])
    yield from _reports(there)


def _settings() -> Iterator[Finding]:
    given = settings()
    checks: tuple[Callable[[], object], ...] = (
        given.require_sip_networks,
        given.require_sip_nameserver,
        given.require_sip_backend,
        lambda: given.sip_contact and sip_words.check_contact_host(given.sip_contact),
    )
    for check in checks:
        try:
            check()
        except Misconfigured as error:
            yield Finding("error", str(error))
        except Rejected as error:
            yield Finding("error", f"SIP_CONTACT: {error}")
    if bool(given.sip_backend_url) != bool(given.sip_backend_key):
        missing, other = ("SIP_BACKEND_KEY", "SIP_BACKEND_URL")
        if given.sip_backend_key:
            missing, other = other, missing
        yield Finding("warning", f"{other} is set and {missing} is not: no backend is told of registrations")
    if given.drachtio_secret and not given.drachtio_host:
        yield Finding("warning", "DRACHTIO_SECRET is set and DRACHTIO_HOST is not: workers register by themselves")


def _drachtio() -> Generator[Finding, None, bool]:
    """Whether it can be reached and lets us in. Returns False where there is one that cannot be used."""
    given = settings()
    if not given.drachtio_host:
        return True
    if given.drachtio_secret in _NO_SECRETS:  # which is a finding already
        return False
    try:
        version, hostports = asyncio.run(_greeted())
    except NotSent as error:
        yield Finding("error", f"drachtio: {error.text} (DRACHTIO_HOST, DRACHTIO_PORT, DRACHTIO_SECRET)")
        return False
    yield Finding(
        "ok", f"drachtio {version} lets us in; it sends from {', '.join(hostports) or 'nowhere that it tells'}"
    )
    return True


async def _greeted() -> tuple[str, tuple[str, ...]]:
    """Its version and its addresses. Raises `NotSent`."""
    given = settings()
    drachtio = Drachtio(given.drachtio_host, given.drachtio_port, given.drachtio_secret)
    try:
        return await drachtio.hello()
    finally:
        await drachtio.close()


def _is_drachtios(one: Found) -> bool:
    sender = one.row["sender"]
    return sender == SipSender.DRACHTIO or (sender == SipSender.AUTO and bool(settings().drachtio_host))


def _is_of_this_machine(one: Found) -> bool:
    """At a registrar that nobody else can call from, such as a simulated one."""
    try:
        return ip_address(_place(one)).is_loopback
    except ValueError:
        return False


def _unreadable() -> Iterator[Finding]:
    """Passwords that no key opens."""
    with db.session() as s:
        db.see_all(s)
        rows = s.execute(select(SipRegistration.id, SipRegistration.sealed).where(SipRegistration.removed_at.is_(None)))
        for id_, sealed in rows:
            try:
                unseal(id_, sealed)
            except Misconfigured as error:
                yield Finding("error", str(error))


def _senders(ours: list[Found]) -> Iterator[Finding]:
    """Who would send by this shell's settings. Of what drachtio has bound the workers have others."""
    unbound = [one for one in ours if bound_by(one.row) != SipSender.DRACHTIO]
    homeless = [one.name for one in unbound if one.row["sender"] == SipSender.DRACHTIO]
    if homeless and not settings().drachtio_host:
        yield Finding("error", f"sent by drachtio, and DRACHTIO_HOST is not set here: {some(homeless)}")
    here = [
        one.name for one in unbound if not (_is_drachtios(one) or one.row["contact_host"] or _is_of_this_machine(one))
    ]
    if here and not settings().sip_contact:
        what = "their calls come to the worker's own address, where nobody takes them (SIP_CONTACT, --contact-host)"
        yield Finding("warning", f"{what}: {some(here)}")


def _hosts(ours: list[Found]) -> Iterator[Finding]:
    """Registrars that are configured by an address that nothing is sent to; those that took a REGISTER were."""
    shut = [one.name for one in ours if bound_by(one.row) is None and is_shut(_place(one))]
    if shut:
        yield Finding("warning", f"the registrar's address is not public, nor in SIP_ALLOWED_NETWORKS: {some(shut)}")


def _pace(ours: list[Found]) -> Iterator[Finding]:
    """Hosts whose accounts need more starts a second than a worker makes."""
    most = settings().sip_starts_per_second
    for place, them in groupby(sorted(ours, key=_place), key=_place):
        intervals = [one.row["interval"] for one in them]
        needed = sum(1 / (_PART * interval) for interval in intervals)
        if needed > most:
            what = f"its accounts ({len(intervals)}) need {needed:.1f} starts a second, and a worker makes {most}"
            yield Finding("warning", f"{place}: {what} (SIP_STARTS_PER_SECOND, a longer --interval, more workers)")


def _place(one: Found) -> str:
    """Where its requests go."""
    return str(one.row["proxy"] or one.row["host"])


def _twice(there: list[Found]) -> Iterator[Finding]:
    """Accounts that undo or double each other's bindings."""
    by_user: dict[tuple[str, str], list[str]] = {}
    for one in there:
        by_user.setdefault((one.row["host"], one.row["username"]), []).append(one.name)
    for names in by_user.values():
        if len(names) > 1:
            yield Finding(
                "warning", f"one user of one provider, several accounts; its calls ring at each: {some(names)}"
            )


def _standing(there: list[Found]) -> Iterator[Finding]:
    lapsed = [one for one in there if one.row["status"] != RegisterStatus.REGISTERED == one.row["register_status"]]
    failed = [one for one in there if one.row["status"] == RegisterStatus.FAILED and one not in lapsed]
    weak = [one for one in there if one.row["status"] == RegisterStatus.REGISTERED and one.row["register_error"]]
    if lapsed:
        what = "expired without a refresh, and nobody has written it down: is a clock running?"
        yield Finding("error", f"{what}: {some([one.name for one in lapsed])}")
    if failed:
        yield Finding("warning", f"not registered (`pombal sip show`): {some([_with_code(one) for one in failed])}")
    if weak:
        what = "registered still, and the last refresh failed (`pombal sip show`)"
        yield Finding("warning", f"{what}: {some([_with_code(one) for one in weak])}")
    well = sum(one.row["status"] == RegisterStatus.REGISTERED for one in there) - len(weak)
    if well:
        yield Finding("ok", f"{well} SIP account{' is' if well == 1 else 's are'} registered")


def _with_code(one: Found) -> str:
    code = one.row["last_status_code"]
    return one.name + (f" ({code})" if code else "")


def _late(ours: list[Found]) -> Iterator[Finding]:
    late = []
    for one in ours:
        at, until, now = one.row["next_refresh_at"], one.row["claimed_until"], one.row["now"]
        is_held_back = one.row["is_held_back"]
        if at is not None and now - at > LATE and (until is None or until <= now) and not is_held_back:
            late.append(one.name)
    if late:
        what = f"due for {LATE.seconds} seconds, and nobody has taken them: does a worker of sip_refresh run?"
        yield Finding("warning", f"{what}: {some(late)}")


def _reports(there: list[Found]) -> Iterator[Finding]:
    """Whether a backend is told. One that was told, or did not take it, is in the workers' settings if not in ours."""
    named = [one for one in there if one.row["external_id"] is not None]
    is_known = any(one.row["report_error"] or one.row["reported_at"] for one in named)
    if named and not is_known and settings().require_sip_backend() is None:
        what = "external ids, and no backend to tell (SIP_BACKEND_URL, SIP_BACKEND_KEY)"
        yield Finding("note", f"{what}: {some([one.name for one in named])}")
    untold = [one.name for one in named if one.row["report_error"]]
    if untold:
        yield Finding("warning", f"the backend does not take reports (`pombal sip show`): {some(untold)}")
