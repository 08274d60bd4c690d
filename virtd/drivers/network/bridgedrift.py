# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a network's bridge, and the forwarding settings it needs, differ from what virtd made."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ...model.network import Mode
from . import prerequisites
from .checksums import checksums, set_checksums
from .drift import Drift, Seen, is_link_local, mtu_of, setting, strangers
from .ethernet import LINK_LOCAL
from .kernel import Address, Kernel, Link
from .ports import eui64

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...model.network import Network
    from .ports import Ground


def bridge_key(network: Network) -> str:
    """The key of the difference "the bridge is missing"."""
    return f"{network.bridge_name} there"


def alias_of(network: Network) -> str:
    return f"virtd network {network.name}"


def no_bridge(ground: Ground, link: Link | None) -> Drift:
    network = ground.network
    name = network.bridge_name
    if not network.own:
        text = f"{name}: the host's bridge is gone" if link is None else f"{name}: no bridge any more"
        hint = f"It is the host's: ip link add {name} type bridge. Its guests are connected again once it is there."
        return Drift(bridge_key(network), text, None, hint)
    if link is None:
        return Drift(bridge_key(network), f"{name}: gone", lambda kernel: kernel.add_bridge(name, ground.mac))
    hint = f"ip link delete {name}, and virtd makes its own again; or stop the network."
    return Drift(bridge_key(network), f"{name}: replaced by something that isn't virtd's", None, hint)


def settings(ground: Ground, link: Link) -> Iterator[Drift]:
    network, name = ground.network, link.name
    forwards = network.mode in (Mode.NAT, Mode.ROUTED)
    if link.mac != ground.mac:
        yield Drift(
            f"{name} mac", f"{name}: MAC address {link.mac} instead of {ground.mac}",
            lambda kernel: kernel.set_link(name, mac=ground.mac),
        )  # fmt: skip
    if link.alias != alias_of(network):
        yield Drift(
            f"{name} alias", f"{name}: no alias {alias_of(network)}",
            lambda kernel: kernel.set_link(name, alias=alias_of(network)), vital=False,
        )  # fmt: skip
    if link.values.get("stp_state", 0) or link.values.get("forward_delay", 0):
        yield Drift(f"{name} stp", f"{name}: spanning tree or a delay", lambda kernel: kernel.set_bridge(name))
    offload = checksums(name)
    if offload is not None and offload is not network.checksum_offload:
        # An older virtd didn't set this, and left such packets to whoever gets them.
        yield Drift(
            f"{name} checksums", f"{name}: checksums are {'left out' if offload else 'computed'}",
            lambda _kernel: set_checksums(name, offload=network.checksum_offload), vital=False, quiet=True,
        )  # fmt: skip
    mtu = mtu_of(ground)
    if mtu is not None and link.mtu != mtu:
        yield Drift(
            f"{name} mtu", f"{name}: MTU {link.mtu} instead of {mtu}", lambda kernel: kernel.set_link(name, mtu=mtu)
        )
    six = network.ipv6 is not None
    for key, value in prerequisites.calm(six).items():
        yield from setting(link, key, value, vital=six)
    for key, needed in (("ipv4/forwarding", network.ipv4), ("ipv6/forwarding", network.ipv6)):
        # A setting that is off for all interfaces is reported only once.
        if forwards and needed is not None and prerequisites.sysctl(prerequisites.forwarding(key)) != "0":
            yield from setting(link, key, 1)
    if not link.values.get("arp", 1):
        yield Drift(f"{name} arp", f"{name}: ARP is off", lambda kernel: kernel.set_link(name, arp=True))
    if not link.up:
        yield Drift(f"{name} up", f"{name}: down", lambda kernel: kernel.set_link(name, up=True))


def forwarding(network: Network) -> Iterator[Drift]:
    def mend(_kernel: Kernel) -> None:
        prerequisites.allow_forwarding(network)

    for path in prerequisites.forwarding_needed(network):
        if prerequisites.sysctl(path) == "0":
            yield Drift(
                path, f"{prerequisites.dotted(path)}: 0 instead of 1", mend, prerequisites.written_elsewhere(path)
            )


def addresses(ground: Ground, seen: Seen) -> Iterator[Drift]:
    network = ground.network
    name = network.bridge_name
    wanted = {Address(*one) for one in prerequisites.addresses(network)}
    there = {one for one in seen.addresses.get(name, set()) if not is_link_local(one)}
    if network.ipv6 is not None:
        # The source address of router advertisements. The kernel assigns it when IPv6 comes up, and not again.
        mine = Address(str(eui64(LINK_LOCAL, ground.mac)), 64)
        wanted.add(mine)
        there |= {mine} & seen.addresses.get(name, set())
    for one in sorted(wanted - there):
        yield Drift(
            f"{name} {one.address}", f"{name}: no address {one.address}/{one.prefix}",
            partial(_add, name, one),
        )  # fmt: skip
    yield from strangers(name, there - wanted)


def _add(name: str, one: Address, kernel: Kernel) -> None:
    kernel.add_address(name, *one)
