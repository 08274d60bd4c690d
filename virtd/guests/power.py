# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ending a process, gracefully or at once: what the drivers' operations have in common."""

from __future__ import annotations

import contextlib
import signal
import time
from typing import TYPE_CHECKING

from .. import errors
from ..hints import do, option
from ..model.state import State
from ..objects.turns import within
from ..text import span

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ..objects.object import D
    from .guest import Guest

TERM_LIMIT = 5.0
# A process can't be killed while it waits for a slow disk.
KILL_LIMIT = 10.0
LADDER = ((signal.SIGTERM, TERM_LIMIT), (signal.SIGKILL, KILL_LIMIT))
ASK_AGAIN = 5.0  # seconds after which one that hasn't ended is asked again
SHUTDOWN_GIVEN_UP = "shutdown given up"  # a request's verb


async def shutdown(
    machine: Guest[D],
    timeout: float,
    by: str,
    *,
    require: Callable[[], Awaitable[None]],
    ask: Callable[[State], Awaitable[None]],
    again: Callable[[], Awaitable[None]],
) -> bool:
    """Ask it to end and wait until it has. Raises TimedOut; it then runs on.

    `require()` raises InvalidState when it can't be asked; `ask(was)`: the driver's own way, given the state before;
    what it raises ends the wait. `again()` repeats it every ASK_AGAIN seconds, since one that was still starting may
    have missed it.
    """
    deadline = time.monotonic() + timeout
    async with machine.exclusive("shut down"):
        await require()
        was = machine.state
        machine.note(State.STOPPING, f"asked to shut down by {by}", data=machine.ask("shutdown", by))
        await ask(was)
    while (left := deadline - time.monotonic()) > 0:
        if await within(machine.over, min(left, ASK_AGAIN)):
            return True
        if machine.state is State.STOPPING:
            await again()
    late = f"did not shut down within {span(timeout)}"
    async with machine.exclusive("shut down"):
        if machine.state is State.STOPPING and machine.child is not None and machine.child.alive():
            # Kept on record, since it may still be about to end; but no longer the reason if something else ends it.
            machine.note(State.RUNNING, late, data=machine.ask(SHUTDOWN_GIVEN_UP, by))
    raise errors.TimedOut(
        f"{machine.name} {late}",
        hint="It runs on. Give it more time with "
        + option("timeout")
        + ", or end it at once: "
        + do("stop", machine.noun, machine.name)
        + ".",
    )


async def _at_once() -> bool:
    return False


async def stop(
    machine: Guest[D],
    by: str,
    *,
    gently: Callable[[], Awaitable[bool]] = _at_once,
    ladder: tuple[tuple[signal.Signals, float], ...] = (),
    whole: bool = False,
    hanging: str = "Is what it reads or writes hanging?",
) -> bool:
    """End it; False if it wasn't running.

    `gently`: a driver's own way, tried first, which returns whether that ended it. Then signals are sent (`ladder`,
    by default LADDER, each with the seconds to wait for its effect) to its main process or, with `whole`, to all of
    its processes. Raises TimedOut, with `hanging` as the hint.
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
