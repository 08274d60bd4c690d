# SPDX-License-Identifier: LGPL-2.1-or-later
"""Decides when to look for obstacles (see obstacles.py): after a start, and when rules, the host's default route or a
repaired setting have changed. The search runs in the background, in a thread; networks show the latest findings.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from ... import errors, journal
from ...messages import Message
from ...model.state import Activity
from ...objects.protocol import Problem
from . import firewall, prerequisites
from .netlink import NETFILTER, NFGEN, NFTABLES, Requests

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .net import Net
    from .obstacles import Obstacle
    from .ports import Ground

log = logging.getLogger(__name__)

QUIET = 0.2  # seconds; changes within them are handled together
PAUSE = 2.0  # minimum of seconds between two searches: on some hosts rules change all the time
SHARE = 4  # and at least this many times as long as the last search took
_GETGEN, _GEN_ID = NFTABLES | 16, 1  # NFT_MSG_GETGEN, NFTA_GEN_ID
AGAIN = (10.0, 20.0, 40.0, 80.0, 160.0, 300.0)  # seconds between searches for unannounced changes


class Prober:
    """Searches for obstacles in all networks."""

    def __init__(self, nets: dict[str, Net]) -> None:
        self._nets = nets
        self._doubtful: set[str] = set()
        self._running: asyncio.Task[None] | None = None
        self._again: asyncio.TimerHandle | None = None
        self._times = 0  # how often the search was repeated without any announcement
        self._legacy = _legacy()
        self._next = 0.0
        self._trying: tuple[str, asyncio.Future[list[Obstacle]]] | None = None  # the network being searched
        self._over = threading.Event()  # tells the thread to stop

    def doubt(self, names: Iterable[str]) -> None:
        """Search these networks shortly: rules have changed, or the networks have just been started."""
        self._times = 0
        self._look_at(names)

    def look(self) -> None:
        """Search again if the set of legacy iptables' tables has changed; nothing else is as cheap to check."""
        before, self._legacy = self._legacy, _legacy()
        if self._legacy != before:
            self.doubt(net.name for net in self._nets.values() if net.active)

    def recall(self) -> None:
        """First step of a start: report what an earlier daemon found."""
        for net in self._nets.values():
            if net.active:
                _recall(net)

    def begin(self) -> None:
        """Second step: search wherever something may have changed."""
        now = _generation()
        for net in self._nets.values():
            if net.active and not (_is_same(net, now) and not self._legacy):
                self._look_at([net.name])

    def _look_at(self, names: Iterable[str]) -> None:
        self._doubtful |= set(names)
        if self._running is None and self._doubtful:
            self._running = asyncio.create_task(self._look(), name="look-for-obstacles")

    async def leave(self, name: str) -> None:
        """Stop searching a network that is about to be stopped."""
        self._doubtful.discard(name)
        if self._trying is not None and self._trying[0] == name:
            self._over.set()
            await asyncio.wait([self._trying[1]])

    async def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
        self._over.set()
        left = [self._running] if self._running is not None else []
        for task in left:
            task.cancel()
        trying = [self._trying[1]] if self._trying is not None else []
        await asyncio.gather(*left, *trying, return_exceptions=True)

    async def _look(self) -> None:
        try:
            while self._doubtful:
                await asyncio.sleep(max(QUIET, self._next - time.monotonic()))
                names, self._doubtful = self._doubtful, set()
                begun = time.monotonic()
                for name in sorted(names):
                    try:
                        await self._look_for(name)
                    except Exception:  # continue with the other networks
                        log.exception("Network %s: cannot try what firewalls let through", name)
                # The generation includes our own temporary tables; other parties' changes in the meantime are
                # announced.
                now = _generation()
                for name in sorted(names):
                    if (net := self._nets.get(name)) is not None and net.state is Activity.ACTIVE:
                        _note(net, now)
                ended = time.monotonic()
                self._next = ended + max(PAUSE, SHARE * (ended - begun))
        finally:
            self._running = None
        self._look_again()

    async def _look_for(self, name: str) -> None:
        net = self._nets.get(name)
        if net is None:
            return
        if net.state is not Activity.ACTIVE or (network := net.running) is None or net.lost_bridge():
            net.obstacles = []
            return
        self._over.clear()
        trying = asyncio.ensure_future(asyncio.to_thread(_find, net.rules.ground(network), self._over))
        self._trying = name, trying
        try:
            found = await asyncio.shield(trying)
        except (errors.HostError, OSError) as exc:
            # Then nothing is known, and no obstacle is reported.
            log.debug("Network %s: cannot try what firewalls let through: %s", name, exc)
            found = []
        finally:
            self._trying = None
        if net.state is Activity.ACTIVE and not net.lost_bridge():
            _tell(net, found)

    def _look_again(self) -> None:
        """Schedule another search where legacy iptables and sysctls matter: they change unannounced."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        names = [
            net.name
            for net in self._nets.values()
            if any(one.unheard for one in net.obstacles) or (self._legacy and net.active)
        ]
        if names:
            pause = AGAIN[min(self._times, len(AGAIN) - 1)]
            self._times += 1
            self._again = asyncio.get_running_loop().call_later(pause, self._look_at, names)


def _tell(net: Net, found: list[Obstacle]) -> None:
    """Replace the problems found last; those no longer found are dropped."""
    new = {f"obstacle {number}": one.problem for number, one in enumerate(found)}
    before = {key: problem for key, problem in net.problems.items() if key.startswith("obstacle ")}
    net.obstacles = found
    if new == before:
        return
    for key in before:
        del net.problems[key]
    net.problems |= new
    for problem in new.values():
        if problem not in before.values():
            journal.send(
                f"Network {net.name}: {problem.text}. What helps: {problem.hint}",
                message_id=Message.NETWORK_OBSTRUCTED, level="warning", **net.fields(),
            )  # fmt: skip
    net.shared.publish("changed", net)


def _note(net: Net, generation: int | None) -> None:
    """Record the findings, and the rules' generation, for the next daemon."""
    found = [[one.problem.text, str(one.problem.hint), one.unheard] for one in net.obstacles]
    net.remember(obstacles={"found": found, "generation": generation, "ground": _ground(net)})


