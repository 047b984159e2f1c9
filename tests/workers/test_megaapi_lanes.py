"""Sending through a gateway of WhatsApp Web: to whom, what goes along, and what its answers do to the lane.

Against a gateway over a real socket that keeps what it was told, and answers as the test wants it to.
"""

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import pytest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from models import Channel, Hold, Lane
from pombal import db, metrics
from pombal.ids import uuid7
from pombal.pace import Pace, client_for_pace
from pombal.settings import settings
from providers import inbound, megaapi_webhook
from providers.storage import storage
from sandbox import client
from sandbox.config import MegaInstance
from sandbox.files import make
from tests.factories import Shop, a_shop, rows
from tests.sandbox.megaapi_servers import a_megaapi
from tests.sandbox.servers import serve
from tests.workers.sending import (
    SOMEBODY,
    another_process,
    attempts,
    configure,
    count_of,
    finish,
    lane,
    letters,
    make_due,
    message,
    queue,
    send,
    statuses,
)
from tests.workers.test_echoes import an_echo, hear
from tests.workers.test_media_sending import a_file, people
from tests.workers.test_megaapi import asked_about
from tests.workers.tools import in_background, until
from workers import _lanes, _standing
from workers._line import Line
from workers.channel_session import status_check
from workers.status_sync import ask_soon

pytestmark = pytest.mark.usefixtures("queues")

KEY = "megastart-teste"
BIA = "+5511988880001"
SHORT = "551188880001"  # … as WhatsApp knows her: without the ninth digit
GROUP, LID = "120363000000000001@g.us", "123456789012345@lid"


class Call(NamedTuple):
    place: str  # what follows `/rest/sendMessage/{key}/` and the like
    data: dict[str, Any]

    @property
    def to(self) -> str:
        return str(self.data["to"])


class Gateway:
    """What it was told, and what it says: `answer` may give a response of its own, and may take its time."""

    def __init__(self) -> None:
        self.url = ""
        self.calls: list[Call] = []
        self.answer: Callable[[Call], Response | None] = lambda call: None
        self.status = "connected"
        self.names_it = True  # whether its answers tell the message's id
        self.most_at_once = self._at_once = 0

    async def told(self, request: Request) -> Response:
        assert request.headers["authorization"] == "Bearer a-token"
        assert request.path_params["key"] == KEY
        data = json.loads(await request.body())["messageData"]
        call = Call(request.path_params["place"], data)
        self.calls.append(call)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            said = await run_in_threadpool(self.answer, call)
        finally:
            self._at_once -= 1
        key = {"key": {"remoteJid": data.get("to"), "fromMe": True, "id": f"3EB0{uuid4().hex.upper()}"}}
        return said or JSONResponse({"error": False, "message": "ok", "messageData": key if self.names_it else {}})

    async def standing(self, request: Request) -> Response:
        return JSONResponse({"error": False, "instance": {"key": KEY, "status": self.status}})

    def app(self) -> Starlette:
        paths = ("/rest/sendMessage/{key}/{place}", "/rest/chat/{key}/{place}")
        sends = [Route(path, self.told, methods=["POST"]) for path in paths]
        return Starlette(routes=[*sends, Route("/rest/instance/{key}", self.standing)])


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A storage of the test's own, and gateways on this machine allowed."""
    monkeypatch.setenv("MEDIA_URL", f"file://{tmp_path}/media")
    monkeypatch.setenv("MEDIA_ALLOWED_NETWORKS", "127.0.0.0/8")
    settings.cache_clear()
    storage.cache_clear()
    yield tmp_path / "media"
    storage.cache_clear()
    settings.cache_clear()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    its = Gateway()
    with serve(its.app()) as url:
        its.url = url
        yield its


@pytest.fixture
def shop(gateway: Gateway) -> Shop:
    return a_channel(gateway.url)


def a_channel(host: str, kind: str = "megaapi", **config: Any) -> Shop:
    """A shop whose channel is at a gateway."""
    given = {"host": host, "instance_key": KEY, "messages_per_second": 1_000, **config}
    given = {name: value for name, value in given.items() if value is not None}
    shop = a_shop()
    channel = Channel(tenant_id=shop.tenant.id, id=uuid7(), kind=kind, name="gateway", config=given)
    channel.seal({"token": "a-token"})
    with db.session([shop.tenant.id]) as s:
        s.add(channel)
    return shop._replace(channel=channel)


