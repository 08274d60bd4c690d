# SPDX-License-Identifier: LGPL-2.1-or-later
"""What networks need of the host: its routes, its forwarding, dnsmasq and the user that this runs as."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import errors
from ...model.network import Mode
from .. import programs
from . import links

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...model.network import Network
    from ...model.settings import Dnsmasq

PROC = "/proc"
FORWARD4 = "net/ipv4/ip_forward"
FORWARD6 = "net/ipv6/conf/all/forwarding"


class Route(NamedTuple):
    """A route of the host's main table. `prefix` is an ipaddress network."""

    prefix: Any
    interface: str


class Account(NamedTuple):
    """The user that dnsmasq runs as."""

    user: str
    uid: int
    gid: int


def account(settings: Dnsmasq) -> Account:
    """Raises HostError when the user isn't there, or is root."""
    hint = "systemd-sysusers virtd.conf makes it; or set dnsmasq.user in virtd.toml."
    uid, gid = programs.ids(settings.user, None, "dnsmasq", hint)
    if uid == 0:
        raise errors.HostError("dnsmasq doesn't run as root", hint="Set dnsmasq.user in virtd.toml to another user.")
    return Account(settings.user, uid, gid)


def dnsmasq(settings: Dnsmasq) -> str:
    """The program. Raises HostError when it is missing or not executable."""
    if settings.binary and os.access(settings.binary, os.X_OK):
        return settings.binary
    if not settings.binary and (path := programs.find("dnsmasq")) is not None:
        return path
    raise errors.HostError(
        f"dnsmasq is missing: no {settings.binary or 'dnsmasq in ' + ', '.join(programs.PLACES)}",
        hint="Install dnsmasq (Debian: dnsmasq-base), or set dnsmasq.binary in virtd.toml.",
    )


def routes() -> list[Route]:
    """The routes of the main table, IPv4 and IPv6, but those that catch all and those of the link itself."""
    import ipaddress

    found = []
    for line in _lines(f"{PROC}/net/route")[1:]:
        fields = line.split()
        # Eight hexadecimal digits each, in the byte order of the machine.
        address, mask = (struct.pack("=I", int(fields[at], 16)) for at in (1, 7))
        prefix4 = ipaddress.IPv4Network((address, bin(int.from_bytes(mask, "big")).count("1")), strict=False)
        found.append(Route(prefix4, fields[0]))
    for line in _lines(f"{PROC}/net/ipv6_route"):
        fields = line.split()
        prefix6 = ipaddress.IPv6Network((bytes.fromhex(fields[0]), int(fields[1], 16)), strict=False)
        # The local table's are in here too: addresses of the host, on whatever interface.
        if fields[9] != "lo" and prefix6.prefixlen < 128 and not prefix6.is_link_local and not prefix6.is_multicast:
            found.append(Route(prefix6, fields[9]))
    return [route for route in found if route.prefix.prefixlen > 0]


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().splitlines()
    except OSError:
        return []


def check_routes(network: Network, source: str) -> None:
    """Refuse a prefix that the host already reaches another way. Raises InvalidDefinition."""
    if not network.own:
        return
    there = [route for route in routes() if route.interface != network.bridge_name]
    for key, subnet in network.subnets():
        for route in there:
            if route.prefix.version == subnet.version and route.prefix.overlaps(subnet):
                raise errors.InvalidDefinition(
                    source,
                    key,
                    f"{subnet} collides with {route.prefix}, to which the host has a route through {route.interface}",
                    hint="Choose another prefix. ip route shows what is taken.",
                )


def check_bridge(network: Network, source: str, mac: str) -> None:
    """Refuse a name that something else has, or, for mode "bridge", one that no bridge has."""
    name = network.bridge_name
    if not network.own:
        if not links.is_bridge(name):
            what = "it is no bridge" if links.exists(name) else "there is no such interface"
            raise errors.InvalidDefinition(source, "bridge", f"expected a bridge of the host's: {name}: {what}")
        return
    if links.exists(name) and not (links.is_bridge(name) and links.mac(name) == mac):
        what = "a bridge" if links.is_bridge(name) else "an interface"
        raise errors.InvalidDefinition(
            source,
            "bridge",
            f"{name} is the name of {what} that isn't virtd's",
            hint='Choose another name, or, to use that bridge as it is, mode = "bridge".',
        )


