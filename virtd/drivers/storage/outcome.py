# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the end of a job means for its pool: the volume gets its name, or the unfinished one is removed."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from ... import errors

if TYPE_CHECKING:
    from .job import Job
    from .pool import StoragePool


async def is_committed(pool: StoragePool, job: Job) -> bool:
    """Whether the job's volume exists already: a daemon may have been killed before that was on record."""
    with contextlib.suppress(errors.VirtdError):
        return (await pool.usable.volume(job.task.volume)).meta.job == job.name
    return False


async def carry_out(pool: StoragePool, job: Job, *, ok: bool) -> None:
    """Safe to repeat. Raises VirtdError."""
    task = job.task
    backend = pool.usable
    if task.undo:
        if ok:
            await backend.commit(job.name, task.volume, task.made(job.name))
        else:
            await backend.discard(job.name, task.volume)
    else:
        if ok and task.meta is not None:
            await backend.describe(task.volume, task.meta)
        if ok or task.verb != "adopt":
            await backend.take(task.volume)
    await pool.measure()
