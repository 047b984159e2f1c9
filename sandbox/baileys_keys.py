"""What decrypts in a simulated Baileys session: its files, held against what WhatsApp and the contacts have.

The other side is `pairing`, the one-time pre-keys handed out, and for every contact the root of its ratchet; ours is
the folder, as the socket read it at its start. Nothing else decides (baileys-sessions.md §1, §3, §4, E1-E7).
"""

import re
import secrets
import time
from typing import Literal, NamedTuple

from sandbox.baileys_folder import Folder, buffer, escaped
from sandbox.megaapi_instances import lid
from sandbox.meta import JSON

NO_MATCH = "No matching sessions found for message"
NO_RECORD = "No session record"
NO_SENDER_KEY = "No session found to decrypt message"
BAD_PRE_KEY = "Invalid PreKey ID"
BAD_MAC = "Bad MAC"
FEW = 5  # pre-keys at the server below which every version hands in new ones
CREDS = "creds.json"


class Failure(NamedTuple):
    """Why a message was not decrypted.

    type, text  of the error, as in the log and in the stub
    stanza      msg, pkmsg or skmsg
    heals       whether the sender's answer to our retry receipt will be readable
    """

    type: str
    text: str
    stanza: Literal["msg", "pkmsg", "skmsg"]
    heals: bool = False


