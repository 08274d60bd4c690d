# SPDX-License-Identifier: LGPL-2.1-or-later
"""asyncio and msgspec without what they import and hardly ever use: 10 ms of a restart, and 2 MB for ssl.

asyncio does without ssl where there is none, and so do we. The rest is imported when something of it is first used,
and by `catch_up` at the latest: an import in the moment of need may find no descriptor left, or files of another
version.
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
    """What an importer of the module has in its place."""

    def __getattr__(self, name: str) -> Any:
        _step_aside(self)
        with _without_ssl():
            return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """What is imported meanwhile gets a stand-in for each of these, unless the module is there already."""
    stand_ins = [_StandIn(name) for name in PUT_OFF if name not in sys.modules]
    sys.modules.update((stand_in.__name__, stand_in) for stand_in in stand_ins)
    try:
        with _without_ssl():
            yield
    finally:
        for stand_in in stand_ins:
            _step_aside(stand_in)


def catch_up() -> None:
    """Import what was put off."""
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
