"""What sending promises, at a size that no test suite has the time for: counted, and timed.

    python bench/campaigns.py [kills] [overtaking] [rate] [outage]      all of them by default, some twelve minutes

kills        5,000 messages over 20 numbers, a tenth of the calls with a fault, and a worker killed every few seconds:
             each message is accepted once, but for answers that were hidden; none is lost; order per recipient holds
overtaking   one tenant queues 5,000 messages, then another asks for one: how long until that one leaves
rate         one number, 80/s, four worker processes: its busiest second, and how near to the limit it comes
outage       the provider answers 503 for a minute: how many calls that costs, and how soon all is sent afterwards

Each on a fleet of its own (`pombal up` in a temporary folder, with its simulated Meta); a wrong count ends the script.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rig import ROOT, Failed
from throughput import say

sys.path.insert(0, str(ROOT))

from sandbox import client
from tests.chaos.campaign import Campaign
from tests.chaos.fleet import Fleet, until
from tests.chaos.test_sending import FAULTS

KILL_EVERY = 20.0  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", choices=[[], *ALL], default=[])
    parser.add_argument("--messages", type=int, default=5_000)
    given = parser.parse_args()
    for name in given.which or ALL:
        with a_fleet() as fleet:
            ALL[name](fleet, given.messages)
    return 0


@contextmanager
def a_fleet(*options: str) -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="pombal-bench-") as folder:
        data = Path(folder, "fleet")
        with Fleet(data, *options, PROMETHEUS_MULTIPROC_DIR=str(data.with_name("metrics"))) as fleet:
            yield fleet.start()


def kills(fleet: Fleet, count: int) -> None:
    campaign = Campaign(fleet, tenants=4, channels=20, settle_seconds=10)
    for n, fault in enumerate(FAULTS):
        client.faults(campaign.sandbox, seed=n, **fault)
    client.faults(campaign.sandbox, kind="latency", ms=200)
    began, killed, last = time.monotonic(), 0, time.monotonic()
    with campaign.asking(count, recipients=25):
        while client.summary(campaign.sandbox)["calls"] < 0.9 * count:
            time.sleep(0.2)
            if time.monotonic() - last > KILL_EVERY:
                fleet.kill("worker")
                killed, last = killed + 1, time.monotonic()
    end = time.monotonic() + 900
    while not campaign.is_over():
        if time.monotonic() > end:
            raise Failed(campaign.story())
        time.sleep(1)
    counted = campaign.everything_counts()
    say(f"kills: {count} messages over 20 numbers, all sent after {time.monotonic() - began:.0f} s, ", end="")
    say(f"{killed} workers killed; {counted}, {len(campaign.asked_about())} left to an operator")


def overtaking(fleet: Fleet, count: int) -> None:
    campaign = Campaign(fleet, tenants=2, channels=2)
    crowd, other = campaign.ways
    campaign.ways = [crowd]
    client.faults(campaign.sandbox, kind="latency", ms=100)
    fleet.run("lanes", "hold", crowd.id)
    campaign.ask_for_many(count, recipients=count)
    fleet.run("lanes", "resume", crowd.id)
    until(lambda: campaign.states()["sent"] + campaign.states()["delivered"] > 50, "the crowd is being sent", 30)
    times = []
    for n in range(5):
        began = time.time()
        with campaign.connected():
            campaign.ask(other, "+5511955550000", f"lone {n}")
        until(lambda n=n: leaves_at(campaign, f"lone {n}") is not None, "the lone one leaves", 60)  # type: ignore[misc]
        times.append((leaves_at(campaign, f"lone {n}") or 0) - began)
        time.sleep(1)
    waiting = campaign.states()["queued"]
    if not waiting:
        raise Failed("the crowd was through before the lone one came")
    worst = max(times)
    say(f"overtaking: a lone message left {worst * 1000:.0f} ms after it was asked for at the latest, of 5, ", end="")
    say(f"while {waiting} of another tenant waited")


def leaves_at(campaign: Campaign, text: str) -> float | None:
    return next((c["at"] for c in client.calls(campaign.sandbox, limit=100_000)["calls"] if c["text"] == text), None)


def rate(fleet: Fleet, count: int) -> None:
    campaign = Campaign(fleet, tenants=1, channels=1)
    client.rules(campaign.sandbox, rate=80, statuses={"words": []})
    client.faults(campaign.sandbox, kind="latency", ms=50)
    for n in range(3):
        fleet.join(f"worker-{n}", "worker", "outgoing_message")
    fleet.run("lanes", "hold", campaign.ways[0].id)
    campaign.ask_for_many(3_000, recipients=3_000)
    fleet.run("lanes", "resume", campaign.ways[0].id)
    until(campaign.is_over, "all are sent", 300, pause=0.5)
    calls = [c["at"] for c in client.calls(campaign.sandbox, limit=100_000)["calls"] if c["outcome"] == "accepted"]
    summary: dict[str, Any] = client.summary(campaign.sandbox)
    (busiest,), refused = summary["busiest_second"].values(), sum(summary["rate_refusals"].values())
    reached = (len(calls) - 1) / (max(calls) - min(calls))
    say(
        f"rate: 80/s allowed, {reached:.1f}/s reached ({reached / 80:.0%}), busiest second {busiest}, refused {refused}"
    )


def outage(fleet: Fleet, count: int) -> None:
    campaign = Campaign(fleet, tenants=2, channels=10, settle_seconds=5)
    client.faults(campaign.sandbox, kind="outage", seconds=60)
    began = time.time()
    campaign.ask_for_many(500, recipients=50)
    until(campaign.is_over, "all are sent", 600, pause=0.5)
    calls = client.calls(campaign.sandbox, limit=100_000)["calls"]
    lost = [c for c in calls if c["at"] < began + 60]
    per_channel = max(sum(c["channel"] == way.name for c in lost) for way in campaign.ways)
    campaign.everything_counts()
    last = max(c["at"] for c in calls) - began - 60
    say(f"outage: 503 for 60 s cost {len(lost)} calls over 10 numbers, {per_channel} at most for one; ", end="")
    say(f"500 messages were through {last:.0f} s after its end")


ALL = {"kills": kills, "overtaking": overtaking, "rate": rate, "outage": outage}

if __name__ == "__main__":
    raise SystemExit(main())
