import hashlib
import zlib

import pytest

from sandbox import files

BEGINNINGS = {
    "image/jpeg": b"\xff\xd8\xff\xe0",
    "image/png": b"\x89PNG\r\n\x1a\n",
    "image/webp": b"RIFF",
    "audio/ogg": b"OggS",
    "audio/mp4": b"\0\0\0\x18ftypM4A ",
    "video/mp4": b"\0\0\0\x18ftypmp42",
    "video/3gpp": b"\0\0\0\x18ftyp3gp4",
    "application/pdf": b"%PDF-1.4\n",
    "text/plain": b"",
}
TYPES = list(BEGINNINGS)


def data(file: files.Content) -> bytes:
    return b"".join(file.chunks())


@pytest.mark.parametrize("mime_type", TYPES)
def test_a_file_has_any_size_and_says_its_hash(mime_type: str) -> None:
    smallest = files.make(mime_type, "seed")

    for size in (smallest.size, *range(smallest.size + 1, smallest.size + 400), 65_536, 1_000_003):
        file = files.make(mime_type, "seed", size)

        assert len(data(file)) == file.size == size
        assert hashlib.sha256(data(file)).digest() == file.digest
    assert data(smallest).startswith(BEGINNINGS[mime_type])


@pytest.mark.parametrize("mime_type", TYPES)
def test_the_seed_decides_the_content(mime_type: str) -> None:
    one, same, other = (files.make(mime_type, seed, 10_000) for seed in ("a", "a", "b"))

    assert data(one) == data(same) != data(other)
    assert one.digest == same.digest != other.digest


def test_parameters_of_a_type_do_not_matter() -> None:
    assert data(files.make("audio/ogg; codecs=opus", "a")) == data(files.make("AUDIO/OGG", "a"))


def test_a_file_cannot_be_smaller_than_its_type_allows() -> None:
    smallest = files.make("image/png", "a").size

    with pytest.raises(ValueError, match=f"{smallest} bytes"):
        files.make("image/png", "a", smallest - 1)


@pytest.mark.parametrize("size", [None, 40_000, 40_001])
def test_a_png_is_a_row_of_chunks_with_good_sums(size: int | None) -> None:
    rest = data(files.make("image/png", "a", size))[8:]

    names = []
    while rest:
        length = int.from_bytes(rest[:4])
        assert int.from_bytes(rest[8 + length : 12 + length]) == zlib.crc32(rest[4 : 8 + length])
        names.append(rest[4:8])
        rest = rest[12 + length :]
    assert (names[0], names[-2:]) == (b"IHDR", [b"IDAT", b"IEND"])


@pytest.mark.parametrize("size", [None, 40_000, 40_001])
def test_a_jpeg_is_a_row_of_segments(size: int | None) -> None:
    rest = data(files.make("image/jpeg", "a", size))[2:]

    names = []
    while rest[:2] != b"\xff\xda":
        names.append(rest[:2])
        rest = rest[2 + int.from_bytes(rest[2:4]) :]
    assert names[-4:] == [b"\xff\xdb", b"\xff\xc0", b"\xff\xc4", b"\xff\xc4"]
    assert rest.endswith(b"\xff\xd9")


@pytest.mark.parametrize("size", [None, 40_000, 40_001])
def test_a_pdf_says_where_its_table_is(size: int | None) -> None:
    file = data(files.make("application/pdf", "a", size))

    start, end = file.splitlines()[-2:]
    assert end == b"%%EOF"
    assert file[int(start) :].startswith(b"xref\n")


@pytest.mark.parametrize("size", [None, 40_000, 40_001])
def test_the_boxes_of_an_mp4_fill_it(size: int | None) -> None:
    file = data(files.make("video/mp4", "a", size))

    names, at = [], 0
    while at < len(file):
        names.append(file[at + 4 : at + 8])
        at += int.from_bytes(file[at : at + 4])
    assert (names, at) == ([b"ftyp", b"moov", b"mdat"], len(file))


@pytest.mark.parametrize("more", range(190, 300))
def test_the_pages_of_an_ogg_fill_it(more: int) -> None:
    rest = data(files.make("audio/ogg", "a", files.make("audio/ogg", "a").size + more))

    flags = []
    while rest:
        assert rest[:5] == b"OggS\0"
        flags.append(rest[5])
        lacing = rest[27 : 27 + rest[26]]
        assert 255 not in lacing  # every packet ends where it begins
        rest = rest[27 + rest[26] + sum(lacing) :]
    assert (flags[0], flags[-1]) == (2, 4)


def test_a_huge_file_costs_nothing_until_it_is_read() -> None:
    file = files.make("video/mp4", "a", 2**31)

    chunks = file.chunks()
    assert sum(len(next(chunks)) <= files.CHUNK for _ in range(20)) == 20
    assert file.size == 2**31
