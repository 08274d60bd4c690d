# SPDX-License-Identifier: LGPL-2.1-or-later
"""The network driver: all networks, from their definitions, records, units and slots.

Other drivers connect their guests through `interfaces`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING

from ... import errors, files, journal
from ...hints import do
from ...messages import Message
from ...model import networkchecks
from ...model.network import Network
from ...model.state import Activity
from ...objects import recovery
from ...objects.inventory import Inventory
from ...objects.protocol import Problem
from ...paths import listing
from ...process import boot_id
from ...records import Records
from . import bridge, describing, prerequisites, rebuilding, routes
from .guard import Guard
from .interfaces import Interfaces
from .isolation import Isolation
from .net import Net
from .netrecord import DRIVER, Shared
from .prober import Prober
from .upkeep import Upkeep

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ...children.child import Services
    from ...model.settings import Dnsmasq, Settings
    from ...objects.conflicts import Holding
    from ...objects.peers import Peers
    from ...objects.protocol import Difference, Publish
    from ...replies import networks as replies
    from .newcomers import Newcomers

log = logging.getLogger(__name__)

DEFAULT = "default"


def make(services: Services, settings: Settings, publish: Publish, peers: Peers) -> Driver:
    return Driver(services, settings.dnsmasq, publish, peers)


class Driver(Inventory[Net, Network]):
    """All networks."""

    name = DRIVER
    noun = "network"
    taken_back = "It is put together again from what there is."
    states = Activity

    def __init__(self, services: Services, settings: Dnsmasq, publish: Publish, peers: Peers) -> None:
        super().__init__(services, Records(services.paths, DRIVER), publish)
        self._isolation = Isolation(self.nets)
        self._peers = peers
        self._shared = Shared(
            services, self.records, settings, self.published, boot_id(), self._isolation, peers, self.nets
        )
        self._prober = Prober(self.nets)
        self.interfaces = Interfaces(self)
        self._upkeep = Upkeep(self.nets, publish, self._prober.doubt)
        self._newcomers: Newcomers | None = None
        self._guard = Guard(services, self.nets, self.problems, publish, self._isolation, self._prober, self._upkeep)

    async def compare(self, *, repair: bool) -> list[Difference]:
        from . import fsck  # imported late: the daemon can start without it

        return await fsck.compare(self, self.interfaces.detach, repair=repair)

    @property
    def nets(self) -> dict[str, Net]:
        return self.objects

    def make(self, name: str) -> Net:
        return Net(self._shared, name)

    def parse(self, text: str, source: str) -> Network:
        return networkchecks.parse(text, source)

    # Start-up

    def restore(self) -> None:
        """First step: records, slots and pumps; no bus yet."""
        self._reconciled.clear()
        self.restore_records()
        self.load_definitions()
        self.recall()
        self._prober.recall()
        self._sweep_leases()
        recovery.doubt(self)
        for net in self.nets.values():
            if net.record is None and net.has_bridge:
                net.settled.clear()
        self._guard.begin(beside_firewalld=False)

    def _sweep_leases(self) -> None:
        """Remove leases of networks that no longer exist, left by an interrupted undefine."""
        top = f"{self._services.paths.lib}/{DRIVER}"
        defined = listing(f"{self._services.paths.etc}/{DRIVER}", ".toml")  # unreadable definitions included
        if defined.wrong:
            return
        with contextlib.suppress(OSError):
            for name in set(os.listdir(top)) - set(self.objects) - set(defined.names):
                files.remove_tree(f"{top}/{name}")

    async def reconcile(self) -> None:
        """Second step: compare with systemd and the kernel, and finish what a crash interrupted."""
        _, others = await recovery.reconcile_all(self)
        for net in self.nets.values():
            if net.record is None and net.has_bridge:
                others.setdefault(net.name, False)
        for name, unit in sorted(others.items()):
            try:
                await self._rebuild(name, unit=unit)
            except Exception as exc:  # the other networks are still reconciled
                log.exception("Network %s can't be rebuilt", name)
                self.left_alone(name, Problem(f"{name} can't be rebuilt: {exc}", "See: " + do("fsck") + "."))
        recovery.settle(self)
        for net in list(self.nets.values()):
            if net.definition is None and not net.active and not net.problems:
                self.forget(net.name)
        await self._guard.restore_isolation(why="while virtd was away")
        self._reconciled.set()
        await self._guard.restore_rules(set(self.nets), why="while virtd was away")
        await self._upkeep.begin()
        self._prober.begin()
        self._guard.begin()

    async def _rebuild(self, name: str, *, unit: bool) -> None:
        """Rebuild a network from a unit, slots or a bridge without a record, or roll it back."""
        if await rebuilding.rebuild(self.object(name), self.identities_of(name), unit=unit):
            self.found.rebuilt.append(name)
            self.problems.pop(f"record {name}", None)
        else:
            self.found.rolled_back.append(name)

    def to_autostart(self) -> list[Net]:
        return [net for net in self.nets.values() if net.definition and net.definition.autostart and not net.active]

    def grown(self, key: str) -> None:
        """Called by the pump when a watched log has grown; `key` is the name of its slot."""
        driver, name, slot = key.split("/")
        if (driver, slot) == (DRIVER, "stderr") and (net := self.nets.get(name)) is not None:
            net.server.stderr.forward()

    async def close(self) -> None:
        await self._guard.close()
        await self._prober.close()
        await self._upkeep.close()
        await asyncio.gather(*(net.close() for net in self.nets.values()))

    # Operations

    async def start(self, name: str, by: str) -> bool:
        net = self.find(name)
        await self.certain()
        self._upkeep.forgive(net.name)
        changed = await net.start(by)
        self._guard.begin()
        self._prober.doubt([net.name])
        return changed

    async def stop(self, name: str, by: str, *, force: bool) -> bool:
        net = self.find(name)
        await self.certain()
        await self._prober.leave(net.name)
        try:
            changed = await net.stop(by, force=force)
        finally:
            if net.active:
                self._prober.doubt([net.name])
        if net.definition is None:
            self.forget(net.name)
        return changed

    async def undefine(self, name: str) -> None:
        net = self.find(name)
        await self.certain()
        async with net.exclusive("undefine"):
            if net.active:
                raise errors.InvalidState(
                    f"Cannot undefine network {net.name}: it is {net.state}",
                    hint=do("stop", self.noun, net.name) + " first.",
                )
            files.remove(net.source)
            await asyncio.to_thread(files.remove_tree, net.state_directory)
            self.forget(net.name)

    # Definitions

    async def reload(self) -> None:
        """Put changed definitions into force, and restore changed rules and bridges."""
        for net in list(self.nets.values()):
            try:
                await net.adapt()
                self.problems.pop(f"definition {net.name} in force", None)
            except errors.VirtdError as exc:
                self.problems[f"definition {net.name} in force"] = Problem(exc.message, exc.hint)
                journal.send(exc.message, message_id=Message.DEFINITION_PROBLEM, level="error", VIRTD_FILE=net.source)
            await net.pieces.join_firewalld()
        await self._guard.restore_isolation(why="by the time of the reload")
        await self._guard.restore_rules(set(self.nets), why="by the time of the reload")
        await self._upkeep.restore(set(self.nets), why="by the time of the reload")
        self._prober.doubt(self.nets)

    def check(self, text: str, source: str) -> Network:
        network = super().check(text, source)
        net = self.nets.get(network.name)
        uuid = network.uuid or (net.uuid if net is not None else "")
        if net is None or not net.active:
            routes.check(network, source)
            if network.own:  # a bridge of the host's may appear later
                prerequisites.check_bridge(network, source, bridge.mac_of(uuid) if uuid else "")
        return network

    def check_beside(self, definition: Network, other: Net, source: str) -> None:
        theirs = other.running or other.definition
        if theirs is None or not (definition.own and theirs.own):
            return
        if definition.bridge_name == theirs.bridge_name:
            raise errors.InvalidDefinition(
                source, "bridge", f"{definition.bridge_name} is the bridge of network {other.name} already"
            )
        for key, subnet in definition.subnets():
            for _key, taken in theirs.subnets():
                if subnet.version == taken.version and subnet.overlaps(taken):
                    raise errors.InvalidDefinition(
                        source, key, f"{subnet} overlaps with {taken} of network {other.name}"
                    )

    async def warnings(self, network: Network) -> list[str]:
        """What the definition claims although others have it; this is an error only when the network starts."""
        from . import holdings  # imported late: the daemon can start without it

        return await holdings.warnings(self.nets.get(network.name), network, self._peers)

    def holdings(self, *, running: bool) -> Iterator[tuple[str, Holding]]:
        from . import holdings

        return holdings.all_of(self.nets, running=running)

    def put_in_force(self, one: Net, definition: Network, text: str) -> None:
        one.remember(**one.in_force(definition, text))

    def default(self) -> str:
        """The text of a definition of the network "default": NAT, with a private prefix that is free here. Raises
        HostError.
        """
        taken = [subnet for net in self.nets.values() if net.definition for _key, subnet in net.definition.subnets()]
        address = routes.free_prefix(taken)
        return f'name = "{DEFAULT}"\nmode = "nat"\nautostart = true\n\n[ipv4]\naddress = "{address}"\n'

    def forget(self, name: str) -> None:
        net = self.objects[name]
        super().forget(name)
        if name not in self.objects:
            net.on_record.set()  # no record is left to write

    # Describing

    async def look(self) -> None:
        """Look for changes in all networks, including those that the kernel doesn't announce."""
        self._prober.look()
        await self._upkeep.restore(set(self.nets), why="by somebody else")
        await self._look_for_newcomers(self.nets.values())

    async def look_at(self, net: Net) -> None:
        """Look for changes in one network, before it is described."""
        await self._upkeep.restore({net.name}, why="by somebody else")
        await self._look_for_newcomers([net])

    async def _look_for_newcomers(self, nets: Iterable[Net]) -> None:
        if self._newcomers is None:
            from .newcomers import Newcomers  # imported late: the daemon can start without it

            self._newcomers = Newcomers()
        await self._newcomers.look(nets)

    def describe(self, one: Net) -> replies.Network:
        return describing.short(one)

    def describe_fully(self, net: Net) -> replies.NetworkInfo:
        return describing.long(net, self.slots_of(net.name), self._services.paths.stderr_log(DRIVER, net.name))

    def bad_definitions(self) -> list[tuple[str, Problem]]:
        found = super().bad_definitions()
        for net in self.nets.values():
            if (pending := net.problems.get("pending")) is not None:
                found.append((net.name, pending))
        return found
