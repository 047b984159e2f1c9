"""Messages by API: 202 only after the commit, one row per key, errors that say which field (contract.md, HTTP: API)."""

import json
import re
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import httpx
import pytest
from sqlalchemy import text

from models import ApiKey, Attempt, File, Hold, Lane, Media, Template, outgoing
from pombal.cli import admin
from pombal.ids import uuid7
from pombal.supervisor import until
from tests.factories import Shop, a_delivery, a_shop, a_wamid, body_of, rows, seen_by, statuses, superuser, texts
from tests.web.island import Island, an_island, frozen
from tests.web.process import Web, running
from workers import incoming_message

TO = "+5511944440001"
URL = "/api/v1/messages"
MIB = 1024 * 1024
IN_TIME = 6.0  # seconds; the bar is 3, the machine is shared


class Customer(NamedTuple):
    """A tenant with one channel and a key to it."""

    shop: Shop
    key: str
    web: Web

    def asks(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"} | options.pop("headers", {})
        return self.web.http.request(method, path, headers=headers, **options)

    def sends(self, key: str | None = None, **given: Any) -> httpx.Response:
        headers = {"Idempotency-Key": key} if key is not None else {}
        body = {"to": TO, "type": "text", "text": "Olá"} | given
        return self.asks("POST", URL, headers=headers, json={k: v for k, v in body.items() if v is not None})

    def sent(self, **given: Any) -> str:
        """The id of a message that was queued."""
        answer = self.sends(**given)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["message_id"])

    def looks(self, id_: str) -> Any:
        answer = self.asks("GET", f"{URL}/{id_}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def rows(self) -> list[dict[str, Any]]:
        return rows(self.shop, "SELECT * FROM message WHERE tenant_id = :tenant AND direction = 'out' ORDER BY id")

    def row(self, id_: str) -> dict[str, Any]:
        (found,) = [row for row in self.rows() if str(row["id"]) == id_]
        return found


@pytest.fixture
def customer(web: Web) -> Customer:
    return a_customer(web)


def a_customer(web: Web, *scopes: str, shop: Shop | None = None) -> Customer:
    shop = shop or a_shop()
    _, key = admin.add_key(shop.tenant.id, "a key", scopes or ("messages:send", "messages:read"))
    return Customer(shop, key, web)


def heard(shop: Shop, *wamids: str, ago: int = 60, from_: str = TO[1:]) -> None:
    """The customer's messages have come in, and were processed."""
    body = texts(shop, *wamids, from_=from_, at=int(time.time()) - ago)
    incoming_message([str(a_delivery(shop, body))])


def error(answer: httpx.Response) -> Any:
    return answer.json()["error"]


def attempt(shop: Shop, message_id: str, **came_back: Any) -> None:
    """One try at sending, as the worker writes it down."""
    id_ = uuid7()
    with seen_by(shop) as s:
        s.execute(text("UPDATE message SET due_at = now() WHERE id = :id"), {"id": message_id})
        begun = Attempt.begin(
            s, shop.tenant.id, shop.channel.id, [{"message_id": uuid.UUID(message_id), "attempt_id": id_}]
        )
        assert begun
    if came_back:
        blank = dict.fromkeys(
            ("provider_id", "http_status", "error_class", "error_scope", "error_code", "error", "trace_id")
        )
        with seen_by(shop) as s:
            Attempt.end(s, shop.tenant.id, [blank | {"id": id_} | came_back])
            if came_back["outcome"] == "accepted":
                row = {"id": uuid.UUID(message_id), "attempt_id": id_, "provider_id": came_back["provider_id"]}
                outgoing.adopt(s, shop.tenant.id, [row])


# --------------------------------------------------------------------------------------------------------------- queued


def test_a_message_is_queued_and_its_row_is_there_when_the_answer_is(customer: Customer) -> None:
    answer = customer.sends()

    assert answer.status_code == 202
    (row,) = customer.rows()
    assert answer.json() == {"message_id": str(row["id"]), "status": "queued"}
    assert (row["status"], row["recipient"], row["body"]) == ("queued", TO, {"text": {"body": "Olá"}})
    assert row["request_id"] == answer.headers["x-request-id"]


def test_the_answer_comes_after_the_commit_and_not_before(customer: Customer) -> None:
    with superuser() as connection, ThreadPoolExecutor(8) as pool:
        connection.execute("BEGIN")
        connection.execute("LOCK TABLE event IN SHARE MODE")
        answers = [pool.submit(customer.sends) for _ in range(8)]
        assert until(lambda: is_waiting_for_a_lock(), time.monotonic() + 10)
        early = [answer.done() for answer in answers]
        connection.execute("COMMIT")
        codes = [answer.result().status_code for answer in answers]

    assert not any(early)
    assert codes == [202] * 8
    assert len(customer.rows()) == 8


def is_waiting_for_a_lock() -> bool:
    with superuser() as connection:
        found = connection.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()
        return bool(found and found[0])


def test_the_old_form_queues_the_same(customer: Customer) -> None:
    answer = customer.asks("POST", "/api/messages/send", json={"to": TO[1:], "type": "text", "content": "Olá"})

    assert answer.status_code == 202
    (row,) = customer.rows()
    assert answer.json() == {"message_id": str(row["id"]), "status": "queued"}
    assert (row["recipient"], row["body"]) == (TO, {"text": {"body": "Olá"}})


def test_the_old_form_takes_a_key_too(customer: Customer) -> None:
    old = {"to": TO[1:], "type": "text", "content": "Olá"}
    ids = {
        customer.asks("POST", "/api/messages/send", json=old, headers={"Idempotency-Key": "k"}).json()["message_id"]
        for _ in range(3)
    }

    assert len(ids) == len(customer.rows()) == 1


def test_every_kind_of_message_is_queued_as_the_provider_wants_it(customer: Customer) -> None:
    button = {"type": "reply", "reply": {"id": "1", "title": "Sim"}}
    given: list[tuple[str, Any]] = [
        ("text", {"body": "Olá", "preview_url": True}),
        ("image", {"link": "https://example.com/a.jpg", "caption": "Foto"}),
        ("document", {"id": "920000000000001", "filename": "nf.pdf"}),
        ("location", {"latitude": -27.59, "longitude": -48.54, "name": "Loja Centro"}),
        ("contacts", [{"name": {"formatted_name": "Ana Luz"}}]),
        ("interactive", {"type": "button", "body": {"text": "?"}, "action": {"buttons": [button]}}),
        ("template", {"name": "pedido_enviado", "language": {"code": "pt_BR"}}),
    ]

    for type_, content in given:
        customer.sent(**{"type": type_, "text": None, type_: content})

    assert [(row["type"], row["body"]) for row in customer.rows()] == [
        (type_, {type_: content}) for type_, content in given
    ]


def test_a_bsuid_is_a_recipient(customer: Customer) -> None:
    id_ = customer.sent(to="BR.90000000000000001")

    assert customer.row(id_)["recipient"] == "BR.90000000000000001"
    (identity,) = rows(customer.shop, "SELECT kind, value FROM contact_identity WHERE tenant_id = :tenant")
    assert identity == {"kind": "bsuid", "value": "BR.90000000000000001"}


def test_a_message_for_later_waits_for_its_time(customer: Customer) -> None:
    at = datetime.now(UTC) + timedelta(days=2)
    id_ = customer.sent(not_before=at.isoformat())

    assert customer.row(id_)["due_at"] == at
    shown = customer.looks(id_)
    assert shown["not_before"] == shown["waiting"]["until"] == at.isoformat()
    assert shown["waiting"]["reason"] == "schedule"


def test_a_time_that_has_passed_is_now(customer: Customer) -> None:
    id_ = customer.sent(not_before="2020-01-01T00:00:00-03:00")

    assert customer.row(id_)["turn_at"] == customer.row(id_)["created_at"]
    assert customer.looks(id_)["not_before"] is None


def test_queued_and_refused_messages_are_counted(web: Web, customer: Customer) -> None:
    before = counted(web, "meta", "queued"), counted(web, "none", "refused")

    for key in ("a", "a", "b"):
        customer.sends(key)
    customer.sends(text="")

    assert until(lambda: counted(web, "meta", "queued") >= before[0] + 2, time.monotonic() + 20)
    assert until(lambda: counted(web, "none", "refused") >= before[1] + 1, time.monotonic() + 20)


def counted(web: Web, provider: str, outcome: str) -> float:
    labels = f'direction="out",outcome="{outcome}",provider="{provider}"'
    found = re.findall(rf"^pombal_messages_total{{{labels}}} (.+)$", web.http.get("/metrics").text, re.MULTILINE)
    return float(found[0]) if found else 0.0


def test_the_log_tells_ids_and_nothing_of_the_message(web: Web, customer: Customer) -> None:
    mark = uuid.uuid4().hex
    secret = "Only for Bia's eyes"
    answer = customer.asks("POST", URL, json={"to": TO, "type": "text", "text": secret}, headers={"X-Request-ID": mark})
    customer.sends(text=secret, to="123")

    assert until(lambda: mark in web.log(), time.monotonic() + 10)
    (line,) = [line for line in web.lines() if line.get("request_id") == mark]
    assert line["event"] == "message_queued"
    assert line["message_id"] == answer.json()["message_id"]
    assert (line["tenant_id"], line["channel_id"]) == (str(customer.shop.tenant.id), str(customer.shop.channel.id))
    for unwanted in (secret, TO, TO[1:], customer.key):
        assert unwanted not in web.log()


# ------------------------------------------------------------------------------------------------------------------ key


def test_fifty_at_once_with_one_key_are_one_message(customer: Customer) -> None:
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: customer.sends("order-4410"), range(50)))

    (row,) = customer.rows()
    assert [answer.status_code for answer in answers] == [202] * 50
    assert {answer.json()["message_id"] for answer in answers} == {str(row["id"])}
    assert len(rows(customer.shop, "SELECT 1 FROM event WHERE tenant_id = :tenant")) == 1


