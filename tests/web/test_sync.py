"""Reports about how channels stand, over the API: whose they are, who may ask, and that no route calls a provider."""

import json
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from models import Lease, SyncReport, Tenant
from models.sync_report import LEASE
from pombal import db
from pombal.broker import redis_client
from pombal.cli import admin
from pombal.settings import settings
from tests.factories import a_shop, a_tenant, superuser
from tests.web.process import Answer, Web, request, running
from tests.web.test_health import numbers, scraped
from tests.workers.gateways import Answer as Says
from tests.workers.gateways import a_channel, a_gateway, set_stored
from tests.workers.tools import until
from workers.status_sync import status_sync

PATH = "/api/sync-instance-status"
SECRET = "c" * 16 + "r0n-s3cret-0f-the-operator"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, queues: None) -> Iterator[None]:
    monkeypatch.setenv("MEDIA_ALLOWED_NETWORKS", "127.0.0.0/8")
    settings.cache_clear()
    with superuser() as connection:
        connection.execute("UPDATE channel SET kind = 'stub' WHERE kind IN ('megaapi', 'baileys')")
        connection.execute("UPDATE channel SET silent_since = NULL WHERE silent_since IS NOT NULL")
        for table in ("sync_report", "lease"):
            connection.execute(f"DELETE FROM {table}")  # noqa: S608 - ours
    yield
    monkeypatch.undo()
    settings.cache_clear()


def a_key(tenant: Tenant, *scopes: str) -> str:
    _, text = admin.add_key(tenant.id, "a key", scopes or ("channels:manage",))
    return text


def asked(web: Web, key: str, method: str = "GET", path: str = PATH) -> Answer:
    return web.ask(request(method, path, ("Authorization", f"Bearer {key}")))


def content(answer: Answer) -> Any:
    return json.loads(answer.body)


def open_reports() -> list[UUID]:
    with superuser() as connection:
        return [id_ for (id_,) in connection.execute("SELECT id FROM sync_report WHERE state = 'pending'").fetchall()]


def answered(web: Web, key: str, method: str, path: str = PATH) -> Answer:
    """The answer to a request, with a worker at work: its job runs here, once the route has asked for it."""
    with ThreadPoolExecutor(1) as pool:
        running_ = pool.submit(asked, web, key, method, path)
        (id_,) = until(open_reports, "the report that the route asks for")
        status_sync(str(id_))
        return running_.result()


def test_what_differs_is_reported_and_only_a_post_writes_it_down(web: Web) -> None:
    tenant, other = a_tenant(), a_tenant()
    key = a_key(tenant)
    with a_gateway() as gateway:
        same, gone, odd = (a_channel(gateway, tenant) for _ in range(3))
        a_channel(gateway, other)
        for channel in (same, gone, odd):
            set_stored(channel, status="connected", status_raw="connected")
        gateway.says |= {gone.name: "disconnected", odd.name: Says(404, b'{"message":"Instance not found"}')}

        looked = answered(web, key, "GET")
        before = content(asked(web, key, path=f"/api/v1/channels/{gone.id}"))
        applied = answered(web, key, "POST")
        after = content(asked(web, key, path=f"/api/v1/channels/{gone.id}"))

    assert (looked.status, applied.status) == (200, 200)
    for answer in (looked, applied):
        report = content(answer)
        (differs,) = report["differs"]
        assert datetime.fromisoformat(differs.pop("at")).tzinfo is not None
        assert differs == {
            "channel": str(gone.id),
            "name": gone.name,
            "instance": gone.name,
            "stored": "connected",
            "provider": "disconnected",
            "raw": "disconnected",
        }
        assert report["checked"] == 3
        assert report["unknown"] == [{"channel": str(odd.id), "name": odd.name, "reason": "not_found"}]
    assert content(looked)["changed"] == []
    changed = {one["channel"]: (one["from"], one["to"]) for one in content(applied)["changed"]}
    assert changed == {str(gone.id): ("connected", "disconnected"), str(odd.id): ("connected", "unknown")}
    assert (before["status"], after["status"]) == ("connected", "disconnected")


