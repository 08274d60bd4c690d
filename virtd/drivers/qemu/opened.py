# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files that a guest has open, by device and inode, so that two names of one file count as one."""

from __future__ import annotations

import contextlib
import stat
from typing import TYPE_CHECKING, Any

from ... import reach
from . import prerequisites

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...model import domain as model
    from .devices.device import Device

# By device and inode: a path, and whether it is written.
Opened = dict[tuple[int, int], tuple[str, bool]]


def identified(devices: Iterable[Device]) -> Opened:
    """The files of `devices`; one that is opened twice counts as written if either writes."""
    found: Opened = {}
    for device in devices:
        for path, writes in device.files():
            if (identity := prerequisites.identity(path)) is not None:
                found[identity] = (path, writes or found.get(identity, ("", False))[1])
    return found


def sizes(opened: Opened) -> dict[str, int]:
    """The sizes in bytes of the regular files, by path, at the start of a guest."""
    found = {}
    for path, _writes in opened.values():
        with contextlib.suppress(OSError):
            status = reach.look(path, reach.Trust.ANYBODY)
            if stat.S_ISREG(status.st_mode):
                found[path] = status.st_size
    return found


def recorded(opened: Opened) -> list[list[Any]]:
    """In the form that a guest's record has."""
    return [[path, *identity, writes] for identity, (path, writes) in opened.items()]


def taken(data: dict[str, Any], domain: model.Domain | None) -> Opened:
    """What a guest has open, by its record's data; or by its definition, since older records have no list."""
    rows = data.get("images")
    if isinstance(rows, list):
        return {(int(dev), int(ino)): (str(path), bool(writes)) for path, dev, ino, writes in rows}
    if domain is None:
        return {}
    from .devices import assembly  # few have such a record

    return identified(assembly.assemble(domain, ""))
