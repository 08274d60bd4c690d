# SPDX-License-Identifier: LGPL-2.1-or-later
"""What virtd has made of the kernel's for a network, compared with what is there: the one place that knows both.

Start, info, fsck and the watch ask here, and have put back what can be. Firewall rules are compared by their marks
(net.py), rules of policy routing as a whole (isolation.py). All of this blocks, and is called in a thread.
"""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import errors
from ...hints import do
from ...model.network import Mode
from . import bridge, links, prerequisites, routes
from .checksums import checksums, set_checksums
from .ethernet import LINK_LOCAL, is_forwarded_to
from .kernel import Address, Kernel, Link, Way
from .ports import eui64
from .rtnetlink import MAIN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ...hints import Hint
    from ...model.network import Network
    from .ports import Ground, Port
    from .routes import Route

MTU = 1500  # of a network whose definition has none
MOST_ROUTES = 500  # that are looked through each time; some hosts have a million
MOST_ADDRESSES = 16  # of guests, whose routes are asked for
PASSES = 4  # one thing may need another one first: an address of IPv6 a setting, a route an address
DEFAULT = 253  # RT_TABLE_DEFAULT, asked after the main one
FORWARDING = 3  # BR_STATE_FORWARDING


class Drift(NamedTuple):
    """One thing that isn't as virtd made it.

    `key` stays the same while it is that thing; `text` is "vt-web1-0: in no bridge". `mend` puts it back, None: that
    is for a person, and `hint` says how. Not `vital`: guests can do without. `new`: nobody has changed anything, such
    as where a container's reboot has made its interface anew, and it is put back however often it comes. `quiet`: an
    older virtd may have left it. `gone`: it may be about to be taken off the record. `stray`: an interface that is to
    be refused, and then put out of the bridge.
    """

    key: str
    text: str
    mend: Callable[[Kernel], None] | None = None
    hint: Hint = ""
    vital: bool = True
    new: bool = False
    quiet: bool = False
    gone: bool = False
    stray: str = ""


class Seen(NamedTuple):
    """What there is, of the interfaces that were looked at."""

    links: dict[str, Link]
    addresses: dict[str, set[Address]]
    neighbours: set[tuple[str, str]]
    routes: list[Route]


class Compared(NamedTuple):
    """What differs of each network, and the interfaces that were looked at, by index."""

    drifts: list[list[Drift]]
    numbers: dict[int, str]


class Mended(NamedTuple):
    """What was put back, and what couldn't be, with the reason in its text."""

    done: list[Drift]
    left: list[Drift]


def names(grounds: Iterable[Ground]) -> set[str]:
    """The interfaces that networks consist of."""
    found = set()
    for ground in grounds:
        found.add(ground.network.bridge_name)
        found.update(port.interface for port in ground.ports)
    return found


def look(kernel: Kernel, interfaces: set[str]) -> Seen:
    """Raises OSError."""
    found = kernel.links(interfaces)
    indexes = {link.number: name for name, link in found.items()}
    there = routes.routes(MOST_ROUTES)
    return Seen(found, kernel.all_addresses(indexes), kernel.neighbours_of_ports(indexes), there)


def compare(grounds: list[Ground]) -> Compared:
    """By one look at all. Raises HostError."""
    try:
        with Kernel() as kernel:
            seen = look(kernel, names(grounds))
            drifts = [differences(kernel, ground, seen) for ground in grounds]
            return Compared(drifts, {link.number: name for name, link in seen.links.items()})
    except OSError as exc:
        raise errors.HostError(f"Cannot ask the kernel about interfaces: {exc.strerror}") from exc


def put_back(ground: Ground, spared: frozenset[str] = frozenset()) -> Mended:
    """Have what differs as it should be, but for the keys in `spared`. Raises HostError."""
    done: dict[str, Drift] = {}
    failed: dict[str, str] = {}
    over = set(spared)  # not tried (again)
    try:
        with Kernel() as kernel:
            for again in range(PASSES + 1):
                found = differences(kernel, ground, look(kernel, names([ground])))
                todo = [one for one in found if one.mend is not None and one.key not in over]
                if not todo or again == PASSES:
                    break
                for one in todo:
                    try:
                        assert one.mend is not None
                        one.mend(kernel)
                        done.setdefault(one.key, one)
                        failed.pop(one.key, None)
                    except (errors.HostError, OSError) as exc:
                        cause = exc.__cause__ if isinstance(exc, errors.HostError) else exc
                        failed[one.key] = (isinstance(cause, OSError) and cause.strerror) or str(exc)
                        # What was looked at may have gone since, and something else have come by its name.
                        if not (isinstance(cause, OSError) and cause.errno in (errno.ENODEV, errno.ENOENT)):
                            over.add(one.key)
    except OSError as exc:
        raise errors.HostError(f"Cannot look after {ground.network.bridge_name}: {exc.strerror}") from exc
    left = [one._replace(text=f"{one.text} ({failed[one.key]})" if one.key in failed else one.text) for one in found]
    still = {one.key for one in left}
    return Mended([one for key, one in done.items() if key not in still], left)


