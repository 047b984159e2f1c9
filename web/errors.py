"""Error answers, all of one shape: `{"error": {"code", "message", "details", "request_id", "timestamp"}}`."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from pombal import db, log
from pombal.errors import Unreachable
from web.limits import Quota

_log = log.get()

REQUEST_ID = b"x-request-id"
_failures = Quota(per_second=20)

_CODES = {
    400: "INVALID_PAYLOAD",
    401: "UNAUTHORIZED",
    403: "FORBIDDEN",
    404: "NOT_FOUND",
    405: "INVALID_PAYLOAD",
    409: "CONFLICT",
}


class Failure(Exception):
    """An answer other than success. `close` ends the connection too: the sender may still be sending.

    `details` are for programs: which field, which limit, which state.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        details: dict[str, Any] | None = None,
        retry_after: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.details = status, code, message, details or {}
        self.headers = {"Retry-After": str(retry_after)} if retry_after else {}
        if close:
            self.headers["Connection"] = "close"


def answer(
    request: Request,
    status: int,
    code: str,
    message: str,
    headers: dict[str, str] | None = None,
    details: dict[str, Any] | None = None,
) -> Response:
    error: dict[str, Any] = {
        "code": code,
        "message": message,
        "details": details or {},
        "request_id": request.scope.get("request_id"),
        "timestamp": datetime.now(UTC).isoformat(),
    }
    return JSONResponse({"error": error}, status_code=status, headers=headers)


async def on_failure(request: Request, error: Any) -> Response:
    return answer(request, error.status, error.code, error.message, error.headers, error.details)


async def on_unreachable(request: Request, error: Exception) -> Response:
    return answer(request, 503, "UNAVAILABLE", "try again later", {"Retry-After": "5"})


async def on_http_exception(request: Request, error: Any) -> Response:
    code = _CODES.get(error.status_code, "INTERNAL_ERROR")
    return answer(request, error.status_code, code, error.detail.lower(), dict(error.headers or {}))


async def on_error(request: Request, error: Exception) -> Response:
    """Whatever else: no stack, SQL, path or version in the answer (security-reliability.md W12)."""
    if db.is_store_trouble(error):
        return await on_unreachable(request, error)
    if _failures.allows():
        _log.error("request_failed", request_id=request.scope.get("request_id"), exc_info=error)
    return answer(request, 500, "INTERNAL_ERROR", "something went wrong here; the request id finds it in the log")


async def on_anything(request: Request, error: Exception) -> Response:
    """As `on_error`, for what Starlette handles outside of all middleware: the header is not added there."""
    response = await on_error(request, error)
    response.headers[REQUEST_ID.decode()] = request.scope.get("request_id", "")
    return response


async def on_gone(request: Request, error: Exception) -> Response:
    """The sender left before its body had come: nobody hears this."""
    return answer(request, 400, "INVALID_PAYLOAD", "the body did not come to its end")


HANDLERS: dict[Any, Any] = {
    Failure: on_failure,
    Unreachable: on_unreachable,
    HTTPException: on_http_exception,
    ClientDisconnect: on_gone,
    SQLAlchemyError: on_error,
    Exception: on_anything,
}
