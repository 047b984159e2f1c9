"""What lies in the store of a Baileys session: which entries may be dropped, and which credentials are whole.

The names are those of baileys-sessions.md §4, `<category>-<id>`: in a folder with `.json` behind them and `:` written
as `-`, in a table as they are. Pure functions; nothing here opens a file or a connection. Names hold people's numbers
and values hold private keys: neither belongs in a log or in a fault.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from providers import jid

# What `StoreFault.code` may be.
FAULTS = frozenset(
    {
        "misconfigured",  # the channel's settings or secrets
        "refused",  # a name that is not to be touched, a link in a file's place, credentials of another pairing
        "missing",  # no such folder, session or backup
        "no_access",  # not ours to read or write
        "no_space",
        "changed",  # somebody is writing: the gateway's socket lives
        "busy",  # somebody else holds this session's store
        "timeout",
        "unreachable",  # the database
        "too_large",
        "unreadable",
    }
)
SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")  # also what the name of a backup must match
MOST_CREDS = 4 << 20  # bytes

_ADDRESS = re.compile(r"([A-Za-z0-9]{1,64})(?:_([0-9]{1,3}))?\.[0-9]{1,5}")
_GROUP = re.compile(r"[A-Za-z0-9.-]{1,80}@(?:g\.us|broadcast)")
_SENDER = re.compile(rf"({_GROUP.pattern})(?:--|::)[A-Za-z0-9_]{{1,64}}(?:--|::)[0-9]{{1,5}}")
_PHONES, _LIDS = ("", "128"), ("", "1", "129")  # the address domains of either; 6.7 has none
_VOLATILE = frozenset(  # changes while a session is used, and a session does without
    {
        "accountSyncCounter",
        "lastAccountSyncTimestamp",
        "lastPropHash",
        "processedHistoryMessages",
        "routingInfo",
    }
)


class StoreFault(Exception):
    """A store that could not do what it was asked. `code` is one of `FAULTS`, `text` is for an operator and names no
    path, no entry and no key."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code, self.text = code, text


class Entry(NamedTuple):
    """An entry that may be dropped: Baileys makes it again with the help of the other side (§4, last column).

    `category` is `session`, `sender-key` or `sender-key-memory`. `user` and `domain` are a session's address, `group`
    is whose sender key it is.
    """

    category: str
    user: str = ""
    domain: str = ""
    group: str = ""


def entry(name: str) -> Entry | None:
    """What an entry of this name (without `.json`) is; None for all that must never be dropped."""
    if name.startswith("sender-key-memory-"):
        found = _GROUP.fullmatch(name, len("sender-key-memory-"))
        return Entry("sender-key-memory", group=found[0]) if found else None
    if name.startswith("sender-key-"):
        found = _SENDER.fullmatch(name, len("sender-key-"))
        return Entry("sender-key", group=found[1]) if found else None
    if name.startswith("session-"):
        found = _ADDRESS.fullmatch(name, len("session-"))
        return Entry("session", user=found[1], domain=found[2] or "") if found else None
    return None


class People:
    """Some contacts, each known by a phone, by a LID, or by both once the other form was learnt."""

    def __init__(self, jids: Iterable[str]) -> None:
        """Addresses that are of no person are passed over."""
        found = [one for one in map(jid.parse, jids) if one is not None]
        self._phones = {one.value for one in found if one.kind == "phone"}
        self._lids = {one.value for one in found if one.kind == "lid"}

    def mappings(self) -> list[str]:
        """The ids in the category `lid-mapping` that name the other forms."""
        return sorted(self._phones | {f"{lid}_reverse" for lid in self._lids})

    def learn(self, id_: str, value: bytes | str) -> None:
        """Take in what such an entry holds: a JSON string. What is none teaches nothing."""
        user = _json(value)
        if isinstance(user, str) and user.isdecimal() and user.isascii():
            (self._phones if id_.endswith("_reverse") else self._lids).add(user)

    def own(self, found: Entry) -> bool:
        """Whether it is the session with one of their devices, under either form of address."""
        return found.category == "session" and (
            (found.user in self._phones and found.domain in _PHONES)
            or (found.user in self._lids and found.domain in _LIDS)
        )


def is_derived(found: Entry, groups: frozenset[str] | None) -> bool:
    """Whether it goes when derived keys are dropped; with groups named, only their sender keys go."""
    return groups is None or found.group in groups