def test_a_key_with_another_request_is_a_conflict(customer: Customer) -> None:
    id_ = customer.sends("k").json()["message_id"]

    other = customer.sends("k", text="Tchau")

    assert (other.status_code, error(other)["code"]) == (409, "CONFLICT")
    assert customer.sends("k").json()["message_id"] == id_
    assert len(customer.rows()) == 1


def test_a_key_still_names_its_message_when_that_has_gone_on(customer: Customer) -> None:
    id_ = customer.sends("k").json()["message_id"]
    customer.asks("DELETE", f"{URL}/{id_}")

    again = customer.sends("k")

    assert (again.status_code, again.json()) == (202, {"message_id": id_, "status": "cancelled"})


@pytest.mark.parametrize("key", ["", "x" * 256, "chave-\xe9", "a\tb"])
def test_a_key_is_printable_ascii(customer: Customer, key: str) -> None:
    answer = customer.asks(
        "POST", URL, json={"to": TO, "type": "text", "text": "x"}, headers={"Idempotency-Key": key.encode("latin-1")}
    )

    assert answer.status_code == 422
    assert error(answer)["details"] == {"field": "Idempotency-Key", "limit": 255}
    assert customer.rows() == []


def test_the_longest_key_is_taken(customer: Customer) -> None:
    assert customer.sends("~ " * 127 + "!").status_code == 202


