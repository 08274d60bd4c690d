# SPDX-License-Identifier: LGPL-2.1-or-later
"""One network and its life. Its pieces, in the order in which they are made:

    record    what shall be there; state "starting"
    rules     of policy routing, for an isolated network, and nftables' own tables
    bridge    known as ours by its address, which is made of the uuid
    dnsmasq   a child like any other: slots, unit
    record    state "active"

Each piece is made so that making it twice does nothing, and so is its removal. A start that was cut off is finished
by making all of them once more, a stop by removing all of them once more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any

from ... import errors, files, journal
from ...children import ending, fifos
from ...hints import do, option
from ...messages import Message
from ...model import network as model
from ...model.network import State
from ...objects import definitions
from ...objects.protocol import Problem
from ...records import Record, now
from . import bridge, firewall, firewalld, links, prerequisites, routes, wanted
from . import ports as ports_
from .connections import Connections
from .netrecord import DRIVER, NetRecord, Shared
from .server import Server
from .standing import Standing

if TYPE_CHECKING:
    from .obstacles import Obstacle
    from .ports import Ground

log = logging.getLogger(__name__)

STOP_AGAIN = 1.0  # seconds until a stop that couldn't be finished is tried again


class Net(NetRecord):
    """A network, and, while it is active, its pieces."""

    def __init__(self, shared: Shared, name: str) -> None:
        super().__init__(shared, name)
        self.server = Server(self)
        self.connections = Connections(self, self._ports_changed)
        self.obstacles: list[Obstacle] = []  # what was found last, see prober.py
        self.standing = Standing(self)

    # What it is

    def ground(self, network: model.Network) -> Ground:
        """What its rules are made of."""
        if network.own:
            return ports_.Ground(network, self.mac, self.ports)
        ours = {port.interface for port in self.ports} | {port.interface for port in links.ports()}
        others = tuple(name for name in links.members(network.bridge_name) if name not in ours)
        return ports_.Ground(network, "", self.ports, others)

    @property
    def tended(self) -> Ground:
        network = self.running
        assert network is not None
        ports = tuple(port for port in self.ports if port.interface not in self.connections.coming)
        mac = self.mac if network.own else ""
        return ports_.Ground(network, mac, ports, refused=frozenset(self.connections.refused))

    def refuse(self, interfaces: set[str]) -> None:
        self.connections.refuse(interfaces)

    def users(self) -> list[str]:
        """Who is connected: "qemu/web1" for what virtd connected, the interface's name for everything else."""
        network = self.running
        if network is None:
            return []
        ours = {port.interface: port.user for port in links.ports() if port.network == self.name}
        ours |= {port.interface: port.user for port in self.ports if links.exists(port.interface)}
        if not network.own:
            return sorted(set(ours.values()))
        members = [member for member in links.members(network.bridge_name) if not member.startswith(links.PROBE)]
        return sorted({ours.get(member, member) for member in members} | set(ours.values()))

    def lost_bridge(self) -> str:
        """What is wrong with the bridge of an active network, or ""."""
        network = self.running
        if network is None or self.state is not State.ACTIVE:
            return ""
        name = network.bridge_name
        if not links.exists(name):
            return f"its bridge {name} is gone"
        if network.own and not bridge.is_ours(name, self.mac):
            return f"its bridge {name} was replaced by something that isn't virtd's"
        if network.own and not links.is_up(name):
            return f"its bridge {name} is down"
        return ""

    # Starting and stopping

    async def start(self, by: str) -> bool:
        """Make all of its pieces, or those that are missing; False if it was whole. Raises a VirtdError."""
        from . import holdings  # no start of the daemon needs it

        async with self.exclusive("start"):
            if self.state is State.ACTIVE:
                return await self._repair()
            network = self.definition
            if network is None:
                raise errors.NotFound(
                    f"Network {self.name} has no definition",
                    hint=do("define", "network", "FILE") + f', with name = "{self.name}".',
                )
            await holdings.require(self, network, self.shared)
            await asyncio.to_thread(routes.check, network, self.source)
            await asyncio.to_thread(prerequisites.check_bridge, network, self.source, bridge.mac_of(self.uuid))
            record = Record(
                driver=DRIVER,
                name=self.name,
                uuid=self.uuid,
                state=State.STARTING.value,
                reason=f"being started by {by}",
                since=now(),
                boot_id=self.shared.boot_id,
                data=self.in_force(network, self.definition_text)
                | {"mac": bridge.mac_of(self.uuid)}
                | self._still_connected(),
            )
            holdings.require_free(self, network, self.shared)  # others may have had their turn since
            self.put(record)
            self.shared.publish("changed", self)
            try:
                await self.make(network)
            except BaseException as exc:
                await asyncio.shield(self._undo(exc))
                raise
            self.note(State.ACTIVE, f"started by {by}")
            self.problems.pop("start", None)
            journal.send(f"Started network {self.name} ({network.bridge_name})", **self.fields())
            return True

    def in_force(self, network: model.Network, text: str) -> dict[str, Any]:
        # The bridge has to be removed also by a daemon that can't read the definition any more.
        return definitions.in_force(network, text) | {"bridge": network.bridge_name if network.own else ""}

    async def make(self, network: model.Network) -> None:
        """Every piece; those that are there already stay as they are."""
        if not network.own:
            await asyncio.to_thread(prerequisites.check_bridge, network, self.source, self.mac)
            await self.apply_rules(network)
            await self.standing.settle()
            return
        # What would be open without its rules isn't there before they are.
        await self.shared.isolation.settle()
        await self.apply_rules(network)
        await self._allow_forwarding(network)
        alias = wanted.alias_of(network)
        new = await asyncio.to_thread(bridge.make_it, network.bridge_name, self.mac, alias)
        await self.standing.settle()
        await asyncio.to_thread(bridge.take_in, network, self.ports)
        await self._tell_firewalld(network)
        if network.serves:
            await self.server.run(network, afresh=new)

    async def _repair(self) -> bool:
        """Something of an active network may be gone: see to it. Its users are connected again."""
        network = self.running
        if network is None:
            raise errors.HostError(
                f"Network {self.name} is active with a definition that can't be read",
                hint=do("stop", "network", self.name, force=True) + ", then start it.",
            )
        whole = all(one.gone for one in await self.standing.differences()) and not self.problems.keys() & {
            "rules",
            "server",
        }
        if whole and (not network.serves or self.server.alive) and not await self.rules_lost(network):
            return False
        await self.make(network)
        journal.send(f"Repaired network {self.name} ({network.bridge_name})", **self.fields())
        self.shared.publish("changed", self)
        return True

    async def _undo(self, why: BaseException) -> None:
        """A start that failed: whatever there is of it by now goes away again."""
        try:
            await self.unmake()
        except Exception as exc:
            log.exception("%s: undoing its start failed", self.name)
            self.problems["start"] = Problem(f"Undoing a failed start failed: {exc}")
        left = self._still_connected()
        reason = why.message if isinstance(why, errors.VirtdError) else str(why) or type(why).__name__
        self.note(State.INACTIVE, f"failed to start: {reason}", data=left, **ending.GONE)
        await self._no_longer_isolated()

    async def stop(self, by: str, *, force: bool) -> bool:
        """Remove all of its pieces; False if it was inactive. Raises Busy when it is in use, unless `force`."""
        async with self.exclusive("stop"):
            if not self.active:
                self.wait_for(None)
                return False
            if (users := self.users()) and not force:
                raise errors.Busy(
                    f"Cannot stop network {self.name}: it is in use by {', '.join(users)}",
                    hint="Stop these first, or cut them off: "
                    + option("force")
                    + ". They are connected again at its next start.",
                )
            self.note(State.STOPPING, f"being stopped by {by}")
            await self._finish(f"stopped by {by}")
            return True

    async def _finish(self, why: str) -> None:
        """What a stop has left to do. Raises a VirtdError, and is then tried again."""
        try:
            await self.unmake()
        except errors.VirtdError as exc:
            if "stop" not in self.problems:
                self.spawn(self._finish_later(why), "stop")
            self.problems["stop"] = Problem(f"It isn't stopped yet: {exc.message}", "It is tried again every second.")
            raise
        left = self._still_connected()
        self.note(State.INACTIVE, why, data=left, **ending.GONE)
        for key in self.problems.keys() - {"record"}:
            del self.problems[key]
        journal.send(f"Stopped network {self.name}", **self.fields())
        await self._no_longer_isolated()

    async def _finish_later(self, why: str) -> None:
        while self.state is State.STOPPING:
            await asyncio.sleep(STOP_AGAIN)
            with contextlib.suppress(errors.VirtdError):
                async with self.exclusive("stop"):
                    if self.state is State.STOPPING:
                        await self._finish(why)
        self.problems.pop("stop", None)  # it was started instead

    async def unmake(self) -> None:
        """Remove every piece that is there, in the opposite order. Raises HostError, and may be repeated then."""
        await self.server.end()
        kept = self.record.data.get("bridge") if self.record is not None else None
        if kept:
            await asyncio.to_thread(bridge.lower_it, str(kept), self.mac)
        await asyncio.to_thread(firewall.remove, self.name)
        fifos.clear(self.shared.services.paths.fifos(DRIVER, self.name))
        await asyncio.to_thread(files.remove_tree, self.runtime)
        if os.path.lexists(self.runtime):
            raise errors.HostError(f"{self.runtime} can't be removed")

    async def _no_longer_isolated(self) -> None:
        """Its rules of policy routing go last, when the record says that nobody needs them; or at a later change."""
        try:
            await self.shared.isolation.settle()
        except errors.HostError as exc:
            log.warning("Network %s: %s", self.name, exc)

    # Rules

    async def apply_rules(self, network: model.Network) -> None:
        """Put the network's tables in place of what there is, and note how the kernel has them. Raises NftError."""
        ground = self.ground(network)
        (mark,) = await asyncio.to_thread(firewall.replace, ground)
        self.rules_applied(ground, mark)

    async def _ports_changed(self, network: model.Network) -> None:
        await self.apply_rules(network)
        if network.serves:
            await self.server.read_hosts(network)

    def rules_applied(self, ground: Ground, mark: firewall.Marks) -> None:
        # An older virtd knows the first only, and asks for no more.
        self.remember(rules=mark.inet, bridge_rules=mark.bridge, rules_of=firewall.made_of(ground))
        self.problems.pop("rules", None)

    @property
    def rules_mark(self) -> firewall.Marks | None:
        """Of the rules that were applied last."""
        data = self.record.data if self.record is not None else {}
        return firewall.Marks(data.get("rules", ""), data.get("bridge_rules", ""))

    def record_has(self, key: str) -> bool:
        return self.record is not None and key in self.record.data

    def rules_are(self, network: model.Network, mark: firewall.Marks) -> bool:
        """Whether these are the rules that were applied last. No rules never are: they may have been flushed again
        before anybody could look at them.
        """
        return bool(mark.bridge and (mark.inet or not network.own) and mark == self.rules_mark)

    def rules_stale(self, network: model.Network) -> bool:
        """Whether those that were applied last are other ones than this virtd makes: an older one's."""
        data = self.record.data if self.record is not None else {}
        return bool(data.get("rules_of") != firewall.made_of(self.ground(network)))

    async def rules_lost(self, network: model.Network) -> bool:
        """Whether the kernel has other rules than those that were applied last, or these are another version's."""
        if self.record is None:
            return False
        return self.rules_stale(network) or not self.rules_are(
            network, await asyncio.to_thread(firewall.mark, self.name)
        )

    def _still_connected(self) -> dict[str, Any]:
        """For the record of one that isn't active: its guests are connected again by its next start."""
        return {"ports": kept} if self.record is not None and (kept := self.record.data.get("ports")) else {}

    async def _allow_forwarding(self, network: model.Network) -> None:
        for setting in await asyncio.to_thread(prerequisites.allow_forwarding, network):
            text = f"Network {self.name}: the host forwards from now on: {setting}"
            journal.send(text, level="notice", **self.fields())

    async def _tell_firewalld(self, network: model.Network) -> None:
        try:
            await firewalld.adopt(await self.shared.services.units(), network.bridge_name)
            self.problems.pop("firewalld", None)
        except errors.VirtdError as exc:
            self.problems["firewalld"] = Problem(f"firewalld doesn't let its guests through: {exc.message}", exc.hint)
            log.warning("%s: %s", self.name, exc)

    async def join_firewalld(self) -> None:
        """After firewalld's own start: it has forgotten which zone the bridge was in."""
        network = self.running
        if network is not None and network.own and self.state is State.ACTIVE:
            await self._tell_firewalld(network)

    # A changed definition

    async def adapt(self) -> list[str]:
        """Put a changed definition in force, as far as that can be done live; what waits, in words.

        Leases and connections go on: rules are replaced in one step and connections that are established stay
        allowed, static leases and names are read again, and a dnsmasq that is replaced takes its leases over.
        """
        async with self.exclusive("reload"):
            if (waiting := self._waiting()) is not None:
                if self.problems.get("pending") != waiting:
                    journal.send(waiting.text, message_id=Message.NETWORK_PENDING, level="warning", **self.fields())
                self.problems["pending"] = waiting
                return [waiting.text]
            new, old = self.definition, self.running
            if self.state is State.ACTIVE and new is not None and self.pending:
                assert old is not None
                await self._switch(old, new)
            self.problems.pop("pending", None)
            return []

    def _waiting(self) -> Problem | None:
        """Of a changed definition that can't be put in force while the network is active."""
        new, old = self.definition, self.running
        if self.state is not State.ACTIVE or new is None or not self.pending:
            return None
        if not (keys := fixed(old, new) if old is not None else ["definition"]):
            return None
        return Problem(
            f"{', '.join(keys)} can't be changed while network {self.name} is active: the new definition waits",
            do("stop", "network", self.name) + " and start it, when its guests can do without it.",
        )

    async def _switch(self, old: model.Network, new: model.Network) -> None:
        from . import holdings

        if new.own:
            await holdings.require(self, new, self.shared)
            if self.rules_stale(new):
                await self._allow_forwarding(new)
                await self.apply_rules(new)
            await self.server.adapt(new, old)
        self.remember(**self.in_force(new, self.definition_text), unsure=False)
        if new.isolated_ports is not old.isolated_ports:
            await self.connections.settle()
        if model.Mode.ISOLATED in (old.mode, new.mode):
            await self.shared.isolation.settle()
        log.info("Network %s: the new definition is in force", self.name)

    # Taking it back

    def adopt(self, record: Record) -> None:
        """First step of a daemon's start, before there is a bus."""
        self.record = record
        if self.active:
            self.settled.clear()
            if record.slots:
                self.server.adopt(record)
            if self.state is State.ACTIVE and not self.lost_bridge() and (not record.unit or self.server.alive):
                # What the record says is good enough to be told; the rest is looked at in a moment.
                self.settled.set()

    def recall(self) -> None:
        if self.state is not State.ACTIVE:
            return
        self.connections.say_refused()
        self.standing.recall()
        network = self.running
        if network is None:
            self.problems["definition"] = Problem("The definition that it was started with can't be read")
        elif network.own and network.serves:
            self.server.recall()
        if (waiting := self._waiting()) is not None:
            self.problems["pending"] = waiting
        if self.record_has("served"):
            from . import newcomers  # no start of the daemon needs it otherwise

            newcomers.recall(self)

    async def reconcile(self, *, unit_exists: bool) -> str:
        """Second step: whole again, whatever a crash cut off. Returns "adopted", "ended", "rolled back" or ""."""
        try:
            async with self.exclusive("take back"):
                return await self._reconcile(unit_exists=unit_exists)
        finally:
            self.settled.set()

    async def _reconcile(self, *, unit_exists: bool) -> str:
        record = self.record
        if record is None:
            return ""
        network = self.running
        match self.state:
            case State.INACTIVE:
                if record.slots or record.unit:
                    await self.unmake()
                    left = self._still_connected()
                    self.note(State.INACTIVE, record.reason, data=left, **ending.GONE)
                return ""
            case State.STOPPING:
                await self._finish("its stop was interrupted, and finished")
                return "ended"
        await self.server.identify(unit_exists=unit_exists)
        if self.state is State.STARTING:
            if network is None:
                await self._undo(errors.HostError("its start was interrupted, and its definition can't be read"))
                return "rolled back"
            try:
                await self.make(network)
            except errors.VirtdError as exc:
                await self._undo(exc)
                journal.send(
                    f"Rolled back network {self.name}: {exc.message}",
                    message_id=Message.ROLLED_BACK, level="notice", **self.fields(),
                )  # fmt: skip
                return "rolled back"
            self.note(State.ACTIVE, "its start was interrupted, and finished")
            return "adopted"
        await self.connections.take_over()
        if network is not None and network.own and network.serves:
            await self.server.take_back(network)
        return "adopted"

    async def close(self) -> None:
        """Let go of everything in this process; the network stays as it is."""
        await self.server.close()
        await self.end_tasks()


def fixed(old: model.Network, new: model.Network) -> list[str]:
    """The keys that differ and can't be changed while guests use the network."""

    def address(ip: model.Ipv4 | model.Ipv6 | None) -> str | None:
        return ip.address if ip is not None else None

    found = []
    if (old.mode is model.Mode.BRIDGE) != (new.mode is model.Mode.BRIDGE):
        found.append("mode")
    if old.bridge_name != new.bridge_name:
        found.append("bridge")
    if old.uuid != new.uuid:
        found.append("uuid")
    if old.mtu != new.mtu:
        found.append("mtu")
    if address(old.ipv4) != address(new.ipv4):
        found.append("ipv4.address")
    if address(old.ipv6) != address(new.ipv6):
        found.append("ipv6.address")
    return found
