# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a network consists of, made in this order and removed in the opposite one:

    rules     of policy routing, for an isolated network, and nftables' own tables
    bridge    known as ours by its address, which is made of the uuid
    dnsmasq   a child like any other: slots, unit

Making a piece twice does nothing the second time, nor does removing it twice.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING

from ... import errors, files, journal
from ...children import fifos
from ...model.state import Activity
from ...objects.protocol import Problem
from . import bridge, firewall, firewalld, prerequisites
from .bridgedrift import alias_of
from .netrecord import DRIVER

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ...model.network import Network
    from .netrecord import NetRecord
    from .rules import Rules
    from .server import Server

log = logging.getLogger(__name__)


class Pieces:
    """The pieces of one network; `ensure` repairs differences of its bridge and ports."""

    def __init__(self, net: NetRecord, rules: Rules, server: Server, ensure: Callable[[], Awaitable[None]]) -> None:
        self._net = net
        self._rules = rules
        self._server = server
        self._ensure = ensure

    async def make(self, network: Network) -> None:
        """Make the missing pieces. Raises a VirtdError, and may be repeated then."""
        net = self._net
        if not network.own:
            await asyncio.to_thread(prerequisites.check_bridge, network, net.source, net.mac)
            await self._rules.apply(network)
            await self._ensure()
            return
        # Pieces that would be open without the rules are made after them.
        await net.shared.isolation.apply()
        await self._rules.apply(network)
        await self.allow_forwarding(network)
        alias = alias_of(network)
        new = await asyncio.to_thread(bridge.make, network.bridge_name, net.mac, alias)
        await self._ensure()
        await asyncio.to_thread(bridge.take_in, network, net.ports)
        await self._tell_firewalld(network)
        if network.serves:
            await self._server.run(network, afresh=new)

    async def unmake(self) -> None:
        """Remove all pieces that exist. Raises HostError, and may be repeated then."""
        net = self._net
        await self._server.end()
        if kept := net.data.get("bridge"):
            await asyncio.to_thread(bridge.delete, str(kept), net.mac)
        await asyncio.to_thread(firewall.remove, net.name)
        fifos.clear(net.shared.services.paths.fifos(DRIVER, net.name))
        await asyncio.to_thread(files.remove_tree, net.runtime)
        if os.path.lexists(net.runtime):
            raise errors.HostError(f"{net.runtime} can't be removed")

    async def no_longer_isolated(self) -> None:
        """Remove its policy routing rules, once its record says that nobody needs them.

        If that fails, a later change of any network removes them.
        """
        try:
            await self._net.shared.isolation.apply()
        except errors.HostError as exc:
            log.warning("Network %s: %s", self._net.name, exc)

    # What the host has to let through

    async def allow_forwarding(self, network: Network) -> None:
        for setting in await asyncio.to_thread(prerequisites.allow_forwarding, network):
            text = f"Network {self._net.name}: the host now forwards packets: {setting}"
            journal.send(text, level="notice", **self._net.fields())

    async def _tell_firewalld(self, network: Network) -> None:
        net = self._net
        try:
            await firewalld.adopt(await net.shared.services.units(), network.bridge_name)
            net.problems.pop("firewalld", None)
        except errors.VirtdError as exc:
            net.problems["firewalld"] = Problem(f"firewalld doesn't let its guests through: {exc.message}", exc.hint)
            log.warning("%s: %s", net.name, exc)

    async def join_firewalld(self) -> None:
        """Put the bridge into its zone, which firewalld forgets when it restarts."""
        network = self._net.running
        if network is not None and network.own and self._net.state is Activity.ACTIVE:
            await self._tell_firewalld(network)
