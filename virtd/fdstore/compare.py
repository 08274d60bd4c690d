# SPDX-License-Identifier: LGPL-2.1-or-later
"""What PID 1 holds of the store, and how that differs from what the store expects."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from virtd.fdstore.boxes import Boxes
    from virtd.fdstore.held import Slot


class StoredEntry(NamedTuple):
    """One descriptor in PID 1; `dev` and `ino` as from fstat()."""

    name: str
    dev: int
    ino: int

    @classmethod
    def from_dump(cls, entry: Iterable[Any]) -> Self:
        """From one element of DumpUnitFileDescriptorStore()'s answer: (name, mode, major, minor, inode, ...)."""
        name, _mode, major, minor, inode = list(entry)[:5]
        return cls(name, os.makedev(major, minor), inode)


class Difference(NamedTuple):
    """What the store expects against what PID 1 holds, as sorted names; false if they agree.

    `missing` slots aren't in PID 1, `unknown` ones are only there, `mismatched` ones are different descriptors there,
    or several.
    """

    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unknown or self.mismatched)


def unboxed(
    dump: Iterable[tuple[str, int, int]], boxes: Boxes, slots: Mapping[str, Slot]
) -> dict[str, list[tuple[int, int]]]:
    """(dev, ino) of each descriptor that PID 1 holds, by slot; see Store.held."""
    others, boxed = boxes.sort(dump)
    found: dict[str, list[tuple[int, int]]] = {}
    for name, dev, ino in others:
        found.setdefault(name, []).append((dev, ino))
    for name in boxed:
        if name in slots:
            found.setdefault(name, []).append(slots[name][2:])
    return found


def compare(held: Mapping[str, list[tuple[int, int]]], ours: Mapping[str, Slot]) -> Difference:
    both = ours.keys() & held.keys()
    return Difference(
        missing=tuple(sorted(ours.keys() - both)),
        unknown=tuple(sorted(held.keys() - both)),
        mismatched=tuple(sorted(name for name in both if held[name] != [ours[name][2:]])),
    )
