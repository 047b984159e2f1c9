"""Files handed to Graph over real sockets: what leaves, how much of it at a time, and what answers are taken for."""

import asyncio
import email.policy
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from email.message import EmailMessage, MIMEPart
from email.parser import BytesParser
from typing import Any

import pytest

from providers import http
from providers.graph import GraphSender
from providers.outbound import Answer, Attachment, Kind, Outcome
from tests.providers.test_graph import TOKEN, Asked, Writes, a_server, an_answer

PIECE = bytes(range(256)) * 1024
TAKEN = an_answer('{"id":"1037543291543636"}')


async def pieces(*given: bytes) -> AsyncIterator[bytes]:
    for piece in given:
        yield piece


def a_file(*given: bytes, mime_type: str = "image/jpeg") -> Attachment:
    return Attachment(mime_type, sum(map(len, given)), pieces(*given))


async def uploaded(
    url: str, file: Attachment | None = None, *, number: str = "1", token: str = TOKEN, deadline: float | None = 20
) -> Answer:
    clients = http.Clients(1)
    try:
        sender = GraphSender(clients, url, "v25.0", number=number, token=token, deadline=deadline)
        return await sender.upload(file or a_file(b"abc"))
    finally:
        await clients.close()


@asynccontextmanager
async def a_strange_server(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """One that does with a connection whatever it likes."""
    serving: set[asyncio.Task[Any]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if task := asyncio.current_task():
            serving.add(task)
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client, or the test, has heard enough
        finally:
            writer.transport.abort()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving)
        await asyncio.sleep(0)  # closed connections are let go of in the loop's next round


def heard(*answers: bytes | Writes, file: Callable[[], Attachment] = a_file, **more: Any) -> tuple[Answer, list[Asked]]:
    """What an upload is taken for when the server says this, and the requests it got."""

    async def run() -> tuple[Answer, list[Asked]]:
        async with a_server(*answers) as (url, asked):
            return await uploaded(url, file(), **more), asked

    return asyncio.run(run())


def form(asked: Asked) -> dict[str, MIMEPart]:
    """The parts of a form, by name."""
    head = f"Content-Type: {asked.headers['content-type']}\r\n\r\n".encode()
    parsed = BytesParser(EmailMessage, policy=email.policy.HTTP).parsebytes(head + asked.body)
    assert not parsed.defects
    return {str(part.get_param("name", header="content-disposition")): part for part in parsed.iter_parts()}


# -- what leaves -----------------------------------------------------------------------------------------------------


def test_a_file_leaves_as_graph_wants_it_and_without_a_name_of_its_own() -> None:
    answer, (asked,) = heard(TAKEN, file=lambda: a_file(PIECE, b"\r\n--", PIECE), number="880011223344556")

    parts = form(asked)
    assert answer == Answer(Outcome.ACCEPTED, provider_id="1037543291543636", http_status=200)
    assert asked.line == "POST /v25.0/880011223344556/media HTTP/1.1"
    assert asked.headers["authorization"] == f"Bearer {TOKEN}"
    assert (asked.headers["content-length"], "transfer-encoding" in asked.headers) == (str(len(asked.body)), False)
    assert list(parts) == ["messaging_product", "type", "file"]
    assert parts["messaging_product"].get_payload() == "whatsapp"
    assert parts["type"].get_payload() == "image/jpeg"
    assert (parts["file"].get_content_type(), parts["file"].get_filename()) == ("image/jpeg", "file.jpg")
    assert parts["file"].get_payload(decode=True) == PIECE + b"\r\n--" + PIECE


@pytest.mark.parametrize(
    ("mime_type", "name"),
    [
        ("audio/ogg", "file.ogg"),
        ("application/vnd.openxmlformats-officedocument.wordprocessingml.document", "file.docx"),
        ("text/plain", "file.txt"),
        ("application/x-unheard-of", "file.bin"),
    ],
)
def test_its_name_is_what_its_type_makes_it(mime_type: str, name: str) -> None:
    _, (asked,) = heard(TAKEN, file=lambda: a_file(b"abc", mime_type=mime_type))

    assert (form(asked)["file"].get_filename(), form(asked)["type"].get_payload()) == (name, mime_type)


def test_no_more_of_it_is_read_than_the_provider_takes() -> None:
    asked_for = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal asked_for
        for _ in range(400):
            asked_for += 1
            yield PIECE

    async def hears_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.get_running_loop().create_future()

    async def run() -> Answer:
        async with a_strange_server(hears_nothing) as url:
            return await uploaded(url, Attachment("video/mp4", 400 * len(PIECE), endless()), deadline=1.5)

    answer = asyncio.run(run())

    assert answer.outcome is Outcome.REFUSED
    assert 0 < asked_for < 200


def test_without_a_token_nothing_leaves() -> None:
    answer, asked = heard(TAKEN, token="")

    assert (answer.outcome, asked) == (Outcome.REFUSED, [])
    assert answer.fault is not None
    assert (answer.fault.kind, answer.fault.code) == (Kind.AUTH, "no_token")


class Trouble(Exception):
    """With the file itself."""


def test_what_goes_wrong_with_the_file_itself_comes_out_as_it_is() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"abc"
        raise Trouble

    with pytest.raises(Trouble):
        heard(TAKEN, file=lambda: Attachment("image/jpeg", 10_000, broken()))


# -- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        '{"id":null}',
        '{"id":7}',
        '{"id":""}',
        '{"id":"a\\u0000b"}',
        '{"id":"' + "x" * 513 + '"}',
        '{"error":"no object"}',
        "<html></html>",
    ],
    ids=lambda body: repr(body[:30]),
)
def test_an_answer_without_an_id_is_a_failure_that_may_pass(body: str) -> None:
    answer, _ = heard(an_answer(body))

    assert (answer.outcome, answer.provider_id, answer.http_status) == (Outcome.REFUSED, None, 200)
    assert answer.fault is not None
    assert (answer.fault.kind, answer.fault.code, answer.fault.is_outage) == (Kind.TRANSIENT, "upload_failed", True)


