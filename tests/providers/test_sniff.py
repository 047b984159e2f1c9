"""What a file is by its first bytes, and whether that is what its sender said."""

import io
import struct
import zipfile

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from providers import sniff as module
from providers.sniff import agrees, extension, sniff

OCTETS = "application/octet-stream"
OOXML = "application/vnd.openxmlformats-officedocument"
DOCX, XLSX, PPTX = (
    f"{OOXML}.{end}" for end in ("wordprocessingml.document", "spreadsheetml.sheet", "presentationml.presentation")
)


def boxes(major: bytes, *others: bytes) -> bytes:
    body = b"ftyp" + major + bytes(4) + b"".join(others)
    return struct.pack(">I", len(body) + 4) + body + struct.pack(">I", 8) + b"free"


def ogg(packet: bytes) -> bytes:
    return b"OggS\0\x02" + bytes(20) + b"\x01" + bytes([len(packet)]) + packet


def frames(header: bytes, length: int, count: int = 3) -> bytes:
    return (header + bytes(length - len(header))) * count


def adts(length: int = 371) -> bytes:
    return frames(
        bytes([0xFF, 0xF1, 0x50, 0x80 | length >> 11, length >> 3 & 255, (length & 7) << 5 | 31, 0xFC]), length
    )


def zipped(*names: str, stored: bool = False) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, f"<x>{name}</x>" * 5)
    return made.getvalue()


def ole(*names: str, sector: int = 0, first: int | None = None) -> bytes:
    """An OLE file whose directory is in this sector."""
    header = bytearray(512)
    header[:8] = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
    struct.pack_into("<H", header, 0x1E, 9)
    struct.pack_into("<I", header, 0x30, sector if first is None else first)
    entries = b""
    for name in ("Root Entry", *names):
        raw = (name + "\0").encode("utf-16-le")
        entries += raw.ljust(64, b"\0") + struct.pack("<H", len(raw)) + bytes(62)
    return bytes(header) + bytes(512 * sector) + entries.ljust(512, b"\0")


WORD = ("[Content_Types].xml", "_rels/.rels", "word/document.xml")
SVG = "<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"

