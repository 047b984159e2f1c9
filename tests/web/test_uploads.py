"""An upload is checked as the provider would, and is stored whole and once, or not at all (M7, M8, M10, W4-W6)."""

import contextlib
import resource
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest

import web.uploads
from pombal.supervisor import until
from tests.web import files
from tests.web.files import URL, Customer, KiB, MiB, a_customer, jpeg, lying_in, pdf, png, root_of, webp
from tests.web.process import Web, Wire, request, running
from tests.web.served import served
from web import app

CLOSED = ("Connection", "close")


@pytest.fixture
def customer(web: Web) -> Customer:
    return a_customer(web)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "media"


@pytest.fixture
def own(tmp_path: Path, root: Path) -> Iterator[Web]:
    """A web process with a storage that nobody else uses."""
    with running(tmp_path / "web.log", {"MEDIA_URL": f"file://{root}", "MEDIA_QUOTA": "10000000"}) as own:
        yield own


def error(answer: httpx.Response) -> Any:
    return answer.json()["error"]


def posting(customer: Customer, *fields: tuple[str, str], body: bytes = b"") -> bytes:
    return request("POST", URL, *customer.fields, *fields, body=body)


def chunked(data: bytes, size: int = MiB) -> Iterator[bytes]:
    """A body that does not say how long it is."""
    yield from (data[n : n + size] for n in range(0, len(data), size))


# ------------------------------------------------------------------------------------------------------------ accepted

OFFICE = "application/vnd.openxmlformats-officedocument."
GOOD = {
    "a picture": (jpeg(), "image/jpeg", "image", "image/jpeg"),
    "a picture of no stated type": (png(), "application/octet-stream", "image", "image/png"),
    "a sticker": (webp(), "image/webp", "sticker", "image/webp"),
    "a lossy sticker": (files.webp_lossy(), "image/webp", "sticker", "image/webp"),
    "a lossless sticker": (files.webp_lossless(), "image/webp", "sticker", "image/webp"),
    "a voice note": (files.ogg(), "audio/ogg; codecs=opus", "audio", "audio/ogg"),
    "a song": (b"ID3\x04\0\0\0\0\0\0" + bytes(500), "audio/mpeg", "audio", "audio/mpeg"),
    "an old recording": (b"#!AMR\n" + bytes(100), "audio/amr", "audio", "audio/amr"),
    "a film": (files.mp4(), "video/mp4", "video", "video/mp4"),
    "a film of an old phone": (files.mp4(b"3gp5"), "video/3gpp", "video", "video/3gpp"),
    "a document": (pdf(), "application/pdf", "document", "application/pdf"),
    "a text": ("Olá, Bia\n".encode(), "text/plain; charset=utf-8", "document", "text/plain"),
    "a table as text": (b"a;b\n1;2\n", "text/csv", "document", "text/plain"),
    "a letter": (
        *(files.office("word"), f"{OFFICE}wordprocessingml.document"),
        *("document", f"{OFFICE}wordprocessingml.document"),
    ),
    "a table": (files.office("xl"), "application/zip", "document", f"{OFFICE}spreadsheetml.sheet"),
    "an old letter": (files.old_office(), "application/msword", "document", "application/msword"),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_file_that_can_be_sent_is_stored(customer: Customer, name: str) -> None:
    content, claimed, kind, mime_type = GOOD[name]

    made = customer.uploads(content, claimed, filename="Nota fiscal.x")

    assert made.status_code == 201
    wanted = {"kind": kind, "mime_type": mime_type, "bytes": len(content), "sha256": sha256(content).hexdigest()}
    id_ = made.json()["media_id"]
    assert made.json() == wanted | {"media_id": id_}
    assert made.headers["location"] == f"{URL}/{id_}"
    back = customer.reads(id_)
    assert (back.content, back.headers["content-type"]) == (content, mime_type)
    assert "Nota%20fiscal.x" in back.headers["content-disposition"]
    (row,), (file,) = customer.media(), customer.files()
    assert (row["id"], row["state"], row["message_id"]) == (UUID(id_), "stored", None)
    assert (row["digest"], file["bytes"], file["mime_type"]) == (file["digest"], len(content), mime_type)


def test_the_same_content_again_is_another_id_and_the_same_file(customer: Customer, web: Web) -> None:
    content = pdf(300 * KiB)

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda n: customer.uploaded(content, filename=f"{n}.pdf"), range(4)))
    theirs = a_customer(web).uploaded(content)

    assert len({one["media_id"] for one in [*made, theirs]}) == 5
    assert len(customer.files()) == 1
    found = [name for name in lying_in(root_of()) if sha256(content).hexdigest() in name]
    assert len(found) == 2  # one for each tenant
    assert [customer.reads(one["media_id"]).content for one in made] == [content] * 4