def differences(kernel: Kernel, ground: Ground, seen: Seen) -> list[Drift]:
    """What differs of a network; of its ports nothing while there is no bridge for them."""
    network = ground.network
    name = network.bridge_name
    link = seen.links.get(name)
    if link is None or link.kind != "bridge":
        return [_no_bridge(ground, link)]
    if network.own:
        if ground.mac != link.mac and link.alias != alias_of(network):
            return [_no_bridge(ground, link)]
        found = [*_bridge(ground, link), *_addresses(ground, seen), *_host(network)]
        if not found and not link.master:
            found += _routes(kernel, ground, seen.routes)
    else:
        found = []
        if not link.up:
            hint = f"It is the host's: ip link set {name} up."
            found.append(Drift(f"{name} up", f"{name}: the host's bridge is down", None, hint, vital=False))
    for port in ground.ports:
        found += _port(ground, port, link, seen)
    return found


def bridge_key(network: Network) -> str:
    """Of a difference: that there is no bridge."""
    return f"{network.bridge_name} there"


def alias_of(network: Network) -> str:
    return f"virtd network {network.name}"


def _no_bridge(ground: Ground, link: Link | None) -> Drift:
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


def _bridge(ground: Ground, link: Link) -> Iterator[Drift]:
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
        # An older virtd has left them to whoever gets the packet.
        yield Drift(
            f"{name} checksums", f"{name}: checksums are {'left out' if offload else 'computed'}",
            lambda _kernel: set_checksums(name, offload=network.checksum_offload), vital=False, quiet=True,
        )  # fmt: skip
    mtu = _mtu(ground)
    if mtu is not None and link.mtu != mtu:
        yield Drift(
            f"{name} mtu", f"{name}: MTU {link.mtu} instead of {mtu}", lambda kernel: kernel.set_link(name, mtu=mtu)
        )
    six = network.ipv6 is not None
    for key, value in prerequisites.calm(six).items():
        yield from _setting(link, key, value, vital=six)
    for key, needed in (("ipv4/forwarding", network.ipv4), ("ipv6/forwarding", network.ipv6)):
        # What is off for all is told of once.
        if forwards and needed is not None and prerequisites.sysctl(prerequisites.forwarding(key)) != "0":
            yield from _setting(link, key, 1)
    if not link.up:
        yield Drift(f"{name} up", f"{name}: down", lambda kernel: kernel.set_link(name, up=True))


def _mtu(ground: Ground) -> int | None:
    """The bridge's, and its ports'; None where the kernel has it follow an interface that somebody put in."""
    network = ground.network
    if network.mtu is not None or not network.own:
        return network.mtu
    ours = {port.interface for port in ground.ports}
    others = [name for name in links.members(network.bridge_name) if name not in ours]
    return MTU if all(links.mtu(name) >= MTU for name in others) else None


def _setting(link: Link, key: str, value: int, *, vital: bool = True, new: bool = False) -> Iterator[Drift]:
    """A sysctl of an interface's."""
    found = link.values.get(key)
    if found is None or found == value:
        return
    family, _, what = key.partition("/")
    path = f"net/{family}/conf/{link.name}/{what}"

    def mend(_kernel: Kernel) -> None:
        prerequisites.set_sysctl(path, str(value))

    text = f"{prerequisites.dotted(path)}: {found} instead of {value}"
    hint = "Where /proc/sys can be written, sysctl -w NAME=VALUE sets what is named."
    yield Drift(f"{link.name} {key}", text, mend, hint, vital=vital, new=new)


def _host(network: Network) -> Iterator[Drift]:
    def mend(_kernel: Kernel) -> None:
        prerequisites.allow_forwarding(network)

    for path in prerequisites.forwarding_needed(network):
        if prerequisites.sysctl(path) == "0":
            yield Drift(
                path, f"{prerequisites.dotted(path)}: 0 instead of 1", mend, prerequisites.written_elsewhere(path)
            )


def _addresses(ground: Ground, seen: Seen) -> Iterator[Drift]:
    network = ground.network
    name = network.bridge_name
    wanted = {Address(*one) for one in prerequisites.addresses(network)}
    there = {one for one in seen.addresses.get(name, set()) if not _is_link_local(one)}
    if network.ipv6 is not None:
        # Which router advertisements come from. The kernel gives it with IPv6, and not again.
        mine = Address(str(eui64(LINK_LOCAL, ground.mac)), 64)
        wanted.add(mine)
        there |= {mine} & seen.addresses.get(name, set())
    for one in sorted(wanted - there):
        yield Drift(
            f"{name} {one.address}", f"{name}: no address {one.address}/{one.prefix}",
            partial(_add, name, one),
        )  # fmt: skip
    yield from _strangers(name, there - wanted)


def _is_link_local(one: Address) -> bool:
    return one.address.startswith("fe80:")


def _add(name: str, one: Address, kernel: Kernel) -> None:
    kernel.add_address(name, *one)


