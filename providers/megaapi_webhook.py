"""MegaAPI's webhooks: a body in, plain values out (megaapi.md, "Webhooks" and "Reconciliation").

    flat       {"instance_key", "jid", "messageType", "key", "message", "messageTimestamp", "pushName"}
    ack        {"instance_key", "messageType": "message.ack", "key", "update": {"status"}}, or "status" beside the key
    connection {"instance_key", "messageType": "connection_update", "message": "phone_connected"}
    wrapped    {"instanceKey", "event", "data": {…}}, {"instance", "data": […]}, {"messages": […]}, or a list of bodies

Only the flat forms are confirmed, so the others are taken as they come (`providers/webbody.py`).
"""

from datetime import datetime
from typing import Any

from providers.inbound import Parsed
from providers.values import MAX_TYPE, text_of
from providers.webbody import Walk, walked


def parse(raw: bytes, received_at: datetime) -> Parsed:
    """Everything that a body says, in its order. Raises `Rejected`, and nothing else, when it says nothing readable."""
    return walked(raw, _Walk(received_at))


class _Walk(Walk):
    instance_names = ("instance_key", "instanceKey", "instance")

    def is_of_connection(self, kind: str, body: dict[str, Any]) -> bool:
        return super().is_of_connection(kind, body) or type(body.get("message")) is str

    def event_of(self, body: dict[str, Any]) -> str | None:
        word = text_of(body, "messageType", MAX_TYPE) or text_of(body, "event", MAX_TYPE)
        return word.strip().lower() if word else None

    def account_of(self, body: dict[str, Any]) -> str | None:
        return text_of(body, "jid", MAX_TYPE)
