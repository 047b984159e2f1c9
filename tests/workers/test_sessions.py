"""The steps of sessions at a gateway that says anything; processes that die, and wishes that change meanwhile."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from uuid import uuid4

import pytest

from models import Channel, Tenant, WaSession
from models.session import CLAIM
from pombal.broker import HardenedBroker, broker
from pombal.ids import uuid7
from providers.stub import new_picture
from tests.factories import a_tenant, all_of, seen_by, superuser
from tests.workers.tools import in_background, together, until
from workers._circuit import FILES, PAUSE
from workers._standing import write
from workers.channel_session import LINGERS, LOOK, PATIENCE, REFRESH, channel_session, circuit, ring_sessions

pytestmark = pytest.mark.usefixtures("queues", "_near_gateways")

KEY, TOKEN = "megastart-a-key", "a-token-that-nobody-may-see"


class Line(NamedTuple):
    """A channel of some kind, and its tenant."""

    tenant: Tenant
    channel: Channel

    def ids(self) -> tuple[str, str]:
        return str(self.tenant.id), str(self.channel.id)


def a_line(kind: str = "stub", tenant: Tenant | None = None, host: str = "") -> Line:
    tenant = tenant or a_tenant()
    config = {"host": host, "instance_key": KEY, "token_kind": "instance"} if kind == "megaapi" else {}
    channel = Channel(id=uuid7(), tenant_id=tenant.id, kind=kind, name=f"c{uuid4().hex[:8]}", config=config)
    if kind == "megaapi":
        channel.seal({"token": TOKEN})
    with seen_by(tenant) as s:
        s.add(channel)
    return Line(tenant, channel)


def found(line: Line, query: str, **values: Any) -> list[dict[str, Any]]:
    with seen_by(line.tenant) as s:
        return all_of(s, query, channel=line.channel.id, **values)


def session_of(line: Line) -> dict[str, Any]:
    (row,) = found(line, "SELECT * FROM session WHERE channel_id = :channel")
    return row


def channel_of(line: Line) -> dict[str, Any]:
    (row,) = found(line, "SELECT * FROM channel WHERE id = :channel")
    return row


def told(line: Line) -> list[str]:
    """What listeners were told of the session, in order."""
    query = """
        SELECT CASE type WHEN 'qrcode' THEN 'picture' ELSE payload ->> 'state' END AS word, payload FROM event
        WHERE channel_id = :channel AND type IN ('session_status', 'qrcode') ORDER BY id
    """
    rows = found(line, query)
    assert all(row["payload"]["channel"] == str(line.channel.id) for row in rows)
    return [row["word"] for row in rows]


def elapse(line: Line, seconds: float) -> None:
    """So much time passes for this session."""
    times = ("state_since", "wished_at", "next_step_at", "next_ring_at", "qr_at")
    earlier = ", ".join(f"{name} = {name} - make_interval(secs => :seconds)" for name in times)
    found(line, f"UPDATE session SET {earlier} WHERE channel_id = :channel RETURNING 1", seconds=seconds)  # noqa: S608 - constants


def wish_start(line: Line) -> None:
    with seen_by(line.tenant) as s:
        WaSession.start(s, line.tenant.id, line.channel.id, is_connected=False)


def wish_stop(line: Line) -> None:
    with seen_by(line.tenant) as s:
        WaSession.stop(s, line.tenant.id, line.channel.id, is_connected=True)


def step(line: Line) -> dict[str, Any]:
    """One job; the session afterwards."""
    channel_session(*line.ids())
    return session_of(line)


def wait_of(line: Line) -> float:
    """Seconds until the next step."""
    query = "SELECT extract(epoch FROM next_step_at - now())::float8 AS wait FROM session WHERE channel_id = :channel"
    (row,) = found(line, query)
    return float(row["wait"])


# ------------------------------------------------------------------------------------------------- a gateway of our own


class Gateway(ThreadingHTTPServer):
    """One instance of MegaAPI's that does what the test says, and notes the calls (megaapi.md, "Endpoints")."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.host = f"http://127.0.0.1:{self.server_port}"
        self.status = "disconnected"
        self.is_paired = False
        self.broken: dict[str, tuple[int, Any]] = {}  # by the last word of the path
        self.is_cut_off = False  # every connection ends without an answer
        self.calls: list[str] = []
        self.gate = threading.Event()  # every answer waits for it
        self.gate.set()

    def said(self, call: str) -> tuple[int, Any]:
        word = call.split()[1].split("/")[-2 if call.startswith("DELETE") else 3]
        if call.startswith("DELETE"):
            word = call.rpartition("/")[2]
        self.calls.append(word if word != KEY else "status")
        self.gate.wait(60)
        if self.calls[-1] in self.broken:
            return self.broken[self.calls[-1]]
        match word:
            case "qrcode_base64" if self.is_paired:
                return 200, {"error": False, "message": "User is already logged in"}
            case "qrcode_base64":
                picture = base64.b64encode(new_picture().content).decode()
                return 200, {"error": False, "qrcode": f"data:image/png;base64,{picture}"}
            case "logout":
                self.status, self.is_paired = "disconnected", False
                return 200, {"error": False, "message": "Logged out"}
            case "restart":
                return 200, {"error": False, "message": "Restarted"}
        instance = {"key": KEY, "status": self.status, "user": {"id": "5511955550200:12@s.whatsapp.net"}}
        return 200, {"error": False, "message": "Instance data fetched", "instance": instance}

    def scan(self) -> None:
        self.status, self.is_paired = "connected", True


