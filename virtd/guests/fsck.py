# SPDX-License-Identifier: LGPL-2.1-or-later
"""fsck for a driver that runs processes: compares what PID 1, /run, /etc and virtd itself have of each object.

All objects are compared at once first. What seems to differ is compared again while the object's lock is held, since
an operation may just have been under way. A repair takes the same steps as a start of the daemon (reconcile, rebuild,
put away), and another comparison shows what it has repaired.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Protocol

from .. import errors, files
from ..objects import comparing
from ..objects.protocol import Difference
from ..paths import names as names_in

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..children.child import Services
    from ..objects.object import D
    from ..records import Records
    from ..systemd.state import UnitState
    from .guest import Guest


ENDING = 15.0  # seconds after which an end that is under way counts as stuck


class Supervising(comparing.Defining, Protocol):
    """A driver that runs processes; see driver.GuestDriver."""

    name: str
    records: Records

    @property
    def services(self) -> Services: ...
    @property
    def machines(self) -> Mapping[str, Guest[Any]]: ...
    async def certain(self) -> None: ...
    async def rebuild(self, name: str) -> None: ...


async def compare(guests: Supervising, *, repair: bool) -> list[Difference]:
    """See protocol.Comparing."""
    await guests.certain()
    seen = await comparing.look(guests.services, guests.name)
    found = await comparing.loose_files(guests, repair=repair)
    suspects = [name for name in _names(guests, seen) if await _findings(guests, name, seen)]
    for name in suspects:
        found += await _examine(guests, name, repair=repair)
    return found


def _names(guests: Supervising, seen: comparing.Seen) -> list[str]:
    """Every object that has anything besides its definition and its logs."""
    run = f"{guests.services.paths.run}/{guests.name}"
    found = {*guests.machines, *comparing.traces(guests.services, seen, guests.name), *names_in(run, ".json")}
    found |= {name for name in names_in(run, "") if os.path.isdir(f"{run}/{name}")}
    return sorted(found)


# One object


async def _examine(guests: Supervising, name: str, *, repair: bool) -> list[Difference]:
    machine = guests.machines.get(name)
    if machine is None:
        return await _check(guests, name, repair=repair)
    try:
        async with machine.exclusive("check"):
            if machine.child is not None and not machine.child.alive():
                try:
                    async with asyncio.timeout(ENDING):
                        await machine.over.wait()
                except TimeoutError:
                    pass  # what is wrong with it is found below
            return await _check(guests, name, repair=repair)
    except errors.Busy as exc:
        return [Difference("busy", name, exc.message)]


async def _check(guests: Supervising, name: str, *, repair: bool) -> list[Difference]:
    return await comparing.check(
        guests.services, name,
        look=lambda: comparing.look(guests.services, guests.name),
        findings=lambda seen: _findings(guests, name, seen),
        mend=lambda seen: _mend(guests, name, seen),
        repair=repair,
    )  # fmt: skip


async def _findings(guests: Supervising, name: str, seen: comparing.Seen) -> list[Difference]:
    """What differs about one object at this moment."""
    machine = guests.machines.get(name)
    found = _record(guests, name)
    if machine is not None and machine.alive:
        units = await guests.services.units()
        unit = await units.state(machine.unit) if name in seen.units else None
        if machine.child is None:
            return found  # it ended while systemd was asked, and is put away
        found += _process(machine, unit)
        found += comparing.slot_differences(guests.services, machine.child, seen)
        if machine.housed and not os.path.isdir(machine.runtime):
            text = f"{machine.runtime} is gone, which {name} needs while it runs"
            found.append(Difference("directory", name, text))
    else:
        found += _leftovers(guests, name, seen)
    return found


def _leftovers(guests: Supervising, name: str, seen: comparing.Seen) -> list[Difference]:
    """What is left of an object that has ended, or that doesn't exist."""
    found = []
    running = False
    key = f"{guests.name}/{name}"
    if unit := seen.units.get(name):
        running = unit.active in ("active", "activating", "reloading") and unit.sub != "exited"
        text = f"{unit.name} {'runs' if running else 'has ended'}, and virtd knows of no process in it"
        found.append(Difference("unit", name, text, "take it back" if running else "have systemd forget it"))
    for slot in comparing.strays(guests.services, seen, key):
        text = f"slot {slot} is kept, and {name} doesn't run"
        found.append(Difference("slot", name, text, "give it to the process" if running else "drop it"))
    runtime = guests.services.paths.runtime(guests.name, name)
    if os.path.lexists(runtime):
        text = f"{runtime} is there, and {name} doesn't run"
        found.append(Difference("directory", name, text, "leave it to the process" if running else "remove it"))
    return found


def _process(machine: Guest[D], unit: UnitState | None) -> list[Difference]:
    """Compare the unit of a running object with its record."""
    name, record = machine.name, machine.record
    if record is None or machine.child is None:
        return []
    if not machine.child.alive():
        text = f"the process of {name} (PID {record.main_pid}) has ended, and its end isn't on record"
        return [Difference("process", name, text, "find out how it ended")]
    if unit is None:
        text = f"{machine.unit} is gone, but its process runs (PID {record.main_pid})"
        return [Difference("unit", name, text)]
    if unit.main_pid != record.main_pid:
        text = f"{machine.unit} has PID {unit.main_pid}, the record {record.main_pid}"
        return [Difference("process", name, text, "write the unit's into the record" if unit.main_pid else "")]
    return []


def _record(guests: Supervising, name: str) -> list[Difference]:
    machine = guests.machines.get(name)
    known = machine.record if machine is not None else None
    if found := comparing.record_differences(guests.services.paths.record(guests.name, name), name, known):
        return found
    if machine is not None and known is not None and not machine.alive and (known.unit or known.slots):
        path = guests.services.paths.record(guests.name, name)
        return [Difference("record", name, f"{path} tells of things that were not put away", "put them away")]
    return []


async def _mend(guests: Supervising, name: str, seen: comparing.Seen) -> None:
    machine = guests.machines.get(name)
    if machine is not None and machine.alive:
        await _mend_running(guests, machine, seen)
        return
    unit = seen.units.get(name)
    if unit is not None:
        # As at a start of the daemon with a unit without a record: it is taken back, or judged to have ended.
        await guests.rebuild(name)
        return
    comparing.expel(guests.services, seen, f"{guests.name}/{name}")
    if machine is not None and machine.record is not None:
        await machine.finishing.put_away()
        guests.records.save(machine.recorded)
        return
    await asyncio.to_thread(files.remove_tree, guests.services.paths.runtime(guests.name, name))
    guests.records.remove(name)


async def _mend_running(guests: Supervising, machine: Guest[D], seen: comparing.Seen) -> None:
    child = machine.live.child
    if not child.alive():
        await machine.finishing.finish()
        return
    units = await guests.services.units()
    unit = await units.state(machine.unit) if machine.name in seen.units else None
    if not machine.alive:
        return  # it has ended meanwhile
    if unit is not None and unit.main_pid not in (0, machine.recorded.main_pid):
        child.identify(unit)
        machine.save(main_pid=child.pid, main_start=child.start, invocation_id=unit.invocation_id)
    await comparing.mend_slots(guests.services, child, seen)
    guests.records.save(machine.recorded)
