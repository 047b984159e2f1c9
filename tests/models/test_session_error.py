"""What counts as an error of a session, and how many are too many (F1, F2)."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from models import Channel, ChannelKind, Repair, SessionEnd, SessionError, Tenant
from models.session_error import Tally
from pombal import db
from tests.factories import superuser

WINDOW = timedelta(seconds=300)


@pytest.fixture
def channel(tenant: Tenant) -> Channel:
    made = Channel(id=uuid4(), tenant_id=tenant.id, kind=ChannelKind.BAILEYS, name="loja", config={})
    with db.session([tenant.id]) as s:
        s.add(made)
    return made


def ago(seconds: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds)


def row(channel: Channel, id_: str, at: datetime, **more: Any) -> dict[str, Any]:
    given = {"jid": "5511944440001@s.whatsapp.net", "participant": "", "cause": "ratchet", "source": "webhook"}
    return {"tenant_id": channel.tenant_id, "channel_id": channel.id, "message_id": id_, "at": at, **given, **more}


def record(*rows: dict[str, Any]) -> list[tuple[str, int]]:
    with db.session([rows[0]["tenant_id"]]) as s:
        return [(one["message_id"], one["times"]) for one in SessionError.record(s, rows)]


def tally(channel: Channel, **more: Any) -> Tally:
    with db.session([channel.tenant_id]) as s:
        SessionError.heal(s, channel.tenant_id, channel.id)
        return SessionError.tally(s, channel.tenant_id, channel.id, WINDOW, **more)


def arrived(channel: Channel, id_: str, jid: str = "5511944440001", contact: UUID | None = None) -> None:
    """A message that could be decrypted."""
    contact = contact or uuid4()
    with superuser() as connection:
        given = {"t": channel.tenant_id, "c": channel.id, "p": contact, "id": id_, "jid": jid}
        for order in (
            "INSERT INTO contact (tenant_id, id) VALUES (%(t)s, %(p)s) ON CONFLICT DO NOTHING",
            "INSERT INTO contact_identity (tenant_id, channel_id, kind, value, contact_id)"
            " VALUES (%(t)s, %(c)s, 'phone', %(jid)s, %(p)s) ON CONFLICT DO NOTHING",
            "INSERT INTO conversation (tenant_id, id, channel_id, contact_id)"
            " VALUES (%(t)s, %(p)s, %(c)s, %(p)s) ON CONFLICT DO NOTHING",
            "INSERT INTO message (tenant_id, id, channel_id, conversation_id, contact_id, direction, type, body,"
            " provider_id, status) VALUES (%(t)s, gen_random_uuid(), %(c)s, %(p)s, %(p)s, 'in', 'text', '{}', %(id)s,"
            " 'received')",
        ):
            connection.execute(order, given)


@pytest.mark.parametrize(("count", "spread", "expected"), [(6, 300, 6), (5, 300, 5), (6, 301, 5)])
def test_a_window_has_both_its_ends(channel: Channel, count: int, spread: int, expected: int) -> None:
    first = ago(spread + 5)
    ats = [first, *[first + timedelta(seconds=spread)] * (count - 1)]
    record(*[row(channel, f"M{n}", at) for n, at in enumerate(ats)])

    assert tally(channel).at_once == expected


def test_a_message_counts_once_however_often_it_is_told_of(channel: Channel) -> None:
    assert record(row(channel, "A", ago(9)), row(channel, "A", ago(8)), row(channel, "B", ago(8))) == [
        ("A", 1),
        ("B", 1),
    ]
    assert record(row(channel, "A", ago(1), source="log")) == []
    assert record(row(channel, "C", ago(1), jid="5511944440002@s.whatsapp.net")) == [("C", 1)]
    record(row(channel, "C", ago(1), jid="98765432109876@lid"))  # the same one under its other address

    found = tally(channel)
    assert (found.at_once, found.errors, found.contacts) == (3, 3, 2)
    with superuser() as connection:
        query = "SELECT message_id, times FROM session_error WHERE channel_id = %s AND jid LIKE '%%1@s%%' ORDER BY 1"
        assert connection.execute(query, [channel.id]).fetchall() == [("A", 2), ("B", 1)]


def test_a_message_that_arrived_is_healed_whichever_came_first(channel: Channel) -> None:
    arrived(channel, "BEFORE")
    record(*[row(channel, id_, ago(3)) for id_ in ("BEFORE", "AFTER", "NEVER")])
    arrived(channel, "AFTER")

    assert tally(channel).errors == 1


def test_nobody_elses_errors_count(tenant: Tenant, channel: Channel) -> None:
    other = Channel(id=uuid4(), tenant_id=tenant.id, kind=ChannelKind.BAILEYS, name="other", config={})
    with db.session([tenant.id]) as s:
        s.add(other)
    record(*[row(other, f"M{n}", ago(2)) for n in range(9)])

    assert tally(channel) == Tally(0, 0, 0, 0, 0, {}, None)


def test_what_is_old_or_of_an_incident_that_is_over_does_not_count_again(channel: Channel) -> None:
    record(*[row(channel, f"DAY{n}", ago(86_500)) for n in range(9)])
    assert tally(channel).errors == 0  # not even written down

    record(*[row(channel, f"M{n}", ago(20)) for n in range(6)])
    assert tally(channel).at_once == 6
    with db.session([channel.tenant_id]) as s:
        made: dict[str, Any] = {"host": "h", "cause": "ratchet", "since": ago(20), "evidence": {}}
        assert Repair.open(s, channel.tenant_id, channel.id, **made) is not None
        assert Repair.open(s, channel.tenant_id, channel.id, **made) is None  # one at a time
    with db.session([channel.tenant_id]) as s:
        assert Repair.cancel(s, channel.tenant_id, channel.id)

    assert tally(channel).errors == 0
    assert tally(channel, since=ago(30)).errors == 6
    with db.session([channel.tenant_id]) as s:  # whoever counted just before the other one was closed
        assert Repair.open(s, channel.tenant_id, channel.id, **made) is None
        assert Repair.open(s, channel.tenant_id, channel.id, is_by_hand=True, **made) is not None


def test_a_clock_that_is_ahead_makes_no_errors_of_the_future(channel: Channel) -> None:
    record(*[row(channel, f"M{n}", ago(-3600 * n)) for n in range(6)])

    assert tally(channel).at_once == 6


def test_weak_evidence_counts_one_per_second_and_apart(channel: Channel) -> None:
    second = ago(5).replace(microsecond=0)
    with db.session([channel.tenant_id]) as s:
        for n in range(40):
            SessionError.weak(s, channel.tenant_id, channel.id, second + timedelta(milliseconds=20 * n))
        SessionError.weak(s, channel.tenant_id, channel.id, second + timedelta(seconds=1))
    record(row(channel, "A", ago(3)))

    found = tally(channel)
    assert (found.at_once, found.strong, found.contacts) == (2, 1, 1)  # the more of them, and never their sum
    assert found.causes == {"weak": 2, "ratchet": 1}


def test_what_came_after_a_step_tells_whether_it_helped(channel: Channel) -> None:
    contact = uuid4()
    arrived(channel, "LONG-AGO", contact=contact)
    record(*[row(channel, f"M{n}", ago(20)) for n in range(6)])
    step = datetime.now(UTC)

    def heard() -> tuple[int, int, int]:
        with db.session([channel.tenant_id]) as s:
            SessionError.heal(s, channel.tenant_id, channel.id)
            given = (channel.tenant_id, channel.id, ago(60), step)
            found = SessionError.heard_since(s, *given, grace=0, weak=False)
            assert SessionError.heard_since(s, *given, grace=60, weak=False)["fresh"] == found["errors"]
            return found["errors"], found["decrypted"], found["traffic"]

    assert heard() == (0, 0, 0)
    record(row(channel, "STILL", datetime.now(UTC)))
    assert heard() == (1, 0, 0)
    arrived(channel, "SOMEBODY", jid="5511944440099")
    assert heard() == (1, 0, 1)
    arrived(channel, "AGAIN", contact=contact)
    assert heard() == (0, 1, 2)  # this contact's messages can be decrypted again, later than the error


def test_ends_of_connections_are_counted_by_their_code(channel: Channel) -> None:
    def end(code: int, at: datetime) -> dict[str, Any]:
        return {"tenant_id": channel.tenant_id, "channel_id": channel.id, "code": code, "at": at, "source": "log"}

    with db.session([channel.tenant_id]) as s:
        SessionEnd.note(s, [end(440, ago(60)), end(440, ago(50)), end(428, ago(40)), end(503, ago(90_000))])
        SessionEnd.note(s, [end(440, ago(30)), end(440, ago(70))])  # told late: no news
    with db.session([channel.tenant_id]) as s:
        lately = SessionEnd.lately(s, channel.tenant_id, channel.id, timedelta(minutes=30))

    assert lately == {440: 2, 428: 1}


def test_messages_of_our_own_other_device_are_nobodys_contact(channel: Channel) -> None:
    jids = [f"55119444400{n:02d}@s.whatsapp.net" for n in range(7)]
    record(*[row(channel, jid, ago(2), jid=jid, participant="me") for jid in jids])

    found = tally(channel)
    assert (found.at_once, found.contacts) == (7, 0)
    with db.session([channel.tenant_id]) as s:
        assert SessionError.affected(s, channel.tenant_id, channel.id, ago(60), 9) == []
