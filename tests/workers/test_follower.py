"""Logs that are followed: what they tell becomes rows once, over rotations, restarts and a second follower."""

import os
import random
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from models.gateway_log import LogPosition
from pombal import db, metrics
from pombal.broker import redis_client
from pombal.settings import settings
from providers import gateway_lines
from tests.baileys import Session, a_session
from tests.factories import a_tenant, superuser
from tests.pombal.processes import until
from tests.providers.gateway_logs import Event, Gateway, as_json, as_pretty, docker
from workers import _follower, _log_files
from workers._follower import Follower, Targets, UnknownChannel, Wanted, key_of
from workers._log_files import Place, Tail

pytestmark = pytest.mark.usefixtures("queues")


class Log:
    """A log that a test writes, and the followers of it."""

    def __init__(self, path: Path, session: Session) -> None:
        self.path, self.session = path, session
        self.gateway = Gateway(hash(session.name), at=datetime.now(UTC) - timedelta(hours=2))
        self.wanted = Wanted(attribute="whatsappId", tenant=session.tenant.slug)
        self.follower = self.started()

    def started(self, *paths: str, **wanted: Any) -> Follower:
        return Follower(list(paths) or [str(self.path)], self.wanted._replace(**wanted), lambda: False)

    def restart(self) -> None:
        self.follower.close()
        self.follower = self.started()

    def failed(self, session: str | None = None, cause: str = "prekey") -> tuple[Event, bytes]:
        event, made = self.gateway.event(session or self.session.name, self.gateway.contact(), cause)
        return event, "".join(f"{text}\n" for line in made for text in as_json(line)).encode()

    def write(self, *bodies: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(b"".join(bodies))

    def catch_up(self) -> None:
        while self.follower.step():
            pass

    def rows(self) -> dict[str, dict[str, Any]]:
        found = self.session.rows("SELECT * FROM session_error WHERE cause <> 'weak'")
        return {row["message_id"]: row for row in found}

    def tells(self, *events: Event) -> None:
        """Wait until exactly these are rows, and see that each was told once."""
        wanted = {event.id for event in events}

        def is_there() -> bool:
            self.catch_up()
            return set(self.rows()) >= wanted

        until(is_there, seconds=20, why=lambda: f"{len(self.rows())} of {len(wanted)}")
        assert set(self.rows()) == wanted
        assert [row["times"] for row in self.rows().values()] == [1] * len(wanted)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    made = Log(tmp_path / "gateway.log", a_session(dialect="whaticket"))
    yield made
    made.follower.close()
    with superuser() as connection:  # nobody's repair waits for a follower that is over
        connection.execute("DELETE FROM log_position WHERE starts_with(split_part(path, '|', 5), %s)", [str(tmp_path)])


@pytest.fixture
def followed(log: Log) -> Log:
    """An empty log that is followed already."""
    log.path.touch()
    log.catch_up()
    return log


def test_a_failure_in_a_log_is_a_row_and_a_bell(followed: Log) -> None:
    event, text = followed.failed(cause="no_session")

    followed.write(text)
    followed.tells(event)

    row = followed.rows()[event.id]
    assert (row["jid"], row["cause"], row["source"], row["at"]) == (event.jid, "no_session", "log", event.at)
    assert _rung() == [(str(followed.session.tenant.id), str(followed.session.channel.id))]


def _rung() -> list[tuple[str, ...]]:
    """Whom the fixer is told to look at."""
    with redis_client(settings().require_redis()) as client:
        found: Any = client.hvals("dramatiq:session_fixer.msgs")
    return [tuple(msgspec.json.decode(one)["args"]) for one in found]


def test_duplicates_and_other_sessions_are_no_rows(followed: Log) -> None:
    event, text = followed.failed()
    unknown = metrics.session_errors_unattributed._value.get()
    longer = followed.session.name + "6"

    followed.write(followed.failed(cause="duplicate")[1], followed.failed(cause="duplicate_block")[1])
    followed.write(followed.failed(longer)[1], followed.failed(longer)[1], text)
    followed.tells(event)

    assert metrics.session_errors_unattributed._value.get() == unknown + 2


def test_two_channels_of_one_name_are_nobodys(followed: Log) -> None:
    """In another tenant; with `--tenant` it is clear who is meant."""
    other = a_session()
    with db.session([other.tenant.id]) as s:
        channel = s.get(type(other.channel), (other.tenant.id, other.channel.id))
        assert channel is not None
        channel.config = {**channel.config, "session": followed.session.name, "host": "http://127.0.0.2:9"}
    event, text = followed.failed()
    both = followed.started(tenant=None)
    host = followed.started(tenant=None, gateway="http://127.0.0.2:9/")
    for one in (both, host):
        one.step()

    followed.write(text)
    followed.tells(event)
    for one in (both, host):
        while one.step():
            pass
        one.close()

    assert followed.rows()[event.id]["times"] == 1
    assert [row["message_id"] for row in other.rows("SELECT * FROM session_error")] == [event.id]


def test_a_log_of_one_channel_needs_no_field(log: Log) -> None:
    log.path.touch()
    log.wanted = Wanted(channel=f"{log.session.tenant.slug}/{log.session.channel.name}")
    log.restart()
    log.catch_up()
    log.gateway.field = None
    event, text = log.failed()

    log.write(text)

    log.tells(event)


@pytest.mark.parametrize(("name", "is_ours"), [("26", True), (None, True), ("matriz", False)])
def test_a_log_of_one_channel_may_know_it_by_a_number(log: Log, name: str | None, is_ours: bool) -> None:
    """The channel has the session's name. What names another is not its."""
    log.path.touch()
    log.wanted = Wanted(channel=f"{log.session.tenant.slug}/{log.session.channel.name}")
    log.restart()
    log.catch_up()
    name = name or log.session.name
    failed, text = log.failed(name)
    named, other = log.failed(log.session.name)

    log.write(text, f"ERROR whatsappId={name} Bad MAC\n".encode(), other)

    log.tells(*([failed] if is_ours else []), named)
    assert len(log.session.rows("SELECT * FROM session_error WHERE cause = 'weak'")) == is_ours


def test_a_channel_may_say_what_its_session_is_called_in_logs(log: Log) -> None:
    """Whaticket's lines have a number where its paths may have a name."""
    with db.session([log.session.tenant.id]) as s:
        channel = s.get(type(log.session.channel), (log.session.tenant.id, log.session.channel.id))
        assert channel is not None
        channel.config = {**channel.config, "log_name": "26"}
    log.path.touch()
    log.catch_up()
    event, text = log.failed("26")

    log.write(text, b"ERROR whatsappId=26 Bad MAC\n", log.failed(log.session.name)[1], log.failed("2")[1])

    log.tells(event)
    assert len(log.session.rows("SELECT * FROM session_error WHERE cause = 'weak'")) == 1


@pytest.mark.parametrize(
    ("gateway", "is_meant"),
    [
        ("http://127.0.0.1:9", True),
        ("127.0.0.1:9/", True),
        ("HTTP://127.0.0.1:9", True),
        ("https://127.0.0.1:9", False),
        ("127.0.0.1", False),
    ],
)
def test_a_gateway_may_be_named_without_its_scheme(log: Log, gateway: str, is_meant: bool) -> None:
    targets = Targets(log.wanted._replace(gateway=gateway))

    targets.read()

    assert bool(targets._known) == is_meant


@pytest.mark.parametrize("name", ["+5511955550300", "what somebody wrote", "5511955550300"])
def test_a_name_that_no_channel_has_is_not_told(
    followed: Log, name: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    followed.write(followed.failed(name)[1], followed.failed("424242")[1])
    followed.catch_up()

    said = "".join([*capfd.readouterr(), caplog.text])
    assert "session_of_no_channel" in said
    assert "424242" in said
    assert name not in said


@pytest.mark.parametrize("is_refused", [False, True])
def test_no_line_ends_a_follower_or_keeps_others_from_being_told(
    followed: Log, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zone that Python takes and Postgres does not; and whatever else the database may refuse."""
    first, text = followed.failed()
    second, other = followed.failed()
    poison = msgspec.json.decode(other.splitlines()[-1])
    poison["time"] = "2026-09-01T15:00:00+23:59"
    poison["key"]["id"] = "3EB0POISON"
    if is_refused:
        monkeypatch.setattr(gateway_lines, "in_utc", lambda at: at)
    unattributed = metrics.session_errors_unattributed._value.get()

    followed.write(text, msgspec.json.encode(poison) + b"\n", other)
    followed.tells(first, second)
    followed.restart()

    followed.tells(first, second)
    assert metrics.session_errors_unattributed._value.get() == unattributed + is_refused


def test_a_channel_that_is_not_there_is_said(log: Log) -> None:
    with pytest.raises(UnknownChannel):
        log.started(attribute=None, channel=f"{a_tenant().slug}/none").step()


def test_weak_evidence_and_ends_are_noted(followed: Log) -> None:
    end = followed.gateway.record(
        followed.session.name, {"connection": "close", "statusCode": 440}, "connection.update"
    )
    weak = f"ERROR whatsappId={followed.session.name} Bad MAC\n".encode()

    followed.write(weak, "".join(f"{text}\n" for text in as_json(end)).encode())
    followed.catch_up()

    assert [row["cause"] for row in followed.session.rows("SELECT * FROM session_error")] == ["weak"]
    assert [(row["code"], row["times"]) for row in followed.session.rows("SELECT * FROM session_end")] == [(440, 1)]
    assert len(_rung()) == 1


@pytest.mark.parametrize("is_from_start", [False, True])
def test_a_new_log_is_followed_from_its_end_unless_one_says_otherwise(log: Log, is_from_start: bool) -> None:
    old, first = log.failed()
    new, second = log.failed()
    log.write(first, second[:40])
    log.wanted = log.wanted._replace(from_start=is_from_start)
    log.restart()
    log.catch_up()
    log.restart()

    log.write(second[40:])

    log.tells(*([old] if is_from_start else []), new)


def test_a_log_that_comes_later_is_read_whole(log: Log) -> None:
    log.catch_up()
    event, text = log.failed()

    log.write(text)

    log.tells(event)


def test_a_pattern_finds_logs_that_come_and_none_twice(log: Log, tmp_path: Path) -> None:
    log.write(b"old\n")
    log.follower = log.started(str(tmp_path / "*.log"))
    log.catch_up()
    first, text = log.failed()
    second, other = log.failed()

    log.write(text)
    log.catch_up()
    log.path.rename(tmp_path / "gateway-1.log")  # it matches, and was read under the other name
    (tmp_path / "more.log").write_bytes(other)
    log.write(b"new\n")

    log.tells(first, second)
    until(lambda: not log.follower.step() and len(log.follower._logs) >= 2)
    log.tells(first, second)


def test_a_line_that_is_not_whole_waits_for_its_end(followed: Log) -> None:
    event, text = followed.failed()

    for n in range(0, len(text), 50):
        followed.write(text[n : n + 50])
        followed.catch_up()
        if n % 200 == 0:
            followed.restart()

    followed.tells(event)


def test_a_block_and_its_record_may_stand_on_either_side_of_a_restart(followed: Log) -> None:
    event, text = followed.failed()
    _, twice = followed.failed(cause="duplicate_block")
    lines = twice.splitlines(keepends=True)

    for line in lines:
        followed.write(line)
        followed.catch_up()
        followed.restart()
    followed.write(text)

    followed.tells(event)


def test_a_renamed_file_is_read_to_its_end_first(followed: Log, tmp_path: Path) -> None:
    events, texts = zip(*(followed.failed() for _ in range(4)), strict=True)
    followed.write(texts[0])
    followed.catch_up()

    followed.write(texts[1])
    followed.path.rename(tmp_path / "gateway.log.1")
    with (tmp_path / "gateway.log.1").open("ab") as file:
        file.write(texts[2])  # whoever writes has not noticed yet
    followed.write(texts[3])

    followed.tells(*events)


def test_rotations_while_nobody_followed_lose_nothing(followed: Log, tmp_path: Path) -> None:
    events, texts = zip(*(followed.failed() for _ in range(5)), strict=True)
    followed.write(texts[0])
    followed.catch_up()
    followed.follower.close()

    for n, text in enumerate(texts[1:4]):
        followed.write(text)
        for older in range(n, 0, -1):
            (tmp_path / f"gateway.log.{older}").rename(tmp_path / f"gateway.log.{older + 1}")
        followed.path.rename(tmp_path / "gateway.log.1")
        aged(tmp_path / "gateway.log.1", n - 10)
    followed.write(texts[4])
    followed.restart()

    followed.tells(*events)


def aged(path: Path, seconds: int) -> None:
    """As last written so long ago: what this test does within milliseconds takes days."""
    at = datetime.now(UTC).timestamp() + seconds
    os.utime(path, (at, at))


NEIGHBOURS = ["gateway-2.log", "gateway.2.log", "gateway-out.log", "gateway-error.log", "gateway-5511955550300.log"]


@pytest.mark.parametrize("is_running", [True, False])
@pytest.mark.parametrize("rotated", ["gateway.log.1", "gateway-2025-09-11.log", "gateway-1.log"])
def test_a_neighbours_log_is_no_rotation(
    followed: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rotated: str, is_running: bool
) -> None:
    """Another session's, or what PM2 writes besides: whatever stood in it would be this session's."""
    monkeypatch.setattr(_log_files, "_QUIET", 0.0)
    followed.wanted = Wanted(channel=f"{followed.session.tenant.slug}/{followed.session.channel.name}")
    followed.restart()
    followed.catch_up()
    events, texts = zip(*(followed.failed() for _ in range(2)), strict=True)
    followed.write(texts[0])
    followed.tells(events[0])
    aged(followed.path, -60)
    if not is_running:
        followed.follower.close()

    for name in NEIGHBOURS:
        (tmp_path / name).write_bytes(b"".join(followed.failed()[1] for _ in range(6)))
    followed.path.rename(tmp_path / rotated)
    followed.write(texts[1])
    if not is_running:
        followed.restart()

    followed.tells(*events)


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("gateway.log.2", "gateway.log.1"),
        ("gateway.log-20250910", "gateway.log-20250911"),
        ("gateway.log.2025-09-10_23", "gateway.log.2025-09-11_00"),
        ("gateway__2025-09-10_00-00-00.log", "gateway__2025-09-11_00-00-00.log"),
        ("gateway-20250910.log", "gateway-20250911.log"),
        ("gateway.2.log", "gateway.1.log"),
    ],
)
def test_rotations_are_known_by_their_names(
    followed: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: str, newer: str
) -> None:
    monkeypatch.setattr(_log_files, "_QUIET", 0.0)
    events, texts = zip(*(followed.failed() for _ in range(3)), strict=True)
    followed.write(texts[0])
    followed.tells(events[0])

    aged(followed.path, -60)
    followed.path.rename(tmp_path / older)
    (tmp_path / newer).write_bytes(texts[1])
    followed.write(texts[2])

    followed.tells(*events)


def test_a_log_that_is_followed_is_nobodys_rotation(tmp_path: Path) -> None:
    path, other = tmp_path / "gateway.log", tmp_path / "gateway.log.26"
    tail = Tail(path, is_followed={other}.__contains__)
    path.write_bytes(b"one\n")
    tail.open(None, at_end=False, look_back=0)
    assert tail.read(99) == b"one\n"
    place = tail.place(4)

    aged(path, -60)
    path.rename(tmp_path / "gateway.log.1")
    other.write_bytes(b"another session's\n")
    path.write_bytes(b"two\n")
    tail.open(place, at_end=False, look_back=0)

    assert [tail.read(99) for _ in range(2)] == [b"two\n", b""]
    tail.close()


@pytest.mark.parametrize(
    ("name", "older", "beside", "is_ours"),
    [
        ("loja", "loja.1", "loja-2", False),
        ("26", "26.1", "26-1", False),
        ("loja", "loja-20250910", "loja-5511955550300", False),
        ("loja", "loja.2", "loja-1", False),
        ("loja", "loja.2", "loja.1", True),
        ("loja", "loja-3", "loja-2", True),
        ("loja", "loja-20250910", "loja-20250911", True),
        ("loja", "loja-2025-09-10_23", "loja-2025-09-11_00", True),
    ],
)
def test_beside_a_log_without_an_ending_a_number_is_another_sessions(
    tmp_path: Path, name: str, older: str, beside: str, is_ours: bool
) -> None:
    path = tmp_path / name
    tail = Tail(path)
    path.write_bytes(b"one\n")
    tail.open(None, at_end=False, look_back=0)
    assert tail.read(99) == b"one\n"
    place = tail.place(4)

    aged(path, -60)
    path.rename(tmp_path / older)
    (tmp_path / beside).write_bytes(b"beside\n")
    path.write_bytes(b"two\n")
    tail.open(place, at_end=False, look_back=0)

    assert [tail.read(99) for _ in range(3)] == ([b"beside\n", b"two\n", b""] if is_ours else [b"two\n", b"", b""])
    tail.close()


def test_what_stood_in_a_file_that_came_and_went_did_not_fail_at_once(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway's clock has no day and no zone; nobody saw when its lines were written."""
    monkeypatch.setattr(_log_files, "_QUIET", 0.0)
    log.wanted = Wanted(channel=f"{log.session.tenant.slug}/{log.session.channel.name}")
    log.restart()
    log.write(b"before\n")
    log.catch_up()
    now = datetime.now(UTC)
    clocks = [now + timedelta(hours=3, minutes=30 - 60 * n) for n in range(6, 0, -1)]

    aged(log.path, -6 * 3600)
    log.path.rename(tmp_path / "gateway.log.2")
    lines = "".join(BY_CLOCK.format(clock=clock, n=n) for n, clock in enumerate(clocks))
    (tmp_path / "gateway.log.1").write_text(f"{lines}[{now + timedelta(hours=3):%H:%M:%S}.000] INFO (7): request\n")
    log.write(f"[{now + timedelta(hours=3):%H:%M:%S}.000] INFO (7): request completed\n".encode())

    until(lambda: not log.follower.step() and len(log.rows()) == 6, seconds=20, why=lambda: str(len(log.rows())))
    ages = [round((now - log.rows()[f"3EB0{n}"]["at"]) / timedelta(minutes=1)) for n in range(6)]
    assert ages == [330, 270, 210, 150, 90, 30]


@pytest.mark.parametrize("is_running", [True, False])
def test_a_file_that_was_copied_and_emptied_loses_nothing(followed: Log, tmp_path: Path, is_running: bool) -> None:
    events, texts = zip(*(followed.failed() for _ in range(12)), strict=True)
    followed.write(texts[0])
    followed.catch_up()
    if not is_running:
        followed.follower.close()

    followed.write(texts[1])
    shutil.copyfile(followed.path, tmp_path / "gateway.log.1")
    os.truncate(followed.path, 0)
    followed.write(*texts[2:])  # and by now it is longer than it was
    if not is_running:
        followed.restart()

    followed.tells(*events)


def test_a_file_that_may_not_be_read_keeps_nobody_from_reading_its_neighbour(
    followed: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not one that leads nowhere. (These tests may run as root, who may read everything.)"""
    events, texts = zip(*(followed.failed() for _ in range(4)), strict=True)
    followed.write(texts[0])
    followed.catch_up()
    followed.follower.close()
    (tmp_path / "gateway.log.latest").symlink_to(tmp_path / "gone")
    secret = tmp_path / "gateway.log.old"
    secret.write_bytes(b"x")
    really = os.open

    def opened(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path) == secret:
            raise PermissionError(13, "Permission denied")
        return really(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", opened)
    followed.write(texts[1])
    followed.path.rename(tmp_path / "gateway.log.1")
    followed.write(texts[2])
    followed.restart()
    followed.tells(*events[:3])
    files = len(os.listdir("/proc/self/fd"))
    os.truncate(followed.path, 0)
    followed.write(texts[3])

    followed.tells(*events)
    assert len(os.listdir("/proc/self/fd")) <= files


def test_a_log_that_may_not_be_read_costs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gateway.log"
    path.write_bytes(b"one\n")
    files = len(os.listdir("/proc/self/fd"))

    def broken(fd: int, *args: Any) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    for place in (None, Place(1, 4, b"x")):
        with pytest.raises(OSError, match="Input/output"):
            Tail(path).open(place, at_end=False, look_back=0)

    assert len(os.listdir("/proc/self/fd")) == files


def test_deleted_logs_of_a_pattern_are_let_go(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of containers that come and go. One that was only renamed stays, since it would be found under that name; and
    what was read is known for longer."""
    monkeypatch.setattr(_follower, "_GONE_SECONDS", 0.0)
    log.follower = log.started(str(tmp_path / "*.log"))
    log.catch_up()
    files = len(os.listdir("/proc/self/fd"))
    made = {tmp_path / f"c{n}.log": log.failed() for n in range(20)}
    for path, (_, text) in made.items():
        path.write_bytes(text)
    log.tells(*(event for event, _ in made.values()))

    first, *others = made
    first.rename(tmp_path / "renamed.log")
    for path in others:
        path.unlink()

    until(lambda: not log.follower.step() and set(log.follower._logs) == {first}, seconds=20)
    assert len(os.listdir("/proc/self/fd")) <= files + 1
    again, text = log.failed()
    others[0].write_bytes(text)
    log.tells(*(event for event, _ in made.values()), again)


BY_CLOCK = """\
[{clock:%H:%M:%S}.000] ERROR (7): failed to decrypt message
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


@pytest.mark.parametrize("is_running", [False, True])
def test_what_failed_while_nobody_looked_did_not_fail_at_once(log: Log, is_running: bool) -> None:
    """The gateway's clock has no day and no zone. A follower may be down, or wait for its database."""
    log.wanted = Wanted(channel=f"{log.session.tenant.slug}/{log.session.channel.name}")
    log.restart()
    log.write(b"before\n")
    log.catch_up()
    (one,) = log.follower._logs.values()
    if is_running:
        one._looked_at -= 6 * 3600
    else:
        log.follower.close()
    now = datetime.now(UTC)
    clocks = [now + timedelta(hours=3, minutes=30 - 60 * n) for n in range(6, 0, -1)]

    log.write(*(BY_CLOCK.format(clock=clock, n=n).encode() for n, clock in enumerate(clocks)))
    log.write(f"[{now + timedelta(hours=3):%H:%M:%S}.000] INFO (7): request completed\n".encode())
    if not is_running:
        log.restart()

    until(lambda: not log.follower.step() and len(log.rows()) == 6, seconds=20, why=lambda: str(len(log.rows())))
    ages = [round((now - log.rows()[f"3EB0{n}"]["at"]) / timedelta(minutes=1)) for n in range(6)]
    assert ages == [330, 270, 210, 150, 90, 30]


def test_whatever_happens_in_whatever_order_each_failure_is_told_once(tmp_path: Path) -> None:
    """Writes of pieces of lines, rotations of both kinds, restarts."""
    for seed in range(6):
        dice = random.Random(seed)  # noqa: S311 - a test's dice
        folder = tmp_path / str(seed)
        folder.mkdir()
        log = Log(folder / "gateway.log", a_session(dialect="whaticket"))
        log.path.touch()
        log.catch_up()
        events: list[Event] = []
        rest = b""
        files = 0
        for _ in range(60):
            what = dice.choice(["write"] * 6 + ["piece"] * 3 + ["step"] * 4 + ["restart", "rename", "copy"])
            if what == "write":
                event, text = log.failed(cause=dice.choice(["prekey", "ratchet", "no_session"]))
                events.append(event)
                log.write(rest + text)
                rest = b""
            elif what == "piece" and not rest:
                event, text = log.failed()
                events.append(event)
                log.write(text[:60])
                rest = text[60:]
            elif what == "step":
                log.follower.step()
            elif what == "restart":
                log.restart()
            elif what in ("rename", "copy") and not rest and log.path.stat().st_size:
                files += 1
                rotated = folder / f"gateway.log-{files:03d}"
                if what == "rename":
                    log.path.rename(rotated)
                    log.path.touch()
                else:
                    log.catch_up()  # no copy of a copy: what was not looked at between two of these is in neither name
                    shutil.copyfile(log.path, rotated)
                    os.truncate(log.path, 0)
                aged(rotated, files - 1000)
        log.write(rest)

        log.tells(*events)
        log.follower.close()


def test_two_followers_of_one_log_tell_it_once(followed: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_follower, "_LONGEST_PAUSE", 0.05)  # for which the one that was overtaken keeps away
    second = followed.started()
    second.step()
    events = []
    for _ in range(10):
        event, text = followed.failed()
        events.append(event)
        followed.write(text)
        followed.follower.step()
        second.step()

    followed.tells(*events)
    second.close()


@pytest.mark.parametrize("wrap", [None, docker])
def test_pretty_records_are_told_when_nothing_more_comes(followed: Log, wrap: Any) -> None:
    event, made = followed.gateway.event(followed.session.name, followed.gateway.contact(), "ratchet")
    groups = [as_pretty(line) for line in made]
    lines = [text for group in groups for text in (wrap(group, followed.gateway.at) if wrap else group)]

    followed.write("".join(f"{line}\n" for line in lines).encode())

    followed.tells(event)


# ---------------------------------------------------------------------------------------------- how far logs are read


def position(log: Log, path: Path | None = None) -> LogPosition:
    with db.session() as s:
        return s.get_one(LogPosition, key_of(log.wanted, path or log.path))


def the_database_clock() -> datetime:
    with superuser() as connection:
        (now,) = connection.execute("SELECT clock_timestamp()").fetchone() or (None,)
    assert isinstance(now, datetime)
    return now


@pytest.fixture
def signing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step says how far was read."""
    monkeypatch.setattr(_follower, "_SIGN_SECONDS", 0.0)
    monkeypatch.setattr(_follower, "_SIGN_NEWS_SECONDS", 0.0)


@pytest.mark.usefixtures("signing")
def test_a_silent_log_is_read_for_as_long_as_its_follower_lives(followed: Log) -> None:
    before = the_database_clock()
    assert position(followed).read_until < before

    followed.follower.step()

    after = position(followed)
    assert before < after.read_until < the_database_clock()
    assert after.updated_at > before
    followed.follower.close()
    assert position(followed).read_until == after.read_until


@pytest.mark.usefixtures("signing")
def test_a_log_is_not_read_while_what_stands_in_it_is_not_told(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what was not read yet, nor a record that may go on."""
    monkeypatch.setattr(_follower, "_CHUNK", 4096)
    monkeypatch.setattr(_follower, "_SETTLED", 3600.0)
    log.wanted = log.wanted._replace(from_start=True)
    log.restart()
    written = the_database_clock()
    log.write(b"x" * 9999 + b"\n")
    event, made = log.gateway.event(log.session.name, log.gateway.contact(), "ratchet")
    log.write("".join(f"{text}\n" for line in made for text in as_pretty(line)).encode())

    while log.follower.step():
        assert position(log).read_until < written - timedelta(days=1)
        assert position(log).updated_at > written
    log.follower.step()
    assert position(log).read_until < written

    monkeypatch.setattr(_follower, "_SETTLED", 0.0)
    log.tells(event)
    log.follower.step()
    assert position(log).read_until > written


@pytest.mark.usefixtures("signing")
def test_a_log_that_is_never_silent_is_read_all_the_same(followed: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_follower, "_SETTLED", 3600.0)
    before = the_database_clock()

    for _ in range(4):
        followed.write(b'{"level":30,"msg":"request completed"}\n')
        followed.follower.step()

    assert position(followed).read_until > before


@pytest.mark.usefixtures("signing")
@pytest.mark.parametrize("is_running", [True, False])
def test_nobody_waits_for_the_logs_of_containers_that_are_gone(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_running: bool
) -> None:
    """One that is named, and one of another pattern, are waited for."""
    monkeypatch.setattr(_follower, "_GONE_SECONDS", 0.0)
    names = [str(tmp_path / name) for name in ("c*.log", "d*.log", "named.log")]
    paths = [tmp_path / name for name in ("c1.log", "c2.log", "d1.log", "named.log")]
    for path in paths:
        path.touch()
    log.follower = log.started(*names)
    log.catch_up()

    def waited_for() -> set[str]:
        with db.session() as s:
            found = LogPosition.to_follow(s, key_of(log.wanted, ""))
        return {Path(one.file).name for one in found}

    assert waited_for() == {"c1.log", "c2.log", "d1.log", "named.log"}
    if not is_running:
        log.follower.close()
    for path in paths[1:]:
        path.unlink()
    if not is_running:
        log.follower = log.started(*names)

    left = {"c1.log", "named.log"} if is_running else {"c1.log", "d1.log", "named.log"}
    until(lambda: not log.follower.step() and waited_for() == left, seconds=20, why=waited_for)
