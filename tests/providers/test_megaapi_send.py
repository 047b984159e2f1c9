"""Messages to MegaAPI, over real sockets: what leaves, and what every odd answer is taken for."""

import asyncio
import base64
import json
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest

import providers
from pombal.errors import Permanent
from providers.graph import GraphSender
from providers.megaapi_send import MegaSender
from providers.outbound import Answer, Attachment, Kind, Outcome, Outgoing, Quoted, Scope
from tests.providers.test_graph import Asked, Writes, a_server, an_answer
from tests.providers.test_graph_upload import a_strange_server
from tests.providers.test_megaapi import KEY, PAGE, TOKEN, says, some_clients

CUSTOMER = "+5511944440001"
JID = "5511944440001@s.whatsapp.net"
GROUP = "120363000000000001@g.us"
ACCEPTED = says(
    {"error": False, "message": "Message sent", "messageData": {"key": {"id": "3EB0AA11"}, "status": "PENDING"}}
)


def an_outgoing(type_: str, element: Any, *, to: str | None = CUSTOMER, **more: Any) -> Outgoing:
    body = {type_: element, **more.pop("body", {})}
    return Outgoing(type_, body, to, "out:1", **more)


def a_text(text: str = "Olá", **more: Any) -> Outgoing:
    return an_outgoing("text", {"body": text}, **more)


async def pieces(*given: bytes) -> AsyncIterator[bytes]:
    for piece in given:
        yield piece


def a_file(*given: bytes, mime_type: str = "image/jpeg") -> Attachment:
    return Attachment(mime_type, sum(map(len, given)), pieces(*given))


def heard(
    *answers: bytes | Writes, message: Outgoing | None = None, key: str = KEY, token: str = TOKEN, deadline: float = 20
) -> tuple[Answer, list[Asked]]:
    """What a send is taken for when the server says this, and the requests it got."""

    async def run() -> tuple[Answer, list[Asked]]:
        async with a_server(*answers) as (url, asked), some_clients() as clients:
            sender = MegaSender(clients, url, key, token, deadline=deadline)
            return await sender.send(message or a_text()), asked

    return asyncio.run(run())


def taken_for(*answers: bytes | Writes, **more: Any) -> Answer:
    return heard(*answers, **more)[0]


def asked_with(message: Outgoing) -> tuple[str, Any]:
    """Path and `messageData` of a message that is taken."""
    answer, (asked,) = heard(ACCEPTED, message=message)
    assert answer.outcome is Outcome.ACCEPTED
    assert asked.headers["authorization"] == f"Bearer {TOKEN}"
    assert asked.headers["user-agent"] == "pombal"
    assert asked.headers["content-type"] == "application/json"
    method, target, _ = asked.line.split(" ")
    (name, data), *more = json.loads(asked.body).items()
    assert (method, name, more) == ("POST", "messageData", [])
    return target.replace(KEY, "{key}"), data


# -- what leaves -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("element", "data"),
    [
        ({"body": "Olá\n\"'\u2028"}, {"to": JID, "text": "Olá\n\"'\u2028"}),
        ({"body": "a", "preview_url": True}, {"to": JID, "text": "a", "linkPreview": True}),
        ({"body": "a", "preview_url": False}, {"to": JID, "text": "a", "linkPreview": False}),
    ],
)
def test_a_text_goes_as_it_is(element: Any, data: Any) -> None:
    assert asked_with(an_outgoing("text", element)) == ("/rest/sendMessage/{key}/text", data)


@pytest.mark.parametrize(
    ("recipient", "to"),
    [(CUSTOMER, JID), (GROUP, GROUP), ("98765432109876@lid", "98765432109876@lid"), (JID, JID)],
)
def test_a_recipient_is_a_jid(recipient: str, to: str) -> None:
    assert asked_with(a_text(to=recipient))[1]["to"] == to


