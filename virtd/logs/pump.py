# SPDX-License-Identifier: LGPL-2.1-or-later
"""One thread that moves bytes from the guests' pipes to their logs.

It is a thread of its own so that neither a slow disk nor a guest that floods its console holds up the event loop,
and the other way round. Bytes move with splice(2) in one step in the kernel and are never in this process: whatever
kills it, they are either still in the pipe or already in the file.

Since they are as safe in the pipe as in the file, when to wake is a choice. A pipe that was found with little in it
is looked at again after a nap; one that fills fast after as long as it would take to be half full; one that is
empty is left to epoll, so that silent guests cost nothing at all. A pipe that somebody watches gets its first bytes
moved at once and then naps shortly.

A file that can't take bytes (a full disk, most often) never blocks a guest: its pipe keeps what fits in half of it,
older bytes are dropped and counted, and the file is tried again every second. The owner is told at the beginning
and at the end. No mark is left in the log, which holds what the guest wrote and nothing else.

All methods are called by the owner's thread. Callbacks come through `notify(function, *arguments)`, which has to run
`function(*arguments)` in that thread; `loop.call_soon_threadsafe` is made for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import logging
import os
import select
import signal
import termios
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from .logfile import LogFile

T = TypeVar("T")

logger = logging.getLogger(__name__)

PIPE_SIZE = 1 << 20
# One move; while it lasts the kernel holds the pipe's lock and the guest's write waits.
CHUNK = 1 << 20

NAP = 100
"""Milliseconds between two looks at a pipe that has a little in it at most, when nobody watches."""
NAP_WATCHED = 5
"""The same for a pipe that somebody watches; also the shortest time between two calls of `on_bytes` for one key."""

BRIEF = 0.002
"""Seconds below which a nap is slept and not left to epoll, which counts in milliseconds."""
FIRST = 0.0005
"""Seconds to a second look at a pipe that has begun to fill."""
PATIENCE = 3
"""So often a pipe may be found empty after a long nap before epoll has it again: a look is cheaper than a wake."""

CHECK = 1.0
"""Seconds between two looks at where a log's path leads."""
RETRY = 1.0
"""Seconds between two attempts on a file that didn't take bytes."""
LAST_WORDS = 5.0
"""Seconds that a guest's last bytes are kept in the pipe for a file that doesn't take them."""


class Loss(NamedTuple):
    """A log that can't be written: since when (seconds since the epoch), why, bytes dropped so far, and whether it
    is over.
    """

    key: str
    path: str
    since: float
    reason: str
    dropped: int
    over: bool


class _Channel:
    """One pipe and its log; touched by the pump's thread only."""

    __slots__ = (
        "armed",
        "capacity",
        "check_at",
        "due",
        "empty",
        "episode",
        "fd",
        "gone",
        "hung_up_at",
        "key",
        "last",
        "log",
        "moved",
        "on_eof",
        "owed",
        "reason",
        "retry_at",
        "since",
        "told_at",
        "waiting",
        "watchers",
    )

    def __init__(self, key: str, fd: int, log: LogFile, on_eof: Callable[[str], object] | None) -> None:
        self.key = key
        self.fd = fd
        self.log = log
        self.on_eof = on_eof
        self.capacity = PIPE_SIZE
        self.moved = 0  # bytes, in this process's life
        self.watchers = 0
        self.armed = False  # epoll will say when there is something
        self.due = 0  # the tick that the channel naps until; 0 when it doesn't
        self.gone = False
        self.empty = PATIENCE  # long naps in a row that ended with an empty pipe; at PATIENCE it's left to epoll
        self.last = 0.0  # the last look, for the rate
        self.check_at = 0.0
        self.owed = False  # bytes have landed that the watchers weren't told of
        self.told_at = 0.0
        self.waiting: list[tuple[int, int, Future[int]]] = []  # drains: moved before, bytes to move, whom to tell
        self.since = 0.0  # when the file began to refuse; 0.0 while it doesn't
        self.reason = ""
        self.episode = 0  # dropped since then
        self.retry_at = 0.0
        self.hung_up_at = 0.0


