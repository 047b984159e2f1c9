"""How SIP accounts stand: which there are, what came of attempts, when the next one is and why (docs/sip.md)."""

import re
from argparse import Namespace
from collections.abc import Iterator
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import RowMapping, select

from models import RegisterStatus, SipRegistration, SipSender, Tenant
from models.sip_registration import is_drachtios
from pombal import db
from pombal.cli import as_json, say, table
from pombal.cli.admin import Refused, tenant_named
from pombal.settings import settings
from pombal.times import zulu
from providers import guard

LATE = timedelta(seconds=15)  # after which somebody should have taken what is due
_PART_OF_ID = re.compile(r"[0-9a-f]{4,32}")
_SHOWN = 60  # characters of an error in a list

# What a list has of an account: what it is registered with is in `show` alone.
_LISTED = (
    *("id", "name", "host", "sender", "is_enabled", "status", "register_error", "last_register_at"),
    *("next_refresh_at", "expires_at", "granted", "failures", "last_outcome", "last_status_code", "unregistered_since"),
)
# nor in `show --json`
_OURS_ALONE = ("register_status", "revision", "removed_at", "from_tag", "now", "bound_seconds", "is_held_back")
_NAMES = {"contact_token": "contact_user"}  # as everybody else calls it


class Found(NamedTuple):
    """An account, and its tenant's slug."""

    slug: str
    row: RowMapping

    @property
    def name(self) -> str:
        """As every command takes it."""
        return f"{self.slug}/{self.row['name']}"

    @property
    def ids(self) -> tuple[UUID, UUID]:
        return self.row["tenant_id"], self.row["id"]

    def again(self) -> "Found | None":
        """As it is now; None once it is gone."""
        tenant_id, id_ = self.ids
        with db.session([tenant_id]) as s:
            rows = SipRegistration.listing(s, tenant_id=tenant_id, id_=id_)
        return Found(self.slug, rows[0]) if rows else None


def listing(given: Namespace) -> int:
    """One row for each account."""
    only = tenant_named(given.tenant).id if given.tenant else None
    rows = [one for one in accounts(only) if given.status in (None, one.row["status"])]
    if given.json:
        as_json([{"tenant": one.slug, **{name: _plain(one.row[name]) for name in _LISTED}} for one in rows])
    else:
        table([_line(one) for one in rows], empty="no SIP accounts")
    return 0


def show(given: Namespace) -> int:
    """Everything that is known of one account, but for its password."""
    found = account_named(given.account, given.tenant)
    if given.json:
        row = {_NAMES.get(name, name): _plain(found.row[name]) for name in found.row if name not in _OURS_ALONE}
        row["history"] = [{**one, "at": _plain(datetime.fromisoformat(one["at"]))} for one in row["history"]]
        who = {"sent_by": sent_by(found.row)[0], "bound_by": bound_by(found.row)}
        as_json({"tenant": found.slug, **who, "next": next_try(found.row), **row})
        return 0
    for name, value in _told(found):
        say(f"{name + ':':<17} {value}")
    say()
    if found.row["sender"] == SipSender.EXTERNAL:
        empty = "no attempts: nothing is sent from here"
    else:
        empty = "no attempt of ours has ended yet"
    table([_outcome(one) for one in reversed(found.row["history"])], empty=empty)
    return 0


def accounts(tenant_id: UUID | None = None) -> list[Found]:
    """Those of a tenant, or all of them, by tenant and name."""
    with db.session() as s:
        if tenant_id is None:
            db.see_all(s)
        else:
            db.see(s, [tenant_id])
        slugs = {row.id: row.slug for row in s.execute(select(Tenant.id, Tenant.slug))}
        rows = SipRegistration.listing(s, tenant_id=tenant_id)
    return sorted((Found(slugs[row["tenant_id"]], row) for row in rows), key=lambda one: one.name)


def account_named(name: str, tenant: str | None = None) -> Found:
    """One account by TENANT/NAME, by its name if no other has it, by its id, or the beginning or end of that.

    Raises `Refused`.
    """
    if not name.rpartition("/")[2].strip():
        raise Refused("say which account: TENANT/NAME, its name, its id, or the end of that (`pombal sip list`)")
    slug, slash, rest = name.partition("/")
    if slash and tenant and slug != tenant:
        raise Refused(f"{name} is not of the tenant {tenant}")
    slug, name = (slug, rest) if slash else (tenant or "", name)
    there = accounts(tenant_named(slug).id if slug else None)
    found = [one for one in there if one.row["name"] == name]
    if len(found) > 1:
        raise Refused(f"several tenants have an account of that name: give TENANT/{name}, or --tenant")
    part = name.replace("-", "").lower()
    if not found and _PART_OF_ID.fullmatch(part):
        found = [one for one in there if one.row["id"].hex.startswith(part) or one.row["id"].hex.endswith(part)]
        if len(found) > 1:
            raise Refused("several accounts' ids begin or end with that: give more of it, or TENANT/NAME")
    if not found:
        raise Refused(f"there is no SIP account {name if name.isprintable() else 'of that name'}")
    return found[0]


