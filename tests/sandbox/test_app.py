import base64
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sandbox import client, meta, traffic
from sandbox.app import create_app
from sandbox.meta import JSON
from tests.sandbox.servers import SECRET, VERIFY_TOKEN, Receiver, receiver, serve

NUMBER = meta.Number("880011223344556", "700100200300400", "5511955550199")


def write_config(path: Path, url: str) -> None:
    channel = {"name": "demo-meta", **NUMBER._asdict()}
    apps = [{"url": url, "app_secret": SECRET, "verify_token": VERIFY_TOKEN, "channels": [channel]}]
    path.write_text(json.dumps({"apps": apps}))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "sandbox.json"


@pytest.fixture
def there(config: Path) -> Iterator[Receiver]:
    with receiver() as running:
        write_config(config, running.url)
        yield running


@pytest.fixture
def control(config: Path) -> Iterator[str]:
    with serve(create_app(config)) as address:
        yield address


def only_value(raw: bytes) -> JSON:
    (entry,) = json.loads(raw)["entry"]
    (change,) = entry["changes"]
    value: JSON = change["value"]
    return value


def ended(control: str, run_id: str) -> JSON:
    """Ask until a run is over."""
    while (progress := client.progress(control, run_id, truth=True))["state"] in ("preparing", "running"):
        pass
    return progress


def test_what_a_customer_says_arrives_signed_and_escaped(there: Receiver, control: str) -> None:
    answer = client.say(control, "demo-meta", "Olá a/b")

    assert answer["accepted"] is True
    assert answer["status"] == 200
    (raw,) = there.accepted
    assert rb"Ol\u00e1 a\/b" in raw
    assert only_value(raw)["metadata"]["phone_number_id"] == NUMBER.phone_number_id
    assert only_value(raw)["messages"][0]["id"] == answer["wamid"]
    assert there.headers[0]["x-hub-signature-256"] == meta.sign(raw, SECRET)
    assert there.headers[0]["content-type"] == "application/json"


def test_a_message_is_repeated_through_an_outage(config: Path, control: str) -> None:
    with receiver(503, 503) as there:
        write_config(config, there.url)

        answer = client.say(control, "demo-meta", "oi")

    assert answer["accepted"] is True
    assert len(there.received) == 3
    (delivery,) = client.journal(control)["deliveries"]
    assert delivery["id"] == answer["delivery"]
    assert delivery["attempts"] == 3


