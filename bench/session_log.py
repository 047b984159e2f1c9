"""How quickly logs of Baileys gateways are read, beside `grep -c` over the same files, and how soon an incident opens.

    python bench/session_log.py [--mb 100] [--incidents 10] [--no-servers]

Two files of that size are made: *usual*, in which one of a thousand lines is of a message that failed, among what
gateways say otherwise and the dumps of closed sessions; and *storm*, in which nothing else is said. `grep -c` counts
the lines with one of the four phrases of the old system's script, `grep -ci` those in upper and lower case; `reader` is
a process that reads the file in pieces and tallies nothing. Each is run three times in turns, the median is told.

`follower` is `pombal session follow --from-start` on the usual file, with a channel that is meant: until its place in
the database is the end of the file. `incident by log`: the follower and a worker run; six failures of one session are
written, and the clock runs from the sixth until its row of `repair` is there. `incident by webhook`: the same, each
failure posted to the web tier.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from psycopg.types.json import Jsonb
from rig import HERE, Failed, Rig, free_port, rig, wait, wait_until_ready

from models import WebhookToken
from pombal.ids import uuid7
from providers.gateway_log import Failure, LogReader

PHRASES = "Invalid PreKey ID|Bad MAC|PreKeyError|failed to decrypt message"
CHUNK = 256 * 1024
DUMP = [
    "Closing open session in favor of incoming prekey bundle",
    "Closing session: SessionEntry {",
    *(f"      privKey{n}: <Buffer {' '.join(['7a'] * 32)}>," for n in range(20)),
    "}",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=100, help="of each file")
    parser.add_argument("--incidents", type=int, default=10)
    parser.add_argument("--no-servers", action="store_true", help="only the reader")
    parser.add_argument("--read", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        return read(given.read)
    with tempfile.TemporaryDirectory() as folder:
        usual = made(Path(folder) / "usual.log", given.mb, every=1000)
        compare("usual", usual)
        compare("storm", made(Path(folder) / "storm.log", given.mb, every=1))
        if not given.no_servers:
            with rig(1) as its:
                backlog(its, usual)
                incidents(its, Path(folder) / "live.log", given.incidents)
                webhooks(its, given.incidents)
    return 0


# ------------------------------------------------------------------------------------------------------------ the logs


def failure(session: str, n: int, at: float | None = None) -> str:
    """What a gateway writes of one message: libsignal's block and Baileys' records."""
    address, ms = f"55119{n % 5000:08d}.0", int((at or time.time()) * 1000)
    stack = f"    at async {address} [as awaitable] (/app/node_modules/libsignal/src/session_cipher.js:171:28)"
    head = {"level": 50, "time": ms, "pid": 1, "hostname": "gateway-1", "class": "baileys", "whatsappId": session}
    jid = f"{address[:-2]}@s.whatsapp.net"
    record = {
        **head,
        "key": {"remoteJid": jid, "fromMe": False, "id": f"{uuid7().hex.upper()}", "addressingMode": "pn"},
        "err": {"type": "SessionError", "message": "No matching sessions found for message", "stack": f"x\n{stack}"},
        "messageType": "msg",
        "sender": jid,
        "author": jid,
        "isSessionRecordError": False,
        "msg": "failed to decrypt message",
    }
    rollback = {**head, "error": {"name": "SessionError"}, "msg": "transaction failed, rolling back"}
    lines = [
        "Failed to decrypt message with any known session...",
        "Session error:Error: Bad MAC Error: Bad MAC",
        "    at Object.verifyMAC (/app/node_modules/libsignal/src/crypto.js:87:15)",
        "    at SessionCipher.doDecryptWhisperMessage (/app/node_modules/libsignal/src/session_cipher.js:250:16)",
        stack,
        json.dumps(rollback, separators=(",", ":")),
        json.dumps(record, separators=(",", ":")),
    ]
    return "".join(f"{line}\n" for line in lines)


def chatter(n: int) -> str:
    if n % 50 == 0:
        return "".join(f"{line}\n" for line in DUMP)
    said = {"level": 30, "time": 1757664000399 + n, "pid": 1, "hostname": "gateway-1", "whatsappId": n % 30}
    body = {"from": f"55119{n % 5000:08d}@s.whatsapp.net", "body": "Bom dia, quanto custa a entrega para o centro?"}
    return json.dumps({**said, **body, "msg": "mensagem recebida"}, separators=(",", ":")) + "\n"


def made(file: Path, mb: int, *, every: int) -> Path:
    """A log of so many megabytes, with a failure among so many lines."""
    size = n = 0
    with file.open("w") as out:
        while size < mb * 1_000_000:
            size += out.write(failure(str(n % 30), n) if n % every == 0 else chatter(n))
            n += 1
    return file


# ---------------------------------------------------------------------------------------------------------- the reader


def compare(name: str, file: Path) -> None:
    mb = file.stat().st_size / 1e6
    takes: dict[str, list[float]] = {"grep -c": [], "grep -ci": [], "reader": []}
    most = grown = found = 0
    for _ in range(3):
        takes["grep -c"].append(timed(lambda: grep("-cE", file)))
        takes["grep -ci"].append(timed(lambda: grep("-ciE", file)))
        told = subprocess.run(
            [sys.executable, str(HERE / "session_log.py"), "--read", str(file)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"},
        ).stdout.split()
        takes["reader"].append(float(told[0]))
        found, most, grown = int(told[1]), int(told[2]), int(told[3])
    wanted = file.read_bytes().count(b'"msg":"failed to decrypt message"')
    if found != wanted:
        raise Failed(f"{found} failures instead of {wanted}")
    speeds = ", ".join(f"{what} {mb / statistics.median(all_):.0f} MB/s" for what, all_ in takes.items())
    memory = f"peak {most / 1024:.0f} MiB, {grown / 1024:.0f} MiB more than before it began"
    print(f"{name}: {mb:.0f} MB, {found} failures; {speeds}; reader {memory}", flush=True)


def read(file: str) -> int:
    """In a process of its own: seconds, failures, and the most memory in KiB."""
    before = peak()
    reader, found = LogReader(), 0
    began = time.perf_counter()
    with open(file, "rb", buffering=0) as log:
        while chunk := log.read(CHUNK):
            found += sum(isinstance(one, Failure) for one in reader.feed(chunk, datetime.now(UTC)))
    found += len(reader.finish(datetime.now(UTC)))
    took = time.perf_counter() - began
    print(took, found, peak(), peak() - before)
    return 0


def peak(pid: int | str = "self") -> int:
    """The most memory that a process has had, in KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def grep(options: str, file: Path) -> None:
    subprocess.run(
        ["grep", options, PHRASES, str(file)], capture_output=True, check=True
    )  # into nowhere it would stop at the first


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# -------------------------------------------------------------------------------------------------------- the follower


