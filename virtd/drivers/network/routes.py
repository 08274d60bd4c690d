# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's routes, and which of them would win over a network's own.

A packet takes the most specific route. So a broader route, such as a VPN's default route or one to nowhere, is none
of a network's business; an equal route, or one to a part of the prefix, is. What policy routing rules make of them is
asked of the kernel, see wanted.py.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from ... import errors
from . import prerequisites

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from ipaddress import IPv4Address, IPv6Address

    from ...model.network import Network, Subnet

# linux/route.h, linux/ipv6_route.h: unreachable; one of the host's own addresses; anycast
_REJECT, _LOCAL, _ANYCAST = 0x0200, 0x80000000, 0x00100000


class Route(NamedTuple):
    """A route of the main table; `interface` "": leads nowhere."""

    prefix: Subnet
    interface: str
    gateway: IPv4Address | IPv6Address | None = None


def routes(most: int | None = None) -> list[Route]:
    """IPv4 and IPv6 routes except link-local ones; only the first `most` of each, for callers who ask often."""
    return [*_routes4(most), *_routes6(most)]


def _routes4(most: int | None) -> Iterator[Route]:
    import ipaddress

    for line in prerequisites.lines("net/route", most, skip=1):
        fields = line.split()
        # Eight hexadecimal digits each, in the machine's byte order.
        address, gateway, mask = (struct.pack("=I", int(fields[at], 16)) for at in (1, 2, 7))
        prefix = ipaddress.IPv4Network((address, bin(int.from_bytes(mask, "big")).count("1")), strict=False)
        nowhere = int(fields[3], 16) & _REJECT
        yield Route(prefix, "" if nowhere else fields[0], ipaddress.IPv4Address(gateway) if any(gateway) else None)


def _routes6(most: int | None) -> Iterator[Route]:
    import ipaddress

    for line in prerequisites.lines("net/ipv6_route", most):
        fields = line.split()
        flags = int(fields[8], 16)
        prefix = ipaddress.IPv6Network((bytes.fromhex(fields[0]), int(fields[1], 16)), strict=False)
        # This lists the local table too: the host's own addresses, on whatever interface.
        if flags & (_LOCAL | _ANYCAST) or prefix.is_link_local or prefix.is_multicast:
            continue
        nowhere = flags & _REJECT
        if fields[9] == "lo" and not nowhere:
            continue
        gateway = ipaddress.IPv6Address(bytes.fromhex(fields[4]))
        yield Route(prefix, "" if nowhere else fields[9], gateway if int(gateway) else None)


def in_the_way(subnet: Subnet, interface: str, there: Iterable[Route]) -> str:
    """Why other routes keep `subnet` from being behind `interface`; "" if none does."""
    others = [route for route in there if route.prefix.version == subnet.version]
    others = [route for route in others if not interface or route.interface != interface]
    for route in others:
        if route.prefix.overlaps(subnet) and route.prefix.prefixlen >= subnet.prefixlen:
            by = f"through {route.interface}" if route.interface else "to nowhere"
            return f"{subnet} collides with {route.prefix}, to which the host has a route {by}"
    for route in others:
        if route.gateway is not None and route.gateway in subnet:
            return f"{subnet} collides with the host's router {route.gateway}, which is behind {route.interface}"
    return ""


def check(network: Network, source: str) -> None:
    """Refuse a prefix that the host reaches another way. Raises InvalidDefinition."""
    if not network.own:
        return
    there = routes()
    for key, subnet in network.subnets():
        if why := in_the_way(subnet, network.bridge_name, there):
            raise errors.InvalidDefinition(
                source, key, why, hint="Choose another prefix. ip route and ip -6 route show what is taken."
            )


def free_prefix(taken: Iterable[Subnet]) -> str:
    """An address with a prefix for a new network, such as "192.168.124.1/24", that collides with nothing on the host.

    `taken`: prefixes of all defined networks, active or not. Raises HostError.
    """
    import ipaddress

    there, taken = routes(), list(taken)
    known = [route for route in there if route.prefix.version == 4 and route.prefix.prefixlen > 0]
    # Not 192.168.0.0 to .99, which home and office routers use, nor 192.168.122.0, which is libvirt's everywhere.
    candidates = [f"192.168.{third}.0/24" for third in range(124, 255)]
    candidates += [f"10.{second}.{third}.0/24" for second in range(200, 255) for third in (100, 150, 200)]
    candidates += [f"172.{second}.200.0/24" for second in range(20, 32)]
    prefixes = [ipaddress.IPv4Network(text) for text in candidates]
    free = [one for one in prefixes if not any(other.version == 4 and other.overlaps(one) for other in taken)]
    # Preferably one that the host has no route to at all, not even a broader one.
    best = [one for one in free if not any(route.prefix.overlaps(one) for route in known)]
    for prefix in best or [one for one in free if not in_the_way(one, "", there)]:
        return f"{prefix.network_address + 1}/{prefix.prefixlen}"
    raise errors.HostError(
        "No free private range was found for the network", hint="Write a definition with an ipv4.address of yours."
    )
