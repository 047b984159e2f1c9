"""Until when what a gateway told has been read, by its webhook and by its logs."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from sqlalchemy import text

from models import Channel, ChannelKind, LogPosition, SessionError, Tenant, session_error
from pombal import db
from tests.factories import superuser

LOG = LogPosition.key("", "whatsappId", "", "", "/var/log/gateway.log")
AN_HOUR = timedelta(hours=1)
JID = "5511944440001@s.whatsapp.net"


@pytest.fixture
def channel(tenant: Tenant) -> Channel:
    return a_channel(tenant)


def a_channel(tenant: Tenant, log: str | None = LOG) -> Channel:
    """With an error that this log, or its webhook, has told of."""
    config = {"host": "https://gw.example"}
    made = Channel(id=uuid4(), tenant_id=tenant.id, kind=ChannelKind.BAILEYS, name=f"c{uuid4().hex}", config=config)
    with db.session([tenant.id]) as s:
        s.add(made)
    error = {"jid": JID, "participant": "", "message_id": uuid4().hex, "cause": "ratchet", "at": datetime.now(UTC)}
    error |= {"source": "log" if log else "webhook", "log": log}
    with db.session([tenant.id]) as s:
        SessionError.record(s, [error | {"tenant_id": tenant.id, "channel_id": made.id}])
    return made


@pytest.fixture
def its_log() -> Iterator[str]:
    yield LOG
    with superuser() as connection:
        connection.execute("DELETE FROM log_position")


def read(key: str, ago: timedelta, *, lived: timedelta | None = None) -> None:
    """This log has been read until so long ago, and its follower has lived as long, unless told."""
    with superuser() as connection:
        connection.execute("DELETE FROM log_position WHERE path = %s", [key])
        connection.execute(
            'INSERT INTO log_position (path, inode, head, "offset", updated_at, read_until)'
            " VALUES (%s, 1, '', 7, now() - %s, now() - %s)",
            [key, ago if lived is None else lived, ago],
        )


def age(channel: Channel) -> timedelta:
    """For how long what its gateway told has not been read, in whole minutes."""
    with db.session([channel.tenant_id]) as s:
        until = SessionError.read_until(s, channel.tenant_id, channel.id)
        given = (channel.tenant_id, channel.id, datetime.now(UTC) - AN_HOUR, datetime.now(UTC))
        assert abs(SessionError.heard_since(s, *given, grace=0, weak=True)["read_until"] - until) < timedelta(seconds=9)
    return timedelta(minutes=round((datetime.now(UTC) - until) / timedelta(minutes=1)))


def test_what_a_log_tells_is_read_until_its_follower_last_saw_its_end(channel: Channel, its_log: str) -> None:
    assert not age(channel)  # nobody has ever followed it

    read(its_log, AN_HOUR)
    read(its_log.replace("gateway.log", "gateway-2.log"), timedelta(0))

    assert age(channel) == AN_HOUR
    read(its_log, timedelta(0))
    assert not age(channel)


def test_a_log_that_is_being_caught_up_with_is_not_read(channel: Channel, its_log: str) -> None:
    read(its_log, timedelta(days=3), lived=timedelta(0))

    assert age(channel) == timedelta(days=3)


def test_it_is_read_until_the_last_of_its_logs_is(tenant: Tenant, channel: Channel, its_log: str) -> None:
    second = LogPosition.key("", "whatsappId", "", "gw.example", "/var/log/second.log")
    with db.session([tenant.id]) as s:
        SessionError.weak(s, tenant.id, channel.id, datetime.now(UTC), second)
    read(its_log, timedelta(0))
    read(second, AN_HOUR)

    assert age(channel) == AN_HOUR


def test_nobody_waits_for_a_log_that_does_not_matter(tenant: Tenant, channel: Channel, its_log: str) -> None:
    """A follower that was removed, a file that was deleted, and a session of which no log has told."""
    other = a_channel(tenant, None)
    read(its_log, AN_HOUR)
    assert (age(channel), age(other)) == (AN_HOUR, timedelta(0))

    with db.session() as s:
        LogPosition.let_go(s, [its_log])
    assert not age(channel)

    read(its_log, timedelta(hours=25))
    assert not age(channel)


def test_an_error_of_long_ago_does_not_make_it_wait(channel: Channel, its_log: str) -> None:
    read(its_log, AN_HOUR)
    with superuser() as connection:
        connection.execute("UPDATE session_error SET at = at - interval '25 hours' WHERE channel_id = %s", [channel.id])

    assert not age(channel)


@pytest.mark.parametrize("statistics", ["none", "current"])
def test_the_errors_of_a_month_are_not_walked_for_those_of_a_day(
    tenant: Tenant, channel: Channel, its_log: str, statistics: str
) -> None:
    """It is asked every two seconds of each session that waits for a follower."""
    read(its_log, AN_HOUR)
    with superuser() as connection:
        connection.execute(A_MONTH, {"channel": channel.id})
        if statistics == "current":
            connection.execute("ANALYZE session_error, log_position")

    with db.session([tenant.id]) as s:
        explain = text(f"EXPLAIN (ANALYZE, TIMING OFF) {session_error._READ_UNTIL.text}")
        plan = "\n".join(s.scalars(explain, {"tenant_id": tenant.id, "channel_id": channel.id}))

    assert "ix_session_error_log" in plan, plan
    assert age(channel) == AN_HOUR


A_MONTH = """
    INSERT INTO session_error (tenant_id, channel_id, jid, message_id, cause, source, log, at, last_at, healed_at)
    SELECT e.tenant_id, e.channel_id, e.jid, n::text, e.cause, e.source, CASE n %% 2 WHEN 0 THEN e.log END,
        past.at, past.at, past.at
    FROM session_error AS e, generate_series(1, 3000) AS n,
        LATERAL (SELECT e.at - n * interval '14 minutes') AS past(at)
    WHERE e.channel_id = %(channel)s
"""
