# SPDX-License-Identifier: LGPL-2.1-or-later
"""Taking over an earlier daemon's guest: first from its record and slots alone, then with what systemd knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic

from .. import journal
from ..children.child import Child
from ..messages import Message
from ..model.state import State
from ..objects.object import D
from ..objects.protocol import Problem

if TYPE_CHECKING:
    from ..records import Record
    from .finishing import Finishing
    from .guestrecord import GuestRecord


class Adopting(Generic[D]):
    """What a start of the daemon does with one guest."""

    def __init__(self, guest: GuestRecord[D], finishing: Finishing[D]) -> None:
        self._guest = guest
        self._finishing = finishing

    def adopt(self, record: Record) -> bool:
        """First step, before there is a bus: take over slots and pumps. True if the guest runs."""
        guest = self._guest
        guest.record = record
        if not guest.alive:
            if record.unit or record.slots:  # its end was on record, but not everything was put away
                guest.settled.clear()
            return False
        guest.settled.clear()
        guest.over.clear()
        guest.child = child = Child.adopt(guest.shared.services, record)
        guest.stderr.begin(child)
        for slot in child.lost:
            meaning = guest.meaning(slot.rpartition("/")[2])
            guest.lost(slot, f"{guest.name} is lost: {meaning}", "It runs on. Restart it when convenient.")
        if child.alive() and record.state != State.STARTING:
            # The record is enough to answer queries.
            guest.settled.set()
            return True
        return False

    async def reconcile(self, *, unit_exists: bool) -> str:
        """Second step, with systemd reachable: what became of it. Returns "adopted", "ended", "rolled back" or ""."""
        try:
            return await self._reconcile(unit_exists=unit_exists)
        finally:
            self._guest.settled.set()

    async def _reconcile(self, *, unit_exists: bool) -> str:
        guest = self._guest
        if guest.record is None:
            return ""
        if not guest.alive:
            if not guest.settled.is_set():
                await self._finishing.put_away()
            return ""
        record, child = guest.live
        units = await guest.shared.services.units()
        if record.state == State.STARTING or not child.alive():
            unit = await units.state(guest.unit) if unit_exists else None
            if unit is None and record.state == State.STARTING and not child.alive():
                await self._roll_back("its start was interrupted before the guest ran")
                return "rolled back"
            if unit is None or not unit.running:
                await self._finishing.finish()
                return "ended"
            if record.invocation_id not in ("", unit.invocation_id):
                await self._finishing.restarted(child, unit)
            child.identify(unit)
            guest.save(**child.identity())
        if not unit_exists:
            guest.problems["unit"] = Problem(f"{guest.unit} is gone, but its process runs (PID {child.pid})")
        if record.state == State.STARTING:
            guest.note(State.RUNNING, "started while virtd was restarted")
        self._finishing.watch(child)
        text = f"Adopted {guest.noun} {guest.name} (PID {child.pid})"
        journal.send(text, message_id=Message.ADOPTED, VIRTD_PID=str(child.pid), **guest.fields())
        guest.adopted()
        return "adopted"

    async def _roll_back(self, why: str) -> None:
        guest = self._guest
        journal.send(
            f"Rolled back {guest.noun} {guest.name}: {why}",
            message_id=Message.ROLLED_BACK,
            level="notice",
            **guest.fields(),
        )
        guest.note(State.STOPPED, why)
        await self._finishing.put_away()
