"""A session at a Baileys gateway, over real sockets: what leaves in each dialect, and what every odd answer means."""

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

import providers
from pombal.errors import Permanent, Rejected
from pombal.settings import settings
from providers.baileys import Baileys, Session
from providers.baileys_dialects import DIALECTS, STEPS, check_paths, check_session, normal_base
from providers.gateway import Look
from providers.instance import FAULTS, MOST_RAW, Hook, InstanceFault, Picture, Standing
from tests.providers.test_graph import Asked, Writes, a_server, an_answer
from tests.providers.test_megaapi import PAGE, PNG, says, some_clients

T = TypeVar("T")
KEY = "a-key-that-nobody-may-see"
ROW = {"id": 26, "name": "loja", "status": "CONNECTED", "qrcode": "", "number": "5511955550301"}
LINE = "2@abcDEF123,456+/=,ghi"  # as WhatsApp's codes to scan

Does = Callable[[Baileys], Awaitable[T]]


def a_session(gateway: str, url: str, session: str = "", **more: Any) -> Session:
    usual = {"whaticket": "26", "ticketz": "26", "fazer": "+5511955550301"}.get(gateway, "loja")
    return Session(**{"gateway": gateway, "host": url, "session": session or usual, "api_key": KEY, **more})


def heard(gateway: str, does: Does[T], *answers: bytes | Writes, **more: Any) -> tuple[T, list[Asked]]:
    """What a call gives when the gateway says this, and the requests it got."""

    async def run() -> tuple[T, list[Asked]]:
        async with a_server(*answers) as (url, asked), some_clients() as clients:
            prefix, deadline = more.pop("prefix", ""), more.pop("deadline", 15.0)
            return await does(Baileys(clients, a_session(gateway, url + prefix, **more), deadline=deadline)), asked

    return asyncio.run(run())


def fault_of(gateway: str, does: Does[Any], *answers: bytes | Writes, **more: Any) -> InstanceFault:
    with pytest.raises(InstanceFault) as raised:
        heard(gateway, does, *answers, **more)
    fault = raised.value
    assert fault.code in FAULTS
    assert len(fault.raw) <= MOST_RAW
    for secret in (KEY, "127.0.0.1"):
        assert secret not in str(fault)
    return fault


def lines(asked: list[Asked]) -> list[str]:
    return [one.line.removesuffix(" HTTP/1.1") for one in asked]


def look(session: Baileys) -> Awaitable[Look]:
    return session.look()


# -- what leaves -----------------------------------------------------------------------------------------------------

OK = says({"message": "ok"})


