# SPDX-License-Identifier: LGPL-2.1-or-later
"""`virtctl fsck` for a driver that runs processes: what PID 1, /run, /etc and virtd itself say of each object.

All objects are looked at together first. What seems to differ is looked at again with the object's lock held, since
much of it may just have been under way. A repair goes through what a start of the daemon does as well (reconcile,
rebuild, put away), and what it has mended is told by looking once more.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import errors, fdstore, files, records
from ..child import CONSOLE_LOG, SLOTS, STDERR_LOG
from ..paths import names as names_in
from ..units import object_name
from .protocol import Difference

if TYPE_CHECKING:
    from ..units import Listed, UnitState
    from .guest import Guest
    from .guests import Guests

    AnyGuests = Guests[Any, Any]

ENDING = 15.0  # seconds that an end which is under way may take until it counts as stuck


class Seen(NamedTuple):
    """What PID 1 has of a driver: units by object, and the store's (device, inode) by slot.

    `slots` is None where systemd can't tell (before 254).
    """

    units: dict[str, Listed]
    slots: dict[str, list[tuple[int, int]]] | None

    def slots_of(self, key: str) -> list[str]:
        return [slot for slot in self.slots or {} if slot.startswith(f"{key}/")]


async def compare(guests: AnyGuests, *, repair: bool) -> list[Difference]:
    """See protocol.Comparing."""
    await guests.certain()
    seen = await _look(guests)
    found = _files(guests)
    if repair and found:
        found = await _mend_files(guests, found)
    suspects = [name for name in _names(guests, seen) if await _findings(guests, name, seen)]
    for name in suspects:
        found += await _examine(guests, name, repair=repair)
    return found


async def _look(guests: AnyGuests) -> Seen:
    services = guests.services
    units = await services.units()
    listed = await units.list(f"virtd-{guests.name}-*.service")
    dump = await units.store_dump(services.unit)
    slots: dict[str, list[tuple[int, int]]] = {}
    for name, dev, ino in dump or []:
        if name.startswith(f"{guests.name}/"):
            slots.setdefault(name, []).append((dev, ino))
    return Seen(
        {
            found: unit
            for unit in listed
            if (found := object_name(guests.name, unit.name)) and unit.load != "not-found"
        },
        None if dump is None else slots,
    )


def _names(guests: AnyGuests, seen: Seen) -> list[str]:
    """Every object that anything is there of, besides its definition and its logs."""
    run = f"{guests.services.paths.run}/{guests.name}"
    found = {*guests.machines, *seen.units, *names_in(run, ".json")}
    found |= {slot.split("/")[1] for slot in seen.slots or {}}
    found |= {slot.split("/")[1] for slot in guests.services.store.names() if slot.startswith(f"{guests.name}/")}
    found |= {name for name in names_in(run, "") if os.path.isdir(f"{run}/{name}")}
    return sorted(found)


# Files that no object owns


def _files(guests: AnyGuests) -> list[Difference]:
    found = [
        Difference("file", "", f"{path} is half of a file: a crash came before the rest", "remove it")
        for path in guests.half_written()
    ]
    return found + guests.unread_definitions()


async def _mend_files(guests: AnyGuests, found: list[Difference]) -> list[Difference]:
    for path in guests.half_written():
        files.remove(path)
    guests.load_definitions()
    left = {difference.text for difference in _files(guests)}
    return [_told(difference, repaired=difference.text not in left) for difference in found]


# One object


async def _examine(guests: AnyGuests, name: str, *, repair: bool) -> list[Difference]:
    machine = guests.machines.get(name)
    if machine is None:
        return await _settle(guests, name, repair=repair)
    try:
        async with machine.exclusive("check"):
            if machine.child is not None and not machine.child.alive():
                try:
                    async with asyncio.timeout(ENDING):
                        await machine.over.wait()
                except TimeoutError:
                    pass  # what is wrong with it is found below
            return await _settle(guests, name, repair=repair)
    except errors.Busy as exc:
        return [Difference("busy", name, exc.message)]


async def _settle(guests: AnyGuests, name: str, *, repair: bool) -> list[Difference]:
    seen = await _look(guests)
    found = await _findings(guests, name, seen)
    if not repair or not any(difference.repair for difference in found):
        return found
    try:
        await _mend(guests, name, seen)
    except (errors.VirtdError, fdstore.StoreError) as exc:
        found.append(Difference("record", name, f"{name} could not be repaired: {exc}"))
    await asyncio.to_thread(guests.services.store.barrier)
    left = {(difference.kind, difference.text) for difference in await _findings(guests, name, await _look(guests))}
    return [_told(difference, repaired=(difference.kind, difference.text) not in left) for difference in found]


def _told(difference: Difference, *, repaired: bool) -> Difference:
    return Difference(
        difference.kind, difference.object, difference.text, difference.repair, repaired and bool(difference.repair)
    )


async def _findings(guests: AnyGuests, name: str, seen: Seen) -> list[Difference]:
    """What differs about one object, right now."""
    machine = guests.machines.get(name)
    found = _record(guests, name)
    if machine is not None and machine.alive:
        units = await guests.services.units()
        found += _process(machine, await units.state(machine.unit) if name in seen.units else None)
        found += _slots(guests, machine, seen)
        if not os.path.isdir(machine.runtime):
            text = f"{machine.runtime} is gone, which {name} needs while it runs"
            found.append(Difference("directory", name, text))
    else:
        found += _leftovers(guests, name, seen)
    return found


def _leftovers(guests: AnyGuests, name: str, seen: Seen) -> list[Difference]:
    """What is there of an object that has ended, or of none at all."""
    found = []
    running = False
    key = f"{guests.name}/{name}"
    if unit := seen.units.get(name):
        running = unit.active in ("active", "activating", "reloading") and unit.sub != "exited"
        text = f"{unit.name} {'runs' if running else 'has ended'}, and virtd knows of no process in it"
        found.append(Difference("unit", name, text, "take it back" if running else "have systemd forget it"))
    for slot in sorted({*seen.slots_of(key), *_ours(guests, key)}):
        text = f"slot {slot} is kept, and {name} doesn't run"
        found.append(Difference("slot", name, text, "give it to the process" if running else "drop it"))
    runtime = guests.services.paths.runtime(guests.name, name)
    if os.path.lexists(runtime):
        text = f"{runtime} is there, and {name} doesn't run"
        found.append(Difference("directory", name, text, "leave it to the process" if running else "remove it"))
    return found


def _ours(guests: AnyGuests, key: str) -> list[str]:
    return [slot for slot in guests.services.store.names() if slot.startswith(f"{key}/")]


def _process(machine: Guest[Any], unit: UnitState | None) -> list[Difference]:
    """The unit of an object that runs, beside its record."""
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


def _slots(guests: AnyGuests, machine: Guest[Any], seen: Seen) -> list[Difference]:
    """The slots of an object that runs: in PID 1, in this process, in the record."""
    if seen.slots is None:
        return []
    found = []
    ours = guests.services.store.slots()
    expected = [f"{machine.driver}/{machine.name}/{slot}" for slot in SLOTS]
    for slot in expected:
        held = seen.slots.get(slot, [])
        source = _source(machine, slot)
        if not held:
            text = f"slot {slot} is missing: systemd doesn't hold it"
            what = "put it there again" if slot in ours or source is not None else ""
            found.append(Difference("slot", machine.name, text, what))
        elif slot not in ours:
            found.append(Difference("slot", machine.name, f"slot {slot} isn't virtd's: it was refused at a start"))
        elif held != [(ours[slot].dev, ours[slot].ino)]:
            text = f"slot {slot} holds something else in systemd than in virtd"
            found.append(Difference("slot", machine.name, text, "put virtd's there"))
    for slot in sorted(set(seen.slots_of(f"{machine.driver}/{machine.name}")) - set(expected)):
        found.append(Difference("slot", machine.name, f"slot {slot} is one that this version doesn't know"))
    return found


def _source(machine: Guest[Any], slot: str) -> int | None:
    """For a log's slot: the descriptor that the log has."""
    log = {CONSOLE_LOG: "console", STDERR_LOG: "stderr"}.get(slot.rpartition("/")[2])
    opened = getattr(machine.child, log) if log and machine.child is not None else None
    return opened.fd if opened is not None and opened.fd >= 0 else None


