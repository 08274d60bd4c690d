# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guests connected to a network: recorded, and known to its rules and dnsmasq's lists, before an interface
exists.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import msgspec

from ... import errors, journal
from ...messages import Message
from ...model.state import Activity
from ...objects.protocol import Problem
from . import bridge, links, ports

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ...model import network as model
    from .netrecord import NetRecord
    from .ports import Port

log = logging.getLogger(__name__)


class Connections:
    """The ports of one network, which `net` keeps in its record; `follow` updates rules and dnsmasq to match."""

    def __init__(self, net: NetRecord, follow: Callable[[model.Network], Awaitable[None]]) -> None:
        self.net = net
        self._follow = follow
        self.coming: set[str] = set()  # interfaces that are recorded and about to be made

    @property
    def refused(self) -> set[str]:
        """Interfaces kept out of the bridge, see `refuse`. They are recorded, so the next daemon knows them."""
        kept = self.net.data.get("refused", [])
        return {name for name in kept if isinstance(name, str)} if isinstance(kept, list) else set()

    async def connect(self, interface: str, *, user: str, mac: str, trusted: bool) -> Port:
        """Make rules and reserve an address for an interface that will be made; `disconnect` undoes it.

        May be repeated. Raises a VirtdError.
        """
        async with self.net.exclusive("connect a guest to"):
            network = self.net.running
            if network is None:
                raise errors.InvalidState(f"Network {self.net.name} isn't active any more")
            others = tuple(port for port in self.net.ports if port.interface != interface)
            aside = None
            if not trusted:
                aside = ports.set_aside(network, mac, others, await asyncio.to_thread(self.net.leases))
            port = ports.Port(interface, user, mac.lower(), trusted, aside)
            self.coming.add(interface)
            self._forget_refused(interface)
            if port not in self.net.ports:
                await self._have(network, (*others, port))
            return port

    async def disconnect(self, interface: str) -> None:
        """Forget a port whose interface no longer exists. Raises a VirtdError."""
        async with self.net.exclusive("disconnect a guest from"):
            self.coming.discard(interface)
            self._forget_refused(interface)
            others = tuple(port for port in self.net.ports if port.interface != interface)
            if len(others) == len(self.net.ports):
                return
            network = self.net.running
            if network is None or self.net.state is not Activity.ACTIVE:
                self._remember(others)
            else:
                await self._have(network, others)

    async def _have(self, network: model.Network, wanted: tuple[Port, ...]) -> None:
        self._remember(wanted)
        await self._follow(network)

    def _remember(self, wanted: tuple[Port, ...]) -> None:
        self.net.remember(ports=msgspec.to_builtins(wanted))

    def _forget_refused(self, interface: str) -> None:
        self.net.problems.pop(f"port {interface}", None)
        if interface in self.refused:
            self.net.keep_data(refused=sorted(self.refused - {interface}))

    async def set_ports(self) -> None:
        """Set what the bridge enforces on its ports, including those that a container's reboot recreated."""
        network = self.net.running
        if network is not None and self.net.ports:
            await asyncio.to_thread(bridge.set_ports, self.net.ports, network.bridge_name, **self.flags)

    def refuse(self, interfaces: set[str]) -> None:
        """Record and report that these interfaces stay out of the bridge until they are connected again.

        Their QEMU gave them another machine's MAC; a program that did so once will do it again.
        """
        net = self.net
        net.keep_data(refused=sorted(self.refused | interfaces))
        self.say_refused()
        for port in net.ports:
            if port.interface in interfaces:
                text = net.problems[f"port {port.interface}"].text
                journal.send(
                    f"Network {net.name}: {text}", message_id=Message.NETWORK_PORT_REFUSED, level="error",
                    VIRTD_USER=port.user, **net.fields(),
                )  # fmt: skip
        net.changed()

    def say_refused(self) -> None:
        for port in self.net.ports:
            if port.interface in self.refused:
                text = f"{port.user} gave its interface {port.interface} another MAC address, and was disconnected"
                hint = "Its guest may control its QEMU: stop it. It is connected again at its next start."
                self.net.problems[f"port {port.interface}"] = Problem(text, hint)

    async def take_over(self) -> None:
        """Record guests that an older virtd connected without recording them."""
        known = {port.interface for port in self.net.ports}
        missing = [one for one in links.ports() if one.network == self.net.name and one.interface not in known]
        if self.net.record is None or not missing:
            return
        leases_, paths = self.net.leases(), self.net.shared.services.paths
        found = [ports.taken_over(paths, one.interface, one.user, leases_) for one in missing]
        self._remember(self.net.ports + tuple(port for port in found if port is not None))
        try:
            await self.set_ports()
        except errors.HostError as exc:
            log.warning("Network %s: %s", self.net.name, exc)

    def port(self, interface: str) -> Port:
        """The port with this interface. Raises NotFound."""
        for port in self.net.ports:
            if port.interface == interface:
                return port
        raise errors.NotFound(f"{interface} isn't connected to network {self.net.name}")

    @property
    def flags(self) -> dict[str, bool]:
        """The options with which its ports join the bridge."""
        network = self.net.running
        return {"isolated": network is not None and network.isolated_ports}
