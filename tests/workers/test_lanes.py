"""What the sending worker promises, counted: the journal of a simulated Meta against our rows.

Faults are the sandbox's, the database's or the kernel's. Waits are ended by `make_due`, as if their time had come.
"""

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import dramatiq
import pytest
import redis
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from models import Channel, Hold, Lane, outgoing
from pombal import db, metrics
from pombal.settings import settings
from sandbox import client
from sandbox import meta as meta_says
from tests.factories import Shop, a_shop, body_of, rows, superuser, texts
from tests.pombal.processes import running
from tests.sandbox.servers import serve
from tests.workers.lost_commits import lost_commits
from tests.workers.sending import (
    SOMEBODY,
    TOKEN,
    Meta,
    a_number_at_meta,
    another_process,
    attempts,
    configure,
    count_of,
    events,
    finish,
    graph_is_at,
    lane,
    lease_runs_out,
    letters,
    make_due,
    message,
    numbers_at_meta,
    queue,
    report,
    send,
    statuses,
    their_time_comes,
)
from tests.workers.tools import another_number, deliveries, in_background, run, states, together, until
from workers import broker
from workers._lanes import Lanes
from workers.outgoing_message import ring

pytestmark = pytest.mark.usefixtures("queues")

OTHER = "+5511944440002"
PATIENCE = 60.0


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meta]:
    with a_number_at_meta(monkeypatch) as meta:
        configure(meta.shop, messages_per_second=1_000)
        yield meta


def people(count: int) -> list[str]:
    return [f"+55119{n:08}" for n in range(60_000_000, 60_000_000 + count)]


def outcomes(shop: Shop, id_: UUID) -> list[str]:
    return [attempt["outcome"] for attempt in attempts(shop, id_)]


def callback(shop: Shop, id_: UUID, number: int = 1) -> str:
    return f"out:{attempts(shop, id_)[number - 1]['id'].hex}"


def rung() -> int:
    """Bells that wait in the queue."""
    return broker.waiting("outgoing_message")  # type: ignore[union-attr] # ours, not the stub


# -- once ------------------------------------------------------------------------------------------------------------


def test_fifty_jobs_at_once_make_one_call_per_message(meta: Meta) -> None:
    client.faults(meta.url, kind="latency", ms=20)
    for n, whom in enumerate(people(10)):
        queue(meta.shop, *(f"{n}-{m}" for m in range(4)), to=whom)
    with another_process() as (one, _), another_process() as (two, _):
        jobs: list[Callable[[], None]] = [partial(send, meta.shop)] * 10
        jobs += [lambda: one.wake(meta.shop.channel.id).result(PATIENCE)] * 20
        jobs += [lambda: two.wake(meta.shop.channel.id).result(PATIENCE)] * 20

        together(*jobs)

    finish(meta.shop)
    told = client.summary(meta.url)
    assert (told["calls"], told["accepted"], told["by_text_max"], told["max_in_flight_per_recipient"]) == (40, 40, 1, 1)
    assert statuses(meta.shop) == ["sent"] * 40
    assert {call["wamid"] for call in meta.calls()} == {
        row["provider_id"] for row in rows(meta.shop, "SELECT provider_id FROM message")
    }


def test_a_message_is_cancelled_or_sent_and_never_both(meta: Meta) -> None:
    ids = [queue(meta.shop, str(n), to=whom)[0] for n, whom in enumerate(people(40))]

    def cancel(some: list[UUID]) -> list[tuple[str, bool] | None]:
        answers = []
        for id_ in some:
            with db.session([meta.shop.tenant.id]) as s:
                answers.append(outgoing.cancel(s, meta.shop.tenant.id, id_))
        return answers

    _, *halves = together(partial(send, meta.shop), partial(cancel, ids[:20]), partial(cancel, ids[:19:-1]))

    finish(meta.shop)
    answers = dict(zip([*ids[:20], *ids[:19:-1]], [*halves[0], *halves[1]], strict=True))
    for n, id_ in enumerate(ids):
        status = message(meta.shop, id_)["status"]
        calls = meta.accepted().count(str(n))
        assert answers[id_] == (status, True) if status == "cancelled" else answers[id_] is not None
        assert (status, calls) in (("cancelled", 0), ("sent", 1))


# -- a holder that dies, or is thought dead --------------------------------------------------------------------------


@pytest.fixture
def killed(meta: Meta, tmp_path: Path) -> tuple[Meta, UUID]:
    """Meta accepted a message, and before it answered the process that sent it was killed."""
    (id_,) = queue(meta.shop, "um")
    client.faults(meta.url, kind="hang_after", count=1)
    job = ("-m", "pombal", "run", "outgoing_message", f'["{meta.shop.channel.id}"]')
    with running(*job, env={"WHATSAPP_GRAPH_URL": meta.url}, log=tmp_path / "child.log") as child:
        until(lambda: meta.accepted() or not child.alive(), "the call")
        assert child.alive(), child.text()
        child.tell_group(signal.SIGKILL)
        child.code()
    return meta, id_


def test_what_a_killed_process_was_sending_is_unknown_once_its_lease_ran_out(killed: tuple[Meta, UUID]) -> None:
    meta, id_ = killed

    send(meta.shop)
    assert message(meta.shop, id_)["status"] == "sending"  # it may be alive: nobody else has the lane yet

    lease_runs_out(meta.shop)
    send(meta.shop)

    stored = message(meta.shop, id_)
    assert (stored["status"], stored["unknowns"], outcomes(meta.shop, id_)) == ("unknown", 1, ["unknown"])
    assert len(meta.calls()) == 1
    assert events(meta.shop, id_)[-1] == "unknown"
    assert lane(meta.shop)["token"] is None


def test_a_status_tells_what_became_of_it(killed: tuple[Meta, UUID]) -> None:
    meta, id_ = killed
    (call,) = meta.calls()
    lease_runs_out(meta.shop)
    send(meta.shop)

    report(meta.shop, call["wamid"], "sent", "delivered", callback=call["callback"])
    finish(meta.shop)

    (attempt,) = attempts(meta.shop, id_)
    assert (attempt["outcome"], attempt["settled_by"]) == ("accepted", "status")
    assert message(meta.shop, id_)["status"] == "delivered"
    assert len(meta.calls()) == 1


def test_a_status_may_tell_it_before_anybody_has_noticed_the_death(killed: tuple[Meta, UUID]) -> None:
    meta, id_ = killed
    (call,) = meta.calls()

    report(meta.shop, call["wamid"], "sent", callback=call["callback"])
    lease_runs_out(meta.shop)
    finish(meta.shop)

    assert message(meta.shop, id_)["status"] == "sent"
    assert len(meta.calls()) == 1


def test_without_a_status_it_is_sent_once_more(killed: tuple[Meta, UUID]) -> None:
    meta, id_ = killed
    lease_runs_out(meta.shop)
    send(meta.shop)

    finish(meta.shop)

    assert outcomes(meta.shop, id_) == ["unknown", "accepted"]
    assert message(meta.shop, id_)["provider_id"] == meta.calls()[1]["wamid"]
    assert len(meta.calls()) == 2


