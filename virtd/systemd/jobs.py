# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting for systemd: for the end of its jobs, and until it notices a change."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from .. import errors
from ..text import span
from .bus import BusError
from .names import MANAGER, MANAGER_PATH, SYSTEMD
from .repeating import repeated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from .bus import Bus


HUNG = 1.0  # seconds without an answer after which the bus counts as hanging, see bus.PATIENCE


class Jobs:
    """How the jobs of one unit ended, by path. `flush` returns once the bus has answered."""

    def __init__(self, unit: str, flush: Callable[[], Awaitable[None]] | None = None) -> None:
        self._unit = unit
        self._flush = flush
        self._results: dict[str, str] = {}
        self._changed = asyncio.Event()

    def removed(self, job: str, result: str) -> None:
        self._results[job] = result
        self._changed.set()

    async def wait(self, job: str | None, timeout: float) -> str:
        """Wait for the end of that job, or of the first one if its path isn't known.

        If the bus hangs, the signal may be late although the job isn't.
        """
        while not await self._ended(job, timeout):
            if not await self._hung():
                raise errors.TimedOut(f"systemd's job for {self._unit} did not end within {span(timeout)}")
        return next(iter(self._results.values())) if job is None else self._results[job]

    async def _ended(self, job: str | None, timeout: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not (job in self._results or (job is None and self._results)):
                    self._changed.clear()
                    await self._changed.wait()
                return True
        return False

    async def _hung(self) -> bool:
        if self._flush is None:
            return False
        loop = asyncio.get_running_loop()
        asked = loop.time()
        await self._flush()
        return loop.time() - asked >= HUNG


class JobSignals:
    """systemd's signals about the ends of jobs, for callers that wait for one."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._watchers: dict[str, list[Jobs]] = {}
        self._subscribing: asyncio.Future[None] | None = None
        self._unsubscribe: Callable[[], Awaitable[None]] | None = None

    @contextlib.asynccontextmanager
    async def of(self, unit: str) -> AsyncIterator[Jobs]:
        """Record how a unit's jobs end from now on: the signal can arrive before the job's path is known."""
        jobs = Jobs(unit, self._bus.flush)
        watchers = self._watchers.setdefault(unit, [])
        watchers.append(jobs)
        try:
            await self.subscribe()
            yield jobs
        finally:
            watchers.remove(jobs)
            if not watchers:
                self._watchers.pop(unit, None)

    async def subscribe(self) -> None:
        """Make systemd send its signals; requested once, however many starts are concurrent."""
        if self._subscribing is None or (self._subscribing.done() and self._subscribing.exception() is not None):
            self._subscribing = asyncio.ensure_future(self._subscribe())
        # Shielded: the first caller may be cancelled while others wait for the same thing.
        await asyncio.shield(self._subscribing)

    async def close(self) -> None:
        """Idempotent. The Bus stays open."""
        if self._unsubscribe is not None:
            await self._unsubscribe()
            self._unsubscribe = None

    async def _subscribe(self) -> None:
        self._unsubscribe = await self._bus.subscribe(SYSTEMD, MANAGER, "JobRemoved", MANAGER_PATH, self._removed)
        try:
            await repeated(lambda: self._bus.call(SYSTEMD, MANAGER_PATH, MANAGER, "Subscribe", "", ()))
        except BusError as exc:
            if exc.name != f"{SYSTEMD}.AlreadySubscribed":
                await self.close()  # without its signals, everybody would wait in vain
                raise

    def _removed(self, _path: str, _interface: str, _member: str, args: tuple[Any, ...]) -> None:
        _number, job, unit, result = args
        for jobs in self._watchers.get(unit, ()):
            jobs.removed(job, result)


class Patience:
    """Ever longer pauses between attempts; TimedOut in the end.

    Only the pauses count: the time that an answer takes depends on the bus.
    """

    def __init__(self, timeout: float, complaint: str) -> None:
        self._timeout = timeout
        self._complaint = complaint
        self._left = timeout
        self._pause = 0.002

    async def pause(self) -> None:
        if self._left < 0:
            raise errors.TimedOut(f"{self._complaint} within {span(self._timeout)}")
        await asyncio.sleep(self._pause)
        self._left -= self._pause
        self._pause = min(self._pause * 2, 0.25)
