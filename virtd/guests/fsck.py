# SPDX-License-Identifier: LGPL-2.1-or-later
"""fsck for a driver that runs processes: compares what PID 1, /run, /etc and virtd itself have of each object.

All objects are compared at once first. What seems to differ is compared again while the object's lock is held, since
an operation may just have been under way. A repair takes the same steps as a start of the daemon (reconcile, rebuild,
put away), and another comparison shows what it has repaired.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from .. import errors, fdstore, files, records
from ..children.slots import CONSOLE_LOG, STDERR_LOG
from ..objects.protocol import Difference
from ..paths import names as names_in
from ..systemd.names import object_name

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from ..children.child import Child, Services
    from ..objects.object import D
    from ..records import Record, Records
    from ..systemd.state import Listed, UnitState
    from .guest import Guest

S = TypeVar("S")  # what was found in all places

ENDING = 15.0  # seconds after which an end that is under way counts as stuck


class Seen(NamedTuple):
    """What PID 1 has of a driver: units by object, and the (device, inode) pairs in its FD store by slot.

    `slots` is None where systemd can't list them (before 254).
    """

    units: dict[str, Listed]
    slots: dict[str, list[tuple[int, int]]] | None

    def slots_of(self, key: str) -> list[str]:
        return [slot for slot in self.slots or {} if slot.startswith(f"{key}/")]


class Defining(Protocol):
    """A driver; see inventory.Inventory."""

    def half_written(self) -> list[str]: ...
    def load_definitions(self) -> list[str]: ...
    def unread_definitions(self) -> list[Difference]: ...


class Supervising(Defining, Protocol):
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
    seen = await look(guests.services, guests.name)
    found = await loose_files(guests, repair=repair)
    suspects = [name for name in _names(guests, seen) if await _findings(guests, name, seen)]
    for name in suspects:
        found += await _examine(guests, name, repair=repair)
    return found


async def look(services: Services, driver: str) -> Seen:
    """What PID 1 has of a driver's objects."""
    units = await services.units()
    listed = await units.list(f"virtd-{driver}-*.service")
    dump = await units.store_dump(services.unit)
    held = services.store.held(dump or [])
    slots = {name: found for name, found in held.items() if name.startswith(f"{driver}/")}
    return Seen(
        {found: unit for unit in listed if (found := object_name(driver, unit.name)) and unit.load != "not-found"},
        None if dump is None else slots,
    )


def strays(services: Services, seen: Seen, key: str) -> list[str]:
    """The slots of an object in PID 1 or in this process."""
    return sorted({*seen.slots_of(key), *_ours(services, key)})


def traces(services: Services, seen: Seen, driver: str) -> set[str]:
    """The objects that have a unit or a slot."""
    slots = {*(seen.slots or {}), *_ours(services, driver)}
    return {*seen.units, *(slot.split("/")[1] for slot in slots)}


async def clear_away(services: Services, seen: Seen, driver: str, name: str) -> None:
    """Stop and forget the unit of an object that shouldn't have one, and drop its slots here and in PID 1."""
    units = await services.units()
    if unit := seen.units.get(name):
        await units.stop(unit.name)
        await units.collect(unit.name)
    expel(services, seen, f"{driver}/{name}")


def expel(services: Services, seen: Seen, key: str) -> None:
    for slot in strays(services, seen, key):
        services.store.expel(slot)


def save_or_remove(records: Records, name: str, known: Record | None) -> None:
    """Make the record on disk the same as in memory."""
    if known is not None:
        records.save(known)
    else:
        records.remove(name)


def _names(guests: Supervising, seen: Seen) -> list[str]:
    """Every object that has anything besides its definition and its logs."""
    run = f"{guests.services.paths.run}/{guests.name}"
    found = {*guests.machines, *traces(guests.services, seen, guests.name), *names_in(run, ".json")}
    found |= {name for name in names_in(run, "") if os.path.isdir(f"{run}/{name}")}
    return sorted(found)


# Files that no object owns


