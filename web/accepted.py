"""What a file must be to be sent: types and sizes are the provider's, which would refuse it hours later.

Looks at bytes as they come, and knows neither requests nor the storage (whatsapp-cloud-api.md §12).
"""

import codecs

from providers.media import HEAD
from providers.sniff import UNKNOWN, agrees, sniff
from web.refusals import wrong

KiB, MiB = 1024, 1024 * 1024
_OFFICE = "application/vnd.openxmlformats-officedocument."
TYPES: dict[str, tuple[str, ...]] = {
    "audio": ("audio/aac", "audio/amr", "audio/mpeg", "audio/mp4", "audio/ogg"),
    "document": (
        "text/plain",
        "application/pdf",
        "application/msword",
        f"{_OFFICE}wordprocessingml.document",
        "application/vnd.ms-excel",
        f"{_OFFICE}spreadsheetml.sheet",
        "application/vnd.ms-powerpoint",
        f"{_OFFICE}presentationml.presentation",
    ),
    "image": ("image/jpeg", "image/png"),
    "sticker": ("image/webp",),
    "video": ("video/mp4", "video/3gpp"),
}
KINDS = {mime_type: kind for kind, its_types in TYPES.items() for mime_type in its_types}
MOST_BYTES = 100 * MiB
# A sticker that moves; whether it does, only its bytes say.
MOST_BYTES_OF = {"audio": 16 * MiB, "document": MOST_BYTES, "image": 5 * MiB, "sticker": 500 * KiB, "video": 16 * MiB}
_MOST_BYTES_STILL = 100 * KiB  # of a sticker that does not move
_STICKER = (512, 512)  # pixels
# Here the first bytes do not always tell the program: what the sender claims decides among those that it can be.
CONTAINERS = ("application/zip", "application/x-ole-storage")


class Checked:
    """A file that is looked at while it comes. `mime_type` and `kind` are known after the first piece."""

    def __init__(self, claimed: str | None) -> None:
        """`claimed`: the type that the sender gives, if any."""
        self._claimed = claimed
        self._head = b""
        self._text = codecs.getincrementaldecoder("utf-8")()
        self.size = 0
        self.mime_type = self.kind = ""

    def see(self, piece: bytes, *, is_last: bool) -> None:
        """The next bytes; the first piece has at least `HEAD` of them, unless it is the last. Raises `Failure`."""
        is_first = self.size == 0
        self.size += len(piece)
        if self.size == 0:
            raise wrong("body", "is empty")
        if is_first:
            self._head = piece[:HEAD]
            self._find_type()
        most = self._most_bytes()
        if self.size > most:
            raise wrong("body", f"must have at most {most} bytes, as {self.mime_type}", most)
        if self.mime_type == "text/plain":
            self._check_text(piece, is_last)

    def _find_type(self) -> None:
        found = sniff(self._head)
        if not agrees(self._claimed, found):
            raise wrong("Content-Type", f"does not fit the bytes, which are {found}")
        said = (self._claimed or "").partition(";")[0].strip().lower()
        self.mime_type = said if found in CONTAINERS and said in KINDS else found
        if found == UNKNOWN and said == "text/plain":
            raise wrong("body", "must be UTF-8 without NUL characters, as text/plain")
        if self.mime_type not in KINDS:
            raise wrong("body", f"must be one of {', '.join(KINDS)}", list(KINDS))
        self.kind = KINDS[self.mime_type]
        if self.kind == "sticker" and _pixels(self._head) != _STICKER:
            raise wrong("body", "must be 512 pixels wide and high, as a sticker", 512)
        if self.mime_type == "audio/ogg" and not _is_opus(self._head):
            raise wrong("body", "must be Opus with one channel, as audio/ogg")

    def _most_bytes(self) -> int:
        is_still = self.kind == "sticker" and not _moves(self._head)
        return _MOST_BYTES_STILL if is_still else MOST_BYTES_OF[self.kind]

    def _check_text(self, piece: bytes, is_last: bool) -> None:
        try:
            self._text.decode(piece, is_last)
        except UnicodeDecodeError:
            raise wrong("body", "must be UTF-8, as text/plain") from None
        if b"\0" in piece:
            raise wrong("body", "must not have NUL characters, as text/plain")


def _pixels(head: bytes) -> tuple[int, int]:
    """Width and height of a WebP; zeros when it does not say (RFC 9649 §2.5 to §2.7)."""
    match head[12:16]:
        case b"VP8X":
            return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
        case b"VP8L" if head[20:21] == b"\x2f":
            bits = int.from_bytes(head[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 " if head[23:26] == b"\x9d\x01\x2a":
            return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    return 0, 0


def _moves(head: bytes) -> bool:
    return head[12:16] == b"VP8X" and bool(head[20] & 0x02)


def _is_opus(head: bytes) -> bool:
    """The first packet of the first page says codec and channels (RFC 7845 §5.1)."""
    packet = head[27 + head[26] :] if len(head) > 27 else b""
    return packet[:8] == b"OpusHead" and packet[9:10] == b"\x01"
