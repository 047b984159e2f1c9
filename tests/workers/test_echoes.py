"""A gateway's call carries no id of ours: echoes and acks settle sends by where and what, in every order."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from sqlalchemy import text

from models import Channel, Hold, Lane, outgoing
from pombal import db, metrics
from pombal.ids import uuid7
from pombal.pace import Pace, client_for_pace
from pombal.settings import settings
from providers import inbound
from providers.outbound import Answer, Fault, Kind, Outcome, Scope
from tests.factories import Shop, a_shop, rows
from tests.workers.sending import count_of, lease_runs_out, make_due, queue
from workers._echoes import fingerprint
from workers._effects import apply_items
from workers._line import Line, Work
from workers.outgoing_message import lanes

PHONE = "5511944440001"
BIA = inbound.Person((("phone", PHONE),), aliases=(("jid", PHONE),))
LOST = Answer(Outcome.UNKNOWN, why="no answer in time")


@pytest.fixture
def shop() -> Shop:
    """A shop whose channel is at a gateway."""
    shop = a_shop()
    channel = Channel(
        tenant_id=shop.tenant.id, id=uuid7(), kind="megaapi", name="gateway", config={"messages_per_second": 1_000}
    )
    with db.session([shop.tenant.id]) as s:
        s.add(channel)
    return shop._replace(channel=channel)


class Sending:
    """A message on its way: its call has left, and the test says what comes back when."""

    def __init__(self, shop: Shop, *texts: str, **body: Any) -> None:
        self.ids = queue(shop, *texts, **body)
        line = Line.take(shop.channel.id, uuid4(), Pace(client_for_pace(settings().require_redis())))
        assert line is not None
        self.line = line
        self.works: list[Work] = []
        for _ in range(3):  # one turn to look, one to begin
            plan = line.turn([], under_way=self.works, may_begin=True)
            self.works += [work for work, _ in plan.begun]

    def answer(self, answer: Answer, n: int = 0) -> None:
        self.line.turn([(self.works[n], answer)], under_way=[], may_begin=False)


def accepted(provider_id: str | None) -> Answer:
    return Answer(Outcome.ACCEPTED, provider_id=provider_id, http_status=200)


def an_echo(provider_id: str, body: str = "Olá", at: datetime | None = None) -> inbound.Message:
    return inbound.Message(
        path="$",
        provider_id=provider_id,
        direction="out",
        type="text",
        body={"text": {"body": body}},
        person=BIA,
        chat=BIA,
        at=at or datetime.now(UTC).replace(microsecond=0),
        may_be_ours=True,
    )


def an_ack(provider_id: str, status: str = "delivered") -> inbound.Status:
    return inbound.Status(path="$", provider_id=provider_id, status=status, at=datetime.now(UTC), chat=BIA)


def hear(shop: Shop, *items: Any) -> list[UUID]:
    """A batch of what the gateway tells, as incoming_message writes it; returns the ids of its messages."""
    for _ in range(5):
        try:
            with db.session([shop.tenant.id]) as s:
                db.by_key(s)
                stored, _settled = apply_items(s, [(None, shop.tenant.id, shop.channel.id, item) for item in items])
            return [message.id for _, message in stored]
        except Exception as error:
            if not db.is_worth_rerunning(error):
                raise
    raise AssertionError("five deadlocks in a row")


def messages(shop: Shop) -> list[dict[str, Any]]:
    return rows(
        shop,
        "SELECT id, status, provider_id, sent_at IS NOT NULL AS has_time, turn_at IS NOT NULL AS is_ours FROM message "
        "WHERE tenant_id = :tenant ORDER BY id",
    )


def events(shop: Shop, kind: str) -> list[dict[str, Any]]:
    found = rows(shop, "SELECT payload FROM event WHERE tenant_id = :tenant AND type = :kind ORDER BY id", kind=kind)
    return [row["payload"] for row in found]


def test_an_echo_before_the_answer_is_the_message_and_the_answer_adds_nothing(shop: Shop) -> None:
    sending = Sending(shop, "Olá")

    assert hear(shop, an_echo("A1")) == sending.ids
    sending.answer(accepted("A1"))

    (row,) = messages(shop)
    assert (row["id"], row["status"], row["provider_id"], row["has_time"]) == (sending.ids[0], "sent", "A1", True)
    assert events(shop, "message_echoed") == []
    assert [event["status"] for event in events(shop, "message_status")] == ["sending", "sent"]


def test_an_echo_after_the_answer_is_no_second_message(shop: Shop) -> None:
    sending = Sending(shop, "Olá")

    sending.answer(accepted("A2"))
    hear(shop, an_echo("A2"))

    assert [(row["id"], row["status"]) for row in messages(shop)] == [(sending.ids[0], "sent")]
    assert events(shop, "message_echoed") == []


def test_an_answer_without_an_id_gets_it_from_the_echo_and_then_its_statuses(shop: Shop) -> None:
    sending = Sending(shop, "Olá")

    sending.answer(accepted(None))
    hear(shop, an_ack("A3", "delivered"), an_ack("A3", "read"))  # which alone would not tell whose it is
    assert [(row["status"], row["provider_id"]) for row in messages(shop)] == [("sent", None)]
    hear(shop, an_echo("A3"))

    (row,) = messages(shop)
    assert (row["id"], row["status"], row["provider_id"]) == (sending.ids[0], "read", "A3")
    assert [event["status"] for event in events(shop, "message_status")] == ["sending", "sent", "read"]


def test_a_lost_answer_is_settled_by_the_echo(shop: Shop) -> None:
    sending = Sending(shop, "Olá")

    sending.answer(LOST)
    assert [row["status"] for row in messages(shop)] == ["unknown"]
    hear(shop, an_echo("A4", "  Olá\n"))  # blanks do not survive every gateway

    assert [(row["id"], row["status"], row["provider_id"]) for row in messages(shop)] == [
        (sending.ids[0], "sent", "A4")
    ]


def test_a_lost_answer_is_settled_by_an_ack_when_it_can_only_be_of_this_one(shop: Shop) -> None:
    sending = Sending(shop, "Olá")

    sending.answer(LOST)
    hear(shop, an_ack("A5"))

    (row,) = messages(shop)
    assert (row["id"], row["status"], row["provider_id"], row["has_time"]) == (
        sending.ids[0],
        "delivered",
        "A5",
        True,
    )


def test_an_ack_of_what_somebody_typed_on_the_phone_settles_nothing(shop: Shop) -> None:
    sending = Sending(shop, "Olá")
    sending.answer(LOST)

    hear(shop, an_echo("A6", "typed by hand"), an_ack("A6"))

    found = {row["provider_id"]: row for row in messages(shop)}
    assert found[None]["status"] == "unknown"
    assert found[None]["id"] == sending.ids[0]
    assert found["A6"]["status"] == "delivered"
    assert not found["A6"]["is_ours"]


def test_an_ack_that_came_before_the_echo_of_what_somebody_typed_is_taken_back(shop: Shop) -> None:
    sending = Sending(shop, "Olá")
    sending.answer(LOST)

    hear(shop, an_ack("C1"))
    assert [(row["status"], row["provider_id"]) for row in messages(shop)] == [("delivered", "C1")]
    hear(shop, an_echo("C1", "typed by hand"))

    found = {row["provider_id"]: row for row in messages(shop)}
    assert (found[None]["status"], found[None]["id"]) == ("unknown", sending.ids[0])
    assert (found["C1"]["status"], found["C1"]["is_ours"]) == ("delivered", False)
    assert [event["status"] for event in events(shop, "message_status")][-2:] == ["unknown", "delivered"]
    hear(shop, an_echo("C2"))
    assert {(row["id"], row["status"]) for row in messages(shop) if row["is_ours"]} == {(sending.ids[0], "sent")}


@pytest.mark.parametrize("status", ["read", "played"])
def test_what_is_read_may_be_old_and_settles_nothing(shop: Shop, status: str) -> None:
    Sending(shop, "Olá").answer(LOST)

    hear(shop, an_ack("C3", status))

    assert [row["status"] for row in messages(shop)] == ["unknown"]


def test_an_ack_that_was_told_before_the_send_settles_nothing(shop: Shop) -> None:
    hear(shop, an_ack("C4"))
    Sending(shop, "Olá").answer(LOST)

    hear(shop, an_ack("C4"))

    assert [row["status"] for row in messages(shop)] == ["unknown"]


def test_an_ack_long_after_the_send_settles_nothing(shop: Shop) -> None:
    sending = Sending(shop, "Olá")
    sending.answer(LOST)
    earlier(shop, timedelta(minutes=11))

    hear(shop, an_ack("C5"))

    assert [(row["id"], row["status"]) for row in messages(shop)] == [(sending.ids[0], "unknown")]


def earlier(shop: Shop, by: timedelta) -> None:
    """The shop's attempts were begun so much earlier, and those that are over ended so much earlier."""
    with db.session([shop.tenant.id]) as s:
        s.execute(
            text("UPDATE attempt SET started_at = started_at - :by, ended_at = ended_at - :by WHERE tenant_id = :t"),
            {"by": by, "t": shop.tenant.id},
        )


