"""Rounds over instances: what is written, by whom, and in which order it counts (Y1, Y2, Y3)."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID

import pytest
from dramatiq import Worker
from sqlalchemy import RowMapping, func, select, text
from sqlalchemy.orm import Session

from models import Channel, Hold, Lane, Lease, SessionState, SyncReport, Tenant, WaSession, standing
from models.sync_report import LEASE
from pombal import db, metrics
from pombal.broker import redis_client
from pombal.cli import gateways
from pombal.cli.baileys import BaileysConfig
from pombal.errors import Permanent
from pombal.settings import settings
from tests.factories import a_tenant, superuser
from tests.workers.gateways import (
    HANGS,
    Answer,
    Gate,
    a_channel,
    a_gateway,
    events,
    instance,
    many_channels,
    set_stored,
    stored,
)
from tests.workers.tools import PATIENCE, in_background, until, until_somebody_waits_for_a_lock
from workers import _standing, broker
from workers.channel_session import status_check
from workers.status_sync import Sync, ring_reports, status_sync, status_sync_tick, stop

CHANGES, RESUMED = "channel_status", "channel_resumed"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, queues: None) -> Iterator[None]:
    """Loopback may be asked; nobody else's channels, reports and ticks are in the way."""
    monkeypatch.setenv("MEDIA_ALLOWED_NETWORKS", "127.0.0.0/8")
    settings.cache_clear()
    with superuser() as connection:
        connection.execute("UPDATE channel SET kind = 'stub' WHERE kind IN ('megaapi', 'baileys')")
        for table in ("sync_report", "lease", "tick"):
            connection.execute(f"DELETE FROM {table}")  # noqa: S608 - ours
    yield
    monkeypatch.undo()
    settings.cache_clear()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A poll without an answer is given up soon. For tests in which nobody answers: others might be too slow for it."""
    monkeypatch.setattr("workers._rounds._POLL_SECONDS", 1.0)


@pytest.fixture
def easily_tired(monkeypatch: pytest.MonkeyPatch) -> None:
    """A poll that breaks off says the same of its host as one that was waited for long, and is not made again."""
    monkeypatch.setattr("workers._rounds._WAITED", 0.0)
    monkeypatch.setattr("workers._rounds._NO_SECOND_TRY", 60.0)


def asked_for(tenant: Tenant | None, *, is_dry: bool = False) -> UUID:
    """A report as the web tier leaves it."""
    with db.session() as s:
        id_, _ = SyncReport.open(s, tenant.id if tenant else None, is_dry=is_dry)
    return id_


def report(id_: UUID) -> dict[str, Any]:
    with superuser() as connection:
        found = connection.execute(
            "SELECT state, result, error, tenant_id, is_due FROM sync_report WHERE id = %s", [id_]
        )
        names = [column.name for column in found.description or ()]
        return dict(zip(names, found.fetchone() or (), strict=True))


def synced(tenant: Tenant | None, *, is_dry: bool = False) -> dict[str, Any]:
    """What a round finds that is made now."""
    id_ = asked_for(tenant, is_dry=is_dry)
    status_sync(str(id_))
    made = report(id_)
    assert made["state"] == "done", made
    result: dict[str, Any] = made["result"]
    return result


def versions(tenant: Tenant) -> dict[UUID, int]:
    """Which transaction last wrote each channel's row."""
    with superuser() as connection:
        query = "SELECT id, xmin::text::bigint FROM channel WHERE tenant_id = %s"
        return dict(connection.execute(query, [tenant.id]).fetchall())


def bells(actor: str) -> list[list[Any]]:
    """The arguments of the jobs that wait in the queue, delayed ones too."""
    with redis_client() as client:
        bodies: Any = [
            body
            for queue in ("status_sync", "status_sync.DQ", "channel_session", "channel_session.DQ")
            for body in client.hvals(f"dramatiq:{queue}.msgs")
        ]
    found = [json.loads(body) for body in bodies]
    return [one["args"] for one in found if one["actor_name"] == actor]


def told(channel: Channel) -> None:
    """A webhook came in just now that said something about this channel's session."""
    with superuser() as connection:
        connection.execute("UPDATE channel SET told_at = clock_timestamp() WHERE id = %s", [channel.id])


def set_hold(channel: Channel) -> None:
    """As a send does that met a drop: of the channel itself nothing is known of it yet."""
    with db.session([channel.tenant_id]) as s:
        Lane.ensure(s, channel.tenant_id, channel.id)
        Lane.set_hold(s, channel.id, Hold.DISCONNECTED, code="disconnected", reason="…")


def is_rung_for(channel: Channel) -> bool:
    """Whether a bell of the channel's lane was rung."""
    with redis_client() as client:
        bodies: Any = client.hvals("dramatiq:outgoing_message.msgs")
    return any(str(channel.id).encode() in body for body in bodies)


