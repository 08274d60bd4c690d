# SPDX-License-Identifier: LGPL-2.1-or-later
"""One network and its life. A start records it as "starting", makes its pieces, then records it as "active". An
interrupted start is finished by making all pieces again, an interrupted stop by removing them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from ... import errors, journal
from ...children import ending
from ...hints import do, option
from ...messages import Message
from ...model.state import Activity
from ...objects.protocol import Problem
from ...records import Record, now
from . import bridge, prerequisites, routes
from . import ports as ports_
from .adapting import Adapting
from .connections import Connections
from .netrecord import DRIVER, NetRecord, Shared
from .pieces import Pieces
from .rules import Rules
from .server import Server
from .standing import Standing

if TYPE_CHECKING:
    from ...model.network import Network
    from .obstacles import Obstacle
    from .ports import Ground

log = logging.getLogger(__name__)

STOP_AGAIN = 1.0  # seconds until an unfinished stop is retried


class Net(NetRecord):
    """A network, and, while it is active, its pieces."""

    def __init__(self, shared: Shared, name: str) -> None:
        super().__init__(shared, name)
        self.server = Server(self)
        self.rules = Rules(self)
        self.connections = Connections(self, self._ports_changed)
        self.standing = Standing(self)
        self.pieces = Pieces(self, self.rules, self.server, self.standing.ensure)
        self.adapting = Adapting(self, self.rules, self.server, self.pieces, self.connections)
        self.obstacles: list[Obstacle] = []  # the latest findings, see prober.py

    # What it is

    @property
    def tended(self) -> Ground:
        network = self.current
        ports = tuple(port for port in self.ports if port.interface not in self.connections.coming)
        mac = self.mac if network.own else ""
        return ports_.Ground(network, mac, ports, refused=frozenset(self.connections.refused))

    def refuse(self, interfaces: set[str]) -> None:
        self.connections.refuse(interfaces)

    async def _ports_changed(self, network: Network) -> None:
        await self.rules.apply(network)
        if network.serves:
            await self.server.read_hosts(network)

    async def make(self, network: Network) -> None:
        """Make the pieces that are missing. Raises a VirtdError."""
        await self.pieces.make(network)

    async def adapt(self) -> list[str]:
        return await self.adapting.adapt()

    # Starting and stopping

    async def start(self, by: str) -> bool:
        """Make all pieces, or the missing ones; False if none was missing. Raises a VirtdError."""
        from . import holdings  # imported late: the daemon can start without it

        async with self.exclusive("start"):
            if self.state is Activity.ACTIVE:
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
                state=Activity.STARTING.value,
                reason=f"being started by {by}",
                since=now(),
                boot_id=self.shared.boot_id,
                data=self.in_force(network, self.definition_text)
                | {"mac": bridge.mac_of(self.uuid)}
                | self.still_connected(),
            )
            holdings.require_free(self, network, self.shared)  # others may have claimed something meanwhile
            self.put(record)
            self.shared.publish("changed", self)
            try:
                await self.make(network)
            except BaseException as exc:
                await asyncio.shield(self._undo(exc))
                raise
            self.note(Activity.ACTIVE, f"started by {by}")
            self.problems.pop("start", None)
            journal.send(f"Started network {self.name} ({network.bridge_name})", **self.fields())
            return True

    async def _repair(self) -> bool:
        """Restore what an active network lacks, and reconnect its users; False if nothing was missing."""
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
        if whole and (not network.serves or self.server.alive) and not await self.rules.lost(network):
            return False
        await self.make(network)
        journal.send(f"Repaired network {self.name} ({network.bridge_name})", **self.fields())
        self.shared.publish("changed", self)
        return True

    async def _undo(self, why: BaseException) -> None:
        """Undo a failed start: remove whatever exists so far."""
        try:
            await self.pieces.unmake()
        except Exception as exc:
            log.exception("%s: undoing its start failed", self.name)
            self.problems["start"] = Problem(f"Undoing a failed start failed: {exc}")
        left = self.still_connected()
        reason = why.message if isinstance(why, errors.VirtdError) else str(why) or type(why).__name__
        self.note(Activity.INACTIVE, f"failed to start: {reason}", data=left, **ending.GONE)
        await self.pieces.no_longer_isolated()

    async def stop(self, by: str, *, force: bool) -> bool:
        """Remove all pieces; False if the network was inactive. Raises Busy if it is in use, unless `force`."""
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
            self.note(Activity.STOPPING, f"being stopped by {by}")
            await self._finish(f"stopped by {by}")
            return True

    async def _finish(self, why: str) -> None:
        """Finish a stop. If this raises a VirtdError, it is retried later."""
        try:
            await self.pieces.unmake()
        except errors.VirtdError as exc:
            if "stop" not in self.problems:
                self.spawn(self._finish_later(why), "stop")
            self.problems["stop"] = Problem(f"It isn't stopped yet: {exc.message}", "It is tried again every second.")
            raise
        left = self.still_connected()
        self.note(Activity.INACTIVE, why, data=left, **ending.GONE)
        for key in self.problems.keys() - {"record"}:
            del self.problems[key]
        journal.send(f"Stopped network {self.name}", **self.fields())
        await self.pieces.no_longer_isolated()

    async def _finish_later(self, why: str) -> None:
        while self.state is Activity.STOPPING:
            await asyncio.sleep(STOP_AGAIN)
            with contextlib.suppress(errors.VirtdError):
                async with self.exclusive("stop"):
                    if self.state is Activity.STOPPING:
                        await self._finish(why)
        self.problems.pop("stop", None)  # the network was started instead

    # Taking it back

    def adopt(self, record: Record) -> None:
        """First step of a daemon's start, before there is a bus."""
        self.record = record
        if self.active:
            self.settled.clear()
            if record.slots:
                self.server.adopt(record)
            if self.state is Activity.ACTIVE and not self.lost_bridge() and (not record.unit or self.server.alive):
                # The record suffices for answers; the rest is compared shortly.
                self.settled.set()

    def recall(self) -> None:
        if self.state is not Activity.ACTIVE:
            return
        self.connections.say_refused()
        self.standing.recall()
        network = self.running
        if network is None:
            self.problems["definition"] = Problem("The definition that it was started with can't be read")
        elif network.own and network.serves:
            self.server.recall()
        self.adapting.recall()
        if "served" in self.data:
            from . import newcomers  # imported late: the daemon can otherwise start without it

            newcomers.recall(self)

    async def reconcile(self, *, unit_exists: bool) -> str:
        """Second step: finish what a crash interrupted. Returns "adopted", "ended", "rolled back" or ""."""
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
            case Activity.INACTIVE:
                if record.slots or record.unit:
                    await self.pieces.unmake()
                    left = self.still_connected()
                    self.note(Activity.INACTIVE, record.reason, data=left, **ending.GONE)
                return ""
            case Activity.STOPPING:
                await self._finish("its stop was interrupted, and finished")
                return "ended"
        await self.server.identify(unit_exists=unit_exists)
        if self.state is Activity.STARTING:
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
            self.note(Activity.ACTIVE, "its start was interrupted, and finished")
            return "adopted"
        await self.connections.take_over()
        if network is not None and network.own and network.serves:
            await self.server.take_back(network)
        return "adopted"

    async def close(self) -> None:
        """Release everything held in this process; the network stays as it is."""
        await self.server.close()
        await self.end_tasks()