def groups_of(jids: Iterable[str]) -> frozenset[str]:
    """Raises `StoreFault` for what is no group."""
    groups = frozenset(jids)
    if not all(_GROUP.fullmatch(group) for group in groups):
        raise StoreFault("refused", "an address is not a group's")
    return groups


class Creds:
    """Credentials that a session can be opened with."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields

    @property
    def number(self) -> str | None:
        """The digits that are logged in; None when they are not told."""
        found = jid.parse(self.fields["me"]["id"])
        return found.value if found is not None and found.kind == "phone" else None

    @property
    def state(self) -> str:
        """Equal for two of the same pairing with the same signed pre-key, in 16 hex digits that give no key away.

        An older signed pre-key is not the one that the server hands out any more: restored, each new contact fails
        with `Bad MAC` (E6 of the sheet).
        """
        return hashlib.sha256(_canonical(_marks(self.fields))).hexdigest()[:16]

    def means_as(self, other: "Creds") -> bool:
        """Whether a session could be opened with either as well."""
        mine, theirs = (
            {key: value for key, value in one.fields.items() if key not in _VOLATILE} for one in (self, other)
        )
        return mine == theirs

    def past(self, pre_key: int) -> "Creds":
        """The same, counting pre-keys on from behind this one: numbers that are in use are not given out again."""
        if self.fields.get("nextPreKeyId", 1) > pre_key:
            return self
        return Creds({**self.fields, "nextPreKeyId": pre_key + 1, "firstUnuploadedPreKeyId": pre_key + 1})

    def encoded(self) -> bytes:
        return json.dumps(self.fields, separators=(",", ":")).encode()


def creds_in(raw: bytes | str | None) -> Creds | None:
    """Credentials as Baileys writes them; None for nothing, for half of them, and for those of nobody yet."""
    return creds_of(None if raw is None else _json(raw))


def creds_of(fields: object) -> Creds | None:
    if not isinstance(fields, dict):
        return None
    me, pre_key = fields.get("me"), fields.get("signedPreKey")
    pairs = [fields.get("noiseKey"), fields.get("signedIdentityKey")]
    pairs.append(pre_key.get("keyPair") if isinstance(pre_key, dict) else None)
    is_whole = (
        isinstance(me, dict)
        and isinstance(me.get("id"), str)
        and bool(me["id"])
        and all(isinstance(pair, dict) and pair.get("public") and pair.get("private") for pair in pairs)
        and isinstance(fields.get("registrationId"), int)
        and isinstance(fields.get("nextPreKeyId", 1), int)
    )
    return Creds(fields) if is_whole else None


def contradicts(raw: bytes | str | None, creds: Creds) -> bool:
    """Whether what is left of broken credentials shows that they were not these: another pairing, or a later state.

    Nothing left says nothing. Of a file that was cut off, the fields before the cut are asked.
    """
    text = raw.decode(errors="replace") if isinstance(raw, bytes) else raw or ""
    left = _json(text)
    if isinstance(left, dict) and isinstance(left.get("creds"), dict):
        left = left["creds"]
    if not isinstance(left, dict):
        left = {name: value for name in _MARKED if (value := _field(text, name)) is not None}
    ours = _marks(creds.fields)
    return any(value is not None and value != ours[mark] for mark, value in _marks(left).items())


_MARKED = ("noiseKey", "signedIdentityKey", "signedPreKey", "registrationId", "me")


def _marks(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one pairing from another, and one signed pre-key; None for each that is not there."""

    def at(*path: str) -> Any:
        value: Any = fields
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    return {
        "noise": at("noiseKey", "public"),
        "identity": at("signedIdentityKey", "public"),
        "pre_key": at("signedPreKey", "keyPair", "public"),
        "pre_key_id": at("signedPreKey", "keyId"),
        "registration": at("registrationId"),
        "me": at("me", "id"),
    }


def _field(text: str, name: str) -> Any:
    """The value of the first field of this name in a JSON text that breaks off somewhere; None when it is not whole."""
    _, found, rest = text.partition(f'"{name}":')
    rest = rest.lstrip()
    if not found or not rest:
        return None
    try:
        value, end = json.JSONDecoder().raw_decode(rest)
    except (ValueError, RecursionError):
        return None
    # A number that the text ends with may have had more digits.
    return value if rest[end:].lstrip()[:1] in (",", "}") else None


def _json(raw: bytes | str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
