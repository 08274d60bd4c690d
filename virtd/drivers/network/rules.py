# SPDX-License-Identifier: LGPL-2.1-or-later
"""A network's own nftables tables: applied, and recognised by their marks, which its record keeps."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from . import firewall, links
from .ports import Ground

if TYPE_CHECKING:
    from ...model.network import Network
    from .netrecord import NetRecord


class Rules:
    """The rules of one network; `net` keeps their marks in its record."""

    def __init__(self, net: NetRecord) -> None:
        self._net = net

    def ground(self, network: Network) -> Ground:
        """What the rules are made from."""
        net = self._net
        if network.own:
            return Ground(network, net.mac, net.ports)
        ours = {port.interface for port in net.ports} | {port.interface for port in links.ports()}
        others = tuple(name for name in links.members(network.bridge_name) if name not in ours)
        return Ground(network, "", net.ports, others)

    async def apply(self, network: Network) -> None:
        """Replace the network's tables, and record their marks. Raises NftError."""
        ground = self.ground(network)
        (mark,) = await asyncio.to_thread(firewall.replace, ground)
        self.applied(ground, mark)

    def applied(self, ground: Ground, mark: firewall.Marks) -> None:
        """Record which rules were applied."""
        # An older virtd knows only the first of these, and needs no more.
        self._net.remember(rules=mark.inet, bridge_rules=mark.bridge, rules_of=firewall.made_of(ground))
        self._net.problems.pop("rules", None)

    def are(self, network: Network, mark: firewall.Marks) -> bool:
        """Whether these marks are those of the rules applied last. Missing marks never are: the rules may have been
        flushed again before they could be listed.
        """
        noted = firewall.Marks(self._net.data.get("rules", ""), self._net.data.get("bridge_rules", ""))
        return bool(mark.bridge and (mark.inet or not network.own) and mark == noted)

    def stale(self, network: Network) -> bool:
        """Whether the rules applied last differ from those this virtd makes, because an older one made them."""
        return bool(self._net.data.get("rules_of") != firewall.made_of(self.ground(network)))

    async def lost(self, network: Network) -> bool:
        """Whether the kernel's rules differ from those applied last, or those are another version's."""
        if self._net.record is None:
            return False
        return self.stale(network) or not self.are(network, await asyncio.to_thread(firewall.mark, self._net.name))