@pytest.mark.parametrize(
    ("gateway", "does", "answer", "line"),
    [
        ("whaticket", look, says([ROW]), "GET /whatsapp"),
        ("whaticket", lambda s: s.start(), OK, "PUT /whatsapp/26/start-session"),
        ("whaticket", lambda s: s.stop(), OK, "PUT /whatsapp/26/disconnect"),
        ("whaticket", lambda s: s.health(), an_answer("OK"), "GET /health"),
        ("ticketz", look, says([ROW]), "GET /whatsapp/"),
        ("ticketz", lambda s: s.health(), says([]), "GET /whatsapp/"),
        ("ticketz", lambda s: s.start(), OK, "POST /whatsappsession/26"),
        ("ticketz", lambda s: s.restart(), OK, "GET /whatsappsession/refresh/26"),
        ("ticketz", lambda s: s.logout(), OK, "DELETE /whatsappsession/26"),
        ("evolution", look, says({"instance": {"state": "open"}}), "GET /instance/connectionState/loja"),
        ("evolution", lambda s: s.health(), says({"status": 200, "message": "Welcome"}), "GET /"),
        ("evolution", lambda s: s.start(), says({"code": None, "count": 0}), "GET /instance/connect/loja"),
        ("evolution", lambda s: s.restart(), says({"instance": {"state": "open"}}), "POST /instance/restart/loja"),
        (
            "evolution",
            lambda s: s.logout(),
            says({"status": "SUCCESS", "error": False}),
            "DELETE /instance/logout/loja",
        ),
        ("evolution", lambda s: s.listed(9), says([]), "GET /instance/fetchInstances"),
        ("waha", look, says({"status": "WORKING"}), "GET /api/sessions/loja"),
        ("waha", lambda s: s.start(), says({"status": "STARTING"}), "POST /api/sessions/loja/start"),
        ("waha", lambda s: s.stop(), says({"status": "STOPPED"}), "POST /api/sessions/loja/stop"),
        ("waha", lambda s: s.restart(), says({"status": "STARTING"}), "POST /api/sessions/loja/restart"),
        ("waha", lambda s: s.logout(), says({}), "POST /api/sessions/loja/logout"),
        ("waha", lambda s: s.health(), says({"message": "pong"}), "GET /ping"),
        ("waha", lambda s: s.listed(9), says([]), "GET /api/sessions?all=true"),
        ("fazer", lambda s: s.start(), an_answer(), "POST /connections/%2B5511955550301"),
        ("fazer", lambda s: s.restart(), an_answer(), "POST /connections/%2B5511955550301"),
        ("fazer", lambda s: s.logout(), an_answer(), "DELETE /connections/%2B5511955550301"),
        ("fazer", lambda s: s.health(), says({"env": "production"}), "GET /status"),
    ],
)
def test_each_call_is_the_one_that_the_gateway_knows(gateway: str, does: Does[Any], answer: bytes, line: str) -> None:
    _, asked = heard(gateway, does, answer)

    dialect = DIALECTS[gateway]
    assert lines(asked) == [line]
    assert asked[0].headers[dialect.header.lower()] == dialect.scheme + KEY
    assert asked[0].headers["accept-encoding"] == "identity"


def test_a_host_may_have_a_path_of_its_own() -> None:
    _, asked = heard("whaticket", look, says([ROW]), prefix="/baileys/g1/")

    assert lines(asked) == ["GET /baileys/g1/whatsapp"]


def test_a_gateway_without_a_key_is_asked_without_one() -> None:
    _, (asked,) = heard("whaticket", look, says([ROW]), api_key="")

    assert "authorization" not in asked.headers


def test_a_channel_sets_single_calls_anew() -> None:
    paths = {"stop": "POST /v2/{session}/pause", "refresh_contact": "POST /v2/{session}/contacts/{jid}"}

    async def run(session: Baileys) -> frozenset[str]:
        await session.stop()
        await session.refresh_contact("98765432109876@lid")
        return session.abilities

    abilities, asked = heard("evolution", run, OK, paths=paths)

    assert lines(asked) == ["POST /v2/loja/pause", "POST /v2/loja/contacts/98765432109876%40lid"]
    assert abilities == {"restart", "stop", "refresh_contact"}


def test_the_abilities_are_those_that_need_no_new_code() -> None:
    assert {name: sorted(one.abilities) for name, one in DIALECTS.items()} == {
        "whaticket": ["stop"],
        "ticketz": ["restart"],
        "evolution": ["restart"],
        "waha": ["restart", "stop"],
        "fazer": [],
    }
    for name, one in DIALECTS.items():
        assert check_paths(name, {call: one.paths[call] for call in STEPS if call in one.paths})


@pytest.mark.parametrize("contact", ["", "x", "120363000000000001@g.us", "../a@lid", "5511944440001@s.whatsapp.net/x"])
def test_only_a_persons_contact_is_refreshed(contact: str) -> None:
    paths = {"refresh_contact": "POST /{session}/refresh/{jid}"}

    assert fault_of("waha", lambda s: s.refresh_contact(contact), OK, paths=paths).code == "misconfigured"


@pytest.mark.parametrize("name", ["stop", "refresh_contact", "hook"])
def test_what_a_gateway_cannot_do_is_refused_here(name: str) -> None:
    given = ["5511944440001@s.whatsapp.net"] if name == "refresh_contact" else []

    assert fault_of("ticketz", lambda s: getattr(s, name)(*given), OK).code == "rejected"


