# SPDX-License-Identifier: LGPL-2.1-or-later
"""A network's bridge: made as the definition says, or brought back to it. Everything here may be done twice.

These block, and are called in a thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ... import errors
from . import host, links
from .netlink import Netlink

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...model.network import Network
    from .ports import Port


class Raised(NamedTuple):
    """What `raise_it` did: whether the bridge is a new one, which ports it took back, which settings it changed."""

    new: bool
    ports: list[str]
    settings: list[str]


def mac_of(uuid: str) -> str:
    """The address by which a network's bridge is known as its own: a locally administered one, made of its uuid."""
    digits = uuid.replace("-", "")
    return "56:44:" + ":".join(digits[at : at + 2] for at in range(0, 8, 2))


def is_ours(name: str, mac: str) -> bool:
    return links.is_bridge(name) and links.mac(name) == mac


def raise_it(network: Network, mac: str, known: tuple[Port, ...] = ()) -> Raised:
    """Make the bridge, or see that the one that is there is as it should be. Raises HostError."""
    name = network.bridge_name
    new = not links.exists(name)
    try:
        with Netlink() as netlink:
            if new:
                netlink.add_bridge(name, mac)
            elif not is_ours(name, mac):
                raise errors.HostError(f"{name} isn't the bridge of network {network.name}")
            netlink.set_link(name, alias=f"virtd network {network.name}", mtu=network.mtu)
            host.calm_ipv6(name, wanted=network.ipv6 is not None)
            wanted = {
                (host.canonical(str(interface.ip)), interface.network.prefixlen)
                for interface in (network.interface4, network.interface6)
                if interface is not None
            }
            there = {(address.address, address.prefix) for address in netlink.addresses(name)}
            for address, prefix in there - wanted:
                netlink.delete_address(name, address, prefix)
            for address, prefix in wanted - there:
                netlink.add_address(name, address, prefix)
            netlink.set_link(name, up=True)
            settings = host.allow_forwarding(network)
            taken = []
            by_name = {port.interface: port for port in known}
            for port in links.ports():
                if port.network == network.name and links.master(port.interface) != name:
                    _join(netlink, port.interface, name, by_name.get(port.interface), isolated=network.isolated_ports)
                    taken.append(port.interface)
    except OSError as exc:
        raise errors.HostError(f"Cannot make the bridge {name}: {exc.strerror}") from exc
    return Raised(new, taken, settings)


def lower_it(name: str, mac: str) -> bool:
    """Delete the bridge if it is ours; what is in it is then in none. Raises HostError."""
    if not is_ours(name, mac):
        return False
    try:
        with Netlink() as netlink:
            return netlink.delete_link(name)
    except OSError as exc:
        raise errors.HostError(f"Cannot delete the bridge {name}: {exc.strerror}") from exc


def address_of(port: Port) -> str:
    """A tap's own address: the guest's with another first byte, so that people see whose it is."""
    return f"fe{port.mac[2:]}"


def strayed(ports: Iterable[Port], bridge: str) -> list[Port]:
    """Those in the bridge whose taps have another address than `add_tap` gave them.

    Whoever has a tap open can change it (SIOCSIFHWADDR, for which the kernel asks no privilege there), and what is
    sent to that address a bridge keeps for the host, whoever had it until then: a neighbour is cut off.
    """
    return [
        port
        for port in ports
        if links.is_tap(port.interface)
        and links.master(port.interface) == bridge
        and links.mac(port.interface) != address_of(port)
    ]


def put_out(strays: Iterable[Port]) -> None:
    """Take taps out of their bridge, and give them their own addresses again. Raises HostError."""
    try:
        with Netlink() as netlink:
            for port in strays:
                netlink.set_link(port.interface, master="")
                netlink.set_link(port.interface, mac=address_of(port))
    except OSError as exc:
        raise errors.HostError(f"Cannot take a tap out of its bridge: {exc.strerror}") from exc


def add_tap(port: Port, bridge: str, *, alias: str, uid: int, isolated: bool = False) -> None:
    """Make a tap for processes of `uid` and put it into the bridge. Raises HostError, with none left.

    Its own address, see `address_of`, is none that anybody sends to.
    """
    interface = port.interface
    owner = links.read(interface, "ifalias")
    if links.exists(interface) and owner != alias:
        raise errors.HostError(f"{interface} is there already: {owner or 'nobody knows whose it is'}")
    try:
        links.make_tap(interface, uid)
        with Netlink() as netlink:
            try:
                netlink.set_link(interface, alias=alias)
                _join(netlink, interface, bridge, port, isolated=isolated)
            except BaseException:
                netlink.delete_link(interface)
                raise
    except OSError as exc:
        raise errors.HostError(f"Cannot make the tap {interface}: {exc.strerror}") from exc


def add_port(port: Port, bridge: str, *, alias: str, isolated: bool = False) -> None:
    """Put an interface that somebody else made, such as a container's veth, into the bridge. Raises HostError."""
    try:
        with Netlink() as netlink:
            netlink.set_link(port.interface, alias=alias)
            _join(netlink, port.interface, bridge, port, isolated=isolated)
    except OSError as exc:
        raise errors.HostError(f"Cannot put {port.interface} into {bridge}: {exc.strerror}") from exc


def remove(interface: str) -> bool:
    """Delete an interface; False when there is none of that name. Raises HostError."""
    if not links.exists(interface):
        return False
    try:
        with Netlink() as netlink:
            return netlink.delete_link(interface)
    except OSError as exc:
        raise errors.HostError(f"Cannot delete {interface}: {exc.strerror}") from exc


def _join(netlink: Netlink, interface: str, bridge: str, port: Port | None, *, isolated: bool) -> None:
    """Put an interface into a bridge. What is said here of a port holds without firewall rules as well.

    `port` None: what it may send isn't known.
    """
    host.set_sysctl(f"net/ipv6/conf/{interface}/disable_ipv6", "1")
    # Frames to 01:80:C2:00:00:0E and such get past the bridge, as if they were for the port itself. It has no
    # address; a strict reverse path then takes nothing, and nobody answers to ARP there.
    host.set_sysctl(f"net/ipv4/conf/{interface}/rp_filter", "1")
    host.set_sysctl(f"net/ipv4/conf/{interface}/arp_ignore", "8")
    # First the MTU: a bridge whose own wasn't set takes the smallest of its ports'.
    netlink.set_link(interface, mtu=links.mtu(bridge))
    if port is not None and links.is_tap(interface):
        netlink.set_link(interface, mac=address_of(port))
    netlink.set_link(interface, master=bridge)
    _guard(netlink, interface, port, isolated=isolated)
    netlink.set_link(interface, up=True)


def _guard(netlink: Netlink, interface: str, port: Port | None, *, isolated: bool) -> None:
    locked = port is not None and not port.trusted
    if port is not None and locked:
        netlink.add_neighbour_of_port(interface, port.mac)
    netlink.set_port(interface, isolated=isolated, locked=locked)


def settle_ports(ports: tuple[Port, ...], bridge: str, *, isolated: bool) -> None:
    """See that those which are in the bridge are as `_join` has them. Raises HostError."""
    try:
        with Netlink() as netlink:
            for port in ports:
                if links.master(port.interface) == bridge:
                    _guard(netlink, port.interface, port, isolated=isolated)
    except OSError as exc:
        raise errors.HostError(f"Cannot guard the ports of {bridge}: {exc.strerror}") from exc
