"""One host of the simulated MegaAPI: `/rest/…` as megaapi.md describes it.

It is told what to do by `sandbox.megaapi_control`, and keeps its own truth of what it was asked in `MegaApi.calls`.
What the sheet leaves open is a rule (`sandbox.megaapi_hooks.MegaRules`), so that a client can be shown both.
"""

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from random import SystemRandom
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import httpx
import msgspec
from starlette.types import Receive, Scope, Send

from sandbox import megaapi_shape as shape
from sandbox import megaapi_words as words
from sandbox.answers import Answer, Exchange
from sandbox.config import ConfigError, ConfigFile
from sandbox.faults import AnyMet
from sandbox.files import Content, Given
from sandbox.megaapi_calls import MegaCall, MegaCalls
from sandbox.megaapi_faults import BEFORE, HTML_TYPE, JSON_TYPE, MegaFaults, SetMegaFault, blocked, failed, instead
from sandbox.megaapi_faults import refused as refusal
from sandbox.megaapi_faults import told as telling
from sandbox.megaapi_files import MegaFiles, Sent, in_base64
from sandbox.megaapi_hooks import GIVE_UP, Hooks, MegaRules, Outgoing
from sandbox.megaapi_instances import Instance, Instances
from sandbox.megaapi_shape import WrongShape
from sandbox.meta import JSON
from sandbox.rules import wa_id
from sandbox.sender import Sender

PREFIX = "/rest/"
MAX_BODY = 140 * 2**20  # bytes; a file of 100 MB in base64
MAX_FETCHED = 100 * 2**20  # bytes of a `mediaUrl`
FETCH = 10.0  # seconds
HUGE_BASE64 = 2**30  # bytes more
NOBODY = "000"  # how numbers begin that are on no WhatsApp
_AFTER = ("html502_after", "error_true_after", "garbage", "empty")  # done, and answered otherwise

_ROUTES = [
    (place, method, re.compile(pattern), action)
    for place, method, pattern, action in (
        ("list", "GET", r"/rest/instance/list", "list"),
        ("qr", "GET", r"/rest/instance/qrcode/(?P<key>[^/]+)", "page"),
        ("qr", "GET", r"/rest/instance/qrcode_base64/(?P<key>[^/]+)", "qr"),
        ("number", "GET", r"/rest/instance/isOnWhatsApp/(?P<key>[^/]+)", "number"),
        ("media", "POST", r"/rest/instance/downloadMediaMessage/(?P<key>[^/]+)", "media"),
        ("session", "DELETE", r"/rest/instance/(?P<key>[^/]+)/(?P<what>restart|logout)", "session"),
        ("status", "GET", r"/rest/instance/(?P<key>[^/]+)", "status"),
        ("webhook", "GET", r"/rest/webhook/(?P<key>[^/]+)", "webhook"),
        ("webhook", "POST", r"/rest/webhook/(?P<key>[^/]+)/configWebhook", "configure"),
        ("send", "POST", rf"/rest/sendMessage/(?P<key>[^/]+)/(?P<what>{'|'.join(shape.PATHS)})", "send"),
        ("read", "POST", r"/rest/chat/(?P<key>[^/]+)/readMessage", "read"),
    )
]


class Found(NamedTuple):
    """What a path asks for. `what` is its last part where there is a choice."""

    place: str
    method: str
    action: str
    key: str | None = None
    what: str = ""


class Refused(Exception):
    """The request is not served; the answer says so, and the journal why."""

    def __init__(self, answer: Answer, reason: str) -> None:
        super().__init__(reason)
        self.answer = answer


class Reply(NamedTuple):
    """An answer; `file` is given in its `data`, `message` is what webhooks tell of."""

    answer: Answer
    file: Sent | None = None
    message: Outgoing | None = None


