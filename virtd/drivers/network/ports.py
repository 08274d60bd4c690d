# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ports of a network: the guest and interface of each, and its addresses.

A port gets its IPv4 address when it is connected, before its guest asks for one; dnsmasq then leases it that address.
So the rules know the address beforehand, and no daemon has to be running when the lease is given.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ... import errors, records

if TYPE_CHECKING:
    from collections.abc import Iterable
    from ipaddress import IPv6Address

    from ...model.network import Network
    from ...paths import Paths
    from .leases import Lease


class Port(msgspec.Struct, frozen=True, omit_defaults=True):
    """A port in the network's record, with the name that its interface has or will have.

    `ipv4`: the address reserved for it; None if a [[host]] has one or DHCP gives none. `loose`: connected by a virtd
    that reserved nothing, so its guest's address isn't known.
    """

    interface: str
    user: str
    mac: str
    trusted: bool = False
    ipv4: str | None = None
    loose: bool = False


class Ground(NamedTuple):
    """All that a network's rules are made from. `mac`: its bridge's; `others`: the interfaces in a bridge of the
    host's that aren't virtd's; `refused`: interfaces of ports that are kept out of the bridge.
    """

    network: Network
    mac: str
    ports: tuple[Port, ...]
    others: tuple[str, ...] = ()
    refused: frozenset[str] = frozenset()


def recorded(data: dict[str, Any]) -> tuple[Port, ...]:
    """The ports in a record's data."""
    try:
        return tuple(msgspec.convert(data.get("ports", []), list[Port]))
    except msgspec.ValidationError:  # written by a newer virtd
        return ()


def set_aside(network: Network, mac: str, others: Iterable[Port], leases: Iterable[Lease]) -> str | None:
    """An IPv4 address for the port with this MAC; None if DHCP gives none, or a [[host]] already has one.

    The address of its lease, unless somebody else has that; otherwise always the same one, as long as it is free.
    Raises HostError if none is free.
    """
    import ipaddress

    mac = mac.lower()
    if (given := network.range4) is None or network.interface4 is None:
        return None
    if any(host.mac.lower() == mac and host.ipv4 for host in network.host):
        return None
    taken = {host.ipv4 for host in network.host} | {forward.to for forward in network.forward}
    taken |= {port.ipv4 for port in others} | {str(network.interface4.ip)}
    mine = [lease.address for lease in leases if lease.family == "ipv4" and lease.mac == mac]
    taken |= {lease.address for lease in leases if lease.family == "ipv4" and lease.mac != mac}
    first, last = (int(end) for end in given)
    for address in mine:
        if address not in taken and first <= int(ipaddress.IPv4Address(address)) <= last:
            return address
    size = last - first + 1
    start = zlib.crc32(mac.encode())
    for step in range(min(size, len(taken) + 1)):
        address = str(ipaddress.IPv4Address(first + (start + step) % size))
        if address not in taken:
            return address
    raise errors.HostError(
        f"Network {network.name} has no IPv4 address left: all of {given[0]} to {given[1]} are given or leased",
        hint="Make its range wider, or give guests addresses outside of it by [[host]].",
    )


def eui64(prefix: int, mac: str) -> IPv6Address:
    """The address that a guest derives from its MAC (RFC 4291, appendix A); `prefix`: the upper 64 bits."""
    import ipaddress

    digits = bytearray.fromhex(mac.replace(":", ""))
    digits[0] ^= 2
    return ipaddress.IPv6Address(prefix << 64 | int.from_bytes(digits[:3] + b"\xff\xfe" + digits[3:], "big"))


def taken_over(paths: Paths, interface: str, user: str, leases: Iterable[Lease]) -> Port | None:
    """A port that an older virtd connected, with the MAC from its guest's record; None if that can't be found."""
    kind, _, name = user.partition("/")
    try:
        with open(paths.record(kind, name), "rb") as file:
            data = records.decode(file.read()).data
        macs = {str(nic["interface"]): str(nic["mac"]) for nic in data.get("nics", [])}
        macs |= dict(zip(data.get("interfaces", []), (mac for mac, _network in data.get("macs", [])), strict=False))
        mac = macs[interface].lower()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    mine = [lease.address for lease in leases if lease.family == "ipv4" and lease.mac == mac]
    return Port(interface, user, mac, ipv4=mine[0] if mine else None, loose=True)
