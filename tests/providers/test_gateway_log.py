"""What is read out of gateways' logs. The samples are real; all else is written afresh by `gateway_logs.py`."""

import gzip
import io
import json
import random
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pombal.cli import main
from pombal.cli.session_logs import Scan, Told
from providers.gateway_log import LONGEST, LOOK_BACK, ME, Backlog, Ended, Failure, Finding, LogReader, Weak, last_clock
from providers.undecrypted import Cause
from tests.providers import gateway_logs
from tests.providers.gateway_logs import WRAPPINGS, Event, Gateway, as_json, as_pretty, docker, plain

SAMPLES = Path(__file__).parent.parent / "samples" / "baileys"
NAIVE = re.compile(rb"Invalid PreKey ID|Bad MAC|PreKeyError|failed to decrypt message", re.IGNORECASE)
NOW = datetime(2026, 9, 1, 12, 0, tzinfo=UTC)
WINDOW = timedelta(seconds=300)


def read(text: bytes, **options: Any) -> list[Finding]:
    reader = LogReader(**{"day": date(2026, 9, 1), **options})
    return reader.feed(text, NOW) + reader.finish(NOW)


def lines(*texts: str) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


def scanned(text: bytes) -> Scan:
    scan = Scan()
    scan.read(io.BytesIO(text), LogReader(day=date(2026, 9, 1)))
    return scan


# ------------------------------------------------------------------------------------------------------- the samples


def sample(number: str) -> tuple[bytes, dict[str, Any]]:
    (log,) = SAMPLES.glob(f"*-{number}-*.log")
    return log.read_bytes(), json.loads(log.with_suffix(".expected.json").read_text())


@pytest.mark.parametrize("number", ["01", "03", "05", "06", "07", "08"])
def test_a_sample_tells_of_each_session_what_is_true(number: str) -> None:
    """But for what no log tells: that a message was decrypted after all."""
    text, expected = sample(number)

    scan = scanned(text)

    assert None not in scan.sessions
    for name, truth in expected["sessions"].items():
        shown = scan.sessions.get(name, Told()).shown(WINDOW)
        assert shown == {
            "failed_messages_distinct": truth["failed_messages_distinct"],
            "healed_by_retry": 0,
            "failed_unhealed": truth["failed_messages_distinct"],
            "duplicate_deliveries_benign": truth["duplicate_deliveries_benign"],
            "max_failed_distinct_in_300s": truth["max_failed_in_300s"],
        }
        by_contact = Counter(participant_of(text, *message) for message in scan.sessions.get(name, Told()).failed)
        assert not Counter(truth["unhealed_by_contact"]) - by_contact
        assert by_contact.total() - sum(truth["unhealed_by_contact"].values()) == truth["healed_by_retry"]
    assert set(scan.sessions) <= set(expected["sessions"])


def participant_of(text: bytes, jid: str, id_: str) -> str:
    failure = next(one for one in read(text) if isinstance(one, Failure) and one.message_id == id_)
    return failure.participant or jid


@pytest.mark.parametrize("number", ["02", "04"])
def test_a_sample_without_sessions_tells_the_sum_of_them(number: str) -> None:
    text, expected = sample(number)

    scan = scanned(text)

    assert set(scan.sessions) == {None}
    told = scan.sessions[None].shown(WINDOW)
    for field in ("failed_messages_distinct", "duplicate_deliveries_benign"):
        assert told[field] == sum(truth[field] for truth in expected["sessions"].values())


@pytest.mark.parametrize("number", ["01", "02", "03", "04", "05", "06", "07", "08"])
def test_each_matching_line_of_a_sample_counts_or_has_a_reason_why_not(number: str) -> None:
    text, expected = sample(number)

    scan = scanned(text)

    assert scan.matched == sum(bool(NAIVE.search(line)) for line in text.split(b"\n"))
    assert scan.matched == scan.lines["counted"] + sum(scan.not_counted().values())
    if number != "05":  # whose sheet counted the records, and not what pino-pretty made of them
        assert scan.matched == expected["naive_matching_lines_total"]


def test_the_sample_of_ends_tells_each_end_once() -> None:
    text, _ = sample("08")

    ends = [(one.session, one.code) for one in read(text) if isinstance(one, Ended)]

    codes = [515, 440, 401, 503, 500, 401, 403, 405, 428]
    assert ends == [(str(100 + n), code) for n, code in enumerate(codes)]


