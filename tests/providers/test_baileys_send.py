"""Messages to Baileys gateways, over real sockets: what leaves in each dialect, and what odd answers mean."""

import asyncio
import base64
import json
import tracemalloc
from collections.abc import AsyncIterator
from email.message import Message
from email.parser import BytesParser
from typing import Any

import pytest

import providers
from pombal.errors import Permanent
from providers.baileys_dialects import DIALECTS
from providers.baileys_send import BaileysSender
from providers.outbound import Answer, Attachment, Kind, Outcome, Outgoing, Quoted, Scope
from tests.providers.test_baileys import KEY, ROW, a_session
from tests.providers.test_graph import Asked, Writes, a_server, an_answer
from tests.providers.test_graph_upload import a_strange_server
from tests.providers.test_megaapi import PAGE, says, some_clients
from tests.providers.test_megaapi_send import GROUP, JID, a_file, a_text, an_outgoing, pieces

CHAT = "5511944440001@c.us"  # as WAHA writes it
NUMBER = "5511944440001"
AUTHOR = "5511933330001@s.whatsapp.net"
LINK = "https://a.example/b/Foto%20um.png"
TELLS = {
    "whaticket": says({"mensagem": "Mensagem enviada"}),
    "ticketz": says({"mensagem": "Message added to queue"}),
    "evolution": says(
        {"key": {"remoteJid": JID, "fromMe": True, "id": "3EB0AA11"}, "status": "PENDING"}, "201 Created"
    ),
    "waha": says({"id": f"true_{CHAT}_3EB0AA11", "ack": 0}, "201 Created"),
    "fazer": says({"data": {"key": {"id": "3EB0AA11"}, "messageTimestamp": "1"}}),
}
QUOTED = Quoted("3EB0IN", False, AUTHOR, "text", {"text": {"body": "Quanto?"}})
REPLY = {"context": {"message_id": "3EB0IN"}}
QUOTE = {
    "key": {"remoteJid": GROUP, "fromMe": False, "id": "3EB0IN", "participant": AUTHOR},
    "message": {"conversation": "Quanto?"},
}


def heard(
    gateway: str, *answers: bytes | Writes, message: Outgoing | None = None, deadline: float = 20, **more: Any
) -> tuple[Answer, list[Asked]]:
    """What a send is taken for when the gateway says this, and the requests it got."""

    async def run() -> tuple[Answer, list[Asked]]:
        async with a_server(*answers) as (url, asked), some_clients() as clients:
            sender = BaileysSender(clients, a_session(gateway, url, **more), deadline=deadline)
            return await sender.send(message or a_text()), asked

    return asyncio.run(run())


def taken_for(gateway: str, *answers: bytes | Writes, **more: Any) -> Answer:
    return heard(gateway, *answers, **more)[0]


def sent(gateway: str, message: Outgoing) -> tuple[str, Asked]:
    """Where a message went that was taken, and the request."""
    answer, (asked,) = heard(gateway, TELLS[gateway], message=message)
    assert answer.outcome is Outcome.ACCEPTED
    method, target, _ = asked.line.split(" ")
    assert method == "POST"
    return target, asked


def asked_with(gateway: str, message: Outgoing) -> tuple[str, Any]:
    target, asked = sent(gateway, message)
    assert asked.headers["content-type"] == "application/json"
    return target, json.loads(asked.body)


def form_of(asked: Asked) -> dict[str, Message]:
    """The parts of a form, by their names."""
    head = f"Content-Type: {asked.headers['content-type']}\r\n\r\n".encode()
    parts = BytesParser().parsebytes(head + asked.body).get_payload()
    assert isinstance(parts, list)
    assert all(isinstance(one, Message) for one in parts)
    return {str(one.get_param("name", header="content-disposition")): one for one in parts if isinstance(one, Message)}