@pytest.mark.parametrize("status", ["500 Oops", "502 Bad Gateway", "503 Unavailable"])
@pytest.mark.parametrize("body", ["", "<html>Sorry</html>", '{"id":"1"}'])
def test_so_is_a_page_of_some_machine_on_the_way(status: str, body: str) -> None:
    answer, _ = heard(an_answer(body, status))

    assert (answer.outcome, answer.http_status) == (Outcome.REFUSED, int(status[:3]))
    assert answer.fault is not None
    assert answer.fault.kind is Kind.TRANSIENT


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        ("400 No", {"code": 131053, "message": "(#131053) Media upload error"}, (Kind.PERMANENT, "131053")),
        ("400 No", {"code": 100}, (Kind.PERMANENT, "100")),
        ("401 No", {"code": 190}, (Kind.AUTH, "190")),
        ("429 Slow", {"code": 130429}, (Kind.THROTTLE, "130429")),
        ("500 Oops", {"code": 131000}, (Kind.TRANSIENT, "131000")),
        ("200 OK", {"code": 131026}, (Kind.PERMANENT, "131026")),
    ],
)
def test_graphs_own_refusal_goes_by_its_code(status: str, error: dict[str, Any], expected: tuple[Kind, str]) -> None:
    answer, _ = heard(an_answer(json.dumps({"error": error}), status))

    assert answer.outcome is Outcome.REFUSED
    assert answer.fault is not None
    assert (answer.fault.kind, answer.fault.code) == expected
    assert not answer.fault.is_about_file


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Elsewhere"])
def test_a_redirect_is_not_followed(status: str) -> None:
    answer, asked = heard(an_answer("", status, location="http://127.0.0.1:9/"))

    assert (answer.outcome, len(asked)) == (Outcome.REFUSED, 1)
    assert answer.fault is not None
    assert answer.fault.code == f"http_{status[:3]}"


def test_a_refusal_is_heard_although_the_file_was_not_taken() -> None:
    """Who knows the token is bad need not read a hundred megabytes."""

    async def refuses(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(an_answer('{"error":{"code":190}}', "401 No", connection="close"))
        await writer.drain()
        while await reader.read(2**16):
            pass

    async def run() -> Answer:
        async with a_strange_server(refuses) as url:
            return await uploaded(url, a_file(*[PIECE] * 100, mime_type="video/mp4"))

    answer = asyncio.run(run())

    assert answer.fault is not None
    assert (answer.http_status, answer.fault.kind) == (401, Kind.AUTH)


def test_no_connection_is_no_upload() -> None:
    answer = asyncio.run(uploaded("http://127.0.0.1:9"))

    assert (answer.outcome, answer.fault) == (Outcome.NOT_SENT, None)


async def closes(writer: asyncio.StreamWriter) -> None:
    writer.close()


async def hangs(writer: asyncio.StreamWriter) -> None:
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("answer", [closes, hangs], ids=["closed", "silent"])
def test_silence_is_a_failure_that_may_pass(answer: Writes) -> None:
    told, _ = heard(answer, deadline=1.0)

    assert told.outcome is Outcome.REFUSED
    assert told.fault is not None
    assert (told.fault.kind, told.fault.code, told.fault.tries > 1) == (Kind.TRANSIENT, "upload_failed", True)