# -- how it stands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gateway", "word", "state", "status"),
    [
        ("whaticket", "CONNECTED", "open", "connected"),
        ("whaticket", "OPENED", "open", "connected"),
        ("whaticket", "OPENING", "connecting", None),
        ("whaticket", "PENDING", "connecting", None),
        ("whaticket", "qrcode", "qr", "disconnected"),
        ("whaticket", "DISCONNECTED", "closed", "disconnected"),
        ("whaticket", "TIMEOUT", "unknown", None),
        ("ticketz", "passkey_required", "qr", "disconnected"),
        ("evolution", "open", "open", "connected"),
        ("evolution", "connecting", "connecting", None),
        ("evolution", "close", "closed", "disconnected"),
        ("evolution", "paused\u200b", "unknown", None),
        ("waha", "WORKING", "open", "connected"),
        ("waha", "STARTING", "connecting", None),
        ("waha", "SCAN_QR_CODE", "qr", "disconnected"),
        ("waha", "STOPPED", "closed", "disconnected"),
        ("waha", "FAILED", "closed", "disconnected"),
    ],
)
def test_each_gateways_words(gateway: str, word: str, state: Any, status: Any) -> None:
    answer = {"evolution": {"instance": {"state": word}}, "waha": {"status": word}}.get(
        gateway, [{**ROW, "status": word}]
    )

    assert heard(gateway, look, says(answer), says({"code": None}))[0] == Look(state, word.rstrip("\u200b"))
    assert heard(gateway, lambda s: s.status(9), says(answer))[0].status == status


@pytest.mark.parametrize("answer", [{"whatsapps": [ROW]}, {"count": 1, "data": [ROW]}, [None, 3, {"id": 2}, ROW]])
def test_ours_is_found_in_a_list_however_it_is_wrapped(answer: Any) -> None:
    standing, _ = heard("whaticket", lambda s: s.status(9), says(answer))

    assert standing == Standing("connected", "CONNECTED", "5511955550301")


def test_a_session_known_by_its_name_is_called_by_its_id_once_that_is_known() -> None:
    async def run(session: Baileys) -> None:
        await session.stop()
        await session.start()

    _, asked = heard("whaticket", run, says([{**ROW, "id": 7, "name": "outra"}, ROW]), OK, session="loja")

    assert lines(asked) == ["GET /whatsapp", "PUT /whatsapp/26/disconnect", "PUT /whatsapp/26/start-session"]


def test_digits_are_an_id_and_never_anothers_name() -> None:
    assert fault_of("whaticket", look, says([{**ROW, "id": 3, "name": "26"}])).code == "not_found"


def test_of_two_sessions_of_one_name_none_is_ours() -> None:
    assert fault_of("whaticket", look, says([ROW, {**ROW, "id": 3}]), session="loja").code == "misconfigured"


def test_all_sessions_are_listed_by_what_they_may_be_called() -> None:
    rows = [ROW, {**ROW, "id": 3, "name": "26", "status": "qrcode"}, {**ROW, "id": 4, "name": "loja"}]

    listed, _ = heard("whaticket", lambda s: s.listed(9), says(rows))
    instances = [
        {"name": "loja", "id": "0b1c", "connectionStatus": "open", "ownerJid": "5511955550301@s.whatsapp.net"},
        {"instance": {"instanceName": "old", "status": "close"}},
    ]
    of_evolution, _ = heard("evolution", lambda s: s.listed(9), says(instances))

    connected = Standing("connected", "CONNECTED", "5511955550301")
    assert listed == {"26": connected, "3": Standing("disconnected", "qrcode", "5511955550301"), "4": connected}
    ours = Standing("connected", "open", "5511955550301")
    assert of_evolution == {"loja": ours, "0b1c": ours, "old": Standing("disconnected", "close")}


def test_fazers_gateway_says_by_webhook_alone_how_a_session_stands() -> None:
    assert heard("fazer", look, OK) == (Look("unknown"), [])
    assert heard("fazer", lambda s: s.status(9), OK) == (Standing(None), [])
    assert fault_of("fazer", lambda s: s.qr(), OK).code == "rejected"


