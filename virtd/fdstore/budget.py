# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many slots a unit can have, which is not only what FileDescriptorStoreMax= says.

Three limits apply, and the nearest one counts:

- FileDescriptorStoreMax=: past it PID 1 closes what it was sent, and says so only in its own log. It counts
  entries, of which a box (boxes.py) is one, whatever is in it. As soon as there are boxes one entry is left free, for
  the next generation of one of them.
- LimitNOFILE= (the soft limit): systemd applies it to the new process *before* it lays out the descriptors, so with
  too many of them the daemon fails to start (202/FDS), for good.
- The kernel's limit of 128 KiB on one string of the environment, which $LISTEN_FDNAMES is: past it the daemon fails
  to start as well (203/EXEC).

The first loses one descriptor; the other two lose all of them, at some later start, which is why a slot that would
cross one of them must be refused while the daemon still runs.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from virtd.fdstore.boxes import CAPACITY, NAME_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# MAX_ARG_STRLEN is 32 pages (of 4 KiB, or larger on some machines) and counts the NUL at the end.
NAMES_BYTES = 32 * 4096 - 1
_PREFIX = len("LISTEN_FDNAMES=")
_FIRST_FD = 3


class Limit(StrEnum):
    """What bounds the number of slots."""

    STORE = "FileDescriptorStoreMax"
    FILES = "LimitNOFILE"
    NAMES = "LISTEN_FDNAMES"


HINTS = {
    Limit.STORE: "set a higher FileDescriptorStoreMax= in the unit",
    Limit.FILES: "set a higher LimitNOFILE= in the unit",
    Limit.NAMES: "use shorter slot names, or fewer slots: the kernel's limit can't be raised",
}


class Budget(NamedTuple):
    """Where the store stands: `used` slots of `max`.

    `limited_by` is the limit that will be met first, if the names to come are as long as those there are. The limits
    one by one: `store_max` and `files_max` in slots (None: there is none), `names_bytes` of `names_bytes_max`.
    `entries`: how many descriptors PID 1 has for it, one for each slot or box.
    """

    used: int
    max: int
    limited_by: Limit
    store_max: int | None
    files_max: int | None
    names_bytes: int
    names_bytes_max: int = NAMES_BYTES
    entries: int = 0

    @property
    def left(self) -> int:
        """How many more slots fit."""
        return max(0, self.max - self.used)


def names_bytes(names: Sequence[str]) -> int:
    """The length of LISTEN_FDNAMES= with these names, in bytes, without its NUL."""
    return _PREFIX + sum(map(len, names)) + max(0, len(names) - 1)


class Stock(NamedTuple):
    """What a store holds: the names of slots that are entries of their own, and of boxes, with how many are in each.

    `direct`: so many slots get entries of their own before boxes are begun; None: all of them.
    """

    alone: Sequence[str]
    boxes: Mapping[str, int]
    sockets: Sequence[str]
    direct: int | None

    @property
    def used(self) -> int:
        return len(self.alone) + sum(self.boxes.values())

    @property
    def entries(self) -> int:
        """That PID 1 must have room for, the free one included."""
        return len(self.alone) + len(self.boxes) + bool(self.boxes)

    def growth(self, entries: float) -> tuple[int, int]:
        """With so many more entries: slots of their own, and boxes."""
        near = int(entries) if self.direct is None else max(0, min(int(entries), self.direct - len(self.alone)))
        rest = int(entries) - near
        if not self.boxes and rest:
            # The first box takes two: one is left free.
            return (near, rest - 1) if rest > 1 else (near + rest, 0)
        return near, rest

    def places(self, alone: int, boxes: int) -> int:
        """How many slots there can be in all, with so many more entries of each kind."""
        room = sum(CAPACITY - held for held in self.boxes.values())
        return self.used + alone + boxes * CAPACITY + room


def measure(stock: Stock, store_max: int | None, files: int | None) -> Budget:
    """The budget of a store that holds `stock`.

    `store_max` is FileDescriptorStoreMax=; `files` is how many descriptors in all may be passed to the daemon. None:
    no limit.
    """
    alone, boxes = stock.alone, stock.boxes
    in_use = names_bytes([*alone, *boxes, *stock.sockets])
    # The names that will follow are taken to be as long as the average of those there are (a plausible 24 at first).
    each = sum(map(len, alone)) / len(alone) + 1 if alone else 25.0
    left = max(0, NAMES_BYTES - in_use)
    near = int(left // each) if stock.direct is None else min(int(left // each), max(0, stock.direct - len(alone)))
    further = 0 if stock.direct is None else int((left - near * each) // NAME_BYTES)
    limits = [(stock.places(near, further), Limit.NAMES)]
    files_max = slots_max = None
    if files is not None:
        files_max = max(0, files - len(stock.sockets) - len(boxes) - bool(boxes))
        limits.append((files_max, Limit.FILES))
    if store_max is not None:
        over = stock.entries - store_max
        # What is over it PID 1 has dropped by now, and of the boxes none can be replaced.
        slots_max = stock.places(*stock.growth(-over)) if over <= 0 else stock.used - max(0, over - bool(boxes))
        limits.append((slots_max, Limit.STORE))
    # Of equal ones the last, which is the one that a person would look at first.
    most, limited_by = min(reversed(limits), key=lambda limit: limit[0])
    entries = len(alone) + len(boxes)
    return Budget(stock.used, most, limited_by, slots_max, files_max, in_use, entries=entries)


def exceeded(stock: Stock, store_max: int | None, files: int | None) -> Limit | None:
    """The limit that a store in this state is over, or None if it's within all of them."""
    if store_max is not None and stock.entries > store_max:
        return Limit.STORE
    if files is not None and stock.used + len(stock.sockets) + len(stock.boxes) + bool(stock.boxes) > files:
        return Limit.FILES
    if names_bytes([*stock.alone, *stock.boxes, *stock.sockets]) > NAMES_BYTES:
        return Limit.NAMES
    return None


def files_limit(soft: int, headroom: int) -> int | None:
    """How many descriptors may be passed to a process whose RLIMIT_NOFILE is `soft` (-1: none).

    They start at 3; `headroom` is what the daemon opens besides them.
    """
    return None if soft < 0 else max(0, soft - _FIRST_FD - headroom)