# --------------------------------------------------------------------------------------------------------------- errors


def test_an_error_names_the_field_and_the_limit(customer: Customer) -> None:
    answer = customer.sends(text={"body": "x" * 4097})

    assert answer.status_code == 422
    assert error(answer)["code"] == "INVALID_PAYLOAD"
    assert error(answer)["details"] == {"field": "$.text.body", "limit": 4096}
    assert error(answer)["message"] == "$.text.body must have at most 4096 characters"
    assert error(answer)["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"to": "5511944440001"}, "$.to"),
        ({"to": None}, "$.to"),
        ({"type": "fax"}, "$.type"),
        ({"colour": "red"}, "$.colour"),
        ({"text": "a\x00b"}, "$.text"),
        ({"not_before": "tomorrow"}, "$.not_before"),
        ({"reply_to": "wamid.unknown"}, "$.reply_to"),
        ({"type": "reaction", "text": None, "reaction": {"message_id": "x", "emoji": ""}}, "$.reaction.message_id"),
        ({"type": "read", "to": None, "text": None, "message_id": "x"}, "$.message_id"),
    ],
)
def test_what_is_wrong_is_named(customer: Customer, given: dict[str, Any], field: str) -> None:
    answer = customer.sends(**given)

    assert (answer.status_code, error(answer)["code"]) == (422, "INVALID_PAYLOAD")
    assert error(answer)["details"]["field"] == field
    assert customer.rows() == []


def test_what_is_not_json_is_a_bad_request(customer: Customer) -> None:
    for raw in (b"", b"{", b"\xff", b"[" * 100_000):
        answer = customer.asks("POST", URL, content=raw)
        assert (answer.status_code, error(answer)["code"]) == (400, "INVALID_PAYLOAD")


def test_a_request_has_at_most_256_kib(customer: Customer) -> None:
    largest = json.dumps({"to": TO, "type": "text", "text": "Olá"}).encode().ljust(256 * 1024)

    assert customer.asks("POST", URL, content=largest).status_code == 202
    answer = customer.asks("POST", URL, content=largest + b" ")
    assert (answer.status_code, error(answer)["code"]) == (413, "PAYLOAD_TOO_LARGE")


def test_a_refused_neighbour_does_not_hurt(customer: Customer) -> None:
    def one(n: int) -> httpx.Response:
        return customer.sends(reply_to="wamid.unknown") if n % 2 else customer.sends()

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(one, range(40)))

    assert [answer.status_code for answer in answers] == [202, 422] * 20
    assert len(customer.rows()) == 20


# -------------------------------------------------------------------------------------------------------------- tenants


@pytest.mark.parametrize("scope", ["messages:read", "channels:manage", "sip:manage"])
def test_a_key_without_the_scope_sends_and_cancels_nothing(web: Web, customer: Customer, scope: str) -> None:
    id_ = customer.sent()
    other = a_customer(web, scope, shop=customer.shop)

    for answer in (
        other.sends(),
        other.asks("POST", "/api/messages/send", json={}),
        other.asks("DELETE", f"{URL}/{id_}"),
    ):
        assert (answer.status_code, error(answer)["code"]) == (403, "FORBIDDEN")
    assert [row["status"] for row in customer.rows()] == ["queued"]


@pytest.mark.parametrize("scope", ["messages:send", "channels:manage", "sip:manage"])
def test_a_key_without_the_scope_reads_nothing(web: Web, customer: Customer, scope: str) -> None:
    other = a_customer(web, scope, shop=customer.shop)

    assert other.asks("GET", f"{URL}/{customer.sent()}").status_code == 403


def test_without_a_key_nothing_is_done(web: Web) -> None:
    id_ = uuid.uuid4()
    for method, path in (("POST", URL), ("GET", f"{URL}/{id_}"), ("DELETE", f"{URL}/{id_}")):
        answer = web.http.request(method, path, json={"to": TO})
        assert (answer.status_code, error(answer)["code"]) == (401, "UNAUTHORIZED")