def test_the_catalogue_tells_the_causes() -> None:
    text, _ = sample("01")

    causes = Counter(one.cause for one in read(text) if isinstance(one, Failure))

    assert causes == {
        Cause.RATCHET: 4,
        Cause.DUPLICATE: 2,
        Cause.PREKEY: 1,
        Cause.NO_SESSION: 1,
        Cause.SENDER_KEY: 1,
        Cause.AHEAD: 1,
        Cause.IDENTITY: 1,
    }


# ----------------------------------------------------------------------------------------------------- written afresh

CAUSES = ["ratchet", "ratchet", "ratchet", "ahead", "duplicate_block", *gateway_logs.DIRECT]
KNOWN = {"duplicate_block": "duplicate"}


def a_log(seed: int, wrap: Any, shape: Any, *, events: int = 40, **options: Any) -> tuple[bytes, list[Event]]:
    """Sessions in any order, with chatter in between, retries of the same id, and blocks whose record comes later."""
    gateway = Gateway(seed, **options)
    dice = gateway.dice
    sessions = [str(dice.randrange(1, 100)) for _ in range(2)] + ["2", "26"]
    contacts = [gateway.contact() for _ in range(6)]
    truth: list[Event] = []
    written: list[str] = []
    late: list[Any] = []
    for _ in range(events):
        session, contact = dice.choice(sessions), dice.choice(contacts)
        repeated = dice.choice(truth) if truth and dice.random() < 0.15 else None
        if repeated is not None and repeated.cause == "ratchet":  # a retry that fails again
            event, made = gateway.event(repeated.session, contact_of(repeated, contacts), "ratchet", repeated.id)
        else:
            event, made = gateway.event(session, contact, dice.choice(CAUSES))
        truth.append(event)
        blocks = [line for line in made if isinstance(line, str)]
        records = [line for line in made if not isinstance(line, str)]
        for line in blocks:
            written += wrap(shape(line), gateway.at)
        late += records
        # A record is written a little later, so that another's block may stand between; a contact's in their order.
        while late and (len(late) > 6 or dice.random() < 0.7):
            written += wrap(shape(late.pop(0)), gateway.at)
        if dice.random() < 0.5:
            for line in gateway.chatter(session):
                written += wrap(shape(line), gateway.at)
    for line in late:
        written += wrap(shape(line), gateway.at)
    return lines(*written), truth


def contact_of(event: Event, contacts: Iterable[tuple[str, str]]) -> tuple[str, str]:
    return next(one for one in contacts if one[0] == event.jid)


def told(found: list[Finding]) -> list[tuple[Any, ...]]:
    return sorted(
        (one.session, one.jid, one.message_id, one.cause.value, one.at) for one in found if isinstance(one, Failure)
    )


def true(events: list[Event], *, is_named: bool = True) -> list[tuple[Any, ...]]:
    return sorted(
        (one.session if is_named else None, one.jid, one.id, KNOWN.get(one.cause, one.cause), one.at) for one in events
    )


@pytest.mark.parametrize("wrap", WRAPPINGS)
@pytest.mark.parametrize("shape", [as_json, as_pretty])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_new_log_tells_what_is_true(wrap: Any, shape: Any, seed: int) -> None:
    text, events = a_log(seed, wrap, shape)

    found = read(text)

    assert told(found) == true(events)
    assert not [one for one in found if not isinstance(one, Failure)]


@pytest.mark.parametrize("seed", range(5))
def test_the_older_line_of_baileys_tells_the_same_without_sessions(seed: int) -> None:
    text, events = a_log(seed, plain, as_json, is_old=True, field=None)

    assert told(read(text)) == true(events, is_named=False)


@pytest.mark.parametrize("field", ["session", "instanceName", "ctx.name"])
def test_the_session_is_read_where_one_says_it_is(field: str) -> None:
    gateway = Gateway(9, field=None)
    event, (*_, record) = gateway.event("sales", gateway.contact(), "prekey")
    holder = record
    *folders, name = field.split(".")
    for folder in folders:
        holder = holder.setdefault(folder, {})
    holder[name] = "sales"
    record["session" if field != "session" else "instance"] = "other"

    assert told(read(lines(*as_json(record)), attribute=field)) == true([event])


