# SPDX-License-Identifier: LGPL-2.1-or-later
"""What virtd needs of rtnetlink(7): bridges, their ports, addresses and rules of policy routing.

By hand, because it is little. pyroute2, measured with 0.7.7 on Python 3.13, takes 90 ms to import and 15 MB of
memory, 262 modules with an HTTP server and unittest among them; that is as much as all of the daemon. The layout of
the messages is the kernel's, include/uapi/linux/{netlink,rtnetlink,if_link,if_addr,neighbour,fib_rules}.h.

Calls block, for microseconds mostly, but a deletion waits for the kernel's grace periods: use a thread for those.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # nlattr: length, type
_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBi")  # ifaddrmsg: family, prefix length, flags, scope, index
_RULE = struct.Struct(
    "=8BI"
)  # fib_rule_hdr: family, lengths of both prefixes, TOS, table, two reserved, action, flags
_INT = struct.Struct("=I")

NLMSG_ERROR, NLMSG_DONE = 2, 3
RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 16, 17, 20, 21, 22
RTM_SETLINK, RTM_NEWNEIGH = 19, 28
RTM_GETROUTE = 26
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
_REQUEST, _ACK, _DUMP, _REPLACE, _EXCL, _CREATE = 0x1, 0x4, 0x300, 0x100, 0x200, 0x400
_CAPPED, _WITH_TEXT = 0x100, 0x200  # NLM_F_CAPPED and NLM_F_ACK_TLVS, in answers
SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_EXT_ACK = 270, 10, 11

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_IFALIAS = 1, 3, 4, 10, 18, 20
_INFO_KIND, _INFO_DATA = 1, 2
_BR_FORWARD_DELAY, _BR_STP_STATE = 1, 5
_IFLA_PROTINFO, _NESTED = 12, 0x8000
_BRPORT_STATE, _BRPORT_MODE, _BRPORT_LEARNING, _BRPORT_MULTICAST_ROUTER, _BRPORT_ISOLATED, _BRPORT_LOCKED = (
    1,
    4,
    8,
    25,
    33,
    39,
)
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # ndmsg: family, index, state, flags, type
_NDA_LLADDR = 2
_NUD_STATIC = 0x42  # NUD_NOARP | NUD_REACHABLE: an entry that doesn't age, iproute2's "static"
_NTF_MASTER, _NTF_STICKY = 0x04, 0x40
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST, _IFA_FLAGS = 1, 2, 4, 8
_IFA_F_NODAD = 0x02
_FRA_DST, _FRA_IIFNAME, _FRA_PRIORITY, _FRA_TABLE, _FRA_PROTOCOL = 1, 3, 6, 15, 21  # fib_rules.h
_ROUTE = struct.Struct("=8BI")  # rtmsg: family, lengths of both prefixes, TOS, table, protocol, scope, type, flags
_RTA_DST, _RTA_SRC, _RTA_IIF, _RTA_OIF, _RTA_PREFSRC, _RTN_UNICAST = 1, 2, 3, 4, 7, 1
_IFF_UP = 0x1

TO_TABLE, PROHIBIT = 1, 8  # FR_ACT_TO_TBL, FR_ACT_PROHIBIT: what a rule of policy routing does
MAIN = 254  # RT_TABLE_MAIN


class NetlinkError(OSError):
    """The kernel refused; `strerror` has its own words where it has any."""


class Address(NamedTuple):
    """An interface's address as the kernel has it: text, length of the prefix."""

    address: str
    prefix: int


class Route(NamedTuple):
    """By which interface something leaves the host, "" for what stays; and from which address if it is the host's."""

    interface: str
    source: str


class RoutingRule(NamedTuple):
    """A rule of policy routing (ip-rule(8)): what comes in by `iif` and is meant for `to`, or either, if given.

    `iif` "lo" is what the host itself sends. `to` is a prefix such as "10.7.0.0/24". TO_TABLE: the main one.
    """

    version: int  # 4 or 6
    priority: int
    action: int
    iif: str = ""
    to: str = ""


