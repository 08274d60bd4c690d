# SPDX-License-Identifier: LGPL-2.1-or-later
"""Chains of backing volumes: what a volume is based on, and what is based on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ... import errors
from ...hints import do, option
from .backend import Backing, Volume
from .usage import key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...model.drives import Format
    from .jobs import Jobs
    from .pool import StoragePool
    from .pools import Pools

DEPTH = 64  # volumes in one chain


class Link(NamedTuple):
    """One volume of a chain."""

    pool: StoragePool
    volume: Volume

    @property
    def key(self) -> str:
        return key(self.pool.name, self.volume.name)

    @property
    def format(self) -> Format:
        """Raises InvalidState if it isn't known."""
        return self._known_format()

    def _known_format(self) -> Format:
        if self.volume.meta.format is not None:
            return self.volume.meta.format
        pool, name = self.pool.name, self.volume.name
        raise errors.InvalidState(
            f"The format of volume {name} isn't known: it was put into pool {pool} by others",
            hint="Say what it is: "
            + do("import", "volume", pool, name, from_="raw")
            + " (or qcow2), or have virtd look: "
            + option("probe")
            + ".",
        )

    def require_usable(self) -> None:
        """Raise InvalidState if its format isn't known, or it is damaged."""
        self._known_format()
        if trouble := self.volume.trouble:
            raise errors.InvalidState(f"Volume {self.volume.name} of pool {self.pool.name} can't be used: {trouble}")

    @property
    def pair(self) -> tuple[str, Format]:
        return self.volume.path, self.format

    @property
    def backing(self) -> Backing:
        return Backing(self.pool.name, self.volume.name, self.format)


async def chain(pools: Pools, pool: StoragePool, volume: Volume) -> list[Link]:
    """The volume and its backing volumes, from virtd's own records; images aren't believed."""
    found = [Link(pool, volume)]
    while (backing := found[-1].volume.meta.backing) is not None:
        if len(found) > DEPTH:
            raise errors.InvalidState(f"{volume.name} stands on more than {DEPTH} volumes, or on itself")
        try:
            below = pools.find(backing.pool)
            lower = await below.usable.volume(backing.volume)
        except (errors.NotFound, errors.InvalidState) as exc:
            raise errors.InvalidState(
                f"{found[-1].volume.name} stands on volume {backing.volume} of pool {backing.pool}: {exc.message}",
                hint=exc.hint,
            ) from exc
        found.append(Link(below, lower))
    return found


def require_format(links: Sequence[Link]) -> None:
    """Raise InvalidState for a volume whose format isn't known, or that is damaged."""
    for link in links:
        link.require_usable()


async def dependents(pools: Pools, jobs: Jobs, pool: str, volume: str) -> list[tuple[str, str]]:
    """The volumes, in all active pools, that are based directly on this one."""
    found = []
    for other in sorted(pools.active, key=lambda other: other.name):
        for candidate in (await other.backend.volumes()).values():
            backing = candidate.meta.backing
            if backing is not None and (backing.pool, backing.volume) == (pool, volume):
                found.append((other.name, candidate.name))
    for job in jobs:  # and those that are being made
        made = job.task.meta.backing if job.alive and job.task.undo and job.task.meta is not None else None
        if made is not None and (made.pool, made.volume) == (pool, volume):
            found.append((job.task.pool, job.task.volume))
    return found
