# SPDX-License-Identifier: LGPL-2.1-or-later
"""One guest and its life: what it is, what it was told, how it ended. Every change is on record before it is told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ... import __version__, errors, files, journal
from ...child import Child, Services
from ...logfile import Cursor
from ...messages import Message
from ...model import domain as model
from ...model.state import ALIVE, State
from ...records import Record, Records, now
from ...stderrlog import StderrLog
from ...units import unit_name
from ..protocol import Problem
from . import command, ends
from . import host as hostinfo
from .monitor import Event, Link, Monitor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from ...model.settings import Qemu

log = logging.getLogger(__name__)

DRIVER = "qemu"
PATIENCE = 60.0  # seconds that an operation waits for another one on the same domain
FINISH_AGAIN = 1.0  # seconds until an end that systemd couldn't be asked about is looked into again
GREETING_LIMIT = 5.0  # seconds for the monitor of a guest that runs already


class Shared(NamedTuple):
    """What all guests of the driver share. `publish(event, machine)`: "changed" or "ended"."""

    services: Services
    records: Records
    settings: Qemu
    publish: Callable[[str, Machine], None]
    next_id: Callable[[], int]
    boot_id: str


class Machine:
    """A domain: its definition, its record, and, while it lives, its child.

    Without a definition only a record or a unit is left of it, and it goes when its guest ends.
    """

    def __init__(self, shared: Shared, name: str) -> None:
        self.shared = shared
        self.name = name
        self.definition: model.Domain | None = None
        self.definition_text = ""
        self.record: Record | None = None
        self.child: Child | None = None
        self.monitor: Monitor | None = None
        self.problems: dict[str, Problem] = {}
        self.over = asyncio.Event()  # set while there is no child
        self.over.set()
        self.settled = asyncio.Event()  # cleared while nobody knows yet what became of it
        self.settled.set()
        self.guest_off = (
            asyncio.Event()
        )  # QEMU told that the guest has powered off, and waits (see operations.reboot)
        self.stderr: StderrLog | None = None
        self._lock = asyncio.Lock()
        self._linking = asyncio.Lock()  # held while the monitor is being connected
        self._holder = ""
        self._tasks: set[asyncio.Task[None]] = set()

    # What it is

    @property
    def state(self) -> State:
        return State.of(self.record.state) if self.record is not None else State.STOPPED

    @property
    def reason(self) -> str:
        return self.record.reason if self.record is not None else "not started since boot"

    @property
    def alive(self) -> bool:
        return self.state in ALIVE

    @property
    def uuid(self) -> str:
        if self.definition is not None and self.definition.uuid is not None:
            return self.definition.uuid
        return self.record.uuid if self.record is not None else ""

    @property
    def unit(self) -> str:
        return unit_name(DRIVER, self.name)

    @property
    def runtime(self) -> str:
        return self.shared.services.paths.runtime(DRIVER, self.name)

    @property
    def source(self) -> str:
        """The definition's file."""
        return self.shared.services.paths.definition(DRIVER, self.name)

    @property
    def running_definition(self) -> model.Domain | None:
        """The definition that the guest was started with, or the present one when it isn't running."""
        if self.pending and self.record is not None and (text := self.record.data.get("definition")):
            with contextlib.suppress(errors.InvalidDefinition):
                return self.parsed(text) or model.parse(text, self.source)
        return self.definition

    def parsed(self, text: str) -> model.Domain | None:
        """The definition that `text` holds, if the guest was started with it by this version of virtd.

        The record has it in a form that takes microseconds to read, where TOML takes a millisecond for each guest.
        """
        data = self.record.data if self.record is not None else {}
        if data.get("definition") != text or data.get("parsed_by") != __version__:
            return None
        try:
            return msgspec.convert(data.get("parsed"), model.Domain)
        except msgspec.ValidationError:
            return None

    @property
    def pending(self) -> bool:
        """Whether the definition was changed since the guest started, so that the change waits for the next start."""
        return bool(
            self.alive and self.record is not None and self.record.data.get("definition") != self.definition_text
        )

    @property
    def request(self) -> ends.Request | None:
        asked = self.record.data.get("request") if self.record is not None else None
        return ends.Request(asked["verb"], asked["by"], asked["at"]) if asked else None

    def fields(self) -> dict[str, str]:
        """The journal fields of this object."""
        return {"VIRTD_DRIVER": DRIVER, "VIRTD_NAME": self.name, "VIRTD_UUID": self.uuid, "VIRTD_UNIT": self.unit}

    # One operation at a time

    @contextlib.asynccontextmanager
    async def exclusive(self, what: str) -> AsyncIterator[None]:
        """Let one operation through; the next waits, and is told who holds it when that takes too long."""
        await self.settled.wait()
        try:
            async with asyncio.timeout(PATIENCE):
                await self._lock.acquire()
        except TimeoutError:
            raise errors.Busy(f"Cannot {what} {self.name}: it is still busy ({self._holder})") from None
        self._holder = what
        try:
            yield
        finally:
            self._holder = ""
            self._lock.release()

    def spawn(self, work: Any, name: str) -> None:
        """A task of this machine's; it is cancelled by `close`."""
        task: asyncio.Task[None] = asyncio.create_task(work, name=f"{name}-{self.name}")
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("%s: %s failed: %s", self.name, task.get_name(), exc, exc_info=exc)
            self.problems["internal"] = Problem(
                f"{task.get_name()} failed: {exc}", "This is a bug: see journalctl -u virtd."
            )

    async def close(self) -> None:
        """Let go of everything in this process; the guest, its slots and its record stay."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.monitor is not None:
            await self.monitor.close()
        if self.child is not None:
            await self.child.close()

    # The record

    def save(self, **changes: Any) -> None:
        """Change the record and write it. Raises HostError; what is in memory is then as before."""
        assert self.record is not None
        record = msgspec.structs.replace(self.record, **changes)
        self.shared.records.save(record)
        self.record = record

    def note(self, state: State, reason: str, **changes: Any) -> None:
        """Go into a state that came about by itself: in memory for certain, on record if the file system lets us."""
        assert self.record is not None
        if (state.value, reason) != (self.record.state, self.record.reason) or changes:
            changes.setdefault("since", now() if state.value != self.record.state else self.record.since)
            record = msgspec.structs.replace(self.record, state=state.value, reason=reason, **changes)
            self.record = record
            try:
                self.shared.records.save(record)
                self.problems.pop("record", None)
            except errors.HostError as exc:
                self.problems["record"] = Problem(exc.message, exc.hint)
                log.warning("%s: %s", self.name, exc)
            self.shared.publish("changed", self)

    def ask(self, verb: str, by: str) -> dict[str, Any]:
        """The record's data with what a person asks for ("": nothing more), to explain an end that we don't see."""
        assert self.record is not None
        return self.record.data | {"request": {"verb": verb, "by": by, "at": now()} if verb else None}

    def keep_console(self, writer: dict[str, Any] | None) -> None:
        """Put on record who types on the console, so that the same one can go on after a restart of the daemon."""
        if self.record is not None and self.alive:
            self.note(self.state, self.reason, data=self.record.data | {"console": writer})

    # QEMU's own words

    def begin_stderr(self, child: Child) -> None:
        """Repeat what QEMU says in the journal, from where an earlier daemon stopped."""
        if child.stderr is not None and self.record is not None:
            kept = self.record.data.get("stderr")
            cursor = Cursor(str(kept["file"]), int(kept["offset"])) if isinstance(kept, dict) else None
            self.stderr = StderrLog(child.stderr, self.fields(), cursor)

    def forward_stderr(self, *, final: bool = False) -> None:
        """There is more of it."""
        if self.stderr is None or self.record is None:
            return
        before = self.stderr.cursor
        while self.stderr.forward(final=final):
            pass
        if (cursor := self.stderr.cursor) != before:
            place = {"file": cursor.file, "offset": cursor.offset}
            self.record = msgspec.structs.replace(self.record, data=self.record.data | {"stderr": place})
            with contextlib.suppress(errors.HostError):  # sent twice after a crash, then
                self.shared.records.save(self.record)

    # Taking it back

    def adopt(self, record: Record) -> bool:
        """First step, before there is a bus: take slots and pumps over. True if the guest runs."""
        self.record = record
        if not self.alive:
            if record.unit or record.slots:  # its end was on record, but not everything was put away
                self.settled.clear()
            return False
        self.settled.clear()
        self.over.clear()
        self.child = Child.adopt(self.shared.services, record)
        self.begin_stderr(self.child)
        for slot in self.child.lost:
            text = f"Slot {slot} of {self.name} is lost: {_meaning(slot)}"
            self.problems[f"slot {slot}"] = Problem(text, "The guest runs on. Restart it when convenient.")
            journal.send(text, message_id=Message.SLOT_LOST, level="warning", VIRTD_SLOT=slot, **self.fields())
        if self.child.alive() and record.state != State.STARTING:
            # What the record says is good enough to be told; the monitor will confirm it.
            self.settled.set()
            return True
        return False

    async def reconcile(self, *, unit_exists: bool) -> str:
        """Second step, with systemd at hand: what became of it. Returns "adopted", "ended", "rolled back" or ""."""
        try:
            return await self._reconcile(unit_exists=unit_exists)
        finally:
            self.settled.set()

    async def _reconcile(self, *, unit_exists: bool) -> str:
        record = self.record
        if record is None:
            return ""
        if not self.alive:
            if not self.settled.is_set():
                await self.put_away()
            return ""
        assert self.child is not None
        units = await self.shared.services.units()
        if record.state == State.STARTING or not self.child.alive():
            unit = await units.state(self.unit) if unit_exists else None
            if unit is None and record.state == State.STARTING and not self.child.alive():
                await self._roll_back("its start was interrupted before the guest ran")
                return "rolled back"
            if unit is None or not unit.running:
                await self.finish()
                return "ended"
            self.child.identify(unit)
            self.save(main_pid=self.child.pid, main_start=self.child.start, invocation_id=unit.invocation_id)
        if not unit_exists:
            self.problems["unit"] = Problem(f"{self.unit} is gone, but its process runs (PID {self.child.pid})")
        if record.state == State.STARTING:
            self.note(State.RUNNING, "started while virtd was restarted")
        self.watch()
        text = f"Adopted domain {self.name} (PID {self.child.pid})"
        journal.send(text, message_id=Message.ADOPTED, VIRTD_PID=str(self.child.pid), **self.fields())
        self.spawn(self.attach(GREETING_LIMIT), "attach")
        return "adopted"

    async def _roll_back(self, why: str) -> None:
        journal.send(
            f"Rolled back domain {self.name}: {why}", message_id=Message.ROLLED_BACK, level="notice", **self.fields()
        )
        self.note(State.STOPPED, why)
        await self.put_away()

    async def attach(self, limit: float) -> None:
        """Connect the monitor of a guest that runs, and see what it does.

        What fails is a problem, not the guest's end.
        """
        async with self._linking:
            if self.monitor is None or self.monitor.link is not Link.CONNECTED:
                await self._connect(limit)

    async def _connect(self, limit: float) -> None:
        monitor = Monitor(self.name, command.monitor_socket(self.runtime), self.on_event)
        self.monitor = monitor
        try:
            await monitor.connect(limit)
            self._take_status(await monitor.execute("query-status"))
            self.problems.pop("monitor", None)
        except errors.MonitorError as exc:
            if self.alive and self.child is not None and self.child.alive():
                self.problems["monitor"] = Problem(exc.message, exc.hint)
                log.warning("%s: %s", self.name, exc)

    async def command(self, name: str, arguments: dict[str, Any] | None = None, *, limit: float = 5.0) -> Any:
        """One QMP command; a link that broke is made again first. Raises MonitorError."""
        async with self._linking:
            if self.monitor is None or self.monitor.link is not Link.CONNECTED:
                if self.monitor is not None:
                    await self.monitor.close()
                await self._connect(min(GREETING_LIMIT, limit))
            monitor = self.monitor
        if monitor is None:  # it ended meanwhile
            raise errors.MonitorError(f"{self.name} has ended")
        return await monitor.execute(name, arguments, limit=limit)

    def _take_status(self, status: dict[str, Any]) -> None:
        match str(status.get("status")):
            case "running":
                if self.state is State.PAUSED:
                    self.note(State.RUNNING, "resumed")
            case "shutdown":
                self.guest_off.set()
                self.note(State.PAUSED, "powered off, and kept")
            case "guest-panicked":
                self.note(State.PAUSED, "the guest's kernel panicked")
            case "io-error":
                self.note(State.PAUSED, "a disk reported an error")
            case "paused" if self.state is not State.PAUSED:
                self.note(State.PAUSED, "paused")
            case _:
                pass

    def on_event(self, event: Event) -> None:
        """What QEMU tells by itself. Its end is not told here: the process is the witness of that."""
        if not self.alive:
            return
        match str(event.get("event")), event.get("data") or {}:
            case "STOP", _ if self.state is State.RUNNING:
                # With on_poweroff = "keep" the guest's end comes before this; a reboot takes the state back at once.
                self.note(State.PAUSED, "powered off, and kept" if self.guest_off.is_set() else "paused")
            case "RESUME", _ if self.state is State.PAUSED:
                self.note(State.RUNNING, "resumed")
            case "GUEST_PANICKED", data if data.get("action") == "pause":
                self.note(State.PAUSED, "the guest's kernel panicked")
            case "BLOCK_IO_ERROR", data if data.get("action") == "stop":
                self.note(State.PAUSED, "a disk reported an error")
            case "SHUTDOWN", _:
                self.guest_off.set()
            case "RESET", data if data.get("guest"):
                journal.send(f"Domain {self.name} rebooted itself", **self.fields())
            case _:
                pass

    # The end

    def watch(self) -> None:
        """Wait for the end in the background."""
        self.spawn(self._watch(), "watch")

    async def _watch(self) -> None:
        assert self.child is not None
        await self.child.ended()
        while True:
            try:
                return await self.finish()
            except (errors.HostError, errors.TimedOut) as exc:  # no bus at this moment, or a PID 1 that is very busy
                self.problems["end"] = Problem(
                    f"{self.name} has ended, but not all is known: {exc.message}", exc.hint
                )
                await asyncio.sleep(FINISH_AGAIN)

    async def finish(self) -> None:
        """The process has ended: find out why, put it on record, then put everything away."""
        child, record = self.child, self.record
        if child is None or record is None or not self.alive:
            return
        if self.state is not State.STOPPING:
            self.note(State.STOPPING, "ending")
        units = await self.shared.services.units()
        unit = await units.ended(self.unit)
        await child.drain()
        self.forward_stderr(final=True)
        self.stderr = None
        end = ends.judge(unit, ends.read_events(command.events(self.runtime)), self.request, self.last_words(), now())
        self.note(end.state, end.reason, exit=end.exit, since=end.exit.at, main_pid=0, main_start=0)
        level = "warning" if end.state is State.CRASHED else "notice"
        journal.send(
            f"Domain {self.name} ended: {end.reason}",
            message_id=Message.ENDED, level=level, VIRTD_CAUSE=end.exit.cause, **self.fields(),
        )  # fmt: skip
        await self.put_away()
        self.shared.publish("ended", self)

    async def put_away(self) -> None:
        """Drop what an ended guest leaves: slots, sockets, unit, ownership of its disks. Safe to repeat."""
        record = self.record
        assert record is not None
        if self.monitor is not None:
            await self.monitor.close()
            self.monitor = None
        child = self.child or Child(self.shared.services, DRIVER, self.name)
        await child.release()
        self.child = None
        owners = [hostinfo.Owner(*owner) for owner in record.data.get("owners", [])]
        with contextlib.suppress(errors.HostError):
            hostinfo.give_back(owners, hostinfo.account(self.shared.settings))
        units = await self.shared.services.units()
        with contextlib.suppress(errors.VirtdError):
            await units.collect(self.unit)
        # After the unit: its ExecStop runs once more, in a sandbox that has this directory in it.
        await asyncio.to_thread(files.remove_tree, self.runtime)
        # Only after this is the object whole again: until here a crash finds the unit's name and comes by once more.
        self.note(self.state, self.reason, unit="", slots={}, data={}, id=0, main_pid=0, main_start=0)
        self.problems = {
            key: value for key, value in self.problems.items() if key in ("definition", "internal", "record")
        }
        self.guest_off.clear()
        self.over.set()
        self.settled.set()

    def last_words(self, since: int | None = None) -> str:
        """The end of what QEMU wrote to stderr: the last 4 KiB, or what came after offset `since`."""
        path = self.shared.services.paths.stderr_log(DRIVER, self.name)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                start = max(0, size - 4096) if since is None else min(since, size)
                file.seek(max(start, size - 4096))
                return file.read(4096).decode(errors="replace").strip()
        except OSError:
            return ""


def _meaning(slot: str) -> str:
    match slot.rpartition("/")[2]:
        case "stdin":
            return "its serial console takes no input any more"
        case "stdout":
            return "its serial console's output is lost from now on"
        case "stderr":
            return "QEMU's messages are lost from now on"
        case _:
            return "the log was opened again by its name"
