# SPDX-License-Identifier: LGPL-2.1-or-later
"""An object's record: always up to date in memory, and on disk as soon as the file system permits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from .. import errors, journal
from ..messages import Message
from ..records import now
from .protocol import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from enum import StrEnum
    from typing import Unpack

    from ..hints import Hint
    from ..records import Changes, Details, Record, Records

log = logging.getLogger(__name__)

WAITS = "autostart"  # key of the problem that it waits to be autostarted
SAVE_AGAIN = 1.0  # seconds until a record that couldn't be written is tried again


class Named(Protocol):
    """An object that has changed: listeners look it up by its name."""

    name: str


class Shared(Protocol):
    """What the objects of a driver share."""

    @property
    def records(self) -> Records: ...
    @property
    def publish(self) -> Callable[[str, Named], None]: ...


class Tasks:
    """The tasks of the object `name`. A task that fails becomes a problem of the object."""

    def __init__(self, name: str, problems: dict[str, Problem]) -> None:
        self.name = name
        self.problems = problems
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[object, object, None], name: str) -> None:
        """Start a task of this object, which `end_tasks` cancels."""
        task: asyncio.Task[None] = asyncio.create_task(work, name=f"{name}-{self.name}")
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("%s: %s failed: %s", self.name, task.get_name(), exc, exc_info=exc)
            self.problems["internal"] = Problem(
                f"{task.get_name()} failed: {exc}", "This is a bug: see journalctl -u virtd."
            )

    async def end_tasks(self) -> None:
        """Cancel all but the calling one, and wait for them to end."""
        mine = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in mine:
            task.cancel()
        await asyncio.gather(*mine, return_exceptions=True)


class Persistent(Tasks):
    """An object with a definition, a record, or both."""

    shared: Shared
    definition: Any
    settled: asyncio.Event

    def __init__(self, name: str) -> None:
        super().__init__(name, {})
        self.record: Record | None = None
        self.on_record = asyncio.Event()  # cleared while the record on disk is older than the one in memory
        self.on_record.set()
        self.waits: Problem | None = None  # see Startable

    @property
    def active(self) -> bool:
        raise NotImplementedError

    @property
    def recorded(self) -> Record:
        """The record, for callers who know that there is one. Raises Bug otherwise."""
        if self.record is None:
            raise errors.Bug(f"{self.name} has no record")
        return self.record

    @property
    def data(self) -> dict[str, Any]:
        """The driver's own part of the record; empty without a record."""
        return self.record.data if self.record is not None else {}

    def fields(self) -> dict[str, str]:
        """The journal fields of this object."""
        raise NotImplementedError

    def recall(self) -> None:
        """First step of a start, once definitions are read: restore the problems that are on record.

        So a client sees the same right after a restart as right before; nothing on the host is examined for it.
        """

    def wait_for(self, failed: Problem | None) -> None:
        """Have it wait for the next try of its autostart, which failed; None: it no longer waits."""
        if failed is None:
            if self.waits is None:
                return
            self.problems.pop(WAITS, None)
        else:
            self.problems[WAITS] = Problem(f"Autostart failed: {failed.text}; it is tried again", failed.hint)
        self.waits = failed
        self.shared.publish("changed", self)

    def lost(self, slot: str, what: str, hint: Hint) -> None:
        """A slot of the record is missing from the store; `what` says what it belongs to, and what its loss means."""
        text = f"Slot {slot} of {what}"
        self.problems[f"slot {slot}"] = Problem(text, hint)
        journal.send(text, message_id=Message.SLOT_LOST, level="warning", VIRTD_SLOT=slot, **self.fields())

    @property
    def reason(self) -> str:
        """Why it is in its state, for a person to read."""
        if self.waits is not None and not self.active:
            return f"waits to be autostarted: {self.waits.text}"
        if self.record is not None:
            return self.record.reason
        return "not started since boot" if self.settled.is_set() else "not known yet: virtd is looking"

    @property
    def uuid(self) -> str:
        if self.definition is not None and self.definition.uuid is not None:
            return str(self.definition.uuid)
        return self.record.uuid if self.record is not None else ""

    def save(self, **changes: Unpack[Changes]) -> None:
        """Change the record and write it. Raises HostError, and then leaves it as it was in memory, too."""
        self.put(msgspec.structs.replace(self.recorded, **changes))

    def put(self, record: Record) -> None:
        """Replace the record. Raises HostError, and then leaves it as it was in memory, too."""
        self.shared.records.save(record)
        self.record = record
        self._recorded()

    def note(self, state: StrEnum, reason: str, **changes: Unpack[Details]) -> None:
        """Enter a state that can't be refused: always in memory, and on disk as soon as the file system permits."""
        before = self.recorded
        if (state.value, reason) == (before.state, before.reason) and not changes:
            return
        changes.setdefault("since", now() if state.value != before.state else before.since)
        self.keep(state=state.value, reason=reason, **changes)
        if self.active:
            self.wait_for(None)
        self.shared.publish("changed", self)

    def keep(self, **changes: Unpack[Changes]) -> None:
        """Change the record as `note` does, without publishing an event."""
        self.record = record = msgspec.structs.replace(self.recorded, **changes)
        try:
            self.shared.records.save(record)
            self._recorded()
        except errors.HostError as exc:
            self.problems["record"] = Problem(exc.message, exc.hint)
            log.warning("%s: %s", self.name, exc)
            if self.on_record.is_set():
                self.on_record.clear()
                self.spawn(self._save_again(), "save")

    def _recorded(self) -> None:
        self.problems.pop("record", None)
        self.on_record.set()

    async def _save_again(self) -> None:
        """Until the record is up to date, because the next daemon relies on it."""
        while self.record is not None and not self.on_record.is_set():
            await asyncio.sleep(SAVE_AGAIN)
            if self.record is not None and not self.on_record.is_set():
                with contextlib.suppress(errors.HostError):
                    self.save()
                    self.shared.publish("changed", self)