def test_a_body_that_does_not_say_how_long_it_is_is_taken_too(customer: Customer) -> None:
    content = pdf(700_001)

    made = customer.uploaded(chunked(content, 10_007))

    assert customer.reads(made["media_id"]).content == content


def test_what_came_in_as_some_archive_is_known_better_after_an_upload(customer: Customer) -> None:
    content = b"PK\x03\x04" + bytes(200)
    customer.keeps(content)

    made = customer.uploaded(content, f"{OFFICE}wordprocessingml.document")
    again = customer.uploaded(content, f"{OFFICE}spreadsheetml.sheet")

    assert made["mime_type"] == again["mime_type"] == f"{OFFICE}wordprocessingml.document"
    assert [file["mime_type"] for file in customer.files()] == [made["mime_type"]]


@pytest.mark.parametrize("name", ["../../x\0.pdf", "n" * 3_000, "a\r\nb", "\U0001f600" * 50, "", "\u202egpj.pdf"])
def test_any_name_is_kept_as_data(customer: Customer, name: str) -> None:
    made = customer.uploaded(pdf(), filename=name)

    assert customer.media()[0]["filename"] == (name.replace("\0", "")[:1_000] or None)
    assert customer.reads(made["media_id"]).headers["content-disposition"].startswith("attachment;")
    assert all(len(path) < 150 for path in lying_in(root_of()))


# ------------------------------------------------------------------------------------------------------------- refused

BAD = {
    "nothing": (b"", "image/png", "body"),
    "a web page": (b"<!DOCTYPE html><p>Hi", "text/html", "body"),
    "a web page as a picture": (b"<!DOCTYPE html><p>Hi", "image/jpeg", "Content-Type"),
    "a drawing that runs": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", "body"),
    "a picture as another": (jpeg(), "image/png", "Content-Type"),
    "what curl says of its own accord": (jpeg(), "application/x-www-form-urlencoded", "Content-Type"),
    "a form": (b"--x\r\nContent-Disposition: form-data\r\n\r\n", "multipart/form-data; boundary=x", "Content-Type"),
    "a moving picture": (b"GIF89a" + bytes(50), "image/gif", "body"),
    "a program": (b"MZ\x90\0" + bytes(50), "application/octet-stream", "body"),
    "an archive": (b"PK\x03\x04" + bytes(50), "application/zip", "body"),
    "an old file of nobody knows what": (files.old_office(), "application/octet-stream", "body"),
    "a text in Latin-1": ("Olá".encode("latin-1") * 3, "text/plain", "body"),
    "a text that ends in half a letter": ("Ol\u00e1".encode()[:-1], "text/plain", "body"),
    "a text that is no text later on": (b"a" * MiB + b"\xff" + b"a" * MiB, "text/plain", "body"),
    "a text with a NUL later on": (b"a" * MiB + b"\0" + b"a" * MiB, "text/plain", "body"),
    "a text in UTF-16": ("Olá".encode("utf-16"), "text/plain", "body"),
    "a sticker of another size": (webp(width=511), "image/webp", "body"),
    "a lossy sticker of another size": (files.webp_lossy(height=100), "image/webp", "body"),
    "a sticker of no size": (b"RIFF\x10\0\0\0WEBPxxxx", "image/webp", "body"),
    "a song that is not Opus": (files.ogg(b"\x01vorbis\0"), "audio/ogg", "body"),
    "a voice note in stereo": (files.ogg(channels=2), "audio/ogg", "body"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_provider_would_not_take_is_refused_at_once(customer: Customer, name: str) -> None:
    content, claimed, field = BAD[name]

    answer = customer.uploads(content, claimed)

    assert (answer.status_code, error(answer)["code"]) == (422, "INVALID_PAYLOAD")
    assert error(answer)["details"]["field"] == field
    assert (customer.media(), customer.files()) == ([], [])


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (jpeg, 5 * MiB),
        (lambda size: webp(size), 100 * KiB),
        (lambda size: webp(size, moves=True), 500 * KiB),
        (lambda size: files.mp4().ljust(size, b"m"), 16 * MiB),
        (lambda size: files.ogg().ljust(size, b"o"), 16 * MiB),
    ],
    ids=["image", "sticker", "moving sticker", "video", "audio"],
)
def test_each_kind_may_be_so_large_and_no_byte_more(customer: Customer, make: Any, most: int) -> None:
    right, large = customer.uploads(make(most)), customer.uploads(make(most + 1))

    assert (right.status_code, large.status_code) == (201, 422)
    assert (error(large)["details"]["field"], error(large)["details"]["limit"]) == ("body", most)
    assert len(customer.files()) == 1


