"""SIP accounts over the API: who sees which, what a controller may tell, where a call belongs (contract: api/sip)."""

import json
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from urllib.parse import quote
from uuid import UUID

import pytest

from models import SipRegistration, Tenant
from pombal import db
from pombal.cli import admin
from pombal.supervisor import until
from tests.factories import a_tenant, all_of, seen_by, superuser
from tests.web.process import Answer, Web, request, running
from tests.web.test_health import numbers, scraped

PATH = "/api/sip/provider-registration"
FLEETS = "f" * 16 + "l33ts-0wn-k3y-f0r-drachtio"
PASSWORD = "a-s3cret-0f-the-account"
USER = "5511944449876"
ERROR = "503 from the carrier that nobody may log"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """A web process with a key of the fleet's."""
    with running(tmp_path_factory.mktemp("web") / "web.log", {"API_KEY": FLEETS}) as web:
        yield web


class Account(NamedTuple):
    tenant: Tenant
    id: UUID
    contact: str

    @property
    def path(self) -> str:
        return f"{PATH}/{self.id}"


def an_account(tenant: Tenant | None = None, **given: Any) -> Account:
    tenant = tenant or a_tenant()
    values = {"name": f"a{uuid.uuid4().hex[:8]}", "host": "registrar.example", **given}
    with db.session([tenant.id]) as s:
        row = SipRegistration.make(tenant.id, username=USER, password=PASSWORD, **values)
        s.add(row)
        s.flush()
        return Account(tenant, row.id, row.contact_token)


def set_to(account: Account, **values: Any) -> None:
    sets = ", ".join(f"{name} = %s" for name in values)
    with superuser() as connection:
        connection.execute(
            f"UPDATE sip_registration SET {sets} WHERE id = %s",  # noqa: S608 - ours
            [*values.values(), account.id],
        )


def a_key(tenant: Tenant, *scopes: str) -> str:
    _, text = admin.add_key(tenant.id, "a key", scopes or ("sip:manage",))
    return text


def got(web: Web, path: str, *fields: tuple[str, str]) -> Answer:
    return web.ask(request("GET", path, *fields))


def with_key(key: str) -> tuple[str, str]:
    return ("x-api-key", key)


def told(web: Web, account: Account, key: str, body: Any) -> Answer:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return web.ask(request("PATCH", account.path, with_key(key), ("Content-Length", str(len(raw))), body=raw))


def content(answer: Answer) -> Any:
    return json.loads(answer.body)


def without_marks(answer: Answer) -> tuple[int, dict[str, Any]]:
    error = content(answer)["error"]
    return answer.status, {k: v for k, v in error.items() if k not in ("request_id", "timestamp")}


def events(account: Account) -> list[tuple[str, dict[str, Any]]]:
    with seen_by(account.tenant) as s:
        found = all_of(s, "SELECT type, payload FROM event ORDER BY id")
    return [(row["type"], row["payload"]) for row in found if row["payload"].get("account") == str(account.id)]