@pytest.mark.parametrize(
    ("fault", "status", "outcome"),
    [(None, "sent", "accepted"), ({"kind": "code", "code": 131026}, "failed", "refused")],
    ids=["accepted", "refused"],
)
def test_a_late_answer_of_an_old_holder_counts(
    meta: Meta, fault: dict[str, Any] | None, status: str, outcome: str
) -> None:
    (id_,) = queue(meta.shop, "um")
    queue(meta.shop, "dois")
    client.faults(meta.url, kind="latency", ms=2_000, count=1)
    if fault:
        client.faults(meta.url, **fault, count=1)
    with another_process() as (old, _):
        late = old.wake(meta.shop.channel.id)
        until(meta.calls, "the call")
        lease_runs_out(meta.shop)
        send(meta.shop)
        assert message(meta.shop, id_)["status"] == "unknown"

        late.result(PATIENCE)

    assert (message(meta.shop, id_)["status"], outcomes(meta.shop, id_)) == (status, [outcome])
    assert len(meta.calls()) == 1  # who lost the lane begins nothing more
    finish(meta.shop)
    assert [call["text"] for call in meta.calls()] == ["um", "dois"]


def test_an_old_holder_that_got_no_answer_either_tells_nothing_new(meta: Meta) -> None:
    (id_,) = queue(meta.shop, "um")
    client.faults(meta.url, kind="latency", ms=2_000, count=1)
    client.faults(meta.url, kind="reset_after", count=1)
    with another_process() as (old, _):
        late = old.wake(meta.shop.channel.id)
        until(meta.calls, "the call")
        lease_runs_out(meta.shop)
        send(meta.shop)
        late.result(PATIENCE)

    assert (message(meta.shop, id_)["status"], message(meta.shop, id_)["unknowns"]) == ("unknown", 1)
    finish(meta.shop)
    assert outcomes(meta.shop, id_) == ["unknown", "accepted"]


# -- order -----------------------------------------------------------------------------------------------------------


def test_a_conversation_stays_in_order_behind_one_that_is_tried_again(meta: Meta) -> None:
    client.faults(meta.url, kind="code", code=131000, to=SOMEBODY, count=2)
    queue(meta.shop, "1", "2", "3")
    queue(meta.shop, "other", to=OTHER)

    send(meta.shop)
    assert meta.accepted() == ["other"]

    finish(meta.shop)
    assert meta.accepted() == ["other", "1", "2", "3"]


def test_a_conversation_waits_for_word_of_the_one_before(meta: Meta) -> None:
    client.faults(meta.url, kind="reset_before", count=1)
    first, *_ = queue(meta.shop, "1", "2", "3")

    send(meta.shop)
    queue(meta.shop, "4")
    send(meta.shop)
    assert (statuses(meta.shop), len(meta.calls())) == (["unknown", "queued", "queued", "queued"], 1)

    report(meta.shop, "wamid.it-was-sent", "sent", callback=callback(meta.shop, first))
    send(meta.shop)
    assert meta.accepted() == ["2", "3", "4"]
    assert message(meta.shop, first)["provider_id"] == "wamid.it-was-sent"


def test_a_scheduled_message_waits_for_its_time_and_holds_up_nobody(meta: Meta) -> None:
    in_an_hour = datetime.now(UTC) + timedelta(hours=1)
    (later,) = queue(meta.shop, "later", not_before=in_an_hour)
    send(meta.shop)
    assert (meta.calls(), lane(meta.shop)["next_due_at"]) == ([], in_an_hour)

    queue(meta.shop, "now")
    send(meta.shop)

    assert meta.accepted() == ["now"]
    assert message(meta.shop, later)["status"] == "queued"
    assert lane(meta.shop)["next_due_at"] == in_an_hour
    their_time_comes(meta.shop, later)
    send(meta.shop)
    assert meta.accepted() == ["now", "later"]


def test_a_conversation_stays_in_order_behind_a_scheduled_one_whose_time_has_come(meta: Meta) -> None:
    (scheduled,) = queue(meta.shop, "scheduled", not_before=datetime.now(UTC) + timedelta(hours=1))
    their_time_comes(meta.shop, scheduled)
    client.faults(meta.url, kind="code", code=131000, count=1)
    queue(meta.shop, "after")

    send(meta.shop)
    assert meta.accepted() == []

    finish(meta.shop)
    assert meta.accepted() == ["scheduled", "after"]


def test_many_messages_to_one_recipient_hold_up_nobody_else(meta: Meta) -> None:
    queue(meta.shop, *(f"a-{n}" for n in range(500)))
    for whom in people(5):
        queue(meta.shop, f"to {whom}", to=whom)

    send(meta.shop)

    accepted = meta.accepted()
    to_one = [text for text in accepted if text.startswith("a-")]
    assert to_one == [f"a-{n}" for n in range(len(to_one))]
    assert 45 <= len(to_one) < 100  # the burst of a pair, and one more for each six seconds
    assert max(accepted.index(f"to {whom}") for whom in people(5)) < 40
    assert Counter(statuses(meta.shop)) == {"sent": len(to_one) + 5, "queued": 500 - len(to_one)}
    assert client.summary(meta.url)["max_in_flight_per_recipient"] == 1


def test_whoever_waits_behind_nobody_is_woken_and_nobody_else(meta: Meta) -> None:
    client.faults(meta.url, kind="reset_before", count=1)
    queue(meta.shop, "unknown", "behind it", to=OTHER)
    send(meta.shop)
    forgotten, after = queue(meta.shop, "forgotten", "after it")
    with db.session([meta.shop.tenant.id]) as s:
        s.execute(text("UPDATE message SET due_at = NULL WHERE id = ANY(:ids)"), {"ids": [forgotten, after]})
    send(meta.shop)
    assert meta.accepted() == []

    with db.session() as s:
        db.see_all(s)
        assert meta.shop.channel.id in outgoing.wake_forgotten(s)
    send(meta.shop)

    assert meta.accepted() == ["forgotten", "after it"]
    assert statuses(meta.shop) == ["unknown", "queued", "sent", "sent"]
    with db.session() as s:
        db.see_all(s)
        assert meta.shop.channel.id not in outgoing.wake_forgotten(s)


# -- limits ----------------------------------------------------------------------------------------------------------


def test_a_recipients_limit_pauses_that_recipient_alone_by_four_to_the_x_seconds(meta: Meta) -> None:
    client.faults(meta.url, kind="code", code=131056, to=SOMEBODY, count=3)
    one, _ = queue(meta.shop, "a-1", "a-2")
    queue(meta.shop, "b-1", "b-2", to=OTHER)

    waits = []
    for _ in range(3):
        send(meta.shop)
        stored = message(meta.shop, one)
        waits.append(round((stored["due_at"] - attempts(meta.shop, one)[-1]["ended_at"]).total_seconds()))
        assert meta.accepted() == ["b-1", "b-2"]
        assert (stored["status"], stored["tries"], lane(meta.shop)["paused_until"]) == ("queued", 0, None)
        make_due(meta.shop)
    assert waits == [1, 4, 16]

    send(meta.shop)
    assert meta.accepted() == ["b-1", "b-2", "a-1", "a-2"]


