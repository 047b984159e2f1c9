"""What must not go wrong in sending when something else does: holders that lost their lane, processes that stand still,
faults of our own, plans without statistics.

As in `test_lanes.py`, the journal of a simulated Meta is held against our rows. Some holders of a lane are lines that
the test itself takes, and then is not heard of any more: as a process that died, or stood still for too long.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import dramatiq
import msgspec
import pytest
from cryptography.fernet import Fernet
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from models import Channel, Hold, Lane, MessageStatus, outgoing
from pombal import db
from pombal.broker import redis_client
from pombal.cli import main
from pombal.pace import Pace, client_for_pace
from pombal.settings import settings
from providers.outbound import Answer, Fault, Kind, Outcome, Scope
from sandbox import client
from tests.factories import Shop, a_shop, rows, superuser, texts
from tests.workers.sending import (
    TOKEN,
    Meta,
    a_number_at_meta,
    another_process,
    attempts,
    configure,
    events,
    finish,
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
)
from tests.workers.tools import (
    PATIENCE,
    another_number,
    deliveries,
    in_background,
    states,
    together,
    until,
    until_somebody_waits_for_a_lock,
)
from workers import _lanes, broker, outgoing_message
from workers._lanes import Lanes, Run
from workers._line import Line
from workers.outgoing_message import lanes as lanes_of_the_worker
from workers.outgoing_message import ring, ring_lanes

pytestmark = pytest.mark.usefixtures("queues")

OTHER = "+5511944440002"
REFUSED_FOR_NOW = Answer(
    Outcome.REFUSED, http_status=500, fault=Fault(Kind.TRANSIENT, Scope.MESSAGE, "131000", "something", tries=5)
)
NEVER_LEFT = Answer(Outcome.NOT_SENT, why="ConnectError")


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meta]:
    with a_number_at_meta(monkeypatch) as meta:
        configure(meta.shop, messages_per_second=1_000)
        yield meta


def people(count: int) -> list[str]:
    return [f"+55119{n:08}" for n in range(61_000_000, 61_000_000 + count)]


def holder(shop: Shop) -> Line:
    """The lane, taken as a process takes it; its lease runs out unless the line has another turn."""
    line = Line.take(shop.channel.id, uuid4(), Pace(client_for_pace(settings().require_redis())))
    assert line is not None
    return line


def hold_by(shop: Shop, hold: Hold, code: str) -> None:
    with db.session([shop.tenant.id]) as s:
        Lane.ensure(s, shop.tenant.id, shop.channel.id)
        Lane.set_hold(s, shop.channel.id, hold, code=code, reason="of this test")


def probe(shop: Shop) -> None:
    """The time of the next probe comes, and that of no message."""
    with db.session() as s:
        Lane.probe_now(s, shop.channel.id)
        order = "UPDATE lane SET next_due_at = now() WHERE channel_id = :channel"
        s.execute(text(order), {"channel": shop.channel.id})
    send(shop)


def rung() -> list[str]:
    """The channels whose bell lies in the queue."""
    with redis_client() as connection:
        bodies: Any = connection.hvals("dramatiq:outgoing_message.msgs")
    return [msgspec.json.decode(body)["args"][0] for body in bodies]


def wake_forgotten() -> list[UUID]:
    with db.session() as s:
        db.see_all(s)
        return outgoing.wake_forgotten(s)


# -- holders that lost their lane ------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [REFUSED_FOR_NOW, NEVER_LEFT], ids=["refused for now", "never left"])
@pytest.mark.parametrize("is_asked", [False, True], ids=["undecided", "an operator was to be asked"])
def test_a_message_that_a_late_answer_puts_back_is_found_again(meta: Meta, answer: Answer, is_asked: bool) -> None:
    configure(meta.shop, on_unknown="ask")
    (id_,) = queue(meta.shop, "um")
    old = holder(meta.shop)
    ((work, _),) = old.turn([], under_way=[], may_begin=True).begun
    lease_runs_out(meta.shop)
    send(meta.shop)
    if is_asked:
        make_due(meta.shop)
        send(meta.shop)
    stored = message(meta.shop, id_)
    assert (stored["status"], stored["due_at"] is None) == ("unknown", is_asked)

    old.turn([(work, answer)], under_way=[], may_begin=False)
    old.release()

    stored = message(meta.shop, id_)
    assert stored["status"] == "queued"
    assert lane(meta.shop)["next_due_at"] <= stored["due_at"]
    ring_lanes()
    assert str(meta.shop.channel.id) in rung()
    rows(meta.shop, "UPDATE message SET due_at = now() WHERE id = :id RETURNING 1", id=id_)  # its wait is over
    send(meta.shop)
    assert (message(meta.shop, id_)["status"], meta.accepted()) == ("sent", ["um"])


def test_a_receipt_whose_process_died_is_simply_sent_again_and_holds_up_nobody(meta: Meta) -> None:
    configure(meta.shop, on_unknown="ask")
    (receipt,) = queue(meta.shop, read={"message_id": "wamid.in"})
    (after,) = queue(meta.shop, "depois")
    assert [work.id for work, _ in holder(meta.shop).turn([], under_way=[], may_begin=True).begun] == [receipt]
    lease_runs_out(meta.shop)

    send(meta.shop)

    assert [message(meta.shop, id_)["status"] for id_ in (receipt, after)] == ["sent", "sent"]
    assert [attempt["outcome"] for attempt in attempts(meta.shop, receipt)] == ["unknown", "accepted"]
    assert (client.summary(meta.url)["reads"], meta.accepted()[1:], letters(meta.shop)) == (1, ["depois"], [])


def test_a_call_whose_slot_passed_while_its_process_stood_still_does_not_leave(
    meta: Meta, monkeypatch: pytest.MonkeyPatch
) -> None:
    (id_,) = queue(meta.shop, "um")
    line = holder(meta.shop)
    ((work, _),) = line.turn([], under_way=[], may_begin=True).begun
    with another_process() as (lanes, _), monkeypatch.context() as patch:
        patch.setattr(_lanes, "_TOO_LATE", 0.5)  # only here: what follows may be slow
        its = Run(lanes, meta.shop.channel.id)

        async def stand_still() -> None:
            soon = time.monotonic() + 0.2
            call = asyncio.create_task(its._deliver(its._sender(line.channel), work, soon, line.gap))
            await asyncio.sleep(0)  # now it waits for its slot
            time.sleep(1.5)  # noqa: ASYNC251 - nothing of this process runs meanwhile
            await call

        asyncio.run_coroutine_threadsafe(stand_still(), lanes._started()).result(PATIENCE)
        assert meta.calls() == []
        line.turn(its._done, under_way=[], may_begin=False)
        line.release()

    stored = message(meta.shop, id_)
    assert (stored["status"], stored["tries"], lane(meta.shop)["misses"]) == ("queued", 0, 0)
    finish(meta.shop)
    assert [attempt["outcome"] for attempt in attempts(meta.shop, id_)] == ["not_sent", "accepted"]
    assert len(meta.calls()) == 1


# -- what is no outage, and what is ----------------------------------------------------------------------------------


def test_links_that_meta_cannot_fetch_hold_nothing_and_delay_nobody_else(meta: Meta) -> None:
    for whom in people(12):
        client.faults(meta.url, kind="code", code=131053, to=whom)
        queue(meta.shop, to=whom, image={"link": "https://example.invalid/x.png"})
    (good,) = queue(meta.shop, "bom")

    send(meta.shop)

    found = lane(meta.shop)
    assert (found["hold"], found["misses"]) == (None, 0)
    assert message(meta.shop, good)["status"] == "sent"
    assert Counter(call["outcome"] for call in meta.calls())["accepted"] == 1
    finish(meta.shop)
    assert Counter(statuses(meta.shop)) == {"failed": 12, "sent": 1}


def test_a_lone_message_outlasts_an_outage_that_meta_tells_of(meta: Meta) -> None:
    client.faults(meta.url, kind="code", code=131016)
    (id_,) = queue(meta.shop, "um")

    for refusals in range(1, 8):
        make_due(meta.shop)
        send(meta.shop)
        stored = message(meta.shop, id_)
        assert (stored["status"], len(meta.calls())) == ("queued", refusals)
        assert stored["due_at"] > datetime.now(UTC)
        assert lane(meta.shop)["next_due_at"] == stored["due_at"]

    assert letters(meta.shop) == []
    client.clear_faults(meta.url)
    finish(meta.shop)
    assert meta.accepted() == ["um"]


@pytest.mark.parametrize(("hold", "code"), [(Hold.OUTAGE, 131016), (Hold.AUTH, 190)], ids=["an outage", "a bad token"])
def test_a_probe_in_vain_uses_up_no_try_and_another_message_is_the_next_one(meta: Meta, hold: Hold, code: int) -> None:
    client.faults(meta.url, kind="code", code=code, count=2)
    queue(meta.shop, "um")
    queue(meta.shop, "dois", to=OTHER)
    hold_by(meta.shop, hold, str(code))

    for number in (1, 2):
        probe(meta.shop)
        assert (lane(meta.shop)["hold"], lane(meta.shop)["probes"]) == (hold, number)

    assert [call["text"] for call in meta.calls()] == ["um", "dois"]
    assert [row["tries"] for row in rows(meta.shop, "SELECT tries FROM message")] == [0, 0]
    finish(meta.shop)
    assert sorted(meta.accepted()) == ["dois", "um"]
    assert lane(meta.shop)["hold"] is None


def test_a_pause_of_the_app_ends_at_another_time_for_each_of_its_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    first = a_shop(access_token=TOKEN)
    shops = [first, *(another_number(first, access_token=TOKEN) for _ in range(9))]
    with numbers_at_meta(monkeypatch, *shops) as (meta, *_):
        for shop in shops:
            queue(shop, "um")
        client.faults(meta.url, kind="code", code=4, count=1)

        send(first)

        ends = {lane(shop)["paused_until"] for shop in shops}
        assert None not in ends
        assert len(ends) > 1


# -- unknown messages ------------------------------------------------------------------------------------------------


def test_an_unknown_message_is_decided_although_webhooks_that_came_later_still_wait(meta: Meta) -> None:
    client.faults(meta.url, kind="reset_after", count=1)
    (id_,) = queue(meta.shop, "um")
    send(meta.shop)
    make_due(meta.shop)
    waiting = deliveries(meta.shop, [texts(meta.shop, "wamid.in")])

    send(meta.shop)

    assert states(waiting) == dict.fromkeys(waiting, "pending")
    assert (message(meta.shop, id_)["status"], len(meta.calls())) == ("sent", 2)


def test_an_operator_who_drops_the_letter_of_an_unknown_message_closes_it(meta: Meta) -> None:
    configure(meta.shop, on_unknown="ask")
    client.faults(meta.url, kind="reset_after", count=1)
    (id_,) = queue(meta.shop, "um")
    send(meta.shop)
    make_due(meta.shop)
    send(meta.shop)
    (letter,) = letters(meta.shop)
    (call,) = meta.calls()
    assert unknown(meta.shop) == 1

    assert main(["dead", "drop", str(letter["id"])]) == 0

    stored = message(meta.shop, id_)
    assert (stored["status"], stored["error_code"], events(meta.shop, id_)[-1]) == ("failed", "no_answer", "failed")
    assert stored["failed_at"] is not None
    assert unknown(meta.shop) == 0
    finish(meta.shop)
    assert len(meta.calls()) == 1
    report(meta.shop, call["wamid"], "sent", callback=call["callback"])
    stored = message(meta.shop, id_)
    assert (stored["status"], stored["provider_id"], stored["failed_at"]) == ("sent", call["wamid"], None)


def unknown(shop: Shop) -> int:
    """How many unknown messages its lane is said to have."""
    with db.session([shop.tenant.id]) as s:
        (found,) = Lane.overview(s, shop.channel.id)
    return int(found["unknown"])


# -- faults of our own -----------------------------------------------------------------------------------------------


def test_a_channel_whose_secrets_no_key_opens_is_held_until_they_are_mended(meta: Meta) -> None:
    shop = meta.shop
    (id_,) = queue(shop, "um")
    given = msgspec.json.encode({"row": str(shop.channel.id), "values": {"access_token": TOKEN}})
    sealed = Fernet(Fernet.generate_key()).encrypt(given)
    with superuser() as connection:
        connection.execute("UPDATE channel SET sealed = %s WHERE id = %s", [sealed, shop.channel.id])

    send(shop)

    held = lane(shop)
    assert (held["hold"], held["hold_code"], held["token"]) == ("auth", "misconfigured", None)
    assert "POMBAL_SECRET_KEYS" in held["hold_reason"]
    assert (message(shop, id_)["status"], meta.calls()) == ("queued", [])
    probe(shop)
    assert (lane(shop)["hold"], lane(shop)["probes"]) == ("auth", 1)
    with db.session([shop.tenant.id]) as s:
        s.get_one(Channel, (shop.tenant.id, shop.channel.id)).seal({"access_token": TOKEN})
    probe(shop)
    assert (lane(shop)["hold"], meta.accepted()) == (None, ["um"])
    kinds = [row["type"] for row in rows(shop, "SELECT type FROM event WHERE message_id IS NULL ORDER BY id")]
    assert kinds == ["channel_held", "channel_resumed"]


@pytest.fixture
def on_telling() -> Iterator[Callable[[Shop, str], None]]:
    """`on_telling(shop, status)`: the first event of that status raises, by a superuser's trigger, and no later one."""
    made: list[str] = []

    def install(shop: Shop, status: str) -> None:
        name = f"fault_{uuid4().hex}"
        made.append(name)
        parts = {"name": sql.Identifier(name), "seq": sql.Literal(name), "status": sql.Literal(status)}
        body = sql.SQL("""
            BEGIN
                IF NEW.tenant_id = {tenant} AND NEW.payload ->> 'status' = {status} AND nextval({seq}) = 1 THEN
                    RAISE EXCEPTION 'a fault of our own';
                END IF;
                RETURN NEW;
            END
        """).format(**parts, tenant=sql.Literal(str(shop.tenant.id)))
        with superuser() as connection:
            made_of = {**parts, "body": sql.Literal(body.as_string(connection))}
            for order in (
                "CREATE SEQUENCE {name}",
                "CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS {body}",
                "CREATE TRIGGER {name} BEFORE INSERT ON event FOR EACH ROW EXECUTE FUNCTION {name}()",
            ):
                connection.execute(sql.SQL(order).format(**made_of))

    yield install
    with superuser() as connection:
        for name in made:
            connection.execute(sql.SQL("DROP FUNCTION {} CASCADE").format(sql.Identifier(name)))
            connection.execute(sql.SQL("DROP SEQUENCE {}").format(sql.Identifier(name)))


