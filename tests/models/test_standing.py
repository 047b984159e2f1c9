"""What a poll or a webhook makes of a channel: only what is newer counts, only what is news is written (Y1, Y3)."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import RowMapping, text

from models import Channel, Tenant, standing
from models.standing import ODD
from pombal import db
from tests.factories import a_tenant, superuser
from tests.workers.gateways import a_channel, set_stored, stored

NOW = datetime.now(UTC)
NOWHERE = "https://gateway.example"


def ago(minutes: float) -> datetime:
    return NOW - timedelta(minutes=minutes)


def heard(channel: Channel, *, is_probe: bool = False, **said: Any) -> list[RowMapping]:
    given = {"asked_at": NOW, "status": None, "raw": "", "reason": None, "own_id": None, **said}
    with db.session([channel.tenant_id]) as s:
        return standing.heard(s, [{"tenant_id": channel.tenant_id, "id": channel.id, **given}], is_probe=is_probe)


def polled(channel: Channel) -> RowMapping:
    with db.session([channel.tenant_id]) as s:
        (row,) = standing.polled(s, channel_id=channel.id)
    return row


def told(channel: Channel, at: datetime) -> None:
    with db.session([channel.tenant_id]) as s:
        standing.told(s, [(channel.tenant_id, channel.id, at)])


@pytest.fixture
def channel() -> Channel:
    return a_channel(NOWHERE)


def test_the_first_answer_is_news_and_the_same_again_is_not(channel: Channel) -> None:
    (row,) = heard(channel, status="connected", raw="connected", own_id="5511955550200")

    assert (row["was"], row["status"], row["is_other"]) == (None, "connected", True)
    assert heard(channel, status="connected", raw="connected", asked_at=NOW + timedelta(1)) == []
    after = stored(channel)
    assert (after["status"], after["status_at"], after["own_id"]) == ("connected", NOW, "5511955550200")


def test_no_answer_leaves_the_status_and_notes_since_when(channel: Channel) -> None:
    heard(channel, status="connected", raw="connected", asked_at=ago(20))

    heard(channel, reason="timeout", asked_at=ago(10))
    (again,) = heard(channel, reason="refused", raw="UNAUTHORIZED", asked_at=ago(5))

    after = stored(channel)
    assert (after["status"], after["status_raw"]) == ("connected", "UNAUTHORIZED")
    assert (after["unknown_since"], after["unknown_reason"]) == (ago(10), "refused")
    assert again["was_unknown"] == "timeout"
    (back,) = heard(channel, status="connected", raw="connected")
    assert (back["is_other"], back["was_unknown"]) == (False, "refused")
    assert (stored(channel)["unknown_since"], stored(channel)["status_since"]) == (None, ago(20))


def test_what_was_asked_before_we_were_told_something_counts_no_more(channel: Channel) -> None:
    heard(channel, status="connected", raw="connected", asked_at=ago(20))
    told(channel, ago(5))
    told(channel, ago(8))  # deliveries are shuffled

    assert stored(channel)["told_at"] == ago(5)
    assert heard(channel, status="disconnected", raw="disconnected", asked_at=ago(5)) == []
    assert len(heard(channel, status="disconnected", raw="disconnected", asked_at=ago(4))) == 1


def test_a_check_without_news_still_makes_older_polls_stale(channel: Channel) -> None:
    heard(channel, status="connected", raw="connected", asked_at=ago(20))

    (row,) = heard(channel, status="connected", raw="connected", asked_at=ago(5), is_probe=True)

    assert row["is_other"] is False
    assert heard(channel, status="disconnected", raw="disconnected", asked_at=ago(6)) == []
    assert stored(channel)["status"] == "connected"


def test_of_events_that_come_faster_than_answers_the_first_makes_polls_stale(channel: Channel) -> None:
    heard(channel, status="connected", raw="connected", asked_at=ago(20))
    for seconds in (50, 40, 30, 20):
        told(channel, ago(seconds / 60))

    assert heard(channel, status="disconnected", raw="disconnected", asked_at=ago(50 / 60)) == []
    said: dict[str, Any] = {"status": "disconnected", "raw": "disconnected", "asked_at": ago(35 / 60)}
    assert standing.is_news(polled(channel), **said, reason=None, own_id=None)
    assert len(heard(channel, **said)) == 1
    # Answered; the events since then have no answer yet.
    assert heard(channel, status="connected", raw="connected", asked_at=ago(25 / 60)) == []
    told(channel, ago(10 / 60))
    assert heard(channel, status="connected", raw="connected", asked_at=ago(19 / 60)) != []


def test_an_event_without_an_answer_counts_as_the_first_for_a_minute(channel: Channel) -> None:
    told(channel, ago(3))
    told(channel, ago(1.5))

    assert heard(channel, status="connected", raw="connected", asked_at=ago(2)) == []
    assert len(heard(channel, status="connected", raw="connected", asked_at=ago(1))) == 1


def taken(channel: Channel, *, is_again: bool = False) -> RowMapping | None:
    with db.session([channel.tenant_id]) as s:
        return standing.take_check(s, channel.id, timedelta(minutes=1), is_again=is_again)


def left(channel: Channel, row: RowMapping | None, wait: float | None = None) -> bool:
    assert row is not None
    with db.session([channel.tenant_id]) as s:
        return standing.leave_check(s, row, None if wait is None else timedelta(seconds=wait))


def test_a_channel_is_checked_by_one_at_a_time_and_once_for_all_that_was_told(channel: Channel) -> None:
    told(channel, ago(5))
    first = taken(channel)
    assert taken(channel) is None  # somebody is at it
    told(channel, datetime.now(UTC) + timedelta(minutes=5))
    assert taken(channel) is None

    assert left(channel, first)  # it told something since
    set_stored(channel, told_at=ago(1))
    assert taken(channel) is None  # asked after that, whatever came of it
    again = taken(channel, is_again=True)
    assert not left(channel, again, wait=60)
    told(channel, datetime.now(UTC) + timedelta(minutes=6))
    assert taken(channel) is None  # somebody will be
    set_stored(channel, check_until=ago(1))
    assert not left(channel, first)  # it is another's by now
    assert taken(channel) is not None


def test_a_check_whose_process_died_is_made_by_another(channel: Channel) -> None:
    told(channel, ago(5))
    taken(channel)
    set_stored(channel, check_until=ago(1))

    assert taken(channel) is not None


BELIEFS: list[dict[str, Any]] = [
    {
        "status": status,
        "status_raw": raw,
        "status_at": at,
        "told_at": told_at,
        "told_first_at": first,
        "unknown_reason": reason,
        "own_id": own,
    }
    for status, raw in ((None, None), ("connected", "connected"), ("disconnected", "disconnected"))
    for at in (None, ago(10))
    for told_at, first in ((None, None), (ago(3), None), (ago(3), ago(6)), (ago(3), ago(12)))
    for reason in (None, "timeout", "not_reached", ODD)
    for own in (None, "55119")
]
ANSWERS: list[dict[str, Any]] = [
    {"asked_at": at, "status": status, "raw": raw, "reason": reason, "own_id": own}
    for at in (ago(11), ago(10), ago(5), ago(3), ago(1))
    for status, raw, reason, own in (
        ("connected", "connected", None, None),
        ("connected", "connected", None, "55119"),
        ("disconnected", "disconnected", None, "55110"),
        (None, "", "timeout", None),
        (None, "", "not_reached", None),
        (None, "<html>", "edge_blocked", None),
        (None, "syncing", ODD, None),
        (None, "connected", ODD, None),
    )
]


def test_what_looks_like_no_news_would_not_be_written() -> None:
    """`is_news` spares a quiet round the database: it must say the same as the statement that writes."""
    tenant = a_tenant()
    believed = {a_channel(NOWHERE, tenant).id: belief for belief in BELIEFS}
    wrong = []
    with db.session([tenant.id]) as s:
        for id_, belief in believed.items():
            s.execute(text(RESET), {**belief, "id": id_})
        rows = {row["id"]: row for row in standing.polled(s, tenant_id=tenant.id)}
        assert rows.keys() == believed.keys()
        for answer in ANSWERS:
            savepoint = s.begin_nested()
            written = standing.heard(s, [{"tenant_id": tenant.id, "id": id_, **answer} for id_ in rows])
            savepoint.rollback()
            looks = {id_ for id_, row in rows.items() if standing.is_news(row, **answer)}
            wrong += [(believed[id_], answer, id_ in looks) for id_ in looks ^ {row["id"] for row in written}]
    assert wrong == []


RESET = """
    UPDATE channel SET status = :status, status_raw = :status_raw, status_at = :status_at, told_at = :told_at,
        told_first_at = :told_first_at, unknown_reason = :unknown_reason, own_id = :own_id
    WHERE id = :id
