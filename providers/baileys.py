"""Baileys gateways: one session of WhatsApp Web at a host of the operator's or a tenant's (baileys-sessions.md §5, §7).
What is said to which gateway is in `providers/baileys_dialects.py`; sending is in `providers/baileys_send.py`, files
are in `providers/baileys_media.py`.

A tenant names the host, so every call goes by a guarded client (security-reliability.md M2). Whatever takes several
calls ends as one does, within the same time.
"""

import asyncio
import io
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import quote

import httpx
import msgspec
import segno

from pombal.errors import Rejected
from providers import http, jid
from providers.baileys_dialects import DIALECTS, Dialect, check_paths, check_session, found_at, normal_base
from providers.gateway import Ability, Look, SessionLook
from providers.gateway_calls import asked, picture, refusal, shown, start_of
from providers.instance import Hook, InstanceFault, Picture, Standing

DEADLINE = 15.0  # seconds for whatever is asked of a session
_MOST_BYTES_OF_A_LIST = 8 * 1024 * 1024
_MOST_SESSIONS = 100_000
_MOST_TEXT_OF_A_CODE = 1_000  # characters; a code of WhatsApp has some 240
_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}")
_OWN_ID = re.compile(r"\+?([0-9]{5,20})(?::[0-9]{1,4})?(?:@(?:s\.whatsapp\.net|c\.us))?")
_ROW_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NOBODY = "the number is not on WhatsApp"  # Evolution answers with what it was told of each number
_IMAGES = (b"\x89PNG", b"\xff\xd8\xff")
_IN_DOUBT = frozenset({"timeout", "unreachable", "unreadable", "provider_error"})  # it may have been done
_UNWELL = frozenset({"error", "down", "unhealthy", "fail", "failed", "degraded", "shutting_down"})
_STANDINGS: dict[SessionLook, Literal["connected", "disconnected"]] = {
    "open": "connected",
    "closed": "disconnected",
    "qr": "disconnected",
}
# Where Evolution delivers what: all that we read (`providers/baileys_webhook.py`).
_EVENTS = (
    "MESSAGES_UPSERT",
    "MESSAGES_UPDATE",
    "SEND_MESSAGE",
    "CONNECTION_UPDATE",
    "QRCODE_UPDATED",
    "STATUS_INSTANCE",
)


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """A channel's session, as its config and secrets name it, unchecked."""

    gateway: str
    host: str
    session: str
    paths: Mapping[str, str] = {}
    api_key: str = ""
    send_key: str = ""  # of the Whaticket family, whose key for sending is another than a user's
    hook_url: str = ""  # fazer-ai's gateway is told at each start where its events go …
    hook_token: str = ""  # … and with what they prove themselves


class Place:
    """Where the calls of one session go, and with what. Whatever is wrong with that is `wrong`; then nothing is
    asked."""

    def __init__(self, given: Session, *, sends: bool = False) -> None:
        self.host, self.session, self.wrong = given.host, given.session, ""
        self.dialect: Dialect = DIALECTS.get(given.gateway, DIALECTS["whaticket"])
        self.paths = dict(self.dialect.paths)
        try:
            own = check_paths(given.gateway, given.paths)
            self.paths.update(own)
            self.session = check_session(given.gateway, given.session)
            self.host = normal_base(given.host) if given.host else ""
        except Rejected as error:
            self.wrong = str(error)
        else:
            self.wrong = "" if self.host else "no host is configured for this channel"
        steps: tuple[Ability, ...] = ("restart", "stop", "refresh_contact")
        self.abilities = self.dialect.abilities | {one for one in steps if one in given.paths}
        key = (given.send_key if sends else "") or given.api_key
        if key and not _TOKEN.fullmatch(key):
            self.wrong = self.wrong or "the channel's key has a character that no key has"
        self.headers = {"Accept": "application/json"}
        if key and not self.wrong:
            self.headers[self.dialect.header] = self.dialect.scheme + key

    def url(self, path: str) -> str:
        return self.host + path

    def has(self, link: str) -> bool:
        """Whether a link leads to this gateway itself, which wants its key for it."""
        try:
            ours, theirs = httpx.URL(self.host), httpx.URL(link)
        except httpx.InvalidURL:
            return False
        is_same = (ours.scheme, ours.host, ours.port) == (theirs.scheme, theirs.host, theirs.port)
        return not self.wrong and is_same and theirs.userinfo == b""

    def call(self, name: str, session: str | None = None, contact: str = "") -> tuple[str, str]:
        """Method and path of a call, about this session unless another of its names is given."""
        method, _, path = self.paths[name].partition(" ")
        filled = path.replace("{session}", quote(session or self.session, safe=""))
        return method, filled.replace("{jid}", quote(contact, safe=""))


