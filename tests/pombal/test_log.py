"""What a line may hold (security-reliability.md L1-L3). Each program writes to a real pipe, in a process of its own."""

import json
import os
import subprocess
import sys
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from pombal import db, log
from pombal.errors import Permanent, Unreachable

SECRET = "s3cr3t-5511944440001"
LONGEST = 8 * 1024


def written(program: str, level: str = "INFO") -> list[bytes]:
    """The lines that a program writes once logging is set up; `log`, `logging` and `SECRET` are there."""
    head = f"import logging\nfrom pombal import log\nlog.setup()\nSECRET = {SECRET!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", head + program],
        env={**os.environ, "LOG_FORMAT": "json", "LOG_LEVEL": level},
        capture_output=True,
        timeout=60,
    )
    assert done.stdout == b""
    return done.stderr.splitlines()


def one(program: str) -> dict[str, Any]:
    """The one line a program writes."""
    (line,) = written(program)
    assert len(line) <= LONGEST
    decoded: dict[str, Any] = json.loads(line)
    return decoded


def test_a_line_is_one_json_object_with_event_level_and_time() -> None:
    line = one("log.get().warning('webhook_rejected', provider='meta', bytes=7)")

    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "webhook_rejected", "level": "warning", "provider": "meta", "bytes": 7}


def test_libraries_write_the_same_kind_of_line() -> None:
    line = one("logging.getLogger('lib').warning('took %d s', 7)")

    assert (line["event"], line["level"]) == ("took 7 s", "warning")


@pytest.mark.parametrize(
    "hostile",
    [
        "x\r\n2026-01-01 ERROR forged",
        '"}\n{"event":"forged"}',
        "\x1b[2J\x1b[31mred",
        "\x00\x07\x08",
        "\u2028forged\u2029",
        "\u202eforged",
        "\ud800 lone",
        "\x85next line",
    ],
    ids=["CRLF", "JSON", "ANSI", "control", "line separators", "right to left", "surrogate", "NEL"],
)
def test_no_value_forges_a_line(hostile: str) -> None:
    calls = [
        f"log.get().info('event', field={hostile!r})",
        f"log.get().info({hostile!r})",
        f"log.get().info('event', **{{{hostile!r}: 1}})",
        f"logging.getLogger('lib').warning({hostile!r})",
        f"log.get().info('event', nested={{'a': [{hostile!r}]}})",
    ]

    lines = written("\n".join(calls))

    assert len(lines) == len(calls)
    for line in lines:
        assert isinstance(json.loads(line), dict)
        assert not any(byte < 0x20 for byte in line)


def test_a_line_has_an_end() -> None:
    program = """
for size in (1, 5_000, 1_000_000):
    for sign in ('x', 'é', '😀', '\\x1b', '"'):
        value = sign * size
        log.get().info('event', field=value)
        log.get().info(value)
        log.get().info('event', many=[value, value])
        log.get().info('event', **{f'f{n}': sign * 1000 for n in range(size % 100 + 1)})
        logging.getLogger('lib').warning(value)
        logging.getLogger('lib').warning('%s', value)
"""
    lines = written(program)

    assert len(lines) == 3 * 5 * 6
    for line in lines:
        assert len(line) <= LONGEST
        assert json.loads(line)["event"]


def test_what_cannot_be_encoded_is_written_somehow() -> None:
    program = """
import uuid, datetime
class Odd:
    def __str__(self): raise RuntimeError('no')
log.get().info('event', odd=Odd())
log.get().info('event', id=uuid.UUID(int=7), at=datetime.timedelta(1), n=2**200, raw=b'\\xff', f=float('nan'))
a = []; a.append(a)
log.get().info('event', loop=a)
"""
    assert [json.loads(line)["event"] for line in written(program)] == ["event"] * 3


def test_a_foreign_exception_is_named_but_not_quoted() -> None:
    line = one("""
try:
    raise ValueError(SECRET)
except ValueError:
    log.get().error('failed', exc_info=True)
""")

    assert SECRET not in str(line)
    assert "ValueError" in line["exception"]
    assert ":7 in <module>" in line["exception"] or "in <module>" in line["exception"]


