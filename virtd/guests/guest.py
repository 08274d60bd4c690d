# SPDX-License-Identifier: LGPL-2.1-or-later
"""One supervised object, a domain or a container. What is specific to QEMU or LXC is in the subclasses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..objects.object import D
from .adopting import Adopting
from .finishing import Finishing
from .guestrecord import GuestRecord, Shared

if TYPE_CHECKING:
    from ..records import Record


class Guest(GuestRecord[D]):
    """What is known about it, and how it is taken over and ends. Every change is on record before it is published."""

    def __init__(self, shared: Shared, name: str) -> None:
        super().__init__(shared, name)
        self.finishing = Finishing(self)
        self._adopting = Adopting(self, self.finishing)

    def adopt(self, record: Record) -> bool:
        """See Adopting."""
        return self._adopting.adopt(record)

    def recall(self) -> None:
        self.finishing.recall_restart()

    async def reconcile(self, *, unit_exists: bool) -> str:
        """See Adopting."""
        return await self._adopting.reconcile(unit_exists=unit_exists)

    async def close(self) -> None:
        """Let go of everything in this process; the guest, its slots and its record stay."""
        await self.end_tasks()
        await self.let_go()
        if self.child is not None:
            await self.child.close()