@pytest.mark.parametrize(
    ("stored", "code", "state"),
    [
        ("connecting", {"code": LINE}, "qr"),
        ("connecting", {"code": None, "count": 0}, "connecting"),
        ("open", {"code": "2@of the last pairing"}, "connecting"),
        (None, {"code": LINE}, "connecting"),
    ],
)
def test_evolution_waits_for_a_scan_when_it_wrote_down_that_it_does(stored: str | None, code: Any, state: Any) -> None:
    rows = [{"name": "loja", "connectionStatus": stored}]

    found, asked = heard("evolution", look, says({"instance": {"state": "connecting"}}), says(rows), says(code))

    assert found == Look(state, "connecting")
    assert lines(asked)[1] == "GET /instance/fetchInstances"


@pytest.mark.parametrize("word", ["error", "DOWN", "unhealthy"])
def test_a_gateway_that_says_it_is_not_well_is_not(word: str) -> None:
    assert fault_of("whaticket", lambda s: s.health(), says({"status": word})).code == "provider_error"


def test_a_page_is_no_answer_of_a_gateway() -> None:
    page = an_answer("<!doctype html><title>Panel</title>")

    for does in (lambda s: s.health(), lambda s: s.stop(), lambda s: s.start()):
        assert fault_of("whaticket", does, page).code == "unreadable"


# -- its pairing -----------------------------------------------------------------------------------------------------


def test_a_codes_text_is_drawn() -> None:
    picture, asked = heard("whaticket", lambda s: s.qr(), says([{**ROW, "status": "qrcode", "qrcode": LINE}]))

    assert picture is not None
    assert picture.content.startswith(b"\x89PNG")
    assert lines(asked) == ["GET /whatsapp"]
    assert heard("whaticket", lambda s: s.qr(), says([{**ROW, "qrcode": LINE}]))[0] is None


def test_evolution_draws_it_itself() -> None:
    uri = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"

    assert heard("evolution", lambda s: s.qr(), says({"code": LINE, "base64": uri}))[0] == Picture("image/png", PNG)
    assert heard("evolution", lambda s: s.qr(), says({"instance": {"state": "open"}}))[0] is None


def test_waha_is_asked_for_a_code_only_while_it_has_one() -> None:
    scan = says({"status": "SCAN_QR_CODE"})

    picture, asked = heard("waha", lambda s: s.qr(), scan, an_answer(PNG.decode("latin-1").encode("latin-1")))

    assert picture == Picture("image/png", PNG)
    assert lines(asked) == ["GET /api/sessions/loja", "GET /api/loja/auth/qr"]
    text = {"mimetype": "image/png", "data": base64.b64encode(PNG * 20).decode()}
    assert heard("waha", lambda s: s.qr(), scan, says(text))[0] == Picture("image/png", PNG * 20)
    assert heard("waha", lambda s: s.qr(), says({"status": "WORKING"}))[0] is None


# -- steps of a repair -----------------------------------------------------------------------------------------------


def test_in_the_whaticket_family_a_restart_is_a_stop_and_a_start() -> None:
    _, asked = heard("whaticket", lambda s: s.restart(), OK)

    assert lines(asked) == ["PUT /whatsapp/26/disconnect", "PUT /whatsapp/26/start-session"]


def test_a_stop_in_doubt_is_followed_by_a_start_and_a_refused_one_is_not() -> None:
    asked: list[Asked] = []

    async def run(*answers: bytes) -> InstanceFault:
        nonlocal asked
        async with a_server(*answers) as (url, asked), some_clients() as clients:
            with pytest.raises(InstanceFault) as raised:
                await Baileys(clients, a_session("whaticket", url)).restart()
            return raised.value

    in_doubt = asyncio.run(run(says({}, "500 Internal Server Error"), OK))
    assert (in_doubt.code, len(asked)) == ("provider_error", 2)
    refused = asyncio.run(run(says({}, "400 Bad Request"), OK))
    assert (refused.code, len(asked)) == ("rejected", 1)


@pytest.mark.parametrize(
    "no",
    [
        says({"status": 400, "response": {"message": ["not connected"]}}, "400 Bad Request"),
        says({"error": True, "message": "[object Object]"}),
    ],
)
def test_what_evolution_does_not_restart_because_it_is_closed_is_opened(no: bytes) -> None:
    closed = says({"instance": {"state": "close"}})

    _, asked = heard("evolution", lambda s: s.restart(), no, closed, says({"count": 0}))

    assert lines(asked)[1:] == ["GET /instance/connectionState/loja", "GET /instance/connect/loja"]
    still_open = says({"instance": {"state": "open"}})
    assert fault_of("evolution", lambda s: s.restart(), no, still_open).code == "rejected"


