# SPDX-License-Identifier: LGPL-2.1-or-later
"""One ending, the same for every child, once it is known why it ended and that is on record:

    logs and pipes   this process lets go of them
    slots            dropped
    (the owner's)    changes of the host given back
    unit             forgotten by systemd, and with it the exit status; then what the unit needed until here
    directories      removed, with FIFOs and aliases

Each may be done twice, and what can't be done keeps nothing else from being done. The record tells of the child until
all of it is: so whoever finds it there, in this process or the next, puts it away once more.
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
    """Put away what a child leaves that has ended, or whose launch is undone. Safe to repeat.

    The owner's part: `give_back` undoes changes of the host, `forgotten` those that the unit needs until systemd has
    forgotten it, `remove` takes its directories away. What was in the way: nothing when all is put away.
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

    A launch may have been undone while PID 1 couldn't be told: that very run is ended now, but no other one, which
    somebody else has begun.
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
    """What was in the way of `step`, which must not keep the next one from being done."""
    try:
        await step
    except (errors.VirtdError, fdstore.StoreError, OSError) as exc:
        return exc
    return None


async def end(child: Child) -> None:
    """Kill what a launch that failed may have begun; what can't be done is left for others to find.

    Once more where it was for nothing: the kill may come before the process, and the bus may have broken off.
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
    """Wait for the end of the process, and `finish`: again and again while a VirtdError is in the way (no bus at this
    moment, a PID 1 that is very busy, a file system that doesn't answer), of which `held_up` is told.
    """
    await child.ended()
    while True:
        try:
            await finish()
            return
        except errors.VirtdError as exc:
            held_up(exc)
            await asyncio.sleep(AGAIN)
