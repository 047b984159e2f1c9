"""Calls to Graph over real sockets: what leaves, and what every odd answer is taken for."""

import asyncio
import gzip
import json
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest

from pombal.errors import Permanent, Rejected, Temporary, Unreachable
from providers import graph, http
from providers.graph import GraphSender, payload
from providers.outbound import Answer, Kind, Outcome, Outgoing, Scope
from sandbox import client
from sandbox.config import Channel, Template
from tests.sandbox.servers import a_meta

TOKEN = "EAAB-a-token-that-nobody-may-see"
SHOP = Channel("shop", "880011223344556", "700100200300400", "5511955550199", TOKEN)
CUSTOMER = "+5511944440001"
BSUID = "BR.90000000000000001"
CALLBACK = "out:0198c0de0198c0de0198c0de0198c0de"
JSON = "application/json"


def a_text(text: str = "Olá", *, to: str | None = CUSTOMER, **more: Any) -> Outgoing:
    return Outgoing("text", {"text": {"body": text}, **more}, to, CALLBACK)


def a_receipt(**more: Any) -> Outgoing:
    return Outgoing("read", {"read": {"message_id": "wamid.IN", **more}}, None, CALLBACK)


# -- a server that says anything -------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A request that came in."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.line.split(" ")[1]).query)


Writes = Callable[[asyncio.StreamWriter], Awaitable[None]]


