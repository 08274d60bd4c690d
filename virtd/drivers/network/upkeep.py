# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restores what somebody else changes on bridges and ports.

wanted.py finds the differences. The kernel announces most changes (watch.py), but not those of a few settings, so
everything is also compared every ten seconds. Something that changes again and again is changed by a program that has
its reasons: after a few repairs it is left alone, which is reported, and retried after ever longer pauses.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import TYPE_CHECKING

from ... import errors, journal
from ...hints import do
from ...messages import Message
from ...model.network import Mode
from ...model.state import Activity
from . import wanted
from .kernel import LinkChanged, RouteChanged, RuleChanged
from .netrecord import DRIVER
from .rtnetlink import LOCAL, MAIN
from .watch import ALL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ...objects.protocol import Publish
    from .drift import Drift
    from .kernel import Change
    from .net import Net

log = logging.getLogger(__name__)

QUIET = 0.2  # seconds; changes within them are handled together
BUSY = 0.5  # seconds until a network that is starting or stopping is looked at again
LIMIT, WINDOW = 5, 60.0  # at most so many repairs of a thing within so many seconds
PAUSE, LONGEST = 60.0, 3600.0  # seconds that it is then left alone, doubled each time up to the maximum
FORWARDED = (Mode.NAT, Mode.ROUTED)
GRACE = 15.0  # seconds for a vanished interface to leave the record too, or to come back