def ago(**length: float) -> str:
    """A time as a Node program writes it."""
    return (datetime.now(UTC) - timedelta(**length)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --------------------------------------------------------------------------------------------------------------- shown


def test_a_new_account_is_pending_and_due(web: Web) -> None:
    account = an_account(name="carrier", target="sip:calls@livekit.example")

    shown = content(got(web, account.path, with_key(a_key(account.tenant))))

    for name in ("nextRefreshAt", "unregisteredSince", "updatedAt"):
        at = shown.pop(name)
        assert at.endswith("Z"), name
        assert abs(datetime.now(UTC) - datetime.fromisoformat(at)) < timedelta(minutes=1), name
    assert shown == {
        "id": str(account.id),
        "name": "carrier",
        "host": "registrar.example",
        "registerStatus": "pending",
        "registerError": None,
        "lastRegisterAt": None,
        "expires": None,
        "granted": None,
        "tenant": account.tenant.slug,
        "sender": "auto",
        "isEnabled": True,
        "failures": 0,
        "lastOutcome": None,
        "lastStatusCode": None,
        "contact": account.contact,
        "history": [],
    }


def test_a_list_is_by_name_and_holds_no_secret(web: Web) -> None:
    second, first = an_account(name="b"), None
    first = an_account(second.tenant, name="a")
    an_account()
    removed = an_account(second.tenant, name="c")
    with db.session([second.tenant.id]) as s:
        SipRegistration.remove(s, second.tenant.id, removed.id)
    key = a_key(second.tenant)

    answer = got(web, PATH, with_key(key))

    assert [row["id"] for row in content(answer)["data"]] == [str(first.id), str(second.id)]
    whole = answer.body + got(web, first.path, with_key(key)).body
    for secret in (PASSWORD, USER, "sealed", "call_id", key):
        assert secret not in whole.decode()
    assert first.contact not in answer.body.decode()
    assert got(web, removed.path, with_key(key)).status == 404
    assert content(got(web, PATH, with_key(a_key(a_tenant())))) == {"data": []}


def test_what_has_expired_reads_failed_before_anybody_wrote_it_down(web: Web) -> None:
    account = an_account()
    key = a_key(account.tenant)
    now = datetime.now(UTC)
    entry: dict[str, Any] = {
        "at": (now - timedelta(seconds=9)).isoformat(),
        "outcome": "registered",
        "seconds": 0.2,
        "code": 200,
    }
    set_to(
        account,
        register_status="registered",
        expires_at=now + timedelta(minutes=4),
        granted=300,
        last_register_at=now - timedelta(minutes=1),
        history=json.dumps([entry]),
    )
    alive = content(got(web, account.path, with_key(key)))
    set_to(account, expires_at=now - timedelta(milliseconds=1))
    dead = content(got(web, account.path, with_key(key)))

    assert (alive["registerStatus"], alive["granted"], dead["registerStatus"]) == ("registered", 300, "failed")
    assert alive["expires"] > alive["lastRegisterAt"]
    assert alive["history"] == [{**entry, "at": entry["at"][:23] + "Z"}]
    assert content(got(web, PATH, with_key(key)))["data"][0]["registerStatus"] == "failed"


# ------------------------------------------------------------------------------------------------------------ who asks


def test_a_key_opens_in_either_header_and_two_keys_open_nothing(web: Web) -> None:
    account = an_account()
    key, other = a_key(account.tenant), a_key(account.tenant)
    bearer = ("Authorization", f"Bearer {key}")

    assert got(web, PATH, with_key(key)).status == 200
    assert got(web, PATH, bearer).status == 200
    assert got(web, PATH, bearer, with_key(key)).status == 200
    assert got(web, PATH, with_key(key), ("Authorization", "Basic eDp5")).status == 200  # a proxy's
    for fields in (
        (),
        (with_key(""),),
        (with_key("x"),),
        (with_key(key[:-1]),),
        (with_key(FLEETS),),  # this process has none
        (with_key(other), bearer),
        (with_key(key), with_key(other)),
        (("Authorization", key),),
        (with_key("\xe9" * 300),),
    ):
        for path in (PATH, account.path, f"/api/sip/dispatch?contact={account.contact}"):
            answer = got(web, path, *fields)
            assert (answer.status, answer.code) == (401, "UNAUTHORIZED"), fields
    assert got(web, f"{PATH}?api_key={key}&token={key}").status == 401


@pytest.mark.parametrize("scope", ["messages:send", "messages:read", "channels:manage"])
def test_other_scopes_open_nothing(web: Web, scope: str) -> None:
    account = an_account()
    key = a_key(account.tenant, scope)

    answers = [got(web, path, with_key(key)) for path in (PATH, account.path, "/api/sip/dispatch?contact=x")]
    answers.append(told(web, account, key, {"registerStatus": "registered"}))

    assert {(answer.status, answer.code) for answer in answers} == {(403, "FORBIDDEN")}


def test_a_foreign_account_is_as_missing_as_none_and_counted(web: Web) -> None:
    account, missing = an_account(), Account(a_tenant(), uuid.uuid4(), "p" + "0" * 20)
    key = a_key(a_tenant())
    refused = ("pombal_security_events_total", (("kind", "unknown_id"),))
    before = numbers(scraped(web)).get(refused, 0)

    foreign = [
        (
            without_marks(got(web, one.path, with_key(key))),
            without_marks(told(web, one, key, {"registerStatus": "failed"})),
            without_marks(got(web, f"/api/sip/dispatch?contact={one.contact}", with_key(key))),
        )
        for one in (account, missing)
    ]

    assert foreign[0] == foreign[1]
    assert {status for status, _ in foreign[0]} == {404}
    for odd in ("x", "%00", "../channels", f"{account.id}x", "1" * 3_000):
        assert got(web, f"{PATH}/{odd}", with_key(key)).status == 404, odd
    assert events(account) == []
    assert until(lambda: numbers(scraped(web)).get(refused, 0) >= before + 6, time.monotonic() + 30)


def test_the_fleets_key_sees_all_tenants_and_nothing_like_it_does(fleet: Web) -> None:
    one, other = an_account(), an_account()

    shown = {row["id"]: row["tenant"] for row in content(got(fleet, PATH, with_key(FLEETS)))["data"]}
    assert {str(one.id): one.tenant.slug, str(other.id): other.tenant.slug}.items() <= shown.items()
    assert got(fleet, other.path, ("Authorization", f"Bearer {FLEETS}")).status == 200
    assert content(told(fleet, other, FLEETS, {"registerStatus": "registered"}))["registerStatus"] == "registered"
    assert got(fleet, f"/api/sip/dispatch?contact={one.contact}", with_key(FLEETS)).status == 200
    assert got(fleet, f"{PATH}/{uuid.uuid4()}", with_key(FLEETS)).status == 404
    assert len(content(got(fleet, PATH, with_key(a_key(one.tenant))))["data"]) == 1
    for wrong in (FLEETS[:-1], FLEETS + "x", FLEETS.upper()):
        assert got(fleet, PATH, with_key(wrong)).status == 401
    assert got(fleet, "/api/v1/channels", ("Authorization", f"Bearer {FLEETS}")).status == 401  # it is for SIP alone


# ---------------------------------------------------------------------------------------------------------------- told


def test_a_controller_tells_and_the_account_is_its_own_from_then_on(web: Web) -> None:
    account = an_account()
    key = a_key(account.tenant)
    at = ago(seconds=2)
    body = {"registerStatus": "registered", "registerError": None, "lastRegisterAt": at}

    first = told(web, account, key, body)
    again = told(web, account, key, body)

    assert (first.status, again.status) == (200, 200)
    shown = content(again)
    assert shown["lastRegisterAt"] == at
    state = ("registerStatus", "registerError", "nextRefreshAt", "expires", "sender", "unregisteredSince")
    assert [shown[name] for name in state] == ["registered", None, None, None, "external", None]
    name = content(got(web, account.path, with_key(key)))["name"]
    assert events(account) == [("sip_registered", {"account": str(account.id), "name": name, "status": "registered"})]


def test_what_is_left_out_stays_and_an_error_ends_with_a_success(web: Web) -> None:
    account = an_account()
    key = a_key(account.tenant)
    at, until_ = ago(minutes=1), ago(minutes=-5)

    failed = content(told(web, account, key, {"registerStatus": "failed", "registerError": ERROR}))
    kept = content(told(web, account, key, {"registerStatus": "failed", "lastRegisterAt": at}))
    bound = content(told(web, account, key, {"registerStatus": "registered", "expires": until_}))
    late = content(told(web, account, key, {"registerStatus": "registered", "registerError": ERROR}))
    ended = content(told(web, account, key, {"registerStatus": "pending", "registerError": None}))

    assert (failed["registerStatus"], failed["registerError"]) == ("failed", ERROR)
    assert (kept["registerError"], kept["lastRegisterAt"]) == (ERROR, at)
    assert (bound["registerError"], bound["lastRegisterAt"], bound["expires"]) == (None, at, until_)
    assert (late["registerStatus"], late["registerError"], late["expires"]) == ("registered", ERROR, None)
    assert (ended["registerStatus"], ended["registerError"]) == ("pending", None)
    assert [kind for kind, _ in events(account)] == ["sip_failed", "sip_registered", "sip_unregistered"]
    assert ERROR not in str(events(account)) + web.log()
    lines = [line for line in web.lines() if line.get("account_id") == str(account.id)]
    assert {line["event"] for line in lines} == {"sip_told"}
    assert [line["status"] for line in lines] == ["failed", "failed", "registered", "registered", "pending"]


def test_a_controller_that_died_is_noticed_and_says_so_itself_later(web: Web) -> None:
    account = an_account()
    key = a_key(account.tenant)
    told(web, account, key, {"registerStatus": "registered", "expires": ago(minutes=-1)})
    set_to(account, expires_at=datetime.now(UTC) - timedelta(seconds=1))

    assert content(got(web, account.path, with_key(key)))["registerStatus"] == "failed"
    told(web, account, key, {"registerStatus": "failed"})  # before the sweep has noted that it expired

    assert [kind for kind, _ in events(account)] == ["sip_registered", "sip_failed"]


def test_a_lapse_that_nobody_had_noted_is_told_before_the_registration_that_ends_it(web: Web) -> None:
    account = an_account()
    key = a_key(account.tenant)
    told(web, account, key, {"registerStatus": "registered", "registerError": ERROR, "expires": ago(minutes=-1)})
    before = numbers(scraped(web)).get(("pombal_sip_lapses_total", ()), 0.0)
    set_to(account, expires_at=datetime.now(UTC) - timedelta(minutes=10))

    shown = content(told(web, account, key, {"registerStatus": "registered", "expires": ago(minutes=-1)}))

    assert (shown["registerStatus"], shown["unregisteredSince"]) == ("registered", None)
    assert [kind for kind, _ in events(account)] == ["sip_registered", "sip_failed", "sip_registered"]
    lines = [line for line in web.lines() if line.get("account_id") == str(account.id)]
    (line,) = [line for line in lines if line["event"] == "sip_lapsed"]
    assert 600 <= line["seconds"] < 720
    assert ERROR not in str(events(account)) + web.log()
    lapses = ("pombal_sip_lapses_total", ())
    assert until(lambda: numbers(scraped(web)).get(lapses, 0) >= before + 1, time.monotonic() + 30)


def test_a_registration_that_is_told_after_it_expired_is_no_news_of_one(web: Web) -> None:
    account = an_account()
    key = a_key(account.tenant)

    answer = told(web, account, key, {"registerStatus": "registered", "expires": ago(minutes=1)})

    assert content(answer)["registerStatus"] == "failed"
    assert events(account) == []


def test_an_account_that_is_being_unregistered_is_no_controllers_until_that_is_over(web: Web) -> None:
    account = an_account()
    key = a_key(account.tenant)
    with db.session([account.tenant.id]) as s:
        SipRegistration.disable(s, account.tenant.id, account.id)

    assert told(web, account, key, {"registerStatus": "registered"}).status == 409
    set_to(account, next_refresh_at=None)
    assert told(web, account, key, {"registerStatus": "registered"}).status == 200


def test_of_many_who_tell_the_same_at_once_one_makes_the_event(web: Web) -> None:
    account = an_account()
    key = a_key(account.tenant)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: told(web, account, key, {"registerStatus": "registered"}), range(16)))

    assert {answer.status for answer in answers} == {200}
    assert [kind for kind, _ in events(account)] == ["sip_registered"]


