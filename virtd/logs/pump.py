# SPDX-License-Identifier: LGPL-2.1-or-later
"""One thread that moves bytes from the guests' pipes to their logs.

It is a thread of its own so that neither a slow disk nor a guest that floods its console delays the event loop, nor
the event loop the pump. splice(2) moves bytes in one step in the kernel, so that they are never in this process:
whatever kills it, they are either still in the pipe or already in the file.

When bytes are moved, and what happens to those that a file refuses, is in mover.py and schedule.py.

All methods are for the owner's thread. Callbacks are made through `notify(function, *arguments)`, which has to run
`function(*arguments)` in that thread, like `loop.call_soon_threadsafe`.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING

from .channel import PIPE_SIZE, Channel, Loss
from .mover import Mover
from .schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable

    from .logfile import LogFile

__all__ = ["Loss", "Pump"]

logger = logging.getLogger(__name__)


class Pump:
    """Moves pipes' bytes to log files, from `start()` to `close()`.

    `on_bytes(key)` reports new bytes in the log of a watched key; `on_drop(loss)` that a log can't be written, once,
    and once more when it can again. `on_death()` is called in the thread itself if a bug ends it.
    """

    def __init__(
        self,
        notify: Callable[..., object],
        *,
        on_bytes: Callable[[str], object] | None = None,
        on_drop: Callable[[Loss], object] | None = None,
        on_death: Callable[[], object] | None = None,
    ) -> None:
        self._notify = notify
        self._on_bytes = on_bytes
        self._on_drop = on_drop
        self._on_death = on_death
        self._channels: dict[str, Channel] = {}
        self._commands: deque[tuple[Callable[..., None], tuple[object, ...]]] = deque()
        self._schedule = Schedule()
        self._mover = Mover(
            self._schedule,
            on_bytes=lambda key: self._tell(self._on_bytes, key),
            on_drop=lambda loss: self._tell(self._on_drop, loss),
            on_end=lambda channel: self._tell(self._ended, channel),
        )
        self._running = False
        self._thread = threading.Thread(target=self._run, name="pump", daemon=True)

    # For the owner's thread

    def start(self) -> None:
        """Begin to move, also for pipes that were added before."""
        self._running = True
        self._thread.start()

    def close(self) -> None:
        """Stop the thread; idempotent. Bytes in the pipes stay there. The caller closes the pipes and logs."""
        if self._thread.is_alive():
            self._post(self._stop)
            self._thread.join()
        self._schedule.close()
        self._mover.close()
        for channel in self._channels.values():
            channel.gone = True
            channel.answer(everything=True)
        self._channels.clear()

    def add(
        self,
        key: str,
        pipe_fd: int,
        log: LogFile,
        on_eof: Callable[[str], object] | None = None,
        *,
        size: int | None = None,
    ) -> None:
        """Move bytes from the pipe to the log until `remove` or the end of file.

        The pipe is enlarged to `size` bytes, 1 MiB if None, or as far as the kernel allows.

        Both remain the caller's, who must not touch them until the future of `remove` is done or `on_eof(key)` has
        been called; by then everything is in the log, and the key is free. ValueError if the key is in use.
        """
        if key in self._channels:
            raise ValueError(f"{key} is pumped already")
        channel = Channel(key, pipe_fd, log, on_eof, PIPE_SIZE if size is None else size)
        self._channels[key] = channel
        self._post(self._mover.enter, channel)

    def remove(self, key: str) -> Future[None]:
        """Stop moving; once the future is done, the thread uses neither pipe nor log. Bytes in the pipe stay
        there."""
        future: Future[None] = Future()
        channel = self._channels.pop(key, None)
        if channel is None:
            future.set_result(None)
        else:
            self._post(self._mover.leave, channel, future)
        return future

    def drain(self, key: str) -> Future[int]:
        """Move at once what is in the pipe now; the future's result is the number of bytes moved.

        Less than all of it only if the file can't be written. If the writers are gone, `on_eof` is called before the
        future is done. The result is 0 for a key that isn't pumped (any more).
        """
        future: Future[int] = Future()
        channel = self._channels.get(key)
        if channel is None:
            future.set_result(0)
        else:
            self._post(self._mover.drain, channel, future)
        return future

    def drain_all(self) -> list[Future[int]]:
        """`drain` every pipe."""
        return [self.drain(key) for key in list(self._channels)]

    def watch(self, key: str) -> None:
        """Add a follower: bytes in the pipe are moved now, later ones soon, each time with an `on_bytes(key)`.

        To miss no byte, watch first and look at the log's size afterwards. Calls are counted; an unknown key is
        ignored.
        """
        self._watched(key, 1)

    def unwatch(self, key: str) -> None:
        """Remove a follower."""
        self._watched(key, -1)

    def _watched(self, key: str, step: int) -> None:
        channel = self._channels.get(key)
        if channel is not None:
            self._post(self._mover.watched, channel, step)

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        """Make the thread call it."""
        self._commands.append((function, arguments))
        self._schedule.wake()

    def _ended(self, channel: Channel) -> None:
        """The writers are gone, and everything that they wrote is in the log."""
        if self._channels.get(channel.key) is channel:
            del self._channels[channel.key]
            if channel.on_eof is not None:
                channel.on_eof(channel.key)

    # In the thread

    def _run(self) -> None:
        try:
            self._go_round()
        except Exception:
            logger.exception("the pump has died")
            if self._on_death is not None:
                self._on_death()

    def _go_round(self) -> None:
        # The main thread handles signals; here they would only cut naps short.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while self._running:
            if self._schedule.wait():
                self._obey()
            now = time.monotonic()
            for channel in self._schedule.turns(now):
                try:
                    self._mover.serve(channel, now)
                except Exception:
                    # A bug that affects one guest must not stop the others' logs.
                    logger.exception("%s: the pump stumbled", channel.key)
                    self._mover.stumbled(channel, now)

    def _obey(self) -> None:
        while self._commands:
            function, arguments = self._commands.popleft()
            try:
                function(*arguments)
            except Exception:
                logger.exception("the pump stumbled over a request")

    def _stop(self) -> None:
        self._running = False

    def _tell(self, function: Callable[..., object] | None, *arguments: object) -> None:
        """Make the owner's thread call it."""
        if function is not None:
            # At the very end the owner's loop may already be closed; then there is nobody to notify.
            with contextlib.suppress(RuntimeError):
                self._notify(function, *arguments)
