# SPDX-License-Identifier: LGPL-2.1-or-later
"""All jobs: those in progress, and the verdicts of the last ones."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from typing import TYPE_CHECKING

from ... import errors
from ...children.child import Child
from ...hints import do
from ...model.pool import JOB
from ...objects.protocol import Problem
from ...systemd.names import object_name
from . import launching, outcome
from .job import Job, Shared
from .joblog import JobLog, logged
from .task import DRIVER, TOOL, Data, State, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...children.child import Services
    from ...records import Record, Records
    from ...replies import storage as replies
    from .pool import StoragePool
    from .task import Program

log = logging.getLogger(__name__)

KEPT = 32  # verdicts that are kept for later questions


class Jobs:
    """`find_pool(name)` raises NotFound; `changed(name)` is called when the jobs of a pool have changed,
    `job_changed(name)` when a job has.
    """

    def __init__(
        self,
        services: Services,
        records: Records,
        boot_id: str,
        find_pool: Callable[[str], StoragePool],
        changed: Callable[[str], None],
        job_changed: Callable[[str], None],
    ) -> None:
        self._services = services
        self._find_pool = find_pool
        self._changed = changed
        self._job_changed = job_changed
        self._shared = Shared(services, records, boot_id, self._concluded, self._published)
        self._jobs: dict[str, Job] = {}
        self._reserved: set[str] = set()

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    def get(self, name: str) -> Job | None:
        return self._jobs.get(name)

    def find(self, name: str) -> Job:
        """Raises NotFound."""
        if (job := self._jobs.get(name)) is not None:
            return job
        raise errors.NotFound(f"There is no job {name}", hint=do("list", "job") + " shows all.")

    def on(self, volume: str, *, writing: bool = False) -> Iterator[Job]:
        """Those in progress that work on a volume, "POOL/NAME"; with `writing`, those that write to it."""
        for job in self:
            if not job.over.is_set() and (volume in job.task.writes or (not writing and volume in job.task.reads)):
                yield job

    def of_call(self, token: str) -> Job | None:
        """The job that an earlier, identical call has started; one that failed doesn't count."""
        same = (job for job in self if token and job.task.token == token)
        return next((job for job in same if job.alive or job.state is State.DONE), None)

    def unfinished(self) -> set[str]:
        """Names of those whose unfinished volumes must stay."""
        return {job.name for job in self if not job.over.is_set()} | self._reserved

    def describe(self) -> list[replies.Job]:
        """Those in progress, then the verdicts, each oldest first."""
        shown = [job for job in self if job.task.verb != TOOL]
        shown.sort(key=lambda job: (not job.alive, _since(job)))
        return [job.describe() for job in shown]

    # Making and running them

    @contextlib.contextmanager
    def reserve(self) -> Iterator[str]:
        """A name for what isn't a job (yet): an unfinished volume of that name isn't swept away."""
        name = _new_name()
        self._reserved.add(name)
        try:
            yield name
        finally:
            self._reserved.discard(name)

    def new(self, task: Task, name: str = "") -> Job:
        job = Job(self._shared, name or _new_name(), Data(task))
        self._jobs[job.name] = job
        return job

    async def run(self, job: Job, program: Program) -> None:
        """Start its program. If that fails a new job is forgotten, and one that waited for its client waits again.

        Raises VirtdError.
        """
        new = not job.recorded
        try:
            await launching.launch(job, program)
        except BaseException:
            if new:
                self._jobs.pop(job.name, None)
            raise

    async def run_tool(self, pool: str, program: Program) -> str:
        """Run a short program to its end: what it wrote to stdout. Raises HostError with its error messages."""
        job = self.new(Task(verb=TOOL, pool=pool, volume=program.argv[0], by="virtd"))
        await self.run(job, program)
        await job.over.wait()
        self.forget(job)
        if job.data.error:
            raise errors.HostError(f"{program.argv[0].rpartition('/')[2]}: {job.data.error}")
        return job.result

    def forget(self, job: Job) -> None:
        """Drop a verdict that is no longer kept, or a job that never began."""
        self._jobs.pop(job.name, None)
        job.forget()

    async def _concluded(self, job: Job, ok: bool) -> None:  # noqa: FBT001
        if job.task.verb != TOOL:
            await outcome.carry_out(self._find_pool(job.task.pool), job, ok=ok)

    def _published(self, job: Job) -> None:
        if job.over.is_set():
            for old in sorted((job for job in self if job.over.is_set()), key=_since)[:-KEPT]:
                self.forget(old)
        if job.task.verb != TOOL:
            self._job_changed(job.name)
            self._changed(job.task.pool)

    # Taking them back

    def take_back(self, record: Record) -> None:
        """Take back an earlier daemon's job. Raises ValueError."""
        self._jobs[record.name] = Job.of(self._shared, record)

    async def reconcile(self, job: Job) -> str:
        """Find out what became of it: "adopted", "ended", or "" if it was over, or isn't known yet."""
        try:
            result = await job.reconcile()
            if job.state is State.WAITING and await self._is_committed(job):
                await job.conclude()  # its client was done, and only the answer is missing
                result = "ended"
        except Exception as exc:
            log.exception("%s can't be reconciled", job.name)
            job.problems["reconcile"] = Problem(f"{job.name} can't be reconciled: {exc}")
            job.spawn(_again(job), "reconcile")
            return ""
        return result

    async def _is_committed(self, job: Job) -> bool:
        with contextlib.suppress(errors.NotFound):
            return await outcome.is_committed(self._find_pool(job.task.pool), job)
        return False

    async def clear_strangers(self) -> list[str]:
        """End and put away jobs that have no record: their names.

        They were interrupted before they had one, or it was lost. A leftover does more harm than a result is worth.
        """
        known = {job.name for job in self if not job.over.is_set()}
        units = await self._services.units()
        present = {
            name
            for unit in await units.list(f"virtd-{DRIVER}-job-*.service")
            if (name := object_name(DRIVER, unit.name))
        }
        slots = {slot.split("/")[1] for slot in self._services.store.names() if slot.startswith(f"{DRIVER}/")}
        strangers = sorted((present | slots) - known)
        for name in strangers:
            with contextlib.suppress(errors.VirtdError):
                await units.stop(f"virtd-{DRIVER}-{name}.service")
                await units.collect(f"virtd-{DRIVER}-{name}.service")
            await Child(self._services, DRIVER, name).release()
        for name in logged(self._services.paths) - known:
            JobLog(self._services.paths, name).remove()
        return strangers

    async def close(self) -> None:
        await asyncio.gather(*(job.close() for job in self))


async def _again(job: Job) -> None:
    """Try again: a file system or a bus that didn't answer at the daemon's start may do so later."""
    while not job.over.is_set():
        await asyncio.sleep(5)
        with contextlib.suppress(errors.VirtdError):
            await job.reconcile()
            if job.alive:
                break
    job.problems.pop("reconcile", None)


def _new_name() -> str:
    return f"{JOB}{secrets.token_hex(4)}"


def _since(job: Job) -> str:
    return job.record.since
