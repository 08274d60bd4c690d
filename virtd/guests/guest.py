# SPDX-License-Identifier: LGPL-2.1-or-later
"""One supervised object, a domain or a container: what it is, what it was told, how it ended.

Every change is on record before it is told. What is QEMU's or LXC's own is in the subclasses.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

from .. import errors, files, journal, untrusted
from ..children import ending
from ..children.child import Child, Services
from ..children.launch import identified
from ..hints import do
from ..messages import Message
from ..model.state import ALIVE, State
from ..objects import definitions
from ..objects.inventory import D
from ..objects.persistent import WAITS, Persistent
from ..objects.protocol import Problem
from ..objects.turns import Turns
from ..process import Seen
from ..records import Record, Records, now, stamp
from ..systemd.names import unit_name
from .repeating import Repeater
from .verdict import End, Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from ..systemd.state import UnitState

log = logging.getLogger(__name__)

AGAIN = "started again"  # in a record's data: by somebody else
SEEN = "seen"  # the same: of its end, see process.Seen


class Shared(NamedTuple):
    """What all guests of a driver share. `publish(event, guest)`: "changed" or "ended"."""

    services: Services
    records: Records
    publish: Callable[[str, Any], None]
    next_id: Callable[[], int]
    boot_id: str


class Guest(Persistent, Generic[D]):
    """An object: its definition, its record, and, while it lives, its child.

    Without a definition only a record or a unit is left of it, and it goes when its child ends.
    """

    driver = ""  # the first part of its slots' and units' names
    noun = ""  # what a person calls it
    housed = True  # whether it has a directory below /run while it runs
    definition_type: type[D]

    def __init__(self, shared: Shared, name: str) -> None:
        super().__init__(name)
        self.shared: Shared = shared
        self.definition: D | None = None
        self.definition_text = ""
        self.child: Child | None = None
        self.over = asyncio.Event()  # set while there is no child
        self.over.set()
        self.settled = asyncio.Event()  # cleared while nobody knows yet what became of it
        self.settled.set()
        self.stderr = Repeater(self, sort=self.sort_line)
        self._turns = Turns(name)
        self._putting_away = False

    # What each driver does in its own way

    def parse(self, text: str, source: str) -> D:
        """The definition that `text` holds. Raises InvalidDefinition."""
        raise NotImplementedError

    def judge(self, unit: UnitState | None) -> End:
        """Why it ended; everything it wrote is in the logs by now."""
        raise NotImplementedError

    async def hear_out(self) -> None:
        """It has ended: take in what it said last, besides what is in the logs."""

    def adopted(self) -> None:
        """It runs, and this process has only now come to look after it."""

    async def let_go(self) -> None:
        """End what this process has open to it, besides the child's pipes. Idempotent."""

    async def give_back(self, record: Record) -> None:
        """Undo what was done to the host for it, as the record says. Idempotent."""

    async def forgotten(self, record: Record) -> None:
        """The same, for what its unit needs until systemd has forgotten it."""

    def meaning(self, slot: str) -> str:
        """What the loss of a slot, one of child.SLOTS, means for it."""
        raise NotImplementedError

    def sort_line(self, _text: str) -> str | None:
        """The level of a line of its stderr in the journal; None when it doesn't belong there."""
        return "warning"

    # What it is

    @property
    def state(self) -> State:
        return State.of(self.record.state) if self.record is not None else State.STOPPED

    @property
    def alive(self) -> bool:
        return self.state in ALIVE

    active = alive

    @property
    def key(self) -> str:
        return f"{self.driver}/{self.name}"

    @property
    def unit(self) -> str:
        return unit_name(self.driver, self.name)

    @property
    def runtime(self) -> str:
        return self.shared.services.paths.runtime(self.driver, self.name)

    @property
    def source(self) -> str:
        """The definition's file."""
        return self.shared.services.paths.definition(self.driver, self.name)

    @property
    def running_definition(self) -> D | None:
        """The definition that the guest was started with, or the present one when it isn't running."""
        if self.pending and self.record is not None and (text := definitions.text_in_force(self.record.data)):
            with contextlib.suppress(errors.InvalidDefinition):
                return self.parsed(text) or self.parse(text, self.source)
        return self.definition

    def parsed(self, text: str) -> D | None:
        """The definition that `text` holds, if the guest was started with it by this version of virtd."""
        return definitions.parsed(self.record.data, text, self.definition_type) if self.record is not None else None

    @property
    def pending(self) -> bool:
        """Whether the definition was changed since the guest started, so that the change waits for the next start."""
        return bool(
            self.alive and self.record is not None and self.record.data.get("definition") != self.definition_text
        )

    @property
    def request(self) -> Request | None:
        asked = self.record.data.get("request") if self.record is not None else None
        return Request(asked["verb"], asked["by"], asked["at"]) if asked else None

    def fields(self) -> dict[str, str]:
        """The journal fields of this object."""
        return {
            "VIRTD_DRIVER": self.driver,
            "VIRTD_NAME": self.name,
            "VIRTD_UUID": self.uuid,
            "VIRTD_UNIT": self.unit,
        }

    # One operation at a time

    @contextlib.asynccontextmanager
    async def exclusive(self, what: str) -> AsyncIterator[None]:
        """One operation at a time, once it is known what became of it."""
        await self.settled.wait()
        async with self._turns.take(what):
            yield

    @property
    def busy(self) -> bool:
        """Whether an operation is under way."""
        return self._turns.taken

    async def close(self) -> None:
        """Let go of everything in this process; the guest, its slots and its record stay."""
        await self.end_tasks()
        await self.let_go()
        if self.child is not None:
            await self.child.close()

    # The record

    def ask(self, verb: str, by: str) -> dict[str, Any]:
        """The record's data with what a person asks for ("": nothing more), to explain an end that we don't see."""
        assert self.record is not None
        return self.record.data | {"request": {"verb": verb, "by": by, "at": now()} if verb else None}

    def keep_console(self, writer: dict[str, Any] | None) -> None:
        """Put on record who types on the console, so that the same one can go on after a restart of the daemon."""
        if self.record is not None and self.alive:
            self.note(self.state, self.reason, data=self.record.data | {"console": writer})

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
        self.stderr.begin(self.child)
        for slot in self.child.lost:
            meaning = self.meaning(slot.rpartition("/")[2])
            self.lost(slot, f"{self.name} is lost: {meaning}", "It runs on. Restart it when convenient.")
        if self.child.alive() and record.state != State.STARTING:
            # What the record says is good enough to be told.
            self.settled.set()
            return True
        return False

    def recall(self) -> None:
        if self.alive and self.record is not None and self.record.data.get(AGAIN):
            self._say_again()

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
            if record.invocation_id not in ("", unit.invocation_id):
                await self._started_again(unit)
            self.child.identify(unit)
            self.save(**identified(self.child))
        if not unit_exists:
            self.problems["unit"] = Problem(f"{self.unit} is gone, but its process runs (PID {self.child.pid})")
        if record.state == State.STARTING:
            self.note(State.RUNNING, "started while virtd was restarted")
        self.watch()
        text = f"Adopted {self.noun} {self.name} (PID {self.child.pid})"
        journal.send(text, message_id=Message.ADOPTED, VIRTD_PID=str(self.child.pid), **self.fields())
        self.adopted()
        return "adopted"

    async def _started_again(self, unit: UnitState) -> None:
        """Somebody has restarted the unit, which systemd lets them do with units of an older virtd alone.

        What runs now is ours to look after, but nobody is at the other ends of its pipes.
        """
        assert self.child is not None
        assert self.record is not None
        await self.let_go()
        self.child.identify(unit)
        reason = f"restarted by somebody with systemctl: {self.unit}"
        data = {key: value for key, value in self.record.data.items() if key != SEEN} | {AGAIN: True}
        self.note(State.RUNNING, reason, data=data, **identified(self.child))
        self._say_again()
        journal.send(
            f"{self.noun.capitalize()} {self.name} was restarted by somebody with systemctl, and has no console",
            message_id=Message.ADOPTED, level="warning", VIRTD_PID=str(self.child.pid), **self.fields(),
        )  # fmt: skip
        self.adopted()

    def _say_again(self) -> None:
        self.problems["restarted"] = Problem(
            f"{self.unit} was restarted by somebody: {self.name} runs afresh, without a console",
            do("stop", self.noun, self.name) + ", then " + do("start", self.noun, self.name) + ".",
        )

    async def _roll_back(self, why: str) -> None:
        journal.send(
            f"Rolled back {self.noun} {self.name}: {why}",
            message_id=Message.ROLLED_BACK,
            level="notice",
            **self.fields(),
        )
        self.note(State.STOPPED, why)
        await self.put_away()

    # The end

    def watch(self) -> None:
        """Wait for the end in the background."""
        assert self.child is not None
        self.spawn(ending.watch(self.child, self.finish, self._held_up), "watch")

    def _held_up(self, exc: errors.VirtdError) -> None:
        self.problems["end"] = Problem(f"{self.name} has ended, but not all is known: {exc.message}", exc.hint)

    async def finish(self) -> None:
        """The process has ended: find out why, put it on record, then put everything away."""
        child, record = self.child, self.record
        if child is None or record is None or not self.alive:
            return
        self._see(child)
        unit = await child.verdict()
        if unit is not None and unit.running:
            await self._started_again(unit)
            self.watch()
            return
        await child.drain()
        self.stderr.end()
        await self.hear_out()
        end = self.judge(unit)
        self.note(end.state, end.reason, exit=end.exit, since=end.exit.at, main_pid=0, main_start=0)
        level = "warning" if end.state is State.CRASHED else "notice"
        journal.send(
            f"{self.noun.capitalize()} {self.name} ended: {end.reason}",
            message_id=Message.ENDED, level=level, VIRTD_CAUSE=end.exit.cause, **self.fields(),
        )  # fmt: skip
        if self.on_record.is_set():
            await self.put_away()
            self.shared.publish("ended", self)
            return
        # Until the verdict is on record, all that is left of it is a witness that the next daemon may need.
        self.over.set()
        self._put_away_later()

    def _see(self, child: Child) -> None:
        """Have on record what was seen of its end, before anybody is asked: this process may not live to hear."""
        assert self.record is not None
        if (known := self.seen) is not None:  # by an earlier daemon, or at an earlier try
            child.seen = known
            return
        seen = child.seen or Seen(time.time())
        data = self.record.data | {SEEN: list(seen)}
        if self.state is State.STOPPING:
            self.keep(data=data)
        else:
            self.note(State.STOPPING, "ending", data=data)

    @property
    def seen(self) -> Seen | None:
        """What was seen of its end that has still to be judged."""
        match self.record.data.get(SEEN) if self.record is not None else None:
            case [int() | float() as at, int() | None as status]:
                return Seen(at, status)
            case _:
                return None

    @property
    def seen_at(self) -> str:
        """When its end was noticed, as records have it."""
        return stamp(seen.at) if (seen := self.seen) is not None else now()

    @property
    def leftovers(self) -> bool:
        """Whether it has ended, and something of it is still there."""
        record = self.record
        return not self.alive and record is not None and bool(record.unit or record.slots or self.child is not None)

    def _put_away_later(self) -> None:
        if not self._putting_away:
            self._putting_away = True
            self.spawn(self._keep_putting_away(), "put-away")

    async def _keep_putting_away(self) -> None:
        try:
            while self.leftovers:
                await self.on_record.wait()
                with contextlib.suppress(errors.VirtdError):
                    async with self.exclusive("put away"):
                        await self.tidy("put away")
                if self.leftovers:
                    await asyncio.sleep(ending.AGAIN)
        finally:
            self._putting_away = False

    async def tidy(self, what: str) -> None:
        """Put away what waited for the verdict to be on record, or couldn't be, before something else is done with
        the guest.

        Raises HostError when it still can't be.
        """
        if not self.on_record.is_set():
            problem = self.problems["record"]
            raise errors.HostError(f"Cannot {what} {self.name} yet: {problem.text}", hint=problem.hint)
        if not self.leftovers:
            return
        untold = self.child is not None
        await self.put_away()
        if untold:
            self.shared.publish("ended", self)
        if self.leftovers:
            problem = self.problems["leftovers"]
            raise errors.HostError(f"Cannot {what} {self.name} yet: {problem.text}", hint=problem.hint)

    async def put_away(self) -> None:
        """Drop what an ended guest leaves: slots, sockets, unit, changes of the host. Safe to repeat.

        What can't be dropped now is a problem, and is tried again until it can be.
        """
        record = self.record
        assert record is not None
        await self.let_go()
        child = self.child or Child(self.shared.services, self.driver, self.name, invocation_id=record.invocation_id)
        self.child = None
        failed = await ending.put_away(
            child,
            give_back=lambda: self.give_back(record),
            forgotten=lambda: self.forgotten(record),
            remove=self.remove_runtime,
        )
        if failed:
            text = f"Not all that {self.name} left is put away: {'; '.join(map(str, failed))}"
            if "leftovers" not in self.problems:
                log.warning("%s", text)
            self.problems["leftovers"] = Problem(text, "It is tried again every second.")
            self._put_away_later()
        else:
            # Only now is the object whole again: until here a crash, or another try, finds the unit's name.
            self.note(self.state, self.reason, data={}, id=0, **ending.GONE)
            self.problems = {
                key: value
                for key, value in self.problems.items()
                if key in ("definition", "internal", "record", WAITS)
            }
        self.over.set()
        self.settled.set()

    async def remove_runtime(self) -> None:
        """Remove its directories below /run."""
        await asyncio.to_thread(files.remove_tree, self.runtime)
        if os.path.lexists(self.runtime):
            raise errors.HostError(f"{self.runtime} can't be removed")

    def last_words(self, since: int | None = None, most: int = 4096) -> str:
        """The end of what it wrote to stderr: the last `most` bytes, or what came after offset `since`."""
        path = self.shared.services.paths.stderr_log(self.driver, self.name)
        try:
            return untrusted.tail(path, most, since=since or 0).decode(errors="replace").strip()
        except OSError:
            return ""
