# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests' interfaces in networks, as other drivers request them: see peers.Networks."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from ...model.state import Activity
from ...objects.peers import Connection
from . import bridge, links

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .net import Net

log = logging.getLogger(__name__)


class Nets(Protocol):
    """All networks, looked up by name and started when a guest needs one."""

    @property
    def nets(self) -> Mapping[str, Net]: ...
    def find(self, name: str) -> Net: ...
    async def certain(self) -> None: ...
    async def start(self, name: str, by: str) -> bool: ...


class Interfaces:
    """The interfaces in all networks of the driver."""

    def __init__(self, nets: Nets) -> None:
        self._nets = nets

    def bridge_of(self, network: str) -> str:
        return self._nets.find(network).bridge_name

    async def attach(
        self, network: str, *, user: str, interface: str, mac: str, uid: int, trusted: bool = False
    ) -> Connection:
        made = await self.reserve(network, user=user, interface=interface, mac=mac, trusted=trusted)
        net = self._nets.find(network)
        port = net.connections.port(interface)
        alias = links.alias_of(net.name, user)
        try:
            await asyncio.to_thread(bridge.add_tap, port, made.bridge, alias=alias, uid=uid, **net.connections.flags)
        except BaseException:
            await asyncio.shield(self._disconnect(interface))
            raise
        net.connections.coming.discard(interface)
        return made

    async def reserve(
        self, network: str, *, user: str, interface: str, mac: str, trusted: bool = False
    ) -> Connection:
        net = await self._used(network, user)
        await net.connections.connect(interface, user=user, mac=mac, trusted=trusted)
        return Connection(net.name, interface, net.bridge_name, links.mtu(net.bridge_name))

    async def add_port(self, network: str, *, user: str, interface: str) -> Connection:
        net = await self._used(network, user)
        name = net.bridge_name
        alias = links.alias_of(net.name, user)
        await asyncio.to_thread(
            bridge.add_port, net.connections.port(interface), name, alias=alias, **net.connections.flags
        )
        net.connections.coming.discard(interface)
        return Connection(net.name, interface, name, links.mtu(name))

    async def detach(self, interface: str) -> bool:
        gone = await asyncio.to_thread(bridge.remove, interface)
        await self._disconnect(interface)
        return gone

    async def _disconnect(self, interface: str) -> None:
        for net in list(self._nets.nets.values()):
            if any(port.interface == interface for port in net.ports):
                await net.connections.disconnect(interface)

    async def sweep(self, driver: str, alive: set[str]) -> list[str]:
        gone = []
        for port in links.ports():
            owner, _, name = port.user.partition("/")
            if owner == driver and name not in alive:
                log.warning("Interface %s was left by %s", port.interface, port.user)
                if await self.detach(port.interface):
                    gone.append(port.interface)
        for known in [port for net in self._nets.nets.values() for port in net.ports]:
            owner, _, name = known.user.partition("/")
            if owner == driver and name not in alive and not links.exists(known.interface):
                await self._disconnect(known.interface)
        return gone

    def addresses_of(self, network: str, mac: str) -> list[str]:
        net = self._nets.nets.get(network)
        return [lease.address for lease in net.leases() if lease.mac == mac.lower()] if net is not None else []

    async def _used(self, network: str, user: str) -> Net:
        """The network, active. Raises NotFound, or the errors of its start."""
        net = self._nets.find(network)
        await self._nets.certain()
        if net.state is not Activity.ACTIVE or net.lost_bridge():
            await self._nets.start(net.name, user)
        return net
