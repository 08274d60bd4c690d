# SPDX-License-Identifier: LGPL-2.1-or-later
"""A channel's turn: one move from the pipe to the log, and the decision when to look again.

Bytes are as safe in the pipe as in the file, so the pump is free to choose when to wake. A pipe with little in it is
looked at again after a nap; one that fills fast, when it should be half full; an empty one is left to epoll, so that
silent guests cost nothing at all. If somebody watches a pipe, its first bytes are moved at once, and its naps are
short.

A file that can't be written (mostly because of a full disk) never blocks a guest: its pipe keeps what fits in half of
it, older bytes are dropped and counted, and the file is tried again every second. The owner is notified at the
beginning and at the end. The log gets no mark: it contains what the guest wrote and nothing else.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

from .channel import Channel, Loss, Refusal, answer
from .schedule import BRIEF

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from .schedule import Schedule

logger = logging.getLogger(__name__)

# Bytes in one move, during which the kernel holds the pipe's lock and the guest's write waits.
CHUNK = 1 << 20

NAP = 100
"""Milliseconds between two looks at a pipe with little or nothing in it, if nobody watches."""
NAP_WATCHED = 5
"""The same if somebody watches the pipe; also the shortest interval between two calls of `on_bytes` for one key."""
FIRST = 0.0005
"""Seconds until the second look at a pipe that has begun to fill."""
PATIENCE = 3
"""How often a pipe may be empty after a long nap before it is left to epoll: a look is cheaper than a wake-up."""

CHECK = 1.0
"""Seconds between two checks where a log's path leads."""
RETRY = 1.0
"""Seconds between two attempts to write to a file that refused."""