def test_a_numbers_limit_pauses_and_slows_the_number_and_burns_nothing(meta: Meta) -> None:
    client.faults(meta.url, kind="code", code=130429, count=1)
    ids = [queue(meta.shop, whom, to=whom)[0] for whom in people(3)]

    send(meta.shop)
    paused = lane(meta.shop)
    assert (paused["pace"], paused["pause_code"], paused["hold"]) == (0.5, "130429", None)
    assert paused["paused_until"] > datetime.now(UTC)
    before = len(meta.calls())
    queue(meta.shop, "more")
    send(meta.shop)
    assert len(meta.calls()) == before

    finish(meta.shop)
    assert sorted(meta.accepted()) == sorted([*people(3), "more"])
    assert [message(meta.shop, id_)["tries"] for id_ in ids] == [0, 0, 0]


def test_a_number_that_is_too_fast_again_and_again_is_slowed_step_by_step(meta: Meta) -> None:
    queue(meta.shop, "um")
    paces = []
    for _ in range(6):
        client.faults(meta.url, kind="code", code=130429, count=1)
        make_due(meta.shop)
        send(meta.shop)
        paces.append(lane(meta.shop)["pace"])

    assert paces == [0.5, 0.25, 0.125, 0.1, 0.1, 0.1]


def test_many_refusals_for_one_burst_slow_a_number_once(meta: Meta) -> None:
    client.faults(meta.url, kind="latency", ms=300)
    client.faults(meta.url, kind="code", code=130429, count=8)
    for whom in people(8):
        queue(meta.shop, whom, to=whom)

    send(meta.shop)

    assert client.summary(meta.url)["refused"] > 1
    assert lane(meta.shop)["pace"] == 0.5


@pytest.mark.parametrize("days", [0, 1, 30])
def test_a_slowed_number_is_as_fast_as_before_after_a_while(meta: Meta, days: int) -> None:
    queue(meta.shop, "um")
    client.faults(meta.url, kind="code", code=130429, count=1)
    send(meta.shop)
    with db.session() as s:
        ago = timedelta(days=days, minutes=10)
        order = "UPDATE lane SET paused_until = now() - :ago WHERE channel_id = :channel"
        s.execute(text(order), {"ago": ago, "channel": meta.shop.channel.id})

    send(meta.shop)
    client.faults(meta.url, kind="code", code=130429, count=1)
    queue(meta.shop, "dois")
    send(meta.shop)

    assert lane(meta.shop)["pace"] == 0.5  # half of the whole, not of the half


@pytest.mark.parametrize(("code", "paused"), [(80007, "aa--"), (4, "aaa-")])
def test_a_limit_of_the_account_or_the_app_pauses_all_it_concerns_and_no_others(
    monkeypatch: pytest.MonkeyPatch, code: int, paused: str
) -> None:
    first = a_shop(access_token=TOKEN)
    same_account = another_number(first, access_token=TOKEN, waba_id=first.number.waba_id)
    same_app = another_number(first, access_token=TOKEN)
    stranger = a_shop(access_token=TOKEN)
    shops = [first, same_account, same_app, stranger]
    with numbers_at_meta(monkeypatch, *shops) as (meta, *_):
        for shop in shops:
            queue(shop, shop.channel.name)
        client.faults(meta.url, kind="code", code=code, channel=first.channel.name, count=1)

        for shop in shops:
            send(shop)

        found = ["a" if lane(shop)["pause_code"] == str(code) else "-" for shop in shops]
        assert "".join(found) == paused
        assert len(meta.calls()) == 1 + paused.count("-")
        for shop in shops:
            finish(shop)
        assert sorted(meta.accepted()) == sorted(shop.channel.name for shop in shops)
        assert {row["tries"] for shop in shops for row in rows(shop, "SELECT tries FROM message")} == {0}


def test_two_processes_together_stay_within_what_the_provider_allows(meta: Meta) -> None:
    configure(meta.shop, messages_per_second=40)
    client.rules(meta.url, rate=40)
    for whom in people(150):
        queue(meta.shop, whom, to=whom)
    with another_process() as (one, _), another_process() as (two, _):
        for lanes in (one, two, one):  # whoever has the lane, the limits are the same
            lanes.wake(meta.shop.channel.id).result(PATIENCE)

    told = client.summary(meta.url)
    assert (told["refused"], told["by_text_max"], told["max_in_flight_per_recipient"]) == (0, 1, 1)
    assert told["accepted"] == 150


# -- holds -----------------------------------------------------------------------------------------------------------


def test_a_bad_token_holds_the_channel_after_one_call_and_what_comes_in_goes_on(meta: Meta) -> None:
    client.rules(meta.url, access_token="another")
    ids = queue(meta.shop, "1", "2", "3")

    for _ in range(3):
        send(meta.shop)

    held = lane(meta.shop)
    assert (held["hold"], held["hold_code"], held["probes"], len(meta.calls())) == ("auth", "190", 0, 1)
    assert statuses(meta.shop) == ["queued"] * 3
    assert message(meta.shop, ids[0])["tries"] == 0
    incoming = deliveries(meta.shop, [texts(meta.shop, "wamid.in")])
    run(incoming)
    assert set(states(incoming).values()) == {"done"}


def test_a_held_channel_is_probed_by_one_message_at_a_time_and_ever_more_rarely(meta: Meta) -> None:
    client.rules(meta.url, access_token="another")
    for whom in people(10):
        queue(meta.shop, whom, to=whom)
    send(meta.shop)
    before = len(meta.calls())

    waits = []
    for probe in range(1, 7):
        make_due(meta.shop)
        send(meta.shop)
        send(meta.shop)
        assert len(meta.calls()) == before + probe
        held = lane(meta.shop)
        ended = rows(meta.shop, "SELECT max(ended_at) AS at FROM attempt")[0]["at"]
        waits.append(round((held["next_probe_at"] - ended).total_seconds()))
        assert held["probes"] == probe

    assert waits == [60, 120, 240, 300, 300, 300]
    kinds = [row["type"] for row in rows(meta.shop, "SELECT type FROM event WHERE message_id IS NULL")]
    assert kinds == ["channel_held"]


def test_a_held_channel_resumes_by_itself_once_the_token_is_good(meta: Meta) -> None:
    client.rules(meta.url, access_token="another")
    queue(meta.shop, "1", "2")
    for whom in people(5):
        queue(meta.shop, whom, to=whom)
    send(meta.shop)
    refused = len(meta.calls())

    client.rules(meta.url, access_token=None)
    make_due(meta.shop)
    send(meta.shop)

    assert sorted(meta.accepted()) == sorted(["1", "2", *people(5)])
    assert len(meta.calls()) == refused + 7
    found = lane(meta.shop)
    assert (found["hold"], found["probes"], found["misses"]) == (None, 0, 0)
    kinds = [row["type"] for row in rows(meta.shop, "SELECT type FROM event WHERE message_id IS NULL ORDER BY id")]
    assert kinds == ["channel_held", "channel_resumed"]


def test_a_channel_takes_a_mended_token_of_its_own(meta: Meta) -> None:
    client.rules(meta.url, access_token="the new one")
    queue(meta.shop, "um")
    send(meta.shop)

    with db.session([meta.shop.tenant.id]) as s:
        s.get_one(Channel, (meta.shop.tenant.id, meta.shop.channel.id)).seal({"access_token": "the new one"})
    make_due(meta.shop)
    send(meta.shop)

    assert meta.accepted() == ["um"]


