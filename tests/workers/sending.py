"""What the tests of sending share: a number at a simulated Meta, messages as the web tier queues them, and a job."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
import pytest
from sqlalchemy import text

from models import Channel, Conversation, Lane, Message
from models.contact import Meeting
from pombal import db
from pombal.ids import uuid7
from pombal.settings import settings
from sandbox import client, config
from tests.factories import Shop, a_shop, rows
from tests.sandbox.servers import a_meta
from workers import outgoing_message

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
    shop = shop or a_shop(access_token=TOKEN)
    its = config.Channel(
        name=shop.channel.name,
        phone_number_id=shop.number.phone_number_id,
        waba_id=shop.number.waba_id,
        access_token=TOKEN,
        **channel,
    )
    with a_meta(its) as url:
        monkeypatch.setenv("WHATSAPP_GRAPH_URL", url)
        settings.cache_clear()
        try:
            yield Meta(shop, url)
        finally:
            monkeypatch.undo()
            settings.cache_clear()


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
            "UPDATE lane SET next_due_at = now(), paused_until = NULL, next_probe_at = now(), until = NULL"
            " WHERE channel_id = :channel",
        ):
            s.execute(text(order), given)
