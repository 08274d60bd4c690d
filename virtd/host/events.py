# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every change of state, numbered, for subscribers that must not miss any, not even when virtd restarts.

An object's record or definition is written first, then the event is logged, and then it is sent. If virtd is killed
between the first two steps, the next daemon notices: before anything else changes, it compares what exists with what
was reported. Each subscriber reads the log at its own pace: one that stops reading costs nothing, and learns that it
has lagged.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from .. import errors
from ..records import now
from .eventlog import EventLog, Told, fingerprint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from ..drivers.loader import Drivers
    from ..replies import Reply
    from ..replies.events import Change

log = logging.getLogger(__name__)

AT_ONCE = 64  # maximum number of events per read of the log
AGAIN = 1.0  # seconds before a failed write of the log is retried
JOB = "job"


class Events:
    """Detects and records events; `jobs()` lists the existing jobs."""

    def __init__(self, path: str, drivers: Drivers, jobs: Callable[[], Iterable[Reply]]) -> None:
        self._log = EventLog(path)
        self._drivers = drivers
        self._jobs = jobs
        self._begun = self._failing = False
        self._wake = asyncio.Event()
        self._again: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Continue where the previous daemon stopped, before anything changes. Calling it again does nothing."""
        if self._begun:
            return
        self._begun = True
        if self._log.open():
            self.compare()
        else:
            self._anew()

    def _anew(self) -> None:
        try:
            self._log.begin({key: fingerprint(item) for key, item in self._present() if item is not None})
        except OSError as exc:
            self._fail(exc)

    def compare(self) -> None:
        """Report whatever differs from what was last reported."""
        there = set()
        for key, item in list(self._present()):
            there.add(key)
            if item is not None:
                self._see(key, item)
        for key in [key for key in self._log.told if key not in there]:
            if key.startswith(f"{JOB}/"):
                self._log.forget(key)  # its result is no longer kept
            else:
                self._see(key, None)

    def _present(self) -> Iterator[tuple[str, Reply | None]]:
        """All objects by key; None for an object whose state isn't known yet."""
        for driver in self._drivers:
            for name, item in driver.known():
                yield f"{driver.noun}/{name}", item
        for job in self._jobs():
            yield f"{JOB}/{job['job']}", job

    def changed(self, kind: str, name: str, item: Reply | None) -> None:
        """A driver reports a change; what has been reported already isn't reported again."""
        if self._begun:
            self._see(f"{kind}/{name}", item)

    def _see(self, key: str, item: Reply | None) -> None:
        before = self._log.told.get(key)
        told: Told | None = fingerprint(item) if item is not None else None
        if told == before or self._again is not None:
            return
        kind, _, name = key.partition("/")
        what = "removed" if item is None else "added" if before is None else "changed"
        try:
            self._log.append(self._change(self._log.last + 1, what, kind, name, item), told)
            self._failing = False
        except OSError as exc:
            self._fail(exc)
        self._rouse()

    def _change(self, sequence: int, what: str, kind: str = "", name: str = "", item: Any = None) -> Change:
        state = item["state"] if item is not None else None
        reason = (item["error"] if kind == JOB else item["reason"]) if item is not None else None
        from ..replies.events import Change  # imported on first use, which saves a restart up to a millisecond

        return Change(
            sequence=sequence, at=now(), change=what, kind=kind, name=name, state=state, reason=reason, object=item
        )

    def _rouse(self) -> None:
        self._wake.set()
        self._wake = asyncio.Event()

    def _fail(self, exc: OSError) -> None:
        """Events are lost from now on. A later log starts with larger numbers, so subscribers notice that they
        lagged.
        """
        if not self._failing:
            self._failing = True
            log.warning("Events can't be recorded: %s", exc.strerror or exc)
        self._again = asyncio.get_running_loop().call_later(AGAIN, self._retry)

    def _retry(self) -> None:
        self._again = None
        self._anew()
        self._rouse()

    async def subscribe(self, since: int | None) -> AsyncIterator[Change]:
        """The events after number `since`, or from now on if None, without end.

        Raises NotFound if they are no longer on record.
        """
        last = self._log.last
        if since is not None and not self._log.first - 1 <= since <= last:
            older = since < self._log.first
            raise errors.NotFound(
                f"The events after {since} are no longer on record" if older else f"There was no event {since}",
                hint=f"List the objects, and continue from {last}; the oldest event on record is {self._log.first}.",
            )
        position = last if since is None else since
        yield self._change(position, "begun")
        while True:
            wake = self._wake
            if position < self._log.first - 1 or position > self._log.last:
                position = self._log.first - 1
                yield self._change(position, "lagged")
            for change in (found := self._log.read(position, AT_ONCE)):
                yield change
                position = change.sequence
            if not found:
                await wake.wait()

    def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
        self._log.close()
