# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QEMU driver: all domains, from their definitions, records, units and slots."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from ... import errors, files, journal
from ...messages import Message
from ...model import domain as model
from ...model.state import Cause, State, require
from ...paths import names
from ...process import boot_id
from ...records import Record, Records, now
from ...units import object_name
from .. import definitions
from ..protocol import Found, Problem
from . import command, operations, starting
from . import host as hostinfo
from .machine import DRIVER, Machine, Shared

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...child import Services
    from ...model.settings import Qemu, Settings
    from ..protocol import Peers, Publish

log = logging.getLogger(__name__)

RECONCILE_LIMIT = 30.0  # seconds that a start waits after the daemon's own
AT_ONCE = 8  # starts in parallel at boot; more only slow each other down on a small host


def make(services: Services, settings: Settings, publish: Publish, _peers: Peers) -> Driver:
    return Driver(services, settings.qemu, publish)


class Driver:
    """`publish(event, name)` is told "added", "removed", "changed" and "ended"."""

    name = DRIVER
    noun = "domain"

    def __init__(self, services: Services, settings: Qemu, publish: Callable[[str, str], None]) -> None:
        self._publish = publish
        self._services = services
        self.machines: dict[str, Machine] = {}
        self.problems: dict[str, Problem] = {}
        self.found = Found()
        self._shared = Shared(
            services, Records(services.paths, DRIVER), settings, self._published, self._next_id, boot_id()
        )
        self._last_id = 0
        self._reconciled = asyncio.Event()  # cleared while what runs isn't known for certain
        self._reconciled.set()

    # Start-up

    def restore(self) -> None:
        """First step: records, slots and pumps; no bus yet."""
        self._reconciled.clear()
        loaded = self._shared.records.load()
        for bad in loaded.quarantined:
            text = f"The record of domain {bad.name} can't be read: {bad.reason}"
            self.problems[f"record {bad.name}"] = Problem(
                text, f"It was moved to {bad.moved_to}; the domain is rebuilt from its unit."
            )
            journal.send(
                text, message_id=Message.RECORD_QUARANTINED, level="error",
                VIRTD_DRIVER=DRIVER, VIRTD_NAME=bad.name, VIRTD_FILE=bad.moved_to,
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

    async def reconcile(self) -> None:
        """Second step: compare with systemd, finish or roll back what a crash cut off."""
        units = await self._services.units()
        present = {
            name for unit in await units.list(f"virtd-{DRIVER}-*.service") if (name := object_name(DRIVER, unit.name))
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
                    machine.spawn(operations.finish(machine), "finish")
        for machine in machines:
            if machine.definition is None and not machine.alive and machine.settled.is_set() and not machine.problems:
                self._forget(machine.name)  # its definition was removed, or it ended as a transient one, meanwhile
        slots = {name.split("/")[1] for name in self._services.store.names() if name.startswith(f"{DRIVER}/")}
        recorded = {machine.name for machine in machines}
        for name in sorted((present | slots) - recorded):
            await self._rebuild(name, unit=name in present, new=name not in known)
        self._reconciled.set()

    async def _rebuild(self, name: str, *, unit: bool, new: bool) -> None:
        """A unit or slots that no record tells of: made whole from what there is, or cleared away if nothing runs."""
        machine = self._machine(name)
        units = await self._services.units()
        state = await units.state(machine.unit) if unit else None
        held = self._services.store.slots()
        slots = {slot: f"{held[slot].dev}:{held[slot].ino}" for slot in held if slot.startswith(f"{DRIVER}/{name}/")}
        expected = [f"{DRIVER}/{name}/{slot}" for slot in ("stdin", "stdout", "stderr", "console.log", "log")]
        record = Record(
            driver=DRIVER,
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
                f"Rolled back domain {name}: slots without a record or a unit",
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
            log.warning("Domain %s was rebuilt from its unit: %s", name, result or "as it was")
            if new:
                self._publish("added", name)

    async def autostart(self) -> None:
        """Start what is to be started at boot; a name is started once per boot, however often the daemon starts."""
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(machine: Machine) -> None:
            async with slots:
                try:
                    await self.start(machine.name, "autostart")
                except errors.VirtdError as exc:
                    log.error("Cannot autostart %s: %s", machine.name, exc)
                    machine.problems["start"] = Problem(f"Autostart failed: {exc.message}", exc.hint)

        wanted = [
            machine for machine in self.machines.values() if machine.definition and machine.definition.autostart
        ]
        await asyncio.gather(*(one(machine) for machine in wanted if not machine.alive))

    def grown(self, key: str) -> None:
        """The pump's word that bytes landed in a log that is watched: `key` is a slot's name."""
        driver, name, slot = key.split("/")
        if (driver, slot) == (DRIVER, "stderr") and (machine := self.machines.get(name)) is not None:
            machine.forward_stderr()

    async def reload(self) -> None:
        """Nothing of a domain's is ever removed by others."""

    async def close(self) -> None:
        await asyncio.gather(*(machine.close() for machine in self.machines.values()))

    # Definitions

    def load_definitions(self) -> list[str]:
        """Read all definitions again; the names of those that changed.

        A bad one is a problem, and its domain is as before.
        """
        directory = f"{self._services.paths.etc}/{DRIVER}"
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
                domain = (known.parsed(text) if known is not None else None) or model.parse(text, path)
                definitions.check_name(domain.name, name, path)
                self._check_unique(domain, path)
                if domain.uuid is None:
                    domain, text = self._with_uuid(domain, text)
                    definitions.write(path, text)
            except (errors.VirtdError, OSError, ValueError) as exc:
                self.problems[f"definition {name}"] = definitions.complain(path, exc)
                continue
            machine = self.machines.get(name)
            if machine is None or machine.definition_text != text or machine.definition is None:
                new = machine is None
                machine = machine or self._machine(name)
                machine.definition, machine.definition_text = domain, text
                changed.append(name)
                self._publish("added" if new else "changed", name)
        return changed

    def check(self, text: str, source: str) -> model.Domain:
        """The definition in `text`, as it would be taken. Raises InvalidDefinition or Exists."""
        domain = model.parse(text, source)
        self._check_unique(domain, source)
        machine = self.machines.get(domain.name)
        if machine is not None and machine.uuid and domain.uuid and domain.uuid != machine.uuid:
            raise errors.Exists(
                f"{source}: uuid: domain {domain.name} exists with another uuid, {machine.uuid}",
                hint=(
                    "Leave the uuid out to change the definition, "
                    f"or undefine it first: virtctl undefine {domain.name}."
                ),
            )
        return domain

    def define(self, text: str, source: str) -> tuple[Machine, bool]:
        """Take a definition: the machine, and whether it is new. A uuid is made when there is none."""
        domain = self.check(text, source)
        if domain.uuid is None:
            domain, text = self._with_uuid(domain, text)
        return self._write(domain, text)

    def _with_uuid(self, domain: model.Domain, text: str) -> tuple[model.Domain, str]:
        """The definition with a uuid of its own: the one that the domain has, or a new one."""
        machine = self.machines.get(domain.name)
        text = definitions.with_uuid(text, machine.uuid if machine is not None else "")
        return model.parse(text, domain.name), text

    def _write(self, domain: model.Domain, text: str) -> tuple[Machine, bool]:
        definitions.write(self._services.paths.definition(DRIVER, domain.name), text)
        new = domain.name not in self.machines
        machine = self._machine(domain.name)
        changed = machine.definition_text != text or machine.definition is None
        machine.definition, machine.definition_text = domain, text
        self.problems.pop(f"definition {domain.name}", None)
        if new:
            self._publish("added", domain.name)
        elif changed:
            self._publish("changed", domain.name)
        return machine, new

    async def undefine(self, name: str) -> None:
        machine = self.find(name)
        async with machine.exclusive("undefine"):
            require("undefine", machine.name, machine.state)
            await machine.over.wait()
            files.remove(machine.source)
            self._forget(machine.name)

    def set_autostart(self, name: str, *, enable: bool) -> bool:
        """Change the definition's file; False if it said so already."""
        machine = self.find(name)
        if machine.definition is None:
            raise errors.NotFound(f"Domain {machine.name} has no definition")
        if machine.definition.autostart == enable:
            return False
        text = definitions.with_autostart(machine.definition_text, enable=enable)
        domain = model.parse(text, machine.source)
        if domain.autostart != enable:
            raise errors.HostError(
                f"Cannot change autostart in {machine.source}", hint="Edit it, then: systemctl reload virtd."
            )
        self._write(domain, text)
        return True

    def _check_unique(self, domain: model.Domain, source: str) -> None:
        if domain.uuid is None:
            return
        uuid = domain.uuid
        for other in self.machines.values():
            if other.name != domain.name and other.uuid == uuid:
                raise errors.Exists(
                    f"{source}: uuid: {uuid} is the uuid of domain {other.name}",
                    hint="Leave it out: a new one is made.",
                )

    # Finding and describing

    def find(self, name: str) -> Machine:
        """By name or uuid. Raises NotFound."""
        if (machine := self.machines.get(name)) is not None:
            return machine
        if (uuid := model.canonical_uuid(name)) is not None:
            for machine in self.machines.values():
                if machine.uuid == uuid:
                    return machine
        raise errors.NotFound(f"There is no domain {name}", hint="virtctl list shows all.")

    def describe(self, machine: Machine) -> dict[str, Any]:
        """The short form, as `virtctl list --json` has it."""
        record = machine.record
        return {
            "name": machine.name,
            "driver": DRIVER,
            "uuid": machine.uuid,
            "state": machine.state.value,
            "reason": machine.reason,
            "pid": record.main_pid if record is not None and machine.alive and record.main_pid else None,
            "since": record.since if record is not None else None,
            "autostart": bool(machine.definition and machine.definition.autostart),
            "id": record.id if record is not None and record.id else None,
        }

    def describe_fully(self, machine: Machine) -> dict[str, Any]:
        """The long form, as `virtctl info --json` has it."""
        record = machine.record
        domain = machine.running_definition
        paths = self._services.paths
        ending = record.exit if record is not None else None
        mine = f"{DRIVER}/{machine.name}/"
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
            "memory": domain.memory_bytes if domain is not None else None,
            "vcpus": domain.vcpus if domain is not None else None,
            "machine": domain.machine if domain is not None else None,
            "disks": [disk.path for disk in domain.disk] + [cdrom.path for cdrom in domain.cdrom]
            if domain is not None
            else [],
            "monitor": machine.monitor.link.value if machine.monitor is not None else None,
            "vnc": command.vnc_socket(machine.runtime)
            if machine.alive and domain is not None and domain.vnc is not None and domain.vnc.enabled
            else None,
            "log": paths.stderr_log(DRIVER, machine.name),
            "console_log": paths.console_log(DRIVER, machine.name),
            "problems": [{"text": problem.text, "hint": problem.hint} for problem in machine.problems.values()],
        }

    def describe_named(self, name: str) -> dict[str, Any]:
        machine = self.machines.get(name)
        return self.describe(machine) if machine is not None else {"name": name, "driver": DRIVER}

    def live(self) -> int:
        return sum(machine.alive for machine in self.machines.values())

    def settled(self) -> bool:
        """Whether it is known of every domain what became of it, so that a listing needn't wait."""
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

    def warnings(self, domain: model.Domain) -> list[str]:
        """What a definition names and the host hasn't got yet: no error before the start."""
        return [f"{key}: {text}" for key, text in hostinfo.missing_files(domain)]

    # Operations that need more than the one machine

    async def start(self, name: str, by: str) -> bool:
        machine = self.find(name)
        await self._certain()
        return await starting.start(machine, [other for other in self.machines.values() if other is not machine], by)

    async def _certain(self) -> None:
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

    def _machine(self, name: str) -> Machine:
        if name not in self.machines:
            self.machines[name] = Machine(self._shared, name)
        return self.machines[name]

    def _forget(self, name: str) -> None:
        """The definition is gone. A guest that runs stays as a transient domain until it ends."""
        machine = self.machines[name]
        machine.definition, machine.definition_text = None, ""
        if machine.alive:
            self._publish("changed", name)
            return
        if machine.record is not None:
            self._shared.records.remove(name)
        del self.machines[name]
        self._publish("removed", name)

    def _published(self, event: str, machine: Machine) -> None:
        if self.machines.get(machine.name) is not machine:
            return
        self._publish(event, machine.name)
        if event == "ended":
            self._after_end(machine)

    def _after_end(self, machine: Machine) -> None:
        if machine.definition is None:
            self._forget(machine.name)
            return
        panicked = (
            machine.record is not None
            and machine.record.exit is not None
            and machine.record.exit.cause == Cause.PANIC
        )
        if panicked and machine.definition.on_crash is model.OnCrash.RESTART:
            machine.spawn(self._restart(machine), "restart-after-panic")

    async def _restart(self, machine: Machine) -> None:
        try:
            await self.start(machine.name, "on_crash")
        except errors.VirtdError as exc:
            machine.problems["start"] = Problem(f"The restart after a panic failed: {exc.message}", exc.hint)
