# SPDX-License-Identifier: LGPL-2.1-or-later
"""Notifications of changes that others make to our rules and bridges: netlink(7) multicast, without polling.

They only yield names. The current state is then read afresh: several changes cause a single read, and if
notifications were lost (the socket's buffer overflowed) everything is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING

from .kernel import Change, LinkChanged, RuleChanged, changed
from .netlink import NETFILTER, NFGEN, NFTABLES, Message, Multicast, NetlinkError

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

_NFTABLES_GROUP = 7  # NFNLGRP_NFTABLES, linux/netfilter/nfnetlink.h
# RTNLGRP_*, linux/rtnetlink.h: LINK, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE,
# IPV4_NETCONF, IPV6_NETCONF
_ROUTING_GROUPS = (1, 5, 7, 8, 9, 11, 19, 24, 25)
_NEWGEN = NFTABLES | 15  # NFT_MSG_NEWGEN: the end of a transaction; it has no table
_TABLE = 1  # NFTA_*_TABLE: comes first in every nftables message except NEWGEN
ALL = ""  # for `table` and LinkChanged: everything may have changed


class Watch:
    """Calls `table(name)` when an nftables table changed, and `change` for what rtnetlink reports.

    If notifications were lost, both are called for ALL (`change` with LinkChanged and RuleChanged).
    """

    def __init__(self, table: Callable[[str], None], change: Callable[[Change], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets: list[Multicast] = []

        def ruled(message: Message | None) -> None:
            if (name := ALL if message is None else table_of(message)) is not None:
                table(name)

        def routed(message: Message | None) -> None:
            if message is None:
                change(LinkChanged(ALL, 0))
                change(RuleChanged(removed=True))
                return
            with contextlib.suppress(NetlinkError):
                if (found := changed(message)) is not None:
                    change(found)

        try:
            self._open(Multicast(NETFILTER, _NFTABLES_GROUP), ruled)
            self._open(Multicast(socket.NETLINK_ROUTE, *_ROUTING_GROUPS), routed)
        except BaseException:
            self.close()
            raise

    def _open(self, one: Multicast, take: Callable[[Message | None], None]) -> None:
        self._sockets.append(one)

        def readable() -> None:
            try:
                for message in one.heard():
                    take(message)
            except OSError as exc:
                log.error("Netlink: %s", exc)
                self._loop.remove_reader(one.fileno())

        self._loop.add_reader(one.fileno(), readable)

    def close(self) -> None:
        for one in self._sockets:
            self._loop.remove_reader(one.fileno())
            one.close()
        self._sockets.clear()


def table_of(message: Message) -> str | None:
    """The table that an nftables message is about; None for other messages."""
    if message.kind & ~0xFF != NFTABLES or message.kind == _NEWGEN:
        return None
    return message.text(NFGEN, _TABLE)