@pytest.mark.parametrize(("wrap", "shape"), [(plain, as_json), (docker, as_json), (plain, as_pretty)])
def test_wherever_a_log_is_cut_the_same_is_found(wrap: Any, shape: Any) -> None:
    text, _ = a_log(7, wrap, shape, events=6)
    whole = read(text)
    assert whole

    reader = LogReader(day=date(2026, 9, 1))
    found = [one for n in range(len(text)) for one in reader.feed(text[n : n + 1], NOW)]
    assert found + reader.finish(NOW) == whole

    for seed in range(20):
        dice = random.Random(seed)  # noqa: S311 - a test's dice
        reader, found, at = LogReader(day=date(2026, 9, 1)), [], 0
        while at < len(text):
            size = dice.choice([1, 7, 100, 3000, 20_000])
            found += reader.feed(text[at : at + size], NOW)
            at += size
        assert found + reader.finish(NOW) == whole


@pytest.mark.parametrize(("wrap", "shape"), [(plain, as_json), (docker, as_json), (plain, as_pretty)])
def test_who_goes_on_at_the_place_that_was_reached_finds_the_rest_and_nothing_twice(wrap: Any, shape: Any) -> None:
    text, _ = a_log(8, wrap, shape, events=12)
    whole = read(text)

    for cut in range(0, len(text), 97):
        first = LogReader(day=date(2026, 9, 1))
        before = first.feed(text[:cut], NOW)
        begin = max(first.offset - LOOK_BACK, 0)
        second = LogReader(day=date(2026, 9, 1), begin=begin)
        after = second.feed(text[begin:], NOW) + second.finish(NOW)

        assert before + [one for one in after if one.byte >= first.offset] == whole


def test_the_same_lines_again_count_once() -> None:
    text, _ = a_log(11, plain, as_json)

    once, twice = scanned(text), scanned(text + text)

    assert {name: told.shown(WINDOW) for name, told in once.sessions.items()} == {
        name: told.shown(WINDOW) for name, told in twice.sessions.items()
    }
    assert once.lines["counted"] == twice.lines["counted"] > 0
    assert twice.lines["repeated"] > once.lines["repeated"]


def test_six_within_the_window_are_six_and_within_a_second_more_are_five() -> None:
    for seconds, most in ((300, 6), (301, 5)):
        told = Told()
        for n, at in enumerate([0, 1, 2, 3, 4, seconds]):
            told.add(
                Failure("1", "5511900000001@s.whatsapp.net", "", f"ID{n}", Cause.RATCHET, NOW + timedelta(0, at), 0)
            )

        assert told.most_within(WINDOW) == most


def test_a_message_that_is_delivered_twice_after_it_failed_has_healed() -> None:
    gateway = Gateway(4)
    contact = gateway.contact()
    event, failed = gateway.event("5", contact, "ratchet")
    _, again = gateway.event("5", contact, "duplicate", event.id)

    shown = scanned(lines(*(text for line in [*failed, *again] for text in as_json(line)))).sessions["5"].shown(WINDOW)

    assert (shown["failed_messages_distinct"], shown["healed_by_retry"], shown["failed_unhealed"]) == (1, 1, 0)


# ------------------------------------------------------------------------------------------------------ who is who


def test_a_block_is_of_the_contact_whose_address_it_names() -> None:
    """Two contacts at once, of two sessions; the first block belongs to the record that comes last."""
    gateway = Gateway(5)
    ana, bia = gateway.contact(), gateway.contact()
    first, ana_lines = gateway.event("1", ana, "duplicate_block")
    second, bia_lines = gateway.event("2", bia, "ratchet")
    made = [*ana_lines[:-2], *bia_lines, *ana_lines[-2:]]

    assert told(read(lines(*(text for line in made for text in as_json(line))))) == true([first, second])


def test_a_phone_and_a_lid_with_the_same_digits_are_two() -> None:
    gateway = Gateway(6)
    digits = "551190000000001"
    first, lid = gateway.event("1", (f"{digits}@lid", f"{digits}_1.0"), "duplicate_block")
    second, phone = gateway.event("1", (f"{digits}@s.whatsapp.net", f"{digits}.0"), "ratchet")
    made = [*lid[:-2], *phone, *lid[-2:]]

    assert told(read(lines(*(text for line in made for text in as_json(line))))) == true([first, second])


def test_a_block_that_docker_writes_after_its_record_is_found_all_the_same() -> None:
    gateway = Gateway(12)
    event, made = gateway.event("1", gateway.contact(), "duplicate_block")
    text = [one for line in [*made[-2:], *made[:-2]] for one in docker(as_json(line), gateway.at)]

    assert told(read(lines(*text))) == true([event])


