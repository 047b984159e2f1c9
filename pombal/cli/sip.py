"""SIP accounts by hand: made, changed, registered now, un-registered, removed (docs/sip.md).

A command writes the account's row and rings; a worker of `sip_refresh` does what it says, and the command tells what
comes of it. A password comes in by standard input and is never said again.
"""

import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from getpass import getpass
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from models import SipRegistration, SipSender, Tenant
from pombal import db, log
from pombal.cli import say
from pombal.cli import sip_standing as standing
from pombal.cli.admin import Refused, tenant_named
from pombal.cli.admin import show as tell
from pombal.cli.sip_standing import Found, account_named, span
from pombal.errors import Rejected
from pombal.secrets import unseal
from pombal.settings import require_secrets, settings
from providers import sip_words
from providers.sip import Kind
from providers.sip_message import parse_uri

_NAME = re.compile(r"[^\W_][\w .+-]{0,63}")
_EXTERNAL_ID = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._~:-]{1,128}", re.ASCII)
_LONGEST_LINE = 1024  # characters of standard input that may be a password
_LONGEST_URI = 255
_FIXED = ("name", "host", "port", "transport", "proxy", "username")  # what an account is
_POLL = 0.2  # seconds between two looks at an account that is waited for
_HELD_BACK = 2.0  # seconds after which whatever could be begun has been: workers look each second
_NOBODY = 10.0  # seconds after which nobody seems to work
_MORE = 60  # seconds that are waited at most beyond those that were asked for: an attempt before ours takes up to 40


def create(given: Namespace) -> int:
    """A new account, which a worker registers at once."""
    require_secrets()
    tenant = tenant_named(given.tenant)
    is_external = given.sender == SipSender.EXTERNAL
    if not given.password_stdin and not is_external:
        raise Refused("--password-stdin is required: the password comes on one line of standard input")
    values = {name: value for name, value in _checked(given).items() if value is not None}
    host, username = sip_words.check_host(given.host), sip_words.check_user(given.username)
    proxy = sip_words.check_host(given.proxy) if given.proxy else None
    warnings = list(_doubts(host, username, None if is_external else proxy or host))
    account = add_account(
        tenant,
        given.name,
        host=host,
        username=username,
        password=_password() if given.password_stdin else "",
        port=given.port,
        transport=given.transport,
        proxy=proxy,
        allows_md5=not given.no_md5,
        **values,
    )
    _ring()
    user = {"contact_user" if given.json else "contact user": account.contact_token}
    more = {"warnings": warnings} if given.json else {}
    tell(given, {"id": account.id, "name": account.name, "host": account.host, **user, **more})
    if not given.json:
        for warning in warnings:
            say(f"warning: {warning}")
        name = f"{tenant.slug}/{account.name}"
        said = "its controller says how it stands" if is_external else f"`pombal sip show {name}` says how it stands"
        say(said)
    return 0


def add_account(tenant: Tenant, name: str, *, host: str, username: str, password: str, **given: Any) -> SipRegistration:
    """A new account of checked values, due at once. Raises `Refused` for a name that is taken or cannot be one."""
    if not _NAME.fullmatch(name) or name != name.strip():
        raise Refused("a name has 1 to 64 letters, digits, blanks, dots, underscores, hyphens; the first is no sign")
    account = SipRegistration.make(tenant.id, name=name, host=host, username=username, password=password, **given)
    try:
        with db.session([tenant.id]) as s:
            s.add(account)
    except IntegrityError:
        raise Refused(f"{tenant.slug} has a SIP account of that name already") from None
    return account