def test_a_key_that_was_revoked_sends_nothing_more_even_in_a_crowd(web: Web) -> None:
    """Requests in flight share a look-up of their key; whoever comes later must not share an older one."""
    shop = a_shop()
    row, key = admin.add_key(shop.tenant.id, "a key")
    customer = Customer(shop, key, web)
    is_over = threading.Event()

    def crowd() -> set[int]:
        codes = set()
        while not is_over.is_set():
            codes.add(customer.sends().status_code)
        return codes

    with ThreadPoolExecutor(8) as pool:
        crowds = [pool.submit(crowd) for _ in range(8)]
        assert until(lambda: len(customer.rows()) > 20, time.monotonic() + 30)
        with seen_by(shop) as s:
            s.get_one(ApiKey, (shop.tenant.id, row.id)).revoked_at = datetime.now(UTC)
        after = [customer.sends().status_code for _ in range(5)]
        is_over.set()
        codes = set().union(*(one.result() for one in crowds))

    assert after == [401] * 5
    assert codes == {202, 401}


def test_each_of_many_refused_at_once_hears_its_own_answer(web: Web, customer: Customer) -> None:
    other = a_customer(web, "sip:manage", shop=customer.shop)
    before = refusals(web)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: other.sends(), range(40)))

    assert [answer.status_code for answer in answers] == [403] * 40
    assert all(error(answer)["request_id"] == answer.headers["x-request-id"] for answer in answers)
    assert len({answer.headers["x-request-id"] for answer in answers}) == 40
    assert until(lambda: refusals(web) >= before + 40, time.monotonic() + 20)


def refusals(web: Web) -> float:
    found = re.findall(
        r'^pombal_security_events_total{kind="missing_scope"} (.+)$', web.http.get("/metrics").text, re.MULTILINE
    )
    return float(found[0]) if found else 0.0


def test_another_tenants_channel_message_and_reference_are_as_if_missing(web: Web, customer: Customer) -> None:
    victim = a_customer(web)
    wamid = a_wamid()
    heard(victim.shop, wamid)
    id_ = victim.sent()

    assert customer.sends(channel=str(victim.shop.channel.id)).status_code == 404
    assert customer.sends(channel=victim.shop.channel.name).status_code == 404
    for name in (wamid, id_):
        assert error(customer.sends(reply_to=name))["details"] == {"field": "$.reply_to"}
        read = customer.sends(type="read", to=None, text=None, message_id=name)
        assert error(read)["details"] == {"field": "$.message_id"}
    for method in ("GET", "DELETE"):
        foreign = customer.asks(method, f"{URL}/{id_}")
        missing = customer.asks(method, f"{URL}/{uuid.uuid4()}")
        strange = customer.asks(method, f"{URL}/7")
        told = [{**error(one), "request_id": "", "timestamp": ""} for one in (foreign, missing, strange)]
        assert (foreign.status_code, told[1:]) == (404, told[:-1])
    assert [row["status"] for row in victim.rows()] == ["queued"]
    assert customer.rows() == []


def test_the_same_key_of_another_tenant_is_another_message(web: Web, customer: Customer) -> None:
    other = a_customer(web)

    assert customer.sends("k").json()["message_id"] != other.sends("k", text="Tchau").json()["message_id"]


# ---------------------------------------------------------------------------------------------------------- references


def test_a_reply_names_the_message_by_the_providers_id(customer: Customer) -> None:
    wamid = a_wamid()
    heard(customer.shop, wamid)
    (incoming,) = rows(customer.shop, "SELECT id FROM message WHERE tenant_id = :tenant")

    ids = [customer.sent(reply_to=name) for name in (wamid, str(incoming["id"]))]

    for id_ in ids:
        assert customer.row(id_)["body"] == {"text": {"body": "Olá"}, "context": {"message_id": wamid}}


def test_a_reply_to_a_message_that_is_still_queued_keeps_our_id(customer: Customer) -> None:
    first = customer.sent()

    reaction = {"message_id": first, "emoji": "👍"}
    answer = customer.sent(type="reaction", text=None, reaction=reaction)

    assert customer.row(answer)["body"] == {"reaction": reaction}


def test_a_reference_into_another_conversation_is_refused(customer: Customer) -> None:
    other = customer.sent(to="+5511944440002")

    for given in (
        {"reply_to": other},
        {"type": "reaction", "text": None, "reaction": {"message_id": other, "emoji": ""}},
    ):
        answer = customer.sends(**given)
        assert answer.status_code == 422
        assert error(answer)["details"]["field"] in ("$.reply_to", "$.reaction.message_id")


def test_a_reference_into_another_channel_is_refused(web: Web, customer: Customer) -> None:
    second = a_customer(web, shop=a_shop(customer.shop.tenant))
    first = customer.sent(channel=str(customer.shop.channel.id))

    answer = second.sends(channel=str(second.shop.channel.id), reply_to=first)

    assert error(answer)["details"] == {"field": "$.reply_to"}


def test_a_message_that_was_never_sent_cannot_be_answered(customer: Customer) -> None:
    id_ = customer.sent()
    customer.asks("DELETE", f"{URL}/{id_}")

    assert error(customer.sends(reply_to=id_))["details"] == {"field": "$.reply_to"}


def test_a_message_that_came_in_can_be_marked_as_read(customer: Customer) -> None:
    wamid = a_wamid()
    heard(customer.shop, wamid, ago=90 * 3600)  # the window does not matter
    (conversation,) = rows(customer.shop, "SELECT * FROM conversation WHERE tenant_id = :tenant")

    id_ = customer.sent(type="read", to=None, text=None, message_id=wamid)

    row = customer.row(id_)
    assert (row["type"], row["recipient"], row["body"]) == ("read", None, {"read": {"message_id": wamid}})
    assert (row["conversation_id"], row["contact_id"]) == (conversation["id"], conversation["contact_id"])
    assert rows(customer.shop, "SELECT * FROM conversation WHERE tenant_id = :tenant") == [conversation]


