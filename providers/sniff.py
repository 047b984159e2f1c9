"""What a file is, by its first bytes: a table of signatures of our own (security-reliability.md M7, M8).

Each is looked for at its one place, so a file that is two things at once is what its very beginning says. What a
browser could run (HTML, SVG, XML) is named as that, whatever the sender calls it, and never gets an ending by which a
server would hand it out as such. Nothing here fails: what is not known is `application/octet-stream`.
"""

import codecs
import re
import struct
from itertools import islice

UNKNOWN = "application/octet-stream"

_HEAD = 8 * 1024

_WORD = "application/vnd.openxmlformats-officedocument.wordprocessingml"
_EXCEL = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_POWERPOINT = "application/vnd.openxmlformats-officedocument.presentationml"
_OLE = "application/x-ole-storage"  # an Office file of before 2007 whose directory of contents lies further on

_ENDINGS = {
    "image/jpeg": ".jpg",
    "image/png": ".png",
    "image/webp": ".webp",
    "image/gif": ".gif",
    "image/heic": ".heic",
    "image/avif": ".avif",
    "video/mp4": ".mp4",
    "video/3gpp": ".3gp",
    "video/3gpp2": ".3g2",
    "video/quicktime": ".mov",
    "video/webm": ".webm",
    "video/x-matroska": ".mkv",
    "video/ogg": ".ogv",
    "audio/ogg": ".ogg",
    "audio/mpeg": ".mp3",
    "audio/aac": ".aac",
    "audio/amr": ".amr",
    "audio/amr-wb": ".awb",
    "audio/mp4": ".m4a",
    "audio/wav": ".wav",
    "audio/flac": ".flac",
    "application/pdf": ".pdf",
    "application/msword": ".doc",
    "application/vnd.ms-excel": ".xls",
    "application/vnd.ms-powerpoint": ".ppt",
    f"{_WORD}.document": ".docx",
    f"{_EXCEL}.sheet": ".xlsx",
    f"{_POWERPOINT}.presentation": ".pptx",
    "application/zip": ".zip",
    "application/rtf": ".rtf",
    "text/plain": ".txt",
}


def sniff(head: bytes) -> str:
    """The type of a file that begins with these bytes; no more than the first 8 KiB count."""
    head = head[:_HEAD]
    return _of_bytes(head) or _of_text(head) or UNKNOWN


def extension(mime_type: str) -> str:
    """The ending for a sniffed type, with its dot. `.bin` for what is unknown, and for all that a browser could run."""
    return _ENDINGS.get(mime_type, ".bin")


def agrees(claimed: str | None, found: str) -> bool:
    """Whether the type that a sender claims and the one that was sniffed can be the same file's."""
    said = (claimed or "").partition(";")[0].strip().lower()
    said = _SAME.get(said, said)
    if not said or said in (UNKNOWN, found):
        return True
    if found == UNKNOWN:
        return said not in _SIGNED
    if any(said in family and found in family for family in _FAMILIES):
        return True
    rule = _ALSO.get(found)
    return rule is not None and rule.fullmatch(said) is not None


# ----------------------------------------------------------------------------------------------- what claims may mean

# Other names of the same.
_SAME = {
    "application/x-binary": UNKNOWN,
    "application/binary": UNKNOWN,
    "binary/octet-stream": UNKNOWN,
    "image/jpg": "image/jpeg",
    "image/pjpeg": "image/jpeg",
    "image/x-png": "image/png",
    "image/heif": "image/heic",
    "audio/mp3": "audio/mpeg",
    "audio/x-mp3": "audio/mpeg",
    "audio/x-mpeg": "audio/mpeg",
    "audio/mpeg3": "audio/mpeg",
    "audio/aacp": "audio/aac",
    "audio/x-aac": "audio/aac",
    "audio/x-hx-aac-adts": "audio/aac",
    "audio/amr-nb": "audio/amr",
    "audio/m4a": "audio/mp4",
    "audio/x-m4a": "audio/mp4",
    "audio/mp4a-latm": "audio/mp4",
    "video/x-m4v": "video/mp4",
    "video/3gp": "video/3gpp",
    "audio/opus": "audio/ogg",
    "audio/vorbis": "audio/ogg",
    "audio/x-wav": "audio/wav",
    "audio/wave": "audio/wav",
    "audio/vnd.wave": "audio/wav",
    "audio/x-flac": "audio/flac",
    "application/x-pdf": "application/pdf",
    "application/x-zip": "application/zip",
    "application/x-zip-compressed": "application/zip",
    "application/x-rtf": "application/rtf",
    "text/rtf": "application/rtf",
    "text/xml": "application/xml",
}