class Baileys:
    """One session; see `providers.gateway.Gateway`. Never repeats a call by itself."""

    def __init__(self, clients: http.Clients, given: Session, *, deadline: float = DEADLINE) -> None:
        self._clients = clients
        self._given = given
        self._place = Place(given)
        self._deadline = deadline
        self._id: str | None = None  # as the gateway's paths have it, once it is known
        self.host = self._place.host
        self.abilities = frozenset(self._place.abilities)

    # ------------------------------------------------------------------------------------------------ how it stands

    async def status(self, deadline: float) -> Standing:
        return self._standing(await self._row(self._by(deadline)))

    async def listed(self, deadline: float) -> Mapping[str, Standing]:
        """By each of the names that a session has at its gateway, and that no other has."""
        found = [(self._names(row), self._standing(row)) for row in await self._rows(self._by(deadline))]
        count = Counter(name for names, _ in found for name in names[1:] if not self._is_an_id(name))
        by_name = {name: standing for names, standing in found for name in names[1:] if count[name] == 1}
        return by_name | {names[0]: standing for names, standing in found if names}  # the first one is its id

    async def look(self) -> Look:
        until = self._by()
        if not self._says_its_state():
            return Look("unknown")
        row = await self._row(until)
        word = found_at(row, self._place.dialect.word_at)
        state = self._state(word)
        if state == "connecting" and self._place.dialect.hides_scans and await self._waits_for_a_scan(until):
            state = "qr"
        return Look(state, shown(word or ""))

    async def health(self) -> None:
        name = "health" if "health" in self._place.paths else "list"
        body = await self._asked(name, self._by())
        word = body.get("status") if isinstance(body, dict) else None
        if isinstance(word, str) and word.strip().casefold() in _UNWELL:
            text = "the gateway says that it is not well"
            raise InstanceFault("provider_error", text, is_transient=True, raw=shown(word))

    # --------------------------------------------------------------------------------------------------- its pairing

    async def qr(self) -> Picture | None:
        """The code to scan now; None when there is none: somebody is logged in, or the socket is not open."""
        until, places = self._by(), self._place.dialect.code_at
        if "qr" in self._place.paths:
            if self._place.paths.get("start") != self._place.paths["qr"] and self._says_its_state():
                row = await self._row(until)
                if self._state(found_at(row, self._place.dialect.word_at)) != "qr":
                    return None
            reply = await self._reply("qr", until)
            if reply.body.startswith(_IMAGES):
                return Picture("image/png" if reply.body[:1] == b"\x89" else "image/jpeg", reply.body)
            return _pictured(found_at(_understood(reply), places))
        if not self._says_its_state():
            raise InstanceFault("rejected", "this gateway tells its QR code by webhook alone")
        row = await self._row(until)
        is_asked = self._state(found_at(row, self._place.dialect.word_at)) == "qr"
        return _pictured(found_at(row, places)) if is_asked else None

    async def logout(self) -> None:
        await self._done("logout", self._by())

    # ---------------------------------------------------------------------------- steps of a repair: the pairing stays

    async def stop(self) -> None:
        await self._done("stop", self._by())

    async def start(self) -> None:
        await self._done("start", self._by(), self._options())

    async def restart(self) -> None:
        """Close and open the socket. One that is closed already is opened, where the gateway makes a difference."""
        until = self._by()
        if "restart" not in self._place.paths:
            await self._stopped_and_started(until)
            return
        try:
            await self._done("restart", until, self._options())
        except InstanceFault as fault:
            if fault.code not in ("rejected", "not_found") or not self._says_its_state():
                raise
            row = await self._row(until)
            if self._state(found_at(row, self._place.dialect.word_at)) != "closed":
                raise
            await self._done("start", until, self._options())

    async def _stopped_and_started(self, until: float) -> None:
        """It is started too when nobody knows whether it was stopped: a session is never left closed."""
        doubt = None
        try:
            await self._done("stop", self._by(self._deadline / 2))
        except InstanceFault as fault:
            if fault.code not in _IN_DOUBT:
                raise
            doubt = fault
        await self._done("start", until, self._options())
        if doubt is not None:
            raise doubt

    async def refresh_contact(self, jid_: str) -> None:
        contact = jid.parse(jid_)
        if contact is None or contact.kind not in ("phone", "lid"):
            raise InstanceFault("misconfigured", "a contact is refreshed by the JID of a person")
        await self._done("refresh_contact", self._by(), contact=jid_)

    # ------------------------------------------------------------------------------------------------ where events go

    async def hook(self) -> Hook:
        body = await self._asked("hook", self._by())
        for place in (body, body.get("webhook") if isinstance(body, dict) else None):
            if isinstance(place, dict) and isinstance(place.get("url"), str):
                is_enabled = place.get("enabled")
                return Hook(place["url"], is_enabled if isinstance(is_enabled, bool) else bool(place["url"]))
        if body is None:  # Evolution's answer while none is set
            return Hook("", is_enabled=False)
        raise InstanceFault("unreadable", "the gateway's answer does not say where events go")

    async def set_hook(self, url: str) -> None:
        if self._place.paths.get("set_hook") == self._place.paths.get("start"):
            await self._done("set_hook", self._by(), self._options(url))
            return
        wanted = {"enabled": True, "url": url, "byEvents": False, "base64": False, "events": _EVENTS}
        await self._done("set_hook", self._by(), {"webhook": wanted})

    # --------------------------------------------------------------------------------------------------------- calls

    def _by(self, seconds: float | None = None) -> float:
        return asyncio.get_running_loop().time() + min(seconds or self._deadline, self._deadline)

    async def _reply(self, name: str, until: float, body: Any = None, contact: str = "") -> http.Reply:
        """The answer of success to a call. Raises `InstanceFault`."""
        if self._place.wrong:
            raise InstanceFault("misconfigured", self._place.wrong)
        if name not in self._place.paths:
            raise InstanceFault(
                "rejected", f"this gateway has no call for it: `paths` of the channel may name one ({name})"
            )
        session = await self._known_as(until) if "{session}" in self._place.paths[name] else None
        method, path = self._place.call(name, session, contact)
        left = until - asyncio.get_running_loop().time()
        if left <= 0:
            raise InstanceFault("timeout", "the gateway gave no answer in time", is_transient=True)
        content = msgspec.json.encode(body) if body is not None else None
        most = _MOST_BYTES_OF_A_LIST if name == "list" else http.MOST_BYTES
        reply = await asked(self._clients, self._place, method, path, content, deadline=left, most_bytes=most)
        if not 200 <= reply.status < 300:
            raise refusal(reply, words_of(reply.body))
        if reply.body.lstrip()[:1] == b"<":  # a page: whoever wrote it answers so whatever is asked
            raise InstanceFault("unreadable", "a page came in place of an answer", raw=start_of(reply.body))
        return reply

    async def _asked(self, name: str, until: float) -> Any:
        """What a call answers, decoded; None for an answer that is none in JSON, of a call whose success is enough."""
        reply = await self._reply(name, until)
        return _understood(reply) if name != "health" else _decoded(reply.body)

    async def _done(self, name: str, until: float, body: Any = None, contact: str = "") -> None:
        _raise_error(_decoded((await self._reply(name, until, body, contact)).body))

    async def _known_as(self, until: float) -> str:
        """The session as the gateway's paths have it: by its id, where it has ids and was named by its name."""
        session = self._place.session
        if not self._place.dialect.has_ids or self._is_an_id(session) or "list" not in self._place.paths:
            return session
        if self._id is None:
            names = self._names(await self._in_list(until))
            self._id = names[0] if names and _ROW_ID.fullmatch(names[0]) else session
        return self._id

    def _is_an_id(self, name: str) -> bool:
        """Whether it is an id, and no name: another session may be called by the digits of ours."""
        return self._place.dialect.has_ids and name.isdecimal()

    # ----------------------------------------------------------------------------------------------------- its answers

    def _says_its_state(self) -> bool:
        return bool(self._place.wrong) or not {"state", "list"}.isdisjoint(self._place.paths)

    async def _row(self, until: float) -> Any:
        """What the gateway says of this session."""
        if "state" in self._place.paths:
            return await self._asked("state", until)
        if "list" in self._place.paths or self._place.wrong:
            return await self._in_list(until)
        return None

    async def _in_list(self, until: float) -> dict[str, Any]:
        rows = [(row, self._names(row)) for row in await self._rows(until)]
        session = self._place.session
        found = [row for row, names in rows if names[:1] == [session]]
        if not found and not self._is_an_id(session):
            found = [row for row, names in rows if session in names]
        if not found:
            raise InstanceFault("not_found", "the gateway's list has no such session")
        if len(found) > 1:
            raise InstanceFault("misconfigured", "several sessions of the gateway have this name: give the id of one")
        return found[0]

    async def _rows(self, until: float) -> list[dict[str, Any]]:
        rows = _list_in(await self._asked("list", until))
        if rows is None or len(rows) > _MOST_SESSIONS:
            raise InstanceFault("unreadable", "the gateway's list of sessions has another form than is known")
        return [row for row in rows if isinstance(row, dict)]

    def _names(self, row: Mapping[str, Any]) -> list[str]:
        found = (found_at(row, (place,)) for place in self._place.dialect.names_at)
        return list(dict.fromkeys(name for name in found if name))

    def _state(self, word: str | None) -> SessionLook:
        return self._place.dialect.words.get((word or "").strip().casefold(), "unknown")

    def _standing(self, row: Any) -> Standing:
        word, own = (found_at(row, places) for places in (self._place.dialect.word_at, self._place.dialect.own_at))
        match = _OWN_ID.fullmatch(own) if own else None
        return Standing(_STANDINGS.get(self._state(word)), shown(word or ""), match.group(1) if match else None)

    async def _waits_for_a_scan(self, until: float) -> bool:
        """Evolution says `connecting` too while it shows a code, and keeps the code of the last pairing for ever. But
        its list has what it wrote down last, and `connecting` it writes down for a code alone."""
        try:
            if self._state(found_at(await self._in_list(until), self._place.dialect.word_at)) != "connecting":
                return False
            shown_code = _understood(await self._reply("qr", until))
        except InstanceFault:  # how it stands was answered: that is all we know then
            return False
        return found_at(shown_code, self._place.dialect.code_at) is not None

    def _options(self, url: str = "") -> dict[str, Any] | None:
        """What fazer-ai's gateway must be told at each start."""
        if self._given.gateway != "fazer":
            return None
        url = url or self._given.hook_url
        token = {"webhookVerifyToken": self._given.hook_token} if self._given.hook_token else {}
        return {"webhookUrl": url, **token, "includeMedia": False} if url else {}


