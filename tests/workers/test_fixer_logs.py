"""Repairs of a session whose errors are told by its gateway's log alone: a follower that is dead is no proof."""

from collections.abc import Iterator
from datetime import timedelta

import pytest

from models import Channel, LogPosition, RepairPause, Tenant
from pombal import db
from tests.factories import superuser
from tests.repairs import a_session, arrive, done, fail, go_on, incident, nobody_else, walk
from tests.sandbox.baileys_servers import Baileys
from tests.workers.tools import until


@pytest.fixture(autouse=True)
def _alone(_near_gateways: None, queues: None) -> Iterator[None]:
    nobody_else()
    yield
    with superuser() as connection:
        connection.execute("DELETE FROM log_position")


LOG = LogPosition.key("", "whatsappId", "", "", "/var/log/gateway.log")


def fail_in_a_log(channel: Channel) -> None:
    fail(channel)
    with superuser() as connection:
        connection.execute("UPDATE session_error SET source = 'log', log = %s WHERE channel_id = %s", [LOG, channel.id])


def followed(ago: timedelta = -timedelta(hours=1)) -> None:
    """Its log has been read until so long ago, when its follower died; without, it is read all the time."""
    with superuser() as connection:
        connection.execute("DELETE FROM log_position")
        connection.execute(
            'INSERT INTO log_position (path, inode, head, "offset", updated_at, read_until)'
            " VALUES (%s, 1, '', 7, now() - %s, now() - %s)",
            [LOG, ago, ago],
        )


def test_a_step_is_not_judged_while_nobody_reads_the_log(baileys: Baileys, tenant: Tenant) -> None:
    """Nothing fails that anybody knows of, and messages go on: by its webhook."""
    channel = a_session(baileys, tenant)
    fail_in_a_log(channel)
    followed()
    walk(channel, step="restart", phase="watching")

    followed(timedelta(hours=1))
    arrive(channel, contacts=1)
    until(lambda: "is not read yet" in _says(channel), "it waits for what the log says")
    assert (incident(channel)["step"], incident(channel)["phase"]) == ("restart", "watching")

    followed()
    assert walk(channel, state="closed")["outcome"] == "repaired"


def test_a_follower_that_was_removed_holds_nothing_up_for_ever(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    followed(timedelta(hours=25))
    fail_in_a_log(channel)
    walk(channel, step="restart", phase="watching")

    arrive(channel, contacts=1)

    assert walk(channel, state="closed")["outcome"] == "repaired"


def test_no_step_is_begun_while_nobody_reads_the_log(baileys: Baileys, tenant: Tenant) -> None:
    channel = a_session(baileys, tenant)
    followed()
    fail_in_a_log(channel)
    with db.session() as s:
        RepairPause.set(s, "all")
    walk(channel, step="cause", phase="planned")

    followed(timedelta(hours=1))
    with db.session() as s:
        RepairPause.end(s, "all")
    until(lambda: "is read" in _says(channel), "it waits for what the log says")
    assert done(baileys) == []

    followed()
    walk(channel, step="restart")


def _says(channel: Channel) -> str:
    go_on(channel)
    return str(incident(channel)["says"])
