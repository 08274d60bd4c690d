# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel reports about interfaces, addresses, neighbours, routes and rules, in replies and notifications.

An interface's own settings (the sysctls below net.ipv4.conf and net.ipv6.conf, the options of a bridge port) arrive
in the same rtnetlink(7) message: IFLA_AF_SPEC and IFLA_LINKINFO of linux/if_link.h. Only what is requested is
decoded: a thousand interfaces of others cost a few milliseconds.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from . import rtnetlink as rt
from .netlink import Attributes, Message, attribute, understood

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_IFLA_AF_SPEC, _IFLA_EXT_MASK, _SKIP_STATS = 26, 29, 8
_SLAVE_KIND, _SLAVE_DATA = 4, 5
_LOWER_UP = 0x10000
_BRIDGE = {rt.BR_FORWARD_DELAY: "forward_delay", rt.BR_STP_STATE: "stp_state"}
_PORT = {
    rt.BRPORT_STATE: "state",
    rt.BRPORT_MODE: "hairpin",
    rt.BRPORT_LEARNING: "learning",
    rt.BRPORT_MULTICAST_ROUTER: "multicast_router",
    rt.BRPORT_ISOLATED: "isolated",
    rt.BRPORT_LOCKED: "locked",
}
# Indexes of the settings in the arrays of the message: linux/ip.h (counted from 1), linux/ipv6.h.
_CONF4 = {0: "ipv4/forwarding", 7: "ipv4/rp_filter", 18: "ipv4/arp_ignore"}
_CONF6 = {0: "ipv6/forwarding", 3: "ipv6/accept_ra", 5: "ipv6/autoconf", 26: "ipv6/disable_ipv6"}
_INET_CONF, _INET6_CONF, _INET6_ADDR_GEN_MODE = 1, 2, 8
_IFF_NOARP = 0x80  # linux/if.h
_NUD_NOARP, _NDA_MASTER = 0x40, 9
_RTA_TABLE = 15
_LOOKUP_TABLE, _FIB_MATCH = 0x1000, 0x2000  # RTM_F_*
_NEWNETCONF, _NETCONF = 80, struct.Struct("=Bxxx")  # netconfmsg, linux/netconf.h
_NETCONFA_IFINDEX = 1


class Link(NamedTuple):
    """An interface. `number`: its index; `kind`: "bridge", "veth" and so on; `master`: the bridge that it is in, or
    "".

    `values`: the settings that this kernel reports, by names such as "ipv6/accept_ra" (a sysctl), "arp", "stp_state"
    (a bridge's) and "locked" (a port's).
    """

    number: int
    name: str
    kind: str
    up: bool
    carrier: bool
    mtu: int
    mac: str
    alias: str
    master: str
    values: dict[str, int]


class Address(NamedTuple):
    """An interface's address as the kernel has it: text and prefix length."""

    address: str
    prefix: int


class Route(NamedTuple):
    """The interface by which a packet leaves the host ("" if it stays), and the host's source address for it."""

    interface: str
    source: str


class Way(NamedTuple):
    """The route that a packet takes: `prefix` as text, "" for a default route.

    `interface` is "" for a route that leads nowhere.
    """

    prefix: str
    interface: str
    table: int


class LinkChanged(NamedTuple):
    """An interface was made, changed or deleted, or had its addresses or settings changed.

    `number`: its index. `name`: "" if no interface has that index any more; the new name if it was renamed.
    """

    name: str
    number: int


class RouteChanged(NamedTuple):
    """A route was added or removed; `prefix` is its address as a number, `bits` the prefix length."""

    version: int
    prefix: int
    bits: int
    table: int


class RuleChanged(NamedTuple):
    """A policy routing rule was added or removed."""

    removed: bool


Change = LinkChanged | RouteChanged | RuleChanged


