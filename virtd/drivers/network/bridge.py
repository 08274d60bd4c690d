# SPDX-License-Identifier: LGPL-2.1-or-later
"""A network's bridge and its ports: made as the definition says, or brought back to it. Everything may be repeated.

All of this blocks: call it in a thread.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from ... import errors
from . import links, prerequisites
from .rtnetlink import Netlink

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...model.network import Network
    from .ports import Port


# Of a port. It has no address, and what gets past the bridge (frames to 01:80:C2:00:00:0E and such, as if they were
# for the port itself) is for nobody: a strict reverse path takes nothing then, and nobody answers to ARP there.
PORT_SETTINGS = {"ipv6/disable_ipv6": 1, "ipv4/rp_filter": 1, "ipv4/arp_ignore": 8}


def mac_of(uuid: str) -> str:
    """The address by which a network's bridge is known as its own: a locally administered one, made of its uuid."""
    digits = uuid.replace("-", "")
    return "56:44:" + ":".join(digits[at : at + 2] for at in range(0, 8, 2))


def is_ours(name: str, mac: str) -> bool:
    return links.is_bridge(name) and links.mac(name) == mac


def make(name: str, mac: str, alias: str) -> bool:
    """Make a bridge, down for now, unless it exists. Returns whether it was made. Raises HostError."""
    if links.exists(name):
        return False
    try:
        with Netlink() as netlink:
            netlink.add_bridge(name, mac)
            netlink.set_link(name, alias=alias)
    except OSError as exc:
        raise errors.HostError(f"Cannot make the bridge {name}: {exc.strerror}") from exc
    return True


def take_in(network: Network, known: Iterable[Port]) -> None:
    """Put an older virtd's interfaces into the bridge: they carry our alias, and no record names them.

    Raises HostError.
    """
    name, ours = network.bridge_name, {port.interface for port in known}
    found = [
        port.interface
        for port in links.ports()
        if port.network == network.name and port.interface not in ours and links.master(port.interface) != name
    ]
    if not found:
        return
    try:
        with Netlink() as netlink:
            for interface in found:
                join(netlink, interface, name, None, isolated=network.isolated_ports)
    except OSError as exc:
        raise errors.HostError(f"Cannot put {', '.join(found)} into {name}: {exc.strerror}") from exc


def delete(name: str, mac: str) -> bool:
    """Delete the bridge if it is ours; its ports are then in no bridge. Raises HostError."""
    if not is_ours(name, mac):
        return False
    try:
        with Netlink() as netlink:
            return netlink.delete_link(name)
    except OSError as exc:
        raise errors.HostError(f"Cannot delete the bridge {name}: {exc.strerror}") from exc


def address_of(port: Port) -> str:
    """A tap's own address: the guest's with another first byte, so that people see which guest's it is."""
    return f"fe{port.mac[2:]}"


def put_out(netlink: Netlink, port: Port) -> None:
    """Take a tap out of its bridge, and give it its own address again. Raises NetlinkError."""
    netlink.set_link(port.interface, master="")
    netlink.set_link(port.interface, mac=address_of(port))


def add_tap(port: Port, bridge: str, *, alias: str, uid: int, isolated: bool = False) -> None:
    """Make a tap for processes of `uid` and put it into the bridge. Raises HostError, with none left.

    Nobody sends to the tap's own address, see `address_of`.
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
                join(netlink, interface, bridge, port, isolated=isolated)
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
            join(netlink, port.interface, bridge, port, isolated=isolated)
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


def join(netlink: Netlink, interface: str, bridge: str, port: Port | None, *, isolated: bool) -> None:
    """Put an interface into a bridge. What is set here for a port holds without firewall rules, too.

    `port` is None when it isn't known what it may send.
    """
    for key, value in PORT_SETTINGS.items():
        family, _, what = key.partition("/")
        # Where /proc/sys is read-only, a guest does without; wanted.py reports it.
        with contextlib.suppress(errors.HostError):
            prerequisites.set_sysctl(f"net/{family}/conf/{interface}/{what}", str(value))
    # First the MTU: a bridge whose own wasn't set takes the smallest of its ports'.
    netlink.set_link(interface, mtu=links.mtu(bridge))
    if port is not None and links.is_tap(interface):
        netlink.set_link(interface, mac=address_of(port))
    netlink.set_link(interface, master=bridge)
    guard(netlink, interface, port, isolated=isolated)
    netlink.set_link(interface, up=True)


def rename(netlink: Netlink, interface: str, name: str) -> None:
    """Rename an interface, which is down afterwards."""
    netlink.set_link(interface, up=False)
    netlink.set_link(interface, rename=name)


def guard(netlink: Netlink, interface: str, port: Port | None, *, isolated: bool) -> None:
    """Set what the bridge itself enforces at a port."""
    locked = port is not None and not port.trusted
    if port is not None and locked:
        netlink.add_neighbour_of_port(interface, port.mac)
    netlink.set_port(interface, isolated=isolated, locked=locked)


def set_ports(ports: tuple[Port, ...], bridge: str, *, isolated: bool) -> None:
    """Set the ports that are in the bridge as `join` does. Raises HostError."""
    try:
        with Netlink() as netlink:
            for port in ports:
                if links.master(port.interface) == bridge:
                    guard(netlink, port.interface, port, isolated=isolated)
    except OSError as exc:
        raise errors.HostError(f"Cannot guard the ports of {bridge}: {exc.strerror}") from exc