def test_only_what_came_in_can_be_marked_as_read(customer: Customer) -> None:
    answer = customer.sends(type="read", to=None, text=None, message_id=customer.sent())

    assert error(answer)["details"] == {"field": "$.message_id"}


# --------------------------------------------------------------------------------------------------- window, templates


def test_outside_the_window_only_templates_and_messages_for_later_are_taken(customer: Customer) -> None:
    heard(customer.shop, a_wamid(), ago=25 * 3600)
    template = {"name": "pedido_enviado", "language": "pt_BR"}
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()

    refused = customer.sends()

    assert refused.status_code == 422
    details = error(refused)["details"]
    assert (details["reason"], details["code"]) == ("window_closed", "131047")
    assert datetime.fromisoformat(details["window_until"]) < datetime.now(UTC)
    customer.sent(not_before=later)
    customer.sent(type="template", text=None, template=template)
    heard(customer.shop, a_wamid())
    customer.sent()


def test_a_call_opens_the_window_as_well(customer: Customer) -> None:
    heard(customer.shop, a_wamid(), ago=25 * 3600)
    assert customer.sends().status_code == 422
    call = {"id": "wacid.1", "from": TO[1:], "event": "connect", "direction": "USER_INITIATED"}
    body = body_of(customer.shop, {"calls": [call | {"timestamp": str(int(time.time()))}]}, field="calls")

    incoming_message([str(a_delivery(customer.shop, body))])

    assert customer.sends().status_code == 202


def test_where_no_window_is_known_the_provider_decides(customer: Customer) -> None:
    customer.sent()
    customer.sent()


# ----------------------------------------------------------------------------------------------------------- files


def a_file(
    shop: Shop, mime_type: str = "image/jpeg", size: int = 1_000, *, claimed: str | None = None, **media: Any
) -> str:
    """The id of a file of ours, stored unless `media` says otherwise."""
    id_, digest = uuid7(), uuid.uuid4().bytes * 2
    given = {"state": "stored", "digest": digest, "kind": "image", "deadline": datetime.now(UTC)} | media
    given["mime_type"] = claimed
    kept = {"tenant_id": shop.tenant.id, "digest": digest, "key": str(id_), "bytes": size, "mime_type": mime_type}
    with seen_by(shop) as s:
        File.keep(s, kept)
        s.add(Media(tenant_id=shop.tenant.id, id=id_, **given))
    return str(id_)


WORD = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"


@pytest.mark.parametrize(
    ("type_", "mime_type", "size"),
    [
        ("image", "image/png", 5 * MIB),
        ("video", "video/3gpp", 16 * MIB),
        ("audio", "audio/ogg", 16 * MIB),
        ("document", "application/pdf", 100 * MIB),
        ("sticker", "image/webp", 500 * 1024),
    ],
)
def test_a_file_of_ours_is_queued_by_our_id(customer: Customer, type_: str, mime_type: str, size: int) -> None:
    media_id = a_file(customer.shop, mime_type, size)

    row = customer.row(customer.sent(text=None, type=type_, **{type_: {"media_id": media_id}}))

    assert row["body"] == {type_: {"media_id": media_id}}


@pytest.mark.parametrize(
    ("type_", "mime_type", "size", "limit"),
    [
        ("image", "image/jpeg", 5 * MIB + 1, 5 * MIB),
        ("video", "video/mp4", 16 * MIB + 1, 16 * MIB),
        ("audio", "audio/mpeg", 16 * MIB + 1, 16 * MIB),
        ("document", "text/plain", 100 * MIB + 1, 100 * MIB),
        ("sticker", "image/webp", 500 * 1024 + 1, 500 * 1024),
        ("image", "image/webp", 10, ["image/jpeg", "image/png"]),
        ("sticker", "image/jpeg", 10, ["image/webp"]),
        ("video", "video/quicktime", 10, ["video/mp4", "video/3gpp"]),
        ("document", "text/html", 10, None),
        ("document", "application/octet-stream", 10, None),
        ("audio", "audio/wav", 10, None),
    ],
)
def test_a_file_that_the_provider_would_refuse_is_refused(
    customer: Customer, type_: str, mime_type: str, size: int, limit: Any
) -> None:
    media_id = a_file(customer.shop, mime_type, size)

    given: dict[str, Any] = {type_: {"media_id": media_id}}
    answer = customer.sends(text=None, type=type_, **given)

    assert (answer.status_code, error(answer)["details"]["field"]) == (422, f"$.{type_}.media_id")
    assert limit in (None, error(answer)["details"]["limit"])
    assert media_id not in answer.text
    assert customer.rows() == []


def test_another_tenants_file_is_as_if_missing(web: Web, customer: Customer) -> None:
    names = [a_file(a_customer(web).shop), str(uuid.uuid4()), "4711", "x" * 36]
    answers = [customer.sends(text=None, type="image", image={"media_id": name}) for name in names]

    seen = {(one.status_code, error(one)["code"], error(one)["message"], str(error(one)["details"])) for one in answers}
    assert seen == {(404, "NOT_FOUND", "no such file", "{'field': '$.image.media_id'}")}
    assert customer.rows() == []