def test_the_refusal_of_a_picture_that_is_far_too_large_is_heard(customer: Customer) -> None:
    answer = customer.uploads(chunked(jpeg(60 * MiB)))

    assert (answer.status_code, error(answer)["details"]["limit"]) == (422, 5 * MiB)


def test_a_declared_length_over_the_limit_is_refused_before_a_byte_of_it_is_read(customer: Customer) -> None:
    fields = [("Content-Length", str(100 * MiB + 1)), ("Expect", "100-continue")]
    with customer.web.wire() as wire:
        answer = wire.send(posting(customer, *fields)).answer()

        assert (answer.status, answer.code, answer.headers["connection"]) == (413, "PAYLOAD_TOO_LARGE", "close")
        assert wire.is_closed_by_peer()


def test_a_hundred_mebibytes_are_taken_and_not_a_byte_more_with_little_memory(customer: Customer) -> None:
    content = pdf(100 * MiB)
    customer.uploaded(pdf())
    before, most, done = customer.web.memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], customer.web.memory())

    watching = threading.Thread(target=watch)
    watching.start()
    right = customer.uploads(chunked(content))
    back = customer.reads(right.json()["media_id"])
    done.set()
    watching.join()

    assert (right.status_code, back.content == content) == (201, True)
    assert most[0] - before < 40 * MiB
    with customer.web.wire() as wire:
        wire.send(posting(customer, ("Transfer-Encoding", "chunked")))
        with contextlib.suppress(ConnectionError):
            for part in chunked(content):
                wire.send(b"%x\r\n%s\r\n" % (len(part), part))
            wire.send(b"1\r\nx\r\n")
        assert wire.answer().status == 413
    assert len(customer.media()) == 2


@pytest.mark.parametrize("encoding", ["gzip", "br", ""])
def test_an_encoded_body_is_refused(customer: Customer, encoding: str) -> None:
    answer = customer.asks("POST", URL, content=pdf(), headers={"Content-Encoding": encoding})

    assert answer.status_code == 415


# ----------------------------------------------------------------------------------------------------------------- who


def test_the_key_is_looked_at_before_the_body(customer: Customer, web: Web) -> None:
    """A stranger gets no time and no room for a body, and is not told to go on."""
    reader = a_customer(web, "messages:read", shop=customer.shop)
    stranger = Customer(customer.shop, customer.key[:-4] + "xxxx", web)
    for who, status in ((reader, 403), (stranger, 401)):
        with web.wire() as wire:
            fields = [("Content-Length", "1000000"), ("Expect", "100-continue")]
            assert wire.send(posting(who, *fields)).answer().status == status


def test_others_bodies_have_no_more_time_than_before(customer: Customer) -> None:
    """Only a good key makes a slow body worth waiting for: it stands here beside one that is slow and good."""
    path = "/api/v1/messages"
    with customer.web.wire() as slow, customer.web.wire() as message, customer.web.wire() as stalled:
        began = time.monotonic()
        content = pdf(2_600)
        slow.send(posting(customer, ("Content-Length", "2600")))
        message.send(request("POST", path, *customer.fields, ("Content-Length", "2600")))
        stalled.send(posting(customer, ("Content-Length", "2600"), body=b"%PDF-1.7"))
        for n in range(26):
            time.sleep(0.5)  # the slow line itself
            slow.send(content[n * 100 : (n + 1) * 100])
            with contextlib.suppress(ConnectionError):
                message.send(b" ")
        lasted = time.monotonic() - began
        answers = [wire.answer() for wire in (slow, message, stalled)]

    assert lasted > 12
    assert [answer.status for answer in answers] == [201, 408, 408]
    assert len(customer.media()) == 1


def test_a_body_that_drips_for_ever_is_ended(customer: Customer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.uploads, "_SECONDS", 1.5)
    with served(app) as port, Wire(port) as wire:
        wire.send(posting(customer, ("Transfer-Encoding", "chunked")))
        gone = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not gone.wait(0.1):
                    wire.send(b"1\r\n%\r\n")

        dripping = threading.Thread(target=drip)
        dripping.start()
        answer = wire.answer()
        gone.set()
        dripping.join()

    assert (answer.status, answer.code, answer.headers["connection"]) == (408, "INVALID_PAYLOAD", "close")
    assert customer.media() == []


