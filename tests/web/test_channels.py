"""What an API key opens, and what it does not (security-reliability.md T1, T3, T6, C3)."""

import json
import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from models import ApiKey, Hold, Lane
from models.lane import LaneState
from pombal.cli import admin
from pombal.supervisor import until
from tests.factories import Shop, a_shop, a_tenant, rows, seen_by
from tests.web.process import Answer, Web, request
from tests.web.test_health import numbers, scraped
from tests.workers.sending import queue


def a_key(shop: Shop, *scopes: str) -> str:
    _, text = admin.add_key(shop.tenant.id, "a key", scopes or ("channels:manage",))
    return text


def got(web: Web, key: str, path: str = "/api/v1/channels", *fields: tuple[str, str]) -> Answer:
    return web.ask(request("GET", path, ("Authorization", f"Bearer {key}"), *fields))


def content(answer: Answer) -> Any:
    return json.loads(answer.body)


def without_marks(answer: Answer) -> tuple[int, dict[str, Any]]:
    error = content(answer)["error"]
    return answer.status, {k: v for k, v in error.items() if k not in ("request_id", "timestamp")}


def test_a_key_lists_its_tenants_channels(web: Web) -> None:
    shop = a_shop()
    second = a_shop(shop.tenant)
    a_shop()

    answer = got(web, a_key(shop))

    assert answer.status == 200
    assert [row["id"] for row in content(answer)["data"]] == [str(shop.channel.id), str(second.channel.id)]


def test_a_key_shows_one_channel(web: Web) -> None:
    shop = a_shop()

    row = content(got(web, a_key(shop), f"/api/v1/channels/{shop.channel.id}"))

    assert (row["kind"], row["name"], row["phone_number_id"]) == (
        "meta",
        shop.channel.name,
        shop.number.phone_number_id,
    )


def test_secrets_are_never_shown(web: Web) -> None:
    shop = a_shop(access_token="EAAG-access-token", old_app_secret="the-old-secret")
    bare = a_shop(shop.tenant)
    key = a_key(shop)

    answers = [got(web, key), got(web, key, f"/api/v1/channels/{shop.channel.id}")]

    for answer in answers:
        for secret in (shop.app_secret, shop.verify_token, "EAAG-access-token", "the-old-secret", "sealed", key):
            assert secret not in answer.body.decode()
    shown = {row["id"]: row["has_secrets"] for row in content(answers[0])["data"]}
    assert shown == {str(shop.channel.id): True, str(bare.channel.id): False}


def test_a_tenant_without_channels_has_an_empty_list(web: Web) -> None:
    _, key = admin.add_key(a_tenant().id, "a key")

    assert content(got(web, key)) == {"data": []}


@pytest.mark.parametrize("scope", ["messages:send", "messages:read", "sip:manage"])
def test_a_key_without_the_scope_is_forbidden(web: Web, shop: Shop, scope: str) -> None:
    for path in ("/api/v1/channels", f"/api/v1/channels/{shop.channel.id}"):
        answer = got(web, a_key(shop, scope), path)
        assert (answer.status, answer.code) == (403, "FORBIDDEN")


def test_the_admin_scope_opens_all_of_its_own_tenant_and_nothing_else(web: Web, shop: Shop) -> None:
    other = a_shop()
    key = a_key(shop, "admin")

    assert got(web, key, f"/api/v1/channels/{shop.channel.id}").status == 200
    assert got(web, key, f"/api/v1/channels/{other.channel.id}").status == 404


def test_a_foreign_channel_looks_like_a_missing_one(web: Web, shop: Shop) -> None:
    foreign, key = a_shop(), a_key(shop)

    known = without_marks(got(web, key, f"/api/v1/channels/{uuid.uuid4()}"))

    assert known[0] == 404
    for id_ in (str(foreign.channel.id), foreign.channel.id.hex, str(foreign.tenant.id), "7", "x" * 300, "%00", "'--"):
        assert without_marks(got(web, key, f"/api/v1/channels/{id_}")) == known, id_


def test_the_tenant_comes_from_the_key_alone(web: Web, shop: Shop) -> None:
    foreign = a_shop()
    fields = [
        ("X-Tenant-Slug", foreign.tenant.slug),
        ("X-Tenant-Id", str(foreign.tenant.id)),
        ("X-Organization-Id", str(foreign.tenant.id)),
        ("Cookie", f"tenant={foreign.tenant.slug}"),
    ]
    query = f"?tenant={foreign.tenant.slug}&tenant_id={foreign.tenant.id}&channel={foreign.channel.id}"

    answer = got(web, a_key(shop), "/api/v1/channels" + query, *fields)

    assert answer.status == 200
    assert str(foreign.channel.id) not in answer.body.decode()