def change(given: Namespace) -> int:
    """Change how an account authenticates, is sent or routed. It is registered anew with that at once."""
    require_secrets()
    found = account_named(given.account, given.tenant)
    if any(getattr(given, name) is not None for name in _FIXED):
        what = f"{', '.join(_FIXED[:-1])} and {_FIXED[-1]} are what an account is"
        raise Refused(f"{what}: for another one of those create another account, then remove this one")
    values = _checked(given)
    if given.md5 is not None:
        values["allows_md5"] = given.md5
    password = _password() if given.password_stdin else None
    if not values and password is None:
        raise Refused("nothing is to be changed: say what")
    values = {name: value for name, value in values.items() if value != found.row[name]}
    if not values and password is None:
        say("nothing changes: it is so already, and is not registered anew")
        return 0
    before, after = found.row["sender"], values.get("sender", found.row["sender"])
    if before == SipSender.EXTERNAL != after and password is None:
        _require_password(found)
    with db.session([found.row["tenant_id"]]) as s:
        if not SipRegistration.change(s, *found.ids, password=password, **values):
            raise Refused(f"{found.name} was removed meanwhile")
    _ring()
    if after == SipSender.EXTERNAL:
        say("changed; nothing is sent from here any more, and a binding of ours ends by itself")
    else:
        say("changed; it is registered anew" if found.row["is_enabled"] else "changed; it is still disabled")
    return 0


def register(given: Namespace) -> int:
    """Register it now, before all others, and wait for what comes of it. Exit code 0 once it is registered. All are
    registered without waiting."""
    if given.all:
        return _register_all(given)
    if given.host is not None:
        raise Refused("--host goes with --all")
    if given.account is None:
        raise Refused("say which account, or --all")
    found = account_named(given.account, given.tenant)
    if given.dry_run:
        from pombal.cli.sip_dry import foretell  # imports the fleet

        return foretell(found, takes_over=given.take_over, allows_downgrade=given.allow_downgrade)
    more: dict[str, Any] = {}
    if found.row["sender"] == SipSender.EXTERNAL:
        if not given.take_over:
            what = "is registered by a controller, and two senders would undo each other's bindings"
            raise Refused(f"{found.name} {what}: stop it there, then say --take-over")
        _require_password(found)
        more["sender"] = standing.sender_before(found.row)
        say(f"{found.name}: taken over from its controller; {more['sender']} sends it again")
    if given.allow_downgrade:
        more["algorithm"] = None
    with db.session([found.row["tenant_id"]]) as s:
        if not SipRegistration.ask(s, *found.ids, **more):
            raise Refused(f"{found.name} was removed meanwhile")
    _ring()
    return _followed(found, given.wait, "registered", _registered)


def _register_all(given: Namespace) -> int:
    """Make all due that are enabled and ours: after an outage, for who would not wait. Exit code 0 if there are any."""
    if given.account is not None or given.dry_run or given.take_over or given.allow_downgrade:
        raise Refused("--all goes with --host and --tenant alone")
    host = sip_words.check_host(given.host) if given.host is not None else None
    tenant_id = tenant_named(given.tenant).id if given.tenant else None
    with db.session() as s:
        db.see_all(s)
        count = SipRegistration.ask_all(s, tenant_id=tenant_id, host=host)
    if not count:
        raise Refused(f"no account is enabled and ours{f' with the host {host}' if host else ''}")
    _ring()
    are_due = "1 account is due now" if count == 1 else f"{count} accounts are due now"
    say(f"{are_due}; a worker begins {settings().sip_starts_per_second} a second of each host: `pombal sip list`")
    return 0


def unregister(given: Namespace) -> int:
    """End its binding, and begin none until `register`. Exit code 0 once nothing is bound."""
    found = account_named(given.account, given.tenant)
    _refuse_of_controller(found)
    with db.session([found.row["tenant_id"]]) as s:
        if not SipRegistration.disable(s, *found.ids):
            raise Refused(f"{found.name} was removed meanwhile")
    _ring()
    return _followed(found, given.wait, "un-registered", _unregistered)


def remove(given: Namespace) -> int:
    """End its binding, then forget it: row and password are there until nothing is bound any more."""
    found = account_named(given.account, given.tenant)
    if not given.yes:
        say(f"{found.name} gets no calls any more, and its password is forgotten")
        if not sys.stdin.isatty():
            raise Refused("say --yes to remove it")
        if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
            raise Refused("nothing was done")
    before = found.again() or found
    tenant_id, id_ = found.ids
    with db.session([tenant_id]) as s:
        SipRegistration.remove(s, tenant_id, id_)
    _ring()
    say(f"removed, and the name is free; {_kept(before)}")
    return 0


