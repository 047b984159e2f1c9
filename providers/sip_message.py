"""SIP messages as bytes: requests that are ours, responses that may be anything (RFC 3261 §7, §20, §25).

`encode` writes a request; `read` understands a response or gives None and never raises; `Framer` cuts a TCP or TLS
stream into messages; `contacts` lists the bindings of a response. Facts: sip-registration.md §3.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from urllib.parse import unquote

LARGEST = 64 * 1024  # bytes of a message; a real answer to REGISTER is 300 to 2,000
_MOST_LINES = 200
_MOST_VALUES = 100

_COMPACT = {"v": "via", "f": "from", "t": "to", "i": "call-id", "m": "contact", "l": "content-length"}
# Only these are lists whose commas separate values. Commas elsewhere belong to a challenge, a date or a comment.
_LISTS = frozenset({"via", "contact", "route", "record-route", "path", "service-route", "supported", "require"})

_STATUS_LINE = re.compile(r"SIP/2\.0[ \t]+([1-6]\d\d)(?:[ \t]+(.*))?", re.IGNORECASE | re.ASCII | re.DOTALL)
_CSEQ = re.compile(r"(\d{1,10})[ \t]+([A-Z]+)", re.ASCII)
_HOST_PORT = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:\[\]]+)(?::(\d{1,5}))?", re.IGNORECASE | re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BLANK_LINE = re.compile(rb"\r?\n\r?\n")
_DEFAULT_PORTS = {"udp": 5060, "tcp": 5060, "tls": 5061}


class BadFrame(ValueError):
    """A stream whose messages can no longer be told apart: the connection is of no more use."""


@dataclass(frozen=True)
class Request:
    """A REGISTER without what belongs to its transport: whoever sends it adds Via, Max-Forwards and Content-Length.

    `headers`: (name, value) in order. Its repr says neither user nor credentials.
    """

    uri: str = field(repr=False)  # the Request-URI: `sip:domain`
    call_id: str = field(repr=False)
    cseq: int
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    method: str = "REGISTER"

    def at_contact_host(self, host_port: str) -> "Request":
        """The same with `host[:port]` where its Contact says `localhost`; any other Contact stays as it is."""
        return replace(
            self,
            headers=tuple(
                (name, re.sub(r"@localhost(?::\d+)?(?=[;>])", lambda _: "@" + host_port, value, count=1))
                if name == "Contact"
                else (name, value)
                for name, value in self.headers
            ),
        )


@dataclass(frozen=True)
class Response:
    """What was understood of a response: decoded with replacement, headers unfolded, compact names made long."""

    status: int
    reason: str = field(repr=False)
    branch: str  # of the topmost Via; "" where there is none
    call_id: str = field(repr=False)
    cseq: int
    method: str  # of CSeq
    headers: tuple[tuple[str, str], ...] = field(repr=False)  # names in lower case

    def all(self, name: str) -> list[str]:
        """Every value of a header in order, at most 100.

        Lists such as Contact are split at their commas; other headers, challenges too, are whole lines.
        """
        return _values(self.headers, name.lower())

    def first(self, name: str) -> str | None:
        """The first value of a header; None where there is none."""
        return next(iter(_values(self.headers, name.lower(), 1)), None)


@dataclass(frozen=True)
class Uri:
    """A SIP URI, as far as bindings are compared by it."""

    scheme: str
    user: str = field(repr=False)  # unescaped; "" where there is none
    host: str  # lower case; IPv6 in brackets
    port: int | None
    params: Mapping[str, str] = field(repr=False)  # names and values in lower case

    @property
    def transport(self) -> str:
        return self.params.get("transport", "tls" if self.scheme == "sips" else "udp")

    def same(self, other: "Uri") -> bool:
        """Whether both name one binding: user, host, port or its default, transport, and parameters that both have.

        Looser than RFC 3261 §19.1.4 about default ports: registrars add and drop `:5060`.
        """
        return (
            (self.scheme, self.user, self.host, self.transport)
            == (other.scheme, other.user, other.host, other.transport)
            and self._port() == other._port()
            and all(self.params[name] == other.params[name] for name in self.params.keys() & other.params.keys())
        )

    def _port(self) -> int:
        return self.port or _DEFAULT_PORTS.get(self.transport, 5060)


@dataclass(frozen=True)
class Contact:
    """One binding that a registrar lists. `expires` is its parameter as it came, which may be nonsense."""

    uri: Uri
    expires: str | None


def encode(request: Request, *, via: str | None = None) -> bytes:
    """A request as it goes out.

    With `via` (the whole value) for a socket of ours: Via, Max-Forwards and Content-Length are added. Without it for
    drachtio, which adds its own. Raises ValueError for control characters, so that no header can be smuggled in.
    """
    headers = [("Call-ID", request.call_id), ("CSeq", f"{request.cseq} {request.method}"), *request.headers]
    if via is not None:
        headers = [("Via", via), ("Max-Forwards", "70"), *headers, ("Content-Length", "0")]
    lines = [f"{request.method} {request.uri} SIP/2.0", *(f"{name}: {value}" for name, value in headers)]
    if any(_CONTROL.search(line) for line in lines):
        raise ValueError("a SIP header may not hold control characters")
    return "\r\n".join([*lines, "", ""]).encode()


def read(data: bytes) -> Response | None:
    """The response in a datagram, a frame of `Framer` or drachtio's; None for anything else. Never raises."""
    if len(data) > LARGEST:
        return None
    head, body = _head_and_body(data.lstrip(b"\r\n"))
    first, _, rest = head.partition(b"\n")
    status_line = _STATUS_LINE.fullmatch(_text(first))
    headers = _headers(rest)
    if status_line is None or headers is None:
        return None
    call_ids, sequences = set(_values(headers, "call-id")), set(_values(headers, "cseq"))
    try:
        length = _content_length(headers)
    except BadFrame:
        return None
    # Contradictions are never resolved in somebody's favour: who could say which of two Call-IDs was meant?
    if len(call_ids) != 1 or len(sequences) != 1 or length > len(body):
        return None
    sequence = _CSEQ.fullmatch(sequences.pop())
    if sequence is None:
        return None
    return Response(
        status=int(status_line[1]),
        reason=(status_line[2] or "").strip(),
        branch=_branch(headers),
        call_id=call_ids.pop(),
        cseq=int(sequence[1]),
        method=sequence[2],
        headers=headers,
    )