def test_a_record_without_a_block_is_told_when_nothing_more_comes() -> None:
    gateway = Gateway(13)
    event, made = gateway.event("1", gateway.contact(), "ratchet")
    reader = LogReader()

    assert reader.feed(lines(*as_json(made[-1])), NOW) == []
    assert reader.offset == 0
    assert told(reader.settle(NOW)) == true([event])
    assert reader.offset > 0


def test_services_that_write_at_once_are_kept_apart() -> None:
    """Line by line in turns, as compose shows them."""
    gateway = Gateway(14)
    first, one = gateway.event("1", gateway.contact(), "duplicate_block")
    second, other = gateway.event("2", gateway.contact(), "ratchet")
    left = [f"left-1   | {text}" for line in one for text in as_pretty(line)]
    right = [f"right-1  | {text}" for line in other for text in as_pretty(line)]
    woven = [text for n in range(max(len(left), len(right))) for text in (*left[n : n + 1], *right[n : n + 1])]

    assert told(read(lines(*woven))) == true([first, second])
    assert {one.session for one in read(lines(*woven), attribute="prefix")} == {"left-1", "right-1"}


def test_a_record_that_docker_split_is_joined() -> None:
    gateway = Gateway(15)
    event, made = gateway.event("1", gateway.contact(), "prekey")
    made[-1]["err"]["stack"] += "\n    at filler" * 3000
    text = lines(*docker(as_json(made[-1]), gateway.at))
    assert text.count(b"\n") > 1

    assert told(read(b"noise\n" * 10_000 + text)) == true([event])


def test_waha_names_its_session_before_the_message() -> None:
    key = {"remoteJid": "5511911110001:7@s.whatsapp.net", "fromMe": False, "id": "3EB0AA"}
    fields = json.dumps({"session": "60501", "key": key})
    text = lines(
        "[09:13:40.484] \x1b[31mERROR\x1b[39m (WhatsappSession/7): "
        f"\x1b[36msession:60501 - failed to decrypt message\x1b[39m {fields}",
        "    err: {",
        '      "type": "PreKeyError",',
        '      "message": "Invalid PreKey ID",',
        '      "stack":',
        "          PreKeyError: Invalid PreKey ID",
        "    }",
        "[09:13:41.000] INFO (7): request completed {}",
    )

    (found,) = read(text)

    assert isinstance(found, Failure)
    assert found[:5] == ("60501", "5511911110001@s.whatsapp.net", "", "3EB0AA", Cause.PREKEY)
    assert found.at == datetime(2026, 9, 1, 9, 13, 40, 484000, UTC)


STUB = {
    "key": {"remoteJid": "5511911110001@s.whatsapp.net", "fromMe": False, "id": "3EB0BB"},
    "messageTimestamp": 1757509200,
    "pushName": "Ana",
    "messageStubType": 2,
    "messageStubParameters": ["No session record"],
}
EVOLUTION = "[Evolution API]  v2.3.6 {pid} - Mon Sep 01 2026 13:00:00   WARN  [ChannelStartupService] [string] "


@pytest.mark.parametrize("colour", ["", "\x1b[33m"])
def test_evolution_says_what_it_drops_as_json_over_several_lines(colour: str) -> None:
    end = "\x1b[0m" if colour else ""
    said = f"{EVOLUTION}{colour}Message ignored with messageStubParameters: {json.dumps(STUB, indent=2)} {end}"
    text = lines(*said.split("\n"), "and on it goes")

    (found,) = read(text, session="sales")

    assert isinstance(found, Failure)
    assert found[:5] == ("sales", "5511911110001@s.whatsapp.net", "", "3EB0BB", Cause.NO_SESSION)


def test_what_evolution_drops_was_told_by_the_record_before_it() -> None:
    """The stub of a duplicate says nothing of it being one."""
    gateway = Gateway(16, field=None)
    contact = gateway.contact()
    event, made = gateway.event("1", contact, "duplicate_block")
    stub = {"key": made[-1]["key"], "messageStubParameters": [gateway_logs.HIDDEN]}
    said = f"{EVOLUTION}Message ignored with messageStubParameters: {json.dumps(stub, indent=2)}"
    text = lines(*(text for line in made for text in as_json(line)), *said.split("\n"))

    assert told(read(text)) == true([event], is_named=False)


