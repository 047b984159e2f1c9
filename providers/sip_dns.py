"""Where the direct sender finds a registrar: addresses in the order to try, all checked (sip-registration.md §3, DNS).

In: a host that somebody configured, perhaps a port, and the account's transport. Out: up to five targets, or `NotSent`.

An address, or a name with a port, is taken at its word: A and AAAA only. Any other name is asked for SRV records of the
account's transport, then for its own addresses. NAPTR is left out: it chooses a transport (RFC 3263 §4.1), and an
account has its own. Nor is SRV asked for a name without a dot: those are local ones, of a hosts file or a container.

Names become addresses by the system's resolver, which knows the hosts file; by the configured nameserver if there is
one. Whatever DNS says, only public addresses and allowed networks come out (security-reliability.md R6).
"""

import asyncio
import random
import re
import time
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from ipaddress import ip_address
from itertools import islice
from typing import NamedTuple

import dns.asyncresolver
import dns.exception
import dns.name
import dns.rdatatype
import dns.resolver
from dns.rdtypes.IN.SRV import SRV

from providers import guard
from providers.sip import Transport
from providers.sip_flight import NotSent, Trouble
from providers.sip_message import host_in_uri

DEADLINE = 5.0  # seconds for all that has to be looked up
_MOST = 5  # targets
_OF_ONE_NAME = 2  # … of one SRV target where there are several, so that one name doesn't crowd out the other sites
_OURS = 0.9  # of the deadline, in which a name that hangs fails by itself and leaves what the others have found
_TRY = 1.0  # seconds after which a nameserver is asked again
_PORTS = {Transport.UDP: 5060, Transport.TCP: 5060, Transport.TLS: 5061}
_SERVICES = {Transport.UDP: "_sip._udp", Transport.TCP: "_sip._tcp", Transport.TLS: "_sips._tcp"}
_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*", re.ASCII)

_random = random.SystemRandom()


class Target(NamedTuple):
    """An address to send to."""

    address: str
    port: int
    transport: Transport
    host_for_tls: str  # whom its certificate must name: the host as configured, never what DNS made of it

    @property
    def where(self) -> str:
        """`udp/192.0.2.1:5060`."""
        return f"{self.transport}/{at(self.address, self.port)}"


class Plan(NamedTuple):
    """Where to send, in order, and sentences on what was looked up and found."""

    targets: tuple[Target, ...]
    notes: tuple[str, ...]


class _Service(NamedTuple):
    """An SRV record. The lower priority comes first."""

    priority: int
    weight: int
    host: str
    port: int


def at(host: str, port: int) -> str:
    """`host:port`, with an IPv6 address in brackets."""
    return f"{host_in_uri(host)}:{port}"


async def targets(
    host: str,
    port: int | None,
    transport: Transport,
    *,
    allowed: Collection[guard.Network],
    nameserver: str | None = None,
    deadline: float = DEADLINE,
    dice: random.Random | None = None,
    notes: list[str] | None = None,
    lookup: guard.Lookup | None = None,
) -> Plan:
    """The targets of a host. `notes` is given by who wants to read them after a failure as well.

    Raises `NotSent`: temporary where DNS has no answer in time or no such name, permanent where the host is no name or
    leads to an address that is neither public nor in `allowed`.
    """
    said: list[str] = [] if notes is None else notes
    search = _Search(host, transport, allowed, _Names(nameserver, lookup or _system_names(), deadline), said)
    try:
        async with asyncio.timeout(deadline):
            found = await search.targets(port, dice or _random)
    except TimeoutError:
        raise NotSent(Trouble.TEMPORARY, f"DNS: no answer for {host}") from None
    said.append(f"to try, in order: {', '.join(target.where for target in found)}")
    return Plan(tuple(found), tuple(said))


