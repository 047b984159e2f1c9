"""The simulated Baileys gateways: `/baileys/<gateway>/…` in each one's dialect (baileys-sessions.md §5).

They are told what to do by `sandbox.baileys_control`, and keep their own truth of what they were asked in
`Baileys.calls`, and of what was done to their sessions' folders in `Baileys.touches`.
"""

import asyncio
import base64
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from sandbox import baileys_sends as sends
from sandbox.answers import Answer, Exchange
from sandbox.baileys_calls import BaileysCall, BaileysCalls, shortened
from sandbox.baileys_faults import BEFORE, BaileysFaults, SetBaileysFault, instead
from sandbox.baileys_folder import Touches
from sandbox.baileys_gateways import Gateway, digest
from sandbox.baileys_media import PREFIX as FILES
from sandbox.baileys_media import BaileysFiles
from sandbox.baileys_routes import NO_KEY, NO_SESSION, OPEN, Found, find, refusal
from sandbox.baileys_sends import Asked, WrongShape
from sandbox.baileys_sessions import Session
from sandbox.baileys_storms import Storm, StormPlan
from sandbox.config import BaileysGateway, BaileysSession, ConfigError, ConfigFile
from sandbox.megaapi_faults import told
from sandbox.meta import JSON
from sandbox.sender import Sender

PREFIX = "/baileys/"
MAX_BODY = 140 * 2**20  # bytes; a file of 100 MB in base64
GIVE_UP = 60.0  # seconds for which a webhook is sent again
QR_WAIT = 2.0  # seconds that Evolution's `connect` waits for a code
NOBODY = "000"  # how numbers begin that are on no WhatsApp


class Refused(Exception):
    """The request is not served; the answer says so, and the journal why."""

    def __init__(self, answer: Answer, reason: str) -> None:
        super().__init__(reason)
        self.answer = answer


class Baileys:
    """All gateways. They live while `running` is entered."""

    def __init__(self, config: ConfigFile) -> None:
        self.gateways: dict[str, Gateway] = {}
        self.faults = BaileysFaults()
        self.calls = BaileysCalls()
        self.touches = Touches()
        self.files = BaileysFiles()
        self.storms: dict[int, tuple[Storm, asyncio.Task[None]]] = {}
        self.sender: Sender  # made in `running`: it needs the loop
        self.root: Path
        self._file = config
        self._configured: dict[str, BaileysGateway] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        with tempfile.TemporaryDirectory(prefix="baileys-") as folder:
            self.root = Path(folder)
            async with Sender(give_up_after=GIVE_UP) as self.sender:
                await self.configure()
                try:
                    yield
                finally:
                    await self.stop_storms()
                    for gateway in list(self.gateways.values()):
                        await gateway.close()

    def is_asked(self, path: str) -> bool:
        """Whether `serve` answers requests for this path."""
        return path.startswith((PREFIX, FILES))

    async def configure(self) -> None:
        """Read the configuration again if it has changed; one that cannot be read changes nothing."""
        try:
            host = self._file.read().baileys
        except ConfigError:
            return  # `GET /health` says what is wrong with it
        wanted = {one.name: one for one in host.gateways}
        if wanted == self._configured:
            return
        before, self._configured = self._configured, wanted
        for name in before:
            if wanted.get(name) != before[name] and name in self.gateways:
                await self.remove(name)
        for name, plan in wanted.items():
            if name not in self.gateways:
                self.add(plan, host.root)

    def add(self, plan: BaileysGateway, root: str | None = None) -> Gateway:
        """A gateway. Raises ValueError when there is one of this name."""
        if plan.name in self.gateways:
            raise ValueError(f"there is a gateway {plan.name!r} already")
        folder = Path(plan.root) if plan.root is not None else Path(root or self.root) / plan.name
        made = self.gateways[plan.name] = Gateway(plan, folder, self.sender, self.touches)
        return made

    async def remove(self, name: str, session: str | None = None) -> None:
        """No such gateway, or no such session of it, any more."""
        await self.stop_storms(lambda plan: plan.gateway == name and session in (None, plan.session))
        if session is not None:
            await self.gateways[name].remove(session)
        else:
            await self.gateways.pop(name).close()

    def storm(self, plan: StormPlan, session: Session) -> Storm:
        storm = Storm(len(self.storms) + 1, plan, session)
        self.storms[storm.id] = storm, asyncio.create_task(storm.run())
        return storm

    async def stop_storms(self, fits: Callable[[StormPlan], bool] = lambda plan: True, id: int | None = None) -> None:
        for storm, task in self.storms.values():
            if storm.state != "stopped" and id in (None, storm.id) and fits(storm.plan):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
                storm.stop()

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.configure()
        exchange = Exchange(scope, receive, send)
        path: str = scope["path"]
        if path.startswith(FILES):
            await self._give(exchange, path.removeprefix(FILES).removesuffix(".enc"))
            return
        name, _, rest = path.removeprefix(PREFIX).partition("/")
        gateway = self.gateways.get(name)
        if gateway is None:
            await exchange.write(told(404, {"error": "no such gateway"}))
            return
        found = find(gateway.plan.dialect, gateway.plan.paths, scope["method"], f"/{rest}")
        call = self.calls.begin(name, found.operation, scope["method"], f"/{rest}", exchange.query)
        raw = await exchange.read(MAX_BODY)
        if raw is not None:
            await self._serve(exchange, gateway, found, raw, call)

    async def _serve(
        self, exchange: Exchange, gateway: Gateway, found: Found, raw: bytes | bytearray, call: BaileysCall
    ) -> None:
        body = _decoded(raw)
        asked = _Request(self, exchange, gateway, found, raw, body, call)
        call.body = shortened(body)
        call.session = asked.session_name()
        asked.note()
        session = gateway.find(call.session or "")
        if found.operation == "connect":
            call.operation = "start" if session is not None and session.state == "closed" else "qr"
        met = self.faults.meet(call.session, call.to, at=f"{gateway.name}/{call.operation}")
        fault = met.fault
        call.fault = fault.kind if fault else ("latency" if met.latency else None)
        if gateway.down == "reset":
            exchange.connection.reset()
            await exchange.left()
            return
        if session is not None and session.habits.hangs:
            await exchange.leaves(None)
            return
        if fault is not None and fault.kind in BEFORE:
            answer = told(200, {})
            if fault.kind.startswith("http"):
                call.outcome, call.reason = "refused", f"fault {fault.kind}"
        else:
            try:
                answer = await asked.decide()
                call.outcome = "accepted"
            except Refused as error:
                call.outcome, call.reason, fault = "refused", str(error), None
                answer = error.answer
        if not (met.latency and await exchange.leaves(met.latency)):
            await _deliver(exchange, answer, fault, call)

    async def _give(self, exchange: Exchange, id: str) -> None:
        """A file of an incoming message, encrypted."""
        file = self.files.get(id)
        served = None if file is None else file.served
        if served is None:
            await exchange.write(Answer(410, b"", ()))
        else:
            await exchange.write(Answer(200, served, ((b"content-type", b"application/octet-stream"),)))


