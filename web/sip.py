"""SIP accounts for programs: how each registration stands, what a controller that registers by itself tells of one, and
where an inbound call belongs (sip-registration.md §1).

Who asks shows a tenant's key with the scope `sip:manage`, or the fleet's own (`API_KEY`), which is for the operator's
Drachtio and sees all tenants; as `x-api-key` or as a bearer.
"""

import asyncio
import json
import re
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote
from uuid import UUID

import msgspec
from msgspec import UNSET, UnsetType
from sqlalchemy import RowMapping, func, select
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from models import Event, RegisterStatus, SipRegistration, SipSender, Tenant
from pombal import db, log, metrics
from pombal.settings import settings
from pombal.times import zulu
from web.errors import Failure
from web.messages import in_time
from web.outbox import PATIENCE
from web.refusals import converted, name_of, wrong
from web.shapes import Shape, Whenever
from web.signatures import is_token, owner, read_body, refused

_log = log.get()

_SCOPE = "sip:manage"
_PATIENCE_FOR_A_KEY = 2.0  # seconds of `PATIENCE`
_MOST_BYTES = 8 * 1024  # of what a controller tells
_MOST_SIGNS = 1024  # of a `contact`
_OLDEST = datetime(2000, 1, 1, tzinfo=UTC)
_AHEAD = timedelta(minutes=5)  # that a controller's clock may be
_LONGEST = timedelta(days=30)  # that a registration may be told to last
_BEHIND = timedelta(days=1)  # since when it may have ended
_MOST_OF_ERROR = 500  # characters
_EVENTS = {
    RegisterStatus.REGISTERED: "sip_registered",
    RegisterStatus.FAILED: "sip_failed",
    RegisterStatus.PENDING: "sip_unregistered",
}


class Told(Shape, rename="camel"):
    """What a controller says of an account; what it leaves out stays, but an error ends with the failure."""

    register_status: Literal["pending", "registered", "failed"]
    register_error: str | UnsetType | None = UNSET
    last_register_at: Whenever | None = None
    expires: Whenever | None = None


class Who(NamedTuple):
    """Who asks; `tenant_id` is None for the fleet's own key, which sees all tenants."""

    tenant_id: UUID | None
    names: dict[str, str]

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A transaction that sees what this key may see."""
        with db.session([self.tenant_id] if self.tenant_id else []) as s:
            if self.tenant_id is None:
                db.see_all(s)
            yield s


async def registrations(request: Request) -> Response:
    """The accounts, by tenant and name, as `{"data": […]}` like all our lists."""
    who, patience = await _proven(request)
    return Response(await in_time(lambda: asyncio.to_thread(_list, who), patience), media_type="application/json")


async def registration(request: Request) -> Response:
    """One account, with its last outcomes and the user of its Contact; 404 for a foreign one and a missing one alike
    (security-reliability.md T3)."""
    who, patience = await _proven(request)
    id_ = _id(request, who)
    shown = await in_time(lambda: asyncio.to_thread(_one, who, id_), patience)
    if shown is None:
        raise _not_found(request, who)
    return JSONResponse(shown)


async def tell(request: Request) -> Response:
    """A controller that registers the account by itself says how it stands: from now on nothing is sent from here.

    Told again, the answer is the same, and but for a report to the backend nothing else happens.
    """
    who, patience = await _proven(request)
    id_ = _id(request, who)
    told = _understood(await read_body(request, _MOST_BYTES))
    found = await in_time(lambda: asyncio.to_thread(_tell, who, id_, told), patience)
    if found is None:
        raise _not_found(request, who)
    tenant_id, shown, lapsed_for = found
    names = {"tenant_id": str(tenant_id), "account_id": str(id_), "request_id": request.scope["request_id"]}
    if lapsed_for is not None:
        metrics.sip_lapses.inc()
        _log.error("sip_lapsed", **names, status=shown["registerStatus"], seconds=round(lapsed_for, 1))
    _log.info("sip_told", **names, status=shown["registerStatus"])
    return JSONResponse(shown)


async def dispatch(request: Request) -> Response:
    """Account, tenant and target of the call that came for `contact`: a Request-URI, or just its user.

    `target` is null where the account has none. An account that is not registered, or not enabled, is named too: calls
    come for as long as its provider keeps the binding.
    """
    who, patience = await _proven(request)
    given = request.query_params.getlist("contact")
    if len(given) != 1:
        raise _no_contact("must be given once")
    user = user_of(given[0])
    found = await in_time(lambda: asyncio.to_thread(_by_contact, who, user), patience)
    if found is None:
        if who.tenant_id is not None:  # to the operator's Drachtio strangers ring as they like
            refused(request, "unknown_id", **who.names)
        raise Failure(404, "NOT_FOUND", "no account has this contact")
    return JSONResponse(found)


# ------------------------------------------------------------------------------------------------------------- requests


async def _proven(request: Request) -> tuple[Who, float]:
    """Who asks, and the seconds that are left for the rest. Raises 401 without one good key, 403 without the scope."""
    began = time.monotonic()
    given = _keys(request)
    key = given.pop() if len(given) == 1 else ""  # two that differ: nobody knows which of them is meant
    if is_token(key, settings().api_key.encode()):
        who = Who(None, {"key_id": "fleet"})
    else:
        found = await in_time(lambda: owner(request, key, _SCOPE), _PATIENCE_FOR_A_KEY)
        who = Who(found.tenant_id, {"tenant_id": str(found.tenant_id), "key_id": str(found.key.id)})
    return who, PATIENCE - (time.monotonic() - began)


def _keys(request: Request) -> set[str]:
    keys = {key.strip() for key in request.headers.getlist("x-api-key")}
    for field in request.headers.getlist("authorization"):
        scheme, _, key = field.partition(" ")
        if scheme.lower() == "bearer":
            keys.add(key.strip())
    return keys


def _id(request: Request, who: Who) -> UUID:
    try:
        return UUID(request.path_params["id"])
    except ValueError:
        raise _not_found(request, who) from None


def _not_found(request: Request, who: Who) -> Failure:
    refused(request, "unknown_id", **who.names)
    return Failure(404, "NOT_FOUND", "no such account")


def _understood(raw: bytes) -> Told:
    """What a controller told. Raises `Failure`."""
    try:
        given = msgspec.json.decode(raw)
        json.loads(raw.decode(), object_pairs_hook=_each_once, parse_int=float)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise Failure(400, "INVALID_PAYLOAD", "the body is not JSON") from None
    told: Told = converted(given, Told, "$")
    if isinstance(told.register_error, str):
        told.register_error = _cleaned(told.register_error)
    _check_time("lastRegisterAt", told.last_register_at, _AHEAD)
    _check_time("expires", told.expires, _LONGEST)
    if told.expires is not None and told.expires < datetime.now(UTC) - _BEHIND:
        raise wrong("$.expires", "must not be more than a day ago")
    return told


def _cleaned(text: str) -> str:
    """A provider's own words, often: refused for them, the status would be lost too."""
    return "".join(" " if _is_control(sign) else sign for sign in text[:_MOST_OF_ERROR])


