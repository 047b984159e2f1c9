"""What the calls to all gateways of WhatsApp Web have in common: a tenant names the host, so they go by a guarded
client (security-reliability.md M2), and what no proper answer means is the same for all (megaapi.md, "Responses")."""

import io
import re
import unicodedata
from collections.abc import AsyncIterator
from ipaddress import IPv6Address
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec

from pombal.errors import Rejected
from providers import guard, http
from providers.inline import Decoder
from providers.instance import MOST_RAW, InstanceFault, Picture
from providers.media import MediaFault
from providers.sniff import sniff

EDGE_WAIT = 60.0  # seconds that a host is left alone whose edge refused us
THROTTLE_WAIT = 30.0  # … and one that wants to be left alone without saying how long
_MOST_BYTES_OF_A_PICTURE = 1024 * 1024
_PICTURES = ("image/png", "image/jpeg")
_HOST = re.compile(r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?)*")


class Place(Protocol):
    """Where the calls of one session go, and with what headers."""

    headers: dict[str, str]

    def url(self, path: str) -> str:
        """The whole address of a call whose path may have placeholders."""


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


async def call(
    clients: http.Clients,
    place: Place,
    method: str,
    path: str,
    content: bytes | AsyncIterator[bytes] | None = None,
    *,
    content_type: str = "application/json",
    size: int | None = None,
    deadline: float = http.DEADLINE,
    most_bytes: int = http.MOST_BYTES,
    is_patient: bool = False,
) -> http.Reply:
    """One call, with a body if any; `size` is that of a streamed one. Raises `http.NoReply`,
    `guard.BlockedAddress`, and what `content` raises."""
    headers = dict(place.headers)
    if content is not None:
        headers["Content-Type"] = content_type
    if size is not None:
        headers["Content-Length"] = str(size)
    more: dict[str, Any] = {"timeout": http.PATIENT} if is_patient else {}
    async with clients.client(guarded=True) as client:
        request = client.build_request(method, place.url(path), content=content, headers=headers, **more)
        return await http.call(client, request, deadline=deadline, most_bytes=most_bytes)


async def asked(
    clients: http.Clients, place: Place, method: str, path: str, content: bytes | None = None, **more: Any
) -> http.Reply:
    """As `call`, for a question about a session: raises `InstanceFault` alone, whatever keeps an answer from coming."""
    try:
        return await call(clients, place, method, path, content, **more)
    except guard.BlockedAddress:
        text = "the gateway's host leads to an address that is not public"
        raise InstanceFault("blocked_address", text) from None
    except http.NoReply as error:
        raise _silence(error) from None


def is_edge_block(reply: http.Reply) -> bool:
    """A 403 of the edge in front of the host: a page, and nothing about our token ("Hosts and credentials")."""
    return reply.status == 403 and _is_page(reply)


def wait_of(reply: http.Reply, otherwise: float) -> float:
    """How long the host wants to be left alone, in seconds."""
    return http.asked_to_wait(reply.headers) or otherwise


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


def refusal(reply: http.Reply, words: str | None) -> InstanceFault:
    """What an answer that is not one of success means. `words` are the gateway's own; None of one in another form."""
    status = reply.status
    said = f"HTTP {status} {start_of(reply.body) if words is None else shown(words)}".rstrip()
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


def picture(code: str) -> Picture:
    """A QR code that came as base64, with or without the beginning of a data URI. Raises `InstanceFault`."""
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


def start_of(raw: bytes) -> str:
    """The beginning of an answer that is not of the gateway's form, for a person to read."""
    return shown(raw[: 4 * MOST_RAW].decode("utf-8", "replace"))
