# SPDX-License-Identifier: LGPL-2.1-or-later
"""What keeps an isolated network isolated where there are no firewall rules: rules of policy routing, ip-rule(8).

Nothing that comes from its bridge is routed on, and nothing from elsewhere to its prefixes. The table `local` is
asked first (priority 0), so the host itself is reached, which is for the firewall to limit. `nft flush ruleset`
leaves these rules alone, they need no daemon, and they may be there before the bridge is. (The bridge's own sysctl
`forwarding` would not do: whoever writes net.ipv4.ip_forward sets it for all interfaces.)

They carry a protocol number by which they are known as ours, and are always compared for all networks together: what
is missing is added and what no network needs is removed, so that the next comparison mends what a crash interrupted.
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

PROTOCOL = 86  # rtnetlink(7)'s rtm_protocol: no other program's in iproute2's list of them
# After `local`, wherever others (Cilium) have moved it to, and before everything that routes: VRFs have 1000.
PRIORITY = 900


def wanted(network: Network) -> set[RoutingRule]:
    """The rules that the network needs; none unless it is isolated."""
    if network.mode is not Mode.ISOLATED:
        return set()
    found = {RoutingRule(version, PRIORITY, PROHIBIT, iif=network.bridge_name) for version in (4, 6)}
    for _key, subnet in network.subnets():
        # The host's own packets go there, and its answer to "from where would I get this?" (rp_filter) is as ever.
        found.add(RoutingRule(subnet.version, PRIORITY - 1, TO_TABLE, iif="lo", to=str(subnet)))
        found.add(RoutingRule(subnet.version, PRIORITY, PROHIBIT, to=str(subnet)))
    return found


def apply(networks: Iterable[Network], *, remove: bool = True) -> set[RoutingRule]:
    """Add the rules that these networks need, and with `remove` delete others of ours. Returns what was missing.

    Raises HostError.
    """
    needed = set[RoutingRule]().union(*map(wanted, networks))
    missing = set()
    try:
        with Kernel() as kernel:
            there = kernel.routing_rules(PROTOCOL)
            # Those that let the host through come first, by their priority.
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
    """The rules of all networks of the driver, changed by one caller at a time."""

    def __init__(self, nets: Mapping[str, Isolated]) -> None:
        self._nets = nets
        self._turn = asyncio.Lock()

    async def apply(self) -> set[RoutingRule]:
        """Apply what networks need that are active by their records. Returns what was missing. Raises HostError."""
        async with self._turn:
            running = [net.running for net in self._nets.values() if net.active]
            # What a network needs whose definition can't be read isn't known.
            known = [network for network in running if network is not None]
            return await asyncio.to_thread(apply, known, remove=len(known) == len(running))
