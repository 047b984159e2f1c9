"""Sending through Baileys gateways: what lanes, echoes and holds make of two dialects, one whose answers tell the
message's id (Evolution) and one that takes a message into a queue of its own (Whaticket).

Against gateways over a real socket that keep what they were told, and answer as the test wants them to.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from models import Channel, Delivery, WebhookToken
from pombal import db, metrics
from pombal.ids import uuid7
from pombal.settings import settings
from providers.storage import storage
from sandbox.files import make
from tests.factories import Shop, a_shop, rows
from tests.sandbox.servers import serve
from tests.workers.sending import (
    attempts,
    count_of,
    events,
    finish,
    lane,
    letters,
    make_due,
    message,
    queue,
    send,
    statuses,
)
from tests.workers.test_media_sending import a_file
from tests.workers.tools import run
from workers import _standing

pytestmark = pytest.mark.usefixtures("queues")

KEY, SESSION = "the-key-of-the-gateway", "shop"
BIA, BIAS_JID = "+5511988880001", "5511988880001@s.whatsapp.net"


class Gateway:
    """One session. `answer` may give a response of its own in place of the usual one to a send."""

    def __init__(self, dialect: str) -> None:
        self.dialect, self.url = dialect, ""
        self.sent: list[tuple[str, Any]] = []  # path, body
        self.state = "open" if dialect == "evolution" else "CONNECTED"
        self.answer: Callable[[], Response | None] = lambda: None
        self.look: Response | None = None  # in place of how the session stands

    async def serve(self, request: Request) -> Response:
        proof = {"evolution": ("apikey", KEY), "whaticket": ("authorization", f"Bearer {KEY}")}[self.dialect]
        assert request.headers[proof[0]] == proof[1]
        path = request.url.path
        if self.look and path == "/whatsapp":
            return self.look
        if path.startswith("/instance/"):
            return JSONResponse({"instance": {"instanceName": SESSION, "state": self.state}})
        if path == "/whatsapp":
            return JSONResponse([{"id": 26, "name": SESSION, "status": self.state}])
        raw = await request.body()
        is_json = request.headers["content-type"] == "application/json"
        self.sent.append((path, msgspec.json.decode(raw) if is_json else raw))
        if said := self.answer():
            return said
        if self.dialect == "whaticket":
            return JSONResponse({"mensagem": "Mensagem enviada"})
        key = {"remoteJid": BIAS_JID, "fromMe": True, "id": f"3EB0{uuid4().hex[:18].upper()}"}
        return JSONResponse({"key": key, "status": "PENDING"}, 201)

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{path:path}", self.serve, methods=["GET", "POST", "PUT"])])


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A storage of the test's own, and gateways on this machine allowed."""
    monkeypatch.setenv("MEDIA_URL", f"file://{tmp_path}/media")
    monkeypatch.setenv("MEDIA_ALLOWED_NETWORKS", "127.0.0.0/8")
    settings.cache_clear()
    storage.cache_clear()
    yield
    storage.cache_clear()
    settings.cache_clear()


@contextmanager
def a_gateway(dialect: str) -> Iterator[tuple[Gateway, Shop]]:
    """A gateway, and a shop whose channel is on it."""
    gateway, shop = Gateway(dialect), a_shop()
    with serve(gateway.app()) as gateway.url:
        config = {"gateway": dialect, "host": gateway.url, "session": SESSION, "messages_per_second": 1_000}
        channel = Channel(tenant_id=shop.tenant.id, id=uuid7(), kind="baileys", name="gateway", config=config)
        channel.seal({"api_key": KEY})
        token, _ = WebhookToken.make(shop.tenant.id, channel.id, SESSION)
        with db.session([shop.tenant.id]) as s:
            s.add(channel)
            s.flush()
            s.add(token)
        yield gateway, shop._replace(channel=channel)


def delivered(shop: Shop, event: str, data: dict[str, Any]) -> None:
    """The gateway's webhook tells this, and a worker has understood it."""
    raw = msgspec.json.encode({"event": event, "instance": SESSION, "data": data})
    made = Delivery(id=uuid7(), provider="baileys", channel_id=shop.channel.id, request_id=uuid4().hex, raw=raw)
    with db.session() as s:
        s.add(made)
    run([made.id])


