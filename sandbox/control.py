"""What all control routes share: reading a request, refusing it, telling of a delivery."""

from typing import TypeVar

import msgspec
from starlette.requests import Request

from sandbox.meta import JSON
from sandbox.sender import Delivery

MAX_REQUEST = 16 * 2**20  # bytes; room for bodies beyond the 3 MB that Meta sends, to try a receiver's limit
MAX_CALLS = 100_000  # in one answer
T = TypeVar("T")


class Refused(Exception):
    """The request cannot be served; becomes the error answer."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


async def read_body(request: Request, type: type[T]) -> T:
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_REQUEST:
            raise Refused(413, "PAYLOAD_TOO_LARGE", f"a request has at most {MAX_REQUEST} bytes")
    try:
        return msgspec.json.decode(content, type=type)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Refused(400, "INVALID_PAYLOAD", str(error)) from error


def limit_of(request: Request, most: int = MAX_CALLS) -> int:
    limit = request.query_params.get("limit", "50")
    if not limit.isdecimal() or not 1 <= int(limit) <= most:
        raise Refused(400, "INVALID_PAYLOAD", f"limit is a number from 1 to {most}")
    return int(limit)


def after_of(request: Request) -> int | None:
    after = request.query_params.get("after")
    if after is not None and not after.isdecimal():
        raise Refused(400, "INVALID_PAYLOAD", "after is the number of a call")
    return None if after is None else int(after)


def shown(delivery: Delivery) -> JSON:
    return {
        "id": delivery.id,
        "state": delivery.state,
        "attempts": delivery.attempts,
        "status": delivery.status,
        "created_at": delivery.created_at,
        "accepted_at": delivery.accepted_at,
    }
