"""An instance at MegaAPI, over real sockets: what leaves, and what every odd answer is taken for."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_network
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

import providers
from pombal.errors import Permanent, Rejected
from pombal.settings import settings
from providers import guard, http
from providers.instance import FAULTS, MOST_RAW, Hook, InstanceFault, Picture, Standing
from providers.megaapi import MegaApi, check_key, normal_host
from tests.providers.test_graph import Asked, Writes, a_server, an_answer

T = TypeVar("T")
KEY = "megastart-Ab.c_1"
TOKEN = "a-token-that-nobody-may-see"
TLS = guard.ssl_context()
LOOPBACK = [ip_network("127.0.0.0/8")]
PAGE = an_answer(
    "<!DOCTYPE html><title>Attention Required! | Cloudflare</title>", "403 Forbidden", content_type="text/html"
)
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(50)
JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(50)

Does = Callable[[MegaApi], Awaitable[T]]


def an_instance(**fields: Any) -> dict[str, Any]:
    return {"error": False, "message": "Instance data fetched", "instance": {"key": KEY, **fields}}


def says(body: Any, status: str = "200 OK", **headers: str) -> bytes:
    return an_answer(json.dumps(body), status, content_type="application/json", **headers)


@asynccontextmanager
async def some_clients(**more: Any) -> AsyncIterator[http.Clients]:
    clients = http.Clients(1, **{"allowed": LOOPBACK, "verify": TLS, **more})
    try:
        yield clients
    finally:
        await clients.close()


def heard(does: Does[T], *answers: bytes | Writes, key: str = KEY, token: str = TOKEN) -> tuple[T, list[Asked]]:
    """What a call gives when the server says this, and the requests it got."""

    async def run() -> tuple[T, list[Asked]]:
        async with a_server(*answers) as (url, asked), some_clients() as clients:
            return await does(MegaApi(clients, url, key, token, deadline=20)), asked

    return asyncio.run(run())


def status_by(*answers: bytes | Writes, deadline: float = 20) -> Standing:
    return heard(lambda instance: instance.status(deadline), *answers)[0]


def fault_of(does: Does[Any], *answers: bytes | Writes, **more: Any) -> InstanceFault:
    with pytest.raises(InstanceFault) as raised:
        heard(does, *answers, **more)
    fault = raised.value
    assert fault.code in FAULTS
    assert len(fault.raw) <= MOST_RAW
    for secret in (TOKEN, KEY, "127.0.0.1"):
        assert secret not in str(fault)
    return fault


def no_status(*answers: bytes | Writes, deadline: float = 20) -> InstanceFault:
    return fault_of(lambda instance: instance.status(deadline), *answers)


# -- what leaves -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("does", "answer", "line", "body"),
    [
        (lambda i: i.status(9), an_instance(), f"GET /rest/instance/{KEY} HTTP/1.1", None),
        (lambda i: i.listed(9), {"instances": []}, "GET /rest/instance/list HTTP/1.1", None),
        (
            lambda i: i.qr(),
            {"message": "User is already logged in"},
            f"GET /rest/instance/qrcode_base64/{KEY} HTTP/1.1",
            None,
        ),
        (lambda i: i.restart(), {"error": False}, f"DELETE /rest/instance/{KEY}/restart HTTP/1.1", None),
        (lambda i: i.logout(), {"error": False}, f"DELETE /rest/instance/{KEY}/logout HTTP/1.1", None),
        (lambda i: i.hook(), {"webhookUrl": ""}, f"GET /rest/webhook/{KEY} HTTP/1.1", None),
        (
            lambda i: i.set_hook("https://pombal.example/api?token=t"),
            {"error": False},
            f"POST /rest/webhook/{KEY}/configWebhook HTTP/1.1",
            {"messageData": {"webhookUrl": "https://pombal.example/api?token=t", "webhookEnabled": True}},
        ),
    ],
    ids=["status", "list", "qr", "restart", "logout", "hook", "set_hook"],
)
def test_each_call_is_the_one_that_the_gateway_knows(does: Does[Any], answer: Any, line: str, body: Any) -> None:
    _, (asked,) = heard(does, says(answer))

    assert asked.line == line
    assert asked.headers["authorization"] == f"Bearer {TOKEN}"
    assert asked.headers["user-agent"] == "pombal"
    assert asked.headers["accept-encoding"] == "identity"
    assert (json.loads(asked.body) if asked.body else None) == body


def test_no_cookie_is_kept() -> None:
    async def twice(instance: MegaApi) -> None:
        await instance.status(9)
        await instance.status(9)

    _, asked = heard(twice, says(an_instance(), set_cookie="__cf_bm=1; Path=/; Domain=127.0.0.1"))

    assert ["cookie" in one.headers for one in asked] == [False, False]


# -- how it stands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["connected", "disconnected"])
def test_the_two_words_that_are_known(word: Any) -> None:
    found = status_by(says(an_instance(status=word, user={"id": "5511955550200:12@s.whatsapp.net", "name": "Loja"})))

    assert found == Standing(word, word, "5511955550200")


@pytest.mark.parametrize(
    ("instance", "raw"),
    [
        ({"status": "syncing"}, "syncing"),
        ({"status": "Connected"}, "Connected"),
        ({"status": " connected"}, "connected"),
        ({"status": ""}, ""),
        ({"status": "a\0b\r\nc\u202ed" + "x" * 500}, "ab  cd" + "x" * (MOST_RAW - 6)),
        ({"status": None}, ""),
        ({"status": True}, "true"),
        ({"status": {"connected": True}}, '{"connected":true}'),
        ({}, ""),
        ({"user": {"id": "5511955550200@s.whatsapp.net"}}, ""),
        ({"connected": True}, ""),
    ],
)
def test_anything_else_says_neither_and_is_kept_as_it_is(instance: Any, raw: str) -> None:
    found = status_by(says(an_instance(**instance)))

    assert (found.status, found.raw) == (None, raw)


@pytest.mark.parametrize(
    "body", [{}, {"error": False}, {"instance": None}, {"instance": "connected"}, {"status": "connected"}]
)
def test_an_answer_without_an_instance_says_neither(body: Any) -> None:
    assert status_by(says(body)) == Standing(None)


@pytest.mark.parametrize(
    ("id_", "own"),
    [
        ("5511955550200@s.whatsapp.net", "5511955550200"),
        ("5511955550200:3@s.whatsapp.net", "5511955550200"),
        ("98765432109876@lid", None),
        ("5511955550200", None),
        ("@s.whatsapp.net", None),
        (7, None),
    ],
)
def test_the_number_that_is_logged_in_is_told_without_its_device(id_: Any, own: str | None) -> None:
    assert status_by(says(an_instance(status="connected", user={"id": id_}))).own_id == own


@pytest.mark.parametrize(
    ("answer", "code", "is_transient", "raw"),
    [
        (says({"name": "UNAUTHORIZED", "message": "no", "status": 401}, "401 No"), "refused", False, "HTTP 401 no"),
        (says({"name": "FORBIDDEN", "message": "no"}, "403 No"), "refused", False, "HTTP 403 no"),
        (an_answer("", "403 No"), "refused", False, "HTTP 403"),
        (
            says({"error": True, "message": "Instance not found"}, "404 No"),
            "not_found",
            False,
            "HTTP 404 Instance not found",
        ),
        (says({"error": True, "message": "Instance not found"}), "not_found", False, "Instance not found"),
        (says({"error": True, "message": "Session\r\nclosed"}), "rejected", False, "Session  closed"),
        (says({"erro": True, "message": "não"}), "rejected", False, "não"),
        (says({"error": "boom"}), "rejected", False, "boom"),
        (says({"error": True, **an_instance(status="disconnected"), "erro": True}), "rejected", False, None),
        (says({"message": "bad"}, "400 Bad"), "rejected", False, "HTTP 400 bad"),
        (says({"message": "oops"}, "500 Oops"), "provider_error", True, "HTTP 500 oops"),
        (an_answer("<html>bad gateway", "502 Bad"), "provider_error", True, "HTTP 502 <html>bad gateway"),
        (an_answer(""), "unreadable", False, ""),
        (an_answer("OK"), "unreadable", False, "OK"),
        (an_answer(b"\xff\xfe\0garbage"), "unreadable", False, None),
        (an_answer("[]"), "unreadable", False, "[]"),
        (an_answer("[" * 100_000), "unreadable", False, None),
        (says(an_instance(status="\ud800")), "unreadable", False, None),
        (an_answer('{"instance":{"status":"connec'), "unreadable", False, None),
        (an_answer("{}", content_encoding="gzip"), "unreadable", False, "HTTP 200"),
        (an_answer(b" " * (http.MOST_BYTES + 1)), "unreadable", False, "HTTP 200"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{}", "unreachable", True, ""),
        (b"garbage\r\n\r\n", "unreachable", True, ""),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_an_answer_that_is_none_has_a_reason(answer: bytes, code: str, is_transient: bool, raw: str | None) -> None:
    fault = no_status(answer)

    assert (fault.code, fault.is_transient) == (code, is_transient)
    assert raw is None or fault.raw == raw


def test_a_page_of_the_edge_says_nothing_about_the_token() -> None:
    fault = no_status(PAGE)

    assert (fault.code, fault.is_transient, fault.wait) == ("edge_blocked", True, 60)
    assert no_status(an_answer(" <html>", "403 No")).code == "edge_blocked"  # whatever its type says


@pytest.mark.parametrize(
    ("value", "wait"), [("7", 7), ("100000", 3600), ("Wed, 21 Oct 2026 07:28:00 GMT", 30), ("-1", 30)]
)
def test_a_limit_is_heard_with_its_time(value: str, wait: float) -> None:
    fault = no_status(says({"message": "slow down"}, "429 Too Many", retry_after=value))

    assert (fault.code, fault.is_transient, fault.wait) == ("throttled", True, wait)


def test_silence_and_drips_end_at_the_calls_own_deadline() -> None:
    async def silence(writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.02)

    for writes in (silence, drip):
        fault = no_status(writes, deadline=1.5)
        assert (fault.code, fault.is_transient) == ("timeout", True)


def test_nobody_there_is_unreachable() -> None:
    async def run() -> InstanceFault:
        async with a_server(b"") as (url, _):
            pass
        async with some_clients() as clients:
            with pytest.raises(InstanceFault) as raised:
                await MegaApi(clients, url, KEY, TOKEN).status(9)
        return raised.value

    fault = asyncio.run(run())

    assert (fault.code, fault.is_transient) == ("unreachable", True)


def test_a_redirect_is_not_followed_and_the_token_stays() -> None:
    async def run() -> tuple[InstanceFault, list[Asked], list[Asked]]:
        async with a_server(says(an_instance(status="connected"))) as (elsewhere, there):
            for_it = an_answer("", "302 Moved", location=f"{elsewhere}/rest/instance/{KEY}")
            async with a_server(for_it) as (url, here), some_clients() as clients:
                with pytest.raises(InstanceFault) as raised:
                    await MegaApi(clients, url, KEY, TOKEN).status(9)
                return raised.value, here, there

    fault, here, there = asyncio.run(run())

    assert (fault.code, fault.is_transient) == ("provider_error", False)
    assert (len(here), there) == (1, [])


def test_a_host_inside_is_refused_before_a_connection_is_made() -> None:
    async def run() -> tuple[InstanceFault, list[Asked]]:
        async with a_server(says(an_instance())) as (url, asked), some_clients(allowed=[]) as clients:
            with pytest.raises(InstanceFault) as raised:
                await MegaApi(clients, url, KEY, TOKEN).status(9)
            return raised.value, asked

    fault, asked = asyncio.run(run())

    assert (fault.code, fault.is_transient, asked) == ("blocked_address", False, [])


@pytest.mark.parametrize(
    ("host", "key", "token"),
    [
        ("", KEY, TOKEN),
        ("https://a/b", KEY, TOKEN),
        ("ftp://a", KEY, TOKEN),
        ("api.example", "../admin", TOKEN),
        ("api.example", "", TOKEN),
        ("api.example", KEY, ""),
        ("api.example", KEY, "two\r\nlines"),
        ("api.example", KEY, "tokén"),
    ],
)
def test_what_is_configured_wrong_leaves_nothing_out(host: str, key: str, token: str) -> None:
    async def run() -> None:
        async with some_clients() as clients:
            await MegaApi(clients, host, key, token).status(9)

    with pytest.raises(InstanceFault) as raised:
        asyncio.run(run())

    assert raised.value.code == "misconfigured"
    assert not token or token not in str(raised.value)


# -- all of a host ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["instances", "data"])
def test_the_list_has_all_instances_by_key(name: str) -> None:
    elements: list[Any] = [
        {"key": "a", "status": "connected", "user": {"id": "5511955550200:1@s.whatsapp.net", "lid": "1@lid"}},
        {"instance_key": "b", "status": "disconnected"},
        {"key": "c", "status": "qr"},
        {"key": "d"},
        *({"key": 7, "status": "connected"}, {"status": "connected"}, None, "e", []),
    ]

    found, _ = heard(lambda i: i.listed(9), says({"erro": False, "createdInstances": 3, name: elements}))

    assert found == {
        "a": Standing("connected", "connected", "5511955550200"),
        "b": Standing("disconnected", "disconnected"),
        "c": Standing(None, "qr"),
        "d": Standing(None),
    }


def test_a_list_may_be_longer_than_other_answers() -> None:
    elements = [{"key": f"megastart-{n:06}", "status": "connected", "x": "x" * 200} for n in range(10_000)]

    assert len(heard(lambda i: i.listed(9), says({"instances": elements}))[0]) == 10_000


@pytest.mark.parametrize("body", [{}, {"instances": None}, {"instances": {}}, {"data": "x"}])
def test_a_list_of_another_form_is_not_an_empty_one(body: Any) -> None:
    assert fault_of(lambda i: i.listed(9), says(body)).code == "unreadable"


# -- QR code, and where events go ------------------------------------------------------------------------------------


def a_code(content: bytes, prefix: str = "data:image/png;base64,") -> bytes:
    return says({"qrcode": prefix + base64.b64encode(content).decode()})


def test_a_qr_code_is_a_picture_whose_type_its_bytes_tell() -> None:
    assert heard(lambda i: i.qr(), a_code(PNG))[0] == Picture("image/png", PNG)
    assert heard(lambda i: i.qr(), a_code(JPEG))[0] == Picture("image/jpeg", JPEG)
    assert heard(lambda i: i.qr(), a_code(PNG, ""))[0] == Picture("image/png", PNG)


@pytest.mark.parametrize("error", [True, False])
@pytest.mark.parametrize("status", ["200 OK", "400 Bad"])
def test_there_is_none_when_somebody_is_logged_in(error: bool, status: str) -> None:
    answer = says({"error": error, "message": "User is already logged in"}, status)

    assert heard(lambda i: i.qr(), answer)[0] is None


@pytest.mark.parametrize(
    "answer",
    [
        *(says({}), says({"qrcode": ""}), says({"qrcode": None}), says({"qrcode": "data:image/png;base64,!!!!"})),
        *(a_code(b"<svg onload=alert(1)>"), a_code(b"GIF89a" + bytes(50)), a_code(b""), says({"qrcode": "dåta"})),
        says({"qrcode": "https://evil.example/qr.png"}),
    ],
)
def test_what_is_no_picture_is_not_shown(answer: bytes) -> None:
    assert fault_of(lambda i: i.qr(), answer).code == "unreadable"


@pytest.mark.parametrize(
    ("body", "hook"),
    [
        (
            {"webhookData": {"webhookUrl": "https://a/?token=1", "webhookEnabled": True}},
            Hook("https://a/?token=1", True),
        ),
        ({"data": {"webhookUrl": "https://a", "webhookEnabled": False}}, Hook("https://a", False)),
        ({"webhookUrl": "https://a"}, Hook("https://a", True)),
        ({"webhookUrl": "", "webhookEnabled": True}, Hook("", True)),
        ({"messageData": {"webhookUrl": None}}, Hook("", False)),
    ],
)
def test_where_events_go_is_found_wherever_it_stands(body: Any, hook: Hook) -> None:
    assert heard(lambda i: i.hook(), says({"error": False, **body}))[0] == hook


def test_an_answer_that_does_not_say_where_events_go_is_not_taken_for_nowhere() -> None:
    assert fault_of(lambda i: i.hook(), says({"error": False})).code == "unreadable"
    assert fault_of(lambda i: i.hook(), says({"webhookUrl": 7})).code == "unreadable"


@pytest.mark.parametrize("does", [lambda i: i.restart(), lambda i: i.logout(), lambda i: i.set_hook("https://a")])
def test_what_the_gateway_does_not_do_is_not_taken_for_done(does: Does[None]) -> None:
    assert fault_of(does, says({"error": True, "message": "no"})).code == "rejected"
    assert fault_of(does, an_answer("")).code == "unreadable"


# -- what is configured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("api2.megaapi.com.br", "https://api2.megaapi.com.br"),
        (" https://API2.MegaAPI.com.br/ ", "https://api2.megaapi.com.br"),
        ("https://a.example:443", "https://a.example"),
        ("http://a.example:80/", "http://a.example"),
        ("a.example:8443", "https://a.example:8443"),
        ("http://mega_api:3000", "http://mega_api:3000"),
        ("http://127.0.0.1:9000", "http://127.0.0.1:9000"),
        ("http://[::1]:9000", "http://[::1]:9000"),
        ("https://xn--9q8h.example", "https://xn--9q8h.example"),
    ],
)
def test_a_host_has_one_way_to_be_written(text: str, host: str) -> None:
    assert normal_host(text) == host
    assert normal_host(host) == host


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "https://", "https:///", "ftp://a", "javascript://a", "https://a/b", "a/rest", "https://a//"),
        *("https://a?b", "https://a?", "https://a#b", "https://a#", "https://u@a", "https://u:p@a", "https://@a"),
        *(
            "https://a:0",
            "https://a:",
            "https://a:99999",
            "https://a:x",
            "https://a b",
            "https://a\r\nb",
            "https://a\0",
        ),
        *(
            "https://a\\b",
            "https://á.example",
            "https://a..b",
            "https://.a",
            "https://a.",
            "https://-a",
            "https://[::1",
        ),
        *("https://[::1%25eth0]", "https://[fe80::1%eth0]", "https://a%2fb", "https://" + "a" * 64 + ".example"),
        *("https://" + "a." * 130 + "a", "https://a,b", "https://*", "https://[1.2.3.4]", "a:b:c"),
    ],
)
def test_anything_but_a_host_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(Rejected) as refused:
        normal_host(text)

    assert len(text) < 9 or text not in str(refused.value)


@given(st.text())
def test_no_text_can_do_more_than_be_refused(text: str) -> None:
    try:
        host = normal_host(text)
    except Rejected:
        return
    assert normal_host(host) == host


@pytest.mark.parametrize("key", ["megastart-AbC", "a", ".a", "a..b", "demo_mega", "lists", "init", "x" * 128])
def test_a_key_that_can_stand_in_a_path(key: str) -> None:
    assert check_key(key) == key


@pytest.mark.parametrize(
    "key",
    [
        *("", ".", "..", "a/b", "../x", "a?b", "a#b", "a%2fb", "a b", "a\r\nb", "a\n", "á", "x" * 129, "a\\b", "a;b"),
        *("list", "LIST", "List"),
    ],
)
def test_a_key_that_could_lead_elsewhere_is_refused(key: str) -> None:
    with pytest.raises(Rejected):
        check_key(key)


# -- the way to it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "secrets", "token"),
    [
        ({"host": "{url}", "instance_key": KEY}, {"token": "own"}, "own"),
        ({"instance_key": KEY}, {}, "operators"),
        ({"instance_key": KEY}, {"token": "own"}, "own"),
        ({"host": "{url}/", "instance_key": KEY}, {}, "operators"),
        ({"host": "other.example", "instance_key": KEY}, {}, None),
    ],
)
def test_the_operators_token_goes_to_the_operators_host_alone(
    config: dict[str, str], secrets: dict[str, str], token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> str | None:
        async with a_server(says(an_instance(status="connected"))) as (url, asked), some_clients() as clients:
            monkeypatch.setenv("MEGA_API_HOST", url)
            monkeypatch.setenv("MEGA_API_TOKEN", "operators")
            settings.cache_clear()
            given = {name: value.replace("{url}", url) for name, value in config.items()}
            with suppress(InstanceFault):
                await providers.instance("megaapi", clients, given, secrets).status(9)
            return asked[0].headers["authorization"].removeprefix("Bearer ") if asked else None

    try:
        assert asyncio.run(run()) == token
    finally:
        monkeypatch.undo()
        settings.cache_clear()


def test_hosts_inside_are_those_that_the_operator_has_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> str:
        async with a_server(says(an_instance(status="connected"))) as (url, _), some_clients(allowed=None) as clients:
            try:
                return (await MegaApi(clients, url, KEY, TOKEN).status(9)).raw
            except InstanceFault as fault:
                return fault.code

    found = []
    try:
        for networks in ("", "127.0.0.0/8"):
            monkeypatch.setenv("MEDIA_ALLOWED_NETWORKS", networks)
            settings.cache_clear()
            found.append(asyncio.run(run()))
    finally:
        monkeypatch.undo()
        settings.cache_clear()

    assert found == ["blocked_address", "connected"]


def test_a_kind_without_instances_has_none() -> None:
    with pytest.raises(Permanent):
        providers.instance("meta", http.Clients(1), {}, {})