# Types that a signature does not tell apart with certainty: one container, or one kind of text.
_FAMILIES = (
    {"video/mp4", "audio/mp4", "video/3gpp", "audio/3gpp", "video/3gpp2", "audio/3gpp2", "video/quicktime"},
    {"video/webm", "audio/webm", "video/x-matroska", "audio/x-matroska"},
    {"audio/ogg", "application/ogg"},
    {"video/ogg", "application/ogg"},
    {"text/html", "application/xhtml+xml"},
)

# What else may be claimed of a found type.
_ALSO = {
    # Windows with Excel calls a CSV file an Excel one.
    "text/plain": re.compile(
        r"text/(?!html$).*|message/rfc822|.*\+json"
        r"|application/(json|x-ndjson|javascript|ecmascript|sql|x-sh|x-yaml|yaml|toml|x-subrip|csv|vnd\.ms-excel)"
    ),
    "application/xml": re.compile(r".*\+xml|text/plain"),
    "application/zip": re.compile(
        r"application/(vnd\.openxmlformats-officedocument\..*|vnd\.ms-.*macroenabled\.12|vnd\.oasis\.opendocument\..*"
        r"|vnd\.android\.package-archive|java-archive|x-java-archive|epub\+zip|.*\+zip|vnd\.apple\.\w+"
        r"|vnd\.google-earth\.kmz|x-xpinstall|vnd\.ms-xpsdocument|oxps)"
    ),
    f"{_WORD}.document": re.compile(
        r"application/(zip|vnd\.ms-word\..*macroenabled\.12|vnd\.openxmlformats-officedocument\.wordprocessingml\..*)"
    ),
    f"{_EXCEL}.sheet": re.compile(
        r"application/(zip|vnd\.ms-excel\..*macroenabled\.12|vnd\.openxmlformats-officedocument\.spreadsheetml\..*)"
    ),
    f"{_POWERPOINT}.presentation": re.compile(
        r"application/(zip|vnd\.ms-powerpoint\..*macroenabled\.12"
        r"|vnd\.openxmlformats-officedocument\.presentationml\..*)"
    ),
    _OLE: re.compile(
        r"application/(msword|vnd\.ms-(excel|powerpoint|office|outlook|project|publisher|works)|vnd\.visio|x-msi)"
    ),
}

# What could not be missed if it were that. Not text; and not what begins in more ways than the table knows.
_SIGNED = frozenset(_ENDINGS) - {"text/plain", "image/heic", "image/avif"} | {
    "audio/3gpp",
    "audio/3gpp2",
    "audio/webm",
    "application/ogg",
}


# ------------------------------------------------------------------------------------------------------ binary files


def _of_bytes(head: bytes) -> str | None:
    for signature, found in _SIGNATURES:
        if head.startswith(signature):
            return found
    if head[:4] == b"RIFF":
        return {b"WEBP": "image/webp", b"WAVE": "audio/wav"}.get(head[8:12])
    if head[4:8] == b"ftyp":
        return _of_boxes(head)
    if head[:4] == b"OggS":
        return _of_ogg(head)
    if head[:4] == b"\x1aE\xdf\xa3":
        return _of_matroska(head)
    if head[:8] == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1":
        return _of_ole(head)
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _of_zip(head)
    if head[:3] == b"ID3":
        is_tag = len(head) >= 10 and head[3] in (2, 3, 4) and head[4] != 0xFF and max(head[6:10]) < 0x80
        return "audio/mpeg" if is_tag else None
    return _of_frames(head)


_SIGNATURES = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"%PDF-", "application/pdf"),
    (b"#!AMR\n", "audio/amr"),
    (b"#!AMR-WB\n", "audio/amr-wb"),
    (b"fLaC", "audio/flac"),
    (b"{\\rtf", "application/rtf"),
)


