# SPDX-License-Identifier: LGPL-2.1-or-later
"""One job: a child that works on a volume, and goes on whatever becomes of the daemon.

    being begun   nothing, or what `Backend.sweep` removes
    running       record, slots and unit: adopted by the next daemon
    ended         the same; its result is taken up then, twice if need be
    over          record with the verdict; what is left of the child is put away

A job without a program (an upload) waits for a client, and has a record only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ... import errors
from ...children import ending
from ...children.child import Child, Services
from ...children.launch import Launch, identified
from ...children.programs import ENVIRONMENT
from ...paths import names
from ...records import Record, Records, now
from ...replies import storage as replies
from ...systemd.units import CLD_EXITED, UnitSpec, signal_name, unit_name
from .backend import Meta

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ...children.child import Ends
    from ...paths import Paths
    from ...systemd.units import UnitState

log = logging.getLogger(__name__)

DRIVER = "storage"
SLICE = "virtd-storage.slice"
PATIENCE = 5.0  # seconds between SIGTERM and SIGKILL
KEPT = 32  # verdicts that are kept for whoever asks later
# qemu-img(1): how a check ends that finds nothing but clusters which nobody uses. They cost space, and nothing else.
LEAKED = 3
CORRUPT = 2
CHECKING = frozenset({"import", "adopt", "upload"})
_PROGRESS = rb"\((\d+(?:\.\d+)?)/100%\)"


class State(StrEnum):
    """What a job is doing."""

    RUNNING = "running"
    WAITING = "waiting"  # for its client
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @classmethod
    def of(cls, word: str) -> State:
        """The state of that name; a word of a newer version counts as running: its unit will tell."""
        return cls(word) if word in cls.__members__.values() else cls.RUNNING


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a job is for, as its record has it.

    `meta`: of the volume that it makes (None: it makes none). `reads` and `writes`: the volumes, "POOL/NAME", that
    nobody may write or use meanwhile.
    """

    verb: str
    pool: str
    volume: str
    by: str
    token: str = ""
    meta: Meta | None = None
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    size: int | None = None
    undo: bool = True  # whether what it made goes away when it fails; else the volume is damaged then
    note: str = ""


class Program(NamedTuple):
    """What a job runs: as whom, and in which sandbox.

    `source`: the descriptor that is to be its standard input, and stays the caller's; -1: nothing that it reads.
    """

    argv: tuple[str, ...]
    properties: tuple[tuple[str, str, Any], ...]
    user: str = ""
    group: str = ""
    source: int = -1


class Shared(NamedTuple):
    """What all jobs have in common. `concluded(job, ok)` carries out what the end means; it may raise VirtdError."""

    services: Services
    records: Records
    boot_id: str
    concluded: Callable[[Job, bool], Awaitable[None]]
    published: Callable[[Job], None]


