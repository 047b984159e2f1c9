"""How channels of each kind are sent from: their usual rate, and what their providers want told. Not a queue, hence the
underscore."""

from typing import NamedTuple

from models import ChannelKind
from workers._verdicts import ASK, ONCE_MORE


class Manner(NamedTuple):
    """What sending must know of a kind. A channel may say otherwise of `rate` and `on_unknown`."""

    rate: float = 5.0  # messages a second of a number
    on_unknown: str = ASK  # when nobody told what became of a send (security-reliability.md O2)
    has_window: bool = False  # free-form messages only within 24 hours of the customer's last one
    uploads: bool = False  # the provider must have a file before a message names it; else it goes along
    is_gateway: bool = False  # of WhatsApp Web: it is told JIDs, and the message itself that is quoted or was read
    has_session: bool = False  # which may be disconnected: then nothing is sent


# 80: whatsapp-cloud-api.md §10. MegaAPI tells no limit (megaapi.md, "Still UNCONFIRMED"): slowly, as a person would. A
# Baileys gateway is a library on some host of the operator's, with nobody before it who would slow us down.
_MANNERS: dict[str, Manner] = {
    ChannelKind.META: Manner(80.0, ONCE_MORE, has_window=True, uploads=True),
    ChannelKind.MEGAAPI: Manner(is_gateway=True, has_session=True),
    ChannelKind.BAILEYS: Manner(2.0, is_gateway=True, has_session=True),
    ChannelKind.STUB: Manner(80.0, has_session=True),
}


def manner(kind: str) -> Manner:
    """That of a kind; the most careful one where it is not known."""
    return _MANNERS.get(kind, Manner())