@pytest.mark.parametrize(
    "recipient", [None, "", "5511944440001", "+", "+55x", "BR.1", "a b@g.us", "a@b@c", '"@g.us', "+55\n"]
)
def test_a_recipient_that_is_none_is_refused_here(recipient: str | None) -> None:
    answer, asked = heard(ACCEPTED, message=a_text(to=recipient))

    assert answer.fault is not None
    assert (answer.outcome, answer.fault.kind, asked) == (Outcome.REFUSED, Kind.PERMANENT, [])


@pytest.mark.parametrize(
    ("type_", "element", "data"),
    [
        (
            "image",
            {"link": "https://a.example/b/Foto%20um.png?x=1", "caption": "Oi"},
            {"fileName": "Foto um.png", "mimeType": "image/png", "caption": "Oi"},
        ),
        ("image", {"link": "https://a.example/b"}, {"fileName": "file.jpg", "mimeType": "image/jpeg"}),
        ("video", {"link": "https://a.example/a.mp4"}, {"fileName": "a.mp4", "mimeType": "video/mp4"}),
        ("audio", {"link": "https://a.example/"}, {"fileName": "file.ogg", "mimeType": "audio/ogg; codecs=opus"}),
        ("audio", {"link": "https://a/a.mp3", "voice": True}, {"fileName": "a.mp3", "mimeType": "audio/mpeg"}),
        (
            "document",
            {"link": "https://a.example/x.pdf", "filename": "../Nota\r\nfiscal.pdf"},
            {"fileName": "_Nota_fiscal.pdf", "mimeType": "application/pdf"},
        ),
        (
            "document",
            {"link": "https://[", "mime_type": "image/png"},
            {"fileName": "file.png", "mimeType": "image/png"},
        ),
        ("document", {"link": "https://a/x.zzz9"}, {"fileName": "x.zzz9", "mimeType": "application/octet-stream"}),
    ],
)
def test_a_file_by_link(type_: str, element: Any, data: Any) -> None:
    expected = {"to": JID, "type": type_, "url": element["link"], "caption": "", **data}

    assert asked_with(an_outgoing(type_, element)) == ("/rest/sendMessage/{key}/mediaUrl", expected)


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1000])
def test_a_file_of_ours_goes_along_byte_for_byte(cut: int) -> None:
    content = bytes(range(256)) * 5
    file = a_file(*(content[at : at + cut] for at in range(0, len(content), cut)), mime_type="image/png")

    path, data = asked_with(an_outgoing("image", {"caption": 'a "b"'}, attachment=file))

    assert path == "/rest/sendMessage/{key}/mediaBase64"
    assert base64.b64decode(data.pop("base64"), validate=True) == content
    assert data == {"to": JID, "type": "image", "caption": 'a "b"', "fileName": "file.png", "mimeType": "image/png"}


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4])
def test_its_length_is_told_exactly(size: int) -> None:
    file = a_file(b"x" * size, mime_type="application/pdf")

    _, data = asked_with(an_outgoing("document", {"filename": "a.pdf"}, attachment=file))

    assert (base64.b64decode(data["base64"]), data["fileName"]) == (b"x" * size, "a.pdf")


def test_a_large_file_is_never_whole_in_memory() -> None:
    size, part = 50_000_000, b"\xa5" * 1_000_000
    came = 0

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield part

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal came
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while came < length:
            came += len(await reader.read(65_536))
        writer.write(ACCEPTED)
        await writer.drain()

    async def run() -> tuple[Answer, int]:
        async with a_strange_server(serve) as url, some_clients() as clients:
            sender = MegaSender(clients, url, KEY, TOKEN)
            tracemalloc.start()
            try:
                message = an_outgoing("video", {}, attachment=Attachment("video/mp4", size, parts()))
                return await sender.send(message), tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    answer, peak = asyncio.run(run())

    assert answer.outcome is Outcome.ACCEPTED
    assert came > size // 3 * 4
    assert peak < 10_000_000