def test_a_revoked_key_is_refused_at_once(web: Web) -> None:
    shop = a_shop()
    key, text = admin.add_key(shop.tenant.id, "a key")
    assert got(web, text).status == 200

    with seen_by(shop) as s:
        found = s.get_one(ApiKey, (shop.tenant.id, key.id))
        found.revoked_at = found.created_at

    assert got(web, text).status == 401


def test_a_key_remembers_its_last_use(web: Web) -> None:
    shop = a_shop()
    key, text = admin.add_key(shop.tenant.id, "a key")

    assert got(web, text).status == 200

    with seen_by(shop) as s:
        assert s.get_one(ApiKey, (shop.tenant.id, key.id)).last_used_at is not None


def test_another_tenants_name_on_a_key_opens_nothing(web: Web, shop: Shop) -> None:
    """The tenant in a key only says where to look its hash up."""
    victim = a_shop()
    key = a_key(shop)
    forged = key.replace(shop.tenant.id.hex, victim.tenant.id.hex)
    assert forged != key

    assert got(web, forged).status == 401


HOSTILE = {
    "nothing": "",
    "only the scheme": "Bearer",
    "an empty key": "Bearer ",
    "another scheme": "Basic YWRtaW46YWRtaW4=",
    "no such key": "Bearer pombal_" + "0" * 32 + "_x",
    "not hexadecimal": "Bearer pombal_" + "g" * 32 + "_x",
    "another prefix": "Bearer sk_live_123",
    "SQL": "Bearer pombal_' OR '1'='1",
    "not ASCII": "Bearer \xe9\xff\x80",
    "not ASCII in a shape": "Bearer pombal_" + "0" * 32 + "_\xe9",
    "a long one": "Bearer pombal_" + "0" * 32 + "_" + "x" * 50_000,
    "a brace": "Bearer pombal_{" + "0" * 32 + "}",
    "JWT without a signature": "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_key_of_ours_is_refused_alike(web: Web, name: str) -> None:
    known = without_marks(web.ask(request("GET", "/api/v1/channels")))

    answer = web.ask(request("GET", "/api/v1/channels", ("Authorization", HOSTILE[name])))

    assert answer.status == 401
    assert without_marks(answer) == known


def test_nearly_the_right_key_is_refused(web: Web, shop: Shop) -> None:
    key = a_key(shop)

    for near in (key[:-1], key + "x", key.upper(), key.swapcase(), key[7:], key.replace("_", "-")):
        assert got(web, near).status == 401, near.replace(key[45:], "…")
    assert got(web, key).status == 200


def test_the_scheme_is_read_in_any_case(web: Web, shop: Shop) -> None:
    field = ("Authorization", f"bearer  {a_key(shop)} ")

    assert web.ask(request("GET", "/api/v1/channels", field)).status == 200


def test_a_refused_access_leaves_one_line_without_the_key(web: Web, shop: Shop) -> None:
    foreign, key = a_shop(), a_key(shop)
    other = a_key(shop, "sip:manage")

    bad_key = refused_with(web, key + "x", "/api/v1/channels")
    missing_scope = refused_with(web, other, "/api/v1/channels")
    foreign_id = refused_with(web, key, f"/api/v1/channels/{foreign.channel.id}")

    kinds = [line["kind"] for line in (bad_key, missing_scope, foreign_id)]
    assert kinds == ["bad_key", "missing_scope", "unknown_id"]
    assert "tenant_id" not in bad_key
    assert missing_scope["tenant_id"] == foreign_id["tenant_id"] == str(shop.tenant.id)
    assert key not in web.log()
    assert other not in web.log()


def refused_with(web: Web, key: str, path: str) -> dict[str, Any]:
    """The one line about a refused access; asked again while others' refusals use the quota up."""
    found: list[dict[str, Any]] = []

    def is_told() -> bool:
        mark = uuid.uuid4().hex
        got(web, key, path, ("X-Request-ID", mark))
        found[:] = [line for line in web.lines() if line.get("request_id") == mark]
        return bool(found)

    assert until(is_told, time.monotonic() + 10)
    (line,) = found
    assert line["event"] == "access_refused"
    return line


# --------------------------------------------------------------------------------------------------------- sending


def sending(web: Web, shop: Shop) -> Any:
    return content(got(web, a_key(shop), f"/api/v1/channels/{shop.channel.id}"))["sending"]


def hold(shop: Shop, kind: Hold, code: str | None, reason: str) -> None:
    with seen_by(shop) as s:
        Lane.ensure(s, shop.tenant.id, shop.channel.id)
        Lane.set_hold(s, shop.channel.id, kind, code=code, reason=reason)


def test_a_channel_that_never_sent_anything_is_idle(web: Web) -> None:
    shop = a_shop()

    row = content(got(web, a_key(shop), f"/api/v1/channels/{shop.channel.id}"))

    assert row["sending"] == {
        "state": "idle",
        "hold": None,
        "paused_until": None,
        "queued": 0,
        "unknown": 0,
        "oldest_queued_at": None,
    }
    assert row["last_traffic_at"] is None


def test_a_channel_shows_what_waits_to_be_sent(web: Web) -> None:
    shop = a_shop()
    beside = a_shop(shop.tenant)
    later = datetime.now(UTC) + timedelta(hours=1)
    first, *_ = queue(shop, "one", "two")
    queue(shop, "later", not_before=later)
    (lost,) = queue(shop, "lost", to="+5511944440002")
    rows(shop, "UPDATE message SET status = 'unknown' WHERE id = :id RETURNING 1", id=lost)

    key = a_key(shop)
    shown = {row["id"]: row for row in content(got(web, key))["data"]}

    mine = shown[str(shop.channel.id)]
    assert (mine["sending"]["state"], mine["sending"]["queued"], mine["sending"]["unknown"]) == ("due", 2, 1)
    (turn,) = rows(shop, "SELECT turn_at FROM message WHERE id = :id", id=first)
    assert datetime.fromisoformat(mine["sending"]["oldest_queued_at"]) == turn["turn_at"]
    assert mine["last_traffic_at"] is None  # being queued is no traffic
    assert content(got(web, key, f"/api/v1/channels/{shop.channel.id}")) == mine
    rows(shop, "UPDATE message SET status = 'sent', sent_at = :at WHERE id = :id RETURNING 1", id=first, at=later)
    mine = content(got(web, key, f"/api/v1/channels/{shop.channel.id}"))
    assert datetime.fromisoformat(mine["last_traffic_at"]) == later
    assert shown[str(beside.channel.id)]["sending"]["queued"] == 0
    assert shown[str(beside.channel.id)]["last_traffic_at"] is None


def test_a_channel_says_why_it_is_held(web: Web) -> None:
    shop = a_shop()
    hold(shop, Hold.AUTH, "190", "the token is not valid")

    shown = sending(web, shop)

    assert shown["state"] == "held"
    assert (shown["hold"]["kind"], shown["hold"]["code"], shown["hold"]["reason"]) == (
        "auth",
        "190",
        "the token is not valid",
    )
    assert datetime.fromisoformat(shown["hold"]["since"]) < datetime.fromisoformat(shown["hold"]["next_probe_at"])


def test_what_an_operator_holds_is_not_probed(web: Web) -> None:
    shop = a_shop()
    hold(shop, Hold.OPERATOR, None, "a campaign gone wrong")

    shown = sending(web, shop)["hold"]

    assert (shown["kind"], shown["code"], shown["next_probe_at"]) == ("operator", None, None)


def test_a_channel_says_until_when_it_is_paused(web: Web) -> None:
    shop = a_shop()
    queue(shop, "one")
    rows(shop, "UPDATE lane SET paused_until = now() + interval '1 minute' WHERE tenant_id = :tenant RETURNING 1")

    shown = sending(web, shop)

    assert shown["state"] == "paused"
    assert datetime.fromisoformat(shown["paused_until"]) > datetime.now(UTC)


def test_the_fleets_numbers_tell_how_sending_goes(web: Web) -> None:
    shop, held = a_shop(), a_shop()
    before = numbers(scraped(web))
    hold(held, Hold.PAYMENT, "131042", "no payment method")
    queue(shop, "one", "two")
    queue(shop, "later", not_before=datetime.now(UTC) + timedelta(hours=1))
    (lost,) = queue(shop, "lost", to="+5511944440002")
    rows(
        shop,
        "UPDATE message SET status = 'unknown', turn_at = now() - interval '1 hour' WHERE id = :id RETURNING 1",
        id=lost,
    )

    after = numbers(scraped(web))

    def more(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after[key] - before[key]

    assert more("pombal_pending", queue="outgoing_message") == 2
    assert more("pombal_scheduled") == 1
    assert more("pombal_unknown_messages") == 1
    assert more("pombal_lanes", state="held") == more("pombal_lanes_held", hold="payment") == 1
    assert more("pombal_lanes", state="due") == 1
    assert {dict(labels)["state"] for name, labels in after if name == "pombal_lanes"} == set(LaneState)
    assert {dict(labels)["hold"] for name, labels in after if name == "pombal_lanes_held"} == set(Hold)


def test_the_age_of_what_waits_to_be_sent_is_measured(web: Web) -> None:
    shop = a_shop()
    (old,) = queue(shop, "one")
    rows(shop, "UPDATE message SET turn_at = now() - interval '1 day' WHERE id = :id RETURNING 1", id=old)

    found = numbers(scraped(web))[("pombal_oldest_pending_seconds", (("queue", "outgoing_message"),))]

    assert found >= 86_400
