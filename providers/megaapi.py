"""MegaAPI: one instance of WhatsApp Web at its host (megaapi.md, "Endpoints", "Responses"). Sending is in
`providers/megaapi_send.py`, files are in `providers/megaapi_media.py`.

GET    /rest/instance/{key}                  how it stands
GET    /rest/instance/list                   how all of the host's stand, with a token of the host
GET    /rest/instance/qrcode_base64/{key}    the QR code to scan
DELETE /rest/instance/{key}/restart          connect anew
DELETE /rest/instance/{key}/logout           end the pairing
GET    /rest/webhook/{key}                   where its events go
POST   /rest/webhook/{key}/configWebhook     where its events shall go

A tenant names the host, so every call goes by a guarded client (security-reliability.md M2).
"""

import io
import re
import unicodedata
from collections.abc import AsyncIterator, Mapping
from ipaddress import IPv6Address
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import msgspec

from pombal.errors import Rejected
from providers import guard, http
from providers.inline import Decoder
from providers.instance import MOST_RAW, Hook, InstanceFault, Picture, Standing
from providers.media import MediaFault
from providers.sniff import sniff

EDGE_WAIT = 60.0  # seconds that a host is left alone whose edge refused us
THROTTLE_WAIT = 30.0  # … and one that wants to be left alone without saying how long
_MOST_BYTES_OF_A_LIST = 8 * 1024 * 1024  # some 40,000 instances
_MOST_BYTES_OF_A_PICTURE = 1024 * 1024
_MOST_INSTANCES = 100_000
_PICTURES = ("image/png", "image/jpeg")
_STATUSES: dict[str, Literal["connected", "disconnected"]] = {"connected": "connected", "disconnected": "disconnected"}
_KEY = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LIST = "list"  # `GET /rest/instance/list` is another call; no other has its word where the key of one stands last
_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}")
_HOST = re.compile(r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?)*")
_OWN_ID = re.compile(r"([0-9]{5,20})(?::[0-9]{1,4})?@(?:s\.whatsapp\.net|c\.us)")
_LOGGED_IN = "already logged in"
_UNKNOWN_INSTANCE = "instance not found"


def normal_host(text: str) -> str:
    """The host's address as all calls begin: `https://host[:port]`. Raises `Rejected` with what is wrong with it.

    http is taken too; the guard lets it through to networks of the operator's own alone.
    """
    given = text.strip()
    if "://" not in given:
        given = f"https://{given}"
    if not given.isascii() or not given.isprintable() or " " in given or "\\" in given:
        raise Rejected("the host must be plain ASCII without blanks")
    try:
        parts = urlsplit(given)
        port = parts.port
    except ValueError:
        raise Rejected("the host is not an address, or its port is not a number up to 65535") from None
    if parts.scheme not in ("https", "http"):
        raise Rejected("the host must be reached by https")
    if "@" in parts.netloc:
        raise Rejected("the host must not have a user name in it")
    if parts.path not in ("", "/") or "?" in given or "#" in given:
        raise Rejected("the host must be given alone, without a path")
    host = (parts.hostname or "").lower()
    if port == 0 or parts.netloc.endswith(":"):
        raise Rejected("the host's port is not one")
    if ":" in host and "%" not in host:
        try:
            host = f"[{IPv6Address(host)}]"
        except ValueError:
            raise Rejected("the host is not an address") from None
    elif not _HOST.fullmatch(host):
        raise Rejected("the host is not a host's name")
    usual = 443 if parts.scheme == "https" else 80
    return f"{parts.scheme}://{host}" + (f":{port}" if port not in (None, usual) else "")


def check_key(text: str) -> str:
    """The key of an instance as it may stand in a path (O6). Raises `Rejected`."""
    if not _KEY.fullmatch(text) or text in (".", ".."):
        raise Rejected("the instance key may have letters, digits, dots, hyphens and underscores, at most 128 in all")
    if text.lower() == _LIST:
        raise Rejected(f"no instance can have the key {_LIST!r}: what asks for it lists all instances of the host")
    return text


class Place:
    """Where the calls of one instance go, and with what. Whatever is wrong with that is `wrong`; then nothing is
    asked."""

    def __init__(self, host: str, instance_key: str, token: str) -> None:
        self.host, self.wrong = host, ""
        try:
            self.host = normal_host(host) if host else ""
            self._key = quote(check_key(instance_key), safe="")
        except Rejected as error:
            self.wrong = str(error)
        else:
            self.wrong = "" if self.host else "no host is configured for this channel"
        self.has_token = bool(token)
        if token and not _TOKEN.fullmatch(token):
            self.wrong = self.wrong or "the channel's token has a character that no token has"
        self.headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}

    def url(self, path: str) -> str:
        """`path` has `{key}` where the instance's stands."""
        return self.host + path.replace("{key}", self._key)


