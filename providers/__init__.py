"""The systems outside: wire format in, plain values out. `connect` picks the client for a channel."""

from collections.abc import Mapping
from typing import Any

from pombal.errors import Permanent
from pombal.settings import settings
from providers.graph import GraphSender
from providers.http import Clients
from providers.outbound import Sender


def connect(kind: str, clients: Clients, config: Mapping[str, Any], secrets: Mapping[str, Any]) -> Sender:
    """The way out of a channel of this kind, with its external ids and its secrets. Raises `Permanent` for a kind
    through which nothing can be sent."""
    if kind == "meta":
        base_url, version = settings().require_graph()
        number, token = config["phone_number_id"], secrets.get("access_token", "")
        return GraphSender(clients, base_url, version, number=number, token=token)
    raise Permanent(f"nothing can be sent through a channel of kind {kind}")