@pytest.mark.parametrize("state", ["pending", "failed"])
def test_a_file_must_be_stored_before_it_is_sent(customer: Customer, state: str) -> None:
    media_id = a_file(customer.shop, state=state, digest=None)

    answer = customer.sends(text=None, type="image", image={"media_id": media_id})

    assert (answer.status_code, error(answer)["details"]) == (422, {"field": "$.image.media_id"})


@pytest.mark.parametrize(
    ("claimed", "is_mislabelled", "is_taken"),
    [(WORD, False, True), (f"{WORD}; x=y", False, True), (WORD, True, False), (None, False, False)],
)
def test_where_the_bytes_leave_an_office_file_open_its_claim_counts(
    customer: Customer, claimed: str | None, is_mislabelled: bool, is_taken: bool
) -> None:
    media_id = a_file(customer.shop, "application/zip", claimed=claimed, is_mislabelled=is_mislabelled)

    answer = customer.sends(text=None, type="document", document={"media_id": media_id})

    assert answer.status_code == (202 if is_taken else 422)


def test_files_in_headers_are_looked_at_too(customer: Customer) -> None:
    image, pdf = a_file(customer.shop), a_file(customer.shop, "application/pdf")
    for media_id, code in ((image, 202), (pdf, 422), (str(uuid.uuid4()), 404)):
        parameter = {"type": "image", "image": {"media_id": media_id}}
        components = [{"type": "header", "parameters": [parameter]}]
        template = {"name": "summer", "language": "pt_BR", "components": components}

        answer = customer.sends(text=None, type="template", template=template)

        assert answer.status_code == code, answer.text
        field = "$.template.components[0].parameters[0].image.media_id"
        assert code == 202 or error(answer)["details"]["field"] == field


@pytest.mark.parametrize(
    ("status", "is_taken"), [("approved", True), ("reinstated", True), ("paused", False), ("rejected", False)]
)
def test_a_template_that_is_known_must_be_approved(customer: Customer, status: str, is_taken: bool) -> None:
    shop = customer.shop
    row = {"tenant_id": shop.tenant.id, "channel_id": shop.channel.id, "name": "oferta", "language": "pt_BR"}
    with seen_by(shop) as s:
        verdict = {"category": None, "status": status, "reason": None, "status_at": datetime.now(UTC)}
        Template.heard(s, [row | verdict])

    answer = customer.sends(type="template", text=None, template={"name": "oferta", "language": {"code": "pt_BR"}})
    other = customer.sends(type="template", text=None, template={"name": "oferta", "language": "en_US"})

    assert other.status_code == 202  # nothing is known of it
    assert answer.status_code == (202 if is_taken else 422)
    if not is_taken:
        assert error(answer)["details"] == {"reason": "template_not_approved", "code": "132001", "status": status}


# -------------------------------------------------------------------------------------------------------------- looking


def test_a_queued_message_is_shown_as_it_is(customer: Customer) -> None:
    id_ = customer.sent()

    shown = customer.looks(id_)

    created_at = shown.pop("created_at")
    assert datetime.now(UTC) - datetime.fromisoformat(created_at) < timedelta(minutes=5)
    assert shown == {
        "id": id_,
        "channel": str(customer.shop.channel.id),
        "type": "text",
        "direction": "out",
        "status": "queued",
        "to": TO,
        "not_before": None,
        "sent_at": None,
        "delivered_at": None,
        "read_at": None,
        "failed_at": None,
        "attempts": [],
        "error": None,
        "pricing": None,
        "conversation": None,
        "media": None,
        "waiting": {"reason": "line", "ahead": 0, "is_sending": False},
    }


def test_attempts_and_what_the_provider_reported_are_shown(customer: Customer) -> None:
    id_, wamid = customer.sent(), a_wamid()
    attempt(
        customer.shop, id_, outcome="refused", http_status=500, error_class="transient", error_scope="message",
        error_code="131000", error="Something went wrong",
    )  # fmt: skip
    with seen_by(customer.shop) as s:
        s.execute(text("UPDATE message SET status = 'queued' WHERE id = :id"), {"id": id_})
    attempt(customer.shop, id_, outcome="accepted", http_status=200, provider_id=wamid)
    reports = statuses(customer.shop, wamid, "sent", "delivered", "read")
    incoming_message([str(a_delivery(customer.shop, reports))])

    shown = customer.looks(id_)

    assert shown["status"] == "read"
    assert None not in (shown["sent_at"], shown["delivered_at"], shown["read_at"])
    assert shown["failed_at"] is None
    assert [(one["number"], one["outcome"], one["provider_id"]) for one in shown["attempts"]] == [
        (1, "refused", None),
        (2, "accepted", wamid),
    ]
    assert shown["attempts"][0]["error"] == {
        "code": "131000",
        "class": "transient",
        "scope": "message",
        "text": "Something went wrong",
    }
    assert shown["attempts"][1]["error"] is None
    assert None not in (shown["attempts"][1]["started_at"], shown["attempts"][1]["ended_at"])
    assert shown["pricing"]["category"] == "utility"
    assert shown["waiting"] is None