class Job:
    """See the module. `over` is set when there is a verdict and everything is put away."""

    def __init__(self, shared: Shared, name: str, task: Task) -> None:
        self.shared = shared
        self.name = name
        self.task = task
        self.record: Record | None = None
        self.child: Child | None = None
        self.over = asyncio.Event()
        self.problem = ""
        self.result = ""  # what a tool wrote
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def unit(self) -> str:
        return unit_name(DRIVER, self.name)

    @property
    def state(self) -> State:
        return State.of(self.record.state) if self.record is not None else State.RUNNING

    @property
    def alive(self) -> bool:
        return self.state in (State.RUNNING, State.WAITING)

    @property
    def cancelled(self) -> str:
        """By whom; "" when nobody has cancelled it."""
        return str(self.record.data.get("cancelled", "")) if self.record is not None else ""

    @property
    def error(self) -> str:
        return str(self.record.data.get("error", "")) if self.record is not None else ""

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
            since=record.since if record is not None else None,
            pid=record.main_pid if record is not None and record.main_pid and self.alive else None,
            error=self.error,
        )

    def progress(self) -> float | None:
        """Percent, as far as the program has told."""
        if self.state is State.DONE:
            return 100.0
        if self.child is None:
            return None
        found = re.findall(_PROGRESS, self.output(1024))
        return float(found[-1]) if found else None

    def output(self, last: int = 1 << 20) -> bytes:
        """The end of what the program wrote to stdout."""
        return _tail(self.shared.services.paths.console_log(DRIVER, self.name), last)

    def words(self) -> str:
        """What it wrote to stderr, without the program's name."""
        text = _tail(self.shared.services.paths.stderr_log(DRIVER, self.name), 4096).decode(errors="replace")
        lines = [line.removeprefix("qemu-img: ").strip() for line in text.splitlines()]
        return "; ".join(line for line in lines[-3:] if line)

    # Starting

    def save(self, state: State, **changes: Any) -> None:
        """Raises HostError; the record is then as before."""
        before = self.record
        data = {"task": msgspec.to_builtins(self.task)}
        if before is None:
            before = Record(
                driver=DRIVER, name=self.name, uuid="", state=state.value, reason=self.task.verb, since=now(),
                boot_id=self.shared.boot_id, data=data,
            )  # fmt: skip
        record = msgspec.structs.replace(before, state=state.value, **changes)
        self.shared.records.save(record)
        self.record = record

    def wait_for_client(self) -> None:
        """A job without a program."""
        self.save(State.WAITING)
        self.shared.published(self)

    async def run(self, program: Program) -> None:
        """Start the program; whatever fails is undone, but for what the job was to fill. Raises VirtdError."""
        await _Launch(self, program).launch()
        self.shared.published(self)
        self.watch()

    def watch(self) -> None:
        """Wait for the end in the background."""
        assert self.child is not None
        self.spawn(ending.watch(self.child, self.finish, self._held_up))

    def _held_up(self, exc: errors.VirtdError) -> None:
        self.problem = f"{self.task.verb} of {self.task.volume} has ended, but isn't finished: {exc.message}"

    async def undo(self, before: Record | None) -> None:
        """It didn't begin, and is as before."""
        await self._put_away()
        if before is None:
            self.shared.records.remove(self.name)
            self.record = None
            self.over.set()
        elif self.state.value != before.state:
            self.save(State.of(before.state))

    # Taking it back

    @classmethod
    def of(cls, shared: Shared, record: Record) -> Job:
        """The job that a record tells of. Raises ValueError."""
        try:
            task = msgspec.convert(record.data.get("task"), Task)
        except msgspec.ValidationError as exc:
            raise ValueError(str(exc)) from exc
        job = cls(shared, record.name, task)
        job.record = record
        if not job.alive and not record.unit and not record.slots:
            job.over.set()
        elif job.state is not State.WAITING:
            job.child = Child.adopt(shared.services, record)
        return job

    async def reconcile(self) -> str:
        """Second step of a start: "adopted", "ended", or "" for what is over."""
        if self.state is State.WAITING or self.over.is_set():
            return ""
        if not self.alive:
            await self._put_away()
            self.over.set()
            return ""
        assert self.child is not None
        if self.child.alive():
            self.watch()
            return "adopted"
        units = await self.shared.services.units()
        state = await units.state(self.unit)
        if state is not None and state.running:
            # Killed between the start of the unit and the record of its PID.
            self.child.identify(state)
            self.save(State.RUNNING, **identified(self.child))
            self.watch()
            return "adopted"
        await self.finish()
        return "ended"

    # Its end

    async def cancel(self, by: str) -> bool:
        """Have it end; False when it has ended already."""
        if not self.alive:
            return False
        assert self.record is not None
        self.save(self.state, data=self.record.data | {"cancelled": by})
        if self.state is State.WAITING:
            await self.conclude(ok=False, error=f"cancelled by {by}")
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
        """The program has ended: take up its result."""
        if not self.alive or self.child is None:
            return
        unit = await self.child.verdict()
        if unit is not None and unit.running:
            raise errors.Busy(f"{self.unit} was started again by somebody", hint=f"systemctl stop {self.unit}")
        await self.child.drain()
        good = (0, LEAKED) if self.task.verb in CHECKING else (0,)
        ok = unit is not None and unit.exec_code == CLD_EXITED and unit.exec_status in good
        await self.conclude(ok=ok, error="" if ok else self._why(unit))
        self.problem = ""

    def _why(self, unit: UnitState | None) -> str:
        if self.cancelled:
            return f"cancelled by {self.cancelled}"
        if self.task.verb in CHECKING and unit is not None and unit.exec_status == CORRUPT:
            return "the image is corrupt"
        if words := self.words():
            return words
        if unit is None or not unit.exec_code:
            return "its unit has gone, and with it how it ended"
        if unit.result == "oom-kill":
            return "it was killed, because memory ran out"
        if unit.exec_code != CLD_EXITED:
            return f"it was killed by {signal_name(unit.exec_status)}"
        return f"it ended with exit status {unit.exec_status}"

    async def conclude(self, *, ok: bool, error: str = "") -> None:
        """Carry out what the end means, say so on record, then put away what is left."""
        assert self.record is not None
        try:
            await self.shared.concluded(self, ok)
        except errors.TimedOut:
            raise  # the file system doesn't answer: tried again
        except errors.VirtdError as exc:
            ok, error = False, error or exc.message
            with contextlib.suppress(errors.VirtdError):
                await self.shared.concluded(self, False)
        state = State.DONE if ok else State.CANCELLED if self.cancelled else State.FAILED
        data = self.record.data | {"error": "" if ok else error}
        self.save(state, data=data, since=now(), main_pid=0, main_start=0)
        if self.task.verb == "tool":
            self.result = self.output().decode(errors="replace")
        await self._put_away()
        self.over.set()
        self.shared.published(self)

    async def _put_away(self) -> None:
        """What a child that has ended leaves, and its logs. What can't be done now is done later. Repeatable."""
        child = self.child or Child(self.shared.services, DRIVER, self.name)
        self.child = None
        if left := await self._clear(child):
            log.warning("%s is put away later: %s", self.unit, "; ".join(map(str, left)))
            self.spawn(self._clear_later(child))

    async def _clear(self, child: Child) -> list[Exception]:
        left = await ending.put_away(child)
        if not left:
            remove_logs(self.shared.services.paths, self.name)
            if self.record is not None and (self.record.unit or self.record.slots):
                with contextlib.suppress(errors.HostError):
                    self.save(self.state, **ending.GONE)
        return left

    async def _clear_later(self, child: Child) -> None:
        while True:
            await asyncio.sleep(ending.AGAIN)
            if not await self._clear(child):
                return

    # Tasks

    def spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work, name=self.name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("%s failed: %s", self.name, exc, exc_info=exc)
            self.problem = f"{self.name} failed: {exc}"

    async def close(self) -> None:
        """Let go of it in this process; it goes on."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.child is not None:
            await self.child.close()


class _Launch(Launch):
    """The beginning of a job's program."""

    def __init__(self, job: Job, program: Program) -> None:
        task = job.task
        super().__init__(
            Child(job.shared.services, DRIVER, job.name),
            f"Cannot {task.verb} {task.volume}",
            f"{job.name}, {task.verb} of {task.volume} in pool {task.pool},",
            {"VIRTD_DRIVER": DRIVER, "VIRTD_NAME": job.name, "VIRTD_UUID": ""},
        )
        self.job = job
        self.program = program
        self.before = job.record

    def remember(self, promise: dict[str, Any]) -> None:
        self.job.save(State.RUNNING, **promise)

    def begin(self) -> None:
        self.job.child = self.child

    def prepare(self, ends: Ends) -> None:
        if self.program.source >= 0:
            ends.stdio = (self.program.source, *ends.stdio[1:])

    def spec(self) -> UnitSpec:
        task, program = self.job.task, self.program
        return UnitSpec(
            name=self.job.unit,
            description=f"{task.verb} {task.volume} in pool {task.pool}",
            slice=SLICE,
            argv=program.argv,
            environment=ENVIRONMENT,
            user=program.user,
            group=program.group,
            properties=program.properties,
        )

    def know(self, identity: dict[str, Any]) -> None:
        self.job.save(State.RUNNING, **identity)

    async def failed(self, _why: BaseException) -> None:
        await self.job.undo(self.before)

    def trouble(self, text: str) -> None:
        self.job.problem = text


def logged(paths: Paths) -> set[str]:
    """The jobs that have logs."""
    return {name.removesuffix(".console") for name in names(f"{paths.log}/{DRIVER}", ".log")}


def remove_logs(paths: Paths, name: str) -> None:
    for log_file in (paths.console_log(DRIVER, name), paths.stderr_log(DRIVER, name)):
        for path in (log_file, *(f"{log_file}.{number}" for number in range(1, 4))):
            with contextlib.suppress(OSError):
                os.unlink(path)


def _tail(path: str, last: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - last))
            return file.read(last)
    except OSError:
        return b""
