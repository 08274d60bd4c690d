# SPDX-License-Identifier: LGPL-2.1-or-later
"""One pipe and its log, and the pump thread's state of them."""

from __future__ import annotations

import fcntl
import select
import termios
import time
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from .logfile import LogFile

T = TypeVar("T")

PIPE_SIZE = 1 << 20
LAST_WORDS = 5.0
"""Seconds for which a guest's last bytes stay in the pipe if the file can't be written."""


class Loss(NamedTuple):
    """A log that can't be written: since when (seconds since the epoch), why, bytes dropped so far, and whether that
    is over.
    """

    key: str
    path: str
    since: float
    reason: str
    dropped: int
    over: bool


class Refusal:
    """A file that can't be written (mostly because of a full disk), from the first error until a write succeeds."""

    __slots__ = ("dropped", "hung_up_at", "reason", "retry_at", "since")

    def __init__(self, error: OSError) -> None:
        self.since = time.time()
        self.reason = error.strerror or str(error)
        self.dropped = 0  # bytes
        self.retry_at = 0.0
        self.hung_up_at = 0.0  # when the writers were found to have closed it

    def excess(self, fill: int, capacity: int, now: float) -> int:
        """How many of the oldest of `fill` bytes to drop: if more than half of the pipe is full, all but a quarter of
        it.

        That is everything once the writers are gone and LAST_WORDS have passed.
        """
        if self.hung_up_at and now - self.hung_up_at >= LAST_WORDS:
            return fill
        return fill - (capacity >> 2) if fill > capacity >> 1 else 0


class Channel:
    """One pipe and its log; used only by the pump's thread. Times are those of time.monotonic()."""

    __slots__ = (
        "armed",
        "capacity",
        "check_at",
        "drains",
        "due",
        "empty",
        "fd",
        "gone",
        "key",
        "last",
        "log",
        "moved",
        "on_eof",
        "owed",
        "refusal",
        "told_at",
        "watchers",
    )

    def __init__(
        self, key: str, fd: int, log: LogFile, on_eof: Callable[[str], object] | None, capacity: int
    ) -> None:
        self.key = key
        self.fd = fd
        self.log = log
        self.on_eof = on_eof
        self.capacity = capacity  # of the pipe, in bytes: first the wanted one, then what the kernel granted
        self.moved = 0  # bytes, by this process
        self.watchers = 0
        self.gone = False  # removed, though it may still be in a queue
        # Its next turn: see schedule.py
        self.armed = False  # epoll will report data
        self.due = 0  # the millisecond at which its nap ends; 0 when it isn't napping
        # Results of the latest turns: see mover.py
        self.empty = 0  # long naps in a row that ended with an empty pipe
        self.last = 0.0  # time of the latest look, for the rate
        self.check_at = 0.0  # when to check next where the log's path leads
        self.owed = False  # bytes have been written that watchers don't know of yet
        self.told_at = 0.0  # when the watchers were last notified
        self.drains: list[tuple[int, int, Future[int]]] = []  # `moved` at the request, bytes to move, the answer
        self.refusal: Refusal | None = None

    def answer(self, *, everything: bool = False) -> None:
        """Answer the drains that are done, or with `everything` all of them."""
        left = []
        for start, wanted, future in self.drains:
            moved = self.moved - start
            # One byte more than was there, so that an end of file right behind it is reported first.
            if everything or moved > wanted:
                answer(future, moved)
            else:
                left.append((start, wanted, future))
        self.drains = left

    def fill(self) -> int:
        """How many bytes are in the pipe."""
        return int.from_bytes(fcntl.ioctl(self.fd, termios.FIONREAD, b"\0\0\0\0"), "little")

    def hung_up(self) -> bool:
        """Whether the pipe has no writers any more."""
        poll = select.poll()
        poll.register(self.fd, 0)
        return bool(poll.poll(0))

    def widen(self) -> None:
        """Enlarge the pipe to `capacity` bytes, or as far as allowed; `capacity` is its size from then on."""
        self.capacity = _widen(self.fd, self.capacity)


def answer(future: Future[T], result: T) -> None:
    """Set the result, unless it has been cancelled meanwhile (by a follower that hung up)."""
    if future.set_running_or_notify_cancel():
        future.set_result(result)


def _widen(fd: int, wanted: int) -> int:
    try:
        size = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
    except OSError:
        return 1 << 16
    while wanted > size:
        # Beyond the user's share of pipe memory the kernel answers EPERM; a smaller size may still be allowed.
        try:
            return fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, wanted)
        except OSError:
            wanted >>= 1
    return size