# -- what leaves -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gateway", "target", "data"),
    [
        ("whaticket", "/api/messages/send", {"number": NUMBER, "body": "Olá"}),
        ("ticketz", "/api/messages/send", {"number": NUMBER, "body": "Olá"}),
        ("evolution", "/message/sendText/loja", {"number": NUMBER, "text": "Olá"}),
        ("waha", "/api/sendText", {"session": "loja", "chatId": CHAT, "text": "Olá"}),
        ("fazer", "/connections/%2B5511955550301/send-message", {"jid": JID, "messageContent": {"text": "Olá"}}),
    ],
)
def test_a_text_goes_in_each_dialect(gateway: str, target: str, data: Any) -> None:
    assert asked_with(gateway, a_text()) == (target, data)
    answer, (asked,) = heard(gateway, TELLS[gateway])
    dialect = DIALECTS[gateway]
    assert asked.headers[dialect.header.lower()] == dialect.scheme + KEY
    assert answer.provider_id == ("3EB0AA11" if dialect.tells_ids else None)


def test_in_the_whaticket_family_a_connection_has_a_key_of_its_own_for_sending() -> None:
    _, (asked,) = heard("ticketz", TELLS["ticketz"], send_key="of-the-connection")

    assert asked.headers["authorization"] == "Bearer of-the-connection"


@pytest.mark.parametrize(
    ("gateway", "data"),
    [
        ("evolution", {"number": GROUP, "text": "Dez", "quoted": QUOTE}),
        (
            "waha",
            {
                "session": "loja",
                "chatId": GROUP,
                "text": "Dez",
                "reply_to": f"false_{GROUP}_3EB0IN_5511933330001@c.us",
            },
        ),
        ("fazer", {"jid": GROUP, "messageContent": {"text": "Dez", "quotedMessage": QUOTE}}),
    ],
)
def test_an_answer_carries_what_it_answers(gateway: str, data: Any) -> None:
    assert asked_with(gateway, a_text("Dez", to=GROUP, quoted=QUOTED, body=REPLY))[1] == data


@pytest.mark.parametrize(
    ("gateway", "target", "data"),
    [
        (
            "evolution",
            "/message/sendMedia/loja",
            {
                "number": NUMBER,
                "mediatype": "image",
                "mimetype": "image/png",
                "fileName": "Foto um.png",
                "caption": "Oi",
                "media": LINK,
            },
        ),
        (
            "waha",
            "/api/sendImage",
            {
                "session": "loja",
                "chatId": CHAT,
                "file": {"mimetype": "image/png", "filename": "Foto um.png", "url": LINK},
                "caption": "Oi",
            },
        ),
    ],
)
def test_a_file_by_link(gateway: str, target: str, data: Any) -> None:
    assert asked_with(gateway, an_outgoing("image", {"link": LINK, "caption": "Oi"})) == (target, data)


CONTENT = bytes(range(256)) * 5


@pytest.mark.parametrize(
    ("gateway", "type_", "target", "place", "data"),
    [
        (
            "evolution",
            "document",
            "/message/sendMedia/loja",
            ("media",),
            {
                "number": NUMBER,
                "mediatype": "document",
                "mimetype": "application/pdf",
                "fileName": 'a".pdf'.replace('"', "_"),
            },
        ),
        (
            "waha",
            "document",
            "/api/sendFile",
            ("file", "data"),
            {"session": "loja", "chatId": CHAT, "file": {"mimetype": "application/pdf", "filename": "a_.pdf"}},
        ),
        (
            "waha",
            "audio",
            "/api/sendVoice",
            ("file", "data"),
            {
                "session": "loja",
                "chatId": CHAT,
                "convert": True,
                "file": {"mimetype": "application/pdf", "filename": "a_.pdf"},
            },
        ),
        (
            "fazer",
            "document",
            "/connections/%2B5511955550301/send-message",
            ("messageContent", "document"),
            {"jid": JID, "messageContent": {"mimetype": "application/pdf", "fileName": "a_.pdf"}},
        ),
    ],
)
@pytest.mark.parametrize("cut", [1, 7, 2000])
def test_a_file_of_ours_goes_along_byte_for_byte(
    gateway: str, type_: str, target: str, place: tuple[str, ...], data: Any, cut: int
) -> None:
    file = a_file(*(CONTENT[at : at + cut] for at in range(0, len(CONTENT), cut)), mime_type="application/pdf")

    where, body = asked_with(gateway, an_outgoing(type_, {"filename": 'a".pdf'}, attachment=file))

    inner = body
    for name in place[:-1]:
        inner = inner[name]
    assert base64.b64decode(inner.pop(place[-1]), validate=True) == CONTENT
    assert (where, body) == (target, data)


