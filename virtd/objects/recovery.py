# SPDX-License-Identifier: LGPL-2.1-or-later
"""The second step of a start of the daemon, for objects that have units: the records beside what there is."""

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
    """First step of a start: what has slots or a unit, and no record, isn't settled until it has been looked at.

    Without a bus: the files of units that systemd has loaded tell as well.
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
    """Second step, at its end: nobody is in doubt any more, and what came to nothing is forgotten."""
    for one in list(driver.objects.values()):
        one.settled.set()
        if one.definition is None and one.record is None and not one.problems:
            driver.forget(one.name)


async def recorded(driver: Inventory[W, D]) -> tuple[dict[str, str], dict[str, bool]]:
    """Each object of `driver` with a record; one that can't be made whole has a problem, and costs no other anything.

    What came of each that was adopted, had ended or was rolled back; and the other names of which there is a unit
    (True) or only slots (False).
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
            # What couldn't be dropped at its end, or not by an older virtd that knew nothing of boxes.
            await Child(services, driver.name, one.name).release()
    others = (present | slots) - {one.name for one in objects}
    return came, {name: name in present for name in sorted(others)}
