# SPDX-License-Identifier: LGPL-2.1-or-later
"""One job: a child that works on a volume, whatever happens to the daemon. What exists of one that is

    starting   nothing, or what `Backend.sweep` removes
    running    record, slots and unit: adopted by the next daemon
    ended      the same: its result is used then, twice if need be
    over       a record with the verdict; what is left of the child is put away

A job without a program (an upload) waits for a client, and has a record only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ... import errors
from ...children import ending
from ...children.child import Child, Services
from ...objects.persistent import Tasks
from ...objects.protocol import Problem
from ...records import Record, Records, now
from ...replies import storage as replies
from ...systemd.names import unit_name
from .joblog import JobLog
from .task import DRIVER, TOOL, Data, State, Task
from .verdict import why_failed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from typing import Unpack

    from ...records import Process

log = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds between SIGTERM and SIGKILL


class Shared(NamedTuple):
    """What all jobs share. `concluded(job, ok)` carries out what the end means for the pool; raises a VirtdError."""

    services: Services
    records: Records
    boot_id: str
    concluded: Callable[[Job, bool], Awaitable[None]]
    published: Callable[[Job], None]


class Job:
    """See the module. `over` is set when there is a verdict and everything is put away.

    Its record is in memory from the start, and on disk from the first `save` until it is forgotten (`recorded`).
    """

    def __init__(self, shared: Shared, name: str, data: Data, record: Record | None = None) -> None:
        self.shared = shared
        self.name = name
        self.data = data
        self.recorded = record is not None
        self.record = record or Record(
            driver=DRIVER, name=name, uuid="", state=State.RUNNING.value, reason=data.task.verb, since=now(),
            boot_id=shared.boot_id,
        )  # fmt: skip
        self.log = JobLog(shared.services.paths, name)
        self.child: Child | None = None
        self.over = asyncio.Event()
        self.problems: dict[str, Problem] = {}
        self.result = ""  # what a tool wrote to stdout
        self._tasks = Tasks(name, self.problems)

    @property
    def task(self) -> Task:
        return self.data.task

    @property
    def unit(self) -> str:
        return unit_name(DRIVER, self.name)

    @property
    def state(self) -> State:
        return State.of(self.record.state)

    @property
    def alive(self) -> bool:
        return self.state in (State.RUNNING, State.WAITING)

    def describe(self) -> replies.Job:
        record = self.record
        return replies.Job(
            job=self.name,
            verb=self.task.verb,
            pool=self.task.pool,
            volume=self.task.volume,
            state=self.state.value,
            progress=self.progress(),
            by=self.task.by,
            since=record.since,
            pid=record.main_pid if record.main_pid and self.alive else None,
            error=self.data.error,
        )

    def progress(self) -> float | None:
        """Percent, as far as the program has reported it."""
        if self.state is State.DONE:
            return 100.0
        return self.log.progress() if self.child is not None else None

    # Its record

    def save(self, state: State, data: Data | None = None, since: str = "", **changes: Unpack[Process]) -> None:
        """`since`: when it entered the state, if it did only now. Raises HostError, and changes nothing then."""
        data = data or self.data
        known = self.record.data | msgspec.to_builtins(data)
        since = since or self.record.since
        record = msgspec.structs.replace(self.record, state=state.value, data=known, since=since, **changes)
        self.shared.records.save(record)
        self.record, self.data, self.recorded = record, data, True

    def forget(self) -> None:
        """Remove the record; it isn't written again."""
        self.recorded = False
        with contextlib.suppress(errors.HostError):
            self.shared.records.remove(self.name)

    # Starting: a program's first steps are in launching.py

    def wait_for_client(self) -> None:
        """A job without a program."""
        self.save(State.WAITING)
        self.shared.published(self)

    def begun(self, child: Child) -> None:
        """Its program runs: wait for the end in the background."""
        self.shared.published(self)
        self.watch(child)

    def watch(self, child: Child) -> None:
        self.spawn(ending.watch(child, self.finish, self._held_up), "watch")

    def _held_up(self, exc: errors.VirtdError) -> None:
        text = f"{self.task.verb} of {self.task.volume} has ended, but isn't finished: {exc.message}"
        self.problems["end"] = Problem(text)

    # Taking it back

    @classmethod
    def of(cls, shared: Shared, record: Record) -> Job:
        """The job that a record describes. Raises ValueError."""
        try:
            data = msgspec.convert(record.data, Data)
        except msgspec.ValidationError as exc:
            raise ValueError(str(exc)) from exc
        job = cls(shared, record.name, data, record)
        if not job.alive and not record.unit and not record.slots:
            job.over.set()
        elif job.state is not State.WAITING:
            job.child = Child.adopt(shared.services, record)
        return job

    async def reconcile(self) -> str:
        """Second step of a start: "adopted", "ended", or "" for what is over."""
        if self.state is State.WAITING or self.over.is_set():
            return ""
        child = self.child
        if not self.alive or child is None:
            await self.put_away()
            self.over.set()
            return ""
        if child.alive():
            self.watch(child)
            return "adopted"
        units = await self.shared.services.units()
        state = await units.state(self.unit)
        if state is not None and state.running:
            # Killed between the start of the unit and the record of its PID.
            child.identify(state)
            self.save(State.RUNNING, **child.identity())
            self.watch(child)
            return "adopted"
        await self.finish()
        return "ended"

    # Its end

    async def cancel(self, by: str) -> bool:
        """End it; False if it has ended already."""
        if not self.alive:
            return False
        self.save(self.state, msgspec.structs.replace(self.data, cancelled=by))
        if self.state is State.WAITING:
            await self.conclude(f"cancelled by {by}")
            return True
        units = await self.shared.services.units()
        for signum in (15, 9):
            with contextlib.suppress(errors.NotFound):
                await units.kill(self.unit, signum)
            try:
                async with asyncio.timeout(PATIENCE):
                    await self.over.wait()
                    return True
            except TimeoutError:
                continue
        await self.over.wait()
        return True

    async def finish(self) -> None:
        """The program has ended: use its result."""
        child = self.child
        if not self.alive or child is None:
            return
        unit = await child.verdict()
        if unit is not None and unit.running:
            raise errors.Busy(f"{self.unit} was started again by somebody", hint=f"systemctl stop {self.unit}")
        await child.drain()
        await self.conclude(why_failed(self.task.verb, unit, self.data.cancelled, self.log.words()))
        self.problems.pop("end", None)

    async def conclude(self, error: str = "") -> None:
        """Carry out what the end means, put that on record, then put away what is left. `error`: why it failed."""
        try:
            await self.shared.concluded(self, not error)
        except errors.TimedOut:
            raise  # the file system doesn't answer: tried again
        except errors.VirtdError as exc:
            error = error or exc.message
            with contextlib.suppress(errors.VirtdError):
                await self.shared.concluded(self, False)
        state = State.DONE if not error else State.CANCELLED if self.data.cancelled else State.FAILED
        data = msgspec.structs.replace(self.data, error=error)
        self.save(state, data, since=now(), main_pid=0, main_start=0)
        if self.task.verb == TOOL:
            self.result = self.log.output().decode(errors="replace")
        await self.put_away()
        self.over.set()
        self.shared.published(self)

    async def put_away(self) -> None:
        """Put away what an ended child leaves, and its logs. What can't be done now is done later. Repeatable."""
        child = self.child or Child(self.shared.services, DRIVER, self.name)
        self.child = None
        if left := await self._clear(child):
            log.warning("%s is put away later: %s", self.unit, "; ".join(map(str, left)))
            self.spawn(self._clear_later(child), "put-away")

    async def _clear(self, child: Child) -> list[Exception]:
        left = await ending.put_away(child)
        if not left:
            self.log.remove()
            if self.recorded and (self.record.unit or self.record.slots):
                with contextlib.suppress(errors.HostError):
                    self.save(self.state, **ending.GONE)
        return left

    async def _clear_later(self, child: Child) -> None:
        while True:
            await asyncio.sleep(ending.AGAIN)
            if not await self._clear(child):
                return

    # Tasks

    def spawn(self, work: Coroutine[object, object, None], name: str) -> None:
        self._tasks.spawn(work, name)

    async def close(self) -> None:
        """Let go of it in this process; the job goes on."""
        await self._tasks.end_tasks()
        if self.child is not None:
            await self.child.close()
