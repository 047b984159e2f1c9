"""One simulated gateway process: its sessions, its log, its key, and its webhooks on their way out."""

import hashlib
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sandbox import baileys_lines as lines
from sandbox import baileys_words as said
from sandbox import megaapi_words as words
from sandbox.baileys_folder import Folder, Touches
from sandbox.baileys_keys import Keys
from sandbox.baileys_log import Log, LogPlan
from sandbox.baileys_sessions import Session
from sandbox.config import BaileysGateway, BaileysSession
from sandbox.meta import JSON, encode
from sandbox.rules import Seconds, Share
from sandbox.sender import Delivery, Post, Sender

Delay = tuple[Seconds, Seconds]
# Statuses after which Evolution does not try again (baileys-sessions.md §5).
_FINAL = frozenset({400, 401, 403, 404, 422})


class BaileysRules(NamedTuple):
    """What follows a message that was sent.

    answer_id  whether the answer has the message's key; None: as the dialect has it (the Whaticket family has not)
    echo       whether its own webhook comes afterwards
    echo_delay, ack_delay   fewest and most seconds
    acks       that follow, in Baileys' numbers
    ack_lost   share of them that never come
    """

    answer_id: bool | None = None
    echo: bool = True
    echo_delay: Delay = (0.02, 0.1)
    acks: tuple[int, ...] = (2, 3, 4)
    ack_delay: Delay = (0.02, 0.1)
    ack_lost: float = 0.0


class SetBaileysRules(msgspec.Struct, forbid_unknown_fields=True):
    """A request to change some of them, for one gateway or for all."""

    gateway: str | None = None
    answer_id: bool | UnsetType | None = UNSET
    echo: bool | UnsetType = UNSET
    echo_delay: Delay | UnsetType = UNSET
    acks: tuple[Annotated[int, Meta(ge=0, le=5)], ...] | UnsetType = UNSET
    ack_delay: Delay | UnsetType = UNSET
    ack_lost: Share | UnsetType = UNSET

    def on(self, rules: BaileysRules) -> BaileysRules:
        given = {name: getattr(self, name) for name in BaileysRules._fields if getattr(self, name) is not UNSET}
        return rules._replace(**given)


