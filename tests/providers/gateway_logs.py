"""Logs as Baileys gateways write them, made afresh: other ids, contacts and orders each time, and what is true of them.

The lines are those of baileys-sessions.md §1 and of the samples; no line here is copied from a sample.
"""

import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

STACK = "    at async _asyncQueueExecutor (/app/node_modules/libsignal/src/queue_job.js:20:29)"
MAC = "Session error:Error: Bad MAC Error: Bad MAC"
COUNTER = (
    "Session error:MessageCounterError: Key used already or never filled "
    "MessageCounterError: Key used already or never filled"
)
AHEAD = (
    "Session error:SessionError: Over 2000 messages into the future! SessionError: Over 2000 messages into the future!"
)
HIDDEN = "No matching sessions found for message"
DIRECT = {  # what the record itself says: type, text, stanza, cause
    "prekey": ("PreKeyError", "Invalid PreKey ID", "pkmsg"),
    "no_session": ("SessionError", "No session record", "msg"),
    "identity": ("Error", "Bad MAC", "pkmsg"),
    "sender_key": ("Error", "No session found to decrypt message", "skmsg"),
    "duplicate": ("MessageCounterError", "Key used already or never filled", "pkmsg"),
}


class Event(NamedTuple):
    """One message that failed, and what is true of it."""

    session: str
    jid: str
    id: str
    cause: str
    at: datetime


class Gateway:
    """Writes events of several sessions. `is_old`: Baileys 6.7, whose records say less."""

    def __init__(
        self, seed: int, *, is_old: bool = False, field: str | None = "whatsappId", at: datetime | None = None
    ) -> None:
        self.dice = random.Random(seed)  # noqa: S311 - a test's dice
        self.is_old, self.field = is_old, field
        at = at or datetime(2026, 3, 1, 10, 0, tzinfo=UTC) + timedelta(seconds=self.dice.randrange(10**6))
        self.at = at.replace(microsecond=at.microsecond // 1000 * 1000)  # loggers write whole milliseconds

    def id(self) -> str:
        return f"{self.dice.getrandbits(128):032X}"

    def contact(self) -> tuple[str, str]:
        """A JID and its Signal address."""
        number = f"55119{self.dice.randrange(10**8):08d}"
        if self.dice.random() < 0.3:
            number = str(self.dice.randrange(10**14, 10**15))
            return f"{number}@lid", f"{number}_1.{self.dice.choice([0, 0, 5, 22])}"
        return f"{number}@s.whatsapp.net", f"{number}.{self.dice.choice([0, 0, 0, 3, 17])}"

    def event(self, session: str, contact: tuple[str, str], cause: str, id_: str = "") -> tuple[Event, list[Any]]:
        """What is true, and its lines: text of the console, or the fields of a record."""
        self.at += timedelta(milliseconds=self.dice.randrange(20, 20_000))
        jid, address = contact
        event = Event(session, jid, id_ or self.id(), cause, self.at)
        lines: list[Any] = []
        if cause in DIRECT:
            type_, text, stanza = DIRECT[cause]
        else:
            type_, text, stanza = "SessionError", HIDDEN, "msg"
            lines += self.block(address, cause == "duplicate_block", cause == "ahead")
        frame = f"    at async {address} [as awaitable] (/app/node_modules/libsignal/src/session_cipher.js:171:28)"
        stack = f"{type_}: {text}\n    at x (/app/y.js:1:1)\n{frame}\n{STACK}"
        key: dict[str, Any] = {"remoteJid": jid, "fromMe": False, "id": event.id}
        if stanza == "skmsg":
            key = {"remoteJid": f"{self.dice.randrange(10**17, 10**18)}@g.us", "id": event.id, "participant": jid}
            event = event._replace(jid=key["remoteJid"])
        record: dict[str, Any] = {"key": key, "err": {"type": type_, "message": text, "stack": stack}}
        if not self.is_old:
            record["err"]["name"] = type_
            lines.append(self.record(session, {"error": {"name": type_}}, "transaction failed, rolling back"))
            record |= {"messageType": stanza, "sender": jid, "author": jid, "isSessionRecordError": False}
        return event, [*lines, self.record(session, record, "failed to decrypt message")]

    def block(self, address: str, is_duplicate: bool, is_ahead: bool) -> list[str]:
        kinds = [MAC] * self.dice.randrange(0 if is_duplicate or is_ahead else 1, 4)
        if is_duplicate:
            kinds.insert(self.dice.randrange(len(kinds) + 1), COUNTER)
        if is_ahead:
            kinds.insert(self.dice.randrange(len(kinds) + 1), AHEAD)
        lines = ["Failed to decrypt message with any known session..."]
        for kind in kinds:
            if kind is MAC:
                lines += [kind, "    at Object.verifyMAC (/app/node_modules/libsignal/src/crypto.js:87:15)"]
            else:
                lines += [kind, "    at SessionCipher.doDecryptWhisperMessage (/app/node_modules/x.js:236:19)"]
            lines += [f"    at async {address} [as awaitable] (/app/session_cipher.js:171:28)", STACK]
        return lines

    def dump(self) -> list[str]:
        """The dump of a closed session, with its private keys."""
        key = " ".join(f"{self.dice.randrange(256):02x}" for _ in range(32))
        return [
            "Closing open session in favor of incoming prekey bundle",
            "Closing session: SessionEntry {",
            "  _chains: {",
            "    BadMAC/Bfvx1WBMbGhPhJzEYih: { chainKey: [Object], chainType: 2, messageKeys: {} },",
            "  },",
            f"      privKey: <Buffer {key}>",
            "  }",
            "}",
        ]

    def record(self, session: str, fields: dict[str, Any], msg: str, level: int = 50) -> dict[str, Any]:
        at: Any = round(self.at.timestamp() * 1000)
        if self.is_old:
            at = self.at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        named = {self.field: int(session) if session.isdecimal() else session} if self.field else {}
        return {"level": level, "time": at, "pid": 1, "class": "baileys", **named, **fields, "msg": msg}

    def chatter(self, session: str) -> list[Any]:
        """Lines that are no failure, however they look."""
        return self.dice.choice(
            [
                self.dump(),
                [self.record(session, {"body": "deu Bad MAC e failed to decrypt message"}, "mensagem recebida", 30)],
                [self.record(session, {}, "GET /kb?q=Bad MAC 200", 30)],
                [self.record(session, {"err": {"type": "Error", "message": "bad decrypt"}}, "failed to decrypt media")],
                ['[2026-03-01 08:00:41] auto-fix: procurando "Bad MAC" / "PreKeyError" nos logs'],
                [f'127.0.0.1 - - "GET /whatsapp/{session}?whatsappId={session}&q=Bad%20MAC HTTP/1.1" 200'],
                ["Decrypted message with closed session."],
                [self.record(session, {}, "USync fetch yielded no results for pending PNs", 40)],
            ]
        )


def as_json(line: Any) -> list[str]:
    return [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False, separators=(",", ":"))]


