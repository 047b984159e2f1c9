"""A campaign through a fleet that is being hurt: each message is sent once, or twice where an answer was hidden."""

import contextlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pombal.supervisor import LINUX
from sandbox import client
from tests.chaos.campaign import FINAL, Campaign
from tests.chaos.fleet import Fleet, until

pytestmark = pytest.mark.skipif(not LINUX, reason="processes are found through /proc")

FAULTS: tuple[dict[str, Any], ...] = (
    {"kind": "code", "code": 131000, "share": 0.02},
    {"kind": "code", "code": 131016, "share": 0.01},
    {"kind": "code", "code": 130429, "share": 0.002},
    {"kind": "reset_before", "share": 0.01},
    {"kind": "reset_after", "share": 0.02},
    {"kind": "html", "share": 0.01},
    {"kind": "html_after", "share": 0.01},
    {"kind": "garbage_after", "share": 0.01},
    {"kind": "empty", "share": 0.01},
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    data = tmp_path_factory.mktemp("chaos") / "senders"
    with Fleet(
        data, "--procs", "sandbox,web,worker,clock", PROMETHEUS_MULTIPROC_DIR=str(data.with_name("metrics"))
    ) as fleet:
        yield fleet.start()


def test_a_campaign_is_sent_once_while_its_workers_are_killed(fleet: Fleet) -> None:
    campaign = Campaign(fleet, tenants=4, channels=20, settle_seconds=4)
    for n, fault in enumerate(FAULTS):
        client.faults(campaign.sandbox, seed=n, **fault)
    client.faults(campaign.sandbox, kind="latency", ms=100)
    killed = 0

    with campaign.asking(600, recipients=10):
        while killed < 3:
            wanted = calls(campaign) + 100
            until(lambda wanted=wanted: calls(campaign) >= wanted, "more was sent", 120)  # type: ignore[misc] # bound now
            fleet.kill("worker")
            killed += 1
    # Long: two silences in a row, when nothing else is left to probe a lane with, are decided by ever rarer probes.
    assert eventually(campaign.is_over, 420), campaign.story()

    counted = campaign.everything_counts()
    assert counted["hidden"] > 0


def test_a_wiped_redis_doubles_nothing_and_holds_nothing_up(fleet: Fleet) -> None:
    campaign = Campaign(fleet, tenants=2, channels=4)
    client.clear_faults(campaign.sandbox)
    client.faults(campaign.sandbox, kind="latency", ms=50)

    with campaign.asking(400, recipients=20):
        for share in (50, 150, 250):
            until(lambda share=share: calls(campaign) >= share, "more was sent", 120)  # type: ignore[misc] # bound now
            fleet.redis().flushall()
    assert eventually(campaign.is_over, 120), campaign.story()

    counted = campaign.everything_counts()
    assert (counted["accepted"], counted["doubled"], counted["calls"]) == (400, 0, 400)


def test_a_message_that_was_scheduled_leaves_at_its_time_also_after_a_restart(fleet: Fleet) -> None:
    campaign = Campaign(fleet, tenants=1, channels=1)
    due = datetime.now(UTC) + timedelta(seconds=12)
    with campaign.connected():
        campaign.ask(campaign.ways[0], "+5511944440001", "later", not_before=due.isoformat())
        campaign.ask(campaign.ways[0], "+5511944440001", "now")
    until(lambda: sum(campaign.states()[status] for status in FINAL) == 1, "the other one has left")

    fleet.stop()
    fleet.start()
    campaign.introduce()  # before that it is refused, and probed again after 30 s
    assert eventually(campaign.is_over, 120), campaign.story()

    accepted = [call for call in client.calls(campaign.sandbox)["calls"] if call["outcome"] == "accepted"]
    assert [call["text"] for call in accepted] == ["later"]  # the journal is new as well
    assert accepted[0]["at"] >= due.timestamp()


def test_one_message_overtakes_another_tenants_crowd(fleet: Fleet) -> None:
    campaign = Campaign(fleet, tenants=2, channels=2)
    client.faults(campaign.sandbox, kind="latency", ms=100)
    crowd, other = campaign.ways
    campaign.ways = [crowd]
    fleet.run("lanes", "hold", crowd.id)
    campaign.ask_for_many(1_200, recipients=1_200)  # a quarter of a minute at this number's rate
    fleet.run("lanes", "resume", crowd.id)
    until(lambda: calls(campaign) > 20, "the crowd is on its way")

    with campaign.connected():
        campaign.ask(other, "+5511955550000", "the lone one")
    assert eventually(campaign.is_over, 120), campaign.story()

    left = [call["text"] for call in client.calls(campaign.sandbox, limit=100_000)["calls"]]
    assert left.index("the lone one") < len(left) - 100, "it did not wait for the crowd"
    campaign.everything_counts()


def test_four_worker_processes_together_keep_to_a_numbers_rate(fleet: Fleet) -> None:
    campaign = Campaign(fleet, tenants=1, channels=1)
    client.clear_faults(campaign.sandbox)
    client.rules(campaign.sandbox, rate=80)  # it refuses what is too fast, by its own clock
    for n in range(3):
        fleet.join(f"sender-{n}", "worker", "outgoing_message")
    fleet.run("lanes", "hold", campaign.ways[0].id)
    campaign.ask_for_many(300, recipients=300)
    fleet.run("lanes", "resume", campaign.ways[0].id)
    assert eventually(campaign.is_over, 120), campaign.story()
    for n in range(3):
        fleet.leave(f"sender-{n}")

    counted = campaign.everything_counts()
    assert sum(client.summary(campaign.sandbox)["rate_refusals"].values()) == 0
    assert (counted["accepted"], counted["calls"]) == (300, 300)


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it comes true, looked at twice a second."""
    with contextlib.suppress(AssertionError):
        until(condition, "", seconds, pause=0.5)
        return True
    return False


def calls(campaign: Campaign) -> int:
    return int(client.summary(campaign.sandbox)["calls"])
