# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starting an object's process. Record and slots come first; whatever fails or is cut off on the way is undone."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .. import errors, fdstore, journal
from ..child import Child, Ends, end_unit, identities
from ..messages import Message
from ..model.state import State
from ..records import Record, now
from ..units import STORE_SINCE
from . import definitions
from .collection import D
from .guest import Guest
from .protocol import Problem

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from ..units import UnitSpec
    from .conflicts import Holding
    from .protocol import Peers

log = logging.getLogger(__name__)

G = TypeVar("G", bound=Guest[Any])


async def start(machine: Guest[D], ready: Callable[[D], Awaitable[Start[Any, D]]]) -> bool:
    """Start it; False if it was running. `ready` makes of its definition what is to be tried.

    Raises a VirtdError, with nothing left behind.
    """
    async with machine.exclusive("start"):
        if machine.alive:
            return False
        await machine.over.wait()
        await machine.tidy("start")
        definition = machine.definition
        if definition is None:
            raise errors.NotFound(
                f"{machine.noun.capitalize()} {machine.name} has no definition",
                hint=f'{machine.virtctl} define FILE, with name = "{machine.name}".',
            )
        await (await ready(definition)).run()
        return True


class Start(Generic[G, D]):
    """One try. Each step says what it adds; `_undo` takes it all back."""

    def __init__(self, machine: G, definition: D, peers: Peers, by: str) -> None:
        self.machine = machine
        self.peers = peers
        self.definition = definition
        self.by = by
        self.services = machine.shared.services
        self.child = Child(self.services, machine.driver, machine.name)
        self.stderr_from = 0

    terminal = False  # whether it has a terminal in place of standard input and output

    # What each driver does in its own way

    def check(self) -> None:
        """Look at the host before anything is done. Raises a VirtdError."""

    def holdings(self) -> Iterable[Holding]:
        """What it is to have that nobody else may have meanwhile."""
        return ()

    def data(self) -> dict[str, Any]:
        """More for the record: what `Guest.give_back` needs to know. Nothing is changed yet."""
        return {}

    async def reach(self) -> None:
        """Have what it stands on: other drivers' objects, which others use as well. Raises a VirtdError."""

    def prepare(self, ends: Ends) -> None:
        """Change the host as the record says by now, and make the runtime directory. Raises HostError."""

    async def connect(self) -> None:
        """The same, for what has to be waited for. Raises a VirtdError."""

    def spec(self) -> UnitSpec:
        """The unit."""
        raise NotImplementedError

    async def come_up(self) -> None:
        """Wait until the process does what it is there for. Raises StartFailed."""

    def own_words(self, words: str) -> str:
        """What the process said when it failed, for a person; "" when nothing of it is telling."""
        return words

    def last_line(self, words: str) -> str:
        """The same, short."""
        return words.splitlines()[-1] if words else ""

    # The steps

    async def run(self) -> None:
        """Raises a VirtdError, with nothing left behind."""
        machine = self.machine
        self.check()
        self._check_conflicts()
        self._check_budget()
        units = await self.services.units()
        await units.collect(machine.unit)  # before there is anything to undo: what runs there isn't ours to end
        await self.reach()
        before = machine.record
        forgets = self.terminal and await units.version() < STORE_SINCE
        ends, descriptors = self.child.prepare(terminal=self.terminal, forgets=forgets)
        try:
            assert self.child.stderr is not None
            self.stderr_from = os.fstat(self.child.stderr.fd).st_size
            machine.over.clear()
            self._record(descriptors)
            machine.begin_stderr(self.child)
            self.prepare(ends)
            await self.connect()
            await self.child.keep(descriptors)
            await self._spawn(ends)
        except BaseException as exc:
            ends.close()
            self.child.discard(descriptors)
            await asyncio.shield(self._undo(before, exc))
            if isinstance(exc, errors.VirtdError) and not isinstance(exc, errors.InvalidDefinition):
                raise self._explained(exc) from exc
            raise
        self._running()

    def _check_budget(self) -> None:
        try:
            self.services.store.room_for(self.child.slot_names())
        except fdstore.StoreFull as exc:
            budget = self.services.store.budget()
            text = f"{self.machine.noun.capitalize()} {self.machine.name} was not started: {exc}"
            journal.send(
                text, message_id=Message.BUDGET_REFUSED, level="error",
                VIRTD_USED=str(budget.used), VIRTD_MAX=str(budget.max), **self.machine.fields(),
            )  # fmt: skip
            raise errors.BudgetExceeded(f"Cannot start {self.machine.name}: {exc}", hint=exc.hint) from exc

    def _check_conflicts(self) -> None:
        from . import conflicts  # no start of the daemon needs it

        conflicts.require(self.peers, f"{self.machine.noun} {self.machine.name}", self.holdings())

    def _record(self, descriptors: dict[str, int]) -> None:
        """The record, before anything else exists: a crash from here on finds it and rolls back."""
        machine = self.machine
        # Once more, for others may have had their turn since. From the record on they see what is ours.
        self._check_conflicts()
        record = Record(
            driver=machine.driver,
            name=machine.name,
            uuid=machine.uuid,
            state=State.STARTING.value,
            reason=f"being started by {self.by}",
            since=now(),
            id=machine.shared.next_id(),
            unit=machine.unit,
            boot_id=machine.shared.boot_id,
            slots=identities(descriptors),
            data={
                **definitions.in_force(self.definition, machine.definition_text),
                "request": None,
                **self.data(),
            },
        )
        machine.shared.records.save(record)
        machine.record = record
        machine.child = self.child
        machine.shared.publish("changed", machine)

    async def _spawn(self, ends: Ends) -> None:
        unit = await self.child.spawn(self.spec(), ends)
        self.machine.save(main_pid=self.child.pid, main_start=self.child.start, invocation_id=unit.invocation_id)
        await self.come_up()

    def _running(self) -> None:
        machine = self.machine
        if machine.state is State.STARTING:
            machine.note(State.RUNNING, f"started by {self.by}")
        machine.problems.pop("start", None)
        machine.watch()
        journal.send(
            f"Started {machine.noun} {machine.name} (PID {self.child.pid})",
            message_id=Message.STARTED, VIRTD_PID=str(self.child.pid), **machine.fields(),
        )  # fmt: skip

    async def _undo(self, before: Record | None, why: BaseException) -> None:
        """Whatever there is of it by now goes away again."""
        machine = self.machine
        if machine.record is before:  # not even a record yet
            await self.child.release()
            machine.over.set()
            return
        try:
            await end_unit(self.services, machine.unit)
            await self.child.drain()
            machine.forward_stderr(final=True)
            self.words = machine.last_words(self.stderr_from)
            reason = self.last_line(self.words) or str(why)
            machine.note(
                State.STOPPED, f"failed to start: {reason}", exit=before.exit if before is not None else None
            )
            await machine.put_away()
        except Exception as exc:
            log.exception("%s: undoing its start failed", machine.name)
            machine.problems["start"] = Problem(f"Undoing a failed start failed: {exc}")

    def _explained(self, exc: errors.VirtdError) -> errors.VirtdError:
        """The error with the process's own words, where it left any."""
        words = getattr(self, "words", "")
        said = self.own_words(words) if words else ""
        if not said:
            return exc
        return errors.StartFailed(
            f"Cannot start {self.machine.name}: {said}",
            hint=exc.hint or f"See: {self.machine.virtctl} log --stderr {self.machine.name}",
        )