def test_answers_that_were_heard_are_written_down_although_a_turn_fails(
    meta: Meta, on_telling: Callable[[Shop, str], None]
) -> None:
    ids = [queue(meta.shop, whom, to=whom)[0] for whom in people(3)]
    on_telling(meta.shop, "sent")

    with pytest.raises(DBAPIError):
        send(meta.shop)

    called = {call["text"] for call in meta.calls()}
    assert called
    sent = rows(meta.shop, "SELECT body FROM message WHERE status = 'sent'")
    assert {row["body"]["text"]["body"] for row in sent} == called
    lease_runs_out(meta.shop)
    finish(meta.shop)
    assert sorted(meta.accepted()) == people(3)
    assert [events(meta.shop, id_) for id_ in ids] == [["sending", "sent"]] * 3


def test_what_is_no_channels_id_is_a_dead_letter_at_once() -> None:
    nonsense = f"not-{uuid4()}"
    worker = dramatiq.Worker(broker, queues={"outgoing_message"}, worker_threads=1, worker_timeout=50)
    worker.start()
    try:
        outgoing_message.send(nonsense)
        with superuser() as connection:
            asked = "SELECT error, failures FROM dead_letter WHERE args::text LIKE %s"
            ((error, failures),) = until(lambda: connection.execute(asked, [f"%{nonsense}%"]).fetchall(), "the letter")
    finally:
        worker.stop()

    assert "not the id of a channel" in error
    assert failures == 1


