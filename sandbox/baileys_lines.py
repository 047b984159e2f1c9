"""What a Baileys process prints: libsignal's console blocks and pino's records (baileys-sessions.md §1).

How an entry looks in a file is for `sandbox.baileys_log`. Texts, frames and line numbers are those of the samples.
"""

import json
import secrets
import time
from base64 import b64encode
from typing import Literal, NamedTuple

from sandbox.baileys_keys import BAD_MAC, BAD_PRE_KEY, NO_MATCH, NO_RECORD, Failure
from sandbox.meta import JSON

COUNTER = "Key used already or never filled"
_SRC = "/app/node_modules/libsignal/src"
_LIB = "file:///app/node_modules/@whiskeysockets/baileys/lib"
_QUEUE = f"    at async _asyncQueueExecutor ({_SRC}/queue_job.js:20:29)"
_VERIFY = f"    at Object.verifyMAC ({_SRC}/crypto.js:87:15)"
_WHISPER = f"    at SessionCipher.doDecryptWhisperMessage ({_SRC}/session_cipher.js"

# What the server says of a connection's end, by its code (§6).
_REASONS: dict[int, tuple[str, JSON | None, JSON | None]] = {
    515: ("Stream Errored (restart required)", {"code": "515"}, None),
    440: ("Stream Errored (conflict)", {}, {"tag": "conflict", "attrs": {"type": "replaced"}}),
    401: ("Stream Errored (conflict)", {"code": "401"}, {"tag": "conflict", "attrs": {"type": "device_removed"}}),
    503: ("Stream Errored (unknown)", {"code": "503"}, None),
    500: ("Stream Errored (ack)", {}, {"tag": "ack", "attrs": {}}),
    428: ("Connection Terminated by Server", None, None),
    408: ("Connection was lost", None, None),
}


class Console(NamedTuple):
    """Lines without a time."""

    lines: tuple[str, ...]
    stream: Literal["stdout", "stderr"] = "stderr"


class Record(NamedTuple):
    """One of pino's; `is_baileys` is false for what the gateway itself logs."""

    level: int
    fields: JSON
    msg: str
    is_baileys: bool = True


Entry = Console | Record


class Missed(NamedTuple):
    """A message that was not decrypted, for the log.

    address  the contact's Signal address, such as 5511944440001.0
    entries  how many sessions are stored for the contact, each of which fails by itself
    """

    key: JSON
    failure: Failure
    address: str
    entries: int = 1


def missed(one: Missed, version: str) -> list[Entry]:
    """All that stands in a log about one failed message."""
    failure = one.failure
    printed: list[Entry] = []
    if failure.text == NO_MATCH:
        printed.append(_block(one.address, one.entries))
    return [*printed, *_records(one, version)]


def duplicate(one: Missed, version: str) -> list[Entry]:
    """A message that was delivered twice; nothing is lost."""
    head = f"Session error:MessageCounterError: {COUNTER} MessageCounterError: {COUNTER}"
    lines = (
        "Failed to decrypt message with any known session...",
        head,
        f"{_WHISPER}:236:19)",
        f"    at SessionCipher.decryptWithSessions ({_SRC}/session_cipher.js:147:40)",
        f"    at {one.address} [as awaitable] ({_SRC}/session_cipher.js:171:39)",
        _QUEUE,
    )
    return [Console(lines), *_records(one, version)]


def healed() -> list[Entry]:
    """A contact's new session takes the old one's place; the dump has private keys in it."""
    now = int(time.time() * 1000)
    chains = f"    '{_base64(33)}': {{ chainKey: [Object], chainType: 2, messageKeys: {{}} }},"
    other = f"    '{_base64(33)}': {{ chainKey: [Object], chainType: 1, messageKeys: {{}} }}"
    dump = (
        "Closing session: SessionEntry {",
        "  _chains: {",
        chains,
        other,
        "  },",
        f"  registrationId: {secrets.randbelow(16_380)},",
        "  currentRatchet: {",
        "    ephemeralKeyPair: {",
        f"      pubKey: {_dumped(33)},",
        f"      privKey: {_dumped(32)}",
        "    },",
        f"    lastRemoteEphemeralKey: {_dumped(33)},",
        "    previousCounter: 0,",
        f"    rootKey: {_dumped(32)}",
        "  },",
        "  indexInfo: {",
        f"    baseKey: {_dumped(33)},",
        "    baseKeyType: 2,",
        "    closed: -1,",
        f"    used: {now},",
        f"    created: {now},",
        f"    remoteIdentityKey: {_dumped(33)}",
        "  }",
        "}",
    )
    return [Console(("Closing open session in favor of incoming prekey bundle", *dump), "stdout")]


def retry_receipt(key: JSON, count: int, name: str) -> list[Entry]:
    chat = key.get("participant") or key["remoteJid"]
    attrs = {"id": key["id"], "from": chat, "type": "text", "t": str(int(time.time())), "notify": name}
    return [Record(30, {"msgAttrs": attrs, "retryCount": count}, "sent retry receipt")]


def connected() -> list[Entry]:
    hello = {"clientHello": {"ephemeral": _base64(32)}}
    return [Record(30, {"browser": ["Mac OS", "Chrome", "14.4.1"], "helloMsg": hello}, "connected to WA")]


