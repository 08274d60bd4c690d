# SPDX-License-Identifier: LGPL-2.1-or-later
"""The replies of the operations, as every front end sends them: one frozen Struct each, a module for each noun.

A field's second annotation describes it, with its unit, and GetInterfaceDescription repeats it (api/types.py). Points
of time are ISO 8601 in UTC with microseconds, as in records. Names never change, because scripts use them. The
annotations cost nothing: they are strings until somebody asks for a description.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Changed", "Defined", "Gone", "Named", "Problem", "Reply", "Summary", "Trouble"]


class Reply(msgspec.Struct, frozen=True):
    """It can also be read as a mapping, because D-Bus's table names fields."""

    def __getitem__(self, name: str) -> Any:
        if name in self.__struct_fields__:
            return getattr(self, name)
        raise KeyError(name)

    def __contains__(self, name: str) -> bool:
        return name in self.__struct_fields__

    def __iter__(self) -> Iterator[str]:
        return iter(self.__struct_fields__)

    def keys(self) -> Iterable[str]:
        return self.__struct_fields__

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name) if name in self.__struct_fields__ else default


class Summary(Reply, frozen=True):
    """A listing's entry for an object that has a process: its fields come first in every reply about one."""

    name: str
    driver: Annotated[str, "qemu, lxc or network"]
    uuid: str
    state: Annotated[
        str,
        "of a guest: stopped, starting, running, paused, stopping or crashed; "
        "of a network: inactive, starting, active or stopping",
    ]
    reason: Annotated[str, "why, for a person to read"]
    pid: Annotated[
        int | None, "on the host: QEMU, the container's first program, or the network's dnsmasq; null while none runs"
    ]
    since: Annotated[str | None, "when it entered this state; null if it has been in no other"]
    autostart: Annotated[bool, "whether it is started at boot"]
    waits: Annotated[bool, "whether its autostart failed, and is being retried"]


class Gone(Reply, frozen=True):
    """An object that no longer exists."""

    name: str
    driver: Annotated[str, "qemu, lxc, network or storage"]


class Named(Reply, frozen=True):
    """An operation is done."""

    name: str


class Changed(Reply, frozen=True):
    """An operation is done; there may have been nothing to do."""

    name: str
    changed: Annotated[bool, "false: there was nothing to do"]


class Defined(Reply, frozen=True):
    """A definition was accepted, or would be."""

    name: str
    uuid: Annotated[str, "empty if it hasn't been generated yet"]
    created: Annotated[bool, "false: there was one of that name"]
    path: Annotated[str, "of the definition's file"]
    warnings: Annotated[list[str], "what the host lacks so far, or what takes effect at the next start"]


class Trouble(Reply, frozen=True):
    """Something that needs a person's attention."""

    text: str
    hint: Annotated[str, "what can be done about it; may be empty"]


class Problem(Reply, frozen=True):
    """Trouble, with its subject."""

    object: Annotated[str, 'such as "qemu/web1", or a part of virtd']
    text: str
    hint: Annotated[str, "what can be done about it; may be empty"]
