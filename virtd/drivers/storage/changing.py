# SPDX-License-Identifier: LGPL-2.1-or-later
"""How volumes change and go, and how their content comes and goes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import msgspec

from ... import errors
from ...model import pool as model
from ...model import size as sizes
from ...model.domain import Format
from . import images, programs
from .backend import Meta, Volume
from .directory import Directory
from .job import Task
from .usage import Answer, Usage, key

if TYPE_CHECKING:
    from .backend import Backend
    from .job import Job


class Changing(Usage):
    """See volumes.Volumes."""

    async def resize(
        self, pool_name: str, name: str, size: str | int, *, shrink: bool = False, token: str = "", by: str
    ) -> Answer:
        pool, volume = await self.find(pool_name, name)
        if (begun := self._begun(token)) is not None:
            return Answer(pool.name, name, begun.name)
        number = model.volume_size(size)
        chain = await images.chain(self._driver, pool, volume)
        images.require_format(chain)
        await self._require_no_dependents("resize", pool.name, name)
        await self._check_room(pool, number, everything=False)
        self.require("resize", pool.name, volume, writes=True)
        if volume.capacity == number:
            return Answer(pool.name, name)
        if volume.capacity is not None and number < volume.capacity and not shrink:
            raise errors.InvalidDefinition(
                "volume",
                "size",
                f"expected at least what it has, {sizes.show(volume.capacity)}, got {sizes.show(number)}",
                hint="--shrink cuts off what is beyond, for good.",
            )
        backend = pool.usable
        if volume.meta.format is Format.RAW:
            with self._hand_on(pool.name, name, "resize"):
                await backend.grow(volume, number)
            await pool.measure()
            self._driver.changed(pool)
            return Answer(pool.name, name)
        task = Task(
            verb="resize",
            pool=pool.name,
            volume=name,
            by=by,
            token=token,
            size=number,
            writes=(key(pool.name, name),),
            reads=tuple(link.key for link in chain[1:]),
            undo=False,
        )
        program = programs.resize(
            self._account, volume.path, number, [link.pair for link in chain[1:]], shrink=shrink
        )
        return await self._lend_and_run(pool, volume, task, program)

    async def wipe(self, pool_name: str, name: str, *, token: str = "", by: str) -> Answer:
        pool, volume = await self.find(pool_name, name)
        if (begun := self._begun(token)) is not None:
            return Answer(pool.name, name, begun.name)
        if volume.meta.format is None:
            images.require_format([images.Link(pool, volume)])
        chain = await images.chain(self._driver, pool, volume)
        await self._require_no_dependents("wipe", pool.name, name)
        self.require("wipe", pool.name, volume, writes=True)
        assert volume.meta.format is not None
        task = Task(
            verb="wipe",
            pool=pool.name,
            volume=name,
            by=by,
            token=token,
            meta=msgspec.structs.replace(volume.meta, damaged=""),
            writes=(key(pool.name, name),),
            reads=tuple(link.key for link in chain[1:]),
            undo=False,
        )
        size = volume.capacity
        if size is None:
            raise errors.InvalidState(
                f"Cannot wipe {name}: {volume.trouble}", hint="Delete it; its blocks are then free, though not empty."
            )
        below = chain[1].pair if len(chain) > 1 else None
        program = programs.wipe(self._account, volume.path, size, volume.meta.format, below)
        damaged = msgspec.structs.replace(volume.meta, damaged="it was being wiped: wipe it again, or delete it")
        await pool.usable.describe(name, damaged)
        try:
            return await self._lend_and_run(pool, volume, task, program)
        except BaseException:
            with contextlib.suppress(errors.VirtdError):
                await pool.usable.describe(name, volume.meta)
            raise

    async def delete(self, pool_name: str, name: str, *, by: str) -> Answer:
        pool, volume = await self.find(pool_name, name)
        await self._require_no_dependents("delete", pool.name, name)
        self.require("delete", pool.name, volume, writes=True)
        with self._hand_on(pool.name, name, "delete"):
            await pool.usable.delete(volume)
        await pool.measure()
        self._driver.changed(pool)
        return Answer(pool.name, name)

    # Streams

    async def upload(
        self,
        pool_name: str,
        name: str,
        *,
        format: str | None,  # noqa: A002
        size: int | None,
        resume: bool,
        token: str = "",
        by: str,
    ) -> tuple[Answer, int, int]:
        """The job that waits for the client's bytes, where to write them, and how many there are already."""
        pool, known = await self._begin_call(pool_name, name, token)
        if resume or known is not None:
            for job in self._driver.jobs.values():
                if job.alive and (job.task.verb, job.task.pool, job.task.volume) == ("upload", pool.name, name):
                    fd, there = await self._open_upload(pool.usable, job)
                    return Answer(pool.name, name, job.name), fd, there
            if resume:
                raise errors.NotFound(
                    f"There is no unfinished upload of {name} to pool {pool.name}", hint="Leave --resume out."
                )
        wanted = model.volume_format(format or "raw")
        self._check_format(pool, wanted)
        await self._check_room(pool, size or 0, everything=False)
        backend = pool.usable
        task = Task(
            verb="upload",
            pool=pool.name,
            volume=name,
            by=by,
            token=token,
            meta=Meta(wanted, token=token),
            writes=(key(pool.name, name),),
            size=size,
        )
        with self._hand_on(pool.name, name, "upload"):
            await backend.free(name)
            job = self._driver.new_job(task)
            try:
                # On record first, as ever: what is begun without is swept away.
                job.wait_for_client()
                fd, there = await self._open_upload(backend, job)
            except BaseException:
                self._driver.forget_job(job)
                with contextlib.suppress(errors.VirtdError):
                    await backend.discard(job.name, name)
                raise
        return Answer(pool.name, name, job.name), fd, there

    async def _open_upload(self, backend: Backend, job: Job) -> tuple[int, int]:
        """A descriptor to write an upload with, and how much is there; begun now if it isn't yet.

        A daemon that was killed may have come no further than the job's record.
        """
        task = job.task
        try:
            return await images.open_begun(backend, job.name, task.volume)
        except errors.NotFound:
            await backend.begin(job.name, task.volume, None if isinstance(backend, Directory) else task.size)
        return await images.open_begun(backend, job.name, task.volume)

    async def uploaded(self, job_name: str) -> Answer:
        """The client has written everything."""
        job = self._driver.find_job(job_name)
        answer = Answer(job.task.pool, job.task.volume, job.name)
        if job.task.verb != "upload" or job.state != "waiting":
            return answer  # said before
        pool = self._driver.find(job.task.pool)
        try:
            meta, path = await images.received(self._driver, pool.usable, job.name, job.task)
        except errors.VirtdError as exc:
            await job.conclude(ok=False, error=exc.message)
            raise
        job.task = msgspec.structs.replace(job.task, meta=meta)
        if meta.format is Format.QCOW2:
            await job.run(programs.check(self._account, path))
        else:
            await job.conclude(ok=True)
        return answer

    async def download(self, pool_name: str, name: str) -> tuple[Volume, int]:
        """The volume and a descriptor to read it from, the caller's to close."""
        pool, volume = await self.find(pool_name, name)
        self.require("download", pool.name, volume, writes=False)
        return volume, await images.open_whole(pool.usable, volume)