def test_a_channel_without_a_token_calls_nobody_until_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_number_at_meta(monkeypatch, a_shop()) as meta:
        (id_,) = queue(meta.shop, "um")
        send(meta.shop)
        assert (lane(meta.shop)["hold"], lane(meta.shop)["hold_code"], meta.calls()) == ("auth", "no_token", [])
        assert message(meta.shop, id_)["status"] == "queued"

        with db.session([meta.shop.tenant.id]) as s:
            s.get_one(Channel, (meta.shop.tenant.id, meta.shop.channel.id)).seal({"access_token": TOKEN})
        make_due(meta.shop)
        send(meta.shop)
        assert (lane(meta.shop)["hold"], meta.accepted()) == (None, ["um"])


def test_what_an_operator_holds_is_not_probed_and_goes_on_when_the_operator_says_so(meta: Meta) -> None:
    queue(meta.shop, "um")
    with db.session() as s:
        Lane.set_hold(s, meta.shop.channel.id, Hold.OPERATOR, code=None, reason="on holiday")
    for _ in range(3):
        make_due(meta.shop)
        send(meta.shop)
    assert (meta.calls(), lane(meta.shop)["hold"]) == ([], "operator")

    with db.session() as s:
        assert Lane.resume(s, meta.shop.channel.id)
    send(meta.shop)
    assert meta.accepted() == ["um"]


def test_a_hold_of_the_operators_outlives_what_calls_under_way_come_to(meta: Meta) -> None:
    client.faults(meta.url, kind="latency", ms=1_500, count=1)
    client.faults(meta.url, kind="code", code=190, count=1)
    queue(meta.shop, "um")
    sending = in_background(partial(send, meta.shop))
    until(meta.calls, "the call")

    with db.session() as s:
        Lane.set_hold(s, meta.shop.channel.id, Hold.OPERATOR, code=None, reason="on holiday")
    sending()

    assert (lane(meta.shop)["hold"], statuses(meta.shop), len(meta.calls())) == ("operator", ["queued"], 1)


def test_a_payment_problem_that_a_status_tells_of_holds_the_channel_too(meta: Meta) -> None:
    (id_,) = queue(meta.shop, "um")
    send(meta.shop)
    (call,) = meta.calls()
    now = int(datetime.now(UTC).timestamp())
    said = meta_says.status(call["wamid"], "failed", now, "5511944440001")
    said["errors"] = [{"code": 131042, "title": "Business eligibility payment issue"}]

    run(deliveries(meta.shop, [body_of(meta.shop, {"statuses": [said]})]))

    assert (lane(meta.shop)["hold"], lane(meta.shop)["hold_code"]) == ("payment", "131042")
    assert (message(meta.shop, id_)["status"], message(meta.shop, id_)["provider_id"]) == ("queued", None)
    assert events(meta.shop, id_)[-2:] == ["failed", "queued"]
    queue(meta.shop, "dois", to="+5511955550002")
    send(meta.shop)
    assert len(meta.calls()) == 1
    # It is accepted each time, also while nothing is paid: only the second time proves anything.
    make_due(meta.shop)
    send(meta.shop)
    assert (lane(meta.shop)["hold"], meta.accepted()) == ("payment", ["um", "um"])
    make_due(meta.shop)
    send(meta.shop)
    assert (lane(meta.shop)["hold"], meta.accepted()) == (None, ["um", "um", "dois"])


def test_a_payment_problem_that_statuses_go_on_to_tell_of_is_never_taken_for_solved(meta: Meta) -> None:
    queue(meta.shop, "um")
    queue(meta.shop, "dois", to="+5511955550002")
    configure(meta.shop, messages_per_second=1)  # one, and then the other
    send(meta.shop)

    for _ in range(3):
        for call in meta.calls()[-2:]:
            now = int(datetime.now(UTC).timestamp())
            said = meta_says.status(call["wamid"], "failed", now, "5511944440001")
            said["errors"] = [{"code": 131042, "title": "Business eligibility payment issue"}]
            run(deliveries(meta.shop, [body_of(meta.shop, {"statuses": [said]})]))
        assert lane(meta.shop)["hold"] == "payment"
        make_due(meta.shop)
        send(meta.shop)

    assert lane(meta.shop)["hold"] == "payment"
    assert len(meta.calls()) == 2 + 3


@pytest.mark.parametrize(
    ("code", "status", "letters_written"), [(131016, "queued", 0), (131026, "failed", 0), (131049, "failed", 0)]
)
def test_a_failure_that_a_status_tells_of_is_decided_by_the_same_table(
    meta: Meta, code: int, status: str, letters_written: int
) -> None:
    (id_,) = queue(meta.shop, "um")
    send(meta.shop)
    (call,) = meta.calls()
    said = meta_says.status(call["wamid"], "failed", int(datetime.now(UTC).timestamp()), "5511944440001")
    said["errors"] = [{"code": code, "title": "no"}]
    body = body_of(meta.shop, {"statuses": [said]})

    run(deliveries(meta.shop, [body]))
    run(deliveries(meta.shop, [body]))

    assert (message(meta.shop, id_)["status"], len(letters(meta.shop))) == (status, letters_written)
    make_due(meta.shop)
    send(meta.shop)
    assert message(meta.shop, id_)["status"] == ("sent" if status == "queued" else "failed")
    run(deliveries(meta.shop, [body]))  # told once more of the first attempt: no longer this message's
    assert message(meta.shop, id_)["status"] == ("sent" if status == "queued" else "failed")


def test_a_payment_problem_holds_the_channel_until_it_is_paid(meta: Meta) -> None:
    client.faults(meta.url, kind="code", code=131042, count=2)
    queue(meta.shop, "um")

    send(meta.shop)
    make_due(meta.shop)
    send(meta.shop)
    assert (lane(meta.shop)["hold"], lane(meta.shop)["hold_code"], len(meta.calls())) == ("payment", "131042", 2)

    make_due(meta.shop)
    send(meta.shop)
    assert (lane(meta.shop)["hold"], meta.accepted()) == (None, ["um"])


