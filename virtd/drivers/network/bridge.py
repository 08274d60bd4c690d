# SPDX-License-Identifier: LGPL-2.1-or-later
"""A network's bridge and its ports: creates them as defined, or restores them. Every operation may be repeated.

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


# Settings of a port. It has no address, and packets that bypass the bridge (frames to 01:80:C2:00:00:0E and the like,
# which arrive as if they were for the port itself) are for nobody: a strict reverse path filter accepts none of them,
# and ARP there goes unanswered.
PORT_SETTINGS = {"ipv6/disable_ipv6": 1, "ipv4/rp_filter": 1, "ipv4/arp_ignore": 8}


def mac_of(uuid: str) -> str:
    """The MAC that identifies a network's bridge as its own: locally administered, derived from the uuid."""
    digits = uuid.replace("-", "")
    return "56:44:" + ":".join(digits[at : at + 2] for at in range(0, 8, 2))


def is_ours(name: str, mac: str) -> bool:
    return links.is_bridge(name) and links.mac(name) == mac


def make(name: str, mac: str, alias: str) -> bool:
    """Create a bridge, down for now, unless it exists. Returns whether it was created. Raises HostError."""
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
    """Put into the bridge the interfaces that an older virtd made: they carry our alias, and no record names them.

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
    """Delete the bridge if it is ours, leaving its ports without one; False if it isn't. Raises HostError."""
    if not is_ours(name, mac):
        return False
    try:
        with Netlink() as netlink:
            return netlink.delete_link(name)
    except OSError as exc:
        raise errors.HostError(f"Cannot delete the bridge {name}: {exc.strerror}") from exc


def address_of(port: Port) -> str:
    """A tap's own MAC: the guest's with a different first byte, so that people see which guest it belongs to."""
    return f"fe{port.mac[2:]}"


def put_out(netlink: Netlink, port: Port) -> None:
    """Take a tap out of its bridge, and restore its own MAC. Raises NetlinkError."""
    netlink.set_link(port.interface, master="")
    netlink.set_link(port.interface, mac=address_of(port))


def add_tap(port: Port, bridge: str, *, alias: str, uid: int, isolated: bool = False) -> None:
    """Make a tap for processes of `uid` and put it into the bridge. Raises HostError, leaving none behind.

    Nobody sends to the tap's own MAC, see `address_of`.
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
    """Delete an interface; False if there is none with that name. Raises HostError."""
    if not links.exists(interface):
        return False
    try:
        with Netlink() as netlink:
            return netlink.delete_link(interface)
    except OSError as exc:
        raise errors.HostError(f"Cannot delete {interface}: {exc.strerror}") from exc


def join(netlink: Netlink, interface: str, bridge: str, port: Port | None, *, isolated: bool) -> None:
    """Put an interface into a bridge. A port's settings made here hold even without firewall rules.

    `port` is None if it isn't known what the port may send.
    """
    for key, value in PORT_SETTINGS.items():
        family, _, what = key.partition("/")
        # If /proc/sys is read-only, the guest runs without these settings; wanted.py reports it.
        with contextlib.suppress(errors.HostError):
            prerequisites.set_sysctl(f"net/{family}/conf/{interface}/{what}", str(value))
    # The MTU first: a bridge whose MTU wasn't set explicitly takes the smallest of its ports'.
    netlink.set_link(interface, mtu=links.mtu(bridge))
    if port is not None and links.is_tap(interface):
        netlink.set_link(interface, mac=address_of(port))
    netlink.set_link(interface, master=bridge)
    guard(netlink, interface, port, isolated=isolated)
    netlink.set_link(interface, up=True)


def rename(netlink: Netlink, interface: str, name: str) -> None:
    """Rename an interface, and leave it down."""
    netlink.set_link(interface, up=False)
    netlink.set_link(interface, rename=name)


def guard(netlink: Netlink, interface: str, port: Port | None, *, isolated: bool) -> None:
    """Set what the bridge itself enforces on a port."""
    locked = port is not None and not port.trusted
    if port is not None and locked:
        netlink.add_neighbour_of_port(interface, port.mac)
    netlink.set_port(interface, isolated=isolated, locked=locked)


def set_ports(ports: tuple[Port, ...], bridge: str, *, isolated: bool) -> None:
    """Give ports that are already in the bridge the settings that `join` makes. Raises HostError."""
    try:
        with Netlink() as netlink:
            for port in ports:
                if links.master(port.interface) == bridge:
                    guard(netlink, port.interface, port, isolated=isolated)
    except OSError as exc:
        raise errors.HostError(f"Cannot guard the ports of {bridge}: {exc.strerror}") from exc
