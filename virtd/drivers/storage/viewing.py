# SPDX-License-Identifier: LGPL-2.1-or-later
"""Listing and describing volumes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import msgspec

from ... import errors
from ...model.drives import Format
from ...replies import storage as replies
from . import chains
from .usage import key

if TYPE_CHECKING:
    from .backend import Volume
    from .pool import StoragePool
    from .usage import Users
    from .volumes import Volumes


class Viewing:
    """Everything here may take as long as the pool's backend does."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes
        self._pools = volumes.pools
        self._jobs = volumes.jobs

    async def listing(self, pool_name: str) -> list[replies.Volume]:
        pool = await self._volumes.pool(pool_name)
        found = await pool.usable.volumes()
        await pool.measure()
        users = self._volumes.usage.users()
        return [self._describe(pool, volume, users) for volume in found.values()]

    async def refresh(self, pool_name: str) -> replies.Refreshed:
        """Look at a pool again: measure it, and remove what was left unfinished in it."""
        pool = await self._volumes.pool(pool_name)
        removed = await pool.usable.sweep(self._jobs.unfinished())
        await pool.measure()
        return replies.Refreshed(name=pool.name, volumes=len(await pool.usable.volumes()), removed=removed)

    async def info(self, pool_name: str, name: str) -> replies.VolumeInfo:
        pool, volume = await self._volumes.find(pool_name, name)
        described = self._describe(pool, volume, self._volumes.usage.users())
        chain: list[replies.Link] = []
        trouble = ""
        try:
            chain = [
                replies.Link(
                    pool=link.pool.name,
                    volume=link.volume.name,
                    format=str(link.volume.meta.format),
                    path=link.volume.path,
                )
                for link in await chains.chain(self._pools, pool, volume)
            ][1:]
        except errors.VirtdError as exc:
            trouble = exc.message
        upper = await chains.dependents(self._pools, self._jobs, pool.name, volume.name)
        return replies.VolumeInfo(
            **msgspec.structs.asdict(described) | {"trouble": described.trouble or trouble},
            chain=chain,
            snapshots=len(await _snapshots(pool, volume)),
            backing_of=[key(*one) for one in upper],
        )

    async def snapshots(self, pool_name: str, name: str) -> list[replies.Snapshot]:
        return await _snapshots(*await self._volumes.find(pool_name, name))

    def _describe(self, pool: StoragePool, volume: Volume, users: Users) -> replies.Volume:
        backing = volume.meta.backing
        return replies.Volume(
            pool=pool.name,
            name=volume.name,
            path=volume.path,
            format=volume.meta.format.value if volume.meta.format is not None else None,
            capacity=volume.capacity,
            allocation=volume.allocation,
            backing=replies.Backing(pool=backing.pool, volume=backing.volume) if backing is not None else None,
            used_by=sorted({use.user for use in users.get(volume.identity, ())}),
            job=next((job.name for job in self._jobs.on(key(pool.name, volume.name))), None),
            trouble=volume.trouble,
        )


async def _snapshots(pool: StoragePool, volume: Volume) -> list[replies.Snapshot]:
    backend = pool.usable
    if volume.meta.format is not Format.QCOW2 or not backend.files:
        return []
    with contextlib.suppress(errors.InvalidState):
        header = await backend.header(volume)
        return [replies.Snapshot(**msgspec.structs.asdict(snapshot)) for snapshot in header.snapshots]
    return []
