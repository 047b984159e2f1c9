"""What the simulated drachtio does wrong on demand, and its journals (sip-registration.md §8, §10)."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Text = Annotated[str, Meta(max_length=500, pattern=r"^[^\r\n|]*$")]


class Habits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All off by default.

    pieces        bytes of a frame that are written at a time; 0: all
    delay         seconds before each frame
    nok           refuses requests with this reason
    silent        takes requests, and neither sends them nor says anything
    garbage       answers a request with what is no frame
    drop          hangs up when a request comes (`on_request`, nothing is sent), or when its final response does
                  (`before_response`)
    early         responses come before the frame that names their transaction
    glued         … together with it, in one write
    wrong_secret  refuses every secret
    deaf          does not answer pings
    times         requests after which all habits are as they were; 0: never
    """

    pieces: Annotated[int, Meta(ge=0, le=65_536)] = 0
    delay: Annotated[float, Meta(ge=0, le=60)] = 0.0
    nok: Text = ""
    silent: bool = False
    garbage: bool = False
    drop: Literal["", "on_request", "before_response"] = ""
    early: bool = False
    glued: bool = False
    wrong_secret: bool = False
    deaf: bool = False
    times: Annotated[int, Meta(ge=0)] = 0

    def changed(self, **changes: Any) -> "Habits":
        """With these instead; `times` counts for this change alone. Raises ValueError with what is wrong with them."""
        try:
            return msgspec.convert({**msgspec.to_builtins(self), "times": 0, **changes}, Habits)
        except msgspec.ValidationError as error:
            raise ValueError(f"not a habit of drachtio: {error}") from None


NONE = Habits()


class Asked(msgspec.Struct, eq=False):
    """A SIP request that a client wanted to be sent.

    n            counts from 1 and never starts again
    authorized   had credentials
    proxy        where it was to go, as the client said it
    sent         went out
    codes        of the responses, provisional ones too
    self_made    the final one was drachtio's own
    transaction  drachtio's name for it
    """

    n: int
    at: float
    method: str
    call_id: str
    cseq: str
    authorized: bool
    proxy: str
    transport: str = ""
    sent: bool = False
    codes: list[int] = msgspec.field(default_factory=list)
    self_made: bool = False
    nok: str | None = None
    transaction: str = ""


class Invite(msgspec.Struct, eq=False):
    """A call that came in.

    from_            its From
    status           of the final answer
    target           where dispatch said that it should go
    dispatch_status  HTTP status of dispatch; None when it was not asked, or did not answer
    """

    n: int
    at: float
    request_uri: str
    call_id: str
    from_: str = msgspec.field(name="from")
    transport: str
    source: str
    status: int | None = None
    target: str | None = None
    dispatch_status: int | None = None