def test_nothing_burns_while_nobody_listens(meta: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [queue(meta.shop, whom, to=whom)[0] for whom in people(3)]

    with graph_is_at(monkeypatch, "http://127.0.0.1:9"):
        for _ in range(3):
            send(meta.shop)
        assert (lane(meta.shop)["hold"], statuses(meta.shop)) == ("outage", ["queued"] * 3)
        tried = sum(len(attempts(meta.shop, id_)) for id_ in ids)
        make_due(meta.shop)
        send(meta.shop)
        send(meta.shop)
        assert sum(len(attempts(meta.shop, id_)) for id_ in ids) == tried + 1  # the probe

    for id_ in ids:
        stored = message(meta.shop, id_)
        assert (stored["tries"], stored["unknowns"]) == (0, 0)
        assert set(outcomes(meta.shop, id_)) <= {"not_sent"}
    assert meta.calls() == []
    finish(meta.shop)
    assert sorted(meta.accepted()) == people(3)


def test_an_outage_costs_a_few_calls_then_one_probe_at_a_time_and_the_oldest_go_first_afterwards(meta: Meta) -> None:
    client.faults(meta.url, kind="outage")
    for whom in people(40):
        queue(meta.shop, whom, to=whom)

    send(meta.shop)
    send(meta.shop)
    first = len(meta.calls())
    assert lane(meta.shop)["hold"] == "outage"
    assert first <= 12
    assert Counter(statuses(meta.shop)) == {"unknown": first, "queued": 40 - first}

    for probe in (1, 2, 3):
        make_due(meta.shop)
        send(meta.shop)
        send(meta.shop)
        assert len(meta.calls()) == first + probe
        assert Counter(statuses(meta.shop)) == {"unknown": first + probe, "queued": 40 - first - probe}

    client.clear_faults(meta.url)
    finish(meta.shop)
    accepted = meta.accepted()
    assert sorted(accepted) == people(40)
    assert accepted[0] == people(40)[first + 3]  # the oldest of those that nothing is to be waited for
    assert lane(meta.shop)["hold"] is None
    assert letters(meta.shop) == []


def test_an_outage_ends_by_a_message_that_had_no_answer_when_there_are_no_others(meta: Meta) -> None:
    client.faults(meta.url, kind="outage", count=6)
    for whom in people(5):
        queue(meta.shop, whom, to=whom)
    send(meta.shop)
    assert (lane(meta.shop)["hold"], statuses(meta.shop)) == ("outage", ["unknown"] * 5)

    make_due(meta.shop)
    send(meta.shop)
    assert len(meta.calls()) == 6
    finish(meta.shop)

    assert (lane(meta.shop)["hold"], len(meta.accepted()), len(letters(meta.shop))) == (None, 4, 1)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_a_message_that_is_refused_for_good_fails_with_code_and_text_and_the_next_one_goes_on(meta: Meta) -> None:
    client.faults(meta.url, kind="code", code=131026, details="not on WhatsApp", count=1)
    bad, good = queue(meta.shop, "bad", "good")

    send(meta.shop)

    failed = message(meta.shop, bad)
    assert (failed["status"], failed["error_code"]) == ("failed", "131026")
    assert failed["error"] == "(#131026) Message undeliverable: not on WhatsApp"
    assert failed["failed_at"] is not None
    assert message(meta.shop, good)["status"] == "sent"
    assert (meta.accepted(), len(meta.calls())) == (["good"], 2)
    assert events(meta.shop, bad) == ["sending", "failed"]


def test_a_message_is_given_up_after_its_tries_and_sent_again_on_demand(meta: Meta) -> None:
    client.faults(meta.url, kind="code", code=131000, to=SOMEBODY)
    bad, _ = queue(meta.shop, "bad", "next")
    queue(meta.shop, "other", to=OTHER)

    for _ in range(8):
        make_due(meta.shop)
        send(meta.shop)
        if message(meta.shop, bad)["status"] == "failed":
            break

    given_up = message(meta.shop, bad)
    assert (given_up["status"], given_up["attempts"], given_up["error_code"]) == ("failed", 5, "131000")
    (letter,) = letters(meta.shop)
    assert (letter["message_id"], letter["state"], letter["actor"]) == (bad, "open", "outgoing_message")

    client.clear_faults(meta.url)
    with db.session([meta.shop.tenant.id]) as s:
        assert outgoing.again(s, meta.shop.tenant.id, bad)
    finish(meta.shop)
    assert meta.accepted() == ["other", "next", "bad"]
    assert message(meta.shop, bad)["status"] == "sent"
    with db.session([meta.shop.tenant.id]) as s:
        assert not outgoing.again(s, meta.shop.tenant.id, bad)


def test_a_closed_window_refuses_what_is_free_form_when_its_turn_comes_and_lets_templates_pass(meta: Meta) -> None:
    (late,) = queue(meta.shop, "late")
    (template,) = queue(meta.shop, template={"name": "pedido", "language": {"code": "pt_BR"}})
    with db.session([meta.shop.tenant.id]) as s:
        s.execute(text("UPDATE conversation SET window_until = now() - interval '1 second'"))

    send(meta.shop)

    refused = message(meta.shop, late)
    assert (refused["status"], refused["error_code"], refused["attempts"]) == ("failed", "131047", 0)
    assert message(meta.shop, template)["status"] == "sent"
    assert [call["type"] for call in meta.calls()] == ["template"]


def test_a_window_that_only_meta_knows_to_be_closed_fails_the_message_for_good(meta: Meta) -> None:
    client.rules(meta.url, window=True)
    late, template = *queue(meta.shop, "late"), *queue(meta.shop, template={"name": "a", "language": {"code": "pt_BR"}})

    finish(meta.shop)

    refused = message(meta.shop, late)
    assert (refused["status"], refused["error_code"], refused["attempts"]) == ("failed", "131047", 1)
    assert message(meta.shop, template)["status"] == "sent"


# -- no answer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["reset_after", "garbage_after", "html_after", "empty", "huge", "gzip"])
def test_a_lost_answer_is_told_by_a_status_and_nothing_is_sent_again(meta: Meta, fault: str) -> None:
    client.faults(meta.url, kind=fault, count=1)
    (id_,) = queue(meta.shop, "um")
    send(meta.shop)
    (call,) = meta.calls()
    assert (message(meta.shop, id_)["status"], call["outcome"]) == ("unknown", "accepted")

    report(meta.shop, call["wamid"], "sent", "delivered", callback=call["callback"])
    finish(meta.shop)

    stored = message(meta.shop, id_)
    assert (stored["status"], stored["provider_id"]) == ("delivered", call["wamid"])
    assert len(meta.calls()) == 1
    assert letters(meta.shop) == []


def test_without_a_status_a_lost_answer_costs_exactly_one_more_call(meta: Meta) -> None:
    client.faults(meta.url, kind="reset_after", count=1)
    (id_,) = queue(meta.shop, "um")
    send(meta.shop)
    send(meta.shop)
    assert len(meta.calls()) == 1  # the wait is not over

    finish(meta.shop)

    assert meta.accepted() == ["um", "um"]
    assert outcomes(meta.shop, id_) == ["unknown", "accepted"]
    assert message(meta.shop, id_)["provider_id"] == meta.calls()[1]["wamid"]
    assert events(meta.shop, id_) == ["sending", "unknown", "queued", "sending", "sent"]


def test_a_channel_may_rather_ask_than_send_again(meta: Meta) -> None:
    configure(meta.shop, on_unknown="ask")
    client.faults(meta.url, kind="reset_after", count=1)
    id_, _ = queue(meta.shop, "um", "dois")
    send(meta.shop)

    finish(meta.shop)

    assert meta.accepted() == ["um", "dois"]
    assert statuses(meta.shop) == ["unknown", "sent"]
    (letter,) = letters(meta.shop)
    assert letter["message_id"] == id_
    report(meta.shop, meta.calls()[0]["wamid"], "delivered", callback=callback(meta.shop, id_))
    assert message(meta.shop, id_)["status"] == "delivered"
    assert [letter["state"] for letter in letters(meta.shop)] == ["settled"]  # nobody needs to decide any more


def test_a_second_lost_answer_is_left_to_a_person(meta: Meta) -> None:
    client.faults(meta.url, kind="reset_after", count=2)
    id_, _ = queue(meta.shop, "um", "dois")
    send(meta.shop)

    finish(meta.shop)

    assert meta.accepted() == ["um", "um", "dois"]
    assert (statuses(meta.shop), outcomes(meta.shop, id_)) == (["unknown", "sent"], ["unknown", "unknown"])
    assert [letter["message_id"] for letter in letters(meta.shop)] == [id_]
    with db.session([meta.shop.tenant.id]) as s:
        assert outgoing.again(s, meta.shop.tenant.id, id_)
    finish(meta.shop)
    assert message(meta.shop, id_)["status"] == "sent"


def test_a_late_status_after_the_second_call_is_counted_and_changes_no_id(meta: Meta) -> None:
    client.faults(meta.url, kind="reset_after", count=1)
    (id_,) = queue(meta.shop, "um")
    send(meta.shop)
    finish(meta.shop)
    first, second = meta.calls()
    doubles = count_of(metrics.double_sends, provider="meta")

    report(meta.shop, second["wamid"], "delivered", callback=second["callback"])
    report(meta.shop, first["wamid"], "sent", "delivered", "read", callback=first["callback"])

    stored = message(meta.shop, id_)
    assert (stored["provider_id"], stored["status"]) == (second["wamid"], "delivered")
    assert outcomes(meta.shop, id_) == ["accepted", "accepted"]
    assert doubles() == 1
    assert "sent_twice" in events(meta.shop, id_)


def test_a_late_status_before_the_second_answer_keeps_the_first_id(meta: Meta) -> None:
    client.faults(meta.url, kind="reset_after", count=1)
    (id_,) = queue(meta.shop, "um")
    send(meta.shop)
    client.faults(meta.url, kind="latency", ms=1_500)
    doubles = count_of(metrics.double_sends, provider="meta")
    make_due(meta.shop)
    sending = in_background(partial(send, meta.shop))
    until(lambda: len(meta.calls()) == 2, "the second call")
    first, second = meta.calls()

    report(meta.shop, first["wamid"], "sent", callback=first["callback"])
    sending()

    stored = message(meta.shop, id_)
    assert (stored["provider_id"], stored["status"]) == (first["wamid"], "sent")
    assert [attempt["provider_id"] for attempt in attempts(meta.shop, id_)] == [first["wamid"], second["wamid"]]
    assert doubles() == 1


def test_an_overdue_message_is_not_decided_while_webhooks_wait_and_nobody_is_rung_for_it_without_end(
    meta: Meta,
) -> None:
    client.faults(meta.url, kind="reset_after", count=1)
    (id_,) = queue(meta.shop, "um")
    send(meta.shop)
    (call,) = meta.calls()
    said = [meta_says.status(call["wamid"], "sent", 1_788_000_000, "5511944440001")]
    said[0]["biz_opaque_callback_data"] = call["callback"]
    waiting = deliveries(meta.shop, [body_of(meta.shop, {"statuses": said})])
    with superuser() as connection:  # it came before the wait was over
        connection.execute(
            "UPDATE delivery SET received_at = now() - interval '1 minute' WHERE id = ANY(%s)", [waiting]
        )
    make_due(meta.shop)
    broker.flush_all()

    send(meta.shop)

    assert rung() == 0
    assert lane(meta.shop)["next_due_at"] <= datetime.now(UTC)  # the sweep will ring
    assert len(meta.calls()) == 1
    run(waiting)
    finish(meta.shop)
    assert (message(meta.shop, id_)["status"], len(meta.calls())) == ("sent", 1)


# -- statuses --------------------------------------------------------------------------------------------------------


def test_a_status_may_be_faster_than_the_answer(meta: Meta) -> None:
    client.faults(meta.url, kind="latency", ms=1_500, count=1)
    (id_,) = queue(meta.shop, "um")
    sending = in_background(partial(send, meta.shop))
    until(meta.calls, "the call")
    (call,) = meta.calls()

    report(meta.shop, call["wamid"], "sent", "delivered", callback=call["callback"])
    assert message(meta.shop, id_)["status"] == "delivered"
    sending()

    stored = message(meta.shop, id_)
    (attempt,) = attempts(meta.shop, id_)
    assert (stored["status"], stored["provider_id"]) == ("delivered", call["wamid"])
    assert (attempt["outcome"], attempt["settled_by"]) == ("accepted", "status")
    assert len(meta.calls()) == 1


def test_the_next_to_a_recipient_waits_for_the_answer_even_when_a_status_was_faster(meta: Meta) -> None:
    client.faults(meta.url, kind="latency", ms=1_500, count=1)
    queue(meta.shop, "1", "2")
    sending = in_background(partial(send, meta.shop))
    until(meta.calls, "the call")
    (call,) = meta.calls()

    report(meta.shop, call["wamid"], "sent", callback=call["callback"])
    sending()

    assert meta.accepted() == ["1", "2"]
    assert client.summary(meta.url)["max_in_flight_per_recipient"] == 1


def test_a_status_without_our_mark_that_is_faster_than_the_answer_is_not_lost(meta: Meta) -> None:
    client.faults(meta.url, kind="latency", ms=1_500, count=1)
    (id_,) = queue(meta.shop, "um")
    sending = in_background(partial(send, meta.shop))
    until(meta.calls, "the call")

    report(meta.shop, meta.calls()[0]["wamid"], "sent", "delivered")
    assert message(meta.shop, id_)["status"] == "sending"
    sending()

    assert message(meta.shop, id_)["status"] == "delivered"


def test_a_failed_status_is_final(meta: Meta) -> None:
    (id_,) = queue(meta.shop, "um")
    send(meta.shop)
    (call,) = meta.calls()

    report(meta.shop, call["wamid"], "failed", callback=call["callback"])
    report(meta.shop, call["wamid"], "sent", "delivered", "read", callback=call["callback"])

    stored = message(meta.shop, id_)
    assert (stored["status"], stored["error_code"]) == ("failed", "131047")
    assert len(meta.calls()) == 1


@pytest.mark.parametrize("is_late", [True, False], ids=["after the second answer", "before the second answer"])
def test_the_failure_of_one_attempt_is_not_that_of_the_next(meta: Meta, is_late: bool) -> None:
    client.faults(meta.url, kind="reset_after", count=1)
    (id_,) = queue(meta.shop, "um")
    send(meta.shop)
    make_due(meta.shop)
    client.faults(meta.url, kind="latency", ms=1_500)
    sending = in_background(partial(send, meta.shop))
    until(lambda: len(meta.calls()) == 2, "the second call")
    first, second = meta.calls()
    if is_late:
        sending()

    report(meta.shop, first["wamid"], "failed", callback=first["callback"])
    sending()

    stored = message(meta.shop, id_)
    assert (stored["status"], stored["provider_id"], stored["failed_at"]) == ("sent", second["wamid"], None)
    report(meta.shop, second["wamid"], "delivered", callback=second["callback"])
    assert message(meta.shop, id_)["status"] == "delivered"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["the failed one first", "the sent one first"])