def somebody_writes(shop: Shop, body: str = "Oi", *, chat: str | None = None) -> str:
    """A message of Bia's, in the spelling that WhatsApp has for her, has come in; its id. `chat`: a group."""
    jid = f"{SHORT}@s.whatsapp.net"
    id_ = f"3A{uuid4().hex.upper()}"
    bia = inbound.Person((("phone", SHORT),), "Bia", (("jid", SHORT),))
    where = inbound.Person((("group", chat.partition("@")[0]),)) if chat else bia
    key = {"remoteJid": chat or jid, "fromMe": False, "id": id_} | ({"participant": jid} if chat else {})
    said = {"text": {"body": body}, "key": key}
    hear(shop, inbound.Message("$", id_, "in", "text", said, bia, where, datetime.now(UTC)))
    return id_


def told(shop: Shop, status: str) -> None:
    """What the gateway says of the channel's session, as a poll brings it."""
    poll = {"tenant_id": shop.tenant.id, "id": shop.channel.id, "asked_at": datetime.now(UTC), "own_id": None}
    _standing.keep([shop.tenant.id], [poll | {"status": status, "raw": status, "reason": None}])


def outcomes(shop: Shop, id_: UUID) -> list[str]:
    return [attempt["outcome"] for attempt in attempts(shop, id_)]


def refusals(shop: Shop, id_: UUID) -> list[str]:
    return [attempt["error_code"] for attempt in attempts(shop, id_)]


def shown(shop: Shop, id_: UUID, *fields: str) -> tuple[Any, ...]:
    row = message(shop, id_)
    return tuple(row[field] for field in fields)


# -- to whom ---------------------------------------------------------------------------------------------------------


def test_somebody_is_written_to_as_whatsapp_spells_them(gateway: Gateway, shop: Shop) -> None:
    queue(shop, "before", to=BIA)
    send(shop)
    somebody_writes(shop)
    (id_,) = queue(shop, "after", to=BIA)

    send(shop)

    assert [(call.place, call.to, call.data["text"]) for call in gateway.calls] == [
        ("text", f"{BIA[1:]}@s.whatsapp.net", "before"),
        ("text", f"{SHORT}@s.whatsapp.net", "after"),
    ]
    assert shown(shop, id_, "status", "recipient") == ("sent", BIA)
    assert statuses(shop) == ["sent", "sent"]


def test_lids_and_groups_are_written_to_as_they_are(gateway: Gateway, shop: Shop) -> None:
    for to in (LID, GROUP):
        queue(shop, "Olá", to=to)

    send(shop)

    assert sorted(call.to for call in gateway.calls) == [GROUP, LID]


def test_another_channels_spelling_is_no_ones_here(gateway: Gateway, shop: Shop) -> None:
    other = shop._replace(channel=a_second_channel(shop))
    somebody_writes(other)
    queue(shop, "Olá", to=BIA)

    send(shop)

    assert [call.to for call in gateway.calls] == [f"{BIA[1:]}@s.whatsapp.net"]


def a_second_channel(shop: Shop) -> Channel:
    channel = Channel(tenant_id=shop.tenant.id, id=uuid7(), kind="megaapi", name="other", config=shop.channel.config)
    with db.session([shop.tenant.id]) as s:
        s.add(channel)
    return channel


# -- what it is told of other messages -------------------------------------------------------------------------------


def test_what_is_read_is_named_by_its_key(gateway: Gateway, shop: Shop) -> None:
    alone, in_group = somebody_writes(shop), somebody_writes(shop, chat=GROUP)
    for wamid in (alone, in_group):
        queue(shop, to=BIA, read={"message_id": wamid})
        send(shop)

    jid = f"{SHORT}@s.whatsapp.net"
    assert gateway.calls == [
        Call("readMessage", {"key": {"remoteJid": jid, "fromMe": False, "id": alone}}),
        Call("readMessage", {"key": {"remoteJid": GROUP, "fromMe": False, "id": in_group, "participant": jid}}),
    ]
    assert statuses(shop) == ["sent", "sent"]
    assert {row["unread_count"] for row in rows(shop, "SELECT unread_count FROM conversation")} == {0}