class Pump:
    """Pipes in, log files out. Needs `start()`, ends with `close()`.

    `on_bytes(key)` says that bytes have landed for a key that is watched; `on_drop(loss)` that a log can't be
    written, once, and once more when it can again. `on_death()`, called in the thread itself, that it ends by a bug.
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
        self._channels: dict[str, _Channel] = {}
        self._commands: deque[tuple[Callable[..., None], tuple[object, ...]]] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._by_fd: dict[int, _Channel] = {}
        self._ready: deque[_Channel] = deque()
        self._ticks: list[int] = []
        self._naps: dict[int, list[_Channel]] = {}
        self._brief = 0.0
        self._running = False
        self._thread = threading.Thread(target=self._run, name="pump", daemon=True)

    # The owner's side

    def start(self) -> None:
        """Begin to move. What was added before waits until now."""
        self._running = True
        self._thread.start()

    def close(self) -> None:
        """Stop the thread; idempotent. What is in the pipes stays there. The pipes and logs are the caller's to
        close.
        """
        if self._thread.is_alive():
            self._post(self._stop)
            self._thread.join()
        if self._wake >= 0:
            self._epoll.close()
            os.close(self._wake)
            os.close(self._null)
            self._wake = -1
        for channel in self._channels.values():
            channel.gone = True
            self._answer(channel, everything=True)
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
        """Move what comes out of the pipe to the log until `remove` or the end of file.

        The pipe is made to hold `size` bytes, 1 MiB if None, or as many as the kernel allows.

        Both stay the caller's, who leaves them alone until the future of `remove` is done or `on_eof(key)` was
        called; at that call everything is in the log, and the key is free. ValueError if the key is in use.
        """
        if key in self._channels:
            raise ValueError(f"{key} is pumped already")
        channel = _Channel(key, pipe_fd, log, on_eof)
        channel.capacity = PIPE_SIZE if size is None else size
        self._channels[key] = channel
        self._post(self._enter, channel)

    def remove(self, key: str) -> Future[None]:
        """Stop moving; when the future is done the thread has let go of pipe and log. What is in the pipe stays
        there.
        """
        future: Future[None] = Future()
        channel = self._channels.pop(key, None)
        if channel is None:
            future.set_result(None)
        else:
            self._post(self._leave, channel, future)
        return future

    def drain(self, key: str) -> Future[int]:
        """Move what is in the pipe now, at once; the future has the number of bytes moved.

        Less than all of it only if the file refuses it. If the writers are gone, `on_eof` is called before the future
        is done. For a key that isn't pumped (any more), 0.
        """
        future: Future[int] = Future()
        channel = self._channels.get(key)
        if channel is None:
            future.set_result(0)
        else:
            self._post(self._drain, channel, future)
        return future

    def drain_all(self) -> list[Future[int]]:
        """`drain` for every pipe there is."""
        return [self.drain(key) for key in list(self._channels)]

    def watch(self, key: str) -> None:
        """Somebody follows: bytes that are in the pipe are moved now, later ones soon, each time with an
        `on_bytes(key)`.

        Watch first and look at the log's size afterwards, then no byte is missed. Counted; an unknown key is ignored.
        """
        channel = self._channels.get(key)
        if channel is not None:
            self._post(self._watched, channel, 1)

    def unwatch(self, key: str) -> None:
        """One follower less."""
        channel = self._channels.get(key)
        if channel is not None:
            self._post(self._watched, channel, -1)

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        self._commands.append((function, arguments))
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _tell(self, function: Callable[..., object], *arguments: object) -> None:
        # The owner's loop may be closed already, at the very end; then nobody is there to tell.
        with contextlib.suppress(RuntimeError):
            self._notify(function, *arguments)

    def _ended(self, channel: _Channel) -> None:
        """In the owner's thread: the writers are gone and everything they wrote is in the log."""
        if self._channels.get(channel.key) is channel:
            del self._channels[channel.key]
            if channel.on_eof is not None:
                channel.on_eof(channel.key)

    # The thread's side

    def _run(self) -> None:
        try:
            self._go_round()
        except Exception:
            logger.exception("the pump has died")
            if self._on_death is not None:
                self._on_death()

    def _go_round(self) -> None:
        # Signals are for the main thread; here they would only cut naps short.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        poll = self._epoll.poll
        ready = self._ready
        while self._running:
            if ready:
                if self._brief:
                    # epoll counts in milliseconds, which is longer than a fast guest needs to fill its pipe.
                    time.sleep(self._brief)
                timeout = 0.0
            elif self._ticks:
                timeout = max(0.0, self._ticks[0] / 1000 - time.monotonic())
            else:
                timeout = -1.0
            for fd, _ in poll(timeout):
                if fd == self._wake:
                    self._obey()
                elif (channel := self._by_fd.get(fd)) is not None:
                    channel.armed = False
                    ready.append(channel)
            now = time.monotonic()
            self._rise(int(now * 1000))
            self._brief = BRIEF
            # Everyone who is ready has one turn, however much more a flooding one has to say.
            for _ in range(len(ready)):
                channel = ready.popleft()
                try:
                    self._serve(channel, now)
                except Exception:
                    # A bug that concerns one guest must not stop the others' logs.
                    logger.exception("%s: the pump stumbled", channel.key)
                    self._nap(channel, int(now * 1000) + 1000)
            if self._brief == BRIEF:
                self._brief = 0.0

    def _obey(self) -> None:
        os.eventfd_read(self._wake)
        while self._commands:
            function, arguments = self._commands.popleft()
            try:
                function(*arguments)
            except Exception:
                logger.exception("the pump stumbled over a request")

    def _stop(self) -> None:
        self._running = False

    def _enter(self, channel: _Channel) -> None:
        channel.capacity = _widen(channel.fd, channel.capacity)
        channel.armed = True
        try:
            self._epoll.register(channel.fd, select.EPOLLIN | select.EPOLLONESHOT)
        except OSError:
            logger.exception("%s cannot be pumped", channel.key)
            self._finish(channel)
            return
        self._by_fd[channel.fd] = channel

    def _leave(self, channel: _Channel, future: Future[None]) -> None:
        self._let_go(channel)
        if channel.since:
            self._say(channel, over=True)
        self._answer(channel, everything=True)
        _settle(future, None)

    def _let_go(self, channel: _Channel) -> None:
        """Forget the channel; it may still lie in a queue, marked as gone."""
        channel.gone = True
        if self._by_fd.get(channel.fd) is channel:
            del self._by_fd[channel.fd]
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(channel.fd)

    def _finish(self, channel: _Channel) -> None:
        self._let_go(channel)
        if channel.owed:
            self._tell_bytes(channel, 0.0)
        if channel.since:
            self._say(channel, over=True)
        self._tell(self._ended, channel)
        self._answer(channel, everything=True)

    def _watched(self, channel: _Channel, step: int) -> None:
        channel.watchers = max(0, channel.watchers + step)
        if step > 0:
            self._hurry(channel)
        elif not channel.watchers:
            channel.owed = False

    def _drain(self, channel: _Channel, future: Future[int]) -> None:
        if channel.gone:
            _settle(future, 0)
            return
        try:
            wanted = _fill(channel.fd)
        except OSError:  # the pipe was closed under us: a bug elsewhere, for which nobody here has to wait for ever
            _settle(future, 0)
            raise
        channel.waiting.append((channel.moved, wanted, future))
        channel.retry_at = 0.0
        self._hurry(channel)

    def _hurry(self, channel: _Channel) -> None:
        """End the channel's nap. One that is armed has nothing, and one that is in the queue has its turn soon."""
        if channel.due and not channel.gone:
            channel.due = 0
            self._ready.append(channel)
        elif channel.armed:
            self._answer(channel, everything=_fill(channel.fd) == 0)

    def _rise(self, tick: int) -> None:
        """Queue the channels whose nap is over."""
        while self._ticks and self._ticks[0] <= tick:
            due = heapq.heappop(self._ticks)
            for channel in self._naps.pop(due):
                if channel.due == due:
                    channel.due = 0
                    self._ready.append(channel)

    def _nap(self, channel: _Channel, until: int) -> None:
        channel.due = until
        sleepers = self._naps.get(until)
        if sleepers is None:
            self._naps[until] = [channel]
            heapq.heappush(self._ticks, until)
        else:
            sleepers.append(channel)

    def _serve(self, channel: _Channel, now: float) -> None:
        """One turn: one move, and the decision when to look again."""
        if channel.gone:
            return
        if channel.since and now < channel.retry_at:
            self._overflow(channel, now)
            return
        try:
            if now >= channel.check_at:
                channel.check_at = now + CHECK
                channel.log.check()
            moved = channel.log.take(channel.fd, CHUNK)
        except BlockingIOError:
            if channel.empty < PATIENCE:
                channel.empty += 1
                if channel.waiting:
                    self._answer(channel, everything=True)
                self._nap(channel, (int(now * 1000) // NAP + 1) * NAP)
            elif channel.owed and now - channel.told_at < NAP_WATCHED / 1000:
                self._nap(channel, int(now * 1000) + NAP_WATCHED)
            else:
                self._rest(channel, now)
            return
        except OSError as error:
            self._refused(channel, now, error)
            return
        if not moved:
            self._finish(channel)
            return
        channel.moved += moved
        if channel.since:
            self._recovered(channel)
        if channel.waiting:
            self._answer(channel)
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
        # The rate is what came since the pipe was last left empty; a move itself can last longer than all the rest.
        since, channel.last = now - channel.last, time.monotonic()
        if moved >= half or moved >= CHUNK or channel.waiting:
            self._brief = 0.0
            self._ready.append(channel)
            return
        if moved > 4096:
            # At that rate it takes this long until the pipe is half full; a first look tells nothing.
            seconds = since * half / moved if since < 1.0 else FIRST
            if seconds < BRIEF:
                self._brief = min(self._brief, seconds)
                self._ready.append(channel)
                return
            longest = min(longest, int(seconds * 1000))
        # On a grid, so that one wake serves everyone who naps.
        self._nap(channel, (int(now * 1000) // longest + 1) * longest)

    def _rest(self, channel: _Channel, now: float) -> None:
        """The pipe is empty: have epoll say when it isn't."""
        if channel.owed:
            self._tell_bytes(channel, now)
        channel.last = 0.0
        channel.armed = True
        self._epoll.modify(channel.fd, select.EPOLLIN | select.EPOLLONESHOT)
        if channel.waiting:
            self._answer(channel, everything=True)

    def _tell_bytes(self, channel: _Channel, now: float) -> None:
        channel.owed = False
        channel.told_at = now
        if self._on_bytes is not None:
            self._tell(self._on_bytes, channel.key)

    def _answer(self, channel: _Channel, *, everything: bool = False) -> None:
        """Tell the drains that have got what they asked for."""
        left = []
        for start, wanted, future in channel.waiting:
            moved = channel.moved - start
            # One byte more than was there, so that an end of file that comes next is told first.
            if everything or moved > wanted:
                _settle(future, moved)
            else:
                left.append((start, wanted, future))
        channel.waiting = left

    # A file that refuses

    def _refused(self, channel: _Channel, now: float, error: OSError) -> None:
        channel.retry_at = now + RETRY
        if not channel.since:
            channel.since = time.time()
            channel.reason = error.strerror or str(error)
            channel.episode = 0
            channel.hung_up_at = 0.0
            self._say(channel, over=False)
        self._answer(channel, everything=True)
        if not channel.hung_up_at and _hung_up(channel.fd):
            channel.hung_up_at = now
        self._overflow(channel, now)

    def _overflow(self, channel: _Channel, now: float) -> None:
        """Make room in the pipe of a log that refuses: keep a quarter, drop what is before it."""
        fill = _fill(channel.fd)
        spare = fill - (channel.capacity >> 2) if fill > channel.capacity >> 1 else 0
        if channel.hung_up_at and now - channel.hung_up_at >= LAST_WORDS:
            spare = fill
        if spare:
            try:
                dropped = os.splice(channel.fd, self._null, spare, flags=os.SPLICE_F_NONBLOCK)
            except OSError:
                logger.exception("%s cannot be read any more", channel.key)
                self._finish(channel)
                return
            channel.episode += dropped
        if not fill:
            channel.retry_at = 0.0
            self._serve_empty(channel, now)
        else:
            self._nap(channel, int(now * 1000) + (1 if spare else NAP))

    def _serve_empty(self, channel: _Channel, now: float) -> None:
        """Nothing to lose any more: either everyone is gone, or epoll says when there is something again."""
        if _hung_up(channel.fd):
            self._finish(channel)
        else:
            self._rest(channel, now)

    def _recovered(self, channel: _Channel) -> None:
        self._say(channel, over=True)
        channel.since = 0.0

    def _say(self, channel: _Channel, *, over: bool) -> None:
        loss = Loss(channel.key, channel.log.path, channel.since, channel.reason, channel.episode, over)
        if self._on_drop is not None:
            self._tell(self._on_drop, loss)


def _fill(fd: int) -> int:
    """How many bytes are in the pipe."""
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"), "little")


def _hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


def _settle(future: Future[T], result: T) -> None:
    """Tell the result, unless whoever wanted it has gone meanwhile (a follower that hung up)."""
    if future.set_running_or_notify_cancel():
        future.set_result(result)


def _widen(fd: int, wanted: int) -> int:
    """Make the pipe hold `wanted` bytes, or as many as it may; returns its size in bytes."""
    try:
        size = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
    except OSError:
        return 1 << 16
    while wanted > size:
        # Past the user's share of pipe memory the kernel says EPERM; a smaller one may still fit.
        try:
            return fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, wanted)
        except OSError:
            wanted >>= 1
    return size
