"""The sending side of the simulated Meta: Graph's `/{version}/{phone_number_id}/messages` and the list of templates.

`Graph` answers them as whatsapp-cloud-api.md §9, §13 and §16 say, under the rules and with the faults that a test has
set, and keeps its own truth of what it accepted in `Graph.calls`. It needs `Protocol` on the connection, which can end
one without an answer.
"""

import asyncio
import base64
import binascii
import gzip
import hashlib
import os
import re
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import SystemRandom
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlencode
from zlib import crc32

import msgspec
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sandbox import meta, shape
from sandbox.calls import Call, Calls
from sandbox.config import App, Channel, Config, ConfigError, ConfigFile, Template
from sandbox.faults import BEFORE, Faults, SetFault
from sandbox.graph_errors import GraphError, no_such_object, refusal
from sandbox.meta import JSON
from sandbox.rules import Limits, RuleBook, Rules, wa_id
from sandbox.sender import Sender
from sandbox.statuses import Accepted, Statuses

PATH = re.compile(r"/v[0-9]+\.[0-9]+/([^/]+)/(messages|message_templates)/?")
MAX_BODY = 2**20  # bytes
HUGE = 2 * 2**20  # bytes of an answer nobody should read to its end
_CONNECTION = "sandbox.connection"
_NOT_JSON = b'{"messaging_product":"whatsapp","contacts":[{"inp'
_HTML = b"<!DOCTYPE html><html><head><title>Error</title></head><body>Sorry, something went wrong.</body></html>"
_JSON_TYPE = (b"content-type", b"application/json; charset=UTF-8")
_HTML_TYPE = (b"content-type", b"text/html; charset=utf-8")


