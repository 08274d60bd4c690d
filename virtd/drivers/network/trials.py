# SPDX-License-Identifier: LGPL-2.1-or-later
"""The trials that a probe runs: guests ask for a lease and for names, send packets out of the network and to each
other.

Each trial is first sent as an unknown guest; if that fails, also as the connected guests and in other ways. A
firewall that lets any of these through is assumed to block the rest on purpose.
"""

from __future__ import annotations

import contextlib
import ipaddress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ...model.network import Mode, Protocol
from . import firewall, links, packets, ports, prerequisites, routes
from .kernel import Kernel
from .packets import SYN, Way
from .probe import ANSWERED, BRIDGED, FORWARD, INPUT, MACS, OUTER, RESOLVED, Trial
from .uplink import Connection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from ipaddress import IPv4Interface

    from ...model.network import Forward
    from .ports import Ground

ANSWER = "What the host answers to its guests' DHCP"
GUESTS = 4  # how many of the connected guests are tried as well
# Servers out on the internet; nothing is ever actually sent to them.
FAR = {4: "9.9.9.9", 6: "2620:fe::fe"}
# Address pairs to try on a host's bridge that has no address of its own.
ANYWHERE = (("10.118.0.8", "10.118.0.9"), ("192.168.118.8", "192.168.118.9"), ("172.30.118.8", "172.30.118.9"))


class Guest(NamedTuple):
    """The addresses that packets are sent from; "" for an address that the guest doesn't have."""

    mac: str
    ipv4: str = ""
    ipv6: str = ""


class Outside(NamedTuple):
    """An address `to` beyond the host, reached through `interface` from the host's address `host`; `near`: neighbours
    of the host there.
    """

    version: int
    to: str
    interface: str
    host: str
    near: tuple[str, ...]


def of(ground: Ground) -> list[Trial]:
    """All trials that apply to an active network. Raises OSError."""
    network = ground.network
    guests = _guests(ground)
    found = list(_asked(ground, guests)) if network.own else []
    if network.range4 is not None and _filters_output():
        # dnsmasq logs each of these requests, so make them only if a rule could block the answer.
        inform = partial(packets.dhcp_inform, MACS[0], address=guests[0].ipv4)
        found.append(Trial(ANSWER, 4, ANSWERED, (inform,), guests[0].ipv4))
    if network.mode in (Mode.NAT, Mode.ROUTED):
        found += _sent_out(ground, guests)
    # A foreign bridge without ports takes the MAC of its first port, and loses it along with the port.
    peopled = network.own or links.members(network.bridge_name)
    if peopled and not network.isolated_ports and is_filtered(network.bridge_name):
        found += _sent_over(ground, guests)
    return found


def _filters_output() -> bool:
    """Whether anybody filters what the host itself sends."""
    places = [(one.get("hook"), one.get("type")) for one in firewall.chains() if not firewall.is_ours(one["table"])]
    return any(hook == "output" and kind != "nat" for hook, kind in places) or bool(
        prerequisites.legacy_tables("ip_tables_names")
    )


def is_filtered(bridge: str) -> bool:
    """Whether the host's IP rules see the traffic of a bridge (br_netfilter)."""
    return any(
        "1"
        in (prerequisites.sysctl(f"net/bridge/bridge-nf-call-{tool}"), links.read(bridge, f"bridge/nf_call_{tool}"))
        for tool in ("iptables", "ip6tables")
    )


def _guests(ground: Ground) -> list[Guest]:
    """The guests to try as; the first is one that nobody knows."""
    network = ground.network
    four, six = network.interface4, network.interface6
    stranger = Guest(MACS[0], _free4(ground) if four else "", str(six.network[0x7664] if six else ""))
    known = [
        Guest(port.mac, port.ipv4 or "", str(ports.eui64(int(six.network[0]) >> 64, port.mac)) if six else "")
        for port in ground.ports[:GUESTS]
    ]
    return [stranger, *known]