class Framer:
    """Cuts a stream into whole messages by their Content-Length, wherever segments begin and end."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0  # before this the buffer holds no blank line
        self._end: int | None = None  # of the first message in the buffer, once its head is there

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are complete with this piece. Raises `BadFrame` when the stream cannot be cut any more."""
        self._buffer += data
        messages: list[bytes] = []
        while (end := self._find_end()) is not None and len(self._buffer) >= end:
            messages.append(bytes(self._buffer[:end]))
            del self._buffer[:end]
            self._searched, self._end = 0, None
        return messages

    def _find_end(self) -> int | None:
        if self._end is not None:
            return self._end
        if not self._searched:  # line ends between messages are keep-alives
            del self._buffer[: len(self._buffer) - len(self._buffer.lstrip(b"\r\n"))]
        blank = _BLANK_LINE.search(self._buffer, self._searched)
        if blank is None:
            if len(self._buffer) > LARGEST:
                raise BadFrame("the head of a SIP message does not end")
            self._searched = max(0, len(self._buffer) - 3)
            return None
        headers = _headers(bytes(self._buffer[: blank.start()]).partition(b"\n")[2])
        if headers is None:
            raise BadFrame("a SIP message has too many headers")
        self._end = blank.end() + _content_length(headers)
        if self._end > LARGEST:
            raise BadFrame("a SIP message is too large")
        return self._end


def contacts(response: Response) -> list[Contact]:
    """The bindings that a response lists, in its order; entries that make no sense are left out."""
    return [contact for value in response.all("contact") if (contact := _contact(value))]


def parse_uri(text: str) -> Uri | None:
    """A `sip:` or `sips:` URI taken apart; None for anything else."""
    scheme, colon, rest = text.strip().partition(":")
    scheme = scheme.lower()
    if not colon or scheme not in ("sip", "sips"):
        return None
    user, at, rest = rest.rpartition("@")
    address, *params = rest.partition("?")[0].split(";")
    host = _HOST_PORT.fullmatch(address.strip())
    if host is None or (at and not user):
        return None
    port = int(host[2]) if host[2] else None
    if port is not None and not 0 < port < 65536:
        return None
    return Uri(scheme, unquote(user, errors="replace"), host[1].lower(), port, _params(params))