def test_several_calls_end_within_the_time_of_one() -> None:
    async def slowly(writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    no = says({}, "400 Bad Request")
    assert fault_of("evolution", lambda s: s.restart(), no, slowly, deadline=0.3).code == "timeout"
    assert fault_of("whaticket", lambda s: s.restart(), slowly, deadline=0.3).code == "timeout"


def test_fazers_gateway_is_told_at_each_start_where_events_go() -> None:
    more = {"hook_url": "https://p.example/api?token=t", "hook_token": "token-of-ours"}

    _, (asked,) = heard("fazer", lambda s: s.start(), an_answer(), **more)
    _, (again,) = heard("fazer", lambda s: s.set_hook("https://p.example/new"), an_answer(), **more)

    body = {"webhookVerifyToken": "token-of-ours", "includeMedia": False}
    assert json.loads(asked.body) == {**body, "webhookUrl": "https://p.example/api?token=t"}
    assert json.loads(again.body) == {**body, "webhookUrl": "https://p.example/new"}


def test_evolutions_events() -> None:
    _, (asked,) = heard("evolution", lambda s: s.set_hook("https://p.example/h"), says({"id": "x"}, "201 Created"))

    assert lines([asked]) == ["POST /webhook/set/loja"]
    wanted = json.loads(asked.body)["webhook"]
    assert (wanted["enabled"], wanted["url"], wanted["byEvents"]) == (True, "https://p.example/h", False)
    assert {"MESSAGES_UPSERT", "CONNECTION_UPDATE", "STATUS_INSTANCE"} <= set(wanted["events"])
    found = heard("evolution", lambda s: s.hook(), says({"url": "https://p.example/h", "enabled": False}))[0]
    assert found == Hook("https://p.example/h", is_enabled=False)
    assert heard("evolution", lambda s: s.hook(), an_answer("null"))[0] == Hook("", is_enabled=False)


# -- what every odd answer means -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (says({"error": "ERR_SESSION_EXPIRED"}, "401 Unauthorized"), "refused"),
        (says({}, "403 Forbidden"), "refused"),
        (PAGE, "edge_blocked"),
        (says({}, "404 Not Found"), "not_found"),
        (says([]), "not_found"),
        (says({}, "429 Too Many Requests"), "throttled"),
        (says({}, "302 Found", location="http://169.254.169.254/"), "provider_error"),
        (says({}, "503 Service Unavailable"), "provider_error"),
        (says({"error": "no"}), "rejected"),
        (an_answer("<html>"), "unreadable"),
        (an_answer("[" * 100_000), "unreadable"),
        (an_answer("[]", content_encoding="gzip"), "unreadable"),
        (says({"a": [], "b": []}), "unreadable"),
        (an_answer("null"), "unreadable"),
    ],
)
def test_what_an_answer_means(answer: bytes, code: str) -> None:
    assert fault_of("whaticket", look, answer).code == code


@pytest.mark.parametrize(
    "more",
    [
        {"session": "../admin"},
        {"session": "a b"},
        {"session": "a%2fb"},
        {"session": "a" * 65},
        {"session": "loja\n"},
        {"paths": {"stop": "DELETE /x/{session}"}},
        {"api_key": "a\r\nb"},
        {"host": ""},
        {"host": "http://127.0.0.1/../x"},
        {"gateway": "wppconnect"},
    ],
)
def test_what_is_configured_wrong_is_asked_of_nobody(more: dict[str, Any]) -> None:
    fault = fault_of("whaticket", look, says([ROW]), **more) if "gateway" not in more else None
    if fault is None:

        async def run() -> None:
            async with some_clients() as clients:
                await Baileys(clients, a_session("wppconnect", "http://127.0.0.1")).look()

        with pytest.raises(InstanceFault) as raised:
            asyncio.run(run())
        fault = raised.value
    assert fault.code == "misconfigured"