def _delete(name: str, one: Address, kernel: Kernel) -> None:
    kernel.delete_address(name, *one)


def _lead(name: str, prefix: str, source: str, kernel: Kernel) -> None:
    kernel.add_route(name, prefix, source)


def _strangers(name: str, addresses: set[Address], *, new: bool = False) -> Iterator[Drift]:
    for one in sorted(addresses):
        yield Drift(
            f"{name} {one.address}", f"{name}: an address that isn't virtd's, {one.address}/{one.prefix}",
            partial(_delete, name, one), new=new,
        )  # fmt: skip


def _port(ground: Ground, port: Port, above: Link, seen: Seen) -> Iterator[Drift]:
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
        # Whoever has a tap open can change it (SIOCSIFHWADDR, for which the kernel asks no privilege there), and what
        # is sent to that address a bridge keeps for the host, whoever had it until then: a neighbour is cut off.
        text = f"{name}: MAC address {link.mac} instead of {bridge.address_of(port)}"
        if not port.loose:
            yield Drift(f"{name} stray", text, stray=name)
            return

        def rename(kernel: Kernel) -> None:
            kernel.set_link(name, mac=bridge.address_of(port))

        yield Drift(f"{name} mac", text, rename, new=True)  # an older virtd has left the kernel's
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
    mtu = _mtu(ground) if network.own else None
    if mtu is not None and link.mtu != mtu:
        yield Drift(
            f"{name} mtu", f"{name}: MTU {link.mtu} instead of {mtu}",
            lambda kernel: kernel.set_link(name, mtu=mtu), new=new,
        )  # fmt: skip
    for key, value in bridge.PORT_SETTINGS.items():
        yield from _setting(link, key, value, vital=False, new=new)
    there = seen.addresses.get(name, set())
    if link.values.get("ipv6/disable_ipv6") == 0:  # which gives it one
        there = {one for one in there if not _is_link_local(one)}
    yield from _strangers(name, there, new=new)
    if not link.up:
        yield Drift(f"{name} up", f"{name}: down", lambda kernel: kernel.set_link(name, up=True), new=new)


def _renamed(ground: Ground, port: Port) -> str:
    """What the port's interface is called by now; "" when it isn't there."""
    alias = links.alias_of(ground.network.name, port.user)
    mac = bridge.address_of(port) if port.user.startswith("qemu/") else ""  # a veth has one that the kernel chose
    return links.bearing(alias, mac, [one.interface for one in ground.ports])


def _routes(kernel: Kernel, ground: Ground, there: list[Route]) -> Iterator[Drift]:
    """What the host sends to guests has to leave by the bridge, whatever routes and rules others have."""
    network, name = ground.network, ground.network.bridge_name
    for _key, subnet in network.subnets():
        if why := routes.in_the_way(subnet, name, there):
            hint = "Remove that route, or choose another prefix. ip route and ip -6 route show it."
            if other := links.bearing(alias_of(network), ground.mac, [name]):
                hint = f"{other} was the network's bridge until it was renamed: ip link delete {other}."
            yield Drift(f"{name} {subnet} wins", f"{name}: {why}", None, hint)
            continue
        own = str((network.interface4 if subnet.version == 4 else network.interface6).ip)  # type: ignore[union-attr]
        for address in _samples(ground, subnet, own):
            route = kernel.route_to(address)
            if route is not None and route.interface == name:
                continue
            key = f"{name} {subnet}"
            rules = "ip rule" if subnet.version == 4 else "ip -6 rule"
            if route is None and any(one.prefix == subnet and one.interface == name for one in there):
                text = f"{name}: what is for {address} is refused by a rule of policy routing"
                hint = f"{rules} shows it. Remove that rule, or choose another prefix."
                yield Drift(f"{key} wins", text, None, hint)
            elif _lacks(route, subnet):
                yield Drift(
                    key, f"{name}: no route to {subnet}",
                    partial(_lead, name, str(subnet), own),
                    f"ip route get {address} says where else it leads.",
                )  # fmt: skip
            else:
                assert route is not None
                by = f"{route.prefix or 'a default route'} through {route.interface or 'nowhere'}"
                table = "" if route.table == MAIN else f" in table {route.table}, by a rule of policy routing"
                hint = f"ip route get {address} and {rules} show them. Remove that route, or choose another prefix."
                yield Drift(f"{key} wins", f"{name}: what is for {address} goes by {by}{table}", None, hint)
            break


def _lacks(route: Way | None, subnet: Any) -> bool:
    """Whether it would go by the bridge, if the main table had the route."""
    if route is None:
        return True
    length = int(route.prefix.partition("/")[2] or 0)
    return route.table in (MAIN, DEFAULT) and length < subnet.prefixlen


def _samples(ground: Ground, subnet: Any, own: str) -> list[str]:
    found = [str(subnet[1]), str(subnet[-2])]
    if subnet.version == 4:
        found += sorted({port.ipv4 for port in ground.ports if port.ipv4})[:MOST_ADDRESSES]
    return [address for address in dict.fromkeys(found) if address != own]