def an_answer(body: bytes | str = b"", status: str = "200 OK", **headers: str) -> bytes:
    raw = body.encode() if isinstance(body, str) else body
    given = {"content-length": str(len(raw)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + raw


@asynccontextmanager
async def a_server(*answers: bytes | Writes) -> AsyncIterator[tuple[str, list[Asked]]]:
    """Answers each request with the next of these, the last one again and again; then closes the connection."""
    asked: list[Asked] = []
    left = list(answers)
    serving: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if task := asyncio.current_task():
            serving.add(task)
        try:
            await say(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client, or the test, has heard enough
        finally:
            writer.close()

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.readexactly(1)
        if first == b"\x16":
            return  # TLS
        head = (first + await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = head.strip().split("\r\n")
        headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
        asked.append(Asked(line, headers, await reader.readexactly(int(headers.get("content-length", "0")))))
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, bytes):
            writer.write(answer)
        else:
            await answer(writer)
        await writer.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving)
        await asyncio.sleep(0)  # closed connections are let go of in the loop's next round


async def sent(url: str, message: Outgoing, *, number: str = "1", token: str = TOKEN, deadline: float = 20) -> Answer:
    clients = http.Clients(1)
    try:
        sender = GraphSender(clients, url, "v25.0", number=number, token=token, deadline=deadline)
        return await sender.send(message)
    finally:
        await clients.close()


def heard(*answers: bytes | Writes, message: Outgoing | None = None, **more: Any) -> tuple[Answer, list[Asked]]:
    """What a send is taken for when the server says this, and the requests it got."""

    async def run() -> tuple[Answer, list[Asked]]:
        async with a_server(*answers) as (url, asked):
            return await sent(url, message or a_text(), **more), asked

    return asyncio.run(run())


def taken_for(*answers: bytes | Writes, **more: Any) -> Answer:
    return heard(*answers, **more)[0]


ACCEPTED = an_answer(json.dumps({"messages": [{"id": "wamid.OUT"}]}))

# -- what leaves -----------------------------------------------------------------------------------------------------

BODIES: dict[str, Any] = {
    "text": {"body": "Olá", "preview_url": False},
    "image": {"id": "1", "caption": "a"},
    "video": {"link": "https://files.invalid/a.mp4"},
    "audio": {"id": "1", "voice": True},
    "document": {"link": "https://files.invalid/a.pdf", "filename": "a.pdf"},
    "sticker": {"id": "1"},
    "location": {"latitude": -23.5, "longitude": -46.6, "name": "Loja"},
    "contacts": [{"name": {"formatted_name": "Bia", "first_name": "Bia"}}],
    "reaction": {"message_id": "wamid.IN", "emoji": ""},
    "interactive": {"type": "button", "body": {"text": "?"}, "action": {"buttons": []}},
    "template": {"name": "pedido", "language": {"code": "pt_BR"}},
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_message_of_each_type_leaves_as_graph_wants_it(kind: str) -> None:
    assert payload(Outgoing(kind, {kind: BODIES[kind]}, CUSTOMER, CALLBACK)) == {
        "messaging_product": "whatsapp",
        "recipient_type": "individual",
        "to": "+5511944440001",
        "type": kind,
        kind: BODIES[kind],
        "biz_opaque_callback_data": CALLBACK,
    }


def test_an_answer_names_the_message_it_answers() -> None:
    assert payload(a_text(context={"message_id": "wamid.IN"}))["context"] == {"message_id": "wamid.IN"}


def test_a_bsuid_goes_where_it_is_heard_of_again() -> None:
    asked = payload(a_text(to=BSUID))

    assert asked["recipient"] == BSUID
    assert "to" not in asked


def test_a_receipt_names_nobody_and_carries_nothing_of_ours() -> None:
    expected = {"messaging_product": "whatsapp", "status": "read", "message_id": "wamid.IN"}

    assert payload(a_receipt()) == expected
    assert payload(a_receipt(typing_indicator={"type": "text"})) == expected | {"typing_indicator": {"type": "text"}}


def test_the_call_carries_the_token_and_the_body_and_asks_for_a_plain_answer() -> None:
    _, (asked,) = heard(ACCEPTED, number="880011223344556")

    assert asked.line == "POST /v25.0/880011223344556/messages HTTP/1.1"
    assert asked.headers["authorization"] == f"Bearer {TOKEN}"
    assert asked.headers["content-type"] == JSON
    assert asked.headers["accept-encoding"] == "identity"
    assert json.loads(asked.body) == payload(a_text())


@pytest.mark.parametrize(
    ("number", "path"),
    [
        ("a/../b", "a%2F..%2Fb"),
        ("../me", "..%2Fme"),
        ("1?x=y", "1%3Fx%3Dy"),
        ("1#2", "1%232"),
        ("1\r\nHost: evil", "1%0D%0AHost%3A%20evil"),
        ("número", "n%C3%BAmero"),
    ],
)
def test_an_id_never_changes_the_path(number: str, path: str) -> None:
    _, (asked,) = heard(ACCEPTED, number=number)

    assert asked.line == f"POST /v25.0/{path}/messages HTTP/1.1"


def test_without_a_token_nothing_leaves() -> None:
    answer, asked = heard(ACCEPTED, token="")

    assert asked == []
    assert answer.outcome is Outcome.REFUSED
    assert answer.fault is not None
    assert (answer.fault.kind, answer.fault.scope) == (Kind.AUTH, Scope.CHANNEL)


# -- what comes back -------------------------------------------------------------------------------------------------


def test_an_accepted_message_has_an_id_and_a_recipient_by_other_names() -> None:
    contact = {"input": CUSTOMER, "wa_id": "551144440001", "user_id": BSUID}
    body = {"messaging_product": "whatsapp", "contacts": [contact], "messages": [{"id": "wamid.OUT"}]}

    answer = taken_for(an_answer(json.dumps(body)))

    assert answer == Answer(
        Outcome.ACCEPTED,
        provider_id="wamid.OUT",
        identities=(("bsuid", BSUID), ("phone", "551144440001")),
        http_status=200,
    )


@pytest.mark.parametrize(
    "contacts", [None, [], {}, "x", [None], ["x"], [{}], [{"wa_id": 5}], [{"wa_id": ""}], [{"wa_id": "a\0b"}]]
)
def test_what_is_odd_about_the_recipient_does_not_make_a_sent_message_unsent(contacts: Any) -> None:
    answer = taken_for(an_answer(json.dumps({"contacts": contacts, "messages": [{"id": "wamid.OUT"}]})))

    assert (answer.outcome, answer.provider_id, answer.identities) == (Outcome.ACCEPTED, "wamid.OUT", ())


def test_a_receipt_is_taken_without_an_id() -> None:
    answer = taken_for(an_answer('{"success":true}'), message=a_receipt())

    assert (answer.outcome, answer.provider_id) == (Outcome.ACCEPTED, None)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        '{"messages":[{"id":"wamid.',
        "null",
        "[]",
        "7",
        "{}",
        '{"messages":[]}',
        '{"messages":{}}',
        '{"messages":[null]}',
        '{"messages":["wamid.OUT"]}',
        '{"messages":[{}]}',
        '{"messages":[{"id":null}]}',
        '{"messages":[{"id":""}]}',
        '{"messages":[{"id":7}]}',
        '{"messages":[{"id":"a\\u0000b"}]}',
        '{"messages":[{"id":"' + "x" * 513 + '"}]}',
        '{"success":false}',
        '{"success":"true"}',
        '{"error":"no object"}',
        '{"error":[]}',
        "<html></html>",
        "[" * 100_000,
        b"\xff\xfe\x00",
        '{"messages":[{"id":"\\ud800"}]}',
    ],
    ids=lambda body: repr(body[:40]),
)
def test_a_200_without_a_message_id_leaves_open_what_became_of_the_message(body: str | bytes) -> None:
    answer = taken_for(an_answer(body))

    assert (answer.outcome, answer.http_status, answer.fault) == (Outcome.UNKNOWN, 200, None)


@pytest.mark.parametrize("status", ["500 Oops", "502 Bad Gateway", "503 Unavailable", "504 Timeout"])
@pytest.mark.parametrize("body", ["", "<html>Sorry</html>", '{"error":"no object"}', "{}"])
def test_a_page_of_some_machine_on_the_way_leaves_it_open_too(status: str, body: str) -> None:
    answer = taken_for(an_answer(body, status))

    assert (answer.outcome, answer.http_status) == (Outcome.UNKNOWN, int(status[:3]))


def test_graphs_own_5xx_is_a_refusal() -> None:
    error = {"message": "(#131000) Something went wrong", "code": 131000, "fbtrace_id": "A1"}

    answer = taken_for(an_answer(json.dumps({"error": error}), "500 Oops"))

    assert answer.outcome is Outcome.REFUSED
    assert answer.fault is not None
    assert (answer.fault.kind, answer.fault.code, answer.trace_id) == (Kind.TRANSIENT, "131000", "A1")


def test_an_error_beside_a_200_is_an_error() -> None:
    answer = taken_for(an_answer('{"error":{"code":131026}}'))

    assert answer.outcome is Outcome.REFUSED
    assert answer.fault is not None
    assert (answer.fault.kind, answer.fault.code) == (Kind.PERMANENT, "131026")


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        ("400 No", "<html>", Kind.TRANSIENT),
        ("404 No", "", Kind.TRANSIENT),
        ("408 Late", "<html>", Kind.TRANSIENT),
        ("400 No", "{}", Kind.PERMANENT),
        ("401 No", "<html>", Kind.AUTH),
        ("403 No", "", Kind.AUTH),
        ("429 Slow", "<html>", Kind.THROTTLE),
    ],
)
def test_a_refusal_that_is_not_graphs_goes_by_its_status(status: str, body: str, expected: Kind) -> None:
    answer = taken_for(an_answer(body, status))

    assert answer.outcome is Outcome.REFUSED
    assert answer.fault is not None
    assert (answer.fault.kind, answer.fault.code) == (expected, f"http_{status[:3]}")