# -- time ------------------------------------------------------------------------------------------------------------


def test_a_call_that_hangs_when_a_slice_ends_does_not_silence_its_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("_SLICE", 0.5), ("_ALONE", 0.5), ("_STRAGGLES", 0.2), ("_STOP_PATIENCE", 0.5)):
        monkeypatch.setattr(_lanes, name, seconds)
    shops = [a_shop(access_token=TOKEN), a_shop(access_token=TOKEN)]
    with numbers_at_meta(monkeypatch, *shops) as (meta, _):
        client.faults(meta.url, kind="hang_before", to=OTHER)
        (hanging,) = queue(shops[0], "hangs", to=OTHER)
        for shop in shops:
            configure(shop, messages_per_second=20)
            for whom in people(40):
                queue(shop, whom, to=whom)
        lanes = Lanes(lambda id_: _wake_again(lanes, id_))
        try:
            for shop in shops:
                lanes.wake(shop.channel.id)
            until(lambda: client.summary(meta.url)["accepted"] == 80, "all the others")

            assert message(shops[0], hanging)["status"] == "sending"  # nobody waited for it
        finally:
            lanes.stop()


def test_a_provider_that_is_always_slow_does_not_keep_a_lane_from_being_given_back(
    meta: Meta, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("_ALONE", 0.5), ("_STRAGGLES", 0.2), ("_HANGS", 0.5)):
        monkeypatch.setattr(_lanes, name, seconds)
    configure(meta.shop, messages_per_second=20)
    client.faults(meta.url, kind="latency", ms=400)
    for whom in people(200):
        queue(meta.shop, whom, to=whom)

    with another_process() as (lanes, rung_again):
        lanes.wake(meta.shop.channel.id).result(PATIENCE)

        assert rung_again == [meta.shop.channel.id]
    assert set(statuses(meta.shop)) == {"sent", "queued"}