def channels(its: Rig, count: int, first: int = 0) -> Iterator[tuple[UUID, str]]:
    """New channels on a Baileys gateway; their ids and their sessions' names."""
    with its.superuser("pombal") as connection:
        row = connection.execute("SELECT id FROM tenant").fetchone()
        for n in range(first, first + count):
            id_, session = uuid7(), f"bench-{n}"
            config = Jsonb({"gateway": "whaticket", "host": "http://127.0.0.1:9", "session": session})
            columns = "tenant_id, id, kind, name, config"
            values = (row[0] if row else None, id_, session, config)
            connection.execute(f"INSERT INTO channel ({columns}) VALUES (%s, %s, 'baileys', %s, %s)", values)  # noqa: S608
            yield id_, session


def backlog(its: Rig, file: Path) -> None:
    size = file.stat().st_size
    words = ("-m", "pombal", "session", "follow", str(file), "--from-start")
    with its.superuser("pombal") as connection, its.process("backlog", "pombal", *words) as pid:

        def place() -> int:
            row = connection.execute("SELECT max(\"offset\") FROM log_position WHERE path LIKE '%usual.log'").fetchone()
            return row[0] or 0 if row else 0

        wait(lambda: place() > 0, "the follower does not begin")
        began, first = time.monotonic(), place()
        wait(lambda: place() >= size, "the follower does not end", seconds=600)
        took = time.monotonic() - began
        most = peak(pid) / 1024
    mb = (size - first) / 1e6
    print(f"follower: {mb:.0f} MB of backlog in {took:.1f} s ({mb / took:.0f} MB/s), peak {most:.0f} MiB", flush=True)


