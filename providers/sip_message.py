"""SIP messages as bytes: requests that are ours, responses that may be anything (RFC 3261 §7, §20, §25)."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """A REGISTER without what belongs to its transport: whoever sends it adds Via, Max-Forwards and Content-Length.

    `headers`: (name, value) in order. Its repr says neither user nor credentials.
    """

    uri: str = field(repr=False)  # the Request-URI: `sip:domain`
    call_id: str = field(repr=False)
    cseq: int
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    method: str = "REGISTER"


@dataclass(frozen=True)
class Response:
    """What was understood of a response: decoded with replacement, headers unfolded, compact names made long."""

    status: int
    reason: str = field(repr=False)
    branch: str  # of the topmost Via; "" where there is none
    call_id: str = field(repr=False)
    cseq: int
    method: str  # of CSeq
    headers: tuple[tuple[str, str], ...] = field(repr=False)  # names in lower case