def _wake_again(lanes: Lanes, channel_id: UUID) -> None:
    lanes.wake(channel_id)


def test_a_bell_that_a_stopping_process_hears_is_left_to_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = a_shop(access_token=TOKEN), a_shop(access_token=TOKEN)

    def a_worker() -> dramatiq.Worker:
        worker = dramatiq.Worker(broker, queues={"outgoing_message"}, worker_threads=2, worker_timeout=50)
        worker.start()
        return worker

    with numbers_at_meta(monkeypatch, one, two) as (meta, _):
        client.faults(meta.url, kind="latency", ms=3_000, channel=one.channel.name, count=1)
        worker = a_worker()
        queue(one, "um")
        ring(one.channel.id)
        until(meta.calls, "the call that is waited for")
        stopped = in_background(worker.stop)
        until(lambda: lanes_of_the_worker.stopping, "the end to begin")
        queue(two, "dois")
        ring(two.channel.id)
        stopped()
        assert (statuses(one), statuses(two)) == (["sent"], ["queued"])

        worker = a_worker()
        try:
            until(lambda: "dois" in meta.accepted(), "the call of the next process")
        finally:
            worker.stop()


# -- plans, and what nobody would come for ---------------------------------------------------------------------------


READ = ("message", "conversation")  # by the statements below


