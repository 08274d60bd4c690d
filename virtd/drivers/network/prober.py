# SPDX-License-Identifier: LGPL-2.1-or-later
"""When it is looked for what keeps guests from doing what they do, see obstacles.py: after a start, and when somebody
has changed rules. It is done in the background, in a thread, and the networks show what was found last.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import TYPE_CHECKING

from ... import errors
from ...model.network import State

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .net import Net
    from .obstacles import Obstacle
    from .ports import Ground

log = logging.getLogger(__name__)

SETTLE = 0.2  # seconds in which changes count as one
PAUSE = 2.0  # seconds between two looks at the least: on some hosts rules change all the time
SHARE = 4  # and so many times as long as the last one took
AGAIN = (10.0, 20.0, 40.0, 80.0, 160.0, 300.0)  # while something is wrong whose mending nobody tells


class Prober:
    """One for all networks."""

    def __init__(self, nets: dict[str, Net]) -> None:
        self._nets = nets
        self._doubtful: set[str] = set()
        self._running: asyncio.Task[None] | None = None
        self._again: asyncio.TimerHandle | None = None
        self._times = 0  # that it was looked again without a word from anybody
        self._next = 0.0
        self._trying: tuple[str, asyncio.Future[list[Obstacle]]] | None = None  # in which network
        self._over = threading.Event()  # tells the thread

    def doubt(self, names: Iterable[str]) -> None:
        """Somebody's rules have changed, or these networks have just come up: look, in a moment."""
        self._times = 0
        self._look_at(names)

    def _look_at(self, names: Iterable[str]) -> None:
        self._doubtful |= set(names)
        if self._running is None and self._doubtful:
            self._running = asyncio.create_task(self._look(), name="look-for-obstacles")

    async def leave(self, name: str) -> None:
        """Have nothing to do with a network any more, which is about to go."""
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
                await asyncio.sleep(max(SETTLE, self._next - time.monotonic()))
                names, self._doubtful = self._doubtful, set()
                begun = time.monotonic()
                for name in sorted(names):
                    try:
                        await self._look_for(name)
                    except Exception:  # it keeps no other from being looked at
                        log.exception("Network %s: what its guests may do can't be tried", name)
                ended = time.monotonic()
                self._next = ended + max(PAUSE, SHARE * (ended - begun))
        finally:
            self._running = None
        self._look_again()

    async def _look_for(self, name: str) -> None:
        net = self._nets.get(name)
        if net is None:
            return
        if net.state is not State.ACTIVE or (network := net.running) is None or net.lost_bridge():
            net.obstacles = []
            return
        self._over.clear()
        trying = asyncio.ensure_future(asyncio.to_thread(_find, net.ground(network), self._over))
        self._trying = name, trying
        try:
            found = await asyncio.shield(trying)
        except (errors.HostError, OSError) as exc:
            # Nothing is known then, and nothing is claimed.
            log.debug("Network %s: what its guests may do can't be tried: %s", name, exc)
            found = []
        finally:
            self._trying = None
        if net.state is State.ACTIVE and not net.lost_bridge():
            net.obstructed(found)

    def _look_again(self) -> None:
        """Legacy iptables and sysctls change without a word to anybody."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        names = [net.name for net in self._nets.values() if any(one.unheard for one in net.obstacles)]
        if names:
            pause = AGAIN[min(self._times, len(AGAIN) - 1)]
            self._times += 1
            self._again = asyncio.get_running_loop().call_later(pause, self._look_at, names)


def _find(ground: Ground, over: threading.Event) -> list[Obstacle]:
    from . import obstacles  # no start of the daemon needs it

    return obstacles.find(ground, over)