def _free4(ground: Ground) -> str:
    """An address within the prefix that is probably unused."""
    network = ground.network
    assert network.interface4 is not None
    whole, given = network.interface4.network, network.range4
    taken = {one.ipv4 for one in network.host} | {one.ipv4 for one in ground.ports} | {str(network.interface4.ip)}
    for back in range(2, min(whole.num_addresses, 512)):
        address = whole[-back]
        if str(address) not in taken and not (given and given[0] <= address <= given[1]):
            return str(address)
    return str(whole[-2])


def _asked(ground: Ground, guests: list[Guest]) -> Iterator[Trial]:
    """What guests ask of the host."""
    network = ground.network
    four, six = network.interface4, network.interface6
    if four is not None:
        asking = tuple(partial(packets.arp_probe, one.mac, address=str(four.ip)) for one in guests[:1])
        yield Trial("ARP", 4, RESOLVED, asking)
    if network.range4 is not None:
        yield Trial("DHCP", 4, INPUT, tuple(partial(packets.dhcp_discover, one.mac) for one in guests))
    if network.dns and four is not None:
        ways = [Way(one.mac, one.ipv4, ground.mac, str(four.ip)) for one in guests if one.ipv4]
        yield Trial("DNS", 4, INPUT, tuple(partial(packets.dns_query, way) for way in ways))
    if network.dns and six is not None:
        ways = [Way(one.mac, one.ipv6, ground.mac, str(six.ip)) for one in guests]
        yield Trial("DNS", 6, INPUT, tuple(partial(packets.dns_query, way) for way in ways))
    if network.ipv6 is None or six is None:
        return
    if network.ipv6.dhcp:
        if network.range6 is not None or any(one.ipv6 for one in network.host):
            ways = [_to_all(one.mac, "ff02::1:2") for one in guests]
            yield Trial("DHCPv6", 6, INPUT, tuple(partial(packets.dhcp6_solicit, way) for way in ways))
        ways = [_to_all(one.mac, "ff02::2") for one in guests]
        yield Trial("ICMPv6", 6, INPUT, tuple(partial(packets.router_solicitation, way) for way in ways))
    asked = f"ff02::1:ff{int(six.ip) >> 16 & 0xFF:02x}:{int(six.ip) & 0xFFFF:x}"
    ways = [_to_all(one.mac, asked) for one in guests]
    yield Trial(
        "ICMPv6", 6, INPUT, tuple(partial(packets.neighbour_solicitation, way, target=str(six.ip)) for way in ways)
    )


def _to_all(mac: str, group: str) -> Way:
    """From `mac` to a link-local multicast group, and the group's MAC (RFC 2464)."""
    last = packets.packed(group)[-4:]
    return Way(mac, packets.link_local(mac), "33:33:" + ":".join(f"{byte:02x}" for byte in last), group)


def _sent_out(ground: Ground, guests: list[Guest]) -> Iterator[Trial]:
    """Packets that the host forwards for guests, the answers to them, and packets for each [[forward]]."""
    for version in (4, 6):
        mine = [(one.mac, one.ipv4 if version == 4 else one.ipv6) for one in guests]
        mine = [(mac, address) for mac, address in mine if address]
        if not mine:
            continue
        out = _outside(ground, version, mine[0][1])
        if out is None:
            continue
        ways = [Way(mac, address, ground.mac, out.to) for mac, address in mine]
        own = ground.network.interface4 if version == 4 else ground.network.interface6
        prefix = str(own.network) if own is not None else ""
        yield Trial(
            "What its guests send outside", version, FORWARD, tuple(_usual(ways)), out.to,
            source=prefix, translated=ground.network.mode is Mode.NAT,
        )  # fmt: skip
        yield from _answers(ground, out, mine[0][1])
        for forward in ground.network.forward:
            if (6 if ":" in forward.to else 4) == version:
                yield _forwarded(forward, out)


