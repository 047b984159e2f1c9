"""The control routes of the simulated SIP registrar: its accounts, what it does to them, what it was asked."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sandbox.config import SipUser
from sandbox.control import Refused, after_of, limit_of, read_body
from sandbox.kinds import SIP_HABITS
from sandbox.sip import Registrar
from sandbox.sip_habits import SetHabit
from sandbox.sip_service import Sip
from sandbox.sip_users import User

Name = Annotated[str, Meta(min_length=1, max_length=200)]


class AddUsers(msgspec.Struct, forbid_unknown_fields=True):
    password: Annotated[str, Meta(min_length=1, max_length=1_000)]
    name: Name | None = None
    auth_user: Name | None = None
    domain: Name | None = None
    realm: Name | None = None
    count: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    prefix: Name = "u"


class Invite(msgspec.Struct, forbid_unknown_fields=True):
    user: str
    received: bool = False
    seconds: Annotated[float, Meta(gt=0, le=60)] = 5.0


class Away(msgspec.Struct, forbid_unknown_fields=True):
    away: bool


class Forget(msgspec.Struct, forbid_unknown_fields=True):
    user: str | None = None


async def overview(request: Request) -> JSONResponse:
    """Where the SIP registrar is, UDP and TCP, and its counts; without a port it was not asked to be anywhere."""
    its = _registrar(request)
    where = {"host": its.host or None, "port": its.port, "away": its.is_away}
    return JSONResponse({**where, **its.summary()})


async def summary(request: Request) -> JSONResponse:
    """Counts: accounts, registered ones, gaps, transactions, codes, retransmissions, overlaps, complaints, dropped."""
    return JSONResponse(_registrar(request).summary())


async def users(request: Request) -> JSONResponse:
    """`?limit=50`: the accounts, and how each one stands."""
    found = list(_registrar(request).users)
    return JSONResponse({"users": [user.shown() for user in found[: limit_of(request)]], "count": len(found)})


async def user(request: Request) -> JSONResponse:
    """One account: its bindings, the times without any, how often it was asked for, and the last code."""
    return JSONResponse(_user(request, request.path_params["name"]).shown())


async def add_users(request: Request) -> JSONResponse:
    """{"name","password","auth_user"?,"domain"?,"realm"?} or {"count","prefix"?,"password"}: accounts at the registrar.

    Many are called by the prefix and a number from 0. One that is there already gets the password, and keeps the rest.
    """
    ask = await read_body(request, AddUsers)
    if (ask.name is None) == (ask.count is None):
        raise Refused(400, "INVALID_PAYLOAD", "give either name or count")
    names = [ask.name] if ask.name is not None else [f"{ask.prefix}{i}" for i in range(ask.count or 0)]
    for name in names:
        auth_user = ask.auth_user if ask.name is not None else None
        _registrar(request).users.add(SipUser(name, ask.password, auth_user, ask.domain, ask.realm))
    return JSONResponse({"count": len(names), "first": names[0], "last": names[-1]}, status_code=201)


async def remove_users(request: Request) -> JSONResponse:
    """`?name=`: there is no such account any more; without one, none of those that were added here."""
    name, its = request.query_params.get("name"), _registrar(request).users
    if name is None:
        its.clear()
    else:
        its.remove(_user(request, name).name)
    return JSONResponse({"count": len(its)})


async def habits(request: Request) -> JSONResponse:
    """The habits that are set for the SIP registrar, and how many transactions met each."""
    return JSONResponse({"habits": _registrar(request).habits.shown()})


async def set_habit(request: Request) -> JSONResponse:
    """{"user"? or "domain"?,"next"?,"when"?: any|first|authorized,…}: the registrar does so to them, or to everybody.

    `sandbox.sip_habits` tells the other keys. Answers the habit's id, and whether its user is known, if it has one.
    """
    given, its = await read_body(request, dict[str, Any]), _registrar(request)
    if unknown := sorted(given.keys() - set(SetHabit.__struct_fields__)):
        raise Refused(400, "INVALID_PAYLOAD", f"there is no key {unknown[0]!r}; there are {', '.join(SIP_HABITS)}")
    try:
        asked = msgspec.convert(given, SetHabit)
    except msgspec.ValidationError as error:
        raise Refused(400, "INVALID_PAYLOAD", str(error)) from error
    is_known = asked.user is None or its.users.find(asked.user) is not None
    return JSONResponse({"id": its.habits.set(asked).id, "is_known": is_known}, status_code=201)


async def clear_habits(request: Request) -> JSONResponse:
    """`?user=` or `?id=`: without these habits; without either, none at all."""
    asked, its = request.query_params, _registrar(request).habits
    id = asked.get("id")
    if id is not None and not id.isdecimal():
        raise Refused(400, "INVALID_PAYLOAD", "id is the number of a habit")
    its.clear(user=asked.get("user"), id=None if id is None else int(id))
    return JSONResponse({"habits": its.shown()})


async def transactions(request: Request) -> Response:
    """`?limit=50&user=&after=`: what the SIP registrar was asked, newest last, or the first after number `after`."""
    listed = _registrar(request).journal.listed(
        limit_of(request), user=request.query_params.get("user"), after=after_of(request)
    )
    return Response(msgspec.json.encode({"transactions": listed}), media_type="application/json")


async def clear_transactions(request: Request) -> JSONResponse:
    """Forget those transactions and their counts; bindings stay."""
    _registrar(request).journal.clear()
    return JSONResponse({"transactions": []})


async def invite(request: Request) -> JSONResponse:
    """{"user","received"?,"seconds"?}: a call comes in for its binding; answers where it went and the final status.

    `received` sends it to where the REGISTER came from. Without any answer in time the status is null.
    """
    ask = await read_body(request, Invite)
    _user(request, ask.user)
    try:
        return JSONResponse(await _registrar(request).invite(ask.user, received=ask.received, seconds=ask.seconds))
    except LookupError as error:
        raise Refused(409, "CONFLICT", str(error)) from error


async def away(request: Request) -> JSONResponse:
    """{"away"}: nobody listens on the SIP port any more, or somebody does again; bindings stay."""
    ask, its = await read_body(request, Away), _registrar(request)
    if its.port is None:
        raise Refused(409, "CONFLICT", "the sandbox was started without a SIP port")
    if ask.away:
        its.close()
    else:
        try:
            await its.come_back()
        except OSError as error:
            raise Refused(409, "CONFLICT", f"port {its.port} is taken") from error
    return JSONResponse({"away": its.is_away})


async def forget(request: Request) -> JSONResponse:
    """{"user"?}: the bindings of one account or of all are gone, as after a restart of the SIP registrar."""
    ask = await read_body(request, Forget)
    if ask.user is not None:
        _user(request, ask.user)
    _registrar(request).forget(ask.user)
    return JSONResponse(_registrar(request).summary())


ROUTES = [
    Route("/sip", overview),
    Route("/sip/summary", summary),
    Route("/sip/users", users),
    Route("/sip/users", add_users, methods=["POST"]),
    Route("/sip/users", remove_users, methods=["DELETE"]),
    Route("/sip/users/{name}", user),
    Route("/sip/habits", habits),
    Route("/sip/habits", set_habit, methods=["POST"]),
    Route("/sip/habits", clear_habits, methods=["DELETE"]),
    Route("/sip/transactions", transactions),
    Route("/sip/transactions", clear_transactions, methods=["DELETE"]),
    Route("/sip/invite", invite, methods=["POST"]),
    Route("/sip/away", away, methods=["POST"]),
    Route("/sip/forget", forget, methods=["POST"]),
]


# What the routes share


def _registrar(request: Request) -> Registrar:
    its: Sip = request.app.state.sip
    its.configure()
    return its.registrar


def _user(request: Request, name: str) -> User:
    found = _registrar(request).users.find(name)
    if found is None:
        raise Refused(404, "NOT_FOUND", f"no account {name!r}")
    return found
