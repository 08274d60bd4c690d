# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers that cost much, shared by all who may only ask.

Who asks while one is being found out gets that one, and who asks shortly afterwards as well. Root's are always made
for root, so that nobody can have it told something old.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

FRESH = 1.0  # seconds for which an answer is good
REST = 4.0  # times as long as it took: finding it out takes a fifth of the time at most
ENTRIES = 16


class Sharing:
    """Answers by what was asked."""

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Task[Any]] = {}
        self._known: dict[Hashable, tuple[float, Any]] = {}

    async def get(self, key: Hashable, find: Callable[[], Awaitable[Any]]) -> Any:
        """The answer to `key`, which `find` finds out; what that raises, all who wait for it get."""
        known = self._known.get(key)
        if known is not None and known[0] > time.monotonic():
            return known[1]
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.create_task(self._find(key, find), name="shared-answer")
            # One that nobody waits for any more has its end looked at here.
            task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        return await asyncio.shield(task)

    async def _find(self, key: Hashable, find: Callable[[], Awaitable[Any]]) -> Any:
        begun = time.monotonic()
        try:
            answer = await find()
            now = time.monotonic()
            self._known.pop(key, None)
            while len(self._known) >= ENTRIES:
                del self._known[next(iter(self._known))]
            self._known[key] = (now + max(FRESH, REST * (now - begun)), answer)
            return answer
        finally:
            del self._running[key]
            # What is old isn't kept: a listing may be large.
            asyncio.get_running_loop().call_later(2 * FRESH, self._forget)

    def _forget(self) -> None:
        now = time.monotonic()
        for key in [key for key, (until, _) in self._known.items() if until <= now]:
            del self._known[key]

    async def close(self) -> None:
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