def test_what_the_file_raises_comes_out_as_it_is() -> None:
    class Gone(Exception):
        pass

    async def breaks() -> AsyncIterator[bytes]:
        yield b"abc"
        raise Gone

    with pytest.raises(Gone):
        taken_for(ACCEPTED, message=an_outgoing("image", {}, attachment=Attachment("image/png", 6, breaks())))


def test_a_place_and_a_card() -> None:
    place = {"latitude": -23.5, "longitude": -46.6, "name": "Loja", "address": "Rua A, 1"}
    card = {
        "name": {"formatted_name": "Bia Souza", "first_name": "Bia"},
        "phones": [{"phone": "+55 (11) 94444-0001", "type": "CELL"}],
        "org": {"company": "Loja"},
    }

    assert asked_with(an_outgoing("location", place)) == (
        "/rest/sendMessage/{key}/location",
        {"to": JID, "address": "Rua A, 1", "caption": "Loja", "latitude": -23.5, "longitude": -46.6},
    )
    assert asked_with(an_outgoing("contacts", [card])) == (
        "/rest/sendMessage/{key}/contactMessage",
        {
            "to": JID,
            "vcard": {
                "fullName": "Bia Souza",
                "displayName": "Bia Souza",
                "organization": "Loja",
                "phoneNumber": "5511944440001",
            },
        },
    )


@pytest.mark.parametrize(
    ("type_", "body", "shown"),
    [
        ("text", {"text": {"body": "Quanto?"}}, {"conversation": "Quanto?"}),
        (
            "image",
            {"image": {"caption": "a", "mime_type": "image/png", "sha256": "x"}},
            {"imageMessage": {"mimetype": "image/png", "caption": "a"}},
        ),
        ("document", {"document": {"filename": "a.pdf"}}, {"documentMessage": {"fileName": "a.pdf"}}),
        ("voice", {"voice": {"mime_type": "audio/ogg"}}, {"audioMessage": {"mimetype": "audio/ogg"}}),
        (
            "location",
            {"location": {"latitude": 0, "longitude": 1.5}},
            {"locationMessage": {"degreesLatitude": 0, "degreesLongitude": 1.5}},
        ),
        ("pollCreationMessage", {"pollCreationMessage": {"name": "?"}}, {"conversation": ""}),
        ("text", {}, {"conversation": ""}),
    ],
)
def test_an_answer_carries_what_it_answers(type_: str, body: Any, shown: Any) -> None:
    quoted = Quoted("3EB0IN", False, "5511933330001@s.whatsapp.net", type_, body)
    message = a_text("Dez", to=GROUP, quoted=quoted, body={"context": {"message_id": "3EB0IN"}})

    path, data = asked_with(message)

    assert path == "/rest/sendMessage/{key}/quoteMessage"
    assert data == {
        "to": GROUP,
        "text": "Dez",
        "key": {"remoteJid": GROUP, "fromMe": False, "id": "3EB0IN", "participant": "5511933330001@s.whatsapp.net"},
        "message": shown,
    }


def test_a_receipt_names_the_key_of_what_was_read() -> None:
    quoted = Quoted("3EB0IN", False, "5511933330001@s.whatsapp.net", "text", {})
    receipt = {"message_id": "3EB0IN"}

    of_a_group = asked_with(an_outgoing("read", receipt, to=GROUP, quoted=quoted))
    of_a_chat = asked_with(an_outgoing("read", receipt))

    assert of_a_group == (
        "/rest/chat/{key}/readMessage",
        {"key": {"remoteJid": GROUP, "fromMe": False, "id": "3EB0IN", "participant": "5511933330001@s.whatsapp.net"}},
    )
    assert of_a_chat[1] == {"key": {"remoteJid": JID, "fromMe": False, "id": "3EB0IN"}}