def stubbed(record: dict[str, Any], instance: str = "", **names: str) -> list[str]:
    """What Evolution says of the same message, with what it has made of the names of its chat."""
    stub = {
        "key": {**record["key"], **names},
        "messageStubType": 2,
        "messageStubParameters": [record["err"]["message"]],
    }
    head = EVOLUTION.replace("]  v", f"] [{instance}] v") if instance else EVOLUTION
    return f"{head}Message ignored with messageStubParameters: {json.dumps(stub, indent=2)}".split("\n")


@pytest.mark.parametrize("cause", ["duplicate_block", "ratchet", "no_session"])
@pytest.mark.parametrize("is_told_at_once", [False, True])
def test_a_message_that_evolution_drops_under_its_other_name_is_one(cause: str, is_told_at_once: bool) -> None:
    """It puts a phone in the place of a `@lid` before it says so."""
    gateway = Gateway(30, field=None)
    event, made = gateway.event("1", ("770000000000001@lid", "770000000000001_1.0"), cause)
    reader = LogReader()
    found = reader.feed(lines(*(text for line in made for text in as_json(line))), NOW)
    if is_told_at_once:
        found += reader.settle(NOW)

    found += reader.feed(lines(*stubbed(made[-1], remoteJid="5511900000001@s.whatsapp.net")), NOW)

    assert told(found + reader.finish(NOW)) == true([event], is_named=False)


def test_another_contacts_message_of_the_same_id_is_another() -> None:
    gateway = Gateway(31, field=None)
    event, made = gateway.event("1", ("5511900000001@s.whatsapp.net", "5511900000001.0"), "no_session")
    text = lines(*as_json(made[-1]), *stubbed(made[-1], remoteJid="5511900000002@s.whatsapp.net"))

    assert [one.jid for one in read(text) if isinstance(one, Failure)] == [event.jid, "5511900000002@s.whatsapp.net"]


@pytest.mark.parametrize("instance", ["", "loja"])
def test_what_evolution_drops_still_waits_for_the_block_of_its_record(instance: str) -> None:
    """Docker writes stdout and stderr as they come."""
    gateway = Gateway(32, field=None)
    event, made = gateway.event("1", gateway.contact(), "duplicate_block")
    text = [
        *docker(as_json(made[-1]), gateway.at),
        *docker(stubbed(made[-1], instance), gateway.at),
        *(one for line in made[:-2] for one in docker(as_json(line), gateway.at)),
    ]

    assert told(read(lines(*text))) == true([event._replace(session=instance)], is_named=bool(instance))


def test_sessions_of_one_group_each_tell_of_its_message() -> None:
    """With one id; the records have no session, and the stubs have."""
    gateway = Gateway(33, field=None)
    event, made = gateway.event("1", gateway.contact(), "sender_key")
    text = [*as_json(made[-1]), *as_json(made[-1]), *stubbed(made[-1], "loja"), *stubbed(made[-1], "matriz")]

    assert told(read(lines(*text))) == true([event._replace(session=name) for name in ("loja", "matriz")])


@pytest.mark.parametrize("shape", [as_json, as_pretty])
def test_a_message_of_ours_from_another_device_is_no_contacts(shape: Any) -> None:
    gateway = Gateway(34)
    _, made = gateway.event("1", gateway.contact(), "no_session")
    made[-1]["key"]["fromMe"] = True

    assert [one.participant for one in read(lines(*shape(made[-1]))) if isinstance(one, Failure)] == [ME]


def test_a_log_of_one_session_may_name_another() -> None:
    """Then that is the other's. A number says nothing of a session that is known by its name."""
    gateway = Gateway(35, field="session")
    ours, other, named = (gateway.event(name, gateway.contact(), "prekey") for name in ("26", "matriz", "loja"))
    text = lines(*(text for _, made in (ours, other, named) for text in as_json(made[-1])))

    assert [one.session for one in read(text, session="loja")] == ["loja", "matriz", "loja"]


