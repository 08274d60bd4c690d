# SPDX-License-Identifier: LGPL-2.1-or-later
"""Imports asyncio and msgspec without modules that they hardly ever use: saves 10 ms of a restart, and 2 MB for ssl.

asyncio can do without ssl, and so can we. The other modules are imported when they are first used, or at the latest
by `catch_up`: an import at the moment of need may find no descriptor left, or the files of another version.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

PUT_OFF = ("asyncio.sslproto", "inspect", "locale", "msgspec.inspect", "textwrap")


class _StandIn(ModuleType):
    """What importers of the module get in its place."""

    def __getattr__(self, name: str) -> Any:
        _step_aside(self)
        with _without_ssl():
            return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """Modules imported meanwhile get a stand-in for each of these, unless it has been imported already."""
    stand_ins = [_StandIn(name) for name in PUT_OFF if name not in sys.modules]
    sys.modules.update((stand_in.__name__, stand_in) for stand_in in stand_ins)
    try:
        with _without_ssl():
            yield
    finally:
        for stand_in in stand_ins:
            _step_aside(stand_in)


def catch_up() -> None:
    """Import the modules that were put off."""
    with _without_ssl():
        for name in PUT_OFF:
            importlib.import_module(name)


def _step_aside(stand_in: ModuleType) -> None:
    if sys.modules.get(stand_in.__name__) is stand_in:
        del sys.modules[stand_in.__name__]


@contextlib.contextmanager
def _without_ssl() -> Iterator[None]:
    before = {name: sys.modules[name] for name in ("ssl",) if name in sys.modules}
    sys.modules["ssl"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["ssl"]
        sys.modules.update(before)
