# SPDX-License-Identifier: LGPL-2.1-or-later
"""All objects of one driver, whatever they are: named by files, changed through them, and found again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from .. import errors, files, journal
from ..hints import do
from ..messages import Message
from ..model.domain import canonical_uuid
from ..paths import listing
from ..replies import Gone, Reply, Trouble
from . import definitions
from .protocol import Difference, Found, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator
    from enum import StrEnum

    from ..children.child import Services
    from ..records import Record, Records
    from .persistent import Named
    from .protocol import Publish

log = logging.getLogger(__name__)

BATCH = 64  # definitions without a uuid that are written at once
CHANGED, NEW_UUID = "changed", "new uuid"  # what reading a definition came to
RECONCILE_LIMIT = 120.0  # seconds that an operation waits after the daemon's own start, in which the bus may hang


class Definition(Protocol):
    """What every definition has."""

    @property
    def name(self) -> str: ...
    @property
    def uuid(self) -> str | None: ...
    @property
    def autostart(self) -> bool: ...


class Object(Protocol):
    """What every object has. Without a definition only what is active keeps it here."""

    name: str
    definition: Any
    definition_text: str
    record: Record | None
    problems: dict[str, Problem]
    settled: asyncio.Event  # cleared while nobody knows yet what became of it

    @property
    def uuid(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def state(self) -> StrEnum: ...
    @property
    def active(self) -> bool: ...
    @property
    def pending(self) -> bool: ...
    def parsed(self, text: str) -> Any: ...
    def adopt(self, record: Record) -> object: ...
    def recall(self) -> None: ...


class Fresh(NamedTuple):
    """An object whose definition is getting a uuid, and what it was defined by before."""

    name: str
    definition: Any = None
    text: str = ""


T = TypeVar("T", bound=Object)
D = TypeVar("D", bound=Definition)


class Inventory(Generic[T, D]):
    """`publish(event, name)` is told "added", "removed" and "changed", and what a driver has of its own."""

    name = ""  # of the driver
    noun = ""
    taken_back = ""  # how one comes back whose record is lost, for a person to read
    states: type[StrEnum]

    def __init__(self, services: Services, records: Records, publish: Publish) -> None:
        self._services = services
        self._publish = publish
        self.records = records
        self.objects: dict[str, T] = {}
        self.problems: dict[str, Problem] = {}
        self.found = Found()
        self._reconciled = asyncio.Event()  # cleared while what there is isn't known for certain
        self._reconciled.set()

    @property
    def services(self) -> Services:
        return self._services

    # What each driver does in its own way

    def make(self, name: str) -> T:
        """A new object without anything."""
        raise NotImplementedError

    def parse(self, text: str, source: str) -> D:
        """The definition that `text` holds. Raises InvalidDefinition."""
        raise NotImplementedError

    def take_back(self, name: str, record: Record) -> None:
        """An earlier daemon's object. What it raises is a problem of that object."""
        self.object(name).adopt(record)

    def left_alone(self, name: str, problem: Problem) -> None:
        """It could not be taken back."""
        one = self.object(name)
        one.problems["adoption"] = problem
        one.settled.set()

    def check_beside(self, definition: D, other: T, source: str) -> None:
        """Raise Exists or InvalidDefinition when both can't be had: an address, a path that is taken."""

    def put_in_force(self, one: T, definition: D, text: str) -> None:
        """What is active is as its new definition says: a change that needn't wait."""
        raise NotImplementedError

    def describe(self, one: T) -> Reply:
        """The short form, as `list --json` has it."""
        raise NotImplementedError

    # Records

    def restore_records(self) -> None:
        """Take back what the records tell of. No record can cost the others their daemon."""
        for path in self.half_written():
            with contextlib.suppress(errors.HostError):  # a file system that is read-only by now, perhaps
                files.remove(path)
        loaded = self.records.load()
        if loaded.wrong:
            self.problems["records"] = Problem(loaded.wrong, self.taken_back)
            log.error("%s", loaded.wrong)
        for bad in loaded.quarantined:
            text = f"The record of {self.noun} {bad.name} can't be read: {bad.reason}"
            self.problems[f"record {bad.name}"] = Problem(text, f"It was moved to {bad.moved_to}. {self.taken_back}")
            journal.send(
                text, message_id=Message.RECORD_QUARANTINED, level="error",
                VIRTD_DRIVER=self.name, VIRTD_NAME=bad.name, VIRTD_FILE=bad.moved_to,
            )  # fmt: skip
        for name, record in loaded.records.items():
            try:
                self.take_back(name, record)
            except Exception as exc:
                log.exception("%s can't be adopted", name)
                self.left_alone(name, Problem(f"{name} could not be adopted: {exc}", "It was left alone."))

    def recall(self) -> None:
        """First step of a start, at its end: what records tell of problems is known before anybody asks."""
        for one in [one for one in self.objects.values() if one.record is not None]:
            try:
                one.recall()
            except Exception as exc:  # it costs no other its daemon
                log.exception("The problems of %s can't be recalled", one.name)
                one.problems["internal"] = Problem(
                    f"Its problems can't be recalled: {exc}", "This is a bug: see journalctl -u virtd."
                )

    def half_written(self) -> list[str]:
        """Files that never got their real names, because a crash came in between."""
        paths = self._services.paths
        return [path for directory in (paths.etc, paths.run) for path in files.leftovers(f"{directory}/{self.name}")]

    async def certain(self) -> None:
        """Wait until reconcile() is through.

        A start in the middle of it would be taken for one that a crash cut off, and rolled back while it is under
        way; and a guest whose record was lost would be started a second time. Raises Busy.
        """
        if self._reconciled.is_set():
            return
        await self._services.units()  # which says so if it is D-Bus that is away
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

        A bad one is a problem, and its object is as before.
        """
        return [name for name in self.read_definitions() if name]

    def read_definitions(self) -> Iterator[str]:
        """`load_definitions`, bit by bit: after each the name of one that changed, or ""."""
        directory = f"{self._services.paths.etc}/{self.name}"
        for key in [key for key in self.problems if key.startswith("definition")]:
            del self.problems[key]
        found = listing(directory, ".toml")
        for where, problem in definitions.troubles(directory, found):
            self.problems[f"definition {where}".rstrip()] = problem
        if found.wrong:
            return
        there = set(found.names)
        # First, so that a definition that was given another name doesn't meet its old self.
        for name in [name for name, one in self.objects.items() if one.definition is not None and name not in there]:
            self.forget(name)
            yield name
        fresh: list[Fresh] = []
        try:
            for name in found.names:
                before = self._before(name)
                changed = self._try_definition(name)
                if changed == NEW_UUID:
                    fresh.append(before)
                    if len(fresh) >= BATCH:
                        self._write_fresh(fresh)
                yield name if changed else ""
        finally:
            self._write_fresh(fresh)

    def _before(self, name: str) -> Fresh:
        known = self.objects.get(name)
        return Fresh(name) if known is None else Fresh(name, known.definition, known.definition_text)

    def _try_definition(self, name: str) -> str:
        """`_read_definition`; what is wrong with it is a problem."""
        try:
            return self._read_definition(name)
        except FileNotFoundError as exc:  # undefined while we read the others, unless it is a link to nowhere
            if os.path.lexists(self._services.paths.definition(self.name, name)):
                self._complain(name, exc)
        except (errors.VirtdError, OSError, ValueError) as exc:
            self._complain(name, exc)
        return ""

    def _read_definition(self, name: str) -> str:
        """Take what one file holds; CHANGED, NEW_UUID when it is still to be written, or "" when all is as it was."""
        path = self._services.paths.definition(self.name, name)
        known = self.objects.get(name)
        text = definitions.read(path)
        if known is not None and known.definition is not None and known.definition_text == text:
            return ""
        definition: D = (known.parsed(text) if known is not None else None) or self.parse(text, path)
        definitions.check_name(definition.name, name, path)
        self._check_unique(definition, path)
        lacking = definition.uuid is None
        if lacking:
            definition, text = self._with_uuid(definition, text)
        self._take(definition, text)
        return NEW_UUID if lacking else CHANGED

    def _write_fresh(self, fresh: list[Fresh]) -> None:
        """Put the uuids on disk that were made for definitions without one; who can't have one isn't taken."""
        paths = {self._services.paths.definition(self.name, before.name): before for before in fresh}
        texts = {
            path: self.objects[one.name].definition_text for path, one in paths.items() if one.name in self.objects
        }
        for path, exc in definitions.write_all(texts).items():
            before = paths[path]
            self._complain(before.name, exc)
            if before.definition is None:
                self.forget(before.name)
            else:
                self._take(before.definition, before.text)
        fresh.clear()

    def _complain(self, name: str, exc: Exception) -> None:
        path = self._services.paths.definition(self.name, name)
        self.problems[f"definition {name}"] = definitions.complain(path, exc)

    def unread_definitions(self) -> list[Difference]:
        """Files that aren't what was read of them last; a reload reads them."""
        directory = f"{self._services.paths.etc}/{self.name}"
        there = listing(directory, ".toml")
        if there.wrong:
            return (
                [Difference("definition", "", self.problems["definition"].text)]
                if "definition" in self.problems
                else []
            )
        found = [
            Difference(
                "definition", name, f"{directory}/{name}.toml is gone, and virtd doesn't know that yet", "reload"
            )
            for name, one in self.objects.items()
            if one.definition is not None and name not in there.names
        ]
        for name in there.names:
            one = self.objects.get(name)
            try:
                text: str | None = definitions.read(f"{directory}/{name}.toml")
            except (errors.VirtdError, OSError, ValueError):
                text = None
            if (bad := self.problems.get(f"definition {name}")) is not None:
                found.append(Difference("definition", name, bad.text))
            elif one is None or one.definition is None or one.definition_text != text:
                what = f"{directory}/{name}.toml was changed, and virtd hasn't read it yet"
                found.append(Difference("definition", name, what, "reload"))
        return found

    def check(self, text: str, source: str) -> D:
        """The definition in `text`, as it would be taken. Raises InvalidDefinition or Exists."""
        definition = self.parse(text, source)
        self._check_unique(definition, source)
        one = self.objects.get(definition.name)
        if one is not None and one.uuid and definition.uuid and definition.uuid != one.uuid:
            raise errors.Exists(
                f"{source}: uuid: {self.noun} {definition.name} exists with another uuid, {one.uuid}",
                hint="Leave the uuid out to change the definition, or undefine it first: "
                + do("undefine", self.noun, definition.name)
                + ".",
            )
        return definition

    def define(self, text: str, source: str) -> tuple[T, bool]:
        """Take a definition: the object, and whether it is new. A uuid is made when there is none."""
        definition = self.check(text, source)
        if definition.uuid is None:
            definition, text = self._with_uuid(definition, text)
        return self._write(definition, text)

    def set_autostart(self, name: str, *, enable: bool) -> bool:
        """Change the definition's file; False if it said so already."""
        one = self.find(name)
        if one.definition is None:
            raise errors.NotFound(f"{self.noun.capitalize()} {one.name} has no definition")
        if one.definition.autostart == enable:
            return False
        text = definitions.with_autostart(one.definition_text, enable=enable)
        definition = self.parse(text, one.source)
        if definition.autostart != enable:
            raise errors.HostError(
                f"Cannot change autostart in {one.source}", hint="Edit it, then: systemctl reload virtd."
            )
        in_force = one.active and not one.pending
        self._write(definition, text)
        if in_force:
            self.put_in_force(one, definition, text)
        return True

    def _with_uuid(self, definition: D, text: str) -> tuple[D, str]:
        """The definition with a uuid of its own: the one that the object has, or a new one."""
        one = self.objects.get(definition.name)
        text = definitions.with_uuid(text, one.uuid if one is not None else "")
        return self.parse(text, definition.name), text

    def _write(self, definition: D, text: str) -> tuple[T, bool]:
        definitions.write(self._services.paths.definition(self.name, definition.name), text)
        self.problems.pop(f"definition {definition.name}", None)
        return self._take(definition, text)

    def _take(self, definition: D, text: str) -> tuple[T, bool]:
        new = definition.name not in self.objects
        one = self.object(definition.name)
        changed = one.definition_text != text or one.definition is None
        one.definition, one.definition_text = definition, text
        if new or changed:
            self._publish("added" if new else "changed", definition.name)
        return one, new

    def _check_unique(self, definition: D, source: str) -> None:
        for other in self.objects.values():
            if other.name == definition.name:
                continue
            if definition.uuid is not None and other.uuid == definition.uuid:
                raise errors.Exists(
                    f"{source}: uuid: {definition.uuid} is the uuid of {self.noun} {other.name}",
                    hint="Leave it out: a new one is made.",
                )
            self.check_beside(definition, other, source)

    def forget(self, name: str) -> None:
        """The definition is gone. What is active stays until it ends."""
        one = self.objects[name]
        one.definition, one.definition_text = None, ""
        if one.active:
            self._publish("changed", name)
            return
        if one.record is not None:
            try:
                self.records.remove(name)
            except errors.HostError as exc:  # it is gone all the same; the next start, or fsck, removes the file
                log.warning("The record of %s stays: %s", name, exc)
            one.record = None  # nor is it to be written once more
        del self.objects[name]
        self._publish("removed", name)

    # Finding and describing

    def object(self, name: str) -> T:
        """The object of that name, made if there is none."""
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
        """Its slots, as a record tells of them (child.identities)."""
        held, mine = self._services.store.slots(), f"{self.name}/{name}/"
        return {slot: f"{kept.dev}:{kept.ino}" for slot, kept in held.items() if slot.startswith(mine)}

    def settled(self) -> bool:
        """Whether it is known of every object what became of it, so that a listing needn't wait."""
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
        """The pump's word that the log of a slot can't be written, or, without a problem, that it can again."""
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
        """Pass on what an object of this driver publishes; one that was forgotten has nothing more to say."""
        if self.objects.get(one.name) is one:
            self._publish(event, one.name)