REGISTERED = b'{"registerStatus": "registered"'


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"\xff\xfe{}", 400, None),
        (b"\xef\xbb\xbf" + REGISTERED + b"}", 400, None),
        (b"[" * 8_000, 400, None),
        (REGISTERED + b', "x": ' + b"[" * 3_500 + b"]" * 3_500 + b"}", (400, 422), None),
        (REGISTERED + b', "registerError": "\\ud800"}', 400, None),
        (b" " * 8_193, 413, None),
        (b"null", 422, "$"),
        (b"[]", 422, "$"),
        (b"{}", 422, "$.registerStatus"),
        (b'{"registerStatus": "Registered"}', 422, "$.registerStatus"),
        (b'{"registerStatus": null}', 422, "$.registerStatus"),
        (b'{"registerStatus": ["registered"]}', 422, "$.registerStatus"),
        (REGISTERED + b', "registerStatus": "failed"}', 422, "$.registerStatus"),
        (REGISTERED + b', "password": "x"}', 422, "$.password"),
        (REGISTERED + b', "expires": ' + b"9" * 5_000 + b"}", (400, 422), None),
        (REGISTERED + b', "expires": 300}', 422, "$.expires"),
        (REGISTERED + b', "lastRegisterAt": {}}', 422, "$.lastRegisterAt"),
        (REGISTERED + b', "lastRegisterAt": 1788000000}', 422, "$.lastRegisterAt"),
        (REGISTERED + b', "lastRegisterAt": "2026-01-02T03:04:05"}', 422, "$.lastRegisterAt"),
        (REGISTERED + b', "lastRegisterAt": "yesterday"}', 422, "$.lastRegisterAt"),
        (REGISTERED + b', "lastRegisterAt": "0001-01-01T00:00:00+14:00"}', 422, "$.lastRegisterAt"),
        (REGISTERED + b', "lastRegisterAt": "9999-12-31T23:59:59-14:00"}', 422, "$.lastRegisterAt"),
        (REGISTERED + b', "lastRegisterAt": "IN 7 MINUTES"}', 422, "$.lastRegisterAt"),
        (REGISTERED + b', "expires": "IN 31 DAYS"}', 422, "$.expires"),
        (REGISTERED + b', "registerError": 5}', 422, "$.registerError"),
        (REGISTERED + b', "expires": "25 HOURS AGO"}', 422, "$.expires"),
    ],
)
def test_a_hostile_body_changes_nothing(
    web: Web, told_to: tuple[Account, str], body: bytes, status: int | tuple[int, int], field: str | None
) -> None:
    account, key = told_to

    body = body.replace(b"IN 7 MINUTES", ago(minutes=-7).encode()).replace(b"IN 31 DAYS", ago(days=-31).encode())
    body = body.replace(b"25 HOURS AGO", ago(hours=25).encode())
    answer = told(web, account, key, body)

    assert answer.status in (status if isinstance(status, tuple) else (status,)), answer.body
    if field is not None:
        assert content(answer)["error"]["details"]["field"] == field
    shown = content(got(web, account.path, with_key(key)))
    assert (shown["registerStatus"], shown["sender"], shown["registerError"]) == ("pending", "auto", None)