def test_what_is_typed_long_after_a_send_without_an_id_is_another_message(shop: Shop) -> None:
    sending = Sending(shop, "Olá")
    sending.answer(accepted(None))
    earlier(shop, timedelta(minutes=11))

    hear(shop, an_echo("C6"))

    assert {(row["id"] == sending.ids[0], row["provider_id"]) for row in messages(shop)} == {
        (True, None),
        (False, "C6"),
    }


def test_what_an_earlier_attempt_is_told_of_does_not_concern_the_next_one(shop: Shop) -> None:
    first = Sending(shop, "Olá")
    first.answer(accepted("C7"))
    hear(shop, an_ack("C7", "failed"))
    first.line.release()
    with db.session([shop.tenant.id]) as s:
        assert outgoing.again(s, shop.tenant.id, first.ids[0])
    second = Sending(shop)
    assert [work.id for work in second.works] == first.ids
    second.answer(LOST)

    hear(shop, an_ack("C7"))
    hear(shop, an_echo("C7"))

    assert [(row["id"], row["status"], row["provider_id"]) for row in messages(shop)] == [
        (first.ids[0], "unknown", None)
    ]


def test_an_echo_finds_its_send_whichever_of_their_names_it_bears(shop: Shop) -> None:
    by_lid = inbound.Person((("lid", "777"),))
    hear(shop, msgspec.structs.replace(an_echo("C8", "typed"), person=by_lid, chat=by_lid))  # known by this name first
    sending = Sending(shop, "Olá")
    sending.answer(LOST)

    both = inbound.Person((("lid", "777"), ("phone", PHONE)))
    assert hear(shop, msgspec.structs.replace(an_echo("C9"), person=both, chat=both)) == sending.ids


