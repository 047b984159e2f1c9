"""The usual way to send: one Dramatiq message per message, a blocking HTTP client, a transaction before and one after.

    dramatiq --path bench usual_send:broker …

Same rows, libraries, payload, reading of the answer and server as the fleet's. It knows no order, no limits, no attempt
that is written down before its call, no events: what a worker that is killed was sending is sent again.
"""

import dramatiq
import httpx
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import default_middleware
from sqlalchemy import text

from models import Channel
from pombal import db
from pombal.broker import redis_client
from pombal.middleware import JobMetrics, LogContext
from pombal.settings import settings
from providers import graph
from providers.http import Reply
from providers.outbound import Outcome, Outgoing

broker = RedisBroker(  # type: ignore[no-untyped-call] # Dramatiq leaves it untyped
    client=redis_client(), middleware=[LogContext(), JobMetrics(), *(kind() for kind in default_middleware)]
)
dramatiq.set_broker(broker)
client = httpx.Client(timeout=30, trust_env=False)

_READ = text("SELECT id, channel_id, type, body, recipient FROM message WHERE tenant_id = :tenant AND id = :id")
_SENT = text("UPDATE message SET status = 'sent', provider_id = :wamid, sent_at = now(), due_at = NULL"
             " WHERE tenant_id = :tenant AND id = :id")  # fmt: skip


@dramatiq.actor(queue_name="usual_send", max_retries=3, min_backoff=1_000, max_backoff=8_000, broker=broker)
def usual_send(tenant: str, id_: str) -> None:
    key = {"tenant": tenant, "id": id_}
    with db.session([tenant]) as s:  # type: ignore[list-item] # its text does as well
        row = s.execute(_READ, key).one()
        channel = s.get_one(Channel, (tenant, row.channel_id))
    base_url, version = settings().require_graph()
    reply = client.post(
        f"{base_url}/{version}/{channel.config['phone_number_id']}/messages",
        json=graph.payload(Outgoing(row.type, row.body, row.recipient, f"out:{id_}")),
        headers={"Authorization": f"Bearer {channel.secrets()['access_token']}"},
    )
    answer = graph.read(Reply(reply.status_code, reply.headers, reply.content))
    if answer.outcome is not Outcome.ACCEPTED:
        raise RuntimeError("not accepted")
    with db.session([tenant]) as s:  # type: ignore[list-item] # as above
        s.execute(_SENT, key | {"wamid": answer.provider_id})
