# SPDX-License-Identifier: LGPL-2.1-or-later
"""Uploads from clients, and downloads."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import msgspec

from ... import errors
from ...hints import option
from ...model import pool as model
from ...model.drives import Format
from . import images, programs
from .backend import Meta, Volume
from .task import Data, State, Task
from .usage import key
from .volumes import Answer, check_format, check_room

if TYPE_CHECKING:
    from .backend import Backend
    from .job import Job
    from .volumes import Volumes


class Streams:
    """Clients get descriptors; no byte passes through the daemon."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes
        self._pools = volumes.pools
        self._usage = volumes.usage
        self._jobs = volumes.jobs

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
        """The job that waits for the client, a descriptor to write to, and how many bytes are there already."""
        pool, known = await self._volumes.begin(pool_name, name, token)
        if resume or known is not None:
            for job in self._jobs:
                if job.alive and (job.task.verb, job.task.pool, job.task.volume) == ("upload", pool.name, name):
                    fd, there = await self._open_upload(pool.usable, job)
                    return Answer(pool.name, name, job.name), fd, there
            if resume:
                raise errors.NotFound(
                    f"There is no unfinished upload of {name} to pool {pool.name}",
                    hint="Leave " + option("resume") + " out.",
                )
        wanted = model.volume_format(format or "raw")
        check_format(pool, wanted)
        await check_room(pool, size or 0, everything=False)
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
        with self._usage.taken(pool.name, name, "upload"):
            await backend.free(name)
            job = self._jobs.new(task)
            try:
                # On record first, as always: an unfinished volume without a record is swept away.
                job.wait_for_client()
                fd, there = await self._open_upload(backend, job)
            except BaseException:
                self._jobs.forget(job)
                with contextlib.suppress(errors.VirtdError):
                    await backend.discard(job.name, name)
                raise
        return Answer(pool.name, name, job.name), fd, there

    async def _open_upload(self, backend: Backend, job: Job) -> tuple[int, int]:
        """A descriptor to write an upload with, and how many bytes are there. It is begun if it isn't yet.

        A daemon may have been killed right after it wrote the job's record.
        """
        task = job.task
        try:
            return await images.open_begun(backend, job.name, task.volume)
        except errors.NotFound:
            await backend.begin(job.name, task.volume, None if backend.files else task.size)
        return await images.open_begun(backend, job.name, task.volume)

    async def uploaded(self, job_name: str) -> Answer:
        """The client has written everything: check it, and finish the volume."""
        job = self._jobs.find(job_name)
        answer = Answer(job.task.pool, job.task.volume, job.name)
        if job.task.verb != "upload" or job.state is not State.WAITING:
            return answer  # a repeated call
        pool = self._pools.find(job.task.pool)
        try:
            meta, path = await images.received(self._pools, pool.usable, job.name, job.task)
        except errors.VirtdError as exc:
            await job.conclude(exc.message)
            raise
        job.data = Data(msgspec.structs.replace(job.task, meta=meta))
        if meta.format is Format.QCOW2:
            await self._jobs.run(job, programs.check(self._volumes.account, path))
        else:
            await job.conclude()
        return answer

    async def download(self, pool_name: str, name: str) -> tuple[Volume, int]:
        """The volume, and a descriptor to read it from, which the caller closes."""
        pool, volume = await self._volumes.find(pool_name, name)
        self._usage.require("download", pool.name, volume, writes=False)
        return volume, await images.open_whole(pool.usable, volume)
