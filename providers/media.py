"""The plain values of fetching a file, the same for every provider: where it comes from, and why it did not come.

Each kind of channel brings a `Source`: Meta's is in `providers/graph_media.py`, a file behind a link in
`providers/link.py`. What happens to the bytes afterwards is the same for all (`workers/download_media.py`).
"""

import base64
import binascii
import re
from typing import NamedTuple, Protocol

HEAD = 8 * 1024  # bytes kept of a file's beginning, to tell its type by


class MediaFault(Exception):
    """Why a file did not come, or is not taken.

    `code` is one of a closed set (it labels a metric), `text` is for the tenant and names no host, id or URL.
    `is_final`: another try cannot help. `wait`: seconds the other side wants to be left alone, 0 when it does not say.
    """

    def __init__(self, code: str, text: str, *, is_final: bool = False, wait: float = 0.0) -> None:
        super().__init__(f"{code}: {text}")
        self.code, self.text, self.is_final, self.wait = code, text, is_final, wait


# What says nothing about the file, but that its host is in trouble.
OF_THE_HOST = frozenset({"timeout", "unreachable", "provider_error"})

# What `code` may be.
FAULTS = frozenset(
    {
        "blocked_address",  # the link leads to an address that is not public
        "too_large",  # more than the limit of its kind
        "encoded",  # with a content-encoding, which may hide a bomb
        "wrong_hash",
        "wrong_size",
        "timeout",
        "cut_short",  # the connection ended before the file did
        "not_found",
        "gone",  # the provider does not know its id: forgotten, or another account's
        "expired",  # its deadline has passed
        "refused",  # the token or the account
        "rejected",  # the provider understands the question, and has no file for an answer
        "throttled",
        "redirect",
        "foreign_host",  # the provider names a host that may not see its token
        "provider_error",
        "unreachable",
        "paused",  # its host did not answer several times in a row, and is left alone for a while
        "storage_unavailable",
        "quota_reached",
        "no_token",
        "misconfigured",  # our own settings; the operator's log says what
        "crashed",  # its download ended several processes
        "stopping",  # its worker was asked to end, and gave it back
        "internal",
    }
)


class Sink(Protocol):
    """Where the bytes go."""

    def write(self, chunk: bytes) -> object: ...


class Received(NamedTuple):
    """A file that came whole; `digest` is its SHA-256 (32 bytes), `head` its first `HEAD` bytes."""

    size: int  # in bytes
    digest: bytes
    head: bytes
    content_type: str | None


class Source(Protocol):
    """Where one file can be fetched; `host` is whom to leave alone when nothing answers."""

    host: str

    def fetch(self, into: Sink, most_bytes: int) -> Received:
        """Write the whole file, checked against what is claimed of it. Raises `MediaFault`, and `into`'s errors."""


def digest_of(claimed: str | None) -> bytes | None:
    """A SHA-256 as providers write it: base64 in a webhook, hex in an answer (whatsapp-cloud-api.md §12). None when it
    is neither."""
    given = (claimed or "").strip()
    if re.fullmatch(r"[0-9A-Fa-f]{64}", given):
        return bytes.fromhex(given)
    try:
        decoded = base64.b64decode(given, validate=True)
    except (binascii.Error, ValueError):
        return None
    return decoded if len(decoded) == 32 else None
