# SPDX-License-Identifier: LGPL-2.1-or-later
"""One launch, the same for every child. What each step adds, and what a crash of the daemon leaves after it:

    require     nothing is there, and nothing is changed     nothing
    reach       what it stands on, which others use, too     that
    pipes       logs opened, FIFOs made                      FIFOs without a slot: swept up
    remember    the record: unit and slots                   a record alone: rolled back
    prepare     changes of the host, as the record says      the same
    keep        the slots                                    record and slots without a unit: rolled back
    spawn       the unit                                     it runs: adopted. It doesn't: rolled back
    identified  its PID on record                            adopted
    come_up     it is ready for use                          adopted

Whatever fails on the way is undone by this process. The owner is an object with a record; one that has several
children launches each by itself, and its record tells of all of them.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any

from .. import errors, fdstore, journal
from ..messages import Message
from . import ending
from .slots import identities

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..systemd.transient import UnitSpec
    from .child import Child
    from .pipes import Ends

log = logging.getLogger(__name__)


def promised(child: Child, descriptors: Mapping[str, int]) -> dict[str, Any]:
    """What a record says of a child before anything of it exists."""
    return {
        "unit": child.unit,
        "slots": identities(descriptors),
        "main_pid": 0,
        "main_start": 0,
        "invocation_id": "",
    }


class Launch:
    """One try to have `child` run.

    `cannot`: "Cannot start web1", as an error begins; `title`: "Domain web1", as a message in the journal begins,
    whose fields are `fields`.
    """

    terminal = False  # whether it has a terminal in place of standard input and output

    def __init__(self, child: Child, cannot: str, title: str, fields: Mapping[str, str]) -> None:
        self.child = child
        self.services = child.services
        self.remembered = False  # whether it is on record
        self.words_from = 0  # where in its log of messages this one's begin
        self._cannot = cannot
        self._title = title
        self._fields = fields

    # What each does in its own way

    def require(self) -> None:
        """Look at the host before anything is done. Raises a VirtdError."""

    async def reach(self) -> None:
        """Bring up what it depends on: other drivers' objects, which others use as well. Raises a VirtdError."""

    def remember(self, promise: dict[str, Any]) -> None:
        """Put it on record, before anything of it exists; `promise`: what the record has to say. Raises HostError."""
        raise NotImplementedError

    def begin(self) -> None:
        """It is on record: have the owner look after it."""

    def prepare(self, ends: Ends) -> None:
        """Change the host as the record says by now. Raises HostError."""

    async def connect(self) -> None:
        """As `prepare`, for changes that have to be waited for. Raises a VirtdError."""

    def spec(self) -> UnitSpec:
        """The unit."""
        raise NotImplementedError

    def know(self, identity: dict[str, Any]) -> None:
        """Put on record which process it is. Raises HostError."""
        raise NotImplementedError

    async def come_up(self) -> None:
        """Wait until it is ready for use. Raises StartFailed."""

    async def failed(self, why: BaseException) -> None:
        """It has ended, if it ever ran. Where it was `remembered`, say so on record and put away what there is."""
        raise NotImplementedError

    def explained(self, exc: errors.VirtdError) -> errors.VirtdError:
        """The error that the caller gets, with the child's own words, where it left any."""
        return exc

    def trouble(self, text: str) -> None:
        """Report that not all of it could be undone."""
        raise NotImplementedError

    # The steps

    async def launch(self) -> None:
        """Raises a VirtdError, with nothing left behind."""
        child = self.child
        self.require()
        self._require_room()
        units = await self.services.units()
        await units.collect(child.unit)  # before there is anything to undo: what runs there isn't ours to end
        await self.reach()
        forgets = self.terminal and not await units.preserves_stores()
        ends, descriptors = child.prepare(terminal=self.terminal, forgets=forgets)
        try:
            assert child.stderr is not None
            self.words_from = os.fstat(child.stderr.fd).st_size
            self.remember(promised(child, descriptors))
            self.remembered = True
            self.begin()
            self.prepare(ends)
            await self.connect()
            await child.keep(descriptors)
            await child.spawn(self.spec(), ends)
            self.know(child.identity())
            await self.come_up()
        except BaseException as exc:
            ends.close()
            child.discard(descriptors)
            await asyncio.shield(self._undo(exc))
            if isinstance(exc, errors.VirtdError) and (explained := self.explained(exc)) is not exc:
                raise explained from exc
            raise

    def _require_room(self) -> None:
        store = self.services.store
        try:
            store.room_for(self.child.slot_names())
        except fdstore.StoreFull as exc:
            budget = store.budget()
            journal.send(
                f"{self._title} was not started: {exc}", message_id=Message.BUDGET_REFUSED, level="error",
                VIRTD_USED=str(budget.used), VIRTD_MAX=str(budget.max), **self._fields,
            )  # fmt: skip
            raise errors.BudgetExceeded(f"{self._cannot}: {exc}", hint=exc.hint) from exc

    async def _undo(self, why: BaseException) -> None:
        """Remove whatever exists of it by now."""
        try:
            if self.remembered:
                await ending.end(self.child)
                await self.child.drain()
            else:
                await self.child.release()
            await self.failed(why)
        except Exception as exc:
            log.exception("%s: undoing its start failed", self.child.key)
            self.trouble(f"Undoing a failed start failed: {exc}")