def _of_boxes(head: bytes) -> str | None:
    """MP4 and its kin: the first box names a brand, and others that the file conforms to (ISO/IEC 14496-12)."""
    length = int.from_bytes(head[:4])
    if not 16 <= length <= 4096 or length % 4:
        return None
    box = head[:length]
    brands = [box[8:12], *(box[n : n + 4] for n in range(16, len(box), 4))]
    for brand in brands:
        for pattern, found in _BRANDS:
            if pattern.fullmatch(brand):
                return found
    return None


_BRANDS = (
    (re.compile(rb"M4[ABP] |F4[AB] "), "audio/mp4"),
    (re.compile(rb"3g2.|KDDI"), "video/3gpp2"),
    (re.compile(rb"3g[a-z][0-9a-z]"), "video/3gpp"),
    (re.compile(rb"qt  "), "video/quicktime"),
    (re.compile(rb"hei[cxms]|hev[cxms]"), "image/heic"),
    (re.compile(rb"avi[fs]"), "image/avif"),
    (re.compile(rb"iso[m2-9]|mp4[12]|avc1|M4V.|f4v |F4V |dash|MSNV|mmp4|mp71|ND..|XAVC|hvc1|cmf."), "video/mp4"),
)


def _of_ogg(head: bytes) -> str | None:
    """The first packet of the first page names the codec (RFC 3533 §6)."""
    if len(head) < 28 or head[4] != 0:
        return None
    packet = head[27 + head[26] :]
    if packet.startswith((b"OpusHead", b"\x01vorbis", b"Speex   ", b"\x7fFLAC")):
        return "audio/ogg"
    return "video/ogg" if packet.startswith(b"\x80theora") else "application/ogg"


def _of_matroska(head: bytes) -> str | None:
    """The document type is an element of the first header (RFC 8794 §11.2.5)."""
    found = re.search(rb"\x42\x82[\x84\x88](webm|matroska)", head[:64])
    if found is None:
        return None
    return "video/webm" if found[1] == b"webm" else "video/x-matroska"


def _of_ole(head: bytes) -> str:
    """Names in the directory of an OLE file tell its program; the header says where that is (MS-CFB §2.2, §2.6)."""
    if len(head) < 512:
        return _OLE
    power, first = struct.unpack_from("<H", head, 0x1E)[0], struct.unpack_from("<I", head, 0x30)[0]
    if power not in (9, 12):
        return _OLE
    start = (first + 1) << power
    for at in range(start, min(start + (1 << power), len(head) - 127), 128):
        length = min(int.from_bytes(head[at + 64 : at + 66], "little"), 64)
        name = head[at : at + length].decode("utf-16-le", "replace").rstrip("\0")
        if name in _PROGRAMS:
            return _PROGRAMS[name]
    return _OLE


_PROGRAMS = {
    "WordDocument": "application/msword",
    "Workbook": "application/vnd.ms-excel",
    "Book": "application/vnd.ms-excel",
    "PowerPoint Document": "application/vnd.ms-powerpoint",
}


def _of_zip(head: bytes) -> str:
    """Office files of today are ZIPs in which one folder tells the program (ECMA-376-2)."""
    names = [
        head[found.end() + 26 : found.end() + 26 + int.from_bytes(head[found.end() + 22 : found.end() + 24], "little")]
        for found in islice(re.finditer(rb"PK\x03\x04", head), 64)
    ]
    if not names or not names[0].startswith(_OFFICE):
        return "application/zip"
    programs = {found for start, found in _PARTS if any(name.startswith(start) for name in names)}
    return programs.pop() if len(programs) == 1 else "application/zip"


_PARTS = (
    (b"word/", f"{_WORD}.document"),
    (b"xl/", f"{_EXCEL}.sheet"),
    (b"ppt/", f"{_POWERPOINT}.presentation"),
)
# One of these comes first in an Office file, and hardly in an archive that somebody packed.
_OFFICE = (b"[Content_Types].xml", b"_rels/", b"docProps/", b"customXml/", *(start for start, _ in _PARTS))