@pytest.fixture
def unanalysed() -> Iterator[None]:
    """There are no statistics of what is read, whatever the tests before left, and nobody gathers any meanwhile."""
    with superuser() as connection:
        for table in READ:
            connection.execute(sql.SQL("ALTER TABLE {} SET (autovacuum_enabled = off)").format(sql.Identifier(table)))
            connection.execute("SELECT pg_clear_relation_stats('public', %s)", [table])
            connection.execute(
                """
                SELECT pg_clear_attribute_stats('public', relname, attname, false)
                FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
                WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
                """,
                [table],
            )
        yield
        for table in READ:
            connection.execute(sql.SQL("ALTER TABLE {} RESET (autovacuum_enabled)").format(sql.Identifier(table)))
            connection.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(table)))


def believe_in_tenants(count: int, rows: int) -> None:
    """Statistics of a time when there were so many tenants with so many rows each."""
    with superuser() as connection:
        for table in READ:
            connection.execute(
                """
                SELECT pg_restore_relation_stats('schemaname', 'public', 'relname', %(table)s::text,
                    'relpages', ceil(%(all)s / 30.0)::integer, 'reltuples', %(all)s::real),
                    pg_restore_attribute_stats('schemaname', 'public', 'relname', %(table)s::text,
                    'attname', 'tenant_id', 'inherited', false, 'null_frac', 0::real, 'avg_width', 16,
                    'n_distinct', -1 / %(rows)s::real, 'correlation', 1::real)
                """,
                {"table": table, "all": count * rows, "rows": rows},
            )