def test_a_failed_message_says_why(customer: Customer) -> None:
    id_, wamid = customer.sent(), a_wamid()
    attempt(customer.shop, id_, outcome="accepted", http_status=200, provider_id=wamid)
    incoming_message([str(a_delivery(customer.shop, statuses(customer.shop, wamid, "sent", "failed")))])

    shown = customer.looks(id_)

    assert (shown["status"], shown["error"]["code"]) == ("failed", "131047")
    assert shown["error"]["text"]
    assert shown["failed_at"] is not None


def test_an_incoming_message_is_shown_too(customer: Customer) -> None:
    heard(customer.shop, a_wamid())
    (row,) = rows(customer.shop, "SELECT id FROM message WHERE tenant_id = :tenant")

    shown = customer.looks(str(row["id"]))

    assert (shown["direction"], shown["status"], shown["waiting"], shown["attempts"]) == ("in", "received", None, [])
    assert "to" not in shown


def test_what_a_message_waits_for_is_said(customer: Customer) -> None:
    id_ = customer.sent()
    lane = {"channel_id": customer.shop.channel.id}
    assert customer.looks(id_)["waiting"] == {"reason": "line", "ahead": 0, "is_sending": False}

    behind = customer.sent()
    assert customer.looks(behind)["waiting"] == {"reason": "behind_another"}

    with seen_by(customer.shop) as s:
        s.execute(text("UPDATE message SET due_at = now() + interval '1 minute' WHERE id = :id"), {"id": id_})
    assert customer.looks(id_)["waiting"]["reason"] == "retry"

    with seen_by(customer.shop) as s:
        s.execute(
            text("""
                UPDATE lane SET paused_until = now() + interval '1 minute', pause_code = '130429'
                WHERE channel_id = :channel_id
            """),
            lane,
        )
    waiting = customer.looks(id_)["waiting"]
    assert (waiting["reason"], waiting["code"]) == ("paused", "130429")
    assert datetime.fromisoformat(waiting["until"]) > datetime.now(UTC)

    with seen_by(customer.shop) as s:
        Lane.set_hold(s, customer.shop.channel.id, Hold.AUTH, code="190", reason="the token has expired")
    waiting = customer.looks(id_)["waiting"]
    assert (waiting["reason"], waiting["hold"], waiting["code"]) == ("hold", "auth", "190")
    assert waiting["text"] == "the token has expired"


def test_a_message_whose_fate_is_unknown_says_until_when(customer: Customer) -> None:
    id_ = customer.sent()
    attempt(customer.shop, id_)
    assert customer.looks(id_)["status"] == "sending"

    with seen_by(customer.shop) as s:
        assert Attempt.abandoned(s, customer.shop.tenant.id, customer.shop.channel.id, timedelta(seconds=60))

    shown = customer.looks(id_)
    assert (shown["status"], shown["waiting"]["reason"]) == ("unknown", "settling")
    assert datetime.fromisoformat(shown["waiting"]["until"]) > datetime.now(UTC)
    assert shown["attempts"][0]["outcome"] == "unknown"


def test_a_message_whose_fate_stays_unknown_waits_for_an_operator(customer: Customer) -> None:
    id_ = customer.sent()
    attempt(customer.shop, id_)
    with seen_by(customer.shop) as s:
        s.execute(text("UPDATE message SET status = 'unknown', due_at = NULL WHERE id = :id"), {"id": id_})

    assert customer.looks(id_)["waiting"] == {
        "reason": "operator",
        "text": "it may have been sent: an operator decides whether it is sent again",
    }


def test_a_message_that_is_sent_again_was_not_scheduled(customer: Customer) -> None:
    id_ = customer.sent()
    with seen_by(customer.shop) as s:
        s.execute(text("UPDATE message SET status = 'failed', due_at = NULL WHERE id = :id"), {"id": id_})

    with seen_by(customer.shop) as s:
        assert outgoing.again(s, customer.shop.tenant.id, uuid.UUID(id_))

    assert customer.row(id_)["turn_at"] > customer.row(id_)["created_at"]
    shown = customer.looks(id_)
    assert (shown["status"], shown["not_before"], shown["waiting"]["reason"]) == ("queued", None, "line")


# ----------------------------------------------------------------------------------------------------------- cancelling


def test_a_queued_message_can_be_cancelled_as_often_as_one_likes(customer: Customer) -> None:
    id_ = customer.sent()

    answers = [customer.asks("DELETE", f"{URL}/{id_}") for _ in range(3)]

    assert [(answer.status_code, answer.json()) for answer in answers] == [
        (200, {"message_id": id_, "status": "cancelled"})
    ] * 3
    assert customer.looks(id_)["status"] == "cancelled"
    events = rows(customer.shop, "SELECT payload FROM event WHERE tenant_id = :tenant ORDER BY id")
    assert [event["payload"]["status"] for event in events] == ["queued", "cancelled"]


def test_a_message_that_has_gone_on_its_way_cannot_be_cancelled(customer: Customer) -> None:
    id_ = customer.sent()
    attempt(customer.shop, id_)

    answer = customer.asks("DELETE", f"{URL}/{id_}")

    assert (answer.status_code, error(answer)["code"]) == (409, "CONFLICT")
    assert error(answer)["details"] == {"status": "sending"}


