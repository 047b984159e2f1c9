"""Messages leave once, in order, and their rows tell what became of them: against a simulated Meta, over sockets."""

from collections.abc import Iterator

import pytest

from sandbox import client
from tests.workers.sending import Meta, a_number_at_meta, attempts, lane, message, queue, send, statuses

pytestmark = pytest.mark.usefixtures("queues")


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meta]:
    with a_number_at_meta(monkeypatch) as meta:
        yield meta


def test_a_queued_message_is_sent_and_keeps_the_providers_id(meta: Meta) -> None:
    (id_,) = queue(meta.shop, "Olá")

    send(meta.shop)

    (call,) = meta.calls()
    (attempt,) = attempts(meta.shop, id_)
    sent = message(meta.shop, id_)
    assert (call["outcome"], call["text"], call["to"]) == ("accepted", "Olá", "+5511944440001")
    assert call["callback"] == f"out:{attempt['id'].hex}"
    assert (sent["status"], sent["provider_id"]) == ("sent", call["wamid"])
    assert (attempt["outcome"], attempt["settled_by"], attempt["provider_id"]) == ("accepted", "answer", call["wamid"])
    assert lane(meta.shop)["token"] is None


def test_messages_to_one_recipient_leave_one_after_another_in_their_order(meta: Meta) -> None:
    client.faults(meta.url, kind="latency", ms=20)
    queue(meta.shop, *(str(n) for n in range(20)))

    send(meta.shop)

    assert meta.accepted() == [str(n) for n in range(20)]
    assert client.summary(meta.url)["max_in_flight_per_recipient"] == 1
    assert set(statuses(meta.shop)) == {"sent"}
