# SPDX-License-Identifier: LGPL-2.1-or-later
"""fsck for pools and jobs: records, mounts, unfinished volumes, units and slots of jobs.

A repair does what a start of the daemon does: it removes what a crash left of a volume, and ends whatever belongs to
no job on record. It also starts a pool again that has lost its mount.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ... import errors
from ...model import pool as model
from ...objects import comparing
from ...objects.protocol import Difference
from ...paths import names as names_in
from . import mounts
from .task import DRIVER, State

if TYPE_CHECKING:
    from ...children.child import Services
    from ...records import Record, Records
    from .job import Job
    from .jobs import Jobs
    from .pool import StoragePool
    from .pools import Pools


async def compare(pools: Pools, *, repair: bool) -> list[Difference]:
    """See protocol.Comparing."""
    await pools.certain()
    found = await comparing.loose_files(pools, repair=repair)
    recorded = set(names_in(f"{pools.services.paths.run}/{DRIVER}", ".json"))
    seen = await comparing.look(pools.services, DRIVER)
    of_jobs = {name for name in recorded if name.startswith(model.JOB)}
    mine = _Jobs(pools.jobs, pools.services, pools.records)
    for name in sorted(
        {*(job.name for job in pools.jobs), *comparing.traces(pools.services, seen, DRIVER), *of_jobs}
    ):
        if mine.findings(name, seen):
            found += await mine.compare(name, repair=repair)
    for name in sorted({*pools.pools, *(recorded - of_jobs)}):
        found += await _examine(pools, name, repair=repair)
    return found


# Jobs


class _Jobs:
    def __init__(self, jobs: Jobs, services: Services, records: Records) -> None:
        self._jobs = jobs
        self._services = services
        self._records = records

    def findings(self, name: str, seen: comparing.Seen) -> list[Difference]:
        job = self._jobs.get(name)
        path = self._services.paths.record(DRIVER, name)
        found = comparing.record_differences(path, name, _kept(job))
        if job is not None and not job.over.is_set():
            return found + _running(job, seen)
        if unit := seen.units.get(name):
            text = f"{unit.name} is there, and no job {name} is under way"
            found.append(Difference("unit", name, text, "stop it"))
        for slot in comparing.strays(self._services, seen, f"{DRIVER}/{name}"):
            text = f"slot {slot} is kept, and no job {name} is under way"
            found.append(Difference("slot", name, text, "drop it"))
        return found

    async def compare(self, name: str, *, repair: bool) -> list[Difference]:
        # Jobs have no lock: whatever was in progress is over a moment later.
        await asyncio.sleep(0.2)

        async def findings(seen: comparing.Seen) -> list[Difference]:
            return self.findings(name, seen)

        return await comparing.check(
            self._services, name,
            look=lambda: comparing.look(self._services, DRIVER),
            findings=findings,
            mend=lambda seen: self._mend(name, seen),
            repair=repair,
        )  # fmt: skip

    async def _mend(self, name: str, seen: comparing.Seen) -> None:
        job = self._jobs.get(name)
        if job is not None and not job.over.is_set():
            if job.child is not None:
                await comparing.mend_slots(self._services, job.child, seen)
        else:
            await comparing.clear_away(self._services, seen, DRIVER, name)
        comparing.save_or_remove(self._records, name, _kept(job))


def _kept(job: Job | None) -> Record | None:
    """The record that is on disk, if all is well."""
    return job.record if job is not None and job.recorded else None


def _running(job: Job, seen: comparing.Seen) -> list[Difference]:
    """Differences of a running job. One that is just ending is left to whoever watches it."""
    if job.state is not State.RUNNING or job.child is None or not job.child.alive():
        return []
    found = comparing.slot_differences(job.shared.services, job.child, seen)
    if job.name not in seen.units:
        text = f"{job.unit} is gone, but its process runs (PID {job.child.pid})"
        found.append(Difference("unit", job.name, text))
    return found


# Pools


async def _examine(pools: Pools, name: str, *, repair: bool) -> list[Difference]:
    pool = pools.pools.get(name)
    if pool is None:
        return await _compare_pool(pools, name, None, repair=repair)
    try:
        async with pool.exclusive("check"):
            found = await _compare_pool(pools, name, pool, repair=repair)
    except errors.Busy as exc:
        return [Difference("busy", name, exc.message)]
    # A start takes the lock itself.
    lost = [difference for difference in found if difference.kind == "pool" and difference.repair]
    if repair and lost:
        error = ""
        try:
            await pool.start("fsck")
        except errors.VirtdError as exc:
            error = exc.message
        found = [
            comparing.marked(difference, repaired=not error) if difference in lost else difference
            for difference in found
        ]
        if error:
            found.append(Difference("pool", name, f"{name} could not be repaired: {error}"))
    return found


async def _findings(pools: Pools, name: str, pool: StoragePool | None) -> list[Difference]:
    path = pools.services.paths.record(DRIVER, name)
    found = comparing.record_differences(path, name, pool.record if pool is not None else None)
    if pool is None:
        return found
    try:
        if pool.active:
            if lost := await pool.backend.lost():
                # A lost directory or volume group only a person can bring back.
                unmounted = pool.backend.mount and mounts.mounted(pool.present.path) is None
                text = f"{name} is active, and {lost}"
                return [*found, Difference("pool", name, text, "mount it again" if unmounted else "")]
            for stale in await pool.backend.stale(pools.jobs.unfinished()):
                text = f"{pool.present.path}/{stale} was begun, and no job fills it"
                found.append(Difference("volume", name, text, "remove it"))
        elif pool.definition is not None and (mount := pool.backend.mount):
            where = pool.definition.path
            units = await pools.services.units()
            if mounts.mounted(where) is not None and await mounts.is_ours(units, where):
                text = f"{mount} is mounted by virtd, and {name} isn't active"
                found.append(Difference("mount", name, text, "unmount it"))
    except errors.VirtdError as exc:
        found.append(Difference("pool", name, f"{name} can't be looked at: {exc.message}"))
    return found


async def _compare_pool(pools: Pools, name: str, pool: StoragePool | None, *, repair: bool) -> list[Difference]:
    found = await _findings(pools, name, pool)
    kinds = {difference.kind for difference in found if difference.repair}
    if not repair or not kinds - {"pool"}:
        return found
    try:
        if "volume" in kinds and pool is not None:
            await pool.backend.sweep(pools.jobs.unfinished())
        if "mount" in kinds and pool is not None:
            await pool.backend.stop()
        if "record" in kinds:
            comparing.save_or_remove(pools.records, name, pool.record if pool is not None else None)
    except errors.VirtdError as exc:
        found.append(Difference("record", name, f"{name} could not be repaired: {exc}"))
    left = {difference.text for difference in await _findings(pools, name, pool)}
    return [
        difference
        if difference.kind == "pool"
        else comparing.marked(difference, repaired=difference.text not in left)
        for difference in found
    ]