def test_an_echo_of_what_was_refused_shows_that_it_left_all_the_same(shop: Shop) -> None:
    sending = Sending(shop, "Olá")
    fault = Fault(Kind.PERMANENT, Scope.MESSAGE, "rejected", "Timed Out", is_of_a_moment=True)
    sending.answer(Answer(Outcome.REFUSED, fault=fault))
    assert [row["status"] for row in messages(shop)] == ["queued"]

    hear(shop, an_echo("C10"))

    assert [(row["id"], row["status"]) for row in messages(shop)] == [(sending.ids[0], "sent")]


REFUSED = Answer(
    Outcome.REFUSED, fault=Fault(Kind.PERMANENT, Scope.MESSAGE, "rejected", "Timed Out", is_of_a_moment=True)
)


def again(shop: Shop, first: Sending) -> Sending:
    """The next attempt at the same message, whose wait is over."""
    first.line.release()
    make_due(shop)
    second = Sending(shop)
    assert [work.id for work in second.works] == first.ids
    return second


def test_an_echo_of_what_was_refused_and_sent_once_more_is_a_double_and_no_message_of_its_own(shop: Shop) -> None:
    first = Sending(shop, "Olá")
    first.answer(REFUSED)
    again(shop, first).answer(accepted("D2"))

    assert hear(shop, an_echo("D1")) == first.ids
    hear(shop, an_echo("D1"), an_echo("D2"))

    assert [(row["id"], row["status"], row["provider_id"]) for row in messages(shop)] == [(first.ids[0], "sent", "D2")]
    assert [event["status"] for event in events(shop, "message_status")][-2:] == ["sent", "sent_twice"]
    assert attempted(shop) == [("accepted", "echo", "D1"), ("accepted", "answer", "D2")]