async def loose_files(driver: Defining, *, repair: bool) -> list[Difference]:
    """Incomplete files, and definitions that were changed but not read."""
    found = _loose(driver)
    if not repair or not found:
        return found
    for path in driver.half_written():
        files.remove(path)
    driver.load_definitions()
    left = {difference.text for difference in _loose(driver)}
    return [marked(difference, repaired=difference.text not in left) for difference in found]


def _loose(driver: Defining) -> list[Difference]:
    found = [
        Difference("file", "", f"{path} is an incomplete file left by a crash", "remove it")
        for path in driver.half_written()
    ]
    return found + driver.unread_definitions()


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
    return await check(
        guests.services, name,
        look=lambda: look(guests.services, guests.name),
        findings=lambda seen: _findings(guests, name, seen),
        mend=lambda seen: _mend(guests, name, seen),
        repair=repair,
    )  # fmt: skip


async def check(
    services: Services,
    name: str,
    *,
    look: Callable[[], Awaitable[S]],
    findings: Callable[[S], Awaitable[list[Difference]]],
    mend: Callable[[S], Awaitable[None]],
    repair: bool,
) -> list[Difference]:
    """What differs about one object. With `repair` it is repaired as far as possible, and compared once more."""
    seen = await look()
    found = await findings(seen)
    if not repair or not any(difference.repair for difference in found):
        return found
    try:
        await mend(seen)
    except (errors.VirtdError, fdstore.StoreError) as exc:
        found.append(Difference("record", name, f"{name} could not be repaired: {exc}"))
    await asyncio.to_thread(services.store.barrier)
    left = {(difference.kind, difference.text) for difference in await findings(await look())}
    return [marked(difference, repaired=(difference.kind, difference.text) not in left) for difference in found]


def marked(difference: Difference, *, repaired: bool) -> Difference:
    """The difference, marked as repaired if it was."""
    return Difference(
        difference.kind, difference.object, difference.text, difference.repair, repaired and bool(difference.repair)
    )


async def _findings(guests: Supervising, name: str, seen: Seen) -> list[Difference]:
    """What differs about one object at this moment."""
    machine = guests.machines.get(name)
    found = _record(guests, name)
    if machine is not None and machine.alive:
        units = await guests.services.units()
        unit = await units.state(machine.unit) if name in seen.units else None
        if machine.child is None:
            return found  # it ended while systemd was asked, and is put away
        found += _process(machine, unit)
        found += slot_differences(guests.services, machine.child, seen)
        if machine.housed and not os.path.isdir(machine.runtime):
            text = f"{machine.runtime} is gone, which {name} needs while it runs"
            found.append(Difference("directory", name, text))
    else:
        found += _leftovers(guests, name, seen)
    return found


def _leftovers(guests: Supervising, name: str, seen: Seen) -> list[Difference]:
    """What is left of an object that has ended, or that doesn't exist."""
    found = []
    running = False
    key = f"{guests.name}/{name}"
    if unit := seen.units.get(name):
        running = unit.active in ("active", "activating", "reloading") and unit.sub != "exited"
        text = f"{unit.name} {'runs' if running else 'has ended'}, and virtd knows of no process in it"
        found.append(Difference("unit", name, text, "take it back" if running else "have systemd forget it"))
    for slot in strays(guests.services, seen, key):
        text = f"slot {slot} is kept, and {name} doesn't run"
        found.append(Difference("slot", name, text, "give it to the process" if running else "drop it"))
    runtime = guests.services.paths.runtime(guests.name, name)
    if os.path.lexists(runtime):
        text = f"{runtime} is there, and {name} doesn't run"
        found.append(Difference("directory", name, text, "leave it to the process" if running else "remove it"))
    return found


def _ours(services: Services, key: str) -> list[str]:
    return [slot for slot in services.store.names() if slot.startswith(f"{key}/")]


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