def _record(guests: AnyGuests, name: str) -> list[Difference]:
    """The record on disk, beside the one in memory."""
    path = guests.services.paths.record(guests.name, name)
    machine = guests.machines.get(name)
    known = machine.record if machine is not None else None
    try:
        with open(path, "rb") as file:
            there: records.Record | None = records.decode(file.read())
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
    if machine is not None and not machine.alive and (known.unit or known.slots):
        return [Difference("record", name, f"{path} tells of things that were not put away", "put them away")]
    return []


async def _mend(guests: AnyGuests, name: str, seen: Seen) -> None:
    machine = guests.machines.get(name)
    if machine is not None and machine.alive:
        await _mend_running(guests, machine, seen)
        return
    unit = seen.units.get(name)
    if unit is not None:
        # As a start of the daemon does with a unit that no record tells of: taken back, or its end is found out.
        await guests.rebuild(name)
        return
    store = guests.services.store
    for slot in {*seen.slots_of(f"{guests.name}/{name}"), *_ours(guests, f"{guests.name}/{name}")}:
        store.expel(slot)
    if machine is not None and machine.record is not None:
        await machine.put_away()
        guests.records.save(machine.record)
        return
    await asyncio.to_thread(files.remove_tree, guests.services.paths.runtime(guests.name, name))
    guests.records.remove(name)


async def _mend_running(guests: AnyGuests, machine: Guest[Any], seen: Seen) -> None:
    assert machine.child is not None
    assert machine.record is not None
    if not machine.child.alive():
        await machine.finish()
        return
    units = await guests.services.units()
    unit = await units.state(machine.unit) if machine.name in seen.units else None
    if unit is not None and unit.main_pid not in (0, machine.record.main_pid):
        machine.child.identify(unit)
        machine.save(main_pid=machine.child.pid, main_start=machine.child.start, invocation_id=unit.invocation_id)
    store = guests.services.store
    ours = store.slots()
    for slot in [f"{machine.driver}/{machine.name}/{short}" for short in SLOTS]:
        source = _source(machine, slot)
        known = [(ours[slot].dev, ours[slot].ino)] if slot in ours else None
        if seen.slots is None or seen.slots.get(slot) == known:
            continue
        if source is not None:
            await asyncio.to_thread(store.put, slot, source)
        elif slot in ours:
            await asyncio.to_thread(store.renew, slot)
    guests.records.save(machine.record)