def free_prefix(taken: Iterable[Any]) -> str:
    """An address with a prefix for a new network, such as "192.168.124.1/24": collides with nothing of the host's.

    `taken`: prefixes of networks that are defined, whether or not they are active. Raises HostError.
    """
    import ipaddress

    used = [route.prefix for route in routes()] + list(taken)
    # Not 192.168.0.0 to .99, which home and office routers use, nor 192.168.122.0, which is libvirt's everywhere.
    candidates = [f"192.168.{third}.0/24" for third in range(124, 255)]
    candidates += [f"10.{second}.{third}.0/24" for second in range(200, 255) for third in (100, 150, 200)]
    candidates += [f"172.{second}.200.0/24" for second in range(20, 32)]
    for text in candidates:
        prefix = ipaddress.IPv4Network(text)
        if not any(other.version == 4 and other.overlaps(prefix) for other in used):
            return f"{prefix.network_address + 1}/{prefix.prefixlen}"
    raise errors.HostError(
        "No free private range was found for the network", hint="Write a definition with an ipv4.address of yours."
    )


# Settings of the kernel's


def sysctl(name: str) -> str | None:
    try:
        with open(f"{PROC}/sys/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None


def set_sysctl(name: str, value: str) -> None:
    """Write a setting unless it says so already. One that this kernel doesn't have is left out. Raises HostError."""
    if sysctl(name) in (value, None):
        return
    try:
        with open(f"{PROC}/sys/{name}", "w", encoding="ascii") as file:
            file.write(value)
    except OSError as exc:
        raise errors.HostError(f"Cannot set {name.replace('/', '.')} to {value}: {exc.strerror}") from exc


def forwarding(key: str) -> str:
    """The setting for all interfaces, of which `key` ("ipv4/forwarding") is one interface's."""
    return FORWARD4 if key.startswith("ipv4") else FORWARD6


def forwarding_needed(network: Network) -> list[str]:
    """What has to be on for the network's guests."""
    if network.mode not in (Mode.NAT, Mode.ROUTED):
        return []
    return [path for path, ip in ((FORWARD4, network.ipv4), (FORWARD6, network.ipv6)) if ip is not None]


def allow_forwarding(network: Network) -> list[str]:
    """Have the host forward what the network needs forwarded; what was changed.

    It is never taken back: who else has come to rely on it isn't known.
    """
    changed = []
    for path in forwarding_needed(network):
        if sysctl(path) != "0":
            continue
        if path == FORWARD6:
            # A kernel that forwards takes no router advertisements and drops the routes that it has of them, unless
            # the interface says 2: the host would be off the net.
            with contextlib.suppress(OSError):
                for interface in os.listdir(f"{PROC}/sys/net/ipv6/conf"):
                    if interface not in ("all", "lo") and sysctl(f"net/ipv6/conf/{interface}/accept_ra") == "1":
                        set_sysctl(f"net/ipv6/conf/{interface}/accept_ra", "2")
                        changed.append(f"net.ipv6.conf.{interface}.accept_ra=2")
        set_sysctl(path, "1")
        changed.append(f"{path.replace('/', '.')}=1")
    return changed


def calm(wanted: bool) -> dict[str, int]:  # noqa: FBT001
    """The bridge's settings of IPv6: its addresses are those of the definition, and no guest tells it any others.

    `wanted`: whether the network has IPv6.
    """
    return {
        # Its link-local address is made of its MAC, and so known to the rules that keep others from using it.
        "ipv6/addr_gen_mode": 0,
        "ipv6/disable_ipv6": 0 if wanted else 1,
        "ipv6/accept_ra": 0,
        "ipv6/autoconf": 0,
    }


def addresses(network: Network) -> list[tuple[str, int]]:
    """The bridge's addresses, as the kernel shows them, and the lengths of their prefixes."""
    return [
        (canonical(str(interface.ip)), interface.network.prefixlen)
        for interface in (network.interface4, network.interface6)
        if interface is not None
    ]


def legacy_tables(file: str) -> list[str]:
    """The tables of an iptables that isn't nftables: "ip_tables_names" or "ip6_tables_names"."""
    return _lines(f"{PROC}/net/{file}")


def canonical(address: str) -> str:
    """An address in the form in which the kernel shows it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.inet_ntop(family, socket.inet_pton(family, address))