class Kernel(rt.Netlink):
    """A routing socket that also reads. All methods raise NetlinkError."""

    @understood()
    def links(self, names: Collection[str]) -> dict[str, Link]:
        """Those of these interfaces that exist, by name. From now on this socket resolves their names to them."""
        index_of: dict[int, str] = {}
        found = []
        mask = attribute(_IFLA_EXT_MASK, _SKIP_STATS)
        for message in self.dump(rt.RTM_GETLINK, rt.LINK.pack(0, 0, 0, 0, 0) + mask):
            index, name = message.head(rt.LINK)[2], message.text(rt.LINK, rt.IFLA_IFNAME)
            index_of[index] = name
            if name in names:
                found.append((name, message))
        links = {name: _link(name, message, index_of) for name, message in found}
        self.numbers = {name: link.number for name, link in links.items()}
        return links

    @understood()
    def all_addresses(self, indexes: dict[int, str]) -> dict[str, set[Address]]:
        """The addresses of the interfaces in `indexes` (names by index), by interface."""
        found: dict[str, set[Address]] = {}
        for index, _scope, address in self._addresses():
            if index in indexes:
                found.setdefault(indexes[index], set()).add(address)
        return found

    @understood()
    def addresses(self, name: str) -> list[Address]:
        """All addresses of an interface except link-local ones."""
        mine = self._index(name)
        return [address for index, scope, address in self._addresses() if index == mine and scope < rt.SCOPE_LINK]

    def _addresses(self) -> Iterator[tuple[int, int, Address]]:
        for message in self.dump(rt.RTM_GETADDR, rt.ADDRESS.pack(0, 0, 0, 0, 0)):
            family, prefix, _flags, scope, index = message.head(rt.ADDRESS)
            found = message.attributes(rt.ADDRESS)
            if (local := found.get(rt.IFA_LOCAL) or found.get(rt.IFA_ADDRESS)) is not None:
                yield index, scope, Address(socket.inet_ntop(family, local), prefix)

    @understood()
    def neighbours_of_ports(self, indexes: dict[int, str]) -> set[tuple[str, str]]:
        """The (interface, MAC) pairs that `add_neighbour_of_port` made."""
        found = set()
        for message in self.dump(rt.RTM_GETNEIGH, rt.NEIGHBOUR.pack(socket.AF_BRIDGE, 0, 0, 0, 0)):
            _family, index, state, _flags, _type = message.head(rt.NEIGHBOUR)
            if index in indexes and state & _NUD_NOARP:
                entry = message.attributes(rt.NEIGHBOUR)
                if _NDA_MASTER in entry:
                    found.add((indexes[index], entry.get(rt.NDA_LLADDR, b"").hex(":")))
        return found

    @understood()
    def route(self, to: str, *, source: str = "", iif: str = "") -> Route:
        """The route of a packet from `source` that enters by `iif`, or of one from the host itself."""
        more = attribute(rt.RTA_SRC, rt.packed(source)[1]) if source else b""
        more += attribute(rt.RTA_IIF, self._index(iif)) if iif else b""
        message = self._route(to, 0, more, source=bool(source))
        family, found = message.head(rt.ROUTE)[0], message.attributes(rt.ROUTE)
        unicast, mine = message.head(rt.ROUTE)[7] == rt.UNICAST, found.get(rt.RTA_PREFSRC)
        return Route(
            socket.if_indextoname(found.number(rt.RTA_OIF)) if rt.RTA_OIF in found and unicast else "",
            socket.inet_ntop(family, mine) if mine else "",
        )

    @understood()
    def route_to(self, address: str) -> Way | None:
        """The route that a packet from the host to an address takes, taking all policy routing rules into account."""
        try:
            message = self._route(address, _LOOKUP_TABLE | _FIB_MATCH)
        except OSError as exc:
            if exc.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL):
                return None
            raise
        family, length, _source, _tos, table, *_rest = message.head(rt.ROUTE)
        found = message.attributes(rt.ROUTE)
        to = found.get(rt.RTA_DST)
        return Way(
            f"{socket.inet_ntop(family, to)}/{length}" if to is not None and length else "",
            _name_of(found.number(rt.RTA_OIF)) if rt.RTA_OIF in found else "",
            found.number(_RTA_TABLE) if _RTA_TABLE in found else table,
        )

    def _route(self, to: str, flags: int, more: bytes = b"", *, source: bool = False) -> Message:
        family, data = rt.packed(to)
        bits = len(data) * 8
        head = rt.ROUTE.pack(family, bits, bits if source else 0, 0, 0, 0, 0, 0, flags)
        return self.answer(rt.RTM_GETROUTE, head + attribute(rt.RTA_DST, data) + more)

    @understood()
    def routing_rules(self, protocol: int) -> set[rt.RoutingRule]:
        """The policy routing rules with this protocol number, which tells who made them."""
        found = set()
        for family, version in ((socket.AF_INET, 4), (socket.AF_INET6, 6)):
            for message in self.dump(rt.RTM_GETRULE, rt.RULE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)):
                # A kernel without IPv6 answers with the rules of all families.
                of, length, *_rest, action, _flags = message.head(rt.RULE)
                rule = message.attributes(rt.RULE)
                if of != family or rule.number(rt.FRA_PROTOCOL) != protocol:
                    continue
                to = f"{socket.inet_ntop(family, rule[rt.FRA_DST])}/{length}" if rt.FRA_DST in rule else ""
                priority, iif = rule.number(rt.FRA_PRIORITY), rule.text(rt.FRA_IIFNAME)
                found.add(rt.RoutingRule(version, priority, action, iif, to))
        return found