def host_in_uri(host: str) -> str:
    """A name or address as it stands in a URI: IPv6 in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def split_outside_quotes(text: str, separator: str) -> list[str]:
    """All of `pieces_outside_quotes`."""
    return list(pieces_outside_quotes(text, separator))


def pieces_outside_quotes(text: str, separator: str) -> Iterator[str]:
    """Text cut at a separator that stands neither in quotes nor between `<` and `>`; blank pieces are left out.

    No further than somebody asks for pieces.
    """
    start, goes_on, quoted, bracketed = 0, 0, False, False
    for found in re.finditer(rf'[\\"<>{re.escape(separator)}]', text):
        at, char = found.start(), found[0]
        if at < goes_on:
            continue
        if quoted:
            if char == "\\":
                goes_on = at + 2
            quoted = char != '"'
        elif char == '"' and not bracketed:
            quoted = True
        elif char in "<>":
            bracketed = char == "<"
        elif char == separator and not bracketed:
            if piece := text[start:at].strip():
                yield piece
            start = at + 1
    if piece := text[start:].strip():
        yield piece


def _head_and_body(data: bytes) -> tuple[bytes, bytes]:
    blank = _BLANK_LINE.search(data)
    return (data[: blank.start()], data[blank.end() :]) if blank else (data, b"")


def _headers(lines: bytes) -> tuple[tuple[str, str], ...] | None:
    """Header lines, unfolded and decoded; None if there are absurdly many. Lines that are no headers are left out."""
    if lines.count(b"\n") > _MOST_LINES:
        return None
    unfolded: list[str] = []
    for line in lines.split(b"\n"):
        text = _text(line)
        if text[:1] in (" ", "\t") and unfolded:
            unfolded[-1] += " " + text.strip(" \t")
        else:
            unfolded.append(text)
    headers: list[tuple[str, str]] = []
    for text in unfolded:
        name, colon, value = text.partition(":")
        name = name.strip(" \t").lower()
        if colon and name and name.isascii():
            headers.append((_COMPACT.get(name, name), value.strip(" \t")))
    return tuple(headers)


def _text(line: bytes) -> str:
    return line.removesuffix(b"\r").decode(errors="replace")


def _values(headers: tuple[tuple[str, str], ...], name: str, most: int = _MOST_VALUES) -> list[str]:
    values: list[str] = []
    for key, value in headers:
        if key == name and len(values) < most:
            values += islice(pieces_outside_quotes(value, ","), most - len(values)) if name in _LISTS else [value]
    return values


def _content_length(headers: tuple[tuple[str, str], ...]) -> int:
    """What the headers say, 0 if nothing; raises `BadFrame` for no number, a contradiction, and more than is taken."""
    lengths = set(_values(headers, "content-length"))
    if not lengths:
        return 0
    text = lengths.pop()
    if lengths or not re.fullmatch(r"\d{1,6}", text, re.ASCII):
        raise BadFrame("a SIP message has no sensible Content-Length")
    return int(text)


def _branch(headers: tuple[tuple[str, str], ...]) -> str:
    topmost = next(iter(_values(headers, "via", 1)), "")
    return _params(split_outside_quotes(topmost, ";")[1:], lower=False).get("branch", "")


def _params(pieces: list[str], *, lower: bool = True) -> dict[str, str]:
    """`name=value` pieces by name; the first of equal names counts."""
    params: dict[str, str] = {}
    for piece in pieces:
        name, _, value = piece.partition("=")
        value = value.strip().strip('"')
        params.setdefault(name.strip().lower(), value.lower() if lower else value)
    return params


def _contact(value: str) -> Contact | None:
    """`"Name" <uri>;params` or `uri;params`: without brackets the parameters are the header's (RFC 3261 §20.10)."""
    main, *pieces = split_outside_quotes(value, ";") or [""]
    bracketed = re.search(r"<([^<>]*)>[ \t]*\Z", main)
    uri = parse_uri(bracketed[1] if bracketed else main)
    return Contact(uri, _params(pieces).get("expires")) if uri else None
