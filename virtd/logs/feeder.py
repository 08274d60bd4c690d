# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a terminal's master end into the pipe that the pump reads, by splice(2), on the event loop.

The pump can't take a terminal itself: one of splice's two ends must be a pipe. As with the pump, no byte is ever in
this process. After a SIGKILL each byte is in the terminal, in the pipe or in the log, and PID 1 holds the first two.
A terminal's buffer is small (some tens of KiB); a program that writes more while no feeder runs is blocked.
"""

from __future__ import annotations

import asyncio
import os
import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

CHUNK = 1 << 16
NAP = 0.01  # seconds until a full pipe is tried again
HUNG_UP = 0.5  # seconds until a terminal that nobody has open is tried again
TRIES = 3  # a pipe that stays full this often, although it was drained, is left alone


class Feeder:
    """Feeds until `close`. The two descriptors remain the caller's; the pipe's write end is opened here."""

    def __init__(self, master: int, pipe: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._master = os.dup(master)
        try:
            # The pipe has no other writer: before this, and after `close`, its reader gets an end of file.
            self._pipe = os.open(f"/proc/self/fd/{pipe}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except BaseException:
            os.close(self._master)
            raise
        os.set_blocking(self._master, False)  # for terminals, splice(2) obeys this and not its own flag
        self._timer: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._master, self._feed)

    def _move(self) -> int:
        """The number of bytes moved; 0 if there are none, or no room for them. OSError (EIO) while nobody has the
        terminal open."""
        try:
            return os.splice(self._master, self._pipe, CHUNK, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return 0

    def _feed(self) -> None:
        try:
            if not self._move():
                self._pause(NAP)
        except OSError:
            self._pause(HUNG_UP)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._master)
        self._timer = self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._timer = None
        self._loop.add_reader(self._master, self._feed)

    async def drain(self, empty: Callable[[], Awaitable[object]]) -> None:
        """Move what is in the terminal now; `empty` makes the pump empty the pipe."""
        tries = 0
        while self._master >= 0 and tries < TRIES:
            try:
                if self._move():
                    tries = 0
                    continue
            except OSError:
                return
            poll = select.poll()
            poll.register(self._master, select.POLLIN)
            if not any(events & select.POLLIN for _, events in poll.poll(0)):
                return
            tries += 1
            await empty()

    def close(self) -> None:
        """Idempotent."""
        if self._master < 0:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._master)
        os.close(self._master)
        os.close(self._pipe)
        self._master = self._pipe = -1
