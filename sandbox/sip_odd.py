"""Replies that are not as they should be: malformed, odd but legal, and other people's (sip-registration.md §3, §10).

`folded` and `latin1` are legal and say the truth. The `foreign_…` ones are well formed and say the opposite of it.
"""

from typing import NamedTuple

from sandbox.sip_words import encode

KINDS = {
    "no_status_line": "headers without a first line",
    "garbage": "bytes of anything",
    "huge": "60 KB, most of it a body",
    "folded": "each header goes over several lines",
    "bad_length": "Content-Length is far more than there is",
    "latin1": "a reason and a header that are not UTF-8",
    "many_via": "a thousand more Vias",
    "truncated": "ends in the middle of its head",
    "foreign_branch": "the branch of another transaction",
    "foreign_cseq": "another CSeq number",
    "foreign_call_id": "another Call-ID",
    "foreign_method": "the CSeq of another method",
    "foreign_source": "from an address that nobody sent to (UDP)",
}
HUGE = 60_000  # bytes; a datagram has no room for more than 65,507
_VIAS = 1_000


class Reply(NamedTuple):
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    @property
    def first(self) -> str:
        return f"SIP/2.0 {self.status} {self.reason}"

    def encode(self) -> bytes:
        return encode(self.first, self.headers, self.body)

    def having(self, name: str, old: str, new: str) -> "Reply":
        """With another text in a header."""
        return self._replace(
            headers=[(key, value.replace(old, new, 1) if key == name else value) for key, value in self.headers]
        )


def odd(kind: str, good: Reply, opposite: Reply) -> bytes:
    """One of this kind instead of the good one."""
    raw = good.encode()
    if kind == "no_status_line":
        return raw.partition(b"\r\n")[2]
    if kind == "garbage":
        return bytes(range(256)) * 2
    if kind == "huge":
        return good._replace(body=b"x" * (HUGE - len(raw))).encode()
    if kind == "folded":
        return good._replace(headers=[(name, _folded(value)) for name, value in good.headers]).encode()
    if kind == "bad_length":
        return raw.replace(b"Content-Length: ", b"Content-Length: 9999", 1)
    if kind == "latin1":
        line = good.first.encode()
        return raw.replace(line, f"SIP/2.0 {good.status} Não é".encode("latin-1") + b"\r\nX-Loja: a\xe7\xe3o", 1)
    if kind == "many_via":
        vias = [("Via", f"SIP/2.0/UDP 192.0.2.{i % 250}:5060;branch=z9hG4bK{i}") for i in range(_VIAS)]
        return good._replace(headers=[*good.headers[:1], *vias, *good.headers[1:]]).encode()
    if kind == "truncated":
        return raw[: raw.index(b"Call-ID") + 9]
    return _foreign(kind, opposite).encode()


def _foreign(kind: str, opposite: Reply) -> Reply:
    told = dict(opposite.headers)
    if kind == "foreign_branch":
        return opposite.having("Via", "branch=z9hG4bK", "branch=z9hG4bKx")
    if kind == "foreign_call_id":
        return opposite.having("Call-ID", told["Call-ID"], f"x{told['Call-ID']}")
    number = told["CSeq"].split()[0]
    if kind == "foreign_cseq":
        return opposite.having("CSeq", number, str(int(number) + 1))
    if kind == "foreign_method":
        return opposite.having("CSeq", "REGISTER", "OPTIONS")
    return opposite  # only its source is foreign


def _folded(value: str) -> str:
    return value.replace(" ", "\r\n\t ", 1) if " " in value and '"' not in value else f"\r\n {value}"
