# SPDX-License-Identifier: LGPL-2.1-or-later
"""Puts a changed definition of an active network into force, or reports why that has to wait."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ... import journal
from ...hints import do
from ...messages import Message
from ...model.network import Mode
from ...model.state import Activity
from ...objects.protocol import Problem

if TYPE_CHECKING:
    from ...model.network import Ipv4, Ipv6, Network
    from .connections import Connections
    from .netrecord import NetRecord
    from .pieces import Pieces
    from .rules import Rules
    from .server import Server

log = logging.getLogger(__name__)
PENDING = "pending"  # key of the problem that a changed definition has to wait


class Adapting:
    """Adapts one network."""

    def __init__(
        self, net: NetRecord, rules: Rules, server: Server, pieces: Pieces, connections: Connections
    ) -> None:
        self._net = net
        self._rules = rules
        self._server = server
        self._pieces = pieces
        self._connections = connections

    async def adapt(self) -> list[str]:
        """Put a changed definition into force as far as possible while guests use the network; returns what has to
        wait, in words.

        Leases and connections survive: rules are replaced in one step and established connections stay allowed,
        static leases and names are reloaded, and a replacement dnsmasq takes over the leases.
        """
        net = self._net
        async with net.exclusive("reload"):
            if (waiting := self._waiting()) is not None:
                if net.problems.get(PENDING) != waiting:
                    journal.send(waiting.text, message_id=Message.NETWORK_PENDING, level="warning", **net.fields())
                net.problems[PENDING] = waiting
                return [waiting.text]
            new, old = net.definition, net.running
            if net.state is Activity.ACTIVE and new is not None and old is not None and net.pending:
                await self._switch(old, new)
            net.problems.pop(PENDING, None)
            return []

    def recall(self) -> None:
        """Repeat an earlier daemon's report of a definition that has to wait."""
        if (waiting := self._waiting()) is not None:
            self._net.problems[PENDING] = waiting

    def _waiting(self) -> Problem | None:
        """Why a changed definition can't be put into force while the network is active; None if it can."""
        net = self._net
        new, old = net.definition, net.running
        if net.state is not Activity.ACTIVE or new is None or not net.pending:
            return None
        if not (keys := fixed(old, new) if old is not None else ["definition"]):
            return None
        return Problem(
            f"{', '.join(keys)} can't be changed while network {net.name} is active: the new definition waits",
            do("stop", "network", net.name) + " and start it, when its guests can do without it.",
        )

    async def _switch(self, old: Network, new: Network) -> None:
        from . import holdings

        net = self._net
        if new.own:
            await holdings.require(net, new, net.shared)
            if self._rules.stale(new):
                await self._pieces.allow_forwarding(new)
                await self._rules.apply(new)
            await self._server.adapt(new, old)
        net.remember(**net.in_force(new, net.definition_text), unsure=False)
        if new.isolated_ports is not old.isolated_ports:
            await self._connections.set_ports()
        if Mode.ISOLATED in (old.mode, new.mode):
            await net.shared.isolation.apply()
        log.info("Network %s: the new definition is in force", net.name)


def fixed(old: Network, new: Network) -> list[str]:
    """The keys that differ and can't be changed while guests use the network."""

    def address(ip: Ipv4 | Ipv6 | None) -> str | None:
        return ip.address if ip is not None else None

    differ = {
        "mode": (old.mode is Mode.BRIDGE) != (new.mode is Mode.BRIDGE),
        "bridge": old.bridge_name != new.bridge_name,
        "uuid": old.uuid != new.uuid,
        "mtu": old.mtu != new.mtu,
        "ipv4.address": address(old.ipv4) != address(new.ipv4),
        "ipv6.address": address(old.ipv6) != address(new.ipv6),
    }
    return [key for key, differs in differ.items() if differs]
