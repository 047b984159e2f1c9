"""What goes wrong on purpose at the simulated MegaAPI; `sandbox.kinds` has a line about each kind."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sandbox.answers import HUGE, Answer
from sandbox.faults import AnyFault, FaultList
from sandbox.kinds import MEGAAPI_KINDS, MEGAAPI_PLACES, megaapi_fits

BEFORE = frozenset(
    {"hang_before", "reset_before", "html403", "html502", "error_true", "redirect", "outage"}
    | {kind for kind in MEGAAPI_KINDS if kind.startswith("http")}
)
"""Kinds that keep anything from being done."""

NAMES = {
    400: "BAD_REQUEST",
    401: "UNAUTHORIZED",
    403: "FORBIDDEN",
    404: "NOT_FOUND",
    429: "TOO_MANY_REQUESTS",
    500: "INTERNAL_SERVER_ERROR",
}
JSON_TYPE = (b"content-type", b"application/json; charset=utf-8")
HTML_TYPE = (b"content-type", b"text/html; charset=utf-8")
CLOUDFLARE = (b"server", b"cloudflare")
_BLOCKED = (
    b'<!DOCTYPE html>\n<html lang="en-US"><head><title>Attention Required! | Cloudflare</title></head><body>'
    b"<h1>Sorry, you have been blocked</h1><p>Cloudflare Ray ID: <strong>8c0ffee000000000</strong></p></body></html>"
)
_GATEWAY = (
    b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body><h1>502 Bad Gateway</h1></body>\r\n</html>\r\n"
)


class SetMegaFault(AnyFault, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One of MegaAPI's.

    kind      a key of `sandbox.kinds.MEGAAPI_KINDS`
    place     one of `MEGAAPI_PLACES`; else wherever the kind fits
    instance  only this one, by its name or key; in a list it concerns the entry
    to        a JID, as the request has it
    message   of an `error_true`, an `error_true_after` and of those in JSON
    word      the status of an `unknown_word`
    """

    place: str | None = None
    instance: str | None = None
    message: Annotated[str, Meta(max_length=10_000)] | None = None
    word: Annotated[str, Meta(max_length=10_000)] = "syncing"

    def __post_init__(self) -> None:
        if self.kind not in MEGAAPI_KINDS:
            raise ValueError(f"there is no fault {self.kind!r}; there are {', '.join(MEGAAPI_KINDS)}")
        if self.place is not None and self.place not in MEGAAPI_PLACES:
            raise ValueError(f"there is no place {self.place!r}; there are {', '.join(MEGAAPI_PLACES)}")
        if self.place is not None and not any(self.is_at(at) for at in (self.place, "entry")):
            raise ValueError(f"a fault {self.kind!r} is never met at {self.place!r}")

    @property
    def only(self) -> str | None:
        return self.instance

    def is_at(self, at: str) -> bool:
        return self.place in (None, "list" if at == "entry" else at) and megaapi_fits(self.kind, at)


class MegaFaults(FaultList[SetMegaFault]):
    """Those of one host."""


def told(status: int, value: Any) -> Answer:
    return Answer(status, msgspec.json.encode(value), (JSON_TYPE,))


def refused(status: int, message: str, retry_after: int | None = None) -> Answer:
    """An error as the older API of that family describes it (megaapi.md, Responses)."""
    name = NAMES.get(status, "ERROR")
    answer = told(status, {"name": name, "message": message, "status": status, "errors": []})
    return _with_retry_after(answer, retry_after)


def blocked() -> Answer:
    """Cloudflare does not like the client."""
    return Answer(403, _BLOCKED, (HTML_TYPE, CLOUDFLARE))


def failed(message: str, **more: Any) -> Answer:
    """A 200 that is none."""
    return told(200, {"error": True, "message": message, **more})


def instead(fault: SetMegaFault, answer: Answer, place: str) -> Answer:
    """What comes instead of this answer, for kinds whose answer comes in one piece."""
    kind, after = fault.kind, fault.retry_after
    match kind:
        case "html403":
            return _with_retry_after(blocked(), after)
        case "html502" | "html502_after":
            return _with_retry_after(Answer(fault.http or 502, _GATEWAY, (HTML_TYPE, CLOUDFLARE)), after)
        case "outage":
            return _with_retry_after(Answer(503, _GATEWAY.replace(b"502", b"503"), (HTML_TYPE,)), after)
        case "error_true" | "error_true_after":
            more = {"data": ""} if place == "media" else {}
            return failed(fault.message or "Something went wrong", **more)
        case "garbage":
            return answer._replace(body=b'{"error":false,"message":"Insta')
        case "empty":
            return answer._replace(body=b"")
        case "huge":
            return answer._replace(body=answer.body[:-1] + b',"padding":"' + b"x" * HUGE + b'"}')
        case "redirect":
            return Answer(302, headers=((b"location", (fault.location or "/moved").encode()),))
    if kind.startswith("http"):
        status = int(kind.removeprefix("http"))
        return refused(status, fault.message or NAMES[status].replace("_", " ").capitalize(), after)
    return answer


def _with_retry_after(answer: Answer, seconds: int | None) -> Answer:
    if seconds is None:
        return answer
    return answer._replace(headers=(*answer.headers, (b"retry-after", str(seconds).encode())))
