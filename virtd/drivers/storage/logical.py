# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pool that is an LVM volume group: its volumes are logical volumes, always raw.

The group's own metadata is the record: an unfinished volume has the tags `virtd_new` and its job's, a damaged one has
`virtd_damaged`. LVM's tools run as root, as they must, each in a unit of its own.
"""

from __future__ import annotations

import contextlib
import grp
import os
from typing import TYPE_CHECKING

import msgspec

from ... import errors
from ...hints import do
from ...model import pool as model
from ...model.drives import Format
from ...reach import opened, reached
from . import prerequisites, sandbox
from .aside import Aside
from .backend import Capacity, Meta, Volume, not_built
from .task import Program

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from ..qcow2 import Header

NEW = "virtd_new"
DAMAGED = "virtd_damaged"
JOB = "virtd_job_"
TOKEN = "virtd_token_"
# lvs(8), the first letter of lv_attr: volumes that guests can use, unlike thin pools, metadata and such.
PLAIN = frozenset("-oOsVmMrR")


class _Answer(msgspec.Struct):
    """lvmreport(7): one report, with one table."""

    report: tuple[dict[str, list[dict[str, str]]]]


class Logical:
    """See Backend. `run_tool(pool, program)` returns what the program wrote."""

    files = False

    def __init__(self, pool: model.Pool, uid: int, run_tool: Callable[[str, Program], Awaitable[str]]) -> None:
        self.pool = pool
        self._uid = uid
        self._run_tool = run_tool
        self._group = pool.path.rpartition("/")[2]
        self._aside = Aside(f"Pool {pool.name} ({pool.path})")

    async def _lvm(self, tool: str, *arguments: str) -> str:
        argv = (prerequisites.program(tool, "lvm2"), *arguments)
        return await self._run_tool(self.pool.name, Program(argv, tuple(sandbox.privileged())))

    async def _report(self, tool: str, fields: str) -> list[dict[str, str]]:
        # lvmreport(7): by default the tools' messages become part of a JSON report, and don't go to stderr.
        text = await self._lvm(
            tool, "--config", "log/report_command_log=0", "--reportformat", "json", "--units", "b", "--nosuffix",
            "-o", fields, self._group,
        )  # fmt: skip
        try:
            (report,) = msgspec.json.decode(text, type=_Answer).report
            return next(iter(report.values()))
        except (msgspec.MsgspecError, ValueError, StopIteration) as exc:
            raise errors.HostError(f"{tool} gave an answer that virtd doesn't understand: {text[:200]}") from exc

    # The pool

    @property
    def mount(self) -> str:
        return ""

    async def build(self) -> bool:
        raise not_built(self.pool)

    async def start(self) -> None:
        await self._report("vgs", "vg_name")
        await self._lvm("vgchange", "-q", "--activate", "y", self._group)

    async def stop(self) -> None:
        try:
            await self._lvm("vgchange", "-q", "--activate", "n", self._group)
        except errors.HostError as exc:
            # All volumes except the one in use are inactive now.
            with contextlib.suppress(errors.HostError):
                await self._lvm("vgchange", "-q", "--activate", "y", self._group)
            raise errors.HostError(exc.message, hint="Is one of its volumes mounted, or in use otherwise?") from exc

    async def lost(self) -> str:
        try:
            await self._report("vgs", "vg_name")
        except errors.HostError as exc:
            return exc.message
        return ""

    async def capacity(self) -> Capacity:
        (row,) = await self._report("vgs", "vg_size,vg_free")
        size, free = int(row["vg_size"]), int(row["vg_free"])
        return Capacity(size, size - free, free)

    # Its volumes

    async def _all(self) -> dict[str, tuple[Volume, frozenset[str]]]:
        rows = await self._report("lvs", "lv_name,lv_size,lv_attr,lv_tags")
        found = {}
        for row in rows:
            name = row["lv_name"]
            if row["lv_attr"][:1] not in PLAIN:
                continue
            tags = frozenset(filter(None, row["lv_tags"].split(",")))
            path = f"{self.pool.path}/{name}"
            size = int(row["lv_size"])
            meta = Meta(
                Format.RAW,
                job=_after(JOB, tags),
                token=_after(TOKEN, tags),
                damaged="it was being wiped: wipe it again, or delete it" if DAMAGED in tags else "",
            )
            try:
                status = os.stat(path)
                identity, trouble = (status.st_dev, status.st_ino), ""
            except OSError:
                identity, trouble = (0, 0), "it isn't activated"
            found[name] = Volume(name, path, meta, size, size, identity, meta.damaged or trouble), tags
        return found

    async def volumes(self) -> dict[str, Volume]:
        return {name: volume for name, (volume, tags) in sorted((await self._all()).items()) if NEW not in tags}

    async def volume(self, name: str) -> Volume:
        model.check_volume(name, model.Type.LOGICAL)
        try:
            return (await self.volumes())[name]
        except KeyError:
            raise errors.NotFound(
                f"There is no volume {name} in pool {self.pool.name}",
                hint=do("list", "volume", self.pool.name) + " shows all.",
            ) from None

    async def free(self, name: str) -> None:
        model.check_volume(name, model.Type.LOGICAL)
        if name in await self._all():
            raise errors.Exists(
                f"There is a volume {name} in pool {self.pool.name} already",
                hint=do("info", "volume", self.pool.name, name),
            )

    async def begin(self, job: str, name: str, size: int | None, *, allocate: bool = False) -> str:
        if size is None:
            raise errors.InvalidDefinition(
                "volume", "size", "expected a size: a logical volume has one from the start"
            )
        await self._lvm(
            "lvcreate", "-q", "--yes", "--wipesignatures", "y", "--size", f"{size}b",
            "--addtag", NEW, "--addtag", f"{JOB}{job}", "--name", name, self._group,
        )  # fmt: skip
        path = self.begun(job, name)
        # udev makes the link a moment later.
        await self._aside(lambda: _await(path))
        await self._aside(lambda: _own(path, self._uid, -1))  # for the job that fills it
        return path

    def begun(self, _job: str, name: str) -> str:
        return f"{self.pool.path}/{name}"

    async def reflink(self, source: Volume, job: str) -> bool:
        del source, job
        return False

    async def header(self, volume: Volume) -> Header:
        raise errors.InvalidState(f"Volume {volume.name} of pool {self.pool.name} is raw")

    async def commit(self, job: str, name: str, meta: Meta) -> None:
        found = (await self._all()).get(name)
        if found is None or f"{JOB}{job}" not in found[1]:
            raise errors.HostError(f"The unfinished volume {name} has disappeared")
        if NEW in found[1]:
            await self._aside(lambda: _flush(found[0].path), limit=None)
            await self.take(name)
            token = ("--addtag", f"{TOKEN}{meta.token}") if meta.token else ()
            await self._lvm("lvchange", "-q", "--deltag", NEW, *token, f"{self._group}/{name}")

    async def discard(self, job: str, name: str) -> None:
        found = (await self._all()).get(name)
        if found is not None and {NEW, f"{JOB}{job}"} <= found[1]:
            await self._remove(name)

    async def stale(self, jobs: Collection[str]) -> list[str]:
        found = await self._all()
        return [name for name, (volume, tags) in found.items() if NEW in tags and volume.meta.job not in jobs]

    async def sweep(self, jobs: Collection[str]) -> list[str]:
        removed = await self.stale(jobs)
        for name in removed:
            await self._remove(name)
        return removed

    async def grow(self, volume: Volume, size: int) -> None:
        shrink = ("--force",) if volume.capacity is not None and size < volume.capacity else ()
        await self._lvm("lvresize", "-q", "--yes", *shrink, "--size", f"{size}b", f"{self._group}/{volume.name}")

    async def lend(self, volume: Volume) -> None:
        await self._aside(lambda: _own(volume.path, self._uid, -1))

    async def take(self, name: str) -> None:
        """The owner that udev sets: root, and the group of disks."""

        def work() -> None:
            try:
                group = grp.getgrnam("disk").gr_gid
            except KeyError:
                group = 0
            with contextlib.suppress(OSError):
                _own(f"{self.pool.path}/{name}", 0, group)

        await self._aside(work)

    async def describe(self, name: str, meta: Meta) -> None:
        how = "--addtag" if meta.damaged else "--deltag"
        await self._lvm("lvchange", "-q", how, DAMAGED, f"{self._group}/{name}")

    async def delete(self, volume: Volume) -> None:
        await self._remove(volume.name)

    async def _remove(self, name: str) -> None:
        await self._lvm("lvremove", "-q", "--yes", f"{self._group}/{name}")


def _after(prefix: str, tags: Collection[str]) -> str:
    return next((tag.removeprefix(prefix) for tag in tags if tag.startswith(prefix)), "")


def _await(path: str) -> None:
    import time

    for _ in range(100):
        if os.path.exists(path):
            return
        time.sleep(0.1)
    raise errors.HostError(f"{path} did not appear", hint="Is udev running?")


def _own(path: str, uid: int, gid: int) -> None:
    with reached(path) as found:
        os.chown(found.itself, uid, gid)


def _flush(path: str) -> None:
    fd = opened(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