class Patience:
    """Counts how often each thing was restored lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: dict[str, list[float]] = {}
        self._until: dict[str, tuple[float, float]] = {}  # by key: when the pause ends, and its length

    def did(self, key: str) -> None:
        now = self._clock()
        times = [at for at in self._times.get(key, []) if now - at < WINDOW] + [now]
        self._times[key] = times
        if len(times) >= LIMIT:
            until, pause = self._until.get(key, (0.0, PAUSE / 2))
            pause = min(pause * 2, LONGEST) if now - until < LONGEST else PAUSE
            self._until[key] = now + pause, pause
            del self._times[key]

    @property
    def spared(self) -> frozenset[str]:
        """The keys of what is left alone for now."""
        now = self._clock()
        return frozenset(key for key, (until, _pause) in self._until.items() if until > now)


class Upkeep:
    """Tends all the driver's networks. `doubt`: called for networks that need another search for obstacles, see
    prober.py.
    """

    def __init__(self, nets: dict[str, Net], publish: Publish, doubt: Callable[[Iterable[str]], None]) -> None:
        self._nets = nets
        self._publish = publish
        self._doubt = doubt
        self._touched: set[tuple[str, int]] = set()  # interfaces: name and index
        self._subnets: set[tuple[int, int, int]] = set()  # networks' prefixes: version, address, length
        self._patience: dict[str, Patience] = {}
        self._gone: dict[str, dict[str, float]] = {}  # by network: vanished interfaces, and since when
        self._numbers: dict[int, str] = {}  # the interfaces looked at last, by index
        self._task: asyncio.Task[None] | None = None
        self._begun = False

    async def begin(self) -> None:
        """Begin to restore things, now that reconciliation is complete."""
        self._begun = True
        await self.restore(set(self._nets), why="while virtd was away")
        if self._touched:
            self.link(ALL)

    async def close(self) -> None:
        self._begun = False
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # Notifications

    def link(self, name: str, number: int = 0) -> None:
        """Called when something happened to an interface, or to any (ALL).

        `number` is its index, which identifies a renamed one: the kernel doesn't report the old name.
        """
        self._touched.add((name, number))
        if self._task is None and self._begun:
            self._task = asyncio.create_task(self._work(), name="look-at-interfaces")

    def heard(self, change: Change) -> None:
        match change:
            case LinkChanged(name, number):
                self.link(name, number)
            case RuleChanged():
                self.link(ALL)
            case RouteChanged():
                if self._concerns(change):
                    self.link(ALL)
                if (
                    change.bits <= 1 and change.table != LOCAL
                ):  # a VPN may use two routes, one for each half of all addresses
                    # What firewalls let through depends on where packets go.
                    self._doubt([net.name for net in self._live() if net.running and net.running.mode in FORWARDED])

    def _concerns(self, route: RouteChanged) -> bool:
        """Whether a route leads to a network or part of it; outside the main table any overlap counts."""
        for version, prefix, bits in self._subnets:
            if version == route.version and (route.bits >= bits or route.table not in (MAIN, LOCAL)):
                width = (32 if version == 4 else 128) - min(bits, route.bits)
                if route.prefix >> width == prefix >> width:
                    return True
        return False

    async def _work(self) -> None:
        try:
            while self._touched:
                await asyncio.sleep(QUIET)
                events, self._touched = self._touched, set()
                touched = {self._numbers.get(number, name) for name, number in events} | {name for name, _ in events}
                # A route in a network's way may vanish together with any interface, and isn't announced then.
                names = {
                    net.name
                    for net in self._live()
                    if ALL in touched or net.standing.wrong or touched & wanted.names([net.tended])
                }
                if names and await self.restore(names, why="by somebody else"):
                    await asyncio.sleep(BUSY)
        finally:
            self._task = None

    def _live(self) -> list[Net]:
        """Networks that are active, and those being started, which are compared once they are active."""
        live = Activity.STARTING, Activity.ACTIVE
        return [net for net in self._nets.values() if net.state in live and net.running is not None]

    # Restoring

    def forgive(self, name: str) -> None:
        """Leave nothing of a network alone any longer, since somebody has asked for it."""
        self._patience.pop(name, None)

    async def restore(self, names: set[str], *, why: str) -> bool:
        """Compare these networks and restore differences. Returns whether some were busy and have to be retried."""
        if not self._begun:
            return False
        live = self._live()
        self._subnets = {
            (subnet.version, int(subnet.network_address), subnet.prefixlen)
            for net in live
            for _key, subnet in (net.running.subnets() if net.running is not None else ())
        }
        nets = [net for net in live if net.name in names]
        busy = [net for net in nets if net.busy]
        busy += await self._look([net for net in nets if not net.busy and net.state is Activity.ACTIVE], why)
        for net in busy:
            self.link(net.bridge_name)
        return bool(busy)

    async def _look(self, nets: list[Net], why: str) -> list[Net]:
        """Like `restore`; returns the networks that turned out to be busy."""
        if not nets:
            return []
        said = [net.standing.said for net in nets]
        try:
            found = await asyncio.to_thread(wanted.compare, [net.tended for net in nets])
        except errors.HostError as exc:
            log.error("%s", exc)
            return []
        self._numbers = found.numbers if len(nets) == len(self._live()) else self._numbers | found.numbers
        busy, differing = [], []
        for net, drifts, before in zip(nets, found.drifts, said, strict=True):
            # A report made meanwhile may be older or newer than this comparison.
            if self._lasting(net, drifts) or net.standing.said != before:
                differing.append(net)
            elif net.busy:
                busy.append(net)
            else:
                net.standing.say([])
        told: dict[str, list[Drift]] = {}
        for net in sorted(differing, key=lambda net: net.busy):  # busy networks last, so that none waits for another
            try:
                told[net.name] = await self._put_back(net)
            except errors.Busy:
                busy.append(net)
            except errors.VirtdError as exc:
                log.error("Network %s: %s", net.name, exc)
        self._tell(told, why)
        if made := [name for name, done in told.items() if done]:
            self._doubt(made)  # other parties' rules may refer to the former interface by its index
        return busy

    async def _put_back(self, net: Net) -> list[Drift]:
        patience = self._patience.setdefault(net.name, Patience())
        async with net.exclusive("look after"):
            if net.state is not Activity.ACTIVE or net.running is None:
                return []
            done, left = await net.standing.put_back(patience.spared)
            for one in done:
                if not one.new:
                    patience.did(one.key)
            spared = patience.spared
            net.standing.say([self._explained(net, one, spared) for one in self._lasting(net, left)])
            return done

    def _explained(self, net: Net, one: Drift, spared: frozenset[str]) -> Drift:
        if one.key not in spared:
            return one
        text = f"{one.text} (put back {LIMIT} times within {WINDOW:g} s, and left now: something sets it again)"
        hint = (
            "Find the program, such as systemd-networkd or NetworkManager, and have it leave the interface alone; "
            "then: " + do("start", "network", net.name) + "."
        )
        return one._replace(text=text, hint=hint)

    def _lasting(self, net: Net, found: list[Drift]) -> list[Drift]:
        """The differences without interfaces that have just vanished, whose guests are ending or rebooting."""
        now = time.monotonic()
        before = self._gone.get(net.name, {})
        since = self._gone[net.name] = {one.key: before.get(one.key, now) for one in found if one.gone}
        return [one for one in found if now - since.get(one.key, -math.inf) > GRACE]

    def _tell(self, told: dict[str, list[Drift]], why: str) -> None:
        told = {name: [one for one in done if not (one.new or one.quiet)] for name, done in told.items()}
        told = {name: done for name, done in told.items() if done}
        if not told:
            return
        texts = dict.fromkeys(one.text for done in told.values() for one in done)
        named = f"network {', '.join(told)}" if len(told) == 1 else f"networks {', '.join(told)}"
        journal.send(
            f"What had been changed {why} of {named} was put back: {'; '.join(texts)}",
            message_id=Message.NETWORK_PUT_BACK, level="warning", VIRTD_DRIVER=DRIVER, VIRTD_NAME=" ".join(told),
        )  # fmt: skip
        for name in told:
            self._publish("changed", name)
