# SPDX-License-Identifier: LGPL-2.1-or-later
"""Expensive answers, shared by all unprivileged callers.

A caller who asks while an answer is being computed, or shortly afterwards, gets that answer. Root's are always
computed afresh, so that nobody can make root get an outdated one.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

FRESH = 1.0  # seconds for which an answer is valid
REST = 4.0  # times as long as it took: computing takes a fifth of the time at most
ENTRIES = 16


class Sharing:
    """Answers by question."""

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Task[Any]] = {}
        self._known: dict[Hashable, tuple[float, Any]] = {}

    async def get(self, key: Hashable, find: Callable[[], Awaitable[Any]]) -> Any:
        """The answer to `key`, which `find` computes; if it raises, all callers that wait get the exception."""
        known = self._known.get(key)
        if known is not None and known[0] > time.monotonic():
            return known[1]
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.create_task(self._find(key, find), name="shared-answer")
            # If nobody waits for it any more, its exception is retrieved here.
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
            # Outdated answers aren't kept: a listing may be large.
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