def _kept(found: Found) -> str:
    """For how long something of an account that is removed is kept."""
    row = found.row
    if row["sender"] == SipSender.EXTERNAL:
        return "nothing of it is kept. What its controller bound is that one's to end"
    if standing.is_claimed(row):
        until = "until the attempt that is under way is over, and at most until what it binds ends"
    elif _is_bound(found):
        ends = standing.minute(row["expires_at"])
        until = f"at most until {ends}, when its binding ends by itself, if a worker of sip_refresh runs then"
    else:
        return "its row and password go after one more request, which ends whatever may be bound"
    return f"its binding is being ended, and its row and password are kept for that, {until}"


# -------------------------------------------------------------------------------------------------------- what is given


def _doubts(host: str, username: str, place: str | None) -> Iterator[str]:
    """What may be wrong with a new account; `place` is whom its requests go to, if they come from here."""
    same = (SipRegistration.host == host, SipRegistration.username == username, SipRegistration.removed_at.is_(None))
    with db.session() as s:
        db.see_all(s)
        is_there = s.scalars(select(SipRegistration.id).where(*same).limit(1)).first() is not None
    if is_there:
        yield "there is an account of that user at that host already: calls ring at both, or each undoes the other"
    if place is not None and standing.is_shut(place):
        shut = f"{place} is not public, nor in SIP_ALLOWED_NETWORKS of this shell"
        yield f"{shut}: nothing is sent there, unless the worker's environment says otherwise"


def _checked(given: Namespace) -> dict[str, Any]:
    """What `create` and `change` both take, as it is to be kept; what was not given is left out, and '' is none."""
    checks: dict[str, Callable[[str], Any]] = {
        "auth_username": sip_words.check_auth_user,
        "contact_host": sip_words.check_contact_host,
        "target": check_target,
        "external_id": _check_external_id,
    }
    values = {name: getattr(given, name) for name in ("interval", "sender") if getattr(given, name) is not None}
    for name, check in checks.items():
        text = getattr(given, name)
        if text is not None:
            values[name] = check(text) if text else None
    return values


def check_target(text: str) -> str:
    """A SIP URI that calls go to. Raises `Rejected`, without repeating it: an application puts it into a message."""
    is_plain = text.isascii() and text.isprintable() and not re.search(r"[\s\"<>,]", text)
    uri = parse_uri(text) if is_plain and len(text) <= _LONGEST_URI else None
    if uri is None or uri.scheme.lower() not in ("sip", "sips") or not uri.host:
        raise Rejected("the target must be a SIP URI such as sip:trunk@example.sip.livekit.cloud, without < and >")
    return text


def _check_external_id(text: str) -> str:
    if not _EXTERNAL_ID.fullmatch(text):
        raise Rejected("an external id has 1 to 128 letters, digits, dots, underscores, tildes, colons or hyphens")
    return text


def _password() -> str:
    """One line of standard input; of a terminal without an echo. Raises `Refused` or `Rejected`."""
    has_more = False
    if sys.stdin.isatty():
        line = getpass("password: ")
    else:
        try:
            line = sys.stdin.readline(_LONGEST_LINE + 2)
            has_more = line.endswith("\n") and sys.stdin.read(1) != ""
        except UnicodeDecodeError:
            raise Refused("the password on standard input is not UTF-8") from None
    password = line.removesuffix("\n").removesuffix("\r")
    if not password:
        raise Refused("there is no password on standard input")
    if len(password) > _LONGEST_LINE:
        raise Refused(f"the line on standard input has more than {_LONGEST_LINE} characters")
    if has_more:
        raise Refused("standard input has more than one line: the password is one")
    return sip_words.check_password(password)


def _refuse_of_controller(found: Found) -> None:
    if found.row["sender"] == SipSender.EXTERNAL:
        raise Refused(f"{found.name} is registered by a controller: un-register it there, or `pombal sip remove` it")


def _require_password(found: Found) -> None:
    """Of an account that is no longer its controller's: it may have been made without one."""
    tenant_id, id_ = found.ids
    query = select(SipRegistration.sealed).where(SipRegistration.tenant_id == tenant_id, SipRegistration.id == id_)
    with db.session([tenant_id]) as s:
        sealed = s.scalars(query).one()
    if not unseal(id_, sealed)["password"]:
        raise Refused(f"{found.name} has no password: `pombal sip change {found.name} --password-stdin` gives it one")


