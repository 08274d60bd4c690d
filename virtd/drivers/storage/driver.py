# SPDX-License-Identifier: LGPL-2.1-or-later
"""The storage driver: pools, the jobs that work in them, and what can be done to volumes."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING

from ...model import pool as model
from ...objects.peers import Disk
from . import chains
from .pools import Pools
from .prerequisites import Account
from .usage import key
from .volumes import Volumes

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...children.child import Services
    from ...model.settings import Settings
    from ...objects.peers import Peers
    from ...objects.protocol import Difference, Problem, Publish
    from ...records import Record
    from .changing import Changing
    from .making import Making
    from .streams import Streams
    from .viewing import Viewing


def make(services: Services, settings: Settings, publish: Publish, peers: Peers) -> Driver:
    return Driver(services, settings, publish, peers)


class Driver(Pools):
    """See objects/protocol.py. `peers` know which images guests have open."""

    def __init__(self, services: Services, settings: Settings, publish: Publish, peers: Peers) -> None:
        super().__init__(services, settings, publish, peers)
        account = Account(settings.qemu.shared_user, settings.qemu.shared_group)
        self.volumes = Volumes(self, self.jobs, self.usage, account)

    # Operations on volumes, imported when first used: no start of the daemon needs them

    @functools.cached_property
    def viewing(self) -> Viewing:
        from .viewing import Viewing

        return Viewing(self.volumes)

    @functools.cached_property
    def making(self) -> Making:
        from .making import Making

        return Making(self.volumes)

    @functools.cached_property
    def changing(self) -> Changing:
        from .changing import Changing

        return Changing(self.volumes)

    @functools.cached_property
    def streams(self) -> Streams:
        from .streams import Streams

        return Streams(self.volumes)

    async def compare(self, *, repair: bool) -> list[Difference]:
        from . import fsck

        return await fsck.compare(self, repair=repair)

    # Start-up

    def restore(self) -> None:
        self._reconciled.clear()
        self.restore_records()
        self.load_definitions()
        self.recall()

    def take_back(self, name: str, record: Record) -> None:
        if name.startswith(model.JOB):
            self.jobs.take_back(record)
        else:
            super().take_back(name, record)

    async def reconcile(self) -> None:
        try:
            await self._reconcile()
        finally:
            self._reconciled.set()

    async def _reconcile(self) -> None:
        await self._services.units()
        jobs = [job for job in self.jobs if not job.over.is_set()]  # before any tools are run, which are jobs as well
        await self.recover()
        pools = self.active
        await self.examine(pools)
        for job in jobs:
            if result := await self.jobs.reconcile(job):
                getattr(self.found, result).append(job.name)
        await asyncio.gather(*(self.sweep(pool) for pool in pools))
        self.found.rolled_back += await self.jobs.clear_strangers()

    def grown(self, key: str) -> None:
        """Nothing to do: nobody watches a job's output."""

    def troubles(self) -> list[tuple[str, Problem]]:
        return super().troubles() + [(job.name, problem) for job in self.jobs for problem in job.problems.values()]

    async def close(self) -> None:
        await asyncio.gather(self.jobs.close(), *(pool.end_tasks() for pool in self.pools.values()))

    # For other drivers: see peers.Volumes

    async def for_guest(self, pool_name: str, name: str, *, writes: bool, by: str) -> Disk:
        await self.certain()
        if not self.find(pool_name).active:
            await self.start(pool_name, by)
        pool, volume = await self.volumes.find(pool_name, name)
        links = await chains.chain(self, pool, volume)
        chains.require_format(links)
        if writes:
            await self.volumes.require_no_dependents("write to", pool.name, name)
        self.require_for_guest(pool.name, name, writes=writes)
        self.usage.require_unmounted(volume)  # domains compare their disks themselves
        for link in links[1:]:
            self.usage.require_no_job("use", link.key, writes=False)
        after = pool.backend.mount
        return Disk(volume.path, links[0].format, tuple(link.pair for link in links[1:]), after)

    async def require_unused(self, pool_name: str, name: str) -> Callable[[], None]:
        pool, volume = await self.volumes.find(pool_name, name)

        def again() -> None:
            self.usage.require("use", pool.name, volume, writes=True)

        again()
        return again

    def require_for_guest(self, pool: str, name: str, *, writes: bool) -> None:
        self.usage.require_no_job("use", key(pool, name), writes=writes)
