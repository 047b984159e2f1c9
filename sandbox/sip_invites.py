"""Calls that come in for a registered account: an INVITE to where its binding points, and what became of it."""

import asyncio
import secrets
from dataclasses import dataclass, field

from sandbox.meta import JSON
from sandbox.sip_links import Datagrams, Source
from sandbox.sip_words import Message, Unreadable, address, encode

T1 = 0.5
_SDP = "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=-\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=audio 40000 RTP/AVP 8\r\n"


@dataclass
class _Call:
    heard: asyncio.Event = field(default_factory=asyncio.Event)  # anything at all: no more need to ask
    final: asyncio.Future[Message] = field(default_factory=asyncio.Future)


class Invites:
    """Those that go out of one registrar, by their branch."""

    def __init__(self) -> None:
        self._calls: dict[str, _Call] = {}

    async def call(self, sock: Datagrams, local: Source, uri: str, to: Source, seconds: float) -> JSON:
        """INVITE, the ACK that belongs to its answer, and BYE at once if somebody has taken the call."""
        branch, call_id, tag = (secrets.token_hex(8) for _ in range(3))
        caller = f"<sip:caller@{local[0]}:{local[1]}>"
        via = f"SIP/2.0/UDP {local[0]}:{local[1]};branch=z9hG4bK{{}};rport"
        dialog = [("Max-Forwards", "70"), ("From", f"{caller};tag={tag}"), ("Call-ID", call_id)]
        call = self._calls[branch] = _Call()
        top = [("Via", via.format(branch)), *dialog, ("To", f"<{uri}>"), ("CSeq", "1 INVITE")]
        more = [("Contact", caller), ("Content-Type", "application/sdp")]
        invite = encode(f"INVITE {uri} SIP/2.0", [*top, *more], _SDP.encode())
        told: JSON = {"request_uri": uri, "to": "{}:{}".format(*to), "status": None, "contact_of_answer": None}
        try:
            async with asyncio.timeout(seconds):
                wait = T1
                while not call.heard.is_set():
                    sock.send(invite, to)
                    try:
                        await asyncio.wait_for(call.heard.wait(), wait)
                    except TimeoutError:
                        wait *= 2
                answer = await call.final
        except TimeoutError:
            return told
        finally:
            del self._calls[branch]
        told["status"] = answer.status
        contact = answer.get("contact")
        told["contact_of_answer"] = address(contact).uri if contact else None
        beyond = [*dialog, ("To", answer.get("to"))]
        if answer.status >= 300:
            sock.send(encode(f"ACK {uri} SIP/2.0", [("Via", via.format(branch)), *beyond, ("CSeq", "1 ACK")]), to)
            return told
        target = told["contact_of_answer"] or uri
        for number, method in ((1, "ACK"), (2, "BYE")):
            its = [("Via", via.format(secrets.token_hex(8))), *beyond, ("CSeq", f"{number} {method}")]
            sock.send(encode(f"{method} {target} SIP/2.0", its), to)
        return told

    def answered(self, raw: bytes) -> None:
        """Something that looks like a response has come."""
        try:
            message = Message(raw)
        except Unreadable:
            return
        branch = message.get("via").partition("branch=z9hG4bK")[2].partition(";")[0]
        call = self._calls.get(branch)
        if call is None or not message.get("cseq").endswith("INVITE"):
            return
        call.heard.set()
        if message.status >= 200 and not call.final.done():
            call.final.set_result(message)
