# SPDX-License-Identifier: LGPL-2.1-or-later
"""What virtd changes through rtnetlink(7): bridges, their ports, addresses, routes and policy routing rules.

The layout of the messages is the kernel's, include/uapi/linux/{rtnetlink,if_link,if_addr,neighbour,fib_rules}.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import NamedTuple

from .netlink import CREATE, EXCL, REPLACE, NetlinkError, Requests, attribute, nested

LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
ADDRESS = struct.Struct("=BBBBi")  # ifaddrmsg: family, prefix length, flags, scope, index
NEIGHBOUR = struct.Struct("=BxxxiHBB")  # ndmsg: family, index, state, flags, type
ROUTE = struct.Struct("=8BI")  # rtmsg: family, lengths of both prefixes, TOS, table, protocol, scope, type, flags
# fib_rule_hdr: family, lengths of both prefixes, TOS, table, two reserved, action, flags
RULE = struct.Struct("=8BI")

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_GETNEIGH = 28, 30
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_PROTINFO, IFLA_LINKINFO, IFLA_IFALIAS = 1, 3, 4, 10, 12, 18, 20
INFO_KIND, INFO_DATA = 1, 2
BR_FORWARD_DELAY, BR_STP_STATE = 1, 5
BRPORT_STATE, BRPORT_MODE, BRPORT_LEARNING, BRPORT_MULTICAST_ROUTER, BRPORT_ISOLATED, BRPORT_LOCKED = (
    1, 4, 8, 25, 33, 39,
)  # fmt: skip
_BR_STATE_FORWARDING = 3
IFA_ADDRESS, IFA_LOCAL, _IFA_BROADCAST = 1, 2, 4
NDA_LLADDR = 2
RTA_DST, RTA_SRC, RTA_IIF, RTA_OIF, RTA_PRIORITY, RTA_PREFSRC = 1, 2, 3, 4, 6, 7
FRA_DST, FRA_IIFNAME, FRA_PRIORITY, FRA_PROTOCOL = 1, 3, 6, 21

IFF_UP = 0x1
_IFF_NOARP = 0x80
SCOPE_LINK = 253
_NODAD = 0x02  # IFA_F_NODAD
_NUD_STATIC = 0x42  # NUD_NOARP | NUD_REACHABLE: a permanent entry, iproute2's "static"
_NTF_MASTER, _NTF_STICKY = 0x04, 0x40
UNICAST, _PROTO_KERNEL = 1, 2
_METRIC6 = 256  # IP6_RT_PRIO_ADDRCONF
TO_TABLE, PROHIBIT = 1, 8  # FR_ACT_TO_TBL, FR_ACT_PROHIBIT: actions of policy routing rules
MAIN, LOCAL = 254, 255  # RT_TABLE_*

# A bridge's settings: no spanning tree, and no delay before a port forwards.
_NO_TREE, _NO_DELAY = attribute(BR_STP_STATE, 0), attribute(BR_FORWARD_DELAY, 0)


class RoutingRule(NamedTuple):
    """A policy routing rule (ip-rule(8)), for packets that enter by `iif` and go `to` a prefix; either may be absent.

    `iif` "lo" matches what the host itself sends. `to` is a prefix such as "10.7.0.0/24". TO_TABLE looks up the main
    table.
    """

    version: int  # 4 or 6
    priority: int
    action: int
    iif: str = ""
    to: str = ""


class Netlink(Requests):
    """A routing socket. All methods raise NetlinkError.

    `numbers`: indexes of known interfaces by name. If another interface has taken a name meanwhile, requests still go
    to the index that was meant, or fail with ENODEV.
    """

    def __init__(self) -> None:
        super().__init__(socket.NETLINK_ROUTE)
        self.numbers: dict[str, int] = {}

    def add_bridge(self, name: str, mac: str) -> None:
        """Make a bridge with this MAC, which identifies it later. EEXIST if it exists."""
        body = attribute(IFLA_IFNAME, name) + attribute(IFLA_ADDRESS, _mac(mac))
        body += _bridge(_NO_TREE + _NO_DELAY)
        self.change(RTM_NEWLINK, CREATE | EXCL, LINK.pack(0, 0, 0, 0, 0) + body)

    def set_bridge(self, name: str) -> None:
        """Give a bridge the settings that `add_bridge` makes it with."""
        for data in (_NO_TREE, _NO_TREE + _NO_DELAY):  # a delay of 0 is refused while there is a spanning tree
            self.change(RTM_NEWLINK, 0, LINK.pack(0, 0, self._index(name), 0, 0) + _bridge(data))

    def set_link(
        self,
        name: str,
        *,
        up: bool | None = None,
        arp: bool = False,
        mtu: int | None = None,
        master: str | None = None,
        alias: str | None = None,
        mac: str | None = None,
        rename: str | None = None,
    ) -> None:
        """Change what is given; `master` "" takes the interface out of its bridge. Most kernels `rename` an interface
        only while it is down. `arp`: whether it answers ARP requests for its addresses.
        """
        changed = (0 if up is None else IFF_UP) | (_IFF_NOARP if arp else 0)
        body = LINK.pack(0, 0, self._index(name), IFF_UP if up else 0, changed)
        if mtu is not None:
            body += attribute(IFLA_MTU, mtu)
        if master is not None:
            body += attribute(IFLA_MASTER, self._index(master) if master else 0)
        if alias is not None:
            body += attribute(IFLA_IFALIAS, alias.encode()[:255])
        if mac is not None:
            body += attribute(IFLA_ADDRESS, _mac(mac))
        if rename is not None:
            body += attribute(IFLA_IFNAME, rename)
        self.change(RTM_NEWLINK, 0, body)

    def set_port(self, name: str, *, isolated: bool, locked: bool, learning: bool | None = None) -> None:
        """Set the options of a bridge port.

        `isolated`: no traffic to or from other isolated ports. `locked`: it accepts only frames from MACs that
        `add_neighbour_of_port` named, and learns none; kernels before 5.18 know only the latter. `learning`: whether
        the bridge learns MACs behind it, by default unless it is locked.
        """
        # A guest must not make its port a multicast router's, which gets all multicast, by claiming to be one.
        flags = {
            BRPORT_ISOLATED: isolated,
            BRPORT_LOCKED: locked,
            BRPORT_LEARNING: not locked if learning is None else learning,
            BRPORT_MULTICAST_ROUTER: not locked,
        }
        self._set_port(name, *(attribute(kind, bytes([value])) for kind, value in flags.items()))

    def set_port_forwarding(self, name: str) -> None:
        """Set a port to forwarding, if no spanning tree decides about that."""
        self._set_port(name, attribute(BRPORT_STATE, bytes([_BR_STATE_FORWARDING])))

    def set_port_hairpin(self, name: str, *, on: bool) -> None:
        """Set whether a port may send a frame back out that came in by it."""
        self._set_port(name, attribute(BRPORT_MODE, bytes([on])))

    def _set_port(self, name: str, *settings: bytes) -> None:
        head = LINK.pack(socket.AF_BRIDGE, 0, self._index(name), 0, 0)
        self.change(RTM_SETLINK, 0, head + nested(IFLA_PROTINFO, *settings))

    def add_neighbour_of_port(self, name: str, mac: str) -> None:
        """Fix the port by which a bridge reaches a MAC, whatever arrives at other ports."""
        head = NEIGHBOUR.pack(socket.AF_BRIDGE, self._index(name), _NUD_STATIC, _NTF_MASTER | _NTF_STICKY, 0)
        self.change(RTM_NEWNEIGH, CREATE | REPLACE, head + attribute(NDA_LLADDR, _mac(mac)))

    def delete_link(self, name: str) -> bool:
        """Delete an interface; False if there is none with that name."""
        try:
            self.change(RTM_DELLINK, 0, LINK.pack(0, 0, self._index(name), 0, 0))
        except OSError as exc:
            if exc.errno == errno.ENODEV:
                return False
            raise
        return True

    def add_address(self, name: str, address: str, prefix: int) -> None:
        """Give an interface an address immediately, without IPv6's duplicate address detection."""
        family, data = packed(address)
        body = ADDRESS.pack(family, prefix, _NODAD, 0, self._index(name))
        body += attribute(IFA_LOCAL, data) + attribute(IFA_ADDRESS, data)
        if family == socket.AF_INET:
            number = int.from_bytes(data, "big") | ((1 << (32 - prefix)) - 1)
            body += attribute(_IFA_BROADCAST, number.to_bytes(4, "big"))
        self.change(RTM_NEWADDR, CREATE | REPLACE, body)

    def delete_address(self, name: str, address: str, prefix: int) -> None:
        family, data = packed(address)
        body = ADDRESS.pack(family, prefix, 0, 0, self._index(name)) + attribute(IFA_LOCAL, data)
        self.change(RTM_DELADDR, 0, body)

    def add_route(self, name: str, prefix: str, source: str) -> None:
        """Add the route that the kernel itself would add for an interface's address."""
        to, _, length = prefix.partition("/")
        family, data = packed(to)
        scope = SCOPE_LINK if family == socket.AF_INET else 0
        body = ROUTE.pack(family, int(length), 0, 0, MAIN, _PROTO_KERNEL, scope, UNICAST, 0)
        body += attribute(RTA_DST, data) + attribute(RTA_OIF, self._index(name))
        if family == socket.AF_INET:
            body += attribute(RTA_PREFSRC, packed(source)[1])
        else:
            body += attribute(RTA_PRIORITY, _METRIC6)
        self.change(RTM_NEWROUTE, CREATE | REPLACE, body)

    def add_routing_rule(self, rule: RoutingRule, protocol: int) -> None:
        """Add a rule; its interface need not exist yet, and may come and go. EEXIST if the rule exists."""
        self.change(RTM_NEWRULE, CREATE | EXCL, _rule(rule, protocol))

    def delete_routing_rule(self, rule: RoutingRule, protocol: int) -> None:
        self.change(RTM_DELRULE, 0, _rule(rule, protocol))

    def _index(self, name: str) -> int:
        try:
            return self.numbers.get(name) or socket.if_nametoindex(name)
        except OSError:
            raise NetlinkError(errno.ENODEV, f"no interface {name}") from None


def packed(address: str) -> tuple[int, bytes]:
    """An address's family, and its bytes in network order."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return family, socket.inet_pton(family, address)


def _rule(rule: RoutingRule, protocol: int) -> bytes:
    address, _, length = rule.to.partition("/")
    family = socket.AF_INET if rule.version == 4 else socket.AF_INET6
    table = MAIN if rule.action == TO_TABLE else 0
    body = RULE.pack(family, int(length or 0), 0, 0, table, 0, 0, rule.action, 0)
    body += attribute(FRA_PRIORITY, rule.priority) + attribute(FRA_PROTOCOL, bytes([protocol]))
    if rule.iif:
        body += attribute(FRA_IIFNAME, rule.iif)
    if rule.to:
        body += attribute(FRA_DST, packed(address)[1])
    return body


def _bridge(settings: bytes) -> bytes:
    return attribute(IFLA_LINKINFO, attribute(INFO_KIND, "bridge") + attribute(INFO_DATA, settings))


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))