class _Handler(BaseHTTPRequestHandler):
    server: Gateway

    def do_GET(self) -> None:
        assert self.headers["Authorization"] == f"Bearer {TOKEN}"
        status, body = self.server.said(f"{self.command} {self.path}")
        if self.server.is_cut_off:
            self.close_connection = True
            return
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_DELETE = do_GET

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""


@contextmanager
def a_gateway() -> Iterator[Gateway]:
    gateway = Gateway()
    thread = threading.Thread(target=gateway.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield gateway
    finally:
        gateway.gate.set()
        gateway.shutdown()
        thread.join()
        gateway.server_close()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with a_gateway() as gateway:
        yield gateway


# --------------------------------------------------------------------------------------------------------- at a gateway


def test_a_session_is_started_by_a_scan(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    wish_start(line)

    shown = step(line)
    assert (shown["state"], shown["wish"], shown["qr_type"]) == ("qrcode", "start", "image/png")
    assert channel_of(line)["status"] == "disconnected"

    gateway.scan()
    elapse(line, LOOK)
    done = step(line)

    assert (done["state"], done["wish"], done["next_step_at"], done["qr"]) == ("ready", None, None, None)
    assert told(line) == ["connecting", "qrcode", "picture", "authenticated", "ready"]
    row = channel_of(line)
    assert (row["status"], row["status_raw"], row["own_id"]) == ("connected", "connected", "5511955550200")


def test_an_instance_that_is_connected_already_is_ready_without_a_picture(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    gateway.scan()
    wish_start(line)

    assert step(line)["state"] == "ready"

    assert told(line) == ["connecting", "ready"]
    assert gateway.calls == ["status"]


def test_the_picture_is_another_one_every_twenty_seconds(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    wish_start(line)
    first = step(line)["qr"]

    elapse(line, LOOK)
    assert step(line)["qr"] == first
    elapse(line, REFRESH)
    assert step(line)["qr"] != first

    assert told(line) == ["connecting", "qrcode", "picture", "picture"]
    assert gateway.calls == ["status", "qrcode_base64", "status", "status", "qrcode_base64"]


def test_a_picture_that_nobody_scans_is_given_up(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    wish_start(line)
    step(line)

    elapse(line, PATIENCE)
    given_up = step(line)

    assert (given_up["state"], given_up["wish"], given_up["qr"]) == ("disconnected", None, None)
    assert given_up["error_code"] == "qr_expired"
    assert told(line)[-1] == "disconnected"
    wish_start(line)
    assert session_of(line)["error_code"] is None
    assert step(line)["state"] == "qrcode"


def test_an_instance_that_is_paired_and_not_connected_is_restarted(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    gateway.is_paired = True
    wish_start(line)

    assert step(line)["state"] == "connecting"
    assert gateway.calls == ["status", "qrcode_base64", "restart"]
    gateway.scan()
    elapse(line, 20)

    assert step(line)["state"] == "ready"


def test_a_failure_is_shown_and_the_wish_is_not_lost(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    gateway.broken["qrcode_base64"] = (401, {"name": "UNAUTHORIZED", "message": "no", "status": 401, "errors": []})
    wish_start(line)
    waits = []
    for attempts in (1, 2, 3):
        failed = step(line)
        assert (failed["state"], failed["wish"], failed["error_code"]) == ("connecting", "start", "refused")
        assert failed["attempts"] == attempts
        assert TOKEN not in failed["error"]
        waits.append(wait_of(line))
        elapse(line, 400)
    assert waits == sorted(waits)

    gateway.broken.clear()

    shown = step(line)
    assert (shown["state"], shown["attempts"], shown["error_code"]) == ("qrcode", 0, None)


def test_a_gateway_that_is_away_is_asked_again_soon(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    gateway.broken["status"] = (500, {"error": True, "message": "down"})
    wish_start(line)

    failed = step(line)

    assert (failed["state"], failed["error_code"], failed["attempts"]) == ("connecting", "provider_error", 1)
    assert wait_of(line) < 10
    row = channel_of(line)
    assert (row["status"], row["unknown_reason"]) == (None, "provider_error")


def test_to_start_it_again_does_not_wait_for_the_backoff(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    gateway.broken["status"] = (404, {"name": "NOT_FOUND", "message": "Instance not found", "status": 404})
    wish_start(line)
    step(line)
    assert wait_of(line) > 5
    gateway.broken.clear()

    wish_start(line)

    assert step(line)["state"] == "qrcode"
    assert told(line).count("connecting") == 1


def test_a_session_is_ended_by_a_logout(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    gateway.scan()
    wish_start(line)
    step(line)
    gateway.calls.clear()

    wish_stop(line)
    ended = step(line)

    assert gateway.calls == ["logout", "status"]
    assert (ended["state"], ended["wish"]) == ("disconnected", None)
    assert channel_of(line)["status"] == "disconnected"
    wish_stop(line)
    assert (step(line)["state"], session_of(line)["wish"]) == ("disconnected", None)
    assert told(line) == ["connecting", "ready", "disconnected"]


def test_an_instance_that_is_disconnected_and_still_paired_is_logged_out(gateway: Gateway) -> None:
    """It would connect again by itself."""
    line = a_line("megaapi", host=gateway.host)
    gateway.scan()
    wish_start(line)
    step(line)
    gateway.status = "disconnected"

    wish_stop(line)
    ended = step(line)

    assert (ended["state"], ended["wish"]) == ("disconnected", None)
    assert not gateway.is_paired


@pytest.mark.parametrize("answer", [(400, {"error": True, "message": "not logged in"}), (500, {"error": True})])
def test_a_logout_that_is_refused_is_done_where_nobody_is_logged_in(gateway: Gateway, answer: tuple[int, Any]) -> None:
    line = a_line("megaapi", host=gateway.host)
    gateway.broken["logout"] = answer
    gateway.is_paired = True

    wish_stop(line)
    assert step(line)["wish"] == "stop"  # paired: it may connect again
    gateway.is_paired = False
    elapse(line, 60)
    ended = step(line)

    assert (ended["state"], ended["wish"], ended["error_code"]) == ("disconnected", None, None)


def test_a_gateway_that_notices_its_logout_late_is_looked_at_again(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    gateway.scan()
    wish_start(line)
    step(line)
    gateway.broken["logout"] = (200, {"error": False, "message": "Logged out"})

    wish_stop(line)
    waits = step(line)
    assert (waits["state"], waits["wish"], waits["error_code"]) == ("ready", "stop", "still_connected")
    gateway.broken.clear()
    elapse(line, LOOK)
    ended = step(line)

    assert (ended["state"], ended["wish"], ended["error_code"]) == ("disconnected", None, None)
    assert told(line) == ["connecting", "ready", "disconnected"]


def test_a_session_whose_logout_does_nothing_says_that_it_is_connected(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    gateway.scan()
    wish_start(line)
    step(line)
    gateway.broken["logout"] = (200, {"error": False, "message": "Logged out"})
    wish_stop(line)
    elapse(line, LINGERS)
    assert step(line)["wish"] == "stop"  # it took a while to come to a logout: that gets a second look all the same

    elapse(line, LINGERS)
    given_up = step(line)

    assert (given_up["state"], given_up["wish"], given_up["error_code"]) == ("ready", None, "still_connected")
    assert channel_of(line)["status"] == "connected"


def test_what_the_gateway_does_not_say_after_a_logout_is_unknown(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    gateway.scan()
    wish_start(line)
    step(line)
    gateway.broken["status"] = (404, {"name": "NOT_FOUND", "message": "Instance not found", "status": 404})

    wish_stop(line)

    assert step(line)["state"] == "disconnected"
    row = channel_of(line)
    assert (row["status"], row["unknown_reason"]) == ("connected", "not_found")


def test_a_logout_that_fails_is_tried_again(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    gateway.scan()
    gateway.broken["logout"] = (500, {"error": True, "message": "down"})
    wish_stop(line)

    failed = step(line)
    assert (failed["state"], failed["wish"], failed["error_code"]) == ("ready", "stop", "provider_error")

    gateway.broken.clear()
    elapse(line, 60)
    assert step(line)["state"] == "disconnected"
    assert gateway.status == "disconnected"


# ------------------------------------------------------------------------------------- what happens beside and between


def test_a_channel_that_is_heard_to_be_connected_brings_its_session_along(gateway: Gateway) -> None:
    """A webhook's check may see it before the next look does."""
    line = a_line("megaapi", host=gateway.host)
    wish_start(line)
    step(line)

    hear(line, "connected")

    after = session_of(line)
    assert (after["state"], after["wish"], after["next_step_at"], after["qr"]) == ("ready", None, None, None)
    hear(line, "disconnected")
    assert session_of(line)["state"] == "disconnected"
    hear(line, "connected")
    assert told(line)[3:] == ["authenticated", "ready", "disconnected", "ready"]


def test_a_session_that_says_otherwise_than_its_channel_is_repaired() -> None:
    apart, wished, unknown = (a_line("megaapi", host="https://nowhere.invalid") for _ in range(3))
    for line in (apart, wished, unknown):
        wish_start(line)
        hear(line, "connected")
        found(line, "UPDATE session SET state = 'disconnected' WHERE channel_id = :channel RETURNING 1")
    wish_stop(wished)
    hear(unknown, None)

    for line in (apart, wished, unknown):
        with seen_by(line.tenant) as s:
            assert WaSession.repair(s) == (line is apart)

    assert [session_of(line)["state"] for line in (apart, wished, unknown)] == ["ready", "disconnected", "disconnected"]
    assert told(apart) == ["connecting", "ready", "ready"]
    found(apart, "UPDATE channel SET status = 'disconnected' WHERE id = :channel RETURNING 1")
    with seen_by(apart.tenant) as s:
        assert [WaSession.repair(s), WaSession.repair(s)] == [1, 0]
    assert session_of(apart)["state"] == "disconnected"


def test_a_channel_without_a_session_row_gets_none() -> None:
    line = a_line("megaapi", host="https://nowhere.invalid")

    hear(line, "connected")

    assert found(line, "SELECT * FROM session WHERE channel_id = :channel") == []


def test_an_answer_that_says_nothing_changes_no_session(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    gateway.scan()
    wish_start(line)
    step(line)

    hear(line, None)

    assert session_of(line)["state"] == "ready"


def test_a_step_that_is_under_way_undoes_nothing_that_was_heard_meanwhile(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    wish_start(line)
    gateway.gate.clear()
    running = in_background(lambda: step(line))
    until(lambda: gateway.calls, "the step's call")

    hear(line, "connected")
    gateway.gate.set()
    running()

    after = session_of(line)
    assert (after["state"], after["wish"], after["claim_token"], after["next_step_at"]) == ("ready", None, None, None)
    assert told(line) == ["connecting", "ready"]


def test_a_step_whose_wish_is_done_by_what_was_heard_is_not_made_anew(gateway: Gateway) -> None:
    """Its process died; and the phone that was connected meanwhile drops."""
    line = a_line("megaapi", host=gateway.host)
    gateway.is_paired = True
    wish_start(line)
    with seen_by(line.tenant) as s:
        assert WaSession.claim(s, line.tenant.id, line.channel.id, uuid4()) is not None

    hear(line, "connected")
    after = session_of(line)
    assert (after["wish"], after["claim_token"], after["next_step_at"]) == (None, None, None)
    elapse(line, CLAIM.total_seconds())
    found(line, "UPDATE session SET next_step_at = now() WHERE channel_id = :channel RETURNING 1")

    step(line)
    assert gateway.calls == []
    assert str(line.channel.id) not in rung(at_once=True)


def test_what_a_step_heard_is_not_undone_by_a_poll_that_was_asked_before_it(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    gateway.scan()
    wish_start(line)
    step(line)
    asked_at = now(line)

    wish_start(line)
    step(line)  # connected: no news
    hear(line, "disconnected", asked_at)

    assert channel_of(line)["status"] == "connected"
    assert session_of(line)["state"] == "ready"


def test_a_host_that_does_not_answer_takes_no_threads(gateway: Gateway) -> None:
    tenant = a_tenant()
    lines = [a_line("megaapi", tenant, gateway.host) for _ in range(FILES + 1)]
    for line in lines:
        wish_start(line)
    gateway.is_cut_off = True
    for line in lines[:FILES]:
        assert step(line)["error_code"] == "unreachable"
    gateway.calls.clear()

    waits = step(lines[-1])
    assert (waits["wish"], waits["error_code"]) == ("start", "paused")
    assert wait_of(lines[-1]) > PAUSE - 10
    assert gateway.calls == []
    gateway.is_cut_off = False
    circuit.answered(gateway.host)  # as a probe finds out
    elapse(lines[-1], 2 * PAUSE)

    assert step(lines[-1])["state"] == "qrcode"


def test_the_latest_wish_counts(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    gateway.scan()
    wish_start(line)
    gateway.gate.clear()
    running = in_background(lambda: step(line))
    until(lambda: gateway.calls, "the step's call")

    wish_stop(line)
    channel_session(*line.ids())  # the bell of the new wish: the step before it has not ended
    assert gateway.calls == ["status"]
    gateway.gate.set()
    running()

    assert (session_of(line)["state"], session_of(line)["wish"]) == ("disconnected", None)
    assert gateway.status == "disconnected"


def test_two_jobs_at_once_make_one_step(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    wish_start(line)

    together(*[lambda: channel_session(*line.ids())] * 4)

    assert gateway.calls == ["status", "qrcode_base64"]


def test_a_process_that_is_killed_in_a_step_is_replaced(gateway: Gateway) -> None:
    line = a_line("megaapi", host=gateway.host)
    wish_start(line)
    gateway.gate.clear()
    command = [sys.executable, "-m", "pombal", "run", "channel_session", json.dumps(line.ids())]
    with subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until(lambda: gateway.calls, "the step's call")
        os.kill(process.pid, signal.SIGKILL)
    gateway.gate.set()
    gateway.calls.clear()

    channel_session(*line.ids())
    assert gateway.calls == []  # nobody knows yet that it is dead
    elapse(line, CLAIM.total_seconds())
    assert str(line.channel.id) in rung()

    assert step(line)["state"] == "qrcode"


def test_the_sweep_rings_once_for_what_is_due() -> None:
    due, later = a_line(), a_line()
    for line in (due, later):
        wish_start(line)
        elapse(line, 10)
    elapse(later, -60)

    first, second = rung(), rung()

    assert str(due.channel.id) in first
    assert str(later.channel.id) not in first
    assert str(due.channel.id) not in second
    assert str(due.channel.id) in rung(at_once=True)


def test_a_channel_that_is_gone_is_no_trouble() -> None:
    line = a_line()
    wish_start(line)
    with superuser() as connection:
        connection.execute("DELETE FROM channel WHERE id = %s", [line.channel.id])

    channel_session(*line.ids())


def now(line: Line) -> datetime:
    """By the database's clock."""
    with seen_by(line.tenant) as s:
        (row,) = all_of(s, "SELECT clock_timestamp() AS now")
    at: datetime = row["now"]
    return at


def hear(line: Line, status: str | None, asked_at: datetime | None = None) -> None:
    """A poll or the check after a webhook found this."""
    asked_at = asked_at or now(line)
    with seen_by(line.tenant) as s:
        reason = None if status else "timeout"
        said = {"tenant_id": line.tenant.id, "id": line.channel.id, "asked_at": asked_at, "status": status}
        write(s, [{**said, "raw": status or "", "reason": reason, "own_id": None}])


def rung(*, at_once: bool = False) -> list[str]:
    """The channels that a round of the sweep rings for."""
    assert isinstance(broker, HardenedBroker)
    broker.flush("channel_session")
    ring_sessions(at_once=at_once)
    messages: Any = broker.client.hvals(f"{broker.namespace}:channel_session.msgs")
    return [json.loads(message)["args"][1] for message in messages]