class MegaApi:
    """One instance; see `providers.instance.Instance`. Never repeats a call by itself."""

    def __init__(
        self, clients: http.Clients, host: str, instance_key: str, token: str, *, deadline: float = http.DEADLINE
    ) -> None:
        self._clients = clients
        self._place = Place(host, instance_key, token)
        self._deadline = deadline
        self.host = self._place.host

    async def status(self, deadline: float) -> Standing:
        body = understood(await self._call("GET", "/rest/instance/{key}", deadline=deadline))
        instance = body.get("instance")
        return standing(instance) if isinstance(instance, dict) else Standing(None)

    async def listed(self, deadline: float) -> Mapping[str, Standing]:
        reply = await self._call("GET", "/rest/instance/list", deadline=deadline, most_bytes=_MOST_BYTES_OF_A_LIST)
        body = understood(reply)
        found = next((body[name] for name in ("instances", "data") if isinstance(body.get(name), list)), None)
        if found is None or len(found) > _MOST_INSTANCES:
            raise InstanceFault("unreadable", "the gateway's list of instances has another form than is known")
        keyed = ((_first(element, "key", "instance_key"), element) for element in found if isinstance(element, dict))
        return {key: standing(element) for key, element in keyed if isinstance(key, str)}

    async def qr(self) -> Picture | None:
        reply = await self._call("GET", "/rest/instance/qrcode_base64/{key}")
        body = json_object(reply.body)
        if body is not None and reply.status < 500 and _LOGGED_IN in message_of(body).casefold():
            return None
        code = understood(reply).get("qrcode")
        if not isinstance(code, str) or not code:
            raise InstanceFault("unreadable", "the gateway's answer has no QR code in it")
        return _picture(code)

    async def restart(self) -> None:
        understood(await self._call("DELETE", "/rest/instance/{key}/restart"))

    async def logout(self) -> None:
        understood(await self._call("DELETE", "/rest/instance/{key}/logout"))

    async def hook(self) -> Hook:
        body = understood(await self._call("GET", "/rest/webhook/{key}"))
        # Which object of the answer has it is not known.
        for place in (body, *(value for value in body.values() if isinstance(value, dict))):
            url, is_enabled = place.get("webhookUrl"), place.get("webhookEnabled")
            if url is None and "webhookUrl" in place:
                url = ""
            if isinstance(url, str):
                return Hook(url, is_enabled if isinstance(is_enabled, bool) else bool(url))
        raise InstanceFault("unreadable", "the gateway's answer does not say where events go")

    async def set_hook(self, url: str) -> None:
        asked = {"messageData": {"webhookUrl": url, "webhookEnabled": True}}
        understood(await self._call("POST", "/rest/webhook/{key}/configWebhook", asked))

    async def _call(
        self,
        method: str,
        path: str,
        asked: dict[str, Any] | None = None,
        *,
        deadline: float | None = None,
        most_bytes: int = http.MOST_BYTES,
    ) -> http.Reply:
        """The answer, whatever it is. Raises `InstanceFault` when there is none."""
        if self._place.wrong:
            raise InstanceFault("misconfigured", self._place.wrong)
        if not self._place.has_token:
            raise InstanceFault("misconfigured", "this channel has no token")
        content = msgspec.json.encode(asked) if asked is not None else None
        try:
            return await call(
                self._clients,
                self._place,
                method,
                path,
                content,
                deadline=self._deadline if deadline is None else deadline,
                most_bytes=most_bytes,
            )
        except guard.BlockedAddress:
            raise InstanceFault(
                "blocked_address", "the gateway's host leads to an address that is not public"
            ) from None
        except http.NoReply as error:
            raise _silence(error) from None


async def call(
    clients: http.Clients,
    place: Place,
    method: str,
    path: str,
    content: bytes | AsyncIterator[bytes] | None = None,
    *,
    size: int | None = None,
    deadline: float = http.DEADLINE,
    most_bytes: int = http.MOST_BYTES,
    is_patient: bool = False,
) -> http.Reply:
    """One call, with a body of JSON if any; `size` is that of a streamed one. Raises `http.NoReply`,
    `guard.BlockedAddress`, and what `content` raises."""
    headers = dict(place.headers)
    if content is not None:
        headers["Content-Type"] = "application/json"
    if size is not None:
        headers["Content-Length"] = str(size)
    more: dict[str, Any] = {"timeout": http.PATIENT} if is_patient else {}
    async with clients.client(guarded=True) as client:
        request = client.build_request(method, place.url(path), content=content, headers=headers, **more)
        return await http.call(client, request, deadline=deadline, most_bytes=most_bytes)


# ----------------------------------------------------------------------------------------------------- what they mean


def standing(instance: Mapping[str, Any]) -> Standing:
    """How an instance stands: two words are known, and nothing else says anything ("`status` values")."""
    word, user = instance.get("status"), instance.get("user")
    id_ = user.get("id") if isinstance(user, dict) else None
    match = _OWN_ID.fullmatch(id_) if isinstance(id_, str) else None
    own_id = match.group(1) if match else None
    if word is None:
        return Standing(None, own_id=own_id)
    if not isinstance(word, str):
        return Standing(None, shown(msgspec.json.encode(word).decode()), own_id)
    return Standing(_STATUSES.get(word), shown(word), own_id)