def test_a_reply_brings_what_it_quotes(gateway: Gateway, shop: Shop) -> None:
    theirs = somebody_writes(shop, "Tem pão?")
    (ours,) = queue(shop, "Tem.", to=BIA)
    queue(shop, to=BIA, text={"body": "Sim!"}, context={"message_id": theirs})
    queue(shop, to=BIA, text={"body": "Ainda quente"}, context={"message_id": str(ours)})

    send(shop)

    jid = f"{SHORT}@s.whatsapp.net"
    first, second = (call for call in gateway.calls if call.place == "quoteMessage")
    assert first.data == {
        "to": jid,
        "text": "Sim!",
        "key": {"remoteJid": jid, "fromMe": False, "id": theirs},
        "message": {"conversation": "Tem pão?"},
    }
    assert second.data["key"] == {"remoteJid": jid, "fromMe": True, "id": message(shop, ours)["provider_id"]}
    assert second.data["message"] == {"conversation": "Tem."}
    assert statuses(shop) == ["sent"] * 3


def test_a_quote_of_a_message_whose_id_nobody_told_waits_until_somebody_does(gateway: Gateway, shop: Shop) -> None:
    gateway.names_it = False
    (ours,) = queue(shop, "Tem.")
    send(shop)
    (reply,) = queue(shop, text={"body": "Ainda quente"}, context={"message_id": str(ours)})
    send(shop)
    assert shown(shop, reply, "status", "error_code", "attempts") == ("queued", "reference_without_id", 0)

    hear(shop, an_echo("3EB0ECHO", "Tem."))
    make_due(shop)
    send(shop)

    assert [call.place for call in gateway.calls] == ["text", "quoteMessage"]
    assert gateway.calls[1].data["key"]["id"] == "3EB0ECHO"
    assert message(shop, reply)["status"] == "sent"


def test_a_quote_of_a_message_whose_id_nobody_ever_tells_fails(gateway: Gateway, shop: Shop) -> None:
    gateway.names_it = False
    (ours,) = queue(shop, "Tem.")
    send(shop)
    (reply,) = queue(shop, text={"body": "Ainda quente"}, context={"message_id": str(ours)})

    finish(shop)

    assert shown(shop, reply, "status", "error_code", "attempts") == ("failed", "reference_without_id", 0)
    assert len(gateway.calls) == 1


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_file_goes_along_byte_for_byte(gateway: Gateway, shop: Shop) -> None:
    size = 700_001
    media_id = a_file(shop, mime_type="application/pdf", size=size)
    element = {"media_id": str(media_id), "caption": "O pedido", "filename": "pedido.pdf"}
    (id_,) = queue(shop, document=element)

    send(shop)

    (call,) = gateway.calls
    data = dict(call.data)
    content = base64.b64decode(data.pop("base64"), validate=True)
    assert (len(content), hashlib.sha256(content).digest()) == (
        size,
        make("application/pdf", "a", size).digest,
    )
    assert (call.place, data) == (
        "mediaBase64",
        {
            "to": f"{SOMEBODY[1:]}@s.whatsapp.net",
            "type": "document",
            "caption": "O pedido",
            "fileName": "pedido.pdf",
            "mimeType": "application/pdf",
        },
    )
    assert shown(shop, id_, "status", "body") == ("sent", {"document": element})
    assert rows(shop, "SELECT * FROM media_upload") == []


def test_a_file_without_a_name_has_the_one_it_was_stored_under(gateway: Gateway, shop: Shop) -> None:
    media_id = a_file(shop)
    rows(shop, "UPDATE media SET filename = 'bolo.jpg' WHERE id = :id RETURNING id", id=media_id)
    queue(shop, image={"media_id": str(media_id)})

    send(shop)

    assert gateway.calls[0].data["fileName"] == "bolo.jpg"