def test_statuses_of_two_attempts_end_alike_in_any_order(meta: Meta, order: tuple[int, int]) -> None:
    client.faults(meta.url, kind="reset_after", count=2)
    (id_,) = queue(meta.shop, "um")
    send(meta.shop)
    finish(meta.shop)
    calls, words = meta.calls(), ("failed", "sent")

    for n in order:
        report(meta.shop, calls[n]["wamid"], words[n], callback=calls[n]["callback"])

    stored = message(meta.shop, id_)
    assert (stored["status"], stored["provider_id"], stored["error_code"]) == ("sent", calls[1]["wamid"], None)


def test_a_status_that_comes_after_the_second_attempt_was_refused_tells_that_the_first_got_through(meta: Meta) -> None:
    client.faults(meta.url, kind="reset_after", count=1)
    (id_,) = queue(meta.shop, "um")
    send(meta.shop)
    client.faults(meta.url, kind="code", code=131026, count=1)
    finish(meta.shop)
    assert message(meta.shop, id_)["status"] == "failed"
    first, _ = meta.calls()

    report(meta.shop, first["wamid"], "delivered", callback=first["callback"])

    stored = message(meta.shop, id_)
    assert (stored["status"], stored["provider_id"], stored["error_code"]) == ("delivered", first["wamid"], None)


