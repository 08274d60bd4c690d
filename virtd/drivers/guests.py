# SPDX-License-Identifier: LGPL-2.1-or-later
"""All objects of a driver that runs processes: from definitions, records, units and slots, and back into them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .. import errors, files, journal
from ..child import SLOTS
from ..messages import Message
from ..model.domain import canonical_uuid
from ..model.state import State, require
from ..paths import names
from ..process import boot_id
from ..records import Record, Records, now
from ..units import object_name
from . import definitions
from .guest import D, Guest, Shared
from .protocol import Difference, Found, Problem

if TYPE_CHECKING:
    from ..child import Services
    from .protocol import Publish

log = logging.getLogger(__name__)

G = TypeVar("G", bound=Guest[Any])

RECONCILE_LIMIT = 30.0  # seconds that a start waits after the daemon's own
AT_ONCE = 8  # starts in parallel at boot; more only slow each other down on a small host


class Guests(Generic[G, D]):
    """`publish(event, name)` is told "added", "removed", "changed" and "ended"."""

    name = ""  # of the driver
    noun = ""
    virtctl = ""  # the beginning of commands about them

    def __init__(self, services: Services, publish: Publish) -> None:
        self._publish = publish
        self._services = services
        self.machines: dict[str, G] = {}
        self.problems: dict[str, Problem] = {}
        self.found = Found()
        self._shared = Shared(services, Records(services.paths, self.name), self._published, self._next_id, boot_id())
        self._last_id = 0
        self._reconciled = asyncio.Event()  # cleared while what runs isn't known for certain
        self._reconciled.set()

    @property
    def services(self) -> Services:
        return self._services

    @property
    def records(self) -> Records:
        return self._shared.records

    # What each driver does in its own way

    def make(self, name: str) -> G:
        """A new object without anything."""
        raise NotImplementedError

    def parse(self, text: str, source: str) -> D:
        """The definition that `text` holds. Raises InvalidDefinition."""
        raise NotImplementedError

    async def start(self, name: str, by: str) -> bool:
        """Start it; False if it was running. Raises a VirtdError, with nothing left behind."""
        raise NotImplementedError

    async def go_on(self, machine: G) -> None:
        """Do what was asked of an object before a restart of the daemon, whatever stage it was in."""
        raise NotImplementedError

    def after_end(self, machine: G) -> None:
        """One with a definition has ended, and all is put away."""

    def warnings(self, definition: D) -> list[str]:
        """What a definition names and the host hasn't got yet: no error before the start."""
        raise NotImplementedError

    # Start-up

    def restore(self) -> None:
        """First step: records, slots and pumps; no bus yet."""
        self._reconciled.clear()
        for path in self.half_written():
            with contextlib.suppress(errors.HostError):  # a file system that is read-only by now, perhaps
                files.remove(path)
        loaded = self._shared.records.load()
        for bad in loaded.quarantined:
            text = f"The record of {self.noun} {bad.name} can't be read: {bad.reason}"
            self.problems[f"record {bad.name}"] = Problem(
                text, f"It was moved to {bad.moved_to}; the {self.noun} is rebuilt from its unit."
            )
            journal.send(
                text, message_id=Message.RECORD_QUARANTINED, level="error",
                VIRTD_DRIVER=self.name, VIRTD_NAME=bad.name, VIRTD_FILE=bad.moved_to,
            )  # fmt: skip
        for name, record in loaded.records.items():
            machine = self._machine(name)
            try:
                machine.adopt(record)
            except Exception as exc:  # one bad record must not cost the others their daemon
                log.exception("%s can't be adopted", name)
                machine.problems["adoption"] = Problem(
                    f"{name} could not be adopted: {exc}", "The guest was left alone."
                )
                machine.settled.set()
        self.load_definitions()

    def half_written(self) -> list[str]:
        """Files that never got their real names, because a crash came in between."""
        paths = self._services.paths
        return [path for directory in (paths.etc, paths.run) for path in files.leftovers(f"{directory}/{self.name}")]

    async def reconcile(self) -> None:
        """Second step: compare with systemd, finish or roll back what a crash cut off."""
        units = await self._services.units()
        present = {
            name
            for unit in await units.list(f"virtd-{self.name}-*.service")
            if (name := object_name(self.name, unit.name))
        }
        known = set(self.machines)
        machines = [machine for machine in self.machines.values() if machine.record is not None]
        results = await asyncio.gather(
            *(machine.reconcile(unit_exists=machine.name in present) for machine in machines), return_exceptions=True
        )
        for machine, result in zip(machines, results, strict=True):
            if isinstance(result, BaseException):
                log.error("%s can't be reconciled: %s", machine.name, result, exc_info=result)
                machine.problems["adoption"] = Problem(
                    f"{machine.name} disagrees with systemd: {result}", "The guest was left alone."
                )
            elif result:
                getattr(self.found, result.replace(" ", "_")).append(machine.name)
                if result == "adopted":
                    machine.spawn(self.go_on(machine), "finish")
        for machine in machines:
            if machine.definition is None and not machine.alive and machine.settled.is_set() and not machine.problems:
                self._forget(machine.name)  # its definition was removed, or it ended as a transient one, meanwhile
        slots = {name.split("/")[1] for name in self._services.store.names() if name.startswith(f"{self.name}/")}
        recorded = {machine.name for machine in machines}
        for name in sorted((present | slots) - recorded):
            await self._rebuild(name, unit=name in present, new=name not in known)
        self._reconciled.set()

    async def compare(self, *, repair: bool) -> list[Difference]:
        from . import fsck  # no start of the daemon needs it

        return await fsck.compare(self, repair=repair)

    async def rebuild(self, name: str) -> None:
        """Make an object whole again from its unit, while the daemon runs."""
        await self._rebuild(name, unit=True, new=name not in self.machines)

    async def _rebuild(self, name: str, *, unit: bool, new: bool) -> None:
        """A unit or slots that no record tells of: made whole from what there is, or cleared away if nothing runs."""
        machine = self._machine(name)
        units = await self._services.units()
        state = await units.state(machine.unit) if unit else None
        held = self._services.store.slots()
        slots = {
            slot: f"{held[slot].dev}:{held[slot].ino}" for slot in held if slot.startswith(f"{self.name}/{name}/")
        }
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
            data={"definition": machine.definition_text, "owners": [], "request": None},
        )
        machine.adopt(record)
        if machine.child is not None and state is not None:
            machine.child.identify(state)
        machine.note(
            machine.state, machine.reason, main_start=machine.child.start if machine.child is not None else 0
        )
        if state is None:
            # Said first: the next start finds nothing more to tell.
            journal.send(
                f"Rolled back {self.noun} {name}: slots without a record or a unit",
                message_id=Message.ROLLED_BACK, level="notice", **machine.fields(),
            )  # fmt: skip
        result = await machine.reconcile(unit_exists=unit)
        if state is None:
            self.found.rolled_back.append(name)
            if machine.definition is None:
                await machine.close()
                self._shared.records.remove(name)
                self.machines.pop(name, None)
        else:
            self.found.rebuilt.append(name)
            self.problems.pop(f"record {name}", None)
            log.warning("%s %s was rebuilt from its unit: %s", self.noun.capitalize(), name, result or "as it was")
            if new:
                self._publish("added", name)

    async def autostart(self) -> None:
        """Start what is to be started at boot, but for what has run and ended since, should this be a second try."""
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(machine: G) -> None:
            async with slots:
                try:
                    await self.start(machine.name, "autostart")
                except errors.VirtdError as exc:
                    log.error("Cannot autostart %s: %s", machine.name, exc)
                    machine.problems["start"] = Problem(f"Autostart failed: {exc.message}", exc.hint)

        def wanted(machine: G) -> bool:
            record = machine.record
            had_its_turn = record is not None and record.exit is not None and record.boot_id == self._shared.boot_id
            return bool(machine.definition and machine.definition.autostart) and not (machine.alive or had_its_turn)

        await asyncio.gather(*(one(machine) for machine in list(self.machines.values()) if wanted(machine)))

    def grown(self, key: str) -> None:
        """The pump's word that bytes landed in a log that is watched: `key` is a slot's name."""
        driver, name, slot = key.split("/")
        if (driver, slot) == (self.name, "stderr") and (machine := self.machines.get(name)) is not None:
            machine.forward_stderr()

    async def reload(self) -> None:
        """Nothing of it is ever removed by others."""

    async def close(self) -> None:
        await asyncio.gather(*(machine.close() for machine in self.machines.values()))

    # Definitions

    def load_definitions(self) -> list[str]:
        """Read all definitions again; the names of those that changed.

        A bad one is a problem, and its object is as before.
        """
        directory = f"{self._services.paths.etc}/{self.name}"
        changed = []
        self.problems = {key: problem for key, problem in self.problems.items() if not key.startswith("definition")}
        found = names(directory, ".toml")
        # First, so that a definition that was given another name doesn't meet its old self.
        for name in [
            name for name, machine in self.machines.items() if machine.definition is not None and name not in found
        ]:
            changed.append(name)
            self._forget(name)
        for name in found:
            path = f"{directory}/{name}.toml"
            try:
                text = definitions.read(path)
                known = self.machines.get(name)
                definition = (known.parsed(text) if known is not None else None) or self.parse(text, path)
                definitions.check_name(definition.name, name, path)
                self._check_unique(definition, path)
                if definition.uuid is None:
                    definition, text = self._with_uuid(definition, text)
                    definitions.write(path, text)
            except (errors.VirtdError, OSError, ValueError) as exc:
                self.problems[f"definition {name}"] = definitions.complain(path, exc)
                continue
            machine = self.machines.get(name)
            if machine is None or machine.definition_text != text or machine.definition is None:
                new = machine is None
                machine = machine or self._machine(name)
                machine.definition, machine.definition_text = definition, text
                changed.append(name)
                self._publish("added" if new else "changed", name)
        return changed

    def unread_definitions(self) -> list[Difference]:
        """Files that aren't what was read of them last; a reload reads them."""
        directory = f"{self._services.paths.etc}/{self.name}"
        there = names(directory, ".toml")
        found = [
            Difference(
                "definition", name, f"{directory}/{name}.toml is gone, and virtd doesn't know that yet", "reload"
            )
            for name, machine in self.machines.items()
            if machine.definition is not None and name not in there
        ]
        for name in there:
            machine = self.machines.get(name)
            try:
                text: str | None = definitions.read(f"{directory}/{name}.toml")
            except (OSError, ValueError):
                text = None
            if (bad := self.problems.get(f"definition {name}")) is not None:
                found.append(Difference("definition", name, bad.text))
            elif machine is None or machine.definition is None or machine.definition_text != text:
                what = f"{directory}/{name}.toml was changed, and virtd hasn't read it yet"
                found.append(Difference("definition", name, what, "reload"))
        return found

    def check(self, text: str, source: str) -> D:
        """The definition in `text`, as it would be taken. Raises InvalidDefinition or Exists."""
        definition = self.parse(text, source)
        self._check_unique(definition, source)
        machine = self.machines.get(definition.name)
        if machine is not None and machine.uuid and definition.uuid and definition.uuid != machine.uuid:
            raise errors.Exists(
                f"{source}: uuid: {self.noun} {definition.name} exists with another uuid, {machine.uuid}",
                hint=(
                    "Leave the uuid out to change the definition, "
                    f"or undefine it first: {self.virtctl} undefine {definition.name}."
                ),
            )
        return definition

    def define(self, text: str, source: str) -> tuple[G, bool]:
        """Take a definition: the machine, and whether it is new. A uuid is made when there is none."""
        definition = self.check(text, source)
        if definition.uuid is None:
            definition, text = self._with_uuid(definition, text)
        return self._write(definition, text)

    def _with_uuid(self, definition: D, text: str) -> tuple[D, str]:
        """The definition with a uuid of its own: the one that the object has, or a new one."""
        machine = self.machines.get(definition.name)
        text = definitions.with_uuid(text, machine.uuid if machine is not None else "")
        return self.parse(text, definition.name), text

    def _write(self, definition: D, text: str) -> tuple[G, bool]:
        definitions.write(self._services.paths.definition(self.name, definition.name), text)
        new = definition.name not in self.machines
        machine = self._machine(definition.name)
        changed = machine.definition_text != text or machine.definition is None
        machine.definition, machine.definition_text = definition, text
        self.problems.pop(f"definition {definition.name}", None)
        if new:
            self._publish("added", definition.name)
        elif changed:
            self._publish("changed", definition.name)
        return machine, new

    async def undefine(self, name: str) -> None:
        machine = self.find(name)
        async with machine.exclusive("undefine"):
            require("undefine", machine.name, machine.state, self.virtctl)
            await machine.over.wait()
            await machine.tidy("undefine")
            # The record first: if that is refused, nothing has changed, and a crash in between leaves one that can
            # be undefined again.
            if machine.record is not None:
                self._shared.records.remove(machine.name)
            try:
                files.remove(machine.source)
            except errors.HostError:
                if machine.record is not None:
                    with contextlib.suppress(errors.HostError):  # fsck tells
                        self._shared.records.save(machine.record)
                raise
            self._forget(machine.name)

    def set_autostart(self, name: str, *, enable: bool) -> bool:
        """Change the definition's file; False if it said so already."""
        machine = self.find(name)
        if machine.definition is None:
            raise errors.NotFound(f"{self.noun.capitalize()} {machine.name} has no definition")
        if machine.definition.autostart == enable:
            return False
        text = definitions.with_autostart(machine.definition_text, enable=enable)
        definition = self.parse(text, machine.source)
        if definition.autostart != enable:
            raise errors.HostError(
                f"Cannot change autostart in {machine.source}", hint="Edit it, then: systemctl reload virtd."
            )
        self._write(definition, text)
        return True

    def _check_unique(self, definition: D, source: str) -> None:
        if definition.uuid is None:
            return
        uuid = definition.uuid
        for other in self.machines.values():
            if other.name != definition.name and other.uuid == uuid:
                raise errors.Exists(
                    f"{source}: uuid: {uuid} is the uuid of {self.noun} {other.name}",
                    hint="Leave it out: a new one is made.",
                )

    # Finding and describing

    def find(self, name: str) -> G:
        """By name or uuid. Raises NotFound."""
        if (machine := self.machines.get(name)) is not None:
            return machine
        if (uuid := canonical_uuid(name)) is not None:
            for machine in self.machines.values():
                if machine.uuid == uuid:
                    return machine
        raise errors.NotFound(f"There is no {self.noun} {name}", hint=f"{self.virtctl} list shows all.")

    def describe(self, machine: G) -> dict[str, Any]:
        """The short form, as `list --json` has it."""
        record = machine.record
        return {
            "name": machine.name,
            "driver": self.name,
            "uuid": machine.uuid,
            "state": machine.state.value,
            "reason": machine.reason,
            "pid": record.main_pid if record is not None and machine.alive and record.main_pid else None,
            "since": record.since if record is not None else None,
            "autostart": bool(machine.definition and machine.definition.autostart),
            "id": record.id if record is not None and record.id else None,
        }

    def describe_fully(self, machine: G) -> dict[str, Any]:
        """The long form, as `info --json` has it; each driver adds to it."""
        record = machine.record
        paths = self._services.paths
        ending = record.exit if record is not None else None
        mine = f"{self.name}/{machine.name}/"
        return self.describe(machine) | {
            "unit": machine.unit,
            "slots": [slot for slot in self._services.store.names() if slot.startswith(mine)],
            "exit": None
            if ending is None
            else {
                "code": ending.code,
                "signal": ending.signal,
                "cause": ending.cause,
                "at": ending.at,
                "by": ending.by,
            },
            "definition_path": machine.source if machine.definition is not None else None,
            "pending": machine.pending,
            "persistent": machine.definition is not None,
            "log": paths.stderr_log(self.name, machine.name),
            "console_log": paths.console_log(self.name, machine.name),
            "problems": [{"text": problem.text, "hint": problem.hint} for problem in machine.problems.values()],
        }

    def describe_named(self, name: str) -> dict[str, Any]:
        machine = self.machines.get(name)
        return self.describe(machine) if machine is not None else {"name": name, "driver": self.name}

    def live(self) -> int:
        return sum(machine.alive for machine in self.machines.values())

    def settled(self) -> bool:
        """Whether it is known of every object what became of it, so that a listing needn't wait."""
        return all(machine.settled.is_set() for machine in self.machines.values())

    def counts(self) -> dict[str, int]:
        counts = {state.value: 0 for state in State}
        for machine in self.machines.values():
            counts[machine.state.value] += 1
        return counts

    def troubles(self) -> list[tuple[str, Problem]]:
        found = [(key.partition(" ")[2], problem) for key, problem in self.problems.items()]
        for machine in self.machines.values():
            found += [(machine.name, problem) for problem in machine.problems.values()]
        return found

    def bad_definitions(self) -> list[tuple[str, Problem]]:
        return [
            (key.partition(" ")[2], problem) for key, problem in self.problems.items() if key.startswith("definition")
        ]

    # Order among the operations

    async def certain(self) -> None:
        """Wait until reconcile() is through.

        A start in the middle of it would be taken for one that a crash cut off, and rolled back while it is under
        way; and a guest whose record was lost would be started a second time. Raises Busy.
        """
        if self._reconciled.is_set():
            return
        await self._services.units()  # which says so if it is D-Bus that is away
        try:
            async with asyncio.timeout(RECONCILE_LIMIT):
                await self._reconciled.wait()
        except TimeoutError:
            raise errors.Busy(
                "virtd is still finding out what runs", hint="Try again in a moment. See: virtctl status."
            ) from None

    def _next_id(self) -> int:
        """A number for a guest that starts, larger than all that are in use, as libvirt's users know it."""
        used = [machine.record.id for machine in self.machines.values() if machine.record is not None]
        self._last_id = max(self._last_id, *used, 0) + 1
        return self._last_id

    def _machine(self, name: str) -> G:
        if name not in self.machines:
            self.machines[name] = self.make(name)
        return self.machines[name]

    def _forget(self, name: str) -> None:
        """The definition is gone. A guest that runs stays as a transient one until it ends."""
        machine = self.machines[name]
        machine.definition, machine.definition_text = None, ""
        if machine.alive:
            self._publish("changed", name)
            return
        if machine.record is not None:
            try:
                self._shared.records.remove(name)
            except errors.HostError as exc:  # it is gone all the same; the next start, or fsck, removes the file
                log.warning("The record of %s stays: %s", name, exc)
        del self.machines[name]
        self._publish("removed", name)

    def _published(self, event: str, machine: G) -> None:
        if self.machines.get(machine.name) is not machine:
            return
        self._publish(event, machine.name)
        if event == "ended":
            if machine.definition is None:
                self._forget(machine.name)
            else:
                self.after_end(machine)
