"""A tenant with one MegaAPI channel, and bodies as its instance would send them (megaapi.md, "Webhooks")."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from models import Channel, ChannelKind, Delivery, Tenant, WebhookToken
from pombal import db
from pombal.ids import uuid7
from tests.factories import a_tenant, all_of

AT = 1_788_000_000
CUSTOMER = "5511944440001@s.whatsapp.net"
OWN = "5511955550100@s.whatsapp.net"
TEXT = {"conversation": "Bom dia"}


class Gateway(NamedTuple):
    tenant: Tenant
    channel: Channel
    instance: str
    token: str

    @property
    def path(self) -> str:
        return f"/api/webhooks/whatsapp/{self.tenant.slug}"

    @property
    def url(self) -> str:
        return f"{self.path}?token={self.token}"

    def rows(self, query: str, **values: Any) -> list[dict[str, Any]]:
        """Rows of its tenant by SQL, as dicts."""
        with db.session([self.tenant.id]) as s:
            return all_of(s, query, **values)


def a_gateway(tenant: Tenant | None = None, *, is_bound: bool = True) -> Gateway:
    """A new channel; its token is good for events of its instance alone unless it is not `is_bound`."""
    tenant = tenant or a_tenant()
    instance = f"megacode-{uuid4().hex[:12]}"
    config = {"host": "https://apibusiness1.megaapi.com.br", "instance_key": instance, "token_kind": "instance"}
    channel = Channel(tenant_id=tenant.id, id=uuid7(), kind=ChannelKind.MEGAAPI, name=f"c{uuid4().hex}", config=config)
    row, token = WebhookToken.make(tenant.id, channel.id, instance if is_bound else None)
    with db.session([tenant.id]) as s:
        s.add(channel)
        s.flush()
        s.add(row)
    return Gateway(tenant, channel, instance, token)


def an_id() -> str:
    return uuid4().hex.upper()


def flat(gateway: Gateway | str, message: Any = TEXT, *, id_: str | None = None, **fields: Any) -> dict[str, Any]:
    """A flat body of one message. Fields of the key are given by name, others replace the body's; `...` leaves out."""
    instance = gateway if isinstance(gateway, str) else gateway.instance
    names = ("remoteJid", "fromMe", "participant", "remoteJidAlt", "participantAlt")
    key = {"remoteJid": CUSTOMER, "fromMe": False, "id": id_ or an_id()}
    key |= {name: fields.pop(name) for name in names if name in fields}
    body = {
        "instance_key": instance,
        "jid": OWN,
        "messageType": "conversation",
        "key": key,
        "messageTimestamp": AT,
        "pushName": "Bia",
        "broadcast": False,
        "message": message,
        "isGroup": False,
    }
    return {name: value for name, value in (body | fields).items() if value is not ...}


def ack(gateway: Gateway | str, id_: str, status: Any, **fields: Any) -> dict[str, Any]:
    body = flat(gateway, ..., id_=id_, fromMe=True, messageTimestamp=..., **fields)
    return body | {"messageType": "message.ack", "update": {"status": status}}


def connection(gateway: Gateway | str, word: str = "phone_connected") -> dict[str, Any]:
    instance = gateway if isinstance(gateway, str) else gateway.instance
    return {
        "instance_key": instance,
        "jid": OWN,
        "messageType": "connection_update",
        "message": word,
        "pushName": "Loja",
    }


def media(kind: str = "image", **fields: Any) -> dict[str, Any]:
    """A message with a file, as the keys by which it is fetched."""
    keys = {
        "url": "https://mmg.whatsapp.net/v/t62.7118-24/x.enc?ccb=11-4&oe=66FF0000",
        "directPath": "/v/t62.7118-24/x.enc?ccb=11-4&oe=66FF0000",
        "mediaKey": "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA=",
        "mimetype": "image/jpeg",
        "fileSha256": "m04pFf2ERdaopTyFkGPA0+bX3i+YY2dYgVFwOgDLSDI=",
        "fileEncSha256": "eHh4",
        "fileLength": "4096",
        "jpegThumbnail": "/9j/4AAQSkZJRg==",
    }
    return {f"{kind}Message": keys | fields}


def encoded(body: Any) -> bytes:
    return json.dumps(body).encode()


def deliveries(gateway: Gateway, bodies: Iterable[Any]) -> list[UUID]:
    """Bodies as the web tier leaves them, in one commit; bytes are taken as they are."""
    raws = [body if isinstance(body, bytes) else encoded(body) for body in bodies]
    made = [
        Delivery(id=uuid7(), provider="megaapi", channel_id=gateway.channel.id, request_id=uuid4().hex, raw=raw)
        for raw in raws
    ]
    with db.session() as s:
        s.add_all(made)
    return [one.id for one in made]