def next_try(row: RowMapping) -> str:
    """When something is done with it next, and why; or why nothing is."""
    now, at = row["now"], row["next_refresh_at"]
    if row["sender"] == SipSender.EXTERNAL:
        return "never by us: a controller registers it, and tells us"
    if is_claimed(row):
        return "now: a worker is at it"
    if at is None:
        return "never: it is disabled" if not row["is_enabled"] else "never"
    if row["is_held_back"]:
        return f"when drachtio is back; {waits_for(row)}"
    why = _why(row)
    if at > now:
        return f"{minute(at)}, in {span(at - now)}: {why}"
    if now - at < LATE:
        return f"now: {why}"
    return f"due for {span(now - at)}, and nobody has taken it ({why}): does a worker of sip_refresh run?"


def waits_for(row: RowMapping) -> str:
    """Of one that is held back."""
    error = row["register_error"] or ""
    return f"it waits: {error if 'drachtio' in error else 'drachtio is away'}"  # others are of an attempt before


def span(length: timedelta) -> str:
    """A length of time in its two largest units."""
    seconds = round(abs(length.total_seconds()))
    days, seconds = divmod(seconds, 86_400)
    hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    first = next((n for n, (number, _) in enumerate(parts) if number), len(parts) - 1)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2] if number or unit == "s")


# ---------------------------------------------------------------------------------------------------------------- told


def _line(one: Found) -> dict[str, object]:
    row, now = one.row, one.row["now"]
    is_bound = row["status"] == RegisterStatus.REGISTERED
    error = row["register_error"] or ""
    return {
        "account": one.name,
        "id": row["id"].hex[-8:],
        "status": row["status"] if row["is_enabled"] else f"{row['status']}, disabled",
        "expires in": span(row["expires_at"] - now) if is_bound and row["expires_at"] else "",
        "next try": _short_next(row),
        "sender": row["sender"],
        "error": error if len(error) <= _SHOWN else error[: _SHOWN - 1] + "…",
    }


def _short_next(row: RowMapping) -> str:
    at, now = row["next_refresh_at"], row["now"]
    if row["sender"] == SipSender.EXTERNAL or at is None:
        return "never"
    if is_claimed(row):
        return "under way"
    if row["is_held_back"]:
        return "when drachtio is back"
    return f"in {span(at - now)}" if at > now else "now" if now - at < LATE else f"late by {span(now - at)}"


def _told(found: Found) -> Iterator[tuple[str, object]]:
    row, now = found.row, found.row["now"]
    yield "account", found.name
    yield "id", row["id"]
    yield "status", row["status"] + ("" if row["is_enabled"] else ", and disabled")
    if row["register_error"]:
        yield "error", row["register_error"]
    if row["status"] == RegisterStatus.REGISTERED:
        yield "registered since", _ago(row["registered_since"], now)
        if row["expires_at"]:
            granted = f" (granted {row['granted']} s, asked for {row['interval']} s)" if row["granted"] else ""
            yield "binding ends", f"{minute(row['expires_at'])}, in {span(row['expires_at'] - now)}{granted}"
    else:
        yield "without since", _ago(row["unregistered_since"] or row["expires_at"], now)
    yield "last registered", _ago(row["last_register_at"], now)
    if row["sender"] == SipSender.EXTERNAL and row["last_outcome"] is None:
        yield "last told", _ago(row["last_attempt_at"], now)
    else:
        yield "last attempt", _ago(row["last_attempt_at"], now) + _came_of_it(row)
    yield "next try", next_try(row)
    yield "failures", f"{row['failures']} in a row"
    yield "sent by", _senders(row)
    yield "registrar", _registrar(row)
    yield "answered by", row["server"] or "nobody yet"
    yield "user", row["username"] + (f", authenticates as {row['auth_username']}" if row["auth_username"] else "")
    yield "calls come to", _calls(row)
    yield "contact user", f"{row['contact_token']} (names the account: GET /api/sip/dispatch?contact=…)"
    yield "target", row["target"] or "none: dispatch has nowhere to send its calls"
    yield "digest", f"{_digest(row)}; MD5 is {'allowed' if row['allows_md5'] else 'not allowed'}"
    yield "report", _report(row)
    yield "changed", _ago(row["updated_at"], now)


def _came_of_it(row: RowMapping) -> str:
    if row["last_outcome"] is None:
        return ""
    code = f" ({row['last_status_code']})" if row["last_status_code"] else ""
    return f": {row['last_outcome']}{code}"


