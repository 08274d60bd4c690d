# SPDX-License-Identifier: LGPL-2.1-or-later
"""What PID 1 holds in a unit's FD store, asked once for all who want to know at the same time."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, TypeAlias

from .bus import BusError
from .names import MANAGER, MANAGER_PATH, SYSTEMD

if TYPE_CHECKING:
    from collections.abc import Container

    from .bus import Bus, Table

# Name, device and inode of each descriptor in an FD store.
StoreEntries: TypeAlias = list[tuple[str, int, int]]


class Dumps:
    """Callers that come while an answer is awaited (guests being started) share the next one.

    A dump has an entry for every slot of every guest, so one is asked for after the last of them came.
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
            del self._next[unit]  # whoever comes from here on needs a later one
            try:
                return await self._bus.table(
                    SYSTEMD, MANAGER_PATH, MANAGER, "DumpUnitFileDescriptorStore", "s", (unit,)
                )
            except BusError as exc:
                if exc.name in ("org.freedesktop.DBus.Error.UnknownMethod", f"{SYSTEMD}.NoSuchUnit"):
                    return None
                raise
