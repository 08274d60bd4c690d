# SPDX-License-Identifier: LGPL-2.1-or-later
"""Placement of slots, and whether there is room: first entries of their own in PID 1's store, then boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtd.fdstore import boxes
from virtd.fdstore import names as slot_names
from virtd.fdstore.budget import HINTS, Budget, Limit, Stock, exceeded, measure
from virtd.fdstore.errors import StoreFull

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from virtd.fdstore.held import Held


class Room:
    """`store_max`: FileDescriptorStoreMax=. `files_max`: how many descriptors may be passed to this process. None: no
    limit."""

    def __init__(
        self,
        held: Held,
        boxes: boxes.Boxes,
        sockets: Mapping[str, list[int]],
        *,
        store_max: int | None,
        files_max: int | None,
        direct: int | None,
    ) -> None:
        self.store_max = store_max
        self.files_max = files_max
        self._held = held
        self._boxes = boxes
        self._sockets = sockets
        self._direct = direct

    def budget(self) -> Budget:
        return measure(self._stock(), self.store_max, self.files_max)

    def crowded(self) -> bool:
        """Whether no entry is left free, because FileDescriptorStoreMax= has been lowered."""
        return self.store_max is not None and self._stock().entries > self.store_max

    def place(self, names: Iterable[str]) -> dict[str, int]:
        """Where each new one of `names` would go: the number of a box, or 0 for an entry of its own.

        Raises BadName or StoreFull.
        """
        new = [slot_names.check(name) for name in dict.fromkeys(names) if name not in self._held.slots]
        stock = self._stock()
        placed = self._distributed(new, stock)
        alone, held = [*stock.alone], dict(stock.boxes)
        for name, number in placed.items():
            if number:
                box = self._boxes.name(number)
                held[box] = held.get(box, 0) + 1
            else:
                alone.append(name)
        over = exceeded(stock._replace(alone=alone, boxes=held), self.store_max, self.files_max)
        if over is None:
            return placed
        what = new[0] if len(new) == 1 else f"{len(new)} descriptors"
        if over is Limit.STORE and not self.store_max:
            raise StoreFull(
                f"no room for {what}: the unit has no FD store",
                limited_by=over,
                hint="set FileDescriptorStoreMax= in the unit; before systemd 254, pass fallback_max= as well",
            )
        now = self.budget()
        raise StoreFull(
            f"no room for {what} in the FD store: {now.used} slots are used, and {over} allows {now.max}",
            limited_by=over,
            hint=HINTS[over],
        )

    def _distributed(self, new: list[str], stock: Stock) -> dict[str, int]:
        """Either all as entries of their own or all in boxes, in one box if one has room for them."""
        alone = dict.fromkeys(new, 0)
        if self._direct is None or len(stock.alone) + len(new) <= self._direct:
            return alone
        if (found := self._boxes.place(len(new))) is not None:
            return dict.fromkeys(new, found)
        first = self._boxes.next_number(self._held.alone)
        more = -(-len(new) // boxes.CAPACITY)
        if self.store_max is not None and stock.entries + more + (not self._boxes) > self.store_max:
            return alone
        return {name: first + index // boxes.CAPACITY for index, name in enumerate(new)}

    def _stock(self) -> Stock:
        alone = [name for name, count in list(self._held.alone.items()) for _ in range(count)]
        sockets = [name for name, fds in self._sockets.items() for _ in fds]
        return Stock(alone, self._boxes.sizes(), sockets, self._direct)
