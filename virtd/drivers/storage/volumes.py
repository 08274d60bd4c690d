# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all operations on volumes have in common.

What is quick is done at once; what takes long becomes a job, whose name the caller gets. A call that is repeated with
the same `token` finds what the first one has started. Nothing is done to a volume that is in use.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ... import errors
from ...model import pool as model
from ...model import size as sizes
from ...model.drives import Format
from . import chains
from .usage import key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .backend import Volume
    from .jobs import Jobs
    from .pool import StoragePool
    from .pools import Pools
    from .prerequisites import Account
    from .task import Program, Task
    from .usage import Usage


class Answer(NamedTuple):
    """What became of a call: `job` is the one that goes on, or "" when everything is done."""

    pool: str
    volume: str
    job: str = ""


class Volumes:
    """`account`: the user that jobs run as."""

    def __init__(self, pools: Pools, jobs: Jobs, usage: Usage, account: Account) -> None:
        self.pools = pools
        self.jobs = jobs
        self.usage = usage
        self.account = account

    async def pool(self, name: str) -> StoragePool:
        """Raises NotFound."""
        pool = self.pools.find(name)
        await self.pools.certain()
        return pool

    async def find(self, pool_name: str, name: str) -> tuple[StoragePool, Volume]:
        """Raises NotFound."""
        pool = await self.pool(pool_name)
        return pool, await pool.usable.volume(name)

    async def require_no_dependents(self, doing: str, pool: str, volume: str) -> None:
        """Raise Busy when other volumes stand on it."""
        if found := await chains.dependents(self.pools, self.jobs, pool, volume):
            names = ", ".join(key(*one) for one in found)
            raise errors.Busy(
                f"Cannot {doing} {volume}: it is the backing store of {names}",
                hint="They would be destroyed with it. Delete them first.",
            )

    async def begin(self, pool_name: str, name: str, token: str) -> tuple[StoragePool, Answer | None]:
        """The pool for a new volume, and the answer if this very call was made before."""
        pool = await self.pool(pool_name)
        model.check_volume(name, pool.present.type)
        if token:
            if (known := self.repeated(pool, name, token)) is not None:
                return pool, known
            with contextlib.suppress(errors.NotFound, errors.InvalidState):
                if (await pool.usable.volume(name)).meta.token == token:
                    return pool, Answer(pool.name, name)
        return pool, None

    def repeated(self, pool: StoragePool, name: str, token: str) -> Answer | None:
        """The answer if this very call was made before and has started a job."""
        job = self.jobs.of_call(token)
        return Answer(pool.name, name, job.name) if job is not None else None

    async def make(
        self,
        pool: StoragePool,
        task: Task,
        size: int | None,
        program: Callable[[str], Program] | None,
        *,
        shortcut: Callable[[str], Awaitable[bool]] | None = None,
    ) -> Answer:
        """Begin a volume and have `program` fill it in a job.

        Without a program, or if `shortcut` returns True, it is committed at once.
        """
        backend = pool.usable
        with self.usage.taken(pool.name, task.volume, task.verb):
            await backend.free(task.volume)
            with self.jobs.reserve() as name:
                path = await backend.begin(name, task.volume, size)
                try:
                    if program is None or (shortcut is not None and await shortcut(name)):
                        await backend.commit(name, task.volume, task.made(name))
                        await pool.measure()
                        self.pools.changed(pool)
                        return Answer(pool.name, task.volume)
                    # From here on the job's record keeps the name taken.
                    task = msgspec.structs.replace(task, writes=(*task.writes, key(pool.name, task.volume)))
                    await self.jobs.run(self.jobs.new(task, name), program(path))
                except BaseException:
                    with contextlib.suppress(errors.VirtdError):
                        await backend.discard(name, task.volume)
                    raise
        return Answer(pool.name, task.volume, name)

    async def run(self, pool: StoragePool, task: Task, program: Program) -> Answer:
        """Run a job on an existing volume."""
        with self.usage.taken(pool.name, task.volume, task.verb):
            job = self.jobs.new(task)
            await self.jobs.run(job, program)
        return Answer(pool.name, task.volume, job.name)

    async def lend_and_run(self, pool: StoragePool, volume: Volume, task: Task, program: Program) -> Answer:
        """The same, for a job that writes to the volume."""
        backend = pool.usable
        await backend.lend(volume)
        try:
            return await self.run(pool, task, program)
        except BaseException:
            with contextlib.suppress(errors.VirtdError):
                await backend.take(volume.name)
            raise


def check_format(pool: StoragePool, wanted: Format) -> None:
    """Raise InvalidDefinition for a format that the pool's volumes can't have."""
    if not pool.backend.files and wanted is not Format.RAW:
        raise errors.InvalidDefinition(
            "volume", "format", f'expected "raw" in pool {pool.name}, whose volumes are logical volumes'
        )


async def check_room(pool: StoragePool, size: int, *, everything: bool) -> None:
    """Raise InvalidDefinition for a size beyond the pool's own; HostError if `everything` has no room now."""
    capacity = await pool.usable.capacity()
    if size > capacity.capacity:
        most = sizes.show(capacity.capacity >> 20 << 20)
        raise errors.InvalidDefinition(
            "volume", "size", f"expected at most what pool {pool.name} has, {most}, got {sizes.show(size)}"
        )
    if everything and size > capacity.available:
        raise errors.HostError(
            f"Pool {pool.name} has {sizes.show(capacity.available)} available, not {sizes.show(size)}",
            hint="Free some space, or leave the preallocation out.",
        )