def _each_once(pairs: list[tuple[str, Any]]) -> None:
    names = set()
    for name, _ in pairs:
        if name in names:
            raise wrong(f"$.{name_of(name)}", "stands there twice")
        names.add(name)


def _is_control(sign: str) -> bool:
    """Also what turns or breaks a line of a terminal without being called a control character."""
    return unicodedata.category(sign) in ("Cc", "Cf", "Zl", "Zp")


def _check_time(name: str, at: datetime | None, ahead: timedelta) -> None:
    if at is None:
        return
    if at < _OLDEST:
        raise wrong(f"$.{name}", f"must not be before {_OLDEST:%Y-%m-%d}")
    if at > datetime.now(UTC) + ahead:
        raise wrong(f"$.{name}", f"must not be more than {ahead // timedelta(minutes=1)} minutes ahead")


_BRACKETS = re.compile(r'(?:"(?:[^"\\]|\\.)*"\s*|[^<>"]*)<(?P<uri>[^<>]*)>(?:;[^<>,]*)?')
_SCHEME = re.compile(r"sips?:", re.IGNORECASE)


def user_of(contact: str) -> str:
    """The user of a Request-URI, of a Contact or To, or what stands alone and is one. Raises `Failure`."""
    text = contact.strip()
    if len(text) > _MOST_SIGNS:
        raise _no_contact(f"must have at most {_MOST_SIGNS} characters", _MOST_SIGNS)
    if match := _BRACKETS.fullmatch(text):
        text = match["uri"].strip()
    elif "<" in text or ">" in text:
        raise _no_contact("must be one URI")
    is_uri = _SCHEME.match(text) is not None
    user, *others = (text.partition(":")[2] if is_uri else text).split("@")
    if len(others) > 1:
        raise _no_contact("must be one URI")
    if (is_uri and not others) or (not others and ":" in user):
        raise _no_contact("must be a SIP URI with a user, or that user")
    # `;` begins parameters of the user, or of the URI where no host follows; `:` a password.
    user = unquote(re.split("[;:]", user, maxsplit=1)[0])
    if not user or any(sign.isspace() or _is_control(sign) or sign in ',"' for sign in user):
        raise _no_contact("must be a SIP URI with a user, or that user")
    return user


def _no_contact(message: str, limit: int | None = None) -> Failure:
    details = {"field": "contact"} if limit is None else {"field": "contact", "limit": limit}
    return Failure(400, "INVALID_PAYLOAD", f"contact {message}", details=details)


# ----------------------------------------------------------------------------------------------------------------- rows


def _list(who: Who) -> bytes:
    """As JSON, since encoding many accounts takes its time too."""
    with who.session() as s:
        found = SipRegistration.listing(s, tenant_id=who.tenant_id)
        slugs = _slugs(s, {row["tenant_id"] for row in found})
    shown = [_shown(row, slugs[row["tenant_id"]]) for row in found if row["tenant_id"] in slugs]
    return msgspec.json.encode({"data": shown})