class MegaApi:
    """The host for the instances of one configuration. Webhooks go out while `running` is entered."""

    def __init__(self, config: ConfigFile) -> None:
        self.instances = Instances()
        self.faults = MegaFaults()
        self.calls = MegaCalls()
        self.files = MegaFiles()
        self.hooks: Hooks  # made in `running`: it needs the loop
        self.flapping: dict[str, asyncio.Task[None]] = {}
        self._file = config
        self._host_token: str | None = None
        self._random = SystemRandom()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with Sender(give_up_after=GIVE_UP) as sender:
            self.hooks = Hooks(sender)
            task = asyncio.create_task(self.hooks.run())
            try:
                yield
            finally:
                tasks = [task, *self.flapping.values()]
                for one in tasks:
                    one.cancel()
                for one in tasks:
                    with suppress(asyncio.CancelledError):
                        await one

    def is_asked(self, path: str) -> bool:
        """Whether `serve` answers requests for this path."""
        return path.startswith(PREFIX)

    def configure(self) -> None:
        """Read the configuration again if it has changed; one that cannot be read changes nothing."""
        try:
            config = self._file.read()
        except ConfigError:
            return  # `GET /health` says what is wrong with it
        self._host_token = config.megaapi.host_token
        self.instances.configure(config)

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.configure()
        exchange = Exchange(scope, receive, send)
        found = _found(scope["method"], scope["path"])
        head = (found.place, scope["method"], scope["path"], exchange.header(b"user-agent"))
        with self.calls.call(exchange.connection.is_gone, *head) as call:
            call.instance = found.key
            call.token = self._token(exchange, found.key)
            raw = await exchange.read(MAX_BODY)
            if raw is not None:
                await self._serve(exchange, found, raw, call)

    async def _serve(self, exchange: Exchange, found: Found, raw: bytes | bytearray, call: MegaCall) -> None:
        body = _decoded(raw)
        _note(call, found, raw, body)
        met: AnyMet[SetMegaFault] = self.faults.meet(found.key, call.to, at=found.place)
        fault = met.fault
        call.fault = fault.kind if fault else ("latency" if met.latency else None)
        reply: Reply
        if fault is not None and fault.kind in BEFORE:
            reply = Reply(telling(200, {}))
            if fault.kind == "error_true" or fault.kind.startswith("http"):
                call.outcome, call.reason = "refused", f"fault {fault.kind}"
        else:
            try:
                reply = await self._decide(exchange, found, raw, body, call, fault)
                call.outcome = "accepted"
            except Refused as error:
                call.outcome, call.reason = "refused", str(error)
                reply, fault = Reply(error.answer), None  # what the host itself refuses is answered plainly
        message = reply.message
        if message is not None:
            await self.hooks.before(message)
            if fault is not None and fault.kind.startswith(("hang", "reset")):
                self.hooks.after(message)  # there will be no answer that they could come after
                message = None
        try:
            if not (met.latency and await exchange.leaves(met.latency)):
                await self._answer(exchange, reply, fault, call)
        finally:
            if message is not None:
                self.hooks.after(message)

    async def _answer(self, exchange: Exchange, reply: Reply, fault: SetMegaFault | None, call: MegaCall) -> None:
        kind = fault.kind if fault else ""
        if kind.startswith(("hang", "reset")) or (kind == "drip" and reply.file is None):
            await exchange.deliver(reply.answer, fault, kind, call)
        elif fault is not None and (kind in BEFORE or kind in _AFTER):
            await exchange.deliver(instead(fault, reply.answer, call.place), None, "", call)
        elif reply.file is not None:
            await _give(exchange, reply.file, fault, call)
        else:
            answer = reply.answer if fault is None else instead(fault, reply.answer, call.place)
            await exchange.deliver(answer, None, "", call)

    # What is asked

    async def _decide(
        self,
        exchange: Exchange,
        found: Found,
        raw: bytes | bytearray,
        body: Any,
        call: MegaCall,
        fault: SetMegaFault | None,
    ) -> Reply:
        """The answer. Raises Refused, which is an answer too."""
        if not call.user_agent or call.user_agent.startswith("Python-urllib/"):
            raise Refused(blocked(), "user agent")
        if call.token == "none":  # noqa: S105 - a word, not a token
            raise Refused(refusal(401, "Unauthorized"), "no token")
        if found.action == "nothing":
            raise Refused(refusal(404, f"Cannot {call.method} {urlsplit(call.path).path}"), "no such path")
        if found.action == "list":
            if call.token != "host":  # noqa: S105 - likewise
                raise Refused(refusal(401, "Unauthorized"), "wrong token")
            _check_method(found, call)
            return self._list()
        instance = self.instances.get(found.key or "")
        if instance is None:
            message = {"error": True, "message": "Instance not found"}
            raise Refused(telling(404, message), "no such instance")
        if call.token == "wrong":  # noqa: S105 - likewise
            raise Refused(refusal(401, "Unauthorized"), "wrong token")
        _check_method(found, call)
        if len(raw) > MAX_BODY:
            raise Refused(refusal(413, "request entity too large"), "too large")
        try:
            return await self._do(exchange, found, instance, body, call, fault)
        except WrongShape as error:
            raise Refused(refusal(400, "Bad Request"), str(error)) from error

    async def _do(
        self,
        exchange: Exchange,
        found: Found,
        instance: Instance,
        body: Any,
        call: MegaCall,
        fault: SetMegaFault | None,
    ) -> Reply:
        """What is asked of an instance, once it is proven who asks. Raises WrongShape and Refused."""
        match found.action:
            case "status":
                return Reply(telling(200, _status(instance, fault)))
            case "page":
                return Reply(_page(instance))
            case "qr":
                return Reply(_qr(instance))
            case "number":
                return Reply(telling(200, _on_whatsapp(exchange.query, self.hooks.rules.of(instance.key))))
            case "session":
                return self._session(instance, found.what)
            case "webhook":
                return Reply(self._webhook(instance))
            case "configure":
                data = shape.webhook_data(body)
                instance.webhook_url = data["webhookUrl"] or None
                instance.webhook_enabled = data["webhookEnabled"]
                return Reply(telling(200, {"error": False, "message": "Webhook updated"}))
            case "read":
                key = shape.read_key(body)
                call.to, call.id = key["remoteJid"], key["id"]
                self._must_be_connected(instance)
                return Reply(telling(200, {"error": False, "message": "Message read"}))
            case "media":
                return self._media(body, call)
        return await self._send(instance, found.what, body, call)

    def _token(self, exchange: Exchange, key: str | None) -> Any:
        """Whose token the request has brought."""
        token = exchange.token
        if not token:
            return "none"
        if token == self._host_token:
            return "host"
        instance = self.instances.get(key or "")
        return "instance" if instance is not None and token == instance.token else "wrong"

    def _must_be_connected(self, instance: Instance) -> None:
        offline = self.hooks.rules.of(instance.key).offline
        if instance.is_connected or offline == "accept":
            return
        match offline:
            case "error_true":
                answer = failed("Instance is not connected")
            case "http400":
                answer = telling(400, {"error": True, "message": "Instance is not connected"})
            case _:
                answer = refusal(404, "Instance not found")
        raise Refused(answer, "not connected")

    def _list(self) -> Reply:
        entries = []
        for instance in self.instances:
            fault = self.faults.meet(instance.key, None, at="entry").fault
            if fault is None or fault.kind != "absent":
                entries.append(_status(instance, fault)["instance"])
        counts = {"createdInstances": len(self.instances), "maxNumberInstances": 5_000}
        return Reply(telling(200, {"error": False, "message": "All instances", **counts, "instances": entries}))

    def _session(self, instance: Instance, what: str) -> Reply:
        if what == "logout":
            was_connected = instance.is_connected
            instance.log_out()
            if was_connected:
                self.hooks.connection(instance)
            return Reply(telling(200, {"error": False, "message": "Logout successful"}))
        if instance.paired and instance.becomes(self.hooks.rules.of(instance.key).restart):
            self.hooks.connection(instance)
        return Reply(telling(200, {"error": False, "message": "Instance restarted"}))

    def _webhook(self, instance: Instance) -> Answer:
        config = {"webhookUrl": instance.webhook_url or "", "webhookEnabled": instance.webhook_enabled}
        name = self.hooks.rules.of(instance.key).webhook_answer
        told = config if name == "flat" else {name: config}
        return telling(200, {"error": False, "message": "Webhook data", **told})

    def _media(self, body: Any, call: MegaCall) -> Reply:
        keys = shape.media_keys(body)
        call.type = keys["messageType"]
        sent = self.files.get(keys)
        if sent is None:
            raise Refused(failed("Failed to download the media", data=""), "no such file")
        call.size, call.sha256 = sent.content.size, sent.content.digest.hex()
        return Reply(telling(200, {}), file=sent)

    # Sending

    async def _send(self, instance: Instance, path: str, body: Any, call: MegaCall) -> Reply:
        data = shape.message_data(body, path)
        given = shape.file_of(data) if path == "mediaBase64" else None
        self._must_be_connected(instance)
        rules = self.hooks.rules.of(instance.key)
        if data["to"].startswith(NOBODY):
            raise Refused(failed("The number is not on WhatsApp"), "not on WhatsApp")
        if path == "mediaUrl" and rules.fetch_urls:
            given = await _fetched(data["url"])
        file = None
        if path in ("mediaUrl", "mediaBase64"):
            file = self.files.add(Given(given or b""), data["mimeType"], data["type"], data["fileName"])
            if given is not None:
                call.size, call.sha256 = len(given), file.content.digest.hex()
        call.id = words.new_id()
        self.calls.sent(call)
        chat = _chat(data["to"], rules)
        key = words.key(call.id, chat, from_me=True, lids=rules.lid)
        type, content = _content(path, data, file)
        value: JSON = {"error": False, "message": "Message sent", "messageData": {"status": "PENDING"}}
        if rules.answer_id:
            now = str(int(time.time()))
            answered = {"key": words.key(call.id, chat, from_me=True), "message": content, "messageTimestamp": now}
            value["messageData"] = answered | value["messageData"]
        return Reply(telling(200, value), message=Outgoing(instance, key, type, content))


