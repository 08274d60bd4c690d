# SPDX-License-Identifier: LGPL-2.1-or-later
"""All objects of one driver, of whatever kind."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Generic

from .. import errors, files
from ..hints import do
from ..model.naming import canonical_uuid
from ..replies import Gone, Reply, Trouble
from . import restoring
from .defining import Defining
from .object import D, T
from .protocol import Difference, Found, Problem
from .reading import Reading

if TYPE_CHECKING:
    from collections.abc import Iterator
    from enum import StrEnum

    from ..children.child import Services
    from ..records import Record, Records
    from .persistent import Named
    from .protocol import Publish

log = logging.getLogger(__name__)

RECONCILE_LIMIT = 100.0  # seconds that an operation waits after the daemon's own start, in which the bus may hang


class Inventory(Generic[T, D]):
    """The objects by name. `publish(event, name)` gets "added", "removed", "changed", and a driver's own events."""

    name = ""  # of the driver
    noun = ""
    taken_back = ""  # how an object whose record is lost comes back, for a person to read
    states: type[StrEnum]

    def __init__(self, services: Services, records: Records, publish: Publish) -> None:
        self._services = services
        self._publish = publish
        self.records = records
        self.objects: dict[str, T] = {}
        self.problems: dict[str, Problem] = {}
        self.found = Found()
        self._reconciled = asyncio.Event()  # cleared while it isn't known for certain what runs
        self._reconciled.set()
        self._defining: Defining[T, D] = Defining(self)
        self._reading: Reading[T, D] = Reading(self, self._defining)

    @property
    def services(self) -> Services:
        return self._services

    @property
    def directory(self) -> str:
        """Where its definitions are."""
        return f"{self._services.paths.etc}/{self.name}"

    def path(self, name: str) -> str:
        """The file of an object's definition."""
        return self._services.paths.definition(self.name, name)

    def publish(self, event: str, name: str) -> None:
        self._publish(event, name)

    # To be overridden

    def make(self, name: str) -> T:
        """A new object that has neither definition nor record."""
        raise NotImplementedError

    def parse(self, text: str, source: str) -> D:
        """The definition in `text`. Raises InvalidDefinition."""
        raise NotImplementedError

    def take_back(self, name: str, record: Record) -> None:
        """Take over an earlier daemon's object. What this raises becomes a problem of the object."""
        self.object(name).adopt(record)

    def left_alone(self, name: str, problem: Problem) -> None:
        """An object could not be taken back."""
        one = self.object(name)
        one.problems["adoption"] = problem
        one.settled.set()

    def check_beside(self, definition: D, other: T, source: str) -> None:
        """Raise Exists or InvalidDefinition if both can't exist at once, as two networks with one address can't."""

    def put_in_force(self, one: T, definition: D, text: str) -> None:
        """Record that an active object already matches its new definition."""
        raise NotImplementedError

    def describe(self, one: T) -> Reply:
        """The short form, as `list --json` has it."""
        raise NotImplementedError

    # Records

    def restore_records(self) -> None:
        """Take over the objects on record. No record can keep the daemon from the others."""
        restoring.restore(self)

    def recall(self) -> None:
        """At the end of a start's first step: restore the problems on record before anybody asks."""
        restoring.recall(self)

    def half_written(self) -> list[str]:
        """Incomplete files left by a crash, which never got their real names."""
        paths = self._services.paths
        return [path for directory in (paths.etc, paths.run) for path in files.leftovers(f"{directory}/{self.name}")]

    async def certain(self) -> None:
        """Wait until reconcile() is done. Raises Busy.

        A start in the middle of it would be taken for one that a crash interrupted, and rolled back while it is under
        way; and a guest whose record was lost would be started a second time.
        """
        if self._reconciled.is_set():
            return
        await self._services.units()  # which reports it if D-Bus is unavailable
        try:
            async with asyncio.timeout(RECONCILE_LIMIT):
                await self._reconciled.wait()
        except TimeoutError:
            raise errors.Busy(
                "virtd is still finding out what runs", hint="Try again in a moment. See: " + do("status") + "."
            ) from None

    # Definitions

    def load_definitions(self) -> list[str]:
        """Read all definitions again; the names of those that changed.

        A bad one is a problem, and its object stays as it was.
        """
        return [name for name in self.read_definitions() if name]

    def read_definitions(self) -> Iterator[str]:
        """`load_definitions`, bit by bit: after each the name of one that changed, or ""."""
        return self._reading.read()

    def unread_definitions(self) -> list[Difference]:
        """Files that have changed since they were last read; a reload reads them."""
        return self._reading.unread()

    def check(self, text: str, source: str) -> D:
        """The definition in `text`, as it would be accepted. Raises InvalidDefinition or Exists."""
        return self._defining.check(text, source)

    def define(self, text: str, source: str) -> tuple[T, bool]:
        """Accept a definition; returns the object and whether it is new. One without a uuid gets one."""
        return self._defining.define(text, source)

    def set_autostart(self, name: str, *, enable: bool) -> bool:
        """Change the definition's file; False if it said so already."""
        return self._defining.set_autostart(name, enable=enable)

    def forget(self, name: str) -> None:
        """The definition was removed. An active object stays until it ends."""
        one = self.objects[name]
        one.definition, one.definition_text = None, ""
        if one.active:
            self._publish("changed", name)
            return
        if one.record is not None:
            try:
                self.records.remove(name)
            except errors.HostError as exc:  # the next start of the daemon, or fsck, removes the file
                log.warning("The record of %s stays: %s", name, exc)
            one.record = None  # so that it isn't written again
        del self.objects[name]
        self._publish("removed", name)

    # Finding and describing

    def object(self, name: str) -> T:
        """The object of that name; a new one if there is none."""
        if name not in self.objects:
            self.objects[name] = self.make(name)
        return self.objects[name]

    def find(self, name: str) -> T:
        """By name or uuid. Raises NotFound."""
        if (one := self.objects.get(name)) is not None:
            return one
        if (uuid := canonical_uuid(name)) is not None:
            for one in self.objects.values():
                if one.uuid == uuid:
                    return one
        raise errors.NotFound(f"There is no {self.noun} {name}", hint=do("list", self.noun) + " shows all.")

    def known(self) -> Iterator[tuple[str, Reply | None]]:
        for name, one in self.objects.items():
            certain = one.settled.is_set() or one.record is not None
            yield name, self.describe(one) if certain and (one.definition or one.record) else None

    def describe_named(self, name: str) -> Reply:
        one = self.objects.get(name)
        return self.describe(one) if one is not None else Gone(name=name, driver=self.name)

    def troubles_of(self, one: T) -> list[Trouble]:
        return [Trouble(text=problem.text, hint=str(problem.hint)) for problem in one.problems.values()]

    def slots_of(self, name: str) -> list[str]:
        mine = f"{self.name}/{name}/"
        return [slot for slot in self._services.store.names() if slot.startswith(mine)]

    def identities_of(self, name: str) -> dict[str, str]:
        """Its slots in the form that records have (child.identities)."""
        held, mine = self._services.store.slots(), f"{self.name}/{name}/"
        return {slot: f"{kept.dev}:{kept.ino}" for slot, kept in held.items() if slot.startswith(mine)}

    def settled(self) -> bool:
        """Whether it is known of every object whether it runs, so that a listing needn't wait."""
        return all(one.settled.is_set() for one in self.objects.values())

    def live(self) -> int:
        return sum(one.active for one in self.objects.values())

    def counts(self) -> dict[str, int]:
        counts = {state.value: 0 for state in self.states}
        for one in self.objects.values():
            counts[one.state.value] += 1
        return counts

    def troubles(self) -> list[tuple[str, Problem]]:
        found = [(key.partition(" ")[2], problem) for key, problem in self.problems.items()]
        for one in self.objects.values():
            found += [(one.name, problem) for problem in one.problems.values()]
        return found

    def refused(self, key: str, problem: Problem | None) -> None:
        """The pump's callback: the log of a slot can't be written, or, without a problem, it can again."""
        _driver, name, slot = key.split("/")
        one = self.objects.get(name)
        problems, key = (self.problems, f"log {name}") if one is None else (one.problems, f"log {slot}")
        if problem is None:
            problems.pop(key, None)
        else:
            problems[key] = problem

    def bad_definitions(self) -> list[tuple[str, Problem]]:
        return [
            (key.partition(" ")[2], problem) for key, problem in self.problems.items() if key.startswith("definition")
        ]

    def published(self, event: str, one: Named) -> None:
        """Pass on what an object of this driver publishes; forgotten objects publish nothing."""
        if self.objects.get(one.name) is one:
            self._publish(event, one.name)