FILES: dict[str, tuple[bytes, str, str]] = {
    "jpeg": (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "image/jpeg", ".jpg"),
    "jpeg, exif": (b"\xff\xd8\xff\xe1\0\x10Exif\0", "image/jpeg", ".jpg"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "image/png", ".png"),
    "webp": (b"RIFF\x24\0\0\0WEBPVP8 ", "image/webp", ".webp"),
    "gif 87": (b"GIF87a\x01\0", "image/gif", ".gif"),
    "gif 89": (b"GIF89a\x01\0", "image/gif", ".gif"),
    "heic": (boxes(b"mif1", b"mif1", b"heic"), "image/heic", ".heic"),
    "avif": (boxes(b"avif", b"mif1"), "image/avif", ".avif"),
    "mp4": (boxes(b"isom", b"isom", b"iso2", b"avc1", b"mp41"), "video/mp4", ".mp4"),
    "mp4 of an unknown brand": (boxes(b"XYZ1", b"mp42"), "video/mp4", ".mp4"),
    "3gp": (boxes(b"3gp4", b"isom"), "video/3gpp", ".3gp"),
    "3g2": (boxes(b"3g2a"), "video/3gpp2", ".3g2"),
    "mov": (boxes(b"qt  ", b"qt  "), "video/quicktime", ".mov"),
    "m4a": (boxes(b"M4A ", b"mp42", b"isom"), "audio/mp4", ".m4a"),
    "webm": (
        b"\x1aE\xdf\xa3\x9fB\x86\x81\x01B\xf7\x81\x01B\xf2\x81\x04B\xf3\x81\x08B\x82\x84webmB\x87",
        "video/webm",
        ".webm",
    ),
    "mkv": (b"\x1aE\xdf\xa3\xa3B\x86\x81\x01B\x82\x88matroskaB\x87", "video/x-matroska", ".mkv"),
    "opus": (ogg(b"OpusHead\x01\x01"), "audio/ogg", ".ogg"),
    "vorbis": (ogg(b"\x01vorbis" + bytes(23)), "audio/ogg", ".ogg"),
    "theora": (ogg(b"\x80theora" + bytes(23)), "video/ogg", ".ogv"),
    "another ogg": (ogg(b"fishead\0"), "application/ogg", ".bin"),
    "mp3 with a tag": (b"ID3\x04\0\0\0\0\x02\x01" + bytes(300), "audio/mpeg", ".mp3"),
    "mp3, 128 kbit/s": (frames(b"\xff\xfb\x90\x64", 417), "audio/mpeg", ".mp3"),
    "mp3, 128 kbit/s, padded": (frames(b"\xff\xfb\x92\x64", 418), "audio/mpeg", ".mp3"),
    "mp3 of MPEG-2": (frames(b"\xff\xf3\x40\xc0", 104), "audio/mpeg", ".mp3"),
    "mp3 of MPEG-2.5": (frames(b"\xff\xe3\x18\xc4", 72), "audio/mpeg", ".mp3"),
    "aac": (adts(), "audio/aac", ".aac"),
    "amr": (b"#!AMR\n\x3c\x91", "audio/amr", ".amr"),
    "amr, wide band": (b"#!AMR-WB\n\x04", "audio/amr-wb", ".awb"),
    "wav": (b"RIFF\x24\x08\0\0WAVEfmt ", "audio/wav", ".wav"),
    "flac": (b"fLaC\0\0\0\x22", "audio/flac", ".flac"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "application/pdf", ".pdf"),
    "doc": (ole("1Table", "WordDocument"), "application/msword", ".doc"),
    "xls": (ole("Workbook", sector=3), "application/vnd.ms-excel", ".xls"),
    "xls of Excel 5": (ole("Book"), "application/vnd.ms-excel", ".xls"),
    "ppt": (ole("PowerPoint Document"), "application/vnd.ms-powerpoint", ".ppt"),
    "an Office file, its directory out of sight": (ole("WordDocument", first=99), "application/x-ole-storage", ".bin"),
    "docx": (zipped(*WORD), DOCX, ".docx"),
    "docx of another writer": (
        zipped("_rels/.rels", "docProps/app.xml", "word/document.xml", stored=True),
        DOCX,
        ".docx",
    ),
    "xlsx": (zipped("[Content_Types].xml", "_rels/.rels", "xl/workbook.xml"), XLSX, ".xlsx"),
    "xlsx of another writer": (zipped("docProps/app.xml", "docProps/core.xml", "xl/theme/theme1.xml"), XLSX, ".xlsx"),
    "pptx": (zipped("[Content_Types].xml", "ppt/presentation.xml"), PPTX, ".pptx"),
    "zip": (zipped("photo.jpg", "word/document.xml"), "application/zip", ".zip"),
    "zip of an Office file's parts": (zipped("word/a.xml", "xl/b.xml"), "application/zip", ".zip"),
    "an empty zip": (zipped(), "application/zip", ".zip"),
    "rtf": (b"{\\rtf1\\ansi", "application/rtf", ".rtf"),
    "text": ("Olá, você".encode(), "text/plain", ".txt"),
    "text with a mark": (b"\xef\xbb\xbfnome;valor\r\n", "text/plain", ".txt"),
    "text in UTF-16": ("nome\tação\n".encode("utf-16"), "text/plain", ".txt"),
    "text cut within a letter": (b"a" * 8191 + "ç".encode(), "text/plain", ".txt"),
    "text that begins with a heart": (b"<3 <3", "text/plain", ".txt"),
    "html": (b"<!DOCTYPE html><html><script>alert(1)</script>", "text/html", ".bin"),
    "html after space": (b"\xef\xbb\xbf \r\n\t<HTML>", "text/html", ".bin"),
    "html, a part of": (b"<img src=x onerror=alert(1)>", "text/html", ".bin"),
    "html after a comment": (b"<!-- hello --><!-- --> <body>", "text/html", ".bin"),
    "html after a long comment": (b"<!--" + b"-" * 9000 + b"--><script>", "text/html", ".bin"),
    "html in Latin-1": ("<p>ação</p>".encode("latin-1"), "text/html", ".bin"),
    "html in UTF-16": ("<script>alert(1)</script>".encode("utf-16"), "text/html", ".bin"),
    "html with bytes of no text": (b"<html>\0\x01\x02\xff", "text/html", ".bin"),
    "php": (b"<?php system($_GET['c']); ?>", "text/html", ".bin"),
    "xhtml": (b"<?xml version='1.0'?><html xmlns='http://www.w3.org/1999/xhtml'>", "application/xhtml+xml", ".bin"),
    "svg": (SVG.encode(), "image/svg+xml", ".bin"),
    "svg with all before it": (
        f"<?xml version='1.0'?><!-- a --><?xml-stylesheet href='a'?>\n<!DOCTYPE svg PUBLIC 'x'>{SVG}".encode(),
        "image/svg+xml",
        ".bin",
    ),
    "svg after a comment": (f"<!-- a -->\n{SVG}".encode(), "image/svg+xml", ".bin"),
    "svg with a prefix": (
        b"<?xml version='1.0'?><s:svg xmlns:s='http://www.w3.org/2000/svg'>",
        "image/svg+xml",
        ".bin",
    ),
    "xml": (b"<?xml version='1.0'?><nfeProc>", "application/xml", ".bin"),
    "xml in Latin-1": ("<?xml version='1.0'?><nota>ação</nota>".encode("latin-1"), "application/xml", ".bin"),
    "xml without a declaration": (b"<nfeProc versao='4.00'>", "application/xml", ".bin"),
    "xml, only its beginning": (b"<?xml version='1.0'?><!-- " + b"a" * 9000, "application/xml", ".bin"),
    "nothing": (b"", OCTETS, ".bin"),
    "text in Latin-1": ("ação".encode("latin-1"), OCTETS, ".bin"),
    "a program": (b"\x7fELF\x02\x01\x01", OCTETS, ".bin"),
    "zeros": (bytes(100), OCTETS, ".bin"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_known_by_its_beginning(name: str) -> None:
    content, mime_type, ending = FILES[name]

    assert sniff(content) == mime_type
    assert extension(mime_type) == ending


@pytest.mark.parametrize(
    "content",
    [
        b"GIF88a\0",
        b"\x89PNG\n\x1a\n",
        b"RIFF\x24\0\0\0AVI ",
        b" %PDF-1.7\0",
        b"MZ%PDF-1.7" + bytes(50),
        b"\0\0\0\x07ftypisom",  # no box is so short
        b"\0\xff\0\0ftypisom" + bytes(50),  # or this long
        boxes(b"XYZ1", b"XYZ2"),
        b"ID3\x09\0\0\0\0\0\0" + b"\xff",  # no such version
        b"ID3\x04\0\0\x80\0\0\0" + b"\xff",  # not a length
        b"\xff\xfb\x90\x64" + b"\xaa" * 1000,  # one frame, and no second
        b"\xff\xfb\xf0\x64" + bytes(1000),  # no such bit rate
        b"\xff\xfb\x9c\x64" + bytes(1000),  # no such frequency
        b"\xff\xeb\x90\x64" + bytes(1000),  # no such version
        b"\xff\xfd\x90\x64" + bytes(1000),  # another layer
        b"\xff\xf1\x50\x80\x2e\x7f\xfc" + b"\xaa" * 1000,
        b"\xff\xf1\x7c\x80\x2e\x7f\xfc" + bytes(1000),
        b"\xff\xf1\x50\x80\0\x1f\xfc" + bytes(1000),
        b"OggS\x01" + bytes(40),
        b"\x1aE\xdf\xa3" + bytes(100) + b"B\x82\x84webm",
        b"<\xff\xfe\xfd\0",
        b"<zz\xff\0",
        bytes(3) + b"\xff\xd8\xff",
    ],
)
def test_what_only_resembles_a_file_is_not_taken_for_one(content: bytes) -> None:
    assert sniff(content) == OCTETS


@pytest.mark.parametrize("hidden", [b"<html><script>alert(1)</script>", SVG.encode(), zipped(*WORD), b"%PDF-1.7"])
@pytest.mark.parametrize("name", ["jpeg", "png", "gif 89", "mp4", "pdf", "webp", "mp3 with a tag", "opus"])
def test_a_file_that_is_two_is_what_it_begins_as(name: str, hidden: bytes) -> None:
    content, mime_type, _ = FILES[name]

    assert sniff(content + hidden) == mime_type


@pytest.mark.parametrize("name", ["jpeg", "png", "pdf", "docx", "mp4"])
def test_html_with_a_file_behind_it_is_html(name: str) -> None:
    assert sniff(b"<html>" + FILES[name][0]) == "text/html"


SEEDS = st.sampled_from(sorted({content for content, _, _ in FILES.values()}))


@given(st.binary() | SEEDS | st.builds(lambda a, b, n: a[:n] + b, SEEDS, st.binary(), st.integers(0, 600)))
@example(b"RIFF")
@example(b"ID3")
@example(b"PK\x03\x04")
@example(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\xff" * 600)
@example(b"\xff\xf1")
@example(b"<!")
@example(b"\xff\xfe<")
def test_every_beginning_has_a_type_and_it_agrees_with_itself(content: bytes) -> None:
    found = sniff(content)

    assert found.count("/") == 1
    assert extension(found).startswith(".")
    assert agrees(found, found)
    assert agrees(None, found)
    assert sniff(content[: 8 * 1024]) == found


def test_nothing_that_a_browser_runs_gets_an_ending_of_its_own() -> None:
    for active in "text/html", "application/xhtml+xml", "image/svg+xml", "application/xml", "text/xml", "anything/else":
        assert extension(active) == ".bin"
    assert not {".html", ".htm", ".svg", ".xml", ".php", ".js"} & set(module._ENDINGS.values())


@pytest.mark.parametrize(
    ("claimed", "found"),
    [
        (None, "image/jpeg"),
        ("", "text/html"),
        ("application/octet-stream", "text/html"),
        ("binary/octet-stream", "image/png"),
        ("image/jpeg", "image/jpeg"),
        ("IMAGE/JPEG ; q=1", "image/jpeg"),
        ("image/jpg", "image/jpeg"),
        ("audio/ogg; codecs=opus", "audio/ogg"),
        ("audio/opus", "audio/ogg"),
        ("application/ogg", "audio/ogg"),
        ("audio/mp3", "audio/mpeg"),
        ("audio/m4a", "audio/mp4"),
        ("audio/mp4", "video/mp4"),
        ("video/3gpp", "video/mp4"),
        ("audio/3gpp", "video/3gpp"),
        ("video/mp4", "video/quicktime"),
        ("video/mp4", "audio/mp4"),
        ("audio/x-wav", "audio/wav"),
        (DOCX, "application/zip"),
        ("application/zip", DOCX),
        ("application/x-zip-compressed", "application/zip"),
        (f"{OOXML}.wordprocessingml.template", DOCX),
        ("application/vnd.ms-excel.sheet.macroEnabled.12", XLSX),
        ("application/vnd.ms-powerpoint.presentation.macroEnabled.12", PPTX),
        ("application/vnd.oasis.opendocument.text", "application/zip"),
        ("application/vnd.android.package-archive", "application/zip"),
        ("application/epub+zip", "application/zip"),
        ("application/msword", "application/x-ole-storage"),
        ("application/vnd.ms-excel", "application/x-ole-storage"),
        ("text/csv", "text/plain"),
        ("text/vcard", "text/plain"),
        ("application/json", "text/plain"),
        ("application/vnd.ms-excel", "text/plain"),
        ("text/xml", "application/xml"),
        ("application/gpx+xml", "application/xml"),
        ("application/xhtml+xml", "text/html"),
        ("text/plain", OCTETS),
        ("text/csv", OCTETS),
        ("application/x-autocad", OCTETS),
        ("image/heic", OCTETS),
    ],
)
def test_what_can_be_one_file_agrees(claimed: str | None, found: str) -> None:
    assert agrees(claimed, found)


@pytest.mark.parametrize(
    ("claimed", "found"),
    [
        ("image/jpeg", "text/html"),
        ("image/jpeg", "image/png"),
        ("image/png", "image/svg+xml"),
        ("text/plain", "text/html"),
        ("text/html", "text/plain"),
        ("application/pdf", "text/html"),
        ("application/pdf", "application/zip"),
        ("application/pdf", DOCX),
        ("image/jpeg", OCTETS),
        ("video/mp4", OCTETS),
        ("audio/ogg; codecs=opus", OCTETS),
        ("application/pdf", OCTETS),
        (DOCX, XLSX),
        (DOCX, "application/x-ole-storage"),
        ("application/msword", "application/vnd.ms-excel"),
        ("audio/ogg", "audio/mpeg"),
        ("audio/ogg", "video/ogg"),
        ("text/csv", "application/zip"),
        ("nonsense", "image/jpeg"),
    ],
)
def test_what_cannot_be_one_file_does_not(claimed: str, found: str) -> None:
    assert not agrees(claimed, found)


def test_every_type_that_can_be_sent_is_found_under_its_own_name() -> None:
    """whatsapp-cloud-api.md §12, the table of what Meta takes."""
    endings = {mime_type: ending for _, mime_type, ending in FILES.values()}

    for mime_type in (
        *("audio/aac", "audio/amr", "audio/mpeg", "audio/mp4", "audio/ogg", "text/plain", "application/pdf"),
        *("application/msword", "application/vnd.ms-excel", "application/vnd.ms-powerpoint", DOCX, XLSX, PPTX),
        *("image/jpeg", "image/png", "image/webp", "video/mp4", "video/3gpp"),
    ):
        assert endings[mime_type] != ".bin"