def test_an_address_inside_is_not_called_unless_it_is_allowed() -> None:
    async def run() -> None:
        async with a_server(OK) as (url, asked), some_clients(allowed=[]) as clients:
            with pytest.raises(InstanceFault) as raised:
                await Baileys(clients, a_session("waha", url)).stop()
            assert (raised.value.code, asked) == ("blocked_address", [])

    asyncio.run(run())


# -- what may be configured ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("stop", "PUT /whatsapp/{session}/off?all=1"),
        ("stop", "PUT /whatsapp/{session}/off#x"),
        ("stop", "PUT /whatsapp/../{session}"),
        ("stop", "PUT /whatsapp//{session}"),
        ("stop", "PUT //{session}"),
        ("stop", "PUT http://elsewhere/{session}"),
        ("stop", "PUT whatsapp/{session}"),
        ("stop", "put /whatsapp/{session}"),
        ("stop", "PUT /whatsapp/{session}\r\nX: y"),
        ("stop", "PUT /whatsapp/%2e%2e/{session}"),
        ("stop", "PUT /whatsapp/{id}"),
        ("stop", "PUT /whatsapp/x{session}"),
        ("stop", "PUT /whatsapp/all/stop"),
        ("stop", "PUT /whatsapp/{session}/{session}"),
        ("stop", "PUT /whatsapp/{session}/{jid}"),
        ("stop", ""),
        ("stop", "DELETE /instance/x/{session}"),
        ("stop", "POST /api/Logout/{session}"),
        ("start", "PUT /v1/whatsappsession/{session}"),
        ("restart", "POST /whatsappsession/{session}/reset"),
        ("stop", "POST /api/{session}/logout-session"),
        ("stop", "POST /api/{session}/logOutNow/"),
        ("stop", "POST /api/{session}/session-logout"),
        ("stop", "POST /api/{session}/log-out"),
        ("restart", "POST /instance/{session}/unpair"),
        ("stop", "POST /connections/terminate/{session}"),
        ("start", "PUT /sessions/{session}/clear_auth"),
        ("restart", "GET /sessions/{session}/deleteSession"),
        ("refresh_contact", "POST /refresh/{session}"),
        ("list", "GET /whatsapp/{session}"),
        ("flush", "POST /flush/{session}"),
    ],
)
def test_a_call_that_could_concern_another_session_or_end_this_one_is_refused(name: str, call: str) -> None:
    with pytest.raises(Rejected):
        check_paths("whaticket", {name: call})


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("gw.example", "https://gw.example"),
        ("http://127.0.0.1:3000/baileys/g1/", "http://127.0.0.1:3000/baileys/g1"),
        ("HTTPS://GW.example:443/", "https://gw.example"),
    ],
)
def test_the_address_of_a_gateway(text: str, base: str) -> None:
    assert normal_base(text) == base


@pytest.mark.parametrize(
    "text", ["", "ftp://a", "http://u:p@a", "http://a/..", "http://a//b", "http://a/x?y", "http://a/%2e"]
)
def test_what_is_no_address_of_a_gateway(text: str) -> None:
    with pytest.raises(Rejected):
        normal_base(text)


def test_a_session_of_fazers_is_a_phone() -> None:
    assert check_session("fazer", "5511955550301") == "+5511955550301"
    assert check_session("fazer", "+5511955550301") == "+5511955550301"
    with pytest.raises(Rejected):
        check_session("whaticket", "+5511955550301")


def test_a_channel_without_a_host_is_at_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKEND_URL", "http://127.0.0.1:9/b")
    settings.cache_clear()
    try:

        async def run() -> None:
            async with some_clients() as clients:
                config = {"gateway": "evolution", "session": "loja"}
                here = providers.gateway_of("baileys", clients, config, {"api_key": KEY})
                there = providers.instance("baileys", clients, {**config, "host": "https://gw.example"}, {})
                assert (here.host, there.host) == ("http://127.0.0.1:9/b", "https://gw.example")
                with pytest.raises(Permanent):
                    providers.gateway_of("megaapi", clients, {}, {})

        asyncio.run(run())
    finally:
        settings.cache_clear()