def _why(row: RowMapping) -> str:
    if not row["is_enabled"]:
        return "to un-register it"
    if row["asked_at"]:
        return "asked for by hand"
    failed = f"{row['failures']} failure{'' if row['failures'] == 1 else 's'} in a row"
    reasons = {
        "registered": _why_again(row),
        "permanent": "it was refused, so providers are asked seldom; `pombal sip register` tries at once",
        "temporary": f"after {failed}",
        "ours": "our own side was not ready, see the error",
    }
    if row["last_outcome"] in reasons:
        return reasons[row["last_outcome"]]
    return "the first time" if row["last_attempt_at"] is None else "it was changed"


def _why_again(row: RowMapping) -> str:
    ends, at, now = row["expires_at"], row["next_refresh_at"], row["now"]
    if ends is None or ends <= now:
        return "to register it again: its binding has ended"
    return "to refresh the binding before it ends" if at < ends else "to register it again, once its binding has ended"


def sent_by(row: RowMapping) -> tuple[str, str]:
    """Who would send next, and why. As `workers/_sip_attempt.py` chooses, without its fleet."""
    sender = row["sender"]
    if sender == SipSender.AUTO:
        is_set = bool(settings().drachtio_host)
        chosen = SipSender.DRACHTIO if is_set else SipSender.DIRECT
        is_it = "is set" if is_set else "is not set"
        return chosen, f"DRACHTIO_HOST {is_it} in this shell; the worker's environment decides"
    if sender == SipSender.EXTERNAL:
        return sender, f"its controller; {sender_before(row)} after --take-over"
    return sender, "the account says so"


def sender_before(row: RowMapping) -> SipSender:
    """Who sends again once a controller's account is taken over."""
    return SipSender(row["sender_before"] or SipSender.AUTO)


def bound_by(row: RowMapping) -> str | None:
    """Who made the binding that lives; None without one of ours."""
    if row["contact"] is None or row["expires_at"] is None or row["expires_at"] <= row["now"]:
        return None
    return SipSender.DRACHTIO if is_drachtios(row["contact"]) else SipSender.DIRECT


def is_shut(place: str) -> bool:
    """Whether this is an address that nothing is sent to, by this shell's SIP_ALLOWED_NETWORKS. Of a name nobody knows
    before it is asked for."""
    try:
        address = ip_address(place)
    except ValueError:
        return False
    return not guard.may_reach(address, settings().require_sip_networks())


def _senders(row: RowMapping) -> str:
    before, (chosen, why) = bound_by(row), sent_by(row)
    if before is None or row["sender"] == SipSender.EXTERNAL:
        return f"{chosen} — {why}"
    following = "next too" if chosen == before else f"next {chosen}"
    return f"{before}, which bound it; {following} — {why}"


def _calls(row: RowMapping) -> str:
    if row["contact"] is None:
        return "nothing of ours that is bound now"
    return "drachtio" if is_drachtios(row["contact"]) else str(row["contact"])


def _registrar(row: RowMapping) -> str:
    port = f", port {row['port']}" if row["port"] else ""
    proxy = f" through the proxy {row['proxy']}" if row["proxy"] else ""
    return f"{row['host']}{proxy}{port}, {row['transport']}"


def _digest(row: RowMapping) -> str:
    algorithm = row["algorithm"]
    if algorithm is None:
        return "none seen yet"
    weakest = algorithm.startswith("MD5")
    return f"{algorithm} was accepted last" + ("" if weakest else ", nothing weaker is answered")


def _report(row: RowMapping) -> str:
    now = row["now"]
    if row["external_id"] is None:
        return "to nobody: it has no external id"
    name = f"as {row['external_id']}"
    if row["report_at"] is None:
        told = f"told {_ago(row['reported_at'], now)}" if row["reported_at"] else "nothing to tell yet"
        return f"{name}: {told}"
    error = f": {row['report_error']}" if row["report_error"] else ""
    when = "now" if row["report_at"] <= now else f"in {span(row['report_at'] - now)}"
    return f"{name}: to be told {when}{error}"


def _outcome(one: dict[str, Any]) -> dict[str, object]:
    return {
        "at": minute(datetime.fromisoformat(one["at"])),
        "outcome": one["outcome"],
        "code": one.get("code"),
        "seconds": f"{one['seconds']:.2f}",
        "server": one.get("server"),
        "error": one.get("error"),
        "notes": "; ".join(one.get("notes") or ()),
    }


def is_claimed(row: RowMapping) -> bool:
    return row["claimed_until"] is not None and row["claimed_until"] > row["now"]


def _ago(at: datetime | None, now: datetime) -> str:
    return f"{minute(at)}, {span(now - at)} ago" if at else "never"


def _plain(value: Any) -> Any:
    """Times as the API tells them (`web/sip.py`)."""
    if isinstance(value, datetime):
        return zulu(value)
    return value


def minute(at: datetime) -> str:
    return zulu(at, "seconds")