# -------------------------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("shape", [as_json, as_pretty])
@pytest.mark.parametrize("wrap", [plain, docker])
@pytest.mark.parametrize("cause", ["ratchet", "duplicate_block"])
def test_a_log_that_is_never_silent_tells_all_the_same(wrap: Any, shape: Any, cause: str) -> None:
    """The block stays open on its stream, or never comes, or the record waits for more lines of its source."""
    gateway = Gateway(36)
    event, made = gateway.event("1", gateway.contact(), cause)
    reader = LogReader()
    kept = made if cause == "duplicate_block" else made[-1:]  # libsignal's console may be silenced
    text = lines(*(f"left-1  | {one}" for line in kept for one in wrap(shape(line), gateway.at) if wrap is plain))
    text = text or lines(*(one for line in kept for one in wrap(shape(line), gateway.at)))
    found = reader.feed(text, NOW)

    for n in range(1, 4):
        other = docker(['{"level":30,"msg":"GET /health"}'], NOW) if wrap is docker else ["right-1  | GET /health"]
        found += reader.feed(lines(*other), NOW + n * timedelta(milliseconds=900))

    assert told(found) == true([event])
    assert reader.offset == reader._base


@pytest.mark.parametrize(
    "at",
    [
        "2026-09-01T15:00:00+23:59",
        "2026-09-01T15:00:00-18:00",
        "0001-01-01T00:00:00+14:00",
        "9999-12-31T23:59:59-14:00",
    ],
)
@pytest.mark.parametrize("is_scan", [False, True])
def test_a_time_of_whatever_zone_is_told_in_utc(at: str, is_scan: bool) -> None:
    gateway = Gateway(37)
    _, made = gateway.event("1", gateway.contact(), "no_session")
    made[-1]["time"] = at

    (found,) = read(lines(*as_json(made[-1])), **({} if is_scan else {"day": None}))

    assert found.at.tzinfo is UTC
    assert found.at == NOW if at[:4] in ("0001", "9999") else found.at == datetime.fromisoformat(at)


PRETTY = """\
[{clock}] ERROR (7): failed to decrypt message
    key: {{
      "remoteJid": "55119000{n:05d}@s.whatsapp.net",
      "fromMe": false,
      "id": "3EB0{n}"
    }}
    err: {{
      "type": "SessionError",
      "message": "No session record"
    }}
"""


@pytest.mark.parametrize("stamp", ["9999-12-31T23:59:59Z", "9990-12-31T00:00:00", "0001-01-01T00:00:00Z"])
def test_a_scan_takes_no_far_day_from_somebodys_line(stamp: str) -> None:
    text = f"{stamp} bad mac\n".encode() + b"".join(
        PRETTY.format(clock="15:00:00.000", n=n).encode() for n in range(2000)
    )

    found = read(text)

    assert {one.at for one in found} == {datetime(2026, 9, 1, 15, tzinfo=UTC)}
    assert len(found) == 2000


def test_times_of_day_that_go_on_past_midnight_are_of_the_next_day() -> None:
    clocks = ["09:00:00.000", "23:00:00.000", "01:00:00.000", "00:59:59.000", "12:30:00.000", "00:10:00.000"]

    found = read(b"".join(PRETTY.format(clock=clock, n=n).encode() for n, clock in enumerate(clocks)))

    assert [(one.at.day, one.at.hour) for one in found] == [(1, 9), (1, 23), (2, 1), (2, 0), (2, 12), (3, 0)]


@pytest.mark.parametrize(
    ("since", "expected"),
    [
        (timedelta(hours=7), [6, 5, 4, 3, 2, 1]),  # hours before the end, by the last line's time of day
        (timedelta(days=3), [96] * 6),  # who knows: of before
        (timedelta(minutes=4), [6, 5, 4, 3, 2, 1]),
    ],
)
def test_what_was_written_while_nobody_looked_is_not_stamped_on_arrival(since: timedelta, expected: list[int]) -> None:
    """A gateway's clock is in a zone that nobody tells; only how far its times are apart is sure."""
    text = b"".join(PRETTY.format(clock=f"{(20 + n) % 24:02d}:00:00.000", n=n).encode() for n in range(6))
    text += b"[02:00:00.000] INFO (7): request completed\n"
    reader = LogReader()
    reader.fell_behind(Backlog(len(text), NOW - since, NOW, last_clock(text)))

    found = reader.feed(text, NOW) + reader.settle(NOW)
    news = reader.feed(PRETTY.format(clock="02:00:01.000", n=9).encode(), NOW) + reader.settle(NOW)

    assert [(NOW - one.at) / timedelta(hours=1) for one in found] == expected
    assert [one.at for one in news] == [NOW]