CARD = {"name": {"formatted_name": "Bia"}, "phones": [{"phone": "+5511944440001"}]}


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (an_outgoing("template", {"name": "a"}), "unsupported"),
        (an_outgoing("sticker", {"link": "https://a/a.webp"}), "unsupported"),
        (an_outgoing("reaction", {"message_id": "1", "emoji": "a"}), "unsupported"),
        (an_outgoing("image", {"id": "1037543291543636"}), "unsupported"),
        (an_outgoing("image", {"link": "https://a/a.png"}, body={"context": {"message_id": "1"}}), "unsupported"),
        (an_outgoing("contacts", []), "unsupported"),
        (an_outgoing("contacts", [CARD, CARD]), "unsupported"),
        (an_outgoing("contacts", [{"name": {"formatted_name": "Bia"}, "phones": []}]), "unsupported"),
        (a_text(body={"context": {"message_id": "1"}}), "unknown_reference"),
    ],
)
def test_what_this_gateway_cannot_send_is_refused_here(message: Outgoing, code: str) -> None:
    answer, asked = heard(ACCEPTED, message=message)

    assert answer.fault is not None
    assert (answer.outcome, answer.fault.kind, answer.fault.scope) == (Outcome.REFUSED, Kind.PERMANENT, Scope.MESSAGE)
    assert (answer.fault.code, asked) == (code, [])


ODD_IDS: list[Any] = ["", "a b", "a\0", "x" * 513, 7, None, {}]

# -- what came back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "id_"),
    [
        ({"error": False, "messageData": {"key": {"id": "3EB0AA11"}}}, "3EB0AA11"),
        ({"messageData": {"key": {"id": "3EB0AA11"}}}, "3EB0AA11"),
        ({"error": False, "message": "ok", "messageData": {"status": "PENDING"}}, None),
        ({"error": False}, None),
        ({"erro": False}, None),
        *(({"error": False, "messageData": {"key": {"id": odd}}}, None) for odd in ODD_IDS),
        ({"error": False, "messageData": {"key": "x"}}, None),
        ({"error": False, "messageData": []}, None),
    ],
)
def test_an_accepted_message_has_its_id_where_the_gateway_tells_it(body: Any, id_: str | None) -> None:
    answer = taken_for(says(body))

    assert (answer.outcome, answer.provider_id, answer.http_status) == (Outcome.ACCEPTED, id_, 200)


ERROR = {"error": True, "message": "oops"}
OLD_ERROR = {"name": "INTERNAL_SERVER_ERROR", "message": "oops", "status": 500, "errors": []}


@pytest.mark.parametrize(
    ("answer", "kind", "scope", "code"),
    [
        (says(ERROR), Kind.PERMANENT, Scope.MESSAGE, "rejected"),
        (says({"erro": True}), Kind.PERMANENT, Scope.MESSAGE, "rejected"),
        (
            says({**ERROR, "messageData": {"key": {"id": "1"}}}, "201 Created"),
            Kind.PERMANENT,
            Scope.MESSAGE,
            "rejected",
        ),
        (says(ERROR, "400 Bad"), Kind.PERMANENT, Scope.MESSAGE, "bad_request"),
        (an_answer("<html>", "400 Bad"), Kind.PERMANENT, Scope.MESSAGE, "bad_request"),
        (says(ERROR, "422 No"), Kind.PERMANENT, Scope.MESSAGE, "http_422"),
        (an_answer("<html>", "413 Large"), Kind.PERMANENT, Scope.MESSAGE, "http_413"),
        (says(ERROR, "401 No"), Kind.AUTH, Scope.CHANNEL, "unauthorized"),
        (an_answer("", "401 No"), Kind.AUTH, Scope.CHANNEL, "unauthorized"),
        (an_answer("", "302 Moved", location="https://elsewhere.example/"), Kind.AUTH, Scope.CHANNEL, "redirect"),
        (an_answer("", "307 Moved"), Kind.AUTH, Scope.CHANNEL, "redirect"),
        (PAGE, Kind.THROTTLE, Scope.NUMBER, "edge_blocked"),
        (says(ERROR, "429 Many", retry_after="9"), Kind.THROTTLE, Scope.NUMBER, "throttled"),
        (says(OLD_ERROR, "503 Oops"), Kind.TRANSIENT, Scope.MESSAGE, "http_503"),
        (an_answer("<html>", "521 Down"), Kind.TRANSIENT, Scope.MESSAGE, "http_521"),
        (an_answer("<html>", "523 Unreachable"), Kind.TRANSIENT, Scope.MESSAGE, "http_523"),
    ],
    ids=lambda value: value[9:40].decode() if isinstance(value, bytes) else None,
)
def test_a_refusal_says_what_to_do_and_whom_it_concerns(answer: bytes, kind: Kind, scope: Scope, code: str) -> None:
    found = taken_for(answer, stands("connected"))

    assert found.fault is not None
    assert found.outcome is Outcome.REFUSED
    assert (found.fault.kind, found.fault.scope, found.fault.code) == (kind, scope, code)
    assert (found.fault.tries, found.fault.is_outage) == ((6, True) if kind is Kind.TRANSIENT else (0, False))
    assert found.fault.wait == {"edge_blocked": 60, "throttled": 9}.get(code, 0)


