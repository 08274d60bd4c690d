# SPDX-License-Identifier: LGPL-2.1-or-later
"""When each channel has its next turn.

Between two turns a channel is in one of three places: armed in epoll, which reports when its pipe has data; napping
until a certain millisecond; or in the queue for the next round. Naps end on a grid, so that one wake-up serves many
channels.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import select
import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .channel import Channel

BRIEF = 0.002
"""Shorter naps, in seconds, are slept and not left to epoll, which counts in milliseconds."""


class Schedule:
    """Used by the pump's thread, except for `wake`, which any thread may call. Ends with `close`."""

    def __init__(self) -> None:
        self.channels: dict[int, Channel] = {}  # by descriptor
        self._woken = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._woken, select.EPOLLIN)
        self._queue: deque[Channel] = deque()
        self._ticks: list[int] = []  # a heap: the milliseconds at which naps end
        self._naps: dict[int, list[Channel]] = {}
        self._brief = 0.0

    def close(self) -> None:
        """Idempotent."""
        if self._woken >= 0:
            self._epoll.close()
            os.close(self._woken)
            self._woken = -1

    def wake(self) -> None:
        """Make `wait` return True."""
        if self._woken >= 0:
            os.eventfd_write(self._woken, 1)

    def wait(self) -> bool:
        """Wait until there are turns; True if `wake` was called."""
        if self._queue:
            if self._brief:
                # epoll's unit is a millisecond, which is longer than a fast guest needs to fill its pipe.
                time.sleep(self._brief)
            timeout = 0.0
        elif self._ticks:
            timeout = max(0.0, self._ticks[0] / 1000 - time.monotonic())
        else:
            timeout = -1.0
        woken = False
        for fd, _ in self._epoll.poll(timeout):
            if fd == self._woken:
                os.eventfd_read(fd)
                woken = True
            elif (channel := self.channels.get(fd)) is not None:
                channel.armed = False
                self._queue.append(channel)
        return woken

    def turns(self, now: float) -> Iterator[Channel]:
        """The channels whose turn it is: each once a round, however much a flooding one has to write."""
        self._end_naps(int(now * 1000))
        self._brief = BRIEF
        for _ in range(len(self._queue)):
            yield self._queue.popleft()
        if self._brief == BRIEF:
            self._brief = 0.0

    # Places to wait

    def add(self, channel: Channel) -> None:
        """Add a channel, armed. Raises OSError if its descriptor can't be polled."""
        channel.armed = True
        self._epoll.register(channel.fd, select.EPOLLIN | select.EPOLLONESHOT)
        self.channels[channel.fd] = channel

    def remove(self, channel: Channel) -> None:
        """Forget a channel. It may still be in the queue, marked as gone."""
        channel.gone = True
        if self.channels.get(channel.fd) is channel:
            del self.channels[channel.fd]
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(channel.fd)

    def arm(self, channel: Channel) -> None:
        """Its pipe is empty: let epoll report when it isn't."""
        channel.armed = True
        self._epoll.modify(channel.fd, select.EPOLLIN | select.EPOLLONESHOT)

    def nap(self, channel: Channel, until: int) -> None:
        """Let it wait until that millisecond of time.monotonic()."""
        channel.due = until
        sleepers = self._naps.get(until)
        if sleepers is None:
            self._naps[until] = [channel]
            heapq.heappush(self._ticks, until)
        else:
            sleepers.append(channel)

    def again(self, channel: Channel, pause: float = 0.0) -> None:
        """Give it its turn in the next round, which begins after `pause` seconds, or earlier for another channel."""
        self._brief = min(self._brief, pause)
        self._queue.append(channel)

    def hurry(self, channel: Channel) -> bool:
        """End its nap; False if it isn't napping, in which case its turn comes as soon as there is data anyway."""
        if not channel.due or channel.gone:
            return False
        channel.due = 0
        self._queue.append(channel)
        return True

    def _end_naps(self, tick: int) -> None:
        while self._ticks and self._ticks[0] <= tick:
            due = heapq.heappop(self._ticks)
            for channel in self._naps.pop(due):
                if channel.due == due:
                    channel.due = 0
                    self._queue.append(channel)
