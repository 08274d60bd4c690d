# SPDX-License-Identifier: LGPL-2.1-or-later
"""This process's descriptors of its slots, by name and by identity."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING, NamedTuple, Self

from virtd.fdstore.errors import AlreadyStored, MissingSlot

if TYPE_CHECKING:
    from collections.abc import Mapping

# fcntl.F_DUPFD_QUERY of Linux 6.10, which Python knows from 3.14 on.
_F_DUPFD_QUERY = 1027

# This package uses tuples instead of frozen dataclasses because each of those takes 0.7 ms to create, at every start.


class Slot(NamedTuple):
    """One named descriptor. `dev` and `ino` are fstat's; `fd` is -1 after `take()`."""

    name: str
    fd: int
    dev: int
    ino: int

    @classmethod
    def of(cls, name: str, fd: int) -> Self:
        status = os.fstat(fd)
        return cls(name, fd, status.st_dev, status.st_ino)


class Held:
    """Slots by name. Locking is the store's; readers need none.

    `alone`: how many entries of its own a slot has in PID 1: one if it isn't in a box, more if others made
    duplicates.
    """

    def __init__(self) -> None:
        self.slots: dict[str, Slot] = {}
        # Changes replace this dict and never modify it, so that readers need no lock. The others are read as a whole,
        # which is one step under the GIL.
        self.doubles: dict[str, tuple[Slot, ...]] = {}
        self.alone: dict[str, int] = {}
        # Slots that may be the same open file, by dev:ino; asking the kernel about each pair would be quadratic.
        self._by_inode: dict[tuple[int, int], set[str]] = {}

    def get(self, name: str) -> int:
        """See Store.get."""
        slot = self.slots.get(name)
        if slot is None:
            raise MissingSlot(f"there is no slot {name}")
        if slot.fd < 0:
            raise MissingSlot(f"the descriptor of slot {name} was removed by take()")
        return slot.fd

    def known(self) -> dict[str, int]:
        """The descriptors that certainly belong to their slots: none that was removed, or whose name was returned
        twice."""
        return {name: slot.fd for name, slot in self.slots.items() if slot.fd >= 0 and name not in self.doubles}

    def candidates(self, name: str) -> list[Slot]:
        """Every descriptor of that name: usually one."""
        first = self.slots.get(name)
        return [*([first] if first is not None else []), *self.doubles.get(name, ())]

    def found(self, slot: Slot) -> None:
        """Add one that systemd returned."""
        if slot.name in self.slots:
            self.doubles[slot.name] = (*self.doubles.get(slot.name, ()), slot)
        else:
            self.keep(slot)

    def keep(self, slot: Slot) -> None:
        self.slots[slot.name] = slot
        self._by_inode.setdefault(slot[2:], set()).add(slot.name)

    def forget(self, name: str) -> None:
        """Close the descriptors of that name and drop the entry."""
        for slot in self.candidates(name):
            if slot.fd >= 0:
                os.close(slot.fd)
            same = self._by_inode.get(slot[2:], set())
            same.discard(name)
            if not same:
                self._by_inode.pop(slot[2:], None)
        self.doubles = {other: slots for other, slots in self.doubles.items() if other != name}
        self.slots.pop(name, None)
        self.alone.pop(name, None)

    def duplicate(self, descriptors: Mapping[str, int], new: dict[str, Slot]) -> set[str]:
        """Fill `new` with duplicates; returns the names whose slots already hold the same open file. Raises
        AlreadyStored."""
        again = set()
        for name, fd in descriptors.items():
            slot = new[name] = Slot.of(name, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
            twin = self._twin(slot)
            if twin is None:
                others = [other for other in new.values() if other[2:] == slot[2:] and other.name != name]
                twin = next((other.name for other in others if _same_open_file(other.fd, slot.fd)), None)
            if twin not in (None, name):
                raise AlreadyStored(
                    f"the descriptor for slot {name} is in the FD store as {twin}",
                    hint="a descriptor and its dup() can have one name only; open the file again for another",
                )
            if twin == name:
                again.add(name)
        return again

    def _twin(self, slot: Slot) -> str | None:
        """The name of the slot with the same open file description; None if there is none, or no way to tell.

        Its own name first, if it is one of several.
        """
        found = [name for name in self._by_inode.get(slot[2:], ()) if _same_open_file(self.slots[name].fd, slot.fd)]
        return slot.name if slot.name in found else next(iter(found), None)


def _same_open_file(one: int, other: int) -> bool:
    """Whether two descriptors refer to one open file description. False on kernels before 6.10, which can't tell."""
    if one < 0:
        return False
    try:
        return bool(fcntl.fcntl(one, _F_DUPFD_QUERY, other))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