@pytest.fixture(scope="module")
def told_to() -> tuple[Account, str]:
    account = an_account()
    return account, a_key(account.tenant)


def test_an_error_of_500_characters_of_any_language_is_kept(web: Web) -> None:
    account = an_account()
    error = "conexão recusada: " + "失" * 482

    shown = content(told(web, account, a_key(account.tenant), {"registerStatus": "failed", "registerError": error}))

    assert shown["registerError"] == error


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        ("x" * 501, "x" * 500),
        ("a\0b", "a b"),
        ("503 Busy\r\nX: y", "503 Busy  X: y"),
        ("a\x1b[2Jb", "a [2Jb"),
        ("a\u202eb\u2028", "a b "),
    ],
)
def test_an_error_in_a_providers_own_words_is_cleaned_since_the_status_counts(web: Web, error: str, kept: str) -> None:
    account = an_account()

    answer = told(web, account, a_key(account.tenant), {"registerStatus": "failed", "registerError": error})

    assert (answer.status, content(answer)["registerStatus"], content(answer)["registerError"]) == (200, "failed", kept)


def test_an_error_that_is_left_out_stays_with_a_failure_alone(web: Web) -> None:
    account = an_account()
    key = a_key(account.tenant)

    for status, kept in (("failed", ERROR), ("pending", None), ("registered", None)):
        told(web, account, key, {"registerStatus": "failed", "registerError": ERROR})
        assert content(told(web, account, key, {"registerStatus": status}))["registerError"] == kept, status