def many(shop: Shop, count: int, recipients: int) -> None:
    """So many due messages to so many people, queued in one commit."""
    given = {"tenant": shop.tenant.id, "channel": shop.channel.id, "count": count, "recipients": recipients}
    with superuser() as connection, connection.transaction():
        for order in (
            "INSERT INTO contact (tenant_id, id)"
            " SELECT %(tenant)s, gen_random_uuid() FROM generate_series(1, %(recipients)s)",
            "INSERT INTO conversation (tenant_id, id, channel_id, contact_id)"
            " SELECT tenant_id, gen_random_uuid(), %(channel)s, id FROM contact WHERE tenant_id = %(tenant)s",
            """
            INSERT INTO message (tenant_id, id, channel_id, conversation_id, contact_id, direction, type, body, status,
                recipient, turn_at, due_at)
            SELECT %(tenant)s, gen_random_uuid(), %(channel)s, c.id, c.contact_id, 'out', 'text',
                '{"text": {"body": "um"}}', 'queued', '+5511944440001', at, at
            FROM generate_series(1, %(count)s) AS n
            JOIN (SELECT *, row_number() OVER () AS place FROM conversation WHERE tenant_id = %(tenant)s) AS c
                ON c.place = n %% %(recipients)s + 1
            CROSS JOIN LATERAL (SELECT now() - interval '1 hour' + n * interval '1 ms' AS at) AS time
            """,
        ):
            connection.execute(order, given)


def looked_at(shop: Shop, statement: Any, **values: Any) -> int:
    """How many rows of messages and conversations the statement looks at, as the lane runs it."""

    def read(node: dict[str, Any]) -> float:
        here = 0.0
        names = (node.get("Relation Name", ""), node.get("Index Name", ""))
        if "Scan" in node["Node Type"] and any("message" in name or "conversation" in name for name in names):
            removed = (node.get(f"Rows Removed by {why}", 0) for why in ("Filter", "Index Recheck"))
            here = (node["Actual Rows"] + sum(removed)) * node["Actual Loops"]
        return float(here) + sum(map(read, node.get("Plans", [])))

    with db.session([shop.tenant.id]) as s:
        db.by_key(s)
        explain = text("EXPLAIN (ANALYZE, FORMAT JSON) " + statement.text)
        (plan,) = s.execute(explain, {"tenant_id": shop.tenant.id} | values).scalar_one()
    return round(read(plan["Plan"]))


