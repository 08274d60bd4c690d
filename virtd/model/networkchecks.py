# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads the definition of a network and checks what types can't say, without looking at the host.

Whether a prefix collides with a route of the host's, or a bridge's name is taken, is the driver's question.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .. import errors
from . import document, naming
from .document import shown
from .naming import MAC
from .network import INTERFACE_MAX, Mode, Network

if TYPE_CHECKING:
    from .network import Ipv4, Ipv6

INTERFACE = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}"
LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
LEASE = r"(?:[1-9][0-9]{0,7}[smhdw]?|infinite)"
OPTION = r"([a-z][a-z0-9-]*)(?:=.*)?"
LEASE_MIN = 120  # seconds; dnsmasq(8) takes no less
HOSTS_MAX = 4096
PREFIX6 = 64  # what router advertisements and the addresses that guests make of them need

# What virtd itself tells dnsmasq. An option of these names would take it out of virtd's hands, or off its interface.
OWNED = frozenset({
    "bind-dynamic", "bind-interfaces", "conf-dir", "conf-file", "conf-script", "daemon", "dhcp-alternate-port",
    "dhcp-hostsdir", "dhcp-hostsfile", "dhcp-leasefile", "dhcp-range", "domain", "except-interface", "group",
    "hostsdir", "interface", "keep-in-foreground", "leasefile-ro", "listen-address", "log-facility", "no-daemon",
    "pid-file", "servers-file", "user",
})  # fmt: skip


def parse(text: str, source: str) -> Network:
    """The definition that `text` (TOML) holds. `source` is the file's name in errors.

    Raises InvalidDefinition with the key and what was expected.
    """
    network = document.decode(text, source, Network)
    check(network, source)
    return naming.canonical(network, network.uuid)


def check(network: Network, source: str) -> None:
    """Everything that a type can't say. Raises InvalidDefinition at the first thing that is wrong."""
    _Check(network, source).all()