def test_while_the_database_does_not_answer_everybody_is_asked_to_come_again(web: Web) -> None:
    account = an_account()
    key = a_key(account.tenant)
    paths = (PATH, account.path, f"/api/sip/dispatch?contact={account.contact}")

    with superuser() as connection, connection.transaction(), ThreadPoolExecutor(4) as pool:
        connection.execute("LOCK TABLE sip_registration IN ACCESS EXCLUSIVE MODE")
        asked = [pool.submit(got, web, path, with_key(key)) for path in paths]
        asked.append(pool.submit(told, web, account, key, {"registerStatus": "registered"}))
        answers = [one.result() for one in asked]

    assert [(answer.status, answer.code) for answer in answers] == [(503, "UNAVAILABLE")] * 4
    assert {answer.headers["retry-after"] for answer in answers} == {"5"}
    assert told(web, account, key, {"registerStatus": "registered"}).status == 200  # as a controller does then
    assert [kind for kind, _ in events(account)] == ["sip_registered"]


@pytest.mark.parametrize(("method", "path"), [("POST", PATH), ("DELETE", f"{PATH}/x"), ("PATCH", "/api/sip/dispatch")])
def test_other_methods_are_refused(web: Web, method: str, path: str) -> None:
    assert web.ask(request(method, path, ("Content-Length", "0"))).status == 405


