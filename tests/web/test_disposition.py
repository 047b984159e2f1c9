"""Names that strangers chose, told so that they harm nobody (security-reliability.md M7)."""

import re
import unicodedata
from urllib.parse import unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from web.disposition import INLINE, disposition, harmless

HEADER = re.compile(r"(inline|attachment); filename=\"([A-Za-z0-9 ._()-]+)\"; filename\*=UTF-8''([A-Za-z0-9%._~-]+)")
NAMES = st.text(max_size=300) | st.text('/\\.:"%\r\n\0\u202e\u2066 ajpghtml\uff0f\u2044', max_size=60)


def told(name: str | None, mime_type: str = "image/jpeg", extension: str = ".jpg") -> str:
    """The name as a browser of today reads it."""
    match = HEADER.fullmatch(disposition(name, mime_type, extension))
    assert match is not None
    return unquote(match[3], errors="strict")


@given(NAMES, st.sampled_from([".jpg", ".txt", ".bin", ".docx"]))
@example("x" * 10_000, ".jpg")
@example("é" * 10_000, ".jpg")
@example("../../etc/passwd", ".jpg")
@example("a\r\nSet-Cookie: a=b", ".jpg")
@example("photo\u202egpj.exe", ".bin")
@example("\ud800", ".jpg")
@example("…", ".jpg")
def test_any_name_becomes_a_harmless_one(name: str, extension: str) -> None:
    safe = told(name, "image/jpeg", extension)

    assert 5 <= len(safe) <= 110
    assert not set(safe) & set('/\\:*?"<>|\r\n\0\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u200f\uff0f\uff3c\u2044')
    assert not any(unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp") for sign in safe)
    assert not safe.startswith((".", " "))
    assert safe.lower().endswith((extension, ".jpeg", ".jpe", ".jfif", ".csv", ".log"))


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("Férias na praia.jpg", "Férias na praia.jpg"),
        ("IMG_0001.JPG", "IMG_0001.JPG"),
        ("photo.jpeg", "photo.jpeg"),
        ("invoice.php", "invoice.php.jpg"),
        ("invoice.jpg.exe", "invoice.jpg.exe.jpg"),
        (".htaccess", "htaccess.jpg"),
        ("../../x.jpg", "x.jpg"),
        (r"C:\Users\x.jpg", "x.jpg"),
        ("C:x.jpg", "C_x.jpg"),
        ("a\0b.jpg", "ab.jpg"),
        ("a\r\nb.jpg", "a b.jpg"),
        ('a"b;c.jpg', "a_b;c.jpg"),
        ("x.jpg. . .", "x.jpg"),
        ("folder/", "folder.jpg"),
        ("CON.jpg", "_CON.jpg"),
        ("nul", "_nul.jpg"),
        ("console.jpg", "console.jpg"),
        ("фото.jpg", "фото.jpg"),
        ("gpj.exe\u202e", "gpj.exe.jpg"),
        ("100%2e%2e%2f.jpg", "100%2e%2e%2f.jpg"),
        (".jpg", "jpg.jpg"),
        ("///", "file.jpg"),
        ("", "file.jpg"),
        (None, "file.jpg"),
    ],
)
def test_such_a_name_becomes_this_one(name: str | None, safe: str) -> None:
    assert told(name) == safe


@pytest.mark.parametrize(
    ("name", "plain"), [("Férias.jpg", "Ferias.jpg"), ("фото.jpg", "____.jpg"), ("100%.jpg", "100_.jpg")]
)
def test_old_readers_get_a_name_of_plain_letters(name: str, plain: str) -> None:
    assert f'filename="{plain}"' in disposition(name, "image/jpeg", ".jpg")


def test_a_csv_is_a_text_and_an_office_file_an_archive() -> None:
    assert harmless("list.csv", ".txt") == "list.csv"
    assert harmless("letter.docx", ".zip") == "letter.docx"
    assert harmless("page.html", ".txt") == "page.html.txt"


@pytest.mark.parametrize(
    "mime_type",
    ["text/html", "image/svg+xml", "application/xml", "application/pdf", "text/plain", "application/octet-stream", ""],
)
def test_what_could_run_or_lead_elsewhere_is_never_shown_in_place(mime_type: str) -> None:
    assert mime_type not in INLINE
    assert disposition("x", mime_type, ".bin").startswith("attachment;")
