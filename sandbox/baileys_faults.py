"""What goes wrong on purpose at a simulated Baileys gateway; `sandbox.kinds` has a line about each kind."""

from typing import Annotated

from msgspec import Meta

from sandbox.answers import HUGE, Answer
from sandbox.faults import AnyFault, FaultList
from sandbox.kinds import BAILEYS_KINDS, BAILEYS_PLACES
from sandbox.megaapi_faults import HTML_TYPE, told

BEFORE = frozenset(
    {"hang_before", "reset_before", "html502", "redirect", "outage"}
    | {kind for kind in BAILEYS_KINDS if kind.startswith("http")}
)
"""Kinds that keep anything from being done."""

_PAGE = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"


class SetBaileysFault(AnyFault, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One of a gateway's.

    kind     a key of `sandbox.kinds.BAILEYS_KINDS`
    place    one of `BAILEYS_PLACES`; else anywhere
    gateway, session   only there
    message  of those in JSON
    """

    place: str | None = None
    gateway: str | None = None
    session: str | None = None
    message: Annotated[str, Meta(max_length=10_000)] | None = None

    def __post_init__(self) -> None:
        if self.kind not in BAILEYS_KINDS:
            raise ValueError(f"there is no fault {self.kind!r}; there are {', '.join(BAILEYS_KINDS)}")
        if self.place is not None and self.place not in BAILEYS_PLACES:
            raise ValueError(f"there is no place {self.place!r}; there are {', '.join(BAILEYS_PLACES)}")

    @property
    def only(self) -> str | None:
        return self.session

    def is_at(self, at: str) -> bool:
        """`at` is a gateway's name and a place, as in g1/send."""
        gateway, _, place = at.partition("/")
        return self.gateway in (None, gateway) and self.place in (None, place)


class BaileysFaults(FaultList[SetBaileysFault]):
    """Those of one stand-in."""


def instead(fault: SetBaileysFault, answer: Answer) -> Answer:
    """What comes instead of this answer, for kinds whose answer comes in one piece."""
    kind = fault.kind
    match kind:
        case "html502" | "html502_after":
            answer = Answer(fault.http or 502, _PAGE, (HTML_TYPE,))
        case "outage":
            answer = Answer(503, _PAGE.replace(b"502", b"503"), (HTML_TYPE,))
        case "garbage":
            answer = answer._replace(body=b'{"key":{"remo')
        case "empty":
            answer = answer._replace(body=b"")
        case "huge":
            answer = answer._replace(body=answer.body[:-1] + b',"padding":"' + b"x" * HUGE + b'"}')
        case "wrong_json":
            answer = told(answer.status, {"ok": True, "list": [1, None, {"key": []}]})
        case "redirect":
            answer = Answer(302, headers=((b"location", (fault.location or "/moved").encode()),))
        case _ if kind.startswith("http"):
            status = int(kind.removeprefix("http"))
            answer = told(status, {"status": status, "error": fault.message or "Error", "message": fault.message})
    if fault.retry_after is not None:
        answer = answer._replace(headers=(*answer.headers, (b"retry-after", str(fault.retry_after).encode())))
    return answer
