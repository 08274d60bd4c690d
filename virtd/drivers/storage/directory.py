# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pool that is a directory: its volumes are regular files, and `.virtd` holds their records.

    POOL/NAME              a volume, owned by root and readable for the guests' group (0640)
    POOL/.virtd/NAME.json  its record: format and backing volume
    POOL/.virtd/new/JOB    a volume that is being made, owned by the guests' user while qemu-img writes it

A volume is linked to its name once it is complete and its record is written.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ... import errors
from ...model import pool as model
from .. import qcow2
from .aside import Aside
from .entries import Entries
from .place import Place
from .unfinished import Unfinished, path_of, reopened

if TYPE_CHECKING:
    from collections.abc import Collection

    from .backend import Capacity, Meta, Volume
    from .mountpoint import MountPoint


class Directory:
    """See Backend. `uid` and `gid`: the guests' user and group; `mountpoint`: of the file system that it
    must be on."""

    files = True

    def __init__(self, pool: model.Pool, uid: int, gid: int, mountpoint: MountPoint | None = None) -> None:
        self.pool = pool
        self._mountpoint = mountpoint
        self._uid = uid
        self._place = Place(pool, uid, gid)
        self._entries = Entries(self._place)
        self._new = Unfinished(self._place, self._entries)
        self._aside = Aside(f"Pool {pool.name} ({pool.path})")

    # The pool

    @property
    def mount(self) -> str:
        return ""

    async def build(self) -> bool:
        if self._mountpoint is not None:
            await self._mountpoint.require()
        return await self._aside(self._place.build)

    async def start(self) -> None:
        if self._mountpoint is not None:
            await self._mountpoint.require()
        await self._aside(self._place.prepare)
        if self._mountpoint is not None:
            self._mountpoint.remember()

    async def stop(self) -> None:
        """Nothing to do: the directory stays."""

    async def lost(self) -> str:
        if self._mountpoint is not None and (missing := self._mountpoint.missing()):
            return missing
        try:
            await self._aside(self._place.look)
        except errors.VirtdError as exc:
            return exc.message
        return ""

    async def capacity(self) -> Capacity:
        return await self._aside(self._place.capacity)

    # Its volumes

    async def volumes(self) -> dict[str, Volume]:
        return await self._aside(self._entries.all)

    async def volume(self, name: str) -> Volume:
        model.check_volume(name)
        return await self._aside(lambda: self._entries.one(name))

    async def free(self, name: str) -> None:
        model.check_volume(name)
        await self._aside(lambda: self._entries.require_free(name))

    async def header(self, volume: Volume) -> qcow2.Header:
        """The header of a qcow2 volume with its snapshots. Raises InvalidState."""

        def work() -> qcow2.Header:
            with reopened(volume.path) as fd:
                return qcow2.read(fd, volume.name, snapshots=True)

        return await self._aside(work)

    # Making one

    async def begin(self, job: str, name: str, size: int | None, *, allocate: bool = False) -> str:
        model.check_volume(name)
        limit = None if allocate else 60
        await self._aside(lambda: self._new.begin(job, size, allocate=allocate), limit=limit)
        return self.begun(job, name)

    def begun(self, job: str, _name: str) -> str:
        return f"{self.pool.path}/{path_of(job)}"

    async def reflink(self, source: Volume, job: str) -> bool:
        return await self._aside(lambda: self._new.reflink(source.path, job), limit=600)

    async def commit(self, job: str, name: str, meta: Meta) -> None:
        model.check_volume(name)
        await self._aside(lambda: self._new.commit(job, name, meta), limit=None)

    async def discard(self, job: str, _name: str) -> None:
        await self._aside(lambda: self._new.discard(job), limit=None)

    async def stale(self, jobs: Collection[str]) -> list[str]:
        kept = frozenset(jobs)
        return await self._aside(lambda: self._new.stale(kept))

    async def sweep(self, jobs: Collection[str]) -> list[str]:
        kept = frozenset(jobs)
        return await self._aside(lambda: self._new.sweep(kept), limit=None)

    # Changing one

    async def grow(self, volume: Volume, size: int) -> None:
        await self._aside(lambda: self._entries.resize(volume.name, size), limit=60)

    async def describe(self, name: str, meta: Meta) -> None:
        await self._aside(lambda: self._entries.describe(name, meta))

    async def lend(self, volume: Volume) -> None:
        await self._aside(lambda: self._entries.own(volume.name, self._uid))

    async def take(self, name: str) -> None:
        await self._aside(lambda: self._entries.own(name, os.geteuid()))

    async def delete(self, volume: Volume) -> None:
        await self._aside(lambda: self._entries.delete(volume.name), limit=600)
