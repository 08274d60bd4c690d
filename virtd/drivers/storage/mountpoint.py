# SPDX-License-Identifier: LGPL-2.1-or-later
"""The file system that a directory pool is on. An empty mount point must not be taken for the pool.

What should be mounted is known from systemd's mount units, which include fstab(5), and, for mounts that systemd
doesn't know of, from the last time that the pool was active: see /var/lib/virtd/storage/NAME.json.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import msgspec

from ... import errors, files, untrusted
from ...hints import do
from ...systemd.names import mount_unit
from . import mounts

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ...hints import Hint
    from ...model import pool as model
    from ...systemd.units import Units

log = logging.getLogger(__name__)

LIMIT = 1 << 16


class Stood(msgspec.Struct, frozen=True):
    """Where a pool was when it was last active. `mountpoint` "" stands for the root file system."""

    path: str
    mountpoint: str


class MountPoint:
    """The mount point of one pool; `memory` is the file that it is remembered in."""

    def __init__(self, pool: model.Pool, memory: str, units: Callable[[], Awaitable[Units]]) -> None:
        self._pool = pool
        self._memory = memory
        self._units = units

    async def require(self) -> None:
        """Raise HostError while the pool's file system isn't mounted."""
        if missing := self.missing():
            raise errors.HostError(missing, hint=self._hint())
        units, there = await self._units(), mounts.table()
        for where in above(os.path.realpath(self._pool.path)):
            unit = mount_unit(where)
            if where not in there and await units.unit_property(unit, "LoadState") == "loaded":
                raise errors.HostError(
                    f"{where} isn't mounted, and pool {self._pool.name} ({self._pool.path}) is on it",
                    hint=f"systemctl start '{unit}' mounts it.",
                )

    def missing(self) -> str:
        """Why the file system that the pool was on isn't there, or ""."""
        stood = self._stood()
        if stood is None or stood.path != self._pool.path or not stood.mountpoint:
            return ""
        if mounts.mounted(stood.mountpoint) is not None:
            return ""
        return f"{stood.mountpoint}, which pool {self._pool.name} ({self._pool.path}) was on, isn't mounted"

    def remember(self) -> None:
        """Record where the pool is, now that it is active."""
        there = mounts.table()
        mountpoint = next((where for where in above(os.path.realpath(self._pool.path)) if where in there), "")
        stood = Stood(self._pool.path, mountpoint)
        if stood == self._stood():
            return
        try:
            os.makedirs(os.path.dirname(self._memory), mode=0o700, exist_ok=True)
            files.write(self._memory, msgspec.json.encode(stood))
        except (OSError, errors.HostError) as exc:  # the next start checks less
            log.warning("Which file system pool %s is on isn't on record: %s", self._pool.name, exc)

    def _stood(self) -> Stood | None:
        try:
            return msgspec.json.decode(untrusted.read(self._memory, LIMIT), type=Stood)
        except (OSError, msgspec.MsgspecError, ValueError):
            return None

    def _hint(self) -> Hint:
        name = self._pool.name
        return (
            "Mount it. Should the pool be in the directory itself from now on: "
            + do("undefine", "pool", name)
            + ", and define it again; its volumes stay."
        )


def above(path: str) -> list[str]:
    """`path` and the directories that it is in, the nearest first, without the root."""
    parts = path.strip("/").split("/")
    return ["/" + "/".join(parts[:count]) for count in range(len(parts), 0, -1) if parts[0]]