@understood()
def changed(message: Message) -> Change | None:
    """What an rtnetlink notification is about; None for anything else. Raises NetlinkError."""
    match message.kind:
        case rt.RTM_NEWLINK | rt.RTM_DELLINK:
            name = message.text(rt.LINK, rt.IFLA_IFNAME)
            return LinkChanged(name, message.head(rt.LINK)[2]) if name else None
        case rt.RTM_NEWADDR | rt.RTM_DELADDR:
            index = message.head(rt.ADDRESS)[4]
            return LinkChanged(_name_of(index), index)
        case _ if message.kind == _NEWNETCONF:
            index = message.attributes(_NETCONF).number(_NETCONFA_IFINDEX, signed=True)
            return LinkChanged(_name_of(index), index)
        case rt.RTM_NEWROUTE | rt.RTM_DELROUTE:
            family, length, _source, _tos, table, *_rest = message.head(rt.ROUTE)
            version, size = (4, 4) if family == socket.AF_INET else (6, 16)
            data = message.attributes(rt.ROUTE).get(rt.RTA_DST, b"").ljust(size, b"\0")
            return RouteChanged(version, int.from_bytes(data, "big"), length, table)
        case rt.RTM_NEWRULE | rt.RTM_DELRULE:
            return RuleChanged(removed=message.kind == rt.RTM_DELRULE)
    return None


def _link(name: str, message: Message, index_of: dict[int, str]) -> Link:
    _family, _type, index, flags, _change = message.head(rt.LINK)
    found = message.attributes(rt.LINK)
    info, families = found.within(rt.IFLA_LINKINFO), found.within(_IFLA_AF_SPEC)
    four, six = families.within(socket.AF_INET), families.within(socket.AF_INET6)
    kind = info.text(rt.INFO_KIND)
    values: dict[str, int] = {"arp": int(not flags & _IFF_NOARP)}
    if kind == "bridge":
        values |= _named(_BRIDGE, info.within(rt.INFO_DATA))
    if info.text(_SLAVE_KIND) == "bridge":
        values |= _named(_PORT, info.within(_SLAVE_DATA))
    values |= dict(_array(_CONF4, four.get(_INET_CONF, b"")))
    values |= dict(_array(_CONF6, six.get(_INET6_CONF, b"")))
    if mode := six.get(_INET6_ADDR_GEN_MODE):
        values["ipv6/addr_gen_mode"] = mode[0]
    return Link(
        index,
        name,
        kind,
        bool(flags & rt.IFF_UP),
        bool(flags & _LOWER_UP),
        found.number(rt.IFLA_MTU),
        found.get(rt.IFLA_ADDRESS, b"").hex(":"),
        found.text(rt.IFLA_IFALIAS),
        index_of.get(found.number(rt.IFLA_MASTER), "?") if rt.IFLA_MASTER in found else "",
        values,
    )


def _named(known: dict[int, str], found: Attributes) -> dict[str, int]:
    return {name: found.number(kind) for kind, name in known.items() if kind in found}


def _array(known: dict[int, str], data: bytes) -> Iterator[tuple[str, int]]:
    for place, name in known.items():
        if 4 * place + 4 <= len(data):
            yield name, struct.unpack_from("=i", data, 4 * place)[0]


def _name_of(index: int) -> str:
    """The name of the interface with this index; "" if there is none."""
    try:
        return socket.if_indextoname(index)
    except (OSError, OverflowError):
        return ""