@pytest.mark.parametrize("gateway", ["whaticket", "ticketz"])
def test_in_the_whaticket_family_a_file_goes_in_a_form(gateway: str) -> None:
    file = a_file(CONTENT[:700], CONTENT[700:], mime_type="image/png")
    caption = {"caption": "Olá\r\n--x"} if gateway == "whaticket" else {}

    target, asked = sent(gateway, an_outgoing("image", {"filename": "Foto.png", **caption}, attachment=file))

    form = form_of(asked)
    assert target == "/api/messages/send"
    assert set(form) == {"number", "medias", *({"body"} if caption else {})}
    assert form["number"].get_payload(decode=True) == NUMBER.encode()
    assert form["medias"].get_payload(decode=True) == CONTENT
    assert (form["medias"].get_filename(), form["medias"].get_content_type()) == ("Foto.png", "image/png")
    if caption:
        assert form["body"].get_payload(decode=True) == caption["caption"].encode()


def test_a_place_and_a_card() -> None:
    place = {"latitude": -23.5, "longitude": -46.6, "name": "Loja", "address": "Rua A, 1"}
    card = {"name": {"formatted_name": "Bia Souza"}, "phones": [{"phone": "+55 (11) 94444-0001"}]}
    spot = {"latitude": -23.5, "longitude": -46.6}
    contact = {"fullName": "Bia Souza", "organization": "", "phoneNumber": NUMBER}

    assert asked_with("evolution", an_outgoing("location", place)) == (
        "/message/sendLocation/loja",
        {"number": NUMBER, **spot, "name": "Loja", "address": "Rua A, 1"},
    )
    assert asked_with("waha", an_outgoing("location", place))[1] == {
        "session": "loja",
        "chatId": CHAT,
        **spot,
        "title": "Loja",
    }
    assert asked_with("evolution", an_outgoing("contacts", [card]))[1]["contact"] == [{**contact, "wuid": NUMBER}]
    assert asked_with("waha", an_outgoing("contacts", [card]))[1]["contacts"] == [{**contact, "whatsappId": NUMBER}]


@pytest.mark.parametrize(
    ("gateway", "target", "data"),
    [
        ("evolution", "/chat/markMessageAsRead/loja", {"readMessages": [QUOTE["key"]]}),
        ("fazer", "/connections/%2B5511955550301/read-messages", {"keys": [QUOTE["key"]]}),
        (
            "waha",
            "/api/sendSeen",
            {
                "session": "loja",
                "chatId": GROUP,
                "messageId": f"false_{GROUP}_3EB0IN_5511933330001@c.us",
                "messageIds": [f"false_{GROUP}_3EB0IN_5511933330001@c.us"],
                "participant": "5511933330001@c.us",
            },
        ),
    ],
)
def test_a_receipt_names_what_was_read(gateway: str, target: str, data: Any) -> None:
    receipt = an_outgoing("read", {"message_id": "3EB0IN"}, to=GROUP, quoted=QUOTED)

    assert asked_with(gateway, receipt) == (target, data)
    assert taken_for(gateway, an_answer(""), message=receipt).outcome is Outcome.ACCEPTED


@pytest.mark.parametrize(
    ("gateway", "message", "code"),
    [
        ("evolution", an_outgoing("template", {"name": "a"}), "unsupported"),
        ("evolution", an_outgoing("image", {"id": "1037543291543636"}), "unsupported"),
        ("evolution", a_text(body=REPLY), "unknown_reference"),
        ("evolution", a_text(to="a b@g.us"), "bad_recipient"),
        ("waha", an_outgoing("contacts", [{}], quoted=QUOTED, body=REPLY), "unsupported"),
        ("fazer", an_outgoing("image", {"link": LINK}), "unsupported"),
        ("fazer", an_outgoing("location", {"latitude": 1, "longitude": 2}), "unsupported"),
        ("whaticket", an_outgoing("image", {"link": LINK}), "unsupported"),
        ("whaticket", an_outgoing("read", {"message_id": "1"}), "unsupported"),
        ("whaticket", a_text(to=GROUP), "bad_recipient"),
        ("whaticket", a_text(quoted=QUOTED, body=REPLY), "unsupported"),
        ("ticketz", an_outgoing("image", {"caption": "a"}, attachment=a_file(b"a")), "unsupported"),
    ],
)
def test_what_a_gateway_cannot_send_is_refused_here(gateway: str, message: Outgoing, code: str) -> None:
    answer, asked = heard(gateway, TELLS[gateway], message=message)

    assert answer.fault is not None
    assert (answer.outcome, answer.fault.kind, answer.fault.scope) == (Outcome.REFUSED, Kind.PERMANENT, Scope.MESSAGE)
    assert (answer.fault.code, asked) == (code, [])


