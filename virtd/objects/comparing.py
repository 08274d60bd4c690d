# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every kind of object has that fsck compares: units, slots, records and the files that no object owns.

What exactly is compared, and how a difference is repaired, is up to each driver; see `check`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from .. import errors, fdstore, files, records
from ..children.slots import CONSOLE_LOG, STDERR_LOG
from ..systemd.names import object_name
from .protocol import Difference

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ..children.child import Child, Services
    from ..records import Record, Records
    from ..systemd.state import Listed

S = TypeVar("S")  # what was found in all places


class Seen(NamedTuple):
    """What PID 1 knows about a driver: units by object, and the (device, inode) pairs in its FD store by slot.

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


async def look(services: Services, driver: str) -> Seen:
    """What PID 1 knows about a driver's objects."""
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


def _ours(services: Services, key: str) -> list[str]:
    return [slot for slot in services.store.names() if slot.startswith(f"{key}/")]


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
    """Store in PID 1 again the descriptors that this process has."""
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