def echo(shop: Shop, id_: str, text: str) -> None:
    """What was sent comes back as a message of our own."""
    key = {"remoteJid": BIAS_JID, "fromMe": True, "id": id_}
    said = {"key": key, "message": {"conversation": text}, "messageTimestamp": int(time.time()), "status": "SERVER_ACK"}
    delivered(shop, "messages.upsert", said)


def told(shop: Shop, status: str) -> None:
    """What the gateway says of the channel's session, as a poll brings it."""
    poll = {"tenant_id": shop.tenant.id, "id": shop.channel.id, "asked_at": datetime.now(UTC), "own_id": None}
    _standing.keep([shop.tenant.id], [poll | {"status": status, "raw": status, "reason": None}])


def outgoing(shop: Shop) -> list[dict[str, Any]]:
    order = "SELECT id, status, provider_id FROM message WHERE channel_id = :id ORDER BY id"
    return rows(shop, order, id=shop.channel.id)


def outcomes(shop: Shop, id_: UUID) -> list[str]:
    return [attempt["outcome"] for attempt in attempts(shop, id_)]


def test_an_answer_that_tells_the_id_settles_a_message_and_its_echo_is_the_same_message() -> None:
    with a_gateway("evolution") as (gateway, shop):
        first, second = queue(shop, "eins", "zwei", to=BIA)

        send(shop)
        provider_id = message(shop, first)["provider_id"]
        echo(shop, provider_id, "eins")
        ack = {"keyId": provider_id, "remoteJid": BIAS_JID, "fromMe": True, "status": "READ"}
        delivered(shop, "messages.update", ack)

        said = [(path, body["number"], body["text"]) for path, body in gateway.sent]
        assert said == [(f"/message/sendText/{SESSION}", BIA[1:], text) for text in ("eins", "zwei")]
        assert [(row["id"], row["status"]) for row in outgoing(shop)] == [(first, "read"), (second, "sent")]
        assert provider_id.startswith("3EB0")


def test_one_that_only_takes_a_message_on_tells_its_id_by_the_echo() -> None:
    with a_gateway("whaticket") as (gateway, shop):
        (id_,) = queue(shop, "Olá", to=BIA)
        send(shop)
        assert (message(shop, id_)["status"], message(shop, id_)["provider_id"]) == ("sent", None)

        echo(shop, "3EB0AAAA", "Olá")

        assert gateway.sent == [("/api/messages/send", {"number": BIA[1:], "body": "Olá"})]
        assert [(row["id"], row["provider_id"]) for row in outgoing(shop)] == [(id_, "3EB0AAAA")]


@pytest.mark.parametrize("dialect", ["evolution", "whaticket"])
def test_a_lost_answer_leaves_a_message_unknown_until_its_echo_and_it_is_never_sent_twice(dialect: str) -> None:
    with a_gateway(dialect) as (gateway, shop):
        gateway.answer = lambda: HTMLResponse("<h1>Bad gateway</h1>", 502)
        heard, unheard = queue(shop, "heard", "unheard", to=BIA)
        finish(shop)
        assert statuses(shop) == ["unknown", "unknown"]

        echo(shop, "3EB0BBBB", "heard")
        gateway.answer = lambda: None
        finish(shop)

        assert (message(shop, heard)["status"], message(shop, heard)["provider_id"]) == ("sent", "3EB0BBBB")
        assert message(shop, unheard)["status"] == "unknown"  # for an operator: nobody can tell
        assert len(gateway.sent) == 2


def test_messages_wait_while_the_session_is_disconnected_and_leave_in_order_after_it() -> None:
    with a_gateway("whaticket") as (gateway, shop):
        told(shop, "disconnected")
        queue(shop, "eins", "zwei", to=BIA)
        send(shop)
        assert (gateway.sent, lane(shop)["hold"]) == ([], "disconnected")

        told(shop, "connected")
        send(shop)

        assert [body["body"] for _, body in gateway.sent] == ["eins", "zwei"]
        assert (statuses(shop), lane(shop)["hold"]) == (["sent", "sent"], None)


