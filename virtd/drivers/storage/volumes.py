# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can be asked about volumes and done to them.

Quick things are done at once; what takes its time is a job, whose name the caller gets. A call that is repeated with
the same `token` finds what the first one has begun. Nothing is done to a volume that somebody uses.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import msgspec

from ... import errors
from ...model import pool as model
from ...model.domain import Format
from ...units import mount_unit
from . import images
from .changing import Changing
from .directory import Directory
from .making import Making
from .usage import CONTAINER, called, key

if TYPE_CHECKING:
    from .backend import Volume
    from .job import Job
    from .pool import StoragePool
    from .usage import Users


class Volumes(Making, Changing):
    """The operations on volumes, for the driver that they belong to."""

    async def listing(self, pool_name: str) -> list[dict[str, Any]]:
        pool = self._driver.find(pool_name)
        await self._driver.certain()
        found = await pool.usable.volumes()
        await pool.measure()
        users = self.users()
        return [self._describe(pool, volume, users) for volume in found.values()]

    async def refresh(self, pool_name: str) -> dict[str, Any]:
        """Look at a pool again: how full it is, and what was left unfinished in it."""
        pool = self._driver.find(pool_name)
        await self._driver.certain()
        removed = await pool.usable.sweep(self._driver.unfinished())
        await pool.measure()
        return {"name": pool.name, "volumes": len(await pool.usable.volumes()), "removed": removed}

    async def info(self, pool_name: str, name: str) -> dict[str, Any]:
        pool, volume = await self.find(pool_name, name)
        described = self._describe(pool, volume, self.users())
        chain: list[dict[str, Any]] = []
        trouble = ""
        try:
            chain = [
                {
                    "pool": link.pool.name,
                    "volume": link.volume.name,
                    "format": str(link.volume.meta.format),
                    "path": link.volume.path,
                }
                for link in await images.chain(self._driver, pool, volume)
            ][1:]
        except errors.VirtdError as exc:
            trouble = exc.message
        return described | {
            "chain": chain,
            "trouble": described["trouble"] or trouble,
            "snapshots": len(await self._snapshots(pool, volume)),
            "backing_of": [f"{p}/{v}" for p, v in await images.dependents(self._driver, pool.name, volume.name)],
        }

    async def snapshots(self, pool_name: str, name: str) -> list[dict[str, Any]]:
        pool, volume = await self.find(pool_name, name)
        return await self._snapshots(pool, volume)

    async def _snapshots(self, pool: StoragePool, volume: Volume) -> list[dict[str, Any]]:
        backend = pool.usable
        if volume.meta.format is not Format.QCOW2 or not isinstance(backend, Directory):
            return []
        with contextlib.suppress(errors.InvalidState):
            header = await backend.header(volume)
            return [msgspec.to_builtins(snapshot) for snapshot in header.snapshots]
        return []

    def _describe(self, pool: StoragePool, volume: Volume, users: Users) -> dict[str, Any]:
        user = users.get(volume.identity)
        backing = volume.meta.backing
        return {
            "pool": pool.name,
            "name": volume.name,
            "path": volume.path,
            "format": volume.meta.format.value if volume.meta.format is not None else None,
            "capacity": volume.capacity,
            "allocation": volume.allocation,
            "backing": {"pool": backing.pool, "volume": backing.volume} if backing is not None else None,
            "used_by": sorted({domain for domain, _writes in user}) if user else [],
            "job": next((job.name for job in self._jobs_on(key(pool.name, volume.name))), None),
            "trouble": volume.trouble,
        }

    # Guests

    async def for_guest(
        self, pool_name: str, name: str, *, writes: bool
    ) -> tuple[str, Format, tuple[tuple[str, Format], ...], str]:
        """See Driver.for_guest."""
        pool, volume = await self.find(pool_name, name)
        links = await images.chain(self._driver, pool, volume)
        images.require_format(links)
        if writes:
            await self._require_no_dependents("write to", pool.name, name)
        self.require_no_job("use", key(pool.name, name), writes=writes)
        for user, _ in self.users().get(volume.identity, ()):
            if user.startswith(CONTAINER):  # which has it mounted; domains look at each other by themselves
                raise errors.Busy(
                    f"Cannot use {name}: it is the root of {called(user)}", hint=f"Stop {called(user)} first."
                )
        for link in links[1:]:
            self.require_no_job("use", link.key, writes=False)
        after = mount_unit(pool.present.path) if pool.present.type is model.Type.FILESYSTEM else ""
        return volume.path, links[0].format, tuple(link.pair for link in links[1:]), after

    # Jobs

    async def cancel(self, job_name: str, *, by: str) -> bool:
        return await self._driver.find_job(job_name).cancel(by)

    async def committed(self, job: Job) -> bool:
        """Whether what the job makes is there already: a daemon may have been killed before it said so on record."""
        with contextlib.suppress(errors.VirtdError):
            backend = self._driver.find(job.task.pool).usable
            return (await backend.volume(job.task.volume)).meta.job == job.name
        return False

    async def concluded(self, job: Job, *, ok: bool) -> None:
        """What the end of a job means. Safe to repeat; raises VirtdError."""
        task = job.task
        if task.verb == "tool":
            return
        pool = self._driver.find(task.pool)
        backend = pool.usable
        if task.undo:
            if ok:
                assert task.meta is not None
                await backend.commit(job.name, task.volume, msgspec.structs.replace(task.meta, job=job.name))
            else:
                await backend.discard(job.name, task.volume)
        else:
            if ok and task.meta is not None:
                await backend.describe(task.volume, task.meta)
            if ok or task.verb != "adopt":
                await backend.take(task.volume)
        await pool.measure()