class Netlink:
    """A socket to the kernel's routing. Close it, or use it in a with statement.

    `numbers`: interfaces by name whose index is known. Another one that has come by that name meanwhile is none of
    them: what is asked for then fails with ENODEV, or is done to the one that was meant.
    """

    def __init__(self, protocol: int = socket.NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        try:
            self._socket.bind((0, 0))
            for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK):
                self._socket.setsockopt(SOL_NETLINK, option, 1)
        except BaseException:
            self._socket.close()
            raise
        self._sequence = 0
        self.numbers: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._socket.close()

    def add_bridge(self, name: str, mac: str) -> None:
        """Make a bridge with this address, by which it is known again. Raises NetlinkError, EEXIST for one."""
        info = attribute(_INFO_KIND, b"bridge\0") + attribute(_INFO_DATA, _NO_TREE + _NO_DELAY)
        body = _LINK.pack(0, 0, 0, 0, 0)
        body += attribute(_IFLA_IFNAME, name.encode() + b"\0") + attribute(_IFLA_ADDRESS, _mac(mac))
        body += attribute(_IFLA_LINKINFO, info)
        self._ask(RTM_NEWLINK, _CREATE | _EXCL, body)

    def set_bridge(self, name: str) -> None:
        """Have a bridge's own settings as `add_bridge` makes them."""
        for data in (_NO_TREE, _NO_TREE + _NO_DELAY):  # with a spanning tree there is no delay of 0
            info = attribute(_INFO_KIND, b"bridge\0") + attribute(_INFO_DATA, data)
            self._ask(RTM_NEWLINK, 0, _LINK.pack(0, 0, self._index(name), 0, 0) + attribute(_IFLA_LINKINFO, info))

    def set_link(
        self,
        name: str,
        *,
        up: bool | None = None,
        mtu: int | None = None,
        master: str | None = None,
        alias: str | None = None,
        mac: str | None = None,
        rename: str | None = None,
    ) -> None:
        """Change what is given; `master` "" takes the interface out of its bridge. Most kernels `rename` what is down
        only.
        """
        flags = _IFF_UP if up else 0
        body = _LINK.pack(0, 0, self._index(name), flags, 0 if up is None else _IFF_UP)
        if mtu is not None:
            body += attribute(_IFLA_MTU, _INT.pack(mtu))
        if master is not None:
            body += attribute(_IFLA_MASTER, _INT.pack(self._index(master) if master else 0))
        if alias is not None:
            body += attribute(_IFLA_IFALIAS, alias.encode()[:255])
        if mac is not None:
            body += attribute(_IFLA_ADDRESS, _mac(mac))
        if rename is not None:
            body += attribute(_IFLA_IFNAME, rename.encode() + b"\0")
        self._ask(RTM_NEWLINK, 0, body)

    def set_port(self, name: str, *, isolated: bool, locked: bool, learning: bool | None = None) -> None:
        """What a bridge does with a port of its own. `learning`: of who is behind it; not where it is locked.

        `isolated`: nothing goes to or comes from other such ports. `locked`: it takes frames from those MACs only
        that `add_neighbour_of_port` named, and learns none; kernels before 5.18 know only the latter.
        """
        data = attribute(_BRPORT_ISOLATED, bytes([isolated])) + attribute(_BRPORT_LOCKED, bytes([locked]))
        # Nor does it become a multicast router's, who gets everybody's, by saying that it is one.
        data += attribute(_BRPORT_LEARNING, bytes([not locked if learning is None else learning]))
        data += attribute(_BRPORT_MULTICAST_ROUTER, bytes([0 if locked else 1]))
        self._set_port(name, data)

    def set_port_forwarding(self, name: str) -> None:
        """Have a port take and send frames, where there is no spanning tree to say so."""
        self._set_port(name, attribute(_BRPORT_STATE, bytes([3])))

    def set_port_hairpin(self, name: str, *, on: bool) -> None:
        """Whether a port sends out what came in by it, where the bridge finds that it leads there."""
        self._set_port(name, attribute(_BRPORT_MODE, bytes([on])))

    def _set_port(self, name: str, data: bytes) -> None:
        body = _LINK.pack(socket.AF_BRIDGE, 0, self._index(name), 0, 0) + attribute(_IFLA_PROTINFO | _NESTED, data)
        self._ask(RTM_SETLINK, 0, body)

    def add_neighbour_of_port(self, name: str, mac: str) -> None:
        """Tell a bridge by which port a MAC is reached, for good, whatever comes in elsewhere."""
        head = _NEIGHBOUR.pack(socket.AF_BRIDGE, self._index(name), _NUD_STATIC, _NTF_MASTER | _NTF_STICKY, 0)
        self._ask(RTM_NEWNEIGH, _CREATE | _REPLACE, head + attribute(_NDA_LLADDR, _mac(mac)))

    def delete_link(self, name: str) -> bool:
        """Delete an interface; False when there is none of that name."""
        try:
            self._ask(RTM_DELLINK, 0, _LINK.pack(0, 0, self._index(name), 0, 0))
        except OSError as exc:
            if exc.errno == errno.ENODEV:
                return False
            raise
        return True

    def add_address(self, name: str, address: str, prefix: int) -> None:
        """Give an interface an address, at once: IPv6 doesn't look first whether another host has it."""
        family, data = packed(address)
        body = _ADDRESS.pack(family, prefix, _IFA_F_NODAD, 0, self._index(name))
        body += attribute(_IFA_LOCAL, data) + attribute(_IFA_ADDRESS, data)
        if family == socket.AF_INET:
            number = int.from_bytes(data, "big") | ((1 << (32 - prefix)) - 1)
            body += attribute(_IFA_BROADCAST, number.to_bytes(4, "big"))
        self._ask(RTM_NEWADDR, _CREATE | _REPLACE, body)

    def delete_address(self, name: str, address: str, prefix: int) -> None:
        family, data = packed(address)
        body = _ADDRESS.pack(family, prefix, 0, 0, self._index(name)) + attribute(_IFA_LOCAL, data)
        self._ask(RTM_DELADDR, 0, body)

    def addresses(self, name: str) -> list[Address]:
        """All addresses of an interface but the link-local ones."""
        index = self._index(name)
        found = []
        for body in self.dump(RTM_GETADDR, _ADDRESS.pack(0, 0, 0, 0, 0)):
            try:
                family, prefix, _flags, scope, of = _ADDRESS.unpack_from(body)
                if of != index or scope >= 253:  # RT_SCOPE_LINK
                    continue
                parts = dict(attributes(body[_ADDRESS.size :]))
                data = parts.get(_IFA_LOCAL) or parts[_IFA_ADDRESS]
                found.append(Address(socket.inet_ntop(family, data), prefix))
            except (struct.error, LookupError, ValueError):
                raise _unknown() from None
        return found

    def route(self, to: str, *, source: str = "", iif: str = "") -> Route:
        """Where goes what comes from `source` in by `iif`, or from the host itself. Raises NetlinkError."""
        family, data = packed(to)
        bits = len(data) * 8
        body = _ROUTE.pack(family, bits, bits if source else 0, 0, 0, 0, 0, 0, 0) + attribute(_RTA_DST, data)
        body += attribute(_RTA_SRC, packed(source)[1]) if source else b""
        body += attribute(_RTA_IIF, _INT.pack(self._index(iif))) if iif else b""
        answer = self.answer(RTM_GETROUTE, body)
        try:
            *_head, of, _flags = _ROUTE.unpack_from(answer)
            found = dict(attributes(answer[_ROUTE.size :]))
            oif, mine = found.get(_RTA_OIF), found.get(_RTA_PREFSRC)
            away = socket.if_indextoname(_INT.unpack(oif)[0]) if oif and of == _RTN_UNICAST else ""
            return Route(away, socket.inet_ntop(family, mine) if mine else "")
        except (struct.error, ValueError):
            raise _unknown() from None

    def routing_rules(self, protocol: int) -> set[RoutingRule]:
        """Those that carry this protocol number: whoever made them put it there."""
        found = set()
        for family, version in ((socket.AF_INET, 4), (socket.AF_INET6, 6)):
            for body in self.dump(RTM_GETRULE, _RULE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)):
                # A kernel without IPv6 answers with the rules of all families.
                of, length, *_rest, action, _flags = _RULE.unpack_from(body)
                parts = dict(attributes(body[_RULE.size :]))
                if of != family or parts.get(_FRA_PROTOCOL, b"\0")[0] != protocol:
                    continue
                to = parts.get(_FRA_DST)
                found.add(
                    RoutingRule(
                        version,
                        _INT.unpack(parts.get(_FRA_PRIORITY, bytes(4)))[0],
                        action,
                        parts.get(_FRA_IIFNAME, b"").rstrip(b"\0").decode(errors="replace"),
                        f"{socket.inet_ntop(family, to)}/{length}" if to is not None else "",
                    )
                )
        return found

    def add_routing_rule(self, rule: RoutingRule, protocol: int) -> None:
        """Add a rule; the interface need not be there yet, and may come and go. Raises NetlinkError, EEXIST."""
        self._ask(RTM_NEWRULE, _CREATE | _EXCL, _rule(rule, protocol))

    def delete_routing_rule(self, rule: RoutingRule, protocol: int) -> None:
        self._ask(RTM_DELRULE, 0, _rule(rule, protocol))

    def answer(self, kind: int, body: bytes) -> bytes:
        """The body of the one message that answers a request for one thing."""
        self._send(kind, 0, body)
        for message_kind, message_flags, answer in self._answers():
            if message_kind == NLMSG_ERROR:
                _check(message_flags, answer)
            return answer
        raise _unknown()

    def create(self, kind: int, body: bytes) -> None:
        """Have what the message tells of in place of what there was of it."""
        self._ask(kind, _CREATE | _REPLACE, body)

    def change(self, kind: int, flags: int, body: bytes) -> None:
        """Send any request that is acknowledged. Raises NetlinkError."""
        self._ask(kind, flags, body)

    def _index(self, name: str) -> int:
        return self.numbers.get(name) or _index(name)

    def _ask(self, kind: int, flags: int, body: bytes) -> None:
        self._send(kind, flags | _ACK, body)
        for message_kind, message_flags, answer in self._answers():
            if message_kind == NLMSG_ERROR:
                _check(message_flags, answer)
                return

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        """The bodies of all messages that the kernel answers a request for everything with."""
        self._send(kind, _DUMP, body)
        for message_kind, message_flags, answer in self._answers():
            if message_kind == NLMSG_DONE:
                return
            if message_kind == NLMSG_ERROR:
                _check(message_flags, answer)
            yield answer

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        head = _HEADER.pack(_HEADER.size + len(body), kind, flags | _REQUEST, self._sequence, 0)
        self._socket.send(head + body)

    def _answers(self) -> Iterator[tuple[int, int, bytes]]:
        """Type, flags and body of each message in answer to the last request."""
        while True:
            data = self._socket.recv(1 << 16)
            while len(data) >= _HEADER.size:
                length, kind, flags, sequence, _port = _HEADER.unpack_from(data)
                if length < _HEADER.size:
                    raise _unknown()
                if sequence == self._sequence:
                    yield kind, flags, data[_HEADER.size : length]
                data = data[length + 3 & ~3 :]


def attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


# Of a bridge: no spanning tree, and no wait before a port forwards.
_NO_TREE, _NO_DELAY = attribute(_BR_STP_STATE, _INT.pack(0)), attribute(_BR_FORWARD_DELAY, _INT.pack(0))


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            return
        yield kind & 0x3FFF, data[_ATTRIBUTE.size : length]
        data = data[length + 3 & ~3 :]


def _rule(rule: RoutingRule, protocol: int) -> bytes:
    address, _, length = rule.to.partition("/")
    family = socket.AF_INET if rule.version == 4 else socket.AF_INET6
    table = MAIN if rule.action == TO_TABLE else 0
    body = _RULE.pack(family, int(length or 0), 0, 0, table, 0, 0, rule.action, 0)
    body += attribute(_FRA_PRIORITY, _INT.pack(rule.priority)) + attribute(_FRA_PROTOCOL, bytes([protocol]))
    if rule.iif:
        body += attribute(_FRA_IIFNAME, rule.iif.encode() + b"\0")
    if rule.to:
        body += attribute(_FRA_DST, packed(address)[1])
    return body


def _check(flags: int, answer: bytes) -> None:
    """Raise what an NLMSG_ERROR says; the number 0 is the acknowledgement."""
    try:
        number = -struct.unpack_from("=i", answer)[0]
    except struct.error:
        raise _unknown() from None
    if number == 0:
        return
    if not 0 < number < 4096:  # MAX_ERRNO
        raise _unknown()
    words = os.strerror(number)
    if flags & _WITH_TEXT:
        rest = answer[4 + _HEADER.size :]
        if not flags & _CAPPED and rest:
            rest = answer[4 + int.from_bytes(answer[4:8], sys.byteorder) :]
        text = dict(attributes(rest)).get(1, b"").rstrip(b"\0").decode(errors="replace")
        words = f"{words} ({text})" if text else words
    raise NetlinkError(number, words)


def _unknown() -> NetlinkError:
    return NetlinkError(errno.EBADMSG, "the kernel's answer isn't one that virtd knows")


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise NetlinkError(errno.ENODEV, f"no interface {name}") from None


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def packed(address: str) -> tuple[int, bytes]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return family, socket.inet_pton(family, address)