class Keys:
    """Both sides of one session."""

    def __init__(self, folder: Folder, number: str, name: str, version: Literal["6", "7"]) -> None:
        self.folder = folder
        self.number = number
        self.name = name
        self.version = version
        self.pairing: JSON | None = None  # the creds that WhatsApp knows
        self.creds: JSON | None = None  # those that the socket has in memory
        self._handed: set[int] = set()
        self._roots: dict[str, str] = {}
        self._stubborn: set[str] = set()  # contacts whom a fresh session from our side does not help
        self._senders: dict[str, str] = {}

    # The device

    def pair(self, pre_keys: int = 30) -> None:
        """Somebody scans the code: new credentials, known to both sides, and pre-keys."""
        self.folder.empty()
        creds = _creds(pre_keys + 1)
        number_lid = lid(self.number)
        creds["me"] = {"id": f"{self.number}:7@s.whatsapp.net", "lid": f"{number_lid}:7@lid", "name": self.name}
        creds["account"] = {"details": _secret(40), "accountSignature": _secret(64), "deviceSignature": _secret(64)}
        creds["platform"] = "android"
        creds["signalIdentities"] = [{"identifier": {"name": creds["me"]["id"], "deviceId": 0}}]
        self.pairing = self.creds = creds
        self.folder.put(CREDS, creds)
        self._roots.clear()
        self._senders.clear()
        self._stubborn.clear()
        self._handed = set()
        self._hand_out(range(1, pre_keys + 1))
        self.folder.put("app-state-sync-key-AAAAAC4k.json", {"keyData": _secret(32), "timestamp": "0"})
        self.folder.put("app-state-sync-version-regular.json", {"version": 3, "hash": _buffer(128)})

    def adopt(self) -> bool:
        """Take the pairing that the folder has, as after a restart of the stand-in; false when it has none."""
        self.folder.load()
        creds = self.folder.get(CREDS)
        if creds is not None and "me" in creds:
            self.pairing = creds
            for name in self.folder.names():
                number = re.fullmatch(r"pre-key-(\d+)\.json", name)
                if number is not None:
                    self._handed.add(int(number[1]))
                root = _root(self.folder.get(name)) if name.startswith("session-") else None
                if root is not None:
                    self._roots[name] = root
            if not self._handed:
                self._hand_out(range(1, 31))
        self.folder.release()
        return self.pairing is not None

    def log_in(self) -> Literal["open", "qr", "refused"]:
        """The socket starts: what its files are good for."""
        self.folder.load()
        creds = self.creds = self.folder.get(CREDS)
        if creds is None:
            self.creds = _creds(1)
            self.folder.put(CREDS, self.creds)  # over whatever was there, as the library's next save does
            return "qr"
        if "me" not in creds:
            return "qr"
        if self.pairing is None or any(
            _part(creds, *path) != _part(self.pairing, *path)
            for path in (("registrationId",), ("me", "id"), ("signedIdentityKey", "public", "data"))
        ):
            return "refused"
        missing = {n for n in self._handed if not self.folder.has(f"pre-key-{n}.json")}
        if missing and (self.version == "7" or len(self._handed - missing) < FEW):
            first = max(self._handed) + 1
            self._handed = set()
            self._hand_out(range(first, first + 30))
        return "open"

    @property
    def registration_id(self) -> int | None:
        found = _part(self.creds, "registrationId")
        return found if isinstance(found, int) else None

    # Messages

    def open(self, person: str, group: str | None = None) -> Failure | None:
        """Decrypt the next message of this person, or say why not."""
        if group is not None:
            return self._open_group(self._group_file(group, person))
        name = self._session_file(person)
        known, ours = self._roots.get(name), _root(self.folder.get(name))
        if known is None:
            return self._first(name)
        if ours is None:
            self._stubborn.discard(name)
            return Failure("SessionError", NO_RECORD, "msg", heals=self._check_first() is None)
        if ours != known:
            return Failure("SessionError", NO_MATCH, "msg")
        self._agree(name)  # the ratchet turns with each message
        return None

    def retry(self, person: str, group: str | None = None) -> Failure | None:
        """The sender answers our retry receipt with the keys in it: a new session, if it can be read."""
        if group is not None:
            self._distribute(self._group_file(group, person))
            return None
        failure = self._check_first()
        if failure is None:
            self._agree(self._session_file(person))
        return failure

    def reach(self, person: str) -> None:
        """We send something: a contact without a session gets one, by its bundle."""
        name = self._session_file(person)
        if _root(self.folder.get(name)) is None:
            self._agree(name)
            self._stubborn.discard(name)

    def refresh(self, person: str) -> None:
        """A fresh session from our side, under both of the contact's addresses."""
        for name in {self._session_file(person), *(self._session_file(form) for form in _forms(person))}:
            if name in self._stubborn or not self._signed_key_is_served():
                continue
            if name in self._roots or self.folder.has(name) or name == self._session_file(person):
                self._agree(name)

    def know(self, person: str) -> None:
        """A contact of old."""
        self._agree(self._session_file(person))

    # What breaks, as by a crash or an old copy

    def break_ratchet(self, person: str, *, stubborn: bool = False) -> None:
        """The contact's side has gone on without us."""
        name = self._session_file(person)
        self._agree(name)
        self._roots[name] = secrets.token_hex(32)
        if stubborn:
            self._stubborn.add(name)

    def break_sender_key(self, group: str, person: str) -> None:
        name = self._group_file(group, person)
        self._distribute(name)
        self._senders[name] = secrets.token_hex(32)

    def forget(self, person: str) -> None:
        """Our record of a contact is gone."""
        self.know(person)
        self.folder.drop(self._session_file(person))

    def lose_pre_keys(self) -> None:
        for n in self._handed:
            self.folder.drop(f"pre-key-{n}.json")

    def lose_identity(self) -> None:
        """The credentials are from another state of the same pairing: their signed pre-key is not the served one."""
        if self.creds is not None:
            self.creds = {**self.creds, "signedPreKey": _signed_key(2)}
            self.folder.put(CREDS, self.creds)

    def spoil_creds(self, how: Literal["creds_truncated", "creds_empty", "creds_missing"]) -> None:
        """What a crash leaves of the credentials; a socket that lives does not see it."""
        if how == "creds_missing":
            self.folder.drop(CREDS)
            return
        raw = (self.folder.path / CREDS).read_bytes()
        self.folder.write(CREDS, raw[: len(raw) // 2] if how == "creds_truncated" else b"")

    # Names

    def _session_file(self, person: str) -> str:
        user, _, server = person.partition("@")
        mark = "_1" if server == "lid" and self.version == "7" else ""
        return f"session-{escaped(user)}{mark}.0.json"

    @staticmethod
    def _group_file(group: str, person: str) -> str:
        user, _, server = person.partition("@")
        return f"sender-key-{escaped(group)}--{escaped(user)}{'_1' if server == 'lid' else ''}--0.json"

    # Both sides agree

    def _agree(self, name: str) -> None:
        root = self._roots[name] = secrets.token_hex(32)
        self.folder.put(name, _session(root, self.registration_id or 0))

    def _distribute(self, name: str) -> None:
        seed = self._senders[name] = secrets.token_hex(32)
        self.folder.put(
            name, {"senderKeyStates": [{"senderKeyId": 1, "senderChainKey": {"iteration": 0, "seed": seed}}]}
        )

    def _open_group(self, name: str) -> Failure | None:
        known = self._senders.get(name)
        record = self.folder.get(name)
        if known is None:
            self._distribute(name)
            return None
        ours = _part(record, "senderKeyStates", 0, "senderChainKey", "seed")
        if ours == known:
            return None
        return Failure("Error", NO_SENDER_KEY, "skmsg", heals=record is None)

    def _first(self, name: str) -> Failure | None:
        """The first message of somebody new."""
        failure = self._check_first()
        if failure is not None:
            return failure
        used = min(self._handed)
        self._handed.discard(used)
        self.folder.drop(f"pre-key-{used}.json")
        if len(self._handed) < FEW:
            first = max(self._handed, default=used) + 1
            self._hand_out(range(first, first + 30))
        self._agree(name)
        return None

    def _check_first(self) -> Failure | None:
        """Whether a first message can be read."""
        if not all(self.folder.has(f"pre-key-{n}.json") for n in sorted(self._handed)[:1]):
            return Failure("PreKeyError", BAD_PRE_KEY, "pkmsg")
        if not self._signed_key_is_served():
            return Failure("Error", BAD_MAC, "pkmsg")
        return None

    def _signed_key_is_served(self) -> bool:
        path = ("signedPreKey", "keyPair", "public", "data")
        return bool(_part(self.creds, *path) == _part(self.pairing, *path))

    def _hand_out(self, numbers: range) -> None:
        for n in numbers:
            self.folder.put(f"pre-key-{n}.json", {"private": _buffer(32), "public": _buffer(33)})
        self._handed.update(numbers)


def _forms(person: str) -> list[str]:
    """A contact's hidden address, when this is the phone number."""
    user, _, server = person.partition("@")
    return [f"{lid(user)}@lid"] if server == "s.whatsapp.net" else []


def _part(value: object, *path: str | int) -> object:
    for step in path:
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            return None
    return value


def _root(record: JSON | None) -> str | None:
    """Of the one open entry."""
    for entry in (record or {}).get("_sessions", {}).values():
        if _part(entry, "indexInfo", "closed") == -1:
            found = _part(entry, "currentRatchet", "rootKey")
            return found if isinstance(found, str) else None
    return None


def _session(root: str, registration_id: int) -> JSON:
    now = int(time.time() * 1000)
    base = _secret(33)
    pair = {"pubKey": _secret(33), "privKey": _secret(32)}
    ratchet = {
        "ephemeralKeyPair": pair,
        "lastRemoteEphemeralKey": _secret(33),
        "previousCounter": 0,
        "rootKey": root,
    }
    index = {"baseKey": base, "baseKeyType": 2, "closed": -1, "used": now, "created": now}
    index["remoteIdentityKey"] = _secret(33)
    entry = {"registrationId": registration_id, "currentRatchet": ratchet, "indexInfo": index, "_chains": {}}
    return {"_sessions": {base: entry}, "version": "v1"}


def _creds(next_pre_key: int) -> JSON:
    return {
        "noiseKey": _pair(),
        "pairingEphemeralKeyPair": _pair(),
        "signedIdentityKey": _pair(),
        "signedPreKey": _signed_key(1),
        "registrationId": secrets.randbelow(16_380) + 1,
        "advSecretKey": _secret(32),
        "processedHistoryMessages": [],
        "nextPreKeyId": next_pre_key,
        "firstUnuploadedPreKeyId": next_pre_key,
        "accountSyncCounter": 0,
        "accountSettings": {"unarchiveChats": False},
        "registered": False,
    }


def _signed_key(id: int) -> JSON:
    return {"keyPair": _pair(), "signature": _buffer(64), "keyId": id}


def _pair() -> JSON:
    return {"private": _buffer(32), "public": _buffer(32)}


def _buffer(size: int) -> JSON:
    return buffer(secrets.token_bytes(size))


def _secret(size: int) -> str:
    data: str = _buffer(size)["data"]
    return data
