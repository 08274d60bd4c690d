# SPDX-License-Identifier: LGPL-2.1-or-later
"""All pools: their definitions and records, and starting, stopping, examining and sweeping them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from ... import errors, files
from ...hints import do
from ...model import pool as model
from ...model.state import Activity
from ...objects.inventory import Inventory
from ...objects.protocol import Problem
from ...process import boot_id
from ...records import Records
from . import backends
from .jobs import Jobs
from .pool import LOST, Shared, StoragePool
from .task import DRIVER
from .usage import Usage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...children.child import Services
    from ...model.settings import Settings
    from ...objects.peers import Peers
    from ...objects.protocol import Publish
    from ...replies import storage as replies
    from .backend import Backend

log = logging.getLogger(__name__)


class Pools(Inventory[StoragePool, model.Pool]):
    """All pools, with the jobs that work in them and the users of their volumes."""

    name = DRIVER
    noun = "pool"
    taken_back = "A pool is taken back by starting it."
    states = Activity

    def __init__(self, services: Services, settings: Settings, publish: Publish, peers: Peers) -> None:
        super().__init__(services, Records(services.paths, DRIVER), publish)
        self._settings = settings
        boot = boot_id()
        self.jobs = Jobs(services, self.records, boot, self.find, self._jobs_changed, self._job_changed)
        self.usage = Usage(self.jobs, peers)
        self._shared = Shared(services.paths, self.records, self.published, boot, self._backend)

    @property
    def pools(self) -> dict[str, StoragePool]:
        return self.objects

    @property
    def active(self) -> list[StoragePool]:
        return [pool for pool in self.pools.values() if pool.active]

    def make(self, name: str) -> StoragePool:
        return StoragePool(self._shared, name)

    def _backend(self, pool: model.Pool) -> Backend:
        return backends.make(pool, self._services, self._settings, self.jobs.run_tool)

    def parse(self, text: str, source: str) -> model.Pool:
        return model.parse(text, source)

    def left_alone(self, name: str, problem: Problem) -> None:
        self.problems[f"record {name}"] = problem

    def describe(self, one: StoragePool) -> replies.Pool:
        return one.describe()

    def changed(self, pool: StoragePool) -> None:
        """Announce that its volumes have changed."""
        self.published("changed", pool)

    def _jobs_changed(self, name: str) -> None:
        if name in self.pools:
            self._publish("changed", name)

    def _job_changed(self, name: str) -> None:
        self._publish("job", name)

    # Definitions

    async def undefine(self, name: str) -> None:
        pool = self.find(name)
        async with pool.exclusive("undefine"):
            if pool.active:
                raise errors.InvalidState(
                    f"Cannot undefine pool {pool.name}: it is active",
                    hint="Stop it first: " + do("stop", "pool", pool.name) + ". Its volumes stay where they are.",
                )
            files.remove(pool.source)
            with contextlib.suppress(errors.HostError):  # harmless without a pool
                files.remove(self._services.paths.mountpoint(pool.name))
            self.forget(pool.name)

    def check_beside(self, definition: model.Pool, other: StoragePool, source: str) -> None:
        if other.definition is not None and other.definition.path == definition.path:
            raise errors.Exists(f"{source}: path: {definition.path} is pool {other.name} already")

    def put_in_force(self, one: StoragePool, definition: model.Pool, text: str) -> None:
        del definition
        one.save(data=one.data | {"definition": text})
        self.published("changed", one)

    # Looking at them

    async def recover(self) -> None:
        """Finish, or undo, the starts and stops that a crash interrupted."""
        for pool in [pool for pool in self.pools.values() if pool.in_doubt]:
            try:
                getattr(self.found, await pool.recover()).append(pool.name)
            except errors.VirtdError as exc:
                pool.problems["start"] = Problem(f"Pool {pool.name} is in doubt: {exc.message}", exc.hint)

    async def examine(self, pools: Iterable[StoragePool]) -> None:
        """Check whether these can still be used, and measure them."""
        await asyncio.gather(*(self._examine(pool) for pool in pools))

    async def _examine(self, pool: StoragePool) -> None:
        try:
            lost = await pool.backend.lost()
        except errors.VirtdError as exc:
            lost = exc.message
        pool.seen(lost)
        if not lost:
            await pool.measure()

    async def reload(self) -> None:
        """Look for what others may have undone (a mount): that is a problem, which starting the pool solves."""
        await self.examine(self.active)

    async def sweep(self, pool: StoragePool) -> None:
        """Remove unfinished volumes that no job fills any more."""
        if LOST in pool.problems:
            return
        try:
            removed = await pool.backend.sweep(self.jobs.unfinished())
        except errors.VirtdError as exc:
            log.warning("Pool %s can't be swept: %s", pool.name, exc)
            return
        if removed:
            log.info("Pool %s: removed what was unfinished: %s", pool.name, ", ".join(removed))

    # Starting and stopping

    def to_autostart(self) -> list[StoragePool]:
        """Includes active pools that have lost their mounts."""

        def wanted(pool: StoragePool) -> bool:
            return bool(pool.definition and pool.definition.autostart) and (not pool.active or LOST in pool.problems)

        return [pool for pool in self.pools.values() if wanted(pool)]

    async def start(self, name: str, by: str) -> bool:
        pool = self.find(name)
        await self.certain()
        changed = await pool.start(by)
        if changed:
            await self.sweep(pool)
        return changed

    async def stop(self, name: str, by: str) -> bool:
        pool = self.find(name)
        await self.certain()
        if pool.active:
            self.usage.require_idle(pool)
        changed = await pool.stop(by)
        if changed and pool.definition is None:
            self.forget(pool.name)
        return changed

    async def build(self, name: str) -> bool:
        """Make the directory of a directory pool; False if it exists."""
        pool = self.find(name)
        async with pool.exclusive("build"):
            return await pool.backend.build()
