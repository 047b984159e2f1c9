"""Kill one thing at a time in the middle of traffic, then count: accepted = rows = effects (architecture.md, "What must
be provable"). Every fault once and small; how fast it goes is the benchmarks' affair.
"""

import json
import re
import shlex
import shutil
import signal
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import msgspec
import pytest

from pombal.local import start_valkey
from pombal.supervisor import LINUX, runs
from sandbox import meta, traffic
from sandbox.traffic import Traffic
from tests.chaos.fleet import QUIET, STOPPED, Fleet, Shop, certificates, free_port, until
from tests.chaos.posting import Posting

pytestmark = pytest.mark.skipif(not LINUX, reason="processes are found through /proc")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """What takes bodies in of `pombal up`, for every fault in turn: it heals by itself, or the next test fails."""
    data = tmp_path_factory.mktemp("chaos") / "fleet"
    with Fleet(
        data, "--procs", "sandbox,web,worker,clock", PROMETHEUS_MULTIPROC_DIR=str(data.with_name("metrics"))
    ) as fleet:
        yield fleet.start()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet to be stopped in every way. It holds one message of `demo_shop`, which must outlive them all."""
    with Fleet(tmp_path_factory.mktemp("chaos") / "house", "--procs", "web,worker,upkeep,clock") as fleet:
        yield fleet


@pytest.fixture
def running_house(house: Fleet) -> Fleet:
    """The house with its lights on, and its one message in."""
    if not house.is_running:
        house.start()
    if not holds_the_message(house):
        shop = house.demo_shop()
        with Posting(house, shop, texts(shop, ["wamid.HOUSE"])):
            pass
        until(lambda: holds_the_message(house), "the message is there")
    return house


def holds_the_message(house: Fleet) -> bool:
    return house.count("SELECT count(*) FROM message WHERE provider_id = 'wamid.HOUSE'") == 1


def texts(shop: Shop, wamids: list[str]) -> list[bytes]:
    """A body with one message for each id."""
    number = meta.Number(shop.phone_number_id, shop.waba_id)
    person = "5511944440001"
    return [
        meta.encode(
            meta.envelope(
                [
                    meta.entry(
                        number.waba_id,
                        [meta.change(number, "messages", {"messages": [meta.text_message(wamid, person, "Oi", 1)]})],
                    )
                ]
            )
        )
        for wamid in wamids
    ]


def mixed(shop: Shop, seed: int, bodies: int = 300, per_body: tuple[int, int] = (1, 50)) -> Traffic:
    numbers = [(shop.phone_number_id, shop.waba_id)]
    return traffic.mixed(seed, bodies, numbers=numbers, per_body=per_body)


def until_quiet(fleet: Fleet) -> None:
    until(fleet.is_quiet, "nothing waits any more", QUIET)


def everything_counts(fleet: Fleet, shop: Shop, given: Traffic, posting: Posting) -> None:
    """Accepted = rows = effects, none lost and none twice."""
    truth = given.truth
    assert set(posting.answers) <= {200, 503, None}
    assert len(posting.accepted) == len(given.bodies)

    rows = fleet.rows("SELECT request_id, state, raw, id FROM delivery WHERE app_id = %s", shop.app_id)
    kept = Counter(request_id for request_id, *_ in rows)
    assert {request_id for request_id in posting.accepted if kept[request_id] != 1} == set()
    assert {request_id for request_id, _, raw, _ in rows if posting.accepted.get(request_id, raw) != raw} == set()
    raws = {state: {raw for _, its, raw, _ in rows if its == state} for state in ("pending", "done", "dead", "ignored")}
    assert {state: len(bodies) for state, bodies in raws.items()} == {
        "pending": 0,
        "done": len(set(given.bodies)) - truth.malformed,
        "dead": truth.malformed,
        "ignored": 0,
    }
    letters = fleet.rows(
        """
        SELECT delivery_id FROM dead_letter
        WHERE actor <> 'download_media' AND (tenant_id = %s OR delivery_id IS NULL)
        """,
        shop.tenant_id,
    )
    assert {id_ for (id_,) in letters} == {id_ for _, state, _, id_ in rows if state == "dead"}

    mine = "FROM message WHERE tenant_id = %s AND channel_id = %s AND direction = %s"
    came = fleet.rows(f"SELECT provider_id {mine}", shop.tenant_id, shop.channel_id, "in")
    went = fleet.rows(f"SELECT provider_id, status {mine}", shop.tenant_id, shop.channel_id, "out")
    assert sorted(came) == sorted((wamid,) for _, wamid in truth.incoming)
    assert sorted(went) == sorted((wamid, truth.statuses[number, wamid]) for number, wamid in truth.outgoing)

    unread = fleet.count("SELECT sum(unread_count) FROM conversation WHERE tenant_id = %s", shop.tenant_id)
    assert unread == len(truth.incoming)
    told = fleet.rows("SELECT type, message_id FROM event WHERE tenant_id = %s", shop.tenant_id)
    events = Counter(type_ for type_, message_id in told if message_id)
    assert events["message_received"] == len(truth.incoming)
    assert events["message_echoed"] == len(truth.outgoing)
    files = fleet.count("SELECT count(*) FROM media WHERE tenant_id = %s", shop.tenant_id)
    assert files == sum(type_ in meta.MEDIA_TYPES for type_ in truth.incoming.values())


def test_a_fleet_on_two_machines_counts_as_one(fleet: Fleet, tmp_path: Path) -> None:
    here, there, port = metrics_folder(fleet), tmp_path / "metrics-there", free_port()
    elsewhere = {"PROMETHEUS_MULTIPROC_DIR": str(there)}
    fleet.join("other-worker", "worker", "incoming_message", **elsewhere)
    fleet.join("other-clock", "clock", **elsewhere)
    fleet.join("other-web", "web", "--host", "127.0.0.1", "--port", str(port), **elsewhere)
    urls = [fleet.url, f"http://127.0.0.1:{port}"]
    until(lambda: answers(f"{urls[1]}/ready"), "the other web process is ready")
    shop = fleet.shop()
    given = mixed(shop, seed=7)

    with Posting(fleet, shop, given.bodies, urls=urls) as posting:
        posting.until_accepted(1 / 3)
        fleet.kill("clock")
    until_quiet(fleet)

    everything_counts(fleet, shop, given, posting)
    # Both workers must have had some, or there is nothing to add up.
    demo = fleet.demo_shop()

    def both_have_worked() -> bool:
        with Posting(fleet, demo, texts(demo, [f"wamid.{uuid4().hex}" for _ in range(20)])):
            pass
        return jobs_noted_in(here) > 0 and jobs_noted_in(there) > 0

    until(both_have_worked, "both workers have had a job")
    until_quiet(fleet)
    until(
        lambda: jobs_on(urls[0]) == jobs_on(urls[1]) == jobs_noted_in(here) + jobs_noted_in(there),
        "both web processes tell the jobs of both machines",
    )
    for name in "other-worker", "other-clock", "other-web":
        fleet.leave(name)


# --------------------------------------------------------------------------------------------- one fault in the middle


@pytest.mark.parametrize("victim", ["web", "worker", "worker master", "clock"])
def test_a_killed_process_loses_and_doubles_nothing(fleet: Fleet, victim: str) -> None:
    shop = fleet.shop()
    given = mixed(shop, seed=1)

    with Posting(fleet, shop, given.bodies) as posting:
        posting.until_accepted(1 / 3)
        fleet.kill(victim)
    until_quiet(fleet)

    everything_counts(fleet, shop, given, posting)


def test_a_killed_valkey_is_not_noticed_by_the_sender(fleet: Fleet) -> None:
    shop = fleet.shop()
    given = mixed(shop, seed=2)

    with Posting(fleet, shop, given.bodies) as posting:
        posting.until_accepted(1 / 3)
        before = fleet.identity("valkey")
        with fleet.nobody_restarts():
            fleet.strike("valkey")
            posting.until_more_are_accepted(20)
        until(lambda: fleet.identity("valkey") != before, "another Valkey is there")
    until_quiet(fleet)

    assert posting.answers == {200: len(given.bodies)}
    everything_counts(fleet, shop, given, posting)


def test_a_killed_postgres_is_503_until_it_is_back(fleet: Fleet) -> None:
    shop = fleet.shop()
    given = mixed(shop, seed=3)

    with Posting(fleet, shop, given.bodies) as posting:
        posting.until_accepted(1 / 3)
        before = fleet.identity("postgres")
        with fleet.nobody_restarts():
            fleet.strike("postgres")
            until(lambda: posting.answers[503], "the sender hears 503")
            ready = httpx.get(f"{fleet.url}/ready", trust_env=False, timeout=10)
            health = httpx.get(f"{fleet.url}/health", trust_env=False, timeout=10)
        until(lambda: fleet.identity("postgres") != before, "another PostgreSQL is there")
    until_quiet(fleet)

    assert (ready.status_code, health.status_code) == (503, 200)
    everything_counts(fleet, shop, given, posting)


def test_a_wiped_valkey_takes_nothing_with_it(fleet: Fleet) -> None:
    shop = fleet.shop()
    given = mixed(shop, seed=4)

    with Posting(fleet, shop, given.bodies) as posting:
        for share in 1 / 3, 2 / 3:
            posting.until_accepted(share)
            fleet.redis().flushall()
    until_quiet(fleet)

    everything_counts(fleet, shop, given, posting)


def test_a_valkey_that_forgets_everything_is_enough(tmp_path: Path) -> None:
    with (
        start_valkey(tmp_path / "elsewhere", persistence=False) as valkey,
        Fleet(tmp_path / "fleet", "--procs", "web,worker,clock", REDIS_URL=valkey.url) as fleet,
    ):
        fleet.start()
        shop = fleet.shop()
        given = mixed(shop, seed=5)

        with Posting(fleet, shop, given.bodies) as posting:
            posting.until_accepted(1 / 3)
            valkey.kill()
            posting.until_more_are_accepted(20)
            valkey.restart()
        until_quiet(fleet)

        everything_counts(fleet, shop, given, posting)
        fleet.stop()
        assert valkey.alive()


# ------------------------------------------------------------------------------------------- away, and back, and double


def test_what_waits_flows_when_the_clock_is_back(fleet: Fleet) -> None:
    shop = fleet.shop()
    given = mixed(shop, seed=6, bodies=60, per_body=(1, 5))

    with fleet.nobody_restarts():
        fleet.strike("clock")
        fleet.strike("worker")
        with Posting(fleet, shop, given.bodies) as posting:
            pass
        fleet.redis().flushall()  # the bells are gone, and who would ring again is away
        assert fleet.waits(shop) >= len(given.bodies)
    until_quiet(fleet)

    everything_counts(fleet, shop, given, posting)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, verify=certificates()).status_code == 200
    except httpx.HTTPError:
        return False


def jobs_on(url: str) -> float:
    """How many jobs the fleet has done, as this web process tells it."""
    said = httpx.get(f"{url}/metrics", trust_env=False, verify=certificates()).text
    found = re.search(r'^pombal_jobs_total\{actor="incoming_message",outcome="done"\} (\S+)$', said, re.MULTILINE)
    return float(found[1]) if found else 0.0


def metrics_folder(fleet: Fleet) -> Path:
    return fleet.data.with_name("metrics")


def jobs_noted_in(folder: Path) -> float:
    """How many jobs the living processes of one machine have done, from what they wrote down there."""
    wanted = {"actor": "incoming_message", "outcome": "done"}
    return sum(
        float(value)
        for file in folder.glob("*.json")
        if runs(int(file.stem))
        for family in msgspec.json.decode(file.read_bytes())
        for name, labels, value in family["samples"]
        if (name, labels) == ("pombal_jobs_total", wanted)
    )


# -------------------------------------------------------------------------------------------------- `up` and its words


def test_up_writes_down_what_scripts_need(fleet: Fleet) -> None:
    file = fleet.data / "demo.json"
    demo = fleet.demo

    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert set(demo) == {"base_url", "database_url", "redis_url", "tenants", "sandbox"}
    assert demo["base_url"] == fleet.url
    assert answers(f"{demo['base_url']}/health")
    (tenant,) = demo["tenants"]
    assert (set(tenant), tenant["slug"]) == ({"slug", "api_key", "channels", "sip"}, "demo")
    (account,) = tenant["sip"]
    assert (set(account), account["name"]) == ({"id", "name", "username", "password"}, "demo-sip")
    channel, on_a_gateway, on_baileys, stub = tenant["channels"]
    fields = {"id", "kind", "name", "phone_number_id", "waba_id", "app_secret", "verify_token", "access_token"}
    assert (set(channel), channel["kind"]) == (fields, "meta")
    fields = {"id", "kind", "name", "host", "instance_key", "token", "webhook_token"}
    assert (set(on_a_gateway), on_a_gateway["kind"]) == (fields, "megaapi")
    fields = {"id", "kind", "name", "gateway", "host", "session", "api_key", "webhook_token"}
    assert (set(on_baileys), on_baileys["kind"]) == (fields, "baileys")
    assert (set(stub), stub["kind"]) == ({"id", "kind", "name"}, "stub")
    host = dict.fromkeys(("meta", "megaapi", "baileys"), on_a_gateway["host"])
    assert demo["sandbox"] == host | {"sip": demo["sandbox"]["sip"]}
    assert re.fullmatch(r"127\.0\.0\.1:\d+", demo["sandbox"]["sip"])
    bearer = {"Authorization": f"Bearer {tenant['api_key']}"}
    mine = httpx.get(f"{fleet.url}/api/v1/channels", headers=bearer, trust_env=False).json()
    assert {one["id"] for one in mine["data"]} == {one["id"] for one in tenant["channels"]}
    asked = {"hub.mode": "subscribe", "hub.verify_token": channel["verify_token"], "hub.challenge": "4711"}
    assert httpx.get(f"{fleet.url}/webhooks/whatsapp", params=asked, trust_env=False).text == "4711"
    assert httpx.get(demo["sandbox"]["meta"], trust_env=False).status_code < 500


def test_the_printed_commands_work_as_they_are_printed(fleet: Fleet) -> None:
    block = fleet.output.partition("try, in a second terminal in this folder:\n\n")[2].partition("\n\n")[0]
    curl, trace, say = re.findall(r"^  \S.*(?:\n    .*)*", block, re.MULTILINE)

    if shutil.which("curl"):
        heard = fleet.shell(curl)
        assert "200 OK" in heard
        assert heard.endswith("EVENT_RECEIVED")
    else:
        words = shlex.split(curl)
        headers = dict(words[n + 1].split(": ", 1) for n, word in enumerate(words) if word == "-H")
        posted = httpx.post(words[2], content=words[words.index("-d") + 1], headers=headers, trust_env=False)
        assert posted.status_code == 200
    until_quiet(fleet)
    wamid = trace.split()[-1]
    story = json.loads(fleet.shell(f"{trace} --json"))

    assert [message["provider_id"] for message in story["message"]] == [wamid]
    assert [delivery["state"] for delivery in story["delivery"]] == ["done"]
    assert "answered 200" in fleet.shell(say)


def test_a_taken_port_is_one_clear_line(fleet: Fleet, tmp_path: Path) -> None:
    with Fleet(tmp_path / "late") as late:
        late.port = fleet.port
        late.begin()

        assert late.process.wait(60) == 1
        assert late.output == f"pombal: port {fleet.port} is taken: choose another with --port\n"
        assert not late.data.exists()


@pytest.mark.parametrize("options", [[], ["--reset"]])
def test_a_second_fleet_on_the_same_data_is_refused_and_harms_nothing(fleet: Fleet, options: list[str]) -> None:
    second = fleet.rival(*options)

    assert second.returncode == 1
    assert f"{fleet.data} is used by another pombal" in second.stdout
    shop, wamid = fleet.demo_shop(), f"wamid.{uuid4().hex}"
    with Posting(fleet, shop, texts(shop, [wamid])):
        pass
    until(lambda: fleet.count("SELECT count(*) FROM message WHERE provider_id = %s", wamid) == 1, "it still works")


def test_a_server_that_does_not_come_up_is_tried_again(fleet: Fleet) -> None:
    folder, aside = fleet.data / "valkey", fleet.data / "aside"
    with fleet.nobody_restarts():
        fleet.strike("valkey")
        folder.rename(aside)
        folder.touch()
    until(lambda: fleet.output.count("Valkey died, starting it again") >= 2, "it was tried again")

    folder.unlink()
    aside.rename(folder)

    until(fleet.is_whole, "Valkey is there again")


# ------------------------------------------------------------------------------------------------------ ways to end it


def test_ctrl_c_is_a_clean_end_and_the_data_is_there_again(running_house: Fleet) -> None:
    running_house.stop(signal.SIGINT)

    running_house.start()

    assert holds_the_message(running_house)


def test_sigterm_to_the_whole_group_twice_is_one_clean_end(running_house: Fleet) -> None:
    house = running_house
    house.note_sockets()

    house.signal_all(signal.SIGTERM)
    house.signal_all(signal.SIGTERM)
    until(lambda: "stopping the servers" in house.output, "the processes are stopped")
    house.signal_all(signal.SIGTERM)

    house.has_ended_cleanly()
    house.start()
    assert holds_the_message(house)


def test_a_worker_is_not_deaf_while_it_boots(running_house: Fleet) -> None:
    running_house.join("young", "worker", "incoming_message")

    running_house.stop_without_its_child("young")

    assert running_house.is_whole()


def test_a_killed_up_leaves_no_orphans_and_starts_again(running_house: Fleet) -> None:
    house = running_house
    before = house.demo["tenants"][0]

    house.process.kill()
    house.process.wait()
    until(lambda: house.pids() == [], "no orphans are left")
    (house.data / "demo.json").unlink()  # as if it had been killed before it wrote this

    house.start()
    assert holds_the_message(house)
    now = house.demo["tenants"][0]
    assert now["channels"] == before["channels"]
    bearer = {"Authorization": f"Bearer {now['api_key']}"}
    assert httpx.get(f"{house.url}/api/v1/channels", headers=bearer, trust_env=False).status_code == 200


def test_reset_begins_anew(running_house: Fleet) -> None:
    house = running_house
    before = house.demo["tenants"][0]["channels"][0]["id"]
    house.stop()

    house.start("--reset")

    assert not holds_the_message(house)
    assert house.demo["tenants"][0]["channels"][0]["id"] != before
    house.stop()


def test_whatever_interrupts_the_first_start_the_next_one_works(tmp_path: Path) -> None:
    with Fleet(tmp_path / "young", "--procs", "web,worker,clock") as young:
        for step, number, code in (
            ("PostgreSQL", signal.SIGINT, 130),
            ("migrations", signal.SIGTERM, 130),
            ("demo tenant", signal.SIGKILL, -signal.SIGKILL),
        ):
            young.begin()
            until(lambda step=step: f"{step} …" in young.output, f"{step} has begun")  # type: ignore[misc]
            young.process.send_signal(number)
            # Both are an interrupt to us. If it falls into an `exec` of a library, Python ends itself by SIGINT: 130
            # too, as a shell reads it.
            assert young.process.wait(STOPPED) in (code, -signal.SIGINT)
            assert "Traceback" not in young.output
            until(lambda: young.pids() == [], "no orphans are left")

        young.start()
        young.stop()
