# SPDX-License-Identifier: LGPL-2.1-or-later
"""All objects of a driver that runs processes, built from their definitions, records, units and slots."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from .. import errors, files, journal
from ..children.slots import SLOTS
from ..hints import do
from ..messages import Message
from ..model.state import State, require
from ..objects import definitions, recovery
from ..objects.inventory import Inventory
from ..objects.object import D
from ..objects.protocol import Problem
from ..process import boot_id
from ..records import Record, Records, now
from ..replies import guests as replies
from .guest import Guest
from .guestrecord import Shared

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..children.child import Services
    from ..objects.persistent import Named
    from ..objects.protocol import Difference, Publish
    from ..systemd.state import UnitState

log = logging.getLogger(__name__)

G = TypeVar("G", bound=Guest[Any])


class GuestDriver(Inventory[G, D]):
    """All domains or all containers. `publish(event, name)` also gets "ended"."""

    states = State
    taken_back = "It is rebuilt from its unit."

    def __init__(self, services: Services, publish: Publish) -> None:
        super().__init__(services, Records(services.paths, self.name), publish)
        self._shared = Shared(services, self.records, self.published, self._next_id, boot_id())
        self._last_id = 0

    @property
    def machines(self) -> dict[str, G]:
        return self.objects

    # To be overridden

    async def start(self, name: str, by: str) -> bool:
        """Start it; False if it was running. Raises a VirtdError, with nothing left behind."""
        raise NotImplementedError

    async def stop(self, name: str, by: str) -> bool:
        """End it at once; False if it wasn't running. Raises TimedOut."""
        raise NotImplementedError

    def put_in_force(self, one: G, definition: D, text: str) -> None:
        one.note(one.state, one.reason, data=one.data | definitions.in_force(definition, text))

    def found_out(self, _machine: G, _unit: UnitState) -> dict[str, Any]:
        """More data for a record that replaces a lost one, as far as it can be found out from outside."""
        return {}

    async def go_on(self, machine: G) -> None:
        """Finish the operation on an object that a restart of the daemon interrupted, at whatever stage."""
        raise NotImplementedError

    def after_end(self, machine: G) -> None:
        """An object that has a definition has ended, and everything of it is put away."""

    def forget_beside(self, _machine: G) -> Callable[[], None]:
        """Remove what is stored beside its definition; calling the result puts it back. Raises HostError."""
        return lambda: None

    def warnings(self, definition: D) -> list[str]:
        """What a definition names and the host lacks, which is an error only at a start."""
        raise NotImplementedError

    # Start-up

    def restore(self) -> None:
        """First step: records, slots and pumps; no bus yet."""
        self._reconciled.clear()
        self.restore_records()
        self.load_definitions()
        self.recall()
        recovery.doubt(self)

    async def reconcile(self) -> None:
        """Second step: compare with systemd, finish or roll back what a crash cut off."""
        known = {name for name, one in self.machines.items() if one.definition is not None or one.record is not None}
        came, others = await recovery.reconcile_all(self)
        for name, result in came.items():
            if result == "adopted":
                self.machines[name].spawn(self.go_on(self.machines[name]), "finish")
        for machine in list(self.machines.values()):
            if machine.definition is None and not machine.alive and machine.settled.is_set() and not machine.problems:
                self.forget(machine.name)  # meanwhile its definition was removed, or it ended without having one
        for name, unit in others.items():
            try:
                await self._rebuild(name, unit=unit, new=name not in known)
            except Exception as exc:  # the others are still reconciled
                log.exception("%s can't be rebuilt", name)
                self.left_alone(name, Problem(f"{name} can't be rebuilt: {exc}", "See: " + do("fsck") + "."))
        recovery.settle(self)
        self._reconciled.set()

    async def compare(self, *, repair: bool) -> list[Difference]:
        from . import fsck  # no start of the daemon needs it

        return await fsck.compare(self, repair=repair)

    async def rebuild(self, name: str) -> None:
        """Rebuild an object from its unit, while the daemon runs."""
        await self._rebuild(name, unit=True, new=name not in self.machines)

    async def _rebuild(self, name: str, *, unit: bool, new: bool) -> None:
        """A unit or slots without a record: rebuild the object from them, or clear them away if nothing runs."""
        machine = self.object(name)
        units = await self._services.units()
        state = await units.state(machine.unit) if unit else None
        slots = self.identities_of(name)
        expected = [f"{self.name}/{name}/{slot}" for slot in SLOTS]
        record = Record(
            driver=self.name,
            name=name,
            uuid=machine.uuid,
            state=State.RUNNING.value if state is not None else State.STOPPED.value,
            reason="rebuilt without its record",
            since=now(),
            unit=machine.unit,
            main_pid=state.main_pid if state is not None else 0,
            invocation_id=state.invocation_id if state is not None else "",
            boot_id=self._shared.boot_id,
            slots={slot: slots.get(slot, "") for slot in expected} if state is not None else slots,
            data={"definition": machine.definition_text, "owners": [], "request": None}
            | (self.found_out(machine, state) if state is not None else {}),
        )
        machine.adopt(record)
        if machine.child is not None and state is not None:
            machine.child.identify(state)
        machine.note(
            machine.state, machine.reason, main_start=machine.child.start if machine.child is not None else 0
        )
        if state is None:
            # Logged first, because the next start of the daemon would find nothing to log.
            journal.send(
                f"Rolled back {self.noun} {name}: slots without a record or a unit",
                message_id=Message.ROLLED_BACK, level="notice", **machine.fields(),
            )  # fmt: skip
        result = await machine.reconcile(unit_exists=unit)
        if state is None:
            self.found.rolled_back.append(name)
            if machine.definition is None:
                await machine.close()
                self.records.remove(name)
                self.machines.pop(name, None)
        else:
            self.found.rebuilt.append(name)
            self.problems.pop(f"record {name}", None)
            log.warning("%s %s was rebuilt from its unit: %s", self.noun.capitalize(), name, result or "as it was")
            if new and name in self.machines:  # one without a definition that has ended is forgotten by now
                self._publish("added", name)

    def to_autostart(self) -> list[G]:
        def wanted(machine: G) -> bool:
            record = machine.record
            had_its_turn = record is not None and record.exit is not None and record.boot_id == self._shared.boot_id
            return bool(machine.definition and machine.definition.autostart) and not (machine.alive or had_its_turn)

        return [machine for machine in self.machines.values() if wanted(machine)]

    def grown(self, key: str) -> None:
        """The pump's callback: a watched log has grown. `key` is a slot's name."""
        driver, name, slot = key.split("/")
        if (driver, slot) == (self.name, "stderr") and (machine := self.machines.get(name)) is not None:
            machine.stderr.forward()

    async def reload(self) -> None:
        """There is nothing that others might have removed."""

    async def close(self) -> None:
        await asyncio.gather(*(machine.close() for machine in self.machines.values()))

    async def undefine(self, name: str) -> None:
        machine = self.find(name)
        async with machine.exclusive("undefine"):
            require("undefine", machine.name, machine.state, self.noun)
            await machine.over.wait()
            await machine.finishing.tidy("undefine")
            # The record first: if that fails nothing has changed, and after a crash in between the object can be
            # undefined again.
            if machine.record is not None:
                self.records.remove(machine.name)
            put_back: Callable[[], None] = lambda: None  # noqa: E731
            try:
                put_back = self.forget_beside(machine)
                files.remove(machine.source)
            except errors.HostError:
                with contextlib.suppress(errors.HostError):
                    put_back()
                if machine.record is not None:
                    with contextlib.suppress(errors.HostError):  # fsck reports it
                        self.records.save(machine.record)
                raise
            self.forget(machine.name)

    # Describing

    def describe(self, machine: G) -> replies.Guest:
        """The short form, as `list --json` has it."""
        record = machine.record
        return replies.Guest(
            name=machine.name,
            driver=self.name,
            uuid=machine.uuid,
            state=machine.state.value,
            reason=machine.reason,
            pid=self.pid_of(machine),
            since=record.since if record is not None else None,
            autostart=bool(machine.definition and machine.definition.autostart),
            waits=machine.waits is not None,
            id=record.id if record is not None and record.id else None,
        )

    def pid_of(self, machine: G) -> int | None:
        """The PID of the process that a person takes for the object itself."""
        record = machine.record
        return record.main_pid if record is not None and machine.alive and record.main_pid else None

    def describe_fully(self, machine: G) -> replies.GuestInfo:
        """The long form, as `info --json` has it; each driver adds to it."""
        paths = self._services.paths
        ending = machine.record.exit if machine.record is not None else None
        return replies.GuestInfo(
            **msgspec.structs.asdict(self.describe(machine)),
            unit=machine.unit,
            slots=self.slots_of(machine.name),
            exit=replies.Exit(**msgspec.structs.asdict(ending)) if ending is not None else None,
            definition_path=machine.source if machine.definition is not None else None,
            pending=machine.pending,
            persistent=machine.definition is not None,
            log=paths.stderr_log(self.name, machine.name),
            console_log=paths.console_log(self.name, machine.name),
            problems=self.troubles_of(machine),
        )

    def _next_id(self) -> int:
        """A number for a starting guest, larger than all in use; libvirt's users expect such an ID."""
        used = [machine.record.id for machine in self.machines.values() if machine.record is not None]
        self._last_id = max(self._last_id, *used, 0) + 1
        return self._last_id

    def published(self, event: str, one: Named) -> None:
        guest = self.objects.get(one.name)
        if guest is None or guest is not one:
            return
        super().published(event, guest)
        if event == "ended":
            if guest.definition is None:
                self.forget(guest.name)
            else:
                self.after_end(guest)
