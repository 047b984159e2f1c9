"""A stored file is read back whole or in part, by its tenant alone, and never as anything that runs (M7, M8)."""

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from uuid import uuid4

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import web.server
from pombal.supervisor import until
from providers.storage import storage
from sandbox import meta
from tests.factories import a_delivery, a_wamid, body_of, rows
from tests.web.files import URL, Customer, MiB, a_customer, jpeg, mp4, office, open_in, pdf, png, root_of
from tests.web.process import Web, Wire, request, running
from tests.web.served import served
from workers import incoming_message

DRIVE = "C:"


@pytest.fixture
def customer(web: Web) -> Customer:
    return a_customer(web)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[tuple[Web, Path]]:
    """A web process whose storage nobody else uses."""
    root = tmp_path / "media"
    with running(tmp_path / "web.log", {"MEDIA_URL": f"file://{root}"}) as web:
        yield web, root


def error(answer: httpx.Response) -> Any:
    return answer.json()["error"]


# --------------------------------------------------------------------------------------------------------------- whole


def test_a_file_comes_back_as_it_was_stored(customer: Customer) -> None:
    content = jpeg(700_001)
    id_ = customer.keeps(content, "Férias.jpg", "image")

    answer = customer.reads(id_)

    assert (answer.status_code, answer.content) == (200, content)
    wanted = {
        "content-type": "image/jpeg",
        "content-length": "700001",
        "etag": f'"{sha256(content).hexdigest()}"',
        "accept-ranges": "bytes",
        "cache-control": "private, max-age=31536000, immutable",
        "content-security-policy": "default-src 'none'; sandbox",
        "x-content-type-options": "nosniff",
        "content-disposition": "inline; filename=\"Ferias.jpg\"; filename*=UTF-8''F%C3%A9rias.jpg",
    }
    assert {name: answer.headers.get(name) for name in wanted} == wanted


def test_head_says_the_same_without_the_bytes(customer: Customer) -> None:
    id_ = customer.keeps(pdf(5_000))

    whole, head = customer.reads(id_), customer.asks("HEAD", f"{URL}/{id_}")

    assert (head.status_code, head.content) == (200, b"")
    different = {"x-request-id"}
    assert {k: v for k, v in head.headers.items() if k not in different} == {
        k: v for k, v in whole.headers.items() if k not in different
    }


def test_an_empty_file_comes_back_empty(customer: Customer) -> None:
    id_ = customer.keeps(b"")

    assert (customer.reads(id_).status_code, customer.reads(id_).content) == (200, b"")
    assert customer.reads(id_, Range="bytes=0-0").status_code == 416


@pytest.mark.parametrize(
    ("content", "mime_type", "how"),
    [
        (jpeg(), "image/jpeg", "inline"),
        (png(), "image/png", "inline"),
        (mp4(), "video/mp4", "inline"),
        (pdf(), "application/pdf", "attachment"),
        (b"<!DOCTYPE html><script>alert(1)</script>", "text/html", "attachment"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "image/svg+xml", "attachment"),
        (b"<?xml version='1.0'?><a/>", "application/xml", "attachment"),
        (b"just text", "text/plain", "attachment"),
        (b"MZ\x90\x00 an executable", "application/octet-stream", "attachment"),
        (office("word"), "application/vnd.openxmlformats-officedocument.wordprocessingml.document", "attachment"),
    ],
)
def test_the_type_is_that_of_the_bytes_and_only_pictures_and_sound_are_shown_in_place(
    customer: Customer, content: bytes, mime_type: str, how: str
) -> None:
    id_ = customer.keeps(content, "holiday.jpg", "image", mime_type="image/jpeg")

    answer = customer.reads(id_)

    assert answer.headers["content-type"] == mime_type
    assert answer.headers["content-disposition"].partition(";")[0] == how
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        f"{DRIVE}\\autoexec.bat",
        "a\r\nSet-Cookie: session=stolen\r\n\r\n<script>",
        'x"; filename="y.html',
        "\u202egpj.exe",
        "n" * 10_000,
        "é" * 10_000,
        ".htaccess",
        "фото.html",
        "x.php",
        "\u2028\u2029",
        "../",
    ],
)
def test_a_hostile_name_does_no_harm(customer: Customer, name: str) -> None:
    id_ = customer.keeps(jpeg(), name, "image")

    answer = customer.reads(id_)

    told = answer.headers["content-disposition"]
    assert answer.status_code == 200
    assert "set-cookie" not in answer.headers
    assert len(told) < 1_500
    assert told.count('"') == 2
    safe = unquote(told.rpartition("UTF-8''")[2])
    assert safe.endswith(".jpg")
    assert not set(safe) & set('/\\:"\r\n\u202e')