def attempted(shop: Shop) -> list[tuple[Any, ...]]:
    order = "SELECT outcome, settled_by, provider_id FROM attempt WHERE tenant_id = :tenant ORDER BY number"
    return [tuple(row.values()) for row in rows(shop, order)]


def test_an_ack_of_what_was_lost_and_sent_once_more_is_a_double(shop: Shop) -> None:
    first = Sending(shop, "Olá")
    first.answer(LOST)
    with db.session([shop.tenant.id]) as s:
        s.execute(text("UPDATE message SET due_at = NULL WHERE id = :id"), {"id": first.ids[0]})
        assert outgoing.again(s, shop.tenant.id, first.ids[0])
    again(shop, first).answer(accepted("D4"))

    hear(shop, an_ack("D3"))

    assert [(row["status"], row["provider_id"]) for row in messages(shop)] == [("sent", "D4")]
    assert events(shop, "message_status")[-1]["status"] == "sent_twice"


def test_both_echoes_of_a_message_that_was_sent_twice_without_an_id_are_its_own(shop: Shop) -> None:
    first = Sending(shop, "Olá")
    first.answer(REFUSED)
    again(shop, first).answer(accepted(None))

    hear(shop, an_echo("D5"), an_echo("D6"))

    (row,) = messages(shop)
    assert (row["id"], row["provider_id"] in ("D5", "D6")) == (first.ids[0], True)
    assert [event["status"] for event in events(shop, "message_status")].count("sent_twice") == 1
    assert sorted(attempted(shop)) == [("accepted", "echo", "D5"), ("accepted", "echo", "D6")]


def test_an_echo_goes_to_what_has_no_id_yet_before_it_is_taken_for_a_double(shop: Shop) -> None:
    first = Sending(shop, "Olá")
    first.answer(REFUSED)
    second = again(shop, first)
    second.answer(accepted("D7"))
    second.line.release()
    other = Sending(shop, "Olá")
    other.answer(LOST)

    assert hear(shop, an_echo("D8")) == other.ids
    assert events(shop, "message_status")[-1]["status"] == "sent"


def test_a_refusal_long_ago_is_no_double_of_what_is_typed_now(shop: Shop) -> None:
    first = Sending(shop, "Olá")
    first.answer(REFUSED)
    again(shop, first).answer(accepted("D9"))
    earlier(shop, timedelta(minutes=11))

    hear(shop, an_echo("D10"))

    assert [row["provider_id"] for row in messages(shop)] == ["D9", "D10"]


def test_an_echo_before_the_second_answer_is_no_double_of_it(shop: Shop) -> None:
    first = Sending(shop, "Olá")
    first.answer(REFUSED)
    second = again(shop, first)
    doubles = count_of(metrics.double_sends, provider="megaapi")

    hear(shop, an_echo("D11"))
    second.answer(accepted("D11"))

    assert [(row["id"], row["provider_id"]) for row in messages(shop)] == [(first.ids[0], "D11")]
    assert attempted(shop) == [("refused", "answer", None), ("accepted", "echo", "D11")]
    assert doubles() == 0


PICTURE = {"image": {"link": "https://example.com/bolo.jpg"}}


def an_echo_of_a_picture(provider_id: str) -> inbound.Message:
    return msgspec.structs.replace(an_echo(provider_id), type="image", body={"image": {"mime_type": "image/jpeg"}})