def _answers(ground: Ground, out: Outside, guest: str) -> Iterator[Trial]:
    port, to_port = 40054, 53  # used by no other trial, whose packets would belong to this connection too
    mine = out.host if ground.network.mode is Mode.NAT else guest
    way = partial(packets.udp, Way(MACS[0], out.to, OUTER, mine), source=to_port, to=port)
    connection = Connection(guest, mine, out.to, port, to_port)
    yield Trial("What is answered from outside", out.version, FORWARD, (way,), guest, out.interface, connection)


def _forwarded(forward: Forward, out: Outside) -> Trial:
    """Sent from far away and from the host's own neighbours, since the port may be meant for neighbours only."""
    ways: list[Callable[[int], bytes]] = []
    for source in dict.fromkeys([out.to, *out.near]):
        way = Way(MACS[0], source, OUTER, out.host)
        if forward.protocol is Protocol.TCP:
            ways.append(partial(packets.tcp, way, source=40443, to=forward.port, flags=SYN))
        else:
            ways.append(partial(packets.udp, way, source=40053, to=forward.port))
    what = f"What comes from outside for port {forward.port} ({forward.protocol})"
    port = str(forward.protocol), forward.port
    return Trial(what, out.version, FORWARD, tuple(ways), forward.to, out.interface, port=port)


def _usual(ways: list[Way]) -> Iterator[Callable[[int], bytes]]:
    """HTTP(S), DNS and ping."""
    for way in ways:
        yield partial(packets.tcp, way, source=40443, to=443, flags=SYN)
        yield partial(packets.dns_query, way)
        yield partial(packets.ping, way)
        yield partial(packets.tcp, way, source=40080, to=80, flags=SYN)


def _outside(ground: Ground, version: int, source: str) -> Outside | None:
    """Where the host would route packets from `source`, other than to the bridge; None if nowhere."""
    bridge = ground.network.bridge_name
    near = [
        (route.interface, str(route.prefix[at]))
        for route in routes.routes()
        if route.interface and route.prefix.prefixlen > 0
        if route.prefix.version == version and not links.read(route.interface, "ifalias").startswith("virtd network ")
        for at in (1, 2, -2)
        if route.prefix.num_addresses > 2
    ]
    with Kernel() as kernel:
        for to in [FAR[version], *(address for _interface, address in near[:16])]:
            with contextlib.suppress(OSError):
                away = kernel.route(to, source=source, iif=bridge).interface
                if away not in ("", bridge):
                    mine = kernel.route(to).source
                    beside = [address for interface, address in near if interface == away and address != mine]
                    return Outside(version, to, away, mine, tuple(beside[:3]))
    return None


def _sent_over(ground: Ground, guests: list[Guest]) -> Iterator[Trial]:
    """What guests send to each other."""
    network = ground.network
    pairs: list[tuple[str, str]] = []
    if network.interface4 is not None:
        pairs.append(_pair(network.interface4))
    elif not network.own:
        with Kernel() as kernel, contextlib.suppress(OSError):
            for address in kernel.addresses(network.bridge_name):
                if ":" not in address.address:
                    pairs.append(_pair(ipaddress.IPv4Interface(f"{address.address}/{address.prefix}")))
        pairs += ANYWHERE if not pairs else ()
    if pairs:
        ways = [Way(MACS[0], one, MACS[1], other) for one, other in pairs]
        yield Trial("What its guests send to each other", 4, BRIDGED, tuple(_usual(ways)))
    if network.interface6 is not None or not network.own:
        ways = [Way(MACS[0], packets.link_local(MACS[0]), MACS[1], packets.link_local(MACS[1]))]
        yield Trial("What its guests send to each other", 6, BRIDGED, tuple(_usual(ways)))


def _pair(interface: IPv4Interface) -> tuple[str, str]:
    whole = interface.network
    return str(whole[-2]), str(whole[-3 if whole.num_addresses > 4 else 1])