def slot_differences(services: Services, child: Child, seen: Seen) -> list[Difference]:
    """Compare the slots of a running child in PID 1 with those in this process."""
    if seen.slots is None:
        return []
    found = []
    ours = services.store.slots()
    for slot in child.slot_names():
        held = seen.slots.get(slot, [])
        if not held:
            text = f"slot {slot} is missing: systemd doesn't hold it"
            what = "put it there again" if slot in ours or _source(child, slot) is not None else ""
            found.append(Difference("slot", child.name, text, what))
        elif slot not in ours:
            found.append(Difference("slot", child.name, f"slot {slot} isn't virtd's: it was refused at a start"))
        elif held != [(ours[slot].dev, ours[slot].ino)]:
            text = f"slot {slot} holds something else in systemd than in virtd"
            found.append(Difference("slot", child.name, text, "put virtd's there"))
    for slot in sorted(set(seen.slots_of(child.key)) - set(child.slot_names())):
        found.append(Difference("slot", child.name, f"slot {slot} is one that this version doesn't know"))
    return found


async def mend_slots(services: Services, child: Child, seen: Seen) -> None:
    """Put into PID 1 again what this process has."""
    store = services.store
    ours = store.slots()
    for slot in child.slot_names():
        source = _source(child, slot)
        known = [(ours[slot].dev, ours[slot].ino)] if slot in ours else None
        if seen.slots is None or seen.slots.get(slot) == known:
            continue
        if source is not None:
            await asyncio.to_thread(store.put, slot, source)
        elif slot in ours:
            await asyncio.to_thread(store.renew, slot)


def _source(child: Child, slot: str) -> int | None:
    """The descriptor of the log, for a log's slot."""
    log = {CONSOLE_LOG: "console", STDERR_LOG: "stderr"}.get(slot.rpartition("/")[2])
    opened = getattr(child, log) if log else None
    return opened.fd if opened is not None and opened.fd >= 0 else None


def _record(guests: Supervising, name: str) -> list[Difference]:
    machine = guests.machines.get(name)
    known = machine.record if machine is not None else None
    if found := record_differences(guests.services.paths.record(guests.name, name), name, known):
        return found
    if machine is not None and known is not None and not machine.alive and (known.unit or known.slots):
        path = guests.services.paths.record(guests.name, name)
        return [Difference("record", name, f"{path} tells of things that were not put away", "put them away")]
    return []


def record_differences(path: str, name: str, known: records.Record | None) -> list[Difference]:
    """Compare the record on disk with the one in memory."""
    try:
        there: records.Record | None = records.read(path)
    except FileNotFoundError:
        there = None
    except (OSError, ValueError) as exc:
        what = "write it anew" if known is not None else "remove it"
        return [Difference("record", name, f"{path} can't be read: {exc}", what)]
    if known is None:
        if there is None:
            return []
        return [Difference("record", name, f"{path} is there, and virtd knows of no {name}", "remove it")]
    if there is None:
        return [Difference("record", name, f"{path} is missing", "write it anew")]
    known = records.decode(records.encode(known))  # JSON has no tuples
    if there != known:
        keys = [key for key in known.__struct_fields__ if getattr(known, key) != getattr(there, key)]
        return [Difference("record", name, f"{path} says something else of {', '.join(keys)}", "write it anew")]
    return []


async def _mend(guests: Supervising, name: str, seen: Seen) -> None:
    machine = guests.machines.get(name)
    if machine is not None and machine.alive:
        await _mend_running(guests, machine, seen)
        return
    unit = seen.units.get(name)
    if unit is not None:
        # As at a start of the daemon with a unit without a record: it is taken back, or judged to have ended.
        await guests.rebuild(name)
        return
    expel(guests.services, seen, f"{guests.name}/{name}")
    if machine is not None and machine.record is not None:
        await machine.finishing.put_away()
        guests.records.save(machine.recorded)
        return
    await asyncio.to_thread(files.remove_tree, guests.services.paths.runtime(guests.name, name))
    guests.records.remove(name)


async def _mend_running(guests: Supervising, machine: Guest[D], seen: Seen) -> None:
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
    await mend_slots(guests.services, child, seen)
    guests.records.save(machine.recorded)