# --------------------------------------------------------------------------------------------------------------- parts


CONTENT = pdf(1_000)


@pytest.mark.parametrize(
    ("wanted", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, 1000),
        ("bytes=100-199", 100, 200),
        ("bytes=900-", 900, 1000),
        ("bytes=900-5000", 900, 1000),
        ("bytes=-1", 999, 1000),
        ("bytes=-300", 700, 1000),
        ("bytes=-5000", 0, 1000),
        ("bytes=999-999", 999, 1000),
        ("Bytes= 5-9", 5, 10),
        ("bytes=900-" + "9" * 90, 900, 1000),
    ],
)
def test_a_part_is_answered_with_that_part(customer: Customer, wanted: str, start: int, end: int) -> None:
    answer = customer.reads(customer.keeps(CONTENT), Range=wanted)

    assert (answer.status_code, answer.content) == (206, CONTENT[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/1000"
    assert answer.headers["content-length"] == str(end - start)


@pytest.mark.parametrize("wanted", ["bytes=1000-", "bytes=1000-1001", "bytes=-0", "bytes=5000-6000"])
def test_a_part_behind_the_end_is_refused_with_the_size(customer: Customer, wanted: str) -> None:
    answer = customer.reads(customer.keeps(CONTENT), Range=wanted)

    assert answer.status_code == 416
    assert answer.headers["content-range"] == "bytes */1000"
    assert "cache-control" not in answer.headers
    assert error(answer)["details"] == {"field": "Range", "limit": 1000}


@pytest.mark.parametrize(
    "wanted",
    [
        *("bytes=0-1,5-6", "bytes=0-1,", "bytes=5-2", "bytes=-", "bytes=", "bytes=a-b", "bytes=1", "bytes=--5", ""),
        *("lines=0-1", "bytes=0x1-2", "bytes=1-2-3", "bytes=" + "1" * 5_000 + "-"),
    ],
)
def test_anything_else_is_answered_with_the_whole(customer: Customer, wanted: str) -> None:
    answer = customer.reads(customer.keeps(CONTENT), Range=wanted)

    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert "content-range" not in answer.headers


def test_two_range_headers_are_answered_with_the_whole(customer: Customer) -> None:
    id_ = customer.keeps(CONTENT)

    answer = customer.asks("GET", f"{URL}/{id_}", headers=dict(customer.fields) | {"Range": "bytes=0-1"})
    twice = [("Range", "bytes=0-1"), ("Range", "bytes=2-3")]

    assert answer.status_code == 206
    assert customer.web.ask(request("GET", f"{URL}/{id_}", *customer.fields, *twice)).status == 200


def test_the_parts_of_a_large_file_make_up_the_whole(customer: Customer) -> None:
    content = pdf(3 * MiB + 17)
    id_ = customer.keeps(content)

    parts = [customer.reads(id_, Range=f"bytes={n}-{n + 999_999}").content for n in range(0, len(content), 1_000_000)]

    assert b"".join(parts) == content


def test_who_has_it_already_is_told_so(customer: Customer) -> None:
    id_ = customer.keeps(CONTENT)
    etag = customer.reads(id_).headers["etag"]

    for given in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        answer = customer.reads(id_, **{"If-None-Match": given, "Range": "bytes=0-1"})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    for given in ('"x"', etag.strip('"'), f"{etag[:-1]}x"):
        assert customer.reads(id_, **{"If-None-Match": given}).status_code == 200


def test_a_part_is_continued_only_of_the_same_content(customer: Customer) -> None:
    id_ = customer.keeps(CONTENT)
    etag = customer.reads(id_).headers["etag"]

    assert customer.reads(id_, **{"Range": "bytes=5-", "If-Range": etag}).status_code == 206
    for other in (f"W/{etag}", '"x"', format_datetime(datetime.now(UTC), usegmt=True)):
        answer = customer.reads(id_, **{"Range": "bytes=5-", "If-Range": other})
        assert (answer.status_code, answer.content) == (200, CONTENT)


# ----------------------------------------------------------------------------------------------------------------- who


def test_a_foreign_file_and_a_missing_one_look_alike(customer: Customer, web: Web) -> None:
    stranger = a_customer(web)
    answers = [
        stranger.reads(customer.keeps(jpeg())),
        stranger.reads(customer.has()),
        stranger.reads(uuid4()),
        stranger.reads("none"),
        stranger.reads("..%2f..%2fetc%2fpasswd"),
    ]

    assert [answer.status_code for answer in answers] == [404] * 5
    assert {(error(one)["code"], error(one)["message"], str(error(one)["details"])) for one in answers[:4]} == {
        ("NOT_FOUND", "no such file", "{}")
    }


def test_two_tenants_have_the_same_content_each_for_itself(customer: Customer, web: Web) -> None:
    stranger, content = a_customer(web), jpeg()
    theirs = stranger.keeps(content)

    mine = customer.keeps(content)

    assert customer.reads(mine).content == stranger.reads(theirs).content == content
    assert customer.files()[0]["key"] != stranger.files()[0]["key"]


def test_a_key_is_needed_and_it_must_allow_to_read(customer: Customer, web: Web) -> None:
    id_ = customer.keeps(jpeg())

    assert web.http.get(f"{URL}/{id_}").status_code == 401
    assert a_customer(web, "messages:send", shop=customer.shop).reads(id_).status_code == 403
    assert a_customer(web, "messages:read", shop=customer.shop).reads(id_).status_code == 200


# ------------------------------------------------------------------------------------------------------- not there yet


def test_a_file_that_waits_says_until_when(customer: Customer) -> None:
    at = datetime.now(UTC) + timedelta(seconds=100)
    id_ = customer.has(state="pending", next_attempt_at=at, error_code="timeout", error="no answer")

    answer = customer.reads(id_)

    assert (answer.status_code, error(answer)["code"]) == (409, "CONFLICT")
    wanted = {"state": "pending", "error_code": "timeout", "next_attempt_at": at.isoformat()}
    assert error(answer)["details"] == wanted
    assert 60 < int(answer.headers["retry-after"]) <= 102
    assert customer.asks("HEAD", f"{URL}/{id_}").status_code == 409


def test_a_file_that_is_due_or_being_fetched_is_worth_asking_for_soon(customer: Customer) -> None:
    due = customer.reads(customer.has(state="pending", next_attempt_at=datetime.now(UTC) - timedelta(hours=1)))
    soon = datetime.now(UTC) + timedelta(minutes=10)
    fetched = customer.reads(customer.has(state="pending", next_attempt_at=soon, claim_token=uuid4()))

    assert due.headers["retry-after"] == "1"
    assert error(fetched)["details"] == {"state": "pending", "error_code": None, "next_attempt_at": None}
    assert fetched.headers["retry-after"] == "5"


def test_a_file_that_failed_says_why(customer: Customer) -> None:
    id_ = customer.has(state="failed", error_code="expired", error="the provider has forgotten it")

    answer = customer.reads(id_)

    wanted = {"state": "failed", "error_code": "expired", "error": "the provider has forgotten it"}
    assert (answer.status_code, error(answer)["details"]) == (409, wanted)
    assert "retry-after" not in answer.headers


def test_a_message_shows_its_file(customer: Customer) -> None:
    shop, wamids = customer.shop, [a_wamid(), a_wamid()]
    kinds, now = ("image", "text"), int(time.time())
    said = [meta.message(kind, wamid, "5511944440001", now) for kind, wamid in zip(kinds, wamids, strict=True)]
    incoming_message([str(a_delivery(shop, body_of(shop, {"messages": said, "contacts": []})))])
    ids = {row["provider_id"]: row["id"] for row in rows(shop, "SELECT * FROM message WHERE tenant_id = :tenant")}
    look = f"/api/v1/messages/{ids[wamids[0]]}"
    (row,) = customer.media()

    pending = customer.asks("GET", look).json()["media"]
    content = jpeg()
    stored_as = customer.keeps(content)
    (digest,) = [media["digest"] for media in customer.media() if media["id"] == stored_as]
    is_stored = "UPDATE media SET state = 'stored', digest = :digest WHERE id = :id RETURNING id"
    rows(shop, is_stored, digest=digest, id=row["id"])
    stored = customer.asks("GET", look).json()["media"]

    nothing = dict.fromkeys(["bytes", "sha256", "error_code", "error"])
    same = {"id": str(row["id"]), "kind": "image", "filename": row["filename"]}
    assert pending == nothing | same | {"state": "pending", "mime_type": row["mime_type"]}
    now_known = {"state": "stored", "mime_type": "image/jpeg", "bytes": len(content), "sha256": digest.hex()}
    assert stored == nothing | same | now_known
    assert customer.asks("GET", f"/api/v1/messages/{ids[wamids[1]]}").json()["media"] is None
    assert customer.reads(stored["id"]).content == content


def test_a_message_that_sends_an_upload_shows_it(customer: Customer) -> None:
    file = customer.uploaded(png(), filename="box.png")
    asked = {"to": "+5511944440001", "type": "image", "image": {"media_id": file["media_id"]}}
    sent = customer.asks("POST", "/api/v1/messages", json=asked)

    shown = customer.asks("GET", f"/api/v1/messages/{sent.json()['message_id']}").json()["media"]

    assert (shown["id"], shown["state"], shown["filename"]) == (file["media_id"], "stored", "box.png")
    assert shown["sha256"] == file["sha256"]


# ------------------------------------------------------------------------------------------------------------- trouble


def test_a_file_that_is_gone_from_the_storage_is_not_found_and_somebody_hears_of_it(customer: Customer) -> None:
    id_ = customer.keeps(jpeg())
    storage().delete(customer.files()[0]["key"])

    answers = [customer.reads(id_), customer.asks("HEAD", f"{URL}/{id_}")]

    assert [answer.status_code for answer in answers] == [404, 404]
    (line, _) = [one for one in customer.web.lines() if one.get("media_id") == str(id_)]
    assert (line["event"], line["level"]) == ("media_missing", "error")


def test_a_storage_that_is_away_is_a_503(elsewhere: tuple[Web, Path]) -> None:
    web, root = elsewhere
    customer = a_customer(web)
    id_ = customer.uploaded(pdf())["media_id"]
    root.rename(root.with_name("away"))

    away = [customer.reads(id_), customer.asks("HEAD", f"{URL}/{id_}"), customer.uploads(pdf())]
    root.with_name("away").rename(root)

    assert [answer.status_code for answer in away] == [503] * 3
    assert all(answer.headers["retry-after"] == "5" for answer in away)
    assert customer.reads(id_).status_code == 200
    assert [line for line in web.lines() if line["event"] == "media_storage_unavailable"]
    assert str(root) not in web.log()


def test_a_file_that_ends_too_early_is_not_passed_off_as_whole(customer: Customer) -> None:
    id_ = customer.keeps(pdf(20 * MiB))
    path = root_of() / customer.files()[0]["key"]
    with customer.web.wire() as wire:
        wire.send(request("GET", f"{URL}/{id_}", *customer.fields))
        assert wire.socket.recv(1_000).startswith(b"HTTP/1.1 200")
        os.truncate(path, 1 * MiB)

        assert wire.is_closed_by_peer()  # and what came until then is less than was announced

    assert until(lambda: not open_in(customer.web, root_of()), time.monotonic() + 10)
    assert [one for one in customer.web.lines() if one["event"] == "media_cut_short" and one["media_id"] == str(id_)]


def test_a_reader_who_leaves_early_leaves_nothing_open(customer: Customer) -> None:
    id_ = customer.keeps(pdf(30 * MiB))
    for _ in range(5):
        with customer.web.wire() as wire:
            wire.send(request("GET", f"{URL}/{id_}", *customer.fields))
            assert wire.socket.recv(1_000).startswith(b"HTTP/1.1 200")
            assert open_in(customer.web, root_of())

        assert until(lambda: not open_in(customer.web, root_of()), time.monotonic() + 10)
    cut_short = [line for line in customer.web.lines() if line["event"] == "media_cut_short"]
    assert str(id_) not in [line["media_id"] for line in cut_short]


def test_readers_who_do_not_read_fill_no_memory_and_keep_nobody_else_out(customer: Customer, web: Web) -> None:
    id_ = customer.keeps(pdf(30 * MiB))
    customer.reads(id_)
    before = web.memory()
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(web.wire()) for _ in range(32)]
        for wire in wires:
            wire.send(request("GET", f"{URL}/{id_}", *customer.fields))
            assert wire.socket.recv(12) == b"HTTP/1.1 200"
        one_more = customer.reads(id_, Range="bytes=0-0")
        somebody_else = a_customer(web)

        assert somebody_else.reads(somebody_else.keeps(jpeg())).status_code == 200
        assert (one_more.status_code, error(one_more)["code"]) == (429, "RATE_LIMITED")
        assert web.memory() - before < 60 * MiB

    assert until(lambda: customer.reads(id_, Range="bytes=0-0").status_code == 206, time.monotonic() + 10)


def test_who_never_reads_an_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would keep its connection, and the file behind it, for ever."""
    monkeypatch.setattr(web.server, "_UNREAD_SECONDS", 1.0)
    ended: list[bool] = []

    async def endless(request: Request) -> Response:
        return Endless(ended)

    with served(Starlette(routes=[Route("/", endless)])) as port, Wire(port) as wire:
        wire.send(request("GET", "/"))

        assert until(lambda: bool(ended), time.monotonic() + 20)
        with contextlib.suppress(ConnectionError):
            while wire.socket.recv(MiB):
                pass


class Endless(Response):
    """Sends until the reader is gone."""

    def __init__(self, ended: list[bool]) -> None:
        super().__init__()
        self._ended = ended

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()  # the request's own end
        gone = asyncio.create_task(receive())
        while not gone.done():
            await send({"type": "http.response.body", "body": bytes(64 * 1024), "more_body": True})
            await asyncio.sleep(0)
        self._ended.append(True)
