# SPDX-License-Identifier: LGPL-2.1-or-later
"""The end of every child, once it is known why it ended and that is on record:

    logs and pipes   closed by this process
    slots            dropped
    (the owner's)    changes of the host reverted
    unit             forgotten by systemd, with the exit status; then the owner reverts what the unit needed so far
    directories      removed, with FIFOs and aliases

Each step can be repeated, and one that fails doesn't prevent the others. The record names the child until all of them
are done, so this process or the next one tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING

from .. import errors, fdstore
from ..systemd import aliases
from . import fifos

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ..records import Process
    from .child import Child

TRIES = 3
AGAIN = 1.0  # seconds until a failed step is tried again

# The record's fields after a child has been put away.
GONE: Process = {"unit": "", "slots": {}, "main_pid": 0, "main_start": 0}


async def _nothing() -> None:
    pass


async def put_away(
    child: Child,
    *,
    give_back: Callable[[], Awaitable[object]] = _nothing,
    forgotten: Callable[[], Awaitable[object]] = _nothing,
    remove: Callable[[], Awaitable[object]] = _nothing,
) -> list[Exception]:
    """Clean up what is left of a child that has ended, or whose launch is undone. Safe to repeat.

    The owner's part: `give_back` reverts changes of the host, `forgotten` those that the unit needs until systemd has
    forgotten it, `remove` removes its directories. Returns the errors; none if everything is cleaned up.
    """

    async def drop() -> None:
        await asyncio.to_thread(child.services.store.drop_prefix, f"{child.key}/")

    async def forget() -> None:
        fifos.retire(child.pipes)  # otherwise its ExecStop= may block on one
        await _collect(child)
        await forgotten()

    async def clear() -> None:
        fifos.clear(child.pipes)
        aliases.remove(child.aliases)

    await child.close()
    # Directories after the unit: its ExecStop= runs once more, in a sandbox that contains them.
    steps = (drop, give_back, forget, clear, remove)
    return [exc for step in steps if (exc := await _failure(step())) is not None]


async def _collect(child: Child) -> None:
    """Make systemd forget the unit.

    If its launch was undone while PID 1 couldn't be reached, that run is ended now, but not one that somebody else
    has started.
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
    """The error of `step`, if it fails: the next one is done all the same."""
    try:
        await step
    except (errors.VirtdError, fdstore.StoreError, OSError) as exc:
        return exc
    return None


async def end(child: Child) -> None:
    """Kill what a failed launch may have started; whatever can't be killed is left for others to find.

    Repeated if it fails: the kill may come before the process, and the connection to the bus may break.
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
    """Wait for the end of the process, and `finish`, again after each VirtdError (no bus at the moment, a very busy
    PID 1, a file system that doesn't answer), which is passed to `held_up`.
    """
    await child.ended()
    while True:
        try:
            await finish()
            return
        except errors.VirtdError as exc:
            held_up(exc)
            await asyncio.sleep(AGAIN)
