# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading the definitions in a driver's directory, at a start and again at each reload."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Generic, NamedTuple

from .. import errors
from ..paths import listing
from . import definitions
from .object import D, T
from .protocol import Difference

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .defining import Defining, Owner

BATCH = 64  # definitions without a uuid that are written at once
CHANGED, NEW_UUID = "changed", "new uuid"  # results of reading a definition


class Fresh(NamedTuple, Generic[D]):
    """An object whose definition gets a uuid, and its definition so far."""

    name: str
    definition: D | None = None
    text: str = ""


class Reading(Generic[T, D]):
    """The definition files of one driver."""

    def __init__(self, owner: Owner[T, D], defining: Defining[T, D]) -> None:
        self._owner = owner
        self._defining = defining

    def read(self) -> Iterator[str]:
        """Read all again, one by one: after each the name of one that changed, or "".

        A bad one is a problem, and its object stays as it was.
        """
        directory = self._owner.directory
        for key in [key for key in self._owner.problems if key.startswith("definition")]:
            del self._owner.problems[key]
        found = listing(directory, ".toml")
        for where, problem in definitions.troubles(directory, found):
            self._owner.problems[f"definition {where}".rstrip()] = problem
        if found.wrong:
            return
        there = set(found.names)
        # First, so that a renamed definition doesn't conflict with its old self.
        objects = self._owner.objects
        for name in [name for name, one in objects.items() if one.definition is not None and name not in there]:
            self._owner.forget(name)
            yield name
        fresh: list[Fresh[D]] = []
        try:
            for name in found.names:
                before = self._before(name)
                changed = self._try(name)
                if changed == NEW_UUID:
                    fresh.append(before)
                    if len(fresh) >= BATCH:
                        self._write_fresh(fresh)
                yield name if changed else ""
        finally:
            self._write_fresh(fresh)

    def _before(self, name: str) -> Fresh[D]:
        known = self._owner.objects.get(name)
        return Fresh(name) if known is None else Fresh(name, known.definition, known.definition_text)

    def _try(self, name: str) -> str:
        """Call `_read_one`; its errors become a problem."""
        try:
            return self._read_one(name)
        except FileNotFoundError as exc:  # undefined while others were read, unless it is a dangling link
            if os.path.lexists(self._owner.path(name)):
                self._complain(name, exc)
        except (errors.VirtdError, OSError, ValueError) as exc:
            self._complain(name, exc)
        return ""

    def _read_one(self, name: str) -> str:
        """Read one file; returns CHANGED, NEW_UUID if it has yet to be written, or "" if nothing changed."""
        path = self._owner.path(name)
        known = self._owner.objects.get(name)
        text = definitions.read(path)
        if known is not None and known.definition is not None and known.definition_text == text:
            return ""
        definition: D = (known.parsed(text) if known is not None else None) or self._owner.parse(text, path)
        definitions.check_name(definition.name, name, path)
        self._defining.require_unique(definition, path)
        lacking = definition.uuid is None
        if lacking:
            definition, text = self._defining.with_uuid(definition, text)
        self._defining.take(definition, text)
        return NEW_UUID if lacking else CHANGED

    def _write_fresh(self, fresh: list[Fresh[D]]) -> None:
        """Write the definitions that got a uuid; those that can't be written aren't accepted."""
        paths = {self._owner.path(before.name): before for before in fresh}
        objects = self._owner.objects
        texts = {path: objects[one.name].definition_text for path, one in paths.items() if one.name in objects}
        for path, exc in definitions.write_all(texts).items():
            before = paths[path]
            self._complain(before.name, exc)
            if before.definition is None:
                self._owner.forget(before.name)
            else:
                self._defining.take(before.definition, before.text)
        fresh.clear()

    def _complain(self, name: str, exc: Exception) -> None:
        path = self._owner.path(name)
        self._owner.problems[f"definition {name}"] = definitions.complain(path, exc)

    def unread(self) -> list[Difference]:
        """Files that have changed since they were last read; a reload reads them."""
        directory = self._owner.directory
        there = listing(directory, ".toml")
        if there.wrong:
            return (
                [Difference("definition", "", self._owner.problems["definition"].text)]
                if "definition" in self._owner.problems
                else []
            )
        found = [
            Difference(
                "definition", name, f"{directory}/{name}.toml was removed, and virtd doesn't know that yet", "reload"
            )
            for name, one in self._owner.objects.items()
            if one.definition is not None and name not in there.names
        ]
        for name in there.names:
            one = self._owner.objects.get(name)
            try:
                text: str | None = definitions.read(f"{directory}/{name}.toml")
            except (errors.VirtdError, OSError, ValueError):
                text = None
            if (bad := self._owner.problems.get(f"definition {name}")) is not None:
                found.append(Difference("definition", name, bad.text))
            elif one is None or one.definition is None or one.definition_text != text:
                what = f"{directory}/{name}.toml was changed, and virtd hasn't read it yet"
                found.append(Difference("definition", name, what, "reload"))
        return found
