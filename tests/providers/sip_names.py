"""A nameserver for SIP tests: it says what a zone says, or nothing."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import cast

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

# {(name, type): values as in a zone file}. A name that is there with another type has no answer; one that is not, none.
Zone = Mapping[tuple[str, str], list[str]]


class Nameserver(asyncio.DatagramProtocol):
    """What it was asked is in `asked`, in order. `silent` types get no answer, `failing` ones SERVFAIL."""

    def __init__(self, zone: Zone, silent: frozenset[str], failing: frozenset[str]) -> None:
        self._zone, self._silent, self._failing = zone, silent, failing
        self.asked: list[tuple[str, str]] = []
        self.address = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)
        self.address = "127.0.0.1:{}".format(transport.get_extra_info("sockname")[1])

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        question = query.question[0]
        name, kind = question.name.to_text(omit_final_dot=True), dns.rdatatype.to_text(question.rdtype)
        self.asked.append((name, kind))
        if kind in self._silent:
            return
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.RA
        if kind in self._failing:
            answer.set_rcode(dns.rcode.SERVFAIL)
        elif values := self._zone.get((name, kind)):
            answer.answer.append(dns.rrset.from_text_list(question.name, 60, "IN", kind, values))
        elif all(known != name for known, _ in self._zone):
            answer.set_rcode(dns.rcode.NXDOMAIN)
        self._transport.sendto(answer.to_wire(), addr)


@asynccontextmanager
async def a_nameserver(zone: Zone, *, silent: str = "", failing: str = "") -> AsyncIterator[Nameserver]:
    """`silent` and `failing`: types, separated by spaces."""
    made = Nameserver(zone, frozenset(silent.split()), frozenset(failing.split()))
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: made, local_addr=("127.0.0.1", 0))
    try:
        yield made
    finally:
        transport.abort()
        await asyncio.sleep(0)  # the socket is closed in the loop's next round
