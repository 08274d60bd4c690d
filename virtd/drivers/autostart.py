# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starting at boot, when nobody is there to try once more."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from .. import errors
from .protocol import Problem

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

AGAIN = (1.0, 2.0, 4.0)  # seconds before each further try
# What may be over in a moment: the bus broke off, PID 1 was busy, a process died. What a definition says isn't.
PASSING = (errors.HostError, errors.StartFailed, errors.TimedOut, errors.MonitorError, errors.Disconnected)


class Startable(Protocol):
    name: str
    problems: dict[str, Problem]


async def autostart(one: Startable, start: Callable[[], Awaitable[object]]) -> None:
    """`start` an object; "start" among its problems says why it couldn't be."""
    for pause in (*AGAIN, None):
        try:
            await start()
        except errors.VirtdError as exc:
            one.problems["start"] = Problem(f"Autostart failed: {exc.message}", exc.hint)
            if pause is None or not isinstance(exc, PASSING):
                log.error("Cannot autostart %s: %s", one.name, exc)
                return
            log.warning("Cannot autostart %s: %s; trying again in %g s", one.name, exc, pause)
            await asyncio.sleep(pause)
        else:
            one.problems.pop("start", None)
            return
