# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limits for unprivileged callers, over all front ends: calls a second, concurrent calls, unread replies.

Root never waits. Each other user has a share, and all of them together have one too, since there may be a thousand of
them. A user beyond it isn't refused: the next call is handled when its turn comes, one user after the other, and
until then nothing more is read from that user.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

from ..allowance import Bucket

if TYPE_CHECKING:
    from collections.abc import Callable

# Calls a second, and how many at once after a pause. A call that everybody may make takes some 0.5 ms, one with a
# large reply (a listing of a thousand guests) 10 ms: all users together get about a quarter of the loop's time.
RATE, BURST = 200.0, 200.0
ALL_RATE, ALL_BURST = 400.0, 400.0
BIG = 16 << 10  # bytes of a reply that count as much as a call
RUNNING, ALL_RUNNING = 8, 16  # concurrent calls, except those that wait for something to happen
UNSENT, ALL_UNSENT = 2 << 20, 16 << 20  # bytes of unread replies
USERS = 1024  # remembered; a forgotten one starts afresh


class User:
    """One user's usage."""

    __slots__ = ("arrivals", "bucket", "running", "unsent", "waiting")

    def __init__(self, now: float) -> None:
        self.bucket = Bucket(RATE, BURST, now)
        self.arrivals = Bucket(RATE, BURST, now)  # connections, which cost something even before the first call
        self.running = 0
        self.unsent = 0
        self.waiting: deque[asyncio.Future[None]] = deque()

    def idle(self, now: float) -> bool:
        return not (self.running or self.unsent or self.waiting) and self.bucket.full(now) and self.arrivals.full(now)


class Turn:
    """The right to have one call answered. `leave` it when the answer is ready, or when the call begins to wait."""

    __slots__ = ("_limits", "_user")

    def __init__(self, limits: Limits | None = None, user: User | None = None) -> None:
        self._limits = limits
        self._user = user

    def leave(self, size: int = 0) -> None:
        """Let the next call in; `size` of the reply in bytes. Idempotent."""
        user, self._user = self._user, None
        if self._limits is not None and user is not None:
            self._limits._end(user, size)


class TooMuch(Exception):
    """The user has left too many replies unread."""


class Limits:
    """The shares of all users but root. For the event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._users: dict[int, User] = {}
        self._queue: dict[int, User] = {}  # users who wait, in the order of their turns
        self._all = Bucket(ALL_RATE, ALL_BURST, clock())
        self._running = 0
        self._unsent = 0
        self._timer: asyncio.TimerHandle | None = None

    def user(self, uid: int) -> User:
        user = self._users.get(uid)
        if user is None:
            now = self._clock()
            if len(self._users) >= USERS:
                for other in [known for known, its in self._users.items() if its.idle(now)]:
                    del self._users[other]
            user = self._users[uid] = User(now)
        return user

    def arrives(self, uid: int) -> bool:
        """Whether to serve a new connection of this user: not if connections come faster than calls may."""
        if uid == 0:
            return True
        user = self.user(uid)
        if user.arrivals.due(self._clock()) > 0:
            return False
        user.arrivals.take()
        return True

    async def turn(self, uid: int, cost: float = 1.0) -> Turn:
        """Wait until the user's next call may be handled."""
        if uid == 0:
            return Turn()
        user = self.user(uid)
        if uid not in self._queue and self._may(user):
            self._begin(user)
        else:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            user.waiting.append(future)
            self._queue.setdefault(uid, user)
            self._look()
            try:
                await future
            except asyncio.CancelledError:
                if future.done() and not future.cancelled():
                    self._end(user, 0)
                raise
        if cost > 1:
            self._charge(user, cost - 1)
        return Turn(self, user)

    def unsent(self, uid: int, size: int) -> None:
        """Count bytes that wait for a client to read them, or, if negative, no longer do.

        Raises TooMuch, and then counts nothing. A user's first reply is allowed however large it is.
        """
        if uid == 0:
            return
        user = self.user(uid)
        if size > 0 and ((user.unsent and user.unsent + size > UNSENT) or self._unsent + size > ALL_UNSENT):
            raise TooMuch
        user.unsent += size
        self._unsent += size

    def _may(self, user: User) -> bool:
        now = self._clock()
        return (
            user.running < RUNNING
            and self._running < ALL_RUNNING
            and user.bucket.due(now) <= 0
            and self._all.due(now) <= 0
        )

    def _begin(self, user: User) -> None:
        user.running += 1
        self._running += 1
        self._charge(user, 1.0)

    def _charge(self, user: User, cost: float) -> None:
        user.bucket.take(cost)
        self._all.take(cost)

    def _end(self, user: User, size: int) -> None:
        user.running -= 1
        self._running -= 1
        self._charge(user, size / BIG)
        if self._queue:
            self._look()

    def _look(self) -> None:
        """Let in all whose turn it is, and schedule the next look."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue and self._running < ALL_RUNNING:
            now = self._clock()
            wait = self._all.due(now)
            if wait <= 0:
                uid, wait = self._next(now)
                if uid is not None:
                    self._let_in(uid)
                    continue
            if wait < float("inf"):
                self._timer = asyncio.get_running_loop().call_later(wait, self._look)
            return

    def _next(self, now: float) -> tuple[int | None, float]:
        """Whose turn it is; or nobody, and for how many seconds."""
        soonest = float("inf")
        for uid, user in self._queue.items():
            if user.running < RUNNING:
                wait = user.bucket.due(now)
                if wait <= 0:
                    return uid, 0.0
                soonest = min(soonest, wait)
        return None, soonest

    def _let_in(self, uid: int) -> None:
        user = self._queue.pop(uid)
        while user.waiting:
            future = user.waiting.popleft()
            if not future.done():
                self._begin(user)
                future.set_result(None)
                break
        if user.waiting:
            self._queue[uid] = user  # behind all others