@pytest.mark.parametrize("answer", [None, LOST, accepted(None)], ids=["no answer yet", "a lost one", "one without id"])
def test_a_file_may_have_waited_for_others_and_taken_its_time_before_its_echo_comes(
    shop: Shop, answer: Answer | None
) -> None:
    sending = Sending(shop, image=PICTURE["image"])
    earlier(shop, timedelta(minutes=9))
    if answer is not None:
        sending.answer(answer)

    assert hear(shop, an_echo_of_a_picture("E1")) == sending.ids


def test_a_picture_that_comes_long_after_the_answer_is_another_one(shop: Shop) -> None:
    sending = Sending(shop, image=PICTURE["image"])
    sending.answer(LOST)
    earlier(shop, timedelta(minutes=3))

    assert hear(shop, an_echo_of_a_picture("E2")) != sending.ids


def test_a_call_whose_process_died_was_not_under_way_until_somebody_found_that_out(shop: Shop) -> None:
    sending = Sending(shop, "Olá")
    earlier(shop, timedelta(hours=5))
    sending.answer(LOST)

    assert hear(shop, an_echo("E3")) != sending.ids


@pytest.mark.parametrize(("minutes", "is_ours"), [(6, True), (30, False)])
def test_what_a_dead_process_was_sending_is_over_when_its_call_must_have_been(
    shop: Shop, minutes: int, is_ours: bool
) -> None:
    sending = Sending(shop, image=PICTURE["image"])
    earlier(shop, timedelta(minutes=minutes))
    lease_runs_out(shop)
    assert Line.take(shop.channel.id, uuid4(), Pace(client_for_pace(settings().require_redis()))) is not None
    assert [row["status"] for row in messages(shop)] == ["unknown"]

    assert (hear(shop, an_echo_of_a_picture("E4")) == sending.ids) == is_ours


def refused(kind: Kind, scope: Scope, code: str) -> Answer:
    return Answer(Outcome.REFUSED, fault=Fault(kind, scope, code, "no", tries=6))


CERTAIN = [
    refused(Kind.THROTTLE, Scope.NUMBER, "throttled"),
    refused(Kind.SESSION, Scope.CHANNEL, "disconnected"),
    refused(Kind.AUTH, Scope.CHANNEL, "unauthorized"),
    refused(Kind.TRANSIENT, Scope.MESSAGE, "http_503"),
]


def of_fault(answer: Answer) -> str:
    return answer.fault.code if answer.fault else ""


def an_echo_of_a_voice(provider_id: str) -> inbound.Message:
    return msgspec.structs.replace(an_echo(provider_id), type="audio", body={"audio": {"mime_type": "audio/ogg"}})


@pytest.mark.parametrize("no", CERTAIN, ids=of_fault)
def test_what_somebody_types_after_a_refusal_that_is_certain_is_another_message(shop: Shop, no: Answer) -> None:
    sending = Sending(shop, "ok")
    sending.answer(no)

    assert hear(shop, an_echo("F1", "ok")) != sending.ids
    assert [(row["id"], row["status"]) for row in messages(shop) if row["is_ours"]] == [(sending.ids[0], "queued")]


def test_what_was_refused_by_a_session_that_is_closed_by_now_may_have_left_before(shop: Shop) -> None:
    sending = Sending(shop, "ok")
    sending.answer(refused(Kind.SESSION, Scope.CHANNEL, "closed_meanwhile"))

    assert hear(shop, an_echo("F1", "ok")) == sending.ids


@pytest.mark.parametrize("no", [CERTAIN[0], REFUSED], ids=of_fault)
def test_a_recording_that_somebody_makes_after_ours_was_refused_and_sent_again_is_no_double(
    shop: Shop, no: Answer
) -> None:
    first = Sending(shop, audio={"link": "https://example.com/a.ogg"})
    first.answer(no)
    again(shop, first).answer(accepted("F2"))

    assert hear(shop, an_echo_of_a_voice("F3")) != first.ids

    assert [row["provider_id"] for row in messages(shop)] == ["F2", "F3"]
    assert "sent_twice" not in [event["status"] for event in events(shop, "message_status")]


