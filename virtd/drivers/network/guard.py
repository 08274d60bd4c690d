# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restores what others take away from networks: rules, and firewalld's zone. Upkeep restores the rest.

Nothing is polled: the kernel announces changes of tables and interfaces, and firewalld its own start and reload.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from ... import errors, journal
from ...hints import do
from ...messages import Message
from ...model.state import Activity
from ...objects.protocol import Problem
from . import firewall, firewalld, isolation
from .kernel import RuleChanged
from .netrecord import DRIVER
from .watch import ALL, Watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...children.child import Services
    from ...objects.protocol import Publish
    from .isolation import Isolation
    from .kernel import Change
    from .net import Net
    from .prober import Prober
    from .upkeep import Upkeep

log = logging.getLogger(__name__)

QUIET = 0.2  # seconds; changes within them are handled together
BUS_RETRY = 2.0


class Guard:
    """Guards all networks; `problems` are the driver's. It starts with the first active network."""

    def __init__(
        self,
        services: Services,
        nets: dict[str, Net],
        problems: dict[str, Problem],
        publish: Publish,
        isolated: Isolation,
        prober: Prober,
        upkeep: Upkeep,
    ) -> None:
        self._services = services
        self._nets = nets
        self._problems = problems
        self._publish = publish
        self._isolation = isolated
        self._prober = prober
        self._upkeep = upkeep
        self._watch: Watch | None = None
        self._doubtful: set[str] = set()  # tables that somebody has changed
        self._looking: asyncio.Task[None] | None = None
        self._restoring: asyncio.Task[None] | None = None
        self._beside: asyncio.Task[None] | None = None

    def begin(self, *, beside_firewalld: bool = True) -> None:
        """Start listening if a network is active; on the bus only with `beside_firewalld`."""
        if not any(net.active for net in self._nets.values()):
            return
        if self._watch is None:
            try:
                self._watch = Watch(self._touched, self._changed)
                self._problems.pop("watch", None)
                self._upkeep.link(ALL)  # or may have changed before
            except OSError as exc:
                self._problems["watch"] = Problem(
                    f"Rules that vanish won't be noticed: {exc.strerror}", "virtd.service needs CAP_NET_ADMIN."
                )
        if self._beside is None and beside_firewalld:
            self._beside = asyncio.create_task(self._follow_firewalld(), name="firewalld")

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        tasks = [task for task in (self._looking, self._restoring, self._beside) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Rules

    def _touched(self, table: str) -> None:
        """Called when an nftables table was changed, perhaps by virtd itself."""
        if table == firewall.PROBE:
            return
        self._doubtful.add(table)
        if self._looking is None:
            self._looking = asyncio.create_task(self._look(), name="look-at-rules")

    async def _look(self) -> None:
        try:
            while self._doubtful:
                await asyncio.sleep(QUIET)
                doubtful, self._doubtful = self._doubtful, set()
                ours = {table.removeprefix(firewall.PREFIX) for table in doubtful if firewall.is_ours(table)}
                await self.restore_rules(set(self._nets) if ALL in doubtful else ours, why="by somebody else")
                if not all(map(firewall.is_ours, doubtful)):
                    self._prober.doubt(self._nets)
        finally:
            self._looking = None

    async def restore_rules(self, which: set[str], *, why: str) -> None:
        """Reapply rules that are missing or changed; one journal entry for all networks."""
        nets = [net for name, net in sorted(self._nets.items()) if name in which]
        busy = [net for net in nets if net.busy]
        try:
            restored, rest = await self._restore(*(net for net in nets if net not in busy)), busy
        except errors.VirtdError:  # one network may be at fault, and not the others
            restored, rest = [], nets
        for net in rest:
            try:
                restored += await self._restore(net)
            except errors.VirtdError as exc:
                log.error("The rules of network %s can't be applied: %s", net.name, exc)
                if not isinstance(exc, errors.Busy):
                    net.problems["rules"] = Problem(f"Its rules are missing: {exc.message}", exc.hint)
        if restored:
            self._tell_restored(restored, f"The firewall rules of {_named(restored)}", why)

    def _tell_restored(self, names: list[str], what: str, why: str) -> None:
        journal.send(
            f"{what} had been removed or changed {why}, and were applied again",
            message_id=Message.NETWORK_RULES_RESTORED, level="warning",
            VIRTD_DRIVER=DRIVER, VIRTD_NAME=" ".join(names),
        )  # fmt: skip
        for name in names:
            self._publish("changed", name)

    async def _restore(self, *nets: Net) -> list[str]:
        """Restore missing or changed rules, all or none; returns the names of the networks concerned. Raises a
        VirtdError.
        """
        async with contextlib.AsyncExitStack() as turns:
            for net in nets:
                await turns.enter_async_context(net.exclusive("look after the rules of"))
            running = {net.name: net.running for net in nets if net.state is Activity.ACTIVE}
            networks = {name: network for name, network in running.items() if network is not None}
            if not networks:
                return []
            marks = await asyncio.to_thread(firewall.marks, list(networks))
            stale = {name for name, network in networks.items() if self._nets[name].rules.stale(network)}
            lost = [
                name
                for name, network in networks.items()
                if name in stale or not self._nets[name].rules.are(network, marks[name])
            ]
            if lost:
                grounds = [self._nets[name].rules.ground(networks[name]) for name in lost]
                for ground, mark in zip(grounds, await asyncio.to_thread(firewall.replace, *grounds), strict=True):
                    self._nets[ground.network.name].rules.applied(ground, mark)
            if stale:
                log.info("The rules of %s were replaced by those of this version", _named(sorted(stale)))
            return [name for name in lost if name not in stale]

    # Isolation

    def _changed(self, change: Change) -> None:
        """Called when rtnetlink reports a change, perhaps virtd's own."""
        self._upkeep.heard(change)
        if isinstance(change, RuleChanged) and change.removed and self._restoring is None:
            self._restoring = asyncio.create_task(self._restore_routing(), name="look-at-routing")

    async def _restore_routing(self) -> None:
        try:
            await self.restore_isolation(why="by somebody else")
        finally:
            self._restoring = None

    async def restore_isolation(self, *, why: str) -> None:
        """Restore the rules that isolate networks, and remove leftover ones."""
        needed = {
            net.name: isolation.wanted(network)
            for net in self._nets.values()
            if net.state is Activity.ACTIVE and (network := net.running) is not None
        }
        try:
            missing = await self._isolation.apply()
        except errors.HostError as exc:
            log.error("%s", exc)
            for name in (name for name, rules in needed.items() if rules):
                self._nets[name].problems["isolation"] = Problem(
                    f"It may not be isolated: {exc.message}", do("start", "network", name) + " tries it again."
                )
            return
        for name in needed:
            self._nets[name].problems.pop("isolation", None)
        # Networks started by an older virtd never had these rules.
        older = {name for name in needed if "rules_of" not in self._nets[name].data}
        if restored := sorted(name for name, rules in needed.items() if rules & missing and name not in older):
            self._tell_restored(restored, f"The rules of policy routing (ip rule) of {_named(restored)}", why)

    # firewalld

    async def _follow_firewalld(self) -> None:
        """For as long as the daemon runs, put our bridges into their zone whenever firewalld starts.

        When firewalld stops, what it had refused is no longer a problem.
        """
        missed = False
        while True:
            try:
                await self._once(missed=missed)
            except errors.VirtdError as exc:
                log.debug("firewalld isn't watched: %s", exc)
            missed = True
            await asyncio.sleep(BUS_RETRY)

    async def _once(self, *, missed: bool) -> None:
        """Follow firewalld until this bus connection is lost. `missed`: it may have started while there was none."""
        bus = (await self._services.units()).bus
        changed, closed = asyncio.Event(), asyncio.Event()
        bus.on_closed(_both(changed.set, closed.set))
        await firewalld.watch(bus, changed.set)
        if missed:
            changed.set()
        while await changed.wait() and not closed.is_set():
            changed.clear()
            for net in list(self._nets.values()):
                await net.pieces.join_firewalld()
            self._touched(ALL)


def _named(names: list[str]) -> str:
    return f"network {names[0]}" if len(names) == 1 else f"networks {', '.join(names)}"


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call