def test_a_status_may_forestall_what_an_operator_has_asked_for_or_cancelled(meta: Meta) -> None:
    client.faults(meta.url, kind="reset_after", count=2)
    configure(meta.shop, on_unknown="ask")
    (one,) = queue(meta.shop, "um")
    (two,) = queue(meta.shop, "dois", to=OTHER)
    finish(meta.shop)
    with db.session([meta.shop.tenant.id]) as s:
        assert outgoing.again(s, meta.shop.tenant.id, one)
        assert outgoing.again(s, meta.shop.tenant.id, two)
        assert outgoing.cancel(s, meta.shop.tenant.id, two) == ("cancelled", True)

    for call in meta.calls():
        report(meta.shop, call["wamid"], "delivered", callback=call["callback"])
    finish(meta.shop)

    assert [message(meta.shop, id_)["status"] for id_ in (one, two)] == ["delivered", "delivered"]
    assert len(meta.calls()) == 2


# -- references, receipts, names -------------------------------------------------------------------------------------


class Recorder:
    """A Graph that keeps the bodies it got and accepts them all, with `wamid` as their ids."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.wamid = "wamid.{n}"
        self.app = Starlette(routes=[Route("/{path:path}", self.answer, methods=["POST"])])

    async def answer(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        if self.bodies[-1].get("status") == "read":
            return JSONResponse({"success": True})
        return JSONResponse({"messages": [{"id": self.wamid.format(n=len(self.bodies))}]})


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    its = Recorder()
    with serve(its.app) as url, graph_is_at(monkeypatch, url):
        yield its


def test_a_message_refers_to_another_by_the_providers_id(recorder: Recorder) -> None:
    shop = a_shop(access_token=TOKEN)
    (first,) = queue(shop, "um")
    queue(shop, text={"body": "dois"}, context={"message_id": str(first)})
    queue(shop, reaction={"message_id": str(first), "emoji": "👍"})
    queue(shop, reaction={"message_id": "wamid.theirs", "emoji": "👍"})

    send(shop)

    assert [body.get("context") for body in recorder.bodies] == [None, {"message_id": "wamid.1"}, None, None]
    assert [body["reaction"]["message_id"] for body in recorder.bodies[2:]] == ["wamid.1", "wamid.theirs"]


def test_what_refers_to_a_message_that_was_never_sent_fails(meta: Meta) -> None:
    client.faults(meta.url, kind="code", code=131026, count=1)
    (first,) = queue(meta.shop, "um")
    (answer,) = queue(meta.shop, text={"body": "dois"}, context={"message_id": str(first)})
    (after,) = queue(meta.shop, "três")

    send(meta.shop)

    refused = message(meta.shop, answer)
    assert (refused["status"], refused["error_code"], refused["attempts"]) == ("failed", "reference_not_sent", 0)
    assert (message(meta.shop, after)["status"], meta.accepted()) == ("sent", ["três"])


def test_a_receipt_marks_what_came_before_as_read(meta: Meta) -> None:
    for n in range(3):
        run(deliveries(meta.shop, [texts(meta.shop, f"wamid.in-{n}", at=1_788_000_000 + n)]))
    (receipt,) = queue(meta.shop, read={"message_id": "wamid.in-1"})

    send(meta.shop)

    found = rows(meta.shop, "SELECT status FROM message WHERE direction = 'in' ORDER BY provider_at")
    assert [row["status"] for row in found] == ["read", "read", "received"]
    (conversation,) = rows(meta.shop, "SELECT unread_count FROM conversation")
    assert conversation["unread_count"] == 1
    assert message(meta.shop, receipt)["status"] == "sent"
    assert client.summary(meta.url)["reads"] == 1


def test_a_receipt_without_an_answer_is_simply_sent_again(meta: Meta) -> None:
    run(deliveries(meta.shop, [texts(meta.shop, "wamid.in")]))
    client.faults(meta.url, kind="reset_after", count=2)
    (receipt,) = queue(meta.shop, read={"message_id": "wamid.in"})

    finish(meta.shop)

    assert (message(meta.shop, receipt)["status"], client.summary(meta.url)["reads"]) == ("sent", 3)
    assert letters(meta.shop) == []


def test_a_reply_under_the_names_that_meta_gave_joins_the_conversation(meta: Meta) -> None:
    """To a number with its ninth digit; the answer names the customer without it, and by a BSUID."""
    client.rules(meta.url, drop_ninth_digit=True)
    (id_,) = queue(meta.shop, "Olá", to="+5531988887777")
    send(meta.shop)
    bsuid = meta_says.user_id("553188887777")

    for n, whom in enumerate(("553188887777", "5531988887777", bsuid)):
        run(deliveries(meta.shop, [texts(meta.shop, f"wamid.in-{n}", from_=whom)]))

    found = rows(meta.shop, "SELECT conversation_id FROM message")
    assert {row["conversation_id"] for row in found} == {message(meta.shop, id_)["conversation_id"]}
    assert len(rows(meta.shop, "SELECT FROM contact")) == 1


def test_a_message_to_a_bsuid_is_heard_of_again(meta: Meta) -> None:
    bsuid = "BR.90000000000000001"
    queue(meta.shop, "Olá", to=bsuid)

    send(meta.shop)

    (call,) = meta.calls()
    assert (call["outcome"], call["to"]) == ("accepted", bsuid)


def test_a_provider_that_gives_one_id_twice_does_not_stop_the_lane(recorder: Recorder) -> None:
    recorder.wamid = "wamid.always the same"
    shop = a_shop(access_token=TOKEN)
    configure(shop, messages_per_second=1_000)
    for whom in people(6):
        queue(shop, whom, to=whom)

    finish(shop)

    assert len({body["to"] for body in recorder.bodies}) == 6
    assert len(recorder.bodies) <= 12
    assert Counter(statuses(shop))["sent"] == 1
    assert lane(shop)["token"] is None


# -- stores that go away ---------------------------------------------------------------------------------------------


def test_messages_are_sent_without_redis(meta: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    for whom in people(5):
        queue(meta.shop, f"1 {whom}", f"2 {whom}", to=whom)

    with monkeypatch.context() as patch:
        patch.setenv("REDIS_URL", "redis://127.0.0.1:9/0")
        settings.cache_clear()
        with another_process() as (lanes, _):
            lanes.wake(meta.shop.channel.id).result(PATIENCE)
    settings.cache_clear()

    assert client.summary(meta.url)["accepted"] == 10
    assert set(statuses(meta.shop)) == {"sent"}


def test_a_bell_that_cannot_be_rung_is_left_to_the_sweep(meta: Meta) -> None:
    def nobody_hears(_: UUID) -> None:
        raise redis.ConnectionError

    configure(meta.shop, messages_per_second=1)
    queue(meta.shop, *map(str, range(40)))
    lanes = Lanes(nobody_hears)
    running = lanes.wake(meta.shop.channel.id)
    until(meta.accepted, "a call")
    lanes.stop()

    running.result(PATIENCE)
    assert lane(meta.shop)["next_due_at"] <= datetime.now(UTC)
    assert lane(meta.shop)["token"] is None


def test_a_wiped_redis_doubles_nothing(meta: Meta) -> None:
    configure(meta.shop, messages_per_second=150)
    for n, whom in enumerate(people(60)):
        queue(meta.shop, f"{n}-1", f"{n}-2", to=whom)
    wiped = threading.Event()

    def wipe() -> None:
        with redis.Redis.from_url(os.environ["REDIS_URL"]) as valkey:
            for least in (10, 40, 80):
                until(lambda least=least: client.summary(meta.url)["accepted"] >= least, "some calls")  # type: ignore[misc]
                valkey.flushall()
        wiped.set()

    together(wipe, partial(finish, meta.shop))

    told = client.summary(meta.url)
    assert wiped.is_set()
    assert (told["calls"], told["accepted"], told["by_text_max"]) == (120, 120, 1)
    assert set(statuses(meta.shop)) == {"sent"}


def test_answers_outlive_connections_to_the_database(meta: Meta) -> None:
    client.faults(meta.url, kind="latency", ms=100)
    for n, whom in enumerate(people(30)):
        queue(meta.shop, f"{n}-1", f"{n}-2", to=whom)
    is_over = threading.Event()

    def cut() -> int:
        count = 0
        with superuser() as connection:
            while not is_over.wait(0.3):
                count += connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'pombal'"
                ).rowcount
                if count > 20:
                    break
        return count

    def work() -> None:
        with another_process() as (lanes, _):
            for _ in range(20):
                lanes.wake(meta.shop.channel.id).result(PATIENCE)
        is_over.set()

    cuts, _ = together(cut, work)

    assert cuts > 0
    db.engine().dispose()
    finish(meta.shop)
    told = client.summary(meta.url)
    assert (told["accepted"], told["by_text_max"], told["texts"]) == (60, 1, 60)
    assert set(statuses(meta.shop)) == {"sent"}
    assert {call["wamid"] for call in meta.calls()} == {
        row["provider_id"] for row in rows(meta.shop, "SELECT provider_id FROM message")
    }


@pytest.mark.parametrize("n", range(1, 7))
def test_a_commit_whose_answer_is_lost_loses_and_doubles_nothing(
    meta: Meta, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """Taking the lane, beginning, writing down, going on, giving back: whichever commit it is."""
    configure(meta.shop, on_unknown="ask")
    ids = [*queue(meta.shop, "1", "2"), *queue(meta.shop, "3", to=OTHER)]

    with lost_commits(monkeypatch) as way:
        way.lose(n)
        with another_process() as (lanes, _):
            lanes.wake(meta.shop.channel.id).result(PATIENCE)
    assert way.lost == 1
    finish(meta.shop)

    assert sorted(meta.accepted()) == ["1", "2", "3"]
    assert [outcomes(meta.shop, id_) for id_ in ids] == [["accepted"]] * 3
    assert [events(meta.shop, id_) for id_ in ids] == [["sending", "sent"]] * 3


# -- the end of a process --------------------------------------------------------------------------------------------


def test_a_process_that_stops_finishes_its_calls_and_gives_the_lane_back(meta: Meta) -> None:
    configure(meta.shop, messages_per_second=30)
    client.faults(meta.url, kind="latency", ms=700)
    for whom in people(20):
        queue(meta.shop, whom, to=whom)
    with another_process() as (lanes, _):
        done = lanes.wake(meta.shop.channel.id)
        until(meta.calls, "a call")

        lanes.stop()

        assert done.done()
        called = [call["text"] for call in meta.calls()]
        assert 0 < len(called) < 20
        assert all(call["answered"] for call in meta.calls())
        sent = rows(meta.shop, "SELECT body FROM message WHERE status = 'sent'")
        assert sorted(row["body"]["text"]["body"] for row in sent) == sorted(called)
        assert set(statuses(meta.shop)) == {"sent", "queued"}
        left = lane(meta.shop)
        assert (left["token"], left["hold"], left["misses"]) == (None, None, 0)
        lanes.wake(meta.shop.channel.id).result(PATIENCE)
        assert len(meta.calls()) == len(called)

    finish(meta.shop)
    assert sorted(meta.accepted()) == people(20)


def test_a_process_sends_again_when_its_worker_has_ended(meta: Meta) -> None:
    for n in range(2):
        worker = dramatiq.Worker(broker, queues={"outgoing_message"}, worker_threads=1, worker_timeout=50)
        worker.start()
        queue(meta.shop, f"by worker {n}")
        ring(meta.shop.channel.id)
        until(lambda n=n: f"by worker {n}" in meta.accepted(), "the call")  # type: ignore[misc]
        worker.stop()
        queue(meta.shop, f"without {n}")
        send(meta.shop)

    assert meta.accepted() == ["by worker 0", "without 0", "by worker 1", "without 1"]
    assert statuses(meta.shop) == ["sent"] * 4


# -- what is told ----------------------------------------------------------------------------------------------------


def test_each_change_has_its_event_in_the_same_commit(meta: Meta) -> None:
    client.faults(meta.url, kind="code", code=131026, to=OTHER)
    (sent,) = queue(meta.shop, "um")
    (failed,) = queue(meta.shop, "dois", to=OTHER)

    send(meta.shop)

    for id_, last in ((sent, "sent"), (failed, "failed")):
        assert events(meta.shop, id_) == ["sending", last]
        found = rows(
            meta.shop,
            "SELECT m.xmin::text AS changed, e.xmin::text AS told, e.version FROM message AS m JOIN event AS e"
            " ON e.message_id = m.id WHERE m.id = :id ORDER BY e.id DESC LIMIT 1",
            id=id_,
        )
        assert (found[0]["changed"], found[0]["version"]) == (found[0]["told"], "v1")


def test_nothing_that_is_whispered_is_written_down(meta: Meta, capfd: pytest.CaptureFixture[str]) -> None:
    secret, phone = "the-secret-of-the-text", "5511977778888"
    details = f"{secret} for {phone}"
    ids = [queue(meta.shop, f"{n} {secret}", to=f"+{phone}")[0] for n in range(4)]
    for fault in (
        {"kind": "code", "code": 131026, "details": details},
        {"kind": "code", "code": 131000, "details": details},
        {"kind": "reset_after"},
        {"kind": "code", "code": 130429, "details": details},
    ):
        client.faults(meta.url, **fault, count=1)
    finish(meta.shop)
    client.faults(meta.url, kind="code", code=131000, details=details, to=f"+{phone}", count=5)
    queue(meta.shop, secret, to=f"+{phone}")
    finish(meta.shop)
    client.faults(meta.url, kind="code", code=190, details=details, count=1)
    queue(meta.shop, secret, to=f"+{phone}")
    finish(meta.shop)

    written = "".join(capfd.readouterr())
    given_up = letters(meta.shop)
    assert "message_sent" in written
    assert "channel_held" in written
    assert str(ids[1]) in written
    assert len(given_up) == 1
    whispers = [secret, phone, TOKEN, *(call["wamid"] for call in meta.calls() if call["wamid"])]
    assert not [whisper for whisper in whispers if whisper in written + repr(given_up)]
