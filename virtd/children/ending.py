# SPDX-License-Identifier: LGPL-2.1-or-later
"""One ending, the same for every child, once it is known why it ended and that is on record:

    logs and pipes   this process lets go of them
    slots            dropped
    (the owner's)    changes of the host given back
    unit             forgotten by systemd, and with it the exit status; then what the unit needed until here
    directories      removed, with FIFOs and aliases

Each step may be repeated, and one that fails doesn't keep the others from being done. The record names the child
until all of them are done, so this process or the next tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING, Any

from .. import errors, fdstore
from ..systemd import aliases
from . import fifos

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .child import Child

TRIES = 3
AGAIN = 1.0  # seconds until what couldn't be done at an end is tried again

# What a record says of a child that is put away.
GONE: dict[str, Any] = {"unit": "", "slots": {}, "main_pid": 0, "main_start": 0}


async def _nothing() -> None:
    pass


async def put_away(
    child: Child,
    *,
    give_back: Callable[[], Awaitable[object]] = _nothing,
    forgotten: Callable[[], Awaitable[object]] = _nothing,
    remove: Callable[[], Awaitable[object]] = _nothing,
) -> list[Exception]:
    """Put away what is left of a child that has ended, or whose launch is undone. Safe to repeat.

    The owner's part: `give_back` undoes changes of the host, `forgotten` those that the unit needs until systemd has
    forgotten it, `remove` removes its directories. Returns the errors; none when all is put away.
    """

    async def drop() -> None:
        await asyncio.to_thread(child.services.store.drop_prefix, f"{child.key}/")

    async def forget() -> None:
        fifos.retire(child.pipes)  # or its ExecStop= may wait in one
        await _collect(child)
        await forgotten()

    async def clear() -> None:
        fifos.clear(child.pipes)
        aliases.remove(child.aliases)

    await child.close()
    # Directories after the unit: its ExecStop= runs once more, in a sandbox that has them in it.
    steps = (drop, give_back, forget, clear, remove)
    return [exc for step in steps if (exc := await _failure(step())) is not None]


async def _collect(child: Child) -> None:
    """Have systemd forget the unit.

    If its launch was undone while PID 1 couldn't be reached, that run is ended now. One that somebody else has
    started isn't.
    """
    units = await child.services.units()
    try:
        await units.collect(child.unit)
    except errors.Busy:
        state = await units.state(child.unit)
        if state is not None and child.invocation_id not in ("", state.invocation_id):
            raise
        await end(child)
        await units.collect(child.unit)


async def _failure(step: Awaitable[object]) -> Exception | None:
    """The error of `step`, if it fails: the next one is to be done all the same."""
    try:
        await step
    except (errors.VirtdError, fdstore.StoreError, OSError) as exc:
        return exc
    return None


async def end(child: Child) -> None:
    """Kill what a launch that failed may have begun; what can't be done is left for others to find.

    Repeated where that failed: the kill may come before the process, and the connection to the bus may break.
    """
    for _ in range(TRIES):
        with contextlib.suppress(errors.VirtdError):
            units = await child.services.units()
            with contextlib.suppress(errors.NotFound):
                await units.kill(child.unit, signal.SIGKILL)
            await units.ended(child.unit)
            return


async def watch(
    child: Child, finish: Callable[[], Awaitable[object]], held_up: Callable[[errors.VirtdError], object]
) -> None:
    """Wait for the end of the process, and `finish`, again after each VirtdError (no bus at this moment, a PID 1 that
    is very busy, a file system that doesn't answer), which `held_up` gets.
    """
    await child.ended()
    while True:
        try:
            await finish()
            return
        except errors.VirtdError as exc:
            held_up(exc)
            await asyncio.sleep(AGAIN)