def _noted(net: Net) -> list[tuple[Problem, bool]] | None:
    """The findings of the last search, each with whether its end goes unannounced; None before the first search."""
    noted: Any = net.data.get("obstacles")
    try:
        return [(Problem(str(text), str(hint)), bool(unheard)) for text, hint, unheard in noted["found"]]
    except (TypeError, LookupError, ValueError):
        return None


def _recall(net: Net) -> None:
    if found := _noted(net):
        from .obstacles import Obstacle

        net.obstacles = [Obstacle(*one) for one in found]
        net.problems |= {f"obstacle {number}": problem for number, (problem, _) in enumerate(found)}


def _is_same(net: Net, generation: int | None) -> bool:
    """Whether the last search's findings must still hold."""
    found = _noted(net)
    if found is None or any(unheard for _, unheard in found) or net.record is None:
        return False
    noted = net.record.data["obstacles"]
    return bool(noted.get("generation") == generation is not None and noted.get("ground") == _ground(net))


def _ground(net: Net) -> str:
    return firewall.made_of(net.rules.ground(network)) if (network := net.running) is not None else ""


def _find(ground: Ground, over: threading.Event) -> list[Obstacle]:
    from . import obstacles  # imported late: the daemon can start without it

    return obstacles.find(ground, over)


def _generation() -> int | None:
    """nftables' generation number, which every change of rules increases; None if it isn't known."""
    try:
        with Requests(NETFILTER) as netlink:
            answer = netlink.answer(_GETGEN, NFGEN.pack(0, 0, 0))
        return int.from_bytes(answer.attributes(NFGEN)[_GEN_ID], "big")
    except (OSError, LookupError):
        return None


def _legacy() -> list[list[str]]:
    """Legacy iptables' tables, whose changes the kernel doesn't announce; [] if there are none."""
    found = [sorted(prerequisites.legacy_tables(file)) for file in ("ip_tables_names", "ip6_tables_names")]
    return found if any(found) else []
