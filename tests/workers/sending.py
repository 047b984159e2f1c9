"""What the tests of sending share: a number at a simulated Meta, messages as the web tier queues them, and a job."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import msgspec
import pytest
from sqlalchemy import text

from models import Channel, Conversation, Lane, Message
from models.contact import Meeting
from pombal import db
from pombal.ids import uuid7
from pombal.settings import settings
from sandbox import client, config
from sandbox import meta as meta_says
from tests.factories import Shop, a_shop, body_of, rows
from tests.sandbox.servers import a_meta
from tests.workers.tools import deliveries, run
from workers import outgoing_message
from workers._lanes import Lanes

TOKEN = "EAAB-a-token-of-a-test"
SOMEBODY = "+5511944440001"


class Meta(NamedTuple):
    """A shop whose number is at a simulated Meta, and the address of that."""

    shop: Shop
    url: str

    def calls(self) -> list[dict[str, Any]]:
        """Every call the provider got, in its order."""
        found: list[dict[str, Any]] = client.calls(self.url, limit=100_000)["calls"]
        return found

    def accepted(self) -> list[str]:
        """The texts it accepted, in its order."""
        return [call["text"] for call in self.calls() if call["outcome"] == "accepted"]


@contextmanager
def a_number_at_meta(monkeypatch: pytest.MonkeyPatch, shop: Shop | None = None, **channel: Any) -> Iterator[Meta]:
    """A simulated Meta that knows one number; no statuses come back by themselves."""
    with numbers_at_meta(monkeypatch, shop or a_shop(access_token=TOKEN), **channel) as (meta,):
        yield meta


@contextmanager
def numbers_at_meta(monkeypatch: pytest.MonkeyPatch, *shops: Shop, **channel: Any) -> Iterator[list[Meta]]:
    """The same for the numbers of several shops."""
    known = [
        config.Channel(
            name=shop.channel.name,
            phone_number_id=shop.number.phone_number_id,
            waba_id=shop.number.waba_id,
            access_token=TOKEN,
            **channel,
        )
        for shop in shops
    ]
    with a_meta(*known) as url, graph_is_at(monkeypatch, url):
        yield [Meta(shop, url) for shop in shops]


@contextmanager
def graph_is_at(monkeypatch: pytest.MonkeyPatch, url: str) -> Iterator[None]:
    """Send there."""
    with monkeypatch.context() as patch:
        patch.setenv("WHATSAPP_GRAPH_URL", url)
        settings.cache_clear()
        try:
            yield
        finally:
            patch.undo()
            settings.cache_clear()


@contextmanager
def another_process() -> Iterator[tuple[Lanes, list[UUID]]]:
    """Lanes as a second process has them, and the bells it rang."""
    rung: list[UUID] = []
    lanes = Lanes(rung.append)
    try:
        yield lanes, rung
    finally:
        lanes.stop()


def queue(shop: Shop, *texts: str, to: str = SOMEBODY, not_before: datetime | None = None, **body: Any) -> list[UUID]:
    """Messages as the web tier leaves them: committed and queued, their bell not yet rung. `body`: of another type."""
    tenant, channel = shop.tenant.id, shop.channel.id
    kind = next(iter(body), "text")
    bodies = [body] if body else [{"text": {"body": text}} for text in texts]
    identity = ("phone", to.removeprefix("+")) if to.startswith("+") else ("bsuid", to)
    ids = [uuid7() for _ in bodies]
    with db.session([tenant]) as s:
        people = Meeting()
        people.meet(tenant, channel, (identity,), (), None, datetime.now().astimezone())
        people.settle(s)
        contact = people.whom(tenant, channel, (identity,))
        conversation = Conversation.id_of(channel, contact)
        given = [
            {
                "tenant_id": tenant,
                "id": id_,
                "channel_id": channel,
                "conversation_id": conversation,
                "contact_id": contact,
                "type": kind,
                "body": msgspec.json.encode(content).decode(),
                "recipient": None if kind == "read" else to,
                "not_before": not_before,
                "idempotency_key": None,
                "request_digest": None,
                "request_id": None,
            }
            for id_, content in zip(ids, bodies, strict=True)
        ]
        Message.queue(s, given)
        Lane.expect(s, [{"tenant_id": tenant, "channel_id": channel, "due_at": not_before}])
        now = datetime.now().astimezone()
        touched = {"last_message_at": now, "window_until": None, "unread_count": 0}
        Conversation.touch(
            s, [{"tenant_id": tenant, "id": conversation, "channel_id": channel, "contact_id": contact, **touched}]
        )
    return ids


def send(shop: Shop) -> None:
    """One job, to its end."""
    outgoing_message(str(shop.channel.id))


def configure(shop: Shop, **values: Any) -> None:
    """Settings of the channel, such as `messages_per_second`."""
    with db.session([shop.tenant.id]) as s:
        channel = s.get_one(Channel, (shop.tenant.id, shop.channel.id))
        channel.config = channel.config | values


def message(shop: Shop, id_: UUID) -> dict[str, Any]:
    (found,) = rows(shop, "SELECT * FROM message WHERE id = :id", id=id_)
    return found


def statuses(shop: Shop) -> list[str]:
    """Of its outgoing messages, in the order they were queued."""
    return [row["status"] for row in rows(shop, "SELECT status FROM message WHERE direction = 'out' ORDER BY id")]


def attempts(shop: Shop, id_: UUID) -> list[dict[str, Any]]:
    return rows(shop, "SELECT * FROM attempt WHERE message_id = :id ORDER BY number", id=id_)


def lane(shop: Shop) -> dict[str, Any]:
    (found,) = rows(shop, "SELECT * FROM lane WHERE channel_id = :channel", channel=shop.channel.id)
    return found


def make_due(shop: Shop) -> None:
    """Let the waits be over that the line has come to: retries, pauses, probes, waits for a status."""
    with db.session([shop.tenant.id]) as s:
        given = {"channel": shop.channel.id}
        for order in (
            "UPDATE message SET due_at = now() - interval '1 second' WHERE channel_id = :channel AND due_at > now()",
            "UPDATE lane SET next_due_at = now(), next_probe_at = now(), until = NULL WHERE channel_id = :channel",
            "UPDATE lane SET paused_until = now() WHERE channel_id = :channel AND paused_until > now()",
        ):
            s.execute(text(order), given)


def lease_runs_out(shop: Shop) -> None:
    """As if whoever has the lane had not been heard of for too long: another process may take it."""
    with db.session() as s:
        order = "UPDATE lane SET until = now() - interval '1 second', token = :token WHERE channel_id = :channel"
        s.execute(text(order), {"token": uuid4(), "channel": shop.channel.id})


def their_time_comes(shop: Shop, *ids: UUID) -> None:
    """Scheduled messages, as if their time was a moment ago: later than that of all others so far."""
    with db.session([shop.tenant.id]) as s:
        order = "UPDATE message SET turn_at = now(), due_at = now() WHERE id = ANY(:ids)"
        s.execute(text(order), {"ids": list(ids)})
        Lane.expect(s, [{"tenant_id": shop.tenant.id, "channel_id": shop.channel.id, "due_at": None}])


def finish(shop: Shop, most: int = 30) -> None:
    """Jobs, with all waits over between them, until nothing of the line is left that could move."""
    for _ in range(most):
        make_due(shop)
        send(shop)
        still = (
            "SELECT FROM message WHERE channel_id = :channel AND direction = 'out'"
            " AND (status IN ('queued', 'sending') OR status = 'unknown' AND due_at IS NOT NULL)"
        )
        if not rows(shop, still, channel=shop.channel.id):
            return
    raise AssertionError(f"the line does not empty: {statuses(shop)}")


def report(shop: Shop, wamid: str, *words: str, callback: str | None = None, to: str = SOMEBODY, **more: Any) -> None:
    """Statuses of a message come by webhook, and are processed."""
    extra = {} if callback is None else {"biz_opaque_callback_data": callback}
    said = [
        meta_says.status(wamid, word, 1_788_000_000 + n, to.removeprefix("+"), **extra, **more)
        for n, word in enumerate(words)
    ]
    run(deliveries(shop, [body_of(shop, {"statuses": said})]))


def events(shop: Shop, id_: UUID) -> list[str]:
    """The statuses that a message's events tell, in their order."""
    found = rows(shop, "SELECT payload FROM event WHERE message_id = :id ORDER BY id", id=id_)
    return [row["payload"]["status"] for row in found if "status" in row["payload"]]


def letters(shop: Shop) -> list[dict[str, Any]]:
    """What was given up of this shop's messages."""
    return rows(shop, "SELECT * FROM dead_letter WHERE tenant_id = :tenant AND message_id IS NOT NULL ORDER BY id")


def count_of(metric: Any, **labels: str) -> Callable[[], float]:
    """How much a counter has grown since."""
    before = metric.labels(**labels)._value.get()
    return lambda: float(metric.labels(**labels)._value.get() - before)