class _Check:
    """Everything that a type can't say of one definition."""

    def __init__(self, network: Network, source: str) -> None:
        self.network = network
        self.source = source

    def refuse(self, key: str, expected: str, hint: str = "") -> errors.InvalidDefinition:
        return errors.InvalidDefinition(self.source, key, expected, hint=hint)

    def all(self) -> None:
        network = self.network
        naming.check(network, self.refuse)
        self.bridge()
        if network.mode is Mode.BRIDGE:
            self.nothing_else()
            return
        if network.domain is not None:
            self.dns_name("domain", network.domain)
        self.ipv4()
        self.ipv6()
        self.mtu()
        self.leases()
        self.records()
        self.forwards()
        self.options()

    def bridge(self) -> None:
        bridge = self.network.bridge
        if bridge is None:
            if self.network.mode is Mode.BRIDGE:
                raise self.refuse("bridge", 'expected the name of a bridge of the host\'s, since mode is "bridge"')
            return
        if len(bridge) > INTERFACE_MAX:
            raise self.refuse(
                "bridge",
                f"expected at most {INTERFACE_MAX} characters, the limit of Linux, "
                f"got {len(bridge)}: {shown(bridge)}",
            )
        if not re.fullmatch(INTERFACE, bridge) or bridge in ("all", "default", "lo"):
            raise self.refuse(
                "bridge", f"expected letters, digits, '.', '_' or '-', such as \"virbr7\", got {shown(bridge)}"
            )

    def nothing_else(self) -> None:
        """A bridge of the host's is taken as it is."""
        network = self.network
        for key in ("mtu", "domain", "dnsmasq", "ipv4", "ipv6", "host", "record", "forward", "checksum_offload"):
            if getattr(network, key):
                raise self.refuse(
                    key, 'expected nothing here, since mode is "bridge": the host\'s own bridge is taken as it is'
                )

    def ipv4(self) -> None:
        import ipaddress

        ip = self.network.ipv4
        if ip is None:
            return
        try:
            interface = ipaddress.IPv4Interface(ip.address)
        except ValueError:
            interface = None
        if interface is None or "/" not in ip.address:
            raise self.refuse(
                "ipv4.address",
                f'expected the host\'s address and the prefix, such as "192.168.150.1/24", got {shown(ip.address)}',
            )
        if not 8 <= interface.network.prefixlen <= 30:
            raise self.refuse("ipv4.address", f"expected a prefix of /8 to /30, got /{interface.network.prefixlen}")
        if interface.ip in (interface.network.network_address, interface.network.broadcast_address):
            raise self.refuse(
                "ipv4.address", f"expected an address of a host's in {interface.network}, got {interface.ip}"
            )
        if interface.is_multicast or interface.is_loopback or interface.is_unspecified:
            raise self.refuse("ipv4.address", f"expected a unicast address, got {interface.ip}")
        self.range("ipv4", ip, interface)

    def ipv6(self) -> None:
        import ipaddress

        ip = self.network.ipv6
        if ip is None:
            return
        try:
            interface = ipaddress.IPv6Interface(ip.address)
        except ValueError:
            interface = None
        if interface is None or "/" not in ip.address or interface.scope_id is not None:
            raise self.refuse(
                "ipv6.address",
                f'expected the host\'s address and the prefix, such as "fd00:1:2:3::1/64", got {shown(ip.address)}',
            )
        if interface.is_multicast or interface.is_loopback or interface.is_unspecified or interface.is_link_local:
            raise self.refuse("ipv6.address", f"expected a unicast address, not a link-local one, got {interface.ip}")
        if ip.dhcp and interface.network.prefixlen != PREFIX6:
            raise self.refuse(
                "ipv6.address",
                f"expected a prefix of /{PREFIX6}, since guests make their addresses of it, "
                f"got /{interface.network.prefixlen}",
                hint="With dhcp = false any prefix will do.",
            )
        if not 8 <= interface.network.prefixlen <= 126:
            raise self.refuse("ipv6.address", f"expected a prefix of /8 to /126, got /{interface.network.prefixlen}")
        self.range("ipv6", ip, interface)

    def range(self, key: str, ip: Ipv4 | Ipv6, interface: Any) -> None:
        if not re.fullmatch(LEASE, ip.lease) or _seconds(ip.lease) < LEASE_MIN:
            raise self.refuse(
                f"{key}.lease", f'expected a time of 2m or more, such as "12h", or "infinite", got {shown(ip.lease)}'
            )
        if not ip.dhcp and (ip.first is not None or ip.last is not None):
            raise self.refuse(f"{key}.{'first' if ip.first else 'last'}", "expected no range, since dhcp is false")
        if (ip.first is None) != (ip.last is None):
            raise self.refuse(
                f"{key}.{'last' if ip.last is None else 'first'}",
                "expected this key, since the other end of the range is given",
            )
        if ip.first is None or ip.last is None:
            return
        first, last = (
            self.inside(f"{key}.{end}", value, interface) for end, value in (("first", ip.first), ("last", ip.last))
        )
        if first > last:
            raise self.refuse(f"{key}.last", f"expected an address after {first}, the first, got {last}")
        if first <= interface.ip <= last:
            raise self.refuse(f"{key}.first", f"the range {first} to {last} has the host's own {interface.ip} in it")

    def inside(self, key: str, value: str, interface: Any) -> Any:
        """The address `value`, which must be one of the subnet's hosts."""
        import ipaddress

        network = interface.network
        try:
            address = ipaddress.ip_address(value)
        except ValueError:
            address = None
        if address is None or address.version != network.version:
            raise self.refuse(key, f"expected an address in {network}, got {shown(value)}")
        if address not in network:
            raise self.refuse(key, f"expected an address in {network}, the subnet, got {address}")
        if address == network.network_address or (network.version == 4 and address == network.broadcast_address):
            raise self.refuse(key, f"expected an address of a host's in {network}, got {address}")
        return address

    def mtu(self) -> None:
        mtu = self.network.mtu
        if mtu is not None and mtu < 1280 and self.network.ipv6 is not None:
            raise self.refuse("mtu", f"expected at least 1280, which IPv6 needs, got {mtu}")

    def leases(self) -> None:
        network = self.network
        if len(network.host) > HOSTS_MAX:
            raise self.refuse("host", f"expected at most {HOSTS_MAX}, got {len(network.host)}")
        seen: dict[str, str] = {}

        def once(key: str, what: str, value: str) -> None:
            if value in seen:
                raise self.refuse(key, f"{value} is {what} {seen[value]} already")
            seen[value] = key.partition(".")[0]

        for index, host in enumerate(network.host):
            here = f"host[{index}]"
            once(f"{here}.mac", "the MAC of", self.mac(f"{here}.mac", host.mac))
            if host.name is None and host.ipv4 is None and host.ipv6 is None:
                raise self.refuse(here, "expected a name, an ipv4 or an ipv6 address for this MAC")
            if host.name is not None:
                if not re.fullmatch(LABEL, host.name):
                    raise self.refuse(
                        f"{here}.name", f"expected a host's name without a domain, got {shown(host.name)}"
                    )
                once(f"{here}.name", "the name of", host.name.lower())
            for family, value, interface, served in (
                ("ipv4", host.ipv4, network.interface4, network.ipv4 is not None and network.ipv4.dhcp),
                ("ipv6", host.ipv6, network.interface6, network.ipv6 is not None and network.ipv6.dhcp),
            ):
                if value is None:
                    continue
                key = f"{here}.{family}"
                if interface is None or not served:
                    raise self.refuse(key, f"expected no address, since the network has no DHCP for {family}")
                address = self.inside(key, value, interface)
                if address == interface.ip:
                    raise self.refuse(key, f"{address} is the host's own address")
                once(key, "the address of", str(address))

    def mac(self, key: str, value: str) -> str:
        mac = value.lower()
        if not re.fullmatch(MAC, mac) or int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
            raise self.refuse(key, f"expected a unicast address such as 52:54:00:12:34:56, got {shown(value)}")
        return mac

    def dns_name(self, key: str, value: str) -> None:
        if len(value) > 253 or not re.fullmatch(rf"{LABEL}(?:\.{LABEL})*", value):
            raise self.refuse(key, f'expected a name such as "lab.internal", got {shown(value)}')

    def records(self) -> None:
        import ipaddress

        if self.network.record and not self.network.dns:
            raise self.refuse("record", "expected none, since dns is false")
        for index, record in enumerate(self.network.record):
            self.dns_name(f"record[{index}].name", record.name)
            try:
                ipaddress.ip_address(record.address)
            except ValueError:
                raise self.refuse(
                    f"record[{index}].address", f"expected an address, got {shown(record.address)}"
                ) from None

    def forwards(self) -> None:
        import ipaddress

        network = self.network
        if network.forward and network.mode is not Mode.NAT:
            raise self.refuse("forward", f'expected none, since mode is "{network.mode}" and not "nat"')
        seen: dict[tuple[str, int, int], int] = {}
        for index, forward in enumerate(network.forward):
            key = f"forward[{index}].to"
            try:
                address = ipaddress.ip_address(forward.to)
            except ValueError:
                address = None
            interface: Any = (
                None if address is None else network.interface4 if address.version == 4 else network.interface6
            )
            if interface is None:
                subnets = (
                    " or ".join(str(subnet) for _key, subnet in network.subnets()) or "a subnet of the network's"
                )
                raise self.refuse(key, f"expected an address in {subnets}, got {shown(forward.to)}")
            self.inside(key, forward.to, interface)
            place = (forward.protocol.value, interface.version, forward.port)
            if place in seen:
                raise self.refuse(
                    f"forward[{index}].port",
                    f"{forward.protocol} port {forward.port} is forwarded by forward[{seen[place]}] already",
                )
            seen[place] = index

    def options(self) -> None:
        if self.network.dnsmasq and not self.network.serves:
            raise self.refuse("dnsmasq", "expected none, since neither dns nor dhcp is wanted")
        for index, option in enumerate(self.network.dnsmasq):
            key = f"dnsmasq[{index}]"
            match = re.fullmatch(OPTION, option)
            if match is None or len(option) > 1000:
                raise self.refuse(
                    key, f'expected an option of dnsmasq, such as "dhcp-option=42,0.0.0.0", got {shown(option)}'
                )
            if match[1] in OWNED:
                raise self.refuse(key, f"{match[1]} is set by virtd itself")


def _seconds(lease: str) -> int:
    if lease == "infinite":
        return LEASE_MIN
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}.get(lease[-1])
    return int(lease[:-1]) * unit if unit else int(lease)