def _of_frames(head: bytes) -> str | None:
    """Sound without a header: its first frame, and where the second begins if that is still in sight."""
    if len(head) < 7 or head[0] != 0xFF:
        return None
    if head[1] & 0xF6 == 0xF0:  # ADTS: ISO/IEC 13818-7 §6.2
        length = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
        is_frame = (head[2] >> 2 & 15) < 13 and length >= 7
        return "audio/aac" if is_frame and _same_sync(head, length, 0xF6) else None
    if head[1] & 0xE6 != 0xE2 or head[1] & 0x18 == 0x08:  # layer III, of a version that there is
        return None
    is_first = head[1] & 0x18 == 0x18
    rates = _RATES_1 if is_first else _RATES_2
    rate, samples = head[2] >> 4, head[2] >> 2 & 3
    if not 0 < rate < 15 or samples == 3:
        return None
    frequency = (44_100, 48_000, 32_000)[samples] // {0x18: 1, 0x10: 2, 0x00: 4}[head[1] & 0x18]
    length = (144 if is_first else 72) * rates[rate - 1] * 1000 // frequency + (head[2] >> 1 & 1)
    return "audio/mpeg" if _same_sync(head, length, 0xFE) else None


_RATES_1 = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_RATES_2 = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


def _same_sync(head: bytes, at: int, mask: int) -> bool:
    return len(head) < at + 2 or (head[at] == 0xFF and head[at + 1] & mask == head[1] & mask)


# -------------------------------------------------------------------------------------------------------------- text


def _of_text(head: bytes) -> str | None:
    text, is_text = _decoded(head)
    body = text.lstrip("\ufeff \t\r\n\f")
    if not re.match(r"<[A-Za-z_!?/]", body):
        return "text/plain" if is_text else None
    # Comments, instructions and the document type come before the first element, which decides.
    is_xml = body.startswith("<?xml")
    while found := _BEFORE.match(body):
        if kind := re.match(r"<!doctype\s+(?:\w+:)?(\w+)", found[0], re.IGNORECASE):
            return _of_element(kind[1], is_xml=is_xml, is_text=is_text or is_xml)
        body = body[found.end() :]
    element = re.match(r"</?(?:[\w.-]+:)?([\w.-]+)", body)
    if element is None:  # it comes too late to be seen
        return "application/xml" if is_xml else "text/html"
    return _of_element(element[1], is_xml=is_xml, is_text=is_text or is_xml)


# Whatever ends too late to be seen ends with the head.
_BEFORE = re.compile(r"(?:<!--.*?(?:-->|\Z)|<\?.*?(?:\?>|\Z)|<![^-].*?(?:>|\Z))[\s\ufeff]*", re.DOTALL)


def _of_element(name: str, *, is_xml: bool, is_text: bool) -> str | None:
    name = name.lower()
    if name == "svg":
        return "image/svg+xml"
    if name == "html" and is_xml:
        return "application/xhtml+xml"
    if name in _HTML and not is_xml:
        return "text/html"
    return "application/xml" if is_text else None


_ELEMENTS = (
    "a abbr acronym address applet area article aside audio b base basefont bdi bdo bgsound big blink blockquote body "
    "br button canvas caption center cite code col colgroup command data datalist dd del details dfn dialog dir div dl "
    "dt em embed fieldset figcaption figure font footer form frame frameset h1 h2 h3 h4 h5 h6 head header hgroup hr "
    "html i iframe image img input ins isindex kbd keygen label layer legend li link listing main map mark marquee "
    "math menu meta meter nav nobr noembed noframes noscript object ol optgroup option output p param picture "
    "plaintext portal pre progress q rb rp rt rtc ruby s samp script search section select slot small source span "
    "strike strong style sub summary sup table tbody td template textarea tfoot th thead time title tr track tt u ul "
    "var video wbr xmp"
)
_HTML = frozenset(_ELEMENTS.split())


def _decoded(head: bytes) -> tuple[str, bool]:
    """These bytes as text, and whether they are that indeed: UTF-8, or UTF-16 with its mark, no control characters.

    The rest is given as Latin-1, because a browser takes HTML for HTML whatever follows its first tag.
    """
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    try:
        # Not final: a character may be cut at the end of the head.
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return head.removeprefix(codecs.BOM_UTF8).decode("latin-1"), False
    return text, bool(text) and not re.search(r"[\0-\x08\x0b\x0e-\x1a\x1c-\x1f]", text)
