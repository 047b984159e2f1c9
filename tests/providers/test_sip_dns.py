"""Where a SIP host leads, by a nameserver that says anything."""

import asyncio
import random
from collections import Counter
from ipaddress import ip_network

import pytest

from providers import sip_dns
from providers.sip import Transport
from providers.sip_dns import Plan
from providers.sip_flight import NotSent, Trouble
from tests.providers.sip_names import Zone, a_nameserver

LOOPBACK = [ip_network("127.0.0.0/8")]


def plan(
    zone: Zone,
    host: str = "pombal.test",
    port: int | None = None,
    transport: Transport = Transport.UDP,
    *,
    silent: str = "",
    failing: str = "",
    deadline: float = 5.0,
    seed: int = 1,
) -> tuple[Plan, list[tuple[str, str]]]:
    """The plan for a host, and what was asked for it."""

    async def made() -> tuple[Plan, list[tuple[str, str]]]:
        async with a_nameserver(zone, silent=silent, failing=failing) as names:
            found = await sip_dns.targets(
                host,
                port,
                transport,
                allowed=LOOPBACK,
                nameserver=names.address,
                deadline=deadline,
                dice=random.Random(seed),  # noqa: S311 - a test's dice
            )
            return found, names.asked

    return asyncio.run(made())


def where(found: Plan) -> list[str]:
    return [target.where for target in found.targets]


def test_an_address_and_a_port_need_no_dns() -> None:
    found, asked = plan({}, "8.8.8.8", 5080, Transport.TCP)

    assert where(found) == ["tcp/8.8.8.8:5080"]
    assert asked == []


@pytest.mark.parametrize(("transport", "port"), [(Transport.UDP, 5060), (Transport.TCP, 5060), (Transport.TLS, 5061)])
def test_without_srv_the_names_own_addresses_are_taken_with_the_usual_port(transport: Transport, port: int) -> None:
    found, _ = plan({("pombal.test", "A"): ["127.0.0.1", "8.8.8.8"]}, transport=transport)

    assert sorted(where(found)) == [f"{transport}/127.0.0.1:{port}", f"{transport}/8.8.8.8:{port}"]


def test_a_name_with_a_port_is_not_asked_for_srv() -> None:
    found, asked = plan({("pombal.test", "A"): ["127.0.0.1"]}, port=5090)

    assert where(found) == ["udp/127.0.0.1:5090"]
    assert {kind for _, kind in asked} == {"A", "AAAA"}


def test_srv_targets_come_by_priority_and_two_addresses_of_each() -> None:
    found, asked = plan(
        {
            ("_sips._tcp.pombal.test", "SRV"): ["20 0 5071 b.pombal.test.", "10 5 5061 a.pombal.test."],
            ("a.pombal.test", "A"): ["127.0.0.1", "127.0.0.2", "127.0.0.3"],
            ("b.pombal.test", "A"): ["127.0.0.4"],
        },
        transport=Transport.TLS,
    )

    assert [target.port for target in found.targets] == [5061, 5061, 5071]
    assert where(found)[2] == "tls/127.0.0.4:5071"
    assert {target.host_for_tls for target in found.targets} == {"pombal.test"}
    assert asked[0] == ("_sips._tcp.pombal.test", "SRV")
    assert any("priority 10, weight 5" in note for note in found.notes)


def test_among_equals_chance_draws_by_weight() -> None:
    services = [sip_dns._Service(10, 90, "heavy", 1), sip_dns._Service(10, 10, "light", 1)]
    services += [sip_dns._Service(5, 0, "first", 1)]
    dice = random.Random(1)  # noqa: S311 - a test's dice

    drawn = [[one.host for one in sip_dns._drawn(services, dice)] for _ in range(1_000)]

    assert {tuple(sorted(one)) for one in drawn} == {("first", "heavy", "light")}
    assert {one[0] for one in drawn} == {"first"}
    assert 820 < Counter(one[1] for one in drawn)["heavy"] < 970


