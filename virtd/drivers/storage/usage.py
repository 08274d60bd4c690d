# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who uses which volume, and what is common to all that is done to them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ... import errors
from ...model import pool as model
from ...model import size as sizes
from ...model.domain import Format
from ...paths import names
from . import images

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from . import programs
    from .backend import Volume
    from .driver import Driver
    from .job import Job, Program, Task
    from .pool import StoragePool

Users = dict[tuple[int, int], list[tuple[str, bool]]]


CONTAINER = "lxc/"


def called(user: str) -> str:
    """A user of a volume, for a person."""
    return f"container {user.removeprefix(CONTAINER)}" if user.startswith(CONTAINER) else f"domain {user}"


def key(pool: str, volume: str) -> str:
    return f"{pool}/{volume}"


class Answer(NamedTuple):
    """What became of a call: a job that goes on, or "" when all is done."""

    pool: str
    volume: str
    job: str = ""


class Usage:
    """The base of the operations on volumes."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._hands: dict[str, str] = {}  # "POOL/NAME" -> what is being done to it right now
        self.at_work: set[str] = set()  # names of volumes' makings that aren't jobs (yet)

    async def find(self, pool_name: str, name: str) -> tuple[StoragePool, Volume]:
        """Raises NotFound."""
        pool = self._driver.find(pool_name)
        await self._driver.certain()
        return pool, await pool.usable.volume(name)

    # Who uses what

    def users(self) -> Users:
        """What runs and has which files open, by device and inode, and whether it writes."""
        found: Users = {}
        for user, _path, identity, writes in self._images():
            found.setdefault(identity, []).append((user, writes))
        return found

    def _images(self) -> list[tuple[str, str, tuple[int, int], bool]]:
        """What all domains and containers have open; see images() of their drivers. A container is "lxc/NAME"."""
        found = list(self._driver.peers("qemu").images())
        if names(f"{self._driver.services.paths.run}/lxc", ".json"):  # else the driver isn't needed
            found += [(f"{CONTAINER}{name}", *rest) for name, *rest in self._driver.peers("lxc").images()]
        return found

    def require_idle(self, pool: StoragePool) -> None:
        """Raise Busy when a domain or a job uses a volume of the pool."""
        path = f"{pool.present.path}/"
        for user, image, _identity, _writes in self._images():
            if image.startswith(path):
                raise errors.Busy(
                    f"Cannot stop pool {pool.name}: {called(user)} uses {image}", hint=f"Stop {called(user)} first."
                )
        for job in self._driver.jobs.values():
            mine = (*job.task.reads, *job.task.writes, key(job.task.pool, job.task.volume))
            if job.alive and job.task.verb != "tool" and any(item.startswith(f"{pool.name}/") for item in mine):
                raise errors.Busy(
                    f"Cannot stop pool {pool.name}: {job.name} ({job.task.verb} of {job.task.volume}) is under way",
                    hint=f"Wait for it, or: virtctl volume cancel {job.name}.",
                )
        for item, what in self._hands.items():
            if item.startswith(f"{pool.name}/"):
                raise errors.Busy(f"Cannot stop pool {pool.name}: {item} is busy ({what})")

    def _jobs_on(self, item: str, *, writing: bool = False) -> Iterator[Job]:
        for job in self._driver.jobs.values():
            if not job.over.is_set() and (item in job.task.writes or (not writing and item in job.task.reads)):
                yield job

    def require(self, doing: str, pool: str, volume: Volume, *, writes: bool) -> None:
        """Raise Busy when the volume can't be read (and, if `writes`, written) now. Doesn't wait for anything."""
        item = key(pool, volume.name)
        for user, user_writes in self.users().get(volume.identity, ()):
            if writes or user_writes:
                how = "writes to it" if user_writes else "reads it"
                raise errors.Busy(
                    f"Cannot {doing} {volume.name}: {called(user)} {how}", hint=f"Stop {called(user)} first."
                )
        self.require_no_job(doing, item, writes=writes)

    def require_no_job(self, doing: str, item: str, *, writes: bool) -> None:
        for job in self._jobs_on(item, writing=not writes):
            raise errors.Busy(
                f"Cannot {doing} {item.partition('/')[2]}: {job.name} ({job.task.verb}) is under way",
                hint=f"Wait for it, or: virtctl volume cancel {job.name}.",
            )
        if what := self._hands.get(item):
            raise errors.Busy(f"Cannot {doing} {item.partition('/')[2]}: it is busy ({what})")

    async def _require_no_dependents(self, doing: str, pool: str, volume: str) -> None:
        if found := await images.dependents(self._driver, pool, volume):
            names = ", ".join(f"{p}/{v}" for p, v in found)
            raise errors.Busy(
                f"Cannot {doing} {volume}: it is the backing store of {names}",
                hint="They would be destroyed with it. Delete them first.",
            )

    @contextlib.contextmanager
    def _hand_on(self, pool: str, name: str, what: str) -> Iterator[None]:
        """While one call makes or changes a volume, another one mustn't."""
        item = key(pool, name)
        self.require_no_job(what, item, writes=True)
        self._hands[item] = what
        try:
            yield
        finally:
            del self._hands[item]

    # How things are done

    def _begun(self, token: str) -> Job | None:
        """The job of the same call, made before. One that came to nothing is tried again."""
        jobs = (job for job in self._driver.jobs.values() if token and job.task.token == token)
        return next((job for job in jobs if job.alive or job.state == "done"), None)

    async def _begin_call(self, pool_name: str, name: str, token: str) -> tuple[StoragePool, Answer | None]:
        """The pool, and the answer if this very call was made before."""
        pool = self._driver.find(pool_name)
        await self._driver.certain()
        model.check_volume(name, pool.present.type)
        if token:
            if (job := self._begun(token)) is not None:
                return pool, Answer(pool.name, name, job.name)
            with contextlib.suppress(errors.NotFound, errors.InvalidState):
                if (await pool.usable.volume(name)).meta.token == token:
                    return pool, Answer(pool.name, name)
        return pool, None

    async def _make(
        self,
        pool: StoragePool,
        task: Task,
        size: int | None,
        program: Callable[[str], Program] | None,
        *,
        shortcut: Any = None,
    ) -> Answer:
        """Begin a volume, have it filled, and give it its name; without a program, or by a shortcut, all at once."""
        backend = pool.usable
        with self._hand_on(pool.name, task.volume, task.verb):
            await backend.free(task.volume)
            name = self._driver.job_name()
            self.at_work.add(name)
            try:
                path = await backend.begin(name, task.volume, size)
                try:
                    if program is None or (shortcut is not None and await shortcut(name)):
                        assert task.meta is not None
                        await backend.commit(name, task.volume, msgspec.structs.replace(task.meta, job=name))
                        await pool.measure()
                        self._driver.changed(pool)
                        return Answer(pool.name, task.volume)
                    # From here on the job's record holds the place.
                    task = msgspec.structs.replace(task, writes=(*task.writes, key(pool.name, task.volume)))
                    await self._driver.run_job(self._driver.new_job(task, name), program(path))
                except BaseException:
                    with contextlib.suppress(errors.VirtdError):
                        await backend.discard(name, task.volume)
                    raise
            finally:
                self.at_work.discard(name)
        return Answer(pool.name, task.volume, name)

    async def _run(self, pool: StoragePool, task: Task, program: Program) -> Answer:
        """A job on a volume that there is."""
        with self._hand_on(pool.name, task.volume, task.verb):
            job = self._driver.new_job(task)
            await self._driver.run_job(job, program)
        return Answer(pool.name, task.volume, job.name)

    async def _lend_and_run(self, pool: StoragePool, volume: Volume, task: Task, program: Program) -> Answer:
        backend = pool.usable
        await backend.lend(volume)
        try:
            return await self._run(pool, task, program)
        except BaseException:
            with contextlib.suppress(errors.VirtdError):
                await backend.take(volume.name)
            raise

    # Checks

    @property
    def _account(self) -> programs.Account:
        return self._driver.account

    def _check_format(self, pool: StoragePool, wanted: Format) -> None:
        if pool.present.type is model.Type.LOGICAL and wanted is not Format.RAW:
            raise errors.InvalidDefinition(
                "volume", "format", f'expected "raw" in pool {pool.name}, whose volumes are logical volumes'
            )

    async def _check_room(self, pool: StoragePool, size: int, *, everything: bool) -> None:
        """Raise InvalidDefinition for a size that the pool could never hold, HostError for one that it can't now."""
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
