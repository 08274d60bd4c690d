# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kinds of objects on D-Bus, each below a path of its own: /org/virtd1/<segment>/<name>."""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from . import interfaces, introspection

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from ..host import Host
    from ..systemd.bus import Var
    from .introspection import Interface
    from .variants import Object


class Kind(NamedTuple):
    """One kind of object.

    `driver` is the "driver" of its objects and events. `listing` returns the short forms, `info` the long one;
    `properties` makes the properties from either, and `late` has those that only the long form contains, with a
    placeholder until somebody asks. `ended` is for kinds whose objects end: the signal Ended carries the "exit" of
    the long form. `manager` is the interface of /org/virtd1/<segment> itself, for what a kind offers besides its
    objects, and `managing` has its members.
    """

    segment: str
    interface: str
    members: Interface
    driver: str
    listing: Callable[[Host], Awaitable[Sequence[Object]]]
    info: Callable[[Host, str], Awaitable[Object]]
    properties: Callable[[Object], dict[str, Var]]
    late: Mapping[str, Var] = MappingProxyType({})
    ended: bool = False
    manager: str = ""
    managing: Interface | None = None


def load() -> dict[str, Kind]:
    """All kinds, by segment: the KIND of each module that an interface's module names as OBJECTS."""
    modules = [importlib.import_module(module) for module in interfaces.MODULES.values()]
    kinds = [importlib.import_module(module.OBJECTS).KIND for module in modules if hasattr(module, "OBJECTS")]
    return {kind.segment: kind for kind in kinds}


def members(kinds: Iterable[Kind]) -> dict[str, Interface]:
    """All D-Bus interfaces by name, including those that don't belong to a kind."""
    found = dict(introspection.OWN)
    for kind in kinds:
        found[kind.interface] = kind.members
        if kind.managing is not None:
            found[kind.manager] = kind.managing
    return found