def understood(reply: http.Reply) -> dict[str, Any]:
    """The body of an answer of success. Raises `InstanceFault` for every other one, by status *and* `error`."""
    body = json_object(reply.body)
    if reply.status < 200 or reply.status >= 300:
        raise _refusal(reply, body)
    if body is None:
        text = "the gateway's answer is not one of MegaAPI"
        raise InstanceFault("unreadable", text, raw=_start(reply.body))
    if is_error(body):
        said = message_of(body)
        if said.strip().casefold() == _UNKNOWN_INSTANCE:
            raise InstanceFault("not_found", "the gateway knows no such instance", raw=shown(said))
        raise InstanceFault("rejected", "the gateway answered with an error", raw=shown(said))
    return body


def is_error(body: Mapping[str, Any]) -> bool:
    """Whether an answer says that it is one of failure; some spell it `erro`."""
    said = [body[name] for name in ("error", "erro") if name in body]
    return any(value not in (False, None, "", 0, "false") for value in said)


def is_edge_block(reply: http.Reply) -> bool:
    """A 403 of the edge in front of the host: a page, and nothing about our token ("Hosts and credentials")."""
    return reply.status == 403 and _is_page(reply)


def wait_of(reply: http.Reply, otherwise: float) -> float:
    """How long the host wants to be left alone, in seconds."""
    return http.asked_to_wait(reply.headers) or otherwise


def message_of(body: Mapping[str, Any]) -> str:
    """The provider's own words; '' when there are none."""
    said = _first(body, "message", "error", "erro")
    return said if isinstance(said, str) else ""


def shown(text: str, most: int = MOST_RAW) -> str:
    """Foreign text for a person to read: cut, on one line, without control characters and halves of others."""
    plain = "".join(" " if c.isspace() else c for c in text[: 4 * most])
    return "".join(c for c in plain if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn")).strip()[:most]


def json_object(raw: bytes) -> dict[str, Any] | None:
    try:
        value = msgspec.json.decode(raw)
    except (ValueError, RecursionError):  # not UTF-8 and not JSON are both ValueErrors
        return None
    return value if isinstance(value, dict) else None


def _refusal(reply: http.Reply, body: dict[str, Any] | None) -> InstanceFault:
    status = reply.status
    said = f"HTTP {status} {shown(message_of(body)) if body is not None else _start(reply.body)}".rstrip()
    if is_edge_block(reply):
        wait = wait_of(reply, EDGE_WAIT)
        text = "the edge in front of the gateway turns us away (HTTP 403): this says nothing about the token"
        return InstanceFault("edge_blocked", text, is_transient=True, wait=wait, raw=said)
    if status in (401, 403):
        return InstanceFault("refused", f"the gateway does not take the token (HTTP {status})", raw=said)
    if status == 404:
        return InstanceFault("not_found", "the gateway knows no such instance (HTTP 404)", raw=said)
    if status == 429:
        wait = wait_of(reply, THROTTLE_WAIT)
        text = "the gateway wants fewer requests (HTTP 429)"
        return InstanceFault("throttled", text, is_transient=True, wait=wait, raw=said)
    if 300 <= status < 400:
        return InstanceFault("provider_error", f"the gateway sent us elsewhere (HTTP {status}), not followed", raw=said)
    if status >= 500 or status == 408:
        text = f"the gateway is in trouble (HTTP {status})"
        return InstanceFault("provider_error", text, is_transient=True, wait=wait_of(reply, 0.0), raw=said)
    return InstanceFault("rejected", f"the gateway refused the request (HTTP {status})", raw=said)


def _silence(error: http.NoReply) -> InstanceFault:
    if error.status is not None:
        return InstanceFault(
            "unreadable", f"the gateway's answer was not read: {error.why}", raw=f"HTTP {error.status}"
        )
    if error.why == "no answer in time" or error.why.endswith("Timeout"):
        return InstanceFault("timeout", "the gateway gave no answer in time", is_transient=True)
    return InstanceFault("unreachable", f"no connection to the gateway, or it broke ({error.why})", is_transient=True)


def _picture(code: str) -> Picture:
    into = io.BytesIO()
    decoder = Decoder(into, _MOST_BYTES_OF_A_PICTURE)
    try:
        decoder.feed(code.encode("utf-8", "replace"))
        received = decoder.finished()
    except MediaFault as fault:
        raise InstanceFault("unreadable", f"the gateway's QR code is no picture: {fault.text}") from None
    kind = sniff(received.head)
    if kind not in _PICTURES:
        raise InstanceFault("unreadable", "the gateway's QR code is no picture in PNG or JPEG")
    return Picture(kind, into.getvalue())


def _is_page(reply: http.Reply) -> bool:
    kind = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind in ("text/html", "application/xhtml+xml") or reply.body.lstrip()[:1] == b"<"


def _start(raw: bytes) -> str:
    return shown(raw[: 4 * MOST_RAW].decode("utf-8", "replace"))


def _first(body: Mapping[str, Any], *names: str) -> Any:
    return next((body[name] for name in names if isinstance(body.get(name), str)), None)