# --------------------------------------------------------------------------------------------------- what comes of it


def _ring() -> None:
    """Have it worked on at once. While Redis is away the worker finds it by itself, within a second."""
    from workers.sip_refresh import ring_registrar  # imports the fleet

    log.setup()
    ring_registrar()


def _followed(found: Found, seconds: int, asked: str, result: Callable[[Found], int]) -> int:
    """Tell what happens until an attempt that was begun after we asked has ended, or the time is over.

    The seconds are its own: they begin anew with it, and do not run while an earlier attempt is under way.
    """
    if not seconds:
        say(f"asked for: `pombal sip show {found.name}` says what comes of it")
        return 0
    say(f"{found.name}: it is to be {asked}")
    began = since = time.monotonic()
    told, is_ours = "", False
    try:
        while (now := found.again()) is not None:
            if now.row["asked_at"] is None:  # whatever was begun before we asked leaves it
                return result(now)
            clock = time.monotonic()
            is_begun = is_ours or _is_begun(now)
            if is_begun != is_ours or (not is_begun and standing.is_claimed(now.row)):
                is_ours, since = is_begun, clock
            is_late = clock - since >= seconds or clock - began >= seconds + _MORE
            line = _progress(now, clock - since, is_begun=is_begun)
            if line not in ("", told):
                told = line
                say(f"{now.name}: {line}")
            if is_late:
                why = "" if is_begun or not told else f": {told}"
                nothing = f"nothing came of it in {clock - began:.0f} s{why}"
                say(f"{now.name}: {nothing}. It goes on: `pombal sip show {now.name}`")
                return 1
            time.sleep(_POLL)
    except KeyboardInterrupt:
        say(f"it goes on: `pombal sip show {found.name}` says what comes of it")
        raise
    raise Refused(f"{found.name} was removed meanwhile")


def _is_begun(found: Found) -> bool:
    """Whether the attempt that was asked for is under way, and not an earlier one."""
    row = found.row
    return standing.is_claimed(row) and row["last_attempt_at"] >= row["asked_at"]


def _progress(found: Found, waited: float, *, is_begun: bool) -> str:
    if is_begun:
        return "a worker is at it"
    if standing.is_claimed(found.row):
        return "an earlier attempt is under way; this one comes after it"
    if waited >= _HELD_BACK and found.row["is_held_back"]:
        return standing.waits_for(found.row)
    return "nobody works on it: is a worker of sip_refresh running?" if waited >= _NOBODY else ""


def _registered(found: Found) -> int:
    row = found.row
    if row["sender"] == SipSender.EXTERNAL:
        say(f"{found.name}: its controller has told how it stands, so it is that one's again")
        return 1
    if not row["is_enabled"]:
        say(f"{found.name}: not registered: somebody has asked meanwhile for it to be un-registered")
        return 1
    if row["last_outcome"] == Kind.REGISTERED:
        until = f"for {row['granted']} s by {row['server']}"
        say(f"{found.name}: registered {until}; next try {standing.next_try(row)}")
        return 0
    still = f"; the binding before holds for {span(row['expires_at'] - row['now'])}" if _is_bound(found) else ""
    say(f"{found.name}: not registered: {row['register_error']}{still}")
    say(f"{found.name}: next try {standing.next_try(row)}")
    return 1


def _unregistered(found: Found) -> int:
    row = found.row
    if row["is_enabled"]:
        say(f"{found.name}: not un-registered: somebody has asked meanwhile for it to be registered")
        return 1
    if row["last_outcome"] == Kind.UNREGISTERED:
        say(f"{found.name}: un-registered")
        return 0
    if row["next_refresh_at"] is None:
        say(f"{found.name}: nothing is bound any more, though it was not un-registered: {row['register_error']}")
        return 0
    say(f"{found.name}: not un-registered: {row['register_error']}; next try {standing.next_try(row)}")
    return 1


def _is_bound(found: Found) -> bool:
    return found.row["expires_at"] is not None and found.row["expires_at"] > found.row["now"]
