# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ending what runs as a process, at once: what every driver's stop has in common."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING, Any

from .. import errors
from ..model.state import State
from ..objects.turns import within

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .guest import Guest

TERM_LIMIT = 5.0
# A process in the middle of a request to a slow disk can't be killed before that is over.
KILL_LIMIT = 10.0
LADDER = ((signal.SIGTERM, TERM_LIMIT), (signal.SIGKILL, KILL_LIMIT))


async def _at_once() -> bool:
    return False


async def stop(
    machine: Guest[Any],
    by: str,
    *,
    gently: Callable[[], Awaitable[bool]] = _at_once,
    ladder: tuple[tuple[signal.Signals, float], ...] = (),
    whole: bool = False,
    hanging: str = "Is what it reads or writes hanging?",
) -> bool:
    """End it; False if it wasn't running. `gently`: a driver's own way, which comes first and tells whether it has
    ended by it; then signals, LADDER unless given, each with the seconds that are waited for its effect, to its main
    process or, with `whole`, to all of its processes. Raises TimedOut, with `hanging` for a hint.
    """
    async with machine.exclusive("stop"):
        if not machine.alive:
            machine.wait_for(None)
            return False
        machine.note(State.STOPPING, f"being stopped by {by}", data=machine.ask("stop", by))
        if await gently():
            return True
        units = await machine.shared.services.units()
        for number, limit in ladder or LADDER:
            with contextlib.suppress(errors.NotFound):
                await units.kill(machine.unit, number, whole=whole)
            if await within(machine.over, limit):
                return True
    raise errors.TimedOut(f"{machine.name} could not be ended, not even by SIGKILL", hint=hanging)
