# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a container's record says beyond what every guest's does, typed.

A record may be damaged, or another version's: a value that isn't of its type counts as absent, and such a row of a
table is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from ...model.container import IdMap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...records import Record

T = TypeVar("T")


class Init(msgspec.Struct, frozen=True):
    """The first program as a process of the host; `start` as in `process`."""

    pid: int
    start: int


class Identity(NamedTuple):
    """What a file or a block device is, whatever it is called."""

    dev: int
    ino: int


class Image(NamedTuple):
    """A volume that is mounted as the root file system."""

    path: str
    dev: int
    ino: int
    writes: bool


class Card(NamedTuple):
    """An interface in a network."""

    mac: str
    network: str


class Kept:
    """The driver's own part of a record, read as it is asked for."""

    def __init__(self, data: Mapping[str, object]) -> None:
        self._data = data

    @classmethod
    def of(cls, record: Record | None) -> Kept:
        return cls(record.data if record is not None else {})

    @property
    def root(self) -> str:
        """The directory of the root file system; "" if it isn't known."""
        return self._value("root", str) or ""

    @property
    def halt(self) -> str:
        """The signal that asks the first program to end, chosen at the start by what the root file system holds."""
        return self._value("halt", str) or "SIGPWR"

    @property
    def ids(self) -> IdMap | None:
        found = self._value("ids", Identity)  # two numbers as well
        return IdMap(*found) if found is not None else None

    @property
    def privileged(self) -> bool:
        """Whether it runs without a user namespace."""
        return self._data.get("ids", False) is None

    @property
    def init(self) -> Init | None:
        return self._value("init", Init)

    @property
    def interfaces(self) -> list[str]:
        """The host's ends of its interfaces."""
        return self._rows("interfaces", str)

    @property
    def cards(self) -> list[Card]:
        return self._rows("macs", Card)

    @property
    def images(self) -> list[Image]:
        return self._rows("images", Image)

    @property
    def held(self) -> list[Identity]:
        """The disks among its devices."""
        return self._rows("held", Identity)

    def _value(self, key: str, kind: type[T]) -> T | None:
        try:
            return msgspec.convert(self._data.get(key), kind)
        except msgspec.ValidationError:
            return None

    def _rows(self, key: str, kind: type[T]) -> list[T]:
        rows = self._data.get(key)
        found = []
        for row in rows if isinstance(rows, (list, tuple)) else ():
            try:
                found.append(msgspec.convert(row, kind))
            except msgspec.ValidationError:
                continue
        return found