# ------------------------------------------------------------------------------------------------------------ dispatch


def dispatched(web: Web, key: str, contact: str) -> Answer:
    return got(web, f"/api/sip/dispatch?contact={quote(contact, safe='')}", with_key(key))


@pytest.mark.parametrize(
    "contact",
    [
        "{}",
        "{};transport=udp",
        "sip:{}@203.0.113.5",
        "SIP:{}@203.0.113.5:5060;transport=udp;ob",
        "sips:{}@sbc.example?Subject=a%20call",
        "sip:{}:word@sbc.example",
        "sip:{};phone-context=x@sbc.example",
        "{}@sbc.example",
        "<sip:{}@[2001:db8::1]:5060>",
        ' "Bia <of> \\"Pombal\\"" <sip:{}@sbc.example;lr>;tag=7f;expires=60 ',
    ],
)
def test_a_call_finds_its_account_by_whatever_names_it(web: Web, contact: str) -> None:
    account = an_account(name="carrier", target="sip:calls@livekit.example")
    key = a_key(account.tenant)

    answer = dispatched(web, key, contact.format(account.contact))

    assert answer.status == 200, answer.body
    assert content(answer) == {
        "account": {"id": str(account.id), "name": "carrier"},
        "tenant": {"id": str(account.tenant.id), "slug": account.tenant.slug},
        "target": "sip:calls@livekit.example",
        "registerStatus": "pending",
        "isEnabled": True,
    }
    escaped = "".join(f"%{ord(sign):02x}" for sign in account.contact)
    assert content(dispatched(web, key, f"sip:{escaped}@sbc.example")) == content(answer)


