# SPDX-License-Identifier: LGPL-2.1-or-later
"""One file by two names: two definitions have the same disk by a hard link, a symbolic link or a bind mount.

Another domain's file is examined only if, by the mount table, it is on the same file system as the file in question,
which has just answered: a file system that hangs must hold up nobody who defines a domain on another.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ... import mountinfo
from . import prerequisites

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ...model.domain import Domain
    from ...model.drives import Disk


def warnings(domain: Domain, others: Iterable[Domain]) -> list[str]:
    """The disks of `domain` that others, which are defined and off, have too."""
    found: list[str] = []
    mine = [(index, disk) for index, disk in enumerate(domain.disk) if disk.path is not None]
    if not mine:
        return found
    theirs = [(other.name, disk) for other in others for disk in other.disk if disk.path is not None]
    table = _mounts()
    for index, disk in mine:
        for name, path in _same(disk, theirs, table):
            text = f"{disk.path} is domain {name}'s as well, as {path}: both can't run at the same time"
            found.append(f"disk[{index}]: {text}")
    return found


def _same(disk: Disk, theirs: list[tuple[str, Disk]], table: dict[str, str]) -> Iterator[tuple[str, str]]:
    assert disk.path is not None
    if (identity := prerequisites.identity(disk.path)) is None:
        return
    file_system = _file_system(os.path.realpath(disk.path), table)
    for name, other in theirs:
        assert other.path is not None
        if other.path == disk.path or (other.readonly and disk.readonly) or (other.shared and disk.shared):
            continue  # reported already, or harmless
        if _file_system(other.path, table) == file_system and prerequisites.identity(other.path) == identity:
            yield name, other.path


def _mounts() -> dict[str, str]:
    """The file system (major:minor) at each mount point."""
    return {mount.point: mount.device for mount in mountinfo.mounts()}  # the last one hides others


def _file_system(path: str, table: dict[str, str]) -> str:
    """The file system of a path, provided that none of its directories is a link."""
    while path not in table and path != "/":
        path = os.path.dirname(path)
    return table.get(path, "")
