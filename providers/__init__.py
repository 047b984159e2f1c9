"""The systems outside: wire format in, plain values out. `connect` picks the client for a channel, `instance` the one
for its session, `gateway_of` the one that can repair that, `source` the way to a file of one."""

from collections.abc import Mapping
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import httpx

from pombal.errors import Permanent, Rejected
from pombal.settings import settings
from providers import guard
from providers.baileys import Baileys, Place, Session
from providers.baileys_media import BaileysMedia, GatewayFile
from providers.baileys_send import BaileysSender
from providers.gateway import Gateway
from providers.graph import GraphSender
from providers.graph_media import GraphMedia
from providers.http import Clients
from providers.instance import Instance
from providers.link import Link
from providers.media import Source
from providers.megaapi import MegaApi, normal_host
from providers.megaapi_media import MegaMedia
from providers.megaapi_send import MegaSender
from providers.outbound import Sender
from providers.stub import Stub, StubSender


def connect(kind: str, clients: Clients, config: Mapping[str, Any], secrets: Mapping[str, Any]) -> Sender:
    """The way out of a channel of this kind, with its external ids and its secrets. Raises `Permanent` for a kind
    through which nothing can be sent."""
    if kind == "meta":
        base_url, version = settings().require_graph()
        number, token = config["phone_number_id"], secrets.get("access_token", "")
        return GraphSender(clients, base_url, version, number=number, token=token)
    if kind == "megaapi":
        return MegaSender(clients, *_gateway(config, secrets))
    if kind == "baileys":
        return BaileysSender(clients, _session(config, secrets))
    if kind == "stub":
        return StubSender()
    raise Permanent(f"nothing can be sent through a channel of kind {kind}")


def instance(kind: str, clients: Clients, config: Mapping[str, Any], secrets: Mapping[str, Any]) -> Instance:
    """The instance behind a channel of this kind. Raises `Permanent` for a kind that has none."""
    if kind == "megaapi":
        return MegaApi(clients, *_gateway(config, secrets))
    if kind == "baileys":
        return gateway_of(kind, clients, config, secrets)
    if kind == "stub":
        return Stub()
    raise Permanent(f"a channel of kind {kind} has no instance")


def gateway_of(kind: str, clients: Clients, config: Mapping[str, Any], secrets: Mapping[str, Any]) -> Gateway:
    """The gateway's session behind a channel of this kind. Raises `Permanent` for a kind whose sessions nobody here
    repairs."""
    if kind == "baileys":
        return Baileys(clients, _session(config, secrets))
    raise Permanent(f"a channel of kind {kind} has no session that can be repaired")


def source(kind: str, config: Mapping[str, Any], secrets: Mapping[str, Any], file: Mapping[str, Any]) -> Source:
    """Where a file of a channel of this kind comes from; `file` has the columns of `media`. Raises `Permanent` for a
    kind that has no files."""
    if kind == "baileys" and file["link"] is not None:
        place = Place(_session(config, secrets))
        if place.has(file["link"]):
            return GatewayFile(_guarded(), file["link"], place.headers, sha256=file["sha256"])
    if file["link"] is not None:
        return Link(_guarded(), file["link"], sha256=file["sha256"])
    if kind == "meta":
        base_url, version = settings().require_graph()
        return GraphMedia(
            _trusted(urlsplit(base_url).scheme),
            base_url,
            version,
            number=config["phone_number_id"],
            token=secrets.get("access_token", ""),
            media_id=file["provider_media_id"],
            hosts=settings().meta_media_hosts(),
            sha256=file["sha256"],
        )
    if kind == "megaapi" and file["keys"] is not None:
        return MegaMedia(_guarded(), *_gateway(config, secrets), file["keys"], sha256=file["sha256"])
    if kind == "baileys" and file["keys"] is not None:
        networks = settings().require_media_networks()
        return BaileysMedia(_guarded(), file["keys"], sha256=file["sha256"], allowed=networks)
    raise Permanent(f"a channel of kind {kind} has no files")


def _session(config: Mapping[str, Any], secrets: Mapping[str, Any]) -> Session:
    """A session as its channel names it; without a host of its own it is at the operator's. That has no key that others
    could borrow: each channel brings its own."""
    return Session(
        gateway=config.get("gateway", ""),
        host=config.get("host") or settings().backend_url,
        session=config.get("session", ""),
        paths=config.get("paths") or {},
        api_key=secrets.get("api_key") or "",
        send_key=secrets.get("send_key") or "",
        hook_url=secrets.get("hook_url") or "",
        hook_token=secrets.get("webhook_token") or "",
    )


def _gateway(config: Mapping[str, Any], secrets: Mapping[str, Any]) -> tuple[str, str, str]:
    """Host, key and token of an instance. The operator's stand in for what a channel does not have, but the operator's
    token goes to the operator's host alone."""
    own = settings().mega_api_host
    host, token = config.get("host") or own, secrets.get("token") or ""
    if not token and host and own and _is_same(host, own):
        token = settings().mega_api_token
    return host, config.get("instance_key", ""), token


def _is_same(host: str, other: str) -> bool:
    try:
        return normal_host(host) == normal_host(other)
    except Rejected:
        return False


@cache
def _guarded() -> httpx.Client:
    """For addresses that tenants and messages name: public ones, and what the operator has allowed beside them."""
    return guard.client(guarded=True, allowed=settings().require_media_networks(), is_free_inside=True)


@cache
def _trusted(scheme: str) -> httpx.Client:
    """For hosts that the operator has named, by https or as the API itself is reached. One for all threads."""
    return guard.client(guarded=False, ports=None, schemes={"https", scheme})