@pytest.mark.parametrize(("since", "at"), [(60, 60), (3600, 3600 + 86400)])
def test_lines_without_a_time_count_if_they_were_written_within_minutes(since: int, at: int) -> None:
    text = lines("ERROR whatsappId=26 Bad MAC")
    reader = LogReader()
    reader.fell_behind(Backlog(len(text), NOW - timedelta(seconds=since), NOW, last_clock(text)))

    assert [one.at for one in reader.feed(text, NOW)] == [NOW - timedelta(seconds=at)]


@pytest.mark.parametrize("jid", ["status@broadcast", "120363000000000001@newsletter", "nobody", ""])
def test_stories_and_newsletters_are_no_chats(jid: str) -> None:
    gateway = Gateway(17)
    _, made = gateway.event("1", ("5511900000001@s.whatsapp.net", "5511900000001.0"), "no_session")
    made[-1]["key"]["remoteJid"] = jid

    scan = scanned(lines(*as_json(made[-1])))

    assert not scan.sessions
    assert scan.not_counted() == {"no_chat": 1}


# ----------------------------------------------------------------------------------------------------- weak evidence


def test_a_phrase_with_a_session_and_no_message_is_weak_evidence_once_a_second() -> None:
    text = lines(
        "2026-09-01T10:00:00.100Z ERROR whatsappId=26 Bad MAC",
        "2026-09-01T10:00:00.900Z ERROR whatsappId=26 PreKeyError: Invalid PreKey ID",
        "2026-09-01T10:00:00.950Z ERROR whatsappId=2 Bad MAC",
        "2026-09-01T10:00:01.100Z [whatsappId=26] Error: Bad MAC",
        "2026-09-01T10:00:02.100Z Error: Bad MAC whatsappId=26",
        "[2026-09-01 10:00:03] Error whatsappId=loja: Failed to decrypt message",
        '{"level":50,"time":"2026-09-01T10:00:04Z","msg":"whatsappId=26 SessionError: Bad MAC"}',
    )

    found = read(text)

    weak = [(one.session, one.at.second) for one in found if isinstance(one, Weak)]
    assert weak[:4] == [("26", 0), ("2", 0), ("26", 1), ("26", 2)]
    assert [name for name, _ in weak[4:]] == ["loja", "26"]
    assert len(found) == len(weak)


@pytest.mark.parametrize(
    "line",
    [
        "INFO whatsappId=26 cliente Ana: Bad MAC",
        "whatsappId=26 mensagem recebida: Bad MAC",
        'procurando "Bad MAC" nos logs whatsappId=26',
        'ERROR whatsappId=26 customer wrote "Bad MAC"',
        "GET /x?whatsappId=26 Bad MAC",
        "ERROR https://x.example/?whatsappId=26 Bad MAC",
        "ERROR mywhatsappId=26 Bad MAC",
        "ERROR whatsappId= Bad MAC",
        "ERROR whatsappId=26 all is well",
        '{"level":50,"body":"whatsappId=26 Bad MAC","msg":"mensagem recebida"}',
        '{"level":30,"msg":"whatsappId=26 Bad MAC"}',
        '{"level":50,"body":"oi","msg":"whatsappId=26 Bad MAC"}',
        '{"level":50,"msg":"cliente escreveu whatsappId=26 Bad MAC"}',
        "error handling webhook from chat, text Bad MAC whatsappId=26",
        "[ERROR] cliente: Bad MAC whatsappId=26",
        "ERROR whatsappId=26 de Ana: Bad MAC",
    ],
)
def test_other_text_is_no_evidence(line: str) -> None:
    assert read(lines(line)) == []


# ------------------------------------------------------------------------------------------------------------ hostile


def test_a_line_that_is_too_long_is_passed_over_and_counted() -> None:
    gateway = Gateway(18)
    event, made = gateway.event("1", gateway.contact(), "prekey")
    record = as_json(made[-1])[0].encode()
    huge = record[:-1] + b',"x":"' + b"Bad MAC " * 130_000 + b'"}\n'

    for size in (1, 1000, 10**7) if len(huge) < 10**5 else (1000, 65_537, 10**7):
        reader = LogReader(day=date(2026, 9, 1))
        text = huge + record + b"\n" + huge + huge[:-1]
        found = [one for at in range(0, len(text), size) for one in reader.feed(text[at : at + size], NOW)]

        assert told(found + reader.finish(NOW)) == true([event])
        assert reader.too_long == 3
        assert reader.offset == len(text)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_the_longest_line_is_64_kib(extra: int) -> None:
    gateway = Gateway(19)
    event, made = gateway.event("1", gateway.contact(), "prekey")
    made[-1]["x"] = ""
    made[-1]["x"] = "x" * (LONGEST + extra - len(as_json(made[-1])[0]))
    text = lines(*as_json(made[-1]))

    assert told(read(text)) == (true([event]) if extra <= 0 else [])


