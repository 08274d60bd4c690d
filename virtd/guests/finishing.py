# SPDX-License-Identifier: LGPL-2.1-or-later
"""The end of a guest: noticed, judged and recorded; then whatever it leaves is put away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Generic

from .. import errors, journal
from ..children import ending
from ..children.child import Child
from ..hints import do
from ..messages import Message
from ..model.state import State
from ..objects.object import D
from ..objects.persistent import WAITS
from ..objects.protocol import Problem
from ..process import Seen
from .guestrecord import AGAIN, SEEN

if TYPE_CHECKING:
    from ..systemd.state import UnitState
    from .guestrecord import GuestRecord

log = logging.getLogger(__name__)

KEPT = frozenset({"definition", "internal", "record", WAITS})  # problems that outlast the end


class Finishing(Generic[D]):
    """The ends of one guest."""

    def __init__(self, guest: GuestRecord[D]) -> None:
        self._guest = guest
        self._putting_away = False

    def watch(self, child: Child) -> None:
        """Wait for the end in the background."""
        self._guest.spawn(ending.watch(child, self.finish, self._held_up), "watch")

    def _held_up(self, exc: errors.VirtdError) -> None:
        text = f"{self._guest.name} has ended, but not all is known: {exc.message}"
        self._guest.problems["end"] = Problem(text, exc.hint)

    async def finish(self) -> None:
        """The process has ended: find out why, put it on record, then put everything away."""
        guest = self._guest
        child = guest.child
        if child is None or not guest.alive:
            return
        self._see(child)
        unit = await child.verdict()
        if unit is not None and unit.running:
            await self.restarted(child, unit)
            self.watch(child)
            return
        await child.drain()
        guest.stderr.end()
        await guest.hear_out()
        end = guest.judge(unit)
        guest.note(end.state, end.reason, exit=end.exit, since=end.exit.at, main_pid=0, main_start=0)
        level = "warning" if end.state is State.CRASHED else "notice"
        journal.send(
            f"{guest.noun.capitalize()} {guest.name} ended: {end.reason}",
            message_id=Message.ENDED, level=level, VIRTD_CAUSE=end.exit.cause, **guest.fields(),
        )  # fmt: skip
        if guest.on_record.is_set():
            await self.put_away()
            guest.shared.publish("ended", guest)
            return
        # Until the verdict is on record, what is left of the guest is evidence that the next daemon may need.
        guest.over.set()
        self._put_away_later()

    def _see(self, child: Child) -> None:
        """Record what was seen of its end before asking systemd: this process may not live to hear the answer."""
        guest = self._guest
        if (known := guest.seen) is not None:  # by an earlier daemon, or at an earlier try
            child.seen = known
            return
        seen = child.seen or Seen(time.time())
        data = guest.data | {SEEN: list(seen)}
        if guest.state is State.STOPPING:
            guest.keep(data=data)
        else:
            guest.note(State.STOPPING, "ending", data=data)

    # It runs again

    async def restarted(self, child: Child, unit: UnitState) -> None:
        """Somebody has restarted the unit, which systemd allows only with units of an older virtd.

        virtd supervises what runs now, but nobody is at the other ends of its pipes.
        """
        guest = self._guest
        await guest.let_go()
        child.identify(unit)
        reason = f"restarted by somebody with systemctl: {guest.unit}"
        data = {key: value for key, value in guest.data.items() if key != SEEN} | {AGAIN: True}
        guest.note(State.RUNNING, reason, data=data, **child.identity())
        self.recall_restart()
        journal.send(
            f"{guest.noun.capitalize()} {guest.name} was restarted by somebody with systemctl, and has no console",
            message_id=Message.ADOPTED, level="warning", VIRTD_PID=str(child.pid), **guest.fields(),
        )  # fmt: skip
        guest.adopted()

    def recall_restart(self) -> None:
        """Restore the problem that the unit was restarted, if the record says so."""
        guest = self._guest
        if guest.alive and guest.data.get(AGAIN):
            guest.problems["restarted"] = Problem(
                f"{guest.unit} was restarted by somebody: {guest.name} runs afresh, without a console",
                do("stop", guest.noun, guest.name) + ", then " + do("start", guest.noun, guest.name) + ".",
            )

    # What is left

    def _put_away_later(self) -> None:
        if not self._putting_away:
            self._putting_away = True
            self._guest.spawn(self._keep_putting_away(), "put-away")

    async def _keep_putting_away(self) -> None:
        try:
            while self._guest.leftovers:
                await self._guest.on_record.wait()
                with contextlib.suppress(errors.VirtdError):
                    async with self._guest.exclusive("put away"):
                        await self.tidy("put away")
                if self._guest.leftovers:
                    await asyncio.sleep(ending.AGAIN)
        finally:
            self._putting_away = False

    async def tidy(self, what: str) -> None:
        """Before `what` is done with the guest, put away what waited for the verdict to be on record, or couldn't be
        put away.

        Raises HostError if that fails again.
        """
        guest = self._guest
        if not guest.on_record.is_set():
            self._refuse(what, guest.problems["record"])
        if not guest.leftovers:
            return
        unpublished = guest.child is not None
        await self.put_away()
        if unpublished:
            guest.shared.publish("ended", guest)
        if guest.leftovers:
            self._refuse(what, guest.problems["leftovers"])

    def _refuse(self, what: str, problem: Problem) -> None:
        raise errors.HostError(f"Cannot {what} {self._guest.name} yet: {problem.text}", hint=problem.hint)

    async def put_away(self) -> None:
        """Drop what an ended guest leaves: slots, sockets, unit, changes of the host. Safe to repeat.

        What can't be dropped now is reported as a problem, and tried again until it can be.
        """
        guest = self._guest
        record = guest.recorded
        await guest.let_go()
        child = guest.child or Child(
            guest.shared.services, guest.driver, guest.name, invocation_id=record.invocation_id
        )
        guest.child = None
        failed = await ending.put_away(
            child,
            give_back=lambda: guest.give_back(record),
            forgotten=lambda: guest.forgotten(record),
            remove=guest.remove_runtime,
        )
        if failed:
            text = f"Not all that {guest.name} left is put away: {'; '.join(map(str, failed))}"
            if "leftovers" not in guest.problems:
                log.warning("%s", text)
            guest.problems["leftovers"] = Problem(text, "It is tried again every second.")
            self._put_away_later()
        else:
            # Only now is the object whole again: until here a crash, or another try, finds the unit's name.
            guest.note(guest.state, guest.reason, data={}, id=0, **ending.GONE)
            guest.problems = {key: value for key, value in guest.problems.items() if key in KEPT}
        guest.over.set()
        guest.settled.set()
