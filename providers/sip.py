"""REGISTER as a conversation, without sockets: what to say next, what came of it, and when to come back.

Facts: sip-registration.md §3 to §6; RFC 3261 §10, RFC 7616, RFC 8760.
"""

from dataclasses import dataclass, field
from enum import StrEnum


class Transport(StrEnum):
    UDP = "udp"
    TCP = "tcp"
    TLS = "tls"


@dataclass(frozen=True)
class Account:
    """What a registration is made with. Its repr shows none of it."""

    domain: str = field(repr=False)  # of the address of record, and the Request-URI
    user: str = field(repr=False)
    auth_user: str = field(repr=False)
    password: str = field(repr=False)
    contact: str = field(repr=False)  # URI: `sip:token@host:port;transport=udp`; host `localhost`: the sender's own
    call_id: str = field(repr=False)
    from_tag: str = field(repr=False)
    interval: int = 300  # seconds that are asked for, always
    transport: Transport = Transport.UDP
    port: int | None = None  # of the registrar, or of the proxy if there is one; None: by DNS or the transport's own
    proxy: str | None = field(default=None, repr=False)  # host that all requests go to instead of the domain's
    allows_md5: bool = True
    algorithm: str | None = None  # that worked last: nothing weaker is answered (security-reliability.md R2)


class Kind(StrEnum):
    """Outcome classes (sip-registration.md §6), as `pombal_sip_attempts_total{outcome}` counts them."""

    REGISTERED = "registered"
    UNREGISTERED = "unregistered"
    PERMANENT = "permanent"  # the configuration is wrong: nobody knocks again soon
    TEMPORARY = "temporary"
    OURS = "ours"  # our own SBC is away: says nothing about the account


@dataclass(frozen=True)
class Outcome:
    """What an attempt ended in."""

    kind: Kind
    code: int | None = None  # the last SIP status; None where nobody answered
    error: str | None = None  # fit for `register_error`: no user, no secret; None after success
    granted: int | None = None  # seconds, from when the last request was sent
    retry_after: int | None = None  # seconds that the registrar asked for
    algorithm: str | None = None  # of the challenge that was answered with success
    wants_new_call_id: bool = False  # after a 400 that may be about CSeq
    notes: tuple[str, ...] = ()  # oddities, for the log