def stands(status: str) -> bytes:
    return says({"error": False, "instance": {"key": KEY, "status": status}})


NOT_KNOWN = [stands("opening"), PAGE, *(says({"error": True}, status) for status in ("500 Oops", "404 No", "401 No"))]
REFUSALS = [("200 OK", "rejected"), ("400 Bad", "bad_request"), ("422 No", "http_422")]


@pytest.mark.parametrize(("status", "code"), REFUSALS)
def test_a_refusal_is_the_messages_only_while_the_instance_is_connected(status: str, code: str) -> None:
    found, asked = heard(says(ERROR, status), stands("connected"))
    away = taken_for(says(ERROR, status), stands("disconnected"))

    assert found.fault is not None
    assert away.fault is not None
    assert (found.outcome, away.outcome) == (Outcome.REFUSED, Outcome.REFUSED)
    assert (found.fault.kind, found.fault.scope, found.fault.code) == (Kind.PERMANENT, Scope.MESSAGE, code)
    assert (away.fault.kind, away.fault.scope, away.fault.code) == (Kind.SESSION, Scope.CHANNEL, "closed_meanwhile")
    assert (found.fault.is_of_a_moment, away.fault.is_of_a_moment) == (True, False)
    assert [one.line.split(" ")[:2] for one in asked][1:] == [["GET", f"/rest/instance/{KEY}"]]


@pytest.mark.parametrize(("status", "code"), REFUSALS)
@pytest.mark.parametrize("standing", NOT_KNOWN)
def test_a_refusal_may_be_none_when_nobody_can_tell_how_the_instance_stands(
    standing: bytes, status: str, code: str
) -> None:
    found = taken_for(says(ERROR, status), standing)

    assert (found.outcome, found.fault and (found.fault.code, found.fault.text)) == (Outcome.UNKNOWN, (code, "oops"))


def test_a_page_with_status_400_is_the_messages_and_nothing_more_is_asked() -> None:
    found, asked = heard(an_answer("<html>", "400 Bad"), stands("disconnected"))

    assert found.fault is not None
    assert (found.fault.kind, found.fault.is_of_a_moment, len(asked)) == (Kind.PERMANENT, False, 1)


NO_CALL = an_answer("<pre>Cannot POST</pre>", "404 Not Found", content_type="text/html")


A_CARD, A_RECEIPT = an_outgoing("contacts", [CARD]), an_outgoing("read", {"message_id": "A"})
A_REPLY = a_text(
    quoted=Quoted("3EB0IN", False, None, "text", {"text": {"body": "a"}}), body={"context": {"message_id": "3EB0IN"}}
)