class _Request:
    """One request of one gateway, and what becomes of it."""

    def __init__(
        self,
        host: Baileys,
        exchange: Exchange,
        gateway: Gateway,
        found: Found,
        raw: bytes | bytearray,
        body: Any,
        call: BaileysCall,
    ) -> None:
        self._host = host
        self._exchange = exchange
        self._gateway = gateway
        self._found = found
        self._raw = raw
        self._body = body
        self._call = call
        self._dialect = gateway.plan.dialect
        self._message: Asked | WrongShape = WrongShape("nothing to send")

    def session_name(self) -> str | None:
        """Which session is meant: by the path, by the body, or because there is no other."""
        name = self._found.session
        if name is None and isinstance(self._body, dict):
            given = self._body.get("session", self._body.get("whatsappId"))
            name = None if given is None else str(given)
        if name is None and self._found.operation == "send":
            sessions = list(self._gateway.sessions.values())
            name = next((one.id for one in sessions if one.state == "open" or len(sessions) == 1), None)
        found = self._gateway.find(name or "")
        return name if found is None else found.id

    def note(self) -> None:
        """What a request to send says, in the journal."""
        if self._found.operation != "send":
            return
        content_type = self._exchange.header(b"content-type")
        try:
            asked = sends.asked(self._dialect, self._found.what, self._body, self._raw, content_type)
        except WrongShape as error:
            self._message = error
            return
        self._message, call = asked, self._call
        call.to, call.type, call.text, call.url = asked.to, asked.type, asked.text or None, asked.url
        call.size, call.sha256 = None if asked.data is None else len(asked.data), digest(asked.data)

    async def decide(self) -> Answer:
        """The answer. Raises Refused, which is an answer too."""
        gateway, found, dialect = self._gateway, self._found, self._dialect
        if gateway.down == "500":
            raise Refused(refusal(dialect, 500, "Internal server error"), "down")
        self._check_key()
        if found.operation == "elsewhere":
            raise Refused(refusal(dialect, 404, f"Cannot {self._call.method} {self._call.path}"), "no such path")
        if found.operation == "list":
            return told(200, [gateway.row(one) for one in gateway.sessions.values()])
        if found.operation == "health":
            if gateway.down == "unhealthy":
                raise Refused(told(503, {"status": "error"}), "unhealthy")
            return told(200, {"status": "ok", "message": "Welcome", "version": "2.3.6"})
        session = gateway.find(self._call.session or "")
        if session is None and dialect == "fazer" and found.operation == "start":
            session = self._connected_anew()
        if session is None:
            message = NO_SESSION.get(dialect, "ERR_NO_WAPP_FOUND").format(self._call.session)
            raise Refused(refusal(dialect, 404, message, list=[message]), "no such session")
        return await self._of(session)

    def _check_key(self) -> None:
        name = {"evolution": b"apikey", "waha": b"x-api-key", "fazer": b"x-api-key"}.get(self._dialect)
        given = self._exchange.token if name is None else self._exchange.header(name)
        if given:
            self._call.key = "right" if given == self._gateway.plan.api_key else "wrong"
        if self._call.key != "right" and (self._dialect, self._call.path) not in OPEN:
            message = NO_KEY.get(self._dialect, "ERR_SESSION_EXPIRED")
            raise Refused(refusal(self._dialect, 401, message), f"{self._call.key} key")

    async def _of(self, session: Session) -> Answer:
        """What is asked of a session, once it is proven who asks."""
        actions: dict[str, Callable[[Session], Answer | Awaitable[Answer]]] = {
            "state": self._state,
            "connect": self._connect,
            "qr": self._qr,
            "start": self._start,
            "stop": self._stop,
            "restart": self._restart,
            "logout": self._log_out,
            "reset": self._reset,
            "hook": self._hook,
            "set_hook": self._set_hook,
            "refresh_contact": self._refresh,
            "send": self._send,
            "read": self._read,
            "file": self._file,
        }
        try:
            answer = actions[self._found.operation](session)
            return answer if isinstance(answer, Answer) else await answer
        except WrongShape as error:
            raise Refused(refusal(self._dialect, 400, str(error), list=[str(error)]), str(error)) from error

    # The session

    def _state(self, session: Session) -> Answer:
        if self._dialect == "evolution":
            return told(200, {"instance": {"instanceName": session.id, "state": session.word}})
        return told(200, self._gateway.row(session))

    async def _connect(self, session: Session) -> Answer:
        """Evolution's: starts a session that is closed, and gives the code."""
        if session.state == "closed":
            session.start()
        try:
            async with asyncio.timeout(QR_WAIT):
                await session.settled.wait()
        except TimeoutError:
            pass  # the answer tells what there is by then
        if session.state == "open":
            return self._state(session)
        return self._qr(session)

    def _qr(self, session: Session) -> Answer:
        shown = session.qr()
        if self._dialect == "waha":
            if shown is None:
                raise self._away(session, "SCAN_QR_CODE")
            if "application/json" in self._exchange.header(b"accept"):
                return told(200, {"mimetype": "image/png", "data": base64.b64encode(shown[1]).decode()})
            return Answer(200, shown[1], ((b"content-type", b"image/png"),))
        if shown is None:
            return told(200, {"pairingCode": None, "count": 0})
        picture = "data:image/png;base64," + base64.b64encode(shown[1]).decode()
        return told(200, {"pairingCode": None, "code": shown[0], "base64": picture, "count": 1})

    def _start(self, session: Session) -> Answer:
        if self._dialect == "fazer":
            self._rehooked(session)
        session.start()
        return self._done(session, "Starting session.")

    def _stop(self, session: Session) -> Answer:
        session.stop()
        return self._done(session, "Session disconnected.")

    def _restart(self, session: Session) -> Answer:
        if self._dialect == "evolution" and session.state == "closed":
            message = f'The "{session.id}" instance is not connected'
            raise Refused(refusal("evolution", 400, message, list=[message]), "closed")
        session.restart()
        return self._done(session, "Session restarting.")

    def _log_out(self, session: Session) -> Answer:
        if self._dialect == "evolution" and session.state == "closed":
            message = f'The "{session.id}" instance is not connected'
            raise Refused(refusal("evolution", 400, message, list=[message]), "closed")
        session.log_out()
        return self._done(session, "Session disconnected.")

    def _reset(self, session: Session) -> Answer:
        """What blanks a stored session: a new code is needed."""
        session.log_out()
        session.start()
        return self._done(session, "Session reset.")

    def _done(self, session: Session, message: str) -> Answer:
        match self._dialect:
            case "evolution":
                if self._found.operation in ("logout", "reset"):
                    return told(
                        200, {"status": "SUCCESS", "error": False, "response": {"message": "Instance logged out"}}
                    )
                return told(200, {"instance": {"instanceName": session.id, "state": session.word}})
            case "waha":
                return told(201, self._gateway.row(session))
            case "fazer":
                return Answer(200, b"", ())
        return told(200, {"message": message})

    def _refresh(self, session: Session) -> Answer:
        if session.state != "open":
            raise self._away(session, "WORKING")
        session.keys.refresh((self._found.jid or "").replace("@c.us", "@s.whatsapp.net"))
        return told(200, {"message": "Contact session refreshed."})

    def _away(self, session: Session, expected: str) -> Refused:
        """The session is not as the request needs it."""
        match self._dialect:
            case "evolution":
                answer = refusal("evolution", 400, "Error: Connection Closed", list=["Error: Connection Closed"])
            case "waha":
                message = "Session status is not as expected. Try again later or restart the session"
                more = {"session": session.id, "status": session.word, "expected": [expected]}
                answer = refusal("waha", 422, message, **more)
            case "fazer":
                answer = refusal("fazer", 404, "Phone number not connected")
            case _:
                answer = refusal(self._dialect, 400, "ERR_WAPP_NOT_INITIALIZED")
        return Refused(answer, "not connected")

    # Webhooks

    def _hook(self, session: Session) -> Answer:
        url = self._gateway.hooks.get(session.id)
        told_ = None if url is None else {"id": "hook-1", "url": url, "enabled": True, "events": [], "headers": None}
        return told(200, told_)

    def _set_hook(self, session: Session) -> Answer:
        body = self._body if isinstance(self._body, dict) else {}
        if self._dialect == "waha":
            hooks = body.get("config", {}).get("webhooks", [])
            self._gateway.hooks[session.id] = hooks[0]["url"] if hooks else None
            return told(200, self._gateway.row(session))
        hook = body.get("webhook", body)
        if not isinstance(hook, dict) or not isinstance(hook.get("url"), str):
            raise WrongShape("no url")
        self._gateway.hooks[session.id] = hook["url"] if hook.get("enabled", True) else None
        return told(201, {"webhook": {"instanceName": session.id, "webhook": hook}})

    def _rehooked(self, session: Session) -> None:
        """fazer-ai's connect tells where webhooks go, and its token."""
        body = self._body if isinstance(self._body, dict) else {}
        if isinstance(body.get("webhookUrl"), str):
            self._gateway.hooks[session.id] = body["webhookUrl"]
            token = body.get("webhookVerifyToken")
            session.plan = msgspec.structs.replace(session.plan, verify_token=token if isinstance(token, str) else None)

    def _connected_anew(self) -> Session | None:
        """A number that fazer-ai has not seen yet gets a session of its own."""
        name = self._call.session or ""
        digits = name.removeprefix("+")
        if not name.startswith("+") or not digits.isdecimal():
            return None
        return self._gateway.add(BaileysSession(name, number=digits, paired=False, open=False))

    # Messages

    def _send(self, session: Session) -> Answer:
        asked = self._message
        if isinstance(asked, WrongShape):
            raise asked
        if session.state != "open":
            raise self._away(session, "WORKING")
        if asked.to.startswith(NOBODY):
            number = asked.to.partition("@")[0]
            nobody: JSON = {"jid": asked.to, "exists": False, "number": number}
            raise Refused(
                refusal(self._dialect, 400, "The number is not on WhatsApp", list=[nobody]), "not on WhatsApp"
            )
        content = asked.content()
        key = self._gateway.sent(session, asked.to, content)
        self._call.id = key["id"]
        rule = self._gateway.rules.answer_id
        with_id = self._dialect not in ("whaticket", "ticketz") if rule is None else rule
        return sends.answered(self._gateway.who(session), key, content, with_id=with_id)

    def _read(self, session: Session) -> Answer:
        keys = sends.read_keys(self._dialect, self._body)
        self._call.to, self._call.id = keys[0].get("remoteJid"), keys[0].get("id")
        if session.state != "open":
            raise self._away(session, "WORKING")
        return told(201 if self._dialect != "fazer" else 200, {"message": "Read messages", "read": "success"})

    def _file(self, session: Session) -> Answer:
        """A file that WAHA has decrypted already."""
        file = self._host.files.get(self._found.what)
        if file is None:
            raise Refused(refusal(self._dialect, 404, "Not found"), "no such file")
        return Answer(200, b"".join(file.content.chunks()), ((b"content-type", file.mime_type.encode()),))


def _decoded(raw: bytes | bytearray) -> Any:
    try:
        return msgspec.json.decode(raw) if raw else None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


async def _deliver(exchange: Exchange, answer: Answer, fault: SetBaileysFault | None, call: BaileysCall) -> None:
    kind = fault.kind if fault else ""
    if fault is not None and (kind.startswith(("hang", "reset")) or kind == "drip"):
        await exchange.deliver(answer, fault, kind, call)
    else:
        await exchange.deliver(answer if fault is None else instead(fault, answer), None, "", call)
