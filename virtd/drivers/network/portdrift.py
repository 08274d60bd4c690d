# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a port of a network differs from what virtd made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...hints import do
from . import bridge, links
from .drift import Drift, Seen, is_link_local, mtu_of, setting, strangers
from .ethernet import is_forwarded_to

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .kernel import Kernel, Link
    from .ports import Ground, Port

FORWARDING = 3  # BR_STATE_FORWARDING


def differences(ground: Ground, port: Port, above: Link, seen: Seen) -> Iterator[Drift]:
    network, name = ground.network, port.interface
    link = seen.links.get(name)
    if name in ground.refused:
        if link is not None and link.master == above.name:
            text = f"{name}: in {above.name}, though it is refused"
            yield Drift(f"{name} refused", text, lambda kernel: bridge.put_out(kernel, port), new=True)
        return
    if link is None and (other := _renamed(ground, port)):
        text = f"{name}: renamed to {other}"
        yield Drift(f"{name} name", text, lambda kernel: bridge.rename(kernel, other, name))
        return
    if link is None:
        noun = "domain" if port.user.startswith("qemu/") else "container"
        hint = do("stop", noun, port.user.partition("/")[2]) + ", and start it again."
        yield Drift(f"{name} there", f"{name}: gone, {port.user} is cut off", None, hint, gone=True)
        return
    if link.kind == "tun" and link.master == above.name and link.mac != bridge.address_of(port):
        # Whoever has a tap open can change its MAC (SIOCSIFHWADDR, which needs no privilege there), and the bridge
        # then keeps for the host what is sent to that MAC: the neighbour who had it is cut off.
        text = f"{name}: MAC address {link.mac} instead of {bridge.address_of(port)}"
        if not port.loose:
            yield Drift(f"{name} stray", text, stray=name)
            return

        def rename(kernel: Kernel) -> None:
            kernel.set_link(name, mac=bridge.address_of(port))

        yield Drift(f"{name} mac", text, rename, new=True)  # an older virtd left the kernel's choice
    locked = not port.trusted
    new = not link.alias and link.kind == "veth"
    flags = {"isolated": network.isolated_ports, "locked": locked, "learning": not locked}
    flags["multicast_router"] = not locked
    if link.master != above.name:

        def join(kernel: Kernel) -> None:
            kernel.set_link(name, alias=links.alias_of(network.name, port.user))
            bridge.join(kernel, name, above.name, port, isolated=network.isolated_ports)

        where = f"in {link.master}" if link.master else "in no bridge"
        yield Drift(f"{name} bridge", f"{name}: {where} instead of {above.name}", join, new=new)
    elif any(link.values.get(key, wanted) != wanted for key, wanted in flags.items()) or (
        locked and (name, port.mac) not in seen.neighbours
    ):
        yield Drift(
            f"{name} guard", f"{name}: not guarded as a port of {above.name}",
            lambda kernel: bridge.guard(kernel, name, port, isolated=network.isolated_ports), new=new,
        )  # fmt: skip
    elif link.values.get("state", FORWARDING) != FORWARDING and link.carrier and not above.values.get("stp_state"):
        yield Drift(f"{name} state", f"{name}: switched off", lambda kernel: kernel.set_port_forwarding(name))
    hairpin = is_forwarded_to(network, port)
    if link.master == above.name and link.values.get("hairpin", hairpin) != hairpin:
        yield Drift(
            f"{name} hairpin", f"{name}: hairpin mode is {'off' if hairpin else 'on'}",
            lambda kernel: kernel.set_port_hairpin(name, on=hairpin), vital=False, quiet=True,
        )  # fmt: skip
    alias = links.alias_of(network.name, port.user)
    if link.alias != alias:
        yield Drift(
            f"{name} alias", f"{name}: no alias {alias}", lambda kernel: kernel.set_link(name, alias=alias),
            vital=False, new=new,
        )  # fmt: skip
    mtu = mtu_of(ground) if network.own else None
    if mtu is not None and link.mtu != mtu:
        yield Drift(
            f"{name} mtu", f"{name}: MTU {link.mtu} instead of {mtu}",
            lambda kernel: kernel.set_link(name, mtu=mtu), new=new,
        )  # fmt: skip
    for key, value in bridge.PORT_SETTINGS.items():
        yield from setting(link, key, value, vital=False, new=new)
    there = seen.addresses.get(name, set())
    if link.values.get("ipv6/disable_ipv6") == 0:  # IPv6 would give the port an address
        there = {one for one in there if not is_link_local(one)}
    yield from strangers(name, there, new=new)
    if not link.up:
        yield Drift(f"{name} up", f"{name}: down", lambda kernel: kernel.set_link(name, up=True), new=new)


def _renamed(ground: Ground, port: Port) -> str:
    """The present name of the port's interface; "" if there is none."""
    alias = links.alias_of(ground.network.name, port.user)
    mac = bridge.address_of(port) if port.user.startswith("qemu/") else ""  # a veth's MAC was chosen by the kernel
    return links.bearing(alias, mac, [one.interface for one in ground.ports])