def test_a_refusal_while_the_session_is_closed_is_none_of_the_message() -> None:
    with a_gateway("evolution") as (gateway, shop):
        gateway.state = "close"
        gateway.answer = lambda: JSONResponse({"status": 400, "response": {"message": ["Connection Closed"]}}, 400)
        (id_,) = queue(shop, "Olá", to=BIA)
        send(shop)
        assert (message(shop, id_)["status"], lane(shop)["hold"], outcomes(shop, id_)) == (
            "queued",
            "disconnected",
            ["refused"],
        )

        gateway.answer, gateway.state = lambda: None, "open"
        told(shop, "connected")
        make_due(shop)
        send(shop)

        assert (message(shop, id_)["status"], len(gateway.sent)) == ("sent", 2)


def test_a_no_that_was_none_is_counted_as_a_double_when_its_echo_comes() -> None:
    with a_gateway("evolution") as (gateway, shop):
        gateway.answer = lambda: JSONResponse({"status": 400, "response": {"message": ["Error: Timed Out"]}}, 400)
        (id_,) = queue(shop, "Olá", to=BIA)
        send(shop)
        gateway.answer = lambda: None
        finish(shop)
        doubles = count_of(metrics.double_sends, provider="baileys")

        echo(shop, "3EB0CCCC", "Olá")

        assert [(row["id"], row["status"]) for row in outgoing(shop)] == [(id_, "sent")]
        assert (doubles(), len(gateway.sent), events(shop, id_)[-1]) == (1, 2, "sent_twice")


def test_a_no_of_which_nobody_can_tell_is_never_sent_again_by_itself() -> None:
    with a_gateway("evolution") as (gateway, shop):
        gateway.answer = lambda: JSONResponse({"status": 400, "response": {"message": ["Error: Timed Out"]}}, 400)
        gateway.state = "connecting"
        (id_,) = queue(shop, "Olá", to=BIA)

        finish(shop)

        assert (message(shop, id_)["status"], outcomes(shop, id_), len(gateway.sent)) == ("unknown", ["unknown"], 1)
        assert [attempt["error"] for attempt in attempts(shop, id_)] == ["Error: Timed Out"]


def test_a_message_waits_while_a_session_connects_again() -> None:
    with a_gateway("whaticket") as (gateway, shop):
        gateway.answer, gateway.state = lambda: JSONResponse({"error": "ERR_WAPP_NOT_INITIALIZED"}, 400), "PENDING"
        for n in range(6):
            queue(shop, "Olá", to=f"+551198888000{n}")
        for _ in range(8):
            make_due(shop)
            send(shop)
        assert (statuses(shop), lane(shop)["hold"]) == (["queued"] * 6, "outage")

        gateway.answer, gateway.state = lambda: None, "CONNECTED"
        finish(shop)

        assert (statuses(shop), letters(shop), lane(shop)["hold"]) == (["sent"] * 6, [], None)


def test_numbers_that_are_not_on_whatsapp_are_no_outage_where_the_session_cannot_be_looked_at() -> None:
    with a_gateway("whaticket") as (gateway, shop):
        gateway.look = JSONResponse({"error": "ERR_SESSION_EXPIRED"}, 401)
        gateway.answer = lambda: JSONResponse({"error": "the number is not on WhatsApp"}, 400)
        for n in range(5):
            queue(shop, "Olá", to=f"+551198888000{n}")

        finish(shop)

        assert (statuses(shop), lane(shop)["hold"], lane(shop)["misses"]) == (["failed"] * 5, None, 0)


def test_a_file_of_ours_goes_along_with_its_message() -> None:
    with a_gateway("whaticket") as (gateway, shop):
        file = a_file(shop, "a picture")
        (id_,) = queue(shop, to=BIA, image={"media_id": str(file), "caption": "Look"})

        send(shop)

        ((path, form),) = gateway.sent
        assert (path, message(shop, id_)["status"]) == ("/api/messages/send", "sent")
        assert b"".join(make("image/jpeg", "a picture").chunks()) in form
        assert b'name="medias"' in form