def test_a_file_by_link_is_left_to_the_gateway(gateway: Gateway, shop: Shop) -> None:
    queue(shop, image={"link": "https://example.com/bolo.jpg", "caption": "Bolo"})

    send(shop)

    (call,) = gateway.calls
    assert (call.place, call.data["url"], call.data["caption"]) == ("mediaUrl", "https://example.com/bolo.jpg", "Bolo")


def test_texts_pass_files_of_which_few_are_under_way_at_once(gateway: Gateway, shop: Shop) -> None:
    texts_are_out = threading.Event()

    def answer(call: Call) -> None:
        if call.place == "text":
            if sum(one.place == "text" for one in gateway.calls) == 3:
                texts_are_out.set()
        else:
            assert texts_are_out.wait(30)

    gateway.answer = answer
    media_id = a_file(shop)
    for whom in people(20):
        queue(shop, to=whom, image={"media_id": str(media_id)})
    for whom in people(23)[20:]:
        queue(shop, "Olá", to=whom)

    send(shop)

    assert texts_are_out.is_set()
    assert statuses(shop) == ["sent"] * 23
    assert gateway.most_at_once <= _lanes._UPLOADS + 1


def test_a_file_that_the_storage_lost_fails_its_message_alone(gateway: Gateway, shop: Shop, surroundings: Path) -> None:
    media_id = a_file(shop)
    for path in surroundings.rglob("*.jpg"):
        path.unlink()
    (lost,) = queue(shop, image={"media_id": str(media_id)})
    (other,) = queue(shop, "Olá", to=people(1)[0])

    send(shop)

    assert shown(shop, lost, "status", "error_code") == ("failed", "file_missing")
    assert message(shop, other)["status"] == "sent"
    assert [call.place for call in gateway.calls] == ["text"]


def test_a_storage_that_is_away_delays_its_message_and_burns_no_try(
    gateway: Gateway, shop: Shop, surroundings: Path
) -> None:
    media_id = a_file(shop)
    (id_,) = queue(shop, image={"media_id": str(media_id)})
    surroundings.rename(surroundings.with_name("elsewhere"))
    surroundings.touch()
    send(shop)
    assert shown(shop, id_, "status", "tries", "error_code") == ("queued", 0, "storage_unavailable")

    surroundings.unlink()
    surroundings.with_name("elsewhere").rename(surroundings)
    finish(shop)

    assert outcomes(shop, id_) == ["not_sent", "accepted"]
    assert len(gateway.calls) == 1


def test_what_our_storage_lost_proves_nothing_of_a_provider_that_is_away(
    gateway: Gateway, shop: Shop, surroundings: Path
) -> None:
    (id_,) = queue(shop, image={"media_id": str(a_file(shop))})
    for path in surroundings.rglob("*.jpg"):
        path.unlink()
    with db.session([shop.tenant.id]) as s:
        Lane.set_hold(s, shop.channel.id, Hold.OUTAGE, code="no_answer", reason="away")
    make_due(shop)

    send(shop)

    assert (message(shop, id_)["status"], lane(shop)["hold"], gateway.calls) == ("failed", "outage", [])


def test_a_file_that_did_not_get_through_as_a_whole_was_not_sent() -> None:
    with a_gateway_that_hangs_up() as host:
        shop = a_channel(host)
        (id_,) = queue(shop, document={"media_id": str(a_file(shop, mime_type="application/pdf", size=20_000_000))})

        send(shop)

    assert shown(shop, id_, "status", "error_code", "tries") == ("queued", "upload_failed", 1)
    assert outcomes(shop, id_) == ["refused"]


