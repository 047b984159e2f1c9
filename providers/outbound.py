"""The plain values of sending, the same for every provider: what to send, and what came back.

An error says *what kind* it is (so: what to do) and *whom it concerns* (so: who else must wait).
"""

from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

import msgspec


class Kind(StrEnum):
    """What an error asks for."""

    TRANSIENT = "transient"  # try again, a few times
    THROTTLE = "throttle"  # too many: wait, at the error's scope; no attempt is used up
    PERMANENT = "permanent"  # this message will never be taken
    AUTH = "auth"  # token, permission or standing of the account: hold everything until a person mends it
    PAYMENT = "payment"  # likewise, and money mends it
    SESSION = "session"  # the channel is not connected: hold everything until it is


class Scope(StrEnum):
    """Whom an error concerns, from one message to all of an app's numbers."""

    MESSAGE = "message"
    PAIR = "pair"  # this number and this recipient
    NUMBER = "number"
    WABA = "waba"  # the business account, with all its numbers
    APP = "app"
    CHANNEL = "channel"


class Outcome(StrEnum):
    ACCEPTED = "accepted"
    REFUSED = "refused"  # the provider said no, so nothing was sent
    UNKNOWN = "unknown"  # the request left, and what came back does not say what became of it
    NOT_SENT = "not_sent"  # the request never left: nobody was reached


class Fault(msgspec.Struct, frozen=True):
    """An error of a provider. `text` is the provider's own, for the tenant; it may name a recipient: never log it."""

    kind: Kind
    scope: Scope
    code: str
    text: str
    tries: int = 0  # how often a transient one may be met before the message fails
    wait: float = 0.0  # seconds that the provider wants to be left alone; 0 when it does not say
    is_outage: bool = False  # it speaks of trouble at the provider, and not with this message
    is_about_file: bool = False  # perhaps it no longer has the file that the message named by the provider's id
    is_of_a_moment: bool = False  # perhaps it is no fault of the message's: worth another try after a while


class Attachment(NamedTuple):
    """A file to hand to a provider. `chunks` gives its bytes, once."""

    mime_type: str
    size: int
    chunks: AsyncIterator[bytes]


class Quoted(NamedTuple):
    """The message that another one answers or marks as read, as a gateway must be told of it."""

    provider_id: str
    is_ours: bool
    author: str | None  # in a group: the JID of who wrote it
    type: str
    body: dict[str, Any]


class Outgoing(msgspec.Struct, frozen=True):
    """One message to send. `body` holds the object named like the type, and `context` of a reply.

    `attachment` and `quoted` only for providers that cannot be told by an id alone.
    """

    type: str
    body: dict[str, Any]
    recipient: str | None  # a phone number with its plus, a BSUID, or a JID; None for a read receipt at Meta
    callback: str  # comes back with each status
    attachment: Attachment | None = None
    quoted: Quoted | None = None


class Answer(msgspec.Struct, frozen=True):
    """What became of one call. `identities` are the `(kind, value)` by which the provider knows the recipient.

    An accepted one may lack its `provider_id`: the provider tells it later, by an echo of our message.
    """

    outcome: Outcome
    provider_id: str | None = None
    identities: tuple[tuple[str, str], ...] = ()
    http_status: int | None = None
    fault: Fault | None = None
    why: str = ""  # of an unknown outcome or a request that never left: the kind of failure, for operators
    trace_id: str | None = None


class Sender(Protocol):
    """A channel's way out. Never raises for what a provider or the network does."""

    async def send(self, message: Outgoing) -> Answer: ...

    async def upload(self, file: Attachment) -> Answer:
        """Hand over a file: `provider_id` is what messages call it then.

        Nobody sees that, so it may be repeated, and the outcome is never unknown. Raises what `chunks` raises.
        """
