"""The control routes of the simulated drachtio, if the sandbox was started with one."""

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from sandbox.control import Refused, limit_of, read_body
from sandbox.drachtio import Standin
from sandbox.meta import JSON


class Away(msgspec.Struct, forbid_unknown_fields=True):
    away: bool


async def overview(request: Request) -> JSONResponse:
    """Where drachtio is, who is connected, its habits, and what a client must never do to it."""
    return JSONResponse(_shown(_standin(request)))


async def set_habits(request: Request) -> JSONResponse:
    """{"nok"?,"silent"?,"drop"?,"pieces"?,"delay"?,"times"?,…}: drachtio does so; what is left out stays.

    `sandbox.drachtio_habits` tells all of them. Answers those that hold.
    """
    its = _standin(request)
    try:
        return JSONResponse({"habits": its.set_habits(**await read_body(request, dict))})
    except ValueError as error:
        raise Refused(400, "INVALID_PAYLOAD", str(error)) from error


async def clear_habits(request: Request) -> JSONResponse:
    """Drachtio does what it should."""
    return JSONResponse({"habits": _standin(request).reset_habits()})


async def requests(request: Request) -> JSONResponse:
    """`?limit=50`: the SIP requests that drachtio was asked to send, newest last."""
    return JSONResponse({"requests": _standin(request).requests(limit_of(request))})


async def invites(request: Request) -> JSONResponse:
    """`?limit=50`: the calls that came in at drachtio, newest last, and where they were sent."""
    return JSONResponse({"invites": _standin(request).invites(limit_of(request))})


async def forget(request: Request) -> JSONResponse:
    """Drachtio's journals are empty, its counts zero."""
    its = _standin(request)
    its.forget()
    return JSONResponse(_shown(its))


async def hang_up(request: Request) -> JSONResponse:
    """All of drachtio's control connections end now."""
    its = _standin(request)
    its.hang_up()
    return JSONResponse(_shown(its))


async def away(request: Request) -> JSONResponse:
    """{"away"}: drachtio's control port is closed, as while it restarts, or open again."""
    ask, its = await read_body(request, Away), _standin(request)
    if ask.away:
        its.go_away()
    else:
        its.come_back()
    return JSONResponse({"away": ask.away})


ROUTES = [
    Route("/sip/drachtio", overview),
    Route("/sip/drachtio/habits", set_habits, methods=["POST"]),
    Route("/sip/drachtio/habits", clear_habits, methods=["DELETE"]),
    Route("/sip/drachtio/requests", requests),
    Route("/sip/drachtio/requests", forget, methods=["DELETE"]),
    Route("/sip/drachtio/invites", invites),
    Route("/sip/drachtio/hang-up", hang_up, methods=["POST"]),
    Route("/sip/drachtio/away", away, methods=["POST"]),
]


def _standin(request: Request) -> Standin:
    its: Standin | None = request.app.state.drachtio
    if its is None:
        raise Refused(409, "CONFLICT", "the sandbox was started without a drachtio")
    return its


def _shown(its: Standin) -> JSON:
    counts = {"pings": its.pings, "logins": its.logins, "refused_logins": its.refused_logins}
    return {**its.overview(), **counts, "routes": its.routes(), "violations": its.violations()}