def test_an_answer_does_not_wait_for_the_end_of_an_outage(
    config: Path, control: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox.app.WAIT", 0)
    with receiver(*[500] * 1000) as there:
        write_config(config, there.url)

        answer = client.say(control, "demo-meta", "oi")

        assert answer["accepted"] is False
        assert client.journal(control)["pending"] == 1


def test_logs_hold_neither_text_nor_number_nor_secret(
    there: Receiver, control: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="sandbox")

    client.say(control, "demo-meta", "segredo", from_="5511987654321")

    assert "accepted" in caplog.text
    for private in ("segredo", "5511987654321", SECRET, NUMBER.display_phone_number):
        assert private not in caplog.text


def test_several_messages_of_a_type_travel_in_one_body(there: Receiver, control: str) -> None:
    answer = client.send(control, "demo-meta", "interactive", count=5, from_="BR.123")

    messages = only_value(there.accepted[0])["messages"]
    assert [message["id"] for message in messages] == answer["wamids"]
    assert len({message["interactive"]["type"] for message in messages}) == 4
    assert {message["from_user_id"] for message in messages} == {"BR.123"}


def test_an_object_of_ones_own_is_sent_as_it_is(there: Receiver, control: str) -> None:
    client.send(control, "demo-meta", "hologram", object={"depth": [1, None]})

    assert only_value(there.accepted[0])["messages"][0]["hologram"] == {"depth": [1, None]}


def test_a_status_arrives(there: Receiver, control: str) -> None:
    client.status(control, "demo-meta", "wamid.OUT1", "failed", extra={"biz_opaque_callback_data": "out:1"})

    value = only_value(there.accepted[0])
    assert value["statuses"][0]["id"] == "wamid.OUT1"
    assert value["statuses"][0]["biz_opaque_callback_data"] == "out:1"
    assert "contacts" not in value


def test_account_fields_carry_a_time_and_no_metadata(there: Receiver, control: str) -> None:
    client.field(control, "demo-meta", "message_template_status_update")
    client.field(control, "demo-meta", "weather", {"rain": True})

    first, second = (json.loads(raw)["entry"][0] for raw in there.accepted)
    assert isinstance(first["time"], int)
    assert first["changes"][0]["value"]["event"] == "APPROVED"
    assert second["changes"] == [{"field": "weather", "value": {"rain": True}}]


def test_raw_bytes_arrive_untouched(there: Receiver, control: str) -> None:
    client.raw(control, "demo-meta", body="não é JSON")
    client.raw(control, "demo-meta", base64=base64.b64encode(b"\xff\x00").decode())

    assert there.accepted == ["não é JSON".encode(), b"\xff\x00"]


@pytest.mark.parametrize("signature", ["bad", "none", "old"])
def test_without_a_good_signature_a_body_is_sent_once(there: Receiver, control: str, signature: str) -> None:
    answer = client.raw(control, "demo-meta", body="{}", signature=signature)

    assert answer["accepted"] is False
    assert answer["status"] == 401
    assert len(there.received) == 1
    assert ("x-hub-signature" in there.headers[0]) is (signature == "old")
    assert ("x-hub-signature-256" in there.headers[0]) is (signature == "bad")


def test_the_handshake_tells_whether_the_challenge_came_back(there: Receiver, control: str) -> None:
    good = client.handshake(control, "demo-meta")
    bad = client.handshake(control, "demo-meta", verify_token="wrong")

    assert good["verified"] is True
    assert good["exact_challenge"] is True
    assert good["content_type"].startswith("text/plain")
    assert (bad["verified"], bad["status"]) == (False, 403)


def test_the_handshake_with_nobody_there_fails(config: Path, control: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        write_config(config, f"http://127.0.0.1:{taken.getsockname()[1]}/hook")

    assert client.handshake(control, "demo-meta")["status"] is None


def test_a_run_delivers_its_traffic_and_knows_the_truth(there: Receiver, control: str) -> None:
    run_id = client.traffic(control, bodies=60, seed=5, malformed=0.05, per_body=[1, 9])["id"]

    progress = ended(control, run_id)

    expected = traffic.mixed(5, 60, numbers=[NUMBER], malformed=0.05, per_body=(1, 9)).truth
    assert progress["state"] == "done"
    assert progress["accepted"] == progress["bodies"] == len(there.accepted) == 60
    assert progress["truth"]["incoming"] == len(expected.incoming)
    assert progress["truth"]["outgoing"] == len(expected.outgoing)
    assert sum(progress["truth"]["statuses"].values()) == len(expected.statuses)
    assert progress["truth"]["malformed_bodies"] == expected.malformed_bodies
    sent = b"".join(there.accepted)
    assert all(wamid.replace("/", r"\/").encode() in sent for _, wamid in expected.incoming)


def test_the_apps_share_a_run_and_sign_for_themselves(config: Path, control: str) -> None:
    with receiver() as one, receiver() as other:
        apps = [
            {
                "url": there.url,
                "app_secret": SECRET,
                "verify_token": "t",
                "channels": [{"name": name, "phone_number_id": name, "waba_id": name}],
            }
            for there, name in ((one, "a"), (other, "b"))
        ]
        config.write_text(json.dumps({"apps": apps}))

        run_id = client.traffic(control, ["a", "b"], bodies=21, seed=1, malformed=0)["id"]

        assert ended(control, run_id)["accepted"] == 21
    assert (len(one.accepted), len(other.accepted)) == (11, 10)
    assert all(entry["id"] == "b" for raw in other.accepted for entry in json.loads(raw)["entry"])


def test_a_run_can_be_cancelled(config: Path, control: str) -> None:
    with receiver(*[500] * 1000) as there:
        write_config(config, there.url)
        run_id = client.traffic(control, bodies=50, seed=1)["id"]

        progress = client.cancel(control, run_id)

    assert progress["state"] == "cancelled"
    assert progress["pending"] == 0
    assert client.journal(control)["pending"] == 0
    assert client.cancel(control, run_id)["state"] == "cancelled"


def test_too_many_runs_at_once_are_refused(config: Path, control: str) -> None:
    with receiver(*[500] * 1000) as there:
        write_config(config, there.url)
        runs = [client.traffic(control, bodies=2, rate=0.001)["id"] for _ in range(4)]

        with pytest.raises(client.SandboxError, match="4 runs are going on") as refused:
            client.traffic(control, bodies=1)

        for run_id in runs:
            client.cancel(control, run_id)
    assert refused.value.code == "RATE_LIMITED"


def test_ended_runs_are_forgotten_one_day(there: Receiver, control: str) -> None:
    first = client.traffic(control, bodies=1)["id"]
    ended(control, first)
    for _ in range(20):
        ended(control, client.traffic(control, bodies=1)["id"])

    with pytest.raises(client.SandboxError, match="no run"):
        client.progress(control, first)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/meta/say", {"channel": "nobody", "text": "oi"}, 404, "no channel 'nobody'; there are: demo-meta"),
        ("/meta/say", {"channel": "demo-meta"}, 400, "missing required field `text`"),
        ("/meta/say", {"channel": "demo-meta", "text": "oi", "from": "+55 11"}, 400, "from"),
        ("/meta/say", {"channel": "demo-meta", "text": "oi", "form": "1"}, 400, "unknown field `form`"),
        ("/meta/send", {"channel": "demo-meta", "type": "text", "count": 1001}, 400, "count"),
        ("/meta/send", {"channel": "demo-meta", "type": "hologram"}, 400, "no example"),
        ("/meta/field", {"channel": "demo-meta", "field": "weather"}, 400, "no example"),
        ("/meta/raw", {"channel": "demo-meta"}, 400, "either body or base64"),
        ("/meta/raw", {"channel": "demo-meta", "base64": "?"}, 400, "base64"),
        ("/meta/traffic", {"per_body": [5, 1]}, 400, "per_body"),
        ("/meta/traffic", {"bodies": 20_000, "per_body": [1, 1000]}, 400, "250000"),
        ("/meta/traffic", {"channels": []}, 400, "no channel"),
        ("/meta/raw", {"channel": "demo-meta", "body": "x" * 17 * 2**20}, 413, "bytes"),
        ("/nowhere", {}, 404, "GET / lists the routes"),
        ("/meta/journal", {}, 405, "GET / lists the routes"),
    ],
)
def test_a_wrong_request_is_explained(
    there: Receiver, control: str, path: str, body: JSON, status: int, message: str
) -> None:
    answer = httpx.post(control + path, json=body, timeout=60)

    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_the_journal_has_a_limit(there: Receiver, control: str) -> None:
    for _ in range(3):
        client.say(control, "demo-meta", "oi")

    journal = client.journal(control, limit=2)

    assert [delivery["id"] for delivery in journal["deliveries"]] == ["d3", "d2"]
    with pytest.raises(client.SandboxError, match="1 to 1000"):
        client.journal(control, limit=0)