def test_a_sync_that_takes_longer_is_read_later(web: Web) -> None:
    tenant, other = a_tenant(), a_tenant()
    key = a_key(tenant)

    answer = asked(web, key, "POST")  # nobody works

    assert answer.status == 202
    shown = content(answer)
    assert shown["state"] == "pending"
    path = f"{PATH}/{shown['report_id']}"
    with db.session() as s:  # and who began could not end it
        SyncReport.begin(s, UUID(shown["report_id"]))
        SyncReport.put_back(s, UUID(shown["report_id"]), {"changed": [], "differs": []})
    assert content(asked(web, key, path=path))["result"] is None
    status_sync(shown["report_id"])
    later = content(asked(web, key, path=path))
    assert (later["state"], later["applies"], later["error"]) == ("done", True, None)
    assert later["result"] == {"checked": 0, "differs": [], "unknown": [], "changed": []}
    assert later["finished_at"] is not None
    for foreign in (asked(web, a_key(other), path=path), asked(web, key, path=f"{PATH}/{uuid.uuid4()}")):
        assert (foreign.status, foreign.code) == (404, "NOT_FOUND")
    assert asked(web, key, path=f"{PATH}/x").status == 404


def test_who_asks_meanwhile_gets_the_same_report_and_others_their_own(web: Web) -> None:
    tenant, other = a_tenant(), a_tenant()
    calls = [(a_key(tenant), "POST"), (a_key(tenant), "POST"), (a_key(tenant), "GET"), (a_key(other), "POST")]

    with ThreadPoolExecutor(len(calls)) as pool:
        one, again, dry, theirs = [content(a) for a in pool.map(lambda call: asked(web, *call), calls)]

    assert one["report_id"] == again["report_id"]
    reports = sorted(one["report_id"] for one in (one, dry, theirs))
    assert len(set(reports)) == 3
    with redis_client() as client:  # one job for each, however many ask
        bodies: Any = client.hvals("dramatiq:status_sync.msgs")
    assert sorted(json.loads(body)["args"][0] for body in bodies) == reports


def test_a_failed_sync_says_so(web: Web) -> None:
    key = a_key(a_tenant())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(asked, web, key, "POST")
        (id_,) = until(open_reports, "the report that the route asks for")
        with superuser() as connection:
            connection.execute("UPDATE sync_report SET state = 'failed', error = 'a bug' WHERE id = %s", [id_])
        answer = waiting.result()

    assert (answer.status, answer.code) == (503, "UNAVAILABLE")
    assert content(answer)["error"]["details"] == {"report_id": str(id_)}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_it_takes_a_key_that_may_manage_channels(web: Web, method: str) -> None:
    assert asked(web, a_key(a_tenant(), "messages:send"), method).status == 403
    assert asked(web, "x", method).status == 401
    assert open_reports() == []


# ---------------------------------------------------------------------------------------------------------------- cron


def test_an_outside_cron_needs_the_secret(tmp_path: Path) -> None:
    path = "/api/cron/sync-status"
    with running(tmp_path / "web.log", {"CRON_SECRET": SECRET, "REDIS_URL": os.environ["REDIS_URL"]}) as web:
        web.wait()
        wrong = [asked(web, given, path=path) for given in ("x", SECRET[:-1], SECRET + "x", a_key(a_tenant(), "admin"))]
        wrong.append(web.ask(request("GET", path)))
        wrong.append(web.ask(request("GET", path, ("Authorization", f"Basic {SECRET}"))))
        wrong.append(web.ask(request("GET", f"{path}?secret={SECRET}&token={SECRET}")))
        assert {(one.status, one.code) for one in wrong} == {(401, "UNAUTHORIZED")}
        assert open_reports() == []
        with a_gateway() as gateway:
            ours, theirs = a_channel(gateway), a_channel(gateway)
            right = [answered(web, SECRET, method, path) for method in ("GET", "POST")]

        assert [one.status for one in right] == [200, 200]
        first, second = (content(one) for one in right)
        report_id = first.pop("report_id")
        assert first == {"state": "done", "checked": 2, "differs": 2, "unknown": 0, "changed": 2}
        assert second["differs"] == 0
        assert str(ours.id) not in str(right)
        # A report of the fleet is nobody's.
        assert asked(web, a_key(a_tenant()), path=f"{PATH}/{report_id}").status == 404
        assert SECRET not in web.log()
        assert str(theirs.id) not in web.log()


