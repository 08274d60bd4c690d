# SPDX-License-Identifier: LGPL-2.1-or-later
"""The content of a unit's FD store in PID 1, requested once for all concurrent callers."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, TypeAlias

from .bus import BusError
from .names import MANAGER, MANAGER_PATH, SYSTEMD
from .repeating import repeated

if TYPE_CHECKING:
    from collections.abc import Container

    from .bus import Bus, Table

# Name, device and inode of each descriptor in an FD store.
StoreEntries: TypeAlias = list[tuple[str, int, int]]


class Dumps:
    """Callers that arrive during a request (guests being started) share the next one.

    A dump has an entry for every slot of every guest, so one request serves all of these callers.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._next: dict[str, asyncio.Future[Table | None]] = {}
        self._asking = asyncio.Lock()

    async def get(self, unit: str, names: Container[str] | None) -> StoreEntries | None:
        """See Units.store_dump."""
        dump = self._next.get(unit)
        if dump is None:
            dump = self._next[unit] = asyncio.ensure_future(self._dump(unit))
        table = await asyncio.shield(dump)
        if table is None:
            return None
        # Of (name, mode, major, minor, inode, ...).
        found = table.rows((0, 2, 3, 4), names)
        return [(name, os.makedev(major, minor), inode) for name, major, minor, inode in found]

    async def _dump(self, unit: str) -> Table | None:
        async with self._asking:
            del self._next[unit]  # callers that arrive from here on need a later one
            try:
                return await repeated(
                    lambda: self._bus.table(
                        SYSTEMD, MANAGER_PATH, MANAGER, "DumpUnitFileDescriptorStore", "s", (unit,)
                    )
                )
            except BusError as exc:
                if exc.name in ("org.freedesktop.DBus.Error.UnknownMethod", f"{SYSTEMD}.NoSuchUnit"):
                    return None
                raise