class Mover:
    """The work of the pump's thread, which makes all calls except `close`.

    `on_bytes(key)`, `on_drop(loss)` and `on_end(channel)`, when everything is in the log, are called in that thread
    too.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        on_bytes: Callable[[str], object],
        on_drop: Callable[[Loss], object],
        on_end: Callable[[Channel], object],
    ) -> None:
        self._schedule = schedule
        self._on_bytes = on_bytes
        self._on_drop = on_drop
        self._on_end = on_end
        self._null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Idempotent. To be called when the thread has ended."""
        if self._null >= 0:
            os.close(self._null)
            self._null = -1

    # Requests of the owner

    def enter(self, channel: Channel) -> None:
        channel.widen()
        channel.empty = PATIENCE
        try:
            self._schedule.add(channel)
        except OSError:
            logger.exception("%s cannot be pumped", channel.key)
            self._finish(channel)

    def leave(self, channel: Channel, future: Future[None]) -> None:
        self._schedule.remove(channel)
        self._accepted(channel)
        channel.answer(everything=True)
        answer(future, None)

    def watched(self, channel: Channel, step: int) -> None:
        """The number of watchers has changed."""
        channel.watchers = max(0, channel.watchers + step)
        if step > 0:
            self._hurry(channel)
        elif not channel.watchers:
            channel.owed = False

    def drain(self, channel: Channel, future: Future[int]) -> None:
        if channel.gone:
            answer(future, 0)
            return
        try:
            wanted = channel.fill()
        except OSError:  # the pipe was closed under us: a bug elsewhere, which must not make anybody wait for ever
            answer(future, 0)
            raise
        channel.drains.append((channel.moved, wanted, future))
        if channel.refusal is not None:
            channel.refusal.retry_at = 0.0
        self._hurry(channel)

    def _hurry(self, channel: Channel) -> None:
        """Give it its turn soon. An armed one has nothing to move, and needs none."""
        if not self._schedule.hurry(channel) and channel.armed:
            channel.answer(everything=channel.fill() == 0)

    # Turns

    def serve(self, channel: Channel, now: float) -> None:
        """One move, and the decision when to look again."""
        if channel.gone:
            return
        if channel.refusal is not None and now < channel.refusal.retry_at:
            self._overflow(channel, channel.refusal, now)
            return
        try:
            if now >= channel.check_at:
                channel.check_at = now + CHECK
                channel.log.check()
            moved = channel.log.take(channel.fd, CHUNK)
        except BlockingIOError:
            self._found_empty(channel, now)
        except OSError as error:
            self._refused(channel, now, error)
        else:
            if moved:
                self._has_moved(channel, moved, now)
            else:
                self._finish(channel)

    def stumbled(self, channel: Channel, now: float) -> None:
        """A bug made its turn fail: let it wait a second."""
        self._schedule.nap(channel, int(now * 1000) + 1000)

    def _found_empty(self, channel: Channel, now: float) -> None:
        if channel.empty < PATIENCE:
            channel.empty += 1
            if channel.drains:
                channel.answer(everything=True)
            self._schedule.nap(channel, (int(now * 1000) // NAP + 1) * NAP)
        elif channel.owed and now - channel.told_at < NAP_WATCHED / 1000:
            self._schedule.nap(channel, int(now * 1000) + NAP_WATCHED)
        else:
            self._rest(channel, now)

    def _has_moved(self, channel: Channel, moved: int, now: float) -> None:
        channel.moved += moved
        if channel.refusal is not None:
            self._accepted(channel)
        if channel.drains:
            channel.answer()
        longest = NAP
        channel.empty = 0
        if channel.watchers:
            longest = NAP_WATCHED
            channel.empty = PATIENCE
            channel.owed = True
            if now - channel.told_at >= NAP_WATCHED / 1000:
                self._tell_bytes(channel, now)
        if moved > 4096:
            channel.empty = PATIENCE
        half = channel.capacity >> 1
        # The rate counts bytes since the pipe was last left empty; a move itself can last longer than everything
        # else.
        since, channel.last = now - channel.last, time.monotonic()
        if moved >= half or moved >= CHUNK or channel.drains:
            self._schedule.again(channel)
            return
        if moved > 4096:
            # The time until the pipe is half full at that rate; a first look says nothing.
            seconds = since * half / moved if since < 1.0 else FIRST
            if seconds < BRIEF:
                self._schedule.again(channel, seconds)
                return
            longest = min(longest, int(seconds * 1000))
        # On a grid, so that one wake serves everyone who naps.
        self._schedule.nap(channel, (int(now * 1000) // longest + 1) * longest)

    def _rest(self, channel: Channel, now: float) -> None:
        """The pipe is empty: leave it to epoll."""
        if channel.owed:
            self._tell_bytes(channel, now)
        channel.last = 0.0
        self._schedule.arm(channel)
        if channel.drains:
            channel.answer(everything=True)

    def _finish(self, channel: Channel) -> None:
        """The writers are gone, and everything they wrote is in the log."""
        self._schedule.remove(channel)
        if channel.owed:
            self._tell_bytes(channel, 0.0)
        self._accepted(channel)
        self._on_end(channel)
        channel.answer(everything=True)

    def _tell_bytes(self, channel: Channel, now: float) -> None:
        channel.owed = False
        channel.told_at = now
        self._on_bytes(channel.key)

    # Files that refuse writes

    def _refused(self, channel: Channel, now: float, error: OSError) -> None:
        refusal = channel.refusal
        if refusal is None:
            refusal = channel.refusal = Refusal(error)
            self._say(channel, refusal, over=False)
        refusal.retry_at = now + RETRY
        channel.answer(everything=True)
        if not refusal.hung_up_at and channel.hung_up():
            refusal.hung_up_at = now
        self._overflow(channel, refusal, now)

    def _overflow(self, channel: Channel, refusal: Refusal, now: float) -> None:
        """Make room in the pipe of a log that refuses."""
        fill = channel.fill()
        if not fill:
            # Nothing to lose any more: either all writers are gone, or epoll reports new data.
            refusal.retry_at = 0.0
            if channel.hung_up():
                self._finish(channel)
            else:
                self._rest(channel, now)
            return
        excess = refusal.excess(fill, channel.capacity, now)
        if excess:
            try:
                refusal.dropped += os.splice(channel.fd, self._null, excess, flags=os.SPLICE_F_NONBLOCK)
            except OSError:
                logger.exception("%s cannot be read any more", channel.key)
                self._finish(channel)
                return
        self._schedule.nap(channel, int(now * 1000) + (1 if excess else NAP))

    def _accepted(self, channel: Channel) -> None:
        """The log can be written again, or never will be: its refusal, if any, is over."""
        if channel.refusal is not None:
            self._say(channel, channel.refusal, over=True)
            channel.refusal = None

    def _say(self, channel: Channel, refusal: Refusal, *, over: bool) -> None:
        self._on_drop(Loss(channel.key, channel.log.path, refusal.since, refusal.reason, refusal.dropped, over))
