"""What an operator types to see how channels stand, and what is answered."""

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from pombal.cli.doctor import _not_synced
from pombal.settings import settings
from tests.factories import a_shop, a_tenant, superuser
from tests.pombal.processes import output
from tests.pombal.test_cli import Terminal
from tests.workers.gateways import a_channel, a_gateway, set_stored, stored

MARCH = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(capsys)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MEDIA_ALLOWED_NETWORKS", "127.0.0.0/8")
    settings.cache_clear()
    with superuser() as connection:
        connection.execute("UPDATE channel SET kind = 'stub' WHERE kind IN ('megaapi', 'baileys')")
        connection.execute("DELETE FROM sync_report")
        connection.execute("DELETE FROM lease")
    yield
    monkeypatch.undo()
    settings.cache_clear()


def test_a_line_for_each_channel_that_has_a_session(terminal: Terminal) -> None:
    tenant = a_shop().tenant  # with a number at Meta
    on, lost = a_channel("https://gateway.example", tenant), a_channel("https://gateway.example", tenant)
    a_channel("https://gateway.example", a_tenant())
    set_stored(on, status="connected", status_raw="connected", status_since=MARCH, silent_since=MARCH)
    set_stored(lost, status="connected", unknown_since=MARCH, unknown_reason="refused")

    head, *lines = terminal("channel", "status", tenant.slug).splitlines()
    rows = {row["channel"]: row for row in terminal.json("channel", "status", tenant.slug)}

    assert head.split() == ["CHANNEL", "ID", "KIND", "STATUS", "SINCE", "NOTES"]
    assert lines[0].split()[2:5] == ["megaapi", "connected", "2026-03-01T12:00:00+00:00"]
    assert lines[0].endswith("silent since 2026-03-01T12:00:00+00:00")
    assert "connected before; refused" in lines[1]
    assert lines[2] == "last round over all: none yet"
    assert (rows[on.name]["status"], rows[lost.name]["status"]) == ("connected", "unknown")
    assert rows[lost.name]["last_status"] == "connected"
    assert len(terminal.json("channel", "status")) > 2


def test_a_check_asks_now_and_writes_nothing(terminal: Terminal) -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        same, other = a_channel(gateway, tenant), a_channel(gateway, tenant)
        for channel in (same, other):
            set_stored(channel, status="connected", status_raw="connected")
        gateway.says[other.name] = "disconnected"
        before = stored(other)

        said = terminal("channel", "status", tenant.slug, "--check")
        rows = {row["channel"]: row for row in terminal.json("channel", "status", tenant.slug, "--check")}

    assert [line.endswith("differs") for line in said.splitlines()[1:3]] == [False, True]
    assert [(rows[one.name]["status"], rows[one.name]["now"]) for one in (same, other)] == [
        ("connected", "connected"),
        ("connected", "disconnected"),
    ]
    assert stored(other) == before


def test_nothing_to_show_is_said(terminal: Terminal) -> None:
    assert terminal("channel", "status", a_tenant().slug).strip() == "no channels that have a session"
    assert "no tenant nobody" in terminal.refused("channel", "status", "nobody")


def test_a_round_by_hand_needs_no_broker_and_says_what_it_does() -> None:
    tenant = a_tenant()
    with a_gateway() as gateway:
        channel = a_channel(gateway, tenant)

        said = output("-m", "pombal", "run", "status_sync", "[]")

    assert stored(channel)["status"] == "connected"
    assert [word for word in ("sync_started", "channel_status_changed", "sync_finished") if word not in said] == []
    assert channel.name not in said  # the instance's key


def findings() -> list[str]:
    return [finding.what for finding in _not_synced()]


def test_the_doctor_sees_that_nobody_asks() -> None:
    tenant = a_tenant()
    assert findings() == []
    channel = a_channel("https://gateway.example", tenant)
    assert findings() == []  # a minute ago there was nothing to ask about
    set_stored(channel, created_at=MARCH)
    (what,) = findings()
    assert what.startswith("no round over 1 channel ended for 15 minutes")