class Protocol(HttpToolsProtocol):
    """uvicorn's, with a way to end the connection under a request: the request finds it in its scope."""

    held = False  # a fault keeps the request waiting, so a shutdown need not

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {_CONNECTION: self}  # type: ignore[dict-item] # ours, not one of ASGI's

    def is_gone(self) -> bool:
        return self.transport.is_closing()

    def reset(self) -> None:
        """End it with a TCP RST: what was written but not sent yet is lost."""
        # Through a descriptor of our own, since uvloop does not hand out one that can be set.
        with socket.socket(fileno=os.dup(self.transport.get_extra_info("socket").fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def shutdown(self) -> None:
        if self.held:
            self.transport.abort()
        else:
            super().shutdown()


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = (_JSON_TYPE,)


_NOTHING = Answer(200, b"")
_NO_TOKEN = refusal(190, title="An access token is required to request this resource.")


class Asked(NamedTuple):
    """A request to send."""

    id: str
    raw: bytes
    body: Any  # decoded; None when it is no JSON
    token: str | None
    known: tuple[App, Channel] | None


class Graph:
    """Graph for the channels of one configuration. Statuses go out while `running` is entered."""

    def __init__(self, config: ConfigFile, sender: Sender) -> None:
        self.rules = RuleBook()
        self.limits = Limits()
        self.faults = Faults()
        self.calls = Calls()
        self.statuses = Statuses(sender)
        self._file = config
        self._config: Config | None = None
        self._numbers: dict[str, tuple[App, Channel]] = {}
        self._rng = SystemRandom()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.statuses.run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def serve(self, id: str, edge: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request for what PATH has found."""
        method = scope["method"]
        if edge == "messages" and method == "POST":
            await self._messages(id, scope, receive, send)
        elif edge == "message_templates" and method == "GET":
            await _write(send, self._templates(id, scope))
        else:
            await _write(send, _refusal(no_such_object(method.lower(), id)))

    # Messages

    async def _messages(self, id: str, scope: Scope, receive: Receive, send: Send) -> None:
        raw = await _read(receive)
        if raw is None:
            return
        connection: Protocol = scope["extensions"][_CONNECTION]
        try:
            body = msgspec.json.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            body = None
        asked = Asked(id, raw, body, _token(scope), self._all().get(id))
        call = self._begin(connection, asked)
        try:
            met = self.faults.meet(call.channel, call.to)
            call.fault = met.fault.kind if met.fault else ("latency" if met.latency else None)
            answer = self._decide(call, asked, met.fault)
            if met.latency and await _leaves(connection, receive, met.latency):
                return
            await self._deliver(call, met.fault, answer, connection, receive, send)
        finally:
            self.calls.end(call)

    def _begin(self, connection: Protocol, asked: Asked) -> Call:
        given: JSON = asked.body if isinstance(asked.body, dict) else {}
        text = given.get("text")
        return self.calls.begin(
            connection.is_gone,
            phone_number_id=asked.id,
            channel=asked.known[1].name if asked.known else None,
            to=_string(given.get("to")) or _string(given.get("recipient")),
            type="read" if shape.is_read(given) else _string(given.get("type")),
            text=_string(text.get("body")) if isinstance(text, dict) else None,
            callback=_string(given.get("biz_opaque_callback_data")),
            body_hash=hashlib.sha256(asked.raw).hexdigest(),
        )

    def _decide(self, call: Call, asked: Asked, fault: SetFault | None) -> Answer:
        """Accept or refuse, and write that down; nothing is decided when a fault comes before."""
        if fault is not None and fault.kind in BEFORE:
            if fault.kind != "code":
                return _NOTHING
            code = 131000 if fault.code is None else fault.code
            error = refusal(code, fault.details or "", http=fault.http, subcode=fault.subcode)
            self.calls.refused(call, code)
            return _refusal(error, fault.retry_after)
        if asked.known is None:
            return self._refuse(call, no_such_object("post", asked.id) if asked.token else _NO_TOKEN)
        wrong = self._wrong(asked.known[1], asked)
        if wrong is not None:
            return self._refuse(call, wrong)
        if shape.is_read(asked.body):
            self.calls.accepted(call, None)
            return Answer(200, b'{"success":true}')
        return self._accept(call, *asked.known, asked.body, fault)

    def _refuse(self, call: Call, wrong: GraphError) -> Answer:
        self.calls.refused(call, wrong.code, by_rate=wrong.code == 130429)
        return _refusal(wrong)

    def _wrong(self, channel: Channel, asked: Asked) -> GraphError | None:
        rules = self.rules.of(channel.name)
        expected = channel.access_token if rules.access_token is None else rules.access_token
        if not asked.token:
            return _NO_TOKEN
        if expected is not None and asked.token != expected:
            return refusal(190)
        if len(asked.raw) > MAX_BODY:
            return refusal(1, title="Please reduce the amount of data you're asking for", http=413)
        wrong = shape.wrong_envelope(asked.body)
        if wrong is not None:
            return wrong
        if shape.is_read(asked.body):
            return shape.wrong_read(asked.body)
        return shape.wrong_message(asked.body) or self._against_rules(channel, rules, asked.body)

    def _against_rules(self, channel: Channel, rules: Rules, body: JSON) -> GraphError | None:
        customer = _customer(body, rules)
        if customer == channel.display_phone_number:
            return refusal(131021)
        user = meta.user_id(customer)
        if body.get("type") == "template":
            error = _wrong_template(channel, body)
            if error is not None:
                return error
        elif rules.window and not self.limits.is_open(channel.phone_number_id, user):
            return refusal(131047, "More than 24 hours have passed since the customer last replied to this number")
        if rules.rate is not None and not self.limits.take_rate(channel.phone_number_id, rules.rate):
            return refusal(130429, "Cloud API message throughput has been reached")
        if rules.pair and not self.limits.take_pair(channel.phone_number_id, user):
            return refusal(131056, "Too many messages sent from this number to the same customer in a short time")
        return None

    def _accept(self, call: Call, app: App, channel: Channel, body: JSON, fault: SetFault | None) -> Answer:
        rules = self.rules.of(channel.name)
        customer = _customer(body, rules)
        user = meta.user_id(customer)
        wamid = meta.new_wamid(self._rng, customer, outgoing=True)
        self.calls.accepted(call, wamid)
        message = Accepted(app, channel.number, wamid, customer, call.callback, _category(channel, body))
        if fault is not None and fault.kind == "failed_status":
            self.statuses.fail(message, 131026 if fault.code is None else fault.code, rules.statuses)
        elif shape.BSUID.fullmatch(body.get("to") or "") is None:  # a BSUID in `to` is never heard of again (§5)
            self.statuses.expect(message, rules.statuses)
        contact = {"input": call.to, "user_id": user}
        if customer != user:
            contact = {"input": call.to, "wa_id": customer, "user_id": user}
        sent = {"id": wamid}
        if body.get("type") == "template":
            sent["message_status"] = "accepted"
        value = {"messaging_product": "whatsapp", "contacts": [contact], "messages": [sent]}
        return Answer(200, msgspec.json.encode(value))

    async def _deliver(
        self,
        call: Call,
        fault: SetFault | None,
        answer: Answer,
        connection: Protocol,
        receive: Receive,
        send: Send,
    ) -> None:
        """Answer as the fault says; a call that Graph itself refused is answered plainly."""
        if fault is not None and call.outcome != "refused":
            if fault.kind in ("hang_before", "hang_after"):
                await _leaves(connection, receive, None)
                return
            if fault.kind in ("reset_before", "reset_after"):
                connection.reset()
                await _left(receive)
                return
            if fault.kind == "drip":
                call.http = answer.status
                call.answered = await _drip(connection, receive, send, answer, fault.ms / 1000)
                return
            answer = _spoilt(fault, answer)
        if not connection.is_gone():
            call.http = answer.status
            await _write(send, answer)
            call.answered = True

    # Templates

    def _templates(self, id: str, scope: Scope) -> Answer:
        channels = [channel for _, channel in self._all().values() if channel.waba_id == id]
        fault = self.faults.meet(channels[0].name if channels else None, None, only="outage").fault
        if fault is not None:
            return _spoilt(fault, _NOTHING)
        token = _token(scope)
        if not token:
            return _refusal(_NO_TOKEN)
        if not channels:
            return _refusal(no_such_object("get", id))
        rules = [self.rules.of(channel.name).access_token for channel in channels]
        expected = [
            channel.access_token if rule is None else rule for channel, rule in zip(channels, rules, strict=True)
        ]
        if None not in expected and token not in expected:
            return _refusal(refusal(190))
        templates = list(dict.fromkeys(template for channel in channels for template in channel.templates or ()))
        return _page(id, templates, scope)

    # Channels

    def _all(self) -> dict[str, tuple[App, Channel]]:
        """By phone_number_id."""
        try:
            config = self._file.read()
        except ConfigError:
            return {}  # `GET /health` says why nothing is known
        if config is not self._config:
            self._config = config
            self._numbers = config.by_number()
        return self._numbers


# Requests


def _string(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _token(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, token = value.decode("latin-1").partition(" ")
            return token.strip() if scheme.lower() == "bearer" else None
    return None


def _customer(body: JSON, rules: Rules) -> str:
    """Whom a well-shaped call goes to: a wa_id or a BSUID. `to` wins over `recipient` (§5)."""
    to: str = body.get("to") or body["recipient"]
    return wa_id(to[1:], rules.drop_ninth_digit) if to.startswith("+") else to


def _template(channel: Channel, body: JSON) -> Template | None:
    asked = body["template"]["name"], body["template"]["language"]["code"]
    return next((one for one in channel.templates or () if (one.name, one.language) == asked), None)


def _wrong_template(channel: Channel, body: JSON) -> GraphError | None:
    if channel.templates is None:
        return None
    template = _template(channel, body)
    if template is None or template.status not in ("APPROVED", "REINSTATED"):
        code = {"PAUSED": 132015, "DISABLED": 132016}.get(template.status if template else "", 132001)
        name, language = body["template"]["name"], body["template"]["language"]["code"]
        return refusal(code, f"template name ({name}) does not exist in {language} or is not approved")
    if template.category == "AUTHENTICATION" and body.get("to") is None:
        return refusal(131062)
    return None


def _category(channel: Channel, body: JSON) -> str:
    if body.get("type") != "template":
        return "service"
    template = _template(channel, body)
    return template.category.lower() if template else "utility"


async def _read(receive: Receive) -> bytes | None:
    """The body, at most a little over MAX_BODY of it; None when the client left."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        if len(body) <= MAX_BODY:
            body += message["body"]
        if not message["more_body"]:
            return bytes(body)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _leaves(connection: Protocol, receive: Receive, seconds: float | None) -> bool:
    """Keep the client waiting so long, or as long as it likes; true when it leaves."""
    connection.held = True
    try:
        async with asyncio.timeout(seconds):
            await _left(receive)
    except TimeoutError:
        return False
    finally:
        connection.held = False
    return True


# Answers


def _refusal(error: GraphError, retry_after: int | None = None) -> Answer:
    return _with_retry_after(Answer(error.http, error.json()), retry_after)


def _with_retry_after(answer: Answer, seconds: int | None) -> Answer:
    if seconds is None:
        return answer
    return answer._replace(headers=(*answer.headers, (b"retry-after", str(seconds).encode())))


def _spoilt(fault: SetFault, answer: Answer) -> Answer:
    """What comes instead of this answer, for faults whose answer comes in one piece."""
    match fault.kind:
        case "garbage_before" | "garbage_after":
            return Answer(200, _NOT_JSON)
        case "html" | "html_after" | "outage":
            status = fault.http or (503 if fault.kind == "outage" else 502)
            return _with_retry_after(Answer(status, _HTML, (_HTML_TYPE,)), fault.retry_after)
        case "redirect":
            return Answer(302, b"", ((b"location", b"/moved"),))
        case "empty":
            return Answer(200, b"")
        case "huge":
            return answer._replace(body=answer.body[:-1] + b',"padding":"' + b"x" * HUGE + b'"}')
        case "gzip":
            headers = (*answer.headers, (b"content-encoding", b"gzip"))
            return answer._replace(body=gzip.compress(answer.body), headers=headers)
    return answer


async def _write(send: Send, answer: Answer) -> None:
    await _start(send, answer)
    await send({"type": "http.response.body", "body": answer.body})


async def _start(send: Send, answer: Answer) -> None:
    length = (b"content-length", str(len(answer.body)).encode())
    await send({"type": "http.response.start", "status": answer.status, "headers": [*answer.headers, length]})


async def _drip(connection: Protocol, receive: Receive, send: Send, answer: Answer, every: float) -> bool:
    """One byte at a time; false when the client leaves before the last."""
    await _start(send, answer)
    last = len(answer.body) - 1
    for i in range(last + 1):
        if await _leaves(connection, receive, every):
            return False
        await send({"type": "http.response.body", "body": answer.body[i : i + 1], "more_body": i < last})
    return True


def _page(id: str, templates: list[Template], scope: Scope) -> Answer:
    """One page of templates, as Graph cuts lists: `limit` of them `after` a cursor."""
    query = parse_qs(scope["query_string"].decode("latin-1"))
    limit, after = query.get("limit", ["25"])[-1], query.get("after", [""])[-1]
    try:
        start = int(base64.b64decode(after, validate=True).decode()) if after else 0
    except (binascii.Error, ValueError):
        start = -1
    if start < 0 or not limit.isdecimal() or not 1 <= int(limit) <= 1000:
        return _refusal(refusal(100, "limit or after is not valid"))
    shown = templates[start : start + int(limit)]
    end = start + len(shown)
    page: JSON = {
        "data": [
            {
                "name": one.name,
                "language": one.language,
                "status": one.status,
                "category": one.category,
                "id": str(10**15 + crc32(f"{id} {one.name} {one.language}".encode())),
            }
            for one in shown
        ]
    }
    if shown:
        cursors = {"before": _cursor(start), "after": _cursor(end)}
        page["paging"] = {"cursors": cursors}
        if end < len(templates):
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            asked = urlencode({"limit": limit, "after": cursors["after"]})
            page["paging"]["next"] = f"{scope['scheme']}://{host}{scope['path']}?{asked}"
    return Answer(200, msgspec.json.encode(page))


def _cursor(place: int) -> str:
    return base64.b64encode(str(place).encode()).decode()