class Gateway:
    """One of them. Made inside a running loop, ended by `close`.

    down  None, or what its whole API does: the connection is reset, every answer is a 500, or its health is bad
    """

    def __init__(self, plan: BaileysGateway, root: Path, sender: Sender, touches: Touches) -> None:
        self.plan = plan
        self.root = root
        self.rules = BaileysRules()
        self.down: Literal["reset", "500", "unhealthy"] | None = None
        self.sessions: dict[str, Session] = {}
        self.log = Log(
            LogPlan(
                plan.log,
                plan.log_format,
                plan.log_level,
                plan.session_field,
                iso_time=plan.iso_time,
                prefix=plan.log_prefix,
            )
        )
        self.hooks: dict[str, str | None] = {}  # where the webhooks of a session go
        self.unheard = 0
        self._sender = sender
        self._touches = touches
        self._random = Random(11)  # noqa: S311 - test data
        for one in plan.sessions:
            self.add(one)

    @property
    def name(self) -> str:
        return self.plan.name

    def add(self, plan: BaileysSession) -> Session:
        """A session, paired or not. Raises ValueError when there is one of this name."""
        if plan.session in self.sessions:
            raise ValueError(f"there is a session {plan.session!r} already")
        folder = Folder(self.root / plan.session, lambda seen: self._touches.note(self.name, plan.session, seen))
        keys = Keys(folder, plan.number, plan.name, self.plan.version)
        session = Session(plan, self.plan.dialect, self.plan.version, keys, self)
        self.sessions[plan.session] = session
        self.hooks[plan.session] = plan.webhook_url
        session.begin()
        return session

    async def remove(self, name: str) -> None:
        await self.sessions.pop(name).close()
        self.hooks.pop(name, None)

    async def close(self) -> None:
        for name in list(self.sessions):
            await self.remove(name)

    def find(self, name: str) -> Session | None:
        """By its id; in the Whaticket family a number stands for a name."""
        found = self.sessions.get(name)
        if found is None and self.plan.dialect in ("whaticket", "ticketz"):
            found = next((one for one in self.sessions.values() if str(self.row_id(one)) == name), None)
        return found

    @staticmethod
    def row_id(session: Session) -> int:
        """The number of its row."""
        return int(session.id) if session.id.isdecimal() else 10_000 + zlib.crc32(session.id.encode()) % 90_000

    # What sessions need

    def who(self, session: Session) -> said.Who:
        url = self.hooks.get(session.id) or ""
        plan = session.plan
        return said.Who(
            self.plan.dialect, plan.session, plan.name, plan.number, self.plan.api_key, url, plan.verify_token
        )

    def emit(self, session: Session, bodies: list[JSON]) -> Delivery | None:
        """Bodies on their way; the last one's delivery."""
        deliveries = [self.post(session, encode(body)) for body in bodies]
        return deliveries[-1] if deliveries else None

    def post(
        self, session: Session, raw: bytes, *, once: bool = False, type: str = "application/json"
    ) -> Delivery | None:
        url = self.hooks.get(session.id)
        if url is None:
            self.unheard += 1
            return None
        headers = {"User-Agent": "axios/1.7.7", "Content-Type": type, **session.plan.webhook_header}
        final = _FINAL if self.plan.dialect == "evolution" else frozenset[int]()
        return self._sender.send(Post(url, raw, headers, once, final))

    def print(self, session: Session, entries: list[lines.Entry]) -> None:
        self.log.write(session.id, entries)

    def print_ignored(self, session: Session, message: JSON) -> None:
        self.log.plain(lines.ignored(message).split("\n"))

    # Sending

    def sent(self, session: Session, to: str, content: JSON) -> JSON:
        """A message that was taken: its key. The echo and the acks follow."""
        session.send(to)
        key = words.key(words.new_id(), to, from_me=True)
        rules, at = self.rules, self._random.uniform(*self.rules.echo_delay)
        if rules.echo:
            session.later(at, lambda: self._echo(session, key, content))
        for number in rules.acks:
            at += self._random.uniform(*rules.ack_delay)
            if not rules.ack_lost or self._random.random() >= rules.ack_lost:
                session.later(at, self._ack(session, key, number))
        return key

    def _echo(self, session: Session, key: JSON, content: JSON) -> None:
        told = said.message(key, content, int(time.time()), session.plan.name)
        self.emit(session, said.upsert(self.who(session), told, sent_here=True))

    def _ack(self, session: Session, key: JSON, number: int) -> Callable[[], object]:
        return lambda: self.emit(session, said.update(self.who(session), key, number))

    # Its rows

    def row(self, session: Session) -> JSON:
        """A session as the gateway tells it."""
        plan, word = session.plan, session.word
        shown = session.qr()
        match self.plan.dialect:
            case "evolution":
                row: JSON = {"id": f"id-{session.id}", "name": session.id, "connectionStatus": word}
                paired = session.keys.pairing is not None
                row |= {"ownerJid": f"{plan.number}@s.whatsapp.net" if paired else None, "profileName": plan.name}
                return row | {"integration": "WHATSAPP-BAILEYS", "token": "", "number": None}
            case "waha":
                row = {"name": session.id, "status": word, "me": None, "engine": {"engine": "NOWEB"}}
                if session.keys.pairing is not None and session.state == "open":
                    row["me"] = {"id": f"{plan.number}@c.us", "pushName": plan.name}
                hook = self.hooks.get(session.id)
                return row | {"config": {"webhooks": [] if hook is None else [{"url": hook, "events": ["*"]}]}}
        name = plan.name if session.id.isdecimal() else session.id
        row = {"id": self.row_id(session), "name": name, "status": word, "number": plan.number}
        return row | {"qrcode": "" if shown is None else shown[0], "retries": 0, "isDefault": False, "companyId": 1}

    def shown(self) -> JSON:
        """For whoever controls the sandbox."""
        return {
            "name": self.name,
            "dialect": self.plan.dialect,
            "version": self.plan.version,
            "root": str(self.root),
            "log": self.log.plan.path,
            "down": self.down,
            "rules": self.rules._asdict(),
            "sessions": [one.shown() | {"webhook": self.hooks.get(one.id)} for one in self.sessions.values()],
        }


def digest(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()