def _one(who: Who, id_: UUID) -> dict[str, Any] | None:
    with who.session() as s:
        return _whole(s, who, id_)


def _tell(who: Who, id_: UUID, told: Told) -> tuple[UUID, dict[str, Any], float | None] | None:
    """The account's tenant, the account as it stands afterwards, and for how many seconds it had been lapsed if nobody
    had noted that; None where there is none to be seen."""
    with who.session() as s:
        # Locked, so that of two who tell the same at once only one makes an event.
        wanted = select(
            SipRegistration.tenant_id,
            SipRegistration.register_status,
            SipRegistration.register_error,
            SipRegistration.is_enabled,
            SipRegistration.next_refresh_at,
            SipRegistration.sender,
            func.extract("epoch", func.clock_timestamp() - SipRegistration.expires_at).label("over_for"),
        )
        is_it = (SipRegistration.id == id_, SipRegistration.removed_at.is_(None))
        was = s.execute(wanted.where(*is_it).with_for_update()).first()
        if was is None:
            return None
        is_ours = was.sender != SipSender.EXTERNAL
        if is_ours and not was.is_enabled and was.next_refresh_at is not None:
            raise Failure(409, "CONFLICT", "the account is being un-registered; tell again when that is over")
        status = RegisterStatus(told.register_status)
        error = told.register_error
        if isinstance(error, UnsetType):
            error = was.register_error if status is RegisterStatus.FAILED else None
        SipRegistration.told(
            s,
            was.tenant_id,
            id_,
            status=status,
            error=error,
            last_register_at=told.last_register_at,
            expires_at=told.expires,
            is_reported=bool(settings().sip_backend_url and settings().sip_backend_key),
        )
        shown = _whole(s, who, id_)
        if shown is None:
            return None
        # By what was written: an expiry that nobody has noted made no event yet. One that has passed makes its own.
        is_over = status is RegisterStatus.REGISTERED and shown["registerStatus"] != status
        before, lapsed_for = was.register_status, None
        if before == RegisterStatus.REGISTERED and was.is_enabled and (was.over_for or 0) > 0 and not is_over:
            before, lapsed_for = RegisterStatus.FAILED, float(was.over_for)
        news = [new for old, new in pairwise((was.register_status, before, status)) if new != old and not is_over]
        payload = {"account": str(id_), "name": shown["name"]}
        Event.append(
            s, [Event.row(_EVENTS[new], was.tenant_id, None, None, {**payload, "status": new}) for new in news]
        )
        return was.tenant_id, shown, lapsed_for


def _by_contact(who: Who, user: str) -> dict[str, Any] | None:
    with who.session() as s:
        row = SipRegistration.by_contact(s, user)
    if row is None:
        return None
    return {
        "account": {"id": str(row["id"]), "name": row["name"]},
        "tenant": {"id": str(row["tenant_id"]), "slug": row["slug"]},
        "target": row["target"],
        "registerStatus": row["status"],
        "isEnabled": row["is_enabled"],
    }


def _slugs(s: Session, tenants: Iterable[UUID]) -> dict[UUID, str]:
    found = s.execute(select(Tenant.id, Tenant.slug).where(Tenant.id.in_(tenants)))
    return {id_: slug for id_, slug in found}


def _whole(s: Session, who: Who, id_: UUID) -> dict[str, Any] | None:
    row = next(iter(SipRegistration.listing(s, tenant_id=who.tenant_id, id_=id_)), None)
    slug = _slugs(s, [row["tenant_id"]]).get(row["tenant_id"]) if row else None
    if row is None or slug is None:  # with its tenant gone, so is the account
        return None
    history = [{**one, "at": _at(datetime.fromisoformat(one["at"]))} for one in row["history"]]
    return {**_shown(row, slug), "contact": row["contact_token"], "history": history}


def _shown(row: RowMapping, slug: str) -> dict[str, Any]:
    """How it stands now, under the old backend's names; nothing that it is registered with but its host."""
    return {
        "id": str(row["id"]),
        "name": row["name"],
        "host": row["host"],
        "registerStatus": row["status"],
        "registerError": row["register_error"],
        "lastRegisterAt": _at(row["last_register_at"]),
        "nextRefreshAt": _at(row["next_refresh_at"]),
        "expires": _at(row["expires_at"]),
        "granted": row["granted"],
        "tenant": slug,
        "sender": row["sender"],
        "isEnabled": row["is_enabled"],
        "failures": row["failures"],
        "lastOutcome": row["last_outcome"],
        "lastStatusCode": row["last_status_code"],
        "unregisteredSince": _at(row["unregistered_since"]),
        "updatedAt": _at(row["updated_at"]),
    }


def _at(at: datetime | None) -> str | None:
    """As a Node program writes times (sip-registration.md §1: `Z`)."""
    return zulu(at) if at is not None else None
