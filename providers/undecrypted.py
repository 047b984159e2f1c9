"""Why a Baileys gateway could not decrypt a message, in a closed list of causes (baileys-sessions.md §1, the table).

The same texts stand in a log record's `err.message` and in `messageStubParameters[0]` of a stub that a webhook brings.
"""

from enum import StrEnum


class Cause(StrEnum):
    """Labels a metric and names the class of a `session_error`; the texts it stands for are in `cause_of`."""

    RATCHET = "ratchet"  # the two sides' keys for one contact went apart
    AHEAD = "ahead"  # … by more than two thousand messages
    PREKEY = "prekey"  # a one-time pre-key that we no longer hold
    IDENTITY = "identity"  # a first message that our signed pre-key does not open: credentials of another state
    NO_SESSION = "no_session"  # no record of this contact
    SENDER_KEY = "sender_key"  # of a group's participant
    OTHER = "other"  # a text that we do not know
    WEAK = "weak"  # one of the phrases in a log, and no message that it is of
    DUPLICATE = "duplicate"  # delivered twice: nothing is lost
    ABSENT = "absent"  # the server sent nothing to decrypt


BENIGN = frozenset({Cause.DUPLICATE, Cause.ABSENT})  # never counted: no message is missing

# By what the text begins with, in lower case.
_TEXTS = (
    ("no matching sessions found for message", Cause.RATCHET),
    ("over 2000 messages into the future", Cause.AHEAD),
    ("bad mac", Cause.IDENTITY),
    ("invalid prekey id", Cause.PREKEY),
    ("missing signedprekey", Cause.PREKEY),
    ("no session record", Cause.NO_SESSION),
    ("no sessions", Cause.NO_SESSION),
    ("no open session", Cause.NO_SESSION),
    ("no session found to decrypt message", Cause.SENDER_KEY),
    ("no senderkeyrecord found", Cause.SENDER_KEY),
    ("invalidmessageexception", Cause.SENDER_KEY),
    ("invalid signature", Cause.SENDER_KEY),
    ("received message with old counter", Cause.DUPLICATE),
    ("key used already or never filled", Cause.DUPLICATE),
    ("message absent from node", Cause.ABSENT),
)


def cause_of(text: str) -> Cause:
    """The cause that an error's text names; `OTHER` for one that nobody has seen yet."""
    said = text.strip().lower()
    return next((cause for start, cause in _TEXTS if said.startswith(start)), Cause.OTHER)
