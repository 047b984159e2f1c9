"""SIP as a registrar reads and writes it (sip-registration.md §3): messages, URIs, parameters, streams.

Written apart from the fleet's own, so that one misreading cannot hide in both.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

MAX_HEAD = 2**16  # bytes of a stream without the end of a head
DEFAULT_PORTS = {"sip": 5060, "sips": 5061}
REASONS = {
    100: "Trying",
    200: "OK",
    302: "Moved Temporarily",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    407: "Proxy Authentication Required",
    408: "Request Timeout",
    423: "Interval Too Brief",
    480: "Temporarily Unavailable",
    500: "Server Internal Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    504: "Server Time-out",
    600: "Busy Everywhere",
    603: "Decline",
    604: "Does Not Exist Anywhere",
}
_COMPACT = {
    "v": "via",
    "f": "from",
    "t": "to",
    "i": "call-id",
    "m": "contact",
    "l": "content-length",
    "k": "supported",
    "s": "subject",
    "c": "content-type",
}
_FOLD = re.compile(r"\r?\n[ \t]+")
_LINE = re.compile(r"\r?\n")
_LENGTH = re.compile(rb"(?im)^(?:content-length|l)[ \t]*:[ \t]*(\d{1,9})[ \t]*\r?$")
_PARAM = re.compile(r'([A-Za-z0-9_.-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,";]+))')
_URI = re.compile(
    r"^(?P<scheme>sips?):(?:(?P<user>[^@;?]*)@)?(?P<host>\[[^\]]+\]|[^:;?]+)(?::(?P<port>\d{1,5}))?(?P<rest>.*)$",
    re.IGNORECASE | re.DOTALL,
)
_TOKEN_PARAM = re.compile(r';\s*([^=;\s]+)\s*(?:=\s*(?:"((?:[^"\\]|\\.)*)"|([^;]*)))?')


class Unreadable(ValueError):
    """These bytes are no SIP message."""


class Message:
    """A request or a response. Names of headers are long and in lower case; a value is as it came, unfolded."""

    __slots__ = ("body", "headers", "method", "raw_length", "reason", "status", "uri")

    def __init__(self, raw: bytes) -> None:
        head, _, body = raw.partition(b"\r\n\r\n")
        if b"\n\n" in head:
            head, _, body = raw.partition(b"\n\n")
        text = head.decode("utf-8", "replace")
        if "\n " in text or "\n\t" in text:
            text = _FOLD.sub(" ", text)
        first, *lines = _LINE.split(text)
        words = first.split(" ", 2)
        if len(words) < 3:
            raise Unreadable("the first line is none of SIP")
        self.method, self.uri, self.status, self.reason = "", "", 0, ""
        if words[0] == "SIP/2.0" and words[1].isdecimal():
            self.status, self.reason = int(words[1]), words[2]
        elif words[2] == "SIP/2.0":
            self.method, self.uri = words[0], words[1]
        else:
            raise Unreadable("the first line is none of SIP")
        headers: dict[str, list[str]] = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon:
                if line.strip():
                    raise Unreadable("a line of the head is no header")
                continue
            name = name.strip().lower()
            headers.setdefault(_COMPACT.get(name, name), []).append(value.strip())
        self.headers = headers
        self.body = body
        self.raw_length = len(raw)

    def get(self, name: str, default: str = "") -> str:
        """The first one of this name."""
        found = self.headers.get(name)
        return found[0] if found else default

    def values(self, name: str) -> list[str]:
        """All values of a header that may hold several in one line."""
        return [value for line in self.headers.get(name, ()) for value in split(line)]


class Uri(NamedTuple):
    scheme: str
    user: str
    host: str
    port: int | None
    params: str = ""  # with their semicolons, and headers

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """What two URIs that mean the same have in common (RFC 3261 §19.1.4, as far as Contacts go)."""
        params = dict(parameters(self.params))
        port = self.port or DEFAULT_PORTS[self.scheme]
        return self.scheme, self.user, self.host, port, params.get("transport", "udp").lower()

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        port = f":{self.port}" if self.port else ""
        return f"{self.scheme}:{user}{self.host}{port}{self.params}"


class Address(NamedTuple):
    """A value of To, From or Contact."""

    uri: str
    params: dict[str, str]


def uri(text: str) -> Uri:
    found = _URI.match(text.strip())
    if found is None:
        raise Unreadable("not a SIP URI")
    port = int(found["port"]) if found["port"] else None
    return Uri(found["scheme"].lower(), found["user"] or "", found["host"].lower(), port, found["rest"])


def address(text: str) -> Address:
    """`"Name" <uri>;params`, or `uri;params`."""
    rest = text.strip()
    if rest.startswith('"'):
        end = re.match(r'"(?:[^"\\]|\\.)*"', rest)
        if end is None:
            raise Unreadable("a name without its other quote")
        rest = rest[end.end() :].lstrip()
    start, close = rest.find("<"), rest.find(">")
    if start >= 0:
        if close < start:
            raise Unreadable("an address without its >")
        return Address(rest[start + 1 : close], dict(parameters(rest[close + 1 :])))
    its, semicolon, params = rest.partition(";")
    return Address(its.strip(), dict(parameters(semicolon + params)))


def parameters(text: str) -> Iterator[tuple[str, str]]:
    """Those after a URI or an address, `;name=value` and `;name`."""
    for name, quoted, plain in _TOKEN_PARAM.findall(text):
        yield name.lower(), quoted or plain.strip()


def credentials(text: str) -> tuple[str, dict[str, str]]:
    """Scheme and parameters of Authorization, unquoted."""
    scheme, _, rest = text.strip().partition(" ")
    found = {name.lower(): unquoted(quoted) or plain for name, quoted, plain in _PARAM.findall(rest)}
    return scheme, found


def split(line: str) -> list[str]:
    """At commas outside of quotes and angle brackets."""
    if "," not in line:
        return [line]
    parts, start, quoted, angle, skip = [], 0, False, False, False
    for i, char in enumerate(line):
        if skip:
            skip = False
        elif quoted:
            skip, quoted = char == "\\", char != '"'
        elif char == '"':
            quoted = True
        elif char in "<>":
            angle = char == "<"
        elif char == "," and not angle:
            parts.append(line[start:i].strip())
            start = i + 1
    return [*parts, line[start:].strip()]


def quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text) if "\\" in text else text


def encode(first: str, headers: list[tuple[str, str]], body: bytes = b"") -> bytes:
    """A message with its Content-Length."""
    lines = [first, *(f"{name}: {value}" for name, value in headers), f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


class Stream:
    """What came over TCP so far; `feed` gives the messages that are whole (RFC 3261 §18.3)."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Raises Unreadable for a head that never ends."""
        self._rest += data
        while True:
            while self._rest.startswith(b"\r\n"):
                del self._rest[:2]
            end = self._rest.find(b"\r\n\r\n")
            if end < 0:
                if len(self._rest) > MAX_HEAD:
                    raise Unreadable("a head without an end")
                return
            length = _LENGTH.search(self._rest, 0, end + 2)
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self._rest) < whole:
                return
            raw = bytes(self._rest[:whole])
            del self._rest[:whole]
            yield raw
