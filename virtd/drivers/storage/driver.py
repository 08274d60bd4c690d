# SPDX-License-Identifier: LGPL-2.1-or-later
"""The storage driver: all pools, from their definitions and records, and the jobs that work in them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from typing import TYPE_CHECKING, Any

from ... import errors, files
from ...child import Child
from ...model import pool as model
from ...process import boot_id
from ...records import Records
from ...units import object_name
from ..collection import Collection
from ..protocol import Problem
from . import host
from .directory import Directory
from .job import DRIVER, KEPT, Job, Program, Shared, Task, logged, remove_logs
from .job import State as JobState
from .pool import Shared as PoolShared
from .pool import State, StoragePool
from .programs import Account
from .volumes import Volumes

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...child import Services
    from ...model.domain import Format
    from ...model.settings import Settings
    from ...records import Record
    from ..protocol import Difference, Peers, Publish
    from .backend import Backend

log = logging.getLogger(__name__)


def make(services: Services, settings: Settings, publish: Publish, peers: Peers) -> Driver:
    return Driver(services, settings, publish, peers)


class Driver(Collection[StoragePool, model.Pool]):
    """See drivers.protocol. `peers("qemu")` knows which images guests have open."""

    name = DRIVER
    noun = "pool"
    virtctl = "virtctl pool"
    taken_back = "A pool is taken back by starting it."
    states = State

    def __init__(self, services: Services, settings: Settings, publish: Publish, peers: Peers) -> None:
        super().__init__(services, Records(services.paths, DRIVER), publish)
        self._settings = settings
        self.peers = peers
        self.jobs: dict[str, Job] = {}
        self._boot_id = boot_id()
        self._job_parts = Shared(services, self.records, self._boot_id, self._concluded, self._job_published)
        self.volumes = Volumes(self)

    async def compare(self, *, repair: bool) -> list[Difference]:
        from . import fsck  # no start of the daemon needs it

        return await fsck.compare(self, repair=repair)

    @property
    def pools(self) -> dict[str, StoragePool]:
        return self.objects

    def make(self, name: str) -> StoragePool:
        return StoragePool(
            PoolShared(self._services.paths, self.records, self.published, self._boot_id, self._backend), name
        )

    def parse(self, text: str, source: str) -> model.Pool:
        return model.parse(text, source)

    # Start-up

    def restore(self) -> None:
        self._reconciled.clear()
        self.restore_records()
        self.load_definitions()

    def take_back(self, name: str, record: Record) -> None:
        if name.startswith(model.JOB):
            self.jobs[name] = Job.of(self._job_parts, record)
        else:
            super().take_back(name, record)

    def left_alone(self, name: str, problem: Problem) -> None:
        self.problems[f"record {name}"] = problem

    async def reconcile(self) -> None:
        try:
            await self._reconcile()
        finally:
            self._reconciled.set()

    async def _reconcile(self) -> None:
        units = await self._services.units()
        jobs = [job for job in self.jobs.values() if not job.over.is_set()]
        for pool in [pool for pool in self.pools.values() if pool.in_doubt]:
            try:
                getattr(self.found, await pool.settle()).append(pool.name)
            except errors.VirtdError as exc:
                pool.problems["start"] = Problem(f"Pool {pool.name} is in doubt: {exc.message}", exc.hint)
        pools = [pool for pool in self.pools.values() if pool.active]
        await asyncio.gather(*(self._reconcile_pool(pool) for pool in pools))
        for job in jobs:
            try:
                result = await job.reconcile()
                if job.state is JobState.WAITING and await self.volumes.committed(job):
                    await job.conclude(ok=True)  # its client had come to the end, and was only not told so
                    result = "ended"
            except Exception as exc:
                log.exception("%s can't be reconciled", job.name)
                job.problem = f"{job.name} can't be reconciled: {exc}"
                job.spawn(self._again(job))
                continue
            if result:
                getattr(self.found, result).append(job.name)
        await asyncio.gather(*(self._sweep(pool) for pool in pools))
        # What no record tells of was cut off before it had one, or its record was lost: a job's result is worth
        # less than a leftover's harm.
        known = {job.name for job in self.jobs.values() if not job.over.is_set()}
        present = {
            name
            for unit in await units.list(f"virtd-{DRIVER}-job-*.service")
            if (name := object_name(DRIVER, unit.name))
        }
        slots = {slot.split("/")[1] for slot in self._services.store.names() if slot.startswith(f"{DRIVER}/")}
        for name in sorted((present | slots) - known):
            with contextlib.suppress(errors.VirtdError):
                await units.stop(f"virtd-{DRIVER}-{name}.service")
                await units.collect(f"virtd-{DRIVER}-{name}.service")
            await Child(self._services, DRIVER, name).release()
            self.found.rolled_back.append(name)
        for name in logged(self._services.paths) - known:
            remove_logs(self._services.paths, name)

    async def _again(self, job: Job) -> None:
        """A file system or a bus that didn't answer at the daemon's start may do so later."""
        while not job.over.is_set():
            await asyncio.sleep(5)
            with contextlib.suppress(errors.VirtdError):
                await job.reconcile()
                if job.alive:
                    return
        job.problem = ""

    async def _reconcile_pool(self, pool: StoragePool) -> None:
        try:
            lost = await pool.backend.lost()
        except errors.VirtdError as exc:
            lost = exc.message
        if lost:
            pool.problems["lost"] = Problem(
                f"Pool {pool.name} was active and can't be used: {lost}",
                f"Once that is mended: virtctl pool start {pool.name}.",
            )
            return
        await pool.measure()

    async def _sweep(self, pool: StoragePool) -> None:
        if "lost" in pool.problems:
            return
        try:
            removed = await pool.backend.sweep(self.unfinished())
        except errors.VirtdError as exc:
            log.warning("Pool %s can't be swept: %s", pool.name, exc)
            return
        if removed:
            log.info("Pool %s: removed what was unfinished: %s", pool.name, ", ".join(removed))

    def unfinished(self) -> set[str]:
        """Jobs whose begun volumes must stay."""
        return {job.name for job in self.jobs.values() if not job.over.is_set()} | self.volumes.at_work

    def to_autostart(self) -> list[StoragePool]:
        """Also what was active and has lost its mount."""

        def wanted(pool: StoragePool) -> bool:
            return bool(pool.definition and pool.definition.autostart) and (
                not pool.active or "lost" in pool.problems
            )

        return [pool for pool in self.pools.values() if wanted(pool)]

    def grown(self, key: str) -> None:
        """Nobody watches a job's output."""

    async def reload(self) -> None:
        """What others may have undone (a mount) is a problem, and starting the pool mends it."""
        await asyncio.gather(*(self._look_again(pool) for pool in self.pools.values() if pool.active))

    async def _look_again(self, pool: StoragePool) -> None:
        pool.problems.pop("lost", None)
        await self._reconcile_pool(pool)

    async def close(self) -> None:
        await asyncio.gather(
            *(job.close() for job in self.jobs.values()), *(pool.end_tasks() for pool in self.pools.values())
        )

    # Definitions

    async def undefine(self, name: str) -> None:
        pool = self.find(name)
        async with pool.exclusive("undefine"):
            if pool.active:
                raise errors.InvalidState(
                    f"Cannot undefine pool {pool.name}: it is active",
                    hint=f"Stop it first: virtctl pool stop {pool.name}. Its volumes stay where they are.",
                )
            files.remove(pool.source)
            with contextlib.suppress(errors.HostError):  # one without a pool means nothing
                files.remove(self._services.paths.mountpoint(pool.name))
            self.forget(pool.name)

    def check_beside(self, definition: model.Pool, other: StoragePool, source: str) -> None:
        if other.definition is not None and other.definition.path == definition.path:
            raise errors.Exists(f"{source}: path: {definition.path} is pool {other.name} already")

    def put_in_force(self, one: StoragePool, definition: model.Pool, text: str) -> None:
        del definition
        one.save(data={"definition": text})
        self.published("changed", one)

    def _backend(self, pool: model.Pool) -> Backend:
        return host.backend(pool, self._services, self._settings, self.run_tool)

    # Finding and describing

    def find_job(self, name: str) -> Job:
        """Raises NotFound."""
        if (job := self.jobs.get(name)) is not None:
            return job
        raise errors.NotFound(f"There is no job {name}", hint="virtctl volume jobs shows all.")

    def troubles(self) -> list[tuple[str, Problem]]:
        return super().troubles() + [(job.name, Problem(job.problem)) for job in self.jobs.values() if job.problem]

    def describe(self, one: StoragePool) -> dict[str, Any]:
        return one.describe()

    def changed(self, pool: StoragePool) -> None:
        """Its volumes have changed."""
        self.published("changed", pool)

    @property
    def account(self) -> Account:
        """Whom jobs run as."""
        return Account(self._settings.qemu.shared_user, self._settings.qemu.shared_group)

    # Starting and stopping

    async def start(self, name: str, by: str) -> bool:
        pool = self.find(name)
        await self.certain()
        changed = await pool.start(by)
        if changed:
            await self._sweep(pool)
        return changed

    async def stop(self, name: str, by: str) -> bool:
        pool = self.find(name)
        await self.certain()
        if pool.active:
            self.volumes.require_idle(pool)
        changed = await pool.stop(by)
        if changed and pool.definition is None:
            self.forget(pool.name)
        return changed

    async def build(self, name: str) -> bool:
        """Make the directory of a directory pool; False if it is there."""
        pool = self.find(name)
        backend = pool.backend
        if not isinstance(backend, Directory) or pool.present.type is not model.Type.DIRECTORY:
            raise errors.InvalidState(
                f"Pool {pool.name} is a {pool.present.type} pool: there is no directory to make",
                hint="A file system is made with mkfs, a volume group with vgcreate.",
            )
        async with pool.exclusive("build"):
            return await backend.build()

    # Guests

    async def for_guest(
        self, pool_name: str, name: str, *, writes: bool, by: str
    ) -> tuple[str, Format, tuple[tuple[str, Format], ...], str]:
        """A volume that a guest is to have, its pool started if need be.

        Its path and format, what it stands on (the nearest first), and the unit of the mount that it is on, or "".
        Raises NotFound, or why it can't be had.
        """
        await self.certain()
        if not self.find(pool_name).active:
            await self.start(pool_name, by)
        return await self.volumes.for_guest(pool_name, name, writes=writes)

    async def require_unused(self, pool_name: str, name: str) -> Callable[[], None]:
        """Raise Busy when anybody uses it, reading or writing; what asks again, without waiting for anything."""
        pool, volume = await self.volumes.find(pool_name, name)

        def again() -> None:
            self.volumes.require("use", pool.name, volume, writes=True)

        again()
        return again

    def require_for_guest(self, pool: str, name: str, *, writes: bool) -> None:
        """Raise Busy while a job works on it."""
        self.volumes.require_no_job("use", f"{pool}/{name}", writes=writes)

    # Jobs

    def job_listing(self) -> list[dict[str, Any]]:
        """Those under way, then the verdicts that are kept, each oldest first."""
        shown = [job for job in self.jobs.values() if job.task.verb != "tool"]
        shown.sort(key=lambda job: (not job.alive, job.record.since if job.record is not None else ""))
        return [job.describe() for job in shown]

    def new_job(self, task: Task, name: str = "") -> Job:
        job = Job(self._job_parts, name or self.job_name(), task)
        self.jobs[job.name] = job
        return job

    @staticmethod
    def job_name() -> str:
        return f"{model.JOB}{secrets.token_hex(4)}"

    def forget_job(self, job: Job) -> None:
        """One that came to nothing before it began."""
        self.jobs.pop(job.name, None)
        with contextlib.suppress(errors.HostError):
            self.records.remove(job.name)
        job.record = None  # nor is it to be written once more

    async def run_job(self, job: Job, program: Program) -> None:
        """Start it; one that can't be is forgotten again. Raises VirtdError."""
        try:
            await job.run(program)
        except BaseException:
            self.jobs.pop(job.name, None)
            raise

    async def run_tool(self, pool: str, program: Program) -> str:
        """Run a short program to its end: what it wrote to stdout. Raises HostError with its words."""
        job = self.new_job(Task(verb="tool", pool=pool, volume=program.argv[0], by="virtd"))
        await self.run_job(job, program)
        await job.over.wait()
        self.forget_job(job)
        if job.error:
            raise errors.HostError(f"{program.argv[0].rpartition('/')[2]}: {job.error}")
        return job.result

    async def _concluded(self, job: Job, ok: bool) -> None:  # noqa: FBT001
        await self.volumes.concluded(job, ok=ok)

    def _job_published(self, job: Job) -> None:
        if job.over.is_set():
            self._drop_old()
        if job.task.pool in self.pools and job.task.verb != "tool":
            self._publish("changed", job.task.pool)

    def _drop_old(self) -> None:
        """Forget the oldest verdicts."""
        over = sorted(
            (job for job in self.jobs.values() if job.over.is_set()),
            key=lambda job: job.record.since if job.record is not None else "",
        )
        for job in over[:-KEPT]:
            self.forget_job(job)
