# SPDX-License-Identifier: LGPL-2.1-or-later
"""The launch of every child. What each step adds, and what a crash of the daemon after it leaves:

    require     nothing exists, and nothing is changed       nothing
    reach       shared objects that it depends on            those
    pipes       logs opened, FIFOs made                      FIFOs without a slot: swept up
    remember    the record: unit and slots                   a record alone: rolled back
    prepare     changes of the host, as the record says      the same
    keep        the slots                                    record and slots without a unit: rolled back
    spawn       the unit                                     it runs: adopted. It doesn't: rolled back
    identified  its PID on record                            adopted
    come_up     it is ready for use                          adopted

If a step fails, this process undoes the launch. The owner is an object with a record; one that has several children
launches each separately, and its record describes all of them.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING

from .. import errors, fdstore, journal
from ..messages import Message
from . import ending
from .slots import identities

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..records import Process
    from ..systemd.transient import UnitSpec
    from .child import Child
    from .pipes import Ends

log = logging.getLogger(__name__)


def promised(child: Child, descriptors: Mapping[str, int]) -> Process:
    """The record's fields for a child before anything of it exists."""
    return {
        "unit": child.unit,
        "slots": identities(descriptors),
        "main_pid": 0,
        "main_start": 0,
        "invocation_id": "",
    }


class Launch:
    """One attempt to start `child`.

    `cannot`: "Cannot start web1", the beginning of errors; `title`: "Domain web1", the beginning of messages in the
    journal, which have these `fields`.
    """

    terminal = False  # whether it has a terminal instead of standard input and output

    def __init__(self, child: Child, cannot: str, title: str, fields: Mapping[str, str]) -> None:
        self.child = child
        self.services = child.services
        self.remembered = False  # whether it is on record
        self.words_from = 0  # where the messages of this attempt begin in the log
        self._cannot = cannot
        self._title = title
        self._fields = fields

    # To be overridden

    def require(self) -> None:
        """Check the host before anything is done. Raises a VirtdError."""

    async def reach(self) -> None:
        """Start what it depends on: other drivers' objects, which others use as well. Raises a VirtdError."""

    def remember(self, promise: Process) -> None:
        """Put it on record before anything of it exists; `promise`: the fields that the record needs. Raises
        HostError."""
        raise NotImplementedError

    def begin(self) -> None:
        """It is on record: make the owner look after it."""

    def prepare(self, ends: Ends) -> None:
        """Change the host as the record now says. Raises HostError."""

    async def connect(self) -> None:
        """Like `prepare`, for changes that take time. Raises a VirtdError."""

    def spec(self) -> UnitSpec:
        """The unit."""
        raise NotImplementedError

    def know(self, identity: Process) -> None:
        """Record the process. Raises HostError."""
        raise NotImplementedError

    async def come_up(self) -> None:
        """Wait until it is ready for use. Raises StartFailed."""

    async def failed(self, why: BaseException) -> None:
        """It has ended, if it ever ran. If it was `remembered`, record that and clean up what exists."""
        raise NotImplementedError

    def explained(self, exc: errors.VirtdError) -> errors.VirtdError:
        """The error for the caller, with the child's own messages, if any."""
        return exc

    def trouble(self, text: str) -> None:
        """Report that not everything could be undone."""
        raise NotImplementedError

    # The steps

    async def launch(self) -> None:
        """Raises a VirtdError, with nothing left behind."""
        child = self.child
        self.require()
        self._require_room()
        units = await self.services.units()
        await units.collect(child.unit)  # before there is anything to undo: a unit that runs there isn't ours to end
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
        """Undo whatever exists of it so far."""
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