def test_retry_after_comes_with_the_fault() -> None:
    answer = taken_for(an_answer('{"error":{"code":80007}}', "400 No", retry_after="600"))

    assert answer.fault is not None
    assert (answer.fault.scope, answer.fault.wait) == (Scope.WABA, 600)


@pytest.mark.parametrize("trace", [None, 7, [], "x" * 10_000, "a\0b"])
def test_a_trace_id_of_any_shape_can_be_stored(trace: Any) -> None:
    error = {"code": 190, "message": "no", "fbtrace_id": trace}

    kept = taken_for(an_answer(json.dumps({"error": error}), "401 No")).trace_id

    assert kept is None or (len(kept) <= 64 and "\0" not in kept)


def test_a_redirect_is_not_followed_and_the_token_stays() -> None:
    async def run() -> tuple[Answer, list[Asked], list[Asked]]:
        async with a_server(ACCEPTED) as (elsewhere, there):
            for_it = an_answer("", "307 Moved", location=f"{elsewhere}/v25.0/1/messages")
            async with a_server(for_it) as (url, here):
                return await sent(url, a_text()), here, there

    answer, here, there = asyncio.run(run())

    assert len(here) == 1
    assert there == []
    assert answer.outcome is Outcome.REFUSED
    assert answer.fault is not None
    assert (answer.fault.kind, answer.fault.code) == (Kind.TRANSIENT, "http_307")


