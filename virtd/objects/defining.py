# SPDX-License-Identifier: LGPL-2.1-or-later
"""Accepting definitions: checking one against all others, and giving it to its object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Protocol

from .. import errors
from ..hints import do
from . import definitions
from .object import D, T

if TYPE_CHECKING:
    from .protocol import Problem


class Owner(Protocol[T, D]):
    """The driver that has the definitions; see inventory.Inventory."""

    noun: str
    objects: dict[str, T]
    problems: dict[str, Problem]

    @property
    def directory(self) -> str: ...
    def path(self, name: str) -> str: ...
    def parse(self, text: str, source: str) -> D: ...
    def check(self, text: str, source: str) -> D: ...
    def check_beside(self, definition: D, other: T, source: str) -> None: ...
    def put_in_force(self, one: T, definition: D, text: str) -> None: ...
    def object(self, name: str) -> T: ...
    def find(self, name: str) -> T: ...
    def forget(self, name: str) -> None: ...
    def publish(self, event: str, name: str) -> None: ...


class Defining(Generic[T, D]):
    """The definitions of one driver, one at a time."""

    def __init__(self, owner: Owner[T, D]) -> None:
        self._owner = owner

    def check(self, text: str, source: str) -> D:
        """The definition in `text`, as it would be accepted. Raises InvalidDefinition or Exists."""
        definition = self._owner.parse(text, source)
        self.require_unique(definition, source)
        one = self._owner.objects.get(definition.name)
        if one is not None and one.uuid and definition.uuid and definition.uuid != one.uuid:
            raise errors.Exists(
                f"{source}: uuid: {self._owner.noun} {definition.name} exists with another uuid, {one.uuid}",
                hint="Leave the uuid out to change the definition, or undefine it first: "
                + do("undefine", self._owner.noun, definition.name)
                + ".",
            )
        return definition

    def define(self, text: str, source: str) -> tuple[T, bool]:
        """Accept a definition; returns the object and whether it is new. One without a uuid gets one."""
        definition = self._owner.check(text, source)
        if definition.uuid is None:
            definition, text = self.with_uuid(definition, text)
        return self._write(definition, text)

    def set_autostart(self, name: str, *, enable: bool) -> bool:
        """Change the definition's file; False if it said so already."""
        one = self._owner.find(name)
        if one.definition is None:
            raise errors.NotFound(f"{self._owner.noun.capitalize()} {one.name} has no definition")
        if one.definition.autostart == enable:
            return False
        text = definitions.with_autostart(one.definition_text, enable=enable)
        definition = self._owner.parse(text, one.source)
        if definition.autostart != enable:
            raise errors.HostError(
                f"Cannot change autostart in {one.source}", hint="Edit it, then: systemctl reload virtd."
            )
        in_force = one.active and not one.pending
        self._write(definition, text)
        if in_force:
            self._owner.put_in_force(one, definition, text)
        return True

    def with_uuid(self, definition: D, text: str) -> tuple[D, str]:
        """The definition with a uuid: the one that the object has, or a new one."""
        one = self._owner.objects.get(definition.name)
        text = definitions.with_uuid(text, one.uuid if one is not None else "")
        return self._owner.parse(text, definition.name), text

    def _write(self, definition: D, text: str) -> tuple[T, bool]:
        definitions.write(self._owner.path(definition.name), text)
        self._owner.problems.pop(f"definition {definition.name}", None)
        return self.take(definition, text)

    def take(self, definition: D, text: str) -> tuple[T, bool]:
        """Give the definition to its object: the object, and whether it is new."""
        new = definition.name not in self._owner.objects
        one = self._owner.object(definition.name)
        changed = one.definition_text != text or one.definition is None
        one.definition, one.definition_text = definition, text
        if new or changed:
            self._owner.publish("added" if new else "changed", definition.name)
        return one, new

    def require_unique(self, definition: D, source: str) -> None:
        """Raise Exists or InvalidDefinition if another object has what `definition` wants for itself."""
        for other in self._owner.objects.values():
            if other.name == definition.name:
                continue
            if definition.uuid is not None and other.uuid == definition.uuid:
                raise errors.Exists(
                    f"{source}: uuid: {definition.uuid} is the uuid of {self._owner.noun} {other.name}",
                    hint="Leave it out: a new one is made.",
                )
            self._owner.check_beside(definition, other, source)
