# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations on volumes, and on the jobs that these start."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ..replies import storage as replies
from .base import WithDescriptors

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from ..drivers.storage.driver import Driver
    from ..drivers.storage.volumes import Answer
    from .base import Caller

LOOK = 0.25  # seconds between two checks of a job's progress


class Volumes:
    """The operations that virtd offers on volumes."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    async def listing(self, pool: str) -> list[replies.Volume]:
        return await self.driver.viewing.listing(pool)

    async def info(self, pool: str, name: str) -> replies.VolumeInfo:
        return await self.driver.viewing.info(pool, name)

    async def snapshots(self, pool: str, name: str) -> list[replies.Snapshot]:
        return await self.driver.viewing.snapshots(pool, name)

    async def create(
        self,
        pool: str,
        name: str,
        size: str | None = None,
        *,
        format: str | None = None,  # noqa: A002
        preallocation: str | None = None,
        backing: str | None = None,
        backing_pool: str | None = None,
        token: str | None = None,
        by: Caller,
    ) -> replies.Begun:
        return await _answer(
            self.driver.making.create(
                pool,
                name,
                size,
                format=format,
                preallocation=preallocation or "off",
                backing=(backing_pool or pool, backing) if backing else None,
                token=token or "",
                by=by.name,
            )
        )

    async def clone(
        self, pool: str, source: str, name: str, *, to_pool: str | None = None, token: str | None = None, by: Caller
    ) -> replies.Begun:
        return await _answer(
            self.driver.making.clone(pool, source, name, to_pool=to_pool, token=token or "", by=by.name)
        )

    async def import_(
        self,
        pool: str,
        name: str,
        file: str | None = None,
        *,
        source_format: str | None = None,
        probe: bool = False,
        format: str | None = None,  # noqa: A002
        token: str | None = None,
        by: Caller,
    ) -> replies.Begun:
        """Import `file`, or, without one, adopt what others have put into the pool under that name."""
        if file is None:
            return await _answer(
                self.driver.making.adopt(
                    pool, name, source_format=source_format, probe=probe, token=token or "", by=by.name
                )
            )
        return await _answer(
            self.driver.making.import_file(
                pool,
                name,
                file,
                source_format=source_format,
                probe=probe,
                format=format,
                token=token or "",
                by=by.name,
            )
        )

    async def resize(
        self, pool: str, name: str, size: str, *, shrink: bool = False, token: str | None = None, by: Caller
    ) -> replies.Begun:
        return await _answer(
            self.driver.changing.resize(pool, name, size, shrink=shrink, token=token or "", by=by.name)
        )

    async def wipe(self, pool: str, name: str, *, token: str | None = None, by: Caller) -> replies.Begun:
        return await _answer(self.driver.changing.wipe(pool, name, token=token or "", by=by.name))

    async def delete(self, pool: str, name: str, *, by: Caller) -> replies.Begun:
        return await _answer(self.driver.changing.delete(pool, name, by=by.name))

    async def upload(
        self,
        pool: str,
        name: str,
        *,
        format: str | None = None,  # noqa: A002
        size: int | None = None,
        resume: bool = False,
        token: str | None = None,
        by: Caller,
    ) -> WithDescriptors:
        answer, fd, there = await self.driver.streams.upload(
            pool, name, format=format, size=size, resume=resume, token=token or "", by=by.name
        )
        return WithDescriptors(replies.Uploading(**answer._asdict(), offset=there), [fd])

    async def uploaded(self, job: str, *, by: Caller) -> replies.Begun:
        return await _answer(self.driver.streams.uploaded(job))

    async def download(self, pool: str, name: str, *, by: Caller) -> WithDescriptors:
        volume, fd = await self.driver.streams.download(pool, name)
        meta = volume.meta
        value = replies.Downloading(
            pool=pool,
            volume=volume.name,
            format=meta.format.value if meta.format is not None else None,
        )
        return WithDescriptors(value, [fd])

    # Jobs

    async def jobs(self) -> list[replies.Job]:
        return self.driver.jobs.describe()

    async def wait(self, job: str, timeout: float | None) -> replies.Job:
        """The job, once it is over or has made progress, or when `timeout` seconds have passed."""
        found = self.driver.jobs.find(job)
        await self.driver.certain()
        before = found.progress()
        loop = asyncio.get_running_loop()
        end = loop.time() + (timeout if timeout is not None else 1e9)
        while not found.over.is_set() and loop.time() < end:
            try:
                async with asyncio.timeout(min(LOOK, max(0.0, end - loop.time()))):
                    await found.over.wait()
            except TimeoutError:
                if found.progress() != before:
                    break
        return found.describe()

    async def cancel(self, job: str, *, by: Caller) -> replies.Cancelled:
        return replies.Cancelled(job=job, changed=await self.driver.jobs.find(job).cancel(by.name))


async def _answer(answer: Awaitable[Answer]) -> replies.Begun:
    return replies.Begun(**(await answer)._asdict())
