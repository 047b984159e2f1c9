"""Small makers that fill in everything a test does not care about."""

import itertools
import os
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import msgspec
import psycopg
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from models import App, Channel, Delivery, Tenant
from pombal import db
from pombal.cli import admin
from pombal.ids import uuid7
from sandbox import meta

_numbers = itertools.count(880_000_000_000_001)


class Shop(NamedTuple):
    """A tenant with one Meta channel on an app of its own, and the secrets to act as Meta towards it."""

    tenant: Tenant
    channel: Channel
    app: App
    number: meta.Number
    app_secret: str
    verify_token: str

    @property
    def url(self) -> str:
        return f"/webhooks/whatsapp/{self.app.slug}"


def a_tenant() -> Tenant:
    return admin.add_tenant(f"t{uuid4().hex[:12]}", "A tenant")


def a_shop(tenant: Tenant | None = None, **config: Any) -> Shop:
    """A new Meta channel; with `app` and without `app_secret` it joins an app that is there."""
    tenant = tenant or a_tenant()
    number = next(_numbers)
    given = {
        "phone_number_id": str(number),
        "waba_id": str(number + 10**9),
        "app_secret": uuid4().hex,
        "verify_token": uuid4().hex,
        **config,
    }
    channel, app = admin.add_meta_channel(tenant, f"c{number}", msgspec.convert(given, admin.MetaConfig))
    return Shop(
        tenant,
        channel,
        app,
        meta.Number(given["phone_number_id"], given["waba_id"]),
        given["app_secret"] or "",
        given["verify_token"] or "",
    )


def a_wamid() -> str:
    return f"wamid.{uuid4().hex}"


def texts(shop: Shop, *wamids: str, from_: str = "5511944440001", body: str = "Olá", at: int = 1_788_000_000) -> bytes:
    """A body of one text message per wamid, encoded like Meta."""
    messages = [meta.text_message(wamid, from_, body, at) for wamid in wamids]
    value = {"messages": messages, "contacts": [meta.contact(from_, "Bia")]}
    return body_of(shop, value)


def statuses(shop: Shop, wamid: str, *words: str, at: int = 1_788_000_000) -> bytes:
    """A body of reports on one message, a second apart, in the given order."""
    said = [meta.status(wamid, word, at + n, "5511944440001") for n, word in enumerate(words)]
    return body_of(shop, {"statuses": said})


def echoes(shop: Shop, *wamids: str, to: str = "5511944440001", at: int = 1_788_000_000) -> bytes:
    """A body of messages that the business sent from its phone."""
    sent = [meta.echo(wamid, shop.number, to, "Oi", at) for wamid in wamids]
    return body_of(shop, {"message_echoes": sent}, field="smb_message_echoes")


def body_of(shop: Shop, value: dict[str, Any], field: str = "messages", time: int | None = None) -> bytes:
    return meta.encode(meta.envelope([meta.entry(shop.number.waba_id, [meta.change(shop.number, field, value)], time)]))


def a_delivery(shop: Shop, raw: bytes) -> UUID:
    """A body as the web tier leaves it: committed, pending, its bell not yet rung."""
    id_ = uuid7()
    with db.session() as s:
        s.add(Delivery(id=id_, provider="meta", app_id=shop.app.id, request_id=id_.hex, raw=raw))
    return id_


def delivery(id_: UUID) -> Delivery:
    with db.session() as s:
        return s.scalars(select(Delivery).where(Delivery.id == id_)).one()


def seen_by(shop: Shop | Tenant) -> Any:
    """A session that sees one tenant."""
    return db.session([shop.id if isinstance(shop, Tenant) else shop.tenant.id])


def rows(shop: Shop, query: str, **values: Any) -> list[dict[str, Any]]:
    """Rows of one tenant by SQL, as dicts; `:tenant` is bound."""
    with seen_by(shop) as s:
        return all_of(s, query, tenant=shop.tenant.id, **values)


def all_of(s: Session, query: str, **values: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in s.execute(text(query), values).mappings()]


def superuser() -> psycopg.Connection[Any]:
    """A connection that skips every policy: for looking at the truth, and for faults that only a superuser can make."""
    return psycopg.connect(os.environ["POMBAL_TEST_SUPERUSER_URL"], autocommit=True)