def test_an_answer_over_the_limit_is_not_read_to_its_end() -> None:
    written = 0

    async def endless(writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
            await writer.drain()
            written += 65_536

    answer = taken_for(endless)

    assert (answer.outcome, answer.http_status) == (Outcome.UNKNOWN, 200)
    assert written < 32 * http.MOST_BYTES  # what it takes to fill the buffers between them


def test_an_encoded_answer_is_not_decoded() -> None:
    bomb = gzip.compress(b"x" * 50_000_000)

    answer = taken_for(an_answer(bomb, content_encoding="gzip"))

    assert (answer.outcome, answer.why) == (Outcome.UNKNOWN, "an encoded answer")


def test_an_answer_that_drips_ends_at_the_deadline() -> None:
    dripped = 0

    async def drip(writer: asyncio.StreamWriter) -> None:
        nonlocal dripped
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            dripped += 1
            await asyncio.sleep(0.05)

    answer = taken_for(drip, deadline=1.5)

    assert (answer.outcome, answer.why) == (Outcome.UNKNOWN, "no answer in time")
    assert 0 < dripped < 1_000


def test_silence_ends_at_the_deadline() -> None:
    async def silence(writer: asyncio.StreamWriter) -> None:
        await asyncio.get_running_loop().create_future()

    assert taken_for(silence, deadline=1.5).outcome is Outcome.UNKNOWN


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x-padding: " + b"x" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 99 No\r\n\r\n",
    ],
    ids=lambda raw: repr(raw[:30]),
)
def test_what_is_no_http_leaves_it_open(raw: bytes) -> None:
    assert taken_for(raw).outcome is Outcome.UNKNOWN


def test_a_call_that_found_nobody_was_not_sent() -> None:
    async def run() -> Answer:
        async with a_server(b"") as (url, _):
            pass
        return await sent(url, a_text())

    answer = asyncio.run(run())

    assert (answer.outcome, answer.why) == (Outcome.NOT_SENT, "ConnectError")


def test_a_call_that_does_not_speak_tls_was_not_sent() -> None:
    async def run() -> Answer:
        async with a_server(b"HTTP/1.1 400 No\r\n\r\n") as (url, _):
            return await sent(url.replace("http:", "https:"), a_text())

    assert asyncio.run(run()).outcome is Outcome.NOT_SENT


# -- against the sandbox, whose journal tells what was accepted ------------------------------------------------------


@pytest.fixture(scope="module")
def running() -> Iterator[str]:
    with a_meta(SHOP) as url:
        yield url


@pytest.fixture
def meta(running: str) -> str:
    """A simulated Meta as good as new."""
    client.clear_faults(running)
    client.clear_calls(running)
    return running


@pytest.mark.parametrize(
    ("kind", "expected", "is_accepted"),
    [
        ("hang_before", Outcome.UNKNOWN, False),
        ("hang_after", Outcome.UNKNOWN, True),
        ("reset_before", Outcome.UNKNOWN, False),
        ("reset_after", Outcome.UNKNOWN, True),
        ("garbage_before", Outcome.UNKNOWN, False),
        ("garbage_after", Outcome.UNKNOWN, True),
        ("html", Outcome.UNKNOWN, False),
        ("html_after", Outcome.UNKNOWN, True),
        ("empty", Outcome.UNKNOWN, True),
        ("drip", Outcome.UNKNOWN, True),
        ("huge", Outcome.UNKNOWN, True),
        ("gzip", Outcome.UNKNOWN, True),
        ("redirect", Outcome.REFUSED, False),
        ("outage", Outcome.UNKNOWN, False),
        ("code", Outcome.REFUSED, False),
    ],
)
def test_no_answer_is_taken_for_a_word_on_what_became_of_the_message(
    meta: str, kind: str, expected: Outcome, is_accepted: bool
) -> None:
    client.faults(meta, kind=kind)
    deadline = 1.5 if kind in ("hang_before", "hang_after", "drip") else 20.0  # for what would never end

    answer = asyncio.run(sent(meta, a_text(), number=SHOP.phone_number_id, deadline=deadline))

    (call,) = client.calls(meta)["calls"]
    assert answer.outcome is expected
    assert (call["outcome"] == "accepted") is is_accepted
    assert call["callback"] == CALLBACK