def counted(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0


def written(capfd: pytest.CaptureFixture[str], event: str, *words: object) -> list[str]:
    """The lines of this name since the last look that have all these words."""
    lines = "".join(capfd.readouterr()).splitlines()
    return [line for line in lines if event in line and all(str(word) in line for word in words)]


def hold(channel: Channel) -> str | None:
    with superuser() as connection:
        row = connection.execute("SELECT hold FROM lane WHERE channel_id = %s", [channel.id]).fetchone()
    return row[0] if row else None


# ------------------------------------------------------------------------------------- unknown is not disconnected (Y1)

HTML = b"<!DOCTYPE html><title>Attention Required! | Cloudflare</title>"
FAULTS: dict[str, tuple[Answer, str, str]] = {
    "HTTP 404": (Answer(404, b'{"error":true,"message":"Instance not found"}'), "not_found", "Instance not found"),
    "HTTP 401": (Answer(401, b'{"name":"UNAUTHORIZED","message":"a wrong token"}'), "refused", "a wrong token"),
    "HTTP 403": (Answer(403, b'{"name":"FORBIDDEN","message":"not yours"}'), "refused", "not yours"),
    "403 of the edge": (Answer(403, HTML, "text/html"), "edge_blocked", "Cloudflare"),
    "HTTP 500": (Answer(500, b'{"error":true,"message":"boom"}'), "provider_error", "boom"),
    "502 of the edge": (Answer(502, b"<html>Bad gateway</html>", "text/html"), "provider_error", "Bad gateway"),
    "HTTP 429": (Answer(429, b'{"message":"slowly"}'), "throttled", "slowly"),
    "200 and an error": (Answer(200, b'{"error":true,"message":"not now"}'), "rejected", "not now"),
    "no JSON": (Answer(200, b"hello"), "unreadable", "hello"),
    "nothing": (Answer(200, b""), "unreadable", ""),
    "an unknown word": (Answer(200, instance("syncing")), "odd_answer", "syncing"),
    "a word in another case": (Answer(200, instance("DISCONNECTED")), "odd_answer", "DISCONNECTED"),
    "no word, but a user": (Answer(200, instance(None)), "odd_answer", ""),
    "no instance": (Answer(200, b'{"error":false}'), "odd_answer", ""),
}


def test_what_says_nothing_leaves_the_status_as_it_was() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channels = {name: a_channel(gateway, tenant) for name in FAULTS}
        good = a_channel(gateway, tenant)
        for name, channel in channels.items():
            gateway.says[channel.name] = FAULTS[name][0]
            set_stored(channel, status="connected", status_raw="connected", status_at=datetime(2026, 1, 1, tzinfo=UTC))

        result = synced(tenant)
        before = versions(tenant)
        synced(tenant)

    found = {name: stored(channel) for name, channel in channels.items()}
    assert {name: row["status"] for name, row in found.items()} == dict.fromkeys(FAULTS, "connected")
    assert {name: row["unknown_reason"] for name, row in found.items()} == {n: FAULTS[n][1] for n in FAULTS}
    assert [name for name, row in found.items() if FAULTS[name][2] not in row["status_raw"]] == []
    assert stored(good)["status"] == "connected"
    assert {one["channel"]: one["reason"] for one in result["unknown"]} == {
        str(channels[name].id): reason for name, (_, reason, _) in FAULTS.items()
    }
    assert [one["channel"] for one in result["differs"]] == [str(good.id)]
    assert versions(tenant) == before  # the same again is no news
    said = [one for one in events(tenant, CHANGES) if one["channel"] != str(good.id)]
    assert {(one["from"], one["to"]) for one in said} == {("connected", "unknown")}
    assert len(said) == len(FAULTS)
    assert all(hold(channel) is None for channel in channels.values())


def test_silence_leaves_the_status_as_it_was(impatient: None) -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        gateway.says[channel.name] = HANGS
        set_stored(channel, status="connected", status_raw="connected", status_at=datetime(2026, 1, 1, tzinfo=UTC))

        (unknown,) = synced(tenant)["unknown"]

    found = stored(channel)
    assert (found["status"], found["unknown_reason"], unknown["reason"]) == ("connected", "timeout", "timeout")
    assert [(one["from"], one["to"]) for one in events(tenant, CHANGES)] == [("connected", "unknown")]
    assert hold(channel) is None


def test_a_host_that_is_not_there_or_not_public_is_unknown() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        gone = a_channel(gateway, tenant)
    private = a_channel("https://10.0.0.7", tenant)
    broken = a_channel(gateway.address, tenant)
    set_stored(broken, sealed=b"not what anybody sealed")

    synced(tenant)

    reasons = [stored(channel)["unknown_reason"] for channel in (gone, private, broken)]
    assert reasons == ["unreachable", "blocked_address", "misconfigured"]


def test_a_failure_that_passes_is_tried_once_more() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        gateway.says[channel.name] = Answer(503, b'{"error":true}')
        gateway.second[channel.name] = "connected"

        synced(tenant)

        assert (gateway.asked[channel.name], stored(channel)["status"]) == (2, "connected")


# --------------------------------------------------------------------------------------------- what follows from news


def test_a_disconnect_holds_the_lane_and_a_recovery_lets_it_go_on() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        assert [one["to"] for one in synced(tenant)["changed"]] == ["connected"]

        gateway.says[channel.name] = "disconnected"
        (change,) = synced(tenant)["changed"]

        assert (change["channel"], change["from"], change["to"]) == (str(channel.id), "connected", "disconnected")
        assert hold(channel) == Hold.DISCONNECTED
        gateway.says[channel.name] = "connected"
        (differs,) = synced(tenant)["differs"]

    assert (differs["stored"], differs["provider"], differs["instance"]) == ("disconnected", "connected", channel.name)
    assert hold(channel) is None
    assert [(one["from"], one["to"]) for one in events(tenant, CHANGES)] == [
        ("unknown", "connected"),
        ("connected", "disconnected"),
        ("disconnected", "connected"),
    ]
    assert len(events(tenant, RESUMED)) == 1
    assert is_rung_for(channel)


def test_each_change_is_counted_and_has_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    def counts() -> dict[str, float]:
        names = [("changes", "status"), ("polls", "outcome")]
        words = ("connected", "disconnected", "unknown", "refused")
        labels = {f"{name} {word}": (name, label, word) for name, label in names for word in words}
        found = {
            key: counted(f"pombal_{'channel_changes' if name == 'changes' else 'status_polls'}_total",
                         **{"provider": "megaapi", label: word})
            for key, (name, label, word) in labels.items()
        }  # fmt: skip
        return found | {"rounds": counted("pombal_sync_round_seconds_count", outcome="done")}

    tenant = a_tenant()
    with a_gateway() as gateway:
        channel, quiet = a_channel(gateway, tenant), a_channel(gateway, tenant)
        synced(tenant)
        before = counts()
        written(capfd, "")
        for says in ("disconnected", Answer(401, b"{}"), "connected"):
            gateway.says[channel.name] = says
            synced(tenant)

    more = {name: count - before[name] for name, count in counts().items() if count != before[name]}
    assert more == {
        "changes disconnected": 1,
        "changes unknown": 1,
        "changes connected": 1,
        "polls disconnected": 1,
        "polls refused": 1,
        "polls connected": 4,
        "rounds": 3,
    }
    lines = written(capfd, "channel_status_changed")
    assert [(str(channel.id) in line, str(tenant.id) in line) for line in lines] == [(True, True)] * 3
    assert [str(quiet.id) in line for line in lines] == [False] * 3
    assert "refused" in lines[1]


def test_an_operators_hold_outlives_a_recovery() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        with db.session([tenant.id]) as s:
            Lane.ensure(s, tenant.id, channel.id)
            Lane.set_hold(s, channel.id, Hold.OPERATOR, code=None, reason="held")
        for word in ("disconnected", "connected"):
            gateway.says[channel.name] = word
            synced(tenant)

    assert (stored(channel)["status"], hold(channel)) == ("connected", Hold.OPERATOR)


def test_a_lane_that_was_held_by_an_old_look_is_let_go_by_the_next_round(capfd: pytest.CaptureFixture[str]) -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        synced(tenant)
        set_hold(channel)

        synced(tenant)

    assert hold(channel) is None
    assert (len(events(tenant, RESUMED)), len(written(capfd, RESUMED, channel.id))) == (1, 1)
    assert is_rung_for(channel)


def test_a_lane_that_a_send_held_is_let_go_by_the_check_that_finds_it_connected(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The session was back before anybody asked: to the channel that is no news, but its messages wait."""
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        synced(tenant)
        set_hold(channel)
        say(channel)

        status_check(str(channel.id))

        assert hold(channel) is None
        assert (len(events(tenant, RESUMED)), len(written(capfd, RESUMED, channel.id))) == (1, 1)
        assert is_rung_for(channel)
        say(channel)
        status_check(str(channel.id))

    assert len(events(tenant, RESUMED)) == 1  # nothing held it any more
    assert [one["to"] for one in events(tenant, CHANGES)] == ["connected"]


def test_a_check_that_finds_nothing_out_lets_no_lane_go() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        synced(tenant)
        set_hold(channel)
        gateway.says[channel.name] = Answer(401, b"{}")
        say(channel)

        status_check(str(channel.id))

    assert (stored(channel)["status"], stored(channel)["unknown_reason"]) == ("connected", "refused")
    assert (hold(channel), events(tenant, RESUMED)) == (Hold.DISCONNECTED, [])


def test_a_recovery_does_not_end_a_pause_that_the_provider_asked_for() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        gateway.says[channel.name] = "disconnected"
        synced(tenant)
        with db.session([tenant.id]) as s:
            Lane.pause(s, code="429", seconds=3600, pace=0.5, channel_id=channel.id)
        gateway.says[channel.name] = "connected"
        synced(tenant)

    with db.session([tenant.id]) as s:
        (row,) = Lane.overview(s, channel.id)
    assert (row["hold"], row["state"], row["pause_code"]) == (None, "paused", "429")


def test_news_of_several_channels_waits_for_whoever_accepts_messages_for_them() -> None:
    """One lane is there and the other is made by whoever comes first: neither waits for the other in a circle."""
    tenant = a_tenant()
    with a_gateway() as gateway:
        first, second = sorted((a_channel(gateway, tenant) for _ in range(2)), key=lambda channel: channel.id)
    set_stored(first, status="disconnected")
    set_stored(second, status="connected")
    with db.session([tenant.id]) as s:
        Lane.ensure(s, tenant.id, first.id)
        Lane.set_hold(s, first.id, Hold.DISCONNECTED, code="disconnected", reason="…")
        now = s.execute(select(func.clock_timestamp())).scalar_one()

    def said(channel: Channel, status: str) -> dict[str, Any]:
        key = {"tenant_id": tenant.id, "id": channel.id, "asked_at": now}
        return key | {"status": status, "raw": status, "reason": None, "own_id": None}

    def write() -> None:
        with db.session([tenant.id]) as s:
            _standing.write(s, [said(first, "connected"), said(second, "disconnected")])

    def expect(s: Session, channel: Channel) -> None:
        Lane.expect(s, [{"tenant_id": tenant.id, "channel_id": channel.id, "due_at": None}])

    with db.session([tenant.id]) as s:
        expect(s, first)
        done = in_background(write)
        until_somebody_waits_for_a_lock()
        expect(s, second)
    done()

    assert (hold(first), hold(second)) == (None, Hold.DISCONNECTED)


def test_a_session_that_says_otherwise_than_its_channel_is_brought_in_line_by_a_round() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        synced(tenant)
        with db.session([tenant.id]) as s:
            s.add(WaSession(tenant_id=tenant.id, channel_id=channel.id, state=SessionState.DISCONNECTED))
        synced(tenant)

    with db.session([tenant.id]) as s:
        assert s.get_one(WaSession, (tenant.id, channel.id)).state == SessionState.READY


TOO_SLOW = (
    """DO $$ BEGIN RAISE EXCEPTION 'canceling statement due to statement timeout' USING ERRCODE = '57014'; END $$"""
)


def test_a_look_for_silence_that_takes_too_long_costs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    tenant = a_tenant()
    monkeypatch.setattr(standing, "_SILENT", text(TOO_SLOW))
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        synced(tenant)
        set_hold(channel)

        assert synced(None)["checked"] == 1

        assert gateway.asked[channel.name] == 2
    assert hold(channel) is None
    with db.session() as s:
        lease = s.get_one(Lease, LEASE)
        assert lease.done_at is not None
        assert Lease.take(s, LEASE, uuid.uuid4(), timedelta(seconds=1))


def test_what_a_due_round_has_waited_counts_from_its_tick_however_late_its_report_was_made() -> None:
    with db.session() as s:
        id_, _ = SyncReport.open(s, None, is_dry=False, is_due=True)
    with superuser() as connection:
        connection.execute(
            """
            UPDATE sync_report SET created_at = date_bin('5 minutes', now(), to_timestamp(0)) - interval '260 s'
            WHERE id = %s
            """,
            [id_],
        )
        found = connection.execute("SELECT extract(epoch FROM now() - created_at)::float8 FROM sync_report").fetchone()
    with db.session() as s:
        row = SyncReport.begin(s, id_)

    assert row is not None
    assert found is not None
    assert row["waited"] - found[0] == pytest.approx(40, abs=10)


@pytest.mark.parametrize("channels", [1, 100, 5_000])
@pytest.mark.parametrize("waited", [0.0, 2.0, 13.0])
def test_a_due_round_is_over_a_minute_after_its_tick(waited: float, channels: int) -> None:
    """13 seconds are far more than it waits for a round that gives way."""
    asked = {"id": uuid.uuid4(), "tenant_id": None, "is_dry": False, "is_due": True, "waited": waited, "result": None}
    sync = Sync(cast(RowMapping, asked), uuid.uuid4())

    seconds, spread = sync._times(channels)

    assert waited + seconds < 60
    assert 0 < spread <= min(45, seconds - 10)


def test_silence_is_told_apart_and_its_end_too() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant, silent_after_hours=1)
        synced(tenant)
        set_stored(channel, status_since=datetime(2026, 1, 1, tzinfo=UTC))
        synced(tenant)
        synced(tenant)
        assert stored(channel)["status"] == "connected"
        set_stored(channel, config=json.dumps(stored(channel)["config"] | {"silent_after_hours": 0}))
        synced(tenant)

    assert [one["channel"] for one in events(tenant, "channel_silent")] == [str(channel.id)]
    assert len(events(tenant, "channel_heard")) == 1
    assert stored(channel)["silent_since"] is None


# ------------------------------------------------------------------------------------------------------- at scale (Y2)


def test_a_hanging_host_holds_nobody_up_and_only_news_is_written(
    easily_tired: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATUS_SYNC_AT_ONCE", "16")
    settings.cache_clear()
    tenant = a_tenant()
    with a_gateway(0.05) as one, a_gateway(0.05) as other, a_gateway() as hanging:
        ids = [many_channels(gateway, tenant, 100) for gateway in (one, other, hanging)]

        def round_() -> dict[str, Any]:
            """A round in which the one host leaves its polls waiting until each of the others has been answered."""
            hanging.usual = gate = Gate()
            so_far = one.answered + other.answered
            done = in_background(lambda: synced(tenant))
            gate.wait_until_asked()
            until(lambda: one.answered + other.answered == so_far + 200, "the answers of the others")
            gate.hang_up()
            result: dict[str, Any] = done()
            return result

        first = round_()
        before = versions(tenant)
        second = round_()
        quiet = versions(tenant)

        rewritten = {id_ for id_, version in quiet.items() if version != before[id_]}
        assert rewritten <= news_of(ids[2], first, second)
        assert (first["checked"], len(first["changed"]), len(second["changed"])) == (300, 200, 0)
        assert {entry["channel"] for entry in first["unknown"]} == {str(id_) for id_ in ids[2]}
        assert {entry["reason"] for entry in first["unknown"]} == {"unreachable", "not_reached"}
        assert 1 < max(one.most_in_flight, other.most_in_flight) <= 16
        assert sum(hanging.asked.values()) <= 2 * (16 + 5)  # given up long before its hundredth
        assert sum(one.asked.values()) == 200

        set_unknown(ids[2])  # of these each round finds out more
        quiet = versions(tenant)
        (name,) = names(ids[0][:1])
        one.says[name] = "disconnected"
        third = round_()

    assert [change["to"] for change in third["changed"]] == ["disconnected"]
    rewritten = {id_ for id_, version in versions(tenant).items() if version != quiet[id_]}
    assert rewritten - set(ids[2]) == {ids[0][0]}


def news_of(ids: list[UUID], first: dict[str, Any], second: dict[str, Any]) -> set[UUID]:
    """Those of which the second round says something else: it had time to ask some that the first had not."""
    reasons = [{UUID(one["channel"]): one["reason"] for one in result["unknown"]} for result in (first, second)]
    return {id_ for id_ in ids if reasons[0][id_] != reasons[1][id_]}


def set_unknown(ids: list[UUID]) -> None:
    with superuser() as connection:
        connection.execute("UPDATE channel SET unknown_reason = 'timeout' WHERE id = ANY(%s)", [ids])


def names(ids: list[UUID]) -> list[str]:
    with superuser() as connection:
        found = connection.execute("SELECT name FROM channel WHERE id = ANY(%s)", [ids]).fetchall()
    return [name for (name,) in found]


def test_some_that_hang_do_not_speak_for_their_host(easily_tired: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATUS_SYNC_AT_ONCE", "16")
    settings.cache_clear()
    tenant = a_tenant()
    with a_gateway(0.02) as gateway:
        ids = many_channels(gateway, tenant, 120)
        gate = Gate()
        for name in names(ids[:10]):
            gateway.says[name] = gate
        done = in_background(lambda: synced(tenant))
        until(lambda: gateway.in_flight >= 10 and gateway.answered > 20, "answers of others")
        gate.hang_up()
        unknown = done()["unknown"]

    assert {one["channel"] for one in unknown} == {str(id_) for id_ in ids[:10]}
    assert {one["reason"] for one in unknown} == {"unreachable"}


def test_what_a_round_cannot_reach_comes_first_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATUS_SYNC_AT_ONCE", "1")
    settings.cache_clear()
    tenant = a_tenant()
    with a_gateway() as gateway:
        channels = [a_channel(gateway, tenant) for _ in range(3)]
        gateway.usual = HANGS  # whoever comes first takes all the time
        with monkeypatch.context() as patched:
            patched.setattr(sys.modules["workers.status_sync"], "_ROUND_SECONDS", 2.0)
            first = synced(tenant)["unknown"]
        (asked,) = gateway.asked
        set_stored(next(one for one in channels if one.name == asked), unknown_reason="timeout")
        gateway.usual = "connected"
        gateway.asked.clear()
        synced(tenant)

    assert {one["reason"] for one in first} == {"not_reached"}
    assert len(gateway.asked) == 3
    assert list(gateway.asked)[2] == asked  # another one's turn


def test_a_due_round_is_spread() -> None:
    """Its polls begin one after the other, each channel's at a time of its own."""
    tenant = a_tenant()
    with a_gateway() as gateway:
        many_channels(gateway, tenant, 30)
        began = time.monotonic()

        status_sync_tick()

        assert gateway.last_asked - began > 0.5  # of 1.5 seconds
        assert sum(gateway.asked.values()) == 30
    (found,) = reports()
    assert (found["state"], found["is_due"], found["tenant_id"]) == ("done", True, None)
    with db.session() as s:
        lease = s.get_one(Lease, LEASE)
        assert lease.done_at is not None


def reports() -> list[dict[str, Any]]:
    with superuser() as connection:
        ids = connection.execute("SELECT id FROM sync_report ORDER BY id").fetchall()
    return [report(id_) for (id_,) in ids]


# ----------------------------------------------------------------------------------------------------- tokens of a host


def of_the_host(channel: Channel) -> None:
    set_stored(channel, config=json.dumps(stored(channel)["config"] | {"token_kind": "host"}))


def test_a_hosts_token_takes_one_call_for_all() -> None:
    tenant, other = a_tenant(), a_tenant()
    with a_gateway() as gateway:
        on, off, missing = (a_channel(gateway, tenant) for _ in range(3))
        odd, single = a_channel(gateway, other), a_channel(gateway, other)
        for channel in (on, off, missing, odd):
            of_the_host(channel)
        gateway.lists = [
            {"key": on.name, "status": "connected", "user": {"id": "5511955550200:3@s.whatsapp.net"}},
            {"key": off.name, "status": "disconnected"},
            {"key": odd.name, "status": "syncing"},
            {"key": "somebody-elses", "status": "connected"},
        ]

        result = synced(None)

        assert gateway.asked == {"list": 1, single.name: 1}
    words = [stored(channel)["status"] for channel in (on, off, missing, odd, single)]
    assert words == ["connected", "disconnected", None, None, "connected"]
    assert stored(on)["own_id"] == "5511955550200"
    assert [stored(channel)["unknown_reason"] for channel in (missing, odd)] == ["not_listed", "odd_answer"]
    assert result["checked"] == 5


def test_a_host_without_a_list_is_asked_one_by_one() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channels = [a_channel(gateway, tenant) for _ in range(3)]
        for channel in channels:
            of_the_host(channel)
        gateway.says["list"] = Answer(404, b'{"name":"NOT_FOUND"}')

        synced(tenant)

        assert gateway.asked == {"list": 1} | {channel.name: 1 for channel in channels}
    assert {stored(channel)["status"] for channel in channels} == {"connected"}


# --------------------------------------------------------------------------------- polls and webhooks, interleaved (Y3)


def a_poll_under_way(gateway: Any, tenant: Tenant, channel: Channel) -> tuple[Gate, Callable[[], Any]]:
    """A round that has asked about the channel, and whose answer the test holds."""
    gate = gateway.says[channel.name] = Gate()
    done = in_background(lambda: synced(tenant))
    gate.wait_until_asked()
    return gate, done


def test_a_webhook_after_the_question_beats_its_answer() -> None:
    """asked → told → answered: what the poll says was true before."""
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        synced(tenant)
        gate, done = a_poll_under_way(gateway, tenant, channel)
        told(channel)
        gate.release("disconnected")
        result = done()

    assert (stored(channel)["status"], result["changed"], result["differs"]) == ("connected", [], [])
    assert result["unknown"] == []


def test_a_check_beats_the_poll_that_was_asked_before_it() -> None:
    """asked → told → checked → answered, with the check's answer news and no news."""
    for word in ("disconnected", "connected"):
        tenant = a_tenant()
        with a_gateway() as gateway:
            channel = a_channel(gateway, tenant)
            synced(tenant)
            gate, done = a_poll_under_way(gateway, tenant, channel)
            told(channel)
            gateway.says[channel.name] = word
            status_check(str(channel.id))
            gate.release("connected" if word == "disconnected" else "disconnected")
            done()

        assert stored(channel)["status"] == word


def test_an_answer_before_the_webhook_counts_until_the_check() -> None:
    """asked → answered → told → checked."""
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        synced(tenant)
        gate, done = a_poll_under_way(gateway, tenant, channel)
        gate.release("disconnected")
        done()
        assert stored(channel)["status"] == "disconnected"
        told(channel)
        gateway.says[channel.name] = "connected"
        status_check(str(channel.id))

    assert stored(channel)["status"] == "connected"


def test_a_poll_that_was_asked_after_the_webhook_makes_the_check_needless() -> None:
    """told → asked → answered → checked."""
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        synced(tenant)
        told(channel)
        gateway.says[channel.name] = "disconnected"
        synced(tenant)
        asked = gateway.asked[channel.name]
        status_check(str(channel.id))

        assert (stored(channel)["status"], gateway.asked[channel.name]) == ("disconnected", asked)


def test_a_poll_between_a_webhook_and_its_check_does_not_turn_the_check_back() -> None:
    """told → asked → checked → answered: the check was asked later, so the poll's answer is the older one."""
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        synced(tenant)
        told(channel)
        gate, done = a_poll_under_way(gateway, tenant, channel)
        gateway.says[channel.name] = "disconnected"
        status_check(str(channel.id))
        gate.release("connected")
        done()

    assert stored(channel)["status"] == "disconnected"


def test_what_somebody_wrote_while_a_poll_was_under_way_is_seen_by_it() -> None:
    """checked → asked → the check is written → answered: what was no news when the round began is by then."""
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel, slow = a_channel(gateway, tenant), a_channel(gateway, tenant)
        synced(tenant)
        gate, done = a_poll_under_way(gateway, tenant, slow)
        set_stored(channel, status="disconnected")  # by a check that was asked before this round's poll
        gate.release()
        result = done()

    assert stored(channel)["status"] == "connected"
    assert [one["to"] for one in result["changed"]] == ["connected"]


def test_a_check_without_an_answer_is_made_again_and_then_unknown() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        synced(tenant)
        told(channel)
        gateway.says[channel.name] = Answer(503, b'{"error":true}')

        status_check(str(channel.id))

        assert bells("status_check") == [[str(channel.id), 1]]
        assert stored(channel)["unknown_since"] is None
        elapse(channel)
        status_check(str(channel.id), 3)

    after = stored(channel)
    assert (after["status"], after["unknown_reason"]) == ("connected", "provider_error")


def elapse(channel: Channel) -> None:
    """Let the pause pass that a check without an answer makes."""
    set_stored(channel, check_until=datetime(2026, 1, 1, tzinfo=UTC))


def say(channel: Channel) -> None:
    """As a webhook does it, and its bell."""
    with db.session([channel.tenant_id]) as s:
        now = s.execute(select(func.clock_timestamp())).scalar_one()
        standing.told(s, [(channel.tenant_id, channel.id, now)])
    status_check.send(str(channel.id))


def test_checks_are_not_in_the_way_of_rounds() -> None:
    queues = {job.queue_name for job in (status_sync, status_sync_tick)}
    assert status_check.queue_name not in queues


def test_however_often_a_channel_says_something_one_check_is_under_way_and_one_follows() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        gate = gateway.says[channel.name] = Gate()
        say(channel)
        done = in_background(lambda: status_check(str(channel.id)))
        gate.wait_until_asked()
        for _ in range(5):
            say(channel)
            status_check(str(channel.id))
        broker.flush(status_check.queue_name)

        assert gateway.asked[channel.name] == 1
        gate.release("disconnected")
        done()
        assert stored(channel)["status"] == "disconnected"
        assert bells("status_check") == [[str(channel.id)]]  # for what it said meanwhile
        gateway.says[channel.name] = "connected"
        for _ in range(5):
            status_check(str(channel.id))

        assert (gateway.asked[channel.name], stored(channel)["status"]) == (2, "connected")


def test_a_check_that_had_another_answer_is_not_made_again_for_the_same_event() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        gateway.says[channel.name] = Answer(401, b"{}")
        say(channel)
        for _ in range(3):
            status_check(str(channel.id))
        assert gateway.asked[channel.name] == 1
        say(channel)
        status_check(str(channel.id))

        assert gateway.asked[channel.name] == 2


def test_a_status_is_found_although_events_come_faster_than_answers() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        synced(tenant)
        gate = gateway.says[channel.name] = Gate()
        say(channel)
        done = in_background(lambda: status_check(str(channel.id)))
        gate.wait_until_asked()
        say(channel)
        gate.release("disconnected")
        done()
        assert stored(channel)["status"] == "disconnected"


def test_a_check_waits_as_long_as_the_gateway_wants() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        gateway.says[channel.name] = Answer(429, b'{"message":"slowly"}')
        say(channel)
        broker.flush(status_check.queue_name)
        before = time.time()
        status_check(str(channel.id))

        with redis_client() as client:
            delayed: Any = client.hvals("dramatiq:channel_session.DQ.msgs")
        (job,) = [json.loads(body) for body in delayed]
        assert job["args"] == [str(channel.id), 1]
        assert job["options"]["eta"] / 1000 - before > 25
        assert gateway.asked[channel.name] == 1


def nobody() -> Gate:
    """In place of an answer: the line goes dead."""
    gate = Gate()
    gate.hang_up()
    return gate


def test_one_that_never_answers_is_left_to_the_rounds_and_its_host_is_not(easily_tired: None) -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel, other = a_channel(gateway, tenant), a_channel(gateway, tenant)
        gateway.says[channel.name] = nobody()
        for _ in range(8):
            say(channel)
            elapse(channel)
            status_check(str(channel.id), 3)
        status_check(str(other.id))

        assert gateway.asked == {channel.name: 5, other.name: 1}


def test_checks_of_a_host_that_never_answers_are_left_to_the_rounds(easily_tired: None) -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        gateway.usual = nobody()
        channels = [a_channel(gateway, tenant) for _ in range(8)]
        for channel in channels:
            status_check(str(channel.id), 3)

        assert sum(gateway.asked.values()) == 5


def test_a_host_of_the_operators_that_never_answers_is_not_the_other_kinds(
    easily_tired: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels without a host of their own are at one for each kind."""
    tenant = a_tenant()
    with a_gateway() as hanging, a_gateway() as other:
        hanging.usual = nobody()
        monkeypatch.setenv("MEGA_API_HOST", hanging.address)
        monkeypatch.setenv("BACKEND_URL", other.address)
        settings.cache_clear()
        channels = [a_channel(hanging, tenant) for _ in range(6)]
        for channel in channels:
            set_stored(channel, config=json.dumps({"instance_key": channel.name, "token_kind": "instance"}))
        session, _ = gateways.add_baileys_channel(
            tenant, "shop", BaileysConfig(gateway="evolution", session="shop", api_key="a-key")
        )
        for channel in channels:
            status_check(str(channel.id), 3)

        status_check(str(session.id), 3)

        assert (sum(hanging.asked.values()), sum(other.asked.values())) == (5, 1)


def test_a_check_of_nothing_is_no_trouble() -> None:
    status_check(str(uuid.uuid4()))
    with pytest.raises(Permanent):
        status_check("x")
    with pytest.raises(Permanent):
        status_sync("x")


# ----------------------------------------------------------------------------------------------------- one at a time


def test_a_dry_round_writes_nothing() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        same, other, silent = (a_channel(gateway, tenant) for _ in range(3))
        for channel in (same, other, silent):
            set_stored(channel, status="connected", status_raw="connected", status_at=datetime(2026, 1, 1, tzinfo=UTC))
        gateway.says[other.name] = "disconnected"
        gateway.says[silent.name] = Answer(401, b"{}")
        before = versions(tenant)

        result = synced(tenant, is_dry=True)

    assert versions(tenant) == before
    assert events(tenant, CHANGES, "channel_silent") == []
    assert hold(other) is None
    (entry,) = result["differs"]
    assert {name: entry[name] for name in ("channel", "instance", "stored", "provider", "raw")} == {
        "channel": str(other.id),
        "instance": other.name,
        "stored": "connected",
        "provider": "disconnected",
        "raw": "disconnected",
    }
    assert result["unknown"] == [{"channel": str(silent.id), "name": silent.name, "reason": "refused"}]
    assert (result["checked"], result["changed"]) == (3, [])


def test_rounds_do_not_overlap_and_who_waits_is_rung_for() -> None:
    tenant, other = a_tenant(), a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        theirs = a_channel(gateway, other)
        gate, done = a_poll_under_way(gateway, tenant, channel)

        waiting = asked_for(other)
        status_sync(str(waiting))

        assert gateway.asked[theirs.name] == 0
        assert report(waiting)["state"] == "pending"
        assert ring_reports() == 0  # a round runs
        gate.release()
        done()
        gateway.says.clear()
        assert bells("status_sync") == [[str(waiting)]]
        whole = asked_for(None)
        status_sync(str(waiting))
        assert report(waiting)["state"] == "pending"  # a round over all comes before a tenant's
        status_sync(str(whole))
        status_sync(str(waiting))

        assert [report(waiting)["state"], report(whole)["state"]] == ["done", "done"]
        assert gateway.most_in_flight <= 2


def test_a_round_that_is_due_does_not_wait_for_a_tenants() -> None:
    """That one gives way, in the midst of a host that does not answer, and is made after."""
    tenant = a_tenant()
    with a_gateway() as gateway:
        stuck, theirs = a_channel(gateway, tenant), a_channel(gateway)
        gate = gateway.says[stuck.name] = Gate()
        asked = asked_for(tenant)
        done = in_background(lambda: status_sync(str(asked)))
        gate.wait_until_asked()

        status_sync_tick()
        done()

        assert report(asked)["state"] == "pending"
        assert stored(stuck)["unknown_since"] is None  # that we stopped says nothing of it
        ((whole,),) = bells("status_sync")
        assert (report(UUID(whole))["is_due"], report(UUID(whole))["state"]) == (True, "pending")
        status_sync(str(asked))
        assert report(asked)["state"] == "pending"  # whoever is rung for it, it is after that one
        gateway.says.clear()
        broker.flush(status_sync.queue_name)
        status_sync(whole)
        assert bells("status_sync") == [[str(asked)]]
        status_sync(str(asked))

        assert [report(UUID(whole))["state"], report(asked)["state"]] == ["done", "done"]
        assert stored(theirs)["status"] == "connected"


def test_a_round_that_gave_way_tells_at_last_what_it_had_changed_before() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        quick, stuck = a_channel(gateway, tenant), a_channel(gateway, tenant)
        gate = gateway.says[stuck.name] = Gate()
        asked = asked_for(tenant)
        done = in_background(lambda: status_sync(str(asked)))
        gate.wait_until_asked()
        until(lambda: stored(quick)["status"] == "connected", "what is written down of the one that answers")
        whole = asked_for(None)
        done()
        assert report(asked)["state"] == "pending"
        gate.release("disconnected")
        status_sync(str(whole))

        status_sync(str(asked))

    result = report(asked)["result"]
    assert [(one["channel"], one["to"]) for one in result["changed"]] == [(str(quick.id), "connected")]
    assert [(one["channel"], one["stored"]) for one in result["differs"]] == [(str(quick.id), "unknown")]
    assert (result["checked"], stored(stuck)["status"]) == (2, "disconnected")


def test_a_report_that_has_waited_for_two_ticks_gives_way_no_more() -> None:
    """Or with an outside cron each minute, one that takes long would be put back for ever."""
    tenant = a_tenant()
    with a_gateway() as gateway:
        quick, stuck = a_channel(gateway, tenant), a_channel(gateway, tenant)
        gate = gateway.says[stuck.name] = Gate()
        asked, whole = asked_for(tenant), asked_for(None)
        status_sync(str(asked))
        assert report(asked)["state"] == "pending"
        with superuser() as connection:
            connection.execute(
                "UPDATE sync_report SET created_at = created_at - interval '10 minutes' WHERE id = %s", [asked]
            )
        broker.flush(status_sync.queue_name)

        done = in_background(lambda: status_sync(str(asked)))
        gate.wait_until_asked()
        until(lambda: stored(quick)["status"] == "connected", "what is written down while it looks what is in the way")
        gate.release()
        done()

        assert (report(asked)["state"], report(whole)["state"]) == ("done", "pending")
        assert bells("status_sync") == [[str(whole)]]


def test_a_due_round_is_skipped_while_one_over_all_runs() -> None:
    with a_gateway() as gateway:
        channel = a_channel(gateway)
        gate = gateway.says[channel.name] = Gate()
        done = in_background(lambda: status_sync())
        gate.wait_until_asked()

        status_sync_tick()

        assert gateway.asked[channel.name] == 1
        gate.release()
        done()
    assert [one["state"] for one in reports()] == ["done"]


def test_a_minute_is_worked_on_once() -> None:
    with a_gateway() as gateway:
        channel = a_channel(gateway)
        status_sync_tick()
        with superuser() as connection:  # also across the turn of a minute
            connection.execute(
                "INSERT INTO tick (name, minute) SELECT name, date_trunc('minute', now()) FROM tick "
                "ON CONFLICT DO NOTHING"
            )
        status_sync_tick()

        assert gateway.asked[channel.name] == 1


def test_a_round_whose_process_was_killed_is_given_up_and_the_next_is_right() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        done, waits = a_channel(gateway, tenant), a_channel(gateway, tenant)
        for channel in (done, waits):
            set_stored(channel, status="disconnected", status_raw="disconnected")
        gate = gateway.says[waits.name] = Gate()
        process = subprocess.Popen(
            [sys.executable, "-m", "pombal", "run", "status_sync", "[]"], env={**os.environ}, stderr=subprocess.DEVNULL
        )
        try:
            gate.wait_until_asked()
        finally:
            process.kill()
            process.wait(PATIENCE)
        gateway.says.clear()
        (dead,) = reports()
        with superuser() as connection:
            connection.execute("UPDATE lease SET until = now() - interval '1 second'")  # what time does

        status_sync_tick()

    assert dead["state"] == "running"
    assert [(one["state"], one["error"]) for one in reports()] == [("failed", "its process ended"), ("done", None)]
    assert [stored(channel)["status"] for channel in (done, waits)] == ["connected", "connected"]
    assert [(one["from"], one["to"]) for one in events(tenant, CHANGES)] == [("disconnected", "connected")] * 2


def test_the_sweep_rings_for_a_report_whose_bell_was_lost() -> None:
    id_ = asked_for(a_tenant())

    assert ring_reports() == 0  # whoever asked has just rung
    with superuser() as connection:
        connection.execute("UPDATE sync_report SET next_ring_at = now() - interval '1 second'")
    assert (ring_reports(), ring_reports()) == (1, 0)
    assert bells("status_sync") == [[str(id_)]]
    assert ring_reports(at_once=True) == 1


def test_a_round_ends_with_its_worker_and_is_made_by_another() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)
        gate = gateway.says[channel.name] = Gate()
        id_ = asked_for(tenant)
        status_sync.send(str(id_))
        worker = Worker(broker, queues={"status_sync"}, worker_threads=1, worker_timeout=50)
        worker.start()
        gate.wait_until_asked()
        worker.stop(timeout=int(PATIENCE * 1000))

        assert report(id_)["state"] == "pending"
        assert stored(channel)["unknown_since"] is None  # that we stopped says nothing of it
        assert not stop.is_set()
        gateway.says.clear()
        status_sync(str(id_))
    assert (report(id_)["state"], stored(channel)["status"]) == ("done", "connected")


def test_old_reports_are_dropped_by_the_tick() -> None:
    old, young = asked_for(a_tenant()), asked_for(a_tenant())
    with superuser() as connection:
        connection.execute("UPDATE sync_report SET created_at = now() - interval '8 days' WHERE id = %s", [old])

    status_sync_tick()

    with superuser() as connection:
        left = {id_ for (id_,) in connection.execute("SELECT id FROM sync_report").fetchall()}
    assert old not in left
    assert young in left


def test_a_broken_round_leaves_a_dead_letter_and_not_a_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> None:
        raise RuntimeError("a bug")

    id_ = asked_for(a_tenant())
    monkeypatch.setattr("workers._rounds.Round._by_host", breaks)

    with pytest.raises(Permanent):
        status_sync(str(id_))

    assert report(id_)["state"] == "failed"
    with db.session() as s:
        assert Lease.take(s, LEASE, uuid.uuid4(), timedelta(seconds=1))
