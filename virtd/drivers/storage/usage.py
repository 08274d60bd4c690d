# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who uses which volume: running objects that have it open, jobs, and calls in progress."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from ... import errors
from ...hints import do
from ...objects.protocol import Using
from .task import TOOL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...hints import Hint
    from ...objects.peers import Peers
    from ...objects.protocol import Use
    from .backend import Volume
    from .jobs import Jobs
    from .pool import StoragePool

Users = dict[tuple[int, int], list["Use"]]


def key(pool: str, volume: str) -> str:
    """How tasks and records name a volume."""
    return f"{pool}/{volume}"


class Usage:
    """Nothing here waits for anything."""

    def __init__(self, jobs: Jobs, peers: Peers) -> None:
        self._jobs = jobs
        self._peers = peers
        self._taken: dict[str, str] = {}  # "POOL/NAME" -> what a call is doing to it right now

    def _images(self) -> Iterator[Use]:
        for driver in self._peers:  # a driver that isn't loaded has nothing that runs
            if isinstance(driver, Using):
                yield from driver.images()

    def users(self) -> Users:
        """Running objects, by device and inode of the files that they have open."""
        found: Users = {}
        for use in self._images():
            found.setdefault(use.identity, []).append(use)
        return found

    def require_idle(self, pool: StoragePool) -> None:
        """Raise Busy when anybody uses a volume of the pool."""
        path = f"{pool.present.path}/"
        for use in self._images():
            if use.path.startswith(path):
                raise errors.Busy(
                    f"Cannot stop pool {pool.name}: {use.called} uses {use.path}", hint=f"Stop {use.called} first."
                )
        for job in self._jobs:
            task = job.task
            mine = (*task.reads, *task.writes, key(task.pool, task.volume))
            if job.alive and task.verb != TOOL and any(item.startswith(f"{pool.name}/") for item in mine):
                raise errors.Busy(
                    f"Cannot stop pool {pool.name}: {job.name} ({task.verb} of {task.volume}) is under way",
                    hint=_wait_for(job.name),
                )
        for item, what in self._taken.items():
            if item.startswith(f"{pool.name}/"):
                raise errors.Busy(f"Cannot stop pool {pool.name}: {item} is busy ({what})")

    def require(self, doing: str, pool: str, volume: Volume, *, writes: bool) -> None:
        """Raise Busy when the volume can't be read (and, if `writes`, written) now."""
        for use in self.users().get(volume.identity, ()):
            if writes or use.writes:
                how = "writes to it" if use.writes else "reads it"
                raise errors.Busy(
                    f"Cannot {doing} {volume.name}: {use.called} {how}", hint=f"Stop {use.called} first."
                )
        self.require_no_job(doing, key(pool, volume.name), writes=writes)

    def require_unmounted(self, volume: Volume) -> None:
        """Raise Busy when a file system on it is mounted."""
        for use in self.users().get(volume.identity, ()):
            if use.mounted:
                raise errors.Busy(
                    f"Cannot use {volume.name}: {use.called} has it mounted", hint=f"Stop {use.called} first."
                )

    def require_not_written(self, doing: str, file: str, identity: tuple[int, int]) -> None:
        """Raise Busy when a running object writes to a file, in a pool or anywhere else."""
        for use in self.users().get(identity, ()):
            if use.writes:
                raise errors.Busy(
                    f"Cannot {doing} {file}: {use.called} writes to it", hint=f"Stop {use.called} first."
                )

    def require_no_job(self, doing: str, item: str, *, writes: bool) -> None:
        """Raise Busy while a job or a call works on the volume `item`."""
        for job in self._jobs.on(item, writing=not writes):
            raise errors.Busy(
                f"Cannot {doing} {item.partition('/')[2]}: {job.name} ({job.task.verb}) is under way",
                hint=_wait_for(job.name),
            )
        if what := self._taken.get(item):
            raise errors.Busy(f"Cannot {doing} {item.partition('/')[2]}: it is busy ({what})")

    @contextlib.contextmanager
    def taken(self, pool: str, name: str, what: str) -> Iterator[None]:
        """Keep others from changing a volume while one call does. Raises Busy."""
        item = key(pool, name)
        self.require_no_job(what, item, writes=True)
        self._taken[item] = what
        try:
            yield
        finally:
            del self._taken[item]


def _wait_for(job: str) -> Hint:
    return "Wait for it, or: " + do("cancel", "job", job) + "."