def test_so_many_at_a_time_and_so_many_of_one_tenant(customer: Customer, web: Web) -> None:
    others = [a_customer(web), a_customer(web)]

    def begun(stack: contextlib.ExitStack, who: Customer) -> Wire:
        wire = stack.enter_context(web.wire())
        fields = [("Content-Length", "1000"), ("Expect", "100-continue")]
        assert wire.send(posting(who, *fields)).answer().status == 100
        return wire

    with contextlib.ExitStack() as stack:
        wires = [begun(stack, who) for who in (customer, others[0]) for _ in range(4)]
        mine, theirs = customer.uploads(pdf()), others[1].uploads(pdf())
        done = wires[0].send(pdf(1_000)).answer()
        then = others[1].uploads(pdf())

    assert (mine.status_code, error(mine)["code"]) == (429, "RATE_LIMITED")
    assert (theirs.status_code, error(theirs)["code"]) == (503, "UNAVAILABLE")
    assert mine.headers["retry-after"] == theirs.headers["retry-after"] == "5"
    assert (done.status, then.status_code) == (201, 201)
    # Those who left in the middle have given their places back.
    assert until(lambda: customer.uploads(pdf()).status_code == 201, time.monotonic() + 10)


# ------------------------------------------------------------------------------------------------------------- trouble


def test_a_sender_who_leaves_in_the_middle_leaves_nothing(own: Web, root: Path) -> None:
    customer = a_customer(own)
    with own.wire() as wire:
        wire.send(posting(customer, ("Content-Length", str(3 * MiB)), body=pdf(2 * MiB)))
        assert until(lambda: sizes(root) >= MiB, time.monotonic() + 10)

    assert until(lambda: lying_in(root) == [], time.monotonic() + 10)
    assert (customer.media(), customer.files()) == ([], [])
    assert [line for line in own.lines() if line["level"] == "error"] == []


def test_a_killed_process_leaves_no_row_and_no_file_under_its_name(own: Web, root: Path) -> None:
    customer = a_customer(own)
    with own.wire() as wire:
        wire.send(posting(customer, ("Content-Length", str(3 * MiB)), body=pdf(2 * MiB)))
        assert until(lambda: sizes(root) >= MiB, time.monotonic() + 10)
        own.process.kill()
        own.process.wait()

    assert all(name.startswith(".incoming/") for name in lying_in(root))
    assert (customer.media(), customer.files()) == ([], [])


def sizes(root: Path) -> int:
    return sum((root / name).stat().st_size for name in lying_in(root))


def test_a_disk_that_takes_no_more_is_a_503_and_leaves_nothing(own: Web, root: Path) -> None:
    customer = a_customer(own)
    unlimited = resource.prlimit(own.process.pid, resource.RLIMIT_FSIZE, (MiB, resource.RLIM_INFINITY))

    full = customer.uploads(pdf(3 * MiB))
    resource.prlimit(own.process.pid, resource.RLIMIT_FSIZE, unlimited)

    assert (full.status_code, error(full)["code"], full.headers["retry-after"]) == (503, "UNAVAILABLE", "5")
    assert lying_in(root) == []
    assert (customer.media(), customer.files()) == ([], [])
    (line,) = [line for line in own.lines() if line["event"] == "media_storage_unavailable"]
    assert line["why"] == "EFBIG"
    assert customer.uploads(pdf(3 * MiB)).status_code == 201


def test_a_tenant_may_not_store_more_than_its_quota(own: Web, root: Path) -> None:
    customer, content = a_customer(own), pdf(6 * MiB)
    first = customer.uploaded(content)

    over = customer.uploads(pdf(6 * MiB))
    again = customer.uploaded(content)

    assert (over.status_code, error(over)["code"]) == (409, "CONFLICT")
    assert error(over)["details"] == {"reason": "quota_reached", "limit": 10_000_000}
    assert again["sha256"] == first["sha256"]
    assert len(customer.files()) == 1
    assert a_customer(own).uploads(content).status_code == 201


def test_no_line_names_a_file_or_its_content(customer: Customer) -> None:
    name, content = "Segredo da Bia.pdf", b"%PDF-1.7 segredo-da-bia" + pdf()
    made = customer.uploaded(content, filename=name)
    customer.reads(made["media_id"])

    (line,) = [line for line in customer.web.lines() if line.get("media_id") == made["media_id"]]
    assert line["event"] == "media_uploaded"
    assert "segredo" not in customer.web.log().lower()