@pytest.mark.parametrize("gateway", ["evolution", "whaticket"])
def test_a_large_file_is_never_whole_in_memory(gateway: str) -> None:
    size, part, came = 20_000_000, b"\xa5" * 1_000_000, 0

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield part

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal came
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while came < length:
            came += len(await reader.read(65_536))
        writer.write(TELLS[gateway])
        await writer.drain()

    async def run() -> tuple[Answer, int]:
        async with a_strange_server(serve) as url, some_clients() as clients:
            sender = BaileysSender(clients, a_session(gateway, url))
            tracemalloc.start()
            try:
                message = an_outgoing("video", {}, attachment=Attachment("video/mp4", size, parts()))
                return await sender.send(message), tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    answer, peak = asyncio.run(run())

    assert answer.outcome is Outcome.ACCEPTED
    assert came > size
    assert peak < 10_000_000


def test_what_the_file_raises_comes_out_as_it_is() -> None:
    class Gone(Exception):
        pass

    async def breaks() -> AsyncIterator[bytes]:
        yield b"abc"
        raise Gone

    for gateway in ("evolution", "whaticket"):
        file = Attachment("image/png", 6, breaks())
        with pytest.raises(Gone):
            taken_for(gateway, TELLS[gateway], message=an_outgoing("image", {}, attachment=file))


# -- what came back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gateway", "body", "id_"),
    [
        ("evolution", {"key": {"id": "3EB0"}}, "3EB0"),
        ("evolution", {"key": {}}, None),
        ("evolution", {"key": {"id": "a b"}}, None),
        ("waha", {"key": {"id": "3EB0"}}, "3EB0"),
        ("waha", {"id": {"_serialized": f"true_{GROUP}_3EB0_{CHAT}"}}, "3EB0"),
        ("waha", {"id": "true_x"}, None),
        ("fazer", {"data": None}, None),
        ("evolution", {"key": {}, "id": "of-its-database"}, None),
        ("fazer", {"id": 4711, "data": {"key": {"id": "3EB0"}}}, "3EB0"),
        ("whaticket", {}, None),
        ("whaticket", {"id": 4711, "body": "oi", "ack": 0, "ticketId": 9}, None),
        ("ticketz", {"id": "4711", "message": {"id": "x"}}, None),
    ],
)
def test_an_accepted_message_has_its_id_where_the_gateway_tells_it(gateway: str, body: Any, id_: str | None) -> None:
    answer = taken_for(gateway, says(body))

    assert (answer.outcome, answer.provider_id) == (Outcome.ACCEPTED, id_)


@pytest.mark.parametrize(
    "answer",
    [
        says({}, "500 Internal Server Error"),
        an_answer("<html>", "502 Bad Gateway"),
        an_answer("<html>", "503 Service Unavailable"),
        an_answer("Not JSON"),
        says({"message": "ok"}),
        an_answer("[]"),
        an_answer("{}", content_encoding="gzip"),
    ],
)
def test_what_does_not_say_clearly_that_nothing_was_sent_is_unknown(answer: bytes) -> None:
    assert taken_for("evolution", answer).outcome is Outcome.UNKNOWN