def ended(code: int) -> list[Entry]:
    """The connection has ended with this code (samples, 08)."""
    reason, attrs, child = _REASONS.get(code, ("Connection Failure", None, None))
    data: JSON | None = None if code in (408, 428) else {"reason": str(code), "location": "rva"}
    printed: list[Entry] = []
    if attrs is not None:
        node = {"tag": "stream:error", "attrs": attrs, "content": [] if child is None else [child]}
        data = child or node
        fields = {"fullErrorNode": node} if child is None else {"reasonNode": child, "fullErrorNode": node}
        printed.append(Record(50, fields, "stream errored out"))
    trace = f"Error: {reason}\n    at WebSocketClient.<anonymous> ({_LIB}/Socket/socket.js:795:18)"
    printed.append(
        Record(30, {"trace": f"{trace}\n    at WebSocketClient.emit (node:events:524:28)"}, "connection errored")
    )
    told = {"connection": "close", "statusCode": code, "reason": reason, "data": data}
    printed.append(Record(30, told, "connection.update", is_baileys=False))
    return printed


def ignored(message: JSON) -> str:
    """How Evolution speaks of an undecryptable message, in its own form over many lines."""
    when = time.strftime("%a %b %d %Y %H:%M:%S")
    told = json.dumps(message, indent=2, ensure_ascii=False)
    head = f"[Evolution API] 1 - {when}   WARN  [BaileysStartupService] [string]"
    return f"{head} Message ignored with messageStubParameters: {told}"


def noise(jid: str) -> list[Entry]:
    """What has the phrases in it and is no error (samples, 07)."""
    bad = {"type": "Error", "message": "error:1C800064:Provider routines::bad decrypt", "code": "ERR_OSSL_BAD_DECRYPT"}
    return [
        Record(30, {"from": jid, "body": "meu sistema deu erro Bad MAC, o que faço?"}, "mensagem recebida", False),
        Record(30, {}, "GET /kb?q=Invalid+PreKey+ID 200", False),
        Record(50, {"err": bad}, "failed to decrypt media", False),
        Console(
            ('[2025-09-12 08:00:41] auto-fix: procurando "Bad MAC" / "PreKeyError" nos logs da sessão 26',), "stdout"
        ),
    ]


def _block(address: str, entries: int) -> Console:
    one = (
        f"Session error:Error: {BAD_MAC} Error: {BAD_MAC}",
        _VERIFY,
        f"{_WHISPER}:250:16)",
        f"    at async SessionCipher.decryptWithSessions ({_SRC}/session_cipher.js:147:29)",
        f"    at async {address} [as awaitable] ({_SRC}/session_cipher.js:171:28)",
        _QUEUE,
    )
    return Console(("Failed to decrypt message with any known session...", *(one * entries)))


def _records(one: Missed, version: str) -> list[Entry]:
    failure, key = one.failure, one.key
    err = {"type": failure.type, "message": failure.text, "stack": _stack(one)}
    if failure.type != "Error":
        err["name"] = failure.type
    logged: JSON = {"remoteJid": key["remoteJid"], "fromMe": key["fromMe"], "id": key["id"]}
    logged |= {name: key[name] for name in ("participant", "remoteJidAlt", "participantAlt") if key.get(name)}
    if version == "6":
        return [Record(50, {"key": logged, "err": err}, "failed to decrypt message")]
    logged["addressingMode"] = key.get("addressingMode", "pn")
    author = key.get("participant") or key["remoteJid"]
    fields = {
        "key": logged,
        "err": err,
        "messageType": failure.stanza,
        "sender": key["remoteJid"],
        "author": author,
        "isSessionRecordError": failure.text == NO_RECORD,
    }
    rolled: JSON = {"error": {} if failure.type == "Error" else {"name": failure.type}}
    return [Record(50, rolled, "transaction failed, rolling back"), Record(50, fields, "failed to decrypt message")]


def _stack(one: Missed) -> str:
    failure, address = one.failure, one.address
    frames: tuple[str, ...]
    match failure.text:
        case text if text == BAD_PRE_KEY:
            at = f"    at async {address} [as awaitable] ({_SRC}/session_cipher.js:205:30)"
            frames = (f"    at SessionBuilder.initIncoming ({_SRC}/session_builder.js:66:19)", at, _QUEUE)
        case text if text == BAD_MAC:
            at = f"    at async {address} [as awaitable] ({_SRC}/session_cipher.js:207:31)"
            frames = (_VERIFY, f"{_WHISPER}:250:16)", at, _QUEUE)
        case text if text == NO_RECORD:
            frames = (f"    at {address} [as awaitable] ({_SRC}/session_cipher.js:169:23)", _QUEUE)
        case text if text == COUNTER:
            at = f"    at {address} [as awaitable] ({_SRC}/session_cipher.js:207:42)"
            frames = (f"{_WHISPER}:236:19)", at, _QUEUE)
        case _ if failure.stanza == "skmsg":
            at = f"    at GroupCipher.decrypt ({_LIB}/Signal/Group/group_cipher.js:35:19)"
            frames = (at, f"    at async {_LIB}/Utils/auth-utils.js:250:40")
        case _:
            at = f"    at async {address} [as awaitable] ({_SRC}/session_cipher.js:171:28)"
            frames = (f"    at SessionCipher.decryptWithSessions ({_SRC}/session_cipher.js:161:15)", at, _QUEUE)
    return "\n".join((f"{failure.type}: {failure.text}", *frames))


def _base64(size: int) -> str:
    return b64encode(secrets.token_bytes(size)).decode()


def _dumped(size: int) -> str:
    """A key of 32 bytes; a public one has a byte before them that says what it is."""
    raw = secrets.token_bytes(32)
    return f"<Buffer {(raw if size == 32 else bytes([5]) + raw).hex(' ')}>"
