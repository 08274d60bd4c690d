# SPDX-License-Identifier: LGPL-2.1-or-later
"""One operation at a time on each object, and waiting with a time limit."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from .. import errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PATIENCE = 60.0  # seconds


class Turns:
    """`whose` is the object's name for a person; `patience` is how many seconds an operation waits for another."""

    def __init__(self, whose: str, patience: float = PATIENCE) -> None:
        self._whose = whose
        self._patience = patience
        self._lock = asyncio.Lock()
        self._holder = ""

    @contextlib.asynccontextmanager
    async def take(self, what: str) -> AsyncIterator[None]:
        """Let one operation through. The next one waits, and raises Busy if that takes too long."""
        try:
            async with asyncio.timeout(self._patience):
                await self._lock.acquire()
        except TimeoutError:
            raise errors.Busy(f"Cannot {what} {self._whose}: it is still busy ({self._holder})") from None
        self._holder = what
        try:
            yield
        finally:
            self._holder = ""
            self._lock.release()

    @property
    def taken(self) -> bool:
        return self._lock.locked()


async def within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for `event` for at most `seconds`; whether it is set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


async def first_of(*events: asyncio.Event, limit: float | None = None) -> None:
    """Wait until one of the events is set, or for `limit` seconds."""
    tasks = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
