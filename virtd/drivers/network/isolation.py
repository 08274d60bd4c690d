# SPDX-License-Identifier: LGPL-2.1-or-later
"""Policy routing rules (ip-rule(8)) that keep an isolated network isolated even without firewall rules.

Nothing that enters by its bridge is routed further, and nothing from elsewhere is routed to its prefixes. The table
`local` is consulted first (priority 0), so the host itself is reachable; limiting that is the firewall's job. These
rules survive `nft flush ruleset`, need no daemon, and may exist before the bridge does. (The bridge's own sysctl
`forwarding` wouldn't do: writing net.ipv4.ip_forward sets it for all interfaces.)

They carry a protocol number that marks them as ours, and are always compared for all networks together: missing rules
are added and those that no network needs removed, so the next comparison repairs what a crash interrupted.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Protocol

from ... import errors
from ...model.network import Mode
from .kernel import Kernel
from .rtnetlink import PROHIBIT, TO_TABLE, RoutingRule

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ...model.network import Network

PROTOCOL = 86  # rtnetlink(7)'s rtm_protocol: unassigned in iproute2's list
# After `local`, wherever others (Cilium) have moved it to, and before everything that routes: VRFs use 1000.
PRIORITY = 900


def wanted(network: Network) -> set[RoutingRule]:
    """The rules that the network needs; none unless it is isolated."""
    if network.mode is not Mode.ISOLATED:
        return set()
    found = {RoutingRule(version, PRIORITY, PROHIBIT, iif=network.bridge_name) for version in (4, 6)}
    for _key, subnet in network.subnets():
        # Lets the host's own packets through, and keeps its reverse path lookups (rp_filter) as they are.
        found.add(RoutingRule(subnet.version, PRIORITY - 1, TO_TABLE, iif="lo", to=str(subnet)))
        found.add(RoutingRule(subnet.version, PRIORITY, PROHIBIT, to=str(subnet)))
    return found


def apply(networks: Iterable[Network], *, remove: bool = True) -> set[RoutingRule]:
    """Add the rules that these networks need, and with `remove` delete our others. Returns the missing ones.

    Raises HostError.
    """
    needed = set[RoutingRule]().union(*map(wanted, networks))
    missing = set()
    try:
        with Kernel() as kernel:
            there = kernel.routing_rules(PROTOCOL)
            # The rules that let the host through have a lower priority number, and so are added first.
            for rule in sorted(needed - there):
                try:
                    kernel.add_routing_rule(rule, PROTOCOL)
                    missing.add(rule)
                except OSError as exc:
                    if exc.errno == errno.EEXIST:
                        continue
                    if exc.errno in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP) and rule.version == 6:
                        continue  # a kernel without IPv6 routes none
                    raise
            for rule in there - needed if remove else ():
                try:
                    kernel.delete_routing_rule(rule, PROTOCOL)
                except OSError as exc:
                    if exc.errno != errno.ENOENT:
                        raise
    except OSError as exc:
        raise errors.HostError(f"Cannot set the rules of policy routing: {exc.strerror}") from exc
    return missing


class Isolated(Protocol):
    """A network, active or not; see net.Net."""

    @property
    def active(self) -> bool: ...
    @property
    def running(self) -> Network | None: ...


class Isolation:
    """The rules of all the driver's networks, changed by one caller at a time."""

    def __init__(self, nets: Mapping[str, Isolated]) -> None:
        self._nets = nets
        self._turn = asyncio.Lock()

    async def apply(self) -> set[RoutingRule]:
        """Apply the rules of networks that their records call active. Returns the missing ones. Raises HostError."""
        async with self._turn:
            running = [net.running for net in self._nets.values() if net.active]
            # The needs of a network whose definition can't be read are unknown.
            known = [network for network in running if network is not None]
            return await asyncio.to_thread(apply, known, remove=len(known) == len(running))
