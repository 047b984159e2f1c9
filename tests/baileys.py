"""A tenant with one channel on a Baileys gateway, and bodies as gateways of each dialect would send them
(baileys-sessions.md §5, "Webhooks")."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from models import Channel, ChannelKind, Delivery, Tenant, WebhookToken
from pombal import db
from pombal.cli.baileys import named_in_webhooks
from pombal.ids import uuid7
from tests.factories import a_tenant, all_of
from tests.gateways import AT, CUSTOMER, TEXT, an_id, encoded

OWN = "5511955550300@s.whatsapp.net"


class Session(NamedTuple):
    """A channel, and what its gateway calls the session behind it."""

    tenant: Tenant
    channel: Channel
    name: str
    token: str

    @property
    def path(self) -> str:
        return f"/api/webhooks/baileys/{self.channel.id}"

    @property
    def url(self) -> str:
        return f"{self.path}?token={self.token}"

    def rows(self, query: str, **values: Any) -> list[dict[str, Any]]:
        """Rows of its tenant by SQL, as dicts."""
        with db.session([self.tenant.id]) as s:
            return all_of(s, query, **values)


def a_session(tenant: Tenant | None = None, *, dialect: str = "evolution") -> Session:
    tenant = tenant or a_tenant()
    name = f"s{uuid4().hex[:12]}"
    config = {"gateway": dialect, "host": "http://127.0.0.1:9", "session": name}
    channel = Channel(tenant_id=tenant.id, id=uuid7(), kind=ChannelKind.BAILEYS, name=f"c{uuid4().hex}", config=config)
    row, token = WebhookToken.make(tenant.id, channel.id, named_in_webhooks(config))
    with db.session([tenant.id]) as s:
        s.add(channel)
        s.flush()
        s.add(row)
    return Session(tenant, channel, name, token)


def deliveries(session: Session, bodies: Iterable[Any]) -> list[UUID]:
    """Bodies as the web tier leaves them, in one commit; bytes are taken as they are."""
    raws = [body if isinstance(body, bytes) else encoded(body) for body in bodies]
    made = [
        Delivery(id=uuid7(), provider="baileys", channel_id=session.channel.id, request_id=uuid4().hex, raw=raw)
        for raw in raws
    ]
    with db.session() as s:
        s.add_all(made)
    return [one.id for one in made]


def message(said: Any = TEXT, *, id_: str | None = None, **fields: Any) -> dict[str, Any]:
    """A message as Baileys emits it. Fields of the key are given by name, others replace the body's; `...` leaves
    out."""
    names = ("remoteJid", "fromMe", "participant", "remoteJidAlt", "participantAlt")
    key = {"remoteJid": CUSTOMER, "fromMe": False, "id": id_ or an_id()}
    key |= {name: fields.pop(name) for name in names if name in fields}
    body = {"key": key, "messageTimestamp": AT, "pushName": "Bia", "broadcast": False, "message": said}
    return {name: value for name, value in (body | fields).items() if value is not ...}


def stub(text: str | None = "No session record", **fields: Any) -> dict[str, Any]:
    """One that could not be decrypted."""
    return message(..., messageStubType=2, messageStubParameters=[text] if text is not None else [], **fields)


def evolution(name: str, event: str, data: Any) -> dict[str, Any]:
    return {
        "event": event,
        "instance": name,
        "data": data,
        "destination": "https://pombal.example/api/webhooks/baileys/x?token=our-own-proof",
        "date_time": "2026-09-01T12:00:00.000Z",
        "sender": OWN,
        "server_url": "http://gateway:8080",
        "apikey": "the-gateways-own-key",
    }


def evolution_message(name: str, **fields: Any) -> dict[str, Any]:
    given = {"status": "DELIVERY_ACK", "messageType": "conversation", "instanceId": str(uuid4()), "contextInfo": None}
    return evolution(name, "messages.upsert", message(**{"source": "android", **given, **fields}))


def waha(name: str, event: str, payload: Any) -> dict[str, Any]:
    return {
        "event": event,
        "session": name,
        "metadata": {},
        "me": {"id": OWN.replace("s.whatsapp.net", "c.us"), "pushName": "Loja"},
        "payload": payload,
        "engine": "NOWEB",
        "environment": {"version": "2024.10.1", "engine": "NOWEB", "tier": "PLUS"},
    }


def waha_message(id_: str = "A", *, from_me: bool = False, **fields: Any) -> dict[str, Any]:
    """A payload without the original, as engines that are not built on Baileys give it."""
    chat = CUSTOMER.replace("s.whatsapp.net", "c.us")
    said = {
        "id": f"{'true' if from_me else 'false'}_{chat}_{id_}",
        "timestamp": AT,
        "from": chat,
        "fromMe": from_me,
        "to": OWN.replace("s.whatsapp.net", "c.us"),
        "body": "Bom dia",
        "hasMedia": False,
        "ack": 1,
        "ackName": "SERVER",
        "_data": {"notifyName": "Bia"},
    }
    return {name: value for name, value in (said | fields).items() if value is not ...}


def fazer(event: str, data: Any) -> dict[str, Any]:
    return {"event": event, "data": data, "webhookVerifyToken": "what-fazer-was-told"}


def boom(code: int) -> dict[str, Any]:
    """Baileys' `lastDisconnect`, as JSON."""
    output = {"statusCode": code, "payload": {"statusCode": code, "error": "x", "message": "y"}, "headers": {}}
    return {"error": {"data": None, "isBoom": True, "isServer": code >= 500, "output": output}, "date": "2026-09-01"}


def upsert(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages), "type": "notify"}


def sample() -> list[dict[str, Any]]:
    """Objects that Baileys 7.0.0-rc14 emitted for what it could not decrypt."""
    from pathlib import Path

    text = (Path(__file__).parent / "samples" / "baileys-upsert-ciphertext-v7.json").read_text()
    return list(json.loads(text)["messages"])
