# SPDX-License-Identifier: LGPL-2.1-or-later
"""After a rotation: making a log's slot follow the log to its new file.

The slot may lag behind: the log is found by its path all the same.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING

from .. import fdstore

if TYPE_CHECKING:
    from ..fdstore import Store

log = logging.getLogger(__name__)

EVERY = 1.0  # seconds between two renewals of one slot: a log that rotates all the time must not keep PID 1 busy


class Renewal:
    """Renews the slots of one child's logs. Create it on the event loop, and end it with `close`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._fresh: dict[str, int] = {}  # by slot: the new file, until the slot has it
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def rotated(self, slot: str, fd: int) -> None:
        """A log continues in the file `fd`, which remains the caller's. Called in the pump's thread, which mustn't
        wait for PID 1.
        """
        self._loop.call_soon_threadsafe(self._renew, slot, os.dup(fd))

    async def close(self) -> None:
        """Idempotent. Slots that haven't been renewed yet stay as they are."""
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _renew(self, slot: str, fd: int) -> None:
        """Runs on the loop: the newest file wins."""
        if (older := self._fresh.pop(slot, None)) is not None:
            os.close(older)
        self._fresh[slot] = fd
        if slot not in self._tasks:
            self._tasks[slot] = asyncio.create_task(self._renew_slot(slot), name=f"renew-{slot}")

    async def _renew_slot(self, slot: str) -> None:
        try:
            while (fd := self._fresh.pop(slot, None)) is not None:
                putting = asyncio.ensure_future(asyncio.to_thread(self._store.put, slot, fd))
                try:
                    await asyncio.shield(putting)
                except asyncio.CancelledError:
                    # The thread continues: its slot must be there before anybody drops it, and the descriptor must
                    # stay open.
                    await asyncio.wait([putting])
                    raise
                except fdstore.StoreError as exc:
                    log.warning("Slot %s still holds the log before its rotation: %s", slot, exc)
                finally:
                    os.close(fd)
                await asyncio.sleep(EVERY)
        finally:
            if (fd := self._fresh.pop(slot, None)) is not None:
                os.close(fd)
            del self._tasks[slot]
