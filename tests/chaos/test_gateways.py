"""A gateway's number while its fleet is being hurt and its session drops: calls carry no id of ours, and yet each
message leaves once, or an operator sees that it may have."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import pytest

from pombal.supervisor import LINUX
from sandbox import client
from tests.chaos.fleet import Fleet, until

pytestmark = pytest.mark.skipif(not LINUX, reason="processes are found through /proc")

COUNT, RECIPIENTS = 240, 60
SETTINGS = '{"messages_per_second": 60, "settle_seconds": 4}'
FAULTS: tuple[dict[str, Any], ...] = (
    {"kind": "reset_after", "share": 0.05},
    {"kind": "html502_after", "share": 0.03},
    {"kind": "garbage", "share": 0.03},
    {"kind": "http500", "share": 0.02},
    {"kind": "http429", "share": 0.01, "retry_after": 1},
    {"kind": "latency", "ms": 60},
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    data = tmp_path_factory.mktemp("chaos") / "gateways"
    with Fleet(
        data,
        "--procs",
        "sandbox,web,worker,sessions,clock",
        PROMETHEUS_MULTIPROC_DIR=str(data.with_name("gateway-metrics")),
    ) as fleet:
        yield fleet.start()


@pytest.mark.parametrize("echo", ["before", "after"])
def test_each_message_leaves_once_while_workers_are_killed_and_the_session_drops(fleet: Fleet, echo: str) -> None:
    sandbox, run = str(fleet.demo["sandbox"]["megaapi"]), uuid4().hex[:8]
    tenant = fleet.demo["tenants"][0]
    channel = next(one for one in tenant["channels"] if one["kind"] == "megaapi")
    fleet.run("channel", "set", tenant["slug"], channel["name"], "--config", SETTINGS)
    client.mega_clear_calls(sandbox)
    client.mega_clear_faults(sandbox)
    client.mega_rules(sandbox, echo=echo)
    for n, fault in enumerate(FAULTS):
        client.mega_faults(sandbox, place="send", seed=n, **fault)

    def accepted() -> Counter[str]:
        found = client.mega_calls(sandbox, place="send", limit=100_000)["calls"]
        return Counter(one["text"] for one in found if one["outcome"] == "accepted")

    def states() -> dict[str, str]:
        query = "SELECT body #>> '{text,body}', status FROM message WHERE turn_at IS NOT NULL AND body::text LIKE %s"
        return {str(text): str(status) for text, status in fleet.rows(query, f"%{run}%")}

    def ask(n: int) -> None:
        to = f"+55119{44000000 + n % RECIPIENTS}"
        body = {"channel": channel["id"], "to": to, "type": "text", "text": f"{run} {n}"}
        headers = {"Authorization": f"Bearer {tenant['api_key']}"}
        answer = httpx.post(f"{fleet.url}/api/v1/messages", json=body, headers=headers, timeout=10, trust_env=False)
        assert answer.status_code == 202, answer.text

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(COUNT)))
    for share in (40, 110):
        until(lambda share=share: accepted().total() >= share, "more was sent", 120)  # type: ignore[misc] # bound now
        fleet.kill("worker")
    until(lambda: accepted().total() >= 150, "more was sent", 120)
    client.mega_status(sandbox, "disconnected", instances=[channel["instance_key"]], emit=True)
    held = "SELECT count(*) FROM lane WHERE hold = 'disconnected'"
    until(lambda: fleet.count(held) == 1, "nothing is sent while it is disconnected", 60)
    client.mega_status(sandbox, "connected", instances=[channel["instance_key"]], emit=True)

    def is_settled() -> bool:
        """Nothing waits; what is unknown was decided to be an operator's."""
        found = Counter(states().values())
        waiting = "SELECT count(*) FROM message WHERE status = 'unknown' AND due_at IS NOT NULL"
        return not (found["queued"] or found["sending"]) and fleet.count(waiting) == 0

    until(is_settled, "all is settled", 180, pause=0.5)

    sent, known = accepted(), states()
    assert len(known) == COUNT
    assert set(sent.values()) == {1}, {text: n for text, n in sent.items() if n > 1}
    assert "failed" not in known.values()
    by_state = {state: {text for text in known if known[text] == state} for state in set(known.values())}
    # What the gateway never took while its caller was killed is nobody's to guess; all else is known for what it is.
    assert by_state.pop("unknown", set()) == known.keys() - sent.keys()
    assert set().union(*by_state.values()) == sent.keys()
    assert by_state.keys() <= {"sent", "delivered", "read"}
    echoes = "SELECT count(*) FROM message WHERE direction = 'out' AND turn_at IS NULL AND body::text LIKE %s"
    until(lambda: client.mega_summary(sandbox)["webhooks"]["pending"] == 0, "all was told", 60)
    until(lambda: fleet.count("SELECT count(*) FROM delivery WHERE state = 'pending'") == 0, "all was heard", 60)
    assert fleet.count(echoes, f"%{run}%") == 0
