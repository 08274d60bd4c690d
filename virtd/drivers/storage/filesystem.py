# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pool that is a file system of its own, on a device or an NFS export: mounted, it is a directory pool."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from ... import errors
from ...reach import look, make_directory, opened
from ...systemd.names import mount_unit
from ...text import word
from . import mounts
from .backend import not_built
from .directory import Directory

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ...model import pool as model
    from ...systemd.units import Units

# The only files in there are images that QEMU reads: nothing else needs any privileges.
OPTIONS = "nodev,nosuid,noexec"


class Filesystem(Directory):
    """See Backend."""

    def __init__(self, pool: model.Pool, uid: int, gid: int, units: Callable[[], Awaitable[Units]]) -> None:
        super().__init__(pool, uid, gid)
        self._units = units
        self._source = pool.source or ""  # present in every definition of this type

    @property
    def mount(self) -> str:
        return mount_unit(self.pool.path)

    async def build(self) -> bool:
        raise not_built(self.pool)

    async def start(self) -> None:
        path = self.pool.path
        there = mounts.mounted(path)
        if there is None:
            await self._aside(self._prepare)
            kind = self.pool.fstype or ("auto" if self._source.startswith("/") else "nfs")
            options = ",".join(filter(None, (OPTIONS, self.pool.options)))
            await mounts.mount(await self._units(), self._source, path, kind, options)
        elif not mounts.same_source(there, self._source):
            raise errors.InvalidState(
                f"{path} has {there} mounted, not {self._source}", hint=f"Unmount it first: umount {word(path)}."
            )
        try:
            await super().start()
        except BaseException:
            if there is None:
                await self.stop()
            raise

    async def stop(self) -> None:
        if mounts.mounted(self.pool.path) is None:
            return
        units = await self._units()
        if await mounts.is_ours(units, self.pool.path):
            await mounts.unmount(units, self.pool.path)

    async def lost(self) -> str:
        there = mounts.mounted(self.pool.path)
        if there is None:
            return f"nothing is mounted at {self.pool.path}"
        if not mounts.same_source(there, self._source):
            return f"{self.pool.path} has {there} mounted, not {self._source}"
        return await super().lost()

    def _prepare(self) -> None:
        """Check the device, and make the mount point, which must be empty: a mount would hide what is in it."""
        if self._source.startswith("/"):
            try:
                status = look(self._source)
            except OSError as exc:
                raise errors.HostError(f"Cannot find {self._source}: {exc.strerror}") from exc
            if not stat.S_ISBLK(status.st_mode):
                raise errors.HostError(f"{self._source} is no block device")
        try:
            make_directory(self.pool.path, 0o700)
            fd = opened(self.pool.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                entries = os.listdir(fd)
            finally:
                os.close(fd)
        except OSError as exc:
            raise errors.HostError(f"Cannot use {self.pool.path} as a mount point: {exc.strerror}") from exc
        if entries:
            raise errors.HostError(
                f"{self.pool.path} isn't empty: what is in it would be hidden below the mount",
                hint="Move it away, or mount somewhere else.",
            )