class _Search:
    """One host's way to targets."""

    def __init__(
        self, host: str, transport: Transport, allowed: Collection[guard.Network], names: "_Names", notes: list[str]
    ) -> None:
        self._host, self._transport, self._allowed = host.strip("[]"), transport, allowed
        self._names, self._notes = names, notes

    async def targets(self, port: int | None, dice: random.Random) -> list[Target]:
        """At most five, never none."""
        usual = _PORTS[self._transport]
        literal = _literal(self._host)
        if literal is not None:
            self._notes.append(f"{literal} is an address: nothing to look up")
            return self._checked([(literal, port or usual)])
        _require_name(self._host)
        if port is not None:
            self._notes.append(f"a port is given: no SRV is asked for, only addresses of {self._host}")
        elif "." not in self._host:
            self._notes.append(f"{self._host} has no dot: no SRV is asked for, only its addresses")
        elif services := list(islice(_drawn(await self._services(), dice), _MOST)):
            return self._checked(await self._of_services(services))
        addresses = await self._names.addresses(self._host)
        self._notes.append(_found(self._host, addresses))
        return self._checked([(address, port or usual) for address in addresses])

    async def _services(self) -> list[_Service]:
        """The SRV records; none where there are none or nobody tells in time. Raises `NotSent` on a plain no."""
        name = f"{_SERVICES[self._transport]}.{self._host}"
        try:
            records = await self._names.services(name)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            self._notes.append(f"SRV {name}: none")
            return []
        except (dns.exception.DNSException, OSError) as error:
            # A nameserver that fails at SRV alone is common enough; the name's own addresses may do.
            self._notes.append(f"SRV {name}: no answer ({type(error).__name__})")
            return []
        if [record.host for record in records] == ["."]:  # RFC 2782: decidedly not available
            raise NotSent(Trouble.TEMPORARY, f"DNS: {self._host} offers no SIP over {self._transport.upper()}")
        usable = [record for record in records if _NAME.fullmatch(record.host) and record.port]
        if odd := len(records) - len(usable):
            self._notes.append(f"SRV {name}: {odd} without a usual name and port, left out")
        said = ", ".join(
            f"{record.host}:{record.port} (priority {record.priority}, weight {record.weight})"
            for record in sorted(usable)[:_MOST]
        )
        self._notes.append(f"SRV {name}: {said or 'nothing of use'}{', …' if len(usable) > _MOST else ''}")
        return usable

    async def _of_services(self, services: Sequence[_Service]) -> list[tuple[str, int]]:
        """Addresses and ports of SRV records in their order. One name that cannot be found stops no other."""
        hosts = list(dict.fromkeys(service.host for service in services))
        answers = dict(
            zip(hosts, await asyncio.gather(*map(self._names.addresses, hosts), return_exceptions=True), strict=True)
        )
        found: list[tuple[str, int]] = []
        for service in services:
            answer = answers[service.host]
            if isinstance(answer, NotSent):
                self._notes.append(answer.text)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                self._notes.append(_found(service.host, answer))
                found += [(one, service.port) for one in answer[: _MOST if len(services) == 1 else _OF_ONE_NAME]]
        if not found:
            raise NotSent(Trouble.TEMPORARY, f"DNS: no address for any SRV target of {self._host}")
        return found

    def _checked(self, found: Sequence[tuple[str, int]]) -> list[Target]:
        """All must be fit to see, as in `guard`: a name that leads inside once is not to be trusted with the rest."""
        for address, _ in found:
            one = ip_address(address)
            if not guard.may_reach(one, self._allowed):
                raise NotSent(
                    Trouble.PERMANENT,
                    f"{self._host} leads to an address that is not public; SIP_ALLOWED_NETWORKS may allow it",
                )
        unique = dict.fromkeys(found)
        return [Target(address, port, self._transport, self._host) for address, port in unique][:_MOST]


