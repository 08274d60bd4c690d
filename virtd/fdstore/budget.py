# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many slots a unit can have, which doesn't depend on FileDescriptorStoreMax= alone.

Three limits apply, and the one that is reached first counts:

- FileDescriptorStoreMax=: beyond it PID 1 closes what it is sent, and says so only in its own log. It counts entries;
  a box (boxes.py) is one entry, whatever it contains. As soon as there are boxes, one entry is left free for the next
  generation of one of them.
- LimitNOFILE= (the soft limit): systemd applies it to the new process *before* it lays out the descriptors, so with
  too many of them the daemon fails to start (202/FDS), for good.
- The kernel's limit of 128 KiB for one string of the environment, here $LISTEN_FDNAMES: beyond it the daemon fails to
  start as well (203/EXEC).

Exceeding the first loses one descriptor; exceeding either of the others loses all of them at some later start. So a
slot that would exceed a limit must be refused while the daemon still runs.
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
    """A limit on the number of slots."""

    STORE = "FileDescriptorStoreMax"
    FILES = "LimitNOFILE"
    NAMES = "LISTEN_FDNAMES"


HINTS = {
    Limit.STORE: "set a higher FileDescriptorStoreMax= in the unit",
    Limit.FILES: "set a higher LimitNOFILE= in the unit",
    Limit.NAMES: "use shorter slot names, or fewer slots: the kernel's limit can't be raised",
}


class Budget(NamedTuple):
    """Usage of the store: `used` slots of `max`.

    `limited_by` is the limit that will be reached first, if future names are as long as the present ones. The limits
    one by one: `store_max` and `files_max` in slots (None: no limit), `names_bytes` of `names_bytes_max`. `entries`:
    how many descriptors PID 1 holds for it, one for each box and each slot outside a box.
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
    """The length of LISTEN_FDNAMES= with these names, in bytes, without the NUL."""
    return _PREFIX + sum(map(len, names)) + max(0, len(names) - 1)


class Stock(NamedTuple):
    """What a store holds: the names of slots that are entries of their own, and of boxes with the number of their
    slots.

    `direct`: how many slots get entries of their own before boxes are used; None: all of them.
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
        """The entries that PID 1 must have room for, including the free one."""
        return len(self.alone) + len(self.boxes) + bool(self.boxes)

    def growth(self, entries: float) -> tuple[int, int]:
        """The stock after adding entries: slots of their own, and boxes."""
        near = int(entries) if self.direct is None else max(0, min(int(entries), self.direct - len(self.alone)))
        rest = int(entries) - near
        if not self.boxes and rest:
            # The first box takes two entries: one is left free.
            return (near, rest - 1) if rest > 1 else (near + rest, 0)
        return near, rest

    def places(self, alone: int, boxes: int) -> int:
        """The total number of slots possible after adding entries of each kind."""
        room = sum(CAPACITY - held for held in self.boxes.values())
        return self.used + alone + boxes * CAPACITY + room


def measure(stock: Stock, store_max: int | None, files: int | None) -> Budget:
    """The budget of a store that holds `stock`.

    `store_max` is FileDescriptorStoreMax=; `files` is the total number of descriptors that may be passed to the
    daemon. None: no limit.
    """
    alone, boxes = stock.alone, stock.boxes
    in_use = names_bytes([*alone, *boxes, *stock.sockets])
    # Future names are assumed to be as long as the average of the present ones (a plausible 24 at first).
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
        # PID 1 has already dropped what exceeds it, and no box can be replaced.
        slots_max = stock.places(*stock.growth(-over)) if over <= 0 else stock.used - max(0, over - bool(boxes))
        limits.append((slots_max, Limit.STORE))
    # Of equal limits the last, which is the one that a person would check first.
    most, limited_by = min(reversed(limits), key=lambda limit: limit[0])
    entries = len(alone) + len(boxes)
    return Budget(stock.used, most, limited_by, slots_max, files_max, in_use, entries=entries)


def exceeded(stock: Stock, store_max: int | None, files: int | None) -> Limit | None:
    """The limit that a store in this state exceeds, or None."""
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