# Requests


def _found(method: str, path: str) -> Found:
    """The route of a path; if none has this method too, one that has another."""
    other = Found("elsewhere", method, "nothing")
    for place, needed, pattern, action in _ROUTES:
        matched = pattern.fullmatch(path)
        if matched is not None:
            parts = matched.groupdict()
            found = Found(place, needed, action, parts.get("key"), parts.get("what") or "")
            if needed == method:
                return found
            other = other if other.action != "nothing" else found
    return other


def _check_method(found: Found, call: MegaCall) -> None:
    if found.method != call.method:
        raise Refused(refusal(400, "Bad Request"), f"method {call.method}")


def _decoded(raw: bytes | bytearray) -> Any:
    try:
        return msgspec.json.decode(raw) if raw else None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _note(call: MegaCall, found: Found, raw: bytes | bytearray, body: Any) -> None:
    """What a request says, well-formed or not, in the journal."""
    if raw:
        call.digest = hashlib.sha256(raw).hexdigest()
    data = body.get("messageData") if isinstance(body, dict) else None
    if not isinstance(data, dict):
        return
    call.to = _string(data.get("to"))
    call.text = _string(data.get("text")) or _string(data.get("caption"))
    call.url = _string(data.get("url")) or _string(data.get("webhookUrl"))
    call.type = _string(data.get("type")) or found.what or None


