# SPDX-License-Identifier: LGPL-2.1-or-later
"""File system work outside the event loop: a server that doesn't answer blocks a thread, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

from ... import errors
from ...text import span

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
LIMIT = 20.0  # seconds for what is quick on any file system that answers


class _Work(Generic[T]):
    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self.value: T | None = None
        self.error: BaseException | None = None

    def run(self, done: Callable[[], object]) -> None:
        try:
            self.value = self._work()
        except BaseException as exc:
            self.error = exc
        done()


class Aside:
    """Runs functions for one pool, each in a thread of its own.

    While one of them hangs in the kernel no other is started: a dead server must not use up a thread per question.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._stuck: set[threading.Thread] = set()

    async def __call__(self, work: Callable[[], T], *, limit: float | None = LIMIT) -> T:
        """Return or raise what `work` does. Raises TimedOut after `limit` seconds, and leaves its thread behind."""
        self._stuck = {thread for thread in self._stuck if thread.is_alive()}
        if self._stuck:
            raise errors.TimedOut(f"{self._what} doesn't answer", hint="Is its server up, its device still there?")
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        job = _Work(work)

        def done() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, so nobody waits any more
                loop.call_soon_threadsafe(over.set)

        thread = threading.Thread(target=job.run, args=(done,), name="storage", daemon=True)
        thread.start()
        try:
            async with asyncio.timeout(limit):
                await over.wait()
        except TimeoutError:
            self._stuck.add(thread)
            raise errors.TimedOut(
                f"{self._what} doesn't answer within {span(limit or 0)}",
                hint="Is its server up, its device still there?",
            ) from None
        if job.error is not None:
            raise job.error
        return job.value  # type: ignore[return-value]