def test_without_a_secret_the_cron_route_is_closed(web: Web) -> None:
    for given in ("", "x", "None"):
        answer = asked(web, given, path="/api/cron/sync-status")
        assert (answer.status, answer.code) == (503, "UNAVAILABLE")
    assert open_reports() == []


# ------------------------------------------------------------------------------------------------------ what is shown


def shown(web: Web, key: str) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in content(asked(web, key, path="/api/v1/channels"))["data"]}


def test_a_channel_shows_how_its_session_stands(web: Web) -> None:
    shop = a_shop()
    tenant = shop.tenant
    on, lost, off, new = (a_channel("https://gateway.example", tenant) for _ in range(4))
    early, late, synced = (datetime(2026, 11, day, tzinfo=UTC) for day in (1, 2, 3))
    known = {"status_at": early, "status_since": early, "own_id": "5511955550200"}
    set_stored(on, status="connected", status_raw="connected", silent_since=late, **known)
    set_stored(lost, status="connected", unknown_since=late, unknown_reason="timeout", **known)
    set_stored(off, status="disconnected", status_raw="disconnected", **known)
    with db.session() as s:
        s.add(Lease(name=LEASE, token=uuid.uuid4(), until=early, done_at=synced))

    rows = shown(web, a_key(tenant))

    def of(id_: Any, *fields: str) -> list[Any]:
        return [rows[str(id_)][name] for name in fields]

    fields = ("status", "status_raw", "status_since", "status_checked_at", "unknown", "silent_since", "last_seen_at")
    at = {name: moment.isoformat() for name, moment in (("early", early), ("late", late), ("synced", synced))}
    assert of(on.id, *fields) == [
        "connected", "connected", at["early"], at["synced"], None, at["late"], at["synced"]
    ]  # fmt: skip
    assert of(lost.id, *fields) == [
        "connected", None, at["early"], None, {"since": at["late"], "reason": "timeout"}, None, at["late"]
    ]  # fmt: skip
    assert of(off.id, "status", "status_checked_at", "last_seen_at") == ["disconnected", at["synced"], at["early"]]
    assert of(new.id, *fields) == ["unknown", None, None, None, None, None, None]
    assert of(shop.channel.id, *fields) == [None] * 7


def test_a_poll_that_was_overtaken_does_not_count_as_a_look(web: Web) -> None:
    """The provider told something while a round ran: what that round asked may have been before it."""
    tenant = a_tenant()
    at, told, synced = (datetime(2026, 11, 3, 12, minute, tzinfo=UTC) for minute in (0, 4, 5))
    overtaken, told_before = (a_channel("https://gateway.example", tenant) for _ in range(2))
    for channel, moment in ((overtaken, told.replace(second=30)), (told_before, told.replace(minute=2))):
        set_stored(channel, status="connected", status_at=at, status_since=at, told_at=moment)
    with db.session() as s:
        s.add(Lease(name=LEASE, token=uuid.uuid4(), until=at, done_at=synced))

    rows = shown(web, a_key(tenant))

    checked = [rows[str(channel.id)]["status_checked_at"] for channel in (overtaken, told_before)]
    assert checked == [at.isoformat(), synced.isoformat()]


def test_the_age_of_the_last_round_counts_from_the_first_channel_until_there_was_one(web: Web) -> None:
    assert ("pombal_sync_age_seconds", ()) not in numbers(scraped(web))
    set_stored(a_channel("https://gateway.example"), created_at=datetime.now(UTC) - timedelta(days=3))

    assert numbers(scraped(web))["pombal_sync_age_seconds", ()] > 2 * 24 * 3600


def test_the_fleets_numbers_say_how_channels_stand(web: Web) -> None:
    for words in ({"status": "connected"}, {"status": "connected", "unknown_since": datetime.now(UTC)}, {}):
        set_stored(a_channel("https://gateway.example"), **words)
    with db.session() as s:
        s.add(Lease(name=LEASE, token=uuid.uuid4(), until=datetime.now(UTC), done_at=datetime.now(UTC)))

    found = numbers(scraped(web))

    def channels(status: str) -> float:
        return found["pombal_channels", (("provider", "megaapi"), ("status", status))]

    assert [channels(status) for status in ("connected", "disconnected", "unknown")] == [1, 0, 2]
    assert found["pombal_channels_silent", ()] == 0
    assert 0 <= found["pombal_sync_age_seconds", ()] < 3600