def test_a_call_to_an_account_that_is_disabled_and_has_no_target_is_named_as_that(web: Web) -> None:
    account = an_account()
    with db.session([account.tenant.id]) as s:
        SipRegistration.disable(s, account.tenant.id, account.id)

    shown = content(dispatched(web, a_key(account.tenant), f"sip:{account.contact}@sbc.example"))

    assert (shown["target"], shown["registerStatus"], shown["isEnabled"]) == (None, "pending", False)


@pytest.mark.parametrize(
    "contact",
    [
        "",
        " ",
        "*",
        "sip:",
        "sip:sbc.example",
        "sip:@sbc.example",
        "<sip:a@sbc.example",
        "<sip:a@sbc.example>, <sip:b@sbc.example>",
        "sip:a@sbc.example,sip:b@sbc.example",
        "a@b@c",
        "tel:+5511944440000",
        "https://a/b",
        "sip:a b@sbc.example",
        "sip:a%00b@sbc.example",
        "sip:a\r\nVia: x@sbc.example",
        "a" * 1_025,
        '"' + "\\" * 1_000,
    ],
)
def test_what_names_no_one_user_is_refused(web: Web, told_to: tuple[Account, str], contact: str) -> None:
    answer = dispatched(web, told_to[1], contact)

    assert answer.status == (404 if contact == "*" else 400), answer.body


def test_one_contact_is_asked_for_at_a_time_and_strangers_calls_are_no_alarm(fleet: Web) -> None:
    account = an_account()

    none = got(fleet, "/api/sip/dispatch", with_key(FLEETS))
    two = got(fleet, f"/api/sip/dispatch?contact={account.contact}&contact=x", with_key(FLEETS))
    stranger = dispatched(fleet, FLEETS, "sip:100@198.51.100.7")

    assert [(one.status, one.code) for one in (none, two)] == [(400, "INVALID_PAYLOAD")] * 2
    assert (stranger.status, stranger.code) == (404, "NOT_FOUND")
    marks = {content(stranger)["error"]["request_id"]}
    assert not [line for line in fleet.lines() if line.get("request_id") in marks and line["event"] == "access_refused"]


# ------------------------------------------------------------------------------------------------------------- numbers


def test_accounts_are_measured_as_they_stand_now(web: Web) -> None:
    def seen() -> dict[str, float]:
        found = numbers(scraped(web))
        return {dict(labels).get("status", name): value for (name, labels), value in found.items() if "_sip_" in name}

    with superuser() as connection:
        connection.execute("DELETE FROM sip_registration")
    empty = seen()
    tenant = a_tenant()
    waiting, bound, lapsed, off = (an_account(tenant) for _ in range(4))
    now = datetime.now(UTC)
    set_to(waiting, next_refresh_at=now - timedelta(seconds=50), report_at=now - timedelta(seconds=70))
    registered = {"register_status": "registered", "next_refresh_at": now + timedelta(hours=1)}
    set_to(bound, expires_at=now + timedelta(hours=2), unregistered_since=None, **registered)
    set_to(lapsed, expires_at=now - timedelta(seconds=90), unregistered_since=None, **registered)
    set_to(off, is_enabled=False, next_refresh_at=None)
    full = seen()

    def counted(found: dict[str, float]) -> dict[str, float]:
        return {name: found[name] for name in ("pending", "registered", "failed", "disabled")}

    assert counted(empty) == {"pending": 0, "registered": 0, "failed": 0, "disabled": 0}
    assert "pombal_sip_next_refresh_seconds" not in empty
    assert (empty["pombal_sip_unregistered_seconds"], empty["pombal_sip_unreported_seconds"]) == (0, 0)
    assert counted(full) == {"pending": 1, "registered": 1, "failed": 1, "disabled": 1}
    assert -180 < full["pombal_sip_next_refresh_seconds"] <= -50
    assert 90 <= full["pombal_sip_unregistered_seconds"] < 220
    assert 70 <= full["pombal_sip_unreported_seconds"] < 200