class _Names:
    """Names looked up, at a nameserver of ours or as the system does."""

    def __init__(self, nameserver: str | None, lookup: guard.Lookup, deadline: float) -> None:
        self._nameserver, self._lookup = nameserver or None, lookup
        self._ends_at = time.monotonic() + _OURS * deadline

    async def services(self, name: str) -> list[_Service]:
        """SRV records. Half of what time there is: the other half is for addresses. Raises dnspython's errors."""
        answer = await (await self._resolver()).resolve(name, dns.rdatatype.SRV, lifetime=self._left() / 2)
        return [
            _Service(record.priority, record.weight, record.target.to_text(omit_final_dot=True), record.port)
            for record in answer
            if isinstance(record, SRV)
        ]

    async def addresses(self, host: str) -> list[str]:
        """Checked by nobody yet, IPv4 first where a nameserver of ours was asked. Raises `NotSent` for none."""
        if (literal := _literal(host)) is not None:
            return [literal]
        if self._nameserver is None:
            return await self._of_system(host)
        both = await asyncio.gather(
            self._records(host, dns.rdatatype.A), self._records(host, dns.rdatatype.AAAA), return_exceptions=True
        )
        found = [address for answer in both if isinstance(answer, list) for address in answer]
        for error in both:
            if isinstance(error, BaseException) and not isinstance(error, dns.exception.DNSException | OSError):
                raise error
            if isinstance(error, dns.exception.DNSException | OSError) and not found:
                raise _unfound(host, error)
        if not found:
            raise NotSent(Trouble.TEMPORARY, f"DNS: {host} has no address")
        return found

    async def _of_system(self, host: str) -> list[str]:
        try:
            return list(await self._lookup.addresses(host, self._left()))
        except TimeoutError:
            raise NotSent(Trouble.TEMPORARY, f"DNS: no answer for {host}") from None
        except (OSError, ValueError) as error:  # ValueError: what cannot be written as a name
            raise _unfound(host, error) from None

    async def _records(self, host: str, kind: dns.rdatatype.RdataType) -> list[str]:
        try:
            answer = await (await self._resolver()).resolve(host, kind, lifetime=self._left())
        except dns.resolver.NoAnswer:
            return []
        return [record.to_text() for record in answer]

    async def _resolver(self) -> dns.asyncresolver.Resolver:
        if self._nameserver is None:
            resolver = dns.asyncresolver.Resolver()
        else:
            resolver = dns.asyncresolver.Resolver(configure=False)
            server, _, port = self._nameserver.rpartition(":")
            if not port.isdigit():
                server, port = self._nameserver, "53"
            server = server.strip("[]")
            resolver.nameservers = [_literal(server) or (await self._of_system(server))[0]]
            resolver.port = int(port)
        resolver.timeout = _TRY
        return resolver

    def _left(self) -> float:
        return max(self._ends_at - time.monotonic(), 0.01)


@cache
def _system_names() -> guard.Lookup:
    """The system's resolver in threads that are not the loop's own: names that hang take none away from others."""
    return guard.Lookup()


def _drawn(services: Sequence[_Service], dice: random.Random) -> Iterator[_Service]:
    """By priority; among equals at random by weight, those without weight last but for luck (RFC 2782)."""
    left = sorted(services)
    while left:
        equals = [service for service in left if service.priority == left[0].priority]
        mark = dice.randint(0, sum(service.weight for service in equals))
        for service in equals:
            mark -= service.weight
            if mark <= 0:
                break
        left.remove(service)
        yield service


def _require_name(host: str) -> None:
    try:
        # Names beyond ASCII too, as DNS writes them.
        ascii_name = dns.name.from_text(host).to_text(omit_final_dot=True)
    except (dns.exception.DNSException, UnicodeError):
        ascii_name = ""
    if len(ascii_name) > 253 or not _NAME.fullmatch(ascii_name):
        raise NotSent(Trouble.PERMANENT, "DNS: the host is not a name that can be looked up")


def _literal(host: str) -> str | None:
    """The address that a host is, not that it has."""
    try:
        return str(ip_address(host))
    except ValueError:
        return None


def _found(host: str, addresses: Sequence[str]) -> str:
    return f"{host} is {', '.join(addresses[:_MOST])}{', …' if len(addresses) > _MOST else ''}"


def _unfound(host: str, error: Exception) -> NotSent:
    if isinstance(error, dns.resolver.NXDOMAIN):
        return NotSent(Trouble.TEMPORARY, f"DNS: there is no name {host}")
    if isinstance(error, dns.exception.Timeout):
        return NotSent(Trouble.TEMPORARY, f"DNS: no answer for {host}")
    if isinstance(error, OSError | UnicodeError):
        return NotSent(Trouble.TEMPORARY, f"DNS: {host} cannot be found")
    return NotSent(Trouble.TEMPORARY, f"DNS: {host} cannot be found ({type(error).__name__})")