def test_a_connection_that_breaks_afterwards_is_unknown_and_one_that_never_was_is_not_sent() -> None:
    async def breaks(writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async def nobody() -> Answer:
        async with a_server(an_answer()) as (url, _):
            pass
        async with some_clients() as clients:
            return await BaileysSender(clients, a_session("evolution", url)).send(a_text())

    assert taken_for("evolution", breaks).outcome is Outcome.UNKNOWN
    assert asyncio.run(nobody()).outcome is Outcome.NOT_SENT


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [
        (says({}, "401 Unauthorized"), Kind.AUTH, "unauthorized"),
        (PAGE, Kind.THROTTLE, "edge_blocked"),
        (says({}, "429 Too Many Requests"), Kind.THROTTLE, "throttled"),
        (says({}, "301 Moved", location="http://x/"), Kind.AUTH, "redirect"),
        (says({"message": "busy"}, "503 Service Unavailable"), Kind.TRANSIENT, "http_503"),
        (says({}, "413 Payload Too Large"), Kind.PERMANENT, "http_413"),
    ],
)
def test_a_clear_no(answer: bytes, kind: Kind, code: str) -> None:
    fault = taken_for("evolution", answer).fault

    assert fault is not None
    assert (fault.kind, fault.code) == (kind, code)


@pytest.mark.parametrize(
    ("state", "kind", "code", "is_of_a_moment"),
    [
        ("close", Kind.SESSION, "closed_meanwhile", False),
        ("open", Kind.PERMANENT, "bad_request", True),
    ],
)
def test_a_refusal_concerns_the_message_only_while_the_session_is_open(
    state: str, kind: Kind, code: str, is_of_a_moment: bool
) -> None:
    no = says({"status": 400, "error": "Bad Request", "response": {"message": ["text is required"]}}, "400 Bad Request")

    fault = taken_for("evolution", no, says({"instance": {"state": state}})).fault

    assert fault is not None
    assert (fault.kind, fault.code, fault.is_of_a_moment) == (kind, code, is_of_a_moment)
    if kind is not Kind.SESSION:
        assert fault.text == "text is required"


@pytest.mark.parametrize("standing", [says({"instance": {"state": "paused"}}), says({}, "502 Bad Gateway")])
def test_a_refusal_may_be_none_when_nobody_can_tell_how_the_session_stands(standing: bytes) -> None:
    no = says({"status": 400, "error": "Bad Request", "response": {"message": ["Error: Timed Out"]}}, "400 Bad Request")

    answer = taken_for("evolution", no, standing)

    assert answer.outcome is Outcome.UNKNOWN
    assert answer.fault is not None
    assert (answer.fault.code, answer.fault.text) == ("bad_request", "Error: Timed Out")


NOT_INITIALIZED = says({"error": "ERR_WAPP_NOT_INITIALIZED"}, "400 Bad Request")
CLOSED = says({"status": 400, "response": {"message": ["Error: Connection Closed"]}}, "400 Bad Request")


@pytest.mark.parametrize(
    ("gateway", "no", "standing"),
    [
        ("whaticket", NOT_INITIALIZED, says([{**ROW, "status": "PENDING"}])),
        ("whaticket", NOT_INITIALIZED, says([ROW])),
        ("whaticket", NOT_INITIALIZED, says({"error": "ERR_SESSION_EXPIRED"}, "401 Unauthorized")),
        ("ticketz", says({"error": "ERR_WAPP_NOT_INITIALIZED"}, "404 Not Found"), says([{**ROW, "status": "OPENING"}])),
        ("evolution", CLOSED, says({"instance": {"state": "connecting"}})),
        ("evolution", CLOSED, says({}, "502 Bad Gateway")),
    ],
)
def test_what_a_gateway_could_not_pass_on_while_it_connects_again_was_not_sent(
    gateway: str, no: bytes, standing: bytes
) -> None:
    answer = taken_for(gateway, no, standing)

    assert answer.fault is not None
    assert (answer.outcome, answer.fault.kind, answer.fault.scope) == (Outcome.REFUSED, Kind.TRANSIENT, Scope.MESSAGE)
    assert (answer.fault.tries, answer.fault.is_outage) == (6, True)


def test_a_refusal_is_the_messages_where_the_gateway_will_never_tell_how_the_session_stands() -> None:
    answer = taken_for(
        "whaticket", says({"error": "ERR_CHECK_NUMBER"}, "400 Bad Request"), says({}, "401 Unauthorized")
    )

    assert answer.fault is not None
    assert (answer.outcome, answer.fault.kind, answer.fault.is_of_a_moment) == (Outcome.REFUSED, Kind.PERMANENT, True)


