# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls to systemd that are repeated if PID 1 re-executes itself (daemon-reexec, its upgrade) without answering.

Its connection to the bus ends then. dbus-daemon answers in its place what it had been asked, and, until it is back,
what it is asked: without its owner the name is one that could be activated, but not by anything that exists.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from .bus import BusError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

LIMIT = 30.0  # seconds; a PID 1 with 1,000 units takes 2 or 3

NO_REPLY = "org.freedesktop.DBus.Error.NoReply"  # perhaps it was carried out
NOT_THERE = (  # it never arrived
    "org.freedesktop.DBus.Error.ServiceUnknown",
    "org.freedesktop.DBus.Error.NameHasNoOwner",
    "org.freedesktop.DBus.Error.Spawn.",
)

T = TypeVar("T")


async def repeated(call: Callable[[], Awaitable[T]], *, twice: bool = True) -> T:
    """What `call()` answers. `twice`: it does no harm if it is carried out twice.

    Raises what it raises: BusError, if PID 1 isn't back by LIMIT.
    """
    again = (NO_REPLY, *NOT_THERE) if twice else NOT_THERE
    left, pause = LIMIT, 0.01
    while True:
        try:
            return await call()
        except BusError as exc:
            if left <= 0 or not exc.name.startswith(again):
                raise
        await asyncio.sleep(pause)
        left -= pause
        pause = min(pause * 2, 0.5)