def test_both_recordings_of_what_was_taken_twice_without_an_id_are_ours(shop: Shop) -> None:
    first = Sending(shop, audio={"link": "https://example.com/a.ogg"})
    first.answer(REFUSED)
    again(shop, first).answer(accepted(None))

    assert hear(shop, an_echo_of_a_voice("F4")) == first.ids
    assert hear(shop, an_echo_of_a_voice("F5"))[0] in [row["id"] for row in messages(shop)]


def test_an_ack_is_not_kept_from_a_lost_send_by_a_refusal_that_was_certain(shop: Shop) -> None:
    first = Sending(shop, "eins")
    first.answer(CERTAIN[0])
    second = again(shop, first)
    second.answer(accepted("F6"))
    second.line.release()
    lost = Sending(shop, "zwei")
    lost.answer(LOST)

    hear(shop, an_ack("F7"))

    assert [(row["status"], row["provider_id"]) for row in messages(shop)] == [("sent", "F6"), ("delivered", "F7")]


def test_an_ack_settles_nothing_while_the_answer_is_on_its_way(shop: Shop) -> None:
    sending = Sending(shop, "Olá")

    hear(shop, an_ack("A7"))
    assert [row["status"] for row in messages(shop)] == ["sending"]
    sending.answer(accepted("A7"))

    assert [(row["status"], row["provider_id"]) for row in messages(shop)] == [("delivered", "A7")]


def test_an_ack_from_a_stranger_makes_no_contact(shop: Shop) -> None:
    stranger = inbound.Person((("phone", "5511900000009"),))

    hear(shop, inbound.Status("$", "A8", "delivered", datetime.now(UTC), chat=stranger))

    assert rows(shop, "SELECT count(*) AS n FROM contact WHERE tenant_id = :tenant") == [{"n": 0}]


def test_an_echo_that_was_not_known_for_ours_makes_room_for_the_answer(shop: Shop) -> None:
    sending = Sending(shop, "Olá")

    (echo,) = hear(shop, an_echo("A9", "a text that the gateway has changed"))
    assert len(messages(shop)) == 2
    sending.answer(accepted("A9"))

    assert [(row["id"], row["status"], row["provider_id"]) for row in messages(shop)] == [
        (sending.ids[0], "sent", "A9")
    ]
    assert events(shop, "message_merged") == [{"message_id": str(sending.ids[0]), "merged": str(echo)}]


def test_an_echo_of_long_ago_is_another_message_with_the_same_words(shop: Shop) -> None:
    sending = Sending(shop, "Olá")
    sending.answer(LOST)

    hear(shop, an_echo("A10", at=datetime.now(UTC) - timedelta(hours=1)))

    found = {row["provider_id"]: row["status"] for row in messages(shop)}
    assert found == {None: "unknown", "A10": "sent"}
    assert sending.ids[0] not in [row["id"] for row in messages(shop) if row["provider_id"]]


def test_the_same_echo_twice_and_its_acks_in_one_batch_end_in_one_row(shop: Shop) -> None:
    sending = Sending(shop, "Olá")
    sending.answer(LOST)

    hear(shop, an_ack("A11", "read"), an_echo("A11"), an_ack("A11"), an_echo("A11"))
    hear(shop, an_echo("A11"))

    assert [(row["id"], row["status"], row["provider_id"]) for row in messages(shop)] == [
        (sending.ids[0], "read", "A11")
    ]


def test_two_with_the_same_words_are_told_apart_by_their_order(shop: Shop) -> None:
    first = Sending(shop, "Olá")
    first.answer(LOST)
    with db.session([shop.tenant.id]) as s:  # nobody waits for it any longer: the next one may go
        s.execute(text("UPDATE message SET due_at = NULL WHERE id = :id"), {"id": first.ids[0]})
    first.line.release()
    second = Sending(shop, "Olá")
    second.answer(LOST)

    assert hear(shop, an_echo("A12")) == first.ids
    assert hear(shop, an_echo("A13")) == second.ids