@pytest.mark.parametrize("answer", [NO_CALL, says(ERROR, "404 No"), says(ERROR, "403 No")])
@pytest.mark.parametrize("message", [A_CARD, A_REPLY], ids=["card", "reply"])
def test_a_call_that_is_not_to_be_had_is_a_matter_of_its_message_where_the_instance_is_connected(
    answer: bytes, message: Outgoing
) -> None:
    fault = taken_for(answer, stands("connected"), message=message).fault
    receipt = taken_for(answer, stands("connected"), message=A_RECEIPT).fault

    assert fault is not None
    assert receipt is not None
    code = "forbidden" if b"403" in answer else "http_404"
    text = "the gateway knows the session, and yet has no call for this" if answer is NO_CALL else "oops"
    assert (fault.kind, fault.scope, fault.code, fault.text) == (Kind.TRANSIENT, Scope.MESSAGE, code, text)
    assert (fault.tries, fault.is_outage) == (3, False)
    assert (receipt.kind, receipt.scope, receipt.is_of_a_moment) == (Kind.PERMANENT, Scope.MESSAGE, True)


@pytest.mark.parametrize("answer", [NO_CALL, says(ERROR, "404 No"), says(ERROR, "403 No")])
@pytest.mark.parametrize(
    ("message", "status"),
    [(a_text(), "connected"), (a_text(), "opening"), (A_CARD, "opening"), (A_REPLY, "opening"), (A_RECEIPT, "opening")],
)
def test_it_is_a_matter_of_the_channel_of_a_call_that_every_gateway_has_and_as_long_as_the_instance_is_not_connected(
    answer: bytes, message: Outgoing, status: str
) -> None:
    fault = taken_for(answer, stands(status), message=message).fault

    assert fault is not None
    code = "forbidden" if b"403" in answer else "not_found"
    assert (fault.kind, fault.scope, fault.code) == (Kind.AUTH, Scope.CHANNEL, code)


@pytest.mark.parametrize(
    ("standing", "kind", "code"),
    [
        (stands("disconnected"), Kind.SESSION, "disconnected"),
        (says(ERROR, "404 No"), Kind.AUTH, None),
        (says(ERROR, "401 No"), Kind.AUTH, None),
        (PAGE, Kind.AUTH, None),
        (says(ERROR, "500 Oops"), Kind.AUTH, None),
    ],
)
@pytest.mark.parametrize(("answer", "own"), [(NO_CALL, "not_found"), (says(ERROR, "403 No"), "forbidden")])
def test_it_is_a_matter_of_the_channel_as_long_as_nothing_says_that_the_instance_is_known(
    answer: bytes, own: str, standing: bytes, kind: Kind, code: str | None
) -> None:
    found = taken_for(answer, standing)

    assert found.fault is not None
    assert (found.outcome, found.fault.kind, found.fault.scope) == (Outcome.REFUSED, kind, Scope.CHANNEL)
    assert found.fault.code == (code or own)


def test_the_gateways_reason_is_shown_in_bounds() -> None:
    fault = taken_for(says({"error": True, "message": "Não\0\r\n\x1b[31m\u202e " + "x" * 5000})).fault

    assert fault is not None
    assert fault.text.startswith("Não  [31m x")
    assert len(fault.text) == 500