def test_bytes_of_any_kind_do_no_harm() -> None:
    gateway = Gateway(20)
    event, made = gateway.event("1", gateway.contact(), "prekey")
    record = as_json(made[-1])[0].encode()
    junk = [
        b"\xff\xfe\x00 Bad MAC \xc3\x28",
        b"\x00" * 100,
        b"\x1b[" + b"1;" * 5000 + b"m Bad MAC",
        b"[" * 30_000 + b"failed to decrypt message",
        b'{"msg":"failed to decrypt message","key":' + b'{"a":' * 20_000,
        b'{"msg":"failed to decrypt message","key":[],"err":7,"time":1e400}',
        b'{"msg":"failed to decrypt message","key":{"remoteJid":5,"id":{}},"time":-1}',
        b'{"msg":["failed to decrypt message"]}',
        b"Session error:" + b"MessageCounterError " * 2000,
        b"    at async [as awaitable] x.y.z [as awaitable]",
        b"ERROR (" + b"(" * 3000 + b"): failed to decrypt message",
        b" " * 60_000 + b"Bad MAC",
        b"a" * 60_000 + b" Bad MA",
        b'{"log":"Bad MAC\\ud800\\n","stream":"stdout"}',
        b'{"log":5,"stream":"stderr Bad MAC"}',
    ]
    invalid = record.replace(b'"class":"baileys"', b'"class":"\xff\xfe"')

    for separator in (b"\n", b"\r\n"):
        text = separator.join([*junk, invalid, *junk]) + separator
        assert told(read(text)) == true([event])


def test_memory_is_bounded_whatever_comes() -> None:
    gateway = Gateway(21)
    opened = b'{"log":"part of a line","stream":"s%d","time":"2026-01-01T00:00:00Z"}\n'
    shapes: list[Callable[[int], bytes]] = [
        lambda n: b"x" * 65536,  # one line without an end
        lambda n: b"".join(opened % (n * 300 + m) for m in range(300)),  # sources that never end their lines
        lambda n: lines(*(text for m in range(40) for text in gateway.block(f"{n * 40 + m}.0", False, False))),
        lambda n: lines("ERROR (1): failed to decrypt message", *[f"    x: {'1' * 200}"] * 400),
        lambda n: lines(*as_json(gateway.event(str(n), gateway.contact(), "ratchet")[1][-1]) * 60),
    ]
    for shape in shapes:
        reader = LogReader()
        tracemalloc.start()
        for n in range(40):
            reader.feed(shape(n), NOW)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 * 1024 * 1024, shapes.index(shape)


def test_a_scan_prints_no_contact_no_message_and_no_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text, events = a_log(22, plain, as_json)
    (tmp_path / "gateway.log").write_bytes(text)

    for options in ([], ["--json"]):
        assert main(["session", "scan", str(tmp_path / "gateway.log"), *options]) == 0
        said = capsys.readouterr()
        for event in events:
            assert event.id not in said.out + said.err
            assert event.jid.partition("@")[0] not in said.out + said.err
        assert "Buffer" not in said.out
    report = json.loads(said.out)
    assert set(report) == {"sessions", "unattributed", "over_threshold", "ends", "lines"}
    assert report["lines"]["matched"] == report["lines"]["counted"] + sum(report["lines"]["not_counted"].values())


def test_a_scan_of_a_file_that_is_not_there_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["session", "scan", "/no/such/file"]) == 1
    assert "No such file" in capsys.readouterr().err


def test_a_scan_of_a_damaged_file_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(random.Random(1).randbytes(3000) + b"x" * 90_000))  # noqa: S311 - a test's dice
    packed[60] ^= 0xFF
    packed[2000] ^= 0x55
    (tmp_path / "gateway.log.gz").write_bytes(packed)

    assert main(["session", "scan", str(tmp_path / "gateway.log.gz")]) == 1
    assert "not a whole gzip file" in capsys.readouterr().err