def disconnected(shop: Shop) -> None:
    with db.session([shop.tenant.id]) as s:
        Lane.set_hold(s, shop.channel.id, Hold.DISCONNECTED, code="disconnected", reason="not connected")


def test_what_was_lost_before_a_drop_is_decided_while_nothing_is_sent(shop: Shop) -> None:
    sending = Sending(shop, "Olá")
    sending.answer(LOST)
    sending.line.release()
    disconnected(shop)
    with db.session([shop.tenant.id]) as s:
        s.execute(text("UPDATE message SET due_at = now() - interval '1 s' WHERE id = :id"), {"id": sending.ids[0]})

    lanes.decide_held()
    lanes.decide_held()

    found = rows(shop, "SELECT status, due_at FROM message WHERE tenant_id = :tenant")
    assert found == [{"status": "unknown", "due_at": None}]
    assert rows(shop, "SELECT count(*) AS n FROM dead_letter WHERE tenant_id = :tenant") == [{"n": 1}]


def test_what_a_dead_process_was_sending_when_the_session_dropped_is_unknown_and_not_under_way(shop: Shop) -> None:
    Sending(shop, "Olá")
    disconnected(shop)
    lanes.decide_held()
    assert [row["status"] for row in messages(shop)] == ["sending"]  # it has its lane still, and may write the answer
    with db.session() as s:
        s.execute(
            text("UPDATE lane SET until = now() - interval '1 s' WHERE channel_id = :id"), {"id": shop.channel.id}
        )

    lanes.decide_held()

    assert [row["status"] for row in messages(shop)] == ["unknown"]


@pytest.mark.parametrize("echo_first", [True, False])
def test_echo_and_answer_at_the_same_moment_end_in_one_row(shop: Shop, echo_first: bool) -> None:
    words = [f"Olá {n}" for n in range(8)]
    for n, word in enumerate(words):
        sending = Sending(shop, word)
        both: list[Callable[[], object]] = [
            lambda word=word, n=n: hear(shop, an_echo(f"B{n}", word)),  # type: ignore[misc] # the loop's values
            lambda sending=sending, n=n: sending.answer(accepted(f"B{n}")),  # type: ignore[misc] # likewise
        ]
        failures: list[BaseException] = []
        gate = threading.Barrier(2)

        def run(act: Callable[[], object], gate: threading.Barrier = gate, failed: Any = failures) -> None:
            gate.wait()
            try:
                act()
            except BaseException as error:  # a thread's failure is the test's
                failed.append(error)

        threads = [threading.Thread(target=run, args=(act,)) for act in (both if echo_first else reversed(both))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        sending.line.release()

    found = messages(shop)
    assert [(row["status"], row["provider_id"]) for row in found] == [("sent", f"B{n}") for n in range(len(words))]
    assert all(row["is_ours"] for row in found)
    assert rows(shop, "SELECT count(*) AS n FROM attempt WHERE tenant_id = :tenant") == [{"n": len(words)}]


def test_content_is_compared_by_what_survives_a_gateway() -> None:
    picture = {"image": {"link": "https://example.com/a.jpg", "caption": "Oi "}}

    assert fingerprint("image", picture) == fingerprint("image", {"image": {"sha256": "…", "caption": "Oi"}})
    assert fingerprint("audio", {"audio": {"link": "…"}}) == fingerprint("voice", {"voice": {"mime_type": "audio/ogg"}})
    place = {"location": {"latitude": "-23.55052", "longitude": -46.633308, "name": "Sé"}}
    assert fingerprint("location", place) == fingerprint(
        "location", {"location": {"latitude": -23.550524, "longitude": -46.63331}}
    )
    assert fingerprint("text", {"text": {"body": "a"}}) != fingerprint("text", {"text": {"body": "b"}})
    card = {"contacts": [{"name": {"formatted_name": "Ana"}, "phones": [{"phone": "+55"}]}]}
    assert fingerprint("contacts", card) == fingerprint("contacts", {"contacts": [{"name": {"formatted_name": "Ana"}}]})
