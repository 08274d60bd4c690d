# SPDX-License-Identifier: LGPL-2.1-or-later
"""`virtctl fsck` for pools and jobs: records, mounts, volumes that were begun, units and slots of jobs.

A repair does what a start of the daemon does as well: what a crash left of a volume is removed, what no job's record
tells of is ended. A pool that lost its mount is started again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ... import errors
from ...model import pool as model
from ...paths import names as names_in
from ...units import mount_unit
from ..fsck import (
    Seen,
    clear_away,
    look,
    loose_files,
    mend_slots,
    record_differences,
    save_or_remove,
    settle,
    slot_differences,
    strays,
    told,
    traces,
)  # fmt: skip
from ..protocol import Difference
from . import mounts
from .job import DRIVER, State

if TYPE_CHECKING:
    from .driver import Driver
    from .job import Job
    from .pool import StoragePool


async def compare(driver: Driver, *, repair: bool) -> list[Difference]:
    """See protocol.Comparing."""
    await driver.certain()
    found = await loose_files(driver, repair=repair)
    run = f"{driver.services.paths.run}/{DRIVER}"
    recorded = set(names_in(run, ".json"))
    seen = await look(driver.services, DRIVER)
    jobs = {*driver.jobs, *traces(driver.services, seen, DRIVER)}
    jobs |= {name for name in recorded if name.startswith(model.JOB)}
    pools = {*driver.pools, *(name for name in recorded if not name.startswith(model.JOB))}
    for name in sorted(jobs):
        if _job(driver, name, seen):
            found += await _settle_job(driver, name, repair=repair)
    for name in sorted(pools):
        found += await _examine(driver, name, repair=repair)
    return found


# Jobs


def _job(driver: Driver, name: str, seen: Seen) -> list[Difference]:
    job = driver.jobs.get(name)
    path = driver.services.paths.record(DRIVER, name)
    found = record_differences(path, name, job.record if job is not None else None)
    if job is not None and not job.over.is_set():
        return found + _running(job, seen)
    if unit := seen.units.get(name):
        found.append(Difference("unit", name, f"{unit.name} is there, and no job {name} is under way", "stop it"))
    for slot in strays(driver.services, seen, f"{DRIVER}/{name}"):
        found.append(Difference("slot", name, f"slot {slot} is kept, and no job {name} is under way", "drop it"))
    return found


def _running(job: Job, seen: Seen) -> list[Difference]:
    """A job that ends just now isn't looked at further: its end is seen to by who watches it."""
    if job.state is not State.RUNNING or job.child is None or not job.child.alive():
        return []
    found = slot_differences(job.shared.services, job.child, seen)
    if job.name not in seen.units:
        text = f"{job.unit} is gone, but its process runs (PID {job.child.pid})"
        found.append(Difference("unit", job.name, text))
    return found


async def _settle_job(driver: Driver, name: str, *, repair: bool) -> list[Difference]:
    # Jobs have no lock: what was just under way is so no more a moment later.
    await asyncio.sleep(0.2)

    async def findings(seen: Seen) -> list[Difference]:
        return _job(driver, name, seen)

    return await settle(
        driver.services, name,
        look=lambda: look(driver.services, DRIVER),
        findings=findings,
        mend=lambda seen: _mend_job(driver, name, seen),
        repair=repair,
    )  # fmt: skip


async def _mend_job(driver: Driver, name: str, seen: Seen) -> None:
    job = driver.jobs.get(name)
    if job is not None and not job.over.is_set():
        if job.child is not None:
            await mend_slots(driver.services, job.child, seen)
    else:
        await clear_away(driver.services, seen, DRIVER, name)
    save_or_remove(driver.records, name, job.record if job is not None else None)


# Pools


async def _examine(driver: Driver, name: str, *, repair: bool) -> list[Difference]:
    pool = driver.pools.get(name)
    if pool is None:
        return await _settle(driver, name, None, repair=repair)
    try:
        async with pool.exclusive("check"):
            found = await _settle(driver, name, pool, repair=repair)
    except errors.Busy as exc:
        return [Difference("busy", name, exc.message)]
    # A start takes the lock by itself.
    lost = [difference for difference in found if difference.kind == "pool" and difference.repair]
    if repair and lost:
        error = ""
        try:
            await pool.start("fsck")
        except errors.VirtdError as exc:
            error = exc.message
        found = [told(difference, repaired=not error) if difference in lost else difference for difference in found]
        if error:
            found.append(Difference("pool", name, f"{name} could not be repaired: {error}"))
    return found


async def _findings(driver: Driver, name: str, pool: StoragePool | None) -> list[Difference]:
    path = driver.services.paths.record(DRIVER, name)
    found = record_differences(path, name, pool.record if pool is not None else None)
    if pool is None:
        return found
    try:
        if pool.active:
            if lost := await pool.backend.lost():
                # What else can be lost (a directory, a volume group) nobody but a person can give back.
                unmounted = pool.present.type is model.Type.FILESYSTEM and mounts.mounted(pool.present.path) is None
                text = f"{name} is active, and {lost}"
                return [*found, Difference("pool", name, text, "mount it again" if unmounted else "")]
            for stale in await pool.backend.stale(driver.unfinished()):
                text = f"{pool.present.path}/{stale} was begun, and no job fills it"
                found.append(Difference("volume", name, text, "remove it"))
        elif pool.definition is not None and pool.definition.type is model.Type.FILESYSTEM:
            where = pool.definition.path
            units = await driver.services.units()
            if mounts.mounted(where) is not None and await mounts.is_ours(units, where):
                text = f"{mount_unit(where)} is mounted by virtd, and {name} isn't active"
                found.append(Difference("mount", name, text, "unmount it"))
    except errors.VirtdError as exc:
        found.append(Difference("pool", name, f"{name} can't be looked at: {exc.message}"))
    return found


async def _settle(driver: Driver, name: str, pool: StoragePool | None, *, repair: bool) -> list[Difference]:
    found = await _findings(driver, name, pool)
    kinds = {difference.kind for difference in found if difference.repair}
    if not repair or not kinds - {"pool"}:
        return found
    try:
        if "volume" in kinds and pool is not None:
            await pool.backend.sweep(driver.unfinished())
        if "mount" in kinds and pool is not None:
            await pool.backend.stop()
        if "record" in kinds:
            save_or_remove(driver.records, name, pool.record if pool is not None else None)
    except errors.VirtdError as exc:
        found.append(Difference("record", name, f"{name} could not be repaired: {exc}"))
    left = {difference.text for difference in await _findings(driver, name, pool)}
    return [
        difference if difference.kind == "pool" else told(difference, repaired=difference.text not in left)
        for difference in found
    ]
