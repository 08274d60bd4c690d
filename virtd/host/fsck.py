# SPDX-License-Identifier: LGPL-2.1-or-later
"""fsck over all drivers, and over what belongs to none of them."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

from .. import errors, files
from ..children import fifos
from ..drivers.loader import MODULES
from ..objects.protocol import Comparing, Difference
from ..replies import daemon as replies
from ..systemd import aliases
from ..text import plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..children.child import Services
    from ..drivers.loader import Drivers

STARTING = 60.0  # maximum seconds between the creation of a start's pipes and its unit


async def compare(
    drivers: Drivers, use: Callable[[str], object], services: Services, *, repair: bool
) -> list[replies.Difference]:
    """The differences between what virtd, systemd and the file system know.

    `use(name)` returns a driver, creating one that had nothing to do so far.
    """
    units = await services.units()
    present = {unit.name for unit in await units.list("virtd-*.service")}
    for name in MODULES:
        if any(unit.startswith(f"virtd-{name}-") for unit in present):
            use(name)
    rows = []
    for driver in drivers:
        if isinstance(driver, Comparing):
            found = await driver.compare(repair=repair)
            rows += [_row(difference, f"{driver.name}/{difference.object}") for difference in found]
    rows += [_row(difference, "") for difference in await _strangers(services)]
    rows += [_row(difference, "") for difference in _quarantine(services, repair=repair)]
    rows += [_row(difference, "") for difference in _pipes(services, present, repair=repair)]
    return rows


def _row(difference: Difference, key: str) -> replies.Difference:
    return replies.Difference(
        kind=difference.kind,
        object=key if difference.object else "",
        text=difference.text,
        repair=difference.repair,
        repaired=difference.repaired,
    )


async def _strangers(services: Services) -> list[Difference]:
    """Slots of unknown drivers: a newer virtd's, before a rollback. They may be all that keeps something alive."""
    units = await services.units()
    dump = await units.store_dump(services.unit)
    found = {name for name in services.store.held(dump or []) if name.partition("/")[0] not in MODULES}
    return [Difference("slot", "", f"slot {name} is one that this version doesn't know") for name in sorted(found)]


def _quarantine(services: Services, *, repair: bool) -> list[Difference]:
    """Records that could not be read at a start. Their objects were rebuilt; the files are kept for a person to
    inspect.
    """
    found = []
    try:
        entries = sorted(os.listdir(services.paths.quarantine))
    except OSError:
        return []
    for entry in entries:
        path = os.path.join(services.paths.quarantine, entry)
        repaired = False
        if repair:
            try:
                repaired = files.remove(path)
            except errors.HostError:
                files.remove_tree(path)  # a directory in place of a record
                repaired = not os.path.lexists(path)
        text = f"{plain(path)} is a record that couldn't be read; its object was rebuilt without it"
        found.append(Difference("record", "", text, "remove it", repaired))
    return found


def _pipes(services: Services, present: set[str], *, repair: bool) -> list[Difference]:
    """FIFOs and aliases of children that don't exist. Recent ones may belong to a start in progress."""
    found = []
    paths = services.paths
    owned = [(paths.fifos(*owner), fifos.remove, *owner) for owner in fifos.owners(paths.fifos())]
    owned += [(paths.aliases(*owner), aliases.remove, *owner) for owner in fifos.owners(paths.aliases())]
    for directory, remove, driver, name in owned:
        if f"virtd-{driver}-{name}.service" in present or f"{driver}/{name}/stderr" in services.store:
            continue
        with contextlib.suppress(OSError):
            if time.time() - os.stat(directory).st_mtime > STARTING:
                if repair:
                    remove(directory)
                repaired = repair and not os.path.lexists(directory)
                found.append(Difference("file", "", f"{directory} is of a child that is gone", "remove it", repaired))
    return found