def _string(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _chat(to: str, rules: MegaRules) -> str:
    """Under which name WhatsApp knows the recipient."""
    digits, _, server = to.partition("@")
    return f"{wa_id(digits, rules.drop_ninth_digit)}@{server}" if server == "s.whatsapp.net" else to


async def _fetched(url: str) -> bytes:
    """The file behind a link, as the gateway gets it."""
    so_far = bytearray()
    try:
        async with httpx.AsyncClient(timeout=FETCH, trust_env=False) as http, http.stream("GET", url) as response:
            response.raise_for_status()
            async for chunk in response.aiter_bytes():
                so_far += chunk
                if len(so_far) > MAX_FETCHED:
                    raise Refused(failed("The file is too large"), "file too large")
    except httpx.HTTPError as error:
        raise Refused(failed("Could not get the file"), "file not there") from error
    return bytes(so_far)


# Answers


def _status(instance: Instance, fault: SetMegaFault | None) -> JSON:
    told: JSON = {"error": False, "message": "Instance data fetched", "instance": instance.told()}
    match fault.kind if fault else "":
        case "missing_status":
            del told["instance"]["status"]
        case "unknown_word":
            told["instance"]["status"] = fault.word if fault else ""
        case "missing_instance":
            del told["instance"]
    return told


def _page(instance: Instance) -> Answer:
    shown = (
        "<p>User is already logged in</p>" if instance.is_connected else f'<img src="{_png(instance)}" alt="qrcode">'
    )
    page = f"<!DOCTYPE html><html><head><title>QRCode</title></head><body>{shown}</body></html>"
    return Answer(200, page.encode(), (HTML_TYPE,))


def _qr(instance: Instance) -> Answer:
    if instance.is_connected:
        return failed("User is already logged in")
    return telling(200, {"error": False, "message": "QR code generated", "qrcode": _png(instance)})


def _png(instance: Instance) -> str:
    return "data:image/png;base64," + b"".join(in_base64(Given(instance.qr()))).decode()


def _on_whatsapp(query: str, rules: MegaRules) -> JSON:
    jid = parse_qs(query).get("jid", [""])[-1]
    if not jid.endswith("@s.whatsapp.net") or not shape.JID.fullmatch(jid):
        raise WrongShape("jid is no JID of a person")
    exists = not jid.startswith(NOBODY)
    return {"exists": exists, "jid": _chat(jid, rules)} if exists else {"exists": False}


def _content(path: str, data: JSON, file: Sent | None) -> tuple[str, JSON]:
    """`messageType` and `message` of what was asked to be sent."""
    now = int(time.time())
    content: JSON
    match path:
        case "text":
            content = {"extendedTextMessage": {"text": data["text"]}}
        case "quoteMessage":
            quoted = data["key"]
            who = quoted.get("participant") or quoted["remoteJid"]
            context = {"stanzaId": quoted["id"], "participant": who, "quotedMessage": data["message"]}
            content = {"extendedTextMessage": {"text": data["text"], "contextInfo": context}}
        case "location":
            place = {"degreesLatitude": data["latitude"], "degreesLongitude": data["longitude"]}
            content = {"locationMessage": place | {"name": data.get("caption", ""), "address": data.get("address", "")}}
        case "contactMessage":
            card = data["vcard"]
            digits = re.sub(r"\D", "", card["phoneNumber"])
            lines = ["BEGIN:VCARD", "VERSION:3.0", f"FN:{card['fullName']}", f"ORG:{card.get('organization', '')};"]
            lines += [f"TEL;type=CELL;type=VOICE;waid={digits}:{card['phoneNumber']}", "END:VCARD"]
            content = {"contactMessage": {"displayName": card["displayName"], "vcard": "\n".join(lines)}}
        case _:
            media = file.told(now) if file else {}
            content = {f"{data['type']}Message": media | ({"caption": data["caption"]} if data.get("caption") else {})}
    return next(iter(content)), content


# Files


class Plan(NamedTuple):
    """How the JSON with a file is sent: pieces, and how many bytes they are; None for no Content-Length."""

    pieces: Iterator[bytes]
    length: int | None


async def _give(exchange: Exchange, file: Sent, fault: SetMegaFault | None, call: MegaCall) -> None:
    """The answer with a file, in pieces, however large; or what a fault makes of it."""
    kind = fault.kind if fault else ""
    plan = _plan(file, kind, fault)
    stop = None
    if fault is not None and kind in ("close", "stall"):
        stop = (plan.length or 0) // 2 if fault.bytes is None else fault.bytes
    every = fault.ms / 1000 if fault is not None and kind == "drip" else None
    length = () if plan.length is None else ((b"content-length", str(plan.length).encode()),)
    call.http = 200
    await exchange.start(200, (JSON_TYPE, *length))
    sent = 0
    for piece in plan.pieces:
        rest = piece if stop is None else piece[: stop - sent]
        if every is None:
            await exchange.more(rest)
        elif not await _dripped(exchange, rest, every, fault.bytes if fault and fault.bytes else 1):
            return
        sent += len(rest)
        if exchange.connection.is_gone():
            return
        if stop is not None and sent >= stop:
            break
    if kind == "stall":
        await exchange.leaves(None)
    elif kind == "close":
        exchange.connection.close()
        await exchange.left()
    else:
        await exchange.more(b"", is_last=True)
        call.answered = True


async def _dripped(exchange: Exchange, piece: bytes, every: float, together: int) -> bool:
    for start in range(0, len(piece), together):
        if await exchange.leaves(every):
            return False
        await exchange.more(piece[start : start + together])
    return True


def _plan(file: Sent, kind: str, fault: SetMegaFault | None) -> Plan:
    content: Content = file.content
    if kind == "wrong_hash":
        data = bytearray(b"".join(content.chunks()))
        data[-1] ^= 1
        content = Given(bytes(data))
    elif kind == "truncated":
        content = Given(b"".join(content.chunks())[: content.size // 2])
    prefix = f"data:{'text/html' if kind == 'wrong_mime' else file.mime_type};base64,"
    head = b'{"error":false,"message":"Media downloaded","data":"' + (b"" if kind == "no_prefix" else prefix.encode())
    size = (content.size + 2) // 3 * 4
    if kind == "slashes":
        whole = (head + b"".join(in_base64(content))).replace(b"/", b"\\/") + b'"}'
        return Plan(iter((whole,)), len(whole))
    if kind == "bad_base64":
        text = b"".join(in_base64(content))
        whole = head + text[: size // 2] + b"*" + text[size // 2 + 1 :] + b'"}'
        return Plan(iter((whole,)), len(whole))
    if kind == "huge_base64":
        more = HUGE_BASE64 if fault is None or fault.bytes is None else fault.bytes
        return Plan(_endless(head, content, more), None)
    return Plan(_pieces(head, content), len(head) + size + 2)


def _pieces(head: bytes, content: Content) -> Iterator[bytes]:
    yield head
    yield from in_base64(content)
    yield b'"}'


def _endless(head: bytes, content: Content, more: int) -> Iterator[bytes]:
    yield head
    # No padding in the middle: what follows belongs to the same file.
    yield b"".join(in_base64(content)).replace(b"=", b"A")
    chunk = b"QUJD" * 2**14
    for _ in range(-(-more // len(chunk))):
        yield chunk
    yield b'"}'
