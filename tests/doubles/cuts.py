# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon killed before each step of something, one step later each time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator
    from pathlib import Path

    import pytest

    from tests.doubles.whole_host import World


class Cuts:
    """The same again from its beginning, until a kill would have come too late.

        for root, patch in cuts:
            world = World(root, patch)
            async with world.daemon() as host:
                await cuts.cut(world, host.start(...))
            async with world.daemon() as host:
                ...  # what the next one makes of it

    A run that nothing cut off, the last, is seen like the others. `seen`: the steps that the kills came before. Runs
    can differ by a step or two, as one thread is faster than another: while one of `wanted` hasn't been among them,
    all is done once more.
    """

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._top = top
        self._monkeypatch = monkeypatch
        self._world: World | None = None
        self.number = 0
        self.finished = False
        self.seen: list[str] = []
        self.wanted: set[str] = set()

    def __iter__(self) -> Iterator[tuple[Path, pytest.MonkeyPatch]]:
        """An empty directory, and what takes the run's patches back after it."""
        for time in ("", "a", "b"):
            self.number, self.finished = 0, False
            while not self.finished:
                self.number += 1
                root = self._top / f"{self.number}{time}"
                root.mkdir()
                with self._monkeypatch.context() as patch:
                    yield root, patch
            if self.wanted <= set(self.seen):
                return

    async def cut(self, world: World, work: Awaitable[Any]) -> None:
        """Do `work` until this run's step. Raises Killed, which `World.daemon` takes, unless it is through before."""
        world.steps, world.crash_at = [], self.number
        try:
            await world.unless_crashed(work)
            self.finished = True
        finally:
            self.seen.append(world.steps[-1] if world.steps else "")

    @property
    def where(self) -> str:
        return f"killed before step {self.number}, {self.seen[-1]}"