def as_pretty(line: Any, *, prefix: str = "[baileys]: ") -> list[str]:
    """The same as pino-pretty prints it, with colours."""
    if isinstance(line, str):
        return [line]
    level = {30: "\x1b[32mINFO", 40: "\x1b[33mWARN", 50: "\x1b[31mERROR"}[line["level"]]
    at = line["time"]
    at = datetime.fromisoformat(at) if isinstance(at, str) else datetime.fromtimestamp(at / 1000, UTC)
    said = at.strftime("%Y-%m-%d %H:%M:%S.") + f"{at.microsecond // 1000:03d} +0000"
    lines = [f"{level}\x1b[39m [{said}] (1): \x1b[36m{prefix}{line['msg']}\x1b[39m"]
    fields = {name: value for name, value in line.items() if name not in ("level", "time", "pid", "msg")}
    for name, value in sorted(fields.items(), key=lambda one: one[0] in ("err", "error")):
        if name != "err":
            body = json.dumps(value, indent=2).replace("\n", "\n    ")
            lines += f"    \x1b[35m{name}\x1b[39m: {body}".split("\n")
            continue
        lines += [
            "    err: {",
            f'      "type": {json.dumps(value["type"])},',
            f'      "message": {json.dumps(value["message"])},',
        ]
        if "stack" in value:
            lines += ['      "stack":', *(f"          {one}" for one in value["stack"].split("\n"))]
        lines.append("    }")
    return lines


def plain(lines: list[str], at: datetime) -> Iterator[str]:
    yield from lines


def docker(lines: list[str], at: datetime) -> Iterator[str]:
    """Docker's json-file, which splits what is longer than 16 KiB."""
    stream = "stdout" if lines[0].startswith(("{", "\x1b")) else "stderr"
    for line in lines:
        whole = line + "\n"
        for start in range(0, len(whole), 16384):
            part = whole[start : start + 16384]
            yield json.dumps(
                {"log": part, "stream": stream, "time": f"{at:%Y-%m-%dT%H:%M:%S}.123456789Z"}, separators=(",", ":")
            )


def compose(lines: list[str], at: datetime) -> Iterator[str]:
    yield from (f"gateway-1  | {line}" for line in lines)


def compose_coloured(lines: list[str], at: datetime) -> Iterator[str]:
    yield from (f"\x1b[36mgateway-1  |\x1b[0m {line}" for line in lines)


def pm2(lines: list[str], at: datetime) -> Iterator[str]:
    yield from (f"0|gateway  | {line}" for line in lines)


def kubernetes(lines: list[str], at: datetime) -> Iterator[str]:
    yield from (f"{at:%Y-%m-%dT%H:%M:%S}.123456789Z stdout F {line}" for line in lines)


def windows(lines: list[str], at: datetime) -> Iterator[str]:
    yield from (f"{line}\r" for line in lines)


WRAPPINGS = (plain, docker, compose, compose_coloured, pm2, kubernetes, windows)
