# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's own word of what others do to our rules and bridges: netlink(7) multicast, without polling.

Only names are taken from the messages. What has become of a thing is then looked at: several changes make one look,
and a message that was lost (a socket whose buffer ran over) makes a look at everything.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import struct
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

NETLINK_NETFILTER = 12
_NFTABLES_GROUP = 1 << 6  # NFNLGRP_NFTABLES is 7, linux/netfilter/nfnetlink.h
_LINK_GROUP = 1 << 0  # RTNLGRP_LINK is 1, linux/rtnetlink.h
_RULE_GROUPS = 1 << 7 | 1 << 18  # RTNLGRP_IPV4_RULE is 8, RTNLGRP_IPV6_RULE 19
# RTNLGRP_IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE, _IPV4_NETCONF, _IPV6_NETCONF
_GROUND_GROUPS = 1 << 4 | 1 << 6 | 1 << 8 | 1 << 10 | 1 << 23 | 1 << 24
_NFTABLES = 10  # NFNL_SUBSYS_NFTABLES
_NEWGEN = 15  # NFT_MSG_NEWGEN: the end of a transaction; it has no table
_NEWLINK, _DELLINK = 16, 17
_DELRULE = 33
_IFLA_IFNAME = 3
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
ALL = ""  # "look at everything"


class Watch:
    """Calls `table(name)` for a table of nftables' that something happened to, `link(name, index)` for an interface,
    `routing()` when a rule of policy routing has gone, and `other(kind, body)` for all else that rtnetlink tells.

    The first two get ALL when the kernel had more to tell than we took in time.
    """

    def __init__(
        self,
        table: Callable[[str], None],
        link: Callable[[str, int], None],
        routing: Callable[[], None],
        other: Callable[[int, bytes], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets: list[socket.socket] = []

        def routed(data: bytes) -> None:
            for name, index in dict.fromkeys(links(data)):
                link(name, index)
            for kind, body in _messages(data):
                if kind == _DELRULE:
                    routing()
                if kind not in (_NEWLINK, _DELLINK):
                    other(kind, body)

        def lost() -> None:
            link(ALL, 0)
            routing()

        try:
            self._open(
                NETLINK_NETFILTER, _NFTABLES_GROUP, lambda data: _each(tables(data), table), lambda: table(ALL)
            )
            self._open(socket.NETLINK_ROUTE, _LINK_GROUP | _RULE_GROUPS | _GROUND_GROUPS, routed, lost)
        except BaseException:
            self.close()
            raise

    def _open(self, protocol: int, group: int, take: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        one = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol)
        self._sockets.append(one)
        one.bind((0, group))

        def readable() -> None:
            while True:
                try:
                    data = one.recv(1 << 16)
                except BlockingIOError:
                    return
                except OSError as exc:
                    if exc.errno == errno.ENOBUFS:
                        lost()
                        continue
                    log.error("Netlink: %s", exc)
                    self._loop.remove_reader(one.fileno())
                    return
                take(data)

        self._loop.add_reader(one.fileno(), readable)

    def close(self) -> None:
        for one in self._sockets:
            self._loop.remove_reader(one.fileno())
            one.close()
        self._sockets.clear()


def _each(names: Iterator[str], call: Callable[[str], None]) -> None:
    for name in dict.fromkeys(names):
        call(name)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        length, kind, _flags, _sequence, _port = _HEADER.unpack_from(data)
        if length < _HEADER.size:
            return
        yield kind, data[_HEADER.size : length]
        data = data[length + 3 & ~3 :]


def _text(data: bytes, wanted: int) -> str:
    """The attribute `wanted`, a text."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            break
        if kind & 0x3FFF == wanted:
            return data[_ATTRIBUTE.size : length].rstrip(b"\0").decode(errors="replace")
        data = data[length + 3 & ~3 :]
    return ""


def tables(data: bytes) -> Iterator[str]:
    """The tables that the messages are about. Every message of nftables' has its table's name first."""
    for kind, body in _messages(data):
        if kind >> 8 == _NFTABLES and kind & 0xFF != _NEWGEN:
            yield _text(body[4:], 1)  # after struct nfgenmsg


def links(data: bytes) -> Iterator[tuple[str, int]]:
    """The interfaces that the messages are about, by name and index. Of one that was renamed it is the new name."""
    for kind, body in _messages(data):
        if kind in (_NEWLINK, _DELLINK) and (name := _text(body[16:], _IFLA_IFNAME)):
            yield name, int.from_bytes(body[4:8], sys.byteorder)