# -- templates -------------------------------------------------------------------------------------------------------


async def listed(url: str, *, waba: str = SHOP.waba_id, token: str = TOKEN) -> list[tuple[str, str, str]]:
    async with http.new_client() as its:
        found = await graph.templates(its, url, "v25.0", waba_id=waba, token=token)
    return [(one.name, one.language, one.status) for one in found]


def listed_from(*answers: bytes | Writes, **more: Any) -> tuple[list[tuple[str, str, str]], list[Asked]]:
    async def run() -> tuple[list[tuple[str, str, str]], list[Asked]]:
        async with a_server(*answers) as (url, asked):
            return await listed(url, **more), asked

    return asyncio.run(run())


def a_page(*names: str, after: str | None = None, next_: str | None = None) -> bytes:
    data = [{"name": name, "language": "pt_BR", "status": "APPROVED", "category": "UTILITY"} for name in names]
    paging = {"cursors": {"before": "b", "after": after}, **({"next": next_} if next_ else {})}
    return an_answer(json.dumps({"data": data, "paging": paging}))


def test_templates_are_read_page_by_page() -> None:
    templates = tuple(Template(f"t{n}", "pt_BR", status="PAUSED" if n % 7 == 0 else "APPROVED") for n in range(250))
    channel = Channel("many", "880011223344557", "700100200300401", "5511955550198", TOKEN, templates)

    with a_meta(channel) as url:
        found = asyncio.run(listed(url, waba=channel.waba_id))

    assert found == [(one.name, one.language, one.status.lower()) for one in templates]


def test_the_next_page_is_asked_for_by_its_cursor_wherever_its_address_leads() -> None:
    pages = (a_page("a", after="c=1&x", next_="http://evil.invalid/steal"), a_page("b", after="z"))

    found, asked = listed_from(*pages, waba="7/../8")

    assert [name for name, _, _ in found] == ["a", "b"]
    assert [request.query.get("after") for request in asked] == [None, ["c=1&x"]]
    assert all(request.line.startswith("GET /v25.0/7%2F..%2F8/message_templates?") for request in asked)


def test_a_list_without_an_end_is_given_up() -> None:
    with pytest.raises(Rejected):
        listed_from(a_page("a", after="again", next_="http://there.invalid/"))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (an_answer('{"error":{"code":190}}', "401 No"), Permanent),
        (an_answer('{"error":{"code":100}}', "400 No"), Permanent),
        (an_answer('{"error":{"code":80007}}', "400 No"), Temporary),
        (an_answer('{"error":{"code":2}}', "503 No"), Temporary),
        (an_answer("{}", "503 No"), Temporary),
        (an_answer("<html>", "502 No"), Temporary),
        (an_answer("", "302 Moved", location="http://evil.invalid/"), Rejected),
        (an_answer("{"), Rejected),
        (an_answer("{}"), Rejected),
        (an_answer('{"data":{}}'), Rejected),
        (an_answer('{"data":[{"name":"a"}]}'), Rejected),
        (an_answer('{"data":[null]}'), Rejected),
        (an_answer("x" * 2_000_000), Unreachable),
        (b"", Unreachable),
    ],
)
def test_a_list_that_did_not_come_says_whether_to_ask_again(answer: bytes, error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        listed_from(answer)

    assert TOKEN not in "".join(traceback.format_exception(raised.value))


def test_no_answer_shows_the_token() -> None:
    answers = [
        taken_for(an_answer('{"error":{"code":190,"message":"no"}}', "401 No")),
        taken_for(b""),
        taken_for(an_answer("<html>", "502 No")),
    ]

    assert TOKEN not in repr(answers)