# ----------------------------------------------------------------------------------------------------- what they mean


def words_of(raw: bytes) -> str | None:
    """A gateway's own words for what went wrong; None when the answer is none in JSON."""
    body = _decoded(raw)
    return _words(body) if isinstance(body, dict) else None


def _words(body: Mapping[str, Any]) -> str:
    inner = body.get("response")
    said: Any = (inner.get("message") if isinstance(inner, dict) else None) or body.get("message") or body.get("error")
    if isinstance(said, list):
        is_of_nobody = any(isinstance(one, dict) and one.get("exists") is False for one in said)
        said = _NOBODY if is_of_nobody else "; ".join(one for one in said if isinstance(one, str))
    return said if isinstance(said, str) else ""


def is_error(body: Any) -> bool:
    """Whether an answer of success says that it is one of failure, as Evolution's do."""
    return isinstance(body, dict) and body.get("error") not in (None, False, "", 0)


def _raise_error(body: Any) -> None:
    if is_error(body):
        raise InstanceFault("rejected", "the gateway answered with an error", raw=shown(_words(body)))


def _understood(reply: http.Reply) -> Any:
    body = _decoded(reply.body)
    if body is None and reply.body.strip() not in (b"", b"null"):
        raise InstanceFault("unreadable", "the gateway's answer is not one in JSON", raw=start_of(reply.body))
    _raise_error(body)
    return body


def _decoded(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (ValueError, RecursionError):  # not UTF-8 and not JSON are both ValueErrors
        return None


def _list_in(body: Any) -> list[Any] | None:
    """A list of sessions, as it is or inside of one object."""
    if isinstance(body, dict):
        lists = [value for value in body.values() if isinstance(value, list)]
        body = lists[0] if len(lists) == 1 else None
    return body if isinstance(body, list) else None


def _pictured(code: str | None) -> Picture | None:
    """A code to scan as a picture, drawn from its text if need be."""
    if not code:
        return None
    if code.startswith("data:") or len(code) > _MOST_TEXT_OF_A_CODE:
        return picture(code)
    into = io.BytesIO()
    segno.make_qr(code, error="l").save(into, kind="png", scale=6, border=4)
    return Picture("image/png", into.getvalue())
