"""What can be sent through a channel of each kind, and what has to be looked at before.

A request is checked against Meta's shapes first (`web/shapes.py`); what a kind does not take of them is refused here,
with the field and the reason, instead of failing later or leaving something out in silence (megaapi.md, "Sending").
"""

import re
from typing import NamedTuple

from models import ChannelKind
from web.errors import Failure
from web.refusals import wrong
from web.shapes import TYPES, Ask, identity


class Kind(NamedTuple):
    """What channels of a kind take. `recipients` are kinds of identities."""

    types: tuple[str, ...]
    recipients: tuple[str, ...]
    replies: tuple[str, ...]  # types that may quote a message
    has_window: bool = False  # free-form messages only within 24 hours of the customer's last one
    has_template_checks: bool = False  # the provider approves templates, and we know which
    is_gateway: bool = False  # of WhatsApp Web: files by link or by ours, one card in a message
    takes_links: bool = True  # or files of ours alone
    takes_captions: bool = True


_OF_GATEWAYS = ("text", "image", "video", "audio", "document", "location", "contacts", "read")
_KINDS: dict[str, Kind] = {
    ChannelKind.META: Kind(TYPES, ("phone", "bsuid"), TYPES, has_window=True, has_template_checks=True),
    ChannelKind.MEGAAPI: Kind(_OF_GATEWAYS, ("phone", "lid", "group"), ("text",), is_gateway=True),
    ChannelKind.STUB: Kind(TYPES, ("phone", "lid", "group"), TYPES),
}
_FILES = ("image", "video", "audio", "document")
# By the dialect of a Baileys gateway: what it has calls for (baileys-sessions.md §5), as they are in
# `providers/baileys_dialects.py`.
_DIALECTS: dict[str, Kind] = {
    "whaticket": Kind(("text", *_FILES), ("phone",), (), is_gateway=True, takes_links=False),
    "ticketz": Kind(
        ("text", *_FILES), ("phone", "lid", "group"), (), is_gateway=True, takes_links=False, takes_captions=False
    ),
    "evolution": Kind(
        _OF_GATEWAYS, ("phone", "lid", "group"), ("text", *_FILES, "location", "contacts"), is_gateway=True
    ),
    "waha": Kind(_OF_GATEWAYS, ("phone", "lid", "group"), ("text", *_FILES, "location"), is_gateway=True),
    "fazer": Kind(
        ("text", *_FILES, "read"), ("phone", "lid", "group"), ("text", *_FILES), is_gateway=True, takes_links=False
    ),
}
_RECIPIENTS = {"phone": "+ and digits", "bsuid": "a business-scoped user id", "lid": "…@lid", "group": "…@g.us"}
_NO_KIND = Kind((), (), ())


def has_window(kind: str) -> bool:
    """Whether a channel of that kind may send free-form messages for 24 hours only."""
    return _KINDS.get(kind, _NO_KIND).has_window


def has_template_checks(kind: str) -> bool:
    """Whether what we know of a template's approval decides if a channel of that kind may send it."""
    return _KINDS.get(kind, _NO_KIND).has_template_checks


def kind_of(kind: str, gateway: str | None = None) -> Kind | None:
    """What channels of that kind take; of a Baileys gateway, that of its dialect."""
    return _DIALECTS.get(gateway or "") if kind == ChannelKind.BAILEYS else _KINDS.get(kind)


def refusal(kind: str, ask: Ask, gateway: str | None = None) -> Failure | None:
    """Why this cannot be sent through a channel of that kind; None when it can. `gateway` is the dialect of a Baileys
    gateway."""
    takes = kind_of(kind, gateway)
    if takes is None:
        return wrong("$.channel", f"is of kind {kind}, which cannot send")
    if ask.type not in takes.types:
        text = f"cannot be {ask.type}: a channel of kind {kind} sends {', '.join(takes.types)}"
        return wrong("$.type", text, list(takes.types))
    if ask.recipient is not None and identity(ask.recipient)[0] not in takes.recipients:
        known = [_RECIPIENTS[one] for one in takes.recipients]
        return wrong("$.to", f"is of a form that a channel of kind {kind} does not know: it takes {', '.join(known)}")
    is_reply = ask.reference is not None and ask.reference.field == "$.reply_to"
    if is_reply and ask.type not in takes.replies:
        text = f"does not go with type {ask.type} on a channel of kind {kind}, but with {', '.join(takes.replies)}"
        return wrong("$.reply_to", text, list(takes.replies))
    return _beyond_a_gateway(kind, takes, ask) if takes.is_gateway else None


def _beyond_a_gateway(kind: str, takes: Kind, ask: Ask) -> Failure | None:
    """What a gateway does not take of a content that Meta does."""
    if ask.type == "contacts":
        cards = ask.element
        if len(cards) != 1:
            return wrong(ask.at, f"must be exactly one contact on a channel of kind {kind}", 1)
        phones = cards[0].get("phones") or [{}]
        if not re.search(r"[0-9]", phones[0].get("wa_id") or phones[0].get("phone") or ""):
            return wrong(f"{ask.at}[0].phones", f"must begin with a phone number on a channel of kind {kind}")
    elif isinstance(ask.element, dict):
        if ask.element.get("id") is not None:
            text = f"is Meta's name of a file: a channel of kind {kind} sends one by `media_id` or `link`"
            return wrong(f"{ask.at}.id", text)
        if ask.element.get("link") is not None and not takes.takes_links:
            return wrong(f"{ask.at}.link", f"is not possible on this channel of kind {kind}: send a file by `media_id`")
        if ask.element.get("caption") and not takes.takes_captions:
            return wrong(f"{ask.at}.caption", f"is not possible on this channel of kind {kind}")
        if ask.element.get("voice"):
            return wrong(f"{ask.at}.voice", f"is not possible on a channel of kind {kind}: audio goes as a file")
    return None