def incidents(its: Rig, file: Path, count: int) -> None:
    os.environ["POMBAL_SESSION_FIXER"] = "observe"
    sessions = list(channels(its, count))
    file.touch()
    follow = ("-m", "pombal", "session", "follow", str(file), "--attribute", "whatsappId")
    took = []
    with (
        its.superuser("pombal") as connection,
        its.process("fixer", "pombal", "-m", "pombal", "worker", "session_fixer"),
        its.process("follower", "pombal", *follow),
    ):

        def is_open(channel: UUID) -> bool:
            return bool(connection.execute("SELECT FROM repair WHERE channel_id = %s", [channel]).rowcount)

        def noted(channel: UUID) -> int:
            return connection.execute("SELECT FROM session_error WHERE channel_id = %s", [channel]).rowcount

        def is_followed() -> bool:
            return bool(connection.execute("SELECT FROM log_position WHERE path LIKE '%live.log'").rowcount)

        wait(is_followed, "the follower does not begin")
        for channel, session in sessions:
            with file.open("a") as log:
                log.write("".join(failure(session, n) for n in range(5)))
            wait(lambda: noted(channel) == 5, "five failures are not noted")  # noqa: B023 - within this round

            if is_open(channel):
                raise Failed("five failures opened an incident")
            with file.open("a") as log:
                log.write(failure(session, 5))
            began = time.monotonic()
            wait(lambda: is_open(channel), "no incident was opened", every=0.005)  # noqa: B023 - within this round
            took.append(time.monotonic() - began)
    median, worst = statistics.median(took), max(took)
    print(
        f"incident by log: {median:.2f} s from the sixth line to the row, worst {worst:.2f} s, of {count}", flush=True
    )


def webhooks(its: Rig, count: int) -> None:
    """The same by webhook: web, worker and fixer."""
    port, took = free_port(), []
    web = ("-m", "pombal", "web", "--host", "127.0.0.1", "--port", str(port))
    worker = ("-m", "pombal", "worker", "incoming_message")
    with (
        its.superuser("pombal") as connection,
        its.process("web", "pombal", *web),
        its.process("incoming", "pombal", *worker),
        its.process("fixer", "pombal", "-m", "pombal", "worker", "session_fixer"),
    ):
        wait_until_ready(port)
        for channel, _ in channels(its, count, first=1000):
            row = connection.execute("SELECT tenant_id FROM channel WHERE id = %s", [channel]).fetchone()
            token, text = WebhookToken.make(row[0] if row else uuid7(), channel, None)
            values = (token.digest, token.tenant_id, token.channel_id)
            connection.execute("INSERT INTO webhook_token (digest, tenant_id, channel_id) VALUES (%s, %s, %s)", values)

            def post(n: int, channel: UUID = channel, text: str = text) -> None:
                key = {"remoteJid": f"55119444400{n:02}@s.whatsapp.net", "fromMe": False, "id": f"{channel.hex}{n}"}
                stub = {"messageStubType": 2, "messageStubParameters": ["Invalid PreKey ID"], "messageTimestamp": 1}
                body = {"event": "messages.upsert", "data": {"messages": [{"key": key, **stub}], "type": "notify"}}
                address = f"http://127.0.0.1:{port}/api/webhooks/baileys/{channel}?token={text}"
                head = {"content-type": "application/json"}
                request = urllib.request.Request(address, json.dumps(body).encode(), head)
                with urllib.request.urlopen(request, timeout=10):  # noqa: S310 - ours
                    pass

            def has(table: str, rows: int, channel: UUID = channel) -> bool:
                query = f"SELECT FROM {table} WHERE channel_id = %s"
                return connection.execute(query, [channel]).rowcount == rows

            for n in range(5):
                post(n)
            wait(lambda has=has: has("session_error", 5), "five failures are not noted")  # type: ignore[misc]
            if has("repair", 1):
                raise Failed("five failures opened an incident")
            began = time.monotonic()
            post(5)
            wait(lambda has=has: has("repair", 1), "no incident was opened", every=0.005)  # type: ignore[misc]
            took.append(time.monotonic() - began)
    median, worst = statistics.median(took), max(took)
    print(f"incident by webhook: {median:.2f} s from the sixth post to the row, worst {worst:.2f} s, of {count}")


if __name__ == "__main__":
    sys.exit(main())