def test_a_message_that_came_in_cannot_be_cancelled(customer: Customer) -> None:
    heard(customer.shop, a_wamid())
    (row,) = rows(customer.shop, "SELECT id FROM message WHERE tenant_id = :tenant")

    answer = customer.asks("DELETE", f"{URL}/{row['id']}")

    assert (answer.status_code, error(answer)["details"]) == (409, {"status": "received"})


# --------------------------------------------------------------------------------------------------------------- faults


class There(NamedTuple):
    """A web process on servers of its own, and a key to a tenant there."""

    island: Island
    web: Web
    key: str

    def sends(self, text: str) -> tuple[httpx.Response, float]:
        began = time.monotonic()
        answer = self.web.http.post(
            URL, json={"to": TO, "type": "text", "text": text}, headers={"Authorization": f"Bearer {self.key}"}
        )
        return answer, time.monotonic() - began

    def texts(self) -> list[str]:
        with self.island.superuser() as connection:
            return [body for (body,) in connection.execute("SELECT body #>> '{text,body}' FROM message ORDER BY id")]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[There]:
    with an_island(tmp_path_factory.mktemp("island")) as island:
        island.migrate()
        slug = f"t{uuid.uuid4().hex[:12]}"
        island.pombal("tenant", "create", slug, "--name", "A tenant")
        config = json.dumps({"phone_number_id": "880011", "waba_id": "700100", "app_secret": uuid.uuid4().hex})
        island.pombal("channel", "create", slug, "meta", "--name", "c", "--config", config)
        key = json.loads(island.pombal("key", "create", slug, "--name", "k", "--json"))["api_key"]
        with running(tmp_path_factory.mktemp("web") / "web.log", island.env) as web:
            yield There(island, web, key)


def assert_refused_in_time(answers: list[tuple[httpx.Response, float]]) -> None:
    for answer, seconds in answers:
        assert (answer.status_code, error(answer)["code"]) == (503, "UNAVAILABLE")
        assert int(answer.headers["retry-after"]) > 0
        assert seconds < IN_TIME


def test_a_killed_postgres_is_refused_in_time_and_found_again(there: There) -> None:
    there.web.wait()
    assert there.sends("before")[0].status_code == 202

    there.island.postgres.kill()
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: there.sends("lost"), range(20)))
    there.island.postgres.restart()

    assert_refused_in_time(answers)
    assert there.sends("after")[0].status_code == 202  # the very first: nothing has to be found out the hard way
    assert "lost" not in there.texts()


def test_connections_that_were_cut_cost_nobody_an_answer(there: There) -> None:
    there.web.wait()
    for n in range(3):
        answer = there.sends(f"cut-{n}")[0]
        with there.island.superuser() as connection:
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'pombal'")
        headers = {"Authorization": f"Bearer {there.key}"}
        shown = there.web.http.get(f"{URL}/{answer.json()['message_id']}", headers=headers)

        assert (answer.status_code, shown.status_code) == (202, 200)
    assert [text for text in there.texts() if text.startswith("cut-")] == ["cut-0", "cut-1", "cut-2"]


def test_a_frozen_postgres_is_refused_in_time_and_what_was_refused_is_not_sent(there: There) -> None:
    there.web.wait()
    assert there.sends("before")[0].status_code == 202

    with frozen(there.island.postgres), ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: there.sends("never"), range(40)))

    assert_refused_in_time(answers)
    assert until(lambda: there.sends("thawed")[0].status_code == 202, time.monotonic() + 30)
    assert "never" not in there.texts()


def test_a_locked_table_is_refused_in_time_and_what_was_refused_is_not_sent(there: There) -> None:
    there.web.wait()
    with there.island.superuser() as connection, ThreadPoolExecutor(10) as pool:
        connection.execute("BEGIN")
        connection.execute("LOCK TABLE conversation IN ACCESS EXCLUSIVE MODE")
        answers = list(pool.map(lambda _: there.sends("blocked"), range(10)))
        connection.execute("COMMIT")

    assert_refused_in_time(answers)
    assert until(lambda: there.sends("free")[0].status_code == 202, time.monotonic() + 30)
    assert "blocked" not in there.texts()


def test_a_redis_that_is_away_keeps_nobody_waiting(there: There) -> None:
    there.web.wait()
    with frozen(there.island.valkey):
        answers = [there.sends("deaf") for _ in range(5)]
    there.island.valkey.kill()
    answers += [there.sends("gone") for _ in range(5)]
    there.island.valkey.restart()

    for answer, seconds in answers:
        assert answer.status_code == 202
        assert seconds < IN_TIME
    assert [text for text in there.texts() if text in ("deaf", "gone")] == ["deaf"] * 5 + ["gone"] * 5


def test_what_was_answered_before_a_kill_is_there(there: There, tmp_path: Any) -> None:
    with running(tmp_path / "web.log", there.island.env) as web:
        own = there._replace(web=web)
        answered: list[str] = []

        def one(n: int) -> None:
            text = f"kill-{n}"
            try:
                if own.sends(text)[0].status_code == 202:
                    answered.append(text)
            except httpx.TransportError:
                pass
            if n == 100:
                web.process.kill()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, range(200)))

    assert len(answered) >= 50
    assert set(answered) <= set(there.texts())
