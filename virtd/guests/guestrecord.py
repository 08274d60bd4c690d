# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is known about one domain or container, and the hooks in which drivers differ.

Its pieces (adopting.py, finishing.py) know this class, and guest.py puts them together.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

from .. import errors, files, untrusted
from ..hints import do
from ..model.state import ALIVE, State
from ..objects import definitions
from ..objects.object import D
from ..objects.persistent import Persistent
from ..objects.turns import Turns
from ..process import Seen
from ..records import Record, Records, now, stamp
from ..systemd.names import unit_name
from .repeating import Repeater
from .verdict import End, Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from ..children.child import Child, Services
    from ..objects.persistent import Named
    from ..systemd.state import UnitState

AGAIN = "started again"  # in a record's data: somebody else restarted the unit
SEEN = "seen"  # in a record's data: what was seen of its end, see process.Seen


class Shared(NamedTuple):
    """What all guests of a driver share. `publish(event, guest)`: "changed" or "ended"."""

    services: Services
    records: Records
    publish: Callable[[str, Named], None]
    next_id: Callable[[], int]
    boot_id: str


class Live(NamedTuple):
    """A guest that is alive: the record and its process, neither of which exists without the other."""

    record: Record
    child: Child


class GuestRecord(Persistent, Generic[D]):
    """A definition, a record, or both; and a child from its start until it is put away.

    Without a definition it exists only as long as its record or its unit, and is forgotten when its child ends.
    """

    driver = ""  # the first part of its slots' and units' names
    noun = ""  # what a person calls it
    housed = True  # whether it has a directory below /run while it runs
    definition_type: type[D]

    def __init__(self, shared: Shared, name: str) -> None:
        super().__init__(name)
        self.shared: Shared = shared
        self.definition: D | None = None
        self.definition_text = ""
        self.child: Child | None = None
        self.over = asyncio.Event()  # set while there is no child
        self.over.set()
        self.settled = asyncio.Event()  # cleared while it isn't known whether it runs
        self.settled.set()
        self.stderr = Repeater(self, sort=self.sort_line)
        self._turns = Turns(name)

    # To be overridden

    def parse(self, text: str, source: str) -> D:
        """The definition that `text` holds. Raises InvalidDefinition."""
        raise NotImplementedError

    def judge(self, unit: UnitState | None) -> End:
        """Why it ended; everything it wrote is in the logs by now."""
        raise NotImplementedError

    async def hear_out(self) -> None:
        """It has ended: collect its last words, other than those in the logs."""

    def adopted(self) -> None:
        """It runs, and this process has just begun to supervise it."""

    async def let_go(self) -> None:
        """Close what this process has open to it, besides the child's pipes. Idempotent."""

    async def give_back(self, record: Record) -> None:
        """Undo what was done to the host for it, as the record says. Idempotent."""

    async def forgotten(self, record: Record) -> None:
        """Undo what its unit needed until systemd had forgotten it, as the record says. Idempotent."""

    def meaning(self, slot: str) -> str:
        """What the loss of a slot, one of child.SLOTS, means for it."""
        raise NotImplementedError

    def sort_line(self, _text: str) -> str | None:
        """The level of a line of its stderr in the journal; None if it doesn't belong there."""
        return "warning"

    async def remove_runtime(self) -> None:
        """Remove its directories below /run. Raises HostError."""
        await asyncio.to_thread(files.remove_tree, self.runtime)
        if os.path.lexists(self.runtime):
            raise errors.HostError(f"{self.runtime} can't be removed")

    # What it is

    @property
    def state(self) -> State:
        return State.of(self.record.state) if self.record is not None else State.STOPPED

    @property
    def alive(self) -> bool:
        return self.state in ALIVE

    active = alive

    @property
    def key(self) -> str:
        return f"{self.driver}/{self.name}"

    @property
    def unit(self) -> str:
        return unit_name(self.driver, self.name)

    @property
    def runtime(self) -> str:
        return self.shared.services.paths.runtime(self.driver, self.name)

    @property
    def source(self) -> str:
        """The definition's file."""
        return self.shared.services.paths.definition(self.driver, self.name)

    @property
    def running_definition(self) -> D | None:
        """The definition that the guest was started with, or the present one when it isn't running."""
        if self.pending and (text := definitions.text_in_force(self.data)):
            with contextlib.suppress(errors.InvalidDefinition):
                return self.parsed(text) or self.parse(text, self.source)
        return self.definition

    def parsed(self, text: str) -> D | None:
        """The definition in `text`, if this version of virtd started the guest with it: the record has it parsed."""
        return definitions.parsed(self.data, text, self.definition_type)

    @property
    def pending(self) -> bool:
        """Whether the definition has changed since the guest started, so that the change waits for the next start."""
        return self.alive and self.data.get("definition") != self.definition_text

    @property
    def defined(self) -> D:
        """Its definition. Raises NotFound if it has none."""
        if self.definition is None:
            raise errors.NotFound(
                f"{self.noun.capitalize()} {self.name} has no definition",
                hint=do("define", self.noun, "FILE") + f', with name = "{self.name}".',
            )
        return self.definition

    @property
    def live(self) -> Live:
        """The record and process of a live guest. Raises Bug if it has none."""
        if self.child is None:
            raise errors.Bug(f"{self.noun} {self.name} has no process")
        return Live(self.recorded, self.child)

    @property
    def request(self) -> Request | None:
        asked = self.data.get("request")
        return Request(asked["verb"], asked["by"], asked["at"]) if asked else None

    def fields(self) -> dict[str, str]:
        """The journal fields of this object."""
        return {
            "VIRTD_DRIVER": self.driver,
            "VIRTD_NAME": self.name,
            "VIRTD_UUID": self.uuid,
            "VIRTD_UNIT": self.unit,
        }

    @property
    def seen(self) -> Seen | None:
        """What was seen of an end that has still to be judged."""
        match self.data.get(SEEN):
            case [int() | float() as at, int() | None as status]:
                return Seen(at, status)
            case _:
                return None

    @property
    def seen_at(self) -> str:
        """When its end was noticed, as records have it."""
        return stamp(seen.at) if (seen := self.seen) is not None else now()

    @property
    def leftovers(self) -> bool:
        """Whether it has ended and left something that isn't put away yet."""
        record = self.record
        return not self.alive and record is not None and bool(record.unit or record.slots or self.child is not None)

    def last_words(self, since: int | None = None, most: int = 4096) -> str:
        """The end of what it wrote to stderr: the last `most` bytes, or what came after offset `since`."""
        path = self.shared.services.paths.stderr_log(self.driver, self.name)
        try:
            return untrusted.tail(path, most, since=since or 0).decode(errors="replace").strip()
        except OSError:
            return ""

    # One operation at a time

    @contextlib.asynccontextmanager
    async def exclusive(self, what: str) -> AsyncIterator[None]:
        """One operation at a time, once it is known whether it runs."""
        await self.settled.wait()
        async with self._turns.take(what):
            yield

    @property
    def busy(self) -> bool:
        """Whether an operation is under way."""
        return self._turns.taken

    # The record

    def ask(self, verb: str, by: str) -> dict[str, Any]:
        """The record's data with a person's request (none if `verb` is empty), to explain an end that nobody sees."""
        return self.data | {"request": {"verb": verb, "by": by, "at": now()} if verb else None}

    def keep_console(self, writer: dict[str, Any] | None) -> None:
        """Record which client types on the console, so that it can go on after a restart of the daemon."""
        if self.alive:
            self.note(self.state, self.reason, data=self.data | {"console": writer})