"""


def test_an_error_page_that_differs_each_time_is_written_once(channel: Channel) -> None:
    heard(channel, reason="edge_blocked", raw="<html>Ray ID 1", asked_at=ago(2))

    assert not standing.is_news(
        polled(channel), asked_at=NOW, status=None, raw="<html>Ray ID 2", reason="edge_blocked", own_id=None
    )
    assert heard(channel, reason="edge_blocked", raw="<html>Ray ID 2") == []
    assert stored(channel)["status_raw"] == "<html>Ray ID 1"


def test_a_foreign_keys_check_does_not_wait_for_a_status(channel: Channel) -> None:
    """Whoever stores a message holds a lock on its channel until the commit, and may hold the lane that is next."""
    with db.session([channel.tenant_id]) as s:
        given = {"asked_at": NOW, "status": "connected", "raw": "connected", "reason": None, "own_id": None}
        assert standing.heard(s, [{"tenant_id": channel.tenant_id, "id": channel.id, **given}])
        with db.session([channel.tenant_id]) as other:
            other.execute(text("SELECT FROM channel WHERE id = :id FOR KEY SHARE NOWAIT"), {"id": channel.id})


# ------------------------------------------------------------------------------------------------------------- silence


def find_silent(tenant: Tenant) -> list[tuple[str, bool]]:
    with db.session([tenant.id]) as s:
        return sorted((str(row["id"]), row["silent_since"] is not None) for row in standing.find_silent(s))


def connected(tenant: Tenant, hours: float = 48, **config: Any) -> Channel:
    channel = a_channel(NOWHERE, tenant, **config)
    set_stored(channel, status="connected", status_since=NOW - timedelta(hours=hours))
    return channel


def message(
    channel: Channel, direction: str, *, hours: float, is_sent: bool = True, sent_hours: float | None = None
) -> None:
    """A message of so many hours ago; an outgoing one may only be queued, or have left later than that."""
    at = NOW - timedelta(hours=hours)
    sent_at = at if sent_hours is None else NOW - timedelta(hours=sent_hours)
    with superuser() as connection:
        connection.execute(
            """
            WITH who AS (INSERT INTO contact (tenant_id, id) VALUES (%(tenant)s, gen_random_uuid()) RETURNING id),
            talk AS (
                INSERT INTO conversation (tenant_id, id, channel_id, contact_id, last_message_at)
                SELECT %(tenant)s, gen_random_uuid(), %(channel)s, id, %(at)s FROM who RETURNING id, contact_id
            )
            INSERT INTO message (tenant_id, id, channel_id, conversation_id, contact_id, direction, type, body, status,
                sent_at, created_at)
            SELECT %(tenant)s, gen_random_uuid(), %(channel)s, talk.id, talk.contact_id, %(direction)s, 'text', '{}',
                %(status)s, %(sent_at)s, %(at)s
            FROM talk
            """,
            {
                "tenant": channel.tenant_id,
                "channel": channel.id,
                "direction": direction,
                "status": "received" if direction == "in" else "sent" if is_sent else "queued",
                "sent_at": sent_at if direction == "out" and is_sent else None,
                "at": at,
            },
        )


def test_silent_is_who_is_connected_and_has_no_traffic_in_either_direction() -> None:
    tenant = a_tenant()
    quiet, heard_of, sends, queued = (connected(tenant) for _ in range(4))
    message(quiet, "in", hours=30)
    message(heard_of, "in", hours=2)
    message(sends, "out", hours=2)
    message(queued, "out", hours=2, is_sent=False)
    new = connected(tenant, hours=2)
    off = connected(tenant)
    set_stored(off, status="disconnected")

    assert find_silent(tenant) == sorted([(str(quiet.id), True), (str(queued.id), True)])
    assert find_silent(tenant) == []
    assert stored(new)["silent_since"] is None

    message(quiet, "in", hours=0.1)
    assert find_silent(tenant) == [(str(quiet.id), False)]


def test_a_message_that_was_scheduled_counts_from_when_it_left() -> None:
    tenant = a_tenant()
    sent, long_ago = connected(tenant), connected(tenant)
    message(sent, "out", hours=48, sent_hours=1)
    message(long_ago, "out", hours=72, sent_hours=30)

    assert find_silent(tenant) == [(str(long_ago.id), True)]
    with db.session([tenant.id]) as s:
        found = standing.last_traffic(s, tenant.id, [sent.id, long_ago.id])
    assert found == {sent.id: NOW - timedelta(hours=1), long_ago.id: NOW - timedelta(hours=30)}


@pytest.mark.parametrize("statistics", ["none", "current"])
def test_one_busy_channel_beside_quiet_ones_costs_one_look_each(statistics: str) -> None:
    """Neither statement walks what the busy one has (it took 15 seconds), whatever is known of the tables."""
    tenant = a_tenant()
    busy, *quiet = (connected(tenant) for _ in range(4))
    message(busy, "in", hours=1)
    with superuser() as connection:
        connection.execute(MANY, {"tenant": tenant.id, "channel": busy.id})
        if statistics == "current":
            connection.execute("ANALYZE channel, conversation, message")
    given = {"kinds": ["megaapi"], "hours": 24.0, "tenant_id": tenant.id, "ids": [busy.id, *(one.id for one in quiet)]}

    for statement in (standing._SILENT, standing._LAST_TRAFFIC):
        with db.session([tenant.id]) as s:
            db.by_key(s)
            plan = "\n".join(s.scalars(text(f"EXPLAIN (ANALYZE, TIMING OFF) {statement.text}"), given))
        assert "ix_message_traffic" in plan, plan
        assert "on conversation" not in plan, plan
        assert "Seq Scan on message" not in plan, plan


MANY = """
    INSERT INTO message (tenant_id, id, channel_id, conversation_id, contact_id, direction, type, body, status)
    SELECT m.tenant_id, gen_random_uuid(), m.channel_id, m.conversation_id, m.contact_id, 'in', 'text', '{}', 'received'
    FROM message AS m, generate_series(1, 3000) WHERE m.tenant_id = %(tenant)s AND m.channel_id = %(channel)s
"""


def test_a_channel_says_itself_after_how_long_it_is_silent() -> None:
    tenant = a_tenant()
    never, soon, usual = (
        connected(tenant, silent_after_hours=0),
        connected(tenant, silent_after_hours=1),
        connected(tenant),
    )
    for one in (never, soon, usual):
        message(one, "in", hours=3)

    assert find_silent(tenant) == [(str(soon.id), True)]


def test_nothing_is_said_of_silence_while_nobody_knows_whether_it_is_connected() -> None:
    tenant = a_tenant()
    was_silent, was_not = connected(tenant), connected(tenant)
    set_stored(was_silent, silent_since=ago(60), unknown_since=ago(5), unknown_reason="timeout")
    set_stored(was_not, unknown_since=ago(5), unknown_reason="timeout")

    assert find_silent(tenant) == []