@contextmanager
def a_gateway_that_hangs_up() -> Iterator[str]:
    """It reads the beginning of each request, and closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve_them() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(1_000)

    thread = threading.Thread(target=serve_them)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def test_a_file_that_waits_for_others_goes_back_when_the_process_stops(
    gateway: Gateway, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_lanes, "_UPLOADS", 1)
    is_over = threading.Event()

    def answer(call: Call) -> None:
        assert is_over.wait(30)

    gateway.answer = answer
    queue(shop, image={"media_id": str(a_file(shop))})
    other = a_channel(gateway.url)
    (waiting,) = queue(other, image={"media_id": str(a_file(other))})
    with another_process() as (lanes, _):
        first = lanes.wake(shop.channel.id)
        until(lambda: gateway.calls, "the first file")
        second = lanes.wake(other.channel.id)
        until(lambda: message(other, waiting)["status"] == "sending", "the second message to be begun")
        stopped = in_background(lanes.stop)
        second.result(20)
        assert shown(other, waiting, "status", "tries") == ("queued", 0)
        is_over.set()
        first.result(20)
        stopped()

    assert (statuses(shop), outcomes(other, waiting), len(gateway.calls)) == (["sent"], ["not_sent"], 1)


# -- the session -----------------------------------------------------------------------------------------------------


def test_a_disconnected_channel_holds_its_messages_and_goes_on_when_it_is_connected(
    gateway: Gateway, shop: Shop
) -> None:
    told(shop, "connected")
    told(shop, "disconnected")
    (id_,) = queue(shop, "Olá")
    finish_in_vain(shop)
    assert (gateway.calls, lane(shop)["hold"], message(shop, id_)["status"]) == ([], "disconnected", "queued")

    told(shop, "connected")
    send(shop)

    assert (lane(shop)["hold"], message(shop, id_)["status"], len(gateway.calls)) == (None, "sent", 1)


def finish_in_vain(shop: Shop) -> None:
    for _ in range(3):
        make_due(shop)
        send(shop)


def test_who_takes_a_lane_sees_that_its_channel_is_disconnected(gateway: Gateway, shop: Shop) -> None:
    (id_,) = queue(shop, "Olá")
    stands(shop, "disconnected")

    send(shop)
    finish_in_vain(shop)

    assert (gateway.calls, message(shop, id_)["status"]) == ([], "queued")
    row = lane(shop)
    assert (row["hold"], row["hold_code"], row["token"]) == ("disconnected", "disconnected", None)
    held = rows(shop, "SELECT payload FROM event WHERE type = 'channel_held' AND channel_id = :c", c=shop.channel.id)
    assert [one["payload"]["hold"] for one in held] == ["disconnected"]


def test_who_has_a_lane_sees_it_when_its_settings_are_read_anew(gateway: Gateway, shop: Shop) -> None:
    queue(shop, "Olá")
    line = Line.take(shop.channel.id, uuid4(), Pace(client_for_pace(settings().require_redis())))
    assert line is not None
    stands(shop, "disconnected")

    line.refresh()

    assert lane(shop)["hold"] == "disconnected"
    assert not line.turn([], under_way=[], may_begin=True).begun
    assert not line.release()


def stands(shop: Shop, status: str) -> None:
    """Known of the channel, but not to its lane: that had no row then."""
    rows(shop, "UPDATE channel SET status = :status WHERE id = :id RETURNING id", status=status, id=shop.channel.id)


def test_a_channel_whose_polls_fail_goes_on(gateway: Gateway, shop: Shop) -> None:
    told(shop, "connected")
    rows(shop, "UPDATE channel SET unknown_since = now() WHERE id = :id RETURNING id", id=shop.channel.id)
    queue(shop, "Olá")

    send(shop)

    assert statuses(shop) == ["sent"]


# -- answers ---------------------------------------------------------------------------------------------------------


def test_a_message_of_which_nobody_tells_stays_with_the_operator_and_is_not_sent_twice(
    gateway: Gateway, shop: Shop
) -> None:
    gateway.answer = lambda call: HTMLResponse("<h1>Bad gateway</h1>", 502)
    (id_,) = queue(shop, "Olá")
    send(shop)
    assert message(shop, id_)["status"] == "unknown"
    gateway.answer = lambda call: None

    finish(shop)

    assert shown(shop, id_, "status", "due_at", "attempts") == ("unknown", None, 1)
    assert len(letters(shop)) == 1
    assert len(gateway.calls) == 1


def test_a_channel_may_have_its_unknown_messages_sent_once_more(gateway: Gateway, shop: Shop) -> None:
    configure(shop, on_unknown="once_more")
    gateway.answer = lambda call: HTMLResponse("<h1>Bad gateway</h1>", 502) if len(gateway.calls) == 1 else None
    queue(shop, "Olá")

    send(shop)
    finish(shop)

    assert statuses(shop) == ["sent"]
    assert len(gateway.calls) == 2


def test_a_token_that_is_refused_holds_the_channel(gateway: Gateway, shop: Shop) -> None:
    refusal = {"name": "UNAUTHORIZED", "message": "Unauthorized", "status": 401, "errors": []}
    gateway.answer = lambda call: JSONResponse(refusal, 401)
    ids = [queue(shop, "Olá", to=whom)[0] for whom in people(5)]

    send(shop)

    assert (lane(shop)["hold"], lane(shop)["hold_code"]) == ("auth", "unauthorized")
    assert {shown(shop, id_, "status", "tries") for id_ in ids} == {("queued", 0)}
    assert len(gateway.calls) <= 2
    gateway.answer = lambda call: None
    finish(shop)
    assert statuses(shop) == ["sent"] * 5


def no_call(call: Call) -> Response:
    return HTMLResponse(f"<pre>Cannot POST {call.place}</pre>", 404)


def test_a_call_that_the_gateway_has_not_costs_its_message_alone(gateway: Gateway, shop: Shop) -> None:
    gateway.answer = lambda call: no_call(call) if call.place == "contactMessage" else None
    card = {"name": {"formatted_name": "Ana"}, "phones": [{"phone": "+55 11 98888-0002"}]}
    (lacking,) = queue(shop, to=BIA, contacts=[card])
    others = [queue(shop, "Olá", to=whom)[0] for whom in (BIA, *people(4))]

    send(shop)
    assert lane(shop)["hold"] is None
    finish(shop)

    assert [message(shop, id_)["status"] for id_ in others] == ["sent"] * 5
    assert shown(shop, lacking, "status", "error_code") == ("failed", "http_404")
    assert (lane(shop)["hold"], outcomes(shop, lacking)) == (None, ["refused"] * 3)
    assert [letter["message_id"] for letter in letters(shop)] == [lacking]


def not_allowed(call: Call) -> Response:
    return JSONResponse({"name": "FORBIDDEN", "message": "Forbidden", "status": 403, "errors": []}, 403)


@pytest.mark.parametrize(
    ("answer", "status", "code"), [(no_call, "connecting", "not_found"), (not_allowed, "connected", "forbidden")]
)
def test_a_gateway_that_takes_no_text_at_all_holds_the_channel_and_fails_nothing(
    gateway: Gateway, shop: Shop, answer: Callable[[Call], Response | None], status: str, code: str
) -> None:
    gateway.answer, gateway.status = answer, status
    ids = [queue(shop, "Olá", to=whom)[0] for whom in people(5)]

    finish_in_vain(shop)

    assert (lane(shop)["hold"], lane(shop)["hold_code"], letters(shop)) == ("auth", code, [])
    assert {shown(shop, id_, "status", "tries") for id_ in ids} == {("queued", 0)}
    gateway.answer, gateway.status = lambda call: None, "connected"
    finish(shop)
    assert (statuses(shop), lane(shop)["hold"]) == (["sent"] * 5, None)


def test_a_receipt_that_the_gateway_has_no_call_for_stops_nothing(gateway: Gateway, shop: Shop) -> None:
    gateway.answer = lambda call: no_call(call) if call.place == "readMessage" else None
    (receipt,) = queue(shop, to=BIA, read={"message_id": somebody_writes(shop)})
    (text,) = queue(shop, "Olá", to=BIA)

    finish(shop)

    assert [message(shop, id_)["status"] for id_ in (receipt, text)] == ["failed", "sent"]
    assert (lane(shop)["hold"], letters(shop)) == (None, [])


def test_a_drop_that_the_gateway_answers_with_400_fails_nothing(gateway: Gateway, shop: Shop) -> None:
    refusal = JSONResponse({"error": True, "message": "phone is not connected"}, 400)
    gateway.answer, gateway.status = lambda call: refusal, "disconnected"
    ids = [queue(shop, "Olá", to=whom)[0] for whom in people(5)]

    send(shop)

    assert lane(shop)["hold"] == "disconnected"
    assert {shown(shop, id_, "status", "tries") for id_ in ids} == {("queued", 0)}


def test_a_no_while_nobody_can_tell_how_the_instance_stands_is_not_sent_again_by_itself(
    gateway: Gateway, shop: Shop
) -> None:
    gateway.answer = lambda call: JSONResponse({"error": True, "message": "Timed Out"})
    gateway.status = "connecting"
    (lost,) = queue(shop, "Olá")

    finish(shop)

    assert (shown(shop, lost, "status", "attempts"), len(gateway.calls)) == (("unknown", 1), 1)
    hear(shop, an_echo("3EB0LATE"))
    assert shown(shop, lost, "status", "provider_id") == ("sent", "3EB0LATE")


def test_the_edge_that_turns_us_away_pauses_the_channel_and_burns_no_try(gateway: Gateway, shop: Shop) -> None:
    gateway.answer = lambda call: HTMLResponse("<title>Attention Required! | Cloudflare</title>", 403)
    (id_,) = queue(shop, "Olá")

    send(shop)

    row = lane(shop)
    assert (row["hold"], row["pause_code"]) == (None, "edge_blocked")
    assert (row["paused_until"] - datetime.now(UTC)).total_seconds() > 50
    assert (shown(shop, id_, "status", "tries"), refusals(shop, id_)) == (("queued", 0), ["edge_blocked"])
    gateway.answer = lambda call: None
    finish(shop)
    assert outcomes(shop, id_) == ["refused", "accepted"]


def test_an_error_in_a_good_answer_fails_the_one_message(gateway: Gateway, shop: Shop) -> None:
    bad, good = people(2)
    refusal = JSONResponse({"error": True, "message": "number is not on WhatsApp"})
    gateway.answer = lambda call: refusal if call.to.startswith(bad[1:]) else None
    ids = [queue(shop, "Olá", to=whom)[0] for whom in (bad, good)]

    send(shop)
    finish(shop)

    assert shown(shop, ids[0], "status", "error_code", "error") == ("failed", "rejected", "number is not on WhatsApp")
    assert message(shop, ids[1])["status"] == "sent"
    assert (lane(shop)["hold"], outcomes(shop, ids[0])) == (None, ["refused", "refused"])


def test_a_drop_that_is_over_when_it_is_asked_about_costs_no_message(gateway: Gateway, shop: Shop) -> None:
    refusal = JSONResponse({"error": True, "message": "the instance is not connected"})
    gateway.answer = lambda call: refusal
    (id_,) = queue(shop, "Olá")

    send(shop)
    assert message(shop, id_)["status"] == "queued"
    gateway.answer = lambda call: None
    finish(shop)

    assert outcomes(shop, id_) == ["refused", "accepted"]


@pytest.mark.usefixtures("queues")
def test_a_drop_that_a_send_meets_first_costs_no_message(gateway: Gateway, shop: Shop) -> None:
    refusal = JSONResponse({"error": True, "message": "the instance is not connected"})
    gateway.answer, gateway.status = lambda call: refusal, "disconnected"
    first, second = (queue(shop, "Olá", to=whom)[0] for whom in people(2))

    send(shop)

    assert lane(shop)["hold"] == "disconnected"
    assert [message(shop, id_)["status"] for id_ in (first, second)] == ["queued", "queued"]
    assert asked_about() == [str(shop.channel.id)]
    status_check(str(shop.channel.id))  # what the bell is for
    assert rows(shop, "SELECT status FROM channel WHERE id = :id", id=shop.channel.id) == [{"status": "disconnected"}]
    gateway.answer, gateway.status = lambda call: None, "connected"
    ask_soon(shop.tenant.id, shop.channel.id)
    status_check(str(shop.channel.id))
    finish(shop)
    assert [message(shop, id_)["status"] for id_ in (first, second)] == ["sent", "sent"]


def test_what_fails_after_its_acceptance_is_not_judged_by_metas_codes(gateway: Gateway, shop: Shop) -> None:
    (id_,) = queue(shop, "Olá")
    send(shop)
    wamid = message(shop, id_)["provider_id"]
    hear(shop, inbound.Status("$", wamid, "failed", datetime.now(UTC), error_code="131016", error="x"))

    finish(shop)

    assert message(shop, id_)["status"] == "failed"
    assert len(gateway.calls) == 1


@pytest.mark.parametrize("is_first", [False, True], ids=["after the answer", "before it"])
def test_what_whatsapp_did_not_take_after_all_says_so(
    gateway: Gateway, shop: Shop, is_first: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def tell(id_: str) -> None:
        key = {"remoteJid": f"{SOMEBODY[1:]}@s.whatsapp.net", "fromMe": True, "id": id_}
        said = {"instance_key": KEY, "messageType": "message.ack", "key": key, "update": {"status": 0}}
        parsed = megaapi_webhook.parse(json.dumps(said).encode(), datetime.now(UTC))
        hear(shop, *(item for change in parsed.changes for item in change.items))

    def answer(call: Call) -> Response | None:
        if not is_first:
            return None
        tell("3EB0NOT")
        key = {"remoteJid": call.to, "fromMe": True, "id": "3EB0NOT"}
        return JSONResponse({"error": False, "message": "ok", "messageData": {"key": key}})

    gateway.answer = answer
    failures = count_of(metrics.messages, direction="out", provider="megaapi", outcome="failed")
    (id_,) = queue(shop, "Olá")
    send(shop)
    if not is_first:
        tell(message(shop, id_)["provider_id"])
    finish(shop)

    text = "the gateway says that WhatsApp did not take it"
    assert shown(shop, id_, "status", "error_code", "error") == ("failed", "ack_error", text)
    assert (failures(), len(gateway.calls), lane(shop)["hold"]) == (1, 1, None)
    said = "".join(capsys.readouterr())
    assert said.count("message_failed") == 1
    assert "ack_error" in said


@pytest.mark.parametrize(("kind", "per_second"), [("megaapi", 5), ("stub", 80), ("meta", 80)])
def test_each_kind_has_its_usual_rate(kind: str, per_second: float) -> None:
    shops = [a_channel("https://example.com", kind), a_channel("https://example.com", kind, messages_per_second=None)]
    gaps = []
    for shop, rate in zip(shops, (1_000, per_second), strict=True):
        queue(shop, "Olá")
        line = Line.take(shop.channel.id, uuid4(), Pace(client_for_pace(settings().require_redis())))
        assert line is not None
        line.release()
        gaps.append(line.gap * rate)

    assert gaps[0] == pytest.approx(gaps[1])


def test_a_strict_gateway_takes_all_that_a_channel_may_send() -> None:
    known = MegaInstance(KEY, KEY, "a-token", "connected", BIA[1:], None)
    with a_megaapi(known) as url:
        shop = a_channel(url)
        wamid, media_id = somebody_writes(shop), str(a_file(shop))
        card = {"name": {"formatted_name": "Ana"}, "phones": [{"phone": "+55 11 98888-0002"}]}
        for body in (
            {"text": {"body": "Olá", "preview_url": True}},
            {"text": {"body": "Sim!"}, "context": {"message_id": wamid}},
            {"image": {"media_id": media_id, "caption": "Bolo"}},
            {"video": {"link": "https://example.com/v.mp4"}},
            {"audio": {"link": "https://example.com/a.ogg"}},
            {"document": {"media_id": media_id, "filename": "a.jpg"}},
            {"location": {"latitude": -23.55, "longitude": -46.63, "name": "Sé", "address": "Praça da Sé"}},
            {"contacts": [card]},
            {"read": {"message_id": wamid}},
        ):
            queue(shop, to=BIA, **body)
        finish(shop)

        summary = client.mega_summary(url)
        assert (summary["accepted"], summary["refused"], summary["reasons"]) == (9, 0, {})
        assert statuses(shop) == ["sent"] * 9


# -- the stub --------------------------------------------------------------------------------------------------------


def test_a_stub_takes_everything_and_reaches_nobody(gateway: Gateway) -> None:
    shop = a_channel(gateway.url, "stub")
    queue(shop, "Olá")
    queue(shop, image={"media_id": str(a_file(shop))})
    queue(shop, template={"name": "hello", "language": {"code": "pt_BR"}})

    send(shop)

    assert statuses(shop) == ["sent"] * 3
    assert gateway.calls == []
