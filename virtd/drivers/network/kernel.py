# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel has of interfaces, told in one answer for all of them, and by which route a packet goes.

An interface's own settings (the sysctls below net.ipv4.conf and net.ipv6.conf, what a bridge does with a port) come
in the same message of rtnetlink(7), IFLA_AF_SPEC and IFLA_LINKINFO of linux/if_link.h. Only what is asked for is
decoded: a thousand interfaces of others cost a few milliseconds.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import socket
import struct
import sys
from typing import TYPE_CHECKING, NamedTuple

from .netlink import Address, Netlink, NetlinkError, attribute, attributes, packed

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBi")  # ifaddrmsg: family, prefix length, flags, scope, index
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # ndmsg: family, index, state, flags, type
_ROUTE = struct.Struct("=8BI")  # rtmsg: family, lengths of both prefixes, TOS, table, protocol, scope, type, flags
_INT = struct.Struct("=I")

_GETLINK, _GETADDR, _NEWROUTE, _GETROUTE, _GETNEIGH = 18, 22, 24, 26, 30
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_IFALIAS = 1, 3, 4, 10, 18, 20
_IFLA_AF_SPEC, _IFLA_EXT_MASK, _SKIP_STATS = 26, 29, 8
_KIND, _DATA, _SLAVE_KIND, _SLAVE_DATA = 1, 2, 4, 5
_IFF_UP, _IFF_LOWER_UP = 0x1, 0x10000
_BRIDGE = {1: "forward_delay", 5: "stp_state"}  # IFLA_BR_*
_PORT = {
    1: "state",
    4: "hairpin",
    8: "learning",
    25: "multicast_router",
    33: "isolated",
    39: "locked",
}  # IFLA_BRPORT_*
# Where the settings are in the arrays that come: linux/ip.h (counted from 1), linux/ipv6.h.
_CONF4 = {0: "ipv4/forwarding", 7: "ipv4/rp_filter", 18: "ipv4/arp_ignore"}
_CONF6 = {0: "ipv6/forwarding", 3: "ipv6/accept_ra", 5: "ipv6/autoconf", 26: "ipv6/disable_ipv6"}
_INET_CONF, _INET6_CONF, _INET6_ADDR_GEN_MODE = 1, 2, 8
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_SCOPE_LINK = 253
_NUD_NOARP, _NDA_LLADDR, _NDA_MASTER = 0x40, 2, 9
_RTA_DST, _RTA_OIF, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_TABLE = 1, 4, 6, 7, 15
_METRIC6 = 256  # IP6_RT_PRIO_ADDRCONF
_LOOKUP_TABLE, _FIB_MATCH = 0x1000, 0x2000  # RTM_F_*
_PROTO_KERNEL, _UNICAST, MAIN = 2, 1, 254

_SIOCETHTOOL, _GTXCSUM, _STXCSUM = 0x8946, 0x16, 0x17  # linux/sockios.h, linux/ethtool.h