@pytest.mark.usefixtures("unanalysed")
@pytest.mark.parametrize("tenants", [(), (1, 1), (300, 1), (50, 20)], ids=["none", "1 x 1", "300 x 1", "50 x 20"])
def test_the_next_of_a_long_line_are_found_without_reading_it(meta: Meta, tenants: tuple[int, ...]) -> None:
    many(meta.shop, 5_000, recipients=5_000)
    if tenants:
        believe_in_tenants(*tenants)
    most = 64

    found = looked_at(meta.shop, outgoing._DUE, channel_id=meta.shop.channel.id, most=most)

    assert most <= found <= 5 * most


@pytest.mark.usefixtures("unanalysed")
@pytest.mark.parametrize("recipients", [5_000, 1])
def test_whoever_is_next_in_a_conversation_is_woken_without_reading_the_line(meta: Meta, recipients: int) -> None:
    many(meta.shop, 5_000, recipients)
    rows(meta.shop, "UPDATE message SET due_at = NULL WHERE direction = 'out' RETURNING 1")
    (one,) = rows(meta.shop, "SELECT conversation_id AS id FROM message LIMIT 1")

    found = looked_at(meta.shop, outgoing._WAKE, conversations=[one["id"]])

    assert 1 <= found <= 8
    assert len(rows(meta.shop, "SELECT FROM message WHERE due_at IS NOT NULL")) == 1


def test_a_lane_without_a_date_and_a_first_message_without_one_are_healed(meta: Meta) -> None:
    (undated,) = queue(meta.shop, "lane without a date")
    (parked,) = queue(meta.shop, "parked", to=OTHER)
    rows(meta.shop, "UPDATE message SET due_at = NULL WHERE id = :id RETURNING 1", id=parked)
    forget_date(meta.shop)
    send(meta.shop)
    assert meta.calls() == []

    assert meta.shop.channel.id in wake_forgotten()

    ring_lanes()
    assert str(meta.shop.channel.id) in rung()
    send(meta.shop)
    assert [message(meta.shop, id_)["status"] for id_ in (undated, parked)] == ["sent", "sent"]
    queue(meta.shop, "once more")
    forget_date(meta.shop)  # this time alone
    assert meta.shop.channel.id in wake_forgotten()
    send(meta.shop)
    assert statuses(meta.shop) == ["sent"] * 3
    assert meta.shop.channel.id not in wake_forgotten()


def forget_date(shop: Shop) -> None:
    with db.session() as s:
        order = "UPDATE lane SET next_due_at = NULL WHERE channel_id = :channel"
        s.execute(text(order), {"channel": shop.channel.id})


def test_whoever_wakes_the_forgotten_takes_the_lane_before_its_messages(meta: Meta) -> None:
    """As a turn does: otherwise each would wait for what the other has."""
    (id_,) = queue(meta.shop, "um")
    rows(meta.shop, "UPDATE message SET due_at = NULL WHERE id = :id RETURNING 1", id=id_)
    conversation = message(meta.shop, id_)["conversation_id"]

    with db.session([meta.shop.tenant.id]) as s:
        Lane.lock(s, [meta.shop.channel.id])
        woken = in_background(wake_forgotten)
        until_somebody_waits_for_a_lock()
        outgoing.wake(s, meta.shop.tenant.id, {conversation})

    woken()
    assert message(meta.shop, id_)["status"] == MessageStatus.QUEUED
    send(meta.shop)
    assert meta.accepted() == ["um"]


def test_the_forgotten_are_woken_again_and_again_while_the_lane_is_sent_from(meta: Meta) -> None:
    for n, whom in enumerate(people(20)):
        queue(meta.shop, f"{n}-1", f"{n}-2", f"{n}-3", to=whom)

    def wake() -> None:
        for _ in range(40):
            wake_forgotten()

    together(wake, wake, partial(finish, meta.shop))

    told = client.summary(meta.url)
    assert (told["accepted"], told["by_text_max"], set(statuses(meta.shop))) == (60, 1, {"sent"})