async def cut_off(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{")


async def silence(_writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def hang_up(_writer: asyncio.StreamWriter) -> None:
    pass


@pytest.mark.parametrize(
    "says_",
    [
        *(
            an_answer(""),
            an_answer("OK"),
            an_answer("[]"),
            says({}),
            says({"message": "ok"}),
            an_answer('{"error":fal'),
        ),
        *(an_answer("<html>", "500 Oops"), says({"status": 500}, "500 Oops"), an_answer("", "503 Oops")),
        *(
            an_answer("<html>", "502 Bad"),
            says(ERROR, "502 Bad"),
            says(ERROR, "500 Oops"),  # a send that timed out inside may have left
            an_answer("error code: 522", "522 Timeout"),
            an_answer("<html>", "504 Late"),
            says(ERROR, "504 Late"),
        ),
        *(an_answer("", "520 Odd"), an_answer("", "524 Late"), an_answer("", "599 Odd"), says(ERROR, "501 No")),
        *(an_answer(b" " * 2_000_000), an_answer("{}", content_encoding="gzip"), b"garbage\r\n\r\n"),
        *(cut_off, silence, hang_up),
    ],
)
def test_whatever_does_not_say_what_became_of_it_is_unknown(says_: bytes | Writes) -> None:
    answer = taken_for(says_, deadline=1.5 if says_ is silence else 20)

    assert (answer.outcome, answer.fault) == (Outcome.UNKNOWN, None)
    assert answer.why


def test_a_request_that_never_left_was_not_sent() -> None:
    async def run() -> Answer:
        async with a_server(b"") as (url, _):
            pass
        async with some_clients() as clients:
            return await MegaSender(clients, url, KEY, TOKEN).send(a_text())

    answer = asyncio.run(run())

    assert (answer.outcome, answer.fault) == (Outcome.NOT_SENT, None)


def test_a_host_inside_holds_the_channel_before_a_connection_is_made() -> None:
    async def run() -> tuple[Answer, list[Asked]]:
        async with a_server(ACCEPTED) as (url, asked), some_clients(allowed=[]) as clients:
            return await MegaSender(clients, url, KEY, TOKEN).send(a_text()), asked

    answer, asked = asyncio.run(run())

    assert answer.fault is not None
    assert (answer.outcome, asked) == (Outcome.NOT_SENT, [])
    assert (answer.fault.kind, answer.fault.scope, answer.fault.code) == (Kind.AUTH, Scope.CHANNEL, "blocked_address")


@pytest.mark.parametrize(
    ("key", "token", "code"),
    [(KEY, "", "no_token"), ("../x", TOKEN, "misconfigured"), (KEY, "a\r\nb", "misconfigured")],
)
def test_what_is_configured_wrong_leaves_nothing_out(key: str, token: str, code: str) -> None:
    answer, asked = heard(ACCEPTED, key=key, token=token)

    assert answer.fault is not None
    assert (answer.outcome, answer.fault.kind, answer.fault.code, asked) == (Outcome.REFUSED, Kind.AUTH, code, [])


def test_an_answer_that_comes_before_the_file_is_whole_is_heard() -> None:
    """A gateway may refuse a large file from its announced length alone."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(says(ERROR, "413 Too Large", connection="close"))
        await writer.drain()
        while await reader.read(65_536):
            pass

    async def run() -> Answer:
        async with a_strange_server(serve) as url, some_clients() as clients:
            message = an_outgoing("document", {}, attachment=a_file(*[b"x" * 65_536] * 40))
            return await MegaSender(clients, url, KEY, TOKEN).send(message)

    answer = asyncio.run(run())

    assert (answer.outcome, answer.http_status) == (Outcome.REFUSED, 413)


def test_nothing_is_handed_over_beforehand() -> None:
    async def run() -> None:
        async with some_clients() as clients:
            await MegaSender(clients, "a.example", KEY, TOKEN).upload(a_file(b"a"))

    with pytest.raises(Permanent):
        asyncio.run(run())


def test_a_channel_is_sent_through_by_its_kind() -> None:
    async def run() -> None:
        async with some_clients() as clients:
            config = {"host": "api2.megaapi.com.br", "instance_key": KEY}
            assert isinstance(providers.connect("megaapi", clients, config, {"token": TOKEN}), MegaSender)
            assert isinstance(providers.connect("meta", clients, {"phone_number_id": "1"}, {}), GraphSender)
            with pytest.raises(Permanent):
                providers.connect("none", clients, {}, {})

    asyncio.run(run())
