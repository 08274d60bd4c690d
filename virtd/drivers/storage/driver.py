# SPDX-License-Identifier: LGPL-2.1-or-later
"""The storage driver: all pools, from their definitions and records, and the jobs that work in them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from typing import TYPE_CHECKING, Any

from ... import errors, files, journal
from ...messages import Message
from ...model import pool as model
from ...model.domain import canonical_uuid
from ...paths import names
from ...process import boot_id
from ...records import Records
from ...units import object_name
from .. import definitions
from ..protocol import Found, Problem
from . import host
from .directory import Directory
from .job import DRIVER, KEPT, Job, Program, Shared, Task
from .pool import State, StoragePool
from .programs import Account
from .volumes import Volumes

if TYPE_CHECKING:
    from ...child import Services
    from ...model.domain import Format
    from ...model.settings import Settings
    from ..protocol import Peers, Publish
    from .backend import Backend

log = logging.getLogger(__name__)

RECONCILE_LIMIT = 30.0  # seconds that an operation waits after the daemon's own start


def make(services: Services, settings: Settings, publish: Publish, peers: Peers) -> Driver:
    return Driver(services, settings, publish, peers)


class Driver:
    """See drivers.protocol. `peers("qemu")` knows which images guests have open."""

    name = DRIVER
    noun = "pool"

    def __init__(self, services: Services, settings: Settings, publish: Publish, peers: Peers) -> None:
        self._services = services
        self._settings = settings
        self._publish = publish
        self.peers = peers
        self.pools: dict[str, StoragePool] = {}
        self.jobs: dict[str, Job] = {}
        self.problems: dict[str, Problem] = {}
        self.found = Found()
        self._records = Records(services.paths, DRIVER)
        self._boot_id = boot_id()
        self._job_parts = Shared(services, self._records, self._boot_id, self._concluded, self._job_published)
        self.volumes = Volumes(self)
        self._reconciled = asyncio.Event()
        self._reconciled.set()

    # Start-up

    def restore(self) -> None:
        self._reconciled.clear()
        loaded = self._records.load()
        for bad in loaded.quarantined:
            text = f"The record of {bad.name} can't be read: {bad.reason}"
            self.problems[f"record {bad.name}"] = Problem(
                text, f"It was moved to {bad.moved_to}. A pool is taken back by starting it."
            )
            journal.send(
                text, message_id=Message.RECORD_QUARANTINED, level="error",
                VIRTD_DRIVER=DRIVER, VIRTD_NAME=bad.name, VIRTD_FILE=bad.moved_to,
            )  # fmt: skip
        for name, record in loaded.records.items():
            try:
                if name.startswith(model.JOB):
                    self.jobs[name] = Job.of(self._job_parts, record)
                else:
                    self._pool(name).record = record
            except Exception as exc:  # one bad record must not cost the others their daemon
                log.exception("%s can't be restored", name)
                self.problems[f"record {name}"] = Problem(f"{name} can't be restored: {exc}", "It was left alone.")
        self.load_definitions()

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
        known = {job.name for job in self.jobs.values()}
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
            self._services.store.drop_prefix(f"{DRIVER}/{name}/")
            self.found.rolled_back.append(name)

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

    async def certain(self) -> None:
        """Wait until reconcile() is through. Raises Busy."""
        if self._reconciled.is_set():
            return
        await self._services.units()  # which says so if it is D-Bus that is away
        try:
            async with asyncio.timeout(RECONCILE_LIMIT):
                await self._reconciled.wait()
        except TimeoutError:
            raise errors.Busy("virtd is still finding out what there is", hint="Try again in a moment.") from None

    async def autostart(self) -> None:
        async def one(pool: StoragePool) -> None:
            try:
                await self.start(pool.name, "autostart")
            except errors.VirtdError as exc:
                log.error("Cannot autostart pool %s: %s", pool.name, exc)
                pool.problems["start"] = Problem(f"Autostart failed: {exc.message}", exc.hint)

        wanted = [pool for pool in self.pools.values() if pool.definition is not None and pool.definition.autostart]
        await asyncio.gather(*(one(pool) for pool in wanted))

    def grown(self, key: str) -> None:
        """Nobody watches a job's output."""

    async def reload(self) -> None:
        """What others may have undone (a mount) is a problem, and starting the pool mends it."""
        await asyncio.gather(*(self._look_again(pool) for pool in self.pools.values() if pool.active))

    async def _look_again(self, pool: StoragePool) -> None:
        pool.problems.pop("lost", None)
        await self._reconcile_pool(pool)

    async def close(self) -> None:
        await asyncio.gather(*(job.close() for job in self.jobs.values()))

    # Definitions

    def load_definitions(self) -> list[str]:
        directory = f"{self._services.paths.etc}/{DRIVER}"
        changed = []
        self.problems = {key: problem for key, problem in self.problems.items() if not key.startswith("definition")}
        found = names(directory, ".toml")
        for name in [name for name, pool in self.pools.items() if pool.definition is not None and name not in found]:
            changed.append(name)
            self._forget(name)
        for name in found:
            path = f"{directory}/{name}.toml"
            try:
                text = definitions.read(path)
                known = self.pools.get(name)
                if known is not None and known.definition is not None and known.definition_text == text:
                    continue
                pool = model.parse(text, path)
                definitions.check_name(pool.name, name, path)
                self._check_unique(pool, path)
                if pool.uuid is None:
                    pool, text = self._with_uuid(pool, text)
                    definitions.write(path, text)
            except (errors.VirtdError, OSError, ValueError) as exc:
                self.problems[f"definition {name}"] = definitions.complain(path, exc)
                continue
            self._take(pool, text)
            changed.append(name)
        return changed

    def check(self, text: str, source: str) -> model.Pool:
        """The definition in `text`, as it would be taken. Raises InvalidDefinition or Exists."""
        pool = model.parse(text, source)
        self._check_unique(pool, source)
        known = self.pools.get(pool.name)
        if known is not None and known.uuid and pool.uuid and pool.uuid != known.uuid:
            raise errors.Exists(
                f"{source}: uuid: pool {pool.name} exists with another uuid, {known.uuid}",
                hint="Leave the uuid out to change the definition.",
            )
        return pool

    def define(self, text: str, source: str) -> tuple[StoragePool, bool]:
        """Take a definition: the pool, and whether it is new."""
        pool = self.check(text, source)
        if pool.uuid is None:
            pool, text = self._with_uuid(pool, text)
        definitions.write(self._services.paths.definition(DRIVER, pool.name), text)
        self.problems.pop(f"definition {pool.name}", None)
        return self._take(pool, text)

    def _take(self, pool: model.Pool, text: str) -> tuple[StoragePool, bool]:
        new = pool.name not in self.pools
        mine = self._pool(pool.name)
        mine.definition, mine.definition_text = pool, text
        self._publish("added" if new else "changed", pool.name)
        return mine, new

    def _with_uuid(self, pool: model.Pool, text: str) -> tuple[model.Pool, str]:
        known = self.pools.get(pool.name)
        text = definitions.with_uuid(text, known.uuid if known is not None else "")
        return model.parse(text, pool.name), text

    async def undefine(self, name: str) -> None:
        pool = self.find(name)
        async with pool.exclusive("undefine"):
            if pool.active:
                raise errors.InvalidState(
                    f"Cannot undefine pool {pool.name}: it is active",
                    hint=f"Stop it first: virtctl pool stop {pool.name}. Its volumes stay where they are.",
                )
            files.remove(pool.source)
            self._forget(pool.name)

    def set_autostart(self, name: str, *, enable: bool) -> bool:
        pool = self.find(name)
        if pool.definition is None:
            raise errors.NotFound(f"Pool {pool.name} has no definition")
        if pool.definition.autostart == enable:
            return False
        text = definitions.with_autostart(pool.definition_text, enable=enable)
        changed = model.parse(text, pool.source)
        if changed.autostart != enable:
            raise errors.HostError(
                f"Cannot change autostart in {pool.source}", hint="Edit it, then: systemctl reload virtd."
            )
        was = pool.definition_text
        definitions.write(pool.source, text)
        pool.definition, pool.definition_text = changed, text
        if pool.active and pool.record is not None and pool.record.data.get("definition") == was:
            pool.note(State.ACTIVE, pool.reason, text)  # that is no change which waits for the next start
        else:
            self._publish("changed", pool.name)
        return True

    def _check_unique(self, pool: model.Pool, source: str) -> None:
        for other in self.pools.values():
            if other.name == pool.name or other.definition is None:
                continue
            if pool.uuid is not None and other.uuid == pool.uuid:
                raise errors.Exists(
                    f"{source}: uuid: {pool.uuid} is the uuid of pool {other.name}",
                    hint="Leave it out: a new one is made.",
                )
            if other.definition.path == pool.path:
                raise errors.Exists(f"{source}: path: {pool.path} is pool {other.name} already")

    def _pool(self, name: str) -> StoragePool:
        if name not in self.pools:
            self.pools[name] = StoragePool(
                name, self._services.paths, self._records, self._boot_id, self._backend, self._pool_published
            )
        return self.pools[name]

    def _backend(self, pool: model.Pool) -> Backend:
        return host.backend(pool, self._services, self._settings, self.run_tool)

    def _forget(self, name: str) -> None:
        """The definition is gone. An active pool stays until it is stopped."""
        pool = self.pools[name]
        pool.definition, pool.definition_text = None, ""
        if pool.active:
            self._publish("changed", name)
            return
        if pool.record is not None:
            self._records.remove(name)
        del self.pools[name]
        self._publish("removed", name)

    # Finding and describing

    def find(self, name: str) -> StoragePool:
        """By name or uuid. Raises NotFound."""
        if (pool := self.pools.get(name)) is not None:
            return pool
        if (uuid := canonical_uuid(name)) is not None:
            for pool in self.pools.values():
                if pool.uuid == uuid:
                    return pool
        raise errors.NotFound(f"There is no pool {name}", hint="virtctl pool list shows all.")

    def find_job(self, name: str) -> Job:
        """Raises NotFound."""
        if (job := self.jobs.get(name)) is not None:
            return job
        raise errors.NotFound(f"There is no job {name}", hint="virtctl volume jobs shows all.")

    def live(self) -> int:
        return sum(pool.active for pool in self.pools.values())

    def settled(self) -> bool:
        return True

    def counts(self) -> dict[str, int]:
        states = [pool.state for pool in self.pools.values()]
        return {state.value: states.count(state) for state in State}

    def troubles(self) -> list[tuple[str, Problem]]:
        found = [(key.partition(" ")[2], problem) for key, problem in self.problems.items()]
        for pool in self.pools.values():
            found += [(pool.name, problem) for problem in pool.problems.values()]
        found += [(job.name, Problem(job.problem)) for job in self.jobs.values() if job.problem]
        return found

    def bad_definitions(self) -> list[tuple[str, Problem]]:
        return [
            (key.partition(" ")[2], problem) for key, problem in self.problems.items() if key.startswith("definition")
        ]

    def describe_named(self, name: str) -> dict[str, Any]:
        pool = self.pools.get(name)
        return pool.describe() if pool is not None else {"name": name, "driver": DRIVER}

    def _pool_published(self, event: str, pool: StoragePool) -> None:
        if self.pools.get(pool.name) is pool:
            self._publish(event, pool.name)

    def changed(self, pool: StoragePool) -> None:
        """Its volumes have changed."""
        self._pool_published("changed", pool)

    @property
    def account(self) -> Account:
        """Whom jobs run as."""
        return Account(self._settings.qemu.user, self._settings.qemu.group)

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
            self._forget(pool.name)
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
            self._records.remove(job.name)

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
