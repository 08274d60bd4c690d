# SPDX-License-Identifier: LGPL-2.1-or-later
"""A network as a person defines it, typed; see networkchecks.py for what types can't say."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import msgspec

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network

    Subnet = IPv4Network | IPv6Network

INTERFACE_MAX = 15  # IFNAMSIZ less its NUL, netdevice(7)


class Mode(StrEnum):
    """How a network is connected with the rest of the world."""

    NAT = "nat"
    ROUTED = "routed"
    ISOLATED = "isolated"
    BRIDGE = "bridge"


class Protocol(StrEnum):
    """What a [[forward]] forwards."""

    TCP = "tcp"
    UDP = "udp"


class Ipv4(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The host's own address on the bridge, with the prefix, and what dnsmasq gives to guests."""

    address: str
    dhcp: bool = True
    first: str | None = None
    last: str | None = None
    lease: str = "1h"


class Ipv6(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The same for IPv6; with `dhcp`, guests get router advertisements too."""

    address: str
    dhcp: bool = True
    first: str | None = None
    last: str | None = None
    lease: str = "1h"


class Lease(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the guest with this MAC gets: a name, addresses, or both."""

    mac: str
    name: str | None = None
    ipv4: str | None = None
    ipv6: str | None = None


class Name(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A name for the network's DNS, besides those of the guests."""

    name: str
    address: str


class Forward(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A port of the host's that leads to a guest."""

    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    to: str
    to_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None
    protocol: Protocol = Protocol.TCP


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A network's definition."""

    name: str
    uuid: str | None = None
    mode: Mode = Mode.NAT
    bridge: str | None = None
    mtu: Annotated[int, msgspec.Meta(ge=576, le=65535)] | None = None
    autostart: bool = False
    domain: str | None = None
    dns: bool = True
    isolated_ports: bool = False
    checksum_offload: bool = False
    dnsmasq: tuple[str, ...] = ()
    ipv4: Ipv4 | None = None
    ipv6: Ipv6 | None = None
    host: tuple[Lease, ...] = ()
    record: tuple[Name, ...] = ()
    forward: tuple[Forward, ...] = ()

    @property
    def bridge_name(self) -> str:
        """The bridge's name, as given, or made of the network's."""
        if self.bridge is not None:
            return self.bridge
        plain = f"vd-{self.name}"
        if len(plain) <= INTERFACE_MAX:
            return plain
        import zlib

        return f"vd-{self.name[:3]}-{zlib.crc32(self.name.encode()):08x}"

    @property
    def own(self) -> bool:
        """Whether virtd makes the bridge, and all that goes with it."""
        return self.mode is not Mode.BRIDGE

    @property
    def serves(self) -> bool:
        """Whether there is anything for dnsmasq to do."""
        return self.own and (self.dns or any(ip is not None and ip.dhcp for ip in (self.ipv4, self.ipv6)))

    @property
    def interface4(self) -> IPv4Interface | None:
        import ipaddress

        return ipaddress.IPv4Interface(self.ipv4.address) if self.ipv4 is not None else None

    @property
    def interface6(self) -> IPv6Interface | None:
        import ipaddress

        return ipaddress.IPv6Interface(self.ipv6.address) if self.ipv6 is not None else None

    @property
    def range4(self) -> tuple[IPv4Address, IPv4Address] | None:
        """First and last address that DHCP gives out; without a range in the definition, what the prefix has."""
        interface = self.interface4
        if self.ipv4 is None or interface is None or not self.ipv4.dhcp:
            return None
        import ipaddress

        if self.ipv4.first is not None and self.ipv4.last is not None:
            return ipaddress.IPv4Address(self.ipv4.first), ipaddress.IPv4Address(self.ipv4.last)
        low, high = interface.network.network_address + 1, interface.network.broadcast_address - 1
        # The longer side of the host's own address, which mustn't be in it.
        if int(interface.ip) - int(low) > int(high) - int(interface.ip):
            return low, interface.ip - 1
        return interface.ip + 1, high

    @property
    def range6(self) -> tuple[IPv6Address, IPv6Address] | None:
        """The same for DHCPv6; without a range in the definition there is none, and guests make their addresses."""
        if self.ipv6 is None or not self.ipv6.dhcp or self.ipv6.first is None or self.ipv6.last is None:
            return None
        import ipaddress

        return ipaddress.IPv6Address(self.ipv6.first), ipaddress.IPv6Address(self.ipv6.last)

    def subnets(self) -> list[tuple[str, Subnet]]:
        """The prefixes in use, each with the key that says so."""
        found = (("ipv4.address", self.interface4), ("ipv6.address", self.interface6))
        return [(key, interface.network) for key, interface in found if interface is not None]