class Link(NamedTuple):
    """An interface; `number` is its index, `kind` "bridge" or "veth", `master` the bridge that it is in, or "".

    `values`: of its settings those that this kernel tells, by names such as "ipv6/accept_ra" (a sysctl), "stp_state"
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


class Way(NamedTuple):
    """By which a packet goes: `prefix` as text, "" for all the world; `interface` "" for one that leads nowhere."""

    prefix: str
    interface: str
    table: int


class Kernel(Netlink):
    """A socket to the kernel's routing, for those who look at many things at once."""

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except (struct.error, LookupError, ValueError, OverflowError):
            raise NetlinkError(errno.EBADMSG, "the kernel's answer isn't one that virtd knows") from None

    def links(self, names: Collection[str]) -> dict[str, Link]:
        """Those of these interfaces that there are. Who asks by their names from now on means these."""
        with self._understood():
            return self._links(names)

    def _links(self, names: Collection[str]) -> dict[str, Link]:
        index_of: dict[int, str] = {}
        found = []
        mask = attribute(_IFLA_EXT_MASK, _INT.pack(_SKIP_STATS))
        for body in self.dump(_GETLINK, _LINK.pack(0, 0, 0, 0, 0) + mask):
            _family, _type, index, flags, _change = _LINK.unpack_from(body)
            parts = attributes(body[_LINK.size :])
            name = ""
            for kind, value in parts:  # the name comes first
                if kind == _IFLA_IFNAME:
                    name = _text(value)
                    break
            index_of[index] = name
            if name in names:
                found.append((index, name, flags, dict(parts)))
        self.numbers = {name: index for index, name, _flags, _parts in found}
        return {name: _link(index, name, flags, parts, index_of) for index, name, flags, parts in found}

    def all_addresses(self, indexes: dict[int, str]) -> dict[str, set[Address]]:
        """By interface, `indexes` having those that count."""
        with self._understood():
            return self._all_addresses(indexes)

    def _all_addresses(self, indexes: dict[int, str]) -> dict[str, set[Address]]:
        found: dict[str, set[Address]] = {}
        for body in self.dump(_GETADDR, _ADDRESS.pack(0, 0, 0, 0, 0)):
            family, prefix, _flags, _scope, index = _ADDRESS.unpack_from(body)
            if index not in indexes:
                continue
            parts = dict(attributes(body[_ADDRESS.size :]))
            local = parts.get(_IFA_LOCAL) or parts.get(_IFA_ADDRESS)
            if local is not None:
                found.setdefault(indexes[index], set()).add(Address(socket.inet_ntop(family, local), prefix))
        return found

    def neighbours_of_ports(self, indexes: dict[int, str]) -> set[tuple[str, str]]:
        """Interface and MAC of what bridges were told by `add_neighbour_of_port`."""
        with self._understood():
            return self._neighbours(indexes)

    def _neighbours(self, indexes: dict[int, str]) -> set[tuple[str, str]]:
        found = set()
        for body in self.dump(_GETNEIGH, _NEIGHBOUR.pack(socket.AF_BRIDGE, 0, 0, 0, 0)):
            _family, index, state, _flags, _type = _NEIGHBOUR.unpack_from(body)
            if index in indexes and state & _NUD_NOARP:
                parts = dict(attributes(body[_NEIGHBOUR.size :]))
                if _NDA_MASTER in parts:
                    found.add((indexes[index], parts.get(_NDA_LLADDR, b"").hex(":")))
        return found

    def route_to(self, address: str) -> Way | None:
        """Which route what the host sends to an address goes by, all rules of policy routing considered."""
        with self._understood():
            return self._route_to(address)

    def _route_to(self, address: str) -> Way | None:
        family, data = packed(address)
        head = _ROUTE.pack(family, len(data) * 8, 0, 0, 0, 0, 0, 0, _LOOKUP_TABLE | _FIB_MATCH)
        try:
            body = self.answer(_GETROUTE, head + attribute(_RTA_DST, data))
        except OSError as exc:
            if exc.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL):
                return None
            raise
        _family, length, _source, _tos, table, *_rest = _ROUTE.unpack_from(body)
        parts = dict(attributes(body[_ROUTE.size :]))
        to, oif = parts.get(_RTA_DST), parts.get(_RTA_OIF)
        if (number := parts.get(_RTA_TABLE)) is not None:
            (table,) = _INT.unpack(number)
        prefix = f"{socket.inet_ntop(family, to)}/{length}" if to is not None and length else ""
        return Way(prefix, _name(_INT.unpack(oif)[0]) if oif is not None else "", table)

    def add_route(self, name: str, prefix: str, source: str) -> None:
        """What the kernel itself adds for an interface's address."""
        to, _, length = prefix.partition("/")
        family, data = packed(to)
        scope = _SCOPE_LINK if family == socket.AF_INET else 0
        head = _ROUTE.pack(family, int(length), 0, 0, MAIN, _PROTO_KERNEL, scope, _UNICAST, 0)
        body = attribute(_RTA_DST, data) + attribute(_RTA_OIF, _INT.pack(self._index(name)))
        if family == socket.AF_INET:
            body += attribute(_RTA_PREFSRC, packed(source)[1])
        else:
            body += attribute(_RTA_PRIORITY, _INT.pack(_METRIC6))
        self.create(_NEWROUTE, head + body)


def checksums(name: str) -> bool | None:
    """Whether the interface leaves checksums of what is sent to the hardware; None where that can't be asked."""
    try:
        return bool(_ethtool(name, _GTXCSUM, 0))
    except OSError:
        return None


def set_checksums(name: str, *, offload: bool) -> None:
    _ethtool(name, _STXCSUM, int(offload))


def _ethtool(name: str, command: int, value: int) -> int:
    argument = array.array("I", [command, value])
    request = struct.pack("16sP16x", name.encode(), argument.buffer_info()[0])
    # Any socket will do, and our unit allows for no other kind.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as one:
        fcntl.ioctl(one, _SIOCETHTOOL, request)
    return argument[1]


def _link(index: int, name: str, flags: int, parts: dict[int, bytes], index_of: dict[int, str]) -> Link:
    info = dict(attributes(parts.get(_IFLA_LINKINFO, b"")))
    kind = _text(info.get(_KIND, b""))
    values: dict[str, int] = {}
    if kind == "bridge":
        values |= _numbers(_BRIDGE, info.get(_DATA, b""))
    if _text(info.get(_SLAVE_KIND, b"")) == "bridge":
        values |= _numbers(_PORT, info.get(_SLAVE_DATA, b""))
    families = dict(attributes(parts.get(_IFLA_AF_SPEC, b"")))
    four = dict(attributes(families.get(socket.AF_INET, b"")))
    six = dict(attributes(families.get(socket.AF_INET6, b"")))
    values |= dict(_array(_CONF4, four.get(_INET_CONF, b"")))
    values |= dict(_array(_CONF6, six.get(_INET6_CONF, b"")))
    if mode := six.get(_INET6_ADDR_GEN_MODE):
        values["ipv6/addr_gen_mode"] = mode[0]
    master = parts.get(_IFLA_MASTER)
    return Link(
        index,
        name,
        kind,
        bool(flags & _IFF_UP),
        bool(flags & _IFF_LOWER_UP),
        _INT.unpack(parts.get(_IFLA_MTU, bytes(4)))[0],
        parts.get(_IFLA_ADDRESS, b"").hex(":"),
        _text(parts.get(_IFLA_IFALIAS, b"")),
        index_of.get(_INT.unpack(master)[0], "?") if master is not None else "",
        values,
    )


def _numbers(known: dict[int, str], data: bytes) -> dict[str, int]:
    return {known[kind]: int.from_bytes(value, sys.byteorder) for kind, value in attributes(data) if kind in known}


def _array(known: dict[int, str], data: bytes) -> Iterator[tuple[str, int]]:
    for place, name in known.items():
        if 4 * place + 4 <= len(data):
            yield name, struct.unpack_from("=i", data, 4 * place)[0]


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return ""
