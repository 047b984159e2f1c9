import asyncio
import socket

from sandbox import meta
from sandbox.sender import Delivery, Post, Sender
from tests.sandbox.servers import SECRET, receiver

RAW = meta.encode({"body": "olá 😀 a/b"})


def signed(url: str, raw: bytes = RAW, *, once: bool = False) -> Post:
    return Post(url, raw, {"X-Hub-Signature-256": meta.sign(raw, SECRET)}, once)


async def deliver(post: Post, *, give_up_after: float = 60) -> tuple[Delivery, Sender]:
    async with Sender(first_delay=0.001, give_up_after=give_up_after) as sender:
        delivery = sender.send(post)
        await delivery.ended.wait()
    return delivery, sender


def test_a_body_is_sent_again_until_it_is_answered_with_200() -> None:
    with receiver(500, 202, 204, 302, 404) as there:
        delivery, sender = asyncio.run(deliver(signed(there.url)))

    assert there.received == [RAW] * 6
    assert there.accepted == [RAW]
    assert (delivery.state, delivery.attempts, delivery.status) == ("accepted", 6, 200)
    assert delivery.accepted_at is not None
    assert sender.counts == {"attempts": 6, "pending": 0, "accepted": 1, "dropped": 0}


def test_nobody_there_counts_as_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/hook"

    delivery, _ = asyncio.run(deliver(signed(url), give_up_after=0))

    assert (delivery.state, delivery.attempts, delivery.status) == ("dropped", 1, None)


def test_a_body_meant_to_be_refused_is_sent_once() -> None:
    with receiver(500) as there:
        delivery, _ = asyncio.run(deliver(signed(there.url, once=True)))

    assert (delivery.state, delivery.attempts, delivery.status) == ("dropped", 1, 500)


def test_leaving_drops_what_is_pending() -> None:
    async def leave(url: str) -> tuple[Delivery, Delivery]:
        async with Sender(first_delay=3600) as sender:
            delivery = sender.send(signed(url))
            never_begun = sender.send(signed(url))
            await delivery.tried.wait()
        return delivery, never_begun

    with receiver(500, 500) as there:
        for delivery in asyncio.run(leave(there.url)):
            assert delivery.state == "dropped"
            assert delivery.ended.is_set()


def test_many_are_each_delivered_once_through_failures() -> None:
    bodies = [meta.encode({"n": n}) for n in range(200)]

    async def send_all(url: str) -> tuple[list[Delivery], Sender]:
        deliveries: list[Delivery] = []
        async with Sender(concurrency=8, first_delay=0.001) as sender:
            await sender.send_all((signed(url, raw) for raw in bodies), started=deliveries.append, rate=100_000)
            for delivery in deliveries:
                await delivery.ended.wait()
        return deliveries, sender

    with receiver(*[503] * 30) as there:
        deliveries, sender = asyncio.run(send_all(there.url))

    assert sorted(there.accepted) == sorted(bodies)
    assert len(there.received) == 230
    assert {delivery.state for delivery in deliveries} == {"accepted"}
    assert sender.counts == {"attempts": 230, "pending": 0, "accepted": 200, "dropped": 0}
