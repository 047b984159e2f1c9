"""The sending side of the simulated Meta: Graph's `/{version}/{phone_number_id}/messages` and the list of templates.

`Graph` answers them as whatsapp-cloud-api.md §9, §13 and §16 say, under the rules and with the faults that a test has
set, and keeps its own truth of what it accepted in `Graph.calls`. What concerns files is `sandbox.media`'s.
"""

import asyncio
import base64
import binascii
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import SystemRandom
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlencode
from zlib import crc32

import msgspec
from starlette.types import Receive, Scope, Send

from sandbox import meta, shape
from sandbox.answers import NO_TOKEN, NOTHING, Answer, Exchange, refused, spoilt
from sandbox.calls import Call, Calls
from sandbox.config import App, Channel, Config, ConfigError, ConfigFile, Template
from sandbox.faults import BEFORE, Faults, SetFault
from sandbox.graph_errors import GraphError, no_such_object, refusal
from sandbox.media import PREFIX, Media
from sandbox.meta import JSON
from sandbox.rules import Limits, RuleBook, Rules, wa_id
from sandbox.sender import Sender
from sandbox.statuses import Accepted, Statuses

_PATH = re.compile(r"/v[0-9]+\.[0-9]+/([^/]+)(?:/(messages|message_templates|media))?/?")
MAX_BODY = 2**20  # bytes


class Asked(NamedTuple):
    """A request to send."""

    id: str
    raw: bytes | bytearray
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
        self.media = Media(self.rules, self.faults, self._all)
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
            self.media.close()

    def is_asked(self, path: str) -> bool:
        """Whether `serve` answers requests for this path."""
        return path.startswith(PREFIX) or _PATH.fullmatch(path) is not None

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        found = _PATH.fullmatch(scope["path"])
        if found is None:
            await self.media.host(exchange)
            return
        id, edge = found.groups()
        match scope["method"], edge:
            case "POST", "messages":
                await self._messages(id, exchange)
            case "GET", "message_templates":
                await exchange.write(self._templates(id, exchange))
            case "POST", "media":
                await self.media.upload(id, exchange)
            case "GET", None:
                await self.media.resolve(id, exchange)
            case "DELETE", None:
                await self.media.delete(id, exchange)
            case method, _:
                await exchange.write(refused(no_such_object(method.lower(), id)))

    # Messages

    async def _messages(self, id: str, exchange: Exchange) -> None:
        raw = await exchange.read(MAX_BODY)
        if raw is None:
            return
        try:
            body = msgspec.json.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            body = None
        asked = Asked(id, raw, body, exchange.token, self._all().get(id))
        call = self._begin(exchange, asked)
        try:
            met = self.faults.meet(call.channel, call.to)
            call.fault = met.fault.kind if met.fault else ("latency" if met.latency else None)
            answer = self._decide(call, asked, met.fault)
            if met.latency and await exchange.leaves(met.latency):
                return
            # A call that Graph itself refused is answered plainly.
            fault = None if call.outcome == "refused" else met.fault
            await exchange.deliver(answer, fault, fault.kind if fault else "", call)
        finally:
            self.calls.end(call)

    def _begin(self, exchange: Exchange, asked: Asked) -> Call:
        given: JSON = asked.body if isinstance(asked.body, dict) else {}
        text = given.get("text")
        return self.calls.begin(
            exchange.connection.is_gone,
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
                return NOTHING
            code = 131000 if fault.code is None else fault.code
            error = refusal(code, fault.details or "", http=fault.http, subcode=fault.subcode)
            self.calls.refused(call, code)
            return refused(error, fault.retry_after)
        if asked.known is None:
            return self._refuse(call, no_such_object("post", asked.id) if asked.token else NO_TOKEN)
        wrong = self._wrong(asked.known[1], asked)
        if wrong is not None:
            return self._refuse(call, wrong)
        if shape.is_read(asked.body):
            self.calls.accepted(call, None)
            return Answer(200, b'{"success":true}')
        return self._accept(call, *asked.known, asked.body, fault)

    def _refuse(self, call: Call, wrong: GraphError) -> Answer:
        self.calls.refused(call, wrong.code, by_rate=wrong.code == 130429)
        return refused(wrong)

    def _wrong(self, channel: Channel, asked: Asked) -> GraphError | None:
        rules = self.rules.of(channel.name)
        expected = self.rules.token(channel)
        if not asked.token:
            return NO_TOKEN
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
        if rules.check_media:
            error = self.media.wrong_in(body, channel)
            if error is not None:
                return error
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

    # Templates

    def _templates(self, id: str, exchange: Exchange) -> Answer:
        channels = [channel for _, channel in self._all().values() if channel.waba_id == id]
        fault = self.faults.meet(channels[0].name if channels else None, None, only="outage").fault
        if fault is not None:
            return spoilt(fault.kind, fault, NOTHING)
        token = exchange.token
        if not token:
            return refused(NO_TOKEN)
        if not channels:
            return refused(no_such_object("get", id))
        expected = [self.rules.token(channel) for channel in channels]
        if None not in expected and token not in expected:
            return refused(refusal(190))
        templates = list(dict.fromkeys(template for channel in channels for template in channel.templates or ()))
        return _page(id, templates, exchange)

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


# Answers


def _page(id: str, templates: list[Template], exchange: Exchange) -> Answer:
    """One page of templates, as Graph cuts lists: `limit` of them `after` a cursor."""
    query = parse_qs(exchange.query)
    limit, after = query.get("limit", ["25"])[-1], query.get("after", [""])[-1]
    try:
        start = int(base64.b64decode(after, validate=True).decode()) if after else 0
    except (binascii.Error, ValueError):
        start = -1
    if start < 0 or not limit.isdecimal() or not 1 <= int(limit) <= 1000:
        return refused(refusal(100, "limit or after is not valid"))
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
            asked = urlencode({"limit": limit, "after": cursors["after"]})
            page["paging"]["next"] = f"{exchange.address}{exchange.scope['path']}?{asked}"
    return Answer(200, msgspec.json.encode(page))


def _cursor(place: int) -> str:
    return base64.b64encode(str(place).encode()).decode()