def test_the_index_tells_every_route(control: str) -> None:
    routes = httpx.get(control).json()["routes"]

    assert {
        "method": "DELETE",
        "path": "/meta/traffic/{id}",
        "does": "End a run: what is not accepted yet is dropped.",
    } in routes
    assert all(route["does"] for route in routes)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("{", "truncated"),
        ('{"apps":[{"url":"x"}]}', "missing required field"),
        ('{"apps":[{"url":"ftp://x","app_secret":"s","verify_token":"t","channels":[]}]}', "not an http"),
        ('{"apps":[{"url":"http://x:port","app_secret":"s","verify_token":"t","channels":[]}]}', "apps[0].url"),
    ],
)
def test_an_unusable_configuration_is_explained_and_can_be_mended(
    config: Path, control: str, content: str | None, reason: str
) -> None:
    if content is not None:
        config.write_text(content)

    with pytest.raises(client.SandboxError) as refused:
        client.say(control, "demo-meta", "oi")
    health = client.health(control)

    assert refused.value.code == "UNAVAILABLE"
    assert reason in str(refused.value)
    assert reason in health["config_error"]
    write_config(config, "http://127.0.0.1:1/hook")
    assert client.health(control) == {"status": "ok", "channels": ["demo-meta"]}


def test_two_channels_of_one_name_are_refused(config: Path, control: str) -> None:
    write_config(config, "http://127.0.0.1:1/hook")
    content = json.loads(config.read_text())
    config.write_text(json.dumps({"apps": content["apps"] * 2}))

    assert "'demo-meta' is listed twice" in client.health(control)["config_error"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_in_order_while_deliveries_are_pending(config: Path, number: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    write_config(config, f"http://127.0.0.1:{port + 1 if port < 65535 else port - 1}/hook")
    command = [sys.executable, "-m", "sandbox", "--port", str(port), "--config", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        # httpx tries again with growing waits until the process listens.
        with httpx.Client(transport=httpx.HTTPTransport(retries=7)) as http:
            assert http.get(f"http://127.0.0.1:{port}/health").json()["status"] == "ok"
        client.traffic(f"http://127.0.0.1:{port}", bodies=3, seed=1)

        process.send_signal(number)
        _, printed = process.communicate()

    assert process.returncode == 0
    assert "Traceback" not in printed
