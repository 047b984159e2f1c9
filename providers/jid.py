"""Addresses of WhatsApp Web, called JIDs, and the people behind them (baileys-sessions.md §5, "Key").

    5511999999999:12@s.whatsapp.net   a person by phone; `:12` is one of their devices
    123456789012345@lid               a person by an opaque number, which is no phone
    120363000000000001@g.us           a group

Pure functions: text in, plain values out.
"""

import re
from typing import NamedTuple

from providers.inbound import Person

_PERSON = re.compile(r"([0-9]{1,32})(?:_[0-9]{1,3})?(?::[0-9]{1,5})?@(s\.whatsapp\.net|c\.us|hosted|lid|hosted\.lid)")
_GROUP = re.compile(r"([0-9][0-9-]{0,63})@g\.us")
_SERVERS = {"phone": "s.whatsapp.net", "lid": "lid", "group": "g.us"}
_MANY = re.compile(r"[a-z0-9.:_-]{1,128}@(broadcast|newsletter)")


class Jid(NamedTuple):
    """`kind` is `phone`, `lid`, `group`, `list` (of a broadcast), `newsletter` or `status` (stories); `value` is the
    part before the `@`, without a device."""

    kind: str
    value: str


def parse(text: str) -> Jid | None:
    """The address without its device; None for what is none that we know."""
    text = text.lower()
    if match := _PERSON.fullmatch(text):
        return Jid("lid" if match[2].endswith("lid") else "phone", match[1])
    if match := _GROUP.fullmatch(text):
        return Jid("group", match[1])
    if text == "status@broadcast":
        return Jid("status", "status")
    if match := _MANY.fullmatch(text):
        return Jid("list" if match[1] == "broadcast" else "newsletter", text.partition("@")[0])
    return None


def spelt(jid: Jid) -> str:
    """A person or group in one word that no other can have: the digits of a phone, else with what kind it is."""
    if jid.kind == "phone":
        return jid.value
    return f"{jid.value}@{'g.us' if jid.kind == 'group' else jid.kind}"


def address(jid: Jid) -> str:
    """A person or group as WhatsApp writes them, without a device: one spelling for whatever `parse` takes."""
    return f"{jid.value}@{_SERVERS[jid.kind]}"


def person(jid: Jid, other: Jid | None = None, name: str | None = None, *, is_own_word: bool = True) -> Person:
    """Who an address of kind `phone`, `lid` or `group` is of; `other` is what the provider names beside it (`…Alt`).

    The phone as it came is an alias as well, so that a send finds the spelling that WhatsApp itself has for a Brazilian
    number; but only where they wrote themselves (`is_own_word`): what was sent to them is spelt as its sender did.
    """
    if jid.kind == "group":
        return Person((("group", jid.value),), name)
    known = {one.kind: one.value for one in (other, jid) if one is not None}
    identities = tuple((kind, known[kind]) for kind in ("lid", "phone") if kind in known)
    return Person(identities, name, (("jid", known["phone"]),) if "phone" in known and is_own_word else ())