@pytest.mark.parametrize(
    "program",
    [
        "log.get().error('failed', error=ValueError(SECRET))",
        "log.get().error('failed', errors=[ValueError(SECRET)])",
        "logging.getLogger('lib').error('failed', exc_info=ValueError(SECRET))",
        "raise ValueError(SECRET)",
        "raise KeyError(SECRET) from ValueError(SECRET)",
        "import threading; t = threading.Thread(target=int, args=(SECRET,)); t.start(); t.join()",
        "logging.getLogger('lib').error('%d', SECRET)",
        "import warnings; warnings.warn(SECRET)",
        """
import asyncio
async def main():
    asyncio.get_running_loop().create_task(fail())
    await asyncio.sleep(0.01)
async def fail(): raise ValueError(SECRET)
asyncio.run(main())
""",
    ],
    ids=["field", "nested", "library", "uncaught", "chained", "thread", "bad format", "warning", "task"],
)
def test_no_way_out_for_a_secret_in_an_exception(program: str) -> None:
    lines = written(program)

    for line in lines:
        assert SECRET.encode() not in line
        assert isinstance(json.loads(line), dict)


def test_a_crash_leaves_one_line_and_fails() -> None:
    (line,) = map(json.loads, written("raise ValueError(SECRET)"))

    assert (line["event"], line["level"]) == ("process_crashed", "error")
    assert "ValueError" in line["exception"]


def test_our_own_errors_say_what_they_mean() -> None:
    assert log.described(Permanent("the channel is gone")) == "Permanent: the channel is gone"
    assert log.described(Unreachable("no answer")) == "Unreachable: no answer"
    assert log.described(ValueError(SECRET)) == "ValueError"


def test_a_chain_of_causes_is_told_without_foreign_messages() -> None:
    try:
        try:
            int(SECRET)
        except ValueError as error:
            raise Unreachable("try later") from error
    except Unreachable as error:
        told = log.redacted(error)

    assert told.index("Unreachable: try later") < told.index("caused by") < told.index("ValueError")
    assert SECRET not in told


def test_a_circle_of_causes_has_an_end() -> None:
    one, two = ValueError(SECRET), KeyError(SECRET)
    one.__context__, two.__context__ = two, one

    assert log.redacted(one).count("caused by") == 1


def test_frames_name_files_without_their_folders() -> None:
    try:
        int(SECRET)
    except ValueError as error:
        told = log.redacted(error)

    assert "pombal/test_log.py:" in told
    assert os.path.dirname(os.path.dirname(__file__)) not in told


def test_a_database_error_gives_its_sqlstate_and_no_value() -> None:
    with pytest.raises(DBAPIError) as caught, db.session() as s:
        s.execute(text("SELECT CAST(:value AS integer)"), {"value": SECRET})

    assert log.described(caught.value) == "DataError (SQLSTATE 22P02)"
    assert SECRET not in log.redacted(caught.value)


def test_an_address_that_does_not_answer_is_not_told() -> None:
    with pytest.raises(psycopg.OperationalError) as caught:
        psycopg.connect(f"postgresql://user:{SECRET}@127.0.0.1:1/x", connect_timeout=2)

    assert SECRET not in log.redacted(caught.value)
    assert "127.0.0.1" not in log.redacted(caught.value)


def test_levels_below_the_chosen_one_are_not_written() -> None:
    program = "log.get().info('a'); log.get().warning('b'); logging.getLogger('lib').info('c')"

    assert [json.loads(line)["event"] for line in written(program, "WARNING")] == ["b"]


def test_the_chatter_of_libraries_is_not_written() -> None:
    assert (
        written("[logging.getLogger(n).info(SECRET) for n in ('httpx', 'httpcore', 'uvicorn.access', 'alembic')]") == []
    )


def test_bound_context_is_on_each_line() -> None:
    program = """
import structlog
structlog.contextvars.bind_contextvars(actor='a')
log.get(channel_id='c').info('b')
"""
    line = one(program)

    assert (line["actor"], line["channel_id"]) == ("a", "c")


def test_a_log_that_nobody_reads_fails_nothing() -> None:
    program = (
        "import os, sys\nfrom pombal import log\nlog.setup()\nr, w = os.pipe()\nos.close(r)\nos.dup2(w, 2)\n"
        "log.get().info('x')\nprint('alive')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)

    assert done.stdout == "alive\n"
