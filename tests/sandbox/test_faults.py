import gzip
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from sandbox import client
from sandbox.config import Channel
from sandbox.meta import JSON
from tests.sandbox.servers import LEAVES, Receiver, a_meta
from tests.sandbox.test_graph import CUSTOMER, a_text, accepted, refused, statuses, statuses_are_out

SHOP = Channel("shop", "880011223344556", "700100200300400")
OTHER = Channel("other", "880011223344557", "700100200300401")
BEARER = {"Authorization": "Bearer t"}
NOBODY = "+5511900000000"


@pytest.fixture(scope="module")
def running(there: Receiver) -> Iterator[str]:
    with a_meta(SHOP, OTHER, webhook_url=there.url) as address:
        yield address


@pytest.fixture
def control(running: str, there: Receiver) -> str:
    client.clear_faults(running)
    client.clear_rules(running)
    statuses_are_out(running)
    client.clear_calls(running)
    client.rules(running, statuses={"words": []})
    there.accepted.clear()
    return running


@pytest.fixture
def graph(control: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{control}/v25.0/{SHOP.phone_number_id}", headers=BEARER, trust_env=False) as http:
        yield http


@contextmanager
def asking(control: str, to: str = CUSTOMER) -> Iterator[socket.socket]:
    """A connection on which a message was asked to be sent; it has not been read from."""
    body = json.dumps(a_text(to)).encode()
    head = f"POST /v25.0/{SHOP.phone_number_id}/messages HTTP/1.1\r\nhost: x\r\nauthorization: Bearer t\r\n"
    address = urlsplit(control)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        yield connection


def last_call(control: str) -> JSON:
    """The latest call, once it has ended."""
    while client.summary(control)["in_flight"]:
        pass
    call: JSON = client.calls(control, limit=1)["calls"][0]
    return call


def fate(call: JSON) -> tuple[str, int | None, bool]:
    return call["outcome"], call["http"], call["answered"]


# What each kind does


@pytest.mark.parametrize(
    ("kind", "outcome", "status"),
    [
        ("garbage_before", "dropped_before", 200),
        ("garbage_after", "accepted", 200),
        ("html", "dropped_before", 502),
        ("html_after", "accepted", 502),
        ("outage", "dropped_before", 503),
        ("empty", "accepted", 200),
        ("redirect", "dropped_before", 302),
    ],
)
def test_an_answer_that_says_nothing_of_what_became_of_it(
    graph: httpx.Client, control: str, kind: str, outcome: str, status: int
) -> None:
    client.faults(control, kind)

    answer = graph.post("/messages", json=a_text())

    assert answer.status_code == status
    with pytest.raises(json.JSONDecodeError):
        answer.json()
    call = last_call(control)
    assert fate(call) == (outcome, status, True)
    assert (call["wamid"] is not None) is (outcome == "accepted")
    assert call["fault"] == kind
    assert client.summary(control)[outcome] == 1


def test_pages_say_what_they_are(graph: httpx.Client, control: str) -> None:
    client.faults(control, "html", http=500, retry_after=7, count=1)
    client.faults(control, "redirect", count=1)
    client.faults(control, "empty", count=1)

    html, redirect, empty = (graph.post("/messages", json=a_text()) for _ in range(3))

    assert html.status_code == 500
    assert html.headers["content-type"].startswith("text/html")
    assert html.headers["retry-after"] == "7"
    assert redirect.headers["location"] == "/moved"
    assert empty.content == b""


@pytest.mark.parametrize(("kind", "outcome"), [("reset_before", "dropped_before"), ("reset_after", "accepted")])
def test_a_reset_ends_the_connection_without_a_byte(graph: httpx.Client, control: str, kind: str, outcome: str) -> None:
    client.faults(control, kind, count=1)
    with asking(control) as connection, pytest.raises(ConnectionResetError):
        connection.recv(1)

    assert fate(last_call(control)) == (outcome, None, False)
    accepted(graph.post("/messages", json=a_text()))


@pytest.mark.parametrize(("kind", "outcome"), [("hang_before", "dropped_before"), ("hang_after", "accepted")])
def test_a_client_that_hangs_has_to_leave(graph: httpx.Client, control: str, kind: str, outcome: str) -> None:
    client.faults(control, kind, count=1)

    with pytest.raises(httpx.ReadTimeout):
        graph.post("/messages", json=a_text(), timeout=LEAVES)

    assert fate(last_call(control)) == (outcome, None, False)


def test_a_dripping_answer_is_whole_in_the_end(graph: httpx.Client, control: str) -> None:
    client.faults(control, "drip", ms=0, count=1)

    with graph.stream("POST", "/messages", json=a_text()) as answer:
        pieces = list(answer.iter_raw())

    assert json.loads(b"".join(pieces))["messages"]
    assert len(pieces) > 1
    assert fate(last_call(control)) == ("accepted", 200, True)


def test_a_dripping_answer_need_not_be_heard_out(graph: httpx.Client, control: str) -> None:
    client.faults(control, "drip", ms=3_600_000, count=1)

    with pytest.raises(httpx.ReadTimeout):
        graph.post("/messages", json=a_text(), timeout=LEAVES)

    assert fate(last_call(control)) == ("accepted", 200, False)


def test_a_huge_answer_is_over_a_mebibyte(graph: httpx.Client, control: str) -> None:
    client.faults(control, "huge")

    answer = graph.post("/messages", json=a_text())

    assert len(answer.content) > 2**20
    assert answer.json()["messages"][0]["id"] == last_call(control)["wamid"]


def test_an_answer_is_compressed_though_nobody_asked(graph: httpx.Client, control: str) -> None:
    client.faults(control, "gzip")

    with graph.stream("POST", "/messages", json=a_text(), headers={"Accept-Encoding": "identity"}) as answer:
        raw = b"".join(answer.iter_raw())

    assert answer.headers["content-encoding"] == "gzip"
    assert json.loads(gzip.decompress(raw))["messages"][0]["id"] == last_call(control)["wamid"]


@pytest.mark.parametrize(
    ("code", "status"), [(None, 500), (0, 401), (4, 400), (190, 401), (230, 403), (131016, 500), (999, 400)]
)
def test_a_call_is_refused_with_any_code(graph: httpx.Client, control: str, code: int | None, status: int) -> None:
    client.faults(control, "code", code=code)

    answer = graph.post("/messages", json=a_text())

    assert refused(answer) == (status, 131000 if code is None else code)
    assert fate(last_call(control)) == ("refused", status, True)


def test_a_refusal_can_be_put_in_detail(graph: httpx.Client, control: str) -> None:
    client.faults(control, "code", code=130429, subcode=5, http=429, details="slow down", retry_after=3)

    answer = graph.post("/messages", json=a_text())

    error = answer.json()["error"]
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert error["message"] == "(#130429) Rate limit hit"
    assert error["error_subcode"] == 5
    assert error["error_data"] == {"messaging_product": "whatsapp", "details": "slow down"}
    assert client.summary(control)["rate_refusals"] == {}  # it was not the number's rate


def test_an_accepted_message_can_fail_later(graph: httpx.Client, control: str, there: Receiver) -> None:
    client.rules(control, statuses={"delay": [0, 0]})
    client.faults(control, "failed_status", code=131049, count=1)

    wamid = accepted(graph.post("/messages", json=a_text(biz_opaque_callback_data="out:9")))["messages"][0]["id"]

    statuses_are_out(control)
    (failed,) = statuses(there)
    assert (failed["id"], failed["status"]) == (wamid, "failed")
    assert failed["errors"][0]["code"] == 131049
    assert failed["biz_opaque_callback_data"] == "out:9"
    assert "contacts" not in json.loads(there.accepted[0])["entry"][0]["changes"][0]["value"]


def test_what_graph_refuses_is_answered_plainly(graph: httpx.Client, control: str) -> None:
    client.faults(control, "reset_after")

    assert refused(graph.post("/messages", json=a_text("5511944440001"))) == (400, 131009)


# Latency


def test_latencies_add_up_beside_another_fault(graph: httpx.Client, control: str) -> None:
    client.faults(control, "latency", ms=30)
    client.faults(control, "code", code=4)
    client.faults(control, "latency", ms=40)
    began = time.monotonic()

    assert refused(graph.post("/messages", json=a_text())) == (400, 4)

    assert time.monotonic() - began >= 0.07
    assert last_call(control)["fault"] == "code"
    assert [fault["met"] for fault in client.faults(control)["faults"]] == [1, 1, 1]


def test_a_client_may_leave_before_a_slow_answer(graph: httpx.Client, control: str, there: Receiver) -> None:
    client.rules(control, statuses={"delay": [0, 0]})
    client.faults(control, "latency", ms=3_600_000, count=1)

    with pytest.raises(httpx.ReadTimeout):
        graph.post("/messages", json=a_text(), timeout=LEAVES)

    call = last_call(control)
    assert (call["fault"], *fate(call)) == ("latency", "accepted", None, False)
    statuses_are_out(control)
    assert len(statuses(there)) == 3


def test_statuses_can_come_before_the_answer(control: str, there: Receiver) -> None:
    client.rules(control, statuses={"delay": [0, 0]})
    client.faults(control, "hang_after", count=1)

    with asking(control):
        while len(statuses(there)) < 3:
            assert client.calls(control)["calls"][0]["answered"] is False
        assert client.summary(control)["in_flight"] == 1


def test_a_call_that_breaks_off_is_no_call(graph: httpx.Client, control: str) -> None:
    address = urlsplit(control)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(b"POST /v25.0/1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")

    accepted(graph.post("/messages", json=a_text()))

    assert len(client.calls(control)["calls"]) == 1


# Open calls


def test_two_open_calls_for_one_recipient_are_counted(control: str) -> None:
    client.faults(control, "hang_after")

    with asking(control), asking(control), asking(control, "+5511944440002"):
        while client.summary(control)["in_flight"] < 3:
            pass

    assert client.summary(control)["max_in_flight_per_recipient"] == 2


def test_a_client_that_left_does_not_count_as_open(graph: httpx.Client, control: str) -> None:
    client.faults(control, "hang_after", count=1)
    with pytest.raises(httpx.ReadTimeout):
        graph.post("/messages", json=a_text(), timeout=LEAVES)

    accepted(graph.post("/messages", json=a_text()))

    assert client.summary(control)["max_in_flight_per_recipient"] == 1


def test_the_sandbox_ends_though_a_client_hangs() -> None:
    with ThreadPoolExecutor(1) as pool:
        with a_meta(SHOP) as control:
            client.faults(control, "hang_before")
            url = f"{control}/v25.0/{SHOP.phone_number_id}/messages"
            hanging = pool.submit(httpx.post, url, json=a_text(), headers=BEARER, timeout=60)
            while not client.summary(control)["in_flight"]:
                pass

        with pytest.raises(httpx.TransportError):
            hanging.result()


# Which calls meet which fault


def kinds_met(control: str) -> list[str | None]:
    return [call["fault"] for call in client.calls(control)["calls"]]


def test_the_first_that_fits_wins_and_ends_with_its_count(graph: httpx.Client, control: str) -> None:
    client.faults(control, "html", count=2)
    client.faults(control, "outage", count=1)

    for _ in range(4):
        graph.post("/messages", json=a_text())

    assert kinds_met(control) == ["html", "html", "outage", None]
    assert client.faults(control) == {"faults": []}


def test_a_fault_ends_with_its_time(graph: httpx.Client, control: str) -> None:
    client.faults(control, "outage", seconds=0.05)

    while graph.post("/messages", json=a_text()).status_code != 200:
        pass

    assert client.faults(control) == {"faults": []}


def test_clearing_ends_an_outage(graph: httpx.Client, control: str) -> None:
    client.faults(control, "outage")
    assert graph.post("/messages", json=a_text()).status_code == 503

    assert client.clear_faults(control) == {"faults": []}

    accepted(graph.post("/messages", json=a_text()))


def test_the_same_seed_meets_the_same_calls(graph: httpx.Client, control: str) -> None:
    runs = []
    for seed in (1, 1, 2):
        client.clear_faults(control)
        client.clear_calls(control)
        client.faults(control, "code", share=0.5, seed=seed)
        for _ in range(40):
            graph.post("/messages", json=a_text())
        runs.append(kinds_met(control))

    assert runs[0] == runs[1] != runs[2]
    assert 0 < runs[0].count("code") < 40


def test_a_fault_can_be_for_one_channel_or_one_recipient(graph: httpx.Client, control: str) -> None:
    client.faults(control, "html", channel="other")
    client.faults(control, "outage", to=NOBODY.lstrip("+"))

    graph.post("/messages", json=a_text())
    graph.post("/messages", json=a_text(NOBODY))
    graph.post(f"{control}/v25.0/{OTHER.phone_number_id}/messages", json=a_text())
    graph.post("/messages", json={"messaging_product": "whatsapp", "status": "read", "message_id": "wamid.1"})

    assert kinds_met(control) == [None, "outage", "html", None]


def test_an_outage_is_one_for_templates_too(graph: httpx.Client, control: str) -> None:
    url = f"{control}/v25.0/{SHOP.waba_id}/message_templates"
    client.faults(control, "code", count=1)
    assert accepted(graph.get(url)) == {"data": []}

    client.faults(control, "outage", channel="shop")

    assert graph.get(url).status_code == 503


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"kind": "meteor"}, "meteor"),
        ({"kind": "code", "share": 2}, "share"),
        ({"kind": "code", "count": 0}, "count"),
        ({"kind": "code", "channel": "nobody"}, "no channel 'nobody'"),
        ({"kind": "code", "colour": "red"}, "colour"),
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(control: str, fault: dict[str, Any], reason: str) -> None:
    with pytest.raises(client.SandboxError, match=reason):
        client.faults(control, **fault)

    assert client.faults(control) == {"faults": []}


def test_the_list_tells_what_is_set(graph: httpx.Client, control: str) -> None:
    set_ = client.faults(control, "code", code=131056, channel="shop", count=3)
    graph.post("/messages", json=a_text())

    assert client.faults(control)["faults"] == [
        {"id": set_["id"], "kind": "code", "code": 131056, "channel": "shop", "count": 3, "met": 1}
    ]