def test_one_srv_target_that_is_not_there_stops_no_other() -> None:
    found, _ = plan(
        {
            ("_sip._udp.pombal.test", "SRV"): ["10 0 5060 gone.pombal.test.", "20 0 5060 b.pombal.test."],
            ("b.pombal.test", "AAAA"): ["2606:4700::1111"],
        }
    )

    assert where(found) == ["udp/[2606:4700::1111]:5060"]
    assert "DNS: there is no name gone.pombal.test" in found.notes


@pytest.mark.parametrize(("silent", "failing"), [("SRV", ""), ("", "SRV")])
def test_a_nameserver_that_fails_at_srv_alone_does_not_stop_us(silent: str, failing: str) -> None:
    found, _ = plan({("pombal.test", "A"): ["127.0.0.1"]}, silent=silent, failing=failing, deadline=3.0)

    assert where(found) == ["udp/127.0.0.1:5060"]
    assert any("no answer" in note for note in found.notes)


@pytest.mark.parametrize(
    ("zone", "text"),
    [
        ({}, "DNS: there is no name pombal.test"),
        ({("pombal.test", "MX"): ["10 a."]}, "DNS: pombal.test has no address"),
        ({("_sip._udp.pombal.test", "SRV"): ["0 0 0 ."]}, "DNS: pombal.test offers no SIP over UDP"),
        (
            {("_sip._udp.pombal.test", "SRV"): ["0 0 5060 a.pombal.test."]},
            "DNS: no address for any SRV target of pombal.test",
        ),
    ],
)
def test_a_name_that_leads_nowhere_may_lead_somewhere_later(zone: Zone, text: str) -> None:
    with pytest.raises(NotSent) as failure:
        plan(zone)

    assert (failure.value.trouble, failure.value.text) == (Trouble.TEMPORARY, text)


def test_a_silent_nameserver_costs_no_more_than_the_deadline() -> None:
    with pytest.raises(NotSent, match=r"DNS: no answer for pombal\.test") as failure:
        plan({}, silent="SRV A AAAA", deadline=0.2)

    assert failure.value.trouble is Trouble.TEMPORARY


@pytest.mark.parametrize("host", ["a b", "sip:pombal.test", "pombal.test\r\nVia: x", "", ".", "x" * 64, "a..b", "a;b"])
def test_what_is_no_name_is_not_looked_up_and_not_repeated(host: str) -> None:
    with pytest.raises(NotSent) as failure:
        plan({}, host)

    assert failure.value.trouble is Trouble.PERMANENT
    assert failure.value.text == "DNS: the host is not a name that can be looked up"


@pytest.mark.parametrize("host", ["10.1.2.3", "[::1]", "169.254.169.254", "::ffff:127.0.0.1", "inside.pombal.test"])
def test_nothing_leads_inside_unless_an_operator_allows_it(host: str) -> None:
    with pytest.raises(NotSent, match="not public; SIP_ALLOWED_NETWORKS") as failure:
        plan({("inside.pombal.test", "A"): ["8.8.8.8", "192.168.1.1"]}, host)

    assert failure.value.trouble is Trouble.PERMANENT


def test_hostile_answers_are_bounded_and_their_odd_names_left_out() -> None:
    srv = [f"{number} 0 5060 host{number}.pombal.test." for number in range(200)]
    addresses = {
        (f"host{number}.pombal.test", "A"): [f"127.0.{number}.{one}" for one in (1, 2, 3)] for number in range(9)
    }

    found, asked = plan(
        {("_sip._udp.pombal.test", "SRV"): ["0 0 5060 a\\010b.test.", "0 0 0 c.test.", *srv], **addresses}
    )

    assert len(found.targets) == 5
    assert len(asked) <= 1 + 2 * 5
    assert max(map(len, found.notes)) < 500
    assert "\\010" not in "".join(found.notes)


def test_names_of_the_hosts_file_are_known_without_a_nameserver() -> None:
    found = asyncio.run(sip_dns.targets("localhost", None, Transport.UDP, allowed=[*LOOPBACK, ip_network("::1/128")]))

    assert "udp/127.0.0.1:5060" in where(found)
