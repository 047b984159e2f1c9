"""Each dialect against a whole gateway that speaks it: how a session stands, restarts and sends, and that it stays
paired."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest

import providers
from providers import guard
from providers.baileys import Baileys, Session
from providers.baileys_media import BaileysMedia
from providers.baileys_send import BaileysSender
from providers.instance import InstanceFault
from providers.outbound import Kind, Outcome
from sandbox import client
from tests.providers.test_megaapi import LOOPBACK, TLS, some_clients
from tests.providers.test_megaapi_media import Kept
from tests.providers.test_megaapi_send import a_file, a_text, an_outgoing
from tests.sandbox.baileys_servers import API_KEY, a_baileys
from tests.sandbox.baileys_servers import Baileys as StandIn
from tests.sandbox.megaapi_servers import a_hook

T = TypeVar("T")
SESSIONS = {"whaticket": "26", "ticketz": "26", "evolution": "loja", "waha": "loja", "fazer": "+5511955550301"}
each = pytest.mark.parametrize("dialect", SESSIONS)


@pytest.fixture(scope="module")
def running() -> Iterator[StandIn]:
    with a_baileys() as its:
        yield its


@pytest.fixture
def its(running: StandIn) -> Iterator[StandIn]:
    yield running
    client.baileys_remove(running.url)
    client.baileys_clear_faults(running.url)
    client.baileys_clear_calls(running.url)
    shutil.rmtree(running.root, ignore_errors=True)


def opened(its: StandIn, dialect: str, **more: Any) -> Session:
    """A session of a gateway of its own, paired and open."""
    its.gateway("g1", dialect)
    its.session("g1", SESSIONS[dialect], **more)
    its.is_open("g1", SESSIONS[dialect])
    return Session(
        gateway=dialect,
        host=its.host("g1"),
        session=SESSIONS[dialect],
        api_key=API_KEY,
        hook_url="http://127.0.0.1:9/h",
        hook_token="token-of-ours",
    )


def asked(session: Session, does: Callable[[Baileys], Awaitable[T]]) -> T:
    async def run() -> T:
        async with some_clients() as clients:
            return await does(Baileys(clients, session))

    return asyncio.run(run())


def state(session: Session) -> str:
    return asked(session, lambda gateway: gateway.look()).state


@each
def test_a_session_stands_as_its_gateway_says(its: StandIn, dialect: str) -> None:
    session = opened(its, dialect)

    asked(session, lambda gateway: gateway.health())
    assert state(session) == ("unknown" if dialect == "fazer" else "open")
    if dialect != "fazer":
        listed = asked(session, lambda gateway: gateway.listed(9))
        assert listed[SESSIONS[dialect]].status == "connected"
        assert asked(session, lambda gateway: gateway.qr()) is None
    its.habits("g1", down="500")
    with pytest.raises(InstanceFault) as raised:
        asked(session, lambda gateway: gateway.health())
    assert raised.value.code == "provider_error"


@pytest.mark.parametrize("dialect", ["whaticket", "ticketz", "evolution", "waha"])
def test_a_restart_keeps_the_pairing(its: StandIn, dialect: str) -> None:
    session, name = opened(its, dialect), SESSIONS[dialect]
    before = its.look("g1", name)
    counts = ("starts", "restarts")

    asked(session, lambda gateway: gateway.restart())
    its.until(lambda: any(its.look("g1", name)[count] > before[count] for count in counts))
    its.is_open("g1", name)

    after = its.look("g1", name)
    assert (after["registration_id"], after["qrs"]) == (before["registration_id"], before["qrs"])
    assert state(session) == "open"
    assert its.violations("g1") == []


@pytest.mark.parametrize("dialect", ["whaticket", "waha"])
def test_where_a_session_can_be_stopped_it_is_closed_until_it_is_started(its: StandIn, dialect: str) -> None:
    session, name = opened(its, dialect), SESSIONS[dialect]

    asked(session, lambda gateway: gateway.stop())
    its.until(lambda: state(session) == "closed")
    asked(session, lambda gateway: gateway.stop())
    asked(session, lambda gateway: gateway.start())
    its.until(lambda: state(session) == "open")

    assert its.look("g1", name)["qrs"] == 0


def test_a_session_of_evolution_that_is_closed_is_opened_by_its_restart(its: StandIn) -> None:
    session = opened(its, "evolution")
    its.end("g1", "loja", 503, reconnects=False)
    its.until(lambda: state(session) == "closed")

    asked(session, lambda gateway: gateway.restart())

    its.is_open("g1", "loja")


@pytest.mark.parametrize("dialect", ["whaticket", "ticketz", "evolution", "waha"])
def test_a_session_that_asks_for_a_scan_says_so_and_has_a_code(its: StandIn, dialect: str) -> None:
    session, name = opened(its, dialect), SESSIONS[dialect]
    its.habits("g1", name, asks_qr_after_start=True)

    asked(session, lambda gateway: gateway.restart())
    its.until(lambda: state(session) == "qr")

    picture = asked(session, lambda gateway: gateway.qr())
    assert picture is not None
    assert picture.mime_type == "image/png"


@each
def test_a_text_and_a_file_arrive(its: StandIn, dialect: str) -> None:
    session = opened(its, dialect)
    content = bytes(range(256)) * 40

    async def run() -> None:
        async with some_clients() as clients:
            sender = BaileysSender(clients, session)
            text = await sender.send(a_text("Olá, tudo bem?"))
            assert (text.outcome, text.fault) == (Outcome.ACCEPTED, None)
            file = a_file(content[:999], content[999:], mime_type="image/png")
            image = await sender.send(an_outgoing("image", {"filename": "a.png"}, attachment=file))
            assert (image.outcome, image.fault) == (Outcome.ACCEPTED, None)
            if dialect not in ("whaticket", "ticketz"):
                assert text.provider_id
                assert image.provider_id
                read = await sender.send(an_outgoing("read", {"message_id": "3EB0IN"}))
                assert (read.outcome, read.fault) == (Outcome.ACCEPTED, None)

    asyncio.run(run())

    sends = its.calls(gateway="g1", operation="send")
    assert [one["type"] for one in sends] == ["text", "image"]
    assert sends[0]["text"] == "Olá, tudo bem?"
    assert sends[1]["size"] == len(content)


@pytest.mark.parametrize("dialect", ["evolution", "waha", "fazer"])
def test_a_send_while_the_session_is_closed_is_no_fault_of_the_message(its: StandIn, dialect: str) -> None:
    session, name = opened(its, dialect), SESSIONS[dialect]
    its.end("g1", name, 503, reconnects=False)
    its.until(lambda: its.state("g1", name) == "closed")

    async def run() -> None:
        async with some_clients() as clients:
            answer = await BaileysSender(clients, session).send(a_text())
            if answer.outcome is not Outcome.UNKNOWN:
                assert answer.fault is not None
                assert answer.fault.kind is Kind.SESSION

    asyncio.run(run())


def test_a_file_that_a_message_names_is_fetched_and_decrypted(its: StandIn) -> None:
    with a_hook() as hook:
        opened(its, "evolution", webhook_url=hook.url)
        its.say("g1", "loja", kind="image", media={"mime_type": "image/jpeg", "size": 100_000, "seed": 7})
        bodies = hook.until(lambda bodies: any(body["event"] == "messages.upsert" for body in bodies))
    data = next(body["data"] for body in bodies if body["event"] == "messages.upsert")
    keys = {**data["message"]["imageMessage"], "messageType": "image"}

    with guard.client(guarded=True, allowed=LOOPBACK, is_free_inside=True, verify=TLS) as media_client:
        into = Kept()
        received = BaileysMedia(media_client, keys, allowed=LOOPBACK).fetch(into, 1_000_000)

    assert (received.size, len(into.bytes), received.content_type) == (100_000, 100_000, "image/jpeg")


def test_a_channels_config_says_all_that_is_needed(its: StandIn) -> None:
    session = opened(its, "waha")
    config = {"gateway": "waha", "host": session.host, "session": "loja", "paths": {}}

    async def run() -> None:
        async with some_clients() as clients:
            gateway = providers.gateway_of("baileys", clients, config, {"api_key": API_KEY})
            assert (await gateway.look()).state == "open"
            refused = providers.gateway_of("baileys", clients, config, {"api_key": "another"})
            with pytest.raises(InstanceFault) as raised:
                await refused.look()
            assert raised.value.code == "refused"

    asyncio.run(run())
