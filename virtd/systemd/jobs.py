# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting for systemd: for the end of its jobs, and for what it notices a moment later."""

from __future__ import annotations

import asyncio

from .. import errors
from ..text import span


class Jobs:
    """How the jobs of one unit ended, by path."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._results: dict[str, str] = {}
        self._changed = asyncio.Event()

    def removed(self, job: str, result: str) -> None:
        self._results[job] = result
        self._changed.set()

    async def wait(self, job: str | None, timeout: float) -> str:
        """Wait for the end of that job, or, where its path isn't known, of the first one."""
        try:
            async with asyncio.timeout(timeout):
                while not (job in self._results or (job is None and self._results)):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as exc:
            raise errors.TimedOut(f"systemd's job for {self._unit} did not end within {span(timeout)}") from exc
        return next(iter(self._results.values())) if job is None else self._results[job]


class Patience:
    """Pauses between one question and the next, ever longer ones; TimedOut in the end."""

    def __init__(self, timeout: float, complaint: str) -> None:
        self._timeout = timeout
        self._complaint = complaint
        self._deadline = asyncio.get_running_loop().time() + timeout
        self._pause = 0.002

    async def pause(self) -> None:
        if asyncio.get_running_loop().time() > self._deadline:
            raise errors.TimedOut(f"{self._complaint} within {span(self._timeout)}")
        await asyncio.sleep(self._pause)
        self._pause = min(self._pause * 2, 0.25)
