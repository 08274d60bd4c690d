# SPDX-License-Identifier: LGPL-2.1-or-later
"""The second step of a start of the daemon, for objects that have units: records are compared with what exists."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Protocol, TypeVar

from ..children.child import Child
from ..hints import do
from ..systemd.names import object_name
from .object import D, Object, T
from .protocol import Problem

if TYPE_CHECKING:
    from .inventory import Inventory

log = logging.getLogger(__name__)


class WithUnit(Object, Protocol):
    """An object that runs as a unit."""

    async def reconcile(self, *, unit_exists: bool) -> str: ...


W = TypeVar("W", bound=WithUnit)


def doubt(driver: Inventory[T, D]) -> None:
    """First step of a start: an object with slots or a unit but no record isn't settled until `settle`.

    There is no bus yet, so units are found by the files that systemd keeps for them.
    """
    found = {slot.split("/")[1] for slot in driver.services.store.names() if slot.startswith(f"{driver.name}/")}
    with contextlib.suppress(OSError):
        units = os.listdir(driver.services.paths.transient)
        found |= {name for unit in units if (name := object_name(driver.name, unit))}
    for name in found:
        one = driver.object(name)
        if one.record is None:
            one.settled.clear()


def settle(driver: Inventory[T, D]) -> None:
    """At the end of the second step: every object is settled, and those of which nothing is left are forgotten."""
    for one in list(driver.objects.values()):
        one.settled.set()
        if one.definition is None and one.record is None and not one.problems:
            driver.forget(one.name)


async def reconcile_all(driver: Inventory[W, D]) -> tuple[dict[str, str], dict[str, bool]]:
    """Reconcile each object of `driver` that has a record. One that fails gets a problem, and affects no other.

    Returns the results by name ("adopted", "ended", "rolled back"), and the names of what has no record: True if it
    has a unit, False if it has only slots.
    """
    services = driver.services
    units = await services.units()
    present = {
        name
        for unit in await units.list(f"virtd-{driver.name}-*.service")
        if (name := object_name(driver.name, unit.name))
    }
    objects = [one for one in driver.objects.values() if one.record is not None]
    results = await asyncio.gather(
        *(one.reconcile(unit_exists=one.name in present) for one in objects), return_exceptions=True
    )
    came = {}
    for one, result in zip(objects, results, strict=True):
        if isinstance(result, BaseException):
            log.error("%s can't be reconciled: %s", one.name, result, exc_info=result)
            text = f"{one.name} can't be made whole: {result}"
            one.problems["adoption"] = Problem(text, "What there is of it was left alone. See: " + do("fsck") + ".")
        elif result:
            getattr(driver.found, result.replace(" ", "_")).append(one.name)
            came[one.name] = result
    slots = {name.split("/")[1] for name in services.store.names() if name.startswith(f"{driver.name}/")}
    for one in objects:
        if one.name in slots and one.record is not None and not (one.record.unit or one.record.slots):
            # What couldn't be dropped at its end, or wasn't by an older virtd that had no boxes.
            await Child(services, driver.name, one.name).release()
    others = (present | slots) - {one.name for one in objects}
    return came, {name: name in present for name in sorted(others)}