def test_a_gateway_that_never_says_how_a_session_stands_is_asked_nothing_about_a_refusal() -> None:
    answer, asked = heard("fazer", says({"message": "text is required"}, "422 Unprocessable Entity"))

    assert answer.fault is not None
    assert (answer.fault.kind, answer.fault.is_of_a_moment, len(asked)) == (Kind.PERMANENT, True, 1)


A_CARD = an_outgoing("contacts", [{"name": {"formatted_name": "Bia"}, "phones": [{"phone": "+5511944440001"}]}])


@pytest.mark.parametrize("status", ["404 Not Found", "403 Forbidden"])
@pytest.mark.parametrize(
    ("message", "standing", "kind"),
    [
        (A_CARD, says({"instance": {"state": "open"}}), Kind.TRANSIENT),
        (a_text(), says({"instance": {"state": "open"}}), Kind.AUTH),
        (A_CARD, says({"instance": {"state": "connecting"}}), Kind.AUTH),
        (A_CARD, says({"instance": {"state": "close"}}), Kind.SESSION),
        (a_text(), says({"instance": {"state": "close"}}), Kind.SESSION),
        (A_CARD, says({}, "404 Not Found"), Kind.AUTH),
        (A_CARD, says({}, "401 Unauthorized"), Kind.AUTH),
    ],
)
def test_a_call_that_is_not_to_be_had_is_a_matter_of_its_message_where_the_session_is_open_and_may_lack_it(
    status: str, message: Outgoing, standing: bytes, kind: Kind
) -> None:
    fault = taken_for("evolution", says({}, status), standing, message=message).fault

    assert fault is not None
    assert (fault.kind, fault.scope) == (kind, Scope.MESSAGE if kind is Kind.TRANSIENT else Scope.CHANNEL)


def test_a_key_for_sending_that_is_refused_is_the_channels_however_the_session_stands() -> None:
    no = says({"error": "ERR_NO_PERMISSION"}, "403 Forbidden")

    fault = taken_for("whaticket", no, says([ROW]), send_key="another").fault

    assert fault is not None
    assert (fault.kind, fault.code) == (Kind.AUTH, "forbidden")


def test_a_number_that_is_not_on_whatsapp_is_a_reason() -> None:
    told = [{"jid": JID, "exists": False, "number": NUMBER}]
    no = says({"status": 400, "error": "Bad Request", "response": {"message": told}}, "400 Bad Request")

    fault = taken_for("evolution", no, says({"instance": {"state": "open"}})).fault

    assert fault is not None
    assert (fault.kind, fault.code, fault.text) == (Kind.PERMANENT, "bad_request", "the number is not on WhatsApp")


@pytest.mark.parametrize(
    ("gateway", "answer"),
    [
        ("fazer", an_answer("Phone number not connected", "404 Not Found")),
        ("waha", says({"error": "Session status is not as expected. Try again later"}, "422 Unprocessable Entity")),
        ("whaticket", says({"error": "ERR_WAPP_NOT_INITIALIZED"}, "404 Not Found")),
    ],
)
def test_a_session_that_is_closed_is_no_fault_of_the_message(gateway: str, answer: bytes) -> None:
    fault = taken_for(gateway, answer, says([{**ROW, "status": "DISCONNECTED"}])).fault

    assert fault is not None
    assert (fault.kind, fault.scope) == (Kind.SESSION, Scope.CHANNEL)


def test_an_address_inside_is_not_called_unless_it_is_allowed() -> None:
    async def run() -> None:
        async with a_server(TELLS["waha"]) as (url, asked), some_clients(allowed=[]) as clients:
            answer = await BaileysSender(clients, a_session("waha", url)).send(a_text())
            assert (answer.outcome, answer.why, asked) == (Outcome.NOT_SENT, "blocked_address", [])

    asyncio.run(run())


def test_a_channel_of_baileys_sends_and_hands_nothing_over_beforehand() -> None:
    async def run() -> None:
        async with some_clients() as clients:
            sender = providers.connect(
                "baileys", clients, {"gateway": "waha", "session": "a/b", "host": "gw.example"}, {}
            )
            answer = await sender.send(a_text())
            assert answer.fault is not None
            assert (answer.outcome, answer.fault.code) == (Outcome.REFUSED, "misconfigured")
            with pytest.raises(Permanent):
                await sender.upload(Attachment("image/png", 1, pieces(b"a")))

    asyncio.run(run())
