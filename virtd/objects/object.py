# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every object and every definition has, whichever driver it belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import asyncio
    from enum import StrEnum

    from ..records import Record
    from .protocol import Problem


class Definition(Protocol):
    """What every definition has."""

    @property
    def name(self) -> str: ...
    @property
    def uuid(self) -> str | None: ...
    @property
    def autostart(self) -> bool: ...


class Object(Protocol):
    """What every object has. One without a definition is kept as long as it is active."""

    name: str
    definition: Any
    definition_text: str
    record: Record | None
    problems: dict[str, Problem]
    settled: asyncio.Event  # cleared while it isn't known whether it runs

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


T = TypeVar("T", bound=Object)
D = TypeVar("D", bound=Definition)
