"""`Content-Disposition` for a file whose name a stranger chose: the name is data, and told so that it harms nobody.

RFC 6266, and security-reliability.md M7.
"""

import re
import unicodedata
from urllib.parse import quote

# What a browser may show in place: pictures, sound and moving pictures, nothing that could hold a script or a link.
INLINE = frozenset(
    {
        "image/jpeg", "image/png", "image/webp", "image/gif",
        "audio/aac", "audio/amr", "audio/mpeg", "audio/mp4", "audio/ogg",
        "video/mp4", "video/3gpp",
    }
)  # fmt: skip
# Endings that say the same as the one we would give.
_ALIKE = {
    ".jpg": (".jpeg", ".jpe", ".jfif"),
    ".ogg": (".oga", ".opus"),
    ".mp4": (".m4v",),
    ".3gp": (".3gpp",),
    ".txt": (".csv", ".log"),
    ".zip": (".docx", ".xlsx", ".pptx"),  # each of them is one
}
_MOST = 100  # characters before the ending
_WORTHLESS = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}  # control, invisible and right-to-left signs; half characters
_PATH = re.compile(r"[/\\]")
_SPECIAL = re.compile(r'[<>:"|?*\u2044\u2215\u29f5\u29f8\uff0f\uff3c]')  # to a file system, or to who looks at it
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|\Z)", re.IGNORECASE)
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9 ._()-]")


def disposition(name: str | None, mime_type: str, extension: str) -> str:
    """The header's value: the name twice, for old readers and for new ones. `mime_type` and `extension` are those
    that the bytes tell."""
    how = "inline" if mime_type in INLINE else "attachment"
    safe = harmless(name or "", extension)
    bare = "".join(sign for sign in unicodedata.normalize("NFD", safe) if unicodedata.category(sign) != "Mn")
    return f"{how}; filename=\"{_NOT_PLAIN.sub('_', bare)}\"; filename*=UTF-8''{quote(safe, safe='')}"


def harmless(name: str, extension: str) -> str:
    """A name that any file system can take, in any folder: one part, of bounded length, which ends as its bytes do."""
    last = _PATH.split(name.rstrip("/\\"))[-1]
    seen = "".join(sign for sign in last if sign.isspace() or unicodedata.category(sign) not in _WORTHLESS)
    clean = _SPECIAL.sub("_", " ".join(unicodedata.normalize("NFC", seen).split())).strip(". ")
    stem, dot, ending = clean.rpartition(".")
    given = f".{ending}"
    if not stem or not dot or given.lower() not in (extension, *_ALIKE.get(extension, ())):
        stem, given = clean, extension
    stem = stem[:_MOST].strip(". ") or "file"
    return f"{'_' if _DEVICE.match(stem) else ''}{stem}{given}"
